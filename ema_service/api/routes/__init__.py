"""The routes: each checks its request, calls the one method that answers it, and documents the possible answers.

Knows FastAPI and the protocol. Does not know sockets (transfer), or how updates are decided, computed or kept.
"""

from __future__ import annotations
