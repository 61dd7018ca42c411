"""AMBER (Wang et al. 2023, arXiv:2311.07397): what a description makes up, and yes/no questions, without a judge.

The arithmetic is that of junyangwang0410/AMBER inference.py. It finds nouns by a tagger and near synonyms by word
vectors; here words are looked up in the benchmark's own list, and near synonyms in a file: docs/shr-amber-mmhal.md says
what differs. Rates are fractions, not rounded, and no small numbers are added to denominators.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from relook.data.samples import Question
from relook.errors import DataError, some
from relook.evaluate.statistics import Columns, Interval, by_image, paired_interval, ratio, ratio_interval
from relook.evaluate.tasks.chair import plural
from relook.files import file_hash, read_object, read_text, some_records

SOURCE = "It comes from github.com/junyangwang0410/AMBER; see docs/shr-amber-mmhal.md."
PARSER = "first word"
GENERATIVE = "generative"
_WORD = re.compile(r"\w+(?:-\w+)*")
# The original looks up lemmas in WordNet, which leads these plurals to another word or nowhere ("men" is a noun of its
# own there, "leaves" belongs to "leaf"), and these words of its list to their singulars: it never counts them.
_NOT_COUNTED = {"men", "leaves", "vases", "sunglasses", "slippers", "chopsticks", "earrings"}
_NOT_COUNTED |= {"streetlamps", "bedsheets", "paragliders", "kiwifruits", "cooktops", "ebooks", "e-books", "sanitizers"}
_PLURALS = {"potato": "potatoes", "tomato": "tomatoes"}
KINDS = {
    "existence": ("discriminative-hallucination",),
    "attribute": tuple(f"discriminative-attribute-{kind}" for kind in ("state", "number", "action")),
    "state": ("discriminative-attribute-state",),
    "number": ("discriminative-attribute-number",),
    "action": ("discriminative-attribute-action",),
}
"""Kinds of question that have scores of their own; all other kinds are relations."""


@dataclass(frozen=True)
class Lists:
    """The benchmark's word lists.

    Args:
        association: a word to other words for it, or for its parts.
        safe: words that are never hallucinations.
        near: pairs of words that count as the same.
    """

    association: Mapping[str, Sequence[str]]
    safe: Collection[str]
    near: Collection[frozenset[str]] = ()

    @cached_property
    def forms(self) -> dict[str, str]:
        """Surface form, case counts, to a word of the list."""
        listed = {*self.association, *(word for words in self.association.values() for word in words)}
        forms = {_PLURALS.get(word, plural(word)): word for word in sorted(listed)} | {word: word for word in listed}
        return {form: word for form, word in forms.items() if form not in _NOT_COUNTED}

    def nouns(self, text: str) -> list[str]:
        """The listed words that a text says, in order."""
        return [self.forms[word] for word in _WORD.findall(text) if word in self.forms]

    def close(self, first: str, second: str) -> bool:
        return first == second or frozenset((first, second)) in self.near


def place(data: Path, name: str) -> Path:
    """One of the benchmark's files, `data/amber/data/...` as in its repository."""
    path = data / "amber" / "data" / name
    if not path.exists():
        raise DataError(f"{path} does not exist.", SOURCE)
    return path


def read_lists(data: Path) -> Lists:
    """The word lists below `data/amber/data`; `near_synonyms.txt` (two words a line) is optional."""
    near = data / "amber" / "data" / "near_synonyms.txt"
    pairs = [line.split() for line in read_text(near).splitlines() if line.strip()] if near.exists() else []
    odd = [" ".join(pair) for pair in pairs if len(pair) != 2]
    if odd:
        raise DataError(f"{near} has lines that are not two words: {some(odd)}.", "Give two words a line.")
    safe = read_text(place(data, "safe_words.txt")).split("\n")
    return Lists(read_object(place(data, "relation.json")), frozenset(safe), frozenset(map(frozenset, pairs)))


def questions(data: Path) -> tuple[list[Question], list[Question]]:
    """The generative and the discriminative questions of `query/query_all.json`, with images in `data/amber/image`.

    Raises:
        DataError: a file is missing or empty, a record lacks a field, or a question has no annotation.
    """
    path, annotations = place(data, "query/query_all.json"), read_annotations(data)
    try:
        found = [
            Question(str(record["id"]), data / "amber" / "image" / str(record["image"]), str(record["query"]))
            for record in some_records(path, SOURCE)
        ]
    except KeyError as error:
        raise DataError(f"{path} has a record without {error}.", SOURCE) from None
    unknown = [question.id for question in found if question.id not in annotations]
    if unknown:
        raise DataError(f"AMBER's annotations have no {some(unknown)}.", "Give queries and annotations of one version.")
    kinds = [annotations[question.id]["type"] == GENERATIVE for question in found]
    described = [question for question, generative in zip(found, kinds, strict=True) if generative]
    return described, [question for question, generative in zip(found, kinds, strict=True) if not generative]


def read_annotations(data: Path) -> dict[str, dict[str, Any]]:
    """What is true of each question, by its id."""
    path = place(data, "annotations.json")
    try:
        entries = {str(record["id"]): record for record in some_records(path, SOURCE)}
        for entry in entries.values():
            needed = ("truth", "hallu") if entry["type"] == GENERATIVE else ("truth",)
            for key in needed:
                entry[key]
    except KeyError as error:
        raise DataError(f"{path} has a record without {error}.", SOURCE) from None
    return entries


def yes_or_no(answer: str) -> str:
    """ "yes" or "no" by an answer's first word, whatever its case; "" where it is another word.

    The original wants answers that are exactly "Yes" or "No", and so does this to what is before punctuation.
    """
    first = re.match(r"\W*(\w+)", answer)
    word = first[1].lower() if first else ""
    return word if word in ("yes", "no") else ""


@dataclass(frozen=True)
class Made:
    """What one description says: words of the list, of these made up, and truths and temptations that it covers."""

    nouns: int
    made_up: int
    covered: int
    truths: int
    tempted: int
    temptations: int


def judge_description(text: str, truth: Sequence[str], hallu: Sequence[str], lists: Lists) -> Made:
    """Count a description's words against what is on the image and what models tend to make up there.

    A word marks the first entry that it is another word for, an associated word before the entry itself. As in the
    original, a word that is no truth may mark a temptation twice over: as itself, and as the first that it is close to.
    """
    covered, tempted = _Marks(truth, lists), _Marks(hallu, lists)
    nouns, made_up = lists.nouns(text), 0
    for noun in nouns:
        if noun in lists.safe or covered.mark(noun, exact=True):
            continue
        tempted.mark(noun, exact=True)
        tempted.mark(noun)
        made_up += not covered.mark(noun)
    return Made(len(nouns), made_up, sum(covered.marked), len(truth), sum(tempted.marked), len(hallu))


class _Marks:
    """Which of some annotated words a description has covered."""

    def __init__(self, words: Sequence[str], lists: Lists) -> None:
        self.marked, self.lists = [False] * len(words), lists
        associated = [(other, i) for i, word in enumerate(words) for other in lists.association.get(word, ())]
        self.ways = associated + [(word, i) for i, word in enumerate(words)]

    def mark(self, noun: str, exact: bool = False) -> bool:
        """Mark the first word that the noun is, or is close to; whether there is one."""
        for word, i in self.ways:
            if noun == word or (not exact and self.lists.close(noun, word)):
                self.marked[i] = True
                return True
        return False


def score(data: Path, asked: Sequence[Question], responses: Mapping[str, str]) -> dict[str, Any]:
    """Generative and discriminative scores, and the AMBER score, with 95 % intervals over images.

    "No" is the positive answer, as in the original. An answer that is neither yes nor no is wrong, and is counted in
    `neither`. Scores of a part that was not asked are left out.
    """
    annotations, lists = read_annotations(data), read_lists(data)
    images = list(dict.fromkeys(question.image.name for question in asked))
    made: dict[str, Made] = {}
    answers: list[tuple[str, str, bool, str]] = []  # image, kind, whether "no" is true, what was said
    for question in asked:
        entry, said = annotations[question.id], responses[question.id]
        if entry["type"] == GENERATIVE:
            made[question.image.name] = judge_description(said, entry["truth"], entry["hallu"], lists)
        else:
            answers.append((question.image.name, entry["type"], entry["truth"] == "no", yes_or_no(said)))
    result: dict[str, Any] = {"near_synonyms": _near_hash(data), "parser": PARSER, "images": len(images)}
    if made:
        result["generative"] = generative(list(made.values()))
    if answers:
        known = {kind for kinds in KINDS.values() for kind in kinds}
        result["discriminative"] = discriminative(answers, images)
        for name, kinds in KINDS.items():
            result[name] = discriminative([a for a in answers if a[1] in kinds], images)
        result["relation"] = discriminative([a for a in answers if a[1] not in known], images)
    if made and answers:
        low, high = _f1_minus_chair(made, answers, images)
        result["amber_score"] = (1 - result["generative"]["chair"] + result["discriminative"]["f1"]) / 2
        result["amber_score_ci"] = [(1 + low) / 2, (1 + high) / 2]
    return result


def generative(rows: Sequence[Made]) -> dict[str, Any]:
    """CHAIR: made-up words / listed words. Cover: truths said / truths. Hal: descriptions with a made-up word.
    Cog: temptations said / temptations."""
    pairs = {
        "chair": ([r.made_up for r in rows], [r.nouns for r in rows]),
        "cover": ([r.covered for r in rows], [r.truths for r in rows]),
        "hal": ([int(r.made_up > 0) for r in rows], [1] * len(rows)),
        "cog": ([r.tempted for r in rows], [r.temptations for r in rows]),
    }
    rates = {name: ratio(sum(top), sum(bottom)) for name, (top, bottom) in pairs.items()}
    return rates | {f"{n}_ci": ratio_interval(*pair) for n, pair in pairs.items()} | {"n": len(rows)}


def discriminative(answers: Sequence[tuple[str, str, bool, str]], images: Sequence[str]) -> dict[str, Any]:
    """Accuracy, and precision, recall and F1 of "no"."""
    right = [(said == "no") == truth and said != "" for _, _, truth, said in answers]
    hits = [said == "no" and truth for _, _, truth, said in answers]
    precision = ratio(sum(hits), sum(said == "no" for *_, said in answers))
    recall = ratio(sum(hits), sum(truth for _, _, truth, _ in answers))
    per_image = by_image(((a[0], int(r), 1) for a, r in zip(answers, right, strict=True)), images)
    return {
        "accuracy": ratio(sum(right), len(right)),
        "accuracy_ci": ratio_interval(*per_image),
        "precision": precision,
        "recall": recall,
        "f1": ratio(2 * precision * recall, precision + recall),
        "f1_ci": ratio_interval(*_f1_counts(answers, images)),
        "neither": sum(said == "" for *_, said in answers),
        "n": len(answers),
    }


def _f1_counts(answers: Sequence[tuple[str, str, bool, str]], images: Sequence[str]) -> Columns:
    """F1 as one ratio: twice the hits / (said "no" + true "no"), by image."""
    rows = ((image, 2 * (said == "no" and truth), (said == "no") + truth) for image, _, truth, said in answers)
    return by_image(rows, images)


def _f1_minus_chair(
    made: Mapping[str, Made], answers: Sequence[tuple[str, str, bool, str]], images: Sequence[str]
) -> Interval:
    """The interval of F1 - CHAIR, each resample taking the same images for both."""
    chair = by_image(((image, m.made_up, m.nouns) for image, m in made.items()), images)
    return paired_interval(chair, _f1_counts(answers, images))


def _near_hash(data: Path) -> str:
    path = data / "amber" / "data" / "near_synonyms.txt"
    return file_hash(path) if path.exists() else "none"
