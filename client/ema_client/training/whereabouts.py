"""Whether a training that goes on with a run, and does not say its step, is where the run is.

A training that comes back from an older checkpoint counts the steps since that checkpoint twice. Two things tell of it.
The service has the digest of the parameters of a run's latest update, or of each host's slice of them: a model with
these very parameters is where the run is. And torch's optimizers count their steps, and have the count of the
checkpoint again.

Weights and optimizers may be loaded until the first step: a model is judged ahead of that step, or with the first
update of a training without a torch optimizer, by the weights that it had in the constructor.

Knows: the parameters of now, their digest, an optimizer's count. Does not know: how a trainer joins its run (joining).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ema_client.client import EmaClient
from ema_client.http.digests import can_digest, digests_of
from ema_client.protocol import RunInfo, SliceDigest
from ema_client.training.beginning import parameters_data, parameters_hash
from ema_client.training.first_step import FirstStep
from ema_client.training.kinds import AnySelection

__all__ = ["Whereabouts", "latest_digests", "steps_of"]

#: More bytes than any update has.
_ALL = 1 << 62


class Whereabouts:
    """Of a training that goes on with a run: warns once, where the model is not where the run is.

    Args:
        run: the run as it was found, with at least one update.
        digests: of the data of the run's latest update, in its order: of all of it, or of each host's slice; none where
            nobody knows them.
        model, selection, tensors: the model of now, and its tensors in the selection's order.
        update_every: as for RemoteEma: a training may be so many steps ahead of its latest update.
    """

    def __init__(
        self,
        run: RunInfo,
        digests: Sequence[SliceDigest],
        *,
        model: nn.Module,
        selection: AnySelection,
        tensors: Sequence[Tensor],
        update_every: int,
    ) -> None:
        self._run = run.run
        self._step = run.step or 0
        self._update_every = update_every
        self._digests = digests
        self._specs = selection.specs
        #: Whether the model had other weights in the constructor; None where that cannot be told.
        self._was_elsewhere = self._differs(parameters_data(tensors, self._specs, buffers=True)) if digests else None
        self._was = parameters_hash(tensors, self._specs) if digests else b""
        #: Whether everything was found out and, where need be, said.
        self.over = False
        self._first = FirstStep(model, selection, self._ahead)

    def updated(self) -> None:
        """The first update is made."""
        if not self.over:
            self._judge(self._was_elsewhere, None)

    def _ahead(self, optimizer: Optimizer) -> None:
        # A model that is gone is not trained: the step is another's.
        if not self.over and self._first.tensors() is not None:
            self._judge(self._is_elsewhere(), steps_of(optimizer))

    def _is_elsewhere(self) -> bool | None:
        """Whether the model of now has other weights than the run's latest update; None where that cannot be told."""
        tensors = self._first.tensors() if self._digests else None
        if tensors is None or parameters_hash(tensors, self._specs) == self._was:
            return self._was_elsewhere
        # Loaded since the constructor. Buffers, which a forward pass changes, are no longer those of the update.
        known = all(isinstance(each, nn.Parameter) for each in tensors)
        return self._differs(parameters_data(tensors, self._specs)) if known else None

    def _judge(self, elsewhere: bool | None, steps: int | None) -> None:
        """steps: that the training's optimizer has made, None where nobody knows."""
        self.over = True
        behind = self._step - steps if steps is not None else 0
        if elsewhere is False or -self._update_every < behind < 0:
            return
        if behind > 0:
            what = (
                f"run {self._run!r} is at step {self._step} and the training comes back at step {steps}, by its "
                f"optimizer's count: the {behind} steps between count twice in the EMA"
            )
        elif elsewhere:
            counted = f", and its optimizer has made {steps} steps" if steps is not None else ""
            fault = (
                "where it comes from an older checkpoint, the steps since then count twice in the EMA"
                if behind == 0
                else f"where both count alike, the {-behind} steps between are missing in the EMA"
            )
            what = (
                f"run {self._run!r} goes on at step {self._step}, and the model does not have the weights of that "
                f"step{counted}: {fault}"
            )
        else:
            return
        # The caller is a hook of torch, or of a framework: no line of the user's can be named.
        warnings.warn(
            f"{what}; give the checkpoint's step=, or its state=, of RemoteEma.state_dict(), to go there with it",
            stacklevel=2,
        )

    def _differs(self, data: Iterable[memoryview]) -> bool:
        """Whether an update's data is another than that of the run's latest: as a whole, or on any of its hosts."""
        found = digests_of(data, [each.bytes for each in self._digests])
        return [each.hex() for each in found] != [each.digest for each in self._digests]


def latest_digests(client: EmaClient, run: RunInfo) -> tuple[SliceDigest, ...]:
    """Of the data of a run's latest update: of all of it, or of each host's slice. None where the service does not know
    them, or nothing can compare."""
    if run.step is None or not can_digest():
        return ()
    status = client.update_status(run.run, run.step)
    return status.digests if status.digest is None else (SliceDigest(_ALL, status.digest),)


def steps_of(optimizer: Optimizer) -> int | None:
    """How many steps the optimizer has made, as its state says; None where it does not say, or begins."""
    counts = (state.get("step") for state in optimizer.state.values() if isinstance(state, dict))
    single = (each for each in counts if isinstance(each, int | float) or (torch.is_tensor(each) and each.numel() == 1))
    return max(map(int, single), default=0) or None
