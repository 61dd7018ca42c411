"""The demo's report: one self-contained HTML file, made from the demo's files alone."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relook.data.coco import Annotations, read_coco
from relook.evaluate.benchmarks import CHAIR_PROMPT
from relook.evaluate.chair import Vocabulary, mentions, vocabulary_of
from relook.evaluate.compare import captions
from relook.evaluate.pope import SPLITS
from relook.evaluate.score import annotation_file
from relook.files import read_json, write_text
from relook.model.load import load_model
from relook.report.attention import attention_before
from relook.report.plots import curves

PICTURES = 12
LOOKING = "post_decoder"  # the run whose attention is shown
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1400px;margin:2em auto;padding:0 1em;color:#1c2330}
table{border-collapse:collapse;margin:1em 0;font-size:14px}
td{white-space:nowrap}td,th{padding:.35em .7em;border-bottom:1px solid #dde2ea;text-align:right}
td:first-child,th:first-child{text-align:left}small{color:#6a7486}th{vertical-align:bottom}
.card{display:grid;grid-template-columns:190px 1fr;gap:1em;border-top:1px solid #dde2ea;padding:1em 0}
.card p{margin:.2em 0;padding-left:11em}.card b{float:left;margin-left:-11em;font-weight:600;color:#44506a}
mark{background:#ffd2cf;color:#a3140c;padding:0 .2em;border-radius:3px}
svg.picture{width:180px;height:180px;image-rendering:pixelated}.maps{display:flex;gap:.8em;flex-wrap:wrap;margin-top:.6em}
.maps figure{margin:0}.maps svg{width:110px;height:110px}
figcaption{font-size:13px;color:#44506a}svg{max-width:100%;height:auto}
"""


def write_page(out: Path) -> Path:
    """Write `out/report.html` from a finished demo folder."""
    results = read_json(out / "results.json")
    data = out / "world" / "test"
    sections = [
        "<h1>relook: fewer things that are not there</h1>",
        f"<p>Toyworld, seed {results['provenance']['seed']}: {results['base']['chair']['n']} test scenes that no "
        "training or choice has seen. Numbers in brackets are 95 % intervals from a bootstrap over images.</p>",
        "<h2>Results</h2>",
        table(results),
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
    head = f"<meta charset=utf-8><title>relook demo</title><style>{STYLE}</style>"
    write_text(out / "report.html", f"<!doctype html><html lang=en>{head}{''.join(sections)}</html>")
    return out / "report.html"


def percent(value: float, interval: Sequence[float] | None = None) -> str:
    text = f"{100 * value:.1f}"
    return text if interval is None else f"{text} <small>[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]</small>"


def table(results: Mapping[str, Any]) -> str:
    """POPE and CHAIR of the base and of every run."""
    heads = ["", *(f"POPE {split}<br>accuracy" for split in SPLITS), "yes ratio,<br>adversarial"]
    heads += ["CHAIR<sub>i</sub>", "CHAIR<sub>s</sub>", "recall", "length,<br>words", "no mention"]
    rows = []
    for name, scores in {"base": results["base"], **results["runs"]}.items():
        pope, chair = scores["pope"], scores["chair"]
        cells = [percent(pope[split]["accuracy"], pope[split]["accuracy_ci"]) for split in SPLITS]
        cells += [percent(pope["adversarial"]["yes_ratio"]), percent(chair["chair_i"], chair["chair_i_ci"])]
        cells += [percent(chair["chair_s"]), percent(chair["recall"], chair["recall_ci"])]
        cells += [f"{chair['length']:.1f}", percent(chair["empty"])]
        rows.append(_row([name, *cells]))
    return f"<table>{_row(heads, 'th')}{''.join(rows)}</table>"


def differences(results: Mapping[str, Any]) -> str:
    heads = ["", *(f"POPE {split}" for split in SPLITS), "McNemar p,<br>adversarial", "CHAIR<sub>i</sub>", "recall"]
    rows = []
    for name, found in {**results["paired"], "post_decoder − nll_control": results["against_control"]}.items():
        pope = found["pope"]
        cells = [percent(pope[split]["difference"], pope[split]["ci"]) for split in SPLITS]
        cells.append(f"{pope['adversarial']['mcnemar_p']:.2g}")
        cells += [
            percent(found["chair"][key]["difference"], found["chair"][key]["ci"]) for key in ("chair_i", "recall")
        ]
        rows.append(_row([name, *cells]))
    return f"<table>{_row(heads, 'th')}{''.join(rows)}</table>"


def _row(cells: Sequence[str], tag: str = "td") -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


def gallery(out: Path, data: Path, runs: Sequence[str]) -> str:
    """Pictures with the captions of base and runs, hallucinated words marked, and where the post decoder looked."""
    annotations = read_coco(annotation_file(data))
    vocabulary = vocabulary_of(annotations)
    said = {name: captions(out / "eval" / "test" / name) for name in ("base", *runs)}
    looking = load_model(out / "runs" / LOOKING)
    cards = []
    for image, text in said["base"].items():
        wrong = [m for m in mentions(text, vocabulary) if m.object not in annotations.objects[image]]
        if not wrong:
            continue
        path = data / "val2014" / image
        maps = attention_before(looking, path, CHAIR_PROMPT, text, [mention.start for mention in wrong])
        lines = [f"<p><b>there is</b>{', '.join(sorted(annotations.objects[image]))}</p>"]
        lines += [f"<p><b>{name}</b>{marked(said[name][image], image, annotations, vocabulary)}</p>" for name in said]
        figures = "".join(
            f"<figure>{picture(path, grid)}<figcaption>before “{text[m.start : m.end]}”</figcaption></figure>"
            for m, grid in zip(wrong, maps, strict=False)
        )
        cards.append(f"<div class=card>{picture(path)}<div>{''.join(lines)}<div class=maps>{figures}</div></div></div>")
        if len(cards) == PICTURES:
            break
    return "".join(cards)


def marked(text: str, image: str, annotations: Annotations, vocabulary: Vocabulary) -> str:
    """A caption as HTML, the words for absent objects marked."""
    parts, last = [], 0
    for mention in mentions(text, vocabulary):
        if mention.object not in annotations.objects[image]:
            parts += [
                html.escape(text[last : mention.start]),
                f"<mark>{html.escape(text[mention.start : mention.end])}</mark>",
            ]
            last = mention.end
    return "".join(parts) + html.escape(text[last:])


def picture(path: Path, grid: Sequence[Sequence[float]] | None = None) -> str:
    """An image file as an inline SVG, with an attention grid laid over it."""
    source = base64.b64encode(path.read_bytes()).decode()
    cells = ""
    if grid:
        most, side = max(map(max, grid)), len(grid)
        cells = "<rect width=1 height=1 fill=#000 opacity=.35 />" + "".join(
            f'<rect x="{x / side:.4f}" y="{y / side:.4f}" width="{1 / side:.4f}" height="{1 / side:.4f}" '
            f'fill="#ffb000" opacity="{0.75 * weight / most:.2f}"/>'
            for y, line in enumerate(grid)
            for x, weight in enumerate(line)
        )
    return (
        '<svg class=picture viewBox="0 0 1 1"><image width="1" height="1" preserveAspectRatio="none" '
        f'href="data:image/jpeg;base64,{source}"/>{cells}</svg>'
    )
