"""How far a tuned model's first answer tokens are from the base's, and how often it hallucinates where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from relook.evaluate.pope import official_parse
from relook.evaluate.statistics import ratio

KL_EDGES = (0.0, 1e-3, 1e-2, 1e-1, 1.0, float("inf"))  # nats


def divergence(tuned: Tensor, base: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the tuned from the base distribution, in nats, (N,).

    KL(p || q) = sum over the whole vocabulary of p (log p - log q), p the tuned and q the base distribution of the
    first answer token (Kullback and Leibler 1951). Rounding may leave a tiny negative sum: it is taken for 0.

    Args:
        tuned, base: log-probs, (N, vocabulary).
    """
    result: Tensor = (tuned.exp() * (tuned - base)).sum(-1).clamp_min(0)
    return result


def by_divergence(tuned: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How often questions to be answered with no are answered with yes, by bins of their divergence.

    Args:
        tuned, base: records of FIRST_FILE of a row and of the base, in the same order.

    Returns:
        For each bin [low, high) of KL_EDGES the number `n` of such questions, and the `rate` and `base_rate` at which
        row and base answer yes (None in an empty bin). `high` is None where the bin has no end.
    """
    bins = []
    for low, high in pairwise(KL_EDGES):
        inside = [
            (_says_yes(record), _says_yes(other))
            for record, other in zip(tuned, base, strict=True)
            if record["label"] == "no" and low <= record["kl"] < high
        ]
        row_rate, base_rate = (ratio(sum(pair[side] for pair in inside), len(inside)) for side in (0, 1))
        end = high if high < float("inf") else None
        bins.append({"low": low, "high": end, "n": len(inside), "rate": row_rate, "base_rate": base_rate})
    return bins


def _says_yes(record: Mapping[str, Any]) -> bool:
    return official_parse(record["answer"])
