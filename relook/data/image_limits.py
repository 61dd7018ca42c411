"""Limits on the cost of reading an image file, checked from its structure before anything is decoded.

Pillow reads segments, chunks and comments in Python, some of them in quadratic time, and decodes every scan of a JPEG
over all of its pixels: a small file can keep a CPU busy for hours. The walks below follow the readers and stop at
the first excess. Broken files are left to Pillow's own errors.
"""

from __future__ import annotations

import re

from relook.errors import DataError

JPEG_SCANS = 16  # at the pixel limit; smaller pictures may have more. Encoders write about 10
JPEG_SEGMENTS = 2_000  # a colour profile takes up to 255
JPEG_FILL = 10_000  # bytes that belong to no segment
PNG_CHUNKS = 20_000
GIF_BLOCKS = 2_000  # of 255 bytes each, before the first picture
JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG markers that are followed by a size
JPEG_MARKER = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)
JPEG_MARKER_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)  # restart markers are part of a scan


def check_structure(data: bytes, max_pixels: int) -> None:
    """Refuse a file that takes far more work to read than a picture of `max_pixels` should.

    Raises:
        DataError: the file has too many parts of a kind, which the message names.
    """
    try:
        if data.startswith(b"\xff\xd8"):
            _check_jpeg(data, max_pixels)
        elif data.startswith(b"\x89PNG"):
            _check_png(data)
        elif data.startswith(b"GIF8"):
            _check_gif(data)
        elif data.startswith(b"BM") and data[14:18] != b"\x0c\x00\x00\x00" and data[30] in (1, 2):
            raise DataError("The image is a run-length encoded BMP.", "Save it uncompressed, or as a PNG.")
    except IndexError:  # the file ends too early
        pass


def _check_jpeg(data: bytes, max_pixels: int) -> None:
    position, scans, pixels, marker, filling = 2, 0, 0, 0, 0
    for _ in range(JPEG_SEGMENTS):
        # As libjpeg does, skip whatever precedes the next marker.
        match = (JPEG_MARKER_AFTER_SCAN if marker == 0xDA else JPEG_MARKER).search(data, position)
        end = match.start() if match else len(data)
        if marker != 0xDA:
            filling += end - position
        elif data.find(b"\xff" * JPEG_FILL, position, end + 1) >= 0:  # libjpeg restarts a run of 0xFF with each buffer
            filling = JPEG_FILL + 1
        if filling > JPEG_FILL:
            raise DataError(f"The image has more than {JPEG_FILL:,} bytes of filling.", "Save it again.")
        if match is None or data[end + 1] == 0xD9:
            return
        position, marker = end + 2, data[end + 1]
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # a marker without content
            continue
        if marker in JPEG_SIZE_MARKERS:  # segment length (2 bytes), bits per sample (1), height (2), width (2)
            height, width = _number(data[position + 3 : position + 5]), _number(data[position + 5 : position + 7])
            pixels = max(pixels, height * width)
        # Progressive JPEGs are decoded once per scan, each time over the whole picture.
        scans += marker == 0xDA
        if scans * pixels > JPEG_SCANS * max_pixels:
            raise DataError(f"The image has more than {scans - 1} scans.", "Save it as a baseline JPEG.")
        position += max(2, _number(data[position : position + 2]))
    raise DataError(f"The image has more than {JPEG_SEGMENTS:,} segments.", "Save it without metadata.")


def _check_png(data: bytes) -> None:
    position = 8  # after the signature; a chunk is length, type, content and checksum
    for _ in range(PNG_CHUNKS):
        if position >= len(data):
            return
        position += 12 + _number(data[position : position + 4])
    raise DataError(f"The image has more than {PNG_CHUNKS:,} chunks.", "Save it again, without metadata.")


def _check_gif(data: bytes) -> None:
    # 13 bytes of signature and screen descriptor, then the global palette.
    position, in_extension = 13 + _palette(data[10]), False
    for _ in range(GIF_BLOCKS):
        if in_extension:  # blocks, each preceded by its length, up to an empty one
            in_extension = data[position] > 0
            position += 1 + data[position]
        elif data[position] == 0x21:  # an extension: skip its introducer and its kind
            in_extension, position = True, position + 2
        elif data[position] in (0x2C, 0x3B):  # a picture, or the end
            return
        else:  # Pillow skips such a byte
            position += 1
    raise DataError(f"The image has more than {GIF_BLOCKS:,} blocks before its picture.", "Save it without comments.")


def _palette(flags: int) -> int:
    """Return the size of a GIF's palette in bytes."""
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0  # 3 bytes for each of 2 ** (n + 1) colours


def _number(data: bytes) -> int:
    return int.from_bytes(data, "big")
