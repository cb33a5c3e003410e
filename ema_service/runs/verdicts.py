"""Complete sets of parts that await the verdict of all hosts of a run: by trainer, in the order of steps.

A later set of the same trainer has to wait for them. To the coordinator a newer step takes an older one's place, for it
cannot know that the older one's parts were lost with a host, and are on their way again.

Knows steps, terms, and who waits. Does not know parts' bytes, runs, or how hosts decide.
"""

from __future__ import annotations

from concurrent.futures import Future

from ema_service.runs.gathering import Terms

__all__ = ["PATIENCE_SECONDS", "Verdicts"]

#: Seconds that hosts of a run wait for whoever is to complete something: a proposal behind one that nobody completes, a
#: complete set of parts behind earlier ones of the same trainer.
PATIENCE_SECONDS = 10.0

#: Of so many sets a verdict is awaited; the oldest is forgotten. A trainer has three steps on their way at the most.
_MOST = 16


class Verdicts:
    """The sets of one run. Not thread-safe: under the lock of Parts."""

    def __init__(self) -> None:
        self._awaited: dict[tuple[int, Terms], Future[None]] = {}

    def begin(self, step: int | None, terms: Terms) -> None:
        """A set is complete: from here on later ones wait for it. Again where the set had to come again."""
        if step is None:
            return
        if (step, terms) not in self._awaited:
            self._awaited[step, terms] = future = Future[None]()
            future.set_running_or_notify_cancel()  # who gives up waiting ends the wait of nobody else
        if len(self._awaited) > _MOST:
            self._end(next(iter(self._awaited)))

    def ahead(self, step: int | None, terms: Terms, applied: int | None) -> list[Future[None]]:
        """Done once the earlier sets of the same trainer are decided. applied: the run's step, which none of them is
        behind."""
        passed = -1 if applied is None else applied
        found = self._awaited.items()
        return [future for (other, group), future in found if group == terms and passed < other < (step or 0)]

    def end(self, step: int | None, terms: Terms) -> None:
        """A set is applied, or will never be."""
        if step is not None:
            self._end((step, terms))

    def end_all(self) -> None:
        """The run is gone."""
        for key in list(self._awaited):
            self._end(key)

    def _end(self, key: tuple[int, Terms]) -> None:
        if future := self._awaited.pop(key, None):
            future.set_result(None)
