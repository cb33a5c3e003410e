"""Publishing: EMA weights from the service to where people load models from: a folder, a bucket, the Hugging Face Hub.

The rule: weights pass through, and are never whole in memory or on this machine's disk. What is published loads as one
version or not at all.
"""

from __future__ import annotations

from ema_client.publishing.stores import Store
from ema_client.publishing.transaction import Published, publish

__all__ = ["Published", "Store", "publish"]
