"""A command in several processes that is killed again and again, then let alone."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path


def start_ranks(command: Sequence[object], count: int) -> list[subprocess.Popen[bytes]]:
    """Start a command in several processes, as torchrun does, but so that a kill reaches them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    more = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    ranks = [{**os.environ, **more, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(count)]
    return [subprocess.Popen(list(map(str, command)), env=rank) for rank in ranks]


def run_killed_at(files: Sequence[Path], command: Sequence[object], count: int) -> None:
    """Start a command and kill -9 all its processes as soon as a file is there, for each file; then let it end."""
    for file in files:
        jobs = start_ranks(command, count)
        while not file.exists() and any(job.poll() is None for job in jobs):
            time.sleep(0.005)
        for job in jobs:
            job.kill()
            job.wait()
        assert file.exists()
    assert [job.wait() for job in start_ranks(command, count)] == [0] * count
