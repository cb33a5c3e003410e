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
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

from ema_client.errors import EmaError, InternalError, InvalidRequest, RunExists, RunNotFound, StorageFailed, Superseded
from ema_client.protocol import RunConfig, from_json, to_json
from ema_service.cluster.encoding import MalformedMessage, decode, encode
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
from ema_service.runs import Candidate, Registry, Run
from ema_service.storage import RunRow, ShardRow, Store

__all__ = ["Directory", "creation_of", "same_run", "whole_config"]

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

    Raises InvalidRequest for what runs on several hosts don't have.
    """
    if config.posthoc is not None:
        raise InvalidRequest(
            f"posthoc: run {config.run!r} would be on several hosts, which keep no snapshots of it",
            hint="leave posthoc out",
        )
    layout = Layout(config.layout, config.copied)
    LayoutMap(layout, shards)
    specs = tuple(entry.spec for entry in layout.params)
    return replace(config, layout=specs, copied=layout.copied, durability=config.durability or "process")


@dataclass(frozen=True, slots=True)
class _Held:
    """What was prepared for a proposal. candidate: of a creation. run: the name, of a deletion."""

    ticket: Ticket
    candidate: Candidate | None = None
    run: str = ""


class Directory:
    """This host's part in the directory: a RecordStore, see there. Thread-safe.

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
    ) -> None:
        """store: the registry's, of a host (Store.be_host). arrival, coordinators, token: as for Reporting. changes:
        judges what coordinators bring, one after the other, until the talk is closed. began, ended: called with the
        name of each run that there is from then on, or is no more.

        Raises MalformedMessage for a damaged record, StorageFailed, and as Reporting().
        """
        self._registry = registry
        self._store = store
        self._place, self._shards = arrival.shard, arrival.shards
        self._changes = changes
        self._began, self._ended = began, ended
        self._lock = threading.Lock()
        self._held: _Held | None = None
        #: By the key of a change that is kept: what follows from it.
        self._following: dict[str, Callable[[], None]] = {}
        #: By the key of a change: who waits until it is made here.
        self._expected: dict[str, list[Future[None]]] = {}
        row = store.directory()
        record = decode(row.record, Record) if row and row.record else Record()
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

    def takes_part(self) -> bool:
        """Always: a row of the catalog is there, or the server is not."""
        return True

    def kept(self) -> Kept:
        """None: each record outlives the machine."""
        return Kept()

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
            following = partial(self._began, run.config.run)
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
        if ticket.base != record.revision:
            return
        if record.vote and record.vote.ticket != ticket:
            self.reporting.postpone(ticket)
            return
        try:
            held = self._prepared(proposal)
        except EmaError as fault:
            self.reporting.refuse(ticket, self._told(fault))
            return
        if held is None:
            self.reporting.refuse(ticket, MADE_BEFORE)
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
            self.reporting.refuse(proposal.ticket, self._told(defect))

    def _prepared(self, proposal: Proposal) -> _Held | None:
        """What a change takes, held until the verdict; None where it was made before. Raises as Registry.propose(),
        RunExists, RunNotFound, InvalidRequest."""
        held = self._held
        if held and held.ticket == proposal.ticket:
            return held
        self._let_go(held)  # it was not voted for
        change, ticket = _change_in(proposal), proposal.ticket
        held = self._created(ticket, change) if isinstance(change, Creation) else self._deleted(ticket, change)
        with self._lock:
            self._held = held
        return held

    def _created(self, ticket: Ticket, creation: Creation) -> _Held | None:
        config = whole_config(_config_in(creation), self._shards)
        if same_run(self._registry, config):
            return None
        part = LayoutMap(Layout(config.layout, config.copied), self._shards).shards[self._place].layout
        own = replace(config, layout=tuple(entry.spec for entry in part.params), copied=part.copied)
        whole = json.dumps(to_json(config))
        shard = ShardRow(self._place, self._shards, birth=ticket.base + 1, whole=whole)
        return _Held(ticket, self._registry.propose(own, shard, creation.created_at))

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
        change = _change_in(vote.proposal)
        if isinstance(change, Deletion):
            return _Held(vote.ticket, run=change.run)
        name = _config_in(change).run
        found = [each for each in self._registry.candidates() if each.run.config.run == name]
        if not found:
            raise StorageFailed(f"the shard of run {name!r}, which this host has voted for, is gone")
        return _Held(vote.ticket, found[0])


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
