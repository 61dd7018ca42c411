"""Attention over the pool in plain operations: on a CPU, and wherever no kernel reads extents.

What a pass reads is laid out once, for all its layers. Neighbouring texts that share a beginning form one row of a
padded batch, which holds that beginning once, followed by what each of them has alone; a mask says who sees what. Rows
of similar size form a batch, and each batch is one `scaled_dot_product_attention`.

Shape letters: N new positions, T texts, H query heads, K key heads, D head size, S rows of a batch, Q queries and L
columns of a row, C columns of all batches.
"""

from __future__ import annotations

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
Ints = np.ndarray[Any, np.dtype[np.int64]]

# Owners of columns that belong to no single text, and the text of a query that does not exist.
_ALL, _NOBODY, _NO_QUERY = -1, -2, -3


@dataclass(frozen=True)
class _Rows:
    """Rows of texts that share a beginning, flat: arrays have an entry for each column, query or text.

    Attributes:
        sizes: (queries, columns) of each row.
        row, column: of each column its row and its index there.
        cell, owner, offset: of each column the cell it reads, the text that has it alone or _ALL, and its offset in
            what that text has alone.
        query_row, query: of each query its row and its index there.
        query_text, limit: of each query its text, and how much of what its text has alone it sees.
        text_row, text_column, text_query: of each text its row, the column where what it has alone begins, and its
            first query.
    """

    sizes: list[Span]
    row: Ints
    column: Ints
    cell: Ints
    owner: Ints
    offset: Ints
    query_row: Ints
    query: Ints
    query_text: Ints
    limit: Ints
    text_row: Ints
    text_column: Ints
    text_query: Ints

    @staticmethod
    def of(
        counts: Sequence[int], private: Sequence[Span], shared: Sequence[Span], spare: int, ahead: Sequence[int] | None
    ) -> _Rows:
        """Lay texts out; one that shares nothing has a row to itself.

        Args:
            spare: columns behind what a text has alone, for later steps.
            ahead: how many columns behind its own each query sees; None where that is none.
        """
        T = len(counts)
        count = np.array(counts, dtype=np.int64)
        (first, used), (shared_first, shared_length) = (
            np.array(spans, dtype=np.int64).reshape(T, 2).T for spans in (private, shared)
        )
        # A text joins the row of the text before it where both read the same beginning.
        joins = [n > 0 and shared[n][1] > 0 and shared[n] == shared[n - 1] for n in range(T)]
        text_row = np.cumsum(np.logical_not(joins)) - 1
        R = int(text_row[-1]) + 1 if T else 0
        # Each text brings two segments of columns: the beginning, where it opens a row, and what it has alone.
        widths = np.stack([np.where(joins, 0, shared_length), np.where(used > 0, used + spare, 0)], 1).ravel()
        segment_start = np.cumsum(widths) - widths
        segment = np.repeat(np.arange(2 * T), widths)
        offset = np.arange(len(segment)) - segment_start[segment]
        segment_used = np.stack([shared_length, used], 1).ravel()[segment]
        # Spare columns read any cell, until a step writes there.
        cell = np.stack([shared_first, first], 1).ravel()[segment] + np.where(offset < segment_used, offset, 0)
        owner = np.stack([np.full(T, _ALL), np.arange(T)], 1).ravel()[segment]
        row = text_row[segment // 2]
        columns = np.bincount(row, minlength=R)
        row_start = np.cumsum(columns) - columns
        # Queries, N of them, one text after the other.
        query_text = np.repeat(np.arange(T), count)
        query_start = np.cumsum(count) - count
        within = np.arange(len(query_text)) - query_start[query_text]
        query_row = text_row[query_text]
        queries = np.bincount(query_row, minlength=R)
        row_query_start = np.cumsum(queries) - queries
        return _Rows(
            list(zip(queries.tolist(), columns.tolist(), strict=True)),
            row,
            np.arange(len(row)) - row_start[row],
            cell,
            owner,
            offset,
            query_row,
            np.arange(len(query_row)) - row_query_start[query_row],
            query_text,
            (used - count + 1)[query_text] + within + (0 if ahead is None else np.array(ahead, dtype=np.int64)),
            text_row,
            segment_start[1::2] - row_start[text_row],
            query_start - row_query_start[text_row],
        )

    def padded(self, rows: Sequence[int], of_queries: bool, width: int, values: Ints, fill: int) -> Tensor:
        """Return values of columns or queries as (S, width), for some rows."""
        index = np.full(len(self.sizes), -1)
        index[rows] = np.arange(len(rows))
        target = index[self.query_row if of_queries else self.row]
        chosen = target >= 0
        full = np.full((len(rows), width), fill)
        full[target[chosen], (self.query if of_queries else self.column)[chosen]] = values[chosen]
        return torch.from_numpy(full)


@dataclass(frozen=True)
class _Batch:
    """Padded rows.

    Attributes:
        columns: where their columns are among those of all batches.
        shape: S, Q, L.
        queries: (S * Q,) flat positions; None where these are all of the pass, in order.
        mask: (S, 1, Q, L), 0 or minus infinity.
        steps: (texts of the batch,) entries of the mask that the next step opens; empty without steps.
    """

    columns: slice
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
        ahead: (N,) new positions behind its own that each query sees, inside an image of models like Gemma 3.
    """

    def __init__(
        self,
        counts: Sequence[int],
        private: Sequence[Span],
        shared: Sequence[Span],
        like: Tensor,
        steps: int = 0,
        ahead: Sequence[int] | None = None,
    ) -> None:
        self.steps, self.step, self._stored = steps, 0, 0
        self._own, self._device = private, like.device
        self._gathered: dict[int, tuple[KV, KV]] = {}  # by the pool's tensor: it, and what was gathered
        self._written: list[KV] = []  # (pool, gathered) that new keys and values went into
        self._batches: list[_Batch] = []
        rows = _Rows.of(counts, private, shared, max(0, steps - 1), ahead)
        used = np.array([length for _, length in private], dtype=np.int64)
        N, cells, size = sum(counts), [torch.zeros(0, dtype=torch.long)], 0
        slots = torch.full((N,), -1)  # of each query among those of all batches
        new = np.zeros(len(counts), dtype=np.int64)  # of each text: the column of its next new position
        for members in _alike(rows.sizes):
            S, (Q, L) = len(members), np.array([rows.sizes[row] for row in members]).max(0).tolist()
            owner, offset = (
                rows.padded(members, False, L, values, fill)
                for values, fill in ((rows.owner, _NOBODY), (rows.offset, 0))
            )
            query, text, limit = (
                rows.padded(members, True, Q, values, fill)
                for values, fill in ((np.arange(N), -1), (rows.query_text, _NO_QUERY), (rows.limit, 0))
            )
            # A query sees what its row shares, and of what its text has alone the first `limit` columns: (S, Q, L).
            sees = (owner[:, None] == text[..., None]) & (offset[:, None] < limit[..., None])
            sees |= (owner == _ALL)[:, None]
            mask = torch.zeros(sees.shape, dtype=like.dtype).masked_fill_(~sees, -torch.inf)[:, None]
            index = np.full(len(rows.sizes), -1)
            index[members] = np.arange(S)
            s = index[rows.text_row]
            texts = s >= 0
            first_column = sum(map(len, cells))
            new[texts] = (first_column + s * L + rows.text_column + used - 1)[texts]
            opens = ((s * Q + rows.text_query) * L + rows.text_column + used)[texts] if steps else new[:0]
            real = query >= 0
            slots[query[real]] = torch.arange(size, size + S * Q).view(S, Q)[real]
            in_order = N == S * Q and torch.equal(query.flatten(), torch.arange(N))
            self._batches.append(
                _Batch(
                    slice(first_column, first_column + S * L),
                    (S, Q, L),
                    None if in_order else query.clamp(min=0).flatten().to(like.device),
                    mask.to(like.device),
                    torch.from_numpy(opens).to(like.device),
                )
            )
            cells.append(rows.padded(members, False, L, rows.cell, 0).flatten())
            size += S * Q
        self._cells = torch.cat(cells).to(like.device)
        # Queries that see nothing take the zeros that follow all others.
        self._blind = bool((slots < 0).any())
        in_order = size == N and torch.equal(slots, torch.arange(N))
        self._slots = None if in_order else torch.where(slots < 0, size, slots).to(like.device)
        self._new = torch.from_numpy(new).to(like.device)  # (T,) of a step: where its keys and values go

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


def _close(a: int, b: int, slack: int) -> bool:
    return max(a, b) <= 2 * min(a, b) + slack
