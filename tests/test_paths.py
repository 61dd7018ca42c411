"""Paths are str or Path in the functions that commands and scripts call."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import write_world

import relook
from relook import load_model
from relook.data.annotations import read_coco
from relook.data.check import check_folder, fix_folder
from relook.data.convert import convert_pairs as convert_pairs
from relook.data.images import open_image
from relook.data.readers import read_hadpo, read_llava, read_pairs
from relook.evaluate.benchmark import ScoringInputs, score_command
from relook.evaluate.compare import compare, read_scores
from relook.evaluate.run import evaluate_model
from relook.evaluate.tasks.build_pope import build_pope_files
from relook.evaluate.tasks.pope import read_pope_answers, read_pope_questions
from relook.files import read_json
from relook.mine.jobs import MiningSettings, MiningSource
from relook.mine.run import mine_pairs
from relook.model.export import WriteOptions, convert_model
from relook.model.inspect import inspect_model as inspect_model
from relook.model.load import LoadOptions
from relook.report.comparison import write_comparison

ROOMS = Path(relook.__file__).parent


def called_by_commands() -> Iterator[tuple[str, Any]]:
    """The functions that `relook/cli` imports, and the readers of the data."""
    names = set()
    for path in (ROOMS / "cli").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("relook"):
                names |= {(str(node.module), alias.name) for alias in node.names}
    for path in (ROOMS / "data").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith(("read_", "open_image", "open_parquet")):
                names.add((f"relook.data.{path.stem}", node.name))
    for module, name in sorted(names):
        function = getattr(importlib.import_module(module), name, None)
        if inspect.isfunction(function) and function.__module__ != "relook.files":
            yield f"{module}.{name}", function


def test_every_function_that_commands_call_says_that_paths_may_be_strings() -> None:
    """What it says is true: mypy would find a string that is used as a Path."""
    functions = dict(called_by_commands())
    narrow = {
        f"{where}({name})": parameter.annotation
        for where, function in functions.items()
        for name, parameter in inspect.signature(function).parameters.items()
        if "Path" in str(parameter.annotation) and "str |" not in str(parameter.annotation)
    }
    assert len(functions) > 30
    assert narrow == {}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_world(tmp_path_factory.mktemp("world")))


def test_data_by_strings(world: str, tmp_path: Path) -> None:
    folder, out = f"{world}/test", str(tmp_path / "fixed")
    assert check_folder("pope", folder, workers=1).to_json() == check_folder("pope", Path(folder), workers=1).to_json()
    assert fix_folder("pope", folder, out, workers=1)
    table = str(tmp_path / "pairs.parquet")
    count = convert_pairs(world, table, "trl", images=f"{world}/vg")
    assert convert_pairs(table, str(tmp_path / "hadpo"), "hadpo") == count
    assert read_pairs(table, str(tmp_path / "images"))[0]
    pairs, _ = read_hadpo(f"{world}/vg", f"{world}/desc_data.json", f"{world}/pope_data.json")
    assert open_image(str(pairs[0].images[0])).size == (96, 96)
    conversations, _ = read_llava(f"{world}/llava/toyworld_mix.json", f"{world}/llava/images")
    assert conversations
    annotations = f"{world}/test/annotations"
    assert read_coco(f"{annotations}/instances_val2014.json").objects
    assert build_pope_files(f"{annotations}/instances_val2014.json", str(tmp_path / "pope"), images=2, positives=1)


def test_models_by_strings(base: Path, tmp_path: Path) -> None:
    source, out = str(base), str(tmp_path / "llava")
    assert inspect_model(source)["modules"] == inspect_model(base)["modules"]
    assert convert_model(source, out, "llava") == 0
    tower = f"{out}/vision_tower"
    assert convert_model(out, str(tmp_path / "hf"), "hf", WriteOptions(vision_tower=tower)) == 0
    assert LoadOptions(vision_tower=tower).identity(out)["model"] == out
    assert LoadOptions(vision_tower=tower).load(out).path == load_model(out, vision_tower=tower).path


def test_evaluations_by_strings(base: Path, world: str, tmp_path: Path) -> None:
    data, (first, second) = f"{world}/test", (str(tmp_path / name) for name in ("first", "second"))
    for out in (first, second):
        scores = evaluate_model(str(base), ["pope", "chair"], data, out, max_new_tokens=2)
    folder: Any = data
    assert read_scores(second)["pope"]["random"] == scores["pope"]["random"]
    assert score_command("pope", [second], ScoringInputs(data=folder), "official", None)
    assert compare(data, first, second, ["pope"])["pope"]["random"]["difference"] == 0
    assert write_comparison(first, second, str(tmp_path / "both"), data).is_file()
    split = read_pope_questions(f"{data}/pope/coco_pope_random.json", data)
    assert len(read_pope_answers(f"{second}/pope_random.jsonl")) == len(split)


def test_mining_by_strings(base: Path, world: str, tmp_path: Path) -> None:
    out = str(tmp_path / "pairs")
    apart: Any = [f"{world}/test/pope/coco_pope_random.json"]
    place: Any = f"{world}/vg"
    mine_pairs(str(base), MiningSource(place, "vg", exclude=apart), out, MiningSettings(max_new_tokens=4))
    assert read_json(tmp_path / "pairs" / "card.json")
