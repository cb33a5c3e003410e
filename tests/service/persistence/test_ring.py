"""The ring on disk: when snapshots are taken and dropped, what a crash leaves, and what takes no part any more.

Knows runs, registries and folders in this process. Does not know HTTP.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ema_client.errors import InvalidRequest, Overloaded, StorageFailed, SynthesisRefused
from ema_client.protocol import Posthoc, RingInfo
from ema_service.averaging import (
    ConstantHalfLife,
    SigmaRel,
    SnapshotBasis,
    Synthesis,
    Target,
    TrackedAverage,
    approximate,
)
from ema_service.averaging.profiles import decays_of, gamma_of, power_decay
from ema_service.memory import Memory
from tests.service.posthoc import as_state, walk
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.service.conftest import LocalRun, LocalServer

WALKED = walk(300, size=50)
SMALL = Posthoc(snapshots=4)


@pytest.fixture(params=["slots", "memory files"])
def server(request: pytest.FixtureRequest, local_server: Callable[..., LocalServer], ram_dir: Path) -> LocalServer:
    made: LocalServer = local_server(ram_dir=ram_dir if request.param == "memory files" else None)
    return made


def begun(server: LocalServer, posthoc: Posthoc = SMALL, **config: Any) -> LocalRun:
    run = server.create("r", as_state(WALKED[0]), posthoc=posthoc, **config)
    run.begin(as_state(WALKED[0]))
    return run


def ring_of(run: LocalRun) -> RingInfo:
    found = run.info.ring
    assert found is not None
    return found


def push(server: LocalServer, run: LocalRun, first: int, last: int) -> None:
    """Push updates one after the other, each once the snapshot that is due is written."""
    for n in range(first, last + 1):
        run.push(n, as_state(WALKED[n]))
        idle(server)


def idle(server: LocalServer) -> None:
    """Wait until nothing of the ring is being written or dropped."""
    ring = server.registry.synthesiser("r").ring
    wait_until(lambda: ring.idle)


def folders(server: LocalServer) -> set[str]:
    return {path.name for path in server.data_files("r.*/ring/*")}


def rows(server: LocalServer) -> set[str]:
    assert server.folder is not None
    with closing(sqlite3.connect(f"file:{server.folder}/catalog.db?mode=ro", uri=True)) as database:
        return {name for (name,) in database.execute("SELECT name FROM ring")}


def test_times_are_those_of_the_rule(server: LocalServer) -> None:
    """One snapshot for each due update, and never more times than one too many: rows and folders agree."""
    run = begun(server)
    idle(server)
    assert (ring_of(run).times, ring_of(run).begin) == ((), 0)
    for n in range(1, 41):
        push(server, run, n, n)
        assert rows(server) == folders(server) == {f"1.{time}" for time in (0, *ring_of(run).times)}
        assert len(ring_of(run).times) == min(n, 4)
    assert max(ring_of(run).times) == 40


def test_first_weights_are_stored_once(server: LocalServer) -> None:
    """Of the weights that a run begins with one average is stored; of a snapshot all that are tracked."""
    run = begun(server)
    push(server, run, 1, 2)
    files = {path.parent.name: path.name for path in server.data_files("r.*/ring/1.0/posthoc-*")}
    assert files == {"1.0": "posthoc-0.015.safetensors"}
    assert len(server.data_files("r.*/ring/1.2/posthoc-*")) == 3
    assert ring_of(run).bytes == sum(path.stat().st_size for path in server.data_files("r.*/ring/*/posthoc-*"))


@pytest.mark.parametrize("durability", ["memory", "process", "disk"])
def test_clean_stop_and_start(server: LocalServer, durability: str) -> None:
    """After a stop the ring is what it was, and goes on by the same rule."""
    run = begun(server, durability=durability)
    push(server, run, 1, 30)
    before = ring_of(run)
    server.stop()
    server.start()
    run = server.run("r")
    assert ring_of(run) == before
    push(server, run, 31, 40)
    assert max(ring_of(run).times) == 40
    assert len(ring_of(run).times) == 4


def test_crash_leaves_what_led_to_the_version(server: LocalServer) -> None:
    """A run that comes back older than its ring drops what came after."""
    run = begun(server, durability="memory")
    push(server, run, 1, 20)
    server.registry.checkpoint()
    kept = {time for time in ring_of(run).times if time <= 20}
    push(server, run, 21, 40)
    assert max(ring_of(run).times) > 20
    server.crash()
    server.start()
    run = server.run("r")
    idle(server)
    assert run.version.step == 20
    assert set(ring_of(run).times) <= kept
    assert rows(server) == folders(server)
    push(server, run, 21, 40)
    assert {name.split(".")[0] for name in rows(server)} <= {"1", "2"}
    assert 0.0 < recipe(server).synthesis.error < 0.3


def recipe(server: LocalServer, at: str | None = None) -> Any:
    [found] = server.registry.synthesiser("r").recipes([SigmaRel(0.2)], at, 0.5)
    return found


def test_crash_between_files_and_row(server: LocalServer) -> None:
    """Files without a row are nobody's: a start removes them."""
    run = begun(server)
    push(server, run, 1, 10)
    server.crash()
    [folder] = server.data_files("r.*")
    shutil.copytree(folder / "ring" / "1.10", folder / "ring" / "1.11")
    server.start()
    assert "1.11" not in folders(server)
    assert rows(server) == folders(server)


def test_crash_before_the_surplus_went(server: LocalServer) -> None:
    """A ring that has one too many drops it at the next look, and so never has two."""
    run = begun(server)
    push(server, run, 1, 10)
    server.crash()
    assert server.folder is not None
    [folder] = server.data_files("r.*")
    dropped = next(n for n in range(1, 10) if f"1.{n}" not in rows(server))
    shutil.copytree(folder / "ring" / "1.10", folder / "ring" / f"1.{dropped}")
    with sqlite3.connect(server.folder / "catalog.db") as database:
        [(run_id, info, at)] = database.execute("SELECT run_id, info, created_at FROM ring WHERE name = '1.10'")
        info = info.replace('"n": 10', f'"n": {dropped}').replace('"time": 10', f'"time": {dropped}')
        database.execute("INSERT INTO ring VALUES (?, ?, ?, ?)", (run_id, f"1.{dropped}", info, at))
    database.close()
    server.start()
    server.registry.verify()
    run = server.run("r")
    idle(server)
    assert len(ring_of(run).times) == 4
    push(server, run, 11, 12)
    assert len(ring_of(run).times) == 4
    assert rows(server) == folders(server)


def test_damaged_row_takes_no_part(server: LocalServer) -> None:
    """A row that cannot be read costs its snapshot, not the run."""
    run = begun(server)
    push(server, run, 1, 10)
    server.crash()
    assert server.folder is not None
    with sqlite3.connect(server.folder / "catalog.db") as database:
        database.execute("UPDATE ring SET info = '{' WHERE name = '1.10'")
    database.close()
    server.start()
    assert 10 not in ring_of(server.run("r")).times
    assert recipe(server).info.num_updates == 10


def test_rewind_drops_the_branch(server: LocalServer) -> None:
    """After a rewind the ring has what led to the snapshot, and goes on from there."""
    run = begun(server)
    push(server, run, 1, 20)
    server.snapshot("s")
    kept = set(ring_of(run).times)
    push(server, run, 21, 40)
    server.registry.rewind("r", "s")
    idle(server)
    assert set(ring_of(run).times) <= kept
    assert rows(server) == folders(server)
    push(server, run, 21, 23)
    assert ring_of(run).times[-1] > 20
    assert recipe(server, "s").info.num_updates == 20


def test_rewind_to_a_branch_that_was_left(server: LocalServer) -> None:
    """A rewind may go to a snapshot of a branch that another rewind left: its descent is its own."""
    run = begun(server)
    push(server, run, 1, 20)
    server.snapshot("at-20")
    push(server, run, 21, 40)
    server.snapshot("at-40")
    server.registry.rewind("r", "at-20")
    push(server, run, 21, 30)
    server.snapshot("other-30")
    server.registry.rewind("r", "at-40")
    push(server, run, 41, 50)
    assert recipe(server, "at-20").info.num_updates == 20
    assert recipe(server, "at-40").info.num_updates == 40
    with pytest.raises(SynthesisRefused, match=r"did not lead to version 3\.10"):
        recipe(server, "other-30")


def test_reset_empties_the_ring(server: LocalServer) -> None:
    """Averages that begin anew have no snapshots of before."""
    run = begun(server)
    push(server, run, 1, 20)
    run.reset_num_updates()
    run.run.changes.tell()
    idle(server)
    assert (ring_of(run).times, ring_of(run).begin, rows(server)) == ((), None, set())
    push(server, run, 21, 25)
    assert max(ring_of(run).times) <= 5


def test_delete_takes_the_ring(server: LocalServer) -> None:
    """A run's ring goes with the run, also while a snapshot is written."""
    run = begun(server)
    push(server, run, 1, 5)
    run.push(6, as_state(WALKED[6]))
    server.registry.delete("r")
    assert rows(server) == set()
    assert server.data_files("r.*") == []


def test_full_disk_costs_a_snapshot_and_says_so(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a snapshot cannot be written, updates go on, the run says why, and the next one is written again."""
    run = begun(server)
    push(server, run, 1, 5)
    assert server.store is not None
    room = server.store.check_room

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(server.store, "check_room", full)
    push(server, run, 6, 8)
    assert run.version.step == 8
    assert ring_of(run).times[-1] == 5
    assert "No space left on device" in (ring_of(run).trouble or "")
    monkeypatch.setattr(server.store, "check_room", room)
    push(server, run, 9, 9)
    assert (ring_of(run).times[-1], ring_of(run).trouble) == (9, None)


def test_link_in_its_place_costs_the_ring(server: LocalServer, tmp_path: Path) -> None:
    """A symbolic link where the ring lies is not followed: nothing is written or removed behind it."""
    run = begun(server)
    push(server, run, 1, 3)
    [folder] = server.data_files("r.*")
    elsewhere = tmp_path / "elsewhere"
    shutil.move(folder / "ring", elsewhere)
    before = sorted(elsewhere.rglob("*"))
    (folder / "ring").symlink_to(elsewhere)
    push(server, run, 4, 8)
    assert run.version.step == 8
    assert "symbolic link" in (ring_of(run).trouble or "")
    assert sorted(elsewhere.rglob("*")) == before


def test_disk_too_small_is_refused_at_creation(server: LocalServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring that cannot fit is refused before any training, with how much it takes; nothing of the run stays."""
    assert server.store is not None
    room = server.store.check_room

    def small(nbytes: int) -> None:
        if nbytes >= 50 * 4 * (1 + 5 * 3):
            raise OSError(28, f"{nbytes} bytes are too many")
        room(nbytes)

    monkeypatch.setattr(server.store, "check_room", small)
    with pytest.raises(StorageFailed, match=f"{50 * 4 * (1 + 5 * 3)} bytes are too many"):
        server.create("r", as_state(WALKED[0]), posthoc=SMALL)
    assert server.data_files("*") == []
    server.create("r", as_state(WALKED[0]))


def test_memory_for_a_snapshot_under_way_is_counted(
    local_server: Callable[..., LocalServer], small_memory: Callable[[int], Callable[[], Memory]]
) -> None:
    """A run has room for the averages that are held while they are written, or is refused at creation."""
    state = {"w": as_state(WALKED[0])["w"].expand(-1, 5000).contiguous()}
    nbytes = state["w"].numel() * 4
    # At rest four averages, three held for the ring, and a push.
    server = local_server(new_memory=small_memory(int(7.5 * nbytes)))
    with pytest.raises(Overloaded):
        server.create("r", state, posthoc=SMALL)
    server.create("r", state, posthoc=Posthoc(4, "F32", (0.1,)))


@pytest.fixture
def small_memory() -> Callable[[int], Callable[[], Memory]]:

    return lambda limit: lambda: Memory("cpu", limit=limit)


def test_wrong_averages_are_refused(server: LocalServer) -> None:
    """Widths that make no averages are refused by name."""
    for wrong in (Posthoc(sigma_rel=()), Posthoc(sigma_rel=(0.1, 0.1)), Posthoc(sigma_rel=(0.5,))):
        with pytest.raises(InvalidRequest, match="posthoc: "):
            server.create("r", as_state(WALKED[0]), posthoc=wrong)


STEPS = [int(step) for step in np.cumsum(np.random.default_rng(0).integers(1, 8, size=250))]


def exact(server: LocalServer, target: Target, counters: list[int]) -> Synthesis:
    """What the ring's snapshots give, worked out with the counter after each update."""
    ring = ring_of(server.run("r"))
    times = tuple(dict.fromkeys((ring.begin or 0, *ring.times, counters[-1])))
    known = np.array([0, *counters])
    averages = [TrackedAverage(decays_of(power_decay(gamma_of(width)), known), times) for width in ring.sigma_rel]
    return approximate(SnapshotBasis(known, averages), target)


def check_exact(server: LocalServer, counters: list[int]) -> None:
    for target in (SigmaRel(0.1), SigmaRel(0.2), ConstantHalfLife(counters[-1] / 8)):
        [found] = server.registry.synthesiser("r").recipes([target], None, 0.9)
        assert found.synthesis.error == pytest.approx(exact(server, target, counters).error, rel=0.01)


def push_steps(server: LocalServer, run: LocalRun, first: int, last: int) -> None:
    for step in STEPS[first:last]:
        run.push(step, as_state(WALKED[0]))
    idle(server)


def test_steps_are_counted_one_by_one(server: LocalServer) -> None:
    """The error that is told is that of these very updates, however irregular their steps are."""
    run = begun(server, Posthoc(), decay_per="step")
    push_steps(server, run, 0, 250)
    counted = [1, *(1 + step - STEPS[0] for step in STEPS[1:])]
    check_exact(server, counted)


def test_steps_before_a_crash_are_known(server: LocalServer) -> None:
    """Strides come back with the ring's newest snapshot; of later updates their number does."""
    run = begun(server, Posthoc(), decay_per="step")
    push_steps(server, run, 0, 200)
    server.crash()
    server.start()
    server.registry.verify()
    run = server.run("r")
    push_steps(server, run, 200, 250)
    noted = server.registry.synthesiser("r").ring.strides()
    assert noted.updates == 250
    counted = [1, *(1 + step - STEPS[0] for step in STEPS[1:])]
    newest = max(i for i, time in enumerate(counted[:200]) if time in ring_of(run).times)
    assert noted.counters(0, newest + 1).tolist() == counted[: newest + 1]
    check_exact(server, counted)


def test_steps_before_a_rewind_are_known(server: LocalServer) -> None:
    """A rewind keeps the strides up to its snapshot, and notes on from there."""
    run = begun(server, Posthoc(), decay_per="step")
    push_steps(server, run, 0, 150)
    server.snapshot("s")
    push_steps(server, run, 150, 220)
    server.registry.rewind("r", "s")
    run.push(STEPS[149] + 3, as_state(WALKED[0]))
    idle(server)
    counted = [1, *(1 + step - STEPS[0] for step in STEPS[1:150])]
    noted = server.registry.synthesiser("r").ring.strides()
    assert noted.counters(0, 999).tolist() == [*counted, counted[-1] + 3]
    check_exact(server, [*counted, counted[-1] + 3])
