"""Losses against values by hand, and the preference loss against plain rows through transformers' own forward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.tiny import pixels, prompt, tiny_llava, tiny_relook
from helpers.variants import crossed
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from relook.data.encode import Example
from relook.data.packing import TokenRow, Tree, batch_targets, pack
from relook.forward import policy
from relook.forward.collate import preference_weights
from relook.forward.policy import LiveBatch, Policy, token_log_probs
from relook.recipe import CHOICES, LENGTH_NORMALISED, REFERENCE_FREE, Recipe
from relook.toyworld.build import make_processor
from relook.train import loss
from relook.train.loss import PAIR_LOSSES, dpo_sigmoid, metric_names, negative_log_likelihood, preference_loss


def recipe(**keys: Any) -> Recipe:
    return Recipe("dpo", "base", "out", vg_path="vg", pope_data_path="pope", **keys)


def test_dpo_by_hand() -> None:
    chosen, rejected = torch.tensor([0.0, 2.0, -1.0, 300.0]), torch.tensor([0.0, -1.0, 4.0, -300.0])
    expected = [math.log(2), math.log1p(math.exp(-0.3)), math.log1p(math.exp(0.5)), math.log1p(math.exp(-60))]
    torch.testing.assert_close(dpo_sigmoid(chosen, rejected, 0.1), torch.tensor(expected))


def test_dpo_stays_finite_far_from_the_reference() -> None:
    """Where sigmoid itself underflows, the loss is the line -beta * difference."""
    loss = dpo_sigmoid(torch.tensor([-5000.0]), torch.tensor([5000.0]), 0.1)
    torch.testing.assert_close(loss, torch.tensor([1000.0]))


def test_dpo_gradient_by_hand() -> None:
    """d/dc -log sigmoid(b (c - r)) = -b sigmoid(-b (c - r)), and the opposite for r."""
    chosen = torch.tensor([0.0, 1.5], requires_grad=True)
    rejected = torch.tensor([0.0, -0.5], requires_grad=True)
    dpo_sigmoid(chosen, rejected, 0.5).sum().backward()
    pull = [0.5 * 0.5, 0.5 / (1 + math.exp(1.0))]
    assert chosen.grad is not None
    assert rejected.grad is not None
    torch.testing.assert_close(chosen.grad, -torch.tensor(pull))
    torch.testing.assert_close(rejected.grad, torch.tensor(pull))


def test_nll_is_a_mean_over_tokens() -> None:
    log_probs = torch.log(torch.tensor([0.5, 0.25, 0.125]))
    torch.testing.assert_close(negative_log_likelihood(log_probs), torch.tensor(2 * math.log(2)))
    counts = torch.tensor([True, False, True])
    torch.testing.assert_close(negative_log_likelihood(log_probs, counts), torch.tensor(2 * math.log(2)))
    torch.testing.assert_close(negative_log_likelihood(log_probs, ~counts), torch.tensor(2 * math.log(2)))
    # A response of one token and one of two, each counting once: (1 + (2 + 3) / 2) / 2 times ln 2.
    weights = torch.tensor([1.0, 0.5, 0.5])
    torch.testing.assert_close(negative_log_likelihood(log_probs, weights), torch.tensor(1.75 * math.log(2)))


def one(value: float) -> torch.Tensor:
    return torch.tensor([value])


LN3 = math.log(3)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (loss.dpo_ipo(one(2.0), one(-1.0), 0.25), 1.0),  # (3 - 2)^2
        (loss.dpo_ipo(one(0.0), one(0.0), 0.1), 25.0),  # (0 - 5)^2
        (loss.dpo_hinge(one(2.0), one(-1.0), 0.1), 0.7),  # 1 - 0.3
        (loss.dpo_hinge(one(20.0), one(0.0), 0.1), 0.0),
        # sigmoid(ln 3) = 3/4: (0.8 ln 4/3 - 0.2 ln 4) / 0.6
        (loss.dpo_robust(one(LN3), one(0.0), 1.0, 0.2), (0.8 * math.log(4 / 3) - 0.2 * math.log(4)) / 0.6),
        (loss.simpo(one(LN3), one(0.0), 2.0, LN3), math.log(4 / 3)),  # 2 ln 3 - ln 3 = ln 3
        (loss.simpo(one(-1.0), one(-1.0), 2.0, 0.0), math.log(2)),
        # p = 3/4 has odds 3, p = 1/2 has odds 1
        (loss.orpo(one(math.log(0.75)), one(math.log(0.5)), 0.5), 0.5 * math.log(4 / 3)),
        (loss.orpo(one(-4.0), one(-4.0), 1.0), math.log(2)),
        (loss.mdpo_conditional(one(1.0), one(1.0 - 2 * LN3), 0.5), math.log(4 / 3)),
        (loss.mdpo_anchored(one(2 * LN3), 0.5, 0.0), math.log(4 / 3)),
        (loss.mdpo_anchored(one(0.0), 0.5, -LN3), math.log(4 / 3)),
        (loss.sigmoid_norm(one(2 * LN3), one(LN3), 1.0), math.log(4 / 3)),
        (loss.bco_pair(one(LN3), one(-LN3), 1.0), 2 * math.log(4 / 3)),
        (loss.apo_zero(one(2 * LN3), one(0.0), 0.5), 1 / 4 + 1 / 2),
        (loss.apo_down(one(2 * LN3), one(4 * LN3), 0.5), 3 / 4 + 3 / 4),
    ],
)
def test_the_other_losses_by_hand(loss: Tensor, expected: float) -> None:
    assert loss.shape == (1,)
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


numbers = st.floats(-200, 0, width=32)
betas = st.floats(0.01, 3)


def of_kind(kind: str, beta: float, **keys: float) -> Recipe:
    more = {"robust": {"label_smoothing": 0.1}, "orpo": {"nll_weight": 1.0}}.get(kind, {})
    return recipe(loss_type=kind, beta=beta, **more, **keys)


def pair_loss(recipe: Recipe, chosen: Tensor, rejected: Tensor) -> Tensor:
    return PAIR_LOSSES[recipe.loss_type].equation(recipe, chosen, rejected)


@pytest.mark.parametrize(
    ("kind", "corrupted"),
    [*((kind, 0.0) for kind in PAIR_LOSSES), *((kind, 1.0) for kind in PAIR_LOSSES if kind not in LENGTH_NORMALISED)],
)
def test_a_loss_logs_what_it_declares(kind: str, corrupted: float) -> None:
    """In that order, on a pair with answers of one token, and mDPO's copy of it on a corrupted image."""
    how, token = of_kind(kind, 2.0, mdpo_conditional_weight=corrupted), TokenRow((0,), (True,))
    targets = batch_targets([Tree((0,), (token, token)), *([Tree((0,), (token,))] if corrupted else [])])
    log_probs = torch.ones(len(targets.id))
    _, fields = preference_loss(how, -log_probs, targets, None if kind in REFERENCE_FREE else -log_probs, log_probs)
    assert ["loss", *fields] == metric_names(how)


def test_every_loss_type_is_registered() -> None:
    assert (*PAIR_LOSSES, "kto") == CHOICES["loss_type"]


@given(numbers, betas)
def test_equal_answers_give_ln_2(value: float, beta: float) -> None:
    same = one(value)
    for kind in ("sigmoid", "robust"):
        assert pair_loss(of_kind(kind, beta), same, same).item() == pytest.approx(math.log(2), rel=1e-5)
    assert pair_loss(of_kind("orpo", beta), same, same).item() == pytest.approx(beta * math.log(2), rel=1e-5)
    assert pair_loss(of_kind("hinge", beta), same, same).item() == 1
    assert loss.mdpo_conditional(same, same, beta).item() == pytest.approx(math.log(2), rel=1e-5)
    assert loss.mdpo_anchored(0 * same, beta, 0.0).item() == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.parametrize("kind", PAIR_LOSSES)
@given(chosen=numbers, rejected=numbers, beta=betas)
def test_every_loss_is_finite_and_pulls_the_right_way(kind: str, chosen: float, rejected: float, beta: float) -> None:
    """Up to log-probs of 0, where odds are infinite. IPO pulls back from beyond its aim, robust from the far side."""
    a, b = one(chosen).requires_grad_(), one(rejected).requires_grad_()
    loss = pair_loss(of_kind(kind, beta), a, b)
    loss.sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    assert torch.stack([loss.detach(), a.grad, b.grad]).isfinite().all()
    within = {
        "ipo": chosen - rejected <= 1 / (2 * beta),
        "robust": beta * (chosen - rejected) <= 0,
        "apo_down": abs(chosen - rejected) <= 0.9 * abs(chosen),  # elsewhere it also lowers the chosen answer
    }.get(kind, True)
    if within:
        assert a.grad.item() <= 0 <= b.grad.item()


def test_token_weights_by_hand() -> None:
    """DDPO's weighted mean, and LD-DPO's factor behind the shorter response; chosen 5 6 7, rejected 5 8 7 9 9."""
    chosen, rejected = (TokenRow(ids, (True,) * len(ids)) for ids in ((5, 6, 7), (5, 8, 7, 9, 9)))
    tree, log_probs = Tree((1,), (chosen, rejected)), torch.tensor([-1.0, -2, -3, -1, -4, -3, -5, -6])
    weights = preference_weights(Example("", tree, ()), "differing", unchanged_weight=0.2)
    torch.testing.assert_close(weights, torch.tensor([0.2, 1, 0.2, 0.2, 1, 0.2, 1, 1]))
    how = recipe(loss_type="sigmoid_norm", beta=1.0, dpo_tokens="differing", unchanged_weight=0.2)
    loss, _ = preference_loss(how, log_probs, batch_targets([tree]), 0 * log_probs, weights)
    # (unchanged + 5 * changed) / (number unchanged + 5 * number changed)
    means = (-1 - 3 + 5 * -2) / (2 + 5), (-1 - 3 + 5 * (-4 - 5 - 6)) / (2 + 5 * 3)
    assert loss.item() == pytest.approx(math.log1p(math.exp(means[1] - means[0])), rel=1e-5)
    alpha = preference_weights(Example("", tree, ()), ld_alpha=0.3)
    torch.testing.assert_close(alpha, torch.tensor([1.0, 1, 1, 1, 1, 1, 0.3, 0.3]))


def test_a_sum_of_losses_is_weighted() -> None:
    tree = Tree((1,), tuple(TokenRow((i,), (True,)) for i in (5, 6)))
    log_probs, weight = torch.tensor([-1.0, -2.0]), torch.ones(2)
    how = recipe(loss_type={"sigmoid": 0.8, "simpo": 0.2}, beta=2.0, dpo_weight=0.5)
    found, fields = preference_loss(how, log_probs, batch_targets([tree]), torch.tensor([-2.0, -2.0]), weight)
    both = 0.8 * dpo_sigmoid(one(1.0), one(0.0), 2.0) + 0.2 * loss.simpo(one(-1.0), one(-2.0), 2.0, how.simpo_gamma)
    assert found.item() == pytest.approx(0.5 * both.item(), rel=1e-6)
    assert ["loss", *fields] == metric_names(how)


@given(numbers, numbers, betas)
def test_no_smoothing_is_dpo(chosen: float, rejected: float, beta: float) -> None:
    torch.testing.assert_close(
        loss.dpo_robust(one(chosen), one(rejected), beta, 0.0), dpo_sigmoid(one(chosen), one(rejected), beta)
    )


def test_token_log_probs_are_float32_whatever_the_states() -> None:
    torch.manual_seed(0)
    head, states, ids = torch.nn.Linear(8, 11, bias=False), torch.randn(5, 8), torch.tensor([0, 3, 10, 3, 7])
    expected = head(states).log_softmax(-1)[torch.arange(5), ids]
    torch.testing.assert_close(token_log_probs(head, states, ids), expected)
    log_probs = token_log_probs(head.bfloat16(), states.bfloat16(), ids)
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, expected, rtol=0.05, atol=0.05)


# --- a batch of pairs, against separate rows

ANSWERS = (
    ("There is a cup.</s>", "There is a dog. There is a cup.</s>"),
    ("Yes.</s>", "No.</s>"),
    ("No.</s>", "There is a bed. There is a bed. There is a bed.</s>"),
)


def pairs(model: Any) -> list[tuple[TokenRow, TokenRow]]:
    """Three pairs of rows with one image each, of different lengths."""
    tokenizer = make_processor().tokenizer
    rows = []
    for question, answers in zip(("Is there a cup?", "Describe this image in detail.", "a"), ANSWERS, strict=True):
        start = prompt(model, question)
        ends = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in answers]
        chosen, rejected = (TokenRow((*start, *end), (*[False] * len(start), *[True] * len(end))) for end in ends)
        rows.append((chosen, rejected))
    return rows


def separate(model: Any, row: TokenRow, picture: Tensor) -> Tensor:
    """Log-probs of a row's targets by transformers' forward on that row alone."""
    logits = model(input_ids=torch.tensor([row.ids]), pixel_values=picture[None]).logits[0]
    start = row.supervised.index(True)
    ids = torch.tensor(row.ids[start:])
    return logits[start - 1 : -1].log_softmax(-1).gather(-1, ids[:, None])[:, 0]


WEIGHTS = ({}, {"beta": 0.3, "nll_weight": 0.7, "dpo_weight": 0.5}, {"dpo_weight": 0.0, "nll_weight": 1.0})
SETTINGS = ({"attention": "self_cross"}, {}, {"attention": "none", "depth": 2})
ROW_LENGTHS = (200, None)  # several trees a row, and one


@pytest.mark.parametrize(("keys", "settings", "row_length"), crossed(WEIGHTS, SETTINGS, ROW_LENGTHS))
@torch.no_grad()
def test_preference_loss_and_its_fields(keys: dict[str, Any], settings: dict[str, Any], row_length: int | None) -> None:
    model, base = tiny_relook(**settings), tiny_llava()
    rows, pictures, how = pairs(base), pixels(3), recipe(**keys)

    # relook: trees, packed
    policy, reference = Policy(model), Policy(base)
    trees = [Tree.of(pair) for pair in rows]
    ours, theirs = (
        LiveBatch(pack(trees, 3, p.needs_all_states, row_length), pictures, [1] * 3) for p in (policy, reference)
    )
    log_probs, by_reference = policy(ours), reference(theirs)
    weight = (torch.arange(len(log_probs)) % 3 != 0).float()
    loss, fields = preference_loss(how, log_probs, ours.packed.targets, by_reference, weight)

    # the same by rows: chosen, rejected, chosen, ...
    flat = [(row, picture) for pair, picture in zip(rows, pictures, strict=True) for row in pair]
    row_log_probs = [separate(model, row, picture) for row, picture in flat]
    anchor = [separate(base, row, picture) for row, picture in flat]
    torch.testing.assert_close(log_probs, torch.cat(row_log_probs), rtol=1e-4, atol=1e-4)
    counted = weight.split([len(part) for part in row_log_probs])
    policy_sums = [float((p * w).sum()) for p, w in zip(row_log_probs, counted, strict=True)]
    anchor_sums = [float((p * w).sum()) for p, w in zip(anchor, counted, strict=True)]
    ratios = [p - a for p, a in zip(policy_sums, anchor_sums, strict=True)]
    margins = [c - r for c, r in zip(ratios[::2], ratios[1::2], strict=True)]
    dpo = sum(math.log1p(math.exp(-how.beta * margin)) for margin in margins) / 3
    nll = -float(torch.cat(row_log_probs[::2]).mean())
    expected = {
        "rewards/chosen": how.beta * sum(ratios[::2]) / 3,
        "rewards/rejected": how.beta * sum(ratios[1::2]) / 3,
        "rewards/accuracies": sum(margin > 0 for margin in margins) / 3,
        "rewards/margins": how.beta * sum(margins) / 3,
        "policy_logps/chosen": sum(policy_sums[::2]) / 3,
        "policy_logps/rejected": sum(policy_sums[1::2]) / 3,
        "reference_logps/chosen": sum(anchor_sums[::2]) / 3,
        "reference_logps/rejected": sum(anchor_sums[1::2]) / 3,
        "nll": nll,
    }
    assert {name: float(value) for name, value in fields.items()} == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert float(loss) == pytest.approx(how.dpo_weight * dpo + how.nll_weight * nll, rel=1e-4)


@torch.no_grad()
def test_mdpos_terms_against_separate_rows() -> None:
    """The chosen answers on other pictures are trees behind the pairs' own ones."""
    model, base, how = tiny_relook(), tiny_llava(), recipe(
        beta=0.3, nll_weight=0.5, mdpo_conditional_weight=0.7, mdpo_anchored_weight=0.2, mdpo_anchor=0.1
    )  # fmt: skip
    rows, pictures, corrupted = pairs(base), pixels(3), pixels(3, seed=1)
    trees = [Tree.of(pair) for pair in rows]
    trees += [Tree(tree.prefix, tree.branches[:1]) for tree in trees]
    batch = LiveBatch(pack(trees, 3, row_length=200), torch.cat([pictures, corrupted]), [1] * 6)
    log_probs, by_reference = Policy(model)(batch), Policy(base)(batch)
    loss, fields = preference_loss(how, log_probs, batch.packed.targets, by_reference, torch.ones_like(log_probs))

    rewards = {
        name: [
            0.3 * float((separate(model, pair[side], picture) - separate(base, pair[side], picture)).sum())
            for pair, picture in zip(rows, those, strict=True)
        ]
        for name, side, those in (("chosen", 0, pictures), ("rejected", 1, pictures), ("corrupted", 0, corrupted))
    }
    nll = -float(
        torch.cat([separate(model, pair[0], picture) for pair, picture in zip(rows, pictures, strict=True)]).mean()
    )
    parts = [
        math.log1p(math.exp(r - c)) + 0.7 * math.log1p(math.exp(k - c)) + 0.2 * math.log1p(math.exp(0.1 - c))
        for c, r, k in zip(*rewards.values(), strict=True)
    ]
    assert float(loss) == pytest.approx(sum(parts) / 3 + 0.5 * nll, rel=1e-4)
    for name, values in rewards.items():
        assert float(fields[f"rewards/{name}"]) == pytest.approx(sum(values) / 3, abs=1e-4)
    right = sum(c > k for c, k in zip(rewards["chosen"], rewards["corrupted"], strict=True)) / 3
    assert float(fields["rewards/corrupted_accuracies"]) == pytest.approx(right)
    assert float(fields["nll"]) == pytest.approx(nll, abs=1e-4)


# --- lm_head in chunks


def test_log_probs_in_chunks_are_the_same_and_hold_one_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, and how many rows of logits the head makes at a time and the backward pass keeps."""
    torch.manual_seed(0)
    head, states = torch.nn.Linear(16, 50, bias=False), torch.randn(23, 16, requires_grad=True)
    ids, pull = torch.randint(50, (23,)), torch.randn(23)
    rows: list[int] = []
    shapes: list[tuple[int, ...]] = []
    head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))

    def run(bytes_of_logits: int) -> tuple[Tensor, ...]:
        monkeypatch.setattr(policy, "LOGITS_BYTES", bytes_of_logits)
        head.weight.grad = states.grad = None
        rows.clear()
        shapes.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
            log_probs = token_log_probs(head, states, ids)
        forward = rows.copy()
        (log_probs * pull).sum().backward()
        assert head.weight.grad is not None
        assert states.grad is not None
        assert forward == (rows[len(forward) :][::-1] if len(forward) > 1 else rows)
        return log_probs.detach(), head.weight.grad, states.grad

    in_one_chunk = run(23 * 50 * 4)
    assert rows == [23]
    assert (23, 50) in shapes
    parts = run(5 * 50 * 4 + 3)
    assert sorted(rows) == sorted(2 * [5, 5, 5, 5, 3])
    assert not [shape for shape in shapes if len(shape) == 2 and shape[1] == 50 and shape[0] > 5]
    for one, other in zip(in_one_chunk, parts, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-6)
    assert run(1)[0].shape == (23,)  # a row at least
    with torch.no_grad():
        torch.testing.assert_close(token_log_probs(head, states, ids), in_one_chunk[0], rtol=1e-6, atol=1e-6)


def test_chunks_under_autocast_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head, states, ids = torch.nn.Linear(16, 50, bias=False), torch.randn(9, 16), torch.randint(50, (9,))
    results = []
    for size in (9, 2):
        monkeypatch.setattr(policy, "LOGITS_BYTES", size * 200)
        head.weight.grad = None
        with torch.autocast("cpu", torch.bfloat16):
            log_probs = token_log_probs(head, states, ids)
        assert log_probs.dtype == torch.float32
        log_probs.sum().backward()
        assert head.weight.grad is not None
        results.append((log_probs.detach(), head.weight.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-2, atol=1e-2)  # bf16 sums of chunks
