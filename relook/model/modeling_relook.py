"""LLaVA and LLaVA-NeXT with a post decoder inside their base model: transformers classes like any other.

The post decoder sits in the base model, and its output is `last_hidden_state`: fused-loss trainers and serving engines
call the base model and then lm_head, and bypass whatever stands between them in `forward`.

The three mixins hold what is the same for every trunk. A family adds its three classes, and says which of the vision
tower's features belong to which picture where a picture is more than one row of them.
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

# What this transformers calls the argument for keys and values: 5.24 renamed it, and drops the old name in 5.40.
CACHE = "cache" if "cache" in inspect.signature(LlavaModel.forward).parameters else "past_key_values"


class PostDecoderConfig:
    """Mixin: a config with the post decoder's settings as the dict `post_decoder` (see `PostDecoderSettings`)."""

    def __init__(self, post_decoder: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.post_decoder = dict(post_decoder or {})
        super().__init__(**kwargs)


def selected_features(config: Any, hidden_states: Any) -> Tensor:
    """The vision tower's features before the projector, (rows, P, V): its selected layers, without the class token."""
    layers = config.vision_feature_layer
    start = 1 if config.vision_feature_select_strategy == "default" else 0
    return torch.cat([hidden_states[i][:, start:] for i in (layers if isinstance(layers, list) else [layers])], dim=-1)


def images_per_row(lengths: list[int], taken: list[int]) -> list[int]:
    """How many images each row of a batch holds.

    Args:
        lengths: positions of each image, in order of the rows.
        taken: placeholders in each row.
    """
    counts, at = [], 0
    for positions in taken:
        start = at
        while positions > 0 and at < len(lengths):
            positions -= lengths[at]
            at += 1
        if positions:
            raise ValueError("the image placeholders of a row are not as many as its images have positions")
        counts.append(at - start)
    if at != len(lengths):
        raise ValueError(f"{len(lengths)} images, but the rows have placeholders for {at}")
    return counts


def for_each_beam(image: Any, taken: list[int]) -> None:
    """Repeat projected features as beam search has repeated the rows: those of a row's images, then again.

    Args:
        image: the images' outputs, of rows that were not repeated; or of all, which are left alone.
        taken: placeholders in each row.
    """
    lengths = [len(projected) for projected in image.pooler_output]
    beams = sum(taken) // sum(lengths)
    if beams > 1:
        pictures, repeated = iter(image.pooler_output), []
        for count in images_per_row(lengths, taken[::beams]):
            row = [next(pictures) for _ in range(count)]
            repeated += row * beams
        image.pooler_output = repeated


class PostDecoderModel(PreTrainedModel):
    """Mixin over a transformers base model: its last hidden states pass the post decoder."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.post_decoder = PostDecoder.of(config)
        self.post_init()

    def features_by_image(self, features_RPV: Tensor, image_sizes: Tensor | None) -> list[Tensor]:
        """The tower's features, R rows of P, as one (M, V) tensor for each image. Here a row is an image."""
        return list(features_RPV)

    def get_image_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None, **kwargs: Any) -> Any:
        """As the trunk's, with what the post decoder looks at as `vision_features`: one (M, V) tensor for each image.

        `generate` calls this once per image, and hands its outcome to the first forward pass.
        """
        sizes = {} if image_sizes is None else {"image_sizes": image_sizes}
        outputs = super().get_image_features(pixel_values=pixel_values, **sizes, **{**kwargs, "return_dict": True})
        selected = selected_features(self.config, outputs.hidden_states)
        outputs.vision_features = self.features_by_image(selected, image_sizes)
        return outputs

    def _placeholders(self, input_ids: Tensor | None, embeds: Tensor) -> Tensor:
        """Where rows have room for images, (B, S, 1) bool."""
        token = self.config.image_token_id
        if input_ids is not None:
            return torch.eq(input_ids, token).unsqueeze(-1)
        placeholder = self.get_input_embeddings()(torch.tensor(token, device=embeds.device))
        return torch.eq(embeds, placeholder).all(-1, keepdim=True)

    def _context(self, image: Any, taken: list[int]) -> ImageContext | None:
        """The image side for rows that have `taken` placeholders each.

        Beams repeat rows and projected features, not those of the tower: the image side is computed once per image and
        then repeated.
        """
        features, lengths = image.vision_features, [len(projected) for projected in image.pooler_output]
        per_row = images_per_row(lengths, taken)
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
        """As the trunk's, with the post decoder applied to `last_hidden_state`.

        The image side is prepared where an image comes in (as pixels, or encoded by `generate` beforehand) and kept on
        the generation cache, from where the decode steps, which have no image, take it. The trunk is handed embeddings
        in which the images already are, and makes its own output, whose fields differ between versions.

        Args:
            past_key_values, cache: the generation cache; the same argument under its older and its newer name.
        """
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            said = getattr(self.config, name)
            if kwargs.pop(name, said) not in (said, None):
                raise ValueError(f"a relook model takes no {name}: the config says it")
        before = past_key_values if cache is None else cache
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        context: ImageContext | None = getattr(before, "relook_image", None)
        image, projected = (mm_encoder_outputs or {}).get("image"), None
        if image is None and pixel_values is not None:
            image = self.get_image_features(pixel_values, image_sizes)
        if image is not None:
            where = self._placeholders(input_ids, inputs_embeds)
            taken = where.flatten(1).sum(1).tolist()
            for_each_beam(image, taken)
            context = self._context(image, taken)  # says so where images and placeholders do not fit
            projected = torch.cat(list(image.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            inputs_embeds = inputs_embeds.masked_scatter(where, projected)
            if before is not None:
                before.relook_image = context
        seen = before.get_seq_length() if before is not None else 0
        trunk: dict[str, Any] = {**kwargs, CACHE: before, "return_dict": True}
        outputs = super().forward(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **trunk)
        after = getattr(outputs, CACHE)
        if after is not None and before is None:
            after.relook_image = context
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
        """Causal mask (B, 1, S, seen + S) for the blocks' own self-attention; None where they have none."""
        if not self.post_decoder.reads_all_positions:
            return None
        B, S = embeds.shape[:2]
        causal = torch.ones(S, seen + S, dtype=torch.bool, device=embeds.device).tril(seen)
        if attention_mask is None:
            return causal.expand(B, 1, S, seen + S)
        if attention_mask.ndim == 4:
            allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask > -1
            expanded: Tensor = allowed.expand(B, 1, S, seen + S)
            return expanded
        masked: Tensor = causal & attention_mask[:, None, None, :].bool()
        return masked


class PostDecoderForGeneration(PreTrainedModel):
    """Mixin over a transformers generation model: its base model is the `trunk_class`, which has a post decoder."""

    trunk_class: type[PostDecoderModel]

    def __init__(self, config: Any) -> None:
        # Not the family's own: it would build, and throw away, a trunk without the post decoder.
        PreTrainedModel.__init__(self, config)
        self.model = self.trunk_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers does for beams, but for pixels: see `for_each_beam`.

        Some versions, 5.17 among them, repeat each picture where they repeat rows: a row of two pictures would be given
        the first one twice.
        """
        kept = {name: kwargs.pop(name) for name in ("pixel_values", "image_sizes") if name in kwargs}
        input_ids, more = super()._expand_inputs_for_generation(*args, **kwargs)
        return input_ids, {**more, **kept}

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PostDecoder):
            module.reset_parameters()


class RelookLlavaConfig(PostDecoderConfig, LlavaConfig):
    model_type = "relook_llava"
    __init__ = PostDecoderConfig.__init__  # transformers makes one for a config class that has none


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
        """A picture is cut into tiles, as many as its size (height, width) asks for; each is a row."""
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
