"""Where a cluster on Ray has its gateway: ``ray://NAME``, in a process that is part of the Ray cluster.

The hosts of a cluster are named actors (``ema-service cluster up --ray``), each of which knows the gateway beside it.
Ray is asked for the name, an actor for the URL, and nothing else goes through Ray.

Knows: names of actors. Does not know: sockets, HTTP, or how actors are made. Ray is imported when a URL first needs it.
"""

from __future__ import annotations

import itertools
import os
import re
from typing import Any

from ema_client.errors import ServiceUnreachable, UsageError
from ema_client.protocol import RAY_NAMESPACE, ray_host

__all__ = ["cluster_named", "gateway_of"]

#: Seconds for an actor's answer; one that is being started again has none, and another host's gateway does as well.
_ANSWER_SECONDS = 2.0
_NAMED = re.compile(r"ray://([A-Za-z0-9][A-Za-z0-9._-]{0,127})/?", re.ASCII)


def cluster_named(url: str) -> str | None:
    """The cluster that a URL names, None where it is no such URL. Raises UsageError for a malformed one."""
    if not url.lower().startswith("ray:"):
        return None
    found = _NAMED.fullmatch(url)
    if found is None:
        raise UsageError(
            f"the service's URL {url!r} names no cluster",
            hint="write ray://NAME, with the --name of `ema-service cluster up --ray`, which is ema by default",
        )
    return found[1]


def gateway_of(name: str) -> str:
    """The URL of a gateway of a cluster by now. Each process begins at a host of its own.

    Raises UsageError where this process is no part of a Ray cluster; ServiceUnreachable where the cluster is not there,
    or has no gateway for now.
    """
    ray = _ray()
    actors = list(itertools.takewhile(bool, (_actor(ray, ray_host(name, place)) for place in itertools.count())))
    first = os.getpid() % len(actors) if actors else 0
    for actor in actors[first:] + actors[:first]:
        try:
            if url := ray.get(actor.url.remote(), timeout=_ANSWER_SECONDS):
                return str(url)
        except ray.exceptions.RayError:
            continue
    what = "has no gateway for now" if actors else "is not there"
    raise ServiceUnreachable(
        f"cluster {name!r} {what}, as Ray says",
        hint=f"start one with `ema-service cluster up --ray auto --name {name}`",
    )


def _actor(ray: Any, name: str) -> Any:
    """The actor of this name, None where Ray has none."""
    try:
        return ray.get_actor(name, RAY_NAMESPACE)
    except ValueError:
        return None


def _ray() -> Any:
    """Ray, connected. Raises UsageError."""
    try:
        import ray
    except ModuleNotFoundError:
        raise UsageError("ray:// finds a cluster by Ray, which is not installed", hint="pip install ray") from None
    if not ray.is_initialized():
        raise UsageError(
            "this process is not connected to Ray", hint="call ray.init() first, or give the gateway's http:// address"
        )
    return ray
