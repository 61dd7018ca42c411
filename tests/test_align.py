"""Rounds of alignment: when they stop, what each is made of, and that a kill changes no byte of the result."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from relook import align as rounds
from relook.align import AlignSettings, align
from relook.errors import RecipeError
from relook.files import read_json, write_json
from relook.mine.jobs import MiningSettings, MiningSource
from relook.toyworld.build import shipped_base

MINING = MiningSettings(
    seed=3,
    questions=0,
    max_new_tokens=40,
    batch_size=8,
    near_texts=0.0,
    parquet=False,
    by="sentence",
    continuations=3,
    complete=True,
)


def scores(chair_i: float) -> dict[str, Any]:
    interval = [chair_i - 0.01, chair_i + 0.01]
    rates = dict.fromkeys(("chair_i", "chair_s", "recall", "length"), chair_i)
    return {**rates, **{f"{name}_ci": interval for name in rates}}


def coverage(difference: float) -> dict[str, Any]:
    curve = [[1, 0.2, 0.1], [2, 0.5, 0.3]]
    rates = {"chair_i": [0.3, 0.3 + difference], "difference": difference, "ci": [difference - 0.01, difference + 0.01]}
    return {"recall": 0.5, "words": [2, 2], "recalls": [0.5, 0.5], "curves": [curve, curve], **rates}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The rounds' steps, noted instead of made; what each comparison with the last round finds is in `gains`."""
    noted: dict[str, list[Any]] = {"mined": [], "trained": [], "gains": [], "pairs": [8] * 9}

    def mine_pairs(model: Path, source: Any, out: Path, mining: Any, *_: Any) -> dict[str, Any]:
        noted["mined"].append((model, mining.seed, source.exclude, source.earlier))
        return {"descriptions": {"pairs": noted["pairs"].pop(0)}, "questions": {"pairs": 0}}

    def train(recipe: Any) -> Path:
        noted["trained"].append(recipe)
        return Path(recipe.output_dir)

    def evaluate_model(model: Path, benchmarks: list[str], data: Path, out: Path, *_: Any) -> None:
        write_json(out / "chair.json", scores(0.3))

    def compare_coverage(data: Path, first: Path, second: Path) -> dict[str, Any]:
        number = int(second.parent.name[-1]) - 1
        return coverage(noted["gains"][number] if int(first.parent.name[-1]) == number else sum(noted["gains"][:2]))

    for step in (mine_pairs, train, evaluate_model, compare_coverage):
        monkeypatch.setattr(rounds, step.__name__, step)
    return noted


def aligned(world: Path, out: Path, mining: MiningSettings = MINING, **changes: Any) -> dict[str, Any]:
    settings = {"recipe": "toyworld-lora", "keys": {"learning_rate": 1e-3}, "data": world / "test", **changes}
    align(shipped_base(), MiningSource(world / "vg", "toyworld"), out, AlignSettings(**settings), mining)
    result: dict[str, Any] = read_json(out / "rounds.json")
    return result


@pytest.mark.parametrize(
    ("gains", "min_gain", "count", "best", "stopped"),
    [
        ([-0.1, -0.05, -0.02], 0.0, 3, 3, "3 rounds"),
        pytest.param([-0.1, 0.0], 0.0, 2, 1, "round 2 brought no gain", marks=pytest.mark.slow),
        ([-0.1, -0.01], 0.02, 2, 1, "round 2 brought no gain"),
        ([0.1], 0.0, 1, 0, "round 1 brought no gain"),
    ],
)
def test_rounds_stop_where_nothing_is_gained(
    gains: list[float],
    min_gain: float,
    count: int,
    best: int,
    stopped: str,
    steps: dict[str, list[Any]],
    world: Path,
    tmp_path: Path,
) -> None:
    steps["gains"] += gains
    result = aligned(world, tmp_path / "out", min_gain=min_gain)
    assert (len(result["rounds"]) - 1, result["best"]) == (count, best)
    assert result["stopped"].startswith(stopped)
    runs = [tmp_path / "out" / f"round-{number}" / "run" for number in range(1, count + 1)]
    models, seeds, apart, earlier = map(list, zip(*steps["mined"], strict=True))
    assert models == [shipped_base(), *runs[:-1]]
    assert seeds == [3, 4, 5][:count]
    assert apart == [(world / "test" / "val2014",)] * count
    pairs = [run.parent / "pairs" for run in runs]
    assert earlier == [None, *pairs[:-1]]
    assert [recipe.vg_path for recipe in steps["trained"]] == list(map(str, pairs))
    assert {recipe.model_name_or_path for recipe in steps["trained"]} == {str(shipped_base())}
    assert all(recipe.training["learning_rate"] == 1e-3 for recipe in steps["trained"])
    page = (tmp_path / "out" / "align.html").read_text()
    assert page.count("relook mine --complete --model") == count
    assert result["stopped"] in page


def test_the_mining_shown_pairs_right_descriptions_too(
    steps: dict[str, list[Any]], world: Path, tmp_path: Path
) -> None:
    steps["gains"] = [0.1]
    mining = replace(MINING, by="description", complete=False, contrast=True)
    [_, line] = aligned(world, tmp_path / "out", mining)["rounds"]
    assert line["commands"][0].startswith("relook mine --contrast --model")


def test_a_round_without_pairs_is_the_end(steps: dict[str, list[Any]], world: Path, tmp_path: Path) -> None:
    steps["gains"], steps["pairs"] = [-0.1], [8, 0]
    result = aligned(world, tmp_path / "out")
    assert (result["best"], result["stopped"]) == (1, "round 2 found no pair")


def test_the_commands_shown_are_commands(
    steps: dict[str, list[Any]], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is taken by the command line as it stands."""
    import shlex

    from test_docs import parse_command

    monkeypatch.chdir(tmp_path)  # where `parse_command` makes what the commands name
    steps["gains"] = [-0.1, 0.1]
    [_, *lines] = aligned(world, tmp_path / "out", keys={"bf16": False, "learning_rate": 1e-3})["rounds"]
    assert "--earlier" in lines[1]["commands"][0]
    for number, line in enumerate(lines, 1):
        for command, made in zip(line["commands"], ("pairs", "run", "eval"), strict=True):
            (tmp_path / "out" / f"round-{number}" / made).mkdir(parents=True, exist_ok=True)
            parse_command(shlex.split(command))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"rounds": 0}, "Give --rounds 1 or more"),
        ({"keys": {"vg_path": "vg"}}, "Each round has its own vg_path"),
        ({"recipe": "toyworld-base", "keys": {"data_path": "d", "image_folder": "i"}}, "does not train on pairs"),
        ({"keys": {"beta": -1}}, "beta is -1"),
        ({"engine": "http://127.0.0.1:8000/v1"}, "A server has one model"),
        ({"engine": "vllm"}, "Only relook's own engine goes on with answers"),
    ],
)
def test_mistakes_are_found_before_the_first_round(
    changes: dict[str, Any], fault: str, steps: dict[str, list[Any]], world: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=fault):
        aligned(world, tmp_path / "out", **changes)
    assert not steps["mined"]
    assert not (tmp_path / "out" / "align.json").exists()


@pytest.mark.slow
def test_killed_for_good_the_rounds_end_in_the_same_bytes(world: Path, tmp_path: Path) -> None:
    """kill -9 as soon as a step has left something, step by step, then let alone."""

    def start(folder: Path) -> subprocess.Popen[bytes]:
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "relook", "align", "toyworld-lora", "--model", shipped_base(), "--out", "out"]
        command += ["--images", world / "vg", "--annotations", "toyworld", "--data", world / "test", "--rounds", "2"]
        command += ["--min-gain", "0", "--questions", "0", "--near-texts", "0", "--max-new-tokens", "40"]
        command += ["--continuations", "3", "--batch-size", "2", "--max_steps", "4", "--save_steps", "2"]
        command += ["--save_strategy", "steps", "--seed", "1"]
        return subprocess.Popen(list(map(str, command)), cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def contents(folder: Path) -> dict[str, bytes]:
        names = ("sentinel.json", "card.json", "pairs.html", "trained.safetensors", "chair.jsonl")
        files = [*folder.glob("out/*"), *(path for name in names for path in folder.rglob(name))]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.is_file()}

    assert start(tmp_path / "whole").wait() == 0
    cut = tmp_path / "cut"
    for name in ("pairs/work/sentences.jsonl", "pairs/card.json", "run/checkpoints/checkpoint-2", "run/run.json"):
        job = start(cut)
        while not (cut / "out" / "round-1" / name).exists() and job.poll() is None:
            time.sleep(0.005)
        job.kill()
        job.wait()
        assert (cut / "out" / "round-1" / name).exists()
    assert start(cut).wait() == 0
    whole = contents(tmp_path / "whole")
    assert {"out/rounds.json", "out/align.html", "out/round-1/run/trained.safetensors"} <= whole.keys()
    assert contents(cut) == whole
