"""The words of the protocol: names, paths, and the JSON form of every body."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ema_client import protocol
from ema_client.protocol import (
    AverageConfig,
    AverageInfo,
    Distances,
    History,
    HistoryColumns,
    RunConfig,
    RunInfo,
    RunList,
    RunPatch,
    Segment,
    SnapshotInfo,
    SnapshotList,
    TensorSpec,
    Timeline,
    TimelineEntry,
    UpdateResult,
    UpdateStatus,
    WeightsInfo,
    from_json,
    is_name,
    to_json,
)

INFO = RunInfo(
    run="r",
    status="ready",
    decay=0.9998999834060669,
    num_updates=3,
    effective_decay=None,
    use_num_updates=True,
    decay_per="update",
    step=None,
    version="1.0",
    durable_step=None,
    durability="memory",
    non_finite="refuse",
    averages=(AverageInfo("ema", "litema", 0.5, 0.25),),
    tensors=2,
    parameters=10,
    bytes=40,
    device="cpu",
    shadow_dtype="F32",
    created_at=1.5,
    updated_at=2.5,
)
SNAPSHOT = SnapshotInfo("r", "s", "1.2", 7, 2, ("ema", "slow"), 1234, 1.25)
HISTORY = History("r", "ema", "1.2", 9, 1.5, HistoryColumns((1.5,), (7,), *[(None,)] * 2, *[(0.5,)] * 9), {"a": (0.5,)})
BODIES: list[Any] = [
    TensorSpec("a.b", (2, 0, 3), "BF16"),
    AverageConfig("slow", "constant", 0.5),
    RunConfig("r", (TensorSpec("w", (), "F32"),), averages=(AverageConfig(), AverageConfig("x", decay=0.1))),
    INFO,
    RunList((INFO, INFO)),
    RunList(()),
    RunPatch(0.5, "slow"),
    UpdateResult(True, 1, 1, 0.18, "1.1", None),
    UpdateStatus(3, "staged", (0, 2)),
    SNAPSHOT,
    SnapshotList((SNAPSHOT,)),
    HISTORY,
    Distances("r", "ema", "1.2", 7, {"a.b": 0.5, "c": None}),
    Timeline("r", (TimelineEntry(1.5, "created", None, None, "created with 2 tensors"),)),
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: type(body).__name__)
def test_body_survives_json(body: Any) -> None:
    """Every body comes back from its JSON text as it was, tuples included."""
    assert from_json(type(body), json.loads(json.dumps(to_json(body)))) == body


def test_unknown_members_are_ignored() -> None:
    """An older client reads a newer server's answer."""
    assert from_json(RunPatch, {"decay": 0.5, "from_the_future": 1}) == RunPatch(0.5)


def test_missing_member_is_named() -> None:
    """What an answer lacks is named, with the body it belongs to."""
    with pytest.raises(ValueError, match=r"UpdateResult.*'version'"):
        from_json(UpdateResult, {"applied": True, "step": 1, "num_updates": 1, "effective_decay": 1, "durable_step": 1})


@pytest.mark.parametrize("data", [None, [], "x", 3])
def test_anything_but_an_object_is_refused(data: Any) -> None:
    """A body is a JSON object."""
    with pytest.raises(ValueError, match="expected a JSON object"):
        from_json(RunPatch, data)


#: What a hostile service, or whoever stands before a service, may write into an answer.
HOSTILE: list[tuple[Any, str, Any]] = [
    (INFO, "run", "../run"),
    (INFO, "run", "run\x1b[31m"),
    (INFO, "run", 7),
    (INFO, "version", "../../outside/$(touch pwned)"),
    (INFO, "version", "1.0\n"),
    (INFO, "version", "1"),
    (INFO, "version", "\u0661.\u0662"),
    (INFO, "status", "\x1b]0;title\x07"),
    (INFO, "decay", float("nan")),
    (INFO, "decay", "0.5"),
    (INFO, "decay", True),
    (INFO, "decay", 10**400),
    (INFO, "effective_decay", -0.1),
    (INFO, "num_updates", -2),
    (INFO, "num_updates", 1.5),
    (INFO, "num_updates", None),
    (INFO, "step", -1),
    (INFO, "step", True),
    (INFO, "step", 2**63),
    (INFO, "durable_step", "7"),
    (INFO, "checkpoint_step", []),
    (INFO, "use_num_updates", 1),
    (INFO, "averages", {}),
    (INFO, "averages", [{"name": "e/ma", "schedule": "litema", "decay": 0.5, "effective_decay": None}]),
    (INFO, "bytes", -1),
    (INFO, "created_at", 1e300),
    (INFO, "updated_at", -1),
    (INFO, "reason", {"a": 1}),
    (INFO, "writer", None),
    (SNAPSHOT, "name", "/etc/passwd"),
    (SNAPSHOT, "averages", ["ema", ".."]),
    (SNAPSHOT, "version", None),
    (UpdateResult(True, 1, 1, 0.18, "1.1", None), "applied", "yes"),
    (UpdateStatus(3, "staged", (0, 2)), "parts", [0, -1]),
    (HISTORY, "groups", {"a": [float("nan")]}),
    (HISTORY, "groups", [0.5]),
    (HISTORY, "begin", 1e300),
    (HISTORY.columns, "step", [-1]),
]


@pytest.mark.parametrize(("body", "field", "value"), HOSTILE, ids=lambda each: repr(each)[:40])
def test_what_the_other_side_sends_is_checked(body: Any, field: str, value: Any) -> None:
    """No field of a parsed body holds a path, an escape sequence, NaN, or a number that no calendar or sum takes."""
    with pytest.raises(ValueError, match=f"^{type(body).__name__}.{field}: ") as raised:
        from_json(type(body), {**json.loads(json.dumps(to_json(body))), field: value})
    assert str(raised.value).isprintable()


def test_texts_for_people_are_spelt_out() -> None:
    """A text without a rule of its own cannot steer a terminal, nor forge a line of a log."""
    data = {**to_json(INFO), "averages": [], "reason": "\x1b[2Jdisk full\nERROR all is well \u202e"}
    info = from_json(type(INFO), data)

    assert info.reason == r"\x1b[2Jdisk full\nERROR all is well \u202e"


def test_words_of_a_newer_service_pass() -> None:
    """A status or a kind that this client does not know is no fault."""
    assert from_json(type(INFO), {**json.loads(json.dumps(to_json(INFO))), "status": "paused"}).status == "paused"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ema_version", "../../outside/planted"),
        ("ema_run", "run\x1b[31m"),
        ("ema_average", ""),
        ("ema_snapshot", "a b"),
        ("ema_step", "\u0663"),
        ("ema_step", "1_0"),
        ("ema_num_updates", "9" * 5000),
        ("ema_decay", "nan"),
        ("ema_decay", "2"),
    ],
)
def test_metadata_is_checked(key: str, value: str) -> None:
    """What stands in a weights stream is a stranger's too."""
    metadata = WeightsInfo("r", "ema", "1.0", 1, 1, 0.5, "s").to_metadata()

    with pytest.raises(ValueError, match="not possible here"):
        WeightsInfo.from_metadata({**metadata, key: value})


@pytest.mark.parametrize("name", ["a", "0", "run-1", "A.b_c-d", "x" * 128])
def test_names_that_are_names(name: str) -> None:
    """Letters, digits, dot, underscore, dash; 128 at most; a letter or digit first."""
    assert is_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", "-a", "_a", "a/b", "a b", "a\n", "ä", "x" * 129, "a\x00", "%2e"])
def test_names_that_are_none(name: str) -> None:
    """Nothing that could leave a folder, end a line or need quoting is a name."""
    assert not is_name(name)


def test_paths_are_those_of_the_protocol() -> None:
    """The routes, literally."""
    assert protocol.runs_path() == "/v1/runs"
    assert protocol.run_path("r") == "/v1/runs/r"
    assert protocol.layout_path("r") == "/v1/runs/r/layout"
    assert protocol.reset_path("r") == "/v1/runs/r/reset-num-updates"
    assert protocol.weights_path("r") == "/v1/runs/r/weights"
    assert protocol.update_path("r", 12) == "/v1/runs/r/updates/12"
    assert protocol.snapshots_path("r") == "/v1/runs/r/snapshots"
    assert protocol.snapshot_path("r", "s") == "/v1/runs/r/snapshots/s"
    assert protocol.snapshot_weights_path("r", "s") == "/v1/runs/r/snapshots/s/weights"


@given(st.text(min_size=1))
def test_no_name_adds_a_segment_to_a_path(name: str) -> None:
    """Whatever is put in place of a name stays one segment of the path."""
    try:
        path = protocol.run_path(name)
    except UnicodeEncodeError:
        return
    assert path.count("/") == 3
    assert not set(path) & set("?# \n")


@given(
    st.builds(
        WeightsInfo,
        run=st.just("r"),
        average=st.just("ema"),
        version=st.just("2.7"),
        step=st.none() | st.integers(0, protocol.MAX_STEP),
        num_updates=st.integers(-1, 2**40),
        decay=st.floats(0, 1),
        snapshot=st.none() | st.just("s"),
    )
)
def test_weights_info_survives_metadata(info: WeightsInfo) -> None:
    """All that travels with weights comes back from strings exactly, the decay to its last bit."""
    metadata = info.to_metadata()

    assert all(isinstance(text, str) for text in metadata.values())
    assert WeightsInfo.from_metadata(metadata) == info


def test_weights_info_as_headers() -> None:
    """The headers of a weights answer; no Ema-Step before the first update."""
    info = WeightsInfo("r", "ema", "1.0", None, 0, 0.5)

    assert info.to_headers() == {
        "Ema-Run": "r",
        "Ema-Average": "ema",
        "Ema-Version": "1.0",
        "Ema-Num-Updates": "0",
        "Ema-Decay": "0.5",
    }


@pytest.mark.parametrize("missing", ["ema_run", "ema_average", "ema_version", "ema_num_updates", "ema_decay"])
def test_metadata_of_others_is_no_weights_info(missing: str) -> None:
    """A file that is not of this service is told apart."""
    metadata = WeightsInfo("r", "ema", "1.0", 1, 1, 0.5).to_metadata()
    del metadata[missing]

    with pytest.raises(KeyError):
        WeightsInfo.from_metadata(metadata)


def test_segment_is_read_back() -> None:
    """The words of Ema-Segment are read as they are written, and nothing else is."""
    one = Segment(4242, 7, 4000, 2**40, bytes(range(32)))
    value = one.to_header()

    assert Segment.from_header(value) == one
    assert value == f"pid=4242, fd=7, offset=4000, length={2**40}, secret={bytes(range(32)).hex()}"
    for wrong in ("", value + " ", value.replace("pid", "PID"), value[:-1], value.replace("4242", "٤"), "\n" + value):
        with pytest.raises(ValueError, match="Ema-Segment"):
            Segment.from_header(wrong)
    assert dataclasses.astuple(Segment.from_header(value))[:4] == (4242, 7, 4000, 2**40)
