"""What ranks know before they are a group, and what becomes of one rank's error. Knows no model and no service."""

from __future__ import annotations

from typing import Any

import pytest

from ema_client.errors import EmaError, UsageError
from ema_client.training.ranks import may_be_later_rank, together


@pytest.mark.parametrize(
    ("environment", "later"),
    [
        ({}, False),
        ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, False),
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, True),
        # The first process of the second host.
        ({"RANK": "8", "LOCAL_RANK": "0"}, True),
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, True),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, True),
        ({"NODE_RANK": "0"}, False),
        ({"SLURM_PROCID": "0"}, False),
        ({"SLURM_PROCID": "3"}, True),
        ({"RANK": "0", "SLURM_PROCID": "3"}, False),
        ({"OMPI_COMM_WORLD_RANK": "1"}, True),
    ],
)
def test_launchers(environment: dict[str, str], later: bool) -> None:
    """Each launcher's own words for a process that is not the first."""
    assert may_be_later_rank(environment) == later


def test_any_error_is_told_to_the_others() -> None:
    """What one rank raises, be it no error of ours, others raise as an EmaError that names the rank."""
    told: list[Any] = []

    def first_of_two(fault: Any) -> list[Any]:
        told.append(fault)
        return [fault, None]

    def fails() -> None:
        raise ZeroDivisionError("by zero")

    with pytest.raises(ZeroDivisionError):
        together(fails, gather=first_of_two)
    with pytest.raises(EmaError, match="ZeroDivisionError: by zero") as caught:
        together(lambda: None, gather=lambda _: told)
    assert caught.value.__notes__ == ["on rank 0"]

    def refuses() -> None:
        raise UsageError("no")

    with pytest.raises(UsageError) as refused:
        together(refuses, gather=lambda _: [None, UsageError("no")])
    assert refused.value.__notes__ == ["on rank 1"]
