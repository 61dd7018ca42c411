"""Answers per second: relook's engine against transformers' `generate`, in one run, random weights.

    python benchmarks/answering.py --out answering.json     # LLaVA-1.5-7B's shape, 500 images x 18 questions, one GPU
    python benchmarks/answering.py --tiny                   # the same on a CPU, float32, in seconds
    python benchmarks/answering.py --trained                # toyworld's base in bf16: how many rows are equal

Every answer has --new-tokens tokens: no token ends one. Speed does not depend on the weights (`shapes.py`). Which
tokens are said does: the logits of random weights lie closer together than a trained model's, so that the order in
which bf16 numbers are added decides more often. The share of equal rows is therefore printed for `generate` against
itself too, and --trained asks a model that has learned something: POPE's questions and descriptions of drawn scenes.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from shapes import GPU, SHAPES, Question, device_name, endless_model, peak, sync, versions, write_questions

from relook.evaluate.tasks.chair import CHAIR_PROMPT
from relook.evaluate.tasks.pope import SPLITS, read_pope_questions
from relook.files import write_json
from relook.generate.answering import GenerationSettings, Prompt, answer_questions, generate_ids
from relook.model.load import LoadedModel, load_model, parse_dtype
from relook.toyworld.build import shipped_base
from relook.toyworld.layouts import write_eval

TRAINED = {"images": 300, "new_tokens": 64, "single": 6000, "batched": 6000}
SMALL = {"images": 12, "single": 40, "batched": 80, "dtype": "float32"}


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        loaded, rows = trained(options, Path(folder)) if options.trained else untrained(options, Path(folder))
        asking = GenerationSettings("", options.new_tokens, options.batch_size)
        result: dict[str, Any] = {"options": {**vars(options), "out": str(options.out)}, "device": device_name()}
        result["versions"] = versions()
        said: dict[str, list[str]] = {}

        def engine(some: Sequence[Question]) -> list[str]:
            found = dict(answer_questions(loaded, some, asking, lambda *_: None))
            return [found[i] for i in range(len(some))]

        def generate(size: int, **settings: Any) -> Callable[[Sequence[Question]], list[str]]:
            encoder, how = loaded.encoder(asking.template), replace(asking, generate=tuple(settings.items()))
            prompt = lambda row: Prompt(0, (row[0],), encoder.prompt(row[1], [row[0]]))  # noqa: E731
            return lambda some: [
                loaded.decode(ids)
                for start in range(0, len(some), size)
                for ids in generate_ids(loaded, [prompt(row) for row in some[start : start + size]], how)
            ]

        ways: dict[str, tuple[Callable[[Sequence[Question]], list[str]], int]] = {
            "relook": (engine, len(rows)),
            **{f"generate_{size}": (generate(size), rows_of(options, size)) for size in options.rows},
            **{
                f"generate_static_{size}": (generate(size, cache_implementation="static"), rows_of(options, size))
                for size in options.static
            },
        }
        for name, (ask, count) in ways.items():
            ask(rows[: count // 10 if name == "relook" else min(count, 36)])  # warm-up: compiles, and captures graphs
            said[name], result[name] = measure(ask, rows[:count])
            print(name, result[name], flush=True)
            peers = [n for n in said if n != "relook"]
            result["ratios"] = {n: result["relook"]["rows_per_s"] / result[n]["rows_per_s"] for n in peers}
            if options.out:  # after each: what compiles for long comes last
                write_json(options.out, result)
    pairs = (("relook", "generate_1"), ("generate_16", "generate_1"), ("relook", "generate_16"))
    result["equal_rows"] = {f"{a} = {b}": equal(said[a], said[b]) for a, b in pairs if {a, b} <= said.keys()}
    print("times as fast as:", {name: round(ratio, 1) for name, ratio in result["ratios"].items()})
    for name, found in result["equal_rows"].items():
        print(f"{name}: {found['differing']} of {found['rows']} rows differ; {100 * found['share']:.2f} % are equal")
    if options.out:
        write_json(options.out, result)


def rows_of(options: argparse.Namespace, size: int) -> int:
    """Return the number of questions that `generate` answers at a batch size."""
    return int(options.single if size == 1 else max(options.batched // size, 2) * size)


def untrained(options: argparse.Namespace, folder: Path) -> tuple[LoadedModel, list[Question]]:
    """Random weights, and questions that share nothing but their images."""
    loaded = endless_model(SHAPES[options.family][options.tiny], options.post_decoder, parse_dtype(options.dtype))
    asked = options.images, options.questions, options.question_tokens
    return loaded, write_questions(folder, loaded.processor, *asked)


def trained(options: argparse.Namespace, folder: Path) -> tuple[LoadedModel, list[Question]]:
    """Toyworld's shipped base, and POPE's three splits and a description of each of its scenes."""
    data = write_eval(folder, "test", 0, options.images)
    files = [data / "pope" / f"coco_pope_{split}.json" for split in SPLITS]
    questions = [question for file in files for question in read_pope_questions(file, data / "val2014")]
    asked = [(question.image, question.text) for question in questions]
    asked += [(image, CHAIR_PROMPT) for image in dict.fromkeys(image for image, _ in asked)]
    return load_model(shipped_base(), dtype=options.dtype), asked


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a small shape, for a CPU")
    parser.add_argument("--family", choices=SHAPES, default="llava")
    parser.add_argument("--trained", action="store_true", help="toyworld's base instead of random weights")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16], help="batch sizes of `generate`")
    parser.add_argument("--static", type=int, nargs="*", default=[16], help="and with a static cache, compiled")
    numbers = {
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
    given = parser.parse_known_args()[0]
    parser.set_defaults(**(TRAINED if given.trained else SMALL if given.tiny else {}))
    return parser.parse_args()


def measure(
    ask: Callable[[Sequence[Question]], list[str]], rows: Sequence[Question]
) -> tuple[list[str], dict[str, float]]:
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    sync()
    started = time.perf_counter()
    texts = ask(rows)
    seconds = time.perf_counter() - started
    return texts, {"rows": len(rows), "seconds": seconds, "rows_per_s": len(rows) / seconds, "peak_gib": peak()}


def equal(a: Sequence[str], b: Sequence[str]) -> dict[str, float]:
    pairs = list(zip(a, b, strict=False))  # of the rows that both were asked
    same = sum(x == y for x, y in pairs)
    return {"rows": len(pairs), "differing": len(pairs) - same, "share": same / len(pairs)}


if __name__ == "__main__":
    main()
