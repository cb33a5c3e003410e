"""Errors of the cluster's own programs as problem+json (RFC 9457): of coordinators and of gateways.

Knows the error tree of the client package, and Starlette's exceptions. Does not know the routes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ema_client.errors import (
    PROBLEM_JSON,
    EmaError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    RouteNotFound,
    Unauthorized,
    listed,
)

__all__ = ["answer_with_problems", "problem"]


def problem(error: EmaError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer that carries an error. headers: to be added."""
    extra = dict(headers or {})
    if error.retry_after is not None:
        extra["Retry-After"] = str(math.ceil(error.retry_after))
    if isinstance(error, Unauthorized):
        extra["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.to_problem(), error.status, extra, PROBLEM_JSON)


def answer_with_problems(app: FastAPI, named: str) -> None:
    """Make every error of a program a problem. named: the program, as in ``a gateway``."""

    async def ours(_: Request, fault: EmaError) -> Response:
        return problem(fault)

    async def http(request: Request, fault: HTTPException) -> Response:
        if fault.status_code == 405:
            return problem(MethodNotAllowed(f"{request.method} {request.url.path}"), fault.headers)
        return problem(RouteNotFound(f"{named} has no route {request.url.path}"))

    async def invalid(_: Request, fault: RequestValidationError) -> Response:
        named = (".".join(str(part) for part in each["loc"][1:]) for each in fault.errors())
        told = (f"{name}: {each['msg']}" for name, each in zip(named, fault.errors(), strict=True))
        return problem(InvalidRequest(listed(told, "; ")))

    async def gone(_: Request, __: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody is there to read the answer

    async def defect(request: Request, fault: Exception) -> Response:
        # Starlette raises the fault again after this answer, so that the log has the traceback.
        return problem(InternalError(f"{type(fault).__name__} in {request.method} {request.url.path}"))

    app.exception_handler(EmaError)(ours)
    app.exception_handler(HTTPException)(http)
    app.exception_handler(RequestValidationError)(invalid)
    app.exception_handler(ClientDisconnect)(gone)
    app.exception_handler(Exception)(defect)
