"""Do three rounds of sentence-level pairs help more than one round of whole descriptions with as many pairs?

    python benchmarks/alignment.py --seeds 61 62 --confirm 91 92 93 --out alignment   # a process for each arm and seed
    python benchmarks/alignment.py --seeds 61 --confirm 91 --out tiny --scenes 60 --eval-scenes 40 --jobs 1

On toyworld's exact annotations and its shipped base, an arm is a way to make pairs and to train on them:
- description: `relook mine` as it is by default, one round; its number of pairs is that of all arms;
- complete: three rounds of `relook mine --by sentence --complete`, a third of the pairs each;
- sentence: the same without --complete, so that sentences alone are supervised.
All have four questions a scene beside them, and see each pair as often. On dev scenes of the first seeds, descriptions
and complete pairs are trained by the same recipes. The best of each at equal recall, and that of complete pairs without
the preference term (nll), are then trained from new scenes and compared on test scenes, with intervals that resample
the images of all seeds.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from relook.evaluate.run import evaluate_model
from relook.evaluate.statistics import rate_difference
from relook.evaluate.tasks.chair import ChairScore, coverage_curve, data_truth, equal_coverage, read_eval_captions
from relook.files import read_json, write_json
from relook.mine.jobs import MiningSettings, MiningSource
from relook.mine.run import mine_pairs
from relook.recipe import load_recipe
from relook.report.tables import change
from relook.toyworld import layouts
from relook.toyworld.build import shipped_base
from relook.train.run import train

DESCRIPTION, COMPLETE = "description", "complete"
YES_NO = ("Yes.", "No.")


@dataclass(frozen=True)
class Arm:
    """A way to make pairs and to train on them.

    Args:
        rounds: of mining and training; the pairs of all are as many as those of whole descriptions.
        by: description or sentence.
        complete: by sentence: pair complete descriptions.
        keys: changes of the recipe.
        images: the share of the scenes that a round mines.
    """

    rounds: int = 1
    by: str = "sentence"
    complete: bool = True
    keys: dict[str, Any] = field(default_factory=dict)
    images: float = 1.0


BY = {DESCRIPTION: Arm(by="description", complete=False), COMPLETE: Arm(3, images=2 / 3)}
RECIPES: dict[str, dict[str, Any]] = {
    "": {},
    "_dpo1": {"dpo_weight": 1.0},
    "_lr4": {"learning_rate": 4e-3},
    "_dpo0": {"dpo_weight": 0.0},
    "_lr1": {"learning_rate": 1e-3},
}
SEARCHED = {f"{by}{name}": replace(arm, keys=keys) for name, keys in RECIPES.items() for by, arm in BY.items()}
OTHERS = {"sentence": Arm(3, complete=False, images=2 / 3), "complete_one_round": Arm()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", required=True, help="of the dev scenes")
    parser.add_argument("--confirm", type=int, nargs="*", default=[], help="of the test scenes")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=600, help="to mine")
    parser.add_argument("--eval-scenes", type=int, default=500, help="of dev; of test, twice as many")
    parser.add_argument("--recipe", default="toyworld-post-decoder")
    parser.add_argument("--jobs", type=int, default=12, help="single-thread processes at a time")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing on dev after that time")
    options = parser.parse_args()
    deadline = time.time() + options.seconds
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), _one_thread) as pool:
        worlds = [("dev", seed) for seed in options.seeds] + [("test", seed) for seed in options.confirm]
        for future in [pool.submit(prepare, options, *world) for world in worlds]:
            print(future.result(), flush=True)
        # The last recipe comes last: where time is short, it is left out on both sides.
        *first, fourth, fifth = SEARCHED.items()
        arms = dict([*first, *OTHERS.items(), fourth, fifth])
        run_arms(options, pool, arms, "dev", options.seeds, deadline)
        dev = report(options, pool, arms, "dev", options.seeds)
        if options.confirm:
            best = {by: min((n for n in dev if n in SEARCHED and n.startswith(by)), key=lambda n: dev[n]) for by in BY}
            print(f"best on dev scenes: {', '.join(best.values())}", flush=True)
            arms = {by: SEARCHED[name] for by, name in best.items()}
            arms["nll"] = replace(arms[COMPLETE], keys={**arms[COMPLETE].keys, "dpo_weight": 0.0})
            run_arms(options, pool, dict(reversed(arms.items())), "test", options.confirm)
            report(options, pool, arms, "test", options.confirm)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def folder_of(options: argparse.Namespace, split: str, seed: int) -> Path:
    return Path(options.out) / split / str(seed)


def source_of(folder: Path, split: str) -> MiningSource:
    return MiningSource(folder / "world" / "vg", "toyworld", exclude=[folder / "world" / split])


def settings(**changes: Any) -> MiningSettings:
    # Toyworld's sentences are set phrases: similar texts are no duplicates.
    common = {"questions": 4, "max_new_tokens": 64, "batch_size": 100, "near_texts": 0, "parquet": False}
    return MiningSettings(**{**common, **changes})


def prepare(options: argparse.Namespace, split: str, seed: int) -> str:
    """Draw the scenes, evaluate the base and mine whole descriptions, whose number of pairs all arms get."""
    folder = folder_of(options, split, seed)
    layouts.write_vg(folder / "world", seed, options.scenes)
    layouts.write_eval(folder / "world", split, seed, options.eval_scenes * (2 if split == "test" else 1))
    evaluate(folder, split, shipped_base(), "base")
    card = mine_pairs(shipped_base(), source_of(folder, split), folder / "descriptions", settings(seed=seed))
    return f"{split} {seed}: {card['descriptions']['pairs']} pairs"


def evaluate(folder: Path, split: str, model: Path, name: str) -> None:
    data, answers = folder / "world" / split, folder / "eval" / name
    evaluate_model(model, ["chair"], data, answers, max_new_tokens=64, batch_size=100)


def run_arms(
    options: argparse.Namespace,
    pool: Executor,
    arms: dict[str, Arm],
    split: str,
    seeds: list[int],
    deadline: float = float("inf"),
) -> None:
    runs = [pool.submit(run_arm, options, split, s, n, arm, deadline) for n, arm in arms.items() for s in seeds]
    for future in runs:
        print(future.result(), flush=True)


def run_arm(options: argparse.Namespace, split: str, seed: int, name: str, arm: Arm, deadline: float) -> str:
    """Mine, train and evaluate, round by round."""
    if time.time() > deadline:
        return f"{split} {seed}, {name}: not begun"
    started, folder, model = time.monotonic(), folder_of(options, split, seed), shipped_base()
    wanted = read_json(folder / "descriptions" / "card.json")["descriptions"]["pairs"]
    counts: list[int] = []
    for number in range(1, arm.rounds + 1):
        if arm.by == DESCRIPTION:
            pairs, counts = folder / "descriptions", [wanted]
            keys: dict[str, Any] = {
                "desc_data_path": pairs / "desc_data.json",
                "pope_data_path": pairs / "pope_data.json",
            }
        else:
            pairs = folder / name / f"pairs{number}"
            drawn = {"seed": seed + number, "max_images": int(options.scenes * arm.images), "complete": arm.complete}
            # Questions by the number of rounds, so that all arms have as many.
            drawn |= {"questions": max(1, round(4 / (arm.rounds * arm.images)))}
            drawn |= {"max_pairs": wanted // arm.rounds}
            card = mine_pairs(model, source_of(folder, split), pairs, settings(by="sentence", **drawn))
            counts.append(card["descriptions"]["pairs"])
            write_json(pairs / "twice.json", sentences_twice(read_json(pairs / "sentinel.json")))
            keys = {"pairs_path": pairs / "twice.json"}
        run = folder / name / f"run{number}"
        keys |= {"model_name_or_path": model, "vg_path": pairs, "output_dir": run, "seed": seed, "warmup_steps": 0.1}
        if number > 1:
            keys["post_decoder_init"] = "random"  # the first round's goes on
        train(load_recipe(options.recipe, {**keys, **arm.keys}))
        model = run
    evaluate(folder, split, model, name)
    return f"{split} {seed}, {name}: {' + '.join(map(str, counts))} pairs, {time.monotonic() - started:.0f} s"


def sentences_twice(records: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Return SENTINEL's records with all but the questions twice, as HA-DPO's reader takes descriptions."""
    return {
        image: [pair for pair in pairs for _ in range(1 if pair["y_win"] in YES_NO else 2)]
        for image, pairs in records.items()
    }


# --- comparison


def report(
    options: argparse.Namespace, pool: Executor, arms: dict[str, Arm], split: str, seeds: list[int]
) -> dict[str, float]:
    """Print the comparisons; return each arm's difference to descriptions in CHAIR_i at equal recall."""
    folders = [folder_of(options, split, seed) for seed in seeds]
    names = [name for name in ("base", *arms) if all((folder / "eval" / name).exists() for folder in folders)]
    cells = [(folder, name) for folder in folders for name in names]
    curves = dict(zip(cells, pool.map(curve_of, *zip(*cells, strict=True), repeat(split)), strict=True))
    result: dict[str, Any] = {"scores": {}, "differences": {}}
    print(f"\n| {split} | CHAIR_i | recall | words | (means over seeds)\n|---|---|---|---|")
    for name in names:
        ends = [curves[folder, name][-1] for folder in folders]
        result["scores"][name] = [score.to_json() for score in ends]
        means = [sum(getattr(score, key) for score in ends) / len(ends) for key in ("chair_i", "recall", "length")]
        print(f"| {name} | {100 * means[0]:.1f} | {100 * means[1]:.1f} | {means[2]:.1f} |")
    pairs = [("base", name) for name in names[1:]]
    pairs += [(DESCRIPTION, name) for name in names[1:] if name != DESCRIPTION]
    pairs += [("nll", COMPLETE)] if "nll" in names else []
    print("\nsecond minus first, points with a 95 % interval over all seeds' images")
    print("| | CHAIR_i at equal recall | each seed | CHAIR_i of all words | recall |\n|---|---|---|---|---|")
    for first, second in pairs:
        both = [[curves[folder, name] for name in (first, second)] for folder in folders]
        at_equal = [equal_coverage(*sides) for sides in both]
        # Each seed's captions are cut where both models have its shared recall; the images of all seeds are pooled.
        cut = [
            [side[n - 1] for side, n in zip(s, c["words"], strict=True)] for s, c in zip(both, at_equal, strict=True)
        ]
        ends = [[side[-1] for side in sides] for sides in both]
        kept = ("recall", "words", "chair_i", "difference", "ci")
        found = {
            "equal_recall": difference(cut, "chair_i"),
            "chair_i": difference(ends, "chair_i"),
            "recall": difference(ends, "recall"),
        }
        result["differences"][f"{second} - {first}"] = {**found, "seeds": [{k: c[k] for k in kept} for c in at_equal]}
        each = "; ".join(f"{100 * c['difference']:+.1f} at {100 * c['recall']:.0f}" for c in at_equal)
        equal, *of_all = map(change, found.values())
        print(f"| {second} - {first} | {equal} | {each} | {' | '.join(of_all)} |", flush=True)
    write_json(options.out / f"{split}.json", result)
    against = {name: result["differences"].get(f"{name} - {DESCRIPTION}") for name in names[1:]}
    return {name: found["equal_recall"]["difference"] if found else 0.0 for name, found in against.items()}


def curve_of(folder: Path, name: str, split: str) -> list[ChairScore]:
    order = list(read_eval_captions(folder / "eval" / "base"))
    captions, truth = read_eval_captions(folder / "eval" / name), data_truth(folder / "world" / split, order)
    return coverage_curve({image: captions[image] for image in order}, truth)


def difference(pairs: list[list[ChairScore]], rate: str) -> dict[str, Any]:
    """Compute second minus first of a rate over the images of all seeds."""
    return rate_difference(*([pair[side].ratios()[rate] for pair in pairs] for side in (0, 1)))


if __name__ == "__main__":
    main()
