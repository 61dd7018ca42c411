"""Reports as self-contained HTML files, rendered by the templates beside this file; the demo's page."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

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
# What all pages share. Names, questions and answers are untrusted text: the templates escape them.

NOTHING = "–"  # in place of a ratio of nothing
THUMBNAIL = 240  # pixels of the longer side
Spans = list[tuple[str, bool]]  # a text in pieces, and whether a piece is wrong

_ENVIRONMENT = Environment(
    loader=PackageLoader("relook.report"),
    autoescape=True,
    undefined=StrictUndefined,  # a misspelt name is an error, not a gap in the page
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.globals["NOTHING"] = NOTHING


def render(template: str, **values: Any) -> str:
    """Fill in a template of `relook/report/templates` and return the HTML."""
    return _ENVIRONMENT.get_template(template).render(values)


def mark_absent(text: str, present: Collection[str], vocabulary: Vocabulary) -> Spans:
    """Cut a caption at the words for objects that are not present, which are the wrong spans."""
    spans, end = [], 0
    for mention in mentions(text, vocabulary):
        if mention.object not in present:
            spans += [(text[end : mention.start], False), (text[mention.start : mention.end], True)]
            end = mention.end
    return [*spans, (text[end:], False)]


def described(
    present: Collection[str], captions: Iterable[tuple[str, str]], vocabulary: Vocabulary
) -> list[tuple[str, Spans]]:
    """Return the objects on a picture, then each model's caption by its name, words for absent objects marked."""
    marked = [(name, mark_absent(text, present, vocabulary)) for name, text in captions]
    return [("there is", [(", ".join(sorted(present)), False)]), *marked]


def thumbnail(path: Path) -> dict[str, str]:
    """Return a small copy of an image file as a data URL (`source`), or why it cannot be read (`fault`)."""
    try:
        image = open_image(path)
    except DataError as error:
        return {"fault": error.problem}
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return {"fault": "", "source": data_url(buffer.getvalue())}


def data_url(content: bytes, kind: str = "jpeg") -> str:
    """Write an image file's bytes as a URL."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


# ----------------------------------------------------------------------------------------------------

PICTURES = 12
LOOKING = "post_decoder"  # the run whose attention is shown


def write_demo_page(out: Path) -> Path:
    """Write `out/report.html` from a finished demo folder."""
    results = read_json(out / "results.json")
    runs = list(results["runs"])
    page = render(
        "demo.html.j2",
        title="relook demo",
        splits=SPLITS,
        scores={"base": results["base"], **results["runs"]},
        differences={**results["paired"], "post_decoder − nll_control": results["against_control"]},
        curves=curves({regime: read_json(out / "runs" / regime / "run.json")["log"] for regime in runs}),
        cards=list(itertools.islice(gallery(out, out / "world" / "test", runs), PICTURES)),
        provenance=results["provenance"],
    )
    write_text(out / "report.html", page)
    return out / "report.html"


def gallery(out: Path, folder: Path, runs: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the pictures on which the base hallucinates: all captions, and where the post decoder looked."""
    annotations = read_coco(instances_file(folder))
    vocabulary = vocabulary_of(annotations)
    answers = {name: read_eval_captions(out / "eval" / "test" / name) for name in ("base", *runs)}
    loaded = load_model(out / "runs" / LOOKING)
    for image, text in answers["base"].items():
        present = annotations.objects[image]
        wrong = [mention for mention in mentions(text, vocabulary) if mention.object not in present]
        if not wrong:
            continue
        path = coco_images(folder) / image
        turns = [Turn(with_image(CHAIR_PROMPT), text)]
        grids = attention_before(loaded, path, turns, [mention.start for mention in wrong])
        words = [text[mention.start : mention.end] for mention in wrong]
        yield {
            "source": data_url(path.read_bytes()),
            "texts": described(present, [(name, texts[image]) for name, texts in answers.items()], vocabulary),
            "maps": list(zip(grids, words, strict=False)),  # no grids where the model has no cross-attention
        }


# ----------------------------------------------------------------------------------------------------
# `relook report`: which page a folder gets. Nothing that trains is imported for it.

RESULTS_FILE = "results.json"  # of a demo and of a sweep


def write_report(out: str | Path) -> Path:
    """Write `report.html` from a demo's files, or a sweep's."""
    out = Path(out)
    from relook.report import sweep_page  # which imports this module

    if not (out / RESULTS_FILE).exists():
        raise RecipeError(f"{out} holds no finished demo.", f"Run `relook demo --out {out}` first.")
    from relook.sweep_config import SWEEP_FILE

    if (out / SWEEP_FILE).exists():
        return sweep_page.write_sweep_page(out)
    return write_demo_page(out)


def write_reports(
    folders: Sequence[str | Path], out: str | Path | None = None, data: str | Path | None = None
) -> list[Path]:
    """Write the report of two `relook eval` folders side by side, or that of each demo and sweep."""
    from relook.report.comparison import write_comparison

    evaluations = [(Path(folder) / EVAL_FILE).exists() for folder in folders]
    if not any(evaluations):
        return [write_report(folder) for folder in folders]
    if evaluations != [True, True]:
        raise RecipeError("Evaluations are compared two at a time.", "Give two output folders of `relook eval`.")
    return [write_comparison(folders[0], folders[1], out, data)]
