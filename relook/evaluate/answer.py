"""Asking a model: many questions, each distinct one once; those on the same images share them (`decode.py`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from relook.console import Report
from relook.data.ahead import ahead
from relook.data.images import ImageLoader, Shown
from relook.errors import RecipeError
from relook.evaluate.choose import Rule
from relook.evaluate.decode import PromptTree, any_length, decode, require_finite
from relook.model.load import LoadedModel

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


class _Numbers(LogitsProcessor):
    """Sees whether all scores in a `generate` are numbers, whose steps it leaves as they are."""

    def __init__(self) -> None:
        self.all: torch.Tensor | bool = True

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.all = ~scores.isnan().any() & self.all
        return scores


@torch.inference_mode()
def generate_batch(loaded: LoadedModel, batch: Sequence[Prompt], how: Asking) -> list[str]:
    """Answers by transformers' `generate`, each prompt with its images: left-padded, decoded without special tokens."""
    pad, device = loaded.pad_id, loaded.core.device
    longest = max(len(prompt.ids) for prompt in batch)
    ids = torch.tensor([[pad] * (longest - len(prompt.ids)) + list(prompt.ids) for prompt in batch])
    mask = torch.tensor([[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in batch])
    numbers = _Numbers()
    output = loaded.model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        **_images(loaded, [image for prompt in batch for image in prompt.images]),
        max_new_tokens=how.max_new_tokens,
        pad_token_id=pad,
        logits_processor=LogitsProcessorList([numbers]),
        **loaded.stopping(how.template),
        **how.settings,
    )
    require_finite(numbers.all)
    return [loaded.decode(ids, how.template) for ids in output[:, longest:]]
