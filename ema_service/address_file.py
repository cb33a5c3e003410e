"""A file that says where a server is, for clients that are started elsewhere: ``file:///PATH`` is their URL.

The file holds one line, a URL. A server has it there from the moment it listens until it begins to stop; that of a
server that was killed stays, until the next one removes it at its start. No secret is in it: its permissions are those
of the umask, and tokens travel another way.

Knows one small file. Does not know addresses, sockets, or who reads it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

__all__ = ["AddressFile"]

_log = logging.getLogger(__name__)


class AddressFile:
    """The file ``path`` of one server, with its URL once show() was called."""

    def __init__(self, path: Path, url: str) -> None:
        """Write the file under a hidden name, and remove what an earlier server left under its own.

        What can fail fails here, before anything is served: raises OSError.
        """
        self._path = path.absolute()
        self._text = f"{url}\n"
        self._hidden = self._path.with_name(f".{path.name}.part")
        try:
            with contextlib.ExitStack() as undo:
                undo.callback(self._remove, self._hidden)
                self._hidden.unlink(missing_ok=True)
                with self._hidden.open("x", encoding="utf-8") as file:
                    file.write(self._text)
                    file.flush()
                    os.fsync(file.fileno())
                self._path.unlink(missing_ok=True)
                undo.pop_all()
        except OSError as fault:
            raise OSError(fault.errno, f"the address file {path} cannot be written: {fault.strerror}") from None

    def show(self) -> None:
        """Let clients find the file, whole. A failure is logged: who has the address may use the server."""
        try:
            self._hidden.replace(self._path)
        except OSError as fault:
            _log.error("clients are not told where the server is: %s cannot be written: %s", self._path, fault)

    def withdraw(self) -> None:
        """Remove the file, unless another server has written its own there since."""
        self._remove(self._hidden)
        try:
            ours = self._path.read_text(encoding="utf-8") == self._text
        except (OSError, UnicodeDecodeError):
            return
        if ours:
            self._remove(self._path)

    def _remove(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
