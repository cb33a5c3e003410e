"""With ``log_to="trainer"`` the charts of the EMA come in the loggers that a framework's Trainer has.

Knows Lightning's CSV files and transformers' log of a training. Does not know where the numbers come from.
"""

from __future__ import annotations

import csv
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ema_client import EmaClient, RemoteEma
from ema_client.errors import UsageError
from tests.integrations.lightning_training import BATCHES, Module, batches, trainer
from tests.integrations.transformers_training import Net, Trainer, a_trainer
from tests.waiting import measures

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from lightning.pytorch.loggers import CSVLogger

    from ema_client.integrations import lightning as for_lightning
    from ema_client.integrations import transformers as for_transformers

# The frameworks and torch warn of each other's deprecations.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_lightning(client: EmaClient, run_name: str, tmp_path: Path, trained: Any) -> None:
    """In every logger of the Trainer, at the step that a value is of, and on the training's own thread."""
    measures(client)
    callback = for_lightning.RemoteEmaCallback(0.5, run=run_name, log_to="trainer")
    made = trainer(tmp_path, callback)
    threads = set()

    class Watched(CSVLogger):
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            threads.add(threading.current_thread())
            super().log_metrics(metrics, step)

    made.loggers = [Watched(tmp_path, name=name, version=0) for name in ("one", "other")]
    made.fit(Module(trained), batches())
    assert client.run(run_name).step == BATCHES
    assert threads == {threading.main_thread()}
    for name in ("one", "other"):
        rows: dict[int, dict[str, float]] = {}
        with (tmp_path / name / "version_0" / "metrics.csv").open() as file:
            for row in csv.DictReader(file):
                values = {key: float(value) for key, value in row.items() if value}
                rows.setdefault(int(row["step"]), {}).update(values)
        assert max(rows) == BATCHES
        last = rows[BATCHES]
        assert (last["ema/decay"], last["ema/num_updates"], last["ema/lag"]) == (pytest.approx(0.5), BATCHES, 0.0)
        # Of updates that come without pause one of several is measured, the first among them.
        assert any(row.get("ema/distance", 0.0) > 0 for row in rows.values())


def test_transformers(client: EmaClient, run_name: str, tmp_path: Path) -> None:
    """In what the Trainer logs, and so reports; a callback that is not attached is refused, before any step."""

    class Slow(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            time.sleep(0.1)
            return super().training_step(*args, **kwargs)

    made = a_trainer(tmp_path, Net(), cls=Slow, logging_steps=1)
    callback = for_transformers.RemoteEmaCallback(0.5, run=run_name, log_to="trainer").attach(made)
    made.train()
    callback.close()
    found = [entry for entry in made.state.log_history if "ema/num_updates" in entry]
    assert found
    assert all("loss" in entry and entry["ema/num_updates"] <= entry["step"] for entry in found[:-1])
    assert {"ema/decay", "ema/lag", "ema/durable_lag"} <= set(found[-1])
    assert any("ema/distance" in entry for entry in found)

    loose = for_transformers.RemoteEmaCallback(0.5, run=f"{run_name}-loose", log_to="trainer")
    made = a_trainer(tmp_path, Net())
    made.add_callback(loose)
    with pytest.raises(UsageError, match="log_to='trainer' needs the Trainer itself"):
        made.train()
    assert client.run(run_name).step == 16


@pytest.mark.parametrize("callback", [for_lightning.RemoteEmaCallback, for_transformers.RemoteEmaCallback])
def test_what_names_no_logger_is_refused(callback: Any) -> None:
    """In the callback's constructor."""
    with pytest.raises(UsageError, match="log_to='trainers' is unknown"):
        callback(run="r", log_to="trainers")


def test_a_plain_remote_ema_has_no_trainer(client: EmaClient, run_name: str) -> None:
    """ "trainer" is a word of the callbacks alone."""
    with pytest.raises(UsageError, match="log_to='trainer' is unknown"):
        RemoteEma(nn.Linear(2, 1), run=run_name, client=client, log_to="trainer")
