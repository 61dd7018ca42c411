"""Comparison of two models on the same images, from their answer files: differences, significance, and where they
disagree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from relook.errors import DataError, preview
from relook.evaluate.score import COMPARED, chair_counts, data_truth, pope_questions, read_captions_by_image
from relook.evaluate.statistics import Ratio, discordant_counts, mcnemar, paired_interval, safe_ratio, to_columns
from relook.evaluate.tasks import pope
from relook.evaluate.tasks.chair import ChairScore, mentions, vocabulary_of
from relook.evaluate.tasks.pope import SPLITS, PopeRow, official_parse

# ----------------------------------------------------------------------------------------------------


def compare(
    data: str | Path, first: str | Path, second: str | Path, benchmarks: Sequence[str] = COMPARED
) -> dict[str, Any]:
    """Compute the differences second - first of two `relook eval` folders over the same data.

    Returns:
        For each POPE split, the difference in accuracy with its paired 95 % interval over images and the exact McNemar
        p-value over questions, and the other rates' differences with intervals. For CHAIR, its rates' differences with
        intervals, and for chair_s the p-value over captions.

    Raises:
        DataError: the two did not answer the same questions or describe the same images.
    """
    data, first, second = Path(data), Path(first), Path(second)
    return compare_pooled([(data, first, second)], benchmarks)


def compare_pooled(runs: Sequence[tuple[Path, Path, Path]], benchmarks: Sequence[str] = COMPARED) -> dict[str, Any]:
    """Compare like `compare`, pooling the images of several (data, first, second) runs: for tables over seeds."""
    result: dict[str, Any] = {}
    if "pope" in benchmarks:
        rows = [[_pope_rows(run[0], run[side]) for run in runs] for side in (1, 2)]
        result["pope"] = {split: _compare_pope([[run[split] for run in side] for side in rows]) for split in SPLITS}
    if "chair" in benchmarks:
        scores = [_chair_scores(*run) for run in runs]
        result["chair"] = _compare_chair([[run[side] for run in scores] for side in (0, 1)])
    return result


def _compare_pope(sides: Sequence[Sequence[list[PopeRow]]]) -> dict[str, Any]:
    rates = [[pope.ratios(rows) for rows in side] for side in sides]
    right = [[row.right for rows in side for row in rows] for side in sides]
    found = {rate: _difference(*([run[rate] for run in side] for side in rates)) for rate in rates[0][0]}
    return {**found.pop("accuracy"), "mcnemar_p": mcnemar(*discordant_counts(*right)), **found}


def _compare_chair(sides: Sequence[Sequence[ChairScore]]) -> dict[str, Any]:
    rates = [[run.ratios() for run in side] for side in sides]
    found = {rate: _difference(*([run[rate] for run in side] for side in rates)) for rate in rates[0][0]}
    right = [[count == 0 for run in side for count in run.hallucinated] for side in sides]
    found["chair_s"]["mcnemar_p"] = mcnemar(*discordant_counts(*right))
    return found


def _difference(first: Sequence[Ratio], second: Sequence[Ratio]) -> dict[str, Any]:
    """Compute a rate's difference and its interval; None if either rate has a zero denominator."""
    pooled = [to_columns([pair for run in side for pair in run]) for side in (first, second)]
    one, other = (safe_ratio(sum(top), sum(bottom)) for top, bottom in pooled)
    difference = None if one is None or other is None else other - one
    return {"difference": difference, "ci": paired_interval(pooled[0], pooled[1])}


def differing_answers(data: str | Path, first: str | Path, second: str | Path) -> list[dict[str, Any]]:
    """Return the questions on which the two predictions differ, each once, with the splits it is in."""
    data, first, second = Path(data), Path(first), Path(second)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    sides = [_pope_rows(data, folder) for folder in (first, second)]
    for split in SPLITS:
        for one, other in zip(sides[0][split], sides[1][split], strict=True):
            if one.prediction == other.prediction:
                continue
            row: dict[str, Any] = {
                "image": one.image,
                "question": one.question.text,
                "label": one.question.label,
                "answers": [one.answer, other.answer],
                "right": [one.right, other.right],
                "splits": [],
            }
            found.setdefault((one.image, one.question.text), row)["splits"].append(split)
    return list(found.values())


def differing_captions(data: str | Path, first: str | Path, second: str | Path) -> list[dict[str, Any]]:
    """Return the images whose hallucinated mentions differ between the models; the most different come first.

    Mentions are compared with their counts.
    """
    data, first, second = Path(data), Path(first), Path(second)
    said = _same_images(first, second)
    truth = data_truth(data, list(said[0]))
    vocabulary, found = vocabulary_of(truth), []
    for image in said[0]:
        texts = [side[image] for side in said]
        named = [[mention.object for mention in mentions(text, vocabulary)] for text in texts]
        absent = [[name for name in side if name not in truth.objects[image]] for side in named]
        if Counter(absent[0]) != Counter(absent[1]):
            row = {"image": image, "objects": sorted(truth.objects[image])}
            found.append({**row, "captions": texts, "hallucinated": absent})
    return sorted(found, key=lambda row: -abs(len(row["hallucinated"][0]) - len(row["hallucinated"][1])))


def captions(folder: Path) -> dict[str, str]:
    """Read the captions of a `relook eval chair` folder, by image."""
    return read_captions_by_image(folder / "chair.jsonl")


def _same_images(first: Path, second: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Read both folders' captions, which must cover the same images; those of the second are in any order."""
    said = captions(first), captions(second)
    if odd := sorted(said[0].keys() ^ said[1].keys()):
        raise DataError(f"Only one of {first} and {second} describes {preview(odd)}.", "Give captions of equal lists.")
    return said


def _pope_rows(data: Path, folder: Path) -> dict[str, list[PopeRow]]:
    return {
        split: pope.match_answers(questions, pope.read_pope_answers(folder / f"pope_{split}.jsonl"))
        for split, questions in pope_questions(data).items()
    }


def _chair_scores(data: Path, first: Path, second: Path) -> list[ChairScore]:
    said = _same_images(first, second)
    annotations = data_truth(data, list(said[0]))
    return [chair_counts({image: side[image] for image in said[0]}, annotations) for side in said]


# ----------------------------------------------------------------------------------------------------
# Divergence of a tuned model's first answer token from the base's, and hallucination rate by divergence.

KL_EDGES = (0.0, 1e-3, 1e-2, 1e-1, 1.0, float("inf"))  # nats


def kl_divergence(tuned: Tensor, base: Tensor) -> Tensor:
    """Compute the Kullback-Leibler divergence of the tuned from the base distribution, in nats, (N,).

    KL(p || q) = sum over the whole vocabulary of p (log p - log q), p the tuned and q the base distribution of the
    first answer token (Kullback and Leibler 1951). Rounding may leave a tiny negative sum, which is clamped to 0.

    Args:
        tuned, base: log-probs, (N, vocabulary).
    """
    result: Tensor = (tuned.exp() * (tuned - base)).sum(-1).clamp_min(0)
    return result


def hallucination_by_divergence(
    tuned: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Compute how often questions labelled no are answered with yes, by bins of their divergence.

    Args:
        tuned, base: records of FIRST_FILE of a tuned model (a row) and of the base, in the same order.

    Returns:
        For each bin [low, high) of KL_EDGES the number `n` of such questions, and the `rate` and `base_rate` at which
        row and base answer yes (None in an empty bin). `high` is None if the bin is unbounded.
    """
    bins = []
    for low, high in pairwise(KL_EDGES):
        inside = [
            (_says_yes(record), _says_yes(other))
            for record, other in zip(tuned, base, strict=True)
            if record["label"] == "no" and low <= record["kl"] < high
        ]
        row_rate, base_rate = (safe_ratio(sum(pair[side] for pair in inside), len(inside)) for side in (0, 1))
        end = high if high < float("inf") else None
        bins.append({"low": low, "high": end, "n": len(inside), "rate": row_rate, "base_rate": base_rate})
    return bins


def _says_yes(record: Mapping[str, Any]) -> bool:
    return official_parse(record["answer"])
