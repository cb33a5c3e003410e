"""EmaClient: everything a trainer or an evaluator asks of the service, as Python calls.

Knows: the routes and what their answers mean; the last step it pushed to each run. Does not know: sockets and retries
(transport), how tensors become bytes (tensors). Imports torch only where a call needs it, so that whatever reads or
steers runs does without.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ema_client import protocol
from ema_client.errors import (
    EmaError,
    InvalidDecay,
    ProtocolError,
    RunExists,
    RunNotFound,
    SnapshotNotFound,
    StepNotReached,
    UsageError,
    WeightsExist,
)
from ema_client.http.downloads import Download
from ema_client.http.retry import RetryPolicy
from ema_client.http.transport import Reply, Transport
from ema_client.protocol import (
    AverageConfig,
    DecayPer,
    Durability,
    EventKind,
    NonFinitePolicy,
    Rewind,
    RunConfig,
    RunEvent,
    RunInfo,
    RunList,
    RunPatch,
    SnapshotInfo,
    SnapshotList,
    UpdateResult,
    WeightsInfo,
    Writer,
)
from ema_client.reading.slices import Wanted, fetch
from ema_client.reading.to_file import Progress, save
from ema_client.reading.watching import VERSIONS, watch
from ema_client.reading.weights import Weights, read_header
from ema_client.wire import Box

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ema_client.http.body import Body
    from ema_client.tensors.shared import SharedState

    State = Mapping[str, Tensor] | nn.Module

__all__ = ["EmaClient", "checked_decay"]

T = TypeVar("T")

#: Between two questions for a step that a server answers without waiting, in seconds.
_POLL = 0.05
#: Questions of which is remembered where their weights can be parted.
_MOST_SPLITS = 1000
#: Between two questions for a step that another rank sends.
_WAIT_POLL = 0.02


class EmaClient:
    """One service. Thread-safe; one client serves a process.

    Args:
        url: ``http://host:port``, ``https://host`` or ``unix:///path.sock``; else $EMA_SERVICE_URL, else
            http://127.0.0.1:8470.
        token: bearer token; else $EMA_SERVICE_TOKEN, else none.
        retry: when to try again, by default for about ten seconds.

    Every call raises an EmaError: the service's own, by the class of its code; ServiceUnreachable or ConnectionLost
    once the retries are spent; UsageError for what is wrong before anything is sent.
    """

    def __init__(self, url: str | None = None, *, token: str | None = None, retry: RetryPolicy | None = None) -> None:
        url = url or os.environ.get("EMA_SERVICE_URL") or protocol.DEFAULT_URL
        token = token or os.environ.get("EMA_SERVICE_TOKEN") or None
        # A token read from a file or a variable often ends in a newline.
        self._transport = Transport(url.strip(), token=token.strip() if token else None, retry=retry)
        # For the many programs that end without close(): no socket is left to the garbage collector.
        weakref.finalize(self, self._transport.close)
        self._steps: dict[str, int] = {}
        #: Where large weights can be parted, by what was asked for.
        self._splits: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The service's address."""
        return self._transport.url

    @property
    def retry(self) -> RetryPolicy:
        """When calls try again."""
        return self._transport.retry

    @property
    def same_host(self) -> bool:
        """Whether the service is on this host for sure (a Unix socket, or loopback), so that memory can be shared."""
        return self._transport.same_host

    @property
    def link(self) -> str:
        """How this client's pushes travel: "TCP", "Unix socket" or "shared memory"; and why not by shared memory,
        where the service refused it."""
        return self._transport.link

    def __repr__(self) -> str:
        return f"EmaClient({self.url!r})"

    def __enter__(self) -> EmaClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Calls after it raise UsageError."""
        self._transport.close()

    # --- a trainer's calls ------------------------------------------------------------------------------------------

    def create_run(
        self,
        run: str,
        state: State,
        *,
        decay: float = protocol.DEFAULT_DECAY,
        use_num_updates: bool = True,
        decay_per: DecayPer = "update",
        averages: Sequence[AverageConfig] | None = None,
        non_finite: NonFinitePolicy = "refuse",
        durability: Durability | None = None,
        copied: Collection[str] = (),
        num_updates: int | None = None,
        step: int | None = None,
        exist_ok: bool = False,
    ) -> RunInfo:
        """Create a run with the layout of ``state`` and send its initial weights.

        Args:
            run: its name, of letters, digits, ``.``, ``_`` and ``-``.
            state: a mapping from name to tensor, or a module: then its parameters that require gradients, by their
                canonical names. Read from its memory until the call returns; never copied as a whole.
            decay, use_num_updates: as LitEma's.
            decay_per: "update", or "step" for a trainer that pushes every k-th step.
            averages: several averages of the one run; by default one, named "ema".
            non_finite: whether updates with NaN or Inf are refused or allowed.
            durability: what an answered update outlives: "memory" a clean stop of the server, "process" its sudden end,
                "disk" a power loss. None: "process", or "memory" where the server keeps nothing on disk.
            copied: names of tensors of ``state`` that are not averaged: their newest value is kept, bit for bit, such
                as that of BatchNorm's statistics.
            num_updates, step: to carry on an EMA from elsewhere.
            exist_ok: return the run as it is, and send nothing, if it has its weights already.

        Raises RunExists; StorageDisabled; InvalidDecay; NameCollision and UsageError for a state that cannot be sent.
        """
        _require_torch()
        from ema_client.tensors import body as tensors
        from ema_client.tensors.shared import SharedState

        named = tensors.state_of(state)
        config = RunConfig(
            run=_name(run, "run"),
            layout=tensors.specs_of(named),
            decay=checked_decay(decay),
            use_num_updates=use_num_updates,
            decay_per=decay_per,
            averages=(AverageConfig(),) if averages is None else tuple(averages),
            non_finite=non_finite,
            durability=durability,
            copied=tuple(copied),
        )
        info = _parse(RunInfo, self._transport.json("POST", protocol.runs_path(), protocol.to_json(config)))
        if info.status == "awaiting_weights":
            try:
                query = {"num_updates": num_updates, "step": step}
                body = state.body if isinstance(state, SharedState) else tensors.encode(named)
                reply = self._transport.upload(protocol.weights_path(run), body, query=query)
                return self._seen(_parse(RunInfo, reply))
            except WeightsExist:
                # Another trainer sent its own between our two requests.
                info = self.run(run)
        if not exist_ok:
            raise RunExists(f"run {run!r} exists already and is at step {info.step}")
        return self._seen(info)

    def push(self, run: str, state: State, *, step: int | None = None, writer: int | None = None) -> UpdateResult:
        """Send the parameters as of one trainer step; the service applies them once, all or nothing.

        Args:
            run: a run that has its initial weights.
            state: as for create_run(); exactly the tensors of the run. Read from its memory until the call returns.
            step: the trainer's step, growing from push to push; by default the one after the last.
            writer: what attach() gave; needed once a trainer has attached to the run.

        Raises LayoutMismatch, NonFinite, StaleStep, StepConflict, Fenced, AwaitingWeights, RunNotFound.
        """
        _require_torch()
        from ema_client.tensors import body as tensors
        from ema_client.tensors.shared import SharedState

        body = state.body if isinstance(state, SharedState) else tensors.encode(tensors.state_of(state))
        step = self._next_step(run) if step is None else step
        return self._push(run, body, step, partial(self._transport.upload, headers=_writer_header(writer)))

    def push_once(self, run: str, body: Body, *, step: int, writer: int | None = None) -> UpdateResult:
        """push(), tried once, of a body that is made already: for a sender that has its own way of trying again."""
        return self._push(run, body, step, partial(self._transport.upload_once, headers=_writer_header(writer)))

    def _push(self, run: str, body: Body, step: int, upload: Callable[[str, Body], Reply]) -> UpdateResult:
        if not 0 <= step <= protocol.MAX_STEP:
            raise UsageError(f"step {step} is not between 0 and {protocol.MAX_STEP}")
        try:
            reply = upload(protocol.update_path(_name(run, "run"), step), body)
        except EmaError:
            # Whether it was applied, and what others have pushed, the service knows better than we do.
            self._forget(run)
            raise
        result = _parse(UpdateResult, reply)
        self._remember(run, result.step)
        return result

    def attach(self, run: str) -> int:
        """A number for this trainer, to be given to push(): from now on the pushes of trainers before it are refused.

        So a trainer that was replaced, and does not know, cannot push. Raises RunNotFound.
        """
        return _parse(Writer, self._transport.json("POST", protocol.writers_path(_name(run, "run")))).writer

    def rewind(self, run: str, snapshot: str | None) -> RunInfo:
        """Go back to a snapshot: its weights, step, counter and decays, in a new epoch.

        Steps after the snapshot's can be pushed again. Attach before it: a trainer that still runs could push in
        between. None: let a run that is ``degraded`` go on with the version that is there.

        Raises SnapshotNotFound, SnapshotDamaged, StorageDisabled.
        """
        self._forget(run)
        body = protocol.to_json(Rewind(None if snapshot is None else _name(snapshot, "snapshot")))
        return self._seen(_parse(RunInfo, self._transport.json("POST", protocol.rewind_path(_name(run, "run")), body)))

    def declare_run(self, config: RunConfig, *, exist_ok: bool = False) -> RunInfo:
        """Create a run whose initial weights come later, in parts: see send_weights_part().

        exist_ok: return the run as it is if it has its weights already. Raises RunExists.
        """
        info = _parse(RunInfo, self._transport.json("POST", protocol.runs_path(), protocol.to_json(config)))
        if info.status != "awaiting_weights" and not exist_ok:
            raise RunExists(f"run {config.run!r} exists already and is at step {info.step}")
        return self._seen(info)

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
        """Send one of ``of`` parts of an update, as a rank of a sharded trainer does; True if it was the last one.

        Args:
            run: a run that has its initial weights.
            state: what this rank holds: whole tensors, or slices of them. Read from its memory until the call returns.
            slices: for each tensor that is not whole, the slices that lie in it back to back (row-major; flat where
                there are several): each a ``(start, stop)`` for every dimension of the run's tensor.
            step: the trainer's step; all ranks must give the same.
            part, of: this part's number, from 0, and how many there are.
            group: a string that is the same on all ranks, and another one at each start of the trainer: parts of two
                starts are never put together.
            writer: as for push(), the same for all parts.

        The update is applied when all parts are there, as one; until then, and if one never comes, the EMA stays as it
        is. Raises as push() does, LayoutMismatch also where parts overlap or leave a gap.
        """
        path = protocol.part_path(_name(run, "run"), step, part)
        query, headers = {"of": of, "group": group or None}, _writer_header(writer)
        reply = self._transport.upload(path, _part_body(state, slices), query=query, headers=headers)
        return reply.data.get("state") != "staged"

    def push_part_once(
        self, run: str, body: Body, *, step: int, part: int, of: int, group: str = "", writer: int | None = None
    ) -> bool:
        """push_part(), tried once, of a body that is made already: for a sender that tries again in its own way."""
        path = protocol.part_path(_name(run, "run"), step, part)
        query, headers = {"of": of, "group": group or None}, _writer_header(writer)
        reply = self._transport.upload_once(path, body, query=query, headers=headers)
        return reply.data.get("state") != "staged"

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
    ) -> bool:
        """Send one of ``of`` parts of the initial weights; True if it was the last one. As push_part()."""
        path = protocol.part_path(_name(run, "run"), None, part)
        query = {"of": of, "group": group or None, "num_updates": num_updates, "step": step}
        reply = self._transport.upload(path, _part_body(state, slices), query=query)
        return reply.data.get("state") != "staged"

    def wait_for_step(self, run: str, step: int, *, wait: float = protocol.MAX_WAIT) -> RunInfo:
        """Return once the run has reached ``step``. Raises StepNotReached after ``wait`` seconds."""
        deadline = time.monotonic() + wait
        while True:
            try:
                info = self.run(run)
                reached = info.step
            except RunNotFound:
                # Another rank is about to create it.
                if time.monotonic() > deadline:
                    raise
                reached = None
            if reached is not None and reached >= step:
                return info
            if time.monotonic() > deadline:
                raise StepNotReached(
                    f"run {run!r} is at step {reached}, not at {step}, after {wait:g} seconds",
                    hint="a part of the update is missing or was refused: see the other ranks' messages",
                )
            time.sleep(_WAIT_POLL)

    def shared_state(self, state: State) -> SharedState:
        """A copy of ``state`` in memory that a service on this host can read: pushed from there, it is not sent.

        Fill its tensors, in place or by ``fill(state)``, and ``push()`` it; do not change them meanwhile. Its memory,
        as much as the tensors take, is freed with the last of them. Where there is no shared memory, or the service is
        elsewhere, it is pushed as any other state (``link`` says which).

        Raises UsageError for a state that cannot be sent.
        """
        _require_torch()
        from ema_client.tensors.shared import SharedState

        return SharedState(state)

    def set_decay(self, run: str, decay: float, *, average: str | None = None) -> RunInfo:
        """Change the decay from the next update on, of one average or of the run's first. Raises InvalidDecay."""
        body = protocol.to_json(RunPatch(checked_decay(decay), average))
        return _parse(RunInfo, self._transport.json("PATCH", protocol.run_path(_name(run, "run")), body))

    def reset_num_updates(self, run: str) -> RunInfo:
        """Let the warm-up begin anew. A run without counter stays without."""
        return _parse(RunInfo, self._transport.json("POST", protocol.reset_path(_name(run, "run"))))

    # --- an evaluator's calls ---------------------------------------------------------------------------------------

    def pull(
        self,
        run: str,
        *,
        average: str | None = None,
        snapshot: str | None = None,
        dtype: str | torch.dtype | None = None,
        prefix: str | None = None,
        out: Mapping[str, Tensor] | None = None,
        min_step: int | None = None,
        wait: float | None = None,
    ) -> Weights:
        """The EMA weights of one version, whole, while updates go on.

        Args:
            run: the run's name.
            average: one of the run's averages; by default its first.
            snapshot: the weights of this snapshot instead of the current ones.
            dtype: ``torch.float16`` or ``"F16"``, cast by the service; by default the shadow's own.
            prefix: only the tensors whose names begin with it.
            out: tensors to fill in place, on any device; exactly the names and shapes of the answer, which is checked
                before a byte is written. Values are cast to their dtypes. Without it, new tensors on the CPU.
            min_step, wait: not before the run has reached this step, waiting up to so many seconds.

        Raises RunNotFound, SnapshotNotFound, AverageNotFound, AwaitingWeights, StepNotReached; UsageError for an
        ``out`` that does not fit. After ConnectionLost the tensors of ``out`` are part old, part new.
        """
        _require_torch()
        from ema_client.tensors.body import dtype_name

        path = _weights_path(run, snapshot)
        query = {
            "average": average,
            "dtype": None if dtype is None else dtype_name(dtype),
            "prefix": prefix,
            "min_step": min_step,
        }
        if min_step is None or wait is None:
            return self._pull(path, query, out)
        return self._pull_waiting(path, query, out, wait)

    def pull_slices(
        self,
        run: str,
        wanted: Mapping[str, Wanted],
        *,
        average: str | None = None,
        snapshot: str | None = None,
        min_step: int | None = None,
    ) -> WeightsInfo:
        """Write slices of the EMA weights into tensors, fetching little more than their bytes; all of one version.

        wanted: by name; see ``ema_client.reading.slices.Wanted``. The others as for pull(); a ``min_step`` is waited
        for as long as one request may (60 seconds).
        """
        _require_torch()
        path, wait = _weights_path(run, snapshot), protocol.MAX_WAIT
        query: dict[str, str | int | float | None] = {"average": average}
        waiting = {"min_step": min_step, "wait": wait} if min_step is not None else {}

        def open_range(start: int, stop: int | None, etag: str | None) -> Download:
            # Only the first request waits: the others are of its version.
            asked, patience = (query, 0.0) if etag else ({**query, **waiting}, wait)
            return self._transport.download(path, query=asked, start=start, stop=stop, etag=etag, patience=patience)

        return self._transport.retrying(lambda _: fetch(open_range, wanted))

    def copy_to(
        self, run: str, module: nn.Module, *, average: str | None = None, snapshot: str | None = None
    ) -> WeightsInfo:
        """Write the EMA weights into ``module``'s own parameters, those that require gradients.

        Raises UsageError, before anything is written, unless they are those of the run. After ConnectionLost the
        parameters are part old, part new.
        """
        _require_torch()
        from ema_client.tensors.body import parameters_of

        return self.pull(run, average=average, snapshot=snapshot, out=parameters_of(module)).info

    def download(
        self,
        run: str,
        path: str | os.PathLike[str],
        *,
        average: str | None = None,
        snapshot: str | None = None,
        progress: Progress | None = None,
    ) -> WeightsInfo:
        """Save the EMA weights as a safetensors file, without torch and without holding them in memory.

        The file appears under its name when it is whole. A broken transfer goes on where it stopped.

        Args:
            run, average, snapshot: as for pull().
            path: the file; one that is there is replaced.
            progress: called with (bytes that have come, bytes in all).
        """
        return save(self._transport, _weights_path(run, snapshot), {"average": average}, Path(path), progress)

    def snapshot(self, run: str, name: str, *, keep: int | None = None) -> SnapshotInfo:
        """Keep the current EMA weights under a name, on the server, durably.

        keep: of the snapshots whose names are the same up to the last "-", let only so many, the newest, stay.
        Raises SnapshotExists, StorageDisabled.
        """
        path = protocol.snapshot_path(_name(run, "run"), _name(name, "snapshot"))
        return _parse(SnapshotInfo, self._transport.json("PUT", path if keep is None else f"{path}?keep={keep}"))

    def snapshots(self, run: str) -> tuple[SnapshotInfo, ...]:
        """The snapshots of a run."""
        reply = self._transport.json("GET", protocol.snapshots_path(_name(run, "run")))
        return _parse(SnapshotList, reply).snapshots

    def watch(
        self, run: str, *, kinds: Collection[EventKind] = VERSIONS, timeout: float | None = None
    ) -> Iterator[RunEvent]:
        """Each new version of a run as it comes, beginning with the present one.

        A loop that takes its time is given the newest version next, not those between. Broken connections and restarts
        of the service are waited out (and logged); where events do not come through, it asks again and again instead.
        The iteration ends when the run is deleted. Close it, or break out of the loop and drop it, to stop watching.

        Args:
            run: the run's name.
            kinds: what to be told of: "version", "snapshot_created", and what else RunEvent names.
            timeout: end after so many seconds without an event; by default never.

        Raises RunNotFound at once; in the loop what cannot be waited out, as Unauthorized or Forbidden.
        """
        self.run(run)
        return watch(self._transport, self, run, frozenset(kinds), timeout)

    # --- anyone's calls ---------------------------------------------------------------------------------------------

    def runs(self) -> tuple[RunInfo, ...]:
        """All runs of the service."""
        return _parse(RunList, self._transport.json("GET", protocol.runs_path())).runs

    def run(self, run: str) -> RunInfo:
        """One run as it stands. Raises RunNotFound."""
        return _parse(RunInfo, self._transport.json("GET", protocol.run_path(_name(run, "run"))))

    def delete_snapshot(self, run: str, name: str) -> None:
        """Delete a snapshot. Raises SnapshotNotFound."""
        path = protocol.snapshot_path(_name(run, "run"), _name(name, "snapshot"))
        self._delete(path, SnapshotNotFound)

    def delete_run(self, run: str) -> None:
        """Delete a run, its weights and its snapshots. Raises RunNotFound."""
        self._delete(protocol.run_path(_name(run, "run")), RunNotFound)
        self._forget(run)

    # ----------------------------------------------------------------------------------------------------------------

    def _pull(
        self,
        path: str,
        query: Mapping[str, str | int | float | None],
        out: Mapping[str, Tensor] | None,
        patience: float = 0.0,
    ) -> Weights:
        from ema_client.reading.halves import pull_halves, split_of
        from ema_client.tensors.body import receive

        what = {key: value for key, value in query.items() if key not in ("min_step", "wait")}
        place = f"{path} {what}"

        def open_range(start: int, stop: int | None, etag: str | None) -> Download:
            # Only the first request waits: the other is of its version.
            asked, seconds = (what, 0.0) if etag else (query, patience)
            return self._transport.download(path, query=asked, start=start, stop=stop, etag=etag, patience=seconds)

        def attempt(_: int) -> Weights:
            split = self._splits.get(place, 0)
            halves = pull_halves(open_range, split, out) if split else None
            if halves is not None:
                return halves
            with self._transport.download(path, query=query, patience=patience) as download:
                header, info = read_header(download)
                self._remember_split(place, split_of(header, download.length))
                return Weights(receive(header.entries, download.readinto, out), info)

        return self._transport.retrying(attempt)

    def _remember_split(self, place: str, split: int) -> None:
        if len(self._splits) >= _MOST_SPLITS:
            self._splits.clear()
        self._splits[place] = split

    def _pull_waiting(
        self, path: str, query: Mapping[str, str | int | None], out: Mapping[str, Tensor] | None, wait: float
    ) -> Weights:
        # The service holds a request for MAX_WAIT at most; a longer wait is several requests.
        deadline = time.monotonic() + wait
        while True:
            now = max(0.0, min(deadline - time.monotonic(), protocol.MAX_WAIT))
            try:
                return self._pull(path, {**query, "wait": now}, out, patience=now)
            except StepNotReached:
                if time.monotonic() + _POLL >= deadline:
                    raise
            time.sleep(_POLL)

    def _delete(self, path: str, gone: type[Exception]) -> None:
        def attempt(number: int) -> None:
            try:
                self._transport.json_once("DELETE", path)
            except gone:
                # At a second try: the first one did it, and its answer was lost.
                if number == 0:
                    raise

        self._transport.retrying(attempt)

    def _next_step(self, run: str) -> int:
        with self._lock:
            last = self._steps.get(run)
        if last is None:
            last = self.run(run).step
        return (last or 0) + 1

    def _seen(self, info: RunInfo) -> RunInfo:
        if info.step is None:
            self._forget(info.run)
        else:
            self._remember(info.run, info.step)
        return info

    def _remember(self, run: str, step: int) -> None:
        with self._lock:
            self._steps[run] = step

    def _forget(self, run: str) -> None:
        with self._lock:
            self._steps.pop(run, None)


def _writer_header(writer: int | None) -> dict[str, str]:
    return {} if writer is None else {protocol.HEADER_WRITER: str(writer)}


def _require_torch() -> None:
    if find_spec("torch") is None:
        raise UsageError("this call handles tensors and torch is not installed", hint="pip install 'ema-client[torch]'")


def _part_body(state: Mapping[str, Tensor], slices: Mapping[str, Sequence[Box]]) -> Body:
    _require_torch()
    from ema_client.tensors import body as tensors

    # A rank that has no element sends an empty part all the same.
    return tensors.encode(tensors.state_of(state) if state else {}, slices)


def _weights_path(run: str, snapshot: str | None) -> str:
    if snapshot is None:
        return protocol.weights_path(_name(run, "run"))
    return protocol.snapshot_weights_path(_name(run, "run"), _name(snapshot, "snapshot"))


def _name(value: str, what: str) -> str:
    if not protocol.is_name(value):
        raise UsageError(
            f"{value!r} cannot name a {what}",
            hint="up to 128 letters, digits, dots, dashes and underscores, beginning with a letter or a digit",
        )
    return value


def checked_decay(decay: float) -> float:
    """``decay`` as a float. Raises InvalidDecay unless it lies in [0, 1]."""
    # Written so that NaN fails.
    if not 0.0 <= decay <= 1.0:
        raise InvalidDecay(f"decay must be between 0 and 1, not {decay}")
    return float(decay)


def _parse(cls: type[T], reply: Reply) -> T:
    try:
        return protocol.from_json(cls, reply.data)
    except ValueError as fault:
        raise ProtocolError(f"{reply.url} answered without something that is needed: {fault}") from None
