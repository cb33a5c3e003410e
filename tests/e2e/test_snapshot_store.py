"""Snapshots on an object store: moved there, read from there, deleted; kills of server and store, the loss of the data
dir.

Knows a real server and a real server of S3. Does not know how a snapshot is moved.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from safetensors.torch import load
from torch import Tensor
from typer.testing import CliRunner

from ema_client import EmaClient
from ema_service.cli import app as ema_service
from ema_service.storage.objects import ObjectStoreUnusable, open_objects
from tests.emulators import EMULATED, emulator
from tests.s3 import S3Server, named_by_the_environment, needs_s3
from tests.service.cluster.launched import Launched
from tests.waiting import wait_until

if TYPE_CHECKING:
    from tests.conftest import PlainRun, ServerProcess

Start = Callable[..., "ServerProcess"]

BUCKET = "weights"
URL = f"s3://{BUCKET}/ema"
TWO = [{"name": "slow"}, {"name": "fast", "decay": 0.5}]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    needs_s3()
    running = S3Server(tmp_path_factory.mktemp("s3") / "log")
    aws(running).create_bucket(Bucket=BUCKET)
    yield from named_by_the_environment(running)
    running.kill()


@pytest.fixture(scope="module")
def server(
    s3: S3Server,  # noqa: ARG001 - the environment names it
    tmp_path_factory: pytest.TempPathFactory,
    server_class: type[ServerProcess],
) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    running = server_class(folder, ("--snapshot-store", URL), folder / "data").start()
    yield running
    if running.process.poll() is None:
        running.kill()


def aws(s3: S3Server) -> Any:
    """AWS' own client, which none of our code uses."""
    import botocore.session

    given = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
    return botocore.session.get_session().create_client("s3", endpoint_url=s3.url, **given)


def keys(s3: S3Server, run: PlainRun) -> list[str]:
    """The objects of a run."""
    return below(s3, f"ema/{run.name}/")


def below(s3: S3Server, prefix: str) -> list[str]:
    """The objects whose keys begin so."""
    found = aws(s3).list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
    return [each["Key"] for each in found]


def model(seed: int, size: int = 600_000) -> dict[str, Tensor]:
    """Of several reads of the store: 2.4 MB."""
    random = torch.Generator().manual_seed(seed)
    return {"a.w": torch.randn(size, generator=random), "b": torch.randn(7, 5, generator=random)}


def take(run: PlainRun, name: str, **query: int) -> None:
    run.http.put(f"{run.path}/snapshots/{name}", params=query).raise_for_status()


def places(run: PlainRun) -> dict[str, str]:
    found = run.http.get(f"{run.path}/snapshots").raise_for_status().json()["snapshots"]
    return {each["name"]: each["stored"] for each in found}


def moved(run: PlainRun) -> None:
    """Return once all snapshots of the run are in the store."""
    wait_until(lambda: set(places(run).values()) == {"store"}, f"{places(run)} in the store")


def weights(run: PlainRun, snapshot: str, headers: dict[str, str] | None = None, **query: str) -> httpx.Response:
    return run.http.get(f"{run.path}/snapshots/{snapshot}/weights", params=query, headers=headers)


def metric(server: ServerProcess, name: str) -> float:
    [line] = [line for line in httpx.get(f"{server.url}/metrics").text.splitlines() if line.startswith(f"{name} ")]
    return float(line.split()[1])


def test_moved_snapshot_is_read_as_before(
    s3: S3Server, server: ServerProcess, plain_run: Callable[..., PlainRun]
) -> None:
    """Byte for byte, with ETag, ranges and casts, and gone back to; a download that began before the move goes on."""
    run = plain_run(server, model(0), averages=TWO)
    run.push(1, model(1)).raise_for_status()
    s3.pause()  # until the answers of before are there
    try:
        take(run, "s")
        assert places(run) == {"s": "local"}
        before = {average: weights(run, "s", average=average) for average in ("slow", "fast")}
        half = weights(run, "s", average="fast", dtype="F16")
    finally:
        s3.go_on()
    moved(run)

    here = (server.folder / "data" / "runs").glob
    wait_until(lambda: not list(here(f"{run.name}.*/snapshots/*")), "the room in the data dir")
    files = sorted(key.rpartition("/")[2] for key in keys(s3, run))
    assert files == ["fast.safetensors", "slow.safetensors", "snapshot.json"]
    for average, expected in before.items():
        after, etag = weights(run, "s", average=average), expected.headers["etag"]
        assert (after.content, after.headers["etag"]) == (expected.content, etag)
        [key] = [key for key in keys(s3, run) if key.endswith(f"/{average}.safetensors")]
        assert aws(s3).get_object(Bucket=BUCKET, Key=key)["Body"].read() == expected.content
        length = len(expected.content)
        for said, start, stop in (
            ("1000-", 1000, length),
            ("70000-1500000", 70000, 1500001),
            ("-5", length - 5, length),
        ):
            part = weights(run, "s", {"Range": f"bytes={said}", "If-Range": etag}, average=average)
            assert (part.status_code, part.content) == (206, expected.content[start:stop]), said
        assert weights(run, "s", {"If-None-Match": etag}, average=average).status_code == 304
        beyond = weights(run, "s", {"Range": f"bytes={length}-"}, average=average)
        assert (beyond.status_code, beyond.json()["code"]) == (416, "range_not_satisfiable")
    assert weights(run, "s", average="fast", dtype="F16").content == half.content
    assert load(weights(run, "s", prefix="b").content).keys() == {"b"}
    shadows = load(before["slow"].content)
    assert all(torch.equal(found, shadows[name]) for name, found in run.weights(soup="s:1").items())
    run.push(2, model(2)).raise_for_status()
    run.http.post(f"{run.path}/rewind", json={"snapshot": "s"}).raise_for_status()
    assert all(torch.equal(found, shadows[name]) for name, found in run.weights().items())


def test_deleted_snapshot_goes_from_the_store(
    s3: S3Server, server: ServerProcess, plain_run: Callable[..., PlainRun]
) -> None:
    """By its name, for newer ones of its series, and with its run; a reader that has begun reads on to the end."""
    run = plain_run(server, model(0, 4_000_000))
    for name in ("e-1", "e-2", "other"):
        take(run, name)
    moved(run)
    expected = weights(run, "other").content
    with run.http.stream("GET", f"{run.path}/snapshots/other/weights") as reading:
        chunks = reading.iter_raw(1 << 16)
        begun = next(chunks)
        run.http.delete(f"{run.path}/snapshots/other").raise_for_status()
        assert begun + b"".join(chunks) == expected
    wait_until(lambda: not [key for key in keys(s3, run) if "/other." in key], "the snapshot's removal")
    take(run, "e-3", keep=1)
    moved(run)
    wait_until(lambda: {key.split("/")[2].partition(".")[0] for key in keys(s3, run)} == {"e-3"}, "the series' removal")
    run.http.delete(run.path).raise_for_status()
    wait_until(lambda: not keys(s3, run), "the run's removal")
    assert metric(server, "ema_snapshot_removals_waiting") == 0


def test_kills_of_server_and_store(s3: S3Server, server: ServerProcess, plain_run: Callable[..., PlainRun]) -> None:
    """In the middle of an upload. What was acknowledged is read, what lies half in the store is neither told of nor
    stays there, and everything goes on by itself."""
    run = plain_run(server, model(0, 9_000_000), durability="disk")  # 36 MB: three parts of an upload
    take(run, "s")
    expected = weights(run, "s").content
    with suppress(AssertionError):  # quicker than a look at it: then the kill comes after
        wait_until(lambda: aws(s3).list_multipart_uploads(Bucket=BUCKET).get("Uploads"), "an upload's begin", 2)
    s3.pause()
    server.kill()
    server.start()
    s3.go_on()
    run = plain_run(server, name=run.name)
    assert weights(run, "s").content == expected
    moved(run)
    assert weights(run, "s").content == expected
    assert sorted(key.rpartition("/")[2] for key in keys(s3, run)) == ["ema.safetensors", "snapshot.json"]

    with run.http.stream("GET", f"{run.path}/snapshots/s/weights") as reading:
        chunks = reading.iter_raw(1 << 16)
        next(chunks)
        s3.kill()
        with pytest.raises(httpx.RemoteProtocolError):
            list(chunks)
    try:
        check_without_store(server, run)
    finally:
        s3.start()
        aws(s3).create_bucket(Bucket=BUCKET)
    moved(run)
    wait_until(lambda: not metric(server, "ema_snapshot_store_failing"), "the end of the fault")
    assert "Traceback" not in server.log


def check_without_store(server: ServerProcess, run: PlainRun) -> None:
    """Snapshot s cannot be read and can be deleted; others are taken and read; whoever asks is told."""
    refused = weights(run, "s")
    assert (refused.status_code, refused.json()["code"]) == (503, "storage_failed")
    assert "snapshot is there" in refused.json()["hint"]
    take(run, "t")
    assert weights(run, "t").content
    wait_until(lambda: metric(server, "ema_snapshot_store_failing"), "the fault in metrics")
    assert metric(server, "ema_snapshots_waiting") == 1
    words = (sys.executable, "-m", "ema_client", "doctor", "--url", server.url)
    said = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    assert "1 snapshot waits to be moved there" in " ".join(said.split())
    run.http.delete(f"{run.path}/snapshots/s").raise_for_status()
    assert places(run) == {"t": "local"}
    assert httpx.get(f"{server.url}/readyz").status_code == 200


@pytest.mark.parametrize("when", ["from the start", "later"])
def test_credentials_that_are_refused(
    s3: S3Server, start_server: Start, plain_run: Callable[..., PlainRun], when: str
) -> None:
    """Snapshots stay local and are served; log, metrics and doctor have the reason, the log once, however often the
    store is tried; once the store takes the key (again), they are moved by themselves."""
    if when == "from the start":
        s3.refuse()
    try:
        server = start_server("--snapshot-store", URL)
        run = plain_run(server, model(0), name=f"refused-{when.replace(' ', '-')}")
        if when == "later":
            take(run, "before")
            moved(run)
            s3.refuse()
        for name in ("s", "t", "u"):  # each wakes the thread, which tries the store
            take(run, name)
            assert places(run)[name] == "local"
        check_that_the_key_is_refused(server, run, snapshots=3)
        if when == "later":
            refused = weights(run, "before")
            assert (refused.status_code, refused.json()["code"]) == (503, "storage_failed")
            assert "AWS_ACCESS_KEY_ID" in refused.text
    finally:
        s3.accept()
    moved(run)
    wait_until(lambda: not metric(server, "ema_snapshot_store_failing"), "the end of the fault")
    assert metric(server, "ema_snapshots_waiting") == 0
    assert server.log.count("answers again") == 1
    assert "Traceback" not in server.log
    assert "INFO botocore" not in server.log, "a library tells what it does"


def check_that_the_key_is_refused(server: ServerProcess, run: PlainRun, *, snapshots: int) -> None:
    """The service tells why, to whoever asks, and serves what it has."""
    reason = "does not exist in our records.: give the server credentials"
    wait_until(lambda: metric(server, "ema_snapshot_store_failing"), "the fault in metrics")
    assert metric(server, "ema_snapshots_waiting") == snapshots
    assert weights(run, "s").status_code == 200
    told = run.http.get("/v1/server").raise_for_status().json()
    assert reason in told["snapshot_store_fault"]
    words = (sys.executable, "-m", "ema_client", "doctor", "--url", server.url)
    said = subprocess.run(words, capture_output=True, text=True, check=False).stdout
    assert "give the server credentials" in " ".join(said.split())
    assert f"{snapshots} snapshots wait to be moved there" in " ".join(said.split())
    assert server.log.count(reason) == 1


@pytest.mark.soak
def test_lost_data_dir(
    s3: S3Server, server: ServerProcess, start_server: Start, plain_run: Callable[..., PlainRun]
) -> None:
    """Another data dir, whose server had a bucket that is not there, has runs and snapshots again, and goes on from
    them."""
    run = plain_run(server, model(0), averages=TWO, durability="disk")
    take(run, "first")
    run.push(7, model(1)).raise_for_status()
    take(run, "last")
    moved(run)
    expected = {name: weights(run, name, average="fast") for name in ("first", "last")}
    server.kill()
    aws(s3).put_object(Bucket=BUCKET, Key="ema/x/y.1/snapshot.json", Body=b'{"format": 1}')

    again = start_server("--snapshot-store", "s3://nowhere/ema")
    other = plain_run(again, model(0, 100), name="other")
    take(other, "s")
    wait_until(lambda: "s3://nowhere/ema: there is no such bucket: make it first" in again.log, "the log's line")
    assert places(other) == {"s": "local"}
    again.stop()
    again.arguments = "--snapshot-store", URL
    said = CliRunner().invoke(ema_service, ["recover", "--snapshot-store", URL, "--data-dir", str(again.data_dir)])
    assert said.exit_code == 1, "a card cannot be read"
    assert f"{run.name}/first: is there\n{run.name}/last: is there\n" in said.output
    assert "x/y.1: left out" in said.output
    again.start()
    moved(plain_run(again, name="other"))
    found = plain_run(again, name=run.name)
    assert found.info()["status"] == "awaiting_weights"
    assert places(found) == {"first": "store", "last": "store"}
    for name, answer in expected.items():
        after = weights(found, name, average="fast")
        assert (after.content, after.headers["etag"]) == (answer.content, answer.headers["etag"])
    found.http.post(f"{found.path}/rewind", json={"snapshot": "last"}).raise_for_status()
    shadows = load(expected["last"].content)
    assert all(torch.equal(each, shadows[name]) for name, each in found.weights(average="fast").items())
    assert found.info()["step"] == 7
    found.push(8, model(2)).raise_for_status()
    refused = found.http.put(f"{found.path}/snapshots/last")
    assert refused.json()["code"] == "snapshot_exists"


@pytest.mark.soak
def test_hosts_of_a_cluster(s3: S3Server, tmp_path: Path) -> None:
    """Each has its slices in the bucket; they are read, gone back to, recovered and deleted."""
    url = f"s3://{BUCKET}/cluster"
    cluster = Launched(tmp_path / "all", "--local", "2", "--", "--snapshot-store", url).start()
    try:
        with EmaClient(cluster.url) as client:
            client.create_run("r", model(0))
            client.push("r", model(1), step=1)
            client.snapshot("r", "s")
            wanted = dict(client.pull("r"))
            wait_until(lambda: client.snapshots("r")[0].stored == "store", "the move")
            assert len(below(s3, "cluster/")) == 4
            client.push("r", model(2), step=2)
            client.rewind("r", "s")
            assert all(torch.equal(found, wanted[name]) for name, found in client.pull("r").items())
        assert cluster.stop() == 0
        for place in (0, 1):
            flags = f"--snapshot-store={url}", f"--data-dir={tmp_path / 'new' / f'host-{place}'}", f"--shard={place}/2"
            assert CliRunner().invoke(ema_service, ["recover", *flags]).output == "r/s: is there\n"
        cluster = Launched(tmp_path / "new", "--local", "2", "--", "--snapshot-store", url).start()
        with EmaClient(cluster.url) as client:
            client.rewind("r", "s")
            assert all(torch.equal(found, wanted[name]) for name, found in client.pull("r").items())
            client.delete_run("r")
            wait_until(lambda: not below(s3, "cluster/"), "the removal")
    finally:
        cluster.end()


@pytest.mark.soak
@pytest.mark.timeout(300)  # Azure's library tries for more than a minute before it gives a store up
@pytest.mark.parametrize("kind", EMULATED)
def test_store_of_another_kind(
    kind: str, tmp_path: Path, start_server: Start, plain_run: Callable[..., PlainRun]
) -> None:
    """Google's and Azure's: what was moved is read, ranges and all, gone back to, and deleted; a store that goes away
    is told, and costs no snapshot."""
    with emulator(kind, tmp_path) as store:
        files = store.files()
        files.mkdir(BUCKET)
        server = start_server("--snapshot-store", f"{kind}://{BUCKET}/ema")
        run = plain_run(server, model(0, 9_000_000), averages=TWO)
        run.push(1, model(1, 9_000_000)).raise_for_status()
        expected = {average: run.weights(average=average) for average in ("slow", "fast")}
        take(run, "s")
        moved(run)
        for average, shadows in expected.items():
            whole = weights(run, "s", average=average)
            assert all(torch.equal(found, shadows[name]) for name, found in load(whole.content).items())
            part = weights(run, "s", {"Range": "bytes=70000-20000000"}, average=average)
            assert (part.status_code, part.content) == (206, whole.content[70000:20000001])
        run.push(2, model(2, 9_000_000)).raise_for_status()
        run.http.post(f"{run.path}/rewind", json={"snapshot": "s"}).raise_for_status()
        assert all(torch.equal(found, expected["fast"][name]) for name, found in run.weights(average="fast").items())
        run.http.delete(f"{run.path}/snapshots/s").raise_for_status()
        wait_until(lambda: not files.find(f"{BUCKET}/ema"), "the snapshot's removal")
    take(run, "t")
    wait_until(lambda: metric(server, "ema_snapshot_store_failing"), "the fault in metrics", 100)
    assert weights(run, "t").status_code == 200
    assert "Traceback" not in server.log
    assert "INFO azure" not in server.log, "a library tells of each request"


def test_url_that_means_no_store(tmp_path: Path) -> None:
    """It starts no server, touches no data dir, and says what to do."""
    for url, said in (("gs://b/p", "pip install gcsfs"), ("nonsense://b", "nonsense"), ("s3://b", None)):
        words = ["serve", "--port", "0", "--snapshot-store", url, *(["--memory"] if said is None else [])]
        refused = CliRunner().invoke(ema_service, words, env={"EMA_SERVICE_DATA_DIR": str(tmp_path / "data")})
        assert refused.exit_code in (1, 2)
        assert (said or "--memory") in refused.output
    assert not (tmp_path / "data").exists()


def test_store_without_credentials_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of Azure, whose file system is not made without them: the variables to set are named."""
    fsspec = pytest.importorskip("fsspec.core", reason="fsspec is not installed: pip install -e '.[publish]'")

    def refuse(*_: object, **__: object) -> None:
        raise ValueError("unable to connect to account for Must provide account_name with credentials!!")

    monkeypatch.setattr(fsspec, "url_to_fs", refuse)
    with pytest.raises(ObjectStoreUnusable, match="AZURE_STORAGE_CONNECTION_STRING"):
        open_objects("abfs://container/ema")
