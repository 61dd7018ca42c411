"""Conversion of a decoded picture to the RGB that a model sees. Imports only Pillow and numpy."""

from __future__ import annotations

import warnings

import numpy as np
from PIL import ExifTags, Image

# Transparency and EXIF are dropped on purpose. Set once: warning filters are not thread-local, and threads decode.
for noise in ("Palette images with Transparency", "Corrupt EXIF data"):
    warnings.filterwarnings("ignore", noise, UserWarning)

# Transposition that undoes each EXIF orientation; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture as the original LLaVA does, by Pillow's `convert("RGB")`; but scale 16 bits, not clip.

    Transparency is dropped, whether as an alpha channel, in a palette or as one transparent colour (PNG's tRNS), and
    EXIF orientation is ignored. The result has an empty `info`: Pillow keeps the transparent colour there, and some
    versions of transformers' image processors put such a picture on white.

    Raises:
        ValueError: the pixels have no defined white: floats, or integers beyond 16 bits.
    """
    rgb = (_high_byte(image) if image.mode.startswith(("I", "F")) else image).convert("RGB")
    rgb.info = {}
    return rgb


def _high_byte(image: Image.Image) -> Image.Image:
    """Scale 16-bit values, which Pillow may hold in 32 bits, to 8, as Pillow does for 16-bit colour."""
    values = np.asarray(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, and the file does not define which is white")
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("its pixels are 32-bit integers, and the file does not define which is white")
    return Image.fromarray((values >> 8).astype(np.uint8))


def upright(image: Image.Image) -> Image.Image:
    """Convert a picture as `as_rgb` does, and apply its EXIF orientation, as every viewer does."""
    rgb = as_rgb(image)  # before EXIF is read: Pillow applies the orientation of TIFF files when it decodes them
    method = TURNS.get(orientation(image))
    return rgb if method is None else rgb.transpose(method)


def orientation(image: Image.Image) -> int:
    """Read the EXIF orientation of a decoded picture, 1 to 8; 1 (upright) if it is missing or broken."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow's reader raises errors of many kinds for broken EXIF data, which viewers ignore
        return 1
    return value if isinstance(value, int) and value in TURNS else 1
