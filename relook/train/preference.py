"""A recipe's loss over a batch of pairs, put together from the equations of `losses`, and the fields it logs."""

from __future__ import annotations

import torch
from torch import Tensor

from relook.recipe import LENGTH_NORMALISED, REFERENCE_FREE, Recipe
from relook.train import losses
from relook.tree import Row, Targets, Tree, targets_of


def answer_tokens(recipe: Recipe, targets: Targets) -> Tensor | int:
    """How many tokens the supervised loss is a mean over: all of SFT, those of the chosen answers of DPO."""
    return len(targets.id) if recipe.task == "sft" else _of_chosen(recipe, targets).sum()


def _of_chosen(recipe: Recipe, targets: Targets) -> Tensor:
    """Which targets belong to the chosen answers on their images, (N,) bool."""
    return (targets.branch % 2 == 0) & (targets.branch < 2 * _pairs(recipe, targets))


def _pairs(recipe: Recipe, targets: Targets) -> int:
    return targets.branches // (3 if recipe.mdpo_conditional_weight else 2)


def preference_loss(
    recipe: Recipe,
    log_probs: Tensor,
    targets: Targets,
    reference: Tensor | None,
    weight: Tensor,
    share: Tensor | float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The recipe's loss over P pairs, shape (), and the fields that are logged, each of shape ().

    A pair's branches are chosen, then rejected; with mDPO's conditional term, the P chosen answers on corrupted images
    come after all of them.

    Args:
        log_probs: policy log-probs of the targets, (N,).
        reference: the reference model's, (N,); None where the loss has none.
        weight: 1 where the preference term counts a target, else 0, (N,).
        share: of the supervised term, a mean over tokens, where batches differ in their number.
    """
    pairs = _pairs(recipe, targets)
    policy_sums = targets.sum_by_branch(log_probs * weight)
    with torch.no_grad():
        lengths = targets.sum_by_branch(weight)
    ratio = policy_sums
    reference_sums = None
    if reference is not None:
        reference_sums = targets.sum_by_branch(reference * weight)
        ratio = policy_sums - reference_sums
    normalised = ratio / lengths if recipe.loss_type in LENGTH_NORMALISED else ratio
    chosen, _ = _sides(ratio, pairs)
    loss = log_probs.new_zeros(())
    if recipe.dpo_weight:
        loss = loss + recipe.dpo_weight * pair_loss(recipe, *_sides(normalised, pairs)).mean()
    if recipe.mdpo_conditional_weight:
        corrupted = ratio[2 * pairs :]
        conditional = losses.mdpo_conditional(chosen, corrupted, recipe.beta)
        loss = loss + recipe.mdpo_conditional_weight * conditional.mean()
    if recipe.mdpo_anchored_weight:
        anchored = losses.mdpo_anchored(chosen, recipe.beta, recipe.mdpo_anchor)
        loss = loss + recipe.mdpo_anchored_weight * anchored.mean()
    nll = losses.negative_log_likelihood(log_probs, _of_chosen(recipe, targets))
    if recipe.nll_weight:
        loss = loss + share * recipe.nll_weight * nll
    with torch.no_grad():
        # Rewards are what the loss compares; ipo's, as TRL logs them, are sums like those of its kin.
        rewards = recipe.beta * (normalised if recipe.loss_type in REFERENCE_FREE else ratio)
        fields = {**_of_rewards(rewards, pairs), **_by_side("policy_logps", policy_sums, pairs)}
        if reference_sums is not None:
            fields |= _by_side("reference_logps", reference_sums, pairs)
        fields["nll"] = nll
    return loss, fields


def measures(recipe: Recipe) -> list[str]:
    """The fields that an evaluation of the recipe's loss has: those of a pair of one token each."""
    if recipe.task == "sft":
        return ["loss"]
    token = Row((0,), (True,))
    trees = [Tree((0,), (token, token)), *([Tree((0,), (token,))] if recipe.mdpo_conditional_weight else [])]
    targets = targets_of(trees)
    each = torch.ones(len(targets.id))
    _, fields = preference_loss(recipe, -each, targets, -each if recipe.needs_reference else None, each)
    return ["loss", *fields]


def pair_loss(recipe: Recipe, chosen: Tensor, rejected: Tensor) -> Tensor:
    """The recipe's `loss_type` on each pair, (P,), from sums or means over tokens of the log ratios or log-probs."""
    beta = recipe.beta
    if recipe.loss_type == "ipo":
        return losses.dpo_ipo(chosen, rejected, beta)
    if recipe.loss_type == "hinge":
        return losses.dpo_hinge(chosen, rejected, beta)
    if recipe.loss_type == "robust":
        return losses.dpo_robust(chosen, rejected, beta, recipe.label_smoothing)
    if recipe.loss_type == "simpo":
        return losses.simpo(chosen, rejected, beta, recipe.simpo_gamma)
    if recipe.loss_type == "orpo":
        return losses.orpo(chosen, rejected, beta)
    return losses.dpo_sigmoid(chosen, rejected, beta)


def _of_rewards(rewards: Tensor, pairs: int) -> dict[str, Tensor]:
    """How often and how far the chosen answers are above the rejected, and above themselves on corrupted images."""
    chosen, rejected = _sides(rewards, pairs)
    fields = {
        "rewards/chosen": chosen.mean(),
        "rewards/rejected": rejected.mean(),
        "rewards/accuracies": (chosen > rejected).float().mean(),
        "rewards/margins": (chosen - rejected).mean(),
    }
    corrupted = rewards[2 * pairs :]
    if len(corrupted):
        fields["rewards/corrupted"] = corrupted.mean()
        fields["rewards/corrupted_accuracies"] = (chosen > corrupted).float().mean()
    return fields


def _sides(by_branch: Tensor, pairs: int) -> tuple[Tensor, Tensor]:
    """Chosen and rejected, (P,) each, of one value for each branch."""
    return by_branch[0 : 2 * pairs : 2], by_branch[1 : 2 * pairs : 2]


def _by_side(name: str, by_branch: Tensor, pairs: int) -> dict[str, Tensor]:
    chosen, rejected = _sides(by_branch, pairs)
    return {f"{name}/chosen": chosen.mean(), f"{name}/rejected": rejected.mean()}
