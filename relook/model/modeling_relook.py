"""LLaVA with a post decoder inside its base model: transformers classes that save, load and generate as any other.

The post decoder sits in the base model, and its output is `last_hidden_state`: fused-loss trainers and serving engines
call the base model and then lm_head, and bypass whatever stands between them in `forward`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, LlavaConfig, LlavaForConditionalGeneration, LlavaModel
from transformers.models.llava.modeling_llava import LlavaModelOutputWithPast

from .post_decoder import ImageContext, PostDecoder, PostDecoderSettings


class RelookLlavaConfig(LlavaConfig):
    """A LLaVA config with the post decoder's settings as the dict `post_decoder` (see `PostDecoderSettings`)."""

    model_type = "relook_llava"

    def __init__(self, post_decoder: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.post_decoder = dict(post_decoder or {})
        super().__init__(**kwargs)


def image_features(base: LlavaModel, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """The vision tower's selected features (I, P, V), and what the projector makes of them (I, P, D)."""
    layers = base.config.vision_feature_layer
    hidden = base.vision_tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    start = 1 if base.config.vision_feature_select_strategy == "default" else 0
    chosen = [hidden[i][:, start:] for i in (layers if isinstance(layers, list) else [layers])]
    features = torch.cat(chosen, dim=-1)
    return features, base.multi_modal_projector(features)


class RelookLlavaModel(LlavaModel):
    """transformers' LlavaModel whose last hidden states pass the post decoder."""

    config: RelookLlavaConfig

    def __init__(self, config: RelookLlavaConfig) -> None:
        super().__init__(config)
        text = config.text_config
        layers = config.vision_feature_layer if isinstance(config.vision_feature_layer, list) else [0]
        self.post_decoder = PostDecoder(
            PostDecoderSettings(**config.post_decoder),
            vision_size=config.vision_config.hidden_size * len(layers),
            hidden_size=text.hidden_size,
            num_heads=text.num_attention_heads,
            mlp_size=text.intermediate_size,
        )
        self.post_init()

    def images_per_row(self, input_ids: Tensor | None, images: int, positions: int, rows: int) -> list[int]:
        """How many images each row holds, counted from its placeholders (evenly where only embeddings are given)."""
        if input_ids is None:
            return [images // rows] * rows
        return [int(n) // positions for n in (input_ids == self.config.image_token_id).sum(1).tolist()]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        """As LlavaModel's, with the post decoder applied to `last_hidden_state`.

        The image side is prepared where pixel values come in and kept on the generation cache, from where the decode
        steps, which have no pixel values, take it.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        context: ImageContext | None = getattr(past_key_values, "relook_image", None)
        projected = None
        if pixel_values is not None:
            features, projected = image_features(self, pixel_values)
            projected = projected.to(inputs_embeds.device, inputs_embeds.dtype)
            where = self.get_placeholder_mask(input_ids, inputs_embeds=inputs_embeds, image_features=projected)
            inputs_embeds = inputs_embeds.masked_scatter(where, projected)
            per_row = self.images_per_row(input_ids, *features.shape[:2], rows=inputs_embeds.shape[0])
            context = self.post_decoder.look(features, per_row)
            if past_key_values is not None:
                past_key_values.relook_image = context
        for name in ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes", "mm_encoder_outputs"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"a relook model takes no {name}: the config says it")
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        cache = outputs.past_key_values
        if cache is not None and past_key_values is None:
            cache.relook_image = context
        states = self.post_decoder(
            outputs.last_hidden_state,
            context,
            self_mask=self._self_mask(attention_mask, inputs_embeds, seen),
            cache=cache,
            first_layer=self.config.text_config.num_hidden_layers,
        )
        return LlavaModelOutputWithPast(
            last_hidden_state=states,
            past_key_values=cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=projected,
        )

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
            return allowed.expand(B, 1, S, seen + S)
        return causal & attention_mask[:, None, None, :].bool()


class RelookLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LlavaForConditionalGeneration over `RelookLlavaModel`."""

    config: RelookLlavaConfig
    config_class = RelookLlavaConfig

    def __init__(self, config: RelookLlavaConfig) -> None:
        # Not LlavaForConditionalGeneration's own: it would build, and throw away, a trunk without the post decoder.
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = RelookLlavaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PostDecoder):
            module.reset_parameters()


RelookLlavaConfig.register_for_auto_class()
RelookLlavaForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
