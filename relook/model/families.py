"""Model families that can carry a post decoder, and everything that differs between them outside the model classes.

A new family needs its three classes in `modeling_relook` and an entry here; docs/trunks.md lists what else to consider.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from relook.model.modeling_relook import (
    PostDecoderConfig,
    RelookLlavaConfig,
    RelookLlavaForConditionalGeneration,
    RelookLlavaNextConfig,
    RelookLlavaNextForConditionalGeneration,
)

Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Family:
    """Classes and image layout of one family of models.

    Args:
        config, model: transformers' classes.
        relook_config, relook_model: the same with a post decoder.
        positions: maps a model to the number of positions that one image takes. Where that depends on the image, it
            returns a function of the image's size.
        tiles: maps a model's config and an image's size to the number of tiles (rows of pixels) the image is cut into.
        pads_to_square: `do_pad` of the family's image processor means padding to a square, which relook does itself.
        projects_rows: the projected features of an image fill its positions unchanged.
    """

    config: Any
    model: Any
    relook_config: Any
    relook_model: Any
    positions: Callable[[Any], int | Callable[[Size], int]]
    tiles: Callable[[Any, Size], int]
    pads_to_square: bool
    projects_rows: bool


def _features_per_row(config: Any) -> int:
    """Count the vision features of one row of pixels: its patches, plus the class token if that is kept."""
    vision = config.vision_config
    class_token = 0 if config.vision_feature_select_strategy == "default" else 1
    return int((vision.image_size // vision.patch_size) ** 2 + class_token)


def _llava_positions(core: Any) -> int:
    return _features_per_row(core.config)


def _llava_next_tiles(config: Any, size: Size) -> int:
    return int(image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size))


def _llava_next_positions(core: Any) -> Callable[[Size], int]:
    """Build a function that counts an image's positions.

    It runs the model's own tile packing, with unpadding and line ends, on dummy features of width 1.
    """
    config = core.config

    # Images of a dataset share few sizes, and each new size runs the packing.
    @cache
    def positions(size: Size) -> int:
        packed, _ = core.model.pack_image_features(
            [torch.zeros(_llava_next_tiles(config, size), _features_per_row(config), 1)],
            [size],
            config.vision_feature_select_strategy,
            torch.zeros(1),
        )
        return len(packed[0])

    return positions


FAMILIES = {
    "llava": Family(
        LlavaConfig,
        LlavaForConditionalGeneration,
        RelookLlavaConfig,
        RelookLlavaForConditionalGeneration,
        _llava_positions,
        lambda config, size: 1,
        pads_to_square=True,
        projects_rows=True,
    ),
    "llava_next": Family(
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        RelookLlavaNextConfig,
        RelookLlavaNextForConditionalGeneration,
        _llava_next_positions,
        _llava_next_tiles,
        pads_to_square=False,
        projects_rows=False,
    ),
}
# By model_type of a config: each family's own, and that of the same model with a post decoder.
MODEL_TYPES = {**FAMILIES, **{trunk.relook_config.model_type: trunk for trunk in FAMILIES.values()}}

# So that transformers' Auto classes, and pipelines built on them, know the folders that relook writes.
for trunk in FAMILIES.values():
    AutoConfig.register(trunk.relook_config.model_type, trunk.relook_config, exist_ok=True)
    AutoModelForImageTextToText.register(trunk.relook_config, trunk.relook_model, exist_ok=True)


def family_of(config: Any) -> Family:
    """Return the family of a model, with or without a post decoder, by its config."""
    return MODEL_TYPES[config.model_type]


def has_post_decoder(config: Any) -> bool:
    return isinstance(config, PostDecoderConfig)


def with_post_decoder(config: Any, settings: dict[str, Any]) -> Any:
    """Return the config of the same model with a post decoder of these settings."""
    # The new class names itself; these two keys would contradict it.
    values = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
    return family_of(config).relook_config(**{**values, "post_decoder": settings})


def vision_feature_count(config: Any, size: Size) -> int:
    """Compute M of the vision features (M, V) of an image of this size, over all its tiles."""
    return family_of(config).tiles(config, size) * _features_per_row(config)


def vision_feature_width(config: Any) -> int:
    """Compute V of the vision features: the tower's width times the number of its layers that the model reads."""
    # Features of several layers are concatenated (see `selected_features`).
    layers = config.vision_feature_layer
    return int(config.vision_config.hidden_size * (len(layers) if isinstance(layers, list) else 1))
