"""Where a service is at this moment: at an address that stays, at the one that a file holds, or at that of a cluster
which Ray knows by name.

``file:///shared/address`` names a file that a server writes once it listens (``ema-service serve --address-file``). The
file is read for each new connection, so that a client finds a server that came up again elsewhere, such as a requeued
job on another node: the connections to the old place break, and the next try reads the file again. A file that is not
there is a service that is not there, and is waited for as long as such a service is.

``ray://NAME`` is asked for in the same way, of Ray.

Knows: files with an address, and the context of TLS. Does not know: Ray (ray_actors), sockets, HTTP, environment
variables, or when a connection is opened.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Callable
from functools import cached_property, lru_cache, partial
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ema_client.errors import ServiceUnreachable, UsageError
from ema_client.http.address import Address, parse_address
from ema_client.http.ray_actors import cluster_named, gateway_of

__all__ = ["Place"]

#: Of a datagram socket that sends nothing.
_ANY_PORT = 9
#: A longer file holds no address.
_MOST_BYTES = 4096
#: What a network file system says of a file that another machine has just replaced.
_REPLACED = errno.ESTALE
_FORM = "write file:///PATH, with the absolute path of the server's --address-file"


class Place:
    """The place of the service at ``url``. Thread-safe: nothing but the latest address changes, by one assignment.

    url: as it was given; of a file or a cluster's name that one, which stays the same wherever the service is.
    """

    def __init__(self, url: str) -> None:
        """Raises UsageError for a malformed URL; a file is not read yet, nor is Ray asked."""
        self._look = _look_of(url)
        moves = _file_of(url) or cluster_named(url)
        self._latest = None if moves else self._look()
        self.url = self._latest.url if self._latest else url

    def address(self) -> Address:
        """Where the service is now. Raises ServiceUnreachable where its file, or its cluster, is not there; UsageError
        where the file cannot be read, or holds no address, and where this process is no part of a Ray cluster."""
        self._latest = latest = self._look()
        return latest

    @property
    def same_host(self) -> bool:
        """Whether the service is on this host for sure, as far as is known now."""
        if self._latest is None:
            with contextlib.suppress(ServiceUnreachable):
                self.address()
        return self._latest is not None and self._latest.same_host

    @property
    def may_be_here(self) -> bool:
        """Whether the service can be on this host, as far as is known now: for sure, or by an address that is this
        host's own, where another one may answer for it all the same."""
        if self.same_host or self._latest is None:
            return self.same_host
        with contextlib.suppress(OSError):
            return _is_own(self._latest.host)
        return False

    @property
    def secure(self) -> bool:
        """Whether the service is reached over TLS, as far as is known now."""
        return self._latest is not None and self._latest.secure

    @property
    def link(self) -> str:
        """How bodies travel to the service, in words, as far as is known now."""
        return self._latest.link if self._latest else "TCP"

    @cached_property
    def context(self) -> ssl.SSLContext:
        """What TLS needs; loading the certificates of the system takes 20 ms."""
        return ssl.create_default_context()


@lru_cache(maxsize=1024)
def _is_own(host: str) -> bool:
    """Whether a host name or address is this machine's: packets to there come from there as well. Sends none. Raises
    OSError for an unknown name, and where there is no way to the address."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, _ANY_PORT, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return bool(probe.getsockname()[0] == address[0])


def _look_of(url: str) -> Callable[[], Address]:
    """What finds the service at a URL. Raises UsageError for a malformed one."""
    if file := _file_of(url):
        return partial(_address_in, file)
    if name := cluster_named(url):
        return lambda: parse_address(gateway_of(name))
    return partial(parse_address, url)


def _file_of(url: str) -> Path | None:
    """The file that a URL names, None where the URL is an address itself. Raises UsageError."""
    if not url.lower().startswith("file:"):
        return None
    parts = urlsplit(url)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise UsageError(f"the service's URL {url!r} names no file by its absolute path", hint=_FORM)
    return Path(path)


def _address_in(file: Path) -> Address:
    text = _read(file)
    if not text.strip():
        raise _not_there(file)
    if "\n" in text.strip() or _file_of(text.strip()):
        raise UsageError(f"{file} holds no address of a service", hint=_FORM)
    try:
        return parse_address(text.strip())
    except UsageError as fault:
        raise UsageError(f"{file} holds no address of a service: {fault.detail}", hint=_FORM) from None


def _read(file: Path) -> str:
    try:
        return _text(file)
    except FileNotFoundError:
        # NFS remembers for up to a minute that a name was not there; opening the folder has it ask the file server.
        with contextlib.suppress(OSError), os.scandir(file.parent):
            pass
    try:
        return _text(file)
    except FileNotFoundError:
        raise _not_there(file) from None


def _text(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            return opened.read(_MOST_BYTES).decode()
    except FileNotFoundError:
        raise
    except UnicodeDecodeError:
        raise UsageError(f"{file} holds no address of a service", hint=_FORM) from None
    except OSError as fault:
        if fault.errno == _REPLACED:
            raise ServiceUnreachable(f"{file} was replaced while it was read") from None
        raise UsageError(f"the address of the service cannot be read: {fault}", hint=_FORM) from None


def _not_there(file: Path) -> ServiceUnreachable:
    return ServiceUnreachable(
        f"no server has written its address to {file}, or it has stopped since",
        hint=f"start one with `ema-service serve --address-file {file}`, and give the path as this machine has it",
    )
