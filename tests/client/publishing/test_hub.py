"""publish() to the Hugging Face Hub: the real huggingface_hub, against a double of the Hub's API."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from ema_client import EmaClient
from tests.client.publishing.hub import TOKEN, Hub

huggingface_hub = pytest.importorskip(
    "huggingface_hub", reason="huggingface_hub is not installed: pip install -e '.[publish]'"
)

# huggingface_hub calls its HTTP library in a way that the library warns of.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

STATE = {"a": torch.arange(60_000.0), "b": torch.arange(50_000.0), "c": torch.ones(3)}
Said = tuple[int, str, str]


@pytest.fixture
def hub() -> Iterator[Hub]:
    running = Hub()
    yield running
    running.close()


@pytest.fixture
def publish(
    ema: Callable[..., Said], hub: Hub, run_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Said]]:
    """The command, whose huggingface_hub takes the double for the Hub; its temporary files are looked for."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "spool"))
    (tmp_path / "spool").mkdir()

    def run(*words: str, token: str = TOKEN) -> Said:
        monkeypatch.setenv("HF_TOKEN", token)
        done = ema("publish", run_name, *words)
        assert list((tmp_path / "spool").iterdir()) == []
        assert "LFS" not in done[2]
        return done

    yield run
    huggingface_hub.close_session()


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
    code, _, err = publish("--to", "hf://org/model@nightly")
    assert (code, hub.private) == (1, {}), "a model was made for a run that there is not"
    client.create_run(run_name, STATE)
    code, _, err = publish("--to", "hf://org/model", token="hf_other")
    assert (code, "Traceback" in err) == (1, False)
    assert "hf auth login" in err
    assert publish("--to", "hf://org/model", "--public")[0] == 0
    assert hub.private == {"org/model": False}
    before = dict(hub.branches["org/model", "main"])
    for method, part, status in (
        ("HEAD", "/resolve/", 403),  # the card that is there cannot be read, so it is not replaced
        ("PUT", "/objects/", 400),
        ("POST", "/preupload/", 404),
        ("POST", "/commit/", 403),
    ):
        # Other weights each time: the Hub has those that were sent.
        client.push(run_name, {name: tensor + 1.0 for name, tensor in STATE.items()})
        hub.refuse = lambda said, path, method=method, part=part, status=status: (
            status if said == method and part in path else None
        )
        code, _, err = publish("--to", "hf://org/model")
        assert (code, "Traceback" in err) == (1, False), err
        assert "ema: hf://org/model: " in err
        assert hub.branches["org/model", "main"] == before
