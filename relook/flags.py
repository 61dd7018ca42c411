"""Flags of HA-DPO's and LLaVA's command lines, and of transformers', that are no settings of a relook run.

A flag that says what relook does anyway, or what it reads from the model, is taken if it says the same and refused if
not. Every other flag that would change nothing is an error that says what to use.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from relook.errors import RecipeError

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
}


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
