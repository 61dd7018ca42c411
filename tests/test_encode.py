"""Ids and masks against the original's trainer: its outputs, and its rule of counting for any text."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.reference import IGNORE, IMAGE_ID, reference_tokenizer, v1_labels
from helpers.variants import variants
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from relook.data.encode import Encoder, Example
from relook.data.samples import Conversation, PreferencePair, Turn
from relook.data.templates import TEMPLATES, get_template, image_first
from relook.errors import DataError, RecipeError
from relook.model.load import load_model
from relook.model.tokenizer import load_tokenizer
from relook.toyworld.build import make_processor

VARIANTS = [f"llama_{v}/legacy_{legacy}" for v in ("cut_1024", "full_32000") for legacy in ("false", "true")]
TINY = "llama_cut_1024/legacy_false"
IMAGE = Path("image.png")


@pytest.fixture(scope="session")
def tokenizers(refdata: Path) -> dict[str, Any]:
    by_variant = {variant: reference_tokenizer(refdata, variant) for variant in VARIANTS}
    by_variant["chatml"] = copy.deepcopy(by_variant[VARIANTS[0]])
    by_variant["chatml"].add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    return by_variant


def encoder(tokenizer: Any, template: str = "v1", **options: Any) -> Encoder:
    """An encoder that writes an image as the original does: one position with id -200."""
    return Encoder(tokenizer, get_template(template), IMAGE_ID, 1, **options)


def sample(*turns: tuple[str, str], id: str = "s1") -> Conversation:
    images = sum(prompt.count("<image>") for prompt, _ in turns)
    return Conversation(id, (IMAGE,) * images, tuple(Turn(*turn) for turn in turns))


def rows(example: Example) -> list[tuple[list[int], list[int]]]:
    """Each branch with its prefix: ids and labels."""
    prefix = list(example.tree.prefix)
    return [
        (
            prefix + list(branch.ids),
            [IGNORE] * len(prefix) + [i if s else IGNORE for i, s in zip(branch.ids, branch.supervised, strict=True)],
        )
        for branch in example.tree.branches
    ]


def turns_of(messages: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(a["value"], s["value"]) for a, s in zip(messages[::2], messages[1::2], strict=True)]


@pytest.mark.parametrize("variant", variants(VARIANTS, (VARIANTS[0], VARIANTS[3])))
def test_ids_and_labels_of_the_original_trainer(refdata: Path, tokenizers: dict[str, Any], variant: str) -> None:
    cases = json.loads((refdata / "llava_tiny/training/preprocess_v1.json").read_text())["cases"]
    assert len(cases) == 4
    for case in cases.values():
        made = case["variants"][variant]
        [(ids, labels)] = rows(encoder(tokenizers[variant]).conversation(sample(*turns_of(case["conversations"]))))
        assert ids == made["input_ids"]
        assert labels == made["labels"]
        assert sum(label != IGNORE for label in labels) == made["n_trained_tokens"]


def test_hadpo_pins_differ_in_the_tokens_after_an_end_only(refdata: Path, tokenizers: dict[str, Any]) -> None:
    """transformers 4.31, which HA-DPO pins, has another tokenizer without `legacy`: after </s> it writes "US" "ER"
    where 4.37 has "USER". relook follows 4.37, with which the checkpoints' reference outputs were made. What is learned
    is the same."""
    pins = json.loads((refdata / "llava_tiny/training/preprocess_v1_hadpo_pins.json").read_text())["cases"]
    cases = json.loads((refdata / "llava_tiny/training/preprocess_v1.json").read_text())["cases"]
    differing = set()
    for name, by_variant in pins.items():
        for variant, pinned in by_variant.items():
            if pinned["same_input_ids"]:
                continue
            differing.add((name, variant))
            tokenizer = tokenizers[variant]
            [(ids, labels)] = rows(encoder(tokenizer).conversation(sample(*turns_of(cases[name]["conversations"]))))
            assert [i for i in labels if i != IGNORE] == [i for i in pinned["labels"] if i != IGNORE]
            first, later = ids.index(2) + 1, pinned["input_ids"].index(2) + 1
            assert ids[:first] == pinned["input_ids"][:later]
            assert tokenizer.decode(ids[first]) + ":" == tokenizer.decode(pinned["input_ids"][later:][:3])[:5]
            colon = ids.index(tokenizer.convert_tokens_to_ids(":"), first)
            assert ids[colon:] == pinned["input_ids"][pinned["input_ids"].index(ids[colon], later) :]
    assert differing == {(n, v) for n in ("two_turns", "text_only") for v in VARIANTS if "false" in v}


@pytest.mark.parametrize("name", ["dpo_A", "dpo_B_same_reference"])
def test_pairs_of_the_original_dpo_trainer(refdata: Path, tokenizers: dict[str, Any], name: str) -> None:
    case = json.loads((refdata / f"llava_tiny/training/{name}.json").read_text())
    [(asked, chosen)], [(_, rejected)] = (turns_of(case["pairs"][0][side]) for side in ("chosen", "rejected"))
    pair = PreferencePair("p", (IMAGE,), asked.removeprefix("<image>\n"), chosen, rejected)
    both = rows(encoder(tokenizers[TINY]).pair(pair))
    with np.load(refdata / f"llava_tiny/training/{name}.npz") as arrays:
        for (ids, labels), side in zip(both, ("chosen", "reject"), strict=True):
            mask = arrays[f"{side}_attention_mask"][0]
            assert ids == arrays[f"{side}_input_ids"][0][mask].tolist()
            assert labels == arrays[f"{side}_labels"][0][mask].tolist()


@pytest.mark.parametrize("case", ["case_A", "case_B", "text_only"])
def test_open_prompts_of_the_original(refdata: Path, tokenizers: dict[str, Any], case: str) -> None:
    case_record = json.loads((refdata / f"llava_tiny/outputs/{case}.json").read_text())
    *history, (text, _) = case_record.get("turns", [("What is 12 plus 30?", None)])
    history = [Turn(prompt, answered) for prompt, answered in history]
    ids = encoder(tokenizers[TINY], case_record.get("conv_mode", "v1")).prompt(
        text, len(case_record.get("images", [])), history
    )
    assert list(ids) == case_record["input_ids"]


# Text of all sorts, with what a template itself writes among it.
MARKS = ["ASSISTANT:", " ASSISTANT: ", "USER:", "</s>", "<s>", "<unk>", "[/INST] ", "###"]
FRAGMENTS = [*MARKS, "<image", "image>", " ", "\n"]
CHARACTERS = st.characters(exclude_categories=("Cs",), exclude_characters="▁")
TEXT = st.lists(st.sampled_from(FRAGMENTS) | st.text(CHARACTERS, max_size=8), max_size=6).map("".join)


@settings(max_examples=150, deadline=None)
@given(turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3), variant=st.sampled_from(VARIANTS))
def test_the_original_s_labels_or_an_error_where_it_masks_all(
    turns: list[tuple[str, str]], variant: str, tokenizers: dict[str, Any]
) -> None:
    assume(not any("<image>" in text for turn in turns for text in turn))
    turns = [(image_first(f"<image>{turns[0][0]}"), turns[0][1]), *turns[1:]]
    rendered = "".join(piece.text for piece in get_template("v1").render([Turn(*turn) for turn in turns]))
    expected = v1_labels(tokenizers[variant], rendered, legacy="true" in variant)
    try:
        [(_, labels)] = rows(encoder(tokenizers[variant]).conversation(sample(*turns)))
    except DataError:
        # Refused too: an empty turn (the original writes no text for it, and then masks all); an end within a text and
        # a prompt that ends with the cue (its count may come out, but what it learns is not the answer).
        odd = any(not p or not a or "</s>" in p + a or f" {p}".endswith(" ASSISTANT:") for p, a in turns)
        assert expected is None or odd
    else:
        assert labels == expected


@settings(max_examples=150, deadline=None)
@given(
    turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3),
    variant=st.sampled_from(VARIANTS),
    template=st.sampled_from(sorted(TEMPLATES.keys() - {"plain", "v0_plain"})),
)
def test_learned_tokens_are_the_answers_and_their_ends(
    turns: list[tuple[str, str]], variant: str, template: str, tokenizers: dict[str, Any]
) -> None:
    # A special token within an answer is kept as its id; the space that a legacy tokenizer writes after it is not text.
    turns = [(prompt, re.sub("<(s|unk)>", "", answer)) for prompt, answer in turns]
    assume(not any(re.search("<(s|unk)>", answer) for _, answer in turns))
    kind = get_template(template)
    tokenizer = tokenizers["chatml" if kind.end == "<|im_end|>" else variant]
    try:
        [(_, labels)] = rows(encoder(tokenizer, template).conversation(sample(*turns)))
    except DataError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert "s1" in refused
        return
    runs: list[list[int]] = []
    for before, now in zip([IGNORE, *labels], labels, strict=False):
        if now != IGNORE:
            runs = [*runs, []] if before == IGNORE else runs
            runs[-1].append(now)
    x = tokenizer.convert_tokens_to_ids("x")  # decoding takes away a space at the very front
    decoded = [tokenizer.decode([x, *run]) for run in runs]
    assert decoded == [f"x{kind.lead}{answer}{kind.end}" for _, answer in turns]


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        ("v1", [("Q", "He said ASSISTANT: no.")], "has 'ASSISTANT:' in its text"),
        ("v1", [("What does ASSISTANT: mean?", "A")], "has 'ASSISTANT:' in its text"),
        ("v1", [("Q", "A</s>")], "has '</s>' in its text"),
        ("v1", [("Q </s>", "A")], "has '</s>' in its text"),
        ("llama_2", [("Q", "a [/INST] b")], "in its text, a mark of template llama_2"),
        ("mpt", [("Q", "a<|im_end|>")], "in its text, a mark of template mpt"),
        ("v0", [("Q", "### Title")], "has '###' in its text"),
        ("v1", [("Q", "")], "empty prompt or answer"),
        ("v1", [("", "A")], "empty prompt or answer"),
        ("v1", [], "has no turns"),
        ("v1", [("Q", "\ud83d")], "not valid Unicode"),
        ("plain", [("Q", "a chair")], "not one image with one caption"),
        ("plain", [("<image>", "a chair"), ("Q", "A")], "not one image with one caption"),
    ],
)
def test_what_cannot_be_learned_from_names_the_sample(
    tokenizers: dict[str, Any], template: str, turns: list[tuple[str, str]], message: str
) -> None:
    with pytest.raises(DataError, match="s1") as error:
        encoder(tokenizers[TINY], template).conversation(sample(*turns))
    assert message in str(error.value)


def test_a_token_that_is_half_answer_is_refused(tokenizers: dict[str, Any]) -> None:
    """Without <|im_end|> in the vocabulary its last ">" and the next "<" are one token of Llama's."""
    two = sample(("Q", "A"), ("Q", "A"))
    with pytest.raises(DataError, match=r"Sample s1: a token lies half.*Template mpt does not suit"):
        encoder(tokenizers["llama_full_32000/legacy_true"], "mpt").conversation(two)
    assert len(rows(encoder(tokenizers["chatml"], "mpt").conversation(two))) == 1


def test_images_and_placeholders_must_agree(tokenizers: dict[str, Any]) -> None:
    encode = encoder(tokenizers[TINY])
    with pytest.raises(DataError, match=r"Sample x has 0 <image>, but 1 images"):
        encode.conversation(Conversation("x", (IMAGE,), (Turn("Q", "A"),)))
    with pytest.raises(DataError, match=r"Sample p has <image> in an answer"):
        encode.pair(PreferencePair("p", (IMAGE,), "Q", "an <image>", "A"))
    with pytest.raises(DataError, match=r"The prompt has 1 <image>, but 2 images"):
        encode.prompt("<image> Q", images=2)


def test_conversations_share_a_tree_where_their_image_lies_in_its_prefix(tokenizers: dict[str, Any]) -> None:
    """One image beside an answer, or behind another start, would stand in a branch, once for each of them."""
    asked, said = ("<image>\nWhat?", "A cup."), ("Hello.", "Hi.")
    samples = [
        sample(said, asked, id="later"),
        sample(asked, said, id="first"),
        sample(said, ("<image>\nWhere?", "There."), id="later too"),
        sample(("<image>\nWhere?", "There."), id="first too"),
        sample(("Where? <image>", "Here."), id="moved to the front"),
    ]
    plain = encoder(tokenizers[TINY])
    examples = plain.conversations(samples, 9)
    assert [(example.id, len(example.tree.branches)) for example in examples] == [
        ("first", 3),
        ("later", 1),
        ("later too", 1),
    ]
    for example in examples:
        images = [row.ids.count(IMAGE_ID) for row in example.tree.branches]
        assert example.tree.prefix.count(IMAGE_ID) + sum(images) == len(example.images)
    alone = {id: rows(plain.conversation(one)) for id, one in ((one.id, one) for one in samples)}
    together = [row for example in examples for row in rows(example)]
    assert sorted(together) == sorted(row for found in alone.values() for row in found)


def test_prompts_with_no_and_several_images(tokenizers: dict[str, Any]) -> None:
    encode = encoder(tokenizers[TINY])
    assert encode.prompt("Q") == encode.prompt("<image>\nQ")
    assert encode.prompt("Q", images=2) == encode.prompt("<image>\n<image>\nQ", images=2)
    assert encode.prompt("Q", images=2).count(IMAGE_ID) == 2
    assert IMAGE_ID not in encode.prompt("Q", images=0)
    first = encode.prompt("And now?", images=1, history=[Turn("Q", "A")])
    assert first == encode.prompt("And now?", images=1, history=[Turn("<image>\nQ", "A")])
    three = Encoder(tokenizers[TINY], get_template("v1"), IMAGE_ID, 3)
    assert three.prompt("Q").count(IMAGE_ID) == 3


def test_image_marks_stand_around_each_image(refdata: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).write_bytes((refdata / "tokenizers/llama_cut_1024" / name).read_bytes())
    (tmp_path / "config.json").write_text('{"mm_use_im_start_end": true}')
    tokenizer = load_tokenizer(tmp_path)
    marked = encoder(tokenizer, image_start_end=True)
    pieces = get_template("v1").render([Turn("<im_start><image><im_end>\nWhat?", "")], open_end=True)
    by_hand = encoder(tokenizer).row(pieces, [1]).ids
    assert marked.prompt("What?") == by_hand
    start, end = tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    at = by_hand.index(IMAGE_ID)
    assert (by_hand[at - 1], by_hand[at + 1]) == (start, end)
    [(ids, labels)] = rows(marked.conversation(sample(("What?\n<image>", "A"))))
    assert tuple(ids[: len(by_hand)]) == by_hand
    assert set(labels[: len(by_hand)]) == {IGNORE}


def test_projector_pretraining_learns_the_caption(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["llama_full_32000/legacy_true"]
    [(ids, labels)] = rows(encoder(tokenizer, "plain").conversation(sample(("<image>\nDescribe.", "a red chair"))))
    caption = tokenizer("a red chair\n").input_ids[1:]
    assert ids == [1, IMAGE_ID, *caption]
    assert labels == [IGNORE, IGNORE, *caption]


def test_a_template_that_ends_otherwise_is_refused() -> None:
    tokenizer = make_processor().tokenizer
    tokenizer.eos_token = "<pad>"
    with pytest.raises(RecipeError, match=r"Template v1 ends an answer with </s>"):
        encoder(tokenizer)


def test_too_long_is_refused_not_cut(tokenizers: dict[str, Any]) -> None:
    length = len(encoder(tokenizers[TINY]).prompt("Q"))
    assert len(encoder(tokenizers[TINY], max_length=length).prompt("Q")) == length
    with pytest.raises(DataError, match=f"has {length} positions, more than model_max_length {length - 1}"):
        encoder(tokenizers[TINY], max_length=length - 1).prompt("Q")


def test_an_id_that_the_model_does_not_embed_is_refused_before_it_is_a_device_side_assert(
    tokenizers: dict[str, Any],
) -> None:
    """A tokenizer with more tokens than the model: an added token has the first id behind the embeddings."""
    tokenizer = tokenizers["chatml"]
    first = tokenizer.convert_tokens_to_ids("<|im_start|>")
    made = encoder(tokenizer, embeddings=first)
    assert made.prompt("Q") == encoder(tokenizer).prompt("Q")
    with pytest.raises(DataError, match=rf"Sample s1 has the token '<\|im_start\|>' of id {first}"):
        made.conversation(sample(("<image>\nWhat is <|im_start|>?", "A mark.")))
    assert encoder(tokenizer, embeddings=first + 2).prompt("<|im_start|>")


def test_a_loaded_model_s_encoder_knows_its_embeddings(base: Path) -> None:
    loaded = load_model(base)
    loaded.processor.tokenizer.add_tokens(["zebra"])  # without resizing the model
    rows_of_it = loaded.core.get_input_embeddings().weight.shape[0]
    assert loaded.encoder().embeddings == rows_of_it
    with pytest.raises(DataError, match="'zebra'"):
        loaded.encode(text="a zebra")


def test_toyworld_s_words_keep_their_tokens() -> None:
    """A word-level tokenizer: ids by hand from its vocabulary, and nothing unknown at line breaks."""
    tokenizer = make_processor().tokenizer
    encode = Encoder(tokenizer, get_template("llava_hf"), tokenizer.convert_tokens_to_ids("<image>"), 2)
    example = encode.conversation(sample(("<image>\nIs there a dog?", "Yes"), ("Is there a cat?", "No")))
    [(ids, labels)] = rows(example)
    assert " ".join(tokenizer.convert_ids_to_tokens(ids)) == (
        "<s> ▁USER : <image> <image> ▁Is ▁there ▁a ▁dog ? ▁ASSISTANT : ▁Yes </s> "
        "▁USER : ▁Is ▁there ▁a ▁cat ? ▁ASSISTANT : ▁No </s>"
    )
    assert [i for i in labels if i != IGNORE] == tokenizer.convert_tokens_to_ids(["▁Yes", "</s>", "▁No", "</s>"])
