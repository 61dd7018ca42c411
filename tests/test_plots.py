"""Where the post decoder looks: the weights of the model's own forward pass, whatever was said before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.serving import noise
from helpers.tiny import tiny_relook
from test_answering import as_loaded
from torch import Tensor

from relook.data.images import image_from_bytes
from relook.data.samples import Turn
from relook.report.attention_maps import attention_before

FIRST, ANSWER, SECOND = "<image>\nDescribe this image.", "There is a cup.", "Is there a dog in the image?"


@torch.inference_mode()
def by_hand(model: Any, loaded: Any, image: Any, question: str, said: str) -> Tensor:
    """The last block's weights in a plain forward pass over ids written by hand, at the last: (side, side)."""
    got: dict[str, Tensor] = {}
    attention = model.model.post_decoder.blocks[-1].cross_attention
    hook = attention.q_proj.register_forward_hook(lambda module, args, out: got.__setitem__("queries", out))
    look = model.model.post_decoder.image_context
    model.model.post_decoder.image_context = lambda *args: got.setdefault("context", look(*args))
    try:
        before, after = (
            loaded.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in ("USER:", f"{question} ASSISTANT: {said}")
        )
        ids = torch.tensor([[1, *before, *[model.config.image_token_id] * loaded.image_positions, *after]])
        model(input_ids=ids, pixel_values=loaded.images.batch([image])["pixel_values"])
    finally:
        hook.remove()
        del model.model.post_decoder.image_context
    keys = got["context"].keys[-1]  # type: ignore[attr-defined]
    heads = keys.shape[1]
    queries = got["queries"][:, -1:].unflatten(-1, (heads, -1)).transpose(1, 2)
    scores = (queries @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5).softmax(-1)
    side = round(keys.shape[2] ** 0.5)
    return scores.mean(1).view(side, side)


@pytest.mark.parametrize("depth", [1, 2])
def test_maps_are_those_of_the_models_own_pass(depth: int) -> None:
    model = tiny_relook(depth=depth)
    loaded = as_loaded(model)
    image = image_from_bytes(noise(0), 10**6, lambda *_: None)
    [grid] = attention_before(loaded, image, [Turn(FIRST, ANSWER)], [ANSWER.index("cup")])
    torch.testing.assert_close(torch.tensor(grid), by_hand(model, loaded, image, "Describe this image.", "There is a"))


def test_the_last_answer_is_looked_at() -> None:
    loaded = as_loaded(tiny_relook())
    image = image_from_bytes(noise(0), 10**6, lambda *_: None)
    turns = [Turn(FIRST, ANSWER), Turn(SECOND, "No. It looks quite calm.")]
    maps = attention_before(loaded, image, turns, [0, 4])
    alone = attention_before(loaded, image, turns[:1], [0])
    assert torch.tensor(maps).sum((1, 2)) == pytest.approx([1, 1])
    assert torch.tensor(alone[0]).shape == torch.tensor(maps[0]).shape
    assert not torch.allclose(torch.tensor(alone[0]), torch.tensor(maps[0]))


def test_the_picture_as_the_model_sees_it() -> None:
    """A wide picture lies on a square, in the processor's mean colour above and below."""
    loaded = as_loaded(tiny_relook())
    loaded.images.aspect_ratio = "pad"
    side = loaded.core.config.vision_config.image_size
    seen = loaded.images.seen(image_from_bytes(noise(0, (2 * side, side)), 10**6, lambda *_: None))
    assert seen.size == (side, side)
    mean = tuple(int(255 * channel) for channel in loaded.images.image_processor.image_mean)
    assert all(abs(a - b) <= 1 for a, b in zip(seen.getpixel((side // 2, 1)), mean, strict=True))  # type: ignore[arg-type]
