"""RePOPE (Neuhaus & Hein 2025, arXiv:2504.15707): POPE's questions with corrected labels.

Its files (YanNeu/RePOPE) leave out ambiguous questions, and so do these scores. The answers of a POPE run are scored
as they are; `relook eval repope` answers the remaining questions alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relook.data.paths import coco_images, pope_file
from relook.data.samples import Question
from relook.errors import DataError
from relook.evaluate.benchmark import YES_NO_MAX_TOKENS, Benchmark, ScoringInputs, require_option
from relook.evaluate.results import data_folder_of, provenance
from relook.evaluate.tasks.pope import (
    SPLITS,
    pope_questions,
    question_hashes,
    read_pope_answers,
    read_pope_questions,
    require_parser,
    score_pope,
)

SOURCE = "It comes from github.com/YanNeu/RePOPE, annotations/."


def repope_questions(data: Path) -> dict[str, list[Question]]:
    """Read the questions by split; the files are beside POPE's, or in `data/repope`.

    Raises:
        DataError: a file is missing.
    """
    questions = {}
    for split in SPLITS:
        name = f"coco_repope_{split}.json"
        path = next((p for p in (data / "repope" / name, pope_file(data, split).with_name(name)) if p.exists()), None)
        if path is None:
            raise DataError(f"There is no {name} in {data / 'repope'}.", SOURCE)
        questions[split] = read_pope_questions(path, coco_images(data))
    return questions


def answers_to(
    questions: Sequence[Question], answers: Sequence[Mapping[str, Any]], pope: Sequence[Question]
) -> list[dict[str, Any]]:
    """Select the answers to `questions` among those to a run's POPE questions, matched by image and text."""
    # LLaVA's texts have a second line, and its ids are others: only image and first line identify a question.
    id_of = {(question.image.name, question.text): question.id for question in questions}
    renamed = {question.id: id_of.get((question.image.name, question.text.split("\n")[0])) for question in pope}
    matched = ((renamed.get(str(record["question_id"])), record) for record in answers)
    return [{"question_id": id, "answer": record.get("answer", record.get("text"))} for id, record in matched if id]


def repope_results(data: Path, folder: Path, parser: str = "official") -> dict[str, Any]:
    """Compute the contents of `repope.json`, from the folder's own answers or else from those of its POPE run."""
    questions = repope_questions(data)
    paths = {split: folder / f"repope_{split}.jsonl" for split in SPLITS}
    answers = {split: read_pope_answers(path) for split, path in paths.items() if path.exists()}
    left_out: dict[str, int] = {}
    if not answers:
        pope = pope_questions(data)
        records = {split: read_pope_answers(folder / f"pope_{split}.jsonl") for split in SPLITS}
        answers = {split: answers_to(questions[split], records[split], pope[split]) for split in SPLITS}
        left_out = {split: len(records[split]) - len(answers[split]) for split in SPLITS}
    results: dict[str, Any] = {split: score_pope(questions[split], answers[split], parser) for split in answers}
    for split, count in left_out.items():
        results[split]["left_out"] = count
    hashes = question_hashes(questions)
    return {**results, "provenance": provenance(folder, YES_NO_MAX_TOKENS, parser=parser, **hashes)}


def rescore_repope(answers: Path, inputs: ScoringInputs, parser: str = "official") -> dict[str, Any]:
    """Score a `relook eval` folder, or one answer file with ids against one of RePOPE's files.

    Raises:
        RelookError: something is missing, or a question has no answer.
    """
    require_parser(parser)
    if answers.is_dir():
        return repope_results(inputs.data or data_folder_of(answers), answers, parser)
    file = require_option(inputs.questions, "--questions, RePOPE's file", "There are no questions to an answer file")
    questions, records = read_pope_questions(file, Path()), read_pope_answers(answers)
    if any("question_id" not in record for record in records):
        raise DataError(f"{answers} has no question_id, so it is unclear which answers count.", "Add POPE's ids.")
    ids = {question.id for question in questions}
    labelled = [record for record in records if str(record["question_id"]) in ids]
    scores = {**score_pope(questions, labelled, parser), "left_out": len(records) - len(labelled)}
    return {**scores, "provenance": provenance(answers, parser=parser, **question_hashes({file.stem: questions}))}


BENCHMARK = Benchmark(
    "RePOPE",
    questions=lambda data: {f"repope_{split}": questions for split, questions in repope_questions(data).items()},
    score=lambda data, questions, answers, folder, judge: repope_results(data, folder),
    id_field="question_id",
    text_field="answer",
    yes_or_no=[f"repope_{split}" for split in SPLITS],
    rescore=rescore_repope,
)
