"""What the log tells of requests: ids, refusals, slow ones, the access log; JSON and text; a reader that left.

Knows plain HTTP and the lines of a running server. Does not know the server's code.
"""

from __future__ import annotations

import json
import re
import socket
import struct
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
import torch
from starlette.testclient import TestClient

from ema_service.api.app import create_app
from ema_service.settings import Settings
from tests.waiting import wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import PlainRun, ServerProcess

TENSORS = {"w": torch.zeros(4)}


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory, server_class: type[ServerProcess]) -> Iterator[ServerProcess]:
    flags = ("--log-format", "json", "--access-log", "--slow-request", "0.3", "--body-timeout", "0.5")
    running = server_class(tmp_path_factory.mktemp("logged"), flags).start()
    yield running
    if running.process.poll() is None:
        running.stop()


def lines(server: ServerProcess) -> list[dict[str, Any]]:
    """The log's lines, without what the server prints for people at its start."""
    return [json.loads(line) for line in server.log.splitlines() if line.startswith("{")]


def line_of(server: ServerProcess, **wanted: object) -> dict[str, Any]:
    """The first line with these members, which may still be on its way."""
    found: list[dict[str, Any]] = []

    def look() -> bool:
        found[:] = [each for each in lines(server) if wanted.items() <= each.items()]
        return bool(found)

    wait_until(look, f"a line with {wanted}", 10)
    return found[0]


def test_request_id_is_taken_over_and_told(logged: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """A request's own id comes back and stands in each line of it; one that cannot be taken over is replaced."""
    run = plain_run(logged, TENSORS)
    answer = run.http.get(run.path, headers={"X-Request-Id": "trainer/7:step-3"})
    assert answer.headers["x-request-id"] == "trainer/7:step-3"
    line = line_of(logged, request_id="trainer/7:step-3")
    assert (line["logger"], line["level"]) == ("ema_service.access", "info")
    assert (line["method"], line["path"], line["status"], line["client"]) == ("GET", run.path, 200, "127.0.0.1")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", line["time"])
    for bad in ("two words", "x" * 129, 'a"b', ""):
        assert re.fullmatch(
            "[0-9a-f]{16}", run.http.get("/healthz", headers={"X-Request-Id": bad}).headers["x-request-id"]
        )
    ids = {run.http.get(path).headers["x-request-id"] for path in ("/", "/v1/none", "/metrics", "/assets/none")}
    assert len(ids) == 4


def test_each_refused_write_is_told(logged: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """A write that is refused has a line with its code and reason; a read that is refused has none."""
    run = plain_run(logged, TENSORS)
    run.push(2, TENSORS)
    refused = [
        (run.push(1, TENSORS), "409 stale_step: step 1"),
        (run.push(3, {"w": torch.full((4,), float("nan"))}), "422 non_finite: "),
        (run.push(3, {"v": torch.zeros(4)}), "422 layout_mismatch: "),
        (run.http.post("/v1/runs", json={"run": run.name}), "422 invalid_request: layout"),
        (run.http.post("/v1/runs", content=b"x"), "415 unsupported_media_type: "),
        (run.http.delete("/v1/runs/no-such-run"), "404 run_not_found: "),
    ]
    for answer, reason in refused:
        found = line_of(logged, request_id=answer.headers["x-request-id"], logger="ema_service.api.requests")
        assert f"was refused: {reason}" in found["message"]
        assert found["status"] == answer.status_code
    read = run.http.get("/v1/runs/no-such-run").headers["x-request-id"]
    assert line_of(logged, request_id=read)["logger"] == "ema_service.access"


def test_slow_request_is_told(logged: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """A request beyond --slow-request has a line, and a write that broke off its reason; a wait for a step has none."""
    run = plain_run(logged, TENSORS)
    waited = run.http.get(f"{run.path}/weights", params={"min_step": 9, "wait": 0.4}).headers["x-request-id"]
    where = urlsplit(logged.url)
    with socket.create_connection((where.hostname, where.port), timeout=20) as slow:
        fields = "Host: localhost\r\nX-Request-Id: slow-one\r\nContent-Length: 99"
        slow.sendall(f"PUT {run.path}/updates/1 HTTP/1.1\r\n{fields}\r\n\r\nx".encode())
        assert slow.recv(100).startswith(b"HTTP/1.1 408 ")
    line = line_of(logged, request_id="slow-one", level="warning")
    assert "took 0." in line["message"]
    assert not [each for each in lines(logged) if each.get("request_id") == waited and each["level"] == "warning"]


def test_reader_that_leaves_costs_no_lines(logged: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """A reader that breaks off in the middle of its weights leaves its one line, not one for each piece not sent."""
    run = plain_run(logged, {"w": torch.zeros(40 << 18)})
    where, before = urlsplit(logged.url), len(lines(logged))
    for _ in range(2):
        with socket.create_connection((where.hostname, where.port), timeout=20) as reader:
            reader.sendall(f"GET {run.path}/weights HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            reader.recv(1000)
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # leaves by a reset
    wait_until(lambda: len(lines(logged)) >= before + 2, "the readers' lines")
    run.http.get("/healthz")
    later = [each for each in lines(logged)[before:] if " took " not in each["message"]]  # on a busy machine
    assert [each["logger"] for each in later if each.get("path") != "/healthz"] == ["ema_service.access"] * 2


def test_defect_says_its_id() -> None:
    """A defect of the server is answered with the request's id too, and counted."""
    app = create_app(Settings(data_dir=None))
    app.add_api_route("/defect", lambda: 1 // 0)
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as http:
        answer = http.get("/defect", headers={"X-Request-Id": "found"})
        text = http.get("/metrics").text
    assert (answer.status_code, answer.json()["code"], answer.headers["x-request-id"]) == (500, "internal", "found")
    assert 'ema_requests_total{method="GET",route="/defect",status="500"} 1.0' in text


def test_text_is_one_line_for_a_line(
    tmp_path: Path, server_class: type[ServerProcess], plain_run_class: type[PlainRun]
) -> None:
    """For people: start and stop are told, a refusal with its id at the end, and no stranger writes a line."""
    server = server_class(tmp_path).start()
    with server.http() as http:
        answer = http.post("/v1/runs", json={"run": "a\nERROR forged", "layout": []})
        plain_run_class(http, "r").create(TENSORS).raise_for_status()
    assert server.stop() == 0
    words = server.log.splitlines()
    assert next(each for each in words if "started: " in each).endswith(server.url)
    assert words[-1].endswith("ema_service.api.server: stopped")
    assert f"[{answer.headers['x-request-id']}]" in next(each for each in words if "was refused" in each)
    assert not [each for each in words if each.startswith("ERROR forged")]
    assert not [each for each in words if "access" in each]
