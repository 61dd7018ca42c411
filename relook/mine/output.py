"""The files that mining writes: HA-DPO's or SENTINEL's with their images, TRL's parquet, a data card, and a page.

The folder is a Visual Genome folder to HA-DPO's readers: `image_data.json` names the images that pairs use, and they
lie beside it, as links where the disk has them already.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from relook.data.convert import DESC, IMAGES, POPE, SENTINEL, convert_pairs
from relook.data.samples import as_id
from relook.data.sentinel import SentinelPair, read_sentinel_records, sentinel_texts
from relook.errors import DataError, preview
from relook.evaluate.tasks.chair import Vocabulary
from relook.files import atomic_file, read_json, write_json, write_text
from relook.mine.pairs import MinedPair
from relook.mine.pictures import MinedImage
from relook.report.pages import Spans, described, render, thumbnail

# ----------------------------------------------------------------------------------------------------

PARQUET, CARD, README = "pairs.parquet", "card.json", "README.md"
FOLDER = "VG_100K"  # one of those that Visual Genome has


SENTENCES = f"{SENTINEL}.json"


def write_pairs(
    out: Path,
    by_sentence: bool,
    pairs: Sequence[MinedPair],
    records: Sequence[Mapping[str, Any]],
    earlier: Path | None = None,
) -> None:
    """Write `desc_data.json` and `pope_data.json`; or `sentinel.json` with both kinds of pairs.

    Args:
        earlier: folder of such files, whose pairs come first.
    """
    if not by_sentence:
        described: dict[str, dict[str, list[str]]] = read_json(earlier / DESC) if earlier else {}
        for pair in pairs:
            sides = described.setdefault(pair.picture.id, {"chosen": [], "rejected": []})
            sides["chosen"].append(pair.chosen)
            sides["rejected"].append(pair.rejected)
        write_json(out / DESC, described)
        write_json(out / POPE, [*(read_json(earlier / POPE) if earlier else ()), *records])
        return
    by_image: dict[str, list[dict[str, Any]]] = read_json(earlier / SENTENCES) if earlier else {}
    for pair in pairs:
        # Records say whether an end mark follows only where SENTINEL's layout, by its context, says otherwise.
        texts = SentinelPair(pair.prompt, *pair.answers, pair.context, pair.complete)
        by_image.setdefault(pair.picture.id, []).append(sentinel_texts(texts))
    for record in records:
        answers = {"y_win": record["chosen"], "y_lose": record["reject"], "origin": record["origin"]}
        by_image.setdefault(record["image_id"], []).append({"question": record["question"], "context": None, **answers})
    write_json(out / SENTENCES, by_image)


def pair_files(out: Path, by_sentence: bool) -> list[Path]:
    """Return the files of `write_pairs`.

    Raises:
        DataError: a file is missing.
    """
    paths = [out / name for name in ((SENTENCES,) if by_sentence else (DESC, POPE))]
    if missing := [path.name for path in paths if not path.exists()]:
        kind = "sentence" if by_sentence else "description"
        raise DataError(f"{out} has no {preview(missing)}.", f"Name a folder of `relook mine --by {kind}`.")
    return paths


def named_images(out: Path, by_sentence: bool) -> set[str]:
    """Return the ids of the images that the files of `write_pairs` name."""
    if by_sentence:
        return {as_id(record.image_id) for record in read_sentinel_records(out / SENTENCES)}
    return {*read_json(out / DESC), *(record["image_id"] for record in read_json(out / POPE))}


def count_pairs(out: Path, by_sentence: bool) -> int:
    """Count the records in the files of `write_pairs`."""
    if by_sentence:
        return sum(map(len, read_json(out / SENTENCES).values()))
    return sum(len(sides["chosen"]) for sides in read_json(out / DESC).values()) + len(read_json(out / POPE))


def write_images(out: Path, pictures: Iterable[MinedImage], contents: Mapping[str, str]) -> None:
    """Write `image_data.json` and the images, named by their content.

    Args:
        contents: hash of each picture's file, by id.
    """
    entries = []
    for picture in pictures:
        name = f"{contents[picture.id][:16]}{picture.path.suffix.lower()}"
        # Readers take folder and file from the end of the url, as with Visual Genome's own.
        entries.append({"image_id": picture.id, "url": f"https://relook.invalid/{FOLDER}/{name}"})
        _link(picture.path, out / FOLDER / name)
    write_json(out / IMAGES, entries)


def _link(source: Path, target: Path) -> None:
    if target.exists():
        return
    with atomic_file(target) as temporary:
        try:
            os.link(source.resolve(), temporary)
        except OSError:  # another disk, or one without links
            shutil.copyfile(source, temporary)


def write_pairs_parquet(out: Path) -> None:
    """Write TRL's columns, converted from the files of `write_pairs` and `write_images`."""
    # A stopped run may have left one, and a conversion overwrites nothing.
    (out / PARQUET).unlink(missing_ok=True)
    convert_pairs(out, out / PARQUET, "trl")


def write_card(out: Path, card: Mapping[str, Any]) -> None:
    """Write the data card for people, then the one for programs: with it the folder is complete."""
    write_text(out / README, _readme(card))
    write_json(out / CARD, card)


def _provenance(card: Mapping[str, Any]) -> str:
    engine = card.get("engine")
    parts = [f"hash {card['model_hash']}"] if card["model_hash"] else []
    if engine:
        parts.append(f"answers by {engine['name']} {engine['version'] or ''}".strip())
    return f"({', '.join(parts)})"


def _readme(card: Mapping[str, Any]) -> str:
    pictures, described, questions = card["pictures"], card["descriptions"], card["questions"]
    excluded, lengths = card["apart"], card["lengths"]
    by_sentence = card["by"] == "sentence"
    kind = "sentence" if by_sentence else "description"
    files = (
        f"| `{SENTENCES}` | SENTINEL's layout, also the question pairs; the images are those of `{IMAGES}` |"
        if by_sentence
        else f"| `{DESC}`, `{POPE}` | HA-DPO's layout; the images are those of `{IMAGES}` |"
    )
    lines = [
        "# Preference pairs from a model's own mistakes",
        "",
        f"Mined by relook from the model `{card['model']}` {_provenance(card)}, seed {card['seed']}. "
        f"Mistakes were found by {_finder(card)}.",
        "",
        "| file | what is in it |",
        "|---|---|",
        files,
        *([f"| `{PARQUET}` | the same pairs in TRL's columns, images included |"] if card["parquet"] else []),
        "| `pairs.html` | some pairs with their pictures |",
        f"| `{CARD}` | all that is said here, for programs |",
        "",
        "| | |",
        "|---|---|",
        *_rows("pictures found", pictures["found"], pictures["left_out"]),
        *_cost(described.get("cost", {})),
        *_rows(f"{kind}s made", described["made"], {}),
        *_rows("of them with mistakes", described["hallucinated"], {}),
        *_corrections(described.get("corrections", {})),
        *_rows(f"{kind} pairs found", described["found"], described["dropped"]),
        *_rows(f"**{kind} pairs**", described["pairs"], {}),
        *_rows("yes/no questions asked", questions["asked"], {}),
        *_rows("of them answered wrong", questions["wrong"], {}),
        *_rows("of them answered neither yes nor no", questions["unreadable"], {}),
        *_rows("**question pairs**, half of them with answer yes", questions["pairs"], {}),
        *_rows("pairs of earlier mining, which come first", card.get("earlier", 0), {}) * ("earlier" in card),
        *(row for judge in card["judge"] for row in _rows("replies of the judge", judge["replies"], judge["unjudged"])),
        "",
        *(_lengths(kind, lengths) if described["pairs"] else ()),
        f"Evaluation images: {excluded['names']:,} by name and {excluded['images']:,} as files were given, from "
        f"{', '.join(excluded['given'])}; none of them is used."
        if excluded["given"]
        else "Evaluation images: none were named, so none were left out.",
    ]
    return "\n".join(lines) + "\n"


def _cost(cost: Mapping[str, Any]) -> list[str]:
    """Return what pairs by sentence took, and why their descriptions ended."""
    if not cost:
        return []
    return [
        *_rows("times that an image was read", cost["images_read"], {}),
        *_rows("tokens sampled", cost["tokens_sampled"], {}),
        *_rows("checks", cost["checks"], {}),
        *(f"| descriptions: {why} | {count:,} |" for why, count in cost["descriptions"].items()),
        *_rows("sentences without a verdict", cost["sentences_not_judged"], {}),
        *_rows(
            "sentences corrected, since the model mostly went on with what is false", cost["sentences_corrected"], {}
        ),
    ]


def _corrections(corrections: Mapping[str, int]) -> list[str]:
    """Return what became of false sentences: all else in a chosen text is kept as the model wrote it."""
    titles = {
        "exchanged": "nouns exchanged for those of present objects, in sentences that list what is there",
        "taken_out": "words before them taken out, such as colours",
        "neutral": "sentences exchanged for neutral ones",
        "worsened": "descriptions without a mistake, paired with one in which a present object became an absent one",
    }
    return [f"| {title} | {corrections[kind]:,} |" for kind, title in titles.items() if kind in corrections]


def _lengths(kind: str, lengths: Mapping[str, Any]) -> list[str]:
    return [
        f"| {kind} pairs, words | chosen | rejected |",
        "|---|---|---|",
        f"| mean length | {lengths['chosen_words']} | {lengths['rejected_words']} |",
        f"| pairs in which it is the longer side | {lengths['chosen_longer']:,} | {lengths['chosen_shorter']:,} |",
        "",
        f"The means differ by {100 * lengths['means_differ']:.1f} %.",
        "",
    ]


def _finder(card: Mapping[str, Any]) -> str:
    if card["own_answers"]:
        return "the model's own answers to yes/no questions"
    if card["annotations"] != "none":
        return f"annotations ({card['annotations']})" + (
            f", and {card['judge'][0]['model']} gave both sides one style" if card["judge"] else ""
        )
    return f"a judge ({card['judge'][0]['model']}) that saw the pictures"


def _rows(title: str, count: int, reasons: Mapping[str, int]) -> list[str]:
    return [f"| {title} | {count:,} |", *(f"| not used: {reason} | {n:,} |" for reason, n in reasons.items())]


# ----------------------------------------------------------------------------------------------------
# Some pairs with their pictures, in one HTML file: what is wrong in the rejected text is marked.

PAGE, CARDS = "pairs.html", 20
DESCRIBED = 15  # of them description pairs, where there are as many


def write_pairs_page(
    out: Path,
    pairs: Sequence[MinedPair],
    records: Sequence[Mapping[str, Any]],
    images: Mapping[str, MinedImage],
    vocabulary: Vocabulary | None,
    by_sentence: bool = False,
    complete: bool = False,
) -> None:
    """Write `out/pairs.html`: pairs from all over the list.

    Args:
        complete: whether pairs by sentence are complete descriptions.
        vocabulary: of the annotations; without one the words in which the texts differ are marked.
    """
    # Questions fill the room that description pairs leave, and the other way round.
    questions = _sample_evenly(records, CARDS - min(len(pairs), DESCRIBED))
    shown = _sample_evenly(pairs, CARDS - len(questions))
    recipe, files = "post-decoder", f"--desc_data_path {DESC} --pope_data_path {POPE}"
    if by_sentence:
        files = f"--pairs_path {SENTENCES}" + (" --dpo_tokens differing --nll_weight 1" if complete else "")
        recipe = recipe if complete else "sentinel"
    page = render(
        "pairs.html.j2",
        title="Preference pairs",
        steps=[
            (
                # Without a path, because the same mining writes the same file in any folder.
                "Train on these pairs, from their folder",
                f"relook train {recipe} --model_name_or_path MODEL --vg_path . {files} --output_dir runs/mine",
            ),
            (
                "See what the run changed",
                "relook eval pope chair --model runs/mine --data COCO --out eval/mine --dtype bfloat16",
            ),
        ],
        kind="sentences" if by_sentence else "descriptions",
        description_count=len(pairs),
        question_count=len(records),
        descriptions=[
            {"thumbnail": thumbnail(pair.picture.path), "texts": _description_texts(pair, vocabulary)} for pair in shown
        ],
        questions=[
            {"thumbnail": thumbnail(images[record["image_id"]].path), "texts": _question_texts(record)}
            for record in questions
        ],
    )
    write_text(out / PAGE, page)


def _sample_evenly(values: Sequence[Any], count: int) -> list[Any]:
    """Return up to `count` values from all over a list."""
    count = min(count, len(values))
    return [values[i * len(values) // count] for i in range(count)]


def _description_texts(pair: MinedPair, vocabulary: Vocabulary | None) -> list[tuple[str, Spans]]:
    before: list[tuple[str, Spans]] = [("So far", [(pair.context, False)])] if pair.context else []
    if vocabulary is None:
        return [*before, ("Chosen", [(pair.chosen, False)]), ("Rejected", mark_differences(pair.rejected, pair.chosen))]
    sides = described(pair.picture.objects, [("Chosen", pair.chosen), ("Rejected", pair.rejected)], vocabulary)
    return [*sides[:1], *before, *sides[1:]]


def _question_texts(record: Mapping[str, Any]) -> list[tuple[str, Spans]]:
    titles = {"question": "Question", "chosen": "Chosen", "reject": "Rejected", "answer": "The model said"}
    return [(title, [(record[key], key == "reject")]) for key, title in titles.items()]


def mark_differences(text: str, other: str) -> Spans:
    """Cut a text at the words that another one does not have in their place, which are the wrong spans."""
    words, other_words = (re.findall(r"\s+|\S+", side) for side in (text, other))
    # autojunk would leave frequent words of long texts out of the comparison.
    blocks = SequenceMatcher(None, words, other_words, autojunk=False).get_opcodes()
    return [("".join(words[start:end]), kind != "equal") for kind, start, end, _, _ in blocks if end > start]
