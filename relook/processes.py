"""Several processes, as torchrun and accelerate start them: which one this is, and waiting for the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from relook.errors import RelookError

T = TypeVar("T")
# The slowest process may have hours more to do. One that dies needs no time-out: its launcher ends the others.
PATIENCE = timedelta(hours=24)


def _state() -> PartialState:
    """The one that the Trainer made, or a new one; without being told, it does not look for other processes on CPUs."""
    return PartialState(cpu=not torch.accelerator.is_available())


def rank() -> int:
    """This process's number."""
    return int(_state().process_index)


def count() -> int:
    """How many processes there are."""
    return int(_state().num_processes)


def device() -> Any:
    """Where this process's collectives work."""
    return _state().device


def first() -> bool:
    """Whether this process writes what all share."""
    return rank() == 0


def mine(values: Sequence[T]) -> Sequence[T]:
    """This process's share: one value in as many as there are processes, so none is left over."""
    return values[rank() :: count()]


def wait(what: str) -> None:
    """Until every process has come this far.

    Args:
        what: is waited for, as the error says it.

    Raises:
        RelookError: one of them has not come within `PATIENCE`.
    """
    if count() == 1:
        return
    try:
        torch.distributed.monitored_barrier(_group(), PATIENCE, wait_all_ranks=True)
    except RuntimeError as error:
        raise RelookError(
            f"Process {rank()} waited up to {PATIENCE} for {what}, in vain: {str(error).splitlines()[0]}.",
            "See what the other processes said last.",
        ) from None


@cache
def _group() -> Any:
    """NCCL, which the default group has on GPUs, ends a process that waits longer than its collectives may take."""
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def of_the_first(make: Callable[[], T]) -> T:
    """What `make` gives in the first process, in all of them."""
    found: list[Any] = [make() if first() else None]
    value: T = broadcast_object_list(found)[0]
    return value


def shared(values: Sequence[T], make: Callable[[Sequence[T]], list[Any]], what: str) -> list[Any]:
    """`make` over some values, each process over its share of them; the outcomes of all, in order, in every process.

    Args:
        what: is made, as `wait` says it.
    """
    made = list(zip(mine(range(len(values))), make(mine(values)), strict=True))
    wait(what)
    found = dict(gathered(made))
    return [found[i] for i in range(len(values))]


def gathered(values: list[T]) -> list[T]:
    """The values of all processes, in every one of them."""
    found: list[T] = gather_object(values)
    return found
