"""POPE (Li et al. 2023, arXiv:2305.10355): yes/no questions about objects, with the official scoring.

The official program is evaluate.py of RUCAIBox/POPE. `build_pope` builds the questions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from relook.data.paths import resolve_extension
from relook.data.samples import Question
from relook.errors import DataError, preview
from relook.evaluate.statistics import Ratio, safe_ratio
from relook.files import read_records

SPLITS = ("random", "popular", "adversarial")
LONGEST_ANSWER = 64  # tokens: upper bound on what a yes/no question may generate


def question_text(name: str) -> str:
    """Return POPE's question about an object."""
    return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the image?"


def read_pope_questions(path: str | Path, image_root: str | Path) -> list[Question]:
    """Read a question file: JSON lines or a JSON array of `{"question_id", "image", "text", "label"?}`.

    As in the official program, any label but "no" counts as yes. LLaVA's question files have no label: theirs is empty.

    Raises:
        DataError: a field is missing, an id occurs twice, or the file has no question.
    """
    path, image_root = Path(path), Path(image_root)
    questions = []
    for number, record in enumerate(read_records(path), 1):
        missing = [key for key in ("question_id", "image", "text") if key not in record]
        if missing:
            raise DataError(f"{path}: record {number} has no {', '.join(missing)}.", "Give a POPE question file.")
        label = ("no" if record["label"] == "no" else "yes") if "label" in record else ""
        questions.append(
            Question(
                str(record["question_id"]),
                resolve_extension(image_root / str(record["image"])),
                str(record["text"]),
                label,
            )
        )
    if not questions:
        raise DataError(f"{path} holds no question.", "Give a POPE question file.")
    _refuse_twice((question.id for question in questions), str(path))
    return questions


def read_llava_questions(path: str | Path, labels: str | Path, image_root: str | Path) -> dict[str, list[Question]]:
    """Read LLaVA's question file, which holds all splits by `category` and no labels, and group it by split.

    Labels come from POPE's files in the folder `labels`. They are matched by image and by the first line of the text,
    since LLaVA's texts have a second line ("Answer the question using a single word or phrase.").

    Raises:
        DataError: questions have no label, or labels no question; the message counts and names both.
    """
    path, labels, image_root = Path(path), Path(labels), Path(image_root)
    category = {str(r.get("question_id")): str(r.get("category", "")) for r in read_records(path)}
    splits: dict[str, list[Question]] = {}
    for question in read_pope_questions(path, image_root):
        splits.setdefault(category[question.id], []).append(question)
    for split, questions in splits.items():
        official = read_pope_questions(labels / f"coco_pope_{split}.json", image_root)
        label = {(q.image, q.text): q.label for q in official}
        places = [(q.image, q.text.split("\n")[0]) for q in questions]
        unknown = [q.id for q, place in zip(questions, places, strict=True) if place not in label]
        unasked = [q.id for q in official if (q.image, q.text) not in set(places)]
        if unknown or unasked:
            raise DataError(
                f"{path} and {labels} do not match in {split}: {len(unknown)} questions have no label "
                f"({preview(unknown)}), {len(unasked)} labels have no question ({preview(unasked)}).",
                "Give the label files that belong to the questions.",
            )
        splits[split] = [replace(q, label=label[place]) for q, place in zip(questions, places, strict=True)]
    return splits


def read_pope_answers(path: str | Path) -> list[dict[str, Any]]:
    """Read an answer file: records with `question_id`, and `answer` (POPE's key) or `text` (LLaVA's), in any order.

    In POPE's own layout, `{"question", "answer"}`, ids may be missing if they are missing in all records: see
    `match_answers`.

    Raises:
        DataError: there is no record, one has no id or no text, or an id occurs twice.
    """
    path = Path(path)
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
        raise DataError(f"{where}: question_id {preview(twice)} stands more than once.", "Remove the duplicates.")


def official_parse(answer: str) -> bool:
    """Return True if POPE's evaluate.py reads an answer as yes.

    It takes the text before the first full stop, removes commas and splits at spaces. The answer is no if one of the
    words is "No", "not" or "no". Everything else is yes, including "", "NO", "No!" and "No</s>".
    """
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def exact_parse(answer: str) -> bool | None:
    """Apply lmms-eval's rule (tasks/pope/utils.py): "yes" or "no" alone, in any case; None for any other answer."""
    return {"yes": True, "no": False}.get(answer.lower().strip())


_YES = re.compile(r"\b(?:yes|yeah|yep|yup)\b")
_NO = re.compile(r"\b(?:no|not|none|nothing|nope|nah)\b|n['’]t\b")
_UNSURE = re.compile(r"(?:\bno|\bnot|n['’]t) (?:sure|certain|clear|possible|able|know|tell|say|idea|way)\b")
_THERE_IS = re.compile(r"\W*there(?: is| are|['’]s)\b")
_RECONSIDERED = re.compile(r"\W*(yes|no)\W*(?:,|$)")


def stated(answer: str) -> bool | None:
    """Return what an answer means to a reader: True for yes, False for no, None for neither or both.

    The first sentence decides, ignoring case and surrounding marks: "**No**" is a no, as is "Nope". A later sentence
    counts only if it retracts the first ("Yes. No, wait."). Only English is supported.
    """
    first, *later = [text for text in re.split(r"[.!?\n]+", answer.lower()) if re.search(r"\w", text)] or [""]
    said = _stated(first)
    takes_back = [match[1] == "yes" for text in later if (match := _RECONSIDERED.match(text))]
    return None if (not said) in takes_back else said


def _stated(sentence: str) -> bool | None:
    known = _UNSURE.sub("", sentence)
    yes, no = bool(_YES.search(known)), bool(_NO.search(known))
    if yes and no:
        return None
    if yes or no:
        return yes
    return True if known == sentence and _THERE_IS.match(sentence) else None


PARSERS: dict[str, Callable[[str], bool | None]] = {
    "official": official_parse,
    "llava": official_parse,  # llava/eval/eval_pope.py has the same rule
    "lmms-eval": exact_parse,
}


@dataclass(frozen=True)
class PopeScore:
    """Confusion counts with "yes" as positive, and the rates of evaluate.py as fractions.

    A rate with a zero denominator is None, where the official program raises ZeroDivisionError. Answers that a parser
    reads as neither yes nor no count in `neither`: they are wrong in the accuracy and in no other count, as in
    lmms-eval. (Its "yes ratio" is that of the labels; here it is always that of the answers.) `unclear` counts the
    answers whose meaning differs from what the parser reads: see `stated`. The other counts include them.
    """

    tp: int
    fp: int
    tn: int
    fn: int
    neither: int = 0
    parser: str = "official"
    unclear: int = 0

    @property
    def n(self) -> int:
        return self.tp + self.fp + self.tn + self.fn + self.neither

    @property
    def accuracy(self) -> float | None:
        return safe_ratio(self.tp + self.tn, self.n)

    @property
    def precision(self) -> float | None:
        return safe_ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float | None:
        return safe_ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float | None:
        return safe_ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def yes_ratio(self) -> float | None:
        return safe_ratio(self.tp + self.fp, self.n)

    def to_json(self) -> dict[str, Any]:
        rates = {name: getattr(self, name) for name in ("accuracy", "precision", "recall", "f1", "yes_ratio", "n")}
        return asdict(self) | rates


@dataclass(frozen=True)
class PopeRow:
    """Answered question: `prediction` and `label` are True for yes; a prediction of None means neither."""

    question: Question
    answer: str
    prediction: bool | None
    label: bool

    @property
    def image(self) -> str:
        """Return the image's file name; rows are resampled by image."""
        return self.question.image.name

    @property
    def right(self) -> bool:
        return self.prediction == self.label

    @property
    def unclear(self) -> bool:
        """Return True if the answer's meaning to a reader differs from the prediction."""
        said = stated(self.answer)
        return said is None or said != self.prediction


def match_answers(
    questions: Sequence[Question], answers: Sequence[Mapping[str, Any]], parser: str = "official"
) -> list[PopeRow]:
    """Pair answers with questions by id; their order does not matter. Rows are in the order of the questions.

    If an answer repeats its question (`question`, or LLaVA's `prompt`), the texts must agree. Answers without ids are
    matched to the questions in order, and repeat their texts.

    Raises:
        DataError: questions have no answer or label, answers have no question, ids occur twice, or texts differ; the
            message names the ids.
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
    problems = [f"{len(ids)} {what} ({preview(ids)})" for what, ids in faults.items() if ids]
    if problems:
        raise DataError(f"Questions and answers do not match: {'; '.join(problems)}.", "Give the two files of one run.")
    return [PopeRow(q, _answer(record), parse(_answer(record)), q.label == "yes") for q, record in pairs]


def count_confusion(rows: Sequence[PopeRow], parser: str = "official") -> PopeScore:
    """Count the confusion matrix of matched answers."""
    found = Counter((row.prediction, row.label) for row in rows)
    return PopeScore(
        tp=found[True, True],
        fp=found[True, False],
        tn=found[False, False],
        fn=found[False, True],
        neither=found[None, True] + found[None, False],
        parser=parser,
        unclear=sum(row.unclear for row in rows),
    )


def score_pope_answers(
    questions: Sequence[Question], answers: Sequence[Mapping[str, Any]], parser: str = "official"
) -> PopeScore:
    """Score answers by a rule of `PARSERS`; see `match_answers` for the errors."""
    return count_confusion(match_answers(questions, answers, parser), parser)


def ratios(rows: Sequence[PopeRow]) -> dict[str, Ratio]:
    """Return each rate's (numerator, denominator) pairs, one per image: rows of one image are not independent."""
    by_image: dict[str, list[PopeRow]] = {}
    for row in rows:
        by_image.setdefault(row.image, []).append(row)
    counts = [count_confusion(found) for found in by_image.values()]
    return {
        "accuracy": [(c.tp + c.tn, c.n) for c in counts],
        "precision": [(c.tp, c.tp + c.fp) for c in counts],
        "recall": [(c.tp, c.tp + c.fn) for c in counts],
        "f1": [(2 * c.tp, 2 * c.tp + c.fp + c.fn) for c in counts],
        "yes_ratio": [(c.tp + c.fp, c.n) for c in counts],
    }
