"""Commands that make and mend data: `relook mine` and `relook data ...`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from relook.cli.command import App
from relook.cli.options import (
    BY,
    LAYOUTS,
    PAIR_LAYOUTS,
    Adapter,
    AnsweringModel,
    AsJson,
    Bits,
    By,
    Device,
    Dtype,
    Engine,
    EngineArgs,
    EngineKey,
    MiningOptions,
    Tower,
    choice,
    input_argument,
    input_option,
)

app = App("Data")
data_app = App(help="Check, repair and convert dataset folders.", no_args_is_help=True)
app.add_typer(data_app, name="data", rich_help_panel="Data")
LayoutName = Annotated[str, typer.Option(**choice("layout", LAYOUTS))]
Images = Annotated[
    Path | None, input_option("Root of the images, where it is elsewhere (Visual Genome, val2014, ...).")
]
Workers = Annotated[int, typer.Option(help="Processes; 0: one for each processor.", min=0)]


@data_app.command(name="check")
def data_check(
    folder: Annotated[Path, input_argument("The dataset's folder.")],
    layout: LayoutName,
    images: Images = None,
    named_only: Annotated[bool, typer.Option("--named-only", help="Leave out images that no record names.")] = False,
    workers: Workers = 0,
    as_json: AsJson = None,
) -> None:
    """Find what is missing, and every defect of records and images.

    Status 0: clean, 1: defects.
    """
    from relook.data.check import check_folder, print_report

    checked = check_folder(layout, folder, images, named_only, workers)
    if as_json:
        typer.echo(json.dumps(checked.to_json(), indent=1))
    else:
        print_report(checked)
    if not checked.clean:
        sys.exit(1)


@data_app.command(name="fix")
def data_fix(
    folder: Annotated[Path, input_argument("The dataset's folder.")],
    layout: LayoutName,
    out: Annotated[Path | None, typer.Option(help="A new folder; run again to go on there.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Change the folder itself.")] = False,
    images: Images = None,
    broken: Annotated[
        str,
        typer.Option(
            **choice("--broken", ("drop", "list"), "drop leaves records that cannot be used out, list names them.")
        ),
    ] = "drop",
    copy: Annotated[bool, typer.Option("--copy", help="Copy sound images instead of linking them.")] = False,
    workers: Workers = 0,
    as_json: AsJson = None,
) -> None:
    """Repair a folder.

    Images of a wrong format or mode are written again, and an index without the records that cannot be used.
    """
    from relook.console import status
    from relook.data.check import fix_folder, summary

    done = fix_folder(layout, folder, out, in_place=in_place, images=images, broken=broken, copy=copy, workers=workers)
    if as_json:
        typer.echo(json.dumps(done, indent=1))
    else:
        status(f"{summary(done)} {(out or folder) / 'relook-fix.json'} names them.")


@data_app.command(name="convert")
def data_convert(
    source: Annotated[
        Path, input_argument("A folder of HA-DPO's files, SENTINEL's file, a parquet file, or a folder of some.")
    ],
    out: Annotated[Path, typer.Argument(help="A new folder (hadpo, sentinel), or a new .parquet file (the others).")],
    to: Annotated[str, typer.Option(**choice("preference layout", PAIR_LAYOUTS))],
    images: Images = None,
) -> None:
    """Convert preference pairs from one layout to another.

    What a layout cannot hold is kept by name or refused.
    """
    from relook.console import status
    from relook.data.convert import convert_pairs

    status(f"{convert_pairs(source, out, to, images):,} pairs in {out}")


@app.command()
def mine(
    model: AnsweringModel,
    mining: MiningOptions,
    out: Annotated[Path, typer.Option(help="Folder for the pairs; run again to go on there.")],
    by: By = BY[0],
    earlier: Annotated[
        Path | None, input_option("Pairs mined before from the same images, which come first in the files.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    adapter: Adapter = None,
    vision_tower: Tower = None,
    dtype: Dtype = "float32",
    bits: Bits = 16,
    device: Device = "",
    engine: Engine = "",
    engine_args: EngineArgs = "{}",
    engine_key: EngineKey = "OPENAI_API_KEY",
) -> None:
    """Make preference pairs from a model's own mistakes.

    torchrun (`-m relook mine ...`) shares the work.
    """
    import time

    from relook.console import status
    from relook.evaluate.engines import answer_source
    from relook.mine.run import mine_pairs
    from relook.model.load import LoadOptions

    started = time.monotonic()
    judge, settings = mining.judge_settings(), mining.settings(by, seed, parquet=True)
    answers = answer_source(engine, engine_args, engine_key, LoadOptions(adapter, vision_tower, dtype, bits, device))
    card = mine_pairs(model, mining.source(earlier), out, settings, judge, answers)
    described = card["descriptions"]
    pairs = [card[kind]["pairs"] for kind in ("descriptions", "questions")]
    status(
        f"{pairs[0]:,} {by} pairs and {pairs[1]:,} question pairs in {out}: README.md there has the counts, "
        "pairs.html shows some."
    )
    if not pairs[0]:
        dropped = "".join(f", {count:,} dropped ({reason})" for reason, count in described["dropped"].items())
        status(
            f"  no {by} pairs: of {described['made']:,} {by}s, mistakes were found in {described['hallucinated']:,}"
            f"{dropped}",
            style="yellow",
        )
    if pairs[0] and (cost := described.get("cost")):
        rate = 60 * pairs[0] / (time.monotonic() - started)
        counts = f"{cost['images_read']:,} image readings, {cost['tokens_sampled']:,} tokens, {cost['checks']:,} checks"
        status(f"Cost: {counts}; {rate:,.0f} pairs a minute in this run")
