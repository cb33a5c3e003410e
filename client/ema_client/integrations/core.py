"""What the callbacks of all frameworks do: begin and end a training, evaluate, and tell checkpoints of the EMA.

A framework's callback turns the framework's events into calls of a Core.

Knows: which EMA is evaluated or gone on with, what happens where the service is away, what a checkpoint says. Does not
know: frameworks and their events, files, how weights travel or are swapped (replica).
"""

from __future__ import annotations

import contextlib
import copy
import logging
import secrets
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ema_client.client import EmaClient
from ema_client.errors import AwaitingWeights, EmaError, NonFinite, RunNotFound, UsageError
from ema_client.integrations.charted import Waiting, resolved
from ema_client.integrations.kept import KeptSnapshots
from ema_client.integrations.options import OutagePolicy, RemoteEmaOptions, check_names, check_policy
from ema_client.integrations.origins import BEGUN, Lacking, Loaded, Origin, Origins, Trained
from ema_client.integrations.replica import Replica
from ema_client.remote_ema import RemoteEma
from ema_client.training.joining import Resume
from ema_client.training.ranks import gathered, is_distributed
from ema_client.training.state import LACKS, saved_state

__all__ = ["Core"]

_log = logging.getLogger("ema_client")

#: Of a run's name so many characters stand in the name of a run that is thrown away.
_NAME_SHOWN = 100


class Core:
    """A callback without its framework: the EMA of a training, in one process. One thread at a time.

    More than twenty methods: what events of a training, of an evaluation and of a checkpoint ask for, which share the
    model's origin and the answer to an outage.

    Args:
        decay, use_num_updates: as for RemoteEma.
        run: the run's name. A training of another model than the one before has a run of its own: run-2, run-3.
        url, token: as for RemoteEma.
        resume: as for RemoteEma. A training that goes on, from a checkpoint or with the same model, resumes by itself.
        on_unreachable: what an evaluation, a checkpoint and the end of a training do where the service is away or
            refuses: "warn" and go on without, or "raise".
        keep: so many snapshots of checkpoints stay, the newest; None: those whose checkpoints exist.
        options: RemoteEma's others.
    """

    def __init__(
        self,
        decay: float,
        use_num_updates: bool,
        *,
        run: str,
        url: str | None,
        token: str | None,
        resume: Resume,
        on_unreachable: OutagePolicy,
        keep: int | None,
        options: RemoteEmaOptions,
    ) -> None:
        check_names(options)
        check_policy(on_unreachable)
        self._where: dict[str, Any] = {"url": url, "token": token}
        self._resume = resume
        self._raises = on_unreachable == "raise"
        self._keep = keep
        self._options: dict[str, Any] = {"decay": decay, "use_num_updates": use_num_updates, **options}
        self._options["log_to"] = resolved(options.get("log_to"))
        self._origins = Origins(run)
        self._owner: weakref.ref[nn.Module] | None = None
        self._replica: Replica | None = None
        self._throwaway = False
        #: Whether this process sends a model that all processes hold, and writes checkpoints.
        self.first = True
        #: Between begin() and finish().
        self._training = False
        #: The snapshots of this training's checkpoints; None outside a training, and where ``keep`` says how many stay.
        self.kept: KeptSnapshots | None = None

    @property
    def owner(self) -> nn.Module | None:
        """The framework's model that checkpoints are of. Not kept alive."""
        return self._owner() if self._owner else None

    @owner.setter
    def owner(self, model: nn.Module) -> None:
        self._owner = weakref.ref(model)

    @property
    def run(self) -> str:
        """The run of the latest training; before the first, the name given."""
        return self._origins.run

    @property
    def runs(self) -> list[str]:
        """The runs of all trainings so far, the latest first, or the name given."""
        return self._origins.names()

    @property
    def ema(self) -> RemoteEma | None:
        """The RemoteEma, from begin() to close(); None in a process that does not send."""
        return self._replica.ema if self._replica else None

    # --- training ---------------------------------------------------------------------------------------------------

    def begin(self, owner: nn.Module, model: nn.Module, *, first: bool, step: int = 0, throwaway: bool = False) -> None:
        """Join a run for a training of ``owner``; all processes together.

        model: what of the owner is averaged, or what holds the owner's parameters; as a rule, the owner itself.
        first: whether this process sends a model that all processes hold, and writes checkpoints.
        step: the trainer's count of steps, for messages.
        throwaway: close() deletes the run, which is that of a trial of the program.

        Raises as RemoteEma does, whatever ``on_unreachable`` says: nothing is lost yet.
        """
        self._close_quietly()
        self.first, self._throwaway = first, throwaway
        origin = None if throwaway else self._origins.of(owner)
        run, resume = (_throwaway_name(self.run), False) if throwaway else self._run_for(origin)
        # A training that goes on in its process is where it was, whatever was done with the weights since.
        step_of_run = origin.step if isinstance(origin, Trained) and resume else None
        replica = Replica(model, run=run, first=first, resume=resume, step=step_of_run, **self._where, **self._options)
        self._replica = replica
        if isinstance(origin, Loaded) and origin.run == run:
            try:
                replica.rewind(origin.state)
            except BaseException:
                self._close_quietly()
                raise
        if resume and replica.ema and (why := _unmatched(origin, run)):
            self._warn(
                f"{why}: run {run!r} goes on with the EMA that the service has now, of step {replica.ema.step}, which "
                f"may be of another step than the checkpoint's, {step}"
            )
        if not throwaway:
            if run != self.run:
                self._say(f"a training of another model than before: its run is {run!r}")
            self._origins.began(owner, run)
        self.kept = KeptSnapshots(replica.client, run) if first and self._keep is None else None
        self._training = True

    def prefer(self, name: str, value: Any) -> None:
        """Give one of RemoteEma's options another default."""
        self._options.setdefault(name, value)

    def update(self, *, due: bool | None = None) -> None:
        """An EMA step with the model as it is. due: as for RemoteEma.update()."""
        if self._replica:
            self._replica.update(due=due)

    @property
    def logs_to_trainer(self) -> bool:
        """Whether charts of the EMA are drawn by the loggers of the framework's Trainer."""
        return isinstance(self._options["log_to"], Waiting)

    def measured(self) -> list[tuple[dict[str, float], int]]:
        """Values for those loggers, each with its step, that came since the latest call. Asks nobody."""
        log_to = self._options["log_to"]
        return log_to.take() if isinstance(log_to, Waiting) else []

    def finish(self) -> None:
        """Return when every update of this process is applied, or the service is away."""
        self._training = False
        if self._replica:
            with self._tolerated("the training ends, and updates were not applied"):
                self._replica.settle()
            self._note_step(self._replica)

    def close(self) -> None:
        """The training weights back, everything sent, connections closed. The run stays on the service."""
        replica, self._replica, self.kept, self._training = self._replica, None, None, False
        if replica is None:
            return
        with self._tolerated(f"run {replica.run!r} is closed, and updates were not applied"):
            replica.close(delete=self._throwaway and self.first)

    # --- evaluation -------------------------------------------------------------------------------------------------

    @property
    def swapped(self) -> bool:
        """Whether the model holds EMA weights now."""
        return self._replica is not None and self._replica.swapped

    def swap_in(self, owner: nn.Module, model: nn.Module, *, first: bool, origin: Origin | None = None) -> None:
        """The EMA that belongs to the owner's weights into ``model``, in all processes or in none.

        origin: of the owner's weights, where the owner was neither trained nor loaded here.
        Where there is none, or the service is away, the model stays as it is, and a warning says so.
        """
        if self.swapped:
            return
        origin = self._origins.of(owner) or origin
        if isinstance(origin, Lacking):
            self._warn(f"{origin.why}: evaluated are the model's own weights")
            return
        if self._replica and not self._replica.is_of(model):
            # Left open by a training that broke off.
            self._close_quietly()
        if self._replica is None:
            self.first, self._throwaway = first, False
            self._replica = Replica(model, run=self.run, trains=False, **self._where, **self._options)
        try:
            self._let_apply(self._replica.settle)
            self._swap(self._replica, origin)
        except UsageError:
            raise
        except EmaError as error:
            if self._raises:
                raise
            self._warn(f"evaluated are the training weights, without the EMA of run {self.run!r}: {error}")

    def swap_out(self) -> None:
        """The training weights back into the model, unless the model has them."""
        if self._replica:
            self._replica.swap_out()

    def keep_swapped(self) -> None:
        """Leave the EMA weights in the model for good, if it holds them."""
        if self._replica:
            self._replica.keep_swapped()

    @contextlib.contextmanager
    def training_weights(self) -> Iterator[None]:
        """The training weights in the model inside the block, for a checkpoint in the middle of an evaluation."""
        with self._replica.training_weights() if self._replica else contextlib.nullcontext():
            yield

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint of ``owner`` says of the EMA; nothing without an owner.

        Where the service is away the checkpoint says what it lacks, and why. In a process that writes no checkpoint the
        run alone is named.
        """
        if self.owner is None:
            return {}
        replica, origin = self._replica, self._origins.of(self.owner)
        if self._throwaway and replica:
            return {"run": self.run, LACKS: f"its training was a trial; run {replica.run!r} is deleted"}
        match origin:
            case Loaded(state):
                return dict(state)
            case Lacking(why, run):
                return {"run": run or self.run, LACKS: why}
            case Trained(run):
                return self._state_of(run) if self.first else {"run": run}
        return {"run": self.run, BEGUN: False}

    def knows(self, owner: nn.Module) -> bool:
        """Whether the owner was trained, or loaded from a checkpoint, here."""
        return self._origins.of(owner) is not None

    def loaded(self, origin: Origin | None) -> None:
        """The weights of a checkpoint were loaded into ``owner``."""
        if (owner := self.owner) is None:
            return
        self._origins.set(owner, origin)
        replica = self._replica
        if self._training and replica and isinstance(origin, Loaded) and origin.run == replica.run:
            # In the middle of a training, which goes on from there.
            replica.rewind(origin.state)
            self._origins.set(owner, Trained(replica.run))

    # ----------------------------------------------------------------------------------------------------------------

    def _note_step(self, replica: Replica) -> None:
        """The step at which the training is over, for another one of the same model."""
        owner = self.owner
        if owner is not None and replica.ema and isinstance(self._origins.of(owner), Trained) and not self._throwaway:
            self._origins.set(owner, Trained(replica.run, replica.ema.step))

    def _run_for(self, origin: Origin | None) -> tuple[str, Resume]:
        """The run's name for a training of weights of this origin, and whether the run is to be there already."""
        if origin is not None and origin.run is not None and self._origins.is_own(origin.run):
            return origin.run, True
        # Without a checkpoint, or with one of another run: a branch, which begins with the weights that are there.
        return self._origins.next_name(), self._resume

    def _let_apply(self, flush: Callable[[], None]) -> None:
        """Flush; an update that was refused for its NaN is only logged, as the EMA is what it was without it."""
        try:
            flush()
        except NonFinite as error:
            if self._raises:
                raise
            self._say(str(error))
            flush()

    def _swap(self, replica: Replica, origin: Origin | None) -> None:
        if isinstance(origin, Loaded) and not self._throwaway:
            snapshot = origin.state["snapshot"]
            version = None if snapshot else origin.state["version"]
            replica.swap_in(run=origin.run, snapshot=snapshot, version=version)
        elif replica.trains:
            replica.swap_in()
        elif isinstance(origin, Trained):
            replica.swap_in(run=origin.run)
        else:
            self._swap_unknown(replica)

    def _swap_unknown(self, replica: Replica) -> None:
        """The EMA of a run that another process trains, or that is yet to be made."""
        try:
            info = replica.swap_in()
        except (RunNotFound, AwaitingWeights) as error:
            self._warn(f"evaluated are the weights as they are, for there is no EMA yet: {error.detail}")
        else:
            self._warn(
                f"evaluated is run {replica.run!r} as it is now, of step {info.step}: this Trainer has neither trained "
                "the model nor loaded a checkpoint into the model"
            )

    def _state_of(self, run: str) -> dict[str, Any]:
        """The state of a run that was trained here, in the training or after it."""
        replica = self._replica if self._replica and self._replica.run == run else None
        with EmaClient(**self._where) if replica is None else contextlib.nullcontext(replica.client) as client:
            try:
                if replica:
                    self._let_apply(replica.flush)
                if self._keep is not None:
                    return saved_state(client, run, keep=self._keep)
                return (self.kept or KeptSnapshots(client, run)).state()
            except UsageError:
                raise
            except EmaError as error:
                if self._raises:
                    raise
                self._say(f"a checkpoint is written without the EMA of run {run!r}: {error}")
                return {"run": run, LACKS: error.detail}

    @contextlib.contextmanager
    def _tolerated(self, what: str) -> Iterator[None]:
        """An EmaError of the block is logged or, by on_unreachable="raise", raised."""
        try:
            yield
        except UsageError:
            raise
        except EmaError as error:
            if self._raises:
                raise
            self._say(f"{what}: {error}")

    def _close_quietly(self) -> None:
        """close() of what an earlier training left open: its errors are not the new training's."""
        raises, self._raises = self._raises, False
        try:
            self.close()
        finally:
            self._raises = raises

    def _say(self, what: str) -> None:
        if self.first:
            _log.warning("%s", what)

    def _warn(self, what: str) -> None:
        if self.first:
            # The caller is a hook of a framework: no line of the user's can be named.
            warnings.warn(what, stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        # Another process has other connections, and a token of its own: pickles are files, and go to others.
        where = {**self._where, "token": None}
        return {**self.__dict__, "_owner": None, "_replica": None, "kept": None, "_where": where}

    def __deepcopy__(self, memo: dict[int, Any]) -> Core:
        copied = memo[id(self)] = Core.__new__(Core)
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo), _where=dict(self._where))
        return copied


def _unmatched(origin: Origin | None, run: str) -> str | None:
    """Why the EMA that ``run`` has may not be that of weights of this origin; None where it is."""
    match origin:
        case Lacking(why):
            return why
        case Loaded() if origin.run != run:
            return f"the checkpoint's EMA is of run {origin.run!r}"
    return None


def _throwaway_name(run: str) -> str:
    name = f"{run[:_NAME_SHOWN]}-trial-{secrets.token_hex(4)}"
    # The first rank's choice.
    return str(gathered(name)[0]) if is_distributed() else name
