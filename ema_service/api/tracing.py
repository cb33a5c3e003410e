"""Spans of pushes and pulls, for OpenTelemetry, where its environment variables name a collector.

What OpenTelemetry itself reads configures it: OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_EXPORTER_OTLP_TRACES_ENDPOINT (a
collector that speaks OTLP over HTTP), OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER. A request that brings ``traceparent``
goes on with the caller's trace.

Knows OpenTelemetry, which is loaded where it is asked for alone (the extra ``otel``). Does not know what a phase is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from starlette.types import Scope

__all__ = ["Tracing", "open_tracing"]

_log = logging.getLogger(__name__)

#: What the extra ``otel`` installs.
_PACKAGES = "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"
_ASKED_FOR_BY = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
#: Requests that carry weights.
_WEIGHTS = re.compile(r"/v1/runs/(?P<run>[^/]+)/.*?(?:weights|updates/(?P<step>\d+))(?:/parts/\d+)?\Z")
#: Seconds that the end of the server waits for a collector to take the last spans.
_LAST_SECONDS = 2.0


class Tracing:
    """Spans to a collector, sent by a thread of OpenTelemetry's."""

    def __init__(self) -> None:
        """Raises ImportError where the extra is not installed."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, Status, StatusCode, get_current_span
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # The environment's own OTEL_SERVICE_NAME comes before this name.
        name = os.environ.get("OTEL_SERVICE_NAME", "ema-service")
        resource = Resource.create({SERVICE_NAME: name, SERVICE_VERSION: version("ema-service")})
        # Not at the exit of the interpreter, which would wait for a collector that is away.
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("ema_service")
        self._server, self._failed = SpanKind.SERVER, Status(StatusCode.ERROR)
        self._current = get_current_span
        self._propagator = TraceContextTextMapPropagator()

    @contextlib.contextmanager
    def request(self, scope: Scope) -> Iterator[None]:
        """A span of a request, if it carries weights; answered() tells it what the request was answered."""
        found = _WEIGHTS.match(scope["path"])
        if found is None:
            yield
            return
        attributes: dict[str, Any] = {"http.request.method": scope["method"], "url.path": scope["path"]}
        attributes |= {f"ema.{name}": value for name, value in found.groupdict().items() if value is not None}
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        parent = self._propagator.extract(headers)
        name = f"{scope['method']} weights"
        with self._tracer.start_as_current_span(name, parent, kind=self._server, attributes=attributes):
            yield

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A span of a part of the request in hand."""
        with self._tracer.start_as_current_span(name):
            yield

    def answered(self, route: str, status: int, request_id: str) -> None:
        """Tell the span of the request in hand how it ended."""
        span = self._current()
        span.set_attributes({"http.route": route, "http.response.status_code": status, "ema.request_id": request_id})
        if status >= 500:
            span.set_status(self._failed)

    def close(self) -> None:
        """Send what is left, or give it up after two seconds."""
        last = threading.Thread(target=self._provider.shutdown, name="ema-trace-end", daemon=True)
        last.start()
        last.join(_LAST_SECONDS)


def open_tracing() -> Tracing | None:
    """Spans to the collector that the environment names; None where it names none, or the extra is missing."""
    asked = [name for name in _ASKED_FOR_BY if os.environ.get(name)]
    if not asked or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    try:
        return Tracing()
    except ImportError as fault:
        _log.error("%s is set, but nothing is traced: %s; pip install %s, or unset it", asked[0], fault.msg, _PACKAGES)
        return None
