"""``ema import`` and ``ema export``: EMAs of other programs into a run, and back.

Knows: what a user is told of a checkpoint, and what a run is made with where the checkpoint does not say. Does not
know: formats (checkpoints), HTTP. Imports torch only when a command runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ema_client.cli import show
from ema_client.cli.options import Average, Run, Token, Url, connect
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
    context: typer.Context,
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
    decay: Annotated[
        float | None,
        typer.Option(help="Instead of the checkpoint's; if it has none, that program's default.", show_default=False),
    ] = None,
    num_updates: Annotated[
        int | None, typer.Option(min=0, help="Instead of the checkpoint's counter.", show_default=False)
    ] = None,
    url: Url = None,
    token: Token = None,
) -> None:
    """Make a run of an EMA that another program kept, or that was exported from here, with its counter and decay.

    Nothing of the file is executed. The run has the program's schedule where the file holds it, LitEma's and EMAModel's
    warm-ups among them, else a constant decay: a warm-up that began anew would wash the average out. Where the
    program's next update would have another decay than the run's, that is said.
    """
    try:
        from ema_client.checkpoints import read
    except ModuleNotFoundError:
        raise _without_torch() from None
    found = read(path, format=format, like=like, drop=drop or (), keep=copied or ())
    _say_what_was_found(path, found)
    going_on = found.going_on if num_updates is None else replace(found.going_on, num_updates=num_updates)
    known = going_on.decay if decay is None else decay
    largest = going_on.usual_decay if known is None else known
    with connect(context, url, token) as client:
        info = client.create_run(
            run,
            found.tensors,
            decay=largest,
            use_num_updates=going_on.num_updates is not None,
            schedule=going_on.average,
            copied=_matching(found.tensors, copied or ()),
            num_updates=going_on.num_updates,
            step=found.step,
        )
    assumed = " (not in the file: the program's default; --decay sets it)" if known is None else ""
    show.say(f"{run}: {info.tensors} tensors, {show.size(info.bytes)}, {_counted(info)}, decay {largest:.6g}{assumed}")
    overridden = num_updates is not None or (decay is not None and going_on.decay is not None)
    if not overridden and (difference := going_on.difference(largest)):
        show.say(f"  {difference}")


def export(
    context: typer.Context,
    run: Run,
    path: Annotated[
        Path, typer.Argument(help="The file to write; for diffusers perhaps a folder.", show_default=False)
    ],
    format: Annotated[str, typer.Option(help="litema, safetensors or diffusers.")] = "safetensors",
    snapshot: Annotated[str | None, typer.Option(help="The weights of this snapshot.", show_default=False)] = None,
    average: Average = None,
    like: Like = None,
    url: Url = None,
    token: Token = None,
) -> None:
    """Write EMA weights as another program loads them."""
    with connect(context, url, token) as client:
        if format == "safetensors":
            info = client.download(run, path, average=average, snapshot=snapshot)
        else:
            try:
                from ema_client.checkpoints import write
            except ModuleNotFoundError:
                raise _without_torch() from None
            weights = client.pull(run, average=average, snapshot=snapshot)
            info = weights.info
            write(path, format, weights, info, like=like)
    show.say(f"{path}: {format} of {info.run}/{info.average}, version {info.version}, num_updates {info.num_updates}")


def _say_what_was_found(path: Path, found: Imported) -> None:
    source = f" ({found.source})" if found.source else ""
    show.say(f"{path}: {found.format}{source}, {len(found.tensors)} tensors")
    if found.dropped:
        show.say(f"  left out, as no parameters: {listed(found.dropped)}")
    for note in found.notes:
        show.say(f"  {note}")


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


def _without_torch() -> UsageError:
    return UsageError("this command handles tensors and torch is not installed", hint="pip install 'ema-client[torch]'")
