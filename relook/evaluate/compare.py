"""Two models on the same images, from their answer files: how much one is better, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from relook.evaluate import pope
from relook.evaluate.chair import ChairScore, score, vocabulary_of
from relook.evaluate.pope import SPLITS, PopeRow
from relook.evaluate.score import data_truth, pope_questions, read_descriptions
from relook.evaluate.statistics import Ratio, columns, mcnemar, paired_interval, right_alone


def compare(data: Path, first: Path, second: Path, chair: bool = True) -> dict[str, Any]:
    """Differences second - first of two `relook eval` folders over the same data.

    Args:
        chair: compare captions, too.

    Returns:
        For each POPE split the accuracy's difference with its paired 95 % interval over images and the exact McNemar
        p-value over questions, and differences of the other rates with intervals; for CHAIR the differences of its
        rates with intervals, and McNemar's p-value over captions for chair_s.
    """
    return compare_pooled([(data, first, second)], chair)


def compare_pooled(runs: Sequence[tuple[Path, Path, Path]], chair: bool = True) -> dict[str, Any]:
    """As `compare`, over the images of several (data, first, second) taken together: for tables over seeds."""
    result: dict[str, Any] = {"pope": compare_pope([[pope_rows(run[0], run[side]) for run in runs] for side in (1, 2)])}
    if chair:
        result["chair"] = compare_chair([[_chair_score(run[0], run[side]) for run in runs] for side in (1, 2)])
    return result


def compare_pope(sides: Sequence[Sequence[dict[str, list[PopeRow]]]]) -> dict[str, Any]:
    """For each of two models: its rows by split, of one evaluation or several."""
    result = {}
    for split in SPLITS:
        rates = [[pope.ratios(run[split]) for run in side] for side in sides]
        right = [[row.right for run in side for row in run[split]] for side in sides]
        differences = {rate: _difference(*([run[rate] for run in side] for side in rates)) for rate in rates[0][0]}
        result[split] = {**differences.pop("accuracy"), "mcnemar_p": mcnemar(*right_alone(*right)), **differences}
    return result


def compare_chair(sides: Sequence[Sequence[ChairScore]]) -> dict[str, Any]:
    """For each of two models: its scores, of one evaluation or several."""
    rates = [[run.ratios() for run in side] for side in sides]
    result = {rate: _difference(*([run[rate] for run in side] for side in rates)) for rate in rates[0][0]}
    right = [[not count for run in side for count in run.hallucinated] for side in sides]
    result["chair_s"]["mcnemar_p"] = mcnemar(*right_alone(*right))
    return result


def captions(folder: Path) -> dict[str, str]:
    """The captions of a `relook eval chair` folder, by image."""
    return read_descriptions(folder / "chair.jsonl")


def pope_rows(data: Path, folder: Path) -> dict[str, list[PopeRow]]:
    """The answers of a `relook eval pope` folder by split."""
    return {
        split: pope.match(questions, pope.read_answers(folder / f"pope_{split}.jsonl"))
        for split, questions in pope_questions(data).items()
    }


def _difference(first: Sequence[Ratio], second: Sequence[Ratio]) -> dict[str, Any]:
    pooled = [columns([pair for run in side for pair in run]) for side in (first, second)]
    ratios = [sum(top) / sum(bottom) if sum(bottom) else 0.0 for top, bottom in pooled]
    return {"difference": ratios[1] - ratios[0], "ci": paired_interval(pooled[0], pooled[1])}


def _chair_score(data: Path, folder: Path) -> ChairScore:
    said = captions(folder)
    annotations = data_truth(data, list(said))
    return score(said, {i: annotations.objects[i] for i in said}, vocabulary_of(annotations))
