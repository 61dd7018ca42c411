"""Registry of benchmarks: one line each, naming the module that defines it.

A module is imported only when its benchmark is looked up, so listing the names, as `relook --help` does, costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING

from relook.errors import RecipeError, did_you_mean, preview

if TYPE_CHECKING:
    from relook.evaluate.benchmark import Benchmark

# Each module exports its `Benchmark` under the name BENCHMARK.
BENCHMARKS = {
    "pope": "relook.evaluate.tasks.pope",
    "chair": "relook.evaluate.tasks.chair",
    "shr": "relook.evaluate.tasks.shr",
    "amber": "relook.evaluate.tasks.amber",
    "mmhal": "relook.evaluate.tasks.mmhal",
    "objhal": "relook.evaluate.tasks.objhal",
    "repope": "relook.evaluate.tasks.repope",
}


def get_benchmarks(names: Iterable[str]) -> dict[str, Benchmark]:
    """Import the modules of the named benchmarks and return their definitions, by name.

    Raises:
        RecipeError: there is no benchmark of that name.
    """
    names = list(names)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        raise RecipeError(f"There is no benchmark {preview(unknown)}.", did_you_mean(unknown[0], BENCHMARKS))
    return {name: import_module(BENCHMARKS[name]).BENCHMARK for name in names}


def get_benchmark(name: str) -> Benchmark:
    """Return one benchmark's definition; see `get_benchmarks`."""
    return get_benchmarks([name])[name]
