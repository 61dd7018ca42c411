"""A vision tower that trains, whole or by LoRA: its gradients, its learning rate, and what a run leaves of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import dpo_keys, save_tiny, sft_keys
from helpers.trunks import save_trunk
from helpers.variants import variants
from torch import Tensor

from relook import load_model
from relook.errors import RecipeError
from relook.evaluate.pope_from_cache import shares_trunk
from relook.forward.collate import Collator, Item
from relook.forward.policy import Policy
from relook.model.export import convert_model, export_model, merge_adapter
from relook.model.families import vision_tower
from relook.model.trainable import learning_rate_group, set_trainable
from relook.recipe import build_recipe, regime_name
from relook.train.run import encode_samples, read_samples, train

pytestmark = pytest.mark.usefixtures("no_trunk_cache")
KINDS = ["llava", "qwen2_5_vl"]
WHOLE = {"per_device_train_batch_size": 24}  # every step is over the same samples
LORA: dict[str, Any] = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.0}
TOWER = {"tune_vision_tower": True}
REGIMES: dict[str, dict[str, Any]] = {
    "post decoder and tower": {"tune_post_decoder": True, **TOWER, "vision_tower_lr": 1e-2},
    "LoRA and tower": {**LORA, **TOWER},
    "LoRA on both": {**LORA, "lora_vision_tower": True},
    "full and tower": TOWER,
}


@pytest.fixture(scope="module", params=variants(KINDS, {"llava"}))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param) / request.param
    return save_tiny(path) if request.param == "llava" else save_trunk(path)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return dict(load_model(folder).model.state_dict())


def in_tower(name: str) -> bool:
    return learning_rate_group(name) == "vision_tower"


def test_gradients_are_those_of_transformers_own_backward_pass(folder: Path, world: Path, tmp_path: Path) -> None:
    recipe = build_recipe(sft_keys(folder, world, tmp_path / "run", **TOWER, tune_lm_head=True, version="v1"))
    loaded = load_model(folder)
    examples, _ = encode_samples(recipe, loaded, *read_samples(recipe))
    set_trainable(loaded, recipe)
    trained = {n for n, p in loaded.model.named_parameters() if p.requires_grad}
    items = [Item(example) for example in examples[:2]]
    batch = Collator(Policy(loaded.model), loaded.images, loaded.pad_id)(items)["batch"]
    Policy(loaded.model)(batch).sum().backward()
    ours = {n: p.grad.clone() for n, p in loaded.model.named_parameters() if p.grad is not None}
    assert ours.keys() == trained  # layers behind the selected one are frozen: DDP would wait for their gradients
    assert all(in_tower(name) or name.startswith("lm_head") for name in trained)
    assert any(in_tower(name) and ours[name].abs().max() > 0 for name in trained)
    # The same rows one by one, in a model of transformers of which every parameter may train.
    plain = load_model(folder).model.requires_grad_(True)
    for item in items:
        for branch in item.example.tree.branches:
            ids = torch.tensor([[*item.example.tree.prefix, *branch.ids]])
            inputs = loaded.token_types(ids) | loaded.images.batch(item.example.images)
            log_probs = plain(input_ids=ids, **inputs).logits[0].log_softmax(-1)
            start = len(item.example.tree.prefix)
            places = [start + i for i, flag in enumerate(branch.supervised) if flag]
            sum(log_probs[place - 1, ids[0, place]] for place in places).backward()
    theirs = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-4, rtol=1e-4)
    assert not [name for name in theirs.keys() - trained if in_tower(name) and theirs[name].abs().max() > 0]


@pytest.mark.slow  # test_train.py has a head whose rate is 0
def test_a_tower_with_rate_0_changes_nothing(world: Path, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "llava")
    weights = []
    for name, keys in {"with": {**TOWER, "vision_tower_lr": 0}, "without": {}}.items():
        # Gradients of the tower count in their norm: without its limit both runs take the same steps.
        keys = {**LORA, **keys, "max_steps": 2, "max_grad_norm": 0, "feature_cache": "off"}
        weights.append(tensors_of(train(build_recipe(dpo_keys(folder, world, tmp_path / name, **WHOLE, **keys)))))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("regime", "task"),
    [
        pytest.param(regime, task, marks=[] if (regime, task) == ("LoRA on both", "dpo") else pytest.mark.slow)
        for regime in REGIMES
        for task in ("dpo", "sft")
    ],
)
def test_what_a_run_leaves_carries_the_tower(
    regime: str, task: str, folder: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"max_steps": 2, **WHOLE, **REGIMES[regime], "version": "v1"}
    recipe = build_recipe((dpo_keys if task == "dpo" else sft_keys)(folder, world, tmp_path / "run", **keys))
    out = train(recipe)
    assert capsys.readouterr().err.count("the vision tower trains") == 1
    log = json.loads((out / "run.json").read_text())["log"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]
    if task == "dpo":  # the reference has the tower as it was
        assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
        assert not shares_trunk(out, folder)
    base, tuned = load_model(folder), load_model(out)
    before, after = base.model.state_dict(), tuned.model.state_dict()
    towers = {name for name in before if in_tower(name)}
    changed = {name for name in towers if not torch.equal(before[name], after[name])}
    linear = {name for name in towers if before[name].ndim == 2 and "position" not in name}
    assert changed
    if "LoRA on both" in regime:
        assert changed <= linear
    else:
        assert changed > changed & linear
    inputs = base.encode([sorted((world / "vg").rglob("*.jpg"))[0]], "What?")
    with torch.no_grad():
        logits = tuned.core(**inputs).logits
    if regime != "full and tower":
        assert (merge_adapter(folder, out, tmp_path / "merged") or 0.0) < 1e-5
    assert (export_model(out, tmp_path / "exported") or 0.0) < 1e-5
    for name in ("merged", "exported"):
        if (tmp_path / name).exists():
            with torch.no_grad():
                torch.testing.assert_close(load_model(tmp_path / name).core(**inputs).logits, logits)
    if vision_tower(base.core.model) is getattr(base.core.model, "vision_tower", None) and "post" not in regime:
        convert_model(out, tmp_path / "original", "llava")
        again = load_model(tmp_path / "original").model.state_dict()
        torch.testing.assert_close({n: again[n] for n in towers}, {n: after[n] for n in towers})


def test_recipes_say_what_cannot_be(world: Path, tmp_path: Path) -> None:
    keys = dpo_keys(tmp_path, world, tmp_path / "run")
    for more, fault in (
        ({"lora_vision_tower": True}, "lora_vision_tower would have no effect without lora_enable"),
        ({"vision_tower_lr": 1e-5}, "vision_tower_lr would have no effect without tune_vision_tower"),
        ({**LORA, **TOWER, "lora_vision_tower": True}, "tune_vision_tower and lora_vision_tower contradict"),
        ({"tune_post_decoder": True, "freeze_backbone": True, **TOWER}, "freeze_backbone and tune_vision_tower"),
        ({"tune_post_decoder": True, **TOWER, "feature_cache": "disk"}, "feature_cache disk would have no effect"),
        ({**LORA, **TOWER, "feature_cache": "memory"}, "feature_cache memory would have no effect: the vision tower"),
    ):
        with pytest.raises(RecipeError, match=fault):
            build_recipe({**keys, **more})
    # LLaVA's names; the tower trains beside what else does.
    recipe = build_recipe({**keys, "unfreeze_mm_vision_tower": True, "mm_vision_tower_lr": 2e-6})
    assert (recipe.full, recipe.tune_vision_tower, recipe.vision_tower_lr) == (True, True, 2e-6)
    assert regime_name(vars(recipe)) == "full + vision tower"
