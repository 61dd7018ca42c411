"""What the reference data were made with: tokenizer folders and the original's rules, for tests to compare with."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from relook.model.tokenizer import load_tokenizer

IGNORE, IMAGE_ID = -100, -200


FOLDER = TemporaryDirectory()  # until this process ends


@functools.cache
def reference_tokenizer(refdata: Path, variant: str) -> Any:
    """The tokenizer of a variant such as "llama_cut_1024/legacy_false", read once. Copy it before you change it."""
    name, legacy = variant.split("/")
    copy = Path(FOLDER.name, name, legacy)
    copy.mkdir(parents=True)
    for file in ("tokenizer.model", "special_tokens_map.json"):
        shutil.copyfile(refdata / "tokenizers" / name / file, copy / file)
    config = json.loads((refdata / "tokenizers" / name / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"legacy": legacy == "legacy_true"}))
    return load_tokenizer(copy)


def ids_around_images(tokenizer: Any, text: str) -> list[int]:
    """LLaVA's tokenizer_image_token: every chunk with a BOS, of which the first is kept."""
    first, *others = [tokenizer(chunk).input_ids for chunk in text.split("<image>")]
    return first + [id for chunk in others for id in [IMAGE_ID, *chunk[1:]]]


def v1_labels(tokenizer: Any, text: str, legacy: bool) -> list[int] | None:
    """LLaVA's labels of a rendered v1 conversation, by its own counting of tokens. None where it masks all of them."""
    ids = ids_around_images(tokenizer, text)
    labels, at, cue = [IGNORE] * len(ids), 1, " ASSISTANT: "
    for i, turn in enumerate(text.split("</s>")):
        if not turn or turn.count(cue) != 1:
            break
        # Counted with its BOS, which stands for the </s> that the split took away. Where the tokenizer puts no space
        # after </s>, a turn counted alone has one token more than in its place.
        surplus = int(i > 0 and not legacy)
        length = len(ids_around_images(tokenizer, turn)) - surplus
        asked = len(ids_around_images(tokenizer, turn.split(cue)[0] + cue)) - 2 - surplus
        labels[at + asked : at + length] = ids[at + asked : at + length]
        at += length
    return labels if at == len(ids) else None
