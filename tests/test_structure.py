"""The core of relook (what trains, answers and scores) imports no annex (commands, servers, pages, estimates ...)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import relook

PACKAGE = Path(relook.__file__).parent
ROOM_ANNEXES = {  # annexes that lie in a folder of the core
    "data": {"layouts", "check", "convert", "examine"},
    "model": {"export", "inspect"},
    "forward": set(),
    "generate": set(),
    "train": {"__main__"},  # the command, as `torchrun -m relook.train` starts it
}
CORE_MODULES = {
    *(f"relook.{name}" for name in ("recipe", "flags", "errors", "files", "console", "distributed")),
    *(f"relook.evaluate.{name}" for name in ("run", "results", "benchmark", "statistics")),
    *(f"relook.evaluate.tasks.{name}" for name in ("pope", "chair")),
    "relook.evaluate.tasks",
}
CONTAINERS = {"relook", "relook.evaluate"}  # packages without code of their own, and the public API


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def is_core(module: str) -> bool:
    folder, _, name = module.removeprefix("relook.").partition(".")
    return module in CORE_MODULES or (folder in ROOM_ANNEXES and name not in ROOM_ANNEXES[folder])


def imported_modules(module: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of each module of relook that a module imports, inside functions too.

    What stands under `if TYPE_CHECKING` is never imported.
    """
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for_types = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            # `from relook.data import images` imports a module, `from relook.data.images import open_image` a name.
            names = [name if (name := f"{source}.{alias.name}") in MODULES else source for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name in MODULES)


def test_the_core_imports_no_annex() -> None:
    offences = {
        f"{MODULES[module].relative_to(PACKAGE.parent)}:{line} imports the annex {imported}": None
        for module in sorted(filter(is_core, MODULES))
        for line, imported in imported_modules(module)
        if not is_core(imported) and imported not in CONTAINERS
    }
    assert not offences, "\n".join(offences)


def test_every_module_that_the_core_is_made_of_exists() -> None:
    annexes = {f"relook.{folder}.{name}" for folder, names in ROOM_ANNEXES.items() for name in names}
    assert not (CORE_MODULES | annexes | CONTAINERS) - MODULES.keys()
