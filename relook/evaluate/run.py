"""Implementation of `relook eval`: answers go to files, and scores are computed from the files.

Under torchrun, each process answers for a shard of the images, and the main process scores.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from relook import distributed
from relook.console import progress, status
from relook.data.samples import Question
from relook.data.templates import check_template
from relook.errors import DataError, Faults
from relook.evaluate.benchmark import YES_NO_MAX_TOKENS, Benchmark, Questions, require_images, require_judge
from relook.evaluate.results import EVAL_FILE, AnswerFile, library_versions, utc_now
from relook.evaluate.tasks import get_benchmarks
from relook.files import claim_output_dir, read_json, read_json_object, write_json, writes_alone
from relook.generate.answering import Answerer, AnswerSource, GenerationSettings, answer_questions
from relook.model.checkpoint import AnyFolder
from relook.model.load import LoadOptions

if TYPE_CHECKING:
    from relook.evaluate.judge import Judge, JudgeSettings

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
    loading: AnswerSource = LoadOptions(),  # noqa: B008 (frozen)
    judge: JudgeSettings | None = None,
) -> dict[str, Any]:
    """Answer and score benchmarks; questions that already have an answer are not asked again.

    Scores are always recomputed from the answers and the judge's replies, so a result never outlives its inputs. Only a
    judge's result is kept as it is if no judge is given.

    Args:
        loading: how the model is loaded, or another engine that answers (`relook.evaluate.engines`).
        judge: judge for benchmarks whose scores need one. Its replies are kept in `out/judge.jsonl`. A short probe
            checks it before anything is generated.

    Returns:
        One entry per benchmark, as written to `out/<benchmark>.json`.

    Raises:
        RelookError: an unknown benchmark, missing data or images, no judge where one is needed, a judge that does not
            answer, or an output folder with another model's answers.
    """
    folder, data, out = loading.open(model), Path(data), Path(out)
    definitions = get_benchmarks(benchmarks)
    settings = begin_evaluation(out, folder, data, GenerationSettings(template, max_new_tokens, batch_size), loading)
    # Scores are cheap and are computed anew, unless they need a judge and none is given.
    scored = [name for name in benchmarks if (out / f"{name}.json").exists()]
    remaining = [name for name in benchmarks if judge or name not in scored or not judged(out, name)]
    questions, faults = dict[str, Questions](), Faults()
    for name in remaining:  # what is missing of each benchmark shows at once
        with faults:
            questions[name] = definitions[name].read_questions(data)
            if name not in scored:
                require_images(questions[name])
        with faults:
            require_judge(name, data, judge)
    faults.check()
    probes = [request for name in remaining if (request := definitions[name].judge_request) is not None]

    @functools.cache
    def load() -> Answerer:
        # A judge that does not answer should show before hours of generation, and before the model is loaded.
        if judge and probes and distributed.is_main():
            judge.open(out).probe(probes[0])
        return loading.load(folder)

    for name in remaining:
        ask_missing(definitions[name], questions[name], load, out, settings)
        # The main process scores the answers of all, so it must wait for the slowest.
        distributed.barrier(f"the answers to {name}")
        if distributed.is_main():
            result = write_result(definitions[name], data, questions[name], out, judge.open(out) if judge else None)
            write_json(out / f"{name}.json", result)
        distributed.barrier(f"the scores of {name}")
    return {name: read_json(out / f"{name}.json") for name in benchmarks}


def judged(out: Path, name: str) -> bool:
    """Return True if an existing result is by a judge behind an endpoint; print how many answers it left unjudged."""
    # Exact annotations are a judge without an address: their score is recomputed like any other.
    result = read_json_object(out / f"{name}.json")
    if "url" not in result.get("judge", {}):
        return False
    if missing := result.get("not_judged"):
        status(f"  {name}: {missing} were not judged; give --judge-url and --judge-model to ask again")
    return True


def shard_images(images: Iterable[Any]) -> set[Any]:
    """Return the images that this process answers for."""
    # Whole images, not questions: all prompts about an image share its prefix in one process.
    return set(distributed.shard(list(dict.fromkeys(images))))


def begin_evaluation(
    out: Path, model: AnyFolder, data: Path | None, settings: GenerationSettings, loading: AnswerSource, **inputs: Any
) -> GenerationSettings:
    """Check the settings and claim the output folder with `claim_eval_dir`, the main process before the others.

    Returns:
        The settings, with the model's own template if they name none.
    """
    model = loading.open(model)
    settings = dataclasses.replace(settings, template=settings.template or loading.template_of(model))
    check_template(settings.template)
    claimed = (out, model, data, settings.template, settings.max_new_tokens, loading)
    # The main process creates the folder's record; the others then find it and only compare.
    if distributed.is_main():
        claim_eval_dir(*claimed, **inputs)
    distributed.barrier("the output folder")
    if not distributed.is_main():
        claim_eval_dir(*claimed, **inputs)
    return settings


def claim_eval_dir(
    out: Path,
    model: AnyFolder,
    data: Path | None,
    template: str,
    max_new_tokens: int,
    loading: AnswerSource,
    **inputs: Any,
) -> None:
    """Claim an output folder for one model, data folder and settings; refuse one that holds other answers.

    Args:
        inputs: further settings that the answers depend on.
    """
    if data is not None and not data.is_dir():
        raise DataError(f"There is no data folder {data}.", "Check --data.")
    settings = {
        **loading.identity(model),
        "data": data and str(data.resolve()),
        "template": template,
        "max_new_tokens": max_new_tokens,
        **inputs,
        "versions": library_versions(),
    }
    claim_output_dir(out, EVAL_FILE, settings, "answers", date=utc_now())


def append_answers(
    answers: Iterable[tuple[int, AnswerT]],
    record: Callable[[int, AnswerT], tuple[AnswerFile, dict[str, Any]]],
    files: Iterable[AnswerFile],
    size: int,
) -> None:
    """Append answers to their files as they come, `size` at a time; on failure, write what is waiting.

    Args:
        answers: (index, answer) pairs.
        record: maps an index and its answer to the file and the record to append.
    """
    waiting: dict[Path, list[dict[str, Any]]] = {file.path: [] for file in files}

    def flush() -> None:
        for file in files:
            file.append(waiting[file.path])
            waiting[file.path].clear()

    try:
        for number, (index, answer) in enumerate(answers, 1):
            file, line = record(index, answer)
            waiting[file.path].append(line)
            if number % size == 0:
                flush()
    finally:  # an error or a keyboard interrupt must not cost answers that are complete
        flush()


def ask_missing(
    benchmark: Benchmark,
    questions: Questions,
    load: Callable[[], Answerer],
    out: Path,
    settings: GenerationSettings,
) -> None:
    """Ask the questions that have no answer yet, and append answers to their files as they come.

    Equal questions are asked once.

    Args:
        load: loads the model; called only if there is something to ask.
    """
    files = {stem: AnswerFile(out / f"{stem}.jsonl", benchmark.id_field, distributed.rank()) for stem in questions}
    images = shard_images(question.image for of_file in questions.values() for question in of_file)
    beams = dict(benchmark.generate).get("num_beams", 1)  # each beam takes as much memory as a prompt
    for short in (True, False):  # a batch has one bound on its answers, so one-word answers come apart
        stems = [stem for stem in questions if (stem in benchmark.yes_or_no) == short]
        missing = [(s, q) for s in stems for q in questions[s] if q.image in images and q.id not in files[s].records]
        own_settings = dataclasses.replace(
            settings,
            max_new_tokens=min(settings.max_new_tokens, YES_NO_MAX_TOKENS) if short else settings.max_new_tokens,
            batch_size=max(1, settings.batch_size // beams),
            generate=benchmark.generate,
        )
        if missing:
            ready = sum(question.image in images for stem in stems for question in questions[stem]) - len(missing)
            _ask(benchmark, missing, load(), {stem: files[stem] for stem in stems}, own_settings, ready)


def _ask(
    benchmark: Benchmark,
    questions: Sequence[tuple[str, Question]],
    answerer: Answerer,
    files: Mapping[str, AnswerFile],
    settings: GenerationSettings,
    ready: int,
) -> None:
    def record(index: int, text: str) -> tuple[AnswerFile, dict[str, Any]]:
        stem, question = questions[index]
        return files[stem], benchmark.record(question, text)

    with progress(benchmark.title, ready) as report:
        answers = answer_questions(
            answerer, [(question.image, question.text) for _, question in questions], settings, report
        )
        append_answers(answers, record, list(files.values()), settings.batch_size)


def write_result(
    benchmark: Benchmark, data: Path, questions: Questions, out: Path, judge: Judge | None
) -> dict[str, Any]:
    """Compute the result of complete answer files, and rewrite these in the order of the questions."""
    answers = {
        stem: AnswerFile(out / f"{stem}.jsonl", benchmark.id_field).finish([question.id for question in of_file])
        for stem, of_file in questions.items()
    }
    return benchmark.score(data, questions, answers, out, judge)
