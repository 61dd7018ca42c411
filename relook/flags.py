"""Flags from the command lines of HA-DPO, LLaVA and transformers that are not settings of a relook run.

A flag without effect is accepted, and the run reports it. Such flags come from pasted commands, or their feature is
switched off. A flag that asks for something that would not happen is an error that names the alternative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from relook.errors import RecipeError, preview

Values = Mapping[str, Any]

# Old names of keys: those of transformers before version 5, and of HA-DPO.
RENAMED = {"evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps", "optimizer_type": "optim"}
# LLaVA's names.
RENAMED |= {"mm_vision_tower_lr": "vision_tower_lr", "unfreeze_mm_vision_tower": "tune_vision_tower"}

# What other commands of relook, and other trainers, call a key: an unknown key is told its name in a recipe.
OTHER_NAMES = {
    "model": "model_name_or_path",
    "out": "output_dir",
    "adapter": "adapter_name_or_path",
    "images": "image_folder",
    "data": "data_path (conversations), or vg_path with desc_data_path or pope_data_path (pairs)",
    "dtype": "bf16 or fp16",
    "device": "use_cpu",
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
}

# Reasons that several flags share.
_SCORES = "relook logs its own fields over the held-out pairs"
_SAME_LOGITS = "relook computes logits at the answers only"
_SAME_PRECISION = "held-out pairs are measured in the precision of training"
# Flags without effect, whatever their value, and why.
IGNORED = {
    # LLaVA's and HA-DPO's
    "lazy_preprocess": "images are read when they are needed",
    "is_multimodal": "each record says whether it has an image",
    "mpt_attn_impl": "it belongs to MPT models",
    "ignore_bias_buffers": "there are no such buffers",
    "log_freq": "the original does not use it, either: logging_steps decides",
    # transformers'
    "local_rank": "launchers pass it in the environment",
    "remove_unused_columns": "there are no such columns",
    "label_names": "there are no such columns",
    "length_column_name": "lengths are counted in tokens",
    "disable_tqdm": "relook's own bar shows on a terminal only",
    "use_cache": "training needs no generation cache",
    "use_liger_kernel": _SAME_LOGITS,
    "liger_kernel_config": _SAME_LOGITS,
    **dict.fromkeys(
        (
            *("prediction_loss_only", "include_for_metrics", "batch_eval_metrics", "eval_accumulation_steps"),
            *("eval_do_concat_batches", "eval_use_gather_object"),
        ),
        _SCORES,
    ),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), _SAME_PRECISION),
}

# Keys of the model's config (`relook.model.checkpoint.llava_settings`). A recipe may repeat them, but not change them.
MODEL_CONFIG_KEYS = {
    "mm_vision_select_layer": "int",
    "mm_vision_select_feature": "str",
    "mm_projector_type": "str",
    "mm_use_im_start_end": "bool",
    "mm_use_im_patch_token": "bool",
}

# Flags that ask for something that relook does in another way or not at all, and what to do about it.
UNSUPPORTED = {
    # LLaVA's and HA-DPO's
    "pretrain_mm_mlp_adapter": "Use adapter_name_or_path: it takes an mm_projector.bin.",
    "lora_weight_path": "The original reads it and does nothing with it. Use adapter_name_or_path.",
    "freeze_mm_mlp_adapter": "It trains with tune_mm_mlp_adapter, or in a full run; mm_projector_lr 0 freezes it.",
    "mm_vision_tower": "Use vision_tower.",
    "image_grid_pinpoints": "They are read from the model's config; leave it out.",
    "cache_dir": "Set HF_HOME, and give folders: relook downloads nothing.",
    "max_prompt_length": "Use model_max_length: it bounds the whole row, and nothing is cut.",
    "max_length": "Use model_max_length: it bounds the whole row, and nothing is cut.",
    "logging_dir": "transformers reads it from TENSORBOARD_LOGGING_DIR in the environment.",
    # transformers' keys without effect on relook's trainer
    "label_smoothing_factor": "Use loss_type robust and label_smoothing.",
    "average_tokens_across_devices": "A mean over tokens is one over those of all processes; leave it out.",
    "resume_from_checkpoint": "A run that is started again goes on from its last checkpoint; leave it out.",
    "train_sampling_strategy": "Use group_by_modality_length.",
    "do_train": "relook train trains; leave it out.",
    "do_eval": "Use eval_fraction and eval_strategy.",
    "do_predict": "Use relook eval.",
    "neftune_noise_alpha": "The reference would not have the noise; leave it out.",
    "include_num_input_tokens_seen": "Leave it out.",
    "optim_target_modules": "GaLore and APOLLO are not supported; leave it out.",
    **dict.fromkeys(
        (
            *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
            "hub_revision",
        ),
        "Use relook export and then hf upload.",
    ),
}

# Keys of UNSUPPORTED that are harmless if they only state what holds anyway: a test of the value, given all values.
_REGIMES = ("lora_enable", "tune_post_decoder", "tune_lm_head")
HARMLESS: dict[str, Callable[[Any, Values], Any]] = {
    **dict.fromkeys(
        (
            *("pretrain_mm_mlp_adapter", "lora_weight_path", "image_grid_pinpoints", "cache_dir", "do_eval"),
            *("do_predict", "push_to_hub", "neftune_noise_alpha", "optim_target_modules", "label_smoothing_factor"),
        ),
        lambda value, _: not value,
    ),
    **dict.fromkeys(("do_train", "average_tokens_across_devices"), lambda value, _: value is True),
    **dict.fromkeys(
        ("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
        lambda value, values: not value or not values.get("push_to_hub"),
    ),
    "resume_from_checkpoint": lambda value, _: value in (None, True),
    "train_sampling_strategy": lambda value, _: value == "random",
    "include_num_input_tokens_seen": lambda value, _: value in (False, "no"),
    "freeze_mm_mlp_adapter": lambda value, values: (
        not value or (any(map(values.get, _REGIMES)) and not values.get("tune_mm_mlp_adapter"))
    ),
}

# Values that YAML 1.1 reads as false where they are not quoted (`off`, `no`), by key.
FALSE_WORDS = {"feature_cache": "off", **dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "no")}

# relook's defaults of transformers' arguments, which differ from its own.
DEFAULTS = {
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # it hides NaN and inf losses, and syncs with the device at every step
    "report_to": "none",
    "save_strategy": "no",
    "save_total_limit": 2,
    "seed": 42,
}

# transformers' keys that take effect only under a condition. Each entry has the words for the unmet condition, its test
# and the keys. The test sees the recipe's values over relook's defaults.
CONDITIONAL: tuple[tuple[str, Callable[[Values], Any], tuple[str, ...]], ...] = (
    (
        "with cached trunk states",
        lambda values: not values.get("cached_trunk"),
        (
            *("gradient_checkpointing", "gradient_checkpointing_kwargs"),
            *("activation_checkpointing", "activation_checkpointing_kwargs"),
        ),
    ),
    (
        "without gradient_checkpointing",
        lambda values: values.get("gradient_checkpointing") or values.get("activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ),
    (
        "without eval_fraction: nothing is held out",
        lambda values: values.get("eval_fraction"),
        (
            *("per_device_eval_batch_size", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
            "load_best_model_at_end",
        ),
    ),
    ("without eval_strategy steps", lambda values: values.get("eval_strategy") == "steps", ("eval_steps",)),
    (
        "where no best step is looked for (load_best_model_at_end, save_strategy best)",
        lambda values: (
            values.get("load_best_model_at_end")
            or values["save_strategy"] == "best"
            or values.get("lr_scheduler_type") == "reduce_lr_on_plateau"
        ),
        ("metric_for_best_model", "greater_is_better"),
    ),
    ("without save_strategy steps", lambda values: values["save_strategy"] == "steps", ("save_steps",)),
    (
        "without a save_strategy",
        lambda values: values["save_strategy"] != "no",
        ("save_total_limit", "save_only_model", "save_on_each_node", "enable_jit_checkpoint"),
    ),
    ("without logging_strategy steps", lambda values: values["logging_strategy"] == "steps", ("logging_steps",)),
    (
        "without report_to",
        lambda values: values["report_to"] not in ("none", ["none"], []),
        ("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    ),
    (
        "without dataloader_num_workers",
        lambda values: values.get("dataloader_num_workers"),
        (
            *("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"),
            "dataloader_in_order",
        ),
    ),
    ("without fsdp", lambda values: values.get("fsdp"), ("fsdp_config",)),
    (
        "with an optimizer that is no Adam or Lion",
        lambda values: any(word in str(values.get("optim", "adamw")) for word in ("adam", "lion", "adema")),
        ("adam_beta1", "adam_beta2", "adam_epsilon"),
    ),
    (
        "with group_by_modality_length, which takes seed",
        lambda values: not values.get("group_by_modality_length"),
        ("data_seed",),
    ),
)
# Keys of CONDITIONAL for which false states what holds anyway.
FALSE_IS_DEFAULT = {
    *("eval_on_start", "load_best_model_at_end", "save_only_model", "save_on_each_node", "enable_jit_checkpoint"),
    *("dataloader_persistent_workers", "gradient_checkpointing", "activation_checkpointing"),
}
# Keys of CONDITIONAL that ask for something that would not happen; the others only say how something happens.
REQUESTS = {"eval_strategy", "eval_on_start", "load_best_model_at_end", "data_seed"}


def idle_keys(values: Values) -> dict[str, str]:
    """Find the transformers keys that have no effect given the other keys, each with the reason."""
    # Defaults decide a condition, but only keys that the user gave are reported.
    settings = {"logging_strategy": "steps", **DEFAULTS, **values}
    idle: dict[str, str] = {}
    for reason, condition, keys in CONDITIONAL:
        if not condition(settings):
            for key in keys:
                if values.get(key) not in (None, "no") and not (key in FALSE_IS_DEFAULT and not values[key]):
                    idle.setdefault(key, reason)  # the first unmet condition explains best
    return idle


def refused(values: Values) -> Iterator[RecipeError]:
    """Yield an error for each group of idle keys that ask for something that would not happen."""
    # Without a save_strategy transformers would save every save_steps; relook's default is not to save.
    requests = REQUESTS if "save_strategy" in values else REQUESTS | {"save_steps"}
    by_reason: dict[str, list[str]] = {}
    for key, reason in idle_keys(values).items():
        if key in requests:
            by_reason.setdefault(reason, []).append(key)
    for reason, keys in by_reason.items():
        yield RecipeError(f"{preview(keys)} would have no effect {reason}.", "Change that, or leave it out.")


def renamed(values: Values) -> dict[str, Any]:
    """Rename old keys to their current names.

    Raises:
        RecipeError: a key is given under both names with different values, or warmup_ratio is not a share.
    """
    current = {key: value for key, value in values.items() if key not in RENAMED}
    for key, name in RENAMED.items():
        if key not in values:
            continue
        value = values[key]
        if key == "warmup_ratio" and not _is_share(value):
            raise RecipeError(f"warmup_ratio is {value!r}, not a share of the steps.", "Give 0 to below 1.")
        if (current.get(name) or value) != value:  # with warmup_steps 0, transformers uses warmup_ratio
            raise RecipeError(f"{key} is {value!r}, {name} is {current[name]!r}: one setting.", "Leave one out.")
        current[name] = value
    return current


def _is_share(value: Any) -> bool:
    try:
        return 0 <= float(value) < 1
    except (TypeError, ValueError):
        return False


def check_model_settings(stated: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Check that a recipe's model settings agree with the model's config.

    Args:
        stated: settings in the recipe, by key.
        config: settings in the model's config, by key.

    Raises:
        RecipeError: a setting differs.
    """
    for key, value in stated.items():
        if value != config[key]:
            raise RecipeError(
                f"{key} is {value!r}, but the model's config says {config[key]!r}, as it was trained.",
                "Leave it out, or give the model that you mean.",
            )
