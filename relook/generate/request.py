"""One answer while it grows: its tokens, when it ends, and which of its characters may be shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from relook.data.images import nbytes
from relook.errors import DataError, RelookError
from relook.generate.sampling import Likely

# ----------------------------------------------------------------------------------------------------
# What the engine is asked, and what it says while it answers.


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


@dataclass(frozen=True)
class Said:
    """A token of an answer, with its log-probability before temperature and top_p, and the likeliest at its place."""

    id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


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


# ----------------------------------------------------------------------------------------------------

UNFINISHED = "\ufffd"  # what a tokenizer writes for the first bytes of a character
WINDOW = 32  # the last tokens, whose text may still change: the text before them is not made again


@dataclass
class AnswerText:
    """The text of an answer; joined, the pieces of it are what `LoadedModel.decode` makes of the whole.

    Args:
        stops: texts that end an answer, and are not part of it.
    """

    tokenizer: Any
    stops: Sequence[str] = ()
    count: int = field(default=0, init=False)
    shown: int = field(default=0, init=False)
    text: str = field(default="", init=False)
    stopped: bool = field(default=False, init=False)
    settled: str = field(default="", init=False)  # the text of the tokens before `start`
    start: int = field(default=0, init=False)

    def read(self, ids: Sequence[int], whole: bool = False) -> None:
        """Take the tokens so far. `whole` makes all of their text again."""
        if len(ids) == self.count and not whole:
            return
        self.count = len(ids)
        text = self._decode(ids) if whole else self.settled + self._decode(ids[self.start :])
        if len(ids) - self.start >= 2 * WINDOW:
            self._settle(text, ids)
        ends = [at for at in map(text.find, self.stops) if at >= 0]
        self.stopped = bool(ends)
        self.text = (text[: min(ends)] if ends else text).lstrip()

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _settle(self, text: str, ids: Sequence[int]) -> None:
        """Go on from the last tokens, where the text ends in what they say by themselves."""
        last = self._decode(ids[-WINDOW:])
        if last and last[-1] != UNFINISHED and text.endswith(last):
            self.settled, self.start = text[: len(text) - len(last)], len(ids) - WINDOW

    def more(self, whole: bool) -> str:
        """The characters that can be shown and have not been. Before the end, whatever may still change is held back:
        space at the end, half a character, the beginning of a stop."""
        safe = self.text
        if not whole:
            held = max((_overlap(safe, stop) for stop in self.stops), default=0)
            safe = safe[: len(safe) - held].rstrip().rstrip(UNFINISHED)
        more = safe.rstrip()[self.shown :]
        self.shown += len(more)
        return more


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text a stop may begin with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass
class Answer:
    """A request on its way. The engine's thread owns it; `cancel` may be called from any.

    Args:
        emit: takes the events, and must not wait.
        ends: tokens that end it.
        most: tokens that it may have.
        until: when it must be whole, by the monotonic clock.
    """

    request: Request
    emit: Callable[[Event], None]
    text: AnswerText
    ends: frozenset[int]
    most: int
    until: float
    reused: int = 0
    said: list[Said] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    reported: int = 0
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True

    def over(self, now: float) -> bool:
        """Whether nobody waits for it any more."""
        return self.cancelled or now > self.until

    def take(self, token: int, likely: Likely | None, reused: int) -> bool:
        """Take the next token and tell what is new. Returns whether the answer ends."""
        self.reused = reused
        finish = self.add(Said(token) if likely is None else Said(token, likely[0], tuple(likely[1])))
        if finish or self.request.stream:
            self.report(finish)
        return bool(finish)

    def add(self, said: Said) -> str:
        """Take the next token: why the answer ends with it, if it does."""
        self.said.append(said)
        self.ids.append(said.id)
        if said.id in self.ends:
            return "stop"
        if self.text.stops:
            self.text.read(self.ids)
            if self.text.stopped:
                return "stop"
        return "length" if len(self.said) == self.most else ""

    def report(self, finish: str = "") -> None:
        """Tell what is new."""
        self.text.read(self.ids, whole=bool(finish))
        shown = len(self.said) - (finish == "stop" and self.said[-1].id in self.ends)
        tokens = tuple(self.said[self.reported : shown])
        self.reported = shown
        self.emit(Event(self.text.more(bool(finish)), tokens, finish, self.reused))
