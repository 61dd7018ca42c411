"""Continuous batching: which texts are read and grown next.

Texts come and go between two steps. Long prompts are read in chunks between the steps of the others. On a GPU the host
launches a step before it has read the tokens of the one before, so that the device never waits for it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from relook.data.images import GRID, RecentCache
from relook.forward.positions import row_positions
from relook.generate.dense_attention import DenseReads
from relook.generate.kv_extents import KVExtents
from relook.generate.model_runner import ModelRunner
from relook.generate.pass_layout import PassLayout
from relook.generate.passes import StepState
from relook.generate.sampling import TokenLogprobs
from relook.generate.text import ImageFeatures, ImageKey, PromptChunk, Text

PREFILL_POSITIONS = 16384  # of a pass that no growing text waits for
CHUNK_POSITIONS = 2048  # of a pass between two steps of growing texts
MAX_IMAGES = 32  # in one pass of the vision tower
DENSE_PATIENCE = 4  # steps of dense reads for which texts that come wait to join them


@dataclass
class EngineCounts:
    """Counters of an engine's work, for metrics; `steps` counts the passes that chose tokens."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    images: int = 0
    steps: int = 0
    not_finite: int = 0  # texts whose logits were NaN or infinite


class _Unread:
    """Tokens that the device chose in a turn for some texts, on their way to the host.

    Args:
        tokens, logprobs: as `ModelRunner.prefill` returns them; what they hold now is copied.
    """

    def __init__(
        self, turn: int, texts: list[Text], tokens: Tensor, logprobs: tuple[Tensor, Tensor] | None = None
    ) -> None:
        self.turn, self.texts = turn, texts
        self._copies = [_host_copy(tensor) for tensor in (tokens, *(logprobs or ()))]
        self._event = torch.cuda.Event() if tokens.is_cuda else None
        if self._event is not None:
            self._event.record()

    @property
    def is_ready(self) -> bool:
        """Return True if `read` would not wait."""
        return self._event is None or self._event.query()

    def read(self) -> tuple[list[int], list[TokenLogprobs] | None]:
        """Return each text's token and its log-probabilities; waits for no more than what computed them."""
        if self._event is not None:
            self._event.synchronize()
        chosen, *values_and_ids = (copy.tolist() for copy in self._copies)
        if not values_and_ids:
            return chosen, None
        rows = zip(*values_and_ids, strict=True)
        return chosen, [(values[0], list(zip(ids, values[1:], strict=True))) for values, ids in rows]


class Scheduler:
    """The texts of one model.

    Args:
        max_rows: number of texts that grow at the same time.
        features: cache of image features by key.
        chunk: positions that are read between two steps of growing texts, which wait for them.
        keeps_answers: whether prompts may continue an answer, so that whole texts stay in the pool.
    """

    def __init__(
        self,
        runner: ModelRunner,
        max_rows: int,
        features: RecentCache[ImageFeatures],
        chunk: int = CHUNK_POSITIONS,
        keeps_answers: bool = True,
    ) -> None:
        self.runner, self.max_rows, self.chunk = runner, max_rows, chunk
        self.features = features
        self.image_token: int = runner.core.config.image_token_id
        self.extents = KVExtents(runner, keeps_answers)
        self.layout = PassLayout(runner)
        self.waiting: deque[Text] = deque()
        self.reading: list[Text] = []  # texts whose prompts are not read to the end
        self.growing: list[Text] = []
        self.counts = EngineCounts()
        self._state: StepState | None = None
        self._rows = 0  # so many of the growing texts are rows of the state; the others join at the next layout
        self._first_tokens: list[Tensor] = []  # of texts whose prompts were just read
        self._turn = 0
        self._unread: deque[_Unread] = deque()
        # On a GPU a turn is launched before the tokens of the turn before are read; a text that ends runs one step too
        # many.
        self._runs_ahead = runner.device.type == "cuda"

    @property
    def busy(self) -> bool:
        """Return True if any text waits, is read or grows."""
        return bool(self.waiting or self.reading or self.growing)

    @property
    def live(self) -> int:
        """Return the number of texts that have not ended."""
        return sum(not text.ended for texts in (self.waiting, self.reading, self.growing) for text in texts)

    @torch.inference_mode()
    def step(self) -> None:
        """Admit waiting texts, read prompts, launch a step of all growing texts, and hand out the tokens before it.

        Raises:
            Exception: whatever a pass raised; the texts it was for have failed, and the others go on.
        """
        self._turn += 1
        self._hand_out_ready()
        self._release_ended()
        self._admit()
        # The vision tower takes tens of milliseconds, and so does a prompt: nobody's token waits for both.
        self._hand_out_ready()
        self._prefill()
        with self._failing_together():
            self._grow()
            ahead = self._runs_ahead and any(not text.is_launched for text in self.growing)
            while self._unread and not (ahead and self._unread[0].turn == self._turn):
                self._hand_out(self._unread.popleft())

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Let all growing texts fail if anything fails: they are rows of one state."""
        try:
            yield
        except Exception:
            for text in self.growing:
                text.fail()
            self._state, self._first_tokens = None, []
            self._unread.clear()
            raise

    def cancel(self, text: Text) -> None:
        """End a text as soon as the step under way is over."""
        text.ended = True
        if text in self.waiting:
            self.waiting.remove(text)

    # --- steps

    def _grow(self) -> None:
        """Launch one more token for every growing text."""
        self._release_ended()
        if all(text.is_launched for text in self.growing):
            return
        if not self._keeps_rows():
            last_tokens = [] if self._state is None else [self._state.tokens]
            self._state = self.runner.place(self.layout.step(self.growing, torch.cat(last_tokens + self._first_tokens)))
            self._first_tokens, self._rows = [], len(self.growing)
        assert self._state is not None
        self.runner.step(self._state)
        rows = self.growing[: self._rows]
        for text in rows:
            text.launched += 1
        self._unread.append(_Unread(self._turn, rows, self._state.tokens, self._state.logprobs))
        self.counts.steps += 1

    def _keeps_rows(self) -> bool:
        """Return True if the next step has the rows of the last one.

        Dense reads are worth keeping when few texts come or go: to gather keys and values anew costs more than a few
        rows too many, or too few for a while.
        """
        if self._state is None or self._state.is_over:
            return False
        joining = len(self.growing) - self._rows
        # `is_launched`: all of its steps are under way, the tokens of which the host may not have read yet.
        changes = joining + sum(text.ended or text.is_launched for text in self.growing[: self._rows])
        if not changes or not isinstance(self._state.reads, DenseReads):
            return not changes
        pressed = joining or self.waiting or self.reading
        return 4 * changes < self._rows and not (pressed and self._state.reads.step >= DENSE_PATIENCE)

    def _hand_out_ready(self) -> None:
        """Give texts the tokens that the device has chosen already."""
        with self._failing_together():
            while self._unread and self._unread[0].is_ready:
                self._hand_out(self._unread.popleft())

    def _hand_out(self, unread: _Unread) -> None:
        """Give each text its token."""
        tokens, logprobs = unread.read()  # the host waits here, for a step that is usually over
        for row, text in enumerate(unread.texts):
            if text.ended:
                continue
            if tokens[row] < 0:  # the sign of logits that are NaN or infinite
                text.fail()
                self.counts.not_finite += 1
                continue
            text.tokens.append(tokens[row])
            self.counts.new_tokens += 1
            row_logprobs = None
            if logprobs is not None and text.top >= 0:
                row_logprobs = logprobs[row][0], logprobs[row][1][: text.top]
            text.ended = text.on_token(tokens[row], row_logprobs) or len(text.tokens) >= text.max_new_tokens

    def _release_ended(self) -> None:
        """Release the texts that have ended or need no further step, unless the rows stay as they are."""
        leaving = [text for text in self.reading if text.ended]
        if not self._keeps_rows():
            leaving += [text for text in self.growing if text.ended or text.is_launched]
            self._rows = 0
        for text in leaving:
            (self.growing if text in self.growing else self.reading).remove(text)
            self.extents.release(text, self.counts.steps)

    # --- admission

    def _admit(self) -> None:
        """Give waiting texts their extents, in order, as far as there is room."""
        next_texts = list(self._next_texts())
        features = self._prepare(next_texts)
        for text in next_texts:
            # While others run, a text that finds no room waits: they will release theirs.
            idle = not self.growing and not self.reading
            try_place = self.extents.place
            # Alone, a text may take the whole pool: then even what it would share must make room.
            if not (
                try_place(text, features, True, self.counts.steps)
                or (idle and try_place(text, features, False, self.counts.steps))
            ):
                if idle:
                    self.waiting.popleft()
                    text.fail()
                    raise MemoryError(f"{len(text.ids) + text.max_new_tokens} positions do not fit into the pool.")
                return
            self.counts.prompt_tokens += len(text.ids)
            self.counts.reused_tokens += text.reused
            self.reading.append(self.waiting.popleft())

    def _next_texts(self) -> Iterator[Text]:
        """Yield the waiting texts for which there are rows, over no more images than are encoded together."""
        images: set[ImageKey] = set()
        for text in itertools.islice(self.waiting, max(0, self.max_rows - len(self.growing) - len(self.reading))):
            if images and len(images.union(text.images)) > MAX_IMAGES:
                return
            images.update(text.images)
            yield text

    def _prepare(self, texts: Sequence[Text]) -> Mapping[ImageKey, ImageFeatures]:
        """Number the texts' positions. Return their images' features where the post decoder reads them, which needs
        them before a prompt is read."""
        try:
            for text in texts:
                if text.positions is None:
                    grids = [text.image_inputs[key].get(GRID) for key in text.images]
                    text.positions = row_positions(self.runner.core.config, text.ids, grids)
            return {} if self.runner.image_pool is None else self._encode(texts)
        except Exception:
            for text in texts:
                self.waiting.remove(text)
                text.fail()
            raise

    def _encode(self, texts: Sequence[Text]) -> dict[ImageKey, ImageFeatures]:
        """Return features of the texts' images; those that are not cached go through the vision tower in one batch."""
        # Several texts may show one picture: encode it once.
        inputs = {key: text.image_inputs[key] for text in texts for key in text.images}
        features = {key: cached for key in inputs if (cached := self.features.get(key)) is not None}
        missing = [key for key in inputs if key not in features]
        if missing:
            encoded = self.runner.encode_images([inputs[key] for key in missing])
            for key, new in zip(missing, encoded, strict=True):
                features[key] = new
                self.features.put(key, new)
            self.counts.images += len(missing)
        return features

    # --- reading prompts

    def _prefill(self) -> None:
        """Read the next positions of prompts; a text whose prompt is read to the end begins to grow."""
        chunks = self._next_chunks()
        if not chunks:
            return
        finished = [text for text, _, end in chunks if end == len(text.ids)]
        shown = [text for text, start, end in chunks if self.image_token in text.ids[start:end]]
        try:
            tokens, logprobs = self.runner.prefill(self.layout.prefill(chunks, finished, self._encode(shown)))
        except Exception:
            for text, start, _ in chunks:
                text.read = text.extent.filled = start
                text.fail()
            for text in self.reading:
                if _waits_for_base(text):
                    text.fail()
            raise
        if not finished:
            return
        # Their first tokens are appended behind the rows of the running step; the next layout gathers both.
        rows = sum(map(len, self._first_tokens)) + (0 if self._state is None else self._state.rows)
        for index, text in enumerate(finished):
            text.row, text.launched, text.image_inputs = rows + index, 1, {}
            self.reading.remove(text)
        self._first_tokens.append(tokens)
        self._unread.append(_Unread(self._turn, finished, tokens, logprobs))
        self.growing += finished
        self.counts.steps += 1

    def _next_chunks(self) -> list[PromptChunk]:
        """Choose what the next pass reads, so that texts that share a beginning are neighbours."""
        budget = self.chunk if self.growing else PREFILL_POSITIONS
        chunks: list[PromptChunk] = []
        for text in self.reading:
            if budget <= 0:
                break
            # A beginning that is being read itself must get as far in this pass at the latest.
            if text.ended or _waits_for_base(text):
                continue
            end = min(len(text.ids), text.read + budget)
            while self.runner.sees_ahead and end < len(text.ids) and text.ids[end] == self.image_token:
                end += 1  # an image whose positions see each other is read at once
            chunks.append(PromptChunk(text, text.read, end))
            budget -= end - text.read
            text.read = text.extent.filled = end
        order = {id(base): n for n, base in enumerate(dict.fromkeys(chunk.text.base for chunk in chunks))}
        return sorted(chunks, key=lambda c: (c.text.base is not None, order[id(c.text.base)], c.text.shared))


def _waits_for_base(text: Text) -> bool:
    """Return True if the beginning that a text shares is not read as far as the text needs it."""
    return text.base is not None and text.base.filled < text.shared


def feature_bytes(features: ImageFeatures) -> int:
    """Return the bytes of an image's features."""
    return sum(tensor.nbytes for tensor in features if tensor is not None)


def _host_copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
