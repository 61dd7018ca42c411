"""Recipes: what is read, what is refused, and that a saved one says the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from relook.errors import RecipeError
from relook.recipe import (
    Recipe,
    build_recipe,
    load_recipe,
    parse_overrides,
    read_yaml_or_shipped,
    shipped_names,
    training_keys,
)

DPO = {"task": "dpo", "model_name_or_path": "m", "output_dir": "o", "vg_path": "v", "pope_data_path": "p"}
SFT = {"task": "sft", "model_name_or_path": "m", "output_dir": "o", "data_path": "d", "image_folder": "i"}


@pytest.mark.parametrize("name", shipped_names("recipe"))
def test_shipped_recipes_load_with_the_users_paths(name: str) -> None:
    recipe = load_recipe(name, SFT if read_yaml_or_shipped(name, "recipe")["task"] == "sft" else DPO)
    assert (recipe.model_name_or_path, recipe.output_dir) == ("m", "o")
    assert recipe.full == (name in ("toyworld-base", "llava-sft", "mpo", "rlaif-v"))
    trained = ("toyworld-base", "llava-sft", "mpo", "toyworld-lora", "hadpo-lora", "sentinel", "rlaif-v", "opa-dpo")
    assert recipe.frozen_trunk == (name not in trained)
    assert isinstance(recipe.training["learning_rate"], float)


def test_the_control_differs_in_the_preference_term_alone() -> None:
    pair = [load_recipe(name, DPO) for name in ("toyworld-post-decoder", "toyworld-nll-control")]
    first, second = map(dataclasses.asdict, pair)
    assert {key for key in first if first[key] != second[key]} == {"dpo_weight"}
    assert second["dpo_weight"] == 0


def test_a_shipped_recipe_without_paths_says_what_is_missing() -> None:
    with pytest.raises(RecipeError, match=r"sets no model_name_or_path.*--model_name_or_path"):
        load_recipe("toyworld-head")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("toyworld-hed", "Did you mean toyworld-head"),
        ("nothing like it", "one of hadpo-lora, head"),
        ("no/such.yaml", "no recipe file no/such.yaml"),
    ],
)
def test_no_such_recipe(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(name)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "not valid YAML"), ("- a", "not a mapping"), ("", "not a mapping")]
)
def test_a_file_that_is_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(tmp_path / "r.yaml"))


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rat", "learning_rate"),
        ("tune_lmhead", "tune_lm_head"),
        ("betta", "beta"),
        ("post_decodr", "post_decoder"),
    ],
)
def test_an_unknown_key_gets_a_suggestion(key: str, meant: str) -> None:
    with pytest.raises(RecipeError, match=f"no recipe key '{key}'. Did you mean {meant}"):
        build_recipe({**DPO, key: 1})


def test_a_key_that_is_no_word_is_unknown_too() -> None:
    with pytest.raises(RecipeError, match="no recipe key 1"):
        build_recipe({**DPO, 1: 1})  # type: ignore[dict-item]


def test_a_key_like_no_other_points_to_the_list() -> None:
    with pytest.raises(RecipeError, match=r"RECIPE --help` and docs/recipes\.md"):
        build_recipe({**DPO, "xyzzy": 1})


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("beta", "much", "float"),
        ("lora_r", 2.5, "int"),
        ("lora_r", "many", "int"),
        ("tune_lm_head", "yes please", "bool"),
        ("tune_lm_head", 1, "bool"),
        ("lora_r", True, "int"),
        ("beta", False, "float"),
        ("per_device_train_batch_size", "four", "int"),
        ("learning_rate", [1], "float"),
        ("post_decoder", 3, "mapping"),
        ("post_decoder", "depth", "mapping"),
        ("lm_head_lr", "slow", "float"),
        ("beta", None, "float"),
        ("vg_path", None, "str"),
        ("lora_r", float("inf"), "finite"),
        ("beta", "nan", "finite"),
        ("learning_rate", float("inf"), "finite"),
        ("max_grad_norm", "inf", "finite"),
        ("loss_type", {"sigmoid": float("inf")}, "finite"),
        ("lr_scheduler_kwargs", {"min_lr": float("nan")}, "finite"),
        ("post_decoder.mlp_size", float("nan"), "finite"),
        ("post_decoder.depth", "two", "int"),
        ("post_decoder.align", None, "str"),
    ],
)
def test_a_value_of_the_wrong_type(key: str, value: Any, kind: str) -> None:
    with pytest.raises(RecipeError, match=f"{key} is .*{kind}"):
        build_recipe({**DPO, key: value})


def test_training_arguments_are_those_that_transformers_has() -> None:
    """relook reads them from its source, without importing it."""
    assert [*training_keys()] == [field.name for field in dataclasses.fields(TrainingArguments)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"task": "ppo"}, "task is 'ppo'. It must be one of sft, dpo"),
        ({"dpo_tokens": "some"}, "dpo_tokens"),
        ({"on_bad": "ignore"}, "on_bad"),
        ({"feature_cache": "tape"}, "feature_cache"),
        ({"vg_path": ""}, "sets no vg_path"),
        ({"pope_data_path": ""}, "no preference pairs"),
        ({"output_dir": ""}, "sets no output_dir"),
        ({"dpo_weight": 0.0}, "there is no loss"),
        ({"dpo_weight": -1.0}, "dpo_weight is -1.0"),
        ({"mdpo_anchored_weight": -0.1}, "mdpo_anchored_weight is -0.1"),
        ({"loss_type": "ppo"}, "It must be one of sigmoid, ipo, hinge, robust, simpo, orpo"),
        ({"loss_type": {"sigmoid": 1, "ppo": 1}}, "loss_type is .* It must be one of sigmoid"),
        ({"loss_type": {"sigmoid": 1, "kto": 1}}, "loss_type kto rates single answers"),
        ({"loss_type": "kto", "nll_weight": 1}, "nll_weight would have no effect with loss_type kto"),
        ({"desirable_weight": 2}, "desirable_weight would have no effect without loss_type kto"),
        ({"loss_type": {"sigmoid": 0}}, "Give each loss a weight above 0"),
        ({"unchanged_weight": 0.2}, "unchanged_weight would have no effect without dpo_tokens differing"),
        ({"ld_alpha": 1.5}, "ld_alpha is 1.5. Give 0 to 1"),
        ({"loss_type": "sigmoid_norm", "ld_alpha": 0.5}, "ld_alpha would have no effect with loss_type sigmoid_norm"),
        ({"mdpo_anchored_weight": 1, "ld_alpha": 0.5}, "ld_alpha would have no effect beside mDPO"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "label_smoothing is 0.5, a share"),
        ({"label_smoothing": 0.1}, "label_smoothing would have no effect without loss_type robust"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing would have no effect"),
        (
            {"loss_type": "robust", "label_smoothing": 0.1, "dpo_weight": 0, "nll_weight": 1},
            "label_smoothing would have no",
        ),
        ({"simpo_gamma": 1.0}, "simpo_gamma would have no effect without loss_type simpo"),
        ({"loss_type": "simpo", "dpo_tokens": "differing"}, "dpo_tokens would have no effect with loss_type simpo"),
        ({"loss_type": "ipo", "dpo_tokens": "differing"}, "dpo_tokens would have no effect with loss_type ipo"),
        ({"loss_type": "orpo"}, "ORPO is its odds-ratio term and a supervised one. Set nll_weight"),
        (
            {"loss_type": "orpo", "nll_weight": 1, "mdpo_anchored_weight": 1},
            "mdpo_anchored_weight would have no effect with",
        ),
        (
            {"loss_type": "ipo", "mdpo_conditional_weight": 1},
            "mdpo_conditional_weight would have no effect with loss_type ipo",
        ),
        ({"mdpo_anchor": 0.5}, "mdpo_anchor would have no effect without mdpo_anchored_weight"),
        ({"mdpo_conditional_weight": 1, "mdpo_anchor": 0.5}, "mdpo_anchor would have no effect"),
        ({"mdpo_anchored_weight": 1, "dpo_tokens": "differing"}, "dpo_tokens would have no effect beside mDPO"),
        ({"mdpo_conditional_weight": 1, "tune_lm_head": True}, "trunk cache has no states of corrupted images"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor would have no effect. Use loss_type robust"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"learning_rate": -1e-5}, "learning_rate is -1e-05. Give 0 or more"),
        ({"tune_lm_head": True, "lm_head_lr": -0.1}, "lm_head_lr is -0.1. Give 0 or more"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0. Give 1 or more"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ({"model_max_length": -1}, "model_max_length is -1"),
        ({"num_train_epochs": 0}, "num_train_epochs is 0.0. Give a number above 0"),
        ({"max_steps": 0}, "max_steps is 0. Give 1 or more, or leave it out"),
        ({"save_strategy": "steps", "save_steps": 0}, "save_steps is 0"),
        ({"seed": -1}, "seed is -1. Give 0 to below 2"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"freeze_backbone": True}, "nothing else trains"),
        ({"freeze_backbone": True, "lora_enable": True, "tune_lm_head": True}, "contradict"),
        ({"post_decoder": {"depht": 2}}, "Its keys are depth"),
        ({"post_decoder": {"attention": "all"}}, "attention"),
        ({"post_decoder": {"depth": 0}}, "depth"),
        ({"post_decoder.depth": -1}, "depth"),
        ({"post_decoder.depht": 2}, "Its keys are depth"),
    ],
)
def test_keys_that_do_not_go_together(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_recipe({**DPO, **keys})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss_type", "ipo"),
        ("beta", 0.2),
        ("dpo_weight", 0.5),
        ("nll_weight", 1.0),
        ("nll_length_power", 1.0),
        ("dpo_tokens", "differing"),
        ("label_smoothing", 0.1),
        ("simpo_gamma", 1.0),
        ("mdpo_conditional_weight", 1.0),
        ("mdpo_anchored_weight", 1.0),
        ("mdpo_anchor", 1.0),
    ],
)
def test_sft_has_no_preference_loss(key: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=f"{key} would have no effect"):
        build_recipe({**SFT, key: value})


@pytest.mark.parametrize(
    "keys",
    [
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
        {"loss_type": "orpo", "nll_weight": 1.0},
        {"loss_type": {"sigmoid": 0.8, "bco_pair": 0.2}, "nll_weight": 1.0, "ld_alpha": 0.5},
        {"loss_type": "sigmoid_norm", "dpo_tokens": "differing", "unchanged_weight": 0.2},
        {"loss_type": "robust", "label_smoothing": 0.1, "dpo_tokens": "differing"},
        {"dpo_weight": 0.0, "mdpo_conditional_weight": 1.0, "mdpo_anchored_weight": 1.0, "mdpo_anchor": 0.1},
        {"mdpo_conditional_weight": 1.0, "tune_post_decoder": True, "feature_cache": "off"},
        {"dpo_weight": 0.0, "nll_weight": 1.0, "beta": 0.2, "dpo_tokens": "differing"},  # they are logged
    ],
    ids=str,
)
def test_losses_that_go_together(keys: dict[str, Any]) -> None:
    recipe = build_recipe({**DPO, **keys})
    assert recipe.needs_reference == (recipe.loss_type not in ("simpo", "orpo"))
    assert not build_recipe(SFT).needs_reference


@pytest.mark.parametrize("key", ["data_path", "image_folder"])
def test_sft_needs_its_data(key: str) -> None:
    with pytest.raises(RecipeError, match=f"sets no {key}"):
        build_recipe({**SFT, key: ""})


# --- the command line


def test_overrides_are_read_as_yaml() -> None:
    words = (
        "--learning_rate 2e-6 --beta=0.3 --tune_post_decoder true --post_decoder.depth 2 --output_dir a=b --optim sgd"
    )
    overrides = parse_overrides(words.split())
    recipe = build_recipe({**DPO, **overrides})
    assert recipe.training == {"learning_rate": 2e-6, "optim": "sgd"}
    assert (recipe.beta, recipe.tune_post_decoder, recipe.output_dir) == (0.3, True, "a=b")
    assert recipe.post_decoder == {"depth": 2}


@pytest.mark.parametrize("path", ["0123", "12:30", "runs/a #2", "2026-11-29", "1_000", "a b", "'on'"])
def test_a_path_that_yaml_would_change_is_kept(path: str) -> None:
    recipe = build_recipe({**DPO, **parse_overrides(["--output_dir", path, "--max_steps", "010", "--beta", "0.10"])})
    assert recipe.output_dir == path.strip("'")
    assert (recipe.training["max_steps"], recipe.beta) == (10, 0.1)


def test_a_folder_of_a_recipes_name_does_not_hide_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here = read_yaml_or_shipped("head", "recipe")
    (tmp_path / "head").mkdir()
    assert read_yaml_or_shipped("head", "recipe") == here


def test_a_nested_override_keeps_the_recipes_other_settings() -> None:
    values = {**DPO, "tune_post_decoder": True, "post_decoder": {"depth": 1, "align": "linear"}}
    assert build_recipe({**values, **parse_overrides(["--post_decoder.depth=3"])}).post_decoder == {
        "depth": 3,
        "align": "linear",
    }


@pytest.mark.parametrize("value", ["-1", "-0.5", "1e-3"])
def test_numbers_may_be_negative(value: str) -> None:
    assert parse_overrides(["--max_steps", value])["max_steps"] in (-1, -0.5, "1e-3", 1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tune_lm_head"], "--tune_lm_head has no value.*--tune_lm_head true"),
        (["--tune_lm_head", "--beta", "1"], "--tune_lm_head has no value"),
        (["beta", "1"], "'beta' is neither"),
        (["--beta", "1", "2"], "'2' is neither"),
    ],
)
def test_broken_overrides(words: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_overrides(words)


def test_numbers_of_either_kind_are_taken_where_they_are_exact() -> None:
    keys = {"lora_enable": True, "lora_r": "8", "beta": 1, "lora_alpha": 16.0, "learning_rate": "5e-7"}
    recipe = build_recipe({**DPO, **keys})
    assert (recipe.lora_r, recipe.beta, recipe.lora_alpha) == (8, 1.0, 16)
    assert (type(recipe.lora_r), type(recipe.beta), type(recipe.lora_alpha)) == (int, float, int)
    assert recipe.training["learning_rate"] == 5e-7


# --- what is saved


@pytest.mark.parametrize(
    "keys",
    [
        DPO,
        {**SFT, "version": "v1", "bf16": True, "learning_rate": 1e-5, "num_train_epochs": 0.5},
        {**DPO, "tune_post_decoder": True, "post_decoder": {"depth": 2, "activation": "silu"}, "post_decoder_lr": 2e-7},
        {**DPO, "output_dir": "Ordner/ä", "lr_scheduler_kwargs": {"num_cycles": 2}, "optim": "sgd"},
        {**DPO, "version": "1", "vg_path": "2024"},
    ],
    ids=str,
)
def test_a_saved_recipe_reads_back_the_same(keys: dict[str, Any], tmp_path: Path) -> None:
    recipe = build_recipe(keys)
    recipe.save(tmp_path / "recipe.yaml")
    again = load_recipe(str(tmp_path / "recipe.yaml"))
    assert again == recipe
    assert yaml.safe_load(again.to_yaml()) == yaml.safe_load(recipe.to_yaml())


def test_recipes_are_frozen() -> None:
    recipe = build_recipe(DPO)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.beta = 1.0  # type: ignore[misc]
    assert isinstance(recipe, Recipe)


@pytest.mark.parametrize("keys", [{"feature_cache": "disk"}, {"feature_cache_dir": "x"}])
def test_a_trunk_that_trains_has_no_cache_on_disk(keys: dict[str, Any]) -> None:
    lora = {"task": "sft", "model_name_or_path": "m", "output_dir": "o", "data_path": "d", "image_folder": "i"}
    with pytest.raises(RecipeError, match="no effect: the trunk trains"):
        build_recipe({**lora, "lora_enable": True, **keys})
    for kind in ("off", "memory", "auto"):
        build_recipe({**lora, "lora_enable": True, "feature_cache": kind})
