"""`relook data convert`: preference pairs from one layout to another, without loss.

    hadpo       a folder: desc_data.json, pope_data.json, and Visual Genome's image_data.json with images
    the others  one parquet file; see `relook.data.parquet`

HA-DPO's records become a pair each, drawn as its trainer draws them; the whole record stays in a column
`hadpo_record`. Pairs that come from elsewhere become records of `pope_data.json`, their further columns keys of these.
What a layout cannot hold is refused by name before anything is written.
"""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from relook.console import progress, say
from relook.data.annotations import read_image_records
from relook.data.parquet import (
    COLUMNS,
    BadRow,
    Embedded,
    Row,
    Source,
    content_hash,
    kept,
    open_parquet,
    pyarrow,
    write_parquet,
)
from relook.data.readers import DESCRIBE_PROMPTS, draw
from relook.errors import DataError, RecipeError, some
from relook.files import read_json, read_object, whole_folder, write_json

LAYOUTS = ("hadpo", *COLUMNS)
DESC, POPE, IMAGES, NOTES = "desc_data.json", "pope_data.json", "image_data.json", "relook.json"
RECORD = "hadpo_record"
# Of a pair that HA-DPO never had, as a record of pope_data.json. Any further key is one of its columns.
QUESTION = ("image_id", "question", "chosen", "reject", "answer", "correct", "image_name")


def convert(source: Path, target: Path, to: str, images: Path | None = None) -> int:
    """Write the pairs of `source` in another layout; returns their number.

    Args:
        source: a folder of HA-DPO's layout, a parquet file, or a folder of parquet files. Its layout is read from it.
        target: a new folder (hadpo) or a new parquet file (the others).
        to: hadpo, trl, rlhfv or rlaifv.
        images: Visual Genome's folder of a hadpo source, or the root of images that a parquet file only names; by
            default the source's own folder.

    Raises:
        RecipeError: there is no such layout, or the target is there already or has a name of the other kind.
        DataError: the source is none, or `to` cannot hold some of it; the rows are named, and nothing is written.
    """
    if to not in LAYOUTS:
        raise RecipeError(f"There is no preference layout {to!r}.", f"Known ones: {', '.join(LAYOUTS)}.")
    if target.exists():
        raise RecipeError(f"{target} is there already.", "Choose another place, or remove it.")
    if (target.suffix == ".parquet") != (to != "hadpo"):
        kind = "a new folder" if to == "hadpo" else "a new file that ends in .parquet"
        raise RecipeError(f"{target} does not suit layout {to}.", f"Give {kind}.")
    folder = source.is_dir() and any((source / name).exists() for name in (DESC, POPE))
    opened = open_hadpo(source, images or source) if folder else open_parquet(source, images)
    rows = _pairs(opened, to)
    return write_hadpo(target, opened, rows) if to == "hadpo" else write_parquet(target, to, opened, rows)


def _pairs(source: Source, to: str) -> Iterator[Row]:
    """The rows that `to` can hold; at the end, an error that names the others, so that nothing is kept of the rest."""
    faults: dict[str, list[int]] = {}
    with progress("pairs") as report:
        for number, row in enumerate(source.rows()):
            report(number + 1, source.count)
            try:
                if isinstance(row, BadRow):
                    raise row
                if to != "trl":
                    _ = row.image
            except BadRow as bad:
                faults.setdefault(str(bad), []).append(number)
                continue
            if not faults:
                yield row
    if faults:
        named = "; ".join(f"{reason}: {some(rows, 3)}" for reason, rows in faults.items())
        raise DataError(f"Layout {to} cannot hold all rows ({named}).", "Repair or remove these, or choose another.")


# Reading HA-DPO's layout


def open_hadpo(folder: Path, vg_path: Path) -> Source:
    """Open a folder with `desc_data.json`, `pope_data.json` or both.

    Raises:
        DataError: a file is broken, or a record has not what its layout asks for.
    """
    described = read_object(folder / DESC, optional=True)
    asked = read_json(folder / POPE) if (folder / POPE).exists() else []
    notes = read_object(folder / NOTES, optional=True)
    known = read_image_records(vg_path)
    if not isinstance(asked, list) or not all(isinstance(one, dict) for one in (*asked, *described.values())):
        raise DataError(f"{folder} is not in HA-DPO's layout.", REPAIR)
    columns = _columns(notes)
    names = [field.name for field in columns]
    # A folder that was converted from elsewhere gives its columns back; another one's records are kept whole.
    plain = bool(notes) and not described and all(_is_plain(record, names) for record in asked)

    def entries() -> Iterator[tuple[str, str, Any, tuple[Any, Any, Any]]]:
        rng = random.Random(42)
        for key, record in described.items():
            if not all(isinstance(record.get(name), list) and record[name] for name in ("chosen", "rejected")):
                raise DataError(f"{folder / DESC}: {key} has no chosen or no rejected description.", REPAIR)
            yield DESC, key, record, draw(record, rng)
        for number, record in enumerate(asked):
            missing = [name for name in QUESTION[:4] if name not in record]
            if missing:
                raise DataError(f"{folder / POPE}: record {number} has no {', '.join(missing)}.", REPAIR)
            yield POPE, str(record["image_id"]), record, (record["question"], record["chosen"], record["reject"])

    def rows() -> Iterator[Row | BadRow]:
        for file, image_id, record, (prompt, chosen, rejected) in entries():
            path = vg_path / image_place(known[image_id]) if image_id in known else None
            if path is None or not path.is_file():
                yield BadRow("image file missing" if path else "image id not in image_data.json")
                continue
            if not all(isinstance(text, str) for text in (prompt, chosen, rejected)):
                yield BadRow("no question, chosen or rejected")
                continue
            image = Embedded(path.read_bytes(), record["image_name"] if plain else path.name)
            if plain:
                yield Row((image,), prompt, chosen, rejected, {name: record[name] for name in names})
            else:
                whole = {"file": file, "image": known[image_id], "record": record}
                yield Row((image,), prompt, chosen, rejected, {RECORD: json.dumps(whole, ensure_ascii=False)})

    if plain:
        filled, forms, features = notes.get("filled", ()), notes.get("forms", {}), notes.get("features", {})
        return Source("hadpo", rows, len(asked), columns, features, tuple(filled), forms)
    return Source("hadpo", rows, len(described) + len(asked), (pyarrow().field(RECORD, "string"),))


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
    return record.keys() == {*QUESTION, *columns} and record["answer"] == record["reject"] and not record["correct"]


def image_place(record: Mapping[str, Any]) -> Path:
    """Where an entry of `image_data.json` says that its image lies: the last two parts of its url.

    Raises:
        DataError: that would lead out of the folder.
    """
    parts = str(record.get("url")).split("/")[-2:]
    if len(parts) != 2 or {"", ".", ".."} & set(parts) or "\0" in "".join(parts):
        raise DataError(f"{IMAGES} has the url {record.get('url')!r}.", "It must end in a folder and a file name.")
    return Path(*parts)


# Writing it


def write_hadpo(folder: Path, source: Source, rows: Iterator[Row]) -> int:
    """Write pairs as a folder of HA-DPO's layout, images included; returns their number.

    Raises:
        DataError: a column has the name of one of the layout's keys, or holds what JSON cannot.
    """
    fields = [field for field in source.fields if field.name != RECORD]
    clash = [field.name for field in fields if field.name in QUESTION]
    if clash:
        raise DataError(f"The source has columns named {', '.join(clash)}, as {POPE} has.", "Rename them.")
    described: dict[str, Any] = {}
    asked: list[Any] = []
    images: dict[Path, tuple[Any, str]] = {}  # place to entry of image_data.json, and hash of the image
    count = new = edited = 0
    with whole_folder(folder) as temporary:
        for row in rows:
            count += 1
            further = {field.name: row.extra.get(field.name) for field in fields}
            added = {name: value for name, value in further.items() if value is not None}
            whole = kept(row, "hadpo")
            entry = whole["image"] if whole else _entry(row.image)
            _place(temporary, images, entry, row.image)
            if whole.get("file") == DESC and _says(whole["record"], row):
                described[str(entry["image_id"])] = {**whole["record"], **added}
            elif whole.get("file") == POPE:
                said = {"question": row.prompt, "chosen": row.chosen, "reject": row.rejected}
                asked.append({**whole["record"], **said, **added})
            else:
                values = (entry["image_id"], row.prompt, row.chosen, row.rejected, row.rejected, False, row.image.name)
                asked.append({**dict(zip(QUESTION, values, strict=True)), **further})
                new, edited = new + (not whole), edited + bool(whole)
        if described:
            write_json(temporary / DESC, described)
        if asked or not described:
            _write(temporary / POPE, asked)
        write_json(temporary / IMAGES, [entry for entry, _ in images.values()])
        if new:
            columns = base64.b64encode(pyarrow().schema(fields).serialize().to_pybytes()).decode()
            notes = {"filled": source.filled, "forms": source.forms, "features": source.features}
            write_json(temporary / NOTES, {"columns": columns, **notes})
    if edited:
        say(f"  {edited:,} descriptions are not those of their records any more: they are in {POPE}, alone")
    return count


def _write(path: Path, records: list[Any]) -> None:
    try:
        write_json(path, records)
    except TypeError as error:
        raise DataError(f"{POPE} cannot hold a column of the source: {error}.", "Remove the column.") from None


def _entry(image: Embedded) -> dict[str, Any]:
    """An entry of `image_data.json` for an image that Visual Genome has not: its content gives it an id."""
    number = int(content_hash(image.data)[:12], 16)
    return {"image_id": number, "url": f"https://relook.invalid/VG_100K/{number}{image.suffix}"}


def _place(folder: Path, images: dict[Path, tuple[Any, str]], entry: dict[str, Any], image: Embedded) -> None:
    place, content = image_place(entry), content_hash(image.data)
    if place not in images:
        images[place] = entry, content
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(image.data)
    elif images[place][1] != content:
        raise DataError(f"Two rows have different images for {place}.", "Give one of them another id.")


def _says(record: Mapping[str, Any], row: Row) -> bool:
    """Whether a row is still one of a description record's pairs."""
    texts = row.chosen in record.get("chosen", ()) and row.rejected in record.get("rejected", ())
    return texts and row.prompt in DESCRIBE_PROMPTS
