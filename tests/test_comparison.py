"""`relook report A B`: what it says of two evaluations, and that it is safe to open."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from relook.data.annotations import read_coco
from relook.errors import DataError, RecipeError
from relook.evaluate.tasks.pope import SPLITS, read_pope_questions
from relook.files import read_json, read_records, write_json, write_jsonl
from relook.report import comparison
from relook.report.comparison import write_comparison
from relook.report.pages import write_reports

EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)> No"


class Page(HTMLParser):
    """The tags of a page with their attributes, and the marked words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.marked: list[str] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags[-1][0] == "style":
            return
        self.text.append(data)
        if self.tags[-1][0] == "mark":
            self.marked.append(data)
            self.tags.append(("", {}))


def write_evaluation(out: Path, data: Path, answers: dict[tuple[str, str], str], captions: dict[str, str]) -> Path:
    """A folder as `relook eval` leaves it: right about everything but what is given."""
    write_json(out / "eval.json", {"data": str(data), "model": f"<b>{out.name}</b>", "max_new_tokens": 40})
    for split in SPLITS:
        questions = read_pope_questions(data / "pope" / f"coco_pope_{split}.json", Path())
        said = [answers.get((q.image.name, q.text), q.label.title()) for q in questions]
        records = [{"question_id": q.id, "answer": text} for q, text in zip(questions, said, strict=True)]
        write_jsonl(out / f"pope_{split}.jsonl", records)
    truth = read_coco(data / "annotations" / "instances_val2014.json").objects
    right = {image: ", ".join(sorted(names)) for image, names in truth.items()}
    write_jsonl(out / "chair.jsonl", [{"image": i, "caption": text} for i, text in {**right, **captions}.items()])
    for name in ("pope", "chair"):
        write_json(out / f"{name}.json", {})  # finished; the scores are computed from the answers
    return out


@pytest.fixture
def data(world: Path, tmp_path: Path) -> Path:
    shutil.copytree(world / "test", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def pair(data: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The first model is wrong about two questions on one picture, the second invents an object."""
    questions = read_pope_questions(data / "pope" / "coco_pope_random.json", Path())
    image = questions[0].image.name
    wrong = {(image, questions[0].text): EVIL, (image, questions[1].text): "Yes, perhaps"}
    absent = _absent(data, image)
    first = write_evaluation(tmp_path / "first", data, wrong, {})
    second = write_evaluation(tmp_path / "second", data, {}, {image: f"A {absent} <i>and</i> a {absent}."})
    return first, second


def _absent(data: Path, image: str) -> str:
    annotations = read_coco(data / "annotations" / "instances_val2014.json")
    return next(name for name in annotations.categories if name not in annotations.objects[image])


def test_two_models_side_by_side(pair: tuple[Path, Path], data: Path) -> None:
    page = write_comparison(*pair)
    assert page == pair[0].parent / "first-second" / "comparison.html"
    found = read_json(page.with_name("comparison.json"))
    questions = read_pope_questions(data / "pope" / "coco_pope_random.json", Path())
    image = questions[0].image.name
    rows = found["differing"]["pope"]
    assert [(row["question"], row["label"], row["answers"], row["right"]) for row in rows] == [
        (questions[0].text, "yes", [EVIL, "Yes"], [False, True]),
        (questions[1].text, "no", ["Yes, perhaps", "No"], [False, True]),
    ]
    assert rows[0]["splits"] == list(SPLITS)  # the questions to be answered with yes are in all three
    n = len(questions)
    assert found["paired"]["pope"]["random"]["difference"] == pytest.approx(2 / n)
    assert found["paired"]["pope"]["random"]["mcnemar_p"] == 0.5
    (row,) = found["differing"]["chair"]
    assert (row["image"], row["hallucinated"]) == (image, [[], [_absent(data, image)] * 2])
    assert found["scores"][1]["chair"]["chair_s"] == pytest.approx(1 / found["scores"][1]["chair"]["n"])
    assert found["scores"][0]["pope"]["random"]["tp"] == n // 2 - 1
    shown = Page(page.read_text())
    assert shown.marked == ["marked", *[_absent(data, image)] * 2]  # the first is in the explanation
    pictures = [attributes["src"] for tag, attributes in shown.tags if tag == "img"]
    assert len(pictures) == 2
    assert all(source and source.startswith("data:image/jpeg;base64,") for source in pictures)


def test_a_rate_of_nothing_is_a_dash(pair: tuple[Path, Path], data: Path) -> None:
    """A model that answers every question with no and describes nothing has no precision and no CHAIR_i."""
    first, second = pair
    for split in SPLITS:
        records = [{**record, "answer": "No"} for record in read_records(second / f"pope_{split}.jsonl")]
        write_jsonl(second / f"pope_{split}.jsonl", records)
    silent = [{**record, "caption": "It is calm."} for record in read_records(second / "chair.jsonl")]
    write_jsonl(second / "chair.jsonl", silent)
    page = write_comparison(first, second)
    results = read_json(page.with_name("comparison.json"))
    scores, paired = results["scores"][1], results["paired"]
    nothing = {"difference": None, "ci": None}
    assert (scores["pope"]["random"]["precision"], scores["pope"]["random"]["precision_ci"]) == (None, None)
    assert (scores["pope"]["random"]["recall"], scores["pope"]["random"]["f1"]) == (0, 0)
    assert (scores["chair"]["chair_i"], scores["chair"]["chair_i_ci"]) == (None, None)
    assert paired["pope"]["random"]["precision"] == paired["chair"]["chair_i"] == nothing
    text = page.read_text()
    row = text.split('aria-label="POPE, random"')[1].split('popovertarget="term-pope.precision"')[1].split("</tr>")[0]
    assert row.count("–") == 2  # the second model's, and the difference
    assert "undefined" in row
    assert "cannot be judged by invented objects against first" in text
    assert "There is none: the captions of one model or both name no object" in text


def test_settings_that_differ_beside_the_models_are_named(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = pair
    write_comparison(first, second)
    assert "Settings differ" not in capsys.readouterr().err  # the models' names and hashes do
    for folder, dtype in zip(pair, ("bfloat16", "float32"), strict=True):
        write_json(folder / "eval.json", {**read_json(folder / "eval.json"), "dtype": dtype, "model_hash": dtype})
    page = write_comparison(first, second)
    caution = "Settings differ: dtype of pope and chair is bfloat16 for first, float32 for second."
    assert caution in page.read_text()
    assert capsys.readouterr().err.strip() == caution
    for folder in pair:
        write_json(folder / "eval.json", {**read_json(folder / "eval.json"), "model_hash": "one"})
    write_comparison(first, second)
    assert "Both evaluations are of the same model." in capsys.readouterr().err
    with pytest.raises(RecipeError, match="Both evaluations are"):
        write_comparison(first, first)


def test_what_models_and_people_wrote_is_shown_as_text(pair: tuple[Path, Path]) -> None:
    shown = Page(write_comparison(*pair).read_text())
    assert EVIL in "".join(shown.text)
    assert "<b>first</b>" in "".join(shown.text)
    assert not {"script", "i", "iframe"} & {tag for tag, _ in shown.tags}
    assert not any(name.startswith("on") for _, attributes in shown.tags for name in attributes)


def test_a_page_is_bounded(
    pair: tuple[Path, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many differing rows the page shows some pictures, the results have all; a lost picture is said."""
    images = read_coco(data / "annotations" / "instances_val2014.json").images
    everything = {
        (q.image.name, q.text): "Yes" if q.label == "no" else "x" * 3000 + " no"
        for split in SPLITS
        for q in read_pope_questions(data / "pope" / f"coco_pope_{split}.json", Path())
    }
    other = write_evaluation(tmp_path / "other", data, everything, dict.fromkeys(images, "A dog and a dog." * 160))
    monkeypatch.setattr(comparison, "PICTURES", 2)
    lost = data / "val2014" / images[0]
    lost.unlink()
    page = write_comparison(pair[1], other, tmp_path / "page")
    shown = Page(page.read_text())
    assert sum(tag == "img" for tag, _ in shown.tags) + page.read_text().count("does not exist") == 4
    assert "The first 2 pictures are shown" in "".join(shown.text)
    assert len(read_json(tmp_path / "page/comparison.json")["differing"]["pope"]) == len(everything)
    assert max(map(len, shown.text)) < 2100


def test_what_cannot_be_compared(pair: tuple[Path, Path], data: Path, tmp_path: Path, world: Path) -> None:
    first, second = pair
    with pytest.raises(RecipeError, match="two at a time"):
        write_reports([first])
    with pytest.raises(RecipeError, match="two at a time"):
        write_reports([first, tmp_path])
    (second / "pope_random.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no answer"):
        write_comparison(first, second)
    for name in ("pope.json", "chair.json"):
        (second / name).unlink()
    with pytest.raises(RecipeError, match=r"no finished benchmark in common.*mmhal, objhal, repope in both"):
        write_comparison(first, second)
    assert not (tmp_path / "first-second").exists()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(RecipeError, match="holds something else"):
        write_comparison(first, second, tmp_path / "notes")


def test_one_benchmark_in_common_is_enough(pair: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    first, second = pair
    (second / "pope.json").unlink()
    moved = data.rename(tmp_path / "moved")
    (page,) = write_reports([first, second], tmp_path / "page", moved)
    found = json.loads((tmp_path / "page" / "comparison.json").read_text())
    assert found["paired"].keys() == {"chair"}
    assert "<h2>POPE" not in page.read_text()


def test_benchmarks_without_a_paired_test_stand_side_by_side(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for folder, score, f1 in zip(pair, (2.5, 3.25), (0.5, 0.75), strict=True):
        for name in ("pope", "chair"):
            (folder / f"{name}.json").unlink()
        about = {"provenance": {"image_list": "a"}}
        judge = {"model": f"judge of {folder.name}", "prompt_hash": "b", "replies": 4}
        rating = {
            "score": score,
            "score_ci": [1, 4],
            "by_type": {"other": 1.0},
            "judge": judge,
            "n": 4,
            "not_judged": 1,
        }
        write_json(folder / "mmhal.json", rating | about)
        described = {
            "shr": None,
            "shr_ci": None,
            "sentences": 9,
            "cannot_judge": 5,
            "judged": 5,
            "not_judged": 4,
            "n": 3,
        }
        write_json(folder / "shr.json", described | about)
        write_json(folder / "amber.json", {"discriminative": {"f1": f1, "f1_ci": [0.25, 1], "n": 2}, **about})
    page = write_comparison(*pair)
    assert read_json(page.with_name("comparison.json"))["paired"] == {}
    text = page.read_text()
    rows = [" ".join("".join(Page(row).text).split()) for row in text.split("<tr>")]
    for row in (
        "Rating score, 0 to 6, higher is better ↑ first 2.5 [1.0, 4.0] second 3.2 [1.0, 4.0]",
        "judged / not judged first3 / 1 second3 / 1",  # as earlier versions wrote it
        "judged / not judged first5 / 4, 5 of them “cannot judge” second5 / 4, 5 of them “cannot judge”",
        "Hallucinated sentences shr, percent, lower is better ↓ first– second–",
        "F1 of no discriminative, f1, percent, higher is better ↑ first 50.0 [25.0, 100.0] second 75.0 [25.0, 100.0]",
        "mmhal: judge model firstjudge of first secondjudge of second",
        "mmhal: image_list firsta seconda",
    ):
        assert any(shown.replace(" ", "").startswith(row.replace(" ", "")) for shown in rows), row
    assert "<b>judge of first</b>" in text
    assert "Percent" not in text  # a rating is none
