"""From a command's function to the function that typer reads: what commands share is written once, here.

A command's function says what it needs by the types of its parameters:

    EmaClient    a client of the service that --url and --token name
    Probe        the same service for single requests that are given up soon
    Wished       an average of any length, by the six options of such an average

It returns an Answer, or gives one after the other, which --json and the terminal decide the look of.

Knows: signatures. Does not know: a single command, or how an answer looks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import typer

from ema_client.cli.answers import Answer, Screen, put
from ema_client.cli.options import Json, Token, Url, WishedOptions, connect, look_at, wished_for
from ema_client.cli.refusals import refusals
from ema_client.client import EmaClient
from ema_client.reading.probing import Probe
from ema_client.targets import Wished

__all__ = ["bound"]

_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_CONTEXT = inspect.Parameter("context", _KEYWORD, annotation=typer.Context)
_CLIENT = {"url": Url, "token": Token}
_SERVICES: dict[Any, Callable[..., EmaClient | Probe]] = {EmaClient: connect, Probe: look_at}
_JSON = {"as_json": Json}


def bound(command: Callable[..., Any]) -> Callable[..., None]:
    """The function for typer: the command's own parameters, and the options in place of those that typer has not."""
    signature = inspect.signature(command, eval_str=True)
    found = list(signature.parameters.values())
    clients = {each.name: _SERVICES[each.annotation] for each in found if each.annotation in _SERVICES}
    wishes = [each.name for each in found if each.annotation is Wished]
    own = [each for each in found if each.name not in (*clients, *wishes)]
    options: dict[str, Any] = {
        **(dict(WishedOptions) if wishes else {}),
        **_JSON,
        **(_CLIENT if clients else {}),
    }

    def shell(context: typer.Context, **given: Any) -> None:
        as_json = given.pop("as_json", False)
        shared = {name: given.pop(name) for name in options if name in given}
        with refusals(given.get("run")), ExitStack() as opened:
            for name in wishes:
                given[name] = wished_for(**{each: shared[each] for each in WishedOptions})
            for name, service in clients.items():
                given[name] = client = service(context, shared["url"], shared["token"])
                opened.callback(client.close)
            code = _written(command(**given), as_json=as_json)
        if code:
            raise typer.Exit(code)

    shell.__doc__ = command.__doc__
    shell.__name__ = command.__name__
    _sign(shell, own, options)
    return shell


def _written(answered: Answer | Iterator[Answer], *, as_json: bool) -> int:
    """Write what a command gave; its exit code, of many answers the latest that is not 0."""
    if isinstance(answered, Answer):
        put(answered, as_json=as_json)
        return answered.code
    code = 0
    with Screen(as_json=as_json) as screen:
        for answer in answered:
            screen.put(answer)
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
