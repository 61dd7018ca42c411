"""Training run: read, encode, prepare, train, save. `relook train`, sweeps and the demo call `train`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import CONFIG_NAME, is_torch_tf32_available

from relook import distributed
from relook.console import progress, status
from relook.data.encode import Example
from relook.data.readers import rated_answers, read_hadpo, read_llava, read_pairs, read_sentinel
from relook.data.samples import Conversation, PreferencePair, ReadReport
from relook.data.templates import check_template
from relook.errors import DataError, Faults, RecipeError, count_of, preview
from relook.files import file_hash, is_free, read_json_object, read_text, text_hash, write_json, writes_alone
from relook.flags import DEFAULTS, check_model_settings, idle_keys
from relook.forward import activation_memory
from relook.forward.collate import (
    Collator,
    Item,
    ItemDataset,
    check_images,
    corrupt,
    preference_weights,
    reference_log_probs,
    split_held_out,
)
from relook.forward.policy import Policy
from relook.model.adapters import read_adapter
from relook.model.checkpoint import llava_settings, save_pretrained
from relook.model.families import family_of
from relook.model.load import TENSORS_FILE, HeadModel, LoadedModel, base_and_adapter, load_model, open_base
from relook.model.trainable import set_trainable
from relook.recipe import (
    HUB_KEYS,
    Recipe,
    load_recipe,
    missing_paths,
    parse_overrides,
    read_yaml_or_shipped,
)
from relook.train.feature_cache import cache_vision_features, cached_items, images_hash
from relook.train.loss import metric_names
from relook.train.trainer import (
    COMPLETE_MARKER,
    RelookTrainer,
    gather_tensors,
    last_checkpoint,
    save_change,
    save_trained,
    training_sampler,
)

RUN_FILE = "run.json"  # written last: its presence marks a finished run
RECIPE_FILE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
DATA_FILE = "data.json"  # hashes of the training data, written when training begins

DATA_KEYS = {"vg_path", "desc_data_path", "pope_data_path", "pairs_path", "data_path", "image_folder"}

Samples = tuple[Sequence[PreferencePair | Conversation], ReadReport]
EncodedSamples = tuple[list[Example], dict[str, Any]]  # examples, and a record of the dropped samples


def recipe_of_command(name: str, keys: Sequence[str]) -> Recipe:
    """Load the recipe of `relook train NAME [--key value ...]`.

    Raises:
        RelookError: everything that is wrong with it, missing paths included, in one error.
    """
    values, faults = parse_overrides(keys), Faults()
    with faults:
        recipe = load_recipe(name, values)
    if faults.errors:  # the paths of a valid recipe are checked by `check_run`
        faults.errors += missing_paths({**read_yaml_or_shipped(name, "recipe"), **values}).values()
    faults.check()
    return recipe


@writes_alone(lambda recipe, *_, **__: Path(recipe.output_dir), lambda out: has_saved_state(out))
def train(recipe: Recipe, device: str | None = None, encoded: EncodedSamples | None = None) -> Path:
    """Train as the recipe says and return the output folder.

    The folder holds the resolved recipe, the trained tensors with `change.json` (for a full run the whole model)
    and `run.json` with the log. A finished run is not repeated; a killed run resumes from its last checkpoint.

    Args:
        device: device of the model; None for the one that the training arguments choose.
        encoded: output of `encode_samples` for the recipe's data, if several runs share it.
    """
    out = Path(recipe.output_dir)
    if claim_run_dir(out, recipe):
        status(f"  {out} is finished: nothing to do")
        return out
    started = time.monotonic()
    # Nothing large is loaded before everything that a user may get wrong has been checked.
    arguments, samples = check_run(recipe, out, read=encoded is None)
    if unused := {**recipe.idle, **effective_arguments(recipe)[1]}:
        status(f"  without effect here: {', '.join(f'{key} ({why})' for key, why in unused.items())}")
    # The dtype of matrix products; what trains is float32 (`set_trainable`).
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    device = device or str(arguments.device)
    # With cached trunk states the trunk is loaded only if some of them have to be computed.
    loaded = load_for_training(recipe, dtype, device, trunk=not recipe.cached_trunk)
    examples, dropped = encode_samples(recipe, loaded, *samples) if encoded is None else encoded
    # Again, now that unusable and held-out samples are known.
    training, held_out = split_held_out([Item(example) for example in examples], recipe.eval_fraction)
    check_schedule(arguments, len(training))
    record_data_hashes(out, recipe, examples)
    policy = build_policy(recipe, loaded, dtype)
    collator = Collator(policy, loaded.images, loaded.pad_id)
    load_with_trunk = partial(build_policy_with_trunk, recipe, dtype, device)
    sampler = training_sampler(recipe, arguments, training, steps_of(arguments, len(training)))
    read = {item.example for item in [*(training[i] for i in sampler), *held_out]}
    batch_size = arguments.per_device_train_batch_size
    items = prepare_items(recipe, policy, examples, collator, batch_size, load_with_trunk, read)
    training, held_out = split_held_out(items, recipe.eval_fraction)
    with progress(f"training {out.name}") as report:
        trainer = RelookTrainer(
            recipe,
            policy,
            sampler,
            report,
            args=arguments,
            train_dataset=ItemDataset(training),
            eval_dataset=ItemDataset(held_out),
            data_collator=collator,
        )
        trainer.train(resume_from_checkpoint=last_checkpoint(out / CHECKPOINTS))
    save_run(recipe, loaded, policy, out)
    # Last, because this file marks the run as finished.
    if distributed.is_main():
        write_json(
            out / RUN_FILE,
            {
                "seconds": round(time.monotonic() - started, 2),
                "samples": len(examples),
                "held_out": len(held_out),
                "dropped": dropped,
                "log": trainer.state.log_history,
            },
        )
    distributed.barrier("the run's files")
    return out


def check_run(recipe: Recipe, out: Path, read: bool = True) -> tuple[TrainingArguments, Samples]:
    """Check everything that a run needs before anything large is loaded.

    Args:
        read: read the samples too.

    Returns:
        transformers' training arguments and the samples.

    Raises:
        RelookError: everything that is wrong, in one error.
    """
    faults, arguments = Faults(), None
    samples: Samples = ([], ReadReport("", 0))
    with faults:
        arguments = training_arguments(recipe, out)
    absent = missing_paths(vars(recipe))
    faults.errors += absent.values()
    with faults:
        if recipe.version:
            check_template(recipe.version)
    with faults:
        if not absent.keys() & HUB_KEYS:
            base, adapter = base_and_adapter(recipe.model_name_or_path, recipe.adapter_name_or_path or None)
            if adapter is not None:
                read_adapter(adapter)  # reads no weights yet, but finds what cannot be read
            open_base(base, adapter, recipe.vision_tower or None, weights=False)
    with faults:
        # Sweeps pass encoded samples, which they have read and checked themselves.
        if read and not absent.keys() & DATA_KEYS:
            samples = read_samples(recipe)
            if arguments:
                check_schedule(arguments, len(samples[0]))
    faults.check()
    assert arguments is not None
    return arguments, samples


def claim_run_dir(out: Path, recipe: Recipe) -> bool:
    """Claim an output folder for a recipe; return True if the same run is already finished there.

    A run that left nothing to resume from is replaced by one of another recipe, unless it is still running.

    Raises:
        RecipeError: the folder holds something else, a run of another recipe, or a run on other data.
    """
    recipe_path = out / RECIPE_FILE
    new_folder = is_free(out, RECIPE_FILE, "output_dir")
    out.mkdir(parents=True, exist_ok=True)
    if new_folder or not has_saved_state(out):
        recipe.save(recipe_path)
        return False
    # Compare as YAML gives them back, so that tuples equal lists.
    old, new = yaml.safe_load(read_text(recipe_path)), yaml.safe_load(recipe.to_yaml())
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:  # resuming under another recipe would mix two runs
        raise RecipeError(
            f"{out} holds a run of another recipe (it differs in {', '.join(changed)}).",
            "Choose another output_dir, or remove the folder.",
        )
    refuse_other_data(out, data_hashes(recipe))
    return (out / RUN_FILE).exists()


def record_data_hashes(out: Path, recipe: Recipe, examples: Sequence[Example]) -> None:
    """Record content hashes of the training data, and refuse to resume if the data or images have changed.

    Raises:
        RecipeError: they have changed.
    """

    # The main process returns the error instead of raising it, so that all processes raise it.
    def record() -> RecipeError | None:
        hashes = {**data_hashes(recipe), "images": images_hash(examples)}
        try:
            refuse_other_data(out, hashes)
        except RecipeError as error:
            return error
        write_json(out / DATA_FILE, hashes)
        return None

    error = distributed.broadcast_from_main(record)
    if error is not None:
        raise error


def data_hashes(recipe: Recipe) -> dict[str, str]:
    """Hash the existing data files that a recipe names, by recipe key."""
    files = {
        "vg_path": [Path(recipe.vg_path, "image_data.json")],
        **{key: [Path(getattr(recipe, key))] for key in ("desc_data_path", "pope_data_path", "data_path")},
        "pairs_path": [path] if (path := Path(recipe.pairs_path)).is_file() else sorted(path.glob("*.parquet")),
    }
    return {
        key: text_hash(*map(file_hash, paths))
        for key, paths in files.items()
        if getattr(recipe, key) and paths and all(map(Path.is_file, paths))
    }


def refuse_other_data(out: Path, hashes: Mapping[str, str]) -> None:
    """Refuse to resume or reuse a run that was trained on other data.

    Raises:
        RecipeError: the data have changed; the error names the recipe keys.
    """
    if not (out / RUN_FILE).exists() and not _has_checkpoint(out):
        return  # nothing to resume: the run starts from scratch
    old = read_json_object(out / DATA_FILE, optional=True)
    if changed := [key for key, value in hashes.items() if old.get(key, value) != value]:
        raise RecipeError(
            f"{out} holds a run on other data: the files of {', '.join(changed)} have changed since.",
            "Choose another output_dir, or remove the folder.",
        )


def has_saved_state(out: Path) -> bool:
    """Return True if a run folder holds a complete checkpoint or trained tensors."""
    saved = (RUN_FILE, TENSORS_FILE, CONFIG_NAME)  # the first file written of an adapter, and of a whole model
    return any((out / name).exists() for name in saved) or _has_checkpoint(out)


def _has_checkpoint(out: Path) -> bool:
    return any((out / CHECKPOINTS).glob(f"*/{COMPLETE_MARKER}"))


def training_arguments(recipe: Recipe, out: Path) -> TrainingArguments:
    """Build transformers' TrainingArguments from relook's defaults, which the recipe overrides.

    Raises:
        RecipeError: values that do not fit together, an unmeasured metric, or fsdp with one process.
    """
    gpu = torch.accelerator.is_available()
    defaults = {
        **DEFAULTS,
        "remove_unused_columns": False,
        "label_names": [],
        # A copy from memory that is not pinned waits for all queued GPU work.
        "dataloader_pin_memory": gpu,
        "accelerator_config": {"non_blocking": gpu},
        "eval_strategy": "epoch" if recipe.eval_fraction else "no",
        "use_cpu": not gpu,  # otherwise bf16 is refused on a CPU
        # Workers read images while a GPU computes. Cached states need none, and a CPU run has no cores to spare.
        "dataloader_num_workers": default_workers(recipe),
        "ddp_find_unused_parameters": False,  # every batch uses all trainable parameters (see Collator)
    }
    options = effective_arguments(recipe)[0]
    if options.get("deepspeed"):
        options["deepspeed"] = distributed.deepspeed_config(options["deepspeed"])
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    try:
        options = activation_memory.rename_checkpointing_keys(options)
        arguments = TrainingArguments(**{**defaults, **options, "output_dir": str(out / CHECKPOINTS)})
        _check_arguments(arguments)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        raise RecipeError(
            f"The training arguments do not fit together: {str(error).rstrip('.')}.",
            "Correct them; transformers' documentation of TrainingArguments lists their values.",
        ) from None
    best = "eval_" + (arguments.metric_for_best_model or "loss").removeprefix("eval_")
    if best not in (names := [f"eval_{name}" for name in metric_names(recipe)]):
        raise RecipeError(f"metric_for_best_model {best} is not measured.", f"Choose one of {', '.join(names)}.")
    if arguments.fsdp and arguments.world_size == 1:
        raise RecipeError("fsdp needs several processes.", "Start it by torchrun; docs/clusters.md has the commands.")
    # While this is set, transformers shards a model under ZeRO-3 as it loads; the reference pass needs it whole.
    unset_hf_deepspeed_config()
    return arguments


def default_workers(recipe: Recipe) -> int:
    """Return the default number of DataLoader worker processes, which read images."""
    return 2 if torch.accelerator.is_available() and not recipe.cached_trunk else 0


def effective_arguments(recipe: Recipe) -> tuple[dict[str, Any], dict[str, str]]:
    """Split the recipe's transformers arguments into those with an effect on this machine and the others.

    Returns:
        The arguments with an effect, and for each of the others the reason why it has none.
    """
    unused = idle_keys({"dataloader_num_workers": default_workers(recipe), **recipe.explicit_keys})
    if recipe.training.get("tf32") and not is_torch_tf32_available():
        unused["tf32"] = "without a GPU that has it"
    return {key: value for key, value in recipe.training.items() if key not in unused}, unused


def _check_arguments(arguments: TrainingArguments) -> None:
    """Build the Trainer's callbacks, optimizer and schedule once on dummy data, to fail early.

    The Trainer builds them only after the preparation, which may take hours.

    Raises:
        ImportError, RuntimeError, ValueError, TypeError: a library is missing, or a value is invalid.
    """
    for callback in get_reporting_integration_callbacks(arguments.report_to):
        callback()
    _schedule(arguments, 10**6)


def _schedule(arguments: TrainingArguments, steps: int, **settings: Any) -> tuple[torch.optim.Optimizer, Any]:
    """Build an optimizer of one dummy parameter, and its learning-rate schedule over `steps` steps.

    Args:
        settings: keyword arguments of the optimizer that override the training arguments.
    """
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = optimizer_class([torch.zeros(1, requires_grad=True)], **{**options, **settings})
    warmup, schedule_options = arguments.get_warmup_steps(steps), arguments.lr_scheduler_kwargs
    return optimizer, get_scheduler(arguments.lr_scheduler_type, optimizer, warmup, steps, schedule_options)


def steps_of(arguments: TrainingArguments, samples: int) -> int:
    """Count the optimizer steps of a run over `samples` samples, as the Trainer does."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    rounded = math.floor if arguments.dataloader_drop_last else math.ceil
    # Batches of one process; the last accumulation of an epoch may be incomplete, but it is a step.
    batches = rounded(rounded(samples / arguments.train_batch_size) / arguments.world_size)
    steps_per_epoch = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    steps: int = math.ceil(arguments.num_train_epochs * steps_per_epoch)
    return steps


def check_schedule(arguments: TrainingArguments, samples: int) -> None:
    """Refuse a run over `samples` samples if no step has a learning rate above 0.

    Raises:
        RecipeError: the warm-up, which starts at 0, is as long as the run.
    """
    steps = steps_of(arguments, samples)
    optimizer, schedule = _schedule(arguments, steps, lr=1.0)  # parameter groups may have their own rates
    # Step through the schedule itself, since transformers has many shapes of it. Usually the second step decides.
    for _ in range(steps):
        if optimizer.param_groups[0]["lr"] > 0:
            return
        optimizer.step()
        schedule.step()
    warmup = arguments.get_warmup_steps(steps)
    raise RecipeError(
        f"No step would have a learning rate above 0: the run has {count_of(steps, 'step')} for "
        f"{count_of(samples, 'sample')}, and its warm-up from 0 takes {warmup}.",
        "Give more steps (num_train_epochs, max_steps, a smaller batch), or warmup_steps 0.",
    )


def read_samples(recipe: Recipe) -> Samples:
    """Read the samples of the recipe's data files, and report what the reader left out.

    Raises:
        DataError: none can be used.
        RecipeError: the file has rated answers, and the loss compares pairs.
    """
    samples, report = _read_files(recipe)
    if not samples:
        raise DataError("No sample can be used.", report.summary())
    if recipe.rates_answers:
        samples = rated_answers(samples)
        return samples, replace(report, used=len(samples))
    if recipe.task == "dpo" and any(sample.desirable is not None for sample in samples):
        raise RecipeError(f"{recipe.pairs_path} has rated answers, not pairs.", "Set loss_type kto.")
    return samples, report


def _read_files(recipe: Recipe) -> tuple[Sequence[Any], ReadReport]:
    if recipe.sentinel_pairs:
        return read_sentinel(Path(recipe.pairs_path), Path(recipe.vg_path), recipe.on_bad)
    if recipe.pairs_path:
        folder = Path(recipe.image_folder) if recipe.image_folder else None
        return read_pairs(Path(recipe.pairs_path), folder, on_bad=recipe.on_bad)
    if recipe.task == "dpo":
        desc, pope = (Path(p) if p else None for p in (recipe.desc_data_path, recipe.pope_data_path))
        return read_hadpo(Path(recipe.vg_path), desc, pope, on_bad=recipe.on_bad)
    return read_llava(Path(recipe.data_path), Path(recipe.image_folder), on_bad=recipe.on_bad)


def encode_samples(recipe: Recipe, loaded: LoadedModel, samples: Sequence[Any], report: ReadReport) -> EncodedSamples:
    """Encode samples as token trees; count and report the samples that cannot be used.

    Raises:
        DataError: no sample can be used, or one cannot and `on_bad` is "error".
    """
    # Ids and trees first, which is fast; images are decoded afterwards, of usable samples only.
    encoder = loaded.encoder(recipe.version, recipe.model_max_length)
    faults: list[str] = []
    if recipe.task == "dpo":
        examples = encoder.pairs(samples, faults)
    else:
        examples = encoder.conversations(samples, recipe.conversations_per_tree, faults)
    if faults and recipe.on_bad == "error":
        problem = f"{len(faults):,} samples cannot be used: {preview(faults, 3)}"
        raise DataError(problem, "Repair them, or set on_bad drop to leave them out.")
    examples, image_faults = check_images(examples, loaded.images, recipe.on_bad)
    faults += image_faults
    if not examples:
        raise DataError("No sample can be used.", f"{report.summary()} {' '.join(faults[:3])}")
    if report.note:
        status(f"  {report.note}")
    if report.dropped or report.skipped or faults:
        reasons = f" {count_of(len(faults), 'fault')} in encoding and decoding: {preview(faults, 3)}" if faults else ""
        status(f"  {'dropped' if report.dropped or faults else 'skipped'}: {report.summary()}{reasons}")
    return examples, {"reader": report.summary(), "reasons": dict(report.reasons), "faults": faults}


def load_for_training(recipe: Recipe, dtype: torch.dtype, device: str, trunk: bool = True) -> LoadedModel:
    """Load the recipe's model; if `trunk` is False, only the parts above the trunk have weights."""
    loaded = load_model(
        recipe.model_name_or_path,
        adapter=recipe.adapter_name_or_path or None,
        vision_tower=recipe.vision_tower or None,
        device=device,
        dtype=dtype,
        bits=recipe.bits,
        double_quant=recipe.double_quant,
        quant_type=recipe.quant_type,
        trunk=trunk,
    )
    # Keys that state something about the model, as in LLaVA's commands, must agree with its config.
    check_model_settings(recipe.of_the_model, llava_settings(loaded.core.config))
    loaded.aspect_ratio = loaded.images.aspect_ratio = recipe.image_aspect_ratio or loaded.aspect_ratio
    # The config is saved with what is trained: a run is asked and shown images as it was trained.
    template = loaded.conversation_template(recipe.version).name
    loaded.core.config.conversation_template = loaded.template = template
    loaded.core.config.image_aspect_ratio = loaded.aspect_ratio
    return loaded


def build_policy(recipe: Recipe, loaded: LoadedModel, dtype: torch.dtype) -> Policy:
    """Build the policy and set what the recipe trains; without trunk weights, it has only the parts above the trunk."""
    set_trainable(loaded, recipe)
    # Parts that were not loaded are on the meta device.
    trunk = not loaded.core.get_input_embeddings().weight.is_meta
    sharded = distributed.is_sharded(recipe.training) and not recipe.cached_trunk  # unsharded models fill the cache
    model = loaded.model if trunk else HeadModel(loaded.model)
    budget, offloaded = recipe.activation_memory_budget, recipe.activation_offloading
    return Policy(model, dtype, recipe.trunk_pass, sharded, budget, offloaded)


def build_policy_with_trunk(recipe: Recipe, dtype: torch.dtype, device: str) -> Policy:
    return build_policy(recipe, load_for_training(recipe, dtype, device), dtype)


def prepare_items(
    recipe: Recipe,
    policy: Policy,
    examples: list[Example],
    collator: Collator,
    batch_size: int,
    load_with_trunk: Callable[[], Policy],
    read: Collection[Example] | None = None,
) -> list[Item]:
    """Compute what is needed once before training: hidden states of a frozen trunk, and reference log-probs.

    Equal examples share the results: HA-DPO's mix has every description pair twice.

    Args:
        batch_size: examples per forward pass for the reference log-probs.
        load_with_trunk: loads the policy with its trunk, which `policy` may lack.
        read: the examples that the run reads, if not all. The others are returned bare, unless the trunk is cached:
            its cache is of the dataset, whichever part of it a run reads, so that other runs can use it.
    """
    distinct = list(dict.fromkeys(examples))  # by value, in order
    if recipe.cached_trunk:
        items = cached_items(recipe, policy, distinct, collator, load_with_trunk)
    else:
        if read is not None:
            distinct = [example for example in distinct if example in read]
        if recipe.trains_vision_tower:
            status("  the vision tower trains: nothing is cached, and each step runs the whole model")
        collator.vision_features = cache_vision_features(recipe, policy, distinct, collator.images)
        items = [Item(example) for example in distinct]
        if recipe.mdpo_conditional_weight:
            # Behind all pairs: the chosen answers once more, on corrupted images.
            seed = int(recipe.training.get("seed", 42))
            items += [corrupt(item, seed) for item in items]
        if recipe.needs_reference:
            with progress("reference log-probs") as report:
                log_probs = distributed.map_sharded(
                    items,
                    lambda share: reference_log_probs(policy, share, collator, batch_size, report),
                    "the reference log-probs",
                )
            items = [replace(item, reference=reference) for item, reference in zip(items, log_probs, strict=True)]
    if recipe.task == "dpo":
        weighting = recipe.dpo_tokens, recipe.unchanged_weight, recipe.ld_alpha
        items = [replace(item, weight=preference_weights(item.example, *weighting)) for item in items]
    pairs, corrupted = items[: len(distinct)], items[len(distinct) :]
    if corrupted:
        pairs = [replace(pair, corrupted=copy) for pair, copy in zip(pairs, corrupted, strict=True)]
    item_of = dict(zip(distinct, pairs, strict=True))
    return [item_of.get(example) or Item(example) for example in examples]


def save_run(recipe: Recipe, loaded: LoadedModel, policy: Policy, out: Path) -> None:
    """Write the result of training: the whole model after a full run, otherwise tensors to be applied to the base.

    Every process must call it, since tensors may be sharded over them; only the main process writes.
    """
    if not recipe.full:
        save_trained(policy.core, out / TENSORS_FILE, without="lora_")  # those are in peft's file
    if recipe.full or recipe.lora_enable:
        tensors = gather_tensors(loaded.model, everything=recipe.full)
        if distributed.is_main():
            save_pretrained(loaded.model, out, state_dict=tensors)
    if not distributed.is_main():
        return
    if recipe.full:
        if family_of(loaded.core.config).pads_to_square:  # what transformers reads of it
            loaded.processor.image_processor.do_pad = loaded.aspect_ratio == "pad"
        loaded.processor.save_pretrained(out)
        return  # a whole model has no base to name
    save_change(recipe, loaded.core.config, out)
