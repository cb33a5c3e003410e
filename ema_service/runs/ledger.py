"""The ledger: decides for one run, and holds none of the run's bytes.

``Ledger`` decides whether: whether a trainer may push, whether a step is stale, repeated or in conflict, whether a run
may go back. ``Succession`` decides what follows: the gap, the decays and the counter of the next version.

No torch, no files, no memory, no clock and no lock: the holder of the run's lock asks, and what a method needs of the
world is an argument. A question raises or returns a value, and changes nothing; a decision takes effect by commit(),
attach(), restore(), recover() or retire().

Knows steps, writers, versions and schedules. Does not know where shadows lie or how versions are kept.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from ema_client.errors import (
    AverageExists,
    AverageNotFound,
    AwaitingWeights,
    Fenced,
    InvalidRequest,
    LastAverage,
    Overloaded,
    RunDegraded,
    RunNotFound,
    StaleStep,
    StepConflict,
    Superseded,
    TooManyAverages,
    WeightsExist,
)
from ema_client.protocol import (
    MAX_AVERAGES,
    MAX_STEP,
    SCHEDULE_FIELDS,
    AverageConfig,
    RunConfig,
    SnapshotInfo,
    UpdateStatus,
)
from ema_service.averaging.schedules import COPY, Retention
from ema_service.runs.schedules import counts, largest_decay, schedule_of
from ema_service.shadows.state import Average, Descent, Member, Plan, Setup, Version

__all__ = ["Ledger", "Succession", "writer_in"]

#: How many applied steps a run remembers, for ``GET updates/{step}``.
_REMEMBERED_STEPS = 1024
#: How many trainers that attached a run tells apart by their keys.
_REMEMBERED_WRITERS = 64
#: Seconds after which to ask for a run again that is being mended.
_MENDING_SECONDS = 0.5


class Succession:
    """Which version follows which, by what the run is set up to be alone. Every method is pure.

    now: seconds since 1970, wherever a method takes it.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self._config = setup.config

    @property
    def counter_at_start(self) -> int:
        """LitEma's counter before any update: 0, or -1 where the run does not count."""
        return 0 if self._config.use_num_updates else -1

    def averages(self, version: Version | None) -> tuple[Average, ...]:
        """Every average that the run is to have, as it is in ``version``; one without weights as it will begin."""
        known, members = version.averages if version else (), self.setup.members
        if len(known) == len(members) and all(a.member is member for a, member in zip(known, members, strict=True)):
            return known  # as in nearly every version
        return tuple((version and version.find(member)) or self._began(member, 0) for member in members)

    def member(self, average: str | None) -> Member:
        """The average of this name; None names the first. Raises AverageNotFound."""
        found = self.setup.members[0] if average is None else self.setup.find(average)
        if found is None:
            names = ", ".join(member.name for member in self.setup.members)
            raise AverageNotFound(f"run {self._config.run!r} has no average {average!r}; it has {names}")
        return found

    def awaiting(self, member: Member) -> AwaitingWeights:
        """The error for whoever wants the weights of an average that was added, or lost by a rewind, before it begins
        with the next update."""
        return AwaitingWeights(
            f"average {member.name!r} of run {self._config.run!r} has no weights before the next update",
            hint="it begins with the parameters of the next update: push one, or wait for one (min_step, wait)",
        )

    def first(self, lineage: str, digest: bytes, now: float, *, num_updates: int | None, step: int | None) -> Version:
        """The version that initial weights make.

        num_updates: the counter of an EMA that began elsewhere. Raises InvalidRequest where the run does not count.
        """
        if num_updates is not None and not self._config.use_num_updates:
            raise InvalidRequest(f"num_updates: {num_updates} was given, but use_num_updates is off in this run")
        averages = tuple(self._began(member, num_updates or 0) for member in self.setup.members)
        counter = self.counter_at_start if num_updates is None else num_updates
        return Version(lineage, 1, 0, step, counter, digest, averages, now, descent=Descent(num_updates or 0))

    def plan(self, step: int, base: Version) -> Plan:
        """What an admitted update of ``step`` is to make of ``base``: its decays and its counter, exact over the gap of
        steps.

        An average that the base does not have begins with the update's parameters, whatever its schedule.
        """
        if step == base.step:
            # Only the same update again can be meant, and its digest tells: nothing is averaged.
            return Plan(base, step, 0, (), ())
        gap = 1 if self._config.decay_per == "update" or base.step is None else step - base.step
        averages = self.averages(base)
        return Plan(base, step, gap, averages, tuple(self._retention(base, each, gap) for each in averages))

    def _retention(self, base: Version, average: Average, gap: int) -> Retention:
        if base.find(average.member) is None:
            return COPY
        schedule = schedule_of(self._config, average.member.config, average.decay)
        return schedule.retention(average.num_updates, gap)

    def following(self, plan: Plan, digest: bytes, now: float) -> Version:
        """The version that a planned update makes. digest: of the update's parameters."""
        averages = tuple(
            # The parameters that an average begins with are no update of it, as initial weights are none.
            average
            if plan.base.find(average.member) is None
            else replace(average, effective_decay=retention.decay, num_updates=_counted(average.num_updates, plan.gap))
            for average, retention in zip(plan.averages, plan.retentions, strict=True)
        )
        return replace(
            plan.base,
            n=plan.base.n + 1,
            step=plan.step,
            num_updates=_counted(plan.base.num_updates, plan.gap),
            digest=digest,
            averages=averages,
            updated_at=now,
        )

    def with_decay(self, version: Version, decay: float, average: str | None) -> Version:
        """The version with another decay of one average, the first by default.

        Raises InvalidRequest, AverageNotFound; AwaitingWeights where the average has no weights yet.
        """
        if not 0.0 <= decay <= 1.0:
            raise InvalidRequest(f"decay: {decay} is not between 0 and 1")
        chosen = self.member(average)
        if "decay" not in SCHEDULE_FIELDS[chosen.config.schedule]:
            raise InvalidRequest(
                f"average {chosen.name!r} of run {self._config.run!r} has schedule {chosen.config.schedule!r}, which "
                "takes no decay: add an average whose schedule takes one"
            )
        if version.find(chosen) is None:
            raise self.awaiting(chosen)
        averages = (replace(a, decay=decay) if chosen.is_same(a.member) else a for a in version.averages)
        return replace(version, averages=tuple(averages))

    def with_counter_reset(self, version: Version) -> Version:
        """The version with its counter at the beginning of the warm-up.

        A counter that is off stays off (LitEma switches it on). An average whose schedule begins with a copy copies the
        next update.
        """
        averages = tuple(replace(each, num_updates=min(each.num_updates, 0)) for each in version.averages)
        descent = Descent(first=version.n)
        return replace(version, num_updates=self.counter_at_start, averages=averages, descent=descent)

    def with_average(self, average: AverageConfig, lineage: str, key: str | None) -> Setup | None:
        """The setup with one more average, the last; None where the run has this very average.

        Raises AverageExists where an average of that name has another configuration, TooManyAverages.
        """
        run, found = self._config.run, self.setup.find(average.name)
        if found and found.config == average:
            return None
        if found:
            raise AverageExists(f"average {average.name!r} of run {run!r} exists with another configuration")
        if len(self.setup.members) >= MAX_AVERAGES:
            raise TooManyAverages(f"run {run!r} has {MAX_AVERAGES} averages, and may have no more")
        return self.setup.with_one_more(average, lineage, key)

    def without_average(self, version: Version | None, name: str, key: str | None) -> Setup:
        """The setup without one of its averages.

        version: the run's current one. Raises AverageNotFound; InvalidRequest for an average of the run's ring;
        LastAverage where the run would be left without an average, or without one that has weights.
        """
        run, gone = self._config.run, self.member(name)
        if self._config.posthoc and gone.config in self._config.posthoc.averages:
            raise InvalidRequest(f"average {name!r} of run {run!r} is one that its ring is made of, and stays with it")
        rest = tuple(member for member in self.setup.members if member != gone)
        if not rest:
            raise LastAverage(f"{name!r} is the only average of run {run!r}")
        if version and not any(version.find(member) for member in rest):
            names = ", ".join(member.name for member in rest)
            raise LastAverage(
                f"{name!r} is the only average of run {run!r} that has weights: {names} begins with the next update",
                hint="push an update first",
            )
        return self.setup.followed_by(rest, key)

    def _began(self, member: Member, num_updates: int) -> Average:
        """An average that begins with this counter."""
        counter = num_updates if counts(self._config, member.config) else -1
        return Average(member, largest_decay(self._config, member.config), None, counter)


class Ledger:
    """The decisions of one run.

    version: the current one, None before the initial weights. writer: the number of the trainer that attached last, 0
    before any did. fault: why the run takes no updates (its latest stored version was damaged), None if all is well.
    ended_at: when that trainer said that its training is over.
    retired: whether the run is gone: deleted or, where ``replaced`` is true as well, in favour of another of its name.

    More than twenty methods: of each thing that may become of a run, whether it may, and what takes effect.

    admit() is called without the run's lock too, before a body is read; so each method reads ``version`` once.
    """

    def __init__(self, config: RunConfig, *, writer: int = 0, setup: Setup | None = None) -> None:
        """config: of the run as it was created. setup: the averages of a run that others were added to, or removed
        from; None: those of ``config``."""
        self.succession = Succession(setup or Setup.of(config))
        self.version: Version | None = None
        self.writer = writer
        self.ended_at: float | None = None
        self.fault: str | None = None
        self._is_mending: Callable[[], bool] = lambda: False
        self.retired = False
        self.replaced = False
        self._run = config.run
        #: The largest epoch that someone may have read a version of, although its files are damaged.
        self._last_epoch = 0
        self._steps: deque[int] = deque(maxlen=_REMEMBERED_STEPS)
        #: key -> the writer's number that attaching with the key gave.
        self._given: dict[str, int] = {}

    @property
    def setup(self) -> Setup:
        """Which averages the run is to have."""
        return self.succession.setup

    # --- whether the run can be read and written --------------------------------------------------------------------

    def check_writable(self) -> None:
        """Raises RunNotFound once the run is deleted, RunDegraded where it takes no updates; in its place Overloaded,
        while nobody has to do anything about that."""
        self.check_exists()
        if self.fault and self._is_mending():
            raise Overloaded(
                f"run {self._run!r}: {self.fault}",
                hint="ask again: the hosts go on with what they have by themselves",
                retry_after=_MENDING_SECONDS,
            )
        if self.fault:
            readable = f"version {self.version} can be read; " if self.version else ""
            raise RunDegraded(f"run {self._run!r}: {self.fault}", hint=f"{readable}{RunDegraded.default_hint}")

    def readable(self) -> Version:
        """The current version. Raises AwaitingWeights; RunDegraded where no version is left; RunNotFound once
        deleted."""
        self.check_exists()
        version = self.version
        if version is None:
            self.check_writable()
            raise AwaitingWeights(f"run {self._run!r} was created but its initial weights never came")
        return version

    def writable(self) -> Version:
        """The current version, where a next may follow. Raises as readable(), and RunDegraded."""
        self.check_writable()
        return self.readable()

    # --- whether an update counts -----------------------------------------------------------------------------------

    def admit(self, step: int, writer: int | None = None) -> None:
        """Refuse an update that cannot be applied, before its body is read.

        writer: the number of the trainer that sends the update, None where that trainer did not attach. Raises Fenced,
        AwaitingWeights, RunDegraded, StaleStep, RunNotFound.
        """
        version = self.writable()
        self._check_writer(writer)
        if version.step is not None and (step < version.step or (step == version.step and version.n == 0)):
            origin = "its latest update" if version.n else "its initial weights"
            raise StaleStep(f"step {step} is not after step {version.step} of {origin} (run {self._run!r})")

    def judge(self, plan: Plan, digest: bytes, writer: int | None = None) -> bool:
        """Whether a planned update, prepared by now, is to be applied; False where it was applied before.

        digest: of the update's parameters. Raises as admit(); StepConflict where the step was applied with other
        parameters; Superseded where the run changed since the plan was made.
        """
        self.admit(plan.step, writer)
        version = self.readable()
        if plan.step == version.step:
            if digest != version.digest:
                raise StepConflict(f"step {plan.step} of run {self._run!r} was applied with other bytes")
            return False
        self.check_planned(plan)
        return True

    def check_planned(self, plan: Plan) -> None:
        """Raises Superseded where the run changed since the plan was made, other than by the planned step itself."""
        version = self.readable()
        if version is not plan.base and version.step != plan.step:
            raise Superseded(f"run {self._run!r} changed while step {plan.step} was received", retry_after=0.0)

    def judge_first(self, digest: bytes) -> bool:
        """Whether initial weights are to be taken; False where the same were taken before.

        Raises WeightsExist, RunDegraded, RunNotFound.
        """
        self.check_writable()
        version = self.version
        if version and (version.n or version.digest != digest):
            raise WeightsExist(f"run {self._run!r} is at version {version}")
        return version is None

    def admit_anew(self, writer: int | None = None) -> Version:
        """The version whose initial weights may be given anew, before the weights' body is read.

        writer: as for admit(). Raises as admit(); WeightsExist once an update was applied, or the run went back to a
        snapshot.
        """
        version = self.writable()
        self._check_writer(writer)
        if version.n or not version.digest:
            raise WeightsExist(f"run {self._run!r} is at version {version}, which initial weights did not make")
        return version

    def anew(self, base: Version, lineage: str, digest: bytes, now: float) -> Version:
        """The version that other initial weights make in place of ``base``, in a new epoch: counter, step and decays
        stay."""
        epoch = max(self._last_epoch, base.epoch) + 1
        descent = Descent(base.descent.counter)
        return replace(base, lineage=lineage, epoch=epoch, digest=digest, updated_at=now, descent=descent)

    def judge_anew(self, base: Version, replaces: str, digest: bytes | None, writer: int | None = None) -> bool:
        """Whether initial weights given anew are to be taken; False where the run has the same.

        base: what admit_anew() returned. replaces: the version that the sender means. digest: None of a shard's slice,
        for those of other shards may be others although this one is the same. Raises as admit_anew();
        WeightsExist where the run is at another version; Superseded where the run changed since ``base``.
        """
        version = self.admit_anew(writer)
        if version.digest == digest:
            return False
        if str(version) != replaces:
            raise WeightsExist(f"run {self._run!r} is at version {version}, not {replaces}")
        if version is not base:
            raise Superseded(f"run {self._run!r} changed while its initial weights were received", retry_after=0.0)
        return True

    def status_of(self, step: int) -> UpdateStatus:
        """Whether ``step`` was applied, as far as the run remembers its latest steps; the digest of the latest."""
        version = self.version
        digest = version.digest.hex() if version and version.n and version.step == step else ""
        return UpdateStatus(step, "applied" if step in tuple(self._steps) else "unknown", digest=digest or None)

    # --- going back, going on, another trainer ----------------------------------------------------------------------

    def rewound(
        self,
        info: SnapshotInfo,
        averages: Iterable[Average],
        descent: Descent,
        lineage: str,
        now: float,
        after: int = 0,
    ) -> Version:
        """The version at a snapshot, in a new epoch: updates after the snapshot are as if they had never been.

        averages, info: of the snapshot. descent: of the version that follows the snapshot. lineage: for a run that has
        no version. after: an epoch that the new one comes after. A rewind is also a way out of ``degraded``, so nothing
        is asked for.
        """
        version = self.version
        epoch = max(self._last_epoch, version.epoch if version else 0, after) + 1
        lineage = version.lineage if version else lineage
        keys = version.keys if version else ()
        return Version(lineage, epoch, 0, info.step, info.num_updates, b"", tuple(averages), now, keys, descent)

    def judge_rewind(self, to: Version) -> None:
        """Whether a rewind to the version ``to`` may take effect.

        Raises RunNotFound; Superseded where someone else rewound the run, or removed one of the averages, since ``to``
        was decided on.
        """
        self.check_exists()
        if any(average.member not in self.setup.members for average in to.averages):
            raise Superseded(f"an average of run {self._run!r} was removed meanwhile", retry_after=0.0)
        if self.version and self.version.epoch >= to.epoch:
            raise Superseded(f"run {self._run!r} was rewound by someone else meanwhile", retry_after=0.0)

    def acceptable(self) -> Version:
        """The version that a degraded run may go on with, although later updates are gone.

        Raises InvalidRequest where the run is not degraded, RunDegraded where there is no version.
        """
        if self.fault is None:
            raise InvalidRequest(f"run {self._run!r} is not degraded: name the snapshot to go back to")
        return self.readable()

    def next_writer(self, key: str | None = None) -> int:
        """The number for a trainer that takes over the run: for a key that it was given for already, the same number.

        Raises RunNotFound.
        """
        self.check_exists()
        return self._given.get(key or "", self.writer + 1)

    # --- what becomes of the run ------------------------------------------------------------------------------------

    def outcome(self, to: Version | None = None, writer: int | None = None) -> str:
        """What a write makes of the run, as text: the same on every shard of a run that lies on several hosts, or the
        shards have come apart.

        to: the version that the write makes, writer: the number of a trainer that attaches; None where the write leaves
        that as it is. Left out is what each host has its own of: the clock's time, and the digest of its slice.
        """
        following = to or self.version
        facts = {
            "base": _facts(self.version) if self.version else None,
            "next": _facts(following) if following else None,
            "writer": self.writer if writer is None else writer,
        }
        return json.dumps(facts, sort_keys=True)

    def gone_back(self, version: Version | None, newest: str, word: str = "") -> tuple[Version | None, str]:
        """The version in a new epoch that all shards go back to, after one of them lost what came after, and the
        outcome.

        version: of a checkpoint that all have, the same but for each host's own facts; None where there is none, and
        the run has no weights then. newest: the outcome that led to the newest revision which any shard knows, empty
        where none does. word: the key of the operator's call that asked for it, empty where nobody did.
        """
        known = _known(newest)
        to = version
        if version:
            descent = version.descent.followed(version.epoch, version.n, version.n)
            to = replace(version, epoch=max(known["epoch"], version.epoch) + 1, descent=descent).keyed(word or None)
        return to, _outcome_of(to, known)

    def gone_to(self, snapshot: Version, newest: str, word: str) -> tuple[Version, str]:
        """As gone_back(), to a snapshot. snapshot: the version there, as rewound() has it; what follows of the run's
        own version there is taken of the newest that any shard knows, for this one's may be another."""
        known = _known(newest)
        lineage = known["lineage"] or snapshot.lineage
        to = replace(snapshot, epoch=known["epoch"] + 1, lineage=lineage, keys=known["keys"]).keyed(word)
        return to, _outcome_of(to, known)

    # --- what takes effect ------------------------------------------------------------------------------------------

    def attach(self, writer: int, key: str | None = None) -> None:
        """From here on updates of earlier writers, and of trainers that never attached, are refused."""
        self.writer, self.ended_at = writer, None
        if key is not None:
            self._given[key] = writer
            if len(self._given) > _REMEMBERED_WRITERS:
                del self._given[next(iter(self._given))]

    def detach(self, writer: int, now: float) -> bool:
        """The training of the trainer with this number is over; False where another has taken over, or this is known.

        Raises RunNotFound; InvalidRequest for a number that the run never gave.
        """
        self.check_exists()
        if writer > self.writer:
            raise self._never_gave(writer)
        if writer != self.writer or self.ended is not None:
            return False
        self.ended_at = now
        return True

    @property
    def ended(self) -> float | None:
        """When the training was said to be over; None where there was an update since."""
        version, at = self.version, self.ended_at
        return None if at is None or (version and version.updated_at > at) else at

    def commit(self, version: Version) -> None:
        """Make ``version`` the run's current one, and remember its step."""
        before, self.version = self.version, version
        if before and version.epoch > before.epoch:
            self._forget_steps_after(version.step)
        elif version.n and version.step is not None and (before is None or version.n > before.n):
            self._steps.append(version.step)

    def change_averages(self, setup: Setup) -> None:
        """The run is to have the averages of ``setup`` from now on."""
        self.succession = Succession(setup)

    def expect_mending(self, is_mending: Callable[[], bool]) -> None:
        """Have whoever finds the run degraded ask again while ``is_mending()``: its fault then goes by itself."""
        self._is_mending = is_mending

    def recover(self) -> None:
        """The run takes updates again: someone decided which version it goes on with."""
        self.fault = None

    def restore(self, version: Version | None, steps: Iterable[int], last_epoch: int, fault: str | None) -> None:
        """Take up what storage had.

        steps: of earlier updates. last_epoch: the largest epoch that someone may have read a version of. fault: why the
        run takes no updates.
        """
        self.fault, self._last_epoch, self.version = fault, last_epoch, None
        self._steps = deque(steps, maxlen=_REMEMBERED_STEPS)
        if version:
            self.commit(version)

    def follow(self, setup: Setup, writer: int, ended_at: float | None, fault: str | None) -> None:
        """The run is as its original is, of which this one is a replica; the version follows by commit()."""
        self.succession = Succession(setup)
        self.writer, self.ended_at, self.fault = writer, ended_at, fault

    def retire(self, *, replaced: bool = False) -> None:
        """The run is deleted, or replaced by another of its name: refuse everything from now on."""
        self.replaced = replaced
        self.retired = True

    @property
    def gone(self) -> RunNotFound | Superseded | None:
        """What is told of the run once it is deleted, or replaced; None while it is there."""
        if self.replaced:
            return Superseded(
                f"run {self._run!r} was made anew meanwhile, with another configuration",
                hint="nothing was changed; ask again",
                retry_after=0.0,
            )
        return RunNotFound(f"run {self._run!r} was deleted") if self.retired else None

    def check_exists(self) -> None:
        """Raises RunNotFound once the run is deleted; Superseded once it is replaced."""
        if gone := self.gone:
            try:
                raise gone
            finally:
                del gone

    # ----------------------------------------------------------------------------------------------------------------

    def _check_writer(self, writer: int | None) -> None:
        """Raises Fenced where another writer has taken over, InvalidRequest for a number that the run never gave."""
        if (writer or 0) == self.writer:
            return
        if (writer or 0) > self.writer:
            raise self._never_gave(writer or 0)
        sent = "without a writer's number" if writer is None else f"of writer {writer}"
        raise Fenced(f"an update {sent} came, and writer {self.writer} has taken over run {self._run!r}")

    def _never_gave(self, writer: int) -> InvalidRequest:
        return InvalidRequest(f"run {self._run!r} never gave the writer's number {writer}")

    def _forget_steps_after(self, step: int | None) -> None:
        kept = [] if step is None else [each for each in self._steps if each <= step]
        self._steps = deque(kept, maxlen=_REMEMBERED_STEPS)


def writer_in(outcome: str) -> int:
    """The number of the latest trainer that attached, of what Ledger.outcome() gave."""
    number: int = json.loads(outcome)["writer"]
    return number


def _known(newest: str) -> dict[str, Any]:
    """Of the outcome that led to the newest revision, what a way back goes on from; empty: there is none."""
    said: dict[str, Any] = json.loads(newest) if newest else {"next": None, "writer": 0}
    last = said["next"] or {"version": "0.0", "lineage": "", "keys": ()}
    epoch = int(last["version"].partition(".")[0])
    return {"writer": said["writer"], "epoch": epoch, "lineage": last["lineage"], "keys": tuple(last["keys"])}


def _outcome_of(to: Version | None, known: dict[str, Any]) -> str:
    """The outcome of a way back to a version; None where the run has no weights then."""
    facts = {"base": None, "next": _facts(to) if to else None, "writer": known["writer"]}
    return json.dumps(facts, sort_keys=True)


def _facts(version: Version) -> dict[str, object]:
    """Of a version, what does not depend on which part of the parameters a host has."""
    averages = [
        (each.name, each.member.lineage, each.decay, each.effective_decay, each.num_updates)
        for each in version.averages
    ]
    return {
        "lineage": version.lineage,
        "version": str(version),
        "step": version.step,
        "num_updates": version.num_updates,
        "keys": version.keys,
        "averages": averages,
    }


def _counted(counter: int, gap: int) -> int:
    """The counter after an update; one that is off stays off."""
    return min(counter + gap, MAX_STEP) if counter >= 0 else -1
