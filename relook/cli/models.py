"""Commands on model folders."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from relook.cli.command import START, App, print_result
from relook.cli.options import ENGINES, Adapter, AsJson, Device, Dtype, Tower, choice, input_argument, input_option

# ----------------------------------------------------------------------------------------------------

app = App("Models")
Force = Annotated[bool, typer.Option("--force", help="Replace a model folder that is there.")]
ShardSize = Annotated[float, typer.Option("--max-shard-gb", help="Largest weight file in GB.", min=0.001)]
Check = Annotated[bool, typer.Option(help="Compare the logits of source and result on a small input.")]


@app.command()
def convert(
    source: Annotated[Path, input_argument("A model folder.")],
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    to: Annotated[
        str, typer.Option(**choice("format", ("hf", "llava"), "hf (transformers) or llava (liuhaotian's format)."))
    ],
    force: Force = False,
    max_shard_gb: ShardSize = 4.0,
    check: Check = True,
    vision_tower: Tower = None,
) -> None:
    """Write a model in another format."""
    from relook.model.export import WriteOptions, convert_model

    convert_model(source, out, to, WriteOptions(force, max_shard_gb, check, vision_tower))


@app.command()
def merge(
    base: Annotated[Path, input_argument("A model folder.")],
    change: Annotated[Path, input_argument("A training run, a LoRA folder, or a file of trained tensors.")],
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    stage: Annotated[
        int | None,
        typer.Option(
            help="0 adds the post decoder and replaces the head; 1 adds or replaces the post decoder only; 2 replaces "
            "both in a model that has one. Without it the whole change is taken.",
            min=0,
            max=2,
        ),
    ] = None,
    force: Force = False,
    max_shard_gb: ShardSize = 4.0,
    check: Check = True,
    vision_tower: Tower = None,
) -> None:
    """Write a base model with what was trained on it."""
    from relook.model.export import WriteOptions, merge_adapter

    merge_adapter(base, change, out, stage, WriteOptions(force, max_shard_gb, check, vision_tower))


@app.command()
def export(
    source: Annotated[Path, input_argument("A model folder or a training run.")],
    out: Annotated[Path, typer.Argument(help="The new folder.")],
    engine: Annotated[
        str | None, typer.Option("--for", **choice("engine", ENGINES, f"{', '.join(ENGINES)}: a folder that it loads."))
    ] = None,
    force: Force = False,
    max_shard_gb: ShardSize = 4.0,
    check: Check = True,
    vision_tower: Tower = None,
) -> None:
    """Write a model for programs without relook, such as vLLM."""
    from relook.model.export import WriteOptions, export_for, export_model

    options = WriteOptions(force, max_shard_gb, check, vision_tower)
    if engine is None:
        export_model(source, out, options)
    else:
        export_for(source, out, engine, options)


@app.command()
def inspect(
    model: Annotated[Path, input_argument("A model folder, or the output folder of a training run.")],
    image: Annotated[Path | None, input_option("An image: shows the tensors on their way.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What is asked; alone, an example without an image.")] = None,
    adapter: Adapter = None,
    vision_tower: Tower = None,
    dtype: Dtype = "float32",
    device: Device = "",
    as_json: AsJson = None,
) -> None:
    """Show a model's modules, regimes and tensors.

    What would train in each regime, and with --image or --prompt the tensors of an example on their way.
    """
    from relook.model.inspect import inspect_model, print_tables

    print_result(inspect_model(model, image, prompt, adapter, vision_tower, dtype, device), as_json, print_tables)


# ----------------------------------------------------------------------------------------------------
# The command on this machine.


@app.command(rich_help_panel=START)
def doctor(
    explain: Annotated[
        str,
        typer.Option(help="A warning's text: what it means here. - reads a log from standard input, all lists all."),
    ] = "",
    as_json: AsJson = None,
) -> None:
    """Check what this machine can do, and what to mend.

    Status 0: it can do the work, 1: something is missing.
    """
    if explain:
        from relook.doctor import print_known_warnings

        sys.exit(print_known_warnings(sys.stdin.read() if explain == "-" else explain, bool(as_json)))
    from relook.doctor import print_findings, run_checks, to_json

    results = run_checks()
    if as_json:
        typer.echo(json.dumps(to_json(results), indent=1))
    else:
        print_findings(results)
    if not to_json(results)["healthy"]:
        sys.exit(1)
