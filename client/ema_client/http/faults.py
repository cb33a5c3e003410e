"""From a fault of a socket or of TLS to the error that a caller meets.

Knows: the standard library's exceptions of sockets and TLS. Does not know: HTTP libraries, retries, or who has the
connection.
"""

from __future__ import annotations

import ssl

from ema_client.errors import ConnectionLost, ProtocolError, ServiceUnreachable

__all__ = ["broken", "no_tls", "tls_fault_in", "unreachable"]


def unreachable(url: str, fault: Exception) -> ServiceUnreachable:
    """The error of a failed connect."""
    return ServiceUnreachable(f"nothing answers at {url}: {_said(fault)}")


def broken(url: str, fault: Exception, *, silence: float = 0.0) -> ConnectionLost:
    """The error of a connection that broke after a request had begun, or was silent for ``silence`` seconds."""
    if silence:
        lost = ConnectionLost(f"{url} was silent for {silence:.3g} seconds")
        lost.silence = silence
        return lost
    return ConnectionLost(f"the connection to {url} broke: {_said(fault)}")


def no_tls(url: str, fault: Exception) -> ProtocolError:
    """The error of a failed TLS handshake, which another try would not change."""
    hint = "check the scheme of the URL and the server's certificate"
    if isinstance(fault, ssl.SSLCertVerificationError):
        hint = (
            "if an authority of your own signed it, name that authority's certificate: SSL_CERT_FILE=/path/to/ca.pem; "
            "the URL's host must be one the certificate is for"
        )
    return ProtocolError(f"no TLS with {url}: {fault}", hint=hint)


def tls_fault_in(fault: BaseException | None) -> ssl.SSLError | None:
    """The fault of TLS among a fault and its causes, None where TLS was not at fault."""
    while fault is not None and not isinstance(fault, ssl.SSLError):
        fault = fault.__cause__ or fault.__context__
    return fault


def _said(fault: Exception) -> str:
    return str(fault) or type(fault).__name__
