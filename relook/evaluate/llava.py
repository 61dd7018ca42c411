"""`relook eval llava`: LLaVA's question files, answered into its answer layout, which other programs score.

Three layouts, told apart by their content (haotian-liu/LLaVA, `model_vqa.py`, `model_vqa_science.py`,
`model_vqa_mmbench.py`): question lines, ScienceQA's conversations, and MMBench's table with pictures in it.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from relook import processes
from relook.console import progress
from relook.data.images import Encoded, Shown
from relook.data.located import located
from relook.data.prompts import IMAGE
from relook.errors import DataError, some
from relook.evaluate.answer import Asking, answer
from relook.evaluate.answer_file import AnswerFile
from relook.evaluate.provenance import provenance
from relook.evaluate.run import begin, keep, share
from relook.files import file_hash, read_json, read_records, read_text, text_hash, write_json, writes_alone
from relook.model.load import Loading

NAME = "llava"  # of the answer file and of the result
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
OPTIONS = "ABCD"
# What pandas, which LLaVA reads MMBench's tables with, takes for no value. "Na" is one: sodium.
NO_VALUE = {"", "N/A", "n/a", "NA", "<NA>", "NULL", "null", "NaN", "nan", "-NaN", "-nan", "None"}
NO_VALUE |= {"#N/A", "#N/A N/A", "#NA", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN"}


@dataclass(frozen=True)
class LlavaQuestion:
    """One question.

    Args:
        text: as the model reads it; `prompt` as LLaVA keeps it.
        more: further fields of its answer.
        repeat: how often the same stood in the file before.
    """

    id: Any
    images: tuple[Shown, ...]
    text: str
    prompt: str
    more: Mapping[str, Any] = field(default_factory=dict)
    repeat: int = 0

    @property
    def key(self) -> str:
        """Ids are not enough: TextVQA's are those of images."""
        return text_hash(str(self.id), self.prompt, *[str(self.repeat)] * bool(self.repeat))

    def answered(self, text: str, model: str) -> dict[str, Any]:
        """The answer as LLaVA writes it. Its `answer_id` is random; here the same answer has the same one."""
        said = {"question_id": self.id, **self.more, "prompt": self.prompt, "text": text}
        return {**said, "answer_id": self.key, "model_id": model, "metadata": {}}


@writes_alone(lambda model, questions, data, out, *_, **__: Path(out))
def answer_questions(
    model: str | Path,
    questions: str | Path,
    data: str | Path | None,
    out: str | Path,
    template: str = "",
    batch_size: int = 64,
    max_new_tokens: int = 512,
    loading: Loading = Loading(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Answer a question file into `out/llava.jsonl`, in its order; answers that are there are not asked again.

    Args:
        data: folder of the images; text-only questions and tables with pictures in them need none.

    Returns:
        The answer file, how many answers, and what they depend on, as written to `out/llava.json`.

    Raises:
        RelookError: a question file that cannot be used, a missing image, or an output folder with other answers.
    """
    model, questions, out = Path(model), Path(questions), Path(out)
    data = None if data is None else Path(data)
    asked = read_questions(questions, data)
    how = Asking(template, max_new_tokens, batch_size)
    how = begin(out, model, data, how, loading, questions=file_hash(questions))
    result = out / f"{NAME}.json"
    if not result.exists():
        file = AnswerFile(out / f"{NAME}.jsonl", "answer_id", processes.rank())
        mine = share(question.images for question in asked)
        left = [q for q in asked if q.images in mine and q.key not in file.records]
        if left:
            loaded = loading.load(model)
            with progress(questions.name) as report:
                said = answer(loaded, [(question.images, question.text) for question in left], how, report)
                keep(said, lambda i, text: (file, left[i].answered(text, model.name)), [file], batch_size)
        processes.wait("the answers")
        if processes.first():
            answers = AnswerFile(file.path, "answer_id").finish([question.key for question in asked])
            held = {"answers": str(file.path), "n": len(answers), "provenance": provenance(out)}
            write_json(result, held)
        processes.wait("the result")
    found: dict[str, Any] = read_json(result)
    return found


def read_questions(path: str | Path, images: str | Path | None) -> list[LlavaQuestion]:
    """The questions of a file in one of LLaVA's layouts.

    Raises:
        DataError: no question, one without id or text, or an image that is missing.
    """
    path = Path(path)
    images = None if images is None else Path(images)
    if "\t" in (text := read_text(path))[:4096].partition("\n")[0]:
        rows = read_table(text, str(path))
        pictures = {row["index"]: row["image"] for row in rows}  # one may name another's row instead
        asked = [_of_row({**row, "image": pictures.get(row["image"], row["image"])}) for row in rows]
    else:
        asked = [_of_record(one, images, f"{path}: question {n}") for n, one in enumerate(read_records(path), 1)]
    if not asked:
        raise DataError(f"{path} holds no question.", "Give a question file.")
    seen: Counter[str] = Counter()
    for place, question in enumerate(asked):
        asked[place] = replace(question, repeat=seen[question.key])
        seen[question.key] += 1
    files = dict.fromkeys(image for question in asked for image in question.images if isinstance(image, Path))
    missing = [image for image in files if not image.is_file()]
    if missing:
        raise DataError(f"{len(missing)} images do not exist: {some(missing, 2)}.", "Check --data.")
    return asked


def _of_record(record: Mapping[str, Any], images: Path | None, who: str) -> LlavaQuestion:
    try:
        return (_of_conversation if "conversations" in record else _of_line)(record, images)
    except (KeyError, TypeError, IndexError, AttributeError):
        raise DataError(f"{who} is in none of LLaVA's layouts.", "See docs/lmms-eval.md.") from None


def _of_line(record: Mapping[str, Any], images: Path | None) -> LlavaQuestion:
    """`{"question_id", "image"?, "text", "category"?}`."""
    return LlavaQuestion(record["question_id"], _images(record, images), str(record["text"]), str(record["text"]))


def _of_conversation(record: Mapping[str, Any], images: Path | None) -> LlavaQuestion:
    """`{"id", "image"?, "conversations": [{"value"}, ...]}`, as ScienceQA's; LLaVA-1.5's script asks for a letter."""
    text = record["conversations"][0]["value"].replace(IMAGE, "").strip() + f"\n{LETTER}"
    shown = _images(record, images)
    return LlavaQuestion(record["id"], shown, text, f"{IMAGE}\n{text}" if shown else text)


def _images(record: Mapping[str, Any], images: Path | None) -> tuple[Path, ...]:
    name = record.get("image")
    if not name:
        return ()
    if images is None:
        raise DataError("The questions are about images.", "Give their folder as --data.")
    return (located(images / name),)


def read_table(text: str, name: str) -> list[dict[str, str]]:
    """Rows of a tab-separated table, as MMBench's.

    Raises:
        DataError: it is empty, lacks a column that questions need, or a row has another number of columns.
    """
    csv.field_size_limit(1 << 31)  # pictures are in it
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t")
    rows = list(reader)
    lacking = {"index", "question", "image", "A", "B"} - set(reader.fieldnames or ())
    if lacking:
        raise DataError(f"{name} has no column {some(sorted(lacking))}.", "Give one of MMBench's tables.")
    if not rows:
        raise DataError(f"{name} has no rows.", "Give one of MMBench's tables.")
    torn = [number for number, row in enumerate(rows, 2) if None in row or None in row.values()]
    if torn:
        raise DataError(f"{name}: row {torn[0]} has another number of columns.", "Download it again.")
    return rows


def _of_row(row: Mapping[str, str]) -> LlavaQuestion:
    """A row of MMBench: hint, question and options; a Chinese question is answered in Chinese."""
    index = int(row["index"]) if row["index"].isdecimal() else row["index"]
    options = []
    for letter in OPTIONS:
        if not has_value(row.get(letter, "")):
            break
        options.append(row[letter])
    hint = row.get("hint", "")
    lines = [*([hint] if has_value(hint) else []), row["question"]]
    prompt = "\n".join([*lines, *(f"{letter}. {option}" for letter, option in zip(OPTIONS, options, strict=False))])
    letter = LETTER_CN if re.search("[\u4e00-\u9fff]", row["question"]) else LETTER
    try:
        picture = Encoded(base64.b64decode(row["image"], validate=True), f"of question {index}")
    except (binascii.Error, ValueError):
        raise DataError(f"The image of question {index} is not base64.", "Download the table again.") from None
    more = {"round_id": 0, "options": options, "option_char": list(OPTIONS[: len(options)])}
    return LlavaQuestion(index, (picture,), f"{prompt}\n{letter}", prompt, more)


def has_value(text: str) -> bool:
    """Whether a cell of a table says something, to pandas and to LLaVA."""
    return text not in NO_VALUE and text.lower() not in ("nan", "none")
