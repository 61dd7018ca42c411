"""The page on the server: a chat about a picture, models side by side, and where the post decoder looked.

Gradio changes from release to release: `app.py` alone knows its components and routes.
"""

from __future__ import annotations

import importlib.util

from relook.errors import RelookError


def installed() -> bool:
    """Return True if the page's packages are installed."""
    return importlib.util.find_spec("gradio") is not None


def check_gradio_installed() -> None:
    """Raise RelookError if they are not."""
    if not installed():
        raise RelookError("The page needs gradio.", "Run: pip install 'relook[page]'")
