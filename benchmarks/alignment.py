"""Do three rounds of sentence-level pairs help more than one round of whole descriptions with as many pairs?

    python benchmarks/alignment.py --seeds 31 32 33 --out alignment      # one process for each arm and seed
    python benchmarks/alignment.py --seeds 31 --out tiny --scenes 60 --test-scenes 40 --jobs 1

For each seed, on toyworld's exact annotations and its shipped base:
- description: `relook mine` as it is by default, one round; its number of pairs is that of all arms;
- sentence: three rounds of `relook mine --by sentence`, a third of the pairs each, from a third of the images each;
- nll: the same three rounds, trained on the true sentences alone (dpo_weight 0);
- one_round: sentence-level pairs of one round, as many.
All arms train by the same recipe, so often on each pair, without question pairs. Models are compared on test scenes at
equal recall, with intervals that resample the images of all seeds.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from relook.evaluate.compare import compare_pooled
from relook.evaluate.run import evaluate_model
from relook.evaluate.statistics import rate_difference
from relook.evaluate.tasks.chair import coverage_curve, data_truth, equal_coverage, read_eval_captions
from relook.files import read_json, write_json
from relook.mine.jobs import MiningSettings, MiningSource
from relook.mine.run import mine_pairs
from relook.recipe import load_recipe
from relook.report.tables import change
from relook.toyworld import layouts
from relook.toyworld.build import shipped_base
from relook.train.run import train

ROUNDS = 3
ARMS = {"description": 1, "sentence": ROUNDS, "nll": ROUNDS, "one_round": 1}  # with their rounds
EPOCHS = 6  # over sentences; HA-DPO's reader takes each description twice an epoch
NLL = {"dpo_weight": 0.0, "nll_weight": 1.0}
CONTRASTS = (("description", "sentence"), ("nll", "sentence"), ("one_round", "sentence"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=600, help="to mine")
    parser.add_argument("--test-scenes", type=int, default=1000)
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--recipe", default="toyworld-lora")
    parser.add_argument("--keys", nargs="*", default=[], help="recipe keys as key=value")
    parser.add_argument("--jobs", type=int, default=12, help="single-thread processes at a time")
    options = parser.parse_args()
    pool = ProcessPoolExecutor(options.jobs, get_context("spawn"), _one_thread)
    with pool:
        for future in [pool.submit(prepare, options, seed) for seed in options.seeds]:
            print(future.result(), flush=True)
        cells = [pool.submit(run_arm, options, seed, arm) for arm in ARMS for seed in options.seeds]
        for future in cells:
            print(future.result(), flush=True)
    report(options)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def source_of(options: argparse.Namespace, seed: int) -> MiningSource:
    world = options.out / str(seed) / "world"
    return MiningSource(world / "vg", "toyworld", exclude=[world / options.split])


def settings(**changes: Any) -> MiningSettings:
    # Toyworld's sentences are set phrases: similar texts are no duplicates.
    common = {"questions": 0, "max_new_tokens": 64, "batch_size": 100, "near_texts": 0, "parquet": False}
    return MiningSettings(**{**common, **changes})


def prepare(options: argparse.Namespace, seed: int) -> str:
    """Draw the scenes, evaluate the base and mine whole descriptions, whose number of pairs all arms get."""
    folder = options.out / str(seed)
    layouts.write_vg(folder / "world", seed, options.scenes)
    layouts.write_eval(folder / "world", options.split, seed, options.test_scenes)
    evaluate(options, seed, shipped_base(), "base")
    card = mine_pairs(shipped_base(), source_of(options, seed), folder / "description" / "pairs1", settings(seed=seed))
    return f"seed {seed}: {card['descriptions']['pairs']} pairs"


def evaluate(options: argparse.Namespace, seed: int, model: Path, name: str) -> None:
    folder = options.out / str(seed)
    data, answers = folder / "world" / options.split, folder / "eval" / name
    evaluate_model(model, ["chair"], data, answers, max_new_tokens=64, batch_size=100)


def run_arm(options: argparse.Namespace, seed: int, arm: str) -> str:
    """Mine, train and evaluate, round by round."""
    started, folder, model = time.monotonic(), options.out / str(seed), shipped_base()
    wanted = read_json(folder / "description" / "pairs1" / "card.json")["descriptions"]["pairs"]
    counts = []
    for number in range(1, ARMS[arm] + 1):
        pairs = folder / arm / f"pairs{number}"
        if arm == "description":
            keys: dict[str, Any] = {"desc_data_path": pairs / "desc_data.json", "num_train_epochs": EPOCHS // 2}
        else:
            drawn = {"max_pairs": wanted // ARMS[arm], "max_images": options.scenes // ARMS[arm]}
            mine_pairs(model, source_of(options, seed), pairs, settings(seed=seed + number, by="sentence", **drawn))
            keys = {"pairs_path": pairs / "sentinel.json", "num_train_epochs": EPOCHS}
        counts.append(read_json(pairs / "card.json")["descriptions"]["pairs"])
        run = folder / arm / f"run{number}"
        own = dict(key.split("=", 1) for key in options.keys)
        paths = {"model_name_or_path": model, "vg_path": pairs, "output_dir": run, "seed": seed}
        train(load_recipe(options.recipe, {**own, **paths, **keys, **(NLL if arm == "nll" else {})}))
        model = run
        evaluate(options, seed, model, f"{arm}{number}")
    return f"seed {seed}, {arm}: {' + '.join(map(str, counts))} pairs, {time.monotonic() - started:.0f} s"


# --- comparison


def report(options: argparse.Namespace) -> None:
    names = ["base", *(f"{arm}{number}" for arm, rounds in ARMS.items() for number in range(1, rounds + 1))]
    curves = {seed: curves_of(options, seed, names) for seed in options.seeds}
    result: dict[str, Any] = {"scores": {}, "equal_recall": {}, "whole": {}}
    print("| model | CHAIR_i | recall | words | (means over seeds)\n|---|---|---|---|")
    for name in names:
        ends = [curves[seed][name][-1] for seed in options.seeds]
        result["scores"][name] = [score.to_json() for score in ends]
        means = [sum(getattr(score, key) for score in ends) / len(ends) for key in ("chair_i", "recall", "length")]
        print(f"| {name} | {100 * means[0]:.1f} | {100 * means[1]:.1f} | {means[2]:.1f} |")
    last = {arm: f"{arm}{rounds}" for arm, rounds in ARMS.items()}
    pairs = [*(("base", name) for name in names[1:]), *((last[a], last[b]) for a, b in CONTRASTS)]
    print("\nsecond minus first at equal recall, all seeds' images, points of CHAIR_i with a 95 % interval")
    for first, second in pairs:
        at_equal = [equal_coverage(curves[seed][first], curves[seed][second]) for seed in options.seeds]
        pooled = pooled_difference(curves, options.seeds, first, second)
        result["equal_recall"][f"{second} - {first}"] = {
            **pooled,
            "seeds": [
                {key: one[key] for key in ("recall", "words", "chair_i", "difference", "ci")} for one in at_equal
            ],
        }
        each = "; ".join(f"{100 * one['difference']:+.1f} at recall {100 * one['recall']:.0f}" for one in at_equal)
        print(f"| {second} - {first} | {change(pooled)} | {each} |")
    for first, second in pairs:
        runs = [
            (
                options.out / str(seed) / "world" / options.split,
                *(options.out / str(seed) / "eval" / n for n in (first, second)),
            )
            for seed in options.seeds
        ]
        chair = compare_pooled(runs, ["chair"])["chair"]
        result["whole"][f"{second} - {first}"] = {key: chair[key] for key in ("chair_i", "recall", "length")}
        rates = " | ".join(f"{key} {change(chair[key])}" for key in ("chair_i", "recall"))
        print(f"| whole captions: {second} - {first} | {rates} |")
    write_json(options.out / "alignment.json", result)


def curves_of(options: argparse.Namespace, seed: int, names: list[str]) -> dict[str, Any]:
    folder = options.out / str(seed)
    captions = {name: read_eval_captions(folder / "eval" / name) for name in names}
    order = list(captions["base"])
    truth = data_truth(folder / "world" / options.split, order)
    return {name: coverage_curve({image: captions[name][image] for image in order}, truth) for name in names}


def pooled_difference(curves: dict[int, dict[str, Any]], seeds: list[int], first: str, second: str) -> dict[str, Any]:
    """Cut each seed's captions where both models have its shared recall, and pool the images of all seeds."""
    sides: list[list[Any]] = [[], []]
    for seed in seeds:
        both = [curves[seed][name] for name in (first, second)]
        words = equal_coverage(*both)["words"]
        for side, curve, cut in zip(sides, both, words, strict=True):
            side.append(curve[cut - 1].ratios()["chair_i"])
    return rate_difference(*sides)


if __name__ == "__main__":
    main()
