"""`relook estimate`: what a recipe needs of GPU memory, disk and time, from configs alone.

No weights are read and no model is put on a device: parameters are counted on a model without memory (torch's meta
device), lengths come from the recipe's data where it is there, and `train/memory.py` and `train/ways.py` do the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from relook.console import output, plain_table, readable_size
from relook.data.encode import Example
from relook.data.images import Picture
from relook.data.packing import Row, Tree, common_root, kept_positions
from relook.errors import DataError, RecipeError, RelookError
from relook.estimate.memory import PARTS, Counts, Job, Way, ways
from relook.files import read_object
from relook.forward.collate import SHARING, Item, Work, corrupted
from relook.forward.packed_attention import BUDGET, packs
from relook.forward.policy import Policy
from relook.model.checkpoint import CHANGE_FILE
from relook.model.families import feature_rows, has_post_decoder, trunk_of, with_post_decoder
from relook.model.lazy_model import ModelSource, open_model
from relook.model.load import AboveTrunk, LoadedModel
from relook.model.trainable import with_regime
from relook.recipe import Recipe, build_recipe, parse_overrides, read_shipped
from relook.train.cache_store import FEATURES, PACKED_POSITIONS, REFERENCE, STATES, Plan, half_of_memory_takes
from relook.train.feature_cache import FOLDER, keeps_features
from relook.train.metrics import Costs
from relook.train.run import RUN_FILE, read_samples

GIB = 2**30
SAMPLES = 2000  # of the data that lengths are taken from
SIZE = (480, 640)  # height and width of an image where the data is not there
NOT_GIVEN = "not-given"  # in place of a path that only the data or the result needs


@dataclass(frozen=True)
class Assumed:
    """What is assumed where the recipe's data is not there.

    Args:
        prompt_tokens: of a prompt's text; its image comes on top.
        response_tokens: of each answer.
        samples: pairs or conversations.
    """

    prompt_tokens: int = 50
    response_tokens: int = 110
    samples: int = 1000

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.response_tokens, self.samples) < 1:
            raise RecipeError(
                f"{self.samples} samples of {self.prompt_tokens} and {self.response_tokens} tokens.",
                "Give 1 or more of each.",
            )


@dataclass(frozen=True)
class Lengths:
    """The trees of a run, or of a part of its samples.

    Args:
        total: how many there are in all.
        source: where this is from, in words.
        size: height and width of an image, as the model's image processor is given it.
    """

    examples: Sequence[Example]
    total: int
    source: str
    size: Callable[[Picture], tuple[int, int]]


def estimate(
    recipe: Recipe, gpus: int = 1, gpu_memory: float = 80.0, assumed: Assumed = Assumed(), tflops: float = 0.0
) -> dict[str, Any]:
    """All that the command shows, as plain values; sizes are bytes of one GPU, GiB where a name says so.

    Args:
        gpu_memory: of each GPU, in GiB.
        tflops: that a GPU reaches, for times; 0 leaves them out.

    Raises:
        RelookError: the model's config is not there, or the recipe does not fit it.
    """
    if gpus < 1 or gpu_memory <= 0 or tflops < 0:
        said = f"{gpus} GPUs with {gpu_memory} GiB and {tflops} TFLOP/s."
        raise RecipeError(said, "Give one GPU at least, and sizes above 0.")
    source = open_on_paper(recipe)
    model = on_paper(recipe, source)
    whole, cut = (policy_on_paper(recipe, model, sharded) for sharded in (False, True))
    lengths = read_lengths(recipe, source, whole.core, assumed)
    job = job_of(recipe, whole, lengths, gpu_memory, gpus, sharded=False)
    found = ways(job, job_of(recipe, cut, lengths, gpu_memory, gpus, sharded=True), gpus)
    return {
        "model": source.model_class.__name__,
        "lengths": lengths.source,
        "batch": asdict(job.batch),
        "parameters": {"all": numbers(whole, False), "trained": numbers(whole, True)},
        "gpus": gpus,
        "gpu_memory_gib": gpu_memory,
        "ways": {way.name: _told(way, gpu_memory) for way in found},
        "predicted_gib": round(max(found[0].peak, found[0].before) / GIB, 2),
        "measured_gib": measured(Path(recipe.output_dir)),
        "trunk_cache": trunk_cache(recipe, whole, lengths, gpus) if recipe.cached_trunk else None,
        "work": work(job, lengths, gpus, tflops),
    }


def _told(way: Way, gpu_memory: float) -> dict[str, Any]:
    return {**asdict(way), "peak": way.peak, "fits": way.fits(gpu_memory * GIB)}


def measured(out: Path) -> float | None:
    """The highest `peak_memory_gib` in the log of a finished run; None where there is none."""
    if not (out / RUN_FILE).exists():
        return None
    found = [line["peak_memory_gib"] for line in read_object(out / RUN_FILE)["log"] if "peak_memory_gib" in line]
    return round(max(found), 2) if found else None


# --- the model and the data, on paper


def open_on_paper(recipe: Recipe) -> ModelSource:
    """The recipe's model by its config; of a run, or with one as adapter, that of its base with its post decoder."""
    path, tower, decoder = Path(recipe.model_name_or_path), recipe.vision_tower or None, None
    for change in (path, Path(recipe.adapter_name_or_path or NOT_GIVEN)):
        if (change / CHANGE_FILE).exists():
            said = read_object(change / CHANGE_FILE)
            decoder = said.get("post_decoder", decoder)
            if change == path:
                path, tower = Path(str(said.get("base"))), tower or said.get("vision_tower")
    source = open_model(path, tower, weights=False)
    if decoder is not None and not has_post_decoder(source.config):
        source = replace(source, config=with_post_decoder(source.config, decoder))
    return source


def on_paper(recipe: Recipe, source: ModelSource) -> Any:
    """The recipe's model without memory, in the types that training holds it in."""
    config = type(source.config).from_dict(source.config.to_dict())  # a regime may change it
    if recipe.tune_post_decoder and not has_post_decoder(config):
        config = with_post_decoder(config, dict(recipe.post_decoder))
    with torch.device("meta"):
        model = replace(source, config=config).model_class(config).to(dtype_of(recipe))
        # The post decoder is there already; a start from the projector's weights changes no shape.
        return with_regime(model, replace(recipe, post_decoder_init="random"))


def dtype_of(recipe: Recipe) -> torch.dtype:
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return next((kind for key, kind in types.items() if recipe.training.get(key)), torch.float32)


def policy_on_paper(recipe: Recipe, model: Any, sharded: bool) -> Policy:
    """The recipe's policy with its trunk, as it would be on a GPU."""
    auto = "flex" if sharded else "compiled"
    how = auto if recipe.trunk_pass == "auto" else recipe.trunk_pass
    # What is taken apart takes neither.
    budget, away = (BUDGET, 0) if sharded else (recipe.activation_memory_budget, recipe.activation_offloading)
    return Policy(model, dtype_of(recipe), how, sharded, budget, away)


def numbers(policy: Policy, trained: bool) -> int:
    return sum(p.numel() for p in policy.core.parameters() if p.requires_grad or not trained)


def read_lengths(recipe: Recipe, source: ModelSource, model: Any, assumed: Assumed) -> Lengths:
    """The trees of the recipe's data, at most SAMPLES of them; of what is assumed where it cannot be read."""
    try:
        samples, report = read_samples(recipe)
        loaded = LoadedModel(model, source.processor(), source.path, recipe.image_aspect_ratio, source.template)
        encoder = loaded.encoder(recipe.version, recipe.model_max_length)
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
        drawn, faults = [samples[i] for i in sorted(order[:SAMPLES])], list[str]()
        if recipe.task == "dpo":
            examples = encoder.pairs(drawn, faults)
        else:
            examples = encoder.conversations(drawn, recipe.conversations_per_tree, faults)
        if not examples:
            raise DataError("No sample can be used.", report.summary())
        total = round(len(samples) * len(examples) / len(drawn))
        # Where all images take the same room their files need not be opened.
        size = (lambda image: SIZE) if isinstance(loaded.image_positions, int) else loaded.images.size
        return Lengths(examples, total, f"{len(examples)} of the {total} in the recipe's data", size)
    except (RelookError, OSError) as error:
        reason = str(error)
    positions = trunk_of(model.config).positions(model)
    image = positions if isinstance(positions, int) else positions(SIZE)
    answer = Row((1,) * assumed.response_tokens, (True,) * assumed.response_tokens)
    tree = Tree(
        (model.config.image_token_id,) * image + (1,) * assumed.prompt_tokens,
        (answer,) * (2 if recipe.task == "dpo" else 1),
    )
    examples = [Example(str(i), tree, (Path(str(i)),)) for i in range(assumed.samples)]
    said = f"{image} positions of an image, {assumed.prompt_tokens} of a prompt, {assumed.response_tokens} of an answer"
    return Lengths(examples, assumed.samples, f"assumed: {said}. {reason}", lambda image: SIZE)


def seen(recipe: Recipe, examples: Sequence[Example]) -> list[Example]:
    """What a step reads of some examples: for mDPO their chosen answers again, on corrupted images."""
    again = [corrupted(Item(example), 0).example for example in examples] if recipe.mdpo_conditional_weight else []
    return [*examples, *again]


def job_of(recipe: Recipe, whole: Policy, lengths: Lengths, gpu_memory: float, gpus: int, sharded: bool) -> Job:
    """The recipe's run on paper, with the largest batch of an epoch in random order."""
    examples = lengths.examples
    rows = [sum(feature_rows(whole.config, lengths.size(image)) for image in example.images) for example in examples]

    def counts(chosen: Sequence[int]) -> Counts:
        trees, times = seen(recipe, [examples[i] for i in chosen]), 2 if recipe.mdpo_conditional_weight else 1
        return Counts.of(trees, [rows[i] for i in chosen] * times, whole)

    size = int(recipe.training.get("per_device_train_batch_size", 8))
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    order *= -(-size // len(order))
    batches = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    batch = max(batches, key=lambda chosen: sum(len(examples[i].tree) for i in chosen))
    largest = reading = counts(batch)
    if recipe.cached_trunk:
        longest = max(range(len(examples)), key=lambda i: len(examples[i].tree))
        reading = counts([longest] * max(1, PACKED_POSITIONS // len(examples[longest].tree)))
        if packs(whole.trunk_pass):  # rows are always full ones
            reading = replace(reading, positions=max(reading.positions, PACKED_POSITIONS))
    return Job(
        recipe,
        Policy(AboveTrunk(whole.core), whole.dtype, whole.trunk_pass) if recipe.cached_trunk else whole,
        whole,
        batch=largest,
        reading=reading,
        cache=on_gpu(recipe, whole, lengths, gpu_memory) if recipe.cached_trunk else 0,
        keeps_features=keeps_features(recipe, whole.config, gpus) and any(rows),
        one_type=sharded,
    )


# --- the trunk cache


def plan_of(whole: Policy, lengths: Lengths) -> tuple[Plan, float]:
    """The plan of the examples' cache, and how many times as many there are in all."""
    images: Any = SimpleNamespace(size=lengths.size)
    plan = Plan.of(whole, list(dict.fromkeys(lengths.examples)), images)
    return plan, lengths.total / len(lengths.examples)


def on_gpu(recipe: Recipe, whole: Policy, lengths: Lengths, gpu_memory: float) -> int:
    """Bytes of the states and features that a run copies to its GPU: all where half of the memory takes them."""
    plan, times = plan_of(whole, lengths)
    size = round(times * plan.size([STATES, FEATURES]))
    if size > gpu_memory * GIB / 2 or recipe.training.get("dataloader_num_workers"):
        return 0
    return round(times * plan.size([STATES, *([FEATURES] if whole.reads_image else [])]))


def trunk_cache(recipe: Recipe, whole: Policy, lengths: Lengths, gpus: int) -> dict[str, Any]:
    """Bytes of the trunk cache, and where it would live on this machine; see `cache._store`."""
    plan, times = plan_of(whole, lengths)
    parts = [STATES, *([FEATURES] if whole.reads_image else []), *([REFERENCE] if recipe.needs_reference else [])]
    sizes = {part: round(times * plan.size([part])) for part in parts}
    size = sum(sizes.values())
    small = half_of_memory_takes(size) and gpus == 1
    in_memory = recipe.feature_cache == "memory" or (recipe.feature_cache == "auto" and small)
    folder = Path(recipe.feature_cache_dir or Path(recipe.output_dir).parent / FOLDER)
    return {"bytes": size, "parts": sizes, "where": "memory" if in_memory else str(folder)}


# --- work


def work(job: Job, lengths: Lengths, gpus: int, tflops: float) -> dict[str, Any]:
    """TFLOP of a pair (sft: of a tree) in a step and before training; seconds of all where `tflops` is given.

    As in the log, products of linear layers count; what is computed again under gradient_checkpointing is in it here.
    """
    examples, whole = seen(job.recipe, lengths.examples), job.whole
    trees = [example.tree for example in examples]
    everything = sum(map(len, trees))
    targets = sum(sum(branch.supervised) for tree in trees for branch in tree.branches)
    packed = packs(whole.trunk_pass) and not job.recipe.cached_trunk
    sharing = min(SHARING, job.batch.trees) if packed else job.batch.trees
    shared = common_root(trees, whole.config.image_token_id) * (len(trees) - -(-len(trees) // sharing))
    tokens = last_mlp = everything - shared
    if whole.last_mlp_at_kept(job.batch.slots, job.batch.positions):
        last_mlp = sum(len(kept_positions(tree, whole.keeps_everything)) for tree in trees)
    features = sum(feature_rows(whole.config, lengths.size(image)) for example in examples for image in example.images)
    done = Work(
        pairs=len(trees),
        tokens=tokens,
        last_mlp=last_mlp,
        features=features,
        encoded=0 if job.keeps_features else features,
        states=everything if whole.keeps_everything else targets,
        targets=targets,
        live=not job.recipe.cached_trunk,
    )
    step = Costs.of(job.policy).flops(done)
    trains = [p for p in whole.core.parameters() if p.requires_grad]
    for parameter in trains:
        parameter.requires_grad_(False)
    forward = Costs.of(whole)
    for parameter in trains:
        parameter.requires_grad_(True)
    before = float(forward.seeing * features) if job.keeps_features else 0.0
    if job.recipe.cached_trunk or job.recipe.needs_reference:
        before = forward.flops(replace(done, encoded=features, live=True))
    step += (forward.reading * tokens + forward.last_mlp * last_mlp) * job.recomputed_share
    samples = len(lengths.examples)
    each = {"step_tflop": step / samples / 1e12, "before_tflop": before / samples / 1e12}
    if tflops:
        each["before_seconds"] = each["before_tflop"] * lengths.total / tflops / gpus
        each["training_seconds"] = each["step_tflop"] * _drawn(job, lengths, gpus) / tflops / gpus
    return {name: float(f"{value:.4g}") for name, value in each.items()} | {"samples": lengths.total}


def _drawn(job: Job, lengths: Lengths, gpus: int) -> float:
    """How many samples all steps together have."""
    said = job.recipe.training
    if int(said.get("max_steps", -1)) > 0:  # goes before epochs
        batches = gpus * int(said.get("gradient_accumulation_steps", 1))
        return float(said["max_steps"] * batches * int(said.get("per_device_train_batch_size", 8)))
    return lengths.total * float(said.get("num_train_epochs", 3))


# --- the command


def estimate_command(
    name: str, keys: Sequence[str], gpus: int, gpu_memory: float, assumed: Assumed, tflops: float
) -> dict[str, Any]:
    """`relook estimate RECIPE [--key value ...]`; paths of data and of the result need not be given."""
    given = {key: value for key, value in read_shipped(name, "recipe").items() if value not in ("", None)}
    given |= parse_overrides(keys)
    needed = ["data_path", "image_folder"] if given.get("task") == "sft" else ["vg_path"]
    if given.get("task") == "dpo" and not {"desc_data_path", "pope_data_path"} & given.keys():
        needed.append("desc_data_path")
    recipe = build_recipe({**dict.fromkeys(("output_dir", *needed), NOT_GIVEN), **given})
    return estimate(recipe, gpus, gpu_memory, assumed, tflops)


def print_estimate(found: Mapping[str, Any]) -> None:
    """What `estimate` found, on standard output; a pipe gets wide lines."""
    console = output()
    console.soft_wrap = True
    trained, everything = (found["parameters"][key] / 1e9 for key in ("trained", "all"))
    console.print(f"{found['model']}: {everything:.3f}e9 parameters, {trained:.3f}e9 of them train")
    console.print(f"lengths: {found['lengths']}")
    columns = (*PARTS, "training", "before", "fits", "CPU")
    table = plain_table("GiB of each GPU", *columns, right=columns)
    for name, way in found["ways"].items():
        sizes = [*(way["parts"][part] for part in PARTS), way["peak"], way["before"]]
        fits = "yes" if way["fits"] else "no"
        table.add_row(name, *(f"{size / GIB:.2f}" for size in sizes), fits, f"{way['processor'] / GIB:.1f}")
    console.print(table)
    first = next(iter(found["ways"].values()))
    elsewhere = (f"{part} {size / GIB:.2f}" for part, size in first["largest"].items() if size > first["parts"][part])
    console.print(f"parts are those at the peak of a step; at other moments up to {', '.join(elsewhere) or 'the same'}")
    if found["measured_gib"] is not None:
        said = found["predicted_gib"]
        console.print(f"measured in the finished run: {found['measured_gib']:.2f} GiB; predicted: {said:.2f}")
    if found["trunk_cache"]:
        cache = found["trunk_cache"]
        parts = ", ".join(f"{part} {readable_size(size)}" for part, size in cache["parts"].items())
        console.print(f"trunk cache: {readable_size(cache['bytes'])} ({parts}) in {cache['where']}")
    done = found["work"]
    console.print(f"work: {done['step_tflop']:g} TFLOP a sample in a step, {done['before_tflop']:g} before training")
    if "training_seconds" in done:
        times = (f"{done[f'{phase}_seconds'] / 60:.1f} minutes" for phase in ("before", "training"))
        console.print("time of {:,} samples: {} before, {} of training".format(done["samples"], *times))
