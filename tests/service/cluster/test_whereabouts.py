"""Where a coordinator is: a URL, or a file that says so, read again for each connection.

Knows files. Coordinators that really move are in test_agent.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ema_service.cluster.whereabouts import NoCoordinator, check_coordinator, coordinator_address, coordinator_url


@pytest.mark.parametrize("url", ["http://h:1", "http://h", "https://h:1", "file:///a/file", "http://h:1/"])
def test_what_may_lead_to_a_coordinator(url: str) -> None:
    """A URL without more, or a file, which need not be there."""
    check_coordinator(url)


@pytest.mark.parametrize(
    "url", ["ftp://h", "https://u@h", "http://u@h", "http://h/p", "h:1", "file://h/a", "file:///", "http://h?q"]
)
def test_what_leads_to_none(url: str) -> None:
    """Is refused, with how it is written."""
    with pytest.raises(ValueError, match="expected http://HOST:PORT, https://HOST:PORT, or file:///PATH"):
        check_coordinator(url)


def test_a_file_is_read_each_time(tmp_path: Path) -> None:
    """With a name that URLs quote."""
    file = tmp_path / "the coordinator"
    file.write_text("http://a:1\n")
    assert (coordinator_url(file.as_uri()), coordinator_address(file.as_uri())) == ("http://a:1", ("a", 1, False))
    file.write_text("https://b:2/\n")
    assert (coordinator_url(file.as_uri()), coordinator_address(file.as_uri())) == ("https://b:2", ("b", 2, True))
    assert (coordinator_url("http://c:3/"), coordinator_address("http://c")) == ("http://c:3", ("c", 80, False))
    assert coordinator_address("https://c") == ("c", 443, True)


@pytest.mark.parametrize("content", [None, b"", b"nothing\n", b"http://a:1\nhttp://b:1", b"\xff", b"file:///a"])
def test_a_file_that_says_nowhere(tmp_path: Path, content: bytes | None) -> None:
    """Is an error of the kind that a coordinator gives which is away: whoever asks comes again."""
    file = tmp_path / "file"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(NoCoordinator, match="does not say where the coordinator is"):
        coordinator_address(file.as_uri())
