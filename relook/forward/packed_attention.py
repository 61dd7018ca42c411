"""The language model over packed trees: FlexAttention with a block mask on a GPU, SDPA with a dense mask elsewhere.

FlexAttention skips the blocks of the mask that are empty, so that many trees can share one long row without padding.
The last layer's MLP runs at the kept positions only.
Layers are compiled for the first length of a row that they see, and where another one comes, once more for any length.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import linear
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from relook.data.packing import BLOCK, PackedTrees
from relook.errors import RecipeError, RelookError
from relook.forward.activation_memory import Lane, Numbered, Offload, staying

# ----------------------------------------------------------------------------------------------------
# LoRA's products where layers are compiled: fewer and narrower than peft's, for the same numbers.
#
# peft adds s B A x to each linear layer's output by itself (Hu et al. 2021, section 4.1; s = alpha / r). It multiplies by
# s what is as wide as the output and, going back, the gradient of that, which is written once more for it. Here s stands
# between A and B, on r numbers a position. And the A of layers that read the same states (queries, keys and values; gate
# and up) are one matrix: one product instead of three, and two going back instead of six; but not where layers run again
# in the backward pass, nor in passes that are not compiled.

ATTENTION_INPUTS, MLP_INPUTS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")  # each reads the same states
ADAPTER = "default"  # peft's name for the one that there is


class Beside:
    """The A of linear layers that read the same states, of one decoder layer.

    What is made for the others waits here while the decoder layer is traced; the code that comes of it has no state.
    """

    def __init__(self, layers: Sequence[nn.Module], decoder_layer: nn.Module) -> None:
        self.layers: list[Any] = list(layers)
        self.decoder_layer: Any = decoder_layer
        self.read: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}  # what was made of it, by the place of the layer that it is for

    @property
    def traced(self) -> bool:
        """Whether something can wait: not in a layer that runs again in the backward pass, for which dynamo takes no
        such notes."""
        again = self.decoder_layer.training and getattr(self.decoder_layer, "gradient_checkpointing", False)
        return torch.compiler.is_compiling() and not again

    def product(self, states: Tensor, place: int) -> Tensor:
        """A x for the layer in that place, (..., r). The first one that asks has it made for all."""
        if self.read is not states or place not in self.waiting:
            weights = [layer.lora_A[ADAPTER].weight for layer in self.layers]
            made = linear(states.to(weights[0].dtype), torch.cat(weights))
            self.read, self.waiting = states, dict(enumerate(made.split([len(weight) for weight in weights], -1)))
        mine = self.waiting.pop(place)
        if not self.waiting:
            self.read = None
        return mine


class NarrowLinear(Linear):
    """peft's linear layer with LoRA; how it computes is all that differs."""

    beside: Beside | None  # None where it reads its states alone
    place: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = self.active_adapters == [ADAPTER] and not (self.disable_adapters or self.merged or args or kwargs)
        if not plain:
            made: Tensor = super().forward(x, *args, **kwargs)
            return made
        result: Tensor = self.base_layer(x)
        if self.beside is not None and self.beside.traced:
            narrow = self.beside.product(x, self.place)
        else:
            A = self.lora_A[ADAPTER]
            narrow = A(self.lora_dropout[ADAPTER](x.to(A.weight.dtype)))
        wide: Tensor = self.lora_B[ADAPTER](narrow * self.scaling[ADAPTER])
        return (result + wide).to(result.dtype)


def narrow(layers: nn.Module) -> None:
    """Have peft's linear layers inside decoder layers compute so, in place; not quantised ones, nor variants as DoRA.

    With dropout each has a view of its own of what it reads, and none are side by side.
    """
    for layer in layers.children():
        for module in layer.modules():
            found: dict[str, Any] = {name: child for name, child in module.named_children() if _plain(child)}
            for child in found.values():
                child.__class__, child.beside = NarrowLinear, None
            for names in (ATTENTION_INPUTS, MLP_INPUTS):
                group = [found[name] for name in names if name in found]
                if len(group) > 1 and all(isinstance(child.lora_dropout[ADAPTER], nn.Identity) for child in group):
                    beside = Beside(group, layer)
                    for place, child in enumerate(group):
                        child.beside, child.place = beside, place


def _plain(module: Any) -> bool:
    one = type(module) is Linear and list(module.lora_A) == [ADAPTER] and not module.lora_variant
    return one and module.lora_B[ADAPTER].bias is None  # which peft scales, too


# ----------------------------------------------------------------------------------------------------

BUDGET = 0.8  # on an H100 as fast as 1, with 10 GiB less in a LoRA step of 8 pairs at 7B
KINDS = 64  # of passes that one layer's code is compiled for: models of a process, with and without gradients, lengths


def resolve(
    how: str,
    device: str,
    sharded: bool = False,
    activation_memory_budget: float = BUDGET,
    activation_offloading: float = 0,
) -> str:
    """What "auto" means on a device: compiled on a GPU, or "flex" there if `sharded`; dense elsewhere.

    Raises:
        RecipeError: compiled layers of a model that FSDP or DeepSpeed takes apart, which swap their parameters; a
            budget for layers that are not compiled; activations to leave a CPU, or layers that are taken apart.
    """
    if activation_offloading and (sharded or device == "cpu"):
        where = "FSDP or DeepSpeed, which have ways of their own" if sharded else "a CPU, whose memory they are in"
        raise RecipeError(f"activation_offloading does not go with {where}.", "Leave it out.")
    if how == "compiled" and sharded:
        raise RecipeError("trunk_pass compiled does not go with FSDP or DeepSpeed.", "Set trunk_pass flex.")
    if how == "auto":
        how = "dense" if device != "cuda" else "flex" if sharded else "compiled"
    if how != "compiled" and activation_memory_budget != BUDGET:
        raise RecipeError(
            f"activation_memory_budget is of compiled layers, and trunk_pass is {how} here.",
            "Leave it out, or set gradient_checkpointing true.",
        )
    return how


def packs(how: str) -> bool:
    """Whether one long row of many trees is cheaper than a row for each."""
    return how != "dense"


def block_mask(packed: PackedTrees) -> BlockMask:
    """The mask of `PackedTrees.mask` in FlexAttention's form, (R, 1, L, L); L must be a multiple of BLOCK.

    Made from `last`: torch's `create_block_mask` works through all L x L pairs, which takes 25 ms for 16,384
    positions on an H100, and compiled for some lengths it keeps ptxas busy for minutes.
    """
    last, L = packed.last, packed.last.shape[1]
    place = torch.arange(L, device=last.device, dtype=torch.int32)
    # Which blocks of queries see each key, (R, blocks, L): with one of theirs, and with all.
    low = place[::BLOCK, None]
    one = (place < low + BLOCK) & (last[:, None] >= low)
    whole = (place <= low) & (last[:, None] >= low + BLOCK - 1)
    some, every = one.unflatten(2, (-1, BLOCK)).any(3), whole.unflatten(2, (-1, BLOCK)).all(3)

    def allowed(r: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (q <= last[r, k])

    partly, full = _listed(some & ~every), _listed(every)
    return BlockMask.from_kv_blocks(*partly, *full, BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(L, L))


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """From which blocks are meant, (R, rows, columns), to how many they are and their columns first, with a head."""
    count = blocks.sum(-1, dtype=torch.int32)
    columns = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    # FlexAttention's kernels read both without asking for their last stride.
    return count[:, None].contiguous(), columns[:, None].to(torch.int32, memory_format=torch.contiguous_format)


class TreePass:
    """A language model that reads packed trees.

    Args:
        language_model: transformers' base language model, whose decoder layers are its `layers`.
        how: "compiled" (FlexAttention, layers compiled), "flex" (FlexAttention) or "dense" (SDPA).
        activation_memory_budget: share of a compiled layer's activations that are kept for its backward pass; torch
            computes the others again, those first that cost least time for their memory.
        sharded: whether FSDP or DeepSpeed take the model apart, which know its own layers only.
        activation_offloading: share of the layers whose activations leave the device until the backward pass.
    """

    def __init__(
        self,
        language_model: Any,
        how: str,
        activation_memory_budget: float = BUDGET,
        sharded: bool = False,
        activation_offloading: float = 0,
    ) -> None:
        self.packs = packs(how)
        self.budget = activation_memory_budget
        self.model = language_model
        self.last: LastLayer | None = None
        self.layers = len(language_model.layers)
        self.staying = staying(self.layers, activation_offloading)
        self.offload: Offload | None = None
        if activation_offloading and self.staying == self.layers:
            said = f"activation_offloading has no layer to take of {self.layers}: {self.staying} stay."
            raise RecipeError(said, "Leave it out.")
        if how == "compiled":
            narrow(language_model.layers)
        if not sharded:
            self.model, self.last = _shell(language_model, how == "compiled", last_mlp_at_kept(language_model, how))
        if self.staying < self.layers:
            self.lane = Lane(language_model.device)
            layers = self.model.layers._modules
            layers.update({name: Numbered(layer, int(name), lambda: self.offload) for name, layer in layers.items()})

    def __call__(self, embeds: Tensor, packed: PackedTrees) -> Tensor:
        """Last hidden states at the kept positions, (T, S, D), of embedded trees (R, L, D).

        Raises:
            RelookError: the layers cannot be compiled here.
        """
        mask = block_mask(packed) if self.packs else packed.mask()
        chosen = self.last is not None and packed.keep.numel() < packed.ids.numel()
        if self.last is not None:
            self.last.keep = packed.keep.flatten() if chosen else None
            if chosen and not torch.compiler.is_compiling():  # how many there are differs from batch to batch
                torch._dynamo.maybe_mark_dynamic(self.last.keep, 0)
        # Above torch's own limit of 8 kinds it would go on uncompiled, and only warn.
        limit = torch._dynamo.config.patch(recompile_limit=KINDS)
        budget = torch._functorch.config.patch(activation_memory_budget=self.budget)
        with limit, budget, self._offloads(), _attention(self.model.config, "flex_attention" if self.packs else None):
            try:
                states: Tensor = self.model(
                    inputs_embeds=embeds, attention_mask=mask, position_ids=packed.positions, use_cache=False
                ).last_hidden_state
            except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
                raise RelookError(
                    f"torch cannot compile the trunk here: {str(error).splitlines()[0]}",
                    "Install a C compiler (triton needs one), or set trunk_pass dense.",
                ) from error
        return states.unflatten(0, packed.keep.shape) if chosen else states.flatten(0, 1)[packed.keep]

    @cached_property  # going through all modules takes as long as some layers do
    def _resident(self) -> frozenset[int]:
        """Addresses of what holds the weights; asked for when they are where training has them."""
        held = (*self.model.parameters(), *self.model.buffers())
        return frozenset(tensor.untyped_storage().data_ptr() for tensor in held)

    @contextmanager
    def _offloads(self) -> Iterator[None]:
        """What the first layers save inside leaves the device, if it is wanted and there is a backward pass."""
        if self.staying == self.layers or not torch.is_grad_enabled():
            yield
            return
        self.offload = Offload(self.layers, self.staying, self._resident, self.lane)
        try:
            yield
        finally:
            self.offload = None


def _shell(language_model: Any, compiled: bool, apart: bool) -> tuple[Any, LastLayer | None]:
    """The same modules under a shell with layers of its own, so that `generate` has those that it had.

    One layer is compiled, not the whole model: all layers but the last share its code. On a CPU for each length anew:
    the C++ that torch 2.13 makes of FlexAttention for any length has errors.
    """
    dynamic = None if language_model.device.type == "cuda" else False
    make = partial(torch.compile, dynamic=dynamic) if compiled else lambda layer: layer
    layers = dict(language_model.layers._modules)
    name, layer = layers.popitem()
    last = LastLayer(make(_keeping(layer))) if apart else None  # type: ignore[arg-type]  # as compile has it
    shell = copy.copy(language_model)
    shell._modules = dict(language_model._modules)
    shell.layers = nn.ModuleList()
    shell.layers._modules = {**{n: make(each) for n, each in layers.items()}, name: last or make(layer)}
    return shell, last


# --- the last layer

PRE_NORM = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)  # h += attention(norm(h)); h += mlp(norm(h))


def last_mlp_at_kept(language_model: Any, how: str) -> bool:
    """Whether what comes after the last layer's attention is computed at the kept positions only.

    It must be known what that is, and nobody may have put another `forward` on the layer. FSDP and DeepSpeed, which
    take models apart, are not asked about here. Compiled on a CPU, each number of kept positions would be compiled for.
    """
    layer = language_model.layers[-1]
    ours = type(layer) in PRE_NORM and "forward" not in vars(layer)
    return ours and not (how == "compiled" and language_model.device.type == "cpu")


class LastLayer(nn.Module):
    """A language model's last decoder layer: nothing reads it at positions that are not kept.

    Its keys and values are needed everywhere, its MLP, two thirds of its work, at the kept positions only.
    """

    keep: Tensor | None = None  # (N,) indices into all rows' positions; None for all

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, **more: Any) -> Tensor:
        """(R, L, D) to (N, D), or to (R, L, D) without `keep`."""
        made: Tensor = self.layer(hidden_states, keep=self.keep, **more)
        return made


def _keeping(layer: nn.Module) -> nn.Module:
    """The same layer, one of PRE_NORM, with a `forward` that is told what to keep."""
    kind: Any = type(layer)
    same: nn.Module = object.__new__(_keeping_class(kind))
    same.__dict__ = layer.__dict__  # shared: a mode that is set later holds for both
    return same


@cache  # for a class of its own a layer would be compiled anew with every model
def _keeping_class(kind: Any) -> Any:
    class Keeping(kind):
        """A subclass, so that transformers' recomputation of layers wraps this `forward`, too."""

        def forward(self, hidden_states: Tensor, keep: Tensor | None = None, **more: Any) -> Any:
            if keep is None:
                return super().forward(hidden_states, **more)
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **more)
            kept = (hidden_states + attended).flatten(0, 1)[keep]
            return kept + self.mlp(self.post_attention_layernorm(kept))

    return Keeping


@contextmanager
def _attention(config: Any, name: str | None) -> Iterator[None]:
    """transformers' attention of that name during a pass.

    With gradients it stays: where layers are recomputed, the backward pass runs them again.
    """
    before = config._attn_implementation
    config._attn_implementation = name or before
    try:
        yield
    finally:
        if not torch.is_grad_enabled():
            config._attn_implementation = before
