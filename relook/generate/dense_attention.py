"""Attention over the pool in plain operations: on a CPU, and wherever no kernel reads extents.

What a pass reads is laid out once, for all its layers. Neighbouring texts that share a beginning form one row of a
padded batch, which holds that beginning once, followed by what each of them has alone; a mask says who sees what. Rows
of similar size form a batch, and each batch is one `scaled_dot_product_attention`.

Shape letters: N new positions, H query heads, K key heads, D head size, S rows of a batch, Q queries and L cells of a
row, C cells of all batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

Span = tuple[int, int]  # the first, and how many
NOTHING: Span = (0, 0)
KV = tuple[Tensor, Tensor]  # keys and values, (cells, K, D) each

# Owners of columns that belong to no single text, and the text of a query that does not exist.
_ALL, _NOBODY, _NO_QUERY = -1, -2, -3


@dataclass(frozen=True)
class _Row:
    """Texts that share a beginning: what they read, and the queries that read it.

    Attributes:
        columns: (place, owner, offset in what its owner has alone) of each place.
        queries: (flat position, text, how much of what its text has alone it sees) of each query.
        texts: (number, column where what it has alone begins, its first query) of each text.
    """

    columns: list[tuple[int, int, int]]
    queries: list[tuple[int, int, int]]
    texts: list[tuple[int, int, int]]


@dataclass(frozen=True)
class _Batch:
    """Padded rows.

    Attributes:
        cells: where their cells lie among those of all batches.
        shape: S, Q, L.
        queries: (S * Q,) flat positions; None where these are all of the pass, in order.
        mask: (S, 1, Q, L), 0 or minus infinity.
        steps: (texts of the batch,) entries of the mask that the next step opens; empty without steps.
    """

    cells: slice
    shape: tuple[int, int, int]
    queries: Tensor | None
    mask: Tensor
    steps: Tensor


class DenseReads:
    """What the new positions of a pass read, or those of successive steps.

    Args:
        counts: new positions of each text, one text after the other.
        own: cells that each text has alone, the new ones at their end. A query sees those up to itself.
        shared: cells that all queries of a text see. Neighbours with the same ones read them together.
        like: a tensor of the keys' dtype, on their device.
        steps: steps of one new position a text that these reads serve, 0 for a single pass of any. Keys and values are
            gathered once for all steps; new ones are written beside them, and into the pool by `write_back`.
    """

    def __init__(
        self, counts: Sequence[int], own: Sequence[Span], shared: Sequence[Span], like: Tensor, steps: int = 0
    ) -> None:
        self.steps, self.step, self._stored = steps, 0, 0
        self._own, self._device = own, like.device
        self._gathered: dict[int, tuple[KV, KV]] = {}  # by the pool's tensor: it, and what was gathered
        self._written: list[KV] = []  # (pool, gathered) that new keys and values went into
        self._batches: list[_Batch] = []
        N = sum(counts)
        cells: list[int] = []
        slots = torch.full((N,), -1)  # of each query among those of all batches
        columns = [0] * len(counts)  # of each text: where what it has alone begins among the cells of all batches
        size = 0
        for rows in _alike(_rows(counts, own, shared, max(0, steps - 1))):
            S, Q, L = len(rows), max(len(row.queries) for row in rows), max(len(row.columns) for row in rows)
            place, owner, offset = _padded([row.columns for row in rows], L, (0, _NOBODY, 0))
            query, text, limit = _padded([row.queries for row in rows], Q, (-1, _NO_QUERY, 0))
            sees = (owner == _ALL)[:, None] | (
                (owner[:, None] == text[..., None]) & (offset[:, None] < limit[..., None])
            )
            mask = torch.zeros(sees.shape, dtype=like.dtype).masked_fill_(~sees, -torch.inf)[:, None]
            opens = []
            for s, row in enumerate(rows):
                for number, column, first in row.texts:
                    columns[number] = len(cells) + s * L + column
                    opens.append((s * Q + first) * L + column + own[number][1])
            real = query >= 0
            slots[query[real]] = torch.arange(size, size + S * Q).view(S, Q)[real]
            in_order = N == S * Q and torch.equal(query.flatten(), torch.arange(N))
            self._batches.append(
                _Batch(
                    slice(len(cells), len(cells) + S * L),
                    (S, Q, L),
                    None if in_order else query.clamp(min=0).flatten().to(like.device),
                    mask.to(like.device),
                    torch.tensor(opens if steps else [], dtype=torch.long).to(like.device),
                )
            )
            cells += place.flatten().tolist()
            size += S * Q
        self._cells = torch.tensor(cells, dtype=torch.long).to(like.device)
        # Queries that see nothing take the zeros that stand behind all others.
        self._blind = bool((slots < 0).any())
        in_order = size == N and torch.equal(slots, torch.arange(N))
        self._slots = None if in_order else torch.where(slots < 0, size, slots).to(like.device)
        self._new = torch.tensor([column + used - 1 for column, (_, used) in zip(columns, own, strict=True)])
        self._new = self._new.to(like.device)  # (N,) of a step: where its keys and values go

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
                keys[batch.cells].view(S, L, K, -1).transpose(1, 2),
                values[batch.cells].view(S, L, K, -1).transpose(1, 2),
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
                batch.mask.view(-1).index_fill_(0, batch.steps, 0)
                batch.steps.add_(1)

    def write_back(self, rooms: Sequence[int]) -> None:
        """Write the keys and values of the steps since the last call into the pool.

        Args:
            rooms: cells that each text may have alone. What it wrote beyond them goes nowhere.
        """
        begin = self._new - min(self.step, self.steps - 1)
        sources, targets = [], []
        for number, ((first, used), room) in enumerate(zip(self._own, rooms, strict=True)):
            for step in range(self._stored, min(self.step, room - used + 1)):
                sources.append((number, step))
                targets.append(first + used - 1 + step)
        pairs = torch.tensor(sources, dtype=torch.long).view(-1, 2).to(self._device)
        source = begin[pairs[:, 0]] + pairs[:, 1]
        target = torch.tensor(targets, dtype=torch.long).to(self._device)
        for kv in self._written:
            for stored, side in zip(kv, self._gathered[id(kv[0])][1], strict=True):
                stored.index_copy_(0, target, side.index_select(0, source))
        self._stored = self.step


def _rows(counts: Sequence[int], own: Sequence[Span], shared: Sequence[Span], spare: int) -> Iterator[_Row]:
    """Yield the rows of texts that see anything; a text that shares nothing has one to itself.

    Args:
        spare: cells behind what a text has alone, for later steps.
    """
    starts = [0, *itertools.accumulate(counts)]
    key = lambda number: (shared[number], number if not shared[number][1] else -1)  # noqa: E731
    for (beginning, _), numbers in itertools.groupby(range(len(counts)), key):
        first, length = beginning
        row = _Row([(place, _ALL, 0) for place in range(first, first + length)], [], [])
        for number in numbers:
            (place, used), count = own[number], counts[number]
            row.texts.append((number, len(row.columns), len(row.queries)))
            row.queries.extend((starts[number] + i, number, used - count + 1 + i) for i in range(count))
            if used:
                row.columns.extend((place + i, number, i) for i in range(used))
                row.columns.extend((place, number, used + i) for i in range(spare))
        if row.columns:
            yield row


def _alike(rows: Iterator[_Row]) -> list[list[_Row]]:
    """Return the rows in batches that are padded to less than about twice their size."""
    batches: list[list[_Row]] = []
    sizes: list[tuple[int, int]] = []
    for row in rows:
        size = len(row.queries), len(row.columns)
        for n, other in enumerate(sizes):
            # A few queries more or less cost nothing.
            if all(max(a, b) <= 2 * min(a, b) + slack for a, b, slack in zip(size, other, (4, 0), strict=True)):
                batches[n].append(row)
                break
        else:
            batches.append([row])
            sizes.append(size)
    return batches


def _padded(rows: Sequence[Sequence[tuple[int, int, int]]], width: int, fill: tuple[int, int, int]) -> Sequence[Tensor]:
    """Return three tensors (rows, width), one for each part of the entries."""
    full = [[*row, *[fill] * (width - len(row))] for row in rows]
    return torch.tensor(full, dtype=torch.long).view(len(rows), width, 3).unbind(-1)
