"""Are pairs mined from a model's own mistakes as good as pairs made from perfect knowledge of the scenes?

    python benchmarks/mining.py --seeds 11 12 13 --out mining

For each seed: `relook mine` on 1,000 toyworld scenes with the shipped base, and, for the same pictures, pairs whose
chosen text is the whole truth and whose rejected text is the same with one object exchanged for one that is not there.
Both are trained by the same recipe, with the mined yes/no pairs beside them, and describe the same held-out scenes.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from relook.evaluate.run import evaluate_model
from relook.files import read_json, write_json
from relook.mine.jobs import MiningSettings, MiningSource
from relook.mine.pairs import length_statistics
from relook.mine.run import mine_pairs
from relook.recipe import load_recipe
from relook.toyworld import layouts
from relook.toyworld.build import shipped_base
from relook.toyworld.world import OBJECTS, Scene, describe_scene, sample_scenes
from relook.train.run import train

PAIR_SCENES, TEST_SCENES = 1000, 1000
RATES = ("chair_i", "chair_s", "recall", "length")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipes", nargs="+", default=["toyworld-post-decoder"])
    options = parser.parse_args()
    print("| seed | pairs | number | words, chosen / rejected | recipe | CHAIR_i | CHAIR_s | recall | length |")
    print("|---|---|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        run_seed(options.out / str(seed), seed, options.recipes)


def run_seed(out: Path, seed: int, recipes: list[str]) -> None:
    base, world = shipped_base(), out / "world"
    layouts.write_vg(world, seed, PAIR_SCENES)
    layouts.write_eval(world, "test", seed, TEST_SCENES)
    settings = MiningSettings(seed, questions=4, max_new_tokens=64, batch_size=100)
    mine_pairs(base, MiningSource(world / "vg", "toyworld", exclude=[world / "test"]), out / "mined", settings)
    mined = out / "mined" / "desc_data.json"
    write_json(out / "perfect.json", perfect_pairs(seed, set(read_json(mined))))
    print_row(seed, "base", None, "", scores(base, out, "base"))
    for name, pairs in (("mined", mined), ("perfect", out / "perfect.json")):
        for recipe in recipes:
            run = out / "runs" / f"{name}-{recipe}"
            keys: dict[str, Any] = {"vg_path": out / "mined", "desc_data_path": pairs}
            keys |= {"pope_data_path": out / "mined" / "pope_data.json", "seed": seed}
            train(load_recipe(recipe, {"model_name_or_path": base, "output_dir": run, **keys}))
            print_row(seed, name, pairs, recipe, scores(run, out, run.name))


def perfect_pairs(seed: int, images: set[str]) -> dict[str, Any]:
    """Pairs of those scenes by who knows them: nothing is left to a model."""
    return {str(s.id): perfect_pair(s) for s in sample_scenes(seed, "pairs", PAIR_SCENES) if str(s.id) in images}


def perfect_pair(scene: Scene) -> dict[str, list[str]]:
    rng = random.Random(f"perfect/{scene.seed}")
    names = rng.sample(scene.names, len(scene.names))
    wrong = list(names)
    wrong[rng.randrange(len(names))] = rng.choice([name for name in OBJECTS if name not in names])
    fillers, order = rng.randint(0, 2), rng.random()
    texts = [describe_scene(objects, scene.setting, fillers, random.Random(order)) for objects in (names, wrong)]
    return {"chosen": texts[:1], "rejected": texts[1:]}


def scores(model: Path, out: Path, name: str) -> dict[str, Any]:
    answers = out / "eval" / name
    evaluate_model(model, ["chair"], out / "world" / "test", answers, max_new_tokens=64, batch_size=100)
    chair: dict[str, Any] = read_json(answers / "chair.json")
    return chair


def print_row(seed: int, name: str, pairs: Path | None, recipe: str, chair: dict[str, Any]) -> None:
    entries = list(read_json(pairs).values()) if pairs else []
    long = length_statistics([(pair["chosen"][0], pair["rejected"][0]) for pair in entries])
    words = f"{long['chosen_words']} / {long['rejected_words']}" if entries else ""
    rates = [f"{100 * chair[rate]:.1f}" for rate in RATES[:3]] + [f"{chair['length']:.1f}"]
    print(f"| {seed} | {name} | {len(entries) or ''} | {words} | {recipe} | {' | '.join(rates)} |", flush=True)


if __name__ == "__main__":
    main()
