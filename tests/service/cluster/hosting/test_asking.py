"""What a host asks of coordinators: who answers, who does not, and for how long they are asked.

Coordinators are small HTTP servers on real ports. Does not know what a change does.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ema_client.errors import EmaError, InternalError, Overloaded, Stopping
from ema_service.cluster import Answer, Change, ClusterToken, encode
from ema_service.cluster.hosting.asking import Asking
from ema_service.cluster.hosting.waiting import Waiting

TOKEN = ClusterToken("a-token-of-the-tests")
CHANGE = Change("k", "{}")
ANSWER = Answer("k", committed=True)


class Said(BaseHTTPRequestHandler):
    """Answers each change with the next of what it was given; the last again and again."""

    answers: list[tuple[int, bytes]]
    asked: list[tuple[str, str | None, bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.asked.append((self.path, self.headers["Authorization"], body))
        status, content = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def coordinator() -> Iterator[Callable[..., tuple[str, type[Said]]]]:
    """Start coordinators that answer so: their URL, and what they were asked."""
    started: list[ThreadingHTTPServer] = []

    def start(*answers: tuple[int, bytes]) -> tuple[str, type[Said]]:
        handler = type("Handler", (Said,), {"answers": list(answers), "asked": []})
        started.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=started[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{started[-1].server_port}", handler

    yield start
    for each in started:
        each.shutdown()
        each.server_close()


def ask(*urls: str, seconds: float = 20.0) -> Answer:
    async def whole() -> Answer:
        asking = Asking(urls, TOKEN, seconds=seconds)
        try:
            return await asking.change("r@1", CHANGE)
        finally:
            await asking.close()

    return asyncio.run(whole())


def test_asked_until_there_is_an_answer(coordinator: Callable[..., tuple[str, type[Said]]]) -> None:
    """A coordinator to which no shard has come, and one that ends, are asked again, with the token; one that cannot be
    reached keeps nobody from the answer of another."""
    url, handler = coordinator((404, b"{}"), (503, b"{}"), (200, encode(ANSWER).encode()))
    assert ask("http://127.0.0.1:1", url) == ANSWER
    assert handler.asked == [("/v1/runs/r@1/changes", TOKEN.header, encode(CHANGE).encode())] * 3


def test_nobody_answers(coordinator: Callable[..., tuple[str, type[Said]]]) -> None:
    """Without a decision in time the change may be asked for again, and the error says what the coordinator says."""
    url, _ = coordinator((503, b'{"detail": "without shard 2"}'))
    with pytest.raises(Overloaded, match="says: without shard 2"):
        ask(url, seconds=0.5)
    with pytest.raises(Overloaded, match="cannot be reached"):
        ask("http://127.0.0.1:1", seconds=0.5)


@pytest.mark.parametrize(("status", "content"), [(401, b"the token is another"), (200, b"a page")])
def test_answers_that_are_none(status: int, content: bytes, coordinator: Callable[..., tuple[str, type[Said]]]) -> None:
    """Another token, and what is no coordinator, are the host's fault and not its user's."""
    url, _ = coordinator((status, content))
    with pytest.raises(InternalError):
        ask(url)


@pytest.mark.parametrize(("stops", "fault"), [(False, Overloaded), (True, Stopping)])
def test_waiting_ends(stops: bool, fault: type[EmaError]) -> None:
    """Who waits for all hosts is told to come again after a while, and at once when the server stops, also who comes
    then."""

    async def whole() -> None:
        waiting = Waiting(lambda: True, seconds=30.0 if stops else 0.2)
        loop = asyncio.get_running_loop()
        first = asyncio.create_task(waiting.until(loop.create_future(), "the update was"))
        await asyncio.sleep(0)
        if stops:
            waiting.stop()
        with pytest.raises(fault):
            await first
        with pytest.raises(fault):
            await waiting.until(loop.create_future(), "the update was")

    asyncio.run(asyncio.wait_for(whole(), 20))
