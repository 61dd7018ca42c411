"""`relook inspect`: counts against numel, shapes against the config, and the tensors against a forward pass."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Command
from helpers.tiny import WIDTH, dpo_keys
from PIL import Image
from test_llava_next import GRID, next_processor, tiny_next

from relook import load_model, toyworld
from relook.model.inspect import TracedTensor, inspect_model
from relook.model.load import add_post_decoder
from relook.recipe import build_recipe
from relook.train.run import train

PATCHES, LAYERS, WORDS = 36, 2, 107


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "a.png"
    Image.new("RGB", (90, 150), (200, 90, 30)).save(path)
    return path


def numel(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def named(inspected: dict[str, Any]) -> dict[tuple[int, str], dict[str, Any]]:
    return {(module["depth"], module["name"]): module for module in inspected["modules"]}


def tensors(inspected: dict[str, Any], step: str) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in inspected["tensors"] if row["step"] == step}


def test_the_tree_counts_every_parameter_once(base: Path) -> None:
    inspected, model = inspect_model(base), load_model(base).model
    modules = named(inspected)
    assert "tensors" not in inspected
    assert modules[0, "model"]["parameters"] == numel(model.model)
    assert modules[0, "lm_head"]["shapes"] == {"weight": (WORDS, WIDTH)}
    layers = modules[3, "0 to 1"]
    assert (layers["kind"], layers["repeats"]) == ("LlamaDecoderLayer", LAYERS)
    assert layers["parameters"] == numel(model.model.language_model.layers)
    assert modules[5, "q_proj"]["shapes"]["weight"] == (WIDTH, WIDTH)  # of one layer
    assert modules[5, "q_proj"]["parameters"] == WIDTH * WIDTH
    assert modules[5, "q_proj"]["dtypes"] == ("float32",)
    assert sum(m["parameters"] for m in inspected["modules"] if m["depth"] == 0) == numel(model)


def test_dtypes_are_those_on_disk(base: Path, tmp_path: Path) -> None:
    loaded = load_model(base, dtype="bfloat16")
    loaded.model.save_pretrained(tmp_path)
    loaded.processor.save_pretrained(tmp_path)
    assert {dtype for m in inspect_model(tmp_path)["modules"] for dtype in m["dtypes"]} == {"bfloat16"}


def test_what_trains_by_hand(base: Path) -> None:
    model: Any = load_model(base).model
    language = model.model.language_model
    head, projector, text = numel(model.lm_head), numel(model.model.multi_modal_projector), numel(language)
    decoder = numel(add_post_decoder(load_model(base).model, {}, None).model.post_decoder)  # type: ignore[attr-defined]
    linears = [m for m in language.layers.modules() if isinstance(m, torch.nn.Linear)]
    lora = sum(128 * (linear.in_features + linear.out_features) for linear in linears)
    total = numel(model)
    trained = {name: (row["trains"], row["of"]) for name, row in inspect_model(base)["trains"].items()}
    assert trained == {
        "head": (head, total),
        "post_decoder": (decoder, total + decoder),
        "post_decoder_head": (decoder + head, total + decoder),
        "lora": (lora, total + lora),
        "projector": (projector, total),
        "full": (head + projector + text, total),
    }


@pytest.fixture(scope="module")
def run(base: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    return train(build_recipe(dpo_keys(base, world, out, tune_post_decoder=True, max_steps=2)))


def test_tensors_of_a_run_are_those_of_a_forward_pass(run: Path, base: Path, image: Path) -> None:
    inspected = inspect_model(run, image, "Is there a cup?")
    assert inspected["type"] == "RelookLlavaForConditionalGeneration"
    loaded = load_model(run)
    inputs = loaded.encode([image], "Is there a cup?")
    length = inputs["input_ids"].shape[1]
    prefill, decode = tensors(inspected, "prefill"), tensors(inspected, "decode")
    shapes = {name: tuple(row["shape"]) for name, row in prefill.items()}
    layers = {f"hidden states, layer {i}": (1, length, WIDTH) for i in range(1, LAYERS + 1)}
    assert shapes == {
        "pixel_values": (1, 3, 96, 96),
        "image features": (1, PATCHES, WIDTH),
        "projected features": (1, PATCHES, WIDTH),
        "merged embeddings": (1, length, WIDTH),
        **layers,
        "hidden states, normed": (1, length, WIDTH),
        "post decoder, image side": (1, PATCHES, WIDTH),
        "post decoder, in": (1, length, WIDTH),
        "post decoder, out": (1, length, WIDTH),
        "logits": (1, 1, WORDS),
    }
    # A decode step has no image: it goes through the language model and the post decoder only.
    absent = {"pixel_values", "image features", "projected features", "post decoder, image side"}
    assert decode.keys() == prefill.keys() - absent
    assert {tuple(row["shape"][:2]) for row in decode.values()} == {(1, 1)}
    with torch.no_grad():
        logits = loaded.model(**inputs).logits[0, -1]
        trunk = load_model(base).model.model(**inputs).last_hidden_state
    for row, tensor in ((prefill["logits"], logits), (prefill["post decoder, in"], trunk)):
        assert row["mean"] == pytest.approx(tensor.mean().item(), abs=1e-5)
        assert row["std"] == pytest.approx(tensor.std(correction=0).item(), abs=1e-5)
        assert (row["min"], row["max"]) == pytest.approx((tensor.min().item(), tensor.max().item()), abs=1e-5)
        assert (row["nan"], row["inf"], row["dtype"]) == (0, 0, "float32")
    assert prefill["post decoder, in"]["mean"] != prefill["post decoder, out"]["mean"]


def test_not_a_number_is_counted() -> None:
    row = TracedTensor.of("prefill", "x", torch.tensor([[1.0, float("nan"), 3.0, float("inf")]]))
    assert (row.mean, row.std, row.min, row.max, row.nan, row.inf) == (2.0, 1.0, 1.0, 3.0, 1, 1)
    row = TracedTensor.of("prefill", "x", torch.full((3,), torch.nan))
    assert (row.mean, row.max, row.nan) == (None, None, 3)


def test_llava_next(image: Path, tmp_path: Path) -> None:
    model = tiny_next()
    model.save_pretrained(tmp_path)
    next_processor().save_pretrained(tmp_path)
    inspected = inspect_model(tmp_path, image, None)
    assert named(inspected)[0, "model"]["shapes"] == {"image_newline": (WIDTH,)}
    assert inspected["trains"]["head"]["trains"] == WORDS * WIDTH
    assert inspected["trains"]["head"]["of"] == numel(model) + WORDS * WIDTH  # a tied head becomes one of its own
    tiles = 1 + 2  # the whole picture, and the grid's [192, 96] for one that is upright
    assert [192, 96] in GRID
    assert tensors(inspected, "prefill")["projected features"]["shape"] == (tiles, PATCHES, WIDTH)


def test_a_liuhaotian_folder_and_a_change_on_it(refdata: Path) -> None:
    tiny = refdata / "llava_tiny"
    tower = tiny / "vision_towers/openai/clip-vit-tiny-patch14-56"
    picture = tiny / "inputs/image_A.png"
    inspected = inspect_model(tiny / "ckpt_bin_sharded", picture, "What is this?", tiny / "head_fp32", tower)
    assert inspected["type"] == "LlavaForConditionalGeneration"
    assert tensors(inspected, "prefill")["image features"]["shape"][1] == 16
    assert named(inspected)[0, "lm_head"]["parameters"] == 1024 * 64
    plain = inspect_model(tiny / "ckpt_bin_sharded", picture, "What is this?", None, tower)
    logits = [tensors(each, "prefill")["logits"]["mean"] for each in (inspected, plain)]
    assert logits[0] != logits[1]


def test_the_command(relook: Command, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Path(toyworld.__file__).parent / "base"
    inspected = json.loads(relook("inspect", base, "--prompt", "Is there a cup?").out)  # of a pipe
    assert inspected.keys() == {"model", "type", "modules", "trains", "tensors"}
    assert not any("projected" in row["name"] for row in inspected["tensors"])  # no image
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    ended = relook("inspect", base, "--image", image, "--prompt", "Is there a cup?")
    assert ended.status == 0, ended.err
    for text in ("CLIPEncoderLayer", "post_decoder_head", "merged embeddings", "decode"):
        assert text in ended.out
    assert "nowhere does not exist" in relook("inspect", "nowhere").err
