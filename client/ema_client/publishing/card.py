"""The model card of published weights: which weights these are, and how they are loaded.

Of a card that is there already one block is written anew, that of the same files: licence, prose, tags and the blocks
of other variants stay.

Knows: the Hub's front matter, Markdown. Does not know: places, files, the service.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ema_client.protocol import WeightsInfo
from ema_client.publishing.naming import Naming, read_config

__all__ = ["CARD", "About", "card"]

#: The name under which the Hub shows a card.
CARD = "README.md"
_END = "<!-- ema-client: end -->"
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class About:
    """What a card tells. tensors, bytes: the number of tensors, and of their bytes; date: of the publishing.

    files: the weights' files. loads_from: what from_pretrained() takes, see Store.
    """

    info: WeightsInfo
    naming: Naming
    config: builtins.bytes | None
    files: tuple[str, ...]
    tensors: int
    bytes: int
    date: str
    loads_from: tuple[str, Mapping[str, str]]


def card(about: About, before: str | None) -> str:
    """The card, in place of the card ``before``: of that everything but the block of an earlier publish stays."""
    begin = f"<!-- ema-client: {about.naming.whole} -->"
    block = "\n".join((begin, *_lines(about), _END))
    if before is None:
        return f"{_front(about.naming)}# {about.info.run}\n\n{block}\n"
    earlier = re.compile(f"{re.escape(begin)}.*?{re.escape(_END)}", re.DOTALL)
    if earlier.search(before):
        return earlier.sub(lambda _: block, before, count=1)
    return f"{before.rstrip()}\n\n{block}\n"


def _loading(about: About) -> str:
    """Lines of Python that load the weights."""
    place, given = about.loads_from
    if about.naming.format == "plain":
        return (
            "from pathlib import Path\n\nfrom safetensors.torch import load_file\n\n"
            f'folder = Path("{"." if "://" in place or given else place}")  # with the files of this page\n'
            f"weights = {{}}\nfor name in {list(about.files)}:\n    weights.update(load_file(folder / name))"
        )
    fetched = ""
    if "://" in place:
        folder = f"{about.info.run}-{about.info.average}"
        fetched = (
            f'import fsspec\n\nfiles, path = fsspec.url_to_fs("{place}")\n'
            f'files.get(f"{{path}}/", "{folder}/", recursive=True)\n'
        )
        place = f"./{folder}"
    variant = {"variant": about.naming.variant} if about.naming.variant else {}
    words = "".join(f', {name}="{value}"' for name, value in {**given, **variant}.items())
    made = _class(about)
    return f'{fetched}from {about.naming.format} import {made}\n\nmodel = {made}.from_pretrained("{place}"{words})'


def _class(about: About) -> str:
    """The class that the config names, else the library's for any model."""
    config = read_config(about.config)
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    named = config.get("_class_name") if about.naming.format == "diffusers" else first
    # The name is written into a program that people copy.
    return named if isinstance(named, str) and _IDENTIFIER.match(named) else "AutoModel"


def _front(naming: Naming) -> str:
    library = "" if naming.format == "plain" else f"library_name: {naming.format}\n"
    return f"---\n{library}tags:\n- ema\n---\n\n"


def _lines(about: About) -> Iterator[str]:
    yield f"\n## Which weights these are: {about.naming.whole}\n"
    yield "The exponential moving average (EMA) of a training's weights, kept by an ema-service.\n"
    yield "| | |"
    yield "|---|---|"
    for name, value in _rows(about):
        yield f"| {name} | {_cell(value)} |"
    yield f"\n```python\n{_loading(about)}\n```\n"


def _rows(about: About) -> Iterator[tuple[str, object]]:
    info = about.info
    yield "run", info.run
    yield "average", info.average
    yield "version", info.version
    if info.snapshot:
        yield "snapshot", info.snapshot
    yield "step", "none" if info.step is None else info.step
    yield "num_updates", info.num_updates
    if info.target:
        yield "averaged as", f"{info.target} (error {info.profile_error or 0.0:.2g})"
    elif info.soup:
        yield "sum of snapshots", info.soup
    else:
        fields = "".join(f", {name} {value:g}" for name, value in info.schedule_fields().items())
        yield "decay", f"{info.decay:.9g} (schedule {info.schedule}{fields})"
    yield "weights", f"{about.tensors} tensors, {about.bytes:,} bytes"
    yield "published", about.date


def _cell(value: object) -> str:
    """A value as a cell of a table: what the service said is shown, and never read as Markdown."""
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return f"`{text.replace('`', ' ').replace('|', '/')}`"
