"""`relook eval lmms`: the tasks of lmms-eval, which brings their data and scores; relook answers (`lmms_model.py`)."""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from PIL import ImageFile

from relook import distributed
from relook.errors import DataError, RecipeError, RelookError
from relook.evaluate.results import provenance
from relook.evaluate.run import begin_evaluation
from relook.files import read_json, write_json
from relook.generate.answering import GenerationSettings
from relook.model.checkpoint import parse_folder
from relook.model.load import LoadOptions

INSTALL = "Run: pip install 'relook[lmms]' && pip install --no-deps lmms-eval==0.7.3"


def manifest() -> Any:
    """Describe relook to lmms-eval's own command, which finds this by the entry point `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("relook", simple_class_path="relook.evaluate.lmms_model.RelookModel")


def evaluate_tasks(
    model: str | Path,
    tasks: Sequence[str],
    out: str | Path,
    template: str = "",
    batch_size: int = 64,
    max_new_tokens: int = 512,
    limit: int | None = None,
    include_path: str | Path | None = None,
    loading: LoadOptions = LoadOptions(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Answer and score tasks of lmms-eval, one after the other; finished answers and scores are kept.

    Args:
        tasks: names of tasks, or of groups of them.
        max_new_tokens: upper bound on answers to tasks that set none.
        limit: number of documents of each task, from its start.
        include_path: folder of further tasks, as YAML files.

    Returns:
        One entry per name, as written to `out/<name>.json`.

    Raises:
        RelookError: lmms-eval is missing, a task is unknown or cannot be loaded, or the output folder holds other
            answers.
    """
    folder, out = parse_folder(model), Path(out)
    include_path = None if include_path is None else Path(include_path)
    manager = _task_manager(tasks, include_path)
    inputs = {"tasks_from": include_path and str(include_path.resolve()), "limit": limit}
    settings = GenerationSettings(template, max_new_tokens, batch_size)
    settings = begin_evaluation(out, folder, None, settings, loading, **inputs)
    remaining = [name for name in tasks if not (out / f"{name}.json").exists()]
    if remaining:
        from relook.evaluate.lmms_model import RelookModel

        relook = RelookModel(lambda: loading.load(folder), settings, out)
        for name in remaining:
            results = _evaluate(relook, name, manager, limit, out)
            relook.finish()  # every process has answered: make one file of their answers before scores refer to it
            if distributed.is_main():
                write_json(out / f"{name}.json", json.loads(json.dumps(_result(results, out), default=_json_number)))
            distributed.barrier(f"the scores of {name}")
    return {name: read_json(out / f"{name}.json") for name in tasks}


def _task_manager(tasks: Sequence[str], include_path: Path | None) -> Any:
    """Open lmms-eval's index of tasks, and check that it has every name."""
    truncated = ImageFile.LOAD_TRUNCATED_IMAGES
    try:  # import here what is used later, so that a missing package shows before a model is loaded
        from lmms_eval.evaluator import simple_evaluate  # noqa: F401 (as later on)
        from lmms_eval.tasks import TaskManager
        from loguru import logger
    except ImportError as error:
        raise RecipeError(f"lmms-eval is not installed, or not completely: {error}.", INSTALL) from None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = truncated  # importing lmms-eval sets it for the whole process
    logger.remove()  # it writes to standard output, which is for results alone
    logger.add(sys.stderr, level="ERROR", format="lmms-eval: {message}")
    if include_path is not None and not include_path.is_dir():
        raise DataError(f"There is no folder {include_path}.", "Check --include-path.")
    # "ERROR" keeps its warnings about other tasks' files out of the terminal.
    manager = TaskManager("ERROR", str(include_path) if include_path else None)
    for name in tasks:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, 5)
            raise RecipeError(f"lmms-eval has no task {name!r}.", f"Like it: {', '.join(close) or 'none'}.")
    return manager


def _evaluate(relook: Any, name: str, manager: Any, limit: int | None, out: Path) -> Any:
    """Run lmms-eval's evaluator and return its results; None in processes other than the first."""
    from lmms_eval.evaluator import simple_evaluate

    options = SimpleNamespace(output_path=str(out), process_with_media=False)  # tasks write submission files there
    try:
        with redirect_stdout(sys.stderr):  # tasks print, and standard output is for results alone
            return simple_evaluate(
                relook, tasks=[name], task_manager=manager, limit=limit, log_samples=False, cli_args=options
            )
    except RelookError:
        raise
    except Exception as error:  # of a task's own code, of the hub, of a missing key
        last = getattr(error, "last_attempt", None)  # behind lmms-eval's retries
        reason = (last and last.exception()) or error
        raise RelookError(
            f"lmms-eval stopped in task {name}: {type(reason).__name__}: {reason}".rstrip(".") + ".",
            "The answers so far are kept; its data, packages and keys are the task's own.",
        ) from error


def _result(results: Any, out: Path) -> dict[str, Any]:
    """Collect each task's scores under lmms-eval's names, and their provenance."""
    configs = results["configs"]
    tasks = {
        task: {
            "scores": {key: value for key, value in scores.items() if key != "alias" and _is_score(value)},
            **({"n": results["n-samples"][task]["effective"]} if task in results["n-samples"] else {}),
            **({"data": configs[task].get("dataset_path")} if task in configs else {}),
        }
        for task, scores in results["results"].items()
    }
    generation = {task: config.get("generation_kwargs") for task, config in configs.items()}
    libraries = {name: version(name) for name in ("lmms-eval", "datasets")}
    return {"tasks": tasks, "provenance": provenance(out, generation=generation, harness=libraries)}


def _is_score(value: Any) -> bool:
    """Return True if a value is a score: lmms-eval fills in text or an empty list for one it cannot compute."""
    return not isinstance(value, (str, list)) or value not in ([], "N/A", " ", "")


def _json_number(value: Any) -> Any:
    """Convert numpy's numbers, and whatever else a task returns, to something that JSON can hold."""
    return value.item() if hasattr(value, "item") else str(value)
