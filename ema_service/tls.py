"""TLS of the programs: a certificate and its key, read at the start and whenever a program is told that they changed;
and which certificates a program trusts that connects to another.

Knows the standard library's contexts, what may be wrong with two PEM files, and what to do where TLS fails. Does not
know sockets, or who issued a certificate.
"""

from __future__ import annotations

import logging
import ssl
from functools import cache
from pathlib import Path

__all__ = ["Certificate", "CertificateUnusable", "may_be_tls", "trusting", "why_no_tls"]

_log = logging.getLogger(__name__)

#: Of OpenSSL's verification: what is said of a certificate that is out of date, or for other names.
_EXPIRED, _NOT_YET, _OTHER_NAME, _OTHER_IP = 10, 9, 62, 64
#: Of OpenSSL: what is said where the other end answers with something that is no TLS.
_NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "HTTPS_PROXY_REQUEST", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG")


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

    def following(self) -> ssl.SSLContext:
        """A context for a server that keeps one: each connection is shown the certificate of its time."""
        context = _server_context(*self._files)

        def newest(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            connection.context = self.context

        context.sni_callback = newest  # called without a name of the server, too
        return context


@cache
def trusting() -> ssl.SSLContext:
    """The context of whoever connects: trusts the system's authorities or, where SSL_CERT_FILE names a file, those of
    that file alone, as clients do; the certificate has to be for the name that is connected to. Read once."""
    return ssl.create_default_context()


def why_no_tls(fault: BaseException | None) -> str:
    """What is wrong, and what to do, where TLS is among the causes of a fault; empty where it is not."""
    while fault is not None and not isinstance(fault, ssl.SSLError):
        fault = fault.__cause__ or fault.__context__
    if fault is None:
        return ""
    if isinstance(fault, ssl.SSLCertVerificationError):
        return _why_refused(fault)
    if fault.reason in _NO_TLS:
        return "no TLS is spoken there: say http:// instead of https://, or start it with --ssl-certfile, --ssl-keyfile"
    return f"TLS failed: {fault.reason or fault}"


def may_be_tls(url: str) -> str:
    """What is said where a connection ended at once, as one does where plain HTTP meets TLS. Empty for https://."""
    return "" if url.startswith("https:") else "; if TLS is spoken there, say https:// instead of http://"


def _why_refused(fault: ssl.SSLCertVerificationError) -> str:
    """Why a certificate was not accepted, and what to do."""
    said = fault.verify_message
    if fault.verify_code in (_EXPIRED, _NOT_YET):
        return f"its certificate is out of date ({said}): renew it, and send SIGHUP to the program that shows it"
    if fault.verify_code in (_OTHER_NAME, _OTHER_IP):
        return f"its certificate is for other names ({said}): issue one for this name, or use a name that it is for"
    return (
        f"nobody trusted here has signed its certificate ({said}): name the certificate of the authority that has, "
        "SSL_CERT_FILE=/path/to/ca.pem"
    )


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
