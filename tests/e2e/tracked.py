"""A run and what it must be: LitEma fed with every acknowledged update, once.

Knows plain HTTP and LitEma. Does not know processes, or how a run is kept.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tests.conftest import LitEmaOracle, PlainRun

AVERAGES = [{"name": "slow"}, {"name": "fast", "decay": 0.5}]
#: Large enough to come, and to be written, in several parts.
SHAPE = (700, 1000)
#: Large enough to be received, and to be written, by threads of their own.
LARGE = (4500, 1000)


def params(step: int, shape: tuple[int, int] = SHAPE) -> dict[str, Tensor]:
    return {"w": torch.randn(shape, generator=torch.Generator().manual_seed(step)), "s": torch.tensor(float(step))}


class Tracked:
    """A run and what it must be: LitEma fed with every acknowledged update, once."""

    def __init__(
        self, run: PlainRun, litema: type[LitEmaOracle], durability: str, shape: tuple[int, int] = SHAPE
    ) -> None:
        self.run = run
        self.step = 0
        self.params = partial(params, shape=shape)
        self._litema = litema
        self._late: dict[str, float] = {}
        self._oracles = {"slow": litema(self.params(0)), "fast": litema(self.params(0), decay=0.5)}
        run.create(self.params(0), averages=AVERAGES, durability=durability).raise_for_status()
        run.begin(self.params(0)).raise_for_status()

    def push(self) -> dict[str, Any]:
        """The next step; raises what httpx raises if the server dies of it."""
        answer = self.run.push(self.step + 1, self.params(self.step + 1)).raise_for_status().json()
        assert (answer["applied"], answer["durable_step"]) == (True, self.step + 1)
        self.applied()
        return dict(answer)

    def applied(self) -> None:
        self.step += 1
        for oracle in self._oracles.values():
            oracle.update(self.params(self.step))
        for name, decay in self._late.items():
            self._oracles[name] = self._litema(self.params(self.step), decay)
        self._late.clear()

    def added(self, name: str, decay: float) -> None:
        """The run has one more average, which begins with the next update."""
        self._late[name] = decay

    def removed(self, name: str) -> None:
        """The run has an average less."""
        del self._oracles[name]

    def check(self) -> None:
        """The run is what it must be, to the bit, in the epoch it began in."""
        info = self.run.info()
        version = f"1.{self.step}"
        expected = ("ready", self.step or None, self.step or None, self.step, version)
        assert tuple(info[key] for key in ("status", "step", "durable_step", "num_updates", "version")) == expected
        assert {each["name"] for each in info["averages"]} == {*self._oracles, *self._late}
        for name, oracle in self._oracles.items():
            weights = self.run.weights(average=name)
            assert all(torch.equal(weights[each], value) for each, value in oracle.shadow.items())
