"""The preference losses against TRL's own trainers: the same pairs, pictures and weights, in float32."""

from __future__ import annotations

import copy
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import pixels, scramble, tiny_llava
from test_loss import pairs, recipe
from torch import Tensor

from relook.data.encode import Example
from relook.data.packing import TokenRow, Tree, pack
from relook.forward.collate import preference_weights
from relook.forward.policy import LiveBatch, Policy
from relook.recipe import Recipe
from relook.toyworld.build import make_processor
from relook.train.loss import preference_loss, rated_loss

PAD, IGNORE = 3, -100
Gradients = dict[str, Tensor]


@pytest.fixture(scope="module")
def policy() -> Any:
    """The reference's weights, moved by noise."""
    model = tiny_llava()
    scramble(model, torch.Generator().manual_seed(1), std=0.05)
    return model


def ours(model: Any, how: Recipe) -> tuple[Tensor, dict[str, Tensor]]:
    """relook's loss and fields: packed trees, one image a pair."""
    trees = [Tree.of(pair) for pair in pairs(model)]
    batch = LiveBatch(pack(trees, PAD, row_length=200), pixels(3), [1] * 3)
    reference = None
    if how.needs_reference:
        with torch.no_grad():
            reference = Policy(tiny_llava())(batch)
    found = Policy(model)(batch)
    weights = [preference_weights(Example("", tree, ()), ld_alpha=how.ld_alpha) for tree in trees]
    return preference_loss(how, found, batch.packed.targets, reference, torch.cat(weights))


def theirs(model: Any, method: str, out: Path, **keys: Any) -> Any:
    """A TRL trainer of a copy of the model. Its data set is never read: the batches are given to it as they are."""
    # Imported here: both take seconds, which test processes that run other tests do without.
    from datasets import Dataset

    trl = import_module("trl" if method == "DPO" else f"trl.experimental.{method.lower()}")
    trainer, config = getattr(trl, f"{method}Trainer"), getattr(trl, f"{method}Config")
    own = {"ref_model": tiny_llava()} if method in ("DPO", "KTO") else {}
    arguments = config(
        str(out), use_cpu=True, bf16=False, report_to="none", max_length=512, gradient_checkpointing=False, **keys
    )
    anything = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    tokenizer = make_processor().tokenizer
    return trainer(copy.deepcopy(model), args=arguments, train_dataset=anything, processing_class=tokenizer, **own)


def padded(rows: list[TokenRow]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows padded on the right: ids, where there are any, and which of them are an answer's."""
    longest = max(len(row.ids) for row in rows)
    ids, there, answer = (torch.full((len(rows), longest), value) for value in (PAD, 0, 0))
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        there[i, : len(row.ids)] = 1
        answer[i, : len(row.ids)] = torch.tensor(row.supervised).long()
    return ids, there, answer


def gradients(model: Any, loss: Tensor) -> Gradients:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def assert_same(model: Any, loss: Tensor, other: Any, expected: Tensor) -> None:
    """Equal losses, and equal gradients of every parameter, relative to the largest one."""
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    found, wanted = gradients(model, loss), gradients(other, expected)
    assert found.keys() == wanted.keys()
    assert len(found) > 20
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name] / largest, gradient / largest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "keys",
    [
        # A sum is right where each of its losses is: it takes one trainer of TRL's for them.
        {"loss_type": "sigmoid", "beta": 0.5, "dpo_weight": 0.3, "nll_weight": 0.7, "ld_alpha": 0.3},
        {"loss_type": "sigmoid_norm", "beta": 2.0},
        {"loss_type": {"sigmoid": 0.8, "bco_pair": 0.2}, "nll_weight": 1.0},  # MPO's
        {"loss_type": {"ipo": 0.5, "hinge": 2.0}, "beta": 0.05, "dpo_weight": 0.5, "ld_alpha": 1.0},
        {"loss_type": {"robust": 1.0, "apo_zero": 0.7, "apo_down": 0.4}, "beta": 0.3, "label_smoothing": 0.2},
    ],
    ids=str,
)
def test_losses_with_a_reference_are_the_dpo_trainers(keys: dict[str, Any], policy: Any, tmp_path: Path) -> None:
    how = recipe(**keys)
    loss, fields = ours(policy, how)
    kinds = [*how.loss_weights, "sft"]
    weights = [*(how.dpo_weight * weight for weight in how.loss_weights.values()), how.nll_weight]
    own = {"loss_type": kinds, "loss_weights": weights, "beta": how.beta, "label_smoothing": how.label_smoothing}
    own |= {"ld_alpha": how.ld_alpha} if how.ld_alpha != 1 else {}
    trainer = theirs(policy, "DPO", tmp_path, **own)
    ids, there, answer = padded([row for side in zip(*pairs(policy), strict=True) for row in side])
    inputs = {"input_ids": ids, "attention_mask": there, "completion_mask": answer}
    pictures = pixels(3).repeat(2, 1, 1, 1)
    expected = trainer._compute_loss(trainer.model, {**inputs, "pixel_values": pictures}, return_outputs=False)
    for name in ("chosen", "rejected", "accuracies", "margins"):
        [logged] = trainer._metrics["eval"][f"rewards/{name}"]
        assert float(fields[f"rewards/{name}"]) == pytest.approx(logged, abs=1e-4)
    assert_same(policy, loss, trainer.model, expected)


@pytest.mark.parametrize("labels", [[True, False, True], [False, False, False]], ids=str)
def test_kto_is_its_trainers(labels: list[bool], policy: Any, tmp_path: Path) -> None:
    """Each picture's second answer stands for another prompt's answer, of which KTO's baseline is made."""
    keys: dict[str, Any] = {"beta": 0.3, "desirable_weight": 0.8, "undesirable_weight": 1.3}
    how = recipe(loss_type="kto", **keys)
    trees = [Tree.of(pair) for pair in pairs(policy)]
    batch = LiveBatch(pack(trees, PAD, row_length=200), pixels(3), [1] * 3)
    with torch.no_grad():
        reference = Policy(tiny_llava())(batch)
    desirable = torch.tensor(labels)
    loss, fields = rated_loss(how, Policy(policy)(batch), batch.packed.targets, reference, desirable)
    trainer, inputs = theirs(policy, "KTO", tmp_path, per_device_train_batch_size=2, **keys), {"label": desirable}
    for prefix, rows in zip(("", "KL_"), zip(*pairs(policy), strict=True), strict=True):
        ids, there, answer = padded(list(rows))
        names = ("input_ids", "attention_mask", "completion_mask")
        inputs |= {f"{prefix}{name}": tensor for name, tensor in zip(names, (ids, there, answer), strict=True)}
    trainer.model.eval()  # whose metrics are read
    expected = trainer._compute_loss(trainer.model, {**inputs, "pixel_values": pixels(3)}, return_outputs=False)
    assert float(fields["kl"]) == pytest.approx(trainer._metrics["eval"]["kl"][0], abs=1e-4)
    assert_same(policy, loss, trainer.model, expected)


def rows_of(model: Any) -> dict[str, Tensor]:
    """A batch as the trainers without a reference take it."""
    batch = {}
    for side, rows in zip(("chosen", "rejected"), zip(*pairs(model), strict=True), strict=True):
        ids, there, answer = padded(list(rows))
        labels = ids.where(answer == 1, IGNORE)
        batch |= {f"{side}_input_ids": ids, f"{side}_attention_mask": there, f"{side}_labels": labels}
    return batch


def seeing(model: Any) -> Any:
    """The model as these trainers call it: they know of text only, so each row gets its picture here."""

    def call(input_ids: Tensor, **more: Any) -> Any:
        return model(input_ids, pixel_values=pixels(3).repeat(2, 1, 1, 1), **more)

    return call


@pytest.mark.parametrize("nll_weight", [0.0, 0.6])
def test_simpo_is_the_cpo_trainers(nll_weight: float, policy: Any, tmp_path: Path) -> None:
    how = recipe(loss_type="simpo", beta=2.0, simpo_gamma=1.0, nll_weight=nll_weight)
    loss, fields = ours(policy, how)
    own = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": nll_weight}
    trainer = theirs(policy, "CPO", tmp_path, **own)
    expected, logged = trainer.get_batch_loss_metrics(seeing(trainer.model), rows_of(policy))
    for name in ("chosen", "rejected", "accuracies", "margins"):
        assert float(fields[f"rewards/{name}"]) == pytest.approx(float(logged[f"rewards/{name}"]), abs=1e-5)
    assert not [name for name in fields if "reference" in name]
    assert_same(policy, loss, trainer.model, expected)


def test_orpo_is_the_orpo_trainers(policy: Any, tmp_path: Path) -> None:
    """But for the supervised term, which TRL takes over the prompt and its image, too, and relook over the answer."""
    how = recipe(loss_type="orpo", beta=0.3, nll_weight=1.0)
    loss, fields = ours(policy, how)
    trainer = theirs(policy, "ORPO", tmp_path, beta=0.3)
    forward = trainer.concatenated_forward(seeing(trainer.model), rows_of(policy))
    total, logged = trainer.get_batch_loss_metrics(seeing(trainer.model), rows_of(policy))
    ratios = -trainer.odds_ratio_loss(*forward[:2])[0].mean()
    assert total.item() == pytest.approx(ratios.item() + logged["nll_loss"], abs=1e-6)
    for name in ("chosen", "rejected", "accuracies", "margins"):
        assert float(fields[f"rewards/{name}"]) == pytest.approx(logged[f"rewards/{name}"], abs=1e-5)
    assert_same(policy, loss - fields["nll"], trainer.model, ratios)
