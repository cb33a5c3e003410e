"""Bodies: byte streams of tensors, coming in (whole updates, slices of one) and going out.

Knows safetensors streams, layouts and memory. Does not know runs, sockets or the event loop.
"""

from __future__ import annotations

from ema_service.bodies.incoming import Body, UpdateBody
from ema_service.bodies.outgoing import WeightsStream

__all__ = ["Body", "UpdateBody", "WeightsStream"]
