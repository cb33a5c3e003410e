"""publish() to S3, against a server of S3 that is a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ema_client import EmaClient
from ema_client.errors import DestinationFailed, UsageError
from ema_client.publishing import publish
from tests.client.publishing.models import diffusers_model, save_config, weights_of
from tests.s3 import S3Server

Ema = Callable[..., tuple[int, str, str]]
#: Three shards, the last one uploaded in two parts.
STATE = {name: torch.full((size,), float(size)) for name, size in (("a", 1 << 17), ("b", 1 << 17), ("c", 9 << 19))}
SHARDS = {"max_shard_size": "600KB"}


@pytest.fixture
def bucket(s3: S3Server, run_name: str) -> Any:  # noqa: ARG001 - the environment names the server
    """s3fs' view of S3, without a memory; a bucket of the test's own has the name of its run."""
    import s3fs

    files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    files.mkdir(run_name)
    return files


def _loaded(files: Any, place: str, folder: Path) -> dict[str, torch.Tensor]:
    """What the index of a prefix names, got as anybody gets objects of S3."""
    files.get(f"{place}/", f"{folder}/", recursive=True)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {name: load_file(folder / name) for name in set(index["weight_map"].values())}
    return {name: shards[shard][name] for name, shard in index["weight_map"].items()}


def test_publish_and_publish_again(client: EmaClient, ema: Ema, bucket: Any, run_name: str, tmp_path: Path) -> None:
    """Shards and their index; the next publish takes their place, and leaves nothing else."""
    client.create_run(run_name, STATE, decay=0.5, use_num_updates=False)
    place = f"{run_name}/models/unet"
    for step in (1, 2):
        client.push(run_name, {name: tensor + step for name, tensor in STATE.items()}, step=step)
        code, out, err = ema("publish", run_name, "--to", f"s3://{place}", "--max-shard-size", "600KB", "--json")
        assert code == 0, err
        said = json.loads(out)
        assert len(said["files"]) == 3
        found = _loaded(bucket, place, tmp_path / str(step))
        pulled = client.pull(run_name)
        assert found.keys() == pulled.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in pulled.items())
        names = {path.rpartition("/")[2] for path in bucket.ls(place)}
        assert names == {*said["files"], "model.safetensors.index.json", "README.md"}
    card = bucket.cat(f"{place}/README.md").decode()
    assert "url_to_fs" not in card  # plain weights are loaded by name
    assert bucket.list_multipart_uploads(run_name) == []


def test_the_lines_of_the_card(
    client: EmaClient, bucket: Any, run_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They get the model from the bucket and load it, as whoever reads the card would."""
    model = diffusers_model()
    client.create_run(run_name, model)
    publish(client, run_name, f"s3://{run_name}/unet", config=save_config(model, tmp_path))
    [code] = re.findall(r"```python\n(.*?)```", bucket.cat(f"{run_name}/unet/README.md").decode(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(code, found)
    loaded, wanted = weights_of(found["model"]), weights_of(model)
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())


def test_a_publisher_that_is_killed(server: Any, client: EmaClient, bucket: Any, run_name: str, tmp_path: Path) -> None:
    """SIGKILL in the middle: what was published before loads, and the next publish cleans up."""
    client.create_run(run_name, STATE)
    place = f"{run_name}/models"
    publish(client, run_name, f"s3://{place}", **SHARDS)
    client.push(run_name, {name: tensor + 1 for name, tensor in STATE.items()}, step=1)
    words = ("-m", "ema_client", "publish", run_name, "--to", f"s3://{place}", "--max-shard-size", "600KB")
    killed = subprocess.Popen((sys.executable, *words), env={**os.environ, "EMA_SERVICE_URL": server.url})
    while len(bucket.ls(place)) < 6:
        assert killed.poll() is None
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL

    found = _loaded(bucket, place, tmp_path / "old")
    assert all(torch.equal(found[name], tensor) for name, tensor in STATE.items())
    done = publish(client, run_name, f"s3://{place}", **SHARDS)
    found = _loaded(bucket, place, tmp_path / "new")
    assert all(torch.equal(found[name], tensor) for name, tensor in client.pull(run_name).items())
    assert {path.rpartition("/")[2] for path in bucket.ls(place)} == {
        *done.files, "model.safetensors.index.json", "README.md"
    }  # fmt: skip


def test_refusals_and_absences(
    client: EmaClient,
    ema: Ema,
    bucket: Any,  # noqa: ARG001 - there is one of the run's name
    start_s3: Callable[[], S3Server],
    run_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No bucket, no credentials, no s3fs, a server of S3 that is killed in the middle: each told in its own words."""
    client.create_run(run_name, STATE)
    code, _, err = ema("publish", run_name, "--to", "s3://no-such-bucket/x")
    assert code == 1
    assert "there is no bucket 'no-such-bucket'" in err
    with monkeypatch.context() as patched:
        patched.delenv("AWS_ACCESS_KEY_ID")
        patched.delenv("AWS_SECRET_ACCESS_KEY")
        patched.setenv("HOME", "/nowhere")
        code, _, err = ema("publish", run_name, "--to", f"s3://{run_name}/x")
        assert code == 1
        assert "AWS_ACCESS_KEY_ID" in err
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "s3fs", None)
        with pytest.raises(UsageError, match="s3fs, which is not installed"):
            publish(client, run_name, f"s3://{run_name}/x")

    other = start_s3()
    monkeypatch.setenv("AWS_ENDPOINT_URL", other.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    import s3fs

    s3fs.S3FileSystem(skip_instance_cache=True).mkdir(run_name)

    def dies(done: int, total: int) -> None:
        if done > total // 2:
            other.kill()

    with pytest.raises(DestinationFailed, match=f"s3://{run_name}/x"):
        publish(client, run_name, f"s3://{run_name}/x", progress=dies, **SHARDS)
