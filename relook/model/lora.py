"""LoRA adapters of peft: strict reading of their settings, and the delta that their tensors add to a weight.

An adapter is merged only if the meaning of every key and value of its adapter_config.json is known here. Many of peft's
variants store the same two matrices but mean something else by them.
"""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relook.errors import CheckpointError, preview
from relook.files import read_json_object
from relook.model.checkpoint import ADAPTER_CONFIG, LazyTensor
from relook.model.families import LANGUAGE_MODELS, TOWERS

PEFT_PREFIX = "base_model.model."
ALL_LINEAR = "all-linear"
EMBEDDINGS = re.compile(r"\.(embed_tokens|position_embedding)\.weight$")  # matrices that are not linear layers


def _flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _regex(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except (re.error, RecursionError):
        return False


def _patterns(number: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Build a check that accepts None, or a mapping from regular expressions to numbers."""
    return lambda value: (
        value is None or (isinstance(value, dict) and all(_regex(key) and number(n) for key, n in value.items()))
    )


# Keys that say how the adapter was trained or is served, but nothing about what it adds to a weight. fan_in_fan_out is
# for GPT-2's transposed layers: peft sets it to false on the linear layers that all supported models have.
IRRELEVANT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("eva_config", "fan_in_fan_out", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config"),
}
# Keys that are read, with a check of their values. All others must be off.
UNDERSTOOD: dict[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: value == "LORA",
    "r": _rank,
    "lora_alpha": _alpha,
    "rank_pattern": _patterns(_rank),
    "alpha_pattern": _patterns(_alpha),
    "use_rslora": _flag,
    "use_dora": _flag,
    "lora_bias": _flag,
    "bias": lambda value: value in ("none", "all", "lora_only"),
    "modules_to_save": lambda value: value is None or _names(value),
    "target_modules": lambda value: _regex(value) or (_names(value) and bool(value)),
    "exclude_modules": lambda value: value is None or _regex(value) or _names(value),
    "layers_to_transform": lambda value: (
        value is None or type(value) is int or (isinstance(value, list) and all(type(i) is int for i in value))
    ),
    "layers_pattern": lambda value: value is None or value == "" or _regex(value) or _names(value),
    # Other initialisations (pissa, olora, corda, loftq, ...) change the base's weights before training.
    "init_lora_weights": lambda value: value is None or value in (True, False, "gaussian", "eva", "orthogonal"),
}
REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
CHANGE_THE_BASE = ("pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True)
class LoraDelta:
    """LoRA delta of one weight W (out, in): scale * B A (Hu et al. 2021, arXiv:2106.09685).

    Args:
        a, b: the matrices A (r, in) and B (out, r).
        magnitude: DoRA's norms (out,) of the rows of the result (Liu et al. 2024, arXiv:2402.09353, eq. 5).
        bias: LoRA bias (out,); scale * bias is added to the layer's own.
    """

    a: LazyTensor
    b: LazyTensor
    scale: float
    magnitude: LazyTensor | None = None
    bias: LazyTensor | None = None

    def fits(self, shape: tuple[int, ...]) -> bool:
        # (out, in) = (out, r) (r, in), and DoRA has one norm per row.
        norms = self.magnitude is None or self.magnitude.shape == shape[:1]
        return shape == (self.b.shape[0], self.a.shape[1]) and self.a.shape[0] == self.b.shape[1] and norms

    def merged(self, dtype: torch.dtype | None, weight: Tensor) -> Tensor:
        """Compute W + scale * B A in float32; DoRA then rescales each row to its norm.

        Args:
            dtype: of the result; None keeps the weight's.
            weight: W (out, in).
        """
        # (out, in) + scale * (out, r) @ (r, in), in float32: deltas are smaller than a step of bf16.
        result = weight.float() + self.scale * (self.b.read().float() @ self.a.read().float())
        if self.magnitude is not None:
            # DoRA: rescale each row (in,) to its learned norm.
            result = result * (self.magnitude.read().float() / result.norm(dim=1))[:, None]
        return result.to(dtype or weight.dtype)

    def merged_bias(self, dtype: torch.dtype | None, bias: Tensor) -> Tensor:
        assert self.bias is not None
        return (bias.float() + self.scale * self.bias.read().float()).to(dtype or bias.dtype)


HALVES = ({"A", "B"}, {"A", "B", "magnitude_vector"}, {"A", "B", "B.bias"})  # of LoRA, of DoRA, of LoRA with a bias


class LoraSettings:
    """LoRA settings of an adapter_config.json.

    Raises:
        CheckpointError: keys whose value is not understood, all of them by name.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / ADAPTER_CONFIG
        if not self.file.exists():
            raise CheckpointError(
                f"{folder} holds LoRA, but its rank and alpha are not known.", "Give its whole folder."
            )
        self.config = read_json_object(self.file)
        absent = [f"no {key}" for key in REQUIRED if key not in self.config]
        strange = [f"{key} {reprlib.repr(value)}" for key, value in self.config.items() if not _understood(key, value)]
        if absent or strange:
            fix = "Merge it with the program that made it."
            if str(self.config.get("init_lora_weights")).startswith(CHANGE_THE_BASE):
                fix = (
                    "Its training changed the base, too. peft makes plain LoRA of it: save_pretrained(..., "
                    "path_initial_model_for_weight_conversion=...)."
                )
            raise CheckpointError(
                f"{folder} is not an adapter that relook can merge: {preview([*strange, *absent], 10)}.", fix
            )

    def pairs(self, halves: Mapping[str, Mapping[str, LazyTensor]], saved_names: Iterable[str]) -> dict[str, LoraDelta]:
        """Pair the LoRA tensors of each adapted module, keyed by its path in the model that peft wrapped.

        Args:
            halves: tensors of each module, keyed by what follows `lora_` in their names.
            saved_names: names of the tensors that are saved whole beside them.

        Raises:
            CheckpointError: the tensors do not match the config: too few, of another variant or another rank.
        """
        if not halves:
            raise CheckpointError(f"{self.file.parent} has no LoRA tensors.", "Copy it again, or save it again.")
        # 1. Each module has all the tensors of one variant.
        incomplete = [name for name, parts in halves.items() if parts.keys() not in HALVES]
        if incomplete:
            message = (
                f"{self.file.parent} holds half of a LoRA pair, or another kind of adapter: {preview(incomplete)}."
            )
            raise CheckpointError(message, "Download it again, or give an adapter of LoRA or DoRA.")
        # 2. It is the variant that the config says: DoRA's tensors without its formula would be merged as plain LoRA.
        for key, part in (("use_dora", "magnitude_vector"), ("lora_bias", "B.bias")):
            contradicting = [name for name, parts in halves.items() if bool(self.config.get(key)) != (part in parts)]
            if contradicting:
                says = f"{key} {self.config.get(key)!r}, which the tensors of {preview(contradicting)} are not"
                raise CheckpointError(f"{self.file} says {says}.", "Copy it again.")
        # 3. What the config says was saved whole is there.
        # A name of modules_to_save matches whole components of a path, so search all paths line by line.
        saved = "\n".join(saved_names)
        without_tensors = [
            n for n in self.config.get("modules_to_save") or () if not re.search(rf"(?m)(^|\.){n}\.", saved)
        ]
        if without_tensors:
            message = f"{self.file}: modules_to_save names {preview(without_tensors)}, of which there are no tensors."
            raise CheckpointError(message, "Copy the adapter again.")
        # 4. The rank is the config's; a wrong one means a wrong scale, since scale = alpha / r.
        ranks = [
            f"{name} has rank {parts['A'].shape[0]}, not {self.rank(name)}"
            for name, parts in halves.items()
            if parts["A"].shape[:1] != (self.rank(name),)
        ]
        if ranks:
            raise CheckpointError(
                f"{self.file} does not belong to its tensors: {preview(ranks)}.", "Copy both files of one adapter."
            )
        return {
            name: LoraDelta(
                parts["A"], parts["B"], self.scale(name), parts.get("magnitude_vector"), parts.get("B.bias")
            )
            for name, parts in halves.items()
        }

    def rank(self, module: str) -> int:
        return int(self._for(module, "rank_pattern", "r"))

    def scale(self, module: str) -> float:
        """Compute alpha / r of a module, or rank-stabilised alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)."""
        rank = self.rank(module)
        return float(self._for(module, "alpha_pattern", "lora_alpha")) / (
            rank**0.5 if self.config.get("use_rslora") else rank
        )

    def _for(self, module: str, patterns: str, key: str) -> Any:
        """Return the value of the first pattern that matches the end of a module's path, else the default."""
        overrides: dict[str, Any] = self.config.get(patterns) or {}
        return next((n for end, n in overrides.items() if re.match(rf"(.*\.)?({end})$", module)), self.config[key])

    def targets(self, module: str) -> bool:
        """Return True if peft puts LoRA on the linear layer with this path."""
        # The order of these rules is peft's: exclusions first, then all-linear, then names, then layers.
        config = self.config
        if _ends(module, config.get("exclude_modules")):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in config.get("modules_to_save") or ()):
            return False
        target_modules, layers = config["target_modules"], config.get("layers_to_transform")
        if target_modules == ALL_LINEAR:
            return module != "lm_head"
        if isinstance(target_modules, str) or module in target_modules or layers in (None, []):
            return _ends(module, target_modules)
        # A list of names with layers_to_transform: the layer's number follows a component such as "layers".
        patterns = config.get("layers_pattern") or r"[^.]*"
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if number := re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
                chosen = [layers] if isinstance(layers, int) else layers
                return _ends(module, target_modules) and int(number[1]) in chosen
        return False

    def missing(self, modules: Mapping[str, str], base: Iterable[tuple[str, LazyTensor]]) -> list[str]:
        """List the linear layers of a base that the config names but the adapter has no tensors for.

        The language model is always checked; any other part only if the adapter changes something in it. LLaVA's own
        adapters were made before the vision tower was attached, yet their target_modules would match its layers too.

        Args:
            modules: from each adapted weight of the base to its path in the model that peft wrapped.
            base: names and tensors of the base.
        """
        # Where the adapter was trained decides how it calls a layer: LLaVA's own say "model.layers.", others
        # "model.language_model.layers.".
        prefixes = {**dict(zip(LANGUAGE, LANGUAGE, strict=True)), **dict(_prefixes(modules))}
        return [
            name
            for name, tensor in base
            if len(tensor.shape) == 2 and name.endswith(".weight") and not EMBEDDINGS.search(name)
            for part in (part for part in prefixes if name.startswith(part))
            if name not in modules and self.targets(prefixes[part] + name[len(part) : -len(".weight")])
        ]


LANGUAGE = tuple(f"model.{part}." for part in LANGUAGE_MODELS)
PARTS = (*LANGUAGE, *(f"model.{part}." for part in (*TOWERS, "post_decoder")), "lm_head")


def _prefixes(modules: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield each part of the model that the adapter changes, with the prefix the adapter uses for it."""
    for part in PARTS:
        for name, module in modules.items():
            tail = name[len(part) : -len(".weight")]
            if name.startswith(part) and module.endswith(tail):
                yield part, module.removesuffix(tail)
                break


def _understood(key: str, value: Any) -> bool:
    if key in IRRELEVANT:
        return True
    check = UNDERSTOOD.get(key)
    return check(value) if check else value in (None, False, [], {})


def _ends(module: str, names: str | list[str] | None) -> bool:
    """Return True if a module's path equals or ends in one of the names; a string is a regular expression to match."""
    if isinstance(names, str):
        return bool(re.fullmatch(names, module))
    return any(f".{module}".endswith(f".{name}") for name in names or ())
