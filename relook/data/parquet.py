"""Preference pairs in parquet files: TRL's vision columns, RLHF-V's and RLAIF-V's.

    trl     images [{bytes, path}] (or image), prompt, chosen, rejected: texts, or lists of messages
    rlhfv   image {bytes, path}, text: JSON of question, chosen, rejected   (Yu et al. 2024, arXiv:2312.00849)
    rlaifv  image {bytes, path}, question, chosen, rejected                 (Yu et al. 2024, arXiv:2405.17220)
    kto     images (or image), prompt, completion, label: TRL's rated answers, which are only read

A column `context` holds the beginning of both answers, and `complete` whether they are whole (`PreferencePair`). An
assistant message at the end of TRL's prompt is a context, too: the answers of such a row continue it.

Every other column is kept by name. If the four plain values cannot restore a row, such as a question in two parts, its
source is kept whole as JSON in a column `trl_record` or `rlhfv_record`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from relook.data.paths import resolve_extension
from relook.data.samples import IMAGE_COUNT, IMAGE_MISSING, BadRecord, path_fault
from relook.data.templates import IMAGE, interleave
from relook.errors import DataError
from relook.files import atomic_file

# ----------------------------------------------------------------------------------------------------
# A preference pair with all of its columns: the common form of converters and parquet readers.

MAGIC = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"GIF8": ".gif", b"RIFF": ".webp", b"BM": ".bmp"}


@dataclass(frozen=True)
class Embedded:
    """Image file in memory, with its name in the source, if it had one."""

    data: bytes
    name: str | None

    @property
    def suffix(self) -> str:
        """Return the file suffix, by the first bytes; .jpg if they are unknown."""
        return next((suffix for mark, suffix in MAGIC.items() if self.data.startswith(mark)), ".jpg")


class InvalidPair(BadRecord):
    """Reason why a row is not a preference pair of images, one prompt and two answers."""


@dataclass(frozen=True)
class RawPair:
    """Preference pair as stored; `extra` holds the further columns of its layout, by name, `context` among them.

    A rated answer is `chosen`, with its label in `desirable`.
    """

    images: tuple[Embedded, ...]
    prompt: str
    chosen: str
    rejected: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    desirable: bool | None = None

    @property
    def image(self) -> Embedded:
        """Return the only image.

        Raises:
            InvalidPair: there are none or several.
        """
        if len(self.images) != 1:
            raise InvalidPair(f"{len(self.images)} images")
        return self.images[0]


@dataclass(frozen=True)
class PairFile:
    """Opened file or folder of pairs.

    Args:
        rows: function that reads the rows from the start; a row that is not a pair comes as an `InvalidPair`.
        count: number of rows.
        fields: pyarrow fields of the columns in `extra`.
        features: the features of those columns for Hugging Face's `datasets`.
        filled: columns that a conversion added because other programs require them; they are not in `extra`.
        forms: schemas of the files in other layouts from which this one was converted, by layout.
    """

    layout: str
    rows: Callable[[], Iterator[RawPair | InvalidPair]]
    count: int
    fields: tuple[Any, ...] = ()
    features: Mapping[str, Any] = field(default_factory=dict)
    filled: tuple[str, ...] = ()
    forms: Mapping[str, Any] = field(default_factory=dict)


def pyarrow() -> Any:
    """Import and return pyarrow, with its parquet module.

    Raises:
        DataError: pyarrow is not installed.
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
RATED = "kto"  # TRL's rated answers, which are read and not written
READ_COLUMNS = {**COLUMNS, RATED: ("images", "prompt", "completion", "label")}
TEXT_COLUMNS = ("question", "chosen", "rejected")
# Further columns that RLHF-V's own programs require: type, and the value for a row without one.
_META_COLUMNS: dict[str, tuple[str, Callable[[RawPair, int], Any]]] = {
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
META = b"relook"  # key in a file's metadata
CONTEXT = "context"
PARTS = ("text", "image")  # kinds of parts of a message
SPLIT = re.compile(f"({IMAGE})")  # cuts a prompt into texts and placeholders
ROWS = 64  # rows read or written at a time; few, since they hold images


# Reading


def stored_columns(row: RawPair, layout: str) -> dict[str, Any]:
    """Return what a conversion kept of a row's source in `layout`, beside the plain texts; empty if there is none.

    Raises:
        DataError: the column is not what a conversion writes.
    """
    text = row.extra.get(f"{layout}_record")
    try:
        stored = json.loads(text or "{}")
    except (TypeError, ValueError):
        stored = None
    # Files come from anywhere: a column of this name need not be what a conversion wrote.
    parts = ("image", "record") if layout in ("hadpo", "sentinel") and text else ()
    if not isinstance(stored, dict) or not all(isinstance(stored.get(key), dict) for key in parts):
        raise DataError(f"{layout}_record is not what a conversion writes: {text!r:.60}.", "Convert the source again.")
    return stored


def hadpo_record(row: RawPair) -> dict[str, Any]:
    """Return the HA-DPO record that a row was made from; empty if it comes from elsewhere."""
    record: dict[str, Any] = stored_columns(row, "hadpo").get("record", {})
    return record


def content_hash(data: bytes) -> str:
    """Compute the SHA-256 of an image's bytes, cut to 16 hex digits."""
    return hashlib.sha256(data).hexdigest()[:16]


def open_parquet(path: str | Path, image_folder: str | Path | None = None) -> PairFile:
    """Open a parquet file, or all of a folder in order of name, which must have the same columns.

    Raises:
        DataError: there is no file, a file is broken, columns differ between files, or the layout is unknown.
    """
    path = Path(path)
    image_folder = None if image_folder is None else Path(image_folder)
    parquet = pyarrow().parquet
    files = sorted(path.glob("**/*.parquet")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise DataError(f"{path} is neither a parquet file nor a folder of some.", "Check the path.")
    schemas = [_open(parquet.read_schema, file) for file in files]
    # One schema for all files: rows of a folder are read as those of one table.
    differing = next((file for file, schema in zip(files, schemas, strict=True) if not schema.equals(schemas[0])), None)
    if differing is not None:
        raise DataError(f"{differing} has other columns than {files[0]}.", "Convert the files one by one.")
    schema, layout = schemas[0], layout_of(schemas[0].names, path)
    metadata = schema.metadata or {}
    notes = _json(metadata.get(META))
    filled = tuple(name for name in _listed(notes.get("filled")) if isinstance(name, str))
    # Columns that the layout itself names; what is left, apart from added ones, travels along by name.
    native = {_image_column(schema.names) if name == "images" else name for name in READ_COLUMNS[layout]}
    extra_fields = [field for field in schema if field.name not in native and field.name not in filled]
    features = _features(schema)
    root = image_folder or path.parent

    count = sum(parquet.read_metadata(file).num_rows for file in files)

    def rows() -> Iterator[RawPair | InvalidPair]:
        for file in files:
            for batch in _batches(file):
                for values in batch.to_pylist():
                    yield _row(layout, values, [field.name for field in extra_fields], schema, (file.parent, root))

    # The whole schema travels along, so that a conversion back gives the same columns in the same order.
    forms = {**_dict(notes.get("forms")), layout: base64.b64encode(schema.serialize().to_pybytes()).decode()}
    extra_features = {name: value for name, value in features.items() if name not in native}
    if layout != "rlaifv":  # its columns are plain texts
        extra_fields.append(pyarrow().field(f"{layout}_record", "string"))
    if CONTEXT not in schema.names and any(_has_context(file, schema) for file in files):
        extra_fields.append(pyarrow().field(CONTEXT, "string"))
    return PairFile(layout, rows, count, tuple(extra_fields), extra_features, filled, forms)


def _has_context(file: Path, schema: Any) -> bool:
    """Return True if a prompt of a TRL file has a second message."""
    if not _has_messages(schema):
        return False
    prompts = _open(lambda file: pyarrow().parquet.read_table(file, columns=["prompt"]), file).column("prompt")
    return any(len(messages or ()) > 1 for messages in prompts.to_pylist())


def _has_messages(schema: Any) -> bool:
    return "prompt" in schema.names and pyarrow().types.is_list(schema.field("prompt").type)


def _batches(file: Path) -> Iterator[Any]:
    """Yield the rows of a file in small batches."""
    arrow = pyarrow()
    batches = _open(lambda file: arrow.parquet.ParquetFile(file).iter_batches(ROWS), file)
    # `next` is called under `_open`, since pyarrow finds broken pages only when it reads them.
    while (batch := _open(lambda _: next(batches, None), file)) is not None:
        yield batch


def _open(read: Callable[[Path], Any], file: Path) -> Any:
    # ArrowException is not an OSError, and pyarrow raises both kinds for broken files.
    try:
        return read(file)
    except FileNotFoundError:
        raise DataError(f"{file} does not exist.", "Check the path.") from None
    except (pyarrow().ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as parquet: {error}.", "Download it again.") from None


def layout_of(columns: Sequence[str], path: str | Path) -> str:
    """Return the layout that the columns belong to.

    Raises:
        DataError: they belong to no known layout.
    """
    path = Path(path)
    # rlaifv before rlhfv: RLAIF-V's files may have a further column `text`.
    present = set(columns)
    if {"prompt", "chosen", "rejected"} <= present and present & {"images", "image"}:
        return "trl"
    if {"prompt", "completion", "label"} <= present and present & {"images", "image"}:
        return RATED
    if {"image", *TEXT_COLUMNS} <= present:
        return "rlaifv"
    if {"image", "text"} <= present:
        return "rlhfv"
    layouts = "; ".join(f"{name}: {', '.join(required)}" for name, required in READ_COLUMNS.items())
    raise DataError(f"{path} has the columns {', '.join(columns)}.", f"Known are {layouts}.")


def _image_column(columns: Sequence[str]) -> str:
    return "images" if "images" in columns else "image"


def _json(text: bytes | None) -> dict[str, Any]:
    try:
        content = json.loads(text or b"{}")
    except ValueError:
        content = {}
    return _dict(content)


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _features(schema: Any) -> dict[str, Any]:
    """Return the column features that Hugging Face's `datasets` wrote into a schema."""
    info = _dict(_json((schema.metadata or {}).get(b"huggingface")).get("info"))
    return _dict(info.get("features"))


def _row(
    layout: str, values: dict[str, Any], extra_names: Sequence[str], schema: Any, folders: Sequence[Path]
) -> RawPair | InvalidPair:
    column = _image_column(list(values))
    texts = {name: values[name] for name in READ_COLUMNS[layout] if name not in ("image", "images")}
    try:
        images = tuple(_embedded(image, folders) for image in _listed(values[column]))
        prompt, chosen, rejected, context = _plain_texts(layout, texts)
        if layout in ("trl", RATED) and _image_parts(values["prompt"]) not in (0, len(images)):
            raise InvalidPair(IMAGE_COUNT)
        if layout == RATED and not isinstance(values["label"], bool):
            raise InvalidPair("label is neither true nor false")
    except InvalidPair as bad:
        return bad
    extra = {name: values[name] for name in extra_names if name in values} | ({CONTEXT: context} if context else {})
    if layout == RATED:
        return RawPair(images, prompt, chosen, rejected, extra, values["label"])
    row = RawPair(images, prompt, chosen, rejected, extra)
    # Keep the source texts only if the plain ones do not restore them, e.g. a prompt in several parts.
    if _without_none(_native_columns(layout, row, schema)) == _without_none(texts):
        return row
    return replace(row, extra={**row.extra, f"{layout}_record": json.dumps(texts)})


def _listed(images: Any) -> list[Any]:
    return images if isinstance(images, list) else [] if images is None else [images]


def _embedded(image: Any, folders: Sequence[Path]) -> Embedded:
    """Read an image column's value: bytes, or a struct of bytes and path, either of which may be missing."""
    if isinstance(image, bytes):
        return Embedded(image, None)
    # Bytes come first: a path beside them only says where the image once was.
    data, path = (image.get(key) for key in ("bytes", "path")) if isinstance(image, dict) else (None, image)
    name = path if isinstance(path, str) else None
    if not data and name:
        if fault := path_fault(name):
            raise InvalidPair(fault)
        source = next((file for folder in folders if (file := resolve_extension(folder / name)).is_file()), None)
        if source is None:
            raise InvalidPair(IMAGE_MISSING)
        data = source.read_bytes()
    if not isinstance(data, bytes):
        raise InvalidPair("no image")
    return Embedded(data, name)


def _plain_texts(layout: str, texts: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """Return prompt, chosen and rejected as plain texts, and the assistant's text at the end of the prompt, or "".

    Raises:
        InvalidPair: they are not one user turn and two answers.
    """
    if layout in ("trl", RATED):
        prompt, context = texts["prompt"], ""
        if isinstance(prompt, list) and len(prompt) == 2:
            context, prompt = _message_text(prompt[1:], "prompt", "assistant"), prompt[:1]
        question = _message_text(prompt, "prompt", "user")
        sides = ("completion",) if layout == RATED else ("chosen", "rejected")
        answers = [context + _message_text(texts[side], side, "assistant") for side in sides]
        return question, answers[0], "".join(answers[1:]), context
    if layout == "rlhfv":
        try:
            texts = json.loads(texts["text"])
        except (TypeError, ValueError):
            raise InvalidPair("text is not JSON") from None
    plain = [texts.get(name) if isinstance(texts, dict) else None for name in TEXT_COLUMNS]
    if not all(isinstance(text, str) for text in plain):
        raise InvalidPair("no question, chosen or rejected")
    question, chosen, rejected = map(str, plain)
    return question, chosen, rejected, ""


def _message_text(value: Any, column: str, role: str) -> str:
    """Return the text of a TRL value: a string, or one message whose content is a string or parts.

    Images with a text between them stay where they are, as `<image>` (`interleave`).
    """
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or len(value) != 1 or not isinstance(value[0], dict) or value[0].get("role") != role:
        raise InvalidPair(f"{column} is not one {role} message")
    content = value[0].get("content")
    if isinstance(content, str):
        return content
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    texts: list[Any] = [part.get("text") for part in parts if part.get("type") == "text"]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InvalidPair(f"{column} holds no text")
    shown = [part["text"] if part["type"] == "text" else IMAGE for part in parts if part.get("type") in PARTS]
    return interleave(shown)


def _image_parts(prompt: Any) -> int:
    """Count the images that the messages of a prompt place; 0 if it is a text."""
    contents = [message["content"] for message in prompt] if isinstance(prompt, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum(isinstance(part, dict) and part.get("type") == "image" for part in parts)


def _without_none(value: Any) -> Any:
    """Drop None values, which pyarrow returns for a struct's missing fields."""
    if isinstance(value, dict):
        return {key: _without_none(element) for key, element in value.items() if element is not None}
    return [_without_none(element) for element in value] if isinstance(value, list) else value


# Writing


def native_schema(layout: str) -> Any:
    """Build the schema of a layout as relook writes it, unless an earlier file had another."""
    arrow = pyarrow()
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    part = arrow.struct([("type", arrow.string()), ("text", arrow.string())])
    messages = arrow.list_(arrow.struct([("role", arrow.string()), ("content", arrow.list_(part))]))
    kinds = {"image": image, "images": arrow.list_(image)}
    text = messages if layout == "trl" else arrow.string()
    return arrow.schema([(name, kinds.get(name, text)) for name in COLUMNS[layout]])


def _native_columns(layout: str, row: RawPair, schema: Any) -> dict[str, Any]:
    """Convert a row's plain texts to the layout's columns."""
    texts = dict(zip(TEXT_COLUMNS, (row.prompt, row.chosen, row.rejected), strict=True))
    if layout == "rlaifv":
        return texts
    if layout == "rlhfv":
        return {"text": json.dumps(texts, ensure_ascii=False)}
    kind = schema.field("prompt").type
    prompt = _message(kind, "user", row.prompt, len(row.images))
    # A context without a column of its own is the last message of the prompt.
    context = row.extra.get(CONTEXT) if CONTEXT not in schema.names and _has_messages(schema) else None
    if context:
        prompt = [*prompt, *_message(kind, "assistant", context, 0)]
    sides = {"chosen": row.chosen, "rejected": row.rejected}
    return {"prompt": prompt} | {
        side: _message(schema.field(side).type, "assistant", text.removeprefix(context or ""), 0)
        for side, text in sides.items()
    }


def _message(kind: Any, role: str, text: str, images: int) -> Any:
    # The schema decides: plain text, a message with a text, or a message in parts as TRL writes it.
    types = pyarrow().types
    if types.is_string(kind) or types.is_large_string(kind):
        return text
    content = kind.value_type.field("content").type
    if types.is_string(content) or types.is_large_string(content):
        return [{"role": role, "content": text}]
    if IMAGE not in text:  # the images stand before it
        return [{"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}]
    parts = [{"type": "text", "text": part} if part != IMAGE else {"type": "image"} for part in SPLIT.split(text)]
    return [{"role": role, "content": [part for part in parts if part.get("text") != ""]}]


def write_parquet(path: str | Path, layout: str, source: PairFile, rows: Iterator[RawPair]) -> int:
    """Write pairs as one file of a layout and return their number.

    Raises:
        DataError: a column of the source has the same name as one of the layout's columns.
        InvalidPair: the layout cannot hold a row's images.
    """
    path = Path(path)
    arrow = pyarrow()
    # The columns: the layout's own, then the source's further ones, then those that other programs require.
    earlier = _earlier_schema(source, layout)
    columns = {field.name: field for field in native_schema(layout)}
    restored = {f"{layout}_record"}
    if layout == "trl" and earlier is not None and CONTEXT not in earlier.names and _has_messages(earlier):
        restored.add(CONTEXT)  # it was a message of the prompts and becomes one again
    extra_fields = [field for field in source.fields if field.name not in restored]
    # Types of an earlier file win: its texts may have been messages or large strings.
    if earlier is not None:
        columns = {name: earlier.field(name) for name in earlier.names if name in (*columns, "image")}
    clash = [field.name for field in extra_fields if field.name in columns]
    if clash:
        raise DataError(f"The source has columns named {', '.join(clash)}, as {layout} has.", "Rename them.")
    fill = FILLED.get(layout, {})
    extra_names = {field.name for field in extra_fields}
    filled = [name for name in fill if name not in extra_names and earlier is None]
    fields = [*columns.values(), *extra_fields, *(arrow.field(name, fill[name][0]) for name in filled)]
    if earlier is not None:  # restore the original column order
        order = {name: number for number, name in enumerate(earlier.names)}
        fields.sort(key=lambda field: order.get(field.name, len(order)))
    # The notes let a conversion back drop what was added and restore the other layout's schema.
    notes = {"filled": filled, "forms": {name: stored for name, stored in source.forms.items() if name != layout}}
    metadata = {META: json.dumps(notes)}
    # Hugging Face's `datasets` reads from these that a struct is an image to decode.
    features = _features(earlier) if earlier is not None else {}
    features = {**IMAGE_FEATURES[layout], **source.features, **features}
    metadata[b"huggingface"] = json.dumps({"info": {"features": features}})
    schema = arrow.schema(fields, metadata)
    count = 0
    with atomic_file(path) as temporary, arrow.parquet.ParquetWriter(temporary, schema) as writer:
        batch: list[dict[str, Any]] = []
        for row in rows:
            values = {name: value(row, count) for name, (_, value) in fill.items() if name in filled}
            batch.append({**row.extra, **values, **_values(layout, row, schema)})
            count += 1
            if len(batch) == ROWS:  # images of more rows would fill the memory
                writer.write_table(_table(batch, schema))
                batch = []
        writer.write_table(_table(batch, schema))
    return count


def _earlier_schema(source: PairFile, layout: str) -> Any:
    """Return the schema of the file in `layout` that the source was converted from, or None."""
    encoded = source.forms.get(layout)
    if encoded is None:
        return None
    arrow = pyarrow()
    try:
        schema = arrow.ipc.read_schema(arrow.py_buffer(base64.b64decode(encoded)))
    except (arrow.ArrowException, OSError, TypeError, ValueError) as error:
        raise DataError(
            f"The source's note of its columns is broken: {error}.", "Convert from its own source."
        ) from None
    return schema if layout_of(schema.names, Path("The source's note")) == layout else None


def _table(batch: list[dict[str, Any]], schema: Any) -> Any:
    arrow = pyarrow()
    try:
        return arrow.Table.from_pylist(batch, schema=schema)
    except (arrow.ArrowException, TypeError) as error:
        raise DataError(f"A value does not fit its column: {error}.", "Convert from the file itself.") from None


def _values(layout: str, row: RawPair, schema: Any) -> dict[str, Any]:
    """Return a row's values in the layout's columns; those kept from an earlier file if its texts are unchanged."""
    texts = _native_columns(layout, row, schema)
    if row.extra.get(f"{layout}_record") is not None:
        earlier = stored_columns(row, layout)
        if _plain_texts(layout, earlier)[:3] == (row.prompt, row.chosen, row.rejected):
            texts = earlier
    column = _image_column(schema.names)
    images = row.images if column == "images" else (row.image,)
    structs = [{"bytes": image.data, "path": image.name} for image in images]
    return {**texts, column: structs if column == "images" else structs[0]}
