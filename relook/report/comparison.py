"""`relook report A B`: two models side by side on the same questions and pictures, from their `relook eval` folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relook.console import status
from relook.data.annotations import read_coco
from relook.data.paths import coco_images, resolve_extension
from relook.errors import RecipeError
from relook.evaluate.benchmark import ScoringInputs
from relook.evaluate.compare import compare
from relook.evaluate.results import COMPARISON_FILE, MODEL_HASHES, NOT_SETTINGS, data_folder_of
from relook.evaluate.tasks import BENCHMARKS, get_benchmark, get_benchmarks
from relook.evaluate.tasks.chair import compare_coverage, instances_file, vocabulary_of
from relook.evaluate.tasks.pope import SPLITS
from relook.files import is_free, read_json_object, write_json, write_text
from relook.report.examples import answer_effect, by_image, caption_effects, in_turn
from relook.report.findings import details, headline, unclear_answers
from relook.report.pages import described, render, thumbnail
from relook.report.plots import Style, coverage_lines, line_styles, measured, tradeoff
from relook.report.tables import axis_labels, recorded

REPORT_FILE = "comparison.html"
PICTURES = 40  # of each benchmark; COMPARISON_FILE has all rows
LONGEST = 2000  # characters of an answer that are shown
POPE_RATES = ("accuracy", "precision", "recall", "f1", "yes_ratio")
OWN_SECTIONS = ("pope", "chair")  # comparison.html.j2 shows them paired; others are side by side


def write_comparison(
    first: str | Path, second: str | Path, out: str | Path | None = None, data: str | Path | None = None
) -> Path:
    """Write `comparison.html` and `comparison.json` of two evaluations.

    Args:
        out: folder for both; beside the first evaluation by default.
        data: their data folder, where it has moved.

    Returns:
        The HTML file.

    Raises:
        RelookError: the two have no finished benchmark in common, or did not answer the same.
    """
    first, second = Path(first), Path(second)
    out = None if out is None else Path(out)
    data = None if data is None else Path(data)
    # Resolved, because "." has no name to show.
    first, second = first.resolve(), second.resolve()
    out, data = out or first.parent / f"{first.name}-{second.name}", data or data_folder_of(first)
    if first == second:
        raise RecipeError(f"Both evaluations are {first}.", "Give two folders.")
    is_free(out, COMPARISON_FILE, "--out")
    results = compare_folders(first, second, data)
    write_json(out / COMPARISON_FILE, results)
    both, paired, differing = results["scores"], results["paired"], results["differing"]
    names = results["models"]
    styles = dict(zip(names, line_styles(("base", "other")).values(), strict=True))
    sources = describe_sources(both)
    cautions = differing_settings(sources, names) + unclear_answers(dict(zip(names, both, strict=True)))
    page = render(
        "comparison.html.j2",
        title=headline(names[1], both[0], paired, names[0]) if paired else " and ".join(names),
        findings=details(both[1], both[0], paired),
        cautions=cautions,
        models=names,
        chart=_chart(names, both, styles) if "chair" in paired else "",
        styles=list(styles.items()),
        tallies={
            split: [" / ".join(f"{side['pope'][split][key]}" for key in ("tp", "fp", "tn", "fn")) for side in both]
            for split in SPLITS
        }
        if "pope" in paired
        else {},
        both=both,
        paired=paired,
        splits=SPLITS,
        pope_rates=POPE_RATES,
        questions=differing_questions(differing["pope"], data) if "pope" in paired else None,
        captions=caption_cards(differing["chair"], names, data) if "chair" in paired else None,
        coverage=results.get("equal_coverage"),
        coverage_chart=_coverage_chart(names, results["equal_coverage"], styles) if "chair" in paired else "",
        unpaired={
            name: side_by_side(name, [scores[name] for scores in both], get_benchmark(name).ratings)
            for name in both[0]
            if name not in OWN_SECTIONS
        },
        sources=sources,
        limit=PICTURES,
        results_file=COMPARISON_FILE,
    )
    write_text(out / REPORT_FILE, page)
    for caution in cautions:
        status(caution)
    return out / REPORT_FILE


def compare_folders(first: Path, second: Path, data: Path) -> dict[str, Any]:
    """Return the content of `comparison.json`: scores, differences (second - first), rows on which the two differ.

    POPE and CHAIR are scored from the answers and paired; of other benchmarks the finished scores are taken.
    """
    folders = [first, second]
    both = [name for name in BENCHMARKS if all((folder / f"{name}.json").exists() for folder in folders)]
    if not both:
        raise RecipeError(
            f"{first} and {second} have no finished benchmark in common.",
            f"Finish one of {', '.join(BENCHMARKS)} in both, by `relook eval`.",
        )
    definitions = get_benchmarks(both)
    paired = [name for name in both if definitions[name].compare]
    return {
        # Two folders of one name are told apart by their paths.
        "models": [str(folder) if first.name == second.name else folder.name for folder in folders],
        "scores": [{name: _scores(name, data, folder) for name in both} for folder in folders],
        "paired": compare(data, first, second, paired),
        **({"equal_coverage": compare_coverage(data, first, second)} if "chair" in paired else {}),
        "differing": {
            name: list_rows(data, first, second) for name in paired if (list_rows := definitions[name].differing)
        },
    }


def _scores(name: str, data: Path, folder: Path) -> dict[str, Any]:
    rescore = get_benchmark(name).rescore
    return rescore(folder, ScoringInputs(data), "official") if rescore else read_json_object(folder / f"{name}.json")


def _chart(names: Sequence[str], both: Sequence[Mapping[str, Any]], styles: Mapping[str, Style]) -> str:
    points = {name: measured(scores["chair"], "recall", "chair_i") for name, scores in zip(names, both, strict=True)}
    return tradeoff(points, styles, *axis_labels("chair", "recall", "chair_i"), "lower right")


def _coverage_chart(names: Sequence[str], coverage: Mapping[str, Any], styles: Mapping[str, Style]) -> str:
    points = {
        name: [(100 * recall, 100 * rate) for _, recall, rate in curve if recall is not None and rate is not None]
        for name, curve in zip(names, coverage["curves"], strict=True)
    }
    return coverage_lines(points, styles, *axis_labels("chair", "recall", "chair_i"), 100 * coverage["recall"])


def side_by_side(
    benchmark: str, sides: Sequence[Mapping[str, Any]], ratings: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return a line per rate with both models' cells: (value, interval, scale), or a text; empty where one has none.

    What a judge has and has not judged comes first, then each rate with an interval, of the benchmark and its parts.

    Args:
        ratings: the rates that are not fractions, with their ranges.
    """
    cells = [_judged(scores) | _rates(scores, ratings) for scores in sides]
    lines = []
    for name in dict.fromkeys(rate for side in cells for rate in side):
        of_rate = [side.get(name, "") for side in cells]
        key = name.split(", ")[-1]
        is_rate = any(not isinstance(cell, str) for cell in of_rate)
        unit = ratings.get(key, "percent") if is_rate else ""
        lines.append({"name": name, "term": f"{benchmark}.{key}", "unit": unit, "cells": of_rate})
    return lines


def _judged(scores: Mapping[str, Any]) -> dict[str, Any]:
    if "not_judged" not in scores:
        return {}
    unjudged = scores["not_judged"]
    # Earlier versions wrote only how many replies had no verdict, of `sentences` or of `n` answers.
    judged = scores.get("judged", scores.get("sentences", scores["n"]) - unjudged)
    undecided = f", {scores['cannot_judge']} of them “cannot judge”" if "cannot_judge" in scores else ""
    return {"judged / not judged": f"{judged} / {unjudged}{undecided}"}


def _rates(scores: Mapping[str, Any], ratings: Mapping[str, str], part: str = "") -> dict[str, Any]:
    rates: dict[str, Any] = {}
    for key, value in scores.items():
        if isinstance(value, dict):
            rates |= _rates(value, ratings, f"{part}{key}, ")
        elif f"{key}_ci" in scores:
            rates[part + key] = (value, scores[f"{key}_ci"], 1 if key in ratings else 100)
    return rates


def differing_questions(rows: Sequence[Mapping[str, Any]], data: Path) -> dict[str, Any]:
    """Count the questions on which the two differ, and return those of the pictures that have the most as cards."""
    groups = by_image(rows)
    cards = []
    for image in sorted(groups, key=lambda image: -len(groups[image]))[:PICTURES]:
        shown = [
            {
                "question": _short(row["question"]),
                "label": row["label"],
                "effects": answer_effect(row["right"]),
                "answers": list(zip(map(_short, row["answers"]), row["right"], strict=True)),
            }
            for row in groups[image]
        ]
        cards.append({"image": image, "thumbnail": _thumbnail(data, image), "rows": shown})
    return {
        "count": len(rows),
        "images": len(groups),
        "alone": [sum(row["right"][side] and not row["right"][1 - side] for row in rows) for side in (0, 1)],
        "cards": cards,
    }


def caption_cards(rows: Sequence[Mapping[str, Any]], names: Sequence[str], data: Path) -> dict[str, Any]:
    """Return the pictures of which the two name different objects, with both captions, as cards."""
    vocabulary, cards = vocabulary_of(read_coco(instances_file(data))), []
    for row in in_turn(rows)[:PICTURES]:
        captions = [(name, caption[:LONGEST]) for name, caption in zip(names, row["captions"], strict=True)]
        texts = described(row["objects"], captions, vocabulary)
        picture = {"image": row["image"], "thumbnail": _thumbnail(data, row["image"])}
        cards.append({**picture, "texts": texts, "effects": caption_effects(row)})
    return {"count": len(rows), "cards": cards}


def _thumbnail(data: Path, image: str) -> dict[str, str]:
    return thumbnail(resolve_extension(coco_images(data) / image))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def describe_sources(both: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return what each number depends on, for both models, by benchmark and key."""
    lines = {}
    for benchmark in both[0]:
        sides = [_sources(scores[benchmark]) for scores in both]
        for key in dict.fromkeys(key for side in sides for key in side):
            lines[f"{benchmark}: {key}"] = [recorded(side.get(key, "")) for side in sides]
    return lines


def differing_settings(sources: Mapping[str, Sequence[str]], names: Sequence[str]) -> list[str]:
    """Return a sentence for each setting, such as the precision, that differs, and one if the models do not.

    Args:
        sources: of `describe_sources`.
        names: of the two models.
    """
    by_setting: dict[tuple[str, ...], list[str]] = {}
    for source, values in sources.items():
        benchmark, _, key = source.partition(": ")
        if values[0] != values[1] and key not in NOT_SETTINGS:
            by_setting.setdefault((key, *values), []).append(benchmark)
    hashes = [values for source, values in sources.items() if source.partition(": ")[2] in MODEL_HASHES]
    same = ["Both evaluations are of the same model."] if hashes and all(a == b for a, b in hashes) else []
    return same + [
        f"Settings differ: {key} of {' and '.join(benchmarks)} is {first or 'none'} for {names[0]}, "
        f"{second or 'none'} for {names[1]}."
        for (key, first, second), benchmarks in by_setting.items()
    ]


def _sources(result: Mapping[str, Any]) -> dict[str, Any]:
    judge = result.get("judge", {})
    return {
        **result["provenance"],
        **{f"judge {key}": judge[key] for key in ("model", "request", "prompt_hash") if key in judge},
    }
