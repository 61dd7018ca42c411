"""RePOPE: its corrected labels, with the answers of a POPE run and with answers of its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from relook.errors import DataError, RecipeError
from relook.evaluate.benchmark import ScoringInputs, score_command
from relook.evaluate.tasks.pope import SPLITS, question_text, read_pope_questions
from relook.evaluate.tasks.repope import repope_questions
from relook.files import read_records, write_json, write_jsonl


def question(number: int, image: str, name: str, label: str) -> dict[str, object]:
    return {"question_id": number, "image": image, "text": question_text(name), "label": label}


ASKED = [
    question(1, "a.jpg", "dog", "yes"),
    question(2, "a.jpg", "cat", "no"),
    question(3, "b.jpg", "cup", "yes"),
    question(4, "b.jpg", "bed", "no"),
]
ANSWERS = ["Yes", "Yes", "No", "No"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Question 2 has the opposite label in RePOPE, and question 3 is left out."""
    for split in SPLITS:
        write_jsonl(tmp_path / "data" / f"pope/coco_pope_{split}.json", ASKED)
        corrected = [ASKED[0], {**ASKED[1], "label": "yes"}, ASKED[3]]
        write_jsonl(tmp_path / "data" / f"repope/coco_repope_{split}.json", corrected)
        answers = [{"question_id": q["question_id"], "answer": a} for q, a in zip(ASKED, ANSWERS, strict=True)]
        write_jsonl(tmp_path / "run" / f"pope_{split}.jsonl", answers)
    write_json(tmp_path / "run" / "eval.json", {"data": str(tmp_path / "data")})
    return tmp_path / "data"


def test_a_pope_runs_answers_are_scored_by_the_corrected_labels(data: Path, tmp_path: Path) -> None:
    pope = score_command("pope", [tmp_path / "run"], ScoringInputs(data))
    repope = score_command("repope", [tmp_path / "run"], ScoringInputs(data))
    for split in SPLITS:
        assert (pope[split]["tp"], pope[split]["fp"], pope[split]["fn"], pope[split]["tn"]) == (1, 1, 1, 1)
        found = repope[split]
        assert (found["tp"], found["fp"], found["fn"], found["tn"], found["left_out"]) == (2, 0, 0, 1, 1)
    assert repope["provenance"]["questions"] != pope["provenance"]["questions"]
    # LLaVA's question file numbers and words the questions otherwise: the image and the first line tell them.
    llava = [
        {"question_id": 10 * i + j, "image": q["image"], "text": f"{q['text']}\nAnswer in a word.", "category": split}
        for i, split in enumerate(SPLITS)
        for j, q in enumerate(ASKED)
    ]
    write_jsonl(data / "pope/llava_pope_test.jsonl", llava)
    for i, split in enumerate(SPLITS):
        answers = [{"question_id": 10 * i + j, "answer": answer} for j, answer in enumerate(ANSWERS)]
        write_jsonl(tmp_path / "run" / f"pope_{split}.jsonl", answers)
    assert score_command("repope", [tmp_path / "run"], ScoringInputs(data))["random"] == repope["random"]


def test_own_answers_and_single_files(data: Path, tmp_path: Path) -> None:
    kept = [{"question_id": i, "answer": "Yes"} for i in (1, 2, 4)]
    for split in SPLITS:
        write_jsonl(tmp_path / "run" / f"repope_{split}.jsonl", kept)
    found = score_command("repope", [tmp_path / "run"], ScoringInputs(data))["popular"]
    assert (found["tp"], found["fp"]) == (2, 1)
    assert "left_out" not in found
    questions = data / "repope/coco_repope_random.json"
    inputs = ScoringInputs(questions=questions)
    single = score_command("repope", [tmp_path / "run/pope_random.jsonl"], inputs)
    assert (single["tp"], single["tn"], single["left_out"]) == (2, 1, 1)
    without = tmp_path / "answers.jsonl"
    write_jsonl(without, [{"question": q["text"], "answer": "Yes"} for q in ASKED])
    with pytest.raises(DataError, match="no question_id"):
        score_command("repope", [without], inputs)
    with pytest.raises(RecipeError, match="no parser 'own'"):
        score_command("repope", [without], inputs, "own")
    questions.unlink()
    with pytest.raises(DataError, match=r"no coco_repope_random\.json"):
        repope_questions(data)


@pytest.mark.parametrize("split", SPLITS)
def test_the_published_files(split: str, refdata: Path) -> None:
    """Counts from the files themselves: questions that are left out, and labels that are corrected."""
    corrected = read_pope_questions(refdata / f"repope/coco_repope_{split}.json", "")
    questions = read_pope_questions(refdata / f"pope/questions/coco_pope_{split}.json", "")
    original = {(q.image.name, q.text): q.label for q in questions}
    changes = Counter((original[q.image.name, q.text], q.label) for q in corrected)
    removed, no_to_yes = {"random": (226, 5), "popular": (273, 39), "adversarial": (316, 33)}[split]
    assert len(original) - len(corrected) == removed
    assert changes["yes", "no"] == 139
    assert changes["no", "yes"] == no_to_yes
    assert len(read_records(refdata / f"repope/coco_repope_{split}.json")) == len(corrected)
