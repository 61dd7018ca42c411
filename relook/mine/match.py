"""Chosen and rejected are alike but for what is wrong: of one length, and no text said twice over."""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from relook.evaluate.statistics import ratio
from relook.mine.pictures import Picture

MOST_APART = 0.25  # of the longer text's words: a pair whose lengths differ more is dropped
MEANS_APART = 0.05  # of the rejected texts' mean length
SHINGLE = 5  # words


@dataclass(frozen=True)
class Pair:
    """Two descriptions of a picture; `rejected` is the model's own, or the judge's in the same style as `chosen`."""

    picture: Picture
    chosen: str
    rejected: str

    @property
    def longer(self) -> int:
        """Words that `chosen` has more than `rejected`."""
        return length(self.chosen) - length(self.rejected)


def length(text: str) -> int:
    """Words between white space."""
    return len(text.split())


def same_length(pairs: Sequence[Pair]) -> tuple[list[Pair], Counter[str]]:
    """The pairs that training cannot tell by length, in order, and how many were dropped by reason.

    Pairs whose own lengths differ much go first, then those that pull the means of both sides apart, the worst first.
    """
    close = [p for p in pairs if abs(p.longer) <= MOST_APART * max(length(p.chosen), length(p.rejected))]
    total, rejected = sum(p.longer for p in close), sum(length(p.rejected) for p in close)
    left = deque(sorted(range(len(close)), key=lambda i: close[i].longer))
    while abs(total) > MEANS_APART * rejected:
        worst = close[left.pop() if total > 0 else left.popleft()]
        total, rejected = total - worst.longer, rejected - length(worst.rejected)
    kept = [close[i] for i in sorted(left)]
    return kept, +Counter(
        {"lengths differ": len(pairs) - len(close), "mean lengths would differ": len(close) - len(kept)}
    )


def lengths(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Length statistics of (chosen, rejected) texts, for the data card."""
    chosen, rejected = ([length(pair[side]) for pair in pairs] for side in (0, 1))
    apart = [c - r for c, r in zip(chosen, rejected, strict=True)]
    means = [_rounded(sum(side), len(pairs), 2) for side in (chosen, rejected)]
    characters = [_rounded(sum(len(pair[side]) for pair in pairs), len(pairs), 1) for side in (0, 1)]
    return {
        "chosen_words": means[0],
        "rejected_words": means[1],
        "means_differ": _rounded(abs(sum(apart)), sum(rejected), 4),
        "chosen_longer": sum(a > 0 for a in apart),
        "chosen_shorter": sum(a < 0 for a in apart),
        "same_length": sum(a == 0 for a in apart),
        "chosen_characters": characters[0],
        "rejected_characters": characters[1],
    }


def _rounded(part: float, whole: float, digits: int) -> float | None:
    found = ratio(part, whole)
    return None if found is None else round(found, digits)


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """A text's runs of `SHINGLE` words, without case and punctuation; of a shorter one all its words."""
    words = re.findall(r"\w+", text.lower())
    return frozenset(tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))


def near_duplicates(texts: Sequence[str], similarity: float) -> set[int]:
    """Places of texts whose shingles have a Jaccard similarity of at least `similarity` with those of an earlier one.

    Exact. Sets that are so similar share one of their few rarest members (prefix filter; Chaudhuri et al. 2006), so
    only texts that share one are compared.
    """
    found = [shingles(text) for text in texts]
    counts = Counter(shingle for one in found for shingle in one)
    by_rare: dict[tuple[str, ...], list[int]] = {}
    repeated = set()
    for place, one in enumerate(found):
        rare = sorted(one, key=lambda shingle: (counts[shingle], shingle))
        rare = rare[: len(one) - math.ceil(similarity * len(one) - 1e-9) + 1]
        earlier = {other for shingle in rare for other in by_rare.get(shingle, ())}
        if any(len(one & found[other]) >= similarity * len(one | found[other]) for other in earlier):
            repeated.add(place)
        else:
            for shingle in rare:
                by_rare.setdefault(shingle, []).append(place)
    return repeated
