"""The parts that paths have in common.

Knows what a name may be. Does not know which routes there are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import Path

from ema_client.protocol import API, NAME_PATTERN

__all__ = ["RUN", "STEP", "AverageName", "Route", "RunName", "SnapshotName"]

#: The path of a run, and that of an update below it.
RUN, STEP = f"{API}/runs/{{run}}", "/updates/{step:int}"
#: Method, path and answer.
Route = tuple[str, str, Callable[..., Any]]
RunName = Annotated[str, Path(pattern=NAME_PATTERN)]
AverageName = Annotated[str, Path(pattern=NAME_PATTERN)]
SnapshotName = Annotated[str, Path(pattern=NAME_PATTERN)]
