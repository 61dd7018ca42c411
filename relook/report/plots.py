"""Plots as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

FIELDS = {
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "reward accuracy",
    "nll": "NLL of chosen, nats a token",
}


def curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One panel per logged field, one line per run, as an SVG element.

    Args:
        logs: the Trainer's log history of each run.
    """
    plt, figure, panels = _panels(len(FIELDS))
    for panel, (field, title) in zip(panels, FIELDS.items(), strict=True):
        for name, log in logs.items():
            points = [(entry["epoch"], float(entry[field])) for entry in log if field in entry]
            if points:
                panel.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        _label(panel, title, "epoch")
    if panels[0].lines:
        panels[0].legend(fontsize=8 if len(logs) < 10 else 5)
    return _svg(plt, figure)


Points = Mapping[str, Sequence[tuple[float, float]]]


def against_rate(panels: Mapping[str, Points], base: Mapping[str, float]) -> str:
    """Scores against the learning rate, one panel each, one line per variant, as an SVG element.

    Args:
        panels: by title, by variant: (learning rate, score) points in order.
        base: by title, the base's score, a dashed line.
    """
    plt, figure, axes = _panels(len(panels))
    for panel, (title, lines) in zip(axes, panels.items(), strict=True):
        for name, points in lines.items():
            panel.plot(*zip(*points, strict=True), label=name, marker="o", markersize=3, linewidth=1.2)
        panel.axhline(base[title], color="#888", linestyle="--", linewidth=1, label="base")
        rates = sorted({rate for points in lines.values() for rate, _ in points})
        panel.set_xscale("log")
        named = rates[:: -(-len(rates) // 6)]  # more would run into each other
        panel.set_xticks(named, [f"{rate:g}" for rate in named])
        panel.minorticks_off()
        _label(panel, title, "learning rate")
    axes[0].legend(fontsize=8 if len(lines) < 8 else 5)
    return _svg(plt, figure)


def _panels(count: int) -> tuple[Any, Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, count, figsize=(4.2 * count, 3.1), layout="constrained", squeeze=False)
    return plt, figure, panels[0]


def _label(panel: Any, title: str, below: str) -> None:
    panel.set_title(title, fontsize=10)
    panel.set_xlabel(below, fontsize=9)
    panel.grid(alpha=0.25)
    panel.tick_params(labelsize=8)


def _svg(plt: Any, figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
