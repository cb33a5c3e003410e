"""Engines that hold a RemoteEma, copied: copy.deepcopy, torch.save, torch.multiprocessing and Lightning's ddp_spawn.

Knows LitEma's arithmetic, and which copies may send. Does not know what a copy holds: what other processes do with one
is in programs/copied_engines.py.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ema_client import EmaClient, RemoteEma, RetryPolicy
from ema_client.errors import Fenced, Unauthorized, UsageError
from ema_service.tokens import create_token
from tests.integrations.programs.copied_engines import Engine, read_elsewhere, train_elsewhere, train_ranks

pytestmark = pytest.mark.timeout(240)


def unpickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))  # noqa: S301 - of our own making


def trained(engine: Engine, oracle: Any, steps: int) -> None:
    for _ in range(steps):
        engine.train_step()
        oracle.update(engine.weights())


@pytest.fixture
def engine(client: EmaClient, run_name: str) -> Engine:
    assert client.runs() is not None
    return Engine(run=run_name)


@pytest.fixture
def oracle(engine: Engine, litema: Any) -> Any:
    return litema(engine.weights(), 0.9)


# --- in the same process ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied_by", [copy.deepcopy, unpickled], ids=["deepcopy", "pickle"])
def test_a_copy_evaluates(engine: Engine, oracle: Any, same: Any, copied_by: Callable[[Engine], Engine]) -> None:
    """A copy made in training reads the EMA with all updates of then, and has its own training weights again."""
    trained(engine, oracle, 5)
    copied = copied_by(engine)
    assert same(copied.averaged(), oracle.shadow)
    assert same(copied.weights(), engine.weights())
    ema = copied.model_ema
    assert (ema.num_updates, ema.step, ema.pending, ema.away, ema.stats.sent) == (5, 5, 0, False, 0)
    ema.close()
    trained(engine, oracle, 1)
    assert same(engine.averaged(), oracle.shadow)


def test_a_copy_changes_nothing(engine: Engine, oracle: Any, same: Any) -> None:
    """What would change the run is refused in the process of the original, with what to do, by each call."""
    trained(engine, oracle, 2)
    state = engine.model_ema.state_dict()
    for copied in (copy.deepcopy(engine), unpickled(engine), copy.deepcopy(copy.deepcopy(engine))):
        ema = copied.model_ema
        for use in (copied.train_step, ema.reset_num_updates, lambda ema=ema: ema.load_state_dict(state)):
            with pytest.raises(UsageError, match=r"a copy only reads.*make a RemoteEma for it"):
                use()
    assert copy.copy(engine.model_ema) is not engine.model_ema
    trained(engine, oracle, 1)
    assert same(engine.averaged(), oracle.shadow)


def test_a_copy_whose_run_went_on(engine: Engine, oracle: Any, same: Any) -> None:
    """A copy reads the EMA of its step where a snapshot of it is there; otherwise a warning names both steps."""
    trained(engine, oracle, 2)
    best, kept = copy.deepcopy(engine), {name: tensor.clone() for name, tensor in oracle.shadow.items()}
    trained(engine, oracle, 2)
    engine.model_ema.flush()
    with pytest.warns(UserWarning, match=r"a copy of step 2 of run .* reads the EMA of step 4"):
        assert same(best.averaged(), oracle.shadow)
    kept = {name: tensor.clone() for name, tensor in oracle.shadow.items()}
    engine.model_ema.state_dict()
    best = copy.deepcopy(engine)
    trained(engine, oracle, 2)
    engine.model_ema.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(best.averaged(), kept)


def test_what_is_set_aside_travels(engine: Engine, oracle: Any, same: Any) -> None:
    """As LitEma's collected_params: a copy made between store() and restore(), as in sgm's ema_scope, has both."""
    trained(engine, oracle, 1)
    before = engine.weights()
    engine.model_ema.store(engine.model.parameters())
    engine.model_ema.copy_to(engine.model)
    copies = [copy.deepcopy(engine), unpickled(engine)]
    engine.model_ema.restore(engine.model.parameters())
    for copied in copies:
        assert same(copied.weights(), oracle.shadow)
        copied.model_ema.restore(copied.model.parameters())
        assert same(copied.weights(), before)


def test_copies_without_the_service(
    start_server: Callable[..., Any], run_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copying raises nothing and waits for nobody while the service is away."""
    server = start_server(memory=True)
    monkeypatch.delenv("EMA_SERVICE_TOKEN", raising=False)
    with EmaClient(server.url, retry=RetryPolicy(attempts=1)) as client:
        engine = Engine(run=run_name, client=client)
        idle = RemoteEma(nn.Linear(2, 1), run=f"{run_name}-idle", client=client)
        engine.train_step()
        engine.model_ema.flush()
        server.kill()
        engine.train_step()
        assert copy.deepcopy(engine).model_ema.step == 2
        assert copy.deepcopy(idle).run == idle.run


# --- clients and tokens -----------------------------------------------------------------------------------------------


def test_copies_of_a_client(client: EmaClient) -> None:
    """A copy connects anew to the same URL, with the same patience, whatever became of the original."""
    original = EmaClient(client.url, retry=RetryPolicy(attempts=3))
    for copied in (copy.copy(original), copy.deepcopy(original), unpickled(original)):
        assert copied is not original
        assert (copied.url, copied.retry) == (original.url, original.retry)
        copied.runs()
        copied.close()
        original.runs()
    original.close()
    with copy.copy(original) as copied, unpickled(original) as loaded:
        assert copied.runs() == loaded.runs()


def test_a_client_given(client: EmaClient, run_name: str) -> None:
    """A RemoteEma with a client from outside travels as the client's URL, and copies close nobody's client."""
    engine = Engine(run=run_name, client=client)
    engine.client = client
    copied = copy.deepcopy(engine)
    copied.model_ema.close()
    assert copied.client is not client
    assert copied.client.run(run_name) == client.run(run_name)


def test_no_token_in_a_file(
    start_server: Callable[..., Any], run_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pickles of everything that has a token hold none; where one is loaded, $EMA_SERVICE_TOKEN is the token.

    A copy in the same process keeps the token, in its memory.
    """
    from ema_client.integrations.lightning import RemoteEmaCallback

    file = tmp_path / "tokens"
    token = create_token(file, ["push", "pull"], "*")
    server = start_server("--token-file", str(file), memory=True)
    monkeypatch.delenv("EMA_SERVICE_TOKEN", raising=False)
    where = {"url": server.url, "token": token}
    engine = Engine(run=run_name, **where)
    engine.client = EmaClient(**where)
    engine.callback = RemoteEmaCallback(0.9, run=run_name, **where)
    engine.train_step()
    buffer = io.BytesIO()
    torch.save(engine, buffer)
    for raw in (pickle.dumps(engine), buffer.getvalue()):
        assert server.url.encode() in raw
        assert token.encode() not in raw

    copied = copy.deepcopy(engine)
    assert copied.averaged().keys() == engine.averaged().keys()
    assert copied.client.run(run_name) == engine.client.run(run_name)
    assert token in str(copied.callback._core.__dict__)
    with pytest.raises(Unauthorized):
        unpickled(engine).averaged()
    monkeypatch.setenv("EMA_SERVICE_TOKEN", token)
    assert unpickled(engine).averaged().keys() == engine.averaged().keys()
    engine.model_ema.close()


# --- in other processes -----------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_a_saved_engine(engine: Engine, oracle: Any, client: EmaClient, same: Any, tmp_path: Path) -> None:
    """torch.save(engine): another process evaluates beside the training, or goes on with it and fences the first."""
    trained(engine, oracle, 3)
    file = tmp_path / "engine.pt"
    torch.save(engine, file)
    seen = read_elsewhere(file)
    assert seen["updates"] == 3
    assert same(seen["averaged"], oracle.shadow)
    assert same(seen["weights"], engine.weights())

    # The one that evaluated has taken nothing over.
    trained(engine, oracle, 1)
    state = engine.model_ema.state_dict()
    torch.save(engine, file)
    ahead = copy.deepcopy(oracle), copy.deepcopy(engine.model)
    engine.train_step()
    engine.model_ema.flush()

    # The run went on: the loaded engine goes back to its own step, whose snapshot is there, and on from there.
    seen = train_elsewhere(file, 2)
    with torch.no_grad():
        for _ in range(2):
            for parameter in ahead[1].parameters():
                parameter.add_(1.0)
            ahead[0].update(dict(ahead[1].named_parameters()))
    assert state["step"] == 4
    assert (client.run(engine.model_ema.run).step, seen["step"]) == (6, 6)
    assert same(seen["averaged"], {name: tensor.detach() for name, tensor in ahead[0].shadow.items()})
    engine.train_step()
    with pytest.raises(Fenced):
        engine.model_ema.flush()


@pytest.mark.soak
def test_spawned_ranks(engine: Engine, client: EmaClient, litema: Any, same: Any, tmp_path: Path) -> None:
    """Two spawned processes train one DDP model: one sends, both evaluate alike; a second time goes on with the run.

    The process that spawned them reads what came of it.
    """
    oracle = litema(engine.weights(), 0.9)
    for count in (1, 2):
        before = {name: tensor.clone() for name, tensor in oracle.shadow.items()}
        seen = train_ranks(engine, tmp_path, 3)
        for weights in seen[0]["trained"]:
            oracle.update(weights)
        for rank in seen:
            assert (rank["updates"], rank["step"]) == (3 * count, 3 * count)
            assert same(rank["before"], before)
            assert same(rank["averaged"], oracle.shadow)
        assert [rank["stats"] for rank in seen] == [3, 0]
        assert engine.model_ema.num_updates == 3 * count
        assert same(engine.averaged(), oracle.shadow)
        # As Lightning does with what its first process has trained.
        engine.model.load_state_dict(seen[0]["trained"][-1])
    with EmaClient(client.url) as other:
        assert same(dict(other.pull(engine.model_ema.run)), oracle.shadow)


@pytest.mark.soak
def test_lightning_spawns(play: Any, client: EmaClient, run_name: str, same: Any, tmp_path: Path) -> None:
    """strategy="ddp_spawn": the seed's line in the constructor, sent to two processes, trains its run.

    The validation in the spawned processes, and the process that spawned them, evaluate the EMA of all updates.
    """
    if find_spec("lightning") is None:
        pytest.skip("lightning is not installed: pip install -e '.[integrations]'")
    scenes = [
        {
            "name": "spawned",
            "run": run_name,
        }
    ]
    [seen] = play("lightning_spawned.py", tmp_path, scenes, ranks=1)["spawned"]
    assert seen["updates"] == 4
    assert not same(seen["averaged"], seen["after"])
    pulled = dict(client.pull(run_name))
    assert same(seen["averaged"], pulled)
    assert seen["logged"] == pytest.approx(float(sum(tensor.sum() for tensor in pulled.values())))
