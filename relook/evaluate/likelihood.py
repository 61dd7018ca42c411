"""Log-likelihoods of given answers, for benchmarks that offer choices instead of asking for a text.

Answers to one question are the branches of a tree, and trees go through the policy as in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import isfinite

import torch

from relook.console import ProgressReport
from relook.data.images import Shown, prefetch_map
from relook.data.packing import Tree
from relook.forward.collate import build_live_batch
from relook.forward.policy import LOGITS_BYTES, LiveBatch, Policy, gather_log_probs, prediction_states
from relook.generate.answering import require_finite
from relook.model.load import LoadedModel

ScoredAnswer = tuple[tuple[Shown, ...], str, str]  # images, a question, and an answer to it


@dataclass(frozen=True)
class Likelihood:
    """Likelihood of an answer under a model.

    Args:
        log_probs: log-probability of each token, in nats: the answer's, and what ends an answer.
        greedy: whether greedy decoding would have written exactly these tokens.
    """

    log_probs: tuple[float, ...]
    greedy: bool

    @property
    def loss(self) -> float:
        """Return the mean negative log-probability per token, in nats."""
        return -sum(self.log_probs) / len(self.log_probs)


def likelihoods(
    loaded: LoadedModel, weighed: Sequence[ScoredAnswer], template: str, batch_size: int, report: ProgressReport
) -> Iterator[tuple[int, Likelihood]]:
    """Yield (index of the answer, its likelihood), batch by batch. Answers to the same question share it.

    Args:
        template: conversation template; empty for the model's own.
        batch_size: answers a batch, and more where one question has more.

    Raises:
        DataError: an answer, or a picture, that cannot be encoded.
    """
    by_prompt: dict[tuple[tuple[Shown, ...], str], list[int]] = {}
    for index, (images, text, _) in enumerate(weighed):
        by_prompt.setdefault((images, text), []).append(index)
    encoder, answers = loaded.encoder(template), list(by_prompt.values())
    trees = []
    # One tree per prompt: images and question are its prefix, computed once, and the answers are its branches.
    for (images, text), indices in zip(by_prompt, answers, strict=True):
        rows = [encoder.answered(text, weighed[index][2].strip(), images) for index in indices]
        trees.append((Tree.of(rows), images))
    order = sorted(range(len(trees)), key=lambda i: -len(trees[i][0]))  # so that little is padding
    size = max(1, batch_size // max(map(len, answers), default=1))
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    policy = Policy(loaded.model, loaded.core.dtype, "dense")  # batches of many lengths are not worth compiling for
    build = partial(build_live_batch, policy, loaded.images, loaded.pad_id)
    done = 0
    for batch, live in zip(batches, prefetch_map(build, ([trees[i] for i in batch] for batch in batches)), strict=True):
        results = _score_batch(policy, live.to(policy.core.device))
        done += len(results)
        yield from zip((index for i in batch for index in answers[i]), results, strict=True)
        report(done, len(weighed))


@torch.no_grad()
def _score_batch(policy: Policy, batch: LiveBatch) -> list[Likelihood]:
    """Compute the likelihoods of all branches of a batch, in order."""
    head, targets = policy.core.lm_head, batch.packed.targets
    # Split over tokens, so that float32 logits (4 bytes x vocabulary each) stay within LOGITS_BYTES.
    size = max(1, LOGITS_BYTES // (4 * head.out_features))
    log_probs: list[float] = []
    chosen: list[bool] = []
    with policy.autocast():
        states = prediction_states(policy.post_decoder, policy.trunk(batch))
        for part, ids in zip(states.split(size), targets.id.split(size), strict=True):
            logits = head(part)
            log_probs += gather_log_probs(logits, ids).tolist()
            chosen += (logits.argmax(-1) == ids).tolist()
    require_finite(all(map(isfinite, log_probs)))
    # Targets are sorted by branch: the counts per branch give the slice of each answer's tokens.
    ends = targets.branch.bincount(minlength=targets.branches).cumsum(0).tolist()
    spans = [slice(start, end) for start, end in pairwise([0, *ends])]
    return [Likelihood(tuple(log_probs[span]), all(chosen[span])) for span in spans]
