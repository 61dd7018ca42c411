"""A benchmark is one file and one line: a made-up one is asked, scored, rescored and compared by its name alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from relook.errors import DataError, RecipeError
from relook.evaluate.benchmark import ScoringInputs, score_command
from relook.evaluate.compare import compare, paired_benchmarks
from relook.evaluate.run import evaluate_model
from relook.evaluate.tasks import BENCHMARKS, get_benchmark, get_benchmarks
from relook.files import read_json, read_records
from relook.report.comparison import write_comparison

MADE_UP = """
from relook.data.samples import Question
from relook.evaluate.benchmark import Benchmark, answers_provenance
from relook.evaluate.statistics import rate_difference, rate_intervals
from relook.files import read_records


def questions(data):
    return {"colours": [Question(image.stem, image, "What colour?") for image in sorted(data.glob("*.png"))]}


def ratio(texts):
    return [(int(bool(text)), 1) for text in texts]


def score(data, questions, answers, location, judge):
    texts = BENCHMARK.texts(answers).values()
    result = {"answered": sum(map(bool, texts)) / len(texts), **rate_intervals({"answered": ratio(texts)})}
    return result | answers_provenance(location, questions, answers)


def texts(folder):
    return [record["colour"] for record in read_records(folder / "colours.jsonl")]


BENCHMARK = Benchmark(
    "colours",
    questions=questions,
    score=score,
    id_field="id",
    text_field="colour",
    numeric_ids=True,
    yes_or_no=["colours"],
    compare=lambda runs: {
        "answered": rate_difference(*([ratio(texts(run[side])) for run in runs] for side in (1, 2)))
    },
)
"""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "made_up_benchmark.py").write_text(MADE_UP)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(BENCHMARKS, "colours", "made_up_benchmark")
    folder = tmp_path / "data"
    folder.mkdir()
    for number, colour in enumerate(("red", "blue")):
        Image.new("RGB", (20, 20), colour).save(folder / f"{number}.png")
    return folder


def test_a_made_up_benchmark_needs_one_file_and_one_line(base: Path, data: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for out in (first, second):
        scores = evaluate_model(base, ["colours"], data, out, max_new_tokens=4)["colours"]
    records = read_records(first / "colours.jsonl")
    assert [(record["id"], record["image"], record["question"]) for record in records] == [
        (number, f"{number}.png", "What colour?") for number in (0, 1)
    ]
    assert scores["provenance"]["generation"]["max_new_tokens"] == 4
    again = score_command("colours", [first], ScoringInputs())
    assert again == read_json(first / "colours.json")
    assert again["answered"] == sum(bool(record["colour"]) for record in records) / 2
    alone = score_command("colours", [first / "colours.jsonl"], ScoringInputs(data))
    assert alone["answered_ci"] == again["answered_ci"]
    assert compare(data, first, second, ["colours"]) == {"colours": {"answered": {"difference": 0, "ci": [0, 0]}}}
    assert "colours" in paired_benchmarks()
    assert "<h2>COLOURS</h2>" in write_comparison(first, second).read_text()
    (data / "0.png").rename(data / "2.png")
    with pytest.raises(DataError, match=r"1 have no question \('?0'?\); 1 are missing"):
        score_command("colours", [first], ScoringInputs())


def test_every_registered_module_exports_its_benchmark() -> None:
    assert get_benchmarks(BENCHMARKS).keys() == BENCHMARKS.keys()
    assert get_benchmark("pope").rescore
    with pytest.raises(RecipeError, match="no benchmark cats"):
        get_benchmark("cats")


def test_listing_the_benchmarks_imports_none_of_them() -> None:
    """`relook --help` names them all, and must stay quick."""
    code = "import sys, relook.cli; print(*(name for name in sys.modules if name.startswith('relook.evaluate')))"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert listed.stdout.split() == ["relook.evaluate", "relook.evaluate.tasks"]
