"""TLS of the server: a certificate and its key, read at the start and whenever the server is told that they changed.

Knows the standard library's contexts, and what may be wrong with two PEM files. Does not know sockets, or who issued
the certificate.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path

__all__ = ["Certificate", "CertificateUnusable"]

_log = logging.getLogger(__name__)


class CertificateUnusable(ValueError):
    """The certificate or its key cannot be read, or the key is not the certificate's."""


class _Encrypted(Exception):
    """The key is encrypted: OpenSSL asked for its password."""


class Certificate:
    """The certificate that a server shows to who connects, with its key.

    context: for the next connection. Connections that are open keep the certificate they began with.
    """

    def __init__(self, certfile: Path, keyfile: Path) -> None:
        """As _server_context()."""
        self._files = certfile, keyfile
        self.context = _server_context(certfile, keyfile)

    def reload(self) -> None:
        """Read both files again. Where they cannot be used the certificate stays, and the log says why."""
        try:
            self.context = _server_context(*self._files)
        except CertificateUnusable as fault:
            _log.error("the certificate stays as it was: %s", fault)
        else:
            _log.info("the certificate was read from %s", self._files[0])


def _server_context(certfile: Path, keyfile: Path) -> ssl.SSLContext:
    """The TLS context of a server that shows this certificate; TLS 1.2 and later, no certificate asked of clients.

    certfile: PEM, the server's own certificate first, then those between it and the authority. keyfile: PEM, not
    encrypted. Raises CertificateUnusable naming the file and what to do.
    """
    for flag, path in (("--ssl-certfile", certfile), ("--ssl-keyfile", keyfile)):
        _check_readable(flag, path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.options |= ssl.OP_NO_RENEGOTIATION  # a handshake in the middle of a body costs the server most of the work
    try:
        # Without a password callback OpenSSL would ask for the password on the terminal.
        context.load_cert_chain(certfile, keyfile, password=_no_password)
    except _Encrypted:
        raise CertificateUnusable(f"{keyfile} is encrypted: a server needs a key it can read by itself") from None
    except ssl.SSLError as fault:
        if fault.reason == "KEY_VALUES_MISMATCH":
            raise CertificateUnusable(f"{keyfile} is not the key of the certificate {certfile}") from None
        raise CertificateUnusable(
            f"{certfile} and {keyfile} are not a certificate and its key in PEM ({fault.reason or fault})"
        ) from None
    return context


def _check_readable(flag: str, path: Path) -> None:
    try:
        path.open("rb").close()
    except OSError as fault:
        raise CertificateUnusable(f"{flag} {path}: {fault.strerror}") from None


def _no_password() -> str:
    raise _Encrypted
