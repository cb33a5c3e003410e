"""Turns every error into ``application/problem+json``; no other module does.

Knows the error tree of the client package and the exceptions of FastAPI and Starlette. Does not know the routes.
"""

from __future__ import annotations

import logging
import math
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from ema_client.errors import (
    PROBLEM_JSON,
    EmaError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    Overloaded,
    RouteNotFound,
    RunNotFound,
    StorageFailed,
    listed,
)
from ema_service.descriptors import EXHAUSTED
from ema_service.logs import asked
from ema_service.metrics import Metrics

__all__ = ["install", "problem_response", "problem_responses"]

_log = logging.getLogger(__name__)

_MORE = "try again after Retry-After seconds; who runs the server: let it have more (ulimit -n)"

_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")

#: The schema of an error's body, for OpenAPI.
PROBLEM_SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "code", "hint", "retryable"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What was wrong, naming the thing"},
        "code": {"type": "string", "description": "Stable name of the error"},
        "hint": {"type": "string", "description": "What to do about it"},
        "retryable": {"type": "boolean"},
    },
}

_RETRY_AFTER: dict[str, Any] = {
    "description": "Seconds after which to come again, where the server knows",
    "schema": {"type": "integer", "minimum": 0},
}


def problem_response(error: EmaError, headers: dict[str, str] | None = None) -> JSONResponse:
    """The answer that carries ``error``, of which the log tells with its request. headers: to be added."""
    if request := asked():
        request.fault = f"{error.status} {error.code}: {error.detail}"
    extra = dict(headers or {})
    if error.retry_after is not None:
        extra["Retry-After"] = str(math.ceil(error.retry_after))
    return JSONResponse(error.to_problem(), status_code=error.status, headers=extra, media_type=PROBLEM_JSON)


def problem_responses(*errors: type[EmaError]) -> dict[int | str, dict[str, Any]]:
    """The ``responses`` of a route that may answer with these errors, for OpenAPI."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in sorted({error.status for error in errors}):
        codes = ", ".join(error.code for error in errors if error.status == status)
        found[status] = {"description": codes, "content": {PROBLEM_JSON: {"schema": PROBLEM_SCHEMA}}}
        if status == 503:
            found[status]["headers"] = {"Retry-After": _RETRY_AFTER}
    return found


def install(app: FastAPI, metrics: Metrics, check_whole: Callable[[], None]) -> None:
    """Make every error of the app a problem, and count each by its code.

    check_whole: raises what is to be said where a run is not found and may be there all the same.
    """

    def answer(error: EmaError, headers: dict[str, str] | None = None) -> JSONResponse:
        metrics.refused(error.code)
        return problem_response(error, headers)

    async def ours(_: Request, fault: Exception) -> Response:
        return answer(_certain(fault, check_whole) if isinstance(fault, EmaError) else InternalError(str(fault)))

    async def invalid(_: Request, fault: Exception) -> Response:
        errors = fault.errors() if isinstance(fault, RequestValidationError) else []
        return answer(InvalidRequest(_describe(errors)))

    async def http(request: Request, fault: Exception) -> Response:
        status, detail, headers = _http_fault(fault)
        if status == 405:
            error: EmaError = MethodNotAllowed(f"{request.method} is not possible on {request.url.path}")
            headers["Allow"] = ", ".join(sorted(_methods(request)))
        elif status == 404:
            error = RouteNotFound(f"there is no route {request.url.path}")
        else:
            error = InvalidRequest(detail)
        return answer(error, headers)

    async def gone(request: Request, _: Exception) -> Response:
        _log.info("%s %s: the client went away", request.method, request.url.path)
        return Response(status_code=499)  # nobody is there to read the answer

    async def defect(request: Request, fault: Exception) -> Response:
        # Starlette raises the fault again after this answer, so that the server's log has the traceback.
        # This answer goes out past api/requests.py, which adds the id to all others.
        headers = {"X-Request-Id": request_id.id} if (request_id := asked()) else None
        return answer(InternalError(f"{type(fault).__name__} in {request.method} {request.url.path}"), headers)

    async def unavailable(_: Request, fault: Exception) -> Response:
        try:
            return answer(_unavailable(fault))
        finally:
            del fault

    app.add_exception_handler(EmaError, ours)
    app.add_exception_handler(OSError, unavailable)
    app.add_exception_handler(sqlite3.Error, unavailable)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, defect)


def _certain(error: EmaError, check_whole: Callable[[], None]) -> EmaError:
    """The error, or that a run which is not found may be there all the same."""
    if isinstance(error, RunNotFound):
        try:
            check_whole()
        except EmaError as doubt:
            return doubt
    return error


def _unavailable(fault: Exception) -> EmaError:
    """What is answered where the server lacks something for now. Raises the fault itself where it is a defect."""
    if isinstance(fault, sqlite3.Error):
        return StorageFailed(f"the server's catalog: {fault}", retry_after=1.0)
    if isinstance(fault, OSError) and fault.errno in EXHAUSTED:
        return Overloaded("the server has no file descriptor left", hint=_MORE, retry_after=1.0)
    try:
        raise fault
    finally:
        del fault


def _methods(request: Request) -> set[str]:
    """Every method of the request's path. Starlette names only the methods of the first route that has the path."""
    scopes = {method: {**request.scope, "method": method} for method in _METHODS}
    routes = request.app.routes
    return {method for method, scope in scopes.items() if any(r.matches(scope)[0] is Match.FULL for r in routes)}


def _http_fault(fault: Exception) -> tuple[int, str, dict[str, str]]:
    """Status, text and headers of an exception of Starlette."""
    if isinstance(fault, HTTPException):
        return fault.status_code, str(fault.detail), dict(fault.headers or {})
    return 500, str(fault), {}


def _describe(errors: Sequence[Any]) -> str:
    """What is wrong with a request, by field: ``decay: Input should be less than or equal to 1; layout.0.dtype:
    ...``"""
    places = (".".join(str(part) for part in e["loc"] if part not in ("body", "path", "query")) for e in errors)
    return listed([f"{place or 'body'}: {e['msg']}" for place, e in zip(places, errors, strict=True)], "; ")
