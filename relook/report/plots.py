"""Plots as inline SVG."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

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
    """Plot two rates in percent against each other, with their intervals, as an SVG element; empty without a point.

    Args:
        points: (x, y) by model (`measured`); a model with None is left out.
        x, y: labels of the axes.
        better: the corner of the best models: "upper right" or "lower right".
    """

    drawn = {name: point for name, point in points.items() if point is not None}
    if not drawn:
        return ""

    def draw(axes: Any) -> None:
        for name, point in drawn.items():
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
        # Unlike `savefig`, which lays the figure out in a first drawing that it throws away: the bytes are the same.
        figure.canvas.print_svg(buffer, metadata={"Date": None})
        plt.close(figure)
    # The XML head is for files of their own. Matplotlib escapes the labels: templates may take the rest as it is.
    svg = _IDS.sub("", buffer.getvalue()[buffer.getvalue().index("<svg") :])
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(name or f"{title}, by {below}")}"', 1)
