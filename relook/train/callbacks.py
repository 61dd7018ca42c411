"""When a run must not go on: a number that is none, a policy that is not its reference, a first step without effect."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from relook.distributed import held, lay_down
from relook.errors import RelookError

CAUSES = (
    "Likely causes: a learning rate of 0 or far too small, a warm-up longer than the run, or frozen tensors, where the "
    "output depends on nothing that trains."
)
# Nats a token, on average over a batch: what rounding stays far below, be it to bf16 or 8 bits. A wrong mask made one.
APART_EXACT, APART = 0.01, 0.5


@torch.no_grad()
def broken_tensors(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """How many trained tensors hold a number that is not finite, (); of a sharded tensor, the part held here."""
    flags = [(~held(p).isfinite()).any().to(device) for p in parameters if p.requires_grad]
    return torch.stack(flags).sum() if flags else torch.zeros((), dtype=torch.long, device=device)


class FirstStep(TrainerCallback):
    """Stops a run when the policy is not the reference before the first optimizer step that should move it, or still is
    the reference after that step: the first one with a learning rate above 0.

    The log-probs of the step's batch before and after it, both without dropout, are compared bit for bit: it is the
    same computation, so any change of a weight that matters shows. In a lower precision the tiny steps of a warm-up may
    be rounded away, so there it looks again at each step until the learning rate has reached its height.

    Before it the reference's log-probs must be the policy's but for rounding. They come from other batches, which finds
    what goes wrong with the layout of some; at one sample a batch, or from cached states, both are one computation.

    Args:
        exact: whether nothing is rounded: neither activations nor, by quantisation, weights.
        trunk_pass: as the policy has it.
    """

    def __init__(self, accelerator: Any, exact: bool, trunk_pass: str) -> None:
        self.accelerator, self.exact, self.trunk_pass = accelerator, exact, trunk_pass
        self.model: Any = None
        self.batch: Any = None
        self.before: Tensor | None = None
        self.done = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.done = state.global_step > 0  # a resumed run has passed

    def look(self, model: nn.Module, batch: Any, reference: Tensor | None, optimizer: Any) -> None:
        """Before a step: keep what the policy says on its batch.

        Args:
            reference: what the reference says on it, (N,), where the loss has one.

        Raises:
            RelookError: the two differ.
        """
        if not self.done and self.before is None and any(group["lr"] > 0 for group in optimizer.param_groups):
            self.model, self.batch = model, batch
            self.before = self._says()
            if reference is not None:
                self._compare(self.before, reference)

    def _compare(self, policy: Tensor, reference: Tensor) -> None:
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
        if apart > (APART_EXACT if self.exact else APART):
            please = "Please" if self.trunk_pass == "dense" else "Set trunk_pass dense to go on, and please"
            raise RelookError(
                "Before the first step policy and reference are the same model, but their log-probs differ by "
                f"{apart:.3g} a token: one of the two passes through it is wrong here.",
                f"{please} report this with what `relook doctor` says.",
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if self.done or self.before is None or self.accelerator.optimizer_step_was_skipped:
            return
        changed = (self._says() != self.before).any().long()
        if self.accelerator.reduce(changed, "sum").item():
            self.done, self.model, self.batch, self.before = True, None, None, None
        elif self.exact or not any(group["lr"] < group.get("initial_lr", 0) for group in optimizer.param_groups):
            rate = max(group["lr"] for group in optimizer.param_groups)
            raise RelookError(
                f"Policy and reference are equal after step {state.global_step + 1}, the first one that should have "
                f"changed the policy (learning rate {rate:g}): nothing is learned.",
                CAUSES,
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self.done and state.global_step:
            why = "no step had a learning rate above 0" if self.before is None else "no step was large enough to show"
            raise RelookError(f"Policy and reference are equal after all {state.global_step} steps: {why}.", CAUSES)

    @torch.no_grad()
    def _says(self) -> Tensor:
        training = self.model.training
        self.model.eval()
        try:
            log_probs: Tensor = self.model(self.batch)
        finally:
            self.model.train(training)
        lay_down(self.model)
        return log_probs
