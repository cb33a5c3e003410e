"""What a callback takes for its RemoteEma, so that no framework's callback offers less than RemoteEma does.

Knows: the names and types of RemoteEma's options. Does not know: what they mean (RemoteEma says so), frameworks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, get_args

import torch

from ema_client.errors import UsageError
from ema_client.protocol import AverageConfig, DecayPer, Durability, Posthoc
from ema_client.reading.loggers import LogTo
from ema_client.remote_ema import BusyPolicy
from ema_client.training.selection import BufferPolicy, FrozenPolicy

__all__ = ["OutagePolicy", "RemoteEmaOptions", "check_names", "check_policy"]

#: What a callback does where the service is away, or refuses: warn and train on, or raise the error.
OutagePolicy = Literal["warn", "raise"]


class RemoteEmaOptions(TypedDict, total=False):
    """RemoteEma's options, all but those that a callback has by name; each as RemoteEma describes it.

    log_to: or "trainer": to whatever the framework's Trainer logs to.
    """

    schedule: AverageConfig | None
    averages: Sequence[AverageConfig] | None
    posthoc: Posthoc | Mapping[str, Any] | bool | None
    update_every: int
    decay_per: DecayPer
    on_busy: BusyPolicy
    push_dtype: str | torch.dtype | None
    borrow: bool
    frozen: FrozenPolicy
    buffers: BufferPolicy
    lanes: int | None
    durability: Durability | None
    log_to: LogTo | None
    use_num_upates: bool | None


def check_names(options: Mapping[str, Any]) -> None:
    """Raises TypeError, as Python does, for an option that RemoteEma does not have."""
    for name in options:
        if name not in RemoteEmaOptions.__annotations__:
            raise TypeError(f"RemoteEmaCallback() got an unexpected keyword argument {name!r}")


def check_policy(on_unreachable: str) -> None:
    """Raises UsageError for a policy that there is not."""
    if on_unreachable not in get_args(OutagePolicy):
        raise UsageError(f"on_unreachable={on_unreachable!r} is unknown", hint="give 'warn' or 'raise'")
