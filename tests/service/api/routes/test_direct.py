"""The short way of an update past FastAPI: who takes it, and that nobody can tell.

Knows how a request is written, and that a query keeps one from the short way. Does not know what an update does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fastapi import FastAPI
from safetensors.torch import save
from starlette.routing import Match

from ema_service.api.app import create_app
from ema_service.api.routes.direct import DirectUpdates
from ema_service.settings import Settings

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

PATH = "/v1/runs/r/updates/7"
W = {"w": torch.ones(3)}


@pytest.fixture(scope="module")
def app() -> FastAPI:
    return create_app(Settings(data_dir=None))


def short(
    app: FastAPI,
    path: str = PATH,
    *writers: bytes,
    keys: tuple[bytes, ...] = (),
    method: str = "PUT",
    query: bytes = b"",
) -> Any:
    """The parameters of a request that takes the short way; None for one that does not."""
    headers = [(b"host", b"localhost"), *((b"ema-writer", number) for number in writers)]
    headers += [(b"ema-push", key) for key in keys]
    scope = {"type": "http", "method": method, "path": path, "query_string": query, "headers": headers}
    matching = (route for route in app.router.routes if route.matches({**scope, "app": app})[0] != Match.NONE)
    first = next(matching, None)
    return first.matches(scope)[1]["path_params"] if isinstance(first, DirectUpdates) else None


def test_who_takes_it(app: FastAPI) -> None:
    """A plain update does; whatever FastAPI would refuse, or read in its own way, is left to FastAPI."""
    assert short(app) == {"run": "r", "step": 7, "writer": None, "key": None}
    named = short(app, "/v1/runs/a.b-c_9/updates/0", b"12", keys=(b"Push_1-",))
    assert named == {"run": "a.b-c_9", "step": 0, "writer": 12, "key": "Push_1-"}
    assert short(app, f"/v1/runs/r/updates/{2**63 - 1}") is not None
    for step in ("07", "+7", "-1", "7.0", "x", "", "\u0667", str(2**63), "9" * 40):
        assert short(app, f"/v1/runs/r/updates/{step}") is None, step
    for run in (".r", "r" * 129, "r%20", "ü", ""):
        assert short(app, f"/v1/runs/{run}/updates/7") is None, run
    for number in (b"0", b"-1", b"x", b"1.0", b" 1", b"9" * 19):
        assert short(app, PATH, number) is None, number
    for key in (b"", b"a b", b"\xe4", b"k" * 65, b"k\n"):
        assert short(app, keys=(key,)) is None, key
    assert short(app, PATH, b"1", b"2") is short(app, keys=(b"a", b"b")) is None
    assert short(app, f"{PATH}/parts/0") is short(app, PATH, query=b"a=b") is short(app, PATH, method="GET") is None


def test_nobody_can_tell(server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """Both ways give the same answers, of success and of refusal, and are counted as the same route."""
    run = plain_run(server, W)

    def both(path: str, **options: Any) -> list[tuple[int, Any, dict[str, str]]]:
        answers = [run.http.put(path + query, content=save(W), **options) for query in ("", "?way=long")]
        same = {"content-type", "content-length", "retry-after"}
        return [(a.status_code, a.json(), {k: v for k, v in a.headers.items() if k in same}) for a in answers]

    def counted() -> float:
        lines = run.http.get("/metrics").text.splitlines()
        begin = 'ema_requests_total{method="PUT",route="/v1/runs/{run}/updates/{step}",status="200"}'
        return sum(float(line.split()[-1]) for line in lines if line.startswith(begin))

    before = counted()
    (status, first, headers), (_, again, long) = both(f"{run.path}/updates/5")
    assert status == 200
    assert (first.pop("applied"), again.pop("applied")) == (True, False)
    assert (first, headers["content-type"]) == (again, long["content-type"])
    assert counted() == before + 2
    for path, options in (
        (f"{run.path}/updates/4", {}),
        (f"{run.path}/updates/6", {"headers": {"Ema-Writer": "3"}}),
        ("/v1/runs/nobody/updates/1", {}),
    ):
        short_way, long_way = both(path, **options)
        assert short_way[0] >= 400
        assert short_way == long_way
