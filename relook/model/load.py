"""Models on disk to models in memory, strictly: a missing or unused tensor is an error, never a random weight.

The way of a model: folder -> `ModelSource` (any format, in transformers' terms) -> changes laid on it -> checked by
name and shape -> transformers' own loader.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from relook.data.encode import Encoder
from relook.data.images import ImageLoader, Picture
from relook.data.templates import get_template
from relook.distributed import full_shape, put
from relook.errors import CheckpointError, some
from relook.files import file_hash
from relook.model import checkpoint
from relook.model.adapters import TENSORS_FILE, read_change
from relook.model.checkpoint import CHANGE_FILE
from relook.model.families import trunk_of, with_post_decoder
from relook.model.lazy_model import ModelSource, open_model

# ----------------------------------------------------------------------------------------------------
# What stands above a trunk, by itself: post decoder and lm_head. Runs on cached trunk states need nothing else.

ABOVE = ("model.post_decoder.", "lm_head.")
PROJECTOR = "model.multi_modal_projector."  # small, and a post decoder may start from it
EMBEDDINGS = "model.language_model.embed_tokens.weight"


class AboveTrunk(nn.Module):
    """Post decoder, if any, and lm_head of a model, which it shares; parameters have the names that they have there."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        self.model = nn.Module()
        if hasattr(model.model, "post_decoder"):
            self.model.post_decoder = model.model.post_decoder
        self.lm_head = model.lm_head

    @property
    def device(self) -> torch.device:
        found: torch.device = self.lm_head.weight.device
        return found


def without_trunk(source: ModelSource, dtype: torch.dtype, device: str | torch.device) -> Any:
    """A model with weights for what stands above its trunk, and for its projector; the trunk's have none ("meta")."""
    with torch.device("meta"):
        model = source.model_class._from_config(source.config, attn_implementation="sdpa", dtype=dtype)
    tensors = {name: t for name, t in source.tensors.items() if name.startswith((*ABOVE, PROJECTOR))}
    if "lm_head.weight" not in tensors:  # it is tied to the embeddings, which are not there
        tensors["lm_head.weight"] = source.tensors[EMBEDDINGS]
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    read = {name: t.read().to(device, dtype) for name, t in tensors.items()}
    model.load_state_dict(read, strict=False, assign=True)
    lacking = [n for n, p in model.named_parameters() if p.is_meta and n.startswith((*ABOVE, PROJECTOR))]
    if lacking:
        raise CheckpointError(f"{source.path} has no {lacking[0]}.", "Check that the folder is complete.")
    return model


# ----------------------------------------------------------------------------------------------------

__all__ = ["CHANGE_FILE", "TENSORS_FILE", "LoadedModel", "add_post_decoder", "load_model", "load_tensors", "model_hash"]

# What stays in full precision when the language model's linears are quantised, as in the original.
NOT_QUANTISED = ["model.vision_tower", "model.multi_modal_projector", "model.post_decoder", "lm_head"]


@dataclass
class LoadedModel:
    """A model with what is needed to talk to it.

    Args:
        model: a transformers model, possibly wrapped by peft.
        aspect_ratio: "pad" lays pictures on a square first; anything else leaves them to the image processor.
        template: the conversation template it was tuned with, taken where none is named.
    """

    model: Any
    processor: Any
    path: Path
    aspect_ratio: str = ""
    template: str = "llava_hf"
    images: ImageLoader = field(init=False)
    runner: Any = field(default=None, init=False, repr=False, compare=False)  # what `generate.ModelRunner.of` keeps

    def __post_init__(self) -> None:
        image_processor = copy.copy(self.processor.image_processor)
        if trunk_of(self.core.config).pads_to_square and getattr(image_processor, "do_pad", False):
            # relook pads itself, so that a recipe can say otherwise.
            image_processor.do_pad, self.aspect_ratio = False, "pad"
        self.images = ImageLoader(image_processor, self.aspect_ratio)

    @property
    def core(self) -> Any:
        """The transformers model itself, below any adapter."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def image_positions(self) -> int | Callable[[Picture], int]:
        """Positions that one image takes; a function of the image where its size decides."""
        found = trunk_of(self.core.config).positions(self.core)
        return found if isinstance(found, int) else lambda image: found(self.images.size(image))

    @property
    def pad_id(self) -> int:
        """The token that fills places which belong to nothing."""
        tokenizer = self.processor.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)

    def encoder(self, template: str = "", max_length: int = 0) -> Encoder:
        """An encoder of prompts and samples; `max_length` 0 is what the language model was made for."""
        return Encoder(
            self.processor.tokenizer,
            get_template(template or self.template),
            self.core.config.image_token_id,
            self.image_positions,
            max_length or self.core.config.text_config.max_position_embeddings,
            getattr(self.core.config, "mm_use_im_start_end", False),
            self.core.get_input_embeddings().num_embeddings,
        )

    def encode(self, images: Sequence[Picture] = (), text: str = "", template: str = "") -> dict[str, Tensor]:
        """Inputs of `generate` or of the model for one open prompt: input_ids, attention_mask, and what the image
        processor makes of the images (pixel_values, and image_sizes where the model asks for them)."""
        ids = torch.tensor([self.encoder(template).prompt(text, images)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            inputs |= self.images.batch(images)
        device, dtype = self.core.device, self.core.dtype
        return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}

    @torch.inference_mode()
    def generate(self, images: Sequence[Picture] = (), text: str = "", template: str = "", **kwargs: Any) -> str:
        """The answer to one prompt; keyword arguments go to transformers' `generate`."""
        inputs = self.encode(images, text, template)
        kwargs = {"do_sample": False, "max_new_tokens": 256, **self.stopping(template), **kwargs}
        output = self.model.generate(**inputs, **kwargs)
        return self.decode(output[0, inputs["input_ids"].shape[1] :], template)

    def stopping(self, template: str = "") -> dict[str, Any]:
        """What `generate` needs to end an answer where the template does, besides the end-of-text token.

        That is nothing where the tokenizer cannot write the template's stop text: no answer holds it.
        """
        stop, tokenizer = get_template(template or self.template).stop, self.processor.tokenizer
        if not stop or stop not in tokenizer.decode(tokenizer.encode(stop, add_special_tokens=False)):
            return {}
        return {"stop_strings": [stop], "tokenizer": tokenizer}

    def decode(self, ids: Tensor | Sequence[int], template: str = "") -> str:
        """Generated ids as an answer, without what ends it."""
        text: str = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        stop = get_template(template or self.template).stop
        return (text.partition(stop)[0] if stop else text).strip()  # a token may reach beyond the stop


def load_model(
    path: str | Path,
    adapter: str | Path | None = None,
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
            base. What it is, is read from its files.
        adapter: a change to be laid on the model: a training run, a LoRA folder of the original program, or bare
            trained tensors (`non_lora_trainables.bin`, `mm_projector.bin`, or the folder of one).
        vision_tower: folder of the CLIP tower of a liuhaotian model, instead of the one that its config names.
        dtype: of the model in memory; LoRA is merged in float32 and rounded to it once.
        bits: 8 or 4 quantise the language model's linears by bitsandbytes, after merging; 16 does not. Everything else
            stays in `dtype`.
        double_quant, quant_type: of 4 bits: whether the scales are quantised too; "nf4" or "fp4".
        trunk: False leaves the trunk's weights on disk, for work on its cached states (`AboveTrunk`).

    Raises:
        CheckpointError: what is missing, unused, broken or does not fit, by name, and what to pass.
    """
    kind = as_dtype(dtype)
    source, place = open_source(Path(path), adapter, vision_tower, kind), as_device(str(device))
    if not trunk:
        return talk_to(without_trunk(source, kind, place), source)
    return build(source, kind, place, _quantisation(bits, kind, place, double_quant, quant_type))


@dataclass(frozen=True)
class Loading:
    """How a command brings a model into memory; the fields are `load_model`'s. An empty device is a GPU, if any."""

    adapter: Path | None = None
    vision_tower: Path | None = None
    dtype: str = "float32"
    bits: int = 16
    device: str = ""

    def identity(self, model: Path) -> dict[str, Any]:
        """What answers depend on: the model, by path and hash, and how it is loaded; not the device."""
        how = {key: value and str(value) for key, value in asdict(self).items() if key != "device"}
        return {"model": str(model.resolve()), "model_hash": model_hash(model), **how}

    def load(self, path: Path) -> LoadedModel:
        return load_model(path, self.adapter, self.vision_tower, self.dtype, self.bits, self.device)


def open_source(
    path: Path,
    adapter: str | Path | None = None,
    vision_tower: str | Path | None = None,
    dtype: torch.dtype | None = None,
) -> ModelSource:
    """A model on disk with a change laid on it; nothing is read yet but names and shapes.

    Args:
        dtype: of the weights that LoRA is merged into; None keeps what they are stored in.
    """
    kind = checkpoint.kind_of(path)
    if kind == "run" or (kind == "lora" and adapter is None):
        if adapter is not None:
            raise CheckpointError(f"{path} is itself a training run.", "Give its base as the model.")
        change = read_change(path)
        if change.base is None:
            raise CheckpointError(f"{path} is an adapter.", "Pass its base as path, and this folder as adapter.")
        if not change.base.is_dir():
            raise CheckpointError(
                f"The base of the run {path}, {change.base}, is not there.",
                "Give the base by itself: `relook merge BASE RUN OUT`, or load_model(base, adapter=run).",
            )
        path, adapter, vision_tower = change.base, path, vision_tower or change.vision_tower
    source = open_model(path, vision_tower)
    if adapter is not None:
        source = read_change(Path(adapter)).lay_on(source, dtype)
    source.check()
    return source


def build(
    source: ModelSource,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    quantisation: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """The model in memory. Files are mapped, so what it takes is one copy in `dtype` at most.

    Args:
        quantisation: what transformers' loader is told of it.
    """
    tensors = {name: tensor.read() for name, tensor in source.tensors.items()}
    model, report = source.model_class.from_pretrained(
        None,
        config=source.config,
        state_dict=tensors,
        dtype=dtype,
        attn_implementation="sdpa",
        output_loading_info=True,
        **(quantisation or {}),
    )
    wrong = sorted(map(str, {*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]}))
    if wrong:
        what = f"transformers did not take all tensors of {source.path}: {some(wrong)}."
        raise CheckpointError(what, "Check that its config.json belongs to its weights.")
    model.generation_config = source.generation_config()
    model.name_or_path = str(source.path)  # peft asks the hub about models without a path
    if not quantisation:
        model.to(device)
    return talk_to(model, source)


def talk_to(model: Any, source: ModelSource) -> LoadedModel:
    """A model in memory, with the processor and the habits of its folder."""
    aspect_ratio = getattr(source.config, "image_aspect_ratio", "") or ""
    return LoadedModel(model.eval(), source.processor(), source.path, aspect_ratio, source.template)


def _quantisation(bits: int, dtype: torch.dtype, device: str, double_quant: bool, quant_type: str) -> dict[str, Any]:
    if bits == 16:
        return {}
    if bits not in (8, 4):
        raise CheckpointError(f"bits is {bits}.", "Use 16, 8 or 4.")
    if quant_type not in ("nf4", "fp4"):
        raise CheckpointError(f"quant_type is {quant_type!r}.", "Use nf4 or fp4.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise CheckpointError(f"bits {bits} needs bitsandbytes.", "Run: pip install 'relook[quant]'")
    config = BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_type=quant_type,
        llm_int8_skip_modules=NOT_QUANTISED,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def as_dtype(name: str | torch.dtype) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise CheckpointError(f"{name!r} is not a dtype.", "Use float32, bfloat16 or float16.")
    return dtype


def as_device(name: str) -> str:
    """A device that torch has; empty: a GPU where there is one."""
    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise CheckpointError(f"{name!r} is not a device.", "Use cpu, cuda or cuda:1.") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("There is no GPU that torch can use.", "Use --device cpu.")
    return name


def default_template(path: Path) -> str:
    """The template of the model in `path`, or of a training run's base, without loading it."""
    if checkpoint.kind_of(path) == "run":
        path = read_change(path).base or path
    return checkpoint.default_template(checkpoint.read_config(path))


def add_post_decoder(
    model: PreTrainedModel, settings: dict[str, Any], generator: torch.Generator | None, init: str = "random"
) -> PreTrainedModel:
    """Put an untrained post decoder into a model. The trunk's modules are moved, not copied.

    Args:
        init: "random", or "projector" to start the alignment from the projector's weights where the shapes agree.
    """
    config = with_post_decoder(model.config, settings)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        new: Any = trunk_of(config).relook_model(config)
    for name, part in (*model.model.named_children(), *model.model.named_parameters(recurse=False)):
        setattr(new.model, name, part)
    new.lm_head = model.lm_head
    new.generation_config = model.generation_config
    decoder = new.model.post_decoder.to_empty(device=model.lm_head.weight.device).to(model.dtype)
    decoder.reset_parameters(generator)
    if init == "projector" and not decoder.start_from_projector(model.model.multi_modal_projector):
        raise CheckpointError(
            "The projector's shape does not fit the post decoder's alignment.",
            'Use post_decoder_init "random", or align "mlp" with align_size 0.',
        )
    return new


def without_post_decoder(model: Any) -> Any:
    """The same model with its post decoder switched off, on the same weights: none is copied."""
    family = trunk_of(model.config)
    values = {
        k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures", "post_decoder")
    }
    config = family.config(**values)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        plain: Any = family.model(config)
    for name, part in (*model.model.named_children(), *model.model.named_parameters(recurse=False)):
        if name != "post_decoder":
            setattr(plain.model, name, part)
    plain.lm_head = model.lm_head
    plain.generation_config = model.generation_config
    return plain.eval()


def load_tensors(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy named tensors into a model; each must exist there with the same shape."""
    parameters = dict(model.named_parameters())
    wrong = [n for n, t in tensors.items() if n not in parameters or full_shape(parameters[n]) != t.shape]
    if wrong:
        raise CheckpointError(
            f"{source}: {len(wrong)} tensors do not fit the model ({some(wrong)}).", "Check that it is the right base."
        )
    for name, tensor in tensors.items():
        put(parameters[name], tensor)


# What an answer depends on, besides the program.
HASHED = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("processor_config.json", "preprocessor_config.json", "adapter_config.json", CHANGE_FILE),
)


def model_hash(path: Path) -> str:
    """A short hash of a folder's weights and settings, of all that it lies on too: what a result names as its model."""
    if path.is_file():
        return file_hash(path)[:16]  # of a change's tensors
    if not path.is_dir():
        raise CheckpointError(f"There is no model folder {path}.", "Check the path.")
    digest = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.suffix in (".safetensors", ".bin") or file.name in HASHED:
            digest.update(f"{file.name}:{file_hash(file)}\n".encode())
    if checkpoint.kind_of(path) == "run":
        change = read_change(path)
        for below in (change.base, *change.earlier):
            if below is not None:
                digest.update(model_hash(below).encode())
    return digest.hexdigest()[:16]
