"""A sweep's table (Markdown) and report (one self-contained HTML file), made from its files alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relook.evaluate.tasks.pope import SPLITS
from relook.files import read_json, write_text
from relook.report.pages import NOTHING, render
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
    page = render(
        "sweep.html.j2",
        title="relook sweep",
        rows=len(logs),
        tables=tables,
        notes=notes,
        curves=curves(logs),
        rate_plots=rate_plots(results),
        failures=_failures(results),
        provenance=results["provenance"],
    )
    write_text(out / REPORT_FILE, page)
    return out / REPORT_FILE


def _failures(results: Mapping[str, Any]) -> str:
    return "\n".join(f"{name} failed: {reason}" for name, reason in results["failed"].items())


def plain_percent(value: float | None, sign: str = "") -> str:
    return NOTHING if value is None else f"{100 * value:{sign}.2f}"


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


def rate_plots(results: Mapping[str, Any]) -> str:
    """Plot accuracy and yes ratio on popular and adversarial questions against the learning rate, by variant."""
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
    """Return a row's name without its learning rate: rows that share it are one line of a plot."""
    parts = row["name"].split(",")
    return ",".join(part for part in parts if not part.startswith("learning_rate=")) or row["regime"]


def markdown(cells: Cells) -> str:
    # A name may contain a bar, which would end its cell.
    head, *lines = ([cell.replace("|", "\\|") for cell in line] for line in cells)
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in rows)
