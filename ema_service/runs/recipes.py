"""Recipes: of which stored weights averages are the sum, found by one host and followed by all hosts of a run.

Each host sums its own rows. The weights of the sum come from one of them: what a host knows of the steps between two
updates, and how its processor rounds, may differ from host to host.

Knows a recipe's text. Does not know how recipes are found, or what this host has of their sources (posthoc).
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

from ema_client.errors import InvalidRequest
from ema_client.protocol import SnapshotInfo, WeightsInfo
from ema_service.averaging import ConstantDecay, ConstantHalfLife, SigmaRel, Synthesis, Target, Window
from ema_service.persistence import RingSnapshot
from ema_service.shadows import State

__all__ = ["GivenRecipes", "GivenSource", "Recipe", "Source", "read", "text_of"]

#: Most bytes of a recipe: 8 targets of a ring of 64 times of 8 averages take 100 KB.
_MOST_BYTES = 1 << 20
#: By the name that stands in a recipe's text, the kinds of targets, and the numbers that each of them is made of.
_TARGETS: dict[str, tuple[Callable[..., Target], Callable[[Any], float]]] = {
    "SigmaRel": (SigmaRel, float),
    "ConstantDecay": (ConstantDecay, float),
    "ConstantHalfLife": (ConstantHalfLife, float),
    "Window": (Window, int),
}


@dataclass(frozen=True, slots=True)
class Source:
    """Stored weights: those of an average at a time, in the ring, in a snapshot, or (None) in the run's state."""

    average: str
    time: int
    of: RingSnapshot | SnapshotInfo | None


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an average is worked out: ``weights`` of ``sources``.

    info: what is told of the result. state: the run's. newest: a source of the time that the average is of.
    """

    info: WeightsInfo
    state: State
    target: Target
    synthesis: Synthesis
    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    newest: Source

    @property
    def identity(self) -> str:
        """A text that differs for sums of other bytes, of one run and version."""
        return f"{self.state.version.lineage} {self.target!r} {list(zip(self.sources, self.weights, strict=True))!r}"


class GivenSource(NamedTuple):
    """A source as a recipe names it. kind: "now", "ring" or "snapshot". name: the version's, or the snapshot's.
    created_at: the snapshot's, 0 of any other."""

    kind: str
    name: str
    created_at: float
    average: str
    time: int


class GivenRecipes(NamedTuple):
    """Recipes of one time, as another host has found them.

    lineage, version: of the run's state. of, step, time: of the averages. sources: of all of them, the last one the
    newest. weights: by recipe, one for each source. targets: by recipe.
    """

    lineage: str
    version: str
    of: str
    step: int | None
    time: int
    sources: tuple[GivenSource, ...]
    weights: tuple[tuple[float, ...], ...]
    errors: tuple[float, ...]
    amplifications: tuple[float, ...]
    targets: tuple[Target, ...]


def text_of(recipes: Sequence[Recipe]) -> str:
    """Recipes of one time as a word that fits into a query."""
    first = recipes[0]
    sources = [*dict.fromkeys(each for one in recipes for each in one.sources if each != first.newest), first.newest]
    shares = [dict(zip(one.sources, one.weights, strict=True)) for one in recipes]
    said = GivenRecipes(
        lineage=first.state.version.lineage,
        version=str(first.state.version),
        of=first.info.version,
        step=first.info.step,
        time=first.info.num_updates,
        sources=tuple(map(_named, sources)),
        weights=tuple(tuple(share.get(each, 0.0) for each in sources) for share in shares),
        errors=tuple(one.synthesis.error for one in recipes),
        amplifications=tuple(one.synthesis.amplification for one in recipes),
        targets=tuple(one.target for one in recipes),
    )
    text = json.dumps(said, default=lambda target: [type(target).__name__, *astuple(target)])
    return base64.urlsafe_b64encode(zlib.compress(text.encode())).decode()


def _named(source: Source) -> GivenSource:
    if source.of is None:
        return GivenSource("now", "", 0.0, source.average, source.time)
    if isinstance(source.of, RingSnapshot):
        return GivenSource("ring", source.of.version, 0.0, source.average, source.time)
    return GivenSource("snapshot", source.of.name, source.of.created_at, source.average, source.time)


def read(text: str) -> GivenRecipes:
    """The recipes in a word. Raises InvalidRequest for any other word."""
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(base64.b64decode(text, altchars=b"-_", validate=True), _MOST_BYTES)
        found = _checked(json.loads(raw) if unpacker.eof else None)
    except (ValueError, TypeError, KeyError, OverflowError, zlib.error, RecursionError) as fault:
        raise InvalidRequest(f"recipe: not what a host of the run has answered: {fault}") from None
    return found


def _checked(said: Any) -> GivenRecipes:
    """Recipes from JSON. Raises ValueError, TypeError, KeyError, OverflowError."""
    lineage, version, of, step, time, sources, weights, errors, amplifications, targets = said
    found = GivenRecipes(
        str(lineage),
        str(version),
        str(of),
        None if step is None else int(step),
        int(time),
        tuple(GivenSource(str(k), str(n), float(c), str(a), int(t)) for k, n, c, a, t in sources),
        tuple(tuple(map(float, each)) for each in weights),
        tuple(map(float, errors)),
        tuple(map(float, amplifications)),
        tuple(_target(*each) for each in targets),
    )
    if not found.sources or any(len(each) != len(found.sources) for each in found.weights):
        raise ValueError("each source has one weight in each average")
    if not len(found.weights) == len(found.errors) == len(found.amplifications) == len(found.targets):
        raise ValueError("each average has one target, and one error")
    if not all(map(math.isfinite, (*sum(found.weights, ()), *found.errors, *found.amplifications))):
        raise ValueError("a weight is no number")
    return found


def _target(kind: str, *numbers: Any) -> Target:
    """Raises TypeError, ValueError, KeyError, OverflowError; TargetRefused, a ValueError."""
    make, number = _TARGETS[kind]
    return make(*map(number, numbers))
