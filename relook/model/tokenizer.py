"""Tokenizers of model folders, exactly as the original programs read them.

transformers 5 rebuilds a Llama tokenizer from `tokenizer.model` with two differences to the sentencepiece one that
LLaVA was trained with: merges are ranked by index where sentencepiece ranks them by score (the space-only pieces of
Llama have low indices and the lowest score), and a text that begins with a space loses the space that sentencepiece
puts before it. The tokenizer built here has neither.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from relook.data.templates import IM_END, IM_PATCH, IM_START
from relook.errors import CheckpointError, RelookError
from relook.files import read_object

SPACE = "▁"  # how sentencepiece writes a space
# Field numbers and values of sentencepiece_model.proto.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
BPE = 2


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder: its `tokenizer.json` as it stands, or else one built from `tokenizer.model`.

    Where config.json asks for image marks (`mm_use_im_patch_token`, `mm_use_im_start_end`) that the tokenizer lacks,
    they are added at its end, as LLaVA's builder does.

    Built from `tokenizer.model`, it gives the ids of transformers 4.37's slow LlamaTokenizer, in either setting of
    `legacy` (of tokenizer_config.json; true where the key is absent, as there):

    - legacy: a space goes before every stretch of text, at the start and after each special token.
    - not legacy: a space goes before the text only, and nowhere if it begins with a special token.

    One difference remains, without `legacy` only: where a text begins with an added token that is none of the named
    special ones (`<im_end>` of old checkpoints; their tokenizers are legacy), the original puts a lone space piece
    before it and this tokenizer does not, as the tokenizers library puts no prefix before an added token.

    Raises:
        CheckpointError: there is no tokenizer, it cannot be read, or it is of a kind that would not be read exactly.
    """
    try:
        if (folder / "tokenizer.json").exists():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        elif (folder / "tokenizer.model").exists():
            tokenizer = _from_sentencepiece(folder)
        else:
            raise CheckpointError(
                f"{folder} has no tokenizer.json or tokenizer.model.", "Copy them from the base model."
            )
        config = read_object(folder / "config.json", optional=True)
        marks = [IM_PATCH] * bool(config.get("mm_use_im_patch_token"))
        marks += [IM_START, IM_END] * bool(config.get("mm_use_im_start_end"))
        tokenizer.add_tokens(marks, special_tokens=True)  # those that it has are left alone
    except RelookError:
        raise
    except Exception as error:  # bare Exception is what the tokenizers library raises for a file that it cannot parse
        raise CheckpointError(f"The tokenizer of {folder} cannot be read: {error}.", "Copy it again.") from None
    return tokenizer


@dataclass(frozen=True)
class Piece:
    """An entry of a sentencepiece vocabulary."""

    text: str
    score: float
    kind: int


def read_pieces(path: Path) -> list[Piece]:
    """The vocabulary of a sentencepiece model file, in order of ids.

    Raises:
        CheckpointError: the file is no sentencepiece BPE model, or its normalizer changes the text.
    """
    pieces, trainer, normalizer = [], {}, {}
    try:
        for number, value in _fields(path.read_bytes()):
            if number == PIECES:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
                pieces.append(Piece(piece[1].decode(), score, piece.get(3, NORMAL)))
            elif number == TRAINER:
                trainer = dict(_fields(value))
            elif number == NORMALIZER:
                normalizer = dict(_fields(value))
    except (IndexError, KeyError, TypeError, AttributeError, ValueError, struct.error):
        raise CheckpointError(f"{path} is not a whole sentencepiece model.", "Copy or download it again.") from None
    # Llama's kind: BPE; no character map (2), a prefix space (3), spaces kept (4) and written as SPACE (5).
    found = (trainer.get(3), *(normalizer.get(n, default) for n, default in ((2, b""), (3, 1), (4, 1), (5, 1))))
    if found != (BPE, b"", 1, 0, 1):
        raise CheckpointError(
            f"{path} is not a sentencepiece model of Llama's kind (BPE that leaves the text as it is).",
            "Save its tokenizer.json with transformers and put that into the folder.",
        )
    return pieces


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Fields of a protobuf message: number, and an int (varint) or bytes (anything else)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if at + size > len(data):
            raise ValueError("cut off")
        yield number, data[at : at + size]
        at += size


def merges_of(pieces: list[Piece]) -> list[tuple[str, str]]:
    """The merges of a sentencepiece BPE vocabulary, best first: every way to put a piece together from two others.

    sentencepiece merges the pair that makes the piece with the best score, the leftmost among equals. Only Llama's
    space-only pieces share a score; with the longest left half first, a run of them grows from its left end as there.
    """
    scores = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    merges = [
        (text[:cut], text[cut:])
        for text in scores
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    return sorted(merges, key=lambda merge: (-scores[merge[0] + merge[1]], -len(merge[0])))


def _backend(pieces: list[Piece], unk: str, legacy: bool) -> Tokenizer:
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece.text: i for i, piece in enumerate(pieces)},
            merges=merges_of(pieces),
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=any(piece.kind == BYTE for piece in pieces),
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
    else:
        # Metaspace leaves out the prefix where the text begins with it. A plain space is none after `spaces`: it is put
        # before the text whatever that begins with, then written as SPACE.
        tokenizer.normalizer = spaces
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False),
                pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False),
            ]
        )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _from_sentencepiece(folder: Path) -> PreTrainedTokenizerFast:
    config, special, added = (
        read_object(folder / f"{name}.json", optional=True)
        for name in ("tokenizer_config", "special_tokens_map", "added_tokens")
    )
    pieces = read_pieces(folder / "tokenizer.model")
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    for name in (*names, "pad_token"):
        given = special.get(name) or config.get(name)
        if given:
            names[name] = given["content"] if isinstance(given, dict) else given
    names.setdefault("pad_token", names["unk_token"])  # as LLaVA's trainer sets it

    tokenizer = _backend(pieces, names["unk_token"], config.get("legacy", True))
    decoder = config.get("added_tokens_decoder", {})
    wanted = {int(id): entry for id, entry in decoder.items()}
    wanted |= {id: {"content": text} for text, id in added.items() if id not in wanted}
    wanted |= {
        i: {"content": piece.text, "special": piece.kind != USER_DEFINED}
        for i, piece in enumerate(pieces)
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED) and i not in wanted
    }
    for id, entry in sorted(wanted.items()):
        # Never `normalized`: the original cuts the text at added tokens before anything else.
        token = AddedToken(
            entry["content"],
            lstrip=entry.get("lstrip", False),
            rstrip=entry.get("rstrip", False),
            single_word=entry.get("single_word", False),
            normalized=False,
            special=entry.get("special", entry["content"] in names.values()),
        )
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
        if tokenizer.token_to_id(token.content) != id:
            raise CheckpointError(
                f"{folder}: the added token {token.content!r} should have id {id}, "
                f"but gets {tokenizer.token_to_id(token.content)}.",
                "Check tokenizer_config.json and added_tokens.json against the vocabulary.",
            )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        add_bos_token=config.get("add_bos_token", True),
        add_eos_token=config.get("add_eos_token", False),
        model_max_length=config.get("model_max_length", 2048),
        padding_side=config.get("padding_side", "right"),
        clean_up_tokenization_spaces=False,
        **names,
    )
