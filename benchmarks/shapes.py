"""What the benchmarks share: LLaVA-1.5-7B's shape with random weights, data of usual sizes, the card's own speed.

Speed does not depend on the weights. Two rows of lm_head are made long, so that first answer tokens are Yes or No, as
a trained model's are.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers.models import WordLevel
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from relook.data.images import GRID, prefetch_map
from relook.evaluate.tasks.pope import SPLITS, question_text
from relook.files import write_json
from relook.generate.attention import PoolShape
from relook.model.load import LoadedModel, add_post_decoder, load_model
from relook.toyworld.build import make_processor
from relook.toyworld.world import vocabulary
from relook.train.trainer import RelookTrainer

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
LLAVA_7B = {
    "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "text": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "vocabulary": 32064,
    "image_size": 336,
}
QWEN_7B = {  # Qwen2.5-VL's, with pictures that take 588 positions
    "family": "Qwen2_5_VL",
    "vision": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
    "text": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vocabulary": 152064,
    "picture": (784, 588),
}
TINY_QWEN = {
    "family": "Qwen2_5_VL",
    "vision": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    },
    "text": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
    },
    "vocabulary": 320,
    "picture": (112, 84),
}
TINY = {
    "vision": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "vocabulary": 320,
    "image_size": 56,
}
# By family: the real one, and a tiny one for a CPU.
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llava": (LLAVA_7B, TINY),
    "qwen2_5_vl": (QWEN_7B, TINY_QWEN),
}
CHAT = (  # in the manner of Qwen's, with the end mark of the benchmarks' tokenizer
    "{% for message in messages %}{% if message['role'] == 'user' %}<|im_start|>{% endif %}{% for c in "
    "message['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>' if message['role'] == 'user' else '</s>' }}{% endfor %}"
)
QWEN_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
# LLaVA-NeXT cuts an image into up to four tiles of the tower's size, and looks at the whole of it besides.
LLAVA_NEXT_7B = LLAVA_7B | {"tiles": ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))}
TINY_NEXT = TINY | {"tiles": ((1, 2), (2, 1), (2, 2))}
Question = tuple[Path, str]
RESPONSE = 109  # words of a description, which </s> ends


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def device_name() -> str:
    return torch.cuda.get_device_name() if GPU else "cpu"


def sync() -> None:
    if GPU:
        torch.cuda.synchronize()


def peak() -> float:
    return round(torch.cuda.max_memory_allocated() / 2**30, 1) if GPU else 0.0


def random_model(shape: dict[str, Any], answers: bool = True, dtype: torch.dtype = DTYPE) -> tuple[Any, Any]:
    """A model with random weights, made where it runs, and its processor.

    Args:
        answers: whether its first words are Yes or No, which a language-model loss does not bear.
    """
    processor = processor_of(shape)
    token = processor.tokenizer.convert_tokens_to_ids
    ids = {f"{name}_token_id": token(text) for name, text in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))}
    config = _qwen_config(shape, token, ids) if "family" in shape else _llava_config(shape, token, ids)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(DEVICE):
        model = AutoModelForImageTextToText.from_config(config)
    torch.set_default_dtype(torch.float32)
    if answers:
        with torch.no_grad():
            long = 3000 * torch.randn_like(model.lm_head.weight[0])
            model.lm_head.weight[token("▁Yes")], model.lm_head.weight[token("▁No")] = long, -long
    for name, id in ids.items():
        setattr(model.generation_config, name, id)
    return model.eval(), processor


def _llava_config(shape: dict[str, Any], token: Callable[[str], int], ids: dict[str, int]) -> Any:
    text = {**shape["text"], "vocab_size": shape["vocabulary"], "max_position_embeddings": 4096, **ids}
    arguments: dict[str, Any] = {
        "vision_config": CLIPVisionConfig(**shape["vision"], image_size=shape["image_size"], patch_size=14),
        "text_config": LlamaConfig(**text),
        "image_token_index": token("<image>"),
        "image_seq_length": positions_of_image(shape),
        "vision_feature_layer": -2,
        "tie_word_embeddings": False,
    }
    tiles = "tiles" in shape
    return LlavaNextConfig(**arguments, image_grid_pinpoints=pinpoints(shape)) if tiles else LlavaConfig(**arguments)


def _qwen_config(shape: dict[str, Any], token: Callable[[str], int], ids: dict[str, int]) -> Qwen2_5_VLConfig:
    text = {**shape["text"], "vocab_size": shape["vocabulary"], "max_position_embeddings": 4096, **ids}
    names = ("vision_start", "vision_end", "image", "video")
    return Qwen2_5_VLConfig(
        vision_config=dict(shape["vision"]),
        text_config=text | {"tie_word_embeddings": False},
        tie_word_embeddings=False,
        **{f"{name}_token_id": token(mark) for name, mark in zip(names, QWEN_SPECIAL[2:], strict=True)},
    )


def positions_of_image(shape: dict[str, Any]) -> int:
    """Positions that the language model reads of a picture."""
    if "family" in shape:
        width, height = shape["picture"]
        return int((width // 28) * (height // 28))  # patches of 14 pixels, merged by two ways
    return int((shape["image_size"] // 14) ** 2)


def pinpoints(shape: dict[str, Any]) -> list[list[int]]:
    """Return the sizes, height and width, that a LLaVA-NeXT cuts images to."""
    return [[rows * shape["image_size"], columns * shape["image_size"]] for rows, columns in shape["tiles"]]


def processor_of(shape: dict[str, Any]) -> Any:
    """Toyworld's processor at a shape's image size, with words w0, w1, ... up to the size of its vocabulary."""
    processor: Any = make_processor()
    if "family" in shape:
        tokenizer = processor.tokenizer
        ids = tokenizer.get_vocab()
        tokenizer.backend_tokenizer.model = WordLevel(
            ids | {f"▁w{i}": i for i in range(len(ids), shape["vocabulary"] - len(QWEN_SPECIAL))}, unk_token="<unk>"
        )
        tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_SPECIAL)})
        images, parts = (
            Qwen2VLImageProcessorPil(),
            [part for part in Qwen2_5_VLProcessor.get_attributes() if part != "video_processor"],
        )
        without_videos: Any = type(
            "Qwen2_5_VLProcessor", (Qwen2_5_VLProcessor,), {"get_attributes": classmethod(lambda _: parts)}
        )
        return without_videos(images, tokenizer, chat_template=CHAT)
    side = {"height": shape["image_size"], "width": shape["image_size"]}
    size: dict[str, Any] = {"size": {"shortest_edge": shape["image_size"]}, "crop_size": side}
    ids = processor.tokenizer.get_vocab()
    ids |= {f"▁w{i}": id for i, id in enumerate(range(len(ids), shape["vocabulary"]))}
    processor.tokenizer.backend_tokenizer.model = WordLevel(ids, unk_token="<unk>")
    if "tiles" in shape:
        return LlavaNextProcessor(
            LlavaNextImageProcessorPil(**size, image_grid_pinpoints=pinpoints(shape)),
            processor.tokenizer,
            patch_size=14,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    processor.image_processor = CLIPImageProcessorPil(**size)
    processor.patch_size = 14
    return processor


def endless_model(
    shape: dict[str, Any],
    post_decoder: int = 0,
    dtype: torch.dtype = DTYPE,
    bits: int = 16,
    attention: str = "cross",
    lora: int = 0,
) -> LoadedModel:
    """A random model whose answers no token ends, so that each has as many tokens as were asked for.

    Args:
        post_decoder: its blocks, of such `attention`; 0 for none.
        bits: below 16, its language model's linears are quantised: it is written and loaded as a user's is.
        lora: rank of an adapter on its language model that is not merged; 0 for none.
    """
    model: Any
    model, processor = random_model(shape, answers=False, dtype=dtype)
    if post_decoder:
        model = add_post_decoder(model, {"depth": post_decoder, "attention": attention}, None)
    of_qwen = "family" in shape
    loaded = LoadedModel(model.eval(), processor, Path(), "" if of_qwen else "pad", "chat" if of_qwen else "llava_hf")
    if bits < 16:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            del model, loaded.model
            loaded = load_model(folder, dtype=dtype, bits=bits, device=DEVICE)
    if lora:
        config = LoraConfig(r=lora, target_modules=r".*language_model.*_proj")
        loaded.model = get_peft_model(loaded.model, config, autocast_adapter_dtype=False).eval()
    loaded.core.generation_config.eos_token_id = None
    return loaded


def write_model(folder: Path, shape: dict[str, Any], answers: bool = True) -> Path:
    """A `random_model` as a llava-hf folder."""
    if not (folder / "processor_config.json").exists():
        model, processor = random_model(shape, answers)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return folder


def write_images(paths: list[Path], size: tuple[int, int] = (500, 375)) -> None:
    """JPEG files, of Visual Genome's usual size if of no other."""
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for _ in prefetch_map(partial(_write_image, size), paths):
        pass


def _write_image(size: tuple[int, int], path: Path) -> None:
    small = Image.frombytes("RGB", (25, 19), random.Random(path.name).randbytes(25 * 19 * 3))
    small.resize(size, Image.Resampling.BICUBIC).save(path, quality=90)


def write_questions(folder: Path, processor: Any, images: int, questions_per_image: int, tokens: int) -> list[Question]:
    """Questions of so many random tokens on each of new images, no two alike: of a prompt only the image is shared."""
    rng, words = random.Random(0), sorted(word[1:] for word in processor.tokenizer.get_vocab() if word.startswith("▁"))
    paths = [folder / f"{number}.jpg" for number in range(images)]
    write_images(paths)
    return [(path, " ".join(rng.choices(words, k=tokens))) for path in paths for _ in range(questions_per_image)]


def write_pairs(
    folder: Path,
    images: int,
    descriptions: int,
    questions: int,
    context: int = 0,
    size: tuple[int, int] = (500, 375),
    response: int = RESPONSE,
) -> None:
    """HA-DPO's files over Visual Genome's layout: one description pair, or some question pairs, an image.

    Args:
        context: words that both descriptions of a pair begin with, as its context.
        size: width and height of the pictures.
        response: words of each description after that.
    """
    if (folder / "desc_data.json").exists():
        return
    rng, words = random.Random(1), [word for word in vocabulary() if word.isalpha()]
    text = lambda count: " ".join(rng.choice(words) for _ in range(count))  # noqa: E731
    names = [f"{number}.jpg" for number in range(1, images + 1)]
    write_images([folder / "VG_100K" / name for name in names], size)
    urls = [{"image_id": n, "url": f"https://x/VG_100K/{name}"} for n, name in enumerate(names, 1)]
    write_json(folder / "image_data.json", urls)
    described: dict[str, Any] = {}
    for number in range(1, descriptions + 1):
        before = f"{text(context)} " if context else ""
        sides = {side: [before + text(response)] for side in ("chosen", "rejected")}
        described[str(number)] = {**sides, **({"context": before.strip()} if context else {})}
    write_json(folder / "desc_data.json", described)
    question_pairs = [
        {
            "image_id": descriptions + 1 + n % max(1, images - descriptions),
            "question": f"{question_text(rng.choice(words))} {n}",
            "chosen": f"No, {text(9)}.",
            "reject": f"Yes, {text(9)}.",
            "answer": "no",
            "correct": False,
        }
        for n in range(questions)
    ]
    write_json(folder / "pope_data.json", question_pairs)


def write_pope(folder: Path, images: int) -> None:
    """Three splits of six questions an image; the yes-questions are the same in all, as in the original files."""
    if (folder / "pope").exists():
        return
    names = [f"COCO_val2014_{number:012d}.jpg" for number in range(images)]
    write_images([folder / "val2014" / name for name in names])
    for s, split in enumerate(SPLITS):
        lines = []
        for name in names:
            for k in range(6):
                object_name = f"thing {k}" if k % 2 == 0 else f"thing {k} of {s}"
                label = "yes" if k % 2 == 0 else "no"
                record = {
                    "question_id": len(lines) + 1,
                    "image": name,
                    "text": question_text(object_name),
                    "label": label,
                }
                lines.append(json.dumps(record))
        path = folder / "pope" / f"coco_pope_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))


def matmul() -> dict[str, float]:
    """TFLOP/s of a large matrix product: the best of many, and over two seconds, when the card is warm from work."""
    size = 8192 if GPU else 512
    a, b = (torch.randn(size, size, dtype=DTYPE, device=DEVICE) for _ in range(2))
    times = []
    start = time.perf_counter()
    while time.perf_counter() - start < 2:
        sync()
        started = time.perf_counter()
        a @ b
        sync()
        times.append(time.perf_counter() - started)
    flops = 2 * size**3 / 1e12
    return {"best_tflops": round(flops / min(times), 3), "sustained_tflops": round(flops * len(times) / sum(times), 3)}


def bandwidth() -> float:
    """Bytes a second that a copy reads and writes together: the best of several."""
    source = torch.empty(2**30 if GPU else 2**24, dtype=torch.uint8, device=DEVICE)
    target, seconds = torch.empty_like(source), []
    for _ in range(10):
        sync()
        started = time.perf_counter()
        target.copy_(source)
        sync()
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(seconds)


def step_bytes(core: Any, positions: int) -> int:
    """Bytes that a step must read: the language model's weights, and keys and values of so many positions."""
    read = (core.model.language_model.layers, core.lm_head, getattr(core.model, "post_decoder", None))
    weights = sum(p.nbytes for module in read if module is not None for p in module.parameters())
    text = core.config.text_config
    size = text.hidden_size // text.num_attention_heads
    return weights + positions * PoolShape(text.num_hidden_layers, text.num_key_value_heads, size).nbytes(core.dtype)


def flops_of_pair(shape: dict[str, Any], prompt: int, response: int, both: bool) -> float:
    """Useful TFLOP of one trunk pass over a pair: 2 a parameter of every matrix product and token, and attention.

    Args:
        both: each response with a prompt of its own; else both share one, which is what there is to compute.
    """
    text, vision = shape["text"], shape["vision"]
    tokens = 2 * (prompt + response) if both else prompt + 2 * response
    seen = prompt * prompt / 2 + 2 * response * (prompt + response / 2)  # pairs of positions that see each other
    D, M, L = text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"]
    V, W, patches = vision["hidden_size"], vision["intermediate_size"], positions_of_image(shape)
    # Keys and values may have fewer heads than queries.
    attention = (
        2 * D * D * (1 + text.get("num_key_value_heads", text["num_attention_heads"]) / text["num_attention_heads"])
    )
    language = 2 * tokens * L * (attention + 3 * D * M) + 4 * D * L * seen
    if "family" in shape:  # four patches a position; most layers attend to windows, and MLPs have gates
        whole, window = len(vision["fullatt_block_indexes"]), (vision["window_size"] // vision["patch_size"]) ** 2
        N, connector = vision["depth"], patches * (16 * V * V + 4 * V * D)
        patches *= 4
        in_windows = max(N - whole, 0) * window + min(N, whole) * patches
        tower = 2 * patches * N * (4 * V * V + 3 * V * W) + 4 * V * patches * in_windows
    else:
        N, patches = vision["num_hidden_layers"] - 1, patches + 1
        connector = patches * (V * D + D * D)
        tower = 2 * patches * N * (4 * V * V + 2 * V * W) + 4 * V * N * patches**2
    return (language + tower + 2 * connector) / 1e12


def pair_tokens(shape: dict[str, Any]) -> tuple[int, int]:
    """Positions of a pair's prompt, 50 and the image's, and of each of its answers."""
    return 50 + positions_of_image(shape), RESPONSE + 1


def pair_batch(shape: dict[str, Any], model: Any, processor: Any, pairs: int) -> dict[str, Tensor]:
    """A batch as trainers of two whole rows a pair read it: random tokens, all preferred answers first.

    Returns:
        input_ids (2 * pairs, positions), and what the model takes of a picture in each row.
    """
    prompt, answer = pair_tokens(shape)
    positions, generator = positions_of_image(shape), torch.Generator().manual_seed(0)
    draw = lambda rows, count: torch.randint(5, 60, (rows, count), generator=generator)  # noqa: E731
    image = torch.full((pairs, positions), model.config.image_token_id)
    start = torch.cat([draw(pairs, 5), image, draw(pairs, prompt - positions - 5)], 1)
    ids = torch.cat([start.repeat(2, 1), draw(2 * pairs, answer)], 1)
    inputs = processor.image_processor([Image.new("RGB", shape.get("picture", (8, 8)))] * pairs, return_tensors="pt")
    pixels = torch.randn(inputs["pixel_values"].shape, generator=generator)
    batch = {"input_ids": ids, "pixel_values": pixels.repeat(2, *[1] * (pixels.ndim - 1))}
    if GRID in inputs:
        token_types = (ids == model.config.image_token_id).long()
        batch |= {GRID: inputs[GRID].repeat(2, 1), "mm_token_type_ids": token_types}
    return batch


def training_flops_of_pair(shape: dict[str, Any], prompt: int, response: int, rank: int) -> float:
    """Useful TFLOP of a LoRA step on a pair whose answers share their prompt: the language model forward, the gradients
    of its activations, lm_head both ways, and the adapters of all linear layers three times (their own gradients,
    too). Not the vision tower, which is frozen and need not run in a step."""
    head = 2 * 2 * 2 * response * shape["vocabulary"] * shape["text"]["hidden_size"] / 1e12
    text, vision = shape["text"], dict(shape["vision"], num_hidden_layers=1, depth=0)  # of the tower, none
    D, M, L = text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"]
    adapters = 3 * 2 * (prompt + 2 * response) * L * rank * (4 * 2 * D + 3 * (D + M)) / 1e12
    return 2 * flops_of_pair({**shape, "vision": vision}, prompt, response, both=False) + head + adapters


@contextmanager
def profiled(out: Path, skip: int) -> Iterator[None]:
    """Three steps of a training inside, after `skip` others, as a table of their kernels."""

    def write(profile: Any) -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        key = "self_cuda_time_total" if GPU else "self_cpu_time_total"
        out.write_text(profile.key_averages().table(sort_by=key, row_limit=60, max_name_column_width=90))

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if GPU else [])]
    profiler = profile(activities=kinds, schedule=schedule(wait=skip, warmup=1, active=3), on_trace_ready=write)
    step = RelookTrainer.training_step

    def training_step(*arguments: Any, **more: Any) -> Any:
        loss = step(*arguments, **more)
        profiler.step()
        return loss

    RelookTrainer.training_step = training_step  # type: ignore[method-assign]
    try:
        with profiler:
            yield
    finally:
        RelookTrainer.training_step = step  # type: ignore[method-assign]
