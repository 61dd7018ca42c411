"""Vision features computed once where the trunk trains: the same training, without the tower in its steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from helpers.tiny import dpo_keys, sft_keys
from helpers.variants import variants
from safetensors.torch import load_file
from torch import Tensor

from relook import distributed, load_model
from relook.errors import RecipeError
from relook.forward.collate import Collator, Item
from relook.forward.policy import Policy
from relook.recipe import build_recipe
from relook.train import feature_cache
from relook.train.feature_cache import cache_vision_features
from relook.train.run import build_policy, encode_samples, load_for_training, read_samples, train

pytestmark = pytest.mark.usefixtures("no_trunk_cache")
LORA: dict[str, Any] = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.0}
SHORT: dict[str, Any] = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.1, "save_strategy": "no"}
REGIMES: dict[str, tuple[Callable[..., dict[str, Any]], dict[str, Any]]] = {
    "lora, a worker": (dpo_keys, {**LORA, "dataloader_num_workers": 1}),
    "lora, projector and post decoder": (dpo_keys, {**LORA, "tune_post_decoder": True, "tune_mm_mlp_adapter": True}),
    "full, sft": (sft_keys, {}),
    "lora, sft, held out": (sft_keys, {**LORA, "eval_fraction": 0.3, "eval_strategy": "steps", "eval_steps": 2}),
}


def trained(out: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(out.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("regime", variants(REGIMES, {"lora, projector and post decoder"}))
def test_training_is_the_same_and_does_without_the_tower(
    regime: str, base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, keys = REGIMES[regime]
    monkeypatch.setattr(feature_cache, "IMAGE_BATCH", 4)
    seen: list[int] = []
    encode_images = Policy.encode_images
    monkeypatch.setattr(Policy, "encode_images", lambda self, *of: seen.append(len(of[0])) or encode_images(self, *of))
    found, looked = {}, {}
    for cache in ("off", "memory"):
        seen.clear()
        out = train(build_recipe(of(base, world, tmp_path / cache, **SHORT, **keys, feature_cache=cache)))
        found[cache], looked[cache] = trained(out), list(seen)
    assert found["memory"].keys() == found["off"].keys()
    for name, tensor in found["off"].items():
        torch.testing.assert_close(found["memory"][name], tensor, rtol=1e-4, atol=1e-5)
    assert looked["memory"] == [4, 2]  # the world's six pictures
    assert len(looked["off"]) > 2


def prepared(base: Path, world: Path, tmp_path: Path, **keys: Any) -> tuple[Any, Policy, list[Any], Collator]:
    recipe = build_recipe(dpo_keys(base, world, tmp_path / "run", **{**LORA, **keys}))
    loaded = load_model(base)
    examples, _ = encode_samples(recipe, loaded, *read_samples(recipe))
    policy = Policy(loaded.model)
    return recipe, policy, examples, Collator(policy, loaded.images, 3)


def test_features_are_the_towers(base: Path, world: Path, tmp_path: Path) -> None:
    """By transformers alone: the layer before the last one, without the class token."""
    recipe, policy, examples, collator = prepared(base, world, tmp_path)
    features = cache_vision_features(recipe, policy, examples, collator.images)
    assert features is not None
    assert features.keys() == {path for example in examples for path in example.images}
    for path, kept in features.items():
        with torch.no_grad():
            pixels = collator.images(path)[None]
            hidden = policy.core.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        assert kept.projected is None  # it may train
        torch.testing.assert_close(kept.tower, hidden[-2][0, 1:], rtol=1e-5, atol=1e-5)
    collator.vision_features = features
    items = [Item(example) for example in examples[:3]]
    batch = collator(items)["batch"]
    assert batch.pixel_values is None
    assert len(batch.tower) == 3
    for states in batch.tower:
        assert states.untyped_storage().nbytes() == states.nbytes  # nothing else goes along to a process
    assert collator(items)["work"].encoded == 0
    collator.vision_features = None
    inputs = collator(items)
    assert (inputs["batch"].tower, inputs["work"].encoded) == (None, inputs["work"].features)
    with torch.no_grad():
        torch.testing.assert_close(policy(batch), policy(inputs["batch"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("keys", "wider"), [(LORA, False), ({"tune_mm_mlp_adapter": True}, True)], ids=str)
def test_adapters_of_the_language_model_do_not_make_the_tower_wider(
    keys: dict[str, Any], wider: bool, base: Path, world: Path, tmp_path: Path
) -> None:
    """What trains is in float32, and autocast makes norms and residuals beside it so: not those of a frozen tower."""
    recipe = build_recipe(dpo_keys(base, world, tmp_path / "run", **keys, bf16=True))
    loaded = load_for_training(recipe, torch.bfloat16, "cpu")
    examples, _ = encode_samples(recipe, loaded, *read_samples(recipe))
    policy = build_policy(recipe, loaded, torch.bfloat16)
    seen: list[bool] = []
    note = lambda *_: seen.append(torch.is_autocast_enabled("cpu"))  # noqa: E731
    policy.core.model.vision_tower.register_forward_pre_hook(note)
    policy.core.model.language_model.register_forward_pre_hook(note)
    batch = Collator(policy, loaded.images, 3)([Item(examples[0])])["batch"]
    with torch.no_grad(), policy.autocast():
        policy.trunk(batch)
    assert seen == [wider, True]


def test_where_each_step_computes_its_own(
    base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, policy, examples, collator = prepared(base, world, tmp_path)
    cached_recipe = build_recipe(dpo_keys(base, world, tmp_path / "wanted", **LORA, feature_cache="memory"))
    take = lambda recipe: cache_vision_features(recipe, policy, examples, collator.images)  # noqa: E731
    assert take(recipe) is not None
    with monkeypatch.context() as several:
        several.setattr(distributed, "world_size", lambda: 2)
        assert take(recipe) is None
        assert take(cached_recipe) is not None
    with monkeypatch.context() as small:
        size = sum(tensor.nbytes for tensor in (take(recipe) or {}).values())
        small.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * size - 2))
        assert take(recipe) is None
        assert take(cached_recipe) is not None
        small.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2 * size + 2))
        assert take(recipe) is not None
    with monkeypatch.context() as tiles:
        # Elsewhere what the language model reads is kept, as long as the projector does not train.
        tiles.setattr(feature_cache, "family_of", lambda config: SimpleNamespace(projects_rows=False))
        kept = next(iter((take(recipe) or {}).values()))
        assert (kept.tower, kept.projected.shape) == (
            None,
            next(iter((take(cached_recipe) or {}).values())).projected.shape,
        )
        assert take(replace(recipe, tune_mm_mlp_adapter=True)) is None
        with pytest.raises(RecipeError, match="projector of a llava trains"):
            take(replace(cached_recipe, tune_mm_mlp_adapter=True))
    assert cache_vision_features(cached_recipe, policy, [], collator.images) is None


def test_recipes_say_where_there_is_nothing_to_keep(base: Path, world: Path, tmp_path: Path) -> None:
    keys = dpo_keys(base, world, tmp_path / "run", **LORA)
    assert build_recipe(keys).encodes_images_once
    assert not build_recipe({**keys, "feature_cache": "off"}).encodes_images_once
    assert not build_recipe(
        {**keys, "mdpo_conditional_weight": 1.0}
    ).encodes_images_once  # nothing keeps those of its crops
    with pytest.raises(RecipeError, match="corrupted images"):
        build_recipe({**keys, "mdpo_conditional_weight": 1.0, "feature_cache": "memory"})
    for more in ({"feature_cache": "disk"}, {"feature_cache_dir": "x"}):
        with pytest.raises(RecipeError, match="the trunk trains, and there are no states"):
            build_recipe({**keys, **more})
    assert not build_recipe(
        dpo_keys(base, world, tmp_path / "run", tune_lm_head=True)
    ).encodes_images_once  # a cache holds more
