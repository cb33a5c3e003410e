"""A client that is generated from the OpenAPI document alone asks the server everything, and understands every answer.

Knows the document, and openapi-python-client, which makes a package of it. Does not know our client.
"""

from __future__ import annotations

import importlib
import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load, save

from ema_service.tokens import create_token

pytest.importorskip("openapi_python_client", reason="not installed: pip install -e '.[test]'")

PACKAGE = "generated_ema_client"
STATE = {"b": torch.zeros(2), "w": torch.arange(3.0)}
LAYOUT = [{"name": name, "shape": list(tensor.shape), "dtype": "F32"} for name, tensor in STATE.items()]
BODY = save(STATE)
#: A stream without end, which a generated client would wait for.
NOT_ASKED = {"get_events"}


class Asking:
    """The generated client, which checks each answer against the document. token: None for none."""

    def __init__(self, package: Any, document: dict[str, Any], url: str) -> None:
        self._package = package
        self._url = url
        self._operations = {
            operation["operationId"]: (operation["tags"][0], operation)
            for operations in document["paths"].values()
            for operation in operations.values()
        }
        self.open = set(self._operations) - NOT_ASKED
        self.token: str | None = None

    def model(self, name: str, /, **fields: Any) -> Any:
        return getattr(importlib.import_module(f"{PACKAGE}.models"), name).from_dict(fields)

    def body(self, content: bytes = BODY) -> Any:
        return self._package.types.File(payload=io.BytesIO(content))

    def __call__(self, name: str, *path: Any, status: int = 200, **arguments: Any) -> Any:
        """Ask; returns what the client made of the answer, which has ``status`` and is as documented."""
        tag, operation = self._operations[name]
        module = importlib.import_module(f"{PACKAGE}.api.{tag}.{name}")
        options = {"raise_on_unexpected_status": True, "timeout": httpx.Timeout(30)}
        if self.token is None:
            client = self._package.Client(self._url, **options)
        else:
            client = self._package.AuthenticatedClient(self._url, token=self.token, **options)
        with client:
            answer = module.sync_detailed(*path, client=client, **arguments)
        assert answer.status_code == status
        documented = operation["responses"][str(status)]
        self._check_headers(documented.get("headers", {}), answer.headers)
        assert bool(answer.content) == bool(documented.get("content"))
        if documented.get("content"):
            assert answer.parsed is not None
        self.open.discard(name)
        return answer.parsed

    @staticmethod
    def _check_headers(documented: dict[str, Any], sent: Any) -> None:
        for header, said in documented.items():
            if header not in sent:
                assert not said.get("required"), header
            elif said["schema"]["type"] in ("integer", "number"):
                {"integer": int, "number": float}[said["schema"]["type"]](sent[header])
        ours = {name for name in sent if name.lower().startswith("ema-")}
        assert {name.lower() for name in ours} <= {name.lower() for name in documented}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("tokens") / "tokens"
    return {"file": file, "admin": create_token(file, ["admin"], "*"), "pull": create_token(file, ["pull"], "*")}


@pytest.fixture(scope="module")
def url(
    tmp_path_factory: pytest.TempPathFactory, tokens: dict[str, Any], server_class: Callable[..., Any]
) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("generated")
    server = server_class(folder, ("--token-file", str(tokens["file"])), folder / "data").start()
    yield server.url
    server.stop()


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory, url: str) -> Iterator[Asking]:
    folder = tmp_path_factory.mktemp("package")
    document = httpx.get(f"{url}/openapi.json").raise_for_status().json()
    (folder / "openapi.json").write_text(json.dumps(document))
    (folder / "config.yml").write_text("post_hooks: []\n")
    words = ["generate", "--path", "openapi.json", "--meta", "none", "--config", "config.yml", "--fail-on-warning"]
    command = [sys.executable, "-m", "openapi_python_client", *words, "--output-path", PACKAGE]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    sys.path.insert(0, str(folder))
    try:
        yield Asking(importlib.import_module(PACKAGE), document, url)
    finally:
        sys.path.remove(str(folder))


def test_every_answer_is_as_documented(ask: Asking, tokens: dict[str, Any]) -> None:
    """From creating a run to deleting it, with the refusals on the way: each answer has a documented status, the body's
    model, and the headers said to be there, each of its type."""
    assert ask("healthz").additional_properties == {"status": "alive"}
    ask("readyz")
    assert ask("show_server").scopes == []
    ask("list_runs", status=401)
    ask.token = "unknown"
    ask("list_runs", status=401)
    ask.token = tokens["pull"]
    assert ask("list_runs").runs == []
    assert ask("show_server").scopes == ["pull"]
    ask("attach_writer", "r", status=403)
    ask.token = tokens["admin"]
    assert "ema_runs" in ask("metrics")

    config = ask.model("RunConfigBody", run="r", layout=LAYOUT, decay=0.5, use_num_updates=False)
    assert ask("create_run", body=config, status=201).status == "awaiting_weights"
    assert ask("create_run", body=config).run == "r"
    assert ask("get_weights", "r", status=409).code == "awaiting_weights"
    assert ask("put_weights", "r", body=ask.body(BODY[:-1]), status=422).code == "malformed_body"
    assert ask("put_weights", "r", body=ask.body(), created_at=0.5, status=404).code == "run_not_found"
    assert ask("put_weights", "r", body=ask.body()).status == "ready"
    ask("create_run", body=ask.model("RunConfigBody", run="r", layout=LAYOUT), status=409)
    ask("get_weights", "r")  # no step is known yet
    writer = ask("attach_writer", "r", status=201).writer
    assert ask("put_update", "r", 1, body=ask.body(), ema_writer=writer).applied
    assert ask("put_update", "r", 1, body=ask.body(), status=409).code == "fenced"
    assert ask("get_update", "r", 1).state == "applied"

    for_parts = {"of": 2, "group": "g", "ema_writer": writer}
    parts = [save({name: tensor}, {"ema.slices": "{}"}) for name, tensor in STATE.items()]
    assert ask("put_update_part", "r", 2, 0, body=ask.body(parts[0]), **for_parts, status=202).parts == [0]
    assert ask("put_update_part", "r", 2, 1, body=ask.body(parts[1]), **for_parts).step == 2
    data = BODY[8 + int.from_bytes(BODY[:8], "little") :]
    layout = ask("show_layout", "r")
    stretch = {"group": "g", "ema_writer": writer, "ema_layout": layout.digest}
    size = len(parts[0]) - 8 - int.from_bytes(parts[0][:8], "little")
    cut = {**for_parts, "group": "h", "size": size}
    whole = ask("put_update_part_stretch", "r", 2, 0, 0, size, body=ask.body(parts[0]), **cut, status=202)
    assert whole.parts == [0]
    again = ask("put_update_stretch", "r", 2, 0, len(data), body=ask.body(data), **stretch)
    assert (again.applied, again.step, layout.lanes) == (False, 2, 8)
    assert ask("detach_writer", "r", writer).ended_at > 0
    assert ask("detach_writer", "r", 9, status=422).code == "invalid_request"
    ask("create_run", body=ask.model("RunConfigBody", run="p", layout=LAYOUT), status=201)
    assert ask("put_weights_part", "p", 0, body=ask.body(parts[0]), of=2, status=202).state == "staged"
    assert ask("put_weights_part", "p", 1, body=ask.body(parts[1]), of=2).run == "p"

    ask("put_snapshot", "r", "s", status=201)
    assert ask("put_snapshot", "r", "s").name == "s"
    assert ask("show_snapshot", "r", "s").step == 2
    assert [each.name for each in ask("list_snapshots", "r").snapshots] == ["s"]
    for name, path in (("weights", ("r",)), ("snapshot_weights", ("r", "s"))):
        assert load(ask(f"get_{name}", *path).payload.read()).keys() == STATE.keys()
        ask(f"get_{name}", *path, range_="bytes=0-7", status=206)
        ask(f"get_{name}", *path, range_="bytes=9999999-", status=416)
        ask(f"get_{name}", *path, if_none_match="*", status=304)
        ask(f"get_{name}", *path, if_none_match='"another"')
        ask(f"head_{name}", *path)
        ask(f"head_{name}", *path, if_none_match="*", status=304)
        ask(f"head_{name}", "nobody", *path[1:], status=404)
    ask("get_weights", "r", min_step=9, wait=0.01, status=409)
    assert ask("get_profiles", "r", sigma_rel="0.1", status=422).code == "synthesis_refused"

    ring = ask.model("RunConfigBody", run="ringed", layout=LAYOUT, posthoc={"snapshots": 4, "sigma_rel": [0.1]})
    assert ask("create_run", body=ring, status=201).ring.snapshots == 4
    ask("put_weights", "ringed", body=ask.body())
    ask("put_update", "ringed", 1, body=ask.body())
    assert ask("get_profiles", "ringed", sigma_rel="0.1").error < 1e-12
    assert ask("get_weights", "ringed", sigma_rel="0.1", max_error=1.0).payload.read()
    swept = ask.model("SweepBody", kind="sigma_rel", points=[{"value": 0.1, "result": 0.5}, {"value": 0.2}], at="s")
    assert ask("add_sweep", "ringed", body=swept, idempotency_key="k", status=201).version == "1.1"
    assert [each.at for each in ask("list_sweeps", "ringed").sweeps] == ["s"]
    assert ask("get_sweep", "ringed", sigma_rel="0.1,0.2", max_error=1.0).payload.read()

    history = ask("get_history", "r")
    assert (history.seen, history.columns.step, ask("get_distances", "r").step) == (2, [1, 2], 2)
    ask("get_history", "r", average="none", status=404)
    for name in ("get_history", "get_distances"):
        ask(name, "r", if_none_match="*", status=304)
    assert ask("get_timeline", "r", limit=1).entries[0].kind == "snapshot"

    assert ask("change_run", "r", body=ask.model("RunPatchBody", decay=0.25)).decay == 0.25
    average = ask.model("AverageConfigBody", name="fast", schedule="constant", decay=0.5)
    assert len(ask("add_average", "r", body=average, status=201).averages) == 2
    assert ask("add_average", "r", body=average).run == "r"
    ask("remove_average", "r", "fast", status=204)
    assert ask("remove_average", "r", "fast", status=404).code == "average_not_found"
    ask("reset_num_updates", "r")
    assert ask("rewind_run", "r", body=ask.model("RewindBody", snapshot="s")).version
    assert ask("show_run", "r").durable_step == 2
    assert [spec.name for spec in ask("show_layout", "r").layout] == [spec["name"] for spec in LAYOUT]
    ask("show_layout", "nobody", status=404)
    assert ask("show_config", "r").durability == "process"
    assert ask("show_version", "r", hold=True).lineage
    ask("show_version", "nobody", status=404)
    ask("show_config", "nobody", status=404)
    assert ask("show_run", "-", status=422).code == "invalid_request"
    ask("delete_snapshot", "r", "s", status=204)
    ask("delete_run", "r", status=204)
    assert ask.open == set()
