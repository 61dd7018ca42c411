"""Sweep files: a recipe, keys shared by every row, and the rows as a list, a grid or both.

Every row is checked completely here, before anything runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relook.errors import Faults, RecipeError, preview
from relook.files import text_hash
from relook.model.checkpoint import parse_folder
from relook.model.load import LoadOptions, parse_dtype
from relook.recipe import Recipe, coerce, load_recipe

SWEEP_FILE = "sweep.yaml"
BASE = "base"  # name of the base model among the rows
SHARED_KEYS = ("model_name_or_path", "vision_tower", "version")  # keys that the base model's answers depend on


@dataclass(frozen=True)
class SweepRow:
    """One run of a sweep.

    Args:
        name: name of its folders.
        variant: the name without the seed; rows with the same variant are averaged.
        keys: the row's own values, by recipe key.
        recipe: the complete recipe of the run.
    """

    name: str
    variant: str
    keys: Mapping[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """Settings of a sweep file; all its other keys are recipe keys that apply to every row.

    Args:
        data: folder with pope/, val2014/ and, for CHAIR, annotations/.
        output_dir: folder of the sweep.
        rows: the runs.
        chair: run CHAIR too, which has the models describe images.
        dtype: dtype of the models in evaluation.
        batch_size: prompts per batch when generating answers.
        max_new_tokens: maximum length of descriptions, and of POPE answers if it is below 64.
    """

    data: str
    output_dir: str
    rows: tuple[SweepRow, ...]
    chair: bool = False
    dtype: str = "float32"
    batch_size: int = 64
    max_new_tokens: int = 512

    @property
    def out(self) -> Path:
        return Path(self.output_dir)

    @property
    def base(self) -> Path:
        return Path(self.rows[0].recipe.model_name_or_path)

    @property
    def loading(self) -> LoadOptions:
        recipe = self.rows[0].recipe
        device = "cpu" if recipe.training.get("use_cpu") else ""
        return LoadOptions(None, Path(recipe.vision_tower) if recipe.vision_tower else None, self.dtype, 16, device)

    @property
    def template(self) -> str:
        return self.rows[0].recipe.version or parse_folder(self.base).template

    def loading_of(self, name: str) -> LoadOptions:
        """Return the load options of a row or of the base; a run names its vision tower itself."""
        return self.loading if name == BASE else dataclasses.replace(self.loading, vision_tower=None)

    def answers(self, name: str) -> Path:
        return self.out / "eval" / name


SWEEP_KEYS = {field.name: field.type for field in dataclasses.fields(Sweep) if field.name != "rows"}


def build_sweep(values: Mapping[str, Any]) -> Sweep:
    """Build a sweep from a file's keys: every row of `rows` with every combination of `grid`.

    Raises:
        RecipeError: an invalid key or value in any row, rows with the same name, or rows with different bases.
    """
    missing = [key for key in ("recipe", "output_dir", "data") if not values.get(key)]
    if missing:
        raise RecipeError(f"The sweep sets no {', '.join(missing)}.", f"Give it in the file or as --{missing[0]}.")
    settings = {key: coerce(key, values[key], kind) for key, kind in SWEEP_KEYS.items() if key in values}
    parse_dtype(settings.get("dtype", "float32"))
    for key in ("batch_size", "max_new_tokens"):
        if settings.get(key, 1) < 1:
            raise RecipeError(f"{key} is {settings[key]}.", "Give 1 or more.")
    # All other keys are recipe keys of every row.
    common = {key: value for key, value in values.items() if key not in (*SWEEP_KEYS, "rows", "grid")}
    rows = expand(values.get("rows") or [], values.get("grid") or {})
    if not rows:
        raise RecipeError(
            "The sweep has no rows.", "Give rows: [{key: value}, ...], grid: {key: [value, ...]}, or both."
        )
    labels = row_names(rows)
    # Compare in lower case: some file systems do not tell `A` from `a`.
    twice = [name for name, count in Counter(name.lower() for name, _ in labels).items() if count > 1 or name == BASE]
    if twice:
        raise RecipeError(
            f"Several rows of the sweep are called {preview(twice)}.", "Give each row of `rows` a name of its own."
        )
    built = []
    faults = Faults()
    for (name, variant), row in zip(labels, rows, strict=True):
        keys = {**common, **row, "output_dir": str(Path(settings["output_dir"]) / "runs" / name)}
        if keys.get("model_name_or_path") == "shipped":
            from relook.toyworld.build import shipped_base  # not for sweeps on other models

            keys["model_name_or_path"] = shipped_base()
        keys.pop("name", None)
        with faults:
            recipe = load_recipe(str(keys.pop("recipe")), keys)
            built.append(SweepRow(name, variant, {key: value for key, value in row.items() if key != "name"}, recipe))
    faults.check()
    for key in SHARED_KEYS:
        distinct = {str(getattr(row.recipe, key)) for row in built}
        if len(distinct) > 1:
            raise RecipeError(f"The rows differ in {key} ({preview(sorted(distinct))}).", "Write one sweep for each.")
    return Sweep(rows=tuple(built), **settings)


def expand(rows: Any, grid: Any) -> list[dict[str, Any]]:
    """Combine every row with every combination of the grid's values; the grid's last key varies fastest."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecipeError("rows must be a list of mappings.", "Write rows: [{key: value, ...}, ...].")
    if not isinstance(grid, dict):
        raise RecipeError("grid must map keys to lists of values.", "Write grid: {key: [value, ...], ...}.")
    faults = Faults()
    for key, choices in grid.items():
        if not isinstance(choices, list) or not choices:
            fault = f"grid.{key} is {choices!r}, but grid must map keys to lists of values, of one at least."
            faults.errors.append(RecipeError(fault, f"Write {key}: [value, ...], or leave it out."))
    faults.check()
    # Keys of the sweep itself, and the folder that each row gets from it.
    reserved = {"output_dir", *SWEEP_KEYS, *(("name",) if "name" in grid else ())}
    used = set(grid).union(*rows)
    if used & reserved:
        raise RecipeError(
            f"{preview(sorted(used & reserved))} cannot differ between rows.", "Set it for the whole sweep."
        )
    both = set(grid) & set().union(*rows)
    if both:
        raise RecipeError(f"{preview(sorted(both))} is in rows and in grid.", "Keep one of them.")
    combinations = [dict(zip(grid, chosen, strict=True)) for chosen in itertools.product(*grid.values())]
    return [{**row, **chosen} for row in rows or ([{}] if grid else []) for chosen in combinations]


def row_names(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Build a safe file name for each row, from its `name` and the keys that differ between rows.

    After its `name`, a row shows only the keys that differ between rows of that name.

    Returns:
        For each row, its file name and the same without the seed.
    """
    names = []
    for row in rows:
        # Peers share the row's `name`, or have none either.
        peers = [other for other in rows if other.get("name") == row.get("name")]
        keys = [key for key in row if key != "name" and len({repr(other.get(key)) for other in peers}) > 1]
        label = [str(row["name"])] if "name" in row else []
        texts = {key: f"{key.rpartition('.')[2]}={_short(row[key])}" for key in keys}
        variant = _safe_name([*label, *(text for key, text in texts.items() if key != "seed")])
        names.append((_safe_name([*label, *texts.values()]), variant))
    return names


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return format(float(value), "g")  # YAML reads 2e-6 as a string
    except (TypeError, ValueError):
        return Path(value).stem if isinstance(value, str) and "/" in value else str(value)


def _safe_name(parts: Sequence[str]) -> str:
    text = re.sub(r"[^\w.,=+-]+", "_", ",".join(parts)).strip("._,") or "run"
    # File names end at 255 bytes, and runs add suffixes to this one.
    return text if len(text) <= 100 else f"{text[:80]}-{text_hash(text)}"
