"""Benchmark definitions: for each, its questions over a data folder, the layout of its answers, and its scoring.

Nothing here needs a model or its libraries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relook.console import status
from relook.data.annotations import read_coco
from relook.data.paths import coco_images, resolve_extension
from relook.data.samples import Question
from relook.errors import DataError, RecipeError, preview
from relook.evaluate.judge import JUDGE_CACHE, Judge, JudgeSettings
from relook.evaluate.results import provenance
from relook.evaluate.score import (
    RESULTS,
    ScoringInputs,
    annotation_file,
    chair_images,
    chair_results,
    data_of,
    pope_questions,
    pope_results,
    score_answers,
)
from relook.evaluate.tasks import amber, mmhal, shr
from relook.evaluate.tasks.pope import LONGEST_ANSWER, SPLITS
from relook.files import file_hash, read_json_object, read_records, text_hash

CHAIR_PROMPT = "Describe this image in detail."
Questions = Mapping[str, Sequence[Question]]  # by the stem of the answer file
Answers = Mapping[str, Sequence[Mapping[str, Any]]]  # records by stem, in the order of the questions


@dataclass(frozen=True)
class Benchmark:
    """Definition of one benchmark.

    Args:
        title: label of the progress bar.
        questions: reads the questions of a data folder, by the stem of their answer file.
        score: maps (data folder, questions, answers, location of the answers, judge) to the result.
        id_field, text_field, question_field: keys of a record's question id, answer and question; with an empty
            `question_field`, records do not keep the question.
        number: whether ids are numbers in records.
        yes_or_no: stems of files whose questions are answered with one word.
        generate: keyword arguments of transformers' `generate`.
        needs_judge: whether scoring a data folder needs a judge.
        judge_request: fields of the requests to a judge; None if no judge is asked.
        read: reads an existing answer file in any layout that the benchmark knows.
    """

    title: str
    questions: Callable[[Path], Questions]
    score: Callable[[Path, Questions, Answers, Path, Judge | None], dict[str, Any]]
    id_field: str
    text_field: str
    question_field: str = "question"
    number: bool = False
    yes_or_no: Collection[str] = ()
    generate: tuple[tuple[str, Any], ...] = ()
    needs_judge: Callable[[Path], bool] = lambda data: False
    judge_request: Mapping[str, Any] | None = None
    read: Callable[[Path], list[dict[str, Any]]] = read_records

    def record(self, question: Question, text: str) -> dict[str, Any]:
        """Build the record of one answer, a line of an answer file."""
        record: dict[str, Any] = {self.id_field: int(question.id) if self.number else question.id}
        record.setdefault("image", question.image.name)  # unless the id is the image itself
        if self.question_field:
            record[self.question_field] = question.text
        return record | {self.text_field: text}

    def texts(self, answers: Answers) -> dict[str, str]:
        """Return answers by question id, over all files."""
        return {str(r[self.id_field]): r[self.text_field] for records in answers.values() for r in records}


def get_benchmarks(names: Sequence[str]) -> list[Benchmark]:
    """Look up benchmarks by name.

    Raises:
        RecipeError: there is no benchmark of that name.
    """
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise RecipeError(f"There is no benchmark {preview(unknown)}.", f"Known ones: {', '.join(BENCHMARKS)}.")
    return [BENCHMARKS[name] for name in names]


def benchmark_questions(name: str, data: str | Path) -> Questions:
    """Read a benchmark's questions.

    Raises:
        DataError: a file is missing, or a question's id occurs twice.
    """
    data = Path(data)
    asked = BENCHMARKS[name].questions(data)
    for stem, questions in asked.items():
        twice = [id for id, count in Counter(question.id for question in questions).items() if count > 1]
        if twice:
            raise DataError(f"{stem}: the questions {preview(twice)} stand more than once.", "Remove the duplicates.")
    return asked


def require_images(asked: Questions) -> None:
    """Check that all images exist before anything starts.

    Raises:
        DataError: images are missing; the message names the first and counts the others.
    """
    images = dict.fromkeys(question.image for questions in asked.values() for question in questions)
    missing = [image for image in images if not image.is_file()]
    if missing:
        others = f", nor do {len(missing) - 1} others" if missing[1:] else ""
        raise DataError(f"The image {missing[0]} does not exist{others}.", "Check the image folder.")


def require_judge(name: str, data: Path, judge: object) -> None:
    """Check before anything starts that the benchmark can be scored.

    Raises:
        RecipeError: scoring needs a judge, and there is none.
    """
    if judge is None and BENCHMARKS[name].needs_judge(data):
        raise RecipeError(f"{name} is scored by a judge.", "Give --judge-url and --judge-model.")


def score_command(
    name: str, answers: Sequence[str | Path], given: ScoringInputs, parser: str, judge: JudgeSettings | None
) -> dict[str, Any]:
    """Score existing answer files, or a `relook eval` folder, as `relook score` does; no model is needed.

    Raises:
        RelookError: an unknown benchmark, a missing option, no judge where one is needed, or questions and answers that
            do not match; the message names the ids.
    """
    (benchmark,) = get_benchmarks([name])
    paths = [Path(path) for path in answers]
    first = paths[0]
    names = [path.name for path in paths]
    if len(paths) > 1 and (any(path.is_dir() for path in paths) or len(set(names)) < len(names)):
        raise RecipeError(f"{preview(names)}: several --answers are files of different names.", "Give a folder alone.")
    if name in RESULTS:
        if len(paths) > 1:
            raise RecipeError(f"{name} is scored by one answer file.", "Give --answers once.")
        return _beside_stored(name, first, score_answers(name, first, given, parser))
    data = given.data or (data_of(first) if first.is_dir() else None)
    if data is None:
        raise RecipeError(f"{name} is scored by the benchmark's files.", "Give their folder as --data.")
    require_judge(name, data, judge)
    asked = benchmark_questions(name, data)
    files = [first / f"{stem}.jsonl" for stem in asked] if first.is_dir() else paths
    found = match_records(benchmark, asked, [record for path in files for record in benchmark.read(path)])
    cache = (first if first.is_dir() else first.parent) / JUDGE_CACHE
    result = benchmark.score(data, asked, found, first, Judge(judge, cache) if judge else None)
    if len(paths) > 1:
        result["provenance"]["answers_sha256"] = {path.name: file_hash(path) for path in paths}
    return _beside_stored(name, first, result)


def _beside_stored(name: str, folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Return the result; print how to replace a different one that a `relook eval` folder holds."""
    stored = folder / f"{name}.json"
    if folder.is_dir() and stored.exists() and not _holds(read_json_object(stored), result):
        status(f"{stored} holds another score; --json {stored} replaces it, and so does `relook eval` there.")
    return result


def _holds(stored: Any, result: Any) -> bool:
    """Return True if a stored result contains all figures of another, ignoring provenance and judge."""
    if not isinstance(result, dict):
        return bool(stored == result)
    figures = result.keys() - {"provenance", "judge"}
    return isinstance(stored, dict) and all(key in stored and _holds(stored[key], result[key]) for key in figures)


def match_records(benchmark: Benchmark, asked: Questions, records: Sequence[Mapping[str, Any]]) -> Answers:
    """Sort records into the order of the questions that they answer. Whole files of questions may be left out.

    Raises:
        DataError: there are no answers, a record has no id or text, ids occur twice or are unknown, questions have no
            answer, or a record repeats another question's text.
    """
    fields = f"{benchmark.id_field} and {benchmark.text_field}"
    if not records:
        raise DataError("There are no answers in the file.", f"Give records with {fields}.")
    for number, record in enumerate(records, 1):
        if benchmark.id_field not in record or not isinstance(record.get(benchmark.text_field), str):
            raise DataError(f"Answer {number} has not both {fields}.", "Give the benchmark's or relook's layout.")
    by_id = {str(record[benchmark.id_field]): record for record in records}
    counts = Counter(str(record[benchmark.id_field]) for record in records)
    begun = {s: questions for s, questions in asked.items() if any(q.id in by_id for q in questions)}
    known_ids = {question.id for questions in asked.values() for question in questions}
    field = benchmark.question_field
    faults = {
        "stand more than once": [id for id, count in counts.items() if count > 1],
        "have no question": [id for id in by_id if id not in known_ids],
        "are missing": [q.id for questions in begun.values() for q in questions if q.id not in by_id],
        "repeat another question": [
            q.id
            for questions in begun.values()
            for q in questions
            if q.id in by_id and field and by_id[q.id].get(field, q.text) != q.text
        ],
    }
    problems = [f"{len(ids)} {what} ({preview(ids)})" for what, ids in faults.items() if ids]
    if problems:
        raise DataError(f"Of the answers, {'; '.join(problems)}.", "Give the questions and answers of one run.")
    return {stem: [by_id[q.id] for q in questions] for stem, questions in begun.items()}


def _with_provenance(place: Path, asked: Questions, answers: Answers, **about: Any) -> dict[str, Any]:
    """Build a result's provenance: that of the answers, and the hash of the image list."""
    images = dict.fromkeys(question.image.name for stem in answers for question in asked[stem])
    return {"provenance": provenance(place, image_list=text_hash(*images), **about)}


def _chair_questions(data: Path) -> Questions:
    """Build questions for the annotated images, or for those in `chair_images.txt` if the data folder pins a list."""
    names = chair_images(read_coco(annotation_file(data)), data / "chair_images.txt")
    images = coco_images(data)
    return {"chair": [Question(name, resolve_extension(images / name), CHAIR_PROMPT) for name in names]}


def _score_shr(data: Path, asked: Questions, answers: Answers, place: Path, judge: Judge | None) -> dict[str, Any]:
    asked_so = dict(SHR.generate) if place.is_dir() else {}  # how other programs asked is unknown
    return shr.score_shr(data, SHR.texts(answers), judge) | _with_provenance(place, asked, answers, **asked_so)


def _amber_questions(data: Path) -> Questions:
    described, answered = amber.amber_questions(data)
    return {"amber_generative": described, "amber_discriminative": answered}


def _score_amber(data: Path, asked: Questions, answers: Answers, place: Path, judge: Judge | None) -> dict[str, Any]:
    result = amber.score_amber(data, [q for stem in answers for q in asked[stem]], AMBER.texts(answers))
    about = _with_provenance(place, asked, answers)
    generation = about["provenance"].get("generation", {})
    if longest := generation.get("max_new_tokens"):  # `relook eval` caps one-word answers at fewer tokens
        generation["max_new_tokens"] = {
            stem: min(longest, LONGEST_ANSWER) if stem in AMBER.yes_or_no else longest for stem in answers
        }
    return result | about


def _score_mmhal(data: Path, asked: Questions, answers: Answers, place: Path, judge: Judge | None) -> dict[str, Any]:
    assert judge is not None  # checked by `require_judge`
    return mmhal.score_mmhal(data, MMHAL.texts(answers), judge) | _with_provenance(place, asked, answers)


POPE = Benchmark(
    "POPE",
    lambda data: {f"pope_{split}": questions for split, questions in pope_questions(data).items()},
    lambda data, asked, answers, place, judge: pope_results(data, place),
    "question_id",
    "answer",
    yes_or_no=[f"pope_{split}" for split in SPLITS],
)
CHAIR = Benchmark(
    "descriptions for CHAIR",
    _chair_questions,
    lambda data, asked, answers, place, judge: chair_results(data, place),
    "image",
    "caption",
    question_field="",
)
SHR = Benchmark(
    "descriptions for SHR",
    lambda data: {"shr": shr.shr_questions(data)},
    _score_shr,
    "image_id",
    "description",
    question_field="",
    generate=(("num_beams", 5),),
    needs_judge=shr.needs_judge,
    judge_request=shr.REQUEST,
    read=shr.read_shr_descriptions,
)
AMBER = Benchmark(
    "AMBER",
    _amber_questions,
    _score_amber,
    "id",
    "response",
    question_field="query",
    number=True,
    yes_or_no=["amber_discriminative"],
)
MMHAL = Benchmark(
    "MMHal-Bench",
    lambda data: {"mmhal": mmhal.mmhal_questions(data)},
    _score_mmhal,
    "question_id",
    "model_answer",
    needs_judge=lambda data: True,
    judge_request=mmhal.REQUEST,
    read=mmhal.read_mmhal_answers,
)
BENCHMARKS = {"pope": POPE, "chair": CHAIR, "shr": SHR, "amber": AMBER, "mmhal": MMHAL}
