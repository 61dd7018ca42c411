"""`relook inspect`: what a model is made of, what would train in it, and the tensors on their way through it.

Module tree and counts come from a model without memory (torch's meta device) and from the shapes on disk, so that a 7B
model costs nothing to look at. Only the tensors of an example need its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from relook.console import output, plain_table
from relook.model.checkpoint import LazyTensor
from relook.model.families import has_post_decoder, with_post_decoder
from relook.model.lazy_model import ModelSource
from relook.model.load import LoadedModel, as_device, as_dtype, build, open_source
from relook.model.trainable import apply_regime
from relook.recipe import build_recipe

PROMPT = "Describe this image in detail."
REGIMES: dict[str, dict[str, bool]] = {
    "head": {"tune_lm_head": True},
    "post_decoder": {"tune_post_decoder": True},
    "post_decoder_head": {"tune_post_decoder": True, "tune_lm_head": True},
    "lora": {"lora_enable": True},
    "projector": {"tune_mm_mlp_adapter": True},
    "full": {},
}


@dataclass(frozen=True)
class Module:
    """A line of the module tree: a module, or `repeats` equal ones in a row, of which the first is shown.

    Args:
        parameters: of the module and all below it; of all equal ones together.
        dtypes: what they are stored in.
    """

    depth: int
    name: str
    kind: str
    repeats: int
    parameters: int
    dtypes: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Passing:
    """A tensor on its way: in the prefill, or in the decode step after it."""

    step: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    mean: float | None
    std: float | None
    min: float | None
    max: float | None
    nan: int
    inf: int

    @staticmethod
    def of(step: str, name: str, tensor: Tensor) -> Passing:
        """Mean, standard deviation (of the population) and extremes are those of the finite numbers, if any."""
        values = tensor.detach().double().flatten()
        rest = values[values.isfinite()]
        some = (rest.mean(), rest.std(correction=0), rest.min(), rest.max()) if len(rest) else ()
        mean, std, least, most = map(float, some) if some else (None,) * 4
        nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
        return Passing(step, name, tuple(tensor.shape), _short(tensor.dtype), mean, std, least, most, nan, inf)


def inspect(
    path: Path,
    image: Path | None = None,
    prompt: str | None = None,
    adapter: Path | None = None,
    vision_tower: Path | None = None,
    dtype: str = "float32",
    device: str = "",
) -> dict[str, Any]:
    """All that the command shows, as plain values: "modules", "trains" and, for an example, "tensors".

    Args:
        image, prompt: the example; with neither, no weights are loaded.
        adapter, vision_tower, dtype, device: as for `load_model`.
    """
    source = open_source(path, adapter, vision_tower, as_dtype(dtype))
    found: dict[str, Any] = {
        "model": str(path),
        "type": source.model_class.__name__,
        "modules": [asdict(module) for module in module_tree(source)],
        "trains": {name: asdict(trained) for name, trained in what_trains(source).items()},
    }
    if image is not None or prompt is not None:
        loaded = build(source, as_dtype(dtype), device=as_device(device))
        images = [] if image is None else [image]
        found["tensors"] = [asdict(passing) for passing in trace(loaded, images, prompt or PROMPT)]
    return found


# The module tree


def module_tree(source: ModelSource) -> list[Module]:
    """The modules of a model from the top, equal neighbours in a list as one."""
    return list(_walk(_without_memory(source, source.config), "", 0, source.tensors))


def _without_memory(source: ModelSource, config: Any) -> Any:
    config = copy.deepcopy(config)  # a regime may change it
    with torch.device("meta"):
        return replace(source, config=config).model_class(config)


def _walk(module: nn.Module, path: str, depth: int, tensors: Mapping[str, LazyTensor]) -> Iterator[Module]:
    for names in _equal_children(module):
        child = getattr(module, names[0]) if not isinstance(module, nn.ModuleList) else module[int(names[0])]
        shown = f"{path}{names[0]}."
        counted = sum(parameter.numel() for parameter in child.parameters())
        yield Module(
            depth,
            names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}",
            type(child).__name__,
            len(names),
            counted * len(names),
            _dtypes(child, shown, tensors),
            {name: tuple(parameter.shape) for name, parameter in child.named_parameters(recurse=False)},
        )
        yield from _walk(child, shown, depth + 1, tensors)


def _equal_children(module: nn.Module) -> Iterator[list[str]]:
    """Children that hold parameters, by name; neighbours in a list with the same types and shapes together."""
    last, group = None, list[str]()
    for name, child in module.named_children():
        if next(child.parameters(), None) is None:
            continue
        look = repr(child), [tuple(parameter.shape) for parameter in child.parameters()]
        if group and not (isinstance(module, nn.ModuleList) and look == last):
            yield group
            group = []
        group, last = [*group, name], look
    if group:
        yield group


def _dtypes(module: nn.Module, path: str, tensors: Mapping[str, LazyTensor]) -> tuple[str, ...]:
    """Of a module without children only: one tensor is read, the smallest."""
    own = [tensors[path + name] for name, _ in module.named_parameters(recurse=False) if path + name in tensors]
    return tuple(sorted({_short(tensor.read().dtype) for tensor in sorted(own, key=lambda t: len(t.shape))[:1]}))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# What trains


@dataclass(frozen=True)
class Trained:
    """How many parameters a regime trains, of how many that the model then has; and by part of the model."""

    trains: int
    of: int
    parts: Mapping[str, int]


def what_trains(source: ModelSource) -> dict[str, Trained]:
    """Each regime with the recipe's defaults, as `relook train` would set it up."""
    processor = source.processor()
    found = {}
    for name, keys in REGIMES.items():
        recipe = build_recipe(
            {"task": "dpo", "model_name_or_path": "-", "output_dir": "-", "vg_path": "-", "pope_data_path": "-", **keys}
        )
        config = source.config
        if recipe.tune_post_decoder and not has_post_decoder(config):
            config = with_post_decoder(config, dict(recipe.post_decoder))
        loaded = LoadedModel(_without_memory(source, config), processor, source.path)
        with torch.device("meta"):
            apply_regime(loaded, recipe)
        parts: dict[str, int] = {}
        for full, parameter in loaded.core.named_parameters():
            if parameter.requires_grad:
                part = full.removeprefix("model.").split(".")[0]
                parts[part] = parts.get(part, 0) + parameter.numel()
        total = sum(parameter.numel() for parameter in loaded.core.parameters())
        found[name] = Trained(sum(parts.values()), total, parts)
    return found


# Tensors on their way


@torch.inference_mode()
def trace(loaded: LoadedModel, images: Sequence[Path], prompt: str) -> list[Passing]:
    """The tensors of one prompt in `generate`: in the prefill, and in the first decode step, which uses the cache."""
    inputs = loaded.encode(images, prompt)
    seen = [Passing.of("prefill", name, inputs[name]) for name in ("pixel_values",) if name in inputs]
    step = "prefill"

    def note(name: str, tensor: Any) -> None:
        nonlocal step
        if isinstance(tensor, Tensor):
            seen.append(Passing.of(step, name, tensor))
        if name == "logits":
            step = "decode"

    with _hooked(loaded.core, note):
        loaded.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=2, min_new_tokens=2)
    return seen


@contextmanager
def _hooked(core: Any, note: Callable[[str, Any], None]) -> Iterator[None]:
    """Call `note` with each tensor's name as it passes."""
    base = core.model

    def given(name: str, argument: str) -> Callable[..., None]:
        return lambda module, args, kwargs: note(name, args[0] if args else kwargs.get(argument))

    def made(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            output = getattr(output, "last_hidden_state", output)
            note(name, output[0] if isinstance(output, tuple) else output)

        return hook

    with ExitStack() as stack:

        def before(module: nn.Module, hook: Callable[..., None]) -> None:
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

        def after(module: nn.Module, hook: Callable[..., None]) -> None:
            stack.callback(module.register_forward_hook(hook).remove)

        before(base.multi_modal_projector, given("image features", "image_features"))
        after(base.multi_modal_projector, made("projected features"))
        before(base.language_model, lambda module, args, kwargs: note("merged embeddings", kwargs["inputs_embeds"]))
        for i, layer in enumerate(base.language_model.layers, 1):
            after(layer, made(f"hidden states, layer {i}"))
        after(base.language_model, made("hidden states, normed"))
        decoder = getattr(base, "post_decoder", None)
        if decoder is not None:
            if decoder.align is not None:
                after(decoder.align, made("post decoder, image side"))
            before(decoder, given("post decoder, in", "states_BSD"))
            after(decoder, made("post decoder, out"))
        after(core.lm_head, made("logits"))
        yield


# Showing


def print_tables(found: Mapping[str, Any]) -> None:
    """What `inspect` found, on standard output; a pipe gets wide lines."""
    console = output()
    console.print(f"{found['model']}: {found['type']}")
    table = plain_table("module", "class", "parameters", "dtype", "shapes", right=("parameters",))
    for module in found["modules"]:
        times = f" (x {module['repeats']})" if module["repeats"] > 1 else ""
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in module["shapes"].items())
        name = "  " * module["depth"] + module["name"] + times
        table.add_row(name, module["kind"], f"{module['parameters']:,}", ", ".join(module["dtypes"]), shapes)
    console.print(table)
    table = plain_table("regime", "trains", "of", "parts", right=("trains", "of"))
    for name, regime in found["trains"].items():
        parts = ", ".join(f"{part} {count:,}" for part, count in regime["parts"].items())
        table.add_row(name, f"{regime['trains']:,}", f"{regime['of']:,}", parts)
    console.print(table)
    if "tensors" in found:
        numbers = ("mean", "std", "min", "max", "NaN", "inf")
        table = plain_table("step", "tensor", "shape", "dtype", *numbers, right=numbers)
        for row in found["tensors"]:
            values = ("-" if row[key] is None else f"{row[key]:.4g}" for key in ("mean", "std", "min", "max"))
            shape = " x ".join(map(str, row["shape"]))
            table.add_row(row["step"], row["name"], shape, row["dtype"], *values, f"{row['nan']}", f"{row['inf']}")
        console.print(table)
