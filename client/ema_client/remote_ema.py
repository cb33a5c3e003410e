"""RemoteEma: in the place of LitEma in a training loop, with the shadow weights on the server.

Knows: LitEma's calls and what they mean, when an update is due, and what must wait for an update. Does not know: HTTP,
how a trainer joins its run (joining), which tensors are averaged and which rank sends them (kinds), how updates are
made (buffers) and sent (publisher), what a checkpoint holds (state), or the averaging, which is the server's.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ema_client.client import EmaClient, checked_decay
from ema_client.errors import AwaitingWeights, EmaError, UsageError, listed
from ema_client.protocol import (
    DEFAULT_DECAY,
    MAX_WAIT,
    AverageConfig,
    DecayPer,
    Durability,
    Posthoc,
    RunConfig,
    RunInfo,
)
from ema_client.reading.charts import Charts, Sources
from ema_client.reading.loggers import LogTo, check_log_to, logger_of
from ema_client.schedules import averages_of, posthoc_of
from ema_client.targets import Wished
from ema_client.tensors.writing import noticed
from ema_client.training.anew import sending
from ema_client.training.aside import SetAside
from ema_client.training.beginning import Beginning
from ema_client.training.buffers import UpdateBuffers
from ema_client.training.cadence import Cadence
from ema_client.training.copied import Copied
from ema_client.training.given import Given, Named
from ema_client.training.joining import Joining, Resume, Start
from ema_client.training.kinds import choose
from ema_client.training.plan import WholePlan, plan_whole
from ema_client.training.publisher import Publisher
from ema_client.training.ranks import may_be_later_rank
from ema_client.training.rounds import SendPolicy
from ema_client.training.selection import BufferPolicy, FrozenPolicy
from ema_client.training.sharding import reshard
from ema_client.training.state import MOST_STATES, check_state_is_of, rewind_to, saved_state
from ema_client.training.step_hook import StepHook
from ema_client.training.tally import Stats
from ema_client.training.whereabouts import Whereabouts, latest_digests

__all__ = ["BusyPolicy", "RemoteEma"]

#: What an update does while earlier updates are on their way: wait for room, or be left out and counted.
BusyPolicy = Literal["block", "skip"]

_log = logging.getLogger("ema_client")

#: The attributes that a copy takes over.
_COPIED = (
    "_run",
    "_keep",
    "_waits",
    "_borrows",
    "_sends_module_buffers",
    "_aside",
    "_told_frozen",
    "_client",
    "_owns_client",
    "_selection",
    "_plan",
    "_setup",
)


class RemoteEma:
    """The exponential moving average of a model's parameters, kept by the service.

    Called where LitEma is: ``ema(model)`` after each optimizer step, ``with ema.scope(model):`` around an evaluation.
    Averaged are the parameters that require gradients, by their canonical names. Not an nn.Module: there are no weights
    to save, move or cast. For a single thread at a time, and for the process that made it.

    A copy (copy.deepcopy, torch.save, multiprocessing) has connections of its own and the weights set aside by store(),
    and reads. A copy in another process than the one it was made in, such as a process that "ddp_spawn" starts, joins
    the run with its first update(), and goes on at the step of the copy. In the same process a copy does not send.

    May be made before there is a process group: a process that its launcher (torchrun, Lightning, SLURM, MPI) calls
    another than the first asks the process group with its first use, and joins the run then.

    The weights that a training begins with are those ahead of the first step of a torch optimizer that may change them.
    Where they were loaded after the constructor, they take the place of the initial shadow then, or with the first read
    of weights before that step. Not in a run that is gone on with, nor after the first update() or load_state_dict().

    update() takes the parameters and returns; a thread sends them. A failure of the sending is logged, counted
    (``stats``) and raised by flush(), close() and every call that reads, which wait for all earlier updates. The end of
    the program waits for updates on their way, for at most 30 seconds.

    More than twenty methods, all calls of LitEma, and more than a dozen attributes, the parts behind those calls.

    Args:
        model: the model, or a mapping from name to tensor, all of which are averaged; each call that takes a model
            takes a mapping too. The parameters are sent as the initial shadow; a model is not kept alive.
        decay: the largest decay, between 0 and 1.
        use_num_updates: whether the decay warms up as min(decay, (1 + n) / (10 + n)). ``use_num_upates``, as LitEma
            spells it, is the same.
        run: the run's name on the service.
        url, token: as for EmaClient.
        schedule: of the run's average, by a function of ``ema_client.schedules``; None: LitEma's.
        averages: the averages of the run, where there are several, each with its schedule and name. copy_to(), decay
            and num_updates are of the first.
        posthoc: as for EmaClient.create_run(): True keeps what averages of any length are worked out of later, by
            ``copy_to(model, sigma_rel=0.1)``.
        resume: "auto": go on with the run of this name, or make the run where there is none; True: only go on; False: a
            run of this name must not exist. A run that goes on keeps its schedule, decay and counter, with a warning
            where another is asked for; the model must have the run's names, shapes and dtypes.
        step: the step of the checkpoint that the model was loaded from: updates count on from there. Where the run is
            at another step, it goes to its snapshot of that step. Where there is none, a run that is ahead goes on from
            its own step, and one that is behind, by more than steps that were not due, from the training's; a warning
            names both. Without ``step`` and ``state`` the training is taken to be where the run is.
        state: what state_dict() gave for that checkpoint, instead of the step: the run goes back to it, as by
            load_state_dict(). A run that is gone is made anew with ``resume="auto"``, with a warning.
        client: an EmaClient to use instead of a new one; close() then leaves it open.
        lanes: as for EmaClient.
        update_every: send each k-th update only. The step counts all calls.
        decay_per: "update", LitEma's meaning: one decay for each update applied; "step": the product of the decays of
            all calls since the last update applied, which makes good for updates that were left out.
        on_busy: "block": wait while two updates are on their way, so that none is left out, as with LitEma; "skip":
            never wait, leave the update out. Where the service is away nobody waits: updates are left out.
        push_dtype: send the parameters as this dtype: torch.bfloat16 for half the traffic. The shadow is float32 all
            the same, and begins with the parameters as they were sent. Buffers that are copied are sent as they are.
        borrow: send the parameters from where they lie, on the CPU, and let the next step of a torch optimizer wait
            until they are sent. Saves the copy. Nothing but an optimizer may change the parameters between update()
            and step().
        frozen: "hold": a parameter that is frozen later goes on being averaged, with a warning; "error": a UsageError;
            "average": frozen parameters are averaged from the beginning, and sent with each update, so that a training
            may freeze and unfreeze as it likes.
        buffers: what becomes of floating-point buffers that are saved with the model, such as BatchNorm's statistics:
            "none": buffers stay the model's own; "average": buffers are averaged as well; "copy": beside the averages
            stand the buffers of the latest update sent. Other buffers, such as BatchNorm's counter of batches, stay the
            model's own.
        durability: what survives a crash of the service; by default the protocol's.
        keep: of the snapshots that state_dict() takes so many stay, the newest; None: all.
        log_to: draw charts of the EMA beside the training's: "tensorboard", "tensorboard:FOLDER", "wandb",
            "wandb:PROJECT", or a function that is called with (values, step), such as mlflow.log_metrics. Values are
            ``ema/decay``, ``ema/num_updates``, ``ema/distance``, ``ema/durable_lag`` at the step that they are of, and
            ``ema/lag``, the steps that are not applied yet. A thread asks the service for them each five seconds, and
            calls the function; what the function raises is logged once. Of several ranks the first draws; a copy draws
            where ``log_to`` is no function.

    Raises InvalidDecay (a ValueError, as LitEma raises it), RunExists, with ``resume`` RunNotFound, and what
    EmaClient.create_run() raises.
    """

    def __init__(
        self,
        model: Named,
        decay: float = DEFAULT_DECAY,
        use_num_updates: bool = True,
        *,
        run: str,
        url: str | None = None,
        token: str | None = None,
        schedule: AverageConfig | None = None,
        averages: Sequence[AverageConfig] | None = None,
        posthoc: Posthoc | Mapping[str, Any] | bool | None = None,
        resume: Resume = False,
        step: int | None = None,
        state: Mapping[str, Any] | None = None,
        client: EmaClient | None = None,
        lanes: int | None = None,
        update_every: int = 1,
        decay_per: DecayPer = "update",
        on_busy: BusyPolicy = "block",
        push_dtype: str | torch.dtype | None = None,
        borrow: bool = False,
        frozen: FrozenPolicy = "hold",
        buffers: BufferPolicy = "none",
        durability: Durability | None = None,
        keep: int | None = MOST_STATES,
        log_to: LogTo | None = None,
        use_num_upates: bool | None = None,
    ) -> None:
        counted = _one_spelling(use_num_updates, use_num_upates)
        decay = checked_decay(decay)
        start = Start(resume, step, state)
        _check_cadence(update_every, on_busy, keep)
        if log_to is not None:
            check_log_to(log_to)
        self._given = Given()
        model = self._given.module(model)
        self._selection, self._plan = choose(
            model, buffers=buffers, frozen=frozen, dtype=push_dtype, skips=on_busy == "skip"
        )
        if client is not None and (url, token, lanes) != (None, None, None):
            raise UsageError(
                "both a client and a url, token or lanes are given", hint="give one: a client has its own url"
            )
        self._run = run
        self._keep = keep
        self._waits = on_busy == "block"
        self._borrows = borrow
        self._sends_module_buffers = buffers != "none"
        self._aside = SetAside()
        self._told_frozen: set[str] = set()
        if self._selection.left_out:
            warnings.warn(
                f"buffers of run {run!r} hold infinities or NaN and stay the model's own: "
                + listed(self._selection.left_out),
                stacklevel=2,
            )
        tensors, _ = self._selection.of(model)
        #: Until the training begins, of a run that this trainer may make.
        self._beginning: Beginning | None = None
        #: Of a training that goes on and did not say its step, until its first update.
        self._whereabouts: Whereabouts | None = None
        if start.resume is not True:
            self._beginning = Beginning(model, self._selection, tensors, self._begin)
        self._client = client or EmaClient(url, token=token, lanes=lanes)
        self._owns_client = client is None
        config = RunConfig(
            run=run,
            layout=self._plan.layout,
            decay=decay,
            use_num_updates=counted,
            decay_per=decay_per,
            averages=averages_of(schedule, averages),
            durability=durability,
            copied=tuple(sorted(self._selection.copied)),
            posthoc=posthoc_of(posthoc),
        )
        self._setup = _Setup(config, update_every, on_device=any(tensor.is_cuda for tensor in tensors), log_to=log_to)
        self._charts: Charts | None = None
        #: What joining needs, until this process has joined.
        self._unjoined: _Unjoined | None = _Unjoined(start, tensors)
        if may_be_later_rank():
            # The first use tells. Should the process be on its own, the shadow begins with the weights of now.
            self._unjoined.tensors = _copies(tensors)
            # By the first use the first rank may have sent an update, which this rank has yet to count.
            self._unjoined.start = start.from_where_it_is(self._client, run)
            return
        try:
            taken = self._join()
            if taken is not None and self._plan.part is not None:
                self._whereabouts = self._taken_to_be_at(taken, model, tensors)
        except BaseException:
            self._release()
            raise

    @property
    def run(self) -> str:
        """The run's name."""
        return self._run

    @property
    def decay(self) -> float:
        """The largest decay, asked of the service. LitEma and the service compute with the decay's float32 value."""
        self.flush()
        return self._client.run(self._run).decay

    @property
    def num_updates(self) -> int:
        """LitEma's counter, asked of the service; -1 where the counter is off."""
        self.flush()
        return self._client.run(self._run).num_updates

    @property
    def pending(self) -> int:
        """Updates taken and not yet applied: 0, 1 or 2."""
        return 0 if self._unjoined else self._publisher.pending

    @property
    def away(self) -> bool:
        """Whether the service counts as away: a round of tries came to nothing, and no update was applied since."""
        return self._unjoined is None and self._publisher.stuck

    @property
    def step(self) -> int:
        """The trainer's step: the calls of update() so far, with those before a resume; of a copy, when it was made."""
        if (copied := self._copied) and copied.step is not None:
            return copied.step
        self._join()
        return self._cadence.step

    @property
    def stats(self) -> Stats:
        """How many updates were sent, skipped and failed."""
        return Stats() if self._unjoined else self._publisher.stats

    def __repr__(self) -> str:
        return f"RemoteEma(run={self._run!r}, url={self._client.url!r})"

    # --- training ---------------------------------------------------------------------------------------------------

    def __call__(self, model: Named) -> None:
        """The same as update()."""
        self.update(model)

    def update(self, model: Named, *, due: bool | None = None) -> None:
        """An EMA step with the model's parameters as they are; they may change again once update() returns.

        due: whether the update is sent, or only counted; by default each ``update_every``-th is sent.

        To be called once for each optimizer step, also where gradients are accumulated over several batches. Never
        raises for what the service or the network does. Raises UsageError if the parameters are no longer the run's,
        after close(), and for a copy in its own process. A failed update is not made up for: the next update is a new
        step.
        """
        self._join()
        self._publisher.check_usable()
        self._beginning = None
        if self._whereabouts is not None:
            self._whereabouts.updated()
            self._whereabouts = None
        # At every call, due or not: what counts is a step since the latest call.
        fired = self._hook is not None and self._hook.fired()
        due = self._cadence.due if due is None else due
        tensors = self._tensors(self._given.module(model)) if due else []
        step = self._cadence.advance(due)
        if due and self._plan.part is not None and self._publisher.room(wait=self._waits):
            self._send(tensors, step, hooked=fired and self._hook is not None and self._hook.guards(tensors))

    def reset_num_updates(self) -> None:
        """Let the warm-up begin anew. A counter that is off stays off (LitEma's is switched on)."""
        self._join()
        self.flush()
        self._client.reset_num_updates(self._run)

    def flush(self, timeout: float | None = None) -> None:
        """Return when every update so far has been applied. Raises the first failure since the latest flush.

        Raises UpdatesPending after ``timeout`` seconds; ServiceUnreachable or ConnectionLost where the service is away
        for longer than the client's retries (about ten seconds). What is pending is sent on, and training can go on.
        """
        if copied := self._copied:
            sent = copied.sent
        else:
            self._join()
            self._publisher.flush(timeout)
            sent = self._cadence.sent
        if self._plan.others and sent is not None:
            wait = MAX_WAIT if timeout is None else timeout
            self._client.wait_for_step(self._run, sent, wait=wait)

    def close(self, timeout: float | None = None) -> None:
        """Flush, and close the connections. The run stays on the service, which is told that the training is over.

        Raises as flush(), and everything is closed all the same: updates that are not sent by then are lost, and
        logged.
        """
        if self._unjoined:
            self._release()
            return
        if not self._dropped.alive:
            return
        try:
            self.flush(timeout)
            self._publisher.leave()
        finally:
            self._dropped.detach()
            if self._charts:
                self._charts.stop()
            self._publisher.close()
            self._release()

    def __enter__(self) -> RemoteEma:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.close()
        except EmaError as fault:
            if error is None:
                raise
            # The caller has to see what the block raised.
            _log.error("run %r was closed with: %s", self._run, fault)

    # --- what code written for an nn.Module asks -------------------------------------------------------------------

    def buffers(self) -> Iterator[Tensor]:
        """None: what LitEma holds as buffers, the service holds. sgm counts the buffers when it starts."""
        return iter(())

    def parameters(self) -> Iterator[Tensor]:
        """None: there is nothing here to train, move or save."""
        return iter(())

    # --- going on from a checkpoint ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a training's checkpoint needs to come back to the EMA as it is now; strings and numbers only.

        The weights stay on the service, as a snapshot. The ``keep`` newest such snapshots of a run stay. Where the
        service keeps nothing on disk there is no snapshot, and load_state_dict() can only go on from the very same
        version.
        """
        self._look_again()
        self.flush()
        state = saved_state(self._client, self._run, keep=self._keep)
        if copied := self._copied:
            copied.tell_if_later(self._run, state["step"])
        return state

    def load_state_dict(self, state: Mapping[str, Any], *, branch: bool = False) -> None:
        """Go back to the EMA of state_dict(): weights, counter, decay and step. Later updates are as if never made.

        branch: the state may be another run's, of the same model: this run goes on from there, and the other stays as
        it is. Nothing is sent. Without ``branch`` for a RemoteEma of the same run, made with ``resume=True``.

        Raises UsageError for another run's state without ``branch``, for a value that is no state, and where there is
        no snapshot to go back to; SnapshotNotFound where the snapshot was deleted since; with ``branch`` what
        EmaClient.rewind() raises.
        """
        check_state_is_of(self._run, state, branch=branch)
        self._join()
        self._beginning = self._whereabouts = None
        other = self._run if branch and state["run"] != self._run else None
        # All ranks flush before the rewind: a late rank would wait for a step that the rewind takes away.
        self._plan.together(self.flush)
        self._plan.once(lambda: rewind_to(self._client, state, branch=other))
        self._cadence.begin_at(state["step"] or 0)

    # --- evaluation -------------------------------------------------------------------------------------------------

    def copy_to(self, model: Named, **wished: Unpack[Wished]) -> None:
        """Write the EMA weights into the model's parameters (and buffers, unless left alone), frozen ones too.

        wished: of a run with ``posthoc``, an average of any length instead, as for EmaClient.pull().

        Includes every update so far. Nothing is written before all weights have come, into memory of the host, and
        whatever is raised (UsageError if the parameters are not those of the run), nothing was written.
        """
        with self._aside.overwriting():
            self._look_again()
            # Of a sharded model all ranks read the same version: no newer update is applied before each rank sends its
            # part.
            self.flush()
            copied = self._copied
            snapshot = copied.snapshot(self._client, self._run) if copied else None
            module = self._given.module(model)
            # No update is on its way: its memory holds what comes, and a scope costs no further model.
            with contextlib.nullcontext() if self._unjoined else self._buffers.spare() as memory:
                pull = partial(self._selection.pull_into, module, self._client, self._run, memory=memory)
                info = pull(**_as_of(snapshot, wished)) if wished else pull(snapshot=snapshot)
        if copied:
            copied.tell_if_later(self._run, info.step)

    def store(self, parameters: Iterable[Tensor] | nn.Module) -> None:
        """Set copies of ``parameters`` aside, on their devices, until restore().

        Raises AlreadyStored; UsageError for a tensor that restore() could not write to.
        """
        self._aside.store(parameters)

    def restore(self, parameters: Iterable[Tensor] | nn.Module) -> None:
        """Write back the copies that store() made, and free them.

        Raises NothingStored; UsageError, before anything is written and with the copies still there, if ``parameters``
        are not as many, and of the same shapes, as those stored.
        """
        self._aside.restore(parameters)

    @contextlib.contextmanager
    def scope(self, model: Named, **wished: Unpack[Wished]) -> Iterator[None]:
        """EMA weights in the model inside the block, the training weights again after it, whatever the block raises.

        wished: as for copy_to().

        Raises AlreadyStored, before anything is overwritten, inside another scope or after store().
        """
        self._aside.check_empty()
        model = self._given.module(model)
        # The very tensors: a parameter that is frozen inside the block is restored all the same.
        parameters = self._selection.written(model)
        self.store(parameters)
        try:
            self.copy_to(model, **wished)
            yield
        finally:
            reshard(model)
            self.restore(parameters)
            # A DTensor counts the writes to it by itself, and not those to its local memory.
            noticed(model.parameters())

    # --- copies -----------------------------------------------------------------------------------------------------

    def __copy__(self) -> RemoteEma:
        return copy.deepcopy(self)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy begins with: no token, connection, thread or buffer, and nothing of the model.

        Waits for updates on their way, unless the service counts as away; raises nothing for what the service does.
        """
        copied = {name: getattr(self, name) for name in _COPIED}
        return {**copied, "_setup": self._setup.for_a_copy(), "_unjoined": self._for_a_copy()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._given = Given()
        self._beginning = self._whereabouts = self._charts = None

    def _for_a_copy(self) -> _Unjoined:
        """What a copy of now joins with."""
        if (waiting := self._unjoined) is not None:
            return replace(waiting, copied=(waiting.copied or Copied()).again())
        self._look_again(waits=False)
        self._publisher.settle()
        # Of a process that has trained nothing, others that were spawned from it may have trained since.
        began = self._cadence.begun
        step, sent = (self._cadence.step, self._cadence.sent) if began else (self._step_of_run(),) * 2
        return _Unjoined(Start(resume=True, step=step), copied=Copied(step, sent))

    def _step_of_run(self) -> int | None:
        try:
            return self._client.run(self._run).step
        except EmaError as error:
            _log.warning("run %r is copied without its step: %s", self._run, error)
            return None

    @property
    def _copied(self) -> Copied | None:
        """Of what this is a copy, until the copy has joined."""
        return self._unjoined.copied if self._unjoined else None

    # ----------------------------------------------------------------------------------------------------------------

    def _join(self) -> RunInfo | None:
        """Join the run, once: in the constructor or, where there may be a rank before this one, at the first use.

        By then the process group tells the rank. Returns the run as it was found, where nothing told the training's
        step. Raises as the constructor does; UsageError for a copy that only reads.
        """
        if (waiting := self._unjoined) is None:
            return None
        if waiting.copied:
            self._check_may_join(waiting.copied)
        if isinstance(self._plan, WholePlan):
            self._plan = plan_whole(self._plan.layout)
        setup, tensors = self._setup, waiting.tensors
        slices = self._plan.slices if self._plan.in_parts else None
        shared = partial(self._client.shares_memory, self._run)
        self._buffers = UpdateBuffers(self._selection.specs, pinned=setup.on_device, slices=slices, shared=shared)
        borrows = self._borrows and (tensors is None or self._buffers.can_borrow(tensors))
        if self._plan.part is not None and not borrows:
            self._buffers.prepare()
        # A copy is where its original was, whatever that left to be sent.
        ahead = None if waiting.copied else setup.update_every - 1
        joining = Joining(self._client, setup.config, self._plan, lambda: self._initial(tensors), ahead)
        joined = joining.join(waiting.start)
        self._unjoined = None
        self._cadence = Cadence(setup.update_every, joined.step)
        if self._plan.part is not None and joined.made is None:
            # The run has an EMA, which weights of the model do not replace.
            self._beginning = None
        # Neither the thread nor the hook refers to the RemoteEma: dropping a RemoteEma without close() ends both.
        send, fate, leave = sending(self._client, self._run, self._plan, joined)
        name = f"run {self._run!r} at {self._client.url}"
        self._publisher = Publisher(send, SendPolicy(self._client.retry), name=name, fate=fate, leave=leave)
        self._hook = _hook(self._publisher, self._buffers) if self._borrows or setup.on_device else None
        self._dropped = weakref.finalize(self, self._publisher.finish)
        # At the end of the program the publisher ends by itself, and waits for its updates.
        self._dropped.atexit = False
        if setup.log_to is not None and self._plan.part == 0:
            self._charts = self._drawing(setup.log_to)
        return joined.taken

    def _drawing(self, log_to: LogTo) -> Charts:
        """Charts of the run from now on. Nothing of them refers to the RemoteEma."""
        client, run, cadence = self._client, self._run, self._cadence
        sources = Sources(
            info=partial(client.run, run),
            history=lambda since, points: client.history(run, since=since, points=points),
            step=lambda: cadence.step,
        )
        charts = Charts(sources, logger_of(log_to, run), run=run, begin=client.run(run))
        charts.start()
        # At the end of the program they end by themselves, behind the publisher.
        weakref.finalize(self, charts.end).atexit = False
        return charts

    # --- the beginning ----------------------------------------------------------------------------------------------

    def _begin(self, _: Optimizer) -> None:
        """Ahead of the first step: what the model holds are the initial weights of the training."""
        if (beginning := self._beginning) is not None and self._plan.part is not None:
            # Of a sharded model all ranks step, and each gives its part: any may have other weights than before.
            self._give_anew(beginning.tensors() if self._plan.in_parts else beginning.changed())

    def _taken_to_be_at(self, run: RunInfo, model: nn.Module, tensors: list[Tensor]) -> Whereabouts | None:
        """What tells whether the training is where the run is; None where the run had no update that counts twice."""
        if run.version is None or run.version.endswith(".0"):
            return None
        digests = () if self._plan.in_parts else latest_digests(self._client, run)
        every = self._setup.update_every
        return Whereabouts(run, digests, model=model, selection=self._selection, tensors=tensors, update_every=every)

    def _look_again(self, *, waits: bool = True) -> None:
        """Ahead of a read: the same, where every rank can tell by itself whether the model has other weights.

        waits: on a rank that sends nothing, until the rank that does has given them.
        """
        if self._beginning is not None:
            self._join()
        beginning = self._beginning
        if beginning is None or beginning.over or self._plan.in_parts or (tensors := beginning.changed()) is None:
            return
        self._give_anew(tensors)
        if waits:
            self._plan.await_anew(self._client, self._run, beginning.changes)

    def _give_anew(self, tensors: list[Tensor] | None) -> None:
        if tensors is None:
            return
        if waiting := self._unjoined:
            waiting.tensors = _copies(tensors)
        elif self._plan.part is not None and self._publisher.room(wait=True):
            self._publisher.submit(self._buffers.copied(None, tensors, hooked=False))

    # ----------------------------------------------------------------------------------------------------------------

    def _check_may_join(self, copied: Copied) -> None:
        if copied.is_here:
            raise UsageError(
                f"this RemoteEma is a copy, and the original may train run {self._run!r}: a copy only reads",
                hint="to train the copied model, make a RemoteEma for it: with a run of its own or, in place of the "
                "original, with resume=True",
            )
        if not isinstance(self._plan, WholePlan):
            raise UsageError(
                f"this RemoteEma is a copy, of a sharded model's in run {self._run!r}: a copy only reads",
                hint="make the RemoteEma when the model is sharded, with resume=True",
            )

    def _send(self, tensors: list[Tensor], step: int, *, hooked: bool) -> None:
        """The only place where an update leaves the trainer."""
        if hooked and self._sends_module_buffers:
            # The next forward pass changes the model's buffers, before there is a step that would wait for the sending
            # or for the copy.
            tensors = [each if isinstance(each, nn.Parameter) else each.detach().clone() for each in tensors]
        # A service that is away may need the bytes for longer than a step takes.
        borrow = self._borrows and not self._publisher.stuck
        self._publisher.submit(self._buffers.update(step, tensors, hooked=hooked, borrow=borrow))

    def _tensors(self, model: nn.Module) -> list[Tensor]:
        tensors, frozen = self._selection.of(model)
        if news := set(frozen) - self._told_frozen:
            self._told_frozen |= news
            warnings.warn(
                f"parameters of run {self._run!r} were frozen; their average goes on, towards the values they have: "
                + listed(sorted(news)),
                stacklevel=3,
            )
        return tensors

    def _initial(self, tensors: list[Tensor] | None) -> dict[str, Tensor]:
        """name -> the tensor as it is sent: nothing changes it before the constructor returns. Copies that are needed
        all the same lie in the memory of the first update to come."""
        if tensors is None:
            # Made anew by somebody else, since the copy that joins was made.
            raise AwaitingWeights(f"run {self._run!r} has no weights", hint="make a new RemoteEma for the model")
        sent = self._buffers.initial(tensors)
        return {spec.name: tensor for spec, tensor in zip(self._selection.specs, sent, strict=True)}

    def _release(self) -> None:
        self._beginning = self._whereabouts = None
        if self._owns_client:
            self._client.close()


@dataclass(frozen=True, slots=True)
class _Setup:
    """What a RemoteEma was made with. on_device: whether the model's tensors were on a CUDA device."""

    config: RunConfig
    update_every: int
    on_device: bool
    log_to: LogTo | None = None

    def for_a_copy(self) -> _Setup:
        """The same without a function to log to, which need not be one that can be copied or pickled."""
        return self if isinstance(self.log_to, str) else replace(self, log_to=None)


@dataclass(slots=True)
class _Unjoined:
    """What a RemoteEma that has not joined its run yet joins with.

    tensors: the model's, or copies, for the first shadow; None where the run was joined before the copy was made.
    """

    start: Start
    tensors: list[Tensor] | None = None
    copied: Copied | None = None


def _as_of(snapshot: str | None, wished: Wished) -> Wished:
    """The same average, as of the snapshot where the caller names no time."""
    return wished if snapshot is None or wished.get("at") is not None else {**wished, "at": snapshot}


def _copies(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().to("cpu", copy=True) for tensor in tensors]


def _hook(publisher: Publisher, buffers: UpdateBuffers) -> StepHook:
    """The hook that lets a step wait for the copies and the borrowed memory of updates, until the publisher's end."""
    devices = buffers.devices

    def before_step() -> None:
        devices.before_step()
        publisher.recall()

    hook = StepHook(before_step)
    publisher.at_end(hook.remove)
    return hook


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


def _check_cadence(update_every: int, on_busy: str, keep: int | None) -> None:
    if update_every < 1:
        raise UsageError(f"update_every={update_every} is less than 1", hint="1 sends every update, 10 each tenth")
    if keep is not None and keep < 1:
        raise UsageError(f"keep={keep} is less than 1", hint="so many snapshots of states stay; None: all")
    if on_busy not in get_args(BusyPolicy):
        raise UsageError(f"on_busy={on_busy!r} is unknown", hint="give 'block' or 'skip'")
