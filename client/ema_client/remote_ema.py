"""RemoteEma: in the place of LitEma in a training loop, with the shadow weights on the server.

Knows: LitEma's calls and what they mean, the layout a run was made with, the trainer's step. Does not know: HTTP, how
tensors travel, or the averaging itself, which is the server's.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from ema_client.client import EmaClient, checked_decay
from ema_client.errors import AlreadyStored, NothingStored, RunExists, UsageError
from ema_client.protocol import DEFAULT_DECAY, AverageConfig, RunInfo, TensorSpec
from ema_client.tensors import parameters_of, specs_of, state_of

__all__ = ["RemoteEma"]


class RemoteEma:
    """The exponential moving average of a model's parameters, kept by the service.

    Called where LitEma is: ``ema(model)`` after each optimizer step, ``with ema.scope(model):`` around an evaluation.
    Averaged are the parameters that require gradients, by their canonical names. Not an nn.Module: it has no weights of
    its own to save, move or cast. One thread at a time.

    Args:
        model: the model. Its parameters are sent once, as the initial shadow, and not kept.
        decay: the largest decay, between 0 and 1.
        use_num_updates: whether the decay warms up as min(decay, (1 + n) / (10 + n)). ``use_num_upates``, as LitEma
            spells it, is the same.
        run: the run's name on the service.
        url, token: as for EmaClient.
        averages: several averages of the one run; by default one, named "ema". copy_to() and decay are of the first.
        resume: go on with the run of this name. Its decay and its counter are then the service's, and its steps go on
            from the latest. Without it a run of this name must not exist.
        client: an EmaClient to use instead of a new one; close() then leaves it open.

    Raises InvalidDecay (a ValueError, as LitEma raises it), RunExists, with ``resume`` RunNotFound, and what
    EmaClient.create_run() raises.
    """

    def __init__(
        self,
        model: nn.Module,
        decay: float = DEFAULT_DECAY,
        use_num_updates: bool = True,
        *,
        run: str,
        url: str | None = None,
        token: str | None = None,
        averages: Sequence[AverageConfig] | None = None,
        resume: bool = False,
        client: EmaClient | None = None,
        use_num_upates: bool | None = None,
    ) -> None:
        counted = _one_spelling(use_num_updates, use_num_upates)
        decay = checked_decay(decay)
        state = state_of(model)
        if client is not None and (url is not None or token is not None):
            raise UsageError("both a client and a url or token are given", hint="give one: a client has its own url")
        self._run = run
        self._layout = _by_name(specs_of(state))
        self._stored: list[Tensor] | None = None
        self._client = client or EmaClient(url, token=token)
        self._owns_client = client is None
        try:
            info = self._attach(decay, counted) if resume else None
            if info is None or info.status == "awaiting_weights":
                info = self._create(state, decay, counted, averages)
        except BaseException:
            self._release()
            raise
        self._step = info.step or 0

    @property
    def run(self) -> str:
        """The run's name."""
        return self._run

    @property
    def decay(self) -> float:
        """The largest decay, asked of the service. LitEma and the service compute with its float32 value."""
        return self._client.run(self._run).decay

    @property
    def num_updates(self) -> int:
        """LitEma's counter, asked of the service; -1 where it is off."""
        return self._client.run(self._run).num_updates

    def __repr__(self) -> str:
        return f"RemoteEma(run={self._run!r}, url={self._client.url!r})"

    # --- training ---------------------------------------------------------------------------------------------------

    def __call__(self, model: nn.Module) -> None:
        """The same as update()."""
        self.update(model)

    def update(self, model: nn.Module) -> None:
        """One EMA step with the model's parameters as they are. They may change again once this returns.

        Raises UsageError if the parameters are no longer those the run was made with; NonFinite, and then the EMA stays
        as it was; what EmaClient.push() raises. An update that failed is not made up for: the next one is a new step.
        """
        state = state_of(model)
        self._check_layout(specs_of(state))
        self._step += 1
        self._send(state, self._step)

    def reset_num_updates(self) -> None:
        """Let the warm-up begin anew. With the counter off it stays off (LitEma's switched on)."""
        self.flush()
        self._client.reset_num_updates(self._run)

    def flush(self) -> None:
        """Return when every update so far has been applied. Updates are not queued yet: they have been."""

    def close(self) -> None:
        """Flush, and close the connections. The run stays on the service."""
        self.flush()
        self._release()

    def __enter__(self) -> RemoteEma:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()

    # --- what code written for an nn.Module asks -------------------------------------------------------------------

    def buffers(self) -> Iterator[Tensor]:
        """None: what LitEma holds as buffers, the service holds. sgm counts them when it starts."""
        return iter(())

    def parameters(self) -> Iterator[Tensor]:
        """None: there is nothing here to train, move or save."""
        return iter(())

    # --- evaluation -------------------------------------------------------------------------------------------------

    def copy_to(self, model: nn.Module) -> None:
        """Write the EMA weights into the model's parameters, those that require gradients.

        Includes every update so far. Raises UsageError, before anything is written, if the parameters are not those of
        the run.
        """
        self.flush()
        self._client.copy_to(self._run, model)

    def store(self, parameters: Iterable[Tensor]) -> None:
        """Keep copies of ``parameters``, on their devices, until restore(). Raises AlreadyStored if there are some."""
        self._check_nothing_stored()
        self._stored = [parameter.detach().clone() for parameter in parameters]

    def restore(self, parameters: Iterable[Tensor]) -> None:
        """Write back what store() kept, and let go of it.

        Raises NothingStored; UsageError, before anything is written and with the copies kept, if ``parameters`` are not
        as many, and of the same shapes, as those stored.
        """
        if self._stored is None:
            raise NothingStored("restore() was called, and nothing is stored")
        targets = list(parameters)
        _check_same_shapes(self._stored, targets)
        with torch.no_grad():
            for stored, target in zip(self._stored, targets, strict=True):
                target.copy_(stored)
        self._stored = None

    @contextlib.contextmanager
    def scope(self, model: nn.Module) -> Iterator[None]:
        """EMA weights in the model inside the block, the training weights again after it, whatever happens in it.

        Raises AlreadyStored, before anything is overwritten, inside another scope or after store().
        """
        self._check_nothing_stored()
        # The very tensors: what is frozen inside the block is restored all the same.
        parameters = list(parameters_of(model).values())
        self.store(parameters)
        try:
            self.copy_to(model)
            yield
        finally:
            self.restore(parameters)

    # ----------------------------------------------------------------------------------------------------------------

    def _send(self, state: dict[str, Tensor], step: int) -> None:
        """The one place where an update leaves the trainer."""
        self._client.push(self._run, state, step=step)

    def _create(
        self, state: dict[str, Tensor], decay: float, counted: bool, averages: Sequence[AverageConfig] | None
    ) -> RunInfo:
        try:
            return self._client.create_run(
                self._run, state, decay=decay, use_num_updates=counted, averages=averages, step=0
            )
        except RunExists as exists:
            hint = "pass resume=True to go on with it, choose another name, or delete the old run first"
            raise RunExists(exists.detail, hint=hint) from None

    def _attach(self, decay: float, counted: bool) -> RunInfo:
        info = self._client.run(self._run)
        if info.use_num_updates != counted:
            raise UsageError(
                f"run {self._run!r} has use_num_updates={info.use_num_updates}",
                hint=f"resume it with use_num_updates={info.use_num_updates}, or make a new run",
            )
        if _float32(info.decay) != _float32(decay):
            warnings.warn(
                f"run {self._run!r} goes on with its decay {info.decay:.6g}, not {decay:.6g}; set_decay() changes it",
                stacklevel=3,
            )
        elements = sum(_elements(spec) for spec in self._layout.values())
        if (info.tensors, info.parameters) != (len(self._layout), elements):
            raise UsageError(
                f"run {self._run!r} has {info.tensors} tensors with {info.parameters} elements in all, "
                f"the model {len(self._layout)} with {elements}",
                hint="resume with the model the run was made with, frozen as it was then",
            )
        return info

    def _check_layout(self, specs: tuple[TensorSpec, ...]) -> None:
        now = _by_name(specs)
        if now == self._layout:
            return
        faults = [f"{name!r} is missing or frozen" for name in self._layout if name not in now]
        faults += [f"{name!r} is new or no longer frozen" for name in now if name not in self._layout]
        faults += [
            f"{name!r} is {spec.dtype} {spec.shape}, was {self._layout[name].dtype} {self._layout[name].shape}"
            for name, spec in now.items()
            if name in self._layout and spec != self._layout[name]
        ]
        raise UsageError(
            f"the model's parameters are not those of run {self._run!r}: {'; '.join(faults[:5])}"
            + (f" and {len(faults) - 5} more" if len(faults) > 5 else ""),
            hint="freeze and unfreeze before the RemoteEma is made, or make a new run for the changed model",
        )

    def _check_nothing_stored(self) -> None:
        if self._stored is not None:
            raise AlreadyStored("training weights are stored and wait for restore()")

    def _release(self) -> None:
        if self._owns_client:
            self._client.close()


def _one_spelling(use_num_updates: bool, use_num_upates: bool | None) -> bool:
    # True is the default: only a False can have been meant.
    if use_num_upates is None or use_num_upates == use_num_updates:
        return use_num_updates
    if not use_num_updates:
        raise UsageError(
            "use_num_updates=False and use_num_upates=True contradict each other",
            hint="give one of the two; they mean the same",
        )
    return use_num_upates


def _by_name(specs: tuple[TensorSpec, ...]) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in specs}


def _float32(decay: float) -> float:
    return float(torch.tensor(decay, dtype=torch.float32))


def _elements(spec: TensorSpec) -> int:
    return torch.Size(spec.shape).numel()


def _check_same_shapes(stored: list[Tensor], targets: list[Tensor]) -> None:
    if len(stored) != len(targets):
        raise UsageError(
            f"{len(stored)} tensors are stored, {len(targets)} are to be restored",
            hint="restore the parameters that were stored; nothing was written",
        )
    for index, (kept, target) in enumerate(zip(stored, targets, strict=True)):
        if kept.shape != target.shape:
            raise UsageError(
                f"tensor {index} was stored with shape {tuple(kept.shape)} and now has {tuple(target.shape)}",
                hint="restore the parameters that were stored, in the same order; nothing was written",
            )
