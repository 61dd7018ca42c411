"""CHAIR (Rohrbach et al. 2018, arXiv:1809.02156): objects that a caption names and the picture does not have."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from relook.data.coco import Annotations


@dataclass(frozen=True)
class Mention:
    """A place where a text names an object: characters `start` to `end`."""

    object: str
    start: int
    end: int


@dataclass(frozen=True)
class Vocabulary:
    """Which words and phrases name which object, in singular and plural."""

    phrases: Mapping[str, str]
    pattern: re.Pattern[str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        longest_first = sorted(self.phrases, key=len, reverse=True)
        object.__setattr__(self, "pattern", re.compile(rf"\b({'|'.join(map(re.escape, longest_first))})\b", re.I))

    @staticmethod
    def of(names: Sequence[str], synonyms: Mapping[str, Sequence[str]] | None = None) -> Vocabulary:
        """From object names and other words for them."""
        phrases = {}
        for name in names:
            for word in (name, *(synonyms or {}).get(name, ())):
                phrases[word.lower()] = name
                phrases[plural(word.lower())] = name
        return Vocabulary(phrases)


def vocabulary_of(annotations: Annotations) -> Vocabulary:
    return Vocabulary.of(annotations.categories, annotations.synonyms)


def plural(word: str) -> str:
    """The regular plural of a noun or of a phrase's last word."""
    if re.search(r"(s|x|z|ch|sh)$", word):
        return word + "es"
    if re.search(r"[^aeiou]y$", word):
        return word[:-1] + "ies"
    return re.sub(r"(?:fe|f)$", "ves", word) if re.search(r"(knife|shelf|leaf)$", word) else word + "s"


def mentions(text: str, vocabulary: Vocabulary) -> list[Mention]:
    """Every mention of an object, in order; the longest phrase wins, case does not matter, whole words only."""
    return [
        Mention(vocabulary.phrases[found.group().lower()], found.start(), found.end())
        for found in vocabulary.pattern.finditer(text)
    ]


@dataclass(frozen=True)
class ChairScore:
    """CHAIR over captions; the tuples hold one count per image, in the order of `images`.

    Captions without any mention count as free of hallucination in chair_s, as in the original; how many there are is
    reported as `empty`, because a model that says nothing is not a model that sees.
    """

    images: tuple[str, ...]
    mentioned: tuple[int, ...]  # mentions of objects
    hallucinated: tuple[int, ...]  # of these, of absent ones
    found: tuple[int, ...]  # distinct present objects that were named
    present: tuple[int, ...]  # distinct present objects
    words: tuple[int, ...]

    @property
    def n(self) -> int:
        return len(self.images)

    def to_json(self) -> dict[str, Any]:
        return {
            "chair_i": _ratio(sum(self.hallucinated), sum(self.mentioned)),
            "chair_s": _ratio(sum(h > 0 for h in self.hallucinated), self.n),
            "recall": _ratio(sum(self.found), sum(self.present)),
            "length": _ratio(sum(self.words), self.n),
            "empty": _ratio(sum(m == 0 for m in self.mentioned), self.n),
            "n": self.n,
        }


def score(
    captions: Mapping[str, str], truth: Mapping[str, Collection[str]], vocabulary: Vocabulary
) -> ChairScore:  # fmt: skip
    """Count mentions in each image's caption against the objects that are there."""
    rows = []
    for image, caption in captions.items():
        named = [mention.object for mention in mentions(caption, vocabulary)]
        there = set(truth[image])
        wrong = sum(name not in there for name in named)
        rows.append((image, len(named), wrong, len(there & set(named)), len(there), len(caption.split())))
    return ChairScore(*(tuple(column) for column in zip(*rows, strict=True))) if rows else ChairScore(*((),) * 6)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
