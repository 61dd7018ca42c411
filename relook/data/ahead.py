"""Work that is done ahead of the model by threads: reading and decoding images must not keep it waiting."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")
WORKERS = max(1, min(8, (os.cpu_count() or 1) - 1))  # Pillow and numpy let other threads run while they work


def ahead(function: Callable[[A], B], inputs: Iterable[A]) -> Iterator[B]:
    """`map`, in order, with the next few results already under way. An exception is raised where its result is due."""
    waiting: deque[Future[B]] = deque()
    pool = ThreadPoolExecutor(WORKERS)
    try:
        for one in inputs:
            waiting.append(pool.submit(function, one))
            if len(waiting) > WORKERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
