"""Fixtures that several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def refdata() -> Path:
    """Outputs of the original programs: `../shared/refdata` beside the repository, or the folder in RELOOK_REFDATA."""
    folder = Path(os.environ.get("RELOOK_REFDATA") or Path(__file__).parents[2] / "shared" / "refdata")
    if not folder.is_dir():
        pytest.skip(f"no reference data in {folder}; set RELOOK_REFDATA to its folder")
    return folder
