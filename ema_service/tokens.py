"""The token file: which tokens there are, what each may do and until when; and the tokens that a server goes by.

A line for each token: the SHA-256 of the token, its scopes, its pattern of run names, when it expires if it does, and
then a remark for whoever reads the file. The token itself is printed once, by ``ema-service token create``, and stored
nowhere::

    # sha256 of the token                      scopes  runs
    9f86d081884c7d659a2feaa0c55ad015a3bf4f1b…  train   cogview*  expires=2027-01-31T12:00:00Z  the cluster's trainers

Scopes: ``pull`` reads; ``snapshot`` takes snapshots; ``push`` creates runs, pushes, takes snapshots, and steers the
decay; ``train`` is all that a RemoteEma does, ``push``, ``snapshot`` and ``pull``; ``admin`` may do everything,
deleting included.

Knows files, hashes and the clock. Does not know HTTP, or what a scope lets a request do (auth). Neither tokens nor
their hashes are ever logged.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

__all__ = [
    "SCOPES",
    "Grant",
    "TokenFileError",
    "Tokens",
    "create_token",
    "moment",
    "read_token_file",
    "revoke_token",
]

_log = logging.getLogger(__name__)

SCOPES = ("train", "push", "pull", "snapshot", "admin")

_HASH = re.compile(r"[0-9a-f]{64}\Z")
_EXPIRES = "expires="
_MOMENT = "%Y-%m-%dT%H:%M:%SZ"
#: Digits of the hash that name a token where it is listed and revoked.
_NAME_DIGITS = 12


class TokenFileError(ValueError):
    """A line of the token file cannot be read, or no line is meant."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What one token allows.

    digest: the SHA-256 of the token. runs: a pattern of run names. expires: Unix seconds, None for a token that does
    not. remark: for people.
    """

    digest: bytes
    scopes: frozenset[str]
    runs: str
    expires: int | None = None
    remark: str = ""

    @property
    def name(self) -> str:
        """What names the token in lists: the first digits of its hash, of which nobody gets at the token."""
        return self.digest.hex()[:_NAME_DIGITS]

    @property
    def expired(self) -> bool:
        return self.expires is not None and time.time() >= self.expires


class Tokens:
    """The tokens that a running server goes by: those of a file, as they stood when the file was last read."""

    def __init__(self, path: Path) -> None:
        """Raises TokenFileError, also where the file has no token."""
        self._path = path
        self._grants = read_token_file(path)
        if not self._grants:
            raise TokenFileError(f"{path} has no token: make one with `ema-service token create`")

    def reload(self) -> None:
        """Read the file again. Where the file cannot be read the tokens stay as they were, and the log says why."""
        try:
            self._grants = read_token_file(self._path)
        except TokenFileError as fault:
            _log.error("the tokens stay as they were: %s", fault)
        else:
            _log.info("%d tokens were read from %s", len(self._grants), self._path)

    def find(self, token: bytes) -> Grant | None:
        """The grant of a token, expired or not; None where there is none.

        Every grant is compared, each in constant time: the time of an answer tells nothing of a token.
        """
        digest = hashlib.sha256(token).digest()
        found = [grant for grant in self._grants if hmac.compare_digest(grant.digest, digest)]
        return found[0] if found else None


def read_token_file(path: Path) -> tuple[Grant, ...]:
    """The grants of a token file. Raises TokenFileError naming the file, and the line where one is wrong."""
    try:
        lines = path.read_bytes().decode().splitlines()
    except OSError as fault:
        raise TokenFileError(f"{path}: {fault.strerror}; `ema-service token create` makes one") from None
    except UnicodeDecodeError:
        raise TokenFileError(f"{path} is no text in UTF-8: it is no token file") from None
    return tuple(
        _grant(line.split(), f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.lstrip().startswith("#")
    )


def create_token(
    path: Path, scopes: Collection[str], runs: str, *, expires: int | None = None, remark: str = ""
) -> str:
    """Make a token, append its line to ``path`` (a new file gets mode 0600), and return the token, which cannot be had
    again.

    expires: Unix seconds. Raises TokenFileError where the line would not say what is meant: for an unknown scope, a
    pattern that is empty or has white space, a remark that begins as an end does; OSError.
    """
    token = secrets.token_urlsafe(32)
    words = [hashlib.sha256(token.encode()).hexdigest(), ",".join(scopes), runs]
    if expires is not None:
        words.append(_EXPIRES + moment(expires))
    line = " ".join([*words, *remark.split()])
    meant = _grant(line.split(), "the new token")
    if (meant.runs, meant.expires) != (runs, expires):
        raise TokenFileError(f"the pattern {runs!r}, or the remark {remark!r}, would be read as something else")
    path.touch(mode=0o600)
    with path.open("a") as file:
        file.write(f"{line}\n")
    return token


def revoke_token(path: Path, name: str) -> Grant:
    """Revoke the token whose hash begins with ``name``, and return what the token allowed.

    Each line of the token becomes a comment, by one byte written in place: a server that reads the file meanwhile, or a
    command that appends to it, finds the file whole. Raises OSError, and TokenFileError where no token, or more than
    one, is so named.
    """
    grants = {grant.digest: grant for grant in read_token_file(path)}
    found = [digest for digest in grants if name and digest.hex().startswith(name.lower())]
    if len(found) != 1:
        count = "no token" if not found else f"{len(found)} tokens"
        raise TokenFileError(f"{path} has {count} named {name!r}: `ema-service token list` shows the names")
    with path.open("r+b", buffering=0) as file:
        for offset in _lines_of(found[0], file.read()):
            os.pwrite(file.fileno(), b"#", offset)
    return grants[found[0]]


def moment(seconds: float) -> str:
    """A time in Unix seconds as token files and lists write it: 2027-01-31T12:00:00Z."""
    return datetime.fromtimestamp(seconds, UTC).strftime(_MOMENT)


def _lines_of(digest: bytes, raw: bytes) -> Iterator[int]:
    """Where in a file the lines of a hash begin, behind their white space."""
    for line in re.finditer(rb"^[ \t]*([0-9a-f]{64})\b", raw, re.MULTILINE):
        if line[1] == digest.hex().encode():
            yield line.start(1)


def _grant(words: list[str], where: str) -> Grant:
    """The grant of a line's words. Raises TokenFileError, beginning with ``where``."""
    if len(words) < 3 or not _HASH.match(words[0]):
        raise TokenFileError(f"{where}: expected the SHA-256 of a token in hexadecimal, its scopes, and a run pattern")
    scopes = frozenset(words[1].split(","))
    if unknown := scopes - set(SCOPES):
        raise TokenFileError(f"{where}: {', '.join(sorted(unknown))!r} is no scope; there are {', '.join(SCOPES)}")
    expires, rest = None, words[3:]
    if rest and rest[0].startswith(_EXPIRES):
        expires, rest = _expiry(rest[0].removeprefix(_EXPIRES), where), rest[1:]
    return Grant(bytes.fromhex(words[0]), scopes, words[2], expires, " ".join(rest))


def _expiry(text: str, where: str) -> int:
    """Unix seconds. Raises TokenFileError: a token whose end cannot be read must not live for ever."""
    try:
        return int(datetime.strptime(text, _MOMENT).replace(tzinfo=UTC).timestamp())
    except ValueError:
        raise TokenFileError(f"{where}: {_EXPIRES}{text!r} is no moment such as 2027-01-31T12:00:00Z") from None
