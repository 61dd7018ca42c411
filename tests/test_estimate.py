"""`relook estimate` against real steps: what autograd saves, what model and optimizer hold, what a cache weighs."""

from __future__ import annotations

import functools
import json
import shutil
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Command
from helpers.tiny import dpo_keys, sft_keys
from helpers.variants import crossed
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel, LlavaConfig
from typer.testing import CliRunner

from relook.cli import app
from relook.errors import RelookError
from relook.estimate.memory import BatchCounts, Job, decoder_layer_bytes, saved_within_budget, strategies
from relook.estimate.run import (
    GIB,
    AssumedData,
    DataLengths,
    build_job,
    build_meta_policy,
    build_on_meta,
    choose,
    estimate,
    largest_batches,
    open_meta_model,
    read_lengths,
)
from relook.files import write_json
from relook.forward.collate import Collator, Item
from relook.forward.packed_attention import ATTENTION_INPUTS, MLP_INPUTS, fuse_lora
from relook.forward.policy import Policy
from relook.model.load import HeadModel
from relook.recipe import Recipe, build_recipe, parse_overrides, read_yaml_or_shipped
from relook.train.feature_cache import cache_vision_features
from relook.train.metrics import StepCosts
from relook.train.run import build_policy, encode_samples, load_for_training, prepare_items, read_samples, train

NAMES = (*ATTENTION_INPUTS, "o_proj", *MLP_INPUTS, "down_proj")
WIDTH, INNER, ROW = 32, 80, 48  # of the layers below
PARTITIONED = "aot_eager_decomp_partition"  # torch.compile with everything but generated code
WORDS, PATCHES = 107, 36  # of toyworld's model


class Held:
    """A saved tensor, as long as the graph that needs it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def saved(owned: list[Tensor]) -> Iterator[list[weakref.ref[Held]]]:
    """What autograd saves meanwhile, but for what a model owns."""
    references: list[weakref.ref[Held]] = []
    model_storages = {tensor.untyped_storage().data_ptr() for tensor in owned}

    def keep(tensor: Tensor) -> Held:
        held = Held(tensor)
        if tensor.untyped_storage().data_ptr() not in model_storages:
            references.append(weakref.ref(held))
        return held

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held.tensor):
        yield references


def size(references: list[weakref.ref[Held]]) -> int:
    """Bytes of what is still needed, memory that several tensors share counted once."""
    storages = [held.tensor.untyped_storage() for held in (ref() for ref in references) if held is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


# --- a decoder layer


def language_model(layers: int, kind: str, dtype: torch.dtype, kv_heads: int, lora: dict[str, Any]) -> Any:
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        vocab_size=8,
        attn_implementation="sdpa",
    )
    model = LlamaModel(config).to(dtype).train()
    model.requires_grad_(kind == "full")
    if kind == "lora":
        get_peft_model(model, LoraConfig(**{"r": 6, "target_modules": list(NAMES), **lora}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def kept_by_a_layer(
    kind: str, dtype: torch.dtype, kv_heads: int, lora: dict[str, Any], backend: str = "", row: int = ROW
) -> int:
    """What three layers keep more than two; compiled ones with a causal SDPA that takes no mask."""
    sizes = []
    torch._dynamo.reset()  # else it gives up after some models
    for layers in (2, 3):
        model = language_model(layers, kind, dtype, kv_heads, lora)
        if backend:
            fuse_lora(model.layers)
            for i, layer in enumerate(model.layers):
                model.layers[i] = torch.compile(layer, backend=backend, dynamic=False)
        embeds = torch.randn(1, row, WIDTH, dtype=torch.float32 if kind == "full" else dtype)
        embeds.requires_grad_(kind == "frozen")  # a projector below trains
        mask = None if backend else torch.ones(row, row, dtype=torch.bool).tril()[None, None]
        low = torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32)
        with saved(list(model.parameters())) as references, low:
            output = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        assert output.last_hidden_state.requires_grad  # and holds the graph
        sizes.append(size(references))
    return sizes[1] - sizes[0]


ATTENTION_ONLY = {"target_modules": ["q_proj", "v_proj"]}
NO_ATTENTION = {"target_modules": ["gate_proj", "down_proj"]}


LAYERS = [
    ("lora", 4, {}),
    ("lora", 2, {"r": 3}),
    ("full", 4, {}),
    ("lora", 4, ATTENTION_ONLY),
    ("lora", 4, {"use_dora": True}),
    ("frozen", 2, {}),
    ("lora", 4, NO_ATTENTION),
]


@pytest.mark.parametrize(("layer", "dtype"), crossed(LAYERS, [torch.bfloat16, torch.float32]))
def test_a_layer_keeps_what_is_said(layer: tuple[str, int, dict[str, Any]], dtype: torch.dtype) -> None:
    kind, kv_heads, lora = layer
    model, low = language_model(1, kind, dtype, kv_heads, lora), dtype.itemsize
    attention, mlp = decoder_layer_bytes(
        model.layers[0], model.config, ROW, "dense", low, mixed_precision=low < 4, dropout=0.0
    )
    real = kept_by_a_layer(kind, dtype, kv_heads, lora)
    tolerance = 0.05 if lora.get("use_dora") else 0.005  # DoRA's norms and scales, (out,) each, are left out
    assert attention.of(ROW) + mlp.of(ROW) == pytest.approx(real, rel=tolerance)


@pytest.mark.slow  # torch compiles: half a minute
@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("lora", {}),
        ("lora", ATTENTION_ONLY),
        ("lora", NO_ATTENTION),
        ("lora", {"lora_dropout": 0.1}),
        ("lora", {"use_dora": True}),
        ("full", {}),
        ("frozen", {}),
    ],
    ids=str,
)
def test_a_compiled_layer_keeps_what_is_said(kind: str, lora: dict[str, Any]) -> None:
    """By the partitioner that Inductor uses, and on budgets."""
    model, row = language_model(1, kind, torch.bfloat16, 4, lora), 512
    dropout = lora.get("lora_dropout", 0.0)
    attention, mlp = decoder_layer_bytes(
        model.layers[0], model.config, row, "compiled", 2, mixed_precision=True, dropout=dropout
    )
    real = kept_by_a_layer(kind, torch.bfloat16, 4, lora, PARTITIONED, row)
    # Inductor sees that casting the attention's output to float32 and back changes nothing; this backend does not.
    copied = WIDTH * 2 if kind == "lora" and not dropout and "o_proj" in lora.get("target_modules", NAMES) else 0
    tolerance = 0.15 if lora.get("use_dora") else 0.01
    assert attention.of(row) + mlp.of(row) == pytest.approx(real - copied * row, rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.9, 0.75, 0.5, 0.25])
@pytest.mark.parametrize(("kind", "lora"), [("lora", {}), ("full", {})], ids=str)
def test_a_budget_is_kept(kind: str, lora: dict[str, Any], budget: float) -> None:
    model, row = language_model(1, kind, torch.bfloat16, 4, lora), 1024
    attention, mlp = decoder_layer_bytes(
        model.layers[0], model.config, row, "compiled", 2, mixed_precision=True, dropout=0.0
    )
    with torch._functorch.config.patch(activation_memory_budget=budget):
        real = kept_by_a_layer(kind, torch.bfloat16, 4, lora, PARTITIONED, row)
    estimated = saved_within_budget(budget, row * WIDTH * (4 if kind == "full" else 2), (attention, row), (mlp, row))
    assert estimated == pytest.approx(real, abs=0.07 * (attention.of(row) + mlp.of(row)))  # a tensor is kept or not


# --- a step


def planned(recipe: Recipe) -> Job:
    source = open_meta_model(recipe)
    policy = build_meta_policy(recipe, build_on_meta(recipe, source), sharded=False)
    return build_job(recipe, policy, read_lengths(recipe, source, policy.core, AssumedData()), 80, 1, sharded=False)


REGIMES: dict[str, dict[str, Any]] = {
    "head": {"tune_lm_head": True},
    "post decoder": {"tune_post_decoder": True},
    "post decoder and head": {"tune_post_decoder": True, "tune_lm_head": True, "post_decoder.depth": 2},
    "twice aligned": {"tune_post_decoder": True, "post_decoder.align": "mlp_twice", "post_decoder.align_size": 24},
    "no image": {"tune_post_decoder": True, "post_decoder.attention": "none"},
    "self-attention": {"tune_post_decoder": True, "post_decoder.attention": "self_cross"},
    "not cached": {"tune_post_decoder": True, "feature_cache": "off"},
    "projector": {"tune_mm_mlp_adapter": True},
    "lora": {"lora_enable": True, "lora_r": 8},
    "lora and post decoder": {"lora_enable": True, "lora_r": 8, "tune_post_decoder": True},
    "recomputed lora": {"lora_enable": True, "lora_r": 8, "gradient_checkpointing": True},
    "full": {},
    "tower": {"tune_vision_tower": True, "tune_lm_head": True},
}
CONTAINED = ("head", "post decoder", "not cached", "lora")  # of which another regime trains all, and more


@pytest.mark.usefixtures("no_trunk_cache")
@pytest.mark.parametrize(
    ("regime", "dtype"),
    [
        *((regime, torch.float32) for regime in REGIMES if regime not in CONTAINED),
        *(pytest.param(regime, torch.float32, marks=pytest.mark.slow) for regime in CONTAINED),
        # LayerNorm, which the post decoder has, stays in bfloat16 on a CPU; CUDA's autocast takes float32.
        *((regime, torch.bfloat16) for regime in ("lora", "tower")),
        *(pytest.param(regime, torch.bfloat16, marks=pytest.mark.slow) for regime in ("projector", "full")),
    ],
    ids=str,
)
def test_a_step_keeps_what_is_said(base: Path, world: Path, tmp_path: Path, regime: str, dtype: torch.dtype) -> None:
    keys = {"trunk_pass": "dense", "bf16": dtype == torch.bfloat16, **REGIMES[regime]}
    recipe = build_recipe(dpo_keys(base, world, tmp_path / "run", **keys))
    build_whole = lambda: build_policy(recipe, load_for_training(recipe, dtype, "cpu"), dtype)  # noqa: E731
    loaded = load_for_training(recipe, dtype, "cpu", trunk=not recipe.cached_trunk)
    examples, _ = encode_samples(recipe, loaded, *read_samples(recipe))
    policy = build_policy(recipe, loaded, dtype)
    collator = Collator(policy, loaded.images, loaded.pad_id)
    items = prepare_items(recipe, policy, examples, collator, 4, build_whole)[:12]
    policy.train()
    if "recomputed" in regime:
        policy.activation_checkpointing_enable()
    batch = collator(items)["batch"]
    with saved(list(policy.parameters())) as references:
        log_probs = policy(batch)
    real = size(references) - len(log_probs) * WORDS * dtype.itemsize  # the logits are counted by themselves

    rows = [PATCHES * len(item.example.images) for item in items]
    counts = BatchCounts.of([item.example for item in items], rows, policy)
    # What is not said are indices (8 bytes a target), and in the first layer that nothing before it trains.
    assert replace(planned(recipe), batch=counts).saved_bytes == pytest.approx(real, rel=0.05)


@pytest.mark.parametrize(
    ("size", "keys"),
    [
        (1, {}),
        pytest.param(2, {"feature_cache": "off"}, marks=pytest.mark.slow),
        (8, {"tune_post_decoder": True}),
    ],
    ids=str,
)
def test_work_is_that_of_real_batches(size: int, keys: dict[str, Any], base: Path, world: Path, tmp_path: Path) -> None:
    keys = {**REGIMES["lora"], **keys, "trunk_pass": "flex", "per_device_train_batch_size": size}
    recipe = build_recipe(dpo_keys(base, world, tmp_path / "run", **keys))
    loaded = load_for_training(recipe, torch.float32, "cpu")
    examples, _ = encode_samples(recipe, loaded, *read_samples(recipe))
    policy = build_policy(recipe, loaded, torch.float32)
    collator = Collator(policy, loaded.images, loaded.pad_id)
    collator.vision_features = cache_vision_features(recipe, policy, examples, loaded.images)
    items, costs = [Item(example) for example in examples], StepCosts.of(policy)
    real = sum(costs.flops(collator(items[start : start + size])["work"]) for start in range(0, len(items), size))
    estimated = estimate(recipe)["work"]
    assert estimated["step_tflop"] == pytest.approx(real / len(items) / 1e12, rel=2e-3)
    tower = costs.vision_tower * PATCHES / 1e12
    alone = build_recipe({**dpo_keys(base, world, tmp_path / "run", **keys), "loss_type": "simpo", "beta": 2.0})
    before = estimate(alone)["work"]["before_tflop"]  # no reference: the tower at most
    assert before == (0 if "feature_cache" in keys else pytest.approx(tower, rel=1e-3))


# --- what a run holds


@pytest.mark.parametrize("regime", ["post decoder and head", "lora", "full"])
def test_weights_gradients_and_optimizer_of_a_real_step(base: Path, world: Path, tmp_path: Path, regime: str) -> None:
    recipe = build_recipe(dpo_keys(base, world, tmp_path / "run", bf16=True, **REGIMES[regime]))
    policy = build_policy(recipe, load_for_training(recipe, torch.bfloat16, "cpu"), torch.bfloat16)
    parameters = list((policy.core if not recipe.cached_trunk else HeadModel(policy.core)).parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained, fused=True)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    projector = list(policy.core.model.multi_modal_projector.parameters()) if recipe.cached_trunk else []

    (way,) = [way for name, way in estimate(recipe)["ways"].items() if name == "one GPU"]
    tower = (
        list(policy.core.model.vision_tower.parameters()) if recipe.encodes_images_once else []
    )  # it rests on the CPU
    assert way["parts"]["weights"] == sum(p.nbytes for p in (*parameters, *projector)) - sum(p.nbytes for p in tower)
    assert way["largest"]["gradients"] == sum(p.grad.nbytes for p in trained if p.grad is not None)
    assert way["parts"]["optimizer"] == sum(t.nbytes for t in moments)


def test_several_gpus_share_by_the_rules_of_zero(tmp_path: Path, base: Path, world: Path) -> None:
    keys = dpo_keys(base, world, tmp_path / "run", bf16=True, **REGIMES["lora"], deepspeed="zero3")
    estimated = estimate(build_recipe(keys), gpus=4)
    ways, trained, everything = estimated["ways"], estimated["parameters"]["trained"], estimated["parameters"]["all"]
    assert list(ways) == ["ZeRO-3", "DDP", "FSDP2", "ZeRO-2", "ZeRO-2, offload", "ZeRO-3, offload"]
    parts = {name: way["largest"] for name, way in ways.items()}
    assert parts["DDP"]["weights"] == 2 * (everything - trained) + 4 * trained
    assert parts["DDP"]["optimizer"] == 8 * trained
    assert parts["FSDP2"]["optimizer"] == 8 * trained // 4
    assert parts["ZeRO-2"]["weights"] == 2 * everything
    assert parts["ZeRO-3"]["weights"] == 2 * everything // 4
    assert parts["ZeRO-2"]["optimizer"] == parts["ZeRO-3"]["optimizer"] == 12 * trained // 4
    assert parts["ZeRO-3, offload"]["weights"] == parts["ZeRO-3, offload"]["optimizer"] == 0
    assert ways["ZeRO-3, offload"]["processor"] == 2 * everything // 4 + 12 * trained // 4 + 4 * trained // 4


@pytest.mark.usefixtures("no_trunk_cache")
def test_the_cache_weighs_what_is_said(base: Path, world: Path, tmp_path: Path) -> None:
    keys = {"feature_cache": "disk", "max_steps": 1, "trunk_pass": "dense", **REGIMES["post decoder"]}
    recipe = build_recipe(dpo_keys(base, world, tmp_path / "run", **keys))
    estimated = estimate(recipe)["trunk_cache"]
    train(recipe)
    assert Path(estimated["where"]) == tmp_path / "trunk_cache"
    tensors = [t for file in Path(estimated["where"]).rglob("*.safetensors") for t in load_file(file).values()]
    assert estimated["bytes"] == sum(tensor.nbytes for tensor in tensors)


# --- LLaVA-1.5-7B's shape


@pytest.fixture(scope="module")
def seven_billion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config alone, as `benchmarks/frozen_trunk.py` has it."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=336, patch_size=14),
        text_config=LlamaConfig(**text, vocab_size=32064, max_position_embeddings=4096),
        image_seq_length=576,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    folder = tmp_path_factory.mktemp("7b")
    write_json(folder / "config.json", config.to_dict())
    return folder


@functools.cache
def shown(*words: str) -> Any:
    result = CliRunner().invoke(app, ["estimate", *words], catch_exceptions=False)
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("recipe", "measured"),
    # benchmarks/RESULTS.md, one H100, 380 pairs of 619 + 110 + 110 positions, 64 a step: 5.0 and 11.1 GiB. Of both,
    # 0.37 were float32 rows of logits (3 of 1024 x 32064), which compiled log-probs do without since. Of the first,
    # 0.42 were vision features that the job before had left on the GPU.
    [pytest.param("head", 5.0 - 0.37 - 0.42, marks=pytest.mark.slow), ("post-decoder", 11.1 - 0.37)],
)
def test_what_an_h100_measured(seven_billion: Path, recipe: str, measured: float) -> None:
    words = ["--prompt-tokens", "43", "--samples", "380", "--per_device_train_batch_size", "64"]
    estimated = shown(recipe, "--model_name_or_path", str(seven_billion), *words)
    assert estimated["ways"]["one GPU"]["peak"] / GIB == pytest.approx(measured, rel=0.1)
    assert "assumed" in estimated["lengths"]
    if recipe == "post-decoder":
        assert estimated["ways"]["one GPU"]["before"] / GIB == pytest.approx(19.5, rel=0.1)


@pytest.mark.parametrize(
    ("share", "measured"),
    [(0, 27.2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0.25, 25.1), (0.43, 23.4)))],
)
def test_what_an_h200_measured_of_activations_that_leave(seven_billion: Path, share: float, measured: float) -> None:
    """benchmarks/RESULTS.md: LoRA of rank 128, 8 pairs a step by four."""
    words = ["--gradient_checkpointing", "false", "--per_device_train_batch_size", "4", "--prompt-tokens", "43"]
    words += ["--samples", "64"]
    more = ["--gradient_accumulation_steps", "2", "--activation_offloading", str(share)]
    way = shown("hadpo-lora", "--model_name_or_path", str(seven_billion), *words, *more)["ways"]["one GPU"]
    assert way["peak"] / GIB == pytest.approx(measured, rel=0.03)
    assert (way["processor"] > 0) == (share > 0)


@pytest.mark.slow
def test_what_leaves_comes_back_beside_gradients(seven_billion: Path) -> None:
    """Without gradients of micro-batches before, a step's peak is when the last layer that left has come back: as many
    layers are there as at the beginning, whole ones, and the gradients of those that are done."""
    words = ["--gradient_checkpointing", "false", "--per_device_train_batch_size", "4", "--prompt-tokens", "43"]
    words += ["--samples", "64"]
    model = ["hadpo-lora", "--model_name_or_path", str(seven_billion), *words]
    resident, offloaded = (shown(*model, "--activation_offloading", share)["ways"]["one GPU"] for share in ("0", "0.5"))
    assert resident["parts"]["gradients"] == 0
    assert offloaded["parts"]["gradients"] == pytest.approx(resident["largest"]["gradients"] / 2, rel=1e-3)
    assert offloaded["parts"]["activations"] > resident["parts"]["activations"] / 2
    assert offloaded["processor"] == pytest.approx(resident["parts"]["activations"] / 2, rel=0.05)


@pytest.mark.slow
def test_a_card_of_24_gib(seven_billion: Path) -> None:
    """QLoRA with recomputation fits; without it, it does not."""
    model = ["--model_name_or_path", str(seven_billion), "--gpu-memory", "24", "--per_device_train_batch_size", "8"]
    model += ["--samples", "64"]
    quantised = shown("hadpo-lora", *model, "--bits", "4")
    way = quantised["ways"]["one GPU"]
    # 6.476e9 weights of 4 bits and their scales, the rest in bf16; LoRA in float32.
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    trained = quantised["parameters"]["trained"]
    with torch.device("meta"):
        tower = CLIPVisionModel(AutoConfig.from_pretrained(seven_billion).vision_config)  # it rests on the CPU
    rest = quantised["parameters"]["all"] - trained - linear - sum(p.numel() for p in tower.parameters())
    assert way["parts"]["weights"] == pytest.approx(linear * (0.5 + 1 / 64) + 2 * rest + 4 * trained, rel=0.01)
    assert way["fits"]
    not_recomputed = shown("hadpo-lora", *model, "--bits", "4", "--gradient_checkpointing", "false")
    assert not not_recomputed["ways"]["one GPU"]["fits"]
    assert not_recomputed["work"]["step_tflop"] < quantised["work"]["step_tflop"]  # without what is computed again


def test_times_follow_the_speed(base: Path) -> None:
    """Ten steps of 8 pairs, accumulated twice, on each of 4 GPUs, at the speed of 4."""
    model = ["--model_name_or_path", str(base), "--per_device_train_batch_size", "8", "--tflops", "0.001"]
    model += ["--samples", "64"]
    work = shown("hadpo-lora", *model)["work"]
    assert work["training_seconds"] == pytest.approx(work["step_tflop"] * 64 / 0.001, rel=1e-3)
    steps = ["--gpus", "4", "--max_steps", "10", "--gradient_accumulation_steps", "2"]
    short = shown("hadpo-lora", *model, *steps)["work"]
    assert short["training_seconds"] == pytest.approx(short["step_tflop"] * 10 * 8 * 2 / 0.001, rel=1e-3)


# --- the command


def test_a_config_is_enough_and_says_the_same(base: Path, world: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(base / "config.json", alone)
    estimates = [
        estimate(
            build_recipe(dpo_keys(folder, world / "nowhere", tmp_path / "run", **REGIMES["lora"])),
            assumed=AssumedData(samples=64),
        )
        for folder in (base, alone)
    ]
    assert estimates[0]["ways"] == estimates[1]["ways"]
    assert "There is no" in estimates[0]["lengths"]


def original(folder: Path, tower: str, width: int = 1024) -> Path:
    """A folder with the config.json of liuhaotian's LLaVA-1.5-7B alone."""
    text = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    vision = {"mm_hidden_size": width, "mm_vision_tower": tower, "mm_vision_select_layer": -2}
    settings = {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "vocab_size": 32000}
    write_json(
        folder / "config.json", text | vision | settings | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
    )
    return folder


def test_the_originals_config_alone_is_enough(tmp_path: Path) -> None:
    """By its tower's name, as with the tower's own config; what a name does not say is assumed, and said."""
    model = original(tmp_path / "llava", "openai/clip-vit-large-patch14-336")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {**sizes, "image_size": 336, "patch_size": 14}
    write_json(tmp_path / "clip" / "config.json", {"model_type": "clip", "vision_config": vision})
    estimates = [
        shown("post-decoder", "--model_name_or_path", str(model), "--samples", "8", *tower)
        for tower in ([], ["--vision_tower", str(tmp_path / "clip")])
    ]
    assert {**estimates[0], "recipe": ""} == {**estimates[1], "recipe": ""}
    assert estimates[0]["tower"] == ""
    assert "576 positions of an image" in estimates[0]["lengths"]
    small = original(tmp_path / "b", "me/vit-patch14-56", 64)
    other = shown("post-decoder", "--model_name_or_path", str(small), "--samples", "8")
    assert "16 positions of an image" in other["lengths"]
    assert "24 layers of width 64 are assumed" in other["tower"]
    result = CliRunner().invoke(
        app, ["estimate", "head", "--model_name_or_path", str(original(tmp_path / "c", "me/x"))]
    )
    assert "Pass its folder as vision_tower" in str(result.exception)


@pytest.mark.parametrize("recipe", ["head", "hadpo-lora", "toyworld-base"])
def test_no_placeholder_is_shown(recipe: str, base: Path) -> None:
    words = ["estimate", recipe, "--model_name_or_path", str(base), "--samples", "9"]
    words += ["--feature_cache", "disk" if recipe == "head" else "auto"]
    text = CliRunner().invoke(app, words, catch_exceptions=False).stdout
    assert "not-given" not in text
    assert "The recipe names no " in text
    assert "trunk_cache beside output_dir" in text or recipe != "head"


Paper = tuple[dict[str, Any], Policy, Policy, DataLengths]


@pytest.fixture(scope="module")
def papers(seven_billion: Path) -> dict[str, Paper]:
    """LLaVA-1.5-7B under shipped recipes, as one GPU and as several have it."""
    by_recipe = {}
    for name in ("hadpo-lora", "head"):
        values = {key: value for key, value in read_yaml_or_shipped(name, "recipe").items() if value}
        values |= {"model_name_or_path": str(seven_billion), **dict.fromkeys(("output_dir", "vg_path"), "nowhere")}
        recipe = build_recipe({**values, "desc_data_path": "nowhere"})
        source = open_meta_model(recipe)
        model = build_on_meta(recipe, source)
        unsharded, sharded_policy = (build_meta_policy(recipe, model, sharded) for sharded in (False, True))
        lengths = read_lengths(recipe, source, unsharded.core, AssumedData(samples=250))
        by_recipe[name] = {**values, "desc_data_path": "nowhere"}, unsharded, sharded_policy, lengths
    return by_recipe


@pytest.mark.parametrize(
    ("recipe", "keys", "memory", "gpus", "way", "flags"),
    [
        ("hadpo-lora", {}, 80, 1, "one GPU", "--gradient_checkpointing false"),
        pytest.param(
            *("hadpo-lora", {}, 22, 1, "one GPU", "--per_device_train_batch_size 8 --gradient_accumulation_steps 2"),
            marks=pytest.mark.slow,
        ),
        ("hadpo-lora", {}, 17, 8, "FSDP2", "--fsdp true"),
        ("hadpo-lora", {}, 12, 1, "one GPU", "--bits 4"),
        pytest.param(*("hadpo-lora", {"deepspeed": "zero3"}, 24, 2, "DDP", "--deepspeed null"), marks=pytest.mark.slow),
        ("head", {}, 24, 1, "one GPU", ""),
        ("head", {}, 2, 1, "", ""),
    ],
)
def test_what_is_chosen_fits_and_no_larger_batch_does(
    recipe: str, keys: dict[str, Any], memory: float, gpus: int, way: str, flags: str, papers: dict[str, Paper]
) -> None:
    values, unsharded, sharded, lengths = papers[recipe]

    def jobs_of(recipe: Recipe) -> list[Job]:
        return [
            build_job(recipe, policy, lengths, memory, gpus, sharded=policy is sharded)
            for policy in (unsharded, sharded)
        ]

    requested = build_recipe(values | keys)
    job, apart = jobs_of(requested)
    largest = largest_batches(requested, job, apart, lengths, memory, gpus)
    chosen = choose(requested, job, apart, lengths, memory, gpus, largest)
    assert chosen.way == way
    assert chosen.flags.startswith(flags)

    def fits(size: int | None = None) -> bool:
        """By the recipe as its command line would have it, and a batch."""
        sized = {"per_device_train_batch_size": size} if size else {}
        changed = build_recipe(values | keys | parse_overrides(chosen.flags.split()) | sized)
        return next(
            strategy.fits(memory * GIB) for strategy in strategies(*jobs_of(changed), gpus) if strategy.name == way
        )

    if way:
        assert fits()
        assert fits(chosen.largest_batch)
        assert chosen.largest_batch == lengths.total // gpus or not fits(chosen.largest_batch + 1)
    else:
        assert chosen.largest_batch == 0
        assert set(largest.values()) == {0}


def test_the_table_says_what_decides_and_what_to_choose(
    relook: Command, seven_billion: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    words = ["hadpo-lora", "--model_name_or_path", str(seven_billion), "--gpus", "2", "--gpu-memory", "24"]
    text = relook("estimate", *words, "--deepspeed=zero3").out
    assert "before decides, not training: ZeRO-3, offload." in text
    assert [line.split()[-1] for line in text.splitlines() if line.startswith(("FSDP2", "ZeRO-2 ", "DDP"))]
    command = next(line for line in text.splitlines() if line.startswith("  torchrun"))
    assert command.startswith("  torchrun --nproc_per_node 2 -m relook.train hadpo-lora --model_name_or_path")
    assert command.count("--deepspeed") == 1
    assert "--deepspeed null" in command


def test_lengths_are_those_of_the_data(base: Path, world: Path, tmp_path: Path) -> None:
    estimated = estimate(build_recipe(sft_keys(base, world, tmp_path / "run")))
    assert "in the recipe's data" in estimated["lengths"]
    assert estimated["batch"]["trees"] == 4
    assert estimated["batch"]["images"] <= 4


def test_a_run_and_what_it_measured(
    relook: Command, base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's folder stands for its base with its post decoder; a finished run's peak is shown beside what is said."""
    keys = dpo_keys(base, world, tmp_path / "run", max_steps=1, **REGIMES["post decoder"])
    train(build_recipe(keys))
    on_it = build_recipe(dpo_keys(tmp_path / "run", world, tmp_path / "next", tune_lm_head=True))
    assert estimate(on_it)["model"] == "RelookLlavaForConditionalGeneration"
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    write_json(tmp_path / "run" / "run.json", {**record, "log": [{"peak_memory_gib": 0.5}, {"loss": 1}]})
    assert estimate(build_recipe(keys))["measured_gib"] == 0.5
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    text = relook("estimate", "post-decoder", *words, "--bf16", "false").out
    assert "measured in the finished run: 0.50 GiB" in text
    assert "one GPU" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_name_or_path", "nowhere"], "There is no model folder nowhere"),
        (["--gpus", "0", "--model_name_or_path", "x"], "Give one GPU at least"),
        (["--tflops", "-1", "--model_name_or_path", "x"], "sizes above 0"),
        (["--samples", "0", "--model_name_or_path", "x"], "0 samples of 50 and 110 tokens. Give 1 or more"),
        (["--lora_rank", "3", "--model_name_or_path", "x"], "no recipe key 'lora_rank'"),
        ([], "sets no model_name_or_path"),
    ],
    ids=str,
)
def test_mistakes_are_named(words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["estimate", "hadpo-lora", *words])
    assert isinstance(result.exception, RelookError)
    assert message in str(result.exception)
