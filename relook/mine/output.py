"""What mining leaves: HA-DPO's files with their images, TRL's parquet, a data card, and a page of pictures.

The folder is a Visual Genome folder to HA-DPO's readers: `image_data.json` names the images that pairs use, and they
lie beside it, as links where the disk has them already.
"""

from __future__ import annotations

import html
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from relook.data.convert import DESC, IMAGES, POPE, convert
from relook.evaluate.tasks.chair import Vocabulary
from relook.files import whole_file, write_json, write_text
from relook.mine.pairs import Pair
from relook.mine.pictures import Picture
from relook.report.pages import card, described, document, lines, thumbnail

# ----------------------------------------------------------------------------------------------------

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
        "| description pairs, words | chosen | rejected |",
        "|---|---|---|",
        f"| mean length | {long['chosen_words']} | {long['rejected_words']} |",
        f"| pairs in which it is the longer side | {long['chosen_longer']:,} | {long['chosen_shorter']:,} |",
        "",
        f"The means differ by {100 * long['means_differ']:.1f} %.",
        "",
        f"Evaluation images: {apart['names']:,} names and {apart['images']:,} image files were given, from "
        f"{', '.join(apart['given'])}; none of them is used."
        if apart["given"]
        else "Evaluation images: none were named, so none were left out.",
    ]
    return "\n".join(lines) + "\n"


def _finder(card: Mapping[str, Any]) -> str:
    if card["annotations"] != "none":
        return f"annotations ({card['annotations']})" + (
            f", and {card['judge'][0]['model']} gave both sides one style" if card["judge"] else ""
        )
    return f"a judge ({card['judge'][0]['model']}) that saw the pictures"


def _rows(title: str, count: int, reasons: Mapping[str, int]) -> list[str]:
    return [f"| {title} | {count:,} |", *(f"| not used: {reason} | {n:,} |" for reason, n in reasons.items())]


# ----------------------------------------------------------------------------------------------------
# Some pairs as pictures, in one HTML file: what is wrong in the rejected text is marked.

PAGE, CARDS = "pairs.html", 20
DESCRIBED = 15  # of them description pairs, where there are as many


def write_page(
    out: Path,
    pairs: Sequence[Pair],
    records: Sequence[Mapping[str, Any]],
    pictures: Mapping[str, Picture],
    vocabulary: Vocabulary | None,
) -> None:
    """Write `out/pairs.html`: pairs from all over the list.

    Args:
        vocabulary: of the annotations; without one the words in which the texts differ are marked.
    """
    asked = _spread(records, CARDS - min(len(pairs), DESCRIBED))
    shown = _spread(pairs, CARDS - len(asked))
    cards = [card(thumbnail(pair.picture.path), _described(pair, vocabulary)) for pair in shown]
    cards += [card(thumbnail(pictures[record["image_id"]].path), _asked(record)) for record in asked]
    heads = [
        "<h1>Preference pairs from the model's own mistakes</h1>",
        f"<p>{len(shown)} of {len(pairs):,} pairs of descriptions, {len(asked)} of {len(records):,} of answers</p>",
    ]
    write_text(out / PAGE, document("relook mine", [*heads, *cards]))


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """Up to `count` values from all over a list."""
    count = min(count, len(values))
    return [values[i * len(values) // count] for i in range(count)]


def _described(pair: Pair, vocabulary: Vocabulary | None) -> str:
    if vocabulary is None:
        return lines([("chosen", html.escape(pair.chosen)), ("rejected", differing(pair.rejected, pair.chosen))])
    return described(pair.picture.objects, [("chosen", pair.chosen), ("rejected", pair.rejected)], vocabulary)


def _asked(record: Mapping[str, Any]) -> str:
    said = {name: html.escape(record[name]) for name in ("question", "chosen", "reject", "answer")}
    wrong = ("rejected", f"<mark>{said['reject']}</mark>")
    return lines(
        [("question", said["question"]), ("chosen", said["chosen"]), wrong, ("the model said", said["answer"])]
    )


def differing(text: str, other: str) -> str:
    """A text as HTML, the words marked that another one does not have in their place."""
    words, others = (re.findall(r"\s+|\S+", one) for one in (text, other))
    parts = []
    for kind, start, end, _, _ in SequenceMatcher(None, words, others, autojunk=False).get_opcodes():
        part = html.escape("".join(words[start:end]))
        parts.append(f"<mark>{part}</mark>" if kind != "equal" and part else part)
    return "".join(parts)
