"""The trunk cache: what a frozen trunk says about a data set, computed once, in memory or on disk.

Three parts: states at the supervised positions (or at all, where the post decoder reads those), vision features once
per distinct image, and reference log-probs. Each is cut into shards of whole examples. The cut depends on the data
alone, so that a pass that was killed, or was shared by several processes, leaves the bytes of one that was not.
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

import torch
import transformers
from torch import Tensor

from relook import distributed
from relook.console import progress, readable_size, say
from relook.data.encode import Example
from relook.data.images import ImageLoader, ahead
from relook.data.packing import TreeTargets, to_host
from relook.errors import DataError, RecipeError, RelookError
from relook.files import file_hash, read_json, require_room, text_hash, write_json
from relook.forward.collate import Collator, Item, reference_log_probs
from relook.forward.policy import LiveBatch, Policy
from relook.model.families import feature_rows, feature_size, trunk_of
from relook.model.load import model_hash, open_source
from relook.recipe import Recipe
from relook.train.cache_store import FEATURES, REFERENCE, STATES, Plan, Shard, ShardFolder, Store, half_of_memory_takes

# ----------------------------------------------------------------------------------------------------
# What a trunk cache depends on, and so its name; what sets others in the same folder apart from it.

FORMAT = 3  # of the files, and of the numbers by which `plan` cuts them; part of the key
INDEX_FILE = "index.json"


def made_from(
    model: Path,
    vision_tower: Path | str | None,
    policy: Policy,
    weights: torch.dtype,
    examples: Sequence[Example],
    images: ImageLoader,
    adapter: str = "",
    bits: str = "16",
) -> dict[str, str]:
    """Everything that determines what the trunk says: weights, tokens, pictures by content, precision, versions.

    An untrained post decoder changes no logit, so the reference log-probs depend on nothing else.

    Args:
        model: the folder that the policy was loaded from, with this vision tower where it has none of its own.
        weights: dtype of the trunk in memory.
        adapter: the change that was laid on it.
        bits: how its linear layers are quantised.
    """
    tower = open_source(model, vision_tower=vision_tower).tower
    pictures = hashlib.sha256()
    for example in examples:
        for image in example.images:
            pictures.update(file_hash(image).encode())
    return {
        "format": str(FORMAT),
        "model": model_hash(model),
        "adapter": model_hash(Path(adapter)) if adapter else "",
        "bits": bits,
        "vision tower": model_hash(tower) if tower else "",
        "tokens": _tokens_hash(tuple(examples)),
        "images": pictures.hexdigest(),
        "preprocessing": text_hash(repr(images.image_processor), images.aspect_ratio),
        "precision": f"{policy.dtype}, weights {weights}",
        "trunk pass": policy.trunk_pass,
        "positions": "all" if policy.keeps_everything else "supervised",
        "device": policy.device.type,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


@lru_cache(maxsize=2)  # the runs of a sweep share their examples
def _tokens_hash(examples: tuple[Example, ...]) -> str:
    data = hashlib.sha256()
    for example in examples:
        data.update(repr(example.tree).encode())
        data.update(f"{len(example.images)};".encode())
    return data.hexdigest()


def key_of(source: dict[str, str]) -> str:
    return text_hash(*(f"{name}={value}" for name, value in source.items()))


def others(folder: Path, key: str, source: dict[str, str]) -> list[str]:
    """A line for each cache in a folder that was made from something else: its size, and what differs."""
    lines = []
    for index in sorted(folder.glob(f"*/{INDEX_FILE}")):
        if index.parent.name == key:
            continue
        try:
            old = read_json(index)["made_from"]
            differs = ", ".join(name for name in source if old.get(name) != source[name])
        except (DataError, KeyError, TypeError, AttributeError):
            differs = "nobody knows what"
        size = readable_size(sum(file.stat().st_size for file in index.parent.iterdir()))
        lines.append(f"{index.parent} ({size}) does not serve here (it differs in {differs}): left as it is")
    return lines


# ----------------------------------------------------------------------------------------------------

FOLDER = "trunk_cache"  # beside the runs' folders


@dataclass
class TrunkCache:
    """A filled store. The last one is kept: regimes that a process trains in turn share the pass.

    Args:
        key: a hash of everything that determines what the trunk says.
        plan: what lies where in the store.
        on_device: copies of the store's tensors on the GPU, where they fit.
    """

    key: str
    plan: Plan
    store: Store
    on_device: dict[str, Tensor] = field(default_factory=dict)

    last: ClassVar[TrunkCache | None] = None

    @cached_property
    def targets(self) -> list[TreeTargets]:
        """Where each example's targets are among its states."""
        return [TreeTargets.of(example.tree, self.plan.everything) for example in self.plan.examples]

    def items(self, with_reference: bool) -> list[Item]:
        """The examples with their states and reference log-probs: views of the shards, nothing is copied."""
        states = self._by_example(STATES)
        reference = self._by_example(REFERENCE) if with_reference else {}
        return [
            Item(e, states=states[i], targets=self.targets[i], reference=reference.get(i))
            for i, e in enumerate(self.plan.examples)
        ]

    def features(self) -> dict[Path, Tensor]:
        """Vision features (M, V) by image."""
        plan, found = self.plan, dict[Path, Tensor]()
        for shard in plan.shards:
            if shard.images:
                parts = self._tensor(shard.name(FEATURES)).split(plan.rows(FEATURES, shard))
                found.update(zip(shard.images, parts, strict=True))
        return found

    def move_to(self, device: torch.device, names: Sequence[str]) -> None:
        """Copy tensors to a GPU: batches are then made there, and a step waits for no transfer."""
        for name in names:
            if name not in self.on_device:
                self.on_device[name] = self.store[name].to(device)

    def _tensor(self, name: str) -> Tensor:
        return self.on_device[name] if name in self.on_device else self.store[name]

    def _by_example(self, part: str) -> dict[int, Tensor]:
        plan, found = self.plan, dict[int, Tensor]()
        for shard in plan.shards:
            found.update(zip(shard.examples, self._tensor(shard.name(part)).split(plan.rows(part, shard)), strict=True))
        return found


def cached_items(
    recipe: Recipe, policy: Policy, examples: Sequence[Example], collator: Collator, whole: Callable[[], Policy]
) -> list[Item]:
    """The examples with what a frozen trunk says about them, computed where it is not there yet.

    The collator gets the vision features, where something reads them.

    Args:
        policy: what trains, whose trunk is not asked.
        whole: loads the policy with its trunk; called where something has to be computed.

    Raises:
        RelookError: the disk is too small, or several machines do not share it.
    """
    path, tower = Path(recipe.model_name_or_path), recipe.vision_tower or None
    bits = f"{recipe.bits} {recipe.quant_type} {recipe.double_quant}" if recipe.bits == 4 else str(recipe.bits)
    source = made_from(
        path, tower, policy, policy.dtype, examples, collator.images, adapter=recipe.adapter_name_or_path, bits=bits
    )
    key = key_of(source)
    kept = TrunkCache.last
    plan = kept.plan if kept is not None and kept.key == key else Plan.of(policy, examples, collator.images)
    parts = [STATES]
    if policy.reads_image:
        parts.append(FEATURES)
    if recipe.needs_reference:
        parts.append(REFERENCE)
    if kept is None or kept.key != key:
        TrunkCache.last = kept = None  # its memory counts as free
        kept = TrunkCache(key, plan, _store(recipe, key, plan, parts))
    elif isinstance(kept.store, ShardFolder) and recipe.feature_cache == "memory":
        kept.store.look()  # what is on disk already need not be computed for the memory
    elif isinstance(kept.store, ShardFolder) or recipe.feature_cache == "disk":
        kept.store = _store(recipe, key, plan, parts)
    fill(kept, source, parts, policy, collator, whole)
    TrunkCache.last = kept
    if recipe.training.get("dataloader_num_workers"):
        kept.on_device.clear()  # other processes cannot read a GPU's memory
    elif policy.device.type == "cuda":
        torch.cuda.empty_cache()
        if plan.size([STATES, FEATURES]) <= torch.cuda.mem_get_info()[0] // 2:
            kept.move_to(policy.device, [s.name(p) for p in parts if p != REFERENCE for s in plan.having(p)])
    collator.features = kept.features() if policy.reads_image else None
    return kept.items(recipe.needs_reference)


def fill(
    cache: TrunkCache,
    source: dict[str, str],
    parts: Sequence[str],
    policy: Policy,
    collator: Collator,
    whole: Callable[[], Policy],
) -> None:
    """Compute the shards that are missing. On disk each process makes a share of them, and all wait for the last.

    Raises:
        RelookError: see `cached_items`.
    """
    store, plan = cache.store, cache.plan
    missing = _missing(store, plan, parts)
    if isinstance(store, ShardFolder):
        _claim(store, source, plan, parts, missing)
        # All have looked at the free space before one of them takes of it.
        distributed.wait("a look at the free space")
    elif missing:
        say(f"  trunk cache: {readable_size(plan.size(parts))} in memory")
    share = distributed.mine if isinstance(store, ShardFolder) else list
    trunk = [part for part in parts if part != REFERENCE]
    wanted = {s: lacking for s, gone in missing.items() if (lacking := [p for p in gone if p != REFERENCE])}
    if mine := share(list(wanted)):
        _fill_trunk(store, plan, {shard: wanted[shard] for shard in mine}, whole(), collator)
    _wait(store, plan, trunk)
    if REFERENCE in parts:
        _fill_reference(cache, share([s for s, gone in missing.items() if REFERENCE in gone]), policy, collator)
        _wait(store, plan, [REFERENCE])


def _missing(store: Store, plan: Plan, parts: Sequence[str]) -> dict[Shard, list[str]]:
    """The shards of which parts are not there, and which: the same in all processes that share a folder.

    Each reads a share of the files; what is missing is then divided anew, or one process might have most of it to make.
    """

    def look(shards: Sequence[Shard]) -> list[list[str]]:
        return [plan.missing(store, parts, shard) for shard in shards]

    if isinstance(store, ShardFolder):
        found = distributed.shared(plan.shards, look, "a look at the trunk cache")
        store.look()  # what others found broken is gone
    else:
        found = look(plan.shards)
    return {shard: gone for shard, gone in zip(plan.shards, found, strict=True) if gone}


def _fill_trunk(
    store: Store, plan: Plan, wanted: Mapping[Shard, Sequence[str]], policy: Policy, collator: Collator
) -> None:
    """Images are read, and finished shards are stored, while the trunk goes on with other batches.

    Args:
        wanted: which of STATES and FEATURES are computed of which shards.
    """
    policy.eval()
    work = [(shard, indices) for shard, parts in wanted.items() for indices in _batches(plan, shard, parts)]
    gpu = policy.device.type == "cuda"

    def read(one: tuple[Shard, Sequence[int]]) -> LiveBatch:
        batch = collator.live([Item(plan.examples[i]) for i in one[1]], plan.batch_positions)
        return batch.pin_memory() if gpu else batch

    batches = ahead(read, work)
    total, done = sum(len(shard.examples) for shard in wanted), 0
    stored: Future[None] | None = None
    with progress("trunk states") as report, ThreadPoolExecutor(1) as writer:
        for shard, group in groupby(zip(work, batches, strict=True), lambda one: one[0][0]):
            named = ((indices, batch) for (_, indices), batch in group)
            made = trunk_pass(policy, plan, shard, wanted[shard], named)
            if stored is not None:
                stored.result()  # raises what went wrong, and no more than two shards are in memory
            ready = torch.cuda.current_stream().record_event() if gpu else None
            stored = writer.submit(_put, store, shard, made, ready)
            done += len(shard.examples)
            report(done, total)
        if stored is not None:
            stored.result()


def _put(store: Store, shard: Shard, made: dict[str, Tensor], ready: torch.cuda.Event | None) -> None:
    """On a GPU by a stream of its own, which does not wait for the batches that come after."""
    with ExitStack() as stack:
        if ready is not None:  # a thread begins on the first GPU, whichever this process has
            stack.enter_context(torch.cuda.device(ready.device))
            stack.enter_context(torch.cuda.stream(torch.cuda.Stream()))
            ready.wait()
        for part, tensor in made.items():
            store[shard.name(part)] = to_host(tensor)


def _batches(plan: Plan, shard: Shard, parts: Sequence[str]) -> Iterator[Sequence[int]]:
    """The batches of a shard that say something about these parts: for FEATURES alone, those with a new image."""
    waiting = set(shard.images)
    for indices in shard.batches:
        found = waiting & {path for i in indices for path in plan.examples[i].images}
        waiting -= found
        if STATES in parts or (FEATURES in parts and found):
            yield indices


@torch.no_grad()
def trunk_pass(
    policy: Policy, plan: Plan, shard: Shard, parts: Sequence[str], batches: Iterable[tuple[Sequence[int], LiveBatch]]
) -> dict[str, Tensor]:
    """The frozen trunk once over a shard's batches: STATES (rows, D), FEATURES (rows, V), as asked for.

    Without STATES only the vision tower runs, on the same batches, so that its features have the same bits.
    """
    made: dict[str, list[Tensor]] = {part: [] for part in parts}
    waiting = set(shard.images) if FEATURES in parts else set()
    for indices, batch in batches:
        live = batch.to(policy.device)
        if STATES in parts:
            trunk = policy.trunk(live)
            features = trunk.features
            # By an index from the CPU: a mask on the GPU would be waited for.
            filled = (batch.packed.targets.kept_branch >= 0).flatten().nonzero().squeeze(1)
            made[STATES].append(trunk.states.flatten(0, 1)[filled.to(live.packed.ids.device)].to(plan.dtype))
        else:
            features = None
            if live.pixel_values is not None:
                features = policy.vision_features(live.pixel_values, live.image_sizes)
        paths = [path for i in indices for path in plan.examples[i].images]
        for path, one in zip(paths, features or [], strict=features is not None):
            if path in waiting:
                waiting.remove(path)
                made[FEATURES].append(one.to(plan.dtype))
    return {part: torch.cat(tensors) for part, tensors in made.items()}


def _fill_reference(cache: TrunkCache, shards: Sequence[Shard], policy: Policy, collator: Collator) -> None:
    """Reference log-probs from cached states: the untrained policy is the reference, and no trunk pass is needed."""
    total, done = sum(len(shard.examples) for shard in shards), 0
    if not total:
        return
    collator.features = cache.features() if policy.reads_image else None
    items = cache.items(with_reference=False)
    with progress("reference log-probs") as report:
        for shard in shards:
            found: list[Tensor] = []
            for indices in shard.batches:
                found += reference_log_probs(policy, [items[i] for i in indices], collator, len(indices))
            cache.store[shard.name(REFERENCE)] = torch.cat(found)
            done += len(shard.examples)
            report(done, total)


def _wait(store: Store, plan: Plan, parts: Sequence[str]) -> None:
    """Until every process has made its shards; then all of them must be there."""
    if not isinstance(store, ShardFolder):
        return
    distributed.wait(f"the trunk cache's {', '.join(parts)}")
    store.look()
    names = [s.name(p) for p in parts for s in plan.having(p)]
    if lacking := [name for name in names if not store.has(name)]:
        raise RelookError(
            f"{store.folder} lacks {len(lacking)} shards that other processes made ({lacking[0]}, ...).",
            "Give a feature_cache_dir that all machines share, or set feature_cache off.",
        )


def _store(recipe: Recipe, key: str, plan: Plan, parts: Sequence[str]) -> Store:
    """Where the recipe wants the cache: `auto` takes memory where half of what is free is enough.

    Not with several processes, each of which would compute and hold everything, nor where the disk has it already.
    """
    folder = Path(recipe.feature_cache_dir or Path(recipe.output_dir).parent / FOLDER) / key
    fits = half_of_memory_takes(plan.size(parts))
    alone = distributed.count() == 1
    small = fits and alone and not (folder / INDEX_FILE).exists()
    if recipe.feature_cache == "memory" or (recipe.feature_cache == "auto" and small):
        held: dict[str, Tensor] = {}
        return held
    return ShardFolder(folder)


def _claim(
    store: ShardFolder, source: dict[str, str], plan: Plan, parts: Sequence[str], missing: Mapping[Shard, Sequence[str]]
) -> None:
    """Before anything is computed: is there room on the disk? The first process says what will be done."""
    lacking = [(part, shard) for shard, gone in missing.items() for part in gone]
    needed = sum(sum(plan.rows(part, shard)) * plan.row_bytes(part) for part, shard in lacking)
    if not needed:
        return
    fix = "Set feature_cache_dir to a folder on a larger disk, or feature_cache off."
    require_room(store.folder, needed, "The trunk cache", fix)
    if distributed.first():
        for line in others(store.folder.parent, store.folder.name, source):
            say(f"  {line}")
        whole = readable_size(plan.size(parts))
        say(f"  trunk cache: {whole} in {store.folder}, {readable_size(needed)} of it to be computed")
        store.tidy()
        shards = [{"examples": len(shard.examples), "images": len(shard.images)} for shard in plan.shards]
        write_json(store.folder / INDEX_FILE, {"made_from": source, "widths": plan.widths, "shards": shards})


# ----------------------------------------------------------------------------------------------------
# What a frozen vision tower says of each image, computed once before a trunk trains behind it.
#
# The tower is the same at every step, and LLaVA's features of an image, 1.2 MB in bf16, take less than its pixels. So no
# step decodes an image, or runs the tower, again.

IMAGES = 32  # at a time


def keeps_features(recipe: Recipe, config: Any, count: int) -> bool:
    """Whether a recipe keeps vision features, where there is memory for them; `count` processes would each hold them.

    Raises:
        RecipeError: they are wanted of a model that cuts images into tiles, whose features the projector's rows are not
            yet.
    """
    wanted = recipe.feature_cache == "memory"
    if not recipe.sees_once or not (wanted or count == 1):
        return False
    if not trunk_of(config).projects_rows and wanted:
        raise RecipeError("feature_cache memory: this model cuts images into tiles.", "Set feature_cache off.")
    return trunk_of(config).projects_rows


@torch.no_grad()
def features_once(
    recipe: Recipe, policy: Policy, examples: Sequence[Example], images: ImageLoader
) -> dict[Path, Tensor] | None:
    """Vision features (M, V) by image; None where each step computes its own.

    That is where they are not to be kept (`keeps_features`), and under `feature_cache auto` where they would take more
    than half of the free memory.

    Raises:
        RecipeError: see `keeps_features`.
    """
    paths = list(dict.fromkeys(path for example in examples for path in example.images))
    if not paths or not keeps_features(recipe, policy.config, distributed.count()):
        return None
    rows = feature_rows(policy.config, images.size(paths[0]))
    size = len(paths) * rows * feature_size(policy.config) * policy.dtype.itemsize
    if recipe.feature_cache == "auto" and not half_of_memory_takes(size):
        return None
    say(f"  vision features: {readable_size(size)} in memory")
    found: dict[Path, Tensor] = {}
    policy.eval()
    batches = [paths[start : start + IMAGES] for start in range(0, len(paths), IMAGES)]
    read = ahead(lambda batch: images.batch(batch)["pixel_values"], batches)
    with progress("vision features") as report:
        for batch, pixels in zip(batches, read, strict=True):
            features = policy.vision_features(pixels.to(policy.device))
            found.update(zip(batch, to_host(torch.stack(features).to(policy.dtype)), strict=True))
            report(len(found), len(paths))
    return found
