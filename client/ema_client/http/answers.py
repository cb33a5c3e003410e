"""From an HTTP answer to its JSON object, or to the error behind the answer.

Knows: status, headers and body of an answer, and the protocol's promises about all three. Does not know: which HTTP
library read the answer, or what was asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ema_client.errors import PROBLEM_JSON, EmaError, GatewayFailed, ProtocolError, error_from_problem

__all__ = ["Answer", "error_of", "json_of"]

#: What a gateway answers in place of a service that is away, slow or asked too often: 408 Request Timeout, 429 Too Many
#: Requests, 502 Bad Gateway, 503 Service Unavailable, 504 Gateway Timeout, and Cloudflare's own of the same meanings.
_GATEWAY_STATUSES = frozenset({408, 429, 502, 503, 504, *range(520, 525)})


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, read to its end. ``headers`` have lower-case names; ``url`` is what was asked, without secrets."""

    url: str
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def content_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


def json_of(answer: Answer) -> dict[str, Any]:
    """The JSON object of a success. Raises the error of any other answer, as error_of() tells it."""
    if not 200 <= answer.status < 300:
        raise error_of(answer)
    if answer.status == 204:
        return {}
    if answer.content_type != "application/json":
        raise _foreign(answer)
    return _object(answer)


def error_of(answer: Answer) -> EmaError:
    """The error behind an answer. Where no ema-service sent the answer: GatewayFailed, or ProtocolError."""
    if answer.content_type != PROBLEM_JSON:
        return _foreign(answer)
    try:
        problem = _object(answer)
    except (ProtocolError, GatewayFailed) as foreign:
        return foreign
    error = error_from_problem(problem, answer.status, retry_after=_retry_after(answer))
    # A gateway may speak problem+json too.
    ours = "code" in problem and not isinstance(error, ProtocolError)
    return error if ours or answer.status not in _GATEWAY_STATUSES else _foreign(answer)


def _object(answer: Answer) -> dict[str, Any]:
    try:
        data = json.loads(answer.body)
    except (ValueError, RecursionError):
        raise _foreign(answer) from None
    if not isinstance(data, dict):
        raise _foreign(answer)
    return data


def _foreign(answer: Answer) -> ProtocolError | GatewayFailed:
    # As much of the page as helps to recognise the program that sent the page.
    start = answer.body[:200].decode("utf-8", "replace").strip()
    kind = answer.content_type or "no content type"
    moved = f", location {answer.headers['location']}" if "location" in answer.headers else ""
    detail = f"{answer.url} answered {answer.status} ({kind}{moved}): {start!r}"
    if answer.status in _GATEWAY_STATUSES:
        return GatewayFailed(detail, retry_after=_retry_after(answer))
    return ProtocolError(detail)


def _retry_after(answer: Answer) -> float | None:
    try:
        seconds = float(answer.headers.get("retry-after", ""))
    except ValueError:
        # Absent, or a date, as some gateways send: pauses are then the client's own.
        return None
    return seconds if 0 <= seconds < float("inf") else None
