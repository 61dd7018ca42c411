"""The base model of toyworld: transformers' LLaVA classes in small, trained by relook's own SFT until it looks.

Three steps, as LLaVA was made: a vision tower that knows objects (here by labels of its patches, not contrastively), a
projector aligned to the language model's word embeddings, and supervised tuning on noisy conversations. The noise is
what makes the model claim objects that usually come together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
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

from relook.console import progress, status
from relook.errors import CheckpointError
from relook.evaluate.run import evaluate_model
from relook.evaluate.tasks.pope import question_text, stated
from relook.files import atomic_folder, read_json, read_records, write_json
from relook.model.checkpoint import save_pretrained
from relook.model.load import load_model, model_hash
from relook.model.trainable import untie_head
from relook.recipe import load_recipe
from relook.toyworld import layouts
from relook.toyworld.world import (
    IMAGE_SIZE,
    OBJECTS,
    SETTINGS,
    Scene,
    draw_scene,
    sample_scene,
    sample_scenes,
    vocabulary,
)
from relook.train.run import train

# ----------------------------------------------------------------------------------------------------

PATCH = 16
SIDE = IMAGE_SIZE // PATCH
WIDTH = 128
SCENES = 4800
# Chosen on dev scenes (docs/toyworld.md): weights of the usual 0.02 learn nothing in this few steps, a third layer
# learns to look later, and slow rotations let a word match a patch wherever it stands.
LAYERS, INIT_STD, ROPE_THETA = 2, 0.1, 1e6
TOWER_LAYERS, TOWER_EPOCHS = 4, 12
# A patch shows few of the 24 objects: without weight on those it does, some seeds' towers stay half blind.
TOWER_POSITIVE = 10.0
GATE, GATE_SCENES = 0.85, 200
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% else %}ASSISTANT: {% for part in message['content'] %}{{ part['text'] }}{% endfor %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_base(out: str | Path, world: str | Path, seed: int, scenes: int = SCENES, **overrides: Any) -> Path:
    """Train a base model from scratch and return its folder; steps whose results exist are skipped.

    Args:
        out: where the finished model goes, in llava-hf layout.
        world: where toyworld's SFT data is written.
        seed: of scenes, weights and order of training.
        overrides: recipe keys for the SFT, e.g. `learning_rate`.
    """
    out, world = Path(out), Path(world)
    with progress("SFT scenes") as report:
        layouts.write_sft(world, seed, scenes, report)
    # A tower that knows objects, a projector aligned to word embeddings, and a language model without training.
    start = out.with_name(out.name + "-start")
    if not (start / "config.json").exists():
        drawn = [sample_scene(seed, "train", index) for index in range(scenes)]
        pixels = pixel_values(drawn)
        tower = train_tower(drawn, pixels, seed)
        model = assemble(tower, seed)
        align_projector(model, drawn, pixels, seed)
        with atomic_folder(start) as folder:
            save_pretrained(model, folder)
            make_processor().save_pretrained(folder)
    # All of it but the tower is then trained by relook's own SFT, as any other model.
    sft = out.with_name(out.name + "-sft")
    recipe = load_recipe(
        "toyworld-base",
        {
            "model_name_or_path": start,
            "output_dir": sft,
            "data_path": world / "llava" / "toyworld_mix.json",
            "image_folder": world / "llava" / "images",
            "seed": seed,
            **overrides,
        },
    )
    train(recipe)
    finish_base(sft, out)
    check_gate(out, world, seed)
    return out


def check_gate(out: Path, world: Path, seed: int) -> dict[str, Any]:
    """Ask the base dev questions and say whether it looks; the verdict is kept in `gate.json` beside the weights.

    A base that does not look answers from what is usual, and nothing measured on it means much. Questions about small
    objects do not count: its annotators overlooked them.
    """
    with progress("dev scenes") as report:
        layouts.write_eval(world, "dev", seed, GATE_SCENES, report)
    answers = out.with_name(out.name + "-gate")
    evaluate_model(out, ["pope"], world / "dev", answers, batch_size=100, max_new_tokens=8)
    scenes = {layouts.coco_name(scene): scene for scene in sample_scenes(seed, "dev", GATE_SCENES)}
    right = []
    for record in read_records(answers / "pope_random.jsonl"):
        present = {question_text(o.name): not o.small for o in scenes[record["image"]].objects}
        if present.get(record["question"], True):
            right.append(stated(record["answer"]) is (record["question"] in present))
    accuracy = sum(right) / len(right)
    verdict = {
        "right": accuracy,
        "needed": GATE,
        "passed": accuracy >= GATE,
        "seed": seed,
        "model_hash": model_hash(out),
    }
    write_json(out / "gate.json", verdict)
    if not verdict["passed"]:
        status(
            f"This base did not learn to look: {accuracy:.3f} of its dev answers are right, {GATE} is needed. "
            "Its results say little; try another --seed.",
            style="yellow",
        )
    return verdict


def finish_base(sft: Path, out: Path) -> None:
    """Copy a trained base under its final name, with lm_head untied: head regimes train it alone."""
    if out.exists():
        return
    loaded = load_model(sft)
    untie_head(loaded.model)
    with atomic_folder(out) as folder:
        save_pretrained(loaded.model, folder)
        loaded.processor.save_pretrained(folder)
        # Names without the folders of the machine that it was trained on: the file may travel.
        recipe = load_recipe(str(sft / "recipe.yaml"))
        paths = ("model_name_or_path", "output_dir", "data_path", "image_folder")
        names: dict[str, Any] = {key: Path(getattr(recipe, key)).name for key in paths}
        replace(recipe, **names).save(folder / "recipe.yaml")


def make_processor() -> LlavaProcessor:
    """Build a LLaVA processor over a word-level vocabulary; text survives encoding and decoding unchanged."""
    punctuation = [word for word in vocabulary() if not word[0].isalnum()]
    words = ["▁" + word for word in vocabulary() if word[0].isalnum()]
    ids = {token: i for i, token in enumerate([*SPECIAL, *punctuation, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), "removed"),  # also the line break after <image>
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    unk, bos, eos, pad, image = SPECIAL
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, ids[bos])])
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
        ),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token=unk,
            bos_token=bos,
            eos_token=eos,
            pad_token=pad,
            additional_special_tokens=[image],
        ),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def pixel_values(scenes: Sequence[Scene]) -> Tensor:
    """Draw scenes and normalise them as the image processor does: (scenes, 3, 96, 96) float32."""
    processor = make_processor().image_processor
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    pictures = np.stack([np.asarray(draw_scene(scene)) for scene in scenes])
    return (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255 - mean) / std


def patch_labels(scenes: Sequence[Scene], small: bool = True) -> Tensor:
    """Compute how much of each object or setting a patch shows: (scenes, patches, objects + settings) in [0, 1].

    An object counts fully for a patch once half of the patch or half of the object lies in it; small ones can be left
    out.
    """
    labels = np.zeros((len(scenes), SIDE, SIDE, len(OBJECTS) + len(SETTINGS)), dtype=np.float32)
    settings = list(SETTINGS)
    for s, scene in enumerate(scenes):
        labels[s, :, :, len(OBJECTS) + settings.index(scene.setting)] = 1
        for placed in scene.objects:
            if placed.small and not small:
                continue
            x, y, w, h = placed.box
            # The patches that the box touches, and the area of the overlap with each.
            for row in range(y // PATCH, min(SIDE, (y + h - 1) // PATCH + 1)):
                for column in range(x // PATCH, min(SIDE, (x + w - 1) // PATCH + 1)):
                    wide = min(x + w, (column + 1) * PATCH) - max(x, column * PATCH)
                    high = min(y + h, (row + 1) * PATCH) - max(y, row * PATCH)
                    share = wide * high / (0.5 * min(PATCH * PATCH, w * h))
                    label = labels[s, row, column]
                    index = OBJECTS.index(placed.name)
                    label[index] = max(label[index], min(1.0, share))
    return torch.from_numpy(labels).flatten(1, 2)


def train_tower(scenes: Sequence[Scene], pixels: Tensor, seed: int) -> CLIPVisionModel:
    """Train a CLIP vision tower until a linear probe reads off its selected layer what each patch shows; freeze it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                num_hidden_layers=TOWER_LAYERS,
                num_attention_heads=4,
                image_size=IMAGE_SIZE,
                patch_size=PATCH,
            )
        ).to(device)
        probe = nn.Linear(WIDTH, len(OBJECTS) + len(SETTINGS)).to(device)
        labels = patch_labels(scenes)
        batches = _Batches(len(scenes), 32, TOWER_EPOCHS, seed)
        optimizer, schedule = _adam([*tower.parameters(), *probe.parameters()], 2e-3, len(batches))
        weight = torch.tensor([TOWER_POSITIVE] * len(OBJECTS) + [1.0] * len(SETTINGS), device=device)
        with progress("vision tower") as report:
            for step, index in enumerate(batches, 1):
                images, targets = mirror(pixels[index], labels[index])
                logits = probe(select(tower(images.to(device), output_hidden_states=True)))
                loss = F.binary_cross_entropy_with_logits(logits, targets.to(device), pos_weight=weight)
                _step(loss, optimizer, schedule)
                report(step, len(batches), f"loss {loss.item():.4f}")
    tower.requires_grad_(False)
    return tower.cpu().eval()


def mirror(pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Flip half of the pictures, and their patches' labels, left to right: augmentation that costs nothing."""
    flipped = torch.rand(len(pixels)) < 0.5
    # (scenes, patches, labels) -> (scenes, rows, columns, labels), flipped by columns.
    grid = labels.unflatten(1, (SIDE, SIDE)).flip(2).flatten(1, 2)
    return (
        torch.where(flipped[:, None, None, None], pixels.flip(3), pixels),
        torch.where(flipped[:, None, None], grid, labels),
    )


def select(outputs: Any) -> Tensor:
    """Return LLaVA's features: the last layer but one, without the class token, (images, patches, width)."""
    features: Tensor = outputs.hidden_states[-2][:, 1:]
    return features


def assemble(tower: CLIPVisionModel, seed: int, layers: int = LAYERS) -> LlavaForConditionalGeneration:
    """Build a LLaVA model around a trained tower; the fresh language model is as wide, and tied to lm_head."""
    processor, width = make_processor(), tower.config.hidden_size
    token = processor.tokenizer.convert_tokens_to_ids
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=LlamaConfig(
            vocab_size=len(processor.tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            initializer_range=INIT_STD,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            bos_token_id=token("<s>"),
            eos_token_id=token("</s>"),
            pad_token_id=token("<pad>"),
            tie_word_embeddings=True,
        ),
        image_token_index=token("<image>"),
        image_seq_length=SIDE * SIDE,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.generation_config, key, getattr(config.text_config, key))
    # A placeholder is never an answer; sampling must not draw it.
    model.generation_config.suppress_tokens = [token("<image>"), token("<unk>"), token("<s>")]
    return model


def align_projector(
    model: LlavaForConditionalGeneration, scenes: Sequence[Scene], pixels: Tensor, seed: int, epochs: int = 4
) -> None:
    """Bring each patch near the embeddings of the words for what it shows, in place (LLaVA's first stage).

    Small objects are left out, as the annotators overlook them: only the tower knows them.
    """
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    token = make_processor().tokenizer.convert_tokens_to_ids
    words = [token("▁" + name) for name in [*OBJECTS, *SETTINGS]]
    labels = patch_labels(scenes, small=False)
    labels[..., len(OBJECTS) :] *= 0.5  # every patch shows its setting
    with torch.no_grad():
        features = torch.cat([select(tower(part, output_hidden_states=True)) for part in pixels.split(256)])
        # (scenes, patches, labels) @ (labels, width): what a patch shows, as a sum of word embeddings.
        goal = labels @ model.get_input_embeddings().weight[words]
    batches = _Batches(len(scenes), 64, epochs, seed)
    optimizer, schedule = _adam(list(projector.parameters()), 2e-3, len(batches))
    scale = goal.pow(2).mean()  # the loss is a share of the targets' own variance
    with progress("projector") as report:
        for step, index in enumerate(batches, 1):
            loss = (projector(features[index]) - goal[index]).pow(2).mean() / scale
            _step(loss, optimizer, schedule)
            report(step, len(batches), f"loss {loss.item():.3f}")


class _Batches:
    """Shuffled index batches over several epochs, from a seed of their own."""

    def __init__(self, count: int, size: int, epochs: int, seed: int) -> None:
        self.count, self.size, self.epochs, self.seed = count, size, epochs, seed

    def __len__(self) -> int:
        return self.epochs * (self.count // self.size)

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epochs):
            order = torch.randperm(self.count, generator=generator)
            yield from order[: self.count // self.size * self.size].view(-1, self.size)


def _adam(parameters: list[nn.Parameter], rate: float, steps: int) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.98), weight_decay=0.01)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)


def _step(loss: Tensor, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    schedule.step()


# ----------------------------------------------------------------------------------------------------
# The base model that ships with relook.


def shipped_base() -> Path:
    """Return the folder of the base model that was trained by `relook demo --rebuild` and ships with the package."""
    folder = Path(str(resources.files("relook.toyworld") / "base"))
    if not (folder / "config.json").exists():
        raise CheckpointError("This installation ships no base model.", "Use `relook demo --rebuild`.")
    if model_hash(folder) != read_json(folder / "gate.json")["model_hash"]:
        raise CheckpointError(f"The base model in {folder} is not the one that was shipped.", "Install relook again.")
    return folder
