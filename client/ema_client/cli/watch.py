"""``ema watch``: tell of each new version or snapshot of a run, save its weights as a file, run a command on the file.

Knows: when a file is wanted and for how long, how a command is told of the file. Does not know: how events come
(EmaClient.watch), what the command does, or how charts of the run are drawn meanwhile (Charts).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ema_client.atomic import move_whole
from ema_client.cli import show
from ema_client.cli.answers import Answer
from ema_client.cli.commands import how_it_ended, run_line
from ema_client.cli.options import Average, Run
from ema_client.cli.progress import moving
from ema_client.cli.templates import environment, file_name, has_placeholder, shell_line, words_of
from ema_client.client import EmaClient
from ema_client.errors import RunNotFound, SnapshotNotFound
from ema_client.protocol import EventKind, RunEvent, WeightsInfo
from ema_client.reading.charts import Charts, Sources
from ema_client.reading.loggers import logger_of
from ema_client.scratch import scratch_folder

__all__ = ["watch"]

Command = Annotated[
    str | None,
    typer.Option(
        "--exec",
        help="Run this in a shell for each. It is told by the environment: $EMA_PATH, $EMA_RUN, $EMA_AVERAGE, "
        "$EMA_VERSION, $EMA_STEP, $EMA_NUM_UPDATES, $EMA_SNAPSHOT, $EMA_DECAY. {path}, {run} and so on stand for the "
        "same, quoted.",
        show_default=False,
    ),
]
Out = Annotated[
    str | None,
    typer.Option(
        "--out",
        "-o",
        help="Keep each as this safetensors file; may hold the placeholders of --exec but {path}. Without them each "
        "replaces the one before. Without --out, --exec is given a file that is deleted when the command ends.",
        show_default=False,
    ),
]
LogTo = Annotated[
    str | None,
    typer.Option(
        "--log-to",
        metavar="tensorboard[:FOLDER] | wandb[:PROJECT]",
        help="Draw charts of the run meanwhile, from its beginning on: decay, num_updates, distance and durable_lag by "
        "the trainer's steps. By default in the folder runs/RUN, or in wandb's project ema.",
        show_default=False,
    ),
]


def watch(
    client: EmaClient,
    run: Run,
    command: Command = None,
    out: Out = None,
    snapshots: Annotated[bool, typer.Option("--snapshots", help="Snapshots as they are made, not versions.")] = False,
    average: Average = None,
    log_to: LogTo = None,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many.", show_default=False)] = None,
    once: Annotated[bool, typer.Option("--once", help="End after one: --count 1.")] = False,
    timeout: Annotated[
        float | None, typer.Option(min=0, help="End after so many seconds without a new one.", show_default=False)
    ] = None,
) -> Iterator[Answer]:
    """Tell of each new version of a run, beginning with the present one; --out keeps it, --exec runs a command on it.

    What takes longer than the next version takes to come is given the newest next, not those between. A command that
    fails is reported, and watching goes on; the exit code at the end is then 1.
    """
    if out and "{path}" in out:
        raise typer.BadParameter("--out is the path: of the placeholders, {path} is for --exec alone")
    watcher = _Watcher(client, run, average, command, out)
    with _charts(client, run, log_to):
        yield from watcher.follow(snapshots=snapshots, timeout=timeout, limit=1 if once else count)
    if watcher.failed:
        raise typer.Exit(1)


@contextlib.contextmanager
def _charts(client: EmaClient, run: str, log_to: str | None) -> Iterator[None]:
    """Charts of the run inside the block, the last of them drawn after it."""
    if log_to is None:
        yield
        return
    sources = Sources(partial(client.run, run), lambda since, points: client.history(run, since=since, points=points))
    # There is no wandb run of this program's to draw in.
    charts = Charts(sources, logger_of("wandb:ema" if log_to == "wandb" else log_to, run), run=run)
    charts.start()
    try:
        yield
    finally:
        charts.stop()


@dataclass
class _Watcher:
    client: EmaClient
    run: str
    average: str | None
    command: str | None
    out: str | None
    failed: bool = False

    def follow(self, *, snapshots: bool, timeout: float | None, limit: int | None) -> Iterator[Answer]:
        """Tell of each event, then run the event's command; ends after ``limit`` events. failed: one of the commands
        did."""
        done, handled = None, 0
        kinds: tuple[EventKind, ...] = ("snapshot_created",) if snapshots else ("version",)
        for event in self.client.watch(self.run, kinds=kinds, timeout=timeout):
            if not snapshots and event.version == done:
                # The latest download, which may be newer than its event, was of this version already.
                continue
            with ExitStack() as stack:
                if self.command is None and self.out is None:
                    yield Answer(event, (_described(event),))
                else:
                    try:
                        path, info = self._download(event, stack)
                    except (RunNotFound, SnapshotNotFound) as gone:
                        # The snapshot was deleted since the event, or the run with all snapshots.
                        show.complain(gone.detail)
                        continue
                    done = info.version
                    yield Answer({"path": path, **dataclasses.asdict(info)}, (f"{path}: {_described(info)}",))
                    self._execute(words_of(path, info))
            handled += 1
            if handled == limit:
                return

    def _download(self, event: RunEvent, stack: ExitStack) -> tuple[Path, WeightsInfo]:
        if self.out is None:
            path = stack.enter_context(scratch_folder()) / f"{self.run}.safetensors"
            return path, self._save(event, path)
        if not has_placeholder(self.out):
            return Path(self.out), self._save(event, Path(self.out))
        # The file's name depends on the version that comes, which may be newer than the event.
        folder = next(parent for parent in Path(self.out).parents if not has_placeholder(str(parent)))
        folder.mkdir(parents=True, exist_ok=True)
        whole = folder / f".ema-{os.getpid()}.part"
        stack.callback(whole.unlink, missing_ok=True)
        info = self._save(event, whole)
        path = Path(file_name(self.out, words_of(whole, info)))
        path.parent.mkdir(parents=True, exist_ok=True)
        move_whole(whole, path)
        return path, info

    def _save(self, event: RunEvent, path: Path) -> WeightsInfo:
        name = event.snapshot.name if event.snapshot else None
        with moving(self.run) as progress:
            return self.client.download(self.run, path, average=self.average, snapshot=name, progress=progress)

    def _execute(self, words: Mapping[str, str]) -> None:
        if self.command is None:
            return
        if code := run_line(shell_line(self.command), {**os.environ, **environment(words)}):
            self.failed = True
            show.complain(
                f"the command failed with {how_it_ended(code)} on version {words['version']}; watching goes on"
            )


def _described(of: RunEvent | WeightsInfo) -> str:
    snapshot = of.snapshot if isinstance(of.snapshot, str | None) else of.snapshot.name
    named = f", snapshot {snapshot}" if snapshot else ""
    return (
        f"{of.run}/{of.average}, version {of.version}, step {of.step}, num_updates {of.num_updates}, "
        f"decay {of.decay:.6g}{named}"
    )
