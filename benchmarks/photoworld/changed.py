"""relook's command with changes to what trunk and post decoder see: the world's few tokens, and the controls.

    python benchmarks/photoworld/changed.py CHANGE ... -- train RECIPE ...

- trunk_grid=N: the trunk sees the projector's output averaged over N x N cells, each repeated where its patches were.
  The post decoder sees all patches.
- own_tokens: the post decoder reads averages over the trunk's cells, too.
- other_image: it sees the features of another image of the batch (with one image alone: of the last).
- similar_image: of another image, the most similar of the latest ones: mostly the same setting.
- projected: it reads the projector's output on all patches as it is; of the alignment only the norm trains. For
  `post_decoder_init: projector`.
- uncompiled: the engine compiles nothing: a small model's few answers are given before its layers are compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partialmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from relook.cli import main
from relook.generate.model_runner import ModelRunner
from relook.model.post_decoder import Alignment, PostDecoder

LATEST = 256  # images among which a similar one is looked for
project = LlavaMultiModalProjector.forward  # one patch at a time
_align = Alignment.forward
_grid = 0  # cells of the trunk's picture a side; 0: its patches


def averaged(features: Tensor, cells: int) -> Tensor:
    """Average features (B, M, D) of M = side x side patches over cells x cells, and repeat each average in its cell."""
    side = round(features.shape[1] ** 0.5)
    picture = features.transpose(1, 2).unflatten(2, (side, side))
    means = F.adaptive_avg_pool2d(picture, cells)
    return F.interpolate(means, size=(side, side), mode="nearest").flatten(2).transpose(1, 2)


def trunk_grid(cells: str | int) -> None:
    global _grid
    _grid = int(cells)
    LlavaMultiModalProjector.forward = lambda self, features: averaged(project(self, features), _grid)


def own_tokens() -> None:
    if _grid:
        Alignment.forward = lambda self, features: averaged(_align(self, features), _grid)  # type: ignore[method-assign]


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
        for number, linear in enumerate(self.linears):
            features = linear(features if number == 0 else self.activation(features))
        normed: Tensor = self.norm(features.detach())
        return normed

    Alignment.forward = forward  # type: ignore[method-assign]


def uncompiled() -> None:
    ModelRunner.__init__ = partialmethod(ModelRunner.__init__, compiled=False)  # type: ignore[method-assign, assignment]


CHANGES: dict[str, Callable[..., None]] = {
    change.__name__: change for change in (trunk_grid, own_tokens, other_image, similar_image, projected, uncompiled)
}

if __name__ == "__main__":
    end = sys.argv.index("--")
    for word in sys.argv[1:end]:
        name, *argument = word.split("=")
        CHANGES[name](*argument)
    sys.argv[1 : end + 1] = []
    main()
