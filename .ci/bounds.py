"""Print pip constraints for an end of the ranges in pyproject.toml: `python .ci/bounds.py oldest|newest`.

torch stays as it is installed. The oldest end pins every lower bound; the newest leaves the rest to pip.
"""

import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = [text for extra, texts in project["optional-dependencies"].items() if extra != "dev" for text in texts]
constraints = [f"torch=={version('torch')}"]
if sys.argv[1] == "oldest":
    for wanted in map(Requirement, (*project["dependencies"], *extras)):
        lower = [f"{wanted.name}=={bound.version}" for bound in wanted.specifier if bound.operator == ">="]
        constraints += lower if wanted.name != "torch" else []
sys.stdout.write("\n".join(constraints) + "\n")
