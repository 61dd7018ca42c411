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

kernels: Any
try:
    from relook.generate import kernels
except ImportError:  # no Triton: CPUs, and platforms that it does not support
    kernels = None

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


class _CurrentLayer(threading.local):
    """Keys and values of the layer that this thread runs, and the view of its pass.

    They are no arguments of the layer, so that a compiled layer does not depend on what a pass reads.
    """

    kv: KV
    view: PassView


current = _CurrentLayer()


def pool_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Attend to the pool: transformers' attention interface, (1, H, N, D) to (1, N, H, D)."""
    call = _opaque_attention if torch.compiler.is_compiling() else _attention
    return call(query, key, value, scaling), None


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    # transformers' layers have a batch of 1: all positions of a pass lie side by side in it.
    query, key, value = (side[0].transpose(0, 1) for side in (query, key, value))
    return attend(query, current.kv, current.view, scale, (key, value))[None]


# For the compiler one operation, which it neither looks into nor compiles again for other reads.
_opaque_attention = torch.library.custom_op("relook::pool_attention", _attention, mutates_args=())
_opaque_attention.register_fake(lambda query, *_: query.transpose(1, 2).new_empty(query.transpose(1, 2).shape))
AttentionInterface.register(ATTENTION_NAME, pool_attention)


def attend(query_NHD: Tensor, kv: KV, view: PassView, scale: float, new: KV | None = None) -> Tensor:
    """Attend to all reads together, (N, H, D). A query that sees nothing gets zeros.

    Args:
        new: keys and values of the new positions, (N, K, D) each, which are written first: reads see them, too.
    """
    if isinstance(view.reads, DenseReads):
        return view.reads.attend(query_NHD, kv, scale, new, view.cells)
    if new is not None:
        kernels.store(new, kv, view.cells)
    # A step has few queries and long extents, bound by memory; reading prompts is bound by arithmetic.
    read = kernels.decode if view.is_step else _flash
    # What a text has alone, and the beginning that it shares: each is one part, or several.
    mixed: Tensor = kernels.merge([read(query_NHD, *kv, reads, scale) for reads in view.reads], query_NHD.dtype)
    return mixed


def _flash(query_NHD: Tensor, keys: Tensor, values: Tensor, reads: ExtentReads, scale: float) -> tuple[Tensor, Tensor]:
    """FlashAttention over extents, (1, N, H, D), and its log-sum-exp, (1, N, H).

    With `seqused_k`, `cum_seq_k` is no more than each extent's first cell. torch 2.12 has this as
    `torch.nn.attention.varlen.varlen_attn`; before, it is this operator.
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
    return out[None], lse.T.contiguous()[None]


def has_kernels(head_sizes: set[int], like: Tensor) -> bool:
    """Return whether Triton's kernels read such keys in place."""
    return (
        like.is_cuda
        and kernels is not None
        and all(16 <= size <= 256 and size & (size - 1) == 0 for size in head_sizes)
    )


def has_flash(like: Tensor) -> bool:
    """Return whether FlashAttention reads keys of that dtype."""
    return like.is_cuda and like.dtype in (torch.bfloat16, torch.float16)


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
