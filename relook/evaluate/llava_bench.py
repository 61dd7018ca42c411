"""`relook eval llava`: LLaVA's question files, answered into its answer layout, which other programs score.

Question files come in three layouts, told apart by their content (haotian-liu/LLaVA, `model_vqa.py`,
`model_vqa_science.py`, `model_vqa_mmbench.py`): question lines, ScienceQA's conversations, and MMBench's table with
pictures in it.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from relook import distributed
from relook.console import progress
from relook.data.images import EncodedImage, Shown
from relook.data.paths import resolve_extension
from relook.data.samples import IMAGE_COUNT
from relook.data.templates import IMAGE, with_image
from relook.errors import DataError, Faults, RecipeError, did_you_mean, preview
from relook.evaluate.results import AnswerFile, provenance
from relook.evaluate.run import append_answers, begin_evaluation, shard_images
from relook.files import (
    atomic_file,
    atomic_folder,
    file_hash,
    read_json,
    read_json_object,
    read_published_records,
    read_records,
    read_text,
    text_hash,
    write_json,
    write_text,
    writes_alone,
)
from relook.generate.answering import AnswerSource, GenerationSettings, answer_questions
from relook.model.load import LoadOptions

# ----------------------------------------------------------------------------------------------------

NAME = "llava"  # of the answer file and of the result
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
OPTIONS = "ABCD"
# Cells that pandas, with which LLaVA reads MMBench's tables, reads as missing. "Na" (sodium) is a value.
NO_VALUE = {"", "N/A", "n/a", "NA", "<NA>", "NULL", "null", "NaN", "nan", "-NaN", "-nan", "None"}
NO_VALUE |= {"#N/A", "#N/A N/A", "#NA", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"}


@dataclass(frozen=True)
class LlavaQuestion:
    """Question of one of LLaVA's files.

    Args:
        text: prompt as the model reads it.
        prompt: prompt as LLaVA writes it beside the answer.
        extra: further fields of the answer's record.
        repeat: number of equal questions before this one in the file.
    """

    id: Any
    images: tuple[Shown, ...]
    text: str
    prompt: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    repeat: int = 0

    @property
    def key(self) -> str:
        """Return the hash by which the answer is known again."""
        # Ids are not enough: TextVQA's are those of images, and several questions share one.
        return text_hash(str(self.id), self.prompt, *[str(self.repeat)] * bool(self.repeat))

    def answer_record(self, text: str, model: str) -> dict[str, Any]:
        """Build the answer's record as LLaVA writes it; the `answer_id`, random there, is the question's key here."""
        record = {"question_id": self.id, **self.extra, "prompt": self.prompt, "text": text}
        return {**record, "answer_id": self.key, "model_id": model, "metadata": {}}


@writes_alone(lambda model, questions, data, out, *_, **__: Path(out))
def answer_question_file(
    model: str | Path,
    questions: str | Path,
    data: str | Path | None,
    out: str | Path,
    template: str = "",
    batch_size: int = 64,
    max_new_tokens: int = 512,
    loading: AnswerSource = LoadOptions(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Answer a question file into `out/llava.jsonl`, in its order; questions with an answer there are not asked again.

    Args:
        data: folder of the images; text-only questions and tables with pictures in them need none.

    Returns:
        The path of the answer file, the number of answers and their provenance, as written to `out/llava.json`.

    Raises:
        RelookError: a question file that cannot be used, a missing image, or an output folder with other answers.
    """
    folder, questions, out = loading.open(model), Path(questions), Path(out)
    data = None if data is None else Path(data)
    file_questions = read_llava_bench_questions(questions, data)
    settings = GenerationSettings(template, max_new_tokens, batch_size)
    settings = begin_evaluation(out, folder, data, settings, loading, questions=file_hash(questions))
    result_path = out / f"{NAME}.json"
    if not result_path.exists():
        file = AnswerFile(out / f"{NAME}.jsonl", "answer_id", distributed.rank())
        images = shard_images(question.images for question in file_questions)
        missing = [q for q in file_questions if q.images in images and q.key not in file.records]
        if missing:
            answerer = loading.load(folder)
            with progress(questions.name) as report:
                prompts = [(question.images, question.text) for question in missing]
                append_answers(
                    answer_questions(answerer, prompts, settings, report),
                    lambda i, text: (file, missing[i].answer_record(text, folder.path.name)),
                    [file],
                    batch_size,
                )
        distributed.barrier("the answers")
        if distributed.is_main():
            records = AnswerFile(file.path, "answer_id").finish([question.key for question in file_questions])
            result = {"answers": str(file.path), "n": len(records), "provenance": provenance(out)}
            write_json(result_path, result)
        distributed.barrier("the result")
    stored: dict[str, Any] = read_json(result_path)
    return stored


def read_llava_bench_questions(path: str | Path, images: str | Path | None) -> list[LlavaQuestion]:
    """Read the questions of a file in one of LLaVA's layouts.

    Raises:
        DataError: there is no question, one has no id or text, images are missing, or questions have `<image>`, but not
            one for each image.
    """
    path = Path(path)
    images = None if images is None else Path(images)
    if "\t" in (text := read_text(path))[:4096].partition("\n")[0]:
        rows = read_table(text, str(path))
        # A row of MMBench has its picture as base64, or the index of the row that has it.
        pictures = {row["index"]: row["image"] for row in rows}
        questions = [_of_row({**row, "image": pictures.get(row["image"], row["image"])}) for row in rows]
    else:
        questions = [
            _of_record(record, images, f"{path}: question {number}")
            for number, record in enumerate(read_records(path), 1)
        ]
    if not questions:
        raise DataError(f"{path} holds no question.", "Give a question file.")
    # Number equal questions, so that each has a key, and so an answer, of its own.
    seen: Counter[str] = Counter()
    for index, question in enumerate(questions):
        questions[index] = replace(question, repeat=seen[question.key])
        seen[question.key] += 1
    # Pictures in a table are in memory; only paths can be missing.
    files = dict.fromkeys(image for question in questions for image in question.images if isinstance(image, Path))
    missing = [image for image in files if not image.is_file()]
    faults = Faults()
    if missing:
        faults.errors.append(DataError(f"{len(missing)} images do not exist: {preview(missing, 2)}.", "Check --data."))
    if wrong := [question.id for question in questions if question.text.count(IMAGE) not in (0, len(question.images))]:
        problem = f"{len(wrong)} questions: {IMAGE_COUNT} ({preview(wrong, 3)})."
        faults.errors.append(DataError(problem, f"Write {IMAGE} once for each image, or not at all."))
    faults.check()
    return questions


def _of_record(record: Mapping[str, Any], images: Path | None, location: str) -> LlavaQuestion:
    try:
        return (_of_conversation if "conversations" in record else _of_line)(record, images)
    except (KeyError, TypeError, IndexError, AttributeError):
        raise DataError(f"{location} is in none of LLaVA's layouts.", "See docs/lmms-eval.md.") from None


def _of_line(record: Mapping[str, Any], images: Path | None) -> LlavaQuestion:
    """Read `{"question_id", "image"?, "text", "category"?}`; `image` is a name or a list of names."""
    return LlavaQuestion(record["question_id"], _images(record, images), str(record["text"]), str(record["text"]))


def _of_conversation(record: Mapping[str, Any], images: Path | None) -> LlavaQuestion:
    """Read ScienceQA's `{"id", "image"?, "conversations": [{"value"}, ...]}`, and ask for a letter, as LLaVA-1.5."""
    text, shown = record["conversations"][0]["value"], _images(record, images)
    if len(shown) < 2:  # several stay where they are
        text = text.replace(IMAGE, "")
    text = f"{text.strip()}\n{LETTER}"
    return LlavaQuestion(record["id"], shown, text, with_image(text, len(shown)))


def _images(record: Mapping[str, Any], images: Path | None) -> tuple[Path, ...]:
    image_field = record.get("image")
    names = image_field if isinstance(image_field, list) else [image_field] if image_field else []
    if names and images is None:
        raise DataError("The questions are about images.", "Give their folder as --data.")
    return tuple(resolve_extension(Path(images or "", name)) for name in names)


def read_table(text: str, name: str) -> list[dict[str, str]]:
    """Read the rows of a tab-separated table in MMBench's layout.

    Raises:
        DataError: the table is empty or lacks a column, or a row has another number of columns.
    """
    csv.field_size_limit(1 << 31)  # pictures, as base64, are far longer than the default limit
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t")
    rows = list(reader)
    lacking = {"index", "question", "image", "A", "B"} - set(reader.fieldnames or ())
    if lacking:
        raise DataError(f"{name} has no column {preview(sorted(lacking))}.", "Give one of MMBench's tables.")
    if not rows:
        raise DataError(f"{name} has no rows.", "Give one of MMBench's tables.")
    torn = [number for number, row in enumerate(rows, 2) if None in row or None in row.values()]
    if torn:
        raise DataError(f"{name}: row {torn[0]} has another number of columns.", "Download it again.")
    return rows


def _of_row(row: Mapping[str, str]) -> LlavaQuestion:
    """Read a row of MMBench: hint, question and options; a Chinese question gets a Chinese instruction."""
    index = int(row["index"]) if row["index"].isdecimal() else row["index"]
    options = []
    for letter in OPTIONS:  # the first missing option ends the list, as in LLaVA
        if not has_value(row.get(letter, "")):
            break
        options.append(row[letter])
    hint = row.get("hint", "")
    lines = [*([hint] if has_value(hint) else []), row["question"]]
    prompt = "\n".join([*lines, *(f"{letter}. {option}" for letter, option in zip(OPTIONS, options, strict=False))])
    letter = LETTER_CN if re.search("[\u4e00-\u9fff]", row["question"]) else LETTER
    try:
        picture = EncodedImage(base64.b64decode(row["image"], validate=True), f"of question {index}")
    except (binascii.Error, ValueError):
        raise DataError(f"The image of question {index} is not base64.", "Download the table again.") from None
    extra = {"round_id": 0, "options": options, "option_char": list(OPTIONS[: len(options)])}
    return LlavaQuestion(index, (picture,), f"{prompt}\n{letter}", prompt, extra)


def has_value(text: str) -> bool:
    """Return True if a table's cell has a value, to pandas and to LLaVA."""
    return text not in NO_VALUE and text.lower() not in ("nan", "none")


# ----------------------------------------------------------------------------------------------------
# The normalized form in which VQA's servers compare answers (EvalAI; mmf's and LLaVA's `EvalAIAnswerProcessor`).

# Words that may have lost one of their apostrophes. The original's capitalized entries never match lower-case text.
_WHOLE = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()  # noqa: SIM905 (a table)
_CONTRACTIONS = {word[:i] + word[i + 1 :]: word for word in _WHOLE for i, letter in enumerate(word) if letter == "'"}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # an error of the original table, which the servers share
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_PERIODS = 32  # full stops removed at most: the original passes re.UNICODE (32) where re.sub expects a count


def vqa_answer(text: str) -> str:
    """Normalize an answer: lower case, numbers as digits, no articles, no punctuation.

    The steps, and their oddities, are those of `EvalAIAnswerProcessor`.
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    stripped = text.replace("\n", " ").replace("\t", " ").strip()
    text = stripped
    for mark in _PUNCTUATION:  # a mark beside a space is dropped everywhere, any other becomes a space
        at_edge = f"{mark} " in stripped or f" {mark}" in stripped
        text = text.replace(mark, "" if at_edge else " ")
    # A full stop stays in a number, as in 3.5.
    text = re.sub(r"\.(?!\d)", "", text, count=_PERIODS)
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


# ----------------------------------------------------------------------------------------------------
# `relook submission`: converts answers in LLaVA's layout to what the benchmarks' servers and official scripts take.
#
# Each benchmark has a function that maps the answers, and the benchmark's own file if it needs one, to the content.
# Formats: haotian-liu/LLaVA `scripts/convert_*_for_*.py`; MME: `convert_answer_to_mme.py` of its eval.zip.

LlavaAnswers = Sequence[Mapping[str, Any]]  # in LLaVA's layout: question_id, prompt, text
Table = list[list[Any]]  # rows, the first one of column names
Content = str | Table | dict[str, str]  # a file's text, a table, or a folder's files by name

NOT_SUBMITTED = {"hint", "category", "source", "image", "comment", "l2-category"}
SCORED_AS_IS = {
    "scienceqa": "llava/eval/eval_science_qa.py",
    "textvqa": "llava/eval/eval_textvqa.py",
    "pope": "relook score pope --annotations",
    "llava-bench": "llava/eval/eval_gpt_review_bench.py",
}


@dataclass(frozen=True)
class Submission:
    """Submission format of one benchmark.

    Args:
        convert: maps the answers and the path of the benchmark's own file to the content.
        questions: description of that file; empty if none is needed.
    """

    convert: Callable[[LlavaAnswers, Path], Content]
    questions: str = ""


def write_submission(name: str, answers: str | Path, out: str | Path, questions: str | Path | None) -> dict[str, Any]:
    """Convert an answer file to what the benchmark's server takes.

    Raises:
        RelookError: an unknown benchmark, one that needs no conversion, a missing option, or answers that do not fit
            the questions.
    """
    answers, out = Path(answers), Path(out)
    questions = None if questions is None else Path(questions)
    if name in SCORED_AS_IS:
        raise RecipeError(f"{name} takes LLaVA's answers as they are.", f"Score them: {SCORED_AS_IS[name]}.")
    if name not in SUBMISSIONS:
        raise RecipeError(f"There is no submission {name!r}.", did_you_mean(name, SUBMISSIONS))
    submission = SUBMISSIONS[name]
    if bool(questions) != bool(submission.questions):
        advice = f"Give {submission.questions}." if submission.questions else "Leave it out."
        raise RecipeError(f"{name} {'needs' if submission.questions else 'reads no'} --questions.", advice)
    records = read_published_records(answers, "Give LLaVA's answers.")
    for number, record in enumerate(records, 1):
        if "question_id" not in record or not isinstance(record.get("text"), str):
            raise DataError(f"{answers}: answer {number} has not both question_id and text.", "Give LLaVA's layout.")
    content = submission.convert(records, questions or Path())
    _write(out, content)
    return {"submission": str(out), "answers": len(records)}


def _by_id(answers: LlavaAnswers) -> dict[str, str]:
    """Return answers by question id, as strings: files differ in whether ids are numbers."""
    twice = [id for id, count in Counter(str(answer["question_id"]) for answer in answers).items() if count > 1]
    if twice:
        raise DataError(f"The answers to {preview(twice)} stand more than once.", "Remove the duplicates.")
    return {str(answer["question_id"]): answer["text"] for answer in answers}


def _matched(answers: LlavaAnswers, ids: Sequence[Any], complete: bool = True) -> list[str | None]:
    """Return the answers to questions, in the order of their ids.

    Args:
        complete: whether every question must have an answer; without it, a missing one is None.

    Raises:
        DataError: an answer has no question, or a question no answer.
    """
    # Answers to other questions come from another split or file: their ids would be lost without a word.
    texts, known_ids = _by_id(answers), {str(id) for id in ids}
    unknown = [id for id in texts if id not in known_ids]
    if unknown:
        raise DataError(f"{len(unknown)} answers have no question ({preview(unknown)}).", "Give their question file.")
    missing = [id for id in ids if str(id) not in texts]
    if missing and complete:
        raise DataError(f"{len(missing)} questions have no answer ({preview(missing)}).", "Answer them all first.")
    return [texts.get(str(id)) for id in ids]


def _vqav2(answers: LlavaAnswers, questions: Path) -> str:
    """Convert for VQAv2, whose server expects every question of the test set; unanswered ones get an empty answer."""
    ids = [record["question_id"] for record in _read_question_records(questions, "question_id")]
    texts = _matched(answers, ids, complete=False)
    return json.dumps(
        [
            {"question_id": id, "answer": "" if text is None else vqa_answer(text)}
            for id, text in zip(ids, texts, strict=True)
        ]
    )


def _vizwiz(answers: LlavaAnswers, questions: Path) -> str:
    """Convert for VizWiz, which identifies answers by image."""
    records = _read_question_records(questions, "question_id", "image")
    texts = _matched(answers, [record["question_id"] for record in records])
    return json.dumps(
        [
            {"image": record["image"], "answer": vqa_answer(text or "")}
            for record, text in zip(records, texts, strict=True)
        ]
    )


def _gqa(answers: LlavaAnswers, questions: Path) -> str:
    """Convert for GQA's own eval.py."""
    _by_id(answers)  # for its check of duplicates
    predictions = [(answer["question_id"], answer["text"]) for answer in answers]
    return json.dumps([{"questionId": id, "prediction": text.rstrip(".").lower()} for id, text in predictions])


def _mmvet(answers: LlavaAnswers, questions: Path) -> str:
    """Convert for MM-Vet's judge."""
    return json.dumps({f"v1_{id}": text for id, text in _by_id(answers).items()}, indent=2)


def _seed(answers: LlavaAnswers, questions: Path) -> str:
    """Convert for SEED-Bench: JSON lines in the order of its question file."""
    entries = read_json_object(questions).get("questions")
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and "question_id" in entry for entry in entries
    ):
        raise DataError(f"{questions} has no questions with question_id.", f"Give {SUBMISSIONS['seed'].questions}.")
    ids = [entry["question_id"] for entry in entries]
    lines = [{"question_id": id, "prediction": text} for id, text in zip(ids, _matched(answers, ids), strict=True)]
    return "".join(json.dumps(line) + "\n" for line in lines)


def _mmbench(answers: LlavaAnswers, questions: Path) -> Table:
    """Convert for MMBench: its table with a column of predictions, without pictures and what the server knows."""
    rows = read_table(read_text(questions), str(questions))
    columns = [name for name in rows[0] if name not in NOT_SUBMITTED]
    columns.insert(6, "prediction")  # where LLaVA's convert_mmbench_for_submission.py has it
    texts = _matched(answers, [row["index"] for row in rows])
    filled = [{**row, "prediction": text or ""} for row, text in zip(rows, texts, strict=True)]
    return [columns, *([_cell(name, row[name]) for name in columns] for row in filled)]


def _cell(column: str, text: str) -> Any:
    if column == "index" and text.isdecimal():
        return int(text)
    return text if column == "prediction" or has_value(text) else None


def _mme(answers: LlavaAnswers, questions: Path) -> dict[str, str]:
    """Convert for MME's calculation.py: a file per category, with picture, question, truth and answer in a line."""
    truths = {}  # by category, file and question, with runs of spaces as one
    for file in sorted(questions.glob("*/*.txt")) + sorted(questions.glob("*/questions_answers_YN/*.txt")):
        category = file.relative_to(questions).parts[0]
        for line in read_text(file).splitlines():
            question, _, truth = line.strip().partition("\t")
            truths[category, file.name, " ".join(question.split())] = (question, truth)
    # Find each answer's question by its text: LLaVA's ids name the picture, which has two questions.
    lines: dict[str, list[str]] = {}
    answered = set()
    for record in answers:
        id = str(record["question_id"])
        category, name = id.split("/")[0], f"{id.split('/')[-1].split('.')[0]}.txt"
        prompt = str(record.get("prompt", "")).replace("Answer the question using a single word or phrase.", "").strip()
        if "Please answer yes or no." not in prompt:
            prompt += " Please answer yes or no."
        key = (category, name, " ".join(prompt.split()))  # some of MME's questions have two spaces
        if key not in truths:
            raise DataError(f"MME does not ask {prompt!r} about {id}.", "Check --questions and the answers.")
        answered.add(key)
        answer = " ".join(record["text"].split())  # one line per answer: no line breaks in it
        lines.setdefault(f"{category}.txt", []).append("\t".join((name, *truths[key], answer)) + "\n")
    missing = [" ".join(key) for key in truths if f"{key[0]}.txt" in lines and key not in answered]
    if missing:  # calculation.py takes every two successive lines for the two questions about one picture
        raise DataError(f"{len(missing)} questions have no answer ({preview(missing)}).", "Answer them all first.")
    return {name: "".join(of_category) for name, of_category in lines.items()}


def _read_question_records(path: Path, *fields: str) -> list[dict[str, Any]]:
    records = read_records(path)
    for number, record in enumerate(records, 1):
        lacking = [name for name in fields if name not in record]
        if lacking:
            raise DataError(f"{path}: question {number} has no {preview(lacking)}.", "Give LLaVA's question file.")
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


def _write(out: Path, content: Content) -> None:
    if isinstance(content, str):
        write_text(out, content)
    elif isinstance(content, dict):
        if out.exists():
            raise RecipeError(f"{out} exists.", "Choose another --out.")
        with atomic_folder(out) as folder:
            for name, text in content.items():
                write_text(folder / name, text)
    elif out.suffix == ".xlsx":
        _write_sheet(out, content)
    else:
        lines = io.StringIO(newline="")
        csv.writer(lines, delimiter="\t", lineterminator="\n").writerows(content)
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
            # Control characters are not allowed in a sheet, and a model may write any.
            WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", cell) if isinstance(cell, str) else cell)
            for cell in row
        ]
        for cell, value in zip(cells, row, strict=True):
            if isinstance(value, str):
                cell.data_type = "s"  # an answer that begins with = must not become a formula
        sheet.append(cells)
    with atomic_file(out) as temporary:
        book.save(temporary)
