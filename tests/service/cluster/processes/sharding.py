"""A shard's process: a run of a small model on a server with a data dir of its own, which talks to coordinators.

    python sharding.py FOLDER PLACE SHARDS COORDINATORS RAM_DIR

Slices come as to holding.py, by their step alone: the parameters are those of the model with that seed. Step 0 are the
initial weights. RAM_DIR: where versions lie in memory files; empty for slots.

Knows a registry, its shard of a run, and trainers. Does not know what is killed when.
"""

from __future__ import annotations

import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ema_client.errors import EmaError, Superseded
from ema_client.protocol import RunConfig
from ema_service.cluster import Answer, Arrival, ClusterToken
from ema_service.cluster.hosting import ShardRun
from ema_service.runs import Parameters
from ema_service.storage import ShardRow
from tests.service.cluster.processes.coordinating import TOKEN
from tests.service.cluster.processes.holding import RUN, Trainer, Trainers
from tests.service.cluster.town import slices
from tests.service.conftest import LocalServer, parameters, specs_of

DECAY = 0.9


class Sharded:
    """The shard of the run on this server."""

    def __init__(self, server: LocalServer, place: int, shards: int, coordinators: list[str]) -> None:
        self._server, self._place, self._shards = server, place, shards
        config = RunConfig(RUN, specs_of(self._slice(0)), decay=DECAY)
        server.registry.create(config, ShardRow(place, shards))
        self.shard = ShardRun(
            server.registry.get(RUN),
            server.registry.shard(RUN),
            server.registry.snapshots(RUN),
            server.registry.source_of,
            server.registry.room_for_averages,
            Arrival(place, shards, f"http://host-{place}"),
            coordinators,
            ClusterToken(TOKEN),
            ThreadPoolExecutor(1),
            ThreadPoolExecutor(1),
        )

    def push(self, step: int, key: str) -> Answer:
        """One slice: answered once it is decided."""
        try:
            self._send(step, key).result()
        except Superseded:
            return Answer(key, committed=False)
        except EmaError as fault:
            return Answer(key, committed=False, reason=fault.code)
        return Answer(key, committed=True)

    def _send(self, step: int, key: str) -> Future[Any]:
        run = self._server.run(RUN)
        staged = run.staged(self._slice(step))
        if step == 0:
            return self.shard.initialise(Parameters(staged), key)
        return self.shard.push(run.run.begin(step, staged), key)

    def _slice(self, step: int) -> dict[str, Any]:
        return slices(parameters(step), self._shards)[self._place]


def main() -> None:
    folder, place, shards, coordinators, ram_dir = sys.argv[1:]
    server = LocalServer(Path(folder) / f"data-{place}", ram_dir=Path(ram_dir) if ram_dir else None)
    sharded = Sharded(server, int(place), int(shards), coordinators.split(","))
    path = Path(folder) / f"{place}.sock"
    path.unlink(missing_ok=True)
    with Trainers(str(path), Trainer) as trainers:
        trainers.holder = sharded
        sharded.shard.reporting.start()
        server.registry.verify()
        trainers.serve_forever()


if __name__ == "__main__":
    main()
