"""Routes.

Knows: the path of each. Does not know: methods, bodies.
"""

from __future__ import annotations

from urllib.parse import quote

from ema_client.protocol.words import API

__all__ = [
    "average_path",
    "averages_path",
    "distances_path",
    "events_path",
    "history_path",
    "layout_path",
    "part_path",
    "part_stretch_path",
    "profiles_path",
    "ray_host",
    "reset_path",
    "rewind_path",
    "run_path",
    "runs_path",
    "server_path",
    "shards_path",
    "snapshot_path",
    "snapshot_weights_path",
    "snapshots_path",
    "stretch_path",
    "sweep_path",
    "sweeps_path",
    "timeline_path",
    "update_path",
    "version_path",
    "weights_path",
    "writer_path",
    "writers_path",
]


def server_path() -> str:
    return f"{API}/server"


def ray_host(cluster: str, place: int) -> str:
    """The name that a host of a cluster has among Ray's actors."""
    return f"{cluster}-host-{place}"


def runs_path() -> str:
    return f"{API}/runs"


def run_path(run: str) -> str:
    return f"{API}/runs/{quote(run, safe='')}"


def layout_path(run: str) -> str:
    return f"{run_path(run)}/layout"


def version_path(run: str) -> str:
    return f"{run_path(run)}/version"


def shards_path(run: str) -> str:
    return f"{run_path(run)}/shards"


def reset_path(run: str) -> str:
    return f"{run_path(run)}/reset-num-updates"


def writers_path(run: str) -> str:
    return f"{run_path(run)}/writers"


def writer_path(run: str, writer: int) -> str:
    return f"{writers_path(run)}/{writer}"


def rewind_path(run: str) -> str:
    return f"{run_path(run)}/rewind"


def weights_path(run: str) -> str:
    return f"{run_path(run)}/weights"


def profiles_path(run: str) -> str:
    return f"{run_path(run)}/profiles"


def sweep_path(run: str) -> str:
    return f"{run_path(run)}/sweep"


def sweeps_path(run: str) -> str:
    return f"{run_path(run)}/sweeps"


def update_path(run: str, step: int) -> str:
    return f"{run_path(run)}/updates/{step}"


def events_path(run: str) -> str:
    return f"{run_path(run)}/events"


def history_path(run: str) -> str:
    return f"{run_path(run)}/history"


def distances_path(run: str) -> str:
    return f"{run_path(run)}/distances"


def timeline_path(run: str) -> str:
    return f"{run_path(run)}/timeline"


def part_path(run: str, step: int | None, part: int) -> str:
    """The path of a part of an update; of a part of the initial weights where ``step`` is None."""
    whole = weights_path(run) if step is None else update_path(run, step)
    return f"{whole}/parts/{part}"


def stretch_path(run: str, step: int, start: int, stop: int) -> str:
    """The path of a stretch of an update: bytes ``start`` to ``stop`` of the parameters in canonical order."""
    return f"{update_path(run, step)}/stretches/{start}-{stop}"


def part_stretch_path(run: str, step: int, part: int, start: int, stop: int) -> str:
    """The path of a stretch of a part of an update: bytes ``start`` to ``stop`` of the part's data."""
    return f"{part_path(run, step, part)}/stretches/{start}-{stop}"


def averages_path(run: str) -> str:
    return f"{run_path(run)}/averages"


def average_path(run: str, name: str) -> str:
    return f"{averages_path(run)}/{quote(name, safe='')}"


def snapshots_path(run: str) -> str:
    return f"{run_path(run)}/snapshots"


def snapshot_path(run: str, name: str) -> str:
    return f"{snapshots_path(run)}/{quote(name, safe='')}"


def snapshot_weights_path(run: str, name: str) -> str:
    return f"{snapshot_path(run, name)}/weights"
