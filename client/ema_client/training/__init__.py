"""A trainer's side: which tensors are averaged, how they are copied and sent, and what a checkpoint holds of the EMA.

The rule: everything here serves RemoteEma and asks the service through EmaClient. Does not know routes, sockets, or how
weights are read.
"""

from __future__ import annotations
