"""Intervals and tests against theory, other computations and known values."""

from __future__ import annotations

import time
from itertools import product
from math import erfc, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relook.evaluate.statistics import (
    discordant_counts,
    holm,
    mcnemar,
    mean,
    paired_interval,
    ratio_interval,
    safe_ratio,
    sum_by_image,
)


def test_interval_of_a_mean_is_the_normal_one() -> None:
    """400 yes/no images, 60 % yes: the bootstrap must come near mean +- 1.96 sqrt(p (1 - p) / n)."""
    low, high = ratio_interval([1] * 240 + [0] * 160, [1] * 400)
    half = 1.96 * np.sqrt(0.6 * 0.4 / 400)
    assert (low, high) == (pytest.approx(0.6 - half, abs=0.006), pytest.approx(0.6 + half, abs=0.006))


def test_interval_of_a_ratio_is_the_delta_methods() -> None:
    """Sum over images of unequal weight: var(r) is about sum (y - r x)^2 / (sum x)^2."""
    rng = np.random.default_rng(5)
    x = rng.integers(1, 12, 500)
    y = rng.binomial(x, 0.3)
    ratio = y.sum() / x.sum()
    half = 1.96 * np.sqrt(((y - ratio * x) ** 2).sum()) / x.sum()
    low, high = ratio_interval(y.tolist(), x.tolist(), seed=1)
    assert (low, high) == (pytest.approx(ratio - half, abs=half / 6), pytest.approx(ratio + half, abs=half / 6))


def test_rows_are_summed_over_their_images() -> None:
    rows = [("b", 1, 2), ("a", 3, 4), ("b", 5, 6)]
    assert sum_by_image(rows) == ([6, 3], [8, 4])
    assert sum_by_image(rows, ["c", "a"]) == ([0, 3, 6], [0, 4, 8])
    assert sum_by_image([]) == ([], [])


def test_interval_of_two_images_by_enumeration() -> None:
    """Images (0 of 1) and (3 of 3): resamples give 0, 3/4, 3/4, 1, so the percentiles are 0 and 1."""
    every = sorted(sum(t for t, _ in pick) / sum(b for _, b in pick) for pick in product([(0, 1), (3, 3)], repeat=2))
    assert every == [0, 0.75, 0.75, 1]
    assert ratio_interval([0, 3], [1, 3]) == [0.0, 1.0]


def test_resamples_of_nothing_are_left_out() -> None:
    """Images (1 of 2) and (0 of 0): of the four resamples one has no ratio, the others have 1/2."""
    assert ratio_interval([1, 0], [2, 0]) == [0.5, 0.5]
    assert paired_interval(([1, 0], [2, 0]), ([2, 0], [2, 0])) == [0.5, 0.5]


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(100):
        low, high = ratio_interval(rng.binomial(6, 0.8, 80).tolist(), [6] * 80, seed=trial)
        covered += low <= 0.8 <= high
    assert 87 <= covered <= 100


def test_paired_interval_is_narrower_than_two_apart() -> None:
    """Two models that fail on the same images but for twenty where the second is right alone."""
    first = [1] * 200 + [0] * 100
    second = [1] * 220 + [0] * 80
    ones = [1] * 300
    low, high = paired_interval((first, ones), (second, ones))
    assert 0 < low < 20 / 300 < high
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(20 / 300 * 280 / 300 / 300), rel=0.12)
    one = ratio_interval(first, ones)
    assert high - low < one[1] - one[0]


def test_holm_by_hand() -> None:
    # Sorted: .01 x 4, .02 x 3, .03 x 2, .5 x 1; the third would fall to .06, which is not below the second's.
    assert holm([0.03, 0.5, 0.01, 0.02]) == pytest.approx([0.06, 0.5, 0.04, 0.06])
    assert holm([0.01, 0.011]) == pytest.approx([0.02, 0.02])  # .011 x 1 would fall below .02
    assert holm([0.4, 0.9]) == pytest.approx([0.8, 0.9])
    assert holm([0.7, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_edges() -> None:
    assert ratio_interval([], []) is ratio_interval([0, 0], [0, 0]) is None
    assert paired_interval(([], []), ([], [])) is paired_interval(([1], [2]), ([0], [0])) is None
    assert (safe_ratio(0, 0), mean([]), safe_ratio(0, 3)) == (None, None, 0)
    assert ratio_interval([2], [4]) == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"same images .* \[2, 1\]"):
        ratio_interval([1, 1], [1])
    with pytest.raises(ValueError, match="same images"):
        paired_interval(([1], [1]), ([1, 0], [1, 1]))


counts = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=20)


@given(counts, st.integers(0, 5))
def test_intervals_are_reproducible_bounded_and_antisymmetric(images: list[tuple[int, int]], seed: int) -> None:
    wrong, right = ([image[side] for image in images] for side in (0, 1))
    total = [w + r for w, r in images]
    if not sum(total):
        assert ratio_interval(wrong, total, seed) is paired_interval((wrong, total), (right, total), seed) is None
        return
    low, high = ratio_interval(wrong, total, seed)
    assert 0 <= low <= high <= 1
    assert [low, high] == ratio_interval(wrong, total, seed)
    forth = paired_interval((wrong, total), (right, total), seed)
    back = paired_interval((right, total), (wrong, total), seed)
    assert forth == pytest.approx([-back[1], -back[0]])
    assert paired_interval((wrong, total), (wrong, total), seed) == [0, 0]


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (3, 3, 1.0), (0, 6, 0.03125), (1, 5, 0.21875), (2, 10, 0.03857421875)],
)
def test_mcnemar_by_hand(only_first: int, only_second: int, p: float) -> None:
    """For example 1 against 5: 2 (1 + 6) / 64."""
    assert mcnemar(only_first, only_second) == mcnemar(only_second, only_first) == p


def test_mcnemar_of_many_rows_is_the_normal_test() -> None:
    """z = (|b - c| - 1) / sqrt(b + c), with the continuity correction; erfc(z / sqrt 2) is the two-sided p."""
    assert mcnemar(1200, 1400) == pytest.approx(erfc(199 / sqrt(2600) / sqrt(2)), rel=0.02)


def test_right_alone() -> None:
    assert discordant_counts([True, True, False, False, True], [True, False, True, False, False]) == (2, 1)


def test_bootstrap_is_fast() -> None:
    """300 images and 2,000 resamples take less than 0.2 s: the best of three, because machines are shared."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        ratio_interval([1] * 300, [2] * 300)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.2
