"""Preference pairs in parquet files: TRL's vision columns, RLHF-V's and RLAIF-V's.

    trl     images [{bytes, path}] (or image), prompt, chosen, rejected: texts, or lists of messages
    rlhfv   image {bytes, path}, text: JSON of question, chosen, rejected   (Yu et al. 2024, arXiv:2312.00849)
    rlaifv  image {bytes, path}, question, chosen, rejected                 (Yu et al. 2024, arXiv:2405.17220)

Every other column is kept by name. What of a row the four plain values cannot give back, as a question in two parts, is
kept whole as JSON in a column `trl_record` or `rlhfv_record`.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

from relook.errors import DataError
from relook.files import whole_file

# ----------------------------------------------------------------------------------------------------
# A preference pair with all that its file says of it: what conversions pass on, and parquet readers begin with.

MAGIC = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


@dataclass(frozen=True)
class Embedded:
    """An image file in memory, and its name in the source, where it had one."""

    data: bytes
    name: str | None

    @property
    def suffix(self) -> str:
        """By the first bytes; .jpg where they say nothing."""
        return next((suffix for mark, suffix in MAGIC.items() if self.data.startswith(mark)), ".jpg")


def leads_out(name: str) -> bool:
    """Whether a file name of a data set would lead out of its folder: what is read or written by name would follow."""
    path = PurePosixPath(name)
    return path.is_absolute() or ".." in path.parts or "\0" in name


class BadRow(Exception):
    """Why a row is no preference pair of one image, one prompt and two answers."""


@dataclass(frozen=True)
class Row:
    """A pair. What a layout has beyond it stands in `extra`, by column."""

    images: tuple[Embedded, ...]
    prompt: str
    chosen: str
    rejected: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def image(self) -> Embedded:
        """Its only image.

        Raises:
            BadRow: it has none or several.
        """
        if len(self.images) != 1:
            raise BadRow(f"{len(self.images)} images")
        return self.images[0]


@dataclass(frozen=True)
class Source:
    """An opened file or folder of pairs.

    Args:
        rows: reads it from the start; a row that is no pair comes as a `BadRow`.
        count: of rows.
        fields: pyarrow fields of the columns in `extra`.
        features: what Hugging Face's `datasets` says of those columns.
        filled: columns that a conversion put in because other programs ask for them; they are not in `extra`.
        forms: how the files of other layouts, from which this one was converted, were written.
    """

    layout: str
    rows: Callable[[], Iterator[Row | BadRow]]
    count: int
    fields: tuple[Any, ...] = ()
    features: Mapping[str, Any] = field(default_factory=dict)
    filled: tuple[str, ...] = ()
    forms: Mapping[str, Any] = field(default_factory=dict)


def pyarrow() -> Any:
    """The libraries that read parquet files.

    Raises:
        DataError: they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError("Parquet files need pyarrow.", "pip install 'relook[data]'") from None
    return pyarrow


# ----------------------------------------------------------------------------------------------------

COLUMNS = {
    "trl": ("images", "prompt", "chosen", "rejected"),
    "rlhfv": ("image", "text"),
    "rlaifv": ("image", "question", "chosen", "rejected"),
}
TEXTS = ("question", "chosen", "rejected")
# What RLHF-V's own programs ask for besides: type, and the value of a row that has none.
_META_COLUMNS: dict[str, tuple[str, Callable[[Row, int], Any]]] = {
    "ds_name": ("string", lambda row, number: "relook"),
    "origin_dataset": ("string", lambda row, number: "relook"),
    "origin_split": ("string", lambda row, number: "{}"),
    "idx": ("int64", lambda row, number: number),
    "image_path": ("string", lambda row, number: row.image.name or ""),
}
FILLED = {"rlhfv": _META_COLUMNS, "rlaifv": _META_COLUMNS}
IMAGE_FEATURES: dict[str, dict[str, Any]] = {
    "trl": {"images": {"_type": "Sequence", "feature": {"_type": "Image"}}},
    "rlhfv": {"image": {"_type": "Image"}},
    "rlaifv": {"image": {"_type": "Image"}},
}
META = b"relook"  # key of a file's metadata
ROWS = 64  # read or written at a time: they hold images


# Reading


def kept(row: Row, layout: str) -> dict[str, Any]:
    """What a conversion kept of a row's source of that layout, beside the plain texts; empty where it kept nothing.

    Raises:
        DataError: it is not what a conversion writes.
    """
    text = row.extra.get(f"{layout}_record")
    try:
        found = json.loads(text or "{}")
    except (TypeError, ValueError):
        found = None
    parts = ("image", "record") if layout == "hadpo" and text else ()
    if not isinstance(found, dict) or not all(isinstance(found.get(key), dict) for key in parts):
        raise DataError(f"{layout}_record is not what a conversion writes: {text!r:.60}.", "Convert the source again.")
    return found


def hadpo_record(row: Row) -> dict[str, Any]:
    """The record of HA-DPO's that a row was made of; empty where it comes from elsewhere."""
    record: dict[str, Any] = kept(row, "hadpo").get("record", {})
    return record


def content_hash(data: bytes) -> str:
    """SHA-256 of an image's bytes, shortened to 16 hex digits."""
    return hashlib.sha256(data).hexdigest()[:16]


def open_parquet(path: Path, image_folder: Path | None = None) -> Source:
    """Open a parquet file, or the files of a folder in order of name, which must have the same columns.

    Raises:
        DataError: there is none, one is broken, or the columns are of no known layout.
    """
    parquet = pyarrow().parquet
    files = sorted(path.glob("**/*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise DataError(f"{path} is no parquet file, and no folder of some.", "Check the path.")
    schemas = [_opened(parquet.read_schema, file) for file in files]
    odd = next((file for file, schema in zip(files, schemas, strict=True) if not schema.equals(schemas[0])), None)
    if odd is not None:
        raise DataError(f"{odd} has other columns than {files[0]}.", "Convert the files one by one.")
    schema, layout = schemas[0], layout_of(schemas[0].names, path)
    metadata = schema.metadata or {}
    notes = _json(metadata.get(META))
    filled = tuple(name for name in _listed(notes.get("filled")) if isinstance(name, str))
    native = {_image_column(schema.names) if name == "images" else name for name in COLUMNS[layout]}
    further = [field for field in schema if field.name not in native and field.name not in filled]
    features = _features(schema)
    root = image_folder or path.parent

    count = sum(parquet.read_metadata(file).num_rows for file in files)

    def rows() -> Iterator[Row | BadRow]:
        for file in files:
            for batch in _batches(file):
                for values in batch.to_pylist():
                    yield _row(layout, values, [field.name for field in further], schema, (file.parent, root))

    forms = {**_dict(notes.get("forms")), layout: base64.b64encode(schema.serialize().to_pybytes()).decode()}
    described = {name: value for name, value in features.items() if name not in native}
    if layout != "rlaifv":  # whose columns are plain texts
        further.append(pyarrow().field(f"{layout}_record", "string"))
    return Source(layout, rows, count, tuple(further), described, filled, forms)


def _batches(file: Path) -> Iterator[Any]:
    """A file's rows by a few at a time."""
    arrow = pyarrow()
    batches = _opened(lambda file: arrow.parquet.ParquetFile(file).iter_batches(ROWS), file)
    while (batch := _opened(lambda _: next(batches, None), file)) is not None:
        yield batch


def _opened(read: Callable[[Path], Any], file: Path) -> Any:
    try:
        return read(file)
    except FileNotFoundError:
        raise DataError(f"{file} does not exist.", "Check the path.") from None
    except (pyarrow().ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as parquet: {error}.", "Download it again.") from None


def layout_of(columns: Sequence[str], path: Path) -> str:
    """Which layout some columns are of.

    Raises:
        DataError: of none.
    """
    has = set(columns)
    if {"prompt", "chosen", "rejected"} <= has and has & {"images", "image"}:
        return "trl"
    if {"image", *TEXTS} <= has:
        return "rlaifv"
    if {"image", "text"} <= has:
        return "rlhfv"
    known = "; ".join(f"{name}: {', '.join(wanted)}" for name, wanted in COLUMNS.items())
    raise DataError(f"{path} has the columns {', '.join(columns)}.", f"Known are {known}.")


def _image_column(columns: Sequence[str]) -> str:
    return "images" if "images" in columns else "image"


def _json(text: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(text or b"{}")
    except ValueError:
        found = {}
    return _dict(found)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _features(schema: Any) -> dict[str, Any]:
    """What Hugging Face's `datasets` wrote of the columns into a schema."""
    info = _dict(_json((schema.metadata or {}).get(b"huggingface")).get("info"))
    return _dict(info.get("features"))


def _row(
    layout: str, values: dict[str, Any], further: Sequence[str], schema: Any, folders: Sequence[Path]
) -> Row | BadRow:
    column = _image_column(list(values))
    texts = {name: values[name] for name in COLUMNS[layout] if name not in ("image", "images")}
    try:
        images = tuple(_embedded(one, folders) for one in _listed(values[column]))
        prompt, chosen, rejected = _plain(layout, texts)
    except BadRow as bad:
        return bad
    row = Row(images, prompt, chosen, rejected, {name: values[name] for name in further if name in values})
    if _without_none(_native(layout, row, schema)) == _without_none(texts):
        return row
    return replace(row, extra={**row.extra, f"{layout}_record": json.dumps(texts)})


def _listed(images: Any) -> list[Any]:
    return images if isinstance(images, list) else [] if images is None else [images]


def _embedded(image: Any, folders: Sequence[Path]) -> Embedded:
    """An image column's value: bytes, or a struct of bytes and path, either of which may be missing."""
    if isinstance(image, bytes):
        return Embedded(image, None)
    data, path = (image.get(key) for key in ("bytes", "path")) if isinstance(image, dict) else (None, image)
    name = path if isinstance(path, str) else None
    if not data and name:
        if leads_out(name):
            raise BadRow("image path leads out of its folder")
        found = next((folder / name for folder in folders if (folder / name).is_file()), None)
        if found is None:
            raise BadRow("image file missing")
        data = found.read_bytes()
    if not isinstance(data, bytes):
        raise BadRow("no image")
    return Embedded(data, name)


def _plain(layout: str, texts: Mapping[str, Any]) -> tuple[str, str, str]:
    """Prompt, chosen and rejected as plain texts.

    Raises:
        BadRow: they are not one user's turn and two answers.
    """
    if layout == "trl":
        return (
            _spoken(texts["prompt"], "prompt", "user"),
            _spoken(texts["chosen"], "chosen", "assistant"),
            _spoken(texts["rejected"], "rejected", "assistant"),
        )
    if layout == "rlhfv":
        try:
            texts = json.loads(texts["text"])
        except (TypeError, ValueError):
            raise BadRow("text is not JSON") from None
    found = [texts.get(name) if isinstance(texts, dict) else None for name in TEXTS]
    if not all(isinstance(text, str) for text in found):
        raise BadRow("no question, chosen or rejected")
    return found[0], found[1], found[2]  # type: ignore[return-value]


def _spoken(value: Any, column: str, role: str) -> str:
    """The text of a TRL value: a string, or one message whose content is a string or parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != role:
        raise BadRow(f"{column} is not one {role} message")
    content = value[0].get("content")
    if isinstance(content, str):
        return content
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    texts: list[Any] = [part.get("text") for part in parts if part.get("type") == "text"]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise BadRow(f"{column} holds no text")
    return "".join(texts)


def _without_none(value: Any) -> Any:
    """A struct's missing fields come back as None."""
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None}
    return [_without_none(one) for one in value] if isinstance(value, list) else value


# Writing


def native_schema(layout: str) -> Any:
    """The columns of a layout as relook writes them where no earlier file says otherwise."""
    arrow = pyarrow()
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    part = arrow.struct([("type", arrow.string()), ("text", arrow.string())])
    said = arrow.list_(arrow.struct([("role", arrow.string()), ("content", arrow.list_(part))]))
    kinds = {"image": image, "images": arrow.list_(image)}
    text = said if layout == "trl" else arrow.string()
    return arrow.schema([(name, kinds.get(name, text)) for name in COLUMNS[layout]])


def _native(layout: str, row: Row, schema: Any) -> dict[str, Any]:
    """A row's plain texts as the layout's columns."""
    texts = dict(zip(TEXTS, (row.prompt, row.chosen, row.rejected), strict=True))
    if layout == "rlaifv":
        return texts
    if layout == "rlhfv":
        return {"text": json.dumps(texts, ensure_ascii=False)}
    return {
        "prompt": _message(schema.field("prompt").type, "user", row.prompt, len(row.images)),
        "chosen": _message(schema.field("chosen").type, "assistant", row.chosen, 0),
        "rejected": _message(schema.field("rejected").type, "assistant", row.rejected, 0),
    }


def _message(kind: Any, role: str, text: str, images: int) -> Any:
    types = pyarrow().types
    if types.is_string(kind) or types.is_large_string(kind):
        return text
    content = kind.value_type.field("content").type
    if types.is_string(content) or types.is_large_string(content):
        return [{"role": role, "content": text}]
    return [{"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}]


def write_parquet(path: Path, layout: str, source: Source, rows: Iterator[Row]) -> int:
    """Write pairs as one file of a layout; returns their number.

    Raises:
        DataError: a column of the source has the name of one of the layout's.
        BadRow: the layout cannot hold a row's images.
    """
    arrow = pyarrow()
    old = _earlier(source, layout)
    columns = {field.name: field for field in native_schema(layout)}
    further = [field for field in source.fields if field.name != f"{layout}_record"]
    if old is not None:
        columns = {name: old.field(name) for name in old.names if name in (*columns, "image")}
    clash = [field.name for field in further if field.name in columns]
    if clash:
        raise DataError(f"The source has columns named {', '.join(clash)}, as {layout} has.", "Rename them.")
    fill = FILLED.get(layout, {})
    known = {field.name for field in further}
    filled = [name for name in fill if name not in known and old is None]
    fields = [*columns.values(), *further, *(arrow.field(name, fill[name][0]) for name in filled)]
    if old is not None:  # as they stood
        place = {name: number for number, name in enumerate(old.names)}
        fields.sort(key=lambda field: place.get(field.name, len(place)))
    notes = {"filled": filled, "forms": {name: form for name, form in source.forms.items() if name != layout}}
    metadata = {META: json.dumps(notes)}
    features = _features(old) if old is not None else {}
    features = {**IMAGE_FEATURES[layout], **source.features, **features}
    metadata[b"huggingface"] = json.dumps({"info": {"features": features}})
    schema = arrow.schema(fields, metadata)
    count = 0
    with whole_file(path) as temporary, arrow.parquet.ParquetWriter(temporary, schema) as writer:
        batch: list[dict[str, Any]] = []
        for row in rows:
            values = {name: value(row, count) for name, (_, value) in fill.items() if name in filled}
            batch.append({**row.extra, **values, **_values(layout, row, schema)})
            count += 1
            if len(batch) == ROWS:
                writer.write_table(_table(batch, schema))
                batch = []
        writer.write_table(_table(batch, schema))
    return count


def _earlier(source: Source, layout: str) -> Any:
    """The columns of the file of that layout which the source was converted from; None where there was none."""
    held = source.forms.get(layout)
    if held is None:
        return None
    arrow = pyarrow()
    try:
        old = arrow.ipc.read_schema(arrow.py_buffer(base64.b64decode(held)))
    except (arrow.ArrowException, OSError, TypeError, ValueError) as error:
        raise DataError(
            f"The source's note of its columns is broken: {error}.", "Convert from its own source."
        ) from None
    return old if layout_of(old.names, Path("The source's note")) == layout else None


def _table(batch: list[dict[str, Any]], schema: Any) -> Any:
    arrow = pyarrow()
    try:
        return arrow.Table.from_pylist(batch, schema=schema)
    except (arrow.ArrowException, TypeError) as error:
        raise DataError(f"A value does not fit its column: {error}.", "Convert from the file itself.") from None


def _values(layout: str, row: Row, schema: Any) -> dict[str, Any]:
    """The layout's own columns of a row; those of an earlier file of the layout, where they still say the same."""
    texts = _native(layout, row, schema)
    if row.extra.get(f"{layout}_record") is not None:
        earlier = kept(row, layout)
        if _plain(layout, earlier) == (row.prompt, row.chosen, row.rejected):
            texts = earlier
    column = _image_column(schema.names)
    held = row.images if column == "images" else [row.image]
    images = [{"bytes": image.data, "path": image.name} for image in held]
    return {**texts, column: images if column == "images" else images[0]}
