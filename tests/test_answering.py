"""The answering engine: the text of transformers' `generate` at batch 1, however questions are grouped."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny import tiny_llava, tiny_relook
from helpers.variants import variants
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from relook import LoadedModel, load_model
from relook.data.templates import TEMPLATES, get_template
from relook.errors import DataError
from relook.generate import answering
from relook.generate.answering import GenerationSettings, Question, answer_questions
from relook.generate.sampling import RowSampling, Sampler, choose_tokens, has_full_attention
from relook.toyworld.build import IMAGE_SIZE, make_processor

NEW = 6
TEXTS = ("Is there a cup?", "Is there a dog in the image?", "Is there a cup in the image?", "Describe this image.")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        generator = torch.Generator().manual_seed(i)
        noise = torch.randint(256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(noise.numpy()).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def questions(pictures: list[Path]) -> list[Question]:
    """Several on an image, one on an image, on two images, on none, placeholders in odd places, and one twice."""
    a, b, c, d = pictures
    asked: list[Question] = [(a, text) for text in TEXTS]
    asked += [(b, f"Is it the same? {text}" * 3) for text in TEXTS[:3]]
    asked += [(c, TEXTS[3]), (d, "What is <image> this?"), (d, "And <image> this?"), (d, TEXTS[0])]
    asked += [((a, b), text) for text in TEXTS[:2]] + [((b, a), "Compare <image> this with <image> that.")]
    asked += [((), "Is there a dog?"), ((), "Say a word."), ((), "A")]
    return [*asked, asked[1], ((a,), TEXTS[0])]


def as_loaded(model: Any) -> LoadedModel:
    return LoadedModel(model.eval(), make_processor(), Path())


def paths(images: Path | tuple[Path, ...]) -> tuple[Path, ...]:
    return images if isinstance(images, tuple) else (images,)


def one_by_one(loaded: LoadedModel, questions: Sequence[Question], **how: Any) -> list[str]:
    """transformers' own `generate`, batch 1."""
    how = {"max_new_tokens": NEW, **how}
    return [loaded.generate(paths(images), text, **how) for images, text in questions]


def answers(loaded: LoadedModel, questions: Sequence[Question], size: int = 64, **how: Any) -> list[str]:
    asking = GenerationSettings(**{"max_new_tokens": NEW, "batch_size": size, **how})
    texts = dict(answer_questions(loaded, questions, asking, lambda *_: None))
    return [texts[i] for i in range(len(questions))]


@pytest.fixture
def texts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No question may take the other way."""

    def never(*_: Any) -> None:
        raise AssertionError("a question went to `generate`")

    monkeypatch.setattr(answering, "generate_ids", never)


def with_lora() -> Any:
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)")
    model = get_peft_model(tiny_relook(), config)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def with_grouped_heads() -> Any:
    """Two key heads for four query heads, and a tower of which two layers are read."""
    config = copy.deepcopy(tiny_llava().config)
    config.text_config.num_key_value_heads, config.vision_feature_layer = 2, [-2, -1]
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.generation_config = tiny_llava().generation_config
    return model


MODELS: dict[str, Any] = {
    "plain": tiny_llava,
    "grouped heads": with_grouped_heads,
    "cross": tiny_relook,
    "cross, deep": lambda: tiny_relook(depth=3, num_heads=2),
    "none": lambda: tiny_relook(attention="none", depth=2),
    "self_cross": lambda: tiny_relook(attention="self_cross", depth=2),
    "lora": with_lora,
}


@pytest.mark.usefixtures("texts_only")
@pytest.mark.parametrize(
    "name", variants(sorted(MODELS.keys() - {"cross"}), {"lora", "self_cross"})
)  # "cross, deep" is more
def test_the_text_is_that_of_generate_for_every_batch(name: str, questions: list[Question]) -> None:
    loaded = as_loaded(MODELS[name]())
    expected = one_by_one(loaded, questions)
    assert len(set(expected)) > 6
    for size in (3, 64):
        assert answers(loaded, questions, size) == expected, size


@pytest.mark.usefixtures("texts_only")
@pytest.mark.slow  # answers that end with a text leave rows and batch in the same way
@pytest.mark.parametrize("settings", [{}, {"attention": "self_cross"}], ids=str)
def test_answers_of_all_lengths(settings: dict[str, Any], questions: list[Question]) -> None:
    """Some end at once, some never: branches leave their rows, and rows the batch."""
    loaded = as_loaded(tiny_relook(**settings))
    said = []
    for images, text in questions:
        inputs = loaded.encode(paths(images), text)
        output = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=40)
        said.append(output[0, inputs["input_ids"].shape[1] :].tolist())

    def lengths(stops: Sequence[int]) -> list[int]:
        return [next((i for i, token in enumerate(ids, 1) if token in stops), 40) for ids in said]

    # Which tokens end answers early and late depends on the random weights, and these on transformers' version.
    pairs = itertools.combinations(sorted({token for ids in said for token in ids} - {2}), 2)
    stops = next(pair for pair in pairs if min(n := lengths(pair)) <= 2 and max(n) > 20 and len(set(n)) > 3)
    loaded.model.generation_config.eos_token_id = [2, *stops]
    expected = one_by_one(loaded, questions, max_new_tokens=40)
    for size in (2, 64):
        assert answers(loaded, questions, size, max_new_tokens=40) == expected


@pytest.mark.usefixtures("texts_only")
def test_answers_that_end_with_a_text(tiny: Path, tower: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several characters, which may lie in several tokens or begin in the middle of one."""
    loaded = load_model(tiny / "ckpt_safetensors", vision_tower=tower)
    questions: list[Question] = [(tiny / "inputs" / "image_A.png", text) for text in TEXTS]
    whole = one_by_one(loaded, questions, max_new_tokens=20)
    for end in (whole[0][4:7], whole[1][9:11], whole[2][6:10]):
        assert end.strip()
        template = dataclasses.replace(get_template("v1"), name="short", end=end)
        monkeypatch.setitem(TEMPLATES, "short", template)
        expected = one_by_one(loaded, questions, template="short", max_new_tokens=20)
        assert expected != whole
        assert answers(loaded, questions, template="short", max_new_tokens=20) == expected


# --- settings of generation


@pytest.mark.usefixtures("texts_only")
def test_suppressed_tokens_and_a_models_own_sampling_settings(questions: list[Question]) -> None:
    loaded = as_loaded(tiny_llava())
    config, plain = loaded.model.generation_config, answers(loaded, questions)
    token = loaded.processor.tokenizer.convert_tokens_to_ids
    config.begin_suppress_tokens = [token("▁" + plain[0].split()[0])]
    config.suppress_tokens = [*config.suppress_tokens, token("▁" + plain[0].split()[1])]
    config.do_sample, config.temperature, config.top_p, config.max_length = True, 0.9, 0.6, 4096
    expected = one_by_one(loaded, questions)
    assert expected != plain
    assert answers(loaded, questions) == expected


@pytest.mark.parametrize(
    "settings",
    variants(
        [
            {"repetition_penalty": 1.5},
            {"no_repeat_ngram_size": 1},
            {"min_new_tokens": 1},
            {"bad_words_ids": [[30], [31]]},
            {"num_beams": 3},
            {"do_sample": True, "min_p": 1.0},
        ],
        [{"min_new_tokens": 1}, {"num_beams": 3}, {"do_sample": True, "min_p": 1.0}],
    ),
    ids=str,
)
def test_what_only_generate_follows_is_left_to_it(
    settings: dict[str, Any], questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the caller says it or the model's own settings do."""
    monkeypatch.setattr(answering, "Scheduler", None)
    plain, asked = as_loaded(tiny_llava()), questions[:6]
    torch.manual_seed(0)
    expected = one_by_one(plain, asked, **settings)
    assert answers(plain, asked, 4, generate=tuple(settings.items())) == expected
    if "do_sample" not in settings:  # of the model's own, drawing is not taken over
        own = as_loaded(tiny_llava())
        own.model.generation_config.update(**settings)
        assert answers(own, asked, 4) == expected


def test_a_window_over_the_text_is_left_to_generate() -> None:
    config = tiny_llava().config.text_config
    assert has_full_attention(config, 10**6)
    config.sliding_window = 100
    assert has_full_attention(config, 100)
    assert not has_full_attention(config, 101)
    config.layer_types = ["full_attention", "linear_attention"]
    assert not has_full_attention(config, 1)


@pytest.mark.usefixtures("texts_only")
def test_a_prompt_that_ends_in_its_image(pictures: list[Path]) -> None:
    loaded = as_loaded(tiny_llava())
    questions: list[Question] = [(path, "<image>") for path in pictures[:2]]
    assert loaded.encoder("plain").prompt("<image>", [pictures[0]])[-1] == loaded.model.config.image_token_id
    assert answers(loaded, questions, template="plain") == one_by_one(loaded, questions, template="plain")


# --- sampling


def sampling(**settings: Any) -> dict[str, Any]:
    return {"generate": tuple({"do_sample": True, **settings}.items())}


@pytest.mark.usefixtures("texts_only")
def test_draws_depend_on_the_seed_and_not_on_the_batch(questions: list[Question]) -> None:
    loaded = as_loaded(tiny_relook())
    how = sampling(temperature=1.5, top_k=0)
    questions = questions[:-2]  # the last two are asked before: with all of them they get that answer
    drawn = answers(loaded, questions, 1, seed=3, **how)
    assert drawn == answers(loaded, questions, 4, seed=3, **how) == answers(loaded, questions, 64, seed=3, **how)
    parts = [answers(loaded, questions[i : i + 2], seed=3, first=i, **how) for i in range(0, len(questions), 2)]
    assert drawn == [text for part in parts for text in part]
    other = answers(loaded, questions, 64, seed=4, **how)
    assert sum(a != b for a, b in zip(drawn, other, strict=True)) > len(questions) // 2
    assert answers(loaded, questions, **sampling(top_k=1)) == answers(loaded, questions)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8, "top_k": 0}], ids=str)
def test_tokens_are_drawn_as_often_as_they_are_likely(settings: dict[str, Any]) -> None:
    """Against probabilities that are written out here."""
    loaded, n = as_loaded(tiny_llava()), 20_000
    logits = 2 * torch.randn(60, generator=torch.Generator().manual_seed(0))
    rule = Sampler.of(loaded, "", {"do_sample": True, **settings}, 100)
    assert rule is not None
    rows = torch.tensor([[rule.temperature], [rule.top_k], [rule.top_p]], dtype=torch.float64).expand(3, n)
    draws = torch.stack([draw for number in range(n) if (draw := rule.draws(number, 1)) is not None])
    sampling = RowSampling(rows[0], rows[1].long(), rows[2], draws, True)
    drawn = choose_tokens(logits.expand(n, -1), [], sampling, first=True)
    share = (logits / settings.get("temperature", 1)).softmax(-1)
    order = share.argsort(descending=True)
    kept = order[: settings.get("top_k", 50) or len(share)]
    if "top_p" in settings:
        kept = order[: int((share[order].cumsum(-1) < settings["top_p"]).sum()) + 1]
    expected = torch.zeros(60).index_copy(0, kept, share[kept] / share[kept].sum())
    found = drawn.bincount(minlength=60) / n
    assert not found[expected == 0].any()
    torch.testing.assert_close(found, expected, atol=0.015, rtol=0)


# --- what is shared


def test_an_image_and_what_its_prompts_share_is_read_once(
    pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The language model reads each prompt's beginning once, then one position a step and question."""
    loaded = as_loaded(tiny_relook())
    seen: list[int] = []
    towers: list[int] = []
    model = loaded.model.model
    layer, tower = model.language_model.layers[0], model.vision_tower.forward
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))

    def counted_tower(pixel_values: Tensor, **more: Any) -> Any:
        towers.append(len(pixel_values))
        return tower(pixel_values, **more)

    monkeypatch.setattr(model.vision_tower, "forward", counted_tower)
    loaded.model.generation_config.eos_token_id = None
    answers(loaded, [(path, text) for path in pictures[:2] for text in TEXTS[:3]], max_new_tokens=4)
    ids = [loaded.encoder().prompt(text, [pictures[0]]) for text in TEXTS[:3]]
    common = next(i for i in range(100) if len({row[i] for row in ids}) > 1)
    assert towers == [2]
    assert seen == [2 * (common + sum(map(len, ids)) - 3 * common), *[2 * 3] * 3]


# --- images that cannot be read, and nothing asked


def test_an_image_that_cannot_be_read_is_named_and_costs_no_other_answer(pictures: list[Path], tmp_path: Path) -> None:
    loaded = as_loaded(tiny_llava())
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    questions: list[Question] = [(path, TEXTS[0]) for path in [*pictures, tmp_path / "bad.jpg"]]
    found = answer_questions(loaded, questions, GenerationSettings(max_new_tokens=2, batch_size=1), lambda *_: None)
    assert sorted(next(found)[0] for _ in pictures) == [0, 1, 2, 3]
    with pytest.raises(DataError, match=r"bad\.jpg"):
        next(found)


def test_nothing_asked(pictures: list[Path]) -> None:
    assert answers(as_loaded(tiny_llava()), []) == []
