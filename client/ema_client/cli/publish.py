"""``ema publish``: EMA weights to where people load models from.

Knows: its arguments, and what is told of what was published. Does not know: places, formats, HTTP, torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ema_client.cli import show
from ema_client.cli.answers import Answer
from ema_client.cli.options import Average, Dtype, Run, Snapshot
from ema_client.cli.progress import moving
from ema_client.client import EmaClient
from ema_client.publishing import Published
from ema_client.publishing import publish as publish_weights
from ema_client.targets import Wished

__all__ = ["publish"]


def publish(
    client: EmaClient,
    run: Run,
    to: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="hf://owner/name[@branch][/folder], s3:// or gs://bucket/prefix, abfs://container/prefix, file:///folder.",
            show_default=False,
        ),
    ],
    wished: Wished,
    format: Annotated[
        str | None,
        typer.Option(
            help="transformers, diffusers or plain (safetensors alone); by default what the config.json is of.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="The model's config.json, published with the weights; by default the one that is there stays.",
            show_default=False,
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            help="Publish beside the weights that are loaded by default: ema for from_pretrained(variant='ema').",
            show_default=False,
        ),
    ] = None,
    module: Annotated[
        str | None,
        typer.Option(
            help="Only the tensors of this module, by their names in the module: unet for unet.conv_in.weight.",
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Larger weights become shards with an index, such as 500MB or 5GiB.")
    ] = "5GB",
    public: Annotated[
        bool, typer.Option("--public", help="Make a new model on the Hub for everybody, not for its owner alone.")
    ] = False,
    snapshot: Snapshot = None,
    average: Average = None,
    dtype: Dtype = None,
) -> Answer:
    """Publish EMA weights to the Hugging Face Hub, a bucket or a folder, as transformers and diffusers load them.

    With an index of shards where the weights are large, and a model card that says which weights these are. Until all
    is there, whoever loads gets what was published before.
    """
    with moving(run) as progress:
        done = publish_weights(
            client,
            run,
            to,
            format=format,
            variant=variant,
            config=config,
            module=module,
            max_shard_size=max_shard_size,
            public=public,
            snapshot=snapshot,
            average=average,
            dtype=dtype,
            progress=progress,
            **wished,
        )
    return Answer(done, _said(done))


def _said(done: Published) -> tuple[str, ...]:
    info = done.info
    files = done.files[0] if len(done.files) == 1 else f"{len(done.files)} shards and their index"
    commit = f", commit {done.commit}" if done.commit else ""
    said = f"{done.url}: {done.format}, {files}, {show.size(done.bytes)}{commit}"
    which = f"{info.run}/{info.average}, version {info.version}, step {show.shown('step', info.step)}"
    removed = (f"  {len(done.removed)} files of earlier weights are removed",) if done.removed else ()
    return (said, f"  {which}", *removed, *(f"  {note}" for note in done.notes))
