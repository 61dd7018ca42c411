"""Commands that measure models."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from relook.cli.command import App, print_result
from relook.cli.options import (
    PARSERS,
    SUBMISSIONS,
    Adapter,
    AnsweringModel,
    AsJson,
    Bits,
    Device,
    Dtype,
    Engine,
    EngineArgs,
    EngineKey,
    JudgeKey,
    JudgeModel,
    JudgePrice,
    JudgeRequest,
    JudgeUrl,
    JudgeWorkers,
    Tower,
    Version,
    choice,
    input_argument,
    input_option,
)
from relook.errors import Faults, RecipeError, preview
from relook.evaluate.tasks import BENCHMARKS

FORMATS = ("text", "markdown", "csv")  # of `relook report --table`
app = App("Evaluate")
BENCHMARKS_HELP = ", ".join(BENCHMARKS)
# Options that only some benchmarks have, by those that are asked by themselves, and for all others.
USED = {
    "lmms": ["tasks", "limit", "include-path"],
    "llava": ["questions", "data", "engine"],
    "": ["data", "judge-url", "engine"],
}
ASKED_HELP = f"{BENCHMARKS_HELP}; or lmms, or llava, by itself"


@app.command(name="eval")
def evaluate(
    benchmarks: Annotated[list[str], typer.Argument(**choice("benchmark", (*BENCHMARKS, "lmms", "llava"), ASKED_HELP))],
    model: AnsweringModel,
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
    engine: Engine = "",
    engine_args: EngineArgs = "{}",
    engine_key: EngineKey = "OPENAI_API_KEY",
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
    as_json: AsJson = None,
) -> None:
    """Answer benchmarks and score the answers.

    Under torchrun (`-m relook eval ...`) each process takes a share. `lmms` asks tasks of lmms-eval, `llava` a question
    file of LLaVA's, for `relook submission`.
    """
    from relook.evaluate.judge import judge_settings

    # lmms and llava have options and formats of their own.
    alone = benchmarks[0] if len(benchmarks) == 1 else ""
    options = {"tasks": tasks, "limit": limit, "include-path": include_path, "questions": questions, "data": data}
    required = {"lmms": "tasks", "llava": "questions"}.get(alone, "data")
    # Everything that is wrong is found before torch is imported, which takes seconds.
    faults, judge = Faults(), None
    with faults:
        if not alone and USED.keys() & set(benchmarks):
            raise RecipeError("lmms and llava cannot be combined with other benchmarks.", "Give one of them alone.")
        options |= {"judge-url": judge_url, "engine": engine}
        _refuse_unused_options(options, USED.get(alone, USED[""]), "for these benchmarks")
    with faults:
        if not options[required]:
            raise RecipeError(f"--{required} is missing.", "Add it to the command.")
    with faults:
        judge = judge_settings(judge_url, judge_model, judge_price, judge_key, judge_workers, judge_request)
    faults.check()
    from relook import distributed
    from relook.evaluate.engines import answer_source
    from relook.model.load import LoadOptions

    loading = LoadOptions(adapter, vision_tower, dtype, bits, device)
    source = answer_source(engine, engine_args, engine_key, loading)
    settings = (out, version, batch_size, max_new_tokens)
    results: Any
    if alone == "lmms":
        from relook.evaluate.lmms import evaluate_tasks

        task_names = [name.strip() for name in tasks.split(",")]
        results = evaluate_tasks(model, task_names, *settings, limit, include_path, loading)
    elif alone == "llava":
        from relook.evaluate.llava_bench import answer_question_file

        assert questions is not None  # required above
        results = answer_question_file(model, questions, data, *settings, source)
    else:
        from relook.evaluate.run import evaluate_model

        assert data is not None
        results = evaluate_model(model, benchmarks, data, *settings, source, judge)
    if distributed.is_main():  # under torchrun every process gets here
        from relook.report.score_table import print_scores

        print_result(results, as_json, lambda results: print_scores({alone: results} if alone == "llava" else results))


def _refuse_unused_options(options: Mapping[str, object], used: Collection[str], condition: str) -> None:
    """Refuse options that would do nothing.

    Args:
        condition: the words for the case in which they do nothing.

    Raises:
        RecipeError: such an option is set.
    """
    idle = [f"--{name}" for name, value in options.items() if value and name not in used]
    if idle:
        raise RecipeError(f"{preview(idle)} would do nothing {condition}.", "Leave it out, or change that.")


@app.command()
def score(
    benchmark: Annotated[str, typer.Argument(**choice("benchmark", BENCHMARKS))],
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
    parser: Annotated[str, typer.Option(**choice("parser", PARSERS, f"pope: {', '.join(PARSERS)}."))] = "official",
    json_out: Annotated[
        Path | None, typer.Option("--json", help="File for the scores, too; - prints JSON on a terminal.")
    ] = None,
    judge_url: JudgeUrl = "",
    judge_model: JudgeModel = "",
    judge_price: JudgePrice = (0.0, 0.0),
    judge_key: JudgeKey = "OPENAI_API_KEY",
    judge_workers: JudgeWorkers = 8,
    judge_request: JudgeRequest = "{}",
) -> None:
    """Score existing answers; no model is loaded.

    A judge's replies are kept beside them, in judge.jsonl.
    """
    from relook.evaluate.benchmark import ScoringInputs, score_command
    from relook.evaluate.judge import judge_settings

    judge = judge_settings(judge_url, judge_model, judge_price, judge_key, judge_workers, judge_request)
    inputs = ScoringInputs(data, questions, annotations, captions, images)
    result = score_command(benchmark, answers, inputs, parser, judge)
    to_stdout = json_out == Path("-")
    if json_out is not None and not to_stdout:
        from relook.files import write_json

        write_json(json_out, result)
    from relook.report.score_table import print_scores

    print_result(result, to_stdout or None, lambda result: print_scores({benchmark: result}))


@app.command()
def submission(
    benchmark: Annotated[str, typer.Argument(**choice("submission", SUBMISSIONS))],
    answers: Annotated[Path, input_option("Answer file in LLaVA's layout, as `relook eval llava` writes.")],
    out: Annotated[Path, typer.Option(help="What is written: a file, .xlsx or .tsv of a table; mme: a folder.")],
    questions: Annotated[Path | None, input_option("The benchmark's own file (docs/lmms-eval.md).")] = None,
) -> None:
    """Write answers as a benchmark's server or script takes them."""
    from relook.evaluate.llava_bench import write_submission

    typer.echo(json.dumps(write_submission(benchmark, answers, out, questions), indent=1))


@app.command(name="build-pope")
def build_pope(
    annotations: Annotated[Path, input_option('COCO\'s instances file, or {"image", "objects"} records.')],
    out: Annotated[Path, typer.Option(help="Folder for the question files of the three splits.")],
    images: Annotated[int, typer.Option(help="How many images are asked about.", min=1)] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the drawn images and objects.")] = 0,
) -> None:
    """Build POPE's questions from annotations.

    Random, popular and adversarial ones, as POPE's own program does.
    """
    from relook.evaluate.tasks.build_pope import build_pope_files

    typer.echo(json.dumps(build_pope_files(annotations, out, images, seed), indent=1))


@app.command()
def report(
    folders: Annotated[
        list[Path], input_argument("Two folders of `relook eval`, or folders of `relook demo` or `relook sweep`.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for a comparison, else beside the first; with --table: a file.")
    ] = None,
    data: Annotated[Path | None, input_option("The evaluations' data folder, where it has moved.")] = None,
    table: Annotated[
        bool, typer.Option("--table", help="A line of scores for each evaluation in any number of folders.")
    ] = False,
    form: Annotated[
        str, typer.Option("--format", **choice("format", FORMATS, f"With --table: {', '.join(FORMATS)}."))
    ] = "",
) -> None:
    """Compare two evaluations on a page, or any number in a table.

    Of a demo or a sweep, its report is written again, from its files. With --table, any number of folders give one
    table: model, method, regime, learning rate, epoch, split and scores.
    """
    if table:
        from relook.report.score_table import write_table

        _refuse_unused_options({"data": data}, (), "beside --table")
        typer.echo(write_table(folders, form or FORMATS[0], out), nl=False)
        return
    _refuse_unused_options({"format": form}, (), "without --table")
    from relook.report.pages import write_reports

    for page in write_reports(folders, out, data):
        typer.echo(str(page))
