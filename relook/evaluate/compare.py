"""Comparison of two models on the same images, from their answer files: differences, their intervals, significance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relook.errors import RecipeError
from relook.evaluate.statistics import safe_ratio
from relook.evaluate.tasks import BENCHMARKS, get_benchmarks
from relook.evaluate.tasks.pope import official_parse
from relook.files import read_json_object

if TYPE_CHECKING:  # scores are compared without a model's libraries
    from torch import Tensor

# ----------------------------------------------------------------------------------------------------


def compare(
    data: str | Path, first: str | Path, second: str | Path, benchmarks: Sequence[str] | None = None
) -> dict[str, Any]:
    """Compute the differences second - first of two `relook eval` folders over the same data.

    Args:
        benchmarks: names of the benchmarks; by default all that can be paired.

    Returns:
        For each POPE split, the difference in accuracy with its paired 95 % interval over images and the exact McNemar
        p-value over questions, and the other rates' differences with intervals. For CHAIR, its rates' differences with
        intervals, and for chair_s the p-value over captions.

    Raises:
        DataError: the two did not answer the same questions or describe the same images.
    """
    return compare_pooled([(Path(data), Path(first), Path(second))], benchmarks)


def compare_pooled(runs: Sequence[tuple[Path, Path, Path]], benchmarks: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare like `compare`, pooling the images of several (data, first, second) runs: for tables over seeds."""
    result: dict[str, Any] = {}
    for name, benchmark in get_benchmarks(paired_benchmarks() if benchmarks is None else benchmarks).items():
        if benchmark.compare is None:
            raise RecipeError(f"Two models cannot be paired by {name}.", f"Choose from {paired_benchmarks()}.")
        result[name] = benchmark.compare(runs)
    return result


def paired_benchmarks() -> list[str]:
    """Return the names of the benchmarks by which two models can be compared image by image."""
    return [name for name, benchmark in get_benchmarks(BENCHMARKS).items() if benchmark.compare]


def read_scores(out: str | Path, benchmarks: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Read the scores without their provenance, for tables that state it once for all.

    Args:
        benchmarks: names of the benchmarks; by default all that can be paired.
    """
    names = paired_benchmarks() if benchmarks is None else benchmarks
    results = {name: read_json_object(Path(out) / f"{name}.json") for name in names}
    return {name: {key: v for key, v in scores.items() if key != "provenance"} for name, scores in results.items()}


# ----------------------------------------------------------------------------------------------------
# Divergence of a tuned model's first answer token from the base's, and hallucination rate by divergence.

KL_EDGES = (0.0, 1e-3, 1e-2, 1e-1, 1.0, float("inf"))  # nats


def kl_divergence(tuned: Tensor, base: Tensor) -> Tensor:
    """Compute the Kullback-Leibler divergence of the tuned from the base distribution, in nats, (N,).

    KL(p || q) = sum over the whole vocabulary of p (log p - log q), p the tuned and q the base distribution of the
    first answer token (Kullback and Leibler 1951). Rounding may leave a tiny negative sum, which is clamped to 0.

    Args:
        tuned, base: log-probs, (N, vocabulary).
    """
    # A mean over sampled tokens would be an estimate; the whole vocabulary gives the exact sum.
    result: Tensor = (tuned.exp() * (tuned - base)).sum(-1).clamp_min(0)
    return result


def hallucination_by_divergence(
    tuned: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Compute how often questions labelled no are answered with yes, by bins of their divergence.

    Args:
        tuned, base: records of FIRST_FILE of a tuned model (a row) and of the base, in the same order.

    Returns:
        For each bin [low, high) of KL_EDGES the number `n` of such questions, and the `rate` and `base_rate` at which
        row and base answer yes (None in an empty bin). `high` is None if the bin is unbounded.
    """
    # Only questions labelled no can be hallucinated: a yes to them names an absent object.
    bins = []
    for low, high in pairwise(KL_EDGES):
        inside = [
            (_says_yes(record), _says_yes(other))
            for record, other in zip(tuned, base, strict=True)
            if record["label"] == "no" and low <= record["kl"] < high
        ]
        row_rate, base_rate = (safe_ratio(sum(pair[side] for pair in inside), len(inside)) for side in (0, 1))
        end = high if high < float("inf") else None
        bins.append({"low": low, "high": end, "n": len(inside), "rate": row_rate, "base_rate": base_rate})
    return bins


def _says_yes(record: Mapping[str, Any]) -> bool:
    return official_parse(record["answer"])
