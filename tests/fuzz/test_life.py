"""Whatever happens to runs, in whatever order, they are what LitEma in the trainer's own process would be.

Hypothesis plays trainers, evaluators, operators and accidents against one real server: pushes, repeats, conflicting and
broken-off bodies, snapshots, rewinds, changes, replaced trainers, clean stops and kill -9, also in the middle of a push
whose outcome nobody learns. After each restart every run is compared, bit for bit, with an oracle in this process.

A short round runs with the tests; ``make soak`` goes on for ten minutes and prints its seeds.

Knows plain HTTP, sockets, signals and LitEma's arithmetic. Does not know how a state is kept.
"""

from __future__ import annotations

import copy
import itertools
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import httpx
import pytest
import torch
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from safetensors.torch import load, save
from torch import Tensor

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle, ServerProcess

SHAPES = {"a.weight": (300, 7), "a.bias": (7,), "b": (), "c.half": (1000,)}
#: With this tensor an update has two stretches; without it, one.
LARGE = {"d": (2_200_000,)}
BLOCK = 8 << 20
#: By name of an average, its decay: LitEma's, with the run's ceiling or its own.
DECAYS = {"ema": None, "fast": 0.5, "late": 0.9}
#: What a run begins with; averages of all names are added and removed.
AVERAGES = ("ema", "fast")

SOME = settings(
    max_examples=8, stateful_step_count=20, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)

seeds = st.integers(0, 2**31)
names = st.sampled_from(["s", "t", "epoch-1"])


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: tensor.bfloat16() if "half" in name else tensor for name, tensor in made.items()}


@dataclass
class Moment:
    """What a run should be: its averages by LitEma's own arithmetic, by name and number, and what is counted."""

    averages: dict[tuple[str, int], LitEmaOracle]
    num_updates: int
    step: int = 0
    last: bytes = b""

    def push(self, step: int, seed: int) -> None:
        for average in self.averages.values():
            average.update(tensors(seed))
        self.num_updates += self.num_updates >= 0
        self.step, self.last = step, save(tensors(seed))


@dataclass
class Life:
    """One run as its trainer and the oracle know it.

    wanted: the averages that the run is to have, with weights or before: the number tells apart two of one name.
    """

    name: str
    now: Moment
    wanted: dict[str, int]
    snapshots: dict[str, Moment] = field(default_factory=dict)
    writers: int = 0

    @property
    def waiting(self) -> list[tuple[str, int]]:
        """The averages that begin with the next update."""
        return [key for key in self.wanted.items() if key not in self.now.averages]


class Lives(RuleBasedStateMachine):
    """One run of one server; ``server`` and ``litema`` are set by the test."""

    server: ClassVar[ServerProcess]
    litema: ClassVar[Callable[..., LitEmaOracle]]
    count: ClassVar[int] = 0
    numbers: ClassVar[Iterator[int]] = itertools.count()

    @initialize(durability=st.sampled_from(["process", "disk"]), counted=st.booleans(), seed=seeds)
    def create(self, durability: str, counted: bool, seed: int) -> None:
        Lives.count += 1
        dtypes = {torch.float32: "F32", torch.bfloat16: "BF16"}
        layout = [{"name": n, "shape": list(t.shape), "dtype": dtypes[t.dtype]} for n, t in tensors(seed).items()]
        averages = [{"name": name, "decay": DECAYS[name]} for name in AVERAGES]
        self.http = self.server.http()
        self.counted = counted
        wanted = {name: next(self.numbers) for name in AVERAGES}
        self.life = Life(f"life-{self.count}", Moment({}, 0 if counted else -1), wanted)
        self.begin(seed)
        config = {"run": self.life.name, "layout": layout, "averages": averages, "use_num_updates": counted}
        self.http.post("/v1/runs", json={**config, "durability": durability}).raise_for_status()
        self.http.put(f"{self.path}/weights", content=save(tensors(seed)), params={"step": 0}).raise_for_status()
        self.layout = self.http.get(f"{self.path}/layout").raise_for_status().json()["digest"]

    def teardown(self) -> None:
        if hasattr(self, "http"):
            self.compare()
            self.http.delete(self.path).raise_for_status()
            self.http.close()

    # --- trainers ---------------------------------------------------------------------------------------------------

    @rule(seed=seeds, gap=st.integers(1, 3))
    def push(self, seed: int, gap: int) -> None:
        step = self.life.now.step + gap
        answer = self.put(step, save(tensors(seed)))
        self.pushed(step, seed)
        assert answer.json() == {**answer.json(), "applied": True, "step": step, "durable_step": step}

    @rule(seed=seeds, gap=st.integers(1, 3), backwards=st.booleans(), part=st.floats(0, 0.999))
    def push_in_stretches(self, seed: int, gap: int, backwards: bool, part: float) -> None:
        """The first of them breaks off, and is sent again."""
        step, data = self.life.now.step + gap, _data(seed)
        bounds = sorted(_bounds(data), reverse=backwards)
        for _ in range(9):
            group, (start, stop) = f"try-{next(self.numbers)}", bounds[0]
            with socket.create_connection(self.address) as sock:
                sock.sendall(self.head(step, stop - start, bounds[0], group))
                sock.sendall(data[start : start + int((stop - start) * part)])
            answers = [self.put(step, data[slice(*each)], each, group) for each in bounds]
            # A late stretch of a sender that is gone may have taken the place of these.
            if all(answer.status_code != 503 for answer in answers):
                break
        self.pushed(step, seed)
        answer = answers[-1].json()
        assert answer == {**answer, "applied": True, "step": step, "durable_step": step}

    @rule(seed=seeds, part=st.floats(0, 0.999))
    def stretches_left_alone(self, seed: int, part: float) -> None:
        """A sender that dies leaves nothing behind."""
        step, data = self.life.now.step + 1, _data(seed)
        group, (*others, last) = f"try-{next(self.numbers)}", _bounds(data)
        for each in others:
            self.put(step, data[slice(*each)], each, group)
        with socket.create_connection(self.address) as sock:
            size = last[1] - last[0]
            sock.sendall(self.head(step, size, last, group) + data[last[0] :][: int(size * part)])

    @precondition(lambda self: self.life.now.last)
    @rule()
    def repeat(self) -> None:
        assert self.put(self.life.now.step, self.life.now.last).json()["applied"] is False

    @precondition(lambda self: self.life.now.last)
    @rule(seed=seeds)
    def conflict(self, seed: int) -> None:
        answer = self.put(self.life.now.step, save(tensors(seed)))
        assert answer.json().get("code") == "step_conflict" or save(tensors(seed)) == self.life.now.last

    @rule(seed=seeds)
    def stale(self, seed: int) -> None:
        if self.life.now.step:
            assert self.put(self.life.now.step - 1, save(tensors(seed))).json()["code"] == "stale_step"

    @rule(seed=seeds, where=st.sampled_from(list(SHAPES)))
    def not_finite(self, seed: int, where: str) -> None:
        bad = tensors(seed)
        bad[where].fill_(float("nan"))
        answer = self.put(self.life.now.step + 1, save(bad))
        assert (answer.json()["code"], where in answer.json()["detail"]) == ("non_finite", True)

    @rule(seed=seeds, part=st.floats(0, 0.999))
    def broken_off(self, seed: int, part: float) -> None:
        body = save(tensors(seed))
        with socket.create_connection(self.address) as sock:
            sock.sendall(self.head(self.life.now.step + 1, len(body)) + body[: int(len(body) * part)])

    @rule(seed=seeds, wait=st.floats(0, 0.02), stretched=st.booleans())
    def outcome_unknown(self, seed: int, wait: float, stretched: bool) -> None:
        """The server dies around a push, or the last stretch of one; the trainer repeats it, and it counts once."""
        step, body = self.life.now.step + 1, save(tensors(seed))
        sent, bounds, group = body, None, f"try-{next(self.numbers)}"
        if stretched:
            *others, bounds = _bounds(data := _data(seed))
            for each in others:
                self.put(step, data[slice(*each)], each, group)
            sent = data[slice(*bounds)]
        with socket.create_connection(self.address) as sock:
            sock.sendall(self.head(step, len(sent), bounds, group))
            sender = threading.Thread(target=_send, args=(sock, sent))
            sender.start()
            time.sleep(wait)
            self.server.kill()
            sender.join(10)
        self.restart()
        assert self.put(step, body).json()["step"] == step
        self.pushed(step, seed)
        self.compare()

    @rule(seed=seeds)
    def replaced(self, seed: int) -> None:
        """Another trainer attaches; the one before cannot push any more."""
        before = self.life.writers
        answer = self.http.post(f"{self.path}/writers").raise_for_status()
        self.life.writers += 1
        assert answer.json()["writer"] == self.life.writers
        old = {"Ema-Writer": str(before)} if before else {}
        refused = self.http.put(
            f"{self.path}/updates/{self.life.now.step + 1}", content=save(tensors(seed)), headers=old
        )
        assert refused.json()["code"] == "fenced"

    # --- operators --------------------------------------------------------------------------------------------------

    @rule(decay=st.floats(0, 1, width=32), average=st.sampled_from(list(DECAYS)))
    def change_decay(self, decay: float, average: str) -> None:
        answer = self.http.patch(self.path, json={"decay": decay, "average": average})
        oracle = self.life.now.averages.get((average, self.life.wanted.get(average, -1)))
        if oracle is None:
            code = "awaiting_weights" if average in self.life.wanted else "average_not_found"
            assert answer.json()["code"] == code
            return
        answer.raise_for_status()
        oracle.decay = torch.tensor(decay, dtype=torch.float32)

    @rule(name=st.sampled_from(list(DECAYS)))
    def add_average(self, name: str) -> None:
        answer = self.http.post(f"{self.path}/averages", json={"name": name, "decay": DECAYS[name]})
        assert answer.status_code == (200 if name in self.life.wanted else 201)
        self.life.wanted.setdefault(name, next(self.numbers))

    @rule(name=st.sampled_from(list(DECAYS)))
    def remove_average(self, name: str) -> None:
        answer = self.http.delete(f"{self.path}/averages/{name}")
        life = self.life
        rest = [key for key in life.now.averages if key[0] != name]
        if name not in life.wanted:
            assert answer.json()["code"] == "average_not_found"
        elif not rest:
            assert answer.json()["code"] == "last_average"
        else:
            assert answer.status_code == 204
            life.now.averages.pop((name, life.wanted.pop(name)), None)

    @rule()
    def reset(self) -> None:
        self.http.post(f"{self.path}/reset-num-updates").raise_for_status()
        self.life.now.num_updates = min(self.life.now.num_updates, 0)
        for average in self.life.now.averages.values():
            if average.num_updates >= 0:
                average.num_updates.zero_()

    @rule(name=names)
    def snapshot(self, name: str) -> None:
        answer = self.http.put(f"{self.path}/snapshots/{name}")
        if answer.status_code == 201:
            self.life.snapshots[name] = copy.deepcopy(self.life.now)
        else:
            assert answer.status_code == 200 or answer.json()["code"] == "snapshot_exists"

    @rule(name=names)
    def rewind(self, name: str) -> None:
        answer = self.http.post(f"{self.path}/rewind", json={"snapshot": name})
        if name not in self.life.snapshots:
            assert answer.json()["code"] == "snapshot_not_found"
            return
        there = copy.deepcopy(self.life.snapshots[name])
        there.averages = {key: each for key, each in there.averages.items() if key in self.life.wanted.items()}
        if not there.averages:
            assert answer.json()["code"] == "average_not_found"
            return
        answer.raise_for_status()
        self.life.now = there
        self.life.now.last = b""

    @rule(name=names)
    def delete_snapshot(self, name: str) -> None:
        known = self.life.snapshots.pop(name, None)
        assert self.http.delete(f"{self.path}/snapshots/{name}").status_code == (204 if known else 404)

    @rule(clean=st.booleans())
    def end(self, clean: bool) -> None:
        self.server.stop() if clean else self.server.kill()
        self.restart()
        self.compare()

    # --- evaluators -------------------------------------------------------------------------------------------------

    @rule()
    def compare(self) -> None:
        info = self.http.get(self.path).raise_for_status().json()
        counter = self.life.now.num_updates
        expected = {"step": self.life.now.step, "num_updates": counter, "status": "ready", "writer": self.life.writers}
        assert info == {**info, **expected, "durable_step": self.life.now.step}
        assert [each["name"] for each in info["averages"]] == list(self.life.wanted)
        self.check_weights("weights", self.life.now)
        for name, _ in self.life.waiting:
            refused = self.http.get(f"{self.path}/weights", params={"average": name})
            assert refused.json()["code"] == "awaiting_weights"
        listed = self.http.get(f"{self.path}/snapshots").json()["snapshots"]
        assert {each["name"]: each["step"] for each in listed} == {n: m.step for n, m in self.life.snapshots.items()}
        for name, moment in self.life.snapshots.items():
            self.check_weights(f"snapshots/{name}/weights", moment)

    def check_weights(self, path: str, moment: Moment) -> None:
        for (name, _), average in moment.averages.items():
            answer = self.http.get(f"{self.path}/{path}", params={"average": name}).raise_for_status()
            found = load(answer.content)
            assert found.keys() == average.shadow.keys()
            assert [n for n, tensor in found.items() if not torch.equal(tensor, average.shadow[n])] == []

    # ----------------------------------------------------------------------------------------------------------------

    def begin(self, seed: int) -> None:
        """The averages that wait begin with these parameters."""
        for name, number in self.life.waiting:
            decay = DECAYS[name]
            oracle = self.litema(tensors(seed), 0.9999 if decay is None else decay, self.counted)
            self.life.now.averages[name, number] = oracle

    def pushed(self, step: int, seed: int) -> None:
        """An update was applied."""
        self.life.now.push(step, seed)
        self.begin(seed)

    @property
    def path(self) -> str:
        return f"/v1/runs/{self.life.name}"

    @property
    def address(self) -> tuple[str, int]:
        url = httpx.URL(self.server.url)
        return url.host, url.port or 80

    def put(self, step: int, body: bytes, bounds: tuple[int, int] | None = None, group: str = "") -> httpx.Response:
        where, headers = self.request(step, bounds, group)
        return self.http.put(where, content=body, headers=headers)

    def head(self, step: int, length: int, bounds: tuple[int, int] | None = None, group: str = "") -> bytes:
        where, headers = self.request(step, bounds, group)
        fields = {"Host": "localhost", **headers, "Content-Length": str(length)}
        lines = [f"PUT {where} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    def request(self, step: int, bounds: tuple[int, int] | None, group: str) -> tuple[str, dict[str, str]]:
        """The target and the headers of an update, or of one stretch of it."""
        where, headers = f"{self.path}/updates/{step}", {}
        if self.life.writers:
            headers["Ema-Writer"] = str(self.life.writers)
        if bounds:
            where += f"/stretches/{bounds[0]}-{bounds[1]}?group={group}"
            headers["Ema-Layout"] = self.layout
        return where, headers

    def restart(self) -> None:
        self.http.close()
        self.server.start()
        self.http = self.server.http()


def _data(seed: int) -> bytes:
    body = save(tensors(seed))
    return body[8 + int.from_bytes(body[:8], "little") :]


def _bounds(data: bytes) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK, len(data))) for start in range(0, len(data), BLOCK)]


def _send(sock: socket.socket, body: bytes) -> None:
    try:
        sock.sendall(body)
        sock.recv(1)
    except OSError:
        """The server is gone: that is what is tried."""


def test_lives(
    start_server: Callable[..., ServerProcess],
    litema: Callable[..., LitEmaOracle],
    soak_seconds: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A few lives, always the same; then, where soaking is asked for, as many more as fit into the time."""
    Lives.server, Lives.litema = start_server(), staticmethod(litema)
    run_state_machine_as_test(Lives, settings=settings(SOME, derandomize=True))  # type: ignore[no-untyped-call]
    end = time.monotonic() + soak_seconds
    first = random.randrange(2**32)
    for number in itertools.count(first):
        if time.monotonic() > end:
            break
        with capsys.disabled():
            print(f"seed {number}, {Lives.count} lives so far")  # noqa: T201 - for whoever soaks
        # Every other round has updates of two stretches.
        SHAPES.update(LARGE) if number % 2 else [SHAPES.pop(name, None) for name in LARGE]
        run_state_machine_as_test(seed(number)(Lives), settings=SOME)  # type: ignore[no-untyped-call]
