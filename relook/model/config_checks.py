"""Checks of config.json, generation_config.json and processor files, made before anything is built from them.

transformers accepts anything: sizes that no machine can hold, internal switches, any number of beams. Values that are
used here are checked. Others are dropped from configs, and refused in generation settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import GenerationConfig, PreTrainedConfig

from relook.data.images import ImageLoader
from relook.data.templates import IMAGE
from relook.errors import CheckpointError, preview
from relook.files import read_json_object

# Largest values of a config: more than any model has, but still within what a machine can address.
SIZES = {
    "num_hidden_layers": 1 << 10,
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"), 1 << 18),
    **dict.fromkeys(("head_dim", "projection_dim"), 1 << 18),
    **dict.fromkeys(("image_size", "patch_size"), 1 << 13),
    "num_channels": 3,
    "vocab_size": 1 << 24,
    **dict.fromkeys(("max_position_embeddings", "sliding_window"), 1 << 30),
}
SIDE = 1 << 13  # of an image that a processor outputs, in pixels
BEAMS = 64


def plain_config(raw: Any) -> Any:
    """Drop transformers' internal settings from a config and its parts.

    They are the attention implementation, what is returned, and names of methods.
    """
    if not isinstance(raw, dict):
        return raw
    return {
        key: plain_config(value) if key.endswith("_config") else value
        for key, value in raw.items()
        if key == "model_type"
        or not (hasattr(PreTrainedConfig, key) or key.startswith("_") or "attn_implementation" in key)
    }


def check_config(who: str, config: Any) -> None:
    """Refuse a config with values that no model can have.

    Args:
        who: the model's name in error messages.
        config: the transformers config.

    Raises:
        CheckpointError: all wrong values, by name.
    """
    parts = {"": config, "text_config.": config.text_config, "vision_config.": config.vision_config}
    wrong = [f"{name}{key} {value!r}" for name, part in parts.items() for key, value in _wrong(part)]
    words = config.text_config.vocab_size
    if not _id(words)(config.image_token_id):
        wrong.append(f"image_token_index {config.image_token_id!r} of a vocabulary of {words!r}")
    if wrong:
        raise CheckpointError(f"The config of {who} has values that no model can have: {preview(wrong, 10)}.", AGAIN)


AGAIN = "Download it again."


def _wrong(config: Any) -> Iterator[tuple[str, Any]]:
    words = getattr(config, "vocab_size", None)
    for key, most in SIZES.items():
        value = getattr(config, key, None)
        if value is not None and not _whole(1, most)(value):
            yield key, value
    for key in ("rms_norm_eps", "layer_norm_eps"):
        value = getattr(config, key, None)
        if value is not None and not (_number(0, 1)(value) and value > 0):
            yield key, value
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, key, None)
        if words is not None and not (value is None or _ids(words)(value) or (key == "pad_token_id" and value == -1)):
            yield key, value


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _number(least: float, most: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and math.isfinite(value) and least <= value <= most


def _id(words: Any) -> Callable[[Any], bool]:
    return _whole(0, words - 1 if type(words) is int else 0)


def _ids(words: Any) -> Callable[[Any], bool]:
    """Build a check that accepts a token id or a list of them, of a vocabulary of `words` tokens."""
    return lambda value: all(map(_id(words), value if isinstance(value, list) else [value]))


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def generation_config(folder: Path, words: int) -> GenerationConfig:
    """Read and check a folder's generation settings.

    Args:
        folder: the model folder.
        words: size of the vocabulary.

    Raises:
        CheckpointError: settings that relook does not follow, or values out of range, by name.
    """
    file = folder / "generation_config.json"
    settings = {key: value for key, value in read_json_object(file).items() if key not in ("transformers_version",)}
    known = _generation(words)
    wrong = [
        f"{key} {value!r}"[:100]
        for key, value in settings.items()
        if not (value is None or (known[key](value) if key in known else value in (False, [], {})))
    ]
    if wrong:
        raise CheckpointError(
            f"{file} has settings that relook does not follow, or values out of range: {preview(wrong, 10)}.",
            "Remove them from the file.",
        )
    try:
        return GenerationConfig(**{key: settings[key] for key in known if settings.get(key) is not None})
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid: {error}.", "Correct it.") from None


def _generation(words: int) -> Mapping[str, Callable[[Any], bool]]:
    """Return the generation settings that relook follows, each with a check of its values."""
    share, length, one = _number(0, 1), _whole(0, 1 << 30), lambda value: value == 1
    return {
        **dict.fromkeys(("do_sample", "use_cache", "renormalize_logits", "_from_model_config"), _flag),
        "early_stopping": lambda value: value in (True, False, "never"),
        **dict.fromkeys(("bos_token_id", "pad_token_id"), _id(words)),
        "eos_token_id": _ids(words),
        **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), lambda v: isinstance(v, list) and _ids(words)(v)),
        **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens"), length),
        **dict.fromkeys(("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"), share),
        "top_k": _whole(0, 1 << 24),
        "temperature": _number(0, 100),
        "num_beams": _whole(1, BEAMS),
        "length_penalty": _number(-100, 100),
        "repetition_penalty": lambda value: _number(0, 100)(value) and value > 0,
        "no_repeat_ngram_size": _whole(0, 1 << 10),
        **dict.fromkeys(("num_beam_groups", "num_return_sequences", "guidance_scale"), one),
        "encoder_repetition_penalty": one,
    }


def check_processor(who: str, tokenizer: Any, images: ImageLoader, config: Any) -> None:
    """Try a processor on the image placeholder and on a small image.

    Args:
        who: the model's name in error messages.
        tokenizer: the processor's tokenizer.
        images: image loader around the image processor.
        config: the model's config.

    Raises:
        CheckpointError: it fails, or its output does not fit a model of this config.
    """
    placeholder, side = tokenizer.convert_tokens_to_ids(IMAGE), config.vision_config.image_size
    if placeholder != config.image_token_id:
        raise CheckpointError(
            f"The tokenizer of {who} has {IMAGE} as {placeholder}, its config as {config.image_token_id}.", AGAIN
        )
    processor = images.image_processor
    sizes = [n for name in ("size", "crop_size") for n in dict(getattr(processor, name, None) or {}).values()]
    sizes += [n for pair in getattr(processor, "image_grid_pinpoints", None) or () for n in pair]
    try:
        strange = [size for size in sizes if size is not None and not _whole(1, SIDE)(size)]
        if strange:
            raise ValueError(f"sizes of {preview(strange)} pixels")
        pixels = images(Image.new("RGB", (3, 2)))
        if pixels.shape[-3:] != (3, side, side):
            raise ValueError(f"pictures become {list(pixels.shape)}, but the vision tower takes {[3, side, side]}")
        if not bool(pixels.isfinite().all()):
            raise ValueError("pixels become NaN or infinity: look at image_std and rescale_factor")
    except Exception as error:  # a library may raise anything on values it was never meant to get
        raise CheckpointError(
            f"The image processor of {who} cannot be used: {str(error).rstrip('.')}.",
            "Correct its preprocessor_config.json or processor_config.json, or download it again.",
        ) from None
