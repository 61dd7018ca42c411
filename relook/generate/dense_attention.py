"""Attention over the pool in plain operations: on a CPU, and wherever no kernel reads extents.

What a pass reads is laid out once, for all its layers. Neighbouring texts that share a beginning form one row of a
padded batch, which holds that beginning once, followed by what each of them has alone; a mask says who sees what. Rows
of similar size form a batch, and each batch is one `scaled_dot_product_attention`.

Shape letters: N new positions, T texts, H query heads, K key heads, D head size, S rows of a batch, Q queries and L
columns of a row, C columns of all batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Span = tuple[int, int]  # the first cell, and how many
NOTHING: Span = (0, 0)
KV = tuple[Tensor, Tensor]  # keys and values, (cells, K, D) each


@dataclass(frozen=True)
class _Batch:
    """Padded rows.

    Attributes:
        columns: where their columns are among those of all batches.
        shape: S, Q, L.
        queries: (S * Q,) flat positions; None where these are all of the pass, in order.
        mask: (S, 1, Q, L), 0 or minus infinity.
        opens: entries of the mask that the next step opens, one for each text; empty without steps.
    """

    columns: slice
    shape: tuple[int, int, int]
    queries: Tensor | None
    mask: Tensor
    opens: Tensor


class DenseReads:
    """What the new positions of a pass read, or those of successive steps.

    Args:
        counts: new positions of each text, one text after the other.
        private: cells that each text has alone, the new ones at their end. A query sees those up to itself.
        shared: cells that all queries of a text see. Neighbours with the same ones read them together.
        like: a tensor of the keys' dtype, on their device.
        steps: steps of one new position a text that these reads serve, 0 for a single pass of any. Keys and values are
            gathered once for all steps; new ones are written beside them, and into the pool by `write_back`.
        rooms: cells that each text may have alone, with steps. What it writes beyond them goes nowhere.
        ahead: (N,) new positions behind its own that each query sees, inside an image of models like Gemma 3.
    """

    def __init__(
        self,
        counts: Sequence[int],
        private: Sequence[Span],
        shared: Sequence[Span],
        like: Tensor,
        steps: int = 0,
        rooms: Sequence[int] = (),
        ahead: Sequence[int] | None = None,
    ) -> None:
        self.steps, self.step, self._stored = steps, 0, 0
        self._private, self._rooms, self._device = private, rooms, like.device
        self._gathered: dict[int, tuple[KV, KV]] = {}  # by the pool's tensor: it, and what was gathered
        self._written: list[KV] = []  # (pool, gathered) that new keys and values went into
        self._batches: list[_Batch] = []
        N, spare, size = sum(counts), max(0, steps - 1), 0
        position = [0, *itertools.accumulate(counts)]  # of each text's first query
        # A step appends a column to what a text has alone, where it has any.
        widths = [used + spare if used else 0 for _, used in private]
        slots = np.full(N, -1)  # of each query among those of all batches
        new = np.zeros(len(counts), dtype=np.int64)  # of each text: the column of its next new position
        columns: list[np.ndarray[Any, Any]] = [np.zeros(0, dtype=np.int64)]  # the cells that they show
        # Texts that read the same beginning are one row.
        rows = [
            list(row) for _, row in itertools.groupby(range(len(counts)), lambda n: shared[n] if shared[n][1] else n)
        ]
        sizes = [(sum(counts[n] for n in row), shared[row[0]][1] + sum(widths[n] for n in row)) for row in rows]
        for members in _alike(sizes):
            S, (Q, L) = len(members), np.array([sizes[row] for row in members]).max(0).tolist()
            cells, sees, queries = np.zeros((S, L), np.int64), np.zeros((S, Q, L), bool), np.full((S, Q), -1)
            start, opens = sum(map(len, columns)), []
            for s, row in enumerate(members):
                first, column = shared[rows[row][0]]
                cells[s, :column] = np.arange(first, first + column)
                sees[s, :, :column] = True
                q = 0
                for n in rows[row]:
                    count, width, (first, used) = counts[n], widths[n], private[n]
                    # Spare columns show any cell, until a step writes there.
                    cells[s, column : column + used] = np.arange(first, first + used)
                    limit = np.arange(used - count + 1, used + 1)  # how much of it each query sees
                    if ahead is not None:
                        limit += ahead[position[n] : position[n + 1]]
                    sees[s, q : q + count, column : column + width] = np.arange(width) < limit[:, None]
                    queries[s, q : q + count] = np.arange(position[n], position[n + 1])
                    slots[position[n] : position[n + 1]] = size + s * Q + q + np.arange(count)
                    new[n] = start + s * L + column + used - 1
                    opens.append((s * Q + q) * L + column + used)
                    column, q = column + width, q + count
            mask = torch.zeros(sees.shape, dtype=like.dtype).masked_fill_(torch.from_numpy(~sees), -torch.inf)
            self._batches.append(
                _Batch(
                    slice(start, start + S * L),
                    (S, Q, L),
                    None if _counts_up(queries, N) else self._ints(queries.clip(min=0).ravel()),
                    mask[:, None].to(like.device),
                    self._ints(opens if steps else []),
                )
            )
            columns.append(cells.ravel())
            size += S * Q
        self._cells = self._ints(np.concatenate(columns))
        # Queries that see nothing take the zeros that follow all others.
        self._blind = bool((slots < 0).any())
        self._slots = None if size == N and _counts_up(slots, N) else self._ints(np.where(slots < 0, size, slots))
        self._new = self._ints(new)  # (T,) of a step: where its keys and values go

    def _ints(self, values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.long, device=self._device)

    def attend(
        self, query_NHD: Tensor, kv: KV, scale: float, new: KV | None = None, cells: Tensor | None = None
    ) -> Tensor:
        """Attend to one layer's keys and values, (N, H, D); a query that sees nothing gets zeros.

        Args:
            new: keys and values of the new positions, (N, K, D) each, which are written first.
            cells: (N,) where in the pool they belong.
        """
        if not self._batches:
            return torch.zeros_like(query_NHD)
        keys, values = self._write(kv, new, cells)
        H, K = query_NHD.shape[1], keys.shape[1]
        outputs = []
        for batch in self._batches:
            S, Q, L = batch.shape
            query = query_NHD if batch.queries is None else query_NHD.index_select(0, batch.queries)
            mixed = scaled_dot_product_attention(
                query.view(S, Q, H, -1).transpose(1, 2),
                keys[batch.columns].view(S, L, K, -1).transpose(1, 2),
                values[batch.columns].view(S, L, K, -1).transpose(1, 2),
                attn_mask=batch.mask,
                scale=scale,
                enable_gqa=H != K,
            )
            outputs.append(mixed.transpose(1, 2).reshape(S * Q, H, -1))
        if self._blind:
            outputs.append(torch.zeros_like(query_NHD[:1]))
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return output if self._slots is None else output.index_select(0, self._slots)

    def _write(self, kv: KV, new: KV | None, cells: Tensor | None) -> KV:
        """Write the new keys and values, and return all that is read, (C, K, D) each."""
        if not self.steps:
            if new is not None and cells is not None:
                for stored, side in zip(kv, new, strict=True):
                    stored.index_copy_(0, cells, side)
            return kv[0].index_select(0, self._cells), kv[1].index_select(0, self._cells)
        if id(kv[0]) not in self._gathered:
            self._gathered[id(kv[0])] = kv, (kv[0].index_select(0, self._cells), kv[1].index_select(0, self._cells))
            if new is not None:
                self._written.append(kv)
        gathered = self._gathered[id(kv[0])][1]
        if new is not None:
            for stored, side in zip(gathered, new, strict=True):
                stored.index_copy_(0, self._new, side)
        return gathered

    def advance(self) -> None:
        """Let each text see one cell more: a step is over."""
        self.step += 1
        if self.step < self.steps:
            self._new += 1
            for batch in self._batches:
                batch.mask.view(-1).index_fill_(0, batch.opens, 0)
                batch.opens.add_(1)

    def write_back(self) -> None:
        """Write the keys and values of the steps since the last call into the pool."""
        begin = self._new - min(self.step, self.steps - 1)
        sources, targets = [], []
        for number, ((first, used), room) in enumerate(zip(self._private, self._rooms, strict=True)):
            for step in range(self._stored, min(self.step, room - used + 1)):
                sources.append((number, step))
                targets.append(first + used - 1 + step)
        pairs, target = self._ints(sources).view(-1, 2), self._ints(targets)
        source = begin[pairs[:, 0]] + pairs[:, 1]
        for kv in self._written:
            for stored, side in zip(kv, self._gathered[id(kv[0])][1], strict=True):
                stored.index_copy_(0, target, side.index_select(0, source))
        self._stored = self.step


def _alike(sizes: Sequence[Span]) -> list[list[int]]:
    """Group rows by (queries, columns), so that none is padded to more than about twice its size.

    Rows without columns, whose queries see nothing, are in no group.
    """
    groups: list[list[int]] = []
    first_sizes: list[Span] = []
    for row, (queries, columns) in enumerate(sizes):
        if not columns:
            continue
        for group, (other_queries, other_columns) in zip(groups, first_sizes, strict=True):
            # A few queries more or less cost nothing.
            if _close(queries, other_queries, 4) and _close(columns, other_columns, 0):
                group.append(row)
                break
        else:
            groups.append([row])
            first_sizes.append((queries, columns))
    return groups


def _counts_up(numbers: np.ndarray[Any, Any], count: int) -> bool:
    """Return True if the numbers are 0, 1, ... up to `count`, in order."""
    return numbers.size == count and bool((numbers.ravel() == np.arange(count)).all())


def _close(a: int, b: int, slack: int) -> bool:
    return max(a, b) <= 2 * min(a, b) + slack
