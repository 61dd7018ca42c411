"""Serving a model over HTTP."""

from __future__ import annotations

import importlib.util

from relook.errors import RelookError


def check_installed() -> None:
    """Raise RelookError if the packages of the extra `serve` are not installed."""
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise RelookError(f"Serving needs {package}.", "Run: pip install 'relook[serve]'")
