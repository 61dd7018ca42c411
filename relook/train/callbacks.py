"""When a run must not go on: a number that is none, a policy that is not its reference, a first step without effect."""

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
    "Likely causes: a learning rate so small that its steps are rounded away, even in the float32 in which trained "
    "tensors are kept beside bf16 (bf16 keeps 8 bits of a number, fp16 11, float32 24: what is below half of the last "
    "one does not show), or frozen tensors, where the output depends on nothing that trains. Raise learning_rate, or "
    "leave bf16 out: the same command goes on in the same folder."
)
# Nats a token, on average over a batch: what rounding stays far below, be it to bf16 or 8 bits. A wrong mask made one.
MAX_GAP_EXACT, MAX_GAP = 0.01, 0.5


@torch.no_grad()
def count_nonfinite_tensors(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """How many trained tensors hold a number that is not finite, (); of a sharded tensor, the part held here."""
    flags = [(~local_shard(p).isfinite()).any().to(device) for p in parameters if p.requires_grad]
    return torch.stack(flags).sum() if flags else torch.zeros((), dtype=torch.long, device=device)


class SanityCheckCallback(TrainerCallback):
    """Stops a run when the policy is not the reference before the first optimizer step that should move it, or when the
    model is as it was after that step: the first one with a learning rate above 0.

    The log-probs of the step's batch before and after it, both without dropout, are compared bit for bit: it is the
    same computation, so any change of a weight that matters shows. A lower precision may round small steps away there,
    while they add up in the trained tensors, which are float32: it is enough that those have a gradient and move. Steps
    that are rounded away there, too, may be a warm-up's, so it looks again until the learning rate is at its height.

    Before it the reference's log-probs must be the policy's but for rounding. They come from other batches, which finds
    what goes wrong with the layout of some; at one sample a batch, or from cached states, both are one computation.

    Args:
        exact: whether nothing is rounded: neither activations nor, by quantisation, weights.
        trunk_pass: as the policy has it.
        compares: whether the loss compares with a reference.
    """

    def __init__(self, accelerator: Any, exact: bool, trunk_pass: str, compares: bool) -> None:
        self.accelerator, self.exact, self.trunk_pass = accelerator, exact, trunk_pass
        self.unmoved = "Policy and reference are equal" if compares else "The model says what it said before training,"
        self.model: Any = None
        self.batch: Any = None
        self.before: Tensor | None = None
        self.weights: Tensor | None = None
        self.done = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.done = state.global_step > 0  # a resumed run has passed

    def before_step(self, model: nn.Module, batch: Any, reference: Tensor | None, optimizer: Any) -> None:
        """Before a step: keep what the policy says on its batch.

        Args:
            reference: what the reference says on it, (N,), where the loss has one.

        Raises:
            RelookError: the two differ.
        """
        if not self.done and self.before is None and any(group["lr"] > 0 for group in optimizer.param_groups):
            self.model, self.batch = model, batch
            self.before, self.weights = self._log_probs(), None if self.exact else self._sums()
            if reference is not None:
                self._check_equals_reference(self.before, reference)

    def _check_equals_reference(self, policy: Tensor, reference: Tensor) -> None:
        finite = torch.stack([policy.isfinite().all(), reference.isfinite().all()]).float()
        found = torch.cat([finite, (policy - reference).abs().mean().float()[None]])
        of_all = self.accelerator.gather(found[None])  # one row for each process
        if not of_all[:, :2].all():
            who = "reference" if not of_all[:, 1].all() else "policy"
            raise RelookError(
                f"Some log-probs of the {who} are not finite before the first step.",
                "Look for broken weights; where fp16 overflows, use bf16.",
            )
        apart = of_all[:, 2].max().item()
        if apart > (MAX_GAP_EXACT if self.exact else MAX_GAP):
            please = "Please" if self.trunk_pass == "dense" else "Set trunk_pass dense to go on, and please"
            raise RelookError(
                "Before the first step policy and reference are the same model, but their log-probs differ by "
                f"{apart:.3g} a token: one of the two passes through it is wrong here.",
                f"{please} report this with what `relook doctor` says.",
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if self.done or self.before is None or self.accelerator.optimizer_step_was_skipped:
            return
        warms_up = any(group["lr"] < group.get("initial_lr", 0) for group in optimizer.param_groups)
        if self._in_any((self._log_probs() != self.before).any()):
            self._finish()
        elif self.exact or not warms_up:
            rate = max(group["lr"] for group in optimizer.param_groups)
            self._require_moved(
                f"after step {state.global_step + 1}, the first one that should have changed the model (learning rate "
                f"{rate:g}): nothing is learned."
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.done and state.global_step:
            after = f"after all {state.global_step} steps"
            if self.before is None:
                raise RelookError(f"{self.unmoved} {after}: no step had a learning rate above 0.", CAUSES)
            self._require_moved(f"{after}: no step was large enough to show.")

    def _require_moved(self, when: str) -> None:
        """Raise where what the model says is equal to the last bit and trained tensors, which are float32, are, too."""
        if self.exact or not self._in_any(self._moved()):
            raise RelookError(f"{self.unmoved} {when}", CAUSES)
        status(
            "  the first steps do not show in what the model says: the rounding of bf16, fp16 or quantised weights is "
            "coarser. They add up in float32; if the loss stays where it is, raise learning_rate"
        )
        self._finish()

    def _finish(self) -> None:
        self.done, self.model, self.batch, self.before, self.weights = True, None, None, None, None

    def _in_any(self, flag: Tensor) -> bool:
        """Whether a flag () is set in any process."""
        return bool(self.accelerator.reduce(flag.long(), "sum").item())

    def _moved(self) -> Tensor:
        """Whether a trained tensor has moved, by a gradient where that can be seen."""
        assert self.weights is not None
        moved: Tensor = (self._sums() != self.weights).any()
        gradients = [local_shard(p.grad).any() for p in self._trained() if p.grad is not None]
        return moved & torch.stack(gradients).any() if gradients else moved  # DeepSpeed keeps them to itself

    def _sums(self) -> Tensor:
        """The sum of each trained tensor, or of the part held here, in float64: it shows if a weight moves."""
        return torch.stack([local_shard(p.detach()).sum(dtype=torch.float64) for p in self._trained()])

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @torch.no_grad()
    def _log_probs(self) -> Tensor:
        training = self.model.training
        self.model.eval()
        try:
            log_probs: Tensor = self.model(self.batch)
        finally:
            self.model.train(training)
        reshard(self.model)
        return log_probs
