"""LoRA as compiled layers compute it, against peft's own way on the same weights."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear
from torch import Tensor
from transformers import LlamaConfig, LlamaModel

from relook.train.lora_products import NarrowLinear, narrow

WIDTH = 32
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def with_lora(**lora: Any) -> tuple[PeftModel, PeftModel]:
    """Two models of the same weights, the second one with narrow products."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2, vocab_size=8
    )
    model = get_peft_model(LlamaModel(config), LoraConfig(**{"r": 4, "target_modules": "all-linear", **lora}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # 0 at first: then nothing of A would show
            torch.nn.init.normal_(parameter, std=0.1)
    other = copy.deepcopy(model)
    narrow(other.get_base_model().layers)
    return model, other


def states_and_gradients(model: Any, states: Tensor) -> list[Tensor]:
    """The last hidden states, and gradients of what was read and of all that trains."""
    states = states.clone().requires_grad_()
    model.zero_grad()
    last = model(inputs_embeds=states, use_cache=False).last_hidden_state
    last.float().square().sum().backward()
    return [last, states.grad, *(p.grad for p in model.parameters() if p.requires_grad)]  # type: ignore[list-item]


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"lora_alpha": 7},
        {"use_rslora": True, "r": 3},
        {"target_modules": ["q_proj", "v_proj", "up_proj"]},
        {"target_modules": ["k_proj", "down_proj"]},
        {"lora_dropout": 0.5},
    ],
    ids=str,
)
def test_states_and_gradients_are_pefts(lora: dict[str, Any]) -> None:
    model, other = (one.eval() for one in with_lora(**lora))
    states = torch.randn(2, 9, WIDTH)
    for found, expected in zip(*(states_and_gradients(one, states) for one in (other, model)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert sum(isinstance(module, NarrowLinear) for module in other.modules()) == sum(
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


def test_under_autocast_as_near_as_pefts() -> None:
    """bf16 beside float32 adapters: both differ from exact numbers by rounding, neither by more."""
    model, other = with_lora()
    exact = states_and_gradients(model, states := torch.randn(2, 9, WIDTH))
    errors = []
    for one in (model, other):
        for name, parameter in one.named_parameters():
            parameter.data = parameter.data if "lora_" in name else parameter.data.bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            made = states_and_gradients(one, states.bfloat16())
        errors.append([float((a.float() - b).norm() / b.norm()) for a, b in zip(made, exact, strict=True)])
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
        for one in (model, other):
            one.set_adapter("default")
            one.merge_adapter()
        assert torch.equal(look(other), look(model))


def test_layers_in_any_order() -> None:
    """What was made for layers that never asked is not given out for other states."""
    model, other = with_lora()
    mine, theirs = (one.get_base_model().layers[0].self_attn for one in (other, model))
    first, second = torch.randn(2, 3, WIDTH).unbind(0)
    for name, states in (
        ("k_proj", first),
        ("q_proj", second),
        ("q_proj", second),
        ("v_proj", second),
        ("k_proj", first),
    ):
        torch.testing.assert_close(getattr(mine, name)(states), getattr(theirs, name)(states), rtol=1e-5, atol=1e-5)


def test_a_layer_compiles_in_one_piece_and_once_for_all() -> None:
    """Of 7 layers' products with A four are left: those that read the same states are one."""
    _, other = with_lora()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        from torch._functorch.aot_autograd import aot_module_simplified

        def kept(traced: Any, _: Any) -> Any:
            graphs.append(traced)
            return traced

        return aot_module_simplified(graph, inputs, fw_compiler=kept)

    core = other.get_base_model()
    for name, layer in core.layers.named_children():
        core.layers._modules[name] = torch.compile(layer, backend=backend, fullgraph=True)  # type: ignore[assignment]
    with torch.no_grad():
        core(inputs_embeds=torch.randn(1, 5, WIDTH), use_cache=False)
    assert len(graphs) == 1
    weights = [node.args[1].meta["val"].shape[1] for node in graphs[0].graph.nodes if node.target in PRODUCTS]
    assert sorted(weights)[:4] == [4, 4, 2 * 4, 3 * 4]


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_what_is_not_pefts_plain_layer_stays_its_own(lora: dict[str, Any]) -> None:
    _, other = with_lora(**lora)
    assert not any(isinstance(module, NarrowLinear) for module in other.modules())


def test_once_is_enough() -> None:
    _, plain = with_lora()
    before = [vars(module) for module in plain.modules() if isinstance(module, NarrowLinear)]
    narrow(plain.get_base_model().layers)
    assert before == [vars(module) for module in plain.modules() if isinstance(module, NarrowLinear)]


def test_models_with_it_are_copied_and_sent() -> None:
    _, other = with_lora()
    states = torch.randn(1, 5, WIDTH)
    for copied in (copy.deepcopy(other), pickle.loads(pickle.dumps(other))):
        layer = copied.get_base_model().layers[0].self_attn
        assert isinstance(layer.q_proj, Linear)
        assert layer.q_proj.beside.layers[1] is layer.k_proj
        with torch.no_grad():
            assert torch.equal(*(one(inputs_embeds=states).last_hidden_state for one in (copied, other)))
