"""HA-DPO's and LLaVA's flags: each is taken, checked against the model, or refused with what to use."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from transformers.integrations import integration_utils

from relook import load_model
from relook.errors import Mistakes, RecipeError
from relook.flags import (
    CONDITIONAL,
    FALSE_IS_DEFAULT,
    HARMLESS,
    IGNORED,
    MODEL_CONFIG_KEYS,
    RENAMED,
    REQUESTS,
    UNSUPPORTED,
    check_model_settings,
)
from relook.model.checkpoint import llava_settings, read_config
from relook.recipe import Recipe, build_recipe, load_recipe, parse_overrides
from relook.train.run import effective_arguments, training_arguments

DPO = {"task": "dpo", "model_name_or_path": "m", "output_dir": "o", "vg_path": "v", "pope_data_path": "p"}
SFT = {"task": "sft", "model_name_or_path": "m", "output_dir": "o", "data_path": "d", "image_folder": "i"}

# The flags that HA-DPO's train_dpo.py (commit abdc44b) and LLaVA's train.py define.
ORIGINAL = """
model_name_or_path version freeze_backbone tune_mm_mlp_adapter vision_tower mm_vision_select_layer
pretrain_mm_mlp_adapter mm_projector_type mm_use_im_start_end mm_use_im_patch_token mm_vision_select_feature vg_path
desc_data_path pope_data_path data_path lazy_preprocess is_multimodal image_folder image_aspect_ratio
image_grid_pinpoints cache_dir optim remove_unused_columns freeze_mm_mlp_adapter mpt_attn_impl model_max_length
double_quant quant_type bits lora_enable lora_r lora_alpha lora_dropout lora_weight_path lora_bias mm_projector_lr
group_by_modality_length beta learning_rate lr_scheduler_type warmup_steps weight_decay optimizer_type max_grad_norm
per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps gradient_checkpointing
ddp_find_unused_parameters max_prompt_length max_length max_steps logging_steps save_steps evaluation_strategy
eval_steps output_dir log_freq deepspeed bf16 fp16 num_train_epochs save_strategy save_total_limit warmup_ratio tf32
dataloader_num_workers fsdp local_rank seed report_to run_name ignore_bias_buffers
"""
# The command of HA-DPO's README, but for the launcher and the paths.
COMMAND = """
--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 0 --deepspeed zero3.json --model_name_or_path llava
--version v1 --vg_path VG --desc_data_path desc_data.json --pope_data_path pope_data.json --vision_tower
openai/clip-vit-large-patch14-336 --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 --mm_use_im_start_end
False --mm_use_im_patch_token False --image_aspect_ratio pad --group_by_modality_length True --bf16 True --output_dir
out --num_train_epochs 1 --per_device_train_batch_size 16 --per_device_eval_batch_size 4 --gradient_accumulation_steps
1 --evaluation_strategy no --save_strategy steps --save_steps 50000 --save_total_limit 1 --learning_rate 2e-6
--weight_decay 0. --warmup_steps 0 --lr_scheduler_type cosine --logging_steps 1 --tf32 True --model_max_length 2048
--gradient_checkpointing True --dataloader_num_workers 4 --lazy_preprocess True --report_to wandb --run_name
llava-v1.5 --beta 0.1
"""
# Arguments of transformers that do something whenever they are given, some of them under several processes only.
EFFECTIVE = """
per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
optim optim_args weight_decay gradient_accumulation_steps max_grad_norm bf16 fp16 tf32
torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
auto_find_batch_size logging_strategy logging_first_step log_on_each_node logging_nan_inf_filter log_level
log_level_replica report_to save_strategy ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed
use_cpu accelerator_config parallelism_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp
deepspeed debug skip_memory_metrics
"""


def test_hadpos_command_is_taken() -> None:
    words = COMMAND.split()
    recipe = load_recipe("hadpo-lora", parse_overrides(words))
    shipped = load_recipe("hadpo-lora", {**DPO, "desc_data_path": "desc_data.json", "pope_data_path": "pope_data.json"})
    given = set(parse_overrides(words)) - {"model_name_or_path", "output_dir", "vg_path", "vision_tower"}
    same = {key for key in given if hasattr(recipe, key) and getattr(recipe, key) == getattr(shipped, key)}
    # What the shipped recipe leaves out on purpose; the page says why.
    assert given & {f.name for f in dataclasses.fields(Recipe)} - same == {
        "group_by_modality_length",
        "mm_projector_lr",
    }
    for key, value in shipped.training.items():
        if (
            key in recipe.training and key != "warmup_steps"
        ):  # there the script's own default, warmup_ratio 0.03, counts
            assert recipe.training[key] == value
    assert recipe.of_the_model.keys() < MODEL_CONFIG_KEYS.keys()
    assert recipe.idle.keys() == {"lazy_preprocess", "per_device_eval_batch_size"}
    assert "per_device_eval_batch_size" not in recipe.to_yaml()
    here = {key: value for key, value in recipe.training.items() if key not in ("deepspeed", "report_to")}
    assert training_arguments(replace(recipe, training=here), Path("out")).save_steps == 50000  # tf32 or not
    with pytest.raises(RecipeError, match="eval_strategy would have no effect without eval_fraction"):
        load_recipe("hadpo-lora", parse_overrides([*words, "--evaluation_strategy", "steps"]))


def test_all_faults_of_a_command_are_named_at_once() -> None:
    odd = ["--learning_rat", "1", "--max_length", "7", "--seed", "x", "--evaluation_strategy", "steps", "--beta", "-1"]
    with pytest.raises(Mistakes) as caught:
        load_recipe("hadpo-lora", parse_overrides([*COMMAND.split(), *odd]))
    named = [error.problem for error in caught.value.errors]
    for what in ("'learning_rat'", "max_length would", "seed is 'x'", "eval_strategy would", "beta is -1"):
        assert sum(what in line for line in named) == 1, named
    assert len(named) == 5


@pytest.mark.parametrize("flag", IGNORED)
@pytest.mark.parametrize("value", [True, False, 3, "x"])
def test_what_changes_nothing_is_taken_and_named(flag: str, value: Any) -> None:
    recipe = build_recipe({**DPO, flag: value})
    assert recipe == build_recipe(DPO)
    assert recipe.idle == {flag: IGNORED[flag]}
    assert flag not in recipe.to_yaml()


@pytest.mark.parametrize(
    ("keys", "fine"),
    [
        ({"push_to_hub": False, "hub_strategy": "every_save"}, True),
        ({"push_to_hub": True, "hub_strategy": "every_save"}, False),
        ({"do_train": True, "do_eval": False, "do_predict": False}, True),
        ({"do_train": False}, False),
        ({"label_smoothing_factor": 0.0, "neftune_noise_alpha": None}, True),
        ({"label_smoothing_factor": 0.1}, False),
        ({"resume_from_checkpoint": True}, True),
        ({"resume_from_checkpoint": "checkpoint-3"}, False),
        ({"tune_lm_head": True, "freeze_mm_mlp_adapter": True}, True),
        ({"freeze_mm_mlp_adapter": True}, False),  # in a full run it would train
        ({"lora_weight_path": ""}, True),
    ],
    ids=str,
)
def test_what_is_so_anyway_may_be_said(keys: dict[str, Any], fine: bool) -> None:
    if fine:
        assert build_recipe({**DPO, **keys}).idle.keys() >= keys.keys() - {"tune_lm_head"}
    else:
        with pytest.raises(RecipeError, match="would have no effect"):
            build_recipe({**DPO, **keys})


def test_keys_under_their_old_names() -> None:
    """transformers 4's and HA-DPO's, over a recipe that has the new ones."""
    recipe = load_recipe("head", {**DPO, "warmup_ratio": 0.1, "optimizer_type": "adamw_torch"})
    assert (recipe.training["warmup_steps"], recipe.training["optim"]) == (0.1, "adamw_torch")
    # As transformers 4 had it: of no warm-up steps the share counts.
    assert build_recipe({**DPO, "warmup_steps": 0, "warmup_ratio": 0.1}).training["warmup_steps"] == 0.1
    with pytest.raises(RecipeError, match=r"warmup_ratio is 0\.1, warmup_steps is 5: one setting"):
        build_recipe({**DPO, "warmup_steps": 5, "warmup_ratio": 0.1})
    with pytest.raises(RecipeError, match="warmup_ratio is 3, not a share"):
        build_recipe({**DPO, "warmup_ratio": 3})


def test_every_argument_of_transformers_has_its_class() -> None:
    """A version with a new one needs a decision: does it do anything here?"""
    classes = (
        UNSUPPORTED,
        IGNORED,
        EFFECTIVE.split(),
        {key for _, _, keys in CONDITIONAL for key in keys},
        {"output_dir"},
    )
    for field in dataclasses.fields(TrainingArguments):
        assert sum(field.name in members for members in classes) == 1, field.name


THEIRS = {field.name for field in dataclasses.fields(TrainingArguments)}


@pytest.mark.parametrize(
    ("where", "key"), [(where, key) for where, _, keys in CONDITIONAL for key in keys if key in THEIRS]
)
def test_what_another_key_switches_on(where: str, key: str) -> None:
    """A key that says how is taken and named; one that asks for what would not happen is refused."""
    value: Any = True if key in (*FALSE_IS_DEFAULT, "greater_is_better", "dataloader_in_order") else 1
    keys: dict[str, Any] = {"lora_enable": True, key: value}
    keys |= {
        "with an optimizer that is no Adam or Lion": {"optim": "sgd"},
        "with group_by_modality_length, which takes seed": {"group_by_modality_length": True},
        "without logging_strategy steps": {"logging_strategy": "epoch"},
        "without eval_strategy steps": {"eval_fraction": 0.5},
        "without dataloader_num_workers": {"dataloader_num_workers": 0},
        "with cached trunk states": {"lora_enable": False, "tune_lm_head": True},
    }.get(where, {})
    if key in REQUESTS or key == "save_steps":
        with pytest.raises(RecipeError, match=f"{key} would have no effect {re.escape(where)}"):
            build_recipe({**DPO, **keys})
    else:
        recipe = build_recipe({**DPO, **keys})
        assert recipe.idle == {key: where}
        assert key not in recipe.training


def test_steps_that_are_not_saved() -> None:
    """transformers saves by default, relook does not: that must be said."""
    assert "save_steps" in build_recipe({**DPO, "save_strategy": "no", "save_steps": 5}).idle


def test_what_is_switched_on_is_taken() -> None:
    keys: dict[str, Any] = {"eval_fraction": 0.5, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps"}
    keys |= {"load_best_model_at_end": True, "metric_for_best_model": "nll", "save_steps": 2, "save_total_limit": 1}
    keys |= {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2, "report_to": "wandb", "run_name": "a"}
    keys |= {"fsdp": True, "fsdp_config": {"cpu_offload": True}, "lora_enable": True, "gradient_checkpointing": True}
    keys |= {"gradient_checkpointing_kwargs": {"use_reentrant": False}, "adam_beta2": 0.95, "data_seed": 3}
    keys |= {"dataloader_persistent_workers": False}
    assert build_recipe({**DPO, **keys}).training.keys() >= keys.keys() - {"eval_fraction", "lora_enable"}


def test_workers_are_there_by_default_where_a_device_is() -> None:
    """A recipe for a GPU may rely on them; on a CPU they say nothing."""
    recipe = build_recipe({**DPO, "lora_enable": True, "dataloader_prefetch_factor": 4})
    assert recipe.training["dataloader_prefetch_factor"] == 4
    assert ("dataloader_prefetch_factor" in effective_arguments(recipe)[1]) == (not torch.accelerator.is_available())
    training_arguments(recipe, Path("out"))
    cached = build_recipe({**DPO, "tune_lm_head": True, "dataloader_prefetch_factor": 4})
    assert "dataloader_prefetch_factor" in cached.idle


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"report_to": "wandb"}, "wandb to be installed"),
        ({"report_to": "nobody"}, "nobody is not supported"),
        ({"optim": "schedule_free_adamw"}, "schedulefree"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr or min_lr_rate should be set"),
        ({"lr_scheduler_type": "sometimes"}, "sometimes is not a valid SchedulerType"),
    ],
)
def test_what_the_trainer_would_miss_is_said_before_anything_runs(
    keys: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes loggers, optimizer and schedule after the pass over the trunk and the references."""
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(RecipeError, match=f"(?s)arguments do not fit together: .*{message}.* Correct them"):
        training_arguments(build_recipe({**DPO, "tune_lm_head": True, **keys}), Path("out"))


def test_words_that_yaml_reads_as_false() -> None:
    words = ["--feature_cache", "off", "--save_strategy", "no", "--tune_lm_head", "true"]
    recipe = build_recipe({**DPO, **parse_overrides(words)})
    assert (recipe.feature_cache, recipe.training["save_strategy"]) == ("off", "no")


def test_every_flag_has_its_place_and_its_line_in_the_page() -> None:
    page = (Path(__file__).parents[1] / "docs" / "coming-from-hadpo.md").read_text(encoding="utf-8")
    ours = {field.name for field in dataclasses.fields(Recipe)}
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    for flag in ORIGINAL.split():
        places = [flag in ours, flag in IGNORED, flag in MODEL_CONFIG_KEYS, flag in UNSUPPORTED, flag in RENAMED]
        assert sum(places) == 1 or (sum(places) == 0 and flag in theirs), flag
        assert f"`{flag}`" in page, flag
        assert ("error" in next(line for line in page.splitlines() if f"`{flag}`" in line and line[0] == "|")) or (
            flag not in UNSUPPORTED
        ), flag
    assert not ours & (UNSUPPORTED.keys() | IGNORED.keys() | MODEL_CONFIG_KEYS.keys() | RENAMED.keys())


@pytest.mark.parametrize("flag", [key for key in UNSUPPORTED if not (key in HARMLESS and HARMLESS[key]("x", {}))])
def test_flags_without_effect_say_what_to_use(flag: str) -> None:
    with pytest.raises(RecipeError) as caught:
        build_recipe({**DPO, flag: "x"})
    assert caught.value.problem == f"{flag} would have no effect."
    assert caught.value.fix == UNSUPPORTED[flag]


def test_what_the_model_says_is_checked(base: Path, tiny: Path) -> None:
    """liuhaotian's own config is the reference of the names."""
    folder = tiny / "ckpt_safetensors"
    raw = read_config(folder)
    found = llava_settings(
        load_model(folder, vision_tower=tiny / "vision_towers" / raw["mm_vision_tower"]).model.config
    )
    assert found.keys() == MODEL_CONFIG_KEYS.keys()
    assert {key: raw.get(key, found[key]) for key in found} == found
    assert len(raw.keys() & found.keys()) >= 4
    said = {key: found[key] for key in ("mm_projector_type", "mm_use_im_start_end")}
    recipe = build_recipe({**DPO, **said})
    assert recipe.of_the_model == said
    check_model_settings(recipe.of_the_model, found)
    wrong: dict[str, Any] = {"mm_projector_type": "linear", "mm_vision_select_feature": "cls_patch"}
    for key, value in wrong.items():
        with pytest.raises(RecipeError, match=f"{key} is '{value}', but the model's config says '{found[key]}'"):
            check_model_settings({key: value}, found)
    with pytest.raises(RecipeError, match="mm_vision_select_layer is 'last', but must be of type int"):
        build_recipe({**DPO, "mm_vision_select_layer": "last"})


def test_what_is_said_of_the_model_is_saved(tmp_path: Path) -> None:
    recipe = build_recipe({**DPO, "mm_vision_select_layer": -2, "seed": 3})
    recipe.save(tmp_path / "r.yaml")
    assert load_recipe(str(tmp_path / "r.yaml")) == recipe


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lora_r": 8}, "lora_r would have no effect without lora_enable"),
        ({"use_dora": True, "lora_dropout": 0.1}, "lora_dropout, use_dora would have no effect without lora_enable"),
        ({"lora_target_modules": ["q_proj"]}, "without lora_enable"),
        ({"post_decoder_lr": 1e-4}, "post_decoder_lr would have no effect without tune_post_decoder"),
        ({"post_decoder.depth": 2}, "post_decoder would have no effect without tune_post_decoder"),
        ({"lora_enable": True, "mm_projector_lr": 1e-5}, "mm_projector_lr would have no effect without tune_mm_mlp"),
        ({"lora_enable": True, "lm_head_lr": 1e-5}, "lm_head_lr would have no effect without tune_lm_head"),
        ({"image_folder": "x"}, "image_folder would have no effect without task sft"),
        (
            {"lora_enable": True, "gradient_checkpointing": True, "activation_memory_budget": 0.5},
            "activation_memory_bud",
        ),
        ({"tune_lm_head": True, "freeze_backbone": True, "activation_memory_budget": 0.5}, "with cached trunk states"),
        ({"quant_type": "fp4"}, "quant_type would have no effect without bits 4"),
        ({"lora_enable": True, "lora_r": 0}, "lora_r 0, .* make no LoRA"),
        ({"lora_enable": True, "lora_dropout": 1.0}, "lora_dropout 1.0 make no LoRA"),
        (
            {"lora_enable": True, "lora_target_modules": "q_proj"},
            r"lora_target_modules is 'q_proj'.*\[q_proj, v_proj\]",
        ),
        ({"lora_enable": True, "lora_bias": "some"}, "lora_bias is 'some'. It must be one of none, lora_only, all"),
    ],
    ids=str,
)
def test_a_key_that_nothing_switches_on_is_an_error(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_recipe({**DPO, **keys})


def test_a_key_of_the_other_task_is_an_error() -> None:
    with pytest.raises(RecipeError, match="vg_path would have no effect without task dpo"):
        build_recipe({**SFT, "vg_path": "v"})


def test_rates_of_what_trains_and_rates_of_zero_are_taken() -> None:
    assert build_recipe({**DPO, "mm_projector_lr": 1e-5, "lm_head_lr": 1e-6}).full
    recipe = build_recipe({**DPO, "lora_enable": True, "mm_projector_lr": 0})
    assert recipe.mm_projector_lr == 0
    parsed = parse_overrides(["--lora_target_modules", "[q_proj, v_proj]"])
    assert build_recipe({**DPO, "lora_enable": True, **parsed}).lora_target_modules == ["q_proj", "v_proj"]
