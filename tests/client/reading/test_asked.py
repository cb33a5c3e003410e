"""The check that weights which came are those asked for, alone and in pulls through something that mixes answers up.

Knows the real service, and a transport that asks it for other weights. Does not know sockets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ema_client import EmaClient
from ema_client.errors import ProtocolError
from ema_client.http.downloads import Download
from ema_client.http.transport import Transport
from ema_client.protocol import WeightsInfo, weights_path
from ema_client.reading.asked import Asked
from ema_client.reading.pulls import Pulls
from ema_client.reading.slices import Wanted
from ema_client.reading.to_file import save

CAME = WeightsInfo("r", "ema", "1.3", 3, 3, 0.9, snapshot="s")


@pytest.mark.parametrize(
    ("asked", "fault"),
    [
        (Asked("r", snapshot="s"), ""),
        (Asked("r", "ema", "s", min_step=3), ""),
        (Asked("other", snapshot="s"), "run 'r' instead of 'other'"),
        (Asked("r", "fast", "s"), "average 'ema' instead of 'fast'"),
        (Asked("r"), "snapshot 's' instead of None"),
        (Asked("r", snapshot="t"), "snapshot 's' instead of 't'"),
        (Asked("r", snapshot="s", min_step=4), "step 3 instead of 4 or later"),
    ],
)
def test_each_difference_is_told(asked: Asked, fault: str) -> None:
    """Run, average, snapshot and step are compared; what was left open fits whatever came."""
    if not fault:
        asked.check("http://there", CAME)
        return
    with pytest.raises(ProtocolError, match="http://there") as raised:
        asked.check("http://there", CAME)
    assert fault in raised.value.detail


def test_no_step_at_all() -> None:
    """Weights of a run without steps are not those of a step asked for."""
    with pytest.raises(ProtocolError, match="step None instead of 1"):
        Asked("r", min_step=1).check("http://there", replace(CAME, step=None, snapshot=None))


class Mixing(Transport):
    """Asks for the weights of ``run`` in place of those asked for."""

    run: str | None = None

    def download(self, path: str, **how: Any) -> Download:
        return super().download(path if self.run is None else weights_path(self.run), **how)


@pytest.fixture
def mixing(server: Any) -> Iterator[Mixing]:
    transport = Mixing(server.url)
    yield transport
    transport.close()


CALLS: dict[str, Callable[[Mixing, str, Path], object]] = {
    "pull": lambda transport, run, _: Pulls(transport).pull(Asked(run)),
    "pull into": lambda transport, run, _: Pulls(transport).pull(Asked(run), {"w": torch.zeros(4)}),
    "slices": lambda transport, run, _: Pulls(transport).pull_slices(
        Asked(run), {"w": Wanted((4,), (((0, 2),),), torch.zeros(2))}
    ),
    "download": lambda transport, run, folder: save(transport, Asked(run), folder / "w.safetensors", None),
}


@pytest.mark.parametrize("call", CALLS)
def test_another_runs_answer(client: EmaClient, mixing: Mixing, run_name: str, tmp_path: Path, call: str) -> None:
    """Whatever hands out another run's weights, the caller is told, and keeps what it had."""
    client.create_run(run_name, {"w": torch.ones(4)})
    client.create_run(f"{run_name}-2", {"w": torch.full((4,), 2.0)})
    CALLS[call](mixing, run_name, tmp_path)
    mixing.run = f"{run_name}-2"
    (tmp_path / "w.safetensors").write_text("before")
    with pytest.raises(ProtocolError, match="instead of"):
        CALLS[call](mixing, run_name, tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]
