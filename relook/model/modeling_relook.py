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


def selected_features(config: LlavaConfig, hidden_states: Any) -> Tensor:
    """The vision tower's features before the projector, (I, P, V): its selected layers, without the class token."""
    layers = config.vision_feature_layer
    start = 1 if config.vision_feature_select_strategy == "default" else 0
    return torch.cat([hidden_states[i][:, start:] for i in (layers if isinstance(layers, list) else [layers])], dim=-1)


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

    def _context(self, features_IPV: Tensor, where: Tensor) -> ImageContext | None:
        """The image side for rows whose image placeholders are at `where` (B, S, 1).

        Beams repeat rows, not features: the image side is computed once per image and then repeated.
        """
        images, P = features_IPV.shape[:2]
        per_row = [int(n) // P for n in where.flatten(1).sum(1).tolist()]
        beams = max(sum(per_row) // images, 1)
        context = self.post_decoder.look(features_IPV, per_row[::beams])
        return context.repeat(beams) if context is not None and beams > 1 else context

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        mm_encoder_outputs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> LlavaModelOutputWithPast:
        """As LlavaModel's, with the post decoder applied to `last_hidden_state`.

        The image side is prepared where an image comes in (as pixels, or encoded by `generate` beforehand) and kept on
        the generation cache, from where the decode steps, which have no image, take it.
        """
        for name in ("vision_feature_layer", "vision_feature_select_strategy", "image_sizes"):
            if kwargs.pop(name, None) is not None:
                raise ValueError(f"a relook model takes no {name}: the config says it")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        context: ImageContext | None = getattr(past_key_values, "relook_image", None)
        image, projected = (mm_encoder_outputs or {}).get("image"), None
        if image is None and pixel_values is not None:
            image = self.get_image_features(pixel_values=pixel_values, return_dict=True)
        if image is not None:
            projected = torch.cat(list(image.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
            where = (
                (input_ids == self.config.image_token_id).unsqueeze(-1)
                if input_ids is not None
                else self.get_placeholder_mask(None, inputs_embeds, projected)
            )
            inputs_embeds = inputs_embeds.masked_scatter(where, projected)
            context = self._context(selected_features(self.config, image.hidden_states), where)
            if past_key_values is not None:
                past_key_values.relook_image = context
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
            expanded: Tensor = allowed.expand(B, 1, S, seen + S)
            return expanded
        masked: Tensor = causal & attention_mask[:, None, None, :].bool()
        return masked


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
