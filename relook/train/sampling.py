"""The order in which SFT samples are taken: LLaVA's `group_by_modality_length`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import TrainerCallback


class ModalityLengthSampler(Sampler[int]):
    """Indices in steps of one modality and even batches, as LLaVA's trainer draws them.

    Samples with and without images are shuffled apart and cut into steps (the batches of all processes and
    accumulation steps together). What is left over of both makes the last step; the others come in random order. Within
    a step its samples are dealt out so that all batches have about as many tokens.

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
        self.batch_size, self.batches, self.seed = batch_size, batches, seed
        self.epoch = 0  # each has an order of its own

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
        """A step's samples in order of its batches: long ones are dealt out in turn, there and back."""
        order = sorted(step, key=lambda i: -self.lengths[i])
        count = len(order) // self.batch_size
        if count * self.batch_size < len(order):  # the last step of an epoch
            return order
        rounds = [order[start : start + count] for start in range(0, len(order), count)]
        turned = [members if i % 2 == 0 else members[::-1] for i, members in enumerate(rounds)]
        return [members[batch] for batch in range(count) for members in turned]


class Epochs(TrainerCallback):
    """Tells a sampler which epoch begins. accelerate does not reach it where a resumed run skips batches."""

    def __init__(self, sampler: ModalityLengthSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.sampler.epoch = int(state.epoch + 1e-6)
