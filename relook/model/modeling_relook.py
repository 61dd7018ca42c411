"""LLaVA and LLaVA-NeXT with a post decoder inside their base model, as ordinary transformers classes.

The post decoder sits in the base model, and its output is `last_hidden_state`. Fused-loss trainers and serving engines
call the base model and then lm_head, and would bypass anything that sat between them in `forward`.

The three mixins hold what is common to every trunk. A family adds its three classes. Where an image takes more than one
row of vision features, the family also says which rows belong to which image.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextModel,
    PreTrainedModel,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from .post_decoder import ImageContext, PostDecoder

# The KV cache argument as the installed transformers names it: 5.24 renamed it, and 5.40 drops the old name.
CACHE = "cache" if "cache" in inspect.signature(LlavaModel.forward).parameters else "past_key_values"


class PostDecoderConfig:
    """Config mixin that stores the post decoder's settings as the dict `post_decoder` (see `PostDecoderSettings`)."""

    def __init__(self, post_decoder: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.post_decoder = dict(post_decoder or {})
        super().__init__(**kwargs)


def selected_features(config: Any, hidden_states: Any) -> Tensor:
    """Return the pre-projector vision features (rows, P, V) of the selected layers.

    The "default" select strategy drops the class token; any other keeps it. Several layers are concatenated along V.
    """
    # hidden_states[i] is (rows, 1 + patches, width) after layer i; the class token comes first.
    layers = config.vision_feature_layer
    start = 1 if config.vision_feature_select_strategy == "default" else 0
    return torch.cat([hidden_states[i][:, start:] for i in (layers if isinstance(layers, list) else [layers])], dim=-1)


def images_per_row(lengths: list[int], placeholder_counts: list[int]) -> list[int]:
    """Count the images in each row of a batch.

    Args:
        lengths: positions of each image, in row order.
        placeholder_counts: image placeholder tokens in each row.

    Raises:
        ValueError: the placeholders do not match the positions of the images.
    """
    counts, index = [], 0
    for positions in placeholder_counts:
        start = index
        # Consume images until this row's placeholders are used up; they must come out even.
        while positions > 0 and index < len(lengths):
            positions -= lengths[index]
            index += 1
        if positions:
            raise ValueError("the image placeholders of a row are not as many as its images have positions")
        counts.append(index - start)
    if index != len(lengths):
        raise ValueError(f"{len(lengths)} images, but the rows have placeholders for {index}")
    return counts


def for_each_beam(image: Any, placeholder_counts: list[int]) -> None:
    """Repeat the projected features, in place, to match rows that beam search has expanded.

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
        pictures, repeated = iter(image.pooler_output), []
        for count in images_per_row(lengths, placeholder_counts[::beams]):
            row = [next(pictures) for _ in range(count)]
            repeated += row * beams
        image.pooler_output = repeated


class PostDecoderModel(PreTrainedModel):
    """Base model mixin that passes the trunk's last hidden states through the post decoder."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.post_decoder = PostDecoder.of(config)
        self.post_init()

    def features_by_image(self, features_RPV: Tensor, image_sizes: Tensor | None) -> list[Tensor]:
        """Split the vision features, R rows of P, into one (M, V) tensor per image. By default each row is an image."""
        return list(features_RPV)

    def get_image_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None, **kwargs: Any) -> Any:
        """Extend the trunk's image outputs by `vision_features`, which the post decoder attends to.

        `vision_features` holds one (M, V) tensor per image. `generate` calls this once per image and passes the result
        to the first forward pass.
        """
        sizes = {} if image_sizes is None else {"image_sizes": image_sizes}
        outputs = super().get_image_features(pixel_values=pixel_values, **sizes, **{**kwargs, "return_dict": True})
        selected = selected_features(self.config, outputs.hidden_states)
        outputs.vision_features = self.features_by_image(selected, image_sizes)
        return outputs

    def _placeholders(self, input_ids: Tensor | None, embeds: Tensor) -> Tensor:
        """Return a (B, S, 1) bool mask of the image placeholder positions."""
        token = self.config.image_token_id
        if input_ids is not None:
            return torch.eq(input_ids, token).unsqueeze(-1)
        # Without input_ids, find the placeholders by comparing with the embedding of the image token.
        placeholder = self.get_input_embeddings()(torch.tensor(token, device=embeds.device))
        return torch.eq(embeds, placeholder).all(-1, keepdim=True)

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
        image_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the trunk and apply the post decoder to its `last_hidden_state`.

        The image context is built when an image comes in, as pixels or already encoded by `generate`. It is kept on the
        KV cache, where the decode steps, which get no image, find it. The trunk receives embeddings with the image
        features already scattered in. It builds its own output, whose fields differ between transformers versions.

        Args:
            past_key_values, cache: the KV cache; the same argument under its older and its newer name.
            mm_encoder_outputs: image outputs that `generate` computed beforehand, under "image".

        Raises:
            ValueError: a vision feature setting that differs from the config's.
        """
        # transformers lets a call override these, but the post decoder reads them from the config.
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            configured = getattr(self.config, name)
            if kwargs.pop(name, configured) not in (configured, None):
                raise ValueError(f"a relook model takes no {name}: the config says it")
        kv_cache = past_key_values if cache is None else cache
        # 1. Embed the text, (B, S) -> (B, S, D); image positions hold placeholders.
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        # 2. Find the image: encoded by `generate`, as pixels, or, in decode steps, as the context of the prefill.
        context: ImageContext | None = getattr(kv_cache, "relook_image", None)
        image, projected = (mm_encoder_outputs or {}).get("image"), None
        if image is None and pixel_values is not None:
            image = self.get_image_features(pixel_values, image_sizes)
        if image is not None:
            placeholders = self._placeholders(input_ids, inputs_embeds)  # (B, S, 1)
            placeholder_counts = placeholders.flatten(1).sum(1).tolist()
            for_each_beam(image, placeholder_counts)
            context = self._context(image, placeholder_counts)  # raises if images and placeholders do not match
            # 3. Scatter the projected features, (image positions, D), over the placeholder embeddings in order.
            projected = torch.cat(list(image.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(placeholders, projected)
            if kv_cache is not None:
                kv_cache.relook_image = context
        # 4. Run the trunk. Its length before this call is needed afterwards, when the cache has grown.
        seen = kv_cache.get_seq_length() if kv_cache is not None else 0
        trunk: dict[str, Any] = {**kwargs, CACHE: kv_cache, "return_dict": True}
        outputs = super().forward(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **trunk)
        after = getattr(outputs, CACHE)
        if after is not None and kv_cache is None:  # the trunk has just created the cache
            after.relook_image = context
        # 5. Run the post decoder on its states (B, S, D); the blocks' self-attention extends the same cache.
        outputs.last_hidden_state = self.post_decoder(
            outputs.last_hidden_state,
            context,
            self_mask=self._self_mask(attention_mask, inputs_embeds, seen),
            cache=after,
            first_layer=self.config.text_config.num_hidden_layers,
        )
        if hasattr(outputs, "image_outputs"):  # since 5.24
            outputs.image_outputs = image
        else:
            outputs.image_hidden_states = projected
        return outputs

    def _self_mask(self, attention_mask: Any, embeds: Tensor, seen: int) -> Tensor | None:
        """Build the causal mask (B, 1, S, seen + S) of the blocks' self-attention; None if they have none.

        Args:
            attention_mask: padding mask (B, seen + S), or a 4D mask, boolean or additive; None masks no padding.
            embeds: input embeddings (B, S, D).
            seen: number of tokens already in the KV cache.
        """
        if not self.post_decoder.reads_all_positions:
            return None
        B, S = embeds.shape[:2]
        # Query i sits at position seen + i and may attend to keys 0 .. seen + i.
        causal = torch.ones(S, seen + S, dtype=torch.bool, device=embeds.device).tril(seen)
        if attention_mask is None:
            return causal.expand(B, 1, S, seen + S)
        if attention_mask.ndim == 4:  # already causal; an additive mask holds large negative numbers where it blocks
            allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask > -1
            expanded: Tensor = allowed.expand(B, 1, S, seen + S)
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

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """Expand the inputs for beam search as transformers does, except the pixels (see `for_each_beam`).

        Some versions, 5.17 among them, repeat each image individually where they repeat rows. A row of two images would
        then get the first one twice.
        """
        image_inputs = {name: kwargs.pop(name) for name in ("pixel_values", "image_sizes") if name in kwargs}
        input_ids, expanded = super()._expand_inputs_for_generation(*args, **kwargs)
        return input_ids, {**expanded, **image_inputs}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PostDecoder):
            module.reset_parameters()


class RelookLlavaConfig(PostDecoderConfig, LlavaConfig):
    model_type = "relook_llava"
    __init__ = PostDecoderConfig.__init__  # transformers generates one for a config class without its own


class RelookLlavaModel(PostDecoderModel, LlavaModel):
    config: RelookLlavaConfig


class RelookLlavaForConditionalGeneration(PostDecoderForGeneration, LlavaForConditionalGeneration):
    config: RelookLlavaConfig
    config_class = RelookLlavaConfig
    trunk_class = RelookLlavaModel


class RelookLlavaNextConfig(PostDecoderConfig, LlavaNextConfig):
    model_type = "relook_llava_next"
    __init__ = PostDecoderConfig.__init__


class RelookLlavaNextModel(PostDecoderModel, LlavaNextModel):
    config: RelookLlavaNextConfig

    def features_by_image(self, features_RPV: Tensor, image_sizes: Tensor | None) -> list[Tensor]:
        """Group the rows by image: each row is a tile, and an image's size (height, width) decides its tile count."""
        grid, side = self.config.image_grid_pinpoints, self.config.vision_config.image_size
        assert image_sizes is not None
        tiles = [image_size_to_num_patches(size, grid, side) for size in image_sizes]
        return [features.flatten(0, 1) for features in features_RPV.split(tiles)]


class RelookLlavaNextForConditionalGeneration(PostDecoderForGeneration, LlavaNextForConditionalGeneration):
    config: RelookLlavaNextConfig
    config_class = RelookLlavaNextConfig
    trunk_class = RelookLlavaNextModel


RelookLlavaConfig.register_for_auto_class()
RelookLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
RelookLlavaNextConfig.register_for_auto_class()
RelookLlavaNextForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
