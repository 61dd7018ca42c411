"""Readers of training data: HA-DPO's pairs (Zhao et al. 2023, arXiv:2311.16839), LLaVA's files, parquet files.

HA-DPO's pairs over Visual Genome are drawn as in the original, `LazySupervisedDataset` in opendatalab/HA-DPO,
ha_dpo/models/llava-v1_5/train_dpo.py.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from relook.data.annotations import read_image_paths
from relook.data.parquet import Embedded, InvalidPair, RawPair, content_hash, hadpo_record, open_parquet
from relook.data.paths import resolve_extension
from relook.data.samples import (
    ID_UNKNOWN,
    IMAGE_COUNT,
    IMAGE_MISSING,
    BadRecord,
    Conversation,
    DropLog,
    PreferencePair,
    ReadReport,
    Turn,
    as_bool,
    as_id,
    check_pair,
    missing_fields,
    pair_options,
)
from relook.data.sentinel import read_sentinel_records, sentinel_pair
from relook.data.templates import IMAGE
from relook.errors import DataError
from relook.files import atomic_file, read_json

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
    vg_path: str | Path,
    desc_data_path: str | Path | None = None,
    pope_data_path: str | Path | None = None,
    *,
    on_bad: str = "drop",
    seed: int = 42,
) -> tuple[list[PreferencePair], ReadReport]:
    """Read `desc_data.json` and `pope_data.json`: the question pairs, then the description pairs twice.

    One chosen and one rejected description and one of four prompts are drawn per image, in the file's order. Questions
    that the model got right (`correct`) are skipped. A description pair has the same id both times.

    Args:
        vg_path: Visual Genome's folder, with `image_data.json`, `VG_100K` and `VG_100K_2`.
        desc_data_path: `{image id: {"chosen": [text, ...], "rejected": [text, ...]}}`, or None to read none.
        pope_data_path: `[{"image_id", "question", "chosen", "reject", "answer", "correct"}, ...]`, or None.
        on_bad: "drop" reports unusable records (missing field, empty text, chosen equal to rejected, unknown image id,
            missing image file); "error" refuses the file for them.
        seed: seed of the draws; the original's is 42.

    Raises:
        DataError: a file is missing or has another layout, or records are bad and `on_bad` is "error".
    """
    vg_path = Path(vg_path)
    desc_data_path = None if desc_data_path is None else Path(desc_data_path)
    pope_data_path = None if pope_data_path is None else Path(pope_data_path)
    if desc_data_path is None and pope_data_path is None:
        raise DataError("There are no preference pairs to read.", "Set desc_data_path, pope_data_path or both.")
    drop_log = DropLog(" + ".join(str(path) for path in (desc_data_path, pope_data_path) if path), on_bad)
    paths = read_image_paths(vg_path)
    pairs: list[PreferencePair] = []
    note = ""
    if pope_data_path is not None:
        pairs += _questions(_typed(pope_data_path, list), paths, drop_log)
    if desc_data_path is not None:
        # One generator for the whole file, as in the original: the draws depend on the order of all records.
        described = _descriptions(_typed(desc_data_path, dict), paths, random.Random(seed), drop_log)
        note = f"each of {len(described):,} description pairs is taken twice an epoch, as in HA-DPO's training"
        pairs += described * DESCRIPTION_REPEATS
    return pairs, drop_log.report(len(pairs), note)


def _typed(path: Path, kind: type) -> Any:
    content = read_json(path)
    if not isinstance(content, kind):
        raise DataError(
            f"{path} holds a {type(content).__name__}, but a {kind.__name__} is expected.",
            "desc_data_path takes a JSON object, pope_data_path a JSON array.",
        )
    return content


def _descriptions(
    records: Mapping[str, Any], paths: Mapping[str, Path], rng: random.Random, drop_log: DropLog
) -> list[PreferencePair]:
    pairs = []
    for image_id, record in records.items():
        name = f"desc-{image_id}"
        try:
            # The draws come before any check: dropping a record must not change what is drawn for the next ones.
            texts = draw_description_pair(record, rng)
            pairs.append(_pair(name, image_id, *texts, record, paths))
        except BadRecord as bad:
            drop_log.drop(name, str(bad))
    return pairs


def choices(record: Any) -> tuple[list[Any], list[Any]]:
    """Return the chosen and the rejected texts of a description record, from which one each is drawn.

    Raises:
        BadRecord: there are no chosen or no rejected texts.
    """
    chosen, rejected = (record.get(key) if isinstance(record, dict) else None for key in ("chosen", "rejected"))
    if not (isinstance(chosen, list) and chosen and isinstance(rejected, list) and rejected):
        raise BadRecord("no chosen or no rejected description")
    return chosen, rejected


def draw_description_pair(record: Any, rng: random.Random) -> tuple[Any, Any, Any]:
    """Draw prompt, chosen and rejected of one description record, in the original's order.

    Raises:
        BadRecord: see `choices`.
    """
    chosen, rejected = map(rng.choice, choices(record))
    return rng.choice(DESCRIBE_PROMPTS), chosen, rejected


def answered_correctly(record: Mapping[str, Any]) -> bool:
    """Return True if a question record says that the model's answer was right, so that there is no preference.

    Raises:
        BadRecord: `correct` is not a truth value.
    """
    correct = as_bool(record.get("correct"))
    if correct is None:
        raise BadRecord("correct is neither true nor false")
    return correct


def pair_fault(
    record: Mapping[str, Any], prompt: Any, chosen: Any, rejected: Any, options: Mapping[str, Any] | None = None
) -> str:
    """Return why texts are not a pair to train on, or ""; a record answered correctly is sound and need not be one.

    Args:
        options: where `pair_options` are; by default in the record.
    """
    try:
        if answered_correctly(record):
            return ""
        return check_pair(prompt, chosen, rejected, pair_options(record if options is None else options)["context"])
    except BadRecord as bad:
        return str(bad)


def _questions(records: list[Any], paths: Mapping[str, Path], drop_log: DropLog) -> list[PreferencePair]:
    pairs = []
    for number, record in enumerate(records):
        name = f"pope-{number}"
        try:
            if fault := missing_fields(record, *QUESTION_FIELDS):
                raise BadRecord(fault)
            if answered_correctly(record):
                drop_log.skip("answered correctly")
                continue
            texts = record["question"], record["chosen"], record["reject"]
            pairs.append(_pair(name, record["image_id"], *texts, record, paths))
        except BadRecord as bad:
            drop_log.drop(name, str(bad))
    return pairs


def _pair(
    name: str,
    image_id: Any,
    prompt: Any,
    chosen: Any,
    rejected: Any,
    record: Mapping[str, Any],
    paths: Mapping[str, Path],
) -> PreferencePair:
    # The order decides which reason a report counts: first the texts, then the image.
    options = pair_options(record)
    if fault := check_pair(prompt, chosen, rejected, options["context"]):
        raise BadRecord(fault)
    if (path := paths.get(as_id(image_id))) is None:
        raise BadRecord(ID_UNKNOWN)
    if not (path := resolve_extension(path)).is_file():
        raise BadRecord(IMAGE_MISSING)
    return PreferencePair(name, (path,), prompt, chosen, rejected, **options)


# ----------------------------------------------------------------------------------------------------
# LLaVA's conversation files (`llava_v1_5_mix665k.json` and its kin; Liu et al. 2023, arXiv:2310.03744).


def read_llava(
    data_path: str | Path, image_folder: str | Path, on_bad: str = "drop"
) -> tuple[list[Conversation], ReadReport]:
    """Read a list of `{"id", "image"?, "conversations": [{"from": "human" | "gpt", "value"}]}`.

    `image` is one path or a list of paths under `image_folder`; entries without it are text only. A record is bad if
    its turns do not alternate from human to gpt, a turn is empty, an image file is missing, or the human turns do not
    hold one `<image>` per image. LLaVA itself silently cuts a first turn that is not human's; here it makes the record
    bad.

    Args:
        on_bad: "drop" reports bad records; "error" refuses the file for them.

    Raises:
        DataError: the file or folder is missing, the file is no JSON array, or records are bad and `on_bad` is "error".
    """
    data_path, image_folder = Path(data_path), Path(image_folder)
    drop_log = DropLog(str(data_path), on_bad)
    records = read_json(data_path)
    if not isinstance(records, list):
        raise DataError(f"{data_path} is not a JSON array.", "Give a file in LLaVA's conversation layout.")
    if not image_folder.is_dir():
        raise DataError(f"There is no image folder {image_folder}.", "Check image_folder.")
    samples = []
    for number, record in enumerate(records):
        # A record without an id is named by its number.
        name = str(record.get("id", number) if isinstance(record, dict) else number)
        try:
            sample = conversation(name, record, image_folder)
        except BadRecord as bad:
            drop_log.drop(name, str(bad))
            continue
        images = tuple(map(resolve_extension, sample.images))
        if all(image.is_file() for image in images):
            samples.append(replace(sample, images=images))
        else:
            drop_log.drop(name, IMAGE_MISSING)
    return samples, drop_log.report(len(samples))


def conversation(name: str, record: Any, image_folder: Path) -> Conversation:
    """Convert one record to a sample, without checking that its image files exist.

    Raises:
        BadRecord: the record cannot be used.
    """
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        raise BadRecord("no conversations")
    images, turns = _images(record.get("image"), image_folder), _turns(record["conversations"])
    if any(IMAGE in turn.response for turn in turns):
        raise BadRecord(f"{IMAGE} in an answer")
    if sum(turn.prompt.count(IMAGE) for turn in turns) != len(images):
        raise BadRecord(IMAGE_COUNT)
    return Conversation(name, images, turns)


def _images(image_field: Any, image_folder: Path) -> tuple[Path, ...]:
    names = image_field if isinstance(image_field, list) else [image_field] if image_field else []
    if not all(isinstance(name, str) and name for name in names):
        raise BadRecord("image is not a path")
    return tuple(image_folder / name for name in names)


def _turns(messages: list[Any]) -> tuple[Turn, ...]:
    if not all(isinstance(message, dict) and isinstance(message.get("value"), str) for message in messages):
        raise BadRecord("a turn without text")
    if not messages or [message.get("from") for message in messages] != ["human", "gpt"] * (len(messages) // 2):
        raise BadRecord("turns do not alternate between human and gpt")
    if not all(answer["value"].strip() for answer in messages[1::2]):
        raise BadRecord("empty answer")
    if not all(question["value"] for question in messages[::2]):
        raise BadRecord("empty question")
    return tuple(Turn(human["value"], gpt["value"]) for human, gpt in zip(messages[::2], messages[1::2], strict=True))


# ----------------------------------------------------------------------------------------------------
# Training pairs with context, in SENTINEL's files.


def read_sentinel(
    path: str | Path, vg_path: str | Path, on_bad: str = "drop"
) -> tuple[list[PreferencePair], ReadReport]:
    """Read a file in one of SENTINEL's two layouts (`relook.data.sentinel`), in its order.

    Args:
        vg_path: Visual Genome's folder.
        on_bad: "drop" reports unusable records; "error" refuses the file for them.

    Raises:
        DataError: a file is missing or has another layout, or records are bad and `on_bad` is "error".
    """
    path = Path(path)
    drop_log, paths, pairs = DropLog(str(path), on_bad), read_image_paths(Path(vg_path)), []
    for name, image_id, record in read_sentinel_records(path):
        try:
            if isinstance(record, dict) and answered_correctly(hadpo_record(RawPair((), "", "", "", record))):
                drop_log.skip("answered correctly")
                continue
            pair = sentinel_pair(record)
            pairs.append(_pair(name, image_id, pair.prompt, pair.chosen, pair.rejected, pair._asdict(), paths))
        except BadRecord as bad:
            drop_log.drop(name, str(bad))
    return pairs, drop_log.report(len(pairs))


# ----------------------------------------------------------------------------------------------------
# Training pairs from parquet files: TRL's, RLHF-V's and RLAIF-V's columns.


def read_pairs(
    path: str | Path, image_folder: str | Path | None = None, on_bad: str = "drop"
) -> tuple[list[PreferencePair], ReadReport]:
    """Read a parquet file, or all parquet files of a folder, as training pairs.

    Embedded images are written as files once, named by their content. A row is bad if it is not one user turn over
    images and two answers, an answer is empty, or chosen equals rejected. A prompt has one `<image>` for each image, or
    none. Rows that HA-DPO's reader would skip (`correct` in a `hadpo_record`) are skipped.

    Args:
        image_folder: where embedded images are written, and where images that a row only names are looked up. The
            default is a folder beside `path`, of its name and `_images`.
        on_bad: "drop" reports bad rows; "error" refuses the file for them.

    Raises:
        DataError: there is no such file, it has none of the layouts, or rows are bad and `on_bad` is "error".
    """
    path = Path(path)
    image_folder = None if image_folder is None else Path(image_folder)
    folder = image_folder or path.with_name(f"{path.stem}_images")
    drop_log, pairs = DropLog(str(path), on_bad), []
    for number, row in enumerate(open_parquet(path, folder).rows()):
        name = f"row-{number}"
        try:
            if isinstance(row, InvalidPair):
                raise row
            if answered_correctly(hadpo_record(row)):
                drop_log.skip("answered correctly")
                continue
            options = pair_options(row.extra)
            rejected = row.rejected if row.desirable is None else f"{row.chosen}."  # any other text, exchanged below
            if fault := check_pair(row.prompt, row.chosen, rejected, options["context"]):
                raise BadRecord(fault)
            if not row.images:
                raise BadRecord("no image")
            if row.prompt.count(IMAGE) not in (0, len(row.images)):
                raise BadRecord(IMAGE_COUNT)
            images = tuple(_extracted(image, folder) for image in row.images)
            texts = row.prompt, row.chosen, row.rejected
            pairs.append(PreferencePair(name, images, *texts, **options, desirable=row.desirable))
        except BadRecord as bad:
            drop_log.drop(name, str(bad))
    return pairs, drop_log.report(len(pairs))


def rated_answers(pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """Return rated answers for KTO: as they are, or both answers of each pair, all chosen ones first.

    Each gets the answer before it, to another prompt, as `rejected`: KTO's baseline. TRL does both in the same order.
    """
    rated = [pair for pair in pairs if pair.desirable is not None] or [
        replace(pair, id=f"{pair.id}-{side}", chosen=getattr(pair, side), desirable=side == "chosen")
        for side in ("chosen", "rejected")
        for pair in pairs
    ]
    before = [answer.chosen.removeprefix(answer.context) for answer in (*rated[-1:], *rated[:-1])]
    return [replace(answer, rejected=answer.context + other) for answer, other in zip(rated, before, strict=True)]


def _extracted(image: Embedded, folder: Path) -> Path:
    path = folder / f"{content_hash(image.data)}{image.suffix}"
    if not path.exists():  # the name is the content's hash: a file that exists is the same image
        with atomic_file(path) as temporary:
            temporary.write_bytes(image.data)
    return path
