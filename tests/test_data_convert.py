"""Preference layouts: readers as training data, and conversions that lose nothing."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.damaged import encoded
from helpers.tiny import dpo_keys
from PIL import Image

from relook.data.convert import FOLDERS, PAIR_LAYOUTS, convert_pairs
from relook.data.readers import read_hadpo, read_pairs
from relook.errors import DataError, RecipeError
from relook.files import read_json, write_json
from relook.recipe import build_recipe
from relook.train.run import read_samples, train

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def images(count: int) -> list[dict[str, Any]]:
    return [{"bytes": encoded(random.Random(i), "PNG" if i % 2 else "JPEG"), "path": f"{i}.jpg"} for i in range(count)]


def rlhfv(path: Path) -> Path:
    """As the published file: its columns, their order and types; one text with a key that the layout has not."""
    texts = [{"question": f"What is {i}?", "chosen": f"A “dog” {i}.", "rejected": "A cat."} for i in range(5)]
    rows = {
        "ds_name": ["RLHF-V"] * 5,
        "image": pa.array([{**one, "path": None if i == 3 else one["path"]} for i, one in enumerate(images(5))], IMAGE),
        "text": [json.dumps(texts[0]), *(json.dumps({**t, "note": 1}, indent=1) for t in texts[1:3])]
        + [json.dumps(t, ensure_ascii=False) for t in texts[3:]],
        "origin_dataset": ["LCS-558K", None, "VQAv2", "", "x"],
        "origin_split": [json.dumps({"model": "Muffin", "type": "question answering"})] * 5,
        "idx": pa.array(range(5), pa.int32()),
        "image_path": [f"COCO/{i}.jpg" for i in range(5)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), path)
    return path


def rlaifv(path: Path) -> Path:
    rows = {
        "ds_name": ["RLAIF-V"] * 4,
        "image": pa.array([*images(3), images(1)[0]], IMAGE),
        "question": [f"What is {i}?" for i in range(4)],
        "chosen": ["A dog."] * 4,
        "rejected": [f"A cat {i}." for i in range(4)],
        "scores": [[0.5, 1.0], [], None, [2.0]],
        "origin_split": ['{"model": "LLaVA"}'] * 4,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), path)
    return path


def said(role: str, text: str, images: int = 0) -> list[dict[str, Any]]:
    return [{"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}]


def trl(path: Path, form: str = "messages") -> Path:
    """As trl-lib/rlaif-v (messages), or with plain texts, or with an image column and content as a string."""
    prompts, chosen, rejected = [f"What is {i}?" for i in range(3)], ["A dog."] * 3, ["A cat.", "A cow.", "A pig."]
    rows: dict[str, Any] = {"images": pa.array([[one] for one in images(3)], pa.list_(IMAGE))}
    if form == "texts":
        rows |= {"prompt": prompts, "chosen": chosen, "rejected": rejected}
    elif form == "strings":
        rows = {"image": pa.array(images(3), IMAGE)}
        rows |= {"prompt": [[{"role": "user", "content": text}] for text in prompts]}
        rows |= {"chosen": [[{"role": "assistant", "content": text}] for text in chosen]}
        rows |= {"rejected": [[{"role": "assistant", "content": text}] for text in rejected]}
    else:
        rows |= {"prompt": [said("user", text, 1) for text in prompts]}
        rows["prompt"][1][0]["content"].reverse()  # the image behind the text
        rows |= {"chosen": [said("assistant", text) for text in chosen]}
        rows |= {"rejected": [said("assistant", text) for text in rejected]}
    rows["score"] = [1, None, 3]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), path)
    return path


def hadpo(folder: Path) -> Path:
    entries = []
    for i in (5, 6, 7):
        place = f"VG_100K{'_2' if i % 2 else ''}/{i}.jpg"
        entries.append({"image_id": i, "url": f"https://cs.stanford.edu/people/rak248/{place}", "width": 32})
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(encoded(random.Random(i)))
    write_json(folder / "image_data.json", entries)
    texts = {"chosen": ["A dog.", "The dog."], "rejected": ["A cat.", "A cow.", "A pig."]}
    write_json(folder / "desc_data.json", {"6": texts, "5": {**texts, "note": "kept"}})
    ask = {
        "image_id": 7,
        "question": "Is it?",
        "chosen": "Yes.",
        "reject": "No.",
        "answer": "No, it is.",
        "correct": False,
    }
    write_json(folder / "pope_data.json", [ask, {**ask, "correct": True}, {**ask, "image_id": "5", "origin": "model"}])
    return folder


def table(path: Path) -> tuple[Any, list[Any]]:
    found = pq.read_table(path)
    return [(field.name, field.type) for field in found.schema], found.to_pylist()


def folder(path: Path) -> dict[str, bytes]:
    return {str(one.relative_to(path)): one.read_bytes() for one in sorted(path.rglob("*")) if one.is_file()}


PARQUET = {
    "rlhfv": rlhfv,
    "rlaifv": rlaifv,
    "trl": trl,
    "trl texts": lambda path: trl(path, "texts"),
    "trl strings": lambda path: trl(path, "strings"),
}


@pytest.mark.parametrize(
    ("name", "by"), [(name, to) for name in PARQUET for to in PAIR_LAYOUTS if not name.startswith(to)]
)
def test_there_and_back_is_the_same_file(name: str, by: str, tmp_path: Path) -> None:
    """Columns, their order and types, and every value."""
    source, layout = PARQUET[name](tmp_path / "source.parquet"), name.split()[0]
    between = tmp_path / ("between" if by in FOLDERS else "between.parquet")
    convert_pairs(source, between, by)
    convert_pairs(between, tmp_path / "back.parquet", layout)
    schema, rows = table(source)
    schema_back, rows_back = table(tmp_path / "back.parquet")
    kept = [name for name, _ in schema]
    assert [(name, kind) for name, kind in schema_back if name in kept] == schema
    assert [{name: row[name] for name in kept} for row in rows_back] == rows
    # Nothing is added but what the other layout had to have.
    assert {name for row in rows_back for name, value in row.items() if value is not None} <= set(kept)


@pytest.mark.parametrize("by", ["trl", "rlhfv", "rlaifv", "sentinel"])
def test_hadpo_there_and_back(by: str, tmp_path: Path) -> None:
    source = hadpo(tmp_path / "source")
    between = tmp_path / ("between" if by in FOLDERS else "between.parquet")
    convert_pairs(source, between, by)
    convert_pairs(between, tmp_path / "back", "hadpo")
    for name in ("desc_data.json", "pope_data.json"):
        assert read_json(tmp_path / "back" / name) == read_json(source / name)
    ids = lambda found: sorted(found, key=lambda one: one["image_id"])  # noqa: E731
    assert ids(read_json(tmp_path / "back" / "image_data.json")) == ids(read_json(source / "image_data.json"))
    pictures = {name: data for name, data in folder(source).items() if name.endswith(".jpg")}
    assert {name: data for name, data in folder(tmp_path / "back").items() if name.endswith(".jpg")} == pictures


def test_all_the_way_round(tmp_path: Path) -> None:
    source = rlhfv(tmp_path / "0.parquet")
    convert_pairs(source, tmp_path / "1.parquet", "trl")
    convert_pairs(tmp_path / "1.parquet", tmp_path / "2", "hadpo")
    convert_pairs(tmp_path / "2", tmp_path / "3.parquet", "rlaifv")
    convert_pairs(tmp_path / "3.parquet", tmp_path / "4.parquet", "rlhfv")
    schema, rows = table(source)
    kept = [name for name, _ in schema]
    assert [{name: row[name] for name in kept} for row in table(tmp_path / "4.parquet")[1]] == rows


def test_the_pairs_are_those_that_hadpo_trains_on(tmp_path: Path) -> None:
    source = hadpo(tmp_path / "source")
    convert_pairs(source, tmp_path / "pairs.parquet", "trl")
    pairs, report = read_pairs(tmp_path / "pairs.parquet")
    original, _ = read_hadpo(source, source / "desc_data.json", source / "pope_data.json")
    text = lambda found: {(p.prompt, p.chosen, p.rejected, p.images[0].read_bytes()) for p in found}  # noqa: E731
    assert text(pairs) == text(original)
    assert report.skipped == {"answered correctly": 1}


def test_trl_and_datasets_read_what_is_written(tmp_path: Path) -> None:
    # Imported here: both take seconds, which test processes that run other tests do without.
    import datasets
    from trl.data_utils import prepare_multimodal_messages

    convert_pairs(rlaifv(tmp_path / "source.parquet"), tmp_path / "pairs.parquet", "trl")
    [row, *_] = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "pairs.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert isinstance(row["images"][0], Image.Image)
    [message] = prepare_multimodal_messages(row["prompt"], images=row["images"])
    assert [part["type"] for part in message["content"]] == ["image", "text"]


def test_what_a_layout_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    two = pa.array([[images(2)[0]], images(2), []], pa.list_(IMAGE))
    columns = {"prompt": ["a", "b", "c"], "chosen": ["x"] * 3, "rejected": ["y"] * 3}
    pq.write_table(pa.table({"images": two, **columns}), tmp_path / "several.parquet")
    for to, out in (("hadpo", "out"), ("rlhfv", "out.parquet")):
        with pytest.raises(DataError, match=r"2 images: 1; 0 images: 2"):
            convert_pairs(tmp_path / "several.parquet", tmp_path / out, to)
        assert not (tmp_path / out).exists()
    turns = [[*said("user", "a", 1), *said("assistant", "b"), *said("user", "c")]] * 3
    pq.write_table(pa.table({"images": two, **columns, "prompt": turns}), tmp_path / "turns.parquet")
    with pytest.raises(DataError, match=r"prompt is not one user message: 0, 1, 2"):
        convert_pairs(tmp_path / "turns.parquet", tmp_path / "out.parquet", "rlaifv")
    clash = {"images": two.slice(0, 1), "question": ["q"], **{name: texts[:1] for name, texts in columns.items()}}
    pq.write_table(pa.table(clash), tmp_path / "clash.parquet")
    for to, out in (("hadpo", "out"), ("rlaifv", "out.parquet")):
        with pytest.raises(DataError, match="columns named question"):
            convert_pairs(tmp_path / "clash.parquet", tmp_path / out, to)
    binary = {"images": two.slice(0, 1), "raw": [b"\xff"], **{name: texts[:1] for name, texts in columns.items()}}
    pq.write_table(pa.table(binary), tmp_path / "binary.parquet")
    with pytest.raises(DataError, match="cannot hold a column"):
        convert_pairs(tmp_path / "binary.parquet", tmp_path / "out", "hadpo")
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".parquet"] == []


def test_mistakes_are_said(tmp_path: Path) -> None:
    source = rlaifv(tmp_path / "source.parquet")
    with pytest.raises(RecipeError, match="no preference layout 'coco'"):
        convert_pairs(source, tmp_path / "a", "coco")
    with pytest.raises(RecipeError, match="does not suit"):
        convert_pairs(source, tmp_path / "a", "trl")
    with pytest.raises(RecipeError, match="is there already"):
        convert_pairs(source, source, "trl")
    with pytest.raises(DataError, match="neither a parquet file"):
        convert_pairs(tmp_path / "none.parquet", tmp_path / "a.parquet", "trl")
    (tmp_path / "broken.parquet").write_bytes(source.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot be read as parquet"):
        convert_pairs(tmp_path / "broken.parquet", tmp_path / "a.parquet", "trl")
    (tmp_path / "flipped.parquet").write_bytes(b"PAR1" + bytes(200) + source.read_bytes()[204:])
    with pytest.raises(DataError, match="cannot be read as parquet"):
        convert_pairs(tmp_path / "flipped.parquet", tmp_path / "a.parquet", "trl")
    odd = {"prompt": [["a"]], "chosen": [["b"]], "rejected": ["c"], "image": [b"x"]}
    pq.write_table(pa.table(odd), tmp_path / "odd.parquet")
    with pytest.raises(DataError, match="prompt is not one user message"):
        convert_pairs(tmp_path / "odd.parquet", tmp_path / "a.parquet", "rlhfv")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="has the columns a"):
        convert_pairs(tmp_path / "other.parquet", tmp_path / "a.parquet", "trl")


def test_kept_records_and_notes_are_not_trusted(tmp_path: Path) -> None:
    """A parquet file says of itself what it was converted from."""
    convert_pairs(hadpo(tmp_path / "source"), tmp_path / "a.parquet", "trl")
    table = pq.read_table(tmp_path / "a.parquet")
    records = ("{", "[1]", '{"file": "desc_data.json"}', '{"image": {"url": "a/.."}, "record": {}}')
    for number, record in enumerate(records):
        column = pa.array([record] * len(table))
        name = tmp_path / f"{number}.parquet"
        pq.write_table(table.set_column(table.column_names.index("hadpo_record"), "hadpo_record", column), name)
        with pytest.raises(DataError, match=r"not what a conversion writes|must end in a folder"):
            convert_pairs(name, tmp_path / "out", "hadpo")
        assert not (tmp_path / "out").exists()
    for number, note in enumerate((b"{", b'{"forms": [], "filled": 3}', b'{"filled": [{}]}')):
        pq.write_table(table.replace_schema_metadata({b"relook": note, b"huggingface": b'{"info": []}'}), name)
        convert_pairs(name, tmp_path / f"sound{number}.parquet", "rlhfv")
    pq.write_table(table.replace_schema_metadata({b"relook": b'{"forms": {"rlhfv": "x"}}'}), name)
    with pytest.raises(DataError, match="note of its columns is broken"):
        convert_pairs(name, tmp_path / "b.parquet", "rlhfv")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"chosen": " "}, "empty text"),
    ({"chosen": "A cat. "}, "chosen equals rejected"),
    ({"chosen": None}, "no question, chosen or rejected"),
    ({"image": {"bytes": None, "path": "no.jpg"}}, "image file missing"),
    ({"image": {"bytes": None, "path": None}}, "no image"),
    ({"image": {"bytes": None, "path": "/etc/hostname"}}, "image path leads out of its folder"),
    ({"image": {"bytes": None, "path": "../a.parquet"}}, "image path leads out of its folder"),
]


def test_bad_rows_are_dropped_and_named(tmp_path: Path) -> None:
    sound = {"image": images(1)[0], "question": "What?", "chosen": "A dog.", "rejected": "A cat."}
    rows = [{**sound, **change} for change, _ in BAD] + [sound, sound]
    schema = pa.schema([("image", IMAGE), *((name, pa.string()) for name in ("question", "chosen", "rejected"))])
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "a.parquet")
    pairs, report = read_pairs(tmp_path / "a.parquet")
    assert [pair.id for pair in pairs] == ["row-7", "row-8"]
    assert pairs[0].images[0] == pairs[1].images[0]
    assert pairs[0].images[0].read_bytes() == sound["image"]["bytes"]
    assert {name: reason for reason, names in report.reasons.items() for name in names} == {
        f"row-{i}": reason for i, (_, reason) in enumerate(BAD)
    }
    with pytest.raises(DataError, match=r"bad samples: empty text: 1 \(row-0\)"):
        read_pairs(tmp_path / "a.parquet", on_bad="error")


def test_a_run_trains_on_a_parquet_file(base: Path, world: Path, tmp_path: Path) -> None:
    """On the same pairs as HA-DPO's files, to the same first loss."""
    convert_pairs(world, tmp_path / "pairs.parquet", "rlhfv", images=world / "vg")
    keys = dpo_keys(base, world, tmp_path / "run", tune_lm_head=True, feature_cache="off", max_steps=1)
    for name in ("vg_path", "desc_data_path", "pope_data_path"):
        del keys[name]
    run = train(build_recipe({**keys, "pairs_path": tmp_path / "pairs.parquet"}))
    log = json.loads((run / "run.json").read_text())
    assert log["samples"] == 18  # six scenes: a description and two questions each
    assert log["log"][0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    with pytest.raises(RecipeError, match="pairs_path"):
        build_recipe({**keys, "pairs_path": tmp_path / "pairs.parquet", "vg_path": "vg"})
    places = {"output_dir": tmp_path / "b", "image_folder": tmp_path / "elsewhere"}
    found, _ = read_samples(build_recipe({**keys, **places, "pairs_path": tmp_path / "pairs.parquet"}))
    assert {pair.images[0].parent for pair in found} == {tmp_path / "elsewhere"}
