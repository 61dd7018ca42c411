"""One training run: read, encode, prepare, train, save. `relook train` and `python -m relook.train` call `train`."""

from __future__ import annotations

import logging
import math
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
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

from relook import processes
from relook.console import progress, say
from relook.data.encode import Example
from relook.data.hadpo import read_hadpo
from relook.data.llava import read_llava
from relook.data.pairs import read_pairs
from relook.data.prompts import get_template
from relook.data.report import ReadReport
from relook.data.samples import Conversation, PreferencePair
from relook.errors import DataError, Faults, RecipeError, some
from relook.files import file_hash, read_object, read_text, takes, text_hash, write_json, writes_alone
from relook.flags import check_model, idle_keys
from relook.keys import parse_overrides, read_shipped
from relook.model.above_trunk import AboveTrunk
from relook.model.formats import llava_settings
from relook.model.load import TENSORS_FILE, LoadedModel, load_model, tower_of
from relook.model.regimes import apply_regime
from relook.recipe import Recipe, load_recipe
from relook.train import recompute, sharding
from relook.train.batches import (
    Collator,
    Item,
    Items,
    check_images,
    corrupted,
    hold_out,
    preference_weight,
    reference_log_probs,
)
from relook.train.cache import cached_items
from relook.train.cache_key import images_hash
from relook.train.policy import Policy
from relook.train.preference import measures
from relook.train.sight import features_once
from relook.train.trainer import (
    COMPLETE,
    RelookTrainer,
    last_checkpoint,
    save_change,
    save_trained,
    whole_tensors,
)

RUN_FILE = "run.json"  # written last: a run that has it is finished
RECIPE_FILE = "recipe.yaml"
CHECKPOINTS = "checkpoints"
DATA_FILE = "data.json"  # hashes of what it trains on, written when training begins

MODEL_KEYS = {"model_name_or_path", "adapter_name_or_path"}
DATA_KEYS = {"vg_path", "desc_data_path", "pope_data_path", "pairs_path", "data_path", "image_folder"}

Samples = tuple[Sequence[PreferencePair | Conversation], ReadReport]
Encoded = tuple[list[Example], dict[str, Any]]  # examples, and what was dropped


def train_command(arguments: Sequence[str]) -> Path:
    """`relook train RECIPE [--key value ...]`."""
    name, *keys = arguments
    values, faults = parse_overrides(keys), Faults()
    with faults:
        recipe = load_recipe(name, values)
    if faults.errors:
        faults.errors += missing({**read_shipped(name, "recipe"), **values}).values()
    faults.check()
    out = train(recipe)
    model = shlex.quote(str(out))
    say(f"{out} holds the result. Evaluate it with: relook eval pope chair --model {model} --data DATA --out OUT")
    return out


@writes_alone(lambda recipe, *_, **__: Path(recipe.output_dir))
def train(recipe: Recipe, device: str | None = None, encoded: Encoded | None = None) -> Path:
    """Carry out a recipe; returns its output folder.

    The folder holds the resolved recipe, what was trained (`change.json` and tensors; for a full run the whole model)
    and `run.json` with the log. A finished run is not run again; one that was killed goes on from its last checkpoint.

    Args:
        encoded: what `encode_samples` makes of the recipe's data, where several runs share it.
    """
    out = Path(recipe.output_dir)
    if claim(out, recipe):
        say(f"  {out} is finished: nothing to do")
        return out
    started = time.monotonic()
    arguments, read = check(recipe, out, read=encoded is None)
    if unused := {**recipe.idle, **acting(recipe)[1]}:
        say(f"  without effect here: {', '.join(f'{key} ({why})' for key, why in unused.items())}")
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    place = device or str(arguments.device)
    loaded = load(recipe, dtype, place, trunk=not recipe.cached_trunk)
    examples, dropped = encode_samples(recipe, loaded, *read) if encoded is None else encoded
    check_schedule(arguments, len(hold_out([Item(example) for example in examples], recipe.eval_fraction)[0]))
    keep_data(out, recipe, examples)
    policy = policy_of(recipe, loaded, dtype)
    collator = Collator(policy, loaded.images, loaded.pad_id)
    whole = partial(whole_policy, recipe, dtype, place)
    items = prepare(recipe, policy, examples, collator, arguments.per_device_train_batch_size, whole)
    items, held_out = hold_out(items, recipe.eval_fraction)
    with progress(f"training {out.name}") as report:
        trainer = RelookTrainer(
            recipe,
            policy,
            report,
            args=arguments,
            train_dataset=Items(items),
            eval_dataset=Items(held_out),
            data_collator=collator,
        )
        trainer.train(resume_from_checkpoint=last_checkpoint(out / CHECKPOINTS))
    save(recipe, loaded, policy, out)
    if processes.first():
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
    processes.wait("the run's files")
    return out


def check(recipe: Recipe, out: Path, read: bool = True) -> tuple[TrainingArguments, Samples]:
    """Look at all that a run needs before anything of size is loaded.

    Args:
        read: whether the samples are to be read.

    Returns:
        transformers' arguments and the samples.

    Raises:
        RelookError: all that is wrong, at once.
    """
    faults, arguments = Faults(), None
    samples: Samples = ([], ReadReport("", 0))
    with faults:
        arguments = training_arguments(recipe, out)
    lost = missing(vars(recipe))
    faults.errors += lost.values()
    with faults:
        if recipe.version:
            get_template(recipe.version)
    with faults:
        if not lost.keys() & MODEL_KEYS:
            tower_of(Path(recipe.model_name_or_path), recipe.vision_tower or None, recipe.adapter_name_or_path or None)
    with faults:
        if read and not lost.keys() & DATA_KEYS:
            samples = read_samples(recipe)
            if arguments:
                check_schedule(arguments, len(samples[0]))
    faults.check()
    assert arguments is not None
    return arguments, samples


def missing(values: Mapping[str, Any], of: str = "") -> dict[str, RecipeError]:
    """Find the keys of a recipe whose files and folders are not there.

    Args:
        of: whose recipe it is, for the errors.
    """
    wanted = {
        "model_name_or_path": "model folder",
        "adapter_name_or_path": "adapter",
        "vg_path": "Visual Genome folder",
        **dict.fromkeys(("desc_data_path", "pope_data_path", "pairs_path", "data_path"), ""),
        **({"image_folder": ""} if values.get("task") == "sft" else {}),  # beside pairs_path, it is written to
    }
    found = {}
    for key, what in wanted.items():
        path = values.get(key)
        if path and not Path(str(path)).exists():
            fault = f"{key}{of}: there is no {what} {path}." if what else f"{key} {path}{of} does not exist."
            hub = " relook downloads nothing: hf download does." if key in MODEL_KEYS else ""
            found[key] = RecipeError(fault, f"Check the path.{hub}")
    return found


def claim(out: Path, recipe: Recipe) -> bool:
    """Take an output folder for a recipe. True if this very run is already finished there.

    A run that left nothing to go on from makes room for one of another recipe, unless it still runs.

    Raises:
        RecipeError: the folder holds something else, a run of another recipe, or one on other data.
    """
    held = out / RECIPE_FILE
    new_folder = takes(out, RECIPE_FILE, "output_dir")
    out.mkdir(parents=True, exist_ok=True)
    if new_folder or not begun(out):
        recipe.save(held)
        return False
    old, new = yaml.safe_load(read_text(held)), yaml.safe_load(recipe.to_yaml())
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        raise RecipeError(
            f"{out} holds a run of another recipe (it differs in {', '.join(changed)}).",
            "Choose another output_dir, or remove the folder.",
        )
    refuse_other_data(out, data_hashes(recipe))
    return (out / RUN_FILE).exists()


def keep_data(out: Path, recipe: Recipe, examples: Sequence[Example]) -> None:
    """Note what a run trains on, by content; refuse to go on with other images than it began with.

    Raises:
        RecipeError: they have changed.
    """

    def note() -> RecipeError | None:
        hashes = {**data_hashes(recipe), "images": images_hash(examples)}
        try:
            refuse_other_data(out, hashes)
        except RecipeError as error:
            return error
        write_json(out / DATA_FILE, hashes)
        return None

    error = processes.of_the_first(note)
    if error is not None:
        raise error


def data_hashes(recipe: Recipe) -> dict[str, str]:
    """Hash the data files that a recipe names and that are there, by its keys."""
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
    """Refuse to go on with a run, or to take it for this one, whose data were others.

    Raises:
        RecipeError: what has changed, by the keys that name it.
    """
    if not (out / RUN_FILE).exists() and not _has_checkpoint(out):
        return  # it begins anew
    old = read_object(out / DATA_FILE, optional=True)
    if changed := [key for key, value in hashes.items() if old.get(key, value) != value]:
        raise RecipeError(
            f"{out} holds a run on other data: what {', '.join(changed)} names has changed since.",
            "Choose another output_dir, or remove the folder.",
        )


def begun(out: Path) -> bool:
    """Whether a run's folder holds anything to go on from: a complete checkpoint, or what was trained."""
    saved = (RUN_FILE, TENSORS_FILE, CONFIG_NAME)  # of a change, and of a whole model, the first file that is written
    return any((out / name).exists() for name in saved) or _has_checkpoint(out)


def _has_checkpoint(out: Path) -> bool:
    return any((out / CHECKPOINTS).glob(f"*/{COMPLETE}"))


def training_arguments(recipe: Recipe, out: Path) -> TrainingArguments:
    """transformers' arguments with relook's defaults; what the recipe says goes before."""
    gpu = torch.accelerator.is_available()
    defaults = {
        "report_to": "none",
        "remove_unused_columns": False,
        "label_names": [],
        "save_strategy": "no",
        "save_total_limit": 2,
        "logging_steps": 10,
        "logging_nan_inf_filter": False,  # it hides such losses, and waits for the device at every step to do so
        # A copy from memory that is not pinned waits for all that the GPU still has to do.
        "dataloader_pin_memory": gpu,
        "accelerator_config": {"non_blocking": gpu},
        "seed": 42,
        "eval_strategy": "epoch" if recipe.eval_fraction else "no",
        "use_cpu": not gpu,  # else bf16 is refused there
        # Cached states are at hand; images are read while a GPU works. A CPU has no cores to spare for it.
        "dataloader_num_workers": workers(recipe),
        "ddp_find_unused_parameters": False,  # every batch uses all that trains (see Collator)
    }
    given = acting(recipe)[0]
    if given.get("deepspeed"):
        given["deepspeed"] = sharding.deepspeed_config(given["deepspeed"])
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    try:
        told = recompute.renamed(given)
        arguments = TrainingArguments(**{**defaults, **told, "output_dir": str(out / CHECKPOINTS)})
        _rehearse(arguments)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        raise RecipeError(
            f"The training arguments do not fit together: {str(error).rstrip('.')}.",
            "Correct them; transformers' documents of TrainingArguments have their values.",
        ) from None
    best = "eval_" + (arguments.metric_for_best_model or "loss").removeprefix("eval_")
    if best not in (names := [f"eval_{name}" for name in measures(recipe)]):
        raise RecipeError(f"metric_for_best_model {best} is not measured.", f"Choose one of {', '.join(names)}.")
    if arguments.fsdp and arguments.world_size == 1:
        raise RecipeError("fsdp needs several processes.", "Start it by torchrun; docs/clusters.md has the commands.")
    # While this is set, transformers shards a model under ZeRO-3 as it is loaded; references need it whole.
    unset_hf_deepspeed_config()
    return arguments


def workers(recipe: Recipe) -> int:
    """Count the processes that read images, where the recipe does not say."""
    return 2 if torch.accelerator.is_available() and not recipe.cached_trunk else 0


def acting(recipe: Recipe) -> tuple[dict[str, Any], dict[str, str]]:
    """Split the recipe's arguments for transformers into those that act on this machine, and why the others do not."""
    unused = idle_keys({"dataloader_num_workers": workers(recipe), **recipe.said})
    if recipe.training.get("tf32") and not is_torch_tf32_available():
        unused["tf32"] = "without a GPU that has it"
    return {key: value for key, value in recipe.training.items() if key not in unused}, unused


def _rehearse(arguments: TrainingArguments) -> None:
    """Make once, of nothing, what the Trainer makes when all that comes before training is done: hours may lie there.

    Raises:
        ImportError, RuntimeError, ValueError, TypeError: a library is missing, or a value is none.
    """
    for callback in get_reporting_integration_callbacks(arguments.report_to):
        callback()
    _schedule(arguments, 10**6)


def _schedule(arguments: TrainingArguments, steps: int, **settings: Any) -> tuple[torch.optim.Optimizer, Any]:
    """Make an optimizer of one number, and the schedule of its learning rate over a run of so many steps.

    Args:
        settings: of the optimizer, instead of those that the arguments say.
    """
    kind, said = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = kind([torch.zeros(1, requires_grad=True)], **{**said, **settings})
    warmup, more = arguments.get_warmup_steps(steps), arguments.lr_scheduler_kwargs
    return optimizer, get_scheduler(arguments.lr_scheduler_type, optimizer, warmup, steps, more)


def steps_of(arguments: TrainingArguments, samples: int) -> int:
    """Count the optimizer's steps of a run over so many samples, as the Trainer does."""
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    whole = math.floor if arguments.dataloader_drop_last else math.ceil
    batches = whole(whole(samples / arguments.train_batch_size) / arguments.world_size)
    a_epoch = max(1, math.ceil(batches / arguments.gradient_accumulation_steps))
    steps: int = math.ceil(arguments.num_train_epochs * a_epoch)
    return steps


def check_schedule(arguments: TrainingArguments, samples: int) -> None:
    """Refuse a run over so many samples of which no step has a learning rate above 0.

    Raises:
        RecipeError: the warm-up, which begins at 0, is as long as the run.
    """
    steps = steps_of(arguments, samples)
    optimizer, schedule = _schedule(arguments, steps, lr=1.0)  # groups may have rates of their own
    for _ in range(steps):
        if optimizer.param_groups[0]["lr"] > 0:
            return
        optimizer.step()
        schedule.step()
    warmup = arguments.get_warmup_steps(steps)
    raise RecipeError(
        f"No step would have a learning rate above 0: the run has {steps} for {samples} samples, and a warm-up of "
        f"{warmup}, which begins at 0.",
        "Give more steps (num_train_epochs, max_steps, a smaller batch), or warmup_steps 0.",
    )


def read_samples(recipe: Recipe) -> Samples:
    """The samples of the recipe's files, and what the reader left out."""
    if recipe.pairs_path:
        folder = Path(recipe.image_folder) if recipe.image_folder else None
        return read_pairs(Path(recipe.pairs_path), folder, on_bad=recipe.on_bad)
    if recipe.task == "dpo":
        desc, pope = (Path(p) if p else None for p in (recipe.desc_data_path, recipe.pope_data_path))
        return read_hadpo(Path(recipe.vg_path), desc, pope, on_bad=recipe.on_bad)
    return read_llava(Path(recipe.data_path), Path(recipe.image_folder), on_bad=recipe.on_bad)


def encode_samples(recipe: Recipe, loaded: LoadedModel, samples: Sequence[Any], report: ReadReport) -> Encoded:
    """Samples as trees; what could not be used is counted, named and said."""
    encoder = loaded.encoder(recipe.version, recipe.model_max_length)
    faults: list[str] = []
    if recipe.task == "dpo":
        examples = encoder.pairs(samples, faults)
    else:
        examples = encoder.conversations(samples, recipe.conversations_per_tree, faults)
    if faults and recipe.on_bad == "error":
        raise DataError(faults[0], f"{len(faults)} samples in all cannot be used; set on_bad drop to go on without.")
    examples, image_faults = check_images(examples, loaded.images, recipe.on_bad)
    faults += image_faults
    if not examples:
        raise DataError("No sample can be used.", f"{report.summary()} {' '.join(faults[:3])}")
    if report.note:
        say(f"  {report.note}")
    if report.dropped or report.skipped or faults:
        named = f" {len(faults):,} faults in encoding and decoding: {some(faults, 3)}" if faults else ""
        say(f"  {'dropped' if report.dropped or faults else 'skipped'}: {report.summary()}{named}")
    return examples, {"reader": report.summary(), "reasons": dict(report.reasons), "faults": faults}


def load(recipe: Recipe, dtype: torch.dtype, device: str, trunk: bool = True) -> LoadedModel:
    """The recipe's model; without `trunk` only what stands above it has weights."""
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
    check_model(recipe.of_the_model, llava_settings(loaded.core.config))
    loaded.aspect_ratio = loaded.images.aspect_ratio = recipe.image_aspect_ratio or loaded.aspect_ratio
    return loaded


def policy_of(recipe: Recipe, loaded: LoadedModel, dtype: torch.dtype) -> Policy:
    """The model with what the recipe trains; of one without a trunk, what stands above it."""
    apply_regime(loaded, recipe)
    trunk = not loaded.core.get_input_embeddings().weight.is_meta
    sharded = sharding.shard(recipe.training) and not recipe.cached_trunk  # a cache is filled by whole models
    model = loaded.model if trunk else AboveTrunk(loaded.model)
    budget, away = recipe.activation_memory_budget, recipe.activation_offloading
    return Policy(model, dtype, recipe.trunk_pass, sharded, budget, away)


def whole_policy(recipe: Recipe, dtype: torch.dtype, device: str) -> Policy:
    return policy_of(recipe, load(recipe, dtype, device), dtype)


def prepare(
    recipe: Recipe,
    policy: Policy,
    examples: list[Example],
    collator: Collator,
    batch_size: int,
    whole: Callable[[], Policy],
) -> list[Item]:
    """What is computed once, before training: trunk states of a frozen trunk, and reference log-probs.

    Equal examples share it: HA-DPO's mix has every description pair twice.

    Args:
        whole: loads the policy with its trunk, where `policy` may be without.
    """
    distinct = list(dict.fromkeys(examples))
    if recipe.cached_trunk:
        items = cached_items(recipe, policy, distinct, collator, whole)
    else:
        collator.features = features_once(recipe, policy, distinct, collator.images)
        items = [Item(example) for example in distinct]
        if recipe.mdpo_conditional_weight:
            seed = int(recipe.training.get("seed", 42))
            items += [corrupted(item, seed) for item in items]
        if recipe.needs_reference:
            with progress("reference log-probs") as report:
                found = processes.shared(
                    items,
                    lambda mine: reference_log_probs(policy, mine, collator, batch_size, report),
                    "the reference log-probs",
                )
            items = [replace(item, reference=reference) for item, reference in zip(items, found, strict=True)]
    if recipe.task == "dpo":
        items = [replace(item, weight=preference_weight(item.example, recipe.dpo_tokens)) for item in items]
    pairs, others = items[: len(distinct)], items[len(distinct) :]
    if others:
        pairs = [replace(pair, corrupted=other) for pair, other in zip(pairs, others, strict=True)]
    ready = dict(zip(distinct, pairs, strict=True))
    return [ready[example] for example in examples]


def save(recipe: Recipe, loaded: LoadedModel, policy: Policy, out: Path) -> None:
    """Write what was trained: a whole model after a full run, else a change to be laid on the base.

    Every process calls it, since tensors may be sharded over them; the first one writes.
    """
    if not recipe.full:
        save_trained(policy.core, out / TENSORS_FILE, without="lora_")  # peft's file has those
    if recipe.full or recipe.lora_enable:
        tensors = whole_tensors(loaded.model, everything=recipe.full)
        if processes.first():
            loaded.model.save_pretrained(out, state_dict=tensors)
    if not processes.first():
        return
    if recipe.full:
        loaded.processor.save_pretrained(out)
        return
    save_change(recipe, loaded.core.config, out)
