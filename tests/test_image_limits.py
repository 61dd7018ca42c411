"""Files that strangers send: their structure is bounded before Pillow reads them, and nothing usual is refused."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from relook.data.image_limits import GIF_BLOCKS, JPEG_FILL, JPEG_SCANS, JPEG_SEGMENTS, PNG_CHUNKS, check_structure
from relook.data.images import image_from_bytes
from relook.errors import DataError

PIXELS = 48 * 32
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8))


def saved(kind: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    NOISE.save(buffer, kind, **how)
    return buffer.getvalue()


def decoded(data: bytes, max_pixels: int = PIXELS) -> Image.Image:
    return image_from_bytes(data, max_pixels, lambda *_: None)


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


PROGRESSIVE, PLAIN, PNG, GIF = saved("JPEG", progressive=True), saved("JPEG"), saved("PNG"), saved("GIF")
LAST = PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2]  # scan of a progressive JPEG
OWN = PROGRESSIVE.count(b"\xff\xda")  # Pillow's writer puts neither profile nor preview into it
PALETTE = 13 + 3 * 256


def with_scans(count: int) -> bytes:
    return PROGRESSIVE[:-2] + LAST * (count - OWN) + PROGRESSIVE[-2:]


def bmp(runs: bytes) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, 48, 32, 1, 8, 1, len(runs), 0, 0, 256, 256)
    return b"BM" + struct.pack("<IHHI", 1078 + len(runs), 0, 0, 1078) + head + bytes(1024) + runs


def webp() -> bytes:
    return saved("WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", NOISE.size)] * 50)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_scans(JPEG_SCANS + 1), f"{JPEG_SCANS} scans"),
        (PLAIN[:2] + b"\xff\xef\x00\x02" * JPEG_SEGMENTS + PLAIN[2:], "segments"),
        (PLAIN[:2] + b"\xff\xfe\x00\x03a" * JPEG_SEGMENTS + PLAIN[2:], "segments"),
        (PLAIN[:2] + b"\xff" * (JPEG_FILL + 1) + PLAIN[2:], "filling"),
        (PLAIN[:2] + b"\xff\x00" * JPEG_FILL + PLAIN[2:], "filling"),
        (PLAIN[:-2] + b"\xff" * (JPEG_FILL + 1) + PLAIN[-2:], "filling"),
        (PLAIN[:-2] + b"\xff" * (JPEG_FILL + 1) + b"\x00" + PLAIN[-2:], "filling"),
        (PNG[:33] + chunk(b"tEXt", b"a\0") * PNG_CHUNKS + PNG[33:], "chunks"),
        (PNG[:33] + chunk(b"prVt") * PNG_CHUNKS + PNG[33:], "chunks"),
        (PNG[:33] + chunk(b"IDAT") * PNG_CHUNKS + PNG[33:], "chunks"),
        (GIF[:PALETTE] + b"\x21\xfe" + b"\x01a" * GIF_BLOCKS + b"\0" + GIF[PALETTE:], "blocks"),
        (GIF[:PALETTE] + b"\x21\xfe\x01a\0" * GIF_BLOCKS + GIF[PALETTE:], "blocks"),
        (GIF[:PALETTE] + b"\0" * GIF_BLOCKS + GIF[PALETTE:], "blocks"),
        (bmp(b"\x01\x05" * PIXELS), "run-length"),
    ],
    ids=[
        *("scans", "app", "comments", "fill", "stuffed", "scan fill", "stuffed scan", "tEXt", "prVt", "IDAT"),
        *("gif comment", "gif comments", "gif fill", "bmp"),
    ],
)
def test_a_file_that_is_costly_to_read_is_refused_before_pillow_opens_it(
    data: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was opened")

    monkeypatch.setattr(Image, "open", never)
    with pytest.raises(DataError, match=message):
        decoded(data)


@pytest.mark.parametrize(
    "data",
    [
        PNG[:33] + chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000))) + PNG[33:],
        PNG[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1_000_000))) * 70 + PNG[33:],
        PNG[:33] + chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(2_000_000))) + PNG[33:],
    ],
    ids=["iCCP", "zTXt", "iTXt"],
)
def test_compressed_metadata_is_not_unpacked_without_end(data: bytes) -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        decoded(data)


def test_a_small_picture_may_have_more_scans() -> None:
    """What counts is scans times pixels."""
    data = with_scans(JPEG_SCANS + 1)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(np.asarray(decoded(data, 2 * PIXELS)), np.asarray(expected))
    with pytest.raises(DataError, match="scans"):
        decoded(with_scans(2 * JPEG_SCANS + 1), 2 * PIXELS)


@pytest.mark.parametrize(
    "make",
    [
        lambda: PROGRESSIVE,
        lambda: saved("JPEG", restart_marker_blocks=1),
        lambda: saved("JPEG", icc_profile=b"\xff\xda" * 100_000, comment=b"\xff\xda" * 1000),
        lambda: PLAIN + b"\xff" * (JPEG_FILL + 1) + b"\xff\xda\x00\x02" * JPEG_SEGMENTS,  # after its end
        lambda: PLAIN[:2] + b"\xff\xff\xff" + PLAIN[2:],
        lambda: saved("MPO", save_all=True, append_images=[NOISE] * 100),
        lambda: saved("PNG", save_all=True, append_images=[Image.new("RGB", NOISE.size)] * 100),
        lambda: PNG[:33] + b"".join(chunk(b"tEXt", b"k%d\0v" % i) for i in range(500)) + PNG[33:],
        lambda: saved("GIF", save_all=True, append_images=[Image.new("RGB", NOISE.size)] * 100, comment=b"c" * 5000),
        webp,
        lambda: saved("BMP"),
    ],
    ids=["progressive", "restart", "profile", "tail", "fill", "mpo", "apng", "text", "gif", "webp", "bmp"],
)
def test_usual_files_give_the_pixels_of_their_first_picture(make: Callable[[], bytes]) -> None:
    data = make()
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert np.array_equal(np.asarray(decoded(data)), np.asarray(expected))


@given(st.sampled_from([PROGRESSIVE, PNG, GIF, saved("BMP")]), st.integers(0, 3000), st.binary(max_size=20))
def test_broken_structure_is_left_to_pillow(data: bytes, at: int, other: bytes) -> None:
    check_structure(data[:at], 10 * PIXELS)
    check_structure(data[:at] + other + data[at + len(other) :], 100 * PIXELS)
