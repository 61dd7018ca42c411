"""Continuous batching: one thread owns the model and advances all answers by a token a step.

Greedy text is that of transformers' `generate` at batch 1 in float32, whatever else is being answered.

    engine = Engine(relook.load_model("runs/pd"), Limits())
    image = engine.image(Path("picture.jpg").read_bytes())
    ids = engine.prompt([Turn("<image>\nWhat is this?", "")], [image])
    for event in engine.stream(Request(ids, (image,))):
        print(event.text, end="")
"""

from __future__ import annotations

import hashlib
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch

from relook.console import status
from relook.data.images import RecentCache, image_from_bytes
from relook.data.samples import Turn
from relook.errors import CheckpointError, RelookError
from relook.generate.request import (
    ActiveRequest,
    ContextTooLong,
    EngineLimits,
    Event,
    IncrementalText,
    ProcessedImage,
    QueueFull,
    Request,
)
from relook.generate.sampling import supported_settings, uniform
from relook.generate.scheduler import Scheduler
from relook.generate.tree_decoding import without_cudnn_attention
from relook.model.load import LoadedModel
from relook.model.tokenizer import token_bytes

Made = TypeVar("Made")
CHARACTERS = 64  # of a text for each position: more are not even cut into tokens
DECODERS = 2  # images at a time, which are hundreds of megabytes at worst
READ_IMAGES = 1 << 28  # bytes of decoded images that are remembered


class Engine:
    """A model that answers many at once. All methods may be called from any thread.

    Args:
        template: conversation template; empty for the model's own.

    Raises:
        CheckpointError: the model's own settings of generation ask for what only `generate` follows.
        RelookError: the slots do not fit into the memory that they may take.
    """

    def __init__(self, loaded: LoadedModel, limits: EngineLimits, template: str = "") -> None:
        self.loaded, self.limits = loaded, limits
        self.length = slot_length(loaded.core.config.text_config, limits, loaded.core.dtype)
        if supported_settings(loaded, {"do_sample": False}, self.length) is None:
            raise CheckpointError(
                f"generation_config.json of {loaded.path} asks for what only `generate` follows.",
                "Take beams, penalties and the like out of it.",
            )
        self.encoder = replace(loaded.encoder(template, 1 << 30), image_positions=_positions)
        self.ends, self.stops = _endings(loaded, loaded.conversation_template(template).stop)
        self.batch = Scheduler(loaded, limits, self.length)
        self._token_bytes = lru_cache(None)(partial(token_bytes, loaded.processor.tokenizer))
        self._images: RecentCache[ProcessedImage] = RecentCache(READ_IMAGES, lambda image: image.nbytes)
        self._decoding = threading.Semaphore(DECODERS)
        self._waiting: deque[ActiveRequest] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = self._ending = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def image(self, data: bytes) -> ProcessedImage:
        """An image file's bytes, decoded and prepared; one that was sent lately is remembered.

        Raises:
            DataError: it is no image, or too large.
        """
        key = hashlib.sha256(data).hexdigest()
        found = self._images.get(key)
        if found is None:
            with self._decoding:
                picture = image_from_bytes(data, self.limits.max_pixels, self.loaded.images.check_shape)
                inputs = {name: t[0] for name, t in self.loaded.images.batch([picture]).items()}
            positions = self.loaded.image_positions
            found = ProcessedImage(key, inputs, positions if isinstance(positions, int) else positions(picture))
            self._images.put(key, found)
        return found

    def prompt(self, turns: Sequence[Turn], images: Sequence[ProcessedImage] = ()) -> tuple[int, ...]:
        """Ids of a conversation whose last turn is to be answered. Prompts name their images by `<image>`.

        Raises:
            TooLong: it leaves no room for an answer.
            DataError: its placeholders are not its images.
        """
        characters = sum(len(turn.prompt) + len(turn.response) for turn in turns)
        if characters > CHARACTERS * self.length:
            raise self._too_long(f"the conversation has {characters:,} characters")
        *history, last = turns
        pictures: Sequence[Any] = images
        ids = self.encoder.prompt(last.prompt, pictures, history)
        self.check_length(len(ids))
        return ids

    def check_length(self, positions: int) -> None:
        """Raises TooLong where a conversation of so many positions leaves no room for an answer."""
        if positions >= self.length:
            raise self._too_long(f"the conversation takes {positions:,} positions")

    def _too_long(self, size: str) -> ContextTooLong:
        """In OpenAI's words, by which proxies know the error."""
        return ContextTooLong(
            f"This model's maximum context length is {self.length} tokens with the answer, but {size}.",
            "Shorten it.",
        )

    def submit(self, request: Request, emit: Callable[[Event], None]) -> ActiveRequest:
        """Queue a request. `emit` is called on the engine's thread, and must not wait.

        Raises:
            Busy: the queue is full, or the engine stops.
        """
        most = max(1, min(request.max_new_tokens, self.length - len(request.ids)))
        draws = uniform(request.seed, 0, most).tolist() if request.temperature else []
        text = IncrementalText(self._token_bytes, (*self.stops, *request.stop))
        until = request.until or time.monotonic() + self.limits.seconds
        answer = ActiveRequest(request, emit, text, self.ends, most, draws, until)
        with self._wake:
            if self._stopping:
                raise QueueFull("The server is stopping.")
            if self.full:
                raise QueueFull(f"{len(self._waiting)} requests are waiting already.", "Try again later.")
            self._waiting.append(answer)
            self._wake.notify()
        return answer

    def stream(self, request: Request) -> Iterator[Event]:
        """The events of one answer, up to the last. Leaving the loop early frees its slot.

        Raises:
            Busy: as `submit`.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        answer = self.submit(request, events.put)
        try:
            while True:
                event = events.get()
                yield event
                if event.finish:
                    return
        finally:
            answer.cancel()

    def run(self, work: Callable[[], Made]) -> Made:
        """What a function makes of the model. It is called on the engine's thread, between two steps.

        Raises:
            Busy: the engine stops.
            Exception: whatever the function raises.
        """
        done: Future[Made] = Future()

        def call() -> None:
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)

        with self._wake:
            if self._stopping:
                raise QueueFull("The server is stopping.")
            self._calls.append(call)
            self._wake.notify()
        return done.result()

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether one more would be refused."""
        return len(self._waiting) >= self.limits.waiting

    @property
    def running(self) -> int:
        """Answers in slots."""
        return self.batch.live

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def stop(self, seconds: float = 0.0) -> None:
        """Take nothing new, finish what is being answered for so long at most, and end the rest."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(seconds)
        self._ending = True
        self._thread.join()

    @without_cudnn_attention
    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._busy and not self._stopping:
                    self._wake.wait()
                if not self._busy:
                    return
            try:
                self._turn()
            except Exception as error:  # whatever it was, the next request deserves an answer
                status(f"relook serve: a step failed: {type(error).__name__}: {error}", style="red")

    @property
    def _busy(self) -> bool:
        return bool(self._waiting or self._calls or self.batch.live)

    def _turn(self) -> None:
        """Let go of who is gone, take in who waits, and take one step."""
        while self._calls:
            self._calls.popleft()()
        now = math.inf if self._ending else time.monotonic()
        self.batch.leave(now)
        with self._wake:
            over = [answer for answer in self._waiting if answer.over(now)]
            for answer in over:
                self._waiting.remove(answer)
        for answer in over:
            answer.report("timeout")
        self.batch.admit(self._waiting)
        if self.batch.live:
            self.batch.step()


def slot_length(text_config: Any, limits: EngineLimits, dtype: torch.dtype) -> int:
    """Positions of a slot: what the language model was made for, or less where that does not fit `cache_gb`."""
    size = getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads
    position = 2 * text_config.num_hidden_layers * text_config.num_key_value_heads * size * dtype.itemsize
    fits = int(limits.cache_gb * 1e9) // (position * limits.slots)
    window = getattr(text_config, "sliding_window", None)
    made_for = text_config.max_position_embeddings
    length = min(limits.length or made_for, made_for, window or made_for, fits)
    if length < 2:
        raise RelookError(f"{limits.slots} slots do not fit into {limits.cache_gb} GB.", "Raise --cache-gb.")
    return int(length)


def _positions(image: Any) -> int:
    return int(image.positions)


def _endings(loaded: LoadedModel, stop: str) -> tuple[frozenset[int], tuple[str, ...]]:
    """The tokens and the texts that end an answer. A text that is a special token is not seen in decoded text."""
    ends = loaded.core.generation_config.eos_token_id
    ids = {ends} if isinstance(ends, int) else set(ends or ())
    added = loaded.processor.tokenizer.added_tokens_decoder.items()
    ids |= {id for id, token in added if token.special and token.content == stop}
    return frozenset(ids), (stop,) if stop else ()
