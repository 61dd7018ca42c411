"""Attention over a pool of keys and values that many texts share.

The keys and values of all texts lie in one pool of cells, (P, K, D) a layer, one cell a position. A text owns an
*extent*: neighbouring cells, as many as its prompt and its longest answer need. A pass is flat: N new positions of any
texts, one after the other, without padding. `ExtentReads` says which extent each group of neighbouring positions reads.
What several texts share (an image and the prompt around it) is one extent, which one group of queries reads once.
Several reads of a query are merged exactly by their log-sum-exp (Milakov and Gimelshein 2018, arXiv:1805.02867).

Nothing here depends on what is inside the tensors, so a CUDA graph can replay it.

`ExtentReads` is for kernels that read extents in place; `DenseReads` (`dense_attention.py`) does without such kernels.

Shape letters: N new positions, P cells, H query heads, K key heads, D head size, S groups, C pieces into which an
extent is cut.
"""

from __future__ import annotations

import itertools
import threading
from contextlib import ContextDecorator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from relook.generate.dense_attention import KV, DenseReads
from relook.model.load import LoadedModel
from relook.model.modeling_relook import reads_tower

decode_attention: Any
try:
    from relook.generate.decode_kernel import decode_attention
except ImportError:  # no Triton: CPUs, and platforms that it does not support
    decode_attention = None

ATTENTION_NAME = "relook_pool"  # under which transformers' layers find `pool_attention`


@dataclass
class ExtentReads:
    """Groups of neighbouring queries, each with the extent it reads. Bounds are numbers, all else is on the device.

    Attributes:
        ends: (S + 1,) int32; group s is the queries ends[s]:ends[s + 1].
        first: (S + 1,) int32 first cell of each group's extent; the last entry only fills FlashAttention's argument.
        used: (S,) int32 cells of the extent that are read; 0 reads nothing.
        max_queries, max_cells: bounds over all groups.
        causal: the last query of a group sees all its cells, the one before all but one, and so on.
        pieces: C; extents are read in so many pieces at a time, because few rows alone do not fill a GPU.
    """

    ends: Tensor
    first: Tensor
    used: Tensor
    max_queries: int
    max_cells: int
    causal: bool
    pieces: int = 1


@dataclass
class PassView:
    """Where a pass writes its new positions, (N,) cells, and what they read.

    Attributes:
        is_step: one new position a text, whose reads are all of the decode kernel's kind.
    """

    cells: Tensor
    reads: list[ExtentReads] | DenseReads
    is_step: bool


@dataclass(frozen=True)
class PoolShape:
    """Sizes of a pool of keys and values.

    Attributes:
        cells: for each position of a text.
    """

    layers: int
    heads: int
    head_size: int
    cells: int = 1

    @staticmethod
    def of(loaded: LoadedModel) -> dict[str, PoolShape]:
        """Return the shapes of a model's pools: "text", and for a post decoder "self" and "image" as it attends."""
        text, decoder = loaded.core.config.text_config, getattr(loaded.core.model, "post_decoder", None)
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        shapes = {"text": PoolShape(text.num_hidden_layers, text.num_key_value_heads, size)}
        blocks: Any = [] if decoder is None else decoder.blocks
        if decoder is not None and decoder.reads_all_positions:
            heads = blocks[0].self_attention.num_heads
            shapes["self"] = PoolShape(len(blocks), heads, text.hidden_size // heads)
        if decoder is not None and decoder.align is not None:
            heads = blocks[0].cross_attention.num_heads
            # An image has as many features as positions. Of a tower before its merger it has four for each, and of one
            # that reads tiles those of margins besides.
            fixed = isinstance(loaded.image_positions, int) or not reads_tower(loaded.core.config)
            cells = 1 if fixed else 4
            shapes["image"] = PoolShape(len(blocks), heads, text.hidden_size // heads, cells)
        return shapes

    def nbytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of one position's keys and values over all layers."""
        return 2 * self.layers * self.heads * self.head_size * self.cells * dtype.itemsize


class KVPool:
    """Keys and values of every layer, (P + 1, K, D) each. The last cell takes what belongs to no text."""

    def __init__(self, shape: PoolShape, cells: int, like: Tensor) -> None:
        self.cells = cells
        size = (cells + 1, shape.heads, shape.head_size)
        # Zeros: a masked value is multiplied by 0, and 0 times a stray NaN is NaN.
        self.layers = [(like.new_zeros(size), like.new_zeros(size)) for _ in range(shape.layers)]
        if like.is_cuda:
            for tensor in itertools.chain.from_iterable(self.layers):
                # What is compiled holds for pools of any size: another one is not compiled for again.
                torch._dynamo.maybe_mark_dynamic(tensor, 0)


def pool_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    kv: KV,
    view: PassView,
    **_: Any,
) -> tuple[Tensor, None]:
    """Write the new keys and values, then attend: transformers' attention interface, (1, H, N, D) to (1, N, H, D)."""
    # transformers' layers have a batch of 1: all positions of a pass lie side by side in it.
    new = key[0].transpose(0, 1), value[0].transpose(0, 1)
    return attend(query[0].transpose(0, 1), kv, view, scaling, new)[None], None


AttentionInterface.register(ATTENTION_NAME, pool_attention)


def attend(query_NHD: Tensor, kv: KV, view: PassView, scale: float, new: KV | None = None) -> Tensor:
    """Attend to all reads together, (N, H, D). A query that sees nothing gets zeros.

    Args:
        new: keys and values of the new positions, (N, K, D) each, which are written first: reads see them, too.
    """
    if isinstance(view.reads, DenseReads):
        return view.reads.attend(query_NHD, kv, scale, new, view.cells)
    if new is not None:
        for stored, side in zip(kv, new, strict=True):
            stored.index_copy_(0, view.cells, side)
    # One part for each set of reads: what a text has alone, and the beginning that it shares.
    parts = [_read(query_NHD, kv, reads, view.is_step, scale) for reads in view.reads]
    # One read in one piece needs no merge.
    if len(parts) == 1 and parts[0][0].ndim == 3:
        return parts[0][0].to(query_NHD.dtype)
    # (C, N, H, D) and (C, N, H): the pieces of all reads, side by side.
    out = torch.cat([out if out.ndim == 4 else out[None] for out, _ in parts]).float()
    lse = torch.cat([lse if lse.ndim == 3 else lse[None] for _, lse in parts])
    lse = torch.where(lse == torch.inf, -torch.inf, lse)  # FlashAttention's sign of an empty read
    # Softmax over the parts: exp(lse) is the sum of a part's exponentials, so this is exact.
    weights = (lse - lse.amax(0).clamp(min=-1e30)).exp()
    weights = weights / weights.sum(0).clamp(min=1e-30)
    return (out * weights[..., None]).sum(0).to(query_NHD.dtype)


def _read(query_NHD: Tensor, kv: KV, reads: ExtentReads, is_step: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return attention to one set of reads and its log-sum-exp: (N, H, D) and (N, H), or with a leading C."""
    # A step has few queries and long extents, bound by memory; reading prompts is bound by arithmetic.
    if is_step:
        assert decode_attention is not None
        bounds = reads.max_queries, reads.pieces
        mixed: tuple[Tensor, Tensor] = decode_attention(
            query_NHD, *kv, reads.ends, reads.first, reads.used, *bounds, scale
        )
        return mixed
    return _flash(query_NHD, *kv, reads, scale)


def _flash(query_NHD: Tensor, keys: Tensor, values: Tensor, reads: ExtentReads, scale: float) -> tuple[Tensor, Tensor]:
    """FlashAttention over extents: with `seqused_k`, `cum_seq_k` is no more than each extent's first cell.

    torch 2.12 has this as `torch.nn.attention.varlen.varlen_attn`; before, it is this operator.
    """
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query_NHD,
        keys,
        values,
        reads.ends,
        reads.first,
        reads.max_queries,
        reads.max_cells,
        0.0,
        reads.causal,
        False,
        scale=scale,
        seqused_k=reads.used,
    )
    return out, lse.transpose(0, 1)


def has_flash(head_sizes: set[int], like: Tensor) -> bool:
    """Return whether FlashAttention reads such keys."""
    return (
        like.is_cuda
        and like.dtype in (torch.bfloat16, torch.float16)
        and all(size <= 256 and size % 8 == 0 for size in head_sizes)
    )


def has_decode_kernel(head_sizes: set[int], like: Tensor) -> bool:
    """Return whether the decode kernel reads such keys."""
    return (
        like.is_cuda
        and decode_attention is not None
        and all(16 <= size <= 256 and size & (size - 1) == 0 for size in head_sizes)
    )


# ----------------------------------------------------------------------------------------------------


class WithoutCudnnAttention(ContextDecorator):
    """Context manager that turns cuDNN's attention off, as the process's setting, while any thread is inside.

    cuDNN's attention, torch's first choice on Hopper and Blackwell since 2.11, makes a plan, in tens of milliseconds,
    for each number of rows and length that a thread has not seen (pytorch's MHA.cpp). Texts that `generate` grows
    always have new ones, and so have batches of images.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.before = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                torch.backends.cuda.enable_cudnn_sdp(self.before)


without_cudnn_attention = WithoutCudnnAttention()
