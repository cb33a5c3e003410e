"""The EMA in a training's checkpoint: a few strings and numbers that name a snapshot on the service, and the way back.

Knows what such a state says, and when a run must be rewound to its snapshot. Does not know the trainer: which updates
are on their way, or which rank asks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ema_client.client import EmaClient
from ema_client.errors import StorageDisabled, UsageError
from ema_client.protocol import RunInfo

__all__ = ["LACKS", "MOST_STATES", "check_state_is_of", "rewind_to", "saved_state", "snapshot_of_step"]

#: A state's snapshot is named so, with the run's version behind.
_STATES = "state"
#: So many snapshots of states stay by default, the newest: trainers keep a few checkpoints, not all.
MOST_STATES = 10
#: A checkpoint that was written without its EMA says why under this key.
LACKS = "lacks"
#: The fields of a state, and what each may hold.
_FIELDS = {"run": str, "version": str, "step": int | None, "snapshot": str | None}
#: Of a value that is no state, so many characters are shown.
_SHOWN = 80


def saved_state(
    client: EmaClient,
    run: str,
    *,
    keep: int | None = MOST_STATES,
    take: Callable[[RunInfo], str] | None = None,
) -> dict[str, Any]:
    """The state of a run as it is now, which names a snapshot of the run's weights, taken now.

    Where the service has no disk for snapshots, the state names none, and a warning says so.

    keep: so many snapshots of states stay, the newest; None: all.
    take: takes the snapshot of the run as it is now, and returns the snapshot's name; by default one of the states'.
    """
    info = client.run(run)
    state = {"run": run, "version": info.version, "step": info.step, "num_updates": info.num_updates}
    try:
        name = take(info) if take else client.snapshot(run, f"{_STATES}-{info.version}", keep=keep).name
    except StorageDisabled:
        # 3: the warning names the line that called state_dict().
        warnings.warn(f"the service keeps no snapshot of run {run!r}: it has no disk", stacklevel=3)
        return {**state, "snapshot": None}
    return {**state, "snapshot": name}


def snapshot_of_step(client: EmaClient, run: str, step: int) -> str | None:
    """The name of the newest snapshot of a run's ``step``; None where there is none."""
    try:
        of_step = [each for each in client.snapshots(run) if each.step == step]
    except StorageDisabled:
        return None
    return max(of_step, key=lambda each: each.created_at).name if of_step else None


def check_state_is_of(run: str, state: object, *, branch: bool = False) -> None:
    """Raises UsageError for a state that lacks its EMA, for a value that is no state, and for another run's state
    unless the run is to branch from it."""
    if isinstance(state, Mapping) and state.get(LACKS):
        raise UsageError(
            f"the checkpoint was written without its EMA: {state[LACKS]}",
            hint="go on with the EMA that the service has now, by resume=True alone, or from another checkpoint",
        )
    if not isinstance(state, Mapping) or not all(
        isinstance(state.get(key, ...), kind) for key, kind in _FIELDS.items()
    ):
        raise UsageError(
            f"this is not the state of a run: {str(state)[:_SHOWN]!r}",
            hint="give what RemoteEma.state_dict() returned",
        )
    if state["run"] != run and not branch:
        raise UsageError(
            f"the state is of run {state['run']!r}, this is {run!r}",
            hint="give the RemoteEma the run's name of the checkpoint, and resume=True; or branch=True, to go on from "
            "the other run's state in this run",
        )


def rewind_to(client: EmaClient, state: Mapping[str, Any], *, branch: str | None = None) -> None:
    """Bring a state's run back to the state's version, or bring the run ``branch`` there from its own.

    Raises UsageError where the state names no snapshot for that.
    """
    run = state["run"]
    if branch is None and client.run(run).version == state["version"]:
        return
    if state["snapshot"] is None:
        why = "went on since" if branch is None else "is another than this one, at"
        raise UsageError(
            f"run {run!r} {why} version {state['version']}, of which there is no snapshot",
            hint="let the service keep runs on disk (--data-dir), or begin a new run with the model as it is",
        )
    if branch is None:
        client.rewind(run, state["snapshot"])
    else:
        client.rewind(branch, state["snapshot"], from_run=run)
