"""Bad samples in real runs: each is counted and named, or refused, as `on_bad` says. None is lost silently."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import dpo_keys, sft_keys
from helpers.variants import crossed

from relook.errors import DataError
from relook.recipe import build_recipe
from relook.train.run import train

pytestmark = pytest.mark.usefixtures("no_trunk_cache")

Change = Callable[[Any], Any]  # what becomes of a record


def put(**values: Any) -> Change:
    return lambda record: {**record, **values}


def without(key: str) -> Change:
    return lambda record: {name: value for name, value in record.items() if name != key}


SHORT: dict[str, Any] = {"tune_lm_head": True, "max_steps": 1, "feature_cache": "off"}
LONG = "Is there a cup? " * 600  # alone beyond 2,048 positions
QUESTIONS: dict[str, tuple[Change, str]] = {
    "chosen equals rejected": (put(chosen="No.", reject="No. "), "chosen equals rejected"),
    "no answer": (put(chosen=""), "empty text"),
    "a blank answer": (put(reject=" \n"), "empty text"),
    "no question": (put(question=""), "empty text"),
    "an answer that is no text": (put(chosen=["Yes."]), "empty text"),
    "no field chosen": (without("chosen"), "no chosen"),
    "no field question": (without("question"), "no question"),
    "no field correct": (without("correct"), "no correct"),
    "not a record": (lambda record: "Yes.", "no image_id"),
    "an unknown image": (put(image_id=10**9), "image id not in image_data.json"),
    "a prompt beyond the maximum": (put(question=LONG), "more than model_max_length 2048"),
    "an answer beyond the maximum": (put(chosen=LONG), "more than model_max_length 2048"),
    "a text that is no Unicode": (put(chosen="\ud83d"), "not valid Unicode"),
    "a mark of the template": (put(chosen="Yes. USER: a ASSISTANT: b"), "in its text, a mark of template"),
    "an image in the answer": (put(chosen="<image>"), "<image>"),
}
DESCRIPTIONS: dict[str, tuple[Change, str]] = {
    "no chosen": (without("chosen"), "no chosen or no rejected description"),
    "none to choose from": (put(rejected=[]), "no chosen or no rejected description"),
    "an empty one": (put(chosen=[""]), "empty text"),
    "not a text": (put(chosen=[3]), "empty text"),
    "not a record": (lambda record: None, "no chosen or no rejected description"),
}
CONVERSATIONS: dict[str, tuple[Change, str]] = {
    "no turns": (without("conversations"), "no conversations"),
    "an empty answer": (
        lambda record: {**record, "conversations": [record["conversations"][0], {"from": "gpt", "value": " "}]},
        "empty answer",
    ),
    "a turn without text": (
        put(conversations=[{"from": "human"}, {"from": "gpt", "value": "a"}]),
        "a turn without text",
    ),
    "not a record": (lambda record: 3, "no conversations"),
    "a prompt beyond the maximum": (
        put(conversations=[{"from": "human", "value": f"<image>\n{LONG}"}, {"from": "gpt", "value": "a"}]),
        "more than model_max_length 2048",
    ),
}


def finished(keys: dict[str, Any], out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((train(build_recipe({**keys, "output_dir": out})) / "run.json").read_text())
    return found


def questions(base: Path, world: Path, tmp_path: Path) -> tuple[dict[str, Any], Path, list[Any]]:
    path = tmp_path / "asked.json"
    keys = dpo_keys(base, world, tmp_path, pope_data_path=path, desc_data_path="", **SHORT)
    return keys, path, json.loads((world / "pope_data.json").read_text())


def descriptions(base: Path, world: Path, tmp_path: Path) -> tuple[dict[str, Any], Path, list[Any]]:
    path = tmp_path / "described.json"
    keys = dpo_keys(base, world, tmp_path, desc_data_path=path, pope_data_path="", **SHORT)
    return keys, path, list(json.loads((world / "desc_data.json").read_text()).items())


def conversations(base: Path, world: Path, tmp_path: Path) -> tuple[dict[str, Any], Path, list[Any]]:
    path = tmp_path / "mix.json"
    keys = sft_keys(base, world, tmp_path, conversations_per_tree=1, data_path=path, **SHORT)
    return keys, path, json.loads((world / "llava" / "toyworld_mix.json").read_text())[:12]


def write(path: Path, kind: Any, records: list[Any], bad: list[Change]) -> list[str]:
    """The sound records with those behind them that have become bad; the names that the bad ones have."""
    first = len(records)
    if kind is descriptions:
        # Ids are keys: the bad ones take the places of sound ones.
        changed = dict(records) | {records[i][0]: change(records[i][1]) for i, change in enumerate(bad)}
        path.write_text(json.dumps(changed))
        return [f"desc-{records[i][0]}" for i in range(len(bad))]
    made = [change(records[0] | {"id": f"bad-{i}"}) for i, change in enumerate(bad)]
    path.write_text(json.dumps([*records, *made]))
    if kind is questions:
        return [f"pope-{first + i}" for i in range(len(bad))]
    return [f"bad-{i}" if isinstance(record, dict) else str(first + i) for i, record in enumerate(made)]


ALL = [(questions, QUESTIONS), (descriptions, DESCRIPTIONS), (conversations, CONVERSATIONS)]


@pytest.mark.parametrize(("kind", "faults"), ALL)
def test_bad_records_are_dropped_counted_and_named(
    kind: Any, faults: dict[str, tuple[Change, str]], base: Path, world: Path, tmp_path: Path, capsys: Any
) -> None:
    keys, path, records = kind(base, world, tmp_path)
    names = write(path, kind, records, [change for change, _ in faults.values()])
    found = finished(keys, tmp_path / "run")
    reader, others = found["dropped"]["reader"], found["dropped"]["faults"]
    kept = 2 * (len(records) - len(faults)) if kind is descriptions else len(records)
    assert found["samples"] == kept
    reasons = found["dropped"]["reasons"]
    assert sum(map(len, reasons.values())) + len(others) == len(faults)
    assert reader in " ".join(capsys.readouterr().err.split())
    accounts = [*others, *(f"{reason}: {' '.join(named)}" for reason, named in reasons.items())]
    for name, (_, reason) in zip(names, faults.values(), strict=True):
        assert any(reason in account and name in account for account in accounts)


@pytest.mark.parametrize("kind", [questions, descriptions, conversations])
def test_an_empty_file_is_named(kind: Any, base: Path, world: Path, tmp_path: Path) -> None:
    keys, path, records = kind(base, world, tmp_path)
    path.write_text("{}" if isinstance(records, dict) or kind is descriptions else "[]")
    with pytest.raises(DataError, match=f"No sample can be used. {path}: 0 samples"):
        finished(keys, tmp_path / "run")


@pytest.mark.parametrize(("kind", "fault"), [(kind, fault) for kind, faults in ALL for fault in faults])
def test_a_bad_record_is_refused(kind: Any, fault: str, base: Path, world: Path, tmp_path: Path) -> None:
    keys, path, records = kind(base, world, tmp_path)
    change, reason = dict(ALL)[kind][fault]
    [name] = write(path, kind, records, [change])
    with pytest.raises(DataError) as refused:
        train(build_recipe({**keys, "on_bad": "error", "output_dir": tmp_path / "run"}))
    assert name in str(refused.value)
    assert reason in str(refused.value)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(("reason", "task"), crossed(["image file missing", "cannot be decoded"], ["dpo", "sft"]))
def test_a_bad_image(reason: str, task: str, base: Path, world: Path, tmp_path: Path, capsys: Any) -> None:
    """All samples on it are lost, and named."""
    shutil.copytree(world, tmp_path / "world")
    if task == "dpo":
        keys = dpo_keys(base, tmp_path / "world", tmp_path, **SHORT)
        image = min((tmp_path / "world" / "vg" / "VG_100K").iterdir())
        names = ["pope-0", "pope-1", f"desc-{image.stem}"]
        whole, lost = 24, 4  # a description is there twice
    else:
        keys = sft_keys(base, tmp_path / "world", tmp_path, conversations_per_tree=1, **SHORT)
        records = json.loads(keys["data_path"].read_text())
        names = [record["id"] for record in records if record["image"] == records[0]["image"]]
        image = keys["image_folder"] / records[0]["image"]
        whole, lost = len(records), len(names)
    image.unlink() if reason == "image file missing" else image.write_bytes(image.read_bytes()[:300])

    found = finished(keys, tmp_path / "dropping")
    assert found["samples"] == whole - lost
    account, printed = json.dumps(found["dropped"]), capsys.readouterr().err
    assert reason in account
    assert reason in printed
    assert names[0] in printed
    assert not [name for name in names if name not in account]
    assert max(len(re.findall(rf"{name}\b", printed)) for name in names) == 1  # not twice as in the data
    with pytest.raises(DataError, match=reason) as refused:
        train(build_recipe({**keys, "on_bad": "error", "output_dir": tmp_path / "strict"}))
    assert names[0] in str(refused.value)
