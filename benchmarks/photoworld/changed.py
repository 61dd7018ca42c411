"""relook's command with one change to the post decoder's look: the controls of photoworld's study.

    python benchmarks/photoworld/changed.py CHANGE -- train RECIPE ...

- other_image: the post decoder sees the features of another image of the batch (with one image alone: of the last).
- projected: it reads the projector's output as it is; of the alignment only the norm trains. For
  `post_decoder_init: projector`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from relook.cli import main
from relook.model.post_decoder import Alignment, PostDecoder


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


def projected() -> None:
    def forward(self: Alignment, features: Tensor) -> Tensor:
        for number, linear in enumerate(self.linears):
            features = linear(features if number == 0 else self.activation(features))
        normed: Tensor = self.norm(features.detach())
        return normed

    Alignment.forward = forward  # type: ignore[method-assign]


CHANGES: dict[str, Callable[[], None]] = {"other_image": other_image, "projected": projected}

if __name__ == "__main__":
    end = sys.argv.index("--")
    for name in sys.argv[1:end]:
        CHANGES[name]()
    sys.argv[1 : end + 1] = []
    main()
