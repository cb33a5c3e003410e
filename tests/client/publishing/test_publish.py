"""publish() to a folder: what the libraries load of it is the pulled weights, or those of the publish before."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ema_client import EmaClient
from ema_client.errors import EmaError, InvalidRequest, ProtocolError, RunNotFound
from ema_client.publishing import publish
from ema_client.publishing.folder import Folder
from tests.client.publishing.models import diffusers_model, loaded, save_config, transformers_model, weights_of
from tests.client.states import ONCE

Ema = Callable[..., tuple[int, str, str]]


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("make", [transformers_model, diffusers_model])
def test_what_the_libraries_load(
    client: EmaClient, ema: Ema, run_name: str, tmp_path: Path, make: Callable[[], nn.Module]
) -> None:
    """Whole, in shards, as a variant, over and over into one folder: bit for bit what pull() gives."""
    model, folder = make(), tmp_path / "published here"
    client.create_run(run_name, model, decay=0.5, use_num_updates=False)
    config, url = save_config(model, tmp_path / "config"), folder.as_uri()

    for step, options in enumerate(((), ("--max-shard-size", "40KB"), ("--max-shard-size", "30KB"), ()), start=1):
        client.push(run_name, {name: tensor + 1.0 for name, tensor in weights_of(model).items()}, step=step)
        code, out, err = ema("publish", run_name, "--to", url, "--config", config, "--json", *options)
        assert code == 0, err
        said = json.loads(out)
        pulled = client.pull(run_name)
        assert _equal(loaded(folder), dict(pulled))
        assert said["info"]["version"] == pulled.info.version
        assert (len(said["files"]) > 1) == bool(options)
        # Nothing of an earlier publish is left.
        weights = {path.name for path in folder.glob("*.safetensors")}
        assert weights == set(said["files"])
        for name in weights:
            with safe_open(folder / name, "pt") as file:
                assert file.metadata() == {"format": "pt", **pulled.info.to_metadata()}

    code, out, err = ema("publish", run_name, "--to", url, "--variant", "ema", "--max-shard-size", "40KB")
    assert code == 0, err
    assert f"version {client.run(run_name).version}" in out
    assert "shards and their index" in out
    assert _equal(loaded(folder, "ema"), loaded(folder))


def test_a_module_of_the_run_in_another_dtype(client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """A UNet that is a part of what was trained, cast by the service, loads as the UNet alone."""
    unet = diffusers_model()
    client.create_run(run_name, nn.ModuleDict({"unet": unet, "unet2": nn.Linear(2, 2)}))
    done = publish(client, run_name, tmp_path.as_uri(), module="unet", dtype="F16", config=save_config(unet, tmp_path))
    assert done.format == "diffusers"
    assert {name: each.half() for name, each in loaded(tmp_path).items()}.keys() == weights_of(unet).keys()
    with safe_open(tmp_path / done.files[0], "pt") as file:
        assert all(torch.equal(file.get_tensor(name), each.half()) for name, each in weights_of(unet).items())
    with pytest.raises(InvalidRequest, match=r"begins with 'text\.'"):
        publish(client, run_name, tmp_path.as_uri(), module="text")


class _Broken(Exception):
    """The end of a publish."""


class _Breaking(Folder):
    """A folder whose n-th act, of files that appear or are removed, never happens."""

    def __init__(self, path: Path, acts: int) -> None:
        super().__init__(path)
        self._acts = acts

    def _act(self) -> None:
        self._acts -= 1
        if self._acts < 0:
            raise _Broken

    @contextlib.contextmanager
    def writing(self, name: str, size: int) -> Iterator[BinaryIO]:
        with super().writing(name, size) as file:
            yield file
            self._act()

    def finish(self, removed: Collection[str], said: str) -> None:
        for name in removed:
            self._act()
            super().finish([name], said)


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, "60KB"), (None, "5GB"), ("60KB", "60KB"), ("90KB", "60KB"), ("5GB", "60KB"), ("60KB", "5GB")],
)
def test_a_publish_that_ends_at_any_point(
    client: EmaClient, run_name: str, tmp_path: Path, before: str | None, after: str
) -> None:
    """The library loads the earlier weights or the new ones, whole, and the next publish leaves nothing behind."""
    model = diffusers_model()
    client.create_run(run_name, model, decay=0.5, use_num_updates=False)
    config = save_config(model, tmp_path / "config")
    old, seen, acts = client.pull(run_name), set(), 0
    client.snapshot(run_name, "old")
    client.push(run_name, {name: tensor + 1.0 for name, tensor in weights_of(model).items()}, step=1)
    new = client.pull(run_name)

    ended = False
    while not ended:
        folder = tmp_path / str(acts)
        if before:
            publish(client, run_name, folder.as_uri(), config=config, snapshot="old", max_shard_size=before)
        try:
            publish(client, run_name, _Breaking(folder, acts), config=config, max_shard_size=after)
            ended = True
        except _Broken:
            acts += 1
        which = {name for name, weights in (("old", old), ("new", new)) if _loads(folder, weights)}
        assert len(which) == 1 or (before is None and not which), f"after {acts} acts"
        seen |= which
    assert seen == ({"old", "new"} if before else {"new"})
    assert acts >= 3

    # Over what the publish left that got furthest, and over what the first one left.
    for folder in (tmp_path / "0", tmp_path / str(acts - 1)):
        done = publish(client, run_name, folder.as_uri(), config=config, max_shard_size=after)
        assert _loads(folder, new)
        assert {path.name for path in folder.glob("*.safetensors")} == set(done.files)


def _loads(folder: Path, weights: Any) -> bool:
    """Whether the library loads these weights from the folder; False too where it loads none."""
    try:
        return _equal(loaded(folder), dict(weights))
    except OSError:
        return False


def test_the_run_goes_on_while_the_connection_breaks(
    client: EmaClient, relay: Callable[..., Any], run_name: str, tmp_path: Path
) -> None:
    """Weights of two versions are never mixed: either all are of the version that was begun, which the service keeps
    for a moment, or the publish ends, and says that a snapshot would not."""
    model = diffusers_model()
    client.create_run(run_name, model, decay=0.5, use_num_updates=False)
    client.snapshot(run_name, "kept")
    lost: list[str] = []

    def loses(request: Any) -> bool:
        breaks = request.target.partition("?")[0].endswith("/weights") and len(lost) < 1
        if breaks:
            lost.append(request.target)
            client.push(run_name, {name: each + 1.0 for name, each in weights_of(model).items()})
        return breaks

    options: dict[str, Any] = {"config": save_config(model, tmp_path / "config"), "max_shard_size": "30KB"}
    with EmaClient(relay(loses, after=100_000).url) as broken:
        try:
            publish(broken, run_name, (tmp_path / "moved").as_uri(), **options)
        except ProtocolError as fault:
            assert "the weights are others now" in str(fault)  # noqa: PT017 - one of two ways that are right
            assert not list((tmp_path / "moved").glob("*.json"))
        else:
            assert _equal(loaded(tmp_path / "moved"), dict(client.pull(run_name, snapshot="kept")))
        assert lost
        lost.clear()
        publish(broken, run_name, (tmp_path / "kept").as_uri(), snapshot="kept", **options)
    assert lost
    assert _equal(loaded(tmp_path / "kept"), dict(client.pull(run_name, snapshot="kept")))


def test_the_card(client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """Says which weights, and how they are loaded; of a card that is there what people wrote stays."""
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: pip install '.[publish]'")
    model = diffusers_model()
    client.create_run(run_name, model, decay=0.999)
    config = save_config(model, tmp_path)
    publish(client, run_name, tmp_path.as_uri(), config=config, variant="ema")
    path = tmp_path / "README.md"
    card = hub.ModelCard.load(path)
    assert (card.data.library_name, card.data.tags) == ("diffusers", ["ema"])
    for line in (f"| run | `{run_name}` |", "| step | `none` |", "| decay | `0.999 (schedule litema)` |"):
        assert line in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    space: dict[str, Any] = {}
    exec(code, space)
    assert _equal(weights_of(space["model"]), dict(client.pull(run_name)))

    path.write_text(path.read_text().replace("tags:", "license: mit\ntags:") + "\nBy people.\n")
    client.push(run_name, model, step=7)
    publish(client, run_name, tmp_path.as_uri(), variant="ema")
    again = hub.ModelCard.load(path)
    assert again.data.license == "mit"
    assert "| step | `7` |" in again.text
    assert again.text.count("## Which weights") == 1
    assert again.text.endswith("\nBy people.\n")

    publish(client, run_name, tmp_path.as_uri())
    assert path.read_text().count("## Which weights") == 2
    assert "\nBy people.\n" in path.read_text()

    path.write_text("# Mine\n")
    publish(client, run_name, tmp_path.as_uri(), variant="ema")
    assert path.read_text().startswith("# Mine\n\n<!-- ema-client: diffusion_pytorch_model.ema.safetensors -->\n")


def test_what_is_refused(client: EmaClient, ema: Ema, run_name: str, tmp_path: Path) -> None:
    """In words of what was typed, and before anything is written."""
    client.create_run(run_name, {"a": torch.zeros(3)})
    url = (tmp_path / "out").as_uri()
    for words, said in (
        (("--to", str(tmp_path / "out")), url),
        (("--to", "ftp://host/x"), "hf://owner/name"),
        (("--to", "hf://name"), "hf://owner/name@branch"),
        (("--to", "s3:///x"), "s3://bucket/prefix"),
        (("--to", url, "--format", "onnx"), "transformers, diffusers, plain"),
        (("--to", url, "--variant", "../x"), "names no variant"),
        (("--to", url, "--max-shard-size", "big"), "no size of a shard"),
        (("--to", url, "--module", "unet."), "module=unet"),
    ):
        code, _, err = ema("publish", run_name, *words)
        assert code == 1
        assert said in err
        assert not (tmp_path / "out").exists()
    with pytest.raises(RunNotFound):
        publish(client, f"{run_name}-other", url)
    with EmaClient("http://127.0.0.1:9", retry=ONCE) as away, pytest.raises(EmaError):
        publish(away, run_name, url)
    code, out, _ = ema("publish", run_name, "--to", url, "--format", "transformers")
    assert code == 0
    assert "there is no config.json" in out
