"""HTTP to one service: addresses, connections and their pool, bodies, retries, and memory shared with a service.

The rule: everything here is bytes, sockets and HTTP/1.1; of the client nothing but ``protocol`` and ``errors`` is used.
Does not know tensors, runs, or what a route means.
"""

from __future__ import annotations
