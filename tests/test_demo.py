"""The demo in small: its files keep the contract, and interrupted anywhere it ends with the same results."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Command
from helpers.interrupted import interrupt

from relook import demo
from relook.evaluate.tasks.chair import read_eval_captions
from relook.evaluate.tasks.pope import SPLITS
from relook.generate import answering
from relook.mine import output as mining
from relook.model.load import TENSORS_FILE
from relook.toyworld import layouts
from relook.train import run as training
from relook.train.feature_cache import TrunkCache

POPE = {"tp", "fp", "tn", "fn", "accuracy", "precision", "recall", "f1", "yes_ratio", "n", "parser", "accuracy_ci"}
CHAIR = {"chair_i", "chair_s", "recall", "length", "empty", "chair_i_ci", "recall_ci"}
RUNS = {"head", "post_decoder", "no_cross_attention", "lora", "nll_control"}
SEED = 4


@pytest.fixture(scope="module")
def small() -> Any:
    """A demo of a few scenes: all else is as in the real one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "PAIR_SCENES", 8)
        patch.setattr(demo, "TEST_SCENES", 6)
        patch.setattr(demo, "LORA_EPOCHS", 1)  # of 8 scenes a fifth would be less than a step
        TrunkCache.current = None
        yield patch
        TrunkCache.current = None


@pytest.fixture(scope="module")
def whole(small: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo that ran through."""
    out = tmp_path_factory.mktemp("demo") / "out"
    assert demo.run_demo(out, SEED) == out / "report.html"
    return out


def test_results_keep_the_contract(whole: Path) -> None:
    results = json.loads((whole / "results.json").read_text())
    assert results.keys() >= {"base", "runs", "seconds", "provenance"}
    assert results["runs"].keys() == results["paired"].keys() == RUNS
    for scores in (results["base"], *results["runs"].values()):
        assert scores["pope"].keys() == set(SPLITS)
        assert all(scores["pope"][split].keys() >= POPE for split in SPLITS)
        assert scores["chair"].keys() >= CHAIR
        assert scores["chair"]["n"] == 6
    assert results["provenance"]["seed"] == SEED
    phases = {"toyworld", "base", "mining", "report"}
    phases |= {f"{what} {name}" for what in ("train", "evaluate") for name in RUNS}
    assert results["seconds"].keys() == phases
    assert all(seconds >= 0 for seconds in results["seconds"].values())


def test_every_regime_trained_something_of_its_own(whole: Path) -> None:
    weights = {name: (whole / "runs" / name / TENSORS_FILE).read_bytes() for name in RUNS}
    assert len(set(weights.values())) == len(RUNS)


class Page(HTMLParser):
    """Collects what a browser would load, and the texts of tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        # A browser follows the href of <a> only when asked.
        names = ("src", "xlink:href", "data", "srcset", *(["href"] if tag != "a" else []))
        self.loads += [value or "" for name, value in attrs if name in names]


def test_the_report_loads_nothing_from_outside(whole: Path) -> None:
    text = (whole / "report.html").read_text()
    page = Page(text)
    assert page.loads
    assert all(address.startswith(("data:", "#")) for address in page.loads)
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert "@import" not in text
    assert "url(http" not in text


def test_the_report_shows_what_was_measured(whole: Path) -> None:
    text = (whole / "report.html").read_text()
    results = json.loads((whole / "results.json").read_text())
    for name in ("base", *RUNS):
        assert text.count(f'popovertarget="term-{name}"') == 1  # a line of the table, explained
    accuracy = results["runs"]["lora"]["pope"]["adversarial"]
    low, high = (f"{100 * value:.1f}" for value in accuracy["accuracy_ci"])
    assert f"{100 * accuracy['accuracy']:.1f} <small>[{low},\N{NO-BREAK SPACE}{high}]</small>" in text
    assert "<pre>relook serve " in text
    assert "{&#39;" not in text  # no dict as Python writes it
    for title in ("where tuning helps", "where tuning breaks something", "became right", "became wrong"):
        assert text.count(f"{title}</h2>") == 1
    tuned = read_eval_captions(whole / "eval" / "test" / "post_decoder")
    if tuned != read_eval_captions(whole / "eval" / "test" / "base"):
        assert '<span class="tag ' in text
    assert text.count("<figcaption>") == text.count("<image class=heat")


def test_a_finished_demo_does_nothing(whole: Path, small: Any) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in whole.rglob("*")}

    before = state()
    assert demo.run_demo(whole, SEED) == whole / "report.html"
    assert state() == before


def test_the_report_can_be_written_again(whole: Path, relook: Command) -> None:
    page = (whole / "report.html").read_bytes()
    (whole / "report.html").write_text("lost")
    assert relook("report", whole).status == 0
    assert len((whole / "report.html").read_bytes()) == pytest.approx(len(page), rel=0.01)


@pytest.mark.slow  # each of its parts is killed and goes on in a test of its own
def test_an_interrupted_demo_ends_with_the_same_results(whole: Path, small: Any, tmp_path: Path) -> None:
    """Ctrl-C while drawing, answering, mining, at a training step, before saving and in the report; then again."""
    out = tmp_path / "out"
    trainer = training.RelookTrainer
    places: list[tuple[Any, str, int]] = [
        (layouts, "draw_scene", 11),
        (answering, "submit", 4),
        (mining, "write_json", 2),
        (trainer, "compute_loss", 3),
        (training, "save_run", 1),
        (answering, "submit", 1),
        (demo, "write_report", 1),
    ]
    for owner, name, count in places:
        with pytest.MonkeyPatch.context() as patch:
            interrupt(patch, owner, name, count)
            with pytest.raises(KeyboardInterrupt):
                demo.run_demo(out, SEED)
        assert not (out / "report.html").exists()
        TrunkCache.current = None  # as in a process of its own
    demo.run_demo(out, SEED)
    results, expected = (json.loads((folder / "results.json").read_text()) for folder in (out, whole))
    assert results.pop("seconds").keys() == expected.pop("seconds").keys()
    assert results == expected
    for name in RUNS:
        assert (out / "runs" / name / TENSORS_FILE).read_bytes() == (whole / "runs" / name / TENSORS_FILE).read_bytes()
    for path in (whole / "eval").rglob("*.jsonl"):
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes()
