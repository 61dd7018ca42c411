"""A sweep's table (Markdown) and report (one self-contained HTML file), made from its files alone."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relook.evaluate.tasks.pope import SPLITS
from relook.files import read_json, write_text
from relook.report.pages import document, table
from relook.report.plots import against_rate, curves

TABLE_FILE, REPORT_FILE = "table.md", "report.html"
RATES = {"accuracy": "Accuracy", "precision": "Precision", "recall": "Recall", "f1": "F1", "yes_ratio": "Yes ratio"}
CHAIR_RATES = {"chair_i": "CHAIR_i", "chair_s": "CHAIR_s", "recall": "Recall"}
HEADS = ("Model", "Variant", "Method", "Regime", "lr", "Epoch", "Seed")
P_NOTE = (
    "p: exact McNemar test against the base on the same questions, corrected by Holm over all rows of a split. "
    "Brackets: paired 95 % bootstrap interval over images, not corrected."
)
KL_NOTE = (
    "KL(p || q) = Σ p (log p − log q) in nats over the whole vocabulary, p the tuned and q the base distribution of an "
    "answer's first token. Hallucination rate: share of the distinct questions to be answered with no that are "
    "answered with yes; in parentheses the base's on the same questions."
)
Cells = list[list[str]]  # the first line is the head


def write_page(out: Path) -> Path:
    """Write `table.md` and `report.html` of a finished sweep."""
    results = read_json(out / "results.json")
    seeds = over_seeds(results)
    tables = {
        "POPE": pope_table(results),
        "Mean ± standard deviation over seeds": seeds,
        "CHAIR": chair_table(results),
        "Hallucination by divergence from the base": divergence_table(results),
    }
    tables = {title: cells for title, cells in tables.items() if len(cells) > 1}
    notes = {"POPE": P_NOTE, "Hallucination by divergence from the base": KL_NOTE}
    text = [f"## {title}\n\n{markdown(cells)}\n{notes.get(title, '')}\n" for title, cells in tables.items()]
    write_text(out / TABLE_FILE, "\n".join([*text, _failures(results)]).rstrip() + "\n")
    body = [f"<h2>{title}</h2>{as_html(cells)}<p>{notes.get(title, '')}</p>" for title, cells in tables.items()]
    logs = {row["name"]: read_json(out / "runs" / row["name"] / "run.json")["log"] for row in results["rows"]}
    plots = ["<h2>Training</h2>", curves(logs), "<h2>Against the learning rate</h2>", rate_plots(results)]
    end = f"<p>{html.escape(_failures(results))}</p><p><small>{html.escape(str(results['provenance']))}</small></p>"
    title = f"<h1>Sweep: {len(logs)} rows on one base</h1>"
    write_text(out / REPORT_FILE, document("relook sweep", [title, *body, *plots, end]))
    return out / REPORT_FILE


def _failures(results: Mapping[str, Any]) -> str:
    return "\n".join(f"{name} failed: {said}" for name, said in results["failed"].items())


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def about(results: Mapping[str, Any], row: Mapping[str, Any] | None) -> list[str]:
    """What a line is about: the cells under HEADS."""
    model = Path(results["provenance"]["model"]).name
    if row is None:
        return [model, "base", "", "", "", "", ""]
    rate, epochs = format(row["learning_rate"], "g"), format(row["epochs"], "g")
    return [model, row["variant"], row["method"], row["regime"], rate, epochs, str(row["seed"])]


def pope_table(results: Mapping[str, Any]) -> Cells:
    """One line per row and split."""
    lines: Cells = [[*HEADS, "Split", *RATES.values(), "− base", "p (Holm)"]]
    for row in (None, *results["rows"]):
        for split in SPLITS:
            scores = (row or results["base"])["pope"][split]
            line = [*about(results, row), split, *(percent(scores[rate]) for rate in RATES), "", ""]
            if row is not None:
                paired = row["paired"]["pope"][split]
                low, high = (f"{100 * end:+.2f}" for end in paired["ci"])
                line[-2:] = [f"{100 * paired['difference']:+.2f} [{low}, {high}]", f"{paired['mcnemar_p_holm']:.2g}"]
            lines.append(line)
    return lines


def over_seeds(results: Mapping[str, Any]) -> Cells:
    lines: Cells = [["Variant", "Seeds", "Split", *RATES.values()]]
    for group in results["over_seeds"]:
        for split in SPLITS:
            found = [group["pope"][split][rate] for rate in RATES]
            spread = [f"{percent(value['mean'])} ± {percent(value['sd'])}" for value in found]
            lines.append([group["variant"], str(len(group["seeds"])), split, *spread])
    return lines


def chair_table(results: Mapping[str, Any]) -> Cells:
    lines: Cells = [[*HEADS, *CHAIR_RATES.values(), "Length", "CHAIR_i − base", "Recall − base"]]
    for row in (None, *results["rows"]):
        chair = (row or results["base"]).get("chair")
        if chair is None:
            continue
        line = [*about(results, row), *(percent(chair[rate]) for rate in CHAIR_RATES), f"{chair['length']:.1f}", "", ""]
        if row is not None:
            paired = row["paired"]["chair"]
            line[-2:] = [_difference(paired["chair_i"]), _difference(paired["recall"])]
        lines.append(line)
    return lines


def _difference(found: Mapping[str, Any]) -> str:
    low, high = (f"{100 * end:+.2f}" for end in found["ci"])
    return f"{100 * found['difference']:+.2f} [{low}, {high}]"


def divergence_table(results: Mapping[str, Any]) -> Cells:
    """Mean divergence of each row, and the hallucination rate in each of its bins."""
    bins = results["rows"][0]["kl_bins"]
    titles = [f"{b['low']:g} to {b['high']:g}" if b["high"] is not None else f"over {b['low']:g}" for b in bins]
    lines: Cells = [["Row", "mean KL", *titles]]
    for row in results["rows"]:
        found = [
            f"{percent(b['rate'])} ({percent(b['base_rate'])}), n {b['n']}" if b["n"] else "" for b in row["kl_bins"]
        ]
        lines.append([row["name"], f"{row['kl']:.3g}", *found])
    return lines


def rate_plots(results: Mapping[str, Any]) -> str:
    """Accuracy and yes ratio of popular and adversarial questions against the learning rate, a line per variant."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    base = {}
    for rate in ("accuracy", "yes_ratio"):
        for split in ("popular", "adversarial"):
            title = f"{RATES[rate]}, {split}"
            base[title] = results["base"]["pope"][split][rate]
            lines: dict[str, list[tuple[float, float]]] = {}
            for row in sorted(results["rows"], key=lambda row: row["learning_rate"]):
                lines.setdefault(line_name(row), []).append((row["learning_rate"], row["pope"][split][rate]))
            panels[title] = lines
    return against_rate(panels, base)


def line_name(row: Mapping[str, Any]) -> str:
    """A row's name without its learning rate: rows that share it are one line of a plot."""
    parts = row["name"].split(",")
    return ",".join(part for part in parts if not part.startswith("learning_rate=")) or row["regime"]


def markdown(cells: Cells) -> str:
    head, *lines = ([cell.replace("|", "\\|") for cell in line] for line in cells)
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in rows)


def as_html(cells: Cells) -> str:
    return table([[html.escape(cell) for cell in line] for line in cells])
