"""Console output during a run: timed phases, progress bars on a terminal, and tables."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(stderr=True, highlight=False)

ProgressReport = Callable[..., None]
"""Called as report(done, total, note=""): how much is done, and a note beside the bar."""


def prints_output() -> bool:
    """Return True if this process prints for all of them (rank 0 under torchrun and similar launchers)."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def progress(title: str, ready: int = 0) -> Iterator[ProgressReport]:
    """Show a progress bar for one piece of work; if the output is not a terminal, print one line at the end.

    Args:
        ready: how many results an earlier run left, besides those that are reported.
    """
    started = time.monotonic()
    # Without a terminal the bar would fill a log file with escape codes.
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        transient=True,
        disable=not (console.is_terminal and prints_output()),
    )
    count = 0
    with bar:
        task = bar.add_task(title, total=None, note="")

        def report(done: int, total: int, note: str = "") -> None:
            nonlocal count
            count = total
            bar.update(task, completed=done, total=total, note=note)

        yield report
    if prints_output():
        counts = [f"{count:,} in {time.monotonic() - started:.1f} s"] if count or not ready else []
        console.print(f"  {title}: {', '.join([*counts, *([f'{ready:,} there already'] if ready else [])])}")


def status(text: str, style: str = "") -> None:
    """Print a line for the user on standard error; standard output is reserved for results.

    Markup is not interpreted: a path may contain brackets.
    """
    if prints_output():
        console.print(text, style=style, markup=False, soft_wrap=True)


@contextmanager
def without_status() -> Iterator[None]:
    """Print no lines while the block runs: they are about files that the user never sees."""
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before


def stdout_console() -> Console:
    """Return a console on standard output, for tables. Markup is not interpreted, and a pipe gets wide lines."""
    console = Console(markup=False, highlight=False)
    # rich assumes 80 columns for a pipe and would fold cells that a program reads.
    if not console.is_terminal:
        console.width = 200
    return console


def plain_table(*columns: str, right: Collection[str] = ()) -> Table:
    """Build a table without rules; the columns named in `right` hold numbers and are right-aligned."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        # Where columns do not fit, text is folded before numbers are.
        number = column in right
        table.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=number)
    return table


def fits(table: Table, console: Console) -> bool:
    """Return True if a table's columns need no more than the console's width."""
    return console.measure(table, options=console.options.update(width=1000)).maximum <= console.width


def readable_seconds(seconds: float) -> str:
    """Format a duration for people: 1 h 05 min, 3 min 20 s, 45 s."""
    total = round(seconds)
    if total >= 3600:
        return f"{total // 3600} h {total % 3600 // 60:02} min"
    return f"{total // 60} min {total % 60:02} s" if total >= 60 else f"{total} s"


def readable_size(size: float) -> str:
    """Format a number of bytes for people: 1.5 GB."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"
