"""`relook data check` and `fix`: every defect found and named, none invented; killed and run again, the same files."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command import Command
from helpers.damaged import encoded, write_llava
from helpers.forked import FORK
from PIL import Image

from relook.data.check import FolderReport, check_folder, fix_folder
from relook.data.readers import read_hadpo, read_llava
from relook.errors import DataError, RelookError
from relook.files import write_json, write_jsonl


def image_faults(report: FolderReport) -> dict[str, set[str]]:
    return {reason: set(names) for reason, names in report.by_reason().items()}


def record_faults(report: FolderReport) -> dict[str, set[str]]:
    return {reason: set(names) for one in report.indexes for reason, names in one.faults.items()}


def files(folder: Path) -> dict[str, bytes]:
    """All files of a folder, links followed."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_defect_is_found_and_none_invented(tmp_path: Path) -> None:
    images, records = write_llava(tmp_path, 200, 4)
    report = check_folder("llava", tmp_path, workers=1)
    assert image_faults(report) == images
    assert record_faults(report) == records
    assert len(report.images) == 200
    assert not report.clean


@pytest.mark.slow
def test_every_defect_among_20000_files(tmp_path: Path) -> None:
    images, records = write_llava(tmp_path / "source", 20_000, 400)
    report = check_folder("llava", tmp_path / "source")
    assert image_faults(report) == images
    assert record_faults(report) == records
    fix_folder("llava", tmp_path / "source", tmp_path / "fixed")
    assert check_folder("llava", tmp_path / "fixed").clean


def test_several_processes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llava(tmp_path, 100, 1)
    monkeypatch.setattr("relook.data.check.ONE_PROCESS_LIMIT", 10)
    assert check_folder("llava", tmp_path, workers=2).to_json() == check_folder("llava", tmp_path, workers=1).to_json()


def test_fix_leaves_a_clean_folder_and_the_old_one_alone(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    images, records = write_llava(source, 120, 2)
    before = files(source)
    fix_folder("llava", source, out, workers=1)
    assert files(source) == before
    assert check_folder("llava", out, workers=1).clean
    kept, report = read_llava(out / "llava_mix.json", out / "images", on_bad="error")
    total = len(json.loads((source / "llava_mix.json").read_text()))
    assert (len(kept), report.dropped) == (total - sum(map(len, records.values())), 0)
    for name in images["wrong extension"] | images["unusual mode"]:
        again = Image.open(out / "images" / name)
        assert again.format == ("PNG" if name.endswith(".png") else "JPEG")
        old = Image.open(source / "images" / name)
        # Pillow's own conversion clips 16 bits.
        pixels = np.asarray(old) // 256 if old.mode == "I;16" else np.asarray(old.convert("RGB"))
        new = np.asarray(again)[..., 0] if pixels.ndim == 2 else np.asarray(again)
        if again.format == "PNG":
            assert (new == pixels).all()
        else:
            assert np.abs(new.astype(int) - pixels).mean() < 8
    done = json.loads((out / "relook-fix.json").read_text())
    again = {reason: set(names) for reason, names in done["written_again"].items()}
    assert again == {reason: images[reason] for reason in ("wrong extension", "unusual mode")}
    assert {reason: set(names) for reason, names in done["records_dropped"]["llava_mix.json"].items()} == records
    listed = fix_folder("llava", source, tmp_path / "listed", broken="list", workers=1)
    assert (tmp_path / "listed" / "llava_mix.json").read_bytes() == (source / "llava_mix.json").read_bytes()
    assert listed["records_listed"] == done["records_dropped"]


def test_fix_in_place(tmp_path: Path) -> None:
    write_llava(tmp_path, 60, 1)
    before = files(tmp_path / "images")
    fix_folder("llava", tmp_path, in_place=True, workers=1)
    report = check_folder("llava", tmp_path, workers=1)
    assert record_faults(report) == {}
    assert set(image_faults(report)) <= {"truncated", "empty file", "not an image"}  # which no record names any more
    assert not any(report.images[name] for names in image_faults(report).values() for name in names)
    assert files(tmp_path / "images").keys() == before.keys()
    after = files(tmp_path)
    fix_folder("llava", tmp_path, in_place=True, workers=1)
    assert files(tmp_path) == after


def test_ocr_vqa_gifs_under_another_name_become_jpegs(tmp_path: Path) -> None:
    """Its records say .jpg where the download has .gif."""
    (tmp_path / "ocr_vqa/images").mkdir(parents=True)
    (tmp_path / "ocr_vqa/images/1.gif").write_bytes(encoded(random.Random(0), "GIF"))
    talk = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "Ada."}]
    write_json(tmp_path / "mix.json", [{"id": "1", "image": "ocr_vqa/images/1.jpg", "conversations": talk}])
    assert image_faults(check_folder("llava", tmp_path)) == {"there under another extension": {"ocr_vqa/images/1.jpg"}}
    fix_folder("llava", tmp_path, in_place=True)
    assert Image.open(tmp_path / "ocr_vqa/images/1.jpg").format == "JPEG"
    assert check_folder("llava", tmp_path).clean


@pytest.mark.parametrize("in_place", [False, True])
def test_a_killed_fix_ends_in_the_same_files(in_place: bool, tmp_path: Path) -> None:
    """Killed at every eighth write in turn, by making that write the process's last."""
    write_llava(tmp_path / "whole", 30, 1)
    write_llava(tmp_path / "killed", 30, 1)

    def fix(writes: int, source: Path, place: dict[str, Any]) -> None:
        left, replace = itertools.count(writes, -1), Path.replace

        def last(path: Path, target: Path) -> Path:
            if next(left) <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(path, target)

        Path.replace = last  # type: ignore[method-assign, assignment]
        fix_folder("llava", source, workers=1, **place)

    def run(writes: int, folder: str) -> int:
        place = {"in_place": True} if in_place else {"out": tmp_path / f"out-{folder}"}
        process = FORK.Process(target=fix, args=(writes, tmp_path / folder, place))
        process.start()
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    assert run(10**6, "whole") == 0
    writes = 0
    while (status := run(writes, "killed")) == -signal.SIGKILL:
        writes += 8  # so that it goes on by a few files each time
    assert (status, writes > 8) == (0, True)
    names = ("whole", "killed") if in_place else ("out-whole", "out-killed")
    whole, killed = (files(tmp_path / name) for name in names)
    for found in (whole, killed):
        found["relook-fix.json"] = found["relook-fix.json"].replace(b"/whole", b"").replace(b"/killed", b"")
    assert killed == whole


# Other layouts


def write_vg(root: Path, ids: range) -> None:
    records = [{"image_id": i, "url": f"https://x/VG_100K{'_2' if i % 2 else ''}/{i}.jpg"} for i in ids]
    write_json(root / "image_data.json", records)
    for record in records:
        path = root.joinpath(*record["url"].split("/")[-2:])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(random.Random(record["image_id"])))


def test_hadpo(tmp_path: Path) -> None:
    folder, fixed = tmp_path / "source", tmp_path / "fixed"
    write_vg(folder / "vg", range(1, 9))
    (folder / "vg/VG_100K/8.jpg").unlink()
    (folder / "vg/VG_100K_2/7.jpg").write_bytes(b"")
    pair = {"chosen": ["A dog."], "rejected": ["A cat."]}
    same = {"chosen": ["a", "b"], "rejected": ["b "]}
    described = json.dumps({"1": pair, "2": same, "7": pair, "8": pair, "99": pair})
    described = described[:-1] + f', "1": {json.dumps(pair)}, "3": {{"chosen": [], "rejected": ["b"]}}}}'
    (folder / "desc_data.json").write_text(described)
    ask = {"image_id": 4, "question": "Is it?", "chosen": "Yes.", "reject": "No.", "answer": "No.", "correct": False}
    asked = [ask, ask, {**ask, "chosen": "No."}, {**ask, "chosen": ""}, {k: v for k, v in ask.items() if k != "reject"}]
    write_json(folder / "pope_data.json", asked)
    report = check_folder("hadpo", folder)
    assert record_faults(report) == {
        "chosen equals rejected": {"pope-2"},  # of the file that comes last
        "no chosen or no rejected description": {"desc-3"},
        "image id not in image_data.json": {"desc-99"},
        "duplicate": {"pope-1"},
        "image file missing": {"desc-8"},
        "image file broken": {"desc-7"},
        "empty text": {"pope-3"},
        "no reject": {"pope-4"},
    }
    assert report.indexes[0].faults["chosen equals rejected"] == ["desc-2"]
    assert report.indexes[0].faults["duplicate"] == ["desc-1 (number 2)"]
    assert image_faults(report) == {"missing": {"VG_100K/8.jpg"}, "empty file": {"VG_100K_2/7.jpg"}}
    fix_folder("hadpo", folder, fixed)
    assert check_folder("hadpo", fixed).clean
    pairs, dropped = read_hadpo(fixed / "vg", fixed / "desc_data.json", fixed / "pope_data.json", on_bad="error")
    assert ([pair.id for pair in pairs], dropped.dropped) == (["pope-0", "desc-1", "desc-1"], 0)


def test_pope_of_the_original_is_clean_but_for_its_images(refdata: Path) -> None:
    report = check_folder("pope", refdata / "pope" / "questions", workers=1)
    assert [len(one.content) for one in report.indexes] == [3000] * len(report.indexes)
    assert {reason for one in report.indexes for reason in one.faults} == {"image file missing"}
    assert set(image_faults(report)) == {"missing"}


def test_pope(tmp_path: Path) -> None:
    ask = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog?", "label": "yes"}
    unsure, mute = {**ask, "question_id": 2, "label": "maybe"}, {**ask, "question_id": 4, "text": ""}
    lines = [ask, ask, unsure, {"question_id": 3}, mute]
    for split in ("random", "popular"):
        write_jsonl(tmp_path / "pope" / f"coco_pope_{split}.json", lines)
    with (tmp_path / "pope/coco_pope_random.json").open("a") as file:
        file.write('{"question_id": 7, "ima\n')
    (tmp_path / "val2014").mkdir()
    report = check_folder("pope", tmp_path)
    assert [part.path.name for part in report.layout.parts if part.needed and not part.exists] == [
        "coco_pope_adversarial.json"
    ]
    popular, random_ = (one.faults for one in report.indexes)
    expected = {
        "duplicate": ["coco_pope_popular-1"],
        "label is neither yes nor no": ["coco_pope_popular-2"],
        "no image, text, label": ["coco_pope_popular-3"],
        "empty text": ["coco_pope_popular-4"],
        "image file missing": ["coco_pope_popular-0"],
    }
    assert popular == expected
    assert random_["not valid JSON"] == ["coco_pope_random-5"]


def test_shr(tmp_path: Path) -> None:
    write_vg(tmp_path / "vg", range(1, 5))
    write_json(tmp_path / "shr/val_images_final.json", [{"image_id": i} for i in (1, 2, 2, 50)] + [{}])
    write_jsonl(tmp_path / "shr/shr_factual_part1.jsonl", [{"1": ["A dog."]}, {"2": []}, {"1": ["a"], "2": ["b"]}])
    report = check_folder("shr", tmp_path)
    assert record_faults(report) == {
        "duplicate": {"val-2"},
        "image id not in image_data.json": {"val-3"},
        "no image_id": {"val-4"},
        "empty text": {"factual_part1-1"},
        "not one image id with its facts": {"factual_part1-2"},
    }
    missing = [part.path.name for part in report.layout.parts if part.needed and not part.exists]
    assert missing == ["shr_factual_part2.jsonl", "region_descriptions.json"]


def test_amber(tmp_path: Path) -> None:
    ask = {"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."}
    write_json(tmp_path / "data/query/query_all.json", [ask, ask, {**ask, "id": 2, "query": " "}, {"id": 3}])
    write_json(tmp_path / "data/annotations.json", [{"id": 1, "type": "generative", "truth": ["dog"]}, {"id": 2}])
    (tmp_path / "image").mkdir()
    (tmp_path / "image/AMBER_1.jpg").write_bytes(encoded(random.Random(0)))
    assert record_faults(check_folder("amber", tmp_path)) == {
        "duplicate": {"query_all-1"},
        "empty text": {"query_all-2"},
        "no image, query": {"query_all-3"},
        "no type, truth": {"annotations-1"},
    }


# Odd things


def test_images_elsewhere_are_found_and_fixed_there(tmp_path: Path) -> None:
    """HA-DPO's files in one folder, Visual Genome in another, its second half a link."""
    write_vg(tmp_path / "genome", range(1, 5))
    (tmp_path / "genome/VG_100K_2").rename(tmp_path / "disk")
    (tmp_path / "genome/VG_100K_2").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/3.jpg").write_bytes(encoded(random.Random(0), "PNG"))
    pair = {"chosen": ["A dog."], "rejected": ["A cat."]}
    write_json(tmp_path / "pairs/desc_data.json", {"1": pair, "2": pair, "3": pair, "4": {**pair, "rejected": []}})
    report = check_folder("hadpo", tmp_path / "pairs", tmp_path / "genome")
    assert image_faults(report) == {"wrong extension": {"VG_100K_2/3.jpg"}}
    fix_folder("hadpo", tmp_path / "pairs", tmp_path / "new", images=tmp_path / "genome")
    assert check_folder("hadpo", tmp_path / "new", tmp_path / "new/genome").clean
    fix_folder("hadpo", tmp_path / "pairs", in_place=True, images=tmp_path / "genome")
    assert check_folder("hadpo", tmp_path / "pairs", tmp_path / "genome").clean
    assert Image.open(tmp_path / "disk/3.jpg").format == "JPEG"
    assert sorted(path.name for path in (tmp_path / "pairs").iterdir()) == ["desc_data.json", "relook-fix.json"]


def test_names_that_are_no_text_circles_and_pipes(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    (folder / "images/inner").mkdir(parents=True)
    (folder / "images/inner/back").symlink_to(folder / "images")
    Path(os.fsdecode(os.fsencode(folder / "images") + b"/\xff.jpg")).write_bytes(b"")
    os.mkfifo(folder / "images/pipe.jpg")
    talk = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "Ada."}]
    records = [{"image": name, "conversations": talk} for name in ("pipe.jpg", "inner", f"{'x' * 300}.jpg", "a\0.jpg")]
    write_json(folder / "mix.json", records)
    report = check_folder("llava", folder)
    assert image_faults(report) == {
        "empty file": {"\\udcff.jpg"},
        "unreadable": {"pipe.jpg", "inner", f"{'x' * 300}.jpg"},
    }
    assert record_faults(report) == {"image file broken": {"0", "1", "2"}, "image path leads out of its folder": {"3"}}
    assert fix_folder("llava", folder, tmp_path / "out")["images_left_out"]["empty file"] == ["\\udcff.jpg"]


@pytest.mark.parametrize("text", ["[" * 100_000, f"[{'1' * 5000}]", "[NaN", "\xff", ""])
def test_an_index_that_is_no_json(text: str, tmp_path: Path) -> None:
    write_vg(tmp_path / "vg", range(1, 2))
    (tmp_path / "pope_data.json").write_bytes(text.encode("latin-1"))
    report = check_folder("hadpo", tmp_path)
    assert "pope_data.json is not" in report.indexes[0].problem


# Mistakes


def test_mistakes_are_said(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    with pytest.raises(DataError, match="no layout 'coco'"):
        check_folder("coco", folder)
    with pytest.raises(DataError, match="no folder"):
        check_folder("llava", folder / "no")
    with pytest.raises(DataError, match="none of hadpo's files"):
        check_folder("hadpo", folder)
    write_json(folder / "mix.json", [])
    with pytest.raises(RelookError, match="--out FOLDER or --in-place"):
        fix_folder("llava", folder)
    with pytest.raises(RelookError, match="lies in"):
        fix_folder("llava", folder, folder / "inside")
    out = tmp_path / "taken"
    write_json(out / "other.json", {})
    with pytest.raises(RelookError, match="holds something else"):
        fix_folder("llava", folder, out)
    (folder / "mix.json").write_text("[{")
    report = check_folder("llava", folder)
    assert "not valid JSON" in report.indexes[0].problem
    assert not report.clean
    with pytest.raises(DataError, match="cannot be fixed"):
        fix_folder("llava", folder, tmp_path / "new")


def test_status_and_json(tmp_path: Path, relook: Command) -> None:
    def run(*words: Any) -> tuple[int, str, str]:
        ended = relook("data", *words)
        return ended.status, ended.out, ended.err

    write_llava(tmp_path / "bad", 20, 1)
    write_json(tmp_path / "good" / "mix.json", [])
    status, out, _ = run("check", "--layout", "llava", tmp_path / "bad", "--json")
    assert (status, json.loads(out)["clean"]) == (1, False)
    status, out, _ = run("check", "--layout", "llava", tmp_path / "bad")
    assert (status, "GIF under .jpg" in out, "truncated" in out) == (1, True, True)
    status, out, _ = run("check", "--layout", "llava", tmp_path / "good")
    assert (status, "clean" in out) == (0, True)
    status, out, err = run("check", "--layout", "coco", tmp_path / "bad")
    assert (status, out, err.count("\n")) == (2, "", 1)
    status, out, err = run("fix", "--layout", "llava", tmp_path / "bad", "--out", tmp_path / "fixed")
    assert (status, out, "8 images written again" in err) == (0, "", True)
    status, out, _ = run("fix", "--layout", "llava", tmp_path / "bad", "--out", tmp_path / "fixed", "--json")
    assert (status, json.loads(out)["finished"]) == (0, True)
