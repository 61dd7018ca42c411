"""Adapters: trained changes to a base model, read from whatever a training run left and applied tensor by tensor.

LoRA is merged into its weights (in float32, rounded once); everything else replaces the tensor of the same name. A post
decoder brings tensors that the base need not have.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from relook.console import status
from relook.errors import CheckpointError, preview
from relook.model.checkpoint import (
    ADAPTER_CONFIG,
    FROM_CHANGE,
    LLAVA_TYPES,
    NON_LORA,
    PROJECTOR,
    TRAINED_WITH,
    WHOLE_MODELS,
    AnyFolder,
    LazyTensor,
    ModelFolder,
    adapter_files,
    parse_folder,
    read_tensor_file,
    rename,
)
from relook.model.families import embeddings_name, has_post_decoder, with_post_decoder
from relook.model.lazy_model import LazyModel
from relook.model.lora import PEFT_PREFIX, LoraDelta, LoraSettings

TENSORS_FILE = "trained.safetensors"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
DECODER, HEAD = "model.post_decoder.", "lm_head."
HEAD_WEIGHT = "lm_head.weight"
ADDED = (DECODER, PROJECTOR)  # tensors that a base need not have
# For each stage of the old replace_bin: the parts it takes from the adapter, and if the base must already have a post
# decoder (None: either way).
STAGES: dict[int, tuple[tuple[str, ...], bool | None]] = {
    0: ((HEAD, DECODER), False),
    1: ((DECODER,), None),
    2: ((HEAD, DECODER), True),
}


@dataclass(frozen=True)
class Adapter:
    """Trained tensors under transformers' names, to be applied to a base model.

    Args:
        folder: what they were read from.
        tensors: replace the base's tensors of the same name, or are added to them.
        lora: LoRA deltas, keyed by the name of the weight they change.
        lora_settings: the adapter_config.json of `lora`.
        modules: paths of the LoRA layers in the model that peft wrapped, under the same keys as `lora`.
        post_decoder: settings of the post decoder; None where the adapter has none, or does not know them.
        previous: adapters to be applied to the base before this one, in order.
    """

    folder: ModelFolder
    tensors: dict[str, LazyTensor]
    lora: dict[str, LoraDelta] = field(default_factory=dict)
    lora_settings: LoraSettings | None = None
    modules: dict[str, str] = field(default_factory=dict)
    post_decoder: dict[str, Any] | None = None
    previous: tuple[ModelFolder, ...] = ()

    @property
    def path(self) -> Path:
        return self.folder.path

    def apply_to(self, source: LazyModel, dtype: torch.dtype | None = None) -> LazyModel:
        """Apply the previous adapters, then this one, to a base.

        Args:
            source: the base model.
            dtype: of the weights that LoRA is merged into; None keeps the stored dtype.

        Raises:
            CheckpointError: a tensor that the base lacks or has in another shape, or a layer without its LoRA.
        """
        # 1. The base that this adapter was trained on, with everything that was trained before.
        for folder in self.previous:
            source = replace(read_adapter(folder), previous=()).apply_to(source, dtype)
        config, tensors = source.config, dict(source.tensors)
        # 2. A post decoder comes whole: its settings decide which tensors there are, so none of an older one may stay.
        if any(name.startswith(DECODER) for name in self.tensors):
            config = self._config_with_decoder(source)
            tensors = {name: t for name, t in tensors.items() if not name.startswith(DECODER)}
        self._check(source, tensors)
        # peft saves the head, or the embeddings alone, as copies that are no longer tied.
        untied = {HEAD_WEIGHT} & (self.tensors.keys() | self.lora.keys()) or (
            self.lora_settings is not None and embeddings_name(self.tensors)
        )
        if config.tie_word_embeddings and untied:
            config = _untied(config)
            tensors.setdefault(HEAD_WEIGHT, tensors[embeddings_name(tensors)])
        # 3. Replace tensors of the same name, then merge LoRA into its weights; each is computed when it is read.
        tensors |= self.tensors
        for name, lora in self.lora.items():
            tensors[name] = tensors[name].map(partial(lora.merged, dtype))
            if lora.bias is not None:
                bias = _bias_of(name)
                tensors[bias] = tensors[bias].map(partial(lora.merged_bias, dtype))
        # 4. Prompts and images are those of its training.
        template, aspect_ratio = (self.folder.change.get(key) for key in TRAINED_WITH)
        if template and template != source.template:
            _note_template(str(self.path), template, source.template)
        if aspect_ratio:
            config = copy.copy(config)
            config.image_aspect_ratio = aspect_ratio
        return replace(
            source,
            config=config,
            tensors=tensors,
            adapter=self.path,
            beneath=(source, self),
            template=template or source.template,
            aspect_ratio=aspect_ratio or source.aspect_ratio,
        )

    def without_adapter(self) -> tuple[Adapter, dict[str, LazyTensor]]:
        """Split into the tensors other than LoRA, as an adapter, and the LoRA tensors under peft's names."""
        if self.path.is_file():
            tensors = read_tensor_file(self.path)
        elif any((self.path / name).exists() for name in ADAPTER_FILES):
            tensors = _read_lora_folder(self.path)
        else:  # a relook checkpoint, which keeps everything in one file
            names = (
                (name.replace(".default.", "."), t) for name, t in read_tensor_file(self.path / TENSORS_FILE).items()
            )
            tensors = {name: tensor for name, tensor in names if ".lora_" in name}
        # The same files hold both: tensors that peft wrote under its own names are its job, the rest is replaced.
        beside = self.tensors.keys() - {rename(name, FROM_CHANGE) for name in tensors}
        rest = {name: self.tensors[name] for name in beside}
        return Adapter(self.folder, rest, post_decoder=self.post_decoder), tensors

    @property
    def has_llavas_names(self) -> bool:
        """Return True if the original program made the adapter: there the language model is the top-level module."""
        return any(module.startswith("model.layers.") for module in self.modules.values())

    def _check(self, source: LazyModel, tensors: dict[str, LazyTensor]) -> None:
        # A tensor must be on the base in the same shape; only those of ADDED may be new.
        shapes = {name: _shape(tensors, name) for name in self.tensors}
        wrong = [
            f"{name} {list(new.shape)} on {list(shapes[name]) or 'nothing'}"
            for name, new in self.tensors.items()
            if shapes[name] != new.shape and (shapes[name] or not name.startswith(ADDED))
        ]
        wrong += [f"LoRA of {name}" for name, lora in self.lora.items() if not lora.fits(_shape(tensors, name))]
        wrong += [
            f"LoRA of {_bias_of(name)}"
            for name, lora in self.lora.items()
            if lora.bias is not None and lora.bias.shape != _shape(tensors, _bias_of(name))
        ]
        if wrong:
            raise CheckpointError(
                f"{self.path} does not fit {source.path}: {len(wrong)} tensors ({preview(wrong)}).",
                "Give the base that it was trained on.",
            )
        # LoRA that is cut off would load without a word, as a weaker model.
        if self.lora_settings and (missing := self.lora_settings.missing(self.modules, tensors.items())):
            raise CheckpointError(
                f"{self.path} lacks LoRA for {len(missing)} layers that its target_modules name ({preview(missing)}).",
                "Copy it again: the file is incomplete, or the adapter belongs to a smaller model.",
            )

    def note_projector(self) -> None:
        """Warn if a LLaVA adapter came without its projector.

        LLaVA saves what it trains beside LoRA only at the end of a run, not in its checkpoint-N folders.
        """
        has_projector = any(name.startswith(PROJECTOR) for name in self.tensors)
        if self.has_llavas_names and not has_projector and not (self.path / NON_LORA).exists():
            status(
                f"  {self.path} has no {NON_LORA}: no projector came along, so the base's stays. LLaVA trains it "
                "beside LoRA and saves it at the end of a run only; where it was trained, the answers are not that "
                "model's."
            )

    def _config_with_decoder(self, source: LazyModel) -> Any:
        existing = getattr(source.config, "post_decoder", None)
        settings = self.post_decoder if self.post_decoder is not None else existing
        if settings is None:
            raise CheckpointError(
                f"{self.path} has a post decoder, but nothing says its settings.",
                'Put a config.json with "post_decoder": {...} beside it.',
            )
        return with_post_decoder(source.config, settings)

    def at_stage(self, stage: int, source: LazyModel) -> tuple[Adapter, list[str]]:
        """Select what a stage takes from this and the previous adapters; also return the names it leaves out.

        Stage 0 adds the post decoder and replaces the head; stage 1 adds or replaces the post decoder only; stage 2
        replaces head and post decoder of a model that has one already.
        """
        if stage not in STAGES:
            raise CheckpointError(f"There is no stage {stage}.", f"Known ones: {', '.join(map(str, STAGES))}.")
        # The base must be what the stage expects.
        parts, needs_decoder = STAGES[stage]
        has_decoder = has_post_decoder(source.config)
        if needs_decoder is not None and needs_decoder != has_decoder:
            has = "already has a" if has_decoder else "has no"
            raise CheckpointError(f"{source.path} {has} post decoder.", f"Use stage {2 if has_decoder else 0}.")
        combined = self._with_earlier()
        absent = [part.strip(".") for part in parts if not any(name.startswith(part) for name in combined.tensors)]
        if absent:
            message = f"{self.path} has no {' and no '.join(absent)}, which stage {stage} takes from it."
            raise CheckpointError(message, "Choose another stage, or leave it out to take the whole change.")
        taken = {name: tensor for name, tensor in combined.tensors.items() if name.startswith(parts)}
        left_out = sorted((combined.tensors.keys() - taken.keys()) | combined.lora.keys())
        return replace(combined, tensors=taken, lora={}, lora_settings=None, modules={}), left_out

    def _with_earlier(self) -> Adapter:
        """Combine the previous adapters and this one; of LoRA only the names matter, since no stage takes it."""
        tensors: dict[str, LazyTensor] = {}
        lora: dict[str, LoraDelta] = {}
        settings = None
        for adapter in (*map(read_adapter, self.previous), self):
            if any(name.startswith(DECODER) for name in adapter.tensors):  # replaces an earlier one
                tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(DECODER)}
                settings = adapter.post_decoder
            tensors |= adapter.tensors
            lora |= adapter.lora
        return replace(self, tensors=tensors, lora=lora, post_decoder=settings, previous=())

    def after(self, base: ModelFolder) -> Adapter:
        """Drop the previous adapters that a training run used as the base already contains."""
        present = [folder.path.resolve() for folder in (*base.previous, base)]
        if [folder.path.resolve() for folder in self.previous[: len(present)]] == present:
            return replace(self, previous=self.previous[len(present) :])
        return self


@cache  # once for each run
def _note_template(path: str, template: str, base_template: str) -> None:
    status(f"  {path} was trained with template {template}, which is used instead of its base's {base_template}")


def _shape(tensors: dict[str, LazyTensor], name: str) -> tuple[int, ...]:
    """Return the shape of a base's tensor, () if there is none; a tied head has the shape of the embeddings."""
    if name == HEAD_WEIGHT and name not in tensors:
        name = embeddings_name(tensors)
    return tensors[name].shape if name in tensors else ()


def _bias_of(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _untied(config: Any) -> Any:
    values = config.to_dict()
    values["text_config"]["tie_word_embeddings"] = values["tie_word_embeddings"] = False
    return type(config).from_dict(values)


def parse_adapter(path: AnyFolder) -> ModelFolder:
    """Parse the folder or file of an adapter.

    Raises:
        CheckpointError: the path holds a whole model, or nothing that relook knows.
    """
    folder = parse_folder(path)
    if folder.kind in WHOLE_MODELS:
        raise CheckpointError(f"{folder.path} is a whole model, not a change to one.", "Load it by itself.")
    return folder


def read_adapter(path: AnyFolder) -> Adapter:
    """Read a relook training run, a LoRA folder of the original, or bare trained tensors (a file or its folder).

    Raises:
        CheckpointError: the path holds no adapter, or a LoRA variant that relook cannot merge.
    """
    folder = parse_adapter(path)
    path = folder.path
    if folder.kind == "run":
        tensors = read_tensor_file(path / TENSORS_FILE)
        # A finished run keeps LoRA in peft's own file; a checkpoint of a run has one file for everything.
        if folder.change.get("lora") and not any(".lora_" in name for name in tensors):
            tensors |= _read_lora_folder(path)
    elif folder.kind == "lora":
        tensors = _read_lora_folder(path) | _read_bare_tensors(path)
    else:
        tensors = read_tensor_file(path) if path.is_file() else _read_bare_tensors(path)
    return _build_adapter(folder, tensors)


def _read_bare_tensors(folder: Path) -> dict[str, LazyTensor]:
    return {name: tensor for file in adapter_files(folder) for name, tensor in read_tensor_file(file).items()}


def _read_lora_folder(folder: Path) -> dict[str, LazyTensor]:
    for name in ADAPTER_FILES:
        if (folder / name).exists():
            return read_tensor_file(folder / name)
    raise CheckpointError(f"{folder} has an adapter_config.json but no adapter_model.", "Copy it again.")


def language_model_config(adapter: ModelFolder) -> dict[str, Any] | None:
    """Return the liuhaotian config beside an adapter, which turns a bare language model into LLaVA; None if absent."""
    configs = (folder.config for folder in (*adapter.previous, adapter))
    return next((c for c in configs if c.get("model_type") in LLAVA_TYPES and "text_config" not in c), None)


# `default` is peft's name for an adapter, which appears in the parameter names of a wrapped model.
LORA_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<half>\w+?)(?:\.default)?(?P<bias>\.bias)?(?:\.weight)?")


def _build_adapter(folder: ModelFolder, tensors: dict[str, LazyTensor]) -> Adapter:
    path, settings = folder.path, folder.change.get("post_decoder")
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors.", "Copy it again, or save it again.")
    if settings is None:
        settings = folder.config.get("post_decoder")
    replaced: dict[str, LazyTensor] = {}
    halves: dict[str, dict[str, LazyTensor]] = {}
    # Sort the tensors: two halves of LoRA (A and B, and what variants add) by module, all others by their new names.
    for raw, tensor in tensors.items():
        if half := LORA_NAME.fullmatch(raw):
            module = half["module"].removeprefix(PEFT_PREFIX)
            halves.setdefault(module, {})[half["half"] + (half["bias"] or "")] = tensor
        else:
            replaced[rename(raw, FROM_CHANGE)] = tensor
    if not halves and (path.is_file() or not (path / ADAPTER_CONFIG).exists()):
        return Adapter(folder, replaced, post_decoder=settings, previous=folder.previous)
    lora_settings = LoraSettings(path if path.is_dir() else path.parent)
    pairs = lora_settings.pairs(halves, replaced)
    # Modules are named as in the model that peft wrapped, weights as in transformers'; two names may mean one weight.
    modules: dict[str, str] = {}
    for module in pairs:
        weight = rename(f"{module}.weight", FROM_CHANGE)
        if weight in modules:
            raise CheckpointError(
                f"{path} holds LoRA of {weight} twice: as {modules[weight]} and as {module}.", "Remove what is older."
            )
        modules[weight] = module
    lora = {name: pairs[module] for name, module in modules.items()}
    return Adapter(folder, replaced, lora, lora_settings, modules, settings, folder.previous)
