"""`relook demo`: toyworld end to end, in the same steps and through the same readers as a real job.

Every step leaves a result in the output folder and is skipped when that result is there, so the same command goes on
after Ctrl-C or a kill.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relook.console import progress, status
from relook.errors import RecipeError
from relook.evaluate.compare import compare, read_scores
from relook.evaluate.results import library_versions
from relook.evaluate.run import evaluate_model
from relook.files import claim_output_dir, read_json, write_json
from relook.mine.jobs import MiningSettings, MiningSource
from relook.mine.run import mine_pairs
from relook.model.load import model_hash
from relook.recipe import load_recipe
from relook.report.findings import CONTROLS
from relook.report.pages import RESULTS_FILE, write_report
from relook.toyworld import layouts
from relook.toyworld.build import shipped_base
from relook.train.run import train

REGIMES = ("post_decoder", "nll_control", "no_cross_attention", "head", "lora")
PAIR_SCENES, TEST_SCENES = 900, 300
LORA_EPOCHS = 0.2  # the trunk runs in each of its steps: it sees a part of the pairs, so that the demo stays short
DEMO_FILE, REPORT_FILE = "demo.json", "report.html"


@dataclass(frozen=True)
class DemoPaths:
    """Paths of one demo's files."""

    out: Path

    @property
    def world(self) -> Path:
        return self.out / "world"

    @property
    def pairs(self) -> Path:
        return self.out / "pairs"

    def run(self, regime: str) -> Path:
        return self.out / "runs" / regime

    def answers(self, name: str, split: str = "test") -> Path:
        return self.out / "eval" / split / name


def run_demo(out: str | Path, seed: int = 0, rebuild: bool = False, base: str | Path | None = None) -> Path:
    """Run the demo, or the rest of an unfinished one, and return the report's path.

    Raises:
        RecipeError: the folder holds something else, or a demo with other settings.
    """
    out = Path(out)
    base = None if base is None else Path(base)
    if base is not None and not base.is_dir():
        raise RecipeError(f"There is no model folder {base}.", "Check --base.")
    paths = DemoPaths(out)
    # Written into the folder: the same command goes on there, one with other settings is refused.
    settings = {"seed": seed, "rebuild": rebuild, "base": str(base.resolve()) if base else "shipped"}
    claim_output_dir(out, DEMO_FILE, settings, "a demo")
    report = out / REPORT_FILE  # written last but one: its presence marks a finished demo
    if report.exists():
        status(f"{out} is finished: see {report}")
        return report
    clock = _Clock(out / "seconds.json")
    with clock.phase("toyworld"):
        draw_world(paths, seed)
    with clock.phase("base"):
        model = find_base(paths, seed, rebuild, base)
        evaluate_split(model, paths, "base")
    with clock.phase("mining"):
        mine_demo_pairs(model, paths, seed)
    for regime in REGIMES:
        with clock.phase(f"train {regime}"):
            changes = {"num_train_epochs": LORA_EPOCHS} if regime == "lora" else {}
            train_regime(regime, model, paths, seed, changes=changes)
        with clock.phase(f"evaluate {regime}"):
            evaluate_split(paths.run(regime), paths, regime)
    with clock.phase("report"):
        results = demo_results(paths, model, seed)
        write_json(out / RESULTS_FILE, {**results, "seconds": clock.seconds})
        report = write_report(out)
    # Again, now with the seconds that the report itself took.
    write_json(out / RESULTS_FILE, {**results, "seconds": clock.seconds})
    status(f"{report} and {out / RESULTS_FILE}, {sum(clock.seconds.values()):.0f} s in all")
    return report


def draw_world(paths: DemoPaths, seed: int) -> None:
    pairs_ready, test_ready = (layouts.is_finished(paths.world / part) for part in ("vg", "test"))
    with progress("scenes to mine pairs from", PAIR_SCENES * pairs_ready) as report:
        layouts.write_vg(paths.world, seed, PAIR_SCENES, report)
    with progress("test scenes", TEST_SCENES * test_ready) as report:
        layouts.write_eval(paths.world, "test", seed, TEST_SCENES, report)


def find_base(paths: DemoPaths, seed: int, rebuild: bool, base: Path | None) -> Path:
    """Return the base model: the user's, a newly trained one, or the one that ships with relook."""
    if base is not None:
        return base
    if not rebuild:
        return shipped_base()
    from relook.toyworld.build import build_base

    return build_base(paths.out / "base", paths.world, seed)


def evaluate_split(model: Path, paths: DemoPaths, name: str, split: str = "test") -> dict[str, Any]:
    return evaluate_model(
        model, ["pope", "chair"], paths.world / split, paths.answers(name, split), max_new_tokens=64, batch_size=100
    )


def mine_demo_pairs(model: Path, paths: DemoPaths, seed: int) -> None:
    """Mine pairs from scenes that no evaluation uses."""
    source = MiningSource(paths.world / "vg", "toyworld", exclude=[paths.world / "test"])
    mine_pairs(model, source, paths.pairs, mining_settings(seed))


def mining_settings(seed: int) -> MiningSettings:
    """Return toyworld's settings of mining."""
    # Its descriptions are made of set phrases, so similar texts are no duplicates: near_texts is 0.
    return MiningSettings(
        seed,
        samples=0,
        questions=6,
        max_new_tokens=64,
        batch_size=100,
        near_texts=0,
        parquet=False,
        contrast=True,
    )


def train_regime(
    regime: str, model: Path, paths: DemoPaths, seed: int, recipe: str = "", changes: Mapping[str, Any] | None = None
) -> None:
    """Train by the shipped recipe of a regime, or by another one, with the demo's paths, as a user would."""
    train(
        load_recipe(
            recipe or f"toyworld-{regime.replace('_', '-')}",
            {
                "model_name_or_path": model,
                "vg_path": paths.world / "vg",
                "desc_data_path": paths.pairs / "desc_data.json",
                "pope_data_path": paths.pairs / "pope_data.json",
                "output_dir": paths.run(regime),
                "seed": seed,
                **(changes or {}),
            },
        )
    )


def demo_results(paths: DemoPaths, model: Path, seed: int) -> dict[str, Any]:
    """Collect the contents of `results.json` but for the seconds, from the files of evaluation and mining."""
    test = paths.world / "test"
    return {
        "base": read_scores(paths.answers("base")),
        "runs": {regime: read_scores(paths.answers(regime)) for regime in REGIMES},
        "paired": {regime: compare(test, paths.answers("base"), paths.answers(regime)) for regime in REGIMES},
        "against": {name: compare(test, paths.answers(name), paths.answers("post_decoder")) for name in CONTROLS},
        "provenance": {
            "seed": seed,
            "base": str(model),
            "base_hash": model_hash(model),
            "pairs": read_json(paths.pairs / "card.json"),
            "versions": library_versions(),
        },
    }


class _Clock:
    """Seconds of each phase, added up over interrupted runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = read_json(path) if path.exists() else {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Announce a phase, and add up its seconds, also those of a phase that is interrupted."""
        status(name, style="bold")
        started = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - started
            self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 2)
            write_json(self.path, self.seconds)
