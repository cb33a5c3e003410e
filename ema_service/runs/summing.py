"""Sums of stored weights: opens what recipes name, in the ring, in snapshots and in the run's state, to be read.

Knows where the bytes of each source lie. Does not know how recipes are found (posthoc), how sums are worked out
(bodies.mixing), or who reads them.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass

from ema_client.wire import Entry
from ema_service.bodies.mixing import Ingredient, Mixture
from ema_service.bodies.outgoing import ReadBytes
from ema_service.memory import Arena
from ema_service.persistence import RingSnapshot
from ema_service.runs.posthoc import Synthesiser
from ema_service.runs.recipes import Recipe, Source
from ema_service.runs.run import Run
from ema_service.storage import TensorFile

__all__ = ["Summing", "arenas_of"]


@dataclass(frozen=True, slots=True)
class Summing:
    """Sums for one run. synthesiser: has the files. threads: that blocks of the sums are divided among; not those on
    which sums are opened and read. Thread-safe."""

    run: Run
    synthesiser: Synthesiser
    threads: Executor

    def opened(self, recipes: Sequence[Recipe], stack: ExitStack) -> Mixture:
        """The sums of recipes of one state, whose files stay open until ``stack`` ends; arenas of the state are the
        caller's to hold. Blocks.

        Raises FileNotFoundError where the ring dropped a snapshot meanwhile; SnapshotDamaged, SnapshotNotFound, and as
        Snapshots.open().
        """
        arenas, scratch = arenas_of(recipes), _Scratch()

        def opened(source: Source) -> tuple[ReadBytes, Sequence[Entry]]:
            if source.of is None:
                return _arena_reader(self.run, arenas[source]), self.run.layout.shadows
            file = self._file(source)
            stack.callback(file.close)
            ringed = isinstance(source.of, RingSnapshot)
            return _file_reader(file, scratch), self.synthesiser.ring.shelf.entries if ringed else file.header.entries

        sources = _sources(recipes)
        ingredients = [
            Ingredient(*opened(source), tuple(_weight(each, source) for each in recipes)) for source in sources
        ]
        return Mixture(self.run.layout.shadows, ingredients, self.threads, copied=self.run.layout.copied)

    def _file(self, source: Source) -> TensorFile:
        if isinstance(source.of, RingSnapshot):
            return self.synthesiser.ring.shelf.open(source.of, source.average)
        if source.of is None:
            raise TypeError("weights of the run's state lie in no file")
        return self.synthesiser.snapshots.open(source.of.name, source.average)[0]


def arenas_of(recipes: Sequence[Recipe]) -> dict[Source, Arena]:
    """What recipes of one state need of its arenas."""
    state = recipes[0].state
    current = dict(zip((average.name for average in state.version.averages), state.arenas, strict=True))
    return {source: current[source.average] for source in _sources(recipes) if source.of is None}


def _sources(recipes: Sequence[Recipe]) -> list[Source]:
    """What any of the recipes needs, once; last what copied tensors are taken from."""
    newest = recipes[0].newest
    return [*dict.fromkeys(each for recipe in recipes for each in recipe.sources if each != newest), newest]


def _weight(recipe: Recipe, source: Source) -> float:
    return dict(zip(recipe.sources, recipe.weights, strict=True)).get(source, 0.0)


class _Scratch(threading.local):
    """Memory of each thread that pieces of all files are read into, one after the other: it stays in the core's
    cache."""

    memory = bytearray()

    def take(self, nbytes: int) -> memoryview:
        if len(self.memory) < nbytes:
            self.memory = bytearray(nbytes)
        return memoryview(self.memory)[:nbytes]


def _file_reader(file: TensorFile, scratch: _Scratch) -> ReadBytes:
    """What was read before, on the same thread, is not needed any more."""

    def read(start: int, stop: int) -> memoryview:
        piece = scratch.take(stop - start)
        file.read_into(piece, start)
        return piece

    return read


def _arena_reader(run: Run, arena: Arena) -> ReadBytes:
    """Of a device, piece by piece: no copy of the whole is made."""
    if run.memory.on_host or arena.twin is not None:
        data = arena.host.data
        return lambda start, stop: data[start:stop]
    return lambda start, stop: run.memory.to_host(arena.data[start:stop]).data
