"""A model on disk, of whatever format, in transformers' terms: its config, its tensors by name, its processor.

Nothing is held in memory: tensors are read when they are asked for, one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from tokenizers import Tokenizer
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from relook.data.templates import IM_END, IM_START, IMAGE
from relook.errors import CheckpointError, some
from relook.files import read_object
from relook.model.checkpoint import (
    COMPUTED,
    FROM_HF,
    FROM_LLAVA,
    PROJECTOR,
    TOWER,
    LazyTensor,
    Renames,
    default_template,
    from_llava_config,
    kind_of,
    read_config,
    read_folder,
    rename,
    weight_files,
)
from relook.model.families import MODEL_TYPES, has_post_decoder, trunk_of
from relook.model.tokenizer import load_tokenizer

NEVER_TEXT = "<0xFF>"
# LLaVA's v1 conversation for transformers' processors: what `relook.data.templates` calls v1.
V1_CHAT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% else %}ASSISTANT: {% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def v1_chat(tokenizer: PreTrainedTokenizerFast) -> str:
    """V1_CHAT for a tokenizer. The original tokenises what follows an image by itself, with a space piece first; a
    tokenizer that puts none after a special token is given the space."""
    after = tokenizer("<image>\n", add_special_tokens=False)["input_ids"][1:]
    alone = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return V1_CHAT if after == alone else V1_CHAT.replace("<image>\n", "<image> \n")


@dataclass(frozen=True)
class ModelSource:
    """A model folder as transformers sees it.

    Args:
        kind: "llava" (liuhaotian's format), "hf" (transformers') or "relook".
        config: transformers' config of the family, or relook's of the same with a post decoder.
        tensors: under the names of transformers' module tree, whatever they are called on disk.
        tower: the folder of the vision tower, for "llava".
        change: where a change that is laid on the model comes from.
    """

    path: Path
    kind: str
    config: Any
    tensors: Mapping[str, LazyTensor]
    template: str
    tower: Path | None = None
    change: Path | None = None

    @property
    def model_class(self) -> type[PreTrainedModel]:
        trunk = trunk_of(self.config)
        found: type[PreTrainedModel] = trunk.relook_model if has_post_decoder(self.config) else trunk.model
        return found

    @property
    def dtype(self) -> torch.dtype:
        """What the language model is stored in."""
        return self.tensors["model.language_model.embed_tokens.weight"].read().dtype

    def check(self) -> None:
        """Raise a CheckpointError that lists what is missing, unused or of another shape than the config says."""
        who = str(self.path) if self.change is None else f"{self.path} with {self.change}"
        with torch.device("meta"):
            model = _valid(who, self.model_class, self.config)
        wanted = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        missing = sorted(wanted.keys() - self.tensors.keys() - tied)
        unused = sorted(self.tensors.keys() - wanted.keys())
        wrong = [
            f"{name} {list(tensor.shape)} instead of {list(wanted[name])}"
            for name, tensor in self.tensors.items()
            if name in wanted and wanted[name] != tensor.shape
        ]
        layers = self.config.vision_feature_layer
        depth = self.config.vision_config.num_hidden_layers
        if any(not -depth - 1 <= layer <= depth for layer in (layers if isinstance(layers, list) else [layers])):
            raise CheckpointError(
                f"{who} takes its image features from layer {layers} of a vision tower that has {depth}.",
                "Check that the config and the tower belong together.",
            )
        found = (("missing", missing), ("unused", unused), ("of another shape", wrong))
        listed = "; ".join(f"{len(names)} {what}: {some(names)}" for what, names in found if names)
        if listed:
            raise CheckpointError(f"The tensors of {who} do not fit its config ({listed}).", self._advice(missing))

    def _advice(self, missing: list[str]) -> str:
        if missing and all(name.startswith(TOWER) for name in missing):
            return "Pass the vision tower's folder as vision_tower."
        if missing and all(name.startswith(PROJECTOR) for name in missing):
            return "Pass the projector's file (mm_projector.bin) as adapter."
        return "Check that all files are of one model, or download it again."

    def processor(self) -> Any:
        """The tokenizer and the image processor as one transformers processor."""
        try:
            if self.tower is None:
                return AutoProcessor.from_pretrained(self.path, local_files_only=True)
            images = LlavaImageProcessorPil.from_pretrained(self.tower, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"The processor of {self.path} cannot be loaded: {error}.", "Copy it again."
            ) from None
        tokenizer = image_tokenizer(self.path, self.config.text_config.vocab_size)
        return LlavaProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            patch_size=self.config.vision_config.patch_size,
            vision_feature_select_strategy=self.config.vision_feature_select_strategy,
            num_additional_image_tokens=1,
            chat_template=v1_chat(tokenizer) if self.template == "v1" else tokenizer.chat_template,
        )

    def generation_config(self) -> GenerationConfig:
        if self.kind != "llava" and (self.path / "generation_config.json").exists():
            return GenerationConfig.from_pretrained(self.path, local_files_only=True)
        text = self.config.text_config
        return GenerationConfig(
            bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
        )


def open_model(path: Path, vision_tower: str | Path | None = None, weights: bool = True) -> ModelSource:
    """Open a model folder of any format.

    Args:
        vision_tower: folder of the vision tower, instead of what `mm_vision_tower` in a liuhaotian config names.
        weights: False opens its config alone: there need not be weights, nor a tokenizer.

    Raises:
        CheckpointError: it is no model folder, its files are broken, or its tower is not to be found.
    """
    kind = kind_of(path)
    if kind not in ("llava", "hf", "relook"):
        raise CheckpointError(
            f"{path} holds a change to a model, not a model.", "Pass its base as path, and this as adapter."
        )
    raw = read_config(path)
    if raw.get("quantization_config"):
        raise CheckpointError(
            f"The weights in {path} are quantised already.",
            "Give the model as it was before: --bits quantises while it is loaded.",
        )
    if kind == "llava":
        return _open_llava(path, raw, vision_tower, weights)
    if vision_tower is not None:
        raise CheckpointError(f"{path} has a vision tower of its own.", "Leave vision_tower out.")
    trunk = MODEL_TYPES[raw["model_type"]]
    config_class = trunk.relook_config if kind == "relook" else trunk.config
    tensors = _renamed(read_folder(path), FROM_HF) if weights else {}
    return ModelSource(path, kind, _valid(path, config_class.from_dict, raw), tensors, default_template(raw))


def _valid(path: Path | str, make: Callable[..., Any], *arguments: Any) -> Any:
    """A config, or a model of it, made by transformers; what that says about a wrong value is passed on."""
    try:
        return make(*arguments)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"unknown value {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise CheckpointError(f"The config of {path} is not valid: {reason}.", "Download it again.") from None


def _renamed(tensors: Mapping[str, LazyTensor], renames: Renames) -> dict[str, LazyTensor]:
    return {rename(name, renames): tensor for name, tensor in tensors.items() if not COMPUTED.search(name)}


def _open_llava(path: Path, raw: dict[str, Any], vision_tower: str | Path | None, weights: bool) -> ModelSource:
    """A liuhaotian folder and its tower.

    The tower's weights are those of the model's file only where `unfreeze_mm_vision_tower` says that they were trained
    (or the tower's folder has none): otherwise the original program reads the tower's own, and so does this.
    """
    tower = _tower_folder(path, raw.get("mm_vision_tower") or raw.get("vision_tower"), vision_tower)
    settings = read_config(tower)
    if settings.get("model_type") not in ("clip", "clip_vision_model"):
        what = f"{tower} is a {settings.get('model_type')!r}, not a CLIP vision tower."
        raise CheckpointError(what, "Give the tower's own folder.")
    vision: CLIPVisionConfig = _valid(tower, CLIPVisionConfig.from_dict, settings.get("vision_config", settings))
    if not weights:  # the id of <image>, which only the tokenizer knows, shapes nothing
        config = _valid(path, from_llava_config, path, raw, vision, 0)
        return ModelSource(path, "llava", config, {}, default_template(raw), tower)
    tensors = _renamed(read_folder(path), FROM_LLAVA)
    trained = raw.get("unfreeze_mm_vision_tower") and any(name.startswith(TOWER) for name in tensors)
    if weight_files(tower) and not trained:
        of_tower = {name: t for name, t in read_folder(tower).items() if not COMPUTED.search(name)}
        prefix = "vision_model." if any(name.startswith("vision_model.") for name in of_tower) else ""
        tensors = {name: t for name, t in tensors.items() if not name.startswith(TOWER)}
        tensors |= {TOWER + n.removeprefix(prefix): t for n, t in of_tower.items() if n.startswith(prefix)}
    tokenizer = image_tokenizer(path, raw.get("vocab_size", 0))
    config = _valid(path, from_llava_config, path, raw, vision, tokenizer.convert_tokens_to_ids(IMAGE))
    rows = config.text_config.vocab_size
    if raw.get("mm_use_im_start_end") and max(tokenizer.convert_tokens_to_ids([IM_START, IM_END])) >= rows:
        raise CheckpointError(
            f"{path} has mm_use_im_start_end, but its {rows} embeddings have no rows for {IM_START} and {IM_END}.",
            "Set it to false in config.json, unless files of another model got mixed in.",
        )
    if config.projector_hidden_act == "linear":
        size = config.text_config.hidden_size
        tensors[PROJECTOR + "linear_2.weight"] = LazyTensor((size, size), lambda: torch.eye(size))
        tensors[PROJECTOR + "linear_2.bias"] = LazyTensor((size,), lambda: torch.zeros(size))
    return ModelSource(path, "llava", config, tensors, default_template(raw), tower)


def _tower_folder(path: Path, named: Any, given: str | Path | None) -> Path:
    """A tower's folder: as given, or as the model's config names it; a hub's name is looked up in its cache."""
    name = str(given) if given else named
    if not name or not isinstance(name, str):
        raise CheckpointError(
            f"{path / 'config.json'} names no mm_vision_tower.", "Pass the vision tower's folder as vision_tower."
        )
    folder = Path(name) if given else path / name  # an absolute name stands for itself
    if (folder / "config.json").exists():
        return folder
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        where = "no model folder" if given else f"not in {path}"
        raise CheckpointError(
            f"The vision tower {name!r} is {where}, nor is it in Hugging Face's cache.",
            f"Pass its folder as vision_tower, or run: hf download {name}",
        ) from None


def image_tokenizer(path: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """A liuhaotian folder's tokenizer with an `<image>` that transformers' classes can use.

    The original marks images with -200, outside the vocabulary; transformers embeds every id before it puts the image
    features in place, so the placeholder must be a row of the embeddings. A new row would change the softmax. The byte
    piece `<0xFF>` is a row that no text is ever encoded to, since UTF-8 has no such byte: it becomes `<image>`, and
    ids, shapes and softmax stay as they were. (A model that writes this byte, of which nothing readable can be made,
    has it decoded as nothing.) A tokenizer that has an `<image>` within the vocabulary keeps it.
    """
    tokenizer: PreTrainedTokenizerFast = load_tokenizer(path)
    known = tokenizer.get_vocab()
    if known.get(IMAGE, vocabulary) < vocabulary:
        return tokenizer
    if NEVER_TEXT not in known:
        raise CheckpointError(
            f"The tokenizer of {path} has neither {IMAGE} nor {NEVER_TEXT}.",
            "A Llama tokenizer with bytes is expected.",
        )
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"][IMAGE] = id = content["model"]["vocab"].pop(NEVER_TEXT)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": id, "content": IMAGE, **flags, "special": True})
    content["added_tokens"].sort(key=lambda token: token["id"])
    settings = {key: value for key, value in tokenizer.init_kwargs.items() if not key.endswith(("_file", "_object"))}
    settings["legacy"] = read_object(path / "tokenizer_config.json", optional=True).get("legacy", True)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **settings)
