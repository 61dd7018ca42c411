"""Prefix-sharing trees (image and prompt, then branches) and the packer that turns trees into a batch.

In a causal trunk, image and prompt positions do not attend to the response. A preference pair, or all questions on one
image, can therefore share them. The prefix is computed once, every branch sees the prefix and itself, and position ids
restart at the prefix's end. The hidden states equal those of separate rows, up to the order of additions.

All prompts of a template also start with the same tokens before their image. Trees that share a row may store these
tokens once, as a root that precedes them.

Shape letters used below: R rows, L positions of a row, T trees, S kept slots of a tree, N supervised targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PREFIX = 0  # branch number of the shared prefix; branches are numbered from 1
PADDING = -1  # tree and branch number of a padding position
ROOT = -2  # tree number of a position that several trees share
BLOCK = 128  # positions per block of FlexAttention's mask
STAGING_BYTES = 32 << 20  # size of the pinned buffer that stages copies from a GPU


@dataclass(frozen=True)
class TokenRow:
    """Plain token sequence, with a flag per token that marks the targets of the loss."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]


def common_prefix_length(sequences: Sequence[tuple[int, ...]], limit: int) -> int:
    """Return the length of the common prefix of all sequences, at most `limit`; each must have `limit` tokens."""
    first, last = min(sequences), max(sequences)  # a prefix shared by the lexicographic extremes is shared by all
    return next((i for i in range(limit) if first[i] != last[i]), limit)


@dataclass(frozen=True)
class Tree:
    """Shared prefix, with the remainder of each row as a branch. Targets lie in branches only."""

    prefix: tuple[int, ...]
    branches: tuple[TokenRow, ...]

    @staticmethod
    def of(rows: Sequence[TokenRow]) -> Tree:
        """Build a tree that shares the longest common unsupervised prefix of `rows`.

        Every branch keeps at least one token.

        Raises:
            ValueError: the rows have no common unsupervised prefix.
        """
        # Up to the first target of any row, and one token less than the shortest row.
        length = min(
            min(row.supervised.index(True) if True in row.supervised else len(row.ids) for row in rows),
            min(len(row.ids) for row in rows) - 1,
        )
        length = common_prefix_length([row.ids for row in rows], length)
        if length < 1:
            raise ValueError("the rows of a tree have no common unsupervised prefix")
        return Tree(rows[0].ids[:length], tuple(TokenRow(row.ids[length:], row.supervised[length:]) for row in rows))

    def __len__(self) -> int:
        return len(self.prefix) + sum(len(branch.ids) for branch in self.branches)


Value = TypeVar("Value")


def to_device(value: Value, device: torch.device | str) -> Value:
    """Move every tensor field of a dataclass, and tensors in lists and dicts, to a device; copies to a GPU do not wait.

    After `pin_memory`, the copy need not wait for the GPU either. A copy from pageable memory starts only once the GPU
    has finished all earlier work.
    """
    asynchronous = torch.device(device).type != "cpu"  # a copy to the CPU must block: its result is read at once
    return _map_tensors(value, lambda tensor: tensor.to(device, non_blocking=asynchronous))


def pin_memory(value: Value) -> Value:
    """Return a copy of a dataclass with its CPU tensors in pinned memory; tensors on a GPU stay there."""
    return _map_tensors(value, lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)


def copy_to_cpu(tensor: Tensor) -> Tensor:
    """Copy a tensor to pageable CPU memory; from a GPU, through a pinned buffer on the current stream.

    The driver's own copy into pageable memory is slow, and it keeps other threads from launching work.
    """
    if tensor.device.type == "cpu":
        return tensor
    copied = torch.empty_like(tensor, device="cpu")
    rows = max(1, STAGING_BYTES // max(1, tensor[:1].nbytes))
    buffer = torch.empty_like(tensor[:rows], device="cpu", pin_memory=True)
    for target, part in zip(copied.split(rows), tensor.split(rows), strict=True):
        # Device to pinned buffer, then to the result; the buffer is reused, so wait for each chunk.
        staged = buffer[: len(part)].copy_(part, non_blocking=True)
        torch.cuda.current_stream(tensor.device).synchronize()
        target.copy_(staged)
    return copied


def _map_tensors(value: Value, function: Callable[[Tensor], Tensor]) -> Value:
    mapped: dict[str, Any] = {}
    for field in fields(value):  # type: ignore[arg-type]
        content = getattr(value, field.name)
        if isinstance(content, Tensor):
            mapped[field.name] = function(content)
        elif isinstance(content, list):
            mapped[field.name] = [function(element) if isinstance(element, Tensor) else element for element in content]
        elif isinstance(content, dict):
            mapped[field.name] = {key: function(element) for key, element in content.items()}
        elif hasattr(content, "__dataclass_fields__"):
            mapped[field.name] = _map_tensors(content, function)
    return replace(value, **mapped)  # type: ignore[type-var]


@dataclass(frozen=True)
class Targets:
    """Locations of the supervised tokens among the kept hidden states of a batch of trees.

    The state in slot `slot` of tree `tree` predicts token `id`, which belongs to branch `branch` (counted over the
    whole batch, in order of trees). `kept_branch` (T, S) is each slot's branch within its tree, PADDING where empty.
    """

    tree: Tensor  # (N,)
    slot: Tensor  # (N,)
    id: Tensor  # (N,)
    branch: Tensor  # (N,)
    branches: int
    kept_branch: Tensor  # (T, S)

    def sum_by_branch(self, values_N: Tensor) -> Tensor:
        """Sum one value per target (N,) into one value per branch, shape (branches,)."""
        return values_N.new_zeros(self.branches).index_add_(0, self.branch, values_N)

    def self_attention_mask(self) -> Tensor:
        """Return the self-attention mask between kept slots, (T, S, S) bool, for blocks with self-attention."""
        S = self.kept_branch.shape[1]
        # A query sees earlier keys of the prefix and of its own branch. The diagonal keeps padding rows from being
        # fully masked, which would give NaN in the softmax.
        q, k = self.kept_branch[:, :, None], self.kept_branch[:, None, :]
        causal = torch.ones(S, S, dtype=torch.bool, device=q.device).tril()
        return causal & (k != PADDING) & ((k == PREFIX) | (k == q)) | torch.eye(S, dtype=torch.bool, device=q.device)


@dataclass(frozen=True)
class PackedTrees:
    """Batch of trees laid out in rows, in the form that the trunk reads.

    A root is followed by the trees that share it, and a prefix by its branches. The queries that see a key therefore
    form one contiguous range: position q sees k if first_query[k] <= q <= last_query[k].
    """

    ids: Tensor  # (R, L)
    position_ids: Tensor  # (R, L), or (3, R, L) where an image's positions have a time, a row and a column (M-RoPE)
    tree_index: Tensor  # (R, L) index of the tree, ROOT at shared root positions, PADDING at padding
    last_query: Tensor  # (R, L) int32, last position of the row that sees this one; padding sees only itself
    first_query: Tensor  # (R, L) int32, first one: itself, or the first of its image where these see both ways
    keep: Tensor  # (T, S) flat index r * L + l of the positions whose hidden states are kept
    targets: Targets

    def dense_mask(self, window: int | None = None) -> Tensor:
        """Return the dense attention mask, (R, 1, L, L) bool.

        It is causal: a position sees its root and, within its tree, only the prefix and its own branch.
        """
        position = torch.arange(self.ids.shape[1], device=self.ids.device)
        # (R, L, L): the queries of a key are a range; the axis of length 1 is that of the heads.
        first, last = self.first_query[:, None], self.last_query[:, None]
        mask = (position[:, None] >= first) & (position[:, None] <= last)
        if window is not None:
            # Position numbers count on from the prefix in each branch, as in rows of their own.
            mask &= self.position_ids[:, :, None] - self.position_ids[:, None, :] < window
        return mask[:, None]


def assign_rows(lengths: Sequence[int], row_length: int | None) -> list[list[int]]:
    """Assign trees to rows by next-fit in the given order, so that images keep their order.

    Without a `row_length`, every tree gets its own row.
    """
    rows: list[list[int]] = []
    used = 0
    for index, length in enumerate(lengths):
        if rows and row_length is not None and used + length <= row_length:
            rows[-1].append(index)
            used += length
        else:
            rows.append([index])
            used = length
    return rows


def kept_positions(tree: Tree, keep_all: bool) -> list[int]:
    """Return the positions whose hidden states the post decoder needs.

    These are the positions that predict a target or, with `keep_all`, all positions of the tree.
    """
    if keep_all:
        return list(range(len(tree)))
    return sorted({source for source, _, _ in _predictions(tree)})


def _predictions(tree: Tree) -> Iterator[tuple[int, int, int]]:
    """Yield, for every target of a tree, the predicting position, the token id and the branch, counted from 0.

    A branch's first token is predicted by the last position of the prefix.
    """
    fork, start = len(tree.prefix) - 1, len(tree.prefix)
    for number, branch in enumerate(tree.branches):
        for i, (token, supervised) in enumerate(zip(branch.ids, branch.supervised, strict=True)):
            if supervised:
                yield (start + i - 1 if i else fork), token, number
        start += len(branch.ids)


def _branch_numbers(tree: Tree) -> list[int]:
    numbers = [PREFIX] * len(tree.prefix)
    for number, branch in enumerate(tree.branches, 1):
        numbers += [number] * len(branch.ids)
    return numbers


def _last_queries(tree: Tree) -> list[int]:
    """Return, for every position of a tree, the last position that sees it, counted from the tree's start.

    A prefix is seen to the end of the tree, a branch to its own end.
    """
    last_query = [len(tree) - 1] * len(tree.prefix)
    for branch in tree.branches:
        last_query += [len(last_query) + len(branch.ids) - 1] * len(branch.ids)
    return last_query


def _position_ids(tree: Tree) -> list[int]:
    start = len(tree.prefix)
    positions = list(range(start))
    # Every branch goes on from the prefix, as in a row of its own.
    for branch in tree.branches:
        positions += range(start, start + len(branch.ids))
    return positions


@dataclass(frozen=True)
class TreeTargets:
    """Targets of one tree, in the layout of `Targets`; computed once and reused in every batch."""

    slot: Tensor  # (N,)
    id: Tensor  # (N,)
    branch: Tensor  # (N,) counted from 0
    branches: int
    kept_branch: Tensor  # (S,)

    @staticmethod
    def of(tree: Tree, keep_all: bool = False) -> TreeTargets:
        """Build the targets of a tree; `keep_all` keeps the hidden states of all positions."""
        positions = kept_positions(tree, keep_all)
        slot_of = {position: slot for slot, position in enumerate(positions)}
        numbers = _branch_numbers(tree)
        # One row (slot, token id, branch) per target; the view serves trees without any.
        rows = torch.tensor([(slot_of[source], token, branch) for source, token, branch in _predictions(tree)])
        slot, id, branch = rows.view(-1, 3).unbind(1)
        kept_branch = torch.tensor([numbers[position] for position in positions])
        return TreeTargets(slot, id, branch, len(tree.branches), kept_branch)


def concatenate_targets(trees: Sequence[TreeTargets]) -> Targets:
    """Concatenate the targets of single trees into those of a batch."""
    counts = torch.tensor([len(tree.id) for tree in trees])
    branches = torch.tensor([tree.branches for tree in trees])
    # Branch numbers are offset by the branches of all earlier trees: an exclusive cumulative sum.
    return Targets(
        torch.arange(len(trees)).repeat_interleave(counts),
        torch.cat([tree.slot for tree in trees]),
        torch.cat([tree.id for tree in trees]),
        torch.cat([tree.branch for tree in trees]) + (branches.cumsum(0) - branches).repeat_interleave(counts),
        int(branches.sum()),
        pad_sequence([tree.kept_branch for tree in trees], batch_first=True, padding_value=PADDING),
    )


def batch_targets(trees: Sequence[Tree], keep_all: bool = False) -> Targets:
    """Build the `Targets` of a batch of trees; `keep_all` keeps the hidden states of all positions."""
    return concatenate_targets([TreeTargets.of(tree, keep_all) for tree in trees])


def common_root_length(trees: Sequence[Tree], image_token_id: int) -> int:
    """Return the number of leading tokens, before any image, that all trees share.

    Every tree keeps at least one prefix token of its own.
    """
    # The -1 leaves the last prefix token to each tree: it predicts the first token of every branch.
    length = common_prefix_length([tree.prefix for tree in trees], min(len(tree.prefix) for tree in trees) - 1)
    beginning = trees[0].prefix[:length]
    return beginning.index(image_token_id) if image_token_id in beginning else length


def round_up_to_blocks(length: int) -> int:
    """Return `length` rounded up to a multiple of FlexAttention's block size."""
    return -(-length // BLOCK) * BLOCK


def pack(
    trees: Sequence[Tree],
    pad_id: int,
    keep_all: bool = False,
    row_length: int | None = None,
    round_up: Callable[[int], int] = int,
    root_length: int = 0,
    trees_per_root: int | None = None,
    positions: Sequence[Tensor] | None = None,
    image_token_id: int | None = None,
) -> PackedTrees:
    """Lay trees out in rows: several per row while they fit into `row_length`, or one per row without it.

    Args:
        trees: the trees of the batch, in the order of their images.
        pad_id: token id at padding positions.
        keep_all: keep the hidden states of all positions, not only of those that predict a target.
        row_length: most positions per row; None puts one tree in each row.
        round_up: maps the length that the longest row needs to the length that rows get.
        root_length: leading tokens that the trees of a row store once; see `common_root_length`.
        trees_per_root: most trees that share a root; the trees after them get a new root. None: one root per row.
        positions: each tree's position numbers, (positions,) or (3, positions). None: they count the tokens, and every
            branch goes on from the prefix.
        image_token_id: of placeholders whose runs see each other both ways; None where all see what is before them.
    """
    group_size = trees_per_root or len(trees)
    # With one root per row, a row has room for one root and its trees' own tokens. A row of several roots may need
    # one for each tree, so every tree counts with a root of its own.
    per_row = 0 if trees_per_root else root_length
    rows = assign_rows([len(tree) - per_row for tree in trees], None if row_length is None else row_length - per_row)
    # Length of the longest row: its roots, plus its trees without the shared tokens.
    L = round_up(
        max(root_length * -(-len(row) // group_size) + sum(len(trees[t]) - root_length for t in row) for row in rows)
    )
    shape = (len(rows), L)
    # Start from all padding, where every position sees only itself.
    ids = torch.full(shape, pad_id)
    numbers = positions or [torch.tensor(_position_ids(tree)) for tree in trees]
    position_ids = torch.zeros(*numbers[0].shape[:-1], *shape, dtype=torch.long)
    tree_RL = torch.full(shape, PADDING)
    last_query = torch.arange(L, dtype=torch.int32).repeat(len(rows), 1)
    targets = batch_targets(trees, keep_all)
    keep = torch.zeros(targets.kept_branch.shape, dtype=torch.long)
    for r, row in enumerate(rows):
        start = root_start = 0  # where the next tree starts, and where the current root starts
        for in_row, t in enumerate(row):
            tree = trees[t]
            tokens = [*tree.prefix, *(token for branch in tree.branches for token in branch.ids)]
            skipped = root_length if in_row % group_size else 0  # root tokens that an earlier tree has already stored
            span = slice(start, start + len(tree) - skipped)
            ids[r, span] = torch.tensor(tokens[skipped:])
            position_ids[..., r, span] = numbers[t][..., skipped:]
            tree_RL[r, span] = t
            last_query[r, span] = start - skipped + torch.tensor(_last_queries(tree)[skipped:], dtype=torch.int32)
            if not skipped:  # this tree brings a new root
                root_start = start
                tree_RL[r, start : start + root_length] = ROOT
            # The root stays visible up to the end of the last tree that shares it.
            last_query[r, root_start : root_start + root_length] = span.stop - 1
            in_tree = torch.tensor(kept_positions(tree, keep_all))
            # Positions inside the root lie at the shared copy, all others at the tree's own offset.
            offset = torch.where(in_tree < root_length, root_start, start - skipped)
            keep[t, : len(in_tree)] = r * L + in_tree + offset
            start = span.stop
    first_query = torch.arange(L, dtype=torch.int32).repeat(len(rows), 1)
    if image_token_id is not None:
        # All positions of an image see it from its first one on: the running maximum of where images begin. `roll`
        # brings the row's end to its beginning, which does no harm: an image there begins at 0, as the maximum does.
        is_image = ids == image_token_id
        begins = is_image & ~is_image.roll(1, dims=1)
        first_query = torch.where(is_image, (first_query * begins).cummax(1).values, first_query)
    return PackedTrees(ids, position_ids, tree_RL, last_query, first_query, keep, targets)
