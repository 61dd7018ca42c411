"""Checks of image files. Imports only Pillow and numpy, so that worker processes start fast."""

from __future__ import annotations

import io
import multiprocessing
import os
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from PIL import Image, UnidentifiedImageError

from relook.data.paths import same_stem
from relook.data.rgb import as_rgb, orientation

# Pillow's format names for each suffix. MPO is a JPEG followed by further pictures, as cameras write it.
FORMATS = {
    ".jpg": ("JPEG", "MPO"),
    ".jpeg": ("JPEG", "MPO"),
    ".png": ("PNG",),
    ".gif": ("GIF",),
    ".webp": ("WEBP",),
    ".bmp": ("BMP",),
    ".tif": ("TIFF",),
    ".tiff": ("TIFF",),
}
QUALITY: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
EXIF_BYTES = 65_000  # that fit into a JPEG segment
PLAIN_MODES = ("RGB", "L")  # modes that a vision tower sees unchanged
MISSING, OTHER_SUFFIX = "missing", "there under another extension"
EMPTY, NOT_IMAGE, TRUNCATED = "empty file", "not an image", "truncated"
TOO_LARGE, UNREADABLE = "too many pixels", "unreadable"
WRONG_SUFFIX, ODD_MODE = "wrong extension", "unusual mode"
REPAIRABLE = (OTHER_SUFFIX, WRONG_SUFFIX, ODD_MODE)  # by rewriting the same picture
TURNED = "turned by EXIF"  # no fault, but viewers and servers turn the image, and LLaVA trains on it unturned
SHOWN = ("", TURNED, *REPAIRABLE)  # findings on files that can be decoded
Finding = tuple[str, str]  # the fault (empty if there is none), and a detail


def examine_all(root: Path, names: Sequence[str]) -> list[Finding]:
    """Run `examine_image` on some files under a folder."""
    return [examine_image(root / name) for name in names]


def examine_image(path: Path) -> Finding:
    """Decode a whole file and return its first fault, with a detail.

    A file has at most one fault, so that counts add up: a GIF under a .jpg name has the wrong extension, and its
    palette follows from that.
    """
    try:
        return _examine(path)
    except FileNotFoundError:
        return _find_other_suffix(path)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return TOO_LARGE, f"more than {Image.MAX_IMAGE_PIXELS:,}"
    except UnidentifiedImageError:
        return NOT_IMAGE, f"begins with {path.open('rb').read(8)!r}"
    except OSError as error:
        if error.errno is not None:  # a file system error; Pillow's own have no errno
            return UNREADABLE, str(error.strerror)
        return TRUNCATED, str(error)
    except Exception as error:  # Pillow's readers raise errors of many kinds for broken bytes
        return TRUNCATED, f"{type(error).__name__}: {error}"


def _examine(path: Path) -> Finding:
    # The order decides which fault is named: first what makes a file useless, then what a rewrite repairs.
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
        return UNREADABLE, "not a file"
    if not status.st_size:
        return EMPTY, ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Pillow only warns up to twice MAX_IMAGE_PIXELS.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            format, mode = str(image.format), image.mode
            image.draft(None, (1, 1))  # a JPEG is then read whole, but decoded at a reduced size
            image.load()
            turn = orientation(image)
            # PNG's tRNS makes one colour transparent without changing the mode.
            odd = mode not in PLAIN_MODES or image.info.get("transparency") is not None
            if odd:
                try:
                    as_rgb(image)
                except ValueError as error:
                    return UNREADABLE, str(error)
    if format in ("JPEG", "MPO", "PNG") and not _has_end_marker(path.read_bytes(), format):
        return TRUNCATED, "its end is missing"
    allowed = FORMATS.get(path.suffix.lower())
    if allowed and format not in allowed:
        return WRONG_SUFFIX, f"{format} under {path.suffix}"
    if odd and format != "GIF":  # a GIF has a palette by its nature
        return ODD_MODE, f"{format} in mode {mode}" + " with a transparent colour" * (mode in PLAIN_MODES)
    return (TURNED, f"orientation {turn}") if turn != 1 else ("", "")


def _find_other_suffix(path: Path) -> Finding:
    """Return the finding for a missing file: there under another extension, broken under that one, or missing."""
    # Prefer the suffix itself in another case, then the formats in their order.
    suffixes = [path.suffix.lower(), *FORMATS]
    siblings = map(path.with_name, same_stem(path))
    candidates = [sibling for sibling in siblings if sibling.suffix.lower() in suffixes]
    for candidate in sorted(candidates, key=lambda other: suffixes.index(other.suffix.lower())):
        if candidate.is_file():
            reason, detail = examine_image(candidate)
            return (OTHER_SUFFIX, candidate.name) if reason in SHOWN else (reason, f"{candidate.name}: {detail}")
    return MISSING, ""


def _has_end_marker(data: bytes, format: str) -> bool:
    """Return True if the end marker is there: Pillow decodes a download whose rest is zeros without an error."""
    if format == "PNG":
        return b"IEND" in data
    position = 2  # after the start-of-image marker
    # Segment by segment to the scan: a thumbnail in a segment has its own end marker.
    while data[position + 1 : position + 2] != b"\xda":
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if data[position : position + 1] != b"\xff":
            return True  # fill bytes and the like: Pillow has read it
    return data.find(b"\xff\xd9", position) >= 0


def rewritten(path: Path, suffix: str) -> bytes:
    """Encode a file's picture in RGB, in the format of `suffix`, and return the bytes; EXIF data is kept.

    A file that is sound except for its name is returned unchanged.
    """
    if FORMATS.get(path.suffix.lower()) == FORMATS.get(suffix.lower()) and examine_image(path)[0] in ("", TURNED):
        return path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            format = FORMATS.get(suffix.lower(), ("JPEG",))[0]
            options: dict[str, Any] = dict(QUALITY.get(format, {}))
            rgb = as_rgb(image)  # before EXIF is read: decoding a TIFF applies and clears its orientation
            if 0 < len(image.info.get("exif", b"")) < EXIF_BYTES and format in ("JPEG", "PNG", "WEBP"):
                options["exif"] = image.info["exif"]
            buffer = io.BytesIO()
            rgb.save(buffer, format, **options)
    return buffer.getvalue()


def exit_with_parent() -> None:
    """Make a worker process exit with the main process, even if that is killed."""
    main_process = multiprocessing.parent_process()
    assert main_process is not None

    def end() -> None:
        main_process.join()
        os._exit(1)

    # The pool cannot do this: a killed parent shuts nothing down, and its workers would wait for tasks forever.
    Thread(target=end, daemon=True).start()
