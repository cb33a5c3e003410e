"""The trainer's and evaluator's side of the remote EMA shadow-weight service.

``RemoteEma`` stands in for LitEma in a training loop; ``EmaClient`` is everything else over HTTP; ``errors`` holds what
both raise. The import of this package needs httpx2 only: torch is imported with the first call that handles tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ema_client import errors
from ema_client.client import EmaClient
from ema_client.errors import EmaError
from ema_client.http.retry import RetryPolicy
from ema_client.protocol import (
    AverageConfig,
    Posthoc,
    ProfileInfo,
    RunEvent,
    RunInfo,
    SnapshotInfo,
    UpdateResult,
    WeightsInfo,
)
from ema_client.reading.weights import Weights

if TYPE_CHECKING:
    from ema_client.remote_ema import RemoteEma

__version__ = "0.1.0"

__all__ = [
    "AverageConfig",
    "EmaClient",
    "EmaError",
    "Posthoc",
    "ProfileInfo",
    "RemoteEma",
    "RetryPolicy",
    "RunEvent",
    "RunInfo",
    "SnapshotInfo",
    "UpdateResult",
    "Weights",
    "WeightsInfo",
    "__version__",
    "errors",
]


def __getattr__(name: str) -> object:
    if name != "RemoteEma":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from ema_client.remote_ema import RemoteEma
    except ModuleNotFoundError as missing:
        if missing.name != "torch":
            raise
        raise ImportError("RemoteEma needs torch: pip install torch xxhash") from None
    return RemoteEma
