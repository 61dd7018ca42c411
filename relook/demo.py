"""`relook demo`: toyworld end to end, in the same steps and through the same readers as a real job.

Every step leaves a result in the output folder and is skipped when that result is there, so the same command goes on
after Ctrl-C or a kill.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
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
from relook.report.pages import RESULTS_FILE, write_report
from relook.toyworld import layouts
from relook.toyworld.build import shipped_base
from relook.train.run import train

REGIMES = ("post_decoder", "nll_control", "post_decoder_head", "head", "lora")
PAIR_SCENES, TEST_SCENES = 1000, 300
DEMO_FILE, REPORT_FILE = "demo.json", "report.html"


@dataclass(frozen=True)
class DemoPaths:
    """Where everything of one demo lies."""

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
    """Run the whole demo, or what is left of it; returns the report's path.

    Raises:
        RecipeError: the folder holds something else, or a demo with other settings.
    """
    out = Path(out)
    base = None if base is None else Path(base)
    if base is not None and not base.is_dir():
        raise RecipeError(f"There is no model folder {base}.", "Check --base.")
    places = DemoPaths(out)
    settings = {"seed": seed, "rebuild": rebuild, "base": str(base.resolve()) if base else "shipped"}
    claim_output_dir(out, DEMO_FILE, settings, "a demo")
    report = out / REPORT_FILE
    if report.exists():
        status(f"{out} is finished: see {report}")
        return report
    clock = _Clock(out / "seconds.json")
    with clock.phase("toyworld"):
        draw_world(places, seed)
    with clock.phase("base"):
        model = find_base(places, seed, rebuild, base)
    with clock.phase("base evaluation"):
        evaluate_split(model, places, "base")
    with clock.phase("mining"):
        mine_demo_pairs(model, places, seed)
    for regime in REGIMES:
        with clock.phase(f"train {regime}"):
            train_regime(regime, model, places, seed)
        with clock.phase(f"evaluate {regime}"):
            evaluate_split(places.run(regime), places, regime)
    with clock.phase("report"):
        results = demo_results(places, model, seed)
        write_json(out / RESULTS_FILE, {**results, "seconds": clock.seconds})
        report = write_report(out)
    write_json(out / RESULTS_FILE, {**results, "seconds": clock.seconds})
    status(f"{report} and {out / RESULTS_FILE}, {sum(clock.seconds.values()):.0f} s in all")
    return report


def draw_world(places: DemoPaths, seed: int) -> None:
    with progress("scenes to mine pairs from") as report:
        layouts.write_vg(places.world, seed, PAIR_SCENES, report)
    with progress("test scenes") as report:
        layouts.write_eval(places.world, "test", seed, TEST_SCENES, report)


def find_base(places: DemoPaths, seed: int, rebuild: bool, base: Path | None) -> Path:
    """The base model: another one, a new one, or the one that ships with relook."""
    if base is not None:
        return base
    if not rebuild:
        return shipped_base()
    from relook.toyworld.build import build_base

    return build_base(places.out / "base", places.world, seed)


def evaluate_split(model: Path, places: DemoPaths, name: str, split: str = "test") -> dict[str, Any]:
    return evaluate_model(
        model, ["pope", "chair"], places.world / split, places.answers(name, split), max_new_tokens=64, batch_size=100
    )


def mine_demo_pairs(model: Path, places: DemoPaths, seed: int) -> None:
    """Pairs of the scenes that no evaluation has."""
    place = MiningSource(places.world / "vg", "toyworld", exclude=[places.world / "test"])
    mine_pairs(model, place, places.pairs, mining_settings(seed))


def mining_settings(seed: int) -> MiningSettings:
    """Toyworld's; it speaks in set phrases, so that texts alike are no duplicates."""
    return MiningSettings(seed, questions=4, max_new_tokens=64, batch_size=100, near_texts=0, parquet=False)


def train_regime(
    regime: str, model: Path, places: DemoPaths, seed: int, recipe: str = "", changes: Mapping[str, Any] | None = None
) -> None:
    """The shipped recipe of a regime (or another), with the demo's paths: just what a user does with real ones."""
    train(
        load_recipe(
            recipe or f"toyworld-{regime.replace('_', '-')}",
            {
                "model_name_or_path": model,
                "vg_path": places.world / "vg",
                "desc_data_path": places.pairs / "desc_data.json",
                "pope_data_path": places.pairs / "pope_data.json",
                "output_dir": places.run(regime),
                "seed": seed,
                **(changes or {}),
            },
        )
    )


def demo_results(places: DemoPaths, model: Path, seed: int) -> dict[str, Any]:
    """Everything `results.json` says but the seconds, from the files of evaluation and mining."""
    test = places.world / "test"
    return {
        "base": read_scores(places.answers("base")),
        "runs": {regime: read_scores(places.answers(regime)) for regime in REGIMES},
        "paired": {regime: compare(test, places.answers("base"), places.answers(regime)) for regime in REGIMES},
        "against_control": compare(test, places.answers("nll_control"), places.answers("post_decoder")),
        "provenance": {
            "seed": seed,
            "base": str(model),
            "base_hash": model_hash(model),
            "pairs": read_json(places.pairs / "card.json"),
            "versions": library_versions(),
        },
    }


class _Clock:
    """Seconds of each phase, added up over interrupted runs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = read_json(path) if path.exists() else {}

    def phase(self, name: str) -> _Phase:
        return _Phase(self, name)


class _Phase:
    def __init__(self, clock: _Clock, name: str) -> None:
        self.clock, self.name = clock, name

    def __enter__(self) -> None:
        status(self.name, style="bold")
        self.started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        spent = time.monotonic() - self.started
        self.clock.seconds[self.name] = round(self.clock.seconds.get(self.name, 0.0) + spent, 2)
        write_json(self.clock.path, self.clock.seconds)
