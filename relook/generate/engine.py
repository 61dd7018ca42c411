"""Serving: one thread owns the model and advances all answers by a token a step.

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
from PIL import Image

from relook.console import progress, status
from relook.data.encode import Placeholders
from relook.data.images import RecentCache, image_from_bytes
from relook.data.samples import Turn
from relook.errors import CheckpointError, RelookError
from relook.generate.kv_extents import MIN_SHARED
from relook.generate.model_runner import TOWER_IMAGES, ModelRunner, position_bytes
from relook.generate.passes import BUCKETS
from relook.generate.prefill_graph import LENGTHS
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
from relook.generate.sampling import Sampler, uniform
from relook.generate.scheduler import EngineCounts, Scheduler, feature_bytes
from relook.generate.text import Text
from relook.model.load import LoadedModel
from relook.model.tokenizer import token_bytes

Result = TypeVar("Result")
MAX_CHARACTERS = 64  # of a conversation for each position; a longer one is not even tokenised
DECODERS = 2  # images decoded at a time, which take hundreds of megabytes at worst
IMAGE_BYTES = 1 << 28  # processed images that are cached
WARM_PICTURE = (64, 64)
WARM_TOKENS = 4  # of each made-up answer


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
        self.length = slot_length(loaded, limits)
        sampler = Sampler.of(loaded, template, {"do_sample": False}, self.length)
        if sampler is None:
            raise CheckpointError(
                f"generation_config.json of {loaded.path} asks for what only `generate` follows.",
                "Take beams, penalties and the like out of it.",
            )
        self.encoder = replace(loaded.encoder(template, 1 << 30), image_positions=_placeholders)
        # The end of an answer is a token for most models, and a text for templates without such a token.
        self.ends, self.stops = _endings(loaded, loaded.conversation_template(template).stop)
        # Nothing down there refers to the engine, so its memory is free as soon as nobody has it, not at a collection.
        runner = ModelRunner(loaded, limits.slots * self.length, (sampler.never, sampler.not_first))
        self.batch = Scheduler(runner, limits.slots, RecentCache(int(limits.image_gb * 1e9), feature_bytes))
        self._active: dict[Text, ActiveRequest] = {}  # requests whose text is in the scheduler
        self._token_bytes = lru_cache(None)(partial(token_bytes, loaded.processor.tokenizer))
        self._images: RecentCache[ProcessedImage] = RecentCache(IMAGE_BYTES, lambda image: image.nbytes)
        self._decoding = threading.Semaphore(DECODERS)
        self._waiting: deque[ActiveRequest] = deque()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = self._ending = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def warm(self) -> None:
        """Answer made-up prompts, so that everything is compiled and captured before the first request.

        Every number of rows is answered twice: with prompts that share nothing, and with ones that share a beginning.
        """
        first, second = [id for id in range(3) if id != self.batch.image_token][:2]
        runner = self.batch.runner
        # A number in binary, so that no prompt is equal to another.
        distinct = lambda number: tuple(second if number >> bit & 1 else first for bit in range(MIN_SHARED - 1))  # noqa: E731

        def answer(prompts: Sequence[tuple[int, ...]]) -> None:
            fitting = (ids[: self.length - WARM_TOKENS] for ids in prompts)
            self.batch.waiting.extend(Text(ids, (), WARM_TOKENS, lambda *_: False) for ids in fitting)
            while self.batch.busy:
                self.batch.step()

        def answer_all() -> None:
            # Graphs are captured for numbers of rows in buckets; what lies between is padded to the next.
            buckets = [bucket for bucket in BUCKETS if bucket <= self.limits.slots]
            for rows in buckets:
                for shared in (0, 2 * MIN_SHARED):
                    answer([(first,) * shared + distinct(row) for row in range(rows)])
                report(buckets.index(rows) + 1, len(buckets))
            # Those that read prompts, by their room, and those of the vision tower, by the number of images.
            for number, length in enumerate(LENGTHS if runner.compiled and runner.flash else (), 1):
                answer([distinct(number) + (first,) * (length + 1 - MIN_SHARED)])
            picture = self.loaded.images.inputs(Image.new("RGB", WARM_PICTURE))
            for count in TOWER_IMAGES if runner.compiled else ():
                runner.encode_images([picture] * count)
            self.batch.counts = EngineCounts()

        with progress("Warming up") as report:
            self.run(answer_all)

    def image(self, data: bytes) -> ProcessedImage:
        """Decode and process an image file's bytes; recent images are cached.

        Raises:
            DataError: it is no image, or too large.
        """
        key = hashlib.sha256(data).hexdigest()
        # Conversations send the same picture again with every turn.
        processed = self._images.get(key)
        if processed is None:
            with self._decoding:
                picture = image_from_bytes(data, self.limits.max_pixels, self.loaded.images.check_shape)
                inputs = self.batch.runner.staged(self.loaded.images.inputs(picture))
            positions = self.loaded.image_positions
            processed = ProcessedImage(key, inputs, positions if isinstance(positions, int) else positions(picture))
            self._images.put(key, processed)
        return processed

    def prompt(self, turns: Sequence[Turn], images: Sequence[ProcessedImage] = ()) -> tuple[int, ...]:
        """Encode a conversation whose last turn is to be answered. Prompts name their images by `<image>`.

        Raises:
            ContextTooLong: it leaves no room for an answer.
            DataError: its placeholders are not its images.
        """
        characters = sum(len(turn.prompt) + len(turn.response) for turn in turns)
        # Tokenising megabytes takes seconds; no tokenizer makes so few tokens of so many characters.
        if characters > MAX_CHARACTERS * self.length:
            raise self._too_long(f"the conversation has {characters:,} characters")
        *history, last = turns
        pictures: Sequence[Any] = images
        ids = self.encoder.prompt(last.prompt, pictures, history)
        self.check_length(len(ids))
        return ids

    def check_length(self, positions: int) -> None:
        """Raise ContextTooLong if a conversation of so many positions leaves no room for an answer."""
        if positions >= self.length:
            raise self._too_long(f"the conversation takes {positions:,} positions")

    def _too_long(self, size: str) -> ContextTooLong:
        """Word the error as OpenAI does, by which proxies know it."""
        return ContextTooLong(
            f"This model's maximum context length is {self.length} tokens with the answer, but {size}.",
            "Shorten it.",
        )

    def submit(self, request: Request, emit: Callable[[Event], None]) -> ActiveRequest:
        """Queue a request. `emit` is called on the engine's thread, and must not wait.

        Raises:
            QueueFull: the queue is full, or the engine stops.
        """
        # A slot holds prompt and answer together.
        max_new_tokens = max(1, min(request.max_new_tokens, self.length - len(request.ids)))
        text = IncrementalText(self._token_bytes, (*self.stops, *request.stop))
        until = request.until or time.monotonic() + self.limits.seconds
        active = ActiveRequest(request, emit, text, self.ends, max_new_tokens, until)
        with self._wake:
            if self._stopping:
                raise QueueFull("The server is stopping.")
            if self.full:
                raise QueueFull(f"{len(self._waiting)} requests are waiting already.", "Try again later.")
            self._waiting.append(active)
            self._wake.notify()
        return active

    def stream(self, request: Request) -> Iterator[Event]:
        """Yield the events of one answer, up to the last. Leaving the loop early cancels the request.

        Raises:
            QueueFull: as `submit`.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        active = self.submit(request, events.put)
        try:
            while True:
                event = events.get()
                yield event
                if event.finish:
                    return
        finally:
            active.cancel()

    def run(self, work: Callable[[], Result]) -> Result:
        """Call a function on the engine's thread, between two steps, and return its result.

        Raises:
            QueueFull: the engine stops.
            Exception: whatever the function raises.
        """
        done: Future[Result] = Future()

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
        """Return the number of requests that wait for a slot."""
        return len(self._waiting)

    @property
    def full(self) -> bool:
        """Return True if one more request would be refused."""
        return len(self._waiting) >= self.limits.waiting

    @property
    def running(self) -> int:
        """Return the number of answers in slots."""
        return self.batch.live

    @property
    def alive(self) -> bool:
        """Return True while the engine's thread runs."""
        return self._thread.is_alive()

    def stop(self, seconds: float = 0.0) -> None:
        """Refuse new requests, let running ones finish for `seconds` at most, and end the rest."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(seconds)
        # Running answers had their time: from here on `_turn` treats all as late.
        self._ending = True
        self._thread.join()

    def _run(self) -> None:
        """Work until the engine is stopped and nothing is left to do."""
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
        return bool(self._waiting or self._calls or self.batch.busy)

    def _turn(self) -> None:
        """Let go of cancelled and late requests, admit waiting ones, and take one step."""
        with torch.inference_mode():
            # Work of other threads that must not see a step half done.
            while self._calls:
                self._calls.popleft()()
        now = math.inf if self._ending else time.monotonic()
        # A text that nobody waits for any more frees its row before the next step.
        for text, active in self._active.items():
            if active.over(now):
                self.batch.cancel(text)
                active.report("timeout")
        with self._wake:
            # The scheduler admits first come, first served; no more are given to it than there are slots.
            late = [active for active in self._waiting if active.over(now)]
            for active in late:
                self._waiting.remove(active)
            while self._waiting and self.batch.live < self.limits.slots:
                self._admit(self._waiting.popleft())
        for active in late:
            active.report("timeout")
        try:
            if self.batch.busy:
                self.batch.step()
        finally:
            # In a `finally`: a step that failed has ended texts, too, whose clients must hear of it.
            for text in [text for text in self._active if text.ended]:
                active = self._active.pop(text)
                if text.failed:
                    active.report("error")

    def _admit(self, active: ActiveRequest) -> None:
        """Queue a request's text in the scheduler."""
        request = active.request
        text = Text(
            request.ids,
            tuple(image.key for image in request.images),
            active.max_new_tokens,
            lambda token, logprobs: active.take(token, logprobs, text.reused),
            request.temperature,
            0,
            request.top_p,
            uniform(request.seed, 0, active.max_new_tokens) if request.temperature else None,
            request.top if request.logprobs else -1,
            {image.key: image.inputs for image in request.images},
        )
        self._active[text] = active
        self.batch.waiting.append(text)


def slot_length(loaded: LoadedModel, limits: EngineLimits) -> int:
    """Return the positions of a slot: what the language model was made for, or less if that exceeds `cache_gb`."""
    text_config = loaded.core.config.text_config
    fits = int(limits.cache_gb * 1e9) // (position_bytes(loaded) * limits.slots)
    window = getattr(text_config, "sliding_window", None)
    maximum = text_config.max_position_embeddings
    length = min(limits.length or maximum, maximum, window or maximum, fits)
    if length < 2:
        raise RelookError(f"{limits.slots} slots do not fit into {limits.cache_gb} GB.", "Raise --cache-gb.")
    return int(length)


def _placeholders(image: Any) -> Placeholders:
    placeholders: Placeholders = image.placeholders
    return placeholders


def _endings(loaded: LoadedModel, stop: str) -> tuple[frozenset[int], tuple[str, ...]]:
    """Return the tokens and the texts that end an answer. Decoded text does not show special tokens."""
    eos = loaded.core.generation_config.eos_token_id
    ids = {eos} if isinstance(eos, int) else set(eos or ())
    added = loaded.processor.tokenizer.added_tokens_decoder.items()
    ids |= {id for id, token in added if token.special and token.content == stop}
    return frozenset(ids), (stop,) if stop else ()
