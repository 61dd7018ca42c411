"""Post decoder: a second look at the image, between the trunk's last hidden state and lm_head.

This file and `modeling_relook.py` are saved with every model (`trust_remote_code`), so they import nothing from relook.

Shape letters: B rows (or trees), S text positions, M image positions, D hidden size, V width of the vision features,
N flat positions, and T rows of a padded batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicLayer, StaticLayer
from transformers.activations import ACT2FN


@dataclass(frozen=True)
class PostDecoderSettings:
    """Architecture of a post decoder, stored as a dict in the model's config under `post_decoder`.

    Args:
        depth: number of stacked blocks.
        attention: "cross" (over the image), "none" (MLP only) or "self_cross" (over the text so far, then the image).
        features: what it attends to: "tower" (the vision tower's states, before the projector or merger), "projected"
            (what the language model reads) or "auto" (the tower's states in LLaVA and LLaVA-NeXT, else projected).
        align: how vision features are mapped to the hidden size: "linear", "mlp" or "mlp_twice".
        align_size: width inside the alignment MLP; 0 means the hidden size (the projector's own shape).
        activation: name of the activation in the alignment and the MLP, e.g. "silu" or "gelu".
        num_heads: attention heads; 0 means those of the language model.
        mlp_size: width inside the blocks' MLP; 0 means that of the language model.
    """

    depth: int = 1
    attention: str = "cross"
    features: str = "auto"
    align: str = "mlp"
    align_size: int = 0
    activation: str = "gelu"
    num_heads: int = 0
    mlp_size: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("attention", ("cross", "none", "self_cross")),
            ("features", ("auto", "tower", "projected")),
            ("align", ("linear", "mlp", "mlp_twice")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"post_decoder.{name} is {getattr(self, name)!r}, but must be one of {allowed}")
        for name, minimum, maximum in (
            ("depth", 1, 1 << 10),
            *((name, 0, 1 << 18) for name in ("align_size", "num_heads", "mlp_size")),
        ):
            value = getattr(self, name)
            if type(value) is not int or not minimum <= value <= maximum:
                raise ValueError(f"post_decoder.{name} is {value!r}, but must be a number from {minimum} to {maximum}")
        if self.activation not in ACT2FN:
            raise ValueError(f"post_decoder.activation {self.activation!r} is not an activation of transformers")

    @staticmethod
    def names() -> tuple[str, ...]:
        return tuple(field.name for field in fields(PostDecoderSettings))


@dataclass
class ImageContext:
    """Image keys and values of every block, computed once per image and kept over all decode steps.

    `keys` and `values` hold one (B, heads, M, head size) tensor per block. `mask` is (B, M) bool where rows have
    different numbers of image positions, else None. All beams of a row attend to the same image, so beam search need
    not reorder anything.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor | None

    def repeat(self, times: int) -> ImageContext:
        """Return a context in which each row is repeated `times` times in place, as beam search repeats rows."""
        mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        keys, values = ([t.repeat_interleave(times, 0) for t in side] for side in (self.keys, self.values))
        return ImageContext(keys, values, mask)

    def select(self, rows: Tensor) -> ImageContext:
        """Return the context of the rows with these indices."""
        mask = None if self.mask is None else self.mask[rows]
        keys, values = ([t[rows] for t in side] for side in (self.keys, self.values))
        return ImageContext(keys, values, mask)


def pad_images(features: Sequence[Tensor], per_row: list[int]) -> tuple[Tensor, Tensor | None]:
    """Concatenate the images of each row and pad the rows to one length.

    Args:
        features: one (M, V) tensor per image, in row order.
        per_row: number of images in each row.

    Returns:
        The padded features (B, most positions, V), and a (B, most positions) bool mask of the valid positions. The mask
        is None where all rows have the same number of positions.

    Raises:
        ValueError: the number of images is not the sum of `per_row`.
    """
    if sum(per_row) == 0 and len(features) == 1:
        # One dummy image that no row sees: it is masked everywhere, yet keeps all parameters in the graph.
        padded = features[0].expand(len(per_row), -1, -1)
        return padded, torch.zeros(padded.shape[:2], dtype=torch.bool, device=padded.device)
    if sum(per_row) != len(features):
        raise ValueError(f"{len(features)} images, but the rows name {sum(per_row)}")
    # Put the images of each row behind each other; a row without images becomes an empty (0, V).
    rest, rows = iter(features), []
    for count in per_row:
        images = [next(rest) for _ in range(count)]
        rows.append(torch.cat(images) if images else features[0][:0])
    padded = pad_sequence(rows, batch_first=True)  # (B, longest, V), zeros at the end of shorter rows
    longest = padded.shape[1]
    # A batch without padding needs no mask, which keeps the fast attention kernels available.
    if all(len(row) == longest for row in rows):
        return padded, None
    # Position j of a row is valid if j < the row's length: (longest,) < (B, 1) -> (B, longest).
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    return padded, torch.arange(longest, device=padded.device) < lengths[:, None]


@dataclass
class FlatLayout:
    """Map between N flat positions and a padded (T, S) batch; everything but attention runs on the flat ones.

    Answers of a few tokens share a batch with descriptions of a hundred, so most of a padded batch can be padding.
    """

    row: Tensor  # (N,), index of the row in the padded batch
    slot: Tensor  # (N,), index within the row
    shape: tuple[int, int]

    def pad(self, flat_ND: Tensor) -> Tensor:
        # Scatter (N, D) into a zero-padded (T, S, D); index_put passes the gradient back to the flat states.
        padded = flat_ND.new_zeros(*self.shape, flat_ND.shape[-1])
        filled: Tensor = padded.index_put((self.row, self.slot), flat_ND)
        return filled

    def unpad(self, padded_TSD: Tensor) -> Tensor:
        return padded_TSD[self.row, self.slot]


class _Norm(nn.LayerNorm):
    """LayerNorm under a name of its own, so that weight initialisation finds it."""


class Alignment(nn.Module):
    """Projection of the vision features to the language model's width, with a LayerNorm."""

    def __init__(self, settings: PostDecoderSettings, vision_size: int, hidden_size: int) -> None:
        super().__init__()
        inner = settings.align_size or hidden_size
        sizes = {
            "linear": [(vision_size, hidden_size)],
            "mlp": [(vision_size, inner), (inner, hidden_size)],
            "mlp_twice": [(vision_size, inner), (inner, hidden_size), (hidden_size, inner), (inner, hidden_size)],
        }[settings.align]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in sizes)
        self.activation = ACT2FN[settings.activation]
        self.norm = _Norm(hidden_size)

    def forward(self, features: Tensor) -> Tensor:
        for i, linear in enumerate(self.linears):
            features = linear(features if i == 0 else self.activation(features))
        # (B, M, V) -> (B, M, D): the norm keeps image keys at one scale, whatever the tower's is.
        normed: Tensor = self.norm(features)
        return normed


class Attention(nn.Module):
    """Multi-head attention whose keys and values can be precomputed."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def split(self, states: Tensor) -> Tensor:
        # (B, S, D) -> (B, S, heads, head size) -> (B, heads, S, head size)
        heads: Tensor = states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return heads

    def keys_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.split(self.k_proj(states)), self.split(self.v_proj(states))

    def forward(
        self, states: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, layout: FlatLayout | None = None
    ) -> Tensor:
        """Attend from the states to the keys and values.

        Args:
            states: (B, S, D), or (N, D) with a `layout`.
            keys, values: (B, heads, keys, head size).
            mask: (B, 1, S or 1, keys) bool, true where attention is allowed. A query that may see nothing gets zeros,
                not NaN.
            layout: where flat states lie in the padded batch.
        """
        # Project the flat states, then pad: padding costs no matrix products, only attention.
        projected = self.q_proj(states)
        queries = self.split(projected if layout is None else layout.pad(projected))
        if mask is None:
            mixed = F.scaled_dot_product_attention(queries, keys, values)
        else:
            # A fully masked query would give NaN in the softmax: unmask it, then zero its output. (B, 1, S or 1, 1)
            sees = mask.any(-1, keepdim=True)
            mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask | ~sees)
            mixed = mixed * sees
        mixed = mixed.transpose(1, 2).flatten(2)  # merge the heads: (B, S, D)
        output: Tensor = self.o_proj(mixed if layout is None else layout.unpad(mixed))
        return output

    def weights(self, states: Tensor, keys: Tensor) -> Tensor:
        """Compute softmax weights averaged over heads, (B, S, keys), for visualisation and not for training."""
        # softmax(q k^T / sqrt(head size)): (B, heads, S, keys) -> mean over heads (B, S, keys)
        queries = self.split(self.q_proj(states))
        weights: Tensor = (queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5).softmax(-1).mean(1)
        return weights


class MLP(nn.Module):
    """Gated MLP, as in Llama."""

    def __init__(self, hidden_size: int, inner_size: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, inner_size, bias=False)
        self.down_proj = nn.Linear(inner_size, hidden_size, bias=False)
        self.activation = ACT2FN[activation]

    def forward(self, states: Tensor) -> Tensor:
        # (..., D) -> (..., inner) twice, multiplied, -> (..., D)
        output: Tensor = self.down_proj(self.activation(self.gate_proj(states)) * self.up_proj(states))
        return output


class Block(nn.Module):
    """Pre-norm attention(s) and pre-norm MLP, each with a residual connection.

    The last projection of each branch starts at zero, so that a fresh block is the identity.
    """

    def __init__(self, settings: PostDecoderSettings, hidden_size: int, num_heads: int, mlp_size: int) -> None:
        super().__init__()
        self.self_norm: nn.Module | None = None
        self.self_attention: Attention | None = None
        self.cross_norm: nn.Module | None = None
        self.cross_attention: Attention | None = None
        if settings.attention == "self_cross":
            self.self_norm = _Norm(hidden_size)
            self.self_attention = Attention(hidden_size, num_heads)
        if settings.attention != "none":
            self.cross_norm = _Norm(hidden_size)
            self.cross_attention = Attention(hidden_size, num_heads)
        self.mlp_norm = _Norm(hidden_size)
        self.mlp = MLP(hidden_size, mlp_size, settings.activation)

    def forward(
        self,
        states: Tensor,
        image: tuple[Tensor, Tensor] | None,
        image_mask: Tensor | None,
        self_mask: Tensor | None,
        past: _BlockCache | None,
        layout: FlatLayout | None = None,
    ) -> Tensor:
        # 1. Over the text so far (attention "self_cross" only).
        if self.self_attention is not None and self.self_norm is not None:
            normed = self.self_norm(states)
            keys, values = self.self_attention.keys_values(normed)
            if past is not None and self_mask is not None:  # append to the KV cache, and attend to all of it
                keys, values = past.update(keys, values, self_mask.shape[-1])
            states = states + self.self_attention(normed, keys, values, self_mask)
        # 2. Over the image, whose keys and values are ready; rows without an image skip it or are masked.
        if self.cross_attention is not None and self.cross_norm is not None and image is not None:
            states = states + self.cross_attention(self.cross_norm(states), *image, image_mask, layout)
        # 3. MLP.
        output: Tensor = states + self.mlp(self.mlp_norm(states))
        return output


class _BlockCache:
    """View of one block's layer in the KV cache: self-attention keys and values of the text so far."""

    def __init__(self, cache: Cache, layer: int) -> None:
        self.cache, self.layer = cache, layer

    def update(self, keys: Tensor, values: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Append the keys and values, and return those of all positions so far, of which there are `length`."""
        layers = self.cache.layers
        while len(layers) <= self.layer:  # the cache was created with layers for the trunk only
            # A static cache stays one: transformers masks its empty places only where all layers are static.
            places = max(getattr(layer, "max_cache_len", 0) for layer in layers)
            layers.append(StaticLayer(places) if places else DynamicLayer())
        keys, values = self.cache.update(keys, values, self.layer)
        return keys[:, :, :length], values[:, :, :length]


class PostDecoder(nn.Module):
    """Stack of `depth` blocks over the trunk's last hidden states, each attending to the aligned image features.

    An untrained post decoder leaves every logit bit-identical, since every residual branch ends in a projection of
    zeros.
    """

    def __init__(
        self, settings: PostDecoderSettings, vision_size: int, hidden_size: int, num_heads: int, mlp_size: int
    ) -> None:
        super().__init__()
        self.settings = settings
        self.align = Alignment(settings, vision_size, hidden_size) if settings.attention != "none" else None
        self.blocks = nn.ModuleList(
            Block(settings, hidden_size, settings.num_heads or num_heads, settings.mlp_size or mlp_size)
            for _ in range(settings.depth)
        )

    @staticmethod
    def of(config: Any, vision_size: int) -> PostDecoder:
        """Build the post decoder that a model's config describes, over vision features of that width."""
        text = config.text_config
        return PostDecoder(
            PostDecoderSettings(**config.post_decoder),
            vision_size=vision_size,
            hidden_size=text.hidden_size,
            num_heads=text.num_attention_heads,
            mlp_size=text.intermediate_size,
        )

    @property
    def reads_all_positions(self) -> bool:
        """Return True if a position's output depends on the hidden states of other positions (self-attention)."""
        return self.settings.attention == "self_cross"

    def image_context(self, features: Sequence[Tensor], per_row: list[int]) -> ImageContext | None:
        """Compute the image keys and values of all blocks, once per image.

        Args:
            features: vision features, one (M, V) tensor per image, in row order. If no row has an image, a single dummy
                image may be given, which no row sees. The output is then that without an image, but all parameters
                take part.
            per_row: number of images in each row.

        Returns:
            The image context; None where there is no image, or the blocks read none.
        """
        if self.align is None or len(features) == 0:
            return None
        # (B, M, V) and (B, M), then through the alignment in the post decoder's dtype: (B, M, D).
        padded, mask = pad_images(features, per_row)
        aligned = self.align(padded.to(self.align.norm.weight.dtype))
        blocks: list[Any] = list(self.blocks)
        # Each block has keys and values of its own, (B, heads, M, head size).
        pairs = [block.cross_attention.keys_values(aligned) for block in blocks]
        return ImageContext([key for key, _ in pairs], [value for _, value in pairs], mask)

    def forward(
        self,
        states_BSD: Tensor,
        context: ImageContext | None,
        self_mask: Tensor | None = None,
        cache: Cache | None = None,
        first_layer: int = 0,
        layout: FlatLayout | None = None,
    ) -> Tensor:
        """Run all blocks over the hidden states and return hidden states of the same shape.

        Args:
            states_BSD: hidden states (B, S, D), or (N, D) with a `layout`.
            context: image keys and values; None skips the cross-attention.
            self_mask: (B, 1, S, keys) bool, for "self_cross" only.
            cache: KV cache that holds the self-attention's keys and values from layer `first_layer` on.
            layout: where flat states lie in the padded batch (not for "self_cross").
        """
        # (B, M) -> (B, 1, 1, M), to broadcast over heads and queries.
        image_mask = None if context is None or context.mask is None else context.mask[:, None, None, :]
        for i, block in enumerate(self.blocks):
            image = None if context is None else (context.keys[i], context.values[i])
            # The trunk's layers come first in the KV cache, then one for each block.
            past = (
                _BlockCache(cache, first_layer + i) if cache is not None and block.self_attention is not None else None
            )
            states_BSD = block(states_BSD, image, image_mask, self_mask, past, layout)
        return states_BSD

    def attention_maps(self, states_BSD: Tensor, context: ImageContext) -> Tensor:
        """Compute the last block's attention over image positions, (B, S, M), for a stack without self-attention."""
        # Run all blocks but the last, then only the attention of that, on its normed input.
        blocks: list[Any] = list(self.blocks)
        *before, last = blocks
        for i, block in enumerate(before):
            states_BSD = block(states_BSD, (context.keys[i], context.values[i]), None, None, None)
        maps: Tensor = last.cross_attention.weights(last.cross_norm(states_BSD), context.keys[-1])
        return maps

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise the weights: normal of variance 1 / inputs, norms at 1, last projections and biases at zero.

        The variance keeps the attention's logits near 1 at any width (LeCun et al. 1998, Efficient BackProp): with
        smaller ones a narrow model attends to all patches alike, and learns late where to look.
        """
        for name, parameter in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "bias")):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                # Drawn on the CPU in float32, then cast: the same weights on every device and in every dtype.
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)

    @torch.no_grad()
    def start_from_projector(self, projector: nn.Module) -> bool:
        """Copy a LLaVA projector into the alignment if the shapes agree; return True if it was copied."""
        linears: list[Any] = list(self.align.linears) if self.align is not None else []
        pairs = [(new, getattr(projector, f"linear_{i}", None)) for i, new in enumerate(linears, 1)]
        # A LLaVA projector is an MLP of two linears; "linear" and "mlp_twice" alignments have one or four.
        if len(pairs) != 2 or any(old is None or old.weight.shape != new.weight.shape for new, old in pairs):
            return False
        for new, old in pairs:
            assert old is not None
            new.weight.copy_(old.weight)
            new.bias.copy_(old.bias if old.bias is not None else torch.zeros_like(new.bias))
        return True
