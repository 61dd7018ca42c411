"""Curves of training runs as inline SVG."""

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
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(FIELDS), figsize=(4.2 * len(FIELDS), 3.1), layout="constrained")
    for panel, (field, title) in zip(panels, FIELDS.items(), strict=True):
        for name, log in logs.items():
            points = [(entry["epoch"], float(entry[field])) for entry in log if field in entry]
            if points:
                panel.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("epoch", fontsize=9)
        panel.grid(alpha=0.25)
        panel.tick_params(labelsize=8)
    if panels[0].lines:
        panels[0].legend(fontsize=8)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]
