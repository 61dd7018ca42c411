"""The rules about single records that every reader, converter and check shares."""

from __future__ import annotations

from typing import Any


class BadRecord(Exception):
    """Why one record cannot be used."""


def check_pair(prompt: Any, chosen: Any, rejected: Any) -> str:
    """Say why three texts are no preference pair; empty where they are one.

    Each must be a text of more than white space, and the answers must differ in more than the white space around them.
    """
    texts = (prompt, chosen, rejected)
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return "empty text"
    return "chosen equals rejected" if chosen.strip() == rejected.strip() else ""


TRUTH = dict.fromkeys(("true", "yes", "y", "1"), True) | dict.fromkeys(("false", "no", "n", "0", "none", "null"), False)


def as_bool(value: Any) -> bool | None:
    """Read a truth value in any of the ways that files write one: true, 1, 1.0, "True", "yes", ...; null is false.

    Returns:
        None where it is none of them.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return TRUTH.get(str(value).strip().lower())


def as_id(value: Any) -> str:
    """Write an id so that 42, "42", "000042" and 42.0 (pandas' numbers beside missing ones) are the same."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    return str(int(text)) if text.isascii() and text.isdecimal() else text
