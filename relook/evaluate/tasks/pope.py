"""POPE (Li et al. 2023, arXiv:2305.10355): yes/no questions about objects, with the official scoring.

The official program is evaluate.py of RUCAIBox/POPE. `build_pope` builds the questions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from relook.data.paths import coco_images, pope_file, resolve_extension
from relook.data.samples import Question
from relook.errors import DataError, RecipeError, did_you_mean, preview
from relook.evaluate.benchmark import YES_NO_MAX_TOKENS, Benchmark, ScoringInputs, require_option
from relook.evaluate.results import data_folder_of, provenance
from relook.evaluate.statistics import Ratio, discordant_counts, mcnemar, rate_difference, rate_intervals, safe_ratio
from relook.files import read_records, text_hash

SPLITS = ("random", "popular", "adversarial")
LLAVA_QUESTIONS = "llava_pope_test.jsonl"  # LLaVA's own name


# ----------------------------------------------------------------------------------------------------
# Questions and answers.


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
    # LLaVA numbers all questions in one sequence, so ids say nothing about POPE's own: only image and text do.
    category = {str(r.get("question_id")): str(r.get("category", "")) for r in read_records(path)}
    splits: dict[str, list[Question]] = {}
    for question in read_pope_questions(path, image_root):
        splits.setdefault(category[question.id], []).append(question)
    for split, questions in splits.items():
        official = read_pope_questions(labels / f"coco_pope_{split}.json", image_root)
        label = {(q.image, q.text): q.label for q in official}
        keys = [(q.image, q.text.split("\n")[0]) for q in questions]
        unknown = [q.id for q, key in zip(questions, keys, strict=True) if key not in label]
        unasked = [q.id for q in official if (q.image, q.text) not in set(keys)]
        if unknown or unasked:
            raise DataError(
                f"{path} and {labels} do not match in {split}: {len(unknown)} questions have no label "
                f"({preview(unknown)}), {len(unasked)} labels have no question ({preview(unasked)}).",
                "Give the label files that belong to the questions.",
            )
        splits[split] = [replace(q, label=label[key]) for q, key in zip(questions, keys, strict=True)]
    return splits


def pope_questions(data: Path) -> dict[str, list[Question]]:
    """Read a data folder's questions by split, with LLaVA's texts if its question file is next to POPE's."""
    files, images = {split: pope_file(data, split) for split in SPLITS}, coco_images(data)
    llava = files[SPLITS[0]].with_name(LLAVA_QUESTIONS)
    if not llava.exists():
        return {split: read_pope_questions(file, images) for split, file in files.items()}
    splits = read_llava_questions(llava, llava.parent, images)
    if missing := [split for split in SPLITS if split not in splits]:
        raise DataError(f"{llava} has no questions of category {preview(missing)}.", "Download it again.")
    return {split: splits[split] for split in SPLITS}


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
    # Either all records have ids or none: a file with some ids has lost the others.
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


def _refuse_twice(ids: Iterable[str], source: str) -> None:
    twice = [id for id, count in Counter(ids).items() if count > 1]
    if twice:
        raise DataError(f"{source}: question_id {preview(twice)} stands more than once.", "Remove the duplicates.")


# ----------------------------------------------------------------------------------------------------
# What an answer says: the rules of the programs that score POPE, and a reader's.


def official_parse(answer: str) -> bool:
    """Return True if POPE's evaluate.py reads an answer as yes.

    It takes the text before the first full stop, removes commas and splits at spaces. The answer is no if one of the
    words is "No", "not" or "no". Everything else is yes, including "", "NO", "No!" and "No</s>".
    """
    # Case-sensitive and split at spaces alone, as the original: a line break or "No!" hides a no.
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def exact_parse(answer: str) -> bool | None:
    """Apply lmms-eval's rule (tasks/pope/utils.py): "yes" or "no" alone, in any case; None for any other answer."""
    return {"yes": True, "no": False}.get(answer.lower().strip())


_YES = re.compile(r"\b(?:yes|yeah|yep|yup)\b")
_NO = re.compile(r"\b(?:no|not|none|nothing|nope|nah)\b|n['’]t\b")
_UNSURE = re.compile(r"(?:\bno|\bnot|n['’]t) (?:sure|certain|clear|possible|able|know|tell|say|idea|way)\b")
# "There is a dog." is a yes without the word, unless the sentence is unsure.
_THERE_IS = re.compile(r"\W*there(?: is| are|['’]s)\b")
# A later sentence that begins with the other word takes the first one back: "Yes. No, wait."
_RECONSIDERED = re.compile(r"\W*(yes|no)\W*(?:,|$)")


def stated(answer: str) -> bool | None:
    """Return what an answer means to a reader: True for yes, False for no, None for neither or both.

    The first sentence decides, ignoring case and surrounding marks: "**No**" is a no, as is "Nope". A later sentence
    counts only if it retracts the first ("Yes. No, wait."). Only English is supported.
    """
    # Sentences with a word in them; an empty answer has none and means nothing.
    first, *later = [text for text in re.split(r"[.!?\n]+", answer.lower()) if re.search(r"\w", text)] or [""]
    meaning = _stated(first)
    retractions = [match[1] == "yes" for text in later if (match := _RECONSIDERED.match(text))]
    return None if (not meaning) in retractions else meaning


def _stated(sentence: str) -> bool | None:
    # "I am not sure" is no no: take such phrases out before looking for the words.
    certain = _UNSURE.sub("", sentence)
    yes, no = bool(_YES.search(certain)), bool(_NO.search(certain))
    if yes and no:
        return None
    if yes or no:
        return yes
    return True if certain == sentence and _THERE_IS.match(sentence) else None


PARSERS: dict[str, Callable[[str], bool | None]] = {
    "official": official_parse,
    "llava": official_parse,  # llava/eval/eval_pope.py has the same rule
    "lmms-eval": exact_parse,
}


# ----------------------------------------------------------------------------------------------------
# Scores.


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
        meaning = stated(self.answer)
        return meaning is None or meaning != self.prediction


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
    # POPE's own answer files have no ids: number them as the questions, and let surplus answers become unknown ids.
    if answers and all("question_id" not in record for record in answers):
        ids = [question.id for question in questions] + [f"line {i + 1}" for i in range(len(questions), len(answers))]
        answers = [{**record, "question_id": id} for id, record in zip(ids, answers, strict=False)]
    _refuse_twice((question.id for question in questions), "Questions")
    _refuse_twice((str(record["question_id"]) for record in answers), "Answers")
    by_id = {str(record["question_id"]): record for record in answers}
    known_ids = {question.id for question in questions}
    pairs = [(question, by_id[question.id]) for question in questions if question.id in by_id]
    faults = {
        "questions have no answer": [q.id for q in questions if q.id not in by_id],
        "answers have no question": [id for id in by_id if id not in known_ids],
        "answers are to another question text": [
            question.id
            for question, record in pairs
            if record.get("question", record.get("prompt", question.text)) != question.text
        ],
        "questions have no label": [q.id for q in questions if not q.label],
    }
    problems = [f"{len(ids)} {fault} ({preview(ids)})" for fault, ids in faults.items() if ids]
    if problems:
        raise DataError(f"Questions and answers do not match: {'; '.join(problems)}.", "Give the two files of one run.")
    return [PopeRow(q, _answer(record), parse(_answer(record)), q.label == "yes") for q, record in pairs]


def count_confusion(rows: Sequence[PopeRow], parser: str = "official") -> PopeScore:
    """Count the confusion matrix of matched answers."""
    counts = Counter((row.prediction, row.label) for row in rows)
    return PopeScore(
        tp=counts[True, True],
        fp=counts[True, False],
        tn=counts[False, False],
        fn=counts[False, True],
        neither=counts[None, True] + counts[None, False],
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
    # The six questions about an image are answered by one look at it: resample images, not questions.
    by_image: dict[str, list[PopeRow]] = {}
    for row in rows:
        by_image.setdefault(row.image, []).append(row)
    counts = [count_confusion(of_image) for of_image in by_image.values()]
    return {
        "accuracy": [(c.tp + c.tn, c.n) for c in counts],
        "precision": [(c.tp, c.tp + c.fp) for c in counts],
        "recall": [(c.tp, c.tp + c.fn) for c in counts],
        "f1": [(2 * c.tp, 2 * c.tp + c.fp + c.fn) for c in counts],
        "yes_ratio": [(c.tp + c.fp, c.n) for c in counts],
    }


def score_pope(
    questions: Sequence[Question], answers: Sequence[Mapping[str, Any]], parser: str = "official"
) -> dict[str, Any]:
    """Compute confusion counts and rates, with 95 % intervals over images."""
    return _score_rows(match_answers(questions, answers, parser), parser)


def _score_rows(rows: Sequence[PopeRow], parser: str) -> dict[str, Any]:
    return count_confusion(rows, parser).to_json() | rate_intervals(ratios(rows))


def pope_results(data: Path, out: Path, parser: str = "official") -> dict[str, Any]:
    """Compute the contents of `pope.json`: each split's scores, and their provenance."""
    questions = pope_questions(data)
    results: dict[str, Any] = {
        split: score_pope(of_split, read_pope_answers(out / f"pope_{split}.jsonl"), parser)
        for split, of_split in questions.items()
    }
    results["provenance"] = provenance(out, YES_NO_MAX_TOKENS, parser=parser, **question_hashes(questions))
    return results


def question_hashes(questions: Mapping[str, Sequence[Question]]) -> dict[str, Any]:
    """Compute hashes of the questions and of their images."""
    texts = {
        split: text_hash(*(part for q in of_split for part in (q.image.name, q.text, q.label)))
        for split, of_split in questions.items()
    }
    images = dict.fromkeys(q.image.name for of_split in questions.values() for q in of_split)
    return {"questions": texts, "image_list": text_hash(*images)}


def require_parser(name: str) -> None:
    """Raise RecipeError if there is no parser of that name."""
    if name not in PARSERS:
        raise RecipeError(f"There is no parser {name!r}.", did_you_mean(name, PARSERS))


def rescore_pope(answers: Path, inputs: ScoringInputs, parser: str = "official") -> dict[str, Any]:
    """Score an answer file made by any program, or a folder of `relook eval` again.

    Raises:
        RelookError: an unknown parser, something is missing, or questions and answers do not match; the message names
            the ids.
    """
    require_parser(parser)
    if answers.is_dir():
        return pope_results(inputs.data or data_folder_of(answers), answers, parser)
    file = require_option(inputs.questions, "--questions, POPE's file", "There are no questions to an answer file")
    records = read_pope_answers(answers)
    if inputs.annotations is None:
        questions = read_pope_questions(file, Path())
        hashes = question_hashes({file.stem: questions})
        return score_pope(questions, records, parser) | {"provenance": provenance(answers, parser=parser, **hashes)}
    # LLaVA's file holds all splits: match once, so that an answer to none of them shows, then deal the rows out.
    splits = read_llava_questions(file, inputs.annotations, Path())
    rows = iter(match_answers([q for questions in splits.values() for q in questions], records, parser))
    result = {split: _score_rows(list(islice(rows, len(splits[split]))), parser) for split in splits}
    return result | {"provenance": provenance(answers, parser=parser, **question_hashes(splits))}


# ----------------------------------------------------------------------------------------------------
# Two models.


def compare_pope(runs: Sequence[tuple[Path, Path, Path]]) -> dict[str, Any]:
    """Compute the differences second - first of each split, over the images of several (data, first, second) runs."""
    # Indexed [side][run][split]; both sides have the same questions in the same order, or `match_answers` raises.
    rows = [[_matched_rows(run[0], run[side]) for run in runs] for side in (1, 2)]
    return {split: _compare_split([[run[split] for run in side] for side in rows]) for split in SPLITS}


def _compare_split(sides: Sequence[Sequence[list[PopeRow]]]) -> dict[str, Any]:
    rates = [[ratios(rows) for rows in side] for side in sides]
    right = [[row.right for rows in side for row in rows] for side in sides]
    differences = {rate: rate_difference(*([run[rate] for run in side] for side in rates)) for rate in rates[0][0]}
    # Accuracy's difference is the split's own entry, beside its p-value; the other rates have an entry each.
    return {**differences.pop("accuracy"), "mcnemar_p": mcnemar(*discordant_counts(*right)), **differences}


def differing_answers(data: Path, first: Path, second: Path) -> list[dict[str, Any]]:
    """Return the questions on which the two predictions differ, each once, with the splits it is in."""
    by_question: dict[tuple[str, str], dict[str, Any]] = {}
    sides = [_matched_rows(data, folder) for folder in (first, second)]
    for split in SPLITS:
        for row, other in zip(sides[0][split], sides[1][split], strict=True):
            if row.prediction == other.prediction:
                continue
            record: dict[str, Any] = {
                "image": row.image,
                "question": row.question.text,
                "label": row.question.label,
                "answers": [row.answer, other.answer],
                "right": [row.right, other.right],
                "splits": [],
            }
            # The questions to be answered with yes are the same in all splits.
            by_question.setdefault((row.image, row.question.text), record)["splits"].append(split)
    return list(by_question.values())


def _matched_rows(data: Path, folder: Path) -> dict[str, list[PopeRow]]:
    return {
        split: match_answers(questions, read_pope_answers(folder / f"pope_{split}.jsonl"))
        for split, questions in pope_questions(data).items()
    }


BENCHMARK = Benchmark(
    "POPE",
    questions=lambda data: {f"pope_{split}": questions for split, questions in pope_questions(data).items()},
    score=lambda data, questions, answers, folder, judge: pope_results(data, folder),
    id_field="question_id",
    text_field="answer",
    yes_or_no=[f"pope_{split}" for split in SPLITS],
    rescore=rescore_pope,
    compare=compare_pope,
    differing=differing_answers,
)
