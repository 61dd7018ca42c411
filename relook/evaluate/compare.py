"""Two models on the same images, from their answer files: how much one is better, how sure that is, and where they
differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from relook.errors import DataError, some
from relook.evaluate.score import COMPARED, chair_counts, data_truth, pope_questions, read_descriptions
from relook.evaluate.statistics import Ratio, columns, mcnemar, paired_interval, ratio, right_alone
from relook.evaluate.tasks import pope
from relook.evaluate.tasks.chair import ChairScore, mentions, vocabulary_of
from relook.evaluate.tasks.pope import SPLITS, PopeRow, official_parse

# ----------------------------------------------------------------------------------------------------


def compare(data: Path, first: Path, second: Path, benchmarks: Sequence[str] = COMPARED) -> dict[str, Any]:
    """Differences second - first of two `relook eval` folders over the same data.

    Returns:
        For each POPE split the accuracy's difference with its paired 95 % interval over images and the exact McNemar
        p-value over questions, and the other rates' differences with intervals; for CHAIR its rates' differences with
        intervals, and for chair_s the p-value over captions.

    Raises:
        DataError: the two did not answer the same.
    """
    return compare_pooled([(data, first, second)], benchmarks)


def compare_pooled(runs: Sequence[tuple[Path, Path, Path]], benchmarks: Sequence[str] = COMPARED) -> dict[str, Any]:
    """As `compare`, over the images of several (data, first, second) taken together: for tables over seeds."""
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
    return {**found.pop("accuracy"), "mcnemar_p": mcnemar(*right_alone(*right)), **found}


def _compare_chair(sides: Sequence[Sequence[ChairScore]]) -> dict[str, Any]:
    rates = [[run.ratios() for run in side] for side in sides]
    found = {rate: _difference(*([run[rate] for run in side] for side in rates)) for rate in rates[0][0]}
    right = [[count == 0 for run in side for count in run.hallucinated] for side in sides]
    found["chair_s"]["mcnemar_p"] = mcnemar(*right_alone(*right))
    return found


def _difference(first: Sequence[Ratio], second: Sequence[Ratio]) -> dict[str, Any]:
    pooled = [columns([pair for run in side for pair in run]) for side in (first, second)]
    ratios = [ratio(sum(top), sum(bottom)) for top, bottom in pooled]
    return {"difference": ratios[1] - ratios[0], "ci": paired_interval(pooled[0], pooled[1])}


def differing_answers(data: Path, first: Path, second: Path) -> list[dict[str, Any]]:
    """The questions of which one model says yes and the other does not, each once, with the splits it is in."""
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


def differing_captions(data: Path, first: Path, second: Path) -> list[dict[str, Any]]:
    """The images of which one model names other absent objects than the other, or more often; most different first."""
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
    """The captions of a `relook eval chair` folder, by image."""
    return read_descriptions(folder / "chair.jsonl")


def _same_images(first: Path, second: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Both folders' captions; those of the second in any order."""
    said = captions(first), captions(second)
    if odd := sorted(said[0].keys() ^ said[1].keys()):
        raise DataError(f"Only one of {first} and {second} describes {some(odd)}.", "Give captions of equal lists.")
    return said


def _pope_rows(data: Path, folder: Path) -> dict[str, list[PopeRow]]:
    return {
        split: pope.match(questions, pope.read_answers(folder / f"pope_{split}.jsonl"))
        for split, questions in pope_questions(data).items()
    }


def _chair_scores(data: Path, first: Path, second: Path) -> list[ChairScore]:
    said = _same_images(first, second)
    annotations = data_truth(data, list(said[0]))
    return [chair_counts({image: side[image] for image in said[0]}, annotations) for side in said]


# ----------------------------------------------------------------------------------------------------
# How far a tuned model's first answer tokens are from the base's, and how often it hallucinates where.

KL_EDGES = (0.0, 1e-3, 1e-2, 1e-1, 1.0, float("inf"))  # nats


def divergence(tuned: Tensor, base: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the tuned from the base distribution, in nats, (N,).

    KL(p || q) = sum over the whole vocabulary of p (log p - log q), p the tuned and q the base distribution of the
    first answer token (Kullback and Leibler 1951). Rounding may leave a tiny negative sum: it is taken for 0.

    Args:
        tuned, base: log-probs, (N, vocabulary).
    """
    result: Tensor = (tuned.exp() * (tuned - base)).sum(-1).clamp_min(0)
    return result


def by_divergence(tuned: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How often questions to be answered with no are answered with yes, by bins of their divergence.

    Args:
        tuned, base: records of FIRST_FILE of a row and of the base, in the same order.

    Returns:
        For each bin [low, high) of KL_EDGES the number `n` of such questions, and the `rate` and `base_rate` at which
        row and base answer yes (0 in an empty bin). `high` is None where the bin has no end.
    """
    bins = []
    for low, high in pairwise(KL_EDGES):
        inside = [
            (_says_yes(record), _says_yes(other))
            for record, other in zip(tuned, base, strict=True)
            if record["label"] == "no" and low <= record["kl"] < high
        ]
        rates = [sum(side) / len(inside) if inside else 0.0 for side in zip(*inside, strict=True)] or [0.0, 0.0]
        end = high if high < float("inf") else None
        bins.append({"low": low, "high": end, "n": len(inside), "rate": rates[0], "base_rate": rates[1]})
    return bins


def _says_yes(record: Mapping[str, Any]) -> bool:
    return official_parse(record["answer"])
