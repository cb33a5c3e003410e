"""``ema diff``: how far two sets of weights are from one another, tensor by tensor and as a whole.

Knows: how weights are named on the command line, and how a difference is shown. Does not know: norms, HTTP. Imports
torch only when it runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ema_client.cli import show
from ema_client.cli.answers import Answer, Table
from ema_client.cli.options import without_torch
from ema_client.cli.progress import moving
from ema_client.client import EmaClient
from ema_client.errors import UsageError, listed
from ema_client.scratch import scratch_folder

if TYPE_CHECKING:
    from torch import Tensor

    from ema_client.checkpoints import Difference

__all__ = ["diff"]

#: RUN, RUN:AVERAGE, RUN@SNAPSHOT, RUN:AVERAGE@SNAPSHOT.
_WEIGHTS = re.compile(
    r"([A-Za-z0-9][A-Za-z0-9._-]*)(?::([A-Za-z0-9][A-Za-z0-9._-]*))?(?:@([A-Za-z0-9][A-Za-z0-9._-]*))?\Z"
)
_HELP = "RUN, RUN@SNAPSHOT, RUN:AVERAGE, RUN:AVERAGE@SNAPSHOT, or a file that is there."


def diff(
    client: EmaClient,
    a: Annotated[str, typer.Argument(metavar="A", help=_HELP, show_default=False)],
    b: Annotated[str, typer.Argument(metavar="B", help="The same: what A is compared with.", show_default=False)],
) -> Answer:
    """How far A is from B: |A - B| / |B| of each tensor, the farthest first, and of the whole at the end.

    Of a file, the EMA that `ema import` would take. The weights of a run lie in a temporary folder ($TMPDIR) meanwhile.
    """
    try:
        from ema_client.checkpoints import difference
    except ModuleNotFoundError:
        raise without_torch() from None
    with scratch_folder() as folder:
        ours, theirs = _weights(client, a, folder / "a"), _weights(client, b, folder / "b")
        found = difference(_named_as(theirs, a, ours), _named_as(ours, b, theirs))
    if not found.tensors:
        raise UsageError(f"{a} and {b} have no tensor of one name and shape")
    return Answer({"a": a, "b": b, "difference": found}, tuple(_shown(found, a, b)))


def _weights(client: EmaClient, said: str, place: Path) -> Mapping[str, Tensor]:
    """The weights that an argument names. place: a path for those of a run."""
    from ema_client.checkpoints import read

    if Path(said).exists():
        return read(Path(said)).tensors
    named = _WEIGHTS.match(said)
    if named is None:
        raise UsageError(f"{said!r} is neither a file that is there nor a run", hint=_HELP)
    run, average, snapshot = named.groups()
    with moving(said) as progress:
        client.download(run, place, average=average, snapshot=snapshot, progress=progress)
    return read(place).tensors


def _named_as(others: Mapping[str, Tensor], said: str, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights by the names of ``others``, where a file has all of them behind a prefix and none as it is."""
    from ema_client.checkpoints import read_parameters

    if own.keys() & others.keys() or not Path(said).exists():
        return own
    try:
        return read_parameters(Path(said), list(others)).tensors
    except UsageError:
        return own


def _shown(found: Difference, a: str, b: str) -> Iterator[str | Table]:
    table = Table(("tensor", "shape", "distance", "largest"))
    for each in found.tensors:
        shape = " x ".join(map(str, each.shape)) or "scalar"
        table.add(each.name, shape, show.number(each.distance), show.number(each.largest))
    yield table
    for names, what in (
        (found.only_a, f"only {a} has"),
        (found.only_b, f"only {b} has"),
        (found.misshapen, "of other shapes:"),
    ):
        if names:
            yield f"{what} {listed(names)}"
    yield f"whole: {show.number(found.distance)} over {len(found.tensors)} tensors"
