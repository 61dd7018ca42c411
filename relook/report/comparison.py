"""`relook report A B`: two models side by side on the same questions and pictures, from their `relook eval` folders."""

from __future__ import annotations

import html
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
from relook.report.pages import card, described, document, format_number, format_percent, table, thumbnail

RESULTS_FILE, REPORT_FILE = "comparison.json", "comparison.html"
PICTURES = 40  # of each benchmark; RESULTS_FILE has all rows
LONGEST = 2000  # characters of an answer that are shown
RATES = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1", "yes_ratio": "yes ratio"}
CHAIR_RATES = {"chair_i": "CHAIR<sub>i</sub>", "chair_s": "CHAIR<sub>s</sub>", "recall": "recall", "length": "words"}
NOTE = (
    "Percent; in brackets 95 % intervals from a bootstrap over images, paired for differences, which are bold where 0 "
    "is outside. p: exact McNemar test over questions, or over captions with and without a hallucination."
)


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
    first, second = first.resolve(), second.resolve()
    out, data = out or first.parent / f"{first.name}-{second.name}", data or data_folder_of(first)
    is_free(out, RESULTS_FILE, "--out")
    results = compare_folders(first, second, data)
    write_json(out / RESULTS_FILE, results)
    names, differing = results["models"], results["differing"]
    title = " and ".join(names)
    sections = [f"<h1>{html.escape(title)}</h1>", f"<p>{NOTE}</p>"]
    own_sections = {"pope": (pope_table, pope_cards), "chair": (chair_table, chair_cards)}
    for name, (make_table, make_cards) in own_sections.items():
        if name in results["paired"]:
            heading = f"<h2>{name.upper()}</h2>"
            sections += [heading, make_table(results), *make_cards(differing[name], names, data)]
    for name in results["scores"][0]:
        if name not in own_sections:
            sections += [f"<h2>{name.upper()}</h2>", "<p>Side by side, not paired.</p>", side_by_side(results, name)]
    sections += ["<h2>Where the numbers come from</h2>", f"<div class=wrap>{provenance_table(results)}</div>"]
    write_text(out / REPORT_FILE, document(title, sections))
    return out / REPORT_FILE


def compare_folders(first: Path, second: Path, data: Path) -> dict[str, Any]:
    """What `comparison.json` says: scores, differences (second - first), and the rows on which the two differ.

    POPE and CHAIR are scored from the answers and paired; of other benchmarks the finished scores are taken.
    """
    folders = [first, second]
    both = [name for name in BENCHMARKS if all((folder / f"{name}.json").exists() for folder in folders)]
    if not both:
        known = ", ".join(BENCHMARKS)
        raise RecipeError(
            f"{first} and {second} have no finished benchmark in common.",
            f"Finish one of {known} in both, by `relook eval`.",
        )
    definitions = get_benchmarks(both)
    paired = [name for name in both if definitions[name].compare]
    return {
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


def pope_table(results: Mapping[str, Any]) -> str:
    """A line per split and rate."""
    cells = [_heads(results)]
    for split in SPLITS:
        sides, paired = [scores["pope"][split] for scores in results["scores"]], results["paired"]["pope"][split]
        for rate, title in RATES.items():
            shown = [format_percent(side[rate], side[f"{rate}_ci"]) for side in sides]
            cells.append([f"{split}, {title}", *shown, *_difference(paired if rate == "accuracy" else paired[rate])])
        counts = [" / ".join(str(side[key]) for key in ("tp", "fp", "tn", "fn")) for side in sides]
        cells.append([f"{split}, TP / FP / TN / FN", *counts, "", ""])
        cells.append([f"{split}, unclear answers", *(str(side["unclear"]) for side in sides), "", ""])
    return table(cells)


def chair_table(results: Mapping[str, Any]) -> str:
    cells = [_heads(results)]
    sides, paired = [scores["chair"] for scores in results["scores"]], results["paired"]["chair"]
    for rate, title in CHAIR_RATES.items():
        scale = 1 if rate == "length" else 100
        shown = [format_number(side[rate], side[f"{rate}_ci"], scale) for side in sides]
        cells.append([title, *shown, *_difference(paired[rate], scale)])
    return table(cells)


def side_by_side(results: Mapping[str, Any], name: str) -> str:
    """A line per rate with an interval, of a benchmark and its parts; first what a judge has and has not judged."""
    ratings = get_benchmark(name).ratings
    sides = [_judged(scores[name]) | _rates(scores[name], ratings) for scores in results["scores"]]
    cells = [_heads(results)[:3]]
    for rate in dict.fromkeys(rate for side in sides for rate in side):
        cells.append([html.escape(rate), *(side.get(rate, "") for side in sides)])
    return table(cells)


def _judged(scores: Mapping[str, Any]) -> dict[str, str]:
    if "not_judged" not in scores:
        return {}
    unjudged = scores["not_judged"]
    judged = scores.get("judged", scores.get("sentences", scores["n"]) - unjudged)
    undecided = f", {scores['cannot_judge']} of them “cannot judge”" if "cannot_judge" in scores else ""
    return {"judged / not judged": f"{judged} / {unjudged}{undecided}"}


def _rates(scores: Mapping[str, Any], ratings: Collection[str], part: str = "") -> dict[str, str]:
    cells: dict[str, str] = {}
    for key, value in scores.items():
        if isinstance(value, dict):
            cells |= _rates(value, ratings, f"{part}{key}, ")
        elif f"{key}_ci" in scores:
            cells[part + key] = format_number(value, scores[f"{key}_ci"], 1 if key in ratings else 100)
    return cells


def _heads(results: Mapping[str, Any]) -> list[str]:
    return ["", *(html.escape(name) for name in results["models"]), "difference", "p"]


def _difference(found: Mapping[str, Any], scale: float = 100) -> list[str]:
    text = format_number(found["difference"], found["ci"], scale, "+")
    p = f"{found['mcnemar_p']:.2g}" if "mcnemar_p" in found else ""
    low, high = found["ci"] or (0, 0)
    return [f"<b>{text}</b>" if low > 0 or high < 0 else text, p]


def pope_cards(rows: Sequence[Mapping[str, Any]], names: Sequence[str], data: Path) -> list[str]:
    """The pictures with the most questions on which the two differ, and these questions."""
    names = [html.escape(name) for name in names]
    by_image: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_image.setdefault(row["image"], []).append(row)
    shown = sorted(by_image, key=lambda image: -len(by_image[image]))[:PICTURES]
    alone = [sum(row["right"][side] and not row["right"][1 - side] for row in rows) for side in (0, 1)]
    text = (
        f"{len(rows)} distinct questions on {len(by_image)} pictures are answered differently: {names[0]} alone is "
        f"right {alone[0]} times, {names[1]} alone {alone[1]} times."
    )
    cards = []
    for image in shown:
        cells = [["question", "truth", *names]]
        for row in by_image[image]:
            said = [
                f"<span class={'right' if right else 'wrong'}>{_short(answer)}</span>"
                for answer, right in zip(row["answers"], row["right"], strict=True)
            ]
            cells.append([_short(row["question"]), row["label"], *said])
        cards.append(_card(data, image, table(cells)))
    return [f"<p>{text}{_shorten_list(len(by_image))}</p>", *cards]


def chair_cards(rows: Sequence[Mapping[str, Any]], names: Sequence[str], data: Path) -> list[str]:
    """The pictures of which the two name absent objects differently, and both captions."""
    vocabulary, cards = vocabulary_of(read_coco(instances_file(data))), []
    for row in rows[:PICTURES]:
        said = [(name, caption[:LONGEST]) for name, caption in zip(names, row["captions"], strict=True)]
        cards.append(_card(data, row["image"], described(row["objects"], said, vocabulary)))
    text = f"{len(rows)} pictures are described with other absent objects; their words are marked."
    return [f"<p>{text}{_shorten_list(len(rows))}</p>", *cards]


def _shorten_list(pictures: int) -> str:
    return f" The first {PICTURES} pictures are shown; {RESULTS_FILE} has all rows." if pictures > PICTURES else ""


def _card(data: Path, image: str, content: str) -> str:
    picture = f"{thumbnail(resolve_extension(coco_images(data) / image))}<br><small>{html.escape(image)}</small>"
    return card(picture, content)


def _short(text: str) -> str:
    return html.escape(text if len(text) <= LONGEST else f"{text[:LONGEST]} …")


def provenance_table(results: Mapping[str, Any]) -> str:
    """What each number depends on; lines on which the two differ are bold."""
    cells = [["", *(html.escape(name) for name in results["models"])]]
    for benchmark in results["scores"][0]:
        sides = [_sources(side[benchmark]) for side in results["scores"]]
        for key in dict.fromkeys(key for side in sides for key in side):
            values = [html.escape(_plain(side.get(key, ""))) for side in sides]
            if values[0] != values[1]:
                values = [f"<b>{value}</b>" for value in values]
            cells.append([f"{benchmark}: {html.escape(key)}", *values])
    return table(cells)


def _sources(result: Mapping[str, Any]) -> dict[str, Any]:
    judge = result.get("judge", {})
    return {
        **result["provenance"],
        **{f"judge {key}": judge[key] for key in ("model", "request", "prompt_hash") if key in judge},
    }


def _plain(value: Any) -> str:
    return ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else str(value)
