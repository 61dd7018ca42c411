"""Continuous batching: which texts are read and grown next, and where in the pool they lie.

Texts come and go. A prompt that begins like a text that is there, over the same images, reads that beginning where it
lies: the questions on one image, the turns of a conversation. Long prompts are read in chunks between the steps of the
others. The host launches a step before it has read the tokens of the last one; a text that ended runs one step too many.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from relook.data.packing import common_start
from relook.generate.attention import Reads
from relook.generate.model_runner import BUCKETS, ModelRunner, Prefill, StepState, pieces_of
from relook.generate.sampling import RowSampling

MIN_SHARED = 16  # positions: shorter beginnings are read again
PREFILL_POSITIONS = 16384  # of a pass that no growing text waits for
CHUNK_POSITIONS = 2048  # of a pass between two steps of growing texts

Image = Hashable  # the key of an image's features


class ExtentAllocator:
    """Neighbouring places of a pool, first fit."""

    def __init__(self, places: int) -> None:
        self.free = [(0, places)]  # (first, count), in order, no two adjacent

    def take(self, count: int) -> int | None:
        """Return the first of `count` free places in a row; None where there are not as many."""
        for i, (first, size) in enumerate(self.free):
            if size >= count:
                self.free[i : i + 1] = [(first + count, size - count)] if size > count else []
                return first
        return None

    def give(self, first: int, count: int) -> None:
        """Free places that were taken."""
        merged: list[tuple[int, int]] = []
        for start, size in sorted([*self.free, (first, count)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((start, size))
        self.free = merged


@dataclass(eq=False)
class Extent:
    """Places of one text, from its position `start` on.

    One that starts at position 0 outlives its text until the room is needed, and others may begin with it.

    Attributes:
        ids: of the positions that lie there, as far as the host knows them.
        read: positions whose keys and values are there once all launched passes are done.
        image: first place and length in the post decoder's image pool.
        users: texts that read it now; last_used: the step in which one last did.
    """

    images: tuple[Image, ...]
    ids: tuple[int, ...]
    first: int
    size: int
    image: tuple[int, int] = (0, 0)
    read: int = 0
    users: int = 1
    last_used: int = 0


@dataclass(eq=False)
class Text:
    """A prompt and the answer that grows on it.

    Args:
        ids: the prompt. images: keys of the images of its placeholders, in order.
        max_new_tokens: tokens that the answer may have.
        temperature, top_k, top_p: of sampling; temperature 0 takes the most likely token.
        draws: (max_new_tokens,) uniform numbers in [0, 1) for sampling.
        on_token: called with each token when the host has read it; returns whether the answer ends there.
    """

    ids: tuple[int, ...]
    images: tuple[Image, ...]
    max_new_tokens: int
    on_token: Callable[[int], bool]
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    draws: Tensor | None = None
    base: Extent | None = field(default=None, init=False)  # holds the first `shared` positions
    shared: int = field(default=0, init=False)
    extent: Extent | None = field(default=None, init=False)
    read: int = field(default=0, init=False)  # positions of the prompt that are read or launched
    launched: int = field(default=0, init=False)  # tokens that the device was told to choose
    row: int = field(default=0, init=False)  # where its last token is on the device
    tokens: list[int] = field(default_factory=list, init=False)  # those that the host has read
    ended: bool = field(default=False, init=False)

    @property
    def own_places(self) -> int:
        """Places of its extent that are written once all launched steps are done."""
        return len(self.ids) - self.shared + self.launched - 1


class TextBatch:
    """The texts of one model.

    Args:
        max_rows: texts that grow at the same time.
        image_inputs: gives what the image processor made of an image, by its key.
        features: keeps image features by key; a dict, or anything that forgets.
        chunk: positions that are read between two steps of growing texts, which wait for it.
    """

    def __init__(
        self,
        runner: ModelRunner,
        max_rows: int,
        image_inputs: Callable[[Image], dict[str, Tensor]],
        features: Any,
        chunk: int = CHUNK_POSITIONS,
    ) -> None:
        self.runner, self.max_rows, self.chunk = runner, max_rows, chunk
        self.image_inputs, self.features = image_inputs, features
        self.allocator = ExtentAllocator(runner.pool.places)
        self.image_allocator = ExtentAllocator(runner.image_pool.places if runner.image_pool is not None else 0)
        self.waiting: deque[Text] = deque()
        self.reading: list[Text] = []  # their prompts are not read to the end
        self.growing: list[Text] = []
        self.counts = {"prompt_tokens": 0, "reused_tokens": 0, "new_tokens": 0, "images": 0, "steps": 0, "passes": 0}
        self._beginnings: dict[tuple[Image, ...], list[Extent]] = {}
        self._state: StepState | None = None
        self._fresh: list[Tensor] = []  # first tokens of texts whose prompts were just read
        self._unread: deque[tuple[list[Text], Callable[[], list[int]]]] = deque()

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.reading or self.growing)

    @torch.inference_mode()
    def turn(self) -> None:
        """Take in waiting texts, read prompts, launch a step for all growing texts, hand out the tokens before it."""
        changed = self._release_ended()
        self._admit()
        changed |= self._prefill()
        if self.growing:
            if changed or self._state is None:
                self._state = self.runner.place(self._make_state())
            self.runner.step(self._state)
            for text in self.growing:
                text.launched += 1
            self._unread.append((list(self.growing), _read_later(self._state.tokens)))
            self.counts["steps"] += 1
        while len(self._unread) > bool(self.growing):
            self._hand_out(*self._unread.popleft())

    def cancel(self, text: Text) -> None:
        """End a text as soon as the step under way is over."""
        text.ended = True
        if text in self.waiting:
            self.waiting.remove(text)

    # --- texts come and go

    def _hand_out(self, texts: Sequence[Text], tokens: Callable[[], list[int]]) -> None:
        for text, token in zip(texts, tokens(), strict=False):  # the host waits here, for a step that is over
            if text.ended:
                continue
            text.tokens.append(token)
            self.counts["new_tokens"] += 1
            text.ended = text.on_token(token) or len(text.tokens) >= text.max_new_tokens

    def _release_ended(self) -> bool:
        """Free the places of texts that have ended or need no further step; their beginnings stay for others."""
        over = [t for t in self.growing if t.ended or t.launched >= t.max_new_tokens]
        over += [t for t in self.reading if t.ended]
        for text in over:
            (self.growing if text in self.growing else self.reading).remove(text)
            extent = text.extent
            assert extent is not None
            extent.users -= 1
            if text.base is not None:
                text.base.users -= 1
                text.base.last_used = self.counts["steps"]
                self.allocator.give(extent.first, extent.size)
            else:  # it stays, with the answer's tokens that were read back into the model
                extent.last_used = self.counts["steps"]
                extent.ids = (*text.ids[: text.read], *text.tokens[: max(0, text.launched - 1)])
                extent.read = len(extent.ids)
        return bool(over)

    def _admit(self) -> None:
        """Give waiting texts their places, in order, as far as there is room."""
        while self.waiting and len(self.growing) + len(self.reading) < self.max_rows:
            text = self.waiting[0]
            base, shared = self._find_beginning(text)
            if base is not None:
                base.users += 1  # so that making room does not drop it
            size = len(text.ids) - shared + text.max_new_tokens
            first = self._take(self.allocator, size)
            image = (0, 0)
            if first is not None and base is None and self.runner.image_pool is not None and text.images:
                image = self._take_image_places(text)
                if image == (0, 0):
                    self.allocator.give(first, size)
                    first = None
            if first is None:
                if base is not None:
                    base.users -= 1
                if not self.growing and not self.reading:
                    raise MemoryError("the pool of keys and values is too small for one text")
                return
            extent = Extent(text.images, text.ids, first, size, base.image if base is not None else image)
            if base is None:
                self._beginnings.setdefault(text.images, []).append(extent)
            text.base, text.shared, text.extent, text.read = base, shared, extent, shared
            self.counts["prompt_tokens"] += len(text.ids)
            self.counts["reused_tokens"] += shared
            self.reading.append(self.waiting.popleft())

    def _find_beginning(self, text: Text) -> tuple[Extent | None, int]:
        """Return the extent that shares most positions with a text's beginning, images included, and how many."""
        best, longest = None, MIN_SHARED - 1
        image_token = self.runner.core.config.image_token_id
        for extent in self._beginnings.get(text.images, ()):
            shared = common_start([extent.ids, text.ids], min(len(extent.ids), len(text.ids) - 1))
            if shared > longest and image_token not in text.ids[shared:]:
                best, longest = extent, shared
        return best, longest if best is not None else 0

    def _take(self, allocator: ExtentAllocator, count: int) -> int | None:
        """Take places, dropping beginnings that nobody reads, the longest unused first."""
        while (first := allocator.take(count)) is None:
            unused = [e for extents in self._beginnings.values() for e in extents if not e.users]
            if not unused:
                return None
            self.drop(min(unused, key=lambda extent: extent.last_used))
        return first

    def drop(self, extent: Extent) -> None:
        """Forget a beginning that nobody reads."""
        self._beginnings[extent.images].remove(extent)
        if not self._beginnings[extent.images]:
            del self._beginnings[extent.images]
        self.allocator.give(extent.first, extent.size)
        if extent.image[1]:
            self.image_allocator.give(*extent.image)

    def _take_image_places(self, text: Text) -> tuple[int, int]:
        self._encode(text.images)
        features = [self.features[key][1] for key in text.images]
        length = sum(map(len, features))
        first = self._take(self.image_allocator, length)
        if first is None:
            return 0, 0
        self.runner.store_image_context(features, first)
        return first, length

    def _encode(self, images: Sequence[Image]) -> None:
        """Send images whose features are not kept through the vision tower, in one batch."""
        missing = [key for key in dict.fromkeys(images) if key not in self.features]
        if missing:
            encoded = self.runner.encode_images([self.image_inputs(key) for key in missing])
            for key, features in zip(missing, encoded, strict=True):
                self.features[key] = features
            self.counts["images"] += len(missing)

    # --- reading prompts

    def _prefill(self) -> bool:
        """Read the next positions of prompts; texts whose prompt is read to its end begin to grow."""
        budget = self.chunk if self.growing else PREFILL_POSITIONS
        chunks: list[tuple[Text, int, int]] = []
        for text in self.reading:
            if budget <= 0:
                break
            # A beginning that is being read itself must get as far in this pass at the latest.
            if text.base is not None and text.base.read < text.shared:
                continue
            end = min(len(text.ids), text.read + budget)
            chunks.append((text, text.read, end))
            budget -= end - text.read
            text.read = end
            assert text.extent is not None
            text.extent.read = end
        if not chunks:
            return False
        # Texts that share a beginning side by side: they read it once.
        order = {id(base): n for n, base in enumerate(dict.fromkeys(text.base for text, _, _ in chunks))}
        chunks.sort(key=lambda chunk: (chunk[0].base is not None, order[id(chunk[0].base)], chunk[0].shared))
        finished = [text for text, _, end in chunks if end == len(text.ids)]
        chosen = self.runner.prefill(self._make_prefill(chunks, finished))
        self.counts["passes"] += 1
        if not finished:
            return False
        rows = sum(map(len, self._fresh)) + (0 if self._state is None else self._state.rows)
        for index, text in enumerate(finished):
            text.row, text.launched = rows + index, 1
            self.reading.remove(text)
        self._fresh.append(chosen)
        self._unread.append((finished, _read_later(chosen)))
        self.growing += finished
        return True

    def _make_prefill(self, chunks: Sequence[tuple[Text, int, int]], finished: Sequence[Text]) -> Prefill:
        image_token = self.runner.core.config.image_token_id
        self._encode([key for text, start, end in chunks if image_token in text.ids[start:end] for key in text.images])
        ids, positions, places = [], [], []
        image_rows: list[Tensor] = []
        for text, start, end in chunks:
            assert text.extent is not None
            ids += text.ids[start:end]
            positions += range(start, end)
            places += range(text.extent.first + start - text.shared, text.extent.first + end - text.shared)
            before = text.ids[:start].count(image_token)
            here = text.ids[start:end].count(image_token)
            if here:
                image_rows.append(torch.cat([self.features[key][0] for key in text.images])[before : before + here])
        counts = [end - start for _, start, end in chunks]
        own = self._reads(counts, [t.extent.first for t, _, _ in chunks], [e - t.shared for t, _, e in chunks], True)
        reads = [own]
        groups = [list(g) for _, g in itertools.groupby(chunks, lambda c: (id(c[0].base), c[0].shared))]
        if any(text.shared for text, _, _ in chunks):
            sizes = [sum(end - start for _, start, end in group) for group in groups]
            firsts = [group[0][0].base.first if group[0][0].base else 0 for group in groups]
            reads.append(self._reads(sizes, firsts, [group[0][0].shared for group in groups], False))
        starts = dict(zip((id(t) for t, _, _ in chunks), itertools.accumulate(counts), strict=True))
        last = self._ints([starts[id(text)] - 1 for text in finished])
        image = image_all = None
        if self.runner.image_pool is not None:
            image = self._image_reads([[text] for text in finished], [1] * len(finished))
            image_all = self._image_reads([[t] for t, _, _ in chunks], counts)
        sampling = self._sampling(finished, len(finished))
        ints = self._ints
        return Prefill(ints(ids), ints(positions), ints(places).long(), reads, image_rows, last, image, image_all, sampling)

    def _ints(self, values: Sequence[int]) -> Tensor:
        host = torch.tensor(values, dtype=torch.int32)
        return host.pin_memory().to(self.runner.device, non_blocking=True) if self.runner.device.type == "cuda" else host

    def _reads(self, counts: Sequence[int], firsts: Sequence[int], used: Sequence[int], causal: bool) -> Reads:
        ends = [0, *itertools.accumulate(counts)]
        bounds = max(counts, default=0), max(used, default=0)
        return Reads(self._ints(ends), self._ints([*firsts, 0]), self._ints(used), *bounds, causal)

    def _image_reads(self, groups: Sequence[Sequence[Text]], counts: Sequence[int]) -> Reads:
        images = [group[0].extent.image for group in groups]
        return self._reads(counts, [first for first, _ in images], [length for _, length in images], False)

    # --- the rows of a step

    def _make_state(self) -> StepState:
        """Lay out the growing texts as the rows of a step, when one has come or gone.

        All but the tokens follows from what the host counts; tokens that it has not read are taken from where they are.
        """
        shared = self._shared_with()
        group_of = lambda t: (id(t.base or t.extent), shared[t])  # noqa: E731
        sizes: dict[Any, int] = {}
        for text in self.growing:
            sizes[group_of(text)] = sizes.get(group_of(text), 0) + 1
        first_seen = {key: n for n, key in enumerate(sizes)}
        self.growing.sort(key=lambda t: (sizes[group_of(t)] > 1 or shared[t] > 0, first_seen[group_of(t)]))
        groups = [list(g) for _, g in itertools.groupby(self.growing, group_of)]
        texts = self.growing
        static = self.runner.compiled
        N = next(b for b in BUCKETS if b >= len(texts)) if static and len(texts) <= BUCKETS[-1] else len(texts)
        pad, heads = N - len(texts), self.runner.pool.layers[0][0].shape[1]
        bin_place = self.runner.pool.places

        def rows(values: list[int], fill: int) -> list[int]:
            return values + [fill] * (N - len(values))

        def group_reads(firsts: list[int], used: list[int]) -> tuple[list[int], list[int], list[int]]:
            """One group of reads for each group of texts; the last one takes the rows that are nobody's."""
            spare = N - len(groups)
            ends = [0, *itertools.accumulate(map(len, groups))] + [N] * spare
            return ends, firsts + [0] * (spare + 1), used + [0] * spare

        own_first = [t.extent.first + (shared[t] if t.base is None else 0) for t in texts]
        own_used = [t.own_places + 1 - (shared[t] if t.base is None else 0) for t in texts]
        columns: list[list[int]] = [
            rows([len(t.ids) + t.launched - 1 for t in texts], 0),
            rows([t.extent.first + t.own_places for t in texts], bin_place),
            rows([1] * len(texts), 0),
            rows([t.launched for t in texts], 0),
            list(range(N + 1)),
            rows(own_first, bin_place) + [0],
            rows(own_used, 0),
        ]
        has_prefix = any(shared.values())
        if has_prefix:
            columns += group_reads([(g[0].base or g[0].extent).first for g in groups], [shared[g[0]] for g in groups])
        has_image = self.runner.image_pool is not None
        if has_image:
            images = [group[0].extent.image for group in groups]
            columns += group_reads([first for first, _ in images], [length for _, length in images])
        ints = self._ints([value for column in columns for value in column])
        parts = list(ints.split([len(column) for column in columns]))
        unit = 1 if not static else 1 << 30  # a mere bound where kernels read lengths from the device
        bound = lambda n: max(n, unit) if static else n  # noqa: E731
        own = Reads(*parts[4:7], 1, bound(max(own_used)), False, pieces_of(N, heads) if static else 1)
        most = max(map(len, groups)) if not static else 32
        prefix = image = None
        if has_prefix:
            prefix = Reads(*parts[7:10], most, bound(max(shared.values())), False, pieces_of(len(groups), heads) if static else 1)
        if has_image:
            image_heads = self.runner.image_pool.layers[0][0].shape[1]
            lengths = max(g[0].extent.image[1] for g in groups)
            image = Reads(*parts[-3:], most, bound(lengths), False, pieces_of(len(groups), image_heads) if static else 1)
        tokens = torch.cat([*([] if self._state is None else [self._state.tokens]), *self._fresh])
        tokens = tokens[self._ints(rows([t.row for t in texts], 0)).long()]
        for row, text in enumerate(texts):
            text.row = row
        self._fresh = []
        sampling = self._sampling(texts, N)
        return StepState(tokens, ints, parts[0], parts[1], parts[2], parts[3], own, prefix, image, sampling)

    def _shared_with(self) -> dict[Text, int]:
        """Return how many positions each growing text reads from a beginning that others read, too.

        A text whose own extent is the others' beginning reads it with them, as if it shared it with itself.
        """
        by_extent: dict[int, list[int]] = {}
        for text in self.growing:
            if text.base is not None:
                by_extent.setdefault(id(text.base), []).append(text.shared)
        shared = {}
        for text in self.growing:
            lengths = by_extent.get(id(text.extent), [])
            shared[text] = text.shared if text.base is not None else max(lengths, key=lengths.count, default=0)
        return shared

    def _sampling(self, texts: Sequence[Text], rows: int) -> RowSampling | None:
        if all(text.temperature == 0 for text in texts):
            return None
        longest = max(text.max_new_tokens for text in texts)
        columns = -(-longest // 256) * 256 + 1 if self.runner.compiled else longest + 1
        draws = torch.zeros(rows, columns, dtype=torch.float64)
        settings = torch.zeros(3, rows, dtype=torch.float64)
        settings[2] = 1.0
        for row, text in enumerate(texts):
            settings[:, row] = torch.tensor([text.temperature, text.top_k, text.top_p], dtype=torch.float64)
            if text.draws is not None:
                draws[row, : len(text.draws)] = text.draws
        filters = any(text.top_k or text.top_p < 1 for text in texts)
        temperature, top_k, top_p = settings.to(self.runner.device)
        return RowSampling(temperature, top_k.long(), top_p, draws.to(self.runner.device), filters)


def _read_later(tokens: Tensor) -> Callable[[], list[int]]:
    """Copy what a tensor holds now to the host; the returned function waits for no more than what made it."""
    if not tokens.is_cuda:
        return tokens.clone().tolist
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> list[int]:
        event.synchronize()
        values: list[int] = host.tolist()
        return values

    return read
