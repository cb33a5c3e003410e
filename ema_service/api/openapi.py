"""The OpenAPI document: what FastAPI makes of the routes, completed so that a client can be written from it alone.

FastAPI does not know what stands around the routes, or what HTTP is beyond their code: that a token is asked for before
any route is found, that a parameter in a URL or a header is there or is not, and is never null, that an answer to HEAD
has no body, and that all errors have one shape.

Knows OpenAPI, and which paths need a token (auth). Does not know what a route does: its answers and their headers stand
beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI

from ema_client.errors import PROBLEM_JSON, Forbidden, Unauthorized
from ema_service.api.auth import MORE_WITH_A_TOKEN, needs_token
from ema_service.api.errors import PROBLEM_SCHEMA, problem_responses
from ema_service.api.schemas import RunConfigBody, definitions

__all__ = ["SERVERS", "install"]

#: Relative to the document, so that a page behind a proxy's prefix asks behind that prefix as well.
SERVERS = [{"url": ".", "description": "The server that this document came from"}]

_Json = dict[str, Any]
_METHODS = ("get", "put", "post", "patch", "delete", "head")
_SCHEME = "token"
_PROBLEM = {"$ref": "#/components/schemas/Problem"}
#: pydantic's names of limits that it does not itself translate, where a check of ours comes first.
_LIMITS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum"}


def install(app: FastAPI, *, tokens: bool) -> None:
    """Let the app's document be the completed one. tokens: whether the server asks for a token."""
    made_by_fastapi = app.openapi

    def openapi() -> _Json:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(made_by_fastapi(), tokens=tokens)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI's documentation has it


def _completed(document: _Json, *, tokens: bool) -> _Json:
    components = document["components"]
    components["schemas"] |= {**definitions(RunConfigBody), "Problem": PROBLEM_SCHEMA}
    components["securitySchemes"] = {
        _SCHEME: {
            "type": "http",
            "scheme": "bearer",
            "description": "Made by `ema-service token create`. A server without a token file asks for none.",
        }
    }
    for method, path, operation in _operations(document):
        for parameter in operation.get("parameters", ()):
            parameter["schema"] = _present(parameter["schema"])
        if needs_token(method.upper(), path):
            # Where no token is asked for, a client may send one all the same: {} is "none".
            operation["security"] = [{_SCHEME: []}] if tokens else [{_SCHEME: []}, {}]
            operation["responses"] = _refusable(operation["responses"])
        elif path == MORE_WITH_A_TOKEN:
            operation["security"] = [{_SCHEME: []}, {}]
            operation["responses"] = _refusable(operation["responses"])
        for answer in operation["responses"].values():
            _give_shape(answer, has_body=method != "head")
    return document


def _operations(document: _Json) -> Iterator[tuple[str, str, _Json]]:
    for path, operations in document["paths"].items():
        for method in _METHODS:
            if method in operations:
                yield method, path, operations[method]


def _present(schema: _Json) -> _Json:
    """The schema of a parameter where the parameter is there: absent it may be, null it cannot be."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    if len(kinds) == 1:
        schema = {**{key: value for key, value in schema.items() if key != "anyOf"}, **kinds[0]}
    return {_LIMITS.get(key, key): value for key, value in schema.items() if (key, value) != ("default", None)}


def _refusable(answers: _Json) -> _Json:
    """The answers of an operation with those to a token that is missing, unknown, or does not allow the operation."""
    refusals = {str(status): answer for status, answer in problem_responses(Unauthorized, Forbidden).items()}
    refusals["401"]["headers"] = {
        "WWW-Authenticate": {"description": "`Bearer`", "required": True, "schema": {"type": "string"}}
    }
    return dict(sorted({**refusals, **answers}.items()))


def _give_shape(answer: _Json, *, has_body: bool) -> None:
    """Let an error have the one schema of all errors, and an answer to HEAD no body."""
    if PROBLEM_JSON in answer.get("content", {}):
        answer["content"][PROBLEM_JSON]["schema"] = _PROBLEM
    if not has_body:
        answer.pop("content", None)
