"""MMHal-Bench: ratings, the original's arithmetic, and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.endpoint import Answer, Request, endpoint
from PIL import Image

from relook.errors import DataError, RecipeError
from relook.evaluate.benchmark import ScoringInputs, score_command
from relook.evaluate.judge import JudgeSettings
from relook.evaluate.run import evaluate_model
from relook.evaluate.tasks import mmhal
from relook.files import read_records, write_json

RATINGS = {"first": 6, "second": 2, "third": 3, "fourth": 0}
KINDS = ["attribute", "adversarial", "attribute", "adversarial"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "mmhal"
    entries = [
        {
            "question_type": kind,
            "question_topic": "animal",
            "image_id": f"{number}",
            "image_src": f"https://nowhere.invalid/x/{number}_o.jpg",
            "image_content": ["Cat", "Lynx"],
            "question": f"What is {number}?",
            "gt_answer": "Two cats.",
            "model_answer": "",
        }
        for number, kind in enumerate(KINDS)
    ]
    write_json(folder / "response_template.json", entries)
    (folder / "images").mkdir()
    for number in range(4):
        Image.new("RGB", (20, 20), "white").save(folder / "images" / f"{number}_o.jpg")
    return tmp_path / "data"


def answered(data: Path, path: Path) -> Path:
    entries = read_records(data / "mmhal" / "response_template.json")
    write_json(path, [{**entry, "model_answer": text} for entry, text in zip(entries, RATINGS, strict=True)])
    return path


def rescore(data: Path | None, answers: list[Path], judge: JudgeSettings | None) -> dict[str, Any]:
    return score_command("mmhal", answers, ScoringInputs(data), "official", judge)


def rate(request: Request, _: int) -> Answer:
    text = request["messages"][0]["content"]
    return Answer(f"Well.\nRating: {next(r for word, r in RATINGS.items() if word in text)}, so to say")


@pytest.mark.parametrize(
    ("reply", "rating"),
    [
        ("Rating: 6", 6),
        ("x\nrating: 0, not informative", 0),
        ("**Rating:** 4.", 4),
        ("Rating: 3. Rating: 3", 3),
        ("Rating: 3 or Rating: 4", None),
        ("Rating: 7", None),
        ("Rating: 10", None),
        ("Rating: 3.5", None),
        ("Rating 3", None),
        ("", None),
    ],
)
def test_ratings_are_read_strictly(reply: str, rating: int | None) -> None:
    assert mmhal.read_rating(reply) == rating


def test_scores_by_hand(data: Path, tmp_path: Path) -> None:
    with endpoint(rate) as server:
        settings = JudgeSettings(server.url, "m")
        result = rescore(data, [answered(data, tmp_path / "a.json")], settings)
    assert (result["score"], result["hallucination_rate"]) == (11 / 4, 2 / 4)
    assert result["by_type"] == {"attribute": 9 / 2, "adversarial": 1}
    assert (result["n"], result["not_judged"]) == (4, 0)
    assert result["score_ci"][0] < result["score"] < result["score_ci"][1]
    assert result["judge"]["prompt"] == "relook"
    about = next(prompt for prompt in server.prompts if "first" in prompt)
    parts = ["On the image: Cat, Lynx\n", "Question: What is 0?\n", "person: Two cats.\n", "model: first\n"]
    assert [part for part in parts if part not in about] == []
    assert {request["temperature"] for request in server.requests} == {0.0}


def test_answers_without_a_rating_are_counted_and_left_out(data: Path, tmp_path: Path) -> None:
    def odd(request: Request, number: int) -> Answer:
        return (
            Answer("Rating: 3 or 9; rating: 4")
            if "third" in request["messages"][0]["content"]
            else rate(request, number)
        )

    with endpoint(odd) as server:
        settings = JudgeSettings(server.url, "m", tries=2)
        result = rescore(data, [answered(data, tmp_path / "a.json")], settings)
    assert (result["score"], result["hallucination_rate"]) == (8 / 3, 2 / 3)
    assert (result["by_type"]["attribute"], result["not_judged"]) == (6, 1)
    assert result["judge"]["unjudged"] == {"nonsense": 1}


def test_the_originals_prompt_is_taken_where_it_lies(data: Path, tmp_path: Path) -> None:
    (data / "mmhal" / "eval_gpt4.py").write_text("template = '''C {} Q {} A {} M {}'''\n")
    with endpoint(rate) as server:
        settings = JudgeSettings(server.url, "m")
        result = rescore(data, [answered(data, tmp_path / "a.json")], settings)
    assert "C Cat, Lynx Q What is 1? A Two cats. M second" in server.prompts
    assert result["judge"]["prompt"] == "official"


def test_files_that_do_not_fit_are_refused(data: Path, tmp_path: Path) -> None:
    settings = JudgeSettings("http://127.0.0.1:1/v1", "m")
    answers = answered(data, tmp_path / "a.json")
    with pytest.raises(RecipeError, match="scored by a judge"):
        rescore(data, [answers], None)
    write_json(tmp_path / "b.json", read_records(answers)[::-1])
    with pytest.raises(DataError, match="repeat another question"):
        rescore(data, [tmp_path / "b.json"], settings)
    template = data / "mmhal" / "response_template.json"
    write_json(template, [{"question": "What?"}])
    with pytest.raises(DataError, match="record 1 has no question_type, image_src"):
        mmhal.mmhal_questions(data)
    for nothing in ("", "[]"):
        template.write_text(nothing)
        with pytest.raises(DataError, match=r"response_template\.json is empty.*Shengcao1006/MMHal-Bench"):
            mmhal.mmhal_questions(data)
    template.unlink()
    with pytest.raises(DataError, match=r"response_template\.json does not exist.*Shengcao1006/MMHal-Bench"):
        mmhal.mmhal_questions(data)


def test_from_a_model_to_scores(base: Path, data: Path, tmp_path: Path) -> None:
    """Refused without a judge before anything is asked; a judge that is down loses no answer."""
    out = tmp_path / "out"
    how: dict[str, Any] = {"max_new_tokens": 4}
    with pytest.raises(RecipeError, match="scored by a judge"):
        evaluate_model(base, ["mmhal"], data, out, **how)
    assert not list(out.glob("*.jsonl"))
    with endpoint(lambda *_: Answer("Rating: 5")) as server:
        settings = JudgeSettings(server.url, "m")
        result = evaluate_model(base, ["mmhal"], data, out, judge=settings, **how)["mmhal"]
    assert (result["score"], result["hallucination_rate"], result["n"]) == (5, 0, 4)
    answers = read_records(out / "mmhal.jsonl")
    assert [record["question"] for record in answers] == [f"What is {number}?" for number in range(4)]
    assert answers[0].keys() == {"question_id", "image", "question", "model_answer"}
    rescored = rescore(None, [out], settings)  # from the cache: nobody is there
    assert rescored == result
