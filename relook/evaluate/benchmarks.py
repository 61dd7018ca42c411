"""The benchmarks: each is a value that says what is asked of a data folder, how answers are kept, and what they score.

No model is needed here, and none of its libraries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relook.data.annotations import read_coco
from relook.data.samples import Question
from relook.errors import DataError, RecipeError, some
from relook.evaluate.judge import JUDGE_CACHE, Judge, JudgeSettings
from relook.evaluate.results import provenance
from relook.evaluate.score import (
    RESULTS,
    Given,
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
from relook.files import file_hash, read_records, text_hash

CHAIR_PROMPT = "Describe this image in detail."
Asked = Mapping[str, Sequence[Question]]  # by the stem of the answer file
Answers = Mapping[str, Sequence[Mapping[str, Any]]]  # records by stem, in the order of the questions


@dataclass(frozen=True)
class Benchmark:
    """What makes one benchmark differ from another.

    Args:
        title: beside the progress bar.
        questions: those of a data folder, by the stem of the answer file that they go to.
        score: of (data folder, questions, answers, where they lie, judge), the result.
        id_field, text_field, question_field: where a record keeps the question's id, the answer, and the question; an
            empty last one keeps none.
        number: whether ids are numbers in records.
        yes_or_no: stems of files whose questions are answered by a word.
        generate: settings of transformers' `generate`.
        needs_judge: whether scores of a data folder need a judge.
        read: an existing answer file of any layout that the benchmark knows.
    """

    title: str
    questions: Callable[[Path], Asked]
    score: Callable[[Path, Asked, Answers, Path, Judge | None], dict[str, Any]]
    id_field: str
    text_field: str
    question_field: str = "question"
    number: bool = False
    yes_or_no: Collection[str] = ()
    generate: tuple[tuple[str, Any], ...] = ()
    needs_judge: Callable[[Path], bool] = lambda data: False
    read: Callable[[Path], list[dict[str, Any]]] = read_records

    def record(self, question: Question, text: str) -> dict[str, Any]:
        """A line of an answer file."""
        record: dict[str, Any] = {self.id_field: int(question.id) if self.number else question.id}
        record.setdefault("image", question.image.name)  # where the image is not the id itself
        if self.question_field:
            record[self.question_field] = question.text
        return record | {self.text_field: text}

    def texts(self, answers: Answers) -> dict[str, str]:
        """Answers by question id, of all files together."""
        return {str(r[self.id_field]): r[self.text_field] for records in answers.values() for r in records}


def known(names: Sequence[str]) -> list[Benchmark]:
    """Benchmarks by name.

    Raises:
        RecipeError: there is none of that name.
    """
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise RecipeError(f"There is no benchmark {some(unknown)}.", f"Known ones: {', '.join(BENCHMARKS)}.")
    return [BENCHMARKS[name] for name in names]


def read_questions(name: str, data: Path) -> Asked:
    """A benchmark's questions.

    Raises:
        DataError: a file is missing, or a question's id stands twice.
    """
    asked = BENCHMARKS[name].questions(data)
    for stem, questions in asked.items():
        twice = [id for id, count in Counter(question.id for question in questions).items() if count > 1]
        if twice:
            raise DataError(f"{stem}: the questions {some(twice)} stand more than once.", "Remove the duplicates.")
    return asked


def require_images(asked: Asked) -> None:
    """Refuse to begin where images are missing.

    Raises:
        DataError: the first of them, and how many there are.
    """
    images = dict.fromkeys(question.image for questions in asked.values() for question in questions)
    missing = [image for image in images if not image.is_file()]
    if missing:
        others = f", nor do {len(missing) - 1} others" if missing[1:] else ""
        raise DataError(f"The image {missing[0]} does not exist{others}.", "Check the image folder.")


def require_judge(name: str, data: Path, judge: object) -> None:
    """Refuse to begin what could not be scored.

    Raises:
        RecipeError: the benchmark's scores need a judge, and there is none.
    """
    if judge is None and BENCHMARKS[name].needs_judge(data):
        raise RecipeError(f"{name} is scored by a judge.", "Give --judge-url and --judge-model.")


def score_command(
    name: str, answers: Sequence[Path], given: Given, parser: str, judge: JudgeSettings | None
) -> dict[str, Any]:
    """`relook score`: existing answer files, or a folder of `relook eval`; no model is needed.

    Raises:
        RelookError: an unknown benchmark, a missing option, no judge where one is needed, or questions and answers that
            do not match; the ids are named.
    """
    (benchmark,) = known([name])
    first = answers[0]
    names = [path.name for path in answers]
    if len(answers) > 1 and (any(path.is_dir() for path in answers) or len(set(names)) < len(names)):
        raise RecipeError(f"{some(names)}: several --answers are files of different names.", "Give a folder alone.")
    if name in RESULTS:
        if len(answers) > 1:
            raise RecipeError(f"{name} is scored by one answer file.", "Give --answers once.")
        return score_answers(name, first, given, parser)
    data = given.data or (data_of(first) if first.is_dir() else None)
    if data is None:
        raise RecipeError(f"{name} is scored by the benchmark's files.", "Give their folder as --data.")
    require_judge(name, data, judge)
    asked = read_questions(name, data)
    files = [first / f"{stem}.jsonl" for stem in asked] if first.is_dir() else answers
    found = match(benchmark, asked, [record for path in files for record in benchmark.read(path)])
    cache = (first if first.is_dir() else first.parent) / JUDGE_CACHE
    result = benchmark.score(data, asked, found, first, Judge(judge, cache) if judge else None)
    if len(answers) > 1:
        result["provenance"]["answers_sha256"] = {path.name: file_hash(path) for path in answers}
    return result


def match(benchmark: Benchmark, asked: Asked, records: Sequence[Mapping[str, Any]]) -> Answers:
    """Records in the order of the questions that they answer. A file's worth of questions may be left out as a whole.

    Raises:
        DataError: there are no answers, a record has no id or text, ids stand twice or are unknown, questions have no
            answer, or a record repeats another question.
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
    problems = [f"{len(ids)} {what} ({some(ids)})" for what, ids in faults.items() if ids]
    if problems:
        raise DataError(f"Of the answers, {'; '.join(problems)}.", "Give the questions and answers of one run.")
    return {stem: [by_id[q.id] for q in questions] for stem, questions in begun.items()}


def _from(place: Path, asked: Asked, answers: Answers, **about: Any) -> dict[str, Any]:
    """Provenance of a result: that of the answers, and the hash of the image list."""
    images = dict.fromkeys(question.image.name for stem in answers for question in asked[stem])
    return {"provenance": provenance(place, image_list=text_hash(*images), **about)}


def _chair_questions(data: Path) -> Asked:
    """Descriptions of the images of the annotation file, or of `chair_images.txt` where the data folder pins a list."""
    names = chair_images(read_coco(annotation_file(data)), data / "chair_images.txt")
    return {"chair": [Question(name, data / "val2014" / name, CHAIR_PROMPT) for name in names]}


def _score_shr(data: Path, asked: Asked, answers: Answers, place: Path, judge: Judge | None) -> dict[str, Any]:
    asked_so = dict(SHR.generate) if place.is_dir() else {}  # how others asked is not known
    return shr.score(data, SHR.texts(answers), judge) | _from(place, asked, answers, **asked_so)


def _amber_questions(data: Path) -> Asked:
    described, answered = amber.questions(data)
    return {"amber_generative": described, "amber_discriminative": answered}


def _score_amber(data: Path, asked: Asked, answers: Answers, place: Path, judge: Judge | None) -> dict[str, Any]:
    result = amber.score(data, [q for stem in answers for q in asked[stem]], AMBER.texts(answers))
    about = _from(place, asked, answers)
    generation = about["provenance"].get("generation", {})
    if longest := generation.get("max_new_tokens"):  # as `relook eval` asks: questions for a word less than others
        generation["max_new_tokens"] = {
            stem: min(longest, LONGEST_ANSWER) if stem in AMBER.yes_or_no else longest for stem in answers
        }
    return result | about


def _score_mmhal(data: Path, asked: Asked, answers: Answers, place: Path, judge: Judge | None) -> dict[str, Any]:
    assert judge is not None  # `require_judge` has seen to it
    return mmhal.score(data, MMHAL.texts(answers), judge) | _from(place, asked, answers)


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
    lambda data: {"shr": shr.questions(data)},
    _score_shr,
    "image_id",
    "description",
    question_field="",
    generate=(("num_beams", 5),),
    needs_judge=shr.needs_judge,
    read=shr.read_descriptions,
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
    lambda data: {"mmhal": mmhal.questions(data)},
    _score_mmhal,
    "question_id",
    "model_answer",
    needs_judge=lambda data: True,
    read=mmhal.read_answers,
)
BENCHMARKS = {"pope": POPE, "chair": CHAIR, "shr": SHR, "amber": AMBER, "mmhal": MMHAL}
