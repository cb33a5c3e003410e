"""The snapshots that a training's checkpoints refer to: each stays as long as one of its checkpoints, and no longer.

A snapshot is named ``checkpoint-SLOT-VERSION``. The snapshot of a checkpoint that is gone is deleted. Where that does
not succeed, as a token of scope "push" does not allow it, the snapshot's slot is given to the next snapshot, which the
service lets take the place of the old one (``keep=1``): as many snapshots stay as there were checkpoints at a time.

Knows: which checkpoint refers to which snapshot. Does not know: frameworks, what a checkpoint is, or who deletes it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from ema_client.client import EmaClient
from ema_client.errors import EmaError, Forbidden, NotFound
from ema_client.protocol import RunInfo
from ema_client.training.state import saved_state

__all__ = ["KeptSnapshots"]

_log = logging.getLogger("ema_client")

_NAME = re.compile(r"checkpoint-(\d+)-(.+)")


class KeptSnapshots:
    """The checkpoints of one run, by path, each with its snapshot. For the process that writes checkpoints."""

    def __init__(self, client: EmaClient, run: str) -> None:
        self._client = client
        self._run = run
        self._held: dict[str, str] = {}
        #: Snapshots without a checkpoint, which are to be deleted or to be replaced.
        self._free: set[str] = set()
        #: Whether deleting is worth a try: the token may, and the service answered last.
        self._may_delete = self._answers = True

    @property
    def held(self) -> dict[str, str]:
        """Path of each checkpoint -> the snapshot it refers to."""
        return dict(self._held)

    def state(self) -> dict[str, Any]:
        """The run's state of now, for a checkpoint, with a snapshot that stays until the checkpoint is gone."""
        self._answers = False
        state = saved_state(self._client, self._run, take=self._take)
        self._answers = True
        return state

    def hold(self, path: str, snapshot: str | None) -> None:
        """The checkpoint at ``path`` refers to ``snapshot`` from now on, whatever it referred to before.

        Never raises for what the service does: what cannot be deleted now is deleted later.
        """
        before = self._held.pop(path, None)
        if snapshot is not None:
            self._held[path] = snapshot
            self._free.discard(snapshot)
        self._let_go(before)

    def let_go(self, path: str) -> None:
        """The checkpoint at ``path`` is gone."""
        self.hold(path, None)

    def know(self, held: Mapping[str, str]) -> None:
        """Take over checkpoints of an earlier process."""
        self._held = {**held, **self._held}

    def _let_go(self, snapshot: str | None) -> None:
        if snapshot is None or snapshot in self._held.values():
            return
        self._free.add(snapshot)
        self._delete_free()

    def _delete_free(self) -> None:
        for snapshot in sorted(self._free):
            if not (self._may_delete and self._answers):
                return
            try:
                self._client.delete_snapshot(self._run, snapshot)
            except NotFound:
                pass
            except Forbidden:
                self._may_delete = False
                return
            except EmaError as error:
                self._answers = False
                _log.warning("run %r: snapshot %r of a checkpoint that is gone stays: %s", self._run, snapshot, error)
                return
            self._free.discard(snapshot)

    def _take(self, info: RunInfo) -> str:
        names = [each.name for each in self._client.snapshots(self._run)]
        for name in names:
            if _version(name) == info.version:
                # Two checkpoints of one step.
                self._free.discard(name)
                return name
        slots: dict[int, set[str]] = {}
        for name in names:
            if found := _NAME.fullmatch(name):
                slots.setdefault(int(found[1]), set()).add(name)
        free = [slot for slot, taken in slots.items() if taken <= self._free]
        slot = min(free) if free else max(slots, default=-1) + 1
        made = self._client.snapshot(self._run, f"checkpoint-{slot}-{info.version}", keep=1 if free else None)
        self._free -= slots.get(slot, set())
        return made.name


def _version(name: str) -> str | None:
    found = _NAME.fullmatch(name)
    return found[2] if found else None
