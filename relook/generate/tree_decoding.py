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
from collections.abc import Iterator, Sequence
from contextlib import ContextDecorator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicLayer

from relook.console import Report
from relook.data.images import ImageLoader, Shown, ahead
from relook.data.packing import common_start
from relook.errors import RecipeError
from relook.generate.sampling import Rule
from relook.model.load import LoadedModel

# ----------------------------------------------------------------------------------------------------

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
        self.core.model(
            input_ids=self._padded(prefixes, self.pad), past_key_values=self.cache, use_cache=True, **images
        )

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
            past_key_values=self.cache,
            use_cache=True,
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
    """
    growth = Growth(core, trees, images, rule.pad)
    B, device = growth.branches, core.device
    draws = rule.draws([*numbers, 0], max_new_tokens)  # here and below, the last row is nobody's
    draws = None if draws is None else draws.to(device)
    said = torch.full((B + 1, max_new_tokens), rule.pad, device=device)
    length = torch.full((B + 1,), max_new_tokens, device=device)
    ended = torch.arange(B + 1, device=device) == B
    for t in range(max_new_tokens):
        who = growth.who.flatten()
        logits = core.lm_head(growth.state).flatten(0, 1)
        said[who, t] = rule.choose(logits, None if draws is None else draws[who, t], first=t == 0)
        ends = rule.ends(said[who, : t + 1]) & ~ended[who]
        length[who] = torch.where(ends, t + 1, length[who])
        ended[who] |= ends
        if t + 1 == max_new_tokens or (t % CHECK == CHECK - 1 and not growth.drop(ended)):
            break
        growth.step(said[growth.who, t])
    return [row[:count] for row, count in zip(said[:B].tolist(), length[:B].tolist(), strict=True)]


# ----------------------------------------------------------------------------------------------------
# Asking a model: many questions, each distinct one once; those on the same images share them (`decode.py`).

Question = tuple[Shown | tuple[Shown, ...], str]  # one image, or any number of them, and a text


@dataclass(frozen=True)
class Asking:
    """How questions are put and answered.

    Args:
        template: conversation template; empty for the model's own.
        batch_size: prompts a batch: as many positions as that many of the longest prompts with their answers take may
            be in memory, so a batch of prompts that share images holds more. Answers do not depend on it (fp32).
        generate: keyword arguments of transformers' `generate`, e.g. do_sample, temperature, num_beams.
        seed: of sampling. A question's draws depend on it and on the question's place among the distinct ones; with
            settings that only `generate` itself follows, on the batches too.
        first: place of the first distinct question, where these are a part of a longer list that is asked in parts.
    """

    template: str = ""
    max_new_tokens: int = 64
    batch_size: int = 64
    generate: tuple[tuple[str, Any], ...] = ()
    seed: int = 0
    first: int = 0

    @property
    def settings(self) -> dict[str, Any]:
        """For `generate`: greedy unless said otherwise, whatever the model's own settings are."""
        return {"do_sample": False, **dict(self.generate)}

    def __post_init__(self) -> None:
        """Raise a RecipeError where a batch holds no prompt, or an answer no token."""
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}.", "Give 1 or more.")


@dataclass(frozen=True)
class Prompt:
    """A distinct question as the model reads it; `number` is its place among the distinct ones."""

    number: int
    images: tuple[Shown, ...]
    ids: tuple[int, ...]


Batch = list[list[Prompt]]  # in groups over the same images


def answer(
    loaded: LoadedModel, questions: Sequence[Question], how: Asking, report: Report
) -> Iterator[tuple[int, str]]:
    """Yield (index of the question, answer text), batch by batch; equal questions are asked once.

    Prompts of similar length share a batch, so the order of yields is not that of the questions.
    """
    distinct: dict[tuple[tuple[Shown, ...], str], list[int]] = {}
    for index, (images, text) in enumerate(questions):
        distinct.setdefault((images if isinstance(images, tuple) else (images,), text), []).append(index)
    encoder = loaded.encoder(how.template)
    prompts = [Prompt(n, images, encoder.prompt(text, images)) for n, (images, text) in enumerate(distinct, how.first)]
    if not prompts:
        return
    indices, done = list(distinct.values()), 0
    image_token = loaded.core.config.image_token_id
    longest = max(len(prompt.ids) for prompt in prompts) + how.max_new_tokens
    rule = Rule.of(loaded, how.template, how.settings, longest, how.seed)
    if any(prompt.ids[-1] == image_token for prompt in prompts):
        rule = None  # a tree's images lie in its prefix, and no branch is empty
    batches = alone(prompts, how.batch_size) if rule is None else shared(prompts, how, longest, image_token)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        for batch in ahead(partial(read, loaded.images), batches):
            texts = answer_batch(loaded, batch, how, rule)
            done += len(texts)
            for prompt, text in zip((prompt for group in batch for prompt in group), texts, strict=True):
                for index in indices[prompt.number - how.first]:
                    yield index, text
            report(done, len(prompts))


def alone(prompts: Sequence[Prompt], batch_size: int) -> list[Batch]:
    """Batches of prompts of similar length, each a group of its own."""
    order = sorted(prompts, key=lambda prompt: -len(prompt.ids))
    return [[[prompt] for prompt in order[i : i + batch_size]] for i in range(0, len(order), batch_size)]


def shared(prompts: Sequence[Prompt], how: Asking, longest: int, image_token: int) -> list[Batch]:
    """Batches of groups over the same images, long ones first; no group, nor batch, takes more positions than
    `batch_size` prompts of length `longest`."""
    by_start: dict[tuple[tuple[Shown, ...], tuple[int, ...]], list[Prompt]] = {}
    for prompt in prompts:
        start = len(prompt.ids) - prompt.ids[::-1].index(image_token) if prompt.images else 0
        by_start.setdefault((prompt.images, prompt.ids[:start]), []).append(prompt)
    size = how.batch_size
    groups = [group[i : i + size] for group in by_start.values() for i in range(0, len(group), size)]
    trees = [(PromptTree.of([prompt.ids for prompt in group]), group) for group in groups]
    lengths = [(len(tree.prefix), tree.positions(how.max_new_tokens)) for tree, _ in trees]
    batches: list[Batch] = []
    most = 0  # positions of the batch's longest row; the others are padded to it
    for i in sorted(range(len(groups)), key=lambda i: lengths[i], reverse=True):
        most = max(most, lengths[i][1])
        if not batches or (len(batches[-1]) + 1) * most > size * longest:
            batches.append([])
            most = lengths[i][1]
        batches[-1].append(groups[i])
    return batches


def read(loader: ImageLoader, batch: Batch) -> Batch:
    """The batch, once its images are in the loader's memory."""
    for group in batch:
        for image in group[0].images:
            loader(image)
    return batch


@any_length
def answer_batch(loaded: LoadedModel, batch: Batch, how: Asking, rule: Rule | None) -> list[str]:
    """Answers to a batch's prompts, in order: by a rule as trees, without one by `generate`."""
    if rule is None:
        return generate_batch(loaded, [prompt for group in batch for prompt in group], how)
    core = loaded.core
    trees = [PromptTree.of([prompt.ids for prompt in group]) for group in batch]
    images = _images(loaded, [image for group in batch for image in group[0].images])
    numbers = [prompt.number for group in batch for prompt in group]
    said = decode(core, trees, images, rule, how.max_new_tokens, numbers)
    return [loaded.decode(ids, how.template) for ids in said]


def _images(loaded: LoadedModel, paths: Sequence[Shown]) -> dict[str, torch.Tensor]:
    core = loaded.core
    inputs = loaded.images.batch(paths) if paths else {}
    return {n: t.to(core.device, core.dtype if t.is_floating_point() else t.dtype) for n, t in inputs.items()}


@torch.inference_mode()
def generate_batch(loaded: LoadedModel, batch: Sequence[Prompt], how: Asking) -> list[str]:
    """Answers by transformers' `generate`, each prompt with its images: left-padded, decoded without special tokens."""
    pad, device = loaded.pad_id, loaded.core.device
    longest = max(len(prompt.ids) for prompt in batch)
    ids = torch.tensor([[pad] * (longest - len(prompt.ids)) + list(prompt.ids) for prompt in batch])
    mask = torch.tensor([[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in batch])
    output = loaded.model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        **_images(loaded, [image for prompt in batch for image in prompt.images]),
        max_new_tokens=how.max_new_tokens,
        pad_token_id=pad,
        **loaded.stopping(how.template),
        **how.settings,
    )
    return [loaded.decode(ids, how.template) for ids in output[:, longest:]]
