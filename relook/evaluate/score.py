"""Scores from files alone: no model, and none of its libraries. `relook score`, `eval` and the comparisons use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relook.data.coco import Annotations
from relook.data.samples import Question
from relook.evaluate import chair, pope
from relook.evaluate.statistics import ratio_interval
from relook.files import file_hash, text_hash


def pope_file(data: Path, split: str) -> Path:
    return data / "pope" / f"coco_pope_{split}.json"


def annotation_file(data: Path) -> Path:
    return data / "annotations" / "instances_val2014.json"


def score_pope(questions: Sequence[Question], answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Confusion counts and rates, with 95 % intervals over images."""
    result = pope.score(questions, answers).to_json()
    right: dict[str, list[int]] = {}
    for row in pope.match(questions, answers):
        counts = right.setdefault(row.question.image.name, [0, 0])
        counts[0] += row.prediction == row.label
        counts[1] += 1
    result["accuracy_ci"] = ratio_interval([r for r, _ in right.values()], [n for _, n in right.values()])
    return result


def score_chair(captions: Mapping[str, str], annotations: Annotations) -> dict[str, Any]:
    """CHAIR with 95 % intervals over images; the image list is identified by its hash."""
    truth = {image: annotations.objects[image] for image in captions}
    scored = chair.score(captions, truth, chair.vocabulary_of(annotations))
    result = scored.to_json()
    result["chair_i_ci"] = ratio_interval(scored.hallucinated, scored.mentioned)
    result["chair_s_ci"] = ratio_interval([int(h > 0) for h in scored.hallucinated], [1] * scored.n)
    result["recall_ci"] = ratio_interval(scored.found, scored.present)
    result["image_list"] = text_hash(*captions)
    return result


def score_pope_file(questions: Path, answers: Path) -> dict[str, Any]:
    """Score POPE's answer file made by any program.

    Raises:
        DataError: questions and answers do not match; the ids are named.
    """
    asked = pope.read_questions(questions, Path())
    result = pope.score(asked, pope.read_answers(answers)).to_json()
    return {**result, "questions_sha256": file_hash(questions), "answers_sha256": file_hash(answers)}
