"""A training run in words: its log lines where no terminal shows a bar, and the summary at its end."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from transformers import TrainerCallback

from relook.console import ProgressReport, console, readable_seconds, status
from relook.errors import count_of
from relook.files import read_json
from relook.recipe import Recipe, objective_name, regime_name

# Logged fields that a line shows: each with its name for people and its format.
FIELDS = {
    "loss": ("loss", ".4f"),
    "rewards/margins": ("margin", ".3f"),
    "rewards/accuracies": ("accuracy", ".2f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
}
HALVES = {"bf16": "bfloat16", "fp16": "float16"}
STILL = (
    "the loss is still ln 2, as before the first step, so next to nothing was learned. Raise learning_rate, or train "
    "longer."
)


def describe_fields(logs: Mapping[str, Any], prefix: str = "") -> str:
    """Return the logged fields that people watch, as `loss 0.6931, margin 0.120, ...`.

    Args:
        prefix: "eval_" for those of the held-out samples.
    """
    values = {key: (float(logs[prefix + key]), *shown) for key, shown in FIELDS.items() if prefix + key in logs}
    return ", ".join(
        f"{value:{spec}} {name}" if name == "tokens/s" else f"{name} {value:{spec}}"
        for value, name, spec in values.values()
    )


class ProgressCallback(TrainerCallback):
    """Callback that moves the progress bar, or prints one line per log step where there is no terminal.

    Args:
        report: reports (done, total, note) to the bar.
    """

    def __init__(self, report: ProgressReport) -> None:
        self.report, self.note, self.drawn = report, "", 0.0
        self.started, self.first_step = 0.0, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        # The first step compiles and checks, so the time left is estimated from those after it.
        if not self.started:
            self.started, self.first_step = now, state.global_step
        # Redraw ten times a second at most; toyworld's steps are shorter than that.
        if now - self.drawn > 0.1 or state.global_step == state.max_steps:
            self.drawn = now
            self.report(state.global_step, state.max_steps, self.note)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        step = f"  step {state.global_step:,}/{state.max_steps:,}"
        if "loss" in logs:
            self.note = describe_fields(logs)
            if not console.is_terminal:
                status(f"{step}: {self.note}, {_memory(logs)}{self._time_left(state)}")
        elif "eval_loss" in logs and not console.is_terminal:
            status(f"{step}, held out: {describe_fields(logs, 'eval_')}")

    def _time_left(self, state: Any) -> str:
        done, remaining = state.global_step - self.first_step, state.max_steps - state.global_step
        if not self.started or done <= 0 or not remaining:
            return ""
        return f", {readable_seconds((time.monotonic() - self.started) / done * remaining)} left"


def _memory(logs: Mapping[str, Any]) -> str:
    """Return the peak of GPU memory since the start; on a CPU the process's memory now."""
    if "peak_memory_gib" in logs:
        return f"{logs['peak_memory_gib']:.1f} GiB"
    return f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB"


def run_summary(recipe: Recipe, out: str | Path) -> str:
    """Say in words what a finished run trained, how well, where it is, and what to do next.

    Args:
        out: the run's folder.
    """
    run = read_json(Path(out) / "run.json")
    log = run["log"]
    lines = [entry for entry in log if "loss" in entry]
    steps = max((entry["step"] for entry in log), default=0)
    epochs = next((f" ({entry['epoch']:.3g} epochs)" for entry in reversed(log) if "epoch" in entry), "")
    unit = "conversations" if recipe.task == "sft" else "pairs"
    facts = {
        "trained": f"{regime_name(vars(recipe))} by {objective_name(vars(recipe))}, {count_of(steps, 'step')} over "
        f"{run['samples']:,} {unit}{epochs}, in {readable_seconds(run['seconds'])}",
        "folder": str(out),
        "best": _best(log, recipe),
        "last": f"step {lines[-1]['step']:,}: {describe_fields(lines[-1])}" if lines else "",
        "notice": STILL if lines and _is_still(lines[-1]) else "",
        "next": f"relook eval pope chair --model {shlex.quote(str(out))} --data DATA "
        f"--out {shlex.quote(f'{out}-eval')}{_loading_options(recipe)}",
    }
    return "\n".join(f"{name + ':':9}{text}" for name, text in facts.items() if text)


def _best(log: Sequence[Mapping[str, Any]], recipe: Recipe) -> str:
    """Return the best held-out score; empty without any: the lowest loss of a batch is its samples' luck."""
    metric = "eval_" + str(recipe.training.get("metric_for_best_model") or "loss").removeprefix("eval_")
    greater = recipe.training.get("greater_is_better", not metric.endswith("loss"))
    scored = [entry for entry in log if metric in entry]
    if not scored:
        return ""
    best = (max if greater else min)(scored, key=lambda entry: float(entry[metric]))
    return f"step {best['step']:,}: {describe_fields(best, 'eval_')} (held out)"


def _is_still(line: Mapping[str, Any]) -> bool:
    """Return True if a log line has DPO's loss where it starts, at ln 2, and no margin."""
    margin = line.get("rewards/margins")
    return margin is not None and abs(margin) < 2e-3 and abs(line["loss"] - math.log(2)) < 1e-3


def _loading_options(recipe: Recipe) -> str:
    """Return the options by which `relook eval` loads the model as it was trained; empty for the default ones."""
    dtype = next((name for key, name in HALVES.items() if recipe.training.get(key)), "")
    return f"{f' --dtype {dtype}' if dtype else ''}{f' --bits {recipe.bits}' if recipe.bits != 16 else ''}"
