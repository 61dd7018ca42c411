"""HA-DPO's preference pairs over Visual Genome (Zhao et al. 2023, arXiv:2311.16839), drawn as the original draws them.

The original is `LazySupervisedDataset` in opendatalab/HA-DPO, ha_dpo/models/llava-v1_5/train_dpo.py.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relook.data.annotations import read_image_paths
from relook.data.parquet import BadRow, Embedded, content_hash, hadpo_record, open_parquet
from relook.data.samples import Conversation, PreferencePair, ReadReport, Sieve, Turn
from relook.data.templates import IMAGE
from relook.errors import DataError
from relook.files import read_json, whole_file

# ----------------------------------------------------------------------------------------------------

DESCRIBE_PROMPTS = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)
DESCRIPTION_REPEATS = 2
QUESTION_FIELDS = ("image_id", "question", "chosen", "reject", "correct")


def read_hadpo(
    vg_path: Path,
    desc_data_path: Path | None = None,
    pope_data_path: Path | None = None,
    *,
    on_bad: str = "drop",
    seed: int = 42,
) -> tuple[list[PreferencePair], ReadReport]:
    """Read `desc_data.json` and `pope_data.json`: the question pairs, then the description pairs twice.

    One chosen and one rejected description and one of four prompts are drawn per image, in the file's order; questions
    that the model got right (`correct`) are skipped. A description pair carries the same id in both its places.

    Args:
        vg_path: Visual Genome's folder, with `image_data.json`, `VG_100K` and `VG_100K_2`.
        desc_data_path: `{image id: {"chosen": [text, ...], "rejected": [text, ...]}}`, or None to read none.
        pope_data_path: `[{"image_id", "question", "chosen", "reject", "answer", "correct"}, ...]`, or None.
        on_bad: "drop" reports records that cannot be used (missing field, empty text, chosen equal to rejected, unknown
            image id, missing image file); "error" raises at the first one.
        seed: of the draws; the original's is 42.

    Raises:
        DataError: a file is missing or has another layout, or a record is bad and `on_bad` is "error".
    """
    if desc_data_path is None and pope_data_path is None:
        raise DataError("There are no preference pairs to read.", "Set desc_data_path, pope_data_path or both.")
    sieve = Sieve(" + ".join(str(path) for path in (desc_data_path, pope_data_path) if path), on_bad)
    paths = read_image_paths(vg_path)
    pairs: list[PreferencePair] = []
    if pope_data_path is not None:
        pairs += _questions(_typed(pope_data_path, list), paths, sieve)
    if desc_data_path is not None:
        pairs += _descriptions(_typed(desc_data_path, dict), paths, random.Random(seed), sieve) * DESCRIPTION_REPEATS
    return pairs, sieve.report(len(pairs))


def _typed(path: Path, kind: type) -> Any:
    data = read_json(path)
    if not isinstance(data, kind):
        raise DataError(
            f"{path} holds a {type(data).__name__}, but a {kind.__name__} is expected.",
            "desc_data_path takes a JSON object, pope_data_path a JSON array.",
        )
    return data


def _descriptions(
    data: Mapping[str, Any], paths: Mapping[str, Path], rng: random.Random, sieve: Sieve
) -> list[PreferencePair]:
    pairs = []
    for image_id, record in data.items():
        name = f"desc-{image_id}"
        texts: list[Any] = [record.get(key) if isinstance(record, dict) else None for key in ("chosen", "rejected")]
        if not all(isinstance(choices, list) and choices for choices in texts):
            sieve.drop(name, "no chosen or no rejected description")
            continue
        # The draws come before any check: dropping a record must not change what is drawn for the next ones.
        prompt, chosen, rejected = draw(record, rng)
        pairs += _pair(name, image_id, prompt, chosen, rejected, paths, sieve)
    return pairs


def draw(record: Mapping[str, Any], rng: random.Random) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected of one description record, drawn in the original's order."""
    chosen, rejected = rng.choice(record["chosen"]), rng.choice(record["rejected"])
    return rng.choice(DESCRIBE_PROMPTS), chosen, rejected


def _questions(data: list[Any], paths: Mapping[str, Path], sieve: Sieve) -> list[PreferencePair]:
    pairs = []
    for number, record in enumerate(data):
        name = f"pope-{number}"
        missing = [key for key in QUESTION_FIELDS if not isinstance(record, dict) or key not in record]
        if missing:
            sieve.drop(name, f"no {', '.join(missing)}")
        elif record["correct"]:
            sieve.skip("answered correctly")
        else:
            prompt, chosen, rejected = record["question"], record["chosen"], record["reject"]
            pairs += _pair(name, str(record["image_id"]), prompt, chosen, rejected, paths, sieve)
    return pairs


def _pair(
    name: str, image_id: str, prompt: Any, chosen: Any, rejected: Any, paths: Mapping[str, Path], sieve: Sieve
) -> list[PreferencePair]:
    """The pair, or nothing where it cannot be used."""
    if not all(isinstance(text, str) and text.strip() for text in (prompt, chosen, rejected)):
        fault = "empty text"
    elif chosen.strip() == rejected.strip():
        fault = "chosen equals rejected"
    elif image_id not in paths:
        fault = "image id not in image_data.json"
    elif not paths[image_id].is_file():
        fault = "image file missing"
    else:
        return [PreferencePair(name, paths[image_id], prompt, chosen, rejected)]
    sieve.drop(name, fault)
    return []


# ----------------------------------------------------------------------------------------------------
# LLaVA's conversation files (`llava_v1_5_mix665k.json` and its kin; Liu et al. 2023, arXiv:2310.03744).


class BadRecord(Exception):
    """Why one record cannot be used."""


def read_llava(data_path: Path, image_folder: Path, on_bad: str = "drop") -> tuple[list[Conversation], ReadReport]:
    """Read a list of `{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value"}]}`.

    `image` is one path or a list of paths under `image_folder`; entries without it are text only. A record is bad where
    its turns do not alternate from human to gpt, an answer is empty, an image file is missing, or the human turns do
    not hold one `<image>` per image. LLaVA itself silently cuts a first turn that is not human's; here it is bad.

    Args:
        on_bad: "drop" reports bad records; "error" raises at the first one.

    Raises:
        DataError: the file or folder is missing, the file is no JSON array, or a record is bad and `on_bad` is "error".
    """
    sieve = Sieve(str(data_path), on_bad)
    records = read_json(data_path)
    if not isinstance(records, list):
        raise DataError(f"{data_path} is not a JSON array.", "Give a file in LLaVA's conversation layout.")
    if not image_folder.is_dir():
        raise DataError(f"There is no image folder {image_folder}.", "Check image_folder.")
    samples = []
    for number, record in enumerate(records):
        name = str(record.get("id", number) if isinstance(record, dict) else number)
        try:
            sample = conversation(name, record, image_folder)
        except BadRecord as bad:
            sieve.drop(name, str(bad))
            continue
        if all(image.is_file() for image in sample.images):
            samples.append(sample)
        else:
            sieve.drop(name, "image file missing")
    return samples, sieve.report(len(samples))


def conversation(name: str, record: Any, image_folder: Path) -> Conversation:
    """One record as a sample; whether its image files exist is not looked at.

    Raises:
        BadRecord: why it cannot be used.
    """
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise BadRecord("no conversations")
    images, turns = _images(record.get("image"), image_folder), _turns(record["conversations"])
    if any(IMAGE in turn.response for turn in turns):
        raise BadRecord(f"{IMAGE} in an answer")
    if sum(turn.prompt.count(IMAGE) for turn in turns) != len(images):
        raise BadRecord(f"number of {IMAGE} differs from the number of images")
    return Conversation(name, images, turns)


def _images(given: Any, image_folder: Path) -> tuple[Path, ...]:
    names = given if isinstance(given, list) else [given] if given else []
    if not all(isinstance(name, str) and name for name in names):
        raise BadRecord("image is not a path")
    return tuple(image_folder / name for name in names)


def _turns(messages: list[Any]) -> tuple[Turn, ...]:
    if not all(isinstance(m, dict) and isinstance(m.get("value"), str) for m in messages):
        raise BadRecord("a turn without text")
    if not messages or [m.get("from") for m in messages] != ["human", "gpt"] * (len(messages) // 2):
        raise BadRecord("turns do not alternate between human and gpt")
    if not all(said["value"].strip() for said in messages[1::2]):
        raise BadRecord("empty answer")
    return tuple(Turn(a["value"], s["value"]) for a, s in zip(messages[::2], messages[1::2], strict=True))


# ----------------------------------------------------------------------------------------------------
# Training pairs from parquet files: TRL's, RLHF-V's and RLAIF-V's columns.


def read_pairs(
    path: Path, image_folder: Path | None = None, on_bad: str = "drop"
) -> tuple[list[PreferencePair], ReadReport]:
    """Read a parquet file, or all of a folder, as pairs to train on.

    Embedded images are written as files once, named by their content. A row is bad where it is not one image with one
    user turn and two answers, an answer is empty, or chosen equals rejected. Rows that HA-DPO's reader would skip
    (`correct` in a `hadpo_record`) are skipped.

    Args:
        image_folder: where they go, and where images are looked up that a row only names; by default beside `path`,
            in a folder of its name and `_images`.
        on_bad: "drop" reports bad rows; "error" raises at the first one.

    Raises:
        DataError: there is no such file, it has none of the layouts, or a row is bad and `on_bad` is "error".
    """
    folder = image_folder or path.with_name(f"{path.stem}_images")
    sieve, pairs = Sieve(str(path), on_bad), []
    for number, row in enumerate(open_parquet(path, folder).rows()):
        name = f"row-{number}"
        if isinstance(row, BadRow):
            sieve.drop(name, str(row))
        elif hadpo_record(row).get("correct"):
            sieve.skip("answered correctly")
        elif not all(text.strip() for text in (row.prompt, row.chosen, row.rejected)):
            sieve.drop(name, "empty text")
        elif row.chosen.strip() == row.rejected.strip():
            sieve.drop(name, "chosen equals rejected")
        elif len(row.images) != 1:
            sieve.drop(name, f"{len(row.images)} images")
        else:
            pairs.append(PreferencePair(name, _extracted(row.image, folder), row.prompt, row.chosen, row.rejected))
    return pairs, sieve.report(len(pairs))


def _extracted(image: Embedded, folder: Path) -> Path:
    path = folder / f"{content_hash(image.data)}{image.suffix}"
    if not path.exists():
        with whole_file(path) as temporary:
            temporary.write_bytes(image.data)
    return path
