"""Every refusal has one shape on the wire: RFC 9457 problem+json with this project's members.

Knows raw HTTP and the table of codes. Does not use the project's client: the shape is for everyone who can read JSON.
"""

from __future__ import annotations

import http.client
import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import save

from ema_client.errors import BY_CODE
from ema_service.api.schemas import CONFIG_BYTES

LAYOUT = [{"name": "w", "shape": [2], "dtype": "F32"}]
TOO_LONG = str(CONFIG_BYTES + 1)
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes


def ask(url: str, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> Answer:
    """One request; the headers are sent as given, so a length may be announced that never follows."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=10)
    try:
        connection.putrequest(method, path)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            connection.putheader(name, value)
        connection.endheaders(body or None)
        answer = connection.getresponse()
        return Answer(answer.status, answer.headers, answer.read())
    finally:
        connection.close()


@pytest.fixture
def run(server: Any) -> str:
    """The name of a run that has no weights yet; its own for each test, for tests share the server."""
    name = f"shape-{uuid.uuid4().hex}"
    body = json.dumps({"run": name, "layout": LAYOUT}).encode()
    assert ask(server.url, "POST", "/v1/runs", body, JSON).status == 201
    return name


CASES = {
    "unknown route": (404, "route_not_found", "GET", "/v1/nonsense", b"", {}),
    "unknown run": (404, "run_not_found", "GET", "/v1/runs/nobody", b"", {}),
    "unknown snapshot": (404, "snapshot_not_found", "GET", "/v1/runs/{run}/snapshots/none", b"", {}),
    "wrong method": (405, "method_not_allowed", "DELETE", "/v1/runs", b"", {}),
    "no weights yet": (409, "awaiting_weights", "GET", "/v1/runs/{run}/weights", b"", {}),
    "body announced too long": (413, "body_too_large", "POST", "/v1/runs", b"", JSON | {"Content-Length": TOO_LONG}),
    "not JSON": (422, "invalid_request", "POST", "/v1/runs", b"{", JSON),
    "field missing": (422, "invalid_request", "POST", "/v1/runs", b"{}", JSON),
    "name outside the pattern": (422, "invalid_request", "GET", "/v1/runs/-x", b"", {}),
    "step that is no number": (422, "invalid_request", "GET", "/v1/runs/{run}/updates/one", b"", {}),
    "decay above one": (422, "invalid_request", "PATCH", "/v1/runs/{run}", b'{"decay": 1.5}', JSON),
}


@pytest.mark.parametrize("case", CASES)
def test_refusal_has_the_one_shape(case: str, server: Any, run: str) -> None:
    """The refusal is problem+json with exactly the agreed members, all of them true to the code's class."""
    status, code, method, path, body, headers = CASES[case]

    answer = ask(server.url, method, path.replace("{run}", run), body, headers)

    problem = json.loads(answer.body)
    assert (answer.status, problem["code"]) == (status, code)
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert set(problem) == {"type", "title", "status", "detail", "code", "hint", "retryable"}
    expected = BY_CODE[code]
    assert (problem["status"], problem["title"], problem["retryable"]) == (status, expected.title, expected.retryable)
    assert expected.status == status
    assert problem["type"] == f"urn:ema-service:error:{code}"
    assert problem["detail"]
    assert problem["hint"]


def test_other_config_is_refused(server: Any, run: str) -> None:
    """Creating a run that has weights again, with another configuration, is a conflict that names the run."""
    weights = save({spec["name"]: torch.zeros(spec["shape"]) for spec in LAYOUT})
    assert ask(server.url, "PUT", f"/v1/runs/{run}/weights", weights).status == 200
    body = json.dumps({"run": run, "layout": LAYOUT, "decay": 0.5}).encode()

    answer = ask(server.url, "POST", "/v1/runs", body, JSON)

    problem = json.loads(answer.body)
    assert (answer.status, problem["code"]) == (409, "run_exists")
    assert run in problem["detail"]


def test_wrong_method_names_the_right_ones(server: Any) -> None:
    """405 carries Allow, as RFC 9110 asks."""
    answer = ask(server.url, "DELETE", "/v1/runs")

    assert {method.strip() for method in answer.headers["Allow"].split(",")} >= {"GET", "POST"}


def test_detail_names_what_was_wrong(server: Any) -> None:
    """The text of a refusal names the thing: the unknown run, the field that is missing."""
    unknown = json.loads(ask(server.url, "GET", "/v1/runs/nobody").body)
    missing = json.loads(ask(server.url, "POST", "/v1/runs", b'{"run": "x"}', JSON).body)

    assert "nobody" in unknown["detail"]
    assert "layout" in missing["detail"]
