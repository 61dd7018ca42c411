"""Tiny models of several families in their hub layout: real processor classes, published names and chat templates."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedTokenizerFast

from relook import LoadedModel
from relook.forward.collate import Item

PATCH = 4
SIDE = 16  # of a tile, in pixels
GRID = [[16, 16], [32, 32], [16, 32]]  # tiles of LLaVA-OneVision
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
    *("<|begin_of_image|>", "<|image|>", "<|end_of_image|>", "<|video|>"),
)

# As published, without the parts for videos, systems and tools.
CHATML = (  # Qwen2.5-VL's
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in "
    "content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}<|vision_start|>"
    "<|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# An answer ends where the next turn begins.
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>{% else %}"
    "{{ c.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# All images first, then a line break.
ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INTERNVL = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "{{ '<IMG_CONTEXT>\n' }}{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{'<|im_end|>\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n' }}{% endif %}"
)
# A space follows the colon if a text does.
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == "
    "'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{%- for message in messages -%}{%- if (message['role'] == 'assistant') -%}{%- set role = 'model' "
    "-%}{%- else -%}{%- set role = message['role'] -%}{%- endif -%}{{ '<start_of_turn>' + role + '\n' }}{%- if "
    "message['content'] is string -%}{{ message['content'] | trim }}{%- else -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}"
    "{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"
)
AYA = (
    "{{ bos_token }}{% for message in messages %}<|START_OF_TURN_TOKEN|>{{ '<|USER_TOKEN|>' if message['role'] == "
    "'user' else '<|CHATBOT_TOKEN|><|START_RESPONSE|>' }}{% for item in message['content'] %}{% if item['type'] == "
    "'text' %}{{ item['text'] }}{% elif item['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "{% if message['role'] != 'user' %}<|END_RESPONSE|>{% endif %}<|END_OF_TURN_TOKEN|>{% endfor %}"
    "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]' }}"
    "{% for block in message['content'] %}{% if block['type'] == 'text' %}{{ block['text'] }}{% else %}{{ '[IMG]' }}"
    "{% endif %}{% endfor %}{{ '[/INST]' }}{% else %}{% for block in message['content'] %}{{ block['text'] }}"
    "{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'user' %}###Human: {% else %}###Assistant: {% endif %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}<image>\n{% else %}{{ content['text'] }}"
    "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}###Assistant: {% endif %}"
)

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
# Towers that read patches of a grid, and those that read tiles.
FLAT: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TILE = TOWER | {"image_size": SIDE, "patch_size": PATCH}
SIGLIP = TILE | {"model_type": "siglip_vision_model", "vision_use_head": False}
SQUARE = {"size": {"height": SIDE, "width": SIDE}}
SPLIT = {"size": {"longest_edge": 4 * SIDE}, "max_image_size": {"longest_edge": SIDE}, "do_image_splitting": True}
TILES = SQUARE | {"crop_to_patches": True, "min_patches": 1, "max_patches": 4}
PIXELS = {"patch_size": PATCH, "merge_size": 2, "size": {"shortest_edge": 4 * 64, "longest_edge": 64 * 64}}
ROWS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
RESAMPLER = {"resampler_depth": 1, "resampler_n_heads": 2, "num_key_value_heads": 1}
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
IDEFICS = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *ROWS)


@dataclass(frozen=True)
class Kind:
    """A family's tiny model.

    Args:
        prefix: of its classes.
        images: its image processor, as module and class.
        settings: of the image processor.
        chat: its template.
        ids: settings of the config that name tokens.
        text, vision, config: further settings.
        processor: settings of the processor.
        tokens: that its tokenizer has besides SPECIAL.
        named: attributes of its tokenizer that are tokens.
        end: the token that ends an answer.
    """

    prefix: str
    images: str
    settings: dict[str, Any]
    chat: str = CHATML
    ids: dict[str, str] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=lambda: TILE)
    config: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    tokens: tuple[str, ...] = ()
    named: dict[str, str] = field(default_factory=dict)
    end: str = "<|im_end|>"


QWEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
QWEN3 = {"rope_parameters": MROPE["rope_parameters"] | {"mrope_interleaved": True}, "head_dim": 8}
LINEAR = dict.fromkeys(
    (f"linear_{name}" for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")), 4
)
KINDS = {
    "qwen2_5_vl": Kind(
        *("Qwen2_5_VL", "qwen2_vl.Qwen2VL", PIXELS),
        ids=QWEN_IDS,
        text=MROPE,
        vision=FLAT | {"window_size": 16, "fullatt_block_indexes": [1]},
    ),
    "qwen2_vl": Kind(
        *("Qwen2VL", "qwen2_vl.Qwen2VL", PIXELS),
        ids=QWEN_IDS,
        text=MROPE,
        vision={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH},
    ),
    "qwen3_vl": Kind(
        *("Qwen3VL", "qwen2_vl.Qwen2VL", PIXELS),
        ids=QWEN_IDS,
        text=QWEN3,
        vision=FLAT | {"depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
    ),
    "qwen3_5": Kind(  # a hybrid
        *("Qwen3_5", "qwen2_vl.Qwen2VL", PIXELS),
        ids=QWEN_IDS,
        text=QWEN3 | LINEAR | {"layer_types": ["linear_attention", "linear_attention", "full_attention"]},
        vision=FLAT | {"num_position_embeddings": 64},
        processor={"processor_class": "Qwen3VLProcessor"},
    ),
    "glm4v": Kind(
        *("Glm4v", "glm4v.Glm4v", PIXELS, GLM),
        ids={
            "image_token_id": "<|image|>",
            "video_token_id": "<|video|>",
            "image_start_token_id": "<|begin_of_image|>",
            "image_end_token_id": "<|end_of_image|>",
        },
        text={"rope_parameters": MROPE["rope_parameters"] | {"partial_rotary_factor": 1.0}},
        vision=FLAT | {"image_size": 32},
        end="<|user|>",
    ),
    "llava_onevision": Kind(
        *("LlavaOnevision", "llava_onevision.LlavaOnevision", SQUARE | {"image_grid_pinpoints": GRID}, ONEVISION),
        ids={"image_token_id": "<image>", "video_token_id": "<|video_pad|>"},
        vision=SIGLIP,
        config={
            "image_grid_pinpoints": GRID,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "tie_word_embeddings": False,
        },
        processor={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        tokens=("<image>",),
    ),
    "internvl": Kind(
        *("InternVL", "got_ocr2.GotOcr2", TILES, INTERNVL),
        ids={"image_token_id": "<IMG_CONTEXT>"},
        vision=TOWER | {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
        config={"downsample_ratio": 0.5, "image_seq_length": 4, "tie_word_embeddings": False},
        processor={"image_seq_length": 4},
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "smolvlm": Kind(
        *("SmolVLM", "smolvlm.SmolVLM", SPLIT, SMOLVLM),
        ids={"image_token_id": "<image>"},
        text={"model_type": "llama"},
        config={"scale_factor": 2},
        processor={"image_seq_len": 4},
        tokens=IDEFICS,
        end="<end_of_utterance>",
    ),
    "gemma3": Kind(
        *("Gemma3", "gemma3.Gemma3", SQUARE, GEMMA),
        ids={
            "image_token_id": "<image_soft_token>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        text={
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 200,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        vision=SIGLIP,
        config={"mm_tokens_per_image": 4, "tie_word_embeddings": False},
        processor={"image_seq_length": 4},
        tokens=("<start_of_turn>", "<end_of_turn>"),
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        end="<end_of_turn>",
    ),
    # Families that relook names nowhere.
    "aya_vision": Kind(
        *("AyaVision", "got_ocr2.GotOcr2", TILES, AYA),
        ids={"image_token_id": "<|IMG_PATCH|>"},
        text={"model_type": "cohere2", "sliding_window": 200, "head_dim": 8},
        vision=SIGLIP,
        config={"downsample_factor": 2, "tie_word_embeddings": False},
        processor={"patch_size": PATCH, "img_size": SIDE, "downsample_factor": 2},
        tokens=(
            *("<image>", "<|IMG_PATCH|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "TILE"),
            *("TILE_GLOBAL", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
            *("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        ),
        end="<|END_OF_TURN_TOKEN|>",
    ),
    "mistral3": Kind(
        *("Mistral3", "pixtral.Pixtral", {"size": {"longest_edge": 64}, "patch_size": {"height": 8, "width": 8}}),
        chat=MISTRAL,
        ids={"image_token_id": "[IMG]"},
        text={"model_type": "mistral", "sliding_window": None, "head_dim": 8},
        vision=TOWER | {"model_type": "pixtral", "image_size": 64, "patch_size": PATCH, "head_dim": 8},
        config={"spatial_merge_size": 2, "tie_word_embeddings": False},
        processor={"processor_class": "PixtralProcessor", "patch_size": PATCH, "spatial_merge_size": 2},
        tokens=("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    ),
    "vipllava": Kind(
        *("VipLlava", "clip.CLIP", {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE["size"]}, VICUNA),
        ids={"image_token_id": "<image>"},
        text={"model_type": "llama"},
        vision=TILE | {"model_type": "clip_vision_model"},
        config={"vision_feature_layers": [-2, -3, 1], "image_seq_length": 16},
        processor={
            "processor_class": "LlavaProcessor",
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        tokens=("<image>", "###"),
        end="###",
    ),
    "idefics2": Kind(
        *("Idefics2", "idefics2.Idefics2", {"size": {"shortest_edge": 16, "longest_edge": 32}}, SMOLVLM),
        ids={"image_token_id": "<image>"},
        text={"model_type": "mistral", "head_dim": 8},
        vision=TILE | {"image_size": 32},
        config={"perceiver_config": dict.fromkeys(("resampler_n_latents", "resampler_head_dim"), 4) | RESAMPLER},
        processor={"image_seq_len": 4},
        tokens=IDEFICS,
        end="<end_of_utterance>",
    ),
    "deepseek_vl": Kind(
        *("DeepseekVL", "deepseek_vl.DeepseekVL", SQUARE | {"min_size": 4}, CHATML.replace(QWEN_IMAGE, "<image>")),
        ids={"image_token_id": "<image>"},
        text={"model_type": "llama"},
        vision=SIGLIP,
        config={"tie_word_embeddings": False},
        processor={"num_image_tokens": 16},
        named={"image_token": "<image>"},
    ),
    "janus": Kind(
        *("Janus", "janus.Janus", SQUARE | {"min_size": 4}, CHATML.replace(QWEN_IMAGE, "<image_placeholder>")),
        ids={"image_token_id": "<image_placeholder>"},
        text={"model_type": "llama"},
        vision=TILE | {"num_image_tokens": 16, "projection_dim": 32, "mlp_ratio": 2},
        config={
            "vq_config": dict.fromkeys(
                ("base_channels", "latent_channels", "num_embeddings", "projection_dim", "image_token_embed_dim"), 32
            )
        },
        processor={"num_image_tokens": 16},
        named={
            "image_token": "<image_placeholder>",
            "boi_token": "<begin_of_image>",
            "eoi_token": "<end_of_image>",
        },
    ),
    "video_llama_3": Kind(
        *("VideoLlama3", "video_llama_3.VideoLlama3", PIXELS),
        ids={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
        text={"model_type": "qwen2"},
        vision=TOWER | {"patch_size": PATCH},
    ),
    "paddleocr_vl": Kind(
        *("PaddleOCRVL", "paddleocr_vl.PaddleOCRVL", PIXELS),
        ids=QWEN_IDS,
        text=MROPE | {"head_dim": 8},
        vision=TOWER | {"image_size": 32, "patch_size": PATCH},
        named={"image_token": "<|image_pad|>"},
    ),
    "exaone4_5": Kind(
        *("Exaone4_5_", "qwen2_vl.Qwen2VL", PIXELS),
        ids={"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"},
        text={
            "model_type": "exaone4",
            "head_dim": 8,
            "sliding_window": 200,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        vision=FLAT | {"window_size": 16, "fullatt_block_indexes": [1], "num_key_value_heads": 1},
        processor={"processor_class": "Exaone4_5_Processor"},
    ),
    "ovis2": Kind(  # refused: marks around an image have embeddings of their own
        *("Ovis2", "ovis2.Ovis2", TILES, CHATML.replace(QWEN_IMAGE, "<image>")),
        ids={"image_token_id": "<IMG_ATOM>"},
        text={"model_type": "qwen2"},
        vision=TILE | {"vocab_size": 32, "hidden_stride": 2},
        config={"vocab_size": 282, "hidden_size": 32, "visual_indicator_token_ids": [273, 275, 276, 277, 278]},
        processor={"image_seq_length": 4},
        tokens=("<image>", *(f"<IMG_{name}>" for name in ("START", "ATOM", "GRID", "COL", "ROW", "END"))),
    ),
    "paligemma": Kind(  # refused: prompts see both ways
        *("PaliGemma", "siglip.Siglip", SQUARE | {"image_seq_length": 16}),
        ids={"image_token_index": "<image>"},
        text={"model_type": "gemma", "head_dim": 8},
        vision=SIGLIP,
        config={"projection_dim": 32, "hidden_size": 32},
        named={"image_token": "<image>"},
    ),
    "got_ocr2": Kind(  # refused: its layers do not take SDPA
        *("GotOcr2", "got_ocr2.GotOcr2", SQUARE),
        ids={"image_token_index": "<image>"},
        text={"model_type": "qwen2"},
        vision={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64},
        tokens=("<image>",),
    ),
}
# The same but for their classes.
KINDS |= {
    "idefics3": replace(KINDS["smolvlm"], prefix="Idefics3", images="idefics3.Idefics3"),
    "glm46v": replace(KINDS["glm4v"], prefix="Glm46V", images="glm46v.Glm46V"),
    "qwen3_vl_moe": replace(
        KINDS["qwen3_vl"],
        prefix="Qwen3VLMoe",
        text=QWEN3 | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        processor={"processor_class": "Qwen3VLProcessor"},
    ),
}


def byte_tokenizer(kind: Kind) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges, as Qwen's but for its size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: id for id, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokens = [*dict.fromkeys((*SPECIAL, "<bos>", *kind.tokens, *kind.named.values()))]
    backend.add_special_tokens(tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>" if "bos_token" in kind.chat else None,
        eos_token="<|im_end|>" if kind.end in ("<|user|>", "###") else kind.end,
        pad_token="<|endoftext|>",
        add_bos_token=False,
        **({"extra_special_tokens": kind.named} if kind.named else {"additional_special_tokens": tokens}),
    )


def tiny_config(name: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Return the config of a tiny model of a family."""
    kind = KINDS[name]
    ends = ["<|endoftext|>", kind.end] if name in ("glm4v", "glm46v") else [tokenizer.eos_token]
    text = TEXT | {"vocab_size": len(tokenizer) + 3, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    text["eos_token_id"] = tokenizer.convert_tokens_to_ids(ends) if len(ends) > 1 else tokenizer.eos_token_id
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in kind.ids.items()}
    config: Callable[..., Any] = getattr(transformers, f"{kind.prefix}Config")
    return config(text_config=text | kind.text, vision_config=dict(kind.vision), **ids, **kind.config)


def save_trunk(folder: Path, name: str = "qwen2_5_vl", seed: int = 0) -> Path:
    """Write a tiny model with random weights as its makers publish theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = KINDS[name]
    tokenizer = byte_tokenizer(kind)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(tiny_config(name, tokenizer))
    for parameter in model.parameters():  # the usual small weights would hide what an image changes
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    name_of_module, prefix = kind.images.split(".")
    module = importlib.import_module(f"transformers.models.{name_of_module}.image_processing_pil_{name_of_module}")
    getattr(module, f"{prefix}ImageProcessorPil")(**kind.settings).save_pretrained(folder)
    settings = {"processor_class": f"{kind.prefix}Processor"} | kind.processor
    _change(folder / "processor_config.json", **settings)
    _change(folder / "preprocessor_config.json", processor_class=settings["processor_class"])
    _change(folder / "chat_template.json", chat_template=kind.chat)
    text = model.config.text_config
    _change(folder / "generation_config.json", eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id)
    if name == "qwen2_5_vl":
        _publish(folder)
    return folder


def _publish(folder: Path) -> None:
    """Write config and tensors as Qwen2.5-VL's folders have them: flat, with the names of transformers 4."""
    config = json.loads((folder / "config.json").read_text())
    text = {key: value for key, value in config.pop("text_config").items() if key not in ("model_type", "dtype")}
    rope = text.pop("rope_parameters")
    flat = text | config | {"torch_dtype": "float32"}
    flat |= {
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
        "rope_theta": rope["rope_theta"],
    }
    flat["vision_config"]["model_type"] = "qwen2_5_vl"
    images = json.loads((folder / "preprocessor_config.json").read_text())
    del images["size"]
    images |= {"min_pixels": 4 * 64, "max_pixels": 12845056}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "config.json").write_text(json.dumps(flat))
    tensors = load_file(folder / "model.safetensors")
    assert "visual.patch_embed.proj.weight" in tensors
    assert "model.layers.0.mlp.up_proj.weight" in tensors
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def _change(file: Path, **values: Any) -> None:
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | values))


def row_log_probs(loaded: LoadedModel, items: Sequence[Item]) -> Tensor:
    """Log-probs of the targets by transformers' own forward pass, one branch at a time."""
    log_probs: list[Tensor] = []
    for item in items:
        tree = item.example.tree
        for branch in tree.branches:
            ids = torch.tensor([[*tree.prefix, *branch.ids]])
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **loaded.token_types(ids)}
            inputs |= loaded.images.batch(item.example.images)
            row = loaded.core(**inputs).logits[0].log_softmax(-1)
            targets = [len(tree.prefix) + i for i, flag in enumerate(branch.supervised) if flag]
            log_probs += [row[target - 1, ids[0, target]] for target in targets]
    return torch.stack(log_probs)
