"""`relook inspect`: a model's module tree, the parameters that would train, and tensors traced through it.

Module tree and counts come from a model on torch's meta device and from the shapes on disk, so inspecting a 7B model
costs nothing. Only tracing an example needs the weights.
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

from relook.console import plain_table, stdout_console
from relook.model.checkpoint import LazyTensor
from relook.model.families import connector, has_post_decoder, language_model, with_post_decoder
from relook.model.lazy_model import LazyModel
from relook.model.load import LoadedModel, materialize, open_lazy, parse_device, parse_dtype
from relook.model.trainable import set_trainable
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
class ModuleRow:
    """Line of the module tree: a module, or `repeats` identical neighbours, of which the first is shown.

    Args:
        parameters: number of parameters in the module and its submodules, over all repeats.
        dtypes: the dtypes they are stored in.
    """

    depth: int
    name: str
    kind: str
    repeats: int
    parameters: int
    dtypes: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class TracedTensor:
    """Shape and statistics of a tensor traced in the prefill, or in the decode step after it."""

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
    def of(step: str, name: str, tensor: Tensor) -> TracedTensor:
        """Compute a tensor's statistics.

        Mean, population standard deviation, minimum and maximum cover the finite values only; None if there are none.
        """
        # float64, in which sums over millions of half-precision values lose nothing.
        values = tensor.detach().double().flatten()
        finite = values[values.isfinite()]
        statistics = (finite.mean(), finite.std(correction=0), finite.min(), finite.max()) if len(finite) else ()
        mean, std, low, high = map(float, statistics) if statistics else (None,) * 4
        nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
        return TracedTensor(step, name, tuple(tensor.shape), _short(tensor.dtype), mean, std, low, high, nan, inf)


def inspect_model(
    path: str | Path,
    image: str | Path | None = None,
    prompt: str | None = None,
    adapter: str | Path | None = None,
    vision_tower: str | Path | None = None,
    dtype: str = "float32",
    device: str = "",
) -> dict[str, Any]:
    """Collect what the command shows, as plain values: "modules", "trains" and, for an example, "tensors".

    Args:
        path: a model folder or a training run.
        image, prompt: the example; with neither, no weights are loaded.
        adapter, vision_tower, dtype, device: as for `load_model`.
    """
    path = Path(path)
    image = None if image is None else Path(image)
    adapter = None if adapter is None else Path(adapter)
    vision_tower = None if vision_tower is None else Path(vision_tower)
    source = open_lazy(path, adapter, vision_tower, parse_dtype(dtype))
    findings: dict[str, Any] = {
        "model": str(path),
        "type": source.model_class.__name__,
        "modules": [asdict(module) for module in module_tree(source)],
        "trains": {name: asdict(trained) for name, trained in count_trainable(source).items()},
    }
    if image is not None or prompt is not None:
        loaded = materialize(source, parse_dtype(dtype), device=parse_device(device))
        images = [] if image is None else [image]
        findings["tensors"] = [asdict(tensor) for tensor in trace_tensors(loaded, images, prompt or PROMPT)]
    return findings


# The module tree


def module_tree(source: LazyModel) -> list[ModuleRow]:
    """List the modules of a model from the top, identical neighbours in a module list merged into one row."""
    return list(_walk(_without_memory(source, source.config), "", 0, source.tensors))


def _without_memory(source: LazyModel, config: Any) -> Any:
    config = copy.deepcopy(config)  # building a regime may change it
    with torch.device("meta"):
        return replace(source, config=config).model_class(config)


def _walk(module: nn.Module, path: str, depth: int, tensors: Mapping[str, LazyTensor]) -> Iterator[ModuleRow]:
    for names in _equal_children(module):
        child = getattr(module, names[0]) if not isinstance(module, nn.ModuleList) else module[int(names[0])]
        child_path = f"{path}{names[0]}."
        count = sum(parameter.numel() for parameter in child.parameters())
        yield ModuleRow(
            depth,
            names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}",
            type(child).__name__,
            len(names),
            count * len(names),
            _dtypes(child, child_path, tensors),
            {name: tuple(parameter.shape) for name, parameter in child.named_parameters(recurse=False)},
        )
        yield from _walk(child, child_path, depth + 1, tensors)


def _equal_children(module: nn.Module) -> Iterator[list[str]]:
    """Yield the names of children with parameters, grouping list neighbours of the same types and shapes."""
    previous, group = None, list[str]()
    for name, child in module.named_children():
        if next(child.parameters(), None) is None:
            continue
        # Neighbours are equal if their printed trees (classes and sizes) and the shapes of their parameters are.
        signature = repr(child), [tuple(parameter.shape) for parameter in child.parameters()]
        if group and not (isinstance(module, nn.ModuleList) and signature == previous):
            yield group
            group = []
        group, previous = [*group, name], signature
    if group:
        yield group


def _dtypes(module: nn.Module, path: str, tensors: Mapping[str, LazyTensor]) -> tuple[str, ...]:
    """Return the dtype of a module's own parameters on disk; only one tensor, of the fewest dimensions, is read."""
    stored = [tensors[path + name] for name, _ in module.named_parameters(recurse=False) if path + name in tensors]
    return tuple(sorted({_short(tensor.read().dtype) for tensor in sorted(stored, key=lambda t: len(t.shape))[:1]}))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# What trains


@dataclass(frozen=True)
class TrainableCount:
    """Number of parameters that a regime trains, of the model's total, and by part of the model."""

    trains: int
    of: int
    parts: Mapping[str, int]


def count_trainable(source: LazyModel) -> dict[str, TrainableCount]:
    """Count each regime's trainable parameters with the recipe's defaults, as `relook train` would set it up."""
    processor = source.processor()
    counts = {}
    for name, keys in REGIMES.items():
        # A recipe needs data paths; nothing here reads them.
        recipe = build_recipe(
            {"task": "dpo", "model_name_or_path": "-", "output_dir": "-", "vg_path": "-", "pope_data_path": "-", **keys}
        )
        config = source.config
        if recipe.tune_post_decoder and not has_post_decoder(config):
            config = with_post_decoder(config, dict(recipe.post_decoder))
        loaded = LoadedModel(_without_memory(source, config), processor, source.path)
        # On the meta device, initialising LoRA or a post decoder costs nothing.
        with torch.device("meta"):
            set_trainable(loaded, recipe)
        parts: dict[str, int] = {}
        # By part of the model: "model.language_model.layers..." counts under language_model.
        for full, parameter in loaded.core.named_parameters():
            if parameter.requires_grad:
                part = full.removeprefix("model.").split(".")[0]
                parts[part] = parts.get(part, 0) + parameter.numel()
        total = sum(parameter.numel() for parameter in loaded.core.parameters())
        counts[name] = TrainableCount(sum(parts.values()), total, parts)
    return counts


# Tensors on their way


@torch.inference_mode()
def trace_tensors(loaded: LoadedModel, images: Sequence[Path], prompt: str) -> list[TracedTensor]:
    """Trace the tensors of one prompt in `generate`: the prefill and the first decode step, which uses the KV cache."""
    inputs = loaded.encode(images, prompt)
    traced = [TracedTensor.of("prefill", name, inputs[name]) for name in ("pixel_values",) if name in inputs]
    step = "prefill"

    def note(name: str, tensor: Any) -> None:
        nonlocal step
        if isinstance(tensor, Tensor):
            traced.append(TracedTensor.of(step, name, tensor))
        # lm_head is the last module of a step.
        if name == "logits":
            step = "decode"

    with _hooked(loaded.core, note):
        loaded.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=2, min_new_tokens=2)
    return traced


@contextmanager
def _hooked(core: Any, note: Callable[[str, Any], None]) -> Iterator[None]:
    """Install forward hooks that call `note` with each traced tensor and its name; remove them on exit."""
    base = core.model

    def input_hook(name: str, argument: str) -> Callable[..., None]:
        return lambda module, args, kwargs: note(name, args[0] if args else kwargs.get(argument))

    def output_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # Base models return an object, decoder layers a tuple in older transformers, the rest a tensor.
            output = getattr(output, "last_hidden_state", output)
            note(name, output[0] if isinstance(output, tuple) else output)

        return hook

    with ExitStack() as stack:

        def before(module: nn.Module, hook: Callable[..., None]) -> None:
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

        def after(module: nn.Module, hook: Callable[..., None]) -> None:
            stack.callback(module.register_forward_hook(hook).remove)

        # In order of the data flow: image side, language model, post decoder, lm_head.
        projector = connector(base)
        before(projector, input_hook("image features", "image_features"))
        after(projector, output_hook("projected features"))
        trunk = language_model(base)
        before(trunk, lambda module, args, kwargs: note("merged embeddings", kwargs["inputs_embeds"]))
        for i, layer in enumerate(trunk.layers, 1):
            after(layer, output_hook(f"hidden states, layer {i}"))
        after(trunk, output_hook("hidden states, normed"))
        decoder = getattr(base, "post_decoder", None)
        if decoder is not None:
            if decoder.align is not None:
                after(decoder.align, output_hook("post decoder, image side"))
            before(decoder, input_hook("post decoder, in", "states_BSD"))
            after(decoder, output_hook("post decoder, out"))
        after(core.lm_head, output_hook("logits"))
        yield


# Showing


def print_tables(findings: Mapping[str, Any]) -> None:
    """Print the findings of `inspect_model` to standard output; a pipe gets wide lines."""
    console = stdout_console()
    dtypes = {dtype for module in findings["modules"] for dtype in module["dtypes"]}
    # A column of its own only where it tells something: 80 columns are few.
    mixed = len(dtypes) > 1
    console.print(f"{findings['model']}: {findings['type']}{'' if mixed else ', ' + ''.join(dtypes)}")
    columns = ("module", "class", "parameters", *(["dtype"] if mixed else []), "shapes")
    table = plain_table(*columns, right=("parameters",))
    table.columns[0].no_wrap = table.columns[1].no_wrap = True  # on a narrow terminal shapes are folded
    for module in findings["modules"]:
        times = f" (x {module['repeats']})" if module["repeats"] > 1 else ""
        shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in module["shapes"].items())
        name = " " * module["depth"] + module["name"] + times
        dtype = [", ".join(module["dtypes"])] if mixed else []
        table.add_row(name, module["kind"], f"{module['parameters']:,}", *dtype, shapes)
    console.print(table)
    table = plain_table("regime", "trains", "of", "parts", right=("trains", "of"))
    for name, regime in findings["trains"].items():
        parts = ", ".join(f"{part} {count:,}" for part, count in regime["parts"].items())
        table.add_row(name, f"{regime['trains']:,}", f"{regime['of']:,}", parts)
    console.print(table)
    if "tensors" in findings:
        numbers = ("mean", "std", "min", "max", "NaN", "inf")
        table = plain_table("step", "tensor", "shape", "dtype", *numbers, right=numbers)
        for row in findings["tensors"]:
            values = ("-" if row[key] is None else f"{row[key]:.4g}" for key in ("mean", "std", "min", "max"))
            shape = " x ".join(map(str, row["shape"]))
            table.add_row(row["step"], row["name"], shape, row["dtype"], *values, f"{row['nan']}", f"{row['inf']}")
        console.print(table)
