"""The demo's report: one self-contained HTML file, made from the demo's files alone."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from relook.data.annotations import read_coco
from relook.data.images import open_image
from relook.data.paths import coco_images
from relook.data.samples import Turn
from relook.data.templates import with_image
from relook.errors import DataError, RecipeError
from relook.evaluate.results import EVAL_FILE
from relook.evaluate.tasks.chair import (
    CHAIR_PROMPT,
    Vocabulary,
    instances_file,
    mentions,
    read_eval_captions,
    vocabulary_of,
)
from relook.evaluate.tasks.pope import SPLITS
from relook.files import read_json, write_text
from relook.model.load import load_model
from relook.report.plots import attention_before, curves

# ----------------------------------------------------------------------------------------------------
# What the reports' HTML files are made of. Names, questions and answers are untrusted text: they are escaped here.

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1400px;margin:2em auto;padding:0 1em;color:#1c2330}
table{border-collapse:collapse;margin:1em 0;font-size:14px}
td{white-space:nowrap}td,th{padding:.35em .7em;border-bottom:1px solid #dde2ea;text-align:right}
td:first-child,th:first-child{text-align:left}small{color:#6a7486}th{vertical-align:bottom}
.card{display:grid;grid-template-columns:190px 1fr;gap:1em;border-top:1px solid #dde2ea;padding:1em 0}
.card p{margin:.2em 0;padding-left:12em;display:flow-root}
.card p b{float:left;margin-left:-12em;max-width:11.5em;overflow-wrap:anywhere;font-weight:600;color:#44506a}
.card td,.card th,.wrap td,.wrap th{white-space:normal;text-align:left;overflow-wrap:anywhere}.card table{margin:0}
mark{background:#ffd2cf;color:#a3140c;padding:0 .2em;border-radius:3px}
.wrong{color:#a3140c}.right{color:#1a7a3c}.card small{overflow-wrap:anywhere}.card img{width:180px}
svg.picture{width:180px;height:180px;image-rendering:pixelated}.maps{display:flex;gap:.8em;flex-wrap:wrap;margin-top:.6em}
.maps figure{margin:0}.maps svg{width:110px;height:110px}
figcaption{font-size:13px;color:#44506a}svg{max-width:100%;height:auto}
"""
THUMBNAIL = 240  # pixels of the longer side


def document(title: str, sections: Sequence[str]) -> str:
    """A whole HTML file."""
    head = f"<meta charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    return f"<!doctype html><html lang=en>{head}{''.join(sections)}</html>"


def table(cells: Sequence[Sequence[str]]) -> str:
    """A table of HTML cells; the first line is the head."""
    head, *lines = cells
    return f"<table>{_row(head, 'th')}{''.join(_row(line, 'td') for line in lines)}</table>"


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"


NOTHING = "–"  # in place of a ratio of nothing


def format_percent(value: float | None, interval: Sequence[float] | None = None) -> str:
    """A fraction in percent, and its interval in brackets, as HTML."""
    return format_number(value, interval, 100)


def format_number(
    value: float | None, interval: Sequence[float] | None = None, scale: float = 1, sign: str = ""
) -> str:
    """A number, and its interval in brackets, as HTML; `sign` "+" is also written where it is positive.

    None is a ratio of nothing.
    """
    if value is None:
        return NOTHING
    text, *ends = (f"{scale * part:{sign}.1f}" for part in (value, *(interval or ())))
    return f"{text} <small>[{ends[0]}, {ends[1]}]</small>" if ends else text


def mark_absent(text: str, there: Collection[str], vocabulary: Vocabulary) -> str:
    """A caption as HTML, the words for objects that are not there marked."""
    parts, last = [], 0
    for mention in mentions(text, vocabulary):
        if mention.object not in there:
            parts += [
                html.escape(text[last : mention.start]),
                f"<mark>{html.escape(text[mention.start : mention.end])}</mark>",
            ]
            last = mention.end
    return "".join(parts) + html.escape(text[last:])


def card(picture: str, content: str) -> str:
    """A picture and what is said of it, both HTML, side by side."""
    return f"<div class=card><div>{picture}</div><div>{content}</div></div>"


def described(there: Collection[str], captions: Iterable[tuple[str, str]], vocabulary: Vocabulary) -> str:
    """What is on a picture, and what each model, by name, says of it, words for absent objects marked, as HTML."""
    said = [(name, mark_absent(text, there, vocabulary)) for name, text in captions]
    return lines([("there is", html.escape(", ".join(sorted(there)))), *said])


def lines(named: Iterable[tuple[str, str]]) -> str:
    """Lines of HTML, each under the name of what it is."""
    return "".join(f"<p><b>{html.escape(name)}</b>{line}</p>" for name, line in named)


def thumbnail(path: Path) -> str:
    """A small copy of an image file as an HTML element; words where it cannot be read."""
    try:
        image = open_image(path)
    except DataError as error:
        return f"<small>{html.escape(error.problem)}</small>"
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def image_svg(data: bytes, grid: Sequence[Sequence[float]] | None = None, kind: str = "jpeg") -> str:
    """An image file's bytes as an inline SVG, with an attention grid laid over it."""
    source = base64.b64encode(data).decode()
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
        f'href="data:image/{kind};base64,{source}"/>{cells}</svg>'
    )


# ----------------------------------------------------------------------------------------------------

PICTURES = 12
LOOKING = "post_decoder"  # the run whose attention is shown


def write_demo_page(out: Path) -> Path:
    """Write `out/report.html` from a finished demo folder."""
    results = read_json(out / "results.json")
    data = out / "world" / "test"
    sections = [
        "<h1>relook: fewer things that are not there</h1>",
        f"<p>Toyworld, seed {results['provenance']['seed']}: {results['base']['chair']['n']} test scenes that no "
        "training or choice has seen. Numbers in brackets are 95 % intervals from a bootstrap over images.</p>",
        "<h2>Results</h2>",
        score_table(results),
        "<h2>Difference to the base, on the same pictures</h2>",
        "<p>The last row is what the preference term adds to training on the chosen texts alone.</p>",
        difference_table(results),
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


def score_table(results: Mapping[str, Any]) -> str:
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
        cells = [format_percent(pope[split]["accuracy"], pope[split]["accuracy_ci"]) for split in SPLITS]
        cells += [format_percent(pope["adversarial"]["yes_ratio"]), _unclear(pope)]
        cells.append(format_percent(chair["chair_i"], chair["chair_i_ci"]))
        cells += [format_percent(chair["chair_s"]), format_percent(chair["recall"], chair["recall_ci"])]
        cells += [f"{chair['length']:.1f}", format_percent(chair["empty"])]
        rows.append([name, *cells])
    return table(rows)


def _unclear(pope: Mapping[str, Any]) -> str:
    """Unclear answers of all splits; empty for results of earlier versions, which did not count them."""
    counts = [pope[split].get("unclear") for split in SPLITS]
    return "" if None in counts else str(sum(counts))


def difference_table(results: Mapping[str, Any]) -> str:
    heads = ["", *(f"POPE {split}" for split in SPLITS), "McNemar p,<br>adversarial", "CHAIR<sub>i</sub>", "recall"]
    rows = [heads]
    for name, found in {**results["paired"], "post_decoder − nll_control": results["against_control"]}.items():
        pope = found["pope"]
        cells = [format_percent(pope[split]["difference"], pope[split]["ci"]) for split in SPLITS]
        cells.append(f"{pope['adversarial']['mcnemar_p']:.2g}")
        cells += [
            format_percent(found["chair"][key]["difference"], found["chair"][key]["ci"])
            for key in ("chair_i", "recall")
        ]
        rows.append([name, *cells])
    return table(rows)


def gallery(out: Path, folder: Path, runs: Sequence[str]) -> str:
    """Pictures with the captions of base and runs, hallucinated words marked, and where the post decoder looked."""
    annotations = read_coco(instances_file(folder))
    vocabulary = vocabulary_of(annotations)
    said = {name: read_eval_captions(out / "eval" / "test" / name) for name in ("base", *runs)}
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
            f"<figure>{image_svg(data, grid)}<figcaption>before “{html.escape(text[m.start : m.end])}”</figcaption>"
            "</figure>"
            for m, grid in zip(wrong, maps, strict=False)
        )
        cards.append(card(image_svg(data), f"{lines}<div class=maps>{figures}</div>"))
        if len(cards) == PICTURES:
            break
    return "".join(cards)


# ----------------------------------------------------------------------------------------------------
# `relook report`: which page a folder gets. Nothing that trains is imported for it.

RESULTS_FILE = "results.json"  # of a demo and of a sweep


def write_report(out: str | Path) -> Path:
    """Write `report.html` from a demo's files, or a sweep's."""
    out = Path(out)
    from relook.report import sweep_page

    if not (out / RESULTS_FILE).exists():
        raise RecipeError(f"{out} holds no finished demo.", f"Run `relook demo --out {out}` first.")
    from relook.sweep_config import SWEEP_FILE

    if (out / SWEEP_FILE).exists():
        return sweep_page.write_sweep_page(out)
    return write_demo_page(out)


def write_reports(
    folders: Sequence[str | Path], out: str | Path | None = None, data: str | Path | None = None
) -> list[Path]:
    """The report of two `relook eval` folders side by side, or that of each demo and sweep."""
    from relook.report.comparison import write_comparison

    evaluations = [(Path(folder) / EVAL_FILE).exists() for folder in folders]
    if not any(evaluations):
        return [write_report(folder) for folder in folders]
    if evaluations != [True, True]:
        raise RecipeError("Evaluations are compared two at a time.", "Give two output folders of `relook eval`.")
    return [write_comparison(folders[0], folders[1], out, data)]
