"""Flags of HA-DPO's and LLaVA's command lines, and of transformers', that are no settings of a relook run.

A flag that says what relook does anyway, or what it reads from the model, is taken if it says the same and refused if
not. Every other flag that would change nothing is an error that says what to use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from relook.errors import RecipeError, some

# What relook does; a recipe may say so, and cannot say otherwise.
FIXED: dict[str, Any] = {"lazy_preprocess": True, "is_multimodal": True, "remove_unused_columns": False}

# What the model's config says (`formats.llava_settings`); a recipe may say so, and is refused where they differ.
OF_THE_MODEL = {
    "mm_vision_select_layer": "int",
    "mm_vision_select_feature": "str",
    "mm_projector_type": "str",
    "mm_use_im_start_end": "bool",
    "mm_use_im_patch_token": "bool",
}

_SCORES = "relook logs its own fields over the held-out pairs; leave it out."
INSTEAD = {
    # LLaVA's and HA-DPO's
    "pretrain_mm_mlp_adapter": "Use adapter_name_or_path: it takes an mm_projector.bin.",
    "lora_weight_path": "The original reads it and does nothing with it. Use adapter_name_or_path.",
    "freeze_mm_mlp_adapter": "It trains with tune_mm_mlp_adapter, and in a full run, where mm_projector_lr 0 holds it.",
    "mm_vision_tower": "Use vision_tower.",
    "image_grid_pinpoints": "They are read from the model's config; leave it out.",
    "mpt_attn_impl": "MPT models are not supported; leave it out.",
    "cache_dir": "Set HF_HOME, and give folders: relook downloads nothing.",
    "optimizer_type": "Use optim.",
    "max_prompt_length": "Use model_max_length: it bounds the whole row, and nothing is cut.",
    "max_length": "Use model_max_length: it bounds the whole row, and nothing is cut.",
    "log_freq": "Use logging_steps.",
    "ignore_bias_buffers": "There are no such buffers; leave it out.",
    # transformers', renamed since
    "evaluation_strategy": "transformers calls it eval_strategy.",
    "logging_dir": "transformers reads it from TENSORBOARD_LOGGING_DIR in the environment.",
    "warmup_ratio": "transformers takes it as warmup_steps: a number below 1 is a share of all steps.",
    # transformers', without effect on relook's trainer
    "label_smoothing_factor": "Use loss_type robust and label_smoothing.",
    "average_tokens_across_devices": "A mean over tokens is one over those of all processes; leave it out.",
    "resume_from_checkpoint": "A run that is started again goes on from its last checkpoint; leave it out.",
    "train_sampling_strategy": "Use group_by_modality_length.",
    "length_column_name": "Lengths are counted in tokens; leave it out.",
    "label_names": "Leave it out.",
    "do_train": "relook train trains; leave it out.",
    "do_predict": "Use relook eval.",
    "prediction_loss_only": _SCORES,
    "include_for_metrics": _SCORES,
    "batch_eval_metrics": _SCORES,
    "eval_accumulation_steps": _SCORES,
    "eval_do_concat_batches": _SCORES,
    "eval_use_gather_object": _SCORES,
    "bf16_full_eval": "The held-out pairs are measured in the precision of training; leave it out.",
    "fp16_full_eval": "The held-out pairs are measured in the precision of training; leave it out.",
    "disable_tqdm": "relook has a bar of its own, which shows on a terminal only; leave it out.",
    "use_liger_kernel": "relook computes logits at the answers only; leave it out.",
    "liger_kernel_config": "relook computes logits at the answers only; leave it out.",
    "neftune_noise_alpha": "The reference would not have the noise; leave it out.",
    "include_num_input_tokens_seen": "Leave it out.",
    "do_eval": "Use eval_fraction and eval_strategy.",
    "use_cache": "Training needs no generation cache; leave it out.",
    "local_rank": "torchrun says it by LOCAL_RANK; start DeepSpeed's launcher with --no_local_rank.",
    "optim_target_modules": "GaLore and APOLLO are not supported; leave it out.",
    **dict.fromkeys(
        (
            *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
            "hub_revision",
        ),
        "Use relook export and then hf upload.",
    ),
}

WORDS = {"feature_cache": "off", **dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), "no")}
"""Values that YAML reads as false where they are not quoted."""

# transformers' keys that another one switches on: what is missing, whether it is there, and the keys. A recipe's values
# are looked at with relook's defaults under them.
DEFAULTS = {"save_strategy": "no", "logging_strategy": "steps", "report_to": "none"}
SWITCHED: tuple[tuple[str, Callable[[Mapping[str, Any]], Any], tuple[str, ...]], ...] = (
    (
        "without gradient_checkpointing",
        lambda said: said.get("gradient_checkpointing") or said.get("activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ),
    (
        "without eval_fraction: nothing is held out",
        lambda said: said.get("eval_fraction"),
        (
            *("per_device_eval_batch_size", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start"),
            "load_best_model_at_end",
        ),
    ),
    ("without eval_strategy steps", lambda said: said.get("eval_strategy") == "steps", ("eval_steps",)),
    (
        "where no best step is looked for (load_best_model_at_end, save_strategy best)",
        lambda said: (
            said.get("load_best_model_at_end")
            or said["save_strategy"] == "best"
            or said.get("lr_scheduler_type") == "reduce_lr_on_plateau"
        ),
        ("metric_for_best_model", "greater_is_better"),
    ),
    ("without save_strategy steps", lambda said: said["save_strategy"] == "steps", ("save_steps",)),
    (
        "without a save_strategy",
        lambda said: said["save_strategy"] != "no",
        ("save_total_limit", "save_only_model", "save_on_each_node", "enable_jit_checkpoint"),
    ),
    ("without logging_strategy steps", lambda said: said["logging_strategy"] == "steps", ("logging_steps",)),
    (
        "without report_to",
        lambda said: said["report_to"] not in ("none", ["none"], []),
        ("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    ),
    (
        "without dataloader_num_workers",
        lambda said: said.get("dataloader_num_workers"),
        (
            *("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"),
            "dataloader_in_order",
        ),
    ),
    ("without fsdp", lambda said: said.get("fsdp"), ("fsdp_config",)),
    (
        "with an optimizer that is no Adam or Lion",
        lambda said: any(word in str(said.get("optim", "adamw")) for word in ("adam", "lion", "adema")),
        ("adam_beta1", "adam_beta2", "adam_epsilon"),
    ),
    (
        "with group_by_modality_length, which takes seed",
        lambda said: not said.get("group_by_modality_length"),
        ("data_seed",),
    ),
)
# Of those, the ones whose false says what is so anyway.
OFF = {
    *("eval_on_start", "load_best_model_at_end", "save_only_model", "save_on_each_node", "enable_jit_checkpoint"),
    "dataloader_persistent_workers",
}


def check_switched(said: Mapping[str, Any]) -> None:
    """Raise a RecipeError where a key of transformers says something that the other keys leave without effect."""
    given = {**DEFAULTS, **said}
    for where, on, keys in SWITCHED:
        idle = [key for key in keys if said.get(key) not in (None, "no") and not (key in OFF and not said[key])]
        if idle and not on(given):
            raise RecipeError(f"{some(idle)} would have no effect {where}.", "Change that, or leave it out.")


def check_fixed(key: str, value: Any) -> None:
    """Raise a RecipeError where a flag asks for another thing than relook does."""
    if value != FIXED[key]:
        raise RecipeError(f"{key} is {value!r}, but relook does as {FIXED[key]} says.", "Leave it out.")


def check_model(said: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise a RecipeError where a recipe says another thing of the model than its config does."""
    for key, value in said.items():
        if value != found[key]:
            raise RecipeError(
                f"{key} is {value!r}, but the model's config says {found[key]!r}, and the model was trained so.",
                "Leave it out, or give the model that you mean.",
            )
