"""Models on disk, of any format, in transformers' terms: config, named tensors and processor.

Nothing is held in memory: tensors are read on demand, one at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.utils import is_torchvision_available

from relook.data.templates import IM_END, IM_START, IMAGE
from relook.errors import CheckpointError, preview
from relook.files import read_json_object, require_regular_files
from relook.model.checkpoint import (
    COMPUTED,
    FROM_HF,
    FROM_LLAVA,
    PROJECTOR,
    TOWER,
    WHOLE_MODELS,
    AnyFolder,
    LazyTensor,
    Renames,
    config_template,
    from_llava_config,
    one_rope,
    parse_folder,
    read_config,
    read_tensor_folder,
    rename,
    weight_files,
)
from relook.model.config_checks import check_config, generation_config, plain_config, refuse_unsupported
from relook.model.families import embeddings_name, family_of, find_family, has_post_decoder
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
    """Return V1_CHAT for a tokenizer.

    The original tokenises the text after an image separately, so that it starts with a space piece. A tokenizer that
    adds none after a special token gets the space in the template.
    """
    after = tokenizer("<image>\n", add_special_tokens=False)["input_ids"][1:]
    alone = tokenizer("\n", add_special_tokens=False)["input_ids"]
    return V1_CHAT if after == alone else V1_CHAT.replace("<image>\n", "<image> \n")


@dataclass(frozen=True)
class LazyModel:
    """Model folder in transformers' terms, with its tensors still on disk.

    Args:
        path: the folder.
        kind: "llava" (liuhaotian's format), "hf" (transformers') or "relook".
        config: the family's config in transformers, or relook's where there is a post decoder.
        tensors: under the names of transformers' module tree, whatever they are called on disk.
        template: name of the conversation template.
        aspect_ratio: "pad" or "square" where a run was trained so; empty: as the folder says.
        tower: the folder of the vision tower, for "llava".
        adapter: path of the adapter that is applied to the model.
        beneath: the model without that adapter, and the `Adapter`.
        tower_note: assumptions about a missing vision tower, where only the config is opened.
    """

    path: Path
    kind: str
    config: Any
    tensors: Mapping[str, LazyTensor]
    template: str
    aspect_ratio: str = ""
    tower: Path | None = None
    adapter: Path | None = None
    beneath: tuple[LazyModel, Any] | None = None
    tower_note: str = ""

    @property
    def model_class(self) -> type[PreTrainedModel]:
        family = family_of(self.config)
        model_class: type[PreTrainedModel] = family.relook_model if has_post_decoder(self.config) else family.model
        return model_class

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that the language model is stored in."""
        return self.tensors[embeddings_name(self.tensors)].read().dtype

    @property
    def label(self) -> str:
        """Return the model's name in error messages, with its adapter's."""
        return str(self.path) if self.adapter is None else f"{self.path} with {self.adapter}"

    def read(self, *parts: str) -> dict[str, Tensor]:
        """Read the tensors whose names begin with one of `parts`, or all.

        Raises:
            CheckpointError: tensors with NaN or inf, by name.
        """
        tensors = {name: tensor.read() for name, tensor in self.tensors.items() if name.startswith(parts or "")}
        broken = [name for name, tensor in tensors.items() if not _finite(tensor)]
        if broken:
            raise CheckpointError(
                f"{len(broken)} tensors of {self.label} hold NaN or infinity: {preview(broken)}.",
                "Its training diverged, or the files are broken: take an earlier checkpoint, or download them again.",
            )
        return tensors

    def check(self) -> None:
        """Raise a CheckpointError that lists missing and unused tensors, and those whose shape is not the config's."""
        # transformers' own model says which tensors there must be; on the meta device it has shapes but no memory.
        expected = _build_checked(self.label, _shapes_of, self.model_class, self.config)
        # A tied lm_head is not on disk; transformers takes the embeddings.
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        missing = sorted(expected.keys() - self.tensors.keys() - tied)
        unused = sorted(self.tensors.keys() - expected.keys())
        wrong = [
            f"{name} {list(tensor.shape)} instead of {list(expected[name])}"
            for name, tensor in self.tensors.items()
            if name in expected and expected[name] != tensor.shape
        ]
        # A wrong layer number would show only in the first forward pass.
        layers = getattr(self.config, "vision_feature_layer", [])
        depth = getattr(self.config.vision_config, "num_hidden_layers", 0)
        if any(not 1 <= abs(layer) <= depth for layer in (layers if isinstance(layers, list) else [layers])):
            raise CheckpointError(
                f"{self.label} takes its image features from layer {layers} of a vision tower that has {depth}.",
                "Check that the config and the tower belong together.",
            )
        problems = (("missing", missing), ("unused", unused), ("of another shape", wrong))
        listed = "; ".join(f"{len(names)} {problem}: {preview(names)}" for problem, names in problems if names)
        if listed:
            raise CheckpointError(
                f"The tensors of {self.label} do not fit its config ({listed}).", self._advice(missing)
            )

    def _advice(self, missing: list[str]) -> str:
        if missing and all(name.startswith(TOWER) for name in missing):
            return "Pass the vision tower's folder as vision_tower (--vision-tower)."
        if missing and all(name.startswith(PROJECTOR) for name in missing):
            return "Pass the projector's file (mm_projector.bin) as adapter."
        return "Check that all files are of one model, or download it again."

    def processor(self) -> Any:
        """Build one transformers processor from the tokenizer and the image processor."""
        try:
            # Folders of transformers' format hold a whole processor; liuhaotian's get theirs from two folders.
            if self.tower is None:
                processor = load_processor(self.path)
                # Without a known processor class, transformers falls back to the tokenizer alone.
                if not (hasattr(processor, "image_processor") and hasattr(processor, "tokenizer")):
                    raise ValueError(f"it is a {type(processor).__name__}, without pictures or without text")
                if self.aspect_ratio and family_of(self.config).pads_to_square:
                    processor.image_processor.do_pad = self.aspect_ratio == "pad"
                return processor
            images = LlavaImageProcessorPil.from_pretrained(self.tower, local_files_only=True)
        except Exception as error:  # tokenizers raises bare Exception, and transformers any kind
            lacks_package = isinstance(error, ImportError) or "Missing optional dependencies" in str(error)
            fix = "Install what is missing." if lacks_package else "Copy it again."
            raise CheckpointError(f"The processor of {self.path} cannot be loaded: {error}.", fix) from None
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
        text = self.config.text_config
        # liuhaotian's generation_config.json is about the language model that LLaVA was trained on.
        if self.kind != "llava" and (self.path / "generation_config.json").exists():
            return generation_config(self.path, text.vocab_size)
        return GenerationConfig(
            bos_token_id=text.bos_token_id, eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id
        )


def load_processor(folder: Path) -> Any:
    """Load the processor of a folder in transformers' format.

    Its part for videos is left out without torchvision, or where the folder has no settings of it.
    """
    names = ("processor_config", "preprocessor_config", "tokenizer_config")
    stated = (read_json_object(folder / f"{name}.json", optional=True).get("processor_class") for name in names)
    processor_class = getattr(transformers, str(next(filter(None, stated), "")), AutoProcessor)
    has_videos = (folder / "video_preprocessor_config.json").exists() or "video_processor" in read_json_object(
        folder / "processor_config.json", optional=True
    )
    takes_videos = "video_processor" in getattr(processor_class, "get_attributes", list)()
    if not takes_videos or (has_videos and is_torchvision_available()):
        return AutoProcessor.from_pretrained(folder, local_files_only=True)
    places = processor_class.get_attributes()
    parts = [part for part in places if part != "video_processor"]

    def build(cls: Any, arguments: Any, settings: Any, **kwargs: Any) -> Any:
        arguments = list(arguments)
        arguments.insert(places.index("video_processor"), None)  # some classes insist on all parts
        return super(without_videos, cls).from_args_and_dict(arguments, settings, **kwargs)

    # Under the same name, which is saved with the processor.
    attributes: dict[str, Any] = {"get_attributes": lambda _: parts, "from_args_and_dict": build}
    attributes = {name: classmethod(method) for name, method in attributes.items()}
    attributes["video_processor"] = SimpleNamespace(num_frames=0, fps=0)  # SmolVLM's chat template reads these
    without_videos: Any = type(processor_class.__name__, (processor_class,), attributes)
    return without_videos.from_pretrained(folder, local_files_only=True)


def _shapes_of(model_class: type[PreTrainedModel], config: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter that a model of this config has.

    Without weights a model still takes long to build, and one process often opens models of one config: a base and
    its runs, or a source and its conversion. So the last ones are remembered.
    """
    key = (model_class, json.dumps(config.to_dict(), sort_keys=True, default=str))
    if key not in _known_shapes:
        while len(_known_shapes) >= 16:
            del _known_shapes[next(iter(_known_shapes))]
        with torch.device("meta"):
            model = model_class(config)
        _known_shapes[key] = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    return _known_shapes[key]


_known_shapes: dict[tuple[type[PreTrainedModel], str], dict[str, tuple[int, ...]]] = {}


def _finite(tensor: Tensor) -> bool:
    """Return True if a tensor has no NaN or inf.

    Both show in the minimum and maximum, which takes no copy and runs at memory bandwidth.
    """
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def open_folder(
    path: AnyFolder,
    vision_tower: str | Path | None = None,
    weights: bool = True,
    llava_config: dict[str, Any] | None = None,
    tower_by_name: bool = False,
) -> LazyModel:
    """Open a model folder of any format.

    Args:
        path: the model folder.
        vision_tower: folder of the vision tower, instead of the one that a liuhaotian `mm_vision_tower` names.
        weights: False opens the config alone; weights and tokenizer may then be absent.
        llava_config: a liuhaotian config that turns a bare language model, such as Vicuna, into LLaVA.
        tower_by_name: True infers the config of a missing CLIP tower from its name; only the config is then opened.

    Raises:
        CheckpointError: it is not a model folder, its files are broken, or its tower cannot be found.
    """
    folder = parse_folder(path)
    path, kind, raw = folder.path, folder.kind, folder.config
    if kind not in WHOLE_MODELS:
        raise CheckpointError(
            f"{path} holds a change to a model, not a model.", "Pass its base as path, and this as adapter."
        )
    # Packed weights can neither be checked by shape nor take LoRA.
    if raw.get("quantization_config"):
        raise CheckpointError(
            f"The weights in {path} are quantised already.",
            "Give the model as it was before: --bits quantises while it is loaded.",
        )
    if kind == "llama":
        if llava_config is None:
            raise CheckpointError(
                f"{path} is a language model alone, without a vision tower.",
                "Pass what LLaVA trained on it as adapter: a folder with its config.json, projector and, if any, LoRA.",
            )
        kind, raw = "llava", llava_config  # the adapter's config replaces that of the language model
    if kind == "llava":
        return _open_llava(path, raw, vision_tower, weights, tower_by_name)
    if vision_tower is not None:
        raise CheckpointError(f"{path} has a vision tower of its own.", "Leave vision_tower out.")
    family = find_family(raw["model_type"])
    config_class = family.relook_config if kind == "relook" else family.config
    tensors = {n: t for n, t in read_tensor_folder(path).items() if not COMPUTED.search(n)} if weights else {}
    # A copy: the folder's parsed config is shared and stays as it is on disk.
    # Older folders have the language model's settings at the top.
    text_config = {"text_config": _build_checked(path, one_rope, raw["text_config"])} if "text_config" in raw else {}
    raw = raw | text_config if text_config else _build_checked(path, one_rope, raw)
    config = _build_checked(path, config_class.from_dict, plain_config(raw))
    for check in (refuse_unsupported, check_config):
        _build_checked(path, check, str(path), config)
    model = LazyModel(path, kind, config, tensors, _build_checked(path, config_template, raw))
    return replace(model, tensors=_published_names(model)) if weights else model


def _published_names(model: LazyModel) -> dict[str, LazyTensor]:
    """Return the tensors of a folder under the names of transformers' module tree, from those that it reads.

    Raises:
        CheckpointError: a family whose tensors transformers also cuts or merges.
    """
    expected = _build_checked(model.path, _shapes_of, model.model_class, model.config)
    names = {name: rename(name, FROM_HF) for name in model.tensors}
    if strange := [name for name, renamed in names.items() if renamed not in expected]:
        with torch.device("meta"):
            conversions = get_model_conversion_mapping(model.model_class(model.config))
        renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
        others = [conversion for conversion in conversions if not isinstance(conversion, WeightRenaming)]
        for name in strange:
            renamed, converted = rename_source_key(name, renamings, others)
            if converted is not None:
                raise CheckpointError(
                    f"{model.path} has {name}, which transformers does not load as it is.",
                    "Let it write its own tensors: AutoModelForImageTextToText.from_pretrained(FOLDER)."
                    "save_pretrained(NEW_FOLDER, save_original_format=False), and copy the processor's files.",
                )
            names[name] = renamed if renamed in expected else names[name]
    return {names[name]: tensor for name, tensor in model.tensors.items()}


def _build_checked(path: Path | str, make: Callable[..., Any], *arguments: Any) -> Any:
    """Build a config or model in transformers, and turn its complaints about wrong values into a CheckpointError."""
    try:
        return make(*arguments)
    except CheckpointError:
        raise
    except ImportError as error:  # such as timm, for the towers of some families
        needs = " ".join(str(error).split())
        raise CheckpointError(f"{path} cannot be loaded here: {needs[:200]}", "Install what it names.") from None
    except Exception as error:  # a library may raise anything on values it was never meant to get
        reason = f"unknown value {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise CheckpointError(f"The config of {path} is not valid: {reason}.", "Download it again.") from None


def _renamed(tensors: Mapping[str, LazyTensor], renames: Renames) -> dict[str, LazyTensor]:
    return {rename(name, renames): tensor for name, tensor in tensors.items() if not COMPUTED.search(name)}


def _open_llava(
    path: Path, raw: dict[str, Any], vision_tower: str | Path | None, weights: bool, tower_by_name: bool
) -> LazyModel:
    """Open a liuhaotian folder and its vision tower.

    The tower's weights come from the model's files only if `unfreeze_mm_vision_tower` says that they were trained, or
    the tower's folder has none. Otherwise they come from the tower's folder, as in the original program.
    """
    name = raw.get("mm_vision_tower") or raw.get("vision_tower")
    try:
        tower = _tower_folder(path, name, vision_tower)
    except CheckpointError:
        inferred = named_tower(str(name), raw.get("mm_hidden_size")) if tower_by_name and not vision_tower else None
        if inferred is None:
            raise
        config = _build_checked(path, from_llava_config, path, raw, inferred[0])
        return LazyModel(path, "llava", config, {}, config_template(raw), tower_note=inferred[1])
    settings = read_config(tower)
    if settings.get("model_type") not in ("clip", "clip_vision_model"):
        message = f"{tower} is a {settings.get('model_type')!r}, not a CLIP vision tower."
        raise CheckpointError(message, "Give the tower's own folder.")
    vision: CLIPVisionConfig = _build_checked(
        tower, CLIPVisionConfig.from_dict, plain_config(settings.get("vision_config", settings))
    )
    # The tower's config decides the number of image positions, the model's all else.
    config = _build_checked(path, from_llava_config, path, raw, vision)
    check_config(str(path), config)
    if not weights:
        return LazyModel(path, "llava", config, {}, config_template(raw), tower=tower)
    tensors = _renamed(read_tensor_folder(path), FROM_LLAVA)
    # 1. The tower: from its own folder, unless it was trained with the model.
    trained = raw.get("unfreeze_mm_vision_tower") and any(name.startswith(TOWER) for name in tensors)
    if weight_files(tower) and not trained:
        of_tower = {name: t for name, t in read_tensor_folder(tower).items() if not COMPUTED.search(name)}
        # A whole CLIP model has a text side, too; then the vision side is what begins with "vision_model.".
        prefix = "vision_model." if any(name.startswith("vision_model.") for name in of_tower) else ""
        tensors = {name: t for name, t in tensors.items() if not name.startswith(TOWER)}
        tensors |= {TOWER + n.removeprefix(prefix): t for n, t in of_tower.items() if n.startswith(prefix)}
    # 2. The image placeholder: an id within the embeddings, which only the tokenizer knows.
    rows = config.text_config.vocab_size
    tokenizer = image_tokenizer(path, rows)
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE)
    if raw.get("mm_use_im_start_end") and max(tokenizer.convert_tokens_to_ids([IM_START, IM_END])) >= rows:
        raise CheckpointError(
            f"{path} has mm_use_im_start_end, but its {rows} embeddings have no rows for {IM_START} and {IM_END}.",
            "Set it to false in config.json, unless files of another model got mixed in.",
        )
    # 3. A linear projector: transformers always has two linears, so the second becomes the identity.
    if config.projector_hidden_act == "linear":
        size = config.text_config.hidden_size
        tensors[PROJECTOR + "linear_2.weight"] = LazyTensor((size, size), lambda: torch.eye(size))
        tensors[PROJECTOR + "linear_2.bias"] = LazyTensor((size,), lambda: torch.zeros(size))
    return LazyModel(path, "llava", config, tensors, config_template(raw), tower=tower)


def named_tower(name: str, width: Any) -> tuple[CLIPVisionConfig, str] | None:
    """Infer the config of a CLIP tower from its name; also return a note on what is assumed.

    Args:
        name: the tower's name, such as openai/clip-vit-large-patch14-336.
        width: of its hidden states, from the model's config.

    Returns:
        The config and the note; None if the name gives no patch size or the width is unknown.
    """
    match = re.search(r"patch(\d+)(?:-(\d+))?$", name)
    if match is None:
        return None
    patch, side = int(match[1]), int(match[2] or 224)  # CLIP's names leave out its usual 224 pixels
    if name in ("openai/clip-vit-large-patch14-336", "openai/clip-vit-large-patch14"):
        width, note = 1024, ""
    elif isinstance(width, int) and width > 0:
        note = f"{name} is not here: 24 layers of width {width} are assumed; --vision_tower names its folder"
    else:
        return None
    heads = max(1, width // 64)  # OpenAI's towers have heads of 64
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads}
    return CLIPVisionConfig(**sizes, num_hidden_layers=24, image_size=side, patch_size=patch), note


def _tower_folder(path: Path, configured: Any, override: str | Path | None) -> Path:
    """Return the tower's folder, as given or as the config names it; a hub name is looked up in the hub cache."""
    name = str(override) if override else configured
    if not name or not isinstance(name, str):
        raise CheckpointError(
            f"{path / 'config.json'} names no mm_vision_tower.",
            "Pass the vision tower's folder as vision_tower (--vision-tower).",
        )
    # First a folder: as given, or beside the model's config; a config's name also below the working directory, where
    # LLaVA looks. Then the hub's cache. Nothing is downloaded. An absolute name stands for itself.
    for folder in [Path(name)] if override else [path / name, Path(name)]:
        if (folder / "config.json").exists():
            require_regular_files(folder)
            return folder
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        reason = "no model folder" if override else f"not in {path}, not below the working directory"
        raise CheckpointError(
            f"The vision tower {name!r} is {reason}, nor is it in Hugging Face's cache.",
            f"Pass its folder as vision_tower (--vision-tower), or run: hf download {name}",
        ) from None


def image_tokenizer(path: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """Load a liuhaotian folder's tokenizer with an `<image>` token that transformers' classes can use.

    The original marks images with -200, outside the vocabulary. transformers embeds every id before it inserts the
    image features, so the placeholder must be a row of the embeddings. A new row would change the softmax. No text
    is ever encoded to the byte piece `<0xFF>`, since UTF-8 has no such byte. It becomes `<image>`, so ids, shapes and
    softmax stay unchanged. If a model generates this byte, which is never readable text, it decodes to nothing. A
    tokenizer that already has an `<image>` within the vocabulary keeps it.

    Args:
        path: the model folder.
        vocabulary: number of rows of the embeddings.
    """
    tokenizer: PreTrainedTokenizerFast = load_tokenizer(path)
    vocab = tokenizer.get_vocab()
    if vocab.get(IMAGE, vocabulary) < vocabulary:
        return tokenizer
    if NEVER_TEXT not in vocab:
        raise CheckpointError(
            f"The tokenizer of {path} has neither {IMAGE} nor {NEVER_TEXT}.",
            "A Llama tokenizer with bytes is expected.",
        )
    # The tokenizers library cannot rename an entry: edit the serialised tokenizer and build it again.
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"][IMAGE] = id = content["model"]["vocab"].pop(NEVER_TEXT)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": id, "content": IMAGE, **flags, "special": True})
    content["added_tokens"].sort(key=lambda token: token["id"])
    settings = {key: value for key, value in tokenizer.init_kwargs.items() if not key.endswith(("_file", "_object"))}
    settings["legacy"] = read_json_object(path / "tokenizer_config.json", optional=True).get("legacy", True)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **settings)
