"""relook: vision-language models that do not claim to see what is not there.

    import relook
    loaded = relook.load_model("llava-1.5-7b-hf")

`dir(relook)` lists the public functions and classes; each is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from relook.demo import run_demo as run_demo
    from relook.errors import CheckpointError as CheckpointError
    from relook.errors import DataError as DataError
    from relook.errors import RecipeError as RecipeError
    from relook.errors import RelookError as RelookError
    from relook.evaluate.benchmark import ScoringInputs as ScoringInputs
    from relook.evaluate.benchmark import score_command as score_answers  # noqa: F401
    from relook.evaluate.compare import compare as compare_evaluations  # noqa: F401
    from relook.evaluate.run import evaluate_model as evaluate_model
    from relook.mine.jobs import MiningSettings as MiningSettings
    from relook.mine.jobs import MiningSource as MiningSource
    from relook.mine.run import mine_pairs as mine_pairs
    from relook.model.export import WriteOptions as WriteOptions
    from relook.model.export import convert_model as convert_model
    from relook.model.export import export_for as export_for
    from relook.model.export import export_model as export_model
    from relook.model.export import merge_adapter as merge_adapter
    from relook.model.inspect import inspect_model as inspect_model
    from relook.model.load import LoadedModel as LoadedModel
    from relook.model.load import LoadOptions as LoadOptions
    from relook.model.load import load_model as load_model
    from relook.recipe import Recipe as Recipe
    from relook.recipe import build_recipe as build_recipe
    from relook.recipe import load_recipe as load_recipe
    from relook.sweep import run_sweep as run_sweep
    from relook.train.run import train as train_recipe  # noqa: F401

__version__ = "0.1.0"

# Where each public name is defined. Those that carry another name there would hide a package of relook's here.
_PUBLIC = {
    **dict.fromkeys(("LoadOptions", "LoadedModel", "load_model"), "relook.model.load"),
    **dict.fromkeys(("Recipe", "build_recipe", "load_recipe"), "relook.recipe"),
    "train_recipe": "relook.train.run:train",
    "evaluate_model": "relook.evaluate.run",
    "ScoringInputs": "relook.evaluate.benchmark",
    "score_answers": "relook.evaluate.benchmark:score_command",
    "compare_evaluations": "relook.evaluate.compare:compare",
    **dict.fromkeys(("MiningSettings", "MiningSource"), "relook.mine.jobs"),
    "mine_pairs": "relook.mine.run",
    "inspect_model": "relook.model.inspect",
    **dict.fromkeys(
        ("WriteOptions", "convert_model", "export_for", "export_model", "merge_adapter"), "relook.model.export"
    ),
    "run_demo": "relook.demo",
    "run_sweep": "relook.sweep",
    **dict.fromkeys(("CheckpointError", "DataError", "RecipeError", "RelookError"), "relook.errors"),
}
__all__ = [*_PUBLIC]


if not TYPE_CHECKING:  # for type checkers a module with `__getattr__` has every name

    def __getattr__(name: str) -> Any:
        # torch and transformers take seconds to import; `relook --help` and scoring do without them.
        if name not in _PUBLIC:
            raise AttributeError(f"module 'relook' has no attribute {name!r}")
        module, _, inner = _PUBLIC[name].partition(":")
        return getattr(import_module(module), inner or name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
