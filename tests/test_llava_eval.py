"""LLaVA's question files answered in its layout, and its answers as servers want them."""

from __future__ import annotations

import base64
import csv
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageFile
from typer.testing import CliRunner

from relook import load_model
from relook.cli import app
from relook.data.images import EncodedImage, open_image
from relook.errors import DataError, RecipeError
from relook.evaluate.llava_bench import (
    LETTER,
    LETTER_CN,
    SCORED_AS_IS,
    SUBMISSIONS,
    answer_question_file,
    read_llava_bench_questions,
    vqa_answer,
    write_submission,
)
from relook.files import read_json, read_records, write_json, write_jsonl
from relook.generate import answering
from relook.toyworld.build import shipped_base


@pytest.fixture(scope="module")
def pictures(world: Path) -> list[Path]:
    return sorted((world / "test" / "val2014").iterdir())


@pytest.fixture
def questions(pictures: list[Path], tmp_path: Path) -> Path:
    """Question lines: several on a picture, ids that are those of pictures, one twice, one without a picture."""
    a, b = (path.name for path in pictures[:2])
    lines = [
        {"question_id": "b", "image": b, "text": "Is there a cup in the image?", "category": "detail"},
        {"question_id": "a", "image": a, "text": "Describe this image in detail."},
        {"question_id": "b", "image": b, "text": "Is there a dog in the image?"},
        {"question_id": 7, "text": "Is there a cup in the image?"},
        {"question_id": "b", "image": b, "text": "Is there a cup in the image?"},
    ]
    write_jsonl(tmp_path / "questions.jsonl", lines)
    return tmp_path / "questions.jsonl"


def test_question_lines_are_answered_in_their_order(questions: Path, pictures: list[Path], tmp_path: Path) -> None:
    result = answer_question_file(shipped_base(), questions, pictures[0].parent, tmp_path / "out", max_new_tokens=6)
    question_records, answers = read_records(questions), read_records(tmp_path / "out" / "llava.jsonl")
    loaded = load_model(shipped_base())
    for question, answer in zip(question_records, answers, strict=True):
        images = [pictures[0].parent / question["image"]] if "image" in question else []
        assert answer["text"] == loaded.generate(images, question["text"], max_new_tokens=6)
        assert (answer["question_id"], answer["prompt"]) == (question["question_id"], question["text"])
        assert answer.keys() == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
        assert (answer["model_id"], answer["metadata"]) == (shipped_base().name, {})
    assert len({answer["answer_id"] for answer in answers}) == len(answers)
    assert result["n"] == 5
    assert result["provenance"]["template"] == "llava_hf"
    with pytest.raises(RecipeError, match="another max_new_tokens"):
        answer_question_file(shipped_base(), questions, pictures[0].parent, tmp_path / "out", max_new_tokens=7)


def test_a_run_that_was_cut_off_goes_on(
    questions: Path, pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: Any = {"max_new_tokens": 6, "batch_size": 1}
    answer_question_file(shipped_base(), questions, pictures[0].parent, tmp_path / "whole", **settings)
    submit, groups = answering.submit, []

    def interrupted(batch: Any, group: Any, *more: Any) -> int:
        groups.append(group)
        if len(groups) == 3:
            raise KeyboardInterrupt
        return submit(batch, group, *more)

    monkeypatch.setattr(answering, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer_question_file(shipped_base(), questions, pictures[0].parent, tmp_path / "out", **settings)
    remaining = 5 - len(read_records(tmp_path / "out" / "llava.jsonl"))
    assert 0 < remaining < 5
    answer_question_file(shipped_base(), questions, pictures[0].parent, tmp_path / "out", **settings)
    assert (tmp_path / "out" / "llava.jsonl").read_bytes() == (tmp_path / "whole" / "llava.jsonl").read_bytes()


def test_scienceqas_conversations(pictures: list[Path], tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nContext: x\nA. cup\nB. dog"}, {"from": "gpt", "value": "A."}]
    plain = [{"from": "human", "value": "Which?\nA. cup\nB. dog"}, {"from": "gpt", "value": "B."}]
    records = [{"id": "4", "image": pictures[0].name, "conversations": turns}, {"id": "5", "conversations": plain}]
    write_json(tmp_path / "llava_test_CQM-A.json", records)
    with_image, without = read_llava_bench_questions(tmp_path / "llava_test_CQM-A.json", pictures[0].parent)
    assert with_image.prompt == f"<image>\nContext: x\nA. cup\nB. dog\n{LETTER}"
    assert (with_image.text, with_image.images) == (f"Context: x\nA. cup\nB. dog\n{LETTER}", (pictures[0],))
    assert (without.prompt, without.images, without.id) == (f"Which?\nA. cup\nB. dog\n{LETTER}", (), "5")


COLUMNS = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"]


@pytest.fixture
def table(pictures: list[Path], tmp_path: Path) -> Path:
    a, b = (base64.b64encode(path.read_bytes()).decode() for path in pictures[:2])
    rows = [
        ["241", "What is it?", "A hint.\nTwo lines.", "cup", "dog", "", "", "A", "x", a, "s", "y"],
        ["1000241", "What is it?", "nan", "dog", "cup", "none", "boat", "B", "x", "241", "s", "y"],
        ["9", "这是什么？", "", "杯子", "Na", "船", "3", "C", "x", b, "s", "y"],
    ]
    with (tmp_path / "mmbench.tsv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows(
            [[*COLUMNS, "split"], *([*r, "dev"] for r in rows)]
        )
    return tmp_path / "mmbench.tsv"


def test_mmbenchs_table_is_asked_and_handed_in(table: Path, pictures: list[Path], tmp_path: Path) -> None:
    first, second, third = read_llava_bench_questions(table, None)
    assert first.prompt == "A hint.\nTwo lines.\nWhat is it?\nA. cup\nB. dog"
    assert (first.text, first.id) == (f"{first.prompt}\n{LETTER}", 241)
    assert second.prompt == "What is it?\nA. dog\nB. cup"  # LLaVA stops at the first option that says nothing
    assert third.text == f"这是什么？\nA. 杯子\nB. Na\nC. 船\nD. 3\n{LETTER_CN}"
    assert first.images == second.images == (EncodedImage(pictures[0].read_bytes(), "x"),)
    assert first.images[0].open() == open_image(pictures[0])
    answer_question_file(shipped_base(), table, None, tmp_path / "out", max_new_tokens=4)
    answers = read_records(tmp_path / "out" / "llava.jsonl")
    assert [answer["question_id"] for answer in answers] == [241, 1000241, 9]
    assert (answers[2]["options"], answers[2]["option_char"], answers[2]["round_id"]) == (
        ["杯子", "Na", "船", "3"],
        ["A", "B", "C", "D"],
        0,
    )
    answers[1]["text"] = "=1+1\x07"
    write_jsonl(tmp_path / "answers.jsonl", answers)
    openpyxl = pytest.importorskip("openpyxl")
    write_submission("mmbench", tmp_path / "answers.jsonl", tmp_path / "up.xlsx", table)
    sheet = openpyxl.load_workbook(tmp_path / "up.xlsx").active
    answer = [record["text"] for record in answers]
    assert list(sheet.values) == [
        ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split"),
        (241, "What is it?", "cup", "dog", None, None, answer[0], "A", "dev"),
        (1000241, "What is it?", "dog", "cup", None, "boat", "=1+1", "B", "dev"),
        (9, "这是什么？", "杯子", "Na", "船", "3", answer[2], "C", "dev"),
    ]
    write_submission("mmbench-cn", tmp_path / "answers.jsonl", tmp_path / "up.tsv", table)
    assert (tmp_path / "up.tsv").read_text().splitlines()[0].split("\t") == [cell.value for cell in sheet[1]]


@pytest.mark.parametrize(
    ("name", "questions", "expected"),
    [
        (
            "vqav2",
            [{"question_id": 1}, {"question_id": 4}, {"question_id": 2}, {"question_id": 3}],
            [
                {"question_id": 1, "answer": "2 dogs"},
                {"question_id": 4, "answer": ""},
                {"question_id": 2, "answer": "don't know"},
                {"question_id": 3, "answer": "yes"},
            ],
        ),
        (
            "vizwiz",
            [{"question_id": i, "image": f"{i}.jpg", "text": "?"} for i in (2, 1, 3)],
            [
                {"image": "2.jpg", "answer": "don't know"},
                {"image": "1.jpg", "answer": "2 dogs"},
                {"image": "3.jpg", "answer": "yes"},
            ],
        ),
        (
            "gqa",
            None,
            [
                {"questionId": 1, "prediction": "two dogs"},
                {"questionId": 2, "prediction": "dont know"},
                {"questionId": 3, "prediction": "yes"},
            ],
        ),
        ("mm-vet", None, {"v1_1": "Two dogs.", "v1_2": "Dont know", "v1_3": "Yes."}),
        (
            "seed",
            {"questions": [{"question_id": id} for id in ("3", "1", "2")]},
            [
                {"question_id": "3", "prediction": "Yes."},
                {"question_id": "1", "prediction": "Two dogs."},
                {"question_id": "2", "prediction": "Dont know"},
            ],
        ),
    ],
)
def test_submissions(name: str, questions: Any, expected: Any, tmp_path: Path) -> None:
    answers = [{"question_id": i, "text": text} for i, text in enumerate(["Two dogs.", "Dont know", "Yes."], 1)]
    write_jsonl(tmp_path / "answers.jsonl", answers)
    file = None
    if questions is not None:
        file = tmp_path / "questions"
        (write_json if isinstance(questions, dict) else write_jsonl)(file, questions)
    write_submission(name, tmp_path / "answers.jsonl", tmp_path / "out", file)
    read = read_records if name == "seed" else read_json
    assert read(tmp_path / "out") == expected


def test_mme_gets_a_file_for_each_category(tmp_path: Path) -> None:
    truth = tmp_path / "MME" / "OCR"
    pages = tmp_path / "MME" / "posters" / "questions_answers_YN"
    truth.mkdir(parents=True)
    pages.mkdir(parents=True)
    (truth / "1.txt").write_text("Is it red?  Please answer yes or no.\tYes\nIs it? Please answer yes or no.\tNo\n")
    (pages / "tt1.txt").write_text("Is it a film? Please answer yes or no.\tYes\n")
    short = "\nAnswer the question using a single word or phrase."
    answers = [
        {"question_id": "OCR/1.jpg", "prompt": f"Is it red?{short}", "text": "Yes"},
        {"question_id": "OCR/1.jpg", "prompt": f"Is it? Please answer yes or no.{short}", "text": "No.\nIt is not."},
        {"question_id": "posters/images/tt1.jpg", "prompt": f"Is it a film?{short}", "text": "yes"},
    ]
    write_jsonl(tmp_path / "answers.jsonl", answers)
    write_submission("mme", tmp_path / "answers.jsonl", tmp_path / "out", tmp_path / "MME")
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {
        "OCR.txt": "1.txt\tIs it red?  Please answer yes or no.\tYes\tYes\n"
        "1.txt\tIs it? Please answer yes or no.\tNo\tNo. It is not.\n",
        "posters.txt": "tt1.txt\tIs it a film? Please answer yes or no.\tYes\tyes\n",
    }
    write_jsonl(tmp_path / "answers.jsonl", answers[1:])
    with pytest.raises(DataError, match=r"1 questions have no answer \(OCR 1.txt Is it red\?"):
        write_submission("mme", tmp_path / "answers.jsonl", tmp_path / "more", tmp_path / "MME")
    write_jsonl(tmp_path / "answers.jsonl", [answers[0] | {"prompt": "Is it blue?"}])
    with pytest.raises(DataError, match=r"MME does not ask 'Is it blue\? Please"):
        write_submission("mme", tmp_path / "answers.jsonl", tmp_path / "more", tmp_path / "MME")


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    good, out = {"question_id": 1, "text": "yes"}, tmp_path / "out"
    answers, asked = tmp_path / "answers.jsonl", tmp_path / "questions.jsonl"
    write_jsonl(asked, [{"question_id": 1, "image": "a"}, {"question_id": 2, "image": "b"}])

    def refused(name: str, records: list[Any], message: str, questions: Path | None = asked) -> None:
        write_jsonl(answers, records)
        with pytest.raises((DataError, RecipeError), match=message):
            write_submission(name, answers, out, questions)
        assert not out.exists()

    refused("vizwiz", [good], r"1 questions have no answer \(2\)")
    refused("vqav2", [good, {"question_id": 8, "text": "no"}], r"1 answers have no question \(8\)")
    refused("vqav2", [good, good], "answers to 1 stand more than once")
    refused("vqav2", [{"question_id": 1}], "answer 1 has not both question_id and text")
    refused("vqav2", [good], "vqav2 needs --questions", None)
    refused("gqa", [good], "gqa reads no --questions")
    refused("gqa", [], "is empty", None)
    refused("vqa", [good], "no submission 'vqa'")
    for name in SCORED_AS_IS:
        refused(name, [good], "as they are")
    write_jsonl(asked, [{"id": 1}])
    refused("vizwiz", [good], "question 1 has no question_id, image")
    refused("seed", [good], "has no questions with question_id")
    refused("mmbench", [good], "no column")
    assert SUBMISSIONS.keys().isdisjoint(SCORED_AS_IS)


def test_question_files_that_cannot_be_used(tmp_path: Path, pictures: list[Path]) -> None:
    file = tmp_path / "questions.jsonl"

    def refused(text: str, message: str, images: Path | None = None) -> None:
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            read_llava_bench_questions(file, images)

    refused("", "holds no question")
    refused('{"question_id": 1, "text": "?"}\n{"question": 1}', "question 2 is in none of LLaVA's layouts")
    refused('{"id": 1, "conversations": []}', "question 1 is in none of LLaVA's layouts")
    refused('{"question_id": 1, "image": "a", "text": "?"}', "Give their folder as --data")
    refused('{"question_id": 1, "image": "a", "text": "?"}', "1 images do not exist", pictures[0].parent)
    head = "index\tquestion\timage\tA\tB\n"
    refused(head, "has no rows")
    refused(f"{head}1\t2\n", "row 2 has another number of columns")
    refused(f"{head}1\t2\t@\t4\t5\n", "image of question 1 is not base64")
    file.write_text(f"{head}1\t2\tAAAA\t4\t5\n")
    with pytest.raises(DataError, match="of question 1 is not an image file"):
        read_llava_bench_questions(file, None)[0].images[0].open()  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def reference() -> Any:
    """lmms-eval's copy of the original; importing it has effects of its own, which are undone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
        return pytest.importorskip("lmms_eval.tasks._task_utils.vqa_eval_metric").EvalAIAnswerProcessor()


WORDS = ["a", "the", "one", "None", "dont", "couldntve", "somebody'd", "she's", "3.5", "1,000", "a.b", " - ", ";", "?"]


@given(words=st.lists(st.sampled_from(WORDS) | st.text("ab '.,?!;-/3\n\t()\"[]_İ", max_size=5), max_size=8))
def test_vqas_answers_are_those_of_lmms_eval(words: list[str], reference: Any) -> None:
    for text in ("".join(words), " ".join(words), "." * 40 + "x"):
        assert vqa_answer(text) == reference(text)


def test_the_commands(questions: Path, pictures: list[Path], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "answers.jsonl", [{"question_id": 1, "text": "é"}])
    out = tmp_path / "deep" / "out.json"
    options = ["--answers", str(tmp_path / "answers.jsonl"), "--out", str(out)]
    submission = CliRunner().invoke(app, ["submission", "mm-vet", *options])
    assert json.loads(submission.stdout) == {"submission": str(out), "answers": 1}
    model = ["--model", str(shipped_base()), "--out", str(tmp_path / "out"), "--max-new-tokens", "4"]
    where = ["--questions", str(questions), "--data", str(pictures[0].parent)]
    evaluation = CliRunner().invoke(app, ["eval", "llava", *model, *where])
    assert json.loads(evaluation.stdout)["n"] == 5
    for arguments, message in (
        (["eval", "llava"], "--questions is missing"),
        (["eval", "lmms"], "--tasks is missing"),
        (["eval", "pope"], "--data is missing"),
        (["eval", "lmms", "--tasks", "mme", *where], "--questions, --data would do nothing for these benchmarks"),
        (["eval", "pope", "--limit", "3", *where], "--limit, --questions would do nothing for these benchmarks"),
        (["eval", "llava", "pope", "--data", str(tmp_path)], "Give one of them alone"),
    ):
        refused = CliRunner().invoke(app, [*arguments, *model])
        assert isinstance(refused.exception, RecipeError)
        assert message in str(refused.exception)
