"""`relook sweep`: many training runs on one base and one trunk cache, POPE (and CHAIR) for each, and one table.

A row is a recipe with some keys replaced. Each row has its own run folder and evaluation folder. After Ctrl-C or a
kill the same command therefore resumes the sweep, and finished rows are not repeated.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from relook.console import status
from relook.errors import Faults, RelookError
from relook.evaluate.compare import compare, hallucination_by_divergence, read_scores
from relook.evaluate.pope_from_cache import FIRST_FILE, CachedPope
from relook.evaluate.results import library_versions
from relook.evaluate.run import claim_eval_dir, evaluate_model
from relook.evaluate.statistics import holm
from relook.evaluate.tasks.chair import instances_file
from relook.evaluate.tasks.pope import SPLITS
from relook.files import is_free, read_json, read_records, sole_writer, write_json, write_text
from relook.model.load import model_hash
from relook.recipe import missing_paths, objective_name, parse_overrides, read_yaml_or_shipped, regime_name
from relook.report.pages import RESULTS_FILE
from relook.sweep_config import BASE, SWEEP_FILE, Sweep, SweepRow, build_sweep
from relook.train import run as training
from relook.train.run import (
    EncodedSamples,
    Samples,
    check_schedule,
    encode_samples,
    read_samples,
    train,
    training_arguments,
)

# Recipe keys that a row's examples depend on, in addition to the base.
EXAMPLE_KEYS = (
    *("task", "vg_path", "desc_data_path", "pope_data_path", "pairs_path", "data_path", "image_folder", "on_bad"),
    *("image_aspect_ratio", "model_max_length", "conversations_per_tree"),
)
RATES = ("accuracy", "precision", "recall", "f1", "yes_ratio")
CHAIR_RATES = ("chair_i", "chair_s", "recall", "length")


def sweep_command(arguments: Sequence[str]) -> Path:
    """Run `relook sweep FILE [--key value ...]` and return the path of the report."""
    name, *keys = arguments
    values = read_yaml_or_shipped(name, "sweep")
    for key, value in parse_overrides(keys).items():
        # --grid.learning_rate replaces one key of the grid, other words replace whole keys of the file.
        head, _, rest = key.partition(".")
        if head == "grid" and rest:
            values["grid"] = {**(values.get("grid") or {}), rest: value}
        else:
            values[key] = value
    return run_sweep(values)


def run_sweep(values: Mapping[str, Any]) -> Path:
    """Run a sweep, or the rest of an unfinished one, and return the path of the report.

    Raises:
        RelookError: anything wrong with a row, the data or the output folder, before anything runs. Also raised if no
            row could be trained.
    """
    sweep = build_sweep(values)
    with sole_writer(sweep.out):
        return _carry_out(sweep, values)


def _carry_out(sweep: Sweep, values: Mapping[str, Any]) -> Path:
    # Everything that a user may get wrong is checked here, before the first model is loaded.
    claim_sweep_dir(sweep, values)
    engine = CachedPope(
        sweep.base,
        Path(sweep.data),
        sweep.out / "states.safetensors",
        sweep.template,
        sweep.loading,
        sweep.batch_size,
        sweep.max_new_tokens,
    )
    if sweep.chair:
        read_json(instances_file(Path(sweep.data)))  # fails now rather than after hours
    failed: dict[str, str] = {}
    waiting = [row for row in sweep.rows if not _finished(sweep, row.name)]
    samples = read_datasets(waiting)
    # The base comes first: its states answer for every frozen-trunk row.
    evaluate_row(sweep, BASE, sweep.base, engine)
    if waiting:
        encoded = encode_datasets(waiting, samples, engine)
        engine.release()  # the base leaves the GPU before rows train
        for number, row in enumerate(sorted(waiting, key=_execution_order), 1):
            status(f"{row.name} ({number} of {len(waiting)})", style="bold")
            try:
                run = train(row.recipe, sweep.loading.device or None, encoded[_data_key(row)])
            except RelookError as error:  # e.g. a learning rate that is too high; the other rows still run
                failed[row.name] = str(error)
                status(f"  {row.name} failed: {error}", style="red")
                continue
            evaluate_row(sweep, row.name, run, engine)
    done = [row for row in sweep.rows if row.name not in failed]
    if not done:
        reason = next(iter(failed.values()))
        raise RelookError(
            f"No row of the sweep could be trained: {reason}", "Fix that, and run the same command again."
        )
    write_json(sweep.out / RESULTS_FILE, {**collect_results(sweep, done), "failed": failed})
    from relook.report.sweep_page import write_sweep_page

    page = write_sweep_page(sweep.out)
    status(f"{page}, {sweep.out / 'table.md'} and {sweep.out / RESULTS_FILE}")
    return page


def claim_sweep_dir(sweep: Sweep, values: Mapping[str, Any]) -> None:
    """Claim the output folder and each row's run folder, so that runs of other recipes are refused up front."""
    sweep_path = sweep.out / SWEEP_FILE
    is_free(sweep.out, SWEEP_FILE, "output_dir")  # an existing sweep may resume there, with rows added or removed
    faults, absent = Faults(), dict[str, RelookError]()
    for row in sweep.rows:
        with faults:
            training_arguments(row.recipe, Path(row.recipe.output_dir))
        for key, error in missing_paths(vars(row.recipe), f" of {row.name}").items():
            absent.setdefault(str(getattr(row.recipe, key)), error)  # once per path, not per row
    faults.errors += absent.values()
    faults.check()
    # Paths become strings, and tuples lists, as a file has them.
    plain = yaml.safe_load(yaml.safe_dump({key: _json_value(value) for key, value in values.items()}))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
    # Written at once, so that the folder belongs to a sweep; written again below once every row has its folder.
    if not sweep_path.exists():
        write_text(sweep_path, text)
    claim_answers(sweep, BASE, sweep.base)
    for row in sweep.rows:
        training.claim_run_dir(Path(row.recipe.output_dir), row.recipe)
    write_text(sweep_path, text)


def _json_value(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def claim_answers(sweep: Sweep, name: str, model: Path) -> None:
    data, length = Path(sweep.data), sweep.max_new_tokens
    claim_eval_dir(sweep.answers(name), model, data, sweep.template, length, sweep.loading_of(name))


def _finished(sweep: Sweep, name: str) -> bool:
    scores = ["pope.json", *(["chair.json"] if sweep.chair else [])]
    return all((sweep.answers(name) / file).exists() for file in scores)


def _data_key(row: SweepRow) -> tuple[Any, ...]:
    return (*(getattr(row.recipe, key) for key in EXAMPLE_KEYS), row.recipe.rates_answers)


def _execution_order(row: SweepRow) -> tuple[Any, ...]:
    """Return a sort key that puts rows with the same trunk states together, those with vision features first."""
    recipe = row.recipe
    attention = recipe.post_decoder.get("attention", "cross") if recipe.tune_post_decoder else "none"
    # Only one trunk cache is in memory. With vision features it serves rows without them, but not the reverse.
    return (not recipe.frozen_trunk, attention == "self_cross", str(_data_key(row)), attention == "none")


def read_datasets(rows: Sequence[SweepRow]) -> dict[tuple[Any, ...], Samples]:
    """Read each distinct dataset of the rows, and check that each row has a step with a learning rate above 0.

    Raises:
        RelookError: all files that cannot be read, and all rows without a step with a learning rate above 0.
    """
    samples: dict[tuple[Any, ...], Samples] = {}
    faults = Faults()
    for row in rows:
        with faults:
            if _data_key(row) not in samples:
                samples[_data_key(row)] = read_samples(row.recipe)
            arguments = training_arguments(row.recipe, Path(row.recipe.output_dir))
            check_schedule(arguments, len(samples[_data_key(row)][0]))
    faults.check()
    return samples


def encode_datasets(
    rows: Sequence[SweepRow], samples: Mapping[tuple[Any, ...], Samples], engine: CachedPope
) -> dict[tuple[Any, ...], EncodedSamples]:
    """Encode each distinct dataset of the rows."""
    encoded: dict[tuple[Any, ...], EncodedSamples] = {}
    for row in rows:
        if _data_key(row) not in encoded:
            loaded = dataclasses.replace(engine.loaded)  # a copy with an image loader of its own
            loaded.images.aspect_ratio = row.recipe.image_aspect_ratio or loaded.aspect_ratio
            encoded[_data_key(row)] = encode_samples(row.recipe, loaded, *samples[_data_key(row)])
    return encoded


def evaluate_row(sweep: Sweep, name: str, model: Path, engine: CachedPope) -> None:
    """Evaluate one model on POPE, and on CHAIR if the sweep asks for it; existing results are kept."""
    out = sweep.answers(name)
    claim_answers(sweep, name, model)
    if not (out / "pope.json").exists():
        scores = engine.evaluate(model, out)
        # The other answers follow from cached states (`CachedPope`).
        generated, total = (sum(scores[split][key] for split in SPLITS) for key in ("generated", "n"))
        status(f"  POPE of {name}: {generated} of {total} answers generated in full")
    if sweep.chair:
        settings = (sweep.template, sweep.batch_size, sweep.max_new_tokens, sweep.loading_of(name))
        evaluate_model(model, ["chair"], Path(sweep.data), out, *settings)


def collect_results(sweep: Sweep, finished: Sequence[SweepRow]) -> dict[str, Any]:
    """Collect the contents of `results.json` from the files of the finished rows."""
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
                "keys": {key: _json_value(value) for key, value in row.keys.items()},
                "method": objective_name(vars(row.recipe)),
                "regime": regime_name(vars(row.recipe)),
                "learning_rate": arguments.learning_rate,
                "epochs": _epochs(sweep, row),
                "seed": arguments.seed,
                **_scores(sweep, row.name),
                "paired": compare(data, base_folder, folder, _benchmarks(sweep)),
                "kl": sum(record["kl"] for record in first) / len(first),
                "kl_bins": hallucination_by_divergence(first, base_first),
            }
        )
    # All rows of a split are compared with one base, so their p-values are corrected together.
    for split in SPLITS:
        corrected = holm([row["paired"]["pope"][split]["mcnemar_p"] for row in rows])
        for result, p in zip(rows, corrected, strict=True):
            result["paired"]["pope"][split]["mcnemar_p_holm"] = p
    return {
        "base": _scores(sweep, BASE),
        "rows": rows,
        "over_seeds": aggregate_seeds(rows),
        "provenance": {
            "model": str(sweep.base),
            "model_hash": model_hash(sweep.base),
            "data": sweep.data,
            "template": sweep.template,
            "dtype": sweep.dtype,
            "versions": library_versions(),
        },
    }


def _scores(sweep: Sweep, name: str) -> dict[str, Any]:
    return read_scores(sweep.answers(name), _benchmarks(sweep))


def _benchmarks(sweep: Sweep) -> list[str]:
    return ["pope", "chair"] if sweep.chair else ["pope"]


def _epochs(sweep: Sweep, row: SweepRow) -> float:
    # The last line of a run's log has the epoch at its end; max_steps may have stopped it early.
    log = read_json(Path(row.recipe.output_dir) / training.RUN_FILE)["log"]
    return round(float(log[-1]["epoch"]), 2) if log else 0.0


def aggregate_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compute mean and sample standard deviation over rows that differ only in the seed."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["variant"], []).append(row)
    return [
        {
            "variant": variant,
            "seeds": [row["seed"] for row in group],
            "pope": {
                s: {rate: _mean_and_std([row["pope"][s][rate] for row in group]) for rate in RATES} for s in SPLITS
            },
            **(
                {"chair": {rate: _mean_and_std([row["chair"][rate] for row in group]) for rate in CHAIR_RATES}}
                if "chair" in group[0]
                else {}
            ),
        }
        for variant, group in groups.items()
        if len(group) > 1
    ]


def _mean_and_std(values: Sequence[float | None]) -> dict[str, float | None]:
    """Compute a rate's mean and sample standard deviation over seeds; None if any seed has no value."""
    defined = [value for value in values if value is not None]
    if len(defined) < len(values):
        return {"mean": None, "sd": None}
    return {"mean": statistics.fmean(defined), "sd": statistics.stdev(defined)}
