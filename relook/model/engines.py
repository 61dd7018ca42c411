"""`relook export --for ENGINE`: a model as a folder that vLLM, SGLang or `transformers serve` loads by itself.

These engines know LLaVA's own layers and no others, so LoRA, head and projector are merged, and a post decoder is
refused. What they read was taken from their sources; docs/serving.md says which.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import LlavaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from relook.console import say
from relook.data.encode import Encoder
from relook.data.prompts import IM_END, IM_START, IMAGE, Template, get_template, with_image
from relook.data.samples import Turn
from relook.errors import CheckpointError, some
from relook.files import read_object, write_json
from relook.model.convert import SENTENCEPIECE, TOWER_FOLDER, Writing, write_hf, write_llava, write_model
from relook.model.formats import rope_settings
from relook.model.load import open_source
from relook.model.source import ModelSource
from relook.model.trunks import has_post_decoder

# SGLang takes a tower for CLIP by this word in its path.
CLIP_FOLDER = f"clip_{TOWER_FOLDER}"
# Settings of generation that all three read, or that change no text.
FOLLOWED = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "temperature", "top_p", "top_k", "use_cache"),
    *("output_attentions", "output_hidden_states", "transformers_version", "_from_model_config", "max_new_tokens"),
}


def export_for(source: str | Path, out: str | Path, engine: str, how: Writing) -> float | None:
    """Write a model or a training run for an engine; returns the largest difference of logits.

    Args:
        engine: "vllm", "sglang" or "transformers-serve".

    Raises:
        CheckpointError: there is no such engine, or it cannot run this model: the error says why, and what can.
    """
    source, out = Path(source), Path(out)
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
