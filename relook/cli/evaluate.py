"""Commands that measure models."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from relook.cli.options import (
    Adapter,
    Bits,
    Device,
    Dtype,
    JudgeKey,
    JudgeModel,
    JudgePrice,
    JudgeRequest,
    JudgeUrl,
    JudgeWorkers,
    Tower,
    Version,
    input_argument,
    input_option,
)
from relook.errors import RecipeError, preview
from relook.evaluate.tasks import BENCHMARKS

T = TypeVar("T")
app = typer.Typer()
BENCHMARKS_HELP = ", ".join(BENCHMARKS)
# Options that only some benchmarks have, by those that are asked by themselves, and for all others.
USED = {"lmms": ["tasks", "limit", "include-path"], "llava": ["questions", "data"], "": ["data", "judge-url"]}
ASKED_HELP = f"{BENCHMARKS_HELP}; or lmms, or llava, by itself"


@app.command(name="eval")
def evaluate(
    benchmarks: Annotated[list[str], typer.Argument(help=ASKED_HELP)],
    model: Annotated[Path, input_option("A model folder, or the output folder of a training run.")],
    out: Annotated[Path, typer.Option(help="Folder for answers and scores; run again to go on there.")],
    data: Annotated[
        Path | None, input_option("Folder with the benchmarks' files (docs/evaluation.md); llava: of the images.")
    ] = None,
    version: Version = "",
    batch_size: Annotated[int, typer.Option(help="Prompts that a batch has memory for.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="Longest description in tokens.")] = 512,
    adapter: Adapter = None,
    vision_tower: Tower = None,
    dtype: Dtype = "float32",
    bits: Bits = 16,
    device: Device = "",
    judge_url: JudgeUrl = "",
    judge_model: JudgeModel = "",
    judge_price: JudgePrice = (0.0, 0.0),
    judge_key: JudgeKey = "OPENAI_API_KEY",
    judge_workers: JudgeWorkers = 8,
    judge_request: JudgeRequest = "{}",
    tasks: Annotated[str, typer.Option(help="lmms: tasks of lmms-eval, as mme,gqa.")] = "",
    limit: Annotated[int | None, typer.Option(help="lmms: documents of each task.", min=1)] = None,
    include_path: Annotated[Path | None, input_option("lmms: folder of further tasks (YAML files).")] = None,
    questions: Annotated[Path | None, input_option("llava: question file in one of LLaVA's layouts.")] = None,
) -> None:
    """Answer benchmarks and score them; under torchrun (`-m relook eval ...`) each process takes a share.

    `lmms` asks tasks of lmms-eval, `llava` a question file of LLaVA's, for `relook submission`.
    """
    from relook import distributed
    from relook.evaluate.judge import judge_settings
    from relook.model.load import LoadOptions

    loading = LoadOptions(adapter, vision_tower, dtype, bits, device)
    settings = (out, version, batch_size, max_new_tokens)
    # lmms and llava have options and formats of their own.
    alone = benchmarks[0] if len(benchmarks) == 1 else ""
    if not alone and USED.keys() & set(benchmarks):
        raise RecipeError("lmms and llava cannot be combined with other benchmarks.", "Give one of them alone.")
    # Options of the other kinds of benchmarks are refused, since they would do nothing.
    options = {"tasks": tasks, "limit": limit, "include-path": include_path, "questions": questions, "data": data}
    _refuse_unused_options({**options, "judge-url": judge_url}, USED.get(alone, USED[""]))
    results: Any
    if alone == "lmms":
        from relook.evaluate.lmms import evaluate_tasks

        task_names = [name.strip() for name in _required(tasks, "--tasks").split(",")]
        results = evaluate_tasks(model, task_names, *settings, limit, include_path, loading)
    elif alone == "llava":
        from relook.evaluate.llava_bench import answer_question_file

        results = answer_question_file(model, _required(questions, "--questions"), data, *settings, loading)
    else:
        from relook.evaluate.run import evaluate_model

        judge = judge_settings(judge_url, judge_model, judge_price, judge_key, judge_workers, judge_request)
        results = evaluate_model(model, benchmarks, _required(data, "--data"), *settings, loading, judge)
    if distributed.is_main():  # under torchrun every process gets here
        typer.echo(json.dumps(results, indent=1))


def _required(value: T | None, option: str) -> T:
    if not value:
        raise RecipeError(f"{option} is missing.", "Add it to the command.")
    return value


def _refuse_unused_options(options: Mapping[str, object], used: Collection[str]) -> None:
    """Refuse options that belong to another kind of benchmark.

    Raises:
        RecipeError: such an option is set.
    """
    idle = [f"--{name}" for name, value in options.items() if value and name not in used]
    if idle:
        raise RecipeError(f"{preview(idle)} would do nothing here.", "Leave it out, or give lmms or llava alone.")


@app.command()
def score(
    benchmark: Annotated[str, typer.Argument(help=BENCHMARKS_HELP)],
    answers: Annotated[
        list[Path], input_option("Answer file of any program (AMBER: or two), or a folder of `relook eval`.")
    ],
    data: Annotated[Path | None, input_option("Folder with the benchmark's files.")] = None,
    questions: Annotated[Path | None, input_option("POPE question file; or LLaVA's, with --annotations.")] = None,
    annotations: Annotated[
        Path | None, input_option("chair: COCO's instances file. pope: folder of the labels to LLaVA's questions.")
    ] = None,
    captions: Annotated[Path | None, input_option("chair: COCO's captions file; its objects count, too.")] = None,
    images: Annotated[Path | None, input_option("chair: file that lists the images, one name a line.")] = None,
    parser: Annotated[str, typer.Option(help="pope: official, llava or lmms-eval.")] = "official",
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the scores here too.")] = None,
    judge_url: JudgeUrl = "",
    judge_model: JudgeModel = "",
    judge_price: JudgePrice = (0.0, 0.0),
    judge_key: JudgeKey = "OPENAI_API_KEY",
    judge_workers: JudgeWorkers = 8,
    judge_request: JudgeRequest = "{}",
) -> None:
    """Score existing answers; no model is loaded. A judge's replies are kept beside them, in judge.jsonl."""
    from relook.evaluate.benchmark import ScoringInputs, score_command
    from relook.evaluate.judge import judge_settings

    judge = judge_settings(judge_url, judge_model, judge_price, judge_key, judge_workers, judge_request)
    inputs = ScoringInputs(data, questions, annotations, captions, images)
    result = score_command(benchmark, answers, inputs, parser, judge)
    if json_out is not None:
        from relook.files import write_json

        write_json(json_out, result)
    typer.echo(json.dumps(result, indent=1))


@app.command()
def submission(
    benchmark: Annotated[str, typer.Argument(help="vqav2, vizwiz, gqa, mmbench, mmbench-cn, seed, mm-vet or mme.")],
    answers: Annotated[Path, input_option("Answer file in LLaVA's layout, as `relook eval llava` writes.")],
    out: Annotated[Path, typer.Option(help="What is written: a file, .xlsx or .tsv of a table; mme: a folder.")],
    questions: Annotated[Path | None, input_option("The benchmark's own file (docs/lmms-eval.md).")] = None,
) -> None:
    """Write answers in the form that a benchmark's server or official script takes."""
    from relook.evaluate.llava_bench import write_submission

    typer.echo(json.dumps(write_submission(benchmark, answers, out, questions), indent=1))


@app.command(name="build-pope")
def build_pope(
    annotations: Annotated[Path, input_option('COCO\'s instances file, or {"image", "objects"} records.')],
    out: Annotated[Path, typer.Option(help="Folder for the question files of the three splits.")],
    images: Annotated[int, typer.Option(help="How many images are asked about.", min=1)] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the drawn images and objects.")] = 0,
) -> None:
    """Build POPE's random, popular and adversarial questions from annotations."""
    from relook.evaluate.tasks.build_pope import build_pope_files

    typer.echo(json.dumps(build_pope_files(annotations, out, images, seed), indent=1))


@app.command()
def report(
    folders: Annotated[
        list[Path], input_argument("Two folders of `relook eval`, or folders of `relook demo` or `relook sweep`.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for a comparison; else beside the first.")] = None,
    data: Annotated[Path | None, input_option("The evaluations' data folder, where it has moved.")] = None,
) -> None:
    """Two evaluations side by side in one HTML file; or the report of a demo or a sweep again, from its files."""
    from relook.report.pages import write_reports

    for page in write_reports(folders, out, data):
        typer.echo(str(page))
