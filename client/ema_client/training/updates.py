"""An update between making and sending: a body, and who owns the body's memory until when.

Knows what the making thread and the sending thread owe each other. Does not know tensors, HTTP, or how threads wait.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ema_client.http.body import Body

__all__ = ["Update"]


@dataclass(frozen=True, slots=True)
class Update:
    """The parameters as of ``step``, to be sent; without a step, the initial weights given anew.

    body: its memory belongs to the sender, and must not change, until the sender calls ``done``. ready: called in the
    sending thread; waits until the body's bytes are in the memory. done: gives the memory back. borrowed: whether the
    memory is the model's own, which the model needs back before the parameters change.
    """

    step: int | None
    body: Body
    ready: Callable[[], None]
    done: Callable[[], None]
    borrowed: bool = False

    @property
    def what(self) -> str:
        """The update in words."""
        return "the set of initial weights" if self.step is None else f"step {self.step}"
