"""The demo's report: one self-contained HTML file, made from the demo's files alone."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relook.data.coco import read_coco
from relook.data.places import coco_images
from relook.data.prompts import with_image
from relook.data.samples import Turn
from relook.evaluate.benchmarks import CHAIR_PROMPT
from relook.evaluate.chair import mentions, vocabulary_of
from relook.evaluate.compare import captions
from relook.evaluate.pope import SPLITS
from relook.evaluate.score import annotation_file
from relook.files import read_json, write_text
from relook.model.load import load_model
from relook.report.attention import attention_before
from relook.report.parts import card, described, document, percent, picture, table
from relook.report.plots import curves

PICTURES = 12
LOOKING = "post_decoder"  # the run whose attention is shown


def write_page(out: Path) -> Path:
    """Write `out/report.html` from a finished demo folder."""
    results = read_json(out / "results.json")
    data = out / "world" / "test"
    sections = [
        "<h1>relook: fewer things that are not there</h1>",
        f"<p>Toyworld, seed {results['provenance']['seed']}: {results['base']['chair']['n']} test scenes that no "
        "training or choice has seen. Numbers in brackets are 95 % intervals from a bootstrap over images.</p>",
        "<h2>Results</h2>",
        scores(results),
        "<h2>Difference to the base, on the same pictures</h2>",
        "<p>The last row is what the preference term adds to training on the chosen texts alone.</p>",
        differences(results),
        "<h2>Training</h2>",
        curves({regime: read_json(out / "runs" / regime / "run.json")["log"] for regime in results["runs"]}),
        "<h2>Pictures</h2>",
        "<p>The first test pictures on which the base names something that is not there; such words are marked. The "
        "maps show where the post decoder looks at the moment when the base says the marked word.</p>",
        gallery(out, data, list(results["runs"])),
        f"<p><small>{html.escape(str(results['provenance']))}</small></p>",
    ]
    write_text(out / "report.html", document("relook demo", sections))
    return out / "report.html"


def scores(results: Mapping[str, Any]) -> str:
    """POPE and CHAIR of the base and of every run."""
    heads = ["", *(f"POPE {split}<br>accuracy" for split in SPLITS), "yes ratio,<br>adversarial"]
    heads += [
        "unclear<br>answers",
        "CHAIR<sub>i</sub>",
        "CHAIR<sub>s</sub>",
        "recall",
        "length,<br>words",
        "no mention",
    ]
    rows = [heads]
    for name, found in {"base": results["base"], **results["runs"]}.items():
        pope, chair = found["pope"], found["chair"]
        cells = [percent(pope[split]["accuracy"], pope[split]["accuracy_ci"]) for split in SPLITS]
        cells += [percent(pope["adversarial"]["yes_ratio"]), _unclear(pope)]
        cells.append(percent(chair["chair_i"], chair["chair_i_ci"]))
        cells += [percent(chair["chair_s"]), percent(chair["recall"], chair["recall_ci"])]
        cells += [f"{chair['length']:.1f}", percent(chair["empty"])]
        rows.append([name, *cells])
    return table(rows)


def _unclear(pope: Mapping[str, Any]) -> str:
    """Unclear answers of all splits; empty for results of earlier versions, which did not count them."""
    counts = [pope[split].get("unclear") for split in SPLITS]
    return "" if None in counts else str(sum(counts))


def differences(results: Mapping[str, Any]) -> str:
    heads = ["", *(f"POPE {split}" for split in SPLITS), "McNemar p,<br>adversarial", "CHAIR<sub>i</sub>", "recall"]
    rows = [heads]
    for name, found in {**results["paired"], "post_decoder − nll_control": results["against_control"]}.items():
        pope = found["pope"]
        cells = [percent(pope[split]["difference"], pope[split]["ci"]) for split in SPLITS]
        cells.append(f"{pope['adversarial']['mcnemar_p']:.2g}")
        cells += [
            percent(found["chair"][key]["difference"], found["chair"][key]["ci"]) for key in ("chair_i", "recall")
        ]
        rows.append([name, *cells])
    return table(rows)


def gallery(out: Path, folder: Path, runs: Sequence[str]) -> str:
    """Pictures with the captions of base and runs, hallucinated words marked, and where the post decoder looked."""
    annotations = read_coco(annotation_file(folder))
    vocabulary = vocabulary_of(annotations)
    said = {name: captions(out / "eval" / "test" / name) for name in ("base", *runs)}
    looking = load_model(out / "runs" / LOOKING)
    cards = []
    for image, text in said["base"].items():
        wrong = [m for m in mentions(text, vocabulary) if m.object not in annotations.objects[image]]
        if not wrong:
            continue
        path = coco_images(folder) / image
        data = path.read_bytes()
        turns = [Turn(with_image(CHAIR_PROMPT), text)]
        maps = attention_before(looking, path, turns, [mention.start for mention in wrong])
        there = annotations.objects[image]
        lines = described(there, [(name, texts[image]) for name, texts in said.items()], vocabulary)
        figures = "".join(
            f"<figure>{picture(data, grid)}<figcaption>before “{html.escape(text[m.start : m.end])}”</figcaption>"
            "</figure>"
            for m, grid in zip(wrong, maps, strict=False)
        )
        cards.append(card(picture(data), f"{lines}<div class=maps>{figures}</div>"))
        if len(cards) == PICTURES:
            break
    return "".join(cards)
