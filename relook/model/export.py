"""`relook convert`, `merge` and `export`: a model folder written anew tensor by tensor, checked before it is named.

All three write one `ModelSource`: as it is, with a change laid on it, or a training run with its base. One shard is in
memory at a time; the check that follows holds one model at a time.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from relook.console import say
from relook.data.encode import Encoder
from relook.data.samples import Turn
from relook.data.templates import IM_END, IM_START, IMAGE, Template, get_template, with_image
from relook.errors import CheckpointError, some
from relook.files import read_object, require_room, whole_folder, write_json
from relook.model import modeling_relook, post_decoder
from relook.model.adapters import read_change
from relook.model.checkpoint import (
    PROJECTOR,
    TO_HF,
    TO_LLAVA,
    TOWER,
    rename,
    rope_settings,
    to_llava_config,
    write_tensors,
)
from relook.model.families import has_post_decoder
from relook.model.lazy_model import ModelSource, open_model
from relook.model.load import LoadedModel, build, open_source

# ----------------------------------------------------------------------------------------------------

Writer = Callable[[ModelSource, Path, int], None]
TOWER_FOLDER = "vision_tower"
SENTENCEPIECE = ("tokenizer.model", "added_tokens.json", "special_tokens_map.json")
TOLERANCE = {torch.float32: 1e-4}  # of logits; half precision rounds at 1e-2
TOKENIZER_KEYS = (
    *("add_bos_token", "add_eos_token", "bos_token", "eos_token", "unk_token", "pad_token"),
    *("legacy", "model_max_length", "padding_side", "clean_up_tokenization_spaces"),
)


@dataclass(frozen=True)
class Writing:
    """How a folder is written.

    Args:
        force: replace a model folder that is there.
        shard_gb: largest weight file in 10^9 bytes.
        check: compare the logits of source and result on a small input.
        vision_tower: folder of a liuhaotian model's tower, where its config does not lead to it.
    """

    force: bool = False
    shard_gb: float = 4.0
    check: bool = True
    vision_tower: Path | None = None


def convert(source: Path, out: Path, to: str, how: Writing = Writing()) -> float | None:
    """Write a model in another format; returns the largest difference of logits.

    Args:
        to: "hf" for transformers' format, "llava" for liuhaotian's (its tower goes into the folder `vision_tower`).

    Raises:
        CheckpointError: the source is broken, the target exists, or the formats cannot say the same.
    """
    if to not in ("hf", "llava"):
        raise CheckpointError(f"There is no format {to!r}.", "Use hf or llava.")
    return write_model(
        open_source(source, vision_tower=how.vision_tower), out, write_hf if to == "hf" else write_llava, how
    )


def merge(base: Path, change: Path, out: Path, stage: int | None = None, how: Writing = Writing()) -> float | None:
    """Write a base with a change laid on it, in transformers' format; a post decoder brings its code along.

    Args:
        change: what `load_model` takes as adapter.
        stage: take a part of the change only, as replace_bin's stages did (see `Change.at_stage`); None takes all.
    """
    source, trained = open_model(base, how.vision_tower), read_change(change)
    if stage is not None:
        trained, left = trained.at_stage(stage, source)
        if left:
            say(f"  stage {stage} leaves out {len(left)} tensors of {change}: {some(left)}")
    merged = trained.lay_on(source)
    merged.check()
    return write_model(merged, out, write_hf, how)


def export(source: Path, out: Path, how: Writing = Writing()) -> float | None:
    """Write a model or a training run as a whole folder that transformers loads where relook is not installed."""
    return write_model(open_source(source, vision_tower=how.vision_tower), out, write_hf, how)


def write_model(source: ModelSource, out: Path, write: Writer, how: Writing) -> float | None:
    """Write a source under a name that appears only when all is written and checked.

    Args:
        write: writes it into a folder, in files of so many bytes at most.
    """
    _claim(source, out, how)
    difference = None
    with whole_folder(out.resolve()) as folder:  # a link to a folder stays a link
        write(source, folder, int(how.shard_gb * 1e9))
        if how.check:
            difference = logit_difference(source, open_source(folder))
            if not difference <= TOLERANCE.get(source.dtype, 5e-2):  # NaN fails too
                raise CheckpointError(
                    f"The logits of the result differ by {difference:.2e}; {out} was not written.",
                    "Look at the source with relook inspect; --no-check writes it all the same.",
                )
    checked = "not checked" if difference is None else f"largest difference of logits {difference:.1e}"
    say(f"{out}: {len(source.tensors)} tensors, {checked}")
    return difference


def _claim(source: ModelSource, out: Path, how: Writing) -> None:
    target = out.resolve()
    for used in (source.path, source.tower, source.change):
        if used is not None and (target == used.resolve() or target in used.resolve().parents):
            raise CheckpointError(f"{out} holds the source itself.", "Choose another folder.")
    if out.exists() and not how.force:
        raise CheckpointError(f"{out} exists.", "Choose another folder, or pass --force to replace it.")
    if out.exists() and not (out / "config.json").is_file():
        raise CheckpointError(f"{out} is no model folder and is not replaced.", "Choose another folder.")
    needed = sum(prod(tensor.shape) for tensor in source.tensors.values()) * source.dtype.itemsize
    require_room(target, needed, str(out), "Make room there, or choose a folder on another disk.")


def _stream(source: ModelSource, renames: Any, tower: bool) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in source.tensors.items():
        if name.startswith(TOWER) == tower:
            yield rename(name, renames), tensor.read()


def write_hf(source: ModelSource, folder: Path, shard_bytes: int) -> None:
    """transformers' format: llava-hf's names, or with a post decoder the module tree's own, and the code with them."""
    own = has_post_decoder(source.config)
    renames = () if own else TO_HF
    stream = (pair for tower in (True, False) for pair in _stream(source, renames, tower))
    write_tensors(folder, stream, shard_bytes)
    config = copy.deepcopy(source.config)
    config.architectures, config.dtype = [source.model_class.__name__], source.dtype
    config.conversation_template = source.template
    if own:
        config.auto_map = {
            "AutoConfig": f"modeling_relook.{type(source.config).__name__}",
            "AutoModelForImageTextToText": f"modeling_relook.{source.model_class.__name__}",
        }
        for module in (modeling_relook, post_decoder):
            shutil.copyfile(str(module.__file__), folder / Path(str(module.__file__)).name)
    config.to_json_file(folder / "config.json")
    source.generation_config().save_pretrained(folder)
    processor = source.processor()
    if source.kind == "llava":
        processor.image_processor.do_pad = getattr(source.config, "image_aspect_ratio", "") == "pad"
    processor.save_pretrained(folder)
    _copy_sentencepiece(source.path, folder)


def write_llava(source: ModelSource, folder: Path, shard_bytes: int) -> None:
    """liuhaotian's format, its vision tower as a CLIP folder inside.

    The original program looks for `mm_vision_tower` from its working directory: start it in this folder, or write the
    absolute path into config.json.
    """
    config = to_llava_config(source.config, str(source.dtype).removeprefix("torch."), TOWER_FOLDER)
    stream = _stream(source, TO_LLAVA, tower=False)
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
    write_tensors(tower, _stream(source, ((f"^{TOWER}", "vision_model."),), tower=True), shard_bytes)
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
    if not _copy_sentencepiece(source.path, folder):
        processor.tokenizer.save_pretrained(folder)
        return
    stated = read_object(source.path / "tokenizer_config.json", optional=True)
    kept = {key: value for key, value in stated.items() if key in TOKENIZER_KEYS}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer", **kept})


def _copy_sentencepiece(path: Path, folder: Path) -> bool:
    """Keep the sentencepiece model beside tokenizer.json: the original program reads no other."""
    for name in SENTENCEPIECE:
        if (path / name).exists():
            shutil.copyfile(path / name, folder / name)  # not its mode, which may be read-only
    return (path / "tokenizer.model").exists()


def _one_linear(source: ModelSource) -> Iterator[tuple[str, Tensor]]:
    """As `_stream`, with the two linears of a projector that has no activation between them made one."""
    weight_1, bias_1, weight_2, bias_2 = (
        source.tensors[f"{PROJECTOR}linear_{i}.{part}"].read() for i in (1, 2) for part in ("weight", "bias")
    )
    yield "model.mm_projector.weight", (weight_2.float() @ weight_1.float()).to(weight_1.dtype)
    yield "model.mm_projector.bias", (weight_2.float() @ bias_1.float() + bias_2.float()).to(bias_1.dtype)
    for name, tensor in _stream(source, TO_LLAVA, tower=False):
        if not name.startswith("model.mm_projector."):
            yield name, tensor


@torch.inference_mode()
def logit_difference(first: ModelSource, second: ModelSource) -> float:
    """Largest absolute difference of two models' logits on one image and 16 tokens, in the dtype they are stored in.

    One model is held at a time; both are given what the first one's processor makes of the image.
    """
    loaded = build(first, first.dtype)
    inputs = _small_input(loaded)
    logits = loaded.model(**inputs).logits.float()
    del loaded
    return float((build(second, first.dtype).model(**inputs).logits.float() - logits).abs().max())


def _small_input(loaded: LoadedModel) -> dict[str, Tensor]:
    config = loaded.core.config
    generator = torch.Generator().manual_seed(0)
    side = config.vision_config.image_size
    noise = torch.randint(256, (side, 2 * side, 3), dtype=torch.uint8, generator=generator)
    picture = Image.fromarray(noise.numpy())
    words = [i for i in range(min(config.text_config.vocab_size, 1000)) if i != config.image_token_id]
    picked = torch.randint(len(words), (16,), generator=generator)
    ids = [config.image_token_id] * loaded.encoder().positions([picture])[0] + [words[i] for i in picked.tolist()]
    images = loaded.images.batch([picture])
    return {"input_ids": torch.tensor([ids])} | {
        name: value.to(loaded.core.dtype) if value.is_floating_point() else value for name, value in images.items()
    }


# ----------------------------------------------------------------------------------------------------
# `relook export --for ENGINE`: a model as a folder that vLLM, SGLang or `transformers serve` loads by itself.
#
# These engines know LLaVA's own layers and no others, so LoRA, head and projector are merged, and a post decoder is
# refused. What they read was taken from their sources; docs/serving.md says which.

# SGLang takes a tower for CLIP by this word in its path.
CLIP_FOLDER = f"clip_{TOWER_FOLDER}"
# Settings of generation that all three read, or that change no text.
FOLLOWED = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k", "use_cache"),
    *("output_attentions", "output_hidden_states", "transformers_version", "_from_model_config", "max_new_tokens"),
}


def export_for(source: Path, out: Path, engine: str, how: Writing) -> float | None:
    """Write a model or a training run for an engine; returns the largest difference of logits.

    Args:
        engine: "vllm", "sglang" or "transformers-serve".

    Raises:
        CheckpointError: there is no such engine, or it cannot run this model: the error says why, and what can.
    """
    if engine not in WRITERS:
        raise CheckpointError(f"There is no engine {engine!r}.", f"Known ones: {', '.join(WRITERS)}.")
    opened = open_source(source, vision_tower=how.vision_tower)
    if has_post_decoder(opened.config):
        raise CheckpointError(
            f"{source} has a post decoder, which looks at the image again at every token; {engine} has no such layer.",
            "Use relook serve. Heads, LoRA and projectors alone can be exported for it.",
        )
    return write_model(opened, out, WRITERS[engine], how)


def _write_plain(source: ModelSource, folder: Path, shard_bytes: int) -> None:
    """transformers' format as version 4 reads it too, which vLLM runs on."""
    write_hf(source, folder, shard_bytes)
    config = read_object(folder / "config.json")
    text = config["text_config"]
    text |= rope_settings(text)
    text["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text["model_type"]]]
    text["tie_word_embeddings"] = source.config.tie_word_embeddings
    write_json(folder / "config.json", config)
    _write_speech(source, folder, _processor(source))


def _write_sglang(source: ModelSource, folder: Path, shard_bytes: int) -> None:
    """liuhaotian's format, with what SGLang looks for beside it: a CLIP folder of that name, and a processor."""
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
    for name in SENTENCEPIECE:  # they know no <image>
        (folder / name).unlink(missing_ok=True)
    processor = _processor(source)
    said = read_object(folder / "config.json") | {
        "model_type": "llava",  # transformers' class: the one that it knows
        "mm_vision_tower": CLIP_FOLDER,
        "image_token_index": config.image_token_id,
        "tie_word_embeddings": config.tie_word_embeddings,
    }
    if getattr(processor.image_processor, "do_pad", False):  # SGLang lays the square itself
        processor.image_processor.do_pad, said["image_aspect_ratio"] = False, "pad"
    write_json(folder / "config.json", said)
    _write_speech(source, folder, processor)


def _processor(source: ModelSource) -> Any:
    processor = source.processor()
    if source.kind == "llava":
        processor.image_processor.do_pad = getattr(source.config, "image_aspect_ratio", "") == "pad"
    return processor


def _write_speech(source: ModelSource, folder: Path, processor: Any) -> None:
    """Processor, chat template and settings of generation, in the files of transformers 4 and 5 at once."""
    processor.chat_template = processor.tokenizer.chat_template = chat_template(source, processor)
    processor.save_pretrained(folder)
    said = read_object(folder / "processor_config.json")
    images = said.pop("image_processor")
    write_json(folder / "processor_config.json", said)
    write_json(folder / "preprocessor_config.json", images | {"processor_class": said["processor_class"]})
    tokenizer = read_object(folder / "tokenizer_config.json")
    special = tokenizer.pop("extra_special_tokens", [])
    kept = {key: value for key, value in tokenizer.items() if key not in ("backend", "is_local", "local_files_only")}
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": special}
    named["model_input_names"] = ["input_ids", "attention_mask"]  # else version 4 adds token_type_ids
    write_json(folder / "tokenizer_config.json", kept | named)
    _write_generation(source, folder, processor.tokenizer)


def _write_generation(source: ModelSource, folder: Path, tokenizer: Any) -> None:
    settings, stop = source.generation_config(), get_template(source.template).stop
    if stop in tokenizer.get_added_vocab():
        ends = settings.eos_token_id if isinstance(settings.eos_token_id, list) else [settings.eos_token_id]
        settings.eos_token_id = sorted({*ends, tokenizer.convert_tokens_to_ids(stop)} - {None})
    elif stop:
        say(f"  answers end with {stop!r}, which is no token: requests must send it as `stop`", style="yellow")
    left = [name for name, value in settings.to_diff_dict().items() if value and name not in FOLLOWED]
    if left:
        say(f"  not every engine follows {some(left)} of generation_config.json", style="yellow")
    settings.save_pretrained(folder)


def chat_template(source: ModelSource, processor: Any) -> str:
    """The model's conversation template for `apply_chat_template`, checked against what relook's encoder writes.

    Raises:
        CheckpointError: no template gives this tokenizer the prompts that the model was tuned with.
    """
    template, tokenizer = get_template(source.template), processor.tokenizer
    marked = getattr(source.config, "mm_use_im_start_end", False)
    encoder = Encoder(tokenizer, template, source.config.image_token_id, 1, image_start_end=marked)
    said = [Turn(with_image("What is this?"), "A cup."), Turn("And where is it?", "")]
    wanted = list(encoder.prompt(said[-1].prompt, 1, said[:-1]))
    asked = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
        {"role": "user", "content": "And where is it?"},
    ]
    image = IM_START + IMAGE + IM_END if marked else IMAGE
    for line in (f"{image}\n", f"{image} \n"):  # text after an image is tokenised alone: some tokenizers need the space
        made = _jinja(template, line, wanted[0] == tokenizer.bos_token_id)
        text = processor.apply_chat_template(asked, chat_template=made, add_generation_prompt=True)
        if tokenizer(text, add_special_tokens=False)["input_ids"] == wanted:
            return made
    raise CheckpointError(
        f"No chat template gives the tokenizer of {source.path} the prompts of {source.template}.", "Use relook serve."
    )


def _jinja(template: Template, image: str, bos: bool) -> str:
    """A template in Jinja. As in `relook serve`: what comes before an answer is one turn, its images first, then its
    texts, each on a line of its own; a system message is one of them."""
    first, later, cue, lead, end = (
        json.dumps(text) for text in (template.first, template.later, template.cue, template.lead, template.end)
    )
    turn = f"{{{{ ({later} if ns.later else {first}) + ns.images + ns.texts | join('\\n') + {cue} }}}}"
    return (
        ("{{ bos_token }}" if bos else "") + "{% set ns = namespace(later=false, images='', texts=[]) %}"
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


WRITERS: dict[str, Callable[[ModelSource, Path, int], None]] = {
    "vllm": _write_plain,
    "sglang": _write_sglang,
    "transformers-serve": _write_plain,
}
