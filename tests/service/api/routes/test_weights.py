"""Reading weights over a real server: selections, casts, conditional and range requests, waiting for a step.

Knows HTTP's rules and the safetensors library. Does not know the server's code; readers beside writers are in
tests/e2e/test_consistency.py.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from ema_client.protocol import WeightsInfo
from ema_client.wire import parse_header
from ema_service.api.reading import LINGER_SECONDS

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle, PlainRun, ServerProcess

MakeRun = Callable[..., "PlainRun"]
Model = Callable[[int], dict[str, Tensor]]

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@pytest.fixture
def run(server: ServerProcess, plain_run: MakeRun, model: Model) -> PlainRun:
    """A run with two averages at step 7."""
    run = plain_run(server, model(0), averages=[{"name": "slow"}, {"name": "fast", "decay": 0.5}])
    run.push(7, model(7)).raise_for_status()
    return run


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


# --- what comes -----------------------------------------------------------------------------------------------------


def test_weights_of_a_run_of_another_time(run: PlainRun) -> None:
    """Are not those that were asked for, though the name is the same."""
    created_at = run.info()["created_at"]
    assert run.pull(created_at=created_at).status_code == 200
    answer = run.pull(created_at=created_at - 1)
    assert (answer.status_code, answer.json()["code"]) == (404, "run_not_found")


def test_weights_say_what_they_are(run: PlainRun) -> None:
    """Headers and the file's metadata say run, average, version, step, counter and decay, and agree."""
    for average, decay in (("slow", "0.9999"), ("fast", "0.5")):
        answer = run.pull(average=average)
        expected = {
            "Ema-Run": run.name, "Ema-Average": average, "Ema-Version": "1.1", "Ema-Step": "7", "Ema-Num-Updates": "1",
            "Ema-Decay": decay, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream",
            "Content-Length": str(len(answer.content)),
        }  # fmt: skip
        assert {name: answer.headers[name] for name in expected} == expected
        length = struct.unpack("<Q", answer.content[:8])[0]
        metadata = dict(parse_header(answer.content[8 : 8 + length]).metadata)
        assert WeightsInfo.from_metadata(metadata) == WeightsInfo(run.name, average, "1.1", 7, 1, float(decay))


def test_weights_before_an_update_have_no_step(server: ServerProcess, plain_run: MakeRun, model: Model) -> None:
    """Before the first update there is no Ema-Step, neither as header nor in the metadata."""
    answer = plain_run(server, model(0)).pull()

    assert "Ema-Step" not in answer.headers
    assert b"ema_step" not in answer.content[:1000]


def test_first_average_is_the_default(run: PlainRun) -> None:
    """Without ?average= comes the first average of the configuration."""
    assert run.pull().content == run.pull(average="slow").content != run.pull(average="fast").content


def test_shadows_are_float32(run: PlainRun, litema: type[LitEmaOracle], model: Model) -> None:
    """By default weights come as the shadows are kept: float32 for bf16 and fp16 parameters, float64 for float64."""
    oracle = litema(model(0))
    oracle.update(model(7))

    assert_equal(run.weights(), oracle.shadow)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cast(dtype: str, run: PlainRun) -> None:
    """?dtype= casts every tensor as torch does."""
    expected = {name: value.to(DTYPES[dtype]) for name, value in run.weights().items()}

    assert_equal(run.weights(dtype=dtype), expected)


@pytest.mark.parametrize(("prefix", "names"), [("conv", ["conv.weight"]), ("s", ["scalar"]), ("none", ["none"])])
def test_prefix(prefix: str, names: list[str], run: PlainRun) -> None:
    """?prefix= gives only the tensors whose name begins so; alone or with a cast."""
    weights = run.weights()

    assert_equal(run.weights(prefix=prefix), {name: weights[name] for name in names})
    assert_equal(run.weights(prefix=prefix, dtype="F16"), {name: weights[name].half() for name in names})


@pytest.mark.parametrize(
    ("query", "status", "code", "word"),
    [
        ({"average": "none"}, 404, "average_not_found", "slow, fast"),
        ({"average": "../slow"}, 422, "invalid_request", "average"),
        ({"dtype": "I8"}, 422, "invalid_request", "F64, F32, BF16, F16"),
        ({"dtype": "float16"}, 422, "invalid_request", "dtype"),
        ({"prefix": "x"}, 422, "invalid_request", "'x'"),
        ({"min_step": -1}, 422, "invalid_request", "min_step"),
        ({"min_step": 2**63}, 422, "invalid_request", "min_step"),
        ({"min_step": 1, "wait": -1}, 422, "invalid_request", "wait"),
        ({"min_step": 1, "wait": 61}, 422, "invalid_request", "wait"),
        ({"min_step": 1, "wait": "nan"}, 422, "invalid_request", "wait"),
    ],
)
def test_impossible_query(query: dict[str, str | int], status: int, code: str, word: str, run: PlainRun) -> None:
    """A query that cannot be answered is refused, naming the parameter."""
    answer = run.pull(**query)

    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert word in answer.json()["detail"]


# --- conditional requests -------------------------------------------------------------------------------------------


def test_unchanged_weights_are_304(run: PlainRun, model: Model) -> None:
    """If-None-Match with the ETag one has is 304 without a body, until the run moves."""
    path, etag = f"{run.path}/weights", run.pull().headers["etag"]
    for tag in (etag, f'"other", {etag}', f"W/{etag}", "*"):
        answer = run.http.get(path, headers={"If-None-Match": tag})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert run.http.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
    run.push(8, model(8))
    moved = run.http.get(path, headers={"If-None-Match": etag})

    assert (moved.status_code, moved.headers["ema-step"]) == (200, "8")


def test_etag_names_the_bytes(run: PlainRun) -> None:
    """Other selections, casts and averages have other ETags; the same request has the same."""
    queries: list[dict[str, str]] = [{}, {"dtype": "F16"}, {"dtype": "F32"}, {"prefix": "conv"}, {"average": "fast"}]
    tags = [run.pull(**query).headers["etag"] for query in queries]

    assert len(set(tags)) == len(queries)
    assert tags == [run.pull(**query).headers["etag"] for query in queries]


def test_etag_moves_with_what_the_body_says(run: PlainRun) -> None:
    """A changed decay or a reset changes the metadata in the body, so the ETag too; the tensors stay."""
    first, weights = run.pull().headers["etag"], run.weights()
    run.http.patch(run.path, json={"decay": 0.5})
    second = run.pull().headers["etag"]
    run.http.post(f"{run.path}/reset-num-updates")

    assert len({first, second, run.pull().headers["etag"]}) == 3
    assert_equal(run.weights(), weights)


@pytest.mark.parametrize("dtype", [None, "F16"])
def test_head_is_get_without_a_body(dtype: str | None, run: PlainRun) -> None:
    """HEAD has GET's headers and no body, also for 304."""
    query = {"dtype": dtype} if dtype else {}
    got, head = run.pull(**query), run.http.head(f"{run.path}/weights", params=query)
    drop = {"date", "x-request-id"}

    assert (head.status_code, head.content) == (200, b"")
    assert {k: v for k, v in head.headers.items() if k not in drop} == {
        k: v for k, v in got.headers.items() if k not in drop
    }
    tagged = run.http.head(f"{run.path}/weights", params=query, headers={"If-None-Match": got.headers["etag"]})
    assert tagged.status_code == 304


def test_head_knows_no_range(run: PlainRun) -> None:
    """HEAD ignores Range, which RFC 9110 defines for GET alone: it tells the whole length."""
    head = run.http.head(f"{run.path}/weights", headers={"Range": "bytes=0-3"})

    assert (head.status_code, head.headers["content-length"]) == (200, str(len(run.pull().content)))
    assert "content-range" not in head.headers


# --- ranges ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=5-104", slice(5, 105)),
        ("bytes=100-", slice(100, None)),
        ("bytes=-7", slice(-7, None)),
        ("bytes=-9999999", slice(0, None)),
        ("bytes=3-9999999", slice(3, None)),
        ("bytes=601-602", slice(601, 603)),
    ],
)
def test_range(asked: str, part: slice, dtype: str, run: PlainRun) -> None:
    """A range is 206 with exactly those bytes of the whole, and says which; it may begin inside an element."""
    whole = run.pull(dtype=dtype).content
    answer = run.http.get(f"{run.path}/weights", params={"dtype": dtype}, headers={"Range": asked})
    start, stop, _ = part.indices(len(whole))

    assert (answer.status_code, answer.content) == (206, whole[part])
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(whole)}"


@pytest.mark.parametrize("asked", ["bytes=999999-", "bytes=999999-1000000", "bytes=-0"])
def test_range_beyond_the_end(asked: str, run: PlainRun) -> None:
    """A range that lies beyond the end is 416, and says how long the body is."""
    answer = run.http.get(f"{run.path}/weights", headers={"Range": asked})

    assert (answer.status_code, answer.json()["code"]) == (416, "range_not_satisfiable")
    assert str(len(run.pull().content)) in answer.json()["detail"]


def test_range_beyond_the_end_tells_the_length(run: PlainRun) -> None:
    """416 carries Content-Range with the length, as RFC 9110 asks, so that a program can go on."""
    answer = run.http.get(f"{run.path}/weights", headers={"Range": "bytes=999999-"})

    assert answer.headers["content-range"] == f"bytes */{len(run.pull().content)}"


@pytest.mark.parametrize(
    "asked", ["bytes=0-1,5-6", "bytes=5-2", "bytes=-", "bytes=x-", "items=0-1", "bytes=0x1-2", "0-1"]
)
def test_other_ranges_give_the_whole(asked: str, run: PlainRun) -> None:
    """Several ranges, other units and what is no range are answered with the whole body."""
    answer = run.http.get(f"{run.path}/weights", headers={"Range": asked})

    assert (answer.status_code, answer.content) == (200, run.pull().content)


def test_if_range_pins_the_version(run: PlainRun, model: Model) -> None:
    """If-Range with the present ETag continues; with that of an older version, a weak tag or a date comes the whole."""
    path, etag = f"{run.path}/weights", run.pull().headers["etag"]
    for pin in (f"W/{etag}", '"other"', "Mon, 23 Nov 2026 00:00:00 GMT"):
        assert run.http.get(path, headers={"Range": "bytes=9-", "If-Range": pin}).status_code == 200
    run.push(8, model(8))
    moved = run.http.get(path, headers={"Range": "bytes=9-", "If-Range": etag})

    assert (moved.status_code, moved.content) == (200, run.pull().content)
    assert run.http.get(path, headers={"Range": "bytes=9-", "If-Range": moved.headers["etag"]}).status_code == 206


def test_stretches_of_a_version_that_is_read(run: PlainRun, model: Model) -> None:
    """Are there for a moment after one of them was sent, though the run has moved on; then comes the whole."""
    path = f"{run.path}/weights"
    for step in range(8, 28):
        before = run.pull()
        pinned = {"Range": "bytes=9-", "If-Range": before.headers["etag"]}
        run.http.get(path, headers=pinned)
        run.push(step, model(step))
        kept = run.http.get(path, headers=pinned)
        # On a machine that is busy enough the moment passes meanwhile.
        if kept.status_code == 206:
            break
    assert (kept.status_code, kept.headers["etag"]) == (206, before.headers["etag"])
    assert kept.content == before.content[9:]

    for _ in range(10):
        time.sleep(1.2 * LINGER_SECONDS)
        if (moved := run.http.get(path, headers=pinned)).status_code == 200:
            break
    assert moved.content == run.pull().content


# --- waiting for a step ---------------------------------------------------------------------------------------------


def test_step_that_was_reached(run: PlainRun) -> None:
    """min_step at or below the run's step is answered at once, with or without wait."""
    for query in ({"min_step": 7}, {"min_step": 0}, {"min_step": 7, "wait": 60}):
        assert run.pull(**query).headers["ema-step"] == "7"


def test_step_that_is_not_reached(run: PlainRun) -> None:
    """A step that does not come within wait is 409 step_not_reached, not before that time and soon after."""
    assert run.pull(min_step=8).json()["code"] == "step_not_reached"
    began = time.monotonic()
    answer = run.pull(min_step=8, wait=0.3)

    assert 0.25 < time.monotonic() - began < 10
    assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (409, "step_not_reached", True)
    assert "step 8" in answer.json()["detail"]


def test_step_that_comes_while_waiting(server: ServerProcess, run: PlainRun, model: Model) -> None:
    """Readers that wait for a step are answered as soon as it, or a later one, is applied."""
    waiting = threading.Barrier(5)

    def wait_for(step: int) -> tuple[int, int]:
        with server.http() as http:
            http.get("/healthz")
            waiting.wait(30)
            answer = http.get(f"{run.path}/weights", params={"min_step": step, "wait": 20})
            return answer.status_code, int(answer.headers["ema-step"])

    with ThreadPoolExecutor(4) as threads:
        reads = [threads.submit(wait_for, step) for step in (8, 9, 10, 12)]
        waiting.wait(30)
        for step in (8, 9, 10, 20):
            run.push(step, model(step)).raise_for_status()
        answers = [read.result(30) for read in reads]

    assert [status for status, _ in answers] == [200] * 4
    assert all(got >= asked for (_, got), asked in zip(answers, (8, 9, 10, 12), strict=True))


def test_weights_of_a_run_that_awaits_them(server: ServerProcess, plain_run: MakeRun, model: Model) -> None:
    """Without initial weights there is nothing to read: 409; who waits for a step gets it once the run is there."""
    run = plain_run(server)
    run.create(model(0))
    assert run.pull().json()["code"] == "awaiting_weights"
    with server.http() as other, ThreadPoolExecutor(1) as threads:
        read = threads.submit(other.get, f"{run.path}/weights", params={"min_step": 1, "wait": 20})
        run.begin(model(0)).raise_for_status()
        run.push(1, model(1)).raise_for_status()

        assert load(read.result(30).content).keys() == model(0).keys()


# --- readers that go away -------------------------------------------------------------------------------------------


def test_reader_that_hangs_up_frees_its_version(server: ServerProcess, plain_run: MakeRun) -> None:
    """A reader that leaves in the middle of a body holds nothing once it is gone, and spoils no log."""
    run, log = plain_run(server, {"w": torch.zeros(8_000_000)}), len(server.log)
    address = urlsplit(server.url)
    ask = f"GET {run.path}/weights HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    connections = [socket.create_connection((address.hostname, address.port), timeout=30) for _ in range(3)]
    for connection in connections:
        connection.sendall(ask)
        connection.recv(1000)
    _wait_until(lambda: _frozen(run) > 0)
    for connection in connections:
        connection.close()

    _wait_until(lambda: _frozen(run) == 0)
    assert "Traceback" not in server.log[log:]


def _frozen(run: PlainRun) -> float:
    lines = run.http.get("/metrics").text.splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("ema_frozen_bytes ")))


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
