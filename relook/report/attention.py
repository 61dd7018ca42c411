"""Where the post decoder looked just before a word."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from relook.data.images import Picture
from relook.data.samples import Turn
from relook.model.load import LoadedModel
from relook.train.batches import live_batch
from relook.train.policy import Policy
from relook.tree import Tree


def has_maps(loaded: LoadedModel) -> bool:
    """Whether a model has a post decoder whose attention over an image can be shown."""
    return _looks(_policy(loaded))


def _policy(loaded: LoadedModel) -> Policy:
    """One conversation is not worth the compilation of layers."""
    return Policy(loaded.model.eval(), trunk_pass="dense")


def _looks(policy: Policy) -> bool:
    return policy.reads_image and not policy.keeps_everything


@torch.inference_mode()
def attention_before(
    loaded: LoadedModel, image: Picture, turns: Sequence[Turn], starts: Sequence[int], template: str = ""
) -> list[list[list[float]]]:
    """Attention of the post decoder's last block over the image, averaged over heads, at the states that predict words.

    Args:
        turns: a conversation about the image, whose `<image>` is in its first prompt. The last answer, by whichever
            model, is the one that is looked at.
        starts: character offsets in that answer where words begin.
        template: of the conversation; empty for the model's own.

    Returns:
        For each word a square grid of weights that sum to 1; empty where the model has no cross-attention, or looks at
        more than one square grid of features (the tiles of LLaVA-NeXT).

    Raises:
        DataError: the conversation is none that could be trained on: too long, an empty answer, marks of the template.
    """
    policy = _policy(loaded)
    if not _looks(policy) or policy.post_decoder is None:
        return []
    encoder = loaded.encoder(template)
    row = encoder.learned(turns, [image], "look")
    batch = live_batch(policy, loaded.images, loaded.pad_id, [(Tree.of([row]), [image])])
    trunk = policy.trunk(batch.to(loaded.core.device))
    if trunk.features is None:
        return []
    context = policy.post_decoder.look(trunk.features, trunk.images)
    if context is None:
        return []
    maps = policy.post_decoder.attention_maps(trunk.states, context)[0]
    vision = policy.config.vision_config
    side = vision.image_size // vision.patch_size
    if maps.shape[-1] != side * side:
        return []
    # The targets are the tokens of all answers; those of the last one are what is supervised up to the row's end.
    first = sum(row.supervised) - sum(1 for _ in itertools.takewhile(bool, reversed(row.supervised)))
    text = turns[-1].response
    tokens = encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    # A token's offsets may begin with the space before the word, so the word's token is the one that ends after it.
    places = [next(i for i, (_, end) in enumerate(tokens) if end > start) for start in starts]
    return [maps[int(trunk.targets.slot[first + place])].view(side, side).tolist() for place in places]
