"""``ema import`` and ``ema export``: EMAs of other programs into a run, and back.

Knows: what a user is told of a checkpoint, and what a run is made with where the checkpoint does not say. Does not
know: formats (checkpoints), HTTP. Imports torch only when a command runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ema_client.cli import show
from ema_client.cli.answers import Answer
from ema_client.cli.options import Average, Run, Snapshot, without_torch
from ema_client.cli.progress import moving
from ema_client.client import EmaClient
from ema_client.errors import UsageError, listed
from ema_client.protocol import RunInfo

if TYPE_CHECKING:
    from ema_client.checkpoints import Imported

__all__ = ["export", "import_run"]

Like = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        help="The model itself, for what the other side does not hold: its state dict, or its folder of "
        "save_pretrained().",
        show_default=False,
    ),
]


def import_run(
    client: EmaClient,
    path: Annotated[
        Path,
        typer.Argument(
            exists=True, help="A .safetensors, .pt or .ckpt file, or a folder of save_pretrained().", show_default=False
        ),
    ],
    run: Run,
    format: Annotated[
        str | None,
        typer.Option(
            help="litema, torch-ema, averaged-model, diffusers, timm, ema-pytorch, ema-service (of `ema pull`) or "
            "state-dict; by default found out.",
            show_default=False,
        ),
    ] = None,
    like: Like = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(help="Leave out names of this pattern, such as '*.alphas_cumprod'. May be repeated."),
    ] = None,
    copied: Annotated[
        list[str] | None,
        typer.Option(help="Hold the newest value of names of this pattern, not an average. May be repeated."),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            help="Take the names that begin so, without it; '' takes all as they are. By default `module.` in front of "
            "all names is taken for DataParallel's.",
            show_default=False,
        ),
    ] = None,
    decay: Annotated[
        float | None,
        typer.Option(help="Instead of the checkpoint's; if it has none, that program's default.", show_default=False),
    ] = None,
    num_updates: Annotated[
        int | None, typer.Option(min=0, help="Instead of the checkpoint's counter.", show_default=False)
    ] = None,
) -> Answer:
    """Make a run of an EMA that another program kept, or that was exported from here, with its counter and decay.

    Nothing of the file is executed. The run has the program's schedule where the file holds it, LitEma's and EMAModel's
    warm-ups among them, else a constant decay: a warm-up that began anew would wash the average out. Where the
    program's next update would have another decay than the run's, that is said.
    """
    try:
        from ema_client.checkpoints import read
    except ModuleNotFoundError:
        raise without_torch() from None
    found = read(path, format=format, like=like, drop=drop or (), keep=copied or (), prefix=prefix)
    going_on = found.going_on if num_updates is None else replace(found.going_on, num_updates=num_updates)
    known = going_on.decay if decay is None else decay
    largest = going_on.usual_decay if known is None else known
    with moving(path.name) as progress:
        info = client.create_run(
            run,
            found.tensors,
            decay=largest,
            use_num_updates=going_on.num_updates is not None,
            schedule=going_on.average,
            copied=_matching(found.tensors, copied or ()),
            num_updates=going_on.num_updates,
            step=found.step,
            progress=progress,
        )
    assumed = " (not in the file: the program's default; --decay sets it)" if known is None else ""
    made = f"{run}: {info.tensors} tensors, {show.size(info.bytes)}, {_counted(info)}, decay {largest:.6g}{assumed}"
    overridden = num_updates is not None or (decay is not None and going_on.decay is not None)
    difference = "" if overridden else going_on.difference(largest)
    said = (*_found(path, found), made, *((f"  {difference}",) if difference else ()))
    about = {"format": found.format, "source": found.source, "left_out": found.dropped, "notes": found.notes}
    return Answer({"path": path, **about, "difference": difference or None, "run": info}, said)


def export(
    client: EmaClient,
    run: Run,
    path: Annotated[
        Path, typer.Argument(help="The file to write; for diffusers perhaps a folder.", show_default=False)
    ],
    format: Annotated[str, typer.Option(help="litema, safetensors or diffusers.")] = "safetensors",
    snapshot: Snapshot = None,
    average: Average = None,
    like: Like = None,
) -> Answer:
    """Write EMA weights as another program loads them."""
    with moving(run) as progress:
        if format == "safetensors":
            info = client.download(run, path, average=average, snapshot=snapshot, progress=progress)
        else:
            try:
                from ema_client.checkpoints import write
            except ModuleNotFoundError:
                raise without_torch() from None
            weights = client.pull(run, average=average, snapshot=snapshot, progress=progress)
            info = weights.info
            write(path, format, weights, info, like=like)
    said = f"{path}: {format} of {info.run}/{info.average}, version {info.version}, num_updates {info.num_updates}"
    return Answer({"path": path, "format": format, **dataclasses.asdict(info)}, (said,))


def _found(path: Path, found: Imported) -> Iterator[str]:
    source = f" ({found.source})" if found.source else ""
    yield f"{path}: {found.format}{source}, {len(found.tensors)} tensors"
    if found.dropped:
        yield f"  left out, as no parameters: {listed(found.dropped)}"
    for note in found.notes:
        yield f"  {note}"


def _counted(info: RunInfo) -> str:
    """Where the run stands, and how its decay goes on."""
    step = "" if info.step is None else f"step {info.step}, "
    if not info.use_num_updates:
        return f"{step}no counter, constant decay"
    constant = ", constant decay" if info.averages[0].schedule == "constant" else ""
    return f"{step}num_updates {info.num_updates}{constant}"


def _matching(names: Iterable[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """The names that one of the patterns fits. Raises UsageError for a pattern that fits none."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"--copied {pattern!r} fits no tensor of the file")
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
