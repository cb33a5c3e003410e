"""Averages that are wished for after the fact: what a caller may name, and whether what came is that average.

Knows: the words of the protocol for a target, and what weights say of theirs. Does not know: routes, sockets, tensors,
or how the service works an average out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Self, TypedDict

from ema_client.errors import UsageError
from ema_client.protocol import LARGEST_SIGMA_REL, MAX_STEP, WeightsInfo, is_name

__all__ = ["KINDS", "LENGTHS", "Target", "Wished", "between", "described", "spread"]

#: The kinds of targets: an average is wished for by exactly one of these words.
KINDS = ("sigma_rel", "decay", "half_life", "window")
#: Those of which one number is the average's length: what a sweep goes through.
LENGTHS = ("sigma_rel", "decay", "half_life")
#: What a time begins with that says whether it is a snapshot's name or a counter. No name has a colon.
_SNAPSHOT, _COUNTER = "snapshot:", "counter:"


class Wished(TypedDict, total=False):
    """An average of a run with ``posthoc``, worked out by the service from the run's ring: one of the first four.

    sigma_rel: the power average of this relative width (Karras et al. 2024), above 0 and below 0.28867.
    decay: what this constant decay would have given. half_life: the same, in updates.
    window: (a, b): the mean of the updates after a, up to b.
    at: of which time: the name of a snapshot of the run, or a counter, one of ``client.run(run).ring.times``; by
        default now. A name of digits alone is "snapshot:1000", to be told from the counter 1000.
    max_error: the largest error of the profile that is accepted, relative to the wished profile; by default 0.05.

    SynthesisRefused tells what cannot be had, and the nearest average that can.
    """

    sigma_rel: float | None
    decay: float | None
    half_life: float | None
    window: tuple[int, int] | None
    at: str | int | None
    max_error: float | None


@dataclass(frozen=True, slots=True)
class Target:
    """An average to ask for: ``kind`` is one of KINDS, ``value`` as in Wished."""

    kind: str
    value: float | tuple[int, int]
    at: str | int | None = None
    max_error: float | None = None

    @classmethod
    def of(cls, wished: Mapping[str, Any], *, called: str) -> Self | None:
        """The target that keyword arguments of the call ``called`` name; None where they name none.

        Raises TypeError, as Python does, for another keyword; UsageError for several targets, for a target that there
        is not, and for ``at`` or ``max_error`` without a target.
        """
        for name in wished:
            if name not in Wished.__annotations__:
                raise TypeError(f"{called}() got an unexpected keyword argument {name!r}")
        given = {name: value for name, value in wished.items() if value is not None}
        kinds = [kind for kind in KINDS if kind in given]
        if not kinds and not given:
            return None
        if len(kinds) != 1:
            said = ", ".join(f"{name}=" for name in kinds or given)
            raise UsageError(
                f"{said}: {'each of them wishes for an average' if kinds else 'no average is wished for'}",
                hint=f"give exactly one of {', '.join(f'{kind}=' for kind in KINDS)}",
            )
        kind = kinds[0]
        return cls(kind, _checked(kind, given[kind]), _time(given.get("at")), _error(given.get("max_error")))

    @property
    def said(self) -> str:
        """The value as the query has it."""
        return f"{self.value[0]}:{self.value[1]}" if isinstance(self.value, tuple) else f"{self.value:.15g}"

    @property
    def query(self) -> dict[str, str | int | float | None]:
        """What asks for this average, on each route that has averages of this sort."""
        at = f"{_COUNTER}{self.at}" if isinstance(self.at, int) else self.at
        return {self.kind: self.said, "at": at, "max_error": self.max_error}

    @property
    def time(self) -> str | int | None:
        """``at`` without what says which of the two it is: a snapshot's name, a counter, or None for now."""
        return self.at.removeprefix(_SNAPSHOT) if isinstance(self.at, str) else self.at

    def __str__(self) -> str:
        return described(self.kind, self.value)

    def faults(self, came: WeightsInfo) -> Iterator[str]:
        """What of the weights that came is not what was wished for, in words."""
        if came.target is None:
            yield f"average {came.average!r} instead of {self}"
        elif not self._is_that_of(came):
            yield f"{came.target} instead of {self}"
        if isinstance(self.at, int) and came.num_updates != self.at:
            yield f"num_updates {came.num_updates} instead of {self.at}"

    def _is_that_of(self, came: WeightsInfo) -> bool:
        if isinstance(self.value, tuple):
            return came.schedule == "window" and came.target is not None and came.target.endswith(f" {self.said}")
        theirs = getattr(came, self.kind)
        schedule = {"sigma_rel": "power", "decay": "constant"}.get(self.kind, self.kind)
        return came.schedule == schedule and theirs is not None and math.isclose(theirs, self.value, rel_tol=1e-9)


def described(kind: str, value: object) -> str:
    """A target for people to read: ``sigma_rel 0.12``."""
    shown = f"{value[0]}:{value[1]}" if isinstance(value, tuple) else f"{value:.9g}"
    return f"{kind.replace('_', '-') if kind == 'half_life' else kind} {shown}"


def spread(kind: str, first: float, last: float, count: int) -> tuple[float, ...]:
    """``count`` values from ``first`` to ``last``, each longer than the one before by the same factor; of 4 digits.

    kind: one of LENGTHS. Raises UsageError for ends that are no such lengths, and for fewer than two values.
    """
    low, high = (_length(kind, _number(kind, end)) for end in (first, last) if _checked(kind, end))
    if count < 2 or low == high:
        said = f"{count} values of {kind} from {first:g} to {last:g} are no sweep"
        raise UsageError(said, hint="such as 12 values of sigma_rel from 0.015 to 0.25")
    ratio = (high / low) ** (1.0 / (count - 1))
    inner = (_of_length(kind, low * ratio**k) for k in range(1, count - 1))
    return (first, *inner, last)


def between(kind: str, one: float, other: float) -> float:
    """The value in the middle of two, on the scale of spread()."""
    return _of_length(kind, math.sqrt(_length(kind, one) * _length(kind, other)))


def _length(kind: str, value: float) -> float:
    """What grows by factors: of a decay, what an update takes of the parameters."""
    return 1.0 - value if kind == "decay" else value


def _of_length(kind: str, length: float) -> float:
    rounded = float(f"{length:.4g}")
    # Another subtraction would leave digits of no meaning.
    return round(1.0 - rounded, 15) if kind == "decay" else rounded


def _checked(kind: str, value: Any) -> float | tuple[int, int]:
    if kind == "window":
        first, last = _pair(value)
        if not 0 <= first < last <= MAX_STEP:
            raise UsageError(f"window={value!r}: begins at 0 or later, and ends after that", hint="window=(1000, 2000)")
        return first, last
    number = _number(kind, value)
    if kind == "sigma_rel" and not 0.0 < number < LARGEST_SIGMA_REL:
        raise UsageError(
            f"sigma_rel={value} is not above 0 and below {LARGEST_SIGMA_REL:.6f}, at which all updates weigh the same",
            hint="0.05 is short, 0.10 is usual, 0.25 is long",
        )
    if kind == "decay" and not 0.0 < number < 1.0:
        raise UsageError(f"decay={value} is not above 0 and below 1")
    if kind == "half_life" and not 0.0 < number < math.inf:
        raise UsageError(f"half_life={value} is no number of updates above 0")
    return number


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, tuple | list) and len(value) == 2 and all(_is_integer(each) for each in value):
        return int(value[0]), int(value[1])
    raise UsageError(f"window={value!r} is no pair of counters", hint="window=(1000, 2000)")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise UsageError(f"{name}={value!r} is no number")
    return float(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _time(at: Any) -> str | int | None:
    if at is None or (isinstance(at, str) and is_name(at.removeprefix(_SNAPSHOT))):
        return at
    if isinstance(at, str) and (digits := at.removeprefix(_COUNTER)) != at and digits.isascii() and digits.isdigit():
        at = int(digits)
    if _is_integer(at) and 0 <= at <= MAX_STEP:
        return int(at)
    raise UsageError(f"at={at!r} is no name of a snapshot, nor a counter", hint="leave it out for now")


def _error(max_error: Any) -> float | None:
    if max_error is None:
        return None
    number = _number("max_error", max_error)
    if not 0.0 < number < math.inf:
        raise UsageError(f"max_error={max_error} is not above 0", hint="the default is 0.05")
    return number
