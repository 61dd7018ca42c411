"""LLaVA's conversation files (`llava_v1_5_mix665k.json` and its kin; Liu et al. 2023, arXiv:2310.03744)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from relook.data.located import located
from relook.data.prompts import IMAGE
from relook.data.report import ReadReport, Sieve
from relook.data.rules import BadRecord
from relook.data.samples import Conversation, Turn
from relook.errors import DataError
from relook.files import read_json


def read_llava(
    data_path: str | Path, image_folder: str | Path, on_bad: str = "drop"
) -> tuple[list[Conversation], ReadReport]:
    """Read a list of `{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value"}]}`.

    `image` is one path or a list of paths under `image_folder`; entries without it are text only. A record is bad where
    its turns do not alternate from human to gpt, an answer is empty, an image file is missing, or the human turns do
    not hold one `<image>` per image. LLaVA itself silently cuts a first turn that is not human's; here it is bad.

    Args:
        on_bad: "drop" reports bad records; "error" raises at the first one.

    Raises:
        DataError: the file or folder is missing, the file is no JSON array, or a record is bad and `on_bad` is "error".
    """
    data_path, image_folder = Path(data_path), Path(image_folder)
    sieve = Sieve(str(data_path), on_bad)
    records = read_json(data_path)
    if not isinstance(records, list):
        raise DataError(f"{data_path} is not a JSON array.", "Give a file in LLaVA's conversation layout.")
    if not image_folder.is_dir():
        raise DataError(f"There is no image folder {image_folder}.", "Check image_folder.")
    samples = []
    for number, record in enumerate(records):
        name = str(record.get("id", number) if isinstance(record, dict) else number)
        try:
            sample = conversation(name, record, image_folder)
        except BadRecord as bad:
            sieve.drop(name, str(bad))
            continue
        images = tuple(map(located, sample.images))
        if all(image.is_file() for image in images):
            samples.append(replace(sample, images=images))
        else:
            sieve.drop(name, "image file missing")
    return samples, sieve.report(len(samples))


def conversation(name: str, record: Any, image_folder: Path) -> Conversation:
    """One record as a sample; whether its image files exist is not looked at.

    Raises:
        BadRecord: why it cannot be used.
    """
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise BadRecord("no conversations")
    images, turns = _images(record.get("image"), image_folder), _turns(record["conversations"])
    if any(IMAGE in turn.response for turn in turns):
        raise BadRecord(f"{IMAGE} in an answer")
    if sum(turn.prompt.count(IMAGE) for turn in turns) != len(images):
        raise BadRecord(f"number of {IMAGE} differs from the number of images")
    return Conversation(name, images, turns)


def _images(given: Any, image_folder: Path) -> tuple[Path, ...]:
    names = given if isinstance(given, list) else [given] if given else []
    if not all(isinstance(name, str) and name for name in names):
        raise BadRecord("image is not a path")
    return tuple(image_folder / name for name in names)


def _turns(messages: list[Any]) -> tuple[Turn, ...]:
    if not all(isinstance(m, dict) and isinstance(m.get("value"), str) for m in messages):
        raise BadRecord("a turn without text")
    if not messages or [m.get("from") for m in messages] != ["human", "gpt"] * (len(messages) // 2):
        raise BadRecord("turns do not alternate between human and gpt")
    if not all(said["value"].strip() for said in messages[1::2]):
        raise BadRecord("empty answer")
    if not all(asked["value"] for asked in messages[::2]):
        raise BadRecord("empty question")
    return tuple(Turn(a["value"], s["value"]) for a, s in zip(messages[::2], messages[1::2], strict=True))
