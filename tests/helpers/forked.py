"""Processes for tests, forked from one that has imported relook: a fresh one spends seconds on imports alone.

Where a process ends by a kill, or several share work, nothing else of its start is tested.
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

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["relook.train.run", "relook.evaluate.run", "relook.cli"])


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
        target: of a module that is quick to import; `several.py` has some.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "WORLD_SIZE": count}
    with TemporaryDirectory() as folder:
        running = []
        for rank in range(count):
            place = {**meeting, "RANK": rank, "LOCAL_RANK": rank} if count > 1 else {}
            variables = {name: str(value) for name, value in {**place, "CUDA_VISIBLE_DEVICES": ""}.items()}
            how = (variables, torch.get_num_threads(), Path(folder))
            running.append(SERVER.Process(target=_call, args=(target, arguments, *how)))
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


def _call(
    target: Callable[..., Any], arguments: tuple[Any, ...], variables: Mapping[str, str], threads: int, folder: Path
) -> None:
    os.environ.update(variables)
    torch.set_num_threads(threads)  # else sums would differ in the last bit from those of the process that tests
    for stream in (sys.stdout, sys.stderr):
        name = "stdout" if stream is sys.stdout else "stderr"
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())
    target(*arguments)
