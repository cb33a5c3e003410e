"""What a server loads before it does anything, imported by the process that servers are forked from (forked.py).

A fork keeps one thread only, so nothing here may begin any: modules are imported, and the averaging loops loaded. (The
threads of numpy's OpenBLAS are begun anew by itself.) Knows which modules ``ema-service serve`` needs. Does not know
processes.

torch is loaded as well, which a server loads with the first run that needs it: many tests have such a run.
"""

from __future__ import annotations

import ema_service.api.server
import ema_service.averaging.by_torch
import ema_service.cli
import ema_service.storage
from ema_service.averaging import fused

__all__ = ["ema_service"]

fused.prepare()
fused.prepare_measuring()
