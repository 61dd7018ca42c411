"""How many bytes a step keeps for its backward pass, from shapes alone: what `relook estimate` calls activations.

Each term is a tensor that autograd saves; `tests/test_estimate.py` counts those of real steps. Letters: D hidden size,
F width inside the MLP, A and K numbers in a position's queries and keys, H heads, V width of vision features.

`low` is the size of a number in matrix products: 2 under bf16 and fp16, else 4. `mixed` says that what trains is held
in float32 beside it: autocast then casts the input of each linear layer that trains, and every cast is a copy of its
own. Where layers are compiled, torch's min-cut partitioner keeps one of equal copies, and computes again what is cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

from relook.data.encode import Example
from relook.model.post_decoder import PostDecoder
from relook.model.trunks import feature_size
from relook.train.batches import SHARING
from relook.train.log_probs import ROWS
from relook.train.lora_products import ADAPTER, ATTENTION_INPUTS, MLP_INPUTS
from relook.train.policy import LOGITS_BYTES, Policy
from relook.train.tree_pass import packs
from relook.tree import arrange, common_root, kept_positions, whole_blocks


@dataclass(frozen=True)
class Counts:
    """How large a batch is.

    Args:
        positions: of its rows, padding included, as the language model reads them.
        row: positions of one row.
        slots: kept states of its trees, padded to the longest.
        targets: of the loss.
        images, features: images, and rows of their vision features.
        padded_features: those rows with each tree padded to the most that one has.
        trees: trees.
    """

    positions: int
    row: int
    slots: int
    targets: int
    images: int
    features: int
    padded_features: int
    trees: int

    @staticmethod
    def of(examples: Sequence[Example], rows: Sequence[int], policy: Policy) -> Counts:
        """The batch that `Collator` makes of examples.

        Args:
            rows: vision features of each example's images together.
        """
        trees = [example.tree for example in examples]
        distinct = {id(tree): tree for tree in trees}.values()  # assumed ones are all the same
        root = common_root(trees, policy.config.image_token_id)
        lengths = sorted((len(tree) - root for tree in trees), reverse=True)
        packed = packs(policy.trunk_pass)
        row = whole_blocks(root * -(-len(trees) // SHARING) + sum(lengths)) if packed else root + lengths[0]
        return Counts(
            positions=row if packed else row * len(arrange(lengths, lengths[0])),
            row=row,
            slots=len(trees) * max(len(kept_positions(tree, policy.keeps_everything)) for tree in distinct),
            targets=sum(sum(branch.supervised) for tree in trees for branch in tree.branches),
            images=sum(len(example.images) for example in examples),
            features=sum(rows),
            padded_features=len(trees) * max(rows),
            trees=len(trees),
        )


@dataclass(frozen=True)
class Kept:
    """Bytes that a part of the model keeps.

    Args:
        each: for one position.
        fixed: whatever the number of positions.
        cheap: of `each`, what torch computes again first where a compiled layer may not keep everything.
        workspace: the most that the backward pass has beside them, for one position.
    """

    each: int
    fixed: int = 0
    cheap: int = 0
    workspace: int = 0

    def of(self, positions: int) -> int:
        """All of it."""
        return self.each * positions + self.fixed


def within(budget: float, given: int, *parts: tuple[Kept, int]) -> int:
    """Bytes that a layer keeps of its parts, each with its number of positions, under torch's
    `activation_memory_budget`, where it is compiled. `given` bytes are its input.

    Below 1, torch first does without all that is cheap, then chooses what fits a share of the rest.
    """
    everything = sum(part.of(positions) for part, positions in parts)
    if budget == 1:
        return everything
    expensive = sum((part.each - part.cheap) * positions for part, positions in parts)
    return min(expensive, round(given + budget * (everything - given)))


def decoder_layer(
    layer: nn.Module, text: Any, row: int, how: str, low: int, mixed: bool, dropout: float
) -> tuple[Kept, Kept]:
    """A decoder layer of the language model, with or without LoRA: its attention and its gated MLP, each with the norm
    before it.

    Args:
        layer: as training has it; its weights are not looked at.
        row: positions of one row, for the dense mask.
        how: `Policy.trunk_pass`.
        dropout: of LoRA.
    """
    D, F, H = text.hidden_size, text.intermediate_size, text.num_attention_heads
    size = getattr(text, "head_dim", None) or D // H
    A, K = H * size, text.num_key_value_heads * size
    adapters: dict[str, Any] = {
        name.rpartition(".")[2]: m for name, m in layer.named_modules() if isinstance(m, LoraLayer)
    }
    dora = any(module.lora_variant for module in adapters.values())
    trains = not adapters and any(parameter.requires_grad for parameter in layer.parameters())
    # Compiled, DoRA keeps what it keeps otherwise: its outputs are products of matrices, none of them cheap.
    dense, compiled = how == "dense", how == "compiled" and not dora
    stream = 4 if trains and mixed else low  # bytes of a number in the residual stream

    # Queries, keys, values, output, and the softmax's log-sum in float32. SDPA has its mask as numbers, and keys and
    # values once for each query head.
    attention = (2 * A + 2 * (A if dense else K)) * low + 4 * H + (row * low if dense else 0)
    # Gate, its activation (computed again where compiled), and up.
    mlp = (2 if compiled else 3) * F * low
    # RMSNorm: its input, in float32 unless a compiled layer casts it again (and adds up the second one from the
    # attention's output), and 1 / its root mean square.
    attention += D * (stream if compiled else 4) + 4
    mlp += D * (low if compiled else 4) + 4
    if trains and not compiled:  # the normalised states, for the gradient of the norms' weights
        attention += D * stream
        mlp += D * stream

    inputs = {**dict.fromkeys((*ATTENTION_INPUTS, *MLP_INPUTS), D), "o_proj": A, "down_proj": F}
    wanted = list(adapters) if adapters else list(inputs) if trains else []

    def part(each: int, names: Sequence[str], workspace: int = 0) -> Kept:
        """With what its linear layers are given, for the gradients of their weights."""
        here = [name for name in names if name in wanted]
        if adapters and dropout:  # each its own, and the mask in bytes
            given = sum(inputs[name] for name in here) * low
            each += sum(inputs[name] for name in here)
        elif mixed and not compiled:  # each its own cast; but without LoRA the attention's output needs none
            given = sum(inputs[name] for name in here if adapters or name != "o_proj") * low
        else:  # one side by side; the output projection's is the attention's output, which is there already
            groups = [group for group in (ATTENTION_INPUTS, MLP_INPUTS, ("down_proj",)) if set(group) & set(here)]
            given = sum(inputs[group[0]] for group in groups) * low
        for module in (adapters[name] for name in here if adapters):
            each += module.lora_A[ADAPTER].out_features * low  # between A and B
            each += 2 * module.out_features * low if dora else 0  # its scale multiplies the outputs of base and LoRA
        weights = (p for name, p in layer.named_parameters() if p.requires_grad and p.ndim > 1 and _of(name, names))
        fixed = sum(p.numel() for p in weights) * low if mixed else 0
        return Kept(each + given, fixed, given if compiled else 0, workspace)

    # Gradients of the MLP's three wide tensors and of the residual stream; peft's casts make one of them float32.
    workspace = 3 * F * low + 4 * D * stream + (F * 4 if adapters and mixed and not compiled else 0)
    return part(attention, (*ATTENTION_INPUTS, "o_proj")), part(mlp, (*MLP_INPUTS, "down_proj"), workspace)


def _of(parameter: str, modules: Sequence[str]) -> bool:
    return bool(set(parameter.split(".")) & set(modules))


def projector(config: Any, low: int, mixed: bool) -> Kept:
    """A projector that trains, for a row of vision features: two linear layers' inputs, and the first one's output."""
    D, V = config.text_config.hidden_size, feature_size(config)
    return Kept(int(V + 2 * D) * low, int(V * D + D * D) * low if mixed else 0)


def post_decoder(decoder: PostDecoder, counts: Counts, low: int, mixed: bool) -> tuple[int, int]:
    """Bytes that a post decoder keeps for a batch: of its text side, and of its image side, which goes back last.

    LayerNorm runs in float32 under CUDA's autocast: its input is kept so, with mean and deviation.
    """
    block: Any = decoder.blocks[0]
    D, F = int(block.mlp.gate_proj.in_features), int(block.mlp.gate_proj.out_features)
    depth = len(decoder.blocks)
    states = counts.slots if decoder.reads_all_positions else counts.targets
    norm = 4 * D + 8

    def given(layers: int) -> int:
        """The input of linear layers side by side."""
        return (layers if mixed else 1) * D * low

    each = norm + given(2) + 4 * F * low  # MLP: gate, its activation, up and their product
    padded = image = 0  # for a slot, and for a row of vision features
    if decoder.align is not None:
        linears: list[Any] = list(decoder.align.linears)
        # The inputs of each linear layer and activation, the norm, and each block's keys and values.
        image += linears[0].in_features * low + sum(2 * linear.in_features for linear in linears[1:]) * low + norm
        image += depth * 2 * D * low + (depth * given(2) if mixed else given(1))
        each += norm + 2 * D * low  # the inputs of queries and output projection
        padded += 2 * D * low + 4 * block.cross_attention.num_heads  # queries, output, the softmax's log-sum
    if decoder.reads_all_positions:
        each += norm + given(3) + 4 * D * low + 4 * block.self_attention.num_heads
        padded += counts.slots // counts.trees * low  # the mask as numbers
    fixed = sum(p.numel() for p in decoder.parameters() if p.ndim > 1) * low if mixed else 0
    return int(depth * (states * each + counts.slots * padded) + fixed), int(counts.padded_features * image)


def logits(vocabulary: int, targets: int, low: int, compiled: bool) -> tuple[int, int]:
    """Bytes of the logits and of their gradient, of one chunk (`policy.token_log_probs`); and of what is beside them.

    That is nothing where `log_probs` is compiled; else the parts that the gradient is put together from, or some rows
    of them in float32.
    """
    rows = min(targets, max(1, LOGITS_BYTES // (4 * vocabulary)))
    parts = 0 if compiled else max(rows * vocabulary * low, 3 * min(ROWS, rows) * vocabulary * 4)
    return 2 * rows * vocabulary * low, parts
