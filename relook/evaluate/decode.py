"""Decoding trees: one prefix a row, all its branches grown side by side.

A row of the batch holds a prefix (images and what its prompts have in common) once, then the branches' own tokens, in
the order in which they are computed: first all that is left of the prompts, then one token of every branch a step. A
dense mask says who sees whom: a token sees its row's prefix and its own branch. So the keys and values of a prefix
exist once, whatever the number of questions, and a step is one forward pass over (rows, branches) new positions.

Shape letters: R rows, Q branches of a row, B branches of the batch, P and N prefix and branch positions of a row, L
positions in the cache, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ContextDecorator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer

from relook.errors import CheckpointError
from relook.evaluate.choose import Rule
from relook.model.modeling_relook import CACHE
from relook.tree import common_start

CHECK = 2  # steps between two looks at which branches have ended: the host waits for the device there
SPARE = 8  # tokens of every branch that a cache has room for at first; few answers to POPE are longer


@dataclass(frozen=True)
class PromptTree:
    """Prompts over the same images, their common start written once. Every branch has at least one token."""

    prefix: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(prompts: Sequence[tuple[int, ...]]) -> PromptTree:
        """Share the longest common start, which may be empty."""
        length = common_start(prompts, min(map(len, prompts)) - 1)
        return PromptTree(prompts[0][:length], tuple(prompt[length:] for prompt in prompts))

    def positions(self, new_tokens: int) -> int:
        """Places of a row that the tree takes once every branch has that many new tokens."""
        return len(self.prefix) + sum(len(branch) + new_tokens for branch in self.branches)


class _Room(DynamicLayer):
    """A cache layer that is written in place and grows by a quarter when it is full: a step copies only what is new."""

    keys: Tensor | None
    values: Tensor | None

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots = slots
        self.room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.room is None or end > self.room[0].shape[-2]:
            self.slots = max(self.slots, end + end // 4)
            self.room = (_wider(self.keys, key_states, self.slots), _wider(self.values, value_states, self.slots))
            self.is_initialized = True
        keys, values = self.room
        keys[..., start:end, :], values[..., start:end, :] = key_states, value_states
        self.keys, self.values = keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.room = None


def _wider(kept: Tensor | None, like: Tensor, slots: int) -> Tensor:
    room = like.new_empty(*like.shape[:-2], slots, like.shape[-1])
    if kept is not None:
        room[..., : kept.shape[-2], :] = kept
    return room


# Owners of a position that are no branch.
_PREFIX, _NOBODY = -1, -2


class Growth:
    """A batch of trees while it grows.

    Attributes:
        who: (R, Q) each place's branch, counted over the batch; B, one that does not exist, where a row has fewer.
        state: (R, Q, D) what predicts the next token.
    """

    def __init__(self, core: Any, trees: Sequence[PromptTree], images: dict[str, Tensor], pad: int) -> None:
        self.core, self.trees, self.pad = core, trees, pad
        self.branches = sum(len(tree.branches) for tree in trees)
        spare = max(tree.positions(SPARE) for tree in trees)
        text = core.config.text_config
        self.cache: Any = Cache(layers=[_Room(spare) for _ in range(text.num_hidden_layers)])
        self.owner = torch.empty(len(trees), 0, dtype=torch.long, device=core.device)  # (R, L)
        self._read_prefixes(images)
        self._read_branches()

    def _padded(self, rows: Sequence[Sequence[int]], fill: int) -> Tensor:
        longest = max(1, *map(len, rows))
        return torch.tensor([[*row, *[fill] * (longest - len(row))] for row in rows], device=self.core.device)

    def _read_prefixes(self, images: dict[str, Tensor]) -> None:
        """Padded on the right, where a causal trunk does not look; later positions do not see the padding."""
        prefixes = [tree.prefix for tree in self.trees]
        self.owner = self._padded([[_PREFIX] * len(prefix) for prefix in prefixes], _NOBODY)
        self.core.model(input_ids=self._padded(prefixes, self.pad), use_cache=True, **{CACHE: self.cache}, **images)

    def _read_branches(self) -> None:
        ids: list[list[int]] = []
        positions: list[list[int]] = []
        owners: list[list[int]] = []
        ends: list[list[int]] = []
        who: list[list[int]] = []
        number = 0
        for tree in self.trees:
            for row in (ids, positions, owners, ends, who):
                row.append([])
            for branch in tree.branches:
                ids[-1] += branch
                positions[-1] += range(len(tree.prefix), len(tree.prefix) + len(branch))
                owners[-1] += [number] * len(branch)
                ends[-1].append(len(ids[-1]) - 1)
                who[-1].append(number)
                number += 1
        self.who = self._padded(who, self.branches)
        owner, place = self._padded(owners, self.branches), self._padded(positions, 0)
        hidden = self._forward(self._padded(ids, self.pad), place, owner)
        end = self._padded(ends, 0)
        self.state = hidden.gather(1, end[..., None].expand(-1, -1, hidden.shape[-1]))
        self.place = place.gather(1, end)  # (R, Q) position of each branch's last token

    def _forward(self, ids: Tensor, place: Tensor, owner: Tensor) -> Tensor:
        """New positions of all rows, (R, n): the last hidden states, (R, n, D)."""
        n, before = ids.shape[1], self.owner
        self.owner = torch.cat([before, owner], 1)
        mine = self.owner[:, None, :] == owner[:, :, None]
        mine[..., before.shape[1] :] &= torch.ones(n, n, dtype=torch.bool, device=ids.device).tril()
        sees = mine | (self.owner == _PREFIX)[:, None, :]
        hidden: Tensor = self.core.model(
            input_ids=ids,
            attention_mask=additive(sees, self.core.dtype),
            position_ids=place,
            use_cache=True,
            **{CACHE: self.cache},
        ).last_hidden_state
        return hidden

    def step(self, tokens: Tensor) -> None:
        """Append one token to every branch, (R, Q)."""
        self.place = self.place + 1
        self.state = self._forward(tokens, self.place, self.who)

    def drop(self, ended: Tensor) -> bool:
        """Leave out branches that have ended, (B + 1,) bool, and rows once half have none left. False if all have."""
        alive = ~ended[self.who]
        counts = alive.sum(1).tolist()
        most = max(counts)
        if not most:
            return False
        if most < self.who.shape[1]:
            order = (~alive).long().argsort(dim=1, stable=True)[:, :most]
            self.who, self.place = self.who.gather(1, order), self.place.gather(1, order)
            self.state = self.state.gather(1, order[..., None].expand(-1, -1, self.state.shape[-1]))
        rows = [row for row, count in enumerate(counts) if count]
        if len(rows) <= len(counts) // 2:
            self._keep_rows(torch.tensor(rows, device=self.who.device))
        return True

    def _keep_rows(self, rows: Tensor) -> None:
        self.who, self.place, self.state, self.owner = (
            kept[rows] for kept in (self.who, self.place, self.state, self.owner)
        )
        self.cache.batch_select_indices(rows)
        context = getattr(self.cache, "relook_image", None)
        if context is not None:
            self.cache.relook_image = context.select(rows)


def additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask (R, Q, L) bool as attention adds it, (R, 1, Q, L), made once for all layers.

    Rows start at multiples of eight elements: CUDA's kernels would copy the mask for that in each layer.
    """
    R, Q, L = sees.shape
    mask = torch.full((R, 1, Q, L + -L % 8), -torch.inf, dtype=dtype, device=sees.device)[..., :L]
    return mask.masked_fill_(sees[:, None], 0)


class AnyLength(ContextDecorator):
    """Attention by kernels that take a text of any length at once. The setting is the process's: it is as it was before
    when the last of those who are inside, on whatever thread, is out.

    cuDNN's, torch's first choice on Hopper and Blackwell since 2.11, make a plan, in tens of milliseconds, for each
    number of rows and length that a thread has not seen (pytorch's MHA.cpp), and texts that grow have new ones always.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.before = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                torch.backends.cuda.enable_cudnn_sdp(self.before)


any_length = AnyLength()


def require_finite(finite: Tensor | bool) -> None:
    """Refuse to call it an answer what a model says that computes no numbers.

    Raises:
        CheckpointError: the numbers were not finite.
    """
    if not finite:
        raise CheckpointError(
            "The model's logits are NaN or infinite, though all of its weights are numbers.",
            "float16 overflows where bfloat16 and float32 do not: choose another --dtype.",
        )


@torch.inference_mode()
def decode(
    core: Any,
    trees: Sequence[PromptTree],
    images: dict[str, Tensor],
    rule: Rule,
    max_new_tokens: int,
    numbers: Sequence[int],
) -> list[list[int]]:
    """The new tokens of every branch, in order; what ends an answer is the last of them.

    Args:
        core: a transformers model of relook's kinds, below any adapter.
        images: what the model takes for the images of all trees, in order; empty where there are none.
        numbers: of the branches, for sampling.

    Raises:
        CheckpointError: logits that are no numbers.
    """
    growth = Growth(core, trees, images, rule.pad)
    B, device = growth.branches, core.device
    draws = rule.draws([*numbers, 0], max_new_tokens)  # here and below, the last row is nobody's
    draws = None if draws is None else draws.to(device)
    said = torch.full((B + 1, max_new_tokens), rule.pad, device=device)
    length = torch.full((B + 1,), max_new_tokens, device=device)
    ended = torch.arange(B + 1, device=device) == B
    finite = torch.ones((), dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        who = growth.who.flatten()
        logits = core.lm_head(growth.state).flatten(0, 1)
        finite &= (logits.isfinite().all(-1) | (who == B)).all()
        said[who, t] = rule.choose(logits, None if draws is None else draws[who, t], first=t == 0)
        ends = rule.ends(said[who, : t + 1]) & ~ended[who]
        length[who] = torch.where(ends, t + 1, length[who])
        ended[who] |= ends
        if t + 1 == max_new_tokens or (t % CHECK == CHECK - 1 and not growth.drop(ended)):
            break
        growth.step(said[growth.who, t])
    require_finite(finite)
    return [row[:count] for row, count in zip(said[:B].tolist(), length[:B].tolist(), strict=True)]
