"""``--twins`` on the command line: what is refused, and which host is whose twin.

Knows flags. Does not know processes (test_twins).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ema_service.cli import app
from ema_service.cluster.launching.launcher import Plan
from ema_service.cluster_cli import _with_twins, cluster

REASON = "no third host would know"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["up", "--local", "1", "--twins"], REASON),
        (["up", "--hosts", "a,b,c", "--twins"], REASON),
        (["up", "--hosts", "a,b", "--twins"], REASON),
        (["up", "--ray", "auto", "--shards", "1", "--twins"], REASON),
    ],
)
def test_up_refuses(words: list[str], said: str) -> None:
    """Too few hosts; before anything is started."""
    result = CliRunner().invoke(cluster, words, env={"COLUMNS": "400"})

    assert (result.exit_code, said in result.output) == (2, True), result.output


@pytest.mark.parametrize("shard", ["0/3", "1/2"])
def test_serve_refuses(shard: str) -> None:
    """A host of hosts that are no pairs, or of one pair alone."""
    words = ["serve", "--shard", shard, "--twins", "--coordinator", "http://c:1", "--cluster-token-file"]
    result = CliRunner().invoke(app, [*words, __file__], env={"COLUMNS": "400"})

    assert result.exit_code != 0


def test_the_later_half_are_twins() -> None:
    """Of machines that are named; here each host is started twice."""
    assert _with_twins(["a", "b", "c", "d"], given=True) == ["a", "b", "c", "d"]
    assert _with_twins([None, None], given=False) == [None] * 4
    plan = Plan(Path("f"), [None] * 4, "127.0.0.1", 0, twins=True, replicas=2)
    assert [*plan.followed] == [0, 1]
    assert [*replace(plan, twins=False).followed] == [0, 1, 2, 3]
