"""Chat requests to requests of the engine, and the engine's events to OpenAI's responses."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar
from weakref import WeakKeyDictionary

from relook.data.samples import Turn
from relook.data.templates import IMAGE, interleave, with_image
from relook.errors import DataError
from relook.generate.engine import Engine
from relook.generate.request import (
    ActiveRequest,
    ContextTooLong,
    Event,
    ProcessedImage,
    QueueFull,
    Request,
    TokenOutput,
)
from relook.serve.media import ImageSources
from relook.serve.protocol import (
    APIError,
    ChatRequest,
    Choice,
    Chunk,
    ChunkChoice,
    Completion,
    Delta,
    Logprobs,
    Message,
    PromptDetails,
    ResponseMessage,
    TextPart,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from relook.serve.threads import Readers, on

CONTEXT = "context_length_exceeded"  # OpenAI's error code
GREEDY_BELOW = 1e-4  # temperature; logits divided by less overflow


async def read_request(
    engine: Engine, body: ChatRequest, sources: ImageSources, max_images: int, until: float, readers: Readers
) -> list[Request]:
    """Convert a chat request into requests of the engine, one for each of the `n` answers.

    Args:
        until: deadline by the monotonic clock.

    Raises:
        APIError: what is wrong with the request.
    """
    # OpenAI refuses these combinations, too: a client that sends one expects something that will not come.
    for name, effective, needed in (
        ("top_logprobs", body.top_logprobs, "logprobs"),
        ("stream_options", body.stream_options and body.stream_options.include_usage, "stream"),
    ):
        if effective and not getattr(body, needed):
            raise APIError(400, f"It is of no use without {needed}.", param=name)
    images: list[ProcessedImage] = []
    try:
        async with asyncio.timeout(until - time.monotonic()):
            turns, urls = await on(readers.texts, read_turns, body.messages)
            if len(urls) > max_images:
                error = f"The conversation has {len(urls)} images, more than {max_images}."
                raise APIError(400, error, "too_many_images")
            # One image at a time: a conversation that is too long is refused before its later images are decoded.
            for parameter, url in urls:
                try:
                    data = await on(readers.fetches, sources.read, url)
                    images.append(await on(readers.decodes, engine.image, data))
                except DataError as error:
                    raise APIError(400, str(error), "invalid_message", parameter) from None
                engine.check_length(sum(image.positions for image in images))  # before more of them are decoded
            ids = await on(readers.texts, engine.prompt, turns, images)
    except TimeoutError:
        # Fetching and decoding count towards the request's time, as waiting and answering do.
        raise APIError(504, "The answer was not ready in time.", "timeout") from None
    except ContextTooLong as error:
        raise APIError(400, str(error), CONTEXT, "messages") from None
    except DataError as error:
        raise APIError(400, str(error), "invalid_message", "messages") from None
    # OpenAI's defaults, which clients rely on when they leave these out.
    temperature = 1.0 if body.temperature is None else body.temperature
    stop = body.stop or ()
    first = Request(
        ids,
        tuple(images),
        body.max_completion_tokens or body.max_tokens or engine.length,
        temperature if temperature >= GREEDY_BELOW else 0.0,
        1.0 if body.top_p is None else body.top_p,
        secrets.randbits(31) if body.seed is None else body.seed,
        (stop,) if isinstance(stop, str) else tuple(stop),
        bool(body.logprobs),
        body.top_logprobs or 0,
        bool(body.stream),
        until,
    )
    # Each of the `n` answers has a seed of its own; the engine reads their common prompt once.
    return [replace(first, seed=first.seed + i) for i in range(body.n or 1)]


def read_turns(messages: Sequence[Message]) -> tuple[list[Turn], list[tuple[str, str]]]:
    """Read a conversation's turns, and its images in order: where each stands in the request, and its URL.

    A turn's prompt is all that comes before an answer, a line for each text; it is empty before an answer that follows
    nothing, such as a greeting. So a system message stands before the first text of the user: the templates have a
    system text of their own, which the model was tuned with. A turn's images stand before its text, as LLaVA was
    trained, unless a text stands between two of them (`interleave`).

    Raises:
        APIError: a message that cannot be part of such a turn; it is named.
    """
    turns: list[Turn] = []
    urls: list[tuple[str, str]] = []
    parts_of_turn: list[str] = []  # texts and placeholders

    def prompt() -> str:
        return with_image(interleave(parts_of_turn, "\n"), parts_of_turn.count(IMAGE))

    for i, message in enumerate(messages):
        parts = []
        for j, part in enumerate(message.content):
            parameter = f"messages.{i}.content" + f".{j}.{part.type}" * (len(message.content) > 1)
            if isinstance(part, TextPart):
                # A placeholder typed by a client would shift the images of the prompt.
                if IMAGE in part.text:
                    wrong = f"A text may not hold {IMAGE}: send images as image_url."
                    raise APIError(400, wrong, "invalid_message", parameter)
                parts.append(part.text)
            elif message.role != "user":
                raise APIError(400, "Only the user's messages may hold images.", "invalid_message", parameter)
            else:
                urls.append((f"messages.{i}.content.{j}.image_url", part.image_url.url))
                parts.append(IMAGE)
        if message.role == "assistant":
            # An answer closes the turn: what comes next belongs to a new one.
            turns.append(Turn(prompt(), "\n".join(parts)))
            parts_of_turn = []
        else:
            parts_of_turn += parts
    if not parts_of_turn:
        raise APIError(400, "The last message must not be the assistant's.", "invalid_message", "messages")
    return [*turns, Turn(prompt(), "")], urls


FAILURES = {
    "timeout": (504, "The answer was not ready in time.", "timeout"),
    "error": (500, "The model failed on this request.", "failed"),
}


class _LoopInbox:
    """What engines' threads hand to an event loop, which wakes up once for all that waits.

    To wake it is a system call, at which a thread lets go of the interpreter: once a token, the loop would keep it from
    launching the next step.
    """

    _of_loop: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, _LoopInbox]] = WeakKeyDictionary()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._waiting, self._is_waking = weakref.ref(loop), deque[Callable[[], None]](), False

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> _LoopInbox:
        """Return a loop's inbox."""
        return cls._of_loop.setdefault(loop, cls(loop))

    def call(self, function: Callable[[], None]) -> None:
        """Have the loop call a function; may be called from any thread."""
        self._waiting.append(function)
        loop = self._loop()
        if not self._is_waking and loop is not None:
            self._is_waking = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(self._call_all)

    def _call_all(self) -> None:
        self._is_waking = False  # before the first is taken: what comes from now on wakes the loop again
        while self._waiting:
            self._waiting.popleft()()


class AnswerStream:
    """The answers to requests, of one engine or several, as an asynchronous stream of (index, event).

    Where the loop lags behind an engine, the events that wait of one answer are joined.
    """

    def __init__(self, requests: Sequence[tuple[Engine, Request]]) -> None:
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        # Engines emit on their own threads; the queue belongs to the event loop.
        inbox = _LoopInbox.of(asyncio.get_running_loop())

        def emit_as(index: int) -> Callable[[Event], None]:
            return lambda event: inbox.call(partial(self.events.put_nowait, (index, event)))

        self.answers: list[ActiveRequest] = []
        try:
            for i, (engine, request) in enumerate(requests):
                self.answers.append(engine.submit(request, emit_as(i)))
        # All or nothing: answers that were queued already have nobody to read them.
        except QueueFull as error:
            self.cancel()
            raise APIError(429, str(error), "busy") from None

    def cancel(self) -> None:
        for answer in self.answers:
            answer.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        running = len(self.answers)
        try:
            while running:
                waiting = [await self.events.get()]
                while not self.events.empty():
                    waiting.append(self.events.get_nowait())
                failure = next((FAILURES[event.finish] for _, event in waiting if event.finish in FAILURES), None)
                joined: dict[int, Event] = {}
                for index, event in waiting:
                    if event.finish not in FAILURES:
                        joined[index] = joined[index].then(event) if index in joined else event
                for index, event in joined.items():
                    running -= bool(event.finish)
                    yield index, event
                if failure is not None:
                    raise APIError(*failure)
        finally:
            self.cancel()


@dataclass
class ResponseWriter:
    """Writer of events in OpenAI's response formats."""

    body: ChatRequest
    requests: Sequence[Request]
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    new_tokens: int = 0
    reused: int = 0

    async def whole(self, answers: AnswerStream) -> Completion:
        events: list[list[Event]] = [[] for _ in self.requests]
        async for index, event in answers:
            self._count(event)
            events[index].append(event)
        choices = []
        for index, answer_events in enumerate(events):
            content = "".join(event.text for event in answer_events)
            tokens = [token for event in answer_events for token in event.tokens]
            choices.append(
                Choice(
                    index=index,
                    message=ResponseMessage(content=content),
                    logprobs=self._logprobs(tokens),
                    finish_reason=answer_events[-1].finish,  # type: ignore[arg-type]
                )
            )
        return Completion(id=self.id, created=self.created, model=self.body.model, choices=choices, usage=self.usage)

    async def chunks(self, answers: AnswerStream) -> AsyncIterator[Chunk]:
        # OpenAI's clients take the role from the first chunk of each choice.
        for index in range(len(self.requests)):
            yield self._chunk(ChunkChoice(index=index, delta=Delta(role="assistant", content="")))
        async for index, event in answers:
            self._count(event)
            # Half a character or the beginning of a stop: nothing to show yet.
            if not event.text and not event.finish and not (event.tokens and self.body.logprobs):
                continue
            yield self._chunk(
                ChunkChoice(
                    index=index,
                    delta=Delta(content=event.text),
                    logprobs=self._logprobs(event.tokens),
                    finish_reason=event.finish or None,  # type: ignore[arg-type]
                )
            )
        # By the protocol the last chunk, without choices.
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield self._chunk(usage=self.usage)

    @property
    def usage(self) -> Usage:
        prompt = len(self.requests[0].ids)
        details = PromptDetails(cached_tokens=self.reused)
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=self.new_tokens,
            total_tokens=prompt + self.new_tokens,
            prompt_tokens_details=details,
        )

    def _count(self, event: Event) -> None:
        self.new_tokens += len(event.tokens)
        # Several answers share the prompt among themselves: what was cached before cannot be told apart.
        self.reused = max(self.reused, event.reused) if len(self.requests) == 1 else 0

    def _chunk(self, *choices: ChunkChoice, usage: Usage | None = None) -> Chunk:
        return Chunk(id=self.id, created=self.created, model=self.body.model, choices=list(choices), usage=usage)

    def _logprobs(self, tokens: Sequence[TokenOutput]) -> Logprobs | None:
        if not self.body.logprobs:
            return None
        return Logprobs(content=[self._token(token) for token in tokens])

    @staticmethod
    def _token(token: TokenOutput) -> TokenLogprob:
        logprobs = (token.logprob, *(logprob for _, logprob in token.top))
        # JSON has no infinity: a token that sampling can never choose gets OpenAI's floor of -9999.
        chosen, *top = [
            TopLogprob(token=text, logprob=max(logprob, -9999.0), bytes=list(data))
            for (text, data), logprob in zip(token.written, logprobs, strict=True)
        ]
        return TokenLogprob(**vars(chosen), top_logprobs=top)
