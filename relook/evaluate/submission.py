"""`relook submission`: answers in LLaVA's layout, as the benchmarks' servers and official scripts want them.

Each benchmark is a function from answers, and the benchmark's own file where it needs one, to what is written.
Formats: haotian-liu/LLaVA `scripts/convert_*_for_*.py`; MME: `convert_answer_to_mme.py` of its eval.zip.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relook.errors import DataError, RecipeError, some
from relook.evaluate.llava import has_value, read_table
from relook.evaluate.vqa_answer import vqa_answer
from relook.files import read_object, read_records, read_text, some_records, whole_file, whole_folder, write_text

Answers = Sequence[Mapping[str, Any]]  # in LLaVA's layout: question_id, prompt, text
Table = list[list[Any]]  # rows, the first one of column names
Written = str | Table | dict[str, str]  # a file's text, a table, or a folder's files by name

NOT_SUBMITTED = {"hint", "category", "source", "image", "comment", "l2-category"}
NO_NEED = {
    "scienceqa": "llava/eval/eval_science_qa.py",
    "textvqa": "llava/eval/eval_textvqa.py",
    "pope": "relook score pope --annotations",
    "llava-bench": "llava/eval/eval_gpt_review_bench.py",
}


@dataclass(frozen=True)
class Submission:
    """How one benchmark's answers are handed in.

    Args:
        make: of the answers and the benchmark's file.
        questions: what that file is; empty where none is needed.
    """

    make: Callable[[Answers, Path], Written]
    questions: str = ""


def write_submission(name: str, answers: str | Path, out: str | Path, questions: str | Path | None) -> dict[str, Any]:
    """Convert an answer file, and write what the benchmark's server takes.

    Raises:
        RelookError: an unknown benchmark, one that needs no conversion, a missing option, or answers that do not fit
            the questions.
    """
    answers, out = Path(answers), Path(out)
    questions = None if questions is None else Path(questions)
    if name in NO_NEED:
        raise RecipeError(f"{name} takes LLaVA's answers as they are.", f"Score them: {NO_NEED[name]}.")
    if name not in SUBMISSIONS:
        raise RecipeError(f"There is no submission {name!r}.", f"Known ones: {', '.join(SUBMISSIONS)}.")
    submission = SUBMISSIONS[name]
    if bool(questions) != bool(submission.questions):
        wanted = f"Give {submission.questions}." if submission.questions else "Leave it out."
        raise RecipeError(f"{name} {'needs' if submission.questions else 'reads no'} --questions.", wanted)
    records = some_records(answers, "Give LLaVA's answers.")
    for number, record in enumerate(records, 1):
        if "question_id" not in record or not isinstance(record.get("text"), str):
            raise DataError(f"{answers}: answer {number} has not both question_id and text.", "Give LLaVA's layout.")
    made = submission.make(records, questions or Path())
    _write(out, made)
    return {"submission": str(out), "answers": len(records)}


def _by_id(answers: Answers) -> dict[str, str]:
    """Texts by question id, as a string: files differ in whether ids are numbers."""
    twice = [id for id, count in Counter(str(answer["question_id"]) for answer in answers).items() if count > 1]
    if twice:
        raise DataError(f"The answers to {some(twice)} stand more than once.", "Remove the duplicates.")
    return {str(answer["question_id"]): answer["text"] for answer in answers}


def _matched(answers: Answers, ids: Sequence[Any], all_of_them: bool = True) -> list[str | None]:
    """The texts that belong to some question ids, in order; None where there is none and that may be.

    Raises:
        DataError: answers to other questions, or questions without an answer.
    """
    texts, known = _by_id(answers), {str(id) for id in ids}
    strange = [id for id in texts if id not in known]
    if strange:
        raise DataError(f"{len(strange)} answers have no question ({some(strange)}).", "Give their question file.")
    missing = [id for id in ids if str(id) not in texts]
    if missing and all_of_them:
        raise DataError(f"{len(missing)} questions have no answer ({some(missing)}).", "Answer them all first.")
    return [texts.get(str(id)) for id in ids]


def _vqav2(answers: Answers, questions: Path) -> str:
    """Every question of the test set, of which a split is answered; the others' answers are empty."""
    ids = [record["question_id"] for record in _asked(questions, "question_id")]
    texts = _matched(answers, ids, all_of_them=False)
    return json.dumps(
        [
            {"question_id": id, "answer": "" if text is None else vqa_answer(text)}
            for id, text in zip(ids, texts, strict=True)
        ]
    )


def _vizwiz(answers: Answers, questions: Path) -> str:
    """By image."""
    asked = _asked(questions, "question_id", "image")
    texts = _matched(answers, [record["question_id"] for record in asked])
    return json.dumps(
        [
            {"image": record["image"], "answer": vqa_answer(text or "")}
            for record, text in zip(asked, texts, strict=True)
        ]
    )


def _gqa(answers: Answers, questions: Path) -> str:
    """For GQA's own eval.py."""
    _by_id(answers)
    said = [(answer["question_id"], answer["text"]) for answer in answers]
    return json.dumps([{"questionId": id, "prediction": text.rstrip(".").lower()} for id, text in said])


def _mmvet(answers: Answers, questions: Path) -> str:
    """For MM-Vet's judge."""
    return json.dumps({f"v1_{id}": text for id, text in _by_id(answers).items()}, indent=2)


def _seed(answers: Answers, questions: Path) -> str:
    """JSON lines in the order of the benchmark's file."""
    asked = read_object(questions).get("questions")
    if not isinstance(asked, list) or not all(isinstance(one, dict) and "question_id" in one for one in asked):
        raise DataError(f"{questions} has no questions with question_id.", f"Give {SUBMISSIONS['seed'].questions}.")
    ids = [one["question_id"] for one in asked]
    lines = [{"question_id": id, "prediction": text} for id, text in zip(ids, _matched(answers, ids), strict=True)]
    return "".join(json.dumps(line) + "\n" for line in lines)


def _mmbench(answers: Answers, questions: Path) -> Table:
    """The table without pictures and whatever the server knows, with a column of predictions."""
    rows = read_table(read_text(questions), str(questions))
    columns = [name for name in rows[0] if name not in NOT_SUBMITTED]
    columns.insert(6, "prediction")
    texts = _matched(answers, [row["index"] for row in rows])
    filled = [{**row, "prediction": text or ""} for row, text in zip(rows, texts, strict=True)]
    return [columns, *([_cell(name, row[name]) for name in columns] for row in filled)]


def _cell(column: str, text: str) -> Any:
    if column == "index" and text.isdecimal():
        return int(text)
    return text if column == "prediction" or has_value(text) else None


def _mme(answers: Answers, questions: Path) -> dict[str, str]:
    """A file for each category, for MME's calculation.py: picture, question, truth and answer in a line."""
    truths = {}
    for file in sorted(questions.glob("*/*.txt")) + sorted(questions.glob("*/questions_answers_YN/*.txt")):
        category = file.relative_to(questions).parts[0]
        for line in read_text(file).splitlines():
            question, _, truth = line.strip().partition("\t")
            truths[category, file.name, " ".join(question.split())] = (question, truth)
    lines: dict[str, list[str]] = {}
    answered = set()
    for answer in answers:
        id = str(answer["question_id"])
        category, name = id.split("/")[0], f"{id.split('/')[-1].split('.')[0]}.txt"
        asked = str(answer.get("prompt", "")).replace("Answer the question using a single word or phrase.", "").strip()
        if "Please answer yes or no." not in asked:
            asked += " Please answer yes or no."
        key = (category, name, " ".join(asked.split()))  # some of MME's questions have two spaces
        if key not in truths:
            raise DataError(f"MME does not ask {asked!r} about {id}.", "Check --questions and the answers.")
        answered.add(key)
        said = " ".join(answer["text"].split())  # a line is an answer
        lines.setdefault(f"{category}.txt", []).append("\t".join((name, *truths[key], said)) + "\n")
    missing = [" ".join(key) for key in truths if f"{key[0]}.txt" in lines and key not in answered]
    if missing:  # calculation.py takes two in a row for those of one picture
        raise DataError(f"{len(missing)} questions have no answer ({some(missing)}).", "Answer them all first.")
    return {name: "".join(said) for name, said in lines.items()}


def _asked(path: Path, *fields: str) -> list[dict[str, Any]]:
    records = read_records(path)
    for number, record in enumerate(records, 1):
        lacking = [name for name in fields if name not in record]
        if lacking:
            raise DataError(f"{path}: question {number} has no {some(lacking)}.", "Give LLaVA's question file.")
    return records


SUBMISSIONS = {
    "vqav2": Submission(_vqav2, "LLaVA's llava_vqav2_mscoco_test2015.jsonl"),
    "vizwiz": Submission(_vizwiz, "LLaVA's llava_test.jsonl"),
    "gqa": Submission(_gqa),
    "mmbench": Submission(_mmbench, "the table that was asked, as mmbench_dev_20230712.tsv"),
    "mmbench-cn": Submission(_mmbench, "the table that was asked, as mmbench_dev_cn_20231003.tsv"),
    "seed": Submission(_seed, "SEED-Bench.json"),
    "mm-vet": Submission(_mmvet),
    "mme": Submission(_mme, "the folder MME_Benchmark_release_version"),
}


def _write(out: Path, made: Written) -> None:
    if isinstance(made, str):
        write_text(out, made)
    elif isinstance(made, dict):
        if out.exists():
            raise RecipeError(f"{out} exists.", "Choose another --out.")
        with whole_folder(out) as folder:
            for name, text in made.items():
                write_text(folder / name, text)
    elif out.suffix == ".xlsx":
        _write_sheet(out, made)
    else:
        lines = io.StringIO(newline="")
        csv.writer(lines, delimiter="\t", lineterminator="\n").writerows(made)
        write_text(out, lines.getvalue())


def _write_sheet(out: Path, rows: Table) -> None:
    try:
        from openpyxl import Workbook
        from openpyxl.cell import WriteOnlyCell
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE
    except ImportError:
        raise RecipeError(
            "An .xlsx file needs openpyxl.", "Run: pip install 'relook[lmms]'; or name a .tsv file."
        ) from None
    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    for row in rows:
        cells = [
            WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", cell) if isinstance(cell, str) else cell) for cell in row
        ]
        for cell, value in zip(cells, row, strict=True):
            if isinstance(value, str):
                cell.data_type = "s"  # an answer that begins with = is no formula
        sheet.append(cells)
    with whole_file(out) as temporary:
        book.save(temporary)
