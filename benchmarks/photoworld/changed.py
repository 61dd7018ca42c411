"""relook's command with changes to what trunk and post decoder see: the world's low resolution, and the controls.

    python benchmarks/photoworld/changed.py CHANGE ... -- train RECIPE ...

- trunk_pixels=N: the trunk sees each picture at 1 / N of its resolution, the post decoder all of it. The tower runs
  twice; its features of both lie side by side, and each reader gets its half (the other half is zero).
- own_pixels: the post decoder reads the trunk's half, too.
- other_image: it sees the features of another image of the batch (with one image alone: of the last).
- similar_image: of another image, the most similar of the latest ones: mostly the same setting.
- projected: it reads the projector's output as it is; of the alignment only the norm trains. For
  `post_decoder_init: projector`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from relook.cli import main
from relook.model.post_decoder import Alignment, PostDecoder

LAYER = -2  # of the tower, LLaVA's
BOTH = [1, 2]  # where the coarse and the sharp features then lie, by the model's config
LATEST = 256  # images among which a similar one is looked for
_align = Alignment.forward
_scale = 1  # of the trunk's pictures


def coarse(pixels: Tensor, scale: int) -> Tensor:
    """Return pictures (B, 3, H, W) of the same size that hold what 1 / scale of the resolution does."""
    side = pixels.shape[-1]
    small = F.interpolate(pixels.float(), size=side // scale, mode="bilinear", antialias=True)
    return F.interpolate(small, size=side, mode="bilinear").to(pixels.dtype)


def half(features: Tensor, second: bool) -> Tensor:
    """Return the coarse or the sharp half of features (..., 2 V), with zeros behind it."""
    chosen = features.chunk(2, -1)[second]
    return torch.cat([chosen, torch.zeros_like(chosen)], -1)


def trunk_pixels(scale: str | int) -> None:
    global _scale
    if _scale > 1:
        return
    _scale = int(scale)
    encode, project = CLIPVisionModel.forward, LlavaMultiModalProjector.forward

    def forward(self: CLIPVisionModel, pixel_values: Tensor, **kwargs: Any) -> Any:
        kwargs |= {"output_hidden_states": True, "return_dict": True}
        outputs = encode(self, pixel_values, **kwargs)
        blurred = encode(self, coarse(pixel_values, _scale), **kwargs)
        sharp = outputs.hidden_states[LAYER]
        outputs.hidden_states = (sharp, blurred.hidden_states[LAYER], sharp)  # the config reads 1 and 2 (BOTH)
        return outputs

    CLIPVisionModel.forward = forward  # type: ignore[method-assign]
    LlavaMultiModalProjector.forward = lambda self, features: project(self, half(features, False))
    Alignment.forward = lambda self, features: _align(self, half(features, True))  # type: ignore[method-assign]


def own_pixels() -> None:
    if _scale > 1:
        Alignment.forward = lambda self, features: _align(self, half(features, False))  # type: ignore[method-assign]


def other_image() -> None:
    original = PostDecoder.image_context
    recent: list[Tensor] = []  # features of the two latest images that came alone

    def image_context(self: PostDecoder, features: Sequence[Tensor], per_row: list[int]) -> Any:
        if len(features) > 1:
            return original(self, [*features[1:], features[0]], per_row)
        others = [other for other in recent if not torch.equal(other, features[0])]
        recent[:] = [*others, *features][-2:]
        return original(self, others[-1:] or features, per_row)

    PostDecoder.image_context = image_context  # type: ignore[method-assign]


def similar_image() -> None:
    original = PostDecoder.image_context
    recent: list[Tensor] = []

    def image_context(self: PostDecoder, features: Sequence[Tensor], per_row: list[int]) -> Any:
        recent[:] = [*recent, *features][-LATEST:]
        # The mean over patches says where a picture was taken: (images, V) against (latest, V).
        own, others = (torch.stack([f.float().mean(0) for f in side]) for side in (features, recent))
        likeness = F.normalize(own - others.mean(0), dim=-1) @ F.normalize(others - others.mean(0), dim=-1).T
        likeness[likeness > 0.9999] = -1  # the image itself
        return original(self, [recent[i] for i in likeness.argmax(1).tolist()], per_row)

    PostDecoder.image_context = image_context  # type: ignore[method-assign]


def projected() -> None:
    def forward(self: Alignment, features: Tensor) -> Tensor:
        features = half(features, False) if _scale > 1 else features
        for number, linear in enumerate(self.linears):
            features = linear(features if number == 0 else self.activation(features))
        normed: Tensor = self.norm(features.detach())
        return normed

    Alignment.forward = forward  # type: ignore[method-assign]


CHANGES: dict[str, Callable[..., None]] = {
    change.__name__: change for change in (trunk_pixels, own_pixels, other_image, similar_image, projected)
}

if __name__ == "__main__":
    end = sys.argv.index("--")
    for word in sys.argv[1:end]:
        name, *argument = word.split("=")
        CHANGES[name](*argument)
    sys.argv[1 : end + 1] = []
    main()
