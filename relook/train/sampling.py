"""The order in which SFT samples are taken: LLaVA's `group_by_modality_length`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler


class ModalityLengthSampler(Sampler[int]):
    """Indices in steps of one modality and similar lengths, as LLaVA's trainer draws them.

    Samples with and without images are shuffled apart and cut into steps (the batches of all processes and
    accumulation steps together). What is left over of both makes the last step; the others come in random order. Within
    a step, long samples stand first and are dealt out to its batches so that these are of similar length.

    Args:
        lengths: of each sample, in tokens.
        has_image: whether each sample has one.
        batch_size: samples of one process and one forward pass.
        batches: how many of those a step has.
    """

    def __init__(
        self, lengths: Sequence[int], has_image: Sequence[bool], batch_size: int, batches: int, seed: int
    ) -> None:
        self.lengths, self.has_image = lengths, has_image
        self.batch_size, self.batches, self.seed, self.epoch = batch_size, batches, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Another order in each epoch, the same one when a killed run comes back to it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        size, whole, rest = self.batch_size * self.batches, [], []
        for wanted in (True, False):
            members = [i for i, image in enumerate(self.has_image) if image == wanted]
            members = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
            full = len(members) // size * size
            whole += [members[start : start + size] for start in range(0, full, size)]
            rest += members[full:]
        steps = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        steps += [rest[start : start + size] for start in range(0, len(rest), size)]
        for step in steps:
            yield from self._dealt(step)

    def _dealt(self, step: Sequence[int]) -> list[int]:
        """A step's samples in order of its batches: each takes one of the longest left, in turn."""
        order = sorted(step, key=lambda i: -self.lengths[i])
        count = -(-len(order) // self.batch_size)
        dealt: list[list[int]] = [[] for _ in range(count)]
        for place, index in enumerate(order):
            round_, turn = divmod(place, count)
            dealt[turn if round_ % 2 == 0 else count - 1 - turn].append(index)
        if len(order) % self.batch_size:  # only the last step of an epoch: its batches are cut from one sequence
            return order
        return [index for batch in dealt for index in batch]
