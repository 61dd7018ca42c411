"""`relook estimate`: GPU memory, disk space and time that a recipe needs, from configs alone.

No weights are read and nothing runs on a GPU. Parameters are counted on a model on torch's meta device, lengths come
from the recipe's data if it can be read, and `estimate/memory.py` adds up the bytes.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from rich.table import Table

from relook.console import fits, plain_table, readable_size, stdout_console
from relook.data.encode import Example
from relook.data.images import ImageSource
from relook.data.packing import TokenRow, Tree, common_root_length, kept_positions
from relook.errors import DataError, RecipeError, RelookError
from relook.estimate.memory import FASTEST, FLAGS, PARTS, BatchCounts, Job, Strategy, strategies
from relook.files import read_json_object
from relook.flags import renamed
from relook.forward.collate import TREES_PER_ROOT, BatchStats, Item, corrupt
from relook.forward.packed_attention import BUDGET, packs_rows
from relook.forward.policy import Policy
from relook.model.checkpoint import ADAPTER_FILE
from relook.model.families import (
    family_of,
    has_post_decoder,
    tower_state_count,
    vision_feature_count,
    with_post_decoder,
)
from relook.model.lazy_model import LazyModel, open_folder
from relook.model.load import HeadModel, LoadedModel, count_positions
from relook.model.trainable import add_trainable_modules
from relook.recipe import Recipe, build_recipe, parse_overrides, read_yaml_or_shipped
from relook.train.cache_store import FEATURES, PACKED_POSITIONS, REFERENCE, STATES, CachePlan, fits_half_of_memory
from relook.train.feature_cache import CACHE_DIR, caches_vision_features
from relook.train.metrics import StepCosts
from relook.train.run import RUN_FILE, read_samples

GIB = 2**30
MAX_SAMPLES = 2000  # samples whose lengths are read
ASSUMED_SIZE = (480, 640)  # height and width of an image without data, COCO's commonest
ENOUGH = 4  # samples that keep a GPU busy: smaller micro-batches wait for the host (benchmarks/RESULTS.md)
TOTALS = ("training", "before", "fits", "CPU", "largest batch", "flag")  # columns that decide, beside PARTS
PLACEHOLDER = "not-given"  # in place of a path that only the data or the result needs; never shown


@dataclass(frozen=True)
class AssumedData:
    """Lengths to assume if the recipe's data cannot be read.

    Args:
        prompt_tokens: tokens of a prompt's text; its image comes on top.
        response_tokens: tokens of each answer.
        samples: number of pairs or conversations.
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
class DataLengths:
    """Trees of a run's samples, or of some of them.

    Args:
        examples: the examples whose trees are known.
        total: number of examples of the run.
        source: where the lengths come from, in words.
        size: returns an image's height and width, as the model's image processor gets it.
        positions: number of positions that an image takes, or a function of its size.
    """

    examples: Sequence[Example]
    total: int
    source: str
    size: Callable[[ImageSource], tuple[int, int]]
    positions: int | Callable[[tuple[int, int]], int]

    def position_count(self, size: tuple[int, int]) -> int:
        """Return the number of positions that an image of this size takes."""
        return self.positions if isinstance(self.positions, int) else self.positions(size)


@dataclass(frozen=True)
class Recommendation:
    """Strategy to run a recipe with.

    Args:
        way: name of the strategy; empty if none fits.
        flags: what is added to the command.
        largest_batch: most samples per GPU and forward pass that fit.
    """

    way: str
    flags: str
    largest_batch: int


def check_hardware(gpus: int, gpu_memory: float, tflops: float) -> None:
    """Raise RecipeError if there are no such GPUs. Args: as of `estimate`."""
    if gpus < 1 or gpu_memory <= 0 or tflops < 0:
        fault = f"{gpus} GPUs with {gpu_memory} GiB and {tflops} TFLOP/s."
        raise RecipeError(fault, "Give one GPU at least, and sizes above 0.")


def estimate(
    recipe: Recipe,
    gpus: int = 1,
    gpu_memory: float = 80.0,
    assumed: AssumedData = AssumedData(),
    tflops: float = 0.0,
    missing: Sequence[str] = (),
) -> dict[str, Any]:
    """Estimate a recipe's memory, trunk cache and work; return all that the command shows, as plain values.

    Sizes are bytes of one GPU, or GiB where a name says so.

    Args:
        gpu_memory: memory of each GPU in GiB.
        tflops: TFLOP/s that a GPU reaches, from which times follow; 0 leaves times out.
        missing: recipe keys of paths that are not set; `PLACEHOLDER` is in their place.

    Raises:
        RelookError: the model's config cannot be read, or the recipe does not fit it.
    """
    check_hardware(gpus, gpu_memory, tflops)
    source = open_meta_model(recipe)
    if recipe.trains_vision_tower and family_of(source.config).positions is None:
        raise RecipeError(
            f"The memory of a {source.config.model_type}'s tower that trains is not known, only LLaVA's.",
            "Run a few steps (--max_steps 3), whose log says the peak.",
        )
    model = build_on_meta(recipe, source)
    policy, sharded_policy = (build_meta_policy(recipe, model, sharded) for sharded in (False, True))
    lengths = read_lengths(recipe, source, policy.core, assumed, missing)
    job = build_job(recipe, policy, lengths, gpu_memory, gpus, sharded=False)
    sharded_job = build_job(recipe, sharded_policy, lengths, gpu_memory, gpus, sharded=True)
    rows = strategies(job, sharded_job, gpus)
    largest = largest_batches(recipe, job, sharded_job, lengths, gpu_memory, gpus)
    cache = cache_size_and_location(recipe, policy, lengths, gpus, missing) if recipe.cached_trunk else None
    return {
        "model": source.model_class.__name__,
        "tower": source.tower_note,
        "lengths": lengths.source,
        "batch": asdict(job.batch),
        "parameters": {"all": count_parameters(policy, False), "trained": count_parameters(policy, True)},
        "bits": recipe.bits,
        "gpus": gpus,
        "gpu_memory_gib": gpu_memory,
        "ways": {row.name: _strategy_row(row, gpu_memory) | {"largest_batch": largest[row.name]} for row in rows},
        "choose": asdict(choose(recipe, job, sharded_job, lengths, gpu_memory, gpus, largest)),
        "predicted_gib": round(max(rows[0].peak, rows[0].before) / GIB, 2),
        "measured_gib": measured_peak(Path(recipe.output_dir)),
        "trunk_cache": cache,
        "work": compute_cost(job, lengths, gpus, tflops),
    }


def _strategy_row(strategy: Strategy, gpu_memory: float) -> dict[str, Any]:
    fits = strategy.fits(gpu_memory * GIB)
    derived = {"flag": strategy.flag, "peak": strategy.peak, "decides": strategy.decides, "fits": fits}
    return asdict(strategy) | derived


def measured_peak(out: Path) -> float | None:
    """Return the highest `peak_memory_gib` in the log of a finished run; None without one."""
    if not (out / RUN_FILE).exists():
        return None
    peaks = [line["peak_memory_gib"] for line in read_json_object(out / RUN_FILE)["log"] if "peak_memory_gib" in line]
    return round(max(peaks), 2) if peaks else None


# ----------------------------------------------------------------------------------------------------
# The model on the meta device, and the lengths of the data.


def open_meta_model(recipe: Recipe) -> LazyModel:
    """Open the recipe's model by its config; a run, or a run as adapter, is its base with its post decoder."""
    path, tower, decoder = Path(recipe.model_name_or_path), recipe.vision_tower or None, None
    for change in (path, *([Path(recipe.adapter_name_or_path)] if recipe.adapter_name_or_path else [])):
        if (change / ADAPTER_FILE).exists():
            adapter = read_json_object(change / ADAPTER_FILE)
            decoder = adapter.get("post_decoder", decoder)
            if change == path:
                path, tower = Path(str(adapter.get("base"))), tower or adapter.get("vision_tower")
    source = open_folder(path, tower, weights=False, tower_by_name=True)
    if decoder is not None and not has_post_decoder(source.config):
        source = replace(source, config=with_post_decoder(source.config, decoder))
    return source


def build_on_meta(recipe: Recipe, source: LazyModel) -> Any:
    """Build the recipe's model on the meta device, in the dtypes that training holds it in."""
    config = type(source.config).from_dict(source.config.to_dict())  # a regime may change it
    if recipe.tune_post_decoder and not has_post_decoder(config):
        config = with_post_decoder(config, dict(recipe.post_decoder))
    with torch.device("meta"):
        model = replace(source, config=config).model_class(config).to(dtype_of(recipe))
    images = LoadedModel(model, source.processor(), source.path).images if recipe.trains_vision_tower else None
    with torch.device("meta"):
        # The post decoder is there already; a start from the projector's weights changes no shape.
        return add_trainable_modules(model, replace(recipe, post_decoder_init="random"), images)


def dtype_of(recipe: Recipe) -> torch.dtype:
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return next((dtype for key, dtype in dtypes.items() if recipe.training.get(key)), torch.float32)


def build_meta_policy(recipe: Recipe, model: Any, sharded: bool) -> Policy:
    """Build the recipe's policy with its trunk, as it would be on a GPU."""
    auto = "flex" if sharded else "compiled"
    trunk_pass = auto if recipe.trunk_pass == "auto" else recipe.trunk_pass
    # Sharded models support neither a memory budget nor offloading.
    budget, offloaded = (BUDGET, 0) if sharded else (recipe.activation_memory_budget, recipe.activation_offloading)
    return Policy(model, dtype_of(recipe), trunk_pass, sharded, budget, offloaded)


def count_parameters(policy: Policy, trained: bool) -> int:
    return sum(p.numel() for p in policy.core.parameters() if p.requires_grad or not trained)


def read_lengths(
    recipe: Recipe, source: LazyModel, model: Any, assumed: AssumedData, missing: Sequence[str] = ()
) -> DataLengths:
    """Build the trees of the recipe's data, at most MAX_SAMPLES of them, or assumed ones if it cannot be read."""
    positions = count_positions(model, source.processor)
    try:
        if unnamed := [key for key in missing if key != "output_dir"]:
            raise DataError(f"The recipe names no {' and no '.join(unnamed)}.")
        samples, report = read_samples(recipe)
        loaded = LoadedModel(model, source.processor(), source.path, recipe.image_aspect_ratio, source.template)
        encoder = loaded.encoder(recipe.version, recipe.model_max_length)
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
        drawn, faults = [samples[i] for i in sorted(order[:MAX_SAMPLES])], list[str]()
        if recipe.task == "dpo":
            examples = encoder.pairs(drawn, faults)
        else:
            examples = encoder.conversations(drawn, recipe.conversations_per_tree, faults)
        if not examples:
            raise DataError("No sample can be used.", report.summary())
        total = round(len(samples) * len(examples) / len(drawn))
        # If all images take the same number of positions, their files need not be opened.
        size = (lambda image: ASSUMED_SIZE) if isinstance(loaded.image_positions, int) else loaded.images.size
        return DataLengths(examples, total, f"{len(examples)} of the {total} in the recipe's data", size, positions)
    except (RelookError, OSError) as error:
        reason = str(error)
    image = positions if isinstance(positions, int) else positions(ASSUMED_SIZE)
    answer = TokenRow((1,) * assumed.response_tokens, (True,) * assumed.response_tokens)
    tree = Tree(
        (model.config.image_token_id,) * image + (1,) * assumed.prompt_tokens,
        (answer,) * (2 if recipe.task == "dpo" else 1),
    )
    # All examples share one tree, but each has an image of its own.
    examples = [Example(str(i), tree, (Path(str(i)),)) for i in range(assumed.samples)]
    source_note = (
        f"assumed: {image} positions of an image, {assumed.prompt_tokens} of a prompt, {assumed.response_tokens} of an "
        f"answer. {reason}"
    )
    return DataLengths(examples, assumed.samples, source_note, lambda image: ASSUMED_SIZE, positions)


def step_examples(recipe: Recipe, examples: Sequence[Example]) -> list[Example]:
    """Return what a step on some examples reads; for mDPO also their chosen answers on corrupted images."""
    corrupted = [corrupt(Item(example), 0).example for example in examples] if recipe.mdpo_conditional_weight else []
    return [*examples, *corrupted]


def build_job(recipe: Recipe, policy: Policy, lengths: DataLengths, gpu_memory: float, gpus: int, sharded: bool) -> Job:
    """Describe the recipe's run, with the largest batch of an epoch in random order."""
    examples = lengths.examples
    largest = trunk_batch = count_batch(recipe, policy, lengths, largest_batch(examples, batch_size(recipe)))
    if recipe.cached_trunk:
        # The trunk pass sorts by length, so its largest batch is one of the longest trees.
        longest = max(examples, key=lambda example: len(example.tree))
        trunk_batch = count_batch(recipe, policy, lengths, [longest] * max(1, PACKED_POSITIONS // len(longest.tree)))
        if packs_rows(policy.trunk_pass):  # packed rows always have the full length
            trunk_batch = replace(trunk_batch, positions=max(trunk_batch.positions, PACKED_POSITIONS))
    return Job(
        recipe,
        Policy(HeadModel(policy.core), policy.dtype, policy.trunk_pass) if recipe.cached_trunk else policy,
        policy,
        batch=largest,
        trunk_batch=trunk_batch,
        cache_bytes=cached_bytes_on_gpu(recipe, policy, lengths, gpu_memory) if recipe.cached_trunk else 0,
        features_cached=caches_vision_features(recipe, policy.config, gpus)
        and any(example.images for example in examples),
        single_dtype=sharded,
    )


def batch_size(recipe: Recipe) -> int:
    return int(recipe.training.get("per_device_train_batch_size", 8))


def count_batch(recipe: Recipe, policy: Policy, lengths: DataLengths, examples: Sequence[Example]) -> BatchCounts:
    """Count the batch that a step on some examples reads."""
    rows = [count_features(policy, lengths, example) for example in examples]
    return BatchCounts.of(step_examples(recipe, examples), rows * (2 if recipe.mdpo_conditional_weight else 1), policy)


def count_features(policy: Policy, lengths: DataLengths, example: Example) -> int:
    """Count the rows of vision features of an example, over its images."""
    sizes = [lengths.size(image) for image in example.images]
    return sum(vision_feature_count(policy.config, size, lengths.position_count(size)) for size in sizes)


def count_tower_states(policy: Policy, lengths: DataLengths, example: Example) -> int:
    """Count the rows that the vision tower gives of an example, over its images."""
    sizes = [lengths.size(image) for image in example.images]
    return sum(tower_state_count(policy.config, size, lengths.position_count(size)) for size in sizes)


def largest_batch(examples: Sequence[Example], size: int) -> list[Example]:
    """Return the batch with the most positions of an epoch in random order."""
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(0)).tolist()
    order *= -(-size // len(order))  # a batch larger than the data repeats it
    batches = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
    return [examples[i] for i in max(batches, key=lambda batch: sum(len(examples[i].tree) for i in batch))]


# ----------------------------------------------------------------------------------------------------
# The choice of a strategy.


def largest_batches(
    recipe: Recipe, job: Job, sharded_job: Job, lengths: DataLengths, gpu_memory: float, gpus: int
) -> dict[str, int]:
    """Return the most samples per GPU and forward pass that fit, by strategy; 0 if not even one does.

    Args:
        recipe: recipe of the jobs, or one that differs only in keys that `Job` itself reads.
    """
    limit = max(1, lengths.total // gpus)
    jobs = [replace(each_job, recipe=recipe) for each_job in (job, sharded_job)]
    names = [strategy.name for strategy in strategies(jobs[0], jobs[1], gpus)]

    @functools.cache
    def fitting(size: int) -> frozenset[str]:
        """Return the names of the strategies that fit with batches of `size` samples."""
        examples, resized = largest_batch(lengths.examples, size), []
        for job in jobs:
            batch = count_batch(recipe, job.trunk_policy, lengths, examples)
            trunk_batch = job.trunk_batch if recipe.cached_trunk else batch
            resized.append(replace(job, batch=batch, trunk_batch=trunk_batch))
        fit = (strategy for strategy in strategies(resized[0], resized[1], gpus) if strategy.fits(gpu_memory * GIB))
        return frozenset(strategy.name for strategy in fit)

    def largest(name: str) -> int:
        # Double the batch until it fails, then bisect between the last that fits and the first that fails.
        fits, fails = 0, 1
        while fails <= limit and name in fitting(fails):
            fits, fails = fails, 2 * fails
        fails = min(fails, limit + 1)
        while fails - fits > 1:
            between = (fits + fails) // 2
            fits, fails = (between, fails) if name in fitting(between) else (fits, between)
        return fits

    return {name: largest(name) for name in names}


def choose(
    recipe: Recipe,
    job: Job,
    sharded_job: Job,
    lengths: DataLengths,
    gpu_memory: float,
    gpus: int,
    largest: Mapping[str, int],
) -> Recommendation:
    """Choose the fastest strategy that fits, with weights of 4 bits if none fits otherwise.

    If the trunk trains, layers are recomputed only if batches of ENOUGH samples do not fit otherwise. Steps have as
    many samples as the recipe's, in micro-batches if they do not fit at once.

    Args:
        largest: `largest_batches` of the recipe as it is.
    """
    key = "activation_checkpointing" if recipe.training.get("activation_checkpointing") else "gradient_checkpointing"
    changes: list[dict[str, Any]] = [{}]
    if not recipe.frozen_trunk:
        recomputes = bool(recipe.training.get(key))
        changes = [{} if recompute == recomputes else {key: recompute} for recompute in (False, True)]

    @functools.cache
    def sizes(*change: tuple[str, Any]) -> Mapping[str, int]:
        changed = _changed(recipe, dict(change))
        return largest_batches(changed, job, sharded_job, lengths, gpu_memory, gpus) if changed and change else largest

    for bits in ({}, {"bits": 4}):
        usable = [change | bits for change in changes if _changed(recipe, change | bits)]
        for name in FASTEST:
            fitted = [fit for change in usable if (fit := _fitted(recipe, change, name, sizes))]
            if fitted:
                # Without recomputation comes first; with it, if only that has batches that keep a GPU busy.
                enough = [fit for fit in fitted if fit[1] >= min(ENOUGH, batch_size(recipe))]
                change, largest_size = (enough or fitted[::-1])[0]
                return Recommendation(name, _flags(recipe, name, change), largest_size)
    return Recommendation("", "", 0)


def _fitted(
    recipe: Recipe, change: Mapping[str, Any], name: str, sizes: Callable[..., Mapping[str, int]]
) -> tuple[dict[str, Any], int] | None:
    """Return a change by which a strategy fits, micro-batches included if it needs them, and the largest batch."""
    size, steps = batch_size(recipe), int(recipe.training.get("gradient_accumulation_steps", 1))
    largest = sizes(*change.items()).get(name, 0)
    if largest >= size:
        return dict(change), largest
    # With accumulation, the gradients of earlier micro-batches take memory beside the next one.
    largest = largest and sizes(*change.items(), ("gradient_accumulation_steps", max(2, steps)))[name]
    parts = [part for part in range(1, largest + 1) if size * steps % part == 0]
    if not parts:
        return None
    split = {"per_device_train_batch_size": parts[-1], "gradient_accumulation_steps": size * steps // parts[-1]}
    return {**change, **split}, largest


def _flags(recipe: Recipe, name: str, change: Mapping[str, Any]) -> str:
    """Return what a strategy and a change add to a recipe's command."""
    # A null switches off what the recipe sets for another strategy.
    other = [key for key in ("fsdp", "deepspeed") if recipe.training.get(key) and key not in FLAGS[name]]
    values = {**dict.fromkeys(other), **change}
    words = (f"--{key} {yaml.safe_dump(value).split()[0]}" for key, value in values.items())
    return " ".join(filter(None, [FLAGS[name], *words]))


def _changed(recipe: Recipe, change: Mapping[str, Any]) -> Recipe | None:
    """Return the recipe with some keys changed; None if they contradict it."""
    fields = {key: value for key, value in change.items() if hasattr(recipe, key)}
    training = {**recipe.training, **{key: value for key, value in change.items() if key not in fields}}
    try:
        return replace(recipe, training=training, **fields)
    except RecipeError:
        return None


# ----------------------------------------------------------------------------------------------------
# The trunk cache.


def build_cache_plan(policy: Policy, lengths: DataLengths) -> tuple[CachePlan, float]:
    """Plan the cache of the known examples; return the plan, and the factor from them to all examples."""
    images: Any = SimpleNamespace(size=lengths.size, position_count=lengths.position_count)
    plan = CachePlan.of(policy, list(dict.fromkeys(lengths.examples)), images)
    return plan, lengths.total / len(lengths.examples)


def cached_bytes_on_gpu(recipe: Recipe, policy: Policy, lengths: DataLengths, gpu_memory: float) -> int:
    """Return the bytes of states and features that a run copies to its GPU: 0 if half of its memory is too small."""
    plan, factor = build_cache_plan(policy, lengths)
    size = round(factor * plan.size([STATES, FEATURES]))
    if size > gpu_memory * GIB / 2 or recipe.training.get("dataloader_num_workers"):
        return 0
    return round(factor * plan.size([STATES, *([FEATURES] if policy.needs_vision_features else [])]))


def cache_size_and_location(
    recipe: Recipe, policy: Policy, lengths: DataLengths, gpus: int, missing: Sequence[str] = ()
) -> dict[str, Any]:
    """Compute the trunk cache's bytes, and where it would be on this machine (`feature_cache._choose_store`)."""
    plan, factor = build_cache_plan(policy, lengths)
    parts = [
        STATES,
        *([FEATURES] if policy.needs_vision_features else []),
        *([REFERENCE] if recipe.needs_reference else []),
    ]
    sizes = {part: round(factor * plan.size([part])) for part in parts}
    size = sum(sizes.values())
    small = fits_half_of_memory(size) and gpus == 1
    in_memory = recipe.feature_cache == "memory" or (recipe.feature_cache == "auto" and small)
    beside = f"{CACHE_DIR} beside output_dir" if "output_dir" in missing else Path(recipe.output_dir).parent / CACHE_DIR
    location = "memory" if in_memory else str(recipe.feature_cache_dir or beside)
    return {"bytes": size, "parts": sizes, "where": location}


# ----------------------------------------------------------------------------------------------------
# Work and time.


def compute_cost(job: Job, lengths: DataLengths, gpus: int, tflops: float) -> dict[str, Any]:
    """Compute the TFLOP of a pair (SFT: of a tree) in a step and before training, and the seconds if `tflops` is given.

    As in the log, only products of linear layers count (`train.metrics`). Unlike there, recomputation counts too.
    """
    examples, policy = step_examples(job.recipe, lengths.examples), job.trunk_policy
    trees = [example.tree for example in examples]
    everything = sum(map(len, trees))
    targets = sum(sum(branch.supervised) for tree in trees for branch in tree.branches)
    # Trees that share a root read it once: all but one of each group are spared it.
    packed = packs_rows(policy.trunk_pass) and not job.recipe.cached_trunk
    sharing = min(TREES_PER_ROOT, job.batch.trees) if packed else job.batch.trees
    spared = common_root_length(trees, policy.config.image_token_id) * (len(trees) - -(-len(trees) // sharing))
    tokens = last_mlp = everything - spared
    if policy.uses_sparse_last_mlp(job.batch.slots, job.batch.positions):
        last_mlp = sum(len(kept_positions(tree, policy.needs_all_states)) for tree in trees)
    states = sum(count_tower_states(policy, lengths, example) for example in examples)
    work = BatchStats(
        pairs=len(trees),
        tokens=tokens,
        last_mlp=last_mlp,
        features=sum(count_features(policy, lengths, example) for example in examples),
        projected=states,
        encoded=0 if job.features_cached else states,
        states=everything if policy.needs_all_states else targets,
        targets=targets,
        live=not job.recipe.cached_trunk,
    )
    step = StepCosts.of(job.policy).flops(work)
    # Costs of a forward pass alone: freeze everything while they are counted.
    trained = [p for p in policy.core.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    forward = StepCosts.of(policy)
    for parameter in trained:
        parameter.requires_grad_(True)
    before = float(forward.vision_tower * states) if job.features_cached else 0.0
    if job.recipe.cached_trunk or job.recipe.needs_reference:
        before = forward.flops(replace(work, encoded=states, live=True))
    step += (forward.trunk * tokens + forward.last_mlp * last_mlp) * job.recomputed_share
    samples = len(lengths.examples)
    costs = {"step_tflop": step / samples / 1e12, "before_tflop": before / samples / 1e12}
    if tflops:
        costs["before_seconds"] = costs["before_tflop"] * lengths.total / tflops / gpus
        costs["training_seconds"] = costs["step_tflop"] * _samples_drawn(job, lengths, gpus) / tflops / gpus
    return {name: float(f"{value:.4g}") for name, value in costs.items()} | {"samples": lengths.total}


def _samples_drawn(job: Job, lengths: DataLengths, gpus: int) -> float:
    """Count the samples of all steps together."""
    training = job.recipe.training
    if int(training.get("max_steps", -1)) > 0:  # overrides num_train_epochs
        batches = gpus * int(training.get("gradient_accumulation_steps", 1))
        return float(training["max_steps"] * batches * int(training.get("per_device_train_batch_size", 8)))
    return lengths.total * float(training.get("num_train_epochs", 3))


# ----------------------------------------------------------------------------------------------------
# The command.


def estimate_command(
    name: str, keys: Sequence[str], gpus: int, gpu_memory: float, assumed: AssumedData, tflops: float
) -> dict[str, Any]:
    """Run `relook estimate RECIPE [--key value ...]`; paths of data and of the result need not be set."""
    values = {key: value for key, value in read_yaml_or_shipped(name, "recipe").items() if value not in ("", None)}
    values = renamed(values) | renamed(parse_overrides(keys))
    # A recipe is not valid without these paths, but an estimate needs none of them.
    needed = ["output_dir", *(["data_path", "image_folder"] if values.get("task") == "sft" else [])]
    if values.get("task") == "dpo" and "pairs_path" not in values:
        needed += ["vg_path", *([] if {"desc_data_path", "pope_data_path"} & values.keys() else ["desc_data_path"])]
    missing = [key for key in needed if key not in values]
    recipe = build_recipe({**dict.fromkeys(missing, PLACEHOLDER), **values})
    return estimate(recipe, gpus, gpu_memory, assumed, tflops, missing) | {"recipe": [name, *keys]}


def advice(estimated: Mapping[str, Any]) -> list[str]:
    """Say in words what decides whether the recipe fits, and what to choose.

    Args:
        estimated: result of `estimate_command`.
    """
    chosen, gpus = estimated["choose"], estimated["gpus"]
    before = [name for name, row in estimated["ways"].items() if row["decides"] == "before"]
    lines = []
    if before:
        names = "every row" if len(before) == len(estimated["ways"]) else "; ".join(before)
        lines.append(
            f"before decides, not training: {names}. Every process holds the whole model in the pass before training, "
            "which no way of sharing and no optimizer makes smaller."
        )
    if not chosen["way"]:
        return [
            *lines,
            "choose: nothing fits, not even batches of one sample with layers computed again and weights of 4 bits. "
            "Take GPUs with more memory, or a smaller model.",
        ]
    flags = chosen["flags"].split()
    words = [*_without(estimated["recipe"], flags), *flags]
    if "--bits" in words and estimated["bits"] == 16:
        lines.append("weights of 4 bits change what the model says: give --bits 4 to relook eval, too")
    launcher = f"torchrun --nproc_per_node {gpus} -m relook.train" if gpus > 1 else "relook train"
    return [
        *lines,
        f"choose: {chosen['way']}, the fastest that fits, by up to {chosen['largest_batch']:,} samples a GPU and step:",
        f"  {launcher} {shlex.join(words)}",
    ]


def _without(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """Return the words of a command without the keys that flags set anew."""
    name, *rest = words
    replaced = {flag for flag in flags if flag.startswith("--")}
    pairs = [word.partition("=") for word in rest]
    # `--key=value` is one word, `--key value` two.
    dropped = {i + k for i, (key, equals, _) in enumerate(pairs) if key in replaced for k in range(1 if equals else 2)}
    return [name, *(word for i, word in enumerate(rest) if i not in dropped)]


def _table(ways: Mapping[str, Any], columns: Sequence[str]) -> Table:
    """Build a table with a row for each way to train, of the given columns: PARTS, TOTALS or both."""
    table = plain_table("GiB of each GPU", *columns, right=set(columns) - {"flag"})
    table.collapse_padding = True
    for name, row in ways.items():
        cells = {part: f"{row['parts'][part] / GIB:.2f}" for part in PARTS} | {
            "training": f"{row['peak'] / GIB:.2f}",
            "before": f"{row['before'] / GIB:.2f}",
            "fits": "yes" if row["fits"] else "no",
            "CPU": f"{row['processor'] / GIB:.1f}",
            "largest batch": str(row["largest_batch"] or "none"),
            "flag": row["flag"] or "none",
        }
        table.add_row(name, *(cells[column] for column in columns))
    return table


def print_estimate(estimated: Mapping[str, Any]) -> None:
    """Print an estimate to standard output; a pipe gets wide lines."""
    console = stdout_console()
    console.soft_wrap = not console.is_terminal
    trained, everything = (estimated["parameters"][key] / 1e9 for key in ("trained", "all"))
    console.print(f"{estimated['model']}: {everything:.3f}e9 parameters, {trained:.3f}e9 of them train")
    if estimated["tower"]:
        console.print(f"vision tower: {estimated['tower']}")
    console.print(f"lengths: {estimated['lengths']}")
    wide = _table(estimated["ways"], (*PARTS, *TOTALS))
    # A narrow terminal gets two tables: what decides, then the parts.
    for table in [wide] if fits(wide, console) else [_table(estimated["ways"], names) for names in (TOTALS, PARTS)]:
        console.print(table)
        console.print()
    for line in advice(estimated):
        console.print(line, soft_wrap=True if line.startswith("  ") else None)  # a command is copied as it is
    first = next(iter(estimated["ways"].values()))
    elsewhere = (f"{part} {size / GIB:.2f}" for part, size in first["largest"].items() if size > first["parts"][part])
    console.print(f"parts are those at the peak of a step; at other moments up to {', '.join(elsewhere) or 'the same'}")
    if estimated["measured_gib"] is not None:
        measured, predicted = estimated["measured_gib"], estimated["predicted_gib"]
        console.print(f"measured in the finished run: {measured:.2f} GiB; predicted: {predicted:.2f}")
    if estimated["trunk_cache"]:
        cache = estimated["trunk_cache"]
        parts = ", ".join(f"{part} {readable_size(size)}" for part, size in cache["parts"].items())
        console.print(f"trunk cache: {readable_size(cache['bytes'])} ({parts}) in {cache['where']}")
    work = estimated["work"]
    console.print(f"work: {work['step_tflop']:g} TFLOP a sample in a step, {work['before_tflop']:g} before training")
    if "training_seconds" in work:
        times = (f"{work[f'{phase}_seconds'] / 60:.1f} minutes" for phase in ("before", "training"))
        console.print("time of {:,} samples: {} before, {} of training".format(work["samples"], *times))
