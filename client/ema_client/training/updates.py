"""An update between its making and its sending: a body, and who owns the body's memory until when.

Knows what the thread that makes an update and the thread that sends it owe each other. Does not know tensors, HTTP, or
threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ema_client.http.body import Body

__all__ = ["Update"]


@dataclass(frozen=True, slots=True)
class Update:
    """The parameters as of ``step``, to be sent.

    body: the sender owns its memory until the sender calls ``done``; the memory must not change before. ready: called
    in the sending thread; waits until the body's bytes are in the memory. done: gives the memory back. borrowed:
    whether the memory is the model's own, which the model needs back before its parameters change.
    """

    step: int
    body: Body
    ready: Callable[[], None]
    done: Callable[[], None]
    borrowed: bool = False
