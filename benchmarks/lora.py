"""LoRA DPO at LLaVA-1.5-7B's or Qwen2.5-VL-7B's shape: relook beside TRL's DPOTrainer, with and without Liger kernels.

    python benchmarks/lora.py --work DIR --out lora.json     # one GPU with 80 GB, 16 GB of disk, trl and liger-kernel
    python benchmarks/lora.py --work DIR --family qwen2_5_vl --parts trl_liger,relook
    python benchmarks/lora.py --work DIR --tiny              # the same code on a CPU, in a minute

A pair is an image, 50 tokens of prompt and two answers of 110 tokens; 8 pairs a step, at once or in micro-batches of
two; LoRA of rank 128 on all linear layers of the language model, no dropout, bf16 with adapters in float32, AdamW. TRL
gets batches that lie ready; relook reads JPEG files, and keeps what the frozen tower says of them, as it does for its
users. Each part runs in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from shapes import (
    DEVICE,
    DTYPE,
    GPU,
    RESPONSE,
    SHAPES,
    device_name,
    matmul,
    pair_batch,
    pair_tokens,
    peak,
    profiled,
    sync,
    training_flops_of_pair,
    versions,
    write_model,
    write_pairs,
)

from relook.files import read_json, write_json
from relook.model.lazy_model import load_processor
from relook.model.tower_attention import batch_segments
from relook.recipe import build_recipe
from relook.train.run import train

PAIRS = 8  # a step
TWO_AT_A_TIME = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": PAIRS // 2}
FOUR_AT_A_TIME = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": PAIRS // 4}
PEERS: dict[str, dict[str, Any]] = {
    "trl": {"gradient_checkpointing": True},
    "trl_liger": {"gradient_checkpointing": True, "use_liger_kernel": True},
    "trl_liger_fast_tower": {"gradient_checkpointing": True, "use_liger_kernel": True},  # with relook's attention there
    "trl_liger_kept": {"gradient_checkpointing": False, "use_liger_kernel": True},
    "trl_liger_kept_by_two": {"gradient_checkpointing": False, "use_liger_kernel": True, **TWO_AT_A_TIME},
}
RUNS: dict[str, dict[str, Any]] = {
    "relook": {},
    "relook_tower_in_steps": {"feature_cache": "off"},
    "relook_by_two": TWO_AT_A_TIME,
    "relook_by_four": FOUR_AT_A_TIME,
    "relook_offloading": {**FOUR_AT_A_TIME, "activation_offloading": 0.43},
    "relook_1.0": {"activation_memory_budget": 1.0},
    "relook_0.6": {"activation_memory_budget": 0.6},
    "relook_0.4": {"activation_memory_budget": 0.4},
    "relook_recomputed": {"gradient_checkpointing": True},
    "relook_mixed_lengths": {},
    **{f"relook_{kind}": {} for kind in ("context", "whole", "sentences")},
}
# What is read once a pair instead of twice: pairs whose answers share their first 100 words as a context (context), the
# same pairs without sharing (whole), and such a context with sentences instead of long answers (sentences).
CONTEXT = 100
LENGTHS = {
    "context": {"context": CONTEXT},
    "whole": {"response": CONTEXT + RESPONSE},
    "sentences": {"context": CONTEXT, "response": 20},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for model, data and runs")
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    parser.add_argument("--family", choices=SHAPES, default="llava")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--parts", default=",".join([*PEERS, *RUNS]))
    parser.add_argument("--steps", type=int, default=24, help="of each relook run; the last half counts")
    parser.add_argument("--trl-steps", type=int, default=8, help="of each TRL run; the median after the second counts")
    parser.add_argument("--workers", type=int, default=4 if GPU else 0, help="processes that read images")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--profile", type=Path, help="table of the kernels of three steps, one file a part")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = SHAPES[options.family][options.tiny]
    if options.part:
        measured = peer(options, shape) if options.part in PEERS else ours(options, shape)
        print(json.dumps(measured))
        return
    report: dict[str, Any] = {"device": device_name(), "versions": versions()}
    write_model(options.work / "plain", shape, answers=False)
    size, count = shape.get("picture", (500, 375)), PAIRS * options.steps
    write_pairs(options.work / "lora_fixed", count, count, 0, size=size)
    for kind in LENGTHS.keys() & {part.removeprefix("relook_") for part in options.parts.split(",")}:
        write_pairs(options.work / f"lora_{kind}", count, count, 0, size=size, **LENGTHS[kind])
    if "mixed" in options.parts:
        write_pairs(options.work / "lora_mixed", count, count // 3, 2 * count // 3, size=size)
    report["matmul"] = matmul()
    if GPU:
        torch.cuda.empty_cache()
    flops = training_flops_of_pair(shape, *pair_tokens(shape), options.rank)
    for part in options.parts.split(","):
        run = subprocess.run([sys.executable, *sys.argv, "--part", part], stdout=subprocess.PIPE, text=True)
        last = run.stdout.strip().splitlines()[-1:]
        figures = json.loads(last[0]) if run.returncode == 0 else {"failed": run.returncode}
        other_lengths = part.removeprefix("relook_") in LENGTHS or "mixed" in part
        if (
            part.removeprefix("relook_") in LENGTHS
            and "pairs_per_s" in report.get("relook", {})
            and figures.get("pairs_per_s")
        ):
            figures["times_cost_of_relook"] = round(report["relook"]["pairs_per_s"] / figures["pairs_per_s"], 3)
        elif "pairs_per_s" in figures and not other_lengths:
            figures["useful_tflops"] = round(figures["pairs_per_s"] * flops, 1)
            figures["of_best_matmul"] = round(figures["useful_tflops"] / report["matmul"]["best_tflops"], 3)
            figures["of_sustained_matmul"] = round(figures["useful_tflops"] / report["matmul"]["sustained_tflops"], 3)
        report[part] = figures
        for name in PEERS:
            if part in RUNS and "pairs_per_s" in report.get(name, {}) and not other_lengths:
                figures[f"times_{name}"] = round(figures["pairs_per_s"] / report[name]["pairs_per_s"], 2)
        print(part, json.dumps(figures), flush=True)
        if options.out:
            write_json(options.out, report)


# --- relook


def ours(options: argparse.Namespace, shape: dict[str, Any]) -> dict[str, Any]:
    """`relook train` by its shipped recipe; the figures are those that it logs, over the last half of its steps."""
    kind = next((kind for kind in ("mixed", *LENGTHS) if kind in options.part), "fixed")
    data = options.work / f"lora_{kind}"
    files = {"desc_data_path": data / "desc_data.json"}
    if "mixed" in options.part:
        files["pope_data_path"] = data / "pope_data.json"
    recipe = build_recipe(
        {
            "task": "dpo",
            "version": "v1" if options.family == "llava" else "",
            "lora_enable": True,
            "lora_r": options.rank,
            "lora_alpha": 2 * options.rank,
            "lora_dropout": 0.0,
            "learning_rate": 2e-6,
            "per_device_train_batch_size": PAIRS,
            "max_steps": options.steps,
            "logging_steps": max(1, options.steps // 2),  # the GPU waits at each line
            "logging_first_step": True,
            "bf16": GPU,
            "dataloader_num_workers": options.workers,
            "model_name_or_path": options.work / "plain",
            "output_dir": options.work / "runs" / options.part,
            "vg_path": data,
            **files,
            **RUNS[options.part],
        }
    )
    first, *_, last = [line for line in read_json(train(recipe) / "run.json")["log"] if "pairs_per_second" in line]
    peak_bytes = peak()
    if options.profile:
        with profiled(options.profile / f"{options.part}.txt", skip=options.steps // 2):
            train(replace(recipe, output_dir=f"{recipe.output_dir}-profiled"))
    return {
        "pairs_per_s": round(last["pairs_per_second"], 2),
        "tokens_per_s": round(last["tokens_per_second"]),
        "tokens_per_pair": round(last["tokens_per_second"] / last["pairs_per_second"], 1),
        "peak_gib": peak_bytes,
        "first_loss": round(first["loss"], 4),  # ln 2 but for rounding: policy and reference are one model then
        "loss": round(last["loss"], 4),
    }


# --- TRL


def peer(options: argparse.Namespace, shape: dict[str, Any]) -> dict[str, Any]:
    """TRL's DPOTrainer on batches of the same lengths; the median of its steps after the second."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForImageTextToText, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    model = AutoModelForImageTextToText.from_pretrained(
        options.work / "plain", dtype=DTYPE, attn_implementation="sdpa", device_map=DEVICE
    )
    if "fast_tower" in options.part:
        batch_segments(model.model)
    processor = load_processor(options.work / "plain")
    batch = pair_batch(shape, model, processor, PEERS[options.part].get("per_device_train_batch_size", PAIRS))
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["completion_mask"] = batch["attention_mask"].clone()
    batch["completion_mask"][:, : pair_tokens(shape)[0]] = 0
    rows = 64 * PAIRS
    texts = {"prompt": [f"{processor.image_token} a"] * rows, "chosen": ["b"] * rows, "rejected": ["c"] * rows}
    data = Dataset.from_dict({**texts, "images": [[Image.new("RGB", (8, 8))]] * rows})
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            sync()
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            sync()
            seconds.append(time.perf_counter() - self.started)

    linear = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            output_dir=str(options.work / "trl"),
            max_steps=options.trl_steps,
            bf16=GPU,
            use_cpu=not GPU,
            report_to=[],
            save_strategy="no",
            logging_steps=100,
            remove_unused_columns=False,
            max_length=None,
            **{"per_device_train_batch_size": PAIRS, **PEERS[options.part]},
        ),
        train_dataset=data,
        processing_class=processor,
        peft_config=LoraConfig(
            r=options.rank,
            lora_alpha=2 * options.rank,
            target_modules=rf".*language_model.*\.({linear})",
            task_type="CAUSAL_LM",
        ),
        data_collator=lambda _: dict(batch),
        callbacks=[Clock()],
    )
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    return {"pairs_per_s": round(PAIRS / sorted(seconds[2:])[len(seconds[2:]) // 2], 2), "peak_gib": peak()}


if __name__ == "__main__":
    main()
