"""Spans of pushes and pulls, as a collector gets them: a real OTLP receiver over HTTP.

Knows OTLP's protobuf messages, which come with the extra ``otel``. Does not know the server's code.
"""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

TENSORS = {"w": torch.zeros(4)}
TRACE = "0af7651916cd43dd8448eb211c80319c"


class Collector(HTTPServer):
    """Keeps the spans that are sent to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.spans: list[Any] = []

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]


class _Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body = gzip.decompress(raw) if self.headers["Content-Encoding"] == "gzip" else raw
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp", reason="the extra otel is not installed: no span is looked at")
    with Collector() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        yield running
        running.shutdown()


def test_spans_of_pushes_and_pulls(
    collector: Collector, start_server: Callable[..., ServerProcess], plain_run: Callable[..., PlainRun]
) -> None:
    """A push is a span of its caller's trace, with its phases inside, those on other threads too; so is a pull."""
    server = start_server(memory=True)
    run = plain_run(server, TENSORS)
    run.http.headers["traceparent"] = f"00-{TRACE}-b7ad6b7169203331-01"
    run.http.headers["x-request-id"] = "traced"
    run.push(3, TENSORS)
    run.pull()
    run.push(2, TENSORS)
    run.http.get(run.path)
    assert server.stop() == 0
    wait_until(lambda: len(collector.named("GET weights")) == 1, "the last spans")

    pushes = [span for span in collector.named("PUT weights") if span.trace_id.hex() == TRACE]
    assert len(pushes) == 2
    said = {each.key: each.value for each in pushes[0].attributes}
    assert (said["ema.run"].string_value, said["ema.step"].string_value) == (run.name, "3")
    assert said["http.route"].string_value == "/v1/runs/{run}/updates/{step}"
    assert said["http.response.status_code"].int_value == 200
    assert said["ema.request_id"].string_value == "traced"
    assert pushes[0].parent_span_id.hex() == "b7ad6b7169203331"
    for phase in ("wait", "receive", "commit"):
        assert [s.name for s in collector.spans if s.parent_span_id == pushes[0].span_id].count(f"push {phase}") == 1
    [pull] = collector.named("GET weights")
    inside = {span.name for span in collector.spans if span.parent_span_id == pull.span_id}
    assert inside == {"pull wait", "pull send"}


def test_collector_that_is_away(
    monkeypatch: pytest.MonkeyPatch, start_server: Callable[..., ServerProcess], plain_run: Callable[..., PlainRun]
) -> None:
    """A collector that is away keeps no request, and no stop, waiting for long."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    server = start_server(memory=True)
    assert plain_run(server, TENSORS).push(1, TENSORS).status_code == 200
    assert server.stop() == 0
