"""Configs, settings of generation, processors and files with values that no model has: refused by name, at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import WIDTH
from helpers.variants import crossed
from safetensors.torch import load_file, save_file
from test_checkpoints import copied
from transformers import LlamaConfig, PreTrainedConfig
from typer.testing import CliRunner

from relook import load_model
from relook.cli import app
from relook.errors import RelookError
from relook.files import read_json, sole_writer, write_json
from relook.generate.answering import GenerationSettings, answer_questions
from relook.model.lazy_model import open_folder


@pytest.fixture(scope="module", autouse=True)
def formatted_configs() -> Iterator[None]:
    """As outside the tests: transformers finds some wrong values only where it formats a config for its log."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedConfig, "__repr__", lambda config: config.to_json_string())
        yield


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    """A llava-hf folder to be changed."""
    return Path(shutil.copytree(base, tmp_path / "model"))


def put(file: Path, key: str, value: Any) -> None:
    """Set a key, with dots one of a part, in a JSON file."""
    content = read_json(file) if file.exists() else {}
    *parts, last = key.split(".")
    part = content
    for name in parts:
        part = part[name]
    part[last] = value
    write_json(file, content)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((f"{part}attn_implementation", "flash_attention_9") for part in ("", "text_config.", "vision_config.")),
        *((f"{part}_attn_implementation", 3) for part in ("", "text_config.", "vision_config.")),
        ("attn_implementation", {"text_config": "banana"}),
        ("output_hidden_states", "x"),
        ("return_dict", False),
        ("is_encoder_decoder", True),
    ],
)
def test_what_is_transformers_own_business_changes_nothing(key: str, value: Any, model: Path) -> None:
    put(model / "config.json", key, value)
    assert load_model(model).model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((f"text_config.{key}", value) for key in ("hidden_size", "intermediate_size") for value in (0, 2**40, -1)),
        *((f"text_config.{key}", value) for key in ("num_attention_heads", "vocab_size") for value in (0, 2**40)),
        *(("text_config.num_hidden_layers", value) for value in (0, 10**9, 3, "2", True)),
        *(("text_config.rms_norm_eps", value) for value in (float("nan"), float("inf"), 0, "x")),
        *(("text_config.eos_token_id", value) for value in (10**9, [2, -5], "x")),
        ("text_config.pad_token_id", 2**40),
        *(
            (f"vision_config.{key}", value)
            for key in ("image_size", "patch_size", "hidden_size")
            for value in (0, 2**40)
        ),
        *(
            (f"vision_config.{key}", value)
            for key in ("num_hidden_layers", "num_attention_heads")
            for value in (0, 10**9)
        ),
        ("vision_config.layer_norm_eps", float("nan")),
        *(("image_token_index", value) for value in (-1, 1, 2**40, "x")),
        *(("vision_feature_layer", value) for value in (10**9, "x", [], [0, 99])),
        ("vision_feature_select_strategy", "half"),
        ("projector_hidden_act", "banana"),
        *(("model_type", value) for value in ([], {}, 3)),
        *(("text_config.rope_parameters", value) for value in (3, [1], {"rope_theta": "x"}, {"rope_type": "banana"})),
        *(("text_config.rope_theta", value) for value in (-1, float("nan"))),
        *(("text_config", value) for value in (3, [], "x")),
        ("to_dict", 1),
        ("get_text_config", {"a": 1}),
        ("text_config.id2label", 5),
        ("dtype", ["float8"]),
        *(("vision_config", value) for value in (3, "x")),
    ],
    ids=str,
)
def test_a_config_of_numbers_that_no_model_has(key: str, value: Any, model: Path) -> None:
    if key == "text_config.rope_theta":
        put(model / "config.json", "text_config.rope_parameters", None)
    put(model / "config.json", key, value)
    with pytest.raises(RelookError):
        load_model(model)


@pytest.mark.parametrize("value", [0, 2**40, 10**9])
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_without_weights_too(key: str, value: int, model: Path) -> None:
    """As `relook estimate` opens a model."""
    put(model / "config.json", f"text_config.{key}", value)
    with pytest.raises(RelookError, match=rf"values that no model can have: text_config\.{key} {value}|not valid"):
        open_folder(model, weights=False)


@pytest.mark.parametrize(
    "settings",
    [{"depth": 10**9}, {"depth": 2.5}, {"mlp_size": 2**40}, {"num_heads": -1}, {"align_size": "x"}, {"depth": True}],
    ids=str,
)
def test_a_post_decoder_of_sizes_that_none_has(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    torch.save({"post_decoder.norm.weight": torch.ones(WIDTH)}, tmp_path / "non_lora_trainables.bin")
    write_json(tmp_path / "config.json", {"post_decoder": settings})
    with pytest.raises(RelookError, match=f"post_decoder.{next(iter(settings))} is"):
        load_model(base, tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_beams", 10**6),
        ("num_beams", "4"),
        ("stop_strings", ["a"]),
        ("stop_strings", 3),
        ("num_return_sequences", 4),
        ("temperature", "hot"),
        ("top_p", float("nan")),
        ("eos_token_id", 10**9),
        ("suppress_tokens", [10**9]),
        ("suppress_tokens", 3),
        ("return_dict_in_generate", True),
        ("watermarking_config", {"bias": 2.0}),
        ("max_time", 0.1),
        ("assistant_early_exit", 4),
        ("repetition_penalty", 0.0),
        ("num_beams", []),
        ("pad_token_id", [1, 2]),
        ("suppress_tokens", {}),
        ("tomorrow", 3),
    ],
)
def test_settings_of_generation_that_are_not_followed(key: str, value: Any, model: Path) -> None:
    put(model / "generation_config.json", key, value)
    with pytest.raises(RelookError, match=rf"generation_config\.json .*{key}"):
        load_model(model)


def test_settings_of_generation_that_are_followed(model: Path, world: Path) -> None:
    settings = {"num_beams": 2, "repetition_penalty": 1.5, "top_k": None, "no_repeat_ngram_size": 2, "penalty_alpha": 0}
    for key, value in settings.items():
        put(model / "generation_config.json", key, value)
    loaded = load_model(model)
    assert loaded.model.generation_config.num_beams == 2
    [picture, *_] = sorted((world / "vg/VG_100K").iterdir())
    [(_, text)] = answer_questions(
        loaded, [(picture, "<image>\nWhat is this?")], GenerationSettings(max_new_tokens=3), lambda *_: None
    )
    assert text == loaded.generate([picture], "<image>\nWhat is this?", max_new_tokens=3)


WRONG = [
    *(("size", value) for value in ("x", 0, {"shortest_edge": 2**40}, {"height": 8}, {"shortest_edge": -3})),
    *(("crop_size", value) for value in ("x", {"height": 8, "width": 8}, {"height": 96, "width": 0}, 2**40)),
    *(("image_mean", value) for value in ("x", [0.5], [float("nan")] * 3)),
    *(("image_std", value) for value in ([0, 0, 0], "x", [1, 1])),
    *(("rescale_factor", value) for value in ("x", float("inf"))),
    ("resample", 77),
]
# Of each setting a value of another type, and the numbers for which relook has a check of its own.
FAST = [pair for pair in WRONG if pair[1] in ("x", 77, 2**40, {"shortest_edge": 2**40}, [0, 0, 0], float("inf"))]


@pytest.mark.parametrize(
    ("key", "value"),
    [pytest.param(*pair, marks=() if pair in FAST else pytest.mark.slow) for pair in WRONG],
    ids=str,
)
def test_a_processor_of_wrong_values(
    key: str, value: Any, model: Path, tiny: Path, tower: Path, tmp_path: Path
) -> None:
    put(model / "processor_config.json", f"image_processor.{key}", value)
    with pytest.raises(RelookError, match="processor of"):
        load_model(model)
    images = copied(tower, tmp_path / "tower")
    put(images / "preprocessor_config.json", key, value)
    with pytest.raises(RelookError, match="processor of"):
        load_model(tiny / "ckpt_safetensors", vision_tower=images)


def test_a_processor_of_an_unknown_class(model: Path) -> None:
    put(model / "processor_config.json", "processor_class", "x")
    with pytest.raises(RelookError, match=r"processor of .* without pictures or without text"):
        load_model(model)


@pytest.mark.parametrize("content", ["{}", "[]", '{"model": 3}', '{"version": "1.0", "model": {"type": "BPE"}}'])
def test_a_tokenizer_that_is_none(content: str, model: Path) -> None:
    (model / "tokenizer.json").write_text(content)
    with pytest.raises(RelookError, match="processor of"):
        load_model(model)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "generation_config.json", "processor_config.json", "model.safetensors"]
)
def test_a_pipe_in_a_files_place_is_refused(name: str, model: Path) -> None:
    """Nobody writes to it: opening it never ends."""
    (model / name).unlink()
    os.mkfifo(model / name)
    with pytest.raises(RelookError, match=rf"{name} is a pipe"):
        load_model(model)


def test_a_pipe_beside_a_tower_an_adapter_or_data(model: Path, tiny: Path, tower: Path, tmp_path: Path) -> None:
    images, adapter = copied(tower, tmp_path / "tower"), copied(tiny / "lora_llava-tiny", tmp_path / "a")
    for file in (images / "preprocessor_config.json", adapter / "adapter_model.bin"):
        file.unlink()
        os.mkfifo(file)
    os.mkfifo(tmp_path / "pipe")
    for change, folder in ((None, images), (adapter, tower), (tmp_path / "pipe", tower)):
        with pytest.raises(RelookError, match="is a pipe"):
            load_model(tiny / "ckpt_safetensors", change, folder)
    done = CliRunner().invoke(app, ["score", "pope", "--answers", str(tmp_path / "pipe"), "--questions", __file__])
    assert "is a pipe" in str(done.exception)


# --- rotary embeddings

ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "transformers 4": ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
    "transformers 5": ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_theta": 5e5}),
    "both": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_theta": 5e5},
    ),
    "scaled": (
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0},
    ),
    "scaled by transformers 4.43": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
        {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 4.0},
    ),
    "scaled by transformers 5": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0},
    ),
    "theta of one and scale of the other": (
        {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0},
    ),
    "nothing": ({}, {"rope_theta": 1e4, "rope_type": "default"}),
    "null": (dict.fromkeys(("rope_theta", "rope_scaling", "rope_parameters")), {"rope_theta": 1e4}),
}


@pytest.mark.parametrize(("rope", "kind"), crossed([*ROPES], ["llava", "hf"]))
@torch.no_grad()
def test_rotary_embeddings_in_every_versions_words(
    kind: str, rope: str, tiny: Path, tower: Path, model: Path, tmp_path: Path
) -> None:
    stated, expected = ROPES[rope]
    none: dict[str, Any] = dict.fromkeys(("rope_theta", "rope_scaling", "rope_parameters"))
    if kind == "llava":
        folder = copied(tiny / "ckpt_safetensors", tmp_path / "m", **none)
        write_json(folder / "config.json", read_json(folder / "config.json") | stated)
        loaded = load_model(folder, vision_tower=tower)
    else:
        config = read_json(model / "config.json")
        text = {key: value for key, value in config["text_config"].items() if key not in none}
        write_json(model / "config.json", config | {"text_config": text | stated})
        loaded = load_model(model)
    text_config = loaded.model.config.text_config
    assert expected.items() <= text_config.rope_parameters.items()
    plain = LlamaConfig(**text_config.to_dict() | {"rope_parameters": {"rope_type": "default", **expected}})
    theirs = type(loaded.model.model.language_model.rotary_emb)(plain)
    torch.testing.assert_close(loaded.model.model.language_model.rotary_emb.inv_freq, theirs.inv_freq)


# --- numbers that are none


@pytest.mark.parametrize("generate", [(), (("num_beams", 2),)])
def test_answers_of_a_model_that_computes_no_numbers(generate: Any, base: Path, world: Path) -> None:
    """Weights are numbers, states are not, as where float16 overflows."""
    loaded = load_model(base)
    with torch.no_grad():
        loaded.model.model.language_model.layers[1].mlp.down_proj.weight.fill_(3e38)
    [picture, *_] = sorted((world / "vg/VG_100K").iterdir())
    asking = GenerationSettings(max_new_tokens=3, generate=generate)
    with pytest.raises(RelookError, match=r"logits are NaN or infinite.*float16"):
        list(answer_questions(loaded, [(picture, "<image>\nWhat is this?")], asking, lambda *_: None))


def test_eval_of_weights_that_are_no_numbers_gives_no_score(model: Path, world: Path, tmp_path: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][3, 3] = float("nan")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    arguments = ["eval", "pope", "--model", model, "--data", world / "test", "--out", tmp_path / "out"]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "1 tensors of" in str(done.exception)
    assert "hold NaN or infinity" in str(done.exception)
    assert not list((tmp_path / "out").glob("pope*"))


# --- one folder, two writers

HOLDS = """
import sys
from pathlib import Path
from relook.files import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("has it", flush=True)
    sys.stdin.read()
"""


def test_a_folder_has_one_writer(base: Path, world: Path, tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdin
    assert other.stdout
    assert other.stdout.readline() == b"has it\n"
    arguments = ["eval", "pope", "--model", base, "--data", world / "test", "--out", tmp_path / "out"]
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert "out is in use: another relook is writing there" in str(done.exception)
    with pytest.raises(RelookError, match="in use"), sole_writer(tmp_path / "out"):
        pass
    other.kill()
    other.wait()
    with sole_writer(tmp_path / "out"):  # a lock ends with its process
        (tmp_path / "out/file").touch()
    with sole_writer(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
