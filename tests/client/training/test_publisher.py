"""The background sender by itself: what it sends, tells and waits for, with a sending end made by the test.

Knows the publisher's promises. Does not know tensors or HTTP (test_remote_ema.py, tests/e2e/test_trainer.py), or when a
try is the last of its round (test_rounds.py).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from ema_client.errors import (
    EmaError,
    NonFinite,
    Overloaded,
    ServiceUnreachable,
    StaleStep,
    StepNotReached,
    UpdatesPending,
    UsageError,
)
from ema_client.http.body import Body
from ema_client.http.retry import RetryPolicy
from ema_client.training import sender
from ema_client.training.at_exit import PROGRAM, ProgramEnd
from ema_client.training.publisher import Publisher
from ema_client.training.rounds import SendPolicy
from ema_client.training.tally import Stats
from ema_client.training.updates import Update
from tests.waiting import wait_until

PATIENCE = 20.0
QUICK = SendPolicy(RetryPolicy(attempts=3, base=0.001, cap=0.002), stuck_pause=0.01)
BODY = Body(0, lambda: ())


class Service:
    """A sending end that waits where it is told to, and fails as often as it is told to."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.begun = threading.Semaphore(0)
        self.tries: list[int] = []
        self.applied: list[int] = []
        self.errors: dict[int, list[EmaError]] = {}
        self.down = False

    def __call__(self, step: int, _body: Body) -> bool:
        self.tries.append(step)
        self.begun.release()
        assert self.open.wait(PATIENCE)
        if self.down:
            raise ServiceUnreachable("down")
        if self.errors.get(step):
            raise self.errors[step].pop(0)
        self.applied.append(step)
        return True

    def wait_begun(self) -> None:
        assert self.begun.acquire(timeout=PATIENCE)


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def make(service: Service) -> Iterator[Callable[[SendPolicy], Publisher]]:
    """Make publishers that send to the service; each is closed after the test, and its thread has ended."""
    made: list[Publisher] = []

    def make(policy: SendPolicy) -> Publisher:
        made.append(Publisher(service, policy, name="run 'r' at http://here"))
        return made[-1]

    yield make
    service.open.set()
    for publisher in made:
        publisher.close()
        if publisher.thread is not None:
            ended(publisher)


@pytest.fixture
def publisher(make: Callable[[SendPolicy], Publisher]) -> Publisher:
    return make(QUICK)


def ended(publisher: Publisher) -> None:
    """Wait for the sending thread, which has begun, to end."""
    assert publisher.thread is not None
    publisher.thread.join(PATIENCE)
    assert not publisher.thread.is_alive()


class Given:
    """An update, and whether its memory was given back."""

    def __init__(self, step: int | None, *, borrowed: bool = False, ready: Callable[[], None] = lambda: None) -> None:
        self.back = threading.Event()
        self.update = Update(step, BODY, ready, self.back.set, borrowed)


def push(publisher: Publisher, step: int | None, *, wait: bool = True, borrowed: bool = False) -> Given | None:
    if not publisher.room(wait=wait):
        return None
    given = Given(step, borrowed=borrowed)
    publisher.submit(given.update)
    return given


# --- the queue ------------------------------------------------------------------------------------------------------


def test_updates_are_sent_in_order(publisher: Publisher, service: Service) -> None:
    """Each once, in the order they were given, and flush() returns when all are applied and their memory is free."""
    given = [push(publisher, step) for step in range(1, 50)]
    publisher.flush(PATIENCE)

    assert service.applied == list(range(1, 50))
    assert all(one is not None and one.back.is_set() for one in given)
    assert (publisher.stats, publisher.pending) == (Stats(sent=49), 0)


def test_no_thread_before_the_first_update(publisher: Publisher) -> None:
    """A publisher that sends nothing starts nothing, and has nothing to flush."""
    publisher.flush()

    assert publisher.thread is None


def test_skip_leaves_out_what_finds_no_room(publisher: Publisher, service: Service) -> None:
    """One is on its way, one waits, the third is left out at once and counted; those taken are sent all the same."""
    service.open.clear()
    push(publisher, 1)
    service.wait_begun()
    push(publisher, 2)

    assert publisher.pending == 2
    assert push(publisher, 3, wait=False) is None
    assert publisher.stats == Stats(skipped=1)
    service.open.set()
    publisher.flush(PATIENCE)
    assert service.applied == [1, 2]


def test_block_waits_for_room(publisher: Publisher, service: Service) -> None:
    """The third waits until the first is applied; none is left out."""
    service.open.clear()
    push(publisher, 1)
    service.wait_begun()
    push(publisher, 2)
    threading.Timer(0.1, service.open.set).start()
    push(publisher, 3)

    assert 1 in service.applied
    publisher.flush(PATIENCE)
    assert (service.applied, publisher.stats) == ([1, 2, 3], Stats(sent=3))


def test_what_is_not_ready_is_waited_for_by_the_sender(publisher: Publisher, service: Service) -> None:
    """submit() returns although a copy is still on its way; the body is sent after it."""
    copied = threading.Event()
    assert publisher.room(wait=True)
    publisher.submit(Given(1, ready=lambda: assert_set(copied)).update)

    assert service.tries == []
    copied.set()
    publisher.flush(PATIENCE)
    assert service.applied == [1]


def assert_set(event: threading.Event) -> None:
    assert event.wait(PATIENCE)


# --- failures -------------------------------------------------------------------------------------------------------


def test_a_passing_fault_is_tried_again(publisher: Publisher, service: Service) -> None:
    """The same step again, and nothing is told of it."""
    service.errors[1] = [ServiceUnreachable("gone"), ServiceUnreachable("gone")]
    push(publisher, 1)
    publisher.flush(PATIENCE)

    assert (service.tries, service.applied) == ([1, 1, 1], [1])


def test_a_refusal_is_told_once_and_training_goes_on(
    publisher: Publisher, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    """What can never be applied is not tried again; it is logged with URL and step, counted, raised by one flush."""
    service.errors |= {2: [NonFinite("NaN in w")], 3: [StaleStep("3 is old")]}
    with caplog.at_level(logging.WARNING, "ema_client"):
        for step in (1, 2, 3, 4):
            push(publisher, step)
        with pytest.raises(NonFinite, match="NaN in w") as raised:
            publisher.flush(PATIENCE)
    publisher.flush(PATIENCE)

    assert raised.value.__notes__ == [
        "update of step 2, run 'r' at http://here",
        "1 updates failed after it; see the log",
    ]
    assert (service.tries, service.applied) == ([1, 2, 3, 4], [1, 4])
    assert publisher.stats == Stats(sent=2, failed=2)
    assert any("run 'r' at http://here: step 2 failed: NaN in w" in line for line in caplog.messages)


def test_a_service_that_is_away_stops_nobody(
    publisher: Publisher, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    """Through an outage what was taken is kept, the rest is left out without waiting; back again, all goes on."""
    service.down = True
    with caplog.at_level(logging.WARNING, "ema_client"):
        push(publisher, 1)
        wait_until(lambda: publisher.stuck)
        push(publisher, 2)
        assert all(push(publisher, step) is None for step in range(3, 20))
        with pytest.raises(ServiceUnreachable):
            publisher.flush(PATIENCE)
        assert publisher.pending == 2
        service.down = False
        publisher.flush(PATIENCE)
        push(publisher, 20)
        publisher.flush(PATIENCE)

    assert service.applied == [1, 2, 20]
    assert publisher.stats == Stats(sent=3, skipped=17)
    assert not publisher.stuck
    assert sum("cannot be sent" in line for line in caplog.messages) == 1
    assert sum("skipped in a row" in line for line in caplog.messages) == 5
    assert "run 'r' at http://here: updates are applied again; 17 were skipped" in caplog.messages


def test_waiting_for_room_ends_where_the_service_goes_away(publisher: Publisher, service: Service) -> None:
    """Who waits for room is let go when the tries are spent."""
    service.open.clear()
    service.down = True
    push(publisher, 1)
    push(publisher, 2)
    threading.Timer(0.05, service.open.set).start()

    assert push(publisher, 3) is None


def test_a_hanging_try_ends_the_round(make: Callable[[SendPolicy], Publisher], service: Service) -> None:
    """Where one try took longer than a round may, the service counts as away after it, however many tries are left."""
    publisher = make(dataclasses.replace(QUICK, round_seconds=0.0, stuck_pause=1000.0))
    service.down = True
    push(publisher, 1)
    wait_until(lambda: publisher.stuck)

    assert service.tries == [1]


def test_flush_does_not_wait_for_the_next_round(make: Callable[[SendPolicy], Publisher], service: Service) -> None:
    """Between two rounds a flush has the update tried at once."""
    publisher = make(dataclasses.replace(QUICK, stuck_pause=1e6, longest_stuck_pause=1e6))
    service.down = True
    push(publisher, 1)
    wait_until(lambda: publisher.stuck)
    service.down = False
    publisher.flush(PATIENCE)

    assert service.applied == [1]


def test_flush_with_a_time(publisher: Publisher, service: Service) -> None:
    """UpdatesPending, with how many; they are sent on."""
    service.open.clear()
    push(publisher, 1)
    with pytest.raises(UpdatesPending, match=r"1 updates of run 'r' .* not applied after 0\.01 s"):
        publisher.flush(0.01)
    service.open.set()
    publisher.flush(PATIENCE)

    assert service.applied == [1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_defect_of_the_sender_hangs_nobody() -> None:
    """Where the thread ends by something that is no EmaError, flush() says so and updates are left out."""

    def broken(_step: int, _body: Body) -> bool:
        raise RuntimeError("a defect")

    publisher = Publisher(broken, QUICK, name="r")
    given = push(publisher, 1)
    ended(publisher)

    assert given is not None
    assert given.back.is_set()
    for _ in range(2):
        with pytest.raises(EmaError, match="RuntimeError: a defect"):
            publisher.flush(PATIENCE)
    assert push(publisher, 2) is None
    assert publisher.stats == Stats(skipped=2)


# --- parts, of which others are awaited -----------------------------------------------------------------------------


class Gathering:
    """A service that keeps parts until the others come, and loses them where it is told to."""

    def __init__(self) -> None:
        self.sent: list[int | None] = []
        self.there: set[int | None] = set()
        self.applied: set[int | None] = set()
        self.stale: set[int | None] = set()
        self.asked = 0
        #: So many questions are not answered.
        self.unanswered = 0

    def send(self, step: int | None, _body: Body) -> bool:
        if step in self.stale:
            raise StaleStep(f"step {step} was given up")
        self.sent.append(step)
        self.there.add(step)
        return step in self.applied

    def fate(self, step: int | None) -> bool | None:
        self.asked += 1
        if self.unanswered:
            self.unanswered -= 1
            raise Overloaded("a host is away")
        return True if step in self.applied else False if step in self.there else None


@pytest.fixture
def gathering() -> Gathering:
    return Gathering()


@pytest.fixture
def rank(gathering: Gathering) -> Iterator[Publisher]:
    publisher = Publisher(gathering.send, QUICK, name="run 'r' at http://here", fate=gathering.fate)
    yield publisher
    publisher.close()
    ended(publisher)


def test_part_is_kept_until_the_update_is_applied(rank: Publisher, gathering: Gathering) -> None:
    """A part that arrived keeps its memory, the next part is sent beside it, and flush() waits for both."""
    first, second = push(rank, 1), push(rank, 2)
    assert first is not None
    assert second is not None
    wait_until(lambda: gathering.sent == [1, 2])
    with pytest.raises(UpdatesPending):
        rank.flush(0.05)
    assert (rank.pending, first.back.is_set(), rank.stats) == (2, False, Stats())
    gathering.applied |= {1, 2}
    rank.flush(PATIENCE)

    assert first.back.is_set()
    assert second.back.is_set()
    assert (rank.stats, gathering.sent) == (Stats(sent=2), [1, 2])


def test_part_that_was_lost_is_sent_again(rank: Publisher, gathering: Gathering) -> None:
    """A service that forgot a part, as one that was killed has, is sent the part again."""
    push(rank, 1)
    wait_until(lambda: gathering.asked)
    gathering.there.clear()
    wait_until(lambda: gathering.sent == [1, 1])
    gathering.applied.add(1)
    rank.flush(PATIENCE)

    assert rank.stats == Stats(sent=1)


def test_part_that_was_applied_while_nobody_could_say_so(rank: Publisher, gathering: Gathering) -> None:
    """The part is sent again, and is stale by then: no failure, for its update was applied, as the next one was."""
    push(rank, 1)
    push(rank, 2)
    wait_until(lambda: gathering.sent == [1, 2])
    vars(gathering).update(unanswered=2, stale={1}, applied={1, 2})  # at once, for the sender asks meanwhile
    rank.flush(PATIENCE)

    assert gathering.unanswered == 0
    assert rank.stats == Stats(sent=2)


def test_update_that_went_on_without_a_part_is_told(rank: Publisher, gathering: Gathering) -> None:
    """Where a newer step was applied and this one was not, flush() raises although every part was answered."""
    push(rank, 1)
    push(rank, 2)
    wait_until(lambda: gathering.sent == [1, 2])
    gathering.stale.add(1)
    gathering.there.discard(1)
    gathering.applied.add(2)

    with pytest.raises(StaleStep, match="given up"):
        rank.flush(PATIENCE)
    assert rank.stats == Stats(sent=1, failed=1)


def test_part_of_an_update_that_another_rank_skipped(
    rank: Publisher, gathering: Gathering, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While the service is away ranks leave updates out, each by itself: an update that only some sent is skipped on
    these as well, and no rank's flush() raises alone."""
    monkeypatch.setattr(sender, "_AWAY_SECONDS", 0.05)
    push(rank, 1)
    wait_until(lambda: gathering.asked > 1 and rank.pending == 1)
    threading.Event().wait(0.1)
    gathering.applied.add(1)
    rank.flush(PATIENCE)
    push(rank, 2)
    push(rank, 3)
    wait_until(lambda: gathering.sent == [1, 2, 3])
    gathering.stale.add(2)
    gathering.there.discard(2)
    gathering.applied.add(3)

    rank.flush(PATIENCE)
    assert rank.stats == Stats(sent=2, skipped=1)
    assert [each.message for each in caplog.records if "step 2 was left out" in each.message]


def test_others_that_never_come_stop_nobody(
    rank: Publisher, gathering: Gathering, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A rank whose peers are gone waits its time for them, says so once, and then holds up neither flush() nor room."""
    monkeypatch.setattr(sender, "_ROOM_SECONDS", 0.05)
    monkeypatch.setattr(sender, "_FLUSH_SECONDS", 0.1)
    push(rank, 1)
    with pytest.raises(StepNotReached, match="other ranks' parts did not come"):
        rank.flush(PATIENCE)
    push(rank, 2)
    assert not rank.room(wait=True)
    assert rank.stats == Stats(skipped=1)
    assert [each.levelname for each in caplog.records if "is not complete" in each.message] == ["ERROR", "WARNING"]
    with pytest.raises(StepNotReached):
        rank.flush(PATIENCE)
    gathering.applied |= {1, 2}
    rank.flush(PATIENCE)
    assert rank.stats == Stats(sent=2, skipped=1)


def test_initial_weights_that_others_do_not_give_are_given_up(
    rank: Publisher, gathering: Gathering, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run has its first ones: updates do not wait for the rest for ever, and flush() tells. They are no update."""
    monkeypatch.setattr(sender, "_FLUSH_SECONDS", 0.05)
    given, update = push(rank, None), push(rank, 1)
    wait_until(lambda: gathering.sent == [None, 1])
    gathering.applied.add(1)
    with pytest.raises(StepNotReached, match="the set of initial weights is not complete"):
        rank.flush(PATIENCE)
    assert given is not None
    assert given.back.is_set()
    rank.flush(PATIENCE)
    assert update is not None
    assert rank.stats == Stats(sent=1, failed=1)


def test_initial_weights_given_twice(rank: Publisher, gathering: Gathering) -> None:
    """The second ones are sent while the first ones await other ranks' parts."""
    push(rank, None)
    push(rank, None)
    wait_until(lambda: gathering.sent == [None, None])
    gathering.applied.add(None)
    rank.flush(PATIENCE)


def test_initial_weights_are_no_update(rank: Publisher, gathering: Gathering) -> None:
    """Where all are there, nothing is counted."""
    gathering.applied |= {None, 1}
    push(rank, None)
    push(rank, 1)
    rank.flush(PATIENCE)
    assert (gathering.sent, rank.stats) == ([None, 1], Stats(sent=1))


def test_lent_memory_of_a_part_comes_back(
    rank: Publisher, gathering: Gathering, monkeypatch: pytest.MonkeyPatch
) -> None:
    """recall() waits for the other ranks' parts, but not for ever: the model's memory is the model's."""
    push(rank, 1, borrowed=True)
    wait_until(lambda: gathering.sent)
    threading.Timer(0.1, gathering.applied.add, (1,)).start()
    rank.recall()
    assert rank.stats == Stats(sent=1)
    monkeypatch.setattr(sender, "_LENT_SECONDS", 0.1)
    push(rank, 2, borrowed=True)
    rank.recall()

    assert rank.stats == Stats(sent=1, skipped=1)


# --- borrowed memory ------------------------------------------------------------------------------------------------


def test_recall_waits_for_what_is_borrowed(publisher: Publisher, service: Service) -> None:
    """Before it returns, the last byte of borrowed memory is sent."""
    service.open.clear()
    given = push(publisher, 1, borrowed=True)
    service.wait_begun()
    threading.Timer(0.1, service.open.set).start()
    publisher.recall()

    assert given is not None
    assert given.back.is_set()
    assert service.applied == [1]


def test_recall_does_not_wait_for_a_service_that_is_away(publisher: Publisher, service: Service) -> None:
    """A failed try of borrowed memory is given up and counted; the service counts as away, so the next is copied."""
    service.down = True
    given = push(publisher, 1, borrowed=True)
    service.wait_begun()
    publisher.recall()

    assert given is not None
    assert given.back.is_set()
    assert publisher.stats == Stats(skipped=1)
    assert publisher.stuck


def test_recall_leaves_copies_alone(publisher: Publisher, service: Service) -> None:
    """Memory of our own may be sent for as long as it takes."""
    service.open.clear()
    push(publisher, 1)
    publisher.recall()

    assert publisher.pending == 1


# --- the end --------------------------------------------------------------------------------------------------------


def test_closed_publisher(publisher: Publisher, service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """What is pending is given up, logged and counted, and nothing is taken any more."""
    ended = threading.Event()
    publisher.at_end(ended.set)
    service.down = True
    push(publisher, 1)
    wait_until(lambda: publisher.stuck)
    with caplog.at_level(logging.ERROR, "ema_client"):
        publisher.close()
        assert ended.wait(PATIENCE)

    assert publisher.stats == Stats(skipped=1)
    with pytest.raises(UsageError, match="is closed"):
        publisher.room(wait=True)
    with pytest.raises(UsageError, match="is closed"):
        publisher.flush()


def test_finish_sends_what_is_pending(publisher: Publisher, service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """An owner that is gone without close() loses nothing, is told of in the log, and leaves no thread."""
    service.open.clear()
    push(publisher, 1)
    push(publisher, 2)
    with caplog.at_level(logging.WARNING, "ema_client"):
        publisher.finish()
    service.open.set()
    ended(publisher)

    assert service.applied == [1, 2]
    assert caplog.messages == ["run 'r' at http://here was dropped without close(); 2 updates are on their way"]


def test_finish_with_the_service_away(publisher: Publisher, service: Service) -> None:
    """Nobody is left to come back to: after a round of tries the thread ends."""
    service.down = True
    push(publisher, 1)
    publisher.finish()

    ended(publisher)


def test_collected_in_the_sender_itself() -> None:
    """The garbage collector may run finish() in the very thread that it ends."""
    publisher = Publisher(lambda _step, _body: publisher.finish() is None, QUICK, name="r")
    push(publisher, 1)
    ended(publisher)

    assert publisher.stats == Stats(sent=1)


def test_ended_publishers_are_forgotten(service: Service) -> None:
    """Nothing of a publisher that has ended is held for the program's end."""
    program = ProgramEnd()
    publisher = Publisher(service, QUICK, name="r", program=program)
    push(publisher, 1)
    assert program.running == {publisher}
    publisher.flush(PATIENCE)
    publisher.close()
    ended(publisher)

    assert program.running == frozenset()


def test_the_end_of_the_program_waits(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """What is on its way is sent first; then nothing is taken any more, and the thread has ended."""
    program = ProgramEnd()
    publisher = Publisher(service, QUICK, name="r", program=program)
    service.open.clear()
    push(publisher, 1)
    push(publisher, 2)
    threading.Timer(0.1, service.open.set).start()
    program.finish()

    assert service.applied == [1, 2]
    ended(publisher)
    with pytest.raises(UsageError, match="is closed"):
        publisher.room(wait=True)
    assert caplog.messages == []


def test_fork(publisher: Publisher, service: Service) -> None:
    """A forked process neither sends nor waits, even if it was forked while a thread held the lock."""
    locked, go_on = threading.Event(), threading.Event()

    def done() -> None:
        # Called by the sending thread with the lock of the queue.
        locked.set()
        assert go_on.wait(PATIENCE)

    assert publisher.room(wait=True)
    publisher.submit(Update(1, BODY, lambda: None, done))
    assert locked.wait(PATIENCE)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            publisher.recall()
            publisher.finish()
            publisher.close()
            PROGRAM.finish()
            try:
                publisher.room(wait=True)
            except UsageError as refused:
                os.write(write, str(refused).encode())
        finally:
            os._exit(0)
    os.close(write)
    go_on.set()
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)

    assert "is a fork of it" in said
    publisher.flush(PATIENCE)
    assert service.applied == [1]
