"""Does tuning help on more than one seed? Several toyworld bases, several tuning seeds, every variant on each.

    python benchmarks/toyworld_seeds.py bases --seeds 0 1 2 3 4 --out seeds
    python benchmarks/toyworld_seeds.py tune --bases 1 2 3 --seeds 11 12 --out seeds

The first command trains base models (in parallel processes) and prints which pass the gate; the second tunes each of
them with each seed, evaluates, and prints a table pooled over all. `--split dev --variants FILE` compares settings on
dev scenes, so that no choice is made on test scenes. FILE is YAML, {name: {recipe: NAME, key: value, ...}}, where

- `control` names a variant to compare with, beside the base;
- `pairs: dose_10` takes other description pairs than the mined ones, without questions: the base's own texts, of which
  so many mistakes were corrected that 10 % of the chosen texts' objects are false;
- `change` and `test_change` make the post decoder see something else (photoworld/changed.py), `trained_as` takes the
  model of another variant.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from relook.demo import (
    PAIR_SCENES,
    REGIMES,
    TEST_SCENES,
    DemoPaths,
    evaluate_split,
    mine_demo_pairs,
    train_regime,
)
from relook.evaluate.compare import compare_pooled, read_scores
from relook.evaluate.statistics import safe_ratio
from relook.evaluate.tasks.chair import Vocabulary, mentions
from relook.evaluate.tasks.pope import SPLITS
from relook.files import read_json, read_records, write_json
from relook.mine.pairs import correct_description, hallucinations, replace_noun
from relook.mine.pictures import read_pictures
from relook.toyworld import layouts
from relook.toyworld.world import sample_scenes, usual_absent

DEMO = {regime: {"recipe": f"toyworld-{regime.replace('_', '-')}"} for regime in REGIMES}
DEMO["post_decoder"]["control"] = "nll_control"
DOSES = (0, 5, 10, 20)  # percent of the objects in chosen texts
NOT_KEYS = ("recipe", "control", "pairs", "change", "test_change", "trained_as")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("bases", "tune"))
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--bases", type=int, nargs="*", help="which bases are tuned; without it, all")
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
    # A process for each call: a change to the post decoder must not reach the next variant.
    context = get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, _threads, (options.threads,), max_tasks_per_child=1) as pool:
        return [future.result() for future in [pool.submit(job, *call) for call in calls]]


def _threads(count: int) -> None:
    import torch

    torch.set_num_threads(count)


# ----------------------------------------------------------------------------------------------------


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


# ----------------------------------------------------------------------------------------------------


def tune_all(options: argparse.Namespace) -> None:
    folders = sorted(path for path in (options.out / "bases").iterdir() if path.name.isdigit())
    bases = [path / "base" for path in folders if not options.bases or int(path.name) in options.bases]
    variants = yaml.safe_load(options.variants.read_text()) if options.variants else DEMO
    cells = [
        (base, DemoPaths(options.out / options.split / f"{base.parent.name}-{seed}"), seed)
        for base in bases
        for seed in options.seeds
    ]
    in_parallel(options, prepare_cell, [(*cell, options.split) for cell in cells])
    own, other = ({n: v for n, v in variants.items() if ("trained_as" in v) == later} for later in (False, True))
    for group in (own, other):  # what takes another's model comes after it
        calls = [(*cell, options.split, name, keys) for name, keys in group.items() for cell in cells]
        in_parallel(options, tune_variant, calls)
    places = [paths for _, paths, _ in cells]
    result = {
        "cells": {
            p.out.name: {n: read_scores(p.answers(n, options.split)) for n in ("base", *variants)} for p in places
        },
        "repeated": {n: mean([repeated(p.answers(n, options.split)) for p in places]) for n in ("base", *variants)},
    }
    result["pooled"] = {name: pooled(places, "base", name, options.split) for name in variants}
    controls = {name: keys["control"] for name, keys in variants.items() if "control" in keys}
    result["against_control"] = {name: pooled(places, other, name, options.split) for name, other in controls.items()}
    write_json(options.out / f"{options.split}.json", result)
    print_tables(result)


def prepare_cell(base: Path, paths: DemoPaths, seed: int, split: str) -> None:
    """Draw a cell's world, evaluate its base, mine its pairs; what is there is kept."""
    layouts.write_vg(paths.world, seed, PAIR_SCENES)
    layouts.write_eval(paths.world, split, seed, TEST_SCENES)
    evaluate_split(base, paths, "base", split)
    mine_demo_pairs(base, paths, seed)
    write_other_pairs(paths, seed)


def tune_variant(base: Path, paths: DemoPaths, seed: int, split: str, name: str, keys: Mapping[str, Any]) -> None:
    """Train and evaluate one variant in a cell."""
    sys.path.insert(0, str(Path(__file__).parent / "photoworld"))
    from changed import CHANGES

    change, model = keys.get("change"), keys.get("trained_as", name)
    if change:
        CHANGES[change]()
    if model == name:
        changes = {key: value for key, value in keys.items() if key not in NOT_KEYS}
        if "pairs" in keys:
            changes |= {"desc_data_path": paths.pairs / f"{keys['pairs']}.json", "pope_data_path": ""}
        train_regime(name, base, paths, seed, keys["recipe"], changes)
    if "test_change" in keys:
        CHANGES[keys["test_change"]]()
    evaluate_split(paths.run(model), paths, name, split)


def write_other_pairs(paths: DemoPaths, seed: int) -> None:
    """Write description pairs whose chosen texts are better than the rejected ones, but not true.

    A chosen text is the base's own, in which a false object is corrected with a probability such that `dose` percent of
    all objects stay false: an annotator who finds some of the mistakes. Rejected is the base's text; where nothing was
    corrected, the chosen one with one more false object.
    """
    annotated = read_pictures(paths.world / "vg", "toyworld")
    vocabulary = annotated.vocabulary
    assert vocabulary is not None, "toyworld has annotations"
    scenes = {str(scene.id): scene for scene in sample_scenes(seed, "pairs", PAIR_SCENES)}
    greedy = {r["key"]: r["answer"] for r in read_records(paths.pairs / "work" / "descriptions_0.jsonl")}
    truths = {picture.id: picture.objects for picture in annotated.pictures}
    named, false = count_false(greedy, truths, vocabulary)
    doses: dict[int, dict[str, Any]] = {dose: {} for dose in DOSES}
    for picture in annotated.pictures:
        if picture.id not in greedy:
            continue
        text, absent = greedy[picture.id], usual_absent(scenes[picture.id])
        for dose, pairs in doses.items():
            rng = random.Random(f"dose/{picture.id}")
            share = min(1.0, dose / 100 * named / false)
            kept = {n for n in hallucinations(text, picture.objects, vocabulary) if rng.random() < share}
            truth = picture.objects | kept
            chosen = correct_description(text, truth, vocabulary, annotated.neutral, rng).text
            rejected = text if chosen != text else worsened(chosen, truth, absent, vocabulary, rng)
            if rejected != chosen:
                pairs[picture.id] = {"chosen": [chosen], "rejected": [rejected]}
    for dose, pairs in doses.items():
        write_json(paths.pairs / f"dose_{dose}.json", pairs)
    # What the chosen texts really have, beside what they were meant to.
    shares = {
        dose: safe_ratio(*reversed(count_false({i: p["chosen"][0] for i, p in pairs.items()}, truths, vocabulary)))
        for dose, pairs in doses.items()
    }
    write_json(paths.pairs / "chosen_false.json", shares)


def worsened(
    text: str, truth: frozenset[str], absent: Sequence[str], vocabulary: Vocabulary, rng: random.Random
) -> str:
    """Exchange one true object of a text for a usual absent one that it does not name."""
    found = mentions(text, vocabulary)
    true, free = [m for m in found if m.object in truth], sorted(set(absent) - {m.object for m in found})
    if not true or not free:
        return text
    return replace_noun(text, rng.choice(true), rng.choice(free), vocabulary)


def count_false(
    texts: Mapping[str, str], truths: Mapping[str, frozenset[str]], vocabulary: Vocabulary
) -> tuple[int, int]:
    """Count the objects that texts name, and those of them that are false."""
    named = sum(len(mentions(text, vocabulary)) for text in texts.values())
    return named, sum(len(hallucinations(text, truths[i], vocabulary)) for i, text in texts.items())


# ----------------------------------------------------------------------------------------------------


def repeated(answers: Path) -> float:
    """Return the share of captions that hold a sentence twice."""
    captions = [record["caption"].rstrip(".").split(". ") for record in read_records(answers / "chair.jsonl")]
    return mean([len(set(sentences)) < len(sentences) for sentences in captions])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def pooled(places: Sequence[DemoPaths], first: str, second: str, split: str) -> dict[str, Any]:
    return compare_pooled([(p.world / split, p.answers(first, split), p.answers(second, split)) for p in places])


def print_tables(result: dict[str, Any]) -> None:
    cells = result["cells"]
    print("\nmean over cells (base-seed), percent: " + ", ".join(cells))
    print("| | random | popular | adversarial | yes ratio, adv. | CHAIR_i | CHAIR_s | recall | words | repeated |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, share in result["repeated"].items():
        scores = [of_cell[name] for of_cell in cells.values()]
        row = [mean([100 * s["pope"][split]["accuracy"] for s in scores]) for split in SPLITS]
        row.append(mean([100 * s["pope"]["adversarial"]["yes_ratio"] for s in scores]))
        row += [mean([100 * s["chair"][key] for s in scores]) for key in ("chair_i", "chair_s", "recall")]
        row += [mean([s["chair"]["length"] for s in scores]), 100 * share]
        print(f"| {name} | " + " | ".join(f"{value:.1f}" for value in row) + " |")
    print("\nper cell: CHAIR_i, recall, adversarial")
    for cell, scores in cells.items():
        print(cell, *(f"{n}: {_three(s)}" for n, s in scores.items()), sep="; ")
    for title, rows in (("minus base", result["pooled"]), ("minus control", result.get("against_control", {}))):
        print(f"\n{title}, pooled over images, paired 95 % intervals")
        for name, found in rows.items():
            chair = {rate: found["chair"][rate] for rate in ("chair_i", "recall", "length")}
            parts = {"adversarial": found["pope"]["adversarial"], **chair}
            print(f"| {name} | " + " | ".join(f"{k} {signed(v, k == 'length')}" for k, v in parts.items()) + " |")


def _three(scores: dict[str, Any]) -> str:
    chair, pope = scores["chair"], scores["pope"]
    return f"{chair['chair_i']:.3f} {chair['recall']:.3f} {pope['adversarial']['accuracy']:.3f}"


def signed(found: dict[str, Any], words: bool = False) -> str:
    times = 1 if words else 100
    return f"{times * found['difference']:+.1f} [{times * found['ci'][0]:+.1f}, {times * found['ci'][1]:+.1f}]"


if __name__ == "__main__":
    main()
