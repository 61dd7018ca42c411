"""Tensors on disk: read one at a time from safetensors or PyTorch files, written as safetensors; sharded or not.

What a file is, is read from its first bytes. A PyTorch file is a pickle, and a pickle can run code: it is read with
`weights_only=True`, which refuses all but tensors and plain containers.
"""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from relook.errors import CheckpointError, some
from relook.files import read_object, write_json
from relook.model.families import MODEL_TYPES, TRUNKS, has_post_decoder

# ----------------------------------------------------------------------------------------------------

INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read when it is asked for: nothing holds a whole model but the one who wants it."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @staticmethod
    def of(tensor: Tensor) -> LazyTensor:
        return LazyTensor(tuple(tensor.shape), lambda: tensor)

    def then(self, change: Callable[[Tensor], Tensor]) -> LazyTensor:
        """The same tensor with a change that keeps its shape, made when it is read."""
        return LazyTensor(self.shape, lambda: change(self.read()))


def read_file(path: Path) -> dict[str, LazyTensor]:
    """The named tensors of one file.

    Raises:
        CheckpointError: no tensor file, a truncated one, or a pickle that holds anything but tensors.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.", "Check the path.") from None
    if head[8:] == b"{":
        return _read_safetensors(path)
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
            warnings.simplefilter("ignore")  # of foreign pickles, which are refused
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
    """The files that hold a folder's weights; none where it holds none. Safetensors go before pickles.

    Raises:
        CheckpointError: an index that names a file which is not in the folder.
    """
    return _layout(folder)[0]


def read_folder(folder: Path) -> dict[str, LazyTensor]:
    """The named tensors of a folder, sharded or not."""
    files, indexed = _layout(folder)
    if not files:
        raise CheckpointError(
            f"{folder} holds no weights.", f"One of {', '.join((*SINGLE_FILES, *INDEX_FILES))} is expected there."
        )
    tensors = {name: tensor for file in files for name, tensor in read_file(file).items()}
    missing = sorted(indexed - tensors.keys())
    if missing:
        raise CheckpointError(f"The shards of {folder} lack tensors of its index: {some(missing)}.", "Download again.")
    return tensors


def _layout(folder: Path) -> tuple[list[Path], set[str]]:
    """Weight files, and the tensors that an index names."""
    for index, single in zip(INDEX_FILES, SINGLE_FILES, strict=True):
        if (folder / index).exists():
            weight_map = read_object(folder / index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise CheckpointError(f"{folder / index} has no weight_map.", "Download it again.")
            shards = sorted({str(shard) for shard in weight_map.values()})
            missing = [shard for shard in shards if Path(shard).name != shard or not (folder / shard).is_file()]
            if missing:
                raise CheckpointError(
                    f"{folder / index} names shards that are not in the folder: {some(missing)}.",
                    "Download them again.",
                )
            return [folder / shard for shard in shards], set(weight_map)
        if (folder / single).exists():
            return [folder / single], set()
    return [], set()


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that others may read as they may any new file: `save_file` alone makes it private."""
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write tensors as they come into `model.safetensors`, or into shards with an index; one shard is in memory.

    Args:
        shard_bytes: largest size of a shard; a single tensor may be larger.
    """
    held: dict[str, Tensor] = {}
    held_bytes, total = 0, 0
    parts: list[tuple[Path, list[str]]] = []

    def flush() -> None:
        part = folder / f"part-{len(parts)}.safetensors"
        save_tensors(held, part)
        parts.append((part, list(held)))
        held.clear()

    for name, tensor in tensors:
        if held and held_bytes + tensor.nbytes > shard_bytes:
            flush()
            held_bytes = 0
        # A copy of its own: tensors of one file may share memory, which safetensors does not store.
        held[name] = tensor.detach().to("cpu", copy=True).contiguous()
        held_bytes += tensor.nbytes
        total += tensor.nbytes
    flush()
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
# The formats of checkpoints: what a folder is, how its tensors are called, and how its config reads in transformers.
#
# Inside relook every tensor has the name it has in transformers' LlavaForConditionalGeneration. The renames are data:
# pairs of a pattern and its replacement, tried in order.

Renames = tuple[tuple[str, str], ...]
CHANGE_FILE = "change.json"  # what a training run of relook changed: its base, post decoder settings, LoRA or not
CHANGED_FILES = ("non_lora_trainables.bin", "mm_projector.bin")  # what the original programs save beside a base

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
# Names of what a training run saved: with peft's prefix, with the model's, or with none.
FROM_CHANGE: Renames = (
    (r"^base_model\.model\.", ""),
    (r"\.base_layer\.", "."),  # a bias that was trained beside LoRA
    (r"^(?=mm_projector\.|multi_modal_projector\.|post_decoder\.|layers\.|embed_tokens\.|norm\.)", "model."),
    *FROM_LLAVA,
)
COMPUTED = re.compile(r"(rotary_emb\.inv_freq|\.position_ids)$")  # buffers that old files hold and nobody needs

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
STRATEGIES = {"patch": "default", "cls_patch": "full"}
PROJECTORS = {"mlp2x_gelu": "gelu", "linear": "linear"}  # to transformers' activation between two linears


def rename(name: str, renames: Renames) -> str:
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def kind_of(path: Path) -> str:
    """What a path holds: "llava", "hf" or "relook" (models), "run", "lora" or "trained" (changes to a model).

    Raises:
        CheckpointError: nothing that relook knows; families it does not load are refused by name.
    """
    if path.is_file():
        return "trained"
    if not path.is_dir():
        raise CheckpointError(f"There is no model folder {path}.", "Check the path.")
    for name, kind in ((CHANGE_FILE, "run"), ("adapter_config.json", "lora")):
        if (path / name).exists():
            return kind
    if not weight_files(path) and changed_files(path):
        return "trained"
    return _model_kind(path, read_config(path))


def changed_files(folder: Path) -> list[Path]:
    return [folder / name for name in CHANGED_FILES if (folder / name).exists()]


def read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder} has no config.json.", "Give a model folder, an adapter's, or the output of `relook train`."
        )
    return read_object(folder / "config.json")


def _model_kind(path: Path, config: dict[str, Any]) -> str:
    kind = config.get("model_type")
    if kind in MODEL_TYPES and "text_config" in config:
        return "hf" if kind in TRUNKS else "relook"
    if kind in ("llava", "llava_llama"):  # HA-DPO's fork calls it "llava"
        return "llava"
    raise CheckpointError(
        f"{path} holds a model of type {kind!r}, which relook cannot load.",
        "Supported are LLaVA in liuhaotian's folders (llava_llama), LLaVA and LLaVA-NeXT in transformers' "
        f"({', '.join(TRUNKS)}), and relook's own.",
    )


def default_template(config: dict[str, Any]) -> str:
    """The conversation template a model was tuned with: LLaVA's v1 for liuhaotian's folders and their conversions.

    LLaVA-NeXT over Mistral has Mistral's; over other language models its config does not tell Vicuna's from Yi's.
    """
    own = "llava_hf" if "text_config" in config else "v1"
    if config.get("model_type") == "llava_next" and config.get("text_config", {}).get("model_type") == "mistral":
        own = "mistral"
    return str(config.get("conversation_template", own))


def from_llava_config(path: Path, raw: dict[str, Any], vision: CLIPVisionConfig, image_token_id: int) -> LlavaConfig:
    """A liuhaotian config in transformers' terms. Sizes are taken from it, never from defaults.

    Raises:
        CheckpointError: a size is not there, or a setting that transformers' LLaVA cannot express.
    """
    missing = [key for key in REQUIRED if raw.get(key) is None]
    if missing:
        raise CheckpointError(f"{path / 'config.json'} does not say {some(missing)}.", "Download it again.")
    projector, select = raw["mm_projector_type"], raw.get("mm_vision_select_feature") or "patch"
    for key, value, known in (
        ("mm_projector_type", projector, PROJECTORS),
        ("mm_vision_select_feature", select, STRATEGIES),
        ("image_aspect_ratio", raw.get("image_aspect_ratio") or "square", ("square", "pad")),
    ):
        if value not in known:
            raise CheckpointError(
                f"{path} has {key} {value!r}, which relook does not support.", f"Known ones: {', '.join(known)}."
            )
    scaling = raw.get("rope_scaling") or {}
    rope = {"rope_theta": float(raw.get("rope_theta", 10000.0)), "rope_type": scaling.get("type", "default")}
    rope |= {key: value for key, value in scaling.items() if key != "type"}
    text = {key: raw[key] for key in TEXT if raw.get(key) is not None}
    side = vision.image_size // vision.patch_size
    return LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text, rope_parameters=rope),
        image_token_index=image_token_id,
        image_seq_length=side * side + (STRATEGIES[select] == "full"),
        vision_feature_layer=raw["mm_vision_select_layer"],
        vision_feature_select_strategy=STRATEGIES[select],
        projector_hidden_act=PROJECTORS[projector],
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        conversation_template=default_template(raw),
        **{key: raw[key] for key in KEPT if raw.get(key) is not None},
    )


def to_llava_config(config: LlavaConfig, dtype: str, tower: str) -> dict[str, Any]:
    """A transformers config in liuhaotian's terms.

    Args:
        tower: what `mm_vision_tower` says.

    Raises:
        CheckpointError: a setting that liuhaotian's format cannot express.
    """
    if has_post_decoder(config):
        raise CheckpointError(
            "LLaVA's format has no place for a post decoder.", "Keep the model in relook's own: `relook export`."
        )
    if not isinstance(config, LlavaConfig):
        raise CheckpointError(f"A {config.model_type} model is written in transformers' format only.", "Use --to hf.")
    if not isinstance(config.vision_feature_layer, int) or config.projector_hidden_act not in PROJECTORS.values():
        raise CheckpointError(
            f"LLaVA's format cannot say vision_feature_layer {config.vision_feature_layer} with projector_hidden_act "
            f"{config.projector_hidden_act!r}.",
            f"It has one layer, and a projector of {', '.join(PROJECTORS.values())}.",
        )
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
    """A text config's rotary embeddings as transformers 4 and liuhaotian's configs call them."""
    rope = dict(text.get("rope_parameters") or {})
    scaling = {"type" if key == "rope_type" else key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": None if scaling.get("type", "default") == "default" else scaling,
    }


def llava_settings(config: Any) -> dict[str, Any]:
    """How a liuhaotian config, and the flags of its training, call settings of a transformers config."""
    strategies = {value: key for key, value in STRATEGIES.items()}
    projectors = {value: key for key, value in PROJECTORS.items()}
    return {
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": strategies.get(config.vision_feature_select_strategy),
        "mm_projector_type": projectors.get(config.projector_hidden_act),
        "mm_use_im_start_end": getattr(config, "mm_use_im_start_end", False),
        "mm_use_im_patch_token": getattr(config, "mm_use_im_patch_token", False),
    }
