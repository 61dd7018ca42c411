"""The study's variants: each is trained on the same pairs and evaluated on the test scenes; then the table.

A variant is a recipe's keys, the pairs it learns from, and for controls a change to what the post decoder sees.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis import analyse, print_tables
from work import HERE, Paths, Sizes, evaluate, relook

from relook.files import read_json

POST_DECODER = {"tune_post_decoder": "true", "post_decoder_init": "projector"}
WITHOUT = {"tune_post_decoder": "true", "post_decoder.attention": "none"}
LORA = {"lora_enable": "true", "num_train_epochs": "1"}
DPO = {"dpo_weight": "1.0"}


@dataclass(frozen=True)
class Variant:
    """Keys of the recipe, the pairs, and changes in training and at test."""

    keys: Mapping[str, str]
    pairs: str = "0"  # the file of description pairs: a dose in percent, or "policy"; empty: none
    questions: bool = True  # train on question pairs, too
    change: tuple[str, ...] = ()
    test_change: tuple[str, ...] | None = None  # None: as in training
    trained_as: str = ""  # another variant, of which this is the model


def preference(pairs: str) -> dict[str, Variant]:
    """Imitation of the chosen captions alone, and DPO beside it."""
    return {
        f"nll_{pairs}": Variant(POST_DECODER, pairs, questions=False),
        f"dpo_{pairs}": Variant(POST_DECODER | DPO, pairs, questions=False),
    }


VARIANTS = {  # in the order of training
    "cross": Variant(POST_DECODER),
    **preference("20"),
    "none": Variant(WITHOUT),
    "dpo_20_0.3": Variant(POST_DECODER | {"dpo_weight": "0.3"}, "20", questions=False),
    "cross_questions": Variant(POST_DECODER, ""),
    "none_questions": Variant(WITHOUT, ""),
    "dpo_20_0.1": Variant(POST_DECODER | {"dpo_weight": "0.1"}, "20", questions=False),
    "own_tokens": Variant(POST_DECODER, change=("own_tokens",)),
    **preference("0"),
    "swapped": Variant(POST_DECODER, test_change=("other_image",), trained_as="cross"),
    "swapped_similar": Variant(POST_DECODER, test_change=("similar_image",), trained_as="cross"),
    **preference("10"),
    "other_image": Variant(POST_DECODER, change=("other_image",)),
    "similar_image": Variant(POST_DECODER, change=("similar_image",)),
    **preference("5"),
    "projected": Variant(POST_DECODER, change=("projected",)),
    **preference("policy"),
    "lora": Variant(LORA),
}


def parameters_matched(base: Path) -> dict[str, dict[str, str]]:
    """Return keys by which the variants without cross-attention and with LoRA have a post decoder's parameters."""
    config = read_json(base / "config.json")
    text, width = config["text_config"], config["vision_config"]["hidden_size"]
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    # Alignment (two linears with biases, a norm), four square projections, a norm.
    look = width * hidden + hidden * hidden + 4 * hidden + 4 * hidden * hidden + 2 * hidden
    keys = hidden * text["num_key_value_heads"] // text["num_attention_heads"]
    per_rank = text["num_hidden_layers"] * (4 * hidden + 2 * (hidden + keys) + 3 * (hidden + inner))
    rank = round((look + 3 * hidden * inner) / per_rank)
    return {
        "none": {"post_decoder.mlp_size": str(inner + round(look / (3 * hidden)))},
        "lora": {"lora_r": str(rank), "lora_alpha": str(2 * rank)},
    }


def run(paths: Paths, sizes: Sizes) -> dict[str, Any]:
    split = sizes.split
    only = sizes.only or list(VARIANTS)
    cells = [(name, seed) for seed in sizes.seeds for name in only]
    matched = parameters_matched(paths.base)
    start = time.time()
    failures = {}
    # Variants of the same pairs share a trunk cache on disk: the first of them fills it, the others wait for it.
    filled = {cache_of(name): threading.Lock() for name in VARIANTS}
    fillers = {cache_of(name): (name, seed) for name, seed in reversed(cells)}
    cells = sorted(cells, key=lambda c: c != fillers[cache_of(c[0])])
    # A model that is swapped at test is trained once.
    training = {(name, seed): threading.Lock() for name in VARIANTS for seed in sizes.seeds}

    def cell(name: str, seed: int) -> None:
        if sizes.study_seconds and time.time() - start > sizes.study_seconds:
            failures[f"{name}-{seed}"] = "not begun: out of time"
            return
        try:
            variant = VARIANTS[name]
            file = pairs_file(paths, variant)
            if variant.pairs and not (file.exists() and read_json(file)):
                raise RuntimeError(f"{name} has no pairs: the base's captions hold no false object.")
            trained = variant.trained_as or name
            cached = filled[cache_of(name)] if name != "lora" else None
            with training[trained, seed]:
                with cached or nullcontext():
                    first = cached is not None and not cache_folder(paths, variant).exists()
                    model = train(paths, sizes, trained, seed, matched) if first else None
                model = model or train(paths, sizes, trained, seed, matched)
            answer(paths, sizes, name, model, split, seed)
        except RuntimeError as error:
            failures[f"{name}-{seed}"] = str(error)
            print(error, flush=True)

    with ThreadPoolExecutor(sizes.jobs) as pool:
        base = pool.submit(evaluate, paths, sizes, "base", paths.base, split)
        list(pool.map(lambda c: cell(*c), cells))
        base.result()
    result = analyse([(paths.data(split), paths.work / "eval" / split)])
    print_tables(result)
    return {**result, "failures": failures}


def cache_of(name: str) -> tuple[str, bool]:
    return VARIANTS[name].pairs, VARIANTS[name].questions


def pairs_file(paths: Paths, variant: Variant) -> Path:
    folder = paths.work if variant.pairs == "policy" else paths.data("pairs")
    return folder / f"desc_{variant.pairs}.json"


def cache_folder(paths: Paths, variant: Variant) -> Path:
    folder: Path = paths.work / f"trunk_cache_{variant.pairs}_{'all' if variant.questions else 'captions'}"
    return folder


def train(paths: Paths, sizes: Sizes, name: str, seed: int, matched: Mapping[str, Mapping[str, str]]) -> Path:
    variant, out = VARIANTS[name], paths.work / "runs" / f"{name}-{seed}"
    if (out / "run.json").exists():
        return out
    data = paths.data("pairs")
    keys = {
        "model_name_or_path": paths.base,
        "output_dir": out,
        "vg_path": data,
        "seed": seed,
        **({"desc_data_path": pairs_file(paths, variant)} if variant.pairs else {}),
        **variant.keys,
        **matched.get(name.removesuffix("_questions"), {}),
    }
    if name != "lora":
        keys |= {"feature_cache": "disk", "feature_cache_dir": cache_folder(paths, variant)}
    if variant.questions:
        keys["pope_data_path"] = data / "pope_data.json"
    words = [word for key, value in keys.items() for word in (f"--{key}", value)]
    start = time.time()
    recipe = ("train", HERE / "recipe_tune.yaml", *sizes.tune)
    relook(paths, sizes, f"train-{name}-{seed}", *recipe, *words, change=variant.change)
    print(f"  trained {name}-{seed} in {time.time() - start:.0f} s", flush=True)
    return out


def answer(paths: Paths, sizes: Sizes, name: str, model: Path, split: str, seed: int) -> None:
    variant = VARIANTS[name]
    change = variant.change if variant.test_change is None else variant.test_change
    start = time.time()
    scores = evaluate(paths, sizes, f"{name}-{seed}", model, split, *change)
    shown = {key: None if value is None else round(value, 3) for key, value in scores.items()}
    print(f"  evaluated {name}-{seed} in {time.time() - start:.0f} s: {shown}", flush=True)
