"""Checks that stop a run: non-finite weights, a policy unlike its reference, a first step without effect."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from relook.console import status
from relook.distributed import local_shard, reshard
from relook.errors import RelookError

CAUSES = (
    "Likely causes: a learning rate so small that its steps are rounded away, even in float32 (bf16 has 8 significant "
    "bits, fp16 11, float32 24), or an output that depends on no tensor that trains. Raise learning_rate, or leave "
    "bf16 out: the same command resumes in the same folder."
)
# Nats per token, averaged over a batch. Rounding to bf16 or 8 bits stays far below; a wrong mask gave a gap of 1.
MAX_GAP_EXACT, MAX_GAP = 0.01, 0.5


@torch.no_grad()
def count_nonfinite_tensors(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Count the trained tensors that hold NaN or inf, shape (); of a sharded tensor, check only the local shard."""
    flags = [(~local_shard(p).isfinite()).any().to(device) for p in parameters if p.requires_grad]
    return torch.stack(flags).sum() if flags else torch.zeros((), dtype=torch.long, device=device)


class LogLastStep(TrainerCallback):
    """Callback that logs the last step, too, where the number of steps is no multiple of `logging_steps`."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps and args.logging_strategy != "no":
            control.should_log = True


class SanityCheckCallback(TrainerCallback):
    """Callback that stops a run whose policy is not its reference at first, or whose first step has no effect.

    The first step is the first optimizer step with a learning rate above 0. The policy must equal the reference before
    it, and the model must have changed after it.

    The log-probs of the step's batch before and after it, both without dropout, are compared bit for bit. The
    computation is the same, so any relevant change of a weight shows. Low precision may round small steps away in the
    log-probs while they add up in the trained float32 tensors. Then it is enough that these have a gradient and move.
    If even these round the step away, it may be a warm-up step: the check repeats until the learning rate peaks.

    Before the step, the log-probs of reference and policy must agree up to rounding. The reference's come from other
    batches, which reveals errors in some batch layouts. With one sample per batch, or from cached states, both are the
    same computation.

    Args:
        accelerator: reduces and gathers over processes.
        exact: True if nothing is rounded: neither activations nor, by quantisation, weights.
        trunk_pass: the policy's trunk pass.
        compares: True if the loss compares with a reference.
    """

    def __init__(self, accelerator: Any, exact: bool, trunk_pass: str, compares: bool) -> None:
        self.accelerator, self.exact, self.trunk_pass = accelerator, exact, trunk_pass
        self.unmoved = (
            "Policy and reference are equal" if compares else "The model's log-probs are those before training,"
        )
        self.model: Any = None
        self.batch: Any = None
        self.log_probs_before: Tensor | None = None
        self.weight_sums: Tensor | None = None
        self.done = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.done = state.global_step > 0  # a resumed run has already passed

    def before_step(self, model: nn.Module, batch: Any, reference: Tensor | None, optimizer: Any) -> None:
        """Store the policy's log-probs of a batch before the optimizer step.

        Args:
            model: the policy.
            batch: the step's batch.
            reference: reference log-probs of the batch's targets, (N,), if the loss has a reference.
            optimizer: read for its learning rates.

        Raises:
            RelookError: the log-probs differ, or some are NaN or inf.
        """
        if not self.done and self.log_probs_before is None and any(group["lr"] > 0 for group in optimizer.param_groups):
            self.model, self.batch = model, batch
            # Where outputs are rounded, the sums of the float32 weights can show a step that log-probs do not.
            self.log_probs_before, self.weight_sums = self._log_probs(), None if self.exact else self._weight_sums()
            if reference is not None:
                self._check_equals_reference(self.log_probs_before, reference)

    def _check_equals_reference(self, policy: Tensor, reference: Tensor) -> None:
        finite = torch.stack([policy.isfinite().all(), reference.isfinite().all()]).float()
        local = torch.cat([finite, (policy - reference).abs().mean().float()[None]])
        # One row per process: policy is finite, reference is finite, mean gap in nats per token. Every process sees
        # all rows, so that all of them raise, and none waits for the others.
        by_process = self.accelerator.gather(local[None])
        if not by_process[:, :2].all():
            model = "reference" if not by_process[:, 1].all() else "policy"
            raise RelookError(
                f"Some log-probs of the {model} are NaN or inf before the first step.",
                "Look for broken weights; where fp16 overflows, use bf16.",
            )
        gap = by_process[:, 2].max().item()
        if gap > (MAX_GAP_EXACT if self.exact else MAX_GAP):
            please = "Please" if self.trunk_pass == "dense" else "Set trunk_pass dense to go on, and please"
            raise RelookError(
                "Before the first step policy and reference are the same model, but their log-probs differ by "
                f"{gap:.3g} nats a token: one of the two ways to lay out its batches is wrong on this machine.",
                f"{please} report this with what `relook doctor` says.",
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if self.done or self.log_probs_before is None or self.accelerator.optimizer_step_was_skipped:
            return
        # `initial_lr` is the peak rate, which the scheduler stores in each group.
        warms_up = any(group["lr"] < group.get("initial_lr", 0) for group in optimizer.param_groups)
        if self._in_any_process((self._log_probs() != self.log_probs_before).any()):
            self._finish()
        elif self.exact or not warms_up:
            rate = max(group["lr"] for group in optimizer.param_groups)
            self._require_moved(
                f"after step {state.global_step + 1}, the first one that should have changed the model (learning rate "
                f"{rate:g}): nothing is learned."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.done and state.global_step:  # e.g. warm-up lasted until the end
            after = f"after all {state.global_step} steps"
            if self.log_probs_before is None:
                raise RelookError(f"{self.unmoved} {after}: no step had a learning rate above 0.", CAUSES)
            self._require_moved(f"{after}: no step was large enough to show.")

    def _require_moved(self, when: str) -> None:
        """Raise if the log-probs are bit-identical and the trained float32 tensors have not moved either."""
        if self.exact or not self._in_any_process(self._moved()):
            raise RelookError(f"{self.unmoved} {when}", CAUSES)
        status(
            "  the first steps do not change the log-probs: bf16, fp16 or quantised weights round them away. They add "
            "up in float32; if the loss does not move, raise learning_rate"
        )
        self._finish()

    def _finish(self) -> None:
        self.done, self.model, self.batch, self.log_probs_before, self.weight_sums = True, None, None, None, None

    def _in_any_process(self, flag: Tensor) -> bool:
        """Return True if a flag, shape (), is set in any process."""
        return bool(self.accelerator.reduce(flag.long(), "sum").item())

    def _moved(self) -> Tensor:
        """Return True if a trained tensor has moved and, where gradients are visible, one is nonzero."""
        assert self.weight_sums is not None
        moved: Tensor = (self._weight_sums() != self.weight_sums).any()
        gradients = [local_shard(p.grad).any() for p in self._trained_parameters() if p.grad is not None]
        # Weight decay alone moves a weight; a nonzero gradient shows that the loss depends on it.
        return moved & torch.stack(gradients).any() if gradients else moved  # DeepSpeed hides gradients

    def _weight_sums(self) -> Tensor:
        """Return the float64 sum of each trained tensor, or of its local shard; it reveals any moved weight."""
        return torch.stack([local_shard(p.detach()).sum(dtype=torch.float64) for p in self._trained_parameters()])

    def _trained_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @torch.no_grad()
    def _log_probs(self) -> Tensor:
        training = self.model.training
        self.model.eval()  # without dropout, so that only the weights differ
        try:
            log_probs: Tensor = self.model(self.batch)
        finally:
            self.model.train(training)
        reshard(self.model)  # outside a training step FSDP2 would keep the gathered weights
        return log_probs
