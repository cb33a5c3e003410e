"""A stream cut into shards as it passes: names, places, sizes, memory."""

from __future__ import annotations

import contextlib
import io
import json
import tracemalloc
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from ema_client import wire
from ema_client.errors import UsageError
from ema_client.protocol import TensorSpec
from ema_client.publishing.naming import Naming
from ema_client.publishing.shards import Cutter, bytes_of


class Kept:
    """The files of a sink, by name; one is there when its block has ended."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    @contextlib.contextmanager
    def __call__(self, name: str, size: int) -> Iterator[BinaryIO]:
        file = io.BytesIO()
        yield file
        assert len(file.getvalue()) == size
        self.files[name] = file.getvalue()


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    most=st.integers(1, 60),
    piece=st.integers(1, 50),
)
def test_shards_hold_the_stream(lengths: list[int], most: int, piece: int) -> None:
    """Whatever the sizes, and however the stream is cut on its way: each tensor once, in a file that loads."""
    tensors = {f"unet.t{i}": torch.full((n,), float(i), dtype=(torch.float32, torch.bfloat16)[i % 2])
               for i, n in enumerate(lengths)}  # fmt: skip
    raw, kept = save(tensors, {"ema_run": "r"}), Kept()

    with Cutter(kept, Naming("plain").shards, most, "unet") as cutter:
        for start in range(0, len(raw), piece):
            cutter.write(raw[start : start + piece])
        cutter.finish()

    found: dict[str, Any] = {}
    for content in kept.files.values():
        shard = load(content)
        assert not shard.keys() & found.keys()
        assert len(shard) == 1 or sum(each.nbytes for each in shard.values()) <= most
        found |= shard
    assert {f"unet.{name}" for name in found} == set(tensors)
    assert all(torch.equal(found[name.removeprefix("unet.")], tensor) for name, tensor in tensors.items())
    index = json.loads(cutter.index())
    assert index["metadata"] == {"total_size": sum(each.nbytes for each in tensors.values()), "ema_run": "r"}
    assert index["weight_map"] == {n: file for file, content in kept.files.items() for n in load(content)}


def test_large_weights_take_no_memory() -> None:
    """Of 100 GB that pass in shards of 5 GB, no more than the head and a piece is held."""
    specs = [TensorSpec(f"layer.{i}", (1 << 28,), "F32") for i in range(100)]
    head, piece = wire.build_header(wire.place(specs)), memoryview(bytes(8 << 20))
    passed = dict[str, int]()

    @contextlib.contextmanager
    def sink(name: str, size: int) -> Iterator[BinaryIO]:
        class Counting:
            def write(self, data: bytes) -> None:
                passed[name] = passed.get(name, 0) + len(data)

        yield cast(BinaryIO, Counting())
        assert passed[name] == size

    tracemalloc.start()
    with Cutter(sink, Naming("transformers").shards, bytes_of("5GB"), None) as cutter:
        cutter.write(head)
        for _ in range(100 << 7):
            cutter.write(piece)
        cutter.finish()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert len(passed) == 25
    assert peak < 1 << 20


def test_a_block_that_raises_leaves_the_last_shard_out() -> None:
    raw, kept = save({"a": torch.zeros(4), "b": torch.zeros(4)}), Kept()
    with pytest.raises(OSError, match="full"), Cutter(kept, Naming("plain").shards, 16, None) as cutter:  # noqa: PT012 - as it is used
        cutter.write(raw)
        raise OSError("full")
    assert list(kept.files) == ["model-00001-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("said", "count"), [(7, 7), ("5GB", 5 * 10**9), ("5 GiB", 5 << 30), ("500mb", 500 * 10**6), ("12", 12)]
)
def test_sizes(said: int | str, count: int) -> None:
    assert bytes_of(said) == count


@pytest.mark.parametrize("said", ["", "0", "-1", "much", "1.5GB", 0])
def test_what_is_no_size(said: int | str) -> None:
    with pytest.raises(UsageError, match="no size of a shard"):
        bytes_of(said)


def test_names_are_the_libraries_own() -> None:
    """The variant stands where save_pretrained() of both libraries writes it."""
    naming = Naming("diffusers", "ema")
    assert naming.whole == "diffusion_pytorch_model.ema.safetensors"
    assert naming.index == "diffusion_pytorch_model.safetensors.index.ema.json"
    assert naming.shards(2)[0] == "diffusion_pytorch_model.ema-00001-of-00002.safetensors"
    assert Naming("transformers").index == "model.safetensors.index.json"


def test_superseded_files_are_the_models_own() -> None:
    """Of what is there, weights of the same name and variant go: nothing else that lies beside them."""
    naming = Naming("transformers", "ema")
    ours = ["model.ema.safetensors", "model.ema-00001-of-00002.safetensors", naming.index,
            "model.ema-00002-of-00002-0123abcd.safetensors"]  # fmt: skip
    others = ["model-00001-of-00002.safetensors", "model.safetensors", "model.safetensors.index.json", "README.md",
              "model.ema-00001-of-00002.safetensors.bak", "a_model.ema.safetensors"]  # fmt: skip
    assert set(naming.superseded([*ours, *others], [])) == set(ours)
    assert naming.superseded(ours, [])[0] == naming.index
    assert naming.index not in naming.superseded(ours, [naming.index])
