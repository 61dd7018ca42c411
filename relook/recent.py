"""The most recently used things, up to a number of bytes."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")
_LOCK = threading.Lock()  # of all memories; the module's, so that what holds one can be sent to another process


class Recent(Generic[T]):
    """A memory for what is costly to make again. Threads may share one.

    Args:
        limit: bytes that it may hold. The last thing put in may be larger by itself, and is then not kept.
        size: bytes of a thing.
    """

    def __init__(self, limit: int, size: Callable[[T], int]) -> None:
        self.limit, self.size = limit, size
        self._kept: OrderedDict[Hashable, T] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable) -> T | None:
        with _LOCK:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Hashable, thing: T) -> None:
        with _LOCK:
            if key not in self._kept:  # else another thread was faster
                self._kept[key] = thing
                self._bytes += self.size(thing)
            while self._bytes > self.limit:
                self._bytes -= self.size(self._kept.popitem(last=False)[1])
