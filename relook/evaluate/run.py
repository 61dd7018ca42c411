"""Implementation of `relook eval`: answers go to files, and scores are computed from the files.

Under torchrun, each process answers for a shard of the images, and the main process scores.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from relook import distributed
from relook.console import progress, status
from relook.data.samples import Question
from relook.data.templates import get_template
from relook.errors import DataError
from relook.evaluate.benchmarks import (
    BENCHMARKS,
    Benchmark,
    Questions,
    benchmark_questions,
    get_benchmarks,
    require_images,
    require_judge,
)
from relook.evaluate.judge import JUDGE_CACHE, Judge, JudgeSettings
from relook.evaluate.results import EVAL_FILE, AnswerFile, library_versions, utc_now
from relook.evaluate.tasks.pope import LONGEST_ANSWER
from relook.files import claim_output_dir, read_json, read_json_object, write_json, writes_alone
from relook.generate.answering import GenerationSettings, answer_questions
from relook.model.checkpoint import AnyFolder, parse_folder
from relook.model.load import LoadedModel, LoadOptions, parse_device

AnswerT = TypeVar("AnswerT")


@writes_alone(lambda model, benchmarks, data, out, *_, **__: Path(out))
def evaluate_model(
    model: str | Path,
    benchmarks: Sequence[str],
    data: str | Path,
    out: str | Path,
    template: str = "",
    batch_size: int = 64,
    max_new_tokens: int = 512,
    loading: LoadOptions = LoadOptions(),  # noqa: B008 (frozen)
    judge: JudgeSettings | None = None,
) -> dict[str, Any]:
    """Answer and score benchmarks; questions that already have an answer are not asked again.

    Scores are always recomputed from the answers and the judge's replies, so a result never outlives its inputs. Only a
    judge's result is kept as it is if no judge is given.

    Args:
        judge: judge for benchmarks whose scores need one. Its replies are kept in `out/judge.jsonl`. A short probe
            checks it before anything is generated.

    Returns:
        One entry per benchmark, as written to `out/<benchmark>.json`.

    Raises:
        RelookError: an unknown benchmark, missing data or images, no judge where one is needed, a judge that does not
            answer, or an output folder with another model's answers.
    """
    folder, data, out = parse_folder(model), Path(data), Path(out)
    get_benchmarks(benchmarks)
    how = begin_evaluation(out, folder, data, GenerationSettings(template, max_new_tokens, batch_size), loading)
    scored = [name for name in benchmarks if (out / f"{name}.json").exists()]
    left = [name for name in benchmarks if judge or name not in scored or not judged(out, name)]
    asked = {name: benchmark_questions(name, data) for name in left}
    for name in left:
        if name not in scored:
            require_images(asked[name])
        require_judge(name, data, judge)
    probes = [request for name in left if (request := BENCHMARKS[name].judge_request) is not None]

    @functools.cache
    def load() -> LoadedModel:
        if judge and probes and distributed.is_main():
            Judge(judge, out / JUDGE_CACHE).probe(probes[0])
        return loading.load(folder)

    for name in left:
        ask_missing(name, asked[name], load, out, how)
        distributed.barrier(f"the answers to {name}")
        if distributed.is_main():
            endpoint = Judge(judge, out / JUDGE_CACHE) if judge else None
            write_json(out / f"{name}.json", write_result(name, data, asked[name], out, endpoint))
        distributed.barrier(f"the scores of {name}")
    return {name: read_json(out / f"{name}.json") for name in benchmarks}


def judged(out: Path, name: str) -> bool:
    """Return True if an existing result is by a judge behind an endpoint; print how many answers it left unjudged."""
    result = read_json_object(out / f"{name}.json")
    if "url" not in result.get("judge", {}):
        return False
    if missing := result.get("not_judged"):
        status(f"  {name}: {missing} were not judged; give --judge-url and --judge-model to ask again")
    return True


def shard_images(images: Iterable[Any]) -> set[Any]:
    """Return the images that this process answers for."""
    return set(distributed.shard(list(dict.fromkeys(images))))


def begin_evaluation(
    out: Path, model: AnyFolder, data: Path | None, how: GenerationSettings, loading: LoadOptions, **asked: Any
) -> GenerationSettings:
    """Check the settings and claim the output folder with `claim_eval_dir`, the main process before the others.

    Returns:
        `how`, with the model's own template if it names none.
    """
    model = parse_folder(model)
    how = dataclasses.replace(how, template=how.template or model.template)
    get_template(how.template)
    parse_device(loading.device)
    taken = (out, model, data, how.template, how.max_new_tokens, loading)
    if distributed.is_main():
        claim_eval_dir(*taken, **asked)
    distributed.barrier("the output folder")
    if not distributed.is_main():
        claim_eval_dir(*taken, **asked)
    return how


def claim_eval_dir(
    out: Path,
    model: AnyFolder,
    data: Path | None,
    template: str,
    max_new_tokens: int,
    loading: LoadOptions,
    **asked: Any,
) -> None:
    """Claim an output folder for one model, data folder and settings; refuse one that holds other answers.

    Args:
        asked: further settings that the answers depend on.
    """
    if data is not None and not data.is_dir():
        raise DataError(f"There is no data folder {data}.", "Check --data.")
    settings = {
        **loading.identity(model),
        "data": data and str(data.resolve()),
        "template": template,
        "max_new_tokens": max_new_tokens,
        **asked,
        "versions": library_versions(),
    }
    claim_output_dir(out, EVAL_FILE, settings, "answers", date=utc_now())


def append_answers(
    answers: Iterable[tuple[int, AnswerT]],
    record: Callable[[int, AnswerT], tuple[AnswerFile, dict[str, Any]]],
    files: Iterable[AnswerFile],
    size: int,
) -> None:
    """Append answers to their files as they come, `size` at a time; on failure, write what is waiting."""
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


def ask_missing(
    name: str, asked: Questions, load: Callable[[], LoadedModel], out: Path, how: GenerationSettings
) -> None:
    """Ask the questions that have no answer yet, and append answers to their files as they come.

    Equal questions are asked once.

    Args:
        load: loads the model; called only if there is something to ask.
    """
    benchmark = BENCHMARKS[name]
    files = {stem: AnswerFile(out / f"{stem}.jsonl", benchmark.id_field, distributed.rank()) for stem in asked}
    mine = shard_images(question.image for questions in asked.values() for question in questions)
    beams = dict(benchmark.generate).get("num_beams", 1)  # each beam takes as much memory as a prompt
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
    how: GenerationSettings,
) -> None:
    def record(index: int, text: str) -> tuple[AnswerFile, dict[str, Any]]:
        stem, question = left[index]
        return files[stem], benchmark.record(question, text)

    with progress(benchmark.title) as report:
        answers = answer_questions(loaded, [(question.image, question.text) for _, question in left], how, report)
        append_answers(answers, record, list(files.values()), how.batch_size)


def write_result(name: str, data: Path, asked: Questions, out: Path, judge: Judge | None) -> dict[str, Any]:
    """Compute the result of complete answer files, and rewrite these in the order of the questions."""
    answers = {
        stem: AnswerFile(out / f"{stem}.jsonl", BENCHMARKS[name].id_field).finish([q.id for q in questions])
        for stem, questions in asked.items()
    }
    return BENCHMARKS[name].score(data, asked, answers, out, judge)
