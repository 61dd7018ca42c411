"""Descriptions of recipes and their keys: for `relook recipes`, `relook train RECIPE --help` and the documents."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from relook.console import plain_table, stdout_console
from relook.flags import DEFAULTS, IGNORED, UNSUPPORTED
from relook.recipe import (
    CHOICES,
    DPO_KEYS,
    SFT_KEYS,
    Recipe,
    objective_name,
    read_yaml_or_shipped,
    regime_name,
    shipped_names,
)

# Headings of the keys for people, by the first key of each group.
SECTIONS = {
    "task": "Model and data",
    "lora_enable": "What trains",
    "loss_type": "Loss",
    "feature_cache": "Speed and memory",
}


@dataclass(frozen=True)
class KeyDescription:
    """One recipe key for people.

    Args:
        section: heading under which it stands.
        kind: its type, or its choices.
        default: relook's default; REQUIRED if there is none.
        meaning: what it does, as a phrase.
    """

    name: str
    section: str
    kind: str
    default: Any
    meaning: str


REQUIRED = "required"
MEANINGS = {
    "warmup_steps": "Steps of a linear warmup; below 1, their share of all steps"
}  # transformers' help has half
TRAINING_SECTION = "transformers' TrainingArguments"


def describe_keys() -> list[KeyDescription]:
    """Describe every recipe key in order: relook's own, the post decoder's, then transformers' arguments.

    The one source for `relook train RECIPE --help` and the reference in the documents.
    """
    from transformers import TrainingArguments

    from relook.model.post_decoder import PostDecoderSettings

    described, section = [], ""
    for entry in dataclasses.fields(Recipe):
        section = SECTIONS.get(entry.name, section)
        if entry.name == "post_decoder":
            meanings = argument_meanings(PostDecoderSettings)
            described += [
                KeyDescription(f"post_decoder.{f.name}", section, str(f.type), f.default, meanings[f.name])
                for f in dataclasses.fields(PostDecoderSettings)
            ]
        elif "meaning" in entry.metadata:
            choices = CHOICES.get(entry.name)
            kind = (
                " | ".join(map(str, choices))
                if choices
                else str(entry.type).removesuffix(" | None").replace("Any", "str | list")
            )
            default = REQUIRED if entry.default is dataclasses.MISSING else entry.default
            described.append(KeyDescription(entry.name, section, kind, default, entry.metadata["meaning"]))
    for argument in dataclasses.fields(TrainingArguments):
        if argument.name in (*IGNORED, *UNSUPPORTED, "output_dir"):
            continue
        kind = argument.type.__name__ if isinstance(argument.type, type) else str(argument.type).replace(" | None", "")
        default = (
            None if argument.default is dataclasses.MISSING else getattr(argument.default, "value", argument.default)
        )
        default = DEFAULTS.get(argument.name, default)
        # The first sentence; the rest is in transformers' documentation.
        meaning = re.split(r"(?<=[a-z)`])\. ", " ".join(argument.metadata.get("help", "").split()))[0].rstrip(".")
        meaning = MEANINGS.get(argument.name, meaning)
        described.append(KeyDescription(argument.name, TRAINING_SECTION, kind.rpartition(".")[2], default, meaning))
    return described


def argument_meanings(documented: type) -> dict[str, str]:
    """Read the arguments' meanings from the `Args:` section of a class's docstring, by name."""
    _, _, section = (inspect.getdoc(documented) or "").partition("Args:\n")
    entries = re.findall(r"^    ([\w, ]+): (.+(?:\n     +.+)*)", section, re.M)
    return {name: " ".join(text.split()).rstrip(".") for names, text in entries for name in names.split(", ")}


def shipped_description(name: str, kind: str = "recipe") -> tuple[str, str]:
    """Return what a shipped file's first comment says: what it is, and after `Source:` where it comes from."""
    text = (resources.files("relook") / f"{kind}s" / f"{name}.yaml").read_text(encoding="utf-8")
    comment = re.match(r"(?:#.*\n)*", text)
    words = " ".join(line.lstrip("# ") for line in (comment[0] if comment else "").splitlines())
    purpose, _, source = words.partition("Source:")
    return purpose.strip(), source.strip()


def shipped_recipes() -> list[dict[str, str]]:
    """Return a line for each shipped recipe: what it trains, by what loss, on what data, and its source."""
    lines = []
    for name in shipped_names("recipe"):
        values = read_yaml_or_shipped(name, "recipe")
        purpose, source = shipped_description(name)
        data = "conversations" if values["task"] == "sft" else "pairs"
        lines.append(
            {
                "recipe": name,
                "trains": regime_name(values),
                "loss": objective_name(values),
                "data": f"toyworld's {data}" if name.startswith("toyworld") else data,
                "what": purpose,
                "source": source,
            }
        )
    return lines


def print_recipes(lines: Sequence[Mapping[str, str]]) -> None:
    """Print `shipped_recipes` as a table."""
    table = plain_table("recipe", "trains", "source")
    table.columns[0].no_wrap = True
    for line in lines:
        # What differs from the source stands behind its first clause; `relook train RECIPE --help` has it.
        trains = f"{line['trains']} by {line['loss']} on {line['data']}"
        table.add_row(line["recipe"], trains, line["source"].partition(";")[0])
    console = stdout_console()
    console.print(table)
    console.print("\nrelook train RECIPE --help lists a recipe's keys; docs/recipes.md explains them.")


def print_recipe(name: str, command: str) -> None:
    """Print what a recipe is, and its keys by section: type, value and meaning.

    Keys of another task are left out, as are transformers' arguments that the recipe does not set.

    Args:
        command: the command that the recipe is for.

    Raises:
        RecipeError: there is no such recipe.
    """
    values = read_yaml_or_shipped(name, "recipe")
    console = stdout_console()
    console.print(f"Usage: {command} {name} [--KEY VALUE]...\n")
    if name in shipped_names("recipe"):
        console.print("{}\nSource: {}\n".format(*shipped_description(name)))
    console.print("A key in a recipe's file or as --KEY VALUE; * marks what this recipe sets.\n")
    other_task = DPO_KEYS if values.get("task") == "sft" else SFT_KEYS
    flat = {**values, **{f"post_decoder.{key}": value for key, value in (values.get("post_decoder") or {}).items()}}
    shown = [
        key
        for key in describe_keys()
        if key.name not in other_task and (key.section != TRAINING_SECTION or key.name in flat or key.name in DEFAULTS)
    ]
    for section in dict.fromkeys(key.section for key in shown):
        table = plain_table(section, "type", "value", "meaning")
        for key in shown:
            if key.section == section:
                # An empty path in a shipped recipe is one that the user gives.
                is_set = flat.get(key.name) not in (None, "")
                value = flat[key.name] if is_set else key.default
                table.add_row(f"--{key.name}", key.kind, f"{_text(value)}{' *' if is_set else ''}", key.meaning)
        console.print(table)
        console.print()
    console.print("Every other argument of transformers' TrainingArguments is a key, too.")
    console.print(f"`{command} --help` lists the command's own options; docs/recipes.md explains the keys.")


def _text(value: Any) -> str:
    """Write a value as a recipe has it."""
    return str(value).lower() if isinstance(value, bool) else "" if value is None else str(value)
