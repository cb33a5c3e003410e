"""From an HTTP answer to its JSON object, or to the error behind the answer.

Knows: status, headers and body of an answer, and the protocol's promises about all three. Does not know: which HTTP
library read the answer, or what was asked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ema_client.errors import PROBLEM_JSON, EmaError, ProtocolError, error_from_problem

__all__ = ["Answer", "error_of", "json_of"]


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
    """The error behind an answer; ProtocolError where no ema-service sent the answer."""
    if answer.content_type != PROBLEM_JSON:
        return _foreign(answer)
    try:
        return error_from_problem(_object(answer), answer.status, retry_after=_retry_after(answer))
    except ProtocolError as foreign:
        return foreign


def _object(answer: Answer) -> dict[str, Any]:
    try:
        data = json.loads(answer.body)
    except (ValueError, RecursionError):
        raise _foreign(answer) from None
    if not isinstance(data, dict):
        raise _foreign(answer)
    return data


def _foreign(answer: Answer) -> ProtocolError:
    # As much of the page as helps to recognise the program that sent the page.
    start = answer.body[:200].decode("utf-8", "replace").strip()
    kind = answer.content_type or "no content type"
    moved = f", location {answer.headers['location']}" if "location" in answer.headers else ""
    return ProtocolError(f"{answer.url} answered {answer.status} ({kind}{moved}): {start!r}")


def _retry_after(answer: Answer) -> float | None:
    try:
        seconds = float(answer.headers.get("retry-after", ""))
    except ValueError:
        # Absent, or a date: an ema-service sends seconds.
        return None
    return seconds if 0 <= seconds < float("inf") else None
