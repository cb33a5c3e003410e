"""The routes: each checks what comes in, asks the one method that answers it, and says what the answer may be.

Knows FastAPI and the protocol. Does not know sockets (transfer), or how updates are decided, computed or kept.
"""

from __future__ import annotations
