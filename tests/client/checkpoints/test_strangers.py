"""``ema import`` of files that strangers made: damaged, compressed, bombs, and folders that lead elsewhere.

Real files of torch.save(), zipfile and pickle. Each is read as torch would read it, or refused by an error that names
the file: no other exception, no memory beyond the file's size, nothing executed, no bytes that are not the tensor's.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ema_client import EmaClient, checkpoints
from ema_client.checkpoints import files
from ema_client.errors import EmaError, UsageError

Ema = Callable[..., tuple[int, str, str]]
STATE = {"a.weight": torch.arange(40.0).reshape(5, 8), "a.bias": torch.arange(3.0)}
LEGACY = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])


def saved(path: Path, content: Any, legacy: bool = False) -> bytes:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path.read_bytes()


def rezipped(path: Path, change: Callable[[str, bytes], bytes] = lambda _, raw: raw, method: int = 0) -> None:
    """The archive at ``path`` anew: each record changed, and compressed by ``method``."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, raw in records.items():
            archive.writestr(name, change(name, raw))


def pickled_as(path: Path, raw: bytes, record: bytes = bytes(16)) -> None:
    """A file of torch.save() with ``raw`` as its pickle and one storage "0"."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", raw)
        archive.writestr("x/data/0", record)
        archive.writestr("x/version", "3\n")


def refused(path: Path) -> str:
    with pytest.raises(UsageError) as fault:
        checkpoints.read(path)
    assert path.name in fault.value.detail
    assert "\n" not in fault.value.detail
    return fault.value.detail


def same(mine: Any, torchs: Any) -> bool:
    if isinstance(torchs, Tensor):
        kinds = (mine.dtype, mine.shape) == (torchs.dtype, torchs.shape)
        return kinds and torch.equal(mine.flatten().view(torch.uint8), torchs.detach().flatten().view(torch.uint8))
    if isinstance(torchs, dict):
        return list(mine) == list(torchs) and all(same(mine[key], torchs[key]) for key in torchs)
    if isinstance(torchs, list | tuple):
        return type(mine) in (list, tuple) and all(map(same, mine, torchs))
    return bool(mine == torchs)


# --- what is read as torch reads it ---------------------------------------------------------------------------------


@LEGACY
def test_contents_are_those_that_torch_reads(tmp_path: Path, legacy: bool) -> None:
    """Every dtype, views, ties, parameters, an optimizer's state and plain values."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    block = torch.randn(6, 7)
    dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool]
    dtypes += [] if legacy else [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16]
    with_attributes = torch.ones(2)
    with_attributes.note = "x"  # type: ignore[attr-defined]
    content = {
        "state_dict": model.state_dict(),
        "parameters": [nn.Parameter(torch.randn(2)), with_attributes],
        "optimizer": optimizer.state_dict(),
        "dtypes": [torch.arange(5).to(dtype) for dtype in dtypes],
        "views": (block, block[2:4, 1:], block.t(), block[:0], torch.tensor(2.5), torch.empty(0, 3)),
        "values": {"a": None, "b": [True, False], "c": 1.5, "d": -(2**40), "e": "ü", "f": b"\x00\xff", 7: (1, ("x",))},
        "kinds": [OrderedDict(x=1), Counter("aab"), torch.Size([2, 3])],
    }
    saved(tmp_path / "x.pt", content, legacy)
    mine, _ = files.read(tmp_path / "x.pt")
    assert same(mine, torch.load(tmp_path / "x.pt", weights_only=True))
    assert mine["views"][1].data_ptr() - mine["views"][0].data_ptr() == 15 * 4


def test_arguments_and_sets_are_read(tmp_path: Path) -> None:
    """A Namespace is its values; a set, a device and a dtype are no reason to refuse the weights beside them."""
    args = argparse.Namespace(model_ema_decay=0.5, lr=1e-3)
    saved(tmp_path / "x.pt", {"args": args, "set": {1, 2}, "on": torch.device("cpu"), "of": torch.half, "ema": STATE})
    found = checkpoints.read(tmp_path / "x.pt")
    assert (found.going_on.decay, set(found.tensors)) == (0.5, set(STATE))


def test_negative_views_keep_their_signs(tmp_path: Path) -> None:
    """The imaginary part of a conjugate holds its sign in a flag."""
    tensor = torch.tensor([1 + 2j]).conj().imag
    assert tensor.is_neg()
    saved(tmp_path / "x.pt", {"w": tensor})
    assert checkpoints.read(tmp_path / "x.pt").tensors["w"].tolist() == [-2.0]


@LEGACY
def test_a_change_of_a_tensor_leaves_the_file_as_it_was(tmp_path: Path, legacy: bool) -> None:
    """Tensors are mapped copy-on-write."""
    raw = saved(tmp_path / "x.pt", STATE, legacy)
    checkpoints.read(tmp_path / "x.pt").tensors["a.weight"].zero_()
    assert (tmp_path / "x.pt").read_bytes() == raw


# --- damaged --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["zip", "before 1.6", "safetensors"])
def test_a_file_that_is_cut_off_anywhere_is_refused(tmp_path: Path, kind: str) -> None:
    """Cut at two hundred places, the last bytes among them: none is imported, and none ends in another error."""
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pt")
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        saved(path, STATE, legacy=kind != "zip")
    raw = path.read_bytes()
    for length in {*range(0, len(raw), max(len(raw) // 170, 1)), *range(len(raw) - 30, len(raw))}:
        path.write_bytes(raw[:length])
        refused(path)


@LEGACY
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, legacy: bool) -> None:
    """Six hundred files with one to four bytes changed: weights of their shapes, or an error that says why."""
    content = {"state_dict": STATE, "global_step": 3, "args": argparse.Namespace(a=1), "ema_info": {"ema_run": "x"}}
    raw = saved(tmp_path / "x.pt", content, legacy)
    # The pickle is what a change hits, not the padding and the weights.
    begin = raw.index(b"\x80\x02", 40 if legacy else 0)
    places = [*range(begin, min(begin + 700, len(raw)))] + ([] if legacy else [*range(len(raw) - 400, len(raw))])
    draw, read = random.Random(4), 0
    for _ in range(600):
        changed = bytearray(raw)
        for place in draw.sample(places, draw.randint(1, 4)):
            changed[place] = draw.randrange(256)
        (tmp_path / "x.pt").write_bytes(changed)
        try:
            found = checkpoints.read(tmp_path / "x.pt")
        except EmaError:
            continue
        read += 1
        assert sum(tensor.nbytes for tensor in found.tensors.values()) <= len(raw)
    assert 0 < read < 600


def test_a_record_of_another_size_is_refused(tmp_path: Path) -> None:
    """A shorter record gave a tensor the bytes of the record behind."""
    saved(tmp_path / "x.pt", STATE)
    rezipped(tmp_path / "x.pt", lambda name, raw: raw[:-4] if name.endswith("data/0") else raw)
    assert "storage '0' has 156 bytes, its tensors expect 160" in refused(tmp_path / "x.pt")


def test_records_that_overlap_are_refused(tmp_path: Path) -> None:
    """Two entries of the directory for one record: a few bytes would be many storages."""
    raw = saved(tmp_path / "x.pt", {"a": torch.ones(4), "b": torch.ones(4)})
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        first, second = (archive.getinfo(f"x/data/{key}").header_offset for key in "01")
    directory = raw.rindex(struct.pack("<I", second))
    (tmp_path / "x.pt").write_bytes(raw[:directory] + struct.pack("<I", first) + raw[directory + 4 :])
    assert "beyond its place" in refused(tmp_path / "x.pt")


@pytest.mark.parametrize("place", [2**40, 2**63 + 5])
def test_records_beyond_the_file_are_refused(tmp_path: Path, place: int) -> None:
    """The directory of an archive gives places of 64 bits."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}, 2))
        archive.writestr("x/data/0", bytes(16))
        archive.filelist[1].header_offset = place
    assert "begins beyond the file" in refused(tmp_path / "x.pt")


# --- compressed, and bombs ------------------------------------------------------------------------------------------


def test_a_compressed_file_is_refused_with_what_helps(
    ema: Ema, client: EmaClient, run_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compressed bytes were imported as weights; the line that the refusal gives makes a file that is imported."""
    saved(tmp_path / "x.pt", STATE)
    rezipped(tmp_path / "x.pt", method=zipfile.ZIP_DEFLATED)
    code, out, err = ema("import", tmp_path / "x.pt", run_name)
    assert (code, out, err.count("\n")) == (1, "", 2)
    assert "compressed records" in err
    assert "Traceback" not in err
    monkeypatch.chdir(tmp_path)
    exec(err.split("trusted: ")[1], {"torch": torch, "path": "x.pt"})
    assert ema("import", tmp_path / "again.pt", run_name)[0] == 0
    assert torch.equal(client.pull(run_name)["a.bias"], STATE["a.bias"])


def deflated(path: Path) -> None:
    saved(path, {"w": torch.zeros(64, dtype=torch.float32)})
    rezipped(path, lambda name, raw: bytes(2**28) if "/data/" in name else raw, zipfile.ZIP_DEFLATED)


def calls(module: str, name: str, *arguments: Any) -> Callable[[Path], None]:
    """A file whose pickle calls a function with plain values."""
    inner = pickle.dumps(arguments, 2)[2:-1]
    return lambda path: pickled_as(path, b"\x80\x02c" + f"{module}\n{name}\n".encode() + inner + b"R.")


def storage(kind: str, count: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Callable[[Path], None]:
    """A file with a tensor of ``shape`` in a storage that declares ``count`` elements and has four."""

    def write(path: Path) -> None:
        identity = b"(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
        sizes = b"".join(pickle.dumps(value, 2)[2:-1] for value in (0, shape, strides))
        tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + identity + pickle.dumps(count, 2)[2:-1] + b"tQ" + sizes
        pickled_as(path, b"\x80\x02}X\x01\x00\x00\x00w" + tensor + b"\x89NtRs.")

    return write


def holding(content: Any) -> Callable[[Path], object]:
    return lambda path: saved(path, content)


def before_16(path: Path, count: int, keys: list[str]) -> None:
    raw = saved(path, {"w": torch.ones(4)}, legacy=True)
    raw = raw.replace(b"K\x04Nt", b"\x8a\x05" + count.to_bytes(5, "little") + b"Nt", 1)
    key = raw[raw.rindex(b"\x80\x02]") :]
    path.write_bytes(raw.replace(key, pickle.dumps(keys, 2)) if not keys else raw)


BOMBS: dict[str, Callable[[Path], object]] = {
    "deflated zeros": deflated,
    "a bytearray": calls("__builtin__", "bytearray", 2**36),
    "a codec": calls("_codecs", "encode", "ff" * 99, "hex"),
    "a tensor by its class": calls("torch", "FloatTensor", 2**36),
    "a storage by its class": calls("torch", "FloatStorage", 2**36),
    "a sparse tensor": calls("torch._utils", "_rebuild_sparse_tensor", 0, ()),
    "an index of the memo": lambda path: pickled_as(path, b"\x80\x02]r\xff\xff\xff\xff."),
    "a text's length": lambda path: pickled_as(path, b"\x80\x02X\xff\xff\xff\x7fa."),
    "bytes of protocol 5": lambda path: pickled_as(path, b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b"."),
    "a declared storage": storage("FloatStorage", 2**36, (2**36,), (1,)),
    "a shape beyond the storage": storage("FloatStorage", 4, (2**36,), (1,)),
    "strides of zero": storage("FloatStorage", 4, (2**20, 2**20), (0, 0)),
    "overlapping strides": storage("FloatStorage", 4, (2, 2, 2, 2), (1, 1, 1, 0)),
    "an empty shape": storage("FloatStorage", 4, (0, 2**62, 2**62), (1, 1, 1)),
    "elements that overflow": storage("FloatStorage", 4, (2**62, 4), (2**62, 2**62)),
    "torch's own expanded tensor": holding({"w": torch.ones(1).expand(2**40)}),
    "a storage before 1.6": lambda path: before_16(path, 2**36, ["0"]),
    "memory never written": lambda path: before_16(path, 4, []),
    "one tensor under a thousand names": holding(dict.fromkeys(map(str, range(1000)), torch.ones(9))),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused(tmp_path: Path, bomb: str) -> None:
    """A file says more of itself than it has: refused by name, before memory is taken."""
    BOMBS[bomb](tmp_path / "x.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path / "x.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16, "KiB"


def test_the_peak_memory_of_a_bomb_in_a_process_of_its_own(tmp_path: Path) -> None:
    """256 KiB that expand to 256 MiB: the process takes less than 32 MiB beyond those it had with torch imported."""
    deflated(tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 2**19
    code = (
        "import resource, sys; from pathlib import Path; from ema_client import checkpoints, errors\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\n"
        "try: checkpoints.read(Path(sys.argv[1]))\n"
        "except errors.UsageError: print(peak() - before)\n"
    )
    path = os.pathsep.join(path for path in sys.path if path)
    words = [sys.executable, "-c", code, str(tmp_path / "x.pt")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": path})
    assert int(done.stdout) < 2**15, (done.stdout, done.stderr)


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [2**62, 2**62 + 16]}},
        {name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} for name in ("a", "b")},
        {"w": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}},
    ],
    ids=["beyond the file", "far offsets", "overlapping", "an empty shape"],
)
def test_headers_of_safetensors_that_do_not_fit(tmp_path: Path, header: dict[str, Any]) -> None:
    """Offsets and shapes are compared with the file."""
    raw = json.dumps(header).encode()
    body = b"" if header.get("w", {}).get("shape", [1])[0] == 0 else bytes(16)
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + body)
    refused(tmp_path / "x.safetensors")


# --- nothing is executed --------------------------------------------------------------------------------------------


class Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@LEGACY
def test_code_in_a_file_is_not_run(tmp_path: Path, legacy: bool) -> None:
    """A pickle that calls a function is refused, and the function was not called."""
    saved(tmp_path / "x.pt", {"state_dict": STATE, "more": Runs(tmp_path / "ran")}, legacy)
    assert "run code" in refused(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


def test_a_tar_archive_is_not_unpacked(tmp_path: Path) -> None:
    """Files from before torch 0.1.10 are tar archives, which torch before 2.6 reads without regard to weights_only."""
    with tarfile.open(tmp_path / "x.pt", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            raw = pickle.dumps(Runs(tmp_path / "ran"), 2)
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
    refused(tmp_path / "x.pt")
    assert not (tmp_path / "ran").exists()


# --- folders --------------------------------------------------------------------------------------------------------


def indexed(folder: Path, table: Any) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))


@pytest.mark.parametrize("name", ["../secret.safetensors", "{}/secret.safetensors", "link.safetensors", "x\0", "."])
def test_an_index_leads_nowhere_else(ema: Ema, run_name: str, tmp_path: Path, name: str) -> None:
    """Another folder's weights, by a path or a link, are not read."""
    save_file(STATE, tmp_path / "secret.safetensors")
    indexed(tmp_path / "model", dict.fromkeys(STATE, name.format(tmp_path)))
    (tmp_path / "model" / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    code, out, err = ema("import", tmp_path / "model", run_name)
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    assert str(tmp_path / "model") in err


def test_the_only_file_of_a_folder_is_no_link_out_of_it(tmp_path: Path) -> None:
    """Nor is the file of weights that no index names."""
    save_file(STATE, tmp_path / "secret.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(UsageError, match="leads out of the folder"):
        checkpoints.read(tmp_path / "model")


def test_the_cache_of_the_hub_is_read(tmp_path: Path) -> None:
    """Its snapshots are links to the blobs of the same model."""
    (tmp_path / "blobs").mkdir()
    save_file(STATE, tmp_path / "blobs" / "0123")
    folder = tmp_path / "snapshots" / "main"
    folder.mkdir(parents=True)
    (folder / "part.safetensors").symlink_to("../../blobs/0123")
    indexed(folder, dict.fromkeys(STATE, "part.safetensors"))
    assert set(checkpoints.read(folder).tensors) == set(STATE)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "[1]"),
        ("config.json", "{"),
        ("config.json", "[" * 10**5),
        ("config.json", "\xff"),
        ("model.safetensors.index.json", "[]"),
        ("model.safetensors.index.json", "{}"),
        ("model.safetensors.index.json", '{"weight_map": {"w": 3}}'),
        ("model.safetensors.index.json", '{"weight_map": {"w": "none.safetensors", "a.bias": "part.safetensors"}}'),
        ("model.safetensors.index.json", '{"weight_map": {"a.bias": "part.safetensors"}}'),
        ("model.safetensors.index.json", '{"weight_map": {"more": "part.safetensors"}}'),
    ],
)
def test_damaged_folders(ema: Ema, run_name: str, tmp_path: Path, name: str, text: str) -> None:
    """What is no JSON, or does not fit the files beside it, is said by name."""
    save_file(STATE, tmp_path / "part.safetensors")
    indexed(tmp_path, dict.fromkeys(STATE, "part.safetensors"))
    (tmp_path / name).write_bytes(text.encode("latin1"))
    code, _, err = ema("import", tmp_path, run_name)
    assert code == 1
    assert str(tmp_path) in err
    assert "Traceback" not in err


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    """A pipe in a folder, or in a file's place, would hold the command up."""
    os.mkfifo(tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(UsageError, match="no regular file"):
            checkpoints.read(path)


# --- entries of a wrong type ----------------------------------------------------------------------------------------

ONE = torch.ones(2)
WRONG: list[Any] = [
    {"shadow_params": 3, "optimization_step": 2, "decay": 0.5},
    {"shadow_params": [3], "optimization_step": 2, "decay": 0.5},
    {"shadow_params": [ONE], "num_updates": "many", "decay": 0.5},
    {"shadow_params": [ONE], "num_updates": 2, "decay": [0.5]},
    {"shadow_params": [ONE], "num_updates": 2, "decay": float("nan")},
    {"shadow_params": [ONE], "optimization_step": 2, "use_ema_warmup": True, "inv_gamma": 0.0},
    {"shadow_params": [ONE], "optimization_step": 2**200},
    {"model.w": ONE, "model_ema.w": ONE, "model_ema.decay": ONE, "model_ema.num_updates": torch.tensor(3)},
    {"model.w": ONE, "model_ema.w": ONE, "model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": "3"},
    {"model.w": ONE, "model_ema.w": "w", "model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": 3},
    {"module.w": ONE, "n_averaged": ONE},
    {"module.w": ONE, "n_averaged": -4},
    {"initted": True, "ema_model.w": ONE, "step": None},
    {"ema": {"w": ONE}, "args": argparse.Namespace(model_ema_decay="high")},
    {"ema": {"w": ONE}, "ema_names": {"w": ONE}},
    {"ema": {1: ONE}},
    {2: ONE},
    {"averaging_state": {"n_averaged": "x"}, "state_dict": {"w": ONE, 3: ONE}},
]


@pytest.mark.parametrize("content", WRONG, ids=range(len(WRONG)))
def test_entries_of_a_wrong_type_are_told(ema: Ema, run_name: str, tmp_path: Path, content: Any) -> None:
    """A counter that is a text, weights that are numbers: one line, no traceback."""
    saved(tmp_path / "x.pt", content)
    saved(tmp_path / "like.pt", {"w": ONE})
    code, _, err = ema("import", tmp_path / "x.pt", run_name, "--like", tmp_path / "like.pt")
    assert code == 1
    assert "Traceback" not in err


def test_entries_that_do_not_matter_may_be_of_any_type(tmp_path: Path) -> None:
    """Keys that are no names, and a step that is none, do not keep the weights from being read."""
    content = {1: 2, "global_step": "²", "args": 3, "ema_info": {1: 2, "ema_run": 3}, "state_dict": {"w": ONE, 5: ONE}}
    saved(tmp_path / "x.pt", content)
    found = checkpoints.read(tmp_path / "x.pt")
    assert (set(found.tensors), found.step) == ({"w"}, None)
