"""What mining leaves: HA-DPO's files with their images, TRL's parquet, a data card, and a page of pictures.

The folder is a Visual Genome folder to HA-DPO's readers: `image_data.json` names the images that pairs use, and they
lie beside it, as links where the disk has them already.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from relook.data.convert import DESC, IMAGES, POPE, convert
from relook.files import whole_file, write_json, write_text
from relook.mine.match import Pair
from relook.mine.pictures import Picture

PARQUET, CARD, README = "pairs.parquet", "card.json", "README.md"
FOLDER = "VG_100K"  # one of those that Visual Genome has


def write_pairs(out: Path, pairs: Sequence[Pair], records: Sequence[Mapping[str, Any]]) -> None:
    """`desc_data.json` and `pope_data.json`."""
    write_json(out / DESC, {pair.picture.id: {"chosen": [pair.chosen], "rejected": [pair.rejected]} for pair in pairs})
    write_json(out / POPE, records)


def write_images(out: Path, pictures: Iterable[Picture], contents: Mapping[str, str]) -> None:
    """`image_data.json` and the images, named by their content.

    Args:
        contents: hash of each picture's file, by id.
    """
    entries = []
    for picture in pictures:
        name = f"{contents[picture.id][:16]}{picture.path.suffix.lower()}"
        entries.append({"image_id": picture.id, "url": f"https://relook.invalid/{FOLDER}/{name}"})
        _link(picture.path, out / FOLDER / name)
    write_json(out / IMAGES, entries)


def _link(source: Path, target: Path) -> None:
    if target.exists():
        return
    with whole_file(target) as temporary:
        try:
            os.link(source.resolve(), temporary)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, temporary)


def write_parquet(out: Path) -> None:
    """TRL's columns, made from the files that are there."""
    (out / PARQUET).unlink(missing_ok=True)
    convert(out, out / PARQUET, "trl")


def write_card(out: Path, card: Mapping[str, Any]) -> None:
    """The data card for people, and then the one for programs: with it the folder is complete."""
    write_text(out / README, _readme(card))
    write_json(out / CARD, card)


def _readme(card: Mapping[str, Any]) -> str:
    pictures, described, asked = card["pictures"], card["descriptions"], card["questions"]
    apart, long = card["apart"], card["lengths"]
    lines = [
        "# Preference pairs from a model's own mistakes",
        "",
        f"Mined by relook from the model `{card['model']}` (hash {card['model_hash']}), seed {card['seed']}. "
        f"Mistakes were found by {_finder(card)}.",
        "",
        "| file | what is in it |",
        "|---|---|",
        f"| `{DESC}`, `{POPE}` | HA-DPO's layout; the images are those of `{IMAGES}` |",
        *([f"| `{PARQUET}` | the same pairs in TRL's columns, images included |"] if card["parquet"] else []),
        "| `pairs.html` | some pairs with their pictures |",
        f"| `{CARD}` | all that is said here, for programs |",
        "",
        "| | |",
        "|---|---|",
        *_rows("pictures found", pictures["found"], pictures["left_out"]),
        *_rows("descriptions made", described["made"], {}),
        *_rows("of them with mistakes", described["hallucinated"], {}),
        *_rows("description pairs found", described["found"], described["dropped"]),
        *_rows("**description pairs**", described["pairs"], {}),
        *_rows("yes/no questions asked", asked["asked"], {}),
        *_rows("of them answered wrong", asked["wrong"], {}),
        *_rows("**question pairs**, half of them with answer yes", asked["pairs"], {}),
        *(row for one in card["judge"] for row in _rows("replies of the judge", one["replies"], one["unjudged"])),
        "",
        *(_lengths(long) if described["pairs"] else ()),
        f"Evaluation images: {apart['names']:,} names and {apart['images']:,} image files were given, from "
        f"{', '.join(apart['given'])}; none of them is used."
        if apart["given"]
        else "Evaluation images: none were named, so none were left out.",
    ]
    return "\n".join(lines) + "\n"


def _lengths(long: Mapping[str, Any]) -> list[str]:
    return [
        "| description pairs, words | chosen | rejected |",
        "|---|---|---|",
        f"| mean length | {long['chosen_words']} | {long['rejected_words']} |",
        f"| pairs in which it is the longer side | {long['chosen_longer']:,} | {long['chosen_shorter']:,} |",
        "",
        f"The means differ by {100 * long['means_differ']:.1f} %.",
        "",
    ]


def _finder(card: Mapping[str, Any]) -> str:
    if card["annotations"] != "none":
        return f"annotations ({card['annotations']})" + (
            f", and {card['judge'][0]['model']} gave both sides one style" if card["judge"] else ""
        )
    return f"a judge ({card['judge'][0]['model']}) that saw the pictures"


def _rows(title: str, count: int, reasons: Mapping[str, int]) -> list[str]:
    return [f"| {title} | {count:,} |", *(f"| not used: {reason} | {n:,} |" for reason, n in reasons.items())]
