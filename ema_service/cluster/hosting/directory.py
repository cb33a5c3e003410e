"""The directory: which runs there are on the hosts of a cluster, the same on all of them.

    POST /v1/runs   -> any host   a Creation, with the configuration of the whole run
    coordinator     -> hosts      each makes its own shard, which nobody finds yet, and votes; or refuses
    coordinator     -> hosts      Resolve: the record, and with it the shard counts; or the shard goes

A talk of its own, about which every host always listens: whose revisions are the runs that were created and deleted.
A host's record of it is one row of the catalog. A shard that is made carries the revision that it leads to, its
*birth*, and counts once the record has come to that revision: one transaction, as a deletion is, which takes the run's
row along. So a run is there on all hosts or on none, whoever is killed; and that a name was used before nobody has to
remember, for the talk about each run has the birth in its name.

Knows which runs the hosts agreed on, and how a host cuts its own shard out. Does not know what is done with a run that
is there (shard_run, host), HTTP, or which coordinator there is.
"""

from __future__ import annotations

import base64
import json
import logging
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from ema_client.errors import (
    EmaError,
    InternalError,
    InvalidRequest,
    Overloaded,
    RunExists,
    RunNotFound,
    StorageFailed,
    Superseded,
)
from ema_client.protocol import RunConfig, from_json, to_json
from ema_service.cluster.decisions import emptied
from ema_service.cluster.encoding import MalformedMessage, decode, encode
from ema_service.cluster.hosting.borrowing import Twin
from ema_service.cluster.hosting.reporting import Reporting
from ema_service.cluster.layout_map import LayoutMap
from ema_service.cluster.messages import (
    DIRECTORY,
    Answer,
    Arrival,
    Creation,
    Deletion,
    Kept,
    Proposal,
    Record,
    Ticket,
    Vote,
)
from ema_service.cluster.reasons import MADE_BEFORE, reason_of
from ema_service.cluster.token import ClusterToken
from ema_service.memory import Layout
from ema_service.runs import Candidate, Registry, Run, with_posthoc
from ema_service.storage import RunRow, ShardRow, Store

__all__ = ["Directory", "creation_of", "same_run", "shard_config", "whole_config"]

_log = logging.getLogger(__name__)

#: Most bytes of a configuration: a kilobyte of zlib may be a megabyte.
_CONFIG_BYTES = 64 << 20


def creation_of(config: RunConfig, created_at: float) -> Creation:
    """The change that creates a run. The configuration is packed: a layout says much twice, and the change stands in
    each report while it is voted for."""
    packed = zlib.compress(json.dumps(to_json(config), separators=(",", ":")).encode())
    return Creation(base64.b64encode(packed).decode(), created_at)


def _config_in(creation: Creation) -> RunConfig:
    """The configuration in a change. Raises InvalidRequest."""
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(base64.b64decode(creation.config, validate=True), _CONFIG_BYTES)
        if not unpacker.eof:
            raise InvalidRequest(f"a configuration has at most {_CONFIG_BYTES} bytes")
        return from_json(RunConfig, json.loads(text))
    except (ValueError, zlib.error) as fault:
        raise InvalidRequest(f"no configuration: {fault}") from None


def whole_config(config: RunConfig, shards: int) -> RunConfig:
    """The configuration as every host has it: in canonical order, with nothing left open.

    Raises InvalidRequest for what runs on several hosts don't have, and as with_posthoc().
    """
    config = with_posthoc(config)
    layout = Layout(config.layout, config.copied)
    LayoutMap(layout, shards)
    specs = tuple(entry.spec for entry in layout.params)
    return replace(config, layout=specs, copied=layout.copied, durability=config.durability or "process")


def shard_config(config: RunConfig, shard: int, shards: int) -> RunConfig:
    """The configuration of one shard of a run. config: of the whole run, as whole_config() gives it."""
    part = LayoutMap(Layout(config.layout, config.copied), shards).shards[shard].layout
    return replace(config, layout=tuple(entry.spec for entry in part.params), copied=part.copied)


@dataclass(frozen=True, slots=True)
class _Held:
    """What was prepared for a proposal. candidate: of a creation. run: the name, of a deletion."""

    ticket: Ticket
    candidate: Candidate | None = None
    run: str = ""


class Directory:
    """This host's part in the directory: a RecordStore, see there. Thread-safe.

    More than twenty methods: what the hosts decide, and what a host copies that was left behind. More than a dozen
    attributes: what these share.

    reporting: the talk, begun by ``reporting.start()``. One proposal is prepared at a time.
    """

    def __init__(
        self,
        registry: Registry,
        store: Store,
        arrival: Arrival,
        coordinators: Sequence[str],
        token: ClusterToken,
        changes: Executor,
        began: Callable[[str], None],
        ended: Callable[[str], None],
        twin: Twin | None = None,
    ) -> None:
        """store: the registry's, of a host (Store.be_host). arrival, coordinators, token: as for Reporting. changes:
        judges what coordinators bring, one after the other, until the talk is closed. began, ended: called with the
        name of each run that there is from then on, or is no more. twin: the other host of the shard, None where there
        is none.

        Raises MalformedMessage for a damaged record, StorageFailed, and as Reporting().
        """
        self._registry = registry
        self._store = store
        self._place = arrival.shard
        self._shards = arrival.shards // 2 if arrival.twins else arrival.shards
        self._twin = twin
        #: Whether the runs of the twin are being looked at, and whether they were here the last time.
        self._looking = self._same = False
        self._changes = changes
        self._began, self._ended = began, ended
        self._lock = threading.Lock()
        self._held: _Held | None = None
        #: By the key of a change that is kept: what follows from it.
        self._following: dict[str, Callable[[], None]] = {}
        #: By the key of a change: who waits until it is made here.
        self._expected: dict[str, list[Future[None]]] = {}
        row = store.directory()
        record = decode(row.record, Record) if row and row.record else _first(twin)
        prepared = self._take_up(record)
        self.reporting = Reporting(DIRECTORY, arrival, record, self, coordinators, token, prepared=prepared)

    @contextmanager
    def expecting(self, key: str) -> Iterator[Future[None]]:
        """Within the block, a future that is done once the change of this key is made here."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            self._expected.setdefault(key, []).append(future)
        try:
            yield future
        finally:
            with self._lock:
                waiting = self._expected.get(key, [])
                if future in waiting:
                    waiting.remove(future)
                if not waiting:
                    self._expected.pop(key, None)

    # --- as the coordinator decides: RecordStore --------------------------------------------------------------------

    def is_whole(self) -> bool:
        """Always: a row of the catalog is there, or the server is not."""
        return True

    def kept(self) -> Kept:
        """None: each record outlives the machine."""
        return Kept()

    def returns(self) -> bool:
        """Whether all runs of the twin are here, and filled. Has them made here meanwhile."""
        if not self._looking:
            self._looking = True
            self._changes.submit(self._look_at_twin).add_done_callback(self._looked)
        return self._same

    def promise(self, record: Record) -> None:
        """Keep a record of the same runs. Raises StorageFailed, as vote(), commit() and abort()."""
        self._keep(record)

    def vote(self, record: Record, prepared: _Held) -> None:
        """Keep a record with its vote: what was prepared stays until the verdict."""
        if prepared is not self._held:
            raise StorageFailed("what was prepared is gone", retry_after=0.0)
        self._keep(record)

    def commit(self, record: Record, prepared: _Held) -> None:
        """Keep a record of the next revision: with it a run is there, or is no more."""
        if prepared.candidate:
            self._keep(record)
            run = self._registry.enter(prepared.candidate)
            following: Callable[[], None] = partial(self._began, run.config.run)
        elif not prepared.run:
            self._keep(record)
            self._same = False
            following = _nothing
        else:
            self._registry.delete(prepared.run, forget_row=partial(self._keep, record))
            following = partial(self._ended, prepared.run)
        with self._lock:
            self._held = None
            self._following[prepared.ticket.key] = following

    def abort(self, record: Record, prepared: _Held | None) -> None:  # noqa: ARG002 - nothing waits here
        """Keep a record without the vote; what was prepared goes."""
        held = self._held
        self._keep(record, held.candidate.row if held and held.candidate else None)
        self._let_go(held)

    def propose(self, proposal: Proposal) -> None:
        """Have a change judged and prepared, and vote for or against it."""
        self._changes.submit(self._judge, proposal).add_done_callback(partial(self._judged, proposal))

    def answer(self, answer: Answer) -> None:
        """Do what follows from a change that is kept, and tell those who wait for that. Who waits for one that is not
        has asked the coordinator."""
        if not answer.committed:
            return
        with self._lock:
            following = self._following.pop(answer.key, None)
        if following:
            following()
        with self._lock:
            waiting = self._expected.pop(answer.key, [])
        for future in waiting:
            future.set_result(None)

    # --- a vote -----------------------------------------------------------------------------------------------------

    def _judge(self, proposal: Proposal) -> None:
        """Vote for a change, or refuse it; what cannot be judged now comes again."""
        ticket, record = proposal.ticket, self.reporting.record
        absent = self._place in record.seating.absent
        if ticket.base != record.revision and not absent:
            return
        if record.vote and record.vote.ticket != ticket and not absent:
            self.reporting.postpone(ticket)
            return
        try:
            held = self._prepared(proposal)
        except EmaError as fault:
            self.reporting.refuse(proposal, self._told(fault))
            return
        if held is None:
            self.reporting.refuse(proposal, MADE_BEFORE)
            return
        try:
            self.reporting.vote(Vote(proposal, ""), held)  # all that hosts must agree on is the change itself
        except StorageFailed as fault:
            _log.warning("the vote for a change of the directory could not be kept: %s", fault)

    def _judged(self, proposal: Proposal, done: Future[None]) -> None:
        """As ShardRun._judged()."""
        fault = None if done.cancelled() else done.exception()
        if fault:
            _log.error("a change of the directory could not be judged", exc_info=fault)
            defect = InternalError(f"it failed at the change: {type(fault).__name__}")
            self.reporting.refuse(proposal, self._told(defect))

    def _prepared(self, proposal: Proposal) -> _Held | None:
        """What a change takes, held until the verdict; None where it was made before. Raises as Registry.propose(),
        RunExists, RunNotFound, InvalidRequest."""
        held = self._held
        if held and held.ticket == proposal.ticket:
            return held
        self._let_go(held)  # it was not voted for
        if proposal.back is not None or proposal.seating is not None:
            self._check_seating(proposal)
            self._held = _Held(proposal.ticket)
            return self._held
        change, ticket = _change_in(proposal), proposal.ticket
        held = self._created(ticket, change) if isinstance(change, Creation) else self._deleted(ticket, change)
        with self._lock:
            self._held = held
        return held

    def _check_seating(self, proposal: Proposal) -> None:
        """Whether the hosts may begin with no runs, or one of them return. Raises InvalidRequest, Overloaded."""
        record = self.reporting.record
        if proposal.back is not None and (record.revision or self._registry.runs()):
            raise InvalidRequest("other hosts came with empty data dirs, and this one has runs, or had some")
        own = proposal.seating is not None and self._place in record.seating.absent - proposal.seating.absent
        if own and self._twin and self._births(self._twin.runs(proposal.ticket.key)) != self._births(self.lent()):
            self._same = False
            raise Overloaded("the twin has other runs by now", retry_after=1.0)

    def _created(self, ticket: Ticket, creation: Creation) -> _Held | None:
        config = whole_config(_config_in(creation), self._shards)
        if same_run(self._registry, config):
            return None
        return _Held(ticket, self._made(config, creation.created_at, ticket.base + 1))

    def _made(self, config: RunConfig, created_at: float, birth: int, record: str = "") -> Candidate:
        """This host's shard of a run. Raises as Registry.propose()."""
        here = self._place % self._shards
        shard = ShardRow(here, self._shards, record, birth=birth, whole=json.dumps(to_json(config)))
        return self._registry.propose(shard_config(config, here, self._shards), shard, created_at)

    # --- with a twin ------------------------------------------------------------------------------------------------

    def lent(self) -> list[dict[str, Any]]:
        """The runs here, as a twin makes them."""
        return [
            {
                "config": to_json(self._registry.whole(run.config.run)),
                "created_at": run.created_at,
                "birth": run.shard.birth if run.shard else 0,
            }
            for run in self._registry.runs()
        ]

    def _look_at_twin(self) -> bool:
        """Have the runs here that the twin has, each to be filled, and no others. Returns whether all are. Raises
        EmaError."""
        if self._twin is None:
            return False
        theirs, own = self._births(found := self._twin.runs()), self._births(self.lent())
        for name in own.keys() - {name for name, birth in theirs.items() if own.get(name) == birth}:
            self._ended(name)
            self._registry.delete(name, forget_row=self._store.forget_run)
        for each in found:
            config = from_json(RunConfig, each["config"])
            if own.get(config.run) != each["birth"]:
                record = encode(emptied(time.time_ns()))
                self._registry.enter(self._made(config, each["created_at"], each["birth"], record))
                self._began(config.run)
        return theirs == own and self._is_filled()

    def _looked(self, done: Future[bool]) -> None:
        fault = None if done.cancelled() else done.exception()
        if fault and not isinstance(fault, EmaError):
            _log.error("the runs of the twin could not be made here", exc_info=fault)
        self._same = not done.cancelled() and fault is None and done.result()
        self._looking = False

    def _is_filled(self) -> bool:
        """Whether each run here counts."""
        texts = [self._registry.shard(run.config.run).record for run in self._registry.runs()]
        records = [decode(text, Record) for text in texts if text]
        return not any(record.lost or self._place in record.seating.absent for record in records)

    @staticmethod
    def _births(runs: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        return {each["config"]["run"]: each["birth"] for each in runs}

    def _deleted(self, ticket: Ticket, deletion: Deletion) -> _Held:
        shard = self._registry.get(deletion.run).shard
        if shard is None or shard.birth != deletion.birth:
            raise RunNotFound(f"there is no run {deletion.run!r} of that time any more")
        return _Held(ticket, run=deletion.run)

    def _let_go(self, held: _Held | None) -> None:
        """Give back what was prepared for a change that is not to be."""
        with self._lock:
            self._held = None
        if held and held.candidate:
            try:
                self._registry.drop(held.candidate)
            except StorageFailed as fault:
                _log.warning("a run that is not to be was not removed; the next start removes it: %s", fault)

    def _keep(self, record: Record, gone: RunRow | None = None) -> None:
        try:
            self._store.keep_directory(encode(record), gone)
        except sqlite3.Error as fault:
            raise StorageFailed(f"the directory's record could not be kept: {fault}", retry_after=1.0) from fault

    def _told(self, fault: EmaError) -> str:
        """Why this host refuses a change, for whoever asked for it."""
        return reason_of(type(fault)(f"host {self._place}: {fault.detail}", hint=fault.hint))

    # --- a start ----------------------------------------------------------------------------------------------------

    def _take_up(self, record: Record) -> dict[Ticket, _Held]:
        """Hold what the record votes for. What else was prepared goes. Raises StorageFailed, MalformedMessage."""
        held = self._voted(record.vote) if record.vote else None
        for candidate in self._registry.candidates():
            if held is None or candidate is not held.candidate:
                self._registry.drop(candidate)
        self._held = held
        return {held.ticket: held} if held else {}

    def _voted(self, vote: Vote) -> _Held:
        if vote.proposal.back is not None or vote.proposal.seating is not None:
            return _Held(vote.ticket)
        change = _change_in(vote.proposal)
        if isinstance(change, Deletion):
            return _Held(vote.ticket, run=change.run)
        name = _config_in(change).run
        found = [each for each in self._registry.candidates() if each.run.config.run == name]
        if not found:
            raise StorageFailed(f"the shard of run {name!r}, which this host has voted for, is gone")
        return _Held(vote.ticket, found[0])


def _first(twin: Twin | None) -> Record:
    """The record that a host begins with whose data dir is new: one that had a data dir before, maybe, which is gone.
    All of a new cluster's hosts begin so, and go on together from there."""
    return emptied(time.time_ns()) if twin else Record()


def _nothing() -> None:
    """Follows from a change of who counts."""


def same_run(registry: Registry, config: RunConfig) -> Run | None:
    """The run of this very configuration, None where there is none of the name. Raises RunExists for another one."""
    try:
        run, whole = registry.get(config.run), registry.whole(config.run)
    except (RunNotFound, Superseded):  # it may be on its way: then all hosts say so
        return None
    if whole != config:
        raise RunExists(
            f"run {config.run!r} exists with another configuration", hint="choose another name, or delete that run"
        )
    return run


def _change_in(proposal: Proposal) -> Creation | Deletion:
    """Raises InvalidRequest."""
    try:
        return cast("Creation | Deletion", decode(proposal.change or "", Creation, Deletion))
    except MalformedMessage as fault:
        raise InvalidRequest(f"no change of the directory: {fault}") from None
