"""Trees: one prefix (image and prompt) and its branches, and the one packer that turns trees into a batch.

In a causal trunk the positions of image and prompt do not see the response. A preference pair, or all questions on one
image, therefore share them: the prefix is computed once, every branch sees the prefix and itself, and positions restart
at the prefix's end. The states are those of separate rows, up to the order of additions.

All prompts of a template begin alike, too, before their image. Trees that share a row may have that once, as a root
before them.

Shape letters used below: R rows, L positions of a row, T trees, S kept slots of a tree, N supervised targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PREFIX = 0  # branch number of the shared prefix; branches count from 1
PADDING = -1  # tree and branch number of a position that belongs to nothing
ROOT = -2  # tree number of a position that several trees share
BLOCK = 128  # positions of a block of FlexAttention's mask
STAGING_BYTES = 32 << 20  # of pinned memory that a copy from a GPU passes


@dataclass(frozen=True)
class Row:
    """A plain sequence: token ids, and for each whether it is a target of the loss."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]


def common_start(sequences: Sequence[tuple[int, ...]], most: int) -> int:
    """How many tokens all sequences begin with, `most` at most; each must have as many."""
    first, last = min(sequences), max(sequences)  # what these two share, all do
    return next((i for i in range(most) if first[i] != last[i]), most)


@dataclass(frozen=True)
class Tree:
    """A shared prefix and the rows' remainders as branches. Targets lie in branches only."""

    prefix: tuple[int, ...]
    branches: tuple[Row, ...]

    @staticmethod
    def of(rows: Sequence[Row]) -> Tree:
        """Share the longest common unsupervised prefix of `rows`; every branch keeps at least one token."""
        length = min(
            min(row.supervised.index(True) if True in row.supervised else len(row.ids) for row in rows),
            min(len(row.ids) for row in rows) - 1,
        )
        length = common_start([row.ids for row in rows], length)
        if length < 1:
            raise ValueError("the rows of a tree have no common unsupervised prefix")
        return Tree(rows[0].ids[:length], tuple(Row(row.ids[length:], row.supervised[length:]) for row in rows))

    def __len__(self) -> int:
        return len(self.prefix) + sum(len(branch.ids) for branch in self.branches)


T_ = TypeVar("T_")


def to_device(value: T_, device: torch.device | str) -> T_:
    """Move every tensor field of a dataclass, and the tensors of lists. A copy to a GPU is not waited for.

    Nor does it wait, if it is `pinned`: a copy from ordinary memory begins when the GPU has done all work before it.
    """
    ahead = torch.device(device).type != "cpu"  # from a GPU, what is read at once has to be there
    return _with_tensors(value, lambda tensor: tensor.to(device, non_blocking=ahead))


def pinned(value: T_) -> T_:
    """The same in memory that a GPU copies from by itself; what is on a GPU already stays there."""
    return _with_tensors(value, lambda tensor: tensor.pin_memory() if tensor.device.type == "cpu" else tensor)


def to_host(tensor: Tensor) -> Tensor:
    """The same in ordinary memory. From a GPU it passes a pinned buffer, on the current stream.

    The driver's own copy into ordinary memory is slow, and no other thread launches work meanwhile.
    """
    if tensor.device.type == "cpu":
        return tensor
    held = torch.empty_like(tensor, device="cpu")
    rows = max(1, STAGING_BYTES // max(1, tensor[:1].nbytes))
    buffer = torch.empty_like(tensor[:rows], device="cpu", pin_memory=True)
    for to, part in zip(held.split(rows), tensor.split(rows), strict=True):
        staged = buffer[: len(part)].copy_(part, non_blocking=True)
        torch.cuda.current_stream(tensor.device).synchronize()
        to.copy_(staged)
    return held


def _with_tensors(value: T_, work: Callable[[Tensor], Tensor]) -> T_:
    made: dict[str, Any] = {}
    for field in fields(value):  # type: ignore[arg-type]
        item = getattr(value, field.name)
        if isinstance(item, Tensor):
            made[field.name] = work(item)
        elif isinstance(item, list):
            made[field.name] = [work(one) if isinstance(one, Tensor) else one for one in item]
        elif hasattr(item, "__dataclass_fields__"):
            made[field.name] = _with_tensors(item, work)
    return replace(value, **made)  # type: ignore[type-var]


@dataclass(frozen=True)
class Targets:
    """Where the supervised tokens are among the kept states of a batch of trees.

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
        """Add up one value per target to one value per branch, shape (branches,)."""
        return values_N.new_zeros(self.branches).index_add_(0, self.branch, values_N)

    def kept_mask(self) -> Tensor:
        """Who may see whom among the kept slots, for a block with self-attention: (T, S, S) bool."""
        S = self.kept_branch.shape[1]
        q, k = self.kept_branch[:, :, None], self.kept_branch[:, None, :]
        causal = torch.ones(S, S, dtype=torch.bool, device=q.device).tril()
        return causal & (k != PADDING) & ((k == PREFIX) | (k == q)) | torch.eye(S, dtype=torch.bool, device=q.device)


@dataclass(frozen=True)
class PackedTrees:
    """A batch of trees laid out in rows, as the trunk reads it.

    A root is followed by the trees that share it, a prefix by its branches. So those that see a position stand behind
    it without a gap, and one number says who they are: position q sees k if k <= q <= last[k].
    """

    ids: Tensor  # (R, L)
    positions: Tensor  # (R, L)
    tree: Tensor  # (R, L) index of the tree, ROOT where those that follow share it, PADDING outside
    last: Tensor  # (R, L) int32, the last place of the row that sees this one; padding sees itself only
    keep: Tensor  # (T, S) flat index r * L + l of the positions whose states are kept
    targets: Targets

    def mask(self) -> Tensor:
        """Dense attention mask, (R, 1, L, L) bool: causal; the root, and within a tree prefix and own branch only."""
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        return ((place[:, None] >= place) & (place[:, None] <= self.last[:, None]))[:, None]


def arrange(lengths: Sequence[int], row_length: int | None) -> list[list[int]]:
    """Distribute trees over rows: next-fit in the given order, so that images keep their order. None: one a row."""
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


def kept_positions(tree: Tree, everything: bool) -> list[int]:
    """Positions of a tree whose states the post decoder needs: those that predict a target, or all of them."""
    if everything:
        return list(range(len(tree)))
    return sorted({source for source, _, _ in _predictions(tree)})


def _predictions(tree: Tree) -> Iterator[tuple[int, int, int]]:
    """For every target of a tree: the position that predicts it, its id, and its branch, counted from 0.

    A branch's first token is predicted by the last one of the prefix.
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


def _last_places(tree: Tree) -> list[int]:
    """For every position of a tree, counted from its start, the last one that sees it."""
    places = [len(tree) - 1] * len(tree.prefix)
    for branch in tree.branches:
        places += [len(places) + len(branch.ids) - 1] * len(branch.ids)
    return places


def _positions(tree: Tree) -> list[int]:
    start = len(tree.prefix)
    positions = list(range(start))
    for branch in tree.branches:
        positions += range(start, start + len(branch.ids))
    return positions


@dataclass(frozen=True)
class TreeTargets:
    """The targets of one tree, as `Targets` has them of a batch; what a run asks for again and again."""

    slot: Tensor  # (N,)
    id: Tensor  # (N,)
    branch: Tensor  # (N,) counted from 0
    branches: int
    kept_branch: Tensor  # (S,)

    @staticmethod
    def of(tree: Tree, everything: bool = False) -> TreeTargets:
        """`everything` keeps the states of all positions."""
        kept = kept_positions(tree, everything)
        slot_of = {position: slot for slot, position in enumerate(kept)}
        numbers = _branch_numbers(tree)
        rows = torch.tensor([(slot_of[source], token, branch) for source, token, branch in _predictions(tree)])
        slot, id, branch = rows.view(-1, 3).unbind(1)
        return TreeTargets(slot, id, branch, len(tree.branches), torch.tensor([numbers[position] for position in kept]))


def join_targets(trees: Sequence[TreeTargets]) -> Targets:
    """The targets of a batch of trees."""
    counts = torch.tensor([len(tree.id) for tree in trees])
    branches = torch.tensor([tree.branches for tree in trees])
    return Targets(
        torch.arange(len(trees)).repeat_interleave(counts),
        torch.cat([tree.slot for tree in trees]),
        torch.cat([tree.id for tree in trees]),
        torch.cat([tree.branch for tree in trees]) + (branches.cumsum(0) - branches).repeat_interleave(counts),
        int(branches.sum()),
        pad_sequence([tree.kept_branch for tree in trees], batch_first=True, padding_value=PADDING),
    )


def targets_of(trees: Sequence[Tree], everything: bool = False) -> Targets:
    """The targets of a batch; see `Targets`. `everything` keeps the states of all positions."""
    return join_targets([TreeTargets.of(tree, everything) for tree in trees])


def common_root(trees: Sequence[Tree], image_token_id: int) -> int:
    """How many first tokens, before any image, all trees have in common; each keeps one of its prefix for itself."""
    length = common_start([tree.prefix for tree in trees], min(len(tree.prefix) for tree in trees) - 1)
    beginning = trees[0].prefix[:length]
    return beginning.index(image_token_id) if image_token_id in beginning else length


def whole_blocks(length: int) -> int:
    """`length` rounded up to blocks of FlexAttention's mask."""
    return -(-length // BLOCK) * BLOCK


def pack(
    trees: Sequence[Tree],
    pad_id: int,
    everything: bool = False,
    row_length: int | None = None,
    round_up: Callable[[int], int] = int,
    root: int = 0,
    sharing: int | None = None,
) -> PackedTrees:
    """Lay trees out in rows. With `row_length`, several trees share a row as long as they fit; else one tree a row.

    Args:
        round_up: from the positions that the longest row needs to those it gets.
        root: first tokens that the trees of a row have once; see `common_root`.
        sharing: how many trees share a root at most; the next ones then have another one before them.
    """
    each = sharing or len(trees)
    once = 0 if sharing else root  # where several roots may stand in a row, each tree is counted with one
    rows = arrange([len(tree) - once for tree in trees], None if row_length is None else row_length - once)
    L = round_up(max(root * -(-len(row) // each) + sum(len(trees[t]) - root for t in row) for row in rows))
    shape = (len(rows), L)
    ids, positions = torch.full(shape, pad_id), torch.zeros(shape, dtype=torch.long)
    tree_RL = torch.full(shape, PADDING)
    last = torch.arange(L, dtype=torch.int32).repeat(len(rows), 1)
    targets = targets_of(trees, everything)
    keep = torch.zeros(targets.kept_branch.shape, dtype=torch.long)
    for r, row in enumerate(rows):
        start = shared = 0
        for number, t in enumerate(row):
            tree = trees[t]
            tokens = [*tree.prefix, *(token for branch in tree.branches for token in branch.ids)]
            skipped = root if number % each else 0  # what an earlier tree brought
            here = slice(start, start + len(tree) - skipped)
            ids[r, here] = torch.tensor(tokens[skipped:])
            positions[r, here] = torch.tensor(_positions(tree)[skipped:])
            tree_RL[r, here] = t
            last[r, here] = start - skipped + torch.tensor(_last_places(tree)[skipped:], dtype=torch.int32)
            if not skipped:
                shared = start
                tree_RL[r, start : start + root] = ROOT
            last[r, shared : shared + root] = here.stop - 1
            kept = torch.tensor(kept_positions(tree, everything))
            keep[t, : len(kept)] = r * L + kept + torch.where(kept < root, shared, start - skipped)
            start = here.stop
    return PackedTrees(ids, positions, tree_RL, last, keep, targets)
