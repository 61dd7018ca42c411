"""The frozen trunk at LLaVA-1.5-7B's shape: cache pass, later epochs, and a sweep, beside the HA-DPO way, in one run.

    python benchmarks/frozen_trunk.py --work DIR --out frozen_trunk.json     # one GPU with 80 GB, 20 GB of disk
    python benchmarks/frozen_trunk.py --work DIR --tiny                      # the same code on a CPU, in a minute

The weights are random: speed does not depend on them. Two rows of lm_head are made long, so that first answer tokens
are Yes or No, as a trained model's are. Everything goes through files, recipes and commands as real work does: images
are read from JPEG files, models from safetensors. The HA-DPO way: both rows of every pair in full, policy and
reference, full logits in float32, trunk frozen, lm_head trains.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from relook.data.ahead import ahead
from relook.evaluate.pope import SPLITS, question_text
from relook.files import read_json, write_json
from relook.model.load import model_hash
from relook.recipe import Recipe, build_recipe
from relook.sweep import run_sweep
from relook.toyworld.build import make_processor
from relook.toyworld.speech import vocabulary
from relook.train import cache
from relook.train.batches import Collator
from relook.train.cache import TrunkCache, cached_items
from relook.train.run import encode_samples, load, policy_of, read_samples, train

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
LLAVA_7B = {
    "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    "text": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "vocabulary": 32064,
    "image_size": 336,
}
TINY = {
    "vision": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
    "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "vocabulary": 320,
    "image_size": 56,
}
RESPONSE = 109  # words of a description, which </s> ends
BATCH = 64  # pairs a step from cached states
PEER_BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for model, data and runs")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--parts", default="peer,cache,epochs,sweep")
    parser.add_argument("--pairs", type=int, default=800, help="description pairs of `cache` and `epochs`")
    parser.add_argument("--sweep-pairs", type=int, default=5000)
    parser.add_argument("--variants", type=int, default=20)
    parser.add_argument("--pope-images", type=int, default=500)
    options = parser.parse_args()
    parts, shape = options.parts.split(","), TINY if options.tiny else LLAVA_7B
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if GPU else "cpu", "versions": versions()}

    def say(name: str, **figures: Any) -> None:
        found[name] = figures
        print(name, json.dumps(figures), flush=True)
        if options.out:
            write_json(options.out, found)

    base = timed(lambda: write_model(options.work / "base", shape), say, "write_model")
    say("matmul", **matmul())
    timed(lambda: model_hash(base), say, "model_hash")
    if "peer" in parts:
        say("ha_dpo_way", **peer(base, shape))
    write_pairs(options.work / "fixed", options.pairs, options.pairs, 0)
    if "cache" in parts:
        say("cache_pass", **cache_pass(base, options, shape, found))
    if "epochs" in parts:
        for name, keys in (("head", {"tune_lm_head": True}), ("post_decoder", {"tune_post_decoder": True})):
            say(f"epoch_{name}", **epoch(base, options, name, keys, found))
    if "sweep" in parts:
        say("sweep", **sweep(base, options))


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def sync() -> None:
    if GPU:
        torch.cuda.synchronize()


def timed(work: Callable[[], Any], say: Callable[..., None], name: str) -> Any:
    started = time.perf_counter()
    made = work()
    sync()
    say(name, seconds=round(time.perf_counter() - started, 1))
    return made


def peak() -> float:
    return round(torch.cuda.max_memory_allocated() / 2**30, 1) if GPU else 0.0


# --- model and data


def write_model(folder: Path, shape: dict[str, Any]) -> Path:
    """A llava-hf folder with random weights and toyworld's words."""
    if (folder / "processor_config.json").exists():
        return folder
    processor = make_processor()
    side = {"height": shape["image_size"], "width": shape["image_size"]}
    processor.image_processor = CLIPImageProcessorPil(size={"shortest_edge": shape["image_size"]}, crop_size=side)
    processor.patch_size = 14
    token = processor.tokenizer.convert_tokens_to_ids
    ids = {f"{name}_token_id": token(text) for name, text in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>"))}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape["vision"], image_size=shape["image_size"], patch_size=14),
        text_config=LlamaConfig(**shape["text"], vocab_size=shape["vocabulary"], max_position_embeddings=4096, **ids),
        image_token_index=token("<image>"),
        image_seq_length=(shape["image_size"] // 14) ** 2,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPE)
    with torch.device("cuda" if GPU else "cpu"):
        model = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        long = 3000 * torch.randn_like(model.lm_head.weight[0])
        model.lm_head.weight[token("▁Yes")], model.lm_head.weight[token("▁No")] = long, -long
    for name, id in ids.items():
        setattr(model.generation_config, name, id)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_images(paths: list[Path]) -> None:
    """JPEG files of Visual Genome's usual size."""
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    for _ in ahead(_write_image, paths):
        pass


def _write_image(path: Path) -> None:
    small = Image.frombytes("RGB", (25, 19), random.Random(path.name).randbytes(25 * 19 * 3))
    small.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def write_pairs(folder: Path, images: int, descriptions: int, questions: int) -> None:
    """HA-DPO's files over Visual Genome's layout: one description pair, or some question pairs, an image."""
    if (folder / "desc_data.json").exists():
        return
    rng, words = random.Random(1), [word for word in vocabulary() if word.isalpha()]
    text = lambda count: " ".join(rng.choice(words) for _ in range(count))  # noqa: E731
    names = [f"{number}.jpg" for number in range(1, images + 1)]
    write_images([folder / "VG_100K" / name for name in names])
    urls = [{"image_id": n, "url": f"https://x/VG_100K/{name}"} for n, name in enumerate(names, 1)]
    write_json(folder / "image_data.json", urls)
    described = {str(n): {"chosen": [text(RESPONSE)], "rejected": [text(RESPONSE)]} for n in range(1, descriptions + 1)}
    write_json(folder / "desc_data.json", described)
    asked = [
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
    write_json(folder / "pope_data.json", asked)


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
                thing = f"thing {k}" if k % 2 == 0 else f"thing {k} of {s}"
                label = "yes" if k % 2 == 0 else "no"
                record = {"question_id": len(lines) + 1, "image": name, "text": question_text(thing), "label": label}
                lines.append(json.dumps(record))
        path = folder / "pope" / f"coco_pope_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines))


# --- what is measured


def matmul() -> dict[str, float]:
    """TFLOP/s of a large matrix product: the best of many, and over two seconds, when the card is warm from work."""
    size = 8192 if GPU else 512
    a, b = (torch.randn(size, size, dtype=DTYPE, device="cuda" if GPU else "cpu") for _ in range(2))
    times = []
    began = time.perf_counter()
    while time.perf_counter() - began < 2:
        sync()
        started = time.perf_counter()
        a @ b
        sync()
        times.append(time.perf_counter() - started)
    flops = 2 * size**3 / 1e12
    return {"best_tflops": round(flops / min(times), 3), "sustained_tflops": round(flops * len(times) / sum(times), 3)}


def flops_of_pair(shape: dict[str, Any], prompt: int, response: int, both: bool) -> float:
    """Useful TFLOP of one trunk pass over a pair: 2 a parameter of every matrix product and token, and attention.

    Args:
        both: each response with a prompt of its own; else both share one, which is what there is to compute.
    """
    text, vision = shape["text"], shape["vision"]
    tokens = 2 * (prompt + response) if both else prompt + 2 * response
    seen = prompt * prompt / 2 + 2 * response * (prompt + response / 2)  # pairs of positions that see each other
    D, M, L = text["hidden_size"], text["intermediate_size"], text["num_hidden_layers"]
    V, W, N = vision["hidden_size"], vision["intermediate_size"], vision["num_hidden_layers"] - 1
    patches = (shape["image_size"] // 14) ** 2 + 1
    language = 2 * tokens * L * (4 * D * D + 3 * D * M) + 4 * D * L * seen
    tower = 2 * patches * N * (4 * V * V + 2 * V * W) + 4 * V * N * patches**2
    return (language + tower + 2 * patches * (V * D + D * D)) / 1e12


def peer(base: Path, shape: dict[str, Any]) -> dict[str, float]:
    """The HA-DPO way, by transformers alone, at the shape of `fixed`."""
    device = "cuda" if GPU else "cpu"
    model = LlavaForConditionalGeneration.from_pretrained(base, dtype=DTYPE, attn_implementation="sdpa").to(device)
    model.requires_grad_(False)
    head = model.lm_head.weight.requires_grad_(True)
    image, patches = model.config.image_token_id, (shape["image_size"] // 14) ** 2
    generator = torch.Generator().manual_seed(0)
    draw = lambda count: torch.randint(5, 60, (PEER_BATCH, count), generator=generator)  # noqa: E731
    prompt = torch.cat([draw(36), torch.full((PEER_BATCH, patches), image), draw(14)], 1)
    ids = torch.cat([torch.cat([prompt, draw(RESPONSE + 1)], 1) for _ in range(2)]).to(device)
    side = shape["image_size"]
    pixels = torch.randn(PEER_BATCH, 3, side, side, generator=generator).to(device, DTYPE).repeat(2, 1, 1, 1)

    def log_probs() -> Tensor:
        logits = model(input_ids=ids, pixel_values=pixels).logits[:, :-1].float().log_softmax(-1)
        return logits.gather(-1, ids[:, 1:, None]).squeeze(-1)[:, prompt.shape[1] - 1 :].sum(-1)

    def step() -> None:
        with torch.no_grad():
            reference = log_probs()
        ratio = log_probs() - reference
        loss = -torch.nn.functional.logsigmoid(0.1 * (ratio[:PEER_BATCH] - ratio[PEER_BATCH:])).mean()
        loss.backward()
        head.grad = None

    for _ in range(2):
        step()
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(5):
        sync()
        started = time.perf_counter()
        step()
        sync()
        times.append(time.perf_counter() - started)
    return {"pairs_per_s": round(PEER_BATCH / sorted(times)[2], 2), "peak_gib": peak()}


def recipe_of(base: Path, options: argparse.Namespace, name: str, **keys: Any) -> Recipe:
    pairs = options.work / "fixed"
    return build_recipe(
        {
            "task": "dpo",
            "version": "v1",
            "model_name_or_path": base,
            "output_dir": options.work / "runs" / name,
            "vg_path": pairs,
            "desc_data_path": pairs / "desc_data.json",
            "feature_cache": "memory",
            "bf16": GPU,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 1e-5,
            **keys,
        }
    )


def cache_pass(
    base: Path, options: argparse.Namespace, shape: dict[str, Any], found: dict[str, Any]
) -> dict[str, float]:
    """Filling the cache for a post decoder that reads the image, twice: the first pass also compiles."""
    recipe = recipe_of(base, options, "cache", tune_post_decoder=True)
    device = "cuda" if GPU else "cpu"
    started = time.perf_counter()
    loaded = load(recipe, DTYPE, device)
    loading = time.perf_counter() - started
    examples, _ = encode_samples(recipe, loaded, *read_samples(recipe))
    encoding = time.perf_counter() - started - loading
    examples = list(dict.fromkeys(examples))
    policy = policy_of(recipe, loaded, DTYPE)
    collator = Collator(policy, loaded.images, loaded.pad_id)
    seconds: list[float] = []
    fill = cache._fill_trunk

    def timed_fill(*arguments: Any) -> None:
        sync()
        started = time.perf_counter()
        fill(*arguments)
        sync()
        seconds.append(time.perf_counter() - started)

    cache._fill_trunk = timed_fill
    totals = []
    for _ in range(2):
        TrunkCache.last = None
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        cached_items(recipe, policy, examples, collator, lambda: policy)
        totals.append(time.perf_counter() - started)
    cache._fill_trunk = fill
    tree = examples[0].tree
    rate = len(examples) / seconds[1]
    tflops = rate * flops_of_pair(shape, len(tree.prefix), len(tree.branches[0].ids), both=False)
    result = {
        "pairs": len(examples),
        "positions": f"{len(tree.prefix)} + {' + '.join(str(len(branch.ids)) for branch in tree.branches)}",
        "pairs_per_s": round(rate, 2),
        "pairs_per_s_with_hashes_and_reference": round(len(examples) / totals[1], 2),
        "loading_s": round(loading, 1),
        "encoding_s": round(encoding, 1),
        "compiling_s": round(seconds[0] - seconds[1], 1),
        "useful_tflops": round(tflops, 1),
        "of_best_matmul": round(tflops / found["matmul"]["best_tflops"], 3),
        "of_sustained_matmul": round(tflops / found["matmul"]["sustained_tflops"], 3),
        "peak_gib": peak(),
    }
    if "ha_dpo_way" in found:
        result["times_the_ha_dpo_way"] = round(rate / found["ha_dpo_way"]["pairs_per_s"], 2)
    return result


def epoch(
    base: Path, options: argparse.Namespace, name: str, keys: dict[str, Any], found: dict[str, Any]
) -> dict[str, float]:
    """Three epochs of transformers' Trainer from cached states, by `train`; the rate is the Trainer's own."""
    recipe = recipe_of(base, options, name, **keys, num_train_epochs=1)
    train(replace(recipe, output_dir=f"{recipe.output_dir}-warm"))
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    out = train(replace(recipe, training={**recipe.training, "num_train_epochs": 3}))
    rate = read_json(out / "run.json")["log"][-1]["train_samples_per_second"]
    result = {"pairs_per_s": round(rate, 1), "peak_gib": peak()}
    if "ha_dpo_way" in found:
        result["times_the_ha_dpo_way"] = round(rate / found["ha_dpo_way"]["pairs_per_s"], 1)
    return result


def sweep(base: Path, options: argparse.Namespace) -> dict[str, Any]:
    """`relook sweep`: pairs as in HA-DPO's mix (two thirds are description pairs, each there twice), POPE of each."""
    TrunkCache.last = None
    total, folder = options.sweep_pairs, options.work / "mix"
    write_pairs(folder, total // 2, total // 3, total - 2 * (total // 3))
    write_pope(options.work / "coco", options.pope_images)
    kinds = [
        {"name": "post decoder"},
        {"name": "no cross-attention", "post_decoder.attention": "none"},
        {"name": "align linear", "post_decoder.align": "linear"},
        {"name": "silu", "post_decoder.activation": "silu"},
        {"name": "head", "tune_post_decoder": False, "tune_lm_head": True},
    ]
    rates = [2e-7 * 2**n for n in range(-(-options.variants // len(kinds)))]
    started = time.perf_counter()
    run_sweep(
        {
            "recipe": "post-decoder",
            "output_dir": options.work / "sweep",
            "data": options.work / "coco",
            "dtype": "bfloat16" if GPU else "float32",
            "model_name_or_path": base,
            "version": "v1",
            "vg_path": folder,
            "desc_data_path": folder / "desc_data.json",
            "pope_data_path": folder / "pope_data.json",
            "post_decoder_init": "random",
            "bf16": GPU,
            "per_device_train_batch_size": BATCH,
            "gradient_accumulation_steps": 1,
            "rows": kinds,
            "grid": {"learning_rate": rates},
        }
    )
    rows = read_json(options.work / "sweep" / "results.json")["rows"]
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "rows": len(rows),
        "pairs": total,
        "questions": sum(rows[0]["pope"][split]["n"] for split in SPLITS),
        "generated": sum(row["pope"][split]["generated"] for row in rows for split in SPLITS),
    }


if __name__ == "__main__":
    main()
