"""The ranks of a distributed training: work done together, and values told to each other.

Knows: torch.distributed's default group, and what launchers write into the environment before there is a group. Does
not know: models, tensors, HTTP, runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch.distributed as dist

from ema_client.errors import EmaError

__all__ = [
    "Gather",
    "agreed",
    "gathered",
    "is_distributed",
    "may_be_later_rank",
    "own_rank",
    "ranks_in_all",
    "together",
]

T = TypeVar("T")

#: A process' number among all processes, by torchrun.
_RANK = "RANK"
#: A process' number by other launchers, or a part of the number: of the process on its host, and of the host. Lightning
#: starts its processes with the latter two; SLURM, Open MPI, MPICH and LSF have one each.
_NUMBERS = ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "JSM_NAMESPACE_RANK")

#: Gives each rank's value, by rank, on all ranks; all ranks call together.
Gather = Callable[[Any], list[Any]]


def is_distributed() -> bool:
    """Whether the process is a rank of a process group."""
    return dist.is_available() and dist.is_initialized()


def may_be_later_rank(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher says that this process is not the first, and there is no process group yet that could tell.

    False also where a launcher says nothing: Lightning's first process, which launches the others later.
    """
    if is_distributed():
        return False
    names = (_RANK,) if _RANK in environment else _NUMBERS
    return any(environment.get(name, "0") not in ("", "0") for name in names)


def own_rank() -> int:
    """The process' number among the ranks."""
    return dist.get_rank()


def ranks_in_all() -> int:
    """How many ranks there are; 1 where the training is not distributed."""
    return dist.get_world_size() if is_distributed() else 1


def gathered(value: Any) -> list[Any]:
    """Each rank's ``value``, by rank, on all ranks; all ranks call together."""
    values: list[Any] = [None] * ranks_in_all()
    dist.all_gather_object(values, value)
    return values


def together(work: Callable[[], T], *, gather: Gather = gathered) -> T:
    """Do ``work`` on each rank; returns the own result once all ranks are done.

    An EmaError of a single rank is raised on all ranks, with a note naming the rank; any other error of a rank is an
    EmaError on the others, so that no rank waits for one that is gone.
    """
    fault: EmaError | None = None
    result: T | None = None
    try:
        result = work()
    except EmaError as error:
        fault = error
    except Exception as error:  # of any kind: the other ranks wait for an answer, and get it before it goes on here
        gather(EmaError(f"{type(error).__name__}: {error}", hint="see that rank's own message"))
        raise
    for rank, other in enumerate(gather(fault)):
        if other is not None:
            other.add_note(f"on rank {rank}")
            try:
                raise other
            finally:
                del other, fault
    return cast(T, result)


def agreed(work: Callable[[], T | None], *, gather: Gather = gathered) -> T | None:
    """together(), for work with a result on a single rank and None elsewhere: the result, on all ranks."""
    return next((made for made in gather(together(work, gather=gather)) if made is not None), None)
