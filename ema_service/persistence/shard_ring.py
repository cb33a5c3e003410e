"""The ring of a shard: each host writes a snapshot by itself, and hosts have it in the ring together or not at all.

| | on this host |
|---|---|
| an update after which a snapshot is due | written in the background, *begun*: none of the ring yet |
| wanted() | which snapshots all hosts are to have from now on: with those that are begun, without what is too many |
| lacking() | which of them this host does not have: a disk was full, a file is gone |
| rows(), settle() | with the verdict of all hosts these are the ring, and older ones go |

When a snapshot is due follows from the ring and the update, so that hosts write the same ones unasked. What did not
lead to the run's version follows from that, and goes on each host by itself.

Knows what one host has. Does not know the other hosts, or how they agree (cluster).
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from ema_client.errors import Overloaded, StorageFailed
from ema_client.protocol import LAYOUT_DTYPES
from ema_service.persistence.ring import HELD_BYTES, StoredRing
from ema_service.persistence.ring_shelf import STRIDES, Leading, RingSnapshot, text_of, version_in
from ema_service.shadows.state import Version
from ema_service.storage import RowChange

__all__ = ["ShardRing"]

#: Version, name and size of a file -> its bytes.
ReadFile: TypeAlias = Callable[[str, str, int], Iterator[bytes]]

#: Snapshots that are begun, of large averages: one that hosts are asked for, and the next one.
_LEAST_BEGUN = 2


class ShardRing(StoredRing):
    """The ring of one shard. Thread-safe.

    More than twenty methods: what hosts agree on, what a host copies from another, and where a shard's ring differs.
    """

    _together = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """args, kwargs: as for StoredRing."""
        super().__init__(*args, **kwargs)
        self.begun = self._unsettled

    @property
    def is_unsettled(self) -> bool:
        """Whether the hosts are to agree on another ring."""
        return bool(self.shelf.lost) or self._unsettled > 0

    def wanted(self) -> tuple[int, tuple[str, ...]] | None:
        """The epoch of the run, and the versions of the snapshots that its ring is to have; None where these are what
        the ring has. Takes milliseconds."""
        if (state := self._current()) is None:
            return None
        leading, lost = self.shelf.leading_to(state.version), self.shelf.lost
        kept = [each for each in leading.snapshots if each.version not in lost]
        if not leading.begun and len(kept) == len(leading.snapshots):
            return None
        for each in leading.begun:  # one after the other, as they came: what is too many hangs on that
            kept.append(each)
            surplus = self.shelf.ring_of(kept).surplus()
            kept = [one for one in kept if one.begin or one.time != surplus]
        return state.version.epoch, tuple(each.version for each in kept)

    def lacking(self, versions: Collection[str]) -> list[str]:
        """Which of these snapshots are not here. Raises Overloaded while one may still be being written."""
        here = {each.version for each in self.shelf.all} - self.shelf.lost
        found = [version for version in versions if version not in here]
        if found and not self.is_written:
            raise Overloaded(f"snapshot {found[0]} of the ring is still being written", retry_after=0.1)
        return found

    def rows(self, versions: Sequence[str]) -> RowChange:
        """The rows with which the ring has these snapshots, and no others; later ones that are begun stay."""
        shown = [each for each in self.shelf.all if each.begun and each.version in versions]
        texts = tuple((each.version, text_of(replace(each, begun=False))) for each in shown)
        return RowChange(ring_shown=texts, ring_gone=tuple(self._gone(versions)))

    def settle(self, versions: Sequence[str]) -> None:
        """The rows are those that rows() gave. Files of what is there no more go soon. Takes microseconds."""
        gone = self._gone(versions)
        self.shelf.become(versions, gone)
        with contextlib.suppress(RuntimeError):  # the server stops; its next start removes the files
            self._threads.submit(self._remove_files, gone)
        self._tell()

    def give_up(self, versions: Collection[str], why: str) -> None:
        """Other hosts lack these snapshots: this one takes them for lost, until all agree on a ring without them.
        why: told as ``trouble``."""
        self.shelf.lost |= {each.version for each in self.shelf.all if each.version in versions and not each.begun}
        begun = [each for each in self.shelf.all if each.version in versions and each.begun]
        with self._writing:
            for each in begun:
                self.shelf.drop(each)
        self.trouble = why
        self._tell()

    def lent(self) -> list[dict[str, Any]]:
        """The snapshots of the ring, for a host that is to have the same: the text of the row, and by name the file's
        size. Raises StorageFailed where one cannot be read."""
        state = self._current()
        there = self.shelf.leading_to(state.version).snapshots if state else ()
        try:
            return [{"text": text_of(each), "files": self._sizes(each)} for each in there]
        except OSError as fault:
            raise StorageFailed(f"the ring of run {self._config.run!r} cannot be read: {fault}") from fault

    def copy(self, lent: Sequence[Mapping[str, Any]], read: ReadFile) -> None:
        """Have the snapshots that another host has lent, and no others. read: gives the bytes of a file, by version,
        name and size. Raises StorageFailed, and what ``read`` raises."""
        theirs = {str(each["text"]): each["files"] for each in lent}
        try:
            with self._writing:
                own = {text_of(each): each for each in self.shelf.all if each.version not in self.shelf.lost}
                for each in self.shelf.all:
                    if text_of(each) not in theirs.keys() & own.keys():
                        self.shelf.drop(each)
                for text in theirs.keys() - own.keys():
                    version = version_in(text)
                    self.shelf.adopt(text, {name: read(version, name, size) for name, size in theirs[text].items()})
        except (OSError, ValueError, sqlite3.Error) as fault:
            raise StorageFailed(f"the ring of run {self._config.run!r} was not copied: {fault}") from fault

    @property
    def is_written(self) -> bool:
        """Whether nothing is being written."""
        return not self._waiting

    @property
    def ended(self) -> int:
        """How often a snapshot has come to be in the ring, or was given up."""
        return self.begun - len(self._waiting) - self._unsettled

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be written, dropped, or agreed on."""
        return not self._waiting and not self.is_unsettled

    @property
    def most_bytes(self) -> int:
        """As StoredRing.most_bytes, with what is begun."""
        width = LAYOUT_DTYPES[self._posthoc.dtype]
        return super().most_bytes + (self._most_begun - 1) * len(self._names) * self._layout.elements * width

    # ----------------------------------------------------------------------------------------------------------------

    def _sizes(self, snapshot: RingSnapshot) -> dict[str, int]:
        names = (*snapshot.averages, STRIDES)
        return {name: self.shelf.file(snapshot.version, name).stat().st_size for name in names}

    @property
    def _unsettled(self) -> int:
        return sum(each.begun for each in self.shelf.all)

    @property
    def _most_begun(self) -> int:
        """How many snapshots may be begun: as many as may wait to be written, and no more than two rings."""
        each = max(1, self._layout.shadow_bytes * len(self._names))
        return max(_LEAST_BEGUN, min(2 * self._posthoc.snapshots, HELD_BYTES // each))

    def _coming(self, version: Version) -> list[int]:
        begun = self.shelf.leading_to(version).begun
        return [*super()._coming(version), *(each.time for each in begun if not each.begin)]

    def _has_more(self, leading: Leading) -> bool:
        return leading.has_stray or len(leading.begun) > self._most_begun + 1

    def _more(self, leading: Leading) -> list[RingSnapshot]:
        # What the run begins with is had once alone.
        return [*leading.stray, *[each for each in leading.begun if not each.begin][: -self._most_begun]]

    def _gone(self, versions: Sequence[str]) -> list[str]:
        """What goes once the ring has these snapshots: the others of the ring, and what was begun before the newest."""
        newest = max(map(_age, versions), default=(0, 0))
        left = [each for each in self.shelf.all if each.version not in versions]
        return [each.version for each in left if not each.begun or _age(each.version) < newest]

    def _remove_files(self, versions: Sequence[str]) -> None:
        with self._writing:
            for version in versions:
                self.shelf.remove_files(version)


def _age(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
