"""`relook report A B`: two models side by side on the same questions and pictures, from their `relook eval` folders."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from relook.data.annotations import read_coco
from relook.data.paths import coco_images, resolve_extension
from relook.errors import RecipeError
from relook.evaluate.benchmark import ScoringInputs
from relook.evaluate.compare import compare
from relook.evaluate.results import data_folder_of
from relook.evaluate.tasks import BENCHMARKS, get_benchmark, get_benchmarks
from relook.evaluate.tasks.chair import instances_file, vocabulary_of
from relook.evaluate.tasks.pope import SPLITS
from relook.files import is_free, read_json_object, write_json, write_text
from relook.report.pages import described, render, thumbnail

RESULTS_FILE, REPORT_FILE = "comparison.json", "comparison.html"
PICTURES = 40  # of each benchmark; RESULTS_FILE has all rows
LONGEST = 2000  # characters of an answer that are shown
RATES = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1", "yes_ratio": "yes ratio"}
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
    is_free(out, RESULTS_FILE, "--out")
    results = compare_folders(first, second, data)
    write_json(out / RESULTS_FILE, results)
    both, paired, differing = results["scores"], results["paired"], results["differing"]
    page = render(
        "comparison.html.j2",
        title=" and ".join(results["models"]),
        models=results["models"],
        both=both,
        paired=paired,
        splits=SPLITS,
        pope_rates=RATES,
        questions=differing_questions(differing["pope"], data) if "pope" in paired else None,
        captions=caption_cards(differing["chair"], results["models"], data) if "chair" in paired else None,
        unpaired={
            name: side_by_side([scores[name] for scores in both], get_benchmark(name).ratings)
            for name in both[0]
            if name not in OWN_SECTIONS
        },
        sources=describe_sources(both),
        limit=PICTURES,
        results_file=RESULTS_FILE,
    )
    write_text(out / REPORT_FILE, page)
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
        "differing": {
            name: list_rows(data, first, second) for name in paired if (list_rows := definitions[name].differing)
        },
    }


def _scores(name: str, data: Path, folder: Path) -> dict[str, Any]:
    rescore = get_benchmark(name).rescore
    return rescore(folder, ScoringInputs(data), "official") if rescore else read_json_object(folder / f"{name}.json")


def side_by_side(sides: Sequence[Mapping[str, Any]], ratings: Collection[str]) -> dict[str, list[Any]]:
    """Return both models' cells by rate: (value, interval, scale), or a text; empty where one has no such rate.

    What a judge has and has not judged comes first, then each rate with an interval, of the benchmark and its parts.
    """
    cells = [_judged(scores) | _rates(scores, ratings) for scores in sides]
    return {
        rate: [side.get(rate, "") for side in cells] for rate in dict.fromkeys(rate for side in cells for rate in side)
    }


def _judged(scores: Mapping[str, Any]) -> dict[str, Any]:
    if "not_judged" not in scores:
        return {}
    unjudged = scores["not_judged"]
    # Earlier versions wrote only how many replies had no verdict, of `sentences` or of `n` answers.
    judged = scores.get("judged", scores.get("sentences", scores["n"]) - unjudged)
    undecided = f", {scores['cannot_judge']} of them “cannot judge”" if "cannot_judge" in scores else ""
    return {"judged / not judged": f"{judged} / {unjudged}{undecided}"}


def _rates(scores: Mapping[str, Any], ratings: Collection[str], part: str = "") -> dict[str, Any]:
    rates: dict[str, Any] = {}
    for key, value in scores.items():
        if isinstance(value, dict):
            rates |= _rates(value, ratings, f"{part}{key}, ")
        elif f"{key}_ci" in scores:
            rates[part + key] = (value, scores[f"{key}_ci"], 1 if key in ratings else 100)
    return rates


def differing_questions(rows: Sequence[Mapping[str, Any]], data: Path) -> dict[str, Any]:
    """Count the questions on which the two differ, and return those of the pictures that have the most as cards."""
    by_image: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_image.setdefault(row["image"], []).append(row)
    cards = []
    for image in sorted(by_image, key=lambda image: -len(by_image[image]))[:PICTURES]:
        shown = [
            {
                "question": _short(row["question"]),
                "label": row["label"],
                "answers": list(zip(map(_short, row["answers"]), row["right"], strict=True)),
            }
            for row in by_image[image]
        ]
        cards.append({"image": image, "thumbnail": _thumbnail(data, image), "rows": shown})
    return {
        "count": len(rows),
        "images": len(by_image),
        "alone": [sum(row["right"][side] and not row["right"][1 - side] for row in rows) for side in (0, 1)],
        "cards": cards,
    }


def caption_cards(rows: Sequence[Mapping[str, Any]], names: Sequence[str], data: Path) -> dict[str, Any]:
    """Return the pictures of which the two name different absent objects, with both captions, as cards."""
    vocabulary, cards = vocabulary_of(read_coco(instances_file(data))), []
    for row in rows[:PICTURES]:
        captions = [(name, caption[:LONGEST]) for name, caption in zip(names, row["captions"], strict=True)]
        texts = described(row["objects"], captions, vocabulary)
        cards.append({"image": row["image"], "thumbnail": _thumbnail(data, row["image"]), "texts": texts})
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
            lines[f"{benchmark}: {key}"] = [_plain(side.get(key, "")) for side in sides]
    return lines


def _sources(result: Mapping[str, Any]) -> dict[str, Any]:
    judge = result.get("judge", {})
    return {
        **result["provenance"],
        **{f"judge {key}": judge[key] for key in ("model", "request", "prompt_hash") if key in judge},
    }


def _plain(value: Any) -> str:
    return ", ".join(f"{key} {part}" for key, part in value.items()) if isinstance(value, dict) else str(value)
