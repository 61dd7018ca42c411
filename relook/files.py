"""Files that appear whole or not at all, and the few readers that every room needs."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from relook.console import readable_size
from relook.errors import DataError, RecipeError, RelookError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the final name, on any failure it is removed."""
    if path.is_dir():
        raise RelookError(f"{path} is a folder.", "Give a file's name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """As `whole_file`, for a folder. An existing folder under the final name is replaced at the end, by two renames.

    What a killed process left of the same folder is removed first: it can be as large as a model, and is hidden.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if not runs(owner := left.name.split(".")[-2]) or owner == str(os.getpid()):
            shutil.rmtree(left, ignore_errors=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    replaced = path.with_name(f".{path.name}.old.{os.getpid()}.part")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.replace(replaced)
        temporary.replace(path)
    finally:
        for left in (temporary, replaced):
            shutil.rmtree(left, ignore_errors=True)


def make_paths(settings: Any) -> None:
    """Make Paths of the strings in a dataclass's fields that are paths, also in lists of them; None stays."""
    for name, kind in ((field.name, str(field.type)) for field in fields(settings)):
        value = getattr(settings, name)
        if kind.startswith("Path") and isinstance(value, str):
            object.__setattr__(settings, name, Path(value))
        elif kind.startswith("Sequence[Path]"):
            object.__setattr__(settings, name, tuple(map(Path, value)))


def runs(process: str) -> bool:
    """Whether a process of that number, as the names of half-written files have it, runs on this machine."""
    try:
        os.kill(int(process), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:  # under another user
        return True
    return True


def require_room(path: Path, needed: int, what: str, fix: str) -> None:
    """Refuse to begin with a file or folder that the disk cannot take.

    Raises:
        RelookError: the bytes that are needed, and those that are free.
    """
    place = path
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise RelookError(
            f"{what} needs {readable_size(needed)} on disk, but {path.parent} has {readable_size(free)} free.", fix
        )


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_jsonl(path: Path, records: Iterable[object]) -> None:
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.", "Check the path.") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, but a file is expected here.", "Give the path of the file.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def read_json(path: Path, object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=object_pairs_hook)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}.", "Download it again."
        ) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nested without end
        raise DataError(f"{path} is not valid JSON: {error}.", "Download it again.") from None


def read_object(path: Path, optional: bool = False) -> dict[str, Any]:
    """Read a file that holds one JSON object; with `optional`, nothing where there is no file."""
    content = {} if optional and not path.exists() else read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object.", "Download it again.")
    return content


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a list of JSON objects that is stored either as JSON lines or as one JSON array."""
    text = read_text(path)
    records: list[dict[str, Any]] = []
    if text.lstrip()[:1] == "[":
        records = read_json(path)
    else:
        for number, line in enumerate(text.split("\n"), 1):  # splitlines would also split inside answers
            if line.strip():
                try:
                    records.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise DataError(f"{path}, line {number}, is not valid JSON: {error.msg}.") from None
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise DataError(f"{path}: record {number} is {type(record).__name__}, but a JSON object is expected.")
    return records


def some_records(path: Path, source: str) -> list[dict[str, Any]]:
    """As `read_records`, of a file that somebody else publishes and that cannot be missing or empty.

    Args:
        source: where it comes from, for the error.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist.", source)
    records = read_records(path)
    if not records:
        raise DataError(f"{path} is empty.", source)
    return records


def takes(folder: Path, settings: str, option: str) -> bool:
    """Whether a job may take a folder as new; False where it holds the settings file of one that is under way.

    A settings file alone is of a job that never began; what a kill left of writing it does not count.

    Raises:
        RecipeError: the folder is a file, or holds something else.
    """
    if not folder.exists():
        return True
    if not folder.is_dir():
        raise RecipeError(f"{folder} is a file.", f"Choose another {option}.")
    if all(path.name == settings or path.match(f".{settings}.*.part") for path in folder.iterdir()):
        return True
    if not (folder / settings).exists():
        raise RecipeError(f"{folder} holds something else.", f"Choose another {option}.")
    return False


def claim_folder(folder: Path, name: str, settings: Mapping[str, Any], what: str, **noted: Any) -> None:
    """Take an output folder for a job, by a file of its settings; refuse one whose settings are others.

    Args:
        what: lies in such a folder, for the error.
        noted: goes into the file, too, and may differ.

    Raises:
        RecipeError: the folder is of another job, or holds something else.
    """
    if takes(folder, name, "--out"):
        write_json(folder / name, {**settings, **noted})
        return
    old = read_object(folder / name)
    if changed := [key for key in settings if old.get(key) != settings[key]]:
        raise RecipeError(f"{folder} holds {what} made with another {', '.join(changed)}.", "Choose another --out.")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex. A file that has not changed since is read once in a process."""
    return _file_hash(path, *state_of(path))


def state_of(path: Path) -> tuple[int, ...]:
    """Numbers that change when a file does; for keys of what was read of it."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@cache
def _file_hash(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_hash(*parts: str) -> str:
    """SHA-256 of strings (their boundaries count), shortened to 16 hex digits: for keys and provenance."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:".encode())
        digest.update(part.encode())
    return digest.hexdigest()[:16]
