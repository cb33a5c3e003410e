"""One process of a training: where all hold the same model the first one sends, of a sharded model each its own shards.

All of them evaluate. Which of the two it is the parameters tell, whatever put them there. Knows: who sends, and the way
of weights into the model and back. Does not know: any framework, HTTP, how ranks talk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ema_client.client import EmaClient
from ema_client.errors import StepNotReached
from ema_client.remote_ema import RemoteEma
from ema_client.tensors.layout import parameters_of
from ema_client.training.aside import Stored
from ema_client.training.sharding import ShardedSelection, gathered, is_sharded, reshard, together

__all__ = ["Replica"]

#: So often a run that another training updates may move on before all ranks have read one version of it.
_ATTEMPTS = 5


class Replica:
    """The EMA of ``model`` as one process sees it. One thread at a time; made and swapped in by all together.

    Args:
        model: what is averaged; kept, and evaluated with EMA weights between swap_in() and swap_out().
        trains: whether there are updates, or evaluations only.
        first: whether this process is the one that pushes a model that all hold; exactly one of all is.
        barrier: waits for all processes.
        run, url, token: as for RemoteEma; ``options`` are its others, used where there is one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        run: str,
        url: str | None = None,
        token: str | None = None,
        trains: bool = True,
        first: bool = True,
        barrier: Callable[[], object] = lambda: None,
        **options: Any,
    ) -> None:
        self._model = model
        self._run = run
        self._barrier = barrier
        self._swapped: contextlib.ExitStack | None = None
        self._client = EmaClient(url, token=token)
        self._sharded = is_sharded(model)
        sends = trains and (first or self._sharded)
        #: None in a process that does not send, and in one that only evaluates.
        self.ema = RemoteEma(model, run=run, client=self._client, **options) if sends else None

    @property
    def swapped(self) -> bool:
        """Whether the model holds EMA weights now."""
        return self._swapped is not None

    def update(self) -> None:
        """One EMA step with the model as it is; in processes that do not send, nothing."""
        if self.ema:
            self.ema.update(self._model)

    def swap_in(self) -> None:
        """EMA weights into the model, every update so far included, in all processes; the training weights are kept.

        Where that fails the model is as it was.
        """
        if self._swapped is not None:
            return
        if self.ema:
            self.ema.flush()
        # No process reads before all have sent everything.
        self._barrier()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.ema.scope(self._model) if self.ema else self._reading())
            self._swapped = stack.pop_all()

    def swap_out(self) -> None:
        """The training weights back into the model; nothing where they are in it. Waits for no other process."""
        swapped, self._swapped = self._swapped, None
        if swapped:
            swapped.close()

    def flush(self) -> None:
        """Return when every update is applied; raises what went wrong with one."""
        if self.ema:
            self.ema.flush()

    def close(self) -> None:
        """The training weights back, everything sent, connections closed."""
        self.swap_out()
        try:
            if self.ema:
                self.ema.close()
        finally:
            self._client.close()

    # ----------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """RemoteEma.scope() where there is none: in a process that does not send."""
        selection = ShardedSelection(self._model) if self._sharded else None
        targets = selection.targets(self._model)[0] if selection else parameters_of(self._model)
        stored, tensors = Stored(), list(targets.values())
        stored.store(tensors)
        try:
            if selection:
                self._pull_together(selection)
            else:
                self._client.copy_to(self._run, self._model)
            yield
        finally:
            reshard(self._model)
            stored.restore(tensors)

    def _pull_together(self, selection: ShardedSelection) -> None:
        """The shards of one version on all ranks, though another training may be updating the run meanwhile."""
        wanted = selection.wanted(self._model)
        for _ in range(_ATTEMPTS):
            info = together(lambda: self._client.pull_slices(self._run, wanted))
            if len(set(gathered(info.version))) == 1:
                return
        raise StepNotReached(
            f"run {self._run!r} moved on each of {_ATTEMPTS} times that the ranks read it",
            hint="evaluate a sharded model in the training that updates the run, or when that is over",
        )
