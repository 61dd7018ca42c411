"""Image decoding and preprocessing to pixel values, with the checks that untrusted bytes need."""

from __future__ import annotations

import hashlib
import math
import os
import random
import threading
import warnings
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from PIL import Image, UnidentifiedImageError

from relook.data.image_limits import check_structure
from relook.data.rgb import as_rgb, upright
from relook.errors import DataError

if TYPE_CHECKING:  # reports and checks of data decode images without torch, whose import takes seconds
    from torch import Tensor

# ----------------------------------------------------------------------------------------------------
# Least-recently-used cache, limited by a number of bytes.

T = TypeVar("T")
_LOCK = threading.Lock()  # for all caches; module-level, so that an object holding a cache can be pickled


class RecentCache(Generic[T]):
    """Least-recently-used cache for values that are costly to recompute. Threads may share one.

    Args:
        limit: most bytes that the cache holds. A value larger than this is not kept.
        size: function that returns the bytes of a value.
    """

    def __init__(self, limit: int, size: Callable[[T], int]) -> None:
        self.limit, self.size = limit, size
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._bytes = 0

    def get(self, key: Hashable) -> T | None:
        with _LOCK:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: Hashable, value: T) -> None:
        with _LOCK:
            if key not in self._values:  # otherwise another thread has stored it first
                self._values[key] = value
                self._bytes += self.size(value)
            # Evict the least recently used values until the rest fits.
            while self._bytes > self.limit:
                self._bytes -= self.size(self._values.popitem(last=False)[1])


# ----------------------------------------------------------------------------------------------------

MAX_PIXELS = 89_478_485  # Pillow's own warning threshold: beyond it an image is taken for a decompression bomb
UNTRUSTED_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # formats whose readers run no program and fetch no file
GRID = "image_grid_thw"  # model input that tells the flat patches of images apart
MAX_ASPECT = 200  # of the processors of such models
CROP_SHARE = (0.01, 0.2)  # share of a picture's area that a `RandomCrop` shows


@dataclass(frozen=True)
class RandomCrop:
    """Small random crop of an image file, resized to the whole image: the corrupted image of mDPO (arXiv:2406.11839).

    The crop covers 1 to 20 % of the area and has the picture's aspect ratio. Being as large as the picture, it takes
    as many positions in the prompt.

    Args:
        seed: seed of the draw. The same seed gives the same crop.
    """

    path: Path
    seed: str

    def open(self) -> Image.Image:
        """Decode the file and return the crop in RGB. Raises DataError as `open_image` does."""
        image, rng = open_image(self.path), random.Random(self.seed)
        scale = rng.uniform(*CROP_SHARE) ** 0.5  # of each side: the share is one of the area
        width, height = (max(1, round(side * scale)) for side in image.size)
        x, y = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
        return image.resize(image.size, Image.Resampling.BICUBIC, box=(x, y, x + width, y + height))


@dataclass(frozen=True)
class MemoryImage:
    """Picture in memory, compared by its pixels, so that questions on equal pictures share one.

    Args:
        key: hash of its size and pixels.
        image: the picture in RGB.
    """

    key: str
    image: Image.Image = field(compare=False, repr=False)

    @staticmethod
    def of(image: Image.Image) -> MemoryImage:
        """Build one from a picture, in RGB as `open_image` returns it. Raises ValueError as `as_rgb` does."""
        rgb = as_rgb(image)
        return MemoryImage(hashlib.sha256(b"%d %d " % rgb.size + rgb.tobytes()).hexdigest(), rgb)

    def open(self) -> Image.Image:
        return self.image


@dataclass(frozen=True)
class EncodedImage:
    """Bytes of an image file, as tables of questions hold them; compared by these bytes.

    Args:
        name: name of the image in errors.
    """

    data: bytes = field(repr=False)
    name: str = field(compare=False)

    def open(self) -> Image.Image:
        """Decode the bytes to RGB. Raises DataError as `open_image` does."""
        return _open(BytesIO(self.data), as_rgb, self.name)


Shown = Path | RandomCrop | MemoryImage | EncodedImage  # hashable, so that questions on the same image can be grouped
ImageSource = Shown | Image.Image  # or any Pillow image in memory


def open_image(path: str | Path) -> Image.Image:
    """Decode an image file to RGB as the original programs do: see `as_rgb`. Of an animation, take the first frame.

    Raises:
        DataError: the file cannot be decoded; the message names it and says why.
    """
    path = Path(path)
    return _open(path, as_rgb, str(path))


def image_from_bytes(data: bytes, max_pixels: int, check: Callable[[int, int], None]) -> Image.Image:
    """Decode an untrusted image of a common format to RGB, upright as viewers show it.

    Args:
        check: called with width and height before anything is decoded; its exceptions are passed on.

    Raises:
        DataError: the image cannot be decoded or has too many pixels.
    """

    fix = f"Send a PNG, JPEG, WebP, GIF or BMP of at most {max_pixels:,} pixels."
    check_structure(data, max_pixels)
    try:
        with Image.open(BytesIO(data), formats=UNTRUSTED_FORMATS) as image:
            # Not by Pillow's warning, as `_open` does: threads share the warning filters.
            if image.width * image.height <= max_pixels:
                check(image.width, image.height)
                return upright(image)
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError("The image is in no known format.", fix) from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        pass
    except Exception:  # Pillow's readers raise errors of many kinds for broken bytes
        raise DataError("The image cannot be decoded.", fix) from None
    raise DataError("The image has too many pixels.", fix)


def _size(image: Image.Image) -> tuple[int, int]:
    return image.size


def _open(file: Path | BytesIO, use: Callable[[Image.Image], T], name: str) -> T:
    """Open an image file, return `use` of it, and close it; errors call it `name`."""
    try:
        with warnings.catch_warnings():
            # Pillow refuses an image only beyond twice its threshold, and warns below that.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
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
    """Paste an image in the middle of a square canvas, half a pixel up or left if the margin is odd.

    Matches the original's `expand2square`. Pillow's `ImageOps.pad` rounds the other way for every second odd margin.
    """
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), color)
    canvas.paste(image, ((side - width) // 2, (side - height) // 2))
    return canvas


class ImageLoader:
    """Loader of pixel values through a model's image processor, with a cache of the most recent images.

    Threads may share one.

    Args:
        image_processor: transformers image processor of the model.
        aspect_ratio: "pad" first pads each picture to a square in the processor's mean colour, as LLaVA-1.5 does;
            anything else leaves resizing and cropping to the processor.
        positions: the number of positions that a picture takes, or a function of its height and width.
        cache_bytes: most bytes of pixel values to cache.
    """

    def __init__(
        self,
        image_processor: Any,
        aspect_ratio: str = "",
        positions: int | Callable[[tuple[int, int]], int] = 0,
        cache_bytes: int = 1 << 30,
    ) -> None:
        self.image_processor, self.positions, self.aspect_ratio = image_processor, positions, aspect_ratio
        self.input_names: Collection[str] = image_processor.model_input_names
        self.flat = GRID in image_processor.model_input_names  # pixels are patches, without an axis of images
        self._cache: RecentCache[dict[str, Tensor]] = RecentCache(cache_bytes, nbytes)

    def __call__(self, image: ImageSource) -> Tensor:
        """Return one picture's pixel values, float32: (3, H, W), (tiles, 3, H, W) or flat patches (patches, values)."""
        pixels = self.inputs(image)["pixel_values"]
        return pixels if len(pixels) > 1 else pixels[0]

    def batch(self, images: Sequence[ImageSource]) -> dict[str, Tensor]:
        """Return the model inputs of some images, in order.

        These are pixel_values (I, 3, H, W), or (I, most tiles, 3, H, W) with image_sizes (I, 2): the heights and
        widths, which tell how many tiles of each image are real; or the tiles of all images, (tiles, 3, H, W), or their
        patches, (patches, values), with image_grid_thw (I, 3): their counts in time, height and width.
        """
        return stack([self.inputs(image) for image in images])

    def size(self, image: ImageSource) -> tuple[int, int]:
        """Return height and width of the picture that the processor gets; of a file, only the header is read."""
        # Pillow decodes when pixels are asked for, not when a file is opened.
        if isinstance(image, EncodedImage):
            width, height = _open(BytesIO(image.data), _size, image.name)
        elif isinstance(image, (MemoryImage, Image.Image)):
            width, height = (image.image if isinstance(image, MemoryImage) else image).size
        else:
            path = Path(image.path if isinstance(image, RandomCrop) else image)
            width, height = _open(path, _size, str(path))
        return (max(width, height),) * 2 if self.aspect_ratio == "pad" else (height, width)

    def position_count(self, size: tuple[int, int]) -> int:
        """Return the number of positions that a picture of a height and width takes."""
        return self.positions if isinstance(self.positions, int) else self.positions(size)

    def seen(self, image: ImageSource) -> Image.Image:
        """Return a picture as the model sees it: padded or cropped, and resized. Models with tiles are not supported.

        Models of patches see all of a picture; it is returned as it is.

        Raises:
            DataError: as `preprocess` does.
        """
        if self.flat:  # the patches of the resized picture
            _, height, width = (self.inputs(image)[GRID][0] * self.image_processor.patch_size).tolist()
            opened = image if isinstance(image, Image.Image) else _opened(image)
            return as_rgb(opened).resize((width, height), Image.Resampling.BICUBIC)
        pixels = self(image)
        mean, std = (
            pixels.new_tensor(getattr(self.image_processor, name))[:, None, None]
            for name in ("image_mean", "image_std")
        )
        # Undo the normalisation: back to 8 bits per channel.
        pixels_8bit = (255 * (pixels * std + mean)).round().clamp(0, 255).byte()
        return Image.fromarray(pixels_8bit.permute(1, 2, 0).numpy())

    def preprocess(self, images: Sequence[Image.Image], subject: str = "An image") -> Tensor:
        """Compute the pixel values of images, (n, 3, H, W) float32.

        Raises:
            DataError: an image is so long and thin that its square canvas, or the image with its short side at the
                model's size, would have more than MAX_PIXELS pixels.
        """
        return stack([self._process(image, subject) for image in images])["pixel_values"]

    def check_shape(self, width: int, height: int, subject: str = "The image") -> None:
        """Check that an image is not too long and thin. Raises DataError as `preprocess` does."""
        short, long = sorted((width, height))
        if self.flat:  # the processor keeps the number of pixels within bounds
            is_too_long = long > MAX_ASPECT * short
        else:
            # Padding makes a square of the long side; the processor scales the short side to its target.
            target = (self.image_processor.size or {}).get("shortest_edge") or 0
            pixels = long * long if self.aspect_ratio == "pad" else target * target * long // short
            is_too_long = pixels > MAX_PIXELS
        if is_too_long:
            raise DataError(f"{subject} is too long and thin: {width} x {height} pixels.", "Crop it.")

    def inputs(self, image: ImageSource) -> dict[str, Tensor]:
        """Return the model inputs of one picture, each with the axis along which those of pictures are concatenated."""
        if isinstance(image, Image.Image):
            return self._process(image, "An image")
        # The hash is key enough: a MemoryImage as key would keep its whole picture in memory.
        key = image.key if isinstance(image, MemoryImage) else image
        cached = self._cache.get(key)
        if cached is not None:
            return cached
        inputs = self._process(_opened(image), _subject(image))
        self._cache.put(key, inputs)
        return inputs

    def _process(self, image: Image.Image, subject: str) -> dict[str, Tensor]:
        self.check_shape(*image.size, subject)  # before anything of that size is allocated
        try:
            image = as_rgb(image)
        except ValueError as error:
            raise DataError(f"{subject} cannot be read: {error}.", "Convert it to 8 bits a channel.") from None
        if self.aspect_ratio == "pad":
            # Truncated, not rounded, as in LLaVA.
            red, green, blue = (int(255 * channel) for channel in self.image_processor.image_mean)
            image = pad_to_square(image, (red, green, blue))
        processed = self.image_processor(images=[image], return_tensors="pt")
        inputs = {name: processed[name] for name in self.input_names if name in processed}
        return inputs | {"pixel_values": inputs["pixel_values"].float()}


def _opened(image: Shown) -> Image.Image:
    return open_image(Path(image)) if isinstance(image, (str, Path)) else image.open()


def _subject(image: Shown) -> str:
    """Return the subject of an error message about a picture."""
    if isinstance(image, MemoryImage):
        return "An image"
    name = image.path if isinstance(image, RandomCrop) else image.name if isinstance(image, EncodedImage) else image
    return f"The image {name}"


def stack(inputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the inputs of single images to a batch, with zeros up to the most tiles, or the largest picture."""
    import torch

    batch = {}
    for name in inputs[0] if inputs else ():
        tensors = [image[name] for image in inputs]
        # (I, most tiles, ...), or (I, ...): of each axis but the first, the largest size.
        sizes = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
        batch[name] = torch.cat([_padded(tensor, sizes) for tensor in tensors])
    return batch


def row_count(pixel_values: Tensor) -> int:
    """Return the number of rows that the pixels of one image are: its tiles, in (1, tiles, 3, H, W) too, or patches."""
    return math.prod(pixel_values.shape[:-3]) if pixel_values.ndim > 3 else len(pixel_values)


def _padded(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    from torch.nn.functional import pad

    missing = [size - have for size, have in zip(sizes, tensor.shape[1:], strict=True)]
    # `pad` takes the last axis first, each with what is missing before and behind.
    return pad(tensor, [n for size in reversed(missing) for n in (0, size)]) if any(missing) else tensor


def nbytes(inputs: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in inputs.values())


# ----------------------------------------------------------------------------------------------------
# Prefetching with threads or processes: the model must not wait for images to be read and decoded.

A = TypeVar("A")
B = TypeVar("B")
# Those that this process may use, which in a container are often few of a machine's.
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
WORKERS = max(1, min(8, _CORES - 1))  # Pillow and numpy release the GIL while they work


def prefetch_map(
    function: Callable[[A], B], inputs: Iterable[A], pool: Executor | None = None, window: int = WORKERS
) -> Iterator[B]:
    """Map in order, with the next few results prefetched. An exception is raised when its result is due.

    Args:
        pool: executor that does the work and is shut down at the end; the default is a pool of threads.
        window: number of inputs submitted ahead of the result that is due.
    """
    waiting: deque[Future[B]] = deque()  # in the order of the inputs: the left one is due
    pool = pool or ThreadPoolExecutor(WORKERS)
    try:
        for value in inputs:
            waiting.append(pool.submit(function, value))
            # Submitting no further than this bounds the memory that finished results take.
            if len(waiting) > window:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)  # also if the consumer stops early
