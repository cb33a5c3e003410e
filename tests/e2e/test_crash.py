"""kill -9 at every phase: nothing acknowledged is lost, nothing is applied twice.

Two servers hold a run of each durability: one has memory files for ``process``, the other slots on disk. Each test has
one of them killed at one named phase of one request (processes/dying.py), starts it again and compares every bit with
LitEma in this process.

Knows processes, signals and plain HTTP. Does not know how a run is kept; power loss is simulated in
tests/service/persistence/test_versions.py, a reboot in test_memory_versions.py beside it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from safetensors.torch import load, save

from ema_client import EmaClient
from tests.e2e.tracked import LARGE, Tracked, params
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle, PlainRun, ServerProcess

WAIT_SECONDS = 30.0
DYING = Path(__file__).parent / "processes" / "dying.py"


class Life:
    """A server that is killed again and again, and its runs."""

    def __init__(self, server: ServerProcess, plain_run: type[PlainRun], litema: type[LitEmaOracle]) -> None:
        self.server = server
        self._phase = server.folder / "phase"
        server.program = (str(DYING), str(self._phase))
        server.start()
        self._plain_run = plain_run
        self.http = server.http()
        self.runs = {name: Tracked(self.plain(name), litema, name) for name in ("process", "disk")}

    def plain(self, name: str) -> PlainRun:
        return self._plain_run(self.http, name)

    def doom(self, phase: str, act: Callable[[], object]) -> None:
        """Do what makes the server die at the phase; it is dead then, and starts again."""
        self._phase.write_text(phase)
        with contextlib.suppress(httpx.TransportError, RuntimeError):
            act()
        assert self.server.process.wait(WAIT_SECONDS) == -signal.SIGKILL, f"{phase} was never reached"
        self._phase.unlink()
        self.start()

    def start(self) -> None:
        self.http.close()
        self.server.start()
        self.http = self.server.http()
        for name, tracked in self.runs.items():
            tracked.run = self.plain(name)

    def check(self) -> None:
        for tracked in self.runs.values():
            tracked.check()

    def end(self) -> None:
        self.http.close()
        if self.server.process.poll() is None:
            self.server.kill()


MakeLife = Callable[..., Life]

#: A folder that cannot be made: versions of durability ``process`` go to slots on disk.
NO_MEMORY = ("--ram-dir", "/proc/no/such/folder")


@pytest.fixture(scope="module")
def make_life(
    tmp_path_factory: pytest.TempPathFactory,
    server_class: type[ServerProcess],
    plain_run_class: type[PlainRun],
    litema: type[LitEmaOracle],
) -> Iterator[MakeLife]:
    begun: list[Life] = []

    def make(*arguments: str) -> Life:
        folder = tmp_path_factory.mktemp("life")
        server = server_class(folder, ("--checkpoint-interval", "0.1", *arguments), folder / "data")
        begun.append(Life(server, plain_run_class, litema))
        return begun[-1]

    yield make
    for each in begun:
        each.end()


@pytest.fixture(scope="module")
def life(make_life: MakeLife) -> Life:
    """A server whose runs of durability ``process`` lie in memory files."""
    made = make_life()
    assert made.runs["process"].run.info()["versions_in"] == "memory files"
    return made


@pytest.fixture(scope="module")
def life_in_slots(make_life: MakeLife) -> Life:
    """A server that writes each version of ``process`` to a slot on disk, for want of memory."""
    made = make_life(*NO_MEMORY)
    assert made.runs["process"].run.info()["versions_in"].startswith("slots on disk")
    return made


def _plain(phase: str) -> str:
    """The phase as a name of a run or snapshot."""
    return phase.replace(" ", "-").replace("'", "")


#: phase -> whether the update is there after it
PUSH_PHASES = {
    "receiving": False,
    "half of a slot by ema-apply": False,
    "slot without its header": False,
    "half of a slot by ema-write": False,
    "before the row": False,
    "row committed": True,
    "before the memory's row": False,
    "memory's row committed": True,
}
SLOT_PHASES = ["receiving", "half of a slot by ema-apply", "slot without its header", "before the row", "row committed"]


#: Of versions in slots: `process` keeps its there where memory files cannot be, and takes the same way.
DURABILITIES = ["disk", pytest.param("process", marks=pytest.mark.soak)]


@pytest.mark.parametrize("phase", SLOT_PHASES)
@pytest.mark.parametrize("durability", DURABILITIES)
def test_kill_in_a_push(durability: str, phase: str, life_in_slots: Life) -> None:
    """Killed in a push: it is there or not, whole; sent again it is applied once. The slots were in use before."""
    _kill_in_a_push(life_in_slots, durability, phase)


@pytest.mark.parametrize("phase", ["receiving", "before the memory's row", "memory's row committed"])
def test_kill_in_a_push_to_memory(phase: str, life: Life) -> None:
    """The same where the version lies in memory files, and is the run's by its row alone."""
    _kill_in_a_push(life, "process", phase)


def _kill_in_a_push(life: Life, durability: str, phase: str) -> None:
    tracked = life.runs[durability]
    while tracked.step < 4:
        tracked.push()
    life.doom(phase, tracked.push)
    if PUSH_PHASES[phase]:
        tracked.applied()
    life.check()
    step = tracked.step + (0 if PUSH_PHASES[phase] else 1)
    state = life.http.get(f"{tracked.run.path}/updates/{step}").json()["state"]
    assert state == ("applied" if PUSH_PHASES[phase] else "unknown")
    again = tracked.run.push(step, params(step)).raise_for_status().json()
    assert again["applied"] is not PUSH_PHASES[phase]
    if again["applied"]:
        tracked.applied()
    tracked.push()

    life.check()


@pytest.mark.parametrize("phase", ["receiving", "half of a slot by ema-write", "before the row"])
@pytest.mark.parametrize("durability", DURABILITIES)
def test_kill_while_threads_receive_and_write(
    durability: str, phase: str, life_in_slots: Life, litema: type[LitEmaOracle]
) -> None:
    """As above, of a push that one thread receives while another writes what it makes past the page cache."""
    _kill_large(life_in_slots, durability, phase, litema)


@pytest.mark.parametrize("phase", ["receiving", "before the memory's row", "memory's row committed"])
def test_kill_while_a_thread_receives_into_memory(phase: str, life: Life, litema: type[LitEmaOracle]) -> None:
    """As above, of a push that one thread receives into a memory file and averages there."""
    _kill_large(life, "process", phase, litema)


def _kill_large(life: Life, durability: str, phase: str, litema: type[LitEmaOracle]) -> None:
    name = f"large-{durability}-{_plain(phase)}"
    tracked = life.runs[name] = Tracked(life.plain(name), litema, durability, LARGE)
    try:
        for _ in range(4):
            tracked.push()
        life.doom(phase, tracked.push)
        if PUSH_PHASES[phase]:
            tracked.applied()
        life.check()
        tracked.push()
        life.check()
    finally:
        life.http.delete(life.runs.pop(name).run.path).raise_for_status()


SYNC_PHASES = ["before a sync", "after a sync", "before the anchor's row", "after the anchor's row"]


@pytest.mark.parametrize("phase", SYNC_PHASES)
def test_kill_in_a_sync(phase: str, life_in_slots: Life) -> None:
    """Killed while versions are synced behind the updates: every acknowledged update is there."""
    _push_until_it_dies(life_in_slots, phase)


def _push_until_it_dies(life: Life, phase: str) -> None:
    tracked = life.runs["process"]

    def push() -> None:
        for _ in range(1000):
            tracked.push()

    # The push that the server dies in may have been committed without its answer.
    life.doom(phase, push)
    if tracked.run.info()["step"] == tracked.step + 1:
        tracked.applied()
    life.check()
    tracked.push()
    life.check()


#: Of the checkpoint of a run in memory files, which is written while updates go on.
CHECKPOINT_PHASES = ["half of a slot by ema-files", "slot without its header", "before a sync", "after a sync"]


@pytest.mark.parametrize("phase", CHECKPOINT_PHASES)
def test_kill_in_a_checkpoint_of_memory(phase: str, life: Life) -> None:
    """Killed while a checkpoint is under way: the newest version is in memory, whatever became of the checkpoint."""
    _push_until_it_dies(life, phase)


STOP_PHASES = [
    *CHECKPOINT_PHASES,
    "before the row",
    "row committed",
    "before the memory's row goes",
    "the memory's row is gone",
    "half of the memory is gone",
]


@pytest.mark.parametrize(
    "phase",
    [pytest.param(phase, marks=[pytest.mark.soak] if number % 3 else []) for number, phase in enumerate(STOP_PHASES)],
)
def test_kill_in_a_clean_stop(phase: str, make_life: MakeLife) -> None:
    """Killed while the memory is brought to the disk and given back: nothing is lost, and no memory stays behind."""
    life = make_life("--checkpoint-interval", "1000")
    try:
        for _ in range(3):
            for tracked in life.runs.values():
                tracked.push()
        life.http.close()
        life.doom(phase, life.server.stop)
        life.check()
        for tracked in life.runs.values():
            tracked.push()
        life.http.close()
        life.server.stop()
        assert _memory_files(life) == []
        life.start()
        life.check()
    finally:
        life.end()


def _memory_files(life: Life) -> list[Path]:
    """What of this server's memory is there."""
    ram_dir = Path(os.environ["EMA_SERVICE_RAM_DIR"])
    owners = (path for path in ram_dir.glob("*/owner") if str(life.server.data_dir) in path.read_text())
    return [path for owner in owners for path in owner.parent.iterdir() if path != owner]


def test_release_of_a_killed_server(life: Life) -> None:
    """The command brings a killed server's memory to its disk, and frees it; the server goes on from there."""
    life.runs["process"].push()
    life.http.close()
    life.server.kill()
    assert _memory_files(life) != []
    command = [sys.executable, "-m", "ema_service", "release", "--data-dir", str(life.server.data_dir)]
    elsewhere = [*command, "--ram-dir", str(life.server.data_dir.parent / "elsewhere")]
    ended = subprocess.run(elsewhere, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "give the --ram-dir that its server had" in ended.stderr
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"process: step {life.runs['process'].step} is on disk" in ended.stdout
    assert _memory_files(life) == []
    life.start()

    life.check()
    life.runs["process"].push()
    life.check()


def test_release_beside_a_server(life: Life) -> None:
    """While the server runs, the command touches nothing and says why."""
    command = [sys.executable, "-m", "ema_service", "release", "--data-dir", str(life.server.data_dir)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert ended.returncode == 1
    assert "another server uses the data dir" in ended.stderr
    life.check()


@pytest.mark.parametrize("durability", DURABILITIES)
@pytest.mark.parametrize("phase", ["before a change", "after a change"])
def test_kill_in_a_change_of_decay(phase: str, durability: str, life: Life) -> None:
    """Killed while a decay is changed: it has the one or the other value, and the weights are as they were."""
    tracked = life.runs[durability]
    life.doom(phase, lambda: life.http.patch(tracked.run.path, json={"decay": 0.75}))
    decay = tracked.run.info()["decay"]
    life.http.patch(tracked.run.path, json={"decay": 0.9999}).raise_for_status()

    assert decay == (0.75 if phase == "after a change" else 0.9999)
    life.check()


# One thread writes initial weights.
@pytest.mark.parametrize(
    "phase",
    [
        pytest.param(phase, marks=[pytest.mark.soak] if number % 3 else [])
        for number, phase in enumerate(PUSH_PHASES)
        if phase != "half of a slot by ema-write"
    ],
)
def test_kill_while_initial_weights_come_anew(
    phase: str, life: Life, life_in_slots: Life, litema: type[LitEmaOracle]
) -> None:
    """Killed while a trainer gives other initial weights: the run has the ones or the others, whole; it is given them
    again, and what follows is LitEma's that began with them."""
    moved = PUSH_PHASES[phase]
    each = life_in_slots if phase in SLOT_PHASES else life
    tracked = Tracked(each.plain(_plain(f"anew-{phase}")), litema, "process")
    each.runs[tracked.run.name] = tracked

    def give() -> httpx.Response:
        run = tracked.run
        return run.http.put(f"{run.path}/weights", content=save(params(9)), params={"replaces": "1.0"})

    try:
        each.doom(phase, give)
        found, [ours, others] = tracked.run.weights(average="fast"), [params(0), params(9)]
        assert tracked.run.info()["version"] == ("2.0" if moved else "1.0")
        assert all(torch.equal(value, (others if moved else ours)[name]) for name, value in found.items())
        assert give().json()["version"] == "2.0"
        oracle = litema(others, 0.5)
        tracked.run.push(1, params(1)).raise_for_status()
        oracle.update(params(1))
        assert all(torch.equal(tracked.run.weights(average="fast")[name], oracle.shadow[name]) for name in found)
    finally:
        del each.runs[tracked.run.name]


#: Of an addition and of a removal -> whether it has happened then. What a removal writes of a version first, where a
#: checkpoint has not written it already, has its phases in the tests of checkpoints and syncs.
AVERAGE_PHASES = {
    ("add", "memory taken"): False,
    ("add", "room of an average taken"): False,
    ("add", "before the averages' row"): False,
    ("add", "averages' row committed"): True,
    ("remove", "before the averages' row"): False,
    ("remove", "averages' row committed"): True,
    ("remove", "before an average's files go"): True,
    ("remove", "half of an average's files are gone"): True,
}
#: Where versions lie, and what is not done there.
AVERAGE_PLACES = {"memory": set[str](), "slots": {"memory taken"}, "disk": {"memory taken"}}


def _average_cases() -> Iterator[Any]:
    """Each phase in one place; in the others when soaking."""
    for number, (change, phase) in enumerate(AVERAGE_PHASES):
        places = [place for place, never in AVERAGE_PLACES.items() if phase not in never]
        for place in places:
            marks = [] if place == places[number % len(places)] else [pytest.mark.soak]
            yield pytest.param(place, change, phase, marks=marks)


@pytest.mark.parametrize(("place", "change", "phase"), list(_average_cases()))
def test_kill_in_a_change_of_averages(
    place: str, change: str, phase: str, life: Life, life_in_slots: Life, litema: type[LitEmaOracle]
) -> None:
    """Killed while an average is added or removed: the run has the old ones or the new ones, each with every bit; the
    change is asked for again, and then nothing of a removed average is left on the disk or in memory."""
    each = life if place == "memory" else life_in_slots
    name = f"{place}-{change}-{_plain(phase)}"
    tracked = Tracked(each.plain(name), litema, "disk" if place == "disk" else "process")
    each.runs[name] = tracked

    def act() -> httpx.Response:
        run = tracked.run
        if change == "add":
            return run.http.post(f"{run.path}/averages", json={"name": "late", "decay": 0.25})
        return run.http.delete(f"{run.path}/averages/slow")

    try:
        for _ in range(4):
            tracked.push()
        each.doom(phase, act)
        done = AVERAGE_PHASES[change, phase]
        tracked.added("late", 0.25) if change == "add" and done else None
        tracked.removed("slow") if change == "remove" and done else None
        each.check()
        expected = {"add": (201, 200), "remove": (204, 404)}[change][done]
        assert act().status_code == expected
        if not done:
            tracked.added("late", 0.25) if change == "add" else tracked.removed("slow")
        each.check()
        for _ in range(5):
            tracked.push()
        each.check()
        assert each.server.data_dir
        [folder] = (each.server.data_dir / "runs").glob(f"{name}.*")
        names = {"slow", "fast", "late"} if change == "add" else {"fast"}
        assert {path.stem for path in folder.glob("slots/*/*")} == names
        if place == "memory":
            prefix = f"{folder.suffix[1:]}."

            def has_two() -> bool:
                """A reader's version is kept for a moment, and its files go with a later update."""
                tracked.push()
                return sum(path.name.startswith(prefix) for path in _memory_files(each)) == 2 * len(names)

            wait_until(has_two, "the files of two versions, and no others")
    finally:
        each.http.delete(each.runs.pop(name).run.path).raise_for_status()


@pytest.mark.parametrize("phase", ["half of a snapshot", "snapshot before its row", "snapshot committed"])
def test_kill_in_a_snapshot(phase: str, life: Life) -> None:
    """Killed while a snapshot is taken: it is not there or it is whole; asked for again it is of that version."""
    run = life.runs["process"].run
    name = _plain(phase)
    life.doom(phase, lambda: run.http.put(f"{run.path}/snapshots/{name}"))
    run = life.runs["process"].run
    found = run.http.get(f"{run.path}/snapshots/{name}").status_code
    again = run.http.put(f"{run.path}/snapshots/{name}")
    weights = load(run.http.get(f"{run.path}/snapshots/{name}/weights").content)

    assert (found, again.status_code) == ((200, 200) if phase == "snapshot committed" else (404, 201))
    assert all(torch.equal(weights[each], value) for each, value in run.weights().items())
    life.check()


@pytest.mark.parametrize("phase", ["half of a restart", "memory attached"])
def test_kill_in_a_restart(phase: str, life: Life) -> None:
    """Killed while it comes back: the next start brings everything back all the same."""
    life.server.kill()
    life.doom(phase, life.server.start)

    life.check()


@pytest.mark.parametrize("phase", ["before a run's row", "run's row committed", "memory taken"])
def test_kill_in_a_creation(phase: str, life: Life) -> None:
    """Killed while a run is created: it is there or not; created again it can be used."""
    name = _plain(phase)
    life.doom(phase, lambda: life.plain(name).create(params(0)))
    run = life.plain(name)
    assert run.create(params(0)).status_code == (201 if phase == "before a run's row" else 200)
    run.begin(params(0)).raise_for_status()

    assert run.push(1, params(1)).json()["applied"]


@pytest.mark.parametrize("phase", ["before a deletion", "half of a deletion"])
def test_kill_in_a_deletion(phase: str, life: Life) -> None:
    """Killed while a run is deleted: it is whole or gone, and no files of it stay behind."""
    name = _plain(phase)
    run = life.plain(name)
    run.create(params(0)).raise_for_status()
    run.begin(params(0)).raise_for_status()
    life.doom(phase, lambda: life.http.delete(run.path))
    run = life.plain(name)
    assert life.server.data_dir is not None
    folders = list((life.server.data_dir / "runs").glob(f"{name}.*"))

    if phase == "before a deletion":
        assert torch.equal(run.weights()["w"], params(0)["w"])
        assert len(folders) == 1
    else:
        assert life.http.get(run.path).status_code == 404
        assert folders == []


def test_kill_in_a_checkpoint(life: Life) -> None:
    """Killed while a checkpoint of a run of durability memory is half written: the one before comes back, whole."""
    run = life.plain("memory")
    run.create(params(0), durability="memory").raise_for_status()
    run.begin(params(0)).raise_for_status()
    run.push(1, params(1)).raise_for_status()
    wait_until(lambda: run.info()["durable_step"] == 1, "a checkpoint")
    kept = run.weights()
    life.doom("half of a slot by ema-files", lambda: run.push(2, params(2)))
    run = life.plain("memory")

    assert (run.info()["step"], run.info()["version"]) == (1, "2.1")
    assert all(torch.equal(value, kept[name]) for name, value in run.weights().items())
    life.http.delete(run.path).raise_for_status()


def test_server_dies_under_a_trainer(life: Life, litema: type[LitEmaOracle]) -> None:
    """A trainer that pushes while its server is killed and started again ends with the EMA it would have had anyway."""
    oracle, done = litema(params(0)), threading.Event()

    def train() -> None:
        with EmaClient(life.server.uds) as client:
            client.create_run("trained", params(0))
            for step in range(1, 41):
                client.push("trained", params(step), step=step)
                oracle.update(params(step))
        done.set()

    trainer = threading.Thread(target=train)
    trainer.start()
    for moment in (5, 20):
        wait_until(lambda at=moment: int(oracle.num_updates) >= at, "the trainer's progress")  # type: ignore[misc]
        life.server.kill()
        life.start()
    trainer.join(60)
    assert done.is_set()
    run = life.plain("trained")

    assert (run.info()["num_updates"], run.info()["version"]) == (40, "1.40")
    assert all(torch.equal(value, oracle.shadow[name]) for name, value in run.weights().items())
    life.check()
