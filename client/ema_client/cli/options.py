"""Options that several commands share, and the client that the options describe.

Knows: names and help texts of options. Does not know: what a command does with an option.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ema_client.client import EmaClient

__all__ = ["Average", "Json", "Run", "Token", "Url", "connect"]

Url = Annotated[str | None, typer.Option(help="The service; else $EMA_SERVICE_URL.", show_default=False)]
Token = Annotated[
    str | None, typer.Option(help="Bearer token; else, and better, $EMA_SERVICE_TOKEN.", show_default=False)
]
Run = Annotated[str, typer.Argument(help="Name of the run.", show_default=False)]
Average = Annotated[str | None, typer.Option(help="Which average; by default the first.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def connect(context: typer.Context, url: str | None, token: str | None) -> EmaClient:
    """A client of the service that the options name: behind the command, else before, else in the environment."""
    common_url, common_token = context.obj
    return EmaClient(url or common_url, token=token or common_token)
