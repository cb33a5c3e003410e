"""``ema-service``, that kills itself with SIGKILL at a phase: ``dying.py PHASE_FILE serve ...``.

It dies when it reaches the phase whose name stands in PHASE_FILE; while there is no such file it lives. The service
itself has no hooks: what is known here of its inside is which function begins or ends which phase.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ema_service.bodies.incoming import UpdateBody
from ema_service.cli import main
from ema_service.storage.catalog import MEMORY, Catalog
from ema_service.storage.files import TensorFile
from ema_service.storage.memory_files import MemoryFiles
from ema_service.storage.slot_files import SlotFiles
from ema_service.storage.slots import Slot, Slots
from ema_service.storage.store import Store

PHASE_FILE = Path(sys.argv[1])


def die(phase: str) -> None:
    """If the phase is the one."""
    if PHASE_FILE.exists() and PHASE_FILE.read_text() == phase:
        os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()


def patch(owner: Any, name: str, phases: Callable[..., tuple[str, str]]) -> None:
    """Make ``owner.name`` die before or after it did its work; ``phases`` gives the names of the two."""
    inner = getattr(owner, name)

    def outer(*args: Any, **kwargs: Any) -> Any:
        before, after = phases(*args, **kwargs)
        die(before)
        result = inner(*args, **kwargs)
        die(after)
        return result

    setattr(owner, name, outer)


def named(before: str, after: str = "") -> Callable[..., tuple[str, str]]:
    return lambda *_, **__: (before, after)


def row_of(_catalog: Catalog, _run_id: int, folder: str, *_: object, **__: object) -> tuple[str, str]:
    if folder == MEMORY:
        return "before the memory's row", "memory's row committed"
    return "before the row", "row committed"


def write_half(write: Callable[[Slot, str, int, int], None]) -> Callable[[Slot, str, int, int], None]:
    def outer(slot: Slot, average: str, start: int, stop: int) -> None:
        thread = threading.current_thread().name
        phase = f"half of a slot by {thread.rpartition('_')[0] or thread}"
        half = start + (stop - start) // 2 // 4096 * 4096
        if PHASE_FILE.exists() and half > start:
            write(slot, average, start, half)
            die(phase)
            start = half
        write(slot, average, start, stop)

    return outer


def half_of_a_file(chunks: Any) -> Any:
    for number, chunk in enumerate(chunks):
        if number:
            die("half of a snapshot")
        yield chunk


def save_snapshot(save: Callable[..., None]) -> Callable[..., None]:
    def outer(store: Store, row: object, name: str, info: str, files: dict[str, Any]) -> None:
        save(store, row, name, info, {average: half_of_a_file(chunks) for average, chunks in files.items()})

    return outer


patch(UpdateBody, "advance", lambda _, count: ("receiving" if count > 10_000 else "", ""))
Slot._write = write_half(Slot._write)  # type: ignore[method-assign]
patch(Slot, "finish", named("slot without its header"))
patch(SlotFiles, "sync", named("before a sync", "after a sync"))
patch(Catalog, "put_checkpoint", row_of)
patch(Catalog, "mark_synced", named("before the anchor's row", "after the anchor's row"))
patch(Catalog, "amend_checkpoint", named("before a change", "after a change"))
Store.save_snapshot = save_snapshot(Store.save_snapshot)  # type: ignore[method-assign]
patch(Catalog, "add_snapshot", named("snapshot before its row", "snapshot committed"))
patch(Catalog, "remove_checkpoint", named("before the memory's row goes", "the memory's row is gone"))
patch(MemoryFiles, "create", named("", "memory taken"))
patch(MemoryFiles, "attach", named("", "memory attached"))
patch(MemoryFiles, "remove", named("", "half of the memory is gone"))
patch(TensorFile, "read_into", lambda _, __, start=0: ("half of a restart" if start else "", ""))
patch(Catalog, "set_averages", named("before the averages' row", "averages' row committed"))
patch(Slots, "add", named("", "room of an average taken"))
patch(SlotFiles, "keep_only", named("before an average's files go", "half of an average's files are gone"))
patch(Catalog, "add_run", named("before a run's row", "run's row committed"))
patch(Catalog, "remove_run", named("before a deletion", "half of a deletion"))

if __name__ == "__main__":
    del sys.argv[1]
    main()
