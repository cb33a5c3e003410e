"""``ema-service bench``: how fast this service is on the user's own machine or link.

    play.py       the order of events: server, runs, rounds, table; cleaning up however the benchmark ends
    sizes.py      push, pull into existing tensors, pull into new ones, at several sizes, over several links
    traffic.py    one run on a service, and these three operations on it
    ceiling.py    the rate of the machine's own sockets, to compare with
    sink.py       process: the receiving end of those sockets
    rounds.py     all operations in turn, round after round
    rows.py       figures, comparisons, bounds; no I/O
    fit.py        time = a + bytes / b
    screen.py     the table on screen, and the same as JSON
    machine.py    the machine that the figures are of
    children.py   processes that cannot outlive the benchmark

The benchmark starts the server by its command line and speaks to it with the public client, as a user would. The server
imports nothing of it; ``tests/benchmarks`` builds on these parts. This file imports nothing: the sink is a process that
must not wait for torch.

Knows the order of its parts. Does not know the server.
"""

from __future__ import annotations
