"""Sweep files: a recipe, keys that hold for every row, and the rows as a list, a grid or both.

Everything about every row is checked here, before anything runs.
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

from relook.errors import RecipeError, some
from relook.files import text_hash
from relook.model.load import Loading, as_dtype, default_template
from relook.recipe import Recipe, fit, load_recipe

SWEEP_FILE = "sweep.yaml"
BASE = "base"  # how the base is called among the rows
SHARED = ("model_name_or_path", "vision_tower", "version")  # what the base's answers depend on


@dataclass(frozen=True)
class Row:
    """One run of a sweep.

    Args:
        name: of its folders.
        variant: the same without the seed: rows that share it are averaged.
        keys: what sets it apart, by recipe key.
    """

    name: str
    variant: str
    keys: Mapping[str, Any]
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """A sweep file's own keys; all others are a recipe's, and hold for every row.

    Args:
        data: folder with pope/, val2014/ and, for CHAIR, annotations/.
        output_dir: folder of the sweep.
        chair: describe the images, too.
        dtype: of the models that answer.
        batch_size: prompts a batch where answers are generated.
        max_new_tokens: longest description.
    """

    data: str
    output_dir: str
    rows: tuple[Row, ...]
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
    def loading(self) -> Loading:
        recipe = self.rows[0].recipe
        device = "cpu" if recipe.training.get("use_cpu") else ""
        return Loading(None, Path(recipe.vision_tower) if recipe.vision_tower else None, self.dtype, 16, device)

    @property
    def template(self) -> str:
        return self.rows[0].recipe.version or default_template(self.base)

    def loading_of(self, name: str) -> Loading:
        """How a row comes into memory: a run names its vision tower itself."""
        return self.loading if name == BASE else dataclasses.replace(self.loading, vision_tower=None)

    def answers(self, name: str) -> Path:
        return self.out / "eval" / name


OWN = {item.name: item.type for item in dataclasses.fields(Sweep) if item.name != "rows"}


def build_sweep(values: Mapping[str, Any]) -> Sweep:
    """A sweep from a file's keys: every row of `rows` with every combination of `grid`.

    Raises:
        RecipeError: a key or value of any row that does not fit, rows of the same name, or rows with different bases.
    """
    missing = [key for key in ("recipe", "output_dir", "data") if not values.get(key)]
    if missing:
        raise RecipeError(f"The sweep sets no {', '.join(missing)}.", f"Give it in the file or as --{missing[0]}.")
    own = {key: fit(key, values[key], kind) for key, kind in OWN.items() if key in values}
    as_dtype(own.get("dtype", "float32"))
    for key in ("batch_size", "max_new_tokens"):
        if own.get(key, 1) < 1:
            raise RecipeError(f"{key} is {own[key]}.", "Give 1 or more.")
    common = {key: value for key, value in values.items() if key not in (*OWN, "rows", "grid")}
    rows = expand(values.get("rows") or [], values.get("grid") or {})
    labels = names(rows)
    twice = [name for name, count in Counter(name.lower() for name, _ in labels).items() if count > 1 or name == BASE]
    if twice:
        raise RecipeError(f"Rows of the sweep are called {some(twice)} twice.", "Give the rows of `rows` other names.")
    built = []
    for (name, variant), row in zip(labels, rows, strict=True):
        keys = {**common, **row, "output_dir": str(Path(own["output_dir"]) / "runs" / name)}
        if keys.get("model_name_or_path") == "shipped":
            from relook.toyworld.build import shipped_base

            keys["model_name_or_path"] = shipped_base()
        keys.pop("name", None)
        recipe = load_recipe(str(keys.pop("recipe")), keys)
        built.append(Row(name, variant, {key: value for key, value in row.items() if key != "name"}, recipe))
    for key in SHARED:
        found = {str(getattr(row.recipe, key)) for row in built}
        if len(found) > 1:
            raise RecipeError(f"The rows differ in {key} ({some(sorted(found))}).", "Write one sweep for each.")
    return Sweep(rows=tuple(built), **own)


def expand(rows: Any, grid: Any) -> list[dict[str, Any]]:
    """Every row with every combination of the grid's values, the last key of the grid running fastest."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecipeError("rows must be a list of mappings.", "Write rows: [{key: value, ...}, ...].")
    if not isinstance(grid, dict) or not all(isinstance(choices, list) and choices for choices in grid.values()):
        raise RecipeError("grid must map keys to lists of values.", "Write grid: {key: [value, ...], ...}.")
    reserved = {"output_dir", *OWN, *(("name",) if "name" in grid else ())}
    used = set(grid).union(*rows)
    if used & reserved:
        raise RecipeError(f"{some(sorted(used & reserved))} cannot differ between rows.", "Set it for the whole sweep.")
    both = set(grid) & set().union(*rows)
    if both:
        raise RecipeError(f"{some(sorted(both))} stands in rows and in grid.", "Keep one of them.")
    combinations = [dict(zip(grid, chosen, strict=True)) for chosen in itertools.product(*grid.values())]
    return [{**row, **chosen} for row in rows or [{}] for chosen in combinations]


def names(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """A safe file name for each row, from its `name` and the keys in which rows differ; and the same without seed.

    A row with a `name` shows, besides it, only the keys that differ between rows of that name.
    """
    found = []
    for row in rows:
        peers = [other for other in rows if other.get("name") == row.get("name")]
        keys = [key for key in row if key != "name" and len({repr(other.get(key)) for other in peers}) > 1]
        label = [str(row["name"])] if "name" in row else []
        texts = {key: f"{key.rpartition('.')[2]}={_short(row[key])}" for key in keys}
        whole = _safe([*label, *texts.values()])
        found.append((whole, _safe([*label, *(text for key, text in texts.items() if key != "seed")])))
    return found


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    try:
        return format(float(value), "g")  # YAML reads 2e-6 as a string
    except (TypeError, ValueError):
        return Path(value).stem if isinstance(value, str) and "/" in value else str(value)


def _safe(parts: Sequence[str]) -> str:
    text = re.sub(r"[^\w.,=+-]+", "_", ",".join(parts)).strip("._,") or "run"
    return text if len(text) <= 100 else f"{text[:80]}-{text_hash(text)}"
