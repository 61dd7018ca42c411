"""`relook data convert`: lossless conversion of preference pairs between layouts.

    hadpo       a folder: desc_data.json, pope_data.json, and Visual Genome's image_data.json with images
    sentinel    a folder: sentinel.json or sentinel.jsonl, and the images likewise; as a source, also one file
    the others  one parquet file; see `relook.data.parquet`

Each HA-DPO record becomes one pair, drawn as its trainer draws it; the whole record stays in a column `hadpo_record`,
as SENTINEL's do in `sentinel_record`. Pairs from elsewhere become records of `pope_data.json`, with their further
columns as keys. Rows that a layout cannot hold are refused by number, and nothing is written.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
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
from relook.data.samples import (
    ID_UNKNOWN,
    IMAGE_MISSING,
    PAIR_OPTIONS,
    BadRecord,
    as_id,
    missing_fields,
    pair_options,
)
from relook.data.sentinel import (
    FIELDS as SENTINEL_FIELDS,
)
from relook.data.sentinel import (
    SUFFIXES,
    SentinelPair,
    read_sentinel_records,
    sentinel_pair,
    sentinel_texts,
)
from relook.errors import DataError, RecipeError, did_you_mean, preview
from relook.files import atomic_folder, read_json, read_json_object, write_json, write_jsonl

FOLDERS = ("hadpo", "sentinel")  # layouts that are folders, the others are parquet files
PAIR_LAYOUTS = (*FOLDERS, *COLUMNS)
DESC, POPE, IMAGES, NOTES = "desc_data.json", "pope_data.json", "image_data.json", "relook.json"
SENTINEL = "sentinel"  # with one of `SUFFIXES`
RECORD, SENTINEL_RECORD = "hadpo_record", "sentinel_record"
# Keys of a pope_data.json record for a pair that is not from HA-DPO. Any further key is one of its columns.
QUESTION = ("image_id", "question", "chosen", "reject", "answer", "correct", "image_name")


def convert_pairs(source: str | Path, target: str | Path, to: str, images: str | Path | None = None) -> int:
    """Write the pairs of `source` in another layout and return their number.

    Args:
        source: a folder in HA-DPO's layout, SENTINEL's file, a parquet file, or a folder of parquet files. The layout
            is detected.
        target: a new folder (hadpo, sentinel) or a new parquet file (the others).
        to: one of `PAIR_LAYOUTS`.
        images: Visual Genome's folder for a hadpo or sentinel source, or the root of images that a parquet file only
            names. The default is the source's own folder.

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
    if (target.suffix == ".parquet") == (to in FOLDERS):
        kind = "a new folder" if to in FOLDERS else "a new file that ends in .parquet"
        raise RecipeError(f"{target} does not suit layout {to}.", f"Give {kind}.")
    folder = source.is_dir() and any((source / name).exists() for name in (DESC, POPE))
    if folder:
        opened = open_hadpo(source, images or source)
    elif file := _sentinel_file(source):
        opened = open_sentinel(file, images or file.parent)
    else:
        opened = open_parquet(source, images)
        if opened.layout not in COLUMNS:
            raise DataError(f"{source} has rated answers, not pairs.", "Train on it by loss_type kto.")
    rows = _pairs(opened, to)
    if to in FOLDERS:
        return (write_hadpo if to == "hadpo" else write_sentinel)(target, opened, rows)
    count = write_parquet(target, to, opened, rows)
    if folder and (source / DESC).exists() and read_json(source / DESC):
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
                if to == "sentinel":
                    _sentinel_record(row)
            except BadRecord as bad:
                faults.setdefault(str(bad), []).append(number)
                continue
            if fault := pair_fault(hadpo_record(row), row.prompt, row.chosen, row.rejected, row.extra):
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
    options = [name for name in PAIR_OPTIONS if any(name in r for r in (*questions, *described.values()))]
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
            try:
                entry, image = _vg_image(image_records, vg_path, image_id)
                if not all(isinstance(text, str) for text in (prompt, chosen, rejected)):
                    raise InvalidPair("no question, chosen or rejected")
                if plain:
                    image, extra = replace(image, name=record["image_name"]), {name: record[name] for name in names}
                else:
                    extra = _stored(RECORD, file, entry, record, {name: record.get(name) for name in options})
            except InvalidPair as bad:
                yield bad
                continue
            yield RawPair((image,), prompt, chosen, rejected, extra)

    if plain:
        return _noted("hadpo", rows, len(questions), columns, notes)
    return PairFile("hadpo", rows, len(described) + len(questions), _fields(RECORD, *options))


def _fields(record: str, *options: str) -> tuple[Any, ...]:
    """Return the columns of pairs whose records are kept whole, `options` being those of `PAIR_OPTIONS` they have."""
    types = {"context": "string", "complete": "bool"}
    return tuple(pyarrow().field(name, types.get(name, "string")) for name in (record, *options))


def _stored(column: str, file: str, entry: Any, record: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the further columns of a pair whose record is kept whole.

    Raises:
        InvalidPair: its context or `complete` is of another type.
    """
    stored = {"file": file, "image": entry, "record": record}
    try:
        columns = {name: value for name, value in pair_options(options).items() if name in options}
    except BadRecord as bad:
        raise InvalidPair(str(bad)) from None
    return {column: json.dumps(stored, ensure_ascii=False), **columns}


def _vg_image(records: Mapping[str, Any], vg_path: Path, image_id: str) -> tuple[Any, Embedded]:
    """Return an image's entry in `image_data.json` and the image itself.

    Raises:
        InvalidPair: there is none.
    """
    if (entry := records.get(image_id)) is None:
        raise InvalidPair(ID_UNKNOWN)
    path = resolve_extension(vg_path / entry_image_path(entry))
    if not path.is_file():
        raise InvalidPair(IMAGE_MISSING)
    return entry, Embedded(path.read_bytes(), path.name)


def _sentinel_file(source: Path) -> Path | None:
    """Return a source's file in SENTINEL's layout, or None if it is in another layout."""
    files = [source / f"{SENTINEL}{suffix}" for suffix in SUFFIXES] if source.is_dir() else [source]
    return next((file for file in files if file.suffix in SUFFIXES and file.exists()), None)


def open_sentinel(path: Path, vg_path: Path) -> PairFile:
    """Open a file in one of SENTINEL's layouts.

    Raises:
        DataError: the file or Visual Genome's index is broken.
    """
    records, images = read_sentinel_records(path), read_image_records(vg_path)
    # A folder converted from another layout gets its columns back; records of any other file are kept whole.
    notes = read_json_object(path.with_name(NOTES), optional=True)
    columns = _columns(notes)

    def rows() -> Iterator[RawPair | InvalidPair]:
        for _, image_id, record in records:
            try:
                prompt, chosen, rejected, context, complete = sentinel_pair(record)
                entry, image = _vg_image(images, vg_path, as_id(image_id))
                if notes:
                    image = replace(image, name=record.get("image_name"))
                    extra = {field.name: record.get(field.name) for field in columns}
                else:
                    options = {"context": context, "complete": complete}
                    extra = _stored(SENTINEL_RECORD, path.suffix, entry, record, options)
            except BadRecord as bad:
                yield InvalidPair(str(bad))
                continue
            yield RawPair((image,), prompt, chosen, rejected, extra)

    if notes:
        return _noted("sentinel", rows, len(records), columns, notes)
    return PairFile("sentinel", rows, len(records), _fields(SENTINEL_RECORD, *PAIR_OPTIONS))


def _noted(
    layout: str,
    rows: Callable[[], Iterator[RawPair | InvalidPair]],
    count: int,
    columns: tuple[Any, ...],
    notes: Mapping[str, Any],
) -> PairFile:
    """Return the file of pairs that `_write_notes` was called for."""
    filled, forms, features = notes.get("filled", ()), notes.get("forms", {}), notes.get("features", {})
    return PairFile(layout, rows, count, columns, features, tuple(filled), forms)


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
    _refuse_clash(fields, QUESTION, POPE)
    described: dict[str, Any] = {}
    questions: list[Any] = []
    images: dict[Path, tuple[Any, str]] = {}  # path to entry of image_data.json and image hash
    count = new = edited = 0
    with atomic_folder(folder) as temporary:
        for row in rows:
            count += 1
            extra = {field.name: row.extra.get(field.name) for field in fields}
            # The HA-DPO record that the row was made from, if there is one; it has its own context.
            stored = stored_columns(row, "hadpo")
            ignored = PAIR_OPTIONS if stored else ()
            present = {name: value for name, value in extra.items() if value is not None and name not in ignored}
            entry = _entry(row)
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
            _write_notes(temporary, source, fields)
    if edited:
        status(f"  {edited:,} descriptions are not those of their records any more: they are in {POPE}, alone")
    return count


def _refuse_clash(fields: Sequence[Any], keys: Sequence[str], file: str) -> None:
    if clash := [field.name for field in fields if field.name in keys]:
        raise DataError(f"The source has columns named {', '.join(clash)}, as {file} has.", "Rename them.")


def _write_notes(folder: Path, source: PairFile, fields: list[Any]) -> None:
    # An Arrow schema keeps what JSON cannot: the columns' types, and columns without any value.
    columns = base64.b64encode(pyarrow().schema(fields).serialize().to_pybytes()).decode()
    notes = {"filled": source.filled, "forms": source.forms, "features": source.features}
    write_json(folder / NOTES, {"columns": columns, **notes})


def write_sentinel(folder: Path, source: PairFile, rows: Iterator[RawPair]) -> int:
    """Write pairs in SENTINEL's layout, images included, and return their number.

    Lines keep the order of all pairs; a file by image becomes one again. The further columns are keys of the records.

    Raises:
        DataError: two rows have different images of one name, or a column has the name of one of the layout's keys or
            values that JSON cannot hold.
    """
    fields = [field for field in source.fields if field.name != SENTINEL_RECORD]
    _refuse_clash(fields, ("image_id", *SENTINEL_FIELDS, "image_name"), SENTINEL)
    by_image: dict[str, list[Any]] = {}
    in_order: list[Any] = []
    images: dict[Path, tuple[Any, str]] = {}
    files: set[Any] = set()  # suffixes of the files that the rows were made from
    with atomic_folder(folder) as temporary:
        for row in rows:
            files.add(stored_columns(row, "sentinel").get("file"))
            entry, record = _entry(row), _sentinel_record(row)
            _write_image(temporary, images, entry, row.image)
            in_order.append({"image_id": entry["image_id"], **record})
            by_image.setdefault(str(entry["image_id"]), []).append(record)
        if files == {".json"}:
            _write_records(temporary / f"{SENTINEL}.json", by_image, write_json)
        else:
            _write_records(temporary / f"{SENTINEL}.jsonl", in_order, write_jsonl)
        if None in files:
            _write_notes(temporary, source, fields)
        write_json(temporary / IMAGES, [entry for entry, _ in images.values()])
    return len(in_order)


def _sentinel_record(row: RawPair) -> dict[str, Any]:
    """Return a row's record in SENTINEL's layout.

    Raises:
        BadRecord: the layout cannot hold the pair.
    """
    texts = sentinel_texts(SentinelPair(row.prompt, row.chosen, row.rejected, **pair_options(row.extra)))
    further = {name: value for name, value in row.extra.items() if name != SENTINEL_RECORD}
    if stored := stored_columns(row, "sentinel"):
        record = stored["record"]
        further = {name: value for name, value in further.items() if name not in PAIR_OPTIONS and value is not None}
    else:
        record = {"image_name": row.image.name}
    # The source's own context wins if it means the same: null, "" and white space are all none.
    merged = {**record, **further}
    blank = {"context": merged["context"]} if not texts["context"] and "context" in merged else {}
    return {**merged, **texts, **blank}


def _write_records(path: Path, records: Any, write: Callable[[Path, Any], None] = write_json) -> None:
    try:
        write(path, records)
    except TypeError as error:
        raise DataError(f"{path.name} cannot hold a column of the source: {error}.", "Remove the column.") from None


def _entry(row: RawPair) -> dict[str, Any]:
    """Return the `image_data.json` entry that a row was made from, or one with an id from its image's content."""
    for layout in FOLDERS:
        if stored := stored_columns(row, layout):
            entry: dict[str, Any] = stored["image"]
            return entry
    image = row.image
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
