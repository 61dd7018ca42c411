"""Checkpoint files and formats: tensors read lazily from safetensors or PyTorch files and written as safetensors.

The file type is detected from the first bytes. A PyTorch file is a pickle, which can run code. It is therefore read
with `weights_only=True`, which refuses everything but tensors and plain containers.
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from relook.errors import CheckpointError, preview
from relook.files import read_json_object, require_regular, require_regular_files, write_json
from relook.model.families import FAMILIES, RELOOK, find_family, has_post_decoder

# ----------------------------------------------------------------------------------------------------

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class LazyTensor:
    """Tensor that is read from disk on demand, so that only the caller ever holds a whole model."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @staticmethod
    def of(tensor: Tensor) -> LazyTensor:
        return LazyTensor(tuple(tensor.shape), lambda: tensor)

    def map(self, change: Callable[[Tensor], Tensor]) -> LazyTensor:
        """Return a lazy tensor that applies a shape-preserving function when it is read."""
        return LazyTensor(self.shape, lambda: change(self.read()))


def read_tensor_file(path: Path) -> dict[str, LazyTensor]:
    """Read the named tensors of one file, lazily.

    Raises:
        CheckpointError: not a tensor file, a truncated one, or a pickle that holds anything but tensors.
    """
    require_regular(path)
    tensors = _read(path)
    # No model has an empty tensor, and loading one would leave random weights.
    empty = [name for name, tensor in tensors.items() if 0 in tensor.shape]
    if empty:
        raise CheckpointError(
            f"{len(empty)} of {len(tensors)} tensors in {path} are empty ({preview(empty)}).",
            "DeepSpeed's ZeRO-3 leaves such files where weights are saved without being gathered: make a whole one by "
            "its zero_to_fp32.py, or save again with stage3_gather_16bit_weights_on_model_save.",
        )
    return tensors


def _read(path: Path) -> dict[str, LazyTensor]:
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from None
    # safetensors: 8 bytes with the length of the header, then the header, which is JSON.
    if head[8:] == b"{":
        return _read_safetensors(path)
    # PyTorch since 1.6: a zip archive, whose tensors can be mapped into memory.
    if head[:4] == b"PK\x03\x04":
        return _read_pickle(path, mmap=True)
    if head[:1] == b"\x80":  # PyTorch's format before 1.6, which cannot be mapped into memory
        return _read_pickle(path, mmap=False)
    why = "a Git LFS pointer, not the file itself" if head == b"version h" else "no safetensors or PyTorch file"
    raise CheckpointError(f"{path} is {why}.", "Download it again.")


def _read_safetensors(path: Path) -> dict[str, LazyTensor]:
    try:
        file = safe_open(path, "pt")
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is broken: {error}.", "Download or copy it again.") from None
    return {name: LazyTensor(shape, partial(file.get_tensor, name)) for name, shape in shapes.items()}


def _read_pickle(path: Path, mmap: bool) -> dict[str, LazyTensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles, which are refused
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} is refused: it is cut off, or holds more than tensors and could run code when loaded.",
            "Download it again from a source that you trust, as safetensors where there is a choice.",
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} is broken: {reason}", "Download or copy it again.") from None
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} does not hold named tensors.", "Give a model's or an adapter's file.")
    return {str(name): LazyTensor.of(tensor) for name, tensor in content.items()}


def weight_files(folder: Path) -> list[Path]:
    """List the files that hold a folder's weights, if any. Safetensors are preferred to pickles.

    Raises:
        CheckpointError: an index that names a file which is not in the folder.
    """
    return _layout(folder)[0]


def read_tensor_folder(folder: Path) -> dict[str, LazyTensor]:
    """Read the named tensors of a folder, sharded or not, lazily.

    Raises:
        CheckpointError: there are no weights, or the shards lack tensors of the index.
    """
    # An index says which tensors there must be; a single file may hold any.
    files, indexed = _layout(folder)
    if not files:
        raise CheckpointError(
            f"{folder} holds no weights.", f"One of {', '.join((*SINGLE_FILES, *INDEX_FILES))} is expected there."
        )
    tensors = {name: tensor for file in files for name, tensor in read_tensor_file(file).items()}
    missing = sorted(indexed - tensors.keys())
    if missing:
        raise CheckpointError(
            f"The shards of {folder} lack tensors of its index: {preview(missing)}.", "Download again."
        )
    return tensors


def _layout(folder: Path) -> tuple[list[Path], set[str]]:
    """Return the weight files, and the names of the tensors that the index lists (none without an index)."""
    for index, single in zip(INDEX_FILES, SINGLE_FILES, strict=True):
        if (folder / index).exists():
            weight_map = read_json_object(folder / index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{folder / index} has no weight_map.", "Download it again.")
            shards = sorted({str(shard) for shard in weight_map.values()})
            # A shard's name must be a plain one: an index may come from anywhere and could name any file.
            missing = [shard for shard in shards if Path(shard).name != shard or not (folder / shard).is_file()]
            if missing:
                raise CheckpointError(
                    f"{folder / index} names shards that are not in the folder: {preview(missing)}.",
                    "Download them again.",
                )
            return [folder / shard for shard in shards], set(weight_map)
        if (folder / single).exists():
            return [folder / single], set()
    return [], set()


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the usual permissions of a new file; `save_file` alone makes it private."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def save_pretrained(model: Any, folder: Path, **options: Any) -> None:
    """Save a model as transformers and peft do, its tensors with the permissions that its config has."""
    model.save_pretrained(folder, **options)
    mode = next(folder.glob("*config.json")).stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write a stream of tensors to `model.safetensors`, or to shards with an index; one shard is in memory at a time.

    Args:
        folder: where the files go.
        tensors: names and tensors, in the order of writing.
        shard_bytes: largest size of a shard; a single tensor may be larger.
    """
    pending: dict[str, Tensor] = {}
    pending_bytes, total = 0, 0
    parts: list[tuple[Path, list[str]]] = []

    def flush() -> None:
        part = folder / f"part-{len(parts)}.safetensors"
        save_tensors(pending, part)
        parts.append((part, list(pending)))
        pending.clear()

    for name, tensor in tensors:
        if pending and pending_bytes + tensor.nbytes > shard_bytes:
            flush()
            pending_bytes = 0
        # Copy: tensors of one file may share memory, which safetensors refuses to store.
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        pending_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
    # How many shards there are is known only now, and it is part of their names.
    if len(parts) == 1:
        parts[0][0].rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, (part, names) in enumerate(parts, 1):
        shard = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        part.rename(folder / shard)
        weight_map.update(dict.fromkeys(names, shard))
    write_json(folder / INDEX_FILES[0], {"metadata": {"total_size": total}, "weight_map": weight_map})


# ----------------------------------------------------------------------------------------------------
# Checkpoint formats: the kind of a folder, the names of its tensors, and its config in transformers' terms.
#
# Inside relook every tensor has its name in transformers' LlavaForConditionalGeneration. The renames are data: pairs of
# a pattern and its replacement, applied in order.

Renames = tuple[tuple[str, str], ...]
ADAPTER_FILE = "change.json"  # what a training run of relook changed: its base, post decoder settings, LoRA or not
TRAINED_WITH = ("conversation_template", "image_aspect_ratio")  # there, as in a model's config
ADAPTER_CONFIG, NON_LORA = "adapter_config.json", "non_lora_trainables.bin"
ADAPTER_FILES = (NON_LORA, "mm_projector.bin")  # what the original programs save beside a base
LLAVA_TYPES = ("llava", "llava_llama")  # of a liuhaotian config; HA-DPO's fork calls it "llava"
WHOLE_MODELS = ("llava", "llama", "hf", "relook")  # kinds of folders that hold a model, not an adapter

PROJECTOR, TOWER = "model.multi_modal_projector.", "model.vision_tower."
FROM_LLAVA: Renames = (
    (r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?", TOWER),
    (r"^model\.mm_projector\.0\.", PROJECTOR + "linear_1."),
    (r"^model\.mm_projector\.2\.", PROJECTOR + "linear_2."),
    (r"^model\.mm_projector\.(?=weight|bias)", PROJECTOR + "linear_1."),  # mm_projector_type "linear"
    (r"^model\.(layers\.|embed_tokens\.|norm\.)", r"model.language_model.\1"),
)
FROM_HF: Renames = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(?=multi_modal_projector\.|vision_tower\.|image_newline$)", "model."),
    (r"^model\.vision_tower\.vision_model\.", TOWER),
    (r"^visual\.", "model.visual."),
    (r"^model\.(?=(layers|embed_tokens|norm)\.)", "model.language_model."),
)
TO_LLAVA: Renames = (
    (r"^model\.language_model\.", "model."),
    (r"^model\.multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
    (r"^model\.multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
)
# The names of the published llava-hf folders, which every transformers since 4.36 reads.
TO_HF: Renames = (
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.vision_tower\.", "vision_tower.vision_model."),
    (r"^model\.(?=multi_modal_projector\.|image_newline$)", ""),
)
# Names of any transformers version or of LLaVA, of a whole model or of its base model alone.
FROM_ANY: Renames = (
    *FROM_HF,
    (r"^(?=(mm_projector|multi_modal_projector|post_decoder|language_model|layers|embed_tokens|norm)\.)", "model."),
    *FROM_LLAVA,
)
# Names in a training run's files: with or without peft's prefix, of layers that it wrapped or not.
FROM_CHANGE: Renames = (
    (r"^base_model\.model\.", ""),
    (r"\.(base_layer|modules_to_save\.default)\.", "."),
    *FROM_ANY,
)
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|\.position_ids)$")  # buffers in old files; models compute them

# LLaVA's own settings that prompts and preprocessing depend on; they stay in a converted config.
KEPT = ("image_aspect_ratio", "mm_use_im_start_end", "mm_use_im_patch_token")
REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "rms_norm_eps",
    "mm_projector_type",
    "mm_vision_select_layer",
)
TEXT = (
    *REQUIRED[:6],
    *("num_key_value_heads", "head_dim", "hidden_act", "attention_bias", "attention_dropout", "mlp_bias", "use_cache"),
    *("max_position_embeddings", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"),
    "tie_word_embeddings",
)
ROPE = ("rope_parameters", "rope_scaling", "rope_theta")
STRATEGIES = {"patch": "default", "cls_patch": "full"}
PROJECTORS = {"mlp2x_gelu": "gelu", "linear": "linear"}  # to transformers' activation between two linears


def rename(name: str, renames: Renames) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


@dataclass(frozen=True)
class ModelFolder:
    """What a path holds: a model, or an adapter to one. `parse_folder` reads it once; it is then passed on.

    Args:
        path: the folder, or the file of an adapter's tensors.
        kind: "llava", "hf" or "relook" for a model, "llama" for a language model alone, or "run", "lora" or "trained"
            for an adapter. It is detected from the files, never from the name.
        config: content of config.json; may be empty for an adapter.
        change: content of a run's change.json; empty for all other kinds.
    """

    path: Path
    kind: str
    config: dict[str, Any]
    change: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def base(self) -> ModelFolder:
        """Return the model that a run was trained on; every other folder is its own base.

        Raises:
            CheckpointError: the base is not there, or is not a folder that relook knows.
        """
        if self.kind != "run":
            return self
        base = Path(self.change["base"])
        if not base.is_dir():
            raise CheckpointError(
                f"The base of the run {self.path}, {base}, is not there.",
                "Give the base by itself: `relook merge BASE RUN OUT`, or load_model(base, adapter=run).",
            )
        return parse_folder(base)

    @cached_property
    def previous(self) -> tuple[ModelFolder, ...]:
        """Return the adapters that were already applied to the base when a run was trained, in order."""
        return tuple(map(parse_folder, self.change.get("earlier", ())))

    @property
    def template(self) -> str:
        """Return the conversation template that the model was tuned with, or that a run was trained with."""
        return str(self.change.get(TRAINED_WITH[0]) or config_template(self.base.config))

    def tower_for(self, base: ModelFolder) -> Path | None:
        """Return the vision tower that a run was trained with if the base has none of its own, else None."""
        tower = self.change.get("vision_tower")
        return Path(tower) if tower and base.kind in ("llava", "llama") else None


AnyFolder = str | Path | ModelFolder  # what public functions take: a path, or a folder that is parsed already


def parse_folder(path: AnyFolder) -> ModelFolder:
    """Detect what a path holds and read its configs; a folder that is parsed already is returned as it is.

    Raises:
        CheckpointError: nothing that relook knows; unsupported model types are named.
    """
    if isinstance(path, ModelFolder):
        return path
    path = Path(path)
    require_regular(path)
    if path.is_file():  # bare tensors; a config.json beside them may give the post decoder's settings
        return ModelFolder(path, "trained", read_json_object(path.parent / "config.json", optional=True))
    if not path.is_dir():
        raise CheckpointError(f"There is no model folder {path}.", "Check the path.")
    require_regular_files(path)
    # The order matters: a LoRA run of relook has an adapter_config.json as well.
    if (path / ADAPTER_FILE).exists():
        kind, change = "run", _read_change(path / ADAPTER_FILE)
    else:
        change = {}
        kind = "lora" if (path / ADAPTER_CONFIG).exists() else ""
    if kind or (not weight_files(path) and adapter_files(path)):
        return ModelFolder(path, kind or "trained", read_json_object(path / "config.json", optional=True), change)
    config = read_config(path)
    return ModelFolder(path, _model_kind(path, config), config)


def _read_change(path: Path) -> dict[str, Any]:
    change = read_json_object(path)
    if not isinstance(change.get("base"), str):
        raise CheckpointError(f"{path} does not name a base.", "Copy the run again.")
    earlier = change.get("earlier", [])
    if not isinstance(earlier, list) or not all(isinstance(name, str) for name in earlier):
        raise CheckpointError(f"{path} has {earlier!r} as earlier changes.", "Copy the run again.")
    for key in TRAINED_WITH:
        if not isinstance(change.get(key, ""), str):
            raise CheckpointError(f"{path} has {change[key]!r} as {key}.", "Copy the run again.")
    return change


def adapter_files(folder: Path) -> list[Path]:
    return [folder / name for name in ADAPTER_FILES if (folder / name).exists()]


def read_config(folder: str | Path) -> dict[str, Any]:
    folder = Path(folder)
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder} has no config.json.", "Give a model folder, an adapter's, or the output of `relook train`."
        )
    return read_json_object(folder / "config.json")


def _model_kind(path: Path, config: dict[str, Any]) -> str:
    # Both formats have folders of type "llava"; only transformers' has a text_config.
    kind = str(config.get("model_type"))
    if kind in LLAVA_TYPES and "text_config" not in config:
        return "llava"
    if kind == "llama":
        return "llama"
    try:
        find_family(kind)
    except (KeyError, AttributeError):
        raise CheckpointError(
            f"{path} holds a model of type {kind!r}, which relook cannot load{_reason(kind, config)}.",
            "Supported are LLaVA in liuhaotian's folders (llava_llama), models of images and text in transformers' "
            f"({', '.join(FAMILIES)} are tested), and relook's own.",
        ) from None
    return "relook" if kind.startswith(RELOOK) else "hf"


def _reason(kind: str, config: dict[str, Any]) -> str:
    """Say why a model of images and text cannot be loaded, as far as its type tells."""
    text = config.get("text_config")
    kinds = {kind, text.get("model_type") if isinstance(text, dict) else None}
    if config.get("is_encoder_decoder") or kinds & MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.keys():
        return ": its language model is an encoder-decoder, where answers do not share the positions of a prompt"
    if kind == "instructblip":
        return ": its get_image_features takes qformer_input_ids, so that an image's features depend on the prompt"
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return ": transformers has no base model of it with get_image_features"
    return ""


def config_template(config: dict[str, Any]) -> str:
    """Return the conversation template a model was tuned with: v1 for liuhaotian's folders and their conversions.

    LLaVA-NeXT over Mistral uses Mistral's. Over other language models, its config does not tell Vicuna's from Yi's.
    """
    # A conversion keeps the original's template under this key; else the format decides.
    is_hf = "text_config" in config or "vision_config" in config
    default = find_family(str(config["model_type"])).template if is_hf else "v1"
    if config.get("model_type") == "llava_next" and config.get("text_config", {}).get("model_type") == "mistral":
        default = "mistral"
    return str(config.get("conversation_template", default))


def from_llava_config(path: Path, raw: dict[str, Any], vision: CLIPVisionConfig) -> LlavaConfig:
    """Translate a liuhaotian config to transformers' terms, except the id of <image>, which only its tokenizer knows.

    Sizes are taken from the config, never from defaults.

    Args:
        path: the folder, for error messages.
        raw: the liuhaotian config.
        vision: config of the vision tower.

    Raises:
        CheckpointError: a size is missing, or transformers' LLaVA cannot express a setting.
    """
    # transformers would fill in its own defaults, those of a 7B model.
    missing = [key for key in REQUIRED if raw.get(key) is None]
    if missing:
        raise CheckpointError(f"{path / 'config.json'} does not say {preview(missing)}.", "Download it again.")
    projector, select = raw["mm_projector_type"], raw.get("mm_vision_select_feature") or "patch"
    for key, value, supported in (
        ("mm_projector_type", projector, PROJECTORS),
        ("mm_vision_select_feature", select, STRATEGIES),
        ("image_aspect_ratio", raw.get("image_aspect_ratio") or "square", ("square", "pad")),
    ):
        if value not in supported:
            raise CheckpointError(
                f"{path} has {key} {value!r}, which relook does not support.", f"Known ones: {', '.join(supported)}."
            )
    text = {key: raw[key] for key in TEXT if raw.get(key) is not None}
    # One position per patch, plus one for the class token where the model reads it.
    side = vision.image_size // vision.patch_size
    return LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**one_rope(text | {key: raw[key] for key in ROPE if key in raw})),
        image_token_index=0,
        image_seq_length=side * side + (STRATEGIES[select] == "full"),
        vision_feature_layer=raw["mm_vision_select_layer"],
        vision_feature_select_strategy=STRATEGIES[select],
        projector_hidden_act=PROJECTORS[projector],
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        conversation_template=config_template(raw),
        **{key: raw[key] for key in KEPT if raw.get(key) is not None},
    )


def one_rope(text: dict[str, Any]) -> dict[str, Any]:
    """Move a text config's rotary embedding settings to `rope_parameters`, the only name in transformers 5.

    transformers 4 and LLaVA have rope_theta and, where positions are scaled, rope_scaling, whose `type` became
    `rope_type`. If both are present, transformers 5 would ignore one of them.

    Raises:
        ValueError: settings that are not objects, or a theta that is not a number above 0.
    """
    rope: dict[str, Any] = {}
    for key in ROPE[:2]:
        stated = text.get(key) or {}
        if not isinstance(stated, dict):
            raise ValueError(f"{key} is {stated!r}, but must be an object")
        rope |= {"rope_type" if name == "type" else name: value for name, value in stated.items()}
    if any(isinstance(value, dict) for value in rope.values()):  # settings per layer type, which LLaMA does not have
        return text
    if rope.get("rope_type") == "mrope":  # the older name of sections for time, row and column
        rope["rope_type"] = "default"
    if text.get("rope_theta") is not None:
        rope.setdefault("rope_theta", text["rope_theta"])
    theta = rope.get("rope_theta", 1.0)
    if type(theta) not in (int, float) or not 0 < theta < math.inf:
        raise ValueError(f"rope_theta is {theta!r}, but must be a number above 0")
    # Leave no older name: transformers would read it beside rope_parameters.
    rest = {key: value for key, value in text.items() if key not in ROPE}
    return rest | ({"rope_parameters": rope} if rope else {})


def to_llava_config(config: LlavaConfig, dtype: str, tower: str) -> dict[str, Any]:
    """Translate a transformers config to liuhaotian's terms.

    Args:
        config: the transformers config.
        dtype: written as `torch_dtype`.
        tower: written as `mm_vision_tower`.

    Raises:
        CheckpointError: liuhaotian's format cannot express a setting.
    """
    if has_post_decoder(config):
        raise CheckpointError(
            "LLaVA's format cannot hold a post decoder.", "Keep the model in relook's own: `relook export`."
        )
    if not isinstance(config, LlavaConfig):
        raise CheckpointError(f"A {config.model_type} model is written in transformers' format only.", "Use --to hf.")
    if not isinstance(config.vision_feature_layer, int) or config.projector_hidden_act not in PROJECTORS.values():
        raise CheckpointError(
            f"LLaVA's format cannot express vision_feature_layer {config.vision_feature_layer} with "
            f"projector_hidden_act {config.projector_hidden_act!r}.",
            f"It has one layer, and a projector of {', '.join(PROJECTORS.values())}.",
        )
    # liuhaotian's config is flat: the language model's settings lie beside LLaVA's own.
    text = config.text_config.to_dict()
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        **{key: text[key] for key in TEXT if text.get(key) is not None},
        **rope_settings(text),
        "torch_dtype": dtype,
        "mm_vision_tower": tower,
        "mm_hidden_size": config.vision_config.hidden_size,
        "use_mm_proj": True,
        **{key: getattr(config, key) for key in KEPT if hasattr(config, key)},
        **llava_settings(config),
    }


def rope_settings(text: dict[str, Any]) -> dict[str, Any]:
    """Return a text config's rotary embedding settings under the names of transformers 4 and liuhaotian's configs."""
    rope = dict(text.get("rope_parameters") or {})
    scaling = {"type" if key == "rope_type" else key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": None if scaling.get("type", "default") == "default" else scaling,
    }


def llava_settings(config: Any) -> dict[str, Any]:
    """Return settings of a transformers config under the names of a liuhaotian config and its training flags."""
    strategies = {value: key for key, value in STRATEGIES.items()}
    projectors = {value: key for key, value in PROJECTORS.items()}
    return {
        "mm_vision_select_layer": getattr(config, "vision_feature_layer", None),
        "mm_vision_select_feature": strategies.get(getattr(config, "vision_feature_select_strategy", "")),
        "mm_projector_type": projectors.get(getattr(config, "projector_hidden_act", "")),
        "mm_use_im_start_end": getattr(config, "mm_use_im_start_end", False),
        "mm_use_im_patch_token": getattr(config, "mm_use_im_patch_token", False),
    }
