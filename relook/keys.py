"""Keys and their values, wherever they stand: in YAML files, ones that ship with relook too, and on a command line."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from relook.errors import Faults, RecipeError
from relook.files import read_text


def read_shipped(name: str, kind: str) -> dict[str, Any]:
    """The keys of a YAML file, or of one that ships with relook.

    Args:
        kind: "recipe" or "sweep".
    """
    path = Path(name)
    known = shipped(kind)
    if path.is_file():  # a run's folder may be called as its recipe
        text = read_text(path)
    elif name in known:
        text = (resources.files("relook") / f"{kind}s" / f"{name}.yaml").read_text(encoding="utf-8")
    elif path.suffix in (".yaml", ".yml"):
        raise RecipeError(f"There is no {kind} file {path}.", f"Shipped {kind}s: {', '.join(known)}.")
    else:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean {close[0]}?" if close else f"Give a .yaml file or one of {', '.join(known)}."
        raise RecipeError(f"There is no {kind} {name!r}.", hint)
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not valid YAML: {error}.", "Correct it there.") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{name} is not a mapping of keys to values.", "Write key: value, one a line.")
    return values


def shipped(kind: str) -> list[str]:
    """Names of the recipes or sweeps that ship with relook."""
    folder = resources.files("relook") / f"{kind}s"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """Read `--key value` and `--key=value` pairs, values as YAML (`_value`).

    Raises:
        RecipeError: all words that are neither, and all keys without a value.
    """
    overrides, faults = read_overrides(arguments)
    faults.check()
    return overrides


def read_overrides(arguments: Sequence[str]) -> tuple[dict[str, Any], Faults]:
    """As `parse_overrides`, with the faults beside what could be read."""
    overrides: dict[str, Any] = {}
    faults = Faults()
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        with faults:
            if not word.startswith("--"):
                raise RecipeError(f"{word!r} is neither a key nor the value of one.", "Write --key value.")
            key, equals, value = word[2:].partition("=")
            if not equals:
                if not rest or rest[0].startswith("--"):
                    raise RecipeError(f"--{key} has no value.", f"Write --{key} VALUE, e.g. --{key} true.")
                value = rest.pop(0)
            overrides[key] = _value(value)
    return overrides, faults


def _value(text: str) -> Any:
    """As YAML reads it; but as it stands what that would change without being asked to: paths such as `a #2`, 0123."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    asked = value is None or isinstance(value, (bool, list, dict)) or text.startswith(("'", '"'))
    number = isinstance(value, (int, float)) and str(value) == text
    return value if asked or number else text


def fit(key: str, value: Any, annotation: Any) -> Any:
    """Check a value against the annotation of its field; YAML reads 2e-6 as a string, so numbers are converted."""
    if isinstance(value, Path):
        value = str(value)
    # Annotations are strings in relook's dataclasses and types in transformers'.
    kind = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    kinds = {part.strip() for part in kind.split("|")}
    if not kinds & {"bool", "int", "float", "str"} or kinds - {"bool", "int", "float", "str", "None"}:
        return value
    if value is None:
        if "None" in kinds:
            return value
    elif isinstance(value, bool):
        if "bool" in kinds:
            return value
    elif isinstance(value, (int, float, str)):
        for name, convert in (("int", int), ("float", float)):
            if name in kinds:
                try:
                    number = convert(value)
                except (ValueError, OverflowError):
                    continue
                if name == "float" or float(value) == number:
                    return number
        if "str" in kinds:
            return str(value)
    expected = " or ".join(sorted(kinds - {"None"}))
    raise RecipeError(f"{key} is {value!r}, but must be of type {expected}.", "Correct the value.")
