"""EMA checkpoints of other programs: read into what a run is made of, written so that those programs load them.

Knows its two halves. Does not know the service: what was read is sent, and what is written was pulled, by others.
"""

from __future__ import annotations

from ema_client.checkpoints.reading import Imported, read
from ema_client.checkpoints.writing import write

__all__ = ["Imported", "read", "write"]
