"""Pictures on which two models differ: what the second does better there, and what it does worse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any


@dataclass(frozen=True)
class Effect:
    """A difference of the second model from the first one on a picture."""

    helps: bool
    text: str


def caption_effects(row: Mapping[str, Any]) -> list[Effect]:
    """Return the effects on a caption; gains come first.

    Args:
        row: of `differing_captions`.
    """
    before, now = (Counter(names) for names in row["hallucinated"])
    named_before, named_now = (set(names) for names in row["named"])
    parts = [
        (True, "invents less: {}", before - now),
        (True, "now finds: {}", named_now - named_before),
        (False, "invents: {}", now - before),
        (False, "loses what is there: {}", named_before - named_now),
    ]
    return [Effect(helps, text.format(", ".join(sorted(names)))) for helps, text, names in parts if names]


def in_turn(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Order captions so that those with a loss and those with gains alone take turns, the first ones first."""
    groups: tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]] = ([], [])
    for row in rows:
        groups[all(effect.helps for effect in caption_effects(row))].append(row)
    pairs = zip_longest(*groups)
    return [row for pair in pairs for row in pair if row is not None]


def answer_effect(right: Sequence[bool]) -> list[Effect]:
    """Return the effect on an answer, from whether each model is right; none if both are."""
    if right[0] == right[1]:
        return []
    return [Effect(right[1], "now right" if right[1] else "now wrong")]


def by_image(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Group rows by their image, in order of appearance."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["image"], []).append(row)
    return groups
