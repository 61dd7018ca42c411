"""A decode kernel: few queries, long extents of a pool, bound by the memory that keys and values take.

Each program reads one piece of one extent for one head of keys. Cutting extents into pieces keeps all multiprocessors
busy where few texts are answered (flash-decoding, Dao et al. 2023); the pieces are merged by their log-sum-exp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_CELLS = 32  # of 32, 64 and 128 the fastest for long extents and short ones (benchmarks/RESULTS.md)
LN2 = 0.6931471805599453


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


def decode_attention(
    query_NHD: Tensor,
    keys: Tensor,
    values: Tensor,
    ends: Tensor,
    first: Tensor,
    used: Tensor,
    max_queries: int,
    pieces: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attend N queries in S groups to one extent each, all of which every query of the group sees.

    Every query must belong to a group; head sizes are powers of two.

    Returns:
        (C, N, H, D) float32 and the log-sum-exp (C, N, H), C the number of pieces; (N, H, D) and (N, H) for one.
    """
    N, H, D = query_NHD.shape
    K = keys.shape[1]
    out = query_NHD.new_empty((pieces, N, H, D), dtype=torch.float32)
    lse = query_NHD.new_empty((pieces, N, H), dtype=torch.float32)
    rows = max_queries * (H // K)
    _decode_kernel[(K, len(used), pieces)](
        query_NHD,
        keys,
        values,
        out,
        lse,
        ends,
        first,
        used,
        query_NHD.stride(0),
        query_NHD.stride(1),
        N,
        pieces,
        SCALE_LOG2=scale / LN2,
        HEADS=H,
        KEY_HEADS=K,
        HEAD_SIZE=D,
        BLOCK_Q=16 if rows <= 16 else 32,
        BLOCK_N=BLOCK_CELLS,
        num_warps=4,
        num_stages=3 if keys.element_size() == 2 else 1,
    )
    return (out, lse) if pieces > 1 else (out[0], lse[0])
