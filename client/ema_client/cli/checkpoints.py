"""``ema import`` and ``ema export``: EMAs of other programs into a run, and back.

Knows: what a user is told of a checkpoint, and what a run is made with where the checkpoint does not say. Does not
know: formats (checkpoints), HTTP. Imports torch only when a command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ema_client.cli import show
from ema_client.cli.options import Average, Run, Token, Url, connect
from ema_client.errors import UsageError, listed
from ema_client.protocol import DEFAULT_DECAY

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
            help="litema, averaged-model, diffusers, timm, ema-pytorch or state-dict; by default found out.",
            show_default=False,
        ),
    ] = None,
    like: Like = None,
    drop: Annotated[
        list[str] | None,
        typer.Option(help="Leave out names of this pattern, such as '*.alphas_cumprod'. May be repeated."),
    ] = None,
    decay: Annotated[
        float | None, typer.Option(help="Instead of the checkpoint's; 0.9999 if it has none.", show_default=False)
    ] = None,
    num_updates: Annotated[
        int | None, typer.Option(min=0, help="Instead of the checkpoint's counter.", show_default=False)
    ] = None,
    url: Url = None,
    token: Token = None,
) -> None:
    """Make a run of an EMA that LitEma, torch, diffusers, timm or ema-pytorch kept, with its counter and decay.

    Nothing of the file is executed. Where it has no counter the run has none either (its decay is constant): a
    warm-up that began anew would wash the average out.
    """
    try:
        from ema_client.checkpoints import read
    except ModuleNotFoundError:
        raise _without_torch() from None
    found = read(path, format=format, like=like, drop=drop or ())
    counter = found.num_updates if num_updates is None else num_updates
    known = found.decay if decay is None else decay
    _say_what_was_found(path, found)
    with connect(context, url, token) as client:
        info = client.create_run(
            run,
            found.tensors,
            decay=DEFAULT_DECAY if known is None else known,
            use_num_updates=counter is not None and counter >= 0,
            num_updates=counter if counter is not None and counter >= 0 else None,
        )
    counted = f"num_updates {info.num_updates}" if info.use_num_updates else "no counter, constant decay"
    assumed = " (not in the file; --decay sets it)" if known is None else ""
    show.say(f"{run}: {info.tensors} tensors, {show.size(info.bytes)}, {counted}, decay {info.decay:.6g}{assumed}")


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


def _without_torch() -> UsageError:
    return UsageError("this command handles tensors and torch is not installed", hint="pip install 'ema-client[torch]'")
