"""Schemathesis asks a running server whatever its OpenAPI allows, and what it does not.

Knows the OpenAPI document, and a run with weights for the requests that find it. Does not know the server's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi import checks

from ema_service.api import create_app
from ema_service.settings import Settings

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

#: Requests for each operation and each kind of them.
EXAMPLES = 20
#: Seconds to wait for one answer; and for a sender, who on a busy machine may pause between a head and its body, or
#: before its head, after which a connection is closed without an answer.
PATIENCE, SILENCE = 20.0, "10"
#: What may stay of all of them: what the allocator keeps, and the runs that were created.
GROWTH_BYTES = 64 << 20
TENSORS = {"w": torch.ones(3), "b": torch.zeros(())}
#: Names and steps that are there, so that not every request ends with 404.
FOUND = {"run": "fuzzed", "name": "kept"}
DOCUMENTED = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]

load_all_checks()
SCHEMA = schemathesis.openapi.from_dict(create_app(Settings(data_dir=None)).openapi())
#: A stream of events has no end that a request could wait for; tests/service/api has it.
ENDLESS = {"GET /v1/runs/{run}/events"}
OPERATIONS = {each.ok().label: each.ok() for each in SCHEMA.get_all_operations() if each.ok().label not in ENDLESS}
KINDS = {"as documented": schemathesis.GenerationMode.POSITIVE, "against it": schemathesis.GenerationMode.NEGATIVE}


@pytest.fixture(scope="module")
def fuzzed(
    tmp_path_factory: pytest.TempPathFactory,
    server_class: type[ServerProcess],
    plain_run_at: Callable[..., PlainRun],
) -> Iterator[ServerProcess]:
    """A server with a run and a snapshot to be found. Afterwards it lives, complains of nothing, and has not grown."""
    folder = tmp_path_factory.mktemp("fuzzed")
    flags = ("--body-timeout", SILENCE, "--staging-bytes", str(1 << 26))
    running = server_class(folder, flags, folder / "data").start()
    with running.http() as http:
        run = plain_run_at(http, FOUND["run"], TENSORS)
        http.put(f"{run.path}/snapshots/{FOUND['name']}").raise_for_status()
        before = resident_bytes(running)
        yield running
        assert http.get("/healthz").status_code == 200
        assert resident_bytes(running) - before < GROWTH_BYTES
    assert "Traceback" not in running.log
    assert running.stop() == 0


def resident_bytes(server: ServerProcess) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) << 10


def aim(case: Any, data: st.DataObject) -> None:
    """Most often at what is there; and with weights where weights are wanted."""
    for name, value in FOUND.items():
        if name in case.path_parameters and data.draw(st.integers(0, 3)):
            case.path_parameters[name] = value
    if isinstance(case.query, dict) and isinstance(case.query.get("wait"), int | float):
        case.query["wait"] = min(case.query["wait"], 0.01)  # a server that waits as it was told is no news
    if case.media_type == "application/octet-stream" and data.draw(st.booleans()):
        case.body = save(TENSORS)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read in /proc")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("label", OPERATIONS)
def test_answers_are_the_documented_ones(label: str, kind: str, fuzzed: ServerProcess) -> None:
    """Every answer has a documented status, media type, headers and schema; none is a 500, and none leaves a trace."""
    operation = OPERATIONS[label]
    if KINDS[kind] is schemathesis.GenerationMode.NEGATIVE and not (
        operation.body or operation.query or operation.path_parameters
    ):
        pytest.skip("nothing can be asked of it in a wrong way")

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(case=operation.as_strategy(generation_mode=KINDS[kind]), data=st.data())
    def ask(case: Any, data: st.DataObject) -> None:
        aim(case, data)
        if label.startswith("DELETE"):
            case.path_parameters["run"] = "nobody"  # what the others find stays there
        case.call_and_validate(base_url=fuzzed.url, checks=DOCUMENTED, timeout=PATIENCE)

    ask()
