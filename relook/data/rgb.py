"""From a decoded picture to the RGB that a model sees. Pillow and numpy alone."""

from __future__ import annotations

import warnings

import numpy as np
from PIL import ExifTags, Image

# Both are dropped on purpose. For good: filters are not a thread's own, and threads decode.
for noise in ("Palette images with Transparency", "Corrupt EXIF data"):
    warnings.filterwarnings("ignore", noise, UserWarning)

# What undoes each EXIF orientation but 1, in which a picture stands upright.
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
    """Convert a picture as the original LLaVA does, by Pillow's `convert("RGB")`; but 16 bits are scaled, not clipped.

    Transparency is dropped, whether as an alpha channel, in a palette or as one transparent colour (PNG's tRNS), and
    EXIF orientation is ignored. The result holds pixels and no `info`: Pillow keeps the transparent colour there, and
    transformers' image processors lay such a picture on white, or do not, depending on their version.

    Raises:
        ValueError: its values have no defined white: floats, or integers beyond 16 bits.
    """
    rgb = (_high_byte(image) if image.mode.startswith(("I", "F")) else image).convert("RGB")
    rgb.info = {}
    return rgb


def _high_byte(image: Image.Image) -> Image.Image:
    """Scale 16 bits, which Pillow also holds in 32, to 8, as Pillow itself does in 16-bit colour."""
    values = np.asarray(image)
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which the file does not say which is white")
    if values.min() < 0 or values.max() > 0xFFFF:
        raise ValueError("its pixels are 32-bit integers, of which the file does not say which is white")
    return Image.fromarray((values >> 8).astype(np.uint8))


def upright(image: Image.Image) -> Image.Image:
    """Convert a picture as `as_rgb` does, turned as its EXIF orientation says: as every viewer shows it."""
    rgb = as_rgb(image)  # first: Pillow turns TIFF files as it decodes them
    method = TURNS.get(orientation(image))
    return rgb if method is None else rgb.transpose(method)


def orientation(image: Image.Image) -> int:
    """Read the EXIF orientation of a decoded picture, 1 to 8; 1 (upright) where there is none or it is broken."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow's reader raises errors of many kinds for broken notes, which viewers ignore
        return 1
    return value if isinstance(value, int) and value in TURNS else 1
