"""Which EMA belongs to the weights that a model holds: of a run as it is now, of a checkpoint, or none.

The rule: an EMA belongs to weights, not to a callback. A model that goes on training goes on with its run; a model with
the weights of a checkpoint has the EMA of that checkpoint; another model has another run.

Knows: models as identities, names of runs, states of checkpoints. Does not know: frameworks, the service, tensors.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ema_client.training.state import LACKS

__all__ = ["BEGUN", "Lacking", "Loaded", "Origin", "Origins", "Trained", "origin_of"]


#: False, under this key, in a checkpoint that was made before the training began: there is no EMA to miss.
BEGUN = "begun"


@dataclass(frozen=True, slots=True)
class Trained:
    """The weights are those of a training, in progress or over: the EMA is that of ``run`` as it is now.

    step: the run's step for the training, where that is over; None elsewhere.
    """

    run: str
    step: int | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """The weights are those of a checkpoint with ``state``: the EMA is the state's."""

    state: Mapping[str, Any]

    @property
    def run(self) -> str:
        return str(self.state["run"])


@dataclass(frozen=True, slots=True)
class Lacking:
    """The weights are those of a checkpoint that holds no EMA. run: of which run, None where it does not say."""

    why: str
    run: str | None = None


Origin = Trained | Loaded | Lacking


def origin_of(state: Mapping[str, Any] | None, where: str) -> Origin | None:
    """The origin of weights that were loaded from the checkpoint ``where`` with the callback's ``state`` in it.

    None for a checkpoint that was made before the training began.
    """
    if not state:
        return Lacking(f"{where} says nothing of an EMA")
    if state.get(BEGUN) is False:
        return None
    if state.get(LACKS):
        return Lacking(f"{where} was written without its EMA: {state[LACKS]}", state.get("run"))
    if not state.keys() >= {"run", "version", "snapshot"}:
        # Of a process that does not send, or of somebody else.
        return Lacking(f"{where} names no EMA", state.get("run"))
    return Loaded(state)


class Origins:
    """The origins of a callback's models, and the runs' names: ``run``, and for further models ``run-2``, ``run-3``.

    Models are not kept alive. Not thread-safe.
    """

    def __init__(self, run: str) -> None:
        self._base = run
        self._count = 0
        #: The run of the latest training; the name given, before the first.
        self.run = run
        self._origins: weakref.WeakKeyDictionary[nn.Module, Origin] = weakref.WeakKeyDictionary()

    def of(self, model: nn.Module) -> Origin | None:
        """Where the model's weights are from; None for a model that was neither trained nor loaded here."""
        return self._origins.get(model)

    def set(self, model: nn.Module, origin: Origin | None) -> None:
        """The model holds weights of ``origin`` now."""
        self._origins.pop(model, None)
        if origin is not None:
            self._origins[model] = origin

    def names(self) -> list[str]:
        """The names of all trainings so far, the latest first; the name given, before the first."""
        return [*(f"{self._base}-{number}" for number in range(self._count, 1, -1)), self._base]

    def is_own(self, run: str | None) -> bool:
        """Whether ``run`` is the name given, or the name of a training since."""
        return run in self.names()

    def next_name(self) -> str:
        """The name for the run of a model that was not trained here before."""
        return self._base if not self._count else f"{self._base}-{self._count + 1}"

    def began(self, model: nn.Module, run: str) -> None:
        """A training of the model has joined ``run``."""
        if run == self.next_name():
            self._count += 1
        self.run = run
        self.set(model, Trained(run))

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process has other models.
        return {"_base": self._base, "_count": self._count, "run": self.run}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._origins = weakref.WeakKeyDictionary()
