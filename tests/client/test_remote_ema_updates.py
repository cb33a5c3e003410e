"""The updates of a RemoteEma: which are sent, as what, and what becomes of those that fail. Knows the real service."""

from __future__ import annotations

import contextlib
import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ema_client import AverageConfig, EmaClient, RemoteEma
from ema_client.errors import ConnectionLost, NonFinite, RunNotFound, TransportError, UsageError
from ema_client.training.selection import BufferPolicy
from ema_client.training.step_hook import StepHook
from tests.client.trainers import ONCE, LitEmaOracle, Oops, Zoo, oops_after, same, train, values

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_refused_update_does_not_stop_the_next(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """NaN is refused with the parameter's name, the EMA is as it was, and the next update is a step of its own."""
    model = Zoo()
    ema, oracle = make_ema(model, 0.9), LitEmaOracle(model, 0.9)
    good = values(model)
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = float("nan")
    ema(model)
    with pytest.raises(NonFinite, match=r"conv\.weight"):
        ema.flush()
    assert same(client.pull(ema.run), oracle.shadow)

    with torch.no_grad():
        model.conv.weight.copy_(good["conv.weight"])
    train(model)
    ema(model)
    oracle(model)
    ema.flush()
    assert same(client.pull(ema.run), oracle.shadow)
    assert client.run(ema.run).step == 2


def test_update_of_unknown_outcome_does_not_stop_the_next(
    relay: Callable[..., Any], client: EmaClient, run_name: str
) -> None:
    """Where an update was applied and its answer lost, it is sent again, applied once, and the next one follows."""
    lost: list[str] = []

    def loses(request: Any) -> bool:
        if request.method == "PUT" and "/updates/1" in request.target and len(lost) < 3:
            lost.append(request.target)
            return True
        return False

    model = nn.Linear(2, 2)
    with EmaClient(relay(loses).url, retry=ONCE) as shaky:
        ema, oracle = RemoteEma(model, 0.5, run=run_name, client=shaky), LitEmaOracle(model, 0.5)
        train(model)
        oracle(model)
        ema(model)
        with pytest.raises(ConnectionLost):
            ema.flush()
        train(model)
        oracle(model)
        ema(model)
        while ema.pending:
            with contextlib.suppress(ConnectionLost):
                ema.flush()
        ema.close()

    assert len(lost) == 3
    assert same(client.pull(run_name), oracle.shadow)


def test_step_is_decayed_for_what_was_left_out(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """update_every=k sends each k-th call with its own step; with decay_per="step" a constant model's EMA is exact."""
    model = nn.Linear(3, 3)
    ema, oracle = make_ema(model, 0.9, update_every=5, decay_per="step"), LitEmaOracle(model, 0.9)
    train(model)
    for _ in range(23):
        ema(model)
        oracle(model)
    ema.flush()

    info = client.run(ema.run)
    assert (info.step, ema.num_updates, ema.stats.sent) == (20, 20, 4)
    for _ in range(2):
        ema(model)
        oracle(model)
    ema.flush()
    pulled = client.pull(ema.run)
    assert all(torch.allclose(pulled[name], shadow, rtol=1e-6, atol=0) for name, shadow in oracle.shadow.items())


def test_each_kth_update_is_an_update(make_ema: Callable[..., RemoteEma]) -> None:
    """With decay_per="update", as with a LitEma that is called each k-th time."""
    model = nn.Linear(2, 2)
    ema, oracle = make_ema(model, 0.9, update_every=3), LitEmaOracle(model, 0.9)
    for number in range(1, 10):
        train(model)
        ema(model)
        if number % 3 == 0:
            oracle(model)
    ema.copy_to(model)

    assert ema.num_updates == 3
    assert same(values(model), oracle.shadow)


@pytest.mark.parametrize("options", [{"update_every": 0}, {"on_busy": "wait"}])
def test_unknown_cadence(free_url: str, options: dict[str, Any]) -> None:
    """What cannot be meant is refused before the service is asked for anything."""
    with pytest.raises(UsageError, match=next(iter(options))):
        RemoteEma(nn.Linear(1, 1), run="r", url=free_url, **options)


def test_a_trainer_of_another_dtype_goes_on_with_a_run(
    make_ema: Callable[..., RemoteEma], client: EmaClient, run_name: str
) -> None:
    """A float32 EMA, imported for example, that a bf16 model goes on with: refused with the way out, which works."""
    model = nn.Linear(3, 2).bfloat16()
    average = {name: torch.randn(parameter.shape) for name, parameter in model.named_parameters()}
    client.create_run(run_name, average, decay=0.5, use_num_updates=False)
    with pytest.raises(UsageError, match="push_dtype='F32'"):
        make_ema(model, 0.5, False, resume=True)
    ema = make_ema(model, 0.5, False, resume=True, push_dtype="F32")
    ema(model)
    ema.flush()

    expected = {n: average[n] - 0.5 * (average[n] - p.detach().float()) for n, p in model.named_parameters()}
    assert same(client.pull(run_name), expected)


@pytest.mark.parametrize("borrow", [False, True])
def test_mixed_precision(make_ema: Callable[..., RemoteEma], client: EmaClient, borrow: bool) -> None:
    """Autocast and a scaler of gradients: the float32 parameters are averaged, also where the scaler leaves out a step
    (and no hook of the optimizer is called)."""
    model = nn.Linear(8, 4)
    ema, oracle = make_ema(model, 0.9, borrow=borrow), LitEmaOracle(model, 0.9)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=8.0)
    left_out = 0
    for step in range(6):
        before = values(model)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.randn(16, 8)).square().mean() * (float("inf") if step == 3 else 1.0)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        left_out += same(values(model), before)
        ema(model)
        oracle(model)
    ema.flush()

    assert left_out == 1
    assert same(client.pull(ema.run), oracle.shadow)


def test_push_dtype_halves_the_traffic(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """Parameters are sent in bf16, of which the float32 shadow is the average that LitEma's arithmetic gives."""
    model = nn.Linear(3, 3)
    ema = make_ema(model, 0.9, push_dtype=torch.bfloat16)
    sent = nn.Linear(3, 3).bfloat16()
    sent.load_state_dict(model.state_dict())
    oracle = LitEmaOracle(sent, 0.9)
    for _ in range(5):
        train(model)
        ema(model)
        sent.load_state_dict(model.state_dict())
        oracle(sent)
    ema.copy_to(model)

    assert client.run(ema.run).shadow_dtype == "F32"
    assert same(values(model), oracle.shadow)


def test_buffers_are_averaged_if_asked_for(make_ema: Callable[..., RemoteEma]) -> None:
    """BatchNorm's statistics become tensors of the run; copy_to() and scope() write and restore them; counters stay."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    ema = make_ema(model, 0.5, False, buffers="average")
    began = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model(torch.randn(8, 2) + 3)
    ema(model)
    now = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with ema.scope(model):
        inside = dict(model.named_buffers())
        middle = began["1.running_mean"] - 0.5 * (began["1.running_mean"] - now["1.running_mean"])
        assert torch.equal(inside["1.running_mean"], middle)
        assert inside["1.num_batches_tracked"] == 1

    assert all(torch.equal(buffer, now[name]) for name, buffer in model.named_buffers())


def test_buffers_are_copied_if_asked_for(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """Beside averages are the statistics of the latest update, in every average, as with torch's AveragedModel."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    averages = (AverageConfig("slow"), AverageConfig("fast", decay=0.1))
    ema = make_ema(model, 0.5, False, buffers="copy", averages=averages, update_every=2, push_dtype=torch.bfloat16)
    theirs = AveragedModel(model, use_buffers=False)
    for step in range(1, 6):
        model(torch.randn(8, 2) + 3)
        train(model)
        ema(model)
        if step % 2 == 0:
            theirs.update_parameters(model)
    newest = {n: b for n, b in theirs.module.named_buffers() if b.is_floating_point()}
    now = {**values(model), **{name: buffer.clone() for name, buffer in model.named_buffers()}}
    with ema.scope(model):
        inside = dict(model.named_buffers())
        assert all(torch.equal(inside[name], buffer) for name, buffer in newest.items())
        assert inside["1.num_batches_tracked"] == 5
        assert not torch.equal(model[0].weight, now["0.weight"])

    assert all(torch.equal(tensor, now[name]) for name, tensor in model.state_dict().items())
    for average in ("slow", "fast"):
        pulled = client.pull(ema.run, average=average)
        assert all(torch.equal(pulled[name], buffer) for name, buffer in newest.items())


@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_forward_right_after_the_update(make_ema: Callable[..., RemoteEma], buffers: BufferPolicy) -> None:
    """Buffers change in the next forward pass, where no step of an optimizer waits: that is not in the update."""
    model = nn.Sequential(nn.Linear(1000, 1000), nn.BatchNorm1d(1000))
    ema = make_ema(model, 0.0, False, borrow=True, buffers=buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(10):
        optimizer.step()
        ema(model)
        mean = model[1].running_mean.clone()
        model[1].running_mean.add_(1)
        target = copy.deepcopy(model)
        ema.copy_to(target)
        assert torch.equal(target[1].running_mean, mean)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("buffers", ["average", "copy"])
def test_forward_on_a_gpu_right_after_the_update(make_ema: Callable[..., RemoteEma], buffers: BufferPolicy) -> None:
    """The same where the copy to the host runs beside the training, behind 256 MiB of parameters."""
    model = nn.Sequential(nn.Linear(8192, 8192, device="cuda"), nn.BatchNorm1d(8192, device="cuda"))
    ema = make_ema(model, 0.0, False, buffers=buffers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.step()
        ema(model)
        mean = model[1].running_mean.clone()
        model[1].running_mean.add_(1)
        target = copy.deepcopy(model)
        ema.copy_to(target)
        assert torch.equal(target[1].running_mean, mean)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another model's optimizer"])
def test_replayed_steps_on_a_gpu(make_ema: Callable[..., RemoteEma], beside: bool) -> None:
    """A captured graph is replayed right after the update, and no hook fires: what was there is sent all the same."""
    model, other = nn.Linear(8192, 8192, device="cuda"), nn.Linear(2, 2, device="cuda")
    ema = make_ema(model, 0.0, False)
    optimizer, others = (torch.optim.SGD(each.parameters(), lr=0.5, foreach=True) for each in (model, other))
    for each in [*model.parameters(), *other.parameters()]:
        each.grad = torch.ones_like(each)
    optimizer.step()
    ema(model)
    ema.flush()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    target = copy.deepcopy(model)
    for _ in range(5):
        graph.replay()
        if beside:
            others.step()
        expected = values(model)
        ema(model)
        graph.replay()
        ema.copy_to(target)
        assert same(values(target), expected)


@pytest.mark.gpu
@needs_cuda
def test_steps_on_two_streams(make_ema: Callable[..., RemoteEma]) -> None:
    """Two optimizers that step on streams of their own both wait for the copy that was begun on a third."""
    model = nn.Sequential(nn.Linear(8192, 8192, device="cuda"), nn.Linear(8192, 8192, device="cuda"))
    ema = make_ema(model, 0.0, False)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.5) for each in model]
    streams = [torch.cuda.Stream() for _ in optimizers]
    target = copy.deepcopy(model)
    for each in model.parameters():
        each.grad = torch.ones_like(each)
    for _ in range(5):
        expected = values(model)
        ema(model)
        torch.cuda.current_stream().record_event(begun := torch.cuda.Event())
        for optimizer, stream in zip(optimizers, streams, strict=True):
            stream.wait_event(begun)
            with torch.cuda.stream(stream):
                optimizer.step()
        torch.cuda.synchronize()
        ema.copy_to(target)
        assert same(values(target), expected)


def test_half_of_the_parameters_change_by_hand(make_ema: Callable[..., RemoteEma]) -> None:
    """Nothing waits there, though torch's optimizer of the other half does: a copy is sent of all, not live memory."""
    model = nn.Sequential(nn.Linear(2000, 2000), nn.Linear(2000, 2000))
    ema = make_ema(model, 0.0, False, borrow=True)
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.5)
    target = copy.deepcopy(model)
    for _ in range(5):
        optimizer.step()
        expected = values(model)
        ema(model)
        with torch.no_grad():
            model[1].weight.add_(1)
        ema.copy_to(target)
        assert same(values(target), expected)


def test_frozen_later(make_ema: Callable[..., RemoteEma]) -> None:
    """A parameter frozen in the middle goes on being averaged, with one warning; copy_to() and scope() include it."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ema, oracle = make_ema(model, 0.5), LitEmaOracle(model, 0.5)
    train(model)
    ema(model)
    oracle(model)
    model[0].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"were frozen; .*: 0\.bias, 0\.weight") as warned:
        ema(model)
    ema(model)
    model[0].requires_grad_(True)
    for _ in range(2):
        oracle(model)
    model[0].requires_grad_(False)
    training = values(model)
    with ema.scope(model):
        assert same(values(model), oracle.shadow)

    assert len(warned) == 1
    assert same(values(model), training)


def test_tied_weights_in_a_model_that_has_them_apart(make_ema: Callable[..., RemoteEma]) -> None:
    """The average of a tied tensor goes to both of its names, and scope() gives both back."""
    model = Zoo()
    ema = make_ema(model, 0.5)
    train(model)
    ema(model)
    apart = Zoo()
    apart.head.weight = nn.Parameter(torch.zeros_like(apart.head.weight))
    before = values(apart)
    with ema.scope(apart):
        assert torch.equal(apart.head.weight, apart.table.weight)

    assert same(values(apart), before)


def test_reads_wait_for_what_was_sent(make_ema: Callable[..., RemoteEma]) -> None:
    """Right after update(), each of them is of the state with it."""
    model = nn.Linear(300, 300)
    ema = make_ema(model, 0.0, False)
    for _ in range(5):
        train(model)
        ema(model)
        target = nn.Linear(300, 300)
        ema.copy_to(target)
        assert same(values(target), values(model))
    counted = make_ema(model, run=ema.run + "-counted")
    for number in range(1, 5):
        counted(model)
        assert counted.num_updates == number
        assert counted.pending == 0
    assert counted.stats.sent == 4


@pytest.mark.parametrize("borrow", [False, True])
def test_optimizer_right_after_the_update(make_ema: Callable[..., RemoteEma], borrow: bool) -> None:
    """What the optimizer does while the update is on its way is not in it: the EMA is LitEma's, bit for bit."""
    model = nn.Sequential(*(nn.Linear(400, 400) for _ in range(5)))
    ema, oracle = make_ema(model, 0.9, borrow=borrow), LitEmaOracle(model, 0.9)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(20):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        ema(model)
        oracle(model)
    ema.copy_to(model)

    assert same(values(model), oracle.shadow)


def test_borrowing_waits_in_the_optimizers_step(make_ema: Callable[..., RemoteEma]) -> None:
    """update() returns while the parameters are being sent; the step that would change them waits. Before a step was
    seen, and where no optimizer is, a copy is sent."""
    model = nn.Linear(2000, 2000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = make_ema(model, borrow=True)
    ema(model)
    optimizer.step()
    assert ema.pending == 1
    ema(model)
    optimizer.step()
    assert ema.pending == 0
    ema(model)
    ema(model)
    optimizer.step()
    assert ema.pending == 1, "the step waited for a copy"


def test_dropped_without_close(server: Any, client: EmaClient, run_name: str) -> None:
    """What was sent is applied, and neither thread nor hook is left."""
    model, others = nn.Linear(50, 50), _hooks()
    ema = RemoteEma(model, run=run_name, url=server.url, borrow=True)
    ema(model)
    [thread] = [thread for thread in threading.enumerate() if run_name in thread.name]
    [hook] = _hooks() - others
    del ema
    gc.collect()
    thread.join(20)

    assert not thread.is_alive()
    assert client.run(run_name).step == 1
    gc.collect()
    assert hook() is None


def _hooks() -> set[weakref.ref[StepHook]]:
    """Our optimizer hooks, each of which torch holds until it is removed."""
    return {weakref.ref(found) for found in gc.get_objects() if type(found) is StepHook}


def test_close_reports_what_failed_and_closes(make_ema: Callable[..., RemoteEma], client: EmaClient) -> None:
    """close() raises what nobody was told of yet, once; a block that raised keeps its own error."""
    model = nn.Linear(2, 2)
    ema = make_ema(model)
    client.delete_run(ema.run)
    ema(model)
    with pytest.raises(RunNotFound):
        ema.close()
    ema.close()
    with pytest.raises(UsageError, match="closed"):
        ema(model)
    other = make_ema(model)
    client.delete_run(other.run)
    with pytest.raises(Oops), other:
        raise oops_after(lambda: other(model))


def test_service_gone_for_good(relay: Callable[..., Any], run_name: str) -> None:
    """A trainer whose service never comes back trains on; flush() and reads say so, and close() ends it."""
    model = nn.Linear(2, 2)
    gate = relay(lambda _: False)
    with EmaClient(gate.url, retry=ONCE) as client:
        ema = RemoteEma(model, run=run_name, client=client)
        ema(model)
        ema.flush()
        gate.close()
        for _ in range(100):
            ema(model)
        with pytest.raises(TransportError):
            ema.flush()
        with pytest.raises(TransportError):
            _ = ema.num_updates
        with pytest.raises(TransportError):
            ema.copy_to(model)
        with pytest.raises(TransportError):
            ema.close()

    assert ema.stats.sent == 1
    assert ema.stats.skipped >= 98


def test_gateway_before_a_restarting_service_loses_no_update(
    scripted: Callable[..., Any], relay: Callable[..., Any], client: EmaClient, run_name: str
) -> None:
    """While the service restarts a gateway answers 502: updates are sent again, as without the gateway."""
    away = threading.Event()
    way = relay(lambda _: False).scripts[0]

    def gateway(peer: Any) -> None:
        if not away.is_set():
            return way(peer)
        while request := peer.request():
            peer.body(request.length)
            peer.answer(502, b"<html>Bad Gateway</html>", "text/html", Connection="close")
            if not away.is_set():
                return None
        return None

    model = nn.Linear(2, 2)
    with contextlib.closing(RemoteEma(model, 0.9, run=run_name, url=scripted(gateway).url)) as ema:
        oracle = LitEmaOracle(model, 0.9)
        for step in range(40):
            if step == 10:
                away.set()
                threading.Timer(1.0, away.clear).start()
            train(model)
            ema(model)
            oracle(model)
        ema.flush()
        assert ema.stats.sent == 40
    assert same(client.pull(run_name), oracle.shadow)
