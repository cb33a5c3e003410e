"""Reading weights: as a mapping, by slices, in halves over two connections, into a file; and watching for new versions.

Knows safetensors headers, ETags and ranges. Does not know sockets (http), or what an evaluator does with the weights.
"""

from __future__ import annotations
