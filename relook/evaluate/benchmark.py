"""What all benchmarks share: the `Benchmark` value, checks of questions and answers, and `relook score`.

Each module of `relook.evaluate.tasks` defines one benchmark. Nothing here needs a model or its libraries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relook.console import status
from relook.data.samples import Question
from relook.errors import DataError, RecipeError, preview
from relook.evaluate.results import data_folder_of, provenance
from relook.evaluate.tasks import get_benchmark
from relook.files import file_hash, make_paths, read_json_object, read_records, text_hash

if TYPE_CHECKING:
    from relook.evaluate.judge import Judge, JudgeSettings

YES_NO_MAX_TOKENS = 64  # upper bound on the answer to a yes/no question
Questions = Mapping[str, Sequence[Question]]  # by the stem of the answer file
Answers = Mapping[str, Sequence[Mapping[str, Any]]]  # records by stem, in the order of the questions


@dataclass(frozen=True)
class ScoringInputs:
    """Inputs to score answers against: a data folder, or single files; `images` lists those that CHAIR describes."""

    data: Path | None = None
    questions: Path | None = None
    annotations: Path | None = None
    captions: Path | None = None
    images: Path | None = None

    def __post_init__(self) -> None:
        make_paths(self)


@dataclass(frozen=True)
class Benchmark:
    """Definition of one benchmark.

    Args:
        title: label of the progress bar.
        questions: reads the questions of a data folder, by the stem of their answer file.
        score: maps (data folder, questions, answers, folder or file of the answers, judge) to the result.
        id_field, text_field, question_field: keys of a record's question id, answer and question; with an empty
            `question_field`, records do not keep the question.
        numeric_ids: whether ids are numbers in records.
        yes_or_no: stems of files whose questions are answered with one word.
        generate: keyword arguments of transformers' `generate`.
        needs_judge: whether scoring a data folder needs a judge.
        judge_request: fields of the requests to a judge; None if no judge is asked.
        read_answers: reads an existing answer file in any layout that the benchmark knows.
        rescore: scores (an answer file of any program or a `relook eval` folder, inputs, parser). Without it, `relook
            score` matches the answers to the data folder's questions and calls `score`.
        compare: computes differences second - first of (data folder, first, second) runs, whose images are pooled.
        differing: lists the rows on which two answer folders differ: (data folder, first, second).
        ratings: keys of results that are ratings rather than fractions, with their ranges.
    """

    title: str
    questions: Callable[[Path], Questions]
    score: Callable[[Path, Questions, Answers, Path, Judge | None], dict[str, Any]]
    id_field: str
    text_field: str
    question_field: str = "question"
    numeric_ids: bool = False
    yes_or_no: Collection[str] = ()
    generate: tuple[tuple[str, Any], ...] = ()
    needs_judge: Callable[[Path], bool] = lambda data: False
    judge_request: Mapping[str, Any] | None = None
    read_answers: Callable[[Path], list[dict[str, Any]]] = read_records
    rescore: Callable[[Path, ScoringInputs, str], dict[str, Any]] | None = None
    compare: Callable[[Sequence[tuple[Path, Path, Path]]], dict[str, Any]] | None = None
    differing: Callable[[Path, Path, Path], list[dict[str, Any]]] | None = None
    ratings: Mapping[str, str] = field(default_factory=dict)

    def read_questions(self, data: str | Path) -> Questions:
        """Read the questions of a data folder.

        Raises:
            DataError: a file is missing, or a question's id occurs twice.
        """
        questions = self.questions(Path(data))
        for stem, of_file in questions.items():
            twice = [id for id, count in Counter(question.id for question in of_file).items() if count > 1]
            if twice:
                raise DataError(
                    f"{stem}: the questions {preview(twice)} stand more than once.", "Remove the duplicates."
                )
        return questions

    def record(self, question: Question, text: str) -> dict[str, Any]:
        """Build the record of one answer, a line of an answer file."""
        record: dict[str, Any] = {self.id_field: int(question.id) if self.numeric_ids else question.id}
        record.setdefault("image", question.image.name)  # unless the id is the image itself
        if self.question_field:
            record[self.question_field] = question.text
        return record | {self.text_field: text}

    def texts(self, answers: Answers) -> dict[str, str]:
        """Return answers by question id, over all files."""
        return {str(r[self.id_field]): r[self.text_field] for records in answers.values() for r in records}


def require_images(questions: Questions) -> None:
    """Check that all images exist before anything starts.

    Raises:
        DataError: images are missing; the message names the first and counts the others.
    """
    # Several questions share an image: look at each file once.
    images = dict.fromkeys(question.image for of_file in questions.values() for question in of_file)
    missing = [image for image in images if not image.is_file()]
    if missing:
        others_clause = f", nor do {len(missing) - 1} others" if missing[1:] else ""
        raise DataError(f"The image {missing[0]} does not exist{others_clause}.", "Check the image folder.")


def require_judge(name: str, data: Path, judge: object) -> None:
    """Check before anything starts that a benchmark can be scored.

    Raises:
        RecipeError: scoring needs a judge, and there is none.
    """
    if judge is None and get_benchmark(name).needs_judge(data):
        raise RecipeError(f"{name} is scored by a judge.", "Give --judge-url and --judge-model.")


def answers_provenance(location: Path, questions: Questions, answers: Answers, **details: Any) -> dict[str, Any]:
    """Build a result's provenance: that of the answers, and the hash of the image list."""
    images = dict.fromkeys(question.image.name for stem in answers for question in questions[stem])
    return {"provenance": provenance(location, image_list=text_hash(*images), **details)}


def require_option(path: Path | None, option: str, why: str) -> Path:
    """Return the path of an option; raise RecipeError if it was not given."""
    if path is None:
        raise RecipeError(f"{why}.", f"Give {option}.")
    return path


# ----------------------------------------------------------------------------------------------------
# `relook score`: answers that exist already.


def score_command(
    name: str,
    answers: Sequence[str | Path],
    inputs: ScoringInputs,
    parser: str = "official",
    judge: JudgeSettings | None = None,
) -> dict[str, Any]:
    """Score existing answer files, or a `relook eval` folder, as `relook score` does; no model is needed.

    Raises:
        RelookError: an unknown benchmark, a missing option, no judge where one is needed, or questions and answers that
            do not match; the message names the ids.
    """
    benchmark = get_benchmark(name)
    paths = [Path(path) for path in answers]
    first = paths[0]
    file_names = [path.name for path in paths]
    if len(paths) > 1 and (any(path.is_dir() for path in paths) or len(set(file_names)) < len(file_names)):
        raise RecipeError(
            f"{preview(file_names)}: several --answers are files of different names.", "Give a folder alone."
        )
    if benchmark.rescore:  # POPE and CHAIR take single files as the truth, too
        if len(paths) > 1:
            raise RecipeError(f"{name} is scored by one answer file.", "Give --answers once.")
        return _note_other_score(name, first, benchmark.rescore(first, inputs, parser))
    # A `relook eval` folder records its data folder; a single file of answers does not.
    data = inputs.data or (data_folder_of(first) if first.is_dir() else None)
    if data is None:
        raise RecipeError(f"{name} is scored by the benchmark's files.", "Give their folder as --data.")
    require_judge(name, data, judge)
    questions = benchmark.read_questions(data)
    files = [first / f"{stem}.jsonl" for stem in questions] if first.is_dir() else paths
    # Of a `relook eval` folder each stem has its file; files of other programs are named anyhow and may be one.
    matched = match_records(benchmark, questions, [record for path in files for record in benchmark.read_answers(path)])
    endpoint = judge.open(first if first.is_dir() else first.parent) if judge else None
    result = benchmark.score(data, questions, matched, first, endpoint)
    if len(paths) > 1:
        # `score` saw one location; record the hash of every file.
        result["provenance"]["answers_sha256"] = {path.name: file_hash(path) for path in paths}
    return _note_other_score(name, first, result)


def _note_other_score(name: str, folder: Path, result: dict[str, Any]) -> dict[str, Any]:
    """Return the result; print how to replace a different one that a `relook eval` folder holds."""
    stored = folder / f"{name}.json"
    if folder.is_dir() and stored.exists() and not _contains(read_json_object(stored), result):
        status(f"{stored} holds another score; --json {stored} replaces it, and so does `relook eval` there.")
    return result


def _contains(stored: Any, result: Any) -> bool:
    """Return True if a stored result contains all figures of another, ignoring provenance and judge."""
    if not isinstance(result, dict):
        return bool(stored == result)
    figures = result.keys() - {"provenance", "judge"}  # dates and token counts differ from one scoring to the next
    return isinstance(stored, dict) and all(key in stored and _contains(stored[key], result[key]) for key in figures)


def match_records(benchmark: Benchmark, questions: Questions, records: Sequence[Mapping[str, Any]]) -> Answers:
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
    # As strings: files differ in whether ids are numbers.
    by_id = {str(record[benchmark.id_field]): record for record in records}
    counts = Counter(str(record[benchmark.id_field]) for record in records)
    # AMBER's generative and discriminative parts may be answered alone: a part without any answer is left out.
    begun = {s: of_file for s, of_file in questions.items() if any(q.id in by_id for q in of_file)}
    known_ids = {question.id for of_file in questions.values() for question in of_file}
    field = benchmark.question_field
    faults = {
        "stand more than once": [id for id, count in counts.items() if count > 1],
        "have no question": [id for id in by_id if id not in known_ids],
        "are missing": [q.id for of_file in begun.values() for q in of_file if q.id not in by_id],
        "repeat another question": [
            q.id
            for of_file in begun.values()
            for q in of_file
            if q.id in by_id and field and by_id[q.id].get(field, q.text) != q.text
        ],
    }
    problems = [f"{len(ids)} {fault} ({preview(ids)})" for fault, ids in faults.items() if ids]
    if problems:
        raise DataError(f"Of the answers, {'; '.join(problems)}.", "Give the questions and answers of one run.")
    return {stem: [by_id[q.id] for q in of_file] for stem, of_file in begun.items()}
