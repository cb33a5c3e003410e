"""The account of updates: numbers, few lines of log, and one failure to raise."""

from __future__ import annotations

import logging

import pytest

from ema_client.errors import NonFinite, StaleStep
from ema_client.training.tally import Stats, Tally


def test_what_became_of_updates_is_counted() -> None:
    """Sent, left out, given up and refused updates add up."""
    tally = Tally("r")
    tally.sent(was_stuck=False)
    tally.sent(was_stuck=False)
    tally.skipped("busy")
    tally.given_up()
    tally.failed(5, NonFinite("NaN"))

    assert tally.stats == Stats(sent=2, skipped=2, failed=1)


def test_an_outage_is_told_in_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    """A hundred skipped updates are seven lines with the reason, and one that says how many when all is well again."""
    tally = Tally("r")
    with caplog.at_level(logging.WARNING, "ema_client"):
        for _ in range(100):
            tally.skipped("the service is away")
        tally.sent(was_stuck=True)

    *skips, again = caplog.messages
    assert [line.split()[1] for line in skips] == ["1", "2", "4", "8", "16", "32", "64"]
    assert all(line.endswith("skipped in a row; the service is away") for line in skips)
    assert again == "r: updates are applied again; 100 were skipped"


def test_one_failure_is_raised_and_the_others_counted() -> None:
    """The first failure since the latest call, with the step it is of and how many followed; then nothing."""
    tally = Tally("r")
    tally.raise_failure()
    tally.failed(1, NonFinite("NaN in w"))
    tally.failed(2, StaleStep("2 is old"))
    tally.failed(3, StaleStep("3 is old"))
    with pytest.raises(NonFinite, match="NaN in w") as raised:
        tally.raise_failure()
    tally.raise_failure()
    tally.failed(9, StaleStep("9 is old"))
    with pytest.raises(StaleStep) as later:
        tally.raise_failure()

    assert raised.value.__notes__ == ["update of step 1, r", "2 updates failed after it; see the log"]
    assert later.value.__notes__ == ["update of step 9, r"]
