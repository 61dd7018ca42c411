"""`relook eval`: answers go to files, scores are computed from the files.

Under torchrun each process answers for a share of the images; the first one scores.
"""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from relook import processes
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


def ask_pope(loaded: LoadedModel, data: Path, out: Path, how: Asking) -> None:
    """POPE's three splits in one pass: questions that several splits share are asked once."""
    questions = pope_questions(data)
    files = {split: AnswerFile(out / f"pope_{split}.jsonl", "question_id", processes.rank()) for split in SPLITS}
    mine = share(q.image for split in SPLITS for q in questions[split])
    asked = [(s, q) for s in SPLITS for q in questions[s] if q.image in mine and q.id not in files[s].records]
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
    for split in SPLITS:
        files[split].append(batch[split])


def finish_pope(data: Path, out: Path) -> dict[str, Any]:
    results = {}
    for split, questions in pope_questions(data).items():
        file = AnswerFile(out / f"pope_{split}.jsonl", "question_id")
        results[split] = score_pope(questions, file.finish([question.id for question in questions]))
    return results


def pope_questions(data: Path) -> dict[str, list[Question]]:
    return {split: pope.read_questions(pope_file(data, split), data / "val2014") for split in SPLITS}


def pope_record(question: Question, text: str) -> dict[str, Any]:
    return {
        "question_id": question.id,
        "image": question.image.name,
        "question": question.text,
        "answer": text,
    }


def ask_chair(loaded: LoadedModel, data: Path, out: Path, how: Asking) -> None:
    """Descriptions of the images of the annotation file, or of `chair_images.txt` where the data folder pins a list."""
    names = chair_images(data, read_coco(annotation_file(data)))
    file, mine = AnswerFile(out / "chair.jsonl", "image", processes.rank()), share(names)
    asked = [name for name in names if name in mine and name not in file.records]
    batch: list[dict[str, Any]] = []
    with progress("descriptions for CHAIR") as report:
        for index, text in answer(loaded, [(data / "val2014" / n, CHAIR_PROMPT) for n in asked], how, report):
            batch.append({"image": asked[index], "caption": text})
            if len(batch) >= how.batch_size:
                file.append(batch)
                batch.clear()
    file.append(batch)


def finish_chair(data: Path, out: Path) -> dict[str, Any]:
    annotations = read_coco(annotation_file(data))
    answers = AnswerFile(out / "chair.jsonl", "image").finish(chair_images(data, annotations))
    return score_chair({record["image"]: record["caption"] for record in answers}, annotations)


def chair_images(data: Path, annotations: Annotations) -> list[str]:
    pinned = data / "chair_images.txt"
    if not pinned.exists():
        return list(annotations.images)
    names = [line.strip() for line in read_text(pinned).splitlines() if line.strip()]
    unknown = sorted(set(names) - set(annotations.images))
    if unknown:
        raise DataError(f"{pinned} names images without annotations: {some(unknown)}.", "Remove them from the list.")
    return names


BENCHMARKS = {"pope": Benchmark(ask_pope, finish_pope), "chair": Benchmark(ask_chair, finish_chair)}
