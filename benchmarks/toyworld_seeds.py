"""Does tuning help on more than one seed? Several toyworld bases, several tuning seeds, every variant on each.

    python benchmarks/toyworld_seeds.py bases --seeds 1 2 3 4 --out seeds
    python benchmarks/toyworld_seeds.py tune --seeds 11 12 --out seeds

The first command trains base models (in parallel processes) and prints which pass the gate; the second tunes each of
them with each seed, evaluates, and prints a table pooled over all. `--split dev --variants FILE` compares settings on
dev scenes, so that no choice is made on test scenes; FILE is YAML,
{name: {recipe: NAME, key: value, ..., control: NAME}}; a variant is also compared with its control.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from relook.demo import REGIMES, DemoPaths, evaluate_split, mine_pairs, train_regime
from relook.evaluate.compare import compare_pooled, read_scores
from relook.evaluate.tasks.pope import SPLITS
from relook.files import read_json, write_json
from relook.toyworld import layouts

DEMO = {regime: {"recipe": f"toyworld-{regime.replace('_', '-')}"} for regime in REGIMES}
DEMO["post_decoder"]["control"] = "nll_control"
PAIR_SCENES, SCENES = 1000, 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bases", "tune"))
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--threads", type=int, default=2, help="threads of each")
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--variants", type=Path, help="YAML file; without it, the demo's regimes")
    options = parser.parse_args()
    if options.what == "bases":
        make_bases(options)
    else:
        tune_all(options)


def in_parallel(options: argparse.Namespace, job: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Any]:
    pool = ProcessPoolExecutor(options.jobs, get_context("spawn"), _threads, (options.threads,))
    with pool:
        return [future.result() for future in [pool.submit(job, *call) for call in calls]]


def _threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


def make_bases(options: argparse.Namespace) -> None:
    verdicts = in_parallel(options, make_base, [(options.out, seed) for seed in options.seeds])
    for verdict in verdicts:
        print(verdict)
    print(f"{sum(verdict['passed'] for verdict in verdicts)} of {len(verdicts)} bases pass the gate")


def make_base(out: Path, seed: int) -> dict[str, Any]:
    from relook.toyworld.build import build_base

    folder = build_base(out / "bases" / str(seed) / "base", out / "bases" / str(seed) / "world", seed)
    verdict: dict[str, Any] = read_json(folder / "gate.json")
    return verdict


def tune_all(options: argparse.Namespace) -> None:
    bases = sorted(path / "base" for path in (options.out / "bases").iterdir())
    variants = yaml.safe_load(options.variants.read_text()) if options.variants else DEMO
    cells = [
        (base, options.out / options.split / f"{base.parent.name}-{seed}", seed)
        for base in bases
        for seed in options.seeds
    ]
    in_parallel(options, tune_cell, [(*cell, options.split, variants) for cell in cells])
    places = [DemoPaths(out) for _, out, _ in cells]
    result = {
        "cells": {
            p.out.name: {n: read_scores(p.answers(n, options.split)) for n in ("base", *variants)} for p in places
        }
    }
    result["pooled"] = {name: pooled(places, "base", name, options.split) for name in variants}
    controls = {name: keys["control"] for name, keys in variants.items() if "control" in keys}
    result["against_control"] = {name: pooled(places, other, name, options.split) for name, other in controls.items()}
    write_json(options.out / f"{options.split}.json", result)
    print_tables(result)


def tune_cell(base: Path, out: Path, seed: int, split: str, variants: dict[str, dict[str, Any]]) -> None:
    """One base and one tuning seed: mined pairs, every variant trained and evaluated; what is there is kept."""
    places = DemoPaths(out)
    layouts.write_vg(places.world, seed, PAIR_SCENES)
    layouts.write_eval(places.world, split, seed, SCENES)
    evaluate_split(base, places, "base", split)
    mine_pairs(base, places, seed)
    for name, overrides in variants.items():
        changes = {key: value for key, value in overrides.items() if key != "control"}
        train_regime(name, base, places, seed, changes.pop("recipe"), changes)
        evaluate_split(places.run(name), places, name, split)


def pooled(places: Sequence[DemoPaths], first: str, second: str, split: str) -> dict[str, Any]:
    return compare_pooled([(p.world / split, p.answers(first, split), p.answers(second, split)) for p in places])


def print_tables(result: dict[str, Any]) -> None:
    cells = result["cells"]
    print("\nmean over cells (base-seed): " + ", ".join(cells))
    print("| | random | popular | adversarial | yes ratio, adv. | CHAIR_i | CHAIR_s | recall | length |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in next(iter(cells.values())):
        mean = lambda pick: sum(pick(scores[name]) for scores in cells.values()) / len(cells)  # noqa: E731, B023
        row = [mean(lambda s, split=split: s["pope"][split]["accuracy"]) for split in SPLITS]
        row.append(mean(lambda s: s["pope"]["adversarial"]["yes_ratio"]))
        row += [mean(lambda s, key=key: s["chair"][key]) for key in ("chair_i", "chair_s", "recall", "length")]
        print(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row) + " |")
    print("\nper cell: CHAIR_i, recall, adversarial")
    for cell, scores in cells.items():
        print(cell, *(f"{n}: {_three(s)}" for n, s in scores.items()), sep="; ")
    for title, rows in (("minus base", result["pooled"]), ("minus control", result.get("against_control", {}))):
        print(f"\n{title}, pooled over images, paired 95 % intervals")
        for name, found in rows.items():
            chair = {rate: found["chair"][rate] for rate in ("chair_i", "recall")}
            parts = {"adversarial": found["pope"]["adversarial"], **chair}
            print(f"| {name} | " + " | ".join(f"{k} {_signed(v)}" for k, v in parts.items()) + " |")


def _three(scores: dict[str, Any]) -> str:
    chair, pope = scores["chair"], scores["pope"]
    return f"{chair['chair_i']:.3f} {chair['recall']:.3f} {pope['adversarial']['accuracy']:.3f}"


def _signed(found: dict[str, Any]) -> str:
    return f"{found['difference']:+.3f} [{found['ci'][0]:+.3f}, {found['ci'][1]:+.3f}]"


if __name__ == "__main__":
    main()
