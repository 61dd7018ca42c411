"""A LLaVA model of transformers' own classes, small enough to build in a test, with a real processor."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaForConditionalGeneration

from relook.toyworld.build import IMAGE_SIZE, PATCH, WIDTH, assemble


def tiny_llava(seed: int = 0) -> LlavaForConditionalGeneration:
    """Toyworld's architecture with random weights."""
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
    return assemble(tower, seed).eval()
