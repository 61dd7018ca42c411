"""Trainable parameters and optimizer groups, as set by a recipe's flags."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn

from relook.data.images import ImageLoader
from relook.errors import RecipeError, preview
from relook.model.families import (
    CONNECTORS,
    LANGUAGE_MODELS,
    RELOOK,
    TOWERS,
    connector,
    has_post_decoder,
    language_model,
    position_rows,
    vision_tower,
)
from relook.model.load import LoadedModel, add_post_decoder
from relook.model.modeling_relook import TOWERS_READ
from relook.model.post_decoder import PostDecoderSettings
from relook.recipe import ALL_LINEAR, Recipe

PACKS = "support_avx512bf16_for_cpu"  # bitsandbytes' attribute that permits packing


def set_trainable(loaded: LoadedModel, recipe: Recipe) -> None:
    """Add the modules that the recipe trains and freeze all others, in place."""
    loaded.model = add_trainable_modules(loaded.model, recipe, loaded.images)


def add_trainable_modules(model: Any, recipe: Recipe, images: ImageLoader | None) -> Any:
    """Add the modules that the recipe trains, with peft for LoRA, and freeze all others; return the model.

    Args:
        images: of the model; needed where its vision tower trains, to find which parts of it are in use.
    """
    seed = int(recipe.training.get("seed", 42))
    _check_post_decoder(model.config, recipe)
    if recipe.tune_post_decoder and not has_post_decoder(model.config):
        generator = torch.Generator().manual_seed(seed)
        model = add_post_decoder(model, dict(recipe.post_decoder), generator, recipe.post_decoder_init)
    # A tied head would train the input embeddings, too.
    if recipe.tune_lm_head:
        untie_head(model)
    # Freeze everything, then let each part of the recipe train.
    model.requires_grad_(False)
    if recipe.bits == 4:
        keep_unpacked(model)
    core = model  # peft's wrapper hides the parts below
    unused = unused_in_tower(core, images) if recipe.trains_vision_tower and images is not None else []
    if recipe.lora_enable:
        model = _with_lora(model, recipe, seed, unused)
    parts = {
        "vision_tower": (recipe.tune_vision_tower, lambda: vision_tower(core.model)),
        "post_decoder": (recipe.tune_post_decoder, lambda: core.model.post_decoder),
        "lm_head": (recipe.tune_lm_head or recipe.full, lambda: core.lm_head),
        "language_model": (recipe.full, lambda: language_model(core.model)),
    }
    for is_trained, part in parts.values():
        if is_trained:
            part().requires_grad_(True)
    # After the tower, of which a merger is a part.
    connector(core.model).requires_grad_(recipe.trains_projector)
    for parameter in unused:
        parameter.requires_grad_(False)
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not training:
        raise RecipeError(
            "Nothing would train.", "Set lora_enable, tune_post_decoder, tune_lm_head or tune_mm_mlp_adapter."
        )
    for parameter in (*training, *(unused if recipe.tune_vision_tower else ())):
        # bf16 has 8 significant bits: steps at the usual learning rates (2e-6) would be rounded away. A tower has one
        # type throughout, since LayerNorm on a CPU takes no mixture.
        parameter.data = parameter.data.float()
    return model


def unused_in_tower(model: Any, images: ImageLoader) -> list[nn.Parameter]:
    """Return the parameters of the vision tower that nothing of its output depends on; the tower becomes trainable.

    In LLaVA these are the layers behind the selected one. They would get no gradient, which DDP refuses.
    """
    parameters = list(vision_tower(model.model).requires_grad_(True).parameters())
    inputs = images.batch([Image.new("RGB", (32, 32))])
    pixels = inputs.pop("pixel_values").to(parameters[0].device, parameters[0].dtype)
    with torch.enable_grad():
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        image = model.model.get_image_features(pixel_values=pixels, **inputs, return_dict=True)
    # Walk back from the output through the graph of operations; its leaves are the parameters in use.
    rows = position_rows(image)
    functions = {row.grad_fn for row in rows if row.grad_fn is not None}
    waiting, leaves = list(functions), set[int]()
    while waiting:
        function = waiting.pop()
        leaves.add(id(getattr(function, "variable", None)))
        new = {before for before, _ in function.next_functions if before is not None} - functions
        functions |= new
        waiting += new
    vision_tower(model.model).requires_grad_(False)
    return [parameter for parameter in parameters if id(parameter) not in leaves]


def keep_unpacked(model: nn.Module) -> list[nn.Module]:
    """Keep bitsandbytes from packing a model's weights for inference; return the layers that it would have packed.

    On a CPU with bf16 instructions it packs them in the first pass without gradients, such as the reference pass.
    Packed weights pass no gradient, and no error is raised.
    """
    layers = [module for module in model.modules() if getattr(module, PACKS, False)]
    for layer in layers:
        setattr(layer, PACKS, False)
    return layers


def _check_post_decoder(config: Any, recipe: Recipe) -> None:
    """Check that the model can have the recipe's post decoder, and does not have another one already."""
    family = config.model_type.removeprefix(RELOOK)
    if recipe.post_decoder.get("features") == "tower" and family not in TOWERS_READ:
        raise RecipeError(
            f"post_decoder.features tower: the states of a {family}'s tower are not known.", "Use projected."
        )
    if not (has_post_decoder(config) and recipe.tune_post_decoder):
        return
    # Compare complete settings: a recipe may leave out what is the default.
    existing = PostDecoderSettings(**config.post_decoder)
    if recipe.post_decoder and PostDecoderSettings(**recipe.post_decoder) != existing:
        raise RecipeError(f"The model has a post decoder already, with other settings: {existing}.", "Leave them out.")
    if recipe.post_decoder_init != "random":
        raise RecipeError("The model has a trained post decoder already.", "Leave post_decoder_init out.")


def _with_lora(model: Any, recipe: Recipe, seed: int, unused: Sequence[nn.Parameter]) -> Any:
    from peft import LoraConfig, get_peft_model

    # The pattern names the parts, whose layers share names (q_proj, k_proj, ...).
    adapted = [language_model(model.model), *([vision_tower(model.model)] if recipe.lora_vision_tower else [])]
    parts = {name: module for name, module in model.model.named_children() if any(module is part for part in adapted)}
    targets = _targets(parts, recipe)
    # A merger lies in the tower, but is the projector. No gradient reaches what is not in use. A convolution may be
    # called like a linear layer.
    left_out = {id(module) for module in connector(model.model).modules()} | {id(p) for p in unused}
    excluded = [
        name
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in targets and f".{name}".startswith(tuple(f".model.{part}." for part in parts))
        if not isinstance(module, nn.Linear) or id(module) in left_out or id(module.weight) in left_out
    ]
    config = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=rf".*\b({'|'.join(parts)})\..*\.({'|'.join(targets)})",
        exclude_modules="|".join(map(re.escape, excluded)) or None,
        bias=recipe.lora_bias,
        use_dora=recipe.use_dora,
        use_rslora=recipe.use_rslora,
        task_type="CAUSAL_LM",
    )
    # peft draws its initial weights from torch's global generator; the fork restores its state.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore", FutureWarning)  # peft 0.21 uses a name that transformers 5.23 deprecates
        wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():  # peft's "all" includes biases of the image side
        in_text = any(f".{part}." in name for part in LANGUAGE_MODELS)
        if parameter.requires_grad and not in_text and "lora_" not in name:
            parameter.requires_grad_(False)
    if recipe.lora_bias != "none" and not any(p.requires_grad and ".bias" in n for n, p in wrapped.named_parameters()):
        raise RecipeError(
            f"lora_bias is {recipe.lora_bias!r}, but the language model has no such biases.", "Set lora_bias none."
        )
    return wrapped


def _targets(parts: Mapping[str, nn.Module], recipe: Recipe) -> list[str]:
    """Return the names of the linear layers that get LoRA, without their module paths."""
    # "model.layers.0.self_attn.q_proj" -> "q_proj"
    linears = {
        name.rpartition(".")[2]
        for part in parts.values()
        for name, module in part.named_modules()
        if isinstance(module, nn.Linear)
    }
    if recipe.lora_target_modules == ALL_LINEAR:
        return sorted(linears)
    unknown = [name for name in recipe.lora_target_modules if name not in linears]
    if unknown:
        raise RecipeError(
            f"The {' and '.join(parts)} has no linear layer {preview(unknown)} to put LoRA on.".replace("_", " "),
            f"lora_target_modules may name {', '.join(sorted(linears))}.",
        )
    return sorted(recipe.lora_target_modules)


def untie_head(model: Any) -> None:
    """Give lm_head its own copy of the weight if it is tied to the input embeddings."""
    if model.lm_head.weight is model.get_input_embeddings().weight:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False


def learning_rate_group(name: str) -> str:
    """Return a parameter's learning rate group: "post_decoder", "lm_head", "mm_projector", "vision_tower" or ""."""
    for part, group in (
        ("post_decoder", "post_decoder"),
        ("lm_head", "lm_head"),
        *((path, "mm_projector") for path in CONNECTORS),  # before the tower, of which a merger is a part
        *((path, "vision_tower") for path in TOWERS),
    ):
        if f".{part}." in f".{name}":
            return group
    return ""


def parameter_groups(model: nn.Module, recipe: Recipe, weight_decay: float) -> list[dict[str, Any]]:
    """Build the optimizer groups by learning rate; norms and biases get no weight decay."""
    rates = {
        "post_decoder": recipe.post_decoder_lr,
        "lm_head": recipe.lm_head_lr,
        "mm_projector": recipe.mm_projector_lr,
        "vision_tower": recipe.vision_tower_lr,
    }
    groups: dict[tuple[float | None, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = 0.0 if parameter.ndim < 2 else weight_decay  # vectors are norms and biases
            groups.setdefault((rates.get(learning_rate_group(name)), decay), []).append(parameter)
    return [
        {"params": members, "weight_decay": decay, **({"lr": rate} if rate is not None else {})}
        for (rate, decay), members in groups.items()
    ]
