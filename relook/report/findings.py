"""What was found, in words: sentences from differences and their intervals, as careful as these are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from relook.evaluate.tasks.pope import SPLITS
from relook.report.tables import UNCLEAR, change, decimal, verdict
from relook.report.terms import METRIC_TERMS

HARDEST = "adversarial"  # the split that a headline is about


def headline(name: str, base: Mapping[str, Any], paired: Mapping[str, Any], reference: str = "") -> str:
    """Say in one line how a model differs from a reference; what is unclear is called so.

    Args:
        base: the reference's scores.
        paired: `compare`'s result: the model minus the reference, by benchmark.
        reference: what the reference is called; empty where it is obvious.
    """
    than = f" than {reference}" if reference else ""
    clauses = []
    if "chair" in paired:
        invented, recall = paired["chair"]["chair_i"], paired["chair"]["recall"]
        before = base["chair"]["chair_i"]
        if verdict(invented, -1) != UNCLEAR and before:
            amount = decimal(abs(invented["difference"]) / before, 100, digits=0)
            clauses.append(f"invents {amount} % {_fewer(invented)} objects in its captions{than}")
        else:
            clauses.append(f"shows no clear change in invented objects{f' against {reference}' if reference else ''}")
        # Saying less is the cheapest way to invent less: it belongs into the same line.
        if verdict(recall, 1) == "worse":
            clauses.append("finds fewer of those that are there")
    if "pope" in paired:
        answers = paired["pope"][HARDEST]
        kind = verdict(answers, 1)
        if kind != UNCLEAR:
            clauses.append(f"answers {'more' if kind == 'better' else 'fewer'} {HARDEST} questions right")
        elif not clauses:
            clauses.append(f"shows no clear change in answers to {HARDEST} questions")
    return f"{name} {' and '.join([', '.join(clauses[:-1]), clauses[-1]] if clauses[1:] else clauses)}"


def _fewer(paired: Mapping[str, Any]) -> str:
    return "fewer" if paired["difference"] < 0 else "more"


def details(scores: Mapping[str, Any], base: Mapping[str, Any], paired: Mapping[str, Any]) -> list[str]:
    """Return a sentence with the numbers behind each clause of a headline, also of those that are unclear."""
    sentences = []
    if "chair" in paired:
        sentences += [
            f"Of the objects that captions name, {_from_to(scores, base, 'chair_i')} are not in the picture "
            f"({_points(paired['chair']['chair_i'], -1)}).",
            f"Of the objects in the pictures, captions name {_from_to(scores, base, 'recall')} "
            f"({_points(paired['chair']['recall'], 1)}).",
        ]
    if "pope" in paired:
        splits = [f"{split} {_points(paired['pope'][split], 1)}" for split in reversed(SPLITS)]
        sentences.append(f"Right answers to yes/no questions: {'; '.join(splits)}.")
    return sentences


def _from_to(scores: Mapping[str, Any], base: Mapping[str, Any], key: str) -> str:
    now, before = (decimal(side["chair"][key], METRIC_TERMS[f"chair.{key}"].scale) for side in (scores, base))
    return f"{now} % instead of {before} %"


def _points(paired: Mapping[str, Any], better: int) -> str:
    number, _, interval = change(paired).partition(" ")
    return f"{number} points {interval}, {verdict(paired, better)}".replace(" ,", ",")


CONTROLS = {  # what a control of the demo lacks, and what it is
    "nll_control": ("The preference term", "trained on the good texts alone"),
    "no_cross_attention": ("Looking at the picture again", "which has as many weights and cannot look"),
}


def against_control(name: str, paired: Mapping[str, Any]) -> str:
    """Say what the part that a control lacks adds to it."""
    part, control = CONTROLS[name]
    shown = {
        "invented objects": (paired["chair"]["chair_i"], -1),
        f"right answers, {HARDEST}": (paired["pope"][HARDEST], 1),
    }
    verdicts = {verdict(*difference) for difference in shown.values()}
    conclusion = "adds nothing that this test can see" if verdicts == {UNCLEAR} else "makes a difference"
    numbers = "; ".join(f"{rate} {_points(*difference)}" for rate, difference in shown.items())
    return f"{part} {conclusion}: against the control, {control}, {numbers}."


def sweep_headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say how many rows of a sweep differ clearly from the base, on the hardest split, by corrected p-values."""
    clear = [row["paired"]["pope"][HARDEST] for row in rows if row["paired"]["pope"][HARDEST]["mcnemar_p_holm"] < 0.05]
    better = sum(paired["difference"] > 0 for paired in clear)
    worse = len(clear) - better
    if not clear:
        return f"None of {len(rows)} variants clearly changes how many {HARDEST} questions are answered right"
    count, word = (better, "more") if better else (worse, "fewer")
    both = f", {worse} fewer" if better and worse else ""
    verb = "answers" if count == 1 else "answer"
    return f"Of {len(rows)} variants, {count} {verb} {word} {HARDEST} questions right than the base{both}"
