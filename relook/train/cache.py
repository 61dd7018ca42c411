"""The trunk cache: what a frozen trunk says about a data set, computed once, in memory or on disk.

Three parts: states at the supervised positions (or at all, where the post decoder reads those), vision features once
per distinct image, and reference log-probs. Each is cut into shards of whole examples. The cut depends on the data
alone, so that a pass that was killed, or was shared by several processes, leaves the bytes of one that was not.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
import transformers
from accelerate import PartialState
from torch import Tensor

from relook.console import progress, readable_size, say
from relook.data.encode import Example
from relook.data.images import ImageLoader
from relook.errors import DataError, RelookError
from relook.files import file_hash, read_json, text_hash, write_json
from relook.model.load import model_hash, open_source
from relook.recipe import Recipe
from relook.train.batches import Collator, Item, reference_log_probs
from relook.train.plan import FEATURES, REFERENCE, STATES, Plan, Shard, Store
from relook.train.policy import Policy
from relook.train.shards import ShardFolder

FORMAT = 1  # of the files; part of the key
INDEX_FILE = "index.json"
FOLDER = "trunk_cache"  # beside the runs' folders


@dataclass(frozen=True)
class TrunkCache:
    """A filled store. The last one in memory is kept: regimes that a process trains in turn share the pass.

    Args:
        key: a hash of everything that determines what the trunk says.
    """

    key: str
    store: Store

    last: ClassVar[TrunkCache | None] = None

    def items(self, plan: Plan, task: str) -> list[Item]:
        """The examples with their states and reference log-probs: views of the shards, nothing is copied."""
        states = self._by_example(plan, STATES)
        reference = self._by_example(plan, REFERENCE) if task == "dpo" else {}
        return [Item(e, states=states[i], reference=reference.get(i)) for i, e in enumerate(plan.examples)]

    def features(self, plan: Plan) -> dict[Path, Tensor]:
        """Vision features (M, V) by image."""
        found: dict[Path, Tensor] = {}
        for shard in plan.shards:
            if shard.images:
                parts = self.store[shard.name(FEATURES)].split(plan.rows(FEATURES, shard))
                found.update(zip(shard.images, parts, strict=True))
        return found

    def _by_example(self, plan: Plan, part: str) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        for shard in plan.shards:
            found.update(zip(shard.examples, self.store[shard.name(part)].split(plan.rows(part, shard)), strict=True))
        return found


def cached_items(recipe: Recipe, policy: Policy, examples: Sequence[Example], collator: Collator) -> list[Item]:
    """The examples with what a frozen trunk says about them, computed where it is not there yet.

    The collator gets the vision features, where something reads them.

    Raises:
        RelookError: the disk is too small, or several machines do not share it.
    """
    path, tower = Path(recipe.model_name_or_path), recipe.vision_tower or None
    source = made_from(path, tower, policy, examples, collator.images, recipe.adapter_name_or_path)
    key = key_of(source)
    plan = Plan.of(policy, examples, collator.images)
    parts = [STATES]
    if policy.reads_image:
        parts.append(FEATURES)
    if recipe.task == "dpo":
        parts.append(REFERENCE)
    kept = TrunkCache.last
    if kept is None or kept.key != key or recipe.feature_cache == "disk":
        TrunkCache.last = None  # its memory counts as free
        kept = TrunkCache(key, _store(recipe, key, plan, parts))
    fill(kept, source, plan, parts, policy, collator)
    if not isinstance(kept.store, ShardFolder):
        TrunkCache.last = kept
    collator.features = kept.features(plan) if policy.reads_image else None
    return kept.items(plan, recipe.task)


def made_from(
    model: Path,
    vision_tower: Path | str | None,
    policy: Policy,
    examples: Sequence[Example],
    images: ImageLoader,
    adapter: str = "",
) -> dict[str, str]:
    """Everything that determines what the trunk says: weights, tokens, pictures by content, precision, versions.

    An untrained post decoder changes no logit, so the reference log-probs depend on nothing else.

    Args:
        model: the folder that the policy was loaded from, with this vision tower where it has none of its own.
        adapter: the change that was laid on it.
    """
    tower = open_source(model, vision_tower=vision_tower).tower
    data = hashlib.sha256()
    for example in examples:
        data.update(repr(example.tree).encode())
        data.update(f"{len(example.images)};".encode())
    pictures = hashlib.sha256()
    for example in examples:
        for image in example.images:
            pictures.update(file_hash(image).encode())
    named = policy.core.model.named_parameters()
    held = sorted({str(p.dtype) for name, p in named if not name.startswith("post_decoder.")})
    return {
        "format": str(FORMAT),
        "model": model_hash(model),
        "adapter": model_hash(Path(adapter)) if adapter else "",
        "quantisation": repr(getattr(policy.config, "quantization_config", "")),
        "vision tower": model_hash(tower) if tower else "",
        "tokens": data.hexdigest(),
        "images": pictures.hexdigest(),
        "preprocessing": text_hash(repr(images.image_processor), images.aspect_ratio),
        "precision": f"{policy.dtype}, weights {' '.join(held)}",
        "positions": "all" if policy.keeps_everything else "supervised",
        "device": policy.core.device.type,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }


def key_of(source: dict[str, str]) -> str:
    return text_hash(*(f"{name}={value}" for name, value in source.items()))


def fill(
    cache: TrunkCache, source: dict[str, str], plan: Plan, parts: Sequence[str], policy: Policy, collator: Collator
) -> None:
    """Compute the shards that are missing. On disk each process makes its own ones, and all wait for the last.

    Raises:
        RelookError: see `cached_items`.
    """
    store, state = cache.store, PartialState()
    on_disk = isinstance(store, ShardFolder)
    mine = plan.shards[state.process_index :: state.num_processes] if on_disk else plan.shards
    missing = plan.missing(store, parts, mine)
    if isinstance(store, ShardFolder):
        _claim(store, source, plan, parts, state)
        state.wait_for_everyone()  # all have looked at the free space before one of them takes of it
    elif any(missing.values()):
        say(f"  trunk cache: {readable_size(plan.size(parts))} in memory")
    policy.eval()
    _fill_trunk(store, plan, missing, policy, collator)
    _wait(store, plan, [part for part in parts if part != REFERENCE], state)
    if REFERENCE in parts:
        _fill_reference(cache, plan, missing[REFERENCE], policy, collator)
        _wait(store, plan, [REFERENCE], state)


def _fill_trunk(store: Store, plan: Plan, missing: dict[str, list[Shard]], policy: Policy, collator: Collator) -> None:
    wanted = {s: [p for p in (STATES, FEATURES) if s in missing.get(p, ())] for s in plan.shards}
    total, done = sum(len(shard.examples) for shard, parts in wanted.items() if parts), 0
    if not total:
        return
    with progress("trunk states") as report:
        for shard, parts in wanted.items():
            if parts:
                for part, tensor in trunk_pass(policy, plan, shard, parts, collator).items():
                    store[shard.name(part)] = tensor
                done += len(shard.examples)
                report(done, total)


@torch.no_grad()
def trunk_pass(policy: Policy, plan: Plan, shard: Shard, parts: Sequence[str], collator: Collator) -> dict[str, Tensor]:
    """The frozen trunk once over a shard: STATES (rows, D), FEATURES (rows, V), as asked for, on the CPU.

    Without STATES only the vision tower runs, on the same batches, so that its features have the same bits.
    """
    made: dict[str, list[Tensor]] = {part: [] for part in parts}
    waiting = set(shard.images) if FEATURES in parts else set()
    for indices in plan.batches(shard):
        batch = [Item(plan.examples[i]) for i in indices]
        paths = [path for item in batch for path in item.example.images]
        if STATES not in parts and not waiting & set(paths):
            continue
        live = collator.live(batch).to(policy.core.device)
        if STATES in parts:
            trunk = policy.trunk(live)
            features = trunk.features
            made[STATES].append(trunk.states[trunk.targets.kept_branch >= 0].to(plan.dtype).cpu())
        else:
            features = policy.vision_features(live)
        for path, one in zip(paths, features or [], strict=features is not None):
            if path in waiting:
                waiting.remove(path)
                made[FEATURES].append(one.to(plan.dtype).cpu())
    return {part: torch.cat(tensors) for part, tensors in made.items()}


def _fill_reference(cache: TrunkCache, plan: Plan, shards: Sequence[Shard], policy: Policy, collator: Collator) -> None:
    """Reference log-probs from cached states: the untrained policy is the reference, and no trunk pass is needed."""
    total, done = sum(len(shard.examples) for shard in shards), 0
    if not total:
        return
    collator.features = cache.features(plan) if policy.reads_image else None
    items = cache.items(plan, "sft")
    with progress("reference log-probs") as report:
        for shard in shards:
            found: list[Tensor] = []
            for indices in plan.batches(shard):
                found += reference_log_probs(policy, [items[i] for i in indices], collator, len(indices))
            cache.store[shard.name(REFERENCE)] = torch.cat(found)
            done += len(shard.examples)
            report(done, total)


def _wait(store: Store, plan: Plan, parts: Sequence[str], state: Any) -> None:
    """Until every process has made its shards; then all of them must be there."""
    if not isinstance(store, ShardFolder):
        return
    state.wait_for_everyone()
    store.look()
    names = [s.name(p) for p in parts for s in plan.shards if p != FEATURES or s.images]
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
    fits = plan.size(parts) <= psutil.virtual_memory().available // 2
    alone = PartialState().num_processes == 1
    small = fits and alone and not (folder / INDEX_FILE).exists()
    if recipe.feature_cache == "memory" or (recipe.feature_cache == "auto" and small):
        held: dict[str, Tensor] = {}
        return held
    return ShardFolder(folder)


def _claim(store: ShardFolder, source: dict[str, str], plan: Plan, parts: Sequence[str], state: Any) -> None:
    """Before anything is computed: is there room on the disk? The first process says what will be done."""
    lacking = [(part, shard) for part in parts for shard in plan.shards if not store.has(shard.name(part))]
    needed = sum(sum(plan.rows(part, shard)) * plan.row_bytes(part) for part, shard in lacking)
    if not needed:
        return
    place = store.folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise RelookError(
            f"The trunk cache needs {readable_size(needed)} on disk, "
            f"but {store.folder.parent} has {readable_size(free)} free.",
            "Set feature_cache_dir to a folder on a larger disk, or feature_cache off.",
        )
    if state.is_main_process:
        for line in others(store.folder.parent, store.folder.name, source):
            say(f"  {line}")
        whole = readable_size(plan.size(parts))
        say(f"  trunk cache: {whole} in {store.folder}, {readable_size(needed)} of it to be computed")
        store.tidy()
        shards = [{"examples": len(shard.examples), "images": len(shard.images)} for shard in plan.shards]
        write_json(store.folder / INDEX_FILE, {"made_from": source, "widths": plan.widths, "shards": shards})


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
