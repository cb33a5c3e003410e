"""publish() to Google Cloud Storage and Azure, against emulators that are processes of their own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ema_client import EmaClient
from ema_client.errors import DestinationFailed, UsageError
from ema_client.publishing import publish
from ema_client.publishing.bucket import Bucket
from tests.emulators import EMULATED, Emulator, emulator

# aiohttp's, of a part of an upload that gcsfs hands over as bytes.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")

Ema = Callable[..., tuple[int, str, str]]
#: Three shards, the last one uploaded in two parts.
STATE = {name: torch.full((size,), float(size)) for name, size in (("a", 1 << 17), ("b", 1 << 17), ("c", 9 << 19))}


@pytest.fixture(scope="module", params=EMULATED)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    with emulator(request.param, tmp_path_factory.mktemp(request.param)) as running:
        yield running


def test_publish_and_publish_again(client: EmaClient, ema: Ema, store: Emulator, run_name: str, tmp_path: Path) -> None:
    """Shards and their index load bit for bit; the next publish takes their place, and leaves nothing else."""
    files, place = store.files(), f"{run_name}/models/unet"
    files.mkdir(run_name)
    client.create_run(run_name, STATE, decay=0.5, use_num_updates=False)
    for step in (1, 2):
        client.push(run_name, {name: tensor + step for name, tensor in STATE.items()}, step=step)
        to = f"{store.kind}://{place}"
        code, out, err = ema("publish", run_name, "--to", to, "--max-shard-size", "600KB", "--json")
        assert code == 0, err
        said = json.loads(out)
        assert len(said["files"]) == 3
        names = {path.rpartition("/")[2] for path in files.ls(place, detail=False)}
        assert names == {*said["files"], "model.safetensors.index.json", "README.md"}
        found = {}
        for name in said["files"]:
            (tmp_path / name).write_bytes(files.cat_file(f"{place}/{name}"))
            found |= load_file(tmp_path / name)
        pulled = client.pull(run_name)
        assert found.keys() == pulled.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in pulled.items())


@pytest.mark.soak  # this emulator of Google's takes no upload back, which gcsfs asks for over and over
def test_file_that_is_not_finished_is_not_there(store: Emulator, run_name: str) -> None:
    """Neither in parts that were sent nor later, when its object is collected."""
    store.files().mkdir(run_name)
    place = Bucket(f"{store.kind}://{run_name}/models")

    def breaks_off() -> None:
        with place.writing("model.safetensors", 40 << 20) as file:
            for _ in range(3):
                file.write(bytes(10 << 20))
            raise KeyError("model")

    with pytest.raises(KeyError):
        breaks_off()
    assert place.names() == frozenset()


def test_refusals_and_absences(
    client: EmaClient, store: Emulator, run_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No bucket, and no package: each told in its own words."""
    client.create_run(run_name, {"a": torch.ones(3)})
    with pytest.raises(DestinationFailed, match="there is no bucket 'no-such-bucket'"):
        publish(client, run_name, f"{store.kind}://no-such-bucket/x")
    package = {"gs": "gcsfs", "abfs": "adlfs"}[store.kind]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"{package}, which is not installed"):
        publish(client, run_name, f"{store.kind}://bucket/x")
