"""A preference pair with all that its file says of it: what conversions pass on, and parquet readers begin with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from relook.data.rules import BadRecord
from relook.errors import DataError

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


class BadRow(BadRecord):
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
