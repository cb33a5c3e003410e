"""Averages after the fact, as a request asks for them, and the sum of stored weights that answers it.

Knows the query's words for a target, and how the weights of a state are held while a sum of them is read. Does not know
how recipes are found (runs.posthoc), how what they name is opened (runs.summing), or what an answer looks like.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from fastapi import Depends, Query, Request

from ema_client.errors import InvalidRequest, Superseded, SynthesisRefused
from ema_client.protocol import MAX_SWEPT
from ema_service.api.context import Context
from ema_service.api.routes.parameters import DECIMAL, VERSION_PATTERN, Decimal
from ema_service.averaging import ConstantDecay, ConstantHalfLife, SigmaRel, Target, TargetRefused, Window
from ema_service.averaging.synthesis import MAX_ERROR
from ema_service.bodies.mixing import Mixture
from ema_service.runs import Run, State
from ema_service.runs.posthoc import Synthesiser
from ema_service.runs.recipes import Recipe, read
from ema_service.runs.summing import Summing, arenas_of

__all__ = ["Asked", "AskedFor", "recipe_of", "stored", "work_out"]

_WINDOW = re.compile(r"([0-9]{1,18}):([0-9]{1,18})\Z", re.ASCII)
#: A ring drops a snapshot now and then; that each try meets one is next to impossible.
_TRIES = 3
#: For so long a request waits for snapshots that are being stored.
_STORING_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Asked:
    """Targets that a query asks for, none for the run's own averages. at: as for Synthesiser.recipes().

    recipe: how they are worked out, as another host of the run has said; None to find out. version: the run's, which
    stays here, and is to be taken for the present one; None for the present one. A recipe has one of its own.
    """

    targets: tuple[Target, ...]
    at: str | None
    max_error: float
    recipe: str | None = None
    version: str | None = None

    def one(self) -> Target:
        """The target. Raises InvalidRequest unless there is one."""
        if len(self.targets) != 1:
            raise InvalidRequest("sigma_rel, decay, half_life, window: one number of one of them is needed here")
        return self.targets[0]


# async: FastAPI would call a plain function on a thread, for each request.
async def _asked(
    sigma_rel: Annotated[
        str | None, Query(description="A power average of this relative standard deviation, worked out of the ring")
    ] = None,
    decay: Annotated[str | None, Query(description="What a constant decay would have given")] = None,
    half_life: Annotated[
        str | None, Query(description="What a constant half-life, in updates, would have given")
    ] = None,
    window: Annotated[str | None, Query(description="A:B, the uniform average of the updates after A, up to B")] = None,
    at: Annotated[
        str | None,
        Query(max_length=137, description="Of these: [snapshot:]NAME or [counter:]N, of the ring; none: now"),
    ] = None,
    max_error: Annotated[
        Decimal | None, Query(gt=0.0, le=1.0, description="Of these: the largest relative error of the profile")
    ] = None,
    recipe: Annotated[
        str | None,
        Query(description="Of these, at one host of a cluster: the Ema-Recipe of another"),
    ] = None,
    version: Annotated[
        str | None,
        Query(pattern=VERSION_PATTERN, description="Of these, at one host of a cluster: of this version, which stays"),
    ] = None,
) -> Asked:
    texts = {"sigma_rel": sigma_rel, "decay": decay, "half_life": half_life, "window": window}
    given = {name: text for name, text in texts.items() if text is not None}
    if len(given) > 1:
        raise InvalidRequest(f"{', '.join(given)}: one of these can be asked for at a time")
    if not given and (at, max_error, recipe, version) != (None, None, None, None):
        raise InvalidRequest(
            "at, max_error, recipe, version: belong to sigma_rel, decay, half_life or window, of which none was given"
        )
    targets = tuple(_target(name, part) for name, text in given.items() for part in text.split(","))
    if len(targets) > MAX_SWEPT:
        raise InvalidRequest(f"{next(iter(given))}: {len(targets)} were given; {MAX_SWEPT} are possible at a time")
    return Asked(targets, at, MAX_ERROR if max_error is None else max_error, recipe, version)


AskedFor = Annotated[Asked, Depends(_asked)]

_KINDS: dict[str, Callable[[float], Target]] = {
    "sigma_rel": SigmaRel,
    "decay": ConstantDecay,
    "half_life": ConstantHalfLife,
}


def _target(name: str, text: str) -> Target:
    """A target from its text in a query. Raises InvalidRequest, SynthesisRefused."""
    try:
        if name == "window":
            if (bounds := _WINDOW.match(text)) is None:
                raise InvalidRequest(f"window: {text[:80]!r} is not A:B, as in 1000:2000")
            return Window(int(bounds[1]), int(bounds[2]))
        if not DECIMAL.match(text):
            raise InvalidRequest(f"{name}: {text[:80]!r} is not a number")
        return _KINDS[name](float(text))
    except TargetRefused as refused:
        raise SynthesisRefused(f"{name}: {refused}") from None


async def work_out(
    request: Request, server: Context, run: Run, asked: Asked, stack: ExitStack
) -> tuple[list[Recipe], Mixture]:
    """The recipes of what is asked for, and their sums, whose sources stay open and held until ``stack`` ends.

    Raises as Synthesiser.recipes(); SynthesisRefused where the run has no ring; Overloaded, Superseded,
    ClientDisconnect.
    """
    for left in reversed(range(_TRIES)):
        recipes = await _found(server, run, asked)
        try:
            with ExitStack() as opened:
                mixture = await _opened(request, server, run, recipes, opened)
                stack.push(opened.pop_all())
                return recipes, mixture
        except FileNotFoundError as dropped:
            if not left:
                raise Superseded(
                    f"the ring drops its snapshots as they are opened: {dropped}", retry_after=1.0
                ) from None
    raise RuntimeError("the last try returns or raises")


async def recipe_of(server: Context, run: Run, asked: Asked, state: State) -> Recipe:
    """The recipe of what is asked for, of this state of the run. Raises as Synthesiser.recipes(); SynthesisRefused
    where the run has no ring."""
    [recipe] = await _recipes(server, run, asked, state)
    return recipe


async def stored(server: Context, run: Run) -> Synthesiser:
    """What works out averages for a run, once the snapshots that are due by now are stored, or it takes too long.

    So an average depends on the version alone: the ranks of a sharded trainer, each of which reads its slices, have
    slices of one sum; and a training of a second is not read before its ring is on the disk.
    """
    synthesiser = server.registry.synthesiser(run.config.run)
    ring, begun = synthesiser.ring, synthesiser.ring.begun
    with server.watching(run) as moved, contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_STORING_SECONDS):
            while ring.ended < begun and not server.stopping:
                await moved.wait()
                moved.clear()
    return synthesiser


async def _found(server: Context, run: Run, asked: Asked) -> list[Recipe]:
    if asked.recipe is not None:
        given = read(asked.recipe)
        if given.targets != asked.targets:
            of, wished = (", ".join(map(str, each)) for each in (given.targets, asked.targets))
            raise InvalidRequest(f"recipe: it is of {of}, and {wished} is asked for")
        follow, state = server.registry.synthesiser(run.config.run).given, server.readings.state(run, given.version)
        return await server.workers.block(partial(follow, given, state))
    there = None if asked.version is None else server.readings.state(run, asked.version)
    return await _recipes(server, run, asked, there)


async def _recipes(server: Context, run: Run, asked: Asked, state: State | None) -> list[Recipe]:
    synthesiser = await stored(server, run)
    return await server.workers.block(partial(synthesiser.recipes, asked.targets, asked.at, asked.max_error, state))


async def _opened(request: Request, server: Context, run: Run, recipes: list[Recipe], stack: ExitStack) -> Mixture:
    """The sums of recipes. Raises FileNotFoundError where the ring dropped a snapshot meanwhile."""
    arenas = tuple(arenas_of(recipes).values())
    if arenas:
        await server.hold(request, *arenas)
        for arena in arenas:
            stack.callback(server.registry.frozen.release, arena)
    summing = Summing(run, server.registry.synthesiser(run.config.run), server.workers.helpers)
    return await server.workers.block(partial(summing.opened, recipes, stack))
