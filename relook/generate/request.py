"""A request to the engine, and its answer while it grows: when it ends, and which of its text may be shown."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from relook.data.encode import Placeholders, placeholder_count
from relook.data.images import nbytes
from relook.errors import DataError, RelookError
from relook.generate.sampling import TokenLogprobs
from relook.model.tokenizer import EACH_BYTE, UTF8

# ----------------------------------------------------------------------------------------------------
# What the engine is asked for, and what it reports while it answers.


@dataclass(frozen=True)
class ProcessedImage:
    """An image as the model reads it.

    Args:
        key: hash of its bytes; images of the same key are the same.
        inputs: outputs of the image processor (`ImageLoader.inputs`).
        placeholders: how a prompt shows it.
    """

    key: str
    inputs: dict[str, Tensor]
    placeholders: Placeholders

    @property
    def positions(self) -> int:
        """Return the number of its placeholders; it takes some more where there are texts between them."""
        return placeholder_count(self.placeholders)

    @property
    def nbytes(self) -> int:
        return nbytes(self.inputs)


@dataclass(frozen=True)
class Request:
    """A request for one answer.

    Args:
        ids: the prompt, as `Engine.prompt` encodes it.
        images: the images of its placeholders, in order.
        temperature: 0 takes the most likely token.
        top_p: of sampling: the smallest set of tokens that is as likely together.
        seed: of sampling. The same seed draws the same answer, whatever else is being answered.
        stop: texts that end the answer, and are not part of it.
        logprobs: whether each token comes with its log-probability; `top` says with how many of the likeliest others.
        stream: report events as the answer grows; otherwise one, at its end.
        until: deadline by the monotonic clock; 0 for the engine's `seconds` after it is queued.
    """

    ids: tuple[int, ...]
    images: tuple[ProcessedImage, ...] = ()
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
class TokenOutput:
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
    """News of an answer.

    Args:
        finish: on the last event: "stop", "length", "timeout" or "error".
        reused: positions of the prompt that were in memory already, known once it is read.
    """

    text: str = ""
    tokens: tuple[TokenOutput, ...] = field(default=())
    finish: str = ""
    reused: int = 0

    def then(self, later: Event) -> Event:
        """Return the news of both."""
        return Event(self.text + later.text, self.tokens + later.tokens, later.finish, later.reused)


@dataclass(frozen=True)
class EngineLimits:
    """Limits of an engine.

    Args:
        slots: answers that grow at the same time.
        waiting: requests that may wait for a slot; one more is refused.
        length: longest prompt with its answer, in positions; 0 is what the language model was made for.
        cache_gb: memory for keys and values of all slots; `length` is reduced to fit into it.
        image_gb: memory for the features of recent images.
        seconds: longest time from a request's arrival to its answer's end.
        max_pixels: largest image.
    """

    slots: int = 16
    waiting: int = 128
    length: int = 0
    cache_gb: float = 8.0
    image_gb: float = 1.0
    seconds: float = 300.0
    max_pixels: int = 40_000_000


class QueueFull(RelookError):
    """The queue is full, or the engine is stopping."""


class ContextTooLong(DataError):
    """A conversation that leaves no room for an answer."""


# ----------------------------------------------------------------------------------------------------


@dataclass
class IncrementalText:
    """The text of an answer while it grows: its tokens' bytes as UTF-8, up to a stop, without white space around it.

    Args:
        token_bytes: returns the bytes that a token adds, as `relook.model.tokenizer.token_bytes` gives it.
        stops: texts that end an answer, and are not part of it.
    """

    token_bytes: Callable[[int], bytes]
    stops: Sequence[str] = ()
    stopped: bool = field(default=False, init=False)
    _raw: str = field(default="", init=False)
    _ends: list[int] = field(default_factory=list, init=False)  # characters of `_raw` up to each token's end
    _before: list[bytes] = field(default_factory=list, init=False)  # an unfinished character before each token
    _last: int = field(default=0, init=False)  # index of the last token that has bytes
    _begun: bool = field(default=False, init=False)
    _shown: int = field(default=0, init=False)
    _utf8: codecs.IncrementalDecoder = field(default_factory=lambda: UTF8(EACH_BYTE), init=False)

    def add(self, id: int) -> None:
        """Take the next token."""
        # Byte tokens make a character together; what is unfinished stays in the decoder's state.
        data = self.token_bytes(id)
        self._before.append(self._utf8.getstate()[0])
        # A token that begins a new character: the unfinished one before it will never be whole.
        if not _continues(data):
            self._give_up()
        self._write(self._utf8.decode(data))
        if data:
            self._last = len(self._ends)
        self._ends.append(len(self._raw))

    def _give_up(self) -> None:
        """Write a character that stays unfinished as U+FFFD, the text of its tokens."""
        self._write(self._utf8.decode(b"", final=True))
        # It belongs to the last token with bytes: special tokens behind that one write nothing.
        self._ends[self._last :] = [len(self._raw)] * len(self._ends[self._last :])

    def _write(self, new: str) -> None:
        if self.stopped:
            return
        if new and not self._begun:  # a tokenizer drops the leading space too
            new, self._begun = new.removeprefix(" "), True
        old, self._raw = len(self._raw), self._raw + new
        # A stop may begin in the text before; it ends in the new one.
        stops = [at for stop in self.stops if (at := self._raw.find(stop, max(0, old - len(stop) + 1))) >= 0]
        if stops:
            self._raw, self.stopped = self._raw[: min(stops)], True

    @property
    def raw(self) -> str:
        """Return the text up to here, with the white space around it."""
        return self._raw

    def more(self, final: bool) -> str:
        """Return the characters that can be shown and have not been. Before the end, whatever may still change is held
        back: space at the end, half a character, the beginning of a stop."""
        withheld = 0
        if final:
            self._give_up()
        else:
            withheld = max((_overlap(self._raw, stop) for stop in self.stops), default=0)
        shown = self._raw[: len(self._raw) - withheld].strip()[self._shown :]
        self._shown += len(shown)
        return shown

    @property
    def _lead(self) -> int:
        """White space at the front, which is never shown."""
        return len(self._raw) - len(self._raw.lstrip())

    def settled(self, first: int) -> int:
        """Count the tokens of which all is shown that will be; the first ones are known to be such."""
        limit = self._lead + self._shown
        # A token that ends with the shown text and wrote none of it may be the beginning of a character, or of a stop.
        unsettled = (i for i in range(first, len(self._ends)) if self._ends[i] > limit or self._start(i) == limit)
        return next(unsettled, len(self._ends))

    def token(self, index: int, id: int) -> tuple[str, bytes]:
        """Return the part of the shown text that a token wrote, and its bytes. Joined, both are the shown text."""
        start, end, lead = self._start(index), self._ends[index], self._lead
        # Only what was shown counts: white space at either end, or a stop, may cut a token.
        limit = lead + self._shown
        if start >= limit:  # a stop, or space at the end
            return "", b""
        text = self._raw[max(start, lead) : min(end, limit)]
        # The token's own bytes where they are the text's; else the text's: a cut token has other bytes.
        written, data = self.instead(index, id)
        return text, text.encode() if written.encode() == data else data

    def instead(self, index: int, id: int) -> tuple[str, bytes]:
        """Return the text that a token would have written at a place, and its bytes. Of a character's tokens, the last
        writes it."""
        data = self.token_bytes(id)
        text = UTF8(EACH_BYTE).decode(self._before[index] + data if _continues(data) else data)
        if self._start(index) > self._lead:
            return text, data
        return text.lstrip(), text.lstrip().encode() if text.encode() == data else data.lstrip()

    def _start(self, index: int) -> int:
        return self._ends[index - 1] if index else 0


def _continues(data: bytes) -> bool:
    """Return True if bytes may belong to a character that began before them; no bytes at all change nothing."""
    return not data or data[0] & 0xC0 == 0x80


def _overlap(text: str, stop: str) -> int:
    """Return the number of characters at the end of a text with which a stop may begin."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


@dataclass
class ActiveRequest:
    """A request that waits or is answered. The engine's thread owns it; `cancel` may be called from any.

    Args:
        emit: receives the events; it must not block.
        ends: tokens that end the answer.
        max_new_tokens: tokens that it may have.
        until: deadline by the monotonic clock.
    """

    request: Request
    emit: Callable[[Event], None]
    text: IncrementalText
    ends: frozenset[int]
    max_new_tokens: int
    until: float
    reused: int = 0
    tokens: list[TokenOutput] = field(default_factory=list)
    reported: int = 0
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True

    def over(self, now: float) -> bool:
        """Return True if nobody waits for the answer any more."""
        return self.cancelled or now > self.until

    def take(self, id: int, logprobs: TokenLogprobs | None, reused: int) -> bool:
        """Take the next token and report what is new. Return True if the answer ends."""
        self.reused = reused
        finish = self.add(TokenOutput(id) if logprobs is None else TokenOutput(id, logprobs[0], tuple(logprobs[1])))
        if finish or self.request.stream:
            self.report(finish)
        return bool(finish)

    def add(self, token: TokenOutput) -> str:
        """Take the next token. Return why the answer ends with it, or nothing if it goes on."""
        self.tokens.append(token)
        self.text.add(token.id)
        if token.id in self.ends or self.text.stopped:
            return "stop"
        return "length" if len(self.tokens) == self.max_new_tokens else ""

    def report(self, finish: str = "") -> None:
        """Report what is new: text that can be shown, and the tokens that wrote it."""
        text = self.text.more(bool(finish))
        # The end-of-text token is no text, and is not reported as a token of the answer.
        if finish:
            settled = len(self.tokens) - (finish == "stop" and self.tokens[-1].id in self.ends)
        else:
            settled = self.text.settled(self.reported)
        # Text and tokens are reported together, so that the tokens' texts always join to what was shown.
        tokens = tuple(self._written(i) for i in range(self.reported, settled))
        self.reported = settled
        self.emit(Event(text, tokens, finish, self.reused))

    def _written(self, index: int) -> TokenOutput:
        """Return a token, with its text where log-probabilities are requested."""
        token = self.tokens[index]
        if not self.request.logprobs:
            return token
        written = self.text.token(index, token.id)
        alternatives = (written if id == token.id else self.text.instead(index, id) for id, _ in token.top)
        return replace(token, written=(written, *alternatives))
