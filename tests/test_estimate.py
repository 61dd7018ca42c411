"""`relook estimate` against real steps: what autograd saves, what a model and an optimizer hold, what a cache weighs."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import dpo_keys, sft_keys
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlamaModel, LlavaConfig
from typer.testing import CliRunner

from relook.cli import app
from relook.errors import RelookError
from relook.estimate import GIB, Assumed, estimate, job_of, open_on_paper, read_lengths, whole_policy
from relook.files import write_json
from relook.recipe import Recipe, build_recipe
from relook.train.activations import NAMES, Counts, decoder_layer
from relook.train.batches import Collator
from relook.train.cache import TrunkCache
from relook.train.memory import Job
from relook.train.preference import preference_loss
from relook.train.run import encode_samples, load, policy_of, prepare, read_samples, train

WIDTH, INNER, ROW = 32, 80, 48  # of the layers below
WORDS, PATCHES = 90, 36  # of toyworld's model


class Held:
    """A saved tensor, as long as the graph that needs it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextmanager
def saved(owned: list[Tensor]) -> Iterator[list[weakref.ref[Held]]]:
    """What autograd saves meanwhile, but for what a model owns."""
    found: list[weakref.ref[Held]] = []
    own = {tensor.untyped_storage().data_ptr() for tensor in owned}

    def keep(tensor: Tensor) -> Held:
        held = Held(tensor)
        if tensor.untyped_storage().data_ptr() not in own:
            found.append(weakref.ref(held))
        return held

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda held: held.tensor):
        yield found


def size(found: list[weakref.ref[Held]]) -> int:
    """Bytes of what is still needed, memory that several tensors share counted once."""
    storages = [held.tensor.untyped_storage() for held in (ref() for ref in found) if held is not None]
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


def kept_by_a_layer(kind: str, dtype: torch.dtype, kv_heads: int, lora: dict[str, Any], backend: str = "") -> int:
    """What three layers keep more than two."""
    sizes = []
    torch._dynamo.reset()  # else it gives up after some models
    for layers in (2, 3):
        model = language_model(layers, kind, dtype, kv_heads, lora)
        if backend:
            for i, layer in enumerate(model.layers):
                model.layers[i] = torch.compile(layer, backend=backend, dynamic=False)
        embeds = torch.randn(1, ROW, WIDTH, dtype=torch.float32 if kind == "full" else dtype)
        embeds.requires_grad_(kind == "frozen")  # a projector below trains
        mask = torch.ones(ROW, ROW, dtype=torch.bool).tril()[None, None]
        low = torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32)
        with saved(list(model.parameters())) as found, low:
            output = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False)
        assert output.last_hidden_state.requires_grad  # and holds the graph
        sizes.append(size(found))
    return sizes[1] - sizes[0]


ATTENTION_ONLY = {"target_modules": ["q_proj", "v_proj"]}
NO_ATTENTION = {"target_modules": ["gate_proj", "down_proj"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "kv_heads", "lora"),
    [
        ("lora", 4, {}),
        ("lora", 2, {"r": 3}),
        ("lora", 4, ATTENTION_ONLY),
        ("lora", 4, NO_ATTENTION),
        ("lora", 4, {"use_dora": True}),
        ("full", 4, {}),
        ("frozen", 2, {}),
    ],
    ids=str,
)
def test_a_layer_keeps_what_is_said(dtype: torch.dtype, kind: str, kv_heads: int, lora: dict[str, Any]) -> None:
    model, low = language_model(1, kind, dtype, kv_heads, lora), dtype.itemsize
    kept = decoder_layer(model.layers[0], model.config, ROW, "dense", low, mixed=low < 4, dropout=0.0)
    real = kept_by_a_layer(kind, dtype, kv_heads, lora)
    tolerance = 0.05 if lora.get("use_dora") else 0.005  # DoRA's norms and scales, (out,) each, are left out
    assert kept.each * ROW + kept.fixed == pytest.approx(real, rel=tolerance)


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
    """By the partitioner that Inductor uses. With SDPA its mask and, for LoRA, the output's transpose are kept too."""
    model = language_model(1, kind, torch.bfloat16, 4, lora)
    dropout = lora.get("lora_dropout", 0.0)
    kept = decoder_layer(model.layers[0], model.config, ROW, "compiled", 2, mixed=True, dropout=dropout)
    real = kept_by_a_layer(kind, torch.bfloat16, 4, lora, "aot_eager_decomp_partition")
    copied = WIDTH * 2 if kind == "lora" and not dropout and "o_proj" in lora.get("target_modules", NAMES) else 0
    tolerance = 0.15 if lora.get("use_dora") else 0.01
    assert kept.each * ROW + kept.fixed == pytest.approx(real - (ROW * 2 + copied) * ROW, rel=tolerance)


# --- a step


def on_paper(recipe: Recipe) -> Job:
    source = open_on_paper(recipe)
    whole = whole_policy(recipe, source, sharded=False)
    return job_of(recipe, whole, read_lengths(recipe, source, Assumed()), 80, sharded=False)


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
}


@pytest.mark.usefixtures("no_trunk_cache")
@pytest.mark.parametrize(
    ("regime", "dtype"),
    [
        *((regime, torch.float32) for regime in REGIMES),
        # LayerNorm, which the post decoder has, stays in bfloat16 on a CPU; CUDA's autocast takes float32.
        *((regime, torch.bfloat16) for regime in ("head", "projector", "lora", "recomputed lora", "full")),
    ],
    ids=str,
)
def test_a_step_keeps_what_is_said(base: Path, world: Path, tmp_path: Path, regime: str, dtype: torch.dtype) -> None:
    keys = {"trunk_pass": "dense", "bf16": dtype == torch.bfloat16, **REGIMES[regime]}
    recipe = build_recipe(dpo_keys(base, world, tmp_path / "run", **keys))
    whole = lambda: policy_of(recipe, load(recipe, dtype, "cpu"), dtype)  # noqa: E731
    loaded = load(recipe, dtype, "cpu", trunk=not recipe.cached_trunk)
    examples, _ = encode_samples(recipe, loaded, *read_samples(recipe))
    policy = policy_of(recipe, loaded, dtype)
    collator = Collator(policy, loaded.images, loaded.pad_id)
    items = prepare(recipe, policy, examples, collator, 4, whole)[:12]
    policy.train()
    if "recomputed" in regime:
        policy.activation_checkpointing_enable()
    batch = collator(items)["batch"]
    with saved(list(policy.parameters())) as found:
        log_probs = policy(batch)
    real = size(found) - len(log_probs) * WORDS * dtype.itemsize  # the logits are counted by themselves

    rows = [PATCHES * len(item.example.images) for item in items]
    counts = Counts.of([item.example for item in items], rows, "dense", policy.keeps_everything)
    # What is not said are indices (8 bytes a target), and in the first layer that nothing before it trains.
    assert replace(on_paper(recipe), batch=counts).kept == pytest.approx(real, rel=0.05)
