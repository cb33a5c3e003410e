"""The flags of ``cluster up --ray``, and URLs of clusters on Ray, where Ray need not be installed: what is refused.

Knows the command line and URLs. Does not know Ray (test_on_ray).
"""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

import ema_service.cluster.launching
from ema_client import EmaClient
from ema_client.errors import UsageError
from ema_service.cluster_cli import cluster

LOOPBACK = ["up", "--ray", "auto", "--shards", "2", "--host", "127.0.0.1"]


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray is not installed, whether it is or not."""
    found = builtins.__import__

    def importing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "ray":
            raise ModuleNotFoundError(f"No module named {name!r}", name="ray")
        return found(name, *args, **kwargs)

    for name in ("ray", "ema_service.cluster.launching.ray_launcher"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(ema_service.cluster.launching, "ray_launcher", raising=False)
    monkeypatch.setattr(builtins, "__import__", importing)


@pytest.mark.usefixtures("without_ray")
@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["up", "--ray", "auto"], 2, "--shards 3"),
        (["up", "--shards", "2"], 2, "--shards 3"),
        (["up", "--ray", "auto", "--shards", "2", "--local", "2"], 2, "--shards 3"),
        (["up", "--ray", "auto", "--shards", "2"], 1, "--token-file"),
        ([*LOOPBACK, "--name", "a b"], 2, "is no name such as ema"),
        ([*LOOPBACK, "--resource", "ema_host"], 2, "ema_host=1"),
        ([*LOOPBACK, "--memory", "much"], 2, "--memory"),
        (LOOPBACK, 1, "pip install 'ray>=2.50'"),
        ([*LOOPBACK, "--twins"], 1, "pip install 'ray>=2.50'"),
        ([*LOOPBACK, "--replicas", "2"], 1, "pip install 'ray>=2.50'"),
        (["up", "--ray", "auto", "--shards", "2", "--", "--insecure-no-auth"], 1, "pip install 'ray>=2.50'"),
        (["down"], 1, "pip install 'ray>=2.50'"),
    ],
)
def test_flags_that_cannot_be_meant(words: list[str], status: int, said: str) -> None:
    """Are refused before Ray is asked, and Ray where it is not there."""
    done = CliRunner().invoke(cluster, words, env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == status, done.output
    assert said in done.output


@pytest.mark.usefixtures("without_ray")
def test_a_name_needs_ray() -> None:
    """Where Ray is not installed a client says so at once: no later try would find it."""
    with pytest.raises(UsageError, match="not installed"):
        EmaClient("ray://ema")


def test_a_name_that_cannot_be_meant() -> None:
    """Refused before anything is asked."""
    with pytest.raises(UsageError, match="names no cluster"):
        EmaClient("ray://host:10001")
