"""Parts that are averaged as they come: what whole pushes make, bit for bit, whatever comes in between.

Knows parts without a socket, in models of several blocks. Does not know HTTP (tests/e2e/test_parts_on_arrival.py).
"""

from __future__ import annotations

import contextlib
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
import xxhash
from torch import Tensor

from ema_client.errors import DigestMismatch, NonFinite, StorageFailed, Superseded
from ema_client.protocol import AverageConfig, RunConfig
from ema_service.memory import Layout, Memory
from ema_service.runs import Run
from ema_service.runs.measurements import Measured, Measurements
from tests.service.conftest import specs_of
from tests.service.runs.gatherer import WAYS, Gatherer, Slices, cut, large, part_body, shadow_bytes

if TYPE_CHECKING:
    from tests.service.conftest import LocalRun

MakeRun = Callable[..., "LocalRun"]

#: What two ranks have of three blocks and a rest: a block and a half each, in the middle of which one begins.
TENSORS = {"w": (13, 1 << 19)}
#: Seconds between two ranks, longer than anything that is computed.
PAUSE = 2.0
BOTH: list[Slices] = [{"w": [((0, 7), (0, 1 << 19))]}, {"w": [((7, 13), (0, 1 << 19))]}]
COLUMNS: list[Slices] = [{"w": [((0, 13), (0, 5))]}, {"w": [((0, 13), (5, 1 << 19))]}]


def wide(seed: int) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=source) for name, shape in TENSORS.items()}


@lru_cache(8)
def body(seed: int, number: int) -> bytes:
    return part_body(wide(seed), BOTH[number])


@pytest.fixture
def pair(local_run: MakeRun) -> tuple[Gatherer, Gatherer]:
    """Two equal runs: one that parts are sent to, and one that is told the same whole."""
    return tuple(Gatherer(local_run(wide(0)).run, 1 << 28) for _ in range(2))  # type: ignore[return-value]


def assert_same(parts: Gatherer, whole: Gatherer) -> None:
    assert shadow_bytes(parts.run) == shadow_bytes(whole.run)
    found, expected = parts.run.ready_state().version, whole.run.ready_state().version
    assert (found.digest, found.step, found.num_updates) == (expected.digest, expected.step, expected.num_updates)
    assert (parts.parts.count(), parts.staging.bytes_in_use) == (0, 0)


def decay(run: Run, decay: float) -> None:
    run.amend(lambda succession, version: succession.with_decay(version, decay, None))


# --- the same as whole ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "axis", "new_memory"), WAYS)
def test_blocks_averaged_apart(kind: str, axis: int, new_memory: Callable[[], Memory]) -> None:
    """Parts of several blocks, of rows or of columns, give what the same update sent whole gives, in two averages."""
    specs = specs_of(large(kind, 0))
    config = RunConfig("r", specs, averages=(AverageConfig("ema"), AverageConfig("fast", decay=0.5)))
    parts, whole = (Gatherer(Run(config, Layout(specs), new_memory(), created_at=1.0), 1 << 28) for _ in range(2))
    for step in (None, 1, 2):
        tensors = large(kind, step or 0)
        for index in range(3):
            parts.send(step, index, 3, part_body(tensors, cut(tensors, axis, index, 3)))
        if step is None:
            whole.send(None, 0, 1, part_body(tensors, cut(tensors, axis, 0, 1)))
        else:
            whole.push(step, tensors)

    assert_same(parts, whole)


def test_a_block_that_comes_whole_is_averaged_then(pair: tuple[Gatherer, Gatherer]) -> None:
    """Before the others are there: so the part is asked for again where the run has changed by then, and the update is
    averaged with the run as it is in the end."""
    parts, whole = pair
    parts.send(1, 0, 2, body(1, 0))
    coming = parts.open(1, 1, 2)
    for gatherer in pair:
        decay(gatherer.run, 0.125)
    assert parts.parts.staged(1) is None, "the sender asks, and sends the part again"
    with pytest.raises(Superseded, match="changed while step 1"):
        coming.feed(bytes(8))
    for number in (0, 1):
        result = parts.send(1, number, 2, body(1, number))
    whole.push(1, wide(1))

    assert (result.applied, result.effective_decay) == (True, 0.125)
    assert_same(*pair)


@pytest.mark.parametrize("when", ["whole", "applied"])
def test_run_that_changes_before_the_last_part(
    when: str, pair: tuple[Gatherer, Gatherer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last part is told that its step is superseded, also where the run changes once the set is whole."""
    parts, whole = pair
    parts.send(1, 0, 2, body(1, 0))
    last = parts.open(1, 1, 2)
    last.feed(body(1, 1))
    apply = parts.run.apply
    if when == "whole":
        decay(parts.run, 0.5)
    else:
        monkeypatch.setattr(parts.run, "apply", lambda *given: (decay(parts.run, 0.5), apply(*given))[1])
    with pytest.raises(Superseded, match="changed while"):
        parts.end(last)
    monkeypatch.undo()
    for number in (0, 1):
        parts.send(1, number, 2, body(1, number))
    decay(whole.run, 0.5)
    whole.push(1, wide(1))

    assert_same(*pair)


def test_columns_bind_no_version(local_run: MakeRun) -> None:
    """Of columns no rank has a whole block: they are averaged in the end, and none is asked for again."""
    parts, whole = (Gatherer(local_run(wide(0)).run, 1 << 28) for _ in range(2))
    parts.send(1, 0, 2, part_body(wide(1), COLUMNS[0]))
    for gatherer in (parts, whole):
        decay(gatherer.run, 0.125)
    assert parts.send(1, 1, 2, part_body(wide(1), COLUMNS[1])).applied
    whole.push(1, wide(1))

    assert_same(parts, whole)


def test_a_newer_step_waits_for_the_older(pair: tuple[Gatherer, Gatherer]) -> None:
    """A rank that is ahead is not averaged upon a version that the step before is going to replace."""
    parts, whole = pair
    for step in (1, 2):
        parts.send(step, 0, 2, body(step, 0))
    for step in (1, 2):
        assert parts.send(step, 1, 2, body(step, 1)).applied
        whole.push(step, wide(step))

    assert_same(*pair)


def test_an_older_step_comes_after_all(pair: tuple[Gatherer, Gatherer]) -> None:
    """Where the older step is applied after the newer one was begun, the newer one is asked for again."""
    parts, whole = pair
    parts.send(2, 0, 2, body(2, 0))
    for number in (0, 1):
        parts.send(1, number, 2, body(1, number))
    assert parts.parts.staged(2) is None
    for number in (0, 1):
        parts.send(2, number, 2, body(2, number))
    for step in (1, 2):
        whole.push(step, wide(step))

    assert_same(*pair)


def test_the_step_comes_whole_meanwhile(pair: tuple[Gatherer, Gatherer]) -> None:
    """Where the same step is applied by another way, its parts are compared with it."""
    parts, _ = pair
    parts.send(1, 0, 2, body(1, 0))
    for gatherer in pair:
        gatherer.push(1, wide(1))
    assert parts.send(1, 1, 2, body(1, 1)).applied is False

    assert_same(*pair)


class Recorder:
    """Is told of each update, and has each measured."""

    def __init__(self) -> None:
        self.noted: list[Measured] = []

    def due(self) -> bool:
        return True

    def note(self, measured: Measured) -> None:
        self.noted.append(measured)


def test_what_is_measured(memory: Memory) -> None:
    """Distances are those of the whole push, also where a part came twice; the commit takes no time that ranks took."""
    pair, told = list[Gatherer](), [Recorder(), Recorder()]
    specs = specs_of(wide(0))
    for recorder in told:
        measurements = cast(Measurements, recorder)
        run = Run(RunConfig("r", specs), Layout(specs), memory, created_at=1.0, measurements=measurements)
        pair.append(Gatherer(run, 1 << 28))
        pair[-1].send(None, 0, 1, part_body(wide(0), cut(wide(0), 0, 0, 1)))
    parts, whole = pair
    broken = parts.open(1, 0, 2)
    broken.feed(body(2, 0)[: -(1 << 20)])
    broken.average()
    parts.parts.give_up(broken)
    parts.send(1, 0, 2, body(1, 0))
    time.sleep(PAUSE)
    parts.send(1, 1, 2, body(1, 1))
    whole.push(1, wide(1))

    [found], [expected] = (recorder.noted for recorder in told)
    assert found.sums is not None
    assert expected.sums is not None
    torch.testing.assert_close(torch.from_numpy(found.sums), torch.from_numpy(expected.sums))
    assert found.receive is None
    assert (found.commit or PAUSE) < PAUSE


# --- parts that come to nothing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", ["same cut", "other cut"])
def test_a_part_that_breaks_off(again: str, pair: tuple[Gatherer, Gatherer]) -> None:
    """What was averaged of it is forgotten: the same part, or others that have its elements, come in its place."""
    parts, whole = pair
    parts.send(1, 1, 2, body(1, 1))
    broken = parts.open(1, 0, 2)
    broken.feed(body(2, 0)[: -(1 << 20)])
    broken.average()
    parts.parts.give_up(broken)
    if again == "other cut":
        parts.parts.expire(0.0)
        slices = cut(wide(1), 0, 0, 1)["w"][0]
        boxes = [((0, 5), slices[1]), ((5, 13), slices[1])]
        for number, box in enumerate(boxes):
            parts.send(1, number, 2, part_body(wide(1), {"w": [box]}))
    else:
        assert parts.send(1, 0, 2, body(1, 0)).applied
    whole.push(1, wide(1))

    assert_same(*pair)


def test_others_take_the_place_of_a_part_that_broke_off(local_run: MakeRun) -> None:
    """Also where they have its elements by another cut, in which no block is one part's."""
    parts, whole = (Gatherer(local_run(wide(0)).run, 1 << 28) for _ in range(2))
    columns = [((0, 8), (0, 7)), ((0, 8), (7, 1 << 19))]
    parts.send(1, 2, 3, part_body(wide(1), {"w": [((8, 13), (0, 1 << 19))]}))
    broken = parts.open(1, 0, 3)
    broken.feed(part_body(wide(2), {"w": [((0, 8), (0, 1 << 19))]})[: -(1 << 20)])
    broken.average()
    parts.parts.give_up(broken)
    for number, box in enumerate(columns):
        parts.send(1, number, 3, part_body(wide(1), {"w": [box]}))
    whole.push(1, wide(1))

    assert_same(parts, whole)


def test_a_part_that_broke_off_binds_nothing(local_run: MakeRun) -> None:
    """To no version: where nothing else was averaged, no part is asked for again when the run changes."""
    parts, whole = (Gatherer(local_run(wide(0)).run, 1 << 28) for _ in range(2))
    slices = [{"w": [((0, 8), (0, 1 << 19))]}, {"w": [((8, 13), (0, 7))]}, {"w": [((8, 13), (7, 1 << 19))]}]
    parts.send(1, 1, 3, part_body(wide(1), slices[1]))
    broken = parts.open(1, 0, 3)
    broken.feed(part_body(wide(2), slices[0])[: -(1 << 20)])
    broken.average()
    parts.parts.give_up(broken)
    for gatherer in (parts, whole):
        decay(gatherer.run, 0.125)
    assert parts.parts.staged(1) == (1,)
    for number in (0, 2):
        result = parts.send(1, number, 3, part_body(wide(1), slices[number]))
    whole.push(1, wide(1))

    assert result.applied
    assert_same(parts, whole)


def test_a_part_that_is_sent_again_while_it_comes(pair: tuple[Gatherer, Gatherer]) -> None:
    """Nothing of the attempt before goes into the update, and nothing of it is averaged any more."""
    parts, whole = pair
    hanging = parts.open(1, 0, 2)
    hanging.feed(body(2, 0)[: -(1 << 20)])
    again = parts.open(1, 0, 2)
    again.feed(body(1, 0)[: 4 << 20])
    hanging.average()
    again.feed(body(1, 0)[4 << 20 :])
    assert parts.end(again) == "staged"
    with pytest.raises(Superseded, match="was sent again"):
        hanging.feed(bytes(8))
    assert parts.send(1, 1, 2, body(1, 1)).applied
    whole.push(1, wide(1))

    assert_same(*pair)


def test_a_flipped_bit(pair: tuple[Gatherer, Gatherer]) -> None:
    """A damaged part is refused, although its blocks were averaged, and the part that comes again, right, is taken."""
    parts, whole = pair
    good, digest = body(1, 0), xxhash.xxh3_128(xxhash.xxh3_128(wide(1)["w"][:7].numpy().tobytes()).digest()).digest()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1

    def send(sent: bytes) -> Any:
        part = parts.open(1, 0, 2)
        part.expect_digest()
        try:
            part.feed(sent + digest)
            part.average()
            part.finish()
            return parts.parts.complete(part)
        except DigestMismatch:
            parts.parts.give_up(part)
            raise

    with pytest.raises(DigestMismatch, match="part 0"):
        send(bytes(bad))
    assert send(good) == "staged"
    assert parts.send(1, 1, 2, body(1, 1)).applied
    whole.push(1, wide(1))

    assert_same(*pair)


def test_non_finite(pair: tuple[Gatherer, Gatherer]) -> None:
    """NaN in a block that was averaged early refuses the whole update, each rank is told, and the step comes right."""
    parts, whole = pair
    bad = wide(1)
    bad["w"][1, 3] = float("nan")
    before = shadow_bytes(parts.run)
    parts.send(1, 0, 2, part_body(bad, BOTH[0]))
    for number in (1, 0):
        with pytest.raises(NonFinite, match="w"):
            parts.send(1, number, 2, part_body(bad, BOTH[number]))
    assert shadow_bytes(parts.run) == before
    for number in (0, 1):
        parts.send(1, number, 2, body(1, number))
    whole.push(1, wide(1))

    assert_same(*pair)


def test_write_that_fails(pair: tuple[Gatherer, Gatherer], monkeypatch: pytest.MonkeyPatch) -> None:
    """The set stays, with what was averaged of it early and in the end: any part again has it written."""
    parts, whole = pair
    parts.send(1, 0, 2, body(1, 0))

    def fail(*_: Any) -> Any:
        raise StorageFailed("the disk is full")

    with monkeypatch.context() as failing:
        failing.setattr(parts.run, "_next", fail)
        for number in (1, 0):
            with pytest.raises(StorageFailed):
                parts.send(1, number, 2, body(1, number))
    assert parts.send(1, 0, 2, body(1, 0)).applied
    whole.push(1, wide(1))

    assert_same(*pair)


def test_the_version_before_is_let_go(pair: tuple[Gatherer, Gatherer]) -> None:
    """A step that is bound to a version holds that version's memory: no longer than until somebody looks."""
    parts, _ = pair
    parts.send(1, 0, 2, body(1, 0))
    before = weakref.ref(parts.run.ready_state().arenas[0])
    parts.push(2, wide(2))
    assert before() is not None
    parts.parts.expire(60.0)
    gc.collect()

    assert (before(), parts.staging.bytes_in_use) == (None, 0)


# --- random lives ---------------------------------------------------------------------------------------------------


class Life:
    """Ranks of one trainer that send a step's parts in any order, break off, send again, and see the run changed."""

    def __init__(self, seed: int, kind: str) -> None:
        self.chance, self.kind = random.Random(seed), kind
        #: How many parts were answered, and asked for again as the run changed.
        self.lost = 0
        specs = specs_of(large(kind, 0))
        config = RunConfig("r", specs, averages=(AverageConfig("ema"), AverageConfig("fast", decay=0.5)))
        self.pair = [Gatherer(Run(config, Layout(specs), Memory(), created_at=1.0), 1 << 29) for _ in range(2)]
        for gatherer in self.pair:
            gatherer.send(None, 0, 1, part_body(large(kind, 0), cut(large(kind, 0), 0, 0, 1)))

    def step(self, step: int) -> None:
        parts, whole = self.pair
        tensors, of, axis = large(self.kind, step), self.chance.randint(2, 3), self.chance.choice([0, 0, 0, -1])
        bodies = {index: part_body(tensors, cut(tensors, axis, index, of)) for index in range(of)}
        acts = [self.break_off, self.change, self.change, self.repeat]
        waiting, there = {*bodies}, set[int]()
        while waiting:
            index = self.chance.choice(sorted(waiting))
            if self.chance.random() < 0.6:
                self.chance.choice(acts)(step, index, of, bodies)
            try:
                outcome = parts.send(step, index, of, bodies[index], piece=self.chance.choice([1 << 20, 3_000_001]))
            except Superseded:
                outcome = "superseded"
            if outcome not in ("staged", "superseded"):
                break
            before, there = there | {index} if outcome == "staged" else there, {*(parts.parts.staged(step) or ())}
            self.lost += len(before - there)
            waiting = {*bodies} - there
        assert parts.run.ready_state().version.step == step
        whole.push(step, tensors)

    def break_off(self, step: int, index: int, of: int, bodies: dict[int, bytes]) -> None:
        part = self.pair[0].open(step, index, of)
        sent = bytearray(bodies[index])
        sent[-1] ^= 1
        part.feed(sent[: self.chance.randint(len(sent) // 2, len(sent))])
        part.average()
        self.pair[0].parts.give_up(part)

    def change(self, *_: Any) -> None:
        value = self.chance.choice([0.25, 0.75])
        for gatherer in self.pair:
            decay(gatherer.run, value)

    def repeat(self, step: int, _: int, of: int, bodies: dict[int, bytes]) -> None:
        for index in self.pair[0].parts.staged(step) or ():
            assert self.pair[0].send(step, index, of, bodies[index]) in ("staged", "applied")


@pytest.mark.parametrize("kind", ["float32", "bf16", "mixed"])
def test_random_lives(kind: str) -> None:
    """Whatever comes between the parts, each step is applied once, with the run as it is then, bit for bit."""
    life = Life(8, kind)
    for step in range(1, 7):
        life.step(step)
        assert_same(*life.pair)
    assert life.lost, "of some steps nothing was averaged before the run changed"


def test_ranks_at_once(local_run: MakeRun) -> None:
    """Ranks in threads of their own, parts that break off, and decays that change at any time: each step is applied
    once, with one of the decays, bit for bit."""
    config = {"use_num_updates": False, "decay": 0.5}
    parts, whole = (Gatherer(local_run(wide(0), **config).run, 1 << 28) for _ in range(2))
    over = threading.Event()

    def change() -> None:
        while not over.wait(0.1):
            decay(parts.run, random.choice([0.25, 0.75]))

    def rank(number: int, step: int) -> list[Any]:
        results = []
        while parts.run.ready_state().version.step != step:
            if number not in (parts.parts.staged(step) or ()):
                with contextlib.suppress(Superseded):
                    if random.random() < 0.3:
                        broken = parts.open(step, number, 2)
                        broken.feed(body(step + 1, number)[: -(1 << 20)])
                        broken.average()
                        parts.parts.give_up(broken)
                    results.append(parts.send(step, number, 2, body(step, number)))
            time.sleep(0.001)
        return [result for result in results if result not in ("staged", "applied")]

    with ThreadPoolExecutor(3) as threads:
        changing = threads.submit(change)
        try:
            for step in range(1, 6):
                found = [each for results in threads.map(rank, range(2), [step] * 2) for each in results]
                [result] = [each for each in found if each.applied]
                decay(whole.run, result.effective_decay)
                whole.push(step, wide(step))
                assert shadow_bytes(parts.run) == shadow_bytes(whole.run)
        finally:
            over.set()
        changing.result()
    assert (parts.parts.count(), parts.staging.bytes_in_use) == (0, 0)
