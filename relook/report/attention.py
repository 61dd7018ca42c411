"""Where the post decoder looked just before a word."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from relook.data.encode import Example
from relook.data.prompts import with_image
from relook.data.samples import Conversation, Turn
from relook.model.load import LoadedModel
from relook.train.batches import Collator, Item
from relook.train.policy import Policy


@torch.inference_mode()
def attention_before(
    loaded: LoadedModel, image: Path, prompt: str, text: str, starts: Sequence[int]
) -> list[list[list[float]]]:
    """Attention of the post decoder's last block over the image, averaged over heads, at the states that predict words.

    Args:
        text: a description of the image, by whichever model.
        starts: character offsets in `text` where words begin.

    Returns:
        For each word a square grid of weights that sum to 1; empty where the model has no cross-attention, or looks at
        more than one square grid of features (the tiles of LLaVA-NeXT).
    """
    policy = Policy(loaded.model.eval())
    if not policy.reads_image or policy.keeps_everything or policy.post_decoder is None:
        return []
    encoder = loaded.encoder()
    example: Example = encoder.conversation(Conversation("look", (image,), (Turn(with_image(prompt), text),)))
    collator = Collator(policy, loaded.images, loaded.pad_id)
    trunk = policy.trunk(collator.live([Item(example)]).to(loaded.core.device))
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
    tokens = encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    # A token's offsets may begin with the space before the word, so the word's token is the one that ends after it.
    places = [next(i for i, (_, end) in enumerate(tokens) if end > start) for start in starts]
    return [maps[int(trunk.targets.slot[place])].view(side, side).tolist() for place in places]
