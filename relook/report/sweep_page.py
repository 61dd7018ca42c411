"""A sweep's table (Markdown) and report (one self-contained HTML file), made from its files alone."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relook.evaluate.tasks.pope import SPLITS
from relook.files import read_json, write_text
from relook.report.findings import HARDEST, sweep_headline, unclear_answers
from relook.report.pages import render
from relook.report.plots import Style, against_rate, curves, line_styles, measured, tradeoff
from relook.report.tables import DASH, Column, Line, ScoreTable, axis_labels, change, decimal, verdict
from relook.report.terms import METRIC_TERMS

TABLE_FILE, REPORT_FILE = "table.md", "report.html"
RATES = {"accuracy": "Accuracy", "precision": "Precision", "recall": "Recall", "f1": "F1", "yes_ratio": "Yes ratio"}
CHAIR_RATES = {"chair_i": "CHAIR_i", "chair_s": "CHAIR_s", "recall": "Recall"}
HEADS = ("Model", "Variant", "Method", "Regime", "lr", "Epoch", "Seed")
P_NOTE = (
    "p: exact McNemar test against the base on the same questions, corrected by Holm over all rows of a split. "
    "Brackets: paired 95 % bootstrap interval over images, not corrected. A difference is called clear where p is "
    "below 0.05 and the interval excludes 0."
)
KL_NOTE = (
    "KL(p || q) = Σ p (log p − log q) in nats over the whole vocabulary, p the tuned and q the base distribution of an "
    "answer's first token. Hallucination rate: share of the distinct questions to be answered with no that are "
    "answered with yes; in parentheses the base's on the same questions."
)
Cells = list[list[str]]  # the first line is the head


def write_sweep_page(out: Path) -> Path:
    """Write `table.md` and `report.html` of a finished sweep."""
    results = read_json(out / "results.json")
    tables = {
        "POPE": sweep_pope_table(results),
        "Mean ± standard deviation over seeds": seed_table(results),
        "CHAIR": sweep_chair_table(results),
        "Hallucination by divergence from the base": divergence_table(results),
    }
    # A table with a head alone, as CHAIR's in a sweep without captions, is left out.
    tables = {title: cells for title, cells in tables.items() if len(cells) > 1}
    notes = dict.fromkeys(tables, "") | {"POPE": P_NOTE, "Hallucination by divergence from the base": KL_NOTE}
    text = [f"## {title}\n\n{markdown(cells)}\n{notes[title]}\n" for title, cells in tables.items()]
    write_text(out / TABLE_FILE, "\n".join([*text, _failures(results)]).rstrip() + "\n")
    logs = {row["name"]: read_json(out / "runs" / row["name"] / "run.json")["log"] for row in results["rows"]}
    styles = line_styles(logs)
    # Rows that share a variant share a line of a plot against the learning rate, and its look.
    variants = line_styles(dict.fromkeys(map(line_name, results["rows"])))
    page = render(
        "sweep.html.j2",
        title=sweep_headline(results["rows"]),
        findings=[*_best_rows(results), *_failures(results).splitlines()],
        cautions=unclear_answers({"base": results["base"], **{spoken(row["name"]): row for row in results["rows"]}}),
        model=Path(results["provenance"]["model"]).name,
        charts=sweep_charts(results, styles),
        summary=summary_table(results, styles),
        tables={title: (without_model(cells), notes[title]) for title, cells in tables.items()},
        curves=curves(logs, styles),
        models=[(spoken(name), style) for name, style in styles.items()],
        rate_plots=rate_plots(results, variants),
        variants=[(spoken(name), style) for name, style in variants.items()],
        steps=_next_steps(out, results),
        provenance=results["provenance"],
    )
    write_text(out / REPORT_FILE, page)
    return out / REPORT_FILE


def _failures(results: Mapping[str, Any]) -> str:
    return "\n".join(f"{name} failed: {reason}" for name, reason in results["failed"].items())


# ----------------------------------------------------------------------------------------------------
# The page: a line per row, and what the best rows are.


def summary_table(results: Mapping[str, Any], styles: Mapping[str, Style]) -> ScoreTable:
    """Return a line per row, of what is most often asked."""
    columns = [Column(f"pope.{rate}", HARDEST) for rate in ("accuracy", "f1", "yes_ratio")]
    if "chair" in results["base"]:
        columns = [Column("chair.chair_i"), Column("chair.recall"), *columns]
    lines = [Line("base", [column.cell(results["base"]) for column in columns], "base", style=styles["base"])]
    lines += [
        Line(
            spoken(row["variant"]),
            [column.cell(row, row["paired"]) for column in columns],
            note=_settings(row),
            style=styles[row["name"]],
        )
        for row in results["rows"]
    ]
    return ScoreTable(columns, lines, caption="All rows")


def spoken(name: str) -> str:
    """Return a row's name with spaces, where lines may break."""
    return name.replace("_", " ").replace(",", ", ")


def _settings(row: Mapping[str, Any]) -> str:
    return (
        f"{row['method']} · {row['regime']} · lr {row['learning_rate']:g} · epochs {row['epochs']:g} · "
        f"seed {row['seed']}"
    )


def _best_rows(results: Mapping[str, Any]) -> list[str]:
    """Return a sentence on the best row by each measure; the best of many looks better than it is."""
    measures = [("right answers to adversarial questions", lambda row: row["pope"][HARDEST]["accuracy"], 1)]
    if "chair" in results["base"]:
        measures.append(("fewest invented objects", lambda row: row["chair"]["chair_i"], -1))
    sentences = []
    for title, measure, better in measures:
        measured_rows = [row for row in results["rows"] if measure(row) is not None]
        if not measured_rows:
            continue
        best = max(measured_rows, key=lambda row: better * measure(row))
        paired = best["paired"]["pope"][HARDEST] if better > 0 else best["paired"]["chair"]["chair_i"]
        sentences.append(
            f"{'Most' if better > 0 else 'The'} {title}: {spoken(best['name'])}: {decimal(measure(best), 100)} % "
            f"({change(paired)} points to the base){'' if better > 0 else _with_recall(best)}."
        )
    if len(results["rows"]) > 1:
        sentences.append("The best of several rows is picked by these very scores, so its lead is partly luck.")
    return sentences


def _with_recall(row: Mapping[str, Any]) -> str:
    # Saying less is the cheapest way to invent less.
    recall = row["paired"]["chair"]["recall"]
    return f"; objects found: {change(recall)} points, {verdict(recall, 1)}"


def sweep_charts(results: Mapping[str, Any], styles: Mapping[str, Style]) -> list[str]:
    """Plot hallucination against recall, in captions where there are any and in yes/no answers."""
    models = {"base": results["base"], **{row["name"]: row for row in results["rows"]}}
    charts = []
    if "chair" in results["base"]:
        captions = {name: measured(scores["chair"], "recall", "chair_i") for name, scores in models.items()}
        charts.append(tradeoff(captions, styles, *axis_labels("chair", "recall", "chair_i"), "lower right"))
    answers = {name: measured(scores["pope"][HARDEST], "recall", "precision") for name, scores in models.items()}
    return [*charts, tradeoff(answers, styles, *axis_labels("pope", "recall", "precision"), "upper right")]


def _next_steps(out: Path, results: Mapping[str, Any]) -> list[tuple[str, str]]:
    best = max(results["rows"], key=lambda row: row["pope"][HARDEST]["accuracy"] or 0)["name"]
    run, answers, base = (shlex.quote(str(out / folder)) for folder in (f"runs/{best}", f"eval/{best}", "eval/base"))
    return [
        ("Ask the row with the most right answers, beside its base", f"relook serve {run} --with-base"),
        ("See the pictures on which that row and the base differ", f"relook report {base} {answers}"),
        ("Write this page again", f"relook report {shlex.quote(str(out))}"),
    ]


def without_model(cells: Cells) -> Cells:
    """Return a table whose lines begin with the variant: the page says once which model it is."""
    return [line[1:] for line in cells] if cells[0][0] == HEADS[0] else cells


# ----------------------------------------------------------------------------------------------------
# Tables of strings, for `table.md` and the page.


def plain_percent(value: float | None, sign: str = "") -> str:
    return DASH if value is None else f"{100 * value:{sign}.2f}"


def row_labels(results: Mapping[str, Any], row: Mapping[str, Any] | None) -> list[str]:
    """Return the cells under HEADS: which model a line is about; the base for None."""
    model = Path(results["provenance"]["model"]).name
    if row is None:
        return [model, "base", "", "", "", "", ""]
    rate, epochs = format(row["learning_rate"], "g"), format(row["epochs"], "g")
    return [model, row["variant"], row["method"], row["regime"], rate, epochs, str(row["seed"])]


def sweep_pope_table(results: Mapping[str, Any]) -> Cells:
    """Return a line per row and split."""
    lines: Cells = [[*HEADS, "Split", *RATES.values(), "Unclear", "− base", "p (Holm)"]]
    for row in (None, *results["rows"]):
        for split in SPLITS:
            scores = (row or results["base"])["pope"][split]
            unclear = str(scores.get("unclear", ""))  # rows of earlier versions have no count
            line = [*row_labels(results, row), split, *(plain_percent(scores[rate]) for rate in RATES), unclear, "", ""]
            if row is not None:
                paired = row["paired"]["pope"][split]
                line[-2:] = [_difference(paired), f"{paired['mcnemar_p_holm']:.2g}"]
            lines.append(line)
    return lines


def seed_table(results: Mapping[str, Any]) -> Cells:
    lines: Cells = [["Variant", "Seeds", "Split", *RATES.values()]]
    for group in results["over_seeds"]:
        for split in SPLITS:
            moments = [group["pope"][split][rate] for rate in RATES]
            spread = [f"{plain_percent(rate['mean'])} ± {plain_percent(rate['sd'])}" for rate in moments]
            lines.append([group["variant"], str(len(group["seeds"])), split, *spread])
    return lines


def sweep_chair_table(results: Mapping[str, Any]) -> Cells:
    lines: Cells = [[*HEADS, *CHAIR_RATES.values(), "Length", "CHAIR_i − base", "Recall − base"]]
    for row in (None, *results["rows"]):
        chair = (row or results["base"]).get("chair")
        if chair is None:
            continue
        line = [
            *row_labels(results, row),
            *(plain_percent(chair[rate]) for rate in CHAIR_RATES),
            f"{chair['length']:.1f}",
            "",
            "",
        ]
        if row is not None:
            paired = row["paired"]["chair"]
            line[-2:] = [_difference(paired["chair_i"]), _difference(paired["recall"])]
        lines.append(line)
    return lines


def _difference(paired: Mapping[str, Any]) -> str:
    ends = f" [{', '.join(plain_percent(end, '+') for end in paired['ci'])}]" if paired["ci"] else ""
    return plain_percent(paired["difference"], "+") + ends


def divergence_table(results: Mapping[str, Any]) -> Cells:
    """Return the mean divergence of each row, and the hallucination rate in each of its bins."""
    bins = results["rows"][0]["kl_bins"]
    titles = [f"{b['low']:g} to {b['high']:g}" if b["high"] is not None else f"over {b['low']:g}" for b in bins]
    lines: Cells = [["Row", "mean KL", *titles]]
    for row in results["rows"]:
        rates = [
            f"{plain_percent(b['rate'])} ({plain_percent(b['base_rate'])}), n {b['n']}" if b["n"] else ""
            for b in row["kl_bins"]
        ]
        lines.append([row["name"], f"{row['kl']:.3g}", *rates])
    return lines


def rate_plots(results: Mapping[str, Any], styles: Mapping[str, Style]) -> list[str]:
    """Plot accuracy and yes ratio on popular and adversarial questions against the learning rate, by variant."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    base = {}
    for rate in ("accuracy", "yes_ratio"):
        for split in ("popular", "adversarial"):
            title = f"{METRIC_TERMS[f'pope.{rate}'].label}, {split}, %"
            base[title] = 100 * results["base"]["pope"][split][rate]
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in sorted(results["rows"], key=lambda row: row["learning_rate"]):
                point = (row["learning_rate"], 100 * row["pope"][split][rate])
                lines.setdefault(line_name(row), []).append(point)
            panels[title] = lines
    return against_rate(panels, base, styles)


def line_name(row: Mapping[str, Any]) -> str:
    """Return a row's name without its learning rate: rows that share it are one line of a plot."""
    parts = row["name"].split(",")
    return ",".join(part for part in parts if not part.startswith("learning_rate=")) or row["regime"]


def markdown(cells: Cells) -> str:
    # A name may contain a bar, which would end its cell.
    head, *lines = ([cell.replace("|", "\\|") for cell in line] for line in cells)
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in rows)
