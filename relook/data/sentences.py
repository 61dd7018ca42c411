"""Where the sentences of a text end."""

from __future__ import annotations

import re

SENTENCE_END = re.compile(r"(?<=[.!?])(\s+)")


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences, at even positions, and the white space between them, at odd ones."""
    return SENTENCE_END.split(text.strip())


def end_of_first_sentence(text: str) -> int | None:
    """Return the index of the white space behind a text's first sentence; None if the text may go on with it."""
    match = SENTENCE_END.search(text, len(text) - len(text.lstrip()))
    return match.start() if match else None
