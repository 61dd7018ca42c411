"""Work that is done ahead, by threads or processes: reading and decoding images must not keep the model waiting."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")
WORKERS = max(1, min(8, (os.cpu_count() or 1) - 1))  # Pillow and numpy let other threads run while they work


def ahead(
    function: Callable[[A], B], inputs: Iterable[A], pool: Executor | None = None, window: int = WORKERS
) -> Iterator[B]:
    """`map`, in order, with the next few results already under way. An exception is raised where its result is due.

    Args:
        pool: who does the work, and is shut down at the end; without it, threads.
        window: how many inputs are taken ahead of the result that is due.
    """
    waiting: deque[Future[B]] = deque()
    pool = pool or ThreadPoolExecutor(WORKERS)
    try:
        for one in inputs:
            waiting.append(pool.submit(function, one))
            if len(waiting) > window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
