"""Tiny models of several families in their hub layout: real processor classes, published names and chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    Glm4vConfig,
    LlavaOnevisionConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
)
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PATCH = 4
GRID = [[16, 16], [32, 32], [16, 32]]  # tiles of LLaVA-OneVision
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"),
    *("<|begin_of_image|>", "<|image|>", "<|end_of_image|>", "<|video|>"),
)
# Qwen2.5-VL's own, as published, without its parts for videos and tools.
CHAT = (
    "{% set image_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in "
    "content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}<|vision_start|>"
    "<|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# GLM-4V's, likewise: an answer ends where the next turn begins.
GLM_CHAT = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}<|begin_of_image|><|image|><|end_of_image|>{% else %}"
    "{{ c.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges, as Qwen's but for its size."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: id for id, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", add_bos_token=False
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    return tokenizer


def _config(kind: str, tokenizer: PreTrainedTokenizerFast) -> Any:
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer) + 3,
        "max_position_embeddings": 2048,
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "bos_token_id": None,
        "rope_parameters": rope,
    }
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    qwen = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }
    if kind == "qwen2_5_vl":
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision, **qwen)
    if kind == "qwen2_vl":
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": PATCH}
        return Qwen2VLConfig(text_config=text, vision_config=vision, **qwen)
    if kind == "qwen3_vl":
        rope["mrope_interleaved"] = True
        vision |= {"depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        return Qwen3VLConfig(text_config=text | {"head_dim": 8}, vision_config=vision, **qwen)
    if kind == "qwen3_5":  # a hybrid
        rope |= {"mrope_interleaved": True, "partial_rotary_factor": 1.0}
        heads = {f"linear_{name}": 4 for name in ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")}
        text |= {"head_dim": 8, "layer_types": ["linear_attention", "linear_attention", "full_attention"], **heads}
        return Qwen3_5Config(text_config=text, vision_config=vision | {"num_position_embeddings": 64}, **qwen)
    if kind == "llava_onevision":
        tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
        tower |= {"model_type": "siglip_vision_model", "image_size": 16, "patch_size": PATCH, "vision_use_head": False}
        return LlavaOnevisionConfig(
            text_config={key: value for key, value in text.items() if key != "rope_parameters"},
            vision_config=tower,
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            image_grid_pinpoints=GRID,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    rope["partial_rotary_factor"] = 1.0
    marks = {"image_token_id": ids["<|image|>"], "video_token_id": ids["<|video|>"]}
    marks |= {"image_start_token_id": ids["<|begin_of_image|>"], "image_end_token_id": ids["<|end_of_image|>"]}
    text["eos_token_id"] = [ids["<|endoftext|>"], ids["<|user|>"]]
    return Glm4vConfig(text_config=text, vision_config=vision | {"image_size": 32}, **marks)


def save_trunk(folder: Path, kind: str = "qwen2_5_vl", seed: int = 0) -> Path:
    """Write a tiny model with random weights as its makers publish theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(_config(kind, tokenizer))
    for parameter in model.parameters():  # the usual small weights would hide what an image changes
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    glm = kind == "glm4v"
    images: Any
    if kind == "llava_onevision":
        images = LlavaOnevisionImageProcessorPil(size={"height": 16, "width": 16}, image_grid_pinpoints=GRID)
        settings = {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "image_token": "<|image_pad|>"}
        _change(folder / "processor_config.json", processor_class="LlavaOnevisionProcessor", **settings)
    else:
        sizes = {"patch_size": PATCH, "merge_size": 2, "size": {"shortest_edge": 4 * 64, "longest_edge": 64 * 64}}
        images = (Glm4vImageProcessorPil if glm else Qwen2VLImageProcessorPil)(**sizes)
    images.save_pretrained(folder)
    names = {
        "llava_onevision": "LlavaOnevision",
        "qwen2_5_vl": "Qwen2_5_VL",
        "qwen2_vl": "Qwen2VL",
        "qwen3_vl": "Qwen3VL",
        "qwen3_5": "Qwen3VL",
    }
    _change(folder / "preprocessor_config.json", processor_class=f"{names.get(kind, 'Glm4v')}Processor")
    _change(folder / "chat_template.json", chat_template=GLM_CHAT if glm else CHAT)
    text = model.config.text_config
    _change(folder / "generation_config.json", eos_token_id=text.eos_token_id, pad_token_id=text.pad_token_id)
    if kind == "qwen2_5_vl":
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
