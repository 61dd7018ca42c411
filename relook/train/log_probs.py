"""From logits to log-probabilities without a second copy of the logits: they are the largest tensors of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 1024  # that are in float32 at a time, where each operation has a result of its own


class LogProb(torch.autograd.Function):
    """log softmax(logits)[id] for each row: (N,) float32 of logits (N, vocabulary) in any floating-point type.

    Kept for the backward pass are the logits as they came and one number a row. In plain operations bf16 logits of
    16,000 targets at 32,000 words, 1 GB, grow by two float32 copies of 2 GB each.

    The gradient of log p_i by logit j is g * ([j = i] - p_j).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, compiled: bool) -> Tensor:
        total = _by_rows(_totals, compiled, logits)
        ctx.save_for_backward(logits, ids, total)
        ctx.compiled = compiled
        return wide(logits.gather(-1, ids[:, None]).squeeze(-1)) - total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, total = ctx.saved_tensors
        return _by_rows(_gradients, ctx.compiled, logits, ids, total, gradient), None, None


def _by_rows(work: Callable[..., Tensor], compiled: bool, *tensors: Tensor) -> Tensor:
    """`work` on tensors of as many rows each: compiled, in one pass over memory, or some rows at a time."""
    if compiled:
        made: Tensor = torch.compile(work)(*tensors)
        return made
    parts = zip(*(tensor.split(ROWS) for tensor in tensors), strict=True)
    return torch.cat([work(*part) for part in parts])


def _totals(logits: Tensor) -> Tensor:
    return wide(logits).logsumexp(-1)


def _gradients(logits: Tensor, ids: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
    said = torch.arange(logits.shape[-1], device=logits.device) == ids[:, None]
    found = said.to(total.dtype) - (wide(logits) - total[:, None]).exp()
    return (found * gradient[:, None]).to(logits.dtype)


def wide(values: Tensor) -> Tensor:
    """In float32, or in float64 where they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def log_prob(logits: Tensor, ids: Tensor, compiled: bool = False) -> Tensor:
    """log softmax(logits)[id] for each row, (N,) float32.

    Args:
        compiled: each pass becomes one kernel, which reads the logits once: less than half the time on a GPU.
    """
    result: Tensor = LogProb.apply(logits, ids, compiled)
    return result
