"""Strict model loading from disk: a missing or unused tensor is an error, never a random weight.

The steps: folder -> `LazyModel` (any format, in transformers' terms) -> adapters applied -> checked by name and
shape -> transformers' own loader.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import inspect
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from relook.console import status
from relook.data.encode import Encoder, Placeholders
from relook.data.images import ImageLoader, ImageSource
from relook.data.templates import CHAT, EOS, Template, get_template, image_mark
from relook.distributed import full_shape, set_full
from relook.errors import CheckpointError, preview
from relook.files import file_hash
from relook.model.adapters import TENSORS_FILE, language_model_config, parse_adapter, read_adapter
from relook.model.checkpoint import ADAPTER_FILE, TRAINED_WITH, AnyFolder, ModelFolder, parse_folder
from relook.model.config_checks import check_processor
from relook.model.families import (
    CONNECTORS,
    TOWERS,
    connector,
    embeddings_name,
    family_of,
    is_tested,
    with_post_decoder,
)
from relook.model.lazy_model import LazyModel, open_folder
from relook.model.tokenizer import UNFINISHED, decode_bytes
from relook.model.tower_attention import batch_segments

# ----------------------------------------------------------------------------------------------------
# The layers above the trunk by themselves: post decoder and lm_head. Runs on cached hidden states need nothing else.

ABOVE = ("model.post_decoder.", "lm_head.")
PROJECTOR = tuple(f"model.{path}." for path in CONNECTORS)  # small, and a post decoder may start from it


class HeadModel(nn.Module):
    """Post decoder, if any, and lm_head of a model, shared with it and under the same parameter names."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        self.model = nn.Module()
        if hasattr(model.model, "post_decoder"):
            self.model.post_decoder = model.model.post_decoder
        self.lm_head = model.lm_head

    @property
    def device(self) -> torch.device:
        device: torch.device = self.lm_head.weight.device
        return device


def load_head_only(source: LazyModel, dtype: torch.dtype, device: str | torch.device) -> Any:
    """Load a model's projector and the layers above its trunk; the trunk stays on the meta device, without weights."""
    # The whole module tree, without memory; `assign` below then replaces the meta tensors of the parts that are read.
    with torch.device("meta"):
        model: Any = source.model_class(copy.deepcopy(source.config)).to(dtype)
    tensors = source.read(*ABOVE, *PROJECTOR)
    if "lm_head.weight" not in tensors:  # lm_head is tied to the embeddings, which are not loaded
        embeddings = embeddings_name(source.tensors)
        tensors["lm_head.weight"] = source.read(embeddings)[embeddings]
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    read = {name: t.to(device, dtype) for name, t in tensors.items()}
    model.load_state_dict(read, strict=False, assign=True)
    lacking = [n for n, p in model.named_parameters() if p.is_meta and n.startswith((*ABOVE, *PROJECTOR))]
    if lacking:
        raise CheckpointError(f"{source.path} has no {lacking[0]}.", "Check that the folder is complete.")
    return model


# ----------------------------------------------------------------------------------------------------

__all__ = [
    "ADAPTER_FILE",
    "TENSORS_FILE",
    "LoadedModel",
    "add_post_decoder",
    "load_model",
    "load_tensors",
    "model_hash",
]

# Modules that stay in full precision when the language model's linears are quantised, as in the original.
NOT_QUANTISED = [*(f"model.{part}" for part in (*TOWERS, *CONNECTORS)), "model.post_decoder", "lm_head"]


@cache  # once for each model
def note_own_template(name: str, model: str) -> None:
    status(f"  template {name} is LLaVA's: {model} is asked by its own chat template", style="yellow")


SIZES = [(60, 90), (700, 500)]  # of images on which a processor is tried: it may cut a large one into tiles


class _Listener:
    """Tokenizer that remembers the text it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.text = tokenizer, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, text: Any, **kwargs: Any) -> Any:
        (self.text,) = [text] if isinstance(text, str) else text
        return self.tokenizer(text, **kwargs)


@dataclass
class PlaceholderCounter:
    """How a processor shows an image of a height and width in a prompt; sizes are remembered.

    Args:
        token: the placeholder of one position.
    """

    processor: Any
    token: str
    shown: dict[tuple[int, int], tuple[int | str, ...]] = field(default_factory=dict)

    def __call__(self, size: tuple[int, int]) -> int:
        """Return the number of placeholders."""
        return sum(part for part in self.placeholders(size) if isinstance(part, int))

    def placeholders(self, size: tuple[int, int]) -> tuple[int | str, ...]:
        """Return numbers of placeholders, with the texts before, between and behind them."""
        if size not in self.shown:
            self.shown[size] = self._written(size) if self._uniform is None else self._counted(size, *self._uniform)
        return self.shown[size]

    @cached_property
    def _uniform(self) -> tuple[str, int, str] | None:
        """Return what is the same of any image: the texts around, and how many positions too many are counted.

        None where the processor cannot count without a picture, or writes texts in between.
        """
        if not hasattr(self.processor, "_get_num_multimodal_tokens"):
            return None
        written = [self._written(size) for size in SIZES]
        try:
            counts = self.processor._get_num_multimodal_tokens(image_sizes=SIZES)["num_image_tokens"]
        except Exception:  # of the processor's own, as in Aria's; it writes all the same
            return None
        same: set[Any] = {
            (w[0], count - w[1], w[2]) if len(w) == 3 else None for w, count in zip(written, counts, strict=True)
        }
        return same.pop() if len(same) == 1 else None

    def _counted(self, size: tuple[int, int], before: str, surplus: int, behind: str) -> tuple[int | str, ...]:
        (count,) = self.processor._get_num_multimodal_tokens(image_sizes=[size])["num_image_tokens"]
        return before, int(count) - surplus, behind

    def _written(self, size: tuple[int, int]) -> tuple[int | str, ...]:
        processor = copy.copy(self.processor)
        processor.tokenizer = listener = _Listener(processor.tokenizer)
        processor(images=[Image.new("RGB", size[::-1])], text=[image_mark(processor)], return_tensors="pt")
        # "<row_1><image><image><row_2><image>" -> "<row_1>", 2, "<row_2>", 1
        runs = re.split(f"((?:{re.escape(self.token)})+)", listener.text)
        return tuple(len(run) // len(self.token) if i % 2 else run for i, run in enumerate(runs))


def count_positions(model: Any, processor: Callable[[], Any]) -> int | Callable[[tuple[int, int]], int]:
    """Return the number of positions that an image takes, or a function of its height and width.

    Args:
        processor: loads the model's processor, which counts where the model's config does not.
    """
    if (count := family_of(model.config).positions) is not None:
        return count(model)
    loaded = processor()
    return PlaceholderCounter(loaded, loaded.tokenizer.convert_ids_to_tokens(model.config.image_token_id))


@dataclass
class LoadedModel:
    """Model in memory, with its processor, image loader and conversation template.

    Args:
        model: a transformers model, possibly wrapped by peft.
        processor: its transformers processor.
        path: the folder it was loaded from.
        aspect_ratio: "pad" pads images to a square first; anything else leaves them to the image processor.
        template: the conversation template it was tuned with, used where none is named.
    """

    model: Any
    processor: Any
    path: Path
    aspect_ratio: str = ""
    template: str = "llava_hf"
    images: ImageLoader = field(init=False)
    runner: Any = field(default=None, init=False, repr=False, compare=False)  # what `generate.ModelRunner.of` keeps

    def __post_init__(self) -> None:
        # A copy: the processor itself stays as the folder has it, and is saved so.
        image_processor = copy.copy(self.processor.image_processor)
        if family_of(self.core.config).pads_to_square and getattr(image_processor, "do_pad", False):
            # relook pads itself, so that a recipe can say otherwise.
            image_processor.do_pad, self.aspect_ratio = False, "pad"
        positions = count_positions(self.core, lambda: self.processor)
        self.images = ImageLoader(image_processor, self.aspect_ratio, positions)
        # A processor may return more than the model takes, such as numbers of tiles.
        self.images.input_names = inspect.signature(self.core.forward).parameters.keys()
        batch_segments(self.core.model)

    @property
    def core(self) -> Any:
        """Return the transformers model itself, without any peft wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def image_positions(self) -> int | Callable[[ImageSource], Placeholders]:
        """Return the number of positions one image takes, or a function of the image where its size decides."""
        positions = self.images.positions
        if isinstance(positions, PlaceholderCounter):
            return lambda image: positions.placeholders(self.images.size(image))
        return positions if isinstance(positions, int) else lambda image: positions(self.images.size(image))

    def conversation_template(self, name: str = "") -> Template:
        """Return the conversation template of that name, or the model's own.

        LLaVA's templates end an answer with </s>, and recipes for LLaVA name them. A model that brings a chat template
        and has no such token keeps its own.
        """
        template = get_template(name or self.template, self.processor)
        if self.template == CHAT and EOS in template.end and self.processor.tokenizer.eos_token != EOS:
            note_own_template(name, str(self.path))
            return get_template(CHAT, self.processor)
        return template

    @property
    def pad_id(self) -> int:
        """Return the id of the padding token, or of the end-of-text token if there is none."""
        tokenizer = self.processor.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

    @property
    def image_token(self) -> str:
        """Return the token that stands for an image in the processor's texts."""
        return image_mark(self.processor)

    def plain_encoder(self) -> Encoder:
        """Build an encoder of text without a template around it."""
        return self.encoder(Template("", "", "", "", "", ""))

    def encoder(self, template: str | Template = "", max_length: int = 0) -> Encoder:
        """Build an encoder of prompts and samples; `max_length` 0 means the language model's maximum."""
        return Encoder(
            self.processor.tokenizer,
            self.conversation_template(template) if isinstance(template, str) else template,
            self.core.config.image_token_id,
            self.image_positions,
            max_length or self.core.config.text_config.max_position_embeddings,
            getattr(self.core.config, "mm_use_im_start_end", False),
            self.core.get_input_embeddings().num_embeddings,
        )

    def encode(self, images: Sequence[ImageSource] = (), text: str = "", template: str = "") -> dict[str, Tensor]:
        """Encode one open prompt as inputs of `generate` or of the model.

        They are input_ids, attention_mask, the image processor's outputs (pixel_values, and image_sizes or
        image_grid_thw if the model takes them), and mm_token_type_ids where its positions depend on them.
        """
        ids = torch.tensor([self.encoder(template).prompt(text, images)])  # (1, S), no padding
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            inputs |= self.images.batch(images)
        inputs |= self.token_types(ids)
        device, dtype = self.core.device, self.core.dtype
        return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}

    def token_types(self, ids: Tensor) -> dict[str, Tensor]:
        """Return the model input that tells image positions from text, under the name that the model has for it."""
        names = inspect.signature(self.core.forward).parameters.keys() & {"mm_token_type_ids", "token_type_ids"}
        return {name: (ids == self.core.config.image_token_id).long() for name in names}

    @torch.inference_mode()
    def generate(self, images: Sequence[ImageSource] = (), text: str = "", template: str = "", **kwargs: Any) -> str:
        """Generate the answer to one prompt; keyword arguments go to transformers' `generate`."""
        inputs = self.encode(images, text, template)
        kwargs = {"do_sample": False, "max_new_tokens": 256, **self.stop_arguments(template), **kwargs}
        output = self.model.generate(**inputs, **kwargs)
        # (1, S + new tokens): the prompt comes first.
        return self.decode(output[0, inputs["input_ids"].shape[1] :], template)

    def stop_arguments(self, template: str = "") -> dict[str, Any]:
        """Return the keyword arguments that make `generate` stop at the template's stop string.

        There are none if the tokenizer cannot produce the stop string, since no answer can then contain it. The
        end-of-text token always stops generation.
        """
        stop, tokenizer = self.conversation_template(template).stop, self.processor.tokenizer
        if not stop or stop not in tokenizer.decode(tokenizer.encode(stop, add_special_tokens=False)):
            return {}
        return {"stop_strings": [stop], "tokenizer": tokenizer}

    def decode(self, ids: Tensor | Sequence[int], template: str = "") -> str:
        """Decode generated token ids to an answer, without its stop string."""
        tokenizer = self.processor.tokenizer
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        # A byte that is part of no character: fast tokenizers would replace whole characters beside it.
        if UNFINISHED in text:
            text = decode_bytes(tokenizer, torch.as_tensor(ids).tolist())
        stop = self.conversation_template(template).stop
        return (text.partition(stop)[0] if stop else text).strip()  # a token may reach beyond the stop


def load_model(
    path: AnyFolder,
    adapter: AnyFolder | None = None,
    vision_tower: str | Path | None = None,
    dtype: str | torch.dtype = "float32",
    bits: int = 16,
    device: str | torch.device = "cpu",
    double_quant: bool = True,
    quant_type: str = "nf4",
    trunk: bool = True,
) -> LoadedModel:
    """Load a model of any format, with what was trained on it.

    Args:
        path: a model folder (liuhaotian's format, llava-hf's or relook's), or a training run of relook, which names its
            base. The kind is detected from its files.
        adapter: an adapter to apply to the model: a training run, a LoRA folder of the original program, or bare
            trained tensors (`non_lora_trainables.bin`, `mm_projector.bin`, or the folder of one).
        vision_tower: folder of the CLIP tower of a liuhaotian model, instead of the one that its config names.
        dtype: of the model in memory; LoRA is merged in float32 and rounded to it once.
        bits: 8 or 4 quantise the language model's linears by bitsandbytes, after merging; 16 does not. Everything else
            stays in `dtype`.
        device: where the model goes.
        double_quant: for 4 bits, quantises the scales too.
        quant_type: for 4 bits, "nf4" or "fp4".
        trunk: False leaves the trunk's weights on disk, for work on its cached hidden states (`HeadModel`).

    Raises:
        CheckpointError: tensors are missing, unused, broken or do not fit, by name, with advice on what to pass.
    """
    weights_dtype = parse_dtype(dtype)
    # Names and shapes are checked here; a faulty model costs no time for its weights.
    source, target = open_lazy(path, adapter, vision_tower, weights_dtype), parse_device(str(device))
    if not trunk:
        return wrap(load_head_only(source, weights_dtype, target), source)
    quantisation = _quantisation(bits, weights_dtype, target, double_quant, quant_type)
    return materialize(source, weights_dtype, target, quantisation)


@dataclass(frozen=True)
class LoadOptions:
    """Options with which a command loads a model, as in `load_model`. An empty device means a GPU if there is one."""

    adapter: Path | None = None
    vision_tower: Path | None = None
    dtype: str = "float32"
    bits: int = 16
    device: str = ""

    def open(self, path: AnyFolder) -> ModelFolder:
        """Check that torch has the device, and parse the model's folder."""
        parse_device(self.device)
        return parse_folder(path)

    def identity(self, path: AnyFolder) -> dict[str, Any]:
        """Return everything that answers depend on: the model's path, hashes and load options, not the device."""
        options = {key: value and str(value) for key, value in asdict(self).items() if key != "device"}
        model = parse_folder(path)
        parts = {
            "model": model,
            "adapter": self.adapter,
            "vision_tower": tower_of(model, self.vision_tower, self.adapter),
        }
        hashes = {f"{name}_hash": model_hash(part) for name, part in parts.items() if part is not None}
        return {**options, "model": str(model.path.resolve()), **hashes}

    def template_of(self, path: AnyFolder) -> str:
        """Return the conversation template that the adapter was trained with, else the model's."""
        adapted = {} if self.adapter is None else parse_folder(self.adapter).change
        return str(adapted.get(TRAINED_WITH[0]) or parse_folder(path).template)

    def load(self, path: AnyFolder) -> LoadedModel:
        return load_model(path, self.adapter, self.vision_tower, self.dtype, self.bits, self.device)


def open_lazy(
    path: AnyFolder,
    adapter: AnyFolder | None = None,
    vision_tower: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> LazyModel:
    """Open a model on disk with an adapter applied; only names and shapes are read yet.

    Args:
        path, adapter, vision_tower: as for `load_model`.
        dtype: of the weights that LoRA is merged into; None keeps the stored dtype.
    """
    # A faulty adapter is reported before anything about its base.
    base, change = base_and_adapter(path, adapter)
    trained = None if change is None else read_adapter(change)
    source = open_base(base, change, vision_tower)
    if trained is not None:
        trained.note_projector()
        source = trained.apply_to(source, dtype)
    source.check()
    return source


def base_and_adapter(path: AnyFolder, adapter: AnyFolder | None = None) -> tuple[ModelFolder, ModelFolder | None]:
    """Return a model's base and the adapter on it, if any; a run is an adapter on the base that it names.

    Args: as of `load_model`.
    """
    model = parse_folder(path)
    if adapter is not None and model.kind == "run":
        raise CheckpointError(f"{model.path} is itself a training run.", "Give its base as the model.")
    if adapter is None and model.kind == "lora":
        raise CheckpointError(f"{model.path} is an adapter.", "Pass its base as path, and this folder as adapter.")
    if model.kind == "run":
        return model.base, model
    return model, None if adapter is None else parse_adapter(adapter)


def tower_of(path: AnyFolder, vision_tower: str | Path | None = None, adapter: AnyFolder | None = None) -> Path | None:
    """Find the vision tower folder of a model, or of a run's base; None where the model contains its own tower.

    Args: as of `load_model`.

    Raises:
        CheckpointError: there is no such model, or its tower cannot be found.
    """
    return open_base(*base_and_adapter(path, adapter), vision_tower, weights=False).tower


def open_base(
    base: ModelFolder, adapter: ModelFolder | None, vision_tower: str | Path | None = None, weights: bool = True
) -> LazyModel:
    """Open the base model of an adapter; a bare language model becomes LLaVA as the adapter's config says."""
    if adapter is None:
        return open_folder(base, vision_tower, weights)
    llava_config = language_model_config(adapter) if base.kind == "llama" else None
    return open_folder(base, vision_tower or adapter.tower_for(base), weights, llava_config)


def materialize(
    source: LazyModel,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    quantisation: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Load the model into memory. Files are memory-mapped, so it takes one copy in `dtype` at most.

    Args:
        source: the model on disk.
        dtype: of the model in memory.
        device: where it goes.
        quantisation: keyword arguments for transformers' loader.
    """
    model, report = source.model_class.from_pretrained(
        None,
        config=source.config,
        state_dict=source.read(),
        dtype=dtype,
        attn_implementation="sdpa",
        output_loading_info=True,
        **(quantisation or {}),
    )
    # `LazyModel.check` has compared all names and shapes, so this is a safeguard against transformers' own renames.
    mismatched = sorted(map(str, {*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]}))
    if mismatched:
        message = f"transformers did not take all tensors of {source.path}: {preview(mismatched)}."
        raise CheckpointError(message, "Check that its config.json belongs to its weights.")
    model.generation_config = source.generation_config()
    model.name_or_path = str(source.path)  # peft queries the hub for models without a path
    if not quantisation:  # bitsandbytes has placed quantised weights already
        model.to(device)
    loaded = wrap(model, source)
    if not is_tested(source.config):
        from relook.generate.family_check import check_family  # which loads models of its own kind: not at the top

        check_family(loaded)
    return loaded


def wrap(model: Any, source: LazyModel) -> LoadedModel:
    """Combine a model in memory with its folder's processor, template and padding setting."""
    # liuhaotian's setting; transformers' folders say it as `do_pad` of their processor (see `LoadedModel`).
    aspect_ratio = getattr(source.config, "image_aspect_ratio", "") or ""
    loaded = LoadedModel(model.eval(), source.processor(), source.path, aspect_ratio, source.template)
    check_processor(str(source.path), loaded.processor, loaded.images, source.config)
    return loaded


def _quantisation(bits: int, dtype: torch.dtype, device: str, double_quant: bool, quant_type: str) -> dict[str, Any]:
    if bits == 16:
        return {}
    if bits not in (8, 4):
        raise CheckpointError(f"bits is {bits}.", "Use 16, 8 or 4.")
    if quant_type not in ("nf4", "fp4"):
        raise CheckpointError(f"quant_type is {quant_type!r}.", "Use nf4 or fp4.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CheckpointError(f"bits {bits} needs bitsandbytes.", "Run: pip install 'relook[quant]'")
    # bitsandbytes warns in every product that bfloat16 is cast.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    # The settings of 4 bits have no effect with 8.
    config = BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_type=quant_type,
        llm_int8_skip_modules=NOT_QUANTISED,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def parse_dtype(name: str | torch.dtype) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(f"{name!r} is not a dtype.", "Use float32, bfloat16 or float16.")
    return dtype


def parse_device(name: str) -> str:
    """Check that torch has the device and return its name; an empty name means a GPU if there is one."""
    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise CheckpointError(f"{name!r} is not a device.", "Use cpu, cuda or cuda:1.") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("There is no GPU that torch can use.", "Use --device cpu.")
    return name


def add_post_decoder(
    model: PreTrainedModel, settings: dict[str, Any], generator: torch.Generator | None, init: str = "random"
) -> PreTrainedModel:
    """Add an untrained post decoder to a model. The trunk's modules are moved, not copied.

    Args:
        model: the model without a post decoder.
        settings: fields of `PostDecoderSettings`.
        generator: random numbers for the initial weights; None uses torch's global generator.
        init: "random", or "projector" to start the alignment from the projector's weights where the shapes agree.
    """
    new = _with_parts(model, settings)
    decoder = new.model.post_decoder.to_empty(device=model.lm_head.weight.device).to(model.dtype)
    decoder.reset_parameters(generator)
    if init == "projector" and not decoder.start_from_projector(connector(model.model)):
        raise CheckpointError(
            "The projector's shape does not fit the post decoder's alignment.",
            'Use post_decoder_init "random", or align "mlp" with align_size 0.',
        )
    return new


def without_post_decoder(model: Any) -> Any:
    """Return the same model without its post decoder, sharing all weights."""
    return _with_parts(model, None).eval()


def _with_parts(model: Any, settings: dict[str, Any] | None) -> Any:
    """Build a model with a post decoder of these settings, or without one, and hang another's parts into it."""
    config = with_post_decoder(model.config, settings)
    family = family_of(config)
    with torch.device("meta"):  # without memory
        new: Any = (family.model if settings is None else family.relook_model)(config)
    # LLaVA-NeXT's base model has a parameter of its own, image_newline.
    for name, part in (*model.model.named_children(), *model.model.named_parameters(recurse=False)):
        if name != "post_decoder":
            setattr(new.model, name, part)
    new.lm_head = model.lm_head
    new.generation_config = model.generation_config
    return new


def load_tensors(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy named tensors into a model; each must exist there with the same shape."""
    # FSDP and DeepSpeed hold a shard of each parameter: compare with its full shape, and write through them.
    parameters = dict(model.named_parameters())
    wrong = [n for n, t in tensors.items() if n not in parameters or full_shape(parameters[n]) != t.shape]
    if wrong:
        raise CheckpointError(
            f"{source}: {len(wrong)} tensors do not fit the model ({preview(wrong)}).",
            "Check that it is the right base.",
        )
    for name, tensor in tensors.items():
        set_full(parameters[name], tensor)


# Files besides the weights that an answer depends on.
HASHED = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("processor_config.json", "preprocessor_config.json", "adapter_config.json", ADAPTER_FILE),
)


def model_hash(folder: AnyFolder) -> str:
    """Hash a folder's weights and settings, and those of a run's base and previous adapters.

    Results record this hash as their model. The folder may also hold a vision tower or an adapter.
    """
    path = folder.path if isinstance(folder, ModelFolder) else Path(folder)
    if path.is_file():
        return file_hash(path)[:16]  # an adapter's tensors
    if not path.is_dir():
        raise CheckpointError(f"There is no model folder {path}.", "Check the path.")
    # Names and contents of the files, in order of names. Nothing else of the folder counts: not its path, no logs.
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in (".safetensors", ".bin") or file.name in HASHED:
            digest.update(f"{file.name}:{file_hash(file)}\n".encode())
    if (path / ADAPTER_FILE).exists():
        run = parse_folder(folder)
        for below in (run.base, *run.previous):
            digest.update(model_hash(below).encode())
    return digest.hexdigest()[:16]
