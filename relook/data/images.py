"""Image files to pixel values, with the checks that untrusted bytes need."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from relook.errors import DataError

MAX_PIXELS = 89_478_485  # Pillow's own warning threshold: beyond it an image is taken for a decompression bomb


def open_image(path: Path) -> Image.Image:
    """Decode an image file to RGB, or raise a DataError that says what is wrong with it.

    Transparency is laid on white, of an animation the first frame is taken, and EXIF rotation is left alone, as in the
    original programs.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                    rgba = image.convert("RGBA")
                    canvas = Image.new("RGBA", rgba.size, "white")
                    return Image.alpha_composite(canvas, rgba).convert("RGB")
                return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"The image {path} does not exist.", "Check the image folder.") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DataError(f"The image {path} has more than {MAX_PIXELS:,} pixels.", "Scale it down.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"The image {path} cannot be decoded: {error}.", "Download or re-encode it.") from None


class ImageLoader:
    """Pixel values of image files through a model's image processor, the most recent ones kept in memory.

    Args:
        image_processor: transformers image processor of the model.
        aspect_ratio: "pad" lays each picture on a square canvas in the processor's mean colour first, as LLaVA-1.5
            does; anything else leaves resizing and cropping to the processor.
        cache_bytes: how much decoded data to keep.
    """

    def __init__(self, image_processor: Any, aspect_ratio: str = "", cache_bytes: int = 1 << 30) -> None:
        self.image_processor, self.aspect_ratio, self.cache_bytes = image_processor, aspect_ratio, cache_bytes
        self._kept: OrderedDict[Path, Tensor] = OrderedDict()
        self._bytes = 0

    def __call__(self, path: Path) -> Tensor:
        """Pixel values of one file, (3, H, W) float32."""
        if path in self._kept:
            self._kept.move_to_end(path)
            return self._kept[path]
        pixels = self.preprocess([open_image(path)])[0]
        self._kept[path] = pixels
        self._bytes += pixels.nbytes
        while self._bytes > self.cache_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return pixels

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        """RGB images to (n, 3, H, W) float32."""
        if self.aspect_ratio == "pad":
            mean = tuple(int(255 * channel) for channel in self.image_processor.image_mean)
            images = [
                ImageOps.pad(image, (max(image.size),) * 2, color=mean) if image.size[0] != image.size[1] else image
                for image in images
            ]
        pixels: Tensor = self.image_processor(images=list(images), return_tensors="pt")["pixel_values"]
        return pixels.to(torch.float32)
