"""Photoworld's table from answers alone: scores, contrasts with paired intervals, and where the differences lie.

python benchmarks/photoworld/analysis.py WORK ...     # work folders, or unpacked results files
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scenes import Scene

from relook.evaluate.compare import compare_pooled
from relook.evaluate.statistics import Ratio, rate_difference, safe_ratio
from relook.evaluate.tasks.chair import (
    data_truth,
    located_mentions,
    mentions,
    plural,
    read_eval_captions,
    vocabulary_of,
)
from relook.evaluate.tasks.pope import question_text
from relook.files import read_json, read_records, write_json

SIZES = {"absent": (0, 0), "small": (0, 18), "middle": (18, 35), "large": (35, 1e9)}  # pixels, low < size <= high
THIRDS = ("first", "second", "third")
DOSES = (0, 5, 10, 20)  # percent
PROBE_STYLES = ("s-", "o-", "v--", "^--")
LOOKS = {  # variants in the plot: label, colour
    "base": ("base", "tab:gray"),
    "none": ("tuned,\ncannot look", "tab:gray"),
    "cross": ("tuned,\nlooks", "tab:red"),
    "swapped": ("looks at\nanother image", "tab:blue"),
}
# name: (first, second); a difference is second - first
CONTRASTS = {
    "H1 looking again": ("none", "cross"),
    "H1 looking again, questions alone": ("none_questions", "cross_questions"),
    "H2 its own image in training": ("other_image", "cross"),
    "H2 its own image, not a similar one": ("similar_image", "cross"),
    "H2 its own image at test": ("swapped", "cross"),
    "H2 its own at test, not a similar one": ("swapped_similar", "cross"),
    "H8 patches, not the trunk's cells": ("own_tokens", "cross"),
    "H8 looking at the trunk's cells": ("none", "own_tokens"),
    "H4 free alignment": ("projected", "cross"),
    "H5 cross-attention, not LoRA": ("lora", "cross"),
    "H5 LoRA, not an MLP": ("none", "lora"),
    **{f"H6 preference at {dose} % false": (f"nll_{dose}", f"dpo_{dose}") for dose in DOSES},
    **{f"H6 preference of weight {weight}, 20 % false": ("nll_20", f"dpo_20_{weight}") for weight in ("0.3", "0.1")},
    "H7 preference, on-policy": ("nll_policy", "dpo_policy"),
}


def summary(folder: Path) -> dict[str, Any]:
    """Return the scores that tables show, of a folder of answers."""
    pope, chair = read_json(folder / "pope.json"), read_json(folder / "chair.json")
    row = {split: pope[split]["accuracy"] for split in ("random", "popular", "adversarial")}
    row["yes_ratio"] = pope["adversarial"]["yes_ratio"]
    return row | {key: chair[key] for key in ("chair_i", "chair_s", "recall", "length")}


def repeated(folder: Path) -> float | None:
    """Return the share of captions that hold a sentence twice."""
    captions = [record["caption"].split(". ") for record in read_records(folder / "chair.jsonl")]
    return safe_ratio(sum(len(set(sentences)) < len(sentences) for sentences in captions), len(captions))


def analyse(studies: Sequence[tuple[Path, Path]]) -> dict[str, Any]:
    """Compute everything from the answers of one or several studies; contrasts are pooled over their runs.

    Args:
        studies: of each base, the split's folder (scenes.json, pope/, annotations/) and the folder of one folder a run,
            `<variant>-<seed>` or `base`. The runs of the second study on are called `<variant>-<seed>@1` and so on.
    """
    runs = {
        f"{out.name}@{number}" if number else out.name: (data, out)
        for number, (data, answers) in enumerate(studies)
        for out in sorted(answers.iterdir())
        if (out / "chair.json").exists() and (out / "pope.json").exists()
    }
    groups = {
        "right answers by size": {name: answers_by_size(*run) for name, run in runs.items()},
        "CHAIR_i by third of the caption": {name: chair_by_third(*run) for name, run in runs.items()},
    }
    names = sorted({variant_of(name) for name in runs} - {"base"})
    pairs = {**CONTRASTS, **{f"{name} - base": ("base", name) for name in names}}
    contrasts = {}
    for title, sides in pairs.items():
        pooled = pairs_of(sides, list(runs))
        if pooled:
            found = compare_pooled([(runs[a][0], runs[a][1], runs[b][1]) for a, b in pooled])
            row = {"runs": len(pooled), "adversarial": found["pope"]["adversarial"]}
            row |= {key: found["chair"][key] for key in ("chair_i", "chair_s", "recall", "length")}
            if title.startswith(("H6", "H7")):
                row["at equal recall"] = at_equal_recall([(runs[a][0], runs[a][1], runs[b][1]) for a, b in pooled])
            for what, by_run in groups.items():
                row[what] = {
                    group: rate_difference([by_run[a][group] for a, _ in pooled], [by_run[b][group] for _, b in pooled])
                    for group in by_run[pooled[0][0]]
                }
            contrasts[title] = row
    rates = {
        what: {
            name: {group: safe_ratio(sum(a for a, _ in r), sum(b for _, b in r)) for group, r in row.items()}
            for name, row in by_run.items()
        }
        for what, by_run in groups.items()
    }
    rows = {name: {**summary(out), "repeated": repeated(out)} for name, (_, out) in runs.items()}
    return {"rows": rows, "contrasts": contrasts, **rates}


def variant_of(run: str) -> str:
    return run.split("@")[0].rsplit("-", 1)[0]


def pairs_of(sides: tuple[str, str], runs: Sequence[str]) -> list[tuple[str, str]]:
    """Return the runs of two variants that have the same base and seed; the base has no seed and goes with all."""
    seeds = sorted({name.rsplit("-", 1)[1] for name in runs if "-" in name})  # "1", "2", "1@1" ...
    pairs = [
        tuple("base" + seed[seed.find("@") :] * ("@" in seed) if side == "base" else f"{side}-{seed}" for side in sides)
        for seed in seeds
    ]
    return [(first, second) for first, second in pairs if first in runs and second in runs]


def objects_by_length(data: Path, out: Path) -> list[list[tuple[int, int, int, int]]]:
    """Count objects of captions cut after 1, 2, ... words: by image (absent, named, present among them, there).

    Each object counts once, so a caption that says again what is clear names nothing more.
    """
    captions = read_eval_captions(out)
    truth = data_truth(data, list(captions))
    vocabulary = vocabulary_of(truth)
    located = {image: located_mentions(text, vocabulary) for image, text in sorted(captions.items())}
    counts = []
    for length in range(1, 1 + max(len(text.split()) for text in captions.values())):
        named = {image: {name for _, end, name in rows if end <= length} for image, rows in located.items()}
        there = truth.objects
        counts.append([(len(n - there[i]), len(n), len(n & there[i]), len(there[i])) for i, n in named.items()])
    return counts


def at_equal_recall(pooled: Sequence[tuple[Path, Path, Path]]) -> dict[str, Any]:
    """Compare the share of absent objects where both runs of each pair have the recall that both reach.

    All captions of a run are cut after the same number of words, the smallest at which it has that recall.

    Args:
        pooled: (data, first run, second run) of each pair.
    """
    sides: tuple[list[list[Ratio]], list[list[Ratio]]] = ([], [])
    cuts = []
    for data, *outs in pooled:
        curves = [objects_by_length(data, out) for out in outs]
        recalls = [[sum(row[2] for row in rows) / sum(row[3] for row in rows) for rows in curve] for curve in curves]
        shared = min(max(side) for side in recalls)
        words = [next(n for n, recall in enumerate(side) if recall >= shared) for side in recalls]
        cuts.append(
            {"words": [n + 1 for n in words], "recall": [side[n] for side, n in zip(recalls, words, strict=True)]}
        )
        for side, curve, n in zip(sides, curves, words, strict=True):
            side.append([(absent, named) for absent, named, _, _ in curve[n]])
    return {**rate_difference(*sides), "cuts": cuts}


def answers_by_size(data: Path, out: Path) -> dict[str, Ratio]:
    """Return (right, asked) by image for the adversarial questions, by the size of the largest object asked about."""
    drawn, numbers = scenes_of(data)
    categories = read_json(data / "annotations" / "instances_val2014.json")["categories"]
    names = {question_text(category["name"]): category["name"] for category in categories}

    def group_of(record: Mapping[str, Any]) -> tuple[str, bool]:
        name = names[record["question"]]
        objects = drawn[numbers[record["image"]]].objects
        size = max((item.size for item in objects if item.name == name), default=0)
        return next(g for g, (low, high) in SIZES.items() if low < size <= high or low == size == high), size > 0

    ratios: dict[str, dict[str, list[bool]]] = {group: {image: [] for image in numbers} for group in SIZES}
    for record in read_records(out / "pope_adversarial.jsonl"):
        group, present = group_of(record)
        ratios[group][record["image"]].append(record["answer"].strip().lower().startswith("yes") == present)
    return {group: [(sum(r), len(r)) for r in by_image.values()] for group, by_image in ratios.items()}


def chair_by_third(data: Path, out: Path) -> dict[str, Ratio]:
    """Return (absent, named) objects by image, for the thirds of each caption's characters."""
    captions = read_eval_captions(out)
    truth = data_truth(data, list(captions))
    vocabulary = vocabulary_of(truth)
    ratios: dict[str, list[tuple[int, int]]] = {third: [] for third in THIRDS}
    for image in sorted(captions):
        text, counts = captions[image], {third: [0, 0] for third in THIRDS}
        for mention in mentions(text, vocabulary):
            count = counts[THIRDS[min(2, 3 * mention.start // len(text))]]
            count[0] += mention.object not in truth.objects[image]
            count[1] += 1
        for third, (absent, named) in counts.items():
            ratios[third].append((absent, named))
    return dict(ratios)


def corrected(data: Path, out: Path) -> dict[str, tuple[str, str]]:
    """Return, by image, each caption that names an absent object, corrected, and as it is.

    An absent object is exchanged for a present one that the caption does not name; where none is left, its sentence
    goes.
    """
    captions = read_eval_captions(out)
    truth = data_truth(data, list(captions))
    vocabulary = vocabulary_of(truth)
    pairs = {}
    for image, text in captions.items():
        named = mentions(text, vocabulary)
        unnamed = sorted(truth.objects[image] - {mention.object for mention in named})
        better = text
        for mention in reversed([m for m in named if m.object not in truth.objects[image]]):  # spans before it stay
            if unnamed:
                better = exchanged(better, mention.start, mention.end, unnamed.pop())
            else:
                start = better.rfind(". ", 0, mention.start) + 2 if ". " in better[: mention.start] else 0
                end = better.find(". ", mention.end)
                better = better[:start] + (better[end + 2 :] if end >= 0 else "")
        if better != text and better.strip():
            pairs[image] = better.strip(), text
    return pairs


def exchanged(text: str, start: int, end: int, name: str) -> str:
    """Return the text with the words from `start` to `end`, and an article before them, exchanged for a name."""
    article = re.search(r"(?i)\b(an?) $", text[:start])
    if article is None:
        return text[:start] + plural(name) + text[end:]
    words = ("an " if name[0] in "aeiou" else "a ") + name
    if text[article.start()].isupper():
        words = words.capitalize()
    return text[: article.start()] + words + text[end:]


def scenes_of(data: Path) -> tuple[list[Scene], dict[str, int]]:
    """Return a split's scenes, and their numbers by the name of the picture."""
    drawn = [Scene.from_json(record) for record in read_json(data / "scenes.json")]
    images = read_json(data / "annotations" / "instances_val2014.json")["images"]
    return drawn, {image["file_name"]: number for number, image in enumerate(images)}


# ----------------------------------------------------------------------------------------------------
# Tables and plots


def percent(value: float | None, digits: int = 1) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}"


def signed(found: Mapping[str, Any], scale: float = 100) -> str:
    if found["difference"] is None:
        return "–"
    low, high = found["ci"]
    return f"{scale * found['difference']:+.1f} [{scale * low:+.1f}, {scale * high:+.1f}]".replace("-", "−")


def print_tables(result: Mapping[str, Any]) -> None:
    print("| run | random | popular | adversarial | yes ratio | CHAIR_i | CHAIR_s | recall | words | repeated |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name, row in result["rows"].items():
        print(f"| {name} | " + " | ".join(f"{v:.1f}" if k == "length" else percent(v) for k, v in row.items()) + " |")
    print("\n| second − first | runs | adversarial | CHAIR_i | recall | words |\n|---|---|---|---|---|---|")
    for title, row in result["contrasts"].items():
        cells = [signed(row[key]) for key in ("adversarial", "chair_i", "recall")]
        print(f"| {title} | {row['runs']} | {' | '.join(cells)} | {signed(row['length'], 1)} |")
    for title, row in result["contrasts"].items():
        if "at equal recall" in row:
            found = row["at equal recall"]
            print(f"\n{title}: absent objects at equal recall {signed(found)}; {found['cuts']}")
    for what in ("right answers by size", "CHAIR_i by third of the caption"):
        groups = list(next(iter(result[what].values())))
        print(f"\n| {what} | " + " | ".join(groups) + " |\n|---|" + "---|" * len(groups))
        for name, row in result[what].items():
            print(f"| {name} | " + " | ".join(percent(row[group]) for group in groups) + " |")
        for title, row in result["contrasts"].items():
            if title in CONTRASTS:
                print(f"| {title} | " + " | ".join(signed(row[what][group]) for group in groups) + " |")


def plot(result: Mapping[str, Any], work: Path, file: Path) -> None:
    """Draw what each stage knows by size of the object, CHAIR_i by what can be seen, and the preference at its recall.

    Args:
        work: folder with results/probe.json.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    groups = list(SIZES)[1:]
    for (name, row), style in zip(
        read_json(work / "results" / "probe.json")["auc"].items(), PROBE_STYLES, strict=False
    ):
        left.plot(groups, [row[group] for group in groups], style, label=name, ms=5)
    left.set(ylabel="AUC, present against absent", title="What is known, by size of the object")
    left.legend(fontsize=8, loc="lower right")
    for place, (name, (_, color)) in enumerate(LOOKS.items()):
        values = [100 * row["chair_i"] for row in rows_of(result, name)]
        middle.bar(place, sum(values) / len(values), color=color, width=0.7)
        middle.plot([place] * len(values), values, "k.", ms=4)
        middle.annotate(
            f"{sum(values) / len(values):.1f}", (place, max(values)), (0, 4), textcoords="offset points", ha="center"
        )
    middle.set_xticks(range(len(LOOKS)), [label for label, _ in LOOKS.values()], fontsize=8)
    middle.set(ylabel="CHAIR_i, %", title="Absent objects in captions", ylim=(0, 60))
    kinds = sorted({variant_of(name) for name in result["rows"] if name.startswith(("nll", "dpo"))}, reverse=True)
    for name in kinds:
        rows = rows_of(result, name)
        points = [[100 * row[key] for row in rows] for key in ("recall", "chair_i")]
        right.plot(*points, "o" if name.startswith("nll") else "s", ms=6, label=name)
    right.margins(x=0.2, y=0.15)
    right.set(xlabel="recall, %", ylabel="CHAIR_i, %", title="A fifth of the chosen objects false", ylim=(0, None))
    right.legend(fontsize=8, loc="lower left")
    figure.savefig(file, dpi=100)


def rows_of(result: Mapping[str, Any], variant: str) -> list[Mapping[str, Any]]:
    return [row for name, row in result["rows"].items() if variant_of(name) == variant]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, nargs="+", help="of one base each")
    parser.add_argument("--split", nargs="+", default=["test"], help="one for all, or one for each")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    splits = options.split * (len(options.work) if len(options.split) == 1 else 1)
    studies = [(w / "data" / s, w / "eval" / s) for w, s in zip(options.work, splits, strict=True)]
    found = analyse(studies)
    print_tables(found)
    write_json(options.work[-1] / "analysis.json", found)
    if options.plot:
        plot(found, options.work[0], options.plot)
