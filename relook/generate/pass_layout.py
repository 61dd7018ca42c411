"""Layout of a pass on the device: from texts and their extents to the tensors that `ModelRunner` takes.

A pass is flat, so everything here is a list of integers, one per new position, row or group of rows: ids, positions,
cells, and which extents are read. Neighbouring rows that share a beginning form a group, which reads it once.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from relook.generate.attention import ExtentReads
from relook.generate.dense_attention import NOTHING, DenseReads, Span
from relook.generate.model_runner import ModelRunner
from relook.generate.passes import BUCKETS, AnyReads, Prefill, StepState, copy_to_device, pieces_of
from relook.generate.sampling import RowSampling
from relook.generate.text import ImageFeatures, ImageKey, PromptChunk, Text

DENSE_STEPS = 16  # steps for which dense reads are gathered at a time
GROUP_QUERIES = 32  # a bound that the decode kernel takes for a group of rows of any size
# Of the extents that groups of rows read: how many rows a group is taken to have when they are cut into pieces, and the
# most pieces. Groups of one row, as turns of conversations are, pay for more than they need (benchmarks/RESULTS.md).
ROWS_PER_GROUP = 4
GROUP_PIECES = 8
ANY_LENGTH = 1 << 30  # a bound for kernels that read lengths from the device
API_TOP = 20  # the most likeliest tokens of OpenAI's API: with room for these, one graph serves every request
DRAWS_MULTIPLE = 256  # draws are padded to a multiple, so that few graphs serve all lengths


class PassLayout:
    """Builder of a model's passes."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner, self.image_token = runner, int(runner.core.config.image_token_id)

    # --- reading prompts

    def prefill(
        self, chunks: Sequence[PromptChunk], finished: Sequence[Text], features: Mapping[ImageKey, ImageFeatures]
    ) -> Prefill:
        """Lay chunks of prompts side by side; those that share a beginning must be neighbours.

        Args:
            finished: the texts whose prompt ends in its chunk, in the order of `chunks`; their next token is chosen.
            features: of all images whose placeholders the chunks hold.
        """
        ids: list[int] = []
        positions: list[Tensor] = []
        cells: list[int] = []
        image_rows: list[Tensor] = []
        # Flat and without padding: chunk after chunk, positions counted from each text's own beginning.
        for text, start, end in chunks:
            ids += text.ids[start:end]
            positions.append(torch.arange(start, end) if text.positions is None else text.positions[:, start:end])
            # What a text shares lies in its base's extent, so its own cells begin at position `shared`.
            cells += range(text.extent.first + start - text.shared, text.extent.first + end - text.shared)
            placeholders = text.ids[start:end].count(self.image_token)
            if placeholders:
                before = text.ids[:start].count(self.image_token)  # those that an earlier chunk held
                rows = torch.cat([features[key][0] for key in text.images])
                image_rows.append(rows[before : before + placeholders])
        counts = [end - start for _, start, end in chunks]
        ends = dict(zip((chunk.text for chunk in chunks), itertools.accumulate(counts), strict=True))
        # Each chunk reads its own extent causally, and all of what it shares, which lies before it.
        private = [(text.extent.first, end - text.shared) for text, _, end in chunks]
        shared = [(text.base.first, text.shared) if text.base is not None else NOTHING for text, _, _ in chunks]
        # The post decoder runs where a token is chosen, or over all positions where its self-attention needs them.
        image_counts, images = counts, [text.extent.image for text, _, _ in chunks]
        if self.runner.self_pool is None:
            image_counts, images = [1] * len(finished), [text.extent.image for text in finished]
        return Prefill(
            self._ints(ids),
            copy_to_device(join_positions(positions).to(torch.int32), self.runner.device),
            self._ints(cells).long(),
            self._prefill_reads(counts, private, shared, self._ahead(ids)),
            image_rows,
            self._ints([ends[text] - 1 for text in finished]),
            # A chunk that ends no prompt chooses nothing, and FlashAttention takes no empty batch.
            self._image_reads(image_counts, images) if self.runner.image_pool is not None and image_counts else None,
            self._sampling(finished, len(finished)),
            max((text.top for text in finished), default=-1),
        )

    def _ahead(self, ids: Sequence[int]) -> list[int] | None:
        """Return how many positions behind its own each one sees, in models whose images see both ways."""
        if not self.runner.sees_ahead:
            return None
        ahead = [0] * len(ids)
        for i in reversed(range(len(ids) - 1)):
            if ids[i] == ids[i + 1] == self.image_token:
                ahead[i] = ahead[i + 1] + 1
        return ahead

    def _prefill_reads(
        self, counts: Sequence[int], private: Sequence[Span], shared: Sequence[Span], ahead: Sequence[int] | None
    ) -> AnyReads:
        if not self.runner.flash:
            return DenseReads(counts, private, shared, self.runner.pool.layers[0][0], ahead=ahead)
        reads = [self._reads(counts, private, True)]
        if any(length for _, length in shared):
            # Neighbours that share a beginning are one group of queries: it is read once for all of them.
            groups = [list(group) for _, group in itertools.groupby(range(len(counts)), lambda i: shared[i])]
            sizes = [sum(counts[i] for i in group) for group in groups]
            reads.append(self._reads(sizes, [shared[group[0]] for group in groups], False))
        return reads

    def _image_reads(self, counts: Sequence[int], images: Sequence[Span]) -> AnyReads:
        if self.runner.flash:
            return [self._reads(counts, images, False)]
        assert self.runner.image_pool is not None
        return DenseReads(counts, [NOTHING] * len(counts), images, self.runner.image_pool.layers[0][0])

    def _reads(self, counts: Sequence[int], extents: Sequence[Span], causal: bool) -> ExtentReads:
        ends = [0, *itertools.accumulate(counts)]
        # The kernels take prefix sums of the groups' sizes; each extent is its first cell and its length.
        firsts, lengths = [first for first, _ in extents], [length for _, length in extents]
        bounds = max(counts, default=0), max(lengths, default=0)
        return ExtentReads(self._ints(ends), self._ints([*firsts, 0]), self._ints(lengths), *bounds, causal)

    def _ints(self, values: Sequence[int]) -> Tensor:
        return copy_to_device(torch.tensor(values, dtype=torch.int32), self.runner.device)

    # --- the rows of a step

    def step(self, texts: list[Text], tokens: Tensor) -> StepState:
        """Lay growing texts out as the rows of a step; sorts `texts` in the order of rows and numbers them anew.

        Everything but the tokens follows from what the host counts. Tokens that the host has not read yet are gathered
        on the device.

        Args:
            tokens: last tokens of all texts; that of each text is at its `row`.
        """
        shared = _shared_lengths(texts)
        group_of = lambda text: (id(text.base or text.extent), shared[text])  # noqa: E731
        # Groups become neighbours; texts that share nothing come first.
        sizes = Counter(map(group_of, texts))
        first_seen = {key: n for n, key in enumerate(sizes)}
        texts.sort(key=lambda t: (sizes[group_of(t)] > 1 or shared[t] > 0, first_seen[group_of(t)]))
        groups = [list(group) for _, group in itertools.groupby(range(len(texts)), lambda i: group_of(texts[i]))]
        # A text whose own extent is others' beginning reads that with them, and alone only what lies behind it.
        offsets = [shared[text] if text.base is None else 0 for text in texts]
        private = [
            (text.extent.first + offset, text.written + 1 - offset) for text, offset in zip(texts, offsets, strict=True)
        ]
        beginnings = [((text.base or text.extent).first, shared[text]) if shared[text] else NOTHING for text in texts]
        kernels = self.runner.has_kernel
        rows = len(texts)
        if kernels and BUCKETS[-1] >= rows:
            rows = next(bucket for bucket in BUCKETS if bucket >= rows)
        padded = lambda values, fill: [*values, *[fill] * (rows - len(texts))]  # noqa: E731
        columns: list[list[int]] = [
            padded([text.next_position + text.launched - 1 for text in texts], 0),  # position
            padded([text.extent.first + text.written for text in texts], self.runner.pool.cells),  # cell
            padded([text.launched for text in texts], 0),  # tokens so far
            padded([length for _, length in private], 0),  # cells of its own that it reads
            padded([1] * len(texts), 0),  # how far the above move in a step
        ]
        if kernels:
            columns += [list(range(rows + 1)), [*padded([first for first, _ in private], 0), 0]]
            if any(shared.values()):
                columns += _group_reads(rows, groups, [beginnings[group[0]] for group in groups])
            if self.runner.image_pool is not None:
                columns += _group_reads(rows, groups, [texts[group[0]].extent.image for group in groups])
        # One copy brings all integers to the device; the columns are views of it.
        ints = self._ints([value for column in columns for value in column])
        views = list(ints.split([len(column) for column in columns]))
        reads: AnyReads
        image: AnyReads | None
        if kernels:
            reads, image = self._kernel_reads(views, rows)
        else:
            reads, image = self._dense_reads(texts, private, beginnings)
        # Rows were sorted: each takes its last token from where it was in the step before.
        sources = self._ints(padded([text.row for text in texts], 0)).long()
        for row, text in enumerate(texts):
            text.row = row
        return StepState(
            tokens[sources],
            ints,
            ints[: 4 * rows].view(4, rows),
            views[4],
            reads,
            image,
            self._sampling(texts, rows),
            self._logprobs(texts, rows),
        )

    def _kernel_reads(self, columns: Sequence[Tensor], rows: int) -> tuple[list[ExtentReads], list[ExtentReads] | None]:
        """Return reads whose numbers are all on the device, so that a graph holds for any texts in as many rows.

        Into how many pieces extents are cut follows from the number of rows alone, for the same reason.
        """
        group_pieces = lambda key_heads: min(GROUP_PIECES, pieces_of(max(1, rows // ROWS_PER_GROUP), key_heads))  # noqa: E731
        pool, image_pool = self.runner.pool, self.runner.image_pool
        heads = pool.layers[0][0].shape[1]
        reads = [ExtentReads(columns[5], columns[6], columns[3], 1, ANY_LENGTH, False, pieces_of(rows, heads))]
        # The first seven columns are every step's; then groups that share beginnings, and images, where there are any.
        rest, image = columns[7:], None
        if image_pool is not None:
            pieces = group_pieces(image_pool.layers[0][0].shape[1])
            ends, first, lengths = rest[-3:]
            image = [ExtentReads(ends, first, lengths, GROUP_QUERIES, ANY_LENGTH, False, pieces)]
            rest = rest[:-3]
        if rest:
            pieces = group_pieces(heads)
            ends, first, lengths = rest
            reads.insert(0, ExtentReads(ends, first, lengths, GROUP_QUERIES, ANY_LENGTH, False, pieces))
        return reads, image

    def _dense_reads(
        self, texts: Sequence[Text], private: Sequence[Span], shared: Sequence[Span]
    ) -> tuple[DenseReads, DenseReads | None]:
        """Return reads for the next steps, as many as are worth gathering keys and values for."""
        # Each step has columns of its own, which all queries of a row pay for: answers that have grown long get many
        # steps at a time, new ones few, of which yes and no need no more.
        age = sum(text.launched for text in texts) // len(texts)
        steps = min(DENSE_STEPS, 1 + age, max(1, *(text.max_new_tokens - text.launched for text in texts)))
        counts, image_pool = [1] * len(private), self.runner.image_pool
        # What a text writes beyond its extent, in a step too many, goes nowhere.
        rooms = [text.extent.first + text.extent.size - first for text, (first, _) in zip(texts, private, strict=True)]
        reads = DenseReads(counts, private, shared, self.runner.pool.layers[0][0], steps, rooms)
        if image_pool is None:
            return reads, None
        images = [text.extent.image for text in texts]
        return reads, DenseReads(counts, [NOTHING] * len(private), images, image_pool.layers[0][0], steps)

    # --- choosing tokens

    def _sampling(self, texts: Sequence[Text], rows: int) -> RowSampling | None:
        if all(text.temperature == 0 for text in texts):
            return None
        longest = max(text.max_new_tokens for text in texts)
        width = -(-longest // DRAWS_MULTIPLE) * DRAWS_MULTIPLE + 1 if self.runner.compiled else longest + 1
        draws = torch.zeros(rows, width, dtype=torch.float64)
        settings = torch.zeros(3, rows, dtype=torch.float64)
        settings[2] = 1.0  # top_p of rows that belong to no text
        for row, text in enumerate(texts):
            settings[:, row] = torch.tensor([text.temperature, text.top_k, text.top_p], dtype=torch.float64)
            if text.draws is not None:
                draws[row, : len(text.draws)] = text.draws
        filters = any(text.top_k or text.top_p < 1 for text in texts)
        temperature, top_k, top_p = copy_to_device(settings, self.runner.device)
        return RowSampling(temperature, top_k.long(), top_p, copy_to_device(draws, self.runner.device), filters)

    def _logprobs(self, texts: Sequence[Text], rows: int) -> tuple[Tensor, Tensor] | None:
        """Allocate the log-probabilities of a step, if any text wants them."""
        top = max(text.top for text in texts)
        if top < 0:
            return None
        # As many as the API can ask for: a graph writes to tensors of one size.
        top = min(max(top, API_TOP), self.runner.core.lm_head.weight.shape[0])
        device = self.runner.device
        return torch.zeros(rows, 1 + top, device=device), torch.zeros(rows, top, dtype=torch.long, device=device)


def join_positions(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate position numbers, (N,), or (3, N) where any part has three for each token."""
    if all(part.ndim == 1 for part in parts):
        return torch.cat(list(parts))
    return torch.cat([part.expand(3, -1) for part in parts], dim=1)


def _shared_lengths(texts: Sequence[Text]) -> dict[Text, int]:
    """Return how many positions each growing text reads together with others.

    A text whose own extent is the others' beginning reads it with them, as if it shared it with itself.
    """
    by_extent: dict[int, list[int]] = {}
    for text in texts:
        if text.base is not None:
            by_extent.setdefault(id(text.base), []).append(text.shared)
    shared = {}
    for text in texts:
        lengths = by_extent.get(id(text.extent), [])
        shared[text] = text.shared if text.base is not None else max(lengths, key=lengths.count, default=0)
    return shared


def _group_reads(rows: int, groups: Sequence[Sequence[int]], extents: Sequence[Span]) -> list[list[int]]:
    """Return ends, firsts and lengths of one read for each group of rows, padded to `rows` groups.

    The last, empty group takes the rows that belong to no text.
    """
    spare = rows - len(groups)
    ends = [0, *itertools.accumulate(map(len, groups))] + [rows] * spare
    firsts = [first for first, _ in extents] + [0] * (spare + 1)
    return [ends, firsts, [length for _, length in extents] + [0] * spare]
