"""LLaVA's conversation files (`llava_v1_5_mix665k.json` and its kin)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from relook.data.prompts import IMAGE
from relook.data.report import ReadReport
from relook.data.samples import Conversation, Turn
from relook.errors import DataError
from relook.files import read_json


class _Bad(Exception):
    """Why one record cannot be used."""


def read_llava(data_path: Path, image_folder: Path, on_bad: str = "drop") -> tuple[list[Conversation], ReadReport]:
    """Read a list of `{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value"}]}`.

    Entries without `image` are text only. Bad records are dropped and reported, or raise, as `on_bad` says.
    """
    records = read_json(data_path)
    if not isinstance(records, list):
        raise DataError(f"{data_path} is not a JSON array.", "Give a file in LLaVA's conversation layout.")
    if not image_folder.is_dir():
        raise DataError(f"There is no image folder {image_folder}.", "Check image_folder.")
    report = ReadReport(str(data_path), on_bad)
    samples = []
    for number, record in enumerate(records):
        try:
            samples.append(_conversation(record, number, image_folder))
        except _Bad as bad:
            report.drop(str(record.get("id", number)) if isinstance(record, dict) else str(number), str(bad))
    report.kept = len(samples)
    return samples, report


def _conversation(record: Any, number: int, image_folder: Path) -> Conversation:
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise _Bad("no conversations")
    names = record.get("image", [])
    names = [names] if isinstance(names, str) else names
    images = tuple(image_folder / name for name in names)
    if any(not image.is_file() for image in images):
        raise _Bad("image missing")
    messages = record["conversations"]
    if not messages or len(messages) % 2:
        raise _Bad("turns do not come in pairs")
    turns = []
    for asked, said in zip(messages[::2], messages[1::2], strict=True):
        if asked.get("from") != "human" or said.get("from") != "gpt":
            raise _Bad("turns do not alternate between human and gpt")
        if not str(said.get("value", "")).strip():
            raise _Bad("empty answer")
        turns.append(Turn(str(asked.get("value", "")), str(said["value"])))
    if sum(turn.prompt.count(IMAGE) for turn in turns) != len(images):
        raise _Bad("number of <image> differs from the number of images")
    return Conversation(str(record.get("id", number)), images, tuple(turns))
