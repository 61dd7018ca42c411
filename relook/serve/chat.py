"""From a chat request to what the engine takes, and from its events to a reply."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from relook.data.samples import Turn
from relook.data.templates import IMAGE, with_image
from relook.errors import DataError
from relook.generate.engine import Engine
from relook.generate.request import Answer, Busy, Event, ReadImage, Request, Said, TooLong
from relook.serve.media import Sources
from relook.serve.protocol import (
    APIError,
    ChatRequest,
    Choice,
    Chunk,
    ChunkChoice,
    Completion,
    Delta,
    ImagePart,
    Logprobs,
    Message,
    PromptDetails,
    Reply,
    TextPart,
    TokenLogprob,
    TopLogprob,
    Usage,
)

GREEDY_BELOW = 1e-4  # of temperatures: logits divided by less are no numbers any more


def read_request(engine: Engine, body: ChatRequest, sources: Sources, max_images: int) -> list[Request]:
    """What the engine is asked, one request for each of the `n` answers. Reads images: call it on a thread.

    Raises:
        APIError: what is wrong with the request.
    """
    for name, needed in (("top_logprobs", "logprobs"), ("stream_options", "stream")):
        if getattr(body, name) and not getattr(body, needed):
            raise APIError(400, f"{name} is of no use without {needed}.", param=name)
    turns, urls = read_turns(body.messages)
    if len(urls) > max_images:
        raise APIError(400, f"The conversation has {len(urls)} images, more than {max_images}.", "too_many_images")
    images: list[ReadImage] = []
    try:
        for url in urls:
            images.append(engine.image(sources.read(url)))
            if sum(image.positions for image in images) >= engine.length:  # before more of them are decoded
                raise TooLong("The images take more positions than the model has.", "Send fewer.")
        ids = engine.prompt(turns, images)
    except TooLong as error:
        raise APIError(400, str(error), "context_length_exceeded", "messages") from None
    except DataError as error:
        raise APIError(400, str(error), "invalid_message", "messages") from None
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
    )
    return [replace(first, seed=first.seed + i) for i in range(body.n or 1)]


def read_turns(messages: Sequence[Message]) -> tuple[list[Turn], list[str]]:
    """The turns of a conversation and the URLs of its images, in order.

    A system message stands before the first text of the user: the templates have a system text of their own, which the
    model was tuned with. A turn's images stand before its text, as LLaVA was trained.
    """
    turns: list[Turn] = []
    urls: list[str] = []
    asked: list[str] = []
    pictures = 0

    def prompt() -> str:
        return with_image("\n".join(asked), pictures)

    for message in messages:
        parts = [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
        new = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
        if IMAGE in text:
            raise APIError(
                400, f"A text may not hold {IMAGE}: send images as image_url.", "invalid_message", "messages"
            )
        if message.role == "assistant":
            if new or not asked:
                raise APIError(400, "An assistant's message is a text that answers one of the user.", param="messages")
            turns.append(Turn(prompt(), text))
            asked, pictures = [], 0
            continue
        if new and message.role != "user":
            raise APIError(400, "Only the user's messages may hold images.", param="messages")
        asked.append(text)
        urls += new
        pictures += len(new)
    if not asked or messages[-1].role != "user":
        raise APIError(400, "The last message must be the user's.", param="messages")
    return [*turns, Turn(prompt(), "")], urls


class Answers:
    """The answers to requests, of one engine or several, as an asynchronous stream of (index, event)."""

    def __init__(self, asked: Sequence[tuple[Engine, Request]]) -> None:
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit_as(index: int) -> Callable[[Event], None]:
            def emit(event: Event) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                    loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

            return emit

        self.answers: list[Answer] = []
        try:
            for i, (engine, request) in enumerate(asked):
                self.answers.append(engine.submit(request, emit_as(i)))
        except Busy as error:
            self.cancel()
            raise APIError(429, str(error), "busy") from None

    def cancel(self) -> None:
        for answer in self.answers:
            answer.cancel()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        running = len(self.answers)
        try:
            while running:
                index, event = await self.events.get()
                if event.finish == "timeout":
                    raise APIError(504, "The answer was not ready in time.", "timeout")
                if event.finish == "error":
                    raise APIError(500, "The model failed on this request.", "failed")
                running -= bool(event.finish)
                yield index, event
        finally:
            self.cancel()


@dataclass
class Writer:
    """Puts events into OpenAI's shapes."""

    engine: Engine
    body: ChatRequest
    requests: Sequence[Request]
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))
    new_tokens: int = 0
    reused: int = 0

    async def whole(self, answers: Answers) -> Completion:
        events: list[list[Event]] = [[] for _ in self.requests]
        async for index, event in answers:
            self._count(event)
            events[index].append(event)
        choices = []
        for index, said in enumerate(events):
            content = "".join(event.text for event in said)
            tokens = [token for event in said for token in event.tokens]
            choices.append(
                Choice(
                    index=index,
                    message=Reply(content=content),
                    logprobs=self._logprobs(tokens),
                    finish_reason=said[-1].finish,  # type: ignore[arg-type]
                )
            )
        return Completion(id=self.id, created=self.created, model=self.body.model, choices=choices, usage=self.usage)

    async def chunks(self, answers: Answers) -> AsyncIterator[Chunk]:
        for index in range(len(self.requests)):
            yield self._chunk(ChunkChoice(index=index, delta=Delta(role="assistant", content="")))
        async for index, event in answers:
            self._count(event)
            if not event.text and not event.finish and not self.body.logprobs:
                continue
            yield self._chunk(
                ChunkChoice(
                    index=index,
                    delta=Delta(content=event.text),
                    logprobs=self._logprobs(event.tokens),
                    finish_reason=event.finish or None,  # type: ignore[arg-type]
                )
            )
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
        self.reused = max(self.reused, event.reused) if len(self.requests) == 1 else 0

    def _chunk(self, *choices: ChunkChoice, usage: Usage | None = None) -> Chunk:
        return Chunk(id=self.id, created=self.created, model=self.body.model, choices=list(choices), usage=usage)

    def _logprobs(self, tokens: Sequence[Said]) -> Logprobs | None:
        if not self.body.logprobs:
            return None
        return Logprobs(content=[self._token(said) for said in tokens])

    def _token(self, said: Said) -> TokenLogprob:
        top = [TopLogprob(**self._named(id, value)) for id, value in said.top]
        return TokenLogprob(**self._named(said.id, said.logprob), top_logprobs=top)

    def _named(self, id: int, logprob: float) -> dict[str, Any]:
        text = self.engine.token_text(id)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}
