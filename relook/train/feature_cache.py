"""Cache of frozen-trunk hidden states, computed once per dataset and kept in memory or on disk.

The cache has three parts: hidden states, vision features once per distinct image, and reference log-probs. Hidden
states are kept at the supervised positions, or at all positions if the post decoder reads those. Each part is cut into
shards of whole examples. The cut depends on the data alone. A pass that was killed and resumed, or split over several
processes, therefore produces the same bytes as an uninterrupted one.

The walk of `cached_items`: hash what the trunk's output depends on (`cache_inputs`), plan shards (`CachePlan`), choose
memory or disk (`_choose_store`), compute missing shards (`fill_cache`), return views of them (`TrunkCache.items`).

There are no locks. Processes divide the missing shards among themselves, files appear whole under the hash of their
content, and barriers separate looking, filling and reading.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar

import PIL
import torch
import transformers
from torch import Tensor

from relook import distributed
from relook.console import progress, readable_size, status
from relook.data.encode import Example
from relook.data.images import ImageLoader, prefetch_map, row_count, stack
from relook.data.packing import TreeTargets, copy_to_cpu
from relook.errors import DataError, RecipeError, RelookError
from relook.files import file_hash, read_json, require_disk_space, text_hash, write_json
from relook.forward.collate import Collator, Item, KeptImage, reference_log_probs
from relook.forward.policy import LiveBatch, Policy
from relook.model.checkpoint import parse_folder
from relook.model.families import family_of, image_features, position_rows, tower_state_count
from relook.model.load import model_hash, tower_of
from relook.model.modeling_relook import reads_tower, tower_states, tower_width
from relook.recipe import Recipe
from relook.train.cache_store import (
    FEATURES,
    REFERENCE,
    STATES,
    CachePlan,
    Shard,
    ShardFolder,
    Store,
    fits_half_of_memory,
)

# ----------------------------------------------------------------------------------------------------
# The cache key: everything a trunk cache depends on, and how other caches in the same folder differ from it.

CACHE_FORMAT = 4  # part of the key; raise it when the files, the sizes that cut shards or `as_rgb` change
INDEX_FILE = "index.json"


def cache_inputs(
    model: Path,
    vision_tower: Path | str | None,
    policy: Policy,
    weights: torch.dtype,
    examples: Sequence[Example],
    images: ImageLoader,
    adapter: str = "",
    bits: str = "16",
) -> dict[str, str]:
    """Collect everything that determines the trunk's output: weights, tokens, image contents, precision, versions.

    An untrained post decoder changes no logit, so the reference log-probs depend on nothing else.

    Args:
        model: folder that the policy was loaded from.
        vision_tower: vision tower to use if the model folder has none of its own.
        policy: gives the dtype, the trunk pass, the cached positions and the device.
        weights: dtype of the trunk's weights in memory.
        examples: encoded examples, hashed by tokens and by image contents.
        images: image loader, whose preprocessing is part of the key.
        adapter: adapter that was merged into the model; empty for none.
        bits: quantisation of its linear layers.
    """
    folder = parse_folder(model)
    tower = tower_of(folder, vision_tower, adapter or None)
    settings = getattr(policy.config, "post_decoder", None) or {}
    features = settings.get("features", "auto")
    return {
        "format": str(CACHE_FORMAT),
        **({"features": features} if features != "auto" else {}),
        "model": model_hash(folder),
        "adapter": model_hash(Path(adapter)) if adapter else "",
        "bits": bits,
        "vision tower": model_hash(tower) if tower else "",
        "tokens": _tokens_hash(tuple(examples)),
        "images": images_hash(examples),
        "preprocessing": text_hash(repr(images.image_processor), images.aspect_ratio),
        "precision": f"{policy.dtype}, weights {weights}",
        "trunk pass": policy.trunk_pass,
        "positions": "all" if policy.needs_all_states else "supervised",
        "device": policy.device.type,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, Pillow {PIL.__version__}",
    }


def images_hash(examples: Sequence[Example]) -> str:
    """Hash the contents of the examples' image files, in order."""
    digest = hashlib.sha256()
    for example in examples:
        for image in example.images:
            digest.update(file_hash(image).encode())
    return digest.hexdigest()


@lru_cache(maxsize=2)  # the runs of a sweep share their examples
def _tokens_hash(examples: tuple[Example, ...]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(example.tree).encode())
        digest.update(f"{len(example.images)};".encode())  # which images is in `images_hash`
    return digest.hexdigest()


def cache_key(source: dict[str, str]) -> str:
    return text_hash(*(f"{name}={value}" for name, value in source.items()))


def describe_other_caches(folder: Path, key: str, source: dict[str, str]) -> list[str]:
    """Describe each cache in `folder` that was made from other inputs: one line with its size and what differs."""
    lines = []
    for index in sorted(folder.glob(f"*/{INDEX_FILE}")):
        if index.parent.name == key:
            continue
        try:
            old = read_json(index)["made_from"]
            differs = ", ".join(name for name in source if old.get(name) != source[name])
        except (DataError, KeyError, TypeError, AttributeError):  # a damaged index, or one of another program
            differs = "unknown inputs"
        size = readable_size(sum(file.stat().st_size for file in index.parent.iterdir()))
        lines.append(f"{index.parent} ({size}) cannot be used here (it differs in {differs}): left as it is")
    return lines


# ----------------------------------------------------------------------------------------------------

CACHE_DIR = "trunk_cache"  # next to the run folders


@dataclass
class TrunkCache:
    """Filled store with its plan. The latest is kept in `current`, so runs in one process share the trunk pass.

    Args:
        key: hash of everything that determines the trunk's output (see `cache_inputs`).
        plan: layout of the store.
        store: tensors by name, in memory or on disk.
        on_device: copies of the store's tensors on the GPU, if they fit.
    """

    key: str
    plan: CachePlan
    store: Store
    on_device: dict[str, Tensor] = field(default_factory=dict)

    current: ClassVar[TrunkCache | None] = None

    @cached_property
    def targets(self) -> list[TreeTargets]:
        """Return the positions of each example's targets among its hidden states."""
        return [TreeTargets.of(example.tree, self.plan.keep_all) for example in self.plan.examples]

    def items(self, with_reference: bool) -> list[Item]:
        """Return the examples with their hidden states and reference log-probs, as views of the shards (no copy)."""
        states = self._by_example(STATES)
        reference = self._by_example(REFERENCE) if with_reference else {}
        return [
            Item(e, states=states[i], targets=self.targets[i], reference=reference.get(i))
            for i, e in enumerate(self.plan.examples)
        ]

    def features(self) -> dict[Path, Tensor]:
        """Return the vision features of each image, shape (M, V)."""
        plan, by_image = self.plan, dict[Path, Tensor]()
        for shard in plan.shards:
            if shard.images:
                features = self._tensor(shard.name(FEATURES)).split(plan.rows(FEATURES, shard))
                by_image.update(zip(shard.images, features, strict=True))
        return by_image

    def move_to(self, device: torch.device, names: Sequence[str]) -> None:
        """Copy the named tensors to a GPU, so that batches are built there and no step waits for a transfer."""
        for name in names:
            if name not in self.on_device:
                self.on_device[name] = self.store[name].to(device)

    def _tensor(self, name: str) -> Tensor:
        """Return a shard's tensor: its copy on the GPU, or the stored one."""
        return self.on_device[name] if name in self.on_device else self.store[name]

    def _by_example(self, part: str) -> dict[int, Tensor]:
        """Split the shards of a part into one view per example, by the example's index."""
        plan, views = self.plan, dict[int, Tensor]()
        for shard in plan.shards:
            views.update(zip(shard.examples, self._tensor(shard.name(part)).split(plan.rows(part, shard)), strict=True))
        return views


def cached_items(
    recipe: Recipe,
    policy: Policy,
    examples: Sequence[Example],
    collator: Collator,
    load_with_trunk: Callable[[], Policy],
) -> list[Item]:
    """Return the examples with their cached trunk outputs, computing those that are missing.

    Sets the collator's vision features if the policy reads them.

    Args:
        policy: the policy to train; its trunk is not run.
        load_with_trunk: loads the policy with its trunk; called only if something has to be computed.

    Raises:
        RelookError: the disk is too small, or the machines do not share the cache folder.
    """
    path, tower = Path(recipe.model_name_or_path), recipe.vision_tower or None
    bits = f"{recipe.bits} {recipe.quant_type} {recipe.double_quant}" if recipe.bits == 4 else str(recipe.bits)
    source = cache_inputs(
        path, tower, policy, policy.dtype, examples, collator.images, adapter=recipe.adapter_name_or_path, bits=bits
    )
    key = cache_key(source)
    # Plan: the process's last cache, if it has the same key, has the same plan.
    cache = TrunkCache.current
    plan = cache.plan if cache is not None and cache.key == key else CachePlan.of(policy, examples, collator.images)
    parts = [STATES]
    if policy.needs_vision_features:
        parts.append(FEATURES)
    if recipe.needs_reference:
        parts.append(REFERENCE)
    # Store: a new one for another key. For the same key the last one is kept, unless the recipe wants another place.
    if cache is None or cache.key != key:
        TrunkCache.current = cache = None  # free the old cache before measuring free memory
        cache = TrunkCache(key, plan, _choose_store(recipe, key, plan, parts))
    elif isinstance(cache.store, ShardFolder) and recipe.feature_cache == "memory":
        cache.store.refresh()  # shards already on disk are used from there, not recomputed in memory
    elif isinstance(cache.store, ShardFolder) or recipe.feature_cache == "disk":
        cache.store = _choose_store(recipe, key, plan, parts)
    fill_cache(cache, source, parts, policy, collator, load_with_trunk)
    TrunkCache.current = cache  # only now: a pass that fails leaves no half-filled cache behind
    if recipe.training.get("dataloader_num_workers"):
        cache.on_device.clear()  # DataLoader worker processes cannot read GPU memory
    elif policy.device.type == "cuda":
        torch.cuda.empty_cache()
        # Keep the cache on the GPU if it takes at most half of what is free there.
        if plan.size([STATES, FEATURES]) <= torch.cuda.mem_get_info()[0] // 2:
            cache.move_to(policy.device, [s.name(p) for p in parts if p != REFERENCE for s in plan.shards_with(p)])
    # Read back: items and features are views of the shards.
    collator.features = cache.features() if policy.needs_vision_features else None
    return cache.items(recipe.needs_reference)


def fill_cache(
    cache: TrunkCache,
    source: dict[str, str],
    parts: Sequence[str],
    policy: Policy,
    collator: Collator,
    load_with_trunk: Callable[[], Policy],
) -> None:
    """Compute the missing shards. On disk each process computes a share of them, and all wait for the last one.

    Raises:
        RelookError: see `cached_items`.
    """
    store, plan = cache.store, cache.plan
    missing = _missing(store, plan, parts)
    if isinstance(store, ShardFolder):
        _reserve_space(store, source, plan, parts, missing)
        # Every process must check the free space before any of them starts to use it.
        distributed.barrier("a look at the free space")
    elif missing:
        status(f"  trunk cache: {readable_size(plan.size(parts))} in memory")
    # A folder is shared between processes; memory is not, so there each process computes every shard.
    share = distributed.shard if isinstance(store, ShardFolder) else list
    # States and features come first: reference log-probs are computed from them.
    trunk_parts = [part for part in parts if part != REFERENCE]
    to_compute = {s: lacking for s, absent in missing.items() if (lacking := [p for p in absent if p != REFERENCE])}
    if local := share(list(to_compute)):
        # The trunk is loaded here, so that a process with nothing to compute never loads it.
        _fill_trunk(store, plan, {shard: to_compute[shard] for shard in local}, load_with_trunk(), collator)
    _wait_for_shards(store, plan, trunk_parts)
    if REFERENCE in parts:
        _fill_reference(cache, share([s for s, absent in missing.items() if REFERENCE in absent]), policy, collator)
        _wait_for_shards(store, plan, [REFERENCE])


def _missing(store: Store, plan: CachePlan, parts: Sequence[str]) -> dict[Shard, list[str]]:
    """Return the missing parts of each incomplete shard, identical in all processes that share a folder.

    Each process checks a share of the files. The missing shards are then divided again, since otherwise one process
    might have to compute most of them.
    """

    def look(shards: Sequence[Shard]) -> list[list[str]]:  # reads and hashes the shards' files
        return [plan.missing(store, parts, shard) for shard in shards]

    if isinstance(store, ShardFolder):
        missing = distributed.map_sharded(plan.shards, look, "a look at the trunk cache")
        store.refresh()  # forget files that other processes found corrupt and removed
    else:
        missing = look(plan.shards)
    return {shard: absent for shard, absent in zip(plan.shards, missing, strict=True) if absent}


def _fill_trunk(
    store: Store, plan: CachePlan, to_compute: Mapping[Shard, Sequence[str]], policy: Policy, collator: Collator
) -> None:
    """Run the trunk over shards, while threads prefetch images and store finished shards.

    Args:
        to_compute: the parts (STATES, FEATURES) to compute for each shard.
    """
    policy.eval()
    work = [(shard, indices) for shard, parts in to_compute.items() for indices in _batches(plan, shard, parts)]
    gpu = policy.device.type == "cuda"

    def read(shard_and_indices: tuple[Shard, Sequence[int]]) -> LiveBatch:
        batch = collator.live_batch([Item(plan.examples[i]) for i in shard_and_indices[1]], plan.batch_positions)
        return batch.pin_memory() if gpu else batch  # a copy from pinned memory does not wait for the GPU

    batches = prefetch_map(read, work)
    total, done = sum(len(shard.examples) for shard in to_compute), 0
    stored: Future[None] | None = None
    with progress("trunk states") as report, ThreadPoolExecutor(1) as writer:
        # Batches arrive in shard order: compute one shard while the thread stores the previous one.
        for shard, group in groupby(zip(work, batches, strict=True), lambda step: step[0][0]):
            indexed_batches = ((indices, batch) for (_, indices), batch in group)
            tensors = compute_trunk_states(policy, plan, shard, to_compute[shard], indexed_batches)
            if stored is not None:
                stored.result()  # re-raises errors, and keeps at most two shards in memory
            # The GPU may still be computing these tensors: the writer waits for this event, not for later batches.
            ready = torch.cuda.current_stream().record_event() if gpu else None
            stored = writer.submit(_store_shard, store, shard, tensors, ready)
            done += len(shard.examples)
            report(done, total)
        if stored is not None:
            stored.result()


def _store_shard(store: Store, shard: Shard, tensors: dict[str, Tensor], ready: torch.cuda.Event | None) -> None:
    """Copy a shard's tensors to the CPU and store them.

    On a GPU the copy uses a CUDA stream of its own, so that it does not wait for later batches.
    """
    with ExitStack() as stack:
        if ready is not None:  # a new thread defaults to GPU 0, not to the GPU of this process
            stack.enter_context(torch.cuda.device(ready.device))
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
            ready.wait()
        for part, tensor in tensors.items():
            store[shard.name(part)] = copy_to_cpu(tensor)


def _batches(plan: CachePlan, shard: Shard, parts: Sequence[str]) -> Iterator[Sequence[int]]:
    """Yield the shard's batches that the given parts need: for FEATURES alone, only those with a new image."""
    unseen = set(shard.images)
    for indices in shard.batches:
        new = unseen & {path for i in indices for path in plan.examples[i].images}
        unseen -= new
        if STATES in parts or (FEATURES in parts and new):
            yield indices


@torch.no_grad()
def compute_trunk_states(
    policy: Policy,
    plan: CachePlan,
    shard: Shard,
    parts: Sequence[str],
    batches: Iterable[tuple[Sequence[int], LiveBatch]],
) -> dict[str, Tensor]:
    """Run the frozen trunk once over a shard's batches and return the requested parts.

    STATES has shape (rows, D) and FEATURES has shape (rows, V). Without STATES only the vision tower runs. It gets the
    same batches, so that its features are bitwise identical.
    """
    tensors: dict[str, list[Tensor]] = {part: [] for part in parts}
    unseen = set(shard.images) if FEATURES in parts else set()
    for indices, batch in batches:
        live = batch.to(policy.device)
        if STATES in parts:
            trunk = policy.trunk(live)
            features = trunk.features
            # Select the kept positions. The index is computed on the CPU: a boolean mask on the GPU would force a sync.
            # Slots of shorter trees are padding, with a branch below 0.
            filled = (batch.packed.targets.kept_branch >= 0).flatten().nonzero().squeeze(1)
            tensors[STATES].append(trunk.states.flatten(0, 1)[filled.to(live.packed.ids.device)].to(plan.dtype))
        else:
            features = None
            if live.pixel_values is not None:
                features = policy.vision_features(live.pixel_values, live.image_inputs)
                features = image_features(features, live.image_rows)
        # Keep the features of each image once, from the first batch that shows it.
        paths = [path for i in indices for path in plan.examples[i].images]
        for path, of_image in zip(paths, features or [], strict=features is not None):
            if path in unseen:
                unseen.remove(path)
                tensors[FEATURES].append(of_image.to(plan.dtype))
    # Batches are concatenated in order, so rows follow `plan.rows`.
    return {part: torch.cat(pieces) for part, pieces in tensors.items()}


def _fill_reference(cache: TrunkCache, shards: Sequence[Shard], policy: Policy, collator: Collator) -> None:
    """Compute reference log-probs from the cached states.

    The untrained policy is the reference, so no trunk pass is needed.
    """
    total, done = sum(len(shard.examples) for shard in shards), 0
    if not total:
        return
    collator.features = cache.features() if policy.needs_vision_features else None
    items = cache.items(with_reference=False)
    with progress("reference log-probs") as report:
        for shard in shards:
            log_probs: list[Tensor] = []
            for indices in shard.batches:  # the trunk's batches, so that every process computes the same bits
                log_probs += reference_log_probs(policy, [items[i] for i in indices], collator, len(indices))
            cache.store[shard.name(REFERENCE)] = torch.cat(log_probs)
            done += len(shard.examples)
            report(done, total)


def _wait_for_shards(store: Store, plan: CachePlan, parts: Sequence[str]) -> None:
    """Wait until every process has computed its shards, then check that all of them are there."""
    if not isinstance(store, ShardFolder):
        return
    distributed.barrier(f"the trunk cache's {', '.join(parts)}")
    store.refresh()
    # After the barrier every shard has its file, unless each machine has a folder of its own.
    names = [s.name(p) for p in parts for s in plan.shards_with(p)]
    if lacking := [name for name in names if not store.has_file(name)]:
        raise RelookError(
            f"{store.folder} lacks {len(lacking)} shards that other processes computed ({lacking[0]}, ...).",
            "Give a feature_cache_dir that all machines share, or set feature_cache off.",
        )


def _choose_store(recipe: Recipe, key: str, plan: CachePlan, parts: Sequence[str]) -> Store:
    """Choose memory or disk for the cache, as the recipe says.

    `auto` chooses memory if the cache fits in half of the free memory. It chooses disk if there are several processes,
    each of which would compute and hold everything, or if the cache is on disk already.
    """
    folder = Path(recipe.feature_cache_dir or Path(recipe.output_dir).parent / CACHE_DIR) / key
    fits = fits_half_of_memory(plan.size(parts))
    alone = distributed.world_size() == 1
    small = fits and alone and not (folder / INDEX_FILE).exists()
    if recipe.feature_cache == "memory" or (recipe.feature_cache == "auto" and small):
        in_memory: dict[str, Tensor] = {}
        return in_memory
    return ShardFolder(folder)


def _reserve_space(
    store: ShardFolder,
    source: dict[str, str],
    plan: CachePlan,
    parts: Sequence[str],
    missing: Mapping[Shard, Sequence[str]],
) -> None:
    """Check for free disk space before anything is computed; the main process also reports and writes the index."""
    lacking = [(part, shard) for shard, absent in missing.items() for part in absent]
    needed = sum(sum(plan.rows(part, shard)) * plan.row_bytes(part) for part, shard in lacking)
    if not needed:
        return
    fix = "Set feature_cache_dir to a folder on a larger disk, or feature_cache off."
    require_disk_space(store.folder, needed, "The trunk cache", fix)
    if distributed.is_main():
        for line in describe_other_caches(store.folder.parent, store.folder.name, source):
            status(f"  {line}")
        size = readable_size(plan.size(parts))
        status(f"  trunk cache: {size} in {store.folder}, {readable_size(needed)} of it to be computed")
        store.tidy()
        # Only `describe_other_caches` and people read the index: the plan is computed anew from the data.
        shards = [{"examples": len(shard.examples), "images": len(shard.images)} for shard in plan.shards]
        write_json(store.folder / INDEX_FILE, {"made_from": source, "widths": plan.widths, "shards": shards})


# ----------------------------------------------------------------------------------------------------
# Features of a frozen vision tower, computed once before the trunk behind it trains.
#
# The tower is the same at every step, and LLaVA-1.5's states of an image, 1.2 MB in bf16, take less than its pixels.
# So no step decodes an image, or runs the tower, again. Other families keep what the language model reads.

IMAGE_BATCH = 32  # images per forward pass of the vision tower


def caches_vision_features(recipe: Recipe, config: Any, count: int) -> bool:
    """Return True if the recipe caches vision features, given enough memory.

    Args:
        count: number of processes, each of which would hold all features.

    Raises:
        RecipeError: the recipe asks for them, but the projector trains, and does more than to project the tower's rows.
    """
    requested = recipe.feature_cache == "memory"
    if not recipe.encodes_images_once or not (requested or count == 1):
        return False
    possible = family_of(config).projects_rows or not recipe.trains_projector
    if requested and not possible:
        raise RecipeError(
            f"feature_cache memory: the projector of a {config.model_type} trains, and its inputs are not kept.",
            "Set feature_cache off.",
        )
    return possible


@torch.no_grad()
def cache_vision_features(
    recipe: Recipe, policy: Policy, examples: Sequence[Example], images: ImageLoader
) -> dict[Path, KeptImage] | None:
    """Compute the vision features of each image; return None if each step is to compute its own.

    That is the case if they are not cached (`caches_vision_features`). Under `feature_cache auto` it is also the case
    if they would take more than half of the free memory.

    Raises:
        RecipeError: see `caches_vision_features`.
    """
    paths = list(dict.fromkeys(path for example in examples for path in example.images))
    if not paths or not caches_vision_features(recipe, policy.config, distributed.world_size()):
        return None
    config = policy.config
    projects = family_of(config).projects_rows  # so that a projector that trains can begin from kept rows, too
    keeps_tower = projects or (policy.needs_vision_features and reads_tower(config))
    layers = 1 + len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
    widths = tower_width(config) * keeps_tower, config.text_config.hidden_size * layers * (not projects)
    # Families that project rows resize every image to the same shape, so the first one's size holds for all.
    sizes = [images.size(path) for path in (paths[:1] if projects else paths)]
    rows = [(size, images.position_count(size)) for size in sizes]
    values = sum(tower_state_count(config, *row) * widths[0] + row[1] * widths[1] for row in rows)
    size = values * policy.dtype.itemsize * (len(paths) if projects else 1)
    if recipe.feature_cache == "auto" and not fits_half_of_memory(size):
        return None
    status(f"  vision features: {readable_size(size)} in memory")
    by_image: dict[Path, KeptImage] = {}
    policy.eval()
    batches = [paths[start : start + IMAGE_BATCH] for start in range(0, len(paths), IMAGE_BATCH)]
    with progress("vision features") as report:
        read = prefetch_map(lambda batch: [images.inputs(path) for path in batch], batches)
        for batch, of_images in zip(batches, read, strict=True):
            image_rows = [row_count(inputs["pixel_values"]) for inputs in of_images]
            inputs = {name: tensor.to(policy.device) for name, tensor in stack(of_images).items()}
            pixels = inputs.pop("pixel_values")
            image = policy.encode_images(pixels, inputs)
            tower = tower_states(config, image, inputs) if keeps_tower else []
            projected = [] if projects else position_rows(image, image_rows)
            for i, path in enumerate(batch):
                # Copies: a view would keep, or send to a worker, the features of the whole batch.
                on_cpu = [
                    copy_to_cpu(part[i].to(policy.dtype)).clone() if part else None for part in (tower, projected)
                ]
                beside = {name: tensor for name, tensor in of_images[i].items() if name != "pixel_values"}
                by_image[path] = KeptImage(on_cpu[0], on_cpu[1], beside)
            report(len(by_image), len(paths))
    return by_image
