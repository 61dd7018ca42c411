"""LoRA as compiled layers compute it, against peft's own way on the same weights."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers.tiny import tilted
from helpers.variants import variants
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear
from test_packing import PAD, flex_attention_by_sdpa, row
from torch import Tensor
from torch._functorch.aot_autograd import aot_module_simplified
from transformers import LlamaConfig, LlamaModel

from relook.data.packing import Tree, pack, round_up_to_blocks
from relook.forward import activation_memory
from relook.forward.packed_attention import FusedLoraLinear, PackedTrunk, SharedLoraA, fuse_lora

WIDTH = 32
CONFIG = LlamaConfig(hidden_size=WIDTH, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2, vocab_size=8)
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


@pytest.fixture(autouse=True)
def from_the_start() -> None:
    torch._dynamo.reset()  # else it gives up after some models


def with_lora(**lora: Any) -> tuple[PeftModel, PeftModel]:
    """Two models of the same weights, the second one with narrow products."""
    torch.manual_seed(0)
    model = get_peft_model(LlamaModel(CONFIG), LoraConfig(**{"r": 4, "target_modules": "all-linear", **lora}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # 0 at first: then nothing of A would show
            torch.nn.init.normal_(parameter, std=0.1)
    other = copy.deepcopy(model)
    fuse_lora(other.get_base_model().layers)
    return model, other


def compiled(model: PeftModel, backend: Any = "eager") -> PeftModel:
    """The same model, its layers in one piece each."""
    layers = model.get_base_model().layers
    for name, layer in layers.named_children():
        layers._modules[name] = torch.compile(layer, backend=backend, fullgraph=True)
    return model


def groups(model: PeftModel) -> list[SharedLoraA]:
    return [m.shared_a for m in model.modules() if isinstance(m, FusedLoraLinear) and m.shared_a is not None]


def states_and_gradients(model: Any, states: Tensor) -> list[Tensor]:
    """The last hidden states, and gradients of what was read and of all that trains."""
    states = states.clone().requires_grad_()
    model.zero_grad()
    last = model(inputs_embeds=states, use_cache=False).last_hidden_state
    tilted(last).square().sum().backward()
    return [last, states.grad, *(p.grad for p in model.parameters() if p.requires_grad)]  # type: ignore[list-item]


@pytest.mark.parametrize(
    "lora",
    variants(
        [
            {},
            {"lora_alpha": 7},
            {"use_rslora": True, "r": 3},
            {"target_modules": ["q_proj", "v_proj", "up_proj"]},
            {"target_modules": ["k_proj", "down_proj"]},
            {"lora_dropout": 0.5},
        ],
        ({"target_modules": ["k_proj", "down_proj"]}, {"lora_dropout": 0.5}),
    ),
    ids=str,
)
def test_states_and_gradients_are_pefts(lora: dict[str, Any]) -> None:
    model, other = (one.eval() for one in with_lora(**lora))
    states = torch.randn(2, 9, WIDTH)
    expected, alone = (states_and_gradients(one, states) for one in (model, other))
    together = states_and_gradients(compiled(other), states)
    for right, *found in zip(expected, alone, together, strict=True):
        for one in found:
            torch.testing.assert_close(one, right, rtol=1e-5, atol=1e-5)
    assert not [group for group in groups(other) if group.states is not None or group.pending]  # memory is given free
    assert sum(isinstance(module, FusedLoraLinear) for module in other.modules()) == sum(
        isinstance(module, LoraLayer) for module in model.modules()
    )


def test_dropout_is_pefts() -> None:
    """Each layer drops other numbers, in the order in which peft drops them."""
    states, results = torch.randn(2, 9, WIDTH), []
    for model in with_lora(lora_dropout=0.5):
        torch.manual_seed(1)
        results.append(states_and_gradients(model.train(), states))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("autocast", variants([True, False], {True}))
def test_in_a_lower_precision_as_near_as_pefts(autocast: bool) -> None:
    """bf16 beside float32 adapters: both differ from exact numbers by rounding, neither by more."""
    model, other = with_lora()
    exact = states_and_gradients(model, states := torch.randn(2, 9, WIDTH))
    errors = []
    for one in (model, compiled(other)):
        for name, parameter in one.named_parameters():
            parameter.data = parameter.data if "lora_" in name else parameter.data.bfloat16()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            made = states_and_gradients(one, states.bfloat16())
        assert made[0].dtype == torch.bfloat16
        errors.append([float((a.float() - b).detach().norm() / b.norm()) for a, b in zip(made, exact, strict=True)])
    assert all(mine < 1.3 * pefts + 1e-3 for pefts, mine in zip(*errors, strict=True))


def test_no_adapters_other_adapters_and_merged_ones_are_pefts_business() -> None:
    model, other = with_lora()
    states = torch.randn(1, 5, WIDTH)
    look = lambda one: one(inputs_embeds=states, use_cache=False).last_hidden_state  # noqa: E731
    with torch.no_grad(), model.disable_adapter(), other.disable_adapter():
        assert torch.equal(look(other), look(model))
    for one in (model, other):
        torch.manual_seed(2)
        one.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        one.set_adapter("second")
    with torch.no_grad():
        assert torch.equal(look(other), look(model))
        names = {"inputs_embeds": states.expand(2, -1, -1), "adapter_names": ["second", "default"], "use_cache": False}
        assert torch.equal(*(one(**names).last_hidden_state for one in (other.eval(), model.eval())))
        for one in (model, other):
            one.set_adapter("default")
            one.merge_adapter()
        assert torch.equal(look(other), look(model))


def test_layers_in_any_order() -> None:
    """What was made for layers that never asked is not given out for other states."""
    model, other = with_lora()
    mine, theirs = (one.get_base_model().layers[0].self_attn for one in (other, model))
    order = ("k_proj", 0), ("q_proj", 1), ("q_proj", 1), ("v_proj", 1), ("k_proj", 0)
    both = torch.randn(2, 3, WIDTH)

    def work(attention: Any, states: Tensor) -> list[Tensor]:
        read = states.unbind(0)
        return [getattr(attention, name)(read[which]) for name, which in order]

    results = torch.compile(work, backend="eager", fullgraph=True)(mine, both)
    torch.testing.assert_close(results, work(theirs, both), rtol=1e-5, atol=1e-5)


def traced_products(kept: list[Any]) -> Any:
    """A backend that keeps what is to be computed going forward."""

    def backend(graph: Any, inputs: Any) -> Any:
        def forward(traced: Any, _: Any) -> Any:
            kept.append(traced)
            return traced

        return aot_module_simplified(graph, inputs, fw_compiler=forward, bw_compiler=lambda traced, _: traced)

    return backend


@pytest.mark.slow
def test_a_layer_compiles_in_one_piece_and_once_for_all() -> None:
    """Of 7 layers' products with A four are left: those that read the same states are one."""
    _, other = with_lora()
    graphs: list[Any] = []
    states_and_gradients(compiled(other, traced_products(graphs)), torch.randn(1, 5, WIDTH))
    assert len(graphs) == 1
    weights = [node.args[1].meta["val"].shape[1] for node in graphs[0].graph.nodes if node.target in PRODUCTS]
    assert sorted(weights)[:4] == [4, 4, 2 * 4, 3 * 4]


@pytest.mark.slow  # torch compiles
@pytest.mark.parametrize("again", [{}, {"use_reentrant": False}], ids=str)
def test_a_compiled_trunk_says_what_another_one_does(again: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several lengths, with layers that run again in the backward pass, for which dynamo refuses state, and
    without: compiled once and once more for any length, to the numbers of layers that are not."""
    original_compile = torch.compile
    flex_attention_by_sdpa(monkeypatch)
    monkeypatch.setattr(torch, "compile", lambda layer, dynamic: original_compile(layer, backend="aot_eager"))
    passes = []
    for model, trunk_pass in zip(with_lora(), ("dense", "compiled"), strict=True):
        trunk = model.train().get_base_model()
        if again:
            activation_memory.enable_checkpointing(trunk, **{f"{activation_memory.NAME}_kwargs": again})
        passes.append((model, PackedTrunk(trunk, trunk_pass)))
    torch._dynamo.utils.counters.clear()
    for times in (2, 30):
        trees = [Tree.of([row("abcDEFG"), row("abcGH")]), Tree.of([row("abXYZ")])] * times
        packed = pack(trees, PAD, False, 10_000, round_up_to_blocks, root_length=1)
        states, log_probs = torch.randn(*packed.ids.shape, WIDTH), []
        for model, reads in passes:
            model.zero_grad()
            embeds = states.clone().requires_grad_()
            tilted(reads(embeds, packed)).square().sum().backward()
            log_probs.append([embeds.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
        for right, mine in zip(*log_probs, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-4)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2


def test_only_compiled_layers_have_it() -> None:
    for trunk_pass in ("dense", "flex", "compiled"):
        model = get_peft_model(LlamaModel(CONFIG), LoraConfig(r=4, target_modules="all-linear"))
        PackedTrunk(model.get_base_model(), trunk_pass)
        assert len(set(groups(model))) == (4 if trunk_pass == "compiled" else 0)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_what_is_not_pefts_plain_layer_stays_its_own(lora: dict[str, Any]) -> None:
    _, other = with_lora(**lora)
    assert not any(isinstance(module, FusedLoraLinear) for module in other.modules())


def test_once_is_enough() -> None:
    _, plain = with_lora()
    before = groups(plain)
    fuse_lora(plain.get_base_model().layers)
    assert before
    assert list(map(id, groups(plain))) == list(map(id, before))


def test_models_with_it_are_copied_and_sent() -> None:
    _, other = with_lora()
    states = torch.randn(1, 5, WIDTH)
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        layer = copied.get_base_model().layers[0].self_attn
        assert isinstance(layer.q_proj, Linear)
        assert layer.q_proj.shared_a.layers[1] is layer.k_proj
        with torch.no_grad():
            assert torch.equal(*(one(inputs_embeds=states).last_hidden_state for one in (copied, other)))
