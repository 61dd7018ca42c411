"""The frozen trunk at the shape of LLaVA-1.5-7B or Qwen2.5-VL-7B: cache pass, epochs, a sweep, beside the HA-DPO way.

    python benchmarks/frozen_trunk.py --work DIR --out frozen_trunk.json     # one GPU with 80 GB, 20 GB of disk
    python benchmarks/frozen_trunk.py --work DIR --family qwen2_5_vl --parts peer,cache
    python benchmarks/frozen_trunk.py --work DIR --tiny                      # the same code on a CPU, in a minute

The weights are random (`shapes.py`). Everything goes through files, recipes and commands as real work does: images
are read from JPEG files, models from safetensors. The HA-DPO way: both rows of every pair in full, policy and
reference, full logits in float32, trunk frozen, lm_head trains.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from shapes import (
    DEVICE,
    DTYPE,
    GPU,
    SHAPES,
    device_name,
    flops_of_pair,
    matmul,
    pair_batch,
    pair_tokens,
    peak,
    profiled,
    sync,
    versions,
    write_model,
    write_pairs,
    write_pope,
)
from torch import Tensor
from transformers import AutoModelForImageTextToText

from relook.evaluate.tasks.pope import SPLITS
from relook.files import read_json, write_json
from relook.forward.collate import Collator
from relook.model.lazy_model import load_processor
from relook.model.load import model_hash
from relook.model.tower_attention import batch_segments
from relook.recipe import Recipe, build_recipe
from relook.sweep import run_sweep
from relook.train import feature_cache
from relook.train.feature_cache import TrunkCache, cached_items
from relook.train.run import build_policy, encode_samples, load_for_training, read_samples, train

PEER_BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for model, data and runs")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    parser.add_argument("--family", choices=SHAPES, default="llava")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--parts", default="peer,cache,epochs,sweep")
    parser.add_argument("--pairs", type=int, default=800, help="description pairs of `cache` and `epochs`")
    parser.add_argument("--context", type=int, default=0, help="words that both of a pair's answers begin with")
    parser.add_argument("--sweep-pairs", type=int, default=5000)
    parser.add_argument("--variants", type=int, default=20)
    parser.add_argument("--pope-images", type=int, default=500)
    parser.add_argument(
        "--profile", type=Path, help="tables of the kernels of three steps of an epoch, one file a kind"
    )
    parser.add_argument("--batch", type=int, default=64, help="pairs a step from cached states")
    options = parser.parse_args()
    parts, shape = options.parts.split(","), SHAPES[options.family][options.tiny]
    report: dict[str, Any] = {"device": device_name(), "versions": versions()}

    def say(name: str, **figures: Any) -> None:
        report[name] = figures
        print(name, json.dumps(figures), flush=True)
        if options.out:
            write_json(options.out, report)

    base = timed(lambda: write_model(options.work / "base", shape), say, "write_model")
    say("matmul", **matmul())
    timed(lambda: model_hash(base), say, "model_hash")
    if "peer" in parts:
        say("ha_dpo_way", **peer(base, shape))
    count, size = options.pairs, shape.get("picture", (500, 375))
    write_pairs(data_of(options), count, count, 0, options.context, size)
    if "cache" in parts:
        say("cache_pass", **cache_pass(base, options, shape, report))
    if "epochs" in parts:
        for name, keys in (("head", {"tune_lm_head": True}), ("post_decoder", {"tune_post_decoder": True})):
            say(f"epoch_{name}", **epoch(base, options, name, keys, report))
    if "sweep" in parts:
        say("sweep", **sweep(base, options))


def timed(work: Callable[[], Any], say: Callable[..., None], name: str) -> Any:
    started = time.perf_counter()
    result = work()
    sync()
    say(name, seconds=round(time.perf_counter() - started, 1))
    return result


# --- what is measured


def peer(base: Path, shape: dict[str, Any]) -> dict[str, float]:
    """The HA-DPO way, by transformers alone, at the shape of `fixed`."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=DTYPE, attn_implementation="sdpa").to(DEVICE)
    batch_segments(model.model)  # else the ratio would be about transformers' loop over a tower's windows
    model.requires_grad_(False)
    head = model.lm_head.weight.requires_grad_(True)
    batch = {name: t.to(DEVICE) for name, t in pair_batch(shape, model, load_processor(base), PEER_BATCH).items()}
    batch["pixel_values"] = batch["pixel_values"].to(DTYPE)
    ids, prompt = batch["input_ids"], pair_tokens(shape)[0]

    def log_probs() -> Tensor:
        logits = model(**batch).logits[:, :-1].float().log_softmax(-1)
        return logits.gather(-1, ids[:, 1:, None]).squeeze(-1)[:, prompt - 1 :].sum(-1)

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


def data_of(options: argparse.Namespace) -> Path:
    folder: Path = options.work / (f"context_{options.context}" if options.context else "fixed")
    return folder


def recipe_of(base: Path, options: argparse.Namespace, name: str, **keys: Any) -> Recipe:
    pairs = data_of(options)
    return build_recipe(
        {
            "task": "dpo",
            "version": "v1" if options.family == "llava" else "",
            "model_name_or_path": base,
            "output_dir": options.work / "runs" / f"{name}-{options.context}",
            "vg_path": pairs,
            "desc_data_path": pairs / "desc_data.json",
            "feature_cache": "memory",
            "bf16": GPU,
            "per_device_train_batch_size": options.batch,
            "learning_rate": 1e-5,
            **keys,
        }
    )


def cache_pass(
    base: Path, options: argparse.Namespace, shape: dict[str, Any], report: dict[str, Any]
) -> dict[str, float]:
    """Filling the cache for a post decoder that reads the image, twice: the first pass also compiles."""
    recipe = recipe_of(base, options, "cache", tune_post_decoder=True)
    started = time.perf_counter()
    loaded = load_for_training(recipe, DTYPE, DEVICE)
    loading = time.perf_counter() - started
    examples, _ = encode_samples(recipe, loaded, *read_samples(recipe))
    encoding = time.perf_counter() - started - loading
    examples = list(dict.fromkeys(examples))
    policy = build_policy(recipe, loaded, DTYPE)
    collator = Collator(policy, loaded.images, loaded.pad_id)
    seconds: list[float] = []
    fill = feature_cache._fill_trunk

    def timed_fill(*arguments: Any) -> None:
        sync()
        started = time.perf_counter()
        fill(*arguments)
        sync()
        seconds.append(time.perf_counter() - started)

    feature_cache._fill_trunk = timed_fill
    totals = []
    for _ in range(2):
        TrunkCache.current = None
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        cached_items(recipe, policy, examples, collator, lambda: policy)
        totals.append(time.perf_counter() - started)
    feature_cache._fill_trunk = fill
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
        "of_best_matmul": round(tflops / report["matmul"]["best_tflops"], 3),
        "of_sustained_matmul": round(tflops / report["matmul"]["sustained_tflops"], 3),
        "peak_gib": peak(),
    }
    if "ha_dpo_way" in report:
        result["times_the_ha_dpo_way"] = round(rate / report["ha_dpo_way"]["pairs_per_s"], 2)
    return result


def epoch(
    base: Path, options: argparse.Namespace, name: str, keys: dict[str, Any], report: dict[str, Any]
) -> dict[str, float]:
    """Three epochs of transformers' Trainer from cached states, by `train`; the rate is the Trainer's own."""
    recipe = recipe_of(base, options, name, **keys, num_train_epochs=1)
    train(replace(recipe, output_dir=f"{recipe.output_dir}-warm"))
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    out = train(replace(recipe, training={**recipe.training, "num_train_epochs": 3}))
    if options.profile:
        with profiled(options.profile / f"{name}.txt", skip=8):
            train(replace(recipe, output_dir=f"{recipe.output_dir}-profiled"))
    rate = read_json(out / "run.json")["log"][-1]["train_samples_per_second"]
    result = {"pairs_per_s": round(rate, 1), "peak_gib": peak()}
    if "ha_dpo_way" in report:
        result["times_the_ha_dpo_way"] = round(rate / report["ha_dpo_way"]["pairs_per_s"], 1)
    return result


def sweep(base: Path, options: argparse.Namespace) -> dict[str, Any]:
    """`relook sweep`: pairs as in HA-DPO's mix (two thirds are description pairs, each there twice), POPE of each."""
    TrunkCache.current = None
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
            "per_device_train_batch_size": options.batch,
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
