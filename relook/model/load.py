"""Models on disk to models in memory, strictly: a missing or unused tensor is an error, never a random weight."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
)

from relook.data.encode import Encoder
from relook.data.images import ImageLoader, open_image
from relook.data.prompts import get_template
from relook.errors import CheckpointError, some
from relook.files import read_json
from relook.model.modeling_relook import RelookLlavaConfig, RelookLlavaForConditionalGeneration

CHANGE_FILE = "change.json"
TENSORS_FILE = "trained.safetensors"
DEFAULT_TEMPLATE = "llava_hf"

AutoConfig.register(RelookLlavaConfig.model_type, RelookLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(RelookLlavaConfig, RelookLlavaForConditionalGeneration, exist_ok=True)


@dataclass
class LoadedModel:
    """A model with what is needed to talk to it."""

    model: Any
    processor: Any
    path: Path
    aspect_ratio: str = ""
    images: ImageLoader = field(init=False)

    def __post_init__(self) -> None:
        self.images = ImageLoader(self.processor.image_processor, self.aspect_ratio)

    @property
    def core(self) -> Any:
        """The LlavaForConditionalGeneration (or kin) itself, below any adapter."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def image_positions(self) -> int:
        """Positions that one image takes."""
        vision = self.core.config.vision_config
        whole = 0 if self.core.config.vision_feature_select_strategy == "default" else 1
        return int((vision.image_size // vision.patch_size) ** 2 + whole)

    def encoder(self, template: str = "", max_length: int = 2048) -> Encoder:
        return Encoder(
            self.processor.tokenizer,
            get_template(template or DEFAULT_TEMPLATE),
            self.core.config.image_token_id,
            self.image_positions,
            max_length,
            getattr(self.core.config, "mm_use_im_start_end", False),
        )

    def encode(
        self, images: Sequence[Path | Image.Image] = (), text: str = "", template: str = ""
    ) -> dict[str, Tensor]:
        """Inputs of `generate` or of the model for one open prompt: input_ids, attention_mask and pixel_values."""
        ids = torch.tensor([self.encoder(template).prompt(text, len(images))])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if images:
            pictures = [open_image(Path(i)) if isinstance(i, (str, Path)) else i.convert("RGB") for i in images]
            inputs["pixel_values"] = self.images.preprocess(pictures)
        device, dtype = self.core.device, self.core.dtype
        return {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}

    @torch.inference_mode()
    def generate(
        self, images: Sequence[Path | Image.Image] = (), text: str = "", template: str = "", **kwargs: Any
    ) -> str:
        """The answer to one prompt; keyword arguments go to transformers' `generate`."""
        inputs = self.encode(images, text, template)
        kwargs = {"do_sample": False, "max_new_tokens": 256, **kwargs}
        output = self.model.generate(**inputs, **kwargs)
        answer: str = self.processor.tokenizer.decode(
            output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return answer.strip()


def load_model(
    path: str | Path,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
) -> LoadedModel:
    """Load a model folder, or a relook training run on the base it names.

    Args:
        path: a transformers LLaVA folder, a folder saved by relook, or the output folder of `relook train`.
        adapter: the output folder of `relook train`, to be laid on the model in `path`.

    Raises:
        CheckpointError: what is missing, unused or does not fit, by name.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"There is no model folder {path}.", "Check the path.")
    if (path / CHANGE_FILE).exists():
        if adapter is not None:
            raise CheckpointError(f"{path} is itself a training run.", "Give its base as the model.")
        return load_model(read_json(path / CHANGE_FILE)["base"], path, dtype, device)
    loaded = _load_folder(path, _dtype(dtype))
    if adapter is not None:
        apply_change(loaded, Path(adapter))
    loaded.model.to(device).eval()
    return loaded


def _dtype(name: str | torch.dtype) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{name!r} is not a dtype.", "Use float32, bfloat16 or float16.")
    return dtype


def _load_folder(path: Path, dtype: torch.dtype) -> LoadedModel:
    if not (path / "config.json").exists():
        raise CheckpointError(f"{path} has no config.json.", "Give a model folder or the output of `relook train`.")
    kind = read_json(path / "config.json").get("model_type")
    if kind not in ("llava", RelookLlavaConfig.model_type):
        raise CheckpointError(f"{path} holds a model of type {kind!r}, which relook cannot load.")
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa", output_loading_info=True, local_files_only=True
        )
        processor = AutoProcessor.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}.", "Copy or download it again.") from None
    wrong = {name: sorted(map(str, report[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        listed = "; ".join(f"{name.replace('_', ' ')}: {some(keys)}" for name, keys in wrong.items() if keys)
        raise CheckpointError(f"The tensors of {path} do not fit its config ({listed}).", "Download it again.")
    aspect_ratio = getattr(model.config, "image_aspect_ratio", "") or ""
    return LoadedModel(model, processor, path, aspect_ratio)


def add_post_decoder(
    model: PreTrainedModel, settings: dict[str, Any], generator: torch.Generator | None, init: str = "random"
) -> RelookLlavaForConditionalGeneration:
    """Put an untrained post decoder into a LLaVA model. The trunk's modules are moved, not copied.

    Args:
        init: "random", or "projector" to start the alignment from the projector's weights where the shapes agree.
    """
    values = {k: v for k, v in model.config.to_dict().items() if k not in ("model_type", "architectures")}
    config = RelookLlavaConfig(post_decoder=settings, **values)
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        new = RelookLlavaForConditionalGeneration(config)
    for name in ("vision_tower", "multi_modal_projector", "language_model"):
        setattr(new.model, name, getattr(model.model, name))
    new.lm_head = model.lm_head
    new.generation_config = model.generation_config
    decoder = new.model.post_decoder.to_empty(device=model.device).to(model.dtype)
    decoder.reset_parameters(generator)
    if init == "projector" and not decoder.start_from_projector(model.model.multi_modal_projector):
        raise CheckpointError(
            "The projector's shape does not fit the post decoder's alignment.",
            'Use post_decoder_init "random", or align "mlp" with align_size 0.',
        )
    return new


def apply_change(loaded: LoadedModel, run: Path) -> None:
    """Lay what a training run trained on a loaded model, in place."""
    if not (run / CHANGE_FILE).exists():
        raise CheckpointError(f"{run} has no {CHANGE_FILE}.", "Give the output folder of a finished `relook train`.")
    change = read_json(run / CHANGE_FILE)
    if change["post_decoder"] is not None and not isinstance(loaded.model, RelookLlavaForConditionalGeneration):
        loaded.model = add_post_decoder(loaded.model, change["post_decoder"], None)
    if change["lora"]:
        from peft import PeftModel

        loaded.model = PeftModel.from_pretrained(loaded.model, run)
    try:
        tensors = load_file(run / TENSORS_FILE)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{run / TENSORS_FILE} cannot be read: {error}.", "Train or copy it again.") from None
    load_tensors(loaded.core, tensors, str(run))


def load_tensors(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy named tensors into a model; each must exist there with the same shape."""
    parameters = dict(model.named_parameters())
    wrong = [n for n, t in tensors.items() if n not in parameters or parameters[n].shape != t.shape]
    if wrong:
        raise CheckpointError(
            f"{source}: {len(wrong)} tensors do not fit the model ({some(wrong)}).", "Check that it is the right base."
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def model_hash(path: Path) -> str:
    """A short hash of a folder's weights and config: what a result names as its model."""
    import hashlib

    from relook.files import file_hash

    digest = hashlib.sha256()
    names = [
        p
        for p in sorted(path.iterdir())
        if p.suffix in (".safetensors", ".bin") or p.name in ("config.json", CHANGE_FILE)
    ]
    for name in names:
        digest.update(f"{name.name}:{file_hash(name)}\n".encode())
    return digest.hexdigest()[:16]
