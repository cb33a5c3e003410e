"""EMA checkpoints of other programs: read into named tensors for a run, written so that the programs load them.

The rule: files and tensors only. Does not know the service: the caller sends what was read, and pulled what is written.
"""

from __future__ import annotations

from ema_client.checkpoints.distances import Difference, difference
from ema_client.checkpoints.parameters import Parameters, read_parameters
from ema_client.checkpoints.reading import Imported, read
from ema_client.checkpoints.writing import write

__all__ = ["Difference", "Imported", "Parameters", "difference", "read", "read_parameters", "write"]
