"""publish(): EMA weights of one version from the service to a place, in the order that keeps the place whole.

Each shard appears when it is whole, under a name that no index has named before; the index appears after all shards,
and shards of an earlier publish are removed after the index. Whoever loads meanwhile, or after a publish that was
killed, loads the earlier weights or the new ones, and never some of both.

Knows: the order of writing. Does not know: how a place is written to, formats, HTTP, torch.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Unpack, cast

from ema_client.client import EmaClient
from ema_client.errors import UsageError
from ema_client.protocol import WeightsInfo
from ema_client.publishing.card import CARD, About, card
from ema_client.publishing.naming import CONFIG, Naming, format_of
from ema_client.publishing.shards import Cutter, bytes_of
from ema_client.publishing.stores import Store, open_store
from ema_client.targets import Wished

__all__ = ["Published", "publish"]

#: The most bytes of a file's weights, as transformers writes them.
_SHARD = "5GB"


@dataclass(frozen=True, slots=True)
class Published:
    """What was published, and where.

    info: which weights. url, format: where, and for which library. files: the weights' files by name. bytes: of the
    weights. removed: files of earlier weights that are gone. commit: on the Hub. notes: what whoever loads should know.
    """

    info: WeightsInfo
    url: str
    format: str
    files: tuple[str, ...]
    bytes: int
    removed: tuple[str, ...]
    commit: str | None
    notes: tuple[str, ...]


def publish(
    client: EmaClient,
    run: str,
    to: str | Store,
    *,
    format: str | None = None,
    variant: str | None = None,
    config: str | os.PathLike[str] | None = None,
    module: str | None = None,
    max_shard_size: int | str = _SHARD,
    public: bool = False,
    average: str | None = None,
    snapshot: str | None = None,
    soup: Mapping[str, float] | None = None,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    **wished: Unpack[Wished],
) -> Published:
    """Publish the EMA weights of one version as transformers or diffusers load them, without torch.

    The weights pass through, whatever their size; to the Hub one shard at a time lies on this machine's disk ($TMPDIR).
    Nobody loads a part: a publish that ends early leaves what was published before. One publish at a time to one place.

    Args:
        run, average, snapshot, soup, wished, progress: as for ``EmaClient.download()``.
        to: ``hf://owner/name[@branch][/folder]``, ``s3://bucket/prefix`` (or ``gs://``, ``abfs://``),
            ``file:///folder``, or a Store of one's own.
        format: "transformers", "diffusers" or "plain" (safetensors alone); by default what the config.json is of.
        variant: published beside the weights that are loaded by default: "ema" for ``from_pretrained(variant="ema")``.
        config: the model's config.json, published with the weights; by default the one that is there stays.
        module: only the tensors of this module, by their names in the module: "unet" for ``unet.conv_in.weight``.
        max_shard_size: bytes, or a text such as "5GB" or "500MiB"; larger weights become shards with an index.
        public: a model that is made on the Hub is there for everybody; by default for its owner alone.
        dtype: as safetensors writes it, such as "BF16"; by default the shadow's own.

    Raises what ``EmaClient.download()`` raises: ProtocolError where the connection broke and the run has gone on since,
    which a ``snapshot`` does not; DestinationFailed where the place refuses; UsageError for a place, format or size
    that there is not; OSError where a folder, or $TMPDIR, cannot be written.
    """
    given = None if config is None else Path(config).read_bytes()
    naming = Naming(format or format_of(given), variant)
    most = bytes_of(max_shard_size)
    if module is not None and (not module or module.endswith(".")):
        raise UsageError(f"module={module!r} names no module", hint="without the dot at its end: module=unet")
    store = open_store(to, public=public) if isinstance(to, str) else to
    before = store.names()
    known = store.read(CONFIG) if given is None and CONFIG in before else given
    naming = Naming(format or format_of(known), variant)
    with Cutter(store.writing, _names(naming, before, at_once=store.at_once), most, module) as cutter:
        info = client.download(
            run,
            cast(BinaryIO, cutter),
            average=average,
            snapshot=snapshot,
            soup=soup,
            dtype=dtype,
            prefix=f"{module}." if module else None,
            progress=progress,
            **wished,
        )
        # Weights in one file appear with finish(): by then the service's digest was compared, and the config is there.
        if given is not None:
            _put(store, CONFIG, given)
        cutter.finish()
    written = [*cutter.files]
    if naming.whole not in written:
        _put(store, naming.index, cutter.index())
        written.append(naming.index)
    _put_card(store, before, _about(info, naming, known, cutter, store))
    removed = naming.superseded(before, written)
    commit = store.finish(removed, f"EMA of {info.run}, {_step(info)}version {info.version}")
    files, size = tuple(cutter.files), cutter.data_bytes
    return Published(info, store.url, naming.format, files, size, removed, commit, _notes(naming, known))


def _names(naming: Naming, before: Collection[str], *, at_once: bool) -> Callable[[int], Sequence[str]]:
    """The names of so many shards. Where files are seen one by one, no file of a name that is there is replaced."""

    def names(count: int) -> Sequence[str]:
        if count == 1:
            return (naming.whole,)
        plain = naming.shards(count)
        return plain if at_once or not {*plain} & {*before} else naming.shards(count, secrets.token_hex(4))

    return names


def _put(store: Store, name: str, content: bytes) -> None:
    with store.writing(name, len(content)) as file:
        file.write(content)


def _put_card(store: Store, before: Collection[str], about: About) -> None:
    earlier = store.read(CARD).decode(errors="replace") if CARD in before else None
    _put(store, CARD, card(about, earlier).encode())


def _about(info: WeightsInfo, naming: Naming, config: bytes | None, cutter: Cutter, store: Store) -> About:
    return About(
        info=info,
        naming=naming,
        config=config,
        files=tuple(cutter.files),
        tensors=sum(len(shard.entries) for shard in cutter.files.values()),
        bytes=cutter.data_bytes,
        date=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        loads_from=store.loads_from(),
    )


def _notes(naming: Naming, config: bytes | None) -> tuple[str, ...]:
    if naming.format == "plain" or config is not None:
        return ()
    return (f"there is no {CONFIG}, without which {naming.format} loads no model: publish again with the model's own",)


def _step(info: WeightsInfo) -> str:
    return "" if info.step is None else f"step {info.step}, "
