"""Thread pools whose finished work holds nothing.

A worker of the standard pool publishes a result first and lets go of the work a moment later. In that moment the next
push may come, find the memory of the version before last still held, and be given new memory: a copy of the model more,
and at 0.5 GB/s, for its pages have never been touched.

Knows threads. Does not know what they work on.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

__all__ = ["Threads"]

T = TypeVar("T")


class Threads(ThreadPoolExecutor):
    """As its base, but by the time a result can be seen the work that gave it, and all it referred to, is let go."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        return super().submit(_Once(fn, args, kwargs))


class _Once:
    def __init__(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = [(fn, args, kwargs)]

    def __call__(self) -> Any:
        fn, args, kwargs = self._call.pop()
        return fn(*args, **kwargs)
