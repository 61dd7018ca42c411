"""HA-DPO's preference pairs over Visual Genome, drawn as the original draws them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relook.data.report import ReadReport
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


def read_hadpo(
    vg_path: Path,
    desc_data_path: Path | None = None,
    pope_data_path: Path | None = None,
    on_bad: str = "drop",
    seed: int = 42,
) -> tuple[list[PreferencePair], ReadReport]:
    """Read `desc_data.json` and `pope_data.json` over Visual Genome's images: POPE pairs + 2 x description pairs.

    One chosen and one rejected description and one of four prompts are drawn per image; questions that the model got
    right (`correct`) are skipped. Bad records are dropped and reported, or raise, as `on_bad` says.
    """
    paths = read_image_paths(vg_path)
    report = ReadReport(" + ".join(str(p) for p in (desc_data_path, pope_data_path) if p), on_bad)
    pairs: list[PreferencePair] = []
    if pope_data_path is not None:
        pairs += _questions(_typed(pope_data_path, list), paths, report)
    if desc_data_path is not None:
        pairs += _descriptions(_typed(desc_data_path, dict), paths, random.Random(seed), report) * DESCRIPTION_REPEATS
    report.kept = len(pairs)
    return pairs, report


def _typed(path: Path, kind: type) -> Any:
    data = read_json(path)
    if not isinstance(data, kind):
        raise DataError(f"{path} holds a {type(data).__name__}, but a {kind.__name__} is expected.", "Check the file.")
    return data


def _descriptions(
    data: Mapping[str, Any], paths: Mapping[str, Path], rng: random.Random, report: ReadReport
) -> list[PreferencePair]:
    pairs = []
    for image_id, record in data.items():
        name = f"desc-{image_id}"
        try:
            chosen, rejected = rng.choice(record["chosen"]), rng.choice(record["rejected"])
        except (KeyError, IndexError, TypeError):
            report.drop(name, "no chosen or no rejected description")
            continue
        pair = _pair(name, image_id, rng.choice(DESCRIBE_PROMPTS), chosen, rejected, paths, report)
        pairs += [pair] if pair else []
    return pairs


def _questions(data: list[Any], paths: Mapping[str, Path], report: ReadReport) -> list[PreferencePair]:
    pairs = []
    for number, record in enumerate(data):
        name = f"pope-{number}"
        missing = [key for key in ("image_id", "question", "chosen", "reject") if key not in record]
        if missing:
            report.drop(name, f"no {', '.join(missing)}")
        elif not record.get("correct"):
            pair = _pair(name, str(record["image_id"]), record["question"], record["chosen"], record["reject"], paths, report)  # fmt: skip
            pairs += [pair] if pair else []
    return pairs


def _pair(
    name: str, image_id: str, prompt: str, chosen: str, rejected: str, paths: Mapping[str, Path], report: ReadReport
) -> PreferencePair | None:
    if image_id not in paths:
        report.drop(name, "image id not in image_data.json")
    elif not paths[image_id].is_file():
        report.drop(name, "image missing")
    elif not str(chosen).strip() or not str(rejected).strip():
        report.drop(name, "empty answer")
    elif chosen == rejected:
        report.drop(name, "chosen equals rejected")
    else:
        return PreferencePair(name, paths[image_id], prompt, chosen, rejected)
    return None
