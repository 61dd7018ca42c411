"""LLaVA-1.5 for vLLM with a post decoder, whose image keys and values lie in vLLM's own paged cache.

LLaVA-1.5 has one placeholder for each vision feature. So a block's attention over the image is one more decoder layer
of the cache, with the image's keys and values in the placeholders' slots. One further head dimension hides the other
slots: queries are 1 there, keys 0 at the image and `HIDDEN` at text. The model keeps nothing per request, so prefix
caching, chunked prefill, preemption and CUDA graphs are vLLM's.

Shape letters: N flat positions of a step, D hidden size, H heads of this rank, d head size, P features of an image.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.models import llava
from vllm.model_executor.models.utils import maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from relook.model.modeling_relook import reads_tower, vision_width
from relook.model.post_decoder import Alignment, PostDecoderSettings

HIDDEN = -30000.0  # fits into float16; divided by sqrt(d), its softmax weight is 0
HEAD_SIZES = (32, 64, 96, 128, 160, 192, 224, 256)  # that vLLM's backends share


class PagedAttention(nn.Module):
    """Attention whose keys and values are in the paged cache: of the text so far, or of the image positions alone."""

    def __init__(self, hidden_size: int, num_heads: int, over_image: bool, cache: CacheConfig, prefix: str) -> None:
        super().__init__()
        self.over_image = over_image
        self.head_size = hidden_size // num_heads
        self.heads = num_heads // get_tensor_model_parallel_world_size()
        needed = self.head_size + over_image
        self.cached_size = next((size for size in HEAD_SIZES if size >= needed), needed)
        self.q_proj, self.k_proj, self.v_proj = (
            ColumnParallelLinear(hidden_size, hidden_size, bias=False, return_bias=False, prefix=f"{prefix}.{name}")
            for name in ("q_proj", "k_proj", "v_proj")
        )
        self.o_proj = RowParallelLinear(
            hidden_size, hidden_size, bias=False, return_bias=False, prefix=f"{prefix}.o_proj"
        )
        self.attn = Attention(
            self.heads, self.cached_size, self.head_size**-0.5, cache_config=cache, prefix=f"{prefix}.attn"
        )

    def forward(self, states_ND: Tensor, source_ND: Tensor, hidden_N: Tensor) -> Tensor:
        """Attend from the states to keys and values of the source; `hidden_N` is 0 at the image, else `HIDDEN`."""
        query = self._widen(self.q_proj(states_ND), 1.0)
        key = self._widen(self.k_proj(source_ND), hidden_N[:, None])
        value = self._widen(self.v_proj(source_ND), 0.0)
        # (N, H * cached size) -> (N, H, cached size) -> (N, H * d), without what `_widen` added
        mixed = self.attn(query, key, value).view(-1, self.heads, self.cached_size)[..., : self.head_size]
        output: Tensor = self.o_proj(mixed.flatten(1))
        return output

    def _widen(self, flat: Tensor, extra: Tensor | float) -> Tensor:
        """Pad each head: (N, H * d) -> (N, H * cached size), with `extra` as the first new number over the image."""
        wide = F.pad(flat.view(-1, self.heads, self.head_size), (0, self.cached_size - self.head_size))
        if self.over_image:
            wide[..., self.head_size] = extra
        return wide.flatten(1)


class ParallelMLP(nn.Module):
    """Gated MLP (`relook.model.post_decoder.MLP`), split over the ranks."""

    def __init__(self, hidden_size: int, inner_size: int, activation: str, prefix: str) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (
            ColumnParallelLinear(hidden_size, inner_size, bias=False, return_bias=False, prefix=f"{prefix}.{name}")
            for name in ("gate_proj", "up_proj")
        )
        self.down_proj = RowParallelLinear(
            inner_size, hidden_size, bias=False, return_bias=False, prefix=f"{prefix}.down_proj"
        )
        self.activation = ACT2FN[activation]

    def forward(self, states_ND: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.activation(self.gate_proj(states_ND)) * self.up_proj(states_ND))
        return output


class ParallelBlock(nn.Module):
    """A block of the post decoder with the parameter names of `relook.model.post_decoder.Block`."""

    def __init__(self, settings: PostDecoderSettings, config: Any, layer: int, cache: CacheConfig, prefix: str) -> None:
        super().__init__()
        size, heads = config.hidden_size, settings.num_heads or config.num_attention_heads
        self.self_attention = self.cross_attention = None
        # The number in an attention's prefix is its layer of the cache.
        if settings.attention == "self_cross":
            self.self_norm = nn.LayerNorm(size)
            self.self_attention = PagedAttention(size, heads, False, cache, f"{prefix}.self.{layer}")
        if settings.attention != "none":
            self.cross_norm = nn.LayerNorm(size)
            self.cross_attention = PagedAttention(size, heads, True, cache, f"{prefix}.cross.{layer + 1}")
        self.mlp_norm = nn.LayerNorm(size)
        self.mlp = ParallelMLP(size, settings.mlp_size or config.intermediate_size, settings.activation, prefix)

    def forward(self, states_ND: Tensor, image_ND: Tensor, hidden_N: Tensor) -> Tensor:
        if self.self_attention is not None:
            normed = self.self_norm(states_ND)
            states_ND = states_ND + self.self_attention(normed, normed, hidden_N)
        if self.cross_attention is not None:
            states_ND = states_ND + self.cross_attention(self.cross_norm(states_ND), image_ND, hidden_N)
        output: Tensor = states_ND + self.mlp(self.mlp_norm(states_ND))
        return output


@MULTIMODAL_REGISTRY.register_processor(
    llava._build_llava_or_pixtral_hf_processor,
    info=llava._build_llava_or_pixtral_hf_info,
    dummy_inputs=llava.LlavaDummyInputsBuilder,
)
class RelookLlavaForConditionalGeneration(llava.LlavaForConditionalGeneration):
    """vLLM's LLaVA-1.5 with the post decoder between the language model's last norm and lm_head."""

    hf_to_vllm_mapper = llava.LlavaForConditionalGeneration.hf_to_vllm_mapper | llava.WeightsMapper(
        orig_to_new_prefix={"model.post_decoder.": "post_decoder."}
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("A post decoder needs the image on the last rank: use tensor parallelism.")
        if vllm_config.model_config.multimodal_config.enable_mm_embeds:
            raise ValueError("A post decoder reads the vision tower's features: start without enable_mm_embeds.")
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        text, settings = self.config.text_config, PostDecoderSettings(**self.config.post_decoder)
        name = maybe_prefix(prefix, "post_decoder")
        self.post_decoder: Any = nn.Module()
        if settings.attention != "none":
            self.post_decoder.align = Alignment(settings, vision_width(self.config), text.hidden_size)
        self.post_decoder.blocks = nn.ModuleList(
            ParallelBlock(settings, text, text.num_hidden_layers + 2 * i, vllm_config.cache_config, name)
            for i in range(settings.depth)
        )
        # At fixed addresses for CUDA graphs: the aligned features at the placeholders of a step, zeros at its text.
        longest = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("image_ND", torch.zeros(longest, text.hidden_size), persistent=False)
        self.register_buffer("hidden_N", torch.full((longest,), HIDDEN), persistent=False)
        self.filled = 0  # positions of the buffers that the last step with an image wrote

    def _process_image_input(self, image_input: Any) -> Tensor:
        """Return what the language model reads beside what the post decoder reads, (images, P, 2D).

        vLLM keeps both in its encoder cache, as it does Qwen3-VL's deepstack features.
        """
        features = self._process_image_pixels(image_input)
        projected: Tensor = self.multi_modal_projector(features)
        if not hasattr(self.post_decoder, "align"):
            return projected
        seen = features if reads_tower(self.config) else projected
        return torch.cat((projected, self.post_decoder.align(seen)), -1)

    def embed_input_ids(
        self,
        input_ids: Tensor,
        multimodal_embeddings: Iterable[Tensor] | None = None,
        *,
        is_multimodal: Tensor | None = None,
    ) -> Tensor:
        """Embed a step's tokens, and note the post decoder's part of the images in the buffers."""
        self.image_ND[: self.filled] = 0.0
        self.hidden_N[: self.filled] = HIDDEN
        self.filled, size = 0, self.config.text_config.hidden_size
        embeddings = list(multimodal_embeddings if multimodal_embeddings is not None else ())
        if embeddings and is_multimodal is not None and hasattr(self.post_decoder, "align"):
            self.filled = len(input_ids)
            is_image_N = is_multimodal.to(self.hidden_N.device)
            aligned = torch.cat([e[:, size:] for e in embeddings]).to(self.image_ND.dtype)
            # Not by indices, for which the host would wait.
            self.image_ND[: self.filled].masked_scatter_(is_image_N[:, None], aligned)
            self.hidden_N[: self.filled].masked_fill_(is_image_N, 0.0)
        projected = [e[:, :size] for e in embeddings]
        embedded: Tensor = super().embed_input_ids(input_ids, projected, is_multimodal=is_multimodal)
        return embedded

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the language model, then the blocks on its hidden states (N, D)."""
        states_ND: Tensor = super().forward(*args, **kwargs)
        for block in self.post_decoder.blocks:
            states_ND = block(states_ND, self.image_ND[: len(states_ND)], self.hidden_N[: len(states_ND)])
        return states_ND
