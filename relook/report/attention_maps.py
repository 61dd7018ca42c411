"""Attention maps: where the post decoder looked just before a word."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from relook.data.images import GRID, ImageSource
from relook.data.packing import Tree
from relook.data.samples import Turn
from relook.forward.collate import build_live_batch
from relook.forward.policy import LiveBatch, Policy
from relook.model.families import connector
from relook.model.load import LoadedModel
from relook.model.modeling_relook import reads_tower


def has_attention_maps(loaded: LoadedModel) -> bool:
    """Return True if a model has a post decoder whose attention over an image can be shown.

    Features by learned queries, as Idefics2's, have no place on the picture, and patches before a merger do not lie in
    rows.
    """
    policy = _policy(loaded)
    attends = policy.needs_vision_features and not policy.needs_all_states
    if not attends or (loaded.images.flat and reads_tower(policy.config)):
        return False
    names = [name for name, _ in connector(policy.core.model).named_parameters()]
    return not any(name.endswith(("latents", "query")) for name in names)


def _policy(loaded: LoadedModel) -> Policy:
    # One conversation is not worth the compilation of layers.
    return Policy(loaded.model.eval(), trunk_pass="dense")


def _grid_shape(batch: LiveBatch, features: int) -> tuple[int, int]:
    """Return the rows and columns of the features of a batch's only image; (0, 0) where they are no grid."""
    if GRID in batch.image_inputs:  # which counts patches before the merger
        _, height, width = batch.image_inputs[GRID][0].tolist()
        merged = max(math.isqrt(height * width // features), 1)
        return height // merged, width // merged
    side, pixels = math.isqrt(features), batch.pixel_values
    return (side, side) if pixels is not None and pixels.ndim == 4 and len(pixels) == 1 else (0, 0)


@torch.inference_mode()
def attention_before(
    loaded: LoadedModel, image: ImageSource, turns: Sequence[Turn], starts: Sequence[int], template: str = ""
) -> list[list[list[float]]]:
    """Return the last post decoder block's attention over the image, averaged over heads, where words are predicted.

    Args:
        turns: a conversation about the image, whose `<image>` is in its first prompt. Words are looked up in the
            last answer, whichever model gave it.
        starts: character offsets in that answer where words begin.
        template: of the conversation; empty for the model's own.

    Returns:
        For each word a grid of weights that sum to 1; no grids where `has_attention_maps` says so, or where the image
        is cut into tiles.

    Raises:
        DataError: training would refuse the conversation: too long, an empty answer, marks of the template.
    """
    policy = _policy(loaded)
    if not has_attention_maps(loaded) or policy.post_decoder is None:
        return []
    encoder = loaded.encoder(template)
    row = encoder.learned(turns, [image], "look")
    batch = build_live_batch(policy, loaded.images, loaded.pad_id, [(Tree.of([row]), [image])])
    trunk = policy.trunk(batch.to(loaded.core.device))
    if trunk.features is None:
        return []
    context = policy.post_decoder.image_context(trunk.features, trunk.image_counts)
    if context is None:
        return []
    # trunk.states are the states before each supervised token; maps: (states, image features).
    maps = policy.post_decoder.attention_maps(trunk.states, context)[0]
    shape = _grid_shape(batch, maps.shape[-1])
    if maps.shape[-1] != math.prod(shape):
        return []
    # The targets are the tokens of all answers; those of the last one are what is supervised up to the row's end.
    first = sum(row.supervised) - sum(1 for _ in itertools.takewhile(bool, reversed(row.supervised)))
    text = turns[-1].response
    tokens = encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    # A token's offsets may begin with the space before the word, so the word's token is the one that ends after it.
    positions = [next(i for i, (_, end) in enumerate(tokens) if end > start) for start in starts]
    return [maps[int(trunk.targets.slot[first + position])].view(shape).tolist() for position in positions]
