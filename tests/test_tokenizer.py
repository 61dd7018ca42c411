"""Tokenizers against the ids of transformers 4.37's slow LlamaTokenizer, and sentencepiece's rule of merging."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.reference import ids_around_images, reference_tokenizer
from helpers.variants import variants
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from relook.data.encode import Encoder
from relook.data.samples import Turn
from relook.data.special_tokens import LiteralText
from relook.data.templates import get_template
from relook.errors import CheckpointError, RelookError
from relook.model.tokenizer import decode_bytes, load_tokenizer, read_pieces, token_bytes

VARIANTS = [f"llama_{v}/legacy_{legacy}" for v in ("cut_1024", "full_32000") for legacy in ("false", "true")]
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}


@pytest.fixture(scope="module", params=variants(VARIANTS, (VARIANTS[0], VARIANTS[3])))
def variant(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tokenizer(refdata: Path, variant: str) -> Any:
    return reference_tokenizer(refdata, variant)


@pytest.fixture(scope="module")
def slow(refdata: Path, variant: str) -> Callable[[str], list[int]]:
    return SentencePiece(refdata / "tokenizers" / variant.split("/")[0] / "tokenizer.model", "true" in variant)


@pytest.fixture(scope="module")
def encoders(tokenizer: Any) -> dict[str, Encoder]:
    """Of a template that ends answers with </s>, and of one that writes <s>, too."""
    templates = {"llava_hf": get_template("llava_hf"), "llama_2": replace(get_template("llama_2"), first="[INST] ")}
    return {name: Encoder(tokenizer, template, -200, 1) for name, template in templates.items()}


class SentencePiece:
    """sentencepiece's BPE by its definition, and the slow tokenizer's cutting at special tokens, slowly."""

    def __init__(self, path: Path, legacy: bool) -> None:
        pieces = read_pieces(path)
        self.id = {piece.text: i for i, piece in enumerate(pieces)}
        self.score = {piece.text: piece.score for piece in pieces if piece.kind == 1}
        self.legacy = legacy

    def __call__(self, text: str, typed: Mapping[str, str] | None = None) -> list[int]:
        """`typed` has characters that stand for special tokens that are to be read as text."""
        if not self.legacy and text:
            text = " " + text
        parts, ids = self._cut(text), [1]
        if not self.legacy and len(parts) > 1 and parts[0] == " " and parts[1] in SPECIAL:
            parts = parts[1:]
        for part in parts:
            if part in SPECIAL:
                ids.append(SPECIAL[part])
                continue
            for stand_in, token in (typed or {}).items():
                part = part.replace(stand_in, token)
            ids += self._merge(" " * self.legacy + part)
        return ids

    @staticmethod
    def _cut(text: str) -> list[str]:
        for token in SPECIAL:
            text = text.replace(token, f"\0{token}\0")
        return [part for part in text.split("\0") if part]

    def _merge(self, text: str) -> list[int]:
        symbols = list(text.replace(" ", "▁"))
        while True:
            pairs = [(self.score.get(a + b), i) for i, (a, b) in enumerate(pairwise(symbols))]
            known = [(-score, i) for score, i in pairs if score is not None]
            if not known:
                break
            _, i = min(known)  # the best score, the leftmost among equals
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        bytes_of = [[s] if s in self.score else [f"<0x{b:02X}>" for b in s.encode()] for s in symbols]
        return [self.id[s] for piece in bytes_of for s in piece]


def test_all_reference_prompts(refdata: Path, variant: str, tokenizer: Any) -> None:
    cases = json.loads((refdata / "llava_tiny/training/tokenizer_image_token.json").read_text())[variant]
    assert len(cases) == 7
    assert {c["prompt"]: ids_around_images(tokenizer, c["prompt"]) for c in cases} == {
        c["prompt"]: c["ids"] for c in cases
    }


def test_leading_space_keeps_its_prefix(tokenizer: Any, variant: str) -> None:
    if "full" in variant:
        assert tokenizer(" Hello").input_ids == [1, 29871, 15043]
        # 11889 is "USER", 3148 1001 is " US" "ER": the space after </s> that only the legacy tokenizer writes.
        assert tokenizer("</s>USER").input_ids == ([1, 2, 3148, 1001] if "true" in variant else [1, 2, 11889])
    else:
        assert tokenizer(" Hello").input_ids == [1, 904, 379, 295, 417]


TEXTS = st.lists(
    st.sampled_from(
        [*SPECIAL, " ", "  ", "\n", "▁", "USER:", " ASSISTANT: ", "the", "----", "anan", "<0x0A>", "é", "日"]
    )
    | st.text("ab-= .0", max_size=20)
    | st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=6)
).map("".join)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_any_text_as_sentencepiece_merges_it(text: str, tokenizer: Any, slow: Callable[[str], list[int]]) -> None:
    assert tokenizer(text).input_ids == slow(text)


@settings(max_examples=50, deadline=None)
@given(spaces=st.integers(0, 60))
def test_runs_of_spaces(spaces: int, tokenizer: Any, slow: Callable[[str], list[int]]) -> None:
    assert tokenizer(f"a{' ' * spaces}b").input_ids == slow(f"a{' ' * spaces}b")


TYPED = {"\x01": "<unk>", "\x02": "<s>", "\x03": "</s>"}


@settings(max_examples=50, deadline=None)
@given(
    turns=st.lists(st.lists(st.sampled_from([*TYPED, *TYPED, "a", " ", "\n", "<", "/s", "é"])), min_size=1, max_size=3)
)
def test_special_tokens_that_somebody_types_are_text(
    turns: list[list[str]],
    encoders: dict[str, Encoder],
    slow: Callable[[str, Mapping[str, str]], list[int]],
) -> None:
    """In questions and in the answers before them; the template's own end turns as ever."""
    for encoder in encoders.values():
        *history, last = ["".join(turn) for turn in turns]
        rendered = encoder.template.render([*(Turn(text, text) for text in history), Turn(last, "")], open_end=True)

        def typed(text: str) -> str:
            return "".join(TYPED.get(c, c) for c in text)

        ids = encoder.prompt(typed(last), 0, [Turn(typed(text), typed(text)) for text in history])
        assert list(ids) == slow("".join(piece.text for piece in rendered), TYPED)


def test_what_stands_for_special_tokens_is_text_when_it_is_typed(tokenizer: Any, encoders: dict[str, Encoder]) -> None:
    encoder = encoders["llava_hf"]
    for token in SPECIAL:
        stand_in = LiteralText(tokenizer).escape(token)
        assert stand_in != token
        assert encoder.prompt(f"a {stand_in} b", 0) == encoder.prompt(f"a {token} b", 0)
        ids = encoder.prompt(f"a {token} b", 0)
        assert SPECIAL[token] not in ids[1:]


@pytest.mark.parametrize("case", ["A", "B"])
def test_decodes_what_the_original_generated(refdata: Path, tokenizer: Any, variant: str, case: str) -> None:
    if "cut" in variant:
        made = json.loads((refdata / f"llava_tiny/outputs/case_{case}.json").read_text())
        assert tokenizer.decode(made["generated_ids"]) == made["generated_text_with_special"]
        text = tokenizer.decode(made["generated_ids"], skip_special_tokens=True)
        assert text == made["generated_text_skip_special"]


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_bytes_of_tokens_join_to_the_text(text: str, tokenizer: Any) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    joined = b"".join(token_bytes(tokenizer, id) for id in ids).decode()
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert joined in (decoded, f" {decoded}")  # a decoder strips the first space


@pytest.mark.parametrize("variant", VARIANTS[:1], indirect=True)
def test_a_half_character_leaves_the_others_whole(tokenizer: Any) -> None:
    """sentencepiece 0.2.3's `decode` of the same pieces, run by hand."""
    cases = {
        b"\xf0\x9f\x98\x80\xf0\x9f": "😀\ufffd\ufffd",
        b"\xc3@\x80": "\ufffd@\ufffd",
        b"\xc3\xa9\xc3": "é\ufffd",
        b"\xf0\x9fa": "\ufffd\ufffda",
    }
    for data, text in cases.items():
        ids = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in data])
        assert decode_bytes(tokenizer, ids) == text


def test_bytes_of_a_byte_level_vocabulary() -> None:
    """GPT-2's kind of tokenizer, made by the tokenizers library, with no merges: a token is a byte."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator([], trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "a 狗! 😀\n\x7f\xa0é"
    ids = tokenizer(text).input_ids
    assert [token_bytes(tokenizer, id) for id in ids] == [bytes([byte]) for byte in text.encode()]


def test_saved_tokenizer_is_the_same_without_relook(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    for again in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        for text in (" Hello", "</s>USER: a", "a          b", "x </s> y"):
            assert again(text).input_ids == tokenizer(text).input_ids
        assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (1, 2, 0)


@pytest.fixture
def folder(refdata: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(refdata / "tokenizers/llama_cut_1024" / name, folder / name)
    return folder


def test_image_marks_of_old_checkpoints(folder: Path) -> None:
    """LLaVA's builder adds these tokens when it loads a checkpoint that uses them and whose tokenizer lacks them."""
    (folder / "config.json").write_text('{"mm_use_im_patch_token": true, "mm_use_im_start_end": true}')
    tokenizer = load_tokenizer(folder)
    assert tokenizer.convert_tokens_to_ids(["<im_patch>", "<im_start>", "<im_end>"]) == [1024, 1025, 1026]
    assert len(tokenizer) == 1027
    (folder / "added_tokens.json").write_text('{"<im_start>": 1024, "<im_end>": 1025, "<im_patch>": 1026}')
    assert load_tokenizer(folder).convert_tokens_to_ids("<im_patch>") == 1026
    # The difference that load_tokenizer's docstring names: the original has 904 ("▁") between BOS and <im_end>.
    assert load_tokenizer(folder)("<im_end>\n").input_ids == [1, 1025, 13]


def test_no_bos_where_the_folder_says_so(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    assert load_tokenizer(folder)("Hello").input_ids == [379, 295, 417]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"not a model", "not a whole sentencepiece model"),
        ("tokenizer.model", b"", "not a sentencepiece model of Llama's kind"),
        ("tokenizer.json", b'{"model": {}}', "cannot be read"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json"),
        ("added_tokens.json", b'{"<im_start>": 7}', "should have id 7"),
    ],
)
def test_broken_files_are_named(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(RelookError, match=message):
        load_tokenizer(folder)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(1, 14_556))
def test_a_cut_model_is_refused(refdata: Path, tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "tokenizer.model"
    path.write_bytes((refdata / "tokenizers/llama_cut_1024/tokenizer.model").read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        read_pieces(path)


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json or tokenizer\.model"):
        load_tokenizer(tmp_path)
