"""Reading weights: as a mapping, by slices, over several connections, into a file; and watching for new versions.

The rule: everything here reads, and imports without torch: what fills tensors imports ``tensors`` when it is called.
Does not know sockets (http), or what an evaluator does with the weights.
"""

from __future__ import annotations
