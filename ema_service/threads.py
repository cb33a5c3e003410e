"""Thread pools that drop finished work before its result can be seen.

A worker of the standard pool publishes a result first, and drops the work with everything the work refers to a moment
later. In that moment the next push may arrive, find the memory of the version before last still held, and get fresh
memory: a copy of the model more, written at 0.5 GB/s because its pages have never been touched.

Knows threads. Does not know what they work on.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["Threads"]

T = TypeVar("T")


class Threads(ThreadPoolExecutor):
    """A ThreadPoolExecutor: when a result can be seen, its work, and everything the work referred to, has been
    dropped."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        return super().submit(_Once(fn, args, kwargs))


class _Once:
    """A call that drops its function and arguments before it returns."""

    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = [(fn, args, kwargs)]

    def __call__(self) -> Any:
        fn, args, kwargs = self._call.pop()
        return fn(*args, **kwargs)
