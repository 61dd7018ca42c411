"""CHAIR (Rohrbach et al. 2018, arXiv:1809.02156): objects that a caption names and the picture does not have.

The rules are those of LisaAnne/Hallucination utils/chair.py. It turns words into singulars with a library; here a
vocabulary lists singulars and plurals, so that nothing has to be installed and a mention keeps its place in the text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

from relook.data.annotations import Annotations
from relook.errors import DataError, some
from relook.evaluate.statistics import Ratio, ratio

_WORD = re.compile(r"\w+(?:-\w+)*")  # a hyphen belongs to its word, as in "man-made"
# Phrases whose words would name an object, though the phrase does not: an animal is no baby and a jet no passenger.
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
_NO_OBJECT = ("baby animal", "adult animal", "baby cub", "adult cub", "home plate", "train track")
_IRREGULAR = {"child": "children", "goose": "geese", "mouse": "mice", "ox": "oxen", "person": "people"} | {
    name: name for name in ("sheep", "people", "cattle", "aircraft", "scissors", "skis", "luggage")
}


@dataclass(frozen=True)
class Mention:
    """A place where a text names an object: characters `start` to `end`."""

    object: str
    start: int
    end: int


@dataclass(frozen=True)
class Vocabulary:
    """Which words and phrases name which object.

    Args:
        phrases: surface form in lower case, single spaces, singular or plural, to object; to "" where it names none.
        hidden_by: surface forms that do not count where one of certain others stands in the same text.
    """

    phrases: Mapping[str, str]
    hidden_by: Mapping[str, Collection[str]] = field(default_factory=dict)

    @cached_property
    def longest(self) -> int:
        """Words in the longest phrase."""
        return max((len(_WORD.findall(phrase)) for phrase in self.phrases), default=0)

    @cached_property
    def plurals(self) -> frozenset[str]:
        """The phrases that are plurals of others, and not the same."""
        return frozenset(plural(phrase) for phrase in self.phrases if plural(phrase) != phrase) & self.phrases.keys()

    @staticmethod
    def of(names: Sequence[str], synonyms: Mapping[str, Sequence[str]] | None = None) -> Vocabulary:
        """From object names and other words for them. A name goes before a synonym, and either before a plural."""
        phrases = {_surface(name): name for name in names}
        for name in names:
            for word in (synonyms or {}).get(name, ()):
                phrases.setdefault(_surface(word), name)
        return Vocabulary(_with_plurals(phrases))


def vocabulary_of(annotations: Annotations) -> Vocabulary:
    """CHAIR's own where the categories are COCO's 80; else that of an annotation file's categories and synonyms."""
    coco = coco_vocabulary()
    if set(annotations.categories) == set(coco.phrases.values()) - {""} and not annotations.synonyms:
        return coco
    return Vocabulary.of(annotations.categories, annotations.synonyms)


@cache
def coco_vocabulary() -> Vocabulary:
    """CHAIR's vocabulary of COCO's 80 objects, with its rules for double words, from `coco_synonyms.txt`."""
    text = files("relook.evaluate").joinpath("coco_synonyms.txt").read_text(encoding="utf-8")
    rows = [line.split(", ") for line in text.splitlines() if line and not line.startswith("#")]
    phrases = {word: row[0] for row in rows for word in row}
    phrases |= {f"{age} {animal}": phrases[animal] for animal in _ANIMALS for age in ("baby", "adult")}
    phrases |= {"passenger jet": "airplane", "passenger train": "train", "toilet seat": "toilet"}
    phrases |= dict.fromkeys(_NO_OBJECT, "")
    # "The seat of the toilet" names no chair.
    toilet = frozenset(_with_plurals(dict.fromkeys(("toilet", "toilet seat"), "toilet")))
    return Vocabulary(_with_plurals(phrases), dict.fromkeys(("seat", "seats"), toilet))


def _surface(phrase: str) -> str:
    return " ".join(phrase.lower().split())


def _with_plurals(phrases: Mapping[str, str]) -> dict[str, str]:
    return {plural(phrase): name for phrase, name in phrases.items()} | dict(phrases)


def plural(phrase: str) -> str:
    """The plural of a noun in lower case, or of a phrase's last word."""
    head, space, word = phrase.rpartition(" ")
    if word in _IRREGULAR:
        many = _IRREGULAR[word]
    elif word.endswith("child"):
        many = word + "ren"
    elif word.endswith("man") and word not in ("human", "german"):
        many = word[:-3] + "men"
    elif re.search(r"([nlw]ife|(thie|shel|lea|loa|cal|hal|wol|scar)f)$", word):
        many = re.sub(r"fe?$", "ves", word)
    elif re.search(r"(s|x|z|ch|sh)$", word):
        many = word + "es"
    elif re.search(r"[^aeiou]y$", word):
        many = word[:-1] + "ies"
    else:
        many = word + "s"
    return head + space + many


def mentions(text: str, vocabulary: Vocabulary) -> list[Mention]:
    """Every mention of an object, in order; the longest phrase wins, case does not matter, whole words only."""
    words = [match.span() for match in _WORD.finditer(text)]
    found: list[tuple[str, int, int]] = []
    first = 0
    while first < len(words):
        # A dictionary lookup per length, not one pattern: Visual Genome has tens of thousands of names.
        for last in range(min(first + vocabulary.longest, len(words)) - 1, first - 1, -1):
            start, end = words[first][0], words[last][1]
            surface = _surface(text[start:end])
            if surface in vocabulary.phrases:
                found.append((surface, start, end))
                first = last
                break
        first += 1
    surfaces = {surface for surface, _, _ in found}
    return [
        Mention(vocabulary.phrases[surface], start, end)
        for surface, start, end in found
        if vocabulary.phrases[surface] and surfaces.isdisjoint(vocabulary.hidden_by.get(surface, ()))
    ]


def truth_of(
    annotations: Annotations, human_captions: Mapping[str, Iterable[str]], vocabulary: Vocabulary
) -> dict[str, frozenset[str]]:
    """The objects on each image by CHAIR's definition: annotated ones, and those that people name in their captions.

    Published COCO figures use both (`relook.data.annotations.read_captions`); annotations alone give higher rates.
    """
    return {
        image: annotated
        | {m.object for caption in human_captions.get(image, ()) for m in mentions(caption, vocabulary)}
        for image, annotated in annotations.objects.items()
    }


@dataclass(frozen=True)
class ChairScore:
    """CHAIR over captions; the tuples hold one count per image, in the order of `images`.

    Captions without any mention add nothing to `chair_i` and, as in the original, count as free of hallucination in
    `chair_s`. So that silence is not taken for sight, `empty` says how many there are, and they lower `recall`. Rates
    are fractions; one whose denominator is zero is 0.0, so read `chair_i` with `empty`.
    """

    images: tuple[str, ...]
    mentioned: tuple[int, ...]  # mentions of objects
    hallucinated: tuple[int, ...]  # of these, of absent ones
    found: tuple[int, ...]  # distinct present objects that were named
    present: tuple[int, ...]  # distinct present objects
    words: tuple[int, ...]  # separated by white space

    @property
    def n(self) -> int:
        return len(self.images)

    @property
    def chair_i(self) -> float:
        """Mentions of absent objects / mentions."""
        return ratio(sum(self.hallucinated), sum(self.mentioned))

    @property
    def chair_s(self) -> float:
        """Captions that mention an absent object / captions."""
        return ratio(sum(count > 0 for count in self.hallucinated), self.n)

    @property
    def recall(self) -> float:
        """Distinct present objects that were named / distinct present objects, summed over images."""
        return ratio(sum(self.found), sum(self.present))

    @property
    def length(self) -> float:
        """Mean number of words."""
        return ratio(sum(self.words), self.n)

    @property
    def empty(self) -> float:
        """Captions without any mention / captions."""
        return ratio(sum(count == 0 for count in self.mentioned), self.n)

    def ratios(self) -> dict[str, Ratio]:
        """Each rate's (numerator, denominator), one per image."""
        return {
            "chair_i": list(zip(self.hallucinated, self.mentioned, strict=True)),
            "chair_s": [(int(count > 0), 1) for count in self.hallucinated],
            "recall": list(zip(self.found, self.present, strict=True)),
            "length": [(count, 1) for count in self.words],
        }

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("chair_i", "chair_s", "recall", "length", "empty", "n")}


def score(captions: Mapping[str, str], truth: Mapping[str, Collection[str]], vocabulary: Vocabulary) -> ChairScore:
    """Count mentions in each image's caption against the objects that are there.

    Raises:
        DataError: images whose objects are not known; they are named.
    """
    unknown = [image for image in captions if image not in truth]
    if unknown:
        raise DataError(f"There are no annotations for {some(unknown)}.", "Give the annotations of the same images.")
    rows = []
    for image, caption in captions.items():
        named, there = [mention.object for mention in mentions(caption, vocabulary)], set(truth[image])
        wrong = sum(name not in there for name in named)
        rows.append((image, len(named), wrong, len(there & set(named)), len(there), len(caption.split())))
    return ChairScore(*(tuple(column) for column in zip(*rows, strict=True))) if rows else ChairScore(*((),) * 6)
