"""What photoworld's stages share: sizes, files of the work folder, and relook's commands."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from analysis import summary
from scenes import Scene

from relook.files import read_json

HERE = Path(__file__).resolve().parent
FIRST_ID = {
    "sft": 1_000_000,
    "pairs": 2_000_000,
    "dev": 3_000_000,
    "test": 4_000_000,
    "fresh": 5_000_000,
}  # an image's id is its seed


@dataclass(frozen=True)
class Sizes:
    """How much of everything: scenes of each split, and the settings that depend on it."""

    scenes: dict[str, int] = field(default_factory=lambda: {"sft": 12000, "pairs": 5000, "dev": 300, "test": 500})
    tower: tuple[int, int] = (384, 8)  # width, layers
    tower_seconds: float = 80
    layers: int = 12  # of the language model's 30, from the first
    claim_core: float = 0.6  # probability that the base's texts claim an absent core object
    trunk_grid: int = 2  # the trunk sees so many cells a side, the post decoder all 14 x 14 patches; 0: both do
    seed: int = 0  # of the base
    align_steps: int = 300
    sft: tuple[str, ...] = ("--bf16", "true", "--trunk_pass", "dense", "--max_steps", "600")
    tune: tuple[str, ...] = ("--bf16", "true", "--trunk_pass", "dense", "--max_steps", "500")
    evaluation: tuple[str, ...] = ("--dtype", "bfloat16", "--batch-size", "256", "--max-new-tokens", "140")
    mined: int = 2500  # captions of the base
    probe_steps: int = 1500
    split: str = "test"  # on which the study answers; "fresh": scenes that no choice was made on
    jobs: int = 6  # processes that share the GPU
    seeds: tuple[int, ...] = (1, 2)
    only: tuple[str, ...] = ()  # variants of the study; empty: all
    study_seconds: float = 0  # no variant is begun after so long; 0: all are


TINY = Sizes(
    scenes={"sft": 48, "pairs": 16, "dev": 12, "test": 12},
    tower=(64, 2),
    tower_seconds=6,
    layers=2,
    align_steps=10,
    sft=("--max_steps", "6", "--per_device_train_batch_size", "8", "--warmup_steps", "2", "--save_steps", "1000"),
    tune=("--max_steps", "3", "--per_device_train_batch_size", "8", "--warmup_steps", "1"),
    evaluation=("--batch-size", "32", "--max-new-tokens", "24"),
    probe_steps=10,
    jobs=1,
    seeds=(1,),
    only=(
        *("cross", "none", "own_tokens", "dpo_20", "cross_questions"),
        *("swapped", "swapped_similar", "lora", "nll_policy"),
    ),
)


@dataclass(frozen=True)
class Paths:
    assets: Path
    work: Path
    shared: Path | None = None  # folder of scenes and tower, which several bases share; None: work

    def data(self, split: str) -> Path:
        return (self.shared or self.work) / "data" / split

    @property
    def tower(self) -> Path:
        return (self.shared or self.work) / "tower.pt"

    def pixels(self, split: str) -> Path:
        return self.data(split) / "pixels.npy"

    @property
    def base(self) -> Path:
        return self.work / "base"


def picture_of(folder: Path, split: str, number: int) -> Path:
    image_id = FIRST_ID[split] + number
    return folder / (f"images/{image_id}.jpg" if split == "sft" else f"val2014/COCO_val2014_{image_id:012d}.jpg")


def read_scenes(paths: Paths, split: str) -> list[Scene]:
    return [Scene.from_json(record) for record in read_json(paths.data(split) / "scenes.json")]


def load_pixels(paths: Paths, split: str) -> tuple[Any, Any]:
    import torch

    pixels = torch.from_numpy(np.load(paths.pixels(split)))
    return pixels, torch.from_numpy(np.load(paths.data(split) / "patches.npy").astype(np.int64))


def relook(paths: Paths, sizes: Sizes, log: str, *words: str | Path, change: Sequence[str] = ()) -> None:
    """Run relook's command in a process of its own; its output goes to a log file, the end of it to an error.

    Args:
        change: what changed.py changes, beside the trunk's grid.
    """
    changes = [*([f"trunk_grid={sizes.trunk_grid}"] if sizes.trunk_grid else []), *change]
    module = [str(HERE / "changed.py"), *changes, "--"] if changes else ["-m", "relook"]
    file = paths.work / "log" / f"{log}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        done = subprocess.run(
            [sys.executable, *module, *map(str, words)], stdout=stream, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{log} failed:\n{file.read_text()[-2500:]}")


def evaluate(paths: Paths, sizes: Sizes, name: str, model: Path, split: str, *change: str) -> dict[str, Any]:
    """Answer POPE and CHAIR (what is answered is kept) and return the scores that tables show."""
    out = paths.work / "eval" / split / name
    if not ((out / "chair.json").exists() and (out / "pope.json").exists()):
        words = ("pope", "chair", "--model", model, "--data", paths.data(split), "--out", out, "--version", "llava_hf")
        relook(paths, sizes, f"eval-{split}-{name}", "eval", *words, *sizes.evaluation, change=("uncompiled", *change))
    return summary(out)
