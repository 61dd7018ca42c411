"""Which pictures are left out before a model sees them: unreadable ones, repeated ones, and those of evaluations.

Two pictures are the same where their bytes are, or where their difference hashes, 64 signs of brightness between
neighbours in a 9 x 8 thumbnail, differ in `NEAR` places at most: a picture that was scaled or saved again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from relook.data.images import open_image
from relook.errors import DataError
from relook.files import file_hash, read_json, read_records, read_text
from relook.mine.pictures import Picture, also_called, image_files

NEAR = 3  # of 64 places
BANDS = 4  # of 16 places; two hashes that differ in fewer places than there are bands agree in one whole band
UNREADABLE, LISTED, SHOWN = "unreadable", "listed as evaluation image", "evaluation image"
LOOKS_SHOWN = "near-duplicate of an evaluation image"
TWICE, LOOKS_TWICE = "duplicate", "near-duplicate"


def look_at(key: str, path: Path) -> dict[str, Any]:
    """What is kept of an image file: its content's SHA-256 and its difference hash; or what is wrong with it."""
    try:
        image = open_image(path)
    except DataError as error:
        return {"key": key, "fault": error.what}
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=int)
    bits = (grey[:, 1:] > grey[:, :-1]).ravel()
    return {"key": key, "content": file_hash(path), "look": np.packbits(bits).tobytes().hex()}


class Looks:
    """Difference hashes, found again by those that are near."""

    def __init__(self) -> None:
        self.bands: list[dict[int, list[int]]] = [{} for _ in range(BANDS)]

    def add(self, look: int) -> None:
        for number, band in enumerate(self.bands):
            band.setdefault(look >> (16 * number) & 0xFFFF, []).append(look)

    def near(self, look: int) -> bool:
        """Whether one of them differs in `NEAR` places at most."""
        return any(
            (look ^ other).bit_count() <= NEAR
            for number, band in enumerate(self.bands)
            for other in band.get(look >> (16 * number) & 0xFFFF, ())
        )


@dataclass
class Seen:
    """Contents and looks of pictures."""

    contents: set[str] = field(default_factory=set)
    looks: Looks = field(default_factory=Looks)

    def add(self, record: Mapping[str, Any]) -> None:
        self.contents.add(record["content"])
        self.looks.add(int(record["look"], 16))


def names_in(path: Path) -> frozenset[str]:
    """The images that a file names, as `Picture.names` has them.

    It may be a question or answer file (keys image, image_id, image_name, file_name), COCO's instances, HA-DPO's
    desc_data.json, a list of ids, or a text file with a name or number a line.

    Raises:
        DataError: it names none.
    """
    if path.suffix.lower() in (".json", ".jsonl"):
        try:
            held = read_json(path)
        except DataError:
            held = read_records(path)
        if isinstance(held, dict):
            held = [held] if _image_values(held) else held.get("images", list(held))
        values = [value for record in held for value in _image_values(record)]
    else:
        values = [line.strip() for line in read_text(path).splitlines()]
    found = frozenset(name for value in values if str(value) for name in _names(str(value)))
    if not found:
        raise DataError(f"{path} names no images.", "Give question files, annotations, or a list of names.")
    return found


def _image_values(record: Any) -> list[Any]:
    if not isinstance(record, dict):
        return [record] if isinstance(record, (str, int)) else []
    keys = ("image", "image_id", "image_name", "file_name", *(("id",) if "file_name" in record else ()))
    return [record[key] for key in keys if isinstance(record.get(key), (str, int))]


def _names(value: str) -> frozenset[str]:
    return frozenset({f"id:{int(value)}"}) if value.isdecimal() else also_called(value)


def evaluation_files(folder: Path) -> list[Path]:
    """The image files of a folder of evaluation images.

    Raises:
        DataError: there are none.
    """
    found = image_files(folder)
    if not found:
        raise DataError(f"{folder} holds no images.", "Check --exclude.")
    return found


@dataclass(frozen=True)
class Apart:
    """What decides which pictures are left out.

    Args:
        seen: what `look_at` found, by a picture's id.
        listed: names of evaluation images.
        shown: what `look_at` found in folders of evaluation images.
    """

    seen: Mapping[str, Mapping[str, Any]]
    listed: frozenset[str] = frozenset()
    shown: Sequence[Mapping[str, Any]] = ()

    def left_out(self, pictures: Iterable[Picture]) -> dict[str, str]:
        """Why pictures are not mined, by id; of pictures that are the same, the first stays."""
        evaluated, earlier = Seen(), Seen()
        for record in self.shown:
            if "fault" not in record:
                evaluated.add(record)
        reasons: dict[str, str] = {}
        for picture in pictures:
            record = self.seen[picture.id]
            reason = UNREADABLE if "fault" in record else LISTED if self.listed & picture.names else ""
            for held, same, near in ((evaluated, SHOWN, LOOKS_SHOWN), (earlier, TWICE, LOOKS_TWICE)):
                if not reason and record["content"] in held.contents:
                    reason = same
                if not reason and held.looks.near(int(record["look"], 16)):
                    reason = near
            if reason:
                reasons[picture.id] = reason
            else:
                earlier.add(record)
        return reasons
