"""The trunk cache: equal training, equal bytes after kills and over processes, and nothing stale is ever used."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.forked import forked
from helpers.several import fill_cache
from helpers.tiny import dpo_keys, sft_keys
from helpers.variants import variants
from PIL import Image
from safetensors.torch import load_file, save_file

from relook import load_model
from relook.data.packing import PADDING, ROOT
from relook.errors import RelookError
from relook.forward.collate import TREES_PER_ROOT, Collator, Item
from relook.forward.policy import Policy
from relook.model.load import TENSORS_FILE
from relook.model.trainable import set_trainable
from relook.recipe import build_recipe
from relook.train import cache_store, feature_cache
from relook.train.cache_store import CachePlan
from relook.train.feature_cache import TrunkCache, cached_items
from relook.train.run import encode_samples, read_samples, train

pytestmark = pytest.mark.usefixtures("no_trunk_cache", "small_shards")
CROSS: dict[str, Any] = {"tune_post_decoder": True}
SELF_CROSS: dict[str, Any] = {"tune_post_decoder": True, "post_decoder": {"attention": "self_cross"}}
SMALL = 40_000, 150  # bytes of a shard, positions of a batch


@pytest.fixture(scope="module")
def small_shards() -> Iterator[None]:
    """Six shards instead of one, and more than one batch in most of them."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(("SHARD_BYTES", "BATCH_POSITIONS"), SMALL, strict=True):
            patch.setattr(cache_store, name, value)
        yield


@dataclass(frozen=True)
class Cached:
    """A copy of model and data with its trunk cache: `base`, `world` and `trunk_cache` in a folder."""

    folder: Path
    items: list[Item]

    def copy_cache(self, folder: Path) -> None:
        shutil.copytree(self.folder / "trunk_cache", folder / "trunk_cache")


@pytest.fixture(scope="module")
def cached(base: Path, world: Path, small_shards: None, tmp_path_factory: pytest.TempPathFactory) -> Cached:
    folder = tmp_path_factory.mktemp("cached")
    shutil.copytree(base, folder / "base")
    shutil.copytree(world, folder / "world")
    return Cached(folder, prepared(of_dpo(folder / "base", folder / "world", folder / "run", **CROSS))[1])


def prepared(keys: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[CachePlan, list[Item], Collator]:
    """What `train` prepares, as in a process of its own."""
    recipe = build_recipe(keys)
    loaded = load_model(recipe.model_name_or_path, dtype=dtype)
    loaded.images.aspect_ratio = recipe.image_aspect_ratio or loaded.aspect_ratio
    examples, _ = encode_samples(recipe, loaded, *read_samples(recipe))
    examples = list(dict.fromkeys(examples))
    set_trainable(loaded, recipe)
    policy = Policy(loaded.model, dtype)
    collator = Collator(policy, loaded.images, 3)
    TrunkCache.current = None
    items = cached_items(recipe, policy, examples, collator, lambda: policy)
    return CachePlan.of(policy, examples, loaded.images), items, collator


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def caches(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def payload(file: Path) -> int:
    """Bytes of tensors in a safetensors file, by the format's definition: after the header and its length."""
    with file.open("rb") as opened:
        header = struct.unpack("<Q", opened.read(8))[0]
    assert header < 200
    return file.stat().st_size - 8 - header


def of_dpo(base: Path, world: Path, out: Path, **keys: Any) -> dict[str, Any]:
    return dpo_keys(base, world, out, feature_cache="disk", **keys)


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the trunk ran")


def test_packed_rows_of_a_pass_have_one_length(base: Path, world: Path, tmp_path: Path) -> None:
    """However much they hold: layers are compiled once. What does not fit gets whole blocks of 128 positions."""
    recipe = build_recipe(of_dpo(base, world, tmp_path / "run", **CROSS))
    loaded = load_model(base)
    examples, _ = encode_samples(recipe, loaded, *read_samples(recipe))
    collator = Collator(Policy(loaded.model, trunk_pass="flex"), loaded.images, 3)
    for count, least, positions in ((1, 1024, 1024), (3, 1024, 1024), (5, 128, None), (5, 0, None)):
        items = [Item(example) for example in examples[:count]]
        packed = collator.live_batch(items, least).packed
        roots = 1 if least else -(-count // TREES_PER_ROOT)
        root = int((packed.tree_index == ROOT).sum()) // roots  # what all prompts begin with
        needed = sum(len(item.example.tree) - root for item in items) + roots * root
        assert root >= 1
        assert needed > (128 if count == 5 else 0)
        assert packed.ids.shape == (1, positions or 128 * -(-needed // 128))
        assert (packed.tree_index != PADDING).sum() == needed


# --- the same training


@pytest.mark.parametrize(
    ("of", "keys"),
    [
        (dpo_keys, SELF_CROSS | {"tune_lm_head": True}),
        pytest.param(dpo_keys, CROSS | {"tune_lm_head": True}, marks=pytest.mark.slow),
        pytest.param(dpo_keys, SELF_CROSS, marks=pytest.mark.slow),
        pytest.param(dpo_keys, {"tune_lm_head": True}, marks=pytest.mark.slow),
        pytest.param(sft_keys, SELF_CROSS | {"tune_lm_head": True}, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_wherever_the_states_are_the_training_is_the_same(
    of: Callable[..., dict[str, Any]], keys: dict[str, Any], base: Path, world: Path, tmp_path: Path
) -> None:
    logs, tensors = {}, {}
    for kind in ("off", "memory", "disk"):
        more = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 4, "feature_cache": kind}
        TrunkCache.current = None
        out = train(build_recipe(of(base, world, tmp_path / kind, **keys, **more)))
        log = json.loads((out / "run.json").read_text())["log"]
        logs[kind] = [value for entry in log for name, value in entry.items() if "loss" in name or "logps" in name]
        tensors[kind] = load_file(out / TENSORS_FILE)
    assert (tmp_path / "trunk_cache").is_dir()
    assert len(logs["off"]) >= 4
    assert logs["disk"] == logs["memory"]
    assert logs["disk"] == pytest.approx(logs["off"], rel=1e-5, abs=1e-5)
    for name, tensor in tensors["off"].items():
        assert torch.equal(tensors["disk"][name], tensors["memory"][name])
        torch.testing.assert_close(tensors["disk"][name], tensor, rtol=1e-5, atol=1e-5)


def test_a_second_run_finds_everything_on_disk(
    base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(build_recipe(of_dpo(base, world, tmp_path / "1", **CROSS)))
    TrunkCache.current = None  # as in another process
    monkeypatch.setattr(Policy, "trunk", never)
    monkeypatch.setattr(feature_cache, "reference_log_probs", never)
    again = train(build_recipe(of_dpo(base, world, tmp_path / "2", **CROSS)))
    assert (again / TENSORS_FILE).read_bytes() == (first / TENSORS_FILE).read_bytes()
    TrunkCache.current = None
    train(build_recipe(of_dpo(base, world, tmp_path / "3", tune_lm_head=True, learning_rate=1e-4, beta=0.5)))
    TrunkCache.current = None
    auto = dpo_keys(base, world, tmp_path / "4", **CROSS)  # what is on disk need not be computed for memory
    assert (train(build_recipe(auto)) / TENSORS_FILE).read_bytes() == (first / TENSORS_FILE).read_bytes()


@pytest.mark.slow
def test_a_cache_that_was_removed_is_made_again(base: Path, world: Path, tmp_path: Path) -> None:
    """Within one process, too, and in another folder."""
    first = train(build_recipe(of_dpo(base, world, tmp_path / "1", **CROSS)))
    made = contents(tmp_path / "trunk_cache")
    shutil.rmtree(tmp_path / "trunk_cache")
    again = train(build_recipe(of_dpo(base, world, tmp_path / "2", **CROSS)))
    there = train(build_recipe(of_dpo(base, world, tmp_path / "3", **CROSS, feature_cache_dir=tmp_path / "there")))
    assert contents(tmp_path / "trunk_cache") == contents(tmp_path / "there") == made
    for out in (again, there):
        assert (out / TENSORS_FILE).read_bytes() == (first / TENSORS_FILE).read_bytes()


def test_features_are_added_to_the_states_of_a_run_that_needed_none(
    base: Path, world: Path, cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached.copy_cache(tmp_path / "whole")
    prepared(of_dpo(base, world, tmp_path / "parts" / "run", tune_lm_head=True))
    assert not list((tmp_path / "parts").rglob("features*"))
    monkeypatch.setattr(Policy, "trunk", never)  # the language model need not run again
    prepared(of_dpo(base, world, tmp_path / "parts" / "run", **CROSS))
    assert contents(tmp_path / "parts" / "trunk_cache") == contents(tmp_path / "whole" / "trunk_cache")


# --- how large it is


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        pytest.param(CROSS, torch.float32, marks=pytest.mark.slow),
        (CROSS, torch.bfloat16),
        (SELF_CROSS, torch.float32),
        pytest.param({"tune_lm_head": True}, torch.float32, marks=pytest.mark.slow),
        pytest.param({"tune_lm_head": True}, torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_size_is_known_before(
    keys: dict[str, Any], dtype: torch.dtype, base: Path, world: Path, tmp_path: Path
) -> None:
    plan, items, collator = prepared(of_dpo(base, world, tmp_path / "run", **keys), dtype)
    parts = {"states", "reference"} | ({"features"} if "tune_post_decoder" in keys else set())
    files = list((tmp_path / "trunk_cache").rglob("*.safetensors"))
    assert {file.name.partition("-")[0] for file in files} == parts
    for part in parts:
        shards = [file for file in files if file.name.startswith(part)]
        assert plan.size([part]) == sum(map(payload, shards))
        expected = torch.float32 if part == "reference" else dtype
        assert {tensor.dtype for file in shards for tensor in load_file(file).values()} == {expected}
    assert len(items) == 18
    assert all(item.states is not None and item.states.dtype == dtype for item in items)
    if "features" in parts:  # six scenes, four pairs on each
        assert len(collator.features or {}) == 6


def test_a_disk_that_is_too_small_is_refused(
    base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = prepared(of_dpo(base, world, tmp_path / "run", **CROSS))[0].size(["states", "features", "reference"])
    keys = of_dpo(base, world, tmp_path / "run", **CROSS, feature_cache_dir=tmp_path / "full")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, size - 1))
    with pytest.raises(RelookError, match=r"needs 151\.0 kB on disk, but .*full has 151\.0 kB free.*feature_cache_dir"):
        prepared(keys)
    assert not (tmp_path / "full").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, size))
    prepared(keys)


def test_auto_takes_memory_where_there_is_enough(
    base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Free:
        available = 2**40

    monkeypatch.setattr(cache_store.psutil, "virtual_memory", lambda: Free)
    keys = dpo_keys(base, world, tmp_path / "run", **CROSS)
    size = prepared(keys)[0].size(["states", "features", "reference"])
    assert not (tmp_path / "trunk_cache").exists()
    Free.available = 2 * size
    prepared(keys)
    assert not (tmp_path / "trunk_cache").exists()
    Free.available = 2 * size - 2
    prepared(keys)
    assert len(caches(tmp_path / "trunk_cache")) == 1


def test_states_are_views_of_the_files(base: Path, world: Path, tmp_path: Path) -> None:
    _, items, collator = prepared(of_dpo(base, world, tmp_path / "run", **CROSS))
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(tmp_path / "trunk_cache") in line:
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            mapped.append(range(start, end))
    tensors = [item.states for item in items] + list((collator.features or {}).values())
    assert len(tensors) == 18 + 6
    for tensor in tensors:
        assert tensor is not None
        assert any(tensor.data_ptr() in place for place in mapped)


# --- nothing stale


def change_weight(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    name = next(name for name in tensors if "language_model" in name and "up_proj" in name)
    tensors[name][0, 0] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def replace_image(world: Path) -> None:
    """By another one of the same size in bytes and the same times."""
    path = sorted((world / "vg").rglob("*.jpg"))[0]
    before = path.stat()
    data = path.read_bytes()
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path, quality=20)
    assert path.stat().st_size < len(data)
    path.write_bytes(path.read_bytes().ljust(len(data), b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "weight": ({}, "model"),
    "image": ({}, "images"),
    "template": ({"version": "v0"}, "tokens"),
    "canvas": ({"image_aspect_ratio": "pad"}, "preprocessing"),
    "positions": (SELF_CROSS, "positions"),
    "precision": ({}, "precision"),
}


@pytest.mark.parametrize("change", variants(CHANGES, {"weight"}))
def test_what_determines_the_states_is_part_of_the_key(
    change: str, cached: Cached, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(cached.folder, tmp_path, dirs_exist_ok=True)
    keys, before = of_dpo(tmp_path / "base", tmp_path / "world", tmp_path / "run", **CROSS), cached.items
    old = contents(tmp_path / "trunk_cache")
    capsys.readouterr()
    if change == "weight":
        change_weight(tmp_path / "base")
    elif change == "image":
        replace_image(tmp_path / "world")
    more, name = CHANGES[change]
    dtype = torch.bfloat16 if change == "precision" else torch.float32
    _, after, _ = prepared({**keys, **more}, dtype)
    new = contents(tmp_path / "trunk_cache")
    assert len(caches(tmp_path / "trunk_cache")) == 2
    assert {file: new[file] for file in old} == old
    message = capsys.readouterr().err.replace("\n", "")
    assert f"it differs in {name}): left as it is" in message
    assert f"{sum(map(len, old.values())) / 1000:.1f} kB" in message
    if change != "canvas":  # toyworld's pictures are square as they are
        assert any(not torch.equal(a.states, b.states) for a, b in zip(before, after, strict=True))
    _, computed, _ = prepared({**keys, **more, "feature_cache": "memory"}, dtype)
    assert all(torch.equal(a.states, b.states) for a, b in zip(computed, after, strict=True))


def test_what_does_not_matter_is_not_part_of_the_key(base: Path, world: Path, cached: Cached, tmp_path: Path) -> None:
    """Times and places of files, and everything that comes after the trunk."""
    cached.copy_cache(tmp_path)
    shutil.copytree(base, tmp_path / "other" / "base", copy_function=shutil.copy)
    shutil.copytree(world, tmp_path / "other" / "world", copy_function=shutil.copy)
    keys = of_dpo(tmp_path / "other" / "base", tmp_path / "other" / "world", tmp_path / "run", **CROSS)
    more = {"beta": 0.7, "per_device_train_batch_size": 3, "post_decoder_lr": 1e-2, "dpo_tokens": "differing"}
    prepared({**keys, **more, "post_decoder": {"depth": 3}, "tune_lm_head": True})
    assert len(caches(tmp_path / "trunk_cache")) == 1


# --- kills, broken files, several processes


def test_a_killed_pass_ends_in_the_same_files(
    base: Path, world: Path, cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached.copy_cache(tmp_path / "whole")
    keys = of_dpo(base, world, tmp_path / "killed" / "run", **CROSS)
    killed = forked(fill_cache, keys, *SMALL, ".features-00004")  # of six
    assert killed.codes == [-signal.SIGKILL], killed.stderr
    remaining = contents(tmp_path / "killed" / "trunk_cache")
    states = [name for name in remaining if "/states-" in name]
    assert len(states) == 5
    assert any(name.endswith(".part") for name in remaining)
    made: list[int] = []
    whole_pass = feature_cache.compute_trunk_states

    def counted(policy: Policy, plan: CachePlan, shard: Any, *rest: Any) -> Any:
        made.append(shard.number)
        return whole_pass(policy, plan, shard, *rest)

    monkeypatch.setattr(feature_cache, "compute_trunk_states", counted)
    prepared(keys)
    plan = len(list((tmp_path / "whole").rglob("states-*")))
    assert made == list(range(4, plan))
    assert contents(tmp_path / "killed" / "trunk_cache") == contents(tmp_path / "whole" / "trunk_cache")


def flip(data: bytes) -> bytes:
    return data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]


@pytest.mark.parametrize("harm", [flip, lambda data: data[:-8], lambda data: data[:4], lambda data: b"no tensor"])
def test_a_broken_shard_is_noticed_and_computed_again(
    harm: Callable[[bytes], bytes],
    base: Path,
    world: Path,
    cached: Cached,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys = of_dpo(base, world, tmp_path / "run", **CROSS)
    cached.copy_cache(tmp_path)
    original = contents(tmp_path / "trunk_cache")
    for count, part in enumerate(("states", "features", "reference"), 1):
        victim = sorted((tmp_path / "trunk_cache").rglob(f"{part}-*"))[count]
        victim.write_bytes(harm(victim.read_bytes()))
    prepared(keys)
    assert capsys.readouterr().err.count("is corrupt") == 3
    assert contents(tmp_path / "trunk_cache") == original


@pytest.mark.slow  # test_distributed.py trains in two processes
def test_two_processes_fill_one_cache(base: Path, world: Path, tmp_path: Path) -> None:
    """Over gloo; the weights are those of one process with twice the batch."""
    keys = of_dpo(base, world, tmp_path / "two" / "run", **CROSS, optim="sgd", max_steps=2)
    done = forked(fill_cache, keys | {"per_device_train_batch_size": 2}, *SMALL, count=2)
    assert done.codes == [0, 0], done.stderr
    assert done.stderr.count("trunk states: 24") == 0  # neither did it alone
    by_one_process = train(
        build_recipe(of_dpo(base, world, tmp_path / "one" / "run", **CROSS, optim="sgd", max_steps=2))
    )
    assert contents(tmp_path / "two" / "trunk_cache") == contents(tmp_path / "one" / "trunk_cache")
    tensors = load_file(tmp_path / "two" / "run" / TENSORS_FILE)
    for name, tensor in load_file(by_one_process / TENSORS_FILE).items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1])
def test_what_is_missing_is_divided_not_what_there_is(
    rank: int, base: Path, world: Path, cached: Cached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three shards are gone whose numbers are all odd: the first of two processes makes two of them, the other one."""
    keys = of_dpo(base, world, tmp_path / "run", **CROSS)
    cached.copy_cache(tmp_path)
    missing = [path for number in (1, 3, 5) for path in (tmp_path / "trunk_cache").rglob(f"states-0000{number}-*")]
    assert len(missing) == 3
    for path in missing:
        path.unlink()
    monkeypatch.setattr(feature_cache.distributed, "map_sharded", lambda values, make, what: make(values))
    monkeypatch.setattr(feature_cache.distributed, "shard", lambda values: values[rank::2])
    with pytest.raises(RelookError, match=rf"lacks {(1, 2)[rank]} shards that other processes computed"):
        prepared(keys)
    assert [path.exists() for path in missing] == [[True, False, True], [False, True, False]][rank]


def test_shards_that_other_processes_should_have_made(tmp_path: Path) -> None:
    """On machines that do not share the folder, each finds only its own."""
    folder = cache_store.ShardFolder(tmp_path / "cache")
    folder["states-00000"] = torch.zeros(2, 3)
    example = cache_store.Shard(0, ((0,),), ())
    made = CachePlan([], [2, 2], [1, 1], {}, {"states": 3}, torch.float32, False, 200, 0)
    made.__dict__["shards"] = [example, cache_store.Shard(1, ((1,),), ())]
    with pytest.raises(RelookError, match=r"lacks 1 shards.*states-00001.*all machines share"):
        feature_cache._wait_for_shards(folder, made, ["states"])
