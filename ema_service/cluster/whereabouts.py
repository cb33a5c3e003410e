"""Where a coordinator is at this moment: at a URL that stays, or at the one that a file holds.

``file:///PATH`` names a file of one line, which whatever started the host writes whenever the coordinator comes back
elsewhere. It is read for each new connection, so a host, which tries again for as long as it lives, finds a coordinator
on another machine without being started anew. (A client finds its server by such a file too.)

Knows URLs and one small file. Does not know who writes the file, or connections.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

__all__ = ["CoordinatorAddress", "NoCoordinator", "check_coordinator", "coordinator_address", "coordinator_url"]

#: A longer file holds no URL.
_MOST_BYTES = 4096
#: By scheme, the port where a URL names none.
_PORTS = {"http": 80, "https": 443}


class CoordinatorAddress(NamedTuple):
    """Host and port of a coordinator. secure: whether TLS is spoken there."""

    host: str
    port: int
    secure: bool


class NoCoordinator(OSError):
    """The file says nowhere, for now; the text says why."""


def check_coordinator(url: str) -> None:
    """Raises ValueError for a URL that leads to no coordinator. A file need not be there yet."""
    if _file_of(url) is None:
        _address_in(url)


def coordinator_url(url: str) -> str:
    """A coordinator's URL by now, without a slash at its end. Raises NoCoordinator."""
    file = _file_of(url)
    if file is None:
        return url.rstrip("/")
    try:
        with file.open(encoding="ascii") as opened:
            said = opened.read(_MOST_BYTES).strip()
        _address_in(said)
    except (OSError, ValueError) as fault:
        why = fault.strerror if isinstance(fault, OSError) else "it holds no http://HOST:PORT or https://HOST:PORT"
        raise NoCoordinator(f"{file} does not say where the coordinator is: {why}") from None
    return said.rstrip("/")


def coordinator_address(url: str) -> CoordinatorAddress:
    """Where a coordinator is by now. Raises NoCoordinator; ValueError as check_coordinator()."""
    return _address_in(coordinator_url(url))


def _file_of(url: str) -> Path | None:
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" and not parts.netloc and parts.path != "/" else None


def _address_in(url: str) -> CoordinatorAddress:
    parts = urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname or parts.username or parts.path.strip("/") or parts.query:
        raise ValueError(
            "the coordinator's URL: expected http://HOST:PORT, https://HOST:PORT, or file:///PATH of a file that has "
            "one of the two"
        )
    return CoordinatorAddress(parts.hostname, parts.port or _PORTS[parts.scheme], parts.scheme == "https")
