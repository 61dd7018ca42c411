"""Metrics that a training run logs: means of loss fields, speeds, useful TFLOP/s and peak memory."""

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
from relook.forward.collate import BatchStats
from relook.model.families import connector, language_model, vision_tower
from relook.model.load import HeadModel


def linear_flops(parameters: int, trained: bool, flows: bool) -> int:
    """Return the useful FLOPs of a linear layer for one position in one step: 2 per parameter and matrix product.

    There is one product in the forward pass, one for the weight gradient if the layer trains (`trained`), and one for
    the input gradient if something before it trains (`flows`). Recomputation to save memory is not useful work.
    Products without parameters (attention scores) are left out.
    """
    return 2 * parameters * (1 + trained + flows)


@dataclass(frozen=True)
class StepCosts:
    """Useful FLOPs of one training step, per unit of work in each part of the model.

    The units are a row of vision features (tower and projector), a token of the trunk, a position of its last MLP, a
    state of the post decoder, and a target of lm_head.
    """

    vision_tower: int
    projector: int
    trunk: int  # per token, without the last MLP
    last_mlp: int
    post_decoder_image: int  # the post decoder's image side, per row of vision features
    post_decoder: int
    lm_head: int

    @staticmethod
    def of(policy: Any) -> StepCosts:
        """Count the FLOPs of a policy's linear layers, peft's matrices included, in the order of the data flow.

        Parallel layers are treated as sequential, which overestimates slightly in the first block that trains.
        """
        base = policy.core.model
        has_trunk = not isinstance(policy.core, HeadModel)
        names = ("vision_tower", "projector", "trunk", "last_mlp", "post_decoder_image", "post_decoder", "lm_head")
        costs = dict.fromkeys(names, 0)
        # With cached trunk states, the trunk is absent.
        parts = {
            "vision_tower": [vision_tower(base)] if has_trunk else [],
            "projector": [connector(base)] if has_trunk else [],
            "trunk": [language_model(base)] if has_trunk else [],
            "post_decoder": [policy.post_decoder],
            "lm_head": [policy.core.lm_head],
        }
        # `flows`: the layer needs an input gradient, because something before it in the data flow trains.
        flows, last = False, f"layers.{policy.config.text_config.num_hidden_layers - 1}.mlp."
        merger = {module for root in parts["projector"] for module in root.modules()}  # may be inside the tower
        for part, modules in parts.items():
            for name, module in (pair for root in modules if root is not None for pair in root.named_modules()):
                if part == "vision_tower" and module in merger:
                    continue
                if isinstance(module, nn.Linear):
                    trained = module.weight.requires_grad
                    # Keys and values of cross-attention are products over the image's features, not over states.
                    image_side = part == "post_decoder" and ("align." in name or _cross_keys(name))
                    last_mlp = part == "trunk" and name.startswith(last)
                    cost = linear_flops(module.in_features * module.out_features, trained, flows)
                    costs["post_decoder_image" if image_side else "last_mlp" if last_mlp else part] += cost
                # Whatever comes after parameters that train has to pass a gradient back to them.
                flows = flows or any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        return StepCosts(**costs)

    def flops(self, work: BatchStats) -> float:
        """Return the useful FLOPs of one step on a batch."""
        trunk = 0
        if work.live:
            trunk = self.vision_tower * work.encoded + self.projector * work.projected
            trunk += self.trunk * work.tokens + self.last_mlp * work.last_mlp
        # Cached trunk states leave only what stands above the trunk.
        after = self.post_decoder_image * work.features + self.post_decoder * work.states + self.lm_head * work.targets
        return float(trunk + after)


def _cross_keys(name: str) -> bool:
    return "cross_attention." in name and name.endswith(("k_proj", "v_proj"))


class Meter:
    """Accumulator for one log line: sums over micro-batches that stay on the device and are read once.

    Args:
        costs: FLOP costs of a step; None logs no speeds.
    """

    def __init__(self, costs: StepCosts | None = None) -> None:
        self.costs = costs
        self.reset()

    def reset(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None  # one sum per name
        self.first_bad_step: Tensor | None = None  # first step with a NaN or inf loss, else -1
        self.weight = 0.0
        self.totals = [0.0, 0.0, 0.0]  # pairs, tokens, TFLOPs
        self.started: float | None = None

    def start(self) -> None:
        """Start the clock, unless it is already running."""
        if self.started is None:
            self.started = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent inside the context from the speeds."""
        entered = time.perf_counter()
        yield
        if self.started is not None:  # move the start forward by the length of the pause
            self.started += time.perf_counter() - entered

    @torch.no_grad()
    def add(self, fields: dict[str, Tensor], work: BatchStats, step: int, weight: float = 1.0) -> None:
        """Add the fields of a micro-batch: scalars, of which the first is the loss."""
        # Nothing here reads a value on the CPU, so no step waits for the GPU.
        values = torch.stack([value.detach().float() for value in fields.values()])
        if self.sums is None or self.first_bad_step is None:
            self.names, self.sums = list(fields), torch.zeros_like(values)
            self.first_bad_step = values.new_full((), -1.0)
        self.sums += weight * values
        self.first_bad_step = torch.where(
            (self.first_bad_step < 0) & ~values[0].isfinite(), float(step), self.first_bad_step
        )
        self.weight += weight
        if self.costs is not None:
            self.totals = [
                self.totals[0] + work.pairs,
                self.totals[1] + work.tokens,
                self.totals[2] + self.costs.flops(work) / 1e12,
            ]

    def read(self, reduce: Callable[[Tensor], Tensor] = lambda sums: sums, processes: int = 1) -> dict[str, float]:
        """Return the means of the fields and the speeds since the last call, over all processes, and reset the meter.

        Args:
            reduce: sums a tensor over the processes.
            processes: number of processes, by which TFLOP/s are divided.

        Raises:
            RelookError: the loss of a step is NaN or inf.
        """
        if self.sums is None or self.first_bad_step is None:
            return {}
        # One all-reduce and one transfer for everything that the line shows.
        totals = self.sums.new_tensor([*self.totals, self.weight])
        *sums, pairs, tokens, tflop, weight = reduce(torch.cat([self.sums, totals])).tolist()
        means = {name: value / weight for name, value in zip(self.names, sums, strict=True)}
        if not math.isfinite(sums[0]):
            step = int(self.first_bad_step)
            when = f"step {step}" if step >= 0 else "a step of another process"
            raise RelookError(
                f"The loss is {means['loss']} at {when}.",
                "Lower the learning rate, or look for a broken sample; the last checkpoint is kept.",
            )
        if self.costs is not None and self.started is not None:
            seconds = max(time.perf_counter() - self.started, 1e-9)
            means["pairs_per_second"] = pairs / seconds
            means["tokens_per_second"] = tokens / seconds
            means["tflops"] = tflop / seconds / processes
            if self.sums.is_cuda:
                means["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.sums.device) / 2**30
        self.reset()
        self.start()
        return means
