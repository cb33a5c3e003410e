"""HTTP to one service: addresses, connections and their pool, retries, and memory shared with a service on this host.

Knows bytes, sockets and HTTP/1.1. Does not know tensors, runs, or what a route means.
"""

from __future__ import annotations
