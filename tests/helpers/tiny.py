"""A LLaVA model of transformers' own classes, small enough to build in a test, with a real processor and data."""

from __future__ import annotations

import copy
import functools
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM, LlavaForConditionalGeneration

from relook.evaluate.tasks.pope import question_text
from relook.files import write_json
from relook.model.load import add_post_decoder
from relook.model.modeling_relook import RelookLlavaForConditionalGeneration
from relook.model.trainable import untie_head
from relook.toyworld import layouts
from relook.toyworld.build import IMAGE_SIZE, LAYERS, PATCH, assemble, make_processor
from relook.toyworld.world import OBJECTS, describe_scene, sample_scenes

SCENES = 6
WIDTH = 64  # half of toyworld's


def tiny_llava(seed: int = 0, layers: int = LAYERS) -> LlavaForConditionalGeneration:
    """Toyworld's architecture, half as wide, with random weights; a copy of one that is built once."""
    model, state = _built_llava(seed, layers)
    torch.set_rng_state(state)  # tests go on to draw from where the weights ended
    return copy.deepcopy(model)


@functools.cache
def _built_llava(seed: int, layers: int) -> tuple[LlavaForConditionalGeneration, Tensor]:
    torch.manual_seed(seed)
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH,
        )
    )
    return assemble(tower, seed, layers).eval(), torch.get_rng_state()


def save_tiny(folder: Path, seed: int = 0, layers: int = LAYERS) -> Path:
    """The same as a model folder, lm_head untied."""
    model = tiny_llava(seed, layers)
    untie_head(model)
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def save_tied(folder: Path) -> Path:
    """A model folder whose lm_head is its input embeddings."""
    tiny_llava().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def save_biased(folder: Path) -> Path:
    """A model folder whose attention has biases; lm_head untied."""
    model = tiny_llava()
    config = model.config.text_config
    config.attention_bias, config.tie_word_embeddings, model.config.tie_word_embeddings = True, False, False
    torch.manual_seed(5)
    language = LlamaForCausalLM(config)
    model.model.language_model, model.lm_head = language.model, language.lm_head
    scramble(model.model.language_model, torch.Generator().manual_seed(1), 0.02)
    model.save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def tiny_relook(trained: bool = True, seed: int = 0, **settings: Any) -> RelookLlavaForConditionalGeneration:
    """With a post decoder; `trained` gives its zero projections weights, so that it changes what the model says."""
    model, state = _built_relook(trained, seed, json.dumps(settings))
    torch.set_rng_state(state)
    return copy.deepcopy(model)


@functools.cache
def _built_relook(trained: bool, seed: int, settings: str) -> tuple[RelookLlavaForConditionalGeneration, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    model = add_post_decoder(tiny_llava(seed), json.loads(settings), generator)
    if trained:
        scramble(model.model.post_decoder, generator)
    return model.eval(), torch.get_rng_state()


@torch.no_grad()
def scramble(module: nn.Module, generator: torch.Generator, std: float = 0.2) -> None:
    """Move every parameter by normal noise."""
    for parameter in module.parameters():
        parameter += std * torch.randn(parameter.shape, generator=generator)


def pixels(count: int, seed: int = 0) -> Tensor:
    """Random pixel values, (count, 3, 96, 96)."""
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))


def prompt(model: Any, text: str, images: int = 1) -> list[int]:
    """Token ids of an open prompt, written by hand: <s>, the images' placeholders, and the words."""
    words = make_processor().tokenizer(f"USER: {text} ASSISTANT:", add_special_tokens=False)["input_ids"]
    return [1, *[model.config.image_token_id] * (images * (IMAGE_SIZE // PATCH) ** 2), *words]


def left_padded(rows: Sequence[Sequence[int]], pad: int = 3) -> dict[str, Tensor]:
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(ids)) + list(ids) for ids in rows]),
        "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in rows]),
    }


def write_world(root: Path, scenes: int = SCENES, seed: int = 0) -> Path:
    """Toyworld's parts, and preference pairs of different lengths: `desc_data.json`, `pope_data.json`."""
    layouts.write_vg(root, seed, scenes)
    layouts.write_sft(root, seed, scenes)
    layouts.write_eval(root, "test", seed, scenes)
    rng = random.Random(seed)
    described: dict[str, Any] = {}
    asked: list[dict[str, Any]] = []
    for scene in sample_scenes(seed, "pairs", scenes):
        absent = [name for name in OBJECTS if name not in scene.names]
        wrong = [*scene.names, *rng.sample(absent, 2)]
        described[str(scene.id)] = {
            "chosen": [describe_scene(scene.names, scene.setting)],
            "rejected": [describe_scene(wrong, scene.setting)],
        }
        for name, truth in ((scene.names[0], "Yes."), (absent[0], "No.")):
            other = "No." if truth == "Yes." else "Yes."
            entry = {"image_id": scene.id, "question": question_text(name), "chosen": truth, "reject": other}
            asked.append({**entry, "answer": other, "correct": False})
    write_json(root / "desc_data.json", described)
    write_json(root / "pope_data.json", asked)
    return root


def dpo_keys(base: Path, world: Path, out: Path, **keys: Any) -> dict[str, Any]:
    """Recipe keys of a short DPO run on that world."""
    data = {"vg_path": world / "vg"} | {f"{k}_data_path": world / f"{k}_data.json" for k in ("desc", "pope")}
    return {"task": "dpo", **data, **_short_run(base, out), **keys}


def sft_keys(base: Path, world: Path, out: Path, **keys: Any) -> dict[str, Any]:
    """Recipe keys of a short SFT run on that world."""
    data = {"data_path": world / "llava" / "toyworld_mix.json", "image_folder": world / "llava" / "images"}
    return {"task": "sft", **data, **_short_run(base, out), **keys}


def _short_run(base: Path, out: Path) -> dict[str, Any]:
    return {
        "version": "llava_hf",
        "model_name_or_path": base,
        "output_dir": out,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "num_train_epochs": 1,
        "use_cpu": True,
        "logging_steps": 1,
    }


def tilted(states: Tensor) -> Tensor:
    """States with uneven weights. As a norm gives them their squares have one sum whatever they are: no gradient."""
    return states * torch.linspace(0.5, 1.5, states.shape[-1], device=states.device)
