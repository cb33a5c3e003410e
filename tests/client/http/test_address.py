"""The URLs of services. Knows strings; nothing listens anywhere here."""

from __future__ import annotations

import pytest

from ema_client.errors import UsageError
from ema_client.http.address import parse_address


@pytest.mark.parametrize(
    ("url", "host", "port", "prefix", "base"),
    [
        ("http://127.0.0.1:8470", "127.0.0.1", 8470, "", "http://127.0.0.1:8470"),
        ("http://gpu-host", "gpu-host", 80, "", "http://gpu-host"),
        ("https://ema.example.org/", "ema.example.org", 443, "", "https://ema.example.org"),
        ("https://example.org:444/ema/", "example.org", 444, "/ema", "https://example.org:444/ema"),
        ("http://[::1]:8470", "::1", 8470, "", "http://[::1]:8470"),
        ("unix:///run/ema.sock", "localhost", 80, "", "http://localhost"),
    ],
)
def test_good_urls(url: str, host: str, port: int, prefix: str, base: str) -> None:
    """Scheme, host, port and prefix are read, defaults filled in, a trailing slash dropped."""
    address = parse_address(url)

    assert (address.host, address.port, address.prefix, address.base) == (host, port, prefix, base)
    assert address.secure == url.startswith("https")
    assert address.socket == ("/run/ema.sock" if url.startswith("unix") else None)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "no scheme"),
        ("localhost:8470", "no scheme"),
        ("127.0.0.1", "no scheme"),
        ("ftp://host", "no scheme"),
        ("http://", "no host"),
        ("http://:8470", "no host"),
        ("http://host:port", "not a URL"),
        ("http://host:70000", "not a URL"),
        ("http://[::1", "not a URL"),
        ("http://host/?a=b", "query or a fragment"),
        ("http://host/#x", "query or a fragment"),
        ("http://host\r\nX: y", "control character"),
        ("http://ho st", "blank"),
        ("unix://relative.sock", "absolute path"),
        ("unix:///", "absolute path"),
        ("unix:relative", "absolute path"),
    ],
)
def test_bad_urls_say_what_is_wrong_and_how_to_write_one(url: str, message: str) -> None:
    """A URL that cannot be one is refused before anything is opened, with the forms that are."""
    with pytest.raises(UsageError, match=message) as refused:
        parse_address(url)

    assert "unix:///PATH.sock" in refused.value.hint


def test_a_secret_in_a_url_is_refused_and_not_shown() -> None:
    """A password does not belong into a URL, and the message does not repeat it."""
    with pytest.raises(UsageError, match="password") as refused:
        parse_address("http://user:hunter2@host")

    assert "hunter2" not in str(refused.value)
    assert "EMA_SERVICE_TOKEN" in refused.value.hint


@pytest.mark.parametrize(
    ("url", "same"),
    [
        ("unix:///run/ema.sock", True),
        ("http://localhost:8470", True),
        ("http://127.0.0.1:1", True),
        ("http://127.1.2.3", True),
        ("https://[::1]:8470", True),
        ("http://192.0.2.7:8470", False),
        ("http://ema.example:8470", False),
        ("http://localhost.example", False),
    ],
)
def test_what_is_this_host(url: str, same: bool) -> None:
    """Only an address that can be nowhere else is taken for this host; others are never offered anything."""
    assert parse_address(url).same_host is same
