"""Language model over packed trees: FlexAttention with a block mask on a GPU, SDPA with a dense mask elsewhere.

FlexAttention skips empty blocks of the mask, so many trees can share one long row without padding. The last layer's MLP
runs at the kept positions only. Layers are compiled for the first row length they see; a second length triggers one
more compilation, for any length.
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
from relook.forward.activation_memory import ActivationOffload, CopyStream, OffloadedLayer, layers_on_device
from relook.model.families import attention_windows

# ----------------------------------------------------------------------------------------------------
# Fused LoRA for compiled layers: fewer and narrower matrix products than peft's, with the same result.
#
# peft adds s B A x to each linear layer's output separately (Hu et al. 2021, section 4.1; s = alpha / r). It applies s
# at the width of the output and, in the backward pass, to the gradient of that, which costs one more write. Here s is
# applied between A and B, to r numbers per position. The A matrices of layers that read the same hidden states
# (queries, keys and values; gate and up) are concatenated: one product instead of three, and two instead of six in the
# backward pass. This excludes layers that are recomputed in the backward pass, and passes that are not compiled.

ATTENTION_INPUTS, MLP_INPUTS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")  # layers with the same input
ADAPTER = "default"  # peft's name for the only adapter


class SharedLoraA:
    """Concatenated LoRA A matrices of the linear layers that read the same hidden states in one decoder layer.

    Products for the other layers wait here while the decoder layer is traced; the compiled code is stateless.
    """

    def __init__(self, layers: Sequence[nn.Module], decoder_layer: nn.Module) -> None:
        self.layers: list[Any] = list(layers)
        self.decoder_layer: Any = decoder_layer
        self.states: Tensor | None = None
        self.pending: dict[int, Tensor] = {}  # products not yet taken, by index of their layer

    @property
    def can_share(self) -> bool:
        """Return True if products can be shared.

        They cannot in a layer that is recomputed in the backward pass, where dynamo allows no such side effects.
        """
        again = self.decoder_layer.training and getattr(self.decoder_layer, "gradient_checkpointing", False)
        return torch.compiler.is_compiling() and not again

    def product(self, states: Tensor, index: int) -> Tensor:
        """Return A x for the layer at `index`, (..., r); the first call computes it for all layers."""
        # Other hidden states, or a second call on the same: compute anew, as in a new forward pass.
        if self.states is not states or index not in self.pending:
            # A of all layers, each (r, in), below each other: one product (..., in) -> (..., sum of r), cut by layer.
            weights = [layer.lora_A[ADAPTER].weight for layer in self.layers]
            products = linear(states.to(weights[0].dtype), torch.cat(weights))
            self.states, self.pending = states, dict(enumerate(products.split([len(weight) for weight in weights], -1)))
        narrow = self.pending.pop(index)
        # Drop the reference once all layers have theirs: nothing may outlive the pass.
        if not self.pending:
            self.states = None
        return narrow


class FusedLoraLinear(Linear):
    """Linear layer with peft's LoRA, computed with fewer and narrower products."""

    shared_a: SharedLoraA | None  # None where no other layer reads the same input
    index: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Whatever else peft can do in a forward pass is left to peft.
        plain = self.active_adapters == [ADAPTER] and not (self.disable_adapters or self.merged or args or kwargs)
        if not plain:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        # W x + B (s A x): the scale acts on r numbers per position, not on the full output width.
        result: Tensor = self.base_layer(x)
        if self.shared_a is not None and self.shared_a.can_share:
            narrow = self.shared_a.product(x, self.index)
        else:
            A = self.lora_A[ADAPTER]
            narrow = A(self.lora_dropout[ADAPTER](x.to(A.weight.dtype)))
        # (..., r) -> (..., out)
        wide: Tensor = self.lora_B[ADAPTER](narrow * self.scaling[ADAPTER])
        return (result + wide).to(result.dtype)


def fuse_lora(layers: nn.Module) -> None:
    """Replace peft's linear layers in decoder layers by fused ones, in place; not quantised ones or variants like DoRA.

    With dropout, each layer reads a differently masked input, so no products are shared.
    """
    for layer in layers.children():
        for module in layer.modules():
            lora_layers: dict[str, Any] = {
                name: child for name, child in module.named_children() if _is_plain_lora(child)
            }
            for child in lora_layers.values():
                # Change the class in place: parameters, names and peft's references to the layer stay the same.
                child.__class__, child.shared_a = FusedLoraLinear, None
            for names in (ATTENTION_INPUTS, MLP_INPUTS):
                group = [lora_layers[name] for name in names if name in lora_layers]
                if len(group) > 1 and all(isinstance(child.lora_dropout[ADAPTER], nn.Identity) for child in group):
                    shared = SharedLoraA(group, layer)
                    for index, child in enumerate(group):
                        child.shared_a, child.index = shared, index


def _is_plain_lora(module: Any) -> bool:
    plain = type(module) is Linear and list(module.lora_A) == [ADAPTER] and not module.lora_variant
    return plain and module.lora_B[ADAPTER].bias is None  # peft would scale a bias as well


# ----------------------------------------------------------------------------------------------------

BUDGET = 0.8  # on an H100 as fast as 1, with 10 GiB less in a LoRA step of 8 pairs at 7B
MAX_COMPILED_VARIANTS = (
    64  # compilations of one layer's code: per model in the process, with and without gradients, per length
)


def resolve_trunk_pass(
    trunk_pass: str,
    device: str,
    sharded: bool = False,
    activation_memory_budget: float = BUDGET,
    activation_offloading: float = 0,
) -> str:
    """Resolve the trunk pass that "auto" means: "compiled" on a GPU, or "flex" there if `sharded`; "dense" elsewhere.

    Raises:
        RecipeError: compiled layers in a model that FSDP or DeepSpeed shards, since these swap parameters; a memory
            budget without compiled layers; or activation offloading on a CPU or with sharded layers.
    """
    if activation_offloading and (sharded or device == "cpu"):
        reason = "FSDP or DeepSpeed, which have ways of their own" if sharded else "a CPU, whose memory they are in"
        raise RecipeError(f"activation_offloading does not go with {reason}.", "Leave it out.")
    if trunk_pass == "compiled" and sharded:
        raise RecipeError("trunk_pass compiled does not go with FSDP or DeepSpeed.", "Set trunk_pass flex.")
    if trunk_pass == "auto":
        trunk_pass = "dense" if device != "cuda" else "flex" if sharded else "compiled"
    if trunk_pass != "compiled" and activation_memory_budget != BUDGET:
        raise RecipeError(
            f"activation_memory_budget needs compiled layers, but trunk_pass is {trunk_pass} here.",
            "Leave it out, or set gradient_checkpointing true.",
        )
    return trunk_pass


def packs_rows(trunk_pass: str) -> bool:
    """Return True if one long row of many trees is cheaper than one row per tree."""
    return trunk_pass != "dense"


def block_mask(packed: PackedTrees, window: int | None = None) -> BlockMask:
    """Build the mask of `PackedTrees.dense_mask` in FlexAttention's form, (R, 1, L, L); L must be a multiple of BLOCK.

    It is built from the range of queries of each key. torch's `create_block_mask` evaluates all L x L pairs, which
    takes 25 ms for 16,384 positions on an H100; compiled for some lengths, it keeps ptxas busy for minutes.
    """
    first, last, L = packed.first_query, packed.last_query, packed.last_query.shape[1]
    position = torch.arange(L, device=last.device, dtype=torch.int32)  # (L,)
    # Key k is seen by the queries first[k]..last[k]. Compare this range with each block of queries, (R, blocks, L):
    # they overlap if any query of the block sees the key; the range covers the block if all its queries do.
    low = position[::BLOCK, None]  # first query of each block
    any_visible = (first[:, None] < low + BLOCK) & (last[:, None] >= low)
    all_visible = (first[:, None] <= low) & (last[:, None] >= low + BLOCK - 1)
    # Reduce the keys to blocks of keys, (R, blocks, blocks).
    some_visible, full_visible = (
        any_visible.unflatten(2, (-1, BLOCK)).any(3),
        all_visible.unflatten(2, (-1, BLOCK)).all(3),
    )

    numbers = packed.position_ids
    if window is not None:
        # Blocks whose most distant pair lies beyond the window are checked pair by pair.
        furthest = (
            numbers.unflatten(1, (-1, BLOCK)).amax(2)[:, :, None] - numbers.unflatten(1, (-1, BLOCK)).amin(2)[:, None]
        )
        full_visible = full_visible & (furthest < window)

    # The exact rule, for one pair of query q and key k in row r; the same for all heads h.
    def allowed(r: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (q >= first[r, k]) & (q <= last[r, k])
        return seen if window is None else seen & (numbers[r, q] - numbers[r, k] < window)

    # Only partly visible blocks evaluate `allowed`; full blocks skip it, and empty blocks are not visited.
    partly, full = _block_lists(some_visible & ~full_visible), _block_lists(full_visible)
    return BlockMask.from_kv_blocks(*partly, *full, BLOCK_SIZE=BLOCK, mask_mod=allowed, seq_lengths=(L, L))


def _block_lists(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Convert a block map (R, rows, columns) to FlexAttention's counts (R, 1, rows) and columns (R, 1, rows, columns).

    The columns of set blocks come first in each row.
    """
    count = blocks.sum(-1, dtype=torch.int32)
    # A stable descending sort moves set columns to the front and keeps them in order.
    columns = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    # FlexAttention's kernels assume a last stride of 1 for both.
    return count[:, None].contiguous(), columns[:, None].to(torch.int32, memory_format=torch.contiguous_format)


class PackedTrunk:
    """Language model that reads packed trees.

    Args:
        language_model: transformers' base language model, with its decoder layers in `layers`.
        trunk_pass: "compiled" (FlexAttention, layers compiled), "flex" (FlexAttention) or "dense" (SDPA).
        activation_memory_budget: share of a compiled layer's activations that are kept for its backward pass. torch
            recomputes the others, starting with those that cost the least time per byte.
        sharded: True if FSDP or DeepSpeed shards the model; they know only its original layers.
        activation_offloading: share of the layers whose activations are off the device until the backward pass.
    """

    def __init__(
        self,
        language_model: Any,
        trunk_pass: str,
        activation_memory_budget: float = BUDGET,
        sharded: bool = False,
        activation_offloading: float = 0,
    ) -> None:
        self.packs_rows = packs_rows(trunk_pass)
        self.budget = activation_memory_budget
        self.model = language_model
        self.sparse_last_layer: SparseLastLayer | None = None
        self.layers = len(language_model.layers)
        self.layers_on_device = layers_on_device(self.layers, activation_offloading)
        self.offload: ActivationOffload | None = None
        if activation_offloading and self.layers_on_device == self.layers:
            message = f"activation_offloading has no layer to take of {self.layers}: {self.layers_on_device} stay."
            raise RecipeError(message, "Leave it out.")
        if trunk_pass == "compiled":
            fuse_lora(language_model.layers)
        # FSDP and DeepSpeed hook the original layers, so a sharded model runs as it is.
        if not sharded:
            self.model, self.sparse_last_layer = _copy_with_own_layers(
                language_model, trunk_pass == "compiled", has_sparse_last_mlp(language_model, trunk_pass)
            )
        if self.layers_on_device < self.layers:
            # Outermost wrapper: saved tensors are packed around the compiled layer, not inside it.
            self.copy_stream = CopyStream(language_model.device)
            layers = self.model.layers
            for number, layer in enumerate(list(layers)):
                layers[number] = OffloadedLayer(layer, number, lambda: self.offload)

    def __call__(self, embeds: Tensor, packed: PackedTrees, **image: Any) -> Tensor:
        """Return the last hidden states at the kept positions, (T, S, D), of embedded trees (R, L, D).

        Args:
            image: further arguments of the language model, about its image positions.

        Raises:
            RelookError: the layers cannot be compiled here.
        """
        # Queries see the keys of their own tree and branch: a block mask (R, 1, L, L) or a dense one of that shape.
        mask = self._masks(packed)
        # Where all positions are kept (for self-attention in the post decoder), there is nothing to leave out.
        selects = self.sparse_last_layer is not None and packed.keep.numel() < packed.ids.numel()
        if self.sparse_last_layer is not None:
            self.sparse_last_layer.keep = packed.keep.flatten() if selects else None
            if selects and not torch.compiler.is_compiling():  # their number varies by batch
                torch._dynamo.maybe_mark_dynamic(self.sparse_last_layer.keep, 0)
        # Above its default limit of 8 variants, torch would only warn and run uncompiled.
        limit = torch._dynamo.config.patch(recompile_limit=MAX_COMPILED_VARIANTS)
        budget = torch._functorch.config.patch(activation_memory_budget=self.budget)
        with (
            limit,
            budget,
            self._offloading(),
            _attention_implementation(self.model.config, "flex_attention" if self.packs_rows else "sdpa"),
        ):
            try:
                states: Tensor = self.model(
                    inputs_embeds=embeds,
                    attention_mask=mask,
                    position_ids=packed.position_ids,
                    use_cache=False,
                    **image,
                ).last_hidden_state
            except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
                raise RelookError(
                    f"torch cannot compile the trunk here: {str(error).splitlines()[0]}",
                    "Install a C compiler (triton needs one), or set trunk_pass dense.",
                ) from error
        # `keep` (T, S) indexes the R * L positions. The sparse layer has selected already: (T * S, D) -> (T, S, D);
        # else select here: (R, L, D) -> (R * L, D) -> (T, S, D).
        return states.unflatten(0, packed.keep.shape) if selects else states.flatten(0, 1)[packed.keep]

    def _masks(self, packed: PackedTrees) -> Any:
        """Return the mask of the layers; where kinds of layers see differently, one for each kind."""
        length = int(packed.ids.shape[1])
        windows = {
            kind: window if window is not None and window < length else None
            for kind, window in attention_windows(self.model.config).items()
        }
        make = block_mask if self.packs_rows else PackedTrees.dense_mask
        masks: dict[int | None, Any] = {window: make(packed, window) for window in dict.fromkeys(windows.values())}
        return masks[windows.popitem()[1]] if len(windows) == 1 else {k: masks[window] for k, window in windows.items()}

    @cached_property  # walking all modules takes as long as running some layers
    def _weight_addresses(self) -> frozenset[int]:
        """Return the storage addresses of the weights; first read once they are on their training device."""
        tensors = (*self.model.parameters(), *self.model.buffers())
        return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors)

    @contextmanager
    def _offloading(self) -> Iterator[None]:
        """Offload what the first layers save inside the context, if configured and if gradients are enabled."""
        if self.layers_on_device == self.layers or not torch.is_grad_enabled():
            yield
            return
        self.offload = ActivationOffload(self.layers, self.layers_on_device, self._weight_addresses, self.copy_stream)
        try:
            yield
        finally:
            self.offload = None


def _copy_with_own_layers(language_model: Any, compiled: bool, sparse_last: bool) -> tuple[Any, SparseLastLayer | None]:
    """Return a shallow copy of the model with its own list of layers, so that `generate` keeps the original ones.

    Layers are compiled one by one, not the whole model: all layers but the last share their code. On a CPU, each length
    is compiled separately: the C++ that torch 2.13 generates for FlexAttention with dynamic lengths is faulty.
    """
    dynamic = None if language_model.device.type == "cuda" else False
    wrap: Any = partial(torch.compile, dynamic=dynamic) if compiled else lambda layer: layer
    *layers, layer = language_model.layers
    last = SparseLastLayer(wrap(_with_sparse_forward(layer))) if sparse_last else None
    # A shallow copy shares embeddings, norm and weights; only `layers` is replaced, in a module dict of its own.
    shell = copy.copy(language_model)
    shell._modules = dict(language_model._modules)
    shell.layers = nn.ModuleList([*map(wrap, layers), last or wrap(layer)])
    return shell, last


# --- the last layer

PRE_NORM = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)  # h += attention(norm(h)); h += mlp(norm(h))


def has_sparse_last_mlp(language_model: Any, trunk_pass: str) -> bool:
    """Return True if everything after the last layer's attention is computed at the kept positions only.

    The layer must be of a known class, and its `forward` must not have been replaced. Sharding by FSDP or DeepSpeed is
    not checked here. Compiled on a CPU, each number of kept positions would need its own compilation.
    """
    layer = language_model.layers[-1]
    # A subclass or a patched forward may do anything between attention and MLP.
    pre_norm = type(layer) in PRE_NORM and "forward" not in vars(layer)
    return pre_norm and not (trunk_pass == "compiled" and language_model.device.type == "cpu")


class SparseLastLayer(nn.Module):
    """Last decoder layer of a language model, whose output is read at the kept positions only.

    Its keys and values are needed everywhere; its MLP, two thirds of its work, only at the kept positions.
    """

    keep: Tensor | None = None  # (N,) flat indices into the positions of all rows; None keeps all

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Map hidden states (R, L, D) to (N, D), or to (R, L, D) if `keep` is None."""
        output: Tensor = self.layer(hidden_states, keep=self.keep, **kwargs)
        return output


def _with_sparse_forward(layer: nn.Module) -> nn.Module:
    """Return the same layer, one of PRE_NORM, with a `forward` that takes `keep`."""
    kind: Any = type(layer)
    same: nn.Module = object.__new__(_sparse_class(kind))
    same.__dict__ = layer.__dict__  # shared, so train() and eval() act on both
    return same


@cache  # a new class per model would force a recompilation
def _sparse_class(kind: Any) -> Any:
    class Keeping(kind):
        """Decoder layer with `keep`; a subclass, so that transformers' checkpointing wraps its `forward`, too."""

        def forward(self, hidden_states: Tensor, keep: Tensor | None = None, **kwargs: Any) -> Any:
            if keep is None:
                return super().forward(hidden_states, **kwargs)
            # Attend at all positions, (R, L, D): every kept query needs the keys and values of all of them.
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            # Drop the others before the MLP: (R, L, D) -> (R * L, D) -> (N, D).
            states_ND = (hidden_states + attended).flatten(0, 1)[keep]
            return states_ND + self.mlp(self.post_attention_layernorm(states_ND))

    return Keeping


@contextmanager
def _attention_implementation(config: Any, name: str) -> Iterator[None]:
    """Set transformers' attention implementation for a forward pass.

    With gradients enabled it stays set: the backward pass may recompute layers with it. So no pass relies on what is
    set before it: FlexAttention would add a dense mask to the scores.
    """
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        if not torch.is_grad_enabled():
            config._attn_implementation = before
