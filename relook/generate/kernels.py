"""Triton kernels over a pool of keys and values: store new ones, attend in a step, merge reads.

A step has few queries and long extents, and is bound by the memory that keys and values take. Each program of the
decode kernel reads one piece of one extent for one head of keys. Cutting extents into pieces keeps all multiprocessors
busy where few texts are answered (flash-decoding, Dao et al. 2023).

Shape letters: see `attention.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from relook.generate.attention import ExtentReads

BLOCK_CELLS = 32  # of 32, 64 and 128 the fastest for long extents and short ones (benchmarks/RESULTS.md)
LN2 = 0.6931471805599453
STORE_BLOCK = 1024  # numbers that a program of the store kernel copies at a time
MERGE_ROWS = 16  # (query, head) pairs of a program of the merge kernel

Parts = tuple[Tensor, Tensor]  # of a read, (C, N, H, D), and their log-sum-exps, (C, N, H)


@triton.jit
def _store_kernel(
    new_keys_ptr,
    new_values_ptr,
    keys_ptr,
    values_ptr,
    cells_ptr,
    key_stride,
    key_head_stride,
    value_stride,
    value_head_stride,
    SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    cell = tl.load(cells_ptr + position).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    head, d = i // HEAD_SIZE, i % HEAD_SIZE
    key = tl.load(new_keys_ptr + position * key_stride + head * key_head_stride + d, mask=inside)
    value = tl.load(new_values_ptr + position * value_stride + head * value_head_stride + d, mask=inside)
    tl.store(keys_ptr + cell * SIZE + i, key, mask=inside)
    tl.store(values_ptr + cell * SIZE + i, value, mask=inside)


@triton.jit
def _decode_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    out_ptr,
    lse_ptr,
    ends_ptr,
    first_ptr,
    used_ptr,
    query_stride,
    head_stride,
    N,
    pieces,
    SCALE_LOG2: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Heads first: programs that run at the same time read the heads of one cell, which are neighbours in memory.
    key_head = tl.program_id(0)
    group = tl.program_id(1)
    piece = tl.program_id(2)
    SHARE: tl.constexpr = HEADS // KEY_HEADS  # query heads of one head of keys

    begin = tl.load(ends_ptr + group)
    rows = (tl.load(ends_ptr + group + 1) - begin) * SHARE  # (query, head) pairs of this program
    first = tl.load(first_ptr + group).to(tl.int64)
    used = tl.load(used_ptr + group)

    # This piece's cells, whole blocks of the extent.
    size = tl.cdiv(tl.cdiv(used, BLOCK_N), pieces) * BLOCK_N
    low = piece * size
    high = tl.minimum(low + size, used)

    # Few rows: usually one block of queries, and the loop over the extent is inside it.
    d = tl.arange(0, HEAD_SIZE)
    n = tl.arange(0, BLOCK_N)
    for start in range(0, rows, BLOCK_Q):
        row = start + tl.arange(0, BLOCK_Q)
        is_row = row < rows
        query = (begin + row // SHARE).to(tl.int64)
        head = key_head * SHARE + row % SHARE
        q = tl.load(
            query_ptr + query[:, None] * query_stride + head[:, None] * head_stride + d[None, :],
            mask=is_row[:, None],
            other=0.0,
        )
        largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        mixed = tl.zeros([BLOCK_Q, HEAD_SIZE], tl.float32)
        for at in range(low, high, BLOCK_N):
            seen = at + n < high
            offset = ((first + at + n)[:, None] * KEY_HEADS + key_head) * HEAD_SIZE + d[None, :]
            # All queries of the group share this block of keys: it is loaded once.
            k = tl.load(keys_ptr + offset, mask=seen[:, None], other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * SCALE_LOG2
            scores = tl.where(seen[None, :], scores, float("-inf"))
            # Online softmax (Milakov and Gimelshein): rescale what was summed when a larger score comes.
            new_largest = tl.maximum(largest, tl.max(scores, 1))
            weights = tl.exp2(scores - new_largest[:, None])
            rescale = tl.exp2(largest - new_largest)
            total = total * rescale + tl.sum(weights, 1)
            v = tl.load(values_ptr + offset, mask=seen[:, None], other=0.0)
            mixed = mixed * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            largest = new_largest
        # An empty piece has total 0: zeros, and a log-sum-exp that no merge counts.
        out = mixed / tl.maximum(total, 1e-30)[:, None]
        lse = tl.where(total > 0, (largest + tl.log2(tl.maximum(total, 1e-30))) * 0.6931471805599453, float("-inf"))
        target = (piece * N + query) * HEADS + head
        tl.store(
            out_ptr + target[:, None] * HEAD_SIZE + d[None, :], out.to(out_ptr.dtype.element_ty), mask=is_row[:, None]
        )
        tl.store(lse_ptr + target, lse, mask=is_row)


@triton.jit
def _merge_kernel(
    a_ptr,
    a_lse_ptr,
    a_parts,
    b_ptr,
    b_lse_ptr,
    b_parts,
    out_ptr,
    pairs,
    HEAD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, HEAD_SIZE)
    largest = tl.full([BLOCK], -1e30, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, HEAD_SIZE], tl.float32)
    for part in range(a_parts + b_parts):
        # All of a's parts, then all of b's: what a mask leaves out is not loaded.
        is_a, is_b = (pair < pairs) & (part < a_parts), (pair < pairs) & (part >= a_parts)
        a_at, b_at = part * pairs + pair, (part - a_parts) * pairs + pair
        lse = tl.load(a_lse_ptr + a_at, mask=is_a, other=0.0) + tl.load(b_lse_ptr + b_at, mask=is_b, other=0.0)
        lse = tl.where(lse == float("inf"), float("-inf"), lse)  # FlashAttention's sign of an empty read
        # Softmax over the parts: exp(lse) is the sum of a part's exponentials, so this is exact.
        new_largest = tl.maximum(largest, lse)
        weight, rescale = tl.exp(lse - new_largest), tl.exp(largest - new_largest)
        a = tl.load(a_ptr + a_at[:, None] * HEAD_SIZE + d[None, :], mask=is_a[:, None], other=0.0).to(tl.float32)
        b = tl.load(b_ptr + b_at[:, None] * HEAD_SIZE + d[None, :], mask=is_b[:, None], other=0.0).to(tl.float32)
        mixed = mixed * rescale[:, None] + weight[:, None] * (a + b)
        total = total * rescale + weight
        largest = new_largest
    mixed = mixed / tl.maximum(total, 1e-30)[:, None]
    out = out_ptr + pair[:, None] * HEAD_SIZE + d[None, :]
    tl.store(out, mixed.to(out_ptr.dtype.element_ty), mask=(pair < pairs)[:, None])


def store(new: tuple[Tensor, Tensor], kv: tuple[Tensor, Tensor], cells: Tensor) -> None:
    """Write keys and values of new positions, (N, K, D) each, into their cells, (N,)."""
    (keys, values), size = new, kv[0][0].numel()
    assert keys.stride(-1) == values.stride(-1) == 1
    strides = (*keys.stride()[:2], *values.stride()[:2])
    grid = (len(cells), triton.cdiv(size, STORE_BLOCK))
    _store_kernel[grid](keys, values, *kv, cells, *strides, SIZE=size, HEAD_SIZE=keys.shape[-1], BLOCK=STORE_BLOCK)


def decode(query_NHD: Tensor, keys: Tensor, values: Tensor, reads: ExtentReads, scale: float) -> Parts:
    """Attend each query to the extent that its group reads, in `reads.pieces` parts; every query is in a group.

    Head sizes are powers of two.
    """
    (N, H, D), K = query_NHD.shape, keys.shape[1]
    out = query_NHD.new_empty((reads.pieces, N, H, D), dtype=torch.float32)
    lse = query_NHD.new_empty((reads.pieces, N, H), dtype=torch.float32)
    _decode_kernel[(K, len(reads.used), reads.pieces)](
        query_NHD,
        keys,
        values,
        out,
        lse,
        reads.ends,
        reads.first,
        reads.used,
        query_NHD.stride(0),
        query_NHD.stride(1),
        N,
        reads.pieces,
        SCALE_LOG2=scale / LN2,
        HEADS=H,
        KEY_HEADS=K,
        HEAD_SIZE=D,
        BLOCK_Q=16 if reads.max_queries * (H // K) <= 16 else 32,
        BLOCK_N=BLOCK_CELLS,
        num_warps=4,
        num_stages=3 if keys.element_size() == 2 else 1,
    )
    return out, lse


def merge(reads: Sequence[Parts], dtype: torch.dtype) -> Tensor:
    """Merge one or two reads of the same queries to (N, H, D), exactly. A query whose reads are empty gets zeros."""
    (a, a_lse), (b, b_lse) = reads[0], reads[-1]
    _, N, H, D = a.shape
    parts = len(a), len(b) if len(reads) > 1 else 0
    if sum(parts) == 1:
        return a[0].to(dtype)
    out = a.new_empty((N, H, D), dtype=dtype)
    grid = (triton.cdiv(N * H, MERGE_ROWS),)
    _merge_kernel[grid](a, a_lse, parts[0], b, b_lse, parts[1], out, N * H, HEAD_SIZE=D, BLOCK=MERGE_ROWS)
    return out
