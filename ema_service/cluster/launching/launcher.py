"""A cluster at once: one coordinator, k hosts, their replicas and a gateway as processes of this machine, or the hosts
of others.

    ema-service cluster up
      |-- coordinator     here
      |-- gateway         here: the address that is told
      |-- host 0 ... k-1  here, or through ``ssh MACHINE ema-service cluster host ...``
      |-- replicas        so, too: of a host the first on the machine of the next host, and so on

Everything that is kept is in one folder: each host's data dir, and the cluster's token, which no command line shows:
hosts and replicas read it from their standard input. All end with the launcher, those elsewhere with the connection to
them.

Knows the command line of each program, and what a started one prints. Does not know how processes are kept running
(supervising), or what they do.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shlex
import socket
import stat
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

from ema_service.addresses import announced
from ema_service.cluster.launching.supervising import Ended, Program, Signalled, Supervisor, caught_signals
from ema_service.cluster.token import ClusterToken, read_cluster_token
from ema_service.tls import why_no_tls

__all__ = ["LaunchFailed", "Plan", "RunsAlready", "Tls", "free_port", "host_command", "launch", "write_secret"]

#: Reaches a machine: no questions, and an end 15 seconds after the machine's.
THROUGH = "ssh -o BatchMode=yes -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
#: Seconds until all is ready: hosts bring large runs back before they answer, and one that comes back empty is filled
#: from its twin, while the others are at work already.
_READY_SECONDS = 3600.0
_LOOK_SECONDS = 0.1
_PROBE_SECONDS = 5.0
_TOKEN, _LOCK = "cluster-token", "up.lock"
_LISTENS = re.compile(r"listens on (https?://\S+)")


class LaunchFailed(Exception):
    """The cluster cannot be started; the text says why."""


class RunsAlready(Exception):
    """The cluster of this folder is running, or about to; the text says where."""


@dataclass(frozen=True, slots=True)
class Tls:
    """What all programs speak TLS with, each of them files of its machine. certfile, keyfile: PEM. authority: the
    certificate of the authority that they trust; None for those that a machine knows."""

    certfile: Path
    keyfile: Path
    authority: str | None = None

    @property
    def flags(self) -> list[str]:
        """Of the programs."""
        return ["--ssl-certfile", str(self.certfile), "--ssl-keyfile", str(self.keyfile)]

    @property
    def environment(self) -> dict[str, str]:
        """Of the programs."""
        return {} if self.authority is None else {"SSL_CERT_FILE": self.authority}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be started.

    folder: of what is kept. machines: where each host is to be, None for here. host, port: of the gateway. through:
    the command before a machine's name. flags: of ``ema-service serve``, for each host. twins: whether the later half
    of the hosts have the shards of the earlier half once more. name: by which other machines reach this one, None to
    find out. replicas: so many of each host, or of each two that are twins, which are read in its place; replica_token:
    a file of their machine with the token that they read with. tls: None for plain HTTP.
    """

    folder: Path
    machines: Sequence[str | None]
    host: str
    port: int
    through: str = THROUGH
    flags: Sequence[str] = ()
    twins: bool = False
    name: str | None = None
    replicas: int = 0
    replica_token: Path | None = None
    tls: Tls | None = None

    @property
    def followed(self) -> range:
        """The places of the hosts that have replicas: of twins the earlier ones, of either of whom a replica has
        everything."""
        return range(len(self.machines) // 2 if self.twins else len(self.machines))

    @property
    def here(self) -> bool:
        """Whether all hosts are on this machine."""
        return all(machine is None for machine in self.machines)


def launch(plan: Plan, ready: Callable[[str], None], say: Callable[[str], None]) -> None:
    """Start all, call ``ready`` with the gateway's address once every host takes requests, and keep all running until
    SIGINT or SIGTERM. say: called with each line that one of them prints, and with what becomes of them.

    Raises RunsAlready; LaunchFailed where one does not come up; OSError.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    with (plan.folder / _LOCK).open("a+") as lock:
        _take(lock.fileno(), plan.folder)
        token_file = _token_file(plan.folder)
        events: SimpleQueue[Ended | Signalled] = SimpleQueue()
        with caught_signals(events):
            _Launch(plan, token_file, lock.fileno(), say).run(events, ready)


def host_command(data_dir: Path, token: ClusterToken, flags: Sequence[str]) -> list[str]:
    """The command that a host's process becomes. The token is kept beside the data, for this user's eyes."""
    data_dir.mkdir(parents=True, exist_ok=True)
    path = data_dir / _TOKEN
    write_secret(path, token.header.partition(" ")[2])
    serve = ["serve", "--data-dir", str(data_dir), "--cluster-token-file", str(path), *flags]
    return [sys.executable, "-m", "ema_service.tether", "ema_service", *serve]


class _Launch:
    """One cluster from its start to its end."""

    def __init__(self, plan: Plan, token_file: Path, lock: int, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._lock = lock
        self._say = say
        self._token_file = token_file
        self._token = read_cluster_token(token_file)
        self._urls: dict[str, str] = {}
        self._hosts = [f"host {place}" for place in range(len(plan.machines))]
        self._replicas = [
            f"replica {i} of {self._hosts[place]}" for place in plan.followed for i in range(plan.replicas)
        ]

    def run(self, events: SimpleQueue[Ended | Signalled], ready: Callable[[str], None]) -> None:
        """Start all, and end all at a signal. Raises LaunchFailed."""
        with Supervisor(events, self._hear) as supervisor:
            for program in self._programs():
                supervisor.keep(program)
            try:
                if self._come_up(supervisor):
                    url = self._urls["gateway"]
                    _note(self._lock, {"pid": os.getpid(), "url": url})
                    ready(url)
                    self._stay(supervisor)
            finally:
                # A gateway takes no more, hosts finish what they have, and the coordinator decides that until then.
                supervisor.end("gateway", *self._replicas)
                supervisor.end(*self._hosts)
                _note(self._lock, {})

    def _programs(self) -> list[Program]:
        """All programs, in the order of their start."""
        plan = self._plan
        bind = "127.0.0.1" if plan.here else "0.0.0.0"  # where a token is asked for
        port = free_port(bind)
        coordinator = announced(bind, port, secure=plan.tls is not None, name=None if plan.here else plan.name)
        shared = ["--cluster-token-file", str(self._token_file), *(plan.tls.flags if plan.tls else ())]
        gateway_port = plan.port or free_port(plan.host)
        deciding = ["coordinator", "--host", bind, "--port", str(port), *shared]
        merging = ["gateway", "--host", plan.host, "--port", str(gateway_port), "--coordinator", coordinator, *shared]
        return [
            Program("coordinator", _here("ema_service.tether", "ema_service", "cluster", *deciding), for_good=0),
            *(self._host(place, coordinator) for place in range(len(plan.machines))),
            *(self._replica(number, coordinator) for number in range(len(self._replicas))),
            Program("gateway", _here("ema_service.tether", "ema_service", "cluster", *merging)),
        ]

    def _host(self, place: int, coordinator: str) -> Program:
        """One host, here or elsewhere."""
        plan = self._plan
        flags = ["--shard", f"{place}/{len(plan.machines)}", *(["--twins"] if plan.twins else [])]
        flags += ["--coordinator", coordinator]
        return self._server(self._hosts[place], plan.machines[place], f"host-{place}", flags)

    def _replica(self, number: int, coordinator: str) -> Program:
        """One replica. It finds its host by the coordinator, and is found so. It is not on its host's machine, whose
        link it is to spare, where there are several."""
        plan = self._plan
        place, nth = divmod(number, plan.replicas)
        flags = ["--replica-of", f"{place}/{len(plan.machines)}", "--coordinator", coordinator]
        flags += ["--replica-token-file", str(plan.replica_token)] if plan.replica_token else []
        machine = plan.machines[(place + 1 + nth) % len(plan.machines)]
        return self._server(self._replicas[number], machine, f"replica-{place}-{nth}", flags)

    def _server(self, name: str, machine: str | None, folder: str, flags: list[str]) -> Program:
        """`ema-service serve`, here or on another machine, with a folder of its own beside the others'."""
        plan = self._plan
        said = f"{self._token.header.partition(' ')[2]}\n".encode()
        # Later flags win: those of the user stand last.
        words = [
            "--data-dir",
            str(plan.folder / folder),
            "--",
            *flags,
            "--port",
            "0",
            *(plan.tls.flags if plan.tls else ()),
        ]
        if machine is None:
            return Program(name, _here("ema_service", "cluster", "host", *words, *plan.flags), said)
        words += ["--host", "0.0.0.0"]
        command = ["ema-service", "cluster", "host"]
        if plan.tls:  # a certificate is for names, as a rule, and not for addresses
            words += ["--announce", machine.rpartition("@")[2]]
            command = ["env", *(f"{key}={value}" for key, value in plan.tls.environment.items()), *command]
        return Program(name, [*shlex.split(plan.through), machine, shlex.join([*command, *words, *plan.flags])], said)

    def _come_up(self, supervisor: Supervisor) -> bool:
        """Whether all are ready, and nobody has asked to stop meanwhile. Raises LaunchFailed."""
        until = time.monotonic() + _READY_SECONDS
        while time.monotonic() < until:
            event = supervisor.next(_LOOK_SECONDS)
            if isinstance(event, Signalled):
                return False
            if isinstance(event, Ended):
                if event.status >= 0:
                    raise LaunchFailed(f"{event.name} ended with status {event.status}: its lines above say why")
                self._tell(event)
            elif self._is_ready():
                return True
        raise LaunchFailed(f"not all were ready within {_READY_SECONDS:.0f} seconds")

    def _is_ready(self) -> bool:
        """Whether the gateway takes all requests. Raises LaunchFailed where its certificate is not accepted here."""
        url = self._urls.get("gateway")
        if url is None:
            return False
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=_PROBE_SECONDS) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError) as fault:
            if why := why_no_tls(fault):
                raise LaunchFailed(f"the gateway at {url}: {why}") from None
            return False

    def _stay(self, supervisor: Supervisor) -> None:
        """Keep all running until somebody asks to stop."""
        while not isinstance(event := supervisor.next(60.0), Signalled):
            if event is not None:
                self._tell(event)

    def _tell(self, event: Ended) -> None:
        if event.name == "coordinator" and event.status == 0:
            self._say("coordinator | ended: another one has taken over, so it is not started again")
        else:
            self._say(f"{event.name} | ended with status {event.status}, and is started again")

    def _hear(self, name: str, line: str) -> None:
        """A line that one of the processes has printed."""
        if found := _LISTENS.search(line):
            self._urls.setdefault(name, found[1])
        self._say(f"{name} | {line}")


def _here(module: str, *words: str) -> list[str]:
    return [sys.executable, "-m", module, *words]


def free_port(host: str) -> int:
    """A port that nobody listens on: what is started again listens on it again."""
    with socket.create_server((host, 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


# --- the folder ------------------------------------------------------------------------------------------------------


def _take(lock: int, folder: Path) -> None:
    """Raises RunsAlready where another launcher has the folder."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        said = json.loads(os.pread(lock, 4096, 0) or b"{}")
        where = f"on {said['url']} (process {said['pid']})" if "url" in said else "and is starting, or ending"
        raise RunsAlready(f"the cluster of {folder} runs already, {where}") from None
    os.ftruncate(lock, 0)


def _note(lock: int, said: dict[str, object]) -> None:
    """Leave word for whoever starts the cluster once more."""
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps(said).encode(), 0)


def _token_file(folder: Path) -> Path:
    """The file with the cluster's token, made where there is none. Raises LaunchFailed where others can read it."""
    path = folder / _TOKEN
    if not path.exists():
        write_secret(path, secrets.token_hex(32))
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise LaunchFailed(f"{path} can be read by others: `chmod 600 {path}`")
    return path


def write_secret(path: Path, secret: str) -> None:
    """A file that this user alone may read, all of it or none."""
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secret + "\n")
    new.rename(path)
