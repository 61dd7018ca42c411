"""Several GPUs at LLaVA-1.5-7B's shape: LoRA DPO by each strategy, cache pass, POPE, and tensor-parallel `generate`.

    python benchmarks/scaling.py --work DIR --out scaling.json --gpus 1,2     # GPUs with 80 GB, 20 GB of disk
    python benchmarks/scaling.py --work DIR --tiny --gpus 1,2                 # the same code on a CPU, gloo

Each job is a process of its own for each GPU, started by torchrun, and runs what the commands run. Every GPU gets as
much work as one does alone (8 pairs a step); alone, two steps are accumulated, so that the losses can be compared with
those of two GPUs. Efficiency is the rate over the rate of one GPU times their number; that of FSDP and DeepSpeed, which
do not take compiled layers, over one GPU without compiled layers too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shapes import (
    DEVICE,
    DTYPE,
    GPU,
    LLAVA_7B,
    TINY,
    device_name,
    peak,
    sync,
    versions,
    write_model,
    write_pairs,
    write_pope,
)

from relook.files import read_json, write_json
from relook.recipe import build_recipe

PAIRS = 8  # a GPU and step
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"fsdp": True},
    "zero2": {"deepspeed": "zero2"},
    "zero3": {"deepspeed": "zero3"},
    "zero3_offload": {"deepspeed": "zero3_offload"},
}
ALONE = {"ddp": {}, "flex": {"trunk_pass": "flex"}} if GPU else {"ddp": {}}
JOBS = [*(f"lora_{name}" for name in (*STRATEGIES, "flex")), "cache", "pope", "tp"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for model, data and runs")
    parser.add_argument("--out", type=Path, help="JSON of all figures; jobs that it has are not run again")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--gpus", default="1,2")
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--steps", type=int, default=12, help="of a LoRA run; the last half counts")
    parser.add_argument("--cache-pairs", type=int, default=600, help="a GPU")
    parser.add_argument("--pope-images", type=int, default=128, help="a GPU")
    parser.add_argument("--limit", type=int, default=120, help="seconds for a job")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        work(options)
        return
    shape, counts = TINY if options.tiny else LLAVA_7B, [int(count) for count in options.gpus.split(",")]
    write_model(options.work / "base", shape)
    write_model(options.work / "plain", shape, answers=False)
    write_pairs(options.work / "lora", 2 * PAIRS * options.steps, 2 * PAIRS * options.steps, 0)
    for count in counts:
        pairs = count * options.cache_pairs
        write_pairs(options.work / f"cache{count}", pairs, pairs, 0)
        write_pope(options.work / f"pope{count}", count * options.pope_images)
    if GPU:
        torch.cuda.empty_cache()
    before = read_json(options.out) if options.out and options.out.exists() else {}
    report: dict[str, Any] = {**before, "device": device_name(), "versions": versions()}
    for count in counts:
        for job in filter(None, options.jobs.split(",")):
            run(job, count, options, report)
    efficiencies(report, counts)
    print(json.dumps(report.get("efficiency"), indent=1))
    if options.out:
        write_json(options.out, report)


def run(job: str, count: int, options: argparse.Namespace, report: dict[str, Any]) -> None:
    """One job on some GPUs; a failure is a result too."""
    if job.startswith("lora_") and job.removeprefix("lora_") not in (ALONE if count == 1 else STRATEGIES):
        return
    if "rate" in report.get(f"{job} x{count}", {}):
        return
    name, out = f"{job} x{count}", options.work / "figures" / f"{job}-{count}.json"
    for old in ("runs", "first", "second", "answers"):  # what is there would not be made again
        shutil.rmtree(options.work / f"{job}-{count}" / old, ignore_errors=True)
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), *sys.argv]
    started = time.perf_counter()
    with (log := options.work / f"{job}-{count}.log").open("w") as output:
        process = subprocess.Popen([*command, "--job", job], stdout=output, stderr=output, start_new_session=True)
        try:
            failed = f"status {process.returncode}" if process.wait(options.limit) else ""
        except subprocess.TimeoutExpired:
            failed = f"not finished in {options.limit} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    text = log.read_text(errors="replace").partition("Root Cause")[0]
    lines = [line for line in text.splitlines() if "torch/distributed" not in line and line.strip()]
    error = "\n".join([failed, *lines[-40:]])[-3000:] if failed else ""
    report[name] = read_json(out) if not error else {"failed": error}
    report[name]["seconds_in_all"] = round(time.perf_counter() - started, 1)
    print(name, json.dumps(report[name]) if not error else f"FAILED\n{error}", flush=True)
    if options.out:
        write_json(options.out, report)


def efficiencies(report: dict[str, Any], counts: list[int]) -> None:
    """Rates over that of one GPU times their number; relative differences of the losses from one GPU's."""
    efficiency = report["efficiency"] = {}
    for name, figures in list(report.items()):
        job, _, count = name.partition(" x")
        if not count.isdigit() or count == "1" or "failed" in figures:
            continue
        bases = ["lora_ddp", "lora_flex"] if job.startswith("lora") else [job]
        for base in bases:
            alone = report.get(f"{base} x1", {})
            if "rate" in alone:
                efficiency[f"{name} beside {base}"] = round(figures["rate"] / int(count) / alone["rate"], 3)
            if "losses" in alone and count == "2":
                pairs = zip(figures["losses"], alone["losses"], strict=True)
                efficiency[f"{name}: largest difference of the loss from {base}"] = max(abs(a - b) for a, b in pairs)


# --- in the processes


def work(options: argparse.Namespace) -> None:
    job = options.job
    jobs: dict[str, Callable[..., dict[str, Any]]] = {"cache": cache_pass, "pope": pope, "tp": tensor_parallel}
    job_function = partial(lora, name=job.removeprefix("lora_")) if job.startswith("lora_") else jobs[job]
    figures = job_function(options)
    figures["peak_gib_a_gpu"] = peak()
    if os.environ["RANK"] == "0":
        write_json(options.work / "figures" / f"{job}-{world()}.json", figures)


def world() -> int:
    return int(os.environ["WORLD_SIZE"])


def lora(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """`relook train`; pairs a second as it logs them."""
    from relook.train.run import train

    data, alone = options.work / "lora", world() == 1
    recipe = build_recipe(
        {
            "task": "dpo",
            "version": "v1",
            "lora_enable": True,
            "lora_r": 8 if options.tiny else 128,
            "lora_alpha": 16 if options.tiny else 256,
            "lora_dropout": 0.0,
            "learning_rate": 1e-5,
            "per_device_train_batch_size": PAIRS,
            "gradient_accumulation_steps": 2 if alone else 1,
            "max_steps": options.steps,
            "logging_steps": 1,
            "bf16": GPU,
            "model_name_or_path": options.work / "plain",
            "output_dir": options.work / f"lora_{name}-{world()}" / "runs",
            "vg_path": data,
            "desc_data_path": data / "desc_data.json",
            **(ALONE if alone else STRATEGIES)[name],
        }
    )
    log = [line for line in read_json(train(recipe) / "run.json")["log"] if "pairs_per_second" in line]
    late = log[len(log) // 2 :]
    peaks = [line["peak_memory_gib"] for line in late if "peak_memory_gib" in line]
    return {
        "rate": round(sum(line["pairs_per_second"] for line in late) / len(late), 2),
        "losses": [round(line["loss"], 5) for line in log],
        "logged_peak_gib": round(max(peaks), 1) if peaks else None,
    }


def cache_pass(options: argparse.Namespace) -> dict[str, Any]:
    """The trunk pass for a post decoder, shards on disk, twice: the first one compiles."""
    from relook.forward.collate import Collator
    from relook.train import feature_cache
    from relook.train.run import build_policy, encode_samples, load_for_training, read_samples, training_arguments

    data = options.work / f"cache{world()}"
    times: list[float] = []
    claim, wait = feature_cache._reserve_space, feature_cache._wait_for_shards

    def timed(step: Callable[..., None], *arguments: Any) -> None:
        step(*arguments)
        sync()
        times.append(time.perf_counter())

    # From here every process makes its shards, until it has seen those of the others; references come after that.
    feature_cache._reserve_space, feature_cache._wait_for_shards = partial(timed, claim), partial(timed, wait)
    first = None
    for turn in ("first", "second"):
        recipe = build_recipe(
            {
                "task": "dpo",
                "version": "v1",
                "tune_post_decoder": True,
                "feature_cache": "disk",
                "feature_cache_dir": options.work / f"cache-{world()}" / turn,
                "model_name_or_path": options.work / "plain",
                "output_dir": options.work / f"cache-{world()}" / "runs",
                "vg_path": data,
                "desc_data_path": data / "desc_data.json",
                "bf16": GPU,
                "learning_rate": 1e-5,
            }
        )
        arguments = training_arguments(recipe, Path(recipe.output_dir))
        if first is None:
            loaded = load_for_training(recipe, DTYPE, str(arguments.device))
            policy = first = build_policy(recipe, loaded, DTYPE)
            examples, _ = encode_samples(recipe, loaded, *read_samples(recipe))
            collator = Collator(policy, loaded.images, loaded.pad_id)
        feature_cache.TrunkCache.current = None
        feature_cache.cached_items(recipe, policy, examples, collator, partial(lambda whole: whole, policy))
    seconds = [times[1] - times[0], times[4] - times[3]]
    return {"rate": round(len(examples) / seconds[1], 2), "seconds": [round(second, 1) for second in seconds]}


def pope(options: argparse.Namespace) -> dict[str, Any]:
    """`relook eval pope`, twice: the first time for warmth. Rows a second while answers are made."""
    from relook import distributed
    from relook.evaluate import run as evaluation
    from relook.model.load import LoadOptions

    data, seconds = options.work / f"pope{world()}", list[float]()
    ask = evaluation._ask

    def timed(*arguments: Any) -> None:
        sync()
        distributed.barrier("the models")
        started = time.perf_counter()
        ask(*arguments)
        sync()
        distributed.barrier("the answers")
        seconds.append(time.perf_counter() - started)

    evaluation._ask = timed
    # torchrun gives each process its number; relook takes the GPU of that number.
    loading = LoadOptions(None, None, "bfloat16" if GPU else "float32", 16, "")
    base = options.work / "base"
    for turn in ("first", "second"):
        out = options.work / f"pope-{world()}" / "answers" / turn
        scores = evaluation.evaluate_model(base, ["pope"], data, out, "v1", 64, 8, loading)
    rows = sum(split["n"] for split in scores["pope"].values() if isinstance(split, dict) and "n" in split)
    return {"rate": round(rows / seconds[1], 1), "seconds": [round(second, 1) for second in seconds], "rows": rows}


def tensor_parallel(options: argparse.Namespace) -> dict[str, Any]:
    """transformers' `generate` with its own tensor parallelism: tokens a second of one sequence and of 16."""
    from transformers import LlavaForConditionalGeneration

    several = {"tp_plan": "auto"} if world() > 1 else {"device_map": DEVICE}
    model = LlavaForConditionalGeneration.from_pretrained(options.work / "plain", dtype=DTYPE, **several)
    shape, config = TINY if options.tiny else LLAVA_7B, model.config
    patches, side = (shape["image_size"] // 14) ** 2, shape["image_size"]
    generator, figures = torch.Generator().manual_seed(0), dict[str, Any]()
    for rows in (1, 16):
        words = torch.randint(5, 60, (rows, 40), generator=generator)
        ids = torch.cat([words[:, :5], torch.full((rows, patches), config.image_token_id), words[:, 5:]], 1)
        pixels = torch.randn(rows, 3, side, side, generator=generator)
        inputs = {"input_ids": ids.to(model.device), "pixel_values": pixels.to(model.device, DTYPE)}
        for _ in range(2):
            sync()
            started = time.perf_counter()
            tokens = model.generate(**inputs, max_new_tokens=64, min_new_tokens=64, do_sample=False, pad_token_id=0)
            sync()
            seconds = time.perf_counter() - started
        figures[f"tokens_per_s_{rows}"] = round(rows * 64 / seconds, 1)
        figures[f"first_tokens_{rows}"] = tokens[0, -64:][:8].tolist()
    return {"rate": figures["tokens_per_s_16"], **figures}


if __name__ == "__main__":
    main()
