"""transformers' Trainer over trees: relook's losses and logged fields, and checkpoints of what trains only.

Under several processes all of this is as with one: a step's loss is the mean over its pairs or tokens in all of them.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import rotate_checkpoints

from relook import distributed
from relook.console import Report
from relook.data.packing import Targets
from relook.distributed import full_shape, lay_down, put_state, whole, whole_state
from relook.errors import RecipeError, RelookError
from relook.files import require_room, whole_file, write_text
from relook.forward.collate import Items
from relook.forward.policy import Policy
from relook.model.checkpoint import save_tensors
from relook.model.load import TENSORS_FILE, load_tensors
from relook.model.trainable import parameter_groups
from relook.recipe import Recipe
from relook.train import loss
from relook.train.callbacks import FirstStep, broken_tensors
from relook.train.loss import answer_tokens, preference_loss
from relook.train.metrics import Costs, Meter

# ----------------------------------------------------------------------------------------------------
# The order in which SFT samples are taken: LLaVA's `group_by_modality_length`.


class ModalityLengthSampler(Sampler[int]):
    """Indices in steps of one modality and even batches, as LLaVA's trainer draws them.

    Samples with and without images are shuffled apart and cut into steps (the batches of all processes and
    accumulation steps together). What is left over of both makes the last step; the others come in random order. Within
    a step its samples are dealt out so that all batches have about as many tokens.

    Args:
        lengths: of each sample, in tokens.
        has_image: whether each sample has one.
        batch_size: samples of one process and one forward pass.
        batches: how many of those a step has.
    """

    def __init__(
        self, lengths: Sequence[int], has_image: Sequence[bool], batch_size: int, batches: int, seed: int
    ) -> None:
        self.lengths, self.has_image = lengths, has_image
        self.batch_size, self.batches, self.seed = batch_size, batches, seed
        self.epoch = 0  # each has an order of its own

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        size, whole, rest = self.batch_size * self.batches, [], []
        for wanted in (True, False):
            members = [i for i, image in enumerate(self.has_image) if image == wanted]
            members = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
            full = len(members) // size * size
            whole += [members[start : start + size] for start in range(0, full, size)]
            rest += members[full:]
        steps = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        steps += [rest[start : start + size] for start in range(0, len(rest), size)]
        for step in steps:
            yield from self._dealt(step)

    def _dealt(self, step: Sequence[int]) -> list[int]:
        """A step's samples in order of its batches: long ones are dealt out in turn, there and back."""
        order = sorted(step, key=lambda i: -self.lengths[i])
        count = len(order) // self.batch_size
        if count * self.batch_size < len(order):  # the last step of an epoch
            return order
        rounds = [order[start : start + count] for start in range(0, len(order), count)]
        turned = [members if i % 2 == 0 else members[::-1] for i, members in enumerate(rounds)]
        return [members[batch] for batch in range(count) for members in turned]


class Epochs(TrainerCallback):
    """Tells a sampler which epoch begins. accelerate does not reach it where a resumed run skips batches."""

    def __init__(self, sampler: ModalityLengthSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.sampler.epoch = int(state.epoch + 1e-6)


# ----------------------------------------------------------------------------------------------------

COMPLETE = "complete"  # written last into a checkpoint: one without it was cut off and is not resumed from
OPTIMIZER_FILE, SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"  # the Trainer's names


class RelookTrainer(Trainer):
    """Trains a `Policy` by SFT or DPO, as the recipe says."""

    def __init__(self, recipe: Recipe, policy: Policy, report: Report, **kwargs: Any) -> None:
        super().__init__(model=policy, **kwargs)
        self.is_fsdp_enabled = distributed.prepare_fsdp(self.accelerator, self.args.fsdp_plugin_args, policy.dtype)
        self.recipe = recipe
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the micro-batch, averaged over accumulation
        self._meter = Meter(Costs.of(policy))
        exact = policy.dtype == torch.float32 and recipe.bits == 16
        self._first = FirstStep(self.accelerator, exact, policy.trunk_pass)
        self.add_callback(self._first)
        for callback in (ProgressCallback, PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(_Bar(report))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """The recipe's loss over one batch, shape (); its parts are kept for the log."""
        log_probs = model(inputs["batch"])
        loss, fields = self._loss(log_probs, inputs)
        self._meter.add({"loss": loss, **fields}, inputs["work"], self.state.global_step + 1)
        return (loss, log_probs) if return_outputs else loss

    def _loss(self, log_probs: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        share = inputs.get("share", 1.0)
        if self.recipe.task == "sft":
            return share * loss.negative_log_likelihood(log_probs), {}
        targets = _targets(inputs["batch"])
        return preference_loss(self.recipe, log_probs, targets, inputs.get("reference"), inputs["weight"], share)

    def _prepare_input(self, data: Any) -> Any:
        """To the device, and as it is. Under DeepSpeed the Trainer would round all that floats to bf16: a sum of
        reference log-probs of -1,000 moves by up to 4, and a micro-batch's share of the loss by 0.4 %."""
        return data.to(self.args.device) if hasattr(data, "to") else super()._prepare_input(data)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **more: Any) -> Tensor:
        self._meter.start()
        if not self._first.done:
            inputs = self._prepare_inputs(inputs)
            self._first.look(model, inputs["batch"], inputs.get("reference"), self.optimizer)
        loss: Tensor = super().training_step(model, inputs, *rest, **more)
        return loss

    def train(self, *arguments: Any, **more: Any) -> Any:
        """The Trainer's training.

        Raises:
            RelookError: a loss or a trained tensor that is no number, or a policy that does not leave the reference.
        """
        result = super().train(*arguments, **more)
        self._check_tensors()
        return result

    def _check_tensors(self) -> None:
        """A step that overflows shows in the next loss; after the last one, and before tensors are kept, look at them.

        Raises:
            RelookError: a trained tensor holds a number that is not finite, on any process.
        """
        broken = self.accelerator.reduce(broken_tensors(self.model.parameters(), self.args.device), "sum").item()
        if broken:
            raise RelookError(
                f"{broken} trained tensors hold numbers that are not finite after step {self.state.global_step}.",
                "Lower the learning rate, or look for a broken sample; the last checkpoint is kept.",
            )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """The micro-batches of a step, each with its `share` of what is a mean over tokens.

        The Trainer averages losses over micro-batches and processes, whose numbers of tokens differ: a mean over the
        step's tokens weighs each by its own.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.recipe.task == "sft" or self.recipe.nll_weight:
            counts = [answer_tokens(self.recipe, _targets(inputs["batch"])) for inputs in batches]
            # All of it stays on the device: nothing waits for it.
            total = self.accelerator.reduce(torch.zeros((), device=device) + sum(counts), "mean")
            for inputs, count in zip(batches, counts, strict=True):
                inputs["share"] = count * len(counts) / total
        return batches, None

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if not self.recipe.group_by_modality_length:
            return super()._get_train_sampler(train_dataset)  # type: ignore[no-any-return]
        assert isinstance(self.train_dataset, Items)
        examples = [item.example for item in self.train_dataset.items]
        sampler = ModalityLengthSampler(
            [len(example.tree) for example in examples],
            [bool(example.images) for example in examples],
            self.args.per_device_train_batch_size,
            self.args.world_size * self.args.gradient_accumulation_steps,
            self.args.seed,
        )
        self.add_callback(Epochs(sampler))
        return sampler

    @torch.no_grad()
    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Loss and logged fields over the held-out items: means over pairs, for SFT over tokens.

        Every process goes over all of them: none is counted twice to fill up a batch, and all agree on the best step.
        """
        assert isinstance(self.eval_dataset, Items)
        items, size = self.eval_dataset.items, self.args.per_device_eval_batch_size
        meter = Meter()
        self.model.eval()
        with self._meter.paused():
            for start in range(0, len(items), size):
                inputs = self._prepare_inputs(self.data_collator(items[start : start + size]))
                loss, fields = self._loss(self.model(inputs["batch"]), inputs)
                work = inputs["work"]
                count = work.targets if self.recipe.task == "sft" else work.pairs
                meter.add({"loss": loss, **fields}, work, self.state.global_step, count)
            lay_down(self.model)
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in meter.read().items()}
        super().log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's line with relook's fields; the one place where a step's numbers leave the device."""
        fields = self._meter.read(lambda sums: self.accelerator.reduce(sums, "sum"), self.accelerator.num_processes)
        fields.pop("loss", None)  # the Trainer has it
        logs.update(fields)
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer over groups with learning rates of their own.

        Raises:
            RecipeError: all of them are 0.
        """
        if getattr(self, "optimizer", None) is None:
            groups = parameter_groups(self.model, self.recipe, self.args.weight_decay)
            if not any(group.get("lr", self.args.learning_rate) for group in groups):
                raise RecipeError("Nothing would train: every learning rate is 0.", "Set learning_rate.")
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer: torch.optim.Optimizer = kind(groups, **arguments)
        return self.optimizer

    # Checkpoints hold what trains, not the model.
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        save_trained(self.model.model, Path(output_dir or self.args.output_dir) / TENSORS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_tensors(self.model.model, load_file(Path(resume_from_checkpoint) / TENSORS_FILE), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(str(Path(self.args.output_dir) / Path(self.state.best_model_checkpoint).name))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer's; older ones go when the new one is whole, what a failure left is not resumed from."""
        with self._meter.paused():
            self._check_tensors()
            self._save_whole(model, trial)

    def _save_whole(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if distributed.first():
            fix = "Make room and run the same command again: it goes on from the checkpoint before."
            require_room(folder, self._checkpoint_bytes(), "The checkpoint", fix)
        kept, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            distributed.wait("the checkpoint's files")
        except BaseException:
            if distributed.count() == 1:  # others may be writing there: what they leave goes when the run goes on
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = kept
        if distributed.first():
            write_text(folder / COMPLETE, "")
            rotate_checkpoints(str(folder.parent), kept, self.state.best_model_checkpoint)

    def _checkpoint_bytes(self) -> int:
        """Size of a checkpoint: what trains and the optimizer's state, of all processes together."""
        sizes = [full_shape(p).numel() for p in self.model.parameters() if p.requires_grad]
        if self.is_deepspeed_enabled:  # two moments, a float32 copy and, but for ZeRO-3, the model's own beside it
            return 20 * sum(sizes)
        moments = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return 4 * sum(sizes) + sum(t.numel() * t.element_size() for t in moments)

    # What is sharded is put together: the Trainer's own ways also write all that is frozen.
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        elif self.is_fsdp_enabled:
            state = whole_state(self._inner_optimizer)
            if distributed.first():
                torch.save(state, Path(output_dir) / OPTIMIZER_FILE)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if distributed.first():
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if self.is_deepspeed_enabled:
            found, _ = self.model_wrapped.load_checkpoint(checkpoint, load_module_strict=False)
            if found is None:  # it only warns, and would go on from the start
                raise RelookError(
                    f"DeepSpeed cannot read its part of {checkpoint}.",
                    "Remove the checkpoint, and run the same command again.",
                )
        else:
            path = Path(checkpoint) / OPTIMIZER_FILE
            put_state(self._inner_optimizer, torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if not self.is_deepspeed_enabled:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
            # Not before: accelerate puts the whole model on the device.
            if self.recipe.sees_once and self.data_collator.features is not None and distributed.count() == 1:
                self.model.rest_tower()
            return prepared
        # DeepSpeed rounds buffers too: to bf16, rotary frequencies are wrong by radians at position 700.
        exact = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        # The Trainer has DeepSpeed load strictly, and its checkpoints lack what is frozen.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        for name, buffer in self.model.named_buffers():
            buffer.data = exact[name].to(buffer.device)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, out of accelerate's wrapper."""
        inner: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner


def _targets(batch: Any) -> Targets:
    targets: Targets = batch.packed.targets if hasattr(batch, "packed") else batch.targets
    return targets


def save_trained(model: nn.Module, path: Path, without: str = "-") -> None:
    """Write the tensors of a model that train, by name, as one safetensors file; names with `without` are left out.

    Every process calls it, since tensors may be sharded over them; the first one writes.
    """
    tensors = {name: tensor for name, tensor in whole_tensors(model).items() if without not in name}
    if distributed.first():
        with whole_file(path) as temporary:
            save_tensors(tensors, temporary)


def whole_tensors(model: nn.Module, everything: bool = False) -> dict[str, Tensor]:
    """What trains of a model, or all of it, whole and on the CPU; nothing in a process that is not the first."""
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or everything:
            tensor = whole(parameter)
            if distributed.first():
                tensors[name] = tensor.contiguous()
    return tensors


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint, the same in all processes; those cut off by a kill are removed."""
    return distributed.of_the_first(lambda: _last_checkpoint(folder))


def _last_checkpoint(folder: Path) -> str | None:
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
