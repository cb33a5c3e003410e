"""Reasons for which proposals are refused, as text: the error that one shard gave, for the senders of all others.

Knows the client's errors as problems (RFC 9457). Does not know what is refused, or how a reason travels.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence

from ema_client.errors import (
    Conflict,
    EmaError,
    InvalidRequest,
    RunDegraded,
    Superseded,
    error_from_problem,
    printable,
)

__all__ = [
    "MADE_BEFORE",
    "code_in",
    "detail_in",
    "disagreement",
    "error_of",
    "lacked_in",
    "lacking",
    "nothing_common",
    "nothing_damaged",
    "reason_of",
]

#: Why a change is refused that was made already: whoever asked looks at the run.
MADE_BEFORE = "applied before"
#: What the reason of a host begins with that lacks snapshots of a ring.
_LACKS = "lacks "


def reason_of(fault: EmaError) -> str:
    """Why a proposal is refused, for every shard's sender."""
    return json.dumps(fault.to_problem())


def lacking(versions: Iterable[str]) -> str:
    """Why a ring is refused by a host that does not have these snapshots, by their versions."""
    return _LACKS + " ".join(versions)


def lacked_in(reason: str) -> tuple[str, ...]:
    """The snapshots that a host lacks, for this reason; none for any other one."""
    return tuple(reason.removeprefix(_LACKS).split()) if reason.startswith(_LACKS) else ()


def disagreement(shards: Iterable[Sequence[int]]) -> str:
    """Why a proposal is made on no shard that all have voted for. shards: each with those of the same outcome."""
    sides = " against ".join(", ".join(map(str, each)) for each in shards)
    fault = Conflict(
        f"it was made on no host, for the hosts do not agree on what it makes of the run: shards {sides}",
        hint="initial weights come with the same num_updates and step to every host; where it was another write "
        "compare what GET /v1/runs/{run} says at each host",
    )
    return reason_of(fault)


def nothing_damaged() -> str:
    """Why shards do not go on with what they have in common, which they have all of."""
    return reason_of(InvalidRequest("the run is not degraded on any host: name the snapshot to go back to"))


def nothing_common(why: str) -> str:
    """Why shards cannot go on with a version that all have. why: the reason of a shard that could not read one, empty
    where there was none to read."""
    tried = f": {error_of(why).detail}" if why else ""
    fault = RunDegraded(
        f"there is no version that all hosts can read{tried}",
        hint="go back to a snapshot that all hosts have (POST /v1/runs/{run}/rewind); where there is none delete the "
        "run, and make it again from weights that were downloaded, or from the trainer's",
    )
    return reason_of(fault)


def error_of(reason: str) -> EmaError:
    """The error that a refusal on another shard stands for; Superseded for a reason that no error gave."""
    try:
        problem = json.loads(reason)
        return error_from_problem(problem, problem["status"])
    except (ValueError, KeyError, TypeError):
        return Superseded(reason, retry_after=0.0)


def code_in(body: bytes) -> str:
    """The code of a problem (RFC 9457); empty where there is none."""
    with contextlib.suppress(ValueError):
        problem = json.loads(body)
        if isinstance(problem, dict):
            return str(problem.get("code", ""))
    return ""


def detail_in(body: bytes) -> str:
    """What a problem (RFC 9457) says, for a line of a log or of an error; of anything else its beginning."""
    with contextlib.suppress(ValueError):
        problem = json.loads(body)
        if isinstance(problem, dict):
            return printable(str(problem.get("detail")))
    return printable(body[:200].decode(errors="replace"))
