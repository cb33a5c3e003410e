"""Files at their places: whole or not there, at the place that a user named, and nothing beside them, however it ended.

Knows: the file system's kinds of files, processes that are killed. Does not know what the files hold.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from ema_client import EmaClient, wire
from ema_client.atomic import move_whole, open_kept, open_whole, whole_file
from ema_client.checkpoints import write
from ema_client.errors import UsageError
from ema_client.protocol import TensorSpec, WeightsInfo

INFO = WeightsInfo("r", "ema", "1.3", 3, 3, 0.5)
SIZE = 1 << 20
PATIENCE = 30.0
#: What a system without nameless files lacks.
WITHOUT_NAMELESS = "import os; del os.O_TMPFILE\n"
COMMAND = "from ema_client.cli import main; main()"
LIBRARY = "import sys; from ema_client import EmaClient; EmaClient(sys.argv[1]).download('r', sys.argv[2])"

linux = pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="files without a name are Linux's")


@pytest.fixture(params=[pytest.param("nameless", marks=linux), "named"])
def files(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways that a file takes to its place."""
    if request.param == "named":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    return str(request.param)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_whole(path: Path, data: bytes) -> None:
    with open_whole(path) as file:
        file.write(data)


# --- whole, or not there --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("files")
def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    """Until the block ends there is the older file or none; afterwards the new one, and no other."""
    path = tmp_path / "w"
    for data in (b"first", b"second"):
        before = path.read_bytes() if path.exists() else None
        with open_whole(path) as file:
            file.write(data)
            assert (path.read_bytes() if path.exists() else None) == before
        assert path.read_bytes() == data
    assert names(tmp_path) == ["w"]


@pytest.mark.usefixtures("files")
def test_a_block_that_raises_leaves_what_was_there(tmp_path: Path) -> None:
    """The older file stays as it was, and nothing is beside it."""
    path = tmp_path / "w"
    path.write_bytes(b"old")

    def break_off() -> None:
        with open_whole(path) as file:
            file.write(b"new")
            raise KeyError

    with pytest.raises(KeyError):
        break_off()
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["w"])


@pytest.mark.usefixtures("files")
def test_two_at_once_are_both_whole(tmp_path: Path) -> None:
    """Writers of one file do not write into one another's; who ends last is what stays."""
    path = tmp_path / "w"
    with open_whole(path) as first:
        first.write(b"1" * 1000)
        with open_whole(path) as second:
            second.write(b"2" * 10)
        assert path.read_bytes() == b"2" * 10
        first.write(b"1")
    assert (path.read_bytes(), names(tmp_path)) == (b"1" * 1001, ["w"])


@pytest.mark.usefixtures("files")
def test_permissions_stay(tmp_path: Path) -> None:
    """A file that others may not read stays such a file; a new one is as the umask says."""
    closed, new = tmp_path / "closed", tmp_path / "new"
    closed.touch(0o600)
    for path in (closed, new):
        write_whole(path, b"data")
    (tmp_path / "usual").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("closed", "new", "usual")]
    assert modes == [0o600, modes[2], modes[2]]


def test_what_writes_by_path_is_whole_as_well(tmp_path: Path) -> None:
    """whole_file() gives a path beside the place, replaces the file that a link names, and leaves nothing else."""
    (tmp_path / "link").symlink_to("w")
    with whole_file(tmp_path / "link") as part:
        part.write_text("whole")
        assert part.parent == tmp_path
        assert not (tmp_path / "w").exists()
    assert ((tmp_path / "w").read_text(), names(tmp_path)) == ("whole", ["link", "w"])


# --- at its place ---------------------------------------------------------------------------------------------------


def make_folder(path: Path) -> None:
    path.mkdir()


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))


def make_device(path: Path) -> None:
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root makes devices, and not in every container")


MAKES: dict[str, Callable[[Path], None]] = {
    "a folder": make_folder,
    "a pipe": lambda path: os.mkfifo(path),
    "a socket": make_socket,
    "a device": make_device,
}


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", MAKES)
def test_what_is_no_plain_file_stays(
    free_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, linked: bool
) -> None:
    """A folder, pipe, socket or device is neither replaced nor written to, and that is said before anything is asked of
    the service: by a download, an export, and a move."""
    monkeypatch.chdir(tmp_path)
    there, whole = tmp_path / "there", tmp_path / "whole"
    MAKES[kind](there)
    whole.touch()
    path = tmp_path / "link" if linked else there
    if linked:
        path.symlink_to(there)
    before = there.stat()
    with EmaClient(free_url) as client:
        actions: tuple[Callable[[], object], ...] = (
            lambda: client.download("r", path),
            lambda: write(path, "litema", {"w": torch.ones(1)}, INFO),
            lambda: write(path, "safetensors", {"w": torch.ones(1)}, INFO),
            lambda: move_whole(whole, path),
            lambda: whole_file(path).__enter__(),
        )
        for action in actions:
            with pytest.raises(UsageError, match=f"is {kind}, which a file would replace; nothing was written"):
                action()
    after = there.stat()
    assert (after.st_ino, after.st_mode, after.st_mtime_ns) == (before.st_ino, before.st_mode, before.st_mtime_ns)


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("there", [False, True])
def test_a_link_stays_a_link(tmp_path: Path, there: bool) -> None:
    """The file that a link names is replaced, or made where it is not there; links of links too."""
    folder = tmp_path / "folder"
    folder.mkdir()
    if there:
        (folder / "w").write_bytes(b"old")
    (tmp_path / "one").symlink_to(Path("folder") / "w")
    (tmp_path / "two").symlink_to("one")
    write_whole(tmp_path / "two", b"new")
    assert (folder / "w").read_bytes() == b"new"
    assert ((tmp_path / "one").is_symlink(), (tmp_path / "two").is_symlink()) == (True, True)
    assert (names(folder), names(tmp_path)) == (["w"], ["folder", "one", "two"])


# --- however it ends ------------------------------------------------------------------------------------------------


def body(size: int = SIZE) -> bytes:
    return wire.build_header(wire.place([TensorSpec("w", (size // 4,), "F32")]), INFO.to_metadata()) + bytes(size)


def half_a_body(peer: Any, size: int = SIZE) -> None:
    """Send half of the weights and wait for the client to hang up."""
    raw = body(size)
    peer.request()
    head = f'HTTP/1.1 200 OK\r\nContent-Length: {len(raw)}\r\nETag: "1.3"\r\n\r\n'
    peer.send(head.encode() + raw[: len(raw) // 2])
    peer.sock.recv(1)


def _size(part: Path) -> int:
    """Bytes of a file; -1 where it has just got another name."""
    try:
        return part.stat().st_size
    except FileNotFoundError:
        return -1


def killed(program: str, url: str, path: Path, how: signal.Signals, *, after: int = 0) -> int:
    """Run a program that downloads to ``path``, kill it in the midst, and give its exit code.

    after: bytes that a part with a name has by then.
    """
    words = [url, str(path)] if program.endswith(LIBRARY) else ["--url", url, "pull", "r", "-o", str(path)]
    # Under nohup, SIGHUP is ignored here, and so it would be there.
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words], stderr=subprocess.PIPE, preexec_fn=_hear_hangups
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not any(_size(part) >= after for part in path.parent.glob(".*.part")) and (
            after or not _writes_below(process.pid, path.parent)
        ):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(how)
        process.communicate(timeout=PATIENCE)
        return process.returncode
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE)


def _hear_hangups() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def _writes_below(pid: int, folder: Path) -> bool:
    """Whether the process has an open file in the folder, with or without a name."""
    try:
        return any(folder in link.readlink().parents for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


@linux
@pytest.mark.parametrize(
    ("program", "how"),
    [(COMMAND, signal.SIGTERM), (COMMAND, signal.SIGINT), (LIBRARY, signal.SIGTERM), (LIBRARY, signal.SIGKILL)],
    ids=["command-TERM", "command-INT", "library-TERM", "library-KILL"],
)
def test_a_killed_download_leaves_nothing(
    scripted: Callable[..., Any], tmp_path: Path, program: str, how: signal.Signals
) -> None:
    """What scancel, Kubernetes and Ctrl-C send leaves no hidden file. Of what they send next `ema pull` alone leaves
    one, see test_a_killed_command_goes_on()."""
    killed(program, scripted(half_a_body).url, tmp_path / "w.safetensors", how)
    assert names(tmp_path) == []


def test_a_killed_command_goes_on(scripted: Callable[..., Any], tmp_path: Path) -> None:
    """kill -9 leaves the bytes that came: the next `ema pull` asks for the others alone, if the weights are the same.

    Of other weights they are dropped, and a file is whole in either case.
    """
    size = 4 << 20
    path, raw, asked = tmp_path / "w.safetensors", body(size), []

    def rest(peer: Any) -> None:
        """Send from the first byte, or those that a Range names, as the service does."""
        while request := peer.request():
            asked.append(request.headers.get("range"))
            start = int(asked[-1].removeprefix("bytes=").partition("-")[0])
            span = {"Content_Range": f"bytes {start}-{len(raw) - 1}/{len(raw)}"}
            peer.answer(206, raw[start:], "application/octet-stream", ETag='"1.3"', **span)

    server = scripted(partial(half_a_body, size=size), rest)
    assert killed(COMMAND, server.url, path, signal.SIGKILL, after=size // 4) == -signal.SIGKILL
    [part] = tmp_path.iterdir()
    came = part.stat().st_size
    assert pulled(server.url, path) == (0, raw)
    begun, went_on = asked
    assert begun.startswith("bytes=0-")
    assert went_on.startswith(f"bytes={came}-")
    assert names(tmp_path) == ["w.safetensors"]

    part.write_bytes(b"of other weights")
    part.rename(part := tmp_path / f".w.safetensors.{'0' * 16}.part")
    assert pulled(server.url, path) == (0, raw)
    assert (set(asked[2:]), names(tmp_path)) == ({begun}, ["w.safetensors"])


def pulled(url: str, path: Path) -> tuple[int, bytes]:
    words = [sys.executable, "-c", COMMAND, "--url", url, "pull", "r", "-o", str(path)]
    done = subprocess.run(words, capture_output=True, timeout=PATIENCE, check=False)
    return done.returncode, path.read_bytes()


def test_without_nameless_files_the_command_clears_up(scripted: Callable[..., Any], tmp_path: Path) -> None:
    """SIGTERM and SIGHUP end the command in order: its hidden file is gone, and the exit code is a shell's."""
    url = scripted(half_a_body).url
    for how in (signal.SIGTERM, signal.SIGHUP):
        assert killed(WITHOUT_NAMELESS + COMMAND, url, tmp_path / "w.safetensors", how) == 128 + how
        assert names(tmp_path) == []


def test_without_nameless_files_the_next_takes_over(
    scripted: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed program leaves at most one file under one name, however often; the next download takes it over."""
    path = tmp_path / "w.safetensors"
    for _ in range(2):
        killed(WITHOUT_NAMELESS + LIBRARY, scripted(half_a_body).url, path, signal.SIGKILL)
        assert names(tmp_path) == [".w.safetensors.part"]
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)

    def whole(peer: Any) -> None:
        peer.request()
        peer.answer(200, body(), "application/octet-stream", ETag='"1.3"')

    with EmaClient(scripted(whole).url) as client:
        client.download("r", path)
    assert (path.read_bytes(), names(tmp_path)) == (body(), ["w.safetensors"])


def at_once(write: Callable[[int], bytes]) -> tuple[list[OSError], bool]:
    """Have four threads write often. write: called with a thread's number, gives what was read back. Returns faults,
    and whether anything read was not whole, or of several threads."""
    faults, torn = [], []

    def write_often(number: int) -> None:
        try:
            for _ in range(40):
                data = write(number)
                torn.append(len(data) != 4096 or len(set(data)) != 1)
        except OSError as fault:
            faults.append(fault)

    threads = [threading.Thread(target=write_often, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return faults, any(torn)


def test_many_writers_of_one_named_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever wins, the file is always whole, nobody fails, and nothing is left."""
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    path = tmp_path / "w"

    def write(number: int) -> bytes:
        write_whole(path, bytes([number]) * 4096)
        return path.read_bytes()

    assert (*at_once(write), names(tmp_path)) == ([], False, ["w"])


def test_many_downloads_to_one_place(tmp_path: Path) -> None:
    """As above: of several that begin at once none goes on with what another writes to."""

    def write(number: int) -> bytes:
        with open_kept(tmp_path / "w") as kept:
            kept.file.seek(0)
            for _ in range(4):
                kept.file.write(bytes([number]) * 1024)
                kept.file.flush()
            kept.file.seek(0)
            return kept.file.read()

    assert (*at_once(write), names(tmp_path)) == ([], False, ["w"])
