"""What is wrong with an image file. Pillow and numpy alone: the processes that examine a folder start in a moment."""

from __future__ import annotations

import io
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from relook.data.paths import same_stem
from relook.data.rgb import as_rgb, orientation

# Pillow's names of what a suffix promises. MPO is a JPEG with further pictures behind it, as cameras write them.
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
EXIF_BYTES = 65_000  # that a JPEG segment holds
PLAIN_MODES = ("RGB", "L")  # what a vision tower sees of them is the picture itself
MISSING, OTHER_SUFFIX = "missing", "there under another extension"
EMPTY, NOT_IMAGE, TRUNCATED = "empty file", "not an image", "truncated"
TOO_LARGE, UNREADABLE = "too many pixels", "unreadable"
WRONG_SUFFIX, ODD_MODE = "wrong extension", "unusual mode"
REPAIRABLE = (OTHER_SUFFIX, WRONG_SUFFIX, ODD_MODE)  # by writing the same picture again
TURNED = "turned by EXIF"  # no fault, but viewers and servers show it otherwise than LLaVA trains on it
SHOWN = ("", TURNED, *REPAIRABLE)  # what is said of files that show their picture
Found = tuple[str, str]  # what is wrong, empty where nothing is, and a detail


def examine_all(root: Path, names: Sequence[str]) -> list[Found]:
    """`examine_image` of some files under a folder."""
    return [examine_image(root / name) for name in names]


def examine_image(path: Path) -> Found:
    """Decode a file whole and say the first thing that is wrong with it, with a detail.

    A file has one fault at most, so that counts add up: a GIF under a .jpg name is of the wrong extension, and its
    palette follows from that.
    """
    try:
        return _examined(path)
    except FileNotFoundError:
        return _elsewhere(path)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return TOO_LARGE, f"more than {Image.MAX_IMAGE_PIXELS:,}"
    except UnidentifiedImageError:
        return NOT_IMAGE, f"begins with {path.open('rb').read(8)!r}"
    except OSError as error:
        if error.errno is not None:  # of the file system; Pillow's own have none
            return UNREADABLE, str(error.strerror)
        return TRUNCATED, str(error)
    except Exception as error:  # Pillow's readers raise errors of many kinds for broken bytes
        return TRUNCATED, f"{type(error).__name__}: {error}"


def _examined(path: Path) -> Found:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        return UNREADABLE, "not a file"
    if not status.st_size:
        return EMPTY, ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            form, mode = str(image.format), image.mode
            image.draft(None, (1, 1))  # a JPEG is then read whole, but not computed at its full size
            image.load()
            turn = orientation(image)
            key = image.info.get("transparency") is not None
            odd = mode not in PLAIN_MODES or key
            if odd:
                try:
                    as_rgb(image)
                except ValueError as error:
                    return UNREADABLE, str(error)
    if form in ("JPEG", "MPO", "PNG") and not _ends(path.read_bytes(), form):
        return TRUNCATED, "its end is missing"
    allowed = FORMATS.get(path.suffix.lower())
    if allowed and form not in allowed:
        return WRONG_SUFFIX, f"{form} under {path.suffix}"
    if odd and form != "GIF":  # a GIF has a palette by its nature
        return ODD_MODE, f"{form} in mode {mode}" + " with a transparent colour" * (mode in PLAIN_MODES)
    return (TURNED, f"orientation {turn}") if turn != 1 else ("", "")


def _elsewhere(path: Path) -> Found:
    """Say what became of a file that is not there: the same name has another extension, or is nowhere; a file that is
    there, but broken, is called so."""
    order = [path.suffix.lower(), *FORMATS]
    others = [other for name in same_stem(path) if (other := path.with_name(name)).suffix.lower() in order]
    for other in sorted(others, key=lambda other: order.index(other.suffix.lower())):
        if other.is_file():
            reason, detail = examine_image(other)
            return (OTHER_SUFFIX, other.name) if reason in SHOWN else (reason, f"{other.name}: {detail}")
    return MISSING, ""


def _ends(data: bytes, form: str) -> bool:
    """Whether the mark that ends a picture is there. Pillow decodes a download whose rest is zeros without an error."""
    if form == "PNG":
        return b"IEND" in data
    at = 2
    while data[at + 1 : at + 2] != b"\xda":  # segment by segment to the scan: a thumbnail has an end of its own
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at : at + 1] != b"\xff":
            return True  # fill bytes and the like: Pillow has read it
    return data.find(b"\xff\xd9", at) >= 0


def rewritten(path: Path, suffix: str) -> bytes:
    """The picture of a file as bytes of the format that a suffix promises, in RGB; the camera's notes (EXIF) kept.

    A file that is as it should be but for its name is passed on as it is.
    """
    if FORMATS.get(path.suffix.lower()) == FORMATS.get(suffix.lower()) and examine_image(path)[0] in ("", TURNED):
        return path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            form = FORMATS.get(suffix.lower(), ("JPEG",))[0]
            how: dict[str, Any] = dict(QUALITY.get(form, {}))
            rgb = as_rgb(image)  # first: a TIFF file is turned as it is decoded, and then says so no more
            if 0 < len(image.info.get("exif", b"")) < EXIF_BYTES and form in ("JPEG", "PNG", "WEBP"):
                how["exif"] = image.info["exif"]
            made = io.BytesIO()
            rgb.save(made, form, **how)
    return made.getvalue()
