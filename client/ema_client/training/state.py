"""The EMA in a training's checkpoint: a few strings and numbers that name a snapshot on the service, and the way back.

Knows what such a state says, and when a run must go back to its snapshot. Does not know the trainer: which updates are
on their way, or which rank asks.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from ema_client.client import EmaClient
from ema_client.errors import StorageDisabled, UsageError

__all__ = ["check_state_is_of", "rewind_to", "saved_state"]

#: Snapshots of states are named so, and this many of them stay: trainers keep a few checkpoints, not all.
_STATES = "state"
_KEPT_STATES = 10
#: What a state must say.
_FIELDS = {"run": str, "version": str, "step": int | None, "snapshot": str | None}
#: So much of what is no state is shown.
_SHOWN = 80


def saved_state(client: EmaClient, run: str) -> dict[str, Any]:
    """The run as it is now, with a snapshot of its weights; with a warning and without one where there is no disk."""
    info = client.run(run)
    state = {"run": run, "version": info.version, "step": info.step, "num_updates": info.num_updates}
    try:
        snapshot = client.snapshot(run, f"{_STATES}-{info.version}", keep=_KEPT_STATES)
    except StorageDisabled:
        # Of state_dict()'s caller.
        warnings.warn(f"the service keeps no snapshot of run {run!r}: it has no disk", stacklevel=3)
        return {**state, "snapshot": None}
    return {**state, "snapshot": snapshot.name}


def check_state_is_of(run: str, state: object) -> None:
    """Raises UsageError for another run's state, and for what is none."""
    if not isinstance(state, Mapping) or not all(
        isinstance(state.get(key, ...), kind) for key, kind in _FIELDS.items()
    ):
        raise UsageError(
            f"this is not the state of a run: {str(state)[:_SHOWN]!r}",
            hint="give what RemoteEma.state_dict() returned",
        )
    if state["run"] != run:
        raise UsageError(
            f"the state is of run {state['run']!r}, this is {run!r}",
            hint="give the RemoteEma the run's name of the checkpoint, and resume=True",
        )


def rewind_to(client: EmaClient, state: Mapping[str, Any]) -> None:
    """Bring the state's run back to it. Raises UsageError where the run went on and there is no snapshot."""
    run = state["run"]
    if client.run(run).version == state["version"]:
        return
    if state["snapshot"] is None:
        raise UsageError(
            f"run {run!r} went on since version {state['version']}, of which there is no snapshot",
            hint="let the service keep runs on disk (--data-dir), or begin a new run with the model as it is",
        )
    client.rewind(run, state["snapshot"])
