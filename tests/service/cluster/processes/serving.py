"""A host's process: ``ema-service``, which ends itself by SIGKILL where it is told to.

    python serving.py "POINT COUNT" serve ...

POINT: ``before`` or ``after`` one of promise, vote, commit, abort of the directory is durable, and with ``of a run``
behind it of any run; ``answer`` before what
follows from a change of the directory is done; ``hear`` before any message is heard; ``made`` before a run that is made
is voted for. ``refuse``, where the process goes on: a run is not made, for want of memory. COUNT: at the how manieth
time, from 1.

Knows the host's program. Does not know when it should end.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

from ema_client.errors import Overloaded
from ema_service.__main__ import main
from ema_service.cluster.hosting.directory import Directory
from ema_service.cluster.hosting.reporting import Reporting
from ema_service.cluster.hosting.shard_run import ShardRun
from ema_service.runs import Registry
from tests.service.cluster.processes.holding import Killer


def end_at(point: str, count: int) -> None:
    """Have this process end itself at a point."""
    kill = Killer(point, count)

    def wrap(owner: type, name: str, before: str, after: str = "") -> None:
        method: Callable[..., Any] = getattr(owner, name)

        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            kill(before)
            result = method(self, *args, **kwargs)
            kill(after)
            return result

        setattr(owner, name, wrapped)

    for name in ("promise", "vote", "commit", "abort"):
        wrap(Directory, name, f"before {name}", f"after {name}")
        wrap(ShardRun, name, f"before {name} of a run", f"after {name} of a run")
    wrap(Directory, "answer", "answer")
    wrap(Reporting, "hear", "hear")
    wrap(Registry, "propose", "", "made")


def refuse_at(count: int) -> None:
    """Have this host refuse to make a run."""
    left, propose = Counter(count=count), Registry.propose

    def refusing(self: Registry, *args: Any, **kwargs: Any) -> Any:
        left["count"] -= 1
        if left["count"] == 0:
            raise Overloaded("no room", retry_after=0.0)
        return propose(self, *args, **kwargs)

    Registry.propose = refusing  # type: ignore[method-assign]


if __name__ == "__main__":
    where, times = sys.argv.pop(1).rsplit(" ", 1)
    if where == "refuse":
        refuse_at(int(times))
    else:
        end_at(where, int(times))
    main()
