"""The base model's parts: a vision tower trained on patch labels, and a LLaVA of it and SmolLM2-135M-Instruct."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from changed import project
from scenes import CLASSES, PATCH, SIZE, Scene
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from work import Sizes

from relook.toyworld.build import CHAT_TEMPLATE, select

PATCHES = (SIZE // PATCH) ** 2
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(1, 3, 1, 1) * 255  # CLIP's, for pixels 0 to 255
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(1, 3, 1, 1) * 255
BACKGROUND_WEIGHT, IMAGE_WEIGHT = 0.4, 8.0
HEADS = {"attn_q": 9, "attn_k": 3}
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_down": "mlp.down_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "attn_k": "self_attn.k_proj",
    "attn_q": "self_attn.q_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def normalised(pixels: Tensor) -> Tensor:
    """Normalise (B, 3, 224, 224) uint8 pixels as the image processor does."""
    return (pixels.float() - MEAN.to(pixels.device)) / STD.to(pixels.device)


class TowerProbe(nn.Module):
    """A tower and the linear probe on its selected layer that says which class each patch shows; 0 is none."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.tower = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=layers,
                num_attention_heads=width // 64,
                image_size=SIZE,
                patch_size=PATCH,
            )
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(CLASSES) + 1)
        self.offset = nn.Parameter(torch.tensor(-3.0))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of patches, (B, patches, classes + 1), and of the image's classes, (B, classes)."""
        logits = self.head(self.norm(select(self.tower(images, output_hidden_states=True)))).float()
        return logits, torch.logsumexp(logits[..., 1:] - logits[..., :1], 1) + self.offset


def train_tower(
    pixels: Tensor, labels: Tensor, width: int, layers: int, seconds: float, batch: int = 384, rate: float = 1e-3
) -> tuple[TowerProbe, dict[str, Any]]:
    """Train a tower by the clock on the device, as many steps as fit.

    Args:
        pixels: (N, 3, 224, 224) uint8.
        labels: class of each patch, (N, 14, 14) int64.
    """
    where = device()
    torch.manual_seed(0)
    pixels, labels = pixels.to(where), labels.to(where)
    net = TowerProbe(width, layers).to(where)
    optimizer = torch.optim.AdamW(net.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.02)
    weight = torch.ones(len(CLASSES) + 1, device=where)
    weight[0] = BACKGROUND_WEIGHT
    start, step, done = time.time(), 0, 0.0
    while done < 1:
        for group in optimizer.param_groups:  # a linear warm-up, then a cosine over the time that is given
            group["lr"] = rate * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * done))
        chosen = torch.randint(len(pixels), (min(batch, len(pixels)),), device=where)
        images, shown = augmented(pixels[chosen], labels[chosen])
        with torch.autocast(where, torch.bfloat16, enabled=where == "cuda"):
            patches, image = net(normalised(images))
        present = F.one_hot(shown.flatten(1), len(CLASSES) + 1).amax(1)[:, 1:].float()
        loss = F.cross_entropy(patches.flatten(0, 1), shown.flatten(), weight)
        loss = loss + IMAGE_WEIGHT * F.binary_cross_entropy_with_logits(image, present)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            if where == "cuda":
                torch.cuda.synchronize()
            done = (time.time() - start) / seconds
            if step % 400 == 0:
                print(
                    f"  tower: step {step}, loss {loss.item():.3f}, {step * batch / (time.time() - start):.0f}/s",
                    flush=True,
                )
    net.eval()
    return net, {"steps": step, "epochs": step * batch / len(pixels), "loss": loss.item()}


def augmented(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mirror half of the batches, and roll the picture by whole patches, so that labels stay exact."""
    if torch.rand(()) < 0.5:
        pixels, labels = pixels.flip(3), labels.flip(2)
    parts = []
    for images, shown in zip(pixels.chunk(4), labels.chunk(4), strict=True):
        shift = int(torch.randint(SIZE // PATCH, ()))
        parts.append((images.roll(PATCH * shift, 3), shown.roll(shift, 2)))
    return torch.cat([images for images, _ in parts]), torch.cat([shown for _, shown in parts])


@torch.no_grad()
def tower_scores(net: TowerProbe, pixels: Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """Score the probe on the setting's usual objects, present by size against absent, as areas under the ROC curve."""
    logits = torch.cat([net(normalised(part.to(device())))[1].cpu() for part in pixels.split(256)])
    rows = []
    for scene, row in zip(scenes, logits.tolist(), strict=True):
        sizes: dict[str, float] = {}
        for item in scene.objects:
            sizes[item.name] = max(sizes.get(item.name, 0), item.size)
        rows += [(row[CLASSES.index(name)], sizes.get(name, 0)) for name in scene.usual]
    return auc_by_size(np.array([r[0] for r in rows]), np.array([r[1] for r in rows]))


SIZES = {"all": (0, 1e9), "small": (0, 18), "middle": (18, 35), "large": (35, 1e9)}


def auc_by_size(scores: np.ndarray, sizes: np.ndarray) -> dict[str, float]:
    """Return the AUC of present objects of a range of sizes (pixels) against all absent ones, which have size 0."""
    result = {}
    for name, (low, high) in SIZES.items():
        present = (sizes > 0) & (sizes >= low) & (sizes < high)
        result[name] = auc(scores[present], scores[sizes == 0])
    return result


def auc(present: np.ndarray, absent: np.ndarray) -> float:
    """Return the probability that a present object scores above an absent one, ties half."""
    if not len(present) or not len(absent):
        return float("nan")
    order = np.sort(absent)
    below = np.searchsorted(order, present, "left") + np.searchsorted(order, present, "right")
    return float(below.mean() / 2 / len(absent))


# ----------------------------------------------------------------------------------------------------
# The language model and its assembly with the tower


def read_language_model(folder: Path) -> dict[str, Tensor]:
    """Dequantise SmolLM2's blocks to Llama's names, bf16.

    Raises:
        FileNotFoundError: a part is missing.
    """
    index = json.loads((folder / "index.json").read_text())
    blob = np.concatenate([np.fromfile(path, np.uint8) for path in sorted(folder.glob("part*.bin"))])
    if len(blob) != sum(row[-1] for row in index):
        raise FileNotFoundError(f"{folder} lacks a part of the language model ({len(blob):,} bytes are there).")
    state = {}
    for name, kind, shape, start, size in index:
        values = dequantised(kind, blob[start : start + size]).reshape(shape)
        layer = re.match(r"blk\.(\d+)\.(\w+)\.weight", name)
        if layer and layer[2] in HEADS:  # GGUF interleaves the halves of each head that rotate together
            heads = HEADS[layer[2]]
            values = values.reshape(heads, shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(shape)
        key = f"layers.{layer[1]}.{NAMES[layer[2]]}" if layer else {"t": "embed_tokens", "o": "norm"}[name[0]]
        state[f"{key}.weight"] = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
    return state


def dequantised(kind: str, blocks: np.ndarray) -> np.ndarray:
    if kind == "f32":
        return blocks.view(np.float32).copy()
    if kind == "q8_0":  # a scale (fp16) and 32 int8
        rows = blocks.reshape(-1, 34)
        return rows[:, 2:].copy().view(np.int8).astype(np.float32) * _half(rows[:, :2])
    rows = blocks.reshape(-1, 20)  # q4_1: a scale and a minimum (fp16), then 32 halves of bytes
    digits = np.concatenate([rows[:, 4:] & 15, rows[:, 4:] >> 4], 1).astype(np.float32)
    return _half(rows[:, :2]) * digits + _half(rows[:, 2:4])


def _half(values: np.ndarray) -> np.ndarray:
    return values.copy().view(np.float16).astype(np.float32)


def make_processor(folder: Path) -> LlavaProcessor:
    """Build the processor around the cut tokenizer, with `<image>` and `</s>` added."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        eos_token="</s>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<image>"],
    )
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def assemble(tower: CLIPVisionModel, folder: Path, layers: int) -> tuple[LlavaForConditionalGeneration, Any]:
    """Build the LLaVA; new tokens start at the mean embedding, but `</s>` as the model's own end of a turn.

    Args:
        layers: of the language model, from the first.
    """
    processor = make_processor(folder)
    tokenizer = processor.tokenizer
    state = read_language_model(folder)
    size = math.ceil(len(tokenizer) / 64) * 64
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<image>", "</s>", "<|im_end|>", "<|endoftext|>")}
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=LlamaConfig(
            vocab_size=size,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            max_position_embeddings=8192,
            bos_token_id=None,
            eos_token_id=ids["</s>"],
            pad_token_id=ids["<|endoftext|>"],
            tie_word_embeddings=True,
        ),
        image_token_index=ids["<image>"],
        image_seq_length=PATCHES,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    known = state["embed_tokens.weight"].float()
    table = known.mean(0).repeat(size, 1)
    table[: len(known)] = known
    table[ids["</s>"]] = known[ids["<|im_end|>"]]
    state["embed_tokens.weight"] = table
    own = model.model.language_model.state_dict()
    model.model.language_model.load_state_dict({key: state[key] for key in own})
    model.model.vision_tower = tower
    model.tie_weights()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, key, getattr(config.text_config, key))
    model.generation_config.suppress_tokens = [ids["<image>"], *range(len(tokenizer), size)]
    return model, processor


def align_projector(
    model: LlavaForConditionalGeneration, processor: Any, pixels: Tensor, labels: Tensor, told: Tensor, sizes: Sizes
) -> float:
    """Bring each patch near the mean embedding of the words for what it shows, in place; return the loss.

    The loss is a share of the targets' variance. LLaVA's first stage does this by captions, so objects that captions do
    not name are left out.

    Args:
        pixels: (N, 3, 224, 224) uint8.
        labels: class of each patch, (N, 14, 14) int64.
        told: (N, classes + 1) bool, whether captions would name the class.
    """
    torch.manual_seed(sizes.seed)
    where = device()
    tower, projector = model.model.vision_tower.to(where), model.model.multi_modal_projector.to(where)
    table = model.get_input_embeddings().weight.detach().to(where)
    words = [processor.tokenizer(f" {name}").input_ids for name in ("the", *CLASSES)]
    goals = torch.stack([table[ids].mean(0) for ids in words])
    optimizer = torch.optim.AdamW(projector.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=sizes.align_steps)
    for _ in range(sizes.align_steps):
        chosen = torch.randint(len(pixels), (min(64, len(pixels)),))
        with torch.no_grad():
            features = select(tower(normalised(pixels[chosen].to(where)), output_hidden_states=True))
        shown = labels[chosen].flatten(1)  # (B, patches)
        counts = told[chosen].gather(1, shown).to(where)
        errors = (project(projector, features) - goals[shown.to(where)]).pow(2).mean(-1)
        loss = errors[counts].mean() / goals.var(0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.cpu()
    return loss.item()
