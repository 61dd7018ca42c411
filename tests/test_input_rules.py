"""What a record, a file's bytes or a name may look like, and that every reader, check and conversion agrees on it."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.damaged import encoded, talk
from helpers.variants import crossed
from PIL import Image

from relook.data.check import check_folder, fix_folder, print_report, summary
from relook.data.convert import convert_pairs
from relook.data.layouts import find_layout
from relook.data.readers import read_hadpo, read_llava, read_pairs
from relook.data.samples import ReadReport, as_bool, as_id
from relook.errors import DataError
from relook.evaluate.run import evaluate_model
from relook.evaluate.tasks import get_benchmark
from relook.files import read_json, read_records, read_text, write_json
from relook.toyworld.build import shipped_base

SOUND = ("Is there a dog?", "Yes.", "No.")
BAD = [
    (("", "Yes.", "No."), "empty text"),
    (("What?", " \n", "No."), "empty text"),
    (("What?", "Yes.", "\t"), "empty text"),
    (("What?", "Yes.", "Yes."), "chosen equals rejected"),
    (("What?", "Yes.", " Yes.\n"), "chosen equals rejected"),
]
TRUTH = {
    True: [True, 1, 1.0, "true", "True", "TRUE", "1", "yes", "Yes", " true "],
    False: [False, 0, 0.0, "false", "False", "0", "no", "No", None, "none"],
}


def write_vg(folder: Path, count: int = 1, suffix: str = ".jpg") -> Path:
    entries = [{"image_id": i, "url": f"https://x/VG_100K/{i}.jpg"} for i in range(count)]
    write_json(folder / "image_data.json", entries)
    for name in ("VG_100K", "VG_100K_2"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"VG_100K/{i}{suffix}").write_bytes(encoded(random.Random(i)))
    return folder


def ask(texts: tuple[str, str, str], correct: Any = False, image_id: Any = 0) -> dict[str, Any]:
    question, chosen, reject = texts
    more = {"answer": reject, "correct": correct}
    return {"image_id": image_id, "question": question, "chosen": chosen, "reject": reject, **more}


def by_reason(report: ReadReport) -> dict[str, int]:
    return {reason: len(names) for reason, names in report.reasons.items()}


@pytest.mark.parametrize(("texts", "reason"), BAD)
def test_one_rule_for_a_pair_wherever_it_is_read_checked_or_converted(
    tmp_path: Path, texts: tuple[str, str, str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_vg(tmp_path / "vg", 2)
    # A record that was answered correctly is no pair, and need not be a sound one.
    write_json(folder / "pope_data.json", [ask(texts), ask(SOUND), ask(texts, correct=True)])
    if texts[0].strip():  # descriptions have no prompt of their own
        write_json(folder / "desc_data.json", {"1": {"chosen": [texts[1]], "rejected": [texts[2]]}})
    described = int((folder / "desc_data.json").exists())
    read, report = read_hadpo(folder, folder / "desc_data.json" if described else None, folder / "pope_data.json")
    assert [pair.id for pair in read] == ["pope-1"]
    assert by_reason(report) == {reason: 1 + described}
    assert report.skipped == {"answered correctly": 1}
    checked = check_folder("hadpo", folder)
    assert {r: n for one in checked.indexes for r, n in one.faults.items()} == {reason: ["pope-0"]}
    assert sum(len(one.bad) for one in checked.indexes) == 1 + described
    assert convert_pairs(folder, tmp_path / "out.parquet", "trl") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{1 + described} rows are no pairs and were left out ({reason}: {', '.join('01'[: 1 + described])})" in said
    image = {"bytes": encoded(random.Random(0)), "path": "0.jpg"}
    for layout in ("rlaifv", "rlhfv", "trl"):
        names = ("prompt" if layout == "trl" else "question", "chosen", "rejected")
        rows = [dict(zip(names, one, strict=True)) for one in (texts, SOUND)]
        if layout == "rlhfv":
            rows = [{"text": json.dumps(row)} for row in rows]
        pq.write_table(pa.Table.from_pylist([{**row, "image": image} for row in rows]), tmp_path / f"{layout}.parquet")
        pairs, report = read_pairs(tmp_path / f"{layout}.parquet")
        assert [pair.id for pair in pairs] == ["row-1"]
        assert by_reason(report) == {reason: 1}
        assert convert_pairs(tmp_path / f"{layout}.parquet", tmp_path / f"{layout}_hadpo", "hadpo") == 1


def test_truth_values_and_numbers_as_files_write_them() -> None:
    for truth, values in TRUTH.items():
        assert [as_bool(value) for value in values] == [truth] * len(values)
    assert [as_bool(value) for value in ("maybe", "", 2, -1, [], "01")] == [None] * 6
    assert {as_id(value) for value in (42, "42", 42.0, "000042", " 42")} == {"42"}
    assert [as_id(value) for value in ("a/1.jpg", "1.5", 1.5, "²")] == ["a/1.jpg", "1.5", "1.5", "²"]


def test_correct_in_any_writing_is_read_checked_and_converted_alike(tmp_path: Path) -> None:
    values = [*TRUTH[True], *TRUTH[False], "maybe"]
    folder = write_vg(tmp_path / "vg")
    records = [ask((f"Is it {i}?", "Yes.", "No."), value) for i, value in enumerate(values)]
    write_json(folder / "pope_data.json", records)
    pairs, report = read_hadpo(folder, None, folder / "pope_data.json")
    right, wrong = len(TRUTH[True]), len(TRUTH[False])
    assert [pair.id for pair in pairs] == [f"pope-{right + i}" for i in range(wrong)]
    assert report.skipped == {"answered correctly": right}
    fault = "correct is neither true nor false"
    assert report.reasons == {fault: (f"pope-{len(values) - 1}",)}
    assert dict(check_folder("hadpo", folder).indexes[0].faults) == {fault: [f"pope-{len(values) - 1}"]}
    assert convert_pairs(folder, tmp_path / "out.parquet", "rlaifv") == right + wrong
    again, report = read_pairs(tmp_path / "out.parquet")
    assert [pair.prompt for pair in again] == [pair.prompt for pair in pairs]
    assert report.skipped == {"answered correctly": right}
    done = fix_folder("hadpo", folder, tmp_path / "fixed")
    assert done["records_dropped"] == {"pope_data.json": {fault: [f"pope-{len(values) - 1}"]}}
    assert f"1 records dropped ({fault}: 1)" in summary(done)


def test_image_ids_as_numbers_and_texts_are_the_same(tmp_path: Path) -> None:
    folder = write_vg(tmp_path / "vg", 2)
    ids = [1, "1", 1.0, "0001"]
    write_json(folder / "pope_data.json", [ask((f"{i}?", "Yes.", "No."), image_id=id) for i, id in enumerate(ids)])
    pairs, _ = read_hadpo(folder, None, folder / "pope_data.json", on_bad="error")
    assert {pair.images[0].name for pair in pairs} == {"1.jpg"}
    assert check_folder("hadpo", folder).clean
    assert convert_pairs(folder, tmp_path / "out.parquet", "trl") == len(ids)


# Bytes of text files

ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_in_any_unicode_encoding_is_the_same_text(tmp_path: Path, encoding: str) -> None:
    path, records = tmp_path / "a.json", [{"a": "naïve 图"}, {"a": "b"}]
    for text in ("\r\n".join(map(json.dumps, records)), json.dumps(records, ensure_ascii=False)):
        path.write_bytes(text.encode(encoding))
        assert read_records(path) == records
        assert read_text(path) == text.replace("\r\n", "\n")


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text \(invalid start byte at byte 2\)"):
        read_text(tmp_path / "a.txt")


@pytest.mark.parametrize(("encoding", "array"), crossed([*ENCODINGS], [False, True]))
def test_no_record_is_lost_to_an_encoding(world: Path, tmp_path: Path, encoding: str, array: bool) -> None:
    shutil.copytree(world / "test", tmp_path / "test")
    for file in (tmp_path / "test/pope").iterdir():
        text = json.dumps(read_records(file)) if array else file.read_text()
        file.write_text(text, encoding=encoding)
    assert not any(one.faults for one in check_folder("pope", tmp_path / "test").indexes)
    assert get_benchmark("pope").read_questions(tmp_path / "test").keys() == {
        "pope_random",
        "pope_popular",
        "pope_adversarial",
    }
    done = fix_folder("pope", tmp_path / "test", tmp_path / "fixed")
    assert done["records_dropped"] == {}
    mix = read_json(world / "llava/toyworld_mix.json")
    shutil.copytree(world / "llava/images", tmp_path / "llava/images")
    (tmp_path / "llava/mix.json").write_text(json.dumps(mix), encoding=encoding)
    assert check_folder("llava", tmp_path / "llava").clean
    kept, report = read_llava(tmp_path / "llava/mix.json", tmp_path / "llava/images", on_bad="error")
    assert (len(kept), report.dropped) == (len(mix), 0)


# Names of image files


def test_an_extension_in_another_case_is_the_same_file_to_every_reader(tmp_path: Path) -> None:
    vg = write_vg(tmp_path / "vg", suffix=".JPG")
    write_json(vg / "pope_data.json", [ask(SOUND)])
    [pair], _ = read_hadpo(vg, None, vg / "pope_data.json", on_bad="error")
    assert pair.images == (vg / "VG_100K/0.JPG",)
    assert convert_pairs(vg, tmp_path / "out.parquet", "trl") == 1
    record = {"id": "1", "image": "0.jpg", "conversations": talk("<image>\nWhat?", "A dog.")}
    write_json(vg / "VG_100K/mix.json", [record])
    [sample], _ = read_llava(vg / "VG_100K/mix.json", vg / "VG_100K", on_bad="error")
    assert sample.images == pair.images
    row = {"image": {"bytes": None, "path": "0.jpg"}, "question": "What?", "chosen": "A dog.", "rejected": "A cat."}
    pq.write_table(pa.Table.from_pylist([row]), vg / "VG_100K/named.parquet")
    assert read_pairs(vg / "VG_100K/named.parquet", tmp_path / "images")[1].dropped == 0
    fixed = tmp_path / "fixed"
    assert fix_folder("hadpo", vg, fixed)["records_dropped"] == {}
    assert (fixed / "VG_100K/0.jpg").read_bytes() == pair.images[0].read_bytes()  # not encoded again
    assert check_folder("hadpo", fixed, named_only=True).clean


def test_a_broken_file_under_another_extension_is_broken(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    (folder / "images").mkdir(parents=True)
    (folder / "images/1.JPG").write_bytes(encoded(random.Random(0))[:400])
    write_json(folder / "mix.json", [{"id": "1", "image": "1.jpg", "conversations": talk("<image>\nWho?", "Ada.")}])
    assert check_folder("llava", folder, named_only=True).faults["1.jpg"][0] == "truncated"
    assert fix_folder("llava", folder, tmp_path / "fixed")["records_dropped"]


def test_evaluations_find_images_whose_extension_is_in_another_case(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "test", tmp_path / "test")
    expected = {
        name: {
            stem: [q.image.stem for q in qs]
            for stem, qs in get_benchmark(name).read_questions(tmp_path / "test").items()
        }
        for name in ("pope", "chair", "shr")
    }
    for image in (tmp_path / "test").rglob("*.jpg"):
        image.rename(image.with_suffix(".JPG"))
    for name, stems in expected.items():
        asked = get_benchmark(name).read_questions(tmp_path / "test")
        assert {stem: [q.image.stem for q in qs] for stem, qs in asked.items()} == stems
        assert all(q.image.is_file() for qs in asked.values() for q in qs)


# HA-DPO's own tree


def test_hadpos_own_tree_is_checked_and_evaluated_like_relooks(world: Path, tmp_path: Path) -> None:
    data, own = tmp_path / "ha_dpo/data", world / "test"
    for source, target in {
        "pope": "POPE/output/coco",
        "val2014": "coco2014/val2014",
        "annotations": "coco2014/annotations",
        "vg": "VG",
        "shr": "shr",
    }.items():
        shutil.copytree(own / source, data / target)
    for name in ("pope", "shr"):
        layout = find_layout(name, data)
        assert all(part.exists for part in layout.parts)
    assert check_folder("pope", data).clean
    names = ["pope", "chair", "shr"]
    for folder, out in ((data, "hers"), (own, "ours")):
        evaluate_model(shipped_base(), names, folder, tmp_path / out, max_new_tokens=8)
    for name in names:
        hers, ours = (read_json(tmp_path / out / f"{name}.json") for out in ("hers", "ours"))
        del hers["provenance"], ours["provenance"]
        assert hers == ours


# What a check says of pictures


def test_a_turned_picture_is_named_and_is_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images").mkdir()
    for name, more in (("turned.jpg", {"exif": exif}), ("plain.jpg", {})):
        Image.new("RGB", (8, 6)).save(tmp_path / "images" / name, **more)
    records = [
        {"id": name, "image": f"{name}.jpg", "conversations": talk("<image>\nWho?", "Ada.")}
        for name in ("turned", "plain")
    ]
    write_json(tmp_path / "mix.json", records)
    report = check_folder("llava", tmp_path)
    assert report.clean
    assert report.turned == {"turned.jpg": "orientation 6"}
    assert report.to_json()["images"]["sound"] == 2
    print_report(report)
    said = " ".join(capsys.readouterr().out.split())
    assert "1 images are turned by their EXIF orientation: turned.jpg (orientation 6)" in said


def test_a_transparent_colour_is_an_unusual_mode(tmp_path: Path) -> None:
    folder, fixed = tmp_path / "source", tmp_path / "fixed"
    (folder / "images").mkdir(parents=True)
    Image.new("RGB", (8, 6), "red").save(folder / "images/key.png", transparency=(255, 0, 0))
    write_json(folder / "mix.json", [])
    fault = ("unusual mode", "PNG in mode RGB with a transparent colour")
    assert check_folder("llava", folder).faults == {"key.png": fault}
    fix_folder("llava", folder, fixed)
    again = Image.open(fixed / "images/key.png")
    assert again.info.get("transparency") is None
    assert again.getpixel((0, 0)) == (255, 0, 0)
