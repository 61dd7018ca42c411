"""Losses: one equation, one pure function."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def dpo_sigmoid(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float) -> Tensor:
    """Direct preference optimisation, eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290).

    Args:
        chosen_ratio: log pi(y_w|x) - log pi_ref(y_w|x), shape (pairs,), in nats.
        rejected_ratio: the same for the rejected response y_l.
        beta: strength of the pull towards the reference.

    Returns:
        -log sigmoid(beta * (chosen_ratio - rejected_ratio)), shape (pairs,); ln 2 where policy and reference agree.
    """
    return -F.logsigmoid(beta * (chosen_ratio - rejected_ratio))


def negative_log_likelihood(log_probs: Tensor) -> Tensor:
    """Mean over tokens of -log p, shape (): the usual supervised loss in nats a token."""
    return -log_probs.mean()
