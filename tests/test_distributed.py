"""Several processes: the same training as with one, under DDP, FSDP2 and DeepSpeed, also after a kill."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.forked import forked
from helpers.several import train_all
from helpers.tiny import dpo_keys, scramble, sft_keys
from helpers.variants import crossed, variants
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_train import Bench, log_of

from relook import distributed
from relook.distributed import local_shard
from relook.errors import RecipeError, RelookError
from relook.files import write_json
from relook.forward.collate import Collator
from relook.forward.packed_attention import resolve_trunk_pass
from relook.model.load import TENSORS_FILE
from relook.recipe import Recipe, build_recipe
from relook.train import trainer
from relook.train.callbacks import count_nonfinite_tensors
from relook.train.run import train, training_arguments
from relook.train.trainer import COMPLETE_MARKER, ModalityLengthSampler

pytestmark = pytest.mark.usefixtures("no_trunk_cache")
ROOT = Path(__file__).parents[1]
Keys = dict[str, Any]

LORA = {"lora_enable": True, "lora_r": 4}
POST = {"tune_post_decoder": True, "tune_lm_head": True}
ALL = {"optim": "sgd", "max_steps": 3}
WAYS: dict[str, Keys] = {
    "lora": {**LORA, **ALL, "learning_rate": 0.1, "nll_weight": 0.5},
    "cached": {**POST, **ALL, "learning_rate": 0.05},
    "live": {**POST, **ALL, "learning_rate": 0.05, "feature_cache": "off"},
    "mdpo": {**LORA, **ALL, "learning_rate": 0.1, "nll_weight": 0.5, "mdpo_conditional_weight": 0.5},
    "sft": {"task": "sft", **ALL, "learning_rate": 0.02, "conversations_per_tree": 1},
    "kept": {
        "task": "sft",
        **LORA,
        **ALL,
        "learning_rate": 0.1,
        "conversations_per_tree": 1,
        "feature_cache": "memory",
    },
    "post": {"task": "sft", **ALL, "tune_post_decoder": True, "learning_rate": 0.02, "conversations_per_tree": 1},
}
TOWER = {  # in LLaVA's mix, whose batches without images give a tower no gradient of their own
    "whole": WAYS["sft"] | {"tune_vision_tower": True},
    "LoRA on both": {**WAYS["sft"], **LORA, "learning_rate": 0.1, "lora_vision_tower": True},
}
BEST = {**POST, **ALL, "learning_rate": 30.0, "eval_fraction": 0.34, "eval_strategy": "steps", "eval_steps": 1,
        "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "max_grad_norm": 0.0}  # fmt: skip
# Killed in its second epoch, with momentum, dropout and a schedule.
KILLED = {**LORA, "task": "sft", "tune_post_decoder": True, "post_decoder_lr": 2e-3, "lora_dropout": 0.1,
          "max_steps": 5, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine",
          "conversations_per_tree": 1, "per_device_train_batch_size": 4, "group_by_modality_length": True}  # fmt: skip


@pytest.fixture(scope="module")
def mix(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA's mix in small: most conversations have no image."""
    records = json.loads((world / "llava" / "toyworld_mix.json").read_text())[:24]
    for number, record in enumerate(records):
        if number % 3:
            del record["image"]
            record["conversations"][0]["value"] = "Is there a cup?"
    path = tmp_path_factory.mktemp("mix") / "mix.json"
    write_json(path, records)
    return path


@pytest.fixture
def keys_of(base: Path, world: Path, mix: Path, tmp_path: Path) -> Callable[..., Keys]:
    """A run's keys: `keys_of(name, keys, more)`; each run has a folder of its own, and so a cache of its own."""

    def make(name: str, keys: Keys, **more: Any) -> Keys:
        rest = {key: value for key, value in (keys | more).items() if key != "task"}
        out = tmp_path / name / "run"
        if keys.get("task") == "sft":
            return sft_keys(base, world, out, data_path=mix, **rest)
        return dpo_keys(base, world, out, **rest)

    return make


def torchrun(runs: list[Keys], **environment: str) -> subprocess.CompletedProcess[str]:
    """Carry out recipes in two processes by tests/helpers/several.py."""
    plain = [{key: str(v) if isinstance(v, Path) else v for key, v in keys.items()} for keys in runs]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*command, "tests/helpers/several.py", json.dumps(plain)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )


def notes(out: Path, of: str) -> list[Any]:
    """What the two processes noted about a run."""
    return [json.loads(out.with_name(f"run-{rank}.json").read_text())[of] for rank in (0, 1)]


def same_training(two: Path, one: Path) -> None:
    """Loss curve, gradient norms and weights."""
    for field in ("loss", "grad_norm"):
        assert log_of(two, field) == pytest.approx(log_of(one, field), rel=1e-5)
    names = {path.name for path in one.glob("*.safetensors")}
    assert names == {path.name for path in two.glob("*.safetensors")}
    for name in names:
        tensors, expected = load_file(two / name), load_file(one / name)
        assert tensors.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(tensors[key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("ddp", "fsdp"),
    [(["post"], ["kept"]), pytest.param([*WAYS], [*WAYS, "best"], marks=pytest.mark.slow)],
    ids=str,
)
def test_two_processes_train_as_one_with_twice_the_batch(
    ddp: list[str], fsdp: list[str], keys_of: Callable[..., Keys], tmp_path: Path
) -> None:
    """And the last of their runs, which is killed, goes on to the weights of one that was not."""

    def both(runs: list[Keys]) -> Any:
        return torchrun(runs) if "live" in ddp else forked(train_all, runs, count=2)

    recipes = WAYS | {"best": BEST}
    ones = {name: train(build_recipe(keys_of(f"one {name}", recipes[name]))) for name in {*ddp, *fsdp}}
    runs = [keys_of(f"ddp {name}", recipes[name], per_device_train_batch_size=2) for name in ddp]
    runs += [keys_of(f"fsdp {name}", recipes[name], per_device_train_batch_size=2, fsdp=True) for name in fsdp]
    done = both([*runs, keys_of("whole", KILLED, fsdp=True), keys_of("killed", KILLED, fsdp=True, kill=5)])
    checkpoints = tmp_path / "killed" / "run" / "checkpoints"
    assert checkpoints.exists(), done.stderr
    complete = {path.name: (path / COMPLETE_MARKER).exists() for path in checkpoints.iterdir()}
    assert complete == {"checkpoint-3": True, "checkpoint-4": True, "checkpoint-5": False}
    for keys in runs:
        out, (strategy, name) = Path(keys["output_dir"]), Path(keys["output_dir"]).parent.name.split()
        same_training(out, ones[name])
        assert all(0.4 < share < 0.6 if strategy == "fsdp" else share == 1 for share in notes(out, "held"))
        for field in ("rewards/margins", "eval_loss"):
            assert log_of(out, field) == pytest.approx(log_of(ones[name], field), rel=1e-5, abs=1e-5)
    for name in {"sft", "post"} & set(ddp):
        first, second = notes(tmp_path / f"ddp {name}" / "run", "images")
        assert any(a != b for a, b in zip(first, second, strict=True))  # else the mix shows nothing

    done = both([keys_of("killed", KILLED, fsdp=True)])
    assert (tmp_path / "killed" / "run" / "run.json").exists(), done.stderr
    same_bytes(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_a_tower_trains_in_two_processes_as_in_one(fsdp: bool, keys_of: Callable[..., Keys]) -> None:
    halves = {"per_device_train_batch_size": 2, **({"fsdp": True} if fsdp else {})}
    runs = {name: keys_of(f"two {name}", keys, **halves) for name, keys in TOWER.items()}
    forked(train_all, list(runs.values()), count=2)
    for name, keys in runs.items():
        out, one = Path(keys["output_dir"]), train(build_recipe(keys_of(f"one {name}", TOWER[name])))
        same_training(out, one)
        base = load_file(Path(keys["model_name_or_path"]) / "model.safetensors")
        trained = {n: t for path in one.glob("*.safetensors") for n, t in load_file(path).items() if "vision" in n}
        assert any(n not in base or not torch.equal(tensor, base[n]) for n, tensor in trained.items())
        assert any(a != b for a, b in zip(*notes(out, "images"), strict=True))  # else the mix shows nothing


def same_bytes(folder: Path) -> None:
    """Of the runs `killed` and `whole`: what they end in, and what they logged, in their second epoch too."""
    again, uninterrupted = (folder / name / "run" for name in ("killed", "whole"))
    for name in (TENSORS_FILE, "adapter_model.safetensors"):
        assert (again / name).read_bytes() == (uninterrupted / name).read_bytes()
    assert log_of(again, "loss") == log_of(uninterrupted, "loss")
    assert log_of(again, "epoch")[-1] > 1


@pytest.mark.slow  # DeepSpeed is heavy to install, and its processes take minutes
def test_deepspeed_trains_as_one_process(keys_of: Callable[..., Keys], tmp_path: Path) -> None:
    """ZeRO-2, ZeRO-3 and offload on the CPU over gloo, and ZeRO-3 after a kill."""
    assert importlib.util.find_spec("deepspeed"), "run DS_BUILD_OPS=0 pip install 'relook[deepspeed]' first"
    ones = {name: train(build_recipe(keys_of(f"one {name}", keys))) for name, keys in WAYS.items()}
    files = {"zero2": "zero2"}
    for name in ("zero3", "zero3_offload"):
        config = json.loads(Path(distributed.deepspeed_config(name)).read_text())
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # else nothing so small is cut up
        files[name] = str(tmp_path / f"{name}.json")
        write_json(Path(files[name]), config)
    half = {"per_device_train_batch_size": 2}
    runs = [
        keys_of(f"{stage} {name}", WAYS[name], deepspeed=file, **half) for stage, file in files.items() for name in WAYS
    ]
    done = torchrun(runs, DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr
    for keys in runs:
        stage, name = Path(keys["output_dir"]).parent.name.split()
        same_training(Path(keys["output_dir"]), ones[name])
        assert all(share == 1 if stage == "zero2" else share < 0.6 for share in notes(Path(keys["output_dir"]), "held"))
    assert torchrun([keys_of("killed", KILLED, deepspeed=files["zero3"], kill=5)], DS_ACCELERATOR="cpu").returncode
    done = torchrun(
        [keys_of(name, KILLED, deepspeed=files["zero3"]) for name in ("killed", "whole")], DS_ACCELERATOR="cpu"
    )
    assert done.returncode == 0, done.stderr
    same_bytes(tmp_path)


@pytest.mark.slow  # as above
@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_deepspeed_leaves_the_model_what_it_was_in_bf16(name: str, keys_of: Callable[..., Keys]) -> None:
    """Rotary frequencies or reference log-probs rounded to bf16 would tell policy and reference apart before a step.

    The same run without DeepSpeed is 2e-5 away from ln 2: references come from batches of another composition.
    """
    more = {"mdpo_conditional_weight": 0.5, "eval_fraction": 0.34, "eval_on_start": True, "save_strategy": "epoch"}
    keys = keys_of(f"bf16 {name}", {**LORA, **more, "max_steps": 1, "learning_rate": 1e-3}, deepspeed=name, bf16=True)
    done = torchrun([keys], DS_ACCELERATOR="cpu")
    assert done.returncode == 0, done.stderr
    out = Path(keys["output_dir"])
    for field in ("loss", "eval_loss"):
        assert log_of(out, field)[0] == pytest.approx(1.5 * math.log(2), abs=5e-4)


def as_under_deepspeed(**more: Any) -> trainer.RelookTrainer:
    """As much of a trainer as `_prepare_inputs` and resuming look at."""
    partial_trainer = object.__new__(trainer.RelookTrainer)
    vars(partial_trainer).update(args=SimpleNamespace(device=torch.device("cpu")), is_deepspeed_enabled=True, **more)
    return partial_trainer


def test_deepspeed_rounds_nothing_of_a_batch(keys_of: Callable[..., Keys]) -> None:
    """The Trainer would ask DeepSpeed's settings for a type, and there are none here."""
    keys = {**LORA, "mdpo_conditional_weight": 0.5, "nll_weight": 0.5, "lora_dropout": 0.0}
    bench = Bench(build_recipe(keys_of("run", keys)))
    inputs = {**bench.collator(bench.items[:2]), "share": torch.tensor(2 / 3)}
    assert {"batch", "reference", "weight", "work"} < inputs.keys()
    prepared = as_under_deepspeed()._prepare_inputs(inputs)
    assert prepared["work"] == inputs["work"]
    for name in ("reference", "weight", "share"):
        assert prepared[name].dtype == torch.float32
        assert torch.equal(prepared[name], inputs[name])
    assert torch.equal(prepared["batch"].pixel_values, inputs["batch"].pixel_values)


def test_a_checkpoint_that_deepspeed_cannot_read_is_said() -> None:
    """`load_checkpoint` only warns, and gives no path back."""
    engine = SimpleNamespace(load_checkpoint=lambda folder, load_module_strict: (None, None))
    with pytest.raises(RelookError, match=r"DeepSpeed cannot read its part of run/checkpoint-2\. Remove"):
        as_under_deepspeed(model_wrapped=engine)._load_optimizer_and_scheduler("run/checkpoint-2")


# --- what a step's loss is


@pytest.mark.parametrize("name", variants(["mdpo", "sft"], {"sft"}))  # mdpo's run has all of lora's
def test_accumulated_batches_count_by_their_tokens(name: str, keys_of: Callable[..., Keys]) -> None:
    """Four samples at once, or one after the other: the mean is over the step's tokens."""
    one_pass = train(build_recipe(keys_of("whole", WAYS[name])))
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    same_training(train(build_recipe(keys_of("split", WAYS[name], **split))), one_pass)


@pytest.mark.parametrize(("attention", "cache"), crossed(["cross", "self_cross"], ["off", "memory"]))
def test_a_blank_image_uses_all_that_trains_and_changes_nothing(
    attention: str, cache: str, keys_of: Callable[..., Keys], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"task": "sft", "tune_post_decoder": True, "post_decoder": {"attention": attention}, "feature_cache": cache}
    bench = Bench(build_recipe(keys_of("run", keys, tune_mm_mlp_adapter=cache == "off", conversations_per_tree=1)))
    scramble(bench.loaded.core.model.post_decoder, torch.Generator().manual_seed(0))
    text = [item for item in bench.items if not item.example.images][:3]
    with_blank = bench.policy(bench.collator(text)["batch"])
    with_blank.sum().backward()
    gradients = {name: p.grad for name, p in bench.parameters.items() if p.requires_grad}
    assert all(grad is not None for grad in gradients.values())
    side = [grad for name, grad in gradients.items() if ".align." in name or "cross_" in name or "projector" in name]
    assert side
    assert not any(grad.any() for grad in side if grad is not None)
    monkeypatch.setattr(bench.collator, "with_blank_image", lambda batch: batch)
    torch.testing.assert_close(with_blank, bench.policy(bench.collator(text)["batch"]), rtol=0, atol=0)


# --- batches of one modality


@given(
    st.lists(st.tuples(st.integers(1, 900), st.booleans()), min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 5),
)
def test_steps_are_of_one_modality(samples: list[tuple[int, bool]], size: int, batches: int, seed: int) -> None:
    lengths, has_image = map(list, zip(*samples, strict=True))
    sampler = ModalityLengthSampler(lengths, has_image, size, batches, seed)
    order = list(sampler)
    assert sorted(order) == list(range(len(samples)))
    assert order == list(sampler)
    step = size * batches
    pure = sum(has_image) // step + (len(samples) - sum(has_image)) // step
    for start in range(0, pure * step, step):
        assert len({has_image[i] for i in order[start : start + step]}) == 1
        totals = [sum(lengths[i] for i in order[b : b + size]) for b in range(start, start + step, size)]
        # Dealt out there and back, the batches differ by no more than the samples themselves do.
        spread = [lengths[i] for i in order[start : start + step]]
        assert max(totals) - min(totals) <= max(spread) - min(spread)
    sampler.epoch = 1
    assert sorted(sampler) == sorted(order)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    sampler = ModalityLengthSampler([5] * 40, [True] * 40, 2, 2, seed=0)
    orders = [list(sampler)]
    sampler.epoch = 1
    orders.append(list(sampler))
    orders.append(list(ModalityLengthSampler([5] * 40, [True] * 40, 2, 2, seed=7)))
    assert len({tuple(order) for order in orders}) == 3


def test_training_draws_so(keys_of: Callable[..., Keys], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of 8 samples with images and 16 without, by twos."""
    seen: list[set[bool]] = []
    usual = Collator.__call__
    monkeypatch.setattr(
        Collator,
        "__call__",
        lambda self, items: seen.append({bool(i.example.images) for i in items}) or usual(self, items),
    )
    keys = {"task": "sft", **LORA, "group_by_modality_length": True, "conversations_per_tree": 1}
    train(build_recipe(keys_of("run", keys, per_device_train_batch_size=2, num_train_epochs=2)))
    for epoch in (seen[:12], seen[12:]):
        assert (epoch.count({True}), epoch.count({False})) == (4, 8)
    assert seen[:12] != seen[12:]


# --- checkpoints


def saving(keys_of: Callable[..., Keys], name: str, **keys: Any) -> Recipe:
    return build_recipe(keys_of(name, {"tune_lm_head": True, "save_strategy": "steps", "save_steps": 1, "max_steps": 3},
                                save_total_limit=1, **keys))  # fmt: skip


def test_a_full_disk_is_said_and_costs_no_checkpoint(
    keys_of: Callable[..., Keys], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head's 107 x 64 float32, and two moments of each."""
    recipe, room = saving(keys_of, "run", optim="adamw_torch"), trainer.require_disk_space
    sizes: list[int] = []

    def full_at_the_second(path: Path, needed: int, what: str, fix: str) -> None:
        sizes.append(needed)
        room(path, needed + (1 << 60) * (len(sizes) == 2), what, fix)

    monkeypatch.setattr(trainer, "require_disk_space", full_at_the_second)
    with pytest.raises(RelookError, match=r"The checkpoint needs .* on disk, but .* free\. Make room"):
        train(recipe)
    folder = Path(recipe.output_dir) / "checkpoints"
    assert [path.name for path in folder.iterdir() if (path / COMPLETE_MARKER).exists()] == ["checkpoint-1"]
    tensors = sum(path.stat().st_size for path in (folder / "checkpoint-1").glob("*") if path.suffix != ".json")
    assert sizes[0] < tensors < sizes[0] * 1.5 + 20_000
    train(recipe)
    uninterrupted = train(saving(keys_of, "whole", optim="adamw_torch"))
    assert (Path(recipe.output_dir) / TENSORS_FILE).read_bytes() == (uninterrupted / TENSORS_FILE).read_bytes()


def test_the_old_checkpoint_goes_when_the_new_one_is_whole(
    keys_of: Callable[..., Keys], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = saving(keys_of, "run")
    folder = Path(recipe.output_dir) / "checkpoints"
    seen: list[set[str]] = []

    def failing(self: Any, output_dir: str) -> None:
        seen.append({path.name for path in folder.iterdir()})
        if len(seen) == 3:
            raise OSError("the disk failed")

    monkeypatch.setattr(trainer.RelookTrainer, "_save_rng_state", failing)
    with pytest.raises(OSError, match="the disk failed"):
        train(recipe)
    assert seen == [{"checkpoint-1"}, {"checkpoint-1", "checkpoint-2"}, {"checkpoint-2", "checkpoint-3"}]
    assert {path.name for path in folder.iterdir()} == {"checkpoint-2"}


def test_a_process_that_fails_leaves_the_checkpoint_to_the_others(
    keys_of: Callable[..., Keys], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be writing into it. The same command goes on from the one before."""
    recipe, several = saving(keys_of, "run"), SimpleNamespace(**vars(distributed))
    several.world_size, several.barrier = lambda: 2, lambda what: None
    folder = Path(recipe.output_dir) / "checkpoints"

    def failing(self: Any, output_dir: str) -> None:
        if output_dir.endswith("-2"):
            raise OSError("the disk failed")

    monkeypatch.setattr(trainer, "distributed", several)
    monkeypatch.setattr(trainer.RelookTrainer, "_save_rng_state", failing)
    with pytest.raises(OSError, match="the disk failed"):
        train(recipe)
    complete = {path.name: (path / COMPLETE_MARKER).exists() for path in folder.iterdir()}
    assert complete == {"checkpoint-1": True, "checkpoint-2": False}
    assert trainer.last_checkpoint(folder) == str(folder / "checkpoint-1")
    assert [path.name for path in folder.iterdir()] == ["checkpoint-1"]


def test_the_part_held_of_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ZeRO-3, as DeepSpeed lays it: five numbers over two processes, in parts of three; the last of six is none."""
    parts = (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, torch.nan]))
    for rank, part in enumerate(parts):
        parameter: Any = torch.nn.Parameter(torch.empty(0))
        parameter.ds_tensor, parameter.ds_shape, parameter.ds_process_group = part, (5,), None
        monkeypatch.setattr(distributed.dist, "get_rank", lambda group, rank=rank: rank)
        assert local_shard(parameter).tolist() == [1, 2, 3, 4, 5][3 * rank : 3 * rank + 3]
        assert count_nonfinite_tensors([parameter], torch.device("cpu")) == 0
        part[0] = torch.inf
        assert count_nonfinite_tensors([parameter], torch.device("cpu")) == 1


# --- waiting


LATE = """
from datetime import timedelta
from time import sleep
from relook import distributed
distributed.barrier("the start")
distributed.TIMEOUT = timedelta(seconds=2)
if distributed.rank() == 1:
    sleep(4)
try:
    distributed.barrier("the answers to pope")
except distributed.RelookError as error:
    print(f"{distributed.rank()}: {error}")
"""


@pytest.mark.slow
def test_a_process_says_what_it_waited_for(tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    before = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *before, str(tmp_path / "late.py")], capture_output=True, text=True, env=environment
    )
    assert "0: Process 0 waited up to 0:00:02 for the answers to pope, in vain: [Rank 0]: Ranks 1" in done.stdout


# --- settings


def test_a_model_that_is_taken_apart_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [resolve_trunk_pass("auto", "cuda", distributed) for distributed in (False, True)] == ["compiled", "flex"]
    assert [resolve_trunk_pass("auto", "cpu", distributed) for distributed in (False, True)] == ["dense", "dense"]
    assert resolve_trunk_pass("compiled", "cuda") == "compiled"
    with pytest.raises(RecipeError, match="compiled does not go with FSDP or DeepSpeed"):
        resolve_trunk_pass("compiled", "cuda", sharded=True)
    assert not distributed.is_sharded({"fsdp": False, "deepspeed": None})
    assert distributed.is_sharded({"fsdp": True})
    assert distributed.is_sharded({"deepspeed": "zero3"})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert distributed.is_sharded({})


def test_deepspeed_files_are_found_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: object())
    stages = {}
    for name in distributed.deepspeed_names():
        content = json.loads(Path(distributed.deepspeed_config(name)).read_text())
        stages[name] = content["zero_optimization"]["stage"]
        offloaded = "offload_optimizer" in content["zero_optimization"]
        assert offloaded == name.endswith("offload")
        # Else accelerate swaps the optimizer for one that is compiled on the spot.
        assert (content.get("zero_force_ds_cpu_optimizer") is False) == offloaded
    assert stages == {"zero2": 2, "zero2_offload": 2, "zero3": 3, "zero3_offload": 3}
    custom = tmp_path / "own.json"
    custom.write_text("{}")
    assert distributed.deepspeed_config(str(custom)) == str(custom)
    with pytest.raises(RecipeError, match=r"no DeepSpeed file 'zero4'.*zero2"):
        distributed.deepspeed_config("zero4")


def test_what_is_missing_is_said(keys_of: Callable[..., Keys], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    for keys, message in (
        ({"deepspeed": "zero2"}, r"not installed.*pip install 'relook\[deepspeed\]'"),
        ({"fsdp": True}, "fsdp needs several processes.*torchrun"),
    ):
        recipe = build_recipe(keys_of("run", {"tune_lm_head": True}, **keys))
        with pytest.raises(RecipeError, match=message):
            training_arguments(recipe, tmp_path)
