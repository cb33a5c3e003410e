"""EmaClient: everything a trainer or an evaluator asks of the service, as Python calls.

Knows: the routes and what their answers mean. Does not know: sockets and retries (http), how tensors become bytes
(tensors), how weights are read (reading). Imports torch where a call needs torch, so that programs which look at runs
or steer runs do without.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Unpack
from urllib.parse import urlencode

from ema_client import protocol
from ema_client.arguments import checked_decay, checked_dtype, checked_lanes, named
from ema_client.errors import (
    AwaitingWeights,
    EmaError,
    ProtocolError,
    RunNotFound,
    SnapshotNotFound,
    UsageError,
)
from ema_client.hosts.direct import DirectPulls
from ema_client.hosts.finding import Hosts
from ema_client.hosts.parts import PartName, is_staged
from ema_client.http.body import Body
from ema_client.http.pace import MOST_FORCED as MOST_LANES
from ema_client.http.retry import RetryPolicy
from ema_client.http.transport import Query, Transport, with_query
from ema_client.lifecycle import WORK_SECONDS, Lifecycle, run_of, told_if_replaced
from ema_client.protocol import (
    AverageConfig,
    DecayPer,
    Distances,
    Durability,
    EventKind,
    History,
    NonFinitePolicy,
    Posthoc,
    ProfileInfo,
    RunConfig,
    RunEvent,
    RunInfo,
    RunLayout,
    RunList,
    RunPatch,
    ServerInfo,
    SnapshotInfo,
    SnapshotList,
    SweepInfo,
    SweepList,
    Timeline,
    UpdateResult,
    UpdateStatus,
    WeightsInfo,
    Writer,
)
from ema_client.pushing import Pushes
from ema_client.reading.asked import Asked
from ema_client.reading.checking import Progress
from ema_client.reading.events import CONTENT_TYPE
from ema_client.reading.slices import Wanted
from ema_client.reading.sweeping import Evaluate, Sweep, Sweeper, SweptPoint, checked_label, lengths_of, log_unreported
from ema_client.reading.to_file import pour, save, save_on
from ema_client.reading.watching import VERSIONS, Questions, watch
from ema_client.reading.weights import Weights
from ema_client.schedules import average_of, averages_of, posthoc_of
from ema_client.states import body_of, part_body_of, require_torch
from ema_client.steps import Steps, await_step
from ema_client.targets import Target, Wished
from ema_client.wire import Box

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ema_client.states import State
    from ema_client.tensors.shared import SharedState

__all__ = ["MOST_LANES", "EmaClient", "checked_decay", "service_of"]


class EmaClient:
    """The calls to one service. Thread-safe; one client serves a process, and its forks by connections of their own.

    A copy is a client of the same URL with connections of its own. A pickle holds no token: where it is loaded the
    token is $EMA_SERVICE_TOKEN.

    More than twenty methods: one for each thing that a user may ask of the service.

    Args:
        url: ``http://host:port``, ``https://host``, ``unix:///path.sock``, or ``file:///path`` of the file in which a
            server says where it is (``ema-service serve --address-file``); else $EMA_SERVICE_URL, else
            http://127.0.0.1:8470.
        token: bearer token; else $EMA_SERVICE_TOKEN, else none.
        retry: when to try again, by default for about ten seconds.
        lanes: over how many connections at once large weights go; by default over as many as pay, which is found while
            weights go to and fro: ``link`` says what was found.

    Every call raises an EmaError: the service's own, by the class of the error's code; ServiceUnreachable or
    ConnectionLost once the retries are spent; UsageError for a mistake that is seen before anything is sent.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        token: str | None = None,
        retry: RetryPolicy | None = None,
        lanes: int | None = None,
    ) -> None:
        url, self._token = service_of(url, token)
        self._transport = Transport(url, token=self._token, retry=retry, lanes=checked_lanes(lanes))
        # For the many programs that end without close(): no socket is left to the garbage collector.
        weakref.finalize(self, self._transport.close)
        self._hosts = Hosts(self._transport)
        weakref.finalize(self, self._hosts.close)
        self._pulls = DirectPulls(self._transport, self._hosts)
        self._pushes = Pushes(self._transport, self._hosts)
        self._steps = Steps()
        self._lifecycle = Lifecycle(self._transport, self._pushes.initialise, self._steps)

    @property
    def url(self) -> str:
        """The service's address."""
        return self._transport.url

    @property
    def retry(self) -> RetryPolicy:
        """When calls try again."""
        return self._transport.retry

    def shares_memory(self, run: str) -> bool:
        """Whether the service, or a host of the run that was found, can be on this host, and so read memory of this
        process. Asks nobody."""
        return self._transport.may_be_here or self._hosts.near(run)

    @property
    def lanes(self) -> int | None:
        """Over how many connections at once large weights go; None: over as many as pay. May be set."""
        return self._transport.lanes

    @lanes.setter
    def lanes(self, lanes: int | None) -> None:
        self._transport.lanes = checked_lanes(lanes)

    @property
    def link(self) -> str:
        """How this client's weights travel: "TCP", "Unix socket" or "shared memory".

        Where the service refused shared memory, the reason follows; and where more connections at once pay than one for
        a push and two for a pull, how many of them, and why not more. Of a cluster also how they travel to those of its
        hosts that are on this machine, and by each host's URL over how many connections.
        """
        return "; ".join(filter(None, [self._transport.link, self._hosts.link]))

    def __repr__(self) -> str:
        return f"EmaClient({self.url!r})"

    def __copy__(self) -> EmaClient:
        return EmaClient(self.url, token=self._token, retry=self.retry, lanes=self.lanes)

    def __deepcopy__(self, _: dict[int, Any]) -> EmaClient:
        return self.__copy__()

    def __reduce__(self) -> Any:
        # Without the token: pickles are files, and go to others.
        return partial(EmaClient, self.url, retry=self.retry, lanes=self.lanes), ()

    def __enter__(self) -> EmaClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Later calls raise UsageError."""
        self._transport.close()
        self._hosts.close()

    # --- a trainer's calls ------------------------------------------------------------------------------------------

    def create_run(
        self,
        run: str,
        state: State,
        *,
        decay: float = protocol.DEFAULT_DECAY,
        use_num_updates: bool = True,
        decay_per: DecayPer = "update",
        schedule: AverageConfig | None = None,
        averages: Sequence[AverageConfig] | None = None,
        non_finite: NonFinitePolicy = "refuse",
        durability: Durability | None = None,
        copied: Collection[str] = (),
        posthoc: Posthoc | Mapping[str, Any] | bool | None = None,
        num_updates: int | None = None,
        step: int | None = None,
        from_snapshot: tuple[str, str] | None = None,
        exist_ok: bool = False,
        progress: Progress | None = None,
    ) -> RunInfo:
        """Create a run with the layout of ``state`` and send the initial weights; returns the run as it is then.

        Args:
            run: the run's name, of letters, digits, ``.``, ``_`` and ``-``.
            state: a mapping from name to tensor, or a module, of which the parameters that require gradients are sent,
                by their canonical names. Read from the tensors' memory until the call returns; never copied as a whole.
            decay, use_num_updates: as LitEma's.
            decay_per: "update", or "step" for a trainer that pushes every k-th step.
            schedule: of the run's average, by a function of ``ema_client.schedules``; None: LitEma's.
            averages: the averages of the run, where there are several, each with its schedule and name.
            non_finite: whether updates with NaN or Inf are refused or allowed.
            durability: what an answered update outlives: "memory" a clean stop of the server, "process" a sudden end of
                the server, "disk" a power loss. None: "process", or "memory" where the server keeps nothing on disk.
            copied: names of tensors of ``state`` that are not averaged: the run holds their newest value, bit for bit,
                such as that of BatchNorm's statistics.
            posthoc: keep what averages of any length can be worked out of later, by ``sigma_rel`` and so on of pull():
                True, or ``Posthoc(snapshots=32)``, or its fields by name. ``ema plan`` says what that costs.
            num_updates, step: to carry on an EMA from elsewhere.
            from_snapshot: (run, snapshot), to branch from another run on the service: weights, counter, step and decays
                are the snapshot's, and nothing of ``state`` is sent but names, shapes and dtypes.
            exist_ok: return a run that has its weights already as it is, and send nothing.
            progress: called with (bytes that went out, bytes in all).

        A run of this name that never had weights, whatever its configuration, is taken for an attempt that failed and
        made anew. Of two trainers that make one run at once the first whose weights have come has it whole.

        Raises RunExists; StorageDisabled; InvalidDecay; NameCollision and UsageError for a state that cannot be sent;
        Superseded where another trainer goes on sending the initial weights of another configuration; with
        ``from_snapshot`` SnapshotNotFound, and what rewind() raises.
        """
        if from_snapshot is not None and (num_updates is not None or step is not None):
            raise UsageError("num_updates or step is given with from_snapshot, which has both")
        require_torch()
        from ema_client.tensors.layout import specs_of, state_of

        config = RunConfig(
            run=named(run, "run"),
            layout=specs_of(state_of(state)),
            decay=checked_decay(decay),
            use_num_updates=use_num_updates,
            decay_per=decay_per,
            averages=averages_of(schedule, averages),
            non_finite=non_finite,
            durability=durability,
            copied=tuple(copied),
            posthoc=posthoc_of(posthoc),
        )
        query: Query = {"num_updates": num_updates, "step": step}
        return self._lifecycle.create(
            config, lambda: body_of(state, progress), query, from_snapshot=from_snapshot, exist_ok=exist_ok
        )

    def begin_anew(self, run: str, state: State, *, writer: int | None = None) -> RunInfo:
        """Give a run other initial weights before its first update: those that a model was loaded with since.

        Counter, step and decays stay. The run's own weights again change nothing. state: as for create_run(), of the
        run's tensors; writer: as for push().

        Raises WeightsExist once an update was applied, or the run went back to a snapshot; LayoutMismatch, NonFinite,
        Fenced, AwaitingWeights, RunNotFound.
        """
        require_torch()
        body, info = body_of(state), self.run(run)
        if info.version is None:
            raise AwaitingWeights(f"run {run!r} has no initial weights yet")
        query: Query = {"replaces": info.version, "created_at": info.created_at}
        reply = self._pushes.initialise(run, body, query, _writer_header(writer))
        return self._steps.seen(run_of(run, reply)) if reply else self.run(run)

    def begin_anew_once(
        self,
        run: str,
        body: Body,
        *,
        replaces: str,
        created_at: float,
        writer: int | None = None,
        part: int | None = None,
        of: int | None = None,
        group: str | None = None,
    ) -> bool:
        """begin_anew() of a ready body, or of a part of one, tried once; True where no other part is awaited.

        replaces: the run's version. For a sender with retries of its own, which are told the same version.
        """
        query: Query = {"replaces": replaces, "created_at": created_at, "of": of, "group": group}
        headers = _writer_header(writer)
        if part is not None:
            name = PartName(None, part, group or "")
            return not is_staged(self._pushes.push_part(run, name, body, query, headers, once=True))
        self._pushes.initialise(run, body, query, headers, once=True)
        return True

    def push(
        self,
        run: str,
        state: State,
        *,
        step: int | None = None,
        writer: int | None = None,
        progress: Progress | None = None,
    ) -> UpdateResult:
        """Send the parameters as of one trainer step; the service applies the update once, all or nothing.

        Args:
            run: a run that has its initial weights.
            state: as for create_run(); exactly the tensors of the run. Read from their memory until the call returns.
            step: the trainer's step, growing from push to push; by default the step after the latest one.
            writer: what attach() gave; needed once a trainer has attached to the run.
            progress: called with (bytes that went out, bytes in all).

        Raises LayoutMismatch, NonFinite, StaleStep, StepConflict, Fenced, AwaitingWeights, RunNotFound.
        """
        require_torch()
        body = body_of(state, progress)
        step = self._next_step(run) if step is None else step
        return self._push(run, body, step, writer, once=False)

    def push_once(self, run: str, body: Body, *, step: int, writer: int | None = None) -> UpdateResult:
        """push() of a ready body, tried once: for a sender with retries of its own."""
        return self._push(run, body, step, writer, once=True)

    def _push(self, run: str, body: Body, step: int, writer: int | None, *, once: bool) -> UpdateResult:
        if not 0 <= step <= protocol.MAX_STEP:
            raise UsageError(f"step {step} is not between 0 and {protocol.MAX_STEP}")
        try:
            reply = self._pushes.push(named(run, "run"), step, body, _writer_header(writer), once=once)
        except EmaError:
            # The service knows better whether this update was applied, and what others have pushed.
            self._steps.forget(run)
            raise
        result = reply.parsed(UpdateResult)
        if result.step != step:
            raise ProtocolError(f"{reply.url} was sent step {step} and answered of step {result.step}")
        self._steps.remember(run, result.step)
        return result

    def attach(self, run: str) -> int:
        """A writer's number for this trainer, to be given to push(): from now on earlier trainers' pushes are refused.

        A trainer that was replaced, and does not know, cannot push any more. Raises RunNotFound.
        """
        return self._transport.json("POST", protocol.writers_path(named(run, "run"))).parsed(Writer).writer

    def detach(self, run: str, writer: int) -> RunInfo:
        """Say that the training is over of the trainer to which attach() gave ``writer``: no update of it is to come.

        Nothing is refused for that, and the next attach() or update takes it back. Where another trainer has attached
        since, nothing changes. Tried once: nothing depends on it. Raises RunNotFound.
        """
        return self._transport.json_once("DELETE", protocol.writer_path(named(run, "run"), writer)).parsed(RunInfo)

    def rewind(self, run: str, snapshot: str | None, *, from_run: str | None = None) -> RunInfo:
        """Bring a run back to a snapshot: weights, step, counter and decays, in a new epoch.

        Steps after the snapshot's can be pushed again. Attach before you rewind: a trainer that still runs could push
        in between. None: let a run that is ``degraded`` go on with the version that is there.

        from_run: the snapshot's run, where it is another: the run branches from it. Nothing is sent; both runs have
        tensors of the same names and shapes, count their updates alike, and the snapshot has the averages of the run.

        Raises SnapshotNotFound, SnapshotDamaged, StorageDisabled; of another run LayoutMismatch, AverageNotFound.
        """
        return self._lifecycle.rewind(run, snapshot, from_run)

    def declare_run(self, config: RunConfig, *, exist_ok: bool = False) -> RunInfo:
        """Create a run whose initial weights come later, in parts: see send_weights_part().

        A run of this name that never had weights is made anew, as by create_run(). exist_ok: return a run that has its
        weights already as it is. Raises RunExists, Superseded.
        """
        return self._lifecycle.declare(config, exist_ok=exist_ok)

    def push_part(
        self,
        run: str,
        state: Mapping[str, Tensor],
        *,
        slices: Mapping[str, Sequence[Box]],
        step: int,
        part: int,
        of: int,
        group: str = "",
        writer: int | None = None,
    ) -> bool:
        """Send a part of an update, as a rank of a sharded trainer does; True if it was the last part to come.

        Args:
            run: a run that has its initial weights.
            state: what this rank holds: whole tensors, or slices. Read from their memory until the call returns.
            slices: for each tensor that is not whole, the slices that lie in it back to back (row-major; flat where
                there are several): each a ``(start, stop)`` for every dimension of the run's tensor.
            step: the trainer's step; all ranks must give the same.
            part, of: this part's number, from 0, and how many parts there are.
            group: a string that is the same on all ranks, and another at each start of the trainer: parts of two
                starts are never put together.
            writer: as for push(), the same for all parts.

        The update is applied when all parts are there, as a whole; until then, and if a part never comes, the EMA stays
        as it is, and update_status() tells whether this part is still there. Raises as push() does, LayoutMismatch also
        where parts overlap or leave a gap.
        """
        query, headers = {"of": of, "group": group or None}, _writer_header(writer)
        name, body = PartName(step, part, group), part_body_of(state, slices)
        return not is_staged(self._pushes.push_part(named(run, "run"), name, body, query, headers, once=False))

    def push_part_once(
        self, run: str, body: Body, *, step: int, part: int, of: int, group: str = "", writer: int | None = None
    ) -> bool:
        """push_part() of a ready body, tried once: for a sender with retries of its own."""
        query, headers = {"of": of, "group": group or None}, _writer_header(writer)
        name = PartName(step, part, group)
        return not is_staged(self._pushes.push_part(named(run, "run"), name, body, query, headers, once=True))

    def update_status(self, run: str, step: int, *, first: str | None = None) -> UpdateStatus:
        """What the service knows of a step: applied, its parts that are there, or nothing.

        first: of the initial weights, which are of ``step``, instead of an update: of their parts of this group.

        A part that was answered is safe only once its step is applied: until then the service has it in memory alone,
        and whoever sent the part keeps it, and sends it again where it is not among ``parts`` any more.
        """
        path = protocol.update_path(named(run, "run"), step)
        path = path if first is None else f"{path}?{urlencode({'first': first})}"
        return self._transport.json("GET", path).parsed(UpdateStatus)

    def send_weights_part(
        self,
        run: str,
        state: Mapping[str, Tensor],
        *,
        slices: Mapping[str, Sequence[Box]],
        part: int,
        of: int,
        group: str = "",
        num_updates: int | None = None,
        step: int | None = None,
        created_at: float | None = None,
    ) -> bool:
        """Send a part of the initial weights, like push_part(); True if it was the last part to come.

        created_at: what declare_run() told: RunExists is raised where the run was made anew since, by another trainer.
        """
        query = {"of": of, "group": group or None, "num_updates": num_updates, "step": step, "created_at": created_at}
        name, body = PartName(None, part, group, step or 0), part_body_of(state, slices)
        with told_if_replaced(run) if created_at is not None else contextlib.nullcontext():
            return not is_staged(self._pushes.push_part(named(run, "run"), name, body, query, {}, once=False))

    def wait_for_step(self, run: str, step: int, *, wait: float = protocol.MAX_WAIT) -> RunInfo:
        """The run, once it has reached ``step``. Raises StepNotReached after ``wait`` seconds."""
        return await_step(run, step, partial(self.run, run), wait=wait)

    def shared_state(self, state: State) -> SharedState:
        """A copy of ``state`` in memory that a service on this host can read: a push of the copy sends no bytes.

        Fill its tensors, in place or by ``fill(state)``, and give it to ``push()``; do not change tensors during a
        push. The memory, as much as the tensors take, is freed with the last tensor. Of a cluster each host that is on
        this host reads its slice. Where there is no shared memory, or the service is on another host, the copy is sent
        as any other state (``link`` says which).

        Raises UsageError for a state that cannot be sent.
        """
        require_torch()
        from ema_client.tensors.shared import SharedState

        return SharedState(state)

    def set_decay(self, run: str, decay: float, *, average: str | None = None) -> RunInfo:
        """Change the decay of an average, by default the run's first, from the next update on. Raises InvalidDecay."""
        body = protocol.to_json(RunPatch(checked_decay(decay), average))
        return run_of(run, self._transport.json("PATCH", protocol.run_path(named(run, "run")), body))

    def add_average(
        self, run: str, name: str, schedule: AverageConfig | None = None, *, decay: float | None = None
    ) -> RunInfo:
        """Have every update feed one more average, from the next update on; returns the run as it is then.

        The average begins with the parameters of the next update, bit for bit; its counter, and ``start`` of its
        schedule, count from there. Until then pull() of the average raises AwaitingWeights. The run's very average
        again changes nothing.

        schedule: by a function of ``ema_client.schedules``; None: LitEma's. decay: of a schedule that takes one and
        does not say its own; None: the run's.

        Raises AverageExists where the run has another average of that name, TooManyAverages, Overloaded and
        StorageFailed where the service has no room for it.
        """
        average = average_of(named(name, "average"), schedule, None if decay is None else checked_decay(decay))
        path = protocol.averages_path(named(run, "run"))
        return run_of(run, self._transport.json("POST", path, protocol.to_json(average), patience=WORK_SECONDS))

    def remove_average(self, run: str, name: str) -> None:
        """Remove an average of a run with its weights; snapshots keep theirs.

        Raises AverageNotFound; LastAverage where the run would be left without an average that has weights.
        """
        path = protocol.average_path(named(run, "run"), named(name, "average"))
        self._transport.json("DELETE", path, patience=WORK_SECONDS)

    def reset_num_updates(self, run: str) -> RunInfo:
        """Let the warm-up of the decay begin anew. A run without counter stays without."""
        return run_of(run, self._transport.json("POST", protocol.reset_path(named(run, "run"))))

    # --- an evaluator's calls ---------------------------------------------------------------------------------------

    def pull(
        self,
        run: str,
        *,
        average: str | None = None,
        snapshot: str | None = None,
        soup: Mapping[str, float] | None = None,
        dtype: str | torch.dtype | None = None,
        prefix: str | None = None,
        out: Mapping[str, Tensor] | None = None,
        min_step: int | None = None,
        wait: float | None = None,
        progress: Progress | None = None,
        **wished: Unpack[Wished],
    ) -> Weights:
        """The EMA weights of one version, whole, while updates go on.

        Args:
            run: the run's name.
            average: the average's name; by default the run's first.
            snapshot: the weights of this snapshot instead of the current weights.
            soup: the sum of snapshots, each times its weight, worked out by the service: ``{"best": 0.5, "last":
                0.5}``. The weights sum to 1.
            dtype: ``torch.float16`` or ``"F16"``, cast by the service; by default the shadow's own.
            prefix: only the tensors whose names begin with this.
            out: tensors to fill in place, on any device; exactly the names and shapes of the answer, which is checked
                before a byte is written. Values are cast to the tensors' dtypes. Without ``out``, new tensors on the
                CPU.
            min_step, wait: not before the run has reached this step, waiting up to so many seconds.
            progress: called with (bytes that have come, bytes in all).
            wished: of a run with ``posthoc``, an average of any length instead: ``sigma_rel``, ``decay``, ``half_life``
                or ``window``, with ``at`` and ``max_error``; see ``ema_client.targets.Wished``.

        Raises RunNotFound, SnapshotNotFound, AverageNotFound, AwaitingWeights, StepNotReached, SynthesisRefused;
        UsageError for an ``out`` that does not fit. After ConnectionLost the tensors of ``out`` are part old, part new.
        """
        require_torch()
        from ema_client.tensors.layout import dtype_name

        cast = None if dtype is None else dtype_name(dtype)
        asked = Asked.of(run, average, snapshot, soup, Target.of(wished, called="pull"))
        asked = replace(asked, dtype=cast, prefix=prefix, min_step=min_step)
        return self._pulls.pull(asked, out, wait=wait, progress=progress)

    def pull_slices(
        self,
        run: str,
        wanted: Mapping[str, Wanted],
        *,
        average: str | None = None,
        snapshot: str | None = None,
        min_step: int | None = None,
        **wished: Unpack[Wished],
    ) -> WeightsInfo:
        """Write slices of the EMA weights of one version into tensors, fetching little more than the slices' bytes.

        wanted: by tensor name; see ``ema_client.reading.slices.Wanted``. Everything else as for pull(); a ``min_step``
        is waited for as long as the service holds a request (60 seconds).
        """
        require_torch()
        asked = Asked.of(run, average, snapshot, target=Target.of(wished, called="pull_slices"))
        return self._pulls.pull_slices(replace(asked, min_step=min_step), wanted)

    def copy_to(
        self,
        run: str,
        module: State,
        *,
        average: str | None = None,
        snapshot: str | None = None,
        soup: Mapping[str, float] | None = None,
        prefix: str | None = None,
        memory: Tensor | None = None,
        **wished: Unpack[Wished],
    ) -> WeightsInfo:
        """Write the EMA weights into all parameters of ``module`` that require gradients, once all weights have come.

        module: or a mapping from name to tensor, to be written to. average, snapshot, soup, prefix, wished: as for
        pull().

        Until then the weights lie in memory of the host, of their size: in ``memory``, a uint8 tensor, where that
        is given and large enough, else in new memory. pull() with ``out`` does without. Whatever is raised, nothing
        was written: UsageError unless the parameters are the run's, or what pull() raises.
        """
        require_torch()
        from ema_client.tensors.layout import state_of

        asked = Asked.of(run, average, snapshot, soup, Target.of(wished, called="copy_to"))
        return self._pulls.copy(replace(asked, prefix=prefix), state_of(module), memory)

    def download(
        self,
        run: str,
        path: str | os.PathLike[str] | BinaryIO,
        *,
        average: str | None = None,
        snapshot: str | None = None,
        soup: Mapping[str, float] | None = None,
        dtype: str | None = None,
        prefix: str | None = None,
        resume: bool = False,
        progress: Progress | None = None,
        **wished: Unpack[Wished],
    ) -> WeightsInfo:
        """Save the EMA weights as a safetensors file, without torch and without holding the weights in memory.

        The file appears under its name when the file is whole. A broken transfer goes on where it stopped. Of a link,
        the file that the link names is replaced. Raises UsageError where ``path`` is a folder, pipe or device.

        Args:
            run, average, snapshot, soup, prefix, wished: as for pull().
            path: the file, which replaces an older file of that name; or a stream that is written to, such as
                ``sys.stdout.buffer``, which may have been given a part where an error is raised.
            dtype: as safetensors writes it, such as "F16".
            resume: where the service stays away, or the program is killed, what has come is kept as one hidden file
                beside ``path``, and the next such call goes on with it, as long as the weights are the same.
            progress: called with (bytes that have come, bytes in all).
        """
        asked = Asked.of(run, average, snapshot, soup, Target.of(wished, called="download"))
        asked = replace(asked, dtype=None if dtype is None else checked_dtype(dtype), prefix=prefix)
        if isinstance(path, str | os.PathLike):
            return (save_on if resume else save)(self._transport, asked, Path(path), progress)
        return pour(self._transport, asked, path, progress)

    def snapshot(self, run: str, name: str, *, keep: int | None = None, **wished: Unpack[Wished]) -> SnapshotInfo:
        """Copy the current EMA weights to a snapshot: named, immutable and durable, on the server.

        keep: of the snapshots whose names are the same up to the last "-", let only so many, the newest, stay.
        wished: as for pull(): keep that average, and no other. Such a snapshot is for reading: a run does not go back
        to it.

        Raises SnapshotExists, StorageDisabled; with ``wished`` SynthesisRefused.
        """
        target = Target.of(wished, called="snapshot")
        path = protocol.snapshot_path(named(run, "run"), named(name, "snapshot"))
        path = with_query(path, {"keep": keep, **(target.query if target else {})})
        return self._transport.json("PUT", path, patience=WORK_SECONDS).parsed(SnapshotInfo)

    def profiles(self, run: str, **wished: Unpack[Wished]) -> ProfileInfo:
        """How an average of any length would be worked out of a run's ring, and how exactly, without its weights.

        wished: as for pull(). ``refused`` says why pull() would refuse the average, and what could be had instead.
        Raises SynthesisRefused for an average, or a time, that has no such numbers; UsageError.
        """
        if (target := Target.of(wished, called="profiles")) is None:
            raise UsageError("no average is wished for", hint="give sigma_rel=, decay=, half_life= or window=")
        return self._profiles(run, target)

    def _profiles(self, run: str, target: Target) -> ProfileInfo:
        path = with_query(protocol.profiles_path(named(run, "run")), target.query)
        return self._transport.json("GET", path, patience=WORK_SECONDS).parsed(ProfileInfo)

    def sweep(
        self,
        run: str,
        evaluate: Evaluate,
        *,
        sigma_rel: Sequence[float] | None = None,
        decay: Sequence[float] | None = None,
        half_life: Sequence[float] | None = None,
        at: str | int | None = None,
        max_error: float | None = None,
        dtype: str | None = None,
        highest: bool = False,
        refine: int = 0,
        told: Callable[[SweptPoint], None] | None = None,
        progress: Progress | None = None,
        name: str | None = None,
        report: bool = True,
        unreported: Callable[[EmaError], None] | None = None,
    ) -> Sweep:
        """Evaluate averages of several lengths, of a run with ``posthoc``; ``.best`` is the one with the lowest result.

        Eight averages at a time come from one reading of the run's ring, into files of a temporary folder
        (``$TMPDIR``), without torch and without holding any in memory. The folder goes with the call, also where
        SIGTERM ends the program; what SIGKILL leaves the next sweep on that machine removes.

        Args:
            run: the run's name.
            evaluate: called with the path of a safetensors file, and its WeightsInfo (``.sigma_rel``, ``.target``);
                gives a number, such as a loss, or None where that failed. The file is deleted when it returns.
            sigma_rel, decay, half_life: the lengths, of one of the three; ``ema_client.targets.spread`` makes some.
            at, max_error: as for pull(). Without ``at`` all averages are of the time at which the first ones came; of
                a run that goes on meanwhile, name a snapshot, or a time of the ring.
            dtype: of the files, as safetensors writes it; by default the shadow's own.
            highest: the highest result is the best.
            refine: then so many further averages, each beside the best one so far.
            told: called with each point as it comes.
            progress: called with (bytes that have come, bytes in all), of up to eight averages at a time.
            name: what the results are, such as "FID", for who looks at the run.
            report: tell the service what was found, for the run's page and sweeps(); also where the sweep ends early.
            unreported: called with the reason where the service does not take the results; by default that is logged.

        What the service refuses is among the points, with the reason. Raises what ``evaluate`` raises; RunNotFound,
        UsageError.
        """
        given = {"sigma_rel": sigma_rel, "decay": decay, "half_life": half_life}
        kind, lengths, time = lengths_of(given, at, max_error)
        sweeper = Sweeper(
            transport=self._transport,
            run=named(run, "run"),
            kind=kind,
            evaluate=evaluate,
            profiles=partial(self._profiles, run),
            told=told or (lambda _: None),
            at=time,
            max_error=max_error,
            dtype=dtype,
            highest=highest,
            progress=progress,
            name=checked_label(name),
            unreported=(unreported or partial(log_unreported, run)) if report else None,
        )
        return sweeper.go_through(lengths, refine)

    def sweeps(self, run: str) -> tuple[SweepInfo, ...]:
        """What the newest sweeps over the run's averages found, of those that were reported, the newest last."""
        return self._transport.json("GET", protocol.sweeps_path(named(run, "run"))).parsed(SweepList).sweeps

    def snapshots(self, run: str) -> tuple[SnapshotInfo, ...]:
        """The snapshots of a run."""
        reply = self._transport.json("GET", protocol.snapshots_path(named(run, "run")))
        return reply.parsed(SnapshotList).snapshots

    def watch(
        self, run: str, *, kinds: Collection[EventKind] = VERSIONS, timeout: float | None = None
    ) -> Iterator[RunEvent]:
        """Each new version of a run as it comes, beginning with the present version.

        A loop that takes its time is given the newest version next, not the versions between. Broken connections and
        restarts of the service are waited out (and logged); where no events come through, the client asks again and
        again instead. The iteration ends when the run is deleted. To stop watching, close the iterator, or break out of
        the loop and drop the iterator.

        Args:
            run: the run's name.
            kinds: the kinds of events to be told of: "version", "snapshot_created", and what else RunEvent names.
            timeout: end after so many seconds without an event; by default never.

        Raises RunNotFound at once; in the loop, an error that cannot be waited out, such as Unauthorized or Forbidden.
        """
        self.run(run)
        transport = self._transport

        def reached(step: int, wait: float) -> bool:
            query = {"min_step": step, "wait": wait}
            return transport.head(protocol.weights_path(run), query=query, patience=wait) == 200

        questions = Questions(
            run=run,
            info=lambda: self.run(run),
            snapshots=lambda: self.snapshots(run),
            stream=lambda wait: transport.stream(protocol.events_path(run), accept=CONTENT_TYPE, patience=wait),
            reached=reached,
        )
        return watch(questions, frozenset(kinds), timeout)

    # --- anyone's calls ---------------------------------------------------------------------------------------------

    def server(self) -> ServerInfo:
        """What the service is: version, device, memory and disk beside their limits, and the scopes of the token.

        Without a token, where the service asks for tokens, name and version alone.
        """
        return self._transport.json("GET", protocol.server_path()).parsed(ServerInfo)

    def runs(self) -> tuple[RunInfo, ...]:
        """All runs of the service."""
        return self._transport.json("GET", protocol.runs_path()).parsed(RunList).runs

    def run(self, run: str) -> RunInfo:
        """A run as it stands. Raises RunNotFound."""
        return run_of(run, self._transport.json("GET", protocol.run_path(named(run, "run"))))

    def layout(self, run: str) -> RunLayout:
        """The tensors of a run's updates: names, shapes, dtypes, and which of them are copied. Raises RunNotFound."""
        return self._transport.json("GET", protocol.layout_path(named(run, "run"))).parsed(RunLayout)

    def history(self, run: str, *, since: float | None = None, points: int | None = None) -> History:
        """How a run went: steps, distances between shadow and parameters, rates and times, over time.

        since: only what was measured after that time, in seconds since 1970-01-01 UTC. points: at most so many
        measurements, evenly over time, the newest among them; by default 500. Raises RunNotFound, InvalidRequest.
        """
        path = with_query(protocol.history_path(named(run, "run")), {"since": since, "points": points})
        return self._transport.json("GET", path).parsed(History)

    def distances(self, run: str) -> Distances:
        """How far each tensor's shadow was from its parameters, after the newest update that was measured.

        Raises RunNotFound.
        """
        return self._transport.json("GET", protocol.distances_path(named(run, "run"))).parsed(Distances)

    def timeline(self, run: str, *, since: float | None = None, limit: int | None = None) -> Timeline:
        """What was done to a run: changes of its decay, rewinds, trainers that took over, snapshots, damage.

        since: only what happened after that time, in seconds since 1970-01-01 UTC. limit: at most so many entries, the
        newest; by default 100. Raises RunNotFound, InvalidRequest.
        """
        path = with_query(protocol.timeline_path(named(run, "run")), {"since": since, "limit": limit})
        return self._transport.json("GET", path).parsed(Timeline)

    def delete_snapshot(self, run: str, name: str) -> None:
        """Delete a snapshot. Raises SnapshotNotFound."""
        path = protocol.snapshot_path(named(run, "run"), named(name, "snapshot"))
        info = self._transport.json("GET", path).parsed(SnapshotInfo)
        self._lifecycle.delete(path, info.created_at, SnapshotNotFound)

    def delete_run(self, run: str) -> None:
        """Delete a run with all weights and snapshots. Raises RunNotFound."""
        self._lifecycle.delete(protocol.run_path(named(run, "run")), self.run(run).created_at, RunNotFound)
        self._steps.forget(run)

    # ----------------------------------------------------------------------------------------------------------------

    def _next_step(self, run: str) -> int:
        latest = self._steps.latest(run)
        if latest is None:
            latest = self.run(run).step
        return (latest or 0) + 1


def service_of(url: str | None, token: str | None) -> tuple[str, str | None]:
    """URL and token of a service: those given, else those of the environment, else the default and none."""
    url = url or os.environ.get("EMA_SERVICE_URL") or protocol.DEFAULT_URL
    token = token or os.environ.get("EMA_SERVICE_TOKEN") or None
    # A token read from a file or a variable often ends in a newline.
    return url.strip(), token.strip() if token else None


def _writer_header(writer: int | None) -> dict[str, str]:
    return {} if writer is None else {protocol.HEADER_WRITER: str(writer)}
