"""Losses: one equation, one pure function.

Letters: y_w and y_l are the chosen and the rejected response, x is the image and the prompt, pi the policy, pi_ref the
reference. A *ratio* is log pi(y|x) - log pi_ref(y|x), summed over the tokens of y; everything is in nats.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from relook.data.packing import Row, Targets, Tree, targets_of
from relook.recipe import LENGTH_NORMALISED, REFERENCE_FREE, Recipe

# ----------------------------------------------------------------------------------------------------


def dpo_sigmoid(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float) -> Tensor:
    """Direct preference optimisation, eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290).

    Args:
        chosen_ratio: log pi(y_w|x) - log pi_ref(y_w|x), shape (pairs,), in nats.
        rejected_ratio: the same for the rejected response y_l.
        beta: strength of the pull towards the reference.

    Returns:
        -log sigmoid(beta * (chosen_ratio - rejected_ratio)), shape (pairs,); ln 2 where policy and reference agree.
    """
    return -F.logsigmoid(beta * (chosen_ratio - rejected_ratio))


def dpo_ipo(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float) -> Tensor:
    """Identity preference optimisation, eq. 17 of Azar et al. 2023 (arXiv:2310.12036), as TRL has it: with ratios that
    are means over a response's tokens, so that a margin does not grow with length.

    Args:
        chosen_ratio, rejected_ratio: mean over tokens of the log ratios, (pairs,).
        beta: the paper's tau; the margin that is aimed at is 1 / (2 beta).

    Returns:
        (chosen_ratio - rejected_ratio - 1 / (2 beta))^2, (pairs,).
    """
    return (chosen_ratio - rejected_ratio - 1 / (2 * beta)).square()


def dpo_hinge(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float) -> Tensor:
    """Hinge loss on DPO's margin: SLiC's calibration loss (Zhao et al. 2023, arXiv:2305.10425) on the normalised
    likelihoods of RSO (Liu et al. 2023, arXiv:2309.06657).

    Args:
        chosen_ratio, rejected_ratio: as for `dpo_sigmoid`, (pairs,).

    Returns:
        max(0, 1 - beta * (chosen_ratio - rejected_ratio)), (pairs,); 1 where policy and reference agree.
    """
    return (1 - beta * (chosen_ratio - rejected_ratio)).relu()


def dpo_robust(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409): unbiased where a known share of pairs is swapped.

    Args:
        chosen_ratio, rejected_ratio: as for `dpo_sigmoid`, (pairs,).
        label_smoothing: that share e, from 0 to below 1/2; at 0 this is `dpo_sigmoid`.

    Returns:
        ((1 - e) * L(y_w, y_l) - e * L(y_l, y_w)) / (1 - 2 e) with L of `dpo_sigmoid`, (pairs,).
    """
    as_given = dpo_sigmoid(chosen_ratio, rejected_ratio, beta)
    swapped = dpo_sigmoid(rejected_ratio, chosen_ratio, beta)
    return ((1 - label_smoothing) * as_given - label_smoothing * swapped) / (1 - 2 * label_smoothing)


def simpo(chosen_mean: Tensor, rejected_mean: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO, eq. 6 of Meng et al. 2024 (arXiv:2405.14734): no reference, rewards are means over tokens.

    Args:
        chosen_mean, rejected_mean: mean over tokens of log pi(y|x), (pairs,).
        beta: scale of the reward, 2 to 2.5 in the paper.
        gamma: the margin that the chosen reward should have, in the unit of rewards.

    Returns:
        -log sigmoid(beta * (chosen_mean - rejected_mean) - gamma), (pairs,).
    """
    return -F.logsigmoid(beta * (chosen_mean - rejected_mean) - gamma)


def orpo(chosen_mean: Tensor, rejected_mean: Tensor, beta: float) -> Tensor:
    """The odds-ratio term of ORPO, eq. 7 of Hong et al. 2024 (arXiv:2403.07691); no reference.

    The whole of ORPO adds the supervised term on the chosen response (eq. 6).

    Args:
        chosen_mean, rejected_mean: mean over tokens of log pi(y|x), (pairs,); P below is exp of it.
        beta: the paper's lambda.

    Returns:
        -beta * log sigmoid(log odds(y_w) - log odds(y_l)) with odds = P / (1 - P), (pairs,).
    """
    return -beta * F.logsigmoid(_log_odds(chosen_mean) - _log_odds(rejected_mean))


def _log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)); the odds of p = 1 in float32 are those of the next number below it."""
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return log_p - torch.log(-torch.expm1(log_p))


def mdpo_conditional(chosen_ratio: Tensor, corrupted_ratio: Tensor, beta: float) -> Tensor:
    """Conditional preference of mDPO (Wang et al. 2024, arXiv:2406.11839): the chosen answer belongs to its image.

    Args:
        chosen_ratio: as for `dpo_sigmoid`, (pairs,).
        corrupted_ratio: the ratio of the same answer to the same prompt on a corrupted image, (pairs,).

    Returns:
        -log sigmoid(beta * (chosen_ratio - corrupted_ratio)), (pairs,).
    """
    return dpo_sigmoid(chosen_ratio, corrupted_ratio, beta)


def mdpo_anchored(chosen_ratio: Tensor, beta: float, anchor: float) -> Tensor:
    """Anchored preference of mDPO (arXiv:2406.11839): the reward of the chosen answer stays above an anchor.

    Args:
        chosen_ratio: as for `dpo_sigmoid`, (pairs,).
        anchor: the paper's delta, in the unit of rewards; 0 there.

    Returns:
        -log sigmoid(beta * chosen_ratio - anchor), (pairs,).
    """
    return -F.logsigmoid(beta * chosen_ratio - anchor)


def negative_log_likelihood(log_probs: Tensor, counts: Tensor | None = None) -> Tensor:
    """The usual supervised loss: mean over tokens of -log p, shape (), in nats a token.

    Args:
        log_probs: (N,).
        counts: 1 for each token that counts, else 0, (N,); without it all of them do.
    """
    return -log_probs.mean() if counts is None else -(log_probs * counts).sum() / counts.sum()


# ----------------------------------------------------------------------------------------------------
# A recipe's loss over a batch of pairs, put together from the equations of `losses`, and the fields it logs.


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
        conditional = mdpo_conditional(chosen, corrupted, recipe.beta)
        loss = loss + recipe.mdpo_conditional_weight * conditional.mean()
    if recipe.mdpo_anchored_weight:
        anchored = mdpo_anchored(chosen, recipe.beta, recipe.mdpo_anchor)
        loss = loss + recipe.mdpo_anchored_weight * anchored.mean()
    nll = negative_log_likelihood(log_probs, _of_chosen(recipe, targets))
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
        return dpo_ipo(chosen, rejected, beta)
    if recipe.loss_type == "hinge":
        return dpo_hinge(chosen, rejected, beta)
    if recipe.loss_type == "robust":
        return dpo_robust(chosen, rejected, beta, recipe.label_smoothing)
    if recipe.loss_type == "simpo":
        return simpo(chosen, rejected, beta, recipe.simpo_gamma)
    if recipe.loss_type == "orpo":
        return orpo(chosen, rejected, beta)
    return dpo_sigmoid(chosen, rejected, beta)


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
