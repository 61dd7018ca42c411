"""Uncertainty of scores: bootstrap intervals over images, and paired comparisons of two models on the same images.

Rows of one image are not independent (POPE asks six questions about each), so images are resampled, never rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVELS = (2.5, 97.5)  # percentiles of a 95 % interval
Interval = list[float]  # low, high: a list, because results are JSON
Floats = NDArray[np.float64]
Ratio = Sequence[tuple[int, int]]  # a rate's (numerator, denominator), one per image
Columns = tuple[list[int], list[int]]  # the same as (numerators, denominators)


def safe_ratio(part: float, total: float) -> float | None:
    """Return part / total; None if the total is zero, since a rate of nothing is neither good nor bad."""
    return part / total if total else None


def mean(values: Sequence[float]) -> float | None:
    """Return the mean of numbers; None if there are none."""
    return safe_ratio(sum(values), len(values))


def to_columns(ratio: Ratio) -> Columns:
    """Split (numerator, denominator) pairs into numerators and denominators."""
    return [top for top, _ in ratio], [bottom for _, bottom in ratio]


def sum_by_image(rows: Iterable[tuple[str, int, int]], images: Iterable[str] = ()) -> Columns:
    """Sum numerators and denominators of rows (image, numerator, denominator) over each image.

    Args:
        images: images that come first, in this order; one without rows has 0 of 0.
    """
    sums = dict.fromkeys(images, (0, 0))
    for image, top, bottom in rows:
        tops, bottoms = sums.get(image, (0, 0))
        sums[image] = tops + top, bottoms + bottom
    return to_columns(list(sums.values()))


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Interval | None:
    """Compute the 95 % percentile bootstrap interval of sum(numerators) / sum(denominators) (Efron 1979).

    Args:
        numerators, denominators: one value per image. Resamples whose denominators sum to zero have no ratio and are
            left out.

    Returns:
        [low, high]; None if the denominators sum to zero.

    Raises:
        ValueError: the two differ in length.
    """
    _same_length(numerators, denominators)
    if not sum(denominators):
        return None
    return _interval(_ratios(_draws(len(numerators), seed), numerators, denominators))


def paired_interval(
    first: tuple[Sequence[float], Sequence[float]], second: tuple[Sequence[float], Sequence[float]], seed: int = 0
) -> Interval | None:
    """Compute the 95 % interval of ratio(second) - ratio(first); each resample takes the same images for both models.

    Args:
        first, second: (numerators, denominators) of a model, one value per image, in the same order of images.

    Returns:
        [low, high]; None if either ratio has a zero denominator. If zero lies outside, the difference is significant at
        the 5 % level.

    Raises:
        ValueError: the four differ in length.
    """
    _same_length(*first, *second)
    if not (sum(first[1]) and sum(second[1])):
        return None
    # One set of draws for both: their difference then varies with the images alone, not with two samplings.
    draws = _draws(len(first[0]), seed)
    return _interval(_ratios(draws, *second) - _ratios(draws, *first))


def rate_intervals(ratios: Mapping[str, Ratio]) -> dict[str, Interval | None]:
    """Compute each rate's interval, under the rate's name followed by `_ci`."""
    return {f"{rate}_ci": ratio_interval(*to_columns(ratio)) for rate, ratio in ratios.items()}


def rate_difference(first: Sequence[Ratio], second: Sequence[Ratio]) -> dict[str, Any]:
    """Compute the difference second - first of a rate, and its paired interval, over the images of several runs.

    Both are None if either rate has a zero denominator.
    """
    pooled = [to_columns([pair for run in side for pair in run]) for side in (first, second)]
    first_rate, second_rate = (safe_ratio(sum(tops), sum(bottoms)) for tops, bottoms in pooled)
    difference = None if first_rate is None or second_rate is None else second_rate - first_rate
    return {"difference": difference, "ci": paired_interval(pooled[0], pooled[1])}


def mcnemar(only_first: int, only_second: int) -> float:
    """Compute the p-value of the two-sided exact McNemar test (McNemar 1947).

    The null hypothesis is that either model is equally often the only one that is right.

    Args:
        only_first, only_second: rows on which exactly that model is right; see `discordant_counts`.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    # Doubling the binomial tail counts the middle term twice when the two counts are equal: hence the bound.
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / (1 << n))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct the p-values of several comparisons with one base for the family-wise error rate (Holm 1979).

    The k-th smallest of m is multiplied by m - k + 1, and none falls below the corrected value of a smaller one.
    """
    # Step down from the smallest p-value; the running maximum keeps the corrected values in order.
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def discordant_counts(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int]:
    """Count the rows on which only the first model is right, and only the second; rows are in the same order.

    Raises:
        ValueError: the two differ in length.
    """
    _same_length(first, second)
    pairs = list(zip(first, second, strict=True))
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)


def _same_length(*columns: Sequence[object]) -> None:
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"the same images are needed on all sides, not {[len(column) for column in columns]}")


@lru_cache(2)  # a result has several rates over the same images
def _draws(count: int, seed: int) -> Floats:
    """Draw the resamples: how often each of `count` images occurs in each, (RESAMPLES, count); rows sum to count."""
    drawn = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    # Give each resample its own range of bins, so that one bincount counts all resamples at once.
    cells = drawn + count * np.arange(RESAMPLES)[:, None]
    return np.bincount(cells.ravel(), minlength=RESAMPLES * count).reshape(RESAMPLES, count).astype(np.float64)


def _ratios(draws: Floats, numerators: Sequence[float], denominators: Sequence[float]) -> Floats:
    """Compute the ratio of each resample, (RESAMPLES,); NaN where its denominators sum to zero."""
    # A resample's sum over images is a product with the counts, so all resamples are one matrix product.
    top, bottom = (draws @ np.asarray(column, np.float64) for column in (numerators, denominators))
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom != 0)


def _interval(values: Floats) -> Interval | None:
    """Compute the interval's percentiles over the resamples that are not NaN; None if all are."""
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.percentile(values, LEVELS)
    return [float(low), float(high)]
