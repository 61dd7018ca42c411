"""relook: vision-language models that do not claim to see what is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relook.model.load import LoadedModel, load_model

__version__ = "0.1.0"
__all__ = ["LoadedModel", "load_model"]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; `relook --help` and scoring do without them.
    if name in __all__:
        from relook.model import load

        return getattr(load, name)
    raise AttributeError(f"module 'relook' has no attribute {name!r}")
