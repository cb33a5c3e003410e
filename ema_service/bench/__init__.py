"""``ema-service bench``: how fast this service is on the user's own machine or link.

    play.py       the order of events: server, runs, rounds, table; cleaning up however it ends
    sizes.py      push, pull into tensors that are there, pull into new ones, at several sizes, over several links
    traffic.py    one run on a service, and the three things done with it
    ceiling.py    what the machine's own sockets give, to stand beside
    sink.py       process: the receiving end of those
    rounds.py     all operations in turn, round after round
    rows.py       figures, comparisons, what is demanded; no I/O
    fit.py        time = a + bytes / b
    screen.py     the table on screen, and the same as JSON
    machine.py    what it was measured on
    children.py   processes that cannot outlive the benchmark

Knows the order of its parts. Does not know the server: it is started by its command line and spoken to with the public
client, as a user would. The server imports nothing of this. ``tests/benchmarks`` builds on these parts.
Nothing is imported here: the sink is a process that must not wait for torch.
"""

from __future__ import annotations
