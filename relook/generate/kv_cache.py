"""The keys and values of all slots, one tensor a layer, each slot written at its own length.

A slot is a row: what it has read stays there until another request takes it, so the next turn of a conversation finds
its earlier ones. Slots that are being answered come first, so that a step reads a slice and copies nothing.

Shape letters: C slots, P places of a slot, R rows of a pass, H heads, S new positions of a row, L places that are read,
D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer

from relook.model.post_decoder import ImageContext

AT_FIRST = 128  # places of a slot


class Room:
    """Keys and values, (C, H, P, D) each: made when they are first written, made longer where that is too short.

    In memory heads lie behind places: `flat` is the same as (C * P, H, 1, D), rows of which are what a step writes.
    What is not written yet is zero: attention multiplies what a mask hides by 0, and 0 times a NaN is no 0.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.pair: tuple[Tensor, ...] = ()
        self.flat: tuple[Tensor, ...] = ()

    def fit(self, keys_RHSD: Tensor, values_RHSD: Tensor, places: int) -> None:
        """Have at least that many places."""
        if self.pair and places <= self.pair[0].shape[2]:
            return
        new = (keys_RHSD, values_RHSD)
        rooms = tuple(side.new_zeros(self.slots, places, side.shape[1], side.shape[3]) for side in new)
        old, self.pair = self.pair, tuple(room.transpose(1, 2) for room in rooms)
        self.flat = tuple(room.flatten(0, 1).unsqueeze(2) for room in rooms)
        for side, before in zip(self.pair, old, strict=False):
            side[:, :, : before.shape[2]] = before

    def read(self, first: int, rows: int, places: int) -> tuple[Tensor, Tensor]:
        """What neighbouring slots begin with: views, (R, H, L, D) each."""
        keys, values = self.pair
        return keys[first : first + rows, :, :places], values[first : first + rows, :, :places]

    def swap(self, a: int, b: int) -> None:
        for side in self.pair:
            side[[a, b]] = side[[b, a]]

    def copy(self, source: int, target: int, places: int) -> None:
        for side in self.pair:
            side[target, :, :places] = side[source, :, :places]


@dataclass(frozen=True)
class Window:
    """What a pass reads and writes.

    Args:
        first: slot of its first row; the others follow.
        places: (R * S,) where the new positions are written, counted over all slots.
        new: S.
        end: L; 0 where no row has anything yet, so that the new positions are all there is.
        room: places that the layers need to have.
    """

    first: int
    places: Tensor
    new: int
    end: int
    room: int


class _SlotLayer(DynamicLayer):
    """One layer of the cache, under transformers' interface. What can be done once a pass is in the window."""

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache, self.room = cache, Room(cache.slots)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        window = self.cache.window
        self.room.fit(key_states, value_states, window.room)
        for side, new in zip(self.room.flat, (key_states, value_states), strict=True):
            rows = new if window.new == 1 else new.transpose(1, 2).flatten(0, 1).unsqueeze(2)
            side.index_copy_(0, window.places, rows)
        if not window.end:
            return key_states, value_states
        return self.room.read(window.first, len(key_states), window.end)

    def get_seq_length(self) -> int:
        return max(0, self.cache.window.end - self.cache.window.new)


class SlotCache(Cache):
    """The language model's keys and values, and those of a post decoder's self-attention, of all slots.

    Args:
        layers: of both together.
        length: most positions of a slot.
    """

    window: Window
    relook_image: ImageContext | None  # where the post decoder looks for it

    def __init__(self, slots: int, layers: int, length: int) -> None:
        self.slots, self.length, self.room = slots, length, 0
        super().__init__(layers=[_SlotLayer(self) for _ in range(layers)])

    def open(
        self, first: int, starts: Sequence[int], counts: Sequence[int], device: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Prepare a pass over neighbouring slots, each of which holds `starts` positions and gets `counts` new ones.

        Returns:
            The new positions' numbers, (R, S), and who sees what, (R, S, L) bool; None where all see all that causality
            lets them: without a mask attention has faster kernels.
        """
        rows, new = len(starts), max(counts)
        end = max(a + b for a, b in zip(starts, counts, strict=True))
        if end >= self.room:
            self.room = min(max(AT_FIRST, 2 * self.room, end + end // 4), self.length) + 1
        steps = torch.arange(new)
        numbers = torch.tensor(starts)[:, None] + steps
        # The last place of a slot is a bin: what fills up shorter rows is written there, and nobody looks.
        places = torch.where(steps < torch.tensor(counts)[:, None], numbers, self.room - 1)
        places += self.room * torch.arange(first, first + rows)[:, None]
        numbers, places = torch.stack([numbers, places]).to(device)  # one copy to the device
        fresh = not any(starts)
        self.window = Window(first, places.flatten(), new, 0 if fresh else end, self.room)
        if fresh or (new == 1 and min(starts) == end - 1):
            return numbers, None
        return numbers, torch.arange(end, device=device) <= numbers[..., None]

    def swap(self, a: int, b: int) -> None:
        for layer in self.layers:
            layer.room.swap(a, b)

    def copy(self, source: int, target: int, places: int) -> None:
        for layer in self.layers:
            layer.room.copy(source, target, places)


class ImageSides:
    """The post decoder's keys and values of every slot's images: its `ImageContext`, a row a slot."""

    def __init__(self, slots: int, blocks: int) -> None:
        self.rooms = [Room(slots) for _ in range(blocks)]
        self.lengths = [0] * slots

    def put(self, slot: int, context: ImageContext | None) -> None:
        """The images of one slot; None where it has none."""
        self.lengths[slot] = 0 if context is None else context.keys[0].shape[2]
        if context is None:
            return
        for room, keys, values in zip(self.rooms, context.keys, context.values, strict=True):
            room.fit(keys, values, self.lengths[slot])
            for side, new in zip(room.pair, (keys, values), strict=True):
                side[slot, :, : self.lengths[slot]] = new[0]

    def view(self, first: int, rows: int) -> ImageContext | None:
        """Those of neighbouring slots, as the post decoder takes them."""
        lengths = self.lengths[first : first + rows]
        most = max(lengths)
        if not most:
            return None
        pairs = [room.read(first, rows, most) for room in self.rooms]
        keys, values = ([pair[side] for pair in pairs] for side in (0, 1))
        if min(lengths) == most:
            return ImageContext(keys, values, None)
        device = keys[0].device
        mask = torch.arange(most, device=device) < torch.tensor(lengths, device=device)[:, None]
        return ImageContext(keys, values, mask)

    def swap(self, a: int, b: int) -> None:
        self.lengths[a], self.lengths[b] = self.lengths[b], self.lengths[a]
        for room in self.rooms:
            room.swap(a, b)

    def copy(self, source: int, target: int) -> None:
        self.lengths[target] = self.lengths[source]
        for room in self.rooms:
            room.copy(source, target, self.lengths[source])
