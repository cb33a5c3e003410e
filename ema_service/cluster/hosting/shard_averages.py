"""Averages that a shard gets, or loses: on all hosts or on none, each with the room that it takes.

    AverageAdded      each host takes memory and disk space, and votes; with the verdict the setup's row says so
    AverageRemoved    with the verdict the setup's row is without; then memory and disk space are given back

Room that is taken for an average waits for the verdict, and goes back where the change is made nowhere. A host that is
filled has the averages of its twin, whichever it had.

Knows the averages of one shard. Does not know who asks for one (host), or who votes for what (shard_run).
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeAlias

from ema_client.errors import EmaError, InvalidRequest
from ema_client.protocol import AverageConfig, from_json
from ema_service.cluster.messages import AverageAdded, AverageRemoved
from ema_service.persistence import (
    ShardMemoryVersions,
    ShardVersions,
    told_average_added,
    told_average_removed,
)
from ema_service.persistence.rows import dump_setup
from ema_service.runs import Run, Setup
from ema_service.storage import RowChange

__all__ = ["RoomFor", "ShardAverages"]

_log = logging.getLogger(__name__)

#: Takes the room of a setup's averages; as Registry.room_for_averages().
RoomFor: TypeAlias = Callable[[Run, Setup], Callable[[bool], None]]


class ShardAverages:
    """The averages of one shard that come and go. Thread-safe."""

    def __init__(
        self, run: Run, versions: ShardVersions | ShardMemoryVersions, saving: Executor, room_for: RoomFor
    ) -> None:
        """saving: gives room back. room_for: as Registry.room_for_averages()."""
        self._run = run
        self._versions = versions
        self._saving = saving
        self._room_for = room_for
        self._lock = threading.Lock()
        #: By the key of a change that is not decided: what ends the room that it took.
        self._rooms: dict[str, Callable[[bool], None]] = {}
        #: Whether the run has averages from its twin whose room is not taken yet.
        self._lacks_room = False

    def prepare(self, change: AverageAdded | AverageRemoved, key: str) -> Setup | None:
        """The setup that a change makes, whose room is taken; None where the run has it. Touches the disk.

        Raises as Ledger.check_writable(), as Succession.with_average() or without_average(), and as
        Registry.room_for_averages().
        """
        ledger = self._run.ledger
        ledger.check_writable()
        if ledger.setup.made_by(key):
            return None
        if isinstance(change, AverageRemoved):
            return ledger.succession.without_average(ledger.version, change.name, key)
        setup = ledger.succession.with_average(_config_in(change), change.lineage, key)
        if setup is not None:
            self._take_room(setup, key)
        return setup

    def again(self, change: AverageAdded | AverageRemoved, key: str) -> Setup:
        """The setup that a change makes which was voted for before a restart. Where there is no room by now for an
        average that was added, its versions fail to be written, as on any disk that fills up."""
        setup = self._run.ledger.setup
        if isinstance(change, AverageRemoved):
            return setup.without(change.name, key)
        setup = setup.with_one_more(_config_in(change), change.lineage, key)
        try:
            self._take_room(setup, key)
        except EmaError as fault:
            _log.error("run %s: %s", self._run.config.run, fault)
        return setup

    def adopt(self, setup: Setup, let_go: Callable[[Setup], None]) -> None:
        """Have the averages of ``setup``, which the twin has, in place of the run's own, and room for them. Touches the
        disk. let_go: has the run begin with nothing but these averages; called where they are others.

        Raises as Registry.room_for_averages(), and what ``let_go`` raises; then it is to be called again.
        """
        if dump_setup(setup) != dump_setup(self._run.ledger.setup):
            self.forget()
            let_go(setup)
            self._lacks_room = True
        if self._lacks_room:
            self._room_for(self._run, setup)(True)
            self._lacks_room = False
            self._give_back()

    def forget(self) -> None:
        """Give back the room of changes that the other hosts decided without this one. Touches the disk."""
        for end in self._ends():
            end(False)

    def rows(self, change: AverageAdded | AverageRemoved, setup: Setup) -> RowChange:
        """What changes on the disk with the verdict on a change, which makes this setup."""
        if isinstance(change, AverageRemoved):
            said = told_average_removed(change.name)
        else:
            said = told_average_added(setup.members[-1].config)
        return RowChange(averages=dump_setup(setup), line=said.line(self._run.ledger.version))

    def settle(self, key: str, *, made: bool) -> None:
        """The change of this key is decided: its room stays, or is given back. Any other key is nothing's."""
        with self._lock:
            end = self._rooms.pop(key, None)
        if end and made:
            end(True)
        elif end:
            self._saving.submit(end, False)

    def give_back(self) -> None:
        """Give back the room of averages that the run does not have any more, soon."""
        self._saving.submit(self._give_back)

    def close(self) -> None:
        """Wait for no verdict any more: what was voted for is there at the next start."""
        for end in self._ends():
            end(True)

    def _ends(self) -> list[Callable[[bool], None]]:
        """What ends the rooms that wait for a verdict, of which none waits from now on."""
        with self._lock:
            ends, self._rooms = list(self._rooms.values()), {}
        return ends

    def _give_back(self) -> None:
        try:
            with self._versions.steady():
                self._versions.give_back()
        except OSError as fault:
            _log.error("run %s: the room of a removed average: %s", self._run.config.run, fault)

    def _take_room(self, setup: Setup, key: str) -> None:
        """Raises as Registry.room_for_averages()."""
        with self._lock:
            if key in self._rooms:
                return
        end = self._room_for(self._run, setup)
        with self._lock:
            self._rooms[key] = end


def _config_in(change: AverageAdded) -> AverageConfig:
    """Raises InvalidRequest."""
    try:
        return from_json(AverageConfig, json.loads(change.config))
    except ValueError as fault:
        raise InvalidRequest(f"no average: {fault}") from None
