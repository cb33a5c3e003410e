"""``ema sweep``: run a command on averages of several lengths, show what it found, keep the best.

Knows: how lengths are written, how a command is told of a file, which number it printed. Does not know: how averages
come, or where the next one is looked for (EmaClient.sweep).
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ema_client.cli import show
from ema_client.cli.answers import Answer, Table
from ema_client.cli.commands import how_it_ended, take_output
from ema_client.cli.options import MaxError, Run
from ema_client.cli.plots import check_can_draw, draw, text_plot
from ema_client.cli.progress import moving
from ema_client.cli.templates import environment, shell_line, words_of
from ema_client.client import EmaClient
from ema_client.errors import EmaError, SnapshotExists, UsageError, printable
from ema_client.protocol import WeightsInfo, is_name
from ema_client.reading.sweeping import Sweep, SweptPoint
from ema_client.targets import Target, described, spread

__all__ = ["last_number", "lengths_of", "sweep"]

#: The sequences by which programs colour what they print hold digits.
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|\b[-+]?(?:nan|inf(?:inity)?)\b", re.IGNORECASE)
_SPREAD = "A:B:N: N lengths from A to B, each longer than the one before by the same factor; or a list, A,B,C."


def sweep(
    client: EmaClient,
    run: Run,
    command: Annotated[
        str,
        typer.Option(
            "--exec",
            help="Run this in a shell for each average; the last number that it prints is the result. It is told by "
            "the environment: $EMA_PATH, a safetensors file, $EMA_SIGMA_REL, $EMA_DECAY, $EMA_HALF_LIFE, $EMA_RUN, "
            "$EMA_NUM_UPDATES. {path}, {sigma_rel} and so on stand for the same, quoted.",
            show_default=False,
        ),
    ],
    sigma_rel: Annotated[str | None, typer.Option(metavar="A:B:N", help=_SPREAD, show_default=False)] = None,
    decay: Annotated[str | None, typer.Option(metavar="A:B:N", help="The same, of decays.", show_default=False)] = None,
    half_life: Annotated[
        str | None, typer.Option(metavar="A:B:N", help="The same, of half-lives in updates.", show_default=False)
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            help="Of which time: a snapshot's name, or a counter of the ring (`ema show`); by default now. While the "
            "training goes on, name one.",
            show_default=False,
        ),
    ] = None,
    max_error: MaxError = None,
    dtype: Annotated[str | None, typer.Option(help="Of the files: F32, BF16, F16.", show_default=False)] = None,
    highest: Annotated[bool, typer.Option("--highest", help="The highest result is the best, not the lowest.")] = False,
    refine: Annotated[int, typer.Option(min=0, help="Then so many more, each beside the best so far.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the curve as this .png, .svg or .pdf file.", show_default=False)
    ] = None,
    keep: Annotated[
        str | None, typer.Option(help="Keep the best as a snapshot of this name.", show_default=False)
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What the number is, as in FID, for the run's page.", show_default=False)
    ] = None,
    report: Annotated[
        bool, typer.Option("--report/--no-report", help="Tell the service what was found, for the run's page.")
    ] = True,
) -> Answer:
    """Find the best length of an EMA: run a command on averages of several lengths, of a run with posthoc.

    Up to eight safetensors files at a time lie in a temporary folder ($TMPDIR). A command that fails, and a length that
    cannot be had, are told, and the others go on; the exit code is then 1 if there is no result at all, or a command
    failed.
    """
    kind, values = _lengths(sigma_rel=sigma_rel, decay=decay, half_life=half_life)
    if plot is not None:
        check_can_draw(plot)
    if keep is not None:
        _check_is_free(client, run, keep)
    evaluation = _Evaluation(command)
    options: dict[str, Any] = {kind: values, "at": at, "max_error": max_error, "dtype": dtype, "name": name}
    options |= {"report": report, "unreported": _tell_unreported}
    with moving(run) as progress:
        found = client.sweep(run, evaluation, highest=highest, refine=refine, told=_tell, progress=progress, **options)
    if keep is not None and found.best is not None and (kept := _keep(client, found, keep, max_error)):
        show.complain(f"kept as snapshot {kept}")
    if plot is not None and found.best is not None:
        _draw(plot, found)
    return Answer(_as_json(found), tuple(_shown(found)), code=1 if evaluation.failed or found.best is None else 0)


# --- lengths --------------------------------------------------------------------------------------------------------


def _lengths(**said: str | None) -> tuple[str, list[float]]:
    given = {kind: text for kind, text in said.items() if text is not None}
    if len(given) != 1:
        raise typer.BadParameter("give one of --sigma-rel, --decay and --half-life, as in --sigma-rel 0.015:0.25:12")
    ((kind, text),) = given.items()
    return kind, lengths_of(kind, text)


def lengths_of(kind: str, said: str) -> list[float]:
    """The lengths that ``0.015:0.25:12`` or ``0.03,0.1`` names. Raises BadParameter, in the option's name."""
    option = f"--{kind.replace('_', '-')}"
    try:
        if ":" in said:
            first, last, count = said.split(":")
            values = list(spread(kind, float(first), float(last), int(count)))
        else:
            values = [float(part) for part in said.split(",")]
        for value in values:
            Target.of({kind: value}, called="sweep")
    except UsageError as fault:
        raise typer.BadParameter(f"{option}: {fault.detail}") from None
    except ValueError:
        raise typer.BadParameter(f"{option}: {said!r} is not A:B:N, as in 0.015:0.25:12, nor A,B,C") from None
    return values


# --- the command ----------------------------------------------------------------------------------------------------


class _Evaluation:
    """Runs the command on each file. failed: whether one of them failed."""

    def __init__(self, command: str) -> None:
        self._line = shell_line(command)
        self.failed = False

    def __call__(self, path: Path, info: WeightsInfo) -> float | None:
        done = take_output(self._line, {**os.environ, **environment(words_of(path, info))})
        sys.stderr.write(_printable_lines(done.err))
        number = last_number(done.out)
        if done.code == 0 and number is not None:
            return number
        self.failed = True
        how = "printed no number" if done.code == 0 else f"failed with {how_it_ended(done.code)}"
        words = _last_line(done.out) if done.code == 0 else _last_line(done.err) or _last_line(done.out)
        show.complain(f"{info.target}: the command {how}{f': {words}' if words else ''}")
        return None


def last_number(printed: str) -> float | None:
    """The last number in what a command printed; None without any."""
    found = _NUMBER.findall(_COLOURS.sub("", printed))
    return float(found[-1]) if found else None


def _printable_lines(text: str) -> str:
    """A text of several lines as it can be shown."""
    return "".join(f"{printable(line)}\n" for line in text.splitlines())


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


# --- what is shown --------------------------------------------------------------------------------------------------


def _tell(point: SweptPoint) -> None:
    if point.info is not None and point.result is not None:
        show.complain(f"{point.info.target}: {point.result:.6g}")


def _tell_unreported(error: EmaError) -> None:
    show.complain(f"the results are here alone, the service did not take them: {error.detail}")


def _shown(found: Sweep) -> Iterator[str | Table]:
    table = Table(("", found.kind, "result", "error"))
    for point in found.points:
        error = "" if point.info is None or point.info.profile_error is None else f"{point.info.profile_error:.1g}"
        mark = "*" if point is found.best else ""
        table.add(mark, f"{point.value:.9g}", _result(point), error)
    yield table
    for point in found.points:
        if point.refused is not None:
            yield f"{point.value:.9g} refused: {point.refused}"
    if (best := found.best) is None:
        return
    counted = [(point.value, point.result or 0.0) for point in found.points if point.counts]
    if len(counted) > 1:
        yield from text_plot(counted, (best.value, best.result or 0.0), scale=_scale(found.kind))
    yield f"best: {described(found.kind, best.value)}, {best.result:.6g}, of run {found.run} at {found.at}"
    if found.at_edge and len(counted) > 1:
        yield "the best is at the edge of what was looked at: a better one may lie beyond"


def _result(point: SweptPoint) -> str:
    if point.refused is not None:
        return "refused"
    return "failed" if point.result is None else f"{point.result:.6g}"


def _scale(kind: str) -> Any:
    return (lambda decay: -math.log(1.0 - decay)) if kind == "decay" else math.log


def _draw(path: Path, found: Sweep) -> None:
    counted = [(point.value, point.result or 0.0) for point in found.points if point.counts]
    best = found.best or found.points[0]
    draw(
        path,
        counted,
        (best.value, best.result or 0.0),
        title=f"{found.run} at {found.at}",
        label=found.kind,
        decays=found.kind == "decay",
    )


def _as_json(found: Sweep) -> dict[str, Any]:
    best = None if found.best is None else dataclasses.asdict(found.best)
    return {**dataclasses.asdict(found), "best": best}


# --- the best one, kept ---------------------------------------------------------------------------------------------


def _check_is_free(client: EmaClient, run: str, name: str) -> None:
    """Before hours of evaluations: raises what taking the snapshot would."""
    if not is_name(name):
        raise typer.BadParameter(f"--keep: {name!r} cannot name a snapshot")
    if any(snapshot.name == name for snapshot in client.snapshots(run)):
        raise SnapshotExists(f"run {run!r} has a snapshot {name!r}", hint="choose another name for --keep")


def _keep(client: EmaClient, found: Sweep, name: str, max_error: float | None) -> str | None:
    """Keep the best as a snapshot; its name, None where the service refuses, which is said."""
    if (best := found.best) is None:
        return None
    try:
        wished: Any = {found.kind: best.value, "at": found.at, "max_error": max_error}
        return client.snapshot(found.run, name, **wished).name
    except EmaError as error:
        show.complain(f"the best was not kept: {error}")
        return None
