"""Asking a model: many (image, text) questions in batches, each distinct one once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from relook.console import Report
from relook.model.load import LoadedModel


@dataclass(frozen=True)
class Asking:
    """How questions are put and answered.

    Args:
        template: conversation template; empty for the model's own.
        batch_size: prompts a batch. Answers do not depend on it (fp32), only memory and speed do.
        generate: keyword arguments of transformers' `generate`, e.g. do_sample, temperature, num_beams.
        seed: of sampling; a batch's draws depend on its place in the run.
    """

    template: str = ""
    max_new_tokens: int = 64
    batch_size: int = 64
    generate: tuple[tuple[str, Any], ...] = ()
    seed: int = 0


def answer(
    loaded: LoadedModel, questions: Sequence[tuple[Path, str]], how: Asking, report: Report
) -> Iterator[tuple[int, str]]:
    """Yield (index of the question, answer text), batch by batch; equal questions are asked once.

    Prompts of similar length share a batch, so the order of yields is not that of the questions.
    """
    encoder = loaded.encoder(how.template)
    distinct: dict[tuple[Path, str], list[int]] = {}
    for index, question in enumerate(questions):
        distinct.setdefault(question, []).append(index)
    prompts = {question: encoder.prompt(question[1], [question[0]]) for question in distinct}
    order = sorted(distinct, key=lambda question: (len(prompts[question]), str(question[0])))
    done = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(how.seed)
        for start in range(0, len(order), how.batch_size):
            batch = order[start : start + how.batch_size]
            texts = generate_batch(loaded, [(path, prompts[path, text]) for path, text in batch], how)
            done += len(batch)
            for question, text in zip(batch, texts, strict=True):
                for index in distinct[question]:
                    yield index, text
            report(done, len(order))


@torch.inference_mode()
def generate_batch(loaded: LoadedModel, batch: Sequence[tuple[Path, Sequence[int]]], how: Asking) -> list[str]:
    """Answers to prompts that are token ids already, one image each: left-padded, decoded without special tokens."""
    tokenizer, model = loaded.processor.tokenizer, loaded.model
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    longest = max(len(ids) for _, ids in batch)
    ids = torch.tensor([[pad] * (longest - len(ids)) + list(ids) for _, ids in batch])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for _, ids in batch])
    core = loaded.core
    images = loaded.images.batch([path for path, _ in batch])
    output = model.generate(
        input_ids=ids.to(core.device),
        attention_mask=mask.to(core.device),
        **{n: t.to(core.device, core.dtype if t.is_floating_point() else t.dtype) for n, t in images.items()},
        max_new_tokens=how.max_new_tokens,
        pad_token_id=pad,
        **loaded.stopping(how.template),
        **{"do_sample": False, **dict(how.generate)},
    )
    return [loaded.decode(ids, how.template) for ids in output[:, longest:]]
