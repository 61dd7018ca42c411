"""The headroom gate on toyworld: does the image hold more about an asked object than the trunk's last state?

    python benchmarks/toyworld_probe.py --seed 41

Probes (photoworld/probe.py) learn from questions about pair scenes and are scored on those about dev scenes: present
objects, and absent ones that are usual in the setting.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from relook.evaluate.tasks.pope import question_text
from relook.model.load import load_model
from relook.toyworld.build import SIDE, pixel_values, select, shipped_base
from relook.toyworld.world import Scene, sample_scenes, usual_absent

sys.path.insert(0, str(Path(__file__).parent / "photoworld"))
from llava import auc
from probe import Questions, difference, scores_of_probe


@torch.no_grad()
def read_questions(base: Path, scenes: Sequence[Scene], count: int) -> Questions:
    """Ask about at most `count` present objects of each scene, and as many usual absent ones."""
    loaded = load_model(base)
    model, tokenizer = loaded.model.eval(), loaded.processor.tokenizer
    asked = []
    for number, scene in enumerate(scenes):
        rng = random.Random(f"probe/{scene.seed}")
        for names in (sorted(scene.names), usual_absent(scene)):
            asked += [(number, name) for name in rng.sample(names, min(count, len(names)))]
    pixels = pixel_values(scenes)
    tower = model.model.vision_tower
    patches = torch.cat([select(tower(part, output_hidden_states=True)) for part in pixels.split(128)])
    states = []
    for start in range(0, len(asked), 128):
        part = asked[start : start + 128]
        prompts = [f"USER: {'<image>' * SIDE**2}\n{question_text(name)} ASSISTANT:" for _, name in part]
        # All questions have as many tokens: an object is one word.
        ids = torch.tensor(tokenizer(prompts).input_ids)
        images = pixels[[number for number, _ in part]]
        states.append(model.model(input_ids=ids, pixel_values=images).last_hidden_state[:, -1])
    sizes = [max((max(o.box[2:]) for o in scenes[i].objects if o.name == name), default=0) for i, name in asked]
    return Questions(torch.cat(states), patches, torch.tensor([i for i, _ in asked]), np.array(sizes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=shipped_base())
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--scenes", type=int, nargs=2, default=(700, 300), help="pair scenes, dev scenes")
    parser.add_argument("--steps", type=int, default=750)
    options = parser.parse_args()
    train, test = (
        read_questions(options.base, list(sample_scenes(options.seed, split, count)), asked)
        for split, count, asked in zip(("pairs", "dev"), options.scenes, (4, 3), strict=True)
    )
    print(f"{len(train.states):,} questions to learn from, {len(test.states):,} to score\n", flush=True)
    looks = {"state": None, "state + patches": lambda patches: patches}
    scores = {name: scores_of_probe(train, test, options.steps, look, size=128) for name, look in looks.items()}
    small, present = test.sizes < 14, test.sizes > 0
    print("| probe on | AUC | of small objects | of large ones | right, % |\n|---|---|---|---|---|")
    for name, values in scores.items():
        areas = [auc(values[present & group], values[~present]) for group in (small | ~small, small, ~small)]
        right = 100 * np.mean((values > 0) == present)
        print(f"| {name} | " + " | ".join(f"{area:.3f}" for area in areas) + f" | {right:.1f} |")
    gain = difference(scores["state"], scores["state + patches"], test.sizes, test.images.numpy())
    print(f"\npatches add {gain['difference']:+.3f} [{gain['ci'][0]:+.3f}, {gain['ci'][1]:+.3f}] of AUC")


if __name__ == "__main__":
    main()
