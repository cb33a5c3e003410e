"""The EMA in a checkpoint, without a service: what a state must say, and when a run goes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from ema_client.errors import StorageDisabled, UsageError
from ema_client.training.state import check_state_is_of, rewind_to, saved_state

STATE = {"run": "r", "version": "1.7", "step": 7, "num_updates": 7, "snapshot": "state-1.7"}


@dataclass
class Client:
    """A run at some version, on a service with or without a disk."""

    version: str = "1.7"
    disk: bool = True
    rewound: list[str] = field(default_factory=list)

    def run(self, run: str) -> Any:
        return SimpleNamespace(run=run, version=self.version, step=7, num_updates=7)

    def snapshot(self, _run: str, name: str, *, keep: int) -> Any:
        if not self.disk:
            raise StorageDisabled("no disk")
        return SimpleNamespace(name=name, keep=keep)

    def rewind(self, _run: str, snapshot: str) -> None:
        self.rewound.append(snapshot)


def test_a_state_names_its_snapshot() -> None:
    """Strings and numbers only, with the snapshot's name; without a disk there is none, and a warning says so."""
    client: Any = Client()
    assert saved_state(client, "r") == STATE
    check_state_is_of("r", saved_state(client, "r"))
    client.disk = False
    with pytest.warns(UserWarning, match="keeps no snapshot of run 'r'"):
        assert saved_state(client, "r") == {**STATE, "snapshot": None}


@pytest.mark.parametrize(
    "state", [None, [], {}, "x" * 1000, {**STATE, "step": "7"}, {**STATE, "run": 1}, {**STATE, "snapshot": 3}]
)
def test_what_is_no_state(state: Any) -> None:
    """Anything that state_dict() did not return is refused, and shown in part."""
    with pytest.raises(UsageError, match="this is not the state of a run") as raised:
        check_state_is_of("r", state)
    assert len(raised.value.detail) < 150


def test_a_state_of_another_run() -> None:
    """Two runs are told apart by their names."""
    with pytest.raises(UsageError, match="the state is of run 'r', this is 'other'"):
        check_state_is_of("other", STATE)


def test_a_checkpoint_without_its_ema() -> None:
    """A state that says what it lacks is refused with its reason, and with what can be gone on from."""
    with pytest.raises(UsageError, match="written without its EMA: nothing listens") as raised:
        check_state_is_of("r", {"run": "r", "lacks": "nothing listens"})
    assert "resume=True alone" in raised.value.hint


def test_a_run_goes_back_only_where_it_went_on() -> None:
    """At the state's version nothing is to be done; later, the run goes back to the snapshot, which must be there."""
    there, later, lost = Client(), Client(version="1.9"), Client(version="1.9")
    rewind_to(there, STATE)  # type: ignore[arg-type]
    rewind_to(later, STATE)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"went on since version 1\.7"):
        rewind_to(lost, {**STATE, "snapshot": None})  # type: ignore[arg-type]

    assert (there.rewound, later.rewound, lost.rewound) == ([], ["state-1.7"], [])
