"""Answers per second: relook's trees against transformers' `generate` at batch 1 and 16, in one run, random weights.

    python benchmarks/answering.py --out answering.json     # LLaVA-1.5-7B's shape, 500 images x 18 questions, one GPU
    python benchmarks/answering.py --tiny                   # the same on a CPU, float32, in seconds

Every answer has --new-tokens tokens: no token ends one. Speed does not depend on the weights. Which tokens are said
does: the logits of random weights lie closer together than a trained model's, so that the order in which bf16 numbers
are added decides more often. The share of equal rows is therefore printed for `generate` against itself too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from relook import LoadedModel
from relook.evaluate.answer import Asking, Prompt, answer, generate_batch
from relook.files import write_json
from relook.model.load import add_post_decoder, as_dtype

TINY = {
    "hidden": 64,
    "mlp": 128,
    "layers": 2,
    "heads": 4,
    "vocab": 320,
    "vision_hidden": 32,
    "vision_mlp": 64,
    "vision_layers": 3,
    "vision_heads": 4,
    "image_size": 56,
    "images": 12,
    "single": 40,
    "batched": 80,
    "dtype": "float32",
}
Row = tuple[Path, str]


def main() -> None:
    options = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = build(options, device)
    asking = Asking("llava_hf", options.new_tokens, options.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        rows = questions(options, draw(Path(folder), options))
        result: dict[str, Any] = {"options": {**vars(options), "out": str(options.out)}, "device": device_name(device)}
        result["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
        said: dict[str, list[str]] = {}

        def engine(some: Sequence[Row]) -> list[str]:
            found = dict(answer(loaded, some, asking, lambda *_: None))
            return [found[i] for i in range(len(some))]

        def generate(size: int) -> Callable[[Sequence[Row]], list[str]]:
            encoder = loaded.encoder("llava_hf")
            prompt = lambda row: Prompt(0, (row[0],), encoder.prompt(row[1], [row[0]]))  # noqa: E731
            return lambda some: [
                text
                for start in range(0, len(some), size)
                for text in generate_batch(loaded, [prompt(row) for row in some[start : start + size]], asking)
            ]

        ways: dict[str, tuple[Callable[[Sequence[Row]], list[str]], int]] = {
            "relook": (engine, len(rows)),
            "generate_1": (generate(1), options.single),
            "generate_16": (generate(16), options.batched),
        }
        for name, (ask, count) in ways.items():
            ask(rows[: min(count, 36)])  # warm-up, of the images' cache too
            said[name], result[name] = measure(ask, rows[:count], device)
            print(name, result[name], flush=True)
    result["ratios"] = {n: result["relook"]["rows_per_s"] / result[n]["rows_per_s"] for n in ways if n != "relook"}
    pairs = (("relook", "generate_1"), ("generate_16", "generate_1"), ("relook", "generate_16"))
    result["equal_rows"] = {f"{a} = {b}": equal(said[a], said[b]) for a, b in pairs}
    print("times as fast as:", {name: round(ratio, 1) for name, ratio in result["ratios"].items()})
    for name, found in result["equal_rows"].items():
        print(f"{name}: {found['differing']} of {found['rows']} rows differ; {100 * found['share']:.2f} % are equal")
    if options.out:
        write_json(options.out, result)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small shape, for a CPU")
    parser.add_argument("--out", type=Path)
    numbers = {
        "hidden": 4096,
        "mlp": 11008,
        "layers": 32,
        "heads": 32,
        "vocab": 32064,
        "vision_hidden": 1024,
        "vision_mlp": 4096,
        "vision_layers": 24,
        "vision_heads": 16,
        "image_size": 336,
        "images": 500,
        "questions": 18,
        "question_tokens": 25,
        "new_tokens": 8,
        "batch_size": 64,
        "single": 48,
        "batched": 512,
        "post_decoder": 0,
    }
    for name, value in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16")
    if parser.parse_known_args()[0].tiny:
        parser.set_defaults(**TINY)
    return parser.parse_args()


def build(options: argparse.Namespace, device: str) -> LoadedModel:
    text = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.mlp,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        max_position_embeddings=4096,
    )
    vision = CLIPVisionConfig(
        hidden_size=options.vision_hidden,
        intermediate_size=options.vision_mlp,
        num_hidden_layers=options.vision_layers,
        num_attention_heads=options.vision_heads,
        image_size=options.image_size,
        patch_size=14,
    )
    tokenizer = words(options.vocab)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    kept = torch.get_default_dtype()
    torch.set_default_dtype(as_dtype(options.dtype))
    with torch.device(device):
        model: Any = LlavaForConditionalGeneration(config)
    torch.set_default_dtype(kept)
    if options.post_decoder:
        model = add_post_decoder(model, {"depth": options.post_decoder}, None)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, tokenizer.pad_token_id
    size = {"height": options.image_size, "width": options.image_size}
    images = CLIPImageProcessorPil(size={"shortest_edge": options.image_size}, crop_size=size)
    return LoadedModel(model.eval(), LlavaProcessor(image_processor=images, tokenizer=tokenizer), Path(), "pad")


def words(count: int) -> PreTrainedTokenizerFast:
    """A tokenizer of as many words; the first are those of the template."""
    first = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"]
    vocabulary = {word: i for i, word in enumerate([*first, *(f"w{i}" for i in range(count - len(first)))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def draw(folder: Path, options: argparse.Namespace) -> list[Path]:
    """JPEG files of COCO's usual size."""

    def one(number: int) -> Path:
        small = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
        path = folder / f"{number}.jpg"
        Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC).save(path, quality=90)
        return path

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, range(options.images)))


def questions(options: argparse.Namespace, images: Sequence[Path]) -> list[Row]:
    """Texts of random words, no two alike: of a prompt only the image is shared."""
    rng = np.random.default_rng(0)
    rows = []
    for image in images:
        for _ in range(options.questions):
            chosen = rng.integers(0, options.vocab - 100, options.question_tokens - 1)
            rows.append((image, " ".join(f"w{i}" for i in chosen)))
    return rows


def measure(
    ask: Callable[[Sequence[Row]], list[str]], rows: Sequence[Row], device: str
) -> tuple[list[str], dict[str, float]]:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    texts = ask(rows)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
    return texts, {"rows": len(rows), "seconds": seconds, "rows_per_s": len(rows) / seconds, "peak_gib": peak}


def equal(a: Sequence[str], b: Sequence[str]) -> dict[str, float]:
    pairs = list(zip(a, b, strict=False))  # of the rows that both were asked
    same = sum(x == y for x, y in pairs)
    return {"rows": len(pairs), "differing": len(pairs) - same, "share": same / len(pairs)}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "cpu"


if __name__ == "__main__":
    main()
