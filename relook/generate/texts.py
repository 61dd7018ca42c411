"""Continuous batching: which texts are read and grown next, and where in the pool they lie.

Texts come and go. A prompt that begins like a text that is there, over the same images, reads that beginning where it
lies: the questions on one image, the turns of a conversation. Long prompts are read in chunks between the steps of the
others. On a GPU the host launches a step before it has read the tokens of the one before.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from relook.data.images import Recent
from relook.generate.attention import Reads
from relook.generate.dense_attention import NOTHING, DenseReads, Places
from relook.generate.model_runner import BUCKETS, AnyReads, ModelRunner, Prefill, StepState, pieces_of, to_device
from relook.generate.sampling import Likely, RowSampling

MIN_SHARED = 16  # positions: shorter beginnings are read again
PREFILL_POSITIONS = 16384  # of a pass that no growing text waits for
CHUNK_POSITIONS = 2048  # of a pass between two steps of growing texts

IMAGES_AT_ONCE = 32  # through the vision tower
DENSE_STEPS = 16  # for which dense reads are gathered at a time
GROUP_QUERIES = 32  # a bound that the decode kernel takes for any group of rows
ANY_NUMBER = 1 << 30  # a bound where kernels read lengths from the device
API_TOP = 20  # likeliest tokens that OpenAI's API gives: room for as many serves all requests

Image = Hashable  # the key of an image's features
Results = Callable[[], tuple[list[int], list[Likely] | None]]  # each row's token, and its log-probabilities
Features = tuple[Tensor, Tensor | None]  # of an image: projected (P, D), and what the post decoder looks at (M, V)


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
    """Places of one text, from its position `start` on; what is before lies in `base`.

    It may outlive its text, so that others begin with it, until the room is needed.

    Attributes:
        ids: of all positions up to the last one that lies there, as far as the host knows them.
        image: first place and length in the post decoder's image pool.
        read: positions whose keys and values are there once all launched passes are done.
        users: texts that read it now, and extents that go on from it; last_used: the step in which one last did.
        stays: whether it outlives its text.
    """

    images: tuple[Image, ...]
    ids: tuple[int, ...]
    first: int
    size: int
    base: Extent | None = None
    start: int = 0
    image: tuple[int, int] = (0, 0)
    read: int = 0
    users: int = 1
    last_used: int = 0
    stays: bool = True


@dataclass(eq=False)
class Text:
    """A prompt and the answer that grows on it.

    Args:
        ids: the prompt. images: keys of the images of its placeholders, in order.
        max_new_tokens: tokens that the answer may have.
        on_token: called with each token when the host has read it, and with its log-probabilities where `top` asks for
            them; returns whether the answer ends there.
        temperature, top_k, top_p: of sampling; temperature 0 takes the most likely token.
        draws: (max_new_tokens,) uniform numbers in [0, 1) for sampling.
        top: likeliest tokens that come with each one and its log-probability; -1 for neither.
        most_shared: positions at most that it takes from another text, where the caller knows what many share; they
            are then read together.
    """

    ids: tuple[int, ...]
    images: tuple[Image, ...]
    max_new_tokens: int
    on_token: Callable[[int, Likely | None], bool]
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    draws: Tensor | None = None
    top: int = -1
    most_shared: int | None = None
    extent: Extent = field(init=False)  # once it is admitted
    reused: int = field(default=0, init=False)  # positions of the prompt that were there already
    read: int = field(default=0, init=False)  # positions of the prompt that are read or launched
    launched: int = field(default=0, init=False)  # tokens that the device was told to choose
    row: int = field(default=0, init=False)  # where its last token is on the device
    tokens: list[int] = field(default_factory=list, init=False)  # those that the host has read
    ended: bool = field(default=False, init=False)
    failed: bool = field(default=False, init=False)  # it ended because a pass raised an error

    @property
    def base(self) -> Extent | None:
        """What holds the first `shared` positions."""
        return self.extent.base

    @property
    def shared(self) -> int:
        return self.extent.start

    @property
    def own_places(self) -> int:
        """Places of its extent that are written once all launched steps are done."""
        return len(self.ids) - self.shared + self.launched - 1


@dataclass
class Counts:
    """What has been done so far, for those who watch; `steps` are the passes that chose tokens."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    images: int = 0
    steps: int = 0


class TextBatch:
    """The texts of one model.

    Args:
        max_rows: texts that grow at the same time.
        image_inputs: gives what the image processor made of an image, by its key.
        features: remembers image features by key.
        chunk: positions that are read between two steps of growing texts, which wait for it.
        goes_on: whether prompts may go on from answers, so that these stay too; else only what many texts begin with.
    """

    def __init__(
        self,
        runner: ModelRunner,
        max_rows: int,
        image_inputs: Callable[[Image], dict[str, Tensor]],
        features: Recent[Features],
        chunk: int = CHUNK_POSITIONS,
        goes_on: bool = True,
    ) -> None:
        self.runner, self.max_rows, self.chunk, self.goes_on = runner, max_rows, chunk, goes_on
        self.image_inputs, self.features = image_inputs, features
        self.image_token: int = runner.core.config.image_token_id
        self.allocator = ExtentAllocator(runner.pool.places)
        self.image_allocator = ExtentAllocator(runner.image_pool.places if runner.image_pool is not None else 0)
        self.waiting: deque[Text] = deque()
        self.reading: list[Text] = []  # their prompts are not read to the end
        self.growing: list[Text] = []
        self.counts = Counts()
        self._beginnings: dict[tuple[Image, ...], list[Extent]] = {}
        self._latest: Extent | None = None  # of the last text that began by itself
        self._state: StepState | None = None
        self._fresh: list[Tensor] = []  # first tokens of texts whose prompts were just read
        self._turn = 0
        self._unread: deque[tuple[int, list[Text], Results]] = deque()  # of which turn, whose tokens, and what they are
        # On a GPU passes are launched before the tokens of the turn before are read, so that it never waits for the
        # host; a text that ends runs a step too many.
        self._ahead = runner.device.type == "cuda"

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.reading or self.growing)

    @property
    def live(self) -> int:
        """Texts that have not ended."""
        return sum(not text.ended for texts in (self.waiting, self.reading, self.growing) for text in texts)

    @torch.inference_mode()
    def step(self) -> None:
        """Take in waiting texts, read prompts, launch a step for all growing texts, hand out the tokens before it.

        Raises:
            Exception: whatever a pass raised; the texts that it was for have failed, and others go on.
        """
        self._turn += 1
        changed = self._release_ended()
        self._admit()
        changed |= self._prefill()
        try:
            self._grow(changed)
            ahead = self._ahead and any(text.launched < text.max_new_tokens for text in self.growing)
            while self._unread and not (ahead and self._unread[0][0] == self._turn):
                self._hand_out(*self._unread.popleft()[1:])
        except Exception:
            _fail(self.growing)
            self._state, self._fresh = None, []
            self._unread.clear()
            raise

    def cancel(self, text: Text) -> None:
        """End a text as soon as the step under way is over."""
        text.ended = True
        if text in self.waiting:
            self.waiting.remove(text)

    def _grow(self, changed: bool) -> None:
        if all(text.launched >= text.max_new_tokens for text in self.growing):
            return
        if changed or self._state is None:
            self._state = self.runner.place(self._make_state())
        self.runner.step(self._state)
        for text in self.growing:
            text.launched += 1
        self._unread.append((self._turn, list(self.growing), _read_later(self._state.tokens, self._state.likely)))
        self.counts.steps += 1

    # --- texts come and go

    def _hand_out(self, texts: Sequence[Text], results: Results) -> None:
        tokens, likely = results()  # the host waits here, for a step that is over
        for row, text in enumerate(texts):
            if text.ended:
                continue
            text.tokens.append(tokens[row])
            self.counts.new_tokens += 1
            about = None
            if likely is not None and text.top >= 0:
                about = likely[row][0], likely[row][1][: text.top]
            text.ended = text.on_token(tokens[row], about) or len(text.tokens) >= text.max_new_tokens

    def _release_ended(self) -> bool:
        """Free the places of texts that have ended or need no further step; their beginnings stay for others.

        Returns:
            Whether the rows of a step must be laid out anew.
        """
        over = [t for t in self.growing if t.ended or t.launched >= t.max_new_tokens]
        leaving = [t for t in self.reading if t.ended]
        dense = self._state is not None and isinstance(self._state.reads, DenseReads)
        if dense and not (self._state_is_over or self.waiting or self.reading) and 4 * len(over) < len(self.growing):
            return False  # what dense reads gathered serves further steps; a few rows too many cost less
        for text in over + leaving:
            (self.growing if text in self.growing else self.reading).remove(text)
            extent = text.extent
            extent.users -= 1
            extent.last_used = self.counts.steps
            # The answer's tokens that were read back into the model are there, too.
            extent.ids = (*text.ids[: text.read], *text.tokens[: max(0, text.launched - 1)])
            extent.read = len(extent.ids)
            if not extent.stays:
                self._free(extent)
        return bool(over) or self._state_is_over

    @property
    def _state_is_over(self) -> bool:
        return self._state is not None and self._state.is_over

    def _admit(self) -> None:
        """Give waiting texts their places, in order, as far as there is room."""
        next_texts = list(self._next_texts())
        features = self._encode_for(next_texts)
        for text in next_texts:
            idle = not self.growing and not self.reading
            if not (self._place(text, features, True) or (idle and self._place(text, features, False))):
                if idle:
                    self.waiting.popleft()
                    _fail([text])
                    raise MemoryError(f"{len(text.ids) + text.max_new_tokens} positions do not fit into the pool.")
                return
            self.counts.prompt_tokens += len(text.ids)
            self.counts.reused_tokens += text.reused
            self.reading.append(self.waiting.popleft())

    def _next_texts(self) -> Iterator[Text]:
        """Yield the waiting texts for which there are rows, over no more images than are encoded together."""
        images: set[Image] = set()
        for text in itertools.islice(self.waiting, max(0, self.max_rows - len(self.growing) - len(self.reading))):
            if images and len(images.union(text.images)) > IMAGES_AT_ONCE:
                return
            images.update(text.images)
            yield text

    def _encode_for(self, texts: Sequence[Text]) -> Mapping[Image, Features]:
        """Return image features, where they are needed before prompts are read."""
        if self.runner.image_pool is None:
            return {}
        try:
            return self._encode([key for text in texts for key in text.images])
        except Exception:
            for text in texts:
                self.waiting.remove(text)
            _fail(texts)
            raise

    def _place(self, text: Text, features: Mapping[Image, Features], share: bool) -> bool:
        """Give a text its extent. False where there is no room.

        Args:
            share: whether it may begin with what is there.
        """
        base, shared, copied = self._find_beginning(text) if share else (None, 0, [])
        held = [extent for extent in (base, *(extent for extent, _, _ in copied)) if extent is not None]
        for extent in held:
            extent.users += 1  # so that making room does not drop it
        size = len(text.ids) - shared + text.max_new_tokens
        image, first = (0, 0), self._take(self.allocator, size)
        if first is not None and base is None and self.runner.image_pool is not None and text.images:
            looks = [look for _, look in (features[key] for key in text.images) if look is not None]
            length = sum(map(len, looks))
            place = self._take(self.image_allocator, length)
            if place is None:
                self.allocator.give(first, size)
                first = None
            else:
                image = place, length
                self.runner.store_image_context(looks, place)
        for extent in held:
            extent.users -= 1
        if first is None:
            return False
        text.reused = text.read = shared
        for extent, begin, end in copied:
            self.runner.copy(extent.first + begin - extent.start, first + begin - shared, end - begin)
            text.reused = text.read = end
        text.extent = Extent(text.images, text.ids, first, size, base, shared, base.image if base else image, text.read)
        text.extent.stays = base is None or self.goes_on
        if base is not None:
            base.users += 1
        else:
            self._latest = text.extent
        if text.extent.stays:
            self._beginnings.setdefault(text.images, []).append(text.extent)
        return True

    def _find_beginning(self, text: Text) -> tuple[Extent | None, int, list[tuple[Extent, int, int]]]:
        """Find what is there of a text's beginning.

        Returns:
            An extent whose first positions the text reads where they lie, how many, and (extent, from, to) whose
            positions it copies: what lies behind those, or what is before the image in a text on another one.
        """
        most = len(text.ids) - 1 if text.most_shared is None else min(text.most_shared, len(text.ids) - 1)
        best, longest = None, MIN_SHARED - 1
        for extent in self._beginnings.get(text.images, ()):
            shared = shared_length(extent.ids, text.ids, most)
            if shared > longest and self.image_token not in text.ids[shared:]:
                best, longest = extent, shared
        if best is not None:
            if best.base is None or longest <= best.start:
                return best.base or best, longest, []
            ready = min(longest, best.read)
            return best.base, best.start, [(best, best.start, ready)] if ready > best.start else []
        latest = self._latest
        # A post decoder's self-attention knows the images from the first position on.
        if latest is not None and latest.images != text.images and self.runner.self_pool is None:
            before = text.ids.index(self.image_token) if text.images else most
            shared = shared_length(latest.ids, text.ids, min(before, most, latest.read))
            if shared >= MIN_SHARED:
                return None, 0, [(latest, 0, shared)]
        return None, 0, []

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
        self._free(extent)

    def _free(self, extent: Extent) -> None:
        self.allocator.give(extent.first, extent.size)
        if extent.base is not None:
            extent.base.users -= 1
            extent.base.last_used = self.counts.steps
        elif extent.image[1]:
            self.image_allocator.give(*extent.image)
        if extent is self._latest:
            self._latest = None

    def _encode(self, images: Sequence[Image]) -> dict[Image, Features]:
        """Return features by image; what is not remembered goes through the vision tower, in one batch."""
        features = {key: known for key in dict.fromkeys(images) if (known := self.features.get(key)) is not None}
        missing = [key for key in dict.fromkeys(images) if key not in features]
        if missing:
            encoded = self.runner.encode_images([self.image_inputs(key) for key in missing])
            for key, new in zip(missing, encoded, strict=True):
                features[key] = new
                self.features.put(key, new)
            self.counts.images += len(missing)
        return features

    # --- reading prompts

    def _prefill(self) -> bool:
        """Read the next positions of prompts; texts whose prompt is read to its end begin to grow."""
        budget = self.chunk if self.growing else PREFILL_POSITIONS
        chunks: list[tuple[Text, int, int]] = []
        for text in self.reading:
            if budget <= 0:
                break
            # A beginning that is being read itself must get as far in this pass at the latest.
            if text.ended or (text.base is not None and text.base.read < text.shared):
                continue
            end = min(len(text.ids), text.read + budget)
            chunks.append((text, text.read, end))
            budget -= end - text.read
            text.read = text.extent.read = end
        if not chunks:
            return False
        # Texts that share a beginning side by side: they read it once.
        order = {id(base): n for n, base in enumerate(dict.fromkeys(text.base for text, _, _ in chunks))}
        chunks.sort(key=lambda chunk: (chunk[0].base is not None, order[id(chunk[0].base)], chunk[0].shared))
        finished = [text for text, _, end in chunks if end == len(text.ids)]
        try:
            chosen, likely = self.runner.prefill(self._make_prefill(chunks, finished))
        except Exception:
            for text, start, _ in chunks:
                text.read = text.extent.read = start
            _fail([text for text, _, _ in chunks])
            _fail([text for text in self.reading if text.base is not None and text.base.read < text.shared])
            raise
        if not finished:
            return False
        rows = sum(map(len, self._fresh)) + (0 if self._state is None else self._state.rows)
        for index, text in enumerate(finished):
            text.row, text.launched = rows + index, 1
            self.reading.remove(text)
        self._fresh.append(chosen)
        self._unread.append((self._turn, finished, _read_later(chosen, likely)))
        self.growing += finished
        self.counts.steps += 1
        return True

    def _make_prefill(self, chunks: Sequence[tuple[Text, int, int]], finished: Sequence[Text]) -> Prefill:
        looking = [key for text, start, end in chunks if self.image_token in text.ids[start:end] for key in text.images]
        features = self._encode(looking)
        ids: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        image_rows: list[Tensor] = []
        for text, start, end in chunks:
            ids += text.ids[start:end]
            positions += range(start, end)
            places += range(text.extent.first + start - text.shared, text.extent.first + end - text.shared)
            before, here = text.ids[:start].count(self.image_token), text.ids[start:end].count(self.image_token)
            if here:
                image_rows.append(torch.cat([features[key][0] for key in text.images])[before : before + here])
        counts = [end - start for _, start, end in chunks]
        own = [(text.extent.first, end - text.shared) for text, _, end in chunks]
        shared = [(text.base.first, text.shared) if text.base is not None else NOTHING for text, _, _ in chunks]
        starts = dict(zip((id(t) for t, _, _ in chunks), itertools.accumulate(counts), strict=True))
        looks = [text.extent.image for text, _, _ in chunks]
        look_counts = counts
        if self.runner.self_pool is None:
            looks, look_counts = [text.extent.image for text in finished], [1] * len(finished)
        return Prefill(
            self._ints(ids),
            self._ints(positions),
            self._ints(places).long(),
            self._prefill_reads(counts, own, shared),
            image_rows,
            self._ints([starts[id(text)] - 1 for text in finished]),
            None if self.runner.image_pool is None else self._image_reads(look_counts, looks),
            self._sampling(finished, len(finished)),
            max((text.top for text in finished), default=-1),
        )

    def _prefill_reads(self, counts: Sequence[int], own: Sequence[Places], shared: Sequence[Places]) -> AnyReads:
        if not self.runner.flash:
            return DenseReads(counts, own, shared, self.runner.pool.layers[0][0])
        reads = [self._reads(counts, own, True)]
        if any(length for _, length in shared):
            groups = [list(group) for _, group in itertools.groupby(range(len(counts)), lambda i: shared[i])]
            sizes = [sum(counts[i] for i in group) for group in groups]
            reads.append(self._reads(sizes, [shared[group[0]] for group in groups], False))
        return reads

    def _image_reads(self, counts: Sequence[int], images: Sequence[Places]) -> AnyReads:
        if self.runner.flash:
            return [self._reads(counts, images, False)]
        assert self.runner.image_pool is not None
        return DenseReads(counts, [NOTHING] * len(counts), images, self.runner.image_pool.layers[0][0])

    def _reads(self, counts: Sequence[int], extents: Sequence[Places], causal: bool) -> Reads:
        ends = [0, *itertools.accumulate(counts)]
        firsts, used = [first for first, _ in extents], [length for _, length in extents]
        bounds = max(counts, default=0), max(used, default=0)
        return Reads(self._ints(ends), self._ints([*firsts, 0]), self._ints(used), *bounds, causal)

    def _ints(self, values: Sequence[int]) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.int32), self.runner.device)

    # --- the rows of a step

    def _make_state(self) -> StepState:
        """Lay out the growing texts as the rows of a step, when one has come or gone.

        All but the tokens follows from what the host counts; tokens that it has not read are taken from where they are.
        """
        shared = self._shared_with()
        group_of = lambda t: (id(t.base or t.extent), shared[t])  # noqa: E731
        sizes = Counter(map(group_of, self.growing))
        first_seen = {key: n for n, key in enumerate(sizes)}
        self.growing.sort(key=lambda t: (sizes[group_of(t)] > 1 or shared[t] > 0, first_seen[group_of(t)]))
        texts = self.growing
        # What a text reads alone begins behind what it reads with others, if that lies in its own extent.
        within = {text: shared[text] if text.base is None else 0 for text in texts}
        own = [(t.extent.first + within[t], t.own_places + 1 - within[t]) for t in texts]
        beginnings = [((t.base or t.extent).first, shared[t]) if shared[t] else NOTHING for t in texts]
        kernels = self.runner.has_kernel
        N = len(texts)
        if kernels and BUCKETS[-1] >= N:
            N = next(bucket for bucket in BUCKETS if bucket >= N)
        rows = lambda values, fill: [*values, *[fill] * (N - len(texts))]  # noqa: E731
        columns: list[list[int]] = [
            rows([len(t.ids) + t.launched - 1 for t in texts], 0),
            rows([t.extent.first + t.own_places for t in texts], self.runner.pool.places),
            rows([t.launched for t in texts], 0),
            rows([used for _, used in own], 0),
            rows([1] * len(texts), 0),
        ]
        groups = [list(group) for _, group in itertools.groupby(range(len(texts)), lambda i: group_of(texts[i]))]
        images = [texts[group[0]].extent.image for group in groups]
        if kernels:
            columns += [list(range(N + 1)), [*rows([first for first, _ in own], 0), 0]]
            if any(shared.values()):
                columns += _group_reads(N, groups, [beginnings[group[0]] for group in groups])
            if self.runner.image_pool is not None:
                columns += _group_reads(N, groups, images)
        ints = self._ints([value for column in columns for value in column])
        parts = list(ints.split([len(column) for column in columns]))
        reads, image = self._kernel_reads(parts, N, len(groups)) if kernels else self._dense_reads(own, beginnings)
        tokens = torch.cat([*([] if self._state is None else [self._state.tokens]), *self._fresh])
        tokens = tokens[self._ints(rows([t.row for t in texts], 0)).long()]
        for row, text in enumerate(texts):
            text.row = row
        self._fresh = []
        return StepState(
            tokens,
            ints,
            ints[: 4 * N].view(4, N),
            parts[4],
            reads,
            image,
            self._sampling(texts, N),
            [t.extent.size - within[t] for t in texts],
            self._likely(texts, N),
        )

    def _kernel_reads(self, parts: Sequence[Tensor], rows: int, groups: int) -> tuple[list[Reads], list[Reads] | None]:
        """Return reads whose numbers are all on the device, so that they hold for any texts in as many rows."""
        pool, image_pool = self.runner.pool, self.runner.image_pool
        heads = pool.layers[0][0].shape[1]
        reads = [Reads(parts[5], parts[6], parts[3], 1, ANY_NUMBER, False, pieces_of(rows, heads))]
        rest = parts[7:]
        image = None
        if image_pool is not None:
            heads_there = image_pool.layers[0][0].shape[1]
            ends, first, used = rest[-3:]
            image = [Reads(ends, first, used, GROUP_QUERIES, ANY_NUMBER, False, pieces_of(groups, heads_there))]
            rest = rest[:-3]
        if rest:
            ends, first, used = rest
            reads.insert(0, Reads(ends, first, used, GROUP_QUERIES, ANY_NUMBER, False, pieces_of(groups, heads)))
        return reads, image

    def _dense_reads(self, own: Sequence[Places], shared: Sequence[Places]) -> tuple[DenseReads, DenseReads | None]:
        """Return reads for the next steps, as many as are worth gathering for."""
        steps = min(DENSE_STEPS, max(1, *(t.max_new_tokens - t.launched for t in self.growing)))
        counts, image_pool = [1] * len(own), self.runner.image_pool
        reads = DenseReads(counts, own, shared, self.runner.pool.layers[0][0], steps)
        if image_pool is None:
            return reads, None
        images = [text.extent.image for text in self.growing]
        return reads, DenseReads(counts, [NOTHING] * len(own), images, image_pool.layers[0][0], steps)

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
        temperature, top_k, top_p = to_device(settings, self.runner.device)
        return RowSampling(temperature, top_k.long(), top_p, to_device(draws, self.runner.device), filters)

    def _likely(self, texts: Sequence[Text], rows: int) -> tuple[Tensor, Tensor] | None:
        """Return room for the log-probabilities of a step, where a text wants them."""
        top = max(text.top for text in texts)
        if top < 0:
            return None
        top = min(max(top, API_TOP), self.runner.core.lm_head.weight.shape[0])
        device = self.runner.device
        return torch.zeros(rows, 1 + top, device=device), torch.zeros(rows, top, dtype=torch.long, device=device)


def feature_bytes(features: Features) -> int:
    return sum(tensor.nbytes for tensor in features if tensor is not None)


def shared_length(a: Sequence[int], b: Sequence[int], most: int) -> int:
    """Return how many elements two sequences begin with together, `most` at most."""
    low, high = 0, min(len(a), len(b), most)
    while low < high:  # comparing slices is fast, comparing elements is not
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _group_reads(rows: int, groups: Sequence[Sequence[int]], extents: Sequence[Places]) -> list[list[int]]:
    """Return ends, firsts and used of one group of reads for each group of texts, filled up to `rows` groups; the last
    one takes the rows that are nobody's."""
    spare = rows - len(groups)
    ends = [0, *itertools.accumulate(map(len, groups))] + [rows] * spare
    return [ends, [first for first, _ in extents] + [0] * (spare + 1), [used for _, used in extents] + [0] * spare]


def _fail(texts: Sequence[Text]) -> None:
    """End texts whose pass failed: of what it wrote nothing is known."""
    for text in texts:
        text.failed = not text.ended
        text.ended = True
        text.launched = min(text.launched, 1)


def _read_later(tokens: Tensor, likely: tuple[Tensor, Tensor] | None) -> Results:
    """Copy what tensors hold now to the host; the returned function waits for no more than what made it."""
    parts = [_host_copy(part) for part in (tokens, *(likely or ()))]
    event = torch.cuda.Event() if tokens.is_cuda else None
    if event is not None:
        event.record()

    def read() -> tuple[list[int], list[Likely] | None]:
        if event is not None:
            event.synchronize()
        chosen, *about = (part.tolist() for part in parts)
        if not about:
            return chosen, None
        return chosen, [(row[0], list(zip(ids, row[1:], strict=True))) for row, ids in zip(*about, strict=True)]

    return read


def _host_copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
