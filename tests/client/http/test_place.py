"""Where a service is: the file with its address, read again for each new connection. Knows scripts of raw HTTP.

The file of a real server is in tests/e2e/test_address_file.py.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ema_client.errors import ServiceUnreachable, UsageError
from ema_client.http.place import Place
from ema_client.http.retry import RetryPolicy
from ema_client.http.transport import Transport
from tests.client.http.scripts import LARGE, QUICK, Scripted, body_of, ok

#: Sure to be refused, and to be tried again for a second or so.
PATIENT = RetryPolicy(attempts=200, base=0.02, cap=0.02)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "the address"


@pytest.mark.parametrize("request_of", ["json", "upload", "download", "stream"])
def test_each_kind_of_request_finds_a_service_that_moved(
    request_of: str, scripted: Scripted, transport: Callable[..., Transport], file: Path
) -> None:
    """What comes after the service's end goes to the place that the file holds then, also over kept connections."""
    requests: dict[str, Callable[[], object]] = {
        "json": lambda: one.json("GET", "/x"),
        "upload": lambda: one.upload("/x", body_of(bytes(LARGE))),
        "download": lambda: one.retrying(lambda _: one.download("/x")).__exit__(),
        "stream": lambda: list(one.retrying(lambda _: one.stream("/x", accept="*/*", patience=1.0)).lines()),
    }
    before, after = scripted(ok), scripted(ok)
    file.write_text(f"{before.url}\n")
    one = transport(file.as_uri(), PATIENT)
    requests[request_of]()
    assert (before.connections, after.connections) == (1, 0)

    before.close()
    file.write_text(after.url)
    requests[request_of]()
    assert (before.connections, after.connections) == (1, 1)
    assert one.url == file.as_uri()


def test_service_that_is_not_there_yet_is_waited_for(
    scripted: Scripted, transport: Callable[..., Transport], file: Path
) -> None:
    """No file, an empty one and one of a server that was killed are each tried again until a server is there."""
    server = scripted(ok)

    def come() -> None:
        for text in ("", "http://127.0.0.1:1", server.url):
            time.sleep(0.1)
            file.write_text(text)

    thread = threading.Thread(target=come)
    thread.start()
    reply = transport(file.as_uri(), PATIENT).json("GET", "/x")
    thread.join()
    assert reply.url == f"{server.url}/x"


def test_the_wait_is_that_for_a_service(transport: Callable[..., Transport], file: Path) -> None:
    """A file that does not come ends the call when a service that does not come would, and the error names the file."""
    with pytest.raises(ServiceUnreachable, match="the address") as unreachable:
        transport(file.as_uri(), QUICK).json("GET", "/x")
    assert f"--address-file {file}" in unreachable.value.hint


def test_what_is_known_of_the_place(file: Path) -> None:
    """Whether the service is on this host, and over what, follows the file; without the file nothing is promised."""
    place = Place(f"file://localhost{file.as_uri().removeprefix('file://')}")
    assert (place.same_host, place.link) == (False, "TCP")
    file.write_text("unix:///run/ema.sock")
    assert (place.same_host, place.link) == (True, "Unix socket")
    file.write_text("https://node-7:8470")
    assert place.address().secure
    assert (place.same_host, place.link) == (False, "TCP")
    assert isinstance(place.context, ssl.SSLContext)


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:1", True),
        ("unix:///run/ema.sock", True),
        ("http://192.0.2.1:1", False),  # of documentation: no machine has it
        ("http://no-such-host.invalid:1", False),
    ],
)
def test_what_may_be_here(url: str, here: bool) -> None:
    """Loopback, and nothing that is another machine's, or nobody's."""
    assert Place(url).may_be_here is here


def test_an_address_of_this_machine_may_be_here() -> None:
    """As that of a host which others reach, too; but another one may answer for it, so that is not for sure."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has no address but loopback")
        place = Place(f"http://{probe.getsockname()[0]}:8470")
    assert (place.may_be_here, place.same_host) == (True, False)


@pytest.mark.parametrize(
    "text", ["node-7:8470", "http://one:1\nhttp://two:2", "file:///another", "http://u:secret@host", "\xff", "x" * 9000]
)
def test_file_without_an_address(text: str, file: Path) -> None:
    """What is no address is refused by the file's name, at once; a secret in it is not shown."""
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match="the address holds no address") as refused:
        Place(file.as_uri()).address()
    assert "secret" not in str(refused.value)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A folder in the place of the file is no file that may still come."""
    with pytest.raises(UsageError, match="cannot be read"):
        Place(tmp_path.as_uri()).address()


@pytest.mark.parametrize("url", ["file:relative", "file://node/path", "file:///", "file:///folder/", "FILE:x"])
def test_urls_that_name_no_file(url: str) -> None:
    """A URL of a file has an absolute path, and no other host."""
    with pytest.raises(UsageError, match="absolute path"):
        Place(url)
