"""What trains: from a recipe's flags to parameters that require gradients, and to the optimizer's groups."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from relook.errors import RecipeError, some
from relook.model.families import has_post_decoder
from relook.model.load import LoadedModel, add_post_decoder
from relook.model.post_decoder import PostDecoderSettings
from relook.recipe import ALL_LINEAR, Recipe

PACKS = "support_avx512bf16_for_cpu"  # bitsandbytes' name for it


def apply_regime(loaded: LoadedModel, recipe: Recipe) -> None:
    """Add the modules that the recipe trains and freeze all others, in place."""
    loaded.model = with_regime(loaded.model, recipe)


def with_regime(model: Any, recipe: Recipe) -> Any:
    """A model with the modules that the recipe trains, wrapped by peft for LoRA; all others are frozen.

    The vision tower never trains: its unused last layer would get no gradient, and every regime of the originals
    keeps it frozen.
    """
    seed = int(recipe.training.get("seed", 42))
    _check_post_decoder(model.config, recipe)
    if recipe.tune_post_decoder and not has_post_decoder(model.config):
        generator = torch.Generator().manual_seed(seed)
        model = add_post_decoder(model, dict(recipe.post_decoder), generator, recipe.post_decoder_init)
    if recipe.tune_lm_head:
        untie_head(model)
    model.requires_grad_(False)
    if recipe.bits == 4:
        _keep_unpacked(model)
    core = model
    if recipe.lora_enable:
        model = _with_lora(model, recipe, seed)
    parts = {
        "post_decoder": (recipe.tune_post_decoder, lambda: core.model.post_decoder),
        "lm_head": (recipe.tune_lm_head or recipe.full, lambda: core.lm_head),
        "projector": (recipe.tune_mm_mlp_adapter or recipe.full, lambda: core.model.multi_modal_projector),
        "language_model": (recipe.full, lambda: core.model.language_model),
    }
    for wanted, part in parts.values():
        if wanted:
            part().requires_grad_(True)
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not training:
        raise RecipeError(
            "Nothing would train.", "Set lora_enable, tune_post_decoder, tune_lm_head or tune_mm_mlp_adapter."
        )
    for parameter in training:
        # A bf16 weight has 8 bits: steps of the usual learning rates (2e-6) would be rounded away.
        parameter.data = parameter.data.float()
    return model


def _keep_unpacked(model: nn.Module) -> None:
    """Keep bitsandbytes from packing its weights for inference.

    On a CPU with bf16 instructions it does so in the first pass without gradients, which is that for the reference.
    Through packed weights no gradient flows, and no error says so.
    """
    for module in model.modules():
        if hasattr(module, PACKS):
            setattr(module, PACKS, False)


def _check_post_decoder(config: Any, recipe: Recipe) -> None:
    """A run that trains on has the post decoder that is there; the recipe may not ask for another."""
    if not (has_post_decoder(config) and recipe.tune_post_decoder):
        return
    held = PostDecoderSettings(**config.post_decoder)
    if recipe.post_decoder and PostDecoderSettings(**recipe.post_decoder) != held:
        raise RecipeError(f"The model has a post decoder already, with other settings: {held}.", "Leave them out.")
    if recipe.post_decoder_init != "random":
        raise RecipeError("The model has a trained post decoder already.", "Leave post_decoder_init out.")


def _with_lora(model: Any, recipe: Recipe, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=rf".*\blanguage_model\..*\.({'|'.join(_targets(model.model.language_model, recipe))})",
        bias=recipe.lora_bias,
        use_dora=recipe.use_dora,
        use_rslora=recipe.use_rslora,
        task_type="CAUSAL_LM",
    )
    # peft draws its weights from torch's global generator; the fork leaves that as it was.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 asks transformers 5.23 for a name of before
        wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():  # peft's "all" are the biases of the image side, too
        if parameter.requires_grad and ".language_model." not in name:
            parameter.requires_grad_(False)
    if recipe.lora_bias != "none" and not any(p.requires_grad and ".bias" in n for n, p in wrapped.named_parameters()):
        raise RecipeError(
            f"lora_bias is {recipe.lora_bias!r}, but the language model has no such biases.", "Set lora_bias none."
        )
    return wrapped


def _targets(language_model: nn.Module, recipe: Recipe) -> list[str]:
    """Names of the linear layers that LoRA goes on, without those of the modules around them."""
    linears = {
        name.rpartition(".")[2] for name, module in language_model.named_modules() if isinstance(module, nn.Linear)
    }
    if recipe.lora_target_modules == ALL_LINEAR:
        return sorted(linears)
    unknown = [name for name in recipe.lora_target_modules if name not in linears]
    if unknown:
        raise RecipeError(
            f"The language model has no linear layer {some(unknown)} to put LoRA on.",
            f"lora_target_modules may name {', '.join(sorted(linears))}.",
        )
    return sorted(recipe.lora_target_modules)


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
