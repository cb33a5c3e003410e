"""The EMA as one process of a training has it, whatever framework started the process.

Where all processes hold the same model, the first sends; of a sharded model, each sends its own shards. All processes
evaluate. The parameters tell which kind a model is of.

Knows: which process sends, and the way of EMA weights into the model and back. Does not know: any framework, HTTP, how
ranks talk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ema_client.client import EmaClient
from ema_client.errors import StepNotReached
from ema_client.remote_ema import RemoteEma
from ema_client.training.aside import SetAside
from ema_client.training.kinds import AnySelection, choose
from ema_client.training.plan import Plan
from ema_client.training.sharding import is_sharded, reshard

__all__ = ["Replica"]

#: A run that another training updates may move on so often before all ranks have read the same version.
_ATTEMPTS = 5


class Replica:
    """The EMA of ``model`` in one process. One thread at a time; all processes make theirs and swap in together.

    Args:
        model: the averaged model, which holds EMA weights between swap_in() and swap_out().
        trains: whether there are updates, or evaluations only.
        first: whether this process pushes a model that all processes hold; exactly one process does.
        barrier: waits for all processes.
        choose: selects the tensors to read, and plans who reads together.
        run, url, token: as for RemoteEma; ``options`` are RemoteEma's others, used in a process that sends.
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
        choose: Callable[[nn.Module], tuple[AnySelection, Plan]] = choose,
        **options: Any,
    ) -> None:
        self._model = model
        self._run = run
        self._barrier = barrier
        self._swapped: contextlib.ExitStack | None = None
        self._choose = choose
        self._client = EmaClient(url, token=token)
        sends = trains and (first or is_sharded(model))
        #: None where another process sends, or there are no updates.
        self.ema = RemoteEma(model, run=run, client=self._client, **options) if sends else None

    @property
    def swapped(self) -> bool:
        """Whether the model holds EMA weights now."""
        return self._swapped is not None

    def update(self) -> None:
        """An EMA step with the model as it is; nothing in a process without a RemoteEma."""
        if self.ema:
            self.ema.update(self._model)

    def swap_in(self) -> None:
        """EMA weights into the model, every update so far included, in all processes; training weights are set aside.

        A swap that fails leaves the model as it was.
        """
        if self._swapped is not None:
            return
        if self.ema:
            self.ema.flush()
        # No process reads before every process has sent everything.
        self._barrier()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.ema.scope(self._model) if self.ema else self._reading())
            self._swapped = stack.pop_all()

    def swap_out(self) -> None:
        """The training weights back into the model, unless the model has them. Waits for no other process."""
        swapped, self._swapped = self._swapped, None
        if swapped:
            swapped.close()

    def flush(self) -> None:
        """Return when every update is applied; raises the first failure since the latest flush."""
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
        """RemoteEma.scope() in a process without a RemoteEma."""
        selection, plan = self._choose(self._model)
        aside, tensors = SetAside(), selection.written(self._model)
        aside.store(tensors)
        try:
            self._pull(selection, plan)
            yield
        finally:
            reshard(self._model)
            aside.restore(tensors)

    def _pull(self, selection: AnySelection, plan: Plan) -> None:
        """The weights of one version on all ranks that read together, though another training may update the run."""
        for _ in range(_ATTEMPTS):
            info = plan.together(lambda: selection.pull_into(self._model, self._client, self._run))
            if plan.all_have(info.version):
                return
        raise StepNotReached(
            f"run {self._run!r} moved on each of {_ATTEMPTS} times that the ranks read it",
            hint="evaluate a sharded model in the training that updates the run, or when that is over",
        )
