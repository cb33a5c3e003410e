"""From a command's function to the function that typer reads: what commands share is written once, here.

A command's function says what it needs by the types of its parameters, and what it gives by its return type:

    EmaClient    a client of the service that --url and --token name
    Wished       an average of any length, by the six options of such an average
    -> Answer    --json, and the answer is written when the command ends
    -> Iterator[Answer]    --json, and each answer is written as it comes

Knows: signatures. Does not know: a single command, or how an answer looks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, get_origin

import typer

from ema_client.cli.answers import Answer, put
from ema_client.cli.options import Json, Token, Url, WishedOptions, connect, wished_for
from ema_client.cli.refusals import refusals
from ema_client.client import EmaClient
from ema_client.targets import Wished

__all__ = ["bound"]

_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_CONTEXT = inspect.Parameter("context", _KEYWORD, annotation=typer.Context)
_CLIENT = {"url": Url, "token": Token}
_JSON = {"as_json": Json}


def bound(command: Callable[..., Any]) -> Callable[..., None]:
    """The function for typer: the command's own parameters, and the options in place of those that typer has not."""
    signature = inspect.signature(command, eval_str=True)
    found = list(signature.parameters.values())
    clients = [each.name for each in found if each.annotation is EmaClient]
    wishes = [each.name for each in found if each.annotation is Wished]
    own = [each for each in found if each.name not in (*clients, *wishes)]
    streams = get_origin(signature.return_annotation) is Iterator
    options: dict[str, Any] = {
        **(dict(WishedOptions) if wishes else {}),
        **(_JSON if streams or signature.return_annotation is Answer else {}),
        **(_CLIENT if clients else {}),
    }

    def shell(context: typer.Context, **given: Any) -> None:
        as_json = given.pop("as_json", False)
        shared = {name: given.pop(name) for name in options if name in given}
        with refusals(given.get("run")), ExitStack() as opened:
            for name in wishes:
                given[name] = wished_for(**{each: shared[each] for each in WishedOptions})
            for name in clients:
                given[name] = opened.enter_context(connect(context, shared["url"], shared["token"]))
            answered = command(**given)
            code = _written(answered, as_json=as_json, streams=streams)
        if code:
            raise typer.Exit(code)

    shell.__doc__ = command.__doc__
    shell.__name__ = command.__name__
    _sign(shell, own, options)
    return shell


def _written(answered: Answer | Iterator[Answer] | None, *, as_json: bool, streams: bool) -> int:
    """Write what a command gave; its exit code, of many the latest that is not 0."""
    if answered is None:
        return 0
    code = 0
    for answer in answered if not isinstance(answered, Answer) else (answered,):
        put(answer, as_json=as_json, lines=streams)
        code = answer.code or code
    return code


def _sign(shell: Callable[..., None], own: list[inspect.Parameter], options: Mapping[str, Any]) -> None:
    given = [each.replace(kind=_KEYWORD) for each in own]
    shared = [
        inspect.Parameter(name, _KEYWORD, default=False if option is Json else None, annotation=option)
        for name, option in options.items()
    ]
    parameters = [_CONTEXT, *given, *shared]
    shell.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    shell.__annotations__ = {each.name: each.annotation for each in parameters}
