"""How sure a number is: intervals over images, and paired comparisons of two models on the same images.

Rows of one image depend on each other (POPE asks six questions on each), so images are resampled, never rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVELS = (2.5, 97.5)  # percentiles of a 95 % interval
Interval = list[float]  # low, high: a list, because results are JSON
Floats = NDArray[np.float64]
Ratio = Sequence[tuple[int, int]]  # a rate's (numerator, denominator), one per image
Columns = tuple[list[int], list[int]]  # the same as (numerators, denominators)


def safe_ratio(part: float, whole: float) -> float | None:
    """A rate; None of nothing, which is neither good nor bad."""
    return part / whole if whole else None


def mean(values: Sequence[float]) -> float | None:
    """Of numbers; None of none."""
    return safe_ratio(sum(values), len(values))


def to_columns(ratio: Ratio) -> Columns:
    """Numerators and denominators."""
    return [top for top, _ in ratio], [bottom for _, bottom in ratio]


def sum_by_image(rows: Iterable[tuple[str, int, int]], images: Iterable[str] = ()) -> Columns:
    """Numerators and denominators of rows (image, numerator, denominator), summed over each image.

    Args:
        images: come first and in this order; one without rows has 0 of 0.
    """
    sums = dict.fromkeys(images, (0, 0))
    for image, top, bottom in rows:
        tops, bottoms = sums.get(image, (0, 0))
        sums[image] = tops + top, bottoms + bottom
    return to_columns(list(sums.values()))


def ratio_interval(numerators: Sequence[float], denominators: Sequence[float], seed: int = 0) -> Interval | None:
    """95 % percentile bootstrap interval of sum(numerators) / sum(denominators) (Efron 1979).

    Args:
        numerators, denominators: one value per image. Resamples whose denominators sum to zero have no ratio and are
            left out.

    Returns:
        [low, high]; None where the denominators sum to zero.

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
    """95 % interval of ratio(second) - ratio(first): each resample takes the same images for both models.

    Args:
        first, second: (numerators, denominators) of a model, one value per image, in the same order of images.

    Returns:
        [low, high]; None where either ratio is one of nothing. Without zero inside, the difference is significant at
        5 %.

    Raises:
        ValueError: the four differ in length.
    """
    _same_length(*first, *second)
    if not (sum(first[1]) and sum(second[1])):
        return None
    draws = _draws(len(first[0]), seed)
    return _interval(_ratios(draws, *second) - _ratios(draws, *first))


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact McNemar test (McNemar 1947): p-value under "either model is as often right alone".

    Args:
        only_first, only_second: rows on which exactly that model is right; see `discordant_counts`.
    """
    n, fewer = only_first + only_second, min(only_first, only_second)
    # Doubling the binomial tail counts the middle twice where the two are equal: hence the bound.
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / (1 << n))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several comparisons with one base, corrected so that one false alarm among all stays at the level
    (Holm 1979): the k-th smallest of m is multiplied by m - k + 1, and none falls below a smaller one's."""
    corrected, most = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        most = max(most, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = most
    return corrected


def discordant_counts(first: Sequence[bool], second: Sequence[bool]) -> tuple[int, int]:
    """On how many rows only the first model is right, and only the second; rows in the same order.

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
    """How often each of `count` images is drawn in each resample: (RESAMPLES, count), each row summing to count."""
    drawn = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    cells = drawn + count * np.arange(RESAMPLES)[:, None]
    return np.bincount(cells.ravel(), minlength=RESAMPLES * count).reshape(RESAMPLES, count).astype(np.float64)


def _ratios(draws: Floats, numerators: Sequence[float], denominators: Sequence[float]) -> Floats:
    """The ratio of each resample; NaN where its denominators sum to zero."""
    top, bottom = (draws @ np.asarray(column, np.float64) for column in (numerators, denominators))
    return np.divide(top, bottom, out=np.full_like(top, np.nan), where=bottom != 0)


def _interval(values: Floats) -> Interval | None:
    """Percentiles of the resamples that have a value; None where none has."""
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.percentile(values, LEVELS)
    return [float(low), float(high)]
