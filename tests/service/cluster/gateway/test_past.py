"""How a whole run went, put together from what hosts noted: the same as one server would have measured.

Knows histories and timelines as the protocol has them. Does not know HTTP.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from ema_client.protocol import Distances, History, HistoryColumns, Timeline, TimelineEntry
from ema_service.cluster.gateway.past import asked_of_hosts, whole_distances, whole_history, whole_timeline

COLUMNS = HistoryColumns.__dataclass_fields__


def history(steps: list[int], **columns: Any) -> History:
    """A host's: columns that are not given are not measured."""
    given: dict[str, Any] = {"time": [float(at) for at in range(len(steps))], "step": steps, **columns}
    filled = {name: tuple(given.get(name, [None] * len(steps))) for name in COLUMNS}
    return History("r", "ema", f"1.{len(steps)}", len(steps), 1.0, HistoryColumns(**filled), {})


def measured(steps: list[int], apart: list[list[float]], parameters: list[list[float]]) -> History:
    """A host's whose tensors are apart by so much."""
    norms = [math.hypot(*each) for each in parameters]
    distances = [math.hypot(*a) / norm for a, norm in zip(apart, norms, strict=True)]
    return history(steps, distance=distances, parameter_norm=norms, shadow_norm=norms)


def test_norms_and_distances_are_those_of_the_whole() -> None:
    """As one server has them, that knows all elements."""
    draw = random.Random(4)
    steps = [1, 2, 3]
    apart, parameters = ([[[draw.uniform(0.1, 2) for _ in range(5)] for _ in steps] for _ in range(3)] for _ in "ab")
    found = whole_history([measured(steps, a, p) for a, p in zip(apart, parameters, strict=True)]).columns
    for at in range(3):
        whole = math.hypot(*(value for host in parameters for value in host[at]))
        difference = math.hypot(*(value for host in apart for value in host[at]))
        assert found.parameter_norm[at] == pytest.approx(whole, rel=1e-6)
        assert found.distance[at] == pytest.approx(difference / whole, rel=1e-6)


def test_hosts_that_measured_at_other_steps() -> None:
    """A row has what each host measured last up to its step; before all have, nothing is told of the whole."""
    first = history([10, 20, 30, 40], parameter_norm=[3.0, 3.0, 3.0, 3.0], rate=[1, 2, 3, 4])
    other = history([15, 30, 45], parameter_norm=[4.0, None, 12.0])
    found = whole_history([first, other]).columns
    assert found.step == (10, 20, 30, 40)
    assert found.rate == (1, 2, 3, 4)
    assert found.parameter_norm == (None, 5.0, 5.0, 5.0)


def test_a_run_that_went_back() -> None:
    """Rows after the run went back to an earlier step are put together with rows after it did."""
    first = history([10, 20, 10, 15], parameter_norm=[3.0] * 4)
    other = history([10, 21, 9, 15], parameter_norm=[4.0, 4.0, math.sqrt(7), math.sqrt(7)])
    assert whole_history([first, other]).columns.parameter_norm == (5.0, 5.0, 4.0, 4.0)


def test_the_slowest_host_counts() -> None:
    """In times and in what is not durable; bytes of all hosts add up."""
    first = history([1], durable_lag=[2], seconds_commit=[0.5], bytes_per_second=[100.0])
    other = history([1], durable_lag=[7], seconds_commit=[0.1], bytes_per_second=[50.0])
    found = whole_history([first, other])
    assert (found.columns.durable_lag, found.columns.seconds_commit) == ((7.0,), (0.5,))
    assert found.columns.bytes_per_second == (150.0,)


def test_a_tensor_on_two_hosts_has_one_distance() -> None:
    """That of all its rows, also where one host has none; unless one of the hosts has not measured. Of what all hosts
    have measured."""
    mine = {"a": 0.1, "b": 0.2, "none here": None, "late": 0.1}, {"a": 1.0, "b": 3.0, "none here": 0.0, "late": 1.0}
    theirs = {"b": 0.3, "c": 0.4, "none here": 0.5, "late": None}, {"b": 4.0, "c": 1.0, "none here": 2.0, "late": None}
    found = whole_distances([Distances("r", "ema", "1.10", 10, *mine), Distances("r", "ema", "1.9", 9, *theirs)])
    both = pytest.approx(math.hypot(0.2 * 3, 0.3 * 4) / 5, rel=1e-6)
    assert found.tensors == {"a": 0.1, "b": both, "none here": 0.5, "late": None, "c": 0.4}
    assert (found.version, found.step, found.norms) == ("1.9", 9, {})


def test_a_group_on_two_hosts_has_one_distance() -> None:
    """At each time, of what each host measured last; a group of one host has that host's."""
    first, other = history([10, 20], parameter_norm=[1.0, 1.0]), history([15], parameter_norm=[1.0])
    first = replace(first, groups={"a": (0.1, 0.2), "b": (0.2, 0.1)}, group_norms={"a": (1.0, 1.0), "b": (3.0, 3.0)})
    other = replace(other, groups={"b": (0.3,), "c": (0.4,)}, group_norms={"b": (4.0,), "c": (1.0,)})
    found = whole_history([first, other])
    both = pytest.approx(math.hypot(0.1 * 3, 0.3 * 4) / 5, rel=1e-6)
    assert found.groups == {"a": (0.1, 0.2), "b": (None, both), "c": (None, 0.4)}
    assert found.group_norms == {}


def entry(time: float, kind: Any, text: str, step: int | None = None) -> TimelineEntry:
    return TimelineEntry(time, kind, step, step, text)


def test_what_all_hosts_noted_is_told_once() -> None:
    """As often as it happened; what one host noted alone is told with the host's place."""
    mine = [entry(1, "created", "created with 3 tensors"), entry(2, "reset", "anew", 5), entry(4, "reset", "anew", 5)]
    theirs = [entry(1, "created", "created with 4 tensors"), entry(2.1, "reset", "anew", 5), entry(3, "damaged", "bad")]
    theirs.append(entry(4.1, "reset", "anew", 5))
    found = whole_timeline([Timeline("r", tuple(mine)), Timeline("r", tuple(theirs))], 100).entries
    assert [(each.kind, each.text) for each in found] == [
        ("created", "created on 2 hosts"),
        ("reset", "anew"),
        ("damaged", "host 1: bad"),
        ("reset", "anew"),
    ]
    assert len(whole_timeline([Timeline("r", tuple(mine)), Timeline("r", tuple(theirs))], 2).entries) == 2


def test_what_hosts_made_together_is_told_once() -> None:
    """Though one has not noted it yet, or never will; and a reader who asks for what is later has it once."""
    mine = Timeline("r", (entry(5, "rewound", "back", 5), entry(9, "decay_changed", "0.5", 5)))
    theirs = Timeline("r", (entry(5.5, "rewound", "back", 5),))
    for told in (theirs, Timeline("r", (*theirs.entries, entry(9.5, "decay_changed", "0.5", 5)))):
        found = whole_timeline([mine, told], 100).entries
        assert [(each.time, each.text) for each in found] == [(5, "back"), (9, "0.5")]
        assert whole_timeline([mine, told], 100, since=5.2).entries == found[1:]
        assert whole_timeline([mine, told], 100, since=9.0).entries == ()


def test_hosts_are_asked_for_all_they_have() -> None:
    """What is wrong in a request is left for them to refuse."""
    assert asked_of_hosts({}) == (100, 0.0, {"limit": "1000"})
    assert asked_of_hosts({"limit": "7", "since": "12.5"}) == (7, 12.5, {"limit": "1000"})
    for wrong in ({"limit": "0"}, {"limit": "1001"}, {"limit": "+1"}, {"since": "nan"}, {"since": "-1"}):
        assert asked_of_hosts(wrong) == (1000, 0.0, wrong)
