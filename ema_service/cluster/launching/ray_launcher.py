"""A cluster whose places are Ray's: ``ema-service cluster up --ray auto --shards 3``. Only this module uses Ray.

    named, detached actors                       their children, which do the work (cluster/launching/agent.py)
      NAME-coordinator    0 CPUs                   coordinator
      NAME-host-0 ...     what is asked for        host 0, and a gateway beside it
      NAME-replica-0-0 ...    the same             a replica of host 0

Ray places actors, starts them again, and knows them by name. It carries no bytes and decides nothing: what it believes
of a host may be wrong, and costs time alone (cluster/hosting/lease.py).

Whoever calls up() makes the actors, so that no actor owns them, with which they would end. An actor's constructor
raises nothing: one that raises at a restart ends the actor for good.

Knows Ray. Does not know what the programs do, how they are kept running, or which node is best (placing).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
import time
import urllib.request
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ema_client.protocol import RAY_NAMESPACE, ray_host
from ema_service.cluster.launching.agent import Agent, State, Task
from ema_service.cluster.launching.launcher import LaunchFailed
from ema_service.cluster.launching.placing import chosen, places_in, twin_of
from ema_service.cluster.messages import DIRECTORY
from ema_service.cluster.token import ClusterToken
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
    on storage that every node reaches, so that a host may be started on any. options: of each host's actor, and each
    replica's, as Ray has them: num_cpus, num_gpus, memory, resources. replicas: so many of each host, or of each two
    that are twins, which are read in its place.
    """

    name: str
    task: Task
    shared: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    replicas: int = 0

    @property
    def coordinator(self) -> str:
        """The name of the coordinator's actor."""
        return _coordinator(self.name)

    @property
    def hosts(self) -> list[str]:
        """The names of the hosts' actors, by place."""
        return [ray_host(self.name, place) for place in range(self.task.of)]

    @property
    def followers(self) -> dict[str, tuple[int, int]]:
        """The names of the replicas' actors; of each its host's place, and its number among the host's replicas. Of
        twins the earlier ones have replicas, of either of whom a replica has everything."""
        followed = self.task.of // 2 if self.task.twins else self.task.of
        pairs = product(range(followed), range(self.replicas))
        return {f"{self.name}-replica-{place}-{number}": (place, number) for place, number in pairs}

    @property
    def wanted(self) -> dict[str, float]:
        """What each host's actor takes, by Ray's names of resources."""
        takes = {"CPU": self.options.get("num_cpus", 0), "GPU": self.options.get("num_gpus", 0)}
        takes |= {"memory": self.options.get("memory", 0), **self.options.get("resources", {})}
        return {name: number for name, number in takes.items() if number}


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
        """The coordinator's, that of a host's gateway, or a replica's; empty while it is not known."""
        return self._agent.url

    def node(self) -> str:
        """The id of the node that this actor is on."""
        return str(self._node)

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
    found = _found([plan.coordinator, *plan.hosts, *plan.followers])
    token = _token(plan, found) or secrets.token_hex(32)
    if plan.coordinator not in found:
        task = replace(plan.task, place=None, token=token)
        found[plan.coordinator] = _make(plan, plan.coordinator, task, {})
        say(f"{plan.coordinator} | made")
    # The coordinator's, whoever made it: of two that draw a token at once one is used.
    token = _ask(found[plan.coordinator].task.remote, plan.coordinator, seconds).token
    plan = replace(plan, task=replace(plan.task, token=token))
    if plan.task.twins and not plan.shared and len(found) > 1:
        _wait({plan.coordinator: found[plan.coordinator]}, say, seconds)
        found = _without_lost(plan, found, say)
    found |= _hosts_made(plan, found, say) | _replicas_made(plan, found, say)
    _wait(found, say, seconds)
    if plan.task.twins:
        _tell_of_shared_nodes(plan, found, say)
    return str(_ask(found[plan.hosts[0]].url.remote, plan.hosts[0], _LOOK_SECONDS))


def _hosts_made(plan: RayPlan, found: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """The actors of hosts that were missing, by name. Raises LaunchFailed."""
    missing = [place for place, name in enumerate(plan.hosts) if name not in found]
    homes = _homes(plan, missing) if missing and not plan.shared else {}
    made = {}
    for place in missing:
        name = plan.hosts[place]
        options = _pinned(plan, homes[place]) if homes else _free(plan, place)
        made[name] = _make(plan, name, replace(plan.task, place=place), options)
        say(f"{name} | made{f', for node {homes[place]}' if homes else ''}")
    return made


def _replicas_made(plan: RayPlan, found: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """The actors of replicas that were missing, by name: they keep nothing, so Ray may have them anywhere."""
    made = {}
    for name, (place, number) in plan.followers.items():
        if name not in found:
            task = replace(plan.task, place=place, replica=number)
            made[name] = _make(plan, name, task, {**plan.options, "scheduling_strategy": "SPREAD"})
            say(f"{name} | made")
    return made


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
    for group in (f"{name}-hosts", *(f"{name}-shard-{shard}" for shard in range(len(hosts)))):
        with suppress(ValueError):  # there is none, as where no host has a twin
            remove_placement_group(ray.util.get_placement_group(group))
    return len(hosts) + len(coordinator)


def processes_of(name: str, place: int) -> tuple[int, ...]:
    """The processes of a host: its actor's, its server's, its gateway's. Raises LaunchFailed."""
    host = ray_host(name, place)
    for actor in _found([host]).values():
        state: State = _ask(actor.state.remote, host, _LOOK_SECONDS)
        return state.pids
    raise LaunchFailed(f"there is no {host}")


def _named(name: str) -> list[str]:
    """The names of all hosts and replicas of a cluster that Ray knows; not those of a cluster whose name begins
    alike."""
    known = (each["name"] for each in ray.util.list_named_actors(True) if each["namespace"] == RAY_NAMESPACE)
    return sorted(each for each in known if re.fullmatch(rf"{re.escape(name)}-(host-\d+|replica-\d+-\d+)", each))


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
        if (task.of, task.folder, task.twins) != (plan.task.of, plan.task.folder, plan.task.twins):
            twins = ", twins among them," if task.twins else ""
            raise LaunchFailed(
                f"cluster {plan.name!r} is there, of {task.of} hosts{twins} with data in {task.folder}: ask for that "
                "one, or give another --name"
            )
        return str(task.token)
    return ""


def _make(plan: RayPlan, name: str, task: Task, options: Mapping[str, Any]) -> Any:
    """An actor, or the one that has been made meanwhile."""
    lasting = {"lifetime": "detached", "max_restarts": -1, "max_task_retries": 0, "max_concurrency": _CALLS_AT_ONCE}
    named = {"name": name, "namespace": RAY_NAMESPACE, "get_if_exists": True}
    found = {"runtime_env": {"env_vars": task.tls.environment}} if task.tls else {}
    return ray.remote(Place).options(**{"num_cpus": 0, **lasting, **named, **found, **options}).remote(plan.name, task)


def _pinned(plan: RayPlan, home: str) -> dict[str, Any]:
    """What a host's actor takes that has its data on a node."""
    return {**plan.options, "resources": {**plan.options.get("resources", {}), **_at(home)}}


def _free(plan: RayPlan, place: int) -> dict[str, Any]:
    """What a host's actor takes that may be on any node, that of its twin excepted."""
    if not plan.task.twins:
        return {**plan.options, "scheduling_strategy": "SPREAD"}
    group, bundle = _group(plan.name, place, plan.task.of) or _made_group(plan, place)
    return {**plan.options, "scheduling_strategy": PlacementGroupSchedulingStrategy(group, bundle)}


def _groups_of(name: str, place: int, of: int) -> dict[str, int]:
    """The groups that a host of those with twins may be in, and its bundle there: that of all hosts, that of its
    shard."""
    return {f"{name}-hosts": place, f"{name}-shard-{place % (of // 2)}": place // (of // 2)}


def _group(name: str, place: int, of: int) -> tuple[PlacementGroup, int] | None:
    """What keeps a host on another node than its twin wherever Ray starts it; None where that is yet to be made."""
    for group, bundle in _groups_of(name, place, of).items():
        with suppress(ValueError):
            return ray.util.get_placement_group(group), bundle
    return None


def _made_group(plan: RayPlan, place: int) -> tuple[PlacementGroup, int]:
    """A placement group: of all hosts, each on a node of its own, where there are as many nodes; else of a shard's two,
    on two nodes. On a Ray of one node both are there: they would wait for a node that nobody brings."""
    nodes = len(_nodes(plan.wanted))
    whole, shard = _groups_of(plan.name, place, plan.task.of).items()
    (name, bundle), bundles = (whole, plan.task.of) if nodes >= plan.task.of else (shard, 2)
    strategy = "STRICT_SPREAD" if nodes >= bundles else "SPREAD"
    takes = [plan.wanted or {"CPU": _NEXT_TO_NOTHING}] * bundles
    return placement_group(takes, strategy, name=name, lifetime="detached"), bundle


def _tell_of_shared_nodes(plan: RayPlan, found: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Say which hosts are lost with one node, and with it more than twins make up for."""
    on: dict[str, list[int]] = {}
    for place, name in enumerate(plan.hosts):
        on.setdefault(_ask(found[name].node.remote, name, _LOOK_SECONDS), []).append(place)
    for places in on.values():
        if len(places) > 1:
            names = ", ".join(plan.hosts[place] for place in places)
            twins = [plan.hosts[place] for place in places if twin_of(place, plan.task.of) in places]
            say(
                f"{names} | on one node, and lost with it: "
                + (f"no other has what {twins[0]} has" if twins else "updates wait until all but one of them are back")
            )


def _without_lost(plan: RayPlan, found: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """The actors that are there, but for those of hosts that wait for a node that is gone: they are ended, to be made
    on another node, empty, and filled from their twins.

    Ended are only hosts whose twin is known to have everything, and of whose data no node that is there has any; and
    none for which there is no node but its twin's. Raises LaunchFailed.
    """
    hosts = {place: found[name] for place, name in enumerate(plan.hosts) if name in found}
    there = {place for place, actor in hosts.items() if _answers(actor)}
    if not (silent := hosts.keys() - there):
        return dict(found)
    whole = _whole(plan, found, there)
    has = _data_at(plan, sorted({node["NodeManagerAddress"] for node in _nodes({})}))
    fitting = {node["NodeManagerAddress"] for node in _nodes(plan.wanted)}
    kept = dict(found)
    for place in sorted(silent - set().union(*has.values())):
        name, twin = plan.hosts[place], twin_of(place, plan.task.of)
        if twin not in whole:
            say(f"{name} | its node is gone, and waited for: its twin is not known to have everything")
        elif not any(twin not in has[node] for node in fitting):
            say(f"{name} | its node is gone, and waited for: there is no other for it but its twin's")
        else:
            say(f"{name} | its node is gone: made anew on another, and filled from its twin")
            ray.kill(kept.pop(name), no_restart=True)
            _wait_for_name(name)
    return kept


def _whole(plan: RayPlan, found: Mapping[str, Any], there: Collection[int]) -> set[int]:
    """The places whose hosts are known to have everything; none while the coordinator is yet to hear one that is there,
    who may know better."""
    told = _told(plan, found)
    seats = [seat for seat in told.get("shards", ()) if seat["listens"] and seat["revision"] is not None]
    heard = {int(seat["place"]) for seat in seats}
    return heard.difference(*told.get("absent", {}).values()) if heard.issuperset(there) else set()


def _told(plan: RayPlan, found: Mapping[str, Any]) -> dict[str, Any]:
    """What the coordinator says of the hosts, and which of those with twins the others go on without; empty where it
    says nothing."""
    url = _ask(found[plan.coordinator].url.remote, plan.coordinator, _LOOK_SECONDS)
    asked = urllib.request.Request(f"{url}/v1/runs/{DIRECTORY}/shards", headers=ClusterToken(plan.task.token).headers)
    try:
        with urllib.request.urlopen(asked, timeout=_ANSWER_SECONDS) as answer:
            return dict(json.load(answer))
    except (OSError, ValueError):  # no host has come to it yet, say
        return {}


def _answers(actor: Any) -> bool:
    try:
        return bool(ray.get(actor.node.remote(), timeout=_ANSWER_SECONDS))
    except RayError:
        return False


def _wait_for_name(name: str) -> None:
    """Return once Ray knows no actor of this name. Raises LaunchFailed."""
    until = time.monotonic() + _LOOK_SECONDS
    while _found([name]):
        if time.monotonic() > until:
            raise LaunchFailed(f"{name} was ended, and is still there after {_LOOK_SECONDS:g} seconds")
        time.sleep(_PAUSE_SECONDS)


def _at(node: str) -> dict[str, float]:
    """What only this node has."""
    return {f"{_NODE}{node}": _NEXT_TO_NOTHING}


def _nodes(wanted: Mapping[str, float]) -> list[dict[str, Any]]:
    """The nodes that are there and have so much, taken or not."""
    return [
        node
        for node in ray.nodes()
        if node["Alive"] and all(node["Resources"].get(name, 0) >= number for name, number in wanted.items())
    ]


def _homes(plan: RayPlan, places: list[int]) -> dict[int, str]:
    """The node of each of these places: the one that has its data dir, else one that has few. Raises LaunchFailed."""
    nodes = sorted({node["NodeManagerAddress"] for node in _nodes(plan.wanted)})
    if not nodes:
        asked = ", ".join(f"{name} {number:g}" for name, number in plan.wanted.items())
        raise LaunchFailed(
            f"no node has {asked}: start one, or give --shared-dir where every node reaches the data; then hosts wait "
            "for nodes to come"
        )
    return chosen(places, _data_at(plan, nodes), plan.task.of if plan.task.twins else None)


def _data_at(plan: RayPlan, nodes: list[str]) -> dict[str, set[int]]:
    """The places whose data each of these nodes has. Raises LaunchFailed."""
    look = ray.remote(places_in)
    has = {}
    for node in nodes:
        at_node = look.options(num_cpus=0, resources=_at(node))
        has[node] = _ask(partial(at_node.remote, plan.task.folder), f"node {node}", _LOOK_SECONDS)
    return has


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
