"""One place of a cluster, for an engine that starts processes elsewhere (Ray): the programs that are to run there.

    engine's process (an actor)                         programs, its children
      Agent.word(), once a second --- a byte --------->  host          ends with the agent, or once its lease is over
      Agent.url, state()          <-- what they print -  gateway       or, in the place of both, a replica

The engine says a word whenever it was heard, and where the coordinator is by now; the word goes on to the host as a
sign of life (ema_service.tether), the coordinator's URL into a file that host and gateway read (whereabouts). While the
engine is not heard nothing is started again: an agent that is cut off may have been replaced.

A gateway's URL stands in the file ``gateway`` of the folder as well, for clients that know no engine: of several
gateways that share a folder the latest, for one is as good as another.

Nothing here raises once it is made: what fails is tried again, and told by state().

Knows the programs of a place, and which of them must run before which. Does not know the engine.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from urllib.parse import urlsplit

from ema_service.addresses import announced
from ema_service.cluster.launching.launcher import Tls, free_port, host_command, write_secret
from ema_service.cluster.launching.supervising import Event, Program, Signalled, Supervisor
from ema_service.cluster.token import ClusterToken
from ema_service.tether import GRACE

__all__ = ["Agent", "State", "Task"]

#: Seconds between two looks for a word, and after which an engine that said none is not heard.
_LOOK_SECONDS, _HEARD_SECONDS = 0.2, 5.0
#: Seconds before a start is tried again that failed at the data dir, say.
_AGAIN_SECONDS = 1.0
_PROBE_SECONDS = 2.0
_TETHERED = [sys.executable, "-m", "ema_service.tether", "ema_service", "cluster"]
_LISTENS = re.compile(r"listens on (https?://\S+)")


@dataclass(frozen=True, slots=True)
class Task:
    """What is to run at one place.

    place: of a host, among ``of``; None for the coordinator. folder: of the host's data. token: of the cluster. listen:
    the address that all programs listen on. port: of the gateway, 0 for any. flags: of ``ema-service serve``. lease:
    seconds, as in Lease(). tls: of all programs; None for plain HTTP. twins: whether the later half of the hosts are
    twins of the earlier half. replica: the number of a replica of the host, which runs here in the host's place;
    replica_token: a file of the node with the token that it reads with.
    """

    place: int | None
    of: int
    folder: Path
    token: str = field(repr=False)
    listen: str = "0.0.0.0"
    port: int = 0
    flags: tuple[str, ...] = ()
    lease: float = 10.0
    tls: Tls | None = None
    twins: bool = False
    replica: int | None = None
    replica_token: Path | None = None

    @property
    def program(self) -> str:
        """The name of the program whose address is the place's: of a host the gateway beside it."""
        if self.place is None:
            return "coordinator"
        return "gateway" if self.replica is None else f"replica {self.replica} of host {self.place}"


@dataclass(frozen=True, slots=True)
class State:
    """How a place stands. ready: whether it takes all requests. url: of the coordinator, of a host's gateway, or of a
    replica; empty while it is not known. said: the latest line of each program, for whoever waits. pids: of the agent's
    own process, and of those that run here."""

    place: int | None
    of: int
    ready: bool
    url: str
    said: dict[str, str]
    pids: tuple[int, ...]


class Agent:
    """Keeps the programs of one place running, on a thread, from start() to end(). Thread-safe."""

    def __init__(self, task: Task, machine: str, say: Callable[[str], None]) -> None:
        """machine: by which name others reach this one. say: called with each line that a program prints."""
        self._task = task
        self._machine = machine
        self._say = say
        self._events: SimpleQueue[Event] = SimpleQueue()
        #: When the engine was heard, and where the coordinator was by then.
        self._word: tuple[float, str | None] = float("-inf"), None
        self._urls: dict[str, str] = {}
        self._said: dict[str, str] = {}
        self._pids: tuple[int, ...] = (os.getpid(),)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="ema-agent", daemon=True)

    def start(self) -> None:
        """Begin. Programs start with the engine's first word."""
        self._thread.start()

    def word(self, coordinator: str | None = None) -> None:
        """The engine was heard. coordinator: its URL, if it is known."""
        self._word = time.monotonic(), coordinator or self._word[1]

    def end(self) -> None:
        """End all programs, as SIGTERM does, and start none any more."""
        self._ending.set()
        self._events.put(Signalled())
        self._thread.join(GRACE + 10.0)

    @property
    def url(self) -> str:
        """Of the coordinator, of a host's gateway, or of a replica; empty while it is not known."""
        return self._urls.get(self._task.program, "")

    def state(self) -> State:
        """How this place stands; asks the gateway."""
        return State(self._task.place, self._task.of, self._is_ready(), self.url, dict(self._said), self._pids)

    # ----------------------------------------------------------------------------------------------------------------

    def _is_ready(self) -> bool:
        if not self.url:
            return False
        path = "healthz" if self._task.place is None else "readyz"
        try:
            with urllib.request.urlopen(f"{self.url}/{path}", timeout=_PROBE_SECONDS) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _keep(self) -> None:
        with tempfile.TemporaryDirectory(prefix="ema-") as secrets:
            while not self._ending.is_set():
                try:
                    with Supervisor(self._events, self._hear, self._is_heard) as supervisor:
                        self._run(supervisor, Path(secrets))
                except (OSError, ValueError) as fault:  # of the data dir, most likely: it may be mounted later
                    self._hear("agent", f"{type(fault).__name__}: {fault}")
                    self._ending.wait(_AGAIN_SECONDS)

    def _run(self, supervisor: Supervisor, secrets: Path) -> None:
        """Start all once the engine was heard, and keep them until the end. Raises OSError, ValueError."""
        programs, told, where = None, float("-inf"), ""
        data = self._task.folder / f"host-{self._task.place}" if self._task.replica is None else secrets
        while not self._ending.is_set():
            at, coordinator = self._word
            if coordinator and coordinator != where and self._task.place is not None:
                _write_line(data / "coordinator", where := coordinator)
            if programs is None and self._is_heard() and (where or self._task.place is None):
                programs = self._coordinator(secrets) if self._task.place is None else self._member(data)
                for program in programs:
                    supervisor.keep(program)
            if at > told and programs:
                told = at
                supervisor.tell(programs[0].name, b"\n")
            supervisor.next(_LOOK_SECONDS)
            self._pids = os.getpid(), *supervisor.pids()

    def _is_heard(self) -> bool:
        return time.monotonic() - self._word[0] < _HEARD_SECONDS

    @property
    def _listening(self) -> list[str]:
        """The flags that all programs have."""
        return ["--host", self._task.listen, *(self._task.tls.flags if self._task.tls else ())]

    def _coordinator(self, secrets: Path) -> list[Program]:
        """The coordinator. secrets: a folder that ends with the agent."""
        file = secrets / "cluster-token"
        write_secret(file, self._task.token)
        # The port stays as long as this agent, so hosts go on without being told.
        port = ["--port", str(free_port(self._task.listen))]
        flags = [*self._listening, *port, "--cluster-token-file", str(file)]
        return [Program("coordinator", [*_TETHERED, "coordinator", *flags])]

    def _member(self, data: Path) -> list[Program]:
        """A replica; or a host and its gateway, the host first, for which a word is. data: the folder with the file
        that says where the coordinator is."""
        task, of = self._task, f"{self._task.place}/{self._task.of}"
        found = ["--coordinator", (data / "coordinator").as_uri()]
        if task.replica is None:
            member = ["--shard", of, "--lease", f"{task.lease:g}", *(["--twins"] if task.twins else [])]
        else:
            member = ["--replica-of", of]
            member += ["--replica-token-file", str(task.replica_token)] if task.replica_token else []
        # Later flags win: those of the user stand last.
        announcing = [*self._listening, "--port", "0", "--announce", self._machine, *task.flags]
        serve = host_command(data, ClusterToken(task.token), [*member, *found, *announcing])
        if task.replica is not None:
            return [Program(task.program, serve)]
        gateway = [*self._listening, "--port", str(task.port or free_port(task.listen)), *found]
        gateway += ["--insecure-no-auth"] if "--insecure-no-auth" in task.flags else []
        gateway += ["--cluster-token-file", str(data / "cluster-token")]
        return [Program(f"host {task.place}", serve), Program("gateway", [*_TETHERED, "gateway", *gateway])]

    def _hear(self, name: str, line: str) -> None:
        """A line that one of the programs has printed."""
        if found := _LISTENS.search(line):
            said = urlsplit(found[1])
            self._urls[name] = announced(self._machine, said.port or 0, secure=said.scheme == "https")
            if name == "gateway":
                with contextlib.suppress(OSError):  # whoever has Ray, or was told the address, does without
                    _write_line(self._task.folder / "gateway", self._urls[name])
        self._said[name] = line
        self._say(f"{name} | {line}")


def _write_line(path: Path, line: str) -> None:
    """A file of one line, all of it or none."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = path.with_name(f"{path.name}.new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    new.write_text(f"{line}\n")
    new.rename(path)
