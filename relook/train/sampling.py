"""The order in which training sees its samples, where a recipe asks for batches of one kind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from relook.train.batches import Item


class ModalitySampler(Sampler[int]):
    """LLaVA's `group_by_modality_length`: a batch holds samples with images or without, not both, of similar length.

    What is left over of the two kinds comes last, in batches that may be mixed. The order depends on the seed and the
    epoch alone, so a run that was killed goes on in it.

    Args:
        size: samples in a step of the optimizer, over all processes.
    """

    def __init__(self, items: Sequence[Item], size: int, seed: int) -> None:
        self.lengths = [len(item.example.tree) for item in items]
        kinds = [bool(item.example.images) for item in items]
        self.kinds = [[i for i, found in enumerate(kinds) if found is kind] for kind in (True, False)]
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        groups, rest = list[list[int]](), list[int]()
        for members in filter(None, self.kinds):
            lengths = [self.lengths[i] for i in members]
            order = [members[i] for i in get_length_grouped_indices(lengths, self.size, generator=generator)]
            whole = len(order) // self.size * self.size
            groups += [order[start : start + self.size] for start in range(0, whole, self.size)]
            rest += order[whole:]
        for chosen in torch.randperm(len(groups), generator=generator).tolist():
            yield from groups[chosen]
        yield from rest
