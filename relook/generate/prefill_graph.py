"""Reading a few hundred positions as one CUDA graph.

Launched kernel by kernel, such a pass takes the host about twice as long as the device, and all that time the host's
other threads, which read requests and write answers, wait for the interpreter.

Shape letters: N positions of a pass, L those that a graph has room for, G groups of queries, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from relook.generate.attention import ExtentReads, PassView
from relook.generate.passes import Prefill

LENGTHS = (16, 64, 128, 256, 384, 512, 640, 768, 1024)  # longer passes keep a device busy without a graph
GROUPS = 33  # texts of a pass, and one more for the positions that belong to none

Trunk = Callable[[Tensor, Tensor, PassView, Tensor | None], Tensor]


class PrefillGraph:
    """A pass over L positions on tensors that stay in place. At first it holds no text.

    Args:
        trunk: `ModelRunner._trunk`.
        record: records what a function launches, and returns the graph and the function's result.
        embeds: (L, D) zeros.
        positions: (L,) or (3, L) zeros.
        spare_cell: where positions that belong to no text are written.
        ends_selected: whether only the states at the ends of prompts are wanted.
    """

    def __init__(
        self,
        trunk: Trunk,
        record: Callable[[Callable[[], Tensor]], tuple[torch.cuda.CUDAGraph, Tensor]],
        embeds: Tensor,
        positions: Tensor,
        spare_cell: int,
        ends_selected: bool,
    ) -> None:
        self.embeds, self.positions, self.spare_cell = embeds, positions, spare_cell
        ints = lambda size: embeds.new_zeros(size, dtype=torch.int32)  # noqa: E731
        length = len(embeds)
        self.cells = ints(length).long().fill_(spare_cell)
        self.last = ints(GROUPS) if ends_selected else None
        # What each text has alone, and what it shares. A group's bounds are the graph's: all else is on the device.
        self.reads = [
            ExtentReads(ints(GROUPS + 1), ints(GROUPS + 1), ints(GROUPS), length, spare_cell, causal)
            for causal in (True, False)
        ]
        for reads in self.reads:
            self._fill_reads(reads, None)
        view = PassView(self.cells, list(self.reads), is_step=False)
        self.graph, self.states = record(lambda: trunk(self.embeds, self.positions, view, self.last))

    def read(self, embeds: Tensor, batch: Prefill) -> Tensor:
        """Run the pass; return the states of its N positions or those at the ends of prompts, good until the next."""
        count = len(embeds)
        self.embeds[:count] = embeds
        self.positions[..., :count] = batch.positions
        self.cells.fill_(self.spare_cell)[:count] = batch.cells
        private, *shared = batch.reads if isinstance(batch.reads, list) else []
        self._fill_reads(self.reads[0], private)
        self._fill_reads(self.reads[1], shared[0] if shared else None)
        if self.last is not None:
            self.last[: len(batch.last)] = batch.last
            count = len(batch.last)
        self.graph.replay()
        return self.states[:count]

    def _fill_reads(self, target: ExtentReads, source: ExtentReads | None) -> None:
        """Set reads in place; the group behind the last text takes the positions of none, and reads nothing."""
        groups = 0 if source is None else len(source.used)
        target.ends.fill_(len(self.embeds))
        target.used.zero_()
        if source is None:
            target.ends[:1] = 0
        else:
            target.ends[: groups + 1] = source.ends
            target.first[: groups + 1] = source.first
            target.used[:groups] = source.used


def graph_length(batch: Prefill) -> int | None:
    """Return the least room of a graph that takes a pass; None if it has too many positions or texts."""
    if not isinstance(batch.reads, list) or any(len(reads.used) >= GROUPS for reads in batch.reads):
        return None
    return next((length for length in LENGTHS if length >= len(batch.ids)), None)
