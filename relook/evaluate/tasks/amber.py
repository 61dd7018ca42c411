"""AMBER (Wang et al. 2023, arXiv:2311.07397): hallucinations in descriptions, and yes/no questions, without a judge.

The arithmetic follows inference.py of junyangwang0410/AMBER. The original finds nouns with a tagger and near synonyms
with word vectors. Here `amber_nouns` has rules for the words of the benchmark's own list, and a file lists the near
synonyms; docs/shr-amber-mmhal.md documents the differences. Rates are unrounded fractions, and no epsilon is added to
denominators.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relook.data.paths import amber_file, amber_images, resolve_extension
from relook.data.samples import Question
from relook.errors import DataError, preview
from relook.evaluate.benchmark import YES_NO_MAX_TOKENS, Answers, Benchmark, Questions, answers_provenance
from relook.evaluate.statistics import Columns, Interval, paired_interval, ratio_interval, safe_ratio, sum_by_image
from relook.evaluate.tasks.amber_nouns import is_noun, tokens
from relook.evaluate.tasks.chair import plurals
from relook.files import file_hash, read_json_object, read_published_records, read_text

if TYPE_CHECKING:
    from relook.evaluate.judge import Judge

SOURCE = "It comes from github.com/junyangwang0410/AMBER; see docs/shr-amber-mmhal.md."
PARSER = "first word"
GENERATIVE = "generative"
# The original looks up lemmas in WordNet, which leads these plurals to another word or nowhere ("men" is a noun of its
# own there, "leaves" belongs to "leaf"), and these words of its list to their singulars: it never counts them.
_NOT_COUNTED = {"men", "leaves", "vases", "sunglasses", "slippers", "chopsticks", "earrings"}
_NOT_COUNTED |= {"streetlamps", "bedsheets", "paragliders", "kiwifruits", "cooktops", "ebooks", "e-books", "sanitizers"}
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
    """Word lists of the benchmark.

    Args:
        association: maps a word to other words for it, or for its parts.
        safe: words that are never hallucinations.
        near: pairs of words that count as the same.
    """

    association: Mapping[str, Sequence[str]]
    safe: Collection[str]
    near: Collection[frozenset[str]] = ()

    @cached_property
    def forms(self) -> dict[str, str]:
        """Map each case-sensitive surface form to a word of the list."""
        # Listed words override plurals of others, and where two words share a plural the last in order has it.
        listed = {*self.association, *(word for words in self.association.values() for word in words)}
        forms = {form: word for word in sorted(listed) for form in plurals(word)} | {word: word for word in listed}
        return {form: word for form, word in forms.items() if form not in _NOT_COUNTED}

    def nouns(self, text: str) -> list[str]:
        """Return the listed words that a text uses as nouns, in order."""
        words = tokens(text)
        listed = [(i, self.forms[word]) for i, word in enumerate(words) if word in self.forms]
        return [noun for i, noun in listed if is_noun(words, i, noun)]

    def close(self, first: str, second: str) -> bool:
        return first == second or frozenset((first, second)) in self.near


def required_amber_file(data: Path, name: str) -> Path:
    """Return the path of a benchmark file that must exist, `data/amber/data/...` as in its repository."""
    path = amber_file(data, name)
    if not path.exists():
        raise DataError(f"{path} does not exist.", SOURCE)
    return path


def read_lists(data: Path) -> Lists:
    """Read the word lists in `data/amber/data`; `near_synonyms.txt` (two words per line) is optional."""
    near = amber_file(data, "near_synonyms.txt")
    pairs = [line.split() for line in read_text(near).splitlines() if line.strip()] if near.exists() else []
    odd = [" ".join(pair) for pair in pairs if len(pair) != 2]
    if odd:
        raise DataError(f"{near} has lines that are not two words: {preview(odd)}.", "Give two words a line.")
    safe = read_text(required_amber_file(data, "safe_words.txt")).split("\n")
    return Lists(
        read_json_object(required_amber_file(data, "relation.json")), frozenset(safe), frozenset(map(frozenset, pairs))
    )


def amber_questions(data: Path) -> tuple[list[Question], list[Question]]:
    """Read the generative and discriminative questions of `query/query_all.json`; images are in `data/amber/image`.

    Raises:
        DataError: a file is missing or empty, a record lacks a field, or a question has no annotation.
    """
    path, annotations = required_amber_file(data, "query/query_all.json"), read_annotations(data)
    images = amber_images(data)
    try:
        questions = [
            Question(str(record["id"]), resolve_extension(images / str(record["image"])), str(record["query"]))
            for record in read_published_records(path, SOURCE)
        ]
    except KeyError as error:
        raise DataError(f"{path} has a record without {error}.", SOURCE) from None
    unknown = [question.id for question in questions if question.id not in annotations]
    if unknown:
        raise DataError(
            f"AMBER's annotations have no {preview(unknown)}.", "Give queries and annotations of one version."
        )
    # The query file mixes descriptions and yes/no questions; only the annotations tell them apart.
    kinds = [annotations[question.id]["type"] == GENERATIVE for question in questions]
    described = [question for question, generative in zip(questions, kinds, strict=True) if generative]
    return described, [question for question, generative in zip(questions, kinds, strict=True) if not generative]


def read_annotations(data: Path) -> dict[str, dict[str, Any]]:
    """Read the ground truth of each question, by question id."""
    path = required_amber_file(data, "annotations.json")
    try:
        entries = {str(record["id"]): record for record in read_published_records(path, SOURCE)}
        for entry in entries.values():
            # Look up the fields once here, so that a missing one shows before anything is generated.
            needed = ("truth", "hallu") if entry["type"] == GENERATIVE else ("truth",)
            for key in needed:
                entry[key]
    except KeyError as error:
        raise DataError(f"{path} has a record without {error}.", SOURCE) from None
    return entries


def yes_or_no(answer: str) -> str:
    """Return "yes" or "no" by an answer's first word, in any case; "" for any other word, and for "yes and no".

    The original requires exactly "Yes" or "No"; here the first word must be one, whatever punctuation follows.
    """
    first = re.match(r"\W*(\w+)\b(?!\W*(?:and|or|/)\W*(?:yes|no)\b)", answer, re.IGNORECASE)
    # The pattern's lookahead rejects "yes and no" and "yes/no", which answer nothing.
    word = first[1].lower() if first else ""
    return word if word in ("yes", "no") else ""


@dataclass(frozen=True)
class DescriptionCounts:
    """Counts for one description: listed words, hallucinated ones, and the truths and temptations covered."""

    nouns: int
    made_up: int
    covered: int
    truths: int
    tempted: int
    temptations: int


def judge_description(text: str, truth: Sequence[str], hallu: Sequence[str], lists: Lists) -> DescriptionCounts:
    """Count a description's words against the objects in the image and those that models tend to hallucinate there.

    A word marks the first entry that it is a synonym of; associated words are tried before the entries themselves. As
    in the original, a word that is not a truth may mark two temptations: its own entry, and the first it is close to.
    """
    covered, tempted = _Marks(truth, lists), _Marks(hallu, lists)
    nouns, made_up = lists.nouns(text), 0  # a word that is repeated counts each time
    for noun in nouns:
        # An exact truth is settled first, so that it cannot mark a temptation.
        if noun in lists.safe or covered.mark(noun, exact=True):
            continue
        tempted.mark(noun, exact=True)
        tempted.mark(noun)
        made_up += not covered.mark(noun)
    return DescriptionCounts(len(nouns), made_up, sum(covered.marked), len(truth), sum(tempted.marked), len(hallu))


class _Marks:
    """Record of which annotated words a description has covered."""

    def __init__(self, words: Sequence[str], lists: Lists) -> None:
        self.marked, self.lists = [False] * len(words), lists
        # The order decides which annotated word a noun marks: associated words first, as in the original.
        associated = [(other, i) for i, word in enumerate(words) for other in lists.association.get(word, ())]
        self.ways = associated + [(word, i) for i, word in enumerate(words)]

    def mark(self, noun: str, exact: bool = False) -> bool:
        """Mark the first word that the noun equals, or is close to, and return True if there is one."""
        for word, i in self.ways:
            if noun == word or (not exact and self.lists.close(noun, word)):
                self.marked[i] = True
                return True
        return False


def score_amber(data: Path, questions: Sequence[Question], responses: Mapping[str, str]) -> dict[str, Any]:
    """Compute the generative and discriminative scores and the AMBER score, with 95 % intervals over images.

    "No" is the positive class, as in the original. An answer that is neither yes nor no is wrong, and is counted in
    `neither`. Scores of a part that was not asked are omitted; a rate with a zero denominator is None.
    """
    annotations, lists = read_annotations(data), read_lists(data)
    images = list(dict.fromkeys(question.image.name for question in questions))
    descriptions: dict[str, DescriptionCounts] = {}
    answers: list[tuple[str, str, bool, str]] = []  # image, kind, whether "no" is true, answer
    for question in questions:
        entry, response = annotations[question.id], responses[question.id]
        if entry["type"] == GENERATIVE:
            descriptions[question.image.name] = judge_description(response, entry["truth"], entry["hallu"], lists)
        else:
            answers.append((question.image.name, entry["type"], entry["truth"] == "no", yes_or_no(response)))
    result: dict[str, Any] = {"near_synonyms": _near_hash(data), "parser": PARSER, "images": len(images)}
    if descriptions:
        result["generative"] = generative(list(descriptions.values()))
    if answers:
        scored_kinds = {kind for kinds in KINDS.values() for kind in kinds}
        result["discriminative"] = discriminative(answers, images)
        for name, kinds in KINDS.items():
            result[name] = discriminative([a for a in answers if a[1] in kinds], images)
        result["relation"] = discriminative([a for a in answers if a[1] not in scored_kinds], images)
    if descriptions and answers:
        chair, f1 = result["generative"]["chair"], result["discriminative"]["f1"]
        # The score is (1 - CHAIR + F1) / 2, so its interval is that of F1 - CHAIR, moved and halved.
        difference = _f1_minus_chair(descriptions, answers, images)
        result["amber_score"] = None if chair is None or f1 is None else (1 - chair + f1) / 2
        result["amber_score_ci"] = difference and [(1 + end) / 2 for end in difference]
    return result


def generative(rows: Sequence[DescriptionCounts]) -> dict[str, Any]:
    """Compute the rates of the generative part, with 95 % intervals over images.

    CHAIR: hallucinated words / listed words. Cover: truths mentioned / truths. Hal: descriptions with a hallucinated
    word / descriptions. Cog: temptations mentioned / temptations.
    """
    pairs = {
        "chair": ([r.made_up for r in rows], [r.nouns for r in rows]),
        "cover": ([r.covered for r in rows], [r.truths for r in rows]),
        "hal": ([int(r.made_up > 0) for r in rows], [1] * len(rows)),
        "cog": ([r.tempted for r in rows], [r.temptations for r in rows]),
    }
    # Ratios of sums over images, not means of ratios: a long description weighs more than a short one.
    rates = {name: safe_ratio(sum(top), sum(bottom)) for name, (top, bottom) in pairs.items()}
    return rates | {f"{n}_ci": ratio_interval(*pair) for n, pair in pairs.items()} | {"n": len(rows)}


def discriminative(answers: Sequence[tuple[str, str, bool, str]], images: Sequence[str]) -> dict[str, Any]:
    """Compute accuracy, and precision, recall and F1 with "no" as the positive class."""
    # An answer that is neither yes nor no is never right, also if "no" is not true.
    right = [(answer == "no") == truth and answer != "" for _, _, truth, answer in answers]
    hits = [answer == "no" and truth for _, _, truth, answer in answers]
    said_no, truly_no = sum(answer == "no" for *_, answer in answers), sum(truth for _, _, truth, _ in answers)
    per_image = sum_by_image(((a[0], int(r), 1) for a, r in zip(answers, right, strict=True)), images)
    return {
        "accuracy": safe_ratio(sum(right), len(right)),
        "accuracy_ci": ratio_interval(*per_image),
        "precision": safe_ratio(sum(hits), said_no),
        "recall": safe_ratio(sum(hits), truly_no),
        "f1": safe_ratio(2 * sum(hits), said_no + truly_no),
        "f1_ci": ratio_interval(*_f1_counts(answers, images)),
        "neither": sum(answer == "" for *_, answer in answers),
        "n": len(answers),
    }


def _f1_counts(answers: Sequence[tuple[str, str, bool, str]], images: Sequence[str]) -> Columns:
    """Return F1 as one ratio per image: twice the hits / (answered "no" + truly "no")."""
    rows = ((image, 2 * (answer == "no" and truth), (answer == "no") + truth) for image, _, truth, answer in answers)
    return sum_by_image(rows, images)


def _f1_minus_chair(
    descriptions: Mapping[str, DescriptionCounts], answers: Sequence[tuple[str, str, bool, str]], images: Sequence[str]
) -> Interval | None:
    """Compute the interval of F1 - CHAIR; each resample takes the same images for both."""
    chair = sum_by_image(((image, m.made_up, m.nouns) for image, m in descriptions.items()), images)
    return paired_interval(chair, _f1_counts(answers, images))


def _near_hash(data: Path) -> str:
    path = data / "amber" / "data" / "near_synonyms.txt"
    return file_hash(path) if path.exists() else "none"


def _results(data: Path, questions: Questions, answers: Answers, location: Path, judge: Judge | None) -> dict[str, Any]:
    answered = [question for stem in answers for question in questions[stem]]
    result = score_amber(data, answered, BENCHMARK.texts(answers))
    sources = answers_provenance(location, questions, answers)
    generation = sources["provenance"].get("generation", {})
    if longest := generation.get("max_new_tokens"):  # `relook eval` caps one-word answers at fewer tokens
        generation["max_new_tokens"] = {
            stem: min(longest, YES_NO_MAX_TOKENS) if stem in BENCHMARK.yes_or_no else longest for stem in answers
        }
    return result | sources


BENCHMARK = Benchmark(
    "AMBER",
    questions=lambda data: dict(zip(("amber_generative", "amber_discriminative"), amber_questions(data), strict=True)),
    score=_results,
    id_field="id",
    text_field="response",
    question_field="query",
    numeric_ids=True,
    yes_or_no=["amber_discriminative"],
)
