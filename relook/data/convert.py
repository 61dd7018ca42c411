"""`relook data convert`: lossless conversion of preference pairs between layouts.

    hadpo       a folder: desc_data.json, pope_data.json, and Visual Genome's image_data.json with images
    the others  one parquet file; see `relook.data.parquet`

Each HA-DPO record becomes one pair, drawn as its trainer draws it; the whole record stays in a column `hadpo_record`.
Pairs from elsewhere become records of `pope_data.json`, with their further columns as keys. Rows that a layout cannot
hold are refused by number, and nothing is written.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from relook.console import progress, status
from relook.data.annotations import read_image_records
from relook.data.parquet import (
    COLUMNS,
    Embedded,
    InvalidPair,
    PairFile,
    RawPair,
    content_hash,
    hadpo_record,
    open_parquet,
    pyarrow,
    stored_columns,
    write_parquet,
)
from relook.data.paths import resolve_extension
from relook.data.readers import DESCRIBE_PROMPTS, draw_description_pair, pair_fault
from relook.data.samples import ID_UNKNOWN, IMAGE_MISSING, BadRecord, as_id, missing_fields
from relook.errors import DataError, RecipeError, did_you_mean, preview
from relook.files import atomic_folder, read_json, read_json_object, write_json

PAIR_LAYOUTS = ("hadpo", *COLUMNS)
DESC, POPE, IMAGES, NOTES = "desc_data.json", "pope_data.json", "image_data.json", "relook.json"
RECORD = "hadpo_record"
# Keys of a pope_data.json record for a pair that is not from HA-DPO. Any further key is one of its columns.
QUESTION = ("image_id", "question", "chosen", "reject", "answer", "correct", "image_name")


def convert_pairs(source: str | Path, target: str | Path, to: str, images: str | Path | None = None) -> int:
    """Write the pairs of `source` in another layout and return their number.

    Args:
        source: a folder in HA-DPO's layout, a parquet file, or a folder of parquet files. The layout is detected.
        target: a new folder (hadpo) or a new parquet file (the others).
        to: hadpo, trl, rlhfv or rlaifv.
        images: Visual Genome's folder for a hadpo source, or the root of images that a parquet file only names. The
            default is the source's own folder.

    Raises:
        RecipeError: there is no such layout, or the target exists already or its name does not suit the layout.
        DataError: the source is of no known layout, or `to` cannot hold some rows; these are named, and nothing is
            written.
    """
    source, target = Path(source), Path(target)
    images = None if images is None else Path(images)
    if to not in PAIR_LAYOUTS:
        raise RecipeError(f"There is no preference layout {to!r}.", did_you_mean(to, PAIR_LAYOUTS))
    if target.exists():
        raise RecipeError(f"{target} is there already.", "Choose another place, or remove it.")
    if (target.suffix == ".parquet") != (to != "hadpo"):
        kind = "a new folder" if to == "hadpo" else "a new file that ends in .parquet"
        raise RecipeError(f"{target} does not suit layout {to}.", f"Give {kind}.")
    folder = source.is_dir() and any((source / name).exists() for name in (DESC, POPE))
    opened = open_hadpo(source, images or source) if folder else open_parquet(source, images)
    rows = _pairs(opened, to)
    if to == "hadpo":
        return write_hadpo(target, opened, rows)
    count = write_parquet(target, to, opened, rows)
    if folder and (source / DESC).exists():
        status(
            "  each description pair is written once; a run on HA-DPO's files takes it twice an epoch, as the original"
        )
    return count


def _pairs(source: PairFile, to: str) -> Iterator[RawPair]:
    """Yield the rows that `to` can hold; at the end, raise an error that names the others, so that nothing is written.

    Rows that are not a pair to train on (`check_pair`) are left out and named on screen.
    """
    faults: dict[str, list[int]] = {}
    unusable: dict[str, list[int]] = {}
    with progress("pairs") as report:
        for number, row in enumerate(source.rows()):
            report(number + 1, source.count)
            try:
                if isinstance(row, InvalidPair):
                    raise row
                if to != "trl":  # the other layouts hold exactly one image; raises InvalidPair
                    _ = row.image
            except InvalidPair as bad:
                faults.setdefault(str(bad), []).append(number)
                continue
            if fault := pair_fault(hadpo_record(row), row.prompt, row.chosen, row.rejected):
                unusable.setdefault(fault, []).append(number)
            elif not faults:  # after the first fault nothing is written, and the rest is read only to name all of them
                yield row
    refused, left_out = (
        "; ".join(f"{reason}: {preview(rows, 3)}" for reason, rows in numbers.items()) for numbers in (faults, unusable)
    )
    if faults:
        raise DataError(f"Layout {to} cannot hold all rows ({refused}).", "Repair or remove these, or choose another.")
    if unusable:
        status(f"  {sum(map(len, unusable.values())):,} rows are no pairs and were left out ({left_out})")


# Reading HA-DPO's layout


def open_hadpo(folder: Path, vg_path: Path) -> PairFile:
    """Open a folder with `desc_data.json`, `pope_data.json` or both.

    Raises:
        DataError: a file is broken, or a record lacks a key of its layout.
    """
    described = read_json_object(folder / DESC, optional=True)
    questions = read_json(folder / POPE) if (folder / POPE).exists() else []
    notes = read_json_object(folder / NOTES, optional=True)
    image_records = read_image_records(vg_path)
    lists = isinstance(questions, list)
    if not lists or not all(isinstance(record, dict) for record in (*questions, *described.values())):
        raise DataError(f"{folder} is not in HA-DPO's layout.", REPAIR)
    columns = _columns(notes)
    names = [field.name for field in columns]
    # A folder converted from another layout gets its columns back; records of any other folder are kept whole.
    plain = bool(notes) and not described and all(_is_plain(record, names) for record in questions)

    # Both files as (file, image id, record, (prompt, chosen, rejected)), drawn in the order of HA-DPO's trainer.
    def entries() -> Iterator[tuple[str, str, Any, tuple[Any, Any, Any]]]:
        rng = random.Random(42)  # the seed of HA-DPO's trainer
        for key, record in described.items():
            try:
                yield DESC, as_id(key), record, draw_description_pair(record, rng)
            except BadRecord as bad:
                raise DataError(f"{folder / DESC}: {key} has {bad}.", REPAIR) from None
        for number, record in enumerate(questions):
            if fault := missing_fields(record, *QUESTION[:4]):
                raise DataError(f"{folder / POPE}: record {number} has {fault}.", REPAIR)
            yield POPE, as_id(record["image_id"]), record, (record["question"], record["chosen"], record["reject"])

    def rows() -> Iterator[RawPair | InvalidPair]:
        for file, image_id, record, (prompt, chosen, rejected) in entries():
            entry = image_records.get(image_id)
            path = None if entry is None else resolve_extension(vg_path / entry_image_path(entry))
            if path is None or not path.is_file():
                yield InvalidPair(IMAGE_MISSING if path else ID_UNKNOWN)
                continue
            if not all(isinstance(text, str) for text in (prompt, chosen, rejected)):
                yield InvalidPair("no question, chosen or rejected")
                continue
            image = Embedded(path.read_bytes(), record["image_name"] if plain else path.name)
            if plain:
                yield RawPair((image,), prompt, chosen, rejected, {name: record[name] for name in names})
            else:
                stored = {"file": file, "image": entry, "record": record}
                yield RawPair((image,), prompt, chosen, rejected, {RECORD: json.dumps(stored, ensure_ascii=False)})

    if plain:
        filled, forms, features = notes.get("filled", ()), notes.get("forms", {}), notes.get("features", {})
        return PairFile("hadpo", rows, len(questions), columns, features, tuple(filled), forms)
    return PairFile("hadpo", rows, len(described) + len(questions), (pyarrow().field(RECORD, "string"),))


REPAIR = "`relook data check` names all such records, `relook data fix` leaves them out."


def _columns(notes: Mapping[str, Any]) -> tuple[Any, ...]:
    if not notes:
        return ()
    arrow = pyarrow()
    try:
        return tuple(arrow.ipc.read_schema(arrow.py_buffer(base64.b64decode(notes["columns"]))))
    except (arrow.ArrowException, OSError, KeyError, TypeError, ValueError):
        raise DataError(
            f"{NOTES} is not what a conversion writes.", "Remove it, or convert the source again."
        ) from None


def _is_plain(record: Mapping[str, Any], columns: list[str]) -> bool:
    # Exactly what `write_hadpo` writes for a pair from elsewhere.
    written = record.keys() == {*QUESTION, *columns} and record["answer"] == record["reject"]
    return written and record["correct"] is False


def entry_image_path(record: Mapping[str, Any]) -> Path:
    """Return the relative path of an `image_data.json` entry's image: the last two parts of its url.

    Raises:
        DataError: the path would lead out of the folder.
    """
    parts = str(record.get("url")).split("/")[-2:]
    if len(parts) != 2 or {"", ".", ".."} & set(parts) or "\0" in "".join(parts):
        raise DataError(f"{IMAGES} has the url {record.get('url')!r}.", "It must end in a folder and a file name.")
    return Path(*parts)


# Writing it


def write_hadpo(folder: Path, source: PairFile, rows: Iterator[RawPair]) -> int:
    """Write pairs as a folder in HA-DPO's layout, images included, and return their number.

    Raises:
        DataError: a column has the name of one of the layout's keys, or holds values that JSON cannot.
    """
    fields = [field for field in source.fields if field.name != RECORD]
    clash = [field.name for field in fields if field.name in QUESTION]
    if clash:
        raise DataError(f"The source has columns named {', '.join(clash)}, as {POPE} has.", "Rename them.")
    described: dict[str, Any] = {}
    questions: list[Any] = []
    images: dict[Path, tuple[Any, str]] = {}  # path to entry of image_data.json and image hash
    count = new = edited = 0
    with atomic_folder(folder) as temporary:
        for row in rows:
            count += 1
            extra = {field.name: row.extra.get(field.name) for field in fields}
            present = {name: value for name, value in extra.items() if value is not None}
            # The HA-DPO record that the row was made from, if there is one.
            stored = stored_columns(row, "hadpo")
            entry = stored["image"] if stored else _entry(row.image)
            _write_image(temporary, images, entry, row.image)
            # A row goes back into the record it came from, unless its texts were edited since.
            if stored.get("file") == DESC and _holds_pair(stored["record"], row):
                described[str(entry["image_id"])] = {**stored["record"], **present}
            elif stored.get("file") == POPE:
                texts = {"question": row.prompt, "chosen": row.chosen, "reject": row.rejected}
                questions.append({**stored["record"], **texts, **present})
            else:
                # Only pope_data.json holds free questions: it takes pairs from elsewhere and edited descriptions.
                values = (entry["image_id"], row.prompt, row.chosen, row.rejected, row.rejected, False, row.image.name)
                questions.append({**dict(zip(QUESTION, values, strict=True)), **extra})
                new, edited = new + (not stored), edited + bool(stored)
        if described:
            write_json(temporary / DESC, described)
        if questions or not described:
            _write_records(temporary / POPE, questions)
        write_json(temporary / IMAGES, [entry for entry, _ in images.values()])
        if new:
            # An Arrow schema keeps what JSON cannot: the columns' types, and columns without any value.
            columns = base64.b64encode(pyarrow().schema(fields).serialize().to_pybytes()).decode()
            notes = {"filled": source.filled, "forms": source.forms, "features": source.features}
            write_json(temporary / NOTES, {"columns": columns, **notes})
    if edited:
        status(f"  {edited:,} descriptions are not those of their records any more: they are in {POPE}, alone")
    return count


def _write_records(path: Path, records: list[Any]) -> None:
    try:
        write_json(path, records)
    except TypeError as error:
        raise DataError(f"{POPE} cannot hold a column of the source: {error}.", "Remove the column.") from None


def _entry(image: Embedded) -> dict[str, Any]:
    """Build an `image_data.json` entry for an image not in Visual Genome, with an id from its content."""
    # 48 bits: exact in a JSON reader that holds numbers as floats. `.invalid` is reserved: no such host can exist.
    number = int(content_hash(image.data)[:12], 16)
    return {"image_id": number, "url": f"https://relook.invalid/VG_100K/{number}{image.suffix}"}


def _write_image(folder: Path, images: dict[Path, tuple[Any, str]], entry: dict[str, Any], image: Embedded) -> None:
    path, content = entry_image_path(entry), content_hash(image.data)
    if path not in images:
        images[path] = entry, content
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(image.data)
    elif images[path][1] != content:
        raise DataError(f"Two rows have different images for {path}.", "Give one of them another id.")


def _holds_pair(record: Mapping[str, Any], row: RawPair) -> bool:
    """Return True if a row is still one of a description record's pairs."""
    texts = row.chosen in record.get("chosen", ()) and row.rejected in record.get("rejected", ())
    return texts and row.prompt in DESCRIBE_PROMPTS
