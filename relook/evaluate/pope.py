"""POPE (Li et al. 2023, arXiv:2305.10355): yes/no questions about objects, and the official way of scoring them.

The official programs are RUCAIBox/POPE evaluate.py (parse and score), main.py and utils.py (building the splits).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relook.data.samples import Question
from relook.errors import DataError, some
from relook.files import read_records

SPLITS = ("random", "popular", "adversarial")
PARSER = "official"


def question_text(name: str) -> str:
    """POPE's question about an object."""
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"


def read_questions(path: Path, image_root: Path) -> list[Question]:
    """Read a question file: JSON lines or a JSON array of `{"question_id", "image", "text", "label"?}`.

    As in the official program, any label but "no" counts as yes. LLaVA's question files have no label: theirs is empty.

    Raises:
        DataError: a field is missing, an id stands twice, or the file has no question.
    """
    questions = []
    for number, record in enumerate(read_records(path), 1):
        missing = [key for key in ("question_id", "image", "text") if key not in record]
        if missing:
            raise DataError(f"{path}: record {number} has no {', '.join(missing)}.", "Give a POPE question file.")
        label = ("no" if record["label"] == "no" else "yes") if "label" in record else ""
        questions.append(
            Question(str(record["question_id"]), image_root / str(record["image"]), str(record["text"]), label)
        )
    if not questions:
        raise DataError(f"{path} holds no question.", "Give a POPE question file.")
    _refuse_twice((question.id for question in questions), str(path))
    return questions


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Read an answer file: records with `question_id`, and `answer` (POPE's key) or `text` (LLaVA's), in any order.

    Raises:
        DataError: a record has no id or no text, or an id stands twice.
    """
    records = read_records(path)
    for number, record in enumerate(records, 1):
        if "question_id" not in record or not isinstance(_answer(record), str):
            raise DataError(
                f"{path}: record {number} needs question_id, and answer or text.", "Give POPE's or LLaVA's layout."
            )
    _refuse_twice((str(record["question_id"]) for record in records), str(path))
    return records


def _answer(record: Mapping[str, Any]) -> Any:
    return record["answer"] if "answer" in record else record.get("text")


def _refuse_twice(ids: Iterable[str], where: str) -> None:
    twice = [id for id, count in Counter(ids).items() if count > 1]
    if twice:
        raise DataError(f"{where}: question_id {some(twice)} stands more than once.", "Remove the duplicates.")


def official_parse(answer: str) -> bool:
    """Whether POPE's evaluate.py takes an answer for yes.

    It looks at the text before the first full stop, removes commas, splits at spaces, and takes the answer for no when
    one of the words is "No", "not" or "no". Everything else is yes: also "", "NO", "No!" and "No</s>".
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
    parser: str = PARSER

    @property
    def n(self) -> int:
        return self.tp + self.fp + self.tn + self.fn

    @property
    def accuracy(self) -> float:
        return _ratio(self.tp + self.tn, self.n)

    @property
    def precision(self) -> float:
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        return _ratio(2 * self.precision * self.recall, self.precision + self.recall)

    @property
    def yes_ratio(self) -> float:
        return _ratio(self.tp + self.fp, self.n)

    def to_json(self) -> dict[str, Any]:
        rates = {name: getattr(self, name) for name in ("accuracy", "precision", "recall", "f1", "yes_ratio", "n")}
        return asdict(self) | rates


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


@dataclass(frozen=True)
class PopeRow:
    """One answered question: `prediction` and `label` are True for yes."""

    question: Question
    answer: str
    prediction: bool
    label: bool

    @property
    def image(self) -> str:
        """The image's file name: rows are resampled by image."""
        return self.question.image.name

    @property
    def right(self) -> bool:
        return self.prediction == self.label


def match(questions: Sequence[Question], answers: Sequence[Mapping[str, Any]]) -> list[PopeRow]:
    """Pair answers with questions by id; their order does not matter. Rows are in the order of the questions.

    Where an answer repeats its question (`question`, or LLaVA's `prompt`), the texts must agree.

    Raises:
        DataError: questions without an answer or a label, answers without a question, ids that stand twice, or texts
            that differ; the ids are named.
    """
    _refuse_twice((question.id for question in questions), "Questions")
    _refuse_twice((str(record["question_id"]) for record in answers), "Answers")
    by_id = {str(record["question_id"]): record for record in answers}
    pairs = [(question, by_id[question.id]) for question in questions if question.id in by_id]
    faults = {
        "questions have no answer": [q.id for q in questions if q.id not in by_id],
        "answers have no question": sorted(by_id.keys() - {q.id for q in questions}),
        "answers are to another question text": [
            question.id
            for question, record in pairs
            if record.get("question", record.get("prompt", question.text)) != question.text
        ],
        "questions have no label": [q.id for q in questions if not q.label],
    }
    problems = [f"{len(ids)} {what} ({some(ids)})" for what, ids in faults.items() if ids]
    if problems:
        raise DataError(f"Questions and answers do not match: {'; '.join(problems)}.", "Give the two files of one run.")
    return [PopeRow(q, _answer(record), official_parse(_answer(record)), q.label == "yes") for q, record in pairs]


def score(questions: Sequence[Question], answers: Sequence[Mapping[str, Any]]) -> PopeScore:
    """Score answers by the official rule; see `match` for the errors."""
    counts = Counter((row.prediction, row.label) for row in match(questions, answers))
    return PopeScore(counts[True, True], counts[True, False], counts[False, False], counts[False, True])


def build_splits(
    objects_by_image: Mapping[str, Collection[str]], categories: Sequence[str], seed: int, positives: int = 3
) -> dict[str, list[dict[str, Any]]]:
    """Build the random, popular and adversarial question records from annotations, as POPE does from COCO's.

    Images with fewer than `positives` objects are left out, and do not count for what is frequent. Of each other image
    the first `positives` objects are asked, each followed by an absent one that was not asked yet: drawn at random;
    the most frequent one; or the one that comes together most often with the object just asked (any, at random, where
    none is left that ever did). Of equally frequent ones the first seen comes first. The yes-questions are the same in
    the three splits.

    Where all objects that occur are on an image or asked, POPE loops for ever: here the categories that never occur
    follow, and an image with fewer than `positives` absent categories is left out.

    Args:
        objects_by_image: a sequence is taken in its order; a set has none, so it is shuffled first.
        categories: all object names.

    Returns:
        `{"question_id", "image", "text", "label"}` records by split; ids count from 1 in each.

    Raises:
        DataError: an object is not among the categories.
    """
    shuffle = random.Random(f"pope/{seed}/order")
    listed = {image: _in_order(objects, shuffle) for image, objects in objects_by_image.items()}
    unknown = sorted(set().union(*listed.values()) - set(categories))
    if unknown:
        raise DataError(f"Objects are not among the categories: {some(unknown)}.", "Add them to the categories.")
    most = len(set(categories)) - positives
    enough = {image: present for image, present in listed.items() if positives <= len(present) <= most}
    frequency = Counter(name for present in enough.values() for name in present)
    together: dict[str, Counter[str]] = {name: Counter() for name in frequency}
    for present in enough.values():
        for name in present:
            together[name].update(other for other in present if other != name)
    popular, never = _falling(frequency), [name for name in categories if name not in frequency]
    companions = {name: _falling(counts) for name, counts in together.items()}

    splits: dict[str, list[dict[str, Any]]] = {}
    for split in SPLITS:
        rng, records = random.Random(f"pope/{seed}/{split}"), splits.setdefault(split, [])
        for image, present in enough.items():
            used = set(present)
            for name in present[:positives]:
                first = {"random": [], "popular": popular, "adversarial": companions[name]}[split]
                absent = next(o for o in (*first, *rng.sample(popular, len(popular)), *never) if o not in used)
                used.add(absent)
                for asked, label in ((name, "yes"), (absent, "no")):
                    question = {"question_id": len(records) + 1, "image": image, "text": question_text(asked)}
                    records.append({**question, "label": label})
    return splits


def _in_order(objects: Collection[str], shuffle: random.Random) -> list[str]:
    if isinstance(objects, Sequence):
        return list(dict.fromkeys(objects))
    return shuffle.sample(sorted(objects), len(objects))


def _falling(counts: Counter[str]) -> list[str]:
    return [name for name, _ in counts.most_common()]
