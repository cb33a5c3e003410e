"""Targets: what callers may wish for, how it is asked, and that what came is what was wished for.

Knows the words of the protocol. Does not know a service.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ema_client.errors import ProtocolError, UsageError
from ema_client.protocol import Posthoc, WeightsInfo
from ema_client.reading.asked import Asked
from ema_client.reading.sweeping import Sweep
from ema_client.schedules import posthoc_of
from ema_client.targets import Target

CAME = WeightsInfo(
    "r", "posthoc", "1.9", 9, 9, 1.0, schedule="power", sigma_rel=0.12, gamma=5.5, target="sigma_rel 0.12"
)


def target(**wished: Any) -> Target:
    made = Target.of(wished, called="pull")
    assert made is not None
    return made


@pytest.mark.parametrize(
    ("wished", "query"),
    [
        ({"sigma_rel": 0.12}, {"sigma_rel": "0.12"}),
        ({"sigma_rel": np.float32(0.25), "at": "best"}, {"sigma_rel": "0.25", "at": "best"}),
        ({"decay": 0.9999, "max_error": 0.2}, {"decay": "0.9999", "max_error": 0.2}),
        ({"half_life": 1000, "at": np.int64(12)}, {"half_life": "1000", "at": "counter:12"}),
        ({"sigma_rel": 0.1, "at": "counter:12"}, {"sigma_rel": "0.1", "at": "counter:12"}),
        ({"sigma_rel": 0.1, "at": "snapshot:12"}, {"sigma_rel": "0.1", "at": "snapshot:12"}),
        ({"sigma_rel": 0.1, "at": "12"}, {"sigma_rel": "0.1", "at": "12"}),
        ({"window": [10, 20]}, {"window": "10:20"}),
    ],
)
def test_questions(wished: dict[str, Any], query: dict[str, Any]) -> None:
    """Each wish is asked in the words of the protocol; numbers of numpy are numbers."""
    asked = Asked("r", target=target(**wished)).query

    assert {key: value for key, value in asked.items() if value is not None} == query


def test_the_time_of_a_report() -> None:
    """Is the snapshot's name, or the counter as a number, however it was asked for."""
    times = [target(sigma_rel=0.1, at=at).time for at in ("snapshot:12", "counter:12", 12, "best", None)]

    assert times == ["12", 12, 12, "best", None]
    assert all(Sweep("r", "sigma_rel", at, ()).to_report().at == "12" for at in ("12", "snapshot:12"))


def test_nothing_is_wished_for() -> None:
    """Without keywords, or with None for each, there is no target."""
    assert Target.of({}, called="pull") is None
    assert Target.of({"sigma_rel": None, "at": None}, called="pull") is None


@pytest.mark.parametrize(
    ("wished", "says"),
    [
        ({"sigma_rel": 0.1, "decay": 0.9}, "each of them"),
        ({"at": "best"}, "no average is wished for"),
        ({"max_error": 0.1}, "no average is wished for"),
        ({"sigma_rel": 0.28868}, "below 0.288675"),
        ({"sigma_rel": 0}, "above 0"),
        ({"sigma_rel": float("nan")}, "no number"),
        ({"sigma_rel": "0.1"}, "no number"),
        ({"sigma_rel": True}, "no number"),
        ({"sigma_rel": 0.1, "at": "counter:x"}, "no name of a snapshot, nor a counter"),
        ({"sigma_rel": 0.1, "at": "snapshot:"}, "no name of a snapshot, nor a counter"),
        ({"sigma_rel": 0.1, "at": "step:12"}, "no name of a snapshot, nor a counter"),
        ({"decay": 1.0}, "below 1"),
        ({"half_life": -1}, "above 0"),
        ({"half_life": float("inf")}, "above 0"),
        ({"window": (5, 5)}, "ends after"),
        ({"window": (-1, 5)}, "begins at 0"),
        ({"window": (0.5, 5)}, "no pair"),
        ({"window": "1:2"}, "no pair"),
        ({"sigma_rel": 0.1, "at": "../x"}, "no name of a snapshot"),
        ({"sigma_rel": 0.1, "at": -1}, "nor a counter"),
        ({"sigma_rel": 0.1, "at": 1.5}, "nor a counter"),
        ({"sigma_rel": 0.1, "max_error": 0}, "above 0"),
    ],
)
def test_wishes_that_cannot_be(wished: dict[str, Any], says: str) -> None:
    """A mistake is named before anything is asked."""
    with pytest.raises(UsageError, match=says):
        Target.of(wished, called="pull")


def test_other_keywords() -> None:
    """A keyword that there is not is Python's own error, in the name of the call."""
    with pytest.raises(TypeError, match=r"copy_to\(\) got an unexpected keyword argument 'sigma'"):
        Target.of({"sigma": 0.1}, called="copy_to")


@pytest.mark.parametrize(
    ("wished", "came"),
    [
        ({"sigma_rel": 0.12}, CAME),
        ({"sigma_rel": 0.12, "at": 9}, CAME),
        ({"decay": 0.9999}, replace(CAME, schedule="constant", decay=0.9999, target="decay 0.9999")),
        ({"half_life": 50}, replace(CAME, schedule="half_life", half_life=50.0, target="half-life 50")),
        ({"window": (3, 9)}, replace(CAME, schedule="window", target="window 3:9")),
    ],
)
def test_what_came_is_what_was_wished_for(wished: dict[str, Any], came: WeightsInfo) -> None:
    """The average that was asked for is accepted."""
    Asked("r", target=target(**wished)).check("http://there", came)


@pytest.mark.parametrize(
    ("wished", "came"),
    [
        ({"sigma_rel": 0.1}, CAME),
        ({"sigma_rel": 0.12}, replace(CAME, target=None)),
        ({"sigma_rel": 0.12}, replace(CAME, schedule="constant")),
        ({"sigma_rel": 0.12}, replace(CAME, sigma_rel=None)),
        ({"sigma_rel": 0.12, "at": 8}, CAME),
        ({"sigma_rel": 0.12}, replace(CAME, run="other")),
        ({"decay": 0.999}, replace(CAME, schedule="constant", decay=0.9999, target="decay 0.9999")),
        ({"half_life": 50}, replace(CAME, schedule="half_life", half_life=51.0, target="half-life 51")),
        ({"window": (3, 9)}, replace(CAME, schedule="window", target="window 13:9")),
        ({}, CAME),
    ],
)
def test_what_came_is_another(wished: dict[str, Any], came: WeightsInfo) -> None:
    """Another average, another time, or none that was wished for, is refused: a proxy may have kept it."""
    asked = Asked("r", target=Target.of(wished, called="pull"))

    with pytest.raises(ProtocolError, match="instead of"):
        asked.check("http://there", came)


def test_a_snapshot_of_a_wished_average() -> None:
    """A snapshot may be of such an average, and is pulled as any other."""
    Asked("r", snapshot="best").check("http://there", replace(CAME, snapshot="best"))


@pytest.mark.parametrize(
    ("given", "made"),
    [
        (None, None),
        (False, None),
        (True, Posthoc()),
        (Posthoc(32), Posthoc(32)),
        ({}, Posthoc()),
        ({"snapshots": 8, "dtype": "BF16"}, Posthoc(8, "BF16")),
        ({"sigma_rel": [0.05, 0.1]}, Posthoc(sigma_rel=(0.05, 0.1))),
        ({"sigma_rel": (0.05, 0.1)}, Posthoc(sigma_rel=(0.05, 0.1))),
    ],
)
def test_posthoc(given: Any, made: Posthoc | None) -> None:
    """True is the default, and a mapping has the fields by name."""
    assert posthoc_of(given) == made


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (3, "no Posthoc"),
        ({"snapshot": 3}, "has no 'snapshot'"),
        ({"snapshots": 1}, "snapshots"),
        ({"snapshots": 16.0}, "snapshots"),
        ({"dtype": "F8"}, "dtype: 'F8'"),
        ({"sigma_rel": []}, "one or more"),
        ({"sigma_rel": 0.1}, "sigma_rel"),
        ({"sigma_rel": [0.1, 0.1]}, "different"),
        (Posthoc(sigma_rel=(0.1, 0.2887)), "too large"),
        (Posthoc(sigma_rel=(0.1, 0.5)), "sigma_rel"),
    ],
)
def test_posthoc_that_cannot_be(given: Any, says: str) -> None:
    """What the service would refuse is named before anything is asked."""
    with pytest.raises(UsageError, match=says):
        posthoc_of(given)
