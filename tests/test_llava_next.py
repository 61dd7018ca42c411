"""LLaVA-NeXT as a trunk: images of different numbers of positions, from the folder on disk to the trained model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import dpo_keys, left_padded, scramble, tiny_llava, write_world
from helpers.variants import variants
from PIL import Image
from torch import Tensor
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from relook import LoadedModel, load_model
from relook.data.samples import PreferencePair, Turn
from relook.errors import RelookError
from relook.forward.collate import Collator, Item
from relook.forward.policy import Policy
from relook.generate.answering import GenerationSettings, answer_questions
from relook.model.checkpoint import config_template
from relook.model.export import convert_model, export_model
from relook.model.load import add_post_decoder
from relook.model.modeling_relook import RelookLlavaNextForConditionalGeneration, images_per_row
from relook.model.post_decoder import PostDecoder
from relook.recipe import build_recipe
from relook.report.attention_maps import attention_before
from relook.toyworld.build import IMAGE_SIZE, PATCH, make_processor
from relook.train.run import train

GRID = [[96, 192], [192, 96], [192, 192], [288, 96]]
SIZES = [(96, 96), (70, 150), (200, 90), (300, 60), (1, 1), (400, 399), (97, 191)]  # width, height
PATCHES = (IMAGE_SIZE // PATCH) ** 2
pytestmark = pytest.mark.usefixtures("no_trunk_cache")


def tiny_next(seed: int = 0) -> LlavaNextForConditionalGeneration:
    llava = tiny_llava(seed)
    config = LlavaNextConfig(
        vision_config=llava.config.vision_config,
        text_config=llava.config.text_config,
        image_token_index=llava.config.image_token_id,
        image_grid_pinpoints=GRID,
        image_seq_length=PATCHES,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(config)
    model.generation_config = llava.generation_config
    return model.eval()


def next_processor() -> LlavaNextProcessor:
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_grid_pinpoints=GRID,
        ),
        tokenizer=make_processor().tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("next")
    tiny_next().save_pretrained(path)
    next_processor().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder)


@pytest.fixture(scope="module")
def odd_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toyworld's pairs with pictures of all shapes."""
    root = write_world(tmp_path_factory.mktemp("world"))
    for path, size in zip(sorted((root / "vg").rglob("*.jpg")), SIZES[:4] + SIZES[5:], strict=True):
        Image.open(path).resize(size).save(path)
    return root


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    width, height = size
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(256, (height, width, 3), dtype=torch.uint8, generator=generator).numpy())


def with_decoder(trained: bool = True, **settings: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    model: Any = add_post_decoder(tiny_next(), settings, generator)
    if trained:
        scramble(model.model.post_decoder, generator)
    return model.eval()


def as_loaded(model: Any) -> LoadedModel:
    return LoadedModel(model, next_processor(), Path())


def batch(loaded: LoadedModel, images: list[list[Image.Image]]) -> dict[str, Tensor]:
    """Rows with these images, padded on the left."""
    encoder = loaded.encoder()
    ids = [encoder.prompt("Is there a cup?" if i % 2 else "Describe this image.", row) for i, row in enumerate(images)]
    return left_padded(ids) | loaded.images.batch([image for row in images for image in row])


ROWS = [[picture(SIZES[1])], [picture(SIZES[5], 1), picture(SIZES[0], 2)], [picture(SIZES[2], 3)]]


# --- loading and encoding


@torch.no_grad()
def test_a_folder_of_transformers_loads_with_the_same_logits(folder: Path, loaded: LoadedModel) -> None:
    plain = LlavaNextForConditionalGeneration.from_pretrained(folder).eval()
    assert type(loaded.model) is LlavaNextForConditionalGeneration
    given = batch(loaded, ROWS)
    assert torch.equal(loaded.model(**given).logits, plain(**given).logits)


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_positions_are_the_processors_and_the_models(loaded: LoadedModel, size: tuple[int, int]) -> None:
    image = picture(size)
    (ours,) = loaded.encoder().positions([image])
    theirs = next_processor()(images=image, text="<image>", return_tensors="pt")
    features = loaded.model.get_image_features(theirs["pixel_values"], theirs["image_sizes"], return_dict=True)
    assert ours == int((theirs["input_ids"] == loaded.model.config.image_token_id).sum())
    assert ours == len(features.pooler_output[0])


def test_encoding_is_the_processors(loaded: LoadedModel, tmp_path: Path) -> None:
    images = [picture(SIZES[1]), picture(SIZES[2])]
    ours = loaded.encode(images, "<image>\nWhat is this? <image>")
    text = "USER: <image>\nWhat is this? <image> ASSISTANT:"
    theirs = loaded.processor(images=images, text=text, return_tensors="pt")
    assert ours.keys() >= {"input_ids", "attention_mask", "pixel_values", "image_sizes"}
    for name in ("pixel_values", "image_sizes"):
        assert torch.equal(ours[name], theirs[name]), name
    token = loaded.model.config.image_token_id
    runs = [
        [len(run) for run in "".join("i" if id == token else " " for id in ids.tolist()).split()]
        for ids in (ours["input_ids"][0], theirs["input_ids"][0])
    ]
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 2
    images[0].save(tmp_path / "a.png")  # a file is as good as a picture in memory
    again = loaded.encode([tmp_path / "a.png", images[1]], "<image>\nWhat is this? <image>")
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_a_folder_over_mistral_has_mistrals_template() -> None:
    config: dict[str, Any] = {"model_type": "llava_next", "text_config": {"model_type": "mistral"}}
    assert config_template(config) == "mistral"
    assert config_template(config | {"conversation_template": "v1"}) == "v1"
    assert config_template(config | {"text_config": {"model_type": "llama"}}) == "llava_hf"


def test_a_number_of_images_is_not_enough(loaded: LoadedModel, tmp_path: Path) -> None:
    assert loaded.encoder().prompt("Hello", 0)
    with pytest.raises(TypeError, match="give the images"):
        loaded.encoder().prompt("Hello", 1)
    (tmp_path / "no.jpg").write_bytes(b"no image")
    with pytest.raises(RelookError, match=r"no\.jpg is not an image"):
        loaded.encoder().pair(PreferencePair("1", (tmp_path / "no.jpg",), "What?", "a", "b"))


def test_the_square_canvas_is_not_taken_for_the_padding_of_batches(loaded: LoadedModel) -> None:
    assert next_processor().image_processor.do_pad
    assert loaded.aspect_ratio == loaded.images.aspect_ratio == ""


# --- the post decoder


@pytest.mark.parametrize("attention", ["cross", "none", "self_cross"])
@torch.no_grad()
def test_untrained_leaves_every_logit_as_it_was(loaded: LoadedModel, attention: str) -> None:
    given = batch(loaded, ROWS)
    before = tiny_next()(**given).logits
    assert torch.equal(with_decoder(False, attention=attention, depth=2)(**given).logits, before)
    assert not torch.allclose(with_decoder(attention=attention, depth=2)(**given).logits, before, atol=1e-2)


@torch.no_grad()
def test_it_looks_at_every_tile_of_its_own_images(loaded: LoadedModel) -> None:
    model = with_decoder()
    given = loaded.images.batch([image for row in ROWS for image in row])
    features = model.model.get_image_features(**given).vision_features
    tiles = [len(next_processor().image_processor(images=image)["pixel_values"][0]) for row in ROWS for image in row]
    assert [len(one) for one in features] == [count * PATCHES for count in tiles]
    assert len(set(tiles)) > 1
    for one, pixels, count in zip(features, given["pixel_values"], tiles, strict=True):
        states = model.model.vision_tower(pixels[:count], output_hidden_states=True).hidden_states
        torch.testing.assert_close(one, states[-2][:, 1:].flatten(0, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", variants([{}, {"num_beams": 3}, {"use_cache": False}], ({}, {"num_beams": 3})), ids=str)
def test_a_batch_says_what_its_rows_say_alone(how: dict[str, Any]) -> None:
    model = with_decoder(depth=2)
    loaded = as_loaded(model)
    token = {"do_sample": False, "max_new_tokens": 8, **how}
    together = batch(loaded, ROWS)
    length = together["input_ids"].shape[1]
    said = model.generate(**together, **token)[:, length:]
    plain = tiny_next().generate(**together, **token)[:, length:]
    assert said.tolist() != plain.tolist()
    for i, row in enumerate(ROWS):
        ids = together["input_ids"][i][together["attention_mask"][i].bool()][None]
        alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **loaded.images.batch(row)}
        found = model.generate(**alone, **token)[0, ids.shape[1] :].tolist()
        found += [said[i, -1].item()] * (said.shape[1] - len(found))
        assert [id for id in found if id != 3] == [id for id in said[i].tolist() if id != 3]


@pytest.mark.parametrize("beams", [1, 3])
def test_the_image_side_is_computed_once_per_image(beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_decoder(depth=2)
    looked: list[tuple[int, list[int]]] = []
    look = PostDecoder.image_context

    def counted(self: PostDecoder, features: Any, per_row: list[int]) -> Any:
        looked.append((len(features), per_row))
        return look(self, features, per_row)

    monkeypatch.setattr(PostDecoder, "image_context", counted)
    model.generate(**batch(as_loaded(model), ROWS), num_beams=beams, max_new_tokens=5, do_sample=False)
    assert looked == [(4, [1, 2, 1])]


def test_rows_whose_placeholders_do_not_fit_their_images() -> None:
    assert images_per_row([3, 5, 3], [8, 0, 3]) == [2, 0, 1]
    for lengths, taken in (([3, 5], [4, 4]), ([3], [3, 3]), ([3, 5], [3])):
        with pytest.raises(ValueError, match="image"):
            images_per_row(lengths, taken)


def test_answers_in_a_batch_are_those_of_each_question(odd_world: Path) -> None:
    loaded = as_loaded(with_decoder())
    paths = sorted((odd_world / "vg").rglob("*.jpg"))
    questions = [(path, f"Is there a {name} in the image?") for path in paths for name in ("cup", "dog")]

    def texts(size: int) -> list[str]:
        found = answer_questions(
            loaded, questions, GenerationSettings(max_new_tokens=6, batch_size=size), lambda *_: None
        )
        return [text for _, text in sorted(found)]

    assert texts(1) == texts(12)
    path, question = questions[3]
    assert texts(5)[3] == loaded.generate([path], question, max_new_tokens=6)


def test_no_square_map_is_drawn_of_tiles(odd_world: Path) -> None:
    path = min((odd_world / "vg").rglob("*.jpg"))
    assert (
        attention_before(as_loaded(with_decoder()), path, [Turn("<image>\nDescribe.", "There is a cup.")], [11]) == []
    )


# --- training


@pytest.mark.parametrize("settings", [{"depth": 2}, {"attention": "self_cross"}], ids=str)
@torch.no_grad()
def test_trees_are_equal_to_separate_rows(odd_world: Path, settings: dict[str, Any]) -> None:
    model = with_decoder(**settings).double()  # float32's rounding comes near 1e-5
    loaded = as_loaded(model)
    encoder = loaded.encoder()
    paths = sorted((odd_world / "vg").rglob("*.jpg"))[:4]
    answers = ("There is a cup.", "There is a dog in the image.")
    examples = [encoder.pair(PreferencePair("p", (path,), "Describe this image.", *answers)) for path in paths]
    collator = Collator(Policy(model), loaded.images, 3)
    items = sorted(map(Item, examples), key=lambda item: -len(item.example.tree))
    ours = collator.policy(collator(items)["batch"])
    theirs: list[Tensor] = []
    for item in items:
        tree = item.example.tree
        for branch in tree.branches:
            ids = torch.tensor([[*tree.prefix, *branch.ids]])
            log_probs = model(input_ids=ids, **loaded.images.batch(item.example.images)).logits[0].log_softmax(-1)
            places = [len(tree.prefix) + i for i, flag in enumerate(branch.supervised) if flag]
            theirs += [log_probs[place - 1, ids[0, place]] for place in places]
    torch.testing.assert_close(ours, torch.stack(theirs), atol=1e-5, rtol=1e-5)


WHOLE = {"per_device_train_batch_size": 24}  # every step is over the same samples
REGIMES: dict[str, dict[str, Any]] = {
    "head": {"tune_lm_head": True},
    "post_decoder": {"tune_post_decoder": True},
    "both": {"tune_post_decoder": True, "tune_lm_head": True, "post_decoder_init": "projector"},
    "lora": {"lora_enable": True, "lora_r": 4},
}


@pytest.mark.parametrize("regime", variants(REGIMES, {"both"}))
def test_training_starts_at_ln_2_and_what_it_leaves_is_loaded(
    regime: str, folder: Path, odd_world: Path, tmp_path: Path
) -> None:
    keys = dpo_keys(folder, odd_world, tmp_path / "run", **REGIMES[regime], max_steps=3, **WHOLE)
    out = train(build_recipe(keys))
    log = json.loads((out / "run.json").read_text())["log"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # the log rounds to four decimals
    assert losses[-1] < losses[0]
    tuned, base = load_model(out), load_model(folder)
    assert isinstance(tuned.model, RelookLlavaNextForConditionalGeneration) == ("decoder" in regime or regime == "both")
    given = batch(base, ROWS)
    with torch.no_grad():
        assert not torch.allclose(tuned.model(**given).logits, base.model(**given).logits, atol=1e-4)
    assert isinstance(tuned.generate([ROWS[0][0]], "Is there a cup?", max_new_tokens=4), str)


@pytest.mark.slow
def test_cached_states_train_to_the_same_weights_as_live_ones(folder: Path, odd_world: Path, tmp_path: Path) -> None:
    found = []
    for cache in ("disk", "off"):
        keys = {"tune_post_decoder": True, "max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "feature_cache": cache}
        keys = dpo_keys(folder, odd_world, tmp_path / cache, **keys)
        found.append(load_model(train(build_recipe(keys))).model.state_dict())
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


# --- writing


def test_written_models_keep_their_logits_and_llavas_format_is_refused(folder: Path, tmp_path: Path) -> None:
    assert convert_model(folder, tmp_path / "hf", "hf") == 0
    plain = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert torch.equal(plain.model.image_newline, tiny_next().model.image_newline)
    with pytest.raises(RelookError, match="llava_next model is written in transformers' format only"):
        convert_model(folder, tmp_path / "llava", "llava")


PROGRAM = """
import sys, torch
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "relook":
            raise ImportError(name)
sys.meta_path.insert(0, Block())
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
given = processor(images=Image.open(sys.argv[2]), text="USER: <image> Is there a cup? ASSISTANT:", return_tensors="pt")
output = model.generate(**given, max_new_tokens=5, do_sample=False, num_beams=2)
with torch.no_grad():
    torch.save({**given, "output": output, "logits": model(**given).logits}, sys.argv[3])
print(type(processor).__name__, type(model).__name__)
"""


@pytest.mark.slow  # imports transformers in a process of its own; test_model.py does so by default
def test_an_export_works_where_relook_cannot_be_imported(folder: Path, odd_world: Path, tmp_path: Path) -> None:
    run = train(build_recipe(dpo_keys(folder, odd_world, tmp_path / "run", tune_post_decoder=True, max_steps=3)))
    assert export_model(run, tmp_path / "whole") == 0
    picture(SIZES[3]).save(tmp_path / "image.png")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "whole"), str(tmp_path / "image.png"), str(tmp_path / "o.pt")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": "", "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["LlavaNextProcessor", "RelookLlavaNextForConditionalGeneration"]
    saved = torch.load(tmp_path / "o.pt")
    output, logits = saved.pop("output"), saved.pop("logits")
    for source in (run, tmp_path / "whole"):
        model = load_model(source).model
        with torch.no_grad():
            torch.testing.assert_close(model(**saved).logits, logits, atol=1e-5, rtol=0)
        assert torch.equal(model.generate(**saved, max_new_tokens=5, do_sample=False, num_beams=2), output)
