"""`relook report`: which page a folder gets. Nothing that trains is imported for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from relook.errors import RecipeError
from relook.evaluate.provenance import EVAL_FILE

RESULTS_FILE = "results.json"  # of a demo and of a sweep


def write_report(out: str | Path) -> Path:
    """Write `report.html` from a demo's files, or a sweep's."""
    out = Path(out)
    from relook.report import page, sweep_page

    if not (out / RESULTS_FILE).exists():
        raise RecipeError(f"{out} holds no finished demo.", f"Run `relook demo --out {out}` first.")
    from relook.sweep_recipe import SWEEP_FILE

    if (out / SWEEP_FILE).exists():
        return sweep_page.write_page(out)
    return page.write_page(out)


def write_reports(
    folders: Sequence[str | Path], out: str | Path | None = None, data: str | Path | None = None
) -> list[Path]:
    """The report of two `relook eval` folders side by side, or that of each demo and sweep."""
    from relook.report.two_models import write_comparison

    evaluations = [(Path(folder) / EVAL_FILE).exists() for folder in folders]
    if not any(evaluations):
        return [write_report(folder) for folder in folders]
    if evaluations != [True, True]:
        raise RecipeError("Evaluations are compared two at a time.", "Give two output folders of `relook eval`.")
    return [write_comparison(folders[0], folders[1], out, data)]
