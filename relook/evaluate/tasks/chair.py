"""CHAIR (Rohrbach et al. 2018, arXiv:1809.02156): objects that a caption names but the image does not contain.

The rules follow utils/chair.py of LisaAnne/Hallucination. The original singularizes words with a library. Here a
vocabulary lists singulars and plurals, so nothing has to be installed and a mention keeps its position in the text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

from relook.data.annotations import Annotations
from relook.errors import DataError, preview
from relook.evaluate.statistics import Ratio, safe_ratio

# A hyphen belongs to its word, as in "man-made", and so does an apostrophe, as in "o'clock", that ends no verb or noun.
WORD = r"\w+(?:-\w+|['’](?!(?:s|d|m|t|ll|re|ve)\b)\w+)*"
_WORD = re.compile(WORD)
# Phrases whose words would name an object, though the phrase does not: an animal is no baby and a jet no passenger.
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
_NO_OBJECT = ("baby animal", "adult animal", "baby cub", "adult cub", "home plate", "train track")
_IRREGULAR = {"child": "children", "goose": "geese", "mouse": "mice", "ox": "oxen", "person": "people"} | {
    name: name for name in ("sheep", "people", "cattle", "aircraft", "scissors", "skis", "luggage")
}


@dataclass(frozen=True)
class Mention:
    """Mention of an object in a text, at characters `start` to `end` (exclusive)."""

    object: str
    start: int
    end: int


@dataclass(frozen=True)
class Vocabulary:
    """Mapping of words and phrases to the objects that they name.

    Args:
        phrases: maps a surface form (lower case, single spaces, singular or plural) to its object, or to "" for none.
        hidden_by: surface forms that do not count if one of certain others occurs in the same text.
    """

    phrases: Mapping[str, str]
    hidden_by: Mapping[str, Collection[str]] = field(default_factory=dict)

    @cached_property
    def longest(self) -> int:
        """Return the number of words in the longest phrase."""
        return max((len(_WORD.findall(phrase)) for phrase in self.phrases), default=0)

    @cached_property
    def plurals(self) -> frozenset[str]:
        """Return the phrases that are plurals of other phrases and differ from them."""
        return (
            frozenset(many for phrase in self.phrases for many in plurals(phrase) if many != phrase)
            & self.phrases.keys()
        )

    @staticmethod
    def of(names: Sequence[str], synonyms: Mapping[str, Sequence[str]] | None = None) -> Vocabulary:
        """Build a vocabulary from object names and synonyms; names override synonyms, and both override plurals."""
        phrases = {_surface_form(name): name for name in names}
        for name in names:
            for word in (synonyms or {}).get(name, ()):
                phrases.setdefault(_surface_form(word), name)
        return Vocabulary(_with_plurals(phrases))


def vocabulary_of(annotations: Annotations) -> Vocabulary:
    """Return CHAIR's vocabulary if the categories are COCO's 80, else one built from the annotations."""
    coco = coco_vocabulary()
    if set(annotations.categories) == set(coco.phrases.values()) - {""} and not annotations.synonyms:
        return coco
    return Vocabulary.of(annotations.categories, annotations.synonyms)


@cache
def coco_vocabulary() -> Vocabulary:
    """Load CHAIR's vocabulary of COCO's 80 objects, with its rules for double words, from `coco_synonyms.txt`."""
    text = files("relook.evaluate").joinpath("coco_synonyms.txt").read_text(encoding="utf-8")
    rows = [line.split(", ") for line in text.splitlines() if line and not line.startswith("#")]
    phrases = {word: row[0] for row in rows for word in row}
    phrases |= {f"{age} {animal}": phrases[animal] for animal in _ANIMALS for age in ("baby", "adult")}
    phrases |= {"passenger jet": "airplane", "passenger train": "train", "toilet seat": "toilet"}
    phrases |= dict.fromkeys(_NO_OBJECT, "")
    # "The seat of the toilet" names no chair.
    toilet = frozenset(_with_plurals(dict.fromkeys(("toilet", "toilet seat"), "toilet")))
    return Vocabulary(_with_plurals(phrases), dict.fromkeys(("seat", "seats"), toilet))


def _surface_form(phrase: str) -> str:
    return " ".join(phrase.lower().split())


def _with_plurals(phrases: Mapping[str, str]) -> dict[str, str]:
    regular = {many: name for phrase, name in phrases.items() for many in plurals(phrase)[1:]}
    return regular | {plural(phrase): name for phrase, name in phrases.items()} | dict(phrases)


def plurals(phrase: str) -> list[str]:
    """Return the plural of a noun or phrase, then the regular forms that people also write: persons, buffaloes, mouses.

    The original strips -s and -es from any word, so it counts these too, right or wrong.
    """
    return [
        plural(phrase),
        *([] if phrase.endswith("s") else [phrase + "s"]),
        *([phrase + "es"] * phrase.endswith("o")),
    ]


def plural(phrase: str) -> str:
    """Return the plural of a lower-case noun, or of a phrase with its last word in the plural."""
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
    """Find every mention of an object, in order: whole words only, ignoring case, and the longest phrase wins."""
    words = [match.span() for match in _WORD.finditer(text)]
    found: list[tuple[str, int, int]] = []
    first = 0
    while first < len(words):
        # A dictionary lookup per length, not one pattern: Visual Genome has tens of thousands of names.
        for last in range(min(first + vocabulary.longest, len(words)) - 1, first - 1, -1):
            start, end = words[first][0], words[last][1]
            surface = _surface_form(text[start:end])
            if surface in vocabulary.phrases:
                found.append((surface, start, end))
                first = last
                break
        first += 1
    # Phrases that name no object, or that another phrase in the text hides, are dropped only after matching.
    surfaces = {surface for surface, _, _ in found}
    return [
        Mention(vocabulary.phrases[surface], start, end)
        for surface, start, end in found
        if vocabulary.phrases[surface] and surfaces.isdisjoint(vocabulary.hidden_by.get(surface, ()))
    ]


def truth_of(
    annotations: Annotations, human_captions: Mapping[str, Iterable[str]], vocabulary: Vocabulary
) -> dict[str, frozenset[str]]:
    """Return the objects in each image by CHAIR's definition: annotated ones, and those named in human captions.

    Published COCO figures use both (`relook.data.annotations.read_captions`); annotations alone give higher rates.
    """
    return {
        image: annotated
        | {m.object for caption in human_captions.get(image, ()) for m in mentions(caption, vocabulary)}
        for image, annotated in annotations.objects.items()
    }


@dataclass(frozen=True)
class ChairScore:
    """CHAIR counts over captions; the tuples hold one count per image, in the order of `images`.

    Captions without any mention add nothing to `chair_i` and, as in the original, count as free of hallucination in
    `chair_s`. `empty` reports their share, and they lower `recall`, so that saying nothing is not mistaken for
    accuracy. Rates are fractions; a rate with a zero denominator is None.
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
    def chair_i(self) -> float | None:
        """Return mentions of absent objects / mentions."""
        return safe_ratio(sum(self.hallucinated), sum(self.mentioned))

    @property
    def chair_s(self) -> float | None:
        """Return captions that mention an absent object / captions."""
        return safe_ratio(sum(count > 0 for count in self.hallucinated), self.n)

    @property
    def recall(self) -> float | None:
        """Return distinct present objects that were named / distinct present objects, summed over images."""
        return safe_ratio(sum(self.found), sum(self.present))

    @property
    def length(self) -> float | None:
        """Return the mean number of words."""
        return safe_ratio(sum(self.words), self.n)

    @property
    def empty(self) -> float | None:
        """Return captions without any mention / captions."""
        return safe_ratio(sum(count == 0 for count in self.mentioned), self.n)

    def ratios(self) -> dict[str, Ratio]:
        """Return each rate's (numerator, denominator) pairs, one per image."""
        return {
            "chair_i": list(zip(self.hallucinated, self.mentioned, strict=True)),
            "chair_s": [(int(count > 0), 1) for count in self.hallucinated],
            "recall": list(zip(self.found, self.present, strict=True)),
            "length": [(count, 1) for count in self.words],
        }

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("chair_i", "chair_s", "recall", "length", "empty", "n")}


def score_captions(
    captions: Mapping[str, str], truth: Mapping[str, Collection[str]], vocabulary: Vocabulary
) -> ChairScore:
    """Count mentions in each image's caption against the objects that are present.

    Raises:
        DataError: the objects of some images are not known; the message names them.
    """
    unknown = [image for image in captions if image not in truth]
    if unknown:
        raise DataError(f"There are no annotations for {preview(unknown)}.", "Give the annotations of the same images.")
    rows = []
    for image, caption in captions.items():
        named, there = [mention.object for mention in mentions(caption, vocabulary)], set(truth[image])
        wrong = sum(name not in there for name in named)
        rows.append((image, len(named), wrong, len(there & set(named)), len(there), len(caption.split())))
    return ChairScore(*(tuple(column) for column in zip(*rows, strict=True))) if rows else ChairScore(*((),) * 6)
