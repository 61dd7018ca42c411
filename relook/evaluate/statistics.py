"""How sure a number is: intervals over images, and paired comparisons of two models on the same images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2000
Interval = list[float]


def _resampled(count: int, seed: int) -> np.ndarray:
    """How often each of `count` images is drawn in each resample, (RESAMPLES, count)."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)


def _ratios(draws: np.ndarray, numerators: Sequence[float], denominators: Sequence[float]) -> np.ndarray:
    top, bottom = draws @ np.asarray(numerators, float), draws @ np.asarray(denominators, float)
    return np.divide(top, bottom, out=np.zeros_like(top), where=bottom > 0)


def _percentiles(values: np.ndarray) -> Interval:
    low, high = np.percentile(values, [2.5, 97.5])
    return [float(low), float(high)]


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Interval:
    """95 % percentile bootstrap interval of sum(numerators) / sum(denominators), resampling images, not rows.

    Args:
        numerators, denominators: one value per image.
    """
    if not len(numerators):
        return [0.0, 0.0]
    return _percentiles(_ratios(_resampled(len(numerators), seed), numerators, denominators))


def paired_interval(
    first: tuple[Sequence[float], Sequence[float]], second: tuple[Sequence[float], Sequence[float]], seed: int = 0
) -> Interval:
    """95 % interval of ratio(second) - ratio(first), each (numerators, denominators) over the same images in order."""
    if len(first[0]) != len(second[0]):
        raise ValueError("a paired comparison needs the same images on both sides")
    draws = _resampled(len(first[0]), seed)
    return _percentiles(_ratios(draws, *second) - _ratios(draws, *first))


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact McNemar test (McNemar 1947): p-value from the rows on which exactly one of two models is right."""
    n, k = only_first + only_second, min(only_first, only_second)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n if n else 1.0
    return min(1.0, 2 * tail)
