"""`relook eval`: answers go to files, scores are computed from the files.

Under torchrun each process answers for a share of the images; the first one scores.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from relook.console import progress
from relook.data.prompts import get_template
from relook.errors import DataError, RecipeError
from relook.evaluate.answer import Asking, answer
from relook.evaluate.answer_file import AnswerFile
from relook.evaluate.benchmarks import (
    BENCHMARKS,
    Asked,
    known,
    read_questions,
    require_images,
    require_judge,
    scored,
)
from relook.evaluate.judge import JUDGE_CACHE, Judge, JudgeSettings
from relook.files import read_json, takes, write_json
from relook.model.load import LoadedModel, Loading, as_device, default_template, model_hash

SHORT = 64  # tokens, where the answer is yes or no


def evaluate_model(
    model: Path,
    benchmarks: Sequence[str],
    data: Path,
    out: Path,
    template: str = "",
    batch_size: int = 64,
    max_new_tokens: int = 512,
    loading: Loading = Loading(),  # noqa: B008 (frozen)
    judge: JudgeSettings | None = None,
) -> dict[str, Any]:
    """Answer and score benchmarks; answers that are there already are not asked again.

    Args:
        judge: for benchmarks whose scores need one. Its replies are kept in `out/judge.jsonl`.

    Returns:
        One entry per benchmark, as written to `out/<benchmark>.json`; nothing in any process but the first.

    Raises:
        RelookError: an unknown benchmark, missing data or images, no judge where one is needed, a judge that does not
            answer, or an output folder with another model's answers.
    """
    known(benchmarks)
    template = template or default_template(model)
    get_template(template)
    as_device(loading.device)
    rank, _ = process()
    if rank == 0:
        claim(out, model, data, template, max_new_tokens, loading)
    wait()
    if rank:
        claim(out, model, data, template, max_new_tokens, loading)
    left = [name for name in benchmarks if not (out / f"{name}.json").exists()]
    for name in benchmarks:
        if name not in left:
            require_same_judge(name, read_json(out / f"{name}.json"), judge)
    asked = {name: read_questions(name, data) for name in left}
    for name in left:
        require_images(asked[name])
        require_judge(name, data, judge)
    load = functools.cache(lambda: loading.load(model))
    for name in left:
        ask(name, asked[name], load, out, Asking(template, max_new_tokens, batch_size))
    wait()
    if rank:
        return {}  # the first process scores alone: a judge may take longer than the others would wait
    for name in left:
        endpoint = Judge(judge, out / JUDGE_CACHE) if judge else None
        write_json(out / f"{name}.json", finish(name, data, asked[name], out, endpoint))
    return {name: read_json(out / f"{name}.json") for name in benchmarks}


def require_same_judge(name: str, result: Mapping[str, Any], judge: JudgeSettings | None) -> None:
    """Refuse to pass another judge's verdicts off as this one's.

    Raises:
        RecipeError: the result that is there is of another judge.
    """
    held = result.get("judge", {}).get("model")
    if judge and held and held != judge.model:
        raise RecipeError(f"{name} is scored there, by {held}.", f"Judge again by `relook score {name}`.")


def process() -> tuple[int, int]:
    """This process's number, and how many there are, by what torchrun says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def wait() -> None:
    """For all processes to come here."""
    if process()[1] > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()


def share(images: Iterable[Any]) -> set[Any]:
    """The images that this process answers for: one in as many as there are processes, so none is left over."""
    rank, count = process()
    return set(list(dict.fromkeys(images))[rank::count])


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


def ask(name: str, asked: Asked, load: Callable[[], LoadedModel], out: Path, how: Asking) -> None:
    """Ask what has no answer yet, and append answers to their files as they come; equal questions are asked once.

    Args:
        load: called when there is something to ask.
    """
    benchmark = BENCHMARKS[name]
    files = {stem: AnswerFile(out / f"{stem}.jsonl", benchmark.id_field, process()[0]) for stem in asked}
    mine = share(question.image for questions in asked.values() for question in questions)
    beams = dict(benchmark.generate).get("num_beams", 1)  # each takes as much memory as a prompt
    for short in (True, False):
        stems = [stem for stem in asked if (stem in benchmark.yes_or_no) == short]
        left = [(s, q) for s in stems for q in asked[s] if q.image in mine and q.id not in files[s].records]
        if not left:
            continue
        settings = dataclasses.replace(
            how,
            max_new_tokens=min(how.max_new_tokens, SHORT) if short else how.max_new_tokens,
            batch_size=max(1, how.batch_size // beams),
            generate=benchmark.generate,
        )
        batch: dict[str, list[dict[str, Any]]] = {stem: [] for stem in stems}
        loaded = load()
        with progress(benchmark.title) as report:
            for index, text in answer(loaded, [(q.image, q.text) for _, q in left], settings, report):
                stem, question = left[index]
                batch[stem].append(benchmark.record(question, text))
                if sum(map(len, batch.values())) >= settings.batch_size:
                    for held, records in batch.items():
                        files[held].append(records)
                        records.clear()
        for stem in stems:
            files[stem].append(batch[stem])


def finish(name: str, data: Path, asked: Asked, out: Path, judge: Judge | None) -> dict[str, Any]:
    """The result of answer files that are complete; they end in the order of the questions."""
    answers = {
        stem: AnswerFile(out / f"{stem}.jsonl", BENCHMARKS[name].id_field).finish([q.id for q in questions])
        for stem, questions in asked.items()
    }
    return scored(name, data, asked, answers, judge)
