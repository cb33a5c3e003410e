"""What a server says of itself while others keep it busy: the highest value that a gauge of ``/metrics`` reached.

Knows HTTP and Prometheus' text format as far as that needs. Does not know what the gauges mean.
"""

from __future__ import annotations

import http.client
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

__all__ = ["watched"]

#: Seconds between two looks: often enough for a push of a gigabyte, seldom enough not to keep the server busy.
PAUSE = 0.02
PATIENCE = 30.0


@contextmanager
def watched(url: str, gauges: Sequence[str]) -> Iterator[dict[str, float]]:
    """The highest values of the gauges while the block runs; complete after it."""
    highest = dict.fromkeys(gauges, 0.0)
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(url, highest, over), name="watch-metrics")
    thread.start()
    try:
        yield highest
    finally:
        over.set()
        thread.join()


def _watch(url: str, highest: dict[str, float], over: threading.Event) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    try:
        while not over.wait(PAUSE):
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
            for gauge in highest:
                found = re.search(rf"^{gauge} (\S+)$", text, re.MULTILINE)
                highest[gauge] = max(highest[gauge], float(found[1]) if found else 0.0)
    finally:
        connection.close()
