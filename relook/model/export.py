"""`relook convert`, `merge` and `export`: model folders written tensor by tensor, and checked before they appear.

All three write one `LazyModel`: as it is, with an adapter applied, or a training run with its base. One shard is in
memory at a time; the check that follows holds one model at a time.
"""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import psutil
import torch
from PIL import Image
from torch import Tensor
from transformers import LlamaForCausalLM, LlavaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from relook.console import readable_size, status
from relook.data.encode import Encoder
from relook.data.samples import Turn
from relook.data.templates import CHAT, IM_END, IM_START, IMAGE, Template, TemplatePiece, get_template, with_image
from relook.errors import CheckpointError, did_you_mean, preview
from relook.files import atomic_folder, read_json_object, require_disk_space, write_json
from relook.model import modeling_relook, post_decoder
from relook.model.adapters import Adapter, read_adapter
from relook.model.checkpoint import (
    FROM_ANY,
    PROJECTOR,
    TO_HF,
    TO_LLAVA,
    TOWER,
    parse_folder,
    rename,
    rope_settings,
    to_llava_config,
    write_tensors,
)
from relook.model.families import RELOOK, has_post_decoder, language_model
from relook.model.lazy_model import LazyModel
from relook.model.load import LoadedModel, materialize, open_base, open_lazy
from relook.model.lora import PEFT_PREFIX
from relook.model.post_decoder import PostDecoderSettings

# ----------------------------------------------------------------------------------------------------

Writer = Callable[[LazyModel, Path, int], None]
TOWER_FOLDER = "vision_tower"
SENTENCEPIECE = ("tokenizer.model", "added_tokens.json", "special_tokens_map.json")
TOLERANCE = {torch.float32: 1e-4}  # of logits; half precision rounds at about 1e-2
TOKENIZER_KEYS = (
    *("add_bos_token", "add_eos_token", "bos_token", "eos_token", "unk_token", "pad_token"),
    *("legacy", "model_max_length", "padding_side", "clean_up_tokenization_spaces"),
)


@dataclass(frozen=True)
class WriteOptions:
    """Options for writing a model folder.

    Args:
        force: replace an existing model folder.
        shard_gb: size of the largest weight file, in 10^9 bytes.
        check: compare the logits of source and result on a small input.
        vision_tower: folder of a liuhaotian model's vision tower, where its config does not lead to it.
    """

    force: bool = False
    shard_gb: float = 4.0
    check: bool = True
    vision_tower: Path | None = None


def convert_model(source: str | Path, out: str | Path, to: str, options: WriteOptions = WriteOptions()) -> float | None:
    """Write a model in another format and return the largest logit difference, None if not checked.

    Args:
        source: a model folder or a training run.
        out: the folder to write.
        to: "hf" for transformers' format, "llava" for liuhaotian's (its tower goes into the folder `vision_tower`).
        options: options for writing.

    Raises:
        CheckpointError: the source is broken, the target exists, or the target format cannot express the model.
    """
    source, out = Path(source), Path(out)
    if to not in ("hf", "llava"):
        raise CheckpointError(f"There is no format {to!r}.", "Use hf or llava.")
    return write_model(
        open_lazy(source, vision_tower=options.vision_tower), out, write_hf if to == "hf" else write_llava, options
    )


def merge_adapter(
    base: str | Path,
    change: str | Path,
    out: str | Path,
    stage: int | None = None,
    options: WriteOptions = WriteOptions(),
) -> float | None:
    """Write a base with an adapter applied, in transformers' format; a post decoder brings its code along.

    Args:
        base: a model folder, or a training run, which stands for its base with what was trained.
        change: an adapter, as for `load_model`.
        out: the folder to write.
        stage: take only part of the adapter, as replace_bin's stages did (see `Adapter.at_stage`); None takes all.
        options: options for writing.
    """
    model, trained, out = parse_folder(base), read_adapter(change), Path(out)
    trained.note_projector()
    if model.kind == "run":
        trained = trained.after(model)
        source = open_lazy(model, vision_tower=options.vision_tower)
    else:
        source = open_base(model, trained.folder, options.vision_tower)
    if stage is not None:
        trained, left_out = trained.at_stage(stage, source)
        if left_out:
            status(f"  stage {stage} leaves out {len(left_out)} tensors of {change}: {preview(left_out)}")
    merged = trained.apply_to(source)
    merged.check()
    return write_model(merged, out, write_hf, options)


def export_model(source: str | Path, out: str | Path, options: WriteOptions = WriteOptions()) -> float | None:
    """Write a model or a training run as a complete folder that transformers loads without relook installed."""
    source, out = Path(source), Path(out)
    return write_model(open_lazy(source, vision_tower=options.vision_tower), out, write_hf, options)


def write_model(source: LazyModel, out: Path, write: Writer, options: WriteOptions) -> float | None:
    """Write a model to a folder that appears only once it is complete and checked.

    Args:
        source: the model to write.
        out: the folder to write.
        write: writes a model into a folder, in files of at most the given number of bytes.
        options: options for writing.
    """
    _check_target(source, out, options)
    difference = None
    # First against peft, which needs nothing on disk, then the written folder against the source.
    beside = check_with_peft(source, out) if options.check else ""
    with atomic_folder(out.resolve()) as folder:  # a link to a folder stays a link
        write(source, folder, int(options.shard_gb * 1e9))
        if options.check:
            difference = logit_difference(source, open_lazy(folder))
            if not difference <= TOLERANCE.get(source.dtype, 5e-2):  # NaN fails too
                raise CheckpointError(
                    f"The logits of the result differ by {difference:.2e}; {out} was not written.",
                    "Look at the source with relook inspect; --no-check writes it all the same.",
                )
    checked = "not checked" if difference is None else f"largest difference of logits {difference:.1e}{beside}"
    status(f"{out}: {len(source.tensors)} tensors, {checked}")
    return difference


def _check_target(source: LazyModel, out: Path, options: WriteOptions) -> None:
    # Not even --force replaces a folder that holds what is being read.
    target = out.resolve()
    for used in (source.path, source.tower, source.adapter):
        if used is not None and (target == used.resolve() or target in used.resolve().parents):
            raise CheckpointError(f"{out} holds the source itself.", "Choose another folder.")
    if out.exists() and not options.force:
        raise CheckpointError(f"{out} exists.", "Choose another folder, or pass --force to replace it.")
    if out.exists() and not (out / "config.json").is_file():
        raise CheckpointError(f"{out} is no model folder and is not replaced.", "Choose another folder.")
    needed = sum(prod(tensor.shape) for tensor in source.tensors.values()) * source.dtype.itemsize
    require_disk_space(target, needed, str(out), "Make room there, or choose a folder on another disk.")


def _tensor_stream(source: LazyModel, renames: Any, tower: bool) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in source.tensors.items():
        if name.startswith(TOWER) == tower:
            yield rename(name, renames), tensor.read()


def write_hf(source: LazyModel, folder: Path, shard_bytes: int, code: bool = True) -> None:
    """Write transformers' format: llava-hf's tensor names, or with a post decoder the module tree's.

    Args:
        code: whether a post decoder's code goes along, for transformers without relook.
    """
    # llava-hf's folders have older names, which vLLM and transformers know; other families those of the module tree.
    own_names = has_post_decoder(source.config) and code  # transformers finds the module tree's in the code
    is_llava = source.config.model_type.removeprefix(RELOOK).startswith("llava")
    renames = TO_HF if is_llava and not own_names else ()
    # The tower's tensors come first, then all others.
    stream = (pair for tower in (True, False) for pair in _tensor_stream(source, renames, tower))
    write_tensors(folder, stream, shard_bytes)
    config = copy.deepcopy(source.config)
    config.architectures, config.dtype = [source.model_class.__name__], source.dtype
    config.conversation_template = source.template
    config.__dict__.pop("auto_map", None)
    if has_post_decoder(config) and code:
        config.auto_map = {
            "AutoConfig": f"modeling_relook.{type(source.config).__name__}",
            "AutoModelForImageTextToText": f"modeling_relook.{source.model_class.__name__}",
        }
        for module in (modeling_relook, post_decoder):
            shutil.copyfile(str(module.__file__), folder / Path(str(module.__file__)).name)
    config.to_json_file(folder / "config.json")
    source.generation_config().save_pretrained(folder)
    _processor(source).save_pretrained(folder)
    _copy_sentencepiece(source.path, folder)


def write_llava(source: LazyModel, folder: Path, shard_bytes: int) -> None:
    """Write liuhaotian's format, with the vision tower as a CLIP folder inside.

    The original program resolves `mm_vision_tower` from its working directory. Start it in this folder, or put the
    absolute path into config.json.
    """
    config = to_llava_config(source.config, str(source.dtype).removeprefix("torch."), TOWER_FOLDER)
    stream = _tensor_stream(source, TO_LLAVA, tower=False)
    if config["mm_projector_type"] == "linear":
        stream = _one_linear(source)
    write_tensors(folder, stream, shard_bytes)
    write_json(folder / "config.json", {**config, "conversation_template": source.template})
    text = source.config.text_config
    special = {key: getattr(text, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", special)
    processor = source.processor()
    tower = folder / TOWER_FOLDER
    tower.mkdir()
    write_tensors(tower, _tensor_stream(source, ((f"^{TOWER}", "vision_model."),), tower=True), shard_bytes)
    vision = copy.deepcopy(source.config.vision_config)
    vision.architectures = ["CLIPVisionModel"]
    vision.to_json_file(tower / "config.json")
    images = processor.image_processor
    write_json(
        tower / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            **{key: getattr(images, key) for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize")},
            **{key: dict(getattr(images, key)) for key in ("size", "crop_size")},
            **{key: list(getattr(images, key)) for key in ("image_mean", "image_std")},
            "resample": int(images.resample),
        },
    )
    # The original program reads sentencepiece files; without them, at least transformers' tokenizer is there.
    if not _copy_sentencepiece(source.path, folder):
        processor.tokenizer.save_pretrained(folder)
        return
    stated = read_json_object(source.path / "tokenizer_config.json", optional=True)
    settings = {key: value for key, value in stated.items() if key in TOKENIZER_KEYS}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **settings})


def _copy_sentencepiece(path: Path, folder: Path) -> bool:
    """Copy the sentencepiece files, which the original program needs; return True if the model is among them."""
    for name in SENTENCEPIECE:
        if (path / name).exists():
            shutil.copyfile(path / name, folder / name)  # contents without the mode, which may be read-only
    return (path / "tokenizer.model").exists()


def _one_linear(source: LazyModel) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors as `_tensor_stream` does, but with the projector's two linears fused (no activation between)."""
    weight_1, bias_1, weight_2, bias_2 = (
        source.tensors[f"{PROJECTOR}linear_{i}.{part}"].read() for i in (1, 2) for part in ("weight", "bias")
    )
    # W2 (W1 x + b1) + b2 = (W2 W1) x + (W2 b1 + b2)
    yield "model.mm_projector.weight", (weight_2.float() @ weight_1.float()).to(weight_1.dtype)
    yield "model.mm_projector.bias", (weight_2.float() @ bias_1.float() + bias_2.float()).to(bias_1.dtype)
    for name, tensor in _tensor_stream(source, TO_LLAVA, tower=False):
        if not name.startswith("model.mm_projector."):
            yield name, tensor


@torch.inference_mode()
def logit_difference(first: LazyModel, second: LazyModel) -> float:
    """Compute the largest absolute logit difference of two models on one image and 16 tokens, in the stored dtype.

    Only one model is in memory at a time. Both get the pixels from the first one's processor.
    """
    # The first model is freed before the second is loaded.
    loaded = materialize(first, first.dtype)
    inputs = _small_input(loaded)
    logits = loaded.model(**inputs).logits.float()
    del loaded
    return float((materialize(second, first.dtype).model(**inputs).logits.float() - logits).abs().max())


def check_with_peft(source: LazyModel, out: Path) -> str:
    """Compare a model with merged LoRA to the same adapter run by peft, and return a note on the outcome.

    The comparison is in float32, since typical LoRA deltas are smaller than the rounding error of half precision.

    Raises:
        CheckpointError: their logits differ.
    """
    if source.beneath is None or not source.beneath[1].lora:
        return ""
    needed = 4 * sum(prod(tensor.shape) for tensor in source.tensors.values())
    # The merged model and peft's are in memory one after the other, in float32.
    if needed > (free := psutil.virtual_memory().available):
        return f"; not compared with peft, for which {readable_size(needed - free)} of memory are missing"
    try:
        peft_logits, inputs = _logits_by_peft(*source.beneath)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        return f"; not compared with peft, which cannot load the adapter ({str(error).splitlines()[0]})"
    # Merge once more, in float32: `source` was rounded to the stored dtype.
    beneath, change = source.beneath
    merged = materialize(replace(change, previous=()).apply_to(beneath, torch.float32), torch.float32)
    with torch.inference_mode():
        difference = float((merged.model(**inputs).logits - peft_logits).abs().max())
    if not difference <= TOLERANCE[torch.float32] * max(1.0, float(peft_logits.abs().max())):
        raise CheckpointError(
            f"The logits of the merged model differ from those of peft's adapter by {difference:.2e}; {out} was not "
            "written.",
            "Please report this with the adapter_config.json; --no-check writes it all the same.",
        )
    return f", from peft's own {difference:.1e}"


@torch.inference_mode()
def _logits_by_peft(beneath: LazyModel, change: Adapter) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the logits of a model whose adapter peft runs unmerged; return them with the inputs.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, RuntimeError: peft cannot load the adapter, or has no layers
            for some of its tensors.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    assert change.lora_settings is not None
    # Everything but LoRA is applied as usual; LoRA alone goes through peft.
    rest, tensors = change.without_adapter()
    loaded = materialize(rest.apply_to(beneath, torch.float32), torch.float32)
    core = wrapped = loaded.core
    if change.has_llavas_names:  # in the original, the language model is the top-level module
        with torch.device("meta"):
            wrapped = LlamaForCausalLM(core.config.text_config)
        wrapped.model, wrapped.lm_head = language_model(core.model), core.lm_head
        state_dict = {name: tensor.read() for name, tensor in tensors.items()}
    else:
        # An adapter of another transformers version: rename its modules to those of the installed one.
        plain = {rename(name.removeprefix(PEFT_PREFIX), FROM_ANY): tensor for name, tensor in tensors.items()}
        state_dict = {PEFT_PREFIX + name: tensor.read() for name, tensor in plain.items()}
    # peft initialises LoRA at random before the tensors are set; the fork restores the global generator.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(wrapped, LoraConfig.from_pretrained(str(change.lora_settings.file.parent))).eval()
        report = set_peft_model_state_dict(model, state_dict)
    lost = [*report.unexpected_keys, *(name for name in report.missing_keys if ".lora_" in name)]
    if lost:
        raise ValueError(f"it has no place for {preview(lost, 2)}")
    core.lm_head = wrapped.lm_head  # peft may have replaced it by a layer with LoRA
    inputs = _small_input(loaded)
    return core(**inputs).logits, inputs


def _small_input(loaded: LoadedModel) -> dict[str, Tensor]:
    config = loaded.core.config
    generator = torch.Generator().manual_seed(0)
    side = getattr(config.vision_config, "image_size", 64)  # any, where models take all sizes
    side = side if isinstance(side, int) else side[0]
    noise = torch.randint(256, (side, 2 * side, 3), dtype=torch.uint8, generator=generator)
    picture = Image.fromarray(noise.numpy())
    # One image and 16 tokens other than the placeholder. The picture is noise, wider than high, so that cropping and
    # padding show.
    words = [i for i in range(min(config.text_config.vocab_size, 1000)) if i != config.image_token_id]
    picked = torch.randint(len(words), (16,), generator=generator)
    encoder = loaded.plain_encoder()
    shown = encoder.row([TemplatePiece(IMAGE)], encoder.positions([picture])).ids
    ids = [*shown, *(words[i] for i in picked.tolist())]
    images = loaded.images.batch([picture])
    tokens = torch.tensor([ids])
    return {"input_ids": tokens, **loaded.token_types(tokens)} | {
        name: value.to(loaded.core.dtype) if value.is_floating_point() else value for name, value in images.items()
    }


# ----------------------------------------------------------------------------------------------------
# `relook export --for ENGINE`: a folder that vLLM, SGLang or `transformers serve` loads as it is.
#
# LoRA, head and projector are merged. A post decoder runs in vLLM, by relook's plugin (`relook.vllm`); other engines
# have LLaVA's own layers only. The files they read were determined from their source code.

# SGLang recognises a CLIP tower by this word in its path.
CLIP_FOLDER = f"clip_{TOWER_FOLDER}"
# Generation settings that all three engines follow, or that do not affect the text.
FOLLOWED = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k", "use_cache"),
    *("output_attentions", "output_hidden_states", "transformers_version", "_from_model_config", "max_new_tokens"),
}


def export_for(source: str | Path, out: str | Path, engine: str, options: WriteOptions) -> float | None:
    """Write a model or a training run for a serving engine; return the largest logit difference, None if not checked.

    Args:
        source: a model folder or a training run.
        out: the folder to write.
        engine: "vllm", "sglang" or "transformers-serve".
        options: options for writing.

    Raises:
        CheckpointError: there is no such engine, or it cannot run this model; the error says why, and what can.
    """
    source, out = Path(source), Path(out)
    if engine not in WRITERS:
        raise CheckpointError(f"There is no engine {engine!r}.", did_you_mean(engine, WRITERS))
    return export_lazy(open_lazy(source, vision_tower=options.vision_tower), out, engine, options)


def export_lazy(opened: LazyModel, out: Path, engine: str, options: WriteOptions) -> float | None:
    """Write an opened model for a serving engine, as `export_for` does."""
    if reason := unsupported_by(engine, opened.config):
        raise CheckpointError(f"{opened.adapter or opened.path} cannot run in {engine}: {reason}.", "Use relook serve.")
    difference = write_model(opened, out, WRITERS[engine], options)
    dtype = str(opened.dtype).removeprefix("torch.")
    status(
        f"  in {dtype}: run it with `vllm serve {out} --dtype {dtype}`, for vLLM turns float32 into bfloat16 by itself"
        if engine == "vllm"
        else f"  in {dtype}: tell {engine}, if its default is another"
    )
    return difference


def unsupported_by(engine: str, config: Any) -> str:
    """Return why an engine cannot run a model's post decoder; empty where it can, or where there is none."""
    if not has_post_decoder(config):
        return ""
    if engine != "vllm":
        return f"it has a post decoder, and {engine} only its family's own layers"
    settings = PostDecoderSettings(**config.post_decoder)
    if config.model_type != f"{RELOOK}llava":
        # The plugin keeps the image's keys at the placeholders: each needs the feature that it stands for.
        return "relook's plugin has LLaVA-1.5 alone, where each placeholder stands for one feature of the vision tower"
    if settings.attention == "self_cross" and settings.depth > 1:
        return (
            "the self-attention of its second block reads image positions that have seen the whole image, but in a "
            "cache no position sees what follows it"
        )
    if isinstance(config.vision_feature_layer, list):
        return "vLLM's LLaVA reads one layer of the vision tower, not several"
    if getattr(config.text_config, "sliding_window", None):
        return "vLLM would limit the post decoder to the language model's sliding window"
    return ""


def _write_plain(source: LazyModel, folder: Path, shard_bytes: int) -> None:
    """Write transformers' format without code, so that version 4 can read it too."""
    write_hf(source, folder, shard_bytes, code=False)
    config = read_json_object(folder / "config.json")
    # Version 4 reads these from the text config, under its own names.
    text = config["text_config"]
    if text["model_type"] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:  # not of Qwen2.5-VL, whose class is the whole model's
        text |= rope_settings(text)
        text["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text["model_type"]]]
    text["tie_word_embeddings"] = source.config.tie_word_embeddings
    write_json(folder / "config.json", config)
    _write_speech(source, folder, _processor(source))


def _write_sglang(source: LazyModel, folder: Path, shard_bytes: int) -> None:
    """Write liuhaotian's format plus what SGLang expects: a CLIP folder under `CLIP_FOLDER`, and a processor."""
    config = source.config
    if not isinstance(config, LlavaConfig) or config.text_config.model_type != "llama":
        raise CheckpointError(
            f"SGLang runs llava over llama; {source.path} is {config.model_type} over {config.text_config.model_type}.",
            "Use --for vllm.",
        )
    if config.projector_hidden_act != "gelu":
        raise CheckpointError(
            f"SGLang's projector has a gelu; that of {source.path} has {config.projector_hidden_act!r}.",
            "Use --for vllm.",
        )
    write_llava(source, folder, shard_bytes)
    (folder / TOWER_FOLDER).rename(folder / CLIP_FOLDER)
    for name in SENTENCEPIECE:  # they lack the <image> token
        (folder / name).unlink(missing_ok=True)
    processor = _processor(source)
    llava_config = read_json_object(folder / "config.json") | {
        "model_type": "llava",  # the only one of transformers' names that SGLang knows
        "mm_vision_tower": CLIP_FOLDER,
        "image_token_index": config.image_token_id,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if getattr(processor.image_processor, "do_pad", False):  # SGLang pads to a square itself
        processor.image_processor.do_pad, llava_config["image_aspect_ratio"] = False, "pad"
    write_json(folder / "config.json", llava_config)
    _write_speech(source, folder, processor)


def _processor(source: LazyModel) -> Any:
    """Return the model's processor; liuhaotian's padding to a square becomes a setting of it."""
    processor = source.processor()
    if source.kind == "llava":
        processor.image_processor.do_pad = getattr(source.config, "image_aspect_ratio", "") == "pad"
    return processor


def _write_speech(source: LazyModel, folder: Path, processor: Any) -> None:
    """Write processor, chat template and generation settings so that both transformers 4 and 5 can read them."""
    processor.chat_template = processor.tokenizer.chat_template = chat_template(source, processor)
    processor.save_pretrained(folder)
    processor_config = read_json_object(folder / "processor_config.json")
    images = processor_config.pop("image_processor")
    write_json(folder / "processor_config.json", processor_config)
    write_json(folder / "preprocessor_config.json", images | {"processor_class": processor_config["processor_class"]})
    tokenizer = read_json_object(folder / "tokenizer_config.json")
    special = tokenizer.pop("extra_special_tokens", [])
    # Version 4 knows neither version 5's own keys nor its name for further special tokens.
    left_out = ("backend", "is_local", "local_files_only")
    settings = {key: value for key, value in tokenizer.items() if key not in left_out}
    overrides = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": special}
    overrides["model_input_names"] = ["input_ids", "attention_mask"]  # else version 4 adds token_type_ids
    write_json(folder / "tokenizer_config.json", settings | overrides)
    _write_generation(source, folder, processor.tokenizer)


def _write_generation(source: LazyModel, folder: Path, tokenizer: Any) -> None:
    settings, stop = source.generation_config(), get_template(source.template, source.processor()).stop
    # Engines stop at token ids only; a stop string that is one token becomes an end-of-text id.
    if stop in tokenizer.get_added_vocab():
        ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        settings.eos_token_id = sorted({*ends, tokenizer.convert_tokens_to_ids(stop)} - {None})
    elif stop:
        status(f"  answers end with {stop!r}, which is no token: requests must send it as `stop`", style="yellow")
    unfollowed = [name for name, value in settings.to_diff_dict().items() if value and name not in FOLLOWED]
    if unfollowed:
        status(f"  not every engine follows {preview(unfollowed)} of generation_config.json", style="yellow")
    settings.save_pretrained(folder)


def chat_template(source: LazyModel, processor: Any) -> str:
    """Build the model's chat template for `apply_chat_template`, checked against relook's own encoder.

    Raises:
        CheckpointError: with this tokenizer, no template reproduces the prompts that the model was tuned with.
    """
    if source.template == CHAT:
        return str(processor.chat_template)
    template, tokenizer = get_template(source.template), processor.tokenizer
    marked = getattr(source.config, "mm_use_im_start_end", False)
    encoder = Encoder(tokenizer, template, source.config.image_token_id, 1, image_start_end=marked)
    # Two turns, so that every part of the template occurs: first and later prompts, answers, and the open end.
    turns = [Turn(with_image("What is this?"), "A cup."), Turn("And where is it?", "")]
    expected_ids = list(encoder.prompt(turns[-1].prompt, 1, turns[:-1]))
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
        {"role": "user", "content": "And where is it?"},
    ]
    image = IM_START + IMAGE + IM_END if marked else IMAGE
    # relook tokenises each stretch of text around images by itself. A tokenizer that puts a space before a text only
    # where no special token comes first needs it written: after BOS, and after an image.
    closest, closest_ids = -1, list[int]()  # where the ids of the closest template part from the expected ones
    for start, line in itertools.product(("", " "), (f"{image}\n", f"{image} \n")):
        bos = f"{{{{ bos_token }}}}{start}" if expected_ids[0] == tokenizer.bos_token_id else start
        jinja = _jinja(template, line, bos)
        text = processor.apply_chat_template(messages, chat_template=jinja, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ids == expected_ids:
            return jinja
        differs = (i for i, (a, b) in enumerate(itertools.zip_longest(expected_ids, ids)) if a != b)
        if (first := next(differs)) > closest:
            closest, closest_ids = first, ids
    expected, written = (
        " ".join(tokenizer.convert_ids_to_tokens(row[closest : closest + 3])) for row in (expected_ids, closest_ids)
    )
    raise CheckpointError(
        f"No chat template gives the tokenizer of {source.path} the prompts of {source.template}: from token "
        f"{closest} on, the closest one gives {written!r} instead of {expected!r}.",
        "Use relook serve.",
    )


def _jinja(template: Template, image: str, start: str) -> str:
    """Translate a template to Jinja, after `start`, which is Jinja already.

    As in `relook serve`, everything before an answer is one turn: first its images, then its texts, each on its own
    line. A system message is one of these texts.
    """
    first, later, cue, lead, end = (
        json.dumps(text) for text in (template.first, template.later, template.cue, template.lead, template.end)
    )
    turn = f"{{{{ ({later} if ns.later else {first}) + ns.images + ns.texts | join('\\n') + {cue} }}}}"
    return (
        start + "{% set ns = namespace(later=false, images='', texts=[]) %}"
        "{% for message in messages %}"
        "{% set ns.said = [] %}"
        "{% if message['content'] is string %}{% set ns.said = [message['content']] %}{% else %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}{% set ns.images = ns.images + " + json.dumps(image) + " %}"
        "{% elif part['type'] == 'text' %}{% set ns.said = ns.said + [part['text']] %}{% endif %}"
        "{% endfor %}{% endif %}"
        "{% if message['role'] == 'assistant' %}"
        + turn
        + f"{{{{ {lead} + ns.said | join('\\n') + {end} }}}}"
        + "{% set ns.later = true %}{% set ns.images = '' %}{% set ns.texts = [] %}"
        "{% else %}{% set ns.texts = ns.texts + ns.said %}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}" + turn + "{% endif %}"
    )


WRITERS: dict[str, Callable[[LazyModel, Path, int], None]] = {
    "vllm": _write_plain,
    "sglang": _write_sglang,
    "transformers-serve": _write_plain,
}
