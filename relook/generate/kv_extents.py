"""Memory of the pool: which text owns which cells, and whose beginning a new text can share.

No pages: a text owns one extent of neighbouring cells, large enough for its prompt and its longest answer. A prompt
that begins like a text in the pool, over the same images, reads that beginning where it lies. The extents of ended
texts are a cache, emptied least recently used first.
"""

from __future__ import annotations

from collections.abc import Mapping

from relook.generate.model_runner import ModelRunner
from relook.generate.text import Extent, ImageFeatures, ImageKey, Text

MIN_SHARED = 16  # positions; a shorter common beginning is read again

Copied = tuple[Extent, int, int]  # positions from:to of an extent, which are copied into another one


class ExtentAllocator:
    """First-fit allocator of neighbouring cells."""

    def __init__(self, cells: int) -> None:
        self.free = [(0, cells)]  # (first, count), in order, no two adjacent

    def allocate(self, count: int) -> int | None:
        """Return the first of `count` free cells in a row, or None if there are not as many."""
        for i, (first, size) in enumerate(self.free):
            if size >= count:
                self.free[i : i + 1] = [(first + count, size - count)] if size > count else []
                return first
        return None

    def release(self, first: int, count: int) -> None:
        """Free cells that were allocated."""
        merged: list[tuple[int, int]] = []
        for start, size in sorted([*self.free, (first, count)]):
            if merged and sum(merged[-1]) == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + size)
            else:
                merged.append((start, size))
        self.free = merged


class KVExtents:
    """The extents of all texts of one model, living or kept for later ones.

    Args:
        keeps_answers: whether prompts may continue an answer, so that extents of whole texts are kept; otherwise only
            those that begin from scratch are.
    """

    def __init__(self, runner: ModelRunner, keeps_answers: bool) -> None:
        self.runner, self.keeps_answers = runner, keeps_answers
        self.image_token: int = runner.core.config.image_token_id
        self.allocator = ExtentAllocator(runner.pool.cells)
        self.image_allocator = ExtentAllocator(runner.image_pool.cells if runner.image_pool is not None else 0)
        self.by_images: dict[tuple[ImageKey, ...], list[Extent]] = {}  # the extents that new texts can share
        self._latest: Extent | None = None  # of the last text that began from scratch

    def place(self, text: Text, features: Mapping[ImageKey, ImageFeatures], share: bool, step: int) -> bool:
        """Give a text its extent. Return False if there is no room.

        Args:
            features: of the text's images, where the post decoder reads them.
            share: whether the text may begin with what is in the pool.
            step: the current step, for the order of eviction.
        """
        base, shared, copies = self._find_beginning(text) if share else (None, 0, [])
        pinned = [extent for extent in (base, *(extent for extent, _, _ in copies)) if extent is not None]
        for extent in pinned:
            extent.users += 1  # eviction must not take what this text is about to share
        size = len(text.ids) - shared + text.max_new_tokens
        image, first = (0, 0), self._allocate(self.allocator, size, step)
        if first is not None and base is None and self.runner.image_pool is not None and text.images:
            read = [vision for _, vision in (features[key] for key in text.images) if vision is not None]
            length = sum(map(len, read))
            image_first = self._allocate(self.image_allocator, length, step)
            if image_first is None:
                self.allocator.release(first, size)
                first = None
            else:
                image = image_first, length
                self.runner.store_image_context(read, image_first)
        for extent in pinned:
            extent.users -= 1
        if first is None:
            return False
        text.reused = text.read = shared
        for extent, begin, end in copies:
            self.runner.copy(extent.first + begin - extent.start, first + begin - shared, end - begin)
            text.reused = text.read = end
        text.extent = Extent(text.images, text.ids, first, size, base, shared, base.image if base else image, text.read)
        text.extent.outlives = base is None or self.keeps_answers
        if base is not None:
            base.users += 1
        else:
            self._latest = text.extent
        if text.extent.outlives:
            self.by_images.setdefault(text.images, []).append(text.extent)
        return True

    def release(self, text: Text, step: int) -> None:
        """Let go of an ended text's extent, which stays for others where it may outlive its text."""
        extent = text.extent
        extent.users -= 1
        extent.last_used = step
        # The keys and values of the answer's tokens are there, except the last token's, which no step read.
        extent.ids = (*text.ids[: text.read], *text.tokens[: max(0, text.launched - 1)])
        extent.filled = len(extent.ids)
        if not extent.outlives:
            self._free(extent, step)

    def drop(self, extent: Extent, step: int = 0) -> None:
        """Evict an extent that no text reads."""
        self.by_images[extent.images].remove(extent)
        if not self.by_images[extent.images]:
            del self.by_images[extent.images]
        self._free(extent, step)

    def _find_beginning(self, text: Text) -> tuple[Extent | None, int, list[Copied]]:
        """Find the longest beginning of a text that is in the pool.

        Returns:
            The extent whose first positions the text reads where they lie, the number of these, and what it copies:
            positions behind them, or the words before the image of a text over another image.
        """
        limit = len(text.ids) - 1 if text.max_shared is None else min(text.max_shared, len(text.ids) - 1)
        best, longest = None, MIN_SHARED - 1
        for extent in self.by_images.get(text.images, ()):
            shared = shared_length(extent.ids, text.ids, limit)
            # What is read anew must hold no placeholder: a text's images are all shared, or all its own.
            if shared > longest and self.image_token not in text.ids[shared:]:
                best, longest = extent, shared
        if best is not None:
            if best.base is None or longest <= best.start:
                return best.base or best, longest, []
            # An extent has one base: what lies behind the base's part is copied, as far as it is read yet.
            ready = min(longest, best.filled)
            return best.base, best.start, [(best, best.start, ready)] if ready > best.start else []
        latest = self._latest
        # A post decoder's self-attention knows the images from the first position on, so its words are not shared.
        if latest is not None and latest.images != text.images and self.runner.self_pool is None:
            before_image = text.ids.index(self.image_token) if text.images else limit
            shared = shared_length(latest.ids, text.ids, min(before_image, limit, latest.filled))
            if shared >= MIN_SHARED:
                return None, 0, [(latest, 0, shared)]
        return None, 0, []

    def _allocate(self, allocator: ExtentAllocator, count: int, step: int) -> int | None:
        """Allocate cells, evicting extents that no text reads, least recently used first."""
        while (first := allocator.allocate(count)) is None:
            unused = [extent for extents in self.by_images.values() for extent in extents if not extent.users]
            if not unused:
                return None
            self.drop(min(unused, key=lambda extent: extent.last_used), step)
        return first

    def _free(self, extent: Extent, step: int) -> None:
        self.allocator.release(extent.first, extent.size)
        if extent.base is not None:
            extent.base.users -= 1
            extent.base.last_used = step
        elif extent.image[1]:
            self.image_allocator.release(*extent.image)
        if extent is self._latest:
            self._latest = None


def shared_length(a: tuple[int, ...], b: tuple[int, ...], limit: int) -> int:
    """Return the length of the common beginning of two sequences, at most `limit`."""
    low, high = 0, min(len(a), len(b), limit)
    # Bisect: comparing slices runs in C, comparing elements one by one does not.
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
