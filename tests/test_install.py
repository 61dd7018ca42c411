"""An editable install, as `pip install -e .` makes it, beside folders that have the package's name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_an_editable_install_wins_over_the_folder_of_the_clone(tmp_path: Path) -> None:
    """In the folder where `git clone` made `relook/`, which Python takes for a namespace package."""
    clone, site = tmp_path / "relook", tmp_path / "site"
    for name in ("pyproject.toml", "README.md", "LICENSE", "relook/__init__.py", "relook/errors.py"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, clone / name)
    build = f"import setuptools.build_meta as build; build.build_editable({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(site)
    script = f"import site; site.addsitedir({str(site)!r}); import relook; print(relook.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # -S: without the packages of this Python, where relook is installed.
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(clone / "relook" / "__init__.py")
