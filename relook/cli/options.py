"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from relook.errors import DataError


def _existing_path(value: Path | list[Path] | None) -> Path | list[Path] | None:
    """Refuse a path that does not exist."""
    # Typer calls this before the command imports torch, which takes seconds.
    for path in value if isinstance(value, list) else [value]:
        if path is not None and not path.exists():
            raise DataError(f"{path} does not exist.", "Check the path.")
    return value


def input_option(text: str) -> Any:
    """Declare an option that is a path to read."""
    return typer.Option(help=text, callback=_existing_path)


def input_argument(text: str) -> Any:
    """Declare an argument that is a path to read."""
    return typer.Argument(help=text, callback=_existing_path)


Tower = Annotated[
    Path | None,
    typer.Option(help="The vision tower's folder, or name in Hugging Face's cache, if the model's config lacks it."),
]
Adapter = Annotated[Path | None, input_option("A change that is laid on the model.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Bits = Annotated[int, typer.Option(help="8 or 4 quantise the language model (needs relook\\[quant]).")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; empty: a GPU where there is one.")]
Version = Annotated[str, typer.Option(help="Conversation template; empty: the model's own.")]
JudgeUrl = Annotated[str, typer.Option(help="OpenAI-compatible endpoint of a judge, as https://api.openai.com/v1.")]
JudgeModel = Annotated[str, typer.Option(help="The judge's name there.")]
JudgePrice = Annotated[tuple[float, float], typer.Option(help="Dollars per million tokens: of prompts, of replies.")]
JudgeKey = Annotated[str, typer.Option(help="Environment variable that holds the endpoint's key.")]
JudgeWorkers = Annotated[int, typer.Option(help="Prompts before the judge at once.", min=1)]
JudgeRequest = Annotated[str, typer.Option(help="JSON: further fields of its requests; null leaves one out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON instead of tables.")]
