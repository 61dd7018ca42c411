"""What was found, in words: sentences from differences and their intervals, as careful as these are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from relook.evaluate.tasks.pope import SPLITS
from relook.report.tables import UNCLEAR, UNDEFINED, change, decimal, is_clear, verdict
from relook.report.terms import METRIC_TERMS

HARDEST = "adversarial"  # the split that a headline is about
MANY_UNCLEAR = 0.05  # share of unclear answers above which rates say little


def headline(name: str, base: Mapping[str, Any], paired: Mapping[str, Any], reference: str = "") -> str:
    """Say in one line how a model differs from a reference; what is unclear is called so.

    Args:
        base: the reference's scores.
        paired: `compare`'s result: the model minus the reference, by benchmark.
        reference: what the reference is called; empty where it is obvious.
    """
    than, against = (f" {word} {reference}" if reference else "" for word in ("than", "against"))
    clauses = []
    if "chair" in paired:
        invented, recall = paired["chair"]["chair_i"], paired["chair"]["recall"]
        before = base["chair"]["chair_i"]
        if verdict(invented, -1) == UNDEFINED:
            clauses.append(f"cannot be judged by invented objects{against}, as captions of one or both name none")
        elif is_clear(invented) and before:
            amount = decimal(abs(invented["difference"]) / before, 100, digits=0)
            clauses.append(f"invents {amount} % {_fewer(invented)} objects in its captions{than}")
        else:
            clauses.append(f"shows no clear change in invented objects{against}")
        # Saying less is the cheapest way to invent less: it belongs into the same line.
        if verdict(recall, 1) == "worse":
            clauses.append("finds fewer of those that are there")
    if "pope" in paired:
        answers = paired["pope"][HARDEST]
        if is_clear(answers):
            clauses.append(f"answers {'more' if answers['difference'] > 0 else 'fewer'} {HARDEST} questions right")
        elif not clauses:
            clauses.append(f"shows no clear change in answers to {HARDEST} questions")
    return f"{name} {' and '.join([', '.join(clauses[:-1]), clauses[-1]] if clauses[1:] else clauses)}"


def _fewer(paired: Mapping[str, Any]) -> str:
    return "fewer" if paired["difference"] < 0 else "more"


def details(scores: Mapping[str, Any], base: Mapping[str, Any], paired: Mapping[str, Any]) -> list[str]:
    """Return a sentence with the numbers behind each clause of a headline, also of those that are unclear."""
    sentences = []
    if "chair" in paired:
        invented = paired["chair"]["chair_i"]
        sentences += [
            f"Of the objects that captions name, {_from_to(scores, base, 'chair_i')} are not in the picture "
            f"({_points(invented, -1)})."
            if verdict(invented, -1) != UNDEFINED
            else _names_nothing(scores, base),
            f"Of the objects in the pictures, captions name {_from_to(scores, base, 'recall')} "
            f"({_points(paired['chair']['recall'], 1)}).",
        ]
    if "pope" in paired:
        splits = [f"{split} {_points(paired['pope'][split], 1)}" for split in reversed(SPLITS)]
        sentences.append(f"Right answers to yes/no questions: {'; '.join(splits)}.")
    return sentences


def _names_nothing(scores: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    """Say whose captions name no object, so that there is no share of invented ones, and what the other's share is."""
    shares = {"the model's": scores["chair"]["chair_i"], "the reference's": base["chair"]["chair_i"]}
    silent = [whose for whose, share in shares.items() if share is None]
    rest = [f"; of {whose} objects, {decimal(share, 100)} % are not in the picture"
            for whose, share in shares.items() if share is not None]  # fmt: skip
    text = f"{' and '.join(silent)} captions name no object{''.join(rest)}."
    return text[0].upper() + text[1:]


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
    """Say what the part that a control lacks adds to it, by both measures; one seed alone is no proof."""
    part, control = CONTROLS[name]
    shown = {
        "invented objects": (paired["chair"]["chair_i"], -1),
        f"right answers, {HARDEST}": (paired["pope"][HARDEST], 1),
    }
    verdicts = {verdict(*difference) for difference in shown.values()}
    conclusion = {
        frozenset({"better"}): "helps by both measures",
        frozenset({"worse"}): "does harm by both measures",
        frozenset({"better", "worse"}): "helps by one measure and does harm by the other",
        frozenset({"better", UNCLEAR}): "helps by one measure of two, which is no proof that it helps",
        frozenset({"worse", UNCLEAR}): "does harm by one measure of two, which is no proof that it does",
        frozenset({UNCLEAR}): "adds nothing that this test can see",
    }.get(frozenset(verdicts), "cannot be judged by both measures")
    numbers = "; ".join(f"{rate} {_points(*difference)}" for rate, difference in shown.items())
    return f"{part}, with this one seed, {conclusion}: against the control, {control}, {numbers}."


def unclear_answers(scores_by_name: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return a warning if yes/no answers are so often unclear that rates say little; nothing otherwise.

    Args:
        scores_by_name: scores by the name of what they are of: evaluations, benchmarks.
    """
    counts = {name: unclear_counts(scores) for name, scores in scores_by_name.items()}
    shares = [
        f"{unclear:,} of {answers:,} of {name}"
        for name, (unclear, answers) in counts.items()
        if unclear > MANY_UNCLEAR * answers
    ]
    return [f"Unclear yes/no answers: {', '.join(shares)}. Do not trust their rates."] if shares else []


def unclear_counts(scores: Mapping[str, Any]) -> tuple[int, int]:
    """Add up the unclear answers, and all answers, of every part of nested scores that counts unclear ones."""
    if "unclear" in scores:
        return scores["unclear"], scores["n"]
    parts = [unclear_counts(part) for part in scores.values() if isinstance(part, Mapping)]
    return sum(unclear for unclear, _ in parts), sum(answers for _, answers in parts)


def sweep_headline(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say how many rows of a sweep differ clearly from the base, on the hardest split (`is_clear`)."""
    differences = [row["paired"]["pope"][HARDEST] for row in rows]
    clear = [paired for paired in differences if is_clear(paired)]
    better = sum(paired["difference"] > 0 for paired in clear)
    worse = len(clear) - better
    if not clear:
        return f"None of {len(rows)} variants clearly changes how many {HARDEST} questions are answered right"
    count, word = (better, "more") if better else (worse, "fewer")
    both = f", {worse} fewer" if better and worse else ""
    verb = "answers" if count == 1 else "answer"
    return f"Of {len(rows)} variants, {count} {verb} {word} {HARDEST} questions right than the base{both}"
