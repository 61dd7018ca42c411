"""Images against the pixels of the original program, and against Pillow's own conversions for files of every kind."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers import CLIPImageProcessorPil

from relook.data.examine import examine_image
from relook.data.images import ImageLoader, MemoryImage, RandomCrop, image_from_bytes, open_image, pad_to_square
from relook.errors import DataError

CLIP_MEAN = (122, 116, 104)
RNG = np.random.default_rng(0)
PICTURE = Image.fromarray(RNG.integers(0, 255, (31, 48, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def processor(refdata: Path) -> Any:
    return CLIPImageProcessorPil.from_pretrained(refdata / "llava_tiny/vision_towers/openai/clip-vit-tiny-patch14-56")


@pytest.mark.parametrize("case", ["A", "B"])
def test_pixels_of_the_original(refdata: Path, processor: Any, case: str) -> None:
    path = refdata / f"llava_tiny/inputs/image_{case}.png"
    with np.load(refdata / f"llava_tiny/outputs/preprocess_{case}.npz") as made:
        assert np.array_equal(np.asarray(pad_to_square(open_image(path), CLIP_MEAN)), made["padded_square_uint8"])
        np.testing.assert_allclose(ImageLoader(processor, "pad")(path).numpy(), made["pad"], atol=1e-4)
        np.testing.assert_allclose(ImageLoader(processor)(path).numpy(), made["center_crop"], atol=1e-4)
    with np.load(refdata / f"llava_tiny/outputs/case_{case}.npz") as made:
        pixels = ImageLoader(processor, "pad").preprocess([open_image(path)])
        np.testing.assert_allclose(pixels.numpy(), made["pixel_values"], atol=1e-4)


@given(width=st.integers(1, 12), height=st.integers(1, 12))
def test_padding_by_hand(width: int, height: int) -> None:
    inside = RNG.integers(0, 255, (height, width, 3), dtype=np.uint8)
    side = max(width, height)
    top, left = (side - height) // 2, (side - width) // 2
    expected = np.tile(np.array(CLIP_MEAN, dtype=np.uint8), (side, side, 1))
    expected[top : top + height, left : left + width] = inside
    assert np.array_equal(np.asarray(pad_to_square(Image.fromarray(inside), CLIP_MEAN)), expected)


@pytest.mark.parametrize("aspect_ratio", ["pad", ""])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (3, 3), (1, 200), (56, 56)])
def test_tiny_images_of_one_colour(processor: Any, aspect_ratio: str, size: tuple[int, int]) -> None:
    """Of a picture in the canvas's own colour every pixel is that colour, normalised, whatever its size."""
    pixels = ImageLoader(processor, aspect_ratio).preprocess([Image.new("RGB", size, CLIP_MEAN)])
    mean, std = np.array(processor.image_mean), np.array(processor.image_std)
    expected = ((np.array(CLIP_MEAN) / 255 - mean) / std)[None, :, None, None]
    np.testing.assert_allclose(pixels.numpy(), np.broadcast_to(expected, (1, 3, 56, 56)), atol=1e-5)


def saved(folder: Path, image: Image.Image, kind: str, **options: Any) -> Path:
    path = folder / "image.jpg"  # the name says nothing about the content
    image.save(path, kind, **options)
    return path


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("1", "PNG"),
        ("L", "PNG"),
        ("L", "JPEG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("RGB", "BMP"),
        ("RGBA", "PNG"),
        ("RGBA", "WEBP"),
        ("CMYK", "JPEG"),
        ("YCbCr", "JPEG"),
    ],
)
def test_every_mode_as_pillow_converts_it(tmp_path: Path, mode: str, kind: str) -> None:
    picture = PICTURE.convert("RGBA")
    picture.putalpha(Image.fromarray(RNG.integers(0, 255, (31, 48), dtype=np.uint8)))
    image = (picture if "A" in mode else PICTURE).convert(mode)
    path = saved(tmp_path, image, kind)
    opened = open_image(path)
    assert (opened.mode, opened.size) == ("RGB", image.size)
    with Image.open(path) as again:
        assert np.array_equal(np.asarray(opened), np.asarray(again.convert("RGB")))
    if kind not in ("JPEG", "WEBP"):
        assert np.array_equal(np.asarray(opened), np.asarray(image.convert("RGB")))


def test_transparent_palette_and_animation(tmp_path: Path) -> None:
    palette = PICTURE.convert("P")
    assert np.array_equal(
        np.asarray(open_image(saved(tmp_path, palette, "PNG", transparency=bytes(range(256))))),
        np.asarray(palette.convert("RGB")),
    )
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    path = saved(tmp_path, frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(frames[0]))


def key_colours() -> dict[str, tuple[Image.Image, str, Any]]:
    """Pictures, formats, and their transparent colour, palette entry or alphas: one on many pixels."""
    palette, grey = PICTURE.convert("P"), PICTURE.convert("L")
    entry = palette.getpixel((0, 0))
    return {
        "RGB PNG": (PICTURE, "PNG", PICTURE.getpixel((0, 0))),
        "grey PNG": (grey, "PNG", grey.getpixel((0, 0))),
        "1-bit PNG": (PICTURE.convert("1"), "PNG", 0),
        "palette PNG": (palette, "PNG", entry),
        "palette PNG with alphas": (palette, "PNG", bytes(range(0, 256, 2))),
        "GIF": (palette, "GIF", entry),
    }


@pytest.mark.parametrize("kind", list(key_colours()))
def test_a_transparent_colour_changes_no_pixel(processor: Any, tmp_path: Path, kind: str) -> None:
    """LLaVA pads what `convert("RGB")` gives; transformers 5 lays a picture with a transparent colour on white."""
    image, form, colour = key_colours()[kind]
    with_key = tmp_path / "key.png"
    image.save(with_key, form, transparency=colour)
    with Image.open(with_key) as again:
        assert again.info["transparency"] is not None  # the file has it
    expected = np.asarray(image.convert("RGB"))
    assert np.array_equal(np.asarray(open_image(with_key)), expected)
    square = image.resize((30, 30), Image.Resampling.NEAREST)  # no canvas is laid under it
    square.save(with_key, form, transparency=colour)
    square.save(tmp_path / "plain.png", form)
    for aspect_ratio in ("pad", ""):
        loader = ImageLoader(processor, aspect_ratio)
        plain = loader(tmp_path / "plain.png")
        assert loader(with_key).equal(plain)
        with Image.open(with_key) as held:
            assert loader(held).equal(plain)
            assert loader(MemoryImage.of(held)).equal(plain)
            assert loader.preprocess([held])[0].equal(plain)
    sent = image_from_bytes(with_key.read_bytes(), 10**6, lambda *_: None)
    assert ImageLoader(processor).preprocess([sent])[0].equal(ImageLoader(processor)(tmp_path / "plain.png"))


def png_of_16_bits(values: Any) -> bytes:
    """A PNG with 16 bits a channel, written by hand: Pillow writes no colour ones. Values (H, W) or (H, W, 3)."""
    height, width = values.shape[:2]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2 if values.ndim == 3 else 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_16_bits_of_grey_are_those_of_colour_everywhere(tmp_path: Path) -> None:
    """Pillow decodes 16-bit colour to 8 bits, and clips 16-bit grey to white."""
    values = RNG.integers(0, 2**16, (31, 48), dtype=np.uint16)
    values[0, :2] = 0, 2**16 - 1
    (tmp_path / "colour.png").write_bytes(png_of_16_bits(np.stack([values] * 3, -1)))
    (tmp_path / "grey.png").write_bytes(png_of_16_bits(values))
    expected = np.asarray(open_image(tmp_path / "colour.png"))
    assert expected[0, 0, 0] == 0
    assert expected[0, 1, 0] == 255
    Image.fromarray(values).save(tmp_path / "grey.tif")
    Image.frombytes("I;16B", (48, 31), values.astype(">u2").tobytes()).save(tmp_path / "big.tif")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "wide.tif")
    (tmp_path / "grey.pgm").write_bytes(b"P5 48 31 65535\n" + values.astype(">u2").tobytes())
    files = [tmp_path / name for name in ("grey.png", "grey.tif", "big.tif", "wide.tif", "grey.pgm")]
    sent = image_from_bytes(files[0].read_bytes(), 10**6, lambda *_: None)
    for image in (*map(open_image, files), sent, MemoryImage.of(Image.fromarray(values)).image):
        assert np.array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("values", [np.linspace(0, 1, 9, dtype=np.float32), np.array([0, 70_000], np.int32)])
def test_values_without_a_white_are_refused_by_name(processor: Any, tmp_path: Path, values: Any) -> None:
    image = Image.fromarray(values[None])
    image.save(tmp_path / "odd.tif")
    with pytest.raises(DataError, match=r"odd\.tif cannot be decoded: its pixels are .* which is white"):
        open_image(tmp_path / "odd.tif")
    with pytest.raises(DataError, match="which is white"):
        ImageLoader(processor)(image)
    assert examine_image(tmp_path / "odd.tif")[0] == "unreadable"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_exif_turns_what_is_served_and_nothing_else(tmp_path: Path, form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, PICTURE, form, exif=exif)
    with Image.open(path) as image:
        stored, turned = image.convert("RGB"), ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(stored))
    sent = image_from_bytes(path.read_bytes(), 10**6, lambda *_: None)
    assert np.array_equal(np.asarray(sent), np.asarray(turned))
    assert (sent.size == PICTURE.size) == (orientation not in (5, 6, 7, 8))


def test_broken_exif_is_ignored(tmp_path: Path) -> None:
    path = saved(tmp_path, PICTURE, "PNG", exif=b"Exif\0\0MM\0*nonsense")
    sent = image_from_bytes(path.read_bytes(), 10**6, lambda *_: None)
    assert np.array_equal(np.asarray(sent), np.asarray(PICTURE))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an image file"),
        (b"<html>404 not found</html>", "is not an image file"),
        (None, "does not exist"),
    ],
)
def test_what_is_no_image(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "photo.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"photo\.jpg {message}"):
        open_image(path)


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        open_image(tmp_path)


def test_a_hundred_megapixels_are_refused_before_decoding(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("1", (10_000, 10_000)), "PNG")
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"image\.jpg has more than 89,478,485 pixels"):
        open_image(path)


def test_long_and_thin_is_refused_before_it_fills_the_memory(processor: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("L", (40_000, 1)), "PNG")
    for aspect_ratio in ("pad", ""):
        with pytest.raises(DataError, match=r"image\.jpg is too long and thin: 40000 x 1 pixels"):
            ImageLoader(processor, aspect_ratio)(path)
    panorama = Image.new("RGB", (12_000, 300))  # too long for a canvas of 12,000 x 12,000, harmless to crop
    assert ImageLoader(processor).preprocess([panorama]).shape == (1, 3, 56, 56)


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA", "ICO"]),
    keep=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
)
def test_broken_bytes_are_an_image_or_a_named_error(
    tmp_path_factory: pytest.TempPathFactory, kind: str, keep: float, changes: list[tuple[float, int]]
) -> None:
    buffer = io.BytesIO()
    PICTURE.save(buffer, kind)
    data = bytearray(buffer.getvalue())
    for where, value in changes:
        data[int(where * len(data))] = value
    path = tmp_path_factory.getbasetemp() / "broken.jpg"
    path.write_bytes(data[: int(keep * len(data))])
    try:
        outcome = open_image(path).mode
    except DataError as error:
        outcome = str(error)
    assert outcome == "RGB" or "broken.jpg" in outcome


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP"])
def test_truncated_is_an_error(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path, PICTURE, kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"image\.jpg cannot be decoded"):
        open_image(path)


def test_cache_keeps_the_most_recent(processor: Any, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path in paths:
        PICTURE.save(path)
    loader = ImageLoader(processor, "pad", cache_bytes=2 * 3 * 56 * 56 * 4)
    first, second = loader.inputs(paths[0]), loader.inputs(paths[1])
    assert loader.inputs(paths[0]) is first
    loader.inputs(paths[2])  # pushes out the second, which was used longest ago
    assert loader.inputs(paths[0]) is first
    assert loader.inputs(paths[1]) is not second


def test_a_crop_is_a_small_part_as_large_as_the_whole(tmp_path: Path) -> None:
    """Of a picture whose colours say where they stand: red from left to right, green from top to bottom."""
    width, height = 200, 100
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([across, down, np.zeros_like(across)], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "whole.png")
    shares, corners = [], set()
    for seed in range(200):
        found = np.asarray(RandomCrop(tmp_path / "whole.png", str(seed)).open()).astype(float)
        assert found.shape == (height, width, 3)
        low, high = found.min((0, 1)) / 255, found.max((0, 1)) / 255
        shares.append((high[0] - low[0]) * (high[1] - low[1]))
        corners.add((round(low[0], 1), round(low[1], 1)))
        assert high[0] - low[0] == pytest.approx(high[1] - low[1], abs=0.03)  # the picture's own proportions
    assert 0.003 < min(shares) < 0.03
    assert 0.17 < max(shares) < 0.22
    assert len(corners) > 40


def test_a_crop_is_drawn_by_its_seed_alone(processor: Any, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        PICTURE.save(tmp_path / name)
    a, same, other = (
        RandomCrop(tmp_path / "a.png", "1"),
        RandomCrop(tmp_path / "b.png", "1"),
        RandomCrop(tmp_path / "a.png", "2"),
    )
    images = ImageLoader(processor)
    assert images.size(a) == images.size(tmp_path / "a.png") == (31, 48)
    one, two, three, whole = images.batch([a, same, other, tmp_path / "a.png"])["pixel_values"]
    assert one.equal(two)
    assert not one.equal(three)
    assert not one.equal(whole)
    assert images.batch([a])["pixel_values"][0].equal(one)


def test_a_picture_of_one_pixel_can_be_cropped(tmp_path: Path) -> None:
    Image.new("L", (1, 1), 7).save(tmp_path / "dot.png")
    assert np.asarray(RandomCrop(tmp_path / "dot.png", "1").open()).tolist() == [[[7, 7, 7]]]
    with pytest.raises(DataError, match="does not exist"):
        RandomCrop(tmp_path / "none.png", "1").open()
