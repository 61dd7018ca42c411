"""Templates against the prompt strings of the original program, and against its layouts written out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from relook.data.samples import Turn
from relook.data.templates import EOS, IMAGE, TEMPLATES, get_template, image_first, with_image
from relook.errors import RecipeError


def text(name: str, turns: list[Turn], open_end: bool = False) -> str:
    return "".join(piece.text for piece in get_template(name).render(turns, open_end))


TWO = [Turn("Q1", "A1"), Turn("Q2", "A2")]


@pytest.mark.parametrize("case", ["case_A", "case_B"])
def test_prompts_of_the_original(refdata: Path, case: str) -> None:
    made = json.loads((refdata / f"llava_tiny/outputs/{case}.json").read_text())
    turns = [Turn(asked, answered or "") for asked, answered in made["turns"]]
    assert text(made["conv_mode"], turns, open_end=True) == made["prompt"]


def test_prompts_of_the_original_trainer(refdata: Path) -> None:
    cases = json.loads((refdata / "llava_tiny/training/preprocess_v1.json").read_text())["cases"]
    assert len(cases) == 4
    for case in cases.values():
        messages = case["conversations"]
        turns = [Turn(image_first(a["value"]), s["value"]) for a, s in zip(messages[::2], messages[1::2], strict=True)]
        assert text("v1", turns) == case["prompt"]
        assert [turn.prompt for turn in turns] == [m["value"] for m in case["after_preprocess_multimodal"][::2]]


@pytest.mark.parametrize(
    ("name", "system", "rest"),
    [
        ("v1", "A chat between a curious user ", "user's questions. USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"),
        ("llava_v1", "A chat between a curious human ", "questions. USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"),
        ("llava_hf", "USER: Q1", "USER: Q1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:"),
        ("llava_v0", "A chat between a curious human ",
         "human's questions.###Human: Q1###Assistant: A1###Human: Q2###Assistant:"),
        ("v0", "A chat between a curious human ",
         "instability.\n###Human: Q1###Assistant: A1###Human: Q2###Assistant:"),
        ("llama_2", "[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant. Always answer as helpfully as "
         "possible, while being safe.  Your", "information.\n<</SYS>>\n\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST]"),
        ("llava_llama_2", "[INST] <<SYS>>\nYou are a helpful language and vision assistant.",
         "natural language.\n<</SYS>>\n\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST]"),
        ("mistral", "[INST] Q1", "[INST] Q1 [/INST] A1 </s>[INST] Q2 [/INST]"),
        ("mpt", "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant.",
         " honest answers.<|im_end|><|im_start|>user\nQ1<|im_end|><|im_start|>assistant\nA1<|im_end|>"
         "<|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n"),
        ("chatml", "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nQ1",
         "user\nQ1<|im_end|><|im_start|>assistant\nA1<|im_end|><|im_start|>user\nQ2<|im_end|><|im_start|>assistant\n"),
    ],
)  # fmt: skip
def test_layout_of_two_turns(name: str, system: str, rest: str) -> None:
    prompt = text(name, TWO, open_end=True)
    assert prompt.startswith(system)
    assert prompt.endswith(rest)
    end = {"v0": "###", "llava_v0": "###", "mpt": "<|im_end|>", "chatml": "<|im_end|>"}.get(name, EOS)
    whole = text(name, TWO)
    assert whole.startswith(prompt)
    assert whole[len(prompt) :].split("A2")[1].strip() == end
    assert [p.text.strip() for p in get_template(name).render(TWO) if p.supervised] == [
        text(name, TWO)[whole.index(a) :][: len(a) + len(get_template(name).end)] for a in ("A1", "A2")
    ]


def test_plain_keeps_the_image_and_the_caption_only() -> None:
    turn = Turn("<image>\nGive a short caption.", "a red chair")
    assert text("plain", [turn]) == "<image>a red chair\n"
    assert [p.supervised for p in get_template("plain").render([turn])] == [False, True]
    assert text("plain", [turn], open_end=True) == "<image>\nGive a short caption.\n"


@pytest.mark.parametrize(
    ("alias", "name"),
    [("vicuna_v1", "v1"), ("mistral_instruct", "mistral"), ("chatml_direct", "chatml"), ("v0_plain", "plain")],
)
def test_other_names_of_the_original(alias: str, name: str) -> None:
    assert get_template(alias) is TEMPLATES[name]


def test_unknown_template_lists_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"'v2'.*v0.*llava_llama_2.*mistral_instruct"):
        get_template("v2")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("What?\n<image>", "<image>\nWhat?"),
        ("<image> What? ", "<image>\nWhat?"),
        ("a <image> b", "<image>\na  b"),
        ("<image>", "<image>"),
        (" no image ", " no image "),
        ("<image> or <image>", "<image> or <image>"),
    ],
)
def test_image_first(given: str, expected: str) -> None:
    assert image_first(given) == expected


def test_with_image() -> None:
    assert with_image("Q") == "<image>\nQ"
    assert with_image("Q", images=2) == f"{IMAGE}\n{IMAGE}\nQ"
    assert with_image("Q <image>") == "Q <image>"
