"""POPE (Li et al. 2023, arXiv:2305.10355): yes/no questions about objects, and the official way of scoring them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relook.data.samples import Question
from relook.errors import DataError, some
from relook.files import read_records


def question_text(name: str) -> str:
    """POPE's question about an object."""
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"


def read_questions(path: Path, image_root: Path) -> list[Question]:
    """Read a question file: JSON lines or a JSON array of `{"question_id", "image", "text", "label"}`.

    As in the official program, any label but "no" counts as yes.

    Raises:
        DataError: a field is missing, an id stands twice, or the file has no question.
    """
    questions = []
    for number, record in enumerate(read_records(path), 1):
        missing = [key for key in ("question_id", "image", "text", "label") if key not in record]
        if missing:
            raise DataError(f"{path}: record {number} has no {', '.join(missing)}.", "Give a POPE question file.")
        label = "no" if record["label"] == "no" else "yes"
        questions.append(
            Question(str(record["question_id"]), image_root / str(record["image"]), str(record["text"]), label)
        )
    if not questions:
        raise DataError(f"{path} holds no question.", "Give a POPE question file.")
    _refuse_twice([question.id for question in questions], path)
    return questions


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Read an answer file: records with `question_id`, and `answer` (POPE's key) or `text` (LLaVA's)."""
    records = read_records(path)
    for number, record in enumerate(records, 1):
        if "question_id" not in record or not ("answer" in record or "text" in record):
            raise DataError(
                f"{path}: record {number} needs question_id, and answer or text.", "Give POPE's or LLaVA's layout."
            )
    _refuse_twice([str(record["question_id"]) for record in records], path)
    return records


def _refuse_twice(ids: Sequence[str], path: Path) -> None:
    twice = [id for id, count in Counter(ids).items() if count > 1]
    if twice:
        raise DataError(f"{path}: question_id {some(twice)} stands more than once.", "Remove the duplicates.")


def official_parse(answer: str) -> bool:
    """Whether POPE's evaluate.py takes an answer for yes.

    It looks at the text before the first full stop, removes commas, splits at spaces, and takes the answer for no when
    one of the words is "No", "not" or "no"; everything else is yes.
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


@dataclass(frozen=True)
class PopeScore:
    """Confusion counts with "yes" as positive, and the rates of evaluate.py as fractions.

    A rate whose denominator is zero is 0.0, where the official program stops with ZeroDivisionError.
    """

    tp: int
    fp: int
    tn: int
    fn: int
    parser: str = "official"

    @property
    def n(self) -> int:
        return self.tp + self.fp + self.tn + self.fn

    def to_json(self) -> dict[str, Any]:
        precision, recall = _ratio(self.tp, self.tp + self.fp), _ratio(self.tp, self.tp + self.fn)
        counts = asdict(self)
        parser = counts.pop("parser")
        return {
            **counts,
            "accuracy": _ratio(self.tp + self.tn, self.n),
            "precision": precision,
            "recall": recall,
            "f1": _ratio(2 * precision * recall, precision + recall),
            "yes_ratio": _ratio(self.tp + self.fp, self.n),
            "n": self.n,
            "parser": parser,
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


@dataclass(frozen=True)
class PopeRow:
    """One answered question: `prediction` and `label` are True for yes."""

    question: Question
    answer: str
    prediction: bool
    label: bool


def match(questions: Sequence[Question], answers: Sequence[Mapping[str, Any]]) -> list[PopeRow]:
    """Pair answers with questions by id; their order does not matter. Where an answer repeats its question's text, the
    texts must agree.

    Raises:
        DataError: questions without an answer, answers without a question, or texts that differ; the ids are named.
    """
    by_id = {str(record["question_id"]): record for record in answers}
    ids = [question.id for question in questions]
    missing = [id for id in ids if id not in by_id]
    foreign = sorted(by_id.keys() - set(ids))
    other_text = [
        q.id for q in questions if q.id in by_id and by_id[q.id].get("question", by_id[q.id].get("prompt", q.text)) != q.text
    ]  # fmt: skip
    problems = [
        f"{len(found)} {what} ({some(found)})"
        for found, what in (
            (missing, "questions have no answer"),
            (foreign, "answers have no question"),
            (other_text, "answers are to another question text"),
        )
        if found
    ]
    if problems:
        raise DataError(f"Questions and answers do not match: {'; '.join(problems)}.", "Give the two files of one run.")
    rows = []
    for question in questions:
        record = by_id[question.id]
        text = str(record["answer"] if "answer" in record else record["text"])
        rows.append(PopeRow(question, text, official_parse(text), question.label == "yes"))
    return rows


def score(questions: Sequence[Question], answers: Sequence[Mapping[str, Any]]) -> PopeScore:
    """Score answers by the official rule; see `match` for the errors."""
    counts = Counter((row.prediction, row.label) for row in match(questions, answers))
    return PopeScore(counts[True, True], counts[True, False], counts[False, False], counts[False, True])


def build_splits(
    objects_by_image: Mapping[str, Collection[str]], categories: Sequence[str], seed: int, positives: int = 3
) -> dict[str, list[dict[str, Any]]]:
    """Build the random, popular and adversarial question records from annotations, as POPE does from COCO's.

    Of each image with at least `positives` objects, that many are asked, each followed by an absent one: drawn at
    random, the most frequent one overall, or the one that most often comes together with the object just asked. The
    yes-questions are the same in the three splits, and no object is asked twice of an image.
    """
    frequency = Counter(name for present in objects_by_image.values() for name in set(present))
    together: dict[str, Counter[str]] = {name: Counter() for name in categories}
    for present in objects_by_image.values():
        for name in set(present):
            together[name].update(set(present) - {name})
    by_frequency = sorted(categories, key=lambda name: (-frequency[name], name))
    companions = {n: sorted(categories, key=lambda other: (-together[n][other], other)) for n in categories}
    rng = random.Random(f"pope/{seed}")
    splits: dict[str, list[dict[str, Any]]] = {"random": [], "popular": [], "adversarial": []}
    for image, objects in objects_by_image.items():
        present = sorted(set(objects))
        if len(present) < positives or len(categories) - len(present) < positives:
            continue
        asked = rng.sample(present, positives)
        for split, records in splits.items():
            used = set(present)
            for name in asked:
                order = {"popular": by_frequency, "adversarial": companions[name]}.get(split)
                absent = next(o for o in order or rng.sample(list(categories), len(categories)) if o not in used)
                used.add(absent)
                for object_name, label in ((name, "yes"), (absent, "no")):
                    text = question_text(object_name)
                    records.append({"question_id": len(records) + 1, "image": image, "text": text, "label": label})
    return splits
