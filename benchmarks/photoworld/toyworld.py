"""The same study on toyworld's shipped base: minutes on two CPU cores.

python benchmarks/photoworld/toyworld.py WORK
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import captions
import study
from analysis import DOSES
from scenes import Scene, Visible
from work import Paths, Sizes

from relook.evaluate.tasks.pope import question_text
from relook.files import write_json
from relook.toyworld import layouts, world
from relook.toyworld.build import shipped_base

SEED, PAIRS, TEST = 31, 800, 400
SIZES = Sizes(
    tune=(
        *("--learning_rate", "1e-3", "--num_train_epochs", "4"),
        *("--per_device_train_batch_size", "32", "--warmup_steps", "20"),
    ),
    evaluation=("--batch-size", "100", "--max-new-tokens", "90"),
    trunk_grid=0,
    jobs=2,
    shared_cache=False,  # its own pass takes each run seconds, and waiting for another's takes longer
    seeds=(1, 2),
    only=tuple(name for name in study.VARIANTS if "policy" not in name),
)


class ToyPaths(Paths):
    def data(self, split: str) -> Path:
        return self.work / "data" / ("vg" if split == "pairs" else split)

    @property
    def base(self) -> Path:
        return shipped_base()


def write_data(paths: Paths) -> None:
    """Write pairs and test scenes as photoworld has them."""
    root = paths.work / "data"
    layouts.write_vg(root, SEED, PAIRS)
    write_pairs(paths.data("pairs"), list(world.sample_scenes(SEED, "pairs", PAIRS)))
    layouts.write_eval(root, "test", SEED, TEST)
    drawn = [
        Scene(scene.setting, tuple(Visible(o.name, "", o.box, o.box[2] * o.box[3]) for o in scene.objects))
        for scene in world.sample_scenes(SEED, "test", TEST)
    ]
    write_json(paths.data("test") / "scenes.json", [scene.as_json() for scene in drawn])


def write_pairs(folder: Path, drawn: list[world.Scene]) -> None:
    descriptions: dict[int, dict[int, dict[str, list[str]]]] = {dose: {} for dose in DOSES}
    questions = []
    for scene in drawn:
        setting = world.SETTINGS[scene.setting]
        absent = [name for name in (*setting.core, *setting.common) if name not in scene.names]
        for dose in DOSES:
            rng = random.Random(f"pairs/{scene.id}")
            rng.shuffle(absent)
            sides = captions.noun_pair(list(scene.names), absent, dose / 100, rng)
            chosen, rejected = (world.describe_scene(side, scene.setting) for side in sides)
            if chosen != rejected:
                descriptions[dose][scene.id] = {"chosen": [chosen], "rejected": [rejected]}
        rng = random.Random(f"questions/{scene.id}")
        count = min(2, len(absent), len(scene.names))
        asked = [(name, captions.YES, captions.NO) for name in rng.sample(scene.names, count)]
        asked += [(name, captions.NO, captions.YES) for name in rng.sample(absent, count)]
        questions += [
            {"image_id": scene.id, "question": question_text(name), "chosen": c, "reject": r, "correct": False}
            for name, c, r in asked
        ]
    for dose, pairs in descriptions.items():
        write_json(folder / f"desc_{dose}.json", pairs)
    write_json(folder / "pope_data.json", questions)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", nargs="*", default=list(SIZES.only))
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SIZES.seeds))
    parser.add_argument("--jobs", type=int, default=SIZES.jobs)
    parser.add_argument("--seconds", type=float, default=0, help="no variant is begun after so long")
    parser.add_argument("--steps", type=int, default=0, help="of training, to try it out")
    options = parser.parse_args()
    paths = ToyPaths(assets=options.work, work=options.work.resolve())
    write_data(paths)
    sizes = replace(
        SIZES,
        only=tuple(options.only),
        seeds=tuple(options.seeds),
        jobs=options.jobs,
        study_seconds=options.seconds,
        tune=(*SIZES.tune, "--max_steps", str(options.steps)) if options.steps else SIZES.tune,
    )
    result = study.run(paths, sizes)
    write_json(paths.work / "study.json", result)
    if result["failures"]:
        print(json.dumps(result["failures"], indent=1))
