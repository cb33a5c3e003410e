"""Commands that move weights between a run and files of weights: pull, push.

Knows: their arguments, and where a file's weights go. Does not know: HTTP, formats of checkpoints, how a bar is drawn.
Imports torch only when a file is pushed.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from ema_client.cli.answers import Answer
from ema_client.cli.options import Average, Dtype, Prefix, Run, Snapshot, without_torch
from ema_client.cli.progress import moving
from ema_client.client import MOST_LANES, EmaClient
from ema_client.errors import UsageError
from ema_client.protocol import UpdateResult, WeightsInfo
from ema_client.targets import Wished

if TYPE_CHECKING:
    from ema_client.checkpoints import Parameters

__all__ = ["pull", "push"]

#: The name of standard output.
_STANDARD = Path("-")


def pull(
    client: EmaClient,
    run: Run,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="The safetensors file to write; - is standard output.",
            dir_okay=False,
            allow_dash=True,
        ),
    ],
    wished: Wished,
    snapshot: Snapshot = None,
    soup: Annotated[
        str | None,
        typer.Option(metavar="NAME:WEIGHT,…", help="The sum of snapshots, each times its weight.", show_default=False),
    ] = None,
    average: Average = None,
    dtype: Dtype = None,
    prefix: Prefix = None,
    lanes: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_LANES, help="Connections at once; by default as many as pay.", show_default=False),
    ] = None,
) -> Answer:
    """Save EMA weights as a safetensors file.

    Where the connection is lost for good, or the command is killed (kill -9), the same command goes on with what came.
    """
    mixed = None if soup is None else _soup(soup)
    target = _output(output)
    client.lanes = lanes
    with moving(run) as progress:
        info = client.download(
            run,
            target,
            average=average,
            snapshot=snapshot,
            soup=mixed,
            dtype=dtype,
            prefix=prefix,
            resume=output != _STANDARD,
            progress=progress,
            **wished,
        )
    place = "standard output" if output == _STANDARD else output
    said = f"{place}: {info.run}/{info.average}, version {info.version}, step {info.step}, {_which(info)}"
    data = {"path": output, **dataclasses.asdict(info), "link": client.link}
    return Answer(data, (said, f"link: {client.link}"), aside=output == _STANDARD)


def _output(path: Path) -> Path | BinaryIO:
    if path != _STANDARD:
        return path
    if sys.stdout.isatty():
        raise UsageError(
            "weights are no text for a terminal", hint="give a file as --output, or a pipe: ema pull -o - |"
        )
    return sys.stdout.buffer


def _which(info: WeightsInfo) -> str:
    """The decay of an average, or what was wished for, and how nearly it came."""
    if info.target is None:
        return f"decay {info.decay:.6g}"
    return f"num_updates {info.num_updates}, {info.target}, error {info.profile_error or 0.0:.2g}"


def _soup(said: str) -> dict[str, float]:
    """The weight of each snapshot. Raises BadParameter."""
    weights: dict[str, float] = {}
    for part in said.split(","):
        name, _, weight = part.partition(":")
        try:
            known, weights[name] = name in weights, float(weight)
        except ValueError:
            raise typer.BadParameter(f"--soup: {part!r} is not NAME:WEIGHT, as in last:0.5,best:0.5") from None
        if known:
            raise typer.BadParameter(f"--soup: the snapshot {name!r} stands there twice")
    return weights


def push(
    client: EmaClient,
    path: Annotated[
        Path,
        typer.Argument(
            exists=True,
            metavar="FILE",
            help="A .safetensors, .pt or .ckpt file, or a folder of save_pretrained().",
            show_default=False,
        ),
    ],
    run: Run,
    step: Annotated[
        int | None,
        typer.Option(min=0, help="The trainer's step; by default the one after the run's.", show_default=False),
    ] = None,
    within: Annotated[
        str | None,
        typer.Option(
            "--prefix",
            help="What stands in front of the run's names in the file; by default found out.",
            show_default=False,
        ),
    ] = None,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Shut out the trainer that is attached to the run.")
    ] = False,
) -> Answer:
    """Send the parameters in a file as one update of a run. Nothing of the file is executed.

    The parameters, not an EMA of them: the tensors of the run's names, wherever they stand in the file.
    """
    try:
        from ema_client.checkpoints import read_parameters
    except ModuleNotFoundError:
        raise without_torch() from None
    found = read_parameters(path, [spec.name for spec in client.layout(run).layout], prefix=within)
    writer = client.attach(run) if take_over else None
    with moving(path.name) as progress:
        result = client.push(run, found.tensors, step=step, writer=writer, progress=progress)
    data = {"path": path, "prefix": found.prefix, **dataclasses.asdict(result), "link": client.link}
    return Answer(data, (*_pushed(path, run, found, result), f"link: {client.link}"))


def _pushed(path: Path, run: str, found: Parameters, result: UpdateResult) -> Iterator[str]:
    where = f" behind {found.prefix!r}" if found.prefix else ""
    beside = f", {found.others} others left out" if found.others else ""
    yield f"{path}: {len(found.tensors)} parameters{where}{beside}"
    decay = "" if result.effective_decay is None else f", decay {result.effective_decay:.6g}"
    known = "" if result.applied else "was there before: "
    yield f"{run}: {known}step {result.step}, num_updates {result.num_updates}, version {result.version}{decay}"
