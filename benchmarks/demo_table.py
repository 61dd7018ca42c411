"""README's table from finished demos: means over their seeds, and differences pooled over their test images.

relook demo --out demo0 --seed 0        # 1, 2
python benchmarks/demo_table.py demo0 demo1 demo2
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toyworld_seeds import mean, repeated, signed

from relook.demo import REGIMES, DemoPaths
from relook.evaluate.compare import compare_pooled
from relook.files import read_json
from relook.report.findings import CONTROLS
from relook.report.pages import RESULTS_FILE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, nargs="+")
    demos = [DemoPaths(path) for path in parser.parse_args().demo]
    results = [read_json(paths.out / RESULTS_FILE) for paths in demos]
    print("| | CHAIR_i | CHAIR_s | recall | POPE, adversarial | words | captions that repeat a sentence |")
    print("|---|---|---|---|---|---|---|")
    for name in ("base", *REGIMES):
        rows = [result["base"] if name == "base" else result["runs"][name] for result in results]
        cells = [listed(rows, "chair", key) for key in ("chair_i", "chair_s", "recall")]
        cells.append(" / ".join(f"{100 * row['pope']['adversarial']['accuracy']:.1f}" for row in rows))
        means = [100 * mean([row["chair"][key] for row in rows]) for key in ("chair_i", "chair_s", "recall")]
        means.append(100 * mean([row["pope"]["adversarial"]["accuracy"] for row in rows]))
        words = mean([row["chair"]["length"] for row in rows])
        twice = 100 * mean([repeated(paths.answers(name)) for paths in demos])
        shown = (f"{value:.1f} ({cell})" for value, cell in zip(means, cells, strict=True))
        print(f"| {name} | {' | '.join(shown)} | {words:.1f} | {twice:.1f} |")
    print("\n| difference | adversarial | CHAIR_i | recall |\n|---|---|---|---|")
    pairs = [("base", name) for name in REGIMES] + [(name, "post_decoder") for name in CONTROLS]
    for first, second in pairs:
        runs = [(paths.world / "test", paths.answers(first), paths.answers(second)) for paths in demos]
        found = compare_pooled(runs)
        parts = (found["pope"]["adversarial"], found["chair"]["chair_i"], found["chair"]["recall"])
        print(f"| {second} - {first} | {' | '.join(signed(part) for part in parts)} |")
    for paths, result in zip(demos, results, strict=True):
        print(f"{paths.out.name}: {sum(result['seconds'].values()):.0f} s")


def listed(rows: list[Mapping[str, Any]], task: str, key: str) -> str:
    return " / ".join(f"{100 * row[task][key]:.1f}" for row in rows)


if __name__ == "__main__":
    main()
