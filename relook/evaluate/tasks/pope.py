"""POPE (Li et al. 2023, arXiv:2305.10355): yes/no questions about objects, and the official way of scoring them.

The official program is RUCAIBox/POPE evaluate.py. `pope_build` makes the questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from relook.data.samples import Question
from relook.errors import DataError, some
from relook.evaluate.statistics import Ratio, ratio
from relook.files import read_records

SPLITS = ("random", "popular", "adversarial")
LONGEST_ANSWER = 64  # tokens: no longer one is asked for


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


def read_llava_questions(path: Path, labels: Path, image_root: Path) -> dict[str, list[Question]]:
    """Read LLaVA's question file, which holds all splits by `category` and no label, by split.

    Labels come from POPE's files in a folder: to the same image and the text's first line, since LLaVA's texts have a
    second one ("Answer the question using a single word or phrase.").

    Raises:
        DataError: questions without a label, or labels without a question; both are counted and named.
    """
    category = {str(r.get("question_id")): str(r.get("category", "")) for r in read_records(path)}
    splits: dict[str, list[Question]] = {}
    for question in read_questions(path, image_root):
        splits.setdefault(category[question.id], []).append(question)
    for split, questions in splits.items():
        official = read_questions(labels / f"coco_pope_{split}.json", image_root)
        label = {(q.image, q.text): q.label for q in official}
        places = [(q.image, q.text.split("\n")[0]) for q in questions]
        unknown = [q.id for q, place in zip(questions, places, strict=True) if place not in label]
        unasked = [q.id for q in official if (q.image, q.text) not in set(places)]
        if unknown or unasked:
            raise DataError(
                f"{path} and {labels} do not match in {split}: {len(unknown)} questions have no label "
                f"({some(unknown)}), {len(unasked)} labels have no question ({some(unasked)}).",
                "Give the label files that belong to the questions.",
            )
        splits[split] = [replace(q, label=label[place]) for q, place in zip(questions, places, strict=True)]
    return splits


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Read an answer file: records with `question_id`, and `answer` (POPE's key) or `text` (LLaVA's), in any order.

    In POPE's own layout, `{"question", "answer"}`, they may be without an id if all are: see `match`.

    Raises:
        DataError: there is no record, one has no id or no text, or an id stands twice.
    """
    records = read_records(path)
    if not records:
        raise DataError(f"{path} holds no answer.", "Give a POPE answer file.")
    identifying = "question_id" if any("question_id" in record for record in records) else "question"
    for number, record in enumerate(records, 1):
        if identifying not in record or not isinstance(_answer(record), str):
            raise DataError(
                f"{path}: record {number} needs question_id, and answer or text.", "Give POPE's or LLaVA's layout."
            )
    _refuse_twice((str(record["question_id"]) for record in records if "question_id" in record), str(path))
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


def exact_parse(answer: str) -> bool | None:
    """lmms-eval's rule (tasks/pope/utils.py): an answer is "yes" or "no" alone, in any case, or it is neither."""
    return {"yes": True, "no": False}.get(answer.lower().strip())


PARSERS: dict[str, Callable[[str], bool | None]] = {
    "official": official_parse,
    "llava": official_parse,  # llava/eval/eval_pope.py has the same rule
    "lmms-eval": exact_parse,
}


@dataclass(frozen=True)
class PopeScore:
    """Confusion counts with "yes" as positive, and the rates of evaluate.py as fractions.

    A rate whose denominator is zero is 0.0, where the official program stops with ZeroDivisionError. Answers that a
    parser takes for neither yes nor no are `neither`: wrong in the accuracy, and in no other count, as in lmms-eval.
    (Its "yes ratio" is that of the labels; here it is always that of the answers.)
    """

    tp: int
    fp: int
    tn: int
    fn: int
    neither: int = 0
    parser: str = "official"

    @property
    def n(self) -> int:
        return self.tp + self.fp + self.tn + self.fn + self.neither

    @property
    def accuracy(self) -> float:
        return ratio(self.tp + self.tn, self.n)

    @property
    def precision(self) -> float:
        return ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        return ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        return ratio(2 * self.precision * self.recall, self.precision + self.recall)

    @property
    def yes_ratio(self) -> float:
        return ratio(self.tp + self.fp, self.n)

    def to_json(self) -> dict[str, Any]:
        rates = {name: getattr(self, name) for name in ("accuracy", "precision", "recall", "f1", "yes_ratio", "n")}
        return asdict(self) | rates


@dataclass(frozen=True)
class PopeRow:
    """One answered question: `prediction` and `label` are True for yes; a prediction may be None, for neither."""

    question: Question
    answer: str
    prediction: bool | None
    label: bool

    @property
    def image(self) -> str:
        """The image's file name: rows are resampled by image."""
        return self.question.image.name

    @property
    def right(self) -> bool:
        return self.prediction == self.label


def match(
    questions: Sequence[Question], answers: Sequence[Mapping[str, Any]], parser: str = "official"
) -> list[PopeRow]:
    """Pair answers with questions by id; their order does not matter. Rows are in the order of the questions.

    Where an answer repeats its question (`question`, or LLaVA's `prompt`), the texts must agree. Answers without ids
    are those to the questions in order, and repeat them.

    Raises:
        DataError: questions without an answer or a label, answers without a question, ids that stand twice, or texts
            that differ; the ids are named.
    """
    parse = PARSERS[parser]
    if answers and all("question_id" not in record for record in answers):
        ids = [question.id for question in questions] + [f"line {i + 1}" for i in range(len(questions), len(answers))]
        answers = [{**record, "question_id": id} for id, record in zip(ids, answers, strict=False)]
    _refuse_twice((question.id for question in questions), "Questions")
    _refuse_twice((str(record["question_id"]) for record in answers), "Answers")
    by_id = {str(record["question_id"]): record for record in answers}
    known = {question.id for question in questions}
    pairs = [(question, by_id[question.id]) for question in questions if question.id in by_id]
    faults = {
        "questions have no answer": [q.id for q in questions if q.id not in by_id],
        "answers have no question": [id for id in by_id if id not in known],
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
    return [PopeRow(q, _answer(record), parse(_answer(record)), q.label == "yes") for q, record in pairs]


def count(rows: Sequence[PopeRow], parser: str = "official") -> PopeScore:
    """The counts of matched answers."""
    found = Counter((row.prediction, row.label) for row in rows)
    return PopeScore(
        tp=found[True, True],
        fp=found[True, False],
        tn=found[False, False],
        fn=found[False, True],
        neither=found[None, True] + found[None, False],
        parser=parser,
    )


def score(questions: Sequence[Question], answers: Sequence[Mapping[str, Any]], parser: str = "official") -> PopeScore:
    """Score answers by a rule of `PARSERS`; see `match` for the errors."""
    return count(match(questions, answers, parser), parser)


def ratios(rows: Sequence[PopeRow]) -> dict[str, Ratio]:
    """Each rate's numerators and denominators, one of each per image: rows of an image depend on each other."""
    by_image: dict[str, list[PopeRow]] = {}
    for row in rows:
        by_image.setdefault(row.image, []).append(row)
    counts = [count(found) for found in by_image.values()]
    return {
        "accuracy": [(c.tp + c.tn, c.n) for c in counts],
        "precision": [(c.tp, c.tp + c.fp) for c in counts],
        "recall": [(c.tp, c.tp + c.fn) for c in counts],
        "f1": [(2 * c.tp, 2 * c.tp + c.fp + c.fn) for c in counts],
        "yes_ratio": [(c.tp + c.fp, c.n) for c in counts],
    }
