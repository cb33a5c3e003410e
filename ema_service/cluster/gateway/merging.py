"""The streams of events that hosts send of one run, as the one stream of the whole run.

    host 0   version 1.5 ------- version 1.7 ------------------------ decay_changed --------->
    host 1   ---- version 1.5 ------------ version 1.6 - version 1.7 ------ decay_changed --->
    whole    ---- version 1.5 ------------ version 1.6 - version 1.7 ------ decay_changed --->

A version is told once every host has it or a later one, any other event once every host has told it: whoever is told
finds on all hosts what the event tells of.

Pure. Knows what an event says. Does not know how streams come here, or who waits for one.
"""

from __future__ import annotations

from dataclasses import replace

from ema_client.protocol import RunEvent

__all__ = ["Merging"]

#: Events that some hosts told and others did not yet. More are of hosts that told two changes as one.
_MOST_PENDING = 64


class Merging:
    """What the hosts of one run have told so far. version: the latest one that every host has, as it stands now."""

    def __init__(self, hosts: int) -> None:
        self.version: RunEvent | None = None
        self._hosts = hosts
        #: By place, the host's latest version.
        self._versions: dict[int, RunEvent] = {}
        #: What an event is about -> the places of hosts that are yet to tell it.
        self._pending: dict[tuple[object, ...], set[int]] = {}

    def begin(self, place: int) -> None:
        """A host's stream begins anew. What happened before, the host does not tell any more."""
        for waited_for in self._pending.values():
            waited_for.discard(place)

    def hear(self, place: int, event: RunEvent) -> RunEvent | None:
        """Take in what a host tells. Returns what that makes an event of the whole run."""
        return self._hear_version(place, event) if event.kind == "version" else self._hear_other(place, event)

    def _hear_version(self, place: int, event: RunEvent) -> RunEvent | None:
        self._versions[place] = event
        if len(self._versions) < self._hosts:
            return None
        least = min(self._versions.values(), key=_age)
        if self.version and self.version.version == least.version:
            return None
        self.version = least
        return least

    def _hear_other(self, place: int, event: RunEvent) -> RunEvent | None:
        about = _about(event)
        waited_for = self._pending.setdefault(about, set(range(self._hosts)))
        waited_for.discard(place)
        if waited_for:
            while len(self._pending) > _MOST_PENDING:
                del self._pending[next(iter(self._pending))]
            return None
        del self._pending[about]
        self._steer(event)
        return event

    def _steer(self, event: RunEvent) -> None:
        """Have the version that is told to newcomers say what was changed since it was made."""
        if self.version is None:
            return
        if event.kind == "num_updates_reset":
            self.version = replace(self.version, num_updates=event.num_updates)
        elif event.kind == "decay_changed" and event.average == self.version.average:
            self.version = replace(self.version, decay=event.decay, effective_decay=event.effective_decay)


def _age(event: RunEvent) -> tuple[int, ...]:
    return tuple(int(part) for part in (event.version or "0.0").split("."))


def _about(event: RunEvent) -> tuple[object, ...]:
    """What is the same in all hosts' events of one change."""
    if event.kind == "decay_changed":
        return event.kind, event.average, event.decay
    if event.kind == "num_updates_reset":
        return event.kind, event.version
    if event.snapshot:
        return event.kind, event.snapshot.name, event.snapshot.version
    return event.kind, event.average if event.kind != "run_deleted" else None
