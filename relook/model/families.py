"""Model families, and everything that differs between them outside of transformers' common interfaces.

A new family usually needs no code: what is not said here is found by these interfaces, and `check_family` compares a
model of an untested family with transformers where it is loaded. docs/trunks.md lists what to consider.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from relook.errors import CheckpointError
from relook.model import modeling_relook
from relook.model.modeling_relook import PostDecoderConfig, reads_tower, tile_count

Size = tuple[int, int]  # height, width
RELOOK = "relook_"  # begins the model_type of a config with a post decoder
# Parts of a base model by the names that families give them: those of transformers' `get_encoder` and `get_decoder`.
# Nothing in transformers says which part lies between the two.
TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower")
LANGUAGE_MODELS = ("language_model", "text_model")
CONNECTORS = (
    *("multi_modal_projector", "visual.merger", "connector", "aligner", "projector", "vision_projection"),
    *("visual_embeddings_table", "resampler_model"),
)


@dataclass(frozen=True)
class Family:
    """Classes and image layout of one family of models.

    Args:
        model_type: of the family's configs.
        positions: maps a model to the number of positions that one image takes. Where that depends on the image, it
            returns a function of the image's size. None: the model's processor counts them.
        pads_to_square: `do_pad` of the family's image processor means padding to a square, which relook does itself.
        projects_rows: the projected features of an image fill its positions unchanged.
        template: conversation template of its models; "chat" is the one that a processor brings along.
    """

    model_type: str
    positions: Callable[[Any], int | Callable[[Size], int]] | None = None
    pads_to_square: bool = False
    projects_rows: bool = False
    template: str = "chat"

    def __getattr__(self, name: str) -> Any:
        """Return a class: transformers' `config`, `base` or `model`; `relook_config` ... have a post decoder."""
        kinds = {"config": "Config", "base": "Model", "model": "ForConditionalGeneration"}
        if name.removeprefix(RELOOK) not in kinds:
            raise AttributeError(name)
        prefix = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[self.model_type].removesuffix("ForConditionalGeneration")
        class_name = prefix + kinds[name.removeprefix(RELOOK)]
        if name.startswith(RELOOK):
            return getattr(modeling_relook, f"Relook{class_name}")
        return getattr(transformers, class_name)


def _features_per_row(config: Any) -> int:
    """Count the vision features of one row of pixels: its patches, plus the class token if that is kept."""
    vision = config.vision_config
    class_token = 0 if config.vision_feature_select_strategy == "default" else 1
    return int((vision.image_size // vision.patch_size) ** 2 + class_token)


def _llava_next_positions(core: Any) -> Callable[[Size], int]:
    """Build a function that counts an image's positions.

    It runs the model's own tile packing, with unpadding and line ends, on dummy features of width 1.
    """
    config = core.config

    # Images of a dataset share few sizes, and each new size runs the packing.
    @cache
    def positions(size: Size) -> int:
        packed, _ = core.model.pack_image_features(
            [torch.zeros(tile_count(config, size), _features_per_row(config), 1)],
            [size],
            config.vision_feature_select_strategy,
            torch.zeros(1),
        )
        return len(packed[0])

    return positions


# Families that are tested (docs/trunks.md). Others are looked up by `find_family`.
_TESTED = (
    Family(
        "llava",
        lambda core: _features_per_row(core.config),
        pads_to_square=True,
        projects_rows=True,
        template="llava_hf",
    ),
    Family("llava_next", _llava_next_positions, template="llava_hf"),
    *map(Family, ("llava_onevision", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "glm4v", "internvl", "smolvlm", "gemma3")),
)
FAMILIES = {family.model_type: family for family in _TESTED}


@cache
def find_family(model_type: str) -> Family:
    """Return the family of a model type, with or without a post decoder.

    The Auto classes of transformers, and pipelines built on them, then know the folders that relook writes.

    Raises:
        KeyError: transformers has no such model of images and text, or only one without the common interfaces.
    """
    plain_type = model_type.removeprefix(RELOOK)
    family = FAMILIES.get(plain_type) or Family(plain_type)
    if not hasattr(family.base, "get_image_features"):
        raise KeyError(model_type)
    if plain_type != model_type:
        AutoConfig.register(family.relook_config.model_type, family.relook_config, exist_ok=True)
        AutoModelForImageTextToText.register(family.relook_config, family.relook_model, exist_ok=True)
    return family


for name in ("llava", "llava_next"):
    find_family(RELOOK + name)


def family_of(config: Any) -> Family:
    """Return the family of a model, with or without a post decoder, by its config."""
    return find_family(config.model_type)


def vision_tower(base: Any) -> nn.Module:
    """Return the vision tower of a base model."""
    return _part(base, TOWERS)


def language_model(base: Any) -> Any:
    """Return the language model of a base model, without lm_head."""
    return _part(base, LANGUAGE_MODELS)


def connector(base: Any) -> nn.Module:
    """Return the projector, merger or connector of a base model, from the tower's features to the language model."""
    return _part(base, CONNECTORS)


def _part(base: Any, paths: Sequence[str]) -> nn.Module:
    for path in paths:
        with suppress(AttributeError):
            module: nn.Module = attrgetter(path)(base)
            return module
    raise CheckpointError(f"A {base.config.model_type} has no {' or '.join(paths)}.", "Take another model.")


def is_tested(config: Any) -> bool:
    return family_of(config).model_type in FAMILIES


def attention_windows(text: Any) -> dict[str, int | None]:
    """Return how many positions each kind of layer of a language model sees, itself included; None sees all.

    Kinds are those of `layer_types` of its config, or "" where all layers are alike.
    """
    kinds = dict.fromkeys(getattr(text, "layer_types", None) or ("",))
    return {kind: None if kind == "full_attention" else getattr(text, "sliding_window", None) for kind in kinds}


def sees_ahead(config: Any) -> bool:
    """Return True if the positions of an image see each other both ways, as in Gemma 3."""
    return "token_type_ids" in inspect.signature(family_of(config).base.forward).parameters


def embeddings_name(tensors: Container[str]) -> str:
    """Return the name of the input embeddings among those of a model's tensors."""
    names = (f"model.{part}.embed_tokens.weight" for part in LANGUAGE_MODELS)
    return next((name for name in names if name in tensors), "")


def has_post_decoder(config: Any) -> bool:
    return isinstance(config, PostDecoderConfig)


def with_post_decoder(config: Any, settings: dict[str, Any] | None) -> Any:
    """Return the config of the same model with a post decoder of these settings, or without one for None."""
    # The new class names itself; these two keys would contradict it.
    own = ("model_type", "architectures", "post_decoder")
    values = {key: value for key, value in config.to_dict().items() if key not in own}
    plain_type = config.model_type.removeprefix(RELOOK)
    if settings is None:
        return find_family(plain_type).config(**values)
    return find_family(RELOOK + plain_type).relook_config(**values, post_decoder=settings)


def patches_per_feature(config: Any) -> int:
    """Return how many of the tower's patches a projector or merger makes one position of."""
    sides = (
        getattr(part, name, None)
        for part in (config.vision_config, config)
        for name in ("spatial_merge_size", "scale_factor", "downsample_factor")
    )
    side = next(filter(None, sides), 1 / getattr(config, "downsample_ratio", 1))
    return round(side**2)


def vision_feature_count(config: Any, size: Size, positions: int) -> int:
    """Compute M of the vision features (M, V) of an image of this size, which takes so many positions."""
    return tower_state_count(config, size, positions) if reads_tower(config) else positions


def tower_state_count(config: Any, size: Size, positions: int) -> int:
    """Compute M of the vision tower's states (M, V) of an image, over all its tiles; see `vision_feature_count`."""
    if family_of(config).positions is not None:
        return tile_count(config, size) * _features_per_row(config)
    return positions * patches_per_feature(config)


def image_features(rows: Iterable[Tensor], image_rows: Sequence[int] | None) -> list[Tensor]:
    """Return features by image, (positions, D) each, of features that may come by tile.

    Args:
        image_rows: rows of pixels of each image (`row_count`); None leaves the features as they are.
    """
    rows = list(rows)
    if image_rows is None or len(rows) == len(image_rows):
        return rows
    tiles = iter(rows)
    return [torch.cat([next(tiles) for _ in range(count)]) for count in image_rows]


def position_rows(image: Any, image_rows: Sequence[int] | None = None) -> list[Tensor]:
    """Return what the positions of each image get, (P, D); beside it, (P, n * D), what the first layers add, if any do.

    Args:
        image: outputs of `get_image_features`; Qwen3-VL's hold `deepstack_features`, of all images for each layer.
        image_rows: see `image_features`.
    """
    rows = image_features(image.pooler_output, image_rows)
    if layers := getattr(image, "deepstack_features", None):
        added = [layer if isinstance(layer, Tensor) else torch.cat(list(layer)) for layer in layers]
        rows = list(torch.cat([torch.cat(rows), *added], dim=-1).split([len(projected) for projected in rows]))
    return rows
