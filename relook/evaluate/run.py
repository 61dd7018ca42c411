"""`relook eval`: answers go to files, scores are computed from the files.

Under torchrun each process answers for a share of the images; the first one scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from relook import processes
from relook.console import progress
from relook.data.coco import read_coco
from relook.data.prompts import get_template
from relook.data.samples import Question
from relook.errors import DataError, RecipeError, some
from relook.evaluate.answer import Asking, answer
from relook.evaluate.answer_file import AnswerFile
from relook.evaluate.pope import LONGEST_ANSWER, SPLITS
from relook.evaluate.provenance import EVAL_FILE, now, versions
from relook.evaluate.score import annotation_file, chair_images, chair_results, pope_questions, pope_results
from relook.files import read_json, takes, write_json
from relook.model.load import LoadedModel, Loading, as_device, default_template, model_hash

CHAIR_PROMPT = "Describe this image in detail."


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Asking writes answer files for a data folder, scoring reads them; both are named by the folder of answers."""

    ask: Callable[[LoadedModel, Path, Path, Asking], None]
    score: Callable[[Path, Path], dict[str, Any]]


def evaluate_model(
    model: Path,
    benchmarks: Sequence[str],
    data: Path,
    out: Path,
    template: str = "",
    batch_size: int = 64,
    max_new_tokens: int = 512,
    loading: Loading = Loading(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Answer and score benchmarks; answers that are there already are not asked again.

    Returns:
        One entry per benchmark, as written to `out/<benchmark>.json`.

    Raises:
        RelookError: an unknown benchmark, missing data, or an output folder with another model's answers.
    """
    unknown = [name for name in benchmarks if name not in BENCHMARKS]
    if unknown:
        raise RecipeError(f"There is no benchmark {some(unknown)}.", f"Known ones: {', '.join(BENCHMARKS)}.")
    template = template or default_template(model)
    get_template(template)
    as_device(loading.device)
    if processes.first():
        claim(out, model, data, template, max_new_tokens, loading)
    processes.wait("the output folder")
    if not processes.first():
        claim(out, model, data, template, max_new_tokens, loading)
    loaded: LoadedModel | None = None
    results = {}
    for name in benchmarks:
        finished = out / f"{name}.json"
        if not finished.exists():
            loaded = loaded or loading.load(model)
            how = Asking(template, max_new_tokens, batch_size)
            BENCHMARKS[name].ask(loaded, data, out, how)
            processes.wait(f"the answers to {name}")
            if processes.first():
                write_json(finished, BENCHMARKS[name].score(data, out))
            processes.wait(f"the scores of {name}")
        results[name] = read_json(finished)
    return results


def share(images: Iterable[Any]) -> set[Any]:
    """The images that this process answers for."""
    return set(processes.mine(list(dict.fromkeys(images))))


def claim(out: Path, model: Path, data: Path, template: str, max_new_tokens: int, loading: Loading) -> None:
    """Take an output folder for one model, data and way of asking; refuse one that holds other answers."""
    for folder, what in ((model, "model"), (data, "data")):
        if not folder.is_dir():
            raise DataError(f"There is no {what} folder {folder}.", f"Check --{what}.")
    settings = {
        "model": str(model.resolve()),
        "model_hash": model_hash(model),
        **{key: value and str(value) for key, value in dataclasses.asdict(loading).items() if key != "device"},
        "data": str(data.resolve()),
        "template": template,
        "max_new_tokens": max_new_tokens,
        "versions": versions(),
    }
    held = out / EVAL_FILE
    if takes(out, held.name, "--out"):
        write_json(held, {**settings, "date": now()})
    else:
        old = read_json(held)
        changed = [key for key in settings if old.get(key) != settings[key]]
        if changed:
            raise RecipeError(f"{out} holds answers made with another {', '.join(changed)}.", "Choose another --out.")


def keep(
    answers: Iterable[tuple[int, str]],
    record: Callable[[int, str], tuple[AnswerFile, dict[str, Any]]],
    files: Iterable[AnswerFile],
    size: int,
) -> None:
    """Append answers to their files as they come, `size` at a time, and what is there when something fails."""
    waiting: dict[Path, list[dict[str, Any]]] = {file.path: [] for file in files}

    def put() -> None:
        for file in files:
            file.append(waiting[file.path])
            waiting[file.path].clear()

    try:
        for number, (index, text) in enumerate(answers, 1):
            file, one = record(index, text)
            waiting[file.path].append(one)
            if number % size == 0:
                put()
    finally:
        put()


def require(images: Iterable[Path]) -> None:
    """Refuse to begin where images are missing.

    Raises:
        DataError: the first of them, and how many there are.
    """
    lost = [image for image in dict.fromkeys(images) if not image.exists()]
    if lost:
        more = f", nor do {len(lost) - 1} others" if lost[1:] else ""
        raise DataError(f"The image {lost[0]} does not exist{more}.", "Check the image folder.")


def ask_pope(loaded: LoadedModel, data: Path, out: Path, how: Asking) -> None:
    """POPE's three splits in one pass: questions that several splits share are asked once."""
    questions = pope_questions(data)
    files = {split: AnswerFile(out / f"pope_{split}.jsonl", "question_id", processes.rank()) for split in SPLITS}
    mine = share(q.image for split in SPLITS for q in questions[split])
    asked = [(s, q) for s in SPLITS for q in questions[s] if q.image in mine and q.id not in files[s].records]
    require(question.image for _, question in asked)
    how = dataclasses.replace(how, max_new_tokens=min(how.max_new_tokens, LONGEST_ANSWER))

    def record(index: int, text: str) -> tuple[AnswerFile, dict[str, Any]]:
        split, question = asked[index]
        return files[split], pope_record(question, text)

    with progress("POPE") as report:
        answers = answer(loaded, [(q.image, q.text) for _, q in asked], how, report)
        keep(answers, record, files.values(), how.batch_size)


def finish_pope(data: Path, out: Path) -> dict[str, Any]:
    for split, questions in pope_questions(data).items():
        AnswerFile(out / f"pope_{split}.jsonl", "question_id").finish([question.id for question in questions])
    return pope_results(data, out)


def pope_record(question: Question, text: str) -> dict[str, Any]:
    return {
        "question_id": question.id,
        "image": question.image.name,
        "question": question.text,
        "answer": text,
    }


def ask_chair(loaded: LoadedModel, data: Path, out: Path, how: Asking) -> None:
    """Descriptions of the images of the annotation file, or of `chair_images.txt` where the data folder pins a list."""
    names = described(data)
    file, mine = AnswerFile(out / "chair.jsonl", "image", processes.rank()), share(names)
    asked = [name for name in names if name in mine and name not in file.records]
    images = [data / "val2014" / name for name in asked]
    require(images)
    with progress("descriptions for CHAIR") as report:
        answers = answer(loaded, [(image, CHAIR_PROMPT) for image in images], how, report)
        keep(answers, lambda i, text: (file, {"image": asked[i], "caption": text}), [file], how.batch_size)


def finish_chair(data: Path, out: Path) -> dict[str, Any]:
    AnswerFile(out / "chair.jsonl", "image").finish(described(data))
    return chair_results(data, out)


def described(data: Path) -> list[str]:
    return chair_images(read_coco(annotation_file(data)), data / "chair_images.txt")


BENCHMARKS = {"pope": Benchmark(ask_pope, finish_pope), "chair": Benchmark(ask_chair, finish_chair)}
