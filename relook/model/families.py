"""The families of models that can carry a post decoder, and all that differs between them outside the model classes.

A new one needs its three classes in `modeling_relook` and an entry here; docs/trunks.md says what else to think of.
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
class Trunk:
    """A family of models.

    Args:
        config, model: transformers' classes.
        relook_config, relook_model: the same with a post decoder.
        positions: from a model to the number of positions that one image takes; where that depends on the image, to a
            function of its size.
        tiles: from a model's config and an image's size to the number of rows of pixels that the image is cut into.
        pads_to_square: `do_pad` of the family's image processor means a square canvas, which relook lays itself.
        projects_rows: the projector's output of an image's features, as it is, stands at its positions.
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
    """What the tower gives for one row of pixels: its patches, and the class token where that is kept."""
    vision = config.vision_config
    whole = 0 if config.vision_feature_select_strategy == "default" else 1
    return int((vision.image_size // vision.patch_size) ** 2 + whole)


def _llava_positions(core: Any) -> int:
    return _features_per_row(core.config)


def _llava_next_tiles(config: Any, size: Size) -> int:
    return int(image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size))


def _llava_next_positions(core: Any) -> Callable[[Size], int]:
    """The model's own packing of tiles, with its unpadding and line ends, of features that are one number wide."""
    config = core.config

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


TRUNKS = {
    "llava": Trunk(
        LlavaConfig,
        LlavaForConditionalGeneration,
        RelookLlavaConfig,
        RelookLlavaForConditionalGeneration,
        _llava_positions,
        lambda config, size: 1,
        pads_to_square=True,
        projects_rows=True,
    ),
    "llava_next": Trunk(
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
MODEL_TYPES = {**TRUNKS, **{trunk.relook_config.model_type: trunk for trunk in TRUNKS.values()}}

for trunk in TRUNKS.values():
    AutoConfig.register(trunk.relook_config.model_type, trunk.relook_config, exist_ok=True)
    AutoModelForImageTextToText.register(trunk.relook_config, trunk.relook_model, exist_ok=True)


def trunk_of(config: Any) -> Trunk:
    """The family of a model, with or without a post decoder, by its config."""
    return MODEL_TYPES[config.model_type]


def has_post_decoder(config: Any) -> bool:
    return isinstance(config, PostDecoderConfig)


def with_post_decoder(config: Any, settings: dict[str, Any]) -> Any:
    """The config of the same model with a post decoder of these settings."""
    values = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "architectures")}
    return trunk_of(config).relook_config(**{**values, "post_decoder": settings})


def feature_rows(config: Any, size: Size) -> int:
    """M of the vision features (M, V) of an image of this size: those of all its tiles."""
    return trunk_of(config).tiles(config, size) * _features_per_row(config)


def feature_size(config: Any) -> int:
    """V of the vision features: the tower's width, for each of its layers that the model reads."""
    layers = config.vision_feature_layer
    return int(config.vision_config.hidden_size * (len(layers) if isinstance(layers, list) else 1))
