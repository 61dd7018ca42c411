"""The page of `relook align`: the curve of its rounds, and what each took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relook.files import read_json, write_text
from relook.report.pages import render
from relook.report.plots import Style, coverage_lines, line_styles, measured, tradeoff
from relook.report.tables import CAPTION_COLUMNS, UNCLEAR, Line, ScoreTable, axis_labels, change, decimal, verdict

ROUNDS_FILE, PAGE = "rounds.json", "align.html"
BASE = "base"


def write_align_page(out: Path) -> Path:
    """Write `align.html` from `rounds.json`."""
    result = read_json(out / ROUNDS_FILE)
    rounds = result["rounds"]
    names = [BASE, *(f"round {line['round']}" for line in rounds[1:])]
    styles = line_styles(names)
    points = {n: measured(line["chair"], "recall", "chair_i") for n, line in zip(names, rounds, strict=True)}
    labels = axis_labels("chair", "recall", "chair_i")
    lines = [
        Line(name, [column.cell(line) for column in CAPTION_COLUMNS], style=styles[name])
        for name, line in zip(names, rounds, strict=True)
    ]
    page = render(
        "align.html.j2",
        title=_title(result),
        findings=[_finding(line) for line in rounds[1:]],
        stopped=result["stopped"],
        best=result["best_model"],
        charts=[tradeoff(points, styles, *labels, "lower right"), *_curves(names, rounds, styles, labels)],
        styles=list(styles.items()),
        scores=ScoreTable(CAPTION_COLUMNS, lines, caption="Rounds"),
        rounds=rounds[1:],
        costs=_costs(rounds[1:]),
    )
    write_text(out / PAGE, page)
    return out / PAGE


def _title(result: Mapping[str, Any]) -> str:
    if not result["best"]:
        return "No round is better than the base at equal recall"
    best = result["rounds"][result["best"]]
    paired, base = best["against_base"], best["against_base"]["chair_i"][0]
    clear = "" if verdict(paired, -1) != UNCLEAR else ", which may be chance"
    share = decimal(-paired["difference"] / base, 100, digits=0) if base else decimal(-paired["difference"], 100)
    return f"Round {result['best']} invents {share} % fewer objects than the base at equal recall{clear}"


def _finding(line: Mapping[str, Any]) -> str:
    """Say what a round changed against the one before, at the recall that both reach."""
    paired = line["against_last"]
    before = f"round {line['round'] - 1}" if line["round"] > 1 else f"the {BASE}"
    first, second = (decimal(rate, 100) for rate in paired["chair_i"])
    return (
        f"Round {line['round']} ({line['pairs']:,} pairs) against {before}, where both have a recall of "
        f"{decimal(paired['recall'], 100)} %: CHAIR_i goes from {first} % to {second} %, {change(paired)} points "
        f"({verdict(paired, -1)})."
    ).replace(" %", "\N{NO-BREAK SPACE}%")


def _curves(
    names: Sequence[str], rounds: Sequence[Mapping[str, Any]], styles: Mapping[str, Style], labels: tuple[str, str]
) -> list[str]:
    """Plot each model's captions as they grow; the dotted line is the recall that base and last round reach."""
    if len(rounds) < 2:
        return []
    curves = [rounds[1]["against_base"]["curves"][0], *(line["against_base"]["curves"][1] for line in rounds[1:])]
    points = {
        name: [(100 * recall, 100 * rate) for _, recall, rate in curve if recall is not None and rate is not None]
        for name, curve in zip(names, curves, strict=True)
    }
    return [coverage_lines(points, styles, *labels, 100 * rounds[-1]["against_base"]["recall"])]


def _costs(rounds: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Return the table of what mining took; empty where no cost was counted."""
    titles = {"images_read": "image readings", "tokens_sampled": "tokens sampled", "checks": "checks"}
    counted = [line for line in rounds if line["cost"]]
    body = [
        [f"round {line['round']}", f"{line['pairs']:,}", *(f"{line['cost'][key]:,}" for key in titles)]
        for line in counted
    ]
    return [["", "pairs", *titles.values()], *body] if body else []
