"""The EMA as one process of a training has it, whatever framework started the process.

Where all processes hold the same model, the first sends; of a sharded model, each sends its own shards. All processes
evaluate. The parameters tell which kind a model is of.

Knows: which process sends, and the way of EMA weights into the model and back. Does not know: any framework, HTTP, how
ranks talk, which EMA is to be evaluated (origins), what an outage is answered with (core).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor, nn

from ema_client.client import EmaClient
from ema_client.errors import Fenced, Forbidden, SnapshotNotFound, StepNotReached
from ema_client.protocol import WeightsInfo
from ema_client.remote_ema import RemoteEma
from ema_client.tensors.writing import noticed
from ema_client.training.aside import SetAside
from ema_client.training.kinds import AnySelection, choose
from ema_client.training.plan import Plan, ShardedPlan
from ema_client.training.ranks import Gather, gathered, ranks_in_all, together
from ema_client.training.sharding import is_sharded, reshard

__all__ = ["Replica"]

T = TypeVar("T")

_log = logging.getLogger("ema_client")

#: A run that another training updates may move on so often before all ranks have read the same version.
_ATTEMPTS = 5
#: Seconds that an update may take where the service counts as away: time for a single try.
_WHILE_AWAY = 1.0


class Replica:
    """The EMA of ``model`` in one process. One thread at a time; all processes make theirs and swap in together.

    Args:
        model: the averaged model, which holds EMA weights between swap_in() and swap_out().
        trains: whether there are updates, or evaluations only.
        first: whether this process pushes a model that all processes hold; exactly one process does.
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
        choose: Callable[..., tuple[AnySelection, Plan]] = choose,
        **options: Any,
    ) -> None:
        self._model = model
        self.run = run
        self.trains = trains
        #: Why this training has no EMA any more: another training has taken over the run.
        self._fenced: Fenced | None = None
        self._aside = SetAside()
        self._tensors: list[Tensor] = []
        self.client = EmaClient(url, token=token)
        try:
            read = {name: options[name] for name in ("buffers", "frozen") if name in options}
            self._selection, plan = choose(model, **read)
            self._gather = _gather_of(plan)
            self.ema = self._joined(first, options)
        except BaseException:
            self.client.close()
            raise

    @property
    def swapped(self) -> bool:
        """Whether the model holds EMA weights now."""
        return not self._aside.empty

    def is_of(self, model: nn.Module) -> bool:
        """Whether this is the replica of ``model``."""
        return self._model is model

    # --- training ---------------------------------------------------------------------------------------------------

    def update(self, *, due: bool | None = None) -> None:
        """An EMA step with the model as it is; nothing in a process without a RemoteEma. due: as for RemoteEma."""
        if self.ema:
            self.ema.update(self._model, due=due)

    def flush(self) -> None:
        """Return when every update of this process is applied; raises the first failure since the latest flush.

        Where the service counts as away already, a single try is waited for. Raises Fenced at each call after the first
        one: what the service holds is then the EMA of another training.
        """
        if self._fenced:
            raise Fenced(self._fenced.detail, hint=self._fenced.hint)
        try:
            if self.ema:
                self.ema.flush(_WHILE_AWAY if self.ema.away else None)
        except Fenced as error:
            self._fenced = error
            raise

    def settle(self) -> None:
        """flush() in all processes, which all return or all raise."""
        self._together(self.flush)

    def rewind(self, state: Any) -> None:
        """Go back to the EMA of a checkpoint, in all processes or with an error in all."""

        def load() -> None:
            if self.ema:
                self.ema.load_state_dict(state)

        self._jointly(load)

    # --- evaluation -------------------------------------------------------------------------------------------------

    def swap_in(
        self, *, run: str | None = None, snapshot: str | None = None, version: str | None = None
    ) -> WeightsInfo:
        """EMA weights into the model in all processes, or in none; the training weights are set aside.

        Returns what the weights are. Not to be called while the model holds EMA weights.

        run: another run than the replica's own. snapshot: the weights of this snapshot. version: the only version that
        will do. Raises SnapshotNotFound where the run has another version than ``version``, and errors of reading.
        """
        self._tensors = self._selection.written(self._model)
        self._aside.store(self._tensors)
        try:
            return self._read(run or self.run, snapshot, version)
        except BaseException:
            self.swap_out()
            raise

    def swap_out(self) -> None:
        """The training weights back into the model, unless the model has them. Waits for no other process.

        May be called again where it was interrupted.
        """
        if self.swapped:
            reshard(self._model)
            self._aside.restore(self._tensors)
            # A DTensor counts the writes to it by itself, and not those to its local memory.
            noticed(self._model.parameters())

    @contextlib.contextmanager
    def training_weights(self) -> Iterator[None]:
        """The training weights in the model inside the block, the EMA weights again after it, if it held them."""
        if not self.swapped:
            yield
            return
        reshard(self._model)
        with self._aside.lent(self._tensors):
            noticed(self._model.parameters())
            try:
                yield
            finally:
                reshard(self._model)
        noticed(self._model.parameters())

    def keep_swapped(self) -> None:
        """Leave the EMA weights in the model for good, if it holds them."""
        self._aside.drop()

    def close(self, *, delete: bool = False) -> None:
        """The training weights back, everything sent, connections closed. Raises as flush(), and closes all the same.

        Where the service counts as away, updates on their way are lost. delete: delete the run, if the token allows.
        """
        self.swap_out()
        try:
            if self.ema:
                self.ema.close(_WHILE_AWAY if self.ema.away else None)
            if delete:
                self._delete()
        finally:
            self.client.close()

    # ----------------------------------------------------------------------------------------------------------------

    def _joined(self, first: bool, options: dict[str, Any]) -> RemoteEma | None:
        """The RemoteEma of a process that sends. All processes join, or none."""

        def join() -> RemoteEma | None:
            sends = self.trains and (first or is_sharded(self._model))
            return RemoteEma(self._model, run=self.run, client=self.client, **options) if sends else None

        return self._jointly(join)

    def _delete(self) -> None:
        try:
            self.client.delete_run(self.run)
        except Forbidden as error:
            _log.warning("run %r stays: %s", self.run, error)

    def _read(self, run: str, snapshot: str | None, version: str | None) -> WeightsInfo:
        """The weights of one version on all ranks, though another training may update the run."""
        for _ in range(_ATTEMPTS):
            info = self._together(lambda: self._selection.pull_into(self._model, self.client, run, snapshot=snapshot))
            if self._all_have(info.version):
                break
        else:
            raise StepNotReached(
                f"run {run!r} moved on each of {_ATTEMPTS} times that the ranks read it",
                hint="evaluate a sharded model in the training that updates the run, or when that is over",
            )
        if version is not None and info.version != version:
            raise SnapshotNotFound(
                f"run {run!r} went on since version {version}, of which there is no snapshot",
                hint="let the service keep runs on disk (--data-dir)",
            )
        return info

    def _jointly(self, work: Callable[[], T]) -> T:
        """Work of a RemoteEma, whose ranks wait for each other by themselves where the model is sharded."""
        return work() if is_sharded(self._model) else self._together(work)

    def _together(self, work: Callable[[], T]) -> T:
        return together(work, gather=self._gather) if self._gather else work()

    def _all_have(self, value: object) -> bool:
        return len(set(self._gather(value))) == 1 if self._gather else True


def _gather_of(plan: Plan) -> Gather | None:
    """How the ranks of a training tell each other; None where there is one process."""
    if isinstance(plan, ShardedPlan):
        return plan.gather
    return gathered if ranks_in_all() > 1 else None
