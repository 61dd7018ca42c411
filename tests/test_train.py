"""Training: what trains, what the first step is, caches, kills, and what lies in the output folder."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.data_loader import SeedableRandomSampler
from helpers.damaged import talk
from helpers.forked import forked
from helpers.several import train_all
from helpers.tiny import dpo_keys, save_tied, sft_keys
from helpers.variants import variants
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Sampler
from transformers import LlavaForConditionalGeneration, LlavaProcessor, TrainingArguments

from relook import load_model
from relook.data.encode import Example
from relook.errors import CheckpointError, DataError, RecipeError, RelookError
from relook.files import sole_writer, write_json
from relook.forward.collate import Collator, Item, ItemDataset, split_held_out
from relook.forward.policy import Policy
from relook.model.checkpoint import parse_folder
from relook.model.export import merge_adapter
from relook.model.load import TENSORS_FILE, LoadedModel, LoadOptions
from relook.model.trainable import parameter_groups, set_trainable
from relook.recipe import Recipe, build_recipe
from relook.toyworld.build import make_processor
from relook.train import feature_cache
from relook.train import run as training
from relook.train.feature_cache import TrunkCache, compute_trunk_states
from relook.train.loss import metric_names, preference_loss
from relook.train.run import claim_run_dir, encode_samples, prepare_items, read_samples, train
from relook.train.trainer import COMPLETE_MARKER

pytestmark = pytest.mark.usefixtures("no_trunk_cache")

Wanted = Callable[[str], bool]
LM = "model.language_model."
# What trains, and what has a gradient at the very first step: behind a projection of zeros nothing does.
REGIMES: dict[str, tuple[dict[str, Any], Wanted, Wanted]] = {
    "head": ({"tune_lm_head": True}, lambda n: n == "lm_head.weight", lambda n: True),
    "post_decoder": (
        {"tune_post_decoder": True, "post_decoder": {"depth": 2, "attention": "self_cross"}},
        lambda n: ".post_decoder." in n,
        lambda n: n.endswith(("o_proj.weight", "down_proj.weight")),
    ),
    "both": (
        {"tune_post_decoder": True, "tune_lm_head": True, "post_decoder_init": "projector"},
        lambda n: ".post_decoder." in n or n == "lm_head.weight",
        lambda n: n.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")),
    ),
    "lora": ({"lora_enable": True, "lora_r": 4}, lambda n: n.startswith(LM) and "lora_" in n, lambda n: "lora_B" in n),
    "projector": ({"tune_mm_mlp_adapter": True}, lambda n: ".multi_modal_projector." in n, lambda n: True),
    "full": ({}, lambda n: n.startswith((LM, "model.multi_modal_projector.", "lm_head.")), lambda n: True),
    "lora and post decoder": (
        {"lora_enable": True, "lora_r": 4, "tune_post_decoder": True},
        lambda n: "lora_" in n or ".post_decoder." in n,
        lambda n: ("lora_B" in n) or ("lora_" not in n and n.endswith(("o_proj.weight", "down_proj.weight"))),
    ),
}


class Bench:
    """A recipe set up as `train` does it, stepped by hand."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.loaded = recipe, load_model(recipe.model_name_or_path)
        self.examples, _ = encode_samples(recipe, self.loaded, *read_samples(recipe))
        set_trainable(self.loaded, recipe)
        self.policy = Policy(self.loaded.model)
        self.collator = Collator(self.policy, self.loaded.images, 3)
        self.items = prepare_items(recipe, self.policy, self.examples, self.collator, 4, lambda: self.policy)

    def loss(self, indices: list[int]) -> tuple[Tensor, dict[str, float]]:
        inputs = self.collator([self.items[i] for i in indices])
        batch = inputs["batch"]
        targets = batch.packed.targets if hasattr(batch, "packed") else batch.targets
        log_probs = self.policy(batch)
        loss, fields = preference_loss(self.recipe, log_probs, targets, inputs.get("reference"), inputs["weight"])
        return loss, {name: float(value) for name, value in fields.items()}

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self.loaded.core.named_parameters())


def log_of(out: Path, field: str) -> list[float]:
    return [entry[field] for entry in json.loads((out / "run.json").read_text())["log"] if field in entry]


def anyone_may_read(out: Path) -> bool:
    """Whether a run's files have the permissions of any new file; safetensors makes its own private."""
    plain = out.with_name("new")
    plain.touch()
    return {path.stat().st_mode for path in out.iterdir() if path.is_file()} == {plain.stat().st_mode}


def recipe_for(base: Path, world: Path, out: Path, **keys: Any) -> Recipe:
    return build_recipe(dpo_keys(base, world, out, **keys))


# --- the first step


@pytest.mark.parametrize(
    ("regime", "tokens"),
    [
        *((regime, "all") for regime in ("lora", "full", "lora and post decoder")),
        *(pytest.param(r, "all", marks=pytest.mark.slow) for r in ("head", "post_decoder", "both", "projector")),
        ("both", "differing"),
    ],
)
def test_before_training_the_loss_is_ln_2(regime: str, tokens: str, base: Path, world: Path, tmp_path: Path) -> None:
    recipe = recipe_for(base, world, tmp_path, dpo_tokens=tokens, **REGIMES[regime][0])
    bench = Bench(recipe)
    mixed = [0, 13, 5, 20]  # question and description pairs
    assert len({len(bench.items[i].example.tree) for i in mixed}) > 2
    loss, fields = bench.loss(mixed)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert fields["rewards/margins"] == pytest.approx(0, abs=1e-5)
    bench.recipe = replace(recipe, nll_weight=0.5)
    assert bench.loss(mixed)[0].item() == pytest.approx(math.log(2) + 0.5 * fields["nll"], abs=1e-6)


def test_a_mean_over_responses_is_that_of_each_alone(base: Path, world: Path, tmp_path: Path) -> None:
    bench = Bench(recipe_for(base, world, tmp_path, nll_weight=1.0, **REGIMES["post_decoder"][0]))
    mixed = [0, 13, 5, 20]  # question and description pairs
    alone = [bench.loss([i])[1]["nll"] for i in mixed]
    together = bench.loss(mixed)[1]["nll"]
    bench.recipe = replace(bench.recipe, nll_length_power=1.0)
    mean = bench.loss(mixed)[1]["nll"]
    assert mean == pytest.approx(sum(alone) / len(alone), abs=1e-5)
    assert abs(mean - together) > 1e-3  # over tokens the descriptions count for more


@pytest.mark.parametrize("regime", variants(REGIMES, {"post_decoder", "full", "both", "lora and post decoder"}))
def test_exactly_what_should_train_has_a_gradient(regime: str, base: Path, world: Path, tmp_path: Path) -> None:
    keys, trains, first = REGIMES[regime]
    bench = Bench(recipe_for(base, world, tmp_path, **keys))
    optimizer = torch.optim.SGD([p for p in bench.parameters.values() if p.requires_grad], 0.5)
    before = {name: parameter.detach().clone() for name, parameter in bench.parameters.items()}
    for step in range(2):
        optimizer.zero_grad()
        bench.loss([0, 3, 13, 20])[0].backward()
        for name, parameter in bench.parameters.items():
            assert (parameter.grad is not None) == trains(name), name
            if parameter.grad is not None:
                assert bool(parameter.grad.any()) == (step > 0 or first(name)), name
        optimizer.step()
    for name, parameter in bench.parameters.items():
        assert torch.equal(parameter, before[name]) != trains(name), name


def test_a_tied_head_trains_without_the_input_embeddings(world: Path, tmp_path: Path) -> None:
    bench = Bench(recipe_for(save_tied(tmp_path / "tied"), world, tmp_path, tune_lm_head=True))
    bench.loss([0, 13])[0].backward()
    assert [name for name, p in bench.parameters.items() if p.grad is not None] == ["lm_head.weight"]
    embeddings = bench.loaded.core.get_input_embeddings().weight
    assert embeddings is not bench.loaded.core.lm_head.weight
    assert torch.equal(embeddings, bench.loaded.core.lm_head.weight)


def test_reference_log_probs_are_the_bases_own(base: Path, world: Path, tmp_path: Path) -> None:
    """Against transformers' forward over each row alone."""
    bench = Bench(recipe_for(base, world, tmp_path, tune_post_decoder=True, post_decoder_init="projector"))
    plain = LlavaForConditionalGeneration.from_pretrained(base).eval()
    for item in [bench.items[i] for i in (0, 1, 14, 23)]:
        picture, expected = bench.loaded.images(item.example.images[0])[None], []
        for branch in item.example.tree.branches:
            ids = torch.tensor([[*item.example.tree.prefix, *branch.ids]])
            with torch.no_grad():
                log_probs = plain(input_ids=ids, pixel_values=picture).logits[0].log_softmax(-1)
            positions = [len(item.example.tree.prefix) + i for i, flag in enumerate(branch.supervised) if flag]
            expected += [log_probs[position - 1, ids[0, position]] for position in positions]
        assert item.reference is not None
        torch.testing.assert_close(item.reference, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_only_differing_tokens_can_be_weighed(base: Path, world: Path, tmp_path: Path) -> None:
    bench = Bench(recipe_for(base, world, tmp_path, dpo_tokens="differing", tune_lm_head=True))
    words = make_processor().tokenizer
    for item in (bench.items[0], bench.items[13]):
        targets = [t for b in item.example.tree.branches for t, s in zip(b.ids, b.supervised, strict=True) if s]
        assert item.weight is not None
        counted = words.decode([t for t, w in zip(targets, item.weight, strict=True) if w])
        assert "</s>" not in counted
        assert 0 < item.weight.sum() < len(targets)


# --- other losses


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param({"loss_type": "hinge"}, marks=pytest.mark.slow),
        pytest.param({"loss_type": "ipo"}, marks=pytest.mark.slow),
        {"loss_type": "robust", "label_smoothing": 0.1, "dpo_tokens": "differing"},
        pytest.param({"loss_type": "simpo", "beta": 2.0}, marks=pytest.mark.slow),
        {"loss_type": "orpo", "nll_weight": 1.0, "learning_rate": 5e-3},
        pytest.param(
            {"feature_cache": "off", "mdpo_conditional_weight": 1, "mdpo_anchored_weight": 1, "learning_rate": 5e-3},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_every_loss_is_learned(
    keys: dict[str, Any], base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = keys.get("loss_type") in ("simpo", "orpo")
    if free:

        def never(*_: Any) -> None:
            raise AssertionError("a reference was asked")

        monkeypatch.setattr(training, "reference_log_probs", never)
        monkeypatch.setattr(feature_cache, "reference_log_probs", never)
    out = train(recipe_for(base, world, tmp_path / "run", **{"tune_post_decoder": True, "num_train_epochs": 2} | keys))
    for field in ("loss", "rewards/margins"):
        values = log_of(out, field)
        assert len(values) == 12
        first, last = sum(values[:6]), sum(values[6:])  # two epochs
        assert last < first if field == "loss" else last > first
    assert bool(log_of(out, "reference_logps/chosen")) != free
    if "mdpo_conditional_weight" in keys:
        start = {name: log_of(out, name)[0] for name in ("loss", "rewards/corrupted")}
        assert start == pytest.approx({"loss": 3 * math.log(2), "rewards/corrupted": 0}, abs=1e-5)


@pytest.mark.parametrize("regime", variants(["lora", "full", "projector"], {"lora"}))
def test_before_training_each_of_mdpos_terms_is_ln_2(regime: str, base: Path, world: Path, tmp_path: Path) -> None:
    """Corrupted images give other log-probs than their own, and the reference's were taken on the same ones."""
    weights = {"mdpo_conditional_weight": 1.0, "mdpo_anchored_weight": 1.0}
    bench = Bench(recipe_for(base, world, tmp_path, **weights, **REGIMES[regime][0]))
    loss, fields = bench.loss([0, 13, 5, 20])
    assert loss.item() == pytest.approx(3 * math.log(2), abs=1e-5)
    for name in ("margins", "corrupted"):
        assert fields[f"rewards/{name}"] == pytest.approx(0, abs=1e-5)
    item = bench.items[13]
    assert item.corrupted is not None
    assert item.corrupted.reference is not None
    assert item.reference is not None
    assert not torch.allclose(item.corrupted.reference, item.reference[: len(item.corrupted.reference)], atol=1e-4)
    twice = [item for item in bench.items if item.example.id == bench.items[13].example.id]
    assert len(twice) == 2  # the two places of a description have the same crop
    assert [one.corrupted.image_sources for one in twice if one.corrupted] == [item.corrupted.image_sources] * 2


# --- learning rates


def test_groups_take_their_own_learning_rates(base: Path, world: Path, tmp_path: Path) -> None:
    recipe = recipe_for(base, world, tmp_path, tune_post_decoder=True, tune_lm_head=True, tune_mm_mlp_adapter=True,
                        post_decoder_lr=1e-4, lm_head_lr=1e-5, mm_projector_lr=1e-6)  # fmt: skip
    bench = Bench(recipe)
    names = {id(parameter): name for name, parameter in bench.parameters.items()}
    rates = {}
    for group in parameter_groups(bench.policy, recipe, 0.1):
        for parameter in group["params"]:
            assert id(parameter) in names
            name = names.pop(id(parameter))
            rates[name] = group["lr"]
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
    assert rates == {
        name: 1e-4 if "post_decoder" in name else 1e-5 if "lm_head" in name else 1e-6
        for name, parameter in bench.parameters.items()
        if parameter.requires_grad
    }


def test_a_rate_of_zero_holds_a_part_still(base: Path, world: Path, tmp_path: Path) -> None:
    out = train(recipe_for(base, world, tmp_path / "run", tune_post_decoder=True, tune_lm_head=True, lm_head_lr=0))
    trained = load_file(out / TENSORS_FILE)
    head = LlavaForConditionalGeneration.from_pretrained(base).lm_head.weight
    assert torch.equal(trained["lm_head.weight"], head)
    assert trained["model.post_decoder.blocks.0.mlp.down_proj.weight"].any()


def test_accumulated_batches_are_one_batch(base: Path, world: Path, tmp_path: Path) -> None:
    keys = {"tune_lm_head": True, "max_steps": 2, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    one_pass = train(recipe_for(base, world, tmp_path / "4", **keys))
    parts = train(
        recipe_for(base, world, tmp_path / "2x2", **keys, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    )
    for tensor, other in zip(*(load_file(out / TENSORS_FILE).values() for out in (one_pass, parts)), strict=True):
        torch.testing.assert_close(tensor, other)
    assert log_of(one_pass, "loss") == pytest.approx(log_of(parts, "loss"), abs=1e-5)


# --- trunk states


@pytest.mark.parametrize(
    "keys",
    [
        {"tune_post_decoder": True, "nll_weight": 1.0, "dpo_tokens": "differing"},
        pytest.param({"tune_post_decoder": True, "post_decoder": {"attention": "none"}}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_cached_states_train_as_live_ones(keys: dict[str, Any], base: Path, world: Path, tmp_path: Path) -> None:
    """Of a head, and of attention to the text too, in test_trunk_cache.py."""
    keys = {**keys, "optim": "sgd", "learning_rate": 0.1, "max_steps": 5}
    outs = [
        train(recipe_for(base, world, tmp_path / feature_cache, **keys, feature_cache=feature_cache))
        for feature_cache in ("off", "memory")
    ]
    for field in ("loss", "rewards/margins", "policy_logps/rejected", "grad_norm"):
        live, cached = (log_of(out, field) for out in outs)
        assert len(live) == 5
        assert cached == pytest.approx(live, rel=1e-4, abs=1e-5)
    assert log_of(outs[0], "loss")[0] != pytest.approx(log_of(outs[0], "loss")[-1], abs=1e-4)
    live_tensors, cached_tensors = (load_file(out / TENSORS_FILE) for out in outs)
    assert live_tensors.keys() == cached_tensors.keys()
    for name, tensor in live_tensors.items():
        torch.testing.assert_close(cached_tensors[name], tensor, rtol=1e-4, atol=1e-5)


def test_regimes_on_the_same_data_share_the_trunks_pass(
    base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 24 pairs 18 are distinct: HA-DPO's mix has the 6 description pairs twice."""
    passes: list[int] = []

    def counted(policy: Policy, plan: Any, shard: Any, parts: Any, *rest: Any) -> Any:
        passes.append(len(shard.examples) if "states" in parts else 0)
        return compute_trunk_states(policy, plan, shard, parts, *rest)

    monkeypatch.setattr(feature_cache, "compute_trunk_states", counted)
    train(recipe_for(base, world, tmp_path / "1", tune_post_decoder=True, max_steps=1))
    train(recipe_for(base, world, tmp_path / "2", tune_lm_head=True, max_steps=1))
    train(recipe_for(base, world, tmp_path / "3", tune_post_decoder=True, max_steps=1))
    assert passes == [18]
    train(recipe_for(base, world, tmp_path / "4", tune_post_decoder=True, max_steps=1, desc_data_path=""))
    assert passes == [18, 12]
    TrunkCache.current = None
    train(recipe_for(base, world, tmp_path / "alone", tune_post_decoder=True, max_steps=1))
    assert (tmp_path / "alone" / TENSORS_FILE).read_bytes() == (tmp_path / "3" / TENSORS_FILE).read_bytes()


# --- the output folder


def test_what_a_run_leaves(base: Path, world: Path, tmp_path: Path) -> None:
    out = train(recipe_for(base, world, tmp_path / "run", tune_post_decoder=True, nll_weight=1.0))
    record = json.loads((out / "run.json").read_text())
    assert record["samples"] == 24
    fields = {"loss", "grad_norm", "learning_rate", "epoch", "step", "nll"}
    fields |= {f"rewards/{name}" for name in ("chosen", "rejected", "accuracies", "margins")}
    fields |= {f"{model}_logps/{name}" for model in ("policy", "reference") for name in ("chosen", "rejected")}
    steps = [entry for entry in record["log"] if "loss" in entry]
    assert [entry["step"] for entry in steps] == list(range(1, 7))
    assert all(entry.keys() >= fields for entry in steps)
    assert steps[0]["loss"] == pytest.approx(math.log(2) + steps[0]["nll"], abs=1e-5)
    assert steps[-1]["nll"] < steps[0]["nll"]
    change = json.loads((out / "change.json").read_text())
    assert change["base"] == str(base.resolve())
    assert {p.name for p in out.iterdir()} - {"checkpoints"} == {
        *("change.json", "data.json", "recipe.yaml", "run.json"),
        TENSORS_FILE,
    }


def test_a_finished_run_is_not_run_again(
    base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_for(base, world, tmp_path / "run", tune_lm_head=True, max_steps=1)
    out = train(recipe)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(training, "load_model", never)
    assert train(recipe) == out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert "is finished" in capsys.readouterr().err.replace("\n", " ")


def test_a_folder_with_another_run_is_refused(base: Path, world: Path, tmp_path: Path) -> None:
    out = train(recipe_for(base, world, tmp_path / "run", tune_lm_head=True, max_steps=1))
    before = (out / TENSORS_FILE).read_bytes()
    with pytest.raises(RecipeError, match=r"another recipe.*beta"):
        train(recipe_for(base, world, tmp_path / "run", tune_lm_head=True, max_steps=1, beta=0.2))
    with pytest.raises(RecipeError, match=r"another recipe.*max_steps"):
        train(recipe_for(base, world, tmp_path / "run", tune_lm_head=True))
    assert (out / TENSORS_FILE).read_bytes() == before


def test_a_folder_is_free_until_something_is_finished_there(base: Path, world: Path, tmp_path: Path) -> None:
    """A run that still works keeps its folder; so does one with a complete checkpoint, or with what it trained."""
    recipe, other = (recipe_for(base, world, tmp_path / "run", tune_lm_head=True, beta=beta) for beta in (0.1, 0.2))
    out = tmp_path / "run"
    assert not claim_run_dir(out, recipe)
    (out / "checkpoints" / "checkpoint-1").mkdir(parents=True)  # cut off
    assert not claim_run_dir(out, other)
    assert not claim_run_dir(out, recipe)
    with sole_writer(out), pytest.raises(RelookError, match="is in use"):  # as by another process
        train(other)
    assert not claim_run_dir(out, other)
    for file in (out / "checkpoints" / "checkpoint-1" / "complete", out / TENSORS_FILE):
        file.touch()
        with pytest.raises(RecipeError, match=r"another recipe.*beta"):
            claim_run_dir(out, recipe)
        file.unlink()


def test_somebody_elses_folder_is_refused(base: Path, world: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, message in (("notes", "holds something else"), ("file", "is a file")):
        with pytest.raises(RecipeError, match=message):
            train(recipe_for(base, world, tmp_path / name, tune_lm_head=True))
    assert (tmp_path / "notes" / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    assert len(list((tmp_path / "notes").iterdir())) == 1


def test_a_loss_that_is_no_number_stops_the_run(base: Path, world: Path, tmp_path: Path) -> None:
    keys = {"tune_lm_head": True, "learning_rate": 1e38, "optim": "sgd", "max_grad_norm": 0.0, "beta": 100.0}
    with pytest.raises(RelookError, match=r"The loss is (nan|inf) at step \d"):
        train(recipe_for(base, world, tmp_path / "run", **keys))
    assert not (tmp_path / "run" / "run.json").exists()


def test_unusable_samples_are_counted_and_named(base: Path, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world, tmp_path / "world")
    broken = sorted((tmp_path / "world" / "vg").rglob("*.jpg"))[0]
    broken.write_bytes(b"no image")
    missing = sorted((tmp_path / "world" / "vg").rglob("*.jpg"))[-1]
    missing.unlink()
    keys = {"tune_lm_head": True, "max_steps": 1}
    out = train(recipe_for(base, tmp_path / "world", tmp_path / "run", **keys))
    record = json.loads((out / "run.json").read_text())
    assert record["samples"] == 16
    assert "image file missing: 3" in record["dropped"]["reader"]
    assert broken.name in " ".join(record["dropped"]["faults"])
    with pytest.raises(DataError, match="image file missing"):
        train(recipe_for(base, tmp_path / "world", tmp_path / "strict", **keys, on_bad="error"))
    shutil.copy(max(broken.parent.iterdir()), missing)
    with pytest.raises(DataError, match=broken.name):
        train(recipe_for(base, tmp_path / "world", tmp_path / "stricter", **keys, on_bad="error"))


def test_no_sample_left_is_an_error(base: Path, world: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "pairs.json", {"999": {"chosen": ["a"], "rejected": ["b"]}})
    keys = {"desc_data_path": tmp_path / "pairs.json", "pope_data_path": "", "tune_lm_head": True}
    with pytest.raises(DataError, match="No sample can be used"):
        train(recipe_for(base, world, tmp_path / "run", **keys))


# --- what was trained is what is loaded


def logits_of(model: Any, pictures: Tensor) -> Tensor:
    ids = torch.tensor([[1, *[4] * 36, 30, 40, 50, 60]])
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, pixel_values=pictures).logits
    return logits


def test_a_trained_head_is_loaded_on_its_base(base: Path, world: Path, tmp_path: Path) -> None:
    out = train(recipe_for(base, world, tmp_path / "run", tune_lm_head=True))
    pictures = torch.randn(1, 3, 96, 96)
    plain = LlavaForConditionalGeneration.from_pretrained(base).eval()
    before = logits_of(plain, pictures)
    plain.lm_head.weight.data = load_file(out / TENSORS_FILE)["lm_head.weight"]
    assert torch.equal(logits_of(load_model(out).model, pictures), logits_of(plain, pictures))
    assert not torch.allclose(logits_of(plain, pictures), before)
    assert torch.equal(logits_of(load_model(base, out).model, pictures), logits_of(plain, pictures))


def test_a_trained_lora_is_loaded_as_peft_loads_it(base: Path, world: Path, tmp_path: Path) -> None:
    out = train(recipe_for(base, world, tmp_path / "run", lora_enable=True, lora_r=4, learning_rate=1e-2))
    pictures = torch.randn(1, 3, 96, 96)
    plain = LlavaForConditionalGeneration.from_pretrained(base).eval()
    before = logits_of(plain, pictures)
    adapted = PeftModel.from_pretrained(plain, out).eval()
    ours, theirs = logits_of(load_model(out).model, pictures), logits_of(adapted, pictures)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(logits_of(adapted, pictures), before, atol=1e-3)
    assert anyone_may_read(out)


def test_a_post_decoder_trained_on_the_wrong_base_is_refused(base: Path, world: Path, tmp_path: Path) -> None:
    out = train(recipe_for(base, world, tmp_path / "run", tune_post_decoder=True, max_steps=1))
    change = json.loads((out / "change.json").read_text())
    change["post_decoder"] = {"depth": 1, "mlp_size": 16}
    write_json(out / "change.json", change)
    with pytest.raises(CheckpointError, match="do not fit"):
        load_model(out)


def test_a_run_is_asked_and_shown_images_as_it_was_trained(
    base: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every command and after a merge; the base itself is asked by llava_hf, and images are not padded."""

    def how(loaded: LoadedModel) -> tuple[str, str]:
        return loaded.template, loaded.images.aspect_ratio

    keys: dict[str, Any] = {"tune_lm_head": True, "max_steps": 1, "version": "vicuna_v1", "image_aspect_ratio": "pad"}
    out = train(recipe_for(base, world, tmp_path / "run", **keys))
    assert how(load_model(base)) == ("llava_hf", "")
    assert how(load_model(out)) == how(load_model(base, adapter=out)) == ("v1", "pad")
    assert "was trained with template v1, which is used instead of its base's llava_hf" in capsys.readouterr().err
    assert parse_folder(out).template == LoadOptions(adapter=out).template_of(base) == "v1"
    merge_adapter(base, out, tmp_path / "merged")
    assert how(load_model(tmp_path / "merged")) == ("v1", "pad")
    images = LlavaProcessor.from_pretrained(tmp_path / "merged").image_processor
    assert images.do_pad  # for transformers
    # A run on it keeps the template, and may leave the padding out again.
    keys = {"tune_lm_head": True, "max_steps": 1, "version": "", "image_aspect_ratio": "square"}
    second = train(recipe_for(tmp_path / "merged", world, tmp_path / "second", **keys))
    assert how(load_model(second)) == ("v1", "square")
    whole = train(build_recipe(sft_keys(base, world, tmp_path / "whole", max_steps=1, version="v1")))
    assert how(load_model(whole)) == ("v1", "")


def test_a_full_run_is_a_model_of_its_own(base: Path, world: Path, tmp_path: Path) -> None:
    recipe = build_recipe(sft_keys(base, world, tmp_path / "run", conversations_per_tree=4, learning_rate=1e-3))
    out = train(recipe)
    losses = log_of(out, "loss")
    assert losses[-1] < losses[0]
    model = LlavaForConditionalGeneration.from_pretrained(out).eval()
    pictures = torch.randn(1, 3, 96, 96)
    assert torch.equal(logits_of(load_model(out).model, pictures), logits_of(model, pictures))
    start = LlavaForConditionalGeneration.from_pretrained(base)
    before, after = (dict(m.named_parameters()) for m in (start, model))
    tower = [name for name in before if "vision_tower" in name]
    assert tower
    assert all(torch.equal(before[name], after[name]) == (name in tower) for name in before)
    assert anyone_may_read(out)


@pytest.mark.parametrize(
    "keys", variants([{"tune_post_decoder": True}, {"tune_mm_mlp_adapter": True}], [{"tune_post_decoder": True}])
)
def test_an_image_in_a_later_turn_trains_beside_others_on_it(
    keys: dict[str, Any], base: Path, world: Path, tmp_path: Path
) -> None:
    """As each conversation alone does: from cached states, and through the trunk."""
    name = next(one["image"] for one in json.loads((world / "llava/toyworld_mix.json").read_text()) if "image" in one)
    with_image, text_only = ("<image>\nWhat is this?", "There is a cup."), ("Hello there.", "Hi.")
    mix = [
        {"id": str(i), "image": name, "conversations": [m for turn in turns for m in talk(*turn)]}
        for i, turns in enumerate(
            [(text_only, with_image), (with_image, text_only), (text_only, ("<image>\nWhere?", "Here.")), (with_image,)]
        )
    ]
    write_json(tmp_path / "mix.json", mix)
    losses = []
    for branches in (1, 9):
        more = {"conversations_per_tree": branches, "data_path": tmp_path / "mix.json", "num_train_epochs": 3, **keys}
        losses.append(log_of(train(build_recipe(sft_keys(base, world, tmp_path / f"{branches}", **more))), "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- held-out images


@pytest.mark.parametrize("task", variants(["dpo", "sft"], {"dpo"}))
def test_the_step_that_is_best_on_held_out_images_is_kept(task: str, base: Path, world: Path, tmp_path: Path) -> None:
    keys = {"tune_lm_head": True, "optim": "sgd", "learning_rate": 30.0, "num_train_epochs": 2, "eval_fraction": 0.34,
            "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_grad_norm": 0.0,
            "load_best_model_at_end": True, "save_total_limit": 99, "per_device_eval_batch_size": 3}  # fmt: skip
    recipe = build_recipe((sft_keys if task == "sft" else dpo_keys)(base, world, tmp_path / "run", **keys))
    out = train(recipe)
    record = json.loads((out / "run.json").read_text())
    measured = {entry["step"]: entry["eval_loss"] for entry in record["log"] if "eval_loss" in entry}
    best = min(measured, key=lambda step: measured[step])
    assert best < max(measured)  # else the last step would do
    saved = (out / TENSORS_FILE).read_bytes()
    assert saved == (out / "checkpoints" / f"checkpoint-{best}" / TENSORS_FILE).read_bytes()

    # The loss of what was left, over all held-out items in one batch.
    loaded = load_model(out)
    examples, _ = encode_samples(recipe, loaded, *read_samples(recipe))
    images = list(dict.fromkeys(example.images for example in examples))
    policy = Policy(load_model(base).model)
    collator = Collator(policy, loaded.images, 3)
    live = replace(recipe, feature_cache="off")
    items, held_out = split_held_out(prepare_items(live, policy, examples, collator, 4, lambda: policy), 0.34)
    assert len({item.example.images for item in held_out}) == record["held_out"] * len(images) // len(examples) == 2
    assert not {item.example.images for item in held_out} & {item.example.images for item in items}
    inputs = Collator(Policy(loaded.model), loaded.images, 3)(held_out)
    with torch.no_grad():
        log_probs = Policy(loaded.model)(inputs["batch"])
    if task == "sft":
        loss = -log_probs.mean()
    else:
        targets = inputs["batch"].packed.targets
        loss = preference_loss(recipe, log_probs, targets, inputs["reference"], inputs["weight"])[0]
    assert measured[best] == pytest.approx(loss.item(), abs=1e-4)


def test_evaluation_needs_something_held_out(base: Path, world: Path, tmp_path: Path) -> None:
    for keys, message in (
        ({"eval_strategy": "epoch"}, "eval_strategy would have no effect without eval_fraction: nothing is held out"),
        ({"eval_fraction": 0.01}, "of 6 images: 24 samples to train on, 0 to test"),
        ({"eval_fraction": 1.0}, "a share of the images"),
    ):
        with pytest.raises(RecipeError, match=message):
            train(recipe_for(base, world, tmp_path / "run", tune_lm_head=True, **keys))


def test_the_best_step_by_what_nobody_measures_is_refused_before_anything_is_read(base: Path, tmp_path: Path) -> None:
    keys = {"eval_fraction": 0.34, "save_strategy": "best", "metric_for_best_model": "rewards/margin"}
    with pytest.raises(RecipeError, match=r"eval_rewards/margin is not measured.*one of eval_loss, eval_rewards/ch"):
        train(recipe_for(base, tmp_path / "nothing", tmp_path / "run", tune_lm_head=True, **keys))


@pytest.mark.parametrize(
    ("of", "keys"),
    [
        pytest.param(dpo_keys, {"loss_type": "simpo", "beta": 2.0}, marks=pytest.mark.slow),
        (dpo_keys, {"mdpo_conditional_weight": 1.0, "feature_cache": "off"}),
        (sft_keys, {}),
    ],
    ids=["simpo", "mdpo", "sft"],
)
def test_what_is_known_beforehand_is_what_an_evaluation_measures(
    of: Callable[..., dict[str, Any]], keys: dict[str, Any], base: Path, world: Path, tmp_path: Path
) -> None:
    keys = {"tune_lm_head": True, "eval_fraction": 0.34, "max_steps": 1, **keys}
    recipe = build_recipe(of(base, world, tmp_path / "run", **keys))
    log = json.loads((train(recipe) / "run.json").read_text())["log"]
    measured = next(line for line in log if "eval_loss" in line)
    assert [name.removeprefix("eval_") for name in measured if name.startswith("eval_")] == metric_names(recipe)


@pytest.mark.slow
def test_measuring_changes_nothing(base: Path, world: Path, tmp_path: Path) -> None:
    keys = {"tune_post_decoder": True, "lora_enable": True, "lora_r": 4, "lora_dropout": 0.2, "eval_fraction": 0.5}
    outs = [
        train(recipe_for(base, world, tmp_path / str(strategy), **keys, eval_strategy=strategy))
        for strategy in ("epoch", False)  # YAML's no
    ]
    assert (outs[0] / TENSORS_FILE).read_bytes() == (outs[1] / TENSORS_FILE).read_bytes()
    for field in ("loss", "rewards/margins"):
        assert log_of(outs[0], field) == log_of(outs[1], field)


# --- SFT


def test_the_sft_loss_is_the_mean_over_answer_tokens(base: Path, world: Path, tmp_path: Path) -> None:
    """Against transformers' own forward over each conversation alone; nine conversations share an image's prefix."""
    keys = {"conversations_per_tree": 9, "max_steps": 1, "per_device_train_batch_size": 6, "tune_lm_head": True}
    recipe = build_recipe(sft_keys(base, world, tmp_path / "run", **keys))
    out = train(recipe)
    model = load_model(base)
    records = json.loads(Path(recipe.data_path).read_text())
    words = model.processor.tokenizer
    nats: list[Tensor] = []
    for record in records:
        question, response = (turn["value"] for turn in record["conversations"])
        head, tail = (
            words(text, add_special_tokens=False)["input_ids"]
            for text in ("USER: ", f"\n{question.removeprefix('<image>').strip()} ASSISTANT:")
        )
        ids = [1, *head, *[4] * 36, *tail]
        answer = [*words(response, add_special_tokens=False)["input_ids"], 2]
        picture = model.images(Path(recipe.image_folder) / record["image"])[None]
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([ids + answer]), pixel_values=picture).logits[0]
        nats.append(F.cross_entropy(logits[len(ids) - 1 : -1], torch.tensor(answer), reduction="none"))
    assert log_of(out, "loss")[0] == pytest.approx(float(torch.cat(nats).mean()), abs=1e-4)


def test_text_only_conversations_train_beside_others(base: Path, world: Path, tmp_path: Path) -> None:
    records = json.loads((world / "llava" / "toyworld_mix.json").read_text())[:6]
    for record in records[::2]:
        del record["image"]
        record["conversations"][0]["value"] = "Is there a cup?"
    write_json(tmp_path / "mix.json", records)
    keys = {"data_path": tmp_path / "mix.json", "tune_post_decoder": True, "per_device_train_batch_size": 6}
    outs = [
        train(build_recipe(sft_keys(base, world, tmp_path / feature_cache, feature_cache=feature_cache, **keys)))
        for feature_cache in ("off", "memory")
    ]
    live, cached = (log_of(out, "loss") for out in outs)
    assert cached == pytest.approx(live, abs=1e-5)


# --- kills


def test_a_killed_run_goes_on_to_the_same_weights(base: Path, world: Path, tmp_path: Path) -> None:
    """Killed in the middle of writing its second checkpoint, with dropout, momentum and a schedule to be restored."""
    keys = {"tune_post_decoder": True, "lora_enable": True, "lora_r": 4, "lora_dropout": 0.2, "nll_weight": 0.1,
            "save_strategy": "steps", "save_steps": 1, "max_steps": 3, "lr_scheduler_type": "cosine"}  # fmt: skip
    out = tmp_path / "run"
    values = dpo_keys(base, world, out, **keys)
    killed = forked(train_all, [{**values, "kill": 2}])
    assert killed.codes == [-signal.SIGKILL], killed.stderr
    checkpoints = {p.name: (p / COMPLETE_MARKER).exists() for p in (out / "checkpoints").iterdir()}
    assert checkpoints == {"checkpoint-1": True, "checkpoint-2": False}
    shutil.copytree(out, tmp_path / "copy")

    train(build_recipe(values))  # goes on from step 1
    uninterrupted = train(build_recipe({**values, "output_dir": tmp_path / "whole"}))
    for name in (TENSORS_FILE, "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (uninterrupted / name).read_bytes()
    for field in ("loss", "learning_rate", "rewards/margins"):
        assert log_of(out, field) == log_of(uninterrupted, field)

    # Killed so early that no checkpoint is whole: from the start.
    shutil.rmtree(out)
    shutil.copytree(tmp_path / "copy", out)
    for marker in (out / "checkpoints").glob(f"*/{COMPLETE_MARKER}"):
        marker.unlink()
    train(build_recipe(values))
    assert (out / TENSORS_FILE).read_bytes() == (uninterrupted / TENSORS_FILE).read_bytes()
    assert log_of(out, "loss") == log_of(uninterrupted, "loss")


@pytest.mark.slow  # a killed run has more to restore
def test_stopped_by_hand_and_run_again(
    base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in a run on cached states, after its second checkpoint."""
    keys = {"tune_post_decoder": True, "tune_lm_head": True, "save_strategy": "steps", "save_steps": 2}
    recipe = recipe_for(base, world, tmp_path / "run", **keys)
    steps: list[int] = []
    compute_loss = training.RelookTrainer.compute_loss

    def interrupted(self: Any, *rest: Any, **more: Any) -> Any:
        steps.append(self.state.global_step)
        if steps == list(range(6)):
            raise KeyboardInterrupt
        return compute_loss(self, *rest, **more)

    monkeypatch.setattr(training.RelookTrainer, "compute_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    train(recipe)
    assert steps[6:] == [4, 5]
    uninterrupted = train(recipe_for(base, world, tmp_path / "whole", **keys))
    assert (tmp_path / "run" / TENSORS_FILE).read_bytes() == (uninterrupted / TENSORS_FILE).read_bytes()


def test_a_kill_before_the_last_file_is_made_up_for(base: Path, world: Path, tmp_path: Path) -> None:
    recipe = recipe_for(base, world, tmp_path / "run", tune_lm_head=True, max_steps=2)
    out = train(recipe)
    weights = (out / TENSORS_FILE).read_bytes()
    (out / "run.json").unlink()
    (out / TENSORS_FILE).write_bytes(weights[:100])
    train(recipe)
    assert (out / TENSORS_FILE).read_bytes() == weights
    assert (out / "run.json").exists()


# --- precision and recomputation


@pytest.mark.parametrize(("kind", "regime"), [("bf16", "both"), pytest.param("fp16", "lora", marks=pytest.mark.slow)])
def test_small_steps_are_kept_in_low_precision(
    kind: str, regime: str, base: Path, world: Path, tmp_path: Path, no_trunk_cache: None
) -> None:
    """A learning rate of 2e-6 moves weights of size 0.02 by less than a bf16 can hold: they must be float32."""
    keys = {**REGIMES[regime][0], "learning_rate": 2e-6, "max_steps": 2, kind: True}
    out = train(recipe_for(base, world, tmp_path / "run", **keys))
    assert log_of(out, "loss")[0] == pytest.approx(math.log(2), abs=2e-3)
    saved = load_file(out / "trained.safetensors") | (
        load_file(out / "adapter_model.safetensors") if regime == "lora" else {}
    )
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    if regime == "both":
        before = load_model(base, dtype={"bf16": "bfloat16", "fp16": "float16"}[kind]).model.lm_head.weight.float()
        moved = (saved["lm_head.weight"] - before).abs()
        assert 0 < moved.max() < 1e-5


@pytest.mark.slow
def test_recomputing_the_trunk_gives_the_same_training(
    base: Path, world: Path, tmp_path: Path, no_trunk_cache: None
) -> None:
    files = []
    for flag in (False, True):
        keys = {**REGIMES["lora"][0], "max_steps": 3, "gradient_checkpointing": flag}
        out = train(recipe_for(base, world, tmp_path / str(flag), **keys))
        files.append(load_file(out / "adapter_model.safetensors"))
    assert files[0].keys() == files[1].keys()
    assert all(torch.allclose(files[0][name], files[1][name], atol=1e-7) for name in files[0])


def test_equal_examples_share_their_reference(
    base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HA-DPO's mix has every description pair twice; items stay in the order of the examples."""
    counts: list[int] = []
    original = training.reference_log_probs

    def counted(policy: Policy, items: Any, *rest: Any) -> Any:
        counts.append(len(items))
        return original(policy, items, *rest)

    monkeypatch.setattr(training, "reference_log_probs", counted)
    bench = Bench(recipe_for(base, world, tmp_path, lora_enable=True, lora_r=4))
    assert counts == [18]
    assert [item.example for item in bench.items] == bench.examples
    assert len(bench.items) == 24


@pytest.mark.parametrize(
    "keys",
    [
        {"num_train_epochs": 0.3, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3, "data_seed": 5},
        {"max_steps": 2, "eval_fraction": 0.34},
    ],
    ids=str,
)
def test_only_what_a_short_run_reads_is_prepared(
    keys: dict[str, Any], base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are those of the order that accelerate draws, with everything prepared."""
    prepared: list[Example] = []
    read: list[Example] = []
    usual_references, usual_item = training.reference_log_probs, ItemDataset.__getitem__

    def references(policy: Policy, items: Any, *rest: Any) -> Any:
        prepared.extend(item.example for item in items)
        return usual_references(policy, items, *rest)

    def item(dataset: ItemDataset, index: int) -> Item:
        read.append(dataset.items[index].example)
        return usual_item(dataset, index)

    monkeypatch.setattr(training, "reference_log_probs", references)
    monkeypatch.setattr(ItemDataset, "__getitem__", item)
    short = train(recipe_for(base, world, tmp_path / "short", lora_enable=True, lora_r=4, lora_dropout=0.5, **keys))
    held_out = json.loads((short / "run.json").read_text())["held_out"]
    assert bool(held_out) == ("eval_fraction" in keys)
    assert set(read) <= set(prepared)
    assert len(prepared) < 15  # of 18
    unread_images = {image for example in set(prepared) - set(read) for image in example.images}
    assert len(unread_images) == 2 * bool(held_out)

    def to_the_end(_: Recipe, arguments: TrainingArguments, items: list[Item], steps: int) -> Sampler[int]:
        return SeedableRandomSampler(items, data_seed=arguments.data_seed)

    monkeypatch.setattr(training, "training_sampler", to_the_end)
    prepared.clear()
    whole = train(recipe_for(base, world, tmp_path / "whole", lora_enable=True, lora_r=4, lora_dropout=0.5, **keys))
    assert len(prepared) == 18
    name = "adapter_model.safetensors"
    torch.testing.assert_close(load_file(short / name), load_file(whole / name), rtol=0, atol=1e-6)
