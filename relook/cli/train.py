"""Commands that train, or say what training takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from relook.cli.options import AsJson, input_option
from relook.recipe import parse_overrides, read_shipped

app = typer.Typer()
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}


def look_at(name: str, keys: list[str], kind: str = "recipe") -> None:
    """Find a wrong name, or a key without a value, before libraries are loaded, which takes seconds."""
    read_shipped(name, kind)
    parse_overrides(keys)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo makes; run again to go on there.")] = Path(
        "demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the scenes and of the tuning.")] = 0,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Train the base model instead of taking the shipped one.")
    ] = False,
    base: Annotated[Path | None, input_option("Another base model made by --rebuild.")] = None,
) -> None:
    """Toyworld end to end: base model, mined pairs, five trainings, POPE and CHAIR of each, a report."""
    from relook.demo import run_demo

    run_demo(out, seed, rebuild, base)


@app.command(context_settings=EXTRA)
def train(
    context: typer.Context, recipe: Annotated[str, typer.Argument(help="A .yaml file or a shipped recipe's name.")]
) -> None:
    """Train by a recipe; any of its keys, or of transformers' TrainingArguments, may follow as --key value."""
    look_at(recipe, context.args)
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
    look_at(recipe, context.args)
    from relook.estimate.run import Assumed, estimate_command, print_estimate

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
    look_at(file, context.args, "sweep")
    from relook.sweep import sweep_command

    sweep_command([file, *context.args])
