"""A trainer that kills itself with SIGKILL in the middle of its initial weights: ``halfway.py URL RUN DECAY``."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from typing import Any

from torch import nn

import ema_client.client as module
from ema_client import RemoteEma

whole = module.body_of


def killing(*words: Any) -> module.Body:
    """The body, at whose second portion the process is gone."""
    return replace(whole(*words), moved=lambda _: os.kill(os.getpid(), signal.SIGKILL))


module.body_of = killing
RemoteEma(nn.Linear(1 << 22, 2), float(sys.argv[3]), run=sys.argv[2], url=sys.argv[1])
