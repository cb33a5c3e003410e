"""Commands on the averages of a run: add one, remove one.

Knows: the options that make a schedule, and their names. Does not know: what a schedule computes, HTTP.
"""

from __future__ import annotations

from typing import Annotated

import typer

from ema_client.cli.answers import Answer
from ema_client.cli.options import Run, Yes, agreed
from ema_client.client import EmaClient
from ema_client.protocol import SCHEDULE_FIELDS, AverageConfig, from_json, to_json

__all__ = ["add_average", "remove_average"]

Name = Annotated[str, typer.Argument(help="Name of the average.", show_default=False)]


def _option(help: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(help=help, show_default=False)
    return option


def add_average(
    client: EmaClient,
    run: Run,
    name: Name,
    schedule: Annotated[str, typer.Option(help=f"{', '.join(SCHEDULE_FIELDS)}.")] = "litema",
    decay: Annotated[float | None, _option("The largest decay; by default the run's.")] = None,
    start: Annotated[int | None, _option("The schedule begins after this update of the average.")] = None,
    half_life: Annotated[float | None, _option("Of schedule half_life, in updates.")] = None,
    sigma_rel: Annotated[float | None, _option("Of schedule power, below 0.2887: this, or --gamma.")] = None,
    gamma: Annotated[float | None, _option("Of schedule power; 0 is the mean of all updates.")] = None,
    inv_gamma: Annotated[float | None, _option("Of schedule inverse_gamma; by default 1.")] = None,
    power: Annotated[float | None, _option("Of schedule inverse_gamma; by default 2/3.")] = None,
    min_decay: Annotated[float | None, _option("Of schedule inverse_gamma; by default 0.")] = None,
) -> Answer:
    """Add an average to a run: it begins with the parameters of the next update."""
    average = AverageConfig(
        name,
        schedule,  # type: ignore[arg-type]  # looked at by _checked()
        decay,
        start=start,
        half_life=half_life,
        sigma_rel=sigma_rel,
        gamma=gamma,
        inv_gamma=inv_gamma,
        power=power,
        min_decay=min_decay,
    )
    info = client.add_average(run, name, _checked(average))
    return Answer(info, (f"{run}: {', '.join(one.name for one in info.averages)}",))


def remove_average(client: EmaClient, run: Run, name: Name, yes: Yes = False) -> Answer:
    """Remove an average from a run, with its weights; snapshots keep theirs."""
    agreed(f"Remove average {name} of run {run} with its weights?", yes=yes)
    client.remove_average(run, name)
    return Answer({"run": run, "average": name, "removed": True}, (f"{run}: {name} removed",))


def _checked(average: AverageConfig) -> AverageConfig:
    """The average, if its fields go together. Raises BadParameter naming the option."""
    try:
        from_json(AverageConfig, to_json(average))
        fault = average.fault
    except ValueError as refused:
        fault = str(refused).removeprefix("AverageConfig.")
    if fault is None:
        return average
    fields, _, rest = fault.partition(": ")
    options = ", ".join(f"--{field.replace('_', '-')}" for field in fields.split(", "))
    raise typer.BadParameter(f"{options}: {rest}")
