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
from relook.data.templates import image_mark
from relook.errors import CheckpointError, preview
from relook.files import read_json_object
from relook.model.families import family_of

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


def check_config(model_name: str, config: Any) -> None:
    """Refuse a config with values that no model can have.

    Args:
        model_name: the model's name in error messages.
        config: the transformers config.

    Raises:
        CheckpointError: all wrong values, by name.
    """
    parts = {"": config, "text_config.": config.text_config, "vision_config.": config.vision_config}
    wrong = [f"{name}{key} {value!r}" for name, part in parts.items() for key, value in _wrong(part)]
    vocab_size = config.text_config.vocab_size
    # An id outside the vocabulary would index beyond the embeddings, on a GPU as a device-side assertion.
    if not _id(vocab_size)(config.image_token_id):
        wrong.append(f"image_token_index {config.image_token_id!r} of a vocabulary of {vocab_size!r}")
    if wrong:
        message = f"The config of {model_name} has values that no model can have: {preview(wrong, 10)}."
        raise CheckpointError(message, AGAIN)


def refuse_unsupported(label: str, config: Any) -> None:
    """Refuse models that would read packed trees wrongly.

    Raises:
        CheckpointError: the config has no part that reads images, or a trait that trees do not go with, by name.
    """
    kind = f"{label} is a {config.model_type}"
    if lacking := [name for name in ("text_config", "vision_config", "image_token_id") if not hasattr(config, name)]:
        raise CheckpointError(
            f"{kind}, whose config has no {' and no '.join(lacking)}: it does not read images at placeholders of a "
            "prompt.",
            "Take another model; docs/trunks.md lists the tested ones.",
        )
    text = config.text_config
    layers = sorted(set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    traits = {
        f" over an encoder-decoder, {text.model_type}: answers do not share the positions of a prompt there, so trees "
        "and packed rows do not apply": any(getattr(part, "is_encoder_decoder", False) for part in (config, text)),
        ", whose whole prompts see both ways: questions on an image would not share what is computed of it": (
            getattr(text, "use_bidirectional_attention", None) is True
        ),
        ", whose layers do not take SDPA in transformers: relook's masks of packed rows go through it": (
            not family_of(config).model._supports_sdpa
        ),
        " whose language model has layers of chunked_attention: packed rows have no chunks, so that long prompts would "
        "be read in another way": layers == ["chunked_attention"],
        f" whose language model has layers of {', '.join(layers)}: these carry a state through a row, from one answer "
        "of a packed tree into the next": bool(layers),
    }
    if reason := next((reason for reason, applies in traits.items() if applies), ""):
        raise CheckpointError(f"{kind}{reason}.", "Take a model whose causal layers all attend to the whole prompt.")


AGAIN = "Download it again."


def _wrong(config: Any) -> Iterator[tuple[str, Any]]:
    # Parts have different keys: a vision config has no vocabulary, a text config no patches.
    vocab_size = getattr(config, "vocab_size", None)
    for key, maximum in SIZES.items():
        value = getattr(config, key, None)
        sides = value if isinstance(value, (list, tuple)) else [value]  # of an image: height and width
        if value is not None and not (sides and all(map(_whole(1, maximum), sides))):
            yield key, value
    for key in ("rms_norm_eps", "layer_norm_eps"):
        value = getattr(config, key, None)
        if value is not None and not (_number(0, 1)(value) and value > 0):
            yield key, value
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, key, None)
        # Some published configs say -1 for "no padding token".
        if vocab_size is not None and not (
            value is None or _ids(vocab_size)(value) or (key == "pad_token_id" and value == -1)
        ):
            yield key, value


def _whole(minimum: int, maximum: int) -> Callable[[Any], bool]:
    # `type`, not isinstance: a bool is an int.
    return lambda value: type(value) is int and minimum <= value <= maximum


def _number(minimum: float, maximum: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and math.isfinite(value) and minimum <= value <= maximum


def _id(vocab_size: Any) -> Callable[[Any], bool]:
    return _whole(0, vocab_size - 1 if type(vocab_size) is int else 0)


def _ids(vocab_size: Any) -> Callable[[Any], bool]:
    """Build a check that accepts a token id or a list of them, of a vocabulary of `vocab_size` tokens."""
    return lambda value: all(map(_id(vocab_size), value if isinstance(value, list) else [value]))


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def generation_config(folder: Path, vocab_size: int) -> GenerationConfig:
    """Read and check a folder's generation settings.

    Args:
        folder: the model folder.
        vocab_size: size of the vocabulary.

    Raises:
        CheckpointError: settings that relook does not follow, or values out of range, by name.
    """
    file = folder / "generation_config.json"
    settings = {key: value for key, value in read_json_object(file).items() if key not in ("transformers_version",)}
    checks = _generation(vocab_size)
    wrong = [
        f"{key} {value!r}"[:100]
        for key, value in settings.items()
        # An unknown setting may be present as long as it is off.
        if not (value is None or (checks[key](value) if key in checks else value in (False, [], {})))
    ]
    if wrong:
        raise CheckpointError(
            f"{file} has settings that relook does not follow, or values out of range: {preview(wrong, 10)}.",
            "Remove them from the file.",
        )
    # Each value is sound by itself; transformers also checks combinations, such as min_length above max_length.
    try:
        return GenerationConfig(**{key: settings[key] for key in checks if settings.get(key) is not None})
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid: {error}.", "Correct it.") from None


def _generation(vocab_size: int) -> Mapping[str, Callable[[Any], bool]]:
    """Return the generation settings that relook follows, each with a check of its values."""
    share, length, is_one = _number(0, 1), _whole(0, 1 << 30), lambda value: value == 1
    return {
        **dict.fromkeys(("do_sample", "use_cache", "renormalize_logits", "_from_model_config"), _flag),
        "early_stopping": lambda value: value in (True, False, "never"),
        **dict.fromkeys(("bos_token_id", "pad_token_id"), _id(vocab_size)),
        "eos_token_id": _ids(vocab_size),
        **dict.fromkeys(
            ("suppress_tokens", "begin_suppress_tokens"), lambda v: isinstance(v, list) and _ids(vocab_size)(v)
        ),
        **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens"), length),
        **dict.fromkeys(("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"), share),
        "top_k": _whole(0, 1 << 24),
        "temperature": _number(0, 100),
        "num_beams": _whole(1, BEAMS),
        "length_penalty": _number(-100, 100),
        "repetition_penalty": lambda value: _number(0, 100)(value) and value > 0,
        "no_repeat_ngram_size": _whole(0, 1 << 10),
        **dict.fromkeys(("num_beam_groups", "num_return_sequences", "guidance_scale"), is_one),
        "encoder_repetition_penalty": is_one,
    }


def check_processor(model_name: str, processor: Any, images: ImageLoader, config: Any) -> None:
    """Try a processor on the image placeholder and on a small image.

    Args:
        model_name: the model's name in error messages.
        images: image loader around the image processor.
        config: the model's config.

    Raises:
        CheckpointError: it fails, or its output does not fit a model of this config.
    """
    token, counts = (
        image_mark(processor),
        not hasattr(images.positions, "placeholders"),
    )  # else positions follow from the config
    placeholder = processor.tokenizer.convert_tokens_to_ids(token)
    if counts and placeholder != config.image_token_id:
        raise CheckpointError(
            f"The tokenizer of {model_name} has {token} as {placeholder}, its config as {config.image_token_id}.",
            AGAIN,
        )
    # Check the sizes before any picture is made: a processor would try to allocate whatever it is told.
    side, used = getattr(config.vision_config, "image_size", None), images.image_processor
    sizes = [n for name in ("size", "crop_size") for n in dict(getattr(used, name, None) or {}).values()]
    sizes += [n for pair in getattr(used, "image_grid_pinpoints", None) or () for n in pair]
    try:
        largest = SIDE**2 if images.flat else SIDE  # of flat patches the area is bounded, not the sides
        strange = [size for size in sizes if size is not None and not _whole(1, largest)(size)]
        if strange:
            raise ValueError(f"sizes of {preview(strange)} pixels")
        # A non-square picture of black, whose pixels become -mean / std.
        pixels = images(Image.new("RGB", (5, 4)))
        if not counts and not images.position_count((4, 5)):
            raise ValueError(f"it writes no placeholder of id {config.image_token_id} for a picture")
        if counts and pixels.shape[-3:] != (3, side, side):
            raise ValueError(f"pictures become {list(pixels.shape)}, but the vision tower takes {[3, side, side]}")
        if not bool(pixels.isfinite().all()):
            raise ValueError("pixels become NaN or infinity: look at image_std and rescale_factor")
    except Exception as error:  # a library may raise anything on values it was never meant to get
        raise CheckpointError(
            f"The image processor of {model_name} cannot be used: {str(error).rstrip('.')}.",
            "Correct its preprocessor_config.json or processor_config.json, or download it again.",
        ) from None
