"""How much each group measures: the full comparison, or a quick look that shows that everything runs.

Knows numbers. Does not know what they are used for beyond this text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["FULL", "QUICK", "Scale"]


@dataclass(frozen=True, slots=True)
class Scale:
    """rounds: figures for each row.

    wire_bytes: what crosses the wire at once, in 256 tensors. flat_bytes: the flat tensor of the kernel group.
    gpt2_width: of the GPT-2-shaped model; 768 makes the 124 M parameters of GPT-2 small.
    small_bytes, small_repeats: the push of the latency group, and how many in a row give a round's median.
    readers, reader_bytes: how many pull one version at once, and its size.
    growth_bytes, growth_pushes, growth_warm: pushes after which the server should be as large as before; counted from
    the push ``growth_warm`` on.
    gap_steps: of the training that is followed with gaps. history_updates: of the run whose history is told.
    large_width, large_tensors: of the model of the group large, whose tensors are square; large_updates, large_pause:
    how many updates, and seconds between them.
    """

    rounds: int = 5
    wire_bytes: int = 1 << 30
    flat_bytes: int = 256 << 20
    gpt2_width: int = 768
    small_bytes: int = 100_000
    small_repeats: int = 100
    readers: int = 16
    reader_bytes: int = 256 << 20
    growth_bytes: int = 16 << 20
    growth_pushes: int = 500
    growth_warm: int = 50
    gap_steps: int = 1000
    history_updates: int = 1_000_000
    large_width: int = 1280
    large_tensors: int = 525
    large_updates: int = 10
    large_pause: float = 1.0


FULL = Scale()
#: Megabytes where the full comparison takes a gigabyte: its figures mean nothing.
QUICK = replace(
    FULL,
    rounds=1,
    wire_bytes=8 << 20,
    flat_bytes=8 << 20,
    gpt2_width=48,
    small_repeats=5,
    reader_bytes=1 << 20,
    growth_bytes=1 << 20,
    growth_pushes=20,
    growth_warm=10,
    gap_steps=20,
    history_updates=5000,
    large_width=64,
    large_tensors=20,
    large_updates=3,
    large_pause=0.1,
)
