"""What a training run logs: means of its losses' fields, speeds, useful TFLOP/s and peak memory."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from relook.errors import RelookError
from relook.forward.collate import Work


def linear_flops(parameters: int, trained: bool, flows: bool) -> int:
    """Useful floating-point operations of a linear layer for one position in one step: 2 a parameter for each product.

    One product forward, one for the gradient of its weights where they train, one for the gradient of its input where
    something before it trains. What is computed twice to save memory is not useful work, and products without
    parameters (attention's scores) are left out.
    """
    return 2 * parameters * (1 + trained + flows)


@dataclass(frozen=True)
class Costs:
    """Useful operations of one step: for a row of vision features, in the tower and in the projector, a token of the
    trunk, a position of its last MLP, a state of the post decoder, and a target of lm_head."""

    seeing: int
    projecting: int
    reading: int  # the trunk's part for each token
    last_mlp: int
    looking: int  # the post decoder's image side, for each row of vision features
    deciding: int
    saying: int

    @staticmethod
    def of(policy: Any) -> Costs:
        """The linear layers of a policy in the order in which data flow through them; peft's matrices among them.

        Layers side by side are taken one after the other, which adds a little in the first block that trains.
        """
        base = policy.core.model
        names = ("seeing", "projecting", "reading", "last_mlp", "looking", "deciding", "saying")
        found = dict.fromkeys(names, 0)
        # Where training reads cached states, the trunk is not there.
        parts = {
            "seeing": [getattr(base, "vision_tower", None)],
            "projecting": [getattr(base, "multi_modal_projector", None)],
            "reading": [getattr(base, "language_model", None)],
            "deciding": [policy.post_decoder],
            "saying": [policy.core.lm_head],
        }
        flows, last = False, f"layers.{policy.config.text_config.num_hidden_layers - 1}.mlp."
        for part, modules in parts.items():
            for name, module in (pair for root in modules if root is not None for pair in root.named_modules()):
                if isinstance(module, nn.Linear):
                    trained = module.weight.requires_grad
                    image_side = part == "deciding" and ("align." in name or _cross_keys(name))
                    last_mlp = part == "reading" and name.startswith(last)
                    cost = linear_flops(module.in_features * module.out_features, trained, flows)
                    found["looking" if image_side else "last_mlp" if last_mlp else part] += cost
                flows = flows or any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        return Costs(**found)

    def flops(self, work: Work) -> float:
        """Useful operations of one step on a batch."""
        trunk = 0
        if work.live:
            trunk = self.seeing * work.encoded + self.projecting * work.features
            trunk += self.reading * work.tokens + self.last_mlp * work.last_mlp
        after = self.looking * work.features + self.deciding * work.states + self.saying * work.targets
        return float(trunk + after)


def _cross_keys(name: str) -> bool:
    return "cross_attention." in name and name.endswith(("k_proj", "v_proj"))


class Meter:
    """The fields of one log line: sums over micro-batches that stay on the device and are read once.

    Args:
        costs: of a step; without them no speeds are counted.
    """

    def __init__(self, costs: Costs | None = None) -> None:
        self.costs = costs
        self.reset()

    def reset(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None  # one for each name
        self.broken: Tensor | None = None  # the first step whose loss is no number, -1 before
        self.weight = 0.0
        self.work = [0.0, 0.0, 0.0]  # pairs, tokens, 1e12 operations
        self.started: float | None = None

    def start(self) -> None:
        """Work begins, if it has not yet."""
        if self.started is None:
            self.started = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count."""
        begun = time.perf_counter()
        yield
        if self.started is not None:
            self.started += time.perf_counter() - begun

    @torch.no_grad()
    def add(self, fields: dict[str, Tensor], work: Work, step: int, weight: float = 1.0) -> None:
        """Take in the fields of a micro-batch, scalars of which the first is the loss."""
        values = torch.stack([value.detach().float() for value in fields.values()])
        if self.sums is None or self.broken is None:
            self.names, self.sums = list(fields), torch.zeros_like(values)
            self.broken = values.new_full((), -1.0)
        self.sums += weight * values
        self.broken = torch.where((self.broken < 0) & ~values[0].isfinite(), float(step), self.broken)
        self.weight += weight
        if self.costs is not None:
            self.work = [
                self.work[0] + work.pairs,
                self.work[1] + work.tokens,
                self.work[2] + self.costs.flops(work) / 1e12,
            ]

    def read(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums, processes: int = 1) -> dict[str, float]:
        """The fields' means and the speeds since the last time, over all processes; then everything starts anew.

        Args:
            reduce: sums a tensor over the processes.

        Raises:
            RelookError: the loss of a step is no number.
        """
        if self.sums is None or self.broken is None:
            return {}
        rest = self.sums.new_tensor([*self.work, self.weight])
        *sums, pairs, tokens, operations, weight = reduce(torch.cat([self.sums, rest])).tolist()
        means = {name: value / weight for name, value in zip(self.names, sums, strict=True)}
        if not math.isfinite(sums[0]):
            step = int(self.broken)
            where = f"step {step}" if step >= 0 else "a step of another process"
            raise RelookError(
                f"The loss is {means['loss']} at {where}.",
                "Lower the learning rate, or look for a broken sample; the last checkpoint is kept.",
            )
        if self.costs is not None and self.started is not None:
            seconds = max(time.perf_counter() - self.started, 1e-9)
            means["pairs_per_second"] = pairs / seconds
            means["tokens_per_second"] = tokens / seconds
            means["tflops"] = operations / seconds / processes
            if self.sums.is_cuda:
                means["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.sums.device) / 2**30
        self.reset()
        self.start()
        return means
