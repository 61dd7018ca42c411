"""transformers' Trainer for token trees: relook's losses, logged fields and checkpoints of trainable tensors only.

Several processes give the same result as one: a step's loss is the mean over its pairs or tokens in all processes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments, trainer_callback
from transformers.trainer_utils import rotate_checkpoints

from relook import distributed
from relook.console import ProgressReport
from relook.distributed import full_shape, gather_full, gather_optimizer_state, load_optimizer_state, reshard
from relook.errors import RecipeError, RelookError
from relook.files import atomic_file, require_disk_space, write_json, write_text
from relook.forward.collate import Item, ItemDataset
from relook.forward.policy import Policy
from relook.model.checkpoint import ADAPTER_FILE, TRAINED_WITH, save_tensors
from relook.model.load import TENSORS_FILE, base_and_adapter, load_tensors
from relook.model.trainable import parameter_groups
from relook.recipe import Recipe
from relook.train.callbacks import LogLastStep, SanityCheckCallback, count_nonfinite_tensors
from relook.train.loss import batch_loss, supervised_weight, targets_of
from relook.train.metrics import Meter, StepCosts
from relook.train.summary import ProgressCallback

# ----------------------------------------------------------------------------------------------------
# Order of samples: random, or LLaVA's `group_by_modality_length`.


class TrainingSampler(Sampler[int]):
    """Sampler of training samples in a random order, another one in each epoch.

    Args:
        count: number of samples.
        seed: seed of the shuffling; the epoch is added to it, as accelerate's SeedableRandomSampler does.
        limit: number of samples that the run reads. If it ends within its first epoch, the order ends there: batches
            are read ahead of the steps, and samples beyond are not prepared.
    """

    def __init__(self, count: int, seed: int, limit: int | None = None) -> None:
        self.count, self.seed, self.limit = count, seed, limit
        self.epoch = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return islice(self.order(torch.Generator().manual_seed(self.seed + self.epoch)), self.limit)

    def order(self, generator: torch.Generator) -> Iterator[int]:
        """Yield the indices of all samples, in the order of an epoch."""
        yield from torch.randperm(self.count, generator=generator).tolist()


class ModalityLengthSampler(TrainingSampler):
    """Sampler of steps with one modality and balanced batches, as in LLaVA's trainer.

    Samples with and without images are shuffled separately and cut into steps. A step holds the batches of all
    processes and accumulation steps. The leftovers of both come last; the other steps come in random order. Within a
    step, samples are distributed so that all batches have about the same number of tokens.

    Args:
        lengths: length of each sample in tokens.
        has_image: True for each sample with an image.
        batch_size: samples per process and forward pass.
        batches: batches per step, over all processes and accumulation steps.
        seed: see `TrainingSampler`, as is `limit`.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        has_image: Sequence[bool],
        batch_size: int,
        batches: int,
        seed: int,
        limit: int | None = None,
    ) -> None:
        super().__init__(len(lengths), seed, limit)
        self.lengths, self.has_image = lengths, has_image
        self.batch_size, self.batches = batch_size, batches

    def order(self, generator: torch.Generator) -> Iterator[int]:
        size, full_steps, leftovers = self.batch_size * self.batches, [], []
        # Cut each modality into full steps; collect what is left over.
        for with_image in (True, False):
            members = [i for i, image in enumerate(self.has_image) if image == with_image]
            members = [members[i] for i in torch.randperm(len(members), generator=generator).tolist()]
            end = len(members) // size * size
            full_steps += [members[start : start + size] for start in range(0, end, size)]
            leftovers += members[end:]
        steps = [full_steps[i] for i in torch.randperm(len(full_steps), generator=generator).tolist()]
        steps += [leftovers[start : start + size] for start in range(0, len(leftovers), size)]
        for step in steps:
            yield from self._deal(step)

    def _deal(self, step: Sequence[int]) -> list[int]:
        """Order a step's samples by batch, dealing them out longest first in a snake order that balances lengths."""
        order = sorted(step, key=lambda i: -self.lengths[i])
        count = len(order) // self.batch_size
        if count * self.batch_size < len(order):  # the incomplete last step of an epoch
            return order
        # Each round gives every batch one sample. Odd rounds run backwards, so that token counts even out.
        rounds = [order[start : start + count] for start in range(0, len(order), count)]
        snake = [members if i % 2 == 0 else members[::-1] for i, members in enumerate(rounds)]
        return [members[batch] for batch in range(count) for members in snake]


class SetSamplerEpoch(TrainerCallback):
    """Callback that sets the sampler's epoch; accelerate does not do so when a resumed run skips batches."""

    def __init__(self, sampler: TrainingSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.sampler.epoch = int(state.epoch + 1e-6)


def training_sampler(
    recipe: Recipe, arguments: TrainingArguments, items: Sequence[Item], steps: int
) -> TrainingSampler:
    """Return the sampler of a run of `steps` steps over its training items."""
    batches = arguments.world_size * arguments.gradient_accumulation_steps  # of a step
    limit = steps * batches * arguments.train_batch_size
    if recipe.group_by_modality_length:
        return ModalityLengthSampler(
            [len(item.example.tree) for item in items],
            [bool(item.example.images) for item in items],
            arguments.per_device_train_batch_size,
            batches,
            arguments.seed,
            limit,
        )
    return TrainingSampler(len(items), arguments.seed if arguments.data_seed is None else arguments.data_seed, limit)


# ----------------------------------------------------------------------------------------------------

COMPLETE_MARKER = "complete"  # written last: a checkpoint without it is incomplete and is not resumed from
OPTIMIZER_FILE, SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"  # the Trainer's names


class RelookTrainer(Trainer):
    """Trainer of a `Policy` by SFT or DPO, as the recipe says."""

    def __init__(
        self, recipe: Recipe, policy: Policy, sampler: TrainingSampler, report: ProgressReport, **kwargs: Any
    ) -> None:
        super().__init__(model=policy, **kwargs)
        # Before accelerate wraps the model: its own mixed precision would round log-probs to bf16.
        self.is_fsdp_enabled = distributed.prepare_fsdp(self.accelerator, self.args.fsdp_plugin_args, policy.dtype)
        self.recipe, self._sampler = recipe, sampler
        self.add_callback(SetSamplerEpoch(sampler))
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the micro-batch, averaged over accumulation
        self._meter = Meter(StepCosts.of(policy))
        exact = policy.dtype == torch.float32 and recipe.bits == 16
        self._sanity_check = SanityCheckCallback(self.accelerator, exact, policy.trunk_pass, recipe.needs_reference)
        self.add_callback(self._sanity_check)
        self.add_callback(LogLastStep())
        for callback in (trainer_callback.ProgressCallback, trainer_callback.PrinterCallback):
            self.remove_callback(callback)
        self.add_callback(ProgressCallback(report))

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any) -> Any:
        """Compute the recipe's loss over one batch, shape (), and keep its terms for the log."""
        log_probs = model(inputs["batch"])
        loss, fields = batch_loss(self.recipe, log_probs, inputs)
        self._meter.add({"loss": loss, **fields}, inputs["work"], self.state.global_step + 1)
        return (loss, log_probs) if return_outputs else loss

    def _prepare_input(self, data: Any) -> Any:
        """Move an input to the device without changing its dtype.

        Under DeepSpeed the Trainer would round all floating-point inputs to bf16. A sum of reference log-probs of
        -1,000 then moves by up to 4, and a micro-batch's share of the loss by 0.4 %.
        """
        return data.to(self.args.device) if hasattr(data, "to") else super()._prepare_input(data)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self._meter.start()
        if not self._sanity_check.done:  # costs one more forward pass, on the first step only
            inputs = self._prepare_inputs(inputs)
            self._sanity_check.before_step(model, inputs["batch"], inputs.get("reference"), self.optimizer)
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, then check the trained tensors.

        Raises:
            RelookError: a loss or a trained tensor is NaN or inf, or the policy does not move away from the reference.
        """
        result = super().train(*args, **kwargs)
        self._check_tensors()
        return result

    def _check_tensors(self) -> None:
        """Check the trained tensors for NaN and inf, after the last step and before every checkpoint.

        During training, a step that overflows shows in the next loss, so no check of the tensors is needed there.

        Raises:
            RelookError: a trained tensor holds NaN or inf, on any process.
        """
        broken = self.accelerator.reduce(
            count_nonfinite_tensors(self.model.parameters(), self.args.device), "sum"
        ).item()
        if broken:
            raise RelookError(
                f"{broken} trained tensors hold NaN or inf after step {self.state.global_step}.",
                "Lower the learning rate, or look for a broken sample; the last checkpoint is kept.",
            )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], None]:
        """Return the micro-batches of a step, each with its `share` of the supervised mean.

        The Trainer averages losses over micro-batches and processes, which differ in their number of tokens. `share`
        weights each micro-batch by its tokens, or answers, so that the average is a mean over those of the step.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.recipe.task == "sft" or self.recipe.nll_weight:
            counts = [supervised_weight(self.recipe, targets_of(inputs["batch"])) for inputs in batches]
            # Everything stays on the device, so nothing here forces a sync.
            total = self.accelerator.reduce(torch.zeros((), device=device) + sum(counts), "mean")
            for inputs, count in zip(batches, counts, strict=True):
                inputs["share"] = count * len(counts) / total
        return batches, None

    def _get_train_sampler(self, train_dataset: Any = None) -> TrainingSampler:
        return self._sampler

    @torch.no_grad()
    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Compute the loss and logged fields over the held-out items: means over pairs, or over tokens for SFT.

        Every process evaluates all items, so no item is counted twice to fill a batch, and all processes agree on the
        best step.
        """
        assert isinstance(self.eval_dataset, ItemDataset)
        items, size = self.eval_dataset.items, self.args.per_device_eval_batch_size
        meter = Meter()
        self.model.eval()
        with self._meter.paused():
            for start in range(0, len(items), size):
                inputs = self._prepare_inputs(self.data_collator(items[start : start + size]))
                loss, fields = batch_loss(self.recipe, self.model(inputs["batch"]), inputs)
                work = inputs["work"]
                count = work.targets if self.recipe.task == "sft" else work.pairs
                meter.add({"loss": loss, **fields}, work, self.state.global_step, count)
            reshard(self.model)
            # The keys of a log line: eval_loss and so on, which metric_for_best_model names.
            metrics = {f"{metric_key_prefix}_{name}": value for name, value in meter.read().items()}
        super().log(metrics)
        # The Trainer's early stopping and best-checkpoint logic listen to this.
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the Trainer's line with relook's fields; only here are a step's metrics copied to the CPU."""
        fields = self._meter.read(lambda sums: self.accelerator.reduce(sums, "sum"), self.accelerator.num_processes)
        fields.pop("loss", None)  # the Trainer logs it
        logs.update(fields)
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build the Trainer's optimizer over parameter groups with their own learning rates.

        Raises:
            RecipeError: every learning rate is 0.
        """
        if getattr(self, "optimizer", None) is None:
            groups = parameter_groups(self.model, self.recipe, self.args.weight_decay)
            if not any(group.get("lr", self.args.learning_rate) for group in groups):
                raise RecipeError("Nothing would train: every learning rate is 0.", "Set learning_rate.")
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer: torch.optim.Optimizer = optimizer_class(groups, **options)
        return self.optimizer

    # Checkpoints hold the trainable tensors, not the whole model.
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the files of a finished run, so that a checkpoint loads like one.

        Unlike in a finished run, the LoRA tensors are in the same file as the others.
        """
        folder = Path(output_dir or self.args.output_dir)
        save_trained(self.model.model, folder / TENSORS_FILE)
        if distributed.is_main():
            if self.recipe.lora_enable:
                self.model.model.peft_config["default"].save_pretrained(folder)
            save_change(self.recipe, self.model.config, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_tensors(self.model.model, load_file(Path(resume_from_checkpoint) / TENSORS_FILE), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(str(Path(self.args.output_dir) / Path(self.state.best_model_checkpoint).name))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint as the Trainer does, and remove older ones once the new one is complete.

        A checkpoint that a failure left incomplete is not resumed from.
        """
        with self._meter.paused():
            self._check_tensors()
            self._save_complete(model, trial)

    def _save_complete(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if distributed.is_main():
            fix = "Make room and run the same command again: it goes on from the checkpoint before."
            require_disk_space(folder, self._checkpoint_bytes(), "The checkpoint", fix)
        # Without its limit the Trainer removes no older checkpoint before this one is complete.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            distributed.barrier("the checkpoint's files")
        except BaseException:
            if distributed.world_size() == 1:  # else others may still be writing; resuming removes it
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit
        if distributed.is_main():
            write_text(folder / COMPLETE_MARKER, "")
            rotate_checkpoints(str(folder.parent), limit, self.state.best_model_checkpoint)

    def _checkpoint_bytes(self) -> int:
        """Compute a checkpoint's bytes: trainable tensors and optimizer state, summed over all processes."""
        sizes = [full_shape(p).numel() for p in self.model.parameters() if p.requires_grad]
        if self.is_deepspeed_enabled:  # two moments, a float32 copy and, except under ZeRO-3, the model's own weights
            return 20 * sum(sizes)
        moments = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        return 4 * sum(sizes) + sum(t.numel() * t.element_size() for t in moments)

    # Sharded state is gathered here, because the Trainer's own methods also write all frozen tensors.
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        elif self.is_fsdp_enabled:
            state = gather_optimizer_state(self._inner_optimizer)
            if distributed.is_main():
                torch.save(state, Path(output_dir) / OPTIMIZER_FILE)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if distributed.is_main():
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        if self.is_deepspeed_enabled:
            loaded_from, _ = self.model_wrapped.load_checkpoint(checkpoint, load_module_strict=False)
            if loaded_from is None:  # DeepSpeed only warns, and would train from the start
                raise RelookError(
                    f"DeepSpeed cannot read its part of {checkpoint}.",
                    "Remove the checkpoint, and run the same command again.",
                )
        else:
            path = Path(checkpoint) / OPTIMIZER_FILE
            load_optimizer_state(
                self._inner_optimizer, torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            )
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if not self.is_deepspeed_enabled:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
            # Offload only now, because accelerate moves the whole model to the device.
            if self.data_collator.vision_features is not None and distributed.world_size() == 1:
                self.model.offload_vision_tower()
            return prepared
        # DeepSpeed rounds buffers too: rotary frequencies in bf16 are off by radians at position 700.
        exact = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        # Do not resume here: the Trainer makes DeepSpeed load strictly, and these checkpoints lack the frozen tensors.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        for name, buffer in self.model.named_buffers():  # put the float32 buffers back
            buffer.data = exact[name].to(buffer.device)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    @property
    def _inner_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer without accelerate's wrapper."""
        inner: torch.optim.Optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return inner


def save_trained(model: nn.Module, path: Path, without: str = "-") -> None:
    """Write a model's trainable tensors by name to one safetensors file.

    Every process must call it, since tensors may be sharded over them; only the main process writes.

    Args:
        without: leave out tensors whose name contains this; no name contains the default.
    """
    tensors = {name: tensor for name, tensor in gather_tensors(model).items() if without not in name}
    if distributed.is_main():
        with atomic_file(path) as temporary:
            save_tensors(tensors, temporary)


def save_change(recipe: Recipe, config: Any, out: Path) -> None:
    """Write next to the trained tensors what they apply to: the base, its vision tower and earlier merged changes.

    Args:
        config: config of the model that was trained.
    """
    base, adapter = base_and_adapter(recipe.model_name_or_path, recipe.adapter_name_or_path or None)
    # A run on top of a run, or of an adapter, lists all earlier changes in the order in which they are applied.
    earlier = [] if adapter is None else [*adapter.previous, adapter]
    tower = recipe.vision_tower or str((adapter and adapter.tower_for(base)) or "")
    if tower and Path(tower).is_dir():  # otherwise it is a name on the Hugging Face Hub
        tower = str(Path(tower).resolve())
    foundation = {
        "base": str(base.path.resolve()),
        "vision_tower": tower or None,
        "earlier": [str(folder.path.resolve()) for folder in earlier],
    }
    # Prompts and images of the training are also those of its evaluations.
    trained_with = {key: value for key in TRAINED_WITH if (value := getattr(config, key, None))}
    settings = getattr(config, "post_decoder", None)
    write_json(out / ADAPTER_FILE, {**foundation, **trained_with, "post_decoder": settings, "lora": recipe.lora_enable})


def gather_tensors(model: nn.Module, everything: bool = False) -> dict[str, Tensor]:
    """Gather a model's trainable tensors, unsharded and on the CPU; return an empty dict except in the main process.

    Args:
        everything: gather the frozen tensors too.
    """
    tensors = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or everything:
            tensor = gather_full(parameter)
            if distributed.is_main():  # all processes take part in gathering, but only one keeps the result
                tensors[name] = tensor.contiguous()
    return tensors


def last_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint, the same in all processes, and remove incomplete ones."""
    return distributed.broadcast_from_main(lambda: _last_checkpoint(folder))


def _last_checkpoint(folder: Path) -> str | None:
    complete = []  # (step, folder)
    for checkpoint in folder.glob("checkpoint-*"):
        if (checkpoint / COMPLETE_MARKER).exists():
            complete.append((int(checkpoint.name.rpartition("-")[2]), checkpoint))
        else:
            shutil.rmtree(checkpoint)
    return str(max(complete)[1]) if complete else None
