"""Vision-language models of transformers with a post decoder inside their base model, as ordinary transformers classes.

The post decoder sits in the base model, and its output is `last_hidden_state`. Fused-loss trainers and serving engines
call the base model and then lm_head, and would bypass anything that sat between them in `forward`.

The three mixins hold what is common to every trunk. A family's classes, such as `RelookQwen2_5_VLModel`, are made of
them and of transformers' own when they are first asked for (`family_classes`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import cache, wraps
from itertools import accumulate, pairwise
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, LlavaModel, PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from .post_decoder import ImageContext, PostDecoder

# The KV cache argument as the installed transformers names it: 5.24 renamed it, and 5.40 drops the old name.
CACHE = "cache" if "cache" in inspect.signature(LlavaModel.forward).parameters else "past_key_values"


class PostDecoderConfig:
    """Config mixin that stores the post decoder's settings as the dict `post_decoder` (see `PostDecoderSettings`)."""

    def __init__(self, post_decoder: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.post_decoder = dict(post_decoder or {})
        super().__init__(**kwargs)


# Families whose tower gives states that a post decoder may attend to; LLaVA's does so by default.
LLAVA = ("llava", "llava_next")
TOWERS_READ = (*LLAVA, "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def reads_tower(config: Any) -> bool:
    """Return True if the post decoder attends to the tower's states, not to what the language model reads."""
    features = (getattr(config, "post_decoder", None) or {}).get("features", "auto")
    return config.model_type.removeprefix("relook_") in LLAVA if features == "auto" else bool(features == "tower")


def vision_features(config: Any, image: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return what a post decoder attends to, (M, V) per image (see `reads_tower`).

    Args:
        config, image, inputs: see `tower_states`.
    """
    return tower_states(config, image, inputs) if reads_tower(config) else list(image.pooler_output)


def tower_states(config: Any, image: Any, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Return the vision tower's states before projector or merger, (M, V) per image.

    In LLaVA they are those of the selected layers, concatenated along V; the "default" select strategy drops the class
    token.

    Args:
        config: the model's config.
        image: outputs of `get_image_features`.
        inputs: its arguments: `image_sizes` (heights and widths) for models that cut an image into tiles,
            `image_grid_thw` for those whose pixels are the patches of all images.
    """
    if not hasattr(config, "vision_feature_layer"):
        return list(image.last_hidden_state.split(inputs["image_grid_thw"].prod(-1).tolist()))
    # hidden_states[i] is (rows, 1 + patches, width) after layer i; the class token comes first.
    layers, start = config.vision_feature_layer, 1 if config.vision_feature_select_strategy == "default" else 0
    layers = layers if isinstance(layers, list) else [layers]
    features_RPV = torch.cat([image.hidden_states[i][:, start:] for i in layers], dim=-1)
    sizes = inputs.get("image_sizes")
    tiles = [1] * len(features_RPV) if sizes is None else [tile_count(config, size) for size in sizes]
    return [features.flatten(0, 1) for features in features_RPV.split(tiles)]


def tile_count(config: Any, size: Any) -> int:
    """Return how many rows of pixels a LLaVA makes of an image of a height and width: LLaVA-NeXT cuts it into tiles."""
    if not hasattr(config, "image_grid_pinpoints"):
        return 1
    return int(image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size))


def vision_width(config: Any) -> int:
    """Return V of the vision features, which a post decoder attends to."""
    return tower_width(config) if reads_tower(config) else int(config.text_config.hidden_size)


def tower_width(config: Any) -> int:
    """Return the width of `tower_states`: that of the tower, times its selected layers."""
    layers, vision = getattr(config, "vision_feature_layer", None), config.vision_config
    # Qwen2-VL's `hidden_size` is that of its merger's output.
    width = getattr(vision, "embed_dim", None) or vision.hidden_size
    return int(width * (len(layers) if isinstance(layers, list) else 1))


def images_per_row(lengths: list[int], placeholder_counts: list[int]) -> list[int]:
    """Count the images in each row of a batch.

    Args:
        lengths: positions of each image, in row order.
        placeholder_counts: image placeholder tokens in each row.

    Raises:
        ValueError: the placeholders do not match the positions of the images.
    """
    # Positions up to each image, and placeholders up to each row: a row begins where an image does.
    images, rows = [0, *accumulate(lengths)], [0, *accumulate(placeholder_counts)]
    if not set(rows) <= set(images) or rows[-1] != images[-1]:
        raise ValueError(f"images of {lengths} positions do not fit rows with {placeholder_counts} placeholders")
    return [images.index(end) - images.index(start) for start, end in pairwise(rows)]


def for_each_beam(image: Any, placeholder_counts: list[int]) -> None:
    """Repeat the projected features, and those of deepstack, in place, to match rows that beam search has expanded.

    A row's images are repeated as a group: all of them, then all of them again.

    Args:
        image: image outputs of the unexpanded rows. Outputs that already cover all rows are left alone.
        placeholder_counts: image placeholder tokens in each (expanded) row.
    """
    lengths = [len(projected) for projected in image.pooler_output]
    # Rows are expanded already, images are not: the ratio of placeholders to projected positions is the beam count.
    beams = sum(placeholder_counts) // sum(lengths)
    if beams > 1:
        # Beams of one row are adjacent, so every `beams`-th row is an original one.
        numbers = torch.arange(len(lengths)).split(images_per_row(lengths, placeholder_counts[::beams]))
        order = torch.cat([row.repeat(beams) for row in numbers]).tolist()
        repeat: Any = lambda parts: parts[order] if isinstance(parts, Tensor) else [parts[i] for i in order]  # noqa: E731
        image.pooler_output = repeat(image.pooler_output)
        if layers := getattr(image, "deepstack_features", None):
            image.deepstack_features = [
                torch.cat(repeat(layer.split(lengths))) if isinstance(layer, Tensor) else repeat(layer)
                for layer in layers
            ]


class PostDecoderModel(PreTrainedModel):
    """Base model mixin that passes the trunk's last hidden states through the post decoder."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._image: Any = None  # image outputs of the forward pass that is under way
        self.post_decoder = PostDecoder.of(config, vision_width(config))
        self.post_init()

    def get_image_features(self, *args: Any, **kwargs: Any) -> Any:
        """Extend the trunk's image outputs by `vision_features`, which the post decoder attends to.

        `vision_features` holds one (M, V) tensor per image. `generate` calls this once per image and passes the result
        to the first forward pass.
        """
        if self._image is not None:  # asked by the trunk's own forward pass, of images that are encoded already
            return self._image
        encode = super().get_image_features
        inputs = inspect.signature(encode).bind(*args, **{**kwargs, "return_dict": True})
        outputs = encode(*inputs.args, **inputs.kwargs)
        outputs.vision_features = vision_features(self.config, outputs, inputs.arguments)
        return outputs

    def _placeholder_counts(self, input_ids: Tensor | None, embeds: Tensor | None) -> list[int]:
        """Count the image placeholders of each row of ids (B, S) or of embeddings (B, S, D)."""
        token = self.config.image_token_id
        if input_ids is not None:
            placeholders = torch.eq(input_ids, token)
        else:  # find them by comparing with the embedding of the image token
            assert embeds is not None
            placeholder = self.get_input_embeddings()(torch.tensor(token, device=embeds.device))
            placeholders = torch.eq(embeds, placeholder).all(-1)
        counts: list[int] = placeholders.sum(1).tolist()
        return counts

    def _context(self, image: Any, placeholder_counts: list[int]) -> ImageContext | None:
        """Build the image context for rows with `placeholder_counts` placeholders each; None where no image is read.

        Beams repeat rows and projected features, but not the vision features. The keys and values are therefore
        computed once per image and then repeated.
        """
        # Projected features have been repeated for beams (`for_each_beam`), vision features have not.
        features, lengths = image.vision_features, [len(projected) for projected in image.pooler_output]
        per_row = images_per_row(lengths, placeholder_counts)
        beams = len(lengths) // len(features)
        context = self.post_decoder.image_context(features, per_row[::beams])
        return context.repeat(beams) if context is not None and beams > 1 else context

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the trunk and apply the post decoder to its `last_hidden_state`.

        The image context is built when an image comes in, as pixels or already encoded by `generate`. It is kept on the
        KV cache, where the decode steps, which get no image, find it. The trunk builds its own output, whose fields
        differ between transformers versions.

        Args:
            past_key_values, cache: the KV cache; the same argument under its older and its newer name.
            mm_encoder_outputs: image outputs that `generate` computed beforehand, under "image".

        Raises:
            ValueError: a vision feature setting that differs from the config's.
        """
        # transformers lets a call override these, but the post decoder reads them from the config.
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            configured = getattr(self.config, name, None)
            if kwargs.pop(name, configured) not in (configured, None):
                raise ValueError(f"a relook model takes no {name}: the config says it")
        kv_cache = past_key_values if cache is None else cache
        # 1. Find the image: encoded by `generate`, as pixels, or, in decode steps, as the context of the prefill.
        context: ImageContext | None = getattr(kv_cache, "relook_image", None)
        image = (mm_encoder_outputs or {}).get("image")
        images: dict[str, Any] = {"mm_encoder_outputs": mm_encoder_outputs}
        if image is None and pixel_values is not None:
            names = kwargs.keys() & inspect.signature(self.get_image_features).parameters
            image = self.get_image_features(pixel_values, **{name: kwargs[name] for name in names})
            images = {"pixel_values": pixel_values}
        if image is not None:
            placeholder_counts = self._placeholder_counts(input_ids, inputs_embeds)
            for_each_beam(image, placeholder_counts)
            context = self._context(image, placeholder_counts)  # raises if images and placeholders do not match
            if kv_cache is not None:
                kv_cache.relook_image = context
        # 2. Run the trunk. Its length before this call is needed afterwards, when the cache has grown; a static cache
        # gives it as a tensor that it counts up in place.
        seen = int(kv_cache.get_seq_length()) if kv_cache is not None else 0
        trunk: dict[str, Any] = {**kwargs, CACHE: kv_cache, "return_dict": True, "attention_mask": attention_mask}
        trunk |= {"input_ids": input_ids, "inputs_embeds": inputs_embeds, **(images if image is not None else {})}
        self._image = image
        try:
            outputs = super().forward(**trunk)
        finally:
            self._image = None
        after = getattr(outputs, CACHE)
        if after is not None and kv_cache is None:  # the trunk has just created the cache
            after.relook_image = context
        # 3. Run the post decoder on its states (B, S, D); the blocks' self-attention extends the same cache.
        outputs.last_hidden_state = self.post_decoder(
            outputs.last_hidden_state,
            context,
            self_mask=self._self_mask(attention_mask, outputs.last_hidden_state, seen),
            cache=after,
            first_layer=self.config.text_config.num_hidden_layers,
        )
        return outputs

    def _self_mask(self, attention_mask: Any, states: Tensor, seen: int) -> Tensor | None:
        """Build the causal mask (B, 1, S, seen + S) of the blocks' self-attention; None if they have none.

        Args:
            attention_mask: padding mask (B, seen + S), or a 4D mask, boolean or additive, by kind of layer where these
                see differently; None masks no padding.
            states: hidden states (B, S, D).
            seen: number of tokens already in the KV cache.
        """
        if not self.post_decoder.reads_all_positions:
            return None
        B, S = states.shape[:2]
        if isinstance(attention_mask, Mapping):
            attention_mask = attention_mask["full_attention"]
        # Query i sits at position seen + i and may attend to keys 0 .. seen + i.
        causal = torch.ones(S, seen + S, dtype=torch.bool, device=states.device).tril(seen)
        if attention_mask is None:
            return causal.expand(B, 1, S, seen + S)
        if attention_mask.ndim == 4:  # already causal; an additive mask holds large negative numbers where it blocks
            allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask > -1
            seen_keys = allowed[..., : seen + S]  # a static cache has room for more
            expanded: Tensor = seen_keys.expand(B, 1, S, seen + S)
            return expanded
        # Padding is masked as a key: (S, keys) & (B, 1, 1, keys) -> (B, 1, S, keys).
        masked: Tensor = causal & attention_mask[:, None, None, :].bool()
        return masked


class PostDecoderForGeneration(PreTrainedModel):
    """Generation model mixin whose base model is the `trunk_class`, which has a post decoder."""

    trunk_class: type[PostDecoderModel]

    def __init__(self, config: Any) -> None:
        # Skip the family's own __init__: it would build a trunk without the post decoder, only to discard it.
        PreTrainedModel.__init__(self, config)
        self.model = self.trunk_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> Any:
        """Expand the inputs for beam search as transformers does, except those about images (see `for_each_beam`).

        Some versions, 5.17 among them, repeat each image individually where they repeat rows. A row of two images would
        then get the first one twice. They also repeat M-RoPE's positions (4, B, S) along the wrong axis.
        """
        about_images = {"mm_encoder_outputs", *inspect.signature(self.model.get_image_features).parameters}
        image_inputs = {name: kwargs.pop(name) for name in about_images & kwargs.keys()}
        if (positions := kwargs.pop("position_ids", None)) is not None:
            image_inputs["position_ids"] = positions.repeat_interleave(expand_size, dim=-2)
        # A family's own expansion would look for them; the common one is a static method in 5.17, and none later.
        expand = vars(GenerationMixin)["_expand_inputs_for_generation"].__get__(self)
        input_ids, expanded = expand(expand_size=expand_size, **kwargs)
        return input_ids, {**expanded, **image_inputs}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PostDecoder):
            module.reset_parameters()


@cache
def family_classes(prefix: str) -> dict[str, type]:
    """Make the config, base model and generation model with a post decoder of a family, by their names.

    Args:
        prefix: how transformers' own classes of the family begin, such as "Llava" or "Qwen2_5_VL".
    """
    config, base, generation = (
        getattr(transformers, prefix + name) for name in ("Config", "Model", "ForConditionalGeneration")
    )

    @wraps(base.get_image_features)  # `generate` reads the arguments from the signature
    def get_image_features(self: Any, *args: Any, **kwargs: Any) -> Any:
        return PostDecoderModel.get_image_features(self, *args, **kwargs)

    # transformers generates an __init__ for a config class without its own.
    settings = {"model_type": f"relook_{config.model_type}", "__init__": PostDecoderConfig.__init__}
    relook_config: Any = type(f"Relook{prefix}Config", (PostDecoderConfig, config), settings)
    of_config = {"config_class": relook_config, "__annotations__": {"config": relook_config}}
    model = type(
        f"Relook{prefix}Model", (PostDecoderModel, base), {**of_config, "get_image_features": get_image_features}
    )
    bases = (PostDecoderForGeneration, generation)
    full_model: Any = type(f"Relook{prefix}ForConditionalGeneration", bases, {**of_config, "trunk_class": model})
    relook_config.register_for_auto_class()
    full_model.register_for_auto_class("AutoModelForImageTextToText")
    return {defined.__name__: defined for defined in (relook_config, model, full_model)}


def __getattr__(name: str) -> Any:
    """Return a class of a family by its name: saved models name theirs, and so does whoever imports one."""
    prefix = re.fullmatch(r"Relook(\w+?)(Config|Model|ForConditionalGeneration)", name)
    if prefix is None or not hasattr(transformers, f"{prefix[1]}ForConditionalGeneration"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return family_classes(prefix[1])[name]
