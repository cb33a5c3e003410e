"""A trainer's side: which tensors are averaged, how they are copied and sent, and what a checkpoint keeps of the EMA.

Knows modules, optimizers, ranks and threads. Does not know HTTP (http), or how weights are read (reading).
"""

from __future__ import annotations
