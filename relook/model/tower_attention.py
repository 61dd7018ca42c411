"""Attention of vision towers that read the patches of all images, or of windows, as segments of one row.

By SDPA, transformers runs such a tower segment by segment: 36 windows of a picture of 588 x 784 pixels in 28 of
Qwen2.5-VL's 32 layers. Here FlashAttention reads all segments at once; where it does not run, those of equal length go
together.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from relook.model.families import vision_tower

# transformers passes the segments' bounds to implementations whose name says "flash", and cuts the row for all others.
NAME = "relook_flash_segments"


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    cu_seq_lens_q: Tensor,
    max_length_q: int | Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each segment of a row.

    Args:
        query, key, value: (1, heads, S, size).
        cu_seq_lens_q: the first position of each segment, and S at last.
        max_length_q: positions of the longest segment; a tensor in releases of transformers before 5.17.

    Returns:
        (1, S, heads, size), and no weights.
    """
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] % 8 == 0:
        rows = (states[0].transpose(0, 1) for states in (query, key, value))  # (S, heads, size)
        bounds, longest = cu_seq_lens_q.int(), int(max_length_q)
        flash = torch.ops.aten._flash_attention_forward  # from torch 2.12 on `torch.nn.attention.varlen.varlen_attn`
        output = flash(*rows, bounds, bounds, longest, longest, dropout, False, False, scale=scaling)[0]
        return output[None], None
    starts, lengths = cu_seq_lens_q[:-1].long(), cu_seq_lens_q.diff().long()
    outputs, order = [], []
    for length in lengths.unique().tolist():
        # Positions of the n segments of this length, (n, length), then their states, (n, heads, length, size).
        positions = starts[lengths == length, None] + torch.arange(length, device=starts.device)
        parts = (states[0][:, positions].transpose(0, 1) for states in (query, key, value))
        attended, _ = sdpa_attention_forward(module, *parts, None, dropout=dropout, scaling=scaling, is_causal=False)
        outputs.append(attended.flatten(0, 1))  # (n * length, heads, size)
        order.append(positions.flatten())
    return torch.cat(outputs)[torch.cat(order).argsort()][None], None


AttentionInterface.register(NAME, segment_attention)


def batch_segments(base: Any) -> None:
    """Let a base model's tower attend by `segment_attention`, if it reads images as segments of a row, by SDPA."""
    config: Any = vision_tower(base).config
    if "image_grid_thw" in signature(base.get_image_features).parameters and config._attn_implementation == "sdpa":
        config._attn_implementation = NAME
