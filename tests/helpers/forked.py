"""Processes for tests, forked from the one that tests: a fresh one spends seconds on imports alone.

Where a process ends by a kill, or several share work, nothing else of its start is tested. torch's backward pass works
in a forked process where the parent has not used a GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.state import AcceleratorState

from relook.train.feature_cache import TrunkCache

FORK = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Ended:
    """What processes left: exit codes by rank, negative ones of signals, and what they wrote."""

    codes: list[int]
    stdout: str
    stderr: str


def forked(target: Callable[..., Any], *arguments: Any, count: int = 1) -> Ended:
    """Call a function in a new process, or in several that find each other as those of torchrun do.

    As soon as one of them ends badly, the others are killed.

    Args:
        target: what they call; `several.py` has some.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "WORLD_SIZE": count}
    with TemporaryDirectory() as folder:
        running = []
        for rank in range(count):
            place = {**meeting, "RANK": rank, "LOCAL_RANK": rank} if count > 1 else {}
            variables = {name: str(value) for name, value in {**place, "CUDA_VISIBLE_DEVICES": ""}.items()}
            running.append(FORK.Process(target=_call, args=(target, arguments, variables, Path(folder))))
            running[-1].start()
        _wait_for(running)
        written = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
    return Ended([process.exitcode for process in running], *written)


def _wait_for(running: list[Any]) -> None:
    left = {process.sentinel: process for process in running}
    while left:
        for sentinel in wait(list(left)):
            ended = left.pop(sentinel)
            ended.join()
            if ended.exitcode:
                for process in left.values():
                    process.kill()


def _call(target: Callable[..., Any], arguments: tuple[Any, ...], variables: Mapping[str, str], folder: Path) -> None:
    # What the parent has found out about its own place, and what it has in memory, is not this process's.
    os.environ.update(variables)
    AcceleratorState._reset_state(reset_partial_state=True)
    TrunkCache.current = None
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = (folder / name).open("a", buffering=1)
        os.dup2(file.fileno(), number)
        setattr(sys, name, file)
    target(*arguments)
