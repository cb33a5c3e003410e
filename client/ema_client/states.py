"""The states that a user's calls send, as bodies: mappings from name to tensor, modules, and slices of either.

Knows: which of a state's forms is sent how, and that torch may be missing. Does not know: how tensors become bytes
(tensors), where bodies go. Imports torch where a call has a state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ema_client.errors import UsageError
from ema_client.http.body import Body
from ema_client.reading.checking import Progress
from ema_client.wire import Box

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = Mapping[str, Tensor] | nn.Module

__all__ = ["body_of", "part_body_of", "require_torch"]


def require_torch() -> None:
    """Raises UsageError where torch is not installed."""
    if find_spec("torch") is None:
        raise UsageError("this call handles tensors and torch is not installed", hint="pip install torch xxhash")


def body_of(state: State, progress: Progress | None = None) -> Body:
    """The body of checked tensors: their own memory. Raises UsageError for a state that cannot be sent."""
    from ema_client.tensors.body import encode
    from ema_client.tensors.layout import state_of
    from ema_client.tensors.shared import SharedState

    body = state.body.of_another_push() if isinstance(state, SharedState) else encode(state_of(state))
    return body if progress is None else replace(body, moved=lambda sent: progress(min(sent, body.length), body.length))


def part_body_of(state: Mapping[str, Tensor], slices: Mapping[str, Sequence[Box]]) -> Body:
    """The body of slices of tensors, as for EmaClient.push_part(). Raises UsageError, also where torch is missing."""
    require_torch()
    from ema_client.tensors.body import encode
    from ema_client.tensors.layout import state_of

    # A rank that has no element sends an empty part all the same.
    return encode(state_of(state) if state else {}, slices)
