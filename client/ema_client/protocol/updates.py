"""Bodies of updates, and where one lies in shared memory.

Knows: fields. Does not know: JSON (checked), how a segment is made.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ema_client.protocol.fields import Count, Counter, Decay, Step, Text, UpdateState, Version
from ema_client.protocol.words import HEADER_SEGMENT

__all__ = [
    "SECRET_BYTES",
    "SEGMENT_NAME",
    "Segment",
    "SliceDigest",
    "UpdateResult",
    "UpdateStatus",
]

#: A segment's name for memfd_create(2), and the length of the secret that the segment begins with.
SEGMENT_NAME = "ema-push"
SECRET_BYTES = 32
_SEGMENT = re.compile(
    r"pid=(\d{1,10}), fd=(\d{1,10}), offset=(\d{1,19}), length=(\d{1,19}), secret=([0-9a-f]{64})\Z", re.ASCII
)


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """The answer to an update. ``applied`` is False where the same bytes had been applied at that step before."""

    applied: bool
    step: Step
    num_updates: Counter
    effective_decay: Decay | None
    version: Version
    durable_step: Step | None


@dataclass(frozen=True, slots=True)
class SliceDigest:
    """The digest of what one host has of an update's parameters: of so many bytes of their data, as one body's."""

    bytes: Count
    digest: Text


@dataclass(frozen=True, slots=True)
class UpdateStatus:
    """What the server knows of a step. ``parts`` lists the parts of a staged update that have come.

    digest: of the parameters, as ``Ema-Digest`` has it, 32 hexadecimal digits; of the run's latest update only.
    digests: in its place, of a run on several hosts: of each host's slice of the data, in the data's order.
    """

    step: Step
    state: UpdateState
    parts: tuple[Count, ...] = ()
    digest: Text | None = None
    digests: tuple[SliceDigest, ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """Where a body lies in shared memory: ``length`` bytes from ``offset`` on, in descriptor ``fd`` of process ``pid``.

    secret: the bytes that the segment begins with for as long as it holds the body of this request.
    """

    pid: int
    fd: int
    offset: int
    length: int
    secret: bytes

    def to_header(self) -> str:
        """The segment as the value of ``Ema-Segment``."""
        numbers = f"pid={self.pid}, fd={self.fd}, offset={self.offset}, length={self.length}"
        return f"{numbers}, secret={self.secret.hex()}"

    @classmethod
    def from_header(cls, value: str) -> Segment:
        """The segment that to_header() wrote. Raises ValueError on anything else."""
        match = _SEGMENT.match(value)
        if match is None:
            raise ValueError(f"{HEADER_SEGMENT} is not `pid=N, fd=N, offset=N, length=N, secret=HEX`")
        pid, fd, offset, length = map(int, match.groups()[:4])
        return cls(pid, fd, offset, length, bytes.fromhex(match[5]))
