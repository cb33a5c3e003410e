"""RemoteEma: in the place of LitEma in a training loop, with the shadow weights on the server.

Knows: LitEma's calls and what they mean, the trainer's step, when an update is due and what must wait for it. Does not
know: HTTP, how a trainer joins its run (joining), which tensors are averaged (selection), how they are copied (sending)
and sent (publisher), what is kept in a checkpoint (rewinding) and aside (stored), or the averaging itself, which is the
server's.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ema_client.client import EmaClient, checked_decay
from ema_client.errors import EmaError, UsageError, listed
from ema_client.http.body import Body
from ema_client.protocol import DEFAULT_DECAY, MAX_WAIT, AverageConfig, DecayPer, Durability, RunConfig
from ema_client.training.aside import Stored
from ema_client.training.buffers import Sending, StepHook
from ema_client.training.joining import Joining
from ema_client.training.publisher import Publisher, Stats
from ema_client.training.selection import BufferPolicy, FrozenPolicy, Selection
from ema_client.training.sharding import Plan, ShardedSelection, is_sharded, plan_whole, reshard, together
from ema_client.training.state import check_state_is_of, rewind_to, saved_state

__all__ = ["BusyPolicy", "RemoteEma"]

#: What an update does while earlier ones are on their way: wait for room, or be left out and counted.
BusyPolicy = Literal["block", "skip"]

_log = logging.getLogger("ema_client")


class RemoteEma:
    """The exponential moving average of a model's parameters, kept by the service.

    Called where LitEma is: ``ema(model)`` after each optimizer step, ``with ema.scope(model):`` around an evaluation.
    Averaged are the parameters that require gradients, by their canonical names. Not an nn.Module: it has no weights of
    its own to save, move or cast. One thread at a time, and the process that made it.

    update() takes the parameters and returns; a thread sends them. What goes wrong with the sending is logged, counted
    (``stats``) and raised by flush(), close() and whatever reads: these wait for the updates before them. The end of
    the program waits for what is on its way, for at most 30 seconds.

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
        update_every: send each k-th update only. The step counts the calls all the same.
        decay_per: "update", LitEma's meaning: one decay for each update applied; "step": the product of the decays of
            all calls since the last update applied, so that updates left out are made good.
        on_busy: "block": wait while two updates are on their way, so that none is left out, as with LitEma; "skip":
            never wait, leave this update out. Where the service is away nobody waits: updates are left out.
        push_dtype: send the parameters as this: torch.bfloat16 for half the traffic. The shadow is float32 all the
            same, beginning with the parameters as they were sent. Buffers that are copied are sent as they are.
        borrow: send the parameters from where they lie, on the CPU, and let the next step of a torch optimizer wait
            until they are sent. Saves the copy. Nothing but an optimizer may change them between update() and step().
        frozen: "hold": a parameter that is frozen later goes on being averaged, with a warning; "error": a UsageError.
        buffers: what becomes of floating-point buffers that are saved with the model, such as BatchNorm's statistics:
            "none": they stay the model's own; "average": they are averaged as well; "copy": beside the averages are
            those of the latest update sent. Others, such as BatchNorm's counter of batches, stay the model's own.
        durability: what survives a crash of the service; by default the protocol's.

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
        update_every: int = 1,
        decay_per: DecayPer = "update",
        on_busy: BusyPolicy = "block",
        push_dtype: str | torch.dtype | None = None,
        borrow: bool = False,
        frozen: FrozenPolicy = "hold",
        buffers: BufferPolicy = "none",
        durability: Durability | None = None,
        use_num_upates: bool | None = None,
    ) -> None:
        counted = _one_spelling(use_num_updates, use_num_upates)
        decay = checked_decay(decay)
        _check_cadence(update_every, on_busy)
        self._selection, self._plan = _selected(model, buffers, frozen, push_dtype, on_busy)
        if client is not None and (url is not None or token is not None):
            raise UsageError("both a client and a url or token are given", hint="give one: a client has its own url")
        self._run = run
        self._update_every = update_every
        self._waits = on_busy == "block"
        self._borrows = borrow
        self._buffers = buffers != "none"
        self._stored = Stored()
        self._frozen: set[str] = set()
        tensors, _ = self._selection.of(model)
        on_device = any(tensor.is_cuda for tensor in tensors)
        self._client = client or EmaClient(url, token=token)
        self._owns_client = client is None
        same_host = self._client.same_host
        self._sending = Sending(self._selection.specs, pinned=on_device, slices=self._plan.slices, shared=same_host)
        config = RunConfig(
            run=run,
            layout=self._plan.layout,
            decay=decay,
            use_num_updates=counted,
            decay_per=decay_per,
            averages=(AverageConfig(),) if averages is None else tuple(averages),
            durability=durability,
            copied=tuple(sorted(self._selection.copied)),
        )
        joining = Joining(self._client, config, self._plan, lambda: self._initial(tensors))
        try:
            info, self._writer = joining.join(resume=resume)
        except BaseException:
            self._release()
            raise
        self._step = self._first_step = self._sent_step = (info.step if info else None) or 0
        self._start(hooked=borrow or on_device)

    def _start(self, *, hooked: bool) -> None:
        client, run, plan, writer = self._client, self._run, self._plan, self._writer

        def send(step: int, body: Body) -> object:
            if plan.sharded and plan.part is not None:
                part = {"part": plan.part, "of": plan.of}
                return client.push_part_once(run, body, step=step, group=plan.group, writer=writer, **part)
            return client.push_once(run, body, step=step, writer=writer)

        # Neither the thread nor the hook knows this object: one that is dropped without close() ends both.
        self._publisher = Publisher(send, client.retry, name=f"run {run!r} at {client.url}")
        publisher, devices = self._publisher, self._sending.devices

        def before_step() -> None:
            devices.before_step()
            publisher.recall()

        self._hook = StepHook(before_step) if hooked else None
        if self._hook is not None:
            publisher.at_end(self._hook.remove)
        self._dropped = weakref.finalize(self, publisher.finish)
        # The end of the program is the publisher's own, which waits.
        self._dropped.atexit = False

    @property
    def run(self) -> str:
        """The run's name."""
        return self._run

    @property
    def decay(self) -> float:
        """The largest decay, asked of the service. LitEma and the service compute with its float32 value."""
        self.flush()
        return self._client.run(self._run).decay

    @property
    def num_updates(self) -> int:
        """LitEma's counter, asked of the service; -1 where it is off."""
        self.flush()
        return self._client.run(self._run).num_updates

    @property
    def pending(self) -> int:
        """Updates taken and not yet applied: 0, 1 or 2."""
        return self._publisher.pending

    @property
    def stats(self) -> Stats:
        """How many updates were sent, skipped and failed."""
        return self._publisher.stats

    def __repr__(self) -> str:
        return f"RemoteEma(run={self._run!r}, url={self._client.url!r})"

    # --- training ---------------------------------------------------------------------------------------------------

    def __call__(self, model: nn.Module) -> None:
        """The same as update()."""
        self.update(model)

    def update(self, model: nn.Module) -> None:
        """One EMA step with the model's parameters as they are. They may change again once this returns.

        Call it once for each optimizer step, also where gradients are accumulated over several batches. Never raises
        for what the service or the network does. Raises UsageError if the parameters are no longer those the run was
        made with, and after close(). An update that failed is not made up for: the next one is a new step.
        """
        self._publisher.check_usable()
        # Asked at every call: what counts is a step since the last one.
        hooked = self._hook is not None and self._hook.fired()
        due = (self._step + 1 - self._first_step) % self._update_every == 0
        tensors = self._tensors(model) if due else []
        self._step += 1
        if due:
            self._sent_step = self._step
        if due and self._plan.part is not None and self._publisher.room(wait=self._waits):
            self._send(tensors, self._step, hooked=hooked)

    def reset_num_updates(self) -> None:
        """Let the warm-up begin anew. With the counter off it stays off (LitEma's switched on)."""
        self.flush()
        self._client.reset_num_updates(self._run)

    def flush(self, timeout: float | None = None) -> None:
        """Return when every update so far has been applied. Raises what went wrong with those since the last flush.

        Raises UpdatesPending after ``timeout`` seconds; ServiceUnreachable or ConnectionLost where the service is away
        for longer than the client's retries (about ten seconds). What is pending is sent on, and training can go on.
        """
        self._publisher.flush(timeout)
        if self._plan.others:
            self._client.wait_for_step(self._run, self._sent_step, wait=MAX_WAIT if timeout is None else timeout)

    def close(self, timeout: float | None = None) -> None:
        """Flush, and close the connections. The run stays on the service.

        Raises as flush(), and everything is closed all the same: what is not sent by then is lost, and logged.
        """
        if not self._dropped.alive:
            return
        try:
            self.flush(timeout)
        finally:
            self._dropped.detach()
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
            # What the block raised is what its caller has to see.
            _log.error("run %r was closed with: %s", self._run, fault)

    # --- what code written for an nn.Module asks -------------------------------------------------------------------

    def buffers(self) -> Iterator[Tensor]:
        """None: what LitEma holds as buffers, the service holds. sgm counts them when it starts."""
        return iter(())

    def parameters(self) -> Iterator[Tensor]:
        """None: there is nothing here to train, move or save."""
        return iter(())

    # --- going on from a checkpoint ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of the training needs to come back to the EMA as it is now; strings and numbers only.

        The weights stay on the service, as a snapshot. The ten newest such snapshots of a run are kept. Where the
        service keeps nothing on disk there is none, and load_state_dict() can only go on from the very same version.
        """
        self.flush()
        return saved_state(self._client, self._run)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to the EMA of state_dict(): weights, counter, decay and step. Updates after it are done away with.

        For a RemoteEma of the same run, made with ``resume=True``. Raises UsageError for another run's state, for what
        is none, and where there is no snapshot to go back to; SnapshotNotFound where that was deleted since.
        """
        check_state_is_of(self._run, state)

        def rewind() -> None:
            if self._plan.part == 0:
                rewind_to(self._client, state)

        if self._plan.sharded:
            # All have flushed before one rewinds: a rank that is late would wait for a step that is no more.
            together(self.flush)
            together(rewind)
        else:
            self.flush()
            rewind()
        self._step = self._first_step = self._sent_step = state["step"] or 0

    # --- evaluation -------------------------------------------------------------------------------------------------

    def copy_to(self, model: nn.Module) -> None:
        """Write the EMA weights into the model's parameters (and buffers, unless left alone), frozen ones too.

        Includes every update so far. Raises UsageError, before anything is written, if the parameters are not those of
        the run.
        """
        self.flush()
        if isinstance(self._selection, ShardedSelection):
            # Nobody waits for the others here: no newer update can be applied before each has sent its part of it.
            self._client.pull_slices(self._run, self._selection.wanted(model), min_step=self._sent_step)
            return
        targets, twins = self._selection.targets(model)
        self._client.pull(self._run, out=targets)
        with torch.no_grad():
            for twin, name in twins:
                twin.copy_(targets[name])

    def store(self, parameters: Iterable[Tensor]) -> None:
        """Keep copies of ``parameters``, on their devices, until restore(). Raises AlreadyStored if there are some."""
        self._stored.store(parameters)

    def restore(self, parameters: Iterable[Tensor]) -> None:
        """Write back what store() kept, and let go of it.

        Raises NothingStored; UsageError, before anything is written and with the copies kept, if ``parameters`` are not
        as many, and of the same shapes, as those stored.
        """
        self._stored.restore(parameters)

    @contextlib.contextmanager
    def scope(self, model: nn.Module) -> Iterator[None]:
        """EMA weights in the model inside the block, the training weights again after it, whatever happens in it.

        Raises AlreadyStored, before anything is overwritten, inside another scope or after store().
        """
        self._stored.check_empty()
        # The very tensors: what is frozen inside the block is restored all the same.
        targets, twins = self._selection.targets(model)
        parameters = [*targets.values(), *(twin for twin, _ in twins)]
        self.store(parameters)
        try:
            self.copy_to(model)
            yield
        finally:
            reshard(model)
            self.restore(parameters)

    # ----------------------------------------------------------------------------------------------------------------

    def _send(self, tensors: list[Tensor], step: int, *, hooked: bool) -> None:
        """The one place where an update leaves the trainer."""
        if hooked and self._buffers:
            # The next forward pass changes buffers, before there is a step that would wait for the sending or the copy.
            tensors = [each if isinstance(each, nn.Parameter) else each.detach().clone() for each in tensors]
        # A service that is away may need the bytes for longer than a step takes.
        if self._borrows and hooked and not self._publisher.stuck and self._sending.can_borrow(tensors):
            update = self._sending.borrowed(step, tensors)
        else:
            update = self._sending.copied(step, tensors, hooked=hooked)
        self._publisher.submit(update)

    def _tensors(self, model: nn.Module) -> list[Tensor]:
        tensors, frozen = self._selection.of(model)
        if news := set(frozen) - self._frozen:
            self._frozen |= news
            warnings.warn(
                f"parameters of run {self._run!r} were frozen; their average goes on, towards the values they have: "
                + listed(sorted(news)),
                stacklevel=3,
            )
        return tensors

    def _initial(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        """The tensors as they are sent; where they are copied, in the memory that updates will be copied to."""
        live = self._borrows and self._sending.can_borrow(tensors)
        sent = tensors if live else self._sending.warmed(tensors)
        return {spec.name: tensor for spec, tensor in zip(self._selection.specs, sent, strict=True)}

    def _release(self) -> None:
        if self._owns_client:
            self._client.close()


def _selected(
    model: nn.Module,
    buffers: BufferPolicy,
    frozen: FrozenPolicy,
    dtype: str | torch.dtype | None,
    on_busy: BusyPolicy,
) -> tuple[Selection | ShardedSelection, Plan]:
    if not is_sharded(model):
        whole = Selection(model, buffers=buffers, frozen=frozen, dtype=dtype)
        return whole, plan_whole(whole.specs)
    if buffers != "none":
        raise UsageError("the buffers of a sharded model are not averaged or copied", hint="leave buffers='none'")
    if on_busy == "skip":
        raise UsageError("each rank would leave out updates of its own", hint="use on_busy='block', update_every=k")
    sharded = ShardedSelection(model, frozen=frozen, dtype=dtype)
    return sharded, sharded.plan


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


def _check_cadence(update_every: int, on_busy: str) -> None:
    if update_every < 1:
        raise UsageError(f"update_every={update_every} is less than 1", hint="1 sends every update, 10 each tenth")
    if on_busy not in get_args(BusyPolicy):
        raise UsageError(f"on_busy={on_busy!r} is unknown", hint="give 'block' or 'skip'")
