"""HA-DPO's preference pairs over Visual Genome (Zhao et al. 2023, arXiv:2311.16839), drawn as the original draws them.

The original is `LazySupervisedDataset` in opendatalab/HA-DPO, ha_dpo/models/llava-v1_5/train_dpo.py.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relook.data.located import located
from relook.data.report import ReadReport, Sieve
from relook.data.rules import BadRecord, as_bool, as_id, check_pair
from relook.data.samples import PreferencePair
from relook.data.vg import read_image_paths
from relook.errors import DataError
from relook.files import read_json

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
    vg_path = Path(vg_path)
    desc_data_path = None if desc_data_path is None else Path(desc_data_path)
    pope_data_path = None if pope_data_path is None else Path(pope_data_path)
    if desc_data_path is None and pope_data_path is None:
        raise DataError("There are no preference pairs to read.", "Set desc_data_path, pope_data_path or both.")
    sieve = Sieve(" + ".join(str(path) for path in (desc_data_path, pope_data_path) if path), on_bad)
    paths = read_image_paths(vg_path)
    pairs: list[PreferencePair] = []
    note = ""
    if pope_data_path is not None:
        pairs += _questions(_typed(pope_data_path, list), paths, sieve)
    if desc_data_path is not None:
        described = _descriptions(_typed(desc_data_path, dict), paths, random.Random(seed), sieve)
        note = f"each of {len(described):,} description pairs is taken twice an epoch, as in HA-DPO's training"
        pairs += described * DESCRIPTION_REPEATS
    return pairs, sieve.report(len(pairs), note)


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
        try:
            # The draws come before any check: dropping a record must not change what is drawn for the next ones.
            pairs.append(_pair(name, image_id, *draw(record, rng), paths))
        except BadRecord as bad:
            sieve.drop(name, str(bad))
    return pairs


def choices(record: Any) -> tuple[list[Any], list[Any]]:
    """Return the chosen and the rejected texts of a description record, of which one each is drawn.

    Raises:
        BadRecord: there are none.
    """
    chosen, rejected = (record.get(key) if isinstance(record, dict) else None for key in ("chosen", "rejected"))
    if not (isinstance(chosen, list) and chosen and isinstance(rejected, list) and rejected):
        raise BadRecord("no chosen or no rejected description")
    return chosen, rejected


def draw(record: Any, rng: random.Random) -> tuple[Any, Any, Any]:
    """Prompt, chosen and rejected of one description record, drawn in the original's order.

    Raises:
        BadRecord: see `choices`.
    """
    chosen, rejected = map(rng.choice, choices(record))
    return rng.choice(DESCRIBE_PROMPTS), chosen, rejected


def answered_correctly(record: Mapping[str, Any]) -> bool:
    """Whether a question record says that the model's answer was right: there is nothing to prefer then.

    Raises:
        BadRecord: `correct` is no truth value.
    """
    correct = as_bool(record.get("correct"))
    if correct is None:
        raise BadRecord("correct is neither true nor false")
    return correct


def _questions(data: list[Any], paths: Mapping[str, Path], sieve: Sieve) -> list[PreferencePair]:
    pairs = []
    for number, record in enumerate(data):
        name = f"pope-{number}"
        try:
            if missing := [key for key in QUESTION_FIELDS if not isinstance(record, dict) or key not in record]:
                raise BadRecord(f"no {', '.join(missing)}")
            if answered_correctly(record):
                sieve.skip("answered correctly")
                continue
            texts = record["question"], record["chosen"], record["reject"]
            pairs.append(_pair(name, record["image_id"], *texts, paths))
        except BadRecord as bad:
            sieve.drop(name, str(bad))
    return pairs


def _pair(
    name: str, image_id: Any, prompt: Any, chosen: Any, rejected: Any, paths: Mapping[str, Path]
) -> PreferencePair:
    if fault := check_pair(prompt, chosen, rejected):
        raise BadRecord(fault)
    if (path := paths.get(as_id(image_id))) is None:
        raise BadRecord("image id not in image_data.json")
    if not (path := located(path)).is_file():
        raise BadRecord("image file missing")
    return PreferencePair(name, path, prompt, chosen, rejected)
