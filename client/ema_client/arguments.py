"""Arguments of a user's calls, checked before anything is sent.

Knows: what may name a run, an average or a snapshot, and which decays, dtypes and numbers of lanes there are. Does not
know: the calls, the service, tensors. What the service alone can judge is judged there.
"""

from __future__ import annotations

from ema_client import protocol
from ema_client.errors import InvalidDecay, UsageError
from ema_client.http.pace import MOST_FORCED

__all__ = ["checked_decay", "checked_dtype", "checked_lanes", "named"]


def named(value: str, what: str) -> str:
    """``value`` as the name of a run, a snapshot or an average, which ``what`` says. Raises UsageError for no name."""
    if not protocol.is_name(value):
        raise UsageError(
            f"{value!r} cannot name {'an' if what[0] in 'aeiou' else 'a'} {what}",
            hint="up to 128 letters, digits, dots, dashes and underscores, beginning with a letter or a digit",
        )
    return value


def checked_decay(decay: float) -> float:
    """``decay`` as a float. Raises InvalidDecay unless it lies in [0, 1]."""
    # Written so that NaN fails.
    if not 0.0 <= decay <= 1.0:
        raise InvalidDecay(f"decay must be between 0 and 1, not {decay}")
    return float(decay)


def checked_dtype(said: str) -> str:
    """A dtype as safetensors writes it. Raises UsageError for one in which weights cannot be had."""
    if said.upper() not in protocol.LAYOUT_DTYPES:
        raise UsageError(
            f"weights cannot be had as {said!r}", hint=f"ask for one of {', '.join(protocol.LAYOUT_DTYPES)}"
        )
    return said.upper()


def checked_lanes(lanes: int | None) -> int | None:
    """The number of lanes. Raises UsageError unless it is None or lies between 1 and the most there may be."""
    if lanes is not None and not 1 <= lanes <= MOST_FORCED:
        raise UsageError(
            f"lanes={lanes} is not between 1 and {MOST_FORCED}", hint="leave lanes out: what pays is found"
        )
    return lanes
