"""Asking a model: many questions, each distinct one once; those on the same images share what they begin with.

Where the settings of generation allow it (`sampling.Rule`), the texts of all questions grow side by side in one
`TextBatch`, which takes in the next as soon as there is room; else transformers' `generate` answers batch by batch.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ContextDecorator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from relook.console import Report
from relook.data.images import ImageLoader, Recent, Shown, ahead
from relook.errors import RecipeError
from relook.generate.model_runner import BUCKETS, ModelRunner
from relook.generate.request import AnswerText
from relook.generate.sampling import Likely, Rule
from relook.generate.texts import PREFILL_POSITIONS, Text, TextBatch, feature_bytes, shared_length
from relook.model.load import LoadedModel

FEATURES = 1 << 30  # bytes of image features that are remembered


class AnyLength(ContextDecorator):
    """Attention by kernels that take a text of any length at once. The setting is the process's: it is as it was before
    when the last of those who are inside, on whatever thread, is out.

    cuDNN's, torch's first choice on Hopper and Blackwell since 2.11, make a plan, in tens of milliseconds, for each
    number of rows and length that a thread has not seen (pytorch's MHA.cpp), and texts that `generate` grows have new
    ones always.
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


Question = tuple[Shown | tuple[Shown, ...], str]  # one image, or any number of them, and a text


@dataclass(frozen=True)
class Asking:
    """How questions are put and answered.

    Args:
        template: conversation template; empty for the model's own.
        batch_size: prompts at a time: as many positions as that many of the longest prompts with their answers take may
            be in memory, so of prompts that share images there are more. Answers do not depend on it (fp32).
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


Group = list[Prompt]  # over the same images


def answer(
    loaded: LoadedModel, questions: Sequence[Question], how: Asking, report: Report
) -> Iterator[tuple[int, str]]:
    """Yield (index of the question, answer text) as answers end; equal questions are asked once.

    Long prompts are asked first, so that the order of yields is not that of the questions.
    """
    distinct: dict[tuple[tuple[Shown, ...], str], list[int]] = {}
    for index, (images, text) in enumerate(questions):
        distinct.setdefault((images if isinstance(images, tuple) else (images,), text), []).append(index)
    encoder = loaded.encoder(how.template)
    prompts = [Prompt(n, images, encoder.prompt(text, images)) for n, (images, text) in enumerate(distinct, how.first)]
    if not prompts:
        return
    indices = list(distinct.values())
    longest = max(len(prompt.ids) for prompt in prompts) + how.max_new_tokens
    rule = Rule.of(loaded, how.template, how.settings, longest, how.seed)
    groups = _alone(prompts, how.batch_size) if rule is None else _by_images(prompts)
    ready = ahead(partial(read, loaded.images), groups)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        if rule is None:
            answers = _by_generate(loaded, ready, how)
        else:
            whole = sum(len(prompt.ids) + how.max_new_tokens for prompt in prompts)
            places = max(longest, min(how.batch_size * longest, whole))
            answers = _by_texts(loaded, ready, how, rule, places)
        for done, (prompt, text) in enumerate(answers, 1):
            for index in indices[prompt.number - how.first]:
                yield index, text
            report(done, len(prompts))


def _alone(prompts: Sequence[Prompt], batch_size: int) -> list[Group]:
    """Return batches of prompts of similar length."""
    order = sorted(prompts, key=lambda prompt: -len(prompt.ids))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _by_images(prompts: Sequence[Prompt]) -> list[Group]:
    """Return groups of prompts over the same images, long ones first."""
    groups: dict[tuple[Shown, ...], Group] = {}
    for prompt in prompts:
        groups.setdefault(prompt.images, []).append(prompt)
    return sorted(groups.values(), key=lambda group: -max(len(prompt.ids) for prompt in group))


def read(loader: ImageLoader, group: Group) -> Group:
    """Return the group, once its images are in the loader's memory."""
    for prompt in group:
        for image in prompt.images:
            loader(image)
    return group


def _by_generate(loaded: LoadedModel, batches: Iterator[Group], how: Asking) -> Iterator[tuple[Prompt, str]]:
    for batch in batches:
        yield from zip(batch, generate_batch(loaded, batch, how), strict=True)


def _by_texts(
    loaded: LoadedModel, groups: Iterator[Group], how: Asking, rule: Rule, places: int
) -> Iterator[tuple[Prompt, str]]:
    """Yield answers as they end; no more than `places` positions are in memory."""

    def image_inputs(image: Any) -> dict[str, Tensor]:
        return {name: tensor[0] for name, tensor in loaded.images.batch([image]).items()}

    batch = TextBatch(
        ModelRunner.of(loaded, places, (rule.never, rule.not_first)),
        BUCKETS[-1],
        image_inputs,
        Recent(FEATURES, feature_bytes),
        chunk=PREFILL_POSITIONS,  # nobody waits for a step
        goes_on=False,
    )
    ended: deque[tuple[Prompt, str]] = deque()
    for group in groups:
        submit(batch, group, loaded, how, rule, ended)
        while len(batch.waiting) >= how.batch_size:
            batch.step()
            while ended:
                yield ended.popleft()
    while batch.busy:
        batch.step()
        while ended:
            yield ended.popleft()


def submit(
    batch: TextBatch,
    group: Group,
    loaded: LoadedModel,
    how: Asking,
    rule: Rule,
    ended: deque[tuple[Prompt, str]],
) -> None:
    """Queue a group's prompts; each comes into `ended` with its answer when that is whole."""
    first = group[0].ids
    common = min(shared_length(first, prompt.ids, len(prompt.ids) - 1) for prompt in group)
    for prompt in group:
        answering = _Answering(prompt, loaded, how, rule, ended)
        batch.waiting.append(
            Text(
                prompt.ids,
                prompt.images,
                how.max_new_tokens,
                answering.take,
                rule.temperature,
                rule.top_k,
                rule.top_p,
                rule.draws(prompt.number, how.max_new_tokens),
                most_shared=common,
            )
        )


class _Answering:
    """A question's answer while it grows."""

    def __init__(
        self, prompt: Prompt, loaded: LoadedModel, how: Asking, rule: Rule, ended: deque[tuple[Prompt, str]]
    ) -> None:
        self.prompt, self.loaded, self.how, self.rule, self.ended = prompt, loaded, how, rule, ended
        self.ids: list[int] = []
        self.text = AnswerText(loaded.processor.tokenizer, rule.stops)

    def take(self, token: int, _: Likely | None) -> bool:
        """Take the next token; whether the answer ends with it."""
        self.ids.append(token)
        if self.rule.stops:
            self.text.read(self.ids)
        ends = token in self.rule.eos or self.text.stopped
        if ends or len(self.ids) == self.how.max_new_tokens:
            self.ended.append((self.prompt, self.loaded.decode(self.ids, self.how.template)))
        return ends


def _images(loaded: LoadedModel, paths: Sequence[Shown]) -> dict[str, Tensor]:
    core = loaded.core
    inputs = loaded.images.batch(paths) if paths else {}
    return {n: t.to(core.device, core.dtype if t.is_floating_point() else t.dtype) for n, t in inputs.items()}


@any_length
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
