"""The documents keep up with the code."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from typer.main import get_command

from relook.cli import app
from relook.model.post_decoder import PostDecoderSettings
from relook.recipe import Recipe, shipped_names
from relook.sweep_config import SWEEP_KEYS

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")


def test_every_recipe_key_is_documented() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    keys = {field.name for field in dataclasses.fields(Recipe)} - {"training", "of_the_model", "post_decoder", "idle"}
    assert not [key for key in keys if f"`{key}`" not in text]
    assert not [key for key in PostDecoderSettings.names() if f".{key}`" not in text]


def test_every_sweep_key_and_shipped_sweep_is_documented() -> None:
    text = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    assert not [key for key in (*SWEEP_KEYS, "rows", "grid", "recipe", *shipped_names("sweep")) if f"`{key}`" not in text]


@pytest.mark.parametrize("name", READMES)
def test_the_readme_shows_folders_that_exist_and_every_command(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    tree = re.search(r"^relook/\n.*?^```", text, re.M | re.S)
    assert tree
    named = set(re.findall(r"\b[\w-]+\.py\b", tree[0]))
    assert named <= {path.name for path in (ROOT / "relook").rglob("*.py")}
    assert all((ROOT / "relook" / folder).is_dir() for folder in re.findall(r"^  (\w+)/ ", tree[0], re.M))
    assert not [command for command in get_command(app).commands if f"`relook {command} " not in text]  # type: ignore[attr-defined]


def test_the_readmes_show_the_same_numbers() -> None:
    tables = [re.findall(r"^\| \w+ \| \d+\.\d.*$", (ROOT / name).read_text(encoding="utf-8"), re.M) for name in READMES]
    assert tables[0]
    assert tables[0] == tables[1]


def test_the_readmes_have_the_same_rows_once() -> None:
    """By their first cells, which are names; but for those that say what a table is of."""
    rows = [
        [re.sub("[、，]", ", ", cell).replace("：", ": ") for cell in re.findall(r"^\| (\S*`.*?) \| ", text, re.M)]
        for text in ((ROOT / name).read_text(encoding="utf-8") for name in READMES)
    ]
    assert len(rows[0]) == len(set(rows[0])) > 20
    assert rows[0] == rows[1]


def test_documents_name_recipes_that_exist() -> None:
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in (*READMES, "docs/real-data.md"))
    named = set(re.findall(r"relook train ([\w-]+)", text)) - {"RECIPE"}
    assert named <= {*shipped_names("recipe")}


@pytest.mark.parametrize("document", [*READMES, *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert not [link for link in links if not ((ROOT / document).parent / link).exists()]
