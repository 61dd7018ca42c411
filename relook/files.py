"""Atomic writes, folder locks, shared readers and hashes of files."""

from __future__ import annotations

import fcntl
import functools
import glob
import hashlib
import io
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from relook.console import prints_output, readable_size, status
from relook.errors import DataError, RecipeError, RelookError

P = ParamSpec("P")
T = TypeVar("T")


# The system's words, which libraries repeat where they raise errors of their own, and what torch.save says instead.
FULL_DISK = ("No space left on device", "Disk quota exceeded", "unexpected pos", "iostream error")


def is_full_disk(error: BaseException) -> bool:
    """Return True if an error of the system or of a library means that a disk is full."""
    return any(words in str(error) for words in FULL_DISK)


@contextmanager
def reports_full_disk(path: Path) -> Iterator[None]:
    """Turn a full disk's error, raised while `path` is written, into one that names the path."""
    try:
        yield
    except Exception as error:  # libraries in Rust and C++ have types of their own
        if not is_full_disk(error):
            raise
        raise RelookError(
            f"{path} cannot be written: the disk is full.", "Make room there, then run the same command again."
        ) from error


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`: renamed to `path` on success, removed on any failure."""
    if path.is_dir():
        raise RelookError(f"{path} is a folder.", "Give a file's name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is atomic within one file system only; one name per process.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with reports_full_disk(path):
            yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, as `atomic_file` does for a file.

    An existing folder of the final name is replaced at the end, by two renames.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Remove what a killed process left for the same folder: it is hidden, and can be as large as a model.
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if not process_is_alive(owner := leftover.name.split(".")[-2]) or owner == str(os.getpid()):
            shutil.rmtree(leftover, ignore_errors=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    replaced = path.with_name(f".{path.name}.old.{os.getpid()}.part")
    temporary.mkdir()
    try:
        with reports_full_disk(path):
            yield temporary
        if path.exists():  # a rename onto a folder that is not empty fails
            path.replace(replaced)
        temporary.replace(path)
    finally:
        for leftover in (temporary, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def make_paths(settings: Any) -> None:
    """Convert strings to Path in the path fields of a dataclass, and in its lists of paths; None stays None."""
    # Annotations are strings here, and a frozen dataclass takes new values by object.__setattr__ only.
    for name, kind in ((field.name, str(field.type)) for field in fields(settings)):
        value = getattr(settings, name)
        if kind.startswith("Path") and isinstance(value, str):
            object.__setattr__(settings, name, Path(value))
        elif kind.startswith("Sequence[Path]"):
            object.__setattr__(settings, name, tuple(map(Path, value)))


def process_is_alive(process: str) -> bool:
    """Return True if the process of this id (as in the names of half-written files) runs on this machine."""
    try:
        os.kill(int(process), 0)  # signal 0 only checks that the process exists
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:  # under another user
        return True
    return True


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Lock a folder for this process and those that torchrun started with it. The folder need not exist yet.

    On a file system without locks, nothing is locked.

    Raises:
        RelookError: another process is writing there.
    """
    # One process of torchrun holds the lock for all. A file in the folder's place is reported by whoever writes there.
    if not prints_output() or (folder.exists() and not folder.is_dir()):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    # flock, not a lock file: the operating system releases it when the process ends, however it ends.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RelookError(
            f"{folder} is in use: another relook is writing there.", "Wait until it ends, or choose another folder."
        ) from None
    except OSError:  # no locks on this file system
        pass
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()  # succeeds only if it is empty: nothing came of the job
        os.close(descriptor)


def has_json_lines(folder: Path) -> bool:
    """Return True if there are JSON lines in a folder, as grow there with what takes a job long."""
    return any(folder.rglob("*.jsonl"))


def writes_alone(
    folder_of: Callable[..., Path], resumes: Callable[[Path], bool] = has_json_lines
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator that runs a job under `sole_writer`; `folder_of` maps its arguments to the folder.

    A full disk becomes an error that names the folder, or a file that was being written. Ctrl-C prints what the same
    command would do: `resumes` returns True if it would go on from what is in the folder.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def alone(*args: P.args, **kwargs: P.kwargs) -> T:
            folder = folder_of(*args, **kwargs)
            with reports_full_disk(folder), sole_writer(folder):
                try:
                    return function(*args, **kwargs)
                except KeyboardInterrupt:
                    status(
                        f"  {folder}: the same command goes on from here"
                        if resumes(folder)
                        else f"  {folder} has nothing to go on from: the same command begins anew"
                    )
                    raise

        return alone

    return decorate


def require_disk_space(path: Path, needed: int, subject: str, fix: str) -> None:
    """Check that the disk has room for a file or folder before work on it begins.

    Raises:
        RelookError: there is too little space; the message gives the needed and the free bytes.
    """
    existing = path  # or the nearest folder above it that exists
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise RelookError(
            f"{subject} needs {readable_size(needed)} on disk, but {path.parent} has {readable_size(free)} free.", fix
        )


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1) + "\n")


def write_jsonl(path: Path, records: Iterable[object]) -> None:
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def require_regular(path: Path) -> None:
    """Refuse a path that exists but is neither a file nor a folder: reading a pipe without a writer never ends.

    Raises:
        DataError: it is a named pipe, a socket or a device.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):  # whatever reads the file reports this
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise DataError(f"{path} is a pipe, a socket or a device, not a file.", "Give a regular file.")


def require_regular_files(folder: Path) -> None:
    """Call `require_regular` on every entry of a folder, for libraries that read whatever they find there."""
    for path in folder.iterdir():
        require_regular(path)


def read_text(path: Path) -> str:
    """Read a text file in UTF-8, UTF-16 or UTF-32, and drop its byte order mark.

    Raises:
        DataError: it does not exist, is not a file, or is not text in one of these encodings.
    """
    require_regular(path)
    try:
        return _text(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.", "Check the path.") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, but a file is expected here.", "Give the path of the file.") from None
    except UnicodeDecodeError as error:
        problem = f"{path} is not {error.encoding.upper()} text ({error.reason} at byte {error.start})."
        raise DataError(problem, "Save it as UTF-8.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None


def _text(data: bytes) -> str:
    """Decode text, taking the encoding from its first bytes; every line ending becomes a newline."""
    # detect_encoding tells UTF-8, -16 and -32 apart by their byte order mark or by zero bytes, as JSON's RFC has it.
    return io.TextIOWrapper(io.BytesIO(data), json.detect_encoding(data)).read()


def opens_with(path: Path, mark: str) -> bool:
    """Return True if the text file begins with `mark`, leading white space aside."""
    # The head is enough, and may end within a character: "ignore" drops that.
    with path.open("rb") as file:
        head = file.read(1024)
    return head.decode(json.detect_encoding(head), "ignore").lstrip().startswith(mark)


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


def read_json_object(path: Path, optional: bool = False) -> dict[str, Any]:
    """Read a file that holds one JSON object; with `optional`, return an empty dict if there is no file."""
    content = {} if optional and not path.exists() else read_json(path)
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a JSON object.", "Download it again.")
    return content


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a list of JSON objects, stored either as JSON lines or as one JSON array."""
    text = read_text(path)
    # The first character tells the two apart: a line of JSON lines is an object.
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


def read_published_records(path: Path, source: str) -> list[dict[str, Any]]:
    """Read records as `read_records` does, from a published file that must be neither missing nor empty.

    Args:
        source: where the file comes from, for the error message.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist.", source)
    records = read_records(path)
    if not records:
        raise DataError(f"{path} is empty.", source)
    return records


def is_free(folder: Path, settings: str, option: str) -> bool:
    """Return True if a job may use the folder as new, False if it holds the `settings` file of a job under way.

    A settings file alone belongs to a job that never began.

    Raises:
        RecipeError: the folder is a file, or holds something else.
    """
    if not folder.exists():
        return True
    if not folder.is_dir():
        raise RecipeError(f"{folder} is a file.", f"Choose another {option}.")
    # Empty, or nothing but settings, whole or half-written: no work would be lost.
    if all(path.name == settings or path.match(f".{settings}.*.part") for path in folder.iterdir()):
        return True
    if not (folder / settings).exists():
        raise RecipeError(f"{folder} holds something else.", f"Choose another {option}.")
    return False


def claim_output_dir(folder: Path, name: str, settings: Mapping[str, Any], contents: str, **notes: Any) -> None:
    """Claim an output folder for a job by writing its settings there; refuse a folder with different settings.

    Args:
        contents: what such a folder contains, for the error message.
        notes: further values for the file, which may differ from those already there.

    Raises:
        RecipeError: the folder belongs to another job, or holds something else.
    """
    if is_free(folder, name, "--out"):
        write_json(folder / name, {**settings, **notes})
        return
    stored = read_json_object(folder / name)
    if changed := [key for key in settings if stored.get(key) != settings[key]]:
        # Where a path and the hash of its files differ, the path says enough.
        changed = [key for key in changed if not key.endswith("_hash") or key.removesuffix("_hash") not in changed]
        names = ", ".join(_changed(key, stored.get(key), settings[key]) for key in changed)
        raise RecipeError(f"{folder} holds {contents} made with another {names}.", "Choose another --out.")


def _changed(key: str, before: Any, now: Any) -> str:
    """Name a setting that has changed, with both values where they are short enough to help."""
    name, values = key.removesuffix("_hash"), [str(value) for value in (before, now)]
    if key.endswith("_hash"):
        return f"{name} (its files have changed)"
    of_words = not any(isinstance(value, dict | list) for value in (before, now)) and max(map(len, values)) <= 80
    return f"{name} ({values[0]}, not {values[1]})" if of_words else name


def file_hash(path: Path) -> str:
    """Compute the SHA-256 of a file's bytes, in hex. An unchanged file is read once per process."""
    return _file_hash(path, *file_stamp(path))


def file_stamp(path: Path) -> tuple[int, ...]:
    """Return numbers that change when the file does, to key caches of its content."""
    # mtime alone is too coarse on some file systems, and tools set it back; ctime they cannot.
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@cache  # by path and stamp, so that a changed file is read again
def _file_hash(path: Path, *_: int) -> str:
    require_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_hash(*parts: str) -> str:
    """Compute the SHA-256 of strings (boundaries count), cut to 16 hex digits, for keys and provenance."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)}:".encode())  # ("ab", "c") and ("a", "bc") differ
        digest.update(part.encode())
    return digest.hexdigest()[:16]
