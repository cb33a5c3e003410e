"""publish() to the Hugging Face Hub: the real huggingface_hub, against a double of the Hub's API."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from ema_client import EmaClient
from tests.client.publishing.hub import TOKEN, Hub

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install -e '.[publish]'")

STATE = {"a": torch.arange(60_000.0), "b": torch.arange(50_000.0), "c": torch.ones(3)}
Said = tuple[int, str, str]


@pytest.fixture
def hub() -> Iterator[Hub]:
    running = Hub()
    yield running
    running.close()


@pytest.fixture
def publish(server: Any, hub: Hub, run_name: str, tmp_path: Path) -> Callable[..., Said]:
    """The command in a process of its own, as huggingface_hub reads its environment once; and its temporary folder."""
    environ = {
        **os.environ,
        "EMA_SERVICE_URL": server.url,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "TMPDIR": str(tmp_path / "spool"),
    }
    (tmp_path / "spool").mkdir()

    def run(*words: str, **more: str) -> Said:
        command = (sys.executable, "-m", "ema_client", "publish", run_name, *words)
        done = subprocess.run(command, env={**environ, **more}, capture_output=True, text=True, check=False)
        assert list((tmp_path / "spool").iterdir()) == []
        assert "LFS" not in done.stderr
        return done.returncode, done.stdout, done.stderr

    return run


def _weights(files: dict[str, bytes]) -> dict[str, torch.Tensor]:
    index = json.loads(files["model.safetensors.index.json"])
    return {name: load(files[shard])[name] for name, shard in index["weight_map"].items()}


def test_one_commit_each(client: EmaClient, publish: Callable[..., Said], hub: Hub, run_name: str) -> None:
    """A publish is one commit: shards, index, card, and what goes. A branch is made; a card of people's stays."""
    client.create_run(run_name, STATE, decay=0.5, use_num_updates=False)
    code, out, err = publish("--to", "hf://org/model", "--max-shard-size", "250KB", "--json")
    assert code == 0, err
    assert json.loads(out)["commit"] == f"{1:040x}"
    main = hub.branches["org/model", "main"]
    names = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    assert main.keys() == {".gitattributes", "README.md", "model.safetensors.index.json", *names}
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in _weights(main).items())
    assert hub.private == {"org/model": True}

    main["README.md"] = main["README.md"].replace(b"tags:", b"license: mit\ntags:")
    client.push(run_name, {name: tensor + 1.0 for name, tensor in STATE.items()}, step=5)
    code, _, err = publish("--to", "hf://org/model", "--max-shard-size", "1MB", "--format", "transformers")
    assert code == 0, err
    main = hub.branches["org/model", "main"]
    assert main.keys() == {".gitattributes", "README.md", "model.safetensors"}
    assert all(torch.equal(load(main["model.safetensors"])[name], each) for name, each in client.pull(run_name).items())
    assert b"license: mit" in main["README.md"]
    assert b"| step | `5` |" in main["README.md"]
    assert hub.commits == [f"EMA of {run_name}, version 1.0", f"EMA of {run_name}, step 5, version 1.1"]

    code, _, err = publish("--to", "hf://org/model@nightly/unet", "--variant", "ema")
    assert code == 0, err
    nightly = hub.branches["org/model", "nightly"]
    assert nightly.keys() == {*main, "unet/model.ema.safetensors", "unet/README.md"}
    assert hub.branches["org/model", "main"] == main


def test_what_the_hub_refuses(client: EmaClient, publish: Callable[..., Said], hub: Hub, run_name: str) -> None:
    """No login, no right, a commit that fails: told in a line, and what was published before is there."""
    client.create_run(run_name, STATE)
    code, _, err = publish("--to", "hf://org/model", HF_TOKEN="hf_other")
    assert (code, "Traceback" in err) == (1, False)
    assert "hf auth login" in err
    assert publish("--to", "hf://org/model", "--public")[0] == 0
    assert hub.private == {"org/model": False}
    before = dict(hub.branches["org/model", "main"])
    client.push(run_name, {name: tensor + 1.0 for name, tensor in STATE.items()})
    for method, part, status in (("PUT", "/objects/", 400), ("POST", "/commit/", 403)):
        hub.refuse = lambda said, path, method=method, part=part, status=status: (
            status if said == method and part in path else None
        )
        code, _, err = publish("--to", "hf://org/model")
        assert (code, "Traceback" in err) == (1, False), err
        assert "ema: hf://org/model: " in err
        assert hub.branches["org/model", "main"] == before
