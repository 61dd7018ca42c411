"""Trunks other than LLaVA by the generic way, each from its hub layout to the trained and exported model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny import dpo_keys, scramble, sft_keys, write_world
from helpers.trunks import KINDS, byte_tokenizer, row_log_probs, save_trunk, tiny_config
from helpers.variants import variants
from packaging.version import Version
from PIL import Image
from test_packing import flex_attention_by_sdpa
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.utils import is_torchvision_available

from relook import LoadedModel, load_model
from relook.data.encode import placeholder_count
from relook.data.packing import TokenRow, Tree, pack
from relook.data.samples import Conversation, PreferencePair, Turn
from relook.data.templates import IMAGE
from relook.errors import CheckpointError, DataError, RecipeError
from relook.evaluate.pope_from_cache import CachedPope
from relook.forward import policy
from relook.forward.collate import Collator, Item
from relook.forward.policy import Policy
from relook.forward.positions import tree_positions
from relook.generate import model_runner
from relook.generate.answering import GenerationSettings, answer_questions
from relook.generate.engine import Engine
from relook.generate.request import EngineLimits, Request
from relook.model import families, tower_attention
from relook.model.export import WriteOptions, export_for, export_model, merge_adapter
from relook.model.inspect import inspect_model
from relook.model.lazy_model import open_folder
from relook.model.load import LoadOptions, add_post_decoder
from relook.model.modeling_relook import TOWERS_READ
from relook.recipe import build_recipe
from relook.report.attention_maps import attention_before, has_attention_maps
from relook.train.run import train

TOWER: dict[str, Any] = {"features": "tower"}  # the post decoder looks at the tower's states, before the merger
SIZES = [(40, 24), (24, 56), (100, 30), (16, 16)]  # width, height
pytestmark = pytest.mark.usefixtures("no_trunk_cache")


# Qwen2.5-VL in the default suite, the others where minutes do not matter: those of the table, then some that nobody
# named, which are checked when they are loaded.
NAMED = [kind for kind in families.FAMILIES if kind in KINDS]
UNNAMED = [
    *("idefics3", "aya_vision", "vipllava", "deepseek_vl", "janus", "video_llama_3", "paddleocr_vl"),
    *("exaone4_5", "glm46v", "qwen3_vl_moe", *(["mistral3"] if is_torchvision_available() else [])),
]
SUITE = [pytest.param(k, marks=[] if k == "qwen2_5_vl" else pytest.mark.slow) for k in (*NAMED, *UNNAMED)]


@pytest.fixture(scope="module", params=SUITE)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_trunk(tmp_path_factory.mktemp(request.param) / request.param, request.param)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toyworld's pairs with pictures of all shapes."""
    root = write_world(tmp_path_factory.mktemp("world"))
    for i, path in enumerate(sorted(root.rglob("*.jpg"))):
        Image.open(path).resize(SIZES[i % len(SIZES)]).save(path)
    return root


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator).numpy())


def with_decoder(folder: Path, trained: bool = True, **settings: Any) -> LoadedModel:
    loaded = load_model(folder)
    if settings == TOWER and loaded.core.config.model_type not in TOWERS_READ:  # it is refused there
        settings = {"features": "projected"}
    generator = torch.Generator().manual_seed(1)
    loaded.model = add_post_decoder(loaded.model, settings, generator).eval()
    if trained:
        scramble(loaded.model.model.post_decoder, generator)
    return loaded


# --- loading and encoding


def messages(count: int, text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}] * count + [{"type": "text", "text": text}]}]


def test_a_prompt_is_that_of_the_processor_and_its_chat_template(loaded: LoadedModel) -> None:
    images = [picture(size) for size in SIZES[:2]]
    ours = loaded.encode(images, "What is this?")
    text = loaded.processor.apply_chat_template(messages(2, "What is this?"), add_generation_prompt=True)
    theirs = loaded.processor(images=images, text=[text], return_tensors="pt")
    assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
    # Processors put all images of a prompt into one row of tiles, or name what the model does not take.
    for name in ours.keys() & theirs.keys():
        assert ours[name].numel() > theirs[name].numel() or torch.equal(
            ours[name].flatten(), theirs[name].flatten().to(ours[name].dtype)
        )
    turns = [Turn("<image>\nWhat is this?", "A cup."), Turn("Where?", "")]
    ids = loaded.encoder().prompt("Where?", images[:1], turns[:1])
    history = [
        *messages(1, "What is this?"),
        {"role": "assistant", "content": [{"type": "text", "text": "A cup."}]},
        {"role": "user", "content": [{"type": "text", "text": "Where?"}]},
    ]
    text = loaded.processor.apply_chat_template(history, add_generation_prompt=True)
    text = text.replace("assistant \n", "assistant\n")  # LLaVA-OneVision's, in earlier turns only
    assert list(ids) == torch.as_tensor(loaded.processor(images=images[:1], text=[text])["input_ids"][0]).tolist()


def test_the_placeholder_in_a_text_is_no_image(loaded: LoadedModel) -> None:
    encoder = loaded.encoder()
    image = picture(SIZES[0])
    token = loaded.processor.tokenizer.convert_ids_to_tokens(loaded.core.config.image_token_id)
    if token == IMAGE:  # relook's own, which stands for an image wherever it is
        with pytest.raises(DataError, match="2 <image>, but 1 images"):
            encoder.learned([Turn(f"<image>\n{token}?", "No.")], [image], "1")
        return
    assert len(encoder.prompt(f"{token}?", [image])) > len(encoder.prompt("?", [image])) + 1  # letters
    with pytest.raises(DataError, match="placeholder"):
        encoder.learned([Turn(f"<image>\n{token}?", "No.")], [image], "1")


def test_inspect_traces_its_tensors(folder: Path, tmp_path: Path) -> None:
    picture(SIZES[0]).save(tmp_path / "a.png")
    found = inspect_model(folder, image=tmp_path / "a.png", prompt="What?")
    assert list(found["trains"]["projector"]["parts"].values()) == [found["trains"]["projector"]["trains"]]
    shapes = {row["name"]: row["shape"] for row in found["tensors"] if row["step"] == "prefill"}
    assert shapes["merged embeddings"][-1] == 32
    assert shapes["projected features"][-1] == 32


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "instructblip", "text_config": {"model_type": "llama"}}, "takes qformer_input_ids"),
        ({"model_type": "instructblip", "text_config": {"model_type": "t5"}}, "encoder-decoder"),
        ({"model_type": "blip-2", "text_config": {"model_type": "t5"}}, "encoder-decoder"),
        ({"model_type": "florence2"}, "encoder-decoder"),
        ({"model_type": "llama4"}, "no base model of it with get_image_features"),
        ({"model_type": "minigpt4"}, "type 'minigpt4', which relook cannot load"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_what_cannot_be_a_trunk_is_refused_by_name(config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=reason):
        open_folder(tmp_path, weights=False)


def test_hybrids_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"qwen3_5 .* linear_attention: these carry a state"):
        load_model(save_trunk(tmp_path / "hybrid", "qwen3_5"))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        pytest.param("ovis2", "of which relook would compute something else", marks=pytest.mark.slow),
        ("paligemma", "whose whole prompts see both ways"),
        ("got_ocr2", "whose layers do not take SDPA"),
    ],
)
def test_families_whose_trees_would_differ_are_refused_by_name(kind: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=reason):
        load_model(save_trunk(tmp_path / kind, kind))


# Idefics2 gives the features of all images in one piece before that, and is refused.
GROUPED = ["idefics2"] if Version(transformers.__version__) >= Version("5.23") else []


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*GROUPED, "deepseek_vl"])
def test_a_processor_that_changes_texts_beside_images_is_noted(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_model(save_trunk(tmp_path / kind, kind))
    assert ("changes texts beside images" in capsys.readouterr().err) == (kind == "idefics2")


def test_a_processor_that_lacks_a_package_is_not_copied_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_trunk(tmp_path / "smolvlm", "smolvlm")
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    with pytest.raises(CheckpointError, match=r"num2words.* Install what is missing"):
        load_model(folder)


@pytest.mark.parametrize("kind", ["smolvlm", "gemma3"])
def test_an_image_is_written_as_the_processor_writes_it(kind: str, tmp_path: Path) -> None:
    """Texts between the tiles of an image, and line breaks that are tokens with what is around them."""
    loaded = load_model(save_trunk(tmp_path / kind, kind))
    images = [picture(size) for size in SIZES[:2]]
    text = loaded.processor.apply_chat_template(messages(2, "What is this?"), add_generation_prompt=True)
    theirs = loaded.processor(images=images, text=[text], return_tensors="pt")
    assert torch.equal(loaded.encode(images, "What is this?")["input_ids"], theirs["input_ids"])


def test_an_untested_family_is_checked_when_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_trunk(tmp_path / "unknown", "qwen3_vl")
    monkeypatch.setattr(families, "FAMILIES", {})
    load_model(folder)
    # Without what its first layers add, it would be another model.
    without = lambda image, image_rows: families.image_features(image.pooler_output, image_rows)  # noqa: E731
    monkeypatch.setattr(policy, "position_rows", without)
    with pytest.raises(CheckpointError, match="qwen3_vl, of which relook would compute something else"):
        load_model(folder)
    monkeypatch.undo()
    monkeypatch.setattr(families, "FAMILIES", {})
    monkeypatch.setattr(model_runner, "position_rows", lambda image, _: list(image.pooler_output))
    with pytest.raises(CheckpointError, match="qwen3_vl, whose answers the engine would change"):
        load_model(folder)


def test_the_check_does_not_pack_quantised_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with bf16 instructions; packed weights would pass no gradient."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    packed = "bitsandbytes.nn.modules._convert_weight_packed_for_cpu"
    monkeypatch.setattr(packed, lambda *_: pytest.fail("the weights were packed"))
    monkeypatch.setattr(families, "FAMILIES", {})
    loaded = load_model(save_trunk(tmp_path / "unknown", "qwen3_vl"), bits=4)
    layer = families.language_model(loaded.core.model).layers[0].mlp.up_proj
    assert layer.support_avx512bf16_for_cpu  # what is served may be packed
    assert layer.weight.quant_state is not None


@torch.no_grad()
def test_a_tower_attends_to_segments_of_equal_length_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_model(save_trunk(tmp_path / "model"))
    calls: list[int] = []

    def features(implementation: str) -> Tensor:
        families.vision_tower(base.core.model).config._attn_implementation = implementation
        return torch.cat(base.core.model.get_image_features(**base.images.batch(pictures)).pooler_output)

    pictures = [picture(size, i) for i, size in enumerate((*SIZES, (64, 64)))]
    original = tower_attention.sdpa_attention_forward
    count = lambda *args, **kwargs: [calls.append(1), original(*args, **kwargs)][1]  # noqa: E731
    monkeypatch.setattr(tower_attention, "sdpa_attention_forward", count)
    assert families.vision_tower(base.core.model).config._attn_implementation == tower_attention.NAME
    torch.testing.assert_close(features(tower_attention.NAME), features("sdpa"), atol=1e-5, rtol=1e-5)
    assert 2 <= len(calls) <= 12  # 27 windows in the first layer and five pictures in the second
    looking = add_post_decoder(base.model, {}, None).model  # the tower is set to SDPA now
    tower_attention.batch_segments(looking)
    assert families.vision_tower(looking).config._attn_implementation == tower_attention.NAME


# --- trees


def examples_of(loaded: LoadedModel, world: Path) -> list[Any]:
    encoder = loaded.encoder()
    paths = sorted((world / "vg").rglob("*.jpg"))[:4]
    answers = ("There is a cup.", "There is a dog in the image.")
    return [encoder.pair(PreferencePair("p", (path,), "Describe this image.", *answers)) for path in paths] + [
        encoder.conversation(
            Conversation(
                "c", tuple(paths[:2]), (Turn("<image>\nWhat?", "A cup."), Turn("And <image>\nthis?", "A dog."))
            )
        )
    ]


@pytest.mark.parametrize("settings", [None, {"depth": 2}, {"attention": "self_cross"}, TOWER], ids=str)
@torch.no_grad()
def test_trees_are_equal_to_separate_rows(folder: Path, world: Path, settings: dict[str, Any] | None) -> None:
    loaded = load_model(folder) if settings is None else with_decoder(folder, **settings)
    collator = Collator(Policy(loaded.core), loaded.images, loaded.pad_id)
    items = sorted(map(Item, examples_of(loaded, world)), key=lambda item: -len(item.example.tree))
    batch = collator(items)["batch"]
    mrope = batch.packed.position_ids.ndim == 3
    assert mrope == hasattr(loaded.core.model, "get_rope_index")
    ours, theirs = collator.policy(batch), row_log_probs(loaded, items)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    # Controls: numbers that only count tokens, and a branch that sees the one before it.
    row = torch.arange(batch.packed.ids.shape[1]).expand_as(batch.packed.ids)
    counting = batch.packed.position_ids[:1].expand(3, -1, -1) if mrope else row + row % 3
    leaking = batch.packed.last_query.clone().clamp(min=batch.packed.ids.shape[1] - 1)
    for change in ({"position_ids": counting}, {"last_query": leaking}):
        packed = type(batch.packed)(**{**vars(batch.packed), **change})
        wrong = collator.policy(type(batch)(**{**vars(batch), "packed": packed}))
        assert (wrong - theirs).abs().max() > 1e-2


# Compiled for a CPU, FlexAttention takes half a minute.
@pytest.mark.parametrize("attention", ["dense", "flex by SDPA", pytest.param("flex", marks=pytest.mark.slow)])
@torch.no_grad()
def test_windows_and_images_that_see_both_ways(
    attention: str, tmp_path: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma 3 with windows much shorter than its rows, packed with and without FlexAttention."""
    if attention == "flex by SDPA":
        flex_attention_by_sdpa(monkeypatch)
    loaded = load_model(save_trunk(tmp_path / "gemma3", "gemma3"))
    text = loaded.core.config.text_config
    loaded.core.model.language_model.config.sliding_window = text.sliding_window = 20
    for layer in loaded.core.model.language_model.layers:
        layer.self_attn.sliding_window = 20 if layer.self_attn.sliding_window else None
    items = sorted(map(Item, examples_of(loaded, world)), key=lambda item: -len(item.example.tree))
    theirs = row_log_probs(loaded, items)
    collator = Collator(Policy(loaded.core, trunk_pass=attention.split()[0]), loaded.images, loaded.pad_id)
    batch = collator(items)["batch"]
    torch.testing.assert_close(collator.policy(batch), theirs, atol=1e-5, rtol=1e-5)
    causal = torch.arange(batch.packed.ids.shape[1], dtype=torch.int32).expand_as(batch.packed.first_query)
    packed = type(batch.packed)(**{**vars(batch.packed), "first_query": causal})
    wrong = collator.policy(type(batch)(**{**vars(batch), "packed": packed}))
    assert (wrong - theirs).abs().max() > 1e-2


def test_branches_restart_behind_the_prefix_in_all_three_numbers() -> None:
    config = tiny_config("qwen2_5_vl", byte_tokenizer(KINDS["qwen2_5_vl"]))
    branches = tuple(TokenRow((1,) * n, (True,) * n) for n in (2, 3))
    tree = Tree((5, *[config.image_token_id] * 6, 6), branches)
    positions = tree_positions(config, [tree], [1], torch.tensor([[1, 4, 6]]))
    assert positions is not None
    (numbers,) = positions
    time = [0, 1, 1, 1, 1, 1, 1, 4, 5, 6, 5, 6, 7]  # the text goes on behind the longest side, which is 3
    row = [0, 1, 1, 1, 2, 2, 2, 4, 5, 6, 5, 6, 7]
    column = [0, 1, 2, 3, 1, 2, 3, 4, 5, 6, 5, 6, 7]
    assert numbers.tolist() == [time, row, column]
    packed = pack([tree, tree], 0, row_length=40, root_length=1, positions=[numbers, numbers])
    assert packed.position_ids[:, 0, : len(tree)].tolist() == numbers.tolist()
    assert packed.position_ids[:, 0, len(tree) : 2 * len(tree) - 1].tolist() == numbers[:, 1:].tolist()


# --- the post decoder and generate


ROWS = [[picture(SIZES[1])], [picture(SIZES[2], 1), picture(SIZES[0], 2)], [picture(SIZES[3], 3)]]


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_a_batch_says_what_its_rows_say_alone(folder: Path, how: dict[str, Any]) -> None:
    loaded = with_decoder(folder, depth=2)
    rows = [loaded.encode(row, "Is there a cup?") for row in ROWS]
    longest = max(row["input_ids"].shape[1] for row in rows)

    def together(name: str, pad: int) -> Tensor:
        return torch.cat([torch.nn.functional.pad(r[name], (longest - r[name].shape[1], 0), value=pad) for r in rows])

    batch = {"input_ids": together("input_ids", loaded.pad_id)}
    texts = [name for name in rows[0] if rows[0][name].shape == rows[0]["input_ids"].shape and name != "input_ids"]
    batch |= {name: together(name, 0) for name in texts}
    batch |= loaded.images.batch([image for row in ROWS for image in row])
    # A model that writes a placeholder itself has no image for it, in transformers neither.
    token = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": -1, **how}
    token["suppress_tokens"] = [loaded.core.config.image_token_id]
    answers = loaded.core.generate(**batch, **token)[:, longest:].tolist()
    untrained = with_decoder(folder, False, depth=2)  # transformers' own EXAONE cannot expand beams in 5.17
    assert answers != untrained.core.generate(**batch, **token)[:, longest:].tolist()
    for row, answer in zip(rows, answers, strict=True):
        assert loaded.core.generate(**row, **token)[0, row["input_ids"].shape[1] :].tolist() == answer


@torch.no_grad()
def test_an_untrained_post_decoder_leaves_every_logit_as_it_was(folder: Path, loaded: LoadedModel) -> None:
    inputs = loaded.encode(ROWS[1], "What?")
    assert torch.equal(with_decoder(folder, False).core(**inputs).logits, loaded.core(**inputs).logits)


# --- training


def world_keys(task: str, folder: Path, world: Path, out: Path, **keys: Any) -> dict[str, Any]:
    keys = {"per_device_train_batch_size": 24, "max_steps": 3, **keys}
    return (dpo_keys if task == "dpo" else sft_keys)(folder, world, out, **keys) | {"version": "v1"}


REGIMES: dict[str, dict[str, Any]] = {
    "head": {"tune_lm_head": True},
    "post_decoder": {"tune_post_decoder": True},
    "lora": {"lora_enable": True, "lora_r": 4},
    "qlora": {"lora_enable": True, "lora_r": 4, "bits": 4},
    "projector": {"tune_mm_mlp_adapter": True},
    "full": {},
}
FAST = {("post_decoder", "dpo")}


@pytest.mark.parametrize(
    ("regime", "task"),
    [
        pytest.param(regime, task, marks=[] if (regime, task) in FAST else pytest.mark.slow)
        for regime in REGIMES
        for task in ("dpo", "sft")
    ],
)
def test_what_a_run_leaves_is_loaded_merged_and_exported(
    regime: str, task: str, folder: Path, world: Path, tmp_path: Path
) -> None:
    out = train(build_recipe(world_keys(task, folder, world, tmp_path / "run", **REGIMES[regime])))
    log = json.loads((out / "run.json").read_text())["log"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0]
    if task == "dpo":
        assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # the log rounds to four decimals
    tuned, base = load_model(out), load_model(folder)
    inputs = base.encode(ROWS[1], "What?")
    with torch.no_grad():
        logits = tuned.core(**inputs).logits
        assert not torch.allclose(logits, base.core(**inputs).logits, atol=1e-4)
    if regime != "full":
        assert (merge_adapter(folder, out, tmp_path / "merged") or 0.0) < 1e-5
    assert (export_model(out, tmp_path / "exported") or 0.0) < 1e-5
    assert load_model(tmp_path / "exported").template == "chat"
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "exported", trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, logits, atol=1e-5, rtol=1e-5)
    if regime != "post_decoder":
        assert type(plain).__module__.startswith("transformers.models.")
        assert (export_for(out, tmp_path / "vllm", "vllm", WriteOptions()) or 0.0) < 1e-5


@pytest.mark.parametrize("keys", variants([REGIMES["lora"], REGIMES["post_decoder"], REGIMES["full"]], []), ids=str)
def test_dpo_in_bf16_begins_at_ln_2(keys: dict[str, Any], folder: Path, world: Path, tmp_path: Path) -> None:
    """The reference pass reads kept features in batches of its own, and must round as the first step does."""
    short = {"bf16": True, "max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 8}
    out = train(build_recipe(world_keys("dpo", folder, world, tmp_path / "run", **keys, **short)))
    [first] = [entry["loss"] for entry in json.loads((out / "run.json").read_text())["log"] if "loss" in entry]
    assert first == pytest.approx(math.log(2), abs=2e-3)


CACHED: list[dict[str, Any]] = [
    {"tune_post_decoder": True, "post_decoder.features": "tower"},
    {"tune_post_decoder": True},
    {"tune_lm_head": True},
]


@pytest.mark.parametrize("keys", variants(CACHED, CACHED[:1]), ids=str)
def test_cached_states_train_to_the_same_weights_as_live_ones(
    keys: dict[str, Any], folder: Path, world: Path, tmp_path: Path
) -> None:
    if "post_decoder.features" in keys and load_model(folder).core.config.model_type not in TOWERS_READ:
        with pytest.raises(RecipeError, match=r"the states of a .*'s tower are not known"):
            train(build_recipe(world_keys("dpo", folder, world, tmp_path / "run") | keys))
        return
    found = []
    for cache in ("disk", "off"):
        recipe = world_keys("dpo", folder, world, tmp_path / cache, optim="sgd", learning_rate=0.1, feature_cache=cache)
        found.append(load_model(train(build_recipe(recipe | keys))).model.state_dict())
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


# --- answers


@pytest.mark.parametrize("settings", [None, {"depth": 2}, {"attention": "self_cross"}, TOWER], ids=str)
def test_answers_are_those_of_generate(folder: Path, world: Path, settings: dict[str, Any] | None) -> None:
    loaded = load_model(folder) if settings is None else with_decoder(folder, **settings)
    paths = sorted((world / "vg").rglob("*.jpg"))
    questions: list[Any] = [(path, f"Is there a {name} in the image?") for path in paths for name in ("cup", "dog")]
    questions.append(((paths[0], paths[1]), "Which of both?"))
    found = dict(
        answer_questions(loaded, questions, GenerationSettings(max_new_tokens=6, batch_size=4), lambda *_: None)
    )
    for i in (0, 3, 6, len(questions) - 1):
        images = [questions[i][0]] if isinstance(questions[i][0], Path) else list(questions[i][0])
        assert found[i] == loaded.generate(images, questions[i][1], max_new_tokens=6)


def test_a_conversation_goes_on_in_the_engine(folder: Path, tmp_path: Path) -> None:
    loaded = load_model(folder)
    engine = Engine(loaded, EngineLimits(slots=2, length=400))
    try:
        picture(SIZES[1]).save(tmp_path / "a.png")
        image = engine.image((tmp_path / "a.png").read_bytes())
        turns = [Turn("<image>\nWhat is this?", "A cup of tea."), Turn("And where?", "")]
        for said in (turns[:1], turns):
            asked = [*said[:-1], Turn(said[-1].prompt, "")]
            ids = engine.prompt(asked, [image])
            text = "".join(event.text for event in engine.stream(Request(ids, (image,), max_new_tokens=6)))
            inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
            inputs |= loaded.token_types(inputs["input_ids"]) | loaded.images.batch([tmp_path / "a.png"])
            expected = loaded.core.generate(**inputs, do_sample=False, max_new_tokens=6)[0, len(ids) :]
            assert text.strip() == loaded.decode(expected)
    finally:
        engine.stop()


ONE_GRID = ("gemma3", "vipllava", "deepseek_vl", "janus")


def test_a_map_has_the_proportions_of_the_picture(folder: Path) -> None:
    loaded, image = with_decoder(folder), picture((60, 30))
    turns = [Turn("<image>\nWhat is this?", "There is a cup.")]
    assert has_attention_maps(loaded)
    grids = attention_before(loaded, image, turns, [turns[0].response.index("cup")])
    if not loaded.images.flat and not loaded.core.config.model_type.endswith(ONE_GRID):  # tiles, or learned queries
        assert grids == []
        return
    [grid] = grids
    width, height = loaded.images.seen(image).size
    assert len(grid[0]) * height == len(grid) * width
    assert sum(map(sum, grid)) == pytest.approx(1)
    # By transformers: the queries of the pass over the prompt, before the word. Each letter is a token here.
    decoder: Any = loaded.model.model.post_decoder
    block, queries = decoder.blocks[-1].cross_attention, list[Tensor]()
    hook = block.q_proj.register_forward_hook(lambda module, inputs, output: queries.append(output))
    prompt = loaded.encode([image], "What is this?")
    words = loaded.processor.tokenizer("There is a ", add_special_tokens=False, return_tensors="pt")["input_ids"]
    prompt["input_ids"] = torch.cat([prompt["input_ids"], words], 1)
    prompt["attention_mask"] = torch.ones_like(prompt["input_ids"])
    with torch.no_grad():
        loaded.core(**prompt | loaded.token_types(prompt["input_ids"]))
        features = loaded.core.model.get_image_features(**loaded.images.batch([image]), return_dict=True).pooler_output[
            0
        ]
        keys, _ = block.keys_values(decoder.align(features[None]))
        scores = block.split(queries[0][:, -1:]) @ keys.transpose(-1, -2) / keys.shape[-1] ** 0.5
    hook.remove()
    torch.testing.assert_close(torch.tensor(grid).flatten(), scores.softmax(-1).mean(1).flatten())
    if loaded.core.config.model_type.removeprefix("relook_") in TOWERS_READ:  # no map of patches
        patches = with_decoder(folder, **TOWER)
        assert not has_attention_maps(patches)
        assert attention_before(patches, image, turns, [0]) == []


def test_learned_queries_have_no_map(tmp_path: Path) -> None:
    loaded, turns = with_decoder(save_trunk(tmp_path / "qwen")), [Turn("<image>\nWhat is this?", "There is a cup.")]
    image = picture((60, 30))
    assert len(attention_before(loaded, image, turns, [0])) == 1
    families.connector(loaded.model.model).latents = torch.nn.Parameter(torch.zeros(1))  # as Idefics2's are called
    assert not has_attention_maps(loaded)
    assert attention_before(loaded, image, turns, [0]) == []


@pytest.mark.slow
def test_what_is_kept_for_lora_trains_alike(folder: Path, world: Path, tmp_path: Path) -> None:
    weights = []
    for cache in ("memory", "off"):
        keys = {"lora_enable": True, "lora_r": 4, "lora_dropout": 0.0, "optim": "sgd", "learning_rate": 0.1}
        recipe = world_keys("dpo", folder, world, tmp_path / cache, feature_cache=cache, **keys)
        weights.append(load_model(train(build_recipe(recipe))).model.state_dict())
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_first_answers_come_from_what_is_kept_of_the_base(
    folder: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = CachedPope(folder, world / "test", tmp_path / "states.safetensors", "", LoadOptions(device="cpu"), 32)
    answered: list[bool] = []
    kept = CachedPope._from_states
    monkeypatch.setattr(CachedPope, "_from_states", lambda self, policy: [answered.append(True), kept(self, policy)][1])
    # What is kept for all runs are the features that a post decoder looks at by default.
    for features, is_kept in (("auto", True), ("tower", False)):
        if features == "tower" and load_model(folder).core.config.model_type not in TOWERS_READ:
            continue
        keys = {"tune_post_decoder": True, "post_decoder.features": features, "max_steps": 1}
        run = train(build_recipe(world_keys("dpo", folder, world, tmp_path / features, **keys)))
        answered.clear()
        ours = torch.cat(list(engine.log_probs(run, lambda run=run: load_model(run))))  # type: ignore[misc]
        assert bool(answered) == is_kept
        torch.testing.assert_close(ours, torch.cat(list(engine._live(load_model(run)))), atol=1e-5, rtol=1e-4)


# --- docs/trunks.md


def table_row(loaded: LoadedModel) -> str:
    """Return a family's row of the page's table, by what its tiny model does."""
    kind, core = loaded.core.config.model_type, loaded.core
    pictures = [picture(size) for size in (*SIZES, (300, 200))]
    shown = loaded.plain_encoder().positions(pictures)
    image = "by its size" if len(set(map(placeholder_count, shown))) > 1 else "fixed"
    if any(isinstance(parts, tuple) and len(parts) > 3 for parts in shown):
        image += ", texts between"
    traits = {
        "M-RoPE": hasattr(core.model, "get_rope_index"),
        "deepstack": bool(getattr(core.config.vision_config, "deepstack_visual_indexes", None)),
        "windows": any(families.attention_windows(core.config.text_config).values()),
        "images see both ways": families.sees_ahead(core.config),
    }
    return f"| `{kind}` | {image} | {', '.join(trait for trait, has in traits.items() if has)} |".replace("  ", " ")


PAGE = (Path(__file__).parents[1] / "docs/trunks.md").read_text(encoding="utf-8")


def test_the_page_has_the_row_that_this_prints(loaded: LoadedModel) -> None:
    row = table_row(loaded)
    print(row)  # noqa: T201 - for the page
    assert row in PAGE


def test_the_page_lists_the_families() -> None:
    rows = [line.split("`")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    assert set(rows) == set(families.FAMILIES) | set(UNNAMED) | {"mistral3"}
