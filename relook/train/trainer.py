"""transformers' Trainer over trees: relook's losses and logged fields, and checkpoints of what trains only."""

from __future__ import annotations

import math
import shutil
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from relook.console import Report
from relook.errors import RelookError
from relook.files import whole_file, write_text
from relook.model.checkpoint import save_tensors
from relook.model.load import TENSORS_FILE, load_tensors
from relook.model.regimes import parameter_groups
from relook.recipe import Recipe
from relook.train import losses
from relook.train.batches import Items
from relook.train.policy import Policy
from relook.train.sampling import ModalitySampler
from relook.tree import Targets

COMPLETE = "complete"  # written last into a checkpoint: one without it was cut off and is not resumed from


class RelookTrainer(Trainer):
    """Trains a `Policy` by SFT or DPO, as the recipe says."""

    def __init__(self, recipe: Recipe, policy: Policy, report: Report, **kwargs: Any) -> None:
        super().__init__(model=policy, **kwargs)
        self.recipe = recipe
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the micro-batch, averaged over accumulation
        self._seen: dict[str, list[float]] = defaultdict(list)
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(_Bar(report))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """The recipe's loss over one batch, shape (); its parts are kept for the log."""
        log_probs = model(inputs["batch"])
        targets = _targets(inputs["batch"])
        if self.recipe.task == "sft":
            loss = losses.negative_log_likelihood(log_probs)
        else:
            loss, fields = preference_loss(self.recipe, log_probs, targets, inputs["reference"], inputs["weight"])
            for name, value in fields.items():
                self._seen[name].append(value)
        if not math.isfinite(loss.item()):
            raise RelookError(
                f"The loss is {loss.item()} at step {self.state.global_step}.",
                "Lower the learning rate, or look for a broken sample; the last checkpoint is kept.",
            )
        return (loss, log_probs) if return_outputs else loss

    @torch.no_grad()
    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Loss and logged fields over the held-out items: means over pairs, for SFT over tokens.

        Every process goes over all of them: none is counted twice to fill up a batch, and all agree on the best step.
        """
        assert isinstance(self.eval_dataset, Items)
        items, size = self.eval_dataset.items, self.args.per_device_eval_batch_size
        training, self._seen = self._seen, defaultdict(list)
        self.model.eval()
        counts = []
        for start in range(0, len(items), size):
            inputs = self.data_collator(items[start : start + size])
            inputs = {name: value.to(self.args.device) for name, value in inputs.items()}
            self._seen["loss"].append(self.compute_loss(self.model, inputs).item())
            targets = _targets(inputs["batch"])
            counts.append(len(targets.id) if self.recipe.task == "sft" else targets.branches)
        seen, self._seen = self._seen, training
        metrics = {
            f"{metric_key_prefix}_{name}": sum(v * n for v, n in zip(values, counts, strict=True)) / sum(counts)
            for name, values in seen.items()
        }
        super().log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name, values in self._seen.items():
            logs[name] = sum(values) / len(values)
        self._seen.clear()
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if not self.recipe.group_by_modality_length:
            usual: Sampler[int] | None = super()._get_train_sampler(train_dataset)
            return usual
        assert isinstance(self.train_dataset, Items)
        step = self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        return ModalitySampler(self.train_dataset.items, step, self.args.seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer over groups with learning rates of their own."""
        if getattr(self, "optimizer", None) is None:
            groups = parameter_groups(self.model, self.recipe, self.args.weight_decay)
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer: torch.optim.Optimizer = kind(groups, **arguments)
        return self.optimizer

    # Checkpoints hold what trains, not the model.
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        save_trained(self.model.model, Path(output_dir or self.args.output_dir) / TENSORS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_tensors(self.model.model, load_file(Path(resume_from_checkpoint) / TENSORS_FILE), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(str(Path(self.args.output_dir) / Path(self.state.best_model_checkpoint).name))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        write_text(folder / COMPLETE, "")


def _targets(batch: Any) -> Targets:
    targets: Targets = batch.packed.targets if hasattr(batch, "packed") else batch.targets
    return targets


def preference_loss(
    recipe: Recipe, log_probs: Tensor, targets: Targets, reference: Tensor, weight: Tensor
) -> tuple[Tensor, dict[str, float]]:
    """DPO with an optional supervised term on the chosen response, and the fields HA-DPO logs.

    Args:
        log_probs: policy log-probs of the targets, (N,).
        reference: the reference model's, (N,).
        weight: 1 where the preference term counts a target, else 0, (N,).
    """
    policy_by_branch = targets.sum_by_branch(log_probs * weight)
    reference_by_branch = targets.sum_by_branch(reference * weight)
    ratio = policy_by_branch - reference_by_branch
    chosen, rejected = ratio[0::2], ratio[1::2]  # a pair's branches are chosen, then rejected
    loss = log_probs.new_zeros(())
    if recipe.dpo_weight:
        loss = loss + recipe.dpo_weight * losses.dpo_sigmoid(chosen, rejected, recipe.beta).mean()
    nll = losses.negative_log_likelihood(log_probs[targets.branch % 2 == 0])
    if recipe.nll_weight:
        loss = loss + recipe.nll_weight * nll
    with torch.no_grad():
        fields = {
            "rewards/chosen": recipe.beta * chosen.mean(),
            "rewards/rejected": recipe.beta * rejected.mean(),
            "rewards/accuracies": (chosen > rejected).float().mean(),
            "rewards/margins": recipe.beta * (chosen - rejected).mean(),
            "policy_logps/chosen": policy_by_branch[0::2].mean(),
            "policy_logps/rejected": policy_by_branch[1::2].mean(),
            "reference_logps/chosen": reference_by_branch[0::2].mean(),
            "reference_logps/rejected": reference_by_branch[1::2].mean(),
            "nll": nll,
        }
    return loss, {name: value.item() for name, value in fields.items()}


def save_trained(model: nn.Module, path: Path, without: str = "-") -> None:
    """Write the tensors of a model that train, by name, as one safetensors file; names with `without` are left out."""
    tensors = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and without not in name
    }
    with whole_file(path) as temporary:
        save_tensors(tensors, temporary)


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; those cut off by a kill are removed."""
    found = []
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / COMPLETE).exists():
            found.append((int(checkpoint.name.rpartition("-")[2]), checkpoint))
        else:
            shutil.rmtree(checkpoint)
    return str(max(found)[1]) if found else None


class _Bar(TrainerCallback):
    """Feeds relook's progress bar from the Trainer's steps and logs."""

    def __init__(self, report: Report) -> None:
        self.report, self.note, self.last = report, "", 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.note = f"loss {float(logs['loss']):.3f}"
            if "rewards/margins" in logs:
                self.note += f", margin {logs['rewards/margins']:.2f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.monotonic()
        if now - self.last > 0.1 or state.global_step == state.max_steps:
            self.last = now
            self.report(state.global_step, state.max_steps, self.note)
