"""What trains: from a recipe's flags to parameters that require gradients, and to the optimizer's groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from relook.errors import RecipeError
from relook.model.load import LoadedModel, add_post_decoder
from relook.model.trunks import has_post_decoder
from relook.recipe import Recipe

LANGUAGE_LINEARS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def apply_regime(loaded: LoadedModel, recipe: Recipe) -> None:
    """Add the modules that the recipe trains and freeze all others, in place.

    The vision tower never trains: its unused last layer would get no gradient, and every regime of the originals
    keeps it frozen.
    """
    seed = int(recipe.training.get("seed", 42))
    if recipe.tune_post_decoder and not has_post_decoder(loaded.model.config):
        generator = torch.Generator().manual_seed(seed)
        loaded.model = add_post_decoder(loaded.model, dict(recipe.post_decoder), generator, recipe.post_decoder_init)
    if recipe.tune_lm_head:
        untie_head(loaded.model)
    loaded.model.requires_grad_(False)
    if recipe.lora_enable:
        loaded.model = _with_lora(loaded.model, recipe, seed)
    core = loaded.core
    parts = {
        "post_decoder": (recipe.tune_post_decoder, lambda: core.model.post_decoder),
        "lm_head": (recipe.tune_lm_head or recipe.full, lambda: core.lm_head),
        "projector": (recipe.tune_mm_mlp_adapter or recipe.full, lambda: core.model.multi_modal_projector),
        "language_model": (recipe.full, lambda: core.model.language_model),
    }
    for wanted, part in parts.values():
        if wanted:
            part().requires_grad_(True)
    training = [parameter for parameter in loaded.model.parameters() if parameter.requires_grad]
    if not training:
        raise RecipeError(
            "Nothing would train.", "Set lora_enable, tune_post_decoder, tune_lm_head or tune_mm_mlp_adapter."
        )
    for parameter in training:
        # A bf16 weight has 8 bits: steps of the usual learning rates (2e-6) would be rounded away.
        parameter.data = parameter.data.float()


def _with_lora(model: nn.Module, recipe: Recipe, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=LANGUAGE_LINEARS,
        task_type="CAUSAL_LM",
    )
    # peft draws its weights from torch's global generator; the fork leaves that as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def untie_head(model: Any) -> None:
    """Give lm_head a weight of its own, where it shares the input embeddings'."""
    if model.lm_head.weight is model.get_input_embeddings().weight:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False


def group_of(name: str) -> str:
    """Which learning rate a parameter takes: that of post_decoder, lm_head, mm_projector, or the common one."""
    for part, group in (
        ("post_decoder", "post_decoder"),
        ("lm_head", "lm_head"),
        ("multi_modal_projector", "mm_projector"),
    ):
        if f".{part}." in f".{name}":
            return group
    return ""


def parameter_groups(model: nn.Module, recipe: Recipe, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups by learning rate; norms and biases are not decayed."""
    rates = {
        "post_decoder": recipe.post_decoder_lr,
        "lm_head": recipe.lm_head_lr,
        "mm_projector": recipe.mm_projector_lr,
    }
    groups: dict[tuple[float | None, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.ndim < 2 else weight_decay
            groups.setdefault((rates.get(group_of(name)), decay), []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, **({"lr": rate} if rate is not None else {})}
        for (rate, decay), members in groups.items()
    ]
