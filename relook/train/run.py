"""One training run: read, encode, prepare, train, save. `relook train` and `python -m relook.train` call `train`."""

from __future__ import annotations

import logging
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from relook import distributed
from relook.console import progress, say
from relook.data.encode import Example
from relook.data.readers import read_hadpo, read_llava, read_pairs
from relook.data.samples import Conversation, PreferencePair, ReadReport
from relook.errors import DataError, RecipeError, some
from relook.files import read_text, takes, write_json
from relook.flags import check_model, check_switched
from relook.forward import activation_memory
from relook.forward.collate import (
    Collator,
    Item,
    Items,
    check_images,
    corrupted,
    hold_out,
    preference_weight,
    reference_log_probs,
)
from relook.forward.policy import Policy
from relook.model.adapters import read_change
from relook.model.checkpoint import kind_of, llava_settings
from relook.model.load import CHANGE_FILE, TENSORS_FILE, AboveTrunk, LoadedModel, load_model
from relook.model.trainable import apply_regime
from relook.recipe import Recipe, load_recipe, parse_overrides
from relook.train.feature_cache import cached_items, features_once
from relook.train.loss import measures
from relook.train.trainer import RelookTrainer, last_checkpoint, save_trained, whole_tensors

RUN_FILE = "run.json"  # written last: a run that has it is finished
RECIPE_FILE = "recipe.yaml"
CHECKPOINTS = "checkpoints"

Encoded = tuple[list[Example], dict[str, Any]]  # examples, and what was dropped


def train_command(arguments: Sequence[str]) -> Path:
    """`relook train RECIPE [--key value ...]`."""
    name, *keys = arguments
    recipe = load_recipe(name, parse_overrides(keys))
    out = train(recipe)
    model = shlex.quote(str(out))
    say(f"{out} holds the result. Evaluate it with: relook eval pope chair --model {model} --data DATA --out OUT")
    return out


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
    arguments = training_arguments(recipe, out)
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    if encoded is None:
        read = read_samples(recipe)  # before the model: a wrong path shows at once
    place = device or str(arguments.device)
    loaded = load(recipe, dtype, place, trunk=not recipe.cached_trunk)
    examples, dropped = encode_samples(recipe, loaded, *read) if encoded is None else encoded
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
    if distributed.first():
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
    distributed.wait("the run's files")
    return out


def claim(out: Path, recipe: Recipe) -> bool:
    """Take an output folder for a recipe. True if this very run is already finished there.

    Raises:
        RecipeError: the folder holds something else, or a run of another recipe.
    """
    held = out / RECIPE_FILE
    if takes(out, RECIPE_FILE, "output_dir"):
        recipe.save(held)
        return False
    old, new = yaml.safe_load(read_text(held)), yaml.safe_load(recipe.to_yaml())
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if changed:
        raise RecipeError(
            f"{out} holds a run of another recipe (it differs in {', '.join(changed)}).",
            "Choose another output_dir, or remove the folder.",
        )
    return (out / RUN_FILE).exists()


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
        "dataloader_num_workers": 2 if gpu and not recipe.cached_trunk else 0,
        "ddp_find_unused_parameters": False,  # every batch uses all that trains (see Collator)
    }
    check_switched({"dataloader_num_workers": defaults["dataloader_num_workers"], **recipe.said})
    given = dict(recipe.training)
    if given.get("deepspeed"):
        given["deepspeed"] = distributed.deepspeed_config(given["deepspeed"])
    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    try:
        told = activation_memory.renamed(given)
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


def _rehearse(arguments: TrainingArguments) -> None:
    """Make once, of nothing, what the Trainer makes when all that comes before training is done: hours may lie there.

    Raises:
        ImportError, RuntimeError, ValueError, TypeError: a library is missing, or a value is none.
    """
    for callback in get_reporting_integration_callbacks(arguments.report_to):
        callback()
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = kind([torch.zeros(1, requires_grad=True)], **settings)
    steps = 10**6
    warmup, more = arguments.get_warmup_steps(steps), arguments.lr_scheduler_kwargs
    get_scheduler(arguments.lr_scheduler_type, optimizer, warmup, steps, more)


def read_samples(recipe: Recipe) -> tuple[Sequence[PreferencePair | Conversation], ReadReport]:
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
    if report.dropped or faults:
        named = f" {some(faults, 3)}" if faults else ""
        say(f"  dropped: {report.summary()} {len(faults)} faults in encoding and decoding.{named}")
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
    sharded = distributed.shard(recipe.training) and not recipe.cached_trunk  # a cache is filled by whole models
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
                found = distributed.shared(
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
        if distributed.first():
            loaded.model.save_pretrained(out, state_dict=tensors)
    if not distributed.first():
        return
    if recipe.full:
        loaded.processor.save_pretrained(out)
        return
    settings = getattr(loaded.core.config, "post_decoder", None)
    write_json(out / CHANGE_FILE, {**foundation(recipe), "post_decoder": settings, "lora": recipe.lora_enable})


def foundation(recipe: Recipe) -> dict[str, Any]:
    """What a run lies on: the base at the bottom, its tower, and the changes that were merged into it before."""
    base, tower, earlier = Path(recipe.model_name_or_path), recipe.vision_tower, list[Path]()
    if kind_of(base) == "run":
        run = read_change(base)
        assert run.base is not None
        earlier = [*run.earlier, base]
        base, tower = run.base, tower or str(run.vision_tower or "")
    elif recipe.adapter_name_or_path:
        adapter = Path(recipe.adapter_name_or_path)
        earlier = [*read_change(adapter).earlier, adapter]
    if tower and Path(tower).is_dir():  # else it is a hub's name
        tower = str(Path(tower).resolve())
    return {
        "base": str(base.resolve()),
        "vision_tower": tower or None,
        "earlier": [str(path.resolve()) for path in earlier],
    }
