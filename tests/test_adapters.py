"""Adapters of every kind that peft makes: merged as peft computes them, or refused by name; none is laid on in part."""

from __future__ import annotations

import copy
import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from helpers.tiny import WIDTH, dpo_keys, pixels, prompt, save_tied
from helpers.variants import crossed, variants
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from test_checkpoints import copied
from torch import Tensor
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

from relook import load_model
from relook.errors import CheckpointError
from relook.files import read_json, write_json
from relook.model.checkpoint import parse_folder, read_tensor_file
from relook.model.export import WriteOptions, merge_adapter
from relook.model.load import model_hash
from relook.model.lora import LoraSettings
from relook.recipe import build_recipe
from relook.toyworld.build import make_processor
from relook.train.run import train

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LM = r".*language_model.*\.(q_proj|down_proj)"


@torch.no_grad()
def logits(model: Any) -> Tensor:
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    ids = torch.tensor([prompt(core, "Is there a cup?")])
    result: Tensor = model(input_ids=ids, pixel_values=pixels(1)).logits
    return result


def scrambled(model: Any, std: float = 0.1) -> Any:
    """Move all that trains, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += std * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@functools.cache
def read_plain(base: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(base)


def by_peft(base: Path, folder: Path, **settings: Any) -> Tensor:
    """Save an adapter of these settings, as peft trains it; the logits that peft itself has when it loads it again."""
    files, loaded = trained_by_peft(base, json.dumps(settings))
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return loaded


@functools.cache
def trained_by_peft(base: Path, settings: str) -> tuple[dict[str, bytes], Tensor]:
    """The adapter's files, and those logits."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LM, **json.loads(settings)})
    model = scrambled(get_peft_model(copy.deepcopy(read_plain(base)), config))
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(copy.deepcopy(read_plain(base)), folder).eval()
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    loaded = logits(again)
    torch.testing.assert_close(loaded, logits(model), **CLOSE)
    return files, loaded


UNDERSTOOD: dict[str, dict[str, Any]] = {
    "plain": {},
    "a float alpha": {"lora_alpha": 2.5},
    "names, which the vision tower has too": {"target_modules": ["q_proj", "v_proj"]},
    "a whole path": {"target_modules": ["model.language_model.layers.1.self_attn.q_proj", "down_proj"]},
    "all linear layers": {"target_modules": "all-linear"},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "excluded modules": {"target_modules": ["q_proj"], "exclude_modules": r".*vision_tower.*"},
    "excluded names": {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["layers.0.self_attn.k_proj"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "layers_pattern": "layers"},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 7}},
    "alphas": {"alpha_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 13}},
    "ranks, alphas and rslora": {
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"down_proj": 1},
        "use_rslora": True,
    },
    "a whole head": {"modules_to_save": ["lm_head"]},
    "whole embeddings": {"modules_to_save": ["embed_tokens"]},
    "a whole projector": {"modules_to_save": ["multi_modal_projector"]},
    "fan in, fan out": {"fan_in_fan_out": True},
    "biases beside LoRA": {"bias": "lora_only"},
    "all biases": {"bias": "all"},
    "a bias of LoRA": {"lora_bias": True, "target_modules": ["q_proj"]},
    "random": {"init_lora_weights": False},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "eva": {"init_lora_weights": "eva"},
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose head is its embeddings."""
    return save_tied(tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def without_adapter(biased: Path) -> Tensor:
    return logits(load_model(biased).model)


# The others differ from one of these in peft's initial values or in which modules are named.
FAST = {
    "plain",
    "a whole path",
    "all linear layers",
    "the head",
    "layers",
    "dora and rslora",
    "ranks, alphas and rslora",
    "a whole head",
    "whole embeddings",
    "a whole projector",
    "all biases",
    "a bias of LoRA",
    "fan in, fan out",
    "eva",
}


@pytest.mark.parametrize("kind", variants(UNDERSTOOD, FAST))
def test_an_adapter_gives_pefts_own_logits(kind: str, biased: Path, without_adapter: Tensor, tmp_path: Path) -> None:
    theirs = by_peft(biased, tmp_path / "adapter", **UNDERSTOOD[kind])
    assert (theirs - without_adapter).abs().max() > 1e-3
    torch.testing.assert_close(logits(load_model(biased, tmp_path / "adapter").model), theirs, **CLOSE)


COPIES = ["the head", "a whole head", "whole embeddings", "a whole projector"]


@pytest.mark.parametrize("kind", variants(COPIES, {"a whole head", "whole embeddings"}))
def test_a_tied_head_is_untied_where_peft_has_a_copy(kind: str, tied: Path, tmp_path: Path) -> None:
    theirs = by_peft(tied, tmp_path / "adapter", **UNDERSTOOD[kind])
    torch.testing.assert_close(logits(load_model(tied, tmp_path / "adapter").model), theirs, **CLOSE)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'.*path_initial_model"),
    "pissa in steps": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4'.*path_initial_model"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'.*path_initial_model"),
    "alora": (
        {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"},
        r"alora_invocation_tokens \[5, 6\]",
    ),
    "mica": ({"init_lora_weights": "mica"}, "init_lora_weights 'mica'"),
    "tokens": ({"trainable_token_indices": {"embed_tokens": [1, 2]}}, "trainable_token_indices"),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, "another kind of adapter"),
    "qalora": ({"use_qalora": True, "qalora_group_size": 8}, "use_qalora True"),
    "parameters": ({"target_parameters": ["up_proj.weight"]}, "target_parameters"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_of_another_kind_is_refused_by_name(kind: str, biased: Path, tmp_path: Path) -> None:
    settings, message = REFUSED[kind]
    config = LoraConfig(**{"r": 4, "target_modules": LM, **settings})
    get_peft_model(copy.deepcopy(read_plain(biased)), config).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match=message):
        load_model(biased, tmp_path / "a")


def changed(adapter: Path, to: Path, **settings: Any) -> Path:
    """A copy with other settings in its adapter_config.json; None removes a key."""
    shutil.copytree(adapter, to)
    values = read_json(to / "adapter_config.json") | settings
    write_json(to / "adapter_config.json", {key: value for key, value in values.items() if value is not None})
    return to


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain LoRA of rank 4 on two kinds of layers."""
    folder = tmp_path_factory.mktemp("adapters") / "plain"
    by_peft(base, folder, target_modules=r".*language_model.*\.(q_proj|down_proj)")
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 8}, r"q_proj has rank 4, not 8.*Copy both files"),
        ({"r": 10**9}, "has rank 4, not 1000000000"),
        ({"r": 0}, "r 0"),
        ({"r": True}, "r True"),
        ({"r": 4.0}, r"r 4\.0"),
        ({"r": None}, "no r"),
        ({"r": [4]}, r"r \[4\]"),
        ({"lora_alpha": float("inf")}, "lora_alpha inf"),
        ({"lora_alpha": float("nan")}, "lora_alpha nan"),
        ({"lora_alpha": 10**400}, "lora_alpha 1000"),
        ({"lora_alpha": 0}, "lora_alpha 0"),
        ({"lora_alpha": "8"}, "lora_alpha '8'"),
        ({"lora_alpha": None}, "no lora_alpha"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj has rank 4, not 2"),
        ({"rank_pattern": {"q_proj": "2"}}, "rank_pattern"),
        ({"alpha_pattern": {"(": 2}}, "alpha_pattern"),
        ({"alpha_pattern": [3]}, "alpha_pattern"),
        ({"use_dora": True}, "use_dora True, which the tensors of .* are not"),
        ({"lora_bias": True}, "lora_bias True, which the tensors of .* are not"),
        ({"use_rslora": "yes"}, "use_rslora 'yes'"),
        ({"bias": "some"}, "bias 'some'"),
        ({"peft_type": "IA3"}, "peft_type 'IA3'"),
        ({"peft_type": None}, "no peft_type"),
        ({"target_modules": None}, "no target_modules"),
        ({"modules_to_save": "lm_head"}, "modules_to_save 'lm_head'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"layer_replication": [[0, 1], [1, 2]]}, "layer_replication"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"a_key_of_tomorrow": 3}, "a_key_of_tomorrow 3"),
        ({"corda_config": {}, "kasa_config": {"k": 1}, "lora_alpha": -1}, "kasa_config.*lora_alpha -1"),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_settings_that_are_not_understood(
    settings: dict[str, Any], message: str, adapter: Path, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_model(base, changed(adapter, tmp_path / "a", **settings))


def test_a_key_of_a_later_peft_that_is_off_changes_nothing(adapter: Path, base: Path, tmp_path: Path) -> None:
    later = changed(adapter, tmp_path / "a", use_tomorrow=False, tomorrow_config={}, tomorrow=[])
    torch.testing.assert_close(logits(load_model(base, later).model), logits(load_model(base, adapter).model))


MODULES = [
    f"{stem}.{part}"
    for stem in ("model.layers.0", "model.language_model.layers.11", "vision_tower.encoder.layers.1", "h.2")
    for part in ("self_attn.q_proj", "mlp.down_proj", "q_proj")
] + ["lm_head", "q_proj", "model.mm_projector.0", "layers.3.experts.5.up_proj"]
TARGETS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["proj", "self_attn.q_proj"]},
    {"target_modules": ["model.layers.0.self_attn.q_proj"]},
    {"target_modules": r".*layers\.1.*q_proj"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 3], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layers_to_transform": [2, 11], "layers_pattern": ["h", "layers"]},
    {"target_modules": ["q_proj"], "exclude_modules": ["self_attn.q_proj"]},
    {"target_modules": ["q_proj", "0"], "exclude_modules": r".*vision.*"},
    {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["mlp", "lm_head"]},
]


@pytest.mark.parametrize("settings", TARGETS, ids=str)
def test_layers_that_have_lora_are_those_of_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    config = LoraConfig(r=2, **settings)
    config.save_pretrained(tmp_path)
    theirs = [module for module in MODULES if check_target_module_exists(config, module)]
    assert theirs
    assert [module for module in MODULES if LoraSettings(tmp_path).targets(module)] == theirs


# --- merge


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, torch.float32) for kind in ("dora", "the head", "whole embeddings", "all biases")),
        ("plain", torch.bfloat16),
        *(
            pytest.param(kind, torch.float32, marks=pytest.mark.slow)
            for kind in ("plain", "a whole head", "a whole projector")
        ),
        *(pytest.param(kind, torch.bfloat16, marks=pytest.mark.slow) for kind in ("dora", "a whole head")),
    ],
)
def test_merge_compares_with_peft(
    kind: str, dtype: torch.dtype, biased: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = biased
    if dtype != torch.float32:
        base = tmp_path / "base"
        LlavaForConditionalGeneration.from_pretrained(biased, dtype=dtype).save_pretrained(base)
        make_processor().save_pretrained(base)
    by_peft(base, tmp_path / "adapter", **UNDERSTOOD[kind])
    assert merge_adapter(base, tmp_path / "adapter", tmp_path / "out") == 0
    difference = re.search(r"from peft's own (\S+)\n", capsys.readouterr().err)
    assert difference
    assert float(difference[1]) < 1e-4


@pytest.mark.parametrize("names", variants(["peft's", "LLaVA's"], {"peft's"}))
def test_a_wrong_merge_is_not_written(
    names: str, adapter: Path, base: Path, tiny: Path, tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = names == "LLaVA's"
    source, lora = (tiny / "ckpt_safetensors", tiny / "lora_llava-tiny") if theirs else (base, adapter)
    how = WriteOptions(vision_tower=tower if theirs else None)
    assert merge_adapter(source, lora, tmp_path / "right", None, how) == 0
    scale = LoraSettings.scale
    monkeypatch.setattr(LoraSettings, "scale", lambda self, module: 1.1 * scale(self, module))
    with pytest.raises(CheckpointError, match="differ from those of peft's adapter by"):
        merge_adapter(source, lora, tmp_path / "wrong", None, how)
    assert not (tmp_path / "wrong").exists()


# --- adapters in part


def test_an_adapter_that_lacks_layers(adapter: Path, base: Path, tmp_path: Path) -> None:
    complete = load_file(adapter / "adapter_model.safetensors")

    def saved(name: str, tensors: dict[str, Tensor]) -> Path:
        folder = changed(adapter, tmp_path / name)
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    without = {name: tensor for name, tensor in complete.items() if ".layers.1." not in name}
    with pytest.raises(CheckpointError, match=r"lacks LoRA for 2 layers .*layers\.1\.(self_attn.q_proj|mlp.down_proj)"):
        load_model(base, saved("layer", without))
    without = {name: tensor for name, tensor in complete.items() if "q_proj" not in name}
    with pytest.raises(CheckpointError, match=r"lacks LoRA for 2 layers .*layers\.0\.self_attn.q_proj"):
        load_model(base, saved("kind", without))
    without = {name: tensor for name, tensor in complete.items() if "lora_B" not in name}
    with pytest.raises(CheckpointError, match="half of a LoRA pair"):
        load_model(base, saved("half", without))
    with pytest.raises(CheckpointError, match=r"holds no tensors\. "):
        load_model(base, saved("none", {}))
    gathered = {name: torch.empty(0) for name in complete}
    with pytest.raises(CheckpointError, match=r"8 of 8 tensors in .*adapter_model\.safetensors are empty.*ZeRO-3"):
        load_model(base, saved("empty", gathered))
    some = complete | {name: torch.empty(WIDTH, 0) for name in complete if "lora_B" in name}
    with pytest.raises(CheckpointError, match="4 of 8 tensors"):
        load_model(base, saved("some", some))
    head = {"base_model.model.lm_head.weight": torch.zeros(90, WIDTH)}
    with pytest.raises(CheckpointError, match="has no LoRA tensors"):
        load_model(base, saved("head", head))
    older = {name.replace("model.language_model.", "language_model.model."): t.clone() for name, t in complete.items()}
    with pytest.raises(CheckpointError, match=r"q_proj\.weight twice|down_proj\.weight twice"):
        load_model(base, saved("both", complete | older))


def test_bare_tensors_that_are_empty(base: Path, tiny: Path, tower: Path, tmp_path: Path) -> None:
    save_file({}, tmp_path / "head.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load_model(base, tmp_path / "head.safetensors")
    torch.save({"lm_head.weight": torch.empty(0)}, tmp_path / "non_lora_trainables.bin")
    with pytest.raises(CheckpointError, match=r"1 of 1 tensors in .* are empty"):
        load_model(base, tmp_path / "non_lora_trainables.bin")
    folder = copied(tiny / "ckpt_safetensors", tmp_path / "m")
    save_file(
        load_file(folder / "model.safetensors") | {"lm_head.weight": torch.empty(0)}, folder / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"1 of 25 tensors in .* are empty"):
        load_model(folder, vision_tower=tower)


def test_llavas_intermediate_checkpoint_says_that_it_has_no_projector(
    tiny: Path, tower: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = load_model(tiny / "ckpt_safetensors", tiny / "lora_llava-tiny", tower).model.state_dict()
    assert "projector" not in capsys.readouterr().err
    checkpoint = copied(tiny / "lora_llava-tiny", tmp_path / "checkpoint-3")
    (checkpoint / "non_lora_trainables.bin").unlink()
    tensors = load_model(tiny / "ckpt_safetensors", checkpoint, tower).model.state_dict()
    assert capsys.readouterr().err.count("has no non_lora_trainables.bin: no projector came along") == 1
    base = load_model(tiny / "ckpt_safetensors", vision_tower=tower).model.state_dict()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, (base if "projector" in name else merged)[name])


# --- names, and a base that is a language model alone

NAMES: dict[str, Callable[[str], str]] = {
    "4.36": lambda name: name.replace("model.language_model.", "language_model.model."),
    "4.52": lambda name: name.replace("model.vision_tower.", "model.vision_tower.vision_model."),
    "4.36 with the tower": lambda name: NAMES["4.36"](name).replace(
        "model.vision_tower.", "vision_tower.vision_model."
    ),
    "LLaVA": lambda name: name.replace("model.language_model.", "model.").replace(
        "model.vision_tower.", "model.vision_tower.vision_tower.vision_model."
    ),
    "peft's own": lambda name: re.sub(r"(lora_[AB])\.", r"\1.default.", name),
    "without a prefix": lambda name: name.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("names", variants(NAMES, {"4.52", "4.36 with the tower", "LLaVA", "peft's own"}))
def test_names_of_other_versions_of_transformers(names: str, base: Path, tmp_path: Path) -> None:
    theirs = by_peft(base, tmp_path / "a", target_modules=["q_proj", "up_proj", "fc1"])
    file = tmp_path / "a/adapter_model.safetensors"
    tensors = {NAMES[names](name): tensor for name, tensor in load_file(file).items()}
    assert len(tensors) == 20
    save_file(tensors, file)
    torch.testing.assert_close(logits(load_model(base, tmp_path / "a").model), theirs, **CLOSE)


@pytest.mark.parametrize("change", ["lora_llava-tiny", "projector"])
def test_a_change_to_a_bare_language_model(change: str, tiny: Path, tower: Path, tmp_path: Path) -> None:
    """As LLaVA's load_pretrained_model(model_path, model_base=vicuna) does: the adapter's config makes it LLaVA."""
    llava = load_file(tiny / "ckpt_safetensors/model.safetensors")
    vicuna = copied(tiny / "ckpt_safetensors", tmp_path / "vicuna", model_type="llama", mm_vision_tower=None)
    language = {name: tensor for name, tensor in llava.items() if "mm_projector" not in name}
    assert LlamaForCausalLM.from_pretrained(vicuna)
    save_file(language, vicuna / "model.safetensors")
    adapter = tiny / change
    if change == "projector":
        adapter = tmp_path / change
        adapter.mkdir()
        shutil.copyfile(tiny / "ckpt_safetensors/config.json", adapter / "config.json")
        torch.save({n: t for n, t in llava.items() if "mm_projector" in n}, adapter / "mm_projector.bin")
    tensors = load_model(vicuna, adapter, tower).model.state_dict()
    lora = None if change == "projector" else adapter
    expected = load_model(tiny / "ckpt_safetensors", lora, tower).model.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    with pytest.raises(CheckpointError, match=r"is a language model alone.*as adapter"):
        load_model(vicuna, vision_tower=tower)
    with pytest.raises(CheckpointError, match="is a language model alone"):
        load_model(vicuna, tiny / "head_fp32/non_lora_trainables.bin", tower)


# --- numbers that are none


@pytest.mark.parametrize(
    ("where", "number"),
    crossed(["base", "adapter", "head", "tower", "projector"], [float("nan"), float("inf"), float("-inf")]),
)
def test_weights_that_are_no_numbers(where: str, number: float, tiny: Path, tower: Path, tmp_path: Path) -> None:
    folder = copied(tiny / "ckpt_safetensors", tmp_path / "m")
    lora = copied(tiny / "lora_llava-tiny", tmp_path / "a")
    images = copied(tower, tmp_path / "tower")
    bare = tmp_path / "non_lora_trainables.bin"
    file, name, shown, change = {
        "base": (folder / "model.safetensors", "model.norm.weight", "language_model.norm", None),
        "adapter": (lora / "adapter_model.bin", "", "language_model.layers.0.self_attn.q_proj", lora),
        "head": (
            tmp_path / "non_lora_trainables.bin",
            "lm_head.weight",
            "lm_head",
            tmp_path / "non_lora_trainables.bin",
        ),
        "tower": (images / "pytorch_model.bin", "vision_model.pre_layrnorm.bias", "pre_layrnorm", None),
        "projector": (lora / bare.name, "base_model.model.model.mm_projector.0.bias", "linear_1", lora),
    }[where]
    if where == "head":
        shutil.copyfile(tiny / "head_fp32/non_lora_trainables.bin", file)
    tensors = {key: tensor.read().clone() for key, tensor in read_tensor_file(file).items()}
    tensors[name or next(iter(tensors))].view(-1)[5] = number
    (save_file if file.suffix == ".safetensors" else torch.save)(tensors, file)
    with pytest.raises(CheckpointError, match=rf"1 tensors of .* hold NaN or infinity: model\.\S*{shown}|lm_head"):
        load_model(folder, change, images)


# --- relook's own checkpoints

REGIMES: dict[str, dict[str, Any]] = {
    "head": {"tune_lm_head": True},
    "post decoder": {"tune_post_decoder": True, "post_decoder": {"depth": 2}},
    "lora": {"lora_enable": True, "lora_r": 3},
    "dora, projector and head": {
        "lora_enable": True,
        "lora_r": 3,
        "use_dora": True,
        "use_rslora": True,
        "tune_mm_mlp_adapter": True,
        "tune_lm_head": True,
    },
    "full": {},
}


@pytest.mark.usefixtures("no_trunk_cache")
@pytest.mark.parametrize("regime", variants(REGIMES, {"lora"}))
def test_a_checkpoint_of_a_run_is_loaded_as_the_run_is(
    regime: str, base: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **REGIMES[regime]}
    out = train(build_recipe(dpo_keys(base, world, tmp_path / "run", **keys)))
    first, last = (out / "checkpoints" / f"checkpoint-{step}" for step in (1, 2))
    run_tensors, tensors = load_model(out).model.state_dict(), load_model(last).model.state_dict()
    assert tensors.keys() == run_tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, run_tensors[name], rtol=0, atol=0)
    earlier = load_model(first).model.state_dict()
    assert any(not torch.equal(tensor, run_tensors[name]) for name, tensor in earlier.items())
    capsys.readouterr()
    merge_adapter(base, first, tmp_path / "merged")
    assert ("from peft's own" in capsys.readouterr().err) == ("lora_enable" in REGIMES[regime])
    merged = load_model(tmp_path / "merged").model.state_dict()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in earlier.items())
    assert parse_folder(first).template == "llava_hf"
    assert model_hash(first) != model_hash(last)


@pytest.mark.usefixtures("no_trunk_cache")
def test_a_checkpoint_of_a_second_stage_lies_on_the_first(base: Path, world: Path, tmp_path: Path) -> None:
    short = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    lora = {"lora_enable": True, "lora_r": 2}
    first = train(build_recipe(dpo_keys(base, world, tmp_path / "first", **short, **lora)))
    beneath = first / "checkpoints/checkpoint-1"
    second = train(build_recipe(dpo_keys(beneath, world, tmp_path / "second", **short, tune_post_decoder=True)))
    run_tensors = load_model(second).model.state_dict()
    tensors = load_model(second / "checkpoints/checkpoint-1").model.state_dict()
    assert tensors.keys() == run_tensors.keys()
    assert all(torch.equal(tensor, run_tensors[name]) for name, tensor in tensors.items())
