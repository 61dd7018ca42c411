"""Commands that train, or say what training takes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from relook.cli.options import AsJson, input_option
from relook.errors import Faults, RecipeError
from relook.recipe import (
    build_recipe,
    missing_paths,
    read_overrides,
    read_yaml_or_shipped,
    shipped_names,
    sort_keys,
)

app = typer.Typer()
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}


def check_names(name: str, keys: list[str], kind: str = "recipe", complete: bool = True) -> None:
    """Check names of recipe and keys before libraries are loaded, which takes seconds.

    Args:
        complete: True if the recipe must set every required key.

    Raises:
        RecipeError: a wrong recipe name or words that are no keys; then also everything that is wrong with the others.
    """
    faults, file = Faults(), dict[str, Any]()
    if name.startswith("--"):
        fault = f"The command names no {kind} before {name}."
        faults.errors.append(RecipeError(fault, f"Give a .yaml file or one of {', '.join(shipped_names(kind))}."))
        keys = [name, *keys]
    else:
        with faults:
            file = read_yaml_or_shipped(name, kind)
    values, odd = read_overrides(keys)
    faults.errors += odd.errors
    # The command fails anyway, so the seconds are well spent on finding the rest of what is wrong.
    if faults.errors and kind == "recipe":
        with faults:
            if file and complete:
                build_recipe({**file, **values})
            elif values:
                sort_keys(values).faults.check()
        faults.errors += missing_paths({**file, **values}).values()
    faults.check()


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
    check_names(recipe, context.args)
    from relook.console import status
    from relook.train import run

    out = run.train(run.recipe_of_command(recipe, context.args))
    model = shlex.quote(str(out))
    status(f"{out} holds the result. To evaluate it: relook eval pope chair --model {model}, with --data and --out.")


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
    check_names(recipe, context.args, complete=False)
    from relook.estimate.run import AssumedData, estimate_command, print_estimate

    assumed = AssumedData(prompt_tokens, response_tokens, samples)
    estimated = estimate_command(recipe, context.args, gpus, gpu_memory, assumed, tflops)
    if as_json:
        typer.echo(json.dumps(estimated, indent=1))
    else:
        print_estimate(estimated)


@app.command(context_settings=EXTRA)
def sweep(
    context: typer.Context, file: Annotated[str, typer.Argument(help="A .yaml file or a shipped sweep's name.")]
) -> None:
    """Train and evaluate many variants on one trunk cache; any key of the file or of a recipe may follow."""
    check_names(file, context.args, "sweep")
    from relook.sweep import sweep_command

    sweep_command([file, *context.args])
