"""`relook eval`: answers go to files, scores are computed from the files.

Under torchrun each process answers for a share of the images; the first one scores.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from relook import distributed
from relook.console import progress
from relook.data.samples import Question
from relook.data.templates import get_template
from relook.errors import DataError, RecipeError
from relook.evaluate.benchmarks import (
    BENCHMARKS,
    Asked,
    Benchmark,
    known,
    read_questions,
    require_images,
    require_judge,
)
from relook.evaluate.judge import JUDGE_CACHE, Judge, JudgeSettings
from relook.evaluate.results import EVAL_FILE, AnswerFile, now, versions
from relook.evaluate.tasks.pope import LONGEST_ANSWER
from relook.files import claim_folder, read_json, write_json
from relook.generate.tree_decoding import Asking, answer
from relook.model.load import LoadedModel, Loading, as_device, default_template

Said = TypeVar("Said")


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
        One entry per benchmark, as written to `out/<benchmark>.json`.

    Raises:
        RelookError: an unknown benchmark, missing data or images, no judge where one is needed, a judge that does not
            answer, or an output folder with another model's answers.
    """
    known(benchmarks)
    how = begin(out, model, data, Asking(template, max_new_tokens, batch_size), loading)
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
        ask(name, asked[name], load, out, how)
        distributed.wait(f"the answers to {name}")
        if distributed.first():
            endpoint = Judge(judge, out / JUDGE_CACHE) if judge else None
            write_json(out / f"{name}.json", finish(name, data, asked[name], out, endpoint))
        distributed.wait(f"the scores of {name}")
    return {name: read_json(out / f"{name}.json") for name in benchmarks}


def require_same_judge(name: str, result: Mapping[str, Any], judge: JudgeSettings | None) -> None:
    """Refuse to pass another judge's verdicts off as this one's.

    Raises:
        RecipeError: the result that is there is of another judge.
    """
    held = result.get("judge", {}).get("model")
    if judge and held and held != judge.model:
        raise RecipeError(f"{name} is scored there, by {held}.", f"Judge again by `relook score {name}`.")


def share(images: Iterable[Any]) -> set[Any]:
    """The images that this process answers for."""
    return set(distributed.mine(list(dict.fromkeys(images))))


def begin(out: Path, model: Path, data: Path | None, how: Asking, loading: Loading, **asked: Any) -> Asking:
    """Look at how a model is to be asked, and `claim` the output folder: the first process before the others.

    Returns:
        `how` with the model's own template where it names none.
    """
    how = dataclasses.replace(how, template=how.template or default_template(model))
    get_template(how.template)
    as_device(loading.device)
    taken = (out, model, data, how.template, how.max_new_tokens, loading)
    if distributed.first():
        claim(*taken, **asked)
    distributed.wait("the output folder")
    if not distributed.first():
        claim(*taken, **asked)
    return how


def claim(
    out: Path, model: Path, data: Path | None, template: str, max_new_tokens: int, loading: Loading, **asked: Any
) -> None:
    """Take an output folder for one model, data and way of asking; refuse one that holds other answers.

    Args:
        asked: what else the answers depend on.
    """
    for folder, what in ((model, "model"), (data, "data")):
        if folder is not None and not folder.is_dir():
            raise DataError(f"There is no {what} folder {folder}.", f"Check --{what}.")
    settings = {
        **loading.identity(model),
        "data": data and str(data.resolve()),
        "template": template,
        "max_new_tokens": max_new_tokens,
        **asked,
        "versions": versions(),
    }
    claim_folder(out, EVAL_FILE, settings, "answers", date=now())


def keep(
    answers: Iterable[tuple[int, Said]],
    record: Callable[[int, Said], tuple[AnswerFile, dict[str, Any]]],
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


def ask(name: str, asked: Asked, load: Callable[[], LoadedModel], out: Path, how: Asking) -> None:
    """Ask what has no answer yet, and append answers to their files as they come; equal questions are asked once.

    Args:
        load: called when there is something to ask.
    """
    benchmark = BENCHMARKS[name]
    files = {stem: AnswerFile(out / f"{stem}.jsonl", benchmark.id_field, distributed.rank()) for stem in asked}
    mine = share(question.image for questions in asked.values() for question in questions)
    beams = dict(benchmark.generate).get("num_beams", 1)  # each takes as much memory as a prompt
    for short in (True, False):
        stems = [stem for stem in asked if (stem in benchmark.yes_or_no) == short]
        left = [(s, q) for s in stems for q in asked[s] if q.image in mine and q.id not in files[s].records]
        settings = dataclasses.replace(
            how,
            max_new_tokens=min(how.max_new_tokens, LONGEST_ANSWER) if short else how.max_new_tokens,
            batch_size=max(1, how.batch_size // beams),
            generate=benchmark.generate,
        )
        if left:
            _ask(benchmark, left, load(), {stem: files[stem] for stem in stems}, settings)


def _ask(
    benchmark: Benchmark,
    left: Sequence[tuple[str, Question]],
    loaded: LoadedModel,
    files: Mapping[str, AnswerFile],
    how: Asking,
) -> None:
    def record(index: int, text: str) -> tuple[AnswerFile, dict[str, Any]]:
        stem, question = left[index]
        return files[stem], benchmark.record(question, text)

    with progress(benchmark.title) as report:
        answers = answer(loaded, [(question.image, question.text) for _, question in left], how, report)
        keep(answers, record, list(files.values()), how.batch_size)


def finish(name: str, data: Path, asked: Asked, out: Path, judge: Judge | None) -> dict[str, Any]:
    """The result of answer files that are complete; they end in the order of the questions."""
    answers = {
        stem: AnswerFile(out / f"{stem}.jsonl", BENCHMARKS[name].id_field).finish([q.id for q in questions])
        for stem, questions in asked.items()
    }
    return BENCHMARKS[name].score(data, asked, answers, out, judge)
