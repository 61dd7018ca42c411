"""One text while it is generated, and the part of the pool that its keys and values lie in."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from relook.generate.sampling import TokenLogprobs

ImageKey = Hashable  # identifies an image, and with it the image's features
ImageInputs = dict[str, Tensor]  # outputs of the image processor for one image (`ImageLoader.inputs`)
ImageFeatures = tuple[Tensor, Tensor | None]  # projected (P, D), and what the post decoder reads, (M, V)


@dataclass(eq=False)
class Extent:
    """Neighbouring cells of the pool that hold one text from its position `start` on.

    The positions before `start` lie in `base`, the extent of another text. An extent may outlive its text, so that
    later texts can begin with it, until the cells are needed.

    Attributes:
        ids: of all positions up to the last one that lies here, as far as the host knows them.
        image: first cell and length in the post decoder's image pool.
        filled: positions whose keys and values are here once all launched passes are done.
        users: texts that read the extent now, and extents that continue it.
        last_used: the step in which a text last read it.
        outlives: whether it stays once its text has ended.
    """

    images: tuple[ImageKey, ...]
    ids: tuple[int, ...]
    first: int
    size: int
    base: Extent | None = None
    start: int = 0
    image: tuple[int, int] = (0, 0)
    filled: int = 0
    users: int = 1
    last_used: int = 0
    outlives: bool = True


@dataclass(eq=False)
class Text:
    """A prompt, and the answer that grows on it.

    Args:
        ids: of the prompt.
        images: keys of the images of its placeholders, in order.
        max_new_tokens: tokens that the answer may have.
        on_token: called with each token once the host has read it, and with its log-probabilities where `top` asks for
            them; returns whether the answer ends there.
        temperature, top_k, top_p: of sampling; temperature 0 takes the most likely token.
        draws: (max_new_tokens,) uniform numbers in [0, 1) for sampling.
        top: number of likeliest tokens to report with each token and its log-probability; -1 reports neither.
        image_inputs: by image; needed until the prompt is read.
        max_shared: positions at most that are shared with another text, for a caller that knows what a whole group has
            in common; the group then reads it in one go.
    """

    ids: tuple[int, ...]
    images: tuple[ImageKey, ...]
    max_new_tokens: int
    on_token: Callable[[int, TokenLogprobs | None], bool]
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    draws: Tensor | None = None
    top: int = -1
    image_inputs: Mapping[Any, ImageInputs] = field(default_factory=dict)
    max_shared: int | None = None
    # (3, prompt) position numbers in a model with M-RoPE, set when the text is admitted; None where they count tokens.
    positions: Tensor | None = field(default=None, init=False)
    extent: Extent = field(init=False)  # set when the text is admitted
    reused: int = field(default=0, init=False)  # positions of the prompt that were in the pool already
    read: int = field(default=0, init=False)  # positions of the prompt whose reading is launched
    launched: int = field(default=0, init=False)  # tokens that the device was told to choose
    row: int = field(default=0, init=False)  # index of its last token on the device
    tokens: list[int] = field(default_factory=list, init=False)  # those that the host has read
    ended: bool = field(default=False, init=False)
    failed: bool = field(default=False, init=False)  # it ended because a pass failed or its logits were NaN or inf

    @property
    def base(self) -> Extent | None:
        """Return the extent that holds the first `shared` positions."""
        return self.extent.base

    @property
    def shared(self) -> int:
        """Return the number of positions that lie in another text's extent."""
        return self.extent.start

    @property
    def written(self) -> int:
        """Return the cells of its own extent that are written once all launched steps are done."""
        return len(self.ids) - self.shared + self.launched - 1

    @property
    def is_launched(self) -> bool:
        """Return True if the device was told to choose every token that the answer may have."""
        return self.launched >= self.max_new_tokens

    @property
    def next_position(self) -> int:
        """Return the position number of the first token of the answer; those after it count on."""
        return len(self.ids) if self.positions is None else int(self.positions.max()) + 1

    def fail(self) -> None:
        """End the text because its pass failed; nothing is known of what the pass wrote."""
        self.failed = not self.ended
        self.ended = True
        self.launched = min(self.launched, 1)


class PromptChunk(NamedTuple):
    """Positions start:end of a text's prompt, which one pass reads."""

    text: Text
    start: int
    end: int
