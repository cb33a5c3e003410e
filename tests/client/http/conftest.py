"""Transports to scripted servers, with and without TLS. Knows how a certificate is made, not what is asked."""

from __future__ import annotations

import shutil
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ema_client.http.retry import RetryPolicy
from ema_client.http.transport import Transport
from tests.client.http.scripts import ONCE, TIMEOUTS


@pytest.fixture
def transport() -> Iterator[Callable[..., Transport]]:
    """Make transports, closed after the test."""
    made: list[Transport] = []

    def make(url: str, retry: RetryPolicy = ONCE, **options: Any) -> Transport:
        made.append(Transport(url, retry=retry, **{"timeouts": TIMEOUTS, **options}))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A server's context with a certificate of its own, which this process trusts."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=test"]
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([openssl, *words, *files], check=True, capture_output=True, timeout=60)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context
