"""The next token of many answers at once, each by its own rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from relook.evaluate.choose import Rule
from relook.serve.answer import Answer
from relook.serve.request import Said


def pick(logits_RV: Tensor, answers: Sequence[Answer], rule: Callable[[float, float], Rule]) -> list[Said]:
    """What each answer says next.

    Args:
        rule: of a temperature and a top_p. Answers that share one are chosen for together.
    """
    groups: dict[tuple[float, float, bool], list[int]] = {}
    for i, answer in enumerate(answers):
        how = (answer.request.temperature, answer.request.top_p) if answer.draws else (0.0, 1.0)
        groups.setdefault((*how, not answer.said), []).append(i)
    chosen: list[Tensor] = []
    for (temperature, top_p, first), members in groups.items():
        draws = None
        if temperature:
            drawn = [answers[i].draws[len(answers[i].said)] for i in members]
            draws = torch.tensor(drawn, dtype=torch.float64, device=logits_RV.device)
        logits = logits_RV if len(groups) == 1 else logits_RV[members]
        chosen.append(rule(temperature, top_p).choose(logits, draws, first))
    places = [i for members in groups.values() for i in members]
    by_place = dict(zip(places, torch.cat(chosen).tolist(), strict=True))  # the one wait for the device
    tokens = [by_place[i] for i in range(len(answers))]
    likely = _log_probs(logits_RV, answers, tokens)
    return [likely.get(i) or Said(token) for i, token in enumerate(tokens)]


def _log_probs(logits_RV: Tensor, answers: Sequence[Answer], tokens: Sequence[int]) -> dict[int, Said]:
    """Of the answers that want them."""
    wanted = [i for i, answer in enumerate(answers) if answer.request.logprobs]
    if not wanted:
        return {}
    log_probs = logits_RV[wanted].float().log_softmax(-1)
    top = max(answers[i].request.top for i in wanted)
    values, ids = (side.tolist() for side in log_probs.topk(min(top, log_probs.shape[-1])))
    own = log_probs.gather(1, torch.tensor([[tokens[i]] for i in wanted], device=log_probs.device))[:, 0].tolist()
    return {
        i: Said(tokens[i], own[n], tuple(zip(ids[n], values[n], strict=True))[: answers[i].request.top])
        for n, i in enumerate(wanted)
    }
