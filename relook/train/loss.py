"""Preference and supervised losses, with one pure function per equation.

Notation: y_w and y_l are the chosen and the rejected response, x is the image and the prompt, pi the policy, pi_ref the
reference. A *ratio* is log pi(y|x) - log pi_ref(y|x), summed over the tokens of y. All values are in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from relook import distributed
from relook.data.packing import Targets
from relook.recipe import LENGTH_NORMALISED, REFERENCE_FREE, Recipe

# ----------------------------------------------------------------------------------------------------


def dpo_sigmoid(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float) -> Tensor:
    """Compute direct preference optimisation (DPO), eq. 7 of Rafailov et al. 2023 (arXiv:2305.18290).

    Args:
        chosen_ratio: log pi(y_w|x) - log pi_ref(y_w|x), shape (pairs,), in nats.
        rejected_ratio: the same for the rejected response y_l.
        beta: strength of the pull towards the reference.

    Returns:
        -log sigmoid(beta * (chosen_ratio - rejected_ratio)), shape (pairs,); ln 2 where policy and reference agree.
    """
    return -F.logsigmoid(beta * (chosen_ratio - rejected_ratio))


def dpo_ipo(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float) -> Tensor:
    """Compute identity preference optimisation (IPO), eq. 17 of Azar et al. 2023 (arXiv:2310.12036).

    As in TRL, ratios are means over a response's tokens, so that margins do not grow with length.

    Args:
        chosen_ratio, rejected_ratio: mean over tokens of the log ratios, (pairs,).
        beta: the paper's tau; the target margin is 1 / (2 beta).

    Returns:
        (chosen_ratio - rejected_ratio - 1 / (2 beta))^2, (pairs,).
    """
    return (chosen_ratio - rejected_ratio - 1 / (2 * beta)).square()


def dpo_hinge(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float) -> Tensor:
    """Compute the hinge loss on DPO's margin.

    It is SLiC's calibration loss (Zhao et al. 2023, arXiv:2305.10425) on the normalised likelihoods of RSO (Liu et al.
    2023, arXiv:2309.06657).

    Args:
        chosen_ratio, rejected_ratio: as for `dpo_sigmoid`, (pairs,).
        beta: scale of the margin.

    Returns:
        max(0, 1 - beta * (chosen_ratio - rejected_ratio)), (pairs,); 1 where policy and reference agree.
    """
    return (1 - beta * (chosen_ratio - rejected_ratio)).relu()


def dpo_robust(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Compute robust DPO (Chowdhury et al. 2024, arXiv:2403.00409), unbiased if a known share of pairs is swapped.

    Args:
        chosen_ratio, rejected_ratio, beta: as for `dpo_sigmoid`; ratios have shape (pairs,).
        label_smoothing: the share e of swapped pairs, from 0 to below 1/2; 0 gives `dpo_sigmoid`.

    Returns:
        ((1 - e) * L(y_w, y_l) - e * L(y_l, y_w)) / (1 - 2 e) with L of `dpo_sigmoid`, (pairs,).
    """
    as_given = dpo_sigmoid(chosen_ratio, rejected_ratio, beta)
    swapped = dpo_sigmoid(rejected_ratio, chosen_ratio, beta)
    return ((1 - label_smoothing) * as_given - label_smoothing * swapped) / (1 - 2 * label_smoothing)


def sigmoid_norm(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float) -> Tensor:
    """Compute DPO on means over a response's tokens (length-normalised DPO, Lambert et al. 2024, arXiv:2411.15124).

    With token weights (`preference_weights`) it is DDPO's loss (Yu et al. 2024, arXiv:2312.00849, eq. 3).

    Args:
        chosen_ratio, rejected_ratio: weighted mean over tokens of the log ratios, (pairs,).
        beta: as for `dpo_sigmoid`, of a mean.

    Returns:
        -log sigmoid(beta * (chosen_ratio - rejected_ratio)), (pairs,).
    """
    return dpo_sigmoid(chosen_ratio, rejected_ratio, beta)


def bco_pair(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float) -> Tensor:
    """Compute the binary classifier loss of BCO (Jung et al. 2024, arXiv:2404.04656): good or bad, each on its own.

    As in TRL, the reward shift is 0; the paper's, and MPO's quality loss (Wang et al. 2024, arXiv:2411.10442), subtract
    a running mean of the rewards.

    Args:
        chosen_ratio, rejected_ratio, beta: as for `dpo_sigmoid`; ratios have shape (pairs,).

    Returns:
        -log sigmoid(beta * chosen_ratio) - log sigmoid(-beta * rejected_ratio), (pairs,).
    """
    return -F.logsigmoid(beta * chosen_ratio) - F.logsigmoid(-beta * rejected_ratio)


def apo_zero(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float) -> Tensor:
    """Compute APO-zero, eq. 7 of D'Oosterlinck et al. 2024 (arXiv:2408.06266).

    It makes chosen responses likelier and rejected ones less likely: for chosen ones better than the model's own.

    Args:
        chosen_ratio, rejected_ratio, beta: as for `dpo_sigmoid`; ratios have shape (pairs,).

    Returns:
        1 - sigmoid(beta * chosen_ratio) + sigmoid(beta * rejected_ratio), (pairs,).
    """
    # 1 - sigmoid(x) = sigmoid(-x) keeps precision where sigmoid(x) is close to 1.
    return torch.sigmoid(-beta * chosen_ratio) + torch.sigmoid(beta * rejected_ratio)


def apo_down(chosen_ratio: Tensor, rejected_ratio: Tensor, beta: float) -> Tensor:
    """Compute APO-down, eq. 8 of D'Oosterlinck et al. 2024 (arXiv:2408.06266).

    It makes both responses less likely, the rejected one more so: for chosen ones worse than the model's own.

    Args:
        chosen_ratio, rejected_ratio, beta: as for `dpo_sigmoid`; ratios have shape (pairs,).

    Returns:
        sigmoid(beta * chosen_ratio) + 1 - sigmoid(beta * (chosen_ratio - rejected_ratio)), (pairs,).
    """
    return torch.sigmoid(beta * chosen_ratio) + torch.sigmoid(-beta * (chosen_ratio - rejected_ratio))


def kto(
    ratio: Tensor,
    baseline: Tensor,
    desirable: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """Compute Kahneman-Tversky optimisation (KTO) of rated answers, eq. 8 of Ethayarajh et al. 2024 (arXiv:2402.01306).

    Args:
        ratio: log pi(y|x) - log pi_ref(y|x) of each answer, (answers,).
        baseline: the paper's z_0, shape (): the mean ratio of answers to other prompts, at least 0, without gradient.
        desirable: whether an answer is good, (answers,) bool.
        beta: as for `dpo_sigmoid`.
        desirable_weight, undesirable_weight: the paper's lambda_D and lambda_U.

    Returns:
        lambda_D * (1 - sigmoid(beta * (ratio - baseline))) of good answers, and
        lambda_U * (1 - sigmoid(beta * (baseline - ratio))) of others, (answers,).
    """
    sign, weight = torch.where(desirable, 1.0, -1.0), torch.where(desirable, desirable_weight, undesirable_weight)
    # 1 - sigmoid(x) = sigmoid(-x) keeps precision where sigmoid(x) is close to 1.
    return weight * torch.sigmoid(-beta * sign * (ratio - baseline))


def simpo(chosen_mean: Tensor, rejected_mean: Tensor, beta: float, gamma: float) -> Tensor:
    """Compute SimPO, eq. 6 of Meng et al. 2024 (arXiv:2405.14734): no reference; rewards are means over tokens.

    Args:
        chosen_mean, rejected_mean: mean over tokens of log pi(y|x), (pairs,).
        beta: scale of the reward, 2 to 2.5 in the paper.
        gamma: target margin of the chosen reward over the rejected one, in the unit of rewards.

    Returns:
        -log sigmoid(beta * (chosen_mean - rejected_mean) - gamma), (pairs,).
    """
    return -F.logsigmoid(beta * (chosen_mean - rejected_mean) - gamma)


def orpo(chosen_mean: Tensor, rejected_mean: Tensor, beta: float) -> Tensor:
    """Compute the odds-ratio term of ORPO, eq. 7 of Hong et al. 2024 (arXiv:2403.07691); no reference.

    The full ORPO loss adds the supervised term on the chosen response (eq. 6).

    Args:
        chosen_mean, rejected_mean: mean over tokens of log pi(y|x), (pairs,); P below is exp of it.
        beta: the paper's lambda.

    Returns:
        -beta * log sigmoid(log odds(y_w) - log odds(y_l)) with odds = P / (1 - P), (pairs,).
    """
    return -beta * F.logsigmoid(_log_odds(chosen_mean) - _log_odds(rejected_mean))


def _log_odds(log_p: Tensor) -> Tensor:
    """Compute log(p / (1 - p)) from log p; p = 1 gets the finite odds of a value just below 1."""
    # log p = 0 would make 1 - p zero and the log-odds inf.
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    return log_p - torch.log(-torch.expm1(log_p))


def mdpo_conditional(chosen_ratio: Tensor, corrupted_ratio: Tensor, beta: float) -> Tensor:
    """Compute mDPO's conditional preference loss (Wang et al. 2024, arXiv:2406.11839).

    It prefers the chosen answer on its own image to the same answer on a corrupted image.

    Args:
        chosen_ratio: as for `dpo_sigmoid`, (pairs,).
        corrupted_ratio: ratio of the same answer to the same prompt on a corrupted image, (pairs,).
        beta: as for `dpo_sigmoid`.

    Returns:
        -log sigmoid(beta * (chosen_ratio - corrupted_ratio)), (pairs,).
    """
    return dpo_sigmoid(chosen_ratio, corrupted_ratio, beta)


def mdpo_anchored(chosen_ratio: Tensor, beta: float, anchor: float) -> Tensor:
    """Compute mDPO's anchored preference loss (arXiv:2406.11839), which keeps the chosen reward above an anchor.

    Args:
        chosen_ratio: as for `dpo_sigmoid`, (pairs,).
        beta: as for `dpo_sigmoid`.
        anchor: the paper's delta, in the unit of rewards; the paper uses 0.

    Returns:
        -log sigmoid(beta * chosen_ratio - anchor), (pairs,).
    """
    return -F.logsigmoid(beta * chosen_ratio - anchor)


def negative_log_likelihood(log_probs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Compute the supervised loss: the mean of -log p over tokens, shape (), in nats per token.

    Args:
        log_probs: log-probs of the tokens, (N,).
        weights: of the tokens in the mean, (N,), 0 for those that do not count; None weighs all alike. With 1 / the
            response's length it is the mean over responses in RPO's eq. 2 (Pang et al. 2024, arXiv:2404.19733).
    """
    return -log_probs.mean() if weights is None else -(log_probs * weights).sum() / weights.sum()


# ----------------------------------------------------------------------------------------------------
# The registry: the equation behind each `loss_type`, with the names of the metrics that a run with it logs.


@dataclass(frozen=True)
class PairLoss:
    """Registry entry of a `loss_type`.

    Args:
        equation: maps a recipe and the values of chosen and rejected answers, (P,) each, to the loss per pair, (P,).
            The values are log ratios or log-probs, as sums or means over tokens (see `preference_loss`).
        metrics: names of the logged fields, in the order in which `preference_loss` returns them.
    """

    equation: Callable[[Recipe, Tensor, Tensor], Tensor]
    metrics: tuple[str, ...]


REFERENCE_FREE_METRICS = (
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("policy_logps/chosen", "policy_logps/rejected", "nll"),
)
METRICS = (*REFERENCE_FREE_METRICS[:-1], "reference_logps/chosen", "reference_logps/rejected", "nll")
KTO_METRICS = ("rewards/margins", "rewards/accuracies", "kl")
MDPO_METRICS = ("rewards/corrupted", "rewards/corrupted_accuracies")  # added by mDPO's conditional term

PAIR_LOSSES = {
    "sigmoid": PairLoss(lambda recipe, chosen, rejected: dpo_sigmoid(chosen, rejected, recipe.beta), METRICS),
    "ipo": PairLoss(lambda recipe, chosen, rejected: dpo_ipo(chosen, rejected, recipe.beta), METRICS),
    "hinge": PairLoss(lambda recipe, chosen, rejected: dpo_hinge(chosen, rejected, recipe.beta), METRICS),
    "robust": PairLoss(
        lambda recipe, chosen, rejected: dpo_robust(chosen, rejected, recipe.beta, recipe.label_smoothing), METRICS
    ),
    "simpo": PairLoss(
        lambda recipe, chosen, rejected: simpo(chosen, rejected, recipe.beta, recipe.simpo_gamma),
        REFERENCE_FREE_METRICS,
    ),
    "orpo": PairLoss(lambda recipe, chosen, rejected: orpo(chosen, rejected, recipe.beta), REFERENCE_FREE_METRICS),
    "sigmoid_norm": PairLoss(lambda recipe, chosen, rejected: sigmoid_norm(chosen, rejected, recipe.beta), METRICS),
    "bco_pair": PairLoss(lambda recipe, chosen, rejected: bco_pair(chosen, rejected, recipe.beta), METRICS),
    "apo_zero": PairLoss(lambda recipe, chosen, rejected: apo_zero(chosen, rejected, recipe.beta), METRICS),
    "apo_down": PairLoss(lambda recipe, chosen, rejected: apo_down(chosen, rejected, recipe.beta), METRICS),
}


def metric_names(recipe: Recipe) -> list[str]:
    """Return the names of the fields that an evaluation of the recipe's loss logs, in their order."""
    if recipe.task == "sft":
        return ["loss"]
    if recipe.rates_answers:
        return ["loss", *KTO_METRICS]
    # Where only some of several losses have a reference, the longer list has its fields.
    names = ["loss", *max((PAIR_LOSSES[name].metrics for name in recipe.loss_weights), key=len)]
    if recipe.mdpo_conditional_weight:
        end_of_rewards = names.index("rewards/margins") + 1
        names[end_of_rewards:end_of_rewards] = MDPO_METRICS
    return names


# ----------------------------------------------------------------------------------------------------
# A recipe's loss over a batch, composed of the equations above, and the fields it logs.


def batch_loss(recipe: Recipe, log_probs: Tensor, inputs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the recipe's loss over one batch, shape (), and the logged fields besides it, each of shape ().

    Args:
        recipe: selects the loss.
        log_probs: policy log-probs of the batch's targets, (N,).
        inputs: what `Collator` returns, with the batch's `share` of the supervised mean over a step (see
            `RelookTrainer.get_batch_samples`).
    """
    share = inputs.get("share", 1.0)
    if recipe.task == "sft":
        return share * negative_log_likelihood(log_probs), {}
    targets = targets_of(inputs["batch"])
    if recipe.rates_answers:
        return rated_loss(recipe, log_probs, targets, inputs["reference"], inputs["desirable"])
    return preference_loss(recipe, log_probs, targets, inputs.get("reference"), inputs["weight"], share)


def targets_of(batch: Any) -> Targets:
    """Return the targets of a batch of packed trees or of cached trunk states."""
    targets: Targets = batch.packed.targets if hasattr(batch, "packed") else batch.targets
    return targets


def supervised_weight(recipe: Recipe, targets: Targets) -> Tensor | int:
    """Return the weight of a batch in the supervised loss's mean: how many tokens it is over, or their weights."""
    return len(targets.id) if recipe.task == "sft" else _supervised_weights(recipe, targets).sum()


def _supervised_weights(recipe: Recipe, targets: Targets) -> Tensor:
    """Return each target's weight in the supervised loss, (N,): 0 outside chosen answers on uncorrupted images."""
    # Chosen answers are the even branches; branches from 2 P on are the corrupted copies.
    chosen = (targets.branch % 2 == 0) & (targets.branch < 2 * _pairs(recipe, targets))
    if not recipe.nll_length_power:
        return chosen
    lengths = targets.sum_by_branch(torch.ones_like(targets.branch, dtype=torch.float32))
    return chosen / lengths[targets.branch] ** recipe.nll_length_power


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
    """Compute the recipe's loss over P pairs, shape (), and the logged fields, each of shape ().

    A pair's branches are chosen, then rejected. With mDPO's conditional term, the P chosen answers on corrupted images
    follow after all pairs.

    Args:
        recipe: selects the loss terms and their weights.
        log_probs: policy log-probs of the targets, (N,).
        targets: locations of the targets, with their branches.
        reference: reference log-probs of the targets, (N,); None for a loss without reference.
        weight: 1 where the preference term counts a target, else 0, (N,).
        share: factor of the supervised term, a mean over tokens or answers, for batches that differ in their number.
    """
    pairs = _pairs(recipe, targets)
    # One summed log-prob per branch, over the tokens that the preference term counts.
    policy_sums = targets.sum_by_branch(log_probs * weight)
    with torch.no_grad():
        lengths = targets.sum_by_branch(weight)
    # Without a reference, the "ratio" is the policy's log-prob itself.
    ratio = policy_sums
    reference_sums = None
    if reference is not None:
        reference_sums = targets.sum_by_branch(reference * weight)
        ratio = policy_sums - reference_sums
    chosen, _ = _sides(ratio, pairs)
    loss = log_probs.new_zeros(())
    for name, loss_weight in recipe.loss_weights.items() if recipe.dpo_weight else ():
        compared = policy_sums if name in REFERENCE_FREE else ratio
        # Some losses compare means per token, so that long answers have no larger margins.
        compared = compared / lengths if name in LENGTH_NORMALISED else compared
        per_pair = PAIR_LOSSES[name].equation(recipe, *_sides(compared, pairs))
        loss = loss + recipe.dpo_weight * loss_weight * per_pair.mean()
    if recipe.mdpo_conditional_weight:
        corrupted = ratio[2 * pairs :]  # after the chosen and rejected branches
        conditional = mdpo_conditional(chosen, corrupted, recipe.beta)
        loss = loss + recipe.mdpo_conditional_weight * conditional.mean()
    if recipe.mdpo_anchored_weight:
        anchored = mdpo_anchored(chosen, recipe.beta, recipe.mdpo_anchor)
        loss = loss + recipe.mdpo_anchored_weight * anchored.mean()
    nll = negative_log_likelihood(log_probs, _supervised_weights(recipe, targets))
    if recipe.nll_weight:
        loss = loss + share * recipe.nll_weight * nll
    with torch.no_grad():
        # Rewards are log ratios, as sums over tokens also where a loss compares their means: TRL logs them so. Without
        # a reference, both of its losses compare mean log-probs.
        rewards = recipe.beta * (policy_sums / lengths if reference is None else ratio)
        fields = {**_reward_metrics(rewards, pairs), **_side_means("policy_logps", policy_sums, pairs)}
        if reference_sums is not None:
            fields |= _side_means("reference_logps", reference_sums, pairs)
        fields["nll"] = nll
    return loss, fields


def rated_loss(
    recipe: Recipe, log_probs: Tensor, targets: Targets, reference: Tensor, desirable: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute KTO's loss over rated answers, shape (), and the logged fields, each of shape ().

    A tree's branches are an answer, then another prompt's answer, for the baseline.

    Args:
        log_probs, targets, reference: as for `preference_loss`.
        desirable: labels of the answers, (answers,) bool.
    """
    ratio, mismatched = _sides(targets.sum_by_branch(log_probs - reference), len(desirable))
    baseline = distributed.mean(mismatched.detach().mean()).clamp(min=0)
    weights = recipe.desirable_weight, recipe.undesirable_weight
    loss = recipe.dpo_weight * kto(ratio, baseline, desirable, recipe.beta, *weights).mean()
    with torch.no_grad():
        margins = torch.where(desirable, 1.0, -1.0) * recipe.beta * (ratio - baseline)
        values = margins.mean(), (margins > 0).float().mean(), baseline
    return loss, dict(zip(KTO_METRICS, values, strict=True))


def _reward_metrics(rewards: Tensor, pairs: int) -> dict[str, Tensor]:
    """Compute mean rewards, margins and accuracies of chosen answers against rejected and corrupted ones."""
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
    """Split one value per branch into those of chosen and of rejected answers, (P,) each."""
    return by_branch[0 : 2 * pairs : 2], by_branch[1 : 2 * pairs : 2]


def _side_means(name: str, by_branch: Tensor, pairs: int) -> dict[str, Tensor]:
    chosen, rejected = _sides(by_branch, pairs)
    return {f"{name}/chosen": chosen.mean(), f"{name}/rejected": rejected.mean()}
