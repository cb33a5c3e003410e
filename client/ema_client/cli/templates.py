"""Placeholders such as ``{step}`` in what a user wrote: in the name of a file, or in a command for the shell.

Values come from a service, and a service is not asked to write commands. A command gets values from its environment
alone: a placeholder becomes the shell's own reference to a variable, and the shell line is the user's to the last
character. In a file's name a value is a plain name, and stays in its folder.

Knows: names of placeholders, the shell's quotes. Does not know: where values come from, or what a command does.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from ema_client.errors import ProtocolError
from ema_client.protocol import WeightsInfo

__all__ = ["WORDS", "environment", "file_name", "has_placeholder", "shell_line", "words_of"]

#: What a placeholder may name.
WORDS = (
    "path", "run", "average", "version", "step", "num_updates", "snapshot", "sigma_rel", "decay", "half_life"
)  # fmt: skip

#: {step} and the others; ${step} is left to the shell.
_PLACEHOLDER = re.compile(rf"(?<!\$)\{{({'|'.join(WORDS)})\}}")
#: A value that is a part of a file's name and no more: names, versions and numbers of the protocol.
_PLAIN = re.compile(r"-?[A-Za-z0-9][A-Za-z0-9._-]*\Z")
#: What decides whether a placeholder of a shell line stands in quotes, and the placeholder.
_TOKEN = re.compile(rf"\\.|'|\"|\$\(|\(|\)|{_PLACEHOLDER.pattern}", re.DOTALL)


def words_of(path: Path, info: WeightsInfo) -> dict[str, str]:
    """What each placeholder stands for, of a file of weights; empty where the weights have no such thing."""
    words = {"path": str(path), **dataclasses.asdict(info)}
    return {name: "" if words[name] is None else str(words[name]) for name in WORDS}


def has_placeholder(template: str) -> bool:
    return _PLACEHOLDER.search(template) is not None


def environment(words: Mapping[str, str]) -> dict[str, str]:
    """The variables that a command is told the values by: ``EMA_STEP`` and so on."""
    return {f"EMA_{name.upper()}": value for name, value in words.items()}


def shell_line(template: str) -> str:
    """A command with each placeholder as one whole word of the shell, or as a part of the word that quotes make of it.

    ``{path}`` is ``"$EMA_PATH"``, within double quotes ``${EMA_PATH}``, within single quotes ``'"$EMA_PATH"'``.
    """
    return _Quotes().spelt(template)


class _Quotes:
    """Where in a shell line a reader is. nesting: the quote around each ``(``, and around the present character."""

    def __init__(self) -> None:
        self._nesting = [""]

    def spelt(self, template: str) -> str:
        return _TOKEN.sub(self._spell, template)

    def _spell(self, found: re.Match[str]) -> str:
        token, name, quote = found[0], found[1], self._nesting[-1]
        if name:
            variable = f"EMA_{name.upper()}"
            return {"": f'"${variable}"', '"': f"${{{variable}}}", "'": f"'\"${variable}\"'"}[quote]
        if token in ("'", '"') and quote in ("", token):
            self._nesting[-1] = "" if quote else token
        elif (token == "(" and not quote) or (token == "$(" and quote != "'"):
            self._nesting.append("")
        elif token == ")" and not quote and len(self._nesting) > 1:
            self._nesting.pop()
        elif token.startswith("\\") and quote == "'":
            # A backslash is a character like others there, and what follows may be the closing quote.
            return "\\" + _TOKEN.sub(self._spell, token[1:])
        return token


def file_name(template: str, words: Mapping[str, str]) -> str:
    """A file's name with the values in place. Raises ProtocolError for a value that is no plain name."""

    def fill(found: re.Match[str]) -> str:
        value = words[found[1]]
        if value and not _PLAIN.match(value):
            raise ProtocolError(f"{value[:80]!r}, which the service gave as {found[1]}, is no part of a file's name")
        return value

    return _PLACEHOLDER.sub(fill, template)
