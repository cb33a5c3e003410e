"""A coordinator's process, which ends itself by SIGKILL where it is told to.

    python coordinating.py PORT [POINT COUNT]

POINT: ``hear`` before a message of a shard is taken in, ``decide`` after, before anything is said of it, ``say`` before
a message for a shard is on its way. COUNT: at the how manieth time, from 1.

Knows the coordinator's program. Does not know when it should end.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ema_service.cluster.conversation import Conversation
from ema_service.cluster.coordinator import serve
from ema_service.cluster.serving import listening_socket
from ema_service.cluster.token import ClusterToken

TOKEN = "a-token-of-the-tests"


def end_at(point: str, count: int) -> None:
    """Have this process end itself at a point."""
    times: Counter[str] = Counter()

    def reach(name: str) -> None:
        times[name] += 1
        if name == point and times[name] == count:
            os.kill(os.getpid(), signal.SIGKILL)

    hear, say = Conversation.hear, Conversation._say

    def killing_hear(self: Conversation, message: Any) -> None:
        reach("hear")
        hear(self, message)

    def killing_say(self: Conversation, outputs: Iterable[Any]) -> None:
        found = list(outputs)
        if found:
            reach("decide")
        for output in found:
            reach("say")
            say(self, [output])

    Conversation.hear = killing_hear  # type: ignore[method-assign]
    Conversation._say = killing_say  # type: ignore[method-assign]


def main() -> None:
    port, *when = sys.argv[1:]
    if when:
        end_at(when[0], int(when[1]))
    sock = listening_socket("127.0.0.1", int(port))
    print(f"port {sock.getsockname()[1]}", flush=True)  # noqa: T201  # whoever started this waits for it
    serve(ClusterToken(TOKEN), sock)


if __name__ == "__main__":
    main()
