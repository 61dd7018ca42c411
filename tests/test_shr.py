"""SHR: the original's arithmetic, its files, and both judges."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.endpoint import Answer, Request, endpoint
from helpers.strategies import ANY_TEXT
from hypothesis import given
from hypothesis import strategies as st

from relook.data.annotations import read_image_paths
from relook.errors import DataError, RecipeError, RelookError
from relook.evaluate.benchmark import ScoringInputs, score_command
from relook.evaluate.judge import Judge, JudgeSettings
from relook.evaluate.run import evaluate_model
from relook.evaluate.tasks import shr
from relook.files import read_json, read_json_object, read_records, write_json, write_jsonl
from relook.toyworld.build import shipped_base


def test_sentences_are_those_of_the_original() -> None:
    """Cut at full stops, also in numbers; what an earlier sentence says whole is dropped, the other way round not."""
    text = "A dog runs. A dog. A dog runs. \n It costs 3.50 dollars.  . A dog runs fast. dollars"
    assert shr.sentences_of(text) == ("A dog runs", "It costs 3", "50 dollars", "A dog runs fast")
    assert shr.sentences_of(" . .. ") == ()


def test_distinctness_is_that_of_the_original() -> None:
    """Punctuation goes, and so do line breaks, without a space in their place."""
    assert shr.distinct("a b, a: b. a?", 1) == 2 / 5
    assert shr.distinct("a b, a: b. a?", 2) == 2 / 4
    assert shr.distinct("a\nb a", 1) == 1.0
    assert shr.distinct("a b", 3) is None


@pytest.mark.parametrize(
    ("reply", "labels"),
    [
        ("Judgement:\n1. hallucination: no.\n2. correct: yes.", ("hallucination", "correct")),
        ("Well.\njudgement:\n\n1. Cannot judge: style\nmore of it\n2) **Correct**: yes", ("cannot judge", "correct")),
        ("1. correct: a\n2. correct: b", None),
        ("Judgement:\n1. correct: a", None),
        ("Judgement:\n1. correct: a\n2. correct: b\n3. correct: c", None),
        ("Judgement:\n2. correct: a\n1. correct: b", None),
        ("Judgement:\n1. correct: a\n2. wrong: b", None),
        ("Judgement:\n1. correctly: a\n2. correct: b", None),
        ("", None),
    ],
)
def test_labels_are_read_strictly(reply: str, labels: Any) -> None:
    assert shr.read_labels(reply, 2) == labels


@given(ANY_TEXT, st.integers(0, 3))
def test_any_reply_is_labels_or_nothing(reply: str, count: int) -> None:
    for text in (reply, f"Judgement:\n{reply}"):
        labels = shr.read_labels(text, count)
        assert labels is None or len(labels) == count


# --- a small Visual Genome


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    ids = (11, 12, 13)
    sizes = {"width": 200, "height": 100}
    write_json(root / "vg" / "image_data.json", [{"image_id": i, "url": f"h/VG_100K/{i}.jpg", **sizes} for i in ids])
    region = {"x": 20, "y": 0, "width": 150, "height": 33, "phrase": "a red dog"}
    empty = {**region, "phrase": ""}
    write_json(root / "vg" / "region_descriptions.json", [{"id": i, "regions": [region, empty]} for i in ids])
    write_json(root / "shr" / "val_images_final.json", [{"image_id": i} for i in ids])
    write_jsonl(root / "shr" / "shr_factual_part1.jsonl", [{"11": ["The dog is red.", "It runs."]}])
    write_jsonl(root / "shr" / "shr_factual_part2.jsonl", [{"12": ["It is night."]}])
    return root


SAID = {"11": "A red dog. It flies high. It is calm.", "12": "It is day. Stars.", "13": ""}


def judged(data: Path, answer: Any) -> tuple[dict[str, Any], list[str]]:
    with endpoint(answer) as server:
        judge = Judge(JudgeSettings(server.url, "m", tries=2), data / "judge.jsonl")
        return shr.score_shr(data, SAID, judge), server.prompts


def labels(request: Request, _: int) -> Answer:
    lines = ["hallucination: a", "correct: b", "cannot judge: c"]
    if "It flies high" in request["messages"][0]["content"]:
        return Answer("Judgement:\n1. correct: it is\n2. hallucination: no\n3. cannot judge: mood")
    return Answer("Judgement:\n1. " + lines[0] + "\n2. " + lines[0])


def test_scores_by_hand(data: Path) -> None:
    result, _ = judged(data, labels)
    assert result["shr"] == 3 / 5  # "cannot judge" counts as judged, as in the original
    assert result["hal_words_ratio"] == (3 + 3 + 1) / (3 + 3 + 3 + 3 + 1)
    assert result["hal_sents_per_image"] == 3 / 3
    assert result["hal_words_per_image"] == 7 / 3
    assert (result["sents_per_image"], result["words_per_image"]) == (5 / 3, 13 / 3)
    # "It" twice among nine words; a text of no words counts in no mean
    assert result["distinct_1"] == pytest.approx((8 / 9 + 4 / 4) / 2)
    assert (result["distinct_3"], result["distinct_4"]) == (1, 1)
    counts = {"sentences": 5, "cannot_judge": 1, "judged": 5, "not_judged": 0, "n": 3}
    assert {key: result[key] for key in counts} == counts
    low, high = result["shr_ci"]
    assert low == pytest.approx(1 / 3)  # the image without sentences alone has no ratio, and adds nothing to others
    assert high == pytest.approx(1)
    assert result["judge"]["prompt"] == "relook"


def test_sentences_without_a_label_are_counted_and_left_out(data: Path) -> None:
    def half(request: Request, number: int) -> Answer:
        return (
            labels(request, number)
            if "flies" in request["messages"][0]["content"]
            else Answer("Judgement:\n1. correct")
        )

    result, prompts = judged(data, half)
    assert (result["shr"], result["sentences"], result["not_judged"]) == (1 / 3, 5, 2)
    assert result["hal_sents_per_image"] == 1 / 2
    assert result["judge"]["unjudged"] == {"nonsense": 1}
    assert len(prompts) == 3


def test_a_judge_that_judges_nothing_is_no_result(data: Path) -> None:
    with pytest.raises(RelookError, match=r"judged none of 2 prompts \(2 nonsense\).*begins: 'I am sorry") as caught:
        judged(data, lambda *_: Answer("I am sorry, I cannot help."))
    assert "the same command asks again" in caught.value.fix
    result, _ = judged(data, labels)
    assert (result["shr"], result["judged"]) == (3 / 5, 5)


def test_a_judge_that_cannot_judge_any_sentence_gives_no_rate(data: Path) -> None:
    def open_about_all(request: Request, _: int) -> Answer:
        count = 3 if "It flies high" in request["messages"][0]["content"] else 2
        return Answer("Judgement:\n" + "".join(f"{n}. cannot judge: no\n" for n in range(1, count + 1)))

    result, _ = judged(data, open_about_all)
    rates = ("shr", "shr_ci", "hal_words_ratio", "hal_words_ratio_ci", "hal_sents_per_image", "hal_words_per_image")
    assert [result[rate] for rate in rates] == [None] * len(rates)
    assert (result["judged"], result["cannot_judge"], result["not_judged"]) == (5, 5, 0)


def test_what_the_judge_is_told(data: Path) -> None:
    _, prompts = judged(data, labels)
    about = next(prompt for prompt in prompts if "flies" in prompt)
    assert "Regions:\n[0.1, 0.0, 0.85, 0.33]: a red dog\n\nFacts:\nThe dog is red.\nIt runs.\n\nSentences:\n" in about
    assert "1. A red dog\n2. It flies high\n3. It is calm\n" in about
    assert len(prompts) == 2  # nothing was said of the third image


def test_the_originals_prompt_is_taken_where_it_lies(data: Path) -> None:
    (data / "shr" / "gpt_utils.py").write_text("import openai\nGPT_JUDGE_PROMPT = '''R {} F {} C {}'''\n")
    result, prompts = judged(data, labels)
    assert "R [0.1, 0.0, 0.85, 0.33]: a red dog\n F It is night.\n C 1. It is day\n2. Stars\n" in prompts
    assert result["judge"]["prompt"] == "official"


@pytest.mark.parametrize("name", ["val_images_final.json", "shr_factual_part2.jsonl"])
def test_a_missing_file_is_named_with_its_source(name: str, data: Path) -> None:
    (data / "shr" / name).unlink()
    with pytest.raises(DataError, match=rf"{name} does not exist.*juliozhao/SHR"):
        shr.shr_questions(data)


def test_odd_image_lists_are_refused(data: Path) -> None:
    for ids, message in (([11, 12, 11], "twice: 11"), ([11, 99], "has not: 99")):
        write_json(data / "shr" / "val_images_final.json", [{"image_id": i} for i in ids])
        with pytest.raises(DataError, match=message):
            shr.shr_questions(data)
    (data / "shr" / "val_images_final.json").write_text("[]")
    with pytest.raises(DataError, match=r"val_images_final.json is empty.*juliozhao/SHR"):
        shr.shr_questions(data)


def rescore(data: Path | None, answers: list[Path], judge: JudgeSettings | None) -> dict[str, Any]:
    return score_command("shr", answers, ScoringInputs(data), "official", judge)


def test_existing_answers_in_both_layouts(data: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "hadpo.json", SAID)
    write_jsonl(tmp_path / "relook.jsonl", [{"image_id": i, "description": text} for i, text in SAID.items()])
    with endpoint(labels) as server:
        settings = JudgeSettings(server.url, "m")
        results = [rescore(data, [tmp_path / n], settings) for n in ("hadpo.json", "relook.jsonl")]
        assert len(server.requests) == 2  # the second time the verdicts are there
    assert results[0]["shr"] == results[1]["shr"] == 3 / 5
    assert (tmp_path / "judge.jsonl").exists()
    with pytest.raises(RecipeError, match="scored by a judge"):
        rescore(data, [tmp_path / "hadpo.json"], None)
    for said, message in (({}, "no answers"), ({"11": "a"}, r"2 are missing \(12, 13\)"), ({**SAID, "9": "a"}, "9")):
        write_json(tmp_path / "odd.json", said)
        with pytest.raises(DataError, match=message):
            rescore(data, [tmp_path / "odd.json"], settings)


# --- toyworld


def test_the_exact_judge(data: Path) -> None:
    path = data / "shr" / "exact.json"
    write_json(path, {"names": {"dog": ["puppy"], "cup": []}, "images": {"1": ["dog"]}})
    described = shr.DescribedImage("1", ("A puppy sits", "Two cups and a dog", "It is calm", "No cup"))
    expected = ("correct", "hallucination", "cannot judge", "hallucination")
    assert shr.ExactJudge(path).label([described]).verdicts == [expected]
    with pytest.raises(DataError, match="no 2"):
        shr.ExactJudge(path).label([shr.DescribedImage("2", ("A dog",))])
    write_json(path, {"names": []})
    with pytest.raises(DataError, match="not in the layout"):
        shr.ExactJudge(path)


def test_toyworld_from_pictures_to_scores(world: Path, tmp_path: Path) -> None:
    """Answers, exact verdicts, a second run, a rescoring, and the same sentences before a language model."""
    data, out = world / "test", tmp_path / "out"
    how: dict[str, Any] = {"max_new_tokens": 20}
    result = evaluate_model(shipped_base(), ["shr"], data, out, **how)["shr"]
    exact = read_json_object(data / "shr" / "exact.json")
    answers = read_records(out / "shr.jsonl")
    assert [record["image_id"] for record in answers] == list(exact["images"])
    paths = read_image_paths(data / "vg")
    assert all(paths[image].is_file() for image in exact["images"])
    labelled = [
        shr.ExactJudge(data / "shr" / "exact.json").label([shr.DescribedImage(r["image_id"], s)]).verdicts[0]
        for r in answers
        if (s := shr.sentences_of(r["description"]))
    ]
    false = sum(label == "hallucination" for one in labelled for label in one or ())
    assert false > 0
    assert result["shr"] == pytest.approx(false / sum(len(one or ()) for one in labelled))
    assert result["not_judged"] == 0
    assert result["judge"]["model"] == "exact annotations"
    again = rescore(None, [out], None)
    assert again == result

    with endpoint(lambda request, _: Answer("Judgement:\nno idea")) as server:
        settings = JudgeSettings(server.url, "m", tries=1)
        with pytest.raises(RelookError, match="judged none"):
            evaluate_model(shipped_base(), ["shr"], data, out, judge=settings, **how)
    assert read_json(out / "shr.json") == result

    mended, odd = False, ""

    def most(request: Request, number: int) -> Answer:
        nonlocal odd
        prompt = request["messages"][0]["content"]
        if "Sentences:" not in prompt:
            return Answer("yes")
        odd = odd or prompt
        listed = prompt[prompt.rindex("Sentences:\n") :].split("\nAnswer in this form")[0].split("\n")[1:]
        labels = "".join(f"{line.split('.')[0]}. hallucination: no\n" for line in listed if line)
        return Answer("no idea" if prompt == odd and not mended else f"Judgement:\n{labels}")

    with endpoint(most) as server:
        settings = JudgeSettings(server.url, "m", tries=1, workers=1)
        part = evaluate_model(shipped_base(), ["shr"], data, out, judge=settings, **how)["shr"]
        assert part["judged"] + part["not_judged"] == part["sentences"] == result["sentences"]
        assert part["not_judged"] > 0
        before, mended = len(server.requests), True
        assert evaluate_model(shipped_base(), ["shr"], data, out, **how)["shr"] == part  # without a judge it stays
        whole = evaluate_model(shipped_base(), ["shr"], data, out, judge=settings, **how)["shr"]
        assert server.prompts[before:] == [odd]  # what was not judged, and nothing else
    assert (whole["judged"], whole["not_judged"], whole["shr"]) == (result["sentences"], 0, 1)
    assert read_json(out / "shr.json") == whole


def test_another_score_says_how_it_replaces_what_is_stored(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = world / "test", tmp_path / "out"
    result = evaluate_model(shipped_base(), ["shr"], data, out, max_new_tokens=20)["shr"]
    assert rescore(None, [out], None) == result
    assert "holds another score" not in capsys.readouterr().err
    write_json(out / "shr.json", {**result, "shr": 0.0})
    assert rescore(None, [out], None) == result
    assert f"{out / 'shr.json'} holds another score; --json" in " ".join(capsys.readouterr().err.split())
    assert evaluate_model(shipped_base(), ["shr"], data, out, max_new_tokens=20)["shr"] == result
    assert read_json(out / "shr.json") == result


def test_a_missing_image_is_named_before_anything_is_asked(world: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(world / "test", data)
    gone = sorted((data / "vg").rglob("*.jpg"))[:2]
    for path in gone:
        path.unlink()
    with pytest.raises(DataError, match=r"The image .*\.jpg does not exist, nor do 1 others"):
        evaluate_model(shipped_base(), ["shr"], data, tmp_path / "out", max_new_tokens=20)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["eval.json"]
