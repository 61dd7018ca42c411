"""LLaVA's group_by_modality_length: what is in a batch, and that the order is the same after a kill."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import sft_keys

from relook.files import write_json
from relook.recipe import build_recipe
from relook.train import run as training
from relook.train.run import train
from relook.train.sampling import ModalitySampler


def item(length: int, image: bool) -> Any:
    return SimpleNamespace(example=SimpleNamespace(tree=range(length), images=("a",) if image else ()))


SAMPLES = st.lists(st.tuples(st.integers(1, 900), st.booleans()), min_size=1, max_size=120)


@given(SAMPLES, st.integers(1, 9), st.integers(0, 3))
def test_every_sample_once_and_one_kind_in_a_batch(samples: list[tuple[int, bool]], size: int, epoch: int) -> None:
    sampler = ModalitySampler([item(*sample) for sample in samples], size, seed=1)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(samples)))
    assert len(sampler) == len(order)
    kinds = Counter(image for _, image in samples)
    whole = sum(count // size for count in kinds.values())
    for start in range(0, whole * size, size):
        assert len({samples[i][1] for i in order[start : start + size]}) == 1
    assert order == list(sampler)


def test_batches_are_of_similar_length_and_epochs_differ() -> None:
    samples = [item(1 + (i * 7919) % 1000, i % 3 == 0) for i in range(600)]
    sampler = ModalitySampler(samples, 8, seed=0)

    def spread(order: list[int]) -> float:
        batches = [[sampler.lengths[i] for i in order[start : start + 8]] for start in range(0, 600, 8)]
        return sum(max(batch) - min(batch) for batch in batches) / len(batches)

    first = list(sampler)
    assert spread(first) < 0.2 * spread(list(range(600)))
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(ModalitySampler(samples, 8, seed=1)) != first


@pytest.mark.usefixtures("no_trunk_cache")
def test_training_sees_one_kind_at_a_time(
    base: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = json.loads((world / "llava" / "toyworld_mix.json").read_text())
    records = records[:: len(records) // 12][:12]
    for record in records[::2]:
        del record["image"]
        record["conversations"][0]["value"] = "Is there a cup?"
    write_json(tmp_path / "mix.json", records)
    seen: list[set[bool]] = []
    usual = training.Collator.__call__
    monkeypatch.setattr(
        training.Collator,
        "__call__",
        lambda self, items: seen.append({bool(i.example.images) for i in items}) or usual(self, items),
    )
    keys = {"data_path": tmp_path / "mix.json", "group_by_modality_length": True, "per_device_train_batch_size": 2}
    more = {"conversations_per_tree": 1, "lora_enable": True, "num_train_epochs": 2}
    recipe = build_recipe(sft_keys(base, world, tmp_path / "run", **keys, **more))
    train(recipe)
    assert len(seen) >= 12
    assert all(len(kinds) == 1 for kinds in seen)
    assert {True} in seen
    assert {False} in seen
    orders = [seen[:6], seen[6:12]]
    assert all(order.count({True}) == 3 for order in orders)
