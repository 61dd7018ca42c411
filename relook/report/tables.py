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
UNDEFINED = "undefined"  # a difference from a ratio of nothing
P_VALUES = ("mcnemar_p_holm", "mcnemar_p")  # the first that a difference has is shown and counts
SIGNIFICANT = 0.05


def decimal(value: float | None, scale: float = 1, sign: str = "", digits: int = 1) -> str:
    """Write a number; with `sign` "+", positive ones have a plus. None is a ratio of nothing."""
    if value is None:
        return DASH
    text = f"{scale * value:{sign}.{digits}f}"
    # A rounded zero has no sign of its own.
    return (text.replace("-", "") if float(text) == 0 and not sign else text).replace("-", MINUS)


def bracket(interval: Sequence[float] | None, scale: float = 1, sign: str = "", digits: int = 1) -> str:
    """Write an interval in brackets; empty for None. An end that is not 0 has digits enough not to look like it."""
    if not interval:
        return ""
    while digits < 4 and any(end and round(scale * end, digits) == 0 for end in interval):
        digits += 1
    return f"[{', '.join(decimal(end, scale, sign, digits) for end in interval)}]"


def change(paired: Mapping[str, Any], scale: float = 100) -> str:
    """Write a difference with its sign and interval."""
    return f"{decimal(paired['difference'], scale, '+')} {bracket(paired['ci'], scale, '+')}".strip()


def verdict(paired: Mapping[str, Any], better: int) -> str:
    """Judge a difference: better, worse, changed (if neither is better), no clear change, or undefined."""
    if paired["difference"] is None:
        return UNDEFINED
    if not is_clear(paired):
        return UNCLEAR
    return {1: "better", -1: "worse", 0: "changed"}[better * (1 if paired["difference"] > 0 else -1)]


def is_clear(paired: Mapping[str, Any]) -> bool:
    """Return True if a difference's interval excludes 0 and its p-value, if it has one, is below `SIGNIFICANT`.

    The interval knows that answers about one image depend on each other, the exact test that they are few; so a
    difference on which the two disagree is not called clear.
    """
    p = p_value(paired)
    excluded = bool(paired["ci"]) and not paired["ci"][0] <= 0 <= paired["ci"][1]
    return excluded and (p is None or p < SIGNIFICANT)


def p_value(paired: Mapping[str, Any]) -> float | None:
    """Return a difference's p-value, corrected where it was; None if it has none."""
    return next((paired[key] for key in P_VALUES if key in paired), None)


def recorded(value: Any) -> str:
    """Write a value of a result's provenance in one line."""
    return ", ".join(f"{key} {part}" for key, part in value.items()) if isinstance(value, Mapping) else str(value)


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
