"""The headroom gate: does the image hold more about an asked object than the trunk's last state says at the answer?

The image is the tower's features before the projector: averaged as the trunk gets them, and all patches.
Probes are trained on questions about the pair scenes and scored on the test scenes' adversarial questions (dev scenes
before a choice is final), as areas under the ROC curve by size of the object, with intervals over images.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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


@dataclass
class Questions:
    """Questions with what is known at their answers.

    Args:
        states: last states of the trunk, (Q, hidden).
        patches: the tower's features, (N, M, V).
        images: index of each question's image, (Q,).
        sizes: of the asked object, (Q,); 0 if it is absent.
    """

    states: Tensor
    patches: Tensor
    images: Tensor
    sizes: np.ndarray


def scores_of_probe(
    train: Questions, test: Questions, steps: int, look: Callable[[Tensor], Tensor] | None, size: int = 512
) -> np.ndarray:
    """Train a probe on some questions and return its scores of others, (Q,): above 0 for "present".

    Args:
        look: maps patches (B, M, V), of mean 0 and variance 1, to those that the probe reads; None: it reads none.
        size: width of the probe's layers.
    """
    where = train.states.device
    mean, scale = train.states.mean(0), train.states.std(0) + 1e-6
    center, spread = train.patches.float().mean((0, 1)), train.patches.float().std((0, 1)) + 1e-6
    labels = torch.tensor(train.sizes > 0, dtype=torch.float32, device=where)

    def inputs(side: Questions, at: Tensor) -> tuple[Tensor, Tensor]:
        seen = (side.patches[side.images[at]].float() - center) / spread
        return (side.states[at] - mean) / scale, look(seen) if look else seen

    torch.manual_seed(0)
    probe = Probe(train.states.shape[1], train.patches.shape[2] if look else 0, size).to(where)
    optimizer = torch.optim.AdamW(probe.parameters(), 1e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in range(steps):
        at = torch.randint(len(labels), (256,), device=where)
        loss = F.binary_cross_entropy_with_logits(probe(*inputs(train, at)), labels[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    probe.eval()
    with torch.no_grad():
        parts = torch.arange(len(test.states), device=where).split(256)
        return torch.cat([probe(*inputs(test, at)) for at in parts]).cpu().numpy()


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
        sides.append(Questions(states.to(where), patches.to(where), images.to(where), np.array(largest)))
    train, test = sides
    scores = {"yes - no": margins.numpy(), "state": scores_of_probe(train, test, sizes.probe_steps, None)}
    if sizes.trunk_grid:
        cells = partial(averaged, cells=sizes.trunk_grid)
        scores["state + trunk's cells"] = scores_of_probe(train, test, sizes.probe_steps, cells)
    scores["state + patches"] = scores_of_probe(train, test, sizes.probe_steps, lambda patches: patches)
    groups = test.images.cpu().numpy()
    return {
        "questions": [len(train.states), len(test.states)],
        "auc": {name: auc_by_size(values, test.sizes) for name, values in scores.items()},
        "headroom": {
            name: difference(scores["state"], values, test.sizes, groups)
            for name, values in scores.items()
            if name.startswith("state +")
        },
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
