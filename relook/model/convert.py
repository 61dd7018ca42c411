"""`relook convert`, `merge` and `export`: a model folder written anew tensor by tensor, checked before it is named.

All three write one `ModelSource`: as it is, with a change laid on it, or a training run with its base. One shard is in
memory at a time; the check that follows holds one model at a time.
"""

from __future__ import annotations

import copy
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
from transformers import LlamaForCausalLM

from relook.console import readable_size, say
from relook.errors import CheckpointError, some
from relook.files import read_object, require_room, whole_folder, write_json
from relook.model import modeling_relook, post_decoder
from relook.model.changes import Change, read_change
from relook.model.checkpoint import write_tensors
from relook.model.formats import FROM_ANY, PROJECTOR, TO_HF, TO_LLAVA, TOWER, kind_of, rename, to_llava_config
from relook.model.load import LoadedModel, build, open_base, open_source
from relook.model.lora import PEFT_PREFIX
from relook.model.source import ModelSource
from relook.model.trunks import has_post_decoder

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


def convert(source: str | Path, out: str | Path, to: str, how: Writing = Writing()) -> float | None:
    """Write a model in another format; returns the largest difference of logits.

    Args:
        to: "hf" for transformers' format, "llava" for liuhaotian's (its tower goes into the folder `vision_tower`).

    Raises:
        CheckpointError: the source is broken, the target exists, or the formats cannot say the same.
    """
    source, out = Path(source), Path(out)
    if to not in ("hf", "llava"):
        raise CheckpointError(f"There is no format {to!r}.", "Use hf or llava.")
    return write_model(
        open_source(source, vision_tower=how.vision_tower), out, write_hf if to == "hf" else write_llava, how
    )


def merge(
    base: str | Path, change: str | Path, out: str | Path, stage: int | None = None, how: Writing = Writing()
) -> float | None:
    """Write a base with a change laid on it, in transformers' format; a post decoder brings its code along.

    Args:
        base: a model folder, or a training run, which stands for its base with what was trained.
        change: what `load_model` takes as adapter.
        stage: take a part of the change only, as replace_bin's stages did (see `Change.at_stage`); None takes all.
    """
    base, change, out = Path(base), Path(change), Path(out)
    trained = read_change(change)
    if kind_of(base) == "run":
        trained = trained.after(base)
        source = open_source(base, vision_tower=how.vision_tower or trained.tower_for(base))
    else:
        source = open_base(base, trained, how.vision_tower)
    if stage is not None:
        trained, left = trained.at_stage(stage, source)
        if left:
            say(f"  stage {stage} leaves out {len(left)} tensors of {change}: {some(left)}")
    merged = trained.lay_on(source)
    merged.check()
    return write_model(merged, out, write_hf, how)


def export(source: str | Path, out: str | Path, how: Writing = Writing()) -> float | None:
    """Write a model or a training run as a whole folder that transformers loads where relook is not installed."""
    source, out = Path(source), Path(out)
    return write_model(open_source(source, vision_tower=how.vision_tower), out, write_hf, how)


def write_model(source: ModelSource, out: Path, write: Writer, how: Writing) -> float | None:
    """Write a source under a name that appears only when all is written and checked.

    Args:
        write: writes it into a folder, in files of so many bytes at most.
    """
    _claim(source, out, how)
    difference = None
    beside = check_with_peft(source, out) if how.check else ""
    with whole_folder(out.resolve()) as folder:  # a link to a folder stays a link
        write(source, folder, int(how.shard_gb * 1e9))
        if how.check:
            difference = logit_difference(source, open_source(folder))
            if not difference <= TOLERANCE.get(source.dtype, 5e-2):  # NaN fails too
                raise CheckpointError(
                    f"The logits of the result differ by {difference:.2e}; {out} was not written.",
                    "Look at the source with relook inspect; --no-check writes it all the same.",
                )
    checked = "not checked" if difference is None else f"largest difference of logits {difference:.1e}{beside}"
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


def check_with_peft(source: ModelSource, out: Path) -> str:
    """Compare a model into which LoRA was merged with the same adapter as peft runs it; what to say of it.

    In float32, since the steps of usual adapters are less than what half precision rounds.

    Raises:
        CheckpointError: their logits differ.
    """
    if source.beneath is None or not source.beneath[1].lora:
        return ""
    needed = 4 * sum(prod(tensor.shape) for tensor in source.tensors.values())
    if needed > (free := psutil.virtual_memory().available):
        return f"; not compared with peft, for which {readable_size(needed - free)} of memory are missing"
    try:
        wanted, inputs = _logits_by_peft(*source.beneath)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        return f"; not compared with peft, which cannot load the adapter ({str(error).splitlines()[0]})"
    beneath, change = source.beneath
    merged = build(replace(change, earlier=()).lay_on(beneath, torch.float32), torch.float32)
    with torch.inference_mode():
        difference = float((merged.model(**inputs).logits - wanted).abs().max())
    if not difference <= TOLERANCE[torch.float32] * max(1.0, float(wanted.abs().max())):
        raise CheckpointError(
            f"The logits of the merged model differ from those of peft's adapter by {difference:.2e}; {out} was not "
            "written.",
            "Please report this with the adapter_config.json; --no-check writes it all the same.",
        )
    return f", from peft's own {difference:.1e}"


@torch.inference_mode()
def _logits_by_peft(beneath: ModelSource, change: Change) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of a model with an adapter beside its weights, and their inputs.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, RuntimeError: peft cannot load it, or has no layers for some of
            its tensors.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    assert change.adapter is not None
    rest, tensors = change.without_adapter()
    loaded = build(rest.lay_on(beneath, torch.float32), torch.float32)
    core = wrapped = loaded.core
    if change.has_llavas_names:  # the original's top is the language model, around which it puts the rest
        with torch.device("meta"):
            wrapped = LlamaForCausalLM(core.config.text_config)
        wrapped.model, wrapped.lm_head = core.model.language_model, core.lm_head
        named = {name: tensor.read() for name, tensor in tensors.items()}
    else:
        plain = {rename(name.removeprefix(PEFT_PREFIX), FROM_ANY): tensor for name, tensor in tensors.items()}
        named = {PEFT_PREFIX + name: tensor.read() for name, tensor in plain.items()}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(wrapped, LoraConfig.from_pretrained(str(change.adapter.file.parent))).eval()
        report = set_peft_model_state_dict(model, named)
    lost = [*report.unexpected_keys, *(name for name in report.missing_keys if ".lora_" in name)]
    if lost:
        raise ValueError(f"it has no place for {some(lost, 2)}")
    core.lm_head = wrapped.lm_head
    inputs = _small_input(loaded)
    return core(**inputs).logits, inputs


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
