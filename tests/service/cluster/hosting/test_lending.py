"""What a host lends its twin: to whoever has the cluster's token, and a run's version while its vote holds the run.

Knows the routes. Does not know what is copied.
"""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from ema_client.errors import Overloaded
from ema_service.cluster import ClusterToken, Proposal, Record, Seating, Term, Ticket, Vote
from ema_service.cluster.hosting.lending import lending_app
from ema_service.cluster.hosting.shard_run import check_held

TOKEN = ClusterToken("t" * 32)
HELD = Record(vote=Vote(Proposal(Ticket(3, None, "k"), "", seating=Seating(Term(1, "c"), 2)), "o"))


class Lender:
    """A host that lends one run of eight bytes while a vote of the key ``k`` holds it."""

    def lend_runs(self, _: str | None) -> list[dict[str, Any]]:
        return []

    def lend_averages(self, _: str, key: str) -> str:
        check_held(HELD, key)
        return "which"

    def lend_version(self, _: str, key: str) -> tuple[dict[str, Any], list[memoryview]]:
        check_held(HELD, key)
        return {"outcome": "o", "state": None}, [memoryview(b"01234567")]


@pytest.fixture
def http() -> TestClient:
    return TestClient(lending_app(Lender(), TOKEN))  # type: ignore[arg-type]


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer " + "u" * 32}])
@pytest.mark.parametrize(
    "path", ["/directory", "/runs/r?key=k", "/runs/r/averages?key=k", "/runs/r/snapshots", "/runs/r/snapshots/s/ema"]
)
def test_nothing_is_lent_without_the_token(http: TestClient, path: str, headers: dict[str, str]) -> None:
    """Weights are behind these routes."""
    assert http.get(path, headers=headers).status_code == 401


def test_a_run_is_lent_while_a_vote_holds_it(http: TestClient) -> None:
    """Under another key the run may move on while it is read."""
    headers = {"authorization": TOKEN.header}
    answer = http.get("/runs/r?key=k", headers=headers)
    head, _, data = answer.content.partition(b"\n")

    assert (answer.status_code, data[:8], len(data)) == (200, b"01234567", 8 + 16)
    assert b'"averages": [8]' in head
    assert http.get("/runs/r?key=other", headers=headers).status_code == 503
    assert http.get("/runs/r/averages?key=k", headers=headers).json() == {"averages": "which"}
    assert http.get("/runs/r/averages?key=other", headers=headers).status_code == 503


def test_a_record_without_the_vote_lends_nothing() -> None:
    """Also the vote for another proposal does not hold the run for the twin."""
    with pytest.raises(Overloaded):
        check_held(Record(), "k")
    assert check_held(Record(), None) is None
