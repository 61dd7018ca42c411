"""Tokenizers of model folders, exactly as the original programs read them.

transformers 5 rebuilds a Llama tokenizer from `tokenizer.model`, with two differences from the sentencepiece tokenizer
that LLaVA was trained with. It ranks merges by index, whereas sentencepiece ranks them by score: Llama's space-only
pieces have low indices and the lowest score. And a text that begins with a space loses the space that sentencepiece
puts before it. The tokenizer built here has neither difference.
"""

from __future__ import annotations

import codecs
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from relook.data.templates import IM_END, IM_PATCH, IM_START
from relook.errors import CheckpointError, RelookError
from relook.files import read_json_object

SPACE = "▁"  # how sentencepiece writes a space
# Field numbers and values of sentencepiece_model.proto.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
BPE = 2


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """Load a model folder's tokenizer: its `tokenizer.json` unchanged, or else one built from `tokenizer.model`.

    If config.json asks for image tokens (`mm_use_im_patch_token`, `mm_use_im_start_end`) that the tokenizer lacks, they
    are appended, as LLaVA's builder does.

    A tokenizer built from `tokenizer.model` gives the ids of transformers 4.37's slow LlamaTokenizer. This holds for
    either value of `legacy` in tokenizer_config.json (true where the key is absent, as there):

    - legacy: a space goes before every stretch of text, at the start and after each special token.
    - not legacy: a space goes before the text only, and nowhere if it begins with a special token.

    One difference remains, and only without `legacy`. It concerns a text that begins with an added token outside the
    named special ones, such as `<im_end>` of old checkpoints, whose tokenizers are legacy. The original puts a lone
    space piece before it. This tokenizer does not, as the tokenizers library puts no prefix before an added token.

    Raises:
        CheckpointError: there is no tokenizer, it cannot be read, or it is of a kind that cannot be reproduced exactly.
    """
    folder = Path(folder)
    try:
        if (folder / "tokenizer.json").exists():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        elif (folder / "tokenizer.model").exists():
            tokenizer = _from_sentencepiece(folder)
        else:
            raise CheckpointError(
                f"{folder} has no tokenizer.json or tokenizer.model.", "Copy them from the base model."
            )
        config = read_json_object(folder / "config.json", optional=True)
        marks = [IM_PATCH] * bool(config.get("mm_use_im_patch_token"))
        marks += [IM_START, IM_END] * bool(config.get("mm_use_im_start_end"))
        tokenizer.add_tokens(marks, special_tokens=True)  # existing ones are left alone
    except RelookError:
        raise
    except Exception as error:  # the tokenizers library raises a bare Exception for a file it cannot parse
        raise CheckpointError(f"The tokenizer of {folder} cannot be read: {error}.", "Copy it again.") from None
    return tokenizer


def token_bytes(tokenizer: Any, id: int) -> bytes:
    """Return the bytes that a token adds to a decoded text, its leading space included; none for a special token.

    A character may span several tokens; `UTF8` decodes their bytes incrementally.
    """

    def decode(*ids: int) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text

    # Decode the token twice and drop one: a decoder may strip the leading space of the first token only.
    text = decode(id, id)[len(decode(id)) :]
    if UNFINISHED not in text:
        return text.encode()
    # Not text by itself, so a part of a character: sentencepiece's "<0xE2>", or GPT-2's letters for bytes.
    piece = tokenizer.convert_ids_to_tokens(id)
    if byte := FALLBACK.fullmatch(piece):
        return bytes.fromhex(byte[1])
    return bytes(BYTE_LEVEL[c] for c in piece) if BYTE_LEVEL.keys() >= set(piece) else text.encode()


def decode_bytes(tokenizer: Any, ids: Iterable[int]) -> str:
    """Decode tokens as sentencepiece does: a byte that is part of no character becomes one U+FFFD.

    transformers' fast tokenizers write U+FFFD for every byte of a run with one such byte, even for whole characters.
    """
    return UTF8(EACH_BYTE).decode(b"".join(token_bytes(tokenizer, id) for id in ids), final=True)


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return UNFINISHED * (error.end - error.start), error.end


def _byte_level() -> dict[str, int]:
    """Map the characters of GPT-2-style byte-level vocabularies to bytes; printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(unprintable)}


UNFINISHED = "\ufffd"  # what a tokenizer writes for bytes that are not a whole character
FALLBACK = re.compile("<0x([0-9A-F]{2})>")  # sentencepiece's name of a byte
BYTE_LEVEL = _byte_level()
UTF8, EACH_BYTE = codecs.getincrementaldecoder("utf-8"), "relook.each_byte"
codecs.register_error(EACH_BYTE, _each_byte)


@dataclass(frozen=True)
class Piece:
    """Entry of a sentencepiece vocabulary."""

    text: str
    score: float
    kind: int


def read_pieces(path: Path) -> Sequence[Piece]:
    """Read the vocabulary of a sentencepiece model file, in order of ids.

    Raises:
        CheckpointError: the file is not a sentencepiece BPE model, or its normalizer changes the text.
    """
    try:
        pieces, stated = _parse_pieces(path.read_bytes())
    except (IndexError, KeyError, TypeError, AttributeError, ValueError, struct.error):
        raise CheckpointError(f"{path} is not a whole sentencepiece model.", "Copy or download it again.") from None
    if stated != (BPE, b"", 1, 0, 1):
        raise CheckpointError(
            f"{path} is not a sentencepiece model of Llama's kind (BPE that leaves the text as it is).",
            "Save its tokenizer.json with transformers and put that into the folder.",
        )
    return pieces


@lru_cache(maxsize=2)  # a sweep, or a server of several models, loads the same one again and again
def _parse_pieces(model: bytes) -> tuple[tuple[Piece, ...], tuple[Any, ...]]:
    """Parse a sentencepiece model: its vocabulary, and the settings by which Llama's kind is known."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(model):
        if number == PIECES:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece.get(2, bytes(4)))[0]
            pieces.append(Piece(piece[1].decode(), score, piece.get(3, NORMAL)))
        elif number == TRAINER:
            trainer = dict(_fields(value))
        elif number == NORMALIZER:
            normalizer = dict(_fields(value))
    # Llama's kind: BPE; no character map (2), a prefix space (3), spaces kept (4) and written as SPACE (5).
    stated = (trainer.get(3), *(normalizer.get(n, default) for n, default in ((2, b""), (3, 1), (4, 1), (5, 1))))
    return tuple(pieces), stated


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the fields of a protobuf message: number, and an int (varint) or bytes (anything else)."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value

    while at < len(message):
        # A field's key: its number, and 3 bits of wire type (0 varint, 1 eight bytes, 2 sized, 5 four bytes).
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if at + size > len(message):
            raise ValueError("cut off")
        yield number, message[at : at + size]
        at += size


def merges_of(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    """Derive the merges of a sentencepiece BPE vocabulary, best first: every split of a piece into two others.

    sentencepiece merges the pair that makes the piece with the best score, and the leftmost among equals. Only Llama's
    space-only pieces share a score. With the longest left half first, a run of them grows from the left, as there.
    """
    # Control pieces and bytes are never the result of a merge.
    scores = {piece.text: piece.score for piece in pieces if piece.kind == NORMAL}
    merges = [
        (text[:cut], text[cut:])
        for text in scores
        for cut in range(1, len(text))
        if text[:cut] in scores and text[cut:] in scores
    ]
    return sorted(merges, key=lambda merge: (-scores[merge[0] + merge[1]], -len(merge[0])))


def _backend(pieces: Sequence[Piece], unk: str, legacy: bool) -> Tokenizer:
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece.text: i for i, piece in enumerate(pieces)},
            merges=merges_of(pieces),
            unk_token=unk,
            fuse_unk=True,
            byte_fallback=any(piece.kind == BYTE for piece in pieces),
        )
    )
    # Where the prefix space goes is the only difference between legacy and not; see `load_tokenizer`.
    spaces = normalizers.Replace(" ", SPACE)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
    else:
        # Metaspace omits its prefix if the text already begins with it. After `spaces`, no text begins with a plain
        # space, so one is always prepended; the second Metaspace then writes it as SPACE.
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
        read_json_object(folder / f"{name}.json", optional=True)
        for name in ("tokenizer_config", "special_tokens_map", "added_tokens")
    )
    pieces = read_pieces(folder / "tokenizer.model")
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    for name in (*names, "pad_token"):
        stated = special.get(name) or config.get(name)
        if stated:
            names[name] = stated["content"] if isinstance(stated, dict) else stated
    names.setdefault("pad_token", names["unk_token"])  # as LLaVA's trainer sets it

    tokenizer = _backend(pieces, names["unk_token"], config.get("legacy", True))
    # Three sources of added tokens, the most detailed first: tokenizer_config.json, added_tokens.json, and the
    # vocabulary's own control pieces.
    decoder = config.get("added_tokens_decoder", {})
    added_tokens = {int(id): entry for id, entry in decoder.items()}
    added_tokens |= {id: {"content": text} for text, id in added.items() if id not in added_tokens}
    added_tokens |= {
        i: {"content": piece.text, "special": piece.kind != USER_DEFINED}
        for i, piece in enumerate(pieces)
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED) and i not in added_tokens
    }
    for id, entry in sorted(added_tokens.items()):
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
