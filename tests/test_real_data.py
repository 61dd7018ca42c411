"""The main job on LLaVA's own folders, as they are published: docs/real-data.md, command by command.

The vision tower is apart: its folder is given, lies inside the model's, or is a name in Hugging Face's cache.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Command, Ended
from helpers.variants import variants
from safetensors.torch import load_file
from torch import Tensor

from relook import load_model
from relook.evaluate.tasks.pope import SPLITS
from relook.files import read_json, read_records, write_json
from relook.recipe import read_yaml_or_shipped, shipped_names
from relook.train.feature_cache import TrunkCache

NAME = "openai/clip-vit-tiny-patch14-56"
FAST = ("--bf16", "false", "--learning_rate", "1e-3", "--use_cpu", "true")


@dataclass(frozen=True)
class Original:
    """A liuhaotian folder, with what a command has to say of its tower."""

    model: Path
    tower: str

    def keys(self) -> list[Any]:
        return ["--model_name_or_path", self.model, *(["--vision_tower", self.tower] if self.tower else [])]

    def options(self) -> list[str]:
        return ["--vision-tower", self.tower] if self.tower else []


PLACES = ["by its folder", "inside the model's folder", "named by the config", "by its name"]


@pytest.fixture
def original(
    request: pytest.FixtureRequest, tiny: Path, tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Original]:
    TrunkCache.current = None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    if request.param == "by its folder":
        yield Original(tiny / "ckpt_bin_sharded", str(tower))
    elif request.param == "inside the model's folder":
        model = Path(shutil.copytree(tiny / "ckpt_bin_sharded", tmp_path / "llava"))
        shutil.copytree(tower, model / NAME)
        yield Original(model, "")
    else:
        hub = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
        (hub / "refs").mkdir(parents=True)
        (hub / "refs" / "main").write_text("0" * 40)
        shutil.copytree(tower, hub / "snapshots" / ("0" * 40))
        yield Original(tiny / "ckpt_safetensors", NAME if request.param == "by its name" else "")
    TrunkCache.current = None


def data_of(world: Path) -> list[Any]:
    return [
        *("--vg_path", world / "vg", "--desc_data_path", world / "desc_data.json"),
        *("--pope_data_path", world / "pope_data.json"),
    ]


def fine(ended: Ended) -> Ended:
    assert ended.status == 0, ended.err
    return ended


def logits(model: Path, image: Path, **how: Any) -> Tensor:
    loaded = load_model(model, **how)
    with torch.inference_mode():
        found: Tensor = loaded.model(**loaded.encode([image], "What is there?")).logits
    return found


@pytest.mark.parametrize("original", variants(PLACES, {"by its name", "named by the config"}), indirect=True)
def test_a_frozen_trunk_is_cached_wherever_the_tower_is(
    original: Original, relook: Command, world: Path, tmp_path: Path
) -> None:
    """In memory, and on disk."""
    command = ["train", "head", *original.keys(), *data_of(world), *FAST, "--feature_cache"]
    for cache in ("memory", "disk"):
        TrunkCache.current = None
        fine(relook(*command, cache, "--output_dir", tmp_path / "runs" / cache))
    heads = [(tmp_path / "runs" / cache / "trained.safetensors").read_bytes() for cache in ("memory", "disk")]
    assert heads[0] == heads[1]
    assert len(list((tmp_path / "runs" / "trunk_cache").iterdir())) == 1
    short = ["--data", world / "test", "--version", "v1", "--max-new-tokens", "2", "--device", "cpu"]
    fine(relook("eval", "pope", "--model", tmp_path / "runs" / "disk", *short, "--out", tmp_path / "eval"))


@pytest.mark.slow  # its commands have tests of their own
@pytest.mark.parametrize("original", [PLACES[0], PLACES[2]], indirect=True)
def test_every_command_of_the_page(
    original: Original, relook: Command, world: Path, tower: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs"
    image = next((world / "test" / "val2014").iterdir())
    common = [*original.keys(), *data_of(world), *FAST]
    fine(relook("train", "hadpo-lora", *common, "--lora_r", "4", "--output_dir", run / "lora"))
    for recipe in ("post-decoder", "head"):
        fine(relook("train", recipe, *common, "--output_dir", run / recipe))
    # Stage 2 on stage 1, which names base and tower itself.
    keys = ["--model_name_or_path", run / "post-decoder", *data_of(world), *FAST]
    fine(relook("train", "post-decoder-head", *keys, "--output_dir", run / "stage2"))

    # The same on the folder that transformers reads gives the same head.
    fine(relook("convert", original.model, tmp_path / "hf", "--to", "hf", *original.options()))
    keys = ["--model_name_or_path", tmp_path / "hf", *data_of(world), *FAST]
    fine(relook("train", "head", *keys, "--output_dir", run / "head_hf"))
    heads = [load_file(run / name / "trained.safetensors")["lm_head.weight"] for name in ("head", "head_hf")]
    torch.testing.assert_close(heads[0], heads[1], atol=1e-6, rtol=0)

    # A stage takes from both runs what it names; a run stands for its base with what was trained.
    whole = logits(run / "stage2", image)
    base = original.model
    for name, arguments in {
        "stage 0": [base, run / "stage2", "--stage", "0"],
        "stage 2": [run / "post-decoder", run / "stage2", "--stage", "2"],
        "on the run": [run / "post-decoder", run / "stage2"],
    }.items():
        source, change, *stage = arguments
        tower_said = original.options() if source == base else []
        fine(relook("merge", source, change, tmp_path / name, *stage, *tower_said))
        torch.testing.assert_close(logits(tmp_path / name, image), whole, atol=1e-5, rtol=0)
    fine(relook("merge", base, run / "stage2", tmp_path / "stage 1", "--stage", "1"))  # the run knows the tower
    untrained = logits(base, image, vision_tower=tower)
    decoder = logits(tmp_path / "stage 1", image)
    assert (decoder - untrained).abs().max() > 1e-4
    assert (decoder - whole).abs().max() > 1e-4
    relook("merge", base, run / "stage2", tmp_path / "none", "--stage", "2", *original.options()).mistake(
        "has no post decoder", "Use stage 0"
    )
    fine(relook("export", run / "stage2", tmp_path / "exported"))
    torch.testing.assert_close(logits(tmp_path / "exported", image), whole, atol=1e-5, rtol=0)

    short = ["--data", world / "test", "--version", "v1", "--max-new-tokens", "4", "--device", "cpu"]
    for name, model in (("base", [base, *original.options()]), ("lora", [run / "lora"]), ("stage2", [run / "stage2"])):
        fine(relook("eval", "pope", "chair", "--model", *model, *short, "--out", tmp_path / "eval" / name))
    words = ("chat", run / "stage2", "--image", image, "--max-tokens", "3", "--device", "cpu")
    assert fine(relook(*words, stdin="What is there?\n")).out.strip()


@pytest.mark.slow  # as the sweeps of test_sweep.py
@pytest.mark.parametrize("original", [PLACES[3]], indirect=True)
def test_a_sweep_answers_as_an_evaluation_does(
    original: Original, relook: Command, world: Path, tmp_path: Path
) -> None:
    """Of so few tokens the answers are cut, and the scores depend on their number."""
    how = ["--data", world / "test", "--max_new_tokens", "2", "--output_dir", tmp_path / "sweep"]
    rows = ["--rows", "[{name: decoder}, {name: head, recipe: head}]", "--grid", "{seed: [0]}"]
    fine(relook("sweep", "ablations", *original.keys(), *data_of(world), *FAST, *how, *rows, "--dtype", "float32"))
    results = read_json(tmp_path / "sweep" / "results.json")
    short = ["--data", world / "test", "--version", "v1", "--max-new-tokens", "2", "--device", "cpu"]
    models = {"base": [original.model, *original.options()], "head": [tmp_path / "sweep" / "runs" / "head"]}
    for name, model in models.items():
        fine(relook("eval", "pope", "--model", *model, *short, "--out", tmp_path / name))
        scores = read_json(tmp_path / name / "pope.json")
        folders = [tmp_path / name, tmp_path / "sweep" / "eval" / name]
        swept = results["base"] if name == "base" else next(r for r in results["rows"] if r["name"] == name)
        for split in SPLITS:
            assert {key: swept["pope"][split][key] for key in scores[split]} == scores[split]
            answers = [read_records(folder / f"pope_{split}.jsonl") for folder in folders]
            assert answers[0] == answers[1]
        noted = [read_json(folder / "pope.json") for folder in folders]
        assert noted[0]["provenance"]["generation"] == noted[1]["provenance"]["generation"]


RECIPES = [name for name in shipped_names("recipe") if name != "toyworld-base"]


@pytest.mark.parametrize("recipe", variants(RECIPES, {"post-decoder-head", "hadpo-lora"}))
def test_every_shipped_recipe_trains_as_it_is(
    recipe: str, relook: Command, tiny: Path, tower: Path, world: Path, tmp_path: Path, no_trunk_cache: None
) -> None:
    """With its own precision and learning rate, on few pairs; a warm-up may be longer than that many steps."""
    values = read_yaml_or_shipped(recipe, "recipe")
    keys = ["--model_name_or_path", tiny / "ckpt_bin_sharded", "--vision_tower", tower]
    small = ["--lora_r", "2"] if values.get("lora_enable") else []
    if values["task"] == "sft":
        keys += ["--data_path", world / "llava" / "toyworld_mix.json", "--image_folder", world / "llava" / "images"]
    else:
        keys += data_of(world)
    ended = fine(relook("train", recipe, *keys, *small, "--max_steps", "2", "--output_dir", tmp_path / "run"))
    assert values["task"] == "sft" or "6 description pairs is taken twice an epoch" in ended.err
    assert (tmp_path / "run" / "run.json").exists()


def test_a_changed_tower_or_adapter_is_another_model(
    relook: Command, tiny: Path, tower: Path, world: Path, tmp_path: Path
) -> None:
    """Both lie beside the model, under paths that say nothing of their content."""
    copied = Path(shutil.copytree(tower, tmp_path / "tower"))
    adapter = Path(shutil.copytree(tiny / "head_fp32", tmp_path / "head"))
    command = ["eval", "pope", "--model", tiny / "ckpt_bin_sharded", "--data", world / "test", "--version", "v1"]
    command += ["--vision-tower", copied, "--adapter", adapter, "--max-new-tokens", "2", "--out", tmp_path / "out"]
    fine(relook(*command))
    fine(relook(*command))
    files = {"vision_tower": copied / "pytorch_model.bin", "adapter": next(adapter.iterdir())}
    for changed, file in files.items():
        before = file.read_bytes()
        tensors = torch.load(file, weights_only=True)
        torch.save({name: tensor + 1 for name, tensor in tensors.items()}, file)
        relook(*command).mistake(f"made with another {changed} (its files have changed)")
        file.write_bytes(before)


# --- data that change under a run


@pytest.fixture
def own_world(world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world, tmp_path / "world"))


def swap(world: Path) -> None:
    pairs = read_json(world / "pope_data.json")
    write_json(world / "pope_data.json", [{**p, "chosen": p["reject"], "reject": p["chosen"]} for p in pairs])


def redraw(world: Path) -> None:
    first, second = sorted((world / "vg" / "VG_100K").iterdir())[:2]
    shutil.copyfile(first, second)


@pytest.mark.parametrize(("change", "key"), [(swap, "pope_data_path"), (redraw, "images")])
def test_a_run_does_not_go_on_with_other_data(
    change: Callable[[Path], None],
    key: str,
    relook: Command,
    base: Path,
    own_world: Path,
    tmp_path: Path,
    no_trunk_cache: None,
) -> None:
    keys = ["--model_name_or_path", base, *data_of(own_world), *FAST, "--save_strategy", "steps", "--save_steps", "1"]
    keys += ["--warmup_steps", "0"]
    command = ["train", "head", *keys, "--output_dir", tmp_path / "run", "--version", "llava_hf"]
    fine(relook(*command))
    (tmp_path / "run" / "run.json").unlink()  # killed at its end
    fine(relook(*command))
    change(own_world)
    if key != "images":  # of a finished run the files are looked at alone
        relook(*command).mistake("holds a run on other data", key, "remove the folder")
    (tmp_path / "run" / "run.json").unlink()
    ended = relook(*command)
    assert ended.status == 2
    assert f"the files of {key} have changed since" in ended.err
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # nothing is left to go on from: it begins anew
    fine(relook(*command))
