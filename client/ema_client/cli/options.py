"""Options that several commands share, and the client that the options describe.

Knows: names and help texts of options. Does not know: what a command does with an option.
"""

from __future__ import annotations

import re
from typing import Annotated

import typer

from ema_client.client import EmaClient
from ema_client.targets import Wished

__all__ = [
    "At",
    "Average",
    "Decay",
    "HalfLife",
    "Json",
    "MaxError",
    "Run",
    "SigmaRel",
    "Token",
    "Url",
    "Window",
    "connect",
    "wished_for",
]

#: A number of updates.
_COUNTER = re.compile(r"[0-9]{1,19}\Z")

Url = Annotated[str | None, typer.Option(help="The service; else $EMA_SERVICE_URL.", show_default=False)]
Token = Annotated[
    str | None, typer.Option(help="Bearer token; else, and better, $EMA_SERVICE_TOKEN.", show_default=False)
]
Run = Annotated[str, typer.Argument(help="Name of the run.", show_default=False)]
Average = Annotated[str | None, typer.Option(help="Which average; by default the first.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
SigmaRel = Annotated[
    float | None,
    typer.Option(
        help="An average of any length, of a run with posthoc: its width, relative to the training so far; 0.05 is "
        "short, 0.10 usual, 0.25 long.",
        show_default=False,
    ),
]
Decay = Annotated[
    float | None, typer.Option(help="The same: what this constant decay would have given.", show_default=False)
]
HalfLife = Annotated[float | None, typer.Option(help="The same: a half-life, in updates.", show_default=False)]
Window = Annotated[
    str | None,
    typer.Option(metavar="A:B", help="The same: the mean of the updates after A, up to B.", show_default=False),
]
At = Annotated[
    str | None,
    typer.Option(
        help="The time of such an average: a snapshot's name, or a counter of the ring (`ema show`); by default now.",
        show_default=False,
    ),
]
MaxError = Annotated[
    float | None,
    typer.Option(help="The largest error of such an average's profile, by default 0.05.", show_default=False),
]


def wished_for(
    sigma_rel: float | None = None,
    decay: float | None = None,
    half_life: float | None = None,
    window: str | None = None,
    at: str | None = None,
    max_error: float | None = None,
) -> Wished:
    """What the options above name. Raises BadParameter for a window that is none."""
    edges = None if window is None else _window(window)
    return Wished(sigma_rel=sigma_rel, decay=decay, half_life=half_life, window=edges, at=at, max_error=max_error)


def _window(said: str) -> tuple[int, int]:
    edges = said.split(":")
    if len(edges) != 2 or not all(_COUNTER.match(edge) for edge in edges):
        raise typer.BadParameter(f"--window: {said!r} is not A:B, as in 9000:10000")
    return int(edges[0]), int(edges[1])


def connect(context: typer.Context, url: str | None, token: str | None) -> EmaClient:
    """A client of the service that the options name: behind the command, else before, else in the environment."""
    common_url, common_token = context.obj
    return EmaClient(url or common_url, token=token or common_token)
