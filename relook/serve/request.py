"""What the engine is asked, and what it says while it answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from relook.data.images import nbytes
from relook.errors import DataError, RelookError


@dataclass(frozen=True)
class ReadImage:
    """An image as the model takes it.

    Args:
        key: hash of its bytes; images of the same key are the same.
        inputs: what the image processor made of it, without a batch dimension.
        positions: that it takes in a prompt.
    """

    key: str
    inputs: dict[str, Tensor]
    positions: int

    @property
    def nbytes(self) -> int:
        return nbytes(self.inputs)


@dataclass(frozen=True)
class Request:
    """One answer that is wanted.

    Args:
        ids: the prompt, as `Engine.prompt` makes it.
        images: those of its placeholders, in order.
        temperature: 0 takes the most likely token.
        top_p: of sampling: the smallest set of tokens that is as likely together.
        seed: of sampling. The same seed draws the same answer, whatever else is being answered.
        stop: texts that end the answer, and are not part of it.
        logprobs: whether each token comes with its log-probability; `top` says with how many of the likeliest others.
        stream: events as the answer grows; else one, at its end.
        until: when it must be whole, by the monotonic clock; 0 for the engine's `seconds` after it is queued.
    """

    ids: tuple[int, ...]
    images: tuple[ReadImage, ...] = ()
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    logprobs: bool = False
    top: int = 0
    stream: bool = True
    until: float = 0.0


@dataclass(frozen=True)
class Said:
    """A token of an answer, with its log-probability before temperature and top_p, and the likeliest at its place.

    Args:
        written: text and bytes that it added to the answer, then those that each of `top` would have added.
    """

    id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()
    written: tuple[tuple[str, bytes], ...] = ()


@dataclass(frozen=True)
class Event:
    """What is new of an answer.

    Args:
        finish: on the last event: "stop", "length", "timeout" or "error".
        reused: positions of the prompt that were in memory already, once it has been read.
    """

    text: str = ""
    tokens: tuple[Said, ...] = field(default=())
    finish: str = ""
    reused: int = 0


@dataclass(frozen=True)
class Limits:
    """What an engine may take.

    Args:
        slots: answers at the same time.
        waiting: requests that may wait for a slot; one more is refused.
        length: longest prompt with its answer, in positions; 0 is what the language model was made for.
        cache_gb: memory for keys and values of all slots: `length` is made smaller to keep to it.
        image_gb: memory for what the vision tower said of recent images.
        seconds: from a request's arrival to its answer's end.
        max_pixels: of an image.
    """

    slots: int = 16
    waiting: int = 128
    length: int = 0
    cache_gb: float = 8.0
    image_gb: float = 1.0
    seconds: float = 300.0
    max_pixels: int = 40_000_000


class Busy(RelookError):
    """The queue is full, or the engine is stopping."""


class TooLong(DataError):
    """A conversation that leaves no room for an answer."""
