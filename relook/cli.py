"""The `relook` command: one command, one function call."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from relook.cli_data import AsJson, data_app
from relook.errors import RelookError

app = typer.Typer(
    help="Train, evaluate and serve vision-language models that name fewer things which are not in the picture.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(data_app, name="data")
Tower = Annotated[
    Path | None, typer.Option(help="Folder of the vision tower, where the model's config does not lead there.")
]
Adapter = Annotated[Path | None, typer.Option(help="A change that is laid on the model.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Bits = Annotated[int, typer.Option(help="8 or 4 quantise the language model (needs relook[quant]).")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; empty: a GPU where there is one.")]
Version = Annotated[str, typer.Option(help="Conversation template; empty: the model's own.")]
BENCHMARKS_HELP = "pope, chair, shr, amber, mmhal"
JudgeUrl = Annotated[str, typer.Option(help="OpenAI-compatible endpoint of a judge, as https://api.openai.com/v1.")]
JudgeModel = Annotated[str, typer.Option(help="The judge's name there.")]
JudgePrice = Annotated[tuple[float, float], typer.Option(help="Dollars per million tokens: of prompts, of replies.")]
JudgeKey = Annotated[str, typer.Option(help="Environment variable that holds the endpoint's key.")]
JudgeWorkers = Annotated[int, typer.Option(help="Prompts before the judge at once.", min=1)]
JudgeRequest = Annotated[str, typer.Option(help="JSON: further fields of its requests; null leaves one out.")]
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes; run again to go on there.")] = Path(
        "demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the scenes and of the tuning.")] = 0,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Train the base model instead of taking the shipped one.")
    ] = False,
    base: Annotated[Path | None, typer.Option(help="Another base model made by --rebuild.")] = None,
) -> None:
    """Toyworld end to end: base model, mined pairs, five trainings, POPE and CHAIR of each, a report."""
    from relook.demo import run_demo

    run_demo(out, seed, rebuild, base)


@app.command(context_settings=EXTRA)
def train(
    context: typer.Context, recipe: Annotated[str, typer.Argument(help="A .yaml file or a shipped recipe's name.")]
) -> None:
    """Train by a recipe; any of its keys, or of transformers' TrainingArguments, may follow as --key value."""
    from relook.train.run import train_command

    train_command([recipe, *context.args])


@app.command(context_settings=EXTRA)
def estimate(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="A .yaml file or a shipped recipe's name.")],
    gpus: Annotated[int, typer.Option(help="How many train.")] = 1,
    gpu_memory: Annotated[float, typer.Option(help="Of each, in GiB.")] = 80.0,
    prompt_tokens: Annotated[int, typer.Option(help="Where the data is not there: a prompt's text.")] = 50,
    response_tokens: Annotated[int, typer.Option(help="Where the data is not there: an answer.")] = 110,
    samples: Annotated[int, typer.Option(help="Where the data is not there: how many.")] = 1000,
    tflops: Annotated[float, typer.Option(help="TFLOP/s that a GPU reaches, for times.")] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Predict a recipe's memory on each GPU, its trunk cache and its work; any of its keys may follow."""
    from relook.estimate import Assumed, estimate_command, print_estimate

    assumed = Assumed(prompt_tokens, response_tokens, samples)
    found = estimate_command(recipe, context.args, gpus, gpu_memory, assumed, tflops)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        print_estimate(found)


@app.command(context_settings=EXTRA)
def sweep(
    context: typer.Context, file: Annotated[str, typer.Argument(help="A .yaml file or a shipped sweep's name.")]
) -> None:
    """Train and evaluate many variants on one trunk cache; any key of the file or of a recipe may follow."""
    from relook.sweep import sweep_command

    sweep_command([file, *context.args])


@app.command(name="eval")
def evaluate(
    benchmarks: Annotated[list[str], typer.Argument(help=BENCHMARKS_HELP)],
    model: Annotated[Path, typer.Option(help="A model folder, or the output folder of a training run.")],
    data: Annotated[Path, typer.Option(help="Folder with the benchmarks' files (docs/evaluation.md).")],
    out: Annotated[Path, typer.Option(help="Folder for answers and scores; run again to go on there.")],
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
) -> None:
    """Answer benchmarks and score them; under torchrun (`-m relook eval ...`) each process takes a share."""
    from relook import processes
    from relook.evaluate.judge import judge_settings
    from relook.evaluate.run import evaluate_model
    from relook.model.load import Loading

    judge = judge_settings(judge_url, judge_model, judge_price, judge_key, judge_workers, judge_request)

    loading = Loading(adapter, vision_tower, dtype, bits, device)
    results = evaluate_model(model, benchmarks, data, out, version, batch_size, max_new_tokens, loading, judge)
    if processes.first():
        typer.echo(json.dumps(results, indent=1))


@app.command()
def score(
    benchmark: Annotated[str, typer.Argument(help=BENCHMARKS_HELP)],
    answers: Annotated[
        list[Path], typer.Option(help="Answer file of any program (AMBER: or two), or a folder of `relook eval`.")
    ],
    data: Annotated[Path | None, typer.Option(help="Folder with the benchmark's files.")] = None,
    questions: Annotated[Path | None, typer.Option(help="POPE question file; or LLaVA's, with --annotations.")] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="chair: COCO's instances file. pope: folder of the labels to LLaVA's questions.")
    ] = None,
    captions: Annotated[Path | None, typer.Option(help="chair: COCO's captions file; its objects count, too.")] = None,
    images: Annotated[Path | None, typer.Option(help="chair: file that lists the images, one name a line.")] = None,
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
    from relook.evaluate.benchmarks import score_command
    from relook.evaluate.judge import judge_settings
    from relook.evaluate.score import Given

    judge = judge_settings(judge_url, judge_model, judge_price, judge_key, judge_workers, judge_request)
    given = Given(data, questions, annotations, captions, images)
    result = score_command(benchmark, answers, given, parser, judge)
    if json_out is not None:
        from relook.files import write_json

        write_json(json_out, result)
    typer.echo(json.dumps(result, indent=1))


@app.command(name="build-pope")
def build_pope(
    annotations: Annotated[Path, typer.Option(help='COCO\'s instances file, or {"image", "objects"} records.')],
    out: Annotated[Path, typer.Option(help="Folder for the question files of the three splits.")],
    images: Annotated[int, typer.Option(help="How many images are asked about.")] = 500,
    seed: Annotated[int, typer.Option(help="Seed of the drawn images and objects.")] = 0,
) -> None:
    """Build POPE's random, popular and adversarial questions from annotations."""
    from relook.evaluate.pope_build import build_pope

    typer.echo(json.dumps(build_pope(annotations, out, images, seed), indent=1))


Force = Annotated[bool, typer.Option("--force", help="Replace a model folder that is there.")]
ShardSize = Annotated[float, typer.Option("--max-shard-gb", help="Largest weight file in GB.")]
Check = Annotated[bool, typer.Option(help="Compare the logits of source and result on a small input.")]


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A model folder.")],
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    to: Annotated[str, typer.Option(help="hf (transformers) or llava (liuhaotian's format).")],
    force: Force = False,
    max_shard_gb: ShardSize = 4.0,
    check: Check = True,
    vision_tower: Tower = None,
) -> None:
    """Write a model in another format."""
    from relook.model.convert import Writing, convert

    convert(source, out, to, Writing(force, max_shard_gb, check, vision_tower))


@app.command()
def merge(
    base: Annotated[Path, typer.Argument(help="A model folder.")],
    change: Annotated[Path, typer.Argument(help="A training run, a LoRA folder, or a file of trained tensors.")],
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    stage: Annotated[
        int | None,
        typer.Option(
            help="0 adds the post decoder and replaces the head; 1 adds or replaces the post decoder only; 2 replaces "
            "both in a model that has one. Without it the whole change is taken."
        ),
    ] = None,
    force: Force = False,
    max_shard_gb: ShardSize = 4.0,
    check: Check = True,
    vision_tower: Tower = None,
) -> None:
    """Write a base model with what was trained on it."""
    from relook.model.convert import Writing, merge

    merge(base, change, out, stage, Writing(force, max_shard_gb, check, vision_tower))


@app.command()
def export(
    source: Annotated[Path, typer.Argument(help="A model folder or a training run.")],
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    force: Force = False,
    max_shard_gb: ShardSize = 4.0,
    check: Check = True,
    vision_tower: Tower = None,
) -> None:
    """Write a whole model that transformers loads where relook is not installed."""
    from relook.model.convert import Writing, export

    export(source, out, Writing(force, max_shard_gb, check, vision_tower))


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="A model folder, or the output folder of a training run.")],
    image: Annotated[Path | None, typer.Option(help="An image: shows the tensors on their way.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What is asked; alone, an example without an image.")] = None,
    adapter: Adapter = None,
    vision_tower: Tower = None,
    dtype: Dtype = "float32",
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """Show a model's modules, what would train in each regime, and the tensors of an example on their way."""
    from relook.model.inspect import inspect, print_tables

    found = inspect(model, image, prompt, adapter, vision_tower, dtype, device)
    if as_json:
        typer.echo(json.dumps(found, indent=1))
    else:
        print_tables(found)


@app.command()
def mine(
    model: Annotated[Path, typer.Option(help="The model whose mistakes are corrected.")],
    vg_path: Annotated[Path, typer.Option(help="Visual Genome folder: image_data.json, objects.json and images.")],
    out: Annotated[Path, typer.Option(help="Folder for desc_data.json and pope_data.json.")],
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    questions: Annotated[int, typer.Option(help="Yes/no questions an image.")] = 6,
    max_new_tokens: Annotated[int, typer.Option(help="Longest description in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Prompts that a batch has memory for.")] = 64,
    version: Version = "",
    adapter: Adapter = None,
    vision_tower: Tower = None,
    dtype: Dtype = "float32",
    bits: Bits = 16,
    device: Device = "",
) -> None:
    """Mine preference pairs from a model's own descriptions and answers on annotated images."""
    from relook.console import say
    from relook.mine import Mining, mine_visual_genome
    from relook.model.load import Loading

    found = mine_visual_genome(
        model,
        vg_path,
        out,
        Mining(seed=seed, questions=questions, max_new_tokens=max_new_tokens, batch_size=batch_size, template=version),
        loading=Loading(adapter, vision_tower, dtype, bits, device),
    )
    say(f"{found.description_pairs} description pairs and {found.question_pairs} question pairs in {out}")


@app.command()
def serve(
    model: Annotated[Path, typer.Argument(help="A model folder, or the output folder of a training run.")],
    base: Annotated[Path | None, typer.Option(help="Another model to compare with, served beside it.")] = None,
    with_base: Annotated[
        bool, typer.Option("--with-base", help="Serve the model with its change switched off beside it.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    api_key: Annotated[str, typer.Option(envvar="RELOOK_API_KEY", help="Key that clients must send.")] = "",
    slots: Annotated[int, typer.Option(help="Answers at the same time.")] = 16,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more are refused (429).")] = 128,
    max_length: Annotated[int, typer.Option(help="Positions of prompt and answer; 0: the language model's own.")] = 0,
    cache_gb: Annotated[
        float, typer.Option(help="Memory for keys and values of all slots of a model; 0: half of what is free.")
    ] = 0.0,
    timeout: Annotated[float, typer.Option(help="Seconds from a request to the end of its answer.")] = 300.0,
    stop_timeout: Annotated[int, typer.Option(help="Seconds for running answers once the server stops.")] = 30,
    max_image_mb: Annotated[float, typer.Option(help="Largest image file.")] = 20.0,
    max_body_mb: Annotated[float, typer.Option(help="Largest request.")] = 50.0,
    max_images: Annotated[int, typer.Option(help="Most images of a conversation.")] = 16,
    allow_http: Annotated[
        bool, typer.Option("--allow-http", help="Fetch http(s) image URLs, of public hosts.")
    ] = False,
    media_root: Annotated[Path | None, typer.Option(help="Folder below which file: URLs may lie.")] = None,
    version: Version = "",
    adapter: Adapter = None,
    vision_tower: Tower = None,
    dtype: Dtype = "float32",
    bits: Bits = 16,
    device: Device = "",
) -> None:
    """Serve a model over HTTP, as OpenAI's chat API does."""
    from relook.serve import check_installed

    check_installed()
    from relook.model.load import Loading
    from relook.serve import command as run
    from relook.serve.api import Policy
    from relook.serve.media import Sources
    from relook.serve.request import Limits

    sources = Sources(int(max_image_mb * 1e6), allow_http, media_root)
    loading = Loading(adapter, vision_tower, dtype, bits, device)
    run.serve(
        run.Serving(host, port, stop_timeout, version),
        Limits(slots, queue, max_length, cache_gb, seconds=timeout),
        Policy(api_key, sources, max_images, int(max_body_mb * 1e6)),
        lambda: run.load_models(model, loading, base, with_base),
    )


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Two folders of `relook eval`, or folders of `relook demo` or `relook sweep`.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for a comparison; else beside the first.")] = None,
    data: Annotated[Path | None, typer.Option(help="The evaluations' data folder, where it has moved.")] = None,
) -> None:
    """Two evaluations side by side in one HTML file; or the report of a demo or a sweep again, from its files."""
    from relook.report.write import write_reports

    for page in write_reports(folders, out, data):
        typer.echo(str(page))


@app.command()
def doctor(
    explain: Annotated[
        str,
        typer.Option(help="A warning's text: what it means here. - reads a log from standard input, all lists all."),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Whether this machine can do the work, and what to mend. Status 0: it can, 1: something is missing."""
    if explain:
        from relook.notices import print_notices

        sys.exit(print_notices(sys.stdin.read() if explain == "-" else explain, as_json))
    from relook.doctor import examine, print_findings, to_json

    found = examine()
    if as_json:
        typer.echo(json.dumps(to_json(found), indent=1))
    else:
        print_findings(found)
    if not to_json(found)["healthy"]:
        sys.exit(1)


def main() -> None:
    """Entry point. A mistake of the user's ends in one line and status 2, Ctrl-C in one line and status 130."""
    # The libraries' own bars and notices would stand between relook's lines; what a user has set is kept.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except RelookError as error:
        line = " ".join(map(str.strip, str(error).splitlines()))  # a library's reason in it may have several
        sys.stderr.write(f"relook: {line}\n")
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        sys.stderr.write(f"relook: {error.filename}: {error.strerror}. Check the path, and who may write there.\n")
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:  # what typer makes of Ctrl-C
            sys.stderr.write("relook: stopped. Run the same command again to go on from here.\n")
        raise


if __name__ == "__main__":
    main()
