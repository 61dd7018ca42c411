"""The libraries below relook: their ranges, what is used of them beyond their public names, saved models under each."""

from __future__ import annotations

import ast
import inspect
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Command
from helpers.tiny import pixels, prompt, tiny_relook
from packaging.requirements import Requirement
from transformers import DynamicCache, GenerationMixin, LlavaProcessor, PreTrainedConfig, PreTrainedModel, Trainer

import relook
from relook import load_model
from relook.model import modeling_relook
from relook.toyworld.build import make_processor
from relook.train import trainer

ROOT = Path(relook.__file__).parents[1]
SOURCES = sorted((ROOT / "relook").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Names with an underscore that relook uses, for want of public ones, and what has them.
PRIVATE: dict[str, Any] = {
    "_attn_implementation": PreTrainedConfig,
    "_dynamo": torch,
    "_expand_inputs_for_generation": GenerationMixin,
    "_flash_attention_forward": torch.ops.aten,
    "_functorch": torch,
    "_get_num_multimodal_tokens": LlavaProcessor,
    "_get_output_dir": Trainer,
    "_get_train_sampler": Trainer,
    "_inductor": torch,
    "_init_weights": PreTrainedModel,
    "_load_best_model": Trainer,
    "_load_from_checkpoint": Trainer,
    "_load_optimizer_and_scheduler": Trainer,
    "_modules": torch.nn.Module(),
    "_no_split_modules": PreTrainedModel,
    "_prepare_for_training": Trainer,
    "_prepare_input": Trainer,
    "_prepare_inputs": Trainer,
    "_save_checkpoint": Trainer,
    "_save_optimizer_and_scheduler": Trainer,
    "_supports_sdpa": PreTrainedModel,
}
# Of Python itself; of DeepSpeed, where it has taken a model over; of Gradio's events (`_data`).
OTHER = {"_asdict", "_data", "_exit", "_hp_mapping"}
# Of vLLM's LLaVA, which is not installed here; `benchmarks/vllm_compare.py` runs it.
OTHER |= {"_build_llava_or_pixtral_hf_info", "_build_llava_or_pixtral_hf_processor", "_process_image_pixels"}


def private_names() -> set[str]:
    """Names with one underscore that relook reads of what is not its own, asks for, or overrides."""
    used: set[str] = set()
    of_self: set[str] = set()
    own: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    own.add(name)
                case ast.Attribute(value=ast.Name("self" | "cls"), attr=name, ctx=context):
                    (of_self if isinstance(context, ast.Load) else own).add(name)
                case ast.AnnAssign(target=ast.Name(name)) | ast.Assign(targets=[ast.Name(name)]):
                    own.add(name)
                case ast.Attribute(attr=name):
                    used.add(name)
                case ast.Call(func=ast.Name("getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(str(name)), *_]):
                    used.add(name)
                case ast.Subscript(value=ast.Call(func=ast.Name("vars")), slice=ast.Constant(str(name))):
                    used.add(name)
                case ast.ImportFrom(module=str(module), names=names, level=0) if not module.startswith("relook"):
                    used |= {*module.split("."), *(alias.name for alias in names)}
    used |= of_self - own
    for module in (modeling_relook, trainer):
        for kind in vars(module).values():
            if inspect.isclass(kind) and kind.__module__ == module.__name__:
                theirs = [set(vars(base)) for base in kind.__mro__ if not base.__module__.startswith("relook")]
                used |= {name for name, value in vars(kind).items() if callable(value)} & set().union(*theirs)
    return {name for name in used if name.startswith("_") and not name.startswith("__")}


def versions() -> str:
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "peft", "accelerate"))


def test_no_private_name_is_used_that_is_not_listed() -> None:
    assert private_names() == PRIVATE.keys() | OTHER


@pytest.mark.parametrize("name", PRIVATE)
def test_private_names_exist_in_the_installed_versions(name: str) -> None:
    assert hasattr(PRIVATE[name], name), f"{PRIVATE[name]} has no {name} any more ({versions()})"


def test_what_compiled_layers_set_in_torch_exists() -> None:
    dynamo, functorch = torch._dynamo.config, torch._functorch.config
    with dynamo.patch(recompile_limit=9), functorch.patch(activation_memory_budget=0.5):
        assert (dynamo.recompile_limit, functorch.activation_memory_budget) == (9, 0.5), versions()
    assert callable(torch._dynamo.maybe_mark_dynamic), versions()
    assert issubclass(torch._dynamo.exc.TorchDynamoException, Exception), versions()
    assert issubclass(torch._inductor.exc.InductorError, Exception), versions()


# --- pyproject.toml


def requirements(extras: bool = True) -> Iterator[Requirement]:
    lists = PROJECT["optional-dependencies"] if extras else {}
    for texts in (PROJECT["dependencies"], *(texts for extra, texts in lists.items() if extra != "dev")):
        yield from map(Requirement, texts)


def test_the_installed_versions_lie_in_the_ranges() -> None:
    outside = []
    for wanted in requirements():
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            outside.append(f"{wanted.name} {version}, but {wanted.specifier}")
    assert outside == []


def test_transformers_and_peft_end_before_a_release_that_no_test_has_seen() -> None:
    ranges = {wanted.name: wanted.specifier for wanted in requirements(extras=False)}
    for name, untried in (("transformers", "5.25.0"), ("peft", "0.22.0")):
        assert not ranges[name].contains(untried)
    assert all(any(bound.operator == ">=" for bound in specifier) for specifier in ranges.values())


def test_everything_that_is_imported_is_asked_for() -> None:
    """Not what comes along with something else: that may stop asking for it."""
    names = {"PIL": "pillow", "yaml": "pyyaml", "lmms_eval": "lmms-eval", "pydantic_core": "pydantic-core"}
    asked = {wanted.name.lower() for wanted in requirements()} | {"relook", "lmms-eval"}
    imported: dict[str, Path] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0]: path for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported[str(node.module).split(".")[0]] = path
    # triton comes with torch's builds for GPUs, each of which needs one version of it.
    theirs = {name: path for name, path in imported.items() if name not in {*sys.stdlib_module_names, "triton"}}
    assert {name: path for name, path in theirs.items() if names.get(name, name).lower() not in asked} == {}


# --- saved models


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_base_model_takes_the_cache_by_its_older_and_its_newer_name(name: str) -> None:
    model = tiny_relook()
    ids = torch.tensor([prompt(model, "Is there a cup?", images=0)])
    cache = DynamicCache()
    with torch.no_grad():
        model.model(input_ids=ids[:, :-1], use_cache=True, **{name: cache})
        step = model.model(input_ids=ids[:, -1:], use_cache=True, **{name: cache}).last_hidden_state
        whole = model.model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(step, whole[:, -1:], rtol=0, atol=1e-3)
    assert cache.get_seq_length() == ids.shape[1]


def test_a_folder_with_an_older_modelling_file_loads_and_a_conversion_brings_todays(
    tmp_path: Path, relook: Command
) -> None:
    model = tiny_relook(depth=2)
    old, new = tmp_path / "old", tmp_path / "new"
    model.save_pretrained(old)
    make_processor().save_pretrained(old)
    (old / "modeling_relook.py").write_text("raise ImportError('written for a transformers of before')\n")
    inputs = {"input_ids": torch.tensor([prompt(model, "Is there a cup?")]), "pixel_values": pixels(1)}
    text = model.generate(**inputs, do_sample=False, max_new_tokens=6).tolist()
    assert load_model(old).model.generate(**inputs, do_sample=False, max_new_tokens=6).tolist() == text

    assert relook("convert", old, new, "--to", "hf").status == 0
    # With this file saved models load in a process without relook: see test_model.py.
    assert (new / "modeling_relook.py").read_bytes() == Path(str(modeling_relook.__file__)).read_bytes()
