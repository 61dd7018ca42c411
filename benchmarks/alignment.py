"""Which pairs and which losses lower CHAIR_i at equal recall on toyworld, arm by arm from a file.

    python benchmarks/alignment.py --arms benchmarks/alignment_search.yaml --split dev --seeds 71 72 73 --out dev
    python benchmarks/alignment.py --arms benchmarks/alignment_arms.yaml --split test --seeds 101 102 103 --out test

An arm is a way to make pairs and to train on them (`Arm`), on toyworld's exact annotations and its shipped base. All
arms have as many pairs as one round of whole descriptions, see each as often, and have the same questions beside them;
arms that mine alike share their first round's pairs. Search on dev scenes; confirm on test scenes of other seeds.
Intervals resample the images of all seeds.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

from relook.evaluate.run import evaluate_model
from relook.evaluate.statistics import rate_difference
from relook.evaluate.tasks.chair import (
    ChairScore,
    Vocabulary,
    coverage_curve,
    data_truth,
    equal_coverage,
    mentions,
    read_eval_captions,
)
from relook.files import read_json, write_json
from relook.mine import sentences
from relook.mine.jobs import MiningSettings, MiningSource
from relook.mine.pictures import read_pictures
from relook.mine.run import mine_pairs
from relook.mine.sentences import Candidates, Check, CheckedSentence, by_annotations
from relook.recipe import load_recipe
from relook.report.tables import change
from relook.toyworld import layouts
from relook.toyworld.build import shipped_base
from relook.toyworld.world import OBJECTS, SYNONYMS
from relook.train.run import train

YES_NO = ("Yes.", "No.")
MISSED = 0.5  # share of the false objects that a weak check takes for true


@dataclass(frozen=True)
class Arm:
    """A way to make pairs and to train on them.

    Args:
        control: the arm that it is compared with, besides the base.
        rounds: of mining and training; the pairs of all are as many as those of whole descriptions.
        by: description or sentence.
        complete: by sentence: pair complete descriptions.
        check: by sentence: who checks: annotations, self (the model's own yes/no answers), or misses: annotations by
            which every second absent object of a picture passes for a present one (`MISSED`), as a weak judge's would.
        images: the share of the scenes that a round mines.
        accumulate: a round trains the base anew on all pairs so far, instead of the last round's model on its own.
        keys: changes of the recipe; a list has those of each round, of which the last stays.
    """

    control: str = ""
    rounds: int = 1
    by: str = "sentence"
    complete: bool = True
    check: str = "annotations"
    images: float = 1.0
    accumulate: bool = False
    keys: dict[str, Any] | list[dict[str, Any]] = field(default_factory=dict)

    @property
    def mining(self) -> str:
        """Name the first round's pairs."""
        return "-".join(map(str, (self.by, self.check, "complete" * self.complete, self.rounds, self.images)))

    def keys_of(self, number: int) -> dict[str, Any]:
        return self.keys if isinstance(self.keys, dict) else self.keys[min(number, len(self.keys)) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", type=Path, required=True, help="YAML: of each arm its settings")
    parser.add_argument("--split", choices=("dev", "test"), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=600, help="to mine")
    parser.add_argument("--eval-scenes", type=int, default=500)
    parser.add_argument("--recipe", default="toyworld-post-decoder")
    parser.add_argument("--jobs", type=int, default=12, help="single-thread processes at a time")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after that time")
    options = parser.parse_args()
    deadline = time.time() + options.seconds
    arms = {name: Arm(**(settings or {})) for name, settings in yaml.safe_load(options.arms.read_text()).items()}
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), _one_thread) as pool:
        for future in [pool.submit(prepare, options, seed) for seed in options.seeds]:
            print(future.result(), flush=True)
        by_mining = {arm.mining: arm for arm in arms.values()}
        for future in [pool.submit(mine_first, options, s, arm) for arm in by_mining.values() for s in options.seeds]:
            print(future.result(), flush=True)
        runs = [pool.submit(run_arm, options, s, n, a, deadline) for n, a in arms.items() for s in options.seeds]
        for future in runs:
            # An arm that fails, such as one that mines no pair, is named, and the others go on.
            print(repr(future.exception()) if future.exception() else future.result(), flush=True)
        report(options, pool, arms)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def folder_of(options: argparse.Namespace, seed: int) -> Path:
    return Path(options.out) / str(seed)


def prepare(options: argparse.Namespace, seed: int) -> str:
    """Draw the scenes, evaluate the base and mine whole descriptions, whose number of pairs all arms get."""
    folder = folder_of(options, seed)
    layouts.write_vg(folder / "world", seed, options.scenes)
    layouts.write_eval(folder / "world", options.split, seed, options.eval_scenes)
    write_json(folder / "objects.json", {name: list(SYNONYMS.get(name, ())) for name in OBJECTS})
    evaluate(options, folder, shipped_base(), "base")
    source = MiningSource(folder / "world" / "vg", "toyworld", exclude=[folder / "world" / options.split])
    card = mine_pairs(shipped_base(), source, folder / "pairs" / Arm(by="description").mining, settings(seed, 4))
    return f"{options.split} {seed}: {card['descriptions']['pairs']} pairs"


def settings(seed: int, questions: int, **changes: Any) -> MiningSettings:
    # Toyworld's sentences are set phrases: similar texts are no duplicates.
    common = {"max_new_tokens": 64, "batch_size": 100, "near_texts": 0, "parquet": False}
    return MiningSettings(seed=seed, questions=questions, **{**common, **changes})


def mine_first(options: argparse.Namespace, seed: int, arm: Arm) -> str:
    folder = folder_of(options, seed)
    pairs = folder / "pairs" / arm.mining
    mine(options, folder, shipped_base(), pairs, seed, arm, 1)
    return f"{options.split} {seed}, pairs {arm.mining}: {truth_of_pairs(folder, pairs, arm)}"


def mine(
    options: argparse.Namespace,
    folder: Path,
    model: Path,
    pairs: Path,
    seed: int,
    arm: Arm,
    number: int,
    earlier: Path | None = None,
) -> None:
    """Mine a round's pairs, after earlier ones."""
    if arm.by == "sentence":
        sentences.by_annotations = misses_half if arm.check == "misses" else by_annotations
        source = MiningSource(folder / "world" / "vg", "toyworld", exclude=[folder / "world" / options.split])
        # Questions by the number of rounds, so that all arms have as many.
        questions, asks_itself = max(1, round(4 / (arm.rounds * arm.images))), arm.check == "self"
        if asks_itself:
            source = MiningSource(source.images, "none", folder / "objects.json", source.exclude)
        source = replace(source, earlier=earlier)
        described = read_json(folder / "pairs" / Arm(by="description").mining / "card.json")["descriptions"]
        drawn = {
            "by": "sentence",
            "complete": arm.complete,
            "own_answers": asks_itself,
            "max_images": int(options.scenes * arm.images),
            "max_pairs": described["pairs"] // arm.rounds,
        }
        mine_pairs(model, source, pairs, settings(seed + number, questions, **drawn))
        write_json(pairs / "twice.json", sentences_twice(read_json(pairs / "sentinel.json")))


def misses_half(vocabulary: Vocabulary, neutral: Sequence[str]) -> Check:
    """Check as annotations do, but take false sentences for true whose absent objects are all missed."""
    exact = by_annotations(vocabulary, neutral)

    def missed(image: str, name: str) -> bool:
        return random.Random(f"{image}/{name}").random() < MISSED

    def check(batch: Candidates) -> list[list[CheckedSentence]]:
        verdicts = exact(batch)
        for (description, candidates), of_description in zip(batch, verdicts, strict=True):
            image, objects = description.picture.id, description.picture.objects
            for number, candidate in enumerate(candidates):
                names = frozenset(m.object for m in mentions(candidate.sentence, vocabulary))
                if all(missed(image, name) for name in names - objects):
                    of_description[number] = CheckedSentence(True, names)
        return verdicts

    return check


def truth_of_pairs(folder: Path, pairs: Path, arm: Arm) -> str:
    """Say what share of the mentions of chosen and of rejected texts name what is not on the picture."""
    pictures = read_pictures(folder / "world" / "vg", "toyworld").pictures
    truth = {key: p.objects for p in pictures for key in (p.id, p.path.relative_to(folder / "world" / "vg").as_posix())}
    vocabulary = Vocabulary.of(OBJECTS, SYNONYMS)
    if arm.by == "description":
        stored = read_json(pairs / "desc_data.json")
        records = [(i, p["chosen"][0], p["rejected"][0]) for i, p in stored.items()]
    else:
        stored = read_json(pairs / "sentinel.json")
        records = [(i, p["y_win"], p["y_lose"]) for i, of in stored.items() for p in of if p["y_win"] not in YES_NO]
    shares = []
    for side in (1, 2):
        wrong = [m.object not in truth[str(r[0])] for r in records for m in mentions(r[side], vocabulary)]
        shares.append(f"{100 * sum(wrong) / max(1, len(wrong)):.1f} % of {len(wrong) / max(1, len(records)):.1f}")
    return f"false mentions {shares[0]} a chosen text, {shares[1]} a rejected one"


def evaluate(options: argparse.Namespace, folder: Path, model: Path, name: str) -> None:
    data, answers = folder / "world" / options.split, folder / "eval" / name
    evaluate_model(model, ["chair"], data, answers, max_new_tokens=64, batch_size=100)


def run_arm(options: argparse.Namespace, seed: int, name: str, arm: Arm, deadline: float) -> str:
    """Mine, train and evaluate, round by round."""
    if time.time() > deadline:
        return f"{options.split} {seed}, {name}: not begun"
    started, folder, model = time.monotonic(), folder_of(options, seed), shipped_base()
    counts: list[int] = []
    earlier: Path | None = None
    for number in range(1, arm.rounds + 1):
        if number == 1:  # mined before, for all arms that mine alike
            pairs = folder / "pairs" / arm.mining
        else:
            pairs = folder / name / f"pairs{number}"
            mine(options, folder, model, pairs, seed, arm, number, earlier)
        counts.append(read_json(pairs / "card.json")["descriptions"]["pairs"])
        if arm.by == "description":
            keys: dict[str, Any] = {
                "desc_data_path": pairs / "desc_data.json",
                "pope_data_path": pairs / "pope_data.json",
            }
        else:
            keys = {"pairs_path": pairs / "twice.json"}
        run, start = folder / name / f"run{number}", model
        if arm.accumulate:
            start, earlier = shipped_base(), pairs
        keys |= {"model_name_or_path": start, "vg_path": pairs, "output_dir": run, "seed": seed, "warmup_steps": 0.1}
        if number > 1 and not arm.accumulate:
            keys["post_decoder_init"] = "random"  # the first round's goes on
        train(load_recipe(options.recipe, {**keys, **arm.keys_of(number)}))
        model = run
    evaluate(options, folder, model, name)
    shutil.rmtree(folder / name)
    return f"{options.split} {seed}, {name}: {' + '.join(map(str, counts))} pairs, {time.monotonic() - started:.0f} s"


def sentences_twice(records: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Return SENTINEL's records with all but the questions twice, as HA-DPO's reader takes descriptions."""
    return {
        image: [pair for pair in pairs for _ in range(1 if pair["y_win"] in YES_NO else 2)]
        for image, pairs in records.items()
    }


# --- comparison


def report(options: argparse.Namespace, pool: Executor, arms: dict[str, Arm]) -> None:
    """Print each arm's scores, and its differences to the base and to its control in CHAIR_i at equal recall."""
    folders = [folder_of(options, seed) for seed in options.seeds]
    names = [name for name in ("base", *arms) if all((folder / "eval" / name).exists() for folder in folders)]
    cells = [(folder, name) for folder in folders for name in names]
    curves = dict(zip(cells, pool.map(curve_of, *zip(*cells, strict=True), repeat(options.split)), strict=True))
    result: dict[str, Any] = {"scores": {}, "differences": {}}
    print(f"\n| {options.split} | CHAIR_i | recall | words | (means over seeds)\n|---|---|---|---|")
    for name in names:
        ends = [curves[folder, name][-1] for folder in folders]
        result["scores"][name] = [score.to_json() for score in ends]
        means = [sum(getattr(score, key) for score in ends) / len(ends) for key in ("chair_i", "recall", "length")]
        print(f"| {name} | {100 * means[0]:.1f} | {100 * means[1]:.1f} | {means[2]:.1f} |")
    pairs = [(arms[name].control, name) for name in names[1:] if arms[name].control in names]
    pairs += [("base", name) for name in names[1:]]
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
        differences = {
            "equal_recall": difference(cut, "chair_i"),
            "chair_i": difference(ends, "chair_i"),
            "recall": difference(ends, "recall"),
        }
        seeds = [{k: c[k] for k in kept} for c in at_equal]
        result["differences"][f"{second} - {first}"] = {**differences, "seeds": seeds}
        each = "; ".join(f"{100 * c['difference']:+.1f} at {100 * c['recall']:.0f}" for c in at_equal)
        equal, *of_all = map(change, differences.values())
        print(f"| {second} - {first} | {equal} | {each} | {' | '.join(of_all)} |", flush=True)
    write_json(options.out / f"{options.split}.json", result)


def curve_of(folder: Path, name: str, split: str) -> list[ChairScore]:
    order = list(read_eval_captions(folder / "eval" / "base"))
    captions, truth = read_eval_captions(folder / "eval" / name), data_truth(folder / "world" / split, order)
    return coverage_curve({image: captions[image] for image in order}, truth)


def difference(pairs: list[list[ChairScore]], rate: str) -> dict[str, Any]:
    """Compute second minus first of a rate over the images of all seeds."""
    return rate_difference(*([pair[side].ratios()[rate] for pair in pairs] for side in (0, 1)))


if __name__ == "__main__":
    main()
