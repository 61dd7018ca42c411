"""`relook eval`: answers go to files, scores are computed from the files."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from relook.console import progress
from relook.data.coco import Annotations, read_coco
from relook.data.prompts import get_template
from relook.data.samples import Question
from relook.errors import DataError, RecipeError, some
from relook.evaluate import pope
from relook.evaluate.answer import Asking, answer
from relook.evaluate.answer_file import AnswerFile
from relook.evaluate.pope import SPLITS
from relook.evaluate.score import annotation_file, pope_file, score_chair, score_pope
from relook.files import read_json, read_text, takes, write_json
from relook.model.load import LoadedModel, Loading, as_device, default_template, model_hash

CHAIR_PROMPT = "Describe this image in detail."
Benchmark = Callable[[LoadedModel, Path, Path, Asking], dict[str, Any]]


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
    claim(out, model, data, template, max_new_tokens, loading)
    loaded: LoadedModel | None = None
    results = {}
    for name in benchmarks:
        finished = out / f"{name}.json"
        if not finished.exists():
            loaded = loaded or loading.load(model)
            how = Asking(template, max_new_tokens, batch_size)
            write_json(finished, BENCHMARKS[name](loaded, data, out, how))
        results[name] = read_json(finished)
    return results


def claim(out: Path, model: Path, data: Path, template: str, max_new_tokens: int, loading: Loading) -> None:
    """Take an output folder for one model, data and way of asking; refuse one that holds other answers."""
    for folder, what in ((model, "model"), (data, "data")):
        if not folder.is_dir():
            raise DataError(f"There is no {what} folder {folder}.", f"Check --{what}.")
    settings = {
        "model": str(model.resolve()),
        "model_hash": model_hash(model),
        **{key: str(value) for key, value in dataclasses.asdict(loading).items() if key != "device"},
        "data": str(data.resolve()),
        "template": template,
        "max_new_tokens": max_new_tokens,
        "versions": versions(),
    }
    held = out / "eval.json"
    if takes(out, held.name, "--out"):
        write_json(held, settings)
    else:
        old = read_json(held)
        changed = [key for key in settings if old.get(key) != settings[key]]
        if changed:
            raise RecipeError(f"{out} holds answers made with another {', '.join(changed)}.", "Choose another --out.")


def versions() -> dict[str, str]:
    """Library versions that a number may depend on."""
    import torch
    import transformers

    import relook

    return {
        "relook": relook.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def eval_pope(loaded: LoadedModel, data: Path, out: Path, how: Asking) -> dict[str, Any]:
    """POPE's three splits in one pass: questions that several splits share are asked once."""
    questions = {split: pope.read_questions(pope_file(data, split), data / "val2014") for split in SPLITS}
    files = {split: AnswerFile(out / f"pope_{split}.jsonl", "question_id") for split in SPLITS}
    asked = [(s, q) for s in SPLITS for q in questions[s] if q.id not in files[s].records]
    how = dataclasses.replace(how, max_new_tokens=min(how.max_new_tokens, 64))
    batch: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    with progress("POPE") as report:
        for index, text in answer(loaded, [(q.image, q.text) for _, q in asked], how, report):
            split, question = asked[index]
            batch[split].append(pope_record(question, text))
            if sum(map(len, batch.values())) >= how.batch_size:
                for name, records in batch.items():
                    files[name].append(records)
                    records.clear()
    results = {}
    for split in SPLITS:
        files[split].append(batch[split])
        answers = files[split].finish([question.id for question in questions[split]])
        results[split] = score_pope(questions[split], answers)
    return results


def pope_record(question: Question, text: str) -> dict[str, Any]:
    return {
        "question_id": question.id,
        "image": question.image.name,
        "question": question.text,
        "answer": text,
    }


def eval_chair(loaded: LoadedModel, data: Path, out: Path, how: Asking) -> dict[str, Any]:
    """CHAIR over the images of the annotation file, or of `chair_images.txt` where the data folder pins a list."""
    annotations = read_coco(annotation_file(data))
    names = chair_images(data, annotations)
    file = AnswerFile(out / "chair.jsonl", "image")
    asked = [name for name in names if name not in file.records]
    batch: list[dict[str, Any]] = []
    with progress("descriptions for CHAIR") as report:
        for index, text in answer(loaded, [(data / "val2014" / n, CHAIR_PROMPT) for n in asked], how, report):
            batch.append({"image": asked[index], "caption": text})
            if len(batch) >= how.batch_size:
                file.append(batch)
                batch.clear()
    file.append(batch)
    captions = {record["image"]: record["caption"] for record in file.finish(names)}
    return score_chair(captions, annotations)


def chair_images(data: Path, annotations: Annotations) -> list[str]:
    pinned = data / "chair_images.txt"
    if not pinned.exists():
        return list(annotations.images)
    names = [line.strip() for line in read_text(pinned).splitlines() if line.strip()]
    unknown = sorted(set(names) - set(annotations.images))
    if unknown:
        raise DataError(f"{pinned} names images without annotations: {some(unknown)}.", "Remove them from the list.")
    return names


BENCHMARKS: dict[str, Benchmark] = {"pope": eval_pope, "chair": eval_chair}
