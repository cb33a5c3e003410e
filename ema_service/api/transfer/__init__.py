"""Receiving and sending: connections of strangers, bodies read from the socket into place, weights sent from memory.

Knows sockets, transports, uvicorn's protocol class and deadlines. Does not know routes, or what the bytes mean.
"""

from __future__ import annotations
