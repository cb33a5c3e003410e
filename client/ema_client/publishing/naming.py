"""The file names under which transformers and diffusers look for weights, and the names of their shards.

From transformers' and diffusers' own save_pretrained(): a variant stands before the shard's number in a shard's name
(``model.ema-00001-of-00002.safetensors``) and at the end of the index's (``model.safetensors.index.ema.json``).

Knows: names. Does not know: files, weights, where they go.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ema_client.errors import UsageError

__all__ = ["CONFIG", "FORMATS", "Naming", "format_of", "read_config"]

#: format -> the name of its weights, without ending.
FORMATS = {"transformers": "model", "diffusers": "diffusion_pytorch_model", "plain": "model"}
#: The file in which both libraries keep what a model is made with.
CONFIG = "config.json"
_VARIANT = re.compile(r"[A-Za-z0-9_]{1,32}\Z")


@dataclass(frozen=True, slots=True)
class Naming:
    """The names of one model's files; ``format`` is one of FORMATS.

    variant: what diffusers and transformers take as ``variant=``, None for the weights that are loaded by default.
    Raises UsageError for another format, and for a variant that can be no part of a file's name.
    """

    format: str
    variant: str | None = None

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise UsageError(f"{self.format!r} cannot be published", hint=f"there are {', '.join(FORMATS)}")
        if self.variant is not None and not _VARIANT.match(self.variant):
            raise UsageError(f"{self.variant!r} names no variant", hint="letters, digits and _, as in ema")

    @property
    def whole(self) -> str:
        """The name of weights in one file."""
        return f"{self._stem}.safetensors"

    @property
    def index(self) -> str:
        """The name of the index of shards."""
        return f"{FORMATS[self.format]}.safetensors.index.{f'{self.variant}.' if self.variant else ''}json"

    def shards(self, count: int, tag: str = "") -> tuple[str, ...]:
        """The names of ``count`` shards. tag: of eight hexadecimal digits, for names that are not in use."""
        tagged = f"-{tag}" if tag else ""
        return tuple(f"{self._stem}-{i + 1:05}-of-{count:05}{tagged}.safetensors" for i in range(count))

    def superseded(self, there: Collection[str], written: Collection[str]) -> tuple[str, ...]:
        """Of the names that are there: this model's weights and index that are not among those written.

        The index first, in which order they are to be removed: an index whose shards are gone loads nothing.
        """
        shard = re.compile(rf"{re.escape(self._stem)}-\d{{5}}-of-\d{{5}}(-[0-9a-f]{{8}})?\.safetensors\Z")
        ours = (name for name in there if name in (self.whole, self.index) or shard.match(name))
        return tuple(
            sorted((name for name in ours if name not in written), key=lambda name: (name != self.index, name))
        )

    @property
    def _stem(self) -> str:
        return f"{FORMATS[self.format]}.{self.variant}" if self.variant else FORMATS[self.format]


def format_of(config: bytes | None) -> str:
    """The format whose library wrote a config.json; "plain" without one. Raises UsageError unless it is JSON."""
    said = read_config(config)
    if "_class_name" in said:
        return "diffusers"
    return "transformers" if "model_type" in said or "architectures" in said else "plain"


def read_config(config: bytes | None) -> Mapping[str, Any]:
    """What a config.json says; nothing without one. Raises UsageError unless it is a JSON object."""
    if config is None:
        return {}
    try:
        said = json.loads(config)
    except ValueError as fault:
        raise UsageError(f"the config is not JSON: {fault}", hint="give the config.json of save_pretrained()") from None
    if not isinstance(said, dict):
        raise UsageError("the config is no JSON object", hint="give the config.json of save_pretrained()")
    return said
