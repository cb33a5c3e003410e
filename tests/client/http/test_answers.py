"""From an HTTP answer to a value or an error. Knows answers as data; no socket is open here."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ema_client.errors import (
    ConnectionLost,
    GatewayFailed,
    Overloaded,
    ProtocolError,
    RequestTimeout,
    RunNotFound,
    StorageFailed,
)
from ema_client.http.answers import Answer, error_of, json_of

URL = "http://host/v1/runs"


def answer(status: int, body: Any, kind: str = "application/json", **headers: str) -> Answer:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Answer(URL, status, {"content-type": kind, **headers}, raw)


def problem(status: int, code: str, **headers: str) -> Answer:
    return answer(status, {"code": code, "detail": "the detail"}, "application/problem+json", **headers)


def test_success_is_its_object() -> None:
    """A 2xx answer gives its JSON object, whatever parameters its content type has; 204 gives an empty one."""
    assert json_of(answer(201, {"a": 1}, "application/json; charset=utf-8")) == {"a": 1}
    assert json_of(answer(204, b"", "")) == {}


def test_problem_is_raised_as_the_class_of_its_code() -> None:
    """The client raises what the server raised."""
    with pytest.raises(RunNotFound, match="the detail"):
        json_of(problem(404, "run_not_found"))


@pytest.mark.parametrize(
    ("header", "expected"), [("3", 3.0), ("0.5", 0.5), ("-1", None), ("inf", None), ("soon", None)]
)
def test_retry_after_is_read(header: str, expected: float | None) -> None:
    """Seconds are taken over; anything else is left aside."""
    error = error_of(problem(503, "overloaded", **{"retry-after": header}))

    assert type(error) is Overloaded
    assert error.retry_after == expected


@pytest.mark.parametrize(
    "foreign",
    [
        answer(200, b"<html>hello</html>", "text/html"),
        answer(500, b"<html>broken</html>", "text/html"),
        answer(404, {"detail": "Not Found"}),
        answer(200, b"{broken"),
        answer(200, [1, 2]),
        answer(200, b"[" * 100_000),
        answer(404, b"{broken", "application/problem+json"),
        answer(307, b"", "", location="http://elsewhere/"),
        answer(200, b"\xff\xfe", ""),
    ],
    ids=lambda foreign: f"{foreign.status} {foreign.content_type} {foreign.body[:8]!r}",
)
def test_what_is_none_of_ours_names_url_and_status(foreign: Answer) -> None:
    """A page of a proxy or of another program is one error, with its URL, its status and how it begins."""
    with pytest.raises(ProtocolError) as raised:
        json_of(foreign)

    assert f"{URL} answered {foreign.status}" in raised.value.detail
    assert not raised.value.retryable


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504, 520, 524])
@pytest.mark.parametrize(
    "page",
    [
        (b"<html>away</html>", "text/html"),
        (b"", ""),
        (b"upstream connect error", "text/plain"),
        ({"message": "no healthy upstream"}, "application/json"),
        ({"title": "Bad Gateway", "status": 502}, "application/problem+json"),
        (b"{broken", "application/problem+json"),
    ],
    ids=lambda page: f"{page[1]} {page[0]!r}",
)
def test_gateway_without_an_answer_of_the_service_is_tried_again(status: int, page: tuple[Any, str]) -> None:
    """A gateway's own answer says that no answer came: as a lost connection, whatever its page looks like."""
    error = error_of(answer(status, *page, **{"retry-after": "3"}))

    assert type(error) is GatewayFailed
    assert error.retryable
    assert error.retry_after == 3.0
    assert f"{URL} answered {status}" in error.detail


def test_services_own_503_is_no_gateways() -> None:
    """The service's own codes keep their classes, and those of a newer service the class of their status."""
    assert type(error_of(problem(503, "storage_failed"))) is StorageFailed
    assert type(error_of(problem(503, "of_a_newer_service"))) is Overloaded
    assert type(error_of(problem(408, "request_timeout"))) is RequestTimeout


def test_redirect_says_where_to() -> None:
    """Redirects are not followed (a token would go along) but shown."""
    assert "http://elsewhere/" in error_of(answer(307, b"", "", location="http://elsewhere/")).detail


def test_client_side_codes_are_not_believed_from_a_server() -> None:
    """A server cannot make the client believe that the connection was lost."""
    assert type(error_of(problem(500, "connection_lost"))) is not ConnectionLost
