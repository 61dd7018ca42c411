"""`relook export --for`: what vLLM, SGLang and `transformers serve` read of a folder.

The first two cannot run here. Their ways from a file's tensors to their modules are restated below, from
vllm/model_executor/models/llava.py and llava_next.py (vLLM at 35d3c24) and python/sglang/srt/models/llava.py (SGLang);
what the modules hold is asked of transformers.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
import tomllib
from contextlib import closing
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from helpers.reference import IMAGE_ID, ids_around_images, reference_tokenizer
from helpers.serving import PICTURES, png, until, with_picture
from helpers.serving import user as asks
from helpers.variants import crossed
from safetensors.torch import load_file, save_file
from test_convert import decoder_run
from test_llava_next import next_processor, tiny_next
from test_serve_processes import healthy
from tokenizers import AddedToken
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaProcessor,
    MistralConfig,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from typer.testing import CliRunner

from relook import load_model
from relook.cli import app
from relook.data.encode import Encoder
from relook.data.templates import get_template
from relook.errors import RelookError
from relook.files import read_json, write_json
from relook.model import modeling_relook
from relook.model.adapters import TENSORS_FILE
from relook.model.checkpoint import ADAPTER_FILE
from relook.model.export import WRITERS, WriteOptions, chat_template, export_for, export_model, unsupported_by
from relook.model.load import add_post_decoder
from relook.serve.chat import read_turns
from relook.serve.protocol import Message
from relook.toyworld.build import shipped_base
from relook.toyworld.world import draw_scene, sample_scenes

FAST, CHECKED = WriteOptions(check=False), WriteOptions()
VLLM = {  # a name's prefix, the first that it has
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.image_newline": "image_newline",
    "lm_head.": "language_model.lm_head.",
}
SGLANG = {  # anywhere in a name; names without "projector" go to the language model as they are
    "model.mm_projector.0": "linear_1",
    "model.mm_projector.2": "linear_2",
}


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that trained LoRA, head and projector."""
    out, generator = tmp_path_factory.mktemp("run"), torch.Generator().manual_seed(3)
    held = load_model(base).model.state_dict()
    names = ("lm_head.weight", *(n for n in held if n.startswith("model.multi_modal_projector.")))
    save_file({n: held[n] + 0.1 * torch.randn(held[n].shape, generator=generator) for n in names}, out / TENSORS_FILE)
    query = "model.language_model.layers.1.self_attn.q_proj"
    halves = {"A": (2, held[f"{query}.weight"].shape[1]), "B": (held[f"{query}.weight"].shape[0], 2)}
    lora = {
        f"base_model.model.{query}.lora_{half}.weight": torch.randn(shape, generator=generator)
        for half, shape in halves.items()
    }
    save_file(lora, out / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [query]}
    write_json(out / "adapter_config.json", settings)
    write_json(out / ADAPTER_FILE, {"base": str(base), "post_decoder": None, "lora": True})
    return out


@pytest.fixture(scope="module")
def plain(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as a folder of transformers' format."""
    out = tmp_path_factory.mktemp("plain") / "out"
    export_model(base, out, FAST)
    return out


def told(plain: Path, out: Path, **settings: Any) -> Path:
    """A copy whose configuration says something else."""
    shutil.copytree(plain, out)
    write_json(out / "config.json", {**read_json(out / "config.json"), **settings})
    return out


def inputs(model: Any) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[1, *[model.config.image_token_id] * 36, 20, 21, 22]])
    side = model.config.vision_config.image_size
    return {"input_ids": ids, "pixel_values": torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side)}


@pytest.mark.parametrize("engine", ["vllm", "transformers-serve"])
def test_plain_transformers_gives_the_runs_logits(engine: str, run: Path, base: Path, tmp_path: Path) -> None:
    assert export_for(run, tmp_path / "out", engine, CHECKED) == 0
    with torch.no_grad():
        ours, theirs, before = (
            model(**inputs(model)).logits
            for model in (
                load_model(run).model,
                AutoModelForImageTextToText.from_pretrained(tmp_path / "out"),
                load_model(base).model,
            )
        )
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)
    assert (before - ours).abs().max() > 0.1
    config = read_json(tmp_path / "out/config.json")
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert "auto_map" not in config
    assert not list((tmp_path / "out").glob("*.py"))


def modules(config: Any) -> set[str]:
    """The parameters of vLLM's modules, before it packs some."""
    language = LlamaForCausalLM(config.text_config).state_dict()
    tower = CLIPVisionModel(config.vision_config).state_dict()
    projector = LlavaMultiModalProjector(config).state_dict()
    return {
        *(f"language_model.{name}" for name in language),
        *(f"vision_tower.vision_model.{name}" for name in tower),
        *(f"multi_modal_projector.{name}" for name in projector),
    }


def as_vllm_reads(name: str) -> str:
    return next((new + name.removeprefix(old) for old, new in VLLM.items() if name.startswith(old)), name)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_vllm_has_a_place_for_every_tensor(family: str, run: Path, tmp_path: Path) -> None:
    source, newline = run, set[str]()
    if family == "llava_next":
        source, newline = tmp_path / "next", {"image_newline"}
        tiny_next().save_pretrained(source)
        next_processor().save_pretrained(source)
    assert export_for(source, tmp_path / "out", "vllm", CHECKED) == 0
    names = {as_vllm_reads(name) for name in load_file(tmp_path / "out/model.safetensors")}
    config = AutoConfig.from_pretrained(tmp_path / "out")
    tied = {"language_model.lm_head.weight"} if config.tie_word_embeddings else set()
    assert names | tied == modules(config) | newline
    raw = read_json(tmp_path / "out/config.json")
    assert raw["architectures"] == [f"{'LlavaNext' if newline else 'Llava'}ForConditionalGeneration"]
    assert raw["text_config"]["architectures"] == ["LlamaForCausalLM"]
    assert raw["text_config"]["tie_word_embeddings"] == bool(tied)


def test_transformers_4_finds_what_it_reads(base: Path, tmp_path: Path) -> None:
    """vLLM runs on it (requirements/common.txt at 0073e44: >= 4.56, < 5), and it knows none of version 5's names."""
    export_for(base, tmp_path / "out", "vllm", FAST)
    out = tmp_path / "out"
    assert read_json(out / "config.json")["text_config"]["rope_theta"] == 1e6
    assert "image_processor" not in read_json(out / "processor_config.json")
    images = read_json(out / "preprocessor_config.json")
    assert (images["image_processor_type"], images["processor_class"]) == ("CLIPImageProcessor", "LlavaProcessor")
    tokenizer = read_json(out / "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["additional_special_tokens"] == ["<image>"]
    assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]


def test_sglangs_parts_give_the_runs_logits(run: Path, tmp_path: Path) -> None:
    """Put together as SGLang does, from a folder that it would start in."""
    out = tmp_path / "out"
    assert export_for(run, out, "sglang", CHECKED) == 0
    config: Any = AutoConfig.from_pretrained(out)  # transformers' own class, or SGLang could not read it
    assert (type(config), config.architectures) == (LlavaConfig, ["LlavaLlamaForCausalLM"])
    assert "clip" in config.mm_vision_tower
    assert config.mm_vision_select_feature == "patch"
    tower = CLIPVisionModel.from_pretrained(out / config.mm_vision_tower)
    config.vision_config.hidden_size, config.text_config.hidden_size = config.mm_hidden_size, config.hidden_size
    projector = LlavaMultiModalProjector(config)
    settings = {key: value for key, value in read_json(out / "config.json").items() if key != "model_type"}
    language = LlamaForCausalLM(LlamaConfig(**settings))
    mine: dict[str, torch.Tensor] = {}
    rest: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(out / "model.safetensors").items():
        for old, new in SGLANG.items():
            name = name.replace(old, new)
        (mine if name.startswith("linear_") else rest)[name] = tensor
    projector.load_state_dict(mine)
    language.load_state_dict(rest)
    model = load_model(run).model
    given = inputs(model)
    assert config.image_token_index == model.config.image_token_id
    with torch.no_grad():
        states = tower(given["pixel_values"], output_hidden_states=True).hidden_states
        embeds = language.get_input_embeddings()(given["input_ids"])
        embeds[:, 1:37] = projector(states[config.mm_vision_select_layer][:, 1:])
        torch.testing.assert_close(language(inputs_embeds=embeds).logits, model(**given).logits, atol=1e-5, rtol=0)
    assert AutoProcessor.from_pretrained(out).tokenizer.convert_tokens_to_ids("<image>") == config.image_token_index


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "a picture": [{"role": "user", "content": with_picture("Is there a cup?", PICTURES[0])}],
    "turns": [
        {"role": "system", "content": "Everything is in place."},
        {"role": "user", "content": with_picture("Is there a dog?", *PICTURES[:2])},
        {"role": "assistant", "content": "There is a cup."},
        {"role": "user", "content": "Is there a boat?"},
    ],
    "texts": [{"role": "user", "content": "Is there a cup?"}, {"role": "user", "content": "It looks quite calm."}],
    "greeting": [
        {"role": "assistant", "content": "It looks quite calm."},
        {"role": "user", "content": "Is there a cup?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "assistant", "content": "There is a cup."},
        {"role": "user", "content": "Is there a boat?"},
    ],
}


@pytest.mark.parametrize(
    ("name", "engine"), crossed(["v1", "llava_hf", "mistral", "llama_2", "v0"], ["vllm", "sglang"])
)
def test_prompts_are_those_of_relook_serve(
    name: str, engine: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    export_for(told(plain, tmp_path / "source", conversation_template=name), out, engine, FAST)
    assert ("no token: requests must send it" in capsys.readouterr().err.replace("\n", " ")) == (name == "v0")
    processor = AutoProcessor.from_pretrained(out)
    encoder = Encoder(processor.tokenizer, get_template(name), read_json(out / "config.json")["image_token_index"], 1)
    for messages in CONVERSATIONS.values():
        turns, urls = read_turns([Message.model_validate(message) for message in messages])
        expected = encoder.prompt(turns[-1].prompt, len(urls), turns[:-1])
        as_engines_say = json.loads(json.dumps(messages).replace('"image_url", "image_url"', '"image", "image_url"'))
        text = processor.apply_chat_template(as_engines_say, add_generation_prompt=True)
        assert tuple(processor.tokenizer(text, add_special_tokens=False)["input_ids"]) == expected
        ids = processor.tokenizer.apply_chat_template(as_engines_say, add_generation_prompt=True)["input_ids"]
        assert tuple(ids) == expected


def llama_prompt(refdata: Path, variant: str, **mark: bool) -> tuple[list[int], list[int]]:
    """The ids of a v1 conversation: by the chat template for a tokenizer of the reference data, and the original's."""
    tokenizer = copy.deepcopy(reference_tokenizer(refdata, variant))
    tokenizer.add_tokens([AddedToken("<image>", special=True, **mark)])
    image = tokenizer.convert_tokens_to_ids("<image>")
    processor = LlavaProcessor(CLIPImageProcessorPil(), tokenizer)
    source: Any = SimpleNamespace(template="v1", config=SimpleNamespace(image_token_id=image), path="MODEL")
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is there a dog?"}]},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "And a cat?"},
    ]
    jinja = chat_template(source, processor)
    text = processor.apply_chat_template(messages, chat_template=jinja, add_generation_prompt=True)
    original = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nIs there a dog? ASSISTANT: No.</s>"
        "USER: And a cat? ASSISTANT:"
    )
    ids = ids_around_images(reference_tokenizer(refdata, variant), original)
    return tokenizer(text, add_special_tokens=False)["input_ids"], [image if id == IMAGE_ID else id for id in ids]


@pytest.mark.parametrize("legacy", ["legacy_false", "legacy_true"])
@pytest.mark.parametrize("vocabulary", ["llama_cut_1024", "llama_full_32000"])
def test_chat_templates_give_llamas_tokenizers_the_originals_ids(vocabulary: str, legacy: str, refdata: Path) -> None:
    by_template, original = llama_prompt(refdata, f"{vocabulary}/{legacy}")
    assert by_template == original


def test_where_no_chat_template_fits_the_first_difference_is_named(refdata: Path) -> None:
    # The token swallows the line break behind it.
    with pytest.raises(RelookError, match=r"from token \d+ on, the closest one gives .* instead of '▁ <0x0A> "):
        llama_prompt(refdata, "llama_full_32000/legacy_true", rstrip=True)


def test_a_token_that_ends_answers_is_in_the_settings_of_generation(plain: Path, tmp_path: Path) -> None:
    source = told(plain, tmp_path / "source", conversation_template="chatml")
    tokens = read_json(source / "tokenizer.json")
    mark = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    last = max(tokens["model"]["vocab"].values())
    tokens["added_tokens"].append({"id": last, "content": "<|im_end|>", **mark, "special": True})
    tokens["model"]["vocab"] = {word: id for word, id in tokens["model"]["vocab"].items() if id != last}
    write_json(source / "tokenizer.json", tokens)
    export_for(source, tmp_path / "out", "vllm", FAST)
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [2, last]


def test_a_post_decoder_is_refused_with_the_reason(base: Path, tmp_path: Path) -> None:
    pd = decoder_run(base, tmp_path / "pd")
    for engine in WRITERS:
        done = CliRunner().invoke(app, ["export", str(pd), str(tmp_path / "out"), "--for", engine])
        assert isinstance(done.exception, RelookError), engine
        reason = "that have seen the whole image" if engine == "vllm" else "only its family's own layers"
        assert reason in str(done.exception)
        assert str(done.exception).startswith(f"{pd} cannot run")  # not its base
        assert "relook serve" in done.exception.fix
        assert not (tmp_path / "out").exists()


def test_vllms_plugin_runs_a_post_decoder_over_one_placeholder_for_each_feature() -> None:
    def reason(prefix: str = "Llava", config: dict[str, Any] | None = None, **settings: Any) -> str:
        config_class = getattr(modeling_relook, f"Relook{prefix}Config")
        return unsupported_by("vllm", config_class(post_decoder=settings, **(config or {})))

    for settings in ({"depth": 3}, {"attention": "none", "depth": 2}, {"attention": "self_cross"}, {"num_heads": 2}):
        assert reason(**settings) == ""
    assert "no position sees what follows it" in reason(attention="self_cross", depth=2)
    assert "LLaVA-1.5 alone" in reason("LlavaNext")
    assert "LLaVA-1.5 alone" in reason("Qwen2_5_VL")
    assert "one layer" in reason(config={"vision_feature_layer": [-2, -1]})
    assert "sliding window" in reason(config={"text_config": MistralConfig(sliding_window=4)})


def test_a_post_decoders_folder_needs_relooks_plugin_and_no_code(base: Path, tmp_path: Path) -> None:
    pd = tmp_path / "pd"
    add_post_decoder(load_model(base).model, {"depth": 2}, torch.Generator().manual_seed(5)).save_pretrained(pd)
    load_model(base).processor.save_pretrained(pd)
    done = CliRunner().invoke(app, ["export", str(pd), str(tmp_path / "out"), "--for", "vllm"])
    assert done.exit_code == 0, done.output
    assert "--dtype float32" in done.stderr.splitlines()[-1]
    config = read_json(tmp_path / "out" / "config.json")
    assert config["architectures"] == ["RelookLlavaForConditionalGeneration"]
    assert "auto_map" not in config
    assert not list((tmp_path / "out").glob("*.py"))
    entry = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, function = entry["vllm.general_plugins"]["relook"].partition(":")
    assert callable(getattr(import_module(module), function))  # without vLLM: it is imported when called


def test_what_an_engine_cannot_run_is_refused(plain: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(RelookError, match="Known ones: vllm, sglang, transformers-serve"):
        export_for(base, tmp_path / "out", "tgi", FAST)
    tiny_next().save_pretrained(tmp_path / "next")
    next_processor().save_pretrained(tmp_path / "next")
    with pytest.raises(RelookError, match=r"is llava_next over llama\. Use --for vllm"):
        export_for(tmp_path / "next", tmp_path / "out", "sglang", FAST)
    with pytest.raises(RelookError, match="projector has a gelu"):
        export_for(told(plain, tmp_path / "odd", projector_hidden_act="linear"), tmp_path / "out", "sglang", FAST)
    quantised = told(plain, tmp_path / "quantised", quantization_config={"load_in_4bit": True})
    with pytest.raises(RelookError, match="quantised already"):
        export_for(quantised, tmp_path / "out", "vllm", FAST)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_transformers_serve_says_what_relook_says(tmp_path: Path) -> None:
    """The command itself, in a process of its own, asked by OpenAI's client."""
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["export", str(shipped_base()), str(out), "--for", "transformers-serve"])
    assert done.exit_code == 0, done.output
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(out), "--device", "cpu"]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    server = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)], env=offline)
    try:
        until(lambda: server.poll() is not None or healthy(port))
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        loaded = load_model(shipped_base())
        for scene in sample_scenes(5, "test", 3):
            picture, text = draw_scene(scene), "Describe this image in detail."
            reply = client.chat.completions.create(
                model=str(out),
                messages=[asks(with_picture(text, png(picture)))],
                max_tokens=64,
                temperature=0,  # type: ignore[list-item]
            )
            assert reply.choices[0].message.content == loaded.generate([picture], text, max_new_tokens=64)
    finally:
        server.kill()
        server.wait()
