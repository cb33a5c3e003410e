"""``python -m paced serve ... RATES``: the service, whose connections are paced as clouds pace single flows.

RATES: megabytes a second, separated by commas, dealt out to the connections in turns; 0 is not paced. Each connection
gets one for what the service sends; what the service receives is paced by the sender.

Linux paces a socket by itself (SO_MAX_PACING_RATE), over loopback too, and without privileges. Knows sockets. Does not
know what is measured.
"""

from __future__ import annotations

import itertools
import socket
import sys

from ema_service.cli import main

__all__ = ["SO_MAX_PACING_RATE", "dealt"]

#: Linux' number for the option, for which Python has no name.
SO_MAX_PACING_RATE = 47


def dealt(rates: str) -> itertools.cycle[int]:
    """Bytes a second of one connection after the other."""
    return itertools.cycle([int(float(rate) * 1e6) for rate in rates.split(",")])


class _Paced(socket.socket):
    def accept(self) -> tuple[socket.socket, object]:
        connection, address = super().accept()
        if rate := next(_RATES):
            connection.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, rate)
        return connection, address


if __name__ == "__main__":
    # Behind the other arguments.
    _RATES = dealt(sys.argv.pop())
    socket.socket = _Paced  # type: ignore[misc]
    main()
