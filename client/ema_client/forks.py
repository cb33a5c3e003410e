"""Forks: a forked process has its parent's sockets, locks and memory, and none of its parent's threads.

A socket used by two processes gives either the other's answers; a lock that a thread of the parent held is never free
again. So each object that holds such things is told in the child, right after the fork: it gives its sockets up, and
goes on with new locks and new connections. An object that lives by a thread asks, before it does anything, whether
this is the process that made it.

Knows: os.fork, and what multiprocessing does with it. Does not know: what an object holds.
"""

from __future__ import annotations

import os
import secrets
import threading
import weakref
from typing import Protocol

from ema_client.errors import UsageError

__all__ = ["Home", "Lock", "tell_in_child", "this_process"]


class _Told(Protocol):
    def after_fork(self) -> None:
        """Called in a forked process before anything else: must not wait, and must not raise."""


_told: weakref.WeakSet[_Told] = weakref.WeakSet()


def tell_in_child(thing: _Told) -> None:
    """Call ``thing.after_fork()`` in every process forked off while ``thing`` lives. Does not hold ``thing``."""
    _told.add(thing)


class Home:
    """The process in which an object was made."""

    __slots__ = ("_pid",)

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_here(self) -> bool:
        """Whether this is that process, and not a fork of it."""
        return os.getpid() == self._pid

    def check(self, what: str, hint: str) -> None:
        """Raises UsageError, naming ``what`` is used, in a fork of that process."""
        if not self.is_here:
            raise UsageError(f"{what} belongs to process {self._pid} and this is a fork of it", hint=hint)


class Lock:
    """A threading.Lock that is free in a forked process, whoever held it: for what is whole at each of its steps."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        tell_in_child(self)

    def after_fork(self) -> None:
        """A new lock: the thread that held the old one is not in this process."""
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class _ProcessName:
    def __init__(self) -> None:
        self.now = secrets.token_hex(8)
        tell_in_child(self)

    def after_fork(self) -> None:
        self.now = secrets.token_hex(8)


_process = _ProcessName()


def this_process() -> str:
    """A name for this process that no other process has: numbers of processes come again, in containers above all."""
    return _process.now


def _tell_all() -> None:
    for thing in list(_told):
        thing.after_fork()


os.register_at_fork(after_in_child=_tell_all)
