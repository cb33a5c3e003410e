"""Which weights a request asks for, and whether those that came are the same.

Knows: the routes of weights, which of a call's arguments exclude each other, and what a stream says of itself. Does not
know: sockets, streams, tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ema_client import protocol
from ema_client.arguments import named
from ema_client.errors import ProtocolError, UsageError
from ema_client.protocol import WeightsInfo
from ema_client.targets import Target

__all__ = ["Asked"]

#: Seconds for which the service may look for the weights of an average's snapshots before it answers: of ten million
#: updates this takes 1.4 s, and where the average is refused, and another looked for, several times that.
_WORK_SECONDS = 50.0


@dataclass(frozen=True, slots=True)
class Asked:
    """Weights to ask for.

    average: None for the run's first. snapshot: None for the current weights. soup: NAME:WEIGHT of snapshots, with
    commas in between, for the sum of these. target: an average that is worked out of the run's ring. dtype: as
    safetensors writes it, None for the shadow's own. prefix: of tensor names. min_step: not before the run has reached
    this step. recipe: how one host has said that the target is worked out, for the other hosts.
    """

    run: str
    average: str | None = None
    snapshot: str | None = None
    soup: str | None = None
    target: Target | None = None
    dtype: str | None = None
    prefix: str | None = None
    min_step: int | None = None
    recipe: str | None = None

    @classmethod
    def of(
        cls,
        run: str,
        average: str | None,
        snapshot: str | None,
        soup: Mapping[str, float] | None = None,
        target: Target | None = None,
    ) -> Asked:
        """The weights that arguments of a user's call name. soup: snapshot -> weight.

        Raises UsageError for what cannot be a name, and for arguments that exclude each other.
        """
        if target is not None:
            for other, hint in (
                (average, f"leave the average out: {target} is worked out of all of the ring"),
                (snapshot, "give the snapshot as at=, for the average as of that time"),
                (soup, "give one of the two"),
            ):
                if other is not None:
                    raise UsageError(f"{target} is wished for, and {other!r} too", hint=hint)
            return cls(named(run, "run"), target=target)
        if soup is None:
            return cls(named(run, "run"), average, None if snapshot is None else named(snapshot, "snapshot"))
        if snapshot is not None:
            raise UsageError("both a snapshot and a soup are given", hint="give one: a soup names its snapshots")
        said = ",".join(f"{named(name, 'snapshot')}:{float(weight)!r}" for name, weight in soup.items())
        return cls(named(run, "run"), average, soup=said)

    @property
    def path(self) -> str:
        """The route of these weights."""
        if self.snapshot is None:
            return protocol.weights_path(self.run)
        return protocol.snapshot_weights_path(self.run, self.snapshot)

    @property
    def query(self) -> dict[str, str | int | float | None]:
        """What says which of the weights on the route, without ``min_step``."""
        soup = {} if self.soup is None else {"soup": self.soup}
        target = {} if self.target is None else self.target.query
        recipe = {} if self.recipe is None else {"recipe": self.recipe}
        return {"average": self.average, "dtype": self.dtype, "prefix": self.prefix, **soup, **target, **recipe}

    @property
    def work_seconds(self) -> float:
        """Seconds that the service may work in silence before its answer begins."""
        return 0.0 if self.target is None else _WORK_SECONDS

    @property
    def is_stored(self) -> bool:
        """Whether the service has these weights, and does not work them out while it sends them."""
        return self.soup is None and self.target is None

    @property
    def is_hosted(self) -> bool:
        """Whether every host of the run has its rows of these weights: all of the current ones, or of what the hosts
        work out of their rings."""
        return self.soup is None and self.snapshot is None and self.prefix is None

    @property
    def without_step(self) -> Asked:
        """The same weights at any step."""
        return replace(self, min_step=None)

    def check(self, url: str, came: WeightsInfo) -> None:
        """Raises ProtocolError, naming ``url``, unless the weights that came are those asked for."""
        pairs = {"run": (self.run, came.run), "snapshot": (self.snapshot, came.snapshot)}
        if self.average is not None:
            pairs["average"] = self.average, came.average
        faults = [f"{name} {theirs!r} instead of {ours!r}" for name, (ours, theirs) in pairs.items() if theirs != ours]
        if (self.soup is None) != (came.soup is None):
            faults.append("a soup instead of weights" if came.soup else "weights instead of a soup")
        if self.target is not None:
            faults.extend(self.target.faults(came))
        elif came.target is not None and self.snapshot is None:
            faults.append(f"{came.target} instead of an average of the run")
        if self.min_step is not None and (came.step is None or came.step < self.min_step):
            faults.append(f"step {came.step} instead of {self.min_step} or later")
        if faults:
            raise ProtocolError(
                f"{url} sent {', '.join(faults)}",
                hint="look at what stands between this client and the service: a proxy may keep answers",
            )
