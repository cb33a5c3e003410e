"""One process of a training whose processes all hold the same model: the first one sends, all of them evaluate.

Knows: who sends, and the way of weights into the model and back. Does not know: any framework, HTTP, how ranks talk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ema_client.client import EmaClient
from ema_client.remote_ema import RemoteEma
from ema_client.tensors import parameters_of

__all__ = ["Replica"]


class Replica:
    """The EMA of ``model`` as one process sees it. One thread at a time.

    Args:
        model: what is averaged; kept, and evaluated with EMA weights between swap_in() and swap_out().
        sends: whether this process is the one that pushes; exactly one of all is.
        barrier: waits for all processes.
        run, url, token: as for RemoteEma; ``options`` are its others. Without ``sends`` they are not needed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        run: str,
        url: str | None = None,
        token: str | None = None,
        sends: bool = True,
        barrier: Callable[[], object] = lambda: None,
        **options: Any,
    ) -> None:
        self._model = model
        self._run = run
        self._barrier = barrier
        self._stored: list[tuple[Tensor, Tensor]] | None = None
        self._client = EmaClient(url, token=token)
        #: None in a process that does not send, and in one that only evaluates.
        self.ema = RemoteEma(model, run=run, client=self._client, **options) if sends else None

    @property
    def swapped(self) -> bool:
        """Whether the model holds EMA weights now."""
        return self._stored is not None

    def update(self) -> None:
        """One EMA step with the model as it is; in processes that do not send, nothing."""
        if self.ema:
            self.ema.update(self._model)

    def swap_in(self) -> None:
        """EMA weights into the model, every update so far included, in all processes; the training weights are kept.

        Where that fails the model is as it was.
        """
        if self._stored is not None:
            return
        if self.ema:
            self.ema.flush()
        # No process reads before the first has sent everything.
        self._barrier()
        self._stored = [(p, p.detach().clone()) for p in parameters_of(self._model).values()]
        try:
            self._client.copy_to(self._run, self._model)
        except BaseException:
            self.swap_out()
            raise

    def swap_out(self) -> None:
        """The training weights back into the model; nothing where they are in it."""
        stored, self._stored = self._stored, None
        with torch.no_grad():
            for parameter, kept in stored or ():
                parameter.copy_(kept)

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
