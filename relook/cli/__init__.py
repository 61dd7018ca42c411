"""The `relook` command: one command, one function call. What a command needs is imported when it is called."""

# Commands do without `from __future__ import annotations`: typer evaluates postponed ones six times, an eighth of the
# time until a command starts.
import logging
import os
import re
import sys
import warnings
from typing import Annotated

import typer

from relook import __version__
from relook.cli import data, evaluate, models, serve, train
from relook.cli.command import App
from relook.errors import Mistakes, RelookError
from relook.files import is_full_disk

app = App(no_args_is_help=True, pretty_exceptions_enable=False)
for group in (train, evaluate, serve, data, models):
    app.add_typer(group.app)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"relook {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Train, evaluate and serve vision-language models that name fewer things which are not in the picture.

    Every command has --help; `relook train RECIPE --help` lists a recipe's keys.
    """


# DeepSpeed's launcher and older ones of torch put this before a program's own arguments; LOCAL_RANK says the same.
LAUNCHERS_WORD = re.compile(r"--local[-_]rank=-?\d+")


def main() -> None:
    """Run the command: errors of the user end in a line each and status 2, Ctrl-C in one line and status 130."""
    sys.argv[1:] = [word for word in sys.argv[1:] if not LAUNCHERS_WORD.fullmatch(word)]
    # The libraries' own bars and notices would clutter relook's lines; what a user has set is kept.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # torch's threads wait for each other by spinning for milliseconds. Where another program has one of their
    # processors, that is most of the time: the demo took over 16 minutes instead of 2, and 4 with this.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app(prog_name="relook")
    except RelookError as error:
        for mistake in error.errors if isinstance(error, Mistakes) else [error]:
            line = " ".join(map(str.strip, str(mistake).splitlines()))  # a library's reason in it may have several
            sys.stderr.write(f"relook: {line}\n")
        sys.exit(2)
    except OSError as error:
        if is_full_disk(error):  # of standard output, or where a library keeps files of its own
            path = error.filename or "What relook writes"
            sys.stderr.write(f"relook: {path}: {error.strerror}. Make room, then run the same command again.\n")
            sys.exit(2)
        if error.filename is None:  # no path to name: a fault of relook's own, which keeps its traceback
            raise
        sys.stderr.write(f"relook: {error.filename}: {error.strerror}. Check the path, and who may write there.\n")
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:  # what typer makes of Ctrl-C
            sys.stderr.write("relook: stopped.\n")
        raise
