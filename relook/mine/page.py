"""Some pairs as pictures, in one HTML file: what is wrong in the rejected text is marked."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from relook.evaluate.chair import Vocabulary
from relook.files import write_text
from relook.mine.match import Pair
from relook.mine.pictures import Picture
from relook.report.parts import card, described, document, lines, thumbnail

PAGE, CARDS = "pairs.html", 20
DESCRIBED = 15  # of them description pairs, where there are as many


def write_page(
    out: Path,
    pairs: Sequence[Pair],
    records: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Picture],
    vocabulary: Vocabulary | None,
) -> None:
    """Write `out/pairs.html`: pairs from all over the list.

    Args:
        vocabulary: of the annotations; without one the words in which the texts differ are marked.
    """
    asked = _spread(records, CARDS - min(len(pairs), DESCRIBED))
    shown = _spread(pairs, CARDS - len(asked))
    cards = [card(thumbnail(pair.picture.path), _described(pair, vocabulary)) for pair in shown]
    cards += [card(thumbnail(pictures[record["image_id"]].path), _asked(record)) for record in asked]
    heads = [
        "<h1>Preference pairs from the model's own mistakes</h1>",
        f"<p>{len(shown)} of {len(pairs):,} pairs of descriptions, {len(asked)} of {len(records):,} of answers</p>",
    ]
    write_text(out / PAGE, document("relook mine", [*heads, *cards]))


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """Up to `count` values from all over a list."""
    count = min(count, len(values))
    return [values[i * len(values) // count] for i in range(count)]


def _described(pair: Pair, vocabulary: Vocabulary | None) -> str:
    if vocabulary is None:
        return lines([("chosen", html.escape(pair.chosen)), ("rejected", differing(pair.rejected, pair.chosen))])
    return described(pair.picture.objects, [("chosen", pair.chosen), ("rejected", pair.rejected)], vocabulary)


def _asked(record: Mapping[str, Any]) -> str:
    said = {name: html.escape(record[name]) for name in ("question", "chosen", "reject", "answer")}
    wrong = ("rejected", f"<mark>{said['reject']}</mark>")
    return lines(
        [("question", said["question"]), ("chosen", said["chosen"]), wrong, ("the model said", said["answer"])]
    )


def differing(text: str, other: str) -> str:
    """A text as HTML, the words marked that another one does not have in their place."""
    words, others = (re.findall(r"\s+|\S+", one) for one in (text, other))
    parts = []
    for kind, start, end, _, _ in SequenceMatcher(None, words, others, autojunk=False).get_opcodes():
        part = html.escape("".join(words[start:end]))
        parts.append(f"<mark>{part}</mark>" if kind != "equal" and part else part)
    return "".join(parts)
