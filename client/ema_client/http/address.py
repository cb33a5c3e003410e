"""Where a service is: ``http://host:port``, ``https://host``, ``unix:///path.sock``.

Knows: how the URL of a service is written, and what is wrong with another URL. Does not know: sockets, HTTP,
environment variables, or whether anything listens at the address.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import SplitResult, urlsplit

from ema_client.errors import UsageError

__all__ = ["Address", "parse_address"]

_FORMS = (
    "write http://HOST:PORT, https://HOST:PORT, unix:///PATH.sock, of a server's --address-file file:///PATH, or of a "
    "cluster on Ray ray://NAME"
)
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class Address:
    """A service's address. ``prefix`` is a path in front of every route, for a service behind a reverse proxy.

    socket: path of the Unix socket; host and port then stand in the Host header only.
    """

    url: str
    scheme: str
    host: str
    port: int
    prefix: str = ""
    socket: str | None = None

    @property
    def secure(self) -> bool:
        return self.scheme == "https"

    @property
    def same_host(self) -> bool:
        """Whether the service is on this host for sure: its address is a Unix socket or a loopback address."""
        try:
            return self.socket is not None or self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def link(self) -> str:
        """How bodies travel to the service, in words."""
        return "Unix socket" if self.socket is not None else "TCP"

    @property
    def base(self) -> str:
        """The URL for an HTTP client; for a Unix socket a stand-in without a real host."""
        return self.url if self.socket is None else "http://localhost"


def parse_address(url: str) -> Address:
    """The address in a URL. Raises UsageError saying what is wrong and how a URL is written."""
    parts, port = _split(url)
    if parts.username is not None or parts.password is not None:
        # The URL is not shown: what stands before the @ may be a secret.
        raise UsageError("the service's URL holds a user name or password", hint="pass token= or set EMA_SERVICE_TOKEN")
    if parts.query or parts.fragment:
        raise UsageError(f"the service's URL {url!r} has a query or a fragment", hint=_FORMS)
    if parts.scheme == "unix":
        return _unix(url, parts)
    if parts.scheme not in _PORTS:
        raise UsageError(f"the service's URL {url!r} begins with no scheme this client speaks", hint=_FORMS)
    if not parts.hostname:
        raise UsageError(f"the service's URL {url!r} names no host", hint=_FORMS)
    prefix = parts.path.rstrip("/")
    clean = f"{parts.scheme}://{parts.netloc}{prefix}"
    return Address(clean, parts.scheme, parts.hostname, _PORTS[parts.scheme] if port is None else port, prefix)


def _split(url: str) -> tuple[SplitResult, int | None]:
    if any(char <= " " or char == "\x7f" for char in url):
        raise UsageError("the service's URL holds a blank or a control character", hint=_FORMS)
    try:
        parts = urlsplit(url)
        return parts, parts.port
    except ValueError as fault:
        raise UsageError(f"the service's URL is not a URL: {fault}", hint=_FORMS) from None


def _unix(url: str, parts: SplitResult) -> Address:
    if parts.netloc or not parts.path.startswith("/") or parts.path.endswith("/"):
        raise UsageError(f"the service's URL {url!r} names no socket by its absolute path", hint=_FORMS)
    return Address(url, "unix", "localhost", 80, socket=parts.path)
