"""`relook sweep`: many training runs on one base and one trunk cache, POPE (and CHAIR) of each, one table.

A row is a recipe with some keys replaced. Each has a run folder and an evaluation folder of its own, so the same
command goes on after Ctrl-C or a kill, and a finished row is not run again.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from relook.console import say
from relook.errors import RecipeError, RelookError
from relook.evaluate.compare import by_divergence, compare
from relook.evaluate.pope_from_cache import FIRST_FILE, CachedPope
from relook.evaluate.results import versions
from relook.evaluate.run import claim, evaluate_model
from relook.evaluate.score import annotation_file, read_scores
from relook.evaluate.statistics import holm
from relook.evaluate.tasks.pope import SPLITS
from relook.files import read_json, read_records, takes, write_json, write_text
from relook.model.load import model_hash
from relook.recipe import Recipe, parse_overrides, read_shipped
from relook.report.pages import RESULTS_FILE
from relook.sweep_config import BASE, SWEEP_FILE, Row, Sweep, build_sweep
from relook.train import run as training
from relook.train.run import Encoded, encode_samples, read_samples, train, training_arguments

# What the examples of a row depend on, besides the base.
DATA_KEYS = (
    *("task", "vg_path", "desc_data_path", "pope_data_path", "pairs_path", "data_path", "image_folder", "on_bad"),
    *("image_aspect_ratio", "model_max_length", "conversations_per_tree"),
)
RATES = ("accuracy", "precision", "recall", "f1", "yes_ratio")
CHAIR_RATES = ("chair_i", "chair_s", "recall", "length")


def sweep_command(arguments: Sequence[str]) -> Path:
    """`relook sweep FILE [--key value ...]`; returns the report's path."""
    name, *keys = arguments
    values = read_shipped(name, "sweep")
    for key, value in parse_overrides(keys).items():
        head, _, rest = key.partition(".")
        if head == "grid" and rest:
            values["grid"] = {**(values.get("grid") or {}), rest: value}
        else:
            values[key] = value
    return run_sweep(values)


def run_sweep(values: Mapping[str, Any]) -> Path:
    """Carry out a sweep, or what is left of it; returns the report's path.

    Raises:
        RelookError: anything wrong with a row, the data or the output folder, before anything runs.
    """
    sweep = build_sweep(values)
    take(sweep, values)
    engine = CachedPope(
        sweep.base,
        Path(sweep.data),
        sweep.out / "states.safetensors",
        sweep.template,
        sweep.loading,
        sweep.batch_size,
    )
    if sweep.chair:
        read_json(annotation_file(Path(sweep.data)))
    failed: dict[str, str] = {}
    waiting = [row for row in sweep.rows if not _finished(sweep, row.name)]
    evaluate(sweep, BASE, sweep.base, engine)
    if waiting:
        encoded = encode(sweep, waiting, engine)
        engine.release()
        for number, row in enumerate(sorted(waiting, key=_order), 1):
            say(f"{row.name} ({number} of {len(waiting)})", style="bold")
            try:
                run = train(row.recipe, sweep.loading.device or None, encoded[_data_key(row)])
            except RelookError as error:  # a rate that is too high must not cost the other rows
                failed[row.name] = str(error)
                say(f"  {row.name} failed: {error}", style="red")
                continue
            evaluate(sweep, row.name, run, engine)
    done = [row for row in sweep.rows if row.name not in failed]
    if not done:
        why = next(iter(failed.values()))
        raise RelookError(f"No row of the sweep could be trained: {why}", "Mend that, and run the same command again.")
    write_json(sweep.out / RESULTS_FILE, {**collect(sweep, done), "failed": failed})
    from relook.report.sweep_page import write_page

    page = write_page(sweep.out)
    say(f"{page}, {sweep.out / 'table.md'} and {sweep.out / RESULTS_FILE}")
    return page


def take(sweep: Sweep, values: Mapping[str, Any]) -> None:
    """Take the output folder; each row takes its run folder, so that one of another recipe is refused now."""
    held = sweep.out / SWEEP_FILE
    takes(sweep.out, SWEEP_FILE, "output_dir")  # a sweep may go on there, with rows more or fewer
    for row in sweep.rows:
        training_arguments(row.recipe, Path(row.recipe.output_dir))
        images = ["image_folder"] if row.recipe.task == "sft" else []  # beside pairs_path, it is written to
        for key in ("vg_path", "desc_data_path", "pope_data_path", "pairs_path", "data_path", *images):
            path = getattr(row.recipe, key)
            if path and not Path(path).exists():
                raise RecipeError(f"{key} {path} of {row.name} does not exist.", "Check the path.")
    plain = yaml.safe_load(yaml.safe_dump({key: _plain(value) for key, value in values.items()}))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    if not held.exists():
        write_text(held, text)
    claim_answers(sweep, BASE, sweep.base)
    for row in sweep.rows:
        training.claim(Path(row.recipe.output_dir), row.recipe)
    write_text(held, text)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def claim_answers(sweep: Sweep, name: str, model: Path) -> None:
    data, length = Path(sweep.data), sweep.max_new_tokens
    claim(sweep.answers(name), model, data, sweep.template, length, sweep.loading_of(name))


def _finished(sweep: Sweep, name: str) -> bool:
    wanted = ["pope.json", *(["chair.json"] if sweep.chair else [])]
    return all((sweep.answers(name) / file).exists() for file in wanted)


def _data_key(row: Row) -> tuple[Any, ...]:
    return tuple(getattr(row.recipe, key) for key in DATA_KEYS)


def _order(row: Row) -> tuple[Any, ...]:
    """Rows that share trunk states follow each other, those that need the vision features, too, first."""
    recipe = row.recipe
    attention = recipe.post_decoder.get("attention", "cross") if recipe.tune_post_decoder else "none"
    return (not recipe.frozen_trunk, attention == "self_cross", str(_data_key(row)), attention == "none")


def encode(sweep: Sweep, rows: Sequence[Row], engine: CachedPope) -> dict[tuple[Any, ...], Encoded]:
    """The examples of every distinct set of data among the rows."""
    found: dict[tuple[Any, ...], Encoded] = {}
    for row in rows:
        if _data_key(row) not in found:
            loaded = dataclasses.replace(engine.loaded)  # with an image loader of its own
            loaded.images.aspect_ratio = row.recipe.image_aspect_ratio or loaded.aspect_ratio
            found[_data_key(row)] = encode_samples(row.recipe, loaded, *read_samples(row.recipe))
    return found


def evaluate(sweep: Sweep, name: str, model: Path, engine: CachedPope) -> None:
    """POPE, and CHAIR where it is wanted, of one model; what is there already is not asked again."""
    out = sweep.answers(name)
    claim_answers(sweep, name, model)
    if not (out / "pope.json").exists():
        scores = engine.evaluate(model, out)
        whole = sum(scores[split]["generated"] for split in SPLITS)
        say(f"  POPE of {name}: {whole} of {sum(scores[split]['n'] for split in SPLITS)} answers generated in full")
    if sweep.chair:
        how = (sweep.template, sweep.batch_size, sweep.max_new_tokens, sweep.loading_of(name))
        evaluate_model(model, ["chair"], Path(sweep.data), out, *how)


def collect(sweep: Sweep, finished: Sequence[Row]) -> dict[str, Any]:
    """What `results.json` says of the finished rows, from their files."""
    data, base_folder = Path(sweep.data), sweep.answers(BASE)
    base_first = read_records(base_folder / FIRST_FILE)
    rows = []
    for row in finished:
        folder = sweep.answers(row.name)
        first = read_records(folder / FIRST_FILE)
        arguments = training_arguments(row.recipe, Path(row.recipe.output_dir))
        rows.append(
            {
                "name": row.name,
                "variant": row.variant,
                "keys": {key: _plain(value) for key, value in row.keys.items()},
                "method": method(row.recipe),
                "regime": regime(row.recipe),
                "learning_rate": arguments.learning_rate,
                "epochs": _epochs(sweep, row),
                "seed": arguments.seed,
                **_scores(sweep, row.name),
                "paired": compare(data, base_folder, folder, _benchmarks(sweep)),
                "kl": sum(record["kl"] for record in first) / len(first),
                "kl_bins": by_divergence(first, base_first),
            }
        )
    for split in SPLITS:
        corrected = holm([row["paired"]["pope"][split]["mcnemar_p"] for row in rows])
        for found, p in zip(rows, corrected, strict=True):
            found["paired"]["pope"][split]["mcnemar_p_holm"] = p
    return {
        "base": _scores(sweep, BASE),
        "rows": rows,
        "over_seeds": over_seeds(rows),
        "provenance": {
            "model": str(sweep.base),
            "model_hash": model_hash(sweep.base),
            "data": sweep.data,
            "template": sweep.template,
            "dtype": sweep.dtype,
            "versions": versions(),
        },
    }


def _scores(sweep: Sweep, name: str) -> dict[str, Any]:
    return read_scores(sweep.answers(name), _benchmarks(sweep))


def _benchmarks(sweep: Sweep) -> list[str]:
    return ["pope", "chair"] if sweep.chair else ["pope"]


def _epochs(sweep: Sweep, row: Row) -> float:
    log = read_json(Path(row.recipe.output_dir) / training.RUN_FILE)["log"]
    return round(float(log[-1]["epoch"]), 2) if log else 0.0


LOSSES = {
    "sigmoid": "DPO",
    "ipo": "IPO",
    "hinge": "hinge DPO",
    "robust": "robust DPO",
    "simpo": "SimPO",
    "orpo": "odds ratio",
}


def method(recipe: Recipe) -> str:
    """The objective, as tables call it."""
    if recipe.task == "sft":
        return "SFT"
    parts = {
        LOSSES[recipe.loss_type]: recipe.dpo_weight,
        "mDPO conditional": recipe.mdpo_conditional_weight,
        "mDPO anchored": recipe.mdpo_anchored_weight,
    }
    terms = [name for name, weight in parts.items() if weight]
    if not terms:
        return "NLL of chosen"
    return " + ".join([*terms, *(["NLL"] if recipe.nll_weight else [])])


def regime(recipe: Recipe) -> str:
    """What trained."""
    parts = {
        "LoRA": recipe.lora_enable,
        "post decoder": recipe.tune_post_decoder,
        "head": recipe.tune_lm_head,
        "projector": recipe.tune_mm_mlp_adapter,
        "full": recipe.full,
    }
    return " + ".join(name for name, trained in parts.items() if trained)


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over rows that differ in the seed alone."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["variant"], []).append(row)
    return [
        {
            "variant": variant,
            "seeds": [row["seed"] for row in group],
            "pope": {s: {rate: _spread([row["pope"][s][rate] for row in group]) for rate in RATES} for s in SPLITS},
            **(
                {"chair": {rate: _spread([row["chair"][rate] for row in group]) for rate in CHAIR_RATES}}
                if "chair" in group[0]
                else {}
            ),
        }
        for variant, group in groups.items()
        if len(group) > 1
    ]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values)}
