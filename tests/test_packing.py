"""Trees: what is packed, who sees whom, and that the states are those of separate rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.tiny import tilted, tiny_llava
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers import AttentionInterface, GemmaConfig, GemmaModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from relook.data.packing import (
    PADDING,
    PREFIX,
    ROOT,
    PackedTrees,
    TokenRow,
    Tree,
    batch_targets,
    common_root_length,
    pack,
    round_up_to_blocks,
    to_device,
)
from relook.forward import packed_attention
from relook.forward.packed_attention import PackedTrunk, block_mask

PAD = 3
LANGUAGE_MODEL = tiny_llava().model.language_model


def row(text: str) -> TokenRow:
    """A row from a word: each letter is a token, and capitals are targets."""
    return TokenRow(tuple(ord(letter.lower()) - ord("a") + 5 for letter in text), tuple(map(str.isupper, text)))


@st.composite
def branches(draw: st.DrawFn) -> TokenRow:
    ids = draw(st.lists(st.integers(5, 89), min_size=1, max_size=6))
    flags = [draw(st.booleans()) for _ in ids]
    flags[draw(st.integers(0, len(ids) - 1))] = True
    return TokenRow(tuple(ids), tuple(flags))


TREES = st.lists(
    st.builds(
        Tree,
        st.lists(st.integers(5, 89), min_size=1, max_size=7).map(tuple),
        st.lists(branches(), min_size=1, max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=5,
)
ROOTS = st.lists(st.integers(5, 89), max_size=4).map(tuple)
SHARING = st.sampled_from([None, 1, 2, 3])


def under(root: tuple[int, ...], trees: list[Tree]) -> list[Tree]:
    """Trees that all begin with it."""
    return [Tree((*root, *tree.prefix), tree.branches) for tree in trees]


# --- Tree.of


@pytest.mark.parametrize(
    ("words", "prefix", "rests"),
    [
        (["abcDE", "abcFG"], "abc", ["DE", "FG"]),  # the usual pair
        (["abcDE", "abcDF"], "abc", ["DE", "DF"]),  # targets are never shared, though their tokens are the same
        (["abcDE", "abxDE"], "ab", ["cDE", "xDE"]),  # prompts that part early keep their remainders
        (["abcDE"], "abc", ["DE"]),  # one row alone
        (["abcDE", "abcDE"], "abc", ["DE", "DE"]),
        (["abcD", "abCD", "abcdE"], "ab", ["cD", "CD", "cdE"]),  # the earliest target ends the prefix
        (["abc", "abcD"], "ab", ["c", "cD"]),  # a row that is the others' beginning keeps one token
        (["abc"], "ab", ["c"]),  # nothing supervised
    ],
)
def test_the_longest_common_unsupervised_prefix_is_shared(words: list[str], prefix: str, rests: list[str]) -> None:
    tree = Tree.of([row(word) for word in words])
    assert tree == Tree(row(prefix).ids, tuple(row(rest) for rest in rests))
    assert len(tree) == len(prefix) + sum(map(len, rests))


@pytest.mark.parametrize("words", [["Abc", "abc"], ["abC", "xbC"], ["a", "ab"]])
def test_rows_without_a_common_prefix_make_no_tree(words: list[str]) -> None:
    with pytest.raises(ValueError, match="no common unsupervised prefix"):
        Tree.of([row(word) for word in words])


@given(st.lists(branches(), min_size=1, max_size=4), st.lists(st.integers(5, 89), min_size=1, max_size=5))
def test_a_tree_holds_exactly_its_rows(rests: list[TokenRow], prefix: list[int]) -> None:
    rows = [TokenRow((*prefix, *rest.ids), (*[False] * len(prefix), *rest.supervised)) for rest in rests]
    tree = Tree.of(rows)
    assert [(*tree.prefix, *branch.ids) for branch in tree.branches] == [row.ids for row in rows]
    assert all(
        branch.supervised == row.supervised[len(tree.prefix) :] for branch, row in zip(tree.branches, rows, strict=True)
    )
    assert len(tree.prefix) >= len(prefix) - 1


# --- structure of a batch, against a plain path-by-path account


@given(TREES, ROOTS, SHARING, st.booleans(), st.sampled_from([None, 0, 8, 1000]))
def test_packed_structure(
    trees: list[Tree], beginning: tuple[int, ...], sharing: int | None, everything: bool, spare: int | None
) -> None:
    trees, root = under(beginning, trees), len(beginning)
    row_length = None if spare is None else max(map(len, trees)) + spare
    packed = pack(trees, PAD, everything, row_length, root_length=root, trees_per_root=sharing)
    R, L = packed.ids.shape
    mask = packed.dense_mask()[:, 0]
    flat = {name: getattr(packed, name).flatten().tolist() for name in ("ids", "position_ids", "tree_index")}
    longest = max(map(len, trees))
    assert longest == L if row_length is None else longest <= L <= row_length
    assert [t for t in dict.fromkeys(flat["tree_index"]) if t >= 0] == list(range(len(trees)))
    in_rows = [len({t for t in row.tolist() if t >= 0}) for row in packed.tree_index]
    assert flat["tree_index"].count(ROOT) == root * sum(-(-count // (sharing or count)) for count in in_rows)

    expected: list[tuple[int, int, int, int]] = []  # tree, flat place of the predecessor, id, branch
    seen_places: set[int] = set()
    branch_count = 0
    for t, tree in enumerate(trees):
        places = [place for place, owner in enumerate(flat["tree_index"]) if owner == t]
        before = range(places[0] // L * L, places[0])
        places = [*[place for place in before if flat["tree_index"][place] == ROOT][-root or len(before) :], *places]
        assert len(places) == len(tree)
        assert places[-1] // L == places[0] // L
        shared = places[: len(tree.prefix)]
        start = len(tree.prefix)
        for branch in tree.branches:
            own = places[start : start + len(branch.ids)]
            start += len(own)
            path = [*shared, *own]
            assert [flat["ids"][place] for place in path] == [*tree.prefix, *branch.ids]
            assert [flat["position_ids"][place] for place in path] == list(range(len(path)))
            for i, place in enumerate(path):
                sees = mask[place // L, place % L].nonzero().flatten().tolist()
                assert sees == [other % L for other in path[: i + 1]]
            for i, supervised in enumerate(branch.supervised):
                if supervised:
                    expected.append((t, path[len(shared) + i - 1], branch.ids[i], branch_count))
            branch_count += 1
        seen_places.update(places)

    targets = packed.targets
    found = zip(targets.tree, packed.keep[targets.tree, targets.slot], targets.id, targets.branch, strict=True)
    assert [tuple(map(int, entry)) for entry in found] == expected
    assert targets.branches == branch_count
    padding = [place for place in range(R * L) if place not in seen_places]
    assert all(flat["ids"][place] == PAD and flat["tree_index"][place] == PADDING for place in padding)
    assert mask.any(-1).all()  # a query that sees nothing would be 0/0


@given(TREES, ROOTS, SHARING, st.booleans())
def test_kept_slots(trees: list[Tree], beginning: tuple[int, ...], sharing: int | None, everything: bool) -> None:
    trees = under(beginning, trees)
    packed = pack(trees, PAD, everything, root_length=len(beginning), trees_per_root=sharing)
    targets = batch_targets(trees, everything)
    seen = packed.dense_mask()[:, 0]
    allowed = targets.self_attention_mask()
    for t, tree in enumerate(trees):
        filled = int((targets.kept_branch[t] != PADDING).sum())
        places = packed.keep[t, :filled]
        assert (targets.kept_branch[t, filled:] == PADDING).all()
        assert (places.diff() > 0).all()
        used = {int(slot) for slot in targets.slot[targets.tree == t]}
        assert filled == (len(tree) if everything else len(used))
        L = packed.ids.shape[1]
        assert torch.equal(allowed[t, :filled, :filled], seen[t][places % L][:, places % L])
        assert not allowed[t, :filled, filled:].any()
    assert allowed.diagonal(dim1=1, dim2=2).all()


@given(TREES)
def test_sums_by_branch(trees: list[Tree]) -> None:
    targets = batch_targets(trees)
    sums = targets.sum_by_branch(torch.ones(len(targets.id)))
    assert sums.tolist() == [sum(branch.supervised) for tree in trees for branch in tree.branches]


@given(TREES, ROOTS, st.integers(0, 6))
def test_the_root_ends_where_trees_part_or_an_image_begins(
    trees: list[Tree], beginning: tuple[int, ...], image: int
) -> None:
    trees = under((*beginning, *([1] * image)), trees)
    root = common_root_length(trees, image_token_id=1)
    starts = [tree.prefix[:root] for tree in trees]
    assert len(set(starts)) == 1
    assert 1 not in starts[0]
    assert root >= len(beginning)
    assert all(len(tree.prefix) > root for tree in trees)
    longer = [tree.prefix[root] for tree in trees]
    ends = any(len(tree.prefix) == root + 1 for tree in trees)
    assert ends or len(set(longer)) > 1 or longer[0] == 1


def test_moving_a_batch_moves_its_targets_too() -> None:
    packed = to_device(pack([Tree.of([row("abC"), row("abD")])], PAD), "meta")
    assert {packed.ids.device.type, packed.keep.device.type, packed.targets.kept_branch.device.type} == {"meta"}


# --- states


@contextmanager
def uncompiled() -> Iterator[None]:
    """FlexAttention computes as it is written: torch's compiler takes half a minute here."""
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        yield


def check_states(trees: list[Tree], packed: PackedTrees, how: str) -> None:
    """Against transformers' own forward over each path alone: no mask, no positions given, no padding."""
    with torch.no_grad():
        states = PackedTrunk(LANGUAGE_MODEL, how)(LANGUAGE_MODEL.embed_tokens(packed.ids), packed)
        assert states.isfinite().all()
        assert states.shape[:2] == packed.keep.shape
        for tree, kept, numbers in zip(trees, states, packed.targets.kept_branch, strict=True):
            for number, branch in enumerate(tree.branches, 1):
                alone = LANGUAGE_MODEL(input_ids=torch.tensor([[*tree.prefix, *branch.ids]])).last_hidden_state[0]
                fork = len(tree.prefix) - 1
                mine = kept[numbers == number]
                if len(mine) == len(branch.ids):  # the states of all positions are kept
                    torch.testing.assert_close(kept[: fork + 1], alone[: fork + 1], rtol=1e-5, atol=1e-5)
                    torch.testing.assert_close(mine, alone[fork + 1 :], rtol=1e-5, atol=1e-5)
                    continue
                sources = [i - 1 for i, supervised in enumerate(branch.supervised) if supervised]
                wanted = alone[[fork + 1 + i for i in sources if i >= 0]]
                used = [i for i, _ in enumerate(branch.ids) if i in sources]
                assert len(mine) == len(used)
                torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-5)
                if -1 in sources:
                    torch.testing.assert_close(kept[numbers == PREFIX][-1], alone[fork], rtol=1e-5, atol=1e-5)


@settings(max_examples=30)
@given(TREES, ROOTS, SHARING, st.booleans(), st.sampled_from([None, 0, 20]))
def test_states_are_those_of_separate_rows(
    trees: list[Tree], beginning: tuple[int, ...], sharing: int | None, everything: bool, spare: int | None
) -> None:
    trees, root = under(beginning, trees), len(beginning)
    row_length = None if spare is None else max(map(len, trees)) + spare
    check_states(trees, pack(trees, PAD, everything, row_length, root_length=root, trees_per_root=sharing), "dense")


@pytest.mark.slow
@settings(max_examples=10)
@given(TREES, ROOTS, SHARING, st.booleans(), st.sampled_from(["flex", "compiled"]), st.sampled_from([30, 1000]))
def test_flex_attention_gives_the_same_states(
    trees: list[Tree], beginning: tuple[int, ...], sharing: int | None, everything: bool, how: str, row_length: int
) -> None:
    trees, root = under(beginning, trees), len(beginning)
    with uncompiled():
        check_states(trees, pack(trees, PAD, everything, row_length, round_up_to_blocks, root, sharing), how)


def test_a_dense_pass_does_not_attend_as_a_pass_with_gradients_before_it() -> None:
    """That one leaves FlexAttention set, for layers that are recomputed in its backward pass."""
    trees, model = [Tree.of([row("abcDEF"), row("abXYZ")])], tiny_llava().model.language_model.requires_grad_(False)
    packed, long = pack(trees, PAD), pack(trees, PAD, False, 1000, round_up_to_blocks)
    with uncompiled():
        PackedTrunk(model, "flex")(model.embed_tokens(long.ids), long)
    with torch.no_grad():
        states = PackedTrunk(model, "dense")(model.embed_tokens(packed.ids), packed)
        expected = PackedTrunk(LANGUAGE_MODEL, "dense")(LANGUAGE_MODEL.embed_tokens(packed.ids), packed)
    torch.testing.assert_close(states, expected)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flex", "compiled"])
def test_flex_attention_compiled_gives_the_same_states(how: str) -> None:
    """And other trees of that length are not compiled for again."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        for word in ("abcDEF", "abCDE"):
            trees = [Tree.of([row(word), row("abXYZ")])] * 9
            check_states(trees, pack(trees, PAD, True, 1000, round_up_to_blocks, root_length=2), how)


@pytest.mark.slow  # torch compiles
def test_models_share_compiled_code_whatever_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """One kind of layer, and the last one: not anew for a second model, or for another number of kept positions."""
    made: list[Any] = []
    whole = torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(inputs)
        return graph

    monkeypatch.setattr(torch, "compile", lambda layer, dynamic: whole(layer, backend=backend))
    monkeypatch.setattr(packed_attention, "has_sparse_last_mlp", lambda *_: True)
    models = [tiny_llava(seed).model.language_model for seed in (0, 1)]
    passes = [PackedTrunk(model, "compiled") for model in models]
    with torch.no_grad():
        for number, times, word in ((0, 3, "abcDEF"), (1, 3, "abcDEFG"), (1, 2, "abcDEFGH"), (0, 4, "abcDE")):
            trees = [Tree.of([row(word), row("abXYZ")])] * times
            packed = pack(trees, PAD, False, 1000, lambda _: 256, 1)
            passes[number](models[number].embed_tokens(packed.ids), packed)
    assert len(made) == 2


@settings(max_examples=15)
@given(TREES, ROOTS, SHARING, st.integers(1, 80), st.sampled_from([1, 30]), st.sampled_from([20, 300, 10_000]))
def test_the_block_mask_is_the_dense_one(
    trees: list[Tree], beginning: tuple[int, ...], sharing: int | None, times: int, stretch: int, row_length: int
) -> None:
    """Against torch's own way from the same rule to blocks; trees repeated, so that there are several blocks.

    Stretched trees fill blocks of their own.
    """
    beginning = beginning * stretch
    trees = under(beginning, [Tree(tree.prefix * stretch, tree.branches) for tree in trees] * (times // stretch + 1))
    packed = pack(trees, PAD, True, row_length + len(beginning), round_up_to_blocks, len(beginning), sharing)
    dense = packed.dense_mask()
    R, _, L, _ = dense.shape
    made = block_mask(packed)
    rule = create_mask(made.mask_mod, R, 1, L, L, device="cpu")
    assert torch.equal(rule, dense)
    expected = create_block_mask(lambda r, h, q, k: dense[r, 0, q, k], R, 1, L, L, device="cpu")
    assert torch.equal(made.to_dense(), expected.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks"):
        found, wanted = getattr(made, name), getattr(expected, name)
        assert torch.equal(found, wanted)
    for number, indices in (("kv_num_blocks", "kv_indices"), ("full_kv_num_blocks", "full_kv_indices")):
        count = getattr(made, number)[..., None]
        inside = torch.arange(L // 128) < count
        assert torch.equal(getattr(made, indices)[inside], getattr(expected, indices)[inside])
    # What the kernels take for granted: read with other strides, the same numbers name other blocks.
    lists = [
        f"{full}{side}_{what}" for full in ("", "full_") for side in ["kv", "q"] for what in ("num_blocks", "indices")
    ]
    assert all(getattr(made, name).is_contiguous() for name in lists)


def test_a_last_layer_that_is_not_known_runs_whole() -> None:
    """Gemma's has another order; and one whose `forward` somebody replaced may do anything."""
    packed = pack([Tree.of([row("abC"), row("abD")])] * 3, PAD)
    config = GemmaConfig(vocab_size=95, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=2, num_key_value_heads=2, head_dim=16)  # fmt: skip
    gemma, patched = GemmaModel(config).eval(), tiny_llava().model.language_model
    calls: list[int] = []
    plain = patched.layers[-1].forward
    patched.layers[-1].forward = lambda *of, **more: calls.append(len(of)) or plain(*of, **more)
    for model in (gemma, patched):
        assert not packed_attention.has_sparse_last_mlp(model, "dense")
        assert PackedTrunk(model, "dense").sparse_last_layer is None
    assert packed_attention.has_sparse_last_mlp(LANGUAGE_MODEL, "dense")
    with torch.no_grad():
        embeds = LANGUAGE_MODEL.embed_tokens(packed.ids)
        found, expected = (
            PackedTrunk(patched, "dense")(embeds, packed),
            PackedTrunk(LANGUAGE_MODEL, "dense")(embeds, packed),
        )
    assert calls
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_after_a_pass_the_model_is_as_it_was() -> None:
    """`generate` runs on the same modules: their attention is SDPA again, and they are not compiled."""
    trees = [Tree.of([row("abC")])]
    before = list(LANGUAGE_MODEL.layers)
    with uncompiled():
        check_states(trees, pack(trees, PAD, True, 1000, round_up_to_blocks), "compiled")
    assert LANGUAGE_MODEL.config._attn_implementation == "sdpa"
    assert all(now is then for now, then in zip(LANGUAGE_MODEL.layers, before, strict=True))


def flex_attention_by_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention has no backward pass on a CPU: SDPA stands in for it, with the block mask's own rule."""

    def as_sdpa(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **more: Any) -> Any:
        assert isinstance(mask, BlockMask)
        rows, places = torch.arange(q.shape[0])[:, None, None, None], torch.arange(q.shape[2])
        return sdpa_attention_forward(module, q, k, v, mask.mask_mod(rows, rows, places[:, None], places), **more)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flex_attention", as_sdpa)


@pytest.mark.parametrize("everything", [False, True])
def test_layers_that_run_again_in_the_backward_pass_have_the_same_attention(
    everything: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    flex_attention_by_sdpa(monkeypatch)
    trees = [Tree.of([row("abcDEF"), row("abcGH")]), Tree.of([row("abC")])]
    packed = pack(trees, PAD, everything, 1000, round_up_to_blocks, 1)
    gradients = []
    for how in ("dense", "flex"):
        model = tiny_llava().model.language_model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        embeds = model.embed_tokens(packed.ids).detach().requires_grad_(True)
        states = PackedTrunk(model, how)(embeds, packed)[packed.targets.kept_branch != PADDING]
        tilted(states).square().sum().backward()
        gradients.append(embeds.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)
