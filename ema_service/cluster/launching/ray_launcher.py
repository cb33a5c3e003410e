"""A cluster whose places are Ray's: ``ema-service cluster up --ray auto --shards 3``. Only this module uses Ray.

    named, detached actors                       their children, which do the work (cluster/launching/agent.py)
      NAME-coordinator    0 CPUs                   coordinator
      NAME-host-0 ...     what is asked for        host 0, and a gateway beside it

Ray places actors, starts them again, and knows them by name. It carries no bytes and decides nothing: what it believes
of a host may be wrong, and costs time alone (cluster/hosting/lease.py).

Whoever calls up() makes the actors, so that no actor owns them, with which they would end. An actor's constructor
raises nothing: one that raises at a restart ends the actor for good.

Knows Ray. Does not know what the programs do, or how they are kept running.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError

from ema_client.protocol import RAY_NAMESPACE, ray_host
from ema_service.cluster.launching.agent import Agent, State, Task
from ema_service.cluster.launching.launcher import LaunchFailed
from ema_service.tether import GRACE

__all__ = ["Place", "RayPlan", "down", "local_ray", "on_ray", "processes_of", "up"]

#: Seconds between two questions to Ray, and for an actor's answer.
_WORD_SECONDS, _ANSWER_SECONDS = 1.0, 5.0
#: Seconds until all is ready: nodes may have to be started, and hosts bring large runs back before they answer.
_READY_SECONDS = 600.0
#: Seconds in which a node says which data dirs it has: the first worker of a node takes some to start.
_LOOK_SECONDS = 60.0
#: Seconds between two tries.
_PAUSE_SECONDS = 0.2
#: Ray's resource of one node, of which an actor takes next to nothing, to be there and nowhere else.
_NODE, _NEXT_TO_NOTHING = "node:", 0.001
#: What of an actor's methods may run at once: questions, while one of them waits for a program.
_CALLS_AT_ONCE = 16
_OBJECT_STORE_BYTES = 80 << 20


@dataclass(frozen=True, slots=True)
class RayPlan:
    """What is to be started.

    name: of the cluster, by which trainers find it. task: what each host has in common. shared: whether the folder is
    on storage that every node reaches, so that a host may be started on any. options: of each host's actor, as Ray has
    them: num_cpus, num_gpus, memory, resources.
    """

    name: str
    task: Task
    shared: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def coordinator(self) -> str:
        """The name of the coordinator's actor."""
        return _coordinator(self.name)

    @property
    def hosts(self) -> list[str]:
        """The names of the hosts' actors, by place."""
        return [ray_host(self.name, place) for place in range(self.task.of)]


def _coordinator(name: str) -> str:
    return f"{name}-coordinator"


# --- the actors ------------------------------------------------------------------------------------------------------


class Place:
    """The actor of one place of a cluster."""

    def __init__(self, name: str, task: Task) -> None:
        """name: of the cluster. Raises nothing, also where nothing can be started: then the place is not ready."""
        self._name, self._task = name, task
        machine = ray.util.get_node_ip_address() if task.listen in ("0.0.0.0", "::") else task.listen
        self._node = ray.get_runtime_context().get_node_id()
        self._agent = Agent(task, machine, _to_log)
        self._agent.start()
        threading.Thread(target=self._listen, name="ema-engine", daemon=True).start()

    def state(self) -> State:
        """How the place stands."""
        return self._agent.state()

    def url(self) -> str:
        """The coordinator's, or that of a host's gateway; empty while it is not known."""
        return self._agent.url

    def task(self) -> Task:
        """What runs here, with the cluster's token, for whoever starts what is missing."""
        return self._task

    def end(self) -> None:
        """End what runs here, as SIGTERM does."""
        self._agent.end()

    def _listen(self) -> None:
        """Ask Ray once a second whether it counts on this node, and where the coordinator is. A node that it has given
        up never counts again: what runs here ends in order, and leaves the data to the actor that comes after."""
        told = ""
        while True:
            said = ""
            try:
                counts = {node["NodeID"]: node["Alive"] for node in ray.nodes()}.get(self._node)
                if counts:
                    self._agent.word(self._where())
                elif counts is False:
                    _to_log("Ray has given this node up")
                    self._agent.end()
                    os._exit(0)
            except (RayError, OSError, RuntimeError) as fault:
                said = f"Ray is not heard: {type(fault).__name__}: {fault}"
            if said and said != told:
                _to_log(said)
            told = said
            time.sleep(_WORD_SECONDS)

    def _where(self) -> str | None:
        """The coordinator's URL, None where it is not known by now."""
        if self._task.place is None:
            return None
        with suppress(RayError, ValueError):  # it is being started again, or is yet to be made
            actor = ray.get_actor(_coordinator(self._name), RAY_NAMESPACE)
            return str(ray.get(actor.url.remote(), timeout=_ANSWER_SECONDS)) or None
        return None


def _to_log(line: str) -> None:
    """Ray keeps what an actor prints under the actor's name."""
    print(line, flush=True)  # noqa: T201


# --- up and down -----------------------------------------------------------------------------------------------------


def up(plan: RayPlan, say: Callable[[str], None], seconds: float = _READY_SECONDS) -> str:
    """Make the actors that are not there, and return a gateway's URL once all take requests. say: called with what is
    new meanwhile. Two that run at once make one cluster.

    Raises LaunchFailed where a cluster of the name is there and is another one, where no node has what a host asks for,
    or where not all are ready in so many seconds.
    """
    found = _found([plan.coordinator, *plan.hosts])
    token = _token(plan, found) or secrets.token_hex(32)
    if plan.coordinator not in found:
        found[plan.coordinator] = _make(plan, plan.coordinator, replace(plan.task, place=None, token=token), {})
        say(f"{plan.coordinator} | made")
    # The coordinator's, whoever made it: of two that draw a token at once one is used.
    token = _ask(found[plan.coordinator].task.remote, plan.coordinator, seconds).token
    missing = [place for place, name in enumerate(plan.hosts) if name not in found]
    homes = _homes(plan, missing) if missing and not plan.shared else {}
    for place in missing:
        name = plan.hosts[place]
        found[name] = _make(plan, name, replace(plan.task, place=place, token=token), _options(plan, homes.get(place)))
        say(f"{name} | made{f', for node {homes[place]}' if homes else ''}")
    _wait(found, say, seconds)
    return str(_ask(found[plan.hosts[0]].url.remote, plan.hosts[0], _LOOK_SECONDS))


def down(name: str, say: Callable[[str], None]) -> int:
    """End a cluster's programs and actors: hosts first, which finish what they have. Returns how many actors there
    were. Data dirs stay."""
    hosts = _found(_named(name))
    coordinator = _found([_coordinator(name)])
    for actors in (hosts, coordinator):
        if ending := [actor.end.remote() for actor in actors.values()]:
            ray.wait(ending, num_returns=len(ending), timeout=GRACE + 10.0)
        for each, actor in actors.items():
            ray.kill(actor, no_restart=True)
            say(f"{each} | ended")
    return len(hosts) + len(coordinator)


def processes_of(name: str, place: int) -> tuple[int, ...]:
    """The processes of a host: its actor's, its server's, its gateway's. Raises LaunchFailed."""
    host = ray_host(name, place)
    for actor in _found([host]).values():
        state: State = _ask(actor.state.remote, host, _LOOK_SECONDS)
        return state.pids
    raise LaunchFailed(f"there is no {host}")


def _named(name: str) -> list[str]:
    """The names of all hosts of a cluster that Ray knows; not those of a cluster whose name begins alike."""
    known = (each["name"] for each in ray.util.list_named_actors(True) if each["namespace"] == RAY_NAMESPACE)
    return sorted(each for each in known if re.fullmatch(rf"{re.escape(name)}-host-\d+", each))


def _found(names: Iterable[str]) -> dict[str, Any]:
    """The actors that are there, by name."""
    found = {}
    for name in names:
        with suppress(ValueError):
            found[name] = ray.get_actor(name, RAY_NAMESPACE)
    return found


def _token(plan: RayPlan, found: Mapping[str, Any]) -> str:
    """The token of the actors that are there, empty where there are none. Raises LaunchFailed."""
    for name, actor in found.items():
        task = _ask(actor.task.remote, name, _LOOK_SECONDS)
        if (task.of, task.folder) != (plan.task.of, plan.task.folder):
            raise LaunchFailed(
                f"cluster {plan.name!r} is there, of {task.of} hosts with data in {task.folder}: ask for that one, or "
                "give another --name"
            )
        return str(task.token)
    return ""


def _make(plan: RayPlan, name: str, task: Task, options: Mapping[str, Any]) -> Any:
    """An actor, or the one that has been made meanwhile."""
    lasting = {"lifetime": "detached", "max_restarts": -1, "max_task_retries": 0, "max_concurrency": _CALLS_AT_ONCE}
    named = {"name": name, "namespace": RAY_NAMESPACE, "get_if_exists": True}
    found = {"runtime_env": {"env_vars": task.tls.environment}} if task.tls else {}
    return ray.remote(Place).options(**{"num_cpus": 0, **lasting, **named, **found, **options}).remote(plan.name, task)


def _options(plan: RayPlan, home: str | None) -> dict[str, Any]:
    """What a host's actor takes. home: the node that has its data."""
    if home is None:
        return {**plan.options, "scheduling_strategy": "SPREAD"}
    return {**plan.options, "resources": {**plan.options.get("resources", {}), **_at(home)}}


def _at(node: str) -> dict[str, float]:
    """What only this node has."""
    return {f"{_NODE}{node}": _NEXT_TO_NOTHING}


def _homes(plan: RayPlan, places: list[int]) -> dict[int, str]:
    """The node of each of these places: the one that has its data dir, else one that has few. Raises LaunchFailed."""
    wanted = {"CPU": plan.options.get("num_cpus", 0), "GPU": plan.options.get("num_gpus", 0)}
    wanted |= {"memory": plan.options.get("memory", 0), **plan.options.get("resources", {})}
    nodes = sorted({node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and _fits(node, wanted)})
    if not nodes:
        asked = ", ".join(f"{name} {number:g}" for name, number in wanted.items() if number)
        raise LaunchFailed(
            f"no node has {asked}: start one, or give --shared-dir where every node reaches the data; then hosts wait "
            "for nodes to come"
        )
    look = ray.remote(_places_at)
    has = {}
    for node in nodes:
        at_node = look.options(num_cpus=0, resources=_at(node))
        has[node] = _ask(partial(at_node.remote, plan.task.folder), f"node {node}", _LOOK_SECONDS)
    return _chosen(places, has)


def _chosen(places: list[int], has: Mapping[str, set[int]]) -> dict[int, str]:
    """A node for each place. has: the nodes that may be chosen, and the places whose data each of them has."""
    homes: dict[int, str] = {}
    taken: Counter[str] = Counter({node: len(found) for node, found in has.items()})
    for place in places:
        having = [node for node, found in has.items() if place in found]
        homes[place] = having[0] if having else min(has, key=lambda node: (taken[node], node))
        taken[homes[place]] += not having
    return homes


def _fits(node: Mapping[str, Any], wanted: Mapping[str, float]) -> bool:
    return all(node["Resources"].get(name, 0) >= number for name, number in wanted.items())


def _places_at(folder: Path) -> set[int]:
    """Which places have a data dir in a folder of this node."""
    found = (each.parent.name.removeprefix("host-") for each in folder.glob("host-*/catalog.db"))
    return {int(each) for each in found if each.isdigit()}


def _ask(call: Callable[[], Any], name: str, seconds: float) -> Any:
    """What a call of an actor, or at a node, returns; made again while the actor is being started again, for what is
    called changes nothing. Raises LaunchFailed."""
    until = time.monotonic() + seconds
    while True:
        try:
            return ray.get(call(), timeout=max(0.1, until - time.monotonic()))
        except ActorUnavailableError as fault:  # which is not dead: it is never replaced for that
            if time.monotonic() > until:
                raise LaunchFailed(f"{name} does not answer: {fault}") from None
            time.sleep(_PAUSE_SECONDS)
        except RayError as fault:
            raise LaunchFailed(f"{name} does not answer: {type(fault).__name__}: {fault}") from None


def _wait(actors: Mapping[str, Any], say: Callable[[str], None], seconds: float) -> None:
    """Return once all places are ready. Raises LaunchFailed."""
    until, told = time.monotonic() + seconds, dict[str, str]()
    while True:
        standing = {name: _standing(name, actor) for name, actor in actors.items()}
        if not any(standing.values()):
            return
        for name, why in standing.items():
            if why and told.get(name) != why:
                say(f"{name} | {why}")
        told = standing
        if time.monotonic() > until:
            away = "; ".join(f"{name}: {why}" for name, why in standing.items() if why)
            raise LaunchFailed(f"not all were ready within {seconds:g} seconds: {away}")
        time.sleep(_PAUSE_SECONDS)


def _standing(name: str, actor: Any) -> str:
    """Why a place is not ready, empty where it is. Raises LaunchFailed for an actor that is gone for good."""
    try:
        state: State = ray.get(actor.state.remote(), timeout=_ANSWER_SECONDS)
    except ActorDiedError as fault:
        raise LaunchFailed(f"{name} is gone, and is not started again by Ray: {fault}") from None
    except RayError as fault:
        return f"is not placed yet, or being started again ({type(fault).__name__})"
    return "" if state.ready else (list(state.said.values())[-1:] or ["is starting"])[0]


# --- Ray itself ------------------------------------------------------------------------------------------------------


@contextmanager
def on_ray(address: str) -> Iterator[None]:
    """Within the block, this process is connected to a Ray cluster. Raises LaunchFailed where there is none."""
    try:
        ray.init(address, namespace=RAY_NAMESPACE, log_to_driver=False, logging_level="WARNING")
    except (ConnectionError, RuntimeError, ValueError) as fault:
        raise LaunchFailed(
            f"no Ray is reached at {address!r}: {fault}; a Ray that asks for its token wants RAY_AUTH_MODE=token here"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def local_ray(cpus: int) -> Iterator[str]:
    """Within the block, a Ray of this process' own, to try things: its address. cpus: that it is to count on."""
    context = ray.init(
        "local",
        num_cpus=cpus,
        object_store_memory=_OBJECT_STORE_BYTES,
        include_dashboard=False,
        namespace=RAY_NAMESPACE,
        log_to_driver=False,
        logging_level="WARNING",
    )
    try:
        yield str(context.address_info["gcs_address"])
    finally:
        ray.shutdown()
