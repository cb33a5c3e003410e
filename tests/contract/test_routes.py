"""The server's routes, the design's list of them, client/PROTOCOL.md, a host's routes and a gateway's agree.

Knows the list of routes and OpenAPI. Does not know what a route does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock
from urllib.request import urlopen

import pytest
from fastapi import FastAPI
from starlette.routing import Match

from ema_client.protocol import WeightsInfo
from ema_service.api.app import create_app
from ema_service.api.auth import needs_token
from ema_service.cluster.counting import GatewayMetrics
from ema_service.cluster.gateway.app import _refuse, create_gateway
from ema_service.cluster.gateway.hosts import Hosts
from ema_service.dashboard import install_at_gateway
from ema_service.settings import Settings
from ema_service.tokens import create_token

ROOT = Path(__file__).resolve().parents[2]
PROTOCOL = ROOT / "client" / "PROTOCOL.md"
CLUSTER = ROOT / "ema_service" / "cluster" / "DESIGN.md"

#: What the design names and the server has.
BUILT = {
    "POST /v1/runs",
    "GET /v1/runs",
    "GET /v1/runs/{run}",
    "GET /v1/runs/{run}/layout",
    "GET /v1/runs/{run}/config",
    "GET /v1/runs/{run}/version",
    "PATCH /v1/runs/{run}",
    "DELETE /v1/runs/{run}",
    "POST /v1/runs/{run}/reset-num-updates",
    "POST /v1/runs/{run}/averages",
    "DELETE /v1/runs/{run}/averages/{name}",
    "POST /v1/runs/{run}/writers",
    "DELETE /v1/runs/{run}/writers/{writer}",
    "POST /v1/runs/{run}/rewind",
    "PUT /v1/runs/{run}/weights",
    "GET /v1/runs/{run}/weights",
    "PUT /v1/runs/{run}/weights/parts/{part}",
    "PUT /v1/runs/{run}/updates/{step}",
    "PUT /v1/runs/{run}/updates/{step}/parts/{part}",
    "PUT /v1/runs/{run}/updates/{step}/parts/{part}/stretches/{start}-{stop}",
    "PUT /v1/runs/{run}/updates/{step}/stretches/{start}-{stop}",
    "GET /v1/runs/{run}/updates/{step}",
    "PUT /v1/runs/{run}/snapshots/{name}",
    "GET /v1/runs/{run}/snapshots/{name}",
    "DELETE /v1/runs/{run}/snapshots/{name}",
    "GET /v1/runs/{run}/snapshots",
    "GET /v1/runs/{run}/snapshots/{name}/weights",
    "HEAD /v1/runs/{run}/weights",
    "HEAD /v1/runs/{run}/snapshots/{name}/weights",
    "GET /v1/runs/{run}/profiles",
    "GET /v1/runs/{run}/sweep",
    "POST /v1/runs/{run}/sweeps",
    "GET /v1/runs/{run}/sweeps",
    "GET /v1/runs/{run}/events",
    "GET /v1/server",
    "GET /v1/runs/{run}/history",
    "GET /v1/runs/{run}/distances",
    "GET /v1/runs/{run}/timeline",
    "GET /healthz",
    "GET /readyz",
    "GET /metrics",
}
#: HTML for people, not in OpenAPI.
PAGES = {"GET /", "GET /runs/{run}", "GET /docs"}

METHODS = {"get", "put", "post", "patch", "delete", "head", "options"}


def _operations() -> dict[str, dict[str, Any]]:
    paths = create_app(Settings(data_dir=None)).openapi()["paths"]
    return {
        f"{method.upper()} {path}": operation
        for path, operations in paths.items()
        for method, operation in operations.items()
        if method in METHODS
    }


OPERATIONS = _operations()


def _documented() -> set[str]:
    """The routes in PROTOCOL.md's headings, as in: ### `PUT /v1/runs/{run}/updates/{step}`"""
    headings = re.findall(r"^#+ .*$", PROTOCOL.read_text(), re.MULTILINE)
    found = (re.findall(r"`([A-Z]+ /[^`?]*)[^`]*`", heading) for heading in headings)
    return {route.strip() for routes in found for route in routes}


def test_server_has_the_routes_of_the_design() -> None:
    """The server offers exactly the designed routes (test_pages_answer has the pages)."""
    assert set(OPERATIONS) == BUILT


def test_protocol_document_names_every_route() -> None:
    """PROTOCOL.md has a heading for each route that exists, and for none that does not."""
    assert _documented() == set(OPERATIONS) | PAGES


def test_a_host_has_every_route_of_a_server(tmp_path: Path) -> None:
    """Whether a host alone may do what is asked for is the route's affair, and not whether there is one."""
    (tmp_path / "token").write_text("a-token-of-the-tests\n")
    hosted = {"coordinators": ("http://127.0.0.1:1",), "cluster_token_file": tmp_path / "token"}
    host = create_app(Settings(data_dir=tmp_path, shard=(0, 2), **hosted))
    assert host.openapi()["paths"].keys() == create_app(Settings(data_dir=None)).openapi()["paths"].keys()


def _answered_by_a_gateway(gateway: FastAPI, route: str) -> bool:
    method, _, path = route.partition(" ")
    scope = {"type": "http", "method": method, "path": re.sub(r"{\w+}", "1", path), "headers": [], "app": gateway}
    for each in gateway.router.routes:
        match, child = each.matches(scope)
        if match is Match.FULL:
            return {**scope, **child}.get("endpoint") is not _refuse
    return False


def test_a_gateway_answers_every_route_of_a_server() -> None:
    """But for those that the cluster's design names, with what there is in their place."""
    gateway = create_gateway(MagicMock(spec=Hosts, metrics=GatewayMetrics()), install_at_gateway)
    answered = {route for route in {*OPERATIONS, *PAGES} if _answered_by_a_gateway(gateway, route)}
    told = CLUSTER.read_text().partition("## What hosts cannot do together")[2].partition("\n## ")[0]
    assert {*OPERATIONS, *PAGES} - answered == set(re.findall(r"^\| `([A-Z]+ /[^`]*)`", told, re.MULTILINE))
    assert not _answered_by_a_gateway(gateway, "GET /v1/runs/{run}/nothing")


@pytest.mark.parametrize("page", sorted(PAGES))
def test_pages_answer(page: str, server: Any) -> None:
    """The dashboard and the API page are HTML that a browser can show."""
    with urlopen(server.url + page.removeprefix("GET "), timeout=30) as answer:
        assert (answer.status, answer.headers.get_content_type()) == (200, "text/html")


@pytest.mark.parametrize("route", OPERATIONS)
def test_route_is_explained(route: str) -> None:
    """The API page gives each route a summary, a tag, and a description or an example."""
    operation = OPERATIONS[route]

    assert operation.get("summary")
    assert operation.get("tags")
    assert operation.get("description") or "example" in str(operation)


@pytest.mark.parametrize("route", [route for route in OPERATIONS if "{" in route])
def test_parameters_are_explained(route: str) -> None:
    """Each parameter of a route says what it means, on the API page itself."""
    parameters = OPERATIONS[route].get("parameters", [])

    assert [p["name"] for p in parameters if not (p.get("description") or p.get("schema", {}).get("description"))] == []


@pytest.mark.parametrize("route", [route for route in OPERATIONS if OPERATIONS[route].get("requestBody")])
def test_bodies_may_be_late_or_too_large(route: str) -> None:
    """What any body may be refused for, whatever is in it, stands at each route that takes one."""
    assert OPERATIONS[route]["responses"].keys() >= {"408", "413"}


@pytest.mark.parametrize("route", [route for route in OPERATIONS if " /v1/" in route])
def test_errors_are_documented_in_their_own_shape(route: str) -> None:
    """No route announces FastAPI's own validation body: every 4xx on the API page is problem+json, but for HEAD's."""
    answers = OPERATIONS[route]["responses"]
    shape = set() if route.startswith("HEAD") else {"application/problem+json"}
    wrong = [
        status
        for status, answer in answers.items()
        if status.startswith(("4", "5")) and set(answer.get("content", {})) != shape
    ]

    assert wrong == []
    assert any(status.startswith("4") for status in answers) or "{" not in route


def test_tokens_stand_where_they_are_asked_for(tmp_path: Path) -> None:
    """What needs a token says so, with the answers to a wrong one; what needs none says nothing. Where the server asks
    for none, sending none is allowed by the document as well."""
    create_token(tmp_path / "tokens", ["pull"], "*")
    document = create_app(Settings(data_dir=None, token_file=tmp_path / "tokens")).openapi()
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            free, here = not needs_token(method.upper(), path), OPERATIONS[f"{method.upper()} {path}"].get("security")
            if path == "/v1/server":  # tells more to who has a token
                assert operation["security"] == here == [{"token": []}, {}]
                assert "401" in operation["responses"]
                continue
            assert operation.get("security") == (None if free else [{"token": []}])
            assert ({"401", "403"} <= operation["responses"].keys()) is not free
            assert here == (None if free else [{"token": []}, {}])
    free_paths = {path for path in document["paths"] if not needs_token("GET", path)}
    assert free_paths == {"/healthz", "/readyz", "/v1/server"}


@pytest.mark.parametrize("route", OPERATIONS)
def test_parameters_are_absent_or_of_their_type(route: str) -> None:
    """No parameter is described as null, which no URL or header can say; limits have JSON Schema's names."""
    for parameter in OPERATIONS[route].get("parameters", []):
        schema = parameter["schema"]
        assert isinstance(schema["type"], str)
        assert not schema.keys() & {"anyOf", "ge", "gt", "le", "lt"}
        assert schema.get("default", 0) is not None


@pytest.mark.parametrize("route", [route for route in OPERATIONS if re.match(r"(GET|HEAD) .*/weights$", route)])
def test_headers_of_weights_are_described(route: str) -> None:
    """The headers that tell the version stand at GET and HEAD; the step is an integer, or absent."""
    headers = OPERATIONS[route]["responses"]["200"]["headers"]
    info = WeightsInfo("r", "ema", "1.0", 1, 1, 0.5, profile_error=0.1, amplification=1.0)
    assert headers.keys() == {*info.to_headers(), "ETag", "Accept-Ranges", "Ema-Digest"}
    assert [name for name in headers if not headers[name]["required"]] == [
        "Ema-Step",
        "Ema-Profile-Error",
        "Ema-Amplification",
        "Ema-Digest",
    ]
    assert headers["Ema-Step"]["schema"] == {"type": "integer"}
