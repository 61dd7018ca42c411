"""Activations that leave the device between forward and backward pass. On a CPU copies are made at once; what leaves,
when it comes back, and that gradients are the same can be seen there as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import dpo_keys, save_tiny, tilted, write_world
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_packing import PAD, row
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from relook.data.packing import Tree, pack
from relook.errors import RecipeError
from relook.forward import activation_memory, policy
from relook.forward.activation_memory import ActivationOffload, CopyStream, OffloadedTensor, layers_on_device
from relook.forward.packed_attention import PackedTrunk, resolve_trunk_pass
from relook.forward.policy import Policy
from relook.recipe import build_recipe
from relook.train.run import train

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_ones_leave_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_memory, "MIN_BYTES", 1)


def counted_returns(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors come back at a time, as they do."""
    fetched, fetch = list[int](), ActivationOffload._copy_back
    monkeypatch.setattr(
        ActivationOffload, "_copy_back", lambda self, saved: fetched.append(len(saved)) or fetch(self, saved)
    )
    return fetched


@pytest.mark.parametrize(
    ("layers", "share", "expected"),
    [(32, 0, 32), (32, 0.01, 31), (32, 0.4, 19), (32, 0.5, 16), (32, 1, 2), (8, 0.9, 2), (2, 1, 2), (1, 1, 1)],
)
def test_a_share_of_layers_leaves_and_two_stay_at_least(layers: int, share: float, expected: int) -> None:
    assert layers_on_device(layers, share) == expected


class Watched(ActivationOffload):
    """Counts the layers that have anything of their own on the device, by what holds it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.most = self.returned = 0
        self.begun: set[int] = set()

    def forward(self, number: int, *arguments: Any, **more: Any) -> Tensor:
        self.begun.add(number)
        made = super().forward(number, *arguments, **more)
        self._count()
        return made

    def _back_to(self, layer: int) -> None:
        super()._prefetch_for(layer)
        self._count()

    def _unpack(self, held: Any) -> Tensor:
        self.returned += isinstance(held, OffloadedTensor)
        return super()._unpack(held)

    def _count(self) -> None:
        here = {layer for layer, saved in enumerate(self.saved) if any(s.on_device is not None for s in saved.values())}
        stay = {layer for layer in self.begun if len(self.saved) <= layer <= self.backward_layer}
        self.most = max(self.most, len(here | stay))


def gradients(stack: list[nn.Module], given: Tensor, kept: int | None) -> tuple[list[Tensor], Watched | None]:
    """Of a stack of layers, with activations that leave, or as they are."""
    x = given.clone().requires_grad_(True)
    parameters = [p for layer in stack for p in layer.parameters()]
    resident = frozenset(p.untyped_storage().data_ptr() for p in parameters)
    watched = None if kept is None else Watched(len(stack), kept, resident, CopyStream(CPU))
    found = x
    for number, layer in enumerate(stack):
        found = watched.forward(number, layer, found) if watched else layer(found)
    return list(torch.autograd.grad(found.square().sum(), [x, *parameters])), watched


@settings(max_examples=40, deadline=None)
@given(st.integers(3, 9), st.integers(2, 9), st.integers(0, 10**6))
def test_gradients_are_the_same_and_no_more_layers_are_there_than_may_be(layers: int, kept: int, seed: int) -> None:
    torch.manual_seed(seed)
    kept = min(kept, layers)
    stack: list[nn.Module] = [
        nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6), nn.SiLU()) for _ in range(layers)
    ]
    x = torch.randn(5, 6)
    expected, _ = gradients(stack, x, None)
    found, watched = gradients(stack, x, kept)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert watched is not None
    assert watched.most <= kept
    assert (watched.returned > 0) == (kept < layers)


class Saves(torch.autograd.Function):
    """Keeps tensors for its backward pass, and shows them there."""

    @staticmethod
    def forward(context: Any, x: Tensor, kept: list[Tensor], seen: list[Tensor]) -> Tensor:
        context.save_for_backward(*kept)
        context.seen = seen
        return x * 1

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        context.seen.extend(context.saved_tensors)
        return gradient, None, None


def test_a_tensor_saved_twice_leaves_once_and_small_or_odd_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_memory, "MIN_BYTES", 16)
    x, weight = torch.randn(4, 4), torch.randn(4, 4)
    kept = [x, x, x.T, weight.T, x[0, :3], x[:, :2], x.expand(2, 4, 4)]
    work, seen = (
        ActivationOffload(4, 2, frozenset({weight.untyped_storage().data_ptr()}), CopyStream(CPU)),
        list[Tensor](),
    )
    found = work.forward(0, lambda x: Saves.apply(x, kept, seen), torch.ones(3, requires_grad=True))
    assert len(work.saved[0]) == 2
    for number in (1, 2, 3):
        found = work.forward(number, lambda x: x * 1, found)
    assert [saved.on_device for saved in work.saved[0].values()] == [None, None]
    for _ in range(2):  # a graph that is kept may be gone through again
        found.sum().backward(retain_graph=True)
        for tensor, expected in zip(seen, kept, strict=True):
            assert torch.equal(tensor, expected)
            assert tensor.stride() == expected.stride()
        assert [saved.on_device for saved in work.saved[0].values()] == [None, None]
        assert [tensor.data_ptr() == expected.data_ptr() for tensor, expected in zip(seen, kept, strict=True)] == [
            *(False, False, False),
            *(True, True, True, True),
        ]
        seen.clear()


class Model:
    """A tiny language model and its packed trees."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 5}
        self.language_model = LlamaModel(LlamaConfig(vocab_size=128, **sizes)).train()
        self.packed = pack([Tree.of([row("abcDEF"), row("abcGH")]), Tree.of([row("abC")])], PAD, False, 1)

    def gradients(self, share: float, times: int = 1) -> list[Tensor]:
        model, packed = self.language_model, self.packed
        reads = PackedTrunk(model, "dense", activation_offloading=share)
        embeds = model.embed_tokens(packed.ids).detach()
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = sum((tilted(reads(embeds * (1 + n), packed)).square().sum() for n in range(times)), torch.zeros(()))
        loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("times", [1, 2])
def test_a_tree_pass_has_the_same_gradients(share: float, times: int) -> None:
    model = Model()
    found, expected = model.gradients(share, times), model.gradients(0, times)
    assert len(found) > 40
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow  # two runs of what `test_a_tree_pass_has_the_same_gradients` compares in one step
def test_training_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches of mixed lengths, measuring in between, and a tower that must not be called; on a CPU, against the
    rule."""
    monkeypatch.setattr(policy, "resolve_trunk_pass", lambda *_: "dense")
    monkeypatch.setattr(Policy, "offload_vision_tower", lambda self: setattr(self.core.model, "vision_tower", None))
    fetched = counted_returns(monkeypatch)
    base, world = save_tiny(tmp_path / "base", layers=5), write_world(tmp_path / "world")
    more = {"lora_enable": True, "lora_r": 4, "use_cpu": False, "max_steps": 3, "gradient_accumulation_steps": 2}
    more |= {"eval_fraction": 0.3, "eval_strategy": "steps", "eval_steps": 1}
    trained = []
    for share in (0.0, 1.0):
        run = build_recipe(dpo_keys(base, world, tmp_path / f"{share}" / "run", activation_offloading=share, **more))
        trained.append(load_file(train(run) / "adapter_model.safetensors"))
        assert bool(fetched) == (share > 0)
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(trained[1][name], tensor) for name, tensor in trained[0].items())


def test_two_layers_have_none_to_send_away() -> None:
    model = LlamaModel(LlamaConfig(vocab_size=8, hidden_size=8, num_attention_heads=1, num_hidden_layers=2))
    with pytest.raises(RecipeError, match="no layer to take of 2"):
        PackedTrunk(model, "dense", activation_offloading=1)


def test_what_all_layers_share_stays() -> None:
    table, mask = torch.randn(4, 4), torch.randn(4, 4)
    work = ActivationOffload(3, 2, frozenset(), CopyStream(CPU))
    given = torch.ones(3, requires_grad=True)
    work.forward(0, lambda x, **_: Saves.apply(x, [mask, table.T], []), given, mask=mask, more=(table, None))
    assert not work.saved[0]


def test_nothing_is_kept_of_a_pass_without_gradients() -> None:
    model = Model()
    reads = PackedTrunk(model.language_model, "dense", activation_offloading=1)
    with torch.no_grad():
        reads(model.language_model.embed_tokens(model.packed.ids), model.packed)
    assert reads.offload is None


def test_what_has_no_other_memory_or_ways_of_its_own_refuses(base: Path, tmp_path: Path) -> None:
    for device, sharded, said in (("cpu", False, "CPU"), ("cuda", True, "FSDP")):
        with pytest.raises(RecipeError, match=said):
            resolve_trunk_pass("auto", device, sharded, activation_offloading=0.5)
    keys = dpo_keys(base, write_world(tmp_path / "world"), tmp_path / "run", use_cpu=False)
    with pytest.raises(RecipeError, match="CPU"):
        train(build_recipe({**keys, "lora_enable": True, "activation_offloading": 0.5}))
    for more, said in (
        ({"lora_enable": True, "gradient_checkpointing": True}, "beside gradient_checkpointing"),
        ({"tune_post_decoder": True}, "cached trunk states"),
        ({"tune_post_decoder": True, "feature_cache": "off"}, "no gradient flows"),
        ({"lora_enable": True, "deepspeed": "zero3"}, "with deepspeed"),
        ({"lora_enable": True, "use_cpu": True}, "with use_cpu"),
        ({"lora_enable": True, "activation_offloading": 1.5}, "0 to 1"),
        ({"lora_enable": True, "activation_offloading": True}, "type float"),
    ):
        with pytest.raises(RecipeError, match=said):
            build_recipe({**keys, "activation_offloading": 0.5, **more})
