"""Reports as self-contained HTML files: what all pages share, and which page a folder gets."""

from __future__ import annotations

import base64
import io
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from relook.data.images import open_image
from relook.errors import DataError, RecipeError
from relook.evaluate.results import EVAL_FILE
from relook.evaluate.tasks.chair import Vocabulary, mentions
from relook.report.tables import bracket, change, decimal, is_clear, p_value, verdict
from relook.report.terms import GLOSSARY

# ----------------------------------------------------------------------------------------------------
# What all pages share. Names, questions and answers are untrusted text: the templates escape them.

THUMBNAIL = 240  # pixels of the longer side
Spans = list[tuple[str, bool]]  # a text in pieces, and whether a piece is wrong
NO_BREAK = "\N{NO-BREAK SPACE}"
HEAT_SIDE, HEAT_LEVELS, HEAT_COLOR = 64, 32, (214, 0, 110)
HEAT_OPACITY = 0.8  # of the strongest place
HEAT_PEAK = 4  # times the mean that a place has at least to be so opaque

ENVIRONMENT = Environment(
    loader=PackageLoader("relook.report"),
    autoescape=True,
    undefined=StrictUndefined,  # a misspelt name is an error, not a gap in the page
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **values: Any) -> str:
    """Fill in a template of `relook/report/templates` and return the HTML."""
    return ENVIRONMENT.get_template(template).render(values)


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
    return [("In the picture", [(", ".join(sorted(present)), False)]), *marked]


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


def heat(grid: Sequence[Sequence[float]]) -> str:
    """Draw a grid of weights as a smooth layer to lay over a picture, and return its data URL.

    The layer has one colour; the stronger a place, the more opaque, and the strongest place is the same in every layer
    that has one: an even layer stays faint. Places without weight leave the picture as it is.
    """
    weights = np.asarray(grid, np.float32)
    # Bicubic interpolation overshoots a little on both sides.
    smooth = np.asarray(Image.fromarray(weights).resize((HEAT_SIDE, HEAT_SIDE), Image.Resampling.BICUBIC))
    most = max(float(smooth.max()), HEAT_PEAK * float(weights.mean()), 1e-12)
    levels = (smooth.clip(0) / most * (HEAT_LEVELS - 1)).round().astype(np.uint8)
    layer = Image.fromarray(levels, "P")
    layer.putpalette(HEAT_COLOR * HEAT_LEVELS)
    opacity = bytes(round(255 * HEAT_OPACITY * level / (HEAT_LEVELS - 1)) for level in range(HEAT_LEVELS))
    buffer = io.BytesIO()
    layer.save(buffer, "PNG", transparency=opacity, optimize=True)
    return data_url(buffer.getvalue(), "png")


def facts(value: Any) -> list[tuple[str, Any]] | str:
    """Turn nested values into what a list shows: (name, facts) lines of a mapping, and a text of anything else."""
    if isinstance(value, Mapping):
        return [(str(key).replace("_", " "), facts(part)) for key, part in value.items()] or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, list | tuple):
        return "; ".join(_flat(part) for part in value) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _flat(value: Any) -> str:
    shown = facts(value)
    return shown if isinstance(shown, str) else ", ".join(f"{key} {_flat(part)}" for key, part in value.items())


def data_url(content: bytes, kind: str = "jpeg") -> str:
    """Write an image file's bytes as a URL."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def unbroken(text: str) -> str:
    """Keep an interval, and a number with its percent sign, on one line."""
    return re.sub(r"(?<=\d,) (?=[+−\d])|(?<=\d) (?=%)", NO_BREAK, text)


ENVIRONMENT.globals.update(
    GLOSSARY=GLOSSARY,
    HEAT_COLOR=HEAT_COLOR,
    HEAT_OPACITY=HEAT_OPACITY,
    is_clear=is_clear,
    p_value=p_value,
    verdict=verdict,
)
ENVIRONMENT.filters.update(decimal=decimal, bracket=bracket, change=change, heat=heat, facts=facts, unbroken=unbroken)

# ----------------------------------------------------------------------------------------------------
# `relook report`: which page a folder gets. Nothing that trains is imported for it.

RESULTS_FILE = "results.json"  # of a demo and of a sweep


def write_report(out: str | Path) -> Path:
    """Write `report.html` from a demo's files, or a sweep's."""
    out = Path(out)
    from relook.sweep_config import SWEEP_FILE

    if (out / "recipe.yaml").exists():  # of `relook train`
        raise RecipeError(
            f"{out} is a training run; reports are of evaluations.",
            f"Evaluate it first: relook eval pope chair --model {shlex.quote(str(out))} --data DATA --out FOLDER.",
        )
    if not (out / RESULTS_FILE).exists():
        raise RecipeError(f"{out} holds no finished demo.", f"Run `relook demo --out {out}` first.")
    # The pages import this module; the demo's loads a model, for its attention maps.
    if (out / SWEEP_FILE).exists():
        from relook.report.sweep_page import write_sweep_page

        return write_sweep_page(out)
    from relook.report.demo_page import write_demo_page

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
