"""Which token comes next, and when an answer ends: as transformers' `generate` has it, for many texts at once.

`Sampler.of` is the one place that decides whether relook's own engine answers, or `generate` itself.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from relook.model.load import LoadedModel

# Settings of `generate` that a `Sampler` follows, and those that change no token.
SUPPORTED = {"do_sample", "temperature", "top_k", "top_p", "suppress_tokens", "begin_suppress_tokens", "eos_token_id"}
WITHOUT_EFFECT = {
    *("bos_token_id", "pad_token_id", "decoder_start_token_id", "max_length", "max_new_tokens", "use_cache"),
    *("output_attentions", "output_hidden_states", "transformers_version", "_from_model_config"),
}
SAMPLING = {"min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"}  # idle where nothing is drawn
# Of the others, values that say nothing, besides None, False and 0.
NEUTRAL = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "typical_p", "guidance_scale"), 1),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "length_penalty"), 1),
}
TOP_K = 50  # what `generate` takes where nobody says


@dataclass(frozen=True)
class Sampler:
    """How tokens are chosen and where answers end, for a whole run.

    Args:
        temperature, top_k, top_p: of sampling; temperature 0 takes the most likely token.
        eos: tokens that end an answer. stops: texts that do.
        never, not_first: tokens that are never chosen, and further ones that are not chosen first.
        seed: of sampling; each question's draws depend on it and on the question's number alone.
    """

    temperature: float
    top_k: int
    top_p: float
    eos: frozenset[int]
    never: tuple[int, ...]
    not_first: tuple[int, ...]
    stops: tuple[str, ...] = ()
    seed: int = 0

    @staticmethod
    def of(loaded: LoadedModel, template: str, generate: dict[str, Any], longest: int, seed: int = 0) -> Sampler | None:
        """Return the rule that chooses as `generate` would; None where only `generate` itself does.

        That is: beams, penalties and whatever else looks at earlier tokens or at other rows, and language models with
        layers that do not see the whole text.

        Args:
            generate: keyword arguments of `generate`.
            longest: positions of the longest prompt with its answer.
        """
        settings = supported_settings(loaded, generate, longest)
        if settings is None:
            return None
        eos, never, not_first = (
            tuple(torch.tensor([] if ids is None else ids, dtype=torch.long).flatten().tolist())
            for ids in (settings.eos_token_id, settings.suppress_tokens, settings.begin_suppress_tokens)
        )
        top_k = TOP_K if settings.top_k is None else settings.top_k
        top_p = 1.0 if settings.top_p is None else settings.top_p
        temperature = 1.0 if settings.temperature is None else settings.temperature
        return Sampler(
            float(temperature) if settings.do_sample else 0.0,
            int(top_k),
            float(top_p),
            frozenset(eos),
            never,
            not_first,
            tuple(loaded.stop_arguments(template).get("stop_strings", ())),
            seed,
        )

    def draws(self, number: int, tokens: int) -> Tensor | None:
        """Return (tokens,) uniform numbers for the question of that number; None where nothing is drawn."""
        return uniform(self.seed, number, tokens) if self.temperature else None


SEED_FACTOR = 0x9E3779B1  # odd, so that seeds and numbers of questions are spread over all of 2^32


def uniform(seed: int, number: int, tokens: int) -> Tensor:
    """Draw (tokens,) uniform numbers in [0, 1), which depend on seed and number alone."""
    generator = torch.Generator().manual_seed((seed * SEED_FACTOR + number) % 2**32)
    return torch.rand(tokens, generator=generator, dtype=torch.float64)


def seed_of_question(seed: int, number: int) -> int:
    """Return the seed with which question 0 gets the draws that `number` gets with `seed`: for single requests."""
    return (seed + number * pow(SEED_FACTOR, -1, 2**32)) % 2**32


def supported_settings(loaded: LoadedModel, generate: dict[str, Any], longest: int) -> GenerationConfig | None:
    """Return a model's generation settings with the caller's over them; None where no `Sampler` can follow them."""
    settings = copy.deepcopy(loaded.core.generation_config)
    if settings.update(**generate) or not has_full_attention(loaded.core.config.text_config, longest):
        return None
    ignored = WITHOUT_EFFECT if settings.do_sample else WITHOUT_EFFECT | SAMPLING
    for name, value in settings.to_diff_dict().items():
        if name not in SUPPORTED | ignored and value not in (None, False, NEUTRAL.get(name)):
            return None
    return settings


def has_full_attention(text_config: Any, longest: int) -> bool:
    """Return True if every layer of a language model sees all of a text of that length."""
    window = getattr(text_config, "sliding_window", None)
    layers = set(getattr(text_config, "layer_types", None) or ()) - {"full_attention"}
    return layers <= {"sliding_attention"} and (window is None or longest <= window)


@dataclass
class RowSampling:
    """How each of N rows draws its next token.

    Attributes:
        temperature: (N,) float64; 0 takes the most likely token.
        top_k, top_p: (N,); 0 and 1 leave all tokens.
        draws: (N, T) float64 uniform numbers, one for each token that a row may get.
        filters: whether any row restricts its tokens, which takes a sort.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    draws: Tensor
    filters: bool

    @property
    def key(self) -> tuple[int, bool]:
        """Return what a CUDA graph depends on."""
        return self.draws.shape[1], self.filters

    def copy_(self, other: RowSampling) -> None:
        """Copy the numbers of another instance of the same shape."""
        for name in ("temperature", "top_k", "top_p", "draws"):
            getattr(self, name).copy_(getattr(other, name), non_blocking=True)


def choose_tokens(
    logits_NV: Tensor,
    banned: Sequence[Tensor],
    sampling: RowSampling | None,
    count: Tensor | None = None,
    first: bool = False,
) -> Tensor:
    """Choose the next token of every row, (N,): the most likely one, or one that is drawn.

    Equal to transformers' warpers (temperature, top-k, top-p, in that order) and inverse transform sampling. A row
    whose logits are NaN or infinite gets -1.

    Args:
        banned: ids that are never chosen.
        count: (N,) tokens that each row has, which picks its draw; not read where `first`.
    """
    scores = logits_NV.float()
    # One reduction finds any NaN or infinity: a sum with one is not finite, and times 0 it is NaN.
    finite = scores.sum(-1) * 0 == 0
    for ids in banned:
        scores = scores.index_fill(-1, ids, -torch.inf)
    likeliest = scores.argmax(-1)
    if sampling is None:
        return torch.where(finite, likeliest, -1)
    greedy = sampling.temperature == 0
    scores = scores / torch.where(greedy, 1.0, sampling.temperature).float()[:, None]
    if sampling.filters:
        # Top-k and top-p on scores in ascending order, then back to the order of ids.
        ordered, order = scores.sort(dim=-1)
        rank = torch.arange(ordered.shape[-1], 0, -1, device=scores.device)  # 1 for the most likely
        top_k = torch.where(sampling.top_k == 0, ordered.shape[-1], sampling.top_k)[:, None]
        kth = ordered.gather(1, (ordered.shape[-1] - top_k).clamp(min=0))  # ties with it stay
        ordered = ordered.masked_fill(ordered < kth, -torch.inf)
        outside = ordered.softmax(-1).cumsum(-1) <= 1 - sampling.top_p[:, None]
        outside &= (sampling.top_p < 1)[:, None] & (rank > 1)
        ordered = ordered.masked_fill(outside, -torch.inf)
        scores = torch.empty_like(scores).scatter_(1, order, ordered)
    draw = sampling.draws[:, 0]
    if count is not None and not first:
        # A row whose text is over may still take part, beyond its last draw.
        index = count.long().clamp(max=sampling.draws.shape[1] - 1)
        draw = sampling.draws.gather(1, index[:, None])[:, 0]
    # Inverse transform: the first token at which the cumulative probability passes the draw.
    shares = scores.double().softmax(-1).cumsum(-1)
    drawn = torch.searchsorted(shares, (draw * shares[:, -1])[:, None], right=True)[:, 0]
    chosen = torch.where(greedy, likeliest, drawn.clamp(max=scores.shape[-1] - 1))
    return torch.where(finite, chosen, -1)


TokenLogprobs = tuple[float, list[tuple[int, float]]]  # a token's log-probability, and the likeliest tokens with theirs


def token_logprobs(logits_NV: Tensor, tokens_N: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Return log-probabilities (N, 1 + top), of each row's token and of its likeliest ones, and the latter's ids."""
    log_probs = logits_NV.float().log_softmax(-1)
    values, ids = log_probs.topk(min(top, log_probs.shape[-1]))
    return torch.cat([log_probs.gather(1, tokens_N.clamp(min=0)[:, None].long()), values], 1), ids
