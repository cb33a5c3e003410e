"""Addresses, names, limits and headers.

Knows: what each is called, and how many there may be. Does not know: what they are of.
"""

from __future__ import annotations

import re

__all__ = [
    "API",
    "DEFAULT_AVERAGE",
    "DEFAULT_DECAY",
    "DEFAULT_PORT",
    "DEFAULT_URL",
    "DIGEST_BYTES",
    "DIGEST_FOLLOWS",
    "HEADER_AMPLIFICATION",
    "HEADER_AVERAGE",
    "HEADER_COPIES",
    "HEADER_DECAY",
    "HEADER_DIGEST",
    "HEADER_KEY",
    "HEADER_LAYOUT",
    "HEADER_NUM_UPDATES",
    "HEADER_PROFILE_ERROR",
    "HEADER_PUSH",
    "HEADER_RECIPE",
    "HEADER_RUN",
    "HEADER_SEGMENT",
    "HEADER_SHARDS",
    "HEADER_STEP",
    "HEADER_TARGETS",
    "HEADER_VERSION",
    "HEADER_WRITER",
    "KEY_PATTERN",
    "MAX_AVERAGES",
    "MAX_HEADER_BYTES",
    "MAX_PARTS",
    "MAX_RANK",
    "MAX_STEP",
    "MAX_TENSORS",
    "MAX_TENSOR_NAME",
    "MAX_WAIT",
    "NAME_PATTERN",
    "NAME_RULE",
    "RAY_NAMESPACE",
    "is_name",
]

DEFAULT_URL = "http://127.0.0.1:8470"
DEFAULT_PORT = 8470
API = "/v1"

#: Where the actors of a cluster's hosts are in Ray, each of which has a method ``url``, of its gateway.
RAY_NAMESPACE = "ema-service"

#: The rule for names of runs, averages and snapshots: every such name is a plain file name.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
NAME_RULE = re.compile(NAME_PATTERN.replace("$", r"\Z"))

DEFAULT_AVERAGE = "ema"
DEFAULT_DECAY = 0.9999

#: Steps and counters fit a signed 64-bit integer, which SQLite and the languages of clients have.
MAX_STEP = 2**63 - 1
#: As the reference implementation of safetensors limits a header.
MAX_HEADER_BYTES = 100_000_000
MAX_TENSOR_NAME = 1024
MAX_TENSORS = 200_000
MAX_RANK = 32
MAX_AVERAGES = 16
#: The most parts that an update may come in.
MAX_PARTS = 65_536
#: The longest time for which a GET may wait for a step, in seconds.
MAX_WAIT = 60.0

HEADER_RUN = "Ema-Run"
HEADER_AVERAGE = "Ema-Average"
HEADER_VERSION = "Ema-Version"
HEADER_STEP = "Ema-Step"
HEADER_NUM_UPDATES = "Ema-Num-Updates"
HEADER_DECAY = "Ema-Decay"
#: Of an average that was worked out of snapshots: how far its profile is from the wished one, and by how much the
#: rounding of what was stored grew.
HEADER_PROFILE_ERROR = "Ema-Profile-Error"
HEADER_AMPLIFICATION = "Ema-Amplification"
#: Of a sweep: how many averages its body has.
HEADER_TARGETS = "Ema-Targets"
#: Of weights that one host of a cluster works out: how, for the other hosts.
HEADER_RECIPE = "Ema-Recipe"
#: Of a push: the writer's number, which attaching gave the trainer.
HEADER_WRITER = "Ema-Writer"
#: Of a push to one shard of a run on several hosts: any word, as of HEADER_KEY, the same for all shards' slices of one
#: update and in all tries.
HEADER_PUSH = "Ema-Push"
#: Of a slice, or a part of one, to a host with a twin: to how many of the two hosts it is sent.
HEADER_COPIES = "Ema-Copies"
#: Of weights that a gateway sends: on how many hosts the run lies.
HEADER_SHARDS = "Ema-Shards"
#: Of a body that is sent: what its digest is, and where. A service's answer has the digest itself, in hexadecimal.
HEADER_DIGEST = "Ema-Digest"
#: RunLayout.digest, with each stretch of an update, whose body does not say what its bytes are.
HEADER_LAYOUT = "Ema-Layout"
#: The digest's bytes follow the body's data.
DIGEST_FOLLOWS = "xxh3-128; follows"
DIGEST_BYTES = 16
#: Of a write that is no push: any word, the same in all tries of one call. A write is applied once for each key.
HEADER_KEY = "Idempotency-Key"
KEY_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
#: In place of a body: where in the memory of this host the body lies. See Segment.
HEADER_SEGMENT = "Ema-Segment"


def is_name(value: str) -> bool:
    """Whether ``value`` may name a run, an average or a snapshot."""
    return NAME_RULE.match(value) is not None
