"""The command on this machine."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from relook.cli.options import AsJson

app = typer.Typer()


@app.command()
def doctor(
    explain: Annotated[
        str,
        typer.Option(help="A warning's text: what it means here. - reads a log from standard input, all lists all."),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Whether this machine can do the work, and what to mend. Status 0: it can, 1: something is missing."""
    if explain:
        from relook.notices import print_notices

        sys.exit(print_notices(sys.stdin.read() if explain == "-" else explain, as_json))
    from relook.doctor import examine, print_findings, to_json

    found = examine()
    if as_json:
        typer.echo(json.dumps(to_json(found), indent=1))
    else:
        print_findings(found)
    if not to_json(found)["healthy"]:
        sys.exit(1)
