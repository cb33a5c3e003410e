"""A shard's process: a run that is a list of the keys committed, in a file, with a vote beside it.

    python holding.py FOLDER PLACE SHARDS COORDINATORS [POINT COUNT]

Slices of updates come over a Unix socket in FOLDER, one a connection: ``{"step": 3, "key": "u"}``; each is answered
once the coordinator has decided: ``{"committed": true, "reason": ""}``. A key that begins with "bad" is refused; a step
that is not newer than the run's is answered at once.

POINT: where this process ends itself by SIGKILL, at the COUNT-th time: ``before`` or ``after`` one of promise, vote,
commit, abort is durable; ``answer`` before a sender is answered; ``hear`` before a message is heard; ``prepared``
before a change that was prepared is voted for.

Knows what a shard's run has to do. Does not know tensors.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socketserver
import sys
import threading
from collections import Counter, defaultdict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ema_client.errors import StorageFailed
from ema_service.cluster.encoding import decode, encode
from ema_service.cluster.hosting.reporting import Reporting
from ema_service.cluster.messages import Answer, Arrival, Kept, Proposal, Record, Ticket, Vote
from ema_service.cluster.token import ClusterToken
from tests.service.cluster.processes.coordinating import TOKEN

RUN = "r"


class Killer:
    """Ends the process at one point, at one time."""

    def __init__(self, point: str, count: int) -> None:
        self._point, self._left = point, Counter({point: count})

    def __call__(self, point: str) -> None:
        self._left[point] -= 1
        if point == self._point and not self._left[point]:
            os.kill(os.getpid(), signal.SIGKILL)


class FileStore:
    """The run: a file that is replaced as a whole, and those who wait for an answer.

    log: the outcomes that led to the run's revision. A file ``full`` beside it stands for a disk without room.
    """

    def __init__(self, folder: Path, place: int, kill: Killer) -> None:
        self._file, self._full = folder / f"{place}.json", folder / f"{place}.full"
        self._kill = kill
        self._waiting: defaultdict[str, list[SimpleQueue[Answer]]] = defaultdict(list)
        self.changes: SimpleQueue[Proposal] = SimpleQueue()
        found = json.loads(self._file.read_text()) if self._file.exists() else {"record": encode(Record()), "log": []}
        self.record, self.log = decode(found["record"], Record), found["log"]

    def returns(self) -> bool:
        """It has no twin."""
        return False

    def kept(self) -> Kept:
        return Kept()

    def promise(self, record: Record) -> None:
        self._keep("promise", record, self.log)

    def is_whole(self) -> bool:
        return True

    def vote(self, record: Record, _: None) -> None:
        self._keep("vote", record, self.log)

    def commit(self, record: Record, _: None) -> None:
        if record.made is None:
            raise ValueError("a commit without a vote")
        self._keep("commit", record, [*self.log, record.made.outcome])

    def abort(self, record: Record, _: None) -> None:
        self._keep("abort", record, self.log)

    def propose(self, proposal: Proposal) -> None:
        self.changes.put(proposal)

    def answer(self, answer: Answer) -> None:
        self._kill("answer")
        for waiting in self._waiting.pop(answer.key, []):
            waiting.put(answer)

    def wait_for(self, key: str) -> SimpleQueue[Answer]:
        """Where the answer to a proposal will be."""
        answers: SimpleQueue[Answer] = SimpleQueue()
        self._waiting[key].append(answers)
        return answers

    def _keep(self, event: str, record: Record, log: list[str]) -> None:
        if self._full.exists():
            raise StorageFailed("no room")
        self._kill(f"before {event}")
        new = self._file.with_suffix(f".{threading.get_ident()}")
        new.write_text(json.dumps({"record": encode(record), "log": log}))
        new.rename(self._file)
        self._kill(f"after {event}")
        self.record, self.log = record, log


class Holder:
    """The shard: judges what comes, and votes."""

    def __init__(self, store: FileStore, reporting: Reporting[None], kill: Killer) -> None:
        self._store, self._reporting, self._kill = store, reporting, kill

    def push(self, step: int, key: str) -> Answer:
        """One slice: answered once it is decided."""
        if any(outcome.split()[0] == key for outcome in self._store.log):
            return Answer(key, committed=True)
        if step <= max((int(outcome.split()[1]) for outcome in self._store.log), default=0):
            return Answer(key, committed=False, reason="stale")
        answers = self._store.wait_for(key)
        self.judge(Proposal(Ticket(len(self._store.log), step, key)))
        return answers.get()

    def judge(self, proposal: Proposal) -> None:
        """Vote, or refuse."""
        ticket = proposal.ticket
        if ticket.key.startswith("bad"):
            self._reporting.refuse(proposal, "not finite")
            self._store.answer(Answer(ticket.key, committed=False, reason="not finite"))
        elif any(outcome.split()[0] == ticket.key for outcome in self._store.log):
            self._reporting.refuse(proposal, "made before")
        else:
            self._reporting.vote(Vote(proposal, f"{ticket.key} {ticket.step or 0} {proposal.change or ''}"), None)

    def judge_changes(self) -> None:
        while True:
            proposal = self._store.changes.get()
            self._kill("prepared")
            with contextlib.suppress(StorageFailed):  # the proposal comes again
                self.judge(proposal)


class Trainers(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    #: Takes slices: push(step, key) gives the Answer.
    holder: Any


class Trainer(socketserver.StreamRequestHandler):
    """One slice, and its answer."""

    server: Trainers

    def handle(self) -> None:
        asked = json.loads(self.rfile.readline())
        try:
            answer = self.server.holder.push(asked["step"], asked["key"])
        except StorageFailed as fault:
            answer = Answer(asked["key"], committed=False, reason=fault.code)
        said: dict[str, Any] = {"committed": answer.committed, "reason": answer.reason}
        self.wfile.write(json.dumps(said).encode())


def main() -> None:
    folder, place, shards, coordinators, *when = sys.argv[1:]
    kill = Killer(when[0], int(when[1])) if when else Killer("", 0)
    store = FileStore(Path(folder), int(place), kill)
    arrival = Arrival(int(place), int(shards), f"http://host-{place}", int(place) * 100, int(place) * 100 + 100)

    class Killed(Reporting[None]):
        def hear(self, message: Any) -> None:
            kill("hear")
            super().hear(message)

    voted = {store.record.vote.ticket: None} if store.record.vote else {}
    urls, token = coordinators.split(","), ClusterToken(TOKEN)
    talk = Killed(RUN, arrival, store.record, store, urls, token, prepared=voted, patience=0.5)
    holder = Holder(store, talk, kill)
    threading.Thread(target=holder.judge_changes, daemon=True).start()
    path = Path(folder) / f"{place}.sock"
    path.unlink(missing_ok=True)
    with Trainers(str(path), Trainer) as trainers:
        trainers.holder = holder
        talk.start()
        trainers.serve_forever()


if __name__ == "__main__":
    main()
