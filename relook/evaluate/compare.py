"""Two models on the same images, from their answer files: how much one is better, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relook.data.coco import read_coco
from relook.evaluate import pope
from relook.evaluate.chair import ChairScore, score, vocabulary_of
from relook.evaluate.pope import SPLITS
from relook.evaluate.score import annotation_file, pope_file
from relook.evaluate.statistics import mcnemar, paired_interval, right_alone
from relook.files import read_records

Counts = tuple[Sequence[float], Sequence[float]]


def compare(data: Path, first: Path, second: Path, chair: bool = True) -> dict[str, Any]:
    """Differences second - first of two `relook eval` folders over the same data.

    Args:
        chair: compare captions, too.

    Returns:
        For each POPE split the accuracy's difference with its paired 95 % interval over images and the exact McNemar
        p-value over questions; for CHAIR the differences of chair_i and recall with intervals.
    """
    return compare_pooled([(data, first, second)], chair)


def compare_pooled(runs: Sequence[tuple[Path, Path, Path]], chair: bool = True) -> dict[str, Any]:
    """As `compare`, over the images of several (data, first, second) taken together: for tables over seeds."""
    result: dict[str, Any] = {"pope": {}}
    for split in SPLITS:
        rows = [[_pope_rows(run[0], run[side], split) for run in runs] for side in (1, 2)]
        right = [[row.right for run in side for row in run] for side in rows]
        result["pope"][split] = {
            **_difference(*(_joined([_by_image(run) for run in side]) for side in rows)),
            "mcnemar_p": mcnemar(*right_alone(*right)),
        }
    if not chair:
        return result
    result["chair"] = {}
    scores = [[_chair_score(run[0], run[side]) for run in runs] for side in (1, 2)]
    for name, top, bottom in (("chair_i", "hallucinated", "mentioned"), ("recall", "found", "present")):
        counts = (_joined([(getattr(s, top), getattr(s, bottom)) for s in side]) for side in scores)
        result["chair"][name] = _difference(*counts)
    return result


def _joined(counts: Sequence[Counts]) -> Counts:
    return [n for top, _ in counts for n in top], [n for _, bottom in counts for n in bottom]


def captions(folder: Path) -> dict[str, str]:
    """The captions of a `relook eval chair` folder, by image."""
    return {str(record["image"]): str(record["caption"]) for record in read_records(folder / "chair.jsonl")}


def _difference(first: Counts, second: Counts) -> dict[str, Any]:
    ratios = [sum(top) / sum(bottom) if sum(bottom) else 0.0 for top, bottom in (first, second)]
    return {"difference": ratios[1] - ratios[0], "ci": paired_interval(first, second)}


def _pope_rows(data: Path, folder: Path, split: str) -> list[pope.PopeRow]:
    questions = pope.read_questions(pope_file(data, split), data / "val2014")
    return pope.match(questions, pope.read_answers(folder / f"pope_{split}.jsonl"))


def _by_image(rows: Sequence[pope.PopeRow]) -> Counts:
    counts: dict[str, list[float]] = {}
    for row in rows:
        image = counts.setdefault(row.question.image.name, [0.0, 0.0])
        image[0] += row.right
        image[1] += 1
    return [right for right, _ in counts.values()], [total for _, total in counts.values()]


def _chair_score(data: Path, folder: Path) -> ChairScore:
    annotations = read_coco(annotation_file(data))
    said = captions(folder)
    return score(said, {i: annotations.objects[i] for i in said}, vocabulary_of(annotations))
