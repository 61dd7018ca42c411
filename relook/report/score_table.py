"""Tables of scores for people: of one evaluation on a terminal, and of any number of them with how each was trained."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from relook.console import fits, plain_table, status, stdout_console
from relook.errors import DataError, Faults
from relook.evaluate.results import COMPARISON_FILE, EVAL_FILE, NOT_SETTINGS
from relook.evaluate.tasks import BENCHMARKS, get_benchmark
from relook.files import read_json_object, read_text, write_text
from relook.recipe import objective_name, parse_yaml, regime_name
from relook.report.findings import unclear_answers
from relook.report.tables import recorded

NOTHING = "–"  # in place of a ratio of nothing
SPLITS = ("random", "popular", "adversarial")
QUESTIONS = {"pope": "", "repope": "RePOPE "}  # benchmarks of yes/no questions, and what stands before their splits
POPE_RATES = {
    "accuracy": "Accuracy", "precision": "Precision", "recall": "Recall", "f1": "F1", "yes_ratio": "Yes ratio",
}  # fmt: skip
CHAIR_RATES = {"chair_s": "CHAIR_s", "chair_i": "CHAIR_i"}
NAMES = {"f1": "F1", **CHAIR_RATES}  # others are shown as they are
LABELS = ("Model", "Method", "Regime", "lr", "Epoch")
FORMATS = ("text", "markdown", "csv")

# ----------------------------------------------------------------------------------------------------
# `relook eval` and `relook score` on a terminal.


def print_scores(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print results by benchmark: a line for each rate with its 95 % interval, a column for each part."""
    console = stdout_console()
    for name, result in results.items():
        parts = dict(_parts(result, {"length", *get_benchmark(name).ratings} if name in BENCHMARKS else ()))
        # Three intervals fit into 80 columns.
        for start in range(0, len(parts), 3):
            shown = dict(list(parts.items())[start : start + 3])
            table = plain_table(name.upper(), *shown, right=tuple(shown))
            for rate in dict.fromkeys(rate for rates in shown.values() for rate in rates):
                table.add_row(
                    NAMES.get(rate, rate.replace("_", " ")), *(rates.get(rate, "") for rates in shown.values())
                )
            console.print(table)
            console.print()
        if not parts:  # of other programs' benchmarks, which have no intervals
            for key, value in _leaves(result):
                console.print(f"{name} {key}: {value}")
    if any(dict(_parts(result)) for result in results.values()):
        console.print("Rates are percent; brackets: 95 % interval over images.", style="dim")
    for warning in unclear_answers({name.upper(): result for name, result in results.items()}):
        status(warning)


def _leaves(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the numbers and texts of a nested result, each with its path; where they come from is left out."""
    for key, value in result.items():
        if isinstance(value, Mapping) and key != "provenance":
            yield from _leaves(value, f"{prefix}{key} ")
        elif isinstance(value, str | int | float):
            yield f"{prefix}{key}", value


def _parts(
    result: Mapping[str, Any], ratings: Collection[str] = (), part: str = ""
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each part of a result that has rates, with its cells by rate."""
    cells = {}
    for key, value in result.items():
        if f"{key}_ci" in result:
            scale = 1 if key in ratings else 100
            cells[key] = _rate(value, scale, 1 if scale == 100 else 2)
            if interval := result[f"{key}_ci"]:
                low, high = (f"{scale * end:.1f}" if scale == 100 else f"{end:.2f}" for end in interval)
                cells[key] += f" [{low}, {high}]"
        elif key in ("n", "not_judged"):
            cells[key] = f"{value:,}"
    if len(cells) > 1 or any(f"{key}_ci" in result for key in cells):
        yield part, cells
    for key, value in result.items():
        if isinstance(value, Mapping) and key not in ("provenance", "judge"):
            yield from _parts(value, ratings, f"{part} {key}".strip())


def _rate(value: float | None, scale: int = 100, digits: int = 2) -> str:
    return NOTHING if value is None else f"{scale * value:.{digits}f}"


# ----------------------------------------------------------------------------------------------------
# `relook report --table`: one line per evaluation and split of POPE or RePOPE.


def write_table(folders: Sequence[str | Path], form: str, out: str | Path | None = None) -> str:
    """Make the table of all evaluations in the given folders, and write it to `out` if that is a file.

    Warns on standard error of evaluations whose answers are unclear.

    Args:
        folders: folders of `relook eval`, or of `relook demo` and `relook sweep`, whose evaluations are all taken.
        form: one of FORMATS.

    Raises:
        RelookError: a folder holds no finished evaluation; all such folders in one error.
    """
    evaluations = find_evaluations([Path(folder) for folder in folders])
    text = {"text": _as_text, "markdown": _as_markdown, "csv": _as_csv}[form](score_rows(evaluations))
    if out is not None:
        write_text(Path(out), text)
    answers = {str(folder): {name: read_json_object(folder / f"{name}.json", optional=True) for name in QUESTIONS}
               for folder in evaluations}  # fmt: skip
    for warning in unclear_answers(answers):
        status(warning)
    return text


def find_evaluations(folders: Sequence[Path]) -> list[Path]:
    """Find the finished evaluations: the folders themselves, or those of a demo or sweep below them.

    Comparisons, which `relook report` writes beside evaluations, are passed over.

    Raises:
        DataError: some folders hold no finished evaluation; all of them in one error.
    """
    faults, evaluations = Faults(), []
    for folder in folders:
        inside = [path.parent for path in sorted(folder.rglob(EVAL_FILE))]
        done = [path for path in inside if any((path / f"{name}.json").exists() for name in (*QUESTIONS, "chair"))]
        evaluations += done
        with faults:
            if not done and not (folder / COMPARISON_FILE).exists():
                benchmarks = f"{', '.join(QUESTIONS)} or chair"
                raise DataError(
                    f"{folder} holds no finished evaluation.", f"Give folders of `relook eval` of {benchmarks}."
                )
    faults.check()
    if not evaluations:
        raise DataError("There are only comparisons.", "Give folders of `relook eval`.")
    return evaluations


def score_rows(evaluations: Sequence[Path]) -> list[dict[str, str]]:
    """Return one row per evaluation and split of its questions, by column; one row of an evaluation without any.

    Settings in which the evaluations differ, as their precision, are columns, too.
    """
    settings = setting_columns([read_json_object(folder / EVAL_FILE) for folder in evaluations])
    rows = [
        {**row, **setting} for folder, setting in zip(evaluations, settings, strict=True) for row in _rows_of(folder)
    ]
    columns = dict.fromkeys([*LABELS, *settings[0], "Split", *POPE_RATES.values(), *CHAIR_RATES.values()])
    used = [column for column in columns if any(row.get(column) for row in rows)]
    return [{column: row.get(column, "") for column in (*used, "Folder")} for row in rows]


def setting_columns(evaluations: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the settings in which evaluations differ beside their models, such as `dtype`, of each of them."""
    keys = dict.fromkeys(key for record in evaluations for key in record if key not in NOT_SETTINGS)
    values = {key: [recorded(record.get(key, "")) for record in evaluations] for key in keys}
    differing = {key: column for key, column in values.items() if len(set(column)) > 1}
    return [{key: column[index] for key, column in differing.items()} for index in range(len(evaluations))]


def _rows_of(folder: Path) -> Iterator[dict[str, str]]:
    chair, *of_questions = (read_json_object(folder / f"{name}.json", optional=True) for name in ("chair", *QUESTIONS))
    labels = {**training_labels(read_json_object(folder / EVAL_FILE)), "Folder": str(folder)}
    described = {head: _rate(chair[rate]) for rate, head in CHAIR_RATES.items()} if chair else {}
    splits = {
        f"{title}{split}": scores[split]
        for title, scores in zip(QUESTIONS.values(), of_questions, strict=True)
        for split in SPLITS
        if split in scores
    }
    for split, scores in (splits or {"": {}}).items():
        rates = {head: _rate(scores[rate]) for rate, head in POPE_RATES.items()} if scores else {}
        yield {**labels, "Split": split, **rates, **described}


def training_labels(evaluation: Mapping[str, Any]) -> dict[str, str]:
    """Return how the evaluated model was trained, from the files of its run, by column; a base has only a name.

    Args:
        evaluation: what `relook eval` recorded.
    """
    model = Path(evaluation["model"])
    run = Path(evaluation.get("adapter") or model)
    # A checkpoint of a run stands two folders below its recipe.
    recipe = next((path for folder in (run, run.parent.parent) if (path := folder / "recipe.yaml").is_file()), None)
    # The shipped base has its recipe beside it, but is where others start.
    if recipe is None or not any((run / name).is_file() for name in ("run.json", "trainer_state.json")):
        adapter = {} if run == model else {"Method": run.name}
        return {"Model": _model_name(model), "Regime": "" if adapter else "base", **adapter}
    values = parse_yaml(read_text(recipe), str(recipe))
    record = read_json_object(run / "change.json", optional=True)
    base = Path(record.get("base") or values.get("model_name_or_path") or model)
    rate = values.get("learning_rate")
    return {
        "Model": _model_name(base),
        "Method": objective_name(values),
        "Regime": regime_name(values),
        "lr": "" if rate is None else format(float(rate), "g"),
        "Epoch": _epoch(run),
    }


def _epoch(run: Path) -> str:
    """Return the epoch at the end of a finished run, or of a checkpoint."""
    log = read_json_object(run / "run.json", optional=True).get("log")
    epoch = log[-1].get("epoch") if log else read_json_object(run / "trainer_state.json", optional=True).get("epoch")
    return "" if epoch is None else format(round(float(epoch), 2), "g")


def _model_name(path: Path) -> str:
    # Hugging Face's cache: models--ORGANISATION--NAME/snapshots/HASH
    return (
        path.parent.parent.name.removeprefix("models--").replace("--", "/")
        if path.parent.name == "snapshots"
        else path.name
    )


def _as_text(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a flat table where it fits into the terminal, else a block of splits under a line for each evaluation."""
    console = stdout_console()
    rates = [*POPE_RATES.values(), *CHAIR_RATES.values()]
    # Of several evaluations each is named: by its folder's name alone, if that suffices.
    folders = {row["Folder"] for row in rows}
    short = len({Path(folder).name for folder in folders}) == len(folders)
    rows = [{**row, "Folder": Path(row["Folder"]).name if short else row["Folder"]} for row in rows]
    columns = [*(["Folder"] if len(folders) > 1 else []), *(column for column in rows[0] if column != "Folder")]
    table = plain_table(*columns, right=[*rates, "lr", "Epoch"])
    for row in rows:
        table.add_row(*(row[column] for column in columns))
    if fits(table, console):
        return "\n".join(_lines(table)) + "\n"
    table = plain_table("", *(shown := [column for column in columns if column in rates]), right=shown)
    for row in rows:
        table.add_row(f"  {row.get('Split', '')}", *(row[column] for column in shown))
    head, *lines = _lines(table)
    blocks = [head]
    for _, group in itertools.groupby(zip(rows, lines, strict=True), key=lambda pair: pair[0]["Folder"]):
        members = list(group)
        blocks += [_heading(members[0][0]), *(line for _, line in members)]
    return "\n".join(blocks) + "\n"


def _heading(row: Mapping[str, str]) -> str:
    words = {"lr": "lr ", "Epoch": "epoch "}
    scores = ("Folder", "Split", *POPE_RATES.values(), *CHAIR_RATES.values())
    labels = [f"{words.get(column, '')}{cell}" for column, cell in row.items() if cell and column not in scores]
    return f"{row['Folder']}: {', '.join(labels)}"


def _lines(table: Table) -> list[str]:
    """Render a table to its lines."""
    console = stdout_console()
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()]


def _as_markdown(rows: Sequence[Mapping[str, str]]) -> str:
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row[column] for column in columns] for row in rows)]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _as_csv(rows: Sequence[Mapping[str, str]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()
