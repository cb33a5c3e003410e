"""Parts that come in stretches, over several connections: what whole pushes make, bit for bit, whatever breaks off.

Knows parts and their stretches without a socket, in models of several blocks. Does not know HTTP
(tests/e2e/test_part_lanes.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from ema_client.errors import (
    DigestMismatch,
    InvalidRequest,
    LayoutMismatch,
    MalformedBody,
    NonFinite,
    StepConflict,
    StorageFailed,
    Superseded,
)
from ema_client.http.digests import Digest
from ema_client.protocol import AverageConfig, RunConfig
from ema_client.wire import LENGTH_BYTES, PartCut, parse_header, parse_length, stretches_of_part
from ema_service.memory import Layout, Memory
from ema_service.runs import Run
from ema_service.runs.gathering import PartGathering, PartStretch
from ema_service.runs.stretches import check_part_bounds
from tests.service.conftest import specs_of
from tests.service.runs.gatherer import WAYS, Gatherer, cut, large, part_body, shadow_bytes

if TYPE_CHECKING:
    from tests.service.conftest import LocalRun

MakeRun = Callable[..., "LocalRun"]
BLOCK = 8 << 20
#: A model of five blocks and a rest; what each of two ranks has begins or ends in the middle of a block.
SHAPE = (21, 1 << 19)


def tensors(seed: int) -> dict[str, torch.Tensor]:
    return {"w": torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))}


class Cut:
    """A part as bodies of its stretches. size: of each but the last."""

    def __init__(self, part: int, body: bytes, size: int = BLOCK) -> None:
        self.length = LENGTH_BYTES + parse_length(body[:LENGTH_BYTES])
        self.data = body[self.length :]
        self.cuts: tuple[PartCut, ...] = stretches_of_part(parse_header(body[LENGTH_BYTES : self.length]), size)
        bounds = [each.spans[0] for each in self.cuts]
        self.keys = [PartStretch(part, start, stop, len(self.data)) for start, stop in bounds]

    def body(self, number: int) -> bytes:
        return self.cuts[number].header + self.data[slice(*self.cuts[number].spans[0])]

    def digest(self, number: int) -> bytes:
        each = self.cuts[number]
        digest = Digest(each.sizes, skip=len(each.header))
        digest.update(memoryview(self.body(number)))
        return digest.digest()


def of_rank(seed: int, rank: int, size: int = BLOCK) -> Cut:
    return Cut(rank, part_body(tensors(seed), cut(tensors(seed), 0, rank, 2)), size)


def send(gatherer: Gatherer, step: int, part: Cut, number: int, of: int = 2, **terms: Any) -> Any:
    return gatherer.send(step, cast(int, part.keys[number]), of, part.body(number), **terms)


def send_all(gatherer: Gatherer, step: int, part: Cut, of: int = 2) -> list[Any]:
    return [send(gatherer, step, part, number, of) for number in range(len(part.keys))]


def open_one(gatherer: Gatherer, step: int, part: Cut, number: int, of: int = 2) -> Any:
    return gatherer.open(step, cast(int, part.keys[number]), of)


def gathering_of(gatherer: Gatherer) -> PartGathering:
    found = gatherer.parts._gatherings[0]
    assert isinstance(found, PartGathering)
    return found


@pytest.fixture
def pair(local_run: MakeRun) -> tuple[Gatherer, Gatherer]:
    """Two equal runs: one that stretches are sent to, and one that is told the same whole."""
    return tuple(Gatherer(local_run(tensors(0)).run, 1 << 28) for _ in range(2))  # type: ignore[return-value]


def assert_same(parts: Gatherer, whole: Gatherer) -> None:
    """Both runs are bit for bit the same, and neither holds staging."""
    assert shadow_bytes(parts.run) == shadow_bytes(whole.run)
    assert parts.run.ready_state().version.digest == whole.run.ready_state().version.digest
    assert parts.staging.bytes_in_use == whole.staging.bytes_in_use == 0


def decay(run: Run, decay: float) -> None:
    run.amend(lambda succession, version: succession.with_decay(version, decay, None))


@pytest.mark.parametrize(("kind", "axis", "new_memory"), WAYS)
def test_bit_for_bit(kind: str, axis: int, new_memory: Callable[[], Memory]) -> None:
    """Stretches of rows and of columns, of any dtype, in any order, beside a part of one body."""
    specs = specs_of(large(kind, 0))
    config = RunConfig("r", specs, averages=(AverageConfig("ema"), AverageConfig("fast", decay=0.5)))
    parts, whole = (Gatherer(Run(config, Layout(specs), new_memory(), created_at=1.0), 1 << 29) for _ in range(2))
    for gatherer in (parts, whole):
        gatherer.send(None, 0, 1, part_body(large(kind, 0), cut(large(kind, 0), 0, 0, 1)))
    for step in (1, 2):
        bodies = [part_body(large(kind, step), cut(large(kind, step), axis, rank, 3)) for rank in range(3)]
        cuts = [Cut(rank, body, BLOCK // 4) for rank, body in enumerate(bodies)]
        order = [(rank, number) for rank in (0, 2) for number in range(len(cuts[rank].keys))]
        random.Random(step).shuffle(order)
        for rank, number in order:
            assert send(parts, step, cuts[rank], number, 3) == "staged"
        assert parts.parts.staged(step) == (0, 2)
        assert parts.send(step, 1, 3, bodies[1]).applied
        whole.push(step, large(kind, step))

    assert_same(parts, whole)


def test_averaged_as_they_come(pair: tuple[Gatherer, Gatherer]) -> None:
    """A block that a stretch brings whole is averaged with it, one that several bring with the last of them; a block
    that another part has some of, with the set."""
    parts, whole = pair
    part = of_rank(1, 1)
    first = len(part.data) % BLOCK
    assert first, "the part begins in the middle of a block"
    seen = []
    for number in range(len(part.keys)):
        send(parts, 1, part, number)
        seen.append(sorted(gathering_of(parts).averaged))
    size = parts.run.layout.param_bytes
    apart = [start for start in range(0, size, BLOCK) if start >= size - len(part.data)]
    assert seen[-1] == apart
    assert [len(each) for each in seen] == [0, 1, 3]
    send_all(parts, 1, of_rank(1, 0))
    whole.push(1, tensors(1))

    assert_same(*pair)


def test_a_stretch_again(pair: tuple[Gatherer, Gatherer]) -> None:
    """The same bytes change nothing, before the part is whole, after, and once the update is applied; others are a
    conflict."""
    parts, whole = pair
    part, bad, last = of_rank(1, 0), of_rank(2, 0), of_rank(1, 1)
    assert send(parts, 1, part, 1) == send(parts, 1, part, 1) == "staged"
    with pytest.raises(StepConflict, match=r"stretch \d+-\d+ of part 0 came before"):
        send(parts, 1, bad, 1)
    assert parts.parts.staged(1) == ()
    send_all(parts, 1, part)
    assert parts.parts.staged(1) == (0,)
    assert send(parts, 1, part, 0) == "staged"
    results = send_all(parts, 1, last)
    assert results[:-1] == ["staged"] * (len(results) - 1)
    assert results[-1].applied
    assert send(parts, 1, part, 2) == send(parts, 1, last, 0) == "applied"
    with pytest.raises(StepConflict):
        send(parts, 1, bad, 1)
    whole.push(1, tensors(1))

    assert_same(*pair)


@pytest.mark.parametrize("lost", ["broken off", "damaged", "sent again"])
def test_a_stretch_that_does_not_come(lost: str, pair: tuple[Gatherer, Gatherer]) -> None:
    """The stretch is sent again alone: what was averaged of it is forgotten, and of the others nothing is."""
    parts, whole = pair
    part, bad = of_rank(1, 0, 2 * BLOCK), of_rank(2, 0, 2 * BLOCK)
    send(parts, 1, part, 1)
    hanging = open_one(parts, 1, bad, 0)
    hanging.expect_digest()
    if lost == "damaged":
        with pytest.raises(DigestMismatch, match=r"stretch \d+-\d+ of part 0"):
            _feed(hanging, bad.body(0) + part.digest(0))
        parts.parts.give_up(hanging)
    else:
        _feed(hanging, bad.body(0), ends=False)
        assert gathering_of(parts).averaged
        if lost == "broken off":
            parts.parts.give_up(hanging)
    again = open_one(parts, 1, part, 0)
    again.expect_digest()
    _feed(again, part.body(0) + part.digest(0))
    assert parts.end(again) == "staged"
    if lost == "sent again":
        with pytest.raises(Superseded, match="sent again"):
            hanging.feed(bytes(8))
    assert parts.parts.staged(1) == (0,)
    send_all(parts, 1, of_rank(1, 1))
    whole.push(1, tensors(1))

    assert_same(*pair)


def _feed(piece: Any, body: bytes, *, ends: bool = True) -> None:
    """Feed a body, digest and all where it ends; else all but its last MiB of data."""
    piece.announce(len(body) if ends else len(body) + len(piece.digest or b""))
    body = body if ends else body[: -(1 << 20)]
    for start in range(0, len(body), 1 << 20):
        piece.feed(body[start : start + (1 << 20)])
        piece.average()
    if ends:
        piece.finish()


def test_run_that_changes_meanwhile(pair: tuple[Gatherer, Gatherer]) -> None:
    """Stretches that were averaged bind the step to a version: with another, all of them come again."""
    parts, whole = pair
    part = of_rank(1, 1, 2 * BLOCK)
    send(parts, 1, part, 1)
    assert gathering_of(parts).averaged
    for gatherer in pair:
        decay(gatherer.run, 0.25)
    assert parts.parts.staged(1) is None
    send_all(parts, 1, part)
    send_all(parts, 1, of_rank(1, 0))
    whole.push(1, tensors(1))

    assert_same(*pair)


def test_a_part_comes_one_way(pair: tuple[Gatherer, Gatherer]) -> None:
    """In stretches or as one body, in stretches that are apart, and of one size; what broke off claims nothing."""
    parts, whole = pair
    part, one_body = of_rank(1, 0), part_body(tensors(1), cut(tensors(1), 0, 0, 2))
    broken = open_one(parts, 1, of_rank(1, 0, 3 * BLOCK), 0)
    send_all(parts, 1, of_rank(1, 1))
    with pytest.raises(StepConflict, match="part 0 of step 1 comes in stretches"):
        parts.send(1, 0, 2, one_body)
    with pytest.raises(StepConflict, match="overlaps"):
        send(parts, 1, part, 0)
    with pytest.raises(StepConflict, match="bytes, not"):
        parts.open(1, cast(int, PartStretch(0, 3 * BLOCK, 4 * BLOCK, 4 * BLOCK)), 2)
    parts.parts.give_up(broken)
    coming = parts.open(1, 0, 2)
    with pytest.raises(StepConflict, match="part 0 of step 1 comes as one body"):
        send(parts, 1, part, 0)
    parts.parts.give_up(coming)
    send_all(parts, 1, part)
    whole.push(1, tensors(1))

    assert_same(*pair)


def test_what_a_stretch_may_bring(pair: tuple[Gatherer, Gatherer]) -> None:
    """As many bytes as its bounds say, and no element of another stretch or part; a set that lacks elements is told."""
    parts, whole = pair
    part, other = of_rank(1, 0), of_rank(1, 1)
    with pytest.raises(MalformedBody, match="bytes of tensors"):
        parts.send(1, cast(int, part.keys[0]), 2, part.body(len(part.keys) - 1))
    send(parts, 1, part, 0)
    with pytest.raises(LayoutMismatch, match="part 0 has elements of w twice"):
        parts.send(1, cast(int, part.keys[1]), 2, part.body(0))
    with pytest.raises(LayoutMismatch, match="part 1 has elements of w that part 0 has too"):
        parts.send(1, cast(int, other.keys[0]), 2, part.body(0))
    send_all(parts, 1, other)
    for number in range(1, len(part.keys)):
        answer = send(parts, 1, part, number)
    assert answer.applied
    whole.push(1, tensors(1))

    assert_same(*pair)


def test_set_that_lacks_elements(pair: tuple[Gatherer, Gatherer]) -> None:
    """The last stretch of all is refused, and what is there stays."""
    parts, _ = pair
    part = of_rank(1, 0)
    short = Cut(1, part_body(tensors(1), {"w": [((15, 21), (0, SHAPE[1]))]}))
    send_all(parts, 1, part)
    for number in range(len(short.keys) - 1):
        assert send(parts, 1, short, number) == "staged"
    with pytest.raises(LayoutMismatch, match="elements are missing: w"):
        send(parts, 1, short, len(short.keys) - 1)
    assert parts.parts.staged(1) == (0,)


def test_non_finite(pair: tuple[Gatherer, Gatherer]) -> None:
    """NaN refuses the whole update, each rank is told by any stretch of its part, and the step comes right."""
    parts, whole = pair
    bad = tensors(1)
    bad["w"][1, 3] = float("nan")
    cuts = [Cut(rank, part_body(bad, cut(bad, 0, rank, 2))) for rank in range(2)]
    send_all(parts, 1, cuts[0])
    with pytest.raises(NonFinite, match="w"):
        send_all(parts, 1, cuts[1])
    for each in cuts:
        with pytest.raises(NonFinite, match="w"):
            send(parts, 1, each, 1)
    for rank in range(2):
        send_all(parts, 1, of_rank(1, rank))
    whole.push(1, tensors(1))

    assert_same(*pair)


def test_write_that_fails(pair: tuple[Gatherer, Gatherer], monkeypatch: pytest.MonkeyPatch) -> None:
    """The set stays, and any stretch sent again has it written anew."""
    parts, whole = pair
    send_all(parts, 1, of_rank(1, 0))
    last = of_rank(1, 1)
    for number in range(len(last.keys) - 1):
        send(parts, 1, last, number)
    with monkeypatch.context() as broken:
        broken.setattr(parts.run, "_next", _raise)
        with pytest.raises(StorageFailed):
            send(parts, 1, last, len(last.keys) - 1)
    assert parts.parts.staged(1) == (0, 1)
    assert send(parts, 1, of_rank(1, 0), 2).applied
    whole.push(1, tensors(1))

    assert_same(*pair)


def _raise(*_: Any) -> Any:
    raise StorageFailed("the disk is full")


def test_bounds(pair: tuple[Gatherer, Gatherer]) -> None:
    """Whole blocks, within the part, which is no larger than the update."""
    layout, size = pair[0].run.layout, 3 * BLOCK + 8
    for start, stop in ((0, BLOCK), (BLOCK, size), (3 * BLOCK, size), (0, size)):
        check_part_bounds(layout, PartStretch(0, start, stop, size))
    for start, stop in ((0, 8), (8, BLOCK), (BLOCK, BLOCK), (2 * BLOCK, BLOCK), (3 * BLOCK, 4 * BLOCK), (-BLOCK, 0)):
        with pytest.raises(InvalidRequest, match="multiples"):
            check_part_bounds(layout, PartStretch(0, start, stop, size))
    with pytest.raises(InvalidRequest, match="size"):
        check_part_bounds(layout, PartStretch(0, 0, BLOCK, layout.param_bytes + 1))


def test_random_lives(pair: tuple[Gatherer, Gatherer]) -> None:
    """Stretches in any order that break off, are damaged and come again, and decays that change in between: each step
    once, with the run as it is then."""
    parts, whole = pair
    chance, changed = random.Random(5), 0
    for step in range(1, 7):
        sizes = [BLOCK * chance.choice([1, 1, 2]) for _ in range(2)]
        cuts, bad = ([of_rank(seed, rank, sizes[rank]) for rank in range(2)] for seed in (step, step + 100))
        missing = {(rank, number) for rank in range(2) for number in range(len(cuts[rank].keys))}
        answer: Any = "staged"
        while answer == "staged":
            rank, number = chance.choice(sorted(missing))
            if chance.random() < 0.3:
                hanging = open_one(parts, step, bad[rank], number)
                _feed(hanging, bad[rank].body(number), ends=False)
                parts.parts.give_up(hanging)
            if chance.random() < 0.1:
                value = chance.choice([0.25, 0.75])
                for gatherer in pair:
                    decay(gatherer.run, value)
                if parts.parts.staged(step) is None:
                    changed += 1
                    missing = {(r, n) for r in range(2) for n in range(len(cuts[r].keys))}
            answer = send(parts, step, cuts[rank], number)
            missing.discard((rank, number))
        assert answer.applied
        whole.push(step, tensors(step))
        assert_same(*pair)
    assert changed, "of no step anything was averaged before the run changed"
