"""What was trained on a base model, read from whatever a training run left, and laid on the base tensor by tensor.

LoRA is merged into the weights it belongs to (in float32, rounded once); everything else replaces the tensor of the
same name. A post decoder brings tensors that the base need not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relook.errors import CheckpointError, some
from relook.files import read_object
from relook.model.checkpoint import (
    CHANGE_FILE,
    FROM_CHANGE,
    PROJECTOR,
    LazyTensor,
    changed_files,
    kind_of,
    read_file,
    rename,
)
from relook.model.families import has_post_decoder, with_post_decoder
from relook.model.lazy_model import ModelSource

TENSORS_FILE = "trained.safetensors"
DECODER, HEAD = "model.post_decoder.", "lm_head."
ADDED = (DECODER, PROJECTOR)  # what a base need not have
# What each stage of the old replace_bin takes from the change, and whether the base must have a post decoder already.
STAGES: dict[int, tuple[tuple[str, ...], bool | None]] = {
    0: ((HEAD, DECODER), False),
    1: ((DECODER,), None),
    2: ((HEAD, DECODER), True),
}


# What an adapter_config.json says of LoRA that is merged here; peft's other varieties are refused.
KNOWN_LORA: dict[str, Any] = {
    "peft_type": "LORA",
    "fan_in_fan_out": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}
HALVES = ({"A", "B"}, {"A", "B", "magnitude_vector"})  # of LoRA, of DoRA


@dataclass(frozen=True)
class Lora:
    """What LoRA adds to one weight W (out, in): B A (Hu et al. 2021, arXiv:2106.09685).

    Args:
        a, b: (r, in) and (out, r).
        magnitude: DoRA's norms (out,) of the rows of the result (Liu et al. 2024, arXiv:2402.09353, eq. 5).
    """

    a: LazyTensor
    b: LazyTensor
    magnitude: LazyTensor | None = None

    def fits(self, shape: tuple[int, ...]) -> bool:
        norms = self.magnitude is None or self.magnitude.shape == shape[:1]
        return shape == (self.b.shape[0], self.a.shape[1]) and self.a.shape[0] == self.b.shape[1] and norms

    def merged(self, scale: float, dtype: torch.dtype | None, weight: Tensor) -> Tensor:
        """W + scale * B A, for DoRA with its rows at their norms; in the weight's dtype where none is given."""
        result = weight.float() + scale * (self.b.read().float() @ self.a.read().float())
        if self.magnitude is not None:
            result = result * (self.magnitude.read().float() / result.norm(dim=1))[:, None]
        return result.to(dtype or weight.dtype)


@dataclass(frozen=True)
class Change:
    """Tensors under transformers' names.

    Args:
        replaced: tensors that take the place of the base's, or are added to it.
        lora: by the name of the weight that it changes.
        scale: factor of LoRA's product B A.
        post_decoder: its settings; None where the change has none, or does not know them.
        base: the folder of the base model, where the change says it.
        vision_tower: the folder of its tower, where it is not the one that the base's config names.
        earlier: the changes that lay on the base already when this one was trained, in their order.
    """

    path: Path
    replaced: dict[str, LazyTensor]
    lora: dict[str, Lora] = field(default_factory=dict)
    scale: float = 1.0
    post_decoder: dict[str, Any] | None = None
    base: Path | None = None
    vision_tower: Path | None = None
    earlier: tuple[Path, ...] = ()

    def lay_on(self, source: ModelSource, dtype: torch.dtype | None = None) -> ModelSource:
        """The base with this change, and before it those that it was trained on.

        Args:
            dtype: of the weights that LoRA is merged into; None keeps what they are stored in.

        Raises:
            CheckpointError: a tensor that the base does not have, or has in another shape.
        """
        for path in self.earlier:
            source = replace(read_change(path), earlier=()).lay_on(source, dtype)
        config, tensors = source.config, dict(source.tensors)
        if any(name.startswith(DECODER) for name in self.replaced):
            config = self._config_with_decoder(source)
            tensors = {name: t for name, t in tensors.items() if not name.startswith(DECODER)}
        held = {name: _shape(tensors, name) for name in self.replaced}
        wrong = [
            f"{name} {list(new.shape)} on {list(held[name]) or 'nothing'}"
            for name, new in self.replaced.items()
            if held[name] != new.shape and (held[name] or not name.startswith(ADDED))
        ]
        wrong += [f"LoRA of {name}" for name, lora in self.lora.items() if not lora.fits(_shape(tensors, name))]
        if wrong:
            raise CheckpointError(
                f"{self.path} does not fit {source.path}: {len(wrong)} tensors ({some(wrong)}).",
                "Give the base that it was trained on.",
            )
        if "lm_head.weight" in self.replaced and config.tie_word_embeddings:
            config = _untied(config)
        tensors |= self.replaced
        for name, lora in self.lora.items():
            tensors[name] = tensors[name].then(partial(lora.merged, self.scale, dtype))
        return replace(source, config=config, tensors=tensors, change=self.path)

    def _config_with_decoder(self, source: ModelSource) -> Any:
        held = getattr(source.config, "post_decoder", None)
        settings = self.post_decoder if self.post_decoder is not None else held
        if settings is None:
            raise CheckpointError(
                f"{self.path} has a post decoder, but nothing says its settings.",
                'Put a config.json with "post_decoder": {...} beside it.',
            )
        return with_post_decoder(source.config, settings)

    def at_stage(self, stage: int, source: ModelSource) -> tuple[Change, list[str]]:
        """What a stage takes from this change, and the names of what it leaves out.

        Stage 0 adds the post decoder and replaces the head; stage 1 adds or replaces the post decoder only; stage 2
        replaces head and post decoder of a model that has one already.
        """
        if stage not in STAGES:
            raise CheckpointError(f"There is no stage {stage}.", f"Known ones: {', '.join(map(str, STAGES))}.")
        if self.earlier:
            raise CheckpointError(
                f"{self.path} was trained on {some(self.earlier)}, of which a stage takes nothing.", "Leave stage out."
            )
        parts, needs_decoder = STAGES[stage]
        has_decoder = has_post_decoder(source.config)
        if needs_decoder is not None and needs_decoder != has_decoder:
            has = "already has a" if has_decoder else "has no"
            raise CheckpointError(f"{source.path} {has} post decoder.", f"Use stage {2 if has_decoder else 0}.")
        absent = [part.strip(".") for part in parts if not any(name.startswith(part) for name in self.replaced)]
        if absent:
            what = f"{self.path} has no {' and no '.join(absent)}, which stage {stage} takes from it."
            raise CheckpointError(what, "Choose another stage, or leave it out to take the whole change.")
        taken = {name: tensor for name, tensor in self.replaced.items() if name.startswith(parts)}
        left = sorted((self.replaced.keys() - taken.keys()) | self.lora.keys())
        return replace(self, replaced=taken, lora={}), left


def _shape(tensors: dict[str, LazyTensor], name: str) -> tuple[int, ...]:
    """The shape of a base's tensor, () where there is none; a tied head has that of the embeddings."""
    if name == "lm_head.weight" and name not in tensors:
        name = "model.language_model.embed_tokens.weight"
    return tensors[name].shape if name in tensors else ()


def _untied(config: Any) -> Any:
    values = config.to_dict()
    values["text_config"]["tie_word_embeddings"] = values["tie_word_embeddings"] = False
    return type(config).from_dict(values)


def read_change(path: Path) -> Change:
    """Read a training run of relook, a LoRA folder of the original, or bare trained tensors (a file, or its folder).

    Raises:
        CheckpointError: nothing of the kind, or LoRA of a variety that relook cannot merge.
    """
    kind = kind_of(path)
    if kind in ("llava", "hf", "relook"):
        raise CheckpointError(f"{path} is a whole model, not a change to one.", "Load it by itself.")
    if kind == "run":
        change = read_object(path / CHANGE_FILE)
        if not isinstance(change.get("base"), str):
            raise CheckpointError(f"{path / CHANGE_FILE} does not name a base.", "Copy the run again.")
        lora = _adapter(path) if change.get("lora") else {}
        tensors = lora | read_file(path / TENSORS_FILE)
        earlier = change.get("earlier", [])
        if not isinstance(earlier, list) or not all(isinstance(name, str) for name in earlier):
            raise CheckpointError(f"{path / CHANGE_FILE} has {earlier!r} as earlier changes.", "Copy the run again.")
        read = _change(path, tensors, change.get("post_decoder"), Path(change["base"]))
        tower = Path(change["vision_tower"]) if change.get("vision_tower") else None
        return replace(read, vision_tower=tower, earlier=tuple(map(Path, earlier)))
    if kind == "lora":
        return _change(path, _adapter(path) | _bare(path))
    return _change(path, read_file(path) if path.is_file() else _bare(path))


def _bare(folder: Path) -> dict[str, LazyTensor]:
    return {name: tensor for file in changed_files(folder) for name, tensor in read_file(file).items()}


def _adapter(folder: Path) -> dict[str, LazyTensor]:
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).exists():
            return read_file(folder / name)
    raise CheckpointError(f"{folder} has an adapter_config.json but no adapter_model.", "Copy it again.")


def _change(
    path: Path, tensors: dict[str, LazyTensor], settings: dict[str, Any] | None = None, base: Path | None = None
) -> Change:
    folder = path if path.is_dir() else path.parent
    if settings is None:
        settings = read_object(folder / "config.json", optional=True).get("post_decoder")
    replaced: dict[str, LazyTensor] = {}
    halves: dict[str, dict[str, LazyTensor]] = {}
    for raw, tensor in tensors.items():
        name = rename(raw, FROM_CHANGE)
        stem, mark, half = name.rpartition(".lora_")
        if mark:
            halves.setdefault(stem + ".weight", {})[half.removesuffix(".weight")] = tensor
        else:
            replaced[name] = tensor
    odd = [name for name, found in halves.items() if found.keys() not in HALVES]
    if odd:
        what = f"{path} holds half of a LoRA pair, or another kind of adapter: {some(odd)}."
        raise CheckpointError(what, "Download it again, or give an adapter of LoRA or DoRA.")
    lora = {name: Lora(found["A"], found["B"], found.get("magnitude_vector")) for name, found in halves.items()}
    return Change(path, replaced, lora, _lora_scale(folder, lora) if lora else 1.0, settings, base)


def _lora_scale(folder: Path, lora: Mapping[str, Lora]) -> float:
    if not (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder} holds LoRA, but its rank and alpha are not known.", "Give its whole folder.")
    config = read_object(folder / "adapter_config.json")
    found = {key: config.get(key) or plain for key, plain in KNOWN_LORA.items()}
    special = [f"{key} {value!r}" for key, value in found.items() if value != KNOWN_LORA[key]]
    if special:
        raise CheckpointError(
            f"{folder} is no adapter that relook can merge: {some(special)}.", "Merge it with the program that made it."
        )
    without = [name for name, found in lora.items() if bool(config.get("use_dora")) != (found.magnitude is not None)]
    if without:
        said = f"use_dora {config.get('use_dora')!r}, which the tensors of {some(without)} are not"
        raise CheckpointError(f"{folder / 'adapter_config.json'} says {said}.", "Copy it again.")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        said = f"r {rank!r} and lora_alpha {alpha!r}"
        raise CheckpointError(f"{folder / 'adapter_config.json'} says {said}, not two numbers.", "Copy it again.")
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))
