"""The machine code of the compiled loops: made once by numba, kept in a folder of the user's own, and loaded by LLVM.

numba and what it imports take 0.5 s and 130 MiB of a process, to load code that it compiled before as well. So a
process of its own compiles (loops/build.py), and what it made is loaded here in 30 ms.

A file holds the object code of one group of loops, and ends in a digest of all that the code depends on: the
processor, the versions of the compilers, the loops' source, the code itself. A file whose digest is another is as good
as none, and so is one that another user may write: its code would be run.

Knows files and LLVM's loader. Does not know what the loops compute.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from ema_service.averaging.signatures import SIGNATURES

__all__ = ["AVERAGING", "MEASURING", "MachineCode", "folder"]

_log = logging.getLogger(__name__)

_C_TYPES = {"i8": ctypes.c_int64, "f4": ctypes.c_float, "f8": ctypes.c_double}
_DIGEST_BYTES = hashlib.sha256().digest_size
#: Seconds that compiling a group may take: ten at most on an idle machine.
_BUILD_SECONDS = 300.0
_BUILD = "import sys; sys.path[:] = {path!r}; from ema_service.averaging.loops.build import main; main({group!r})"


class MachineCode:
    """The loops of one group, by name: functions that take numbers and addresses, and release the interpreter lock.

    Loaded by load(), or with the first function that is asked for. Thread-safe.
    """

    def __init__(self, group: str) -> None:
        self._group = group
        self._functions: dict[str, Callable[..., int]] = {}
        self._loading = threading.Lock()

    def __getitem__(self, name: str) -> Callable[..., int]:
        if not self._functions:
            self.load()
        return self._functions[name]

    def load(self) -> None:
        """Load the code; where none is kept that is right, compile it first, which takes seconds."""
        with self._loading:
            if self._functions:
                return
            llvm.initialize_native_target()
            llvm.initialize_native_asmprinter()
            key, path = _key(self._group), folder() / f"{self._group}.code"
            code = _read(path, key)
            if code is None:
                code = _built(self._group)
                _write(path, key, code)
            engine, names = _engine(code), SIGNATURES[self._group]
            self._functions = {name: _function(engine, name, kinds) for name, kinds in names.items()}


AVERAGING, MEASURING = MachineCode("averaging"), MachineCode("measuring")


def folder() -> Path:
    """Where machine code is kept: $NUMBA_CACHE_DIR, or ``ema-service`` in the user's cache folder."""
    named = os.environ.get("NUMBA_CACHE_DIR")
    cache = os.environ.get("XDG_CACHE_HOME")
    return Path(named) if named else (Path(cache) if cache else Path.home() / ".cache") / "ema-service"


def _engine(code: bytes) -> Any:
    """What holds the code in memory, ready to run."""
    machine = llvm.Target.from_default_triple().create_target_machine(jit=True, codemodel="jitdefault")
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


def _function(engine: Any, name: str, kinds: str) -> Callable[..., int]:
    """A loop as a function of Python, which keeps the code in memory as long as it lives."""
    # As numba calls functions: the addresses of result and fault come first, and a status is returned.
    types: list[Any] = [ctypes.c_void_p if kind.endswith("*") else _C_TYPES[kind] for kind in kinds.split()]
    signature = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, *types)
    function = signature(engine.get_function_address(name))
    # Bound here: a loop is called for every piece of a push.
    number, nothing, reference = ctypes.c_int64, ctypes.c_void_p, ctypes.byref

    def call(*arguments: float) -> int:
        result, fault = number(), nothing()
        if function(reference(result), reference(fault), *arguments):
            raise RuntimeError(f"the compiled loop {name} failed")
        return result.value

    call.engine = engine  # type: ignore[attr-defined]  # the code's memory lives as long as the function
    return call


# --- compiling -------------------------------------------------------------------------------------------------------


def _built(group: str) -> bytes:
    """The object code of a group, compiled by a process of its own; by this one where no process can be started."""
    command = [sys.executable, "-P", "-c", _BUILD.format(path=sys.path, group=group)]
    try:
        # A session of its own: Ctrl-C at a terminal ends the server, which then waits for what it began.
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=_BUILD_SECONDS,
            start_new_session=True,
        )
    except (OSError, subprocess.SubprocessError) as fault:
        _log.info("no process could compile the loops, so this one does: %s", fault)
    else:
        return done.stdout
    from ema_service.averaging.loops.build import build

    return build(group)


def _key(group: str) -> bytes:
    """Of all that the code of a group depends on, but for itself."""
    here = Path(__file__).parent
    digest = hashlib.sha256(group.encode())
    for word in (llvm.get_default_triple(), llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()):
        digest.update(word.encode() + b"\0")
    for package in ("llvmlite", "numba", "numpy"):
        digest.update(version(package).encode() + b"\0")
    for path in (Path(__file__), here / "signatures.py", here / "xxh3.py", *sorted((here / "loops").glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.digest()


# --- files -----------------------------------------------------------------------------------------------------------


def _read(path: Path, key: bytes) -> bytes | None:
    """The code in a file; None where there is none, or other code, or somebody else may have written it."""
    try:
        if not (_own(path.parent) and _own(path)):
            return None
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as fault:
        _log.info("compiled code cannot be read, and is compiled anew: %s", fault)
        return None
    code, digest = raw[:-_DIGEST_BYTES], raw[-_DIGEST_BYTES:]
    return code if hashlib.sha256(key + code).digest() == digest else None


def _write(path: Path, key: bytes, code: bytes) -> None:
    """Keep the code for the next process, if that can be done."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _own(path.parent):
            return
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as file:
            file.write(code + hashlib.sha256(key + code).digest())
        with ExitStack() as undo:
            undo.callback(Path(file.name).unlink)
            Path(file.name).replace(path)
            undo.pop_all()
    except OSError as fault:
        _log.warning("compiled code cannot be kept, so that each start compiles anew: %s", fault)


def _own(path: Path) -> bool:
    """Whether this user owns a file or a folder, and no other may write to it. Raises OSError."""
    found = path.stat()
    own = found.st_uid in (os.geteuid(), 0) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if not own:
        _log.warning("%s belongs to another user, or others may write to it: compiled code is not kept there", path)
    return own
