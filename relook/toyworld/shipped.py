"""The base model that ships with relook."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from relook.errors import CheckpointError
from relook.files import read_json
from relook.model.load import model_hash


def shipped_base() -> Path:
    """Folder of the base model that was trained by `relook demo --rebuild` and ships with the package."""
    folder = Path(str(resources.files("relook.toyworld") / "base"))
    if not (folder / "config.json").exists():
        raise CheckpointError("This installation ships no base model.", "Use `relook demo --rebuild`.")
    if model_hash(folder) != read_json(folder / "gate.json")["model_hash"]:
        raise CheckpointError(f"The base model in {folder} is not the one that was shipped.", "Install relook again.")
    return folder
