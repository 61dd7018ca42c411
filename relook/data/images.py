"""Image files to pixel values, with the checks that untrusted bytes need."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from relook.errors import DataError

# ----------------------------------------------------------------------------------------------------
# The most recently used things, up to a number of bytes.

T = TypeVar("T")
_LOCK = threading.Lock()  # of all memories; the module's, so that what holds one can be sent to another process


class Recent(Generic[T]):
    """A memory for what is costly to make again. Threads may share one.

    Args:
        limit: bytes that it may hold. The last thing put in may be larger by itself, and is then not kept.
        size: bytes of a thing.
    """

    def __init__(self, limit: int, size: Callable[[T], int]) -> None:
        self.limit, self.size = limit, size
        self._kept: OrderedDict[Hashable, T] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable) -> T | None:
        with _LOCK:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: Hashable, thing: T) -> None:
        with _LOCK:
            if key not in self._kept:  # else another thread was faster
                self._kept[key] = thing
                self._bytes += self.size(thing)
            while self._bytes > self.limit:
                self._bytes -= self.size(self._kept.popitem(last=False)[1])


# ----------------------------------------------------------------------------------------------------

MAX_PIXELS = 89_478_485  # Pillow's own warning threshold: beyond it an image is taken for a decompression bomb
FROM_STRANGERS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # formats of which no reader runs a program or fetches a file
CROP_SHARE = (0.01, 0.2)  # of a picture's area, that a `Crop` shows


@dataclass(frozen=True)
class Crop:
    """A small random part of an image file at the size of the whole: the corrupted image of mDPO (arXiv:2406.11839).

    The part has 1 to 20 % of the area and the picture's own proportions. Being as large as the picture, it takes as
    many positions in the prompt.

    Args:
        seed: of the draw. The same seed cuts the same part.
    """

    path: Path
    seed: str

    def open(self) -> Image.Image:
        """The part, in RGB. Raises DataError as `open_image` does."""
        image, rng = open_image(self.path), random.Random(self.seed)
        scale = rng.uniform(*CROP_SHARE) ** 0.5
        width, height = (max(1, round(side * scale)) for side in image.size)
        left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
        part = (left, top, left + width, top + height)
        return image.resize(image.size, Image.Resampling.BICUBIC, box=part)


@dataclass(frozen=True)
class Held:
    """A picture in memory, known by what it shows: equal pictures are equal, so that questions on them share it.

    Args:
        key: of its pixels.
        image: in RGB.
    """

    key: str
    image: Image.Image = field(compare=False, repr=False)

    @staticmethod
    def of(image: Image.Image) -> Held:
        """The picture in RGB, by Pillow's own conversion as `open_image` has it."""
        rgb = image.convert("RGB")
        return Held(hashlib.sha256(b"%d %d " % rgb.size + rgb.tobytes()).hexdigest(), rgb)

    def open(self) -> Image.Image:
        return self.image


@dataclass(frozen=True)
class Encoded:
    """An image file's bytes, as tables of questions hold them; equal bytes are equal.

    Args:
        name: of it in errors.
    """

    data: bytes = field(repr=False)
    name: str = field(compare=False)

    def open(self) -> Image.Image:
        """Decoded, in RGB. Raises DataError as `open_image` does."""
        return _opened(BytesIO(self.data), _decoded, self.name)


Shown = Path | Crop | Held | Encoded  # can be recognised, so that what is asked about one is asked together
Picture = Shown | Image.Image  # or one in memory, as it is


def open_image(path: Path) -> Image.Image:
    """Decode an image file to RGB by Pillow's own conversion, as the original programs do.

    Transparency is dropped, of an animation the first frame is taken, and EXIF rotation is left alone.

    Raises:
        DataError: what is wrong with the file, by name.
    """
    return _opened(path, _decoded, str(path))


def image_from_bytes(data: bytes, max_pixels: int, check: Callable[[int, int], None]) -> Image.Image:
    """Decode an image that a stranger sent, to RGB as `open_image` does; of the usual formats only.

    Args:
        check: of width and height, before anything is decoded; what it raises goes on.

    Raises:
        DataError: what is wrong with it.
    """

    fix = f"Send a PNG, JPEG, WebP, GIF or BMP of at most {max_pixels:,} pixels."
    try:
        with Image.open(BytesIO(data), formats=FROM_STRANGERS) as image:
            if image.width * image.height <= max_pixels:  # not by Pillow's warning, whose filter threads share
                check(image.width, image.height)
                return image.convert("RGB")
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError("The image is none of a known format.", fix) from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        pass
    except Exception:  # Pillow's readers raise errors of many kinds for broken bytes
        raise DataError("The image cannot be decoded.", fix) from None
    raise DataError("The image has too many pixels.", fix)


def _decoded(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def _size(image: Image.Image) -> tuple[int, int]:
    return image.size


def _opened(file: Path | BytesIO, use: Callable[[Image.Image], T], name: str) -> T:
    """What `use` makes of an opened file, which is closed again; errors call it `name`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Palette images with transparency: their alpha is not wanted.
            warnings.filterwarnings("ignore", "Palette images with Transparency", UserWarning)
            with Image.open(file) as image:
                return use(image)
    except FileNotFoundError:
        raise DataError(f"The image {name} does not exist.", "Check the image folder.") from None
    except IsADirectoryError:
        raise DataError(f"The image {name} is a folder.", "Give the path of a file.") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(f"The image {name} has more than {MAX_PIXELS:,} pixels.", "Scale it down.") from None
    except UnidentifiedImageError:
        raise DataError(f"{name} is not an image file.", "Download it again.") from None
    except Exception as error:  # Pillow's readers raise errors of many kinds for broken bytes
        raise DataError(f"The image {name} cannot be decoded: {error}.", "Download or re-encode it.") from None


def pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    """Lay an image in the middle of a square canvas, half a pixel up or left where it does not divide evenly.

    The original's `expand2square`. Pillow's `ImageOps.pad` rounds the other way for every second odd remainder.
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), color)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


class ImageLoader:
    """Pixel values of images through a model's image processor, those of the most recent files kept in memory.

    Threads may share one.

    Args:
        image_processor: transformers image processor of the model.
        aspect_ratio: "pad" lays each picture on a square canvas in the processor's mean colour first, as LLaVA-1.5
            does; anything else leaves resizing and cropping to the processor.
        cache_bytes: how much decoded data to keep.
    """

    def __init__(self, image_processor: Any, aspect_ratio: str = "", cache_bytes: int = 1 << 30) -> None:
        self.image_processor, self.aspect_ratio = image_processor, aspect_ratio
        self._kept: Recent[dict[str, Tensor]] = Recent(cache_bytes, nbytes)

    def __call__(self, image: Picture) -> Tensor:
        """Pixel values of one picture, float32: (3, H, W), or (tiles, 3, H, W) where the processor cuts images up."""
        return self._inputs(image)["pixel_values"]

    def batch(self, images: Sequence[Picture]) -> dict[str, Tensor]:
        """What a model takes for some images, in order: pixel_values (I, 3, H, W), or (I, most tiles, 3, H, W) with
        image_sizes (I, 2), the heights and widths that say how many tiles of each count."""
        return stack([self._inputs(image) for image in images])

    def size(self, image: Picture) -> tuple[int, int]:
        """Height and width of the picture that the processor is given; of a file only the head is read."""
        if isinstance(image, Encoded):
            width, height = _opened(BytesIO(image.data), _size, image.name)
        elif isinstance(image, (Held, Image.Image)):
            width, height = (image.image if isinstance(image, Held) else image).size
        else:
            path = Path(image.path if isinstance(image, Crop) else image)
            width, height = _opened(path, _size, str(path))
        return (max(width, height),) * 2 if self.aspect_ratio == "pad" else (height, width)

    def seen(self, image: Picture) -> Image.Image:
        """A picture as the model is given it: laid on a square or cut, and scaled; not of models with tiles.

        Raises:
            DataError: as `preprocess` does.
        """
        pixels = self._inputs(image)["pixel_values"]
        mean, std = (
            torch.tensor(getattr(self.image_processor, name))[:, None, None] for name in ("image_mean", "image_std")
        )
        whole = (255 * (pixels * std + mean)).round().clamp(0, 255).to(torch.uint8)
        return Image.fromarray(whole.permute(1, 2, 0).numpy())

    def preprocess(self, images: Sequence[Image.Image], who: str = "An image") -> Tensor:
        """Pixel values of RGB images, (n, 3, H, W) float32.

        Raises:
            DataError: an image is so long and thin that its square canvas, or its long side once the short one has the
                model's size, would have more than MAX_PIXELS pixels.
        """
        return pad_sequence([self._process(image, who)["pixel_values"] for image in images], batch_first=True)

    def check_shape(self, width: int, height: int, who: str = "The image") -> None:
        """Raises DataError as `preprocess` does."""
        target = self.image_processor.size.get("shortest_edge") or 0
        short, long = sorted((width, height))
        if (long * long if self.aspect_ratio == "pad" else target * target * long // short) > MAX_PIXELS:
            raise DataError(f"{who} is too long and thin: {width} x {height} pixels.", "Crop it.")

    def _inputs(self, image: Picture) -> dict[str, Tensor]:
        if isinstance(image, Image.Image):
            return self._process(image.convert("RGB"), "An image")
        key = image.key if isinstance(image, Held) else image  # a memory of pixel values need not hold the picture
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        opened = open_image(Path(image)) if isinstance(image, (str, Path)) else image.open()
        inputs = self._process(opened, _who(image))
        self._kept.put(key, inputs)
        return inputs

    def _process(self, image: Image.Image, who: str) -> dict[str, Tensor]:
        self.check_shape(*image.size, who)
        if self.aspect_ratio == "pad":
            red, green, blue = (int(255 * channel) for channel in self.image_processor.image_mean)
            image = pad_to_square(image, (red, green, blue))
        made = self.image_processor(images=[image], return_tensors="pt")
        inputs = {name: made[name][0] for name in self.image_processor.model_input_names}
        return inputs | {"pixel_values": inputs["pixel_values"].to(torch.float32)}


def _who(image: Shown) -> str:
    """A picture in errors."""
    if isinstance(image, Held):
        return "An image"
    return f"The image {image.path if isinstance(image, Crop) else image.name if isinstance(image, Encoded) else image}"


def stack(each: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What a model takes for some images, from what it takes for each of them."""
    return {name: pad_sequence([one[name] for one in each], batch_first=True) for name in each[0]}


def nbytes(inputs: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in inputs.values())


# ----------------------------------------------------------------------------------------------------
# Work that is done ahead, by threads or processes: reading and decoding images must not keep the model waiting.

A = TypeVar("A")
B = TypeVar("B")
WORKERS = max(1, min(8, (os.cpu_count() or 1) - 1))  # Pillow and numpy let other threads run while they work


def ahead(
    function: Callable[[A], B], inputs: Iterable[A], pool: Executor | None = None, window: int = WORKERS
) -> Iterator[B]:
    """`map`, in order, with the next few results already under way. An exception is raised where its result is due.

    Args:
        pool: who does the work, and is shut down at the end; without it, threads.
        window: how many inputs are taken ahead of the result that is due.
    """
    waiting: deque[Future[B]] = deque()
    pool = pool or ThreadPoolExecutor(WORKERS)
    try:
        for one in inputs:
            waiting.append(pool.submit(function, one))
            if len(waiting) > window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
