"""What a trunk cache depends on, and so its name; what sets others in the same folder apart from it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import PIL
import torch
import transformers

from relook.console import readable_size
from relook.data.encode import Example
from relook.data.images import ImageLoader
from relook.errors import DataError
from relook.files import file_hash, read_json, text_hash
from relook.model.load import model_hash, tower_of
from relook.train.policy import Policy

FORMAT = 4  # of the files, of the numbers by which `plan` cuts them, and of `as_rgb`; part of the key
INDEX_FILE = "index.json"


def made_from(
    model: Path,
    vision_tower: Path | str | None,
    policy: Policy,
    weights: torch.dtype,
    examples: Sequence[Example],
    images: ImageLoader,
    adapter: str = "",
    bits: str = "16",
) -> dict[str, str]:
    """Everything that determines what the trunk says: weights, tokens, pictures by content, precision, versions.

    An untrained post decoder changes no logit, so the reference log-probs depend on nothing else.

    Args:
        model: the folder that the policy was loaded from, with this vision tower where it has none of its own.
        weights: dtype of the trunk in memory.
        adapter: the change that was laid on it.
        bits: how its linear layers are quantised.
    """
    tower = tower_of(model, vision_tower, adapter or None)
    return {
        "format": str(FORMAT),
        "model": model_hash(model),
        "adapter": model_hash(Path(adapter)) if adapter else "",
        "bits": bits,
        "vision tower": model_hash(tower) if tower else "",
        "tokens": _tokens_hash(tuple(examples)),
        "images": images_hash(examples),
        "preprocessing": text_hash(repr(images.image_processor), images.aspect_ratio),
        "precision": f"{policy.dtype}, weights {weights}",
        "trunk pass": policy.trunk_pass,
        "positions": "all" if policy.keeps_everything else "supervised",
        "device": policy.device.type,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, Pillow {PIL.__version__}",
    }


def images_hash(examples: Sequence[Example]) -> str:
    """Hash the examples' image files, in their order."""
    pictures = hashlib.sha256()
    for example in examples:
        for image in example.images:
            pictures.update(file_hash(image).encode())
    return pictures.hexdigest()


@lru_cache(maxsize=2)  # the runs of a sweep share their examples
def _tokens_hash(examples: tuple[Example, ...]) -> str:
    data = hashlib.sha256()
    for example in examples:
        data.update(repr(example.tree).encode())
        data.update(f"{len(example.images)};".encode())
    return data.hexdigest()


def key_of(source: dict[str, str]) -> str:
    return text_hash(*(f"{name}={value}" for name, value in source.items()))


def others(folder: Path, key: str, source: dict[str, str]) -> list[str]:
    """A line for each cache in a folder that was made from something else: its size, and what differs."""
    lines = []
    for index in sorted(folder.glob(f"*/{INDEX_FILE}")):
        if index.parent.name == key:
            continue
        try:
            old = read_json(index)["made_from"]
            differs = ", ".join(name for name in source if old.get(name) != source[name])
        except (DataError, KeyError, TypeError, AttributeError):
            differs = "nobody knows what"
        size = readable_size(sum(file.stat().st_size for file in index.parent.iterdir()))
        lines.append(f"{index.parent} ({size}) does not serve here (it differs in {differs}): left as it is")
    return lines
