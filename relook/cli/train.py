"""Commands that train, or say what training takes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from relook.cli.command import START, App, RecipeCommand, print_result
from relook.cli.options import (
    BY,
    Adapter,
    AsJson,
    By,
    Device,
    Dtype,
    Engine,
    EngineArgs,
    MiningOptions,
    Tower,
    completion,
    input_option,
)
from relook.errors import Faults, RecipeError
from relook.recipe import (
    build_recipe,
    missing_paths,
    parse_overrides,
    read_overrides,
    read_yaml_or_shipped,
    shipped_names,
    sort_keys,
)

app = App("Train")
RecipeName = Annotated[
    str,
    typer.Argument(
        help="A .yaml file or a shipped recipe's name.", autocompletion=completion(lambda: shipped_names("recipe"))
    ),
]
EXTRA = {"allow_extra_args": True, "ignore_unknown_options": True}


def check_names(
    name: str, keys: list[str], kind: str = "recipe", complete: bool = True, options: Sequence[str] = ()
) -> None:
    """Check names of recipe and keys before libraries are loaded, which takes seconds.

    Args:
        complete: True if the recipe must set every required key.
        options: the command's own options, one of which an unknown key may have meant.

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
    if kind == "recipe":
        with faults:
            if file and complete:
                build_recipe({**file, **values})
            elif values:
                sort_keys(values, options).faults.check()
        if faults.errors:
            faults.errors += missing_paths({**file, **values}).values()
    faults.check()


@app.command(rich_help_panel=START)
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
    """Run everything on small drawn pictures, in minutes.

    Toyworld end to end: base model, mined pairs, five trainings, POPE and CHAIR of each, a report.
    """
    from relook.demo import run_demo

    run_demo(out, seed, rebuild, base)


@app.command()
def recipes(as_json: AsJson = None) -> None:
    """List the shipped recipes: what each trains, and its source."""
    from relook.recipe_help import print_recipes, shipped_recipes

    print_result(shipped_recipes(), as_json, print_recipes)


@app.command(cls=RecipeCommand, context_settings=EXTRA)
def train(context: typer.Context, recipe: RecipeName) -> None:
    """Train by a recipe; its keys may follow as --key value.

    So may those of transformers' TrainingArguments. `relook recipes` lists the shipped recipes, `relook train RECIPE
    --help` the keys of one.
    """
    check_names(recipe, context.args)
    from relook.console import status
    from relook.train import run
    from relook.train.summary import run_summary

    chosen = run.recipe_of_command(recipe, context.args)
    out = run.train(chosen)
    status(run_summary(chosen, out))


@app.command(cls=RecipeCommand, context_settings=EXTRA)
def estimate(
    context: typer.Context,
    recipe: RecipeName,
    gpus: Annotated[int, typer.Option(help="How many train.")] = 1,
    gpu_memory: Annotated[float, typer.Option(help="Of each, in GiB.")] = 80.0,
    prompt_tokens: Annotated[int, typer.Option(help="Where the data is not there: a prompt's text.")] = 50,
    response_tokens: Annotated[int, typer.Option(help="Where the data is not there: an answer.")] = 110,
    samples: Annotated[int, typer.Option(help="Where the data is not there: how many.")] = 1000,
    tflops: Annotated[float, typer.Option(help="TFLOP/s that a GPU reaches, for times.")] = 0.0,
    as_json: AsJson = None,
) -> None:
    """Predict a recipe's memory, trunk cache and work.

    Nothing is trained and no data are needed. Any of the recipe's keys may follow as --key value.
    """
    options = [option.removeprefix("--") for parameter in context.command.params for option in parameter.opts]
    faults, assumed = Faults(), None
    check_names(recipe, context.args, complete=False, options=options)
    from relook.estimate.run import AssumedData, check_hardware, estimate_command, print_estimate

    with faults:
        check_hardware(gpus, gpu_memory, tflops)
    with faults:
        assumed = AssumedData(prompt_tokens, response_tokens, samples)
    faults.check()
    assert assumed is not None
    estimated = estimate_command(recipe, context.args, gpus, gpu_memory, assumed, tflops)
    print_result(estimated, as_json, print_estimate)


@app.command(cls=RecipeCommand, context_settings=EXTRA)
def align(
    context: typer.Context,
    recipe: RecipeName,
    model: Annotated[Path, input_option("The base model.")],
    mining: MiningOptions,
    data: Annotated[Path, input_option("Dev set: a folder as `relook eval chair` takes; not the test set.")],
    out: Annotated[Path, typer.Option(help="Folder of the rounds; run again to go on there.")],
    rounds: Annotated[int, typer.Option(help="Largest number of rounds.", min=1)] = 3,
    min_gain: Annotated[
        float, typer.Option(help="Stop where CHAIR_i at equal recall falls by no more than this share.", min=0)
    ] = 0.0,
    by: By = BY[1],
    seed: Annotated[int, typer.Option(help="Seed of sampling, and of training.")] = 0,
    adapter: Adapter = None,
    vision_tower: Tower = None,
    dtype: Dtype = "float32",
    device: Device = "",
    engine: Engine = "",
    engine_args: EngineArgs = "{}",
) -> None:
    """Align a model in rounds: mine pairs from its mistakes, train on them, evaluate on a dev set, and again.

    The recipe's keys may follow as --key value. Each step is a command of its own, which is shown as it begins; the
    rounds stop where invented objects at equal recall do not fall any more. One report shows all rounds.
    """
    options = [option.removeprefix("--") for parameter in context.command.params for option in parameter.opts]
    check_names(recipe, context.args, complete=False, options=options)
    from relook.align import AlignSettings, align
    from relook.model.load import LoadOptions

    keys = {**parse_overrides(context.args), "seed": seed}
    if mining.version:
        keys["version"] = mining.version
    parts = {"adapter_name_or_path": adapter, "vision_tower": vision_tower}
    keys |= {key: str(path) for key, path in parts.items() if path}
    adapter, tower = (Path(keys[key]) if keys.get(key) else None for key in parts)
    page = align(
        model,
        mining.source(),
        out,
        AlignSettings(recipe, keys, data, rounds, min_gain, engine, engine_args),
        mining.settings(by, seed, parquet=False),
        mining.judge_settings(),
        LoadOptions(adapter, tower, dtype, 16, device),
    )
    typer.echo(str(page))


@app.command(context_settings=EXTRA)
def sweep(
    context: typer.Context,
    file: Annotated[
        str,
        typer.Argument(
            help="A .yaml file or a shipped sweep's name.", autocompletion=completion(lambda: shipped_names("sweep"))
        ),
    ],
    as_json: AsJson = None,
) -> None:
    """Train and evaluate many variants on one trunk cache.

    Any key of the file or of a recipe may follow as --key value.
    """
    check_names(file, context.args, "sweep")
    from relook.files import read_json
    from relook.report.pages import RESULTS_FILE
    from relook.report.score_table import write_table
    from relook.sweep import sweep_command

    folder = sweep_command([file, *context.args]).parent
    print_result(
        read_json(folder / RESULTS_FILE), as_json, lambda _: typer.echo(write_table([folder], "text"), nl=False)
    )
