"""Plots as inline SVG, and the attention maps of the post decoder."""

from __future__ import annotations

import html
import io
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from relook.data.images import GRID, ImageSource
from relook.data.packing import Tree
from relook.data.samples import Turn
from relook.forward.collate import build_live_batch
from relook.forward.policy import LiveBatch, Policy
from relook.model.families import connector
from relook.model.load import LoadedModel
from relook.model.modeling_relook import reads_tower

# ----------------------------------------------------------------------------------------------------
# Each panel is an SVG of its own, as wide as a phone's screen: pages put as many in a row as fit, and no text shrinks.

WIDTH, HEIGHT = 3.7, 2.9  # inches; at 96 pixels an inch 355 x 278
FONT = 9  # points: 12 pixels
_COLORS = ("#0b62a4", "#c2410c", "#15803d", "#7e22ce", "#92610a", "#be185d", "#0f766e", "#44506a")
_DASHES = {"-": "", "--": "6 3", ":": "2 3", "-.": "7 3 2 3"}  # matplotlib's names, and SVG's lengths
# Corners of the markers, up is positive; shapes tell lines apart without colours.
_MARKERS = (
    ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    ((-1.2, -1), (1.2, -1), (0, 1.2)),
    ((0, -1.4), (1.4, 0), (0, 1.4), (-1.4, 0)),
    ((-1.2, 1), (1.2, 1), (0, -1.2)),
    ((-0.7, -1.3), (0.7, -1.3), (1.3, 0), (0.7, 1.3), (-0.7, 1.3), (-1.3, 0)),
)
_IDS = re.compile(r' id="[\w.]+_\d+"')


@dataclass(frozen=True)
class Style:
    """The look of one model's lines and points in all plots of a page."""

    color: str
    dash: str
    corners: Sequence[tuple[float, float]]

    @property
    def dashes(self) -> str:
        """Return the dash lengths as SVG's stroke-dasharray."""
        return _DASHES[self.dash]

    @property
    def polygon(self) -> str:
        """Return the marker's corners as SVG's points, within 5 units of the centre."""
        return " ".join(f"{3.5 * x:g},{-3.5 * y:g}" for x, y in self.corners)

    @property
    def marker(self) -> list[tuple[float, float]]:
        """Return the marker as matplotlib takes it: a closed line of corners."""
        return [*self.corners, self.corners[0]]


BASE_STYLE = Style("#1c2330", "--", [(math.cos(a), math.sin(a)) for a in (math.pi * i / 8 for i in range(16))])


def line_styles(names: Iterable[str]) -> dict[str, Style]:
    """Return a look for each name; the base's is always the same."""
    dashes = list(_DASHES)
    styles = {}
    for i, name in enumerate(name for name in names if name != "base"):
        dash = dashes[i // len(_COLORS) % len(dashes)]
        styles[name] = Style(_COLORS[i % len(_COLORS)], dash, _MARKERS[i % len(_MARKERS)])
    return {"base": BASE_STYLE, **styles}


FIELDS = {
    "loss": "Loss",
    "rewards/margins": "Reward margin: good over bad text",
    "rewards/accuracies": "Reward accuracy: good text preferred",
    "nll": "NLL of the good text, nats a token",
}


def curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], styles: Mapping[str, Style]) -> list[str]:
    """Plot one panel per logged field, one line per run, as SVG elements.

    Args:
        logs: the Trainer's log history of each run.
    """
    panels = []
    for field, title in FIELDS.items():
        lines = {
            name: [(float(entry["epoch"]), float(entry[field])) for entry in log if field in entry]
            for name, log in logs.items()
        }
        if any(lines.values()):
            panels.append(_chart(title, "epoch", partial(_draw_lines, lines=lines, styles=styles)))
    return panels


Points = Mapping[str, Sequence[tuple[float, float]]]


def _draw_lines(axes: Any, lines: Points, styles: Mapping[str, Style], marked: bool = False) -> None:
    for name, points in lines.items():
        if points:
            style = styles[name]
            # A line through one point is invisible.
            marker = {"marker": style.marker, "markersize": 5} if marked or len(points) == 1 else {}
            axes.plot(*zip(*points, strict=True), color=style.color, linestyle=style.dash, linewidth=1.4, **marker)


def against_rate(panels: Mapping[str, Points], base: Mapping[str, float], styles: Mapping[str, Style]) -> list[str]:
    """Plot scores in percent against the learning rate, one panel each, one line per variant, as SVG elements.

    Args:
        panels: by title, by variant: (learning rate, score) points in order.
        base: by title, the base's score, a dashed line.
    """

    def draw(axes: Any, title: str) -> None:
        _draw_lines(axes, panels[title], styles, marked=True)
        axes.axhline(base[title], color=BASE_STYLE.color, linestyle=BASE_STYLE.dash, linewidth=1)
        rates = sorted({rate for points in panels[title].values() for rate, _ in points})
        axes.set_xscale("log")
        ticks = rates[:: -(-len(rates) // 4)]  # more labels would run into each other
        axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
        axes.minorticks_off()

    return [_chart(title, "learning rate", partial(draw, title=title)) for title in panels]


def coverage_lines(points: Points, styles: Mapping[str, Style], x: str, y: str, shared: float) -> str:
    """Plot hallucination against recall as captions grow word by word, one line per model, as an SVG element.

    Args:
        points: (x, y) in percent by model, in order of growing captions.
        x, y: labels of the axes.
        shared: the recall that all models reach, a vertical line.
    """

    def draw(axes: Any) -> None:
        _draw_lines(axes, points, styles)
        axes.axvline(shared, color=BASE_STYLE.color, linestyle=":", linewidth=1)

    name = f"{y} against {x} as captions grow, a line for each model; dotted: the recall that both reach"
    return _chart("Captions cut after 1, 2, ... words", x, draw, y, name=name)


Measured = tuple[float, Sequence[float] | None]  # a value and its interval


def measured(scores: Mapping[str, Any], x: str, y: str) -> tuple[Measured, Measured] | None:
    """Take two rates in percent with their intervals out of a benchmark's scores; None if one is of nothing."""
    if scores[x] is None or scores[y] is None:
        return None
    across, up = ((100 * scores[key], [100 * end for end in scores[f"{key}_ci"]]) for key in (x, y))
    return across, up


def tradeoff(
    points: Mapping[str, tuple[Measured, Measured] | None], styles: Mapping[str, Style], x: str, y: str, better: str
) -> str:
    """Plot two rates in percent against each other, with their intervals, as an SVG element.

    Args:
        points: (x, y) by model (`measured`); a model with None is left out.
        x, y: labels of the axes.
        better: the corner of the best models: "upper right" or "lower right".
    """

    def draw(axes: Any) -> None:
        for name, point in points.items():
            if point is None:
                continue
            (across, across_ci), (up, up_ci) = point
            style = styles[name]
            errors = [
                [[value - ci[0]], [ci[1] - value]] if ci else None for value, ci in ((across, across_ci), (up, up_ci))
            ]
            axes.errorbar(
                [across],
                [up],
                xerr=errors[0],
                yerr=errors[1],
                marker=style.marker,
                color=style.color,
                markersize=7,
                linewidth=1.1,
            )
        axes.margins(0.12)
        height, arrow = (0.03, "↘") if better.startswith("lower") else (0.97, "↗")
        axes.text(
            *(0.97, height, f"better {arrow}"),
            transform=axes.transAxes,
            ha="right",
            va="bottom" if height < 0.5 else "top",
            color="#15663a",
            fontweight="bold",
        )

    return _chart("", x, draw, y, height=1.15 * HEIGHT, name=f"{y} against {x}, a point with intervals for each model")


def _chart(
    title: str, below: str, draw: Callable[[Any], None], beside: str = "", height: float = HEIGHT, name: str = ""
) -> str:
    import matplotlib

    # Chosen before pyplot is imported: the default backend would look for a display.
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    settings = {
        "font.size": FONT,
        "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
        "axes.titlesize": FONT,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": name or title,  # the same bytes each time, and other ids in each panel of a page
        "text.parse_math": False,  # names may contain dollars
    }
    with matplotlib.rc_context(settings):
        figure, axes = plt.subplots(figsize=(WIDTH, height), layout="constrained")
        draw(axes)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_xlabel(below)
        axes.set_ylabel(beside)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        plt.close(figure)
    # The XML head is for files of their own. Matplotlib escapes the labels: templates may take the rest as it is.
    svg = _IDS.sub("", buffer.getvalue()[buffer.getvalue().index("<svg") :])
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(name or f"{title}, by {below}")}"', 1)


# ----------------------------------------------------------------------------------------------------
# Where the post decoder looked just before a word.


def has_attention_maps(loaded: LoadedModel) -> bool:
    """Return True if a model has a post decoder whose attention over an image can be shown."""
    return _attention_recorder(_policy(loaded))


def _policy(loaded: LoadedModel) -> Policy:
    # One conversation is not worth the compilation of layers.
    return Policy(loaded.model.eval(), trunk_pass="dense")


def _attention_recorder(policy: Policy) -> bool:
    return policy.needs_vision_features and not policy.needs_all_states


def _grid_shape(config: Any, batch: LiveBatch, features: int) -> tuple[int, int]:
    """Return the rows and columns of the features of a batch's only image; (0, 0) where they are no grid."""
    if GRID in batch.image_inputs:  # which counts patches before the merger, that are no grid in rows themselves
        if reads_tower(config):
            return 0, 0
        _, height, width = batch.image_inputs[GRID][0].tolist()
        merged = max(math.isqrt(height * width // features), 1)
        return height // merged, width // merged
    side, pixels = math.isqrt(features), batch.pixel_values
    return (side, side) if pixels is not None and pixels.ndim == 4 and len(pixels) == 1 else (0, 0)


@torch.inference_mode()
def attention_before(
    loaded: LoadedModel, image: ImageSource, turns: Sequence[Turn], starts: Sequence[int], template: str = ""
) -> list[list[list[float]]]:
    """Return the last post decoder block's attention over the image, averaged over heads, where words are predicted.

    Args:
        turns: a conversation about the image, whose `<image>` is in its first prompt. Words are looked up in the
            last answer, whichever model gave it.
        starts: character offsets in that answer where words begin.
        template: of the conversation; empty for the model's own.

    Returns:
        For each word a grid of weights that sum to 1; no grids where the model has no cross-attention, or looks at
        features that are not one grid in rows: tiles, patches before a merger, and what learned queries give.

    Raises:
        DataError: training would refuse the conversation: too long, an empty answer, marks of the template.
    """
    policy = _policy(loaded)
    if not _attention_recorder(policy) or policy.post_decoder is None:
        return []
    # Features by learned queries, as Idefics2's, have no place on the picture.
    if any(name.endswith(("latents", "query")) for name, _ in connector(policy.core.model).named_parameters()):
        return []
    encoder = loaded.encoder(template)
    row = encoder.learned(turns, [image], "look")
    batch = build_live_batch(policy, loaded.images, loaded.pad_id, [(Tree.of([row]), [image])])
    trunk = policy.trunk(batch.to(loaded.core.device))
    if trunk.features is None:
        return []
    context = policy.post_decoder.image_context(trunk.features, trunk.image_counts)
    if context is None:
        return []
    # trunk.states are the states before each supervised token; maps: (states, image features).
    maps = policy.post_decoder.attention_maps(trunk.states, context)[0]
    shape = _grid_shape(policy.config, batch, maps.shape[-1])
    if maps.shape[-1] != math.prod(shape):
        return []
    # The targets are the tokens of all answers; those of the last one are what is supervised up to the row's end.
    first = sum(row.supervised) - sum(1 for _ in itertools.takewhile(bool, reversed(row.supervised)))
    text = turns[-1].response
    tokens = encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    # A token's offsets may begin with the space before the word, so the word's token is the one that ends after it.
    positions = [next(i for i, (_, end) in enumerate(tokens) if end > start) for start in starts]
    return [maps[int(trunk.targets.slot[first + position])].view(shape).tolist() for position in positions]
