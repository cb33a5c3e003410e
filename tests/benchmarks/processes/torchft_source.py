"""Process: torchft's HTTPTransport, offering one state dict in one chunk and in four.

``torchft_source BYTES CHUNKS...`` says ``listens on ADDRESS,ADDRESS,...``, one address for each number of chunks.

Knows torchft. Does not know our server.
"""

from __future__ import annotations

import signal
import sys
from datetime import timedelta

from torchft.checkpointing.http_transport import HTTPTransport

from ema_service.bench.traffic import make_state

STEP = 1
TIMEOUT = timedelta(seconds=120)


def main() -> None:
    state = make_state(int(sys.argv[1]))
    transports = [HTTPTransport(TIMEOUT, num_chunks=int(chunks)) for chunks in sys.argv[2:]]
    for transport in transports:
        transport.send_checkpoint([0], STEP, state, TIMEOUT)
    sys.stdout.write(f"listens on {','.join(transport.address() for transport in transports)}\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    main()
