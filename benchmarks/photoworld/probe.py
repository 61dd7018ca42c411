"""The headroom gate: does the image hold more about an asked object than the trunk's last state says at the answer?

The image is the tower's features before the projector: averaged as the trunk gets them, and all patches.
Probes are trained on questions about the pair scenes and scored on the test scenes' adversarial questions (dev scenes
before a choice is final), as areas under the ROC curve by size of the object, with intervals over images.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from changed import averaged
from llava import PATCHES, auc, auc_by_size, device, normalised
from scenes import CLASSES, Scene
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration
from work import Paths, Sizes, load_pixels, picture_of, read_scenes

from relook.evaluate.tasks.pope import question_text
from relook.files import read_records
from relook.toyworld.build import select

Asked = tuple[int, str]  # number of the scene, name of the object


class Probe(nn.Module):
    """An MLP on the last state, and optionally on what one attention over the patches finds with it as the query.

    Args:
        hidden: width of the last state.
        width: of the patches; 0 reads none.
    """

    def __init__(self, hidden: int, width: int, size: int = 512, heads: int = 8) -> None:
        super().__init__()
        self.attends, self.heads = width > 0, heads
        inner = hidden + size * self.attends
        if self.attends:
            self.query, self.key, self.value = (nn.Linear(n, size) for n in (hidden, width, width))
        self.out = nn.Sequential(nn.Linear(inner, size), nn.GELU(), nn.Dropout(0.2), nn.Linear(size, 1))

    def forward(self, states: Tensor, patches: Tensor) -> Tensor:
        states = F.dropout(states, 0.1, self.training)
        if self.attends:
            # (B, size) -> (B, heads, 1, size / heads); (B, patches, size) -> (B, heads, patches, size / heads)
            query = self.query(states).unflatten(-1, (self.heads, -1)).unsqueeze(2)
            key, value = (f(patches).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.key, self.value))
            seen = F.scaled_dot_product_attention(query, key, value).flatten(1)
            states = torch.cat([states, F.dropout(seen, 0.1, self.training)], 1)
        scores: Tensor = self.out(states)[:, 0]
        return scores


def training_questions(drawn: list[Scene]) -> list[Asked]:
    asked: list[Asked] = []
    for number, scene in enumerate(drawn):
        rng = random.Random(f"probe/{number}")
        absent = [name for name in scene.usual if name not in scene.names]
        for names in (sorted(scene.names), absent):
            asked += [(number, name) for name in rng.sample(names, min(5, len(names)))]
    return asked


def adversarial_questions(paths: Paths, split: str, pictures: list[str]) -> list[Asked]:
    """The adversarial split's questions, each once."""
    names = {question_text(name): name for name in CLASSES}
    numbers = {name: number for number, name in enumerate(pictures)}
    records = read_records(paths.data(split) / "pope" / "coco_pope_adversarial.json")
    return sorted({(numbers[record["image"]], names[record["text"]]) for record in records})


@torch.no_grad()
def read_states(model: Any, processor: Any, pixels: Tensor, asked: list[Asked]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the last states (Q, hidden), the logits of Yes minus No (Q,), and the patches of all images (N, M, V)."""
    where, tokenizer = device(), processor.tokenizer
    yes, no = (tokenizer(f" {word}").input_ids[0] for word in ("Yes", "No"))
    prompts = [f"USER: {'<image>' * PATCHES}\n{question_text(name)} ASSISTANT:" for _, name in asked]
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    states, margins = torch.zeros(len(asked), model.config.text_config.hidden_size), torch.zeros(len(asked))
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(ids):
        by_length.setdefault(len(row), []).append(number)
    for group in by_length.values():
        for start in range(0, len(group), 256):
            part = group[start : start + 256]
            images = normalised(pixels[[asked[i][0] for i in part]].to(where)).to(model.dtype)
            inputs = torch.tensor([ids[i] for i in part], device=where)
            last = model.model(input_ids=inputs, pixel_values=images).last_hidden_state[:, -1]
            logits = model.lm_head(last).float()
            states[part], margins[part] = last.float().cpu(), (logits[:, yes] - logits[:, no]).cpu()
    patches = []
    for part in pixels.split(256):
        images = normalised(part.to(where)).to(model.dtype)
        patches.append(select(model.model.vision_tower(images, output_hidden_states=True)).cpu())
    return states, margins, torch.cat(patches)


def run(paths: Paths, sizes: Sizes, split: str = "dev") -> dict[str, Any]:
    where = device()
    dtype = torch.bfloat16 if where == "cuda" else torch.float32
    model = LlavaForConditionalGeneration.from_pretrained(paths.base, dtype=dtype).to(where).eval()
    processor = AutoProcessor.from_pretrained(paths.base)
    sides = []
    for name in ("pairs", split):
        drawn = read_scenes(paths, name)
        pictures = [picture_of(paths.data(name), name, number).name for number in range(len(drawn))]
        asked = training_questions(drawn) if name == "pairs" else adversarial_questions(paths, name, pictures)
        states, margins, patches = read_states(model, processor, load_pixels(paths, name)[0], asked)
        largest = [max((item.size for item in drawn[i].objects if item.name == name), default=0.0) for i, name in asked]
        images = torch.tensor([i for i, _ in asked])
        sides.append((states.to(where), margins, patches.to(where), images.to(where), np.array(largest)))
    (states, _, patches, images, sizes_seen), (test_states, margins, test_patches, test_images, test_sizes) = sides
    mean, scale = states.mean(0), states.std(0) + 1e-6
    center, spread = patches.float().mean((0, 1)), patches.float().std((0, 1)) + 1e-6
    labels = torch.tensor(sizes_seen > 0, dtype=torch.float32, device=where)

    def inputs(states: Tensor, patches: Tensor, images: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        seen = (patches[images[at]].float() - center) / spread
        return (states[at] - mean) / scale, averaged(seen, sizes.trunk_grid) if "cells" in name else seen

    scores = {"yes - no": margins.numpy()}
    reads = ["state", "state + patches"]
    if sizes.trunk_grid:
        reads.insert(1, "state + trunk's cells")
    for name in reads:
        torch.manual_seed(0)
        probe = Probe(states.shape[1], 0 if name == "state" else patches.shape[2]).to(where)
        optimizer = torch.optim.AdamW(probe.parameters(), 1e-3, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=sizes.probe_steps)
        for _ in range(sizes.probe_steps):
            at = torch.randint(len(labels), (256,), device=where)
            loss = F.binary_cross_entropy_with_logits(probe(*inputs(states, patches, images, at)), labels[at])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        probe.eval()
        with torch.no_grad():
            parts = torch.arange(len(test_states), device=where).split(256)
            found = [probe(*inputs(test_states, test_patches, test_images, at)) for at in parts]
        scores[name] = torch.cat(found).cpu().numpy()
    groups = test_images.cpu().numpy()
    return {
        "questions": [len(labels), len(test_states)],
        "auc": {name: auc_by_size(values, test_sizes) for name, values in scores.items()},
        "headroom": {name: difference(scores["state"], scores[name], test_sizes, groups) for name in reads[1:]},
    }


def difference(first: np.ndarray, second: np.ndarray, sizes: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
    """Return AUC(second) - AUC(first), with a 95 % interval from resampling images."""
    dice = np.random.default_rng(0)
    rows = {group: np.nonzero(groups == group)[0] for group in np.unique(groups)}
    keys = list(rows)

    def gain(at: np.ndarray) -> float:
        present = sizes[at] > 0
        return auc(second[at][present], second[at][~present]) - auc(first[at][present], first[at][~present])

    draws = [gain(np.concatenate([rows[keys[i]] for i in dice.integers(0, len(keys), len(keys))])) for _ in range(500)]
    return {"difference": gain(np.arange(len(sizes))), "ci": np.percentile(draws, (2.5, 97.5)).tolist()}
