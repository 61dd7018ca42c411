"""Tables of scores: a line per model, a column per metric, with differences to a reference and the best values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from relook.report.plots import Style
from relook.report.terms import GLOSSARY, SPLIT_TERMS, Term

MINUS = "−"
DASH = "–"  # in place of a ratio of nothing
UNCLEAR = "no clear change"


def decimal(value: float | None, scale: float = 1, sign: str = "", digits: int = 1) -> str:
    """Write a number; with `sign` "+", positive ones have a plus. None is a ratio of nothing."""
    if value is None:
        return DASH
    text = f"{scale * value:{sign}.{digits}f}"
    # A rounded zero has no sign of its own.
    return (text.replace("-", "") if float(text) == 0 and not sign else text).replace("-", MINUS)


def bracket(interval: Sequence[float] | None, scale: float = 1, sign: str = "", digits: int = 1) -> str:
    """Write an interval in brackets; empty for None."""
    return f"[{', '.join(decimal(end, scale, sign, digits) for end in interval)}]" if interval else ""


def change(paired: Mapping[str, Any], scale: float = 100) -> str:
    """Write a difference with its sign and interval."""
    return f"{decimal(paired['difference'], scale, '+')} {bracket(paired['ci'], scale, '+')}".strip()


def verdict(paired: Mapping[str, Any], better: int) -> str:
    """Judge a difference by its interval: better, worse, changed (if neither is better), or no clear change."""
    if not paired["ci"] or paired["ci"][0] <= 0 <= paired["ci"][1]:
        return UNCLEAR
    return {1: "better", -1: "worse", 0: "changed"}[better * (1 if paired["difference"] > 0 else -1)]


@dataclass(frozen=True)
class Cell:
    """A value with its interval, and its difference to the reference on the same pictures (`compare`)."""

    value: float | None
    interval: Sequence[float] | None = None
    paired: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Column:
    """A metric by its key in `METRICS`; POPE's also by its split."""

    metric: str
    split: str = ""

    @property
    def term(self) -> Term:
        return GLOSSARY[self.metric]

    def cell(self, scores: Mapping[str, Any], paired: Mapping[str, Any] | None = None) -> Cell:
        """Take the metric out of a model's scores, and out of `compare`'s result.

        A score that earlier versions did not write is a ratio of nothing.
        """
        benchmark, key = self.metric.split(".")
        part, against = scores[benchmark], (paired or {}).get(benchmark)
        if self.split:
            part, against = part[self.split], against and against[self.split]
        if against is not None:
            # A split's own entry is the difference in accuracy.
            against = against if key == "accuracy" else against.get(key)
        return Cell(part.get(key), part.get(f"{key}_ci"), against)


@dataclass(frozen=True)
class Line:
    """A model's cells under its name.

    Args:
        term: id in the glossary that explains the name; empty for none.
        note: stands small below the name.
    """

    name: str
    cells: Sequence[Cell]
    term: str = ""
    note: str = ""
    style: Style | None = None


@dataclass(frozen=True)
class ScoreTable:
    """Columns and lines; the best values of each column are marked."""

    columns: Sequence[Column]
    lines: Sequence[Line]
    caption: str = field(default="", kw_only=True)

    def best(self, index: int) -> float | None:
        """Return the best value of a column; None if none is better, or all are equal."""
        better = self.columns[index].term.better
        values = [line.cells[index].value for line in self.lines]
        measured = [value for value in values if value is not None]
        if not better or len(set(measured)) < 2:
            return None
        return max(measured) if better > 0 else min(measured)


CAPTION_COLUMNS = [Column(f"chair.{key}") for key in ("chair_i", "chair_s", "recall", "length")]
ANSWER_COLUMNS = [Column("pope.accuracy", split) for split in SPLIT_TERMS]


def axis_labels(benchmark: str, x: str, y: str) -> tuple[str, str]:
    """Return the labels of a plot's axes for two metrics in percent."""
    across, up = (GLOSSARY[f"{benchmark}.{key}"] for key in (x, y))
    return f"{across.label}, % ({across.symbol})", f"{up.label}, % ({up.symbol})"
