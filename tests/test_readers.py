"""Readers of preference pairs, conversations and annotations, on small files in the official layouts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from relook.data.annotations import Region, read_captions, read_coco, read_image_paths, read_objects, read_regions
from relook.data.readers import read_hadpo, read_llava
from relook.data.samples import PreferencePair, ReadReport, Turn
from relook.errors import DataError, RecipeError


def write(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


@pytest.fixture
def vg(tmp_path: Path) -> Path:
    """Visual Genome with images 1 to 9, odd ones in the first folder; the file of image 9 is missing."""
    folder = tmp_path / "vg"
    records = []
    for number in range(1, 10):
        part = "VG_100K" if number % 2 else "VG_100K_2"
        records.append({"image_id": number, "url": f"https://cs.stanford.edu/people/rak248/{part}/{number}.jpg"})
        (folder / part).mkdir(parents=True, exist_ok=True)
        if number != 9:
            (folder / part / f"{number}.jpg").touch()
    write(folder / "image_data.json", records)
    return folder


# HA-DPO


def question(image_id: object, chosen: str = "No.", reject: str = "Yes.", correct: bool = False) -> dict[str, Any]:
    text = "Is there a dog in the image?"
    keys = ("image_id", "question", "chosen", "reject", "answer", "correct")
    return dict(zip(keys, (image_id, text, chosen, reject, reject, correct), strict=True))


def test_hadpo_mixes_and_draws_as_the_original(vg: Path, tmp_path: Path) -> None:
    """The expected draws come from Python's global generator, seeded and used in the order of HA-DPO's train_dpo.py."""
    described = {
        str(i): {"chosen": [f"c{i}{j}" for j in range(3)], "rejected": [f"r{i}{j}" for j in range(4)]}
        for i in (5, 2, 8, 1)
    }
    asked = [question(3), question(4, correct=True), question("6", "Yes.", "No.")]
    pairs, report = read_hadpo(vg, write(tmp_path / "d.json", described), write(tmp_path / "p.json", asked))

    prompts = [
        "Describe this image in detail.",
        "Take a look at this image and describe what you notice.",
        "Please provide a detailed description of the picture.",
        "Could you describe the contents of this image for me?",
    ]
    state = random.getstate()
    random.seed(42)
    draws = [
        (i, random.choice(r["chosen"]), random.choice(r["rejected"]), random.choice(prompts))
        for i, r in described.items()
    ]
    random.setstate(state)
    descriptions = [
        PreferencePair(
            f"desc-{i}", (vg / ("VG_100K" if int(i) % 2 else "VG_100K_2") / f"{i}.jpg",), prompt, chosen, rejected
        )
        for i, chosen, rejected, prompt in draws
    ]
    text = "Is there a dog in the image?"
    assert pairs == [
        PreferencePair("pope-0", (vg / "VG_100K/3.jpg",), text, "No.", "Yes."),
        PreferencePair("pope-2", (vg / "VG_100K_2/6.jpg",), text, "Yes.", "No."),
        *descriptions,
        *descriptions,
    ]
    assert report == ReadReport(f"{tmp_path / 'd.json'} + {tmp_path / 'p.json'}", 10, {}, {"answered correctly": 1})
    assert report.summary().endswith("10 samples, 1 skipped (answered correctly), none dropped.")


def test_hadpo_reads_either_file_alone(vg: Path, tmp_path: Path) -> None:
    described = write(tmp_path / "d.json", {"1": {"chosen": ["a"], "rejected": ["b"]}})
    assert [pair.id for pair in read_hadpo(vg, described)[0]] == ["desc-1", "desc-1"]
    assert [pair.id for pair in read_hadpo(vg, None, write(tmp_path / "p.json", [question(1)]))[0]] == ["pope-0"]
    with pytest.raises(DataError, match="no preference pairs"):
        read_hadpo(vg)


BAD_DESCRIPTIONS: list[tuple[str, Any, str]] = [
    ("2", {"chosen": ["a"], "rejected": ["a "]}, "chosen equals rejected"),
    ("3", {"chosen": [], "rejected": ["b"]}, "no chosen or no rejected description"),
    ("4", {"chosen": "text", "rejected": ["b"]}, "no chosen or no rejected description"),
    ("5", {"rejected": ["b"]}, "no chosen or no rejected description"),
    ("6", {"chosen": [" "], "rejected": ["b"]}, "empty text"),
    ("7", {"chosen": [None], "rejected": ["b"]}, "empty text"),
    ("9", {"chosen": ["a"], "rejected": ["b"]}, "image file missing"),
    ("77", {"chosen": ["a"], "rejected": ["b"]}, "image id not in image_data.json"),
]
BAD_QUESTIONS: list[tuple[Any, str]] = [
    (question(1, "No.", "No."), "chosen equals rejected"),
    (question(1, "", "No."), "empty text"),
    (question(9), "image file missing"),
    (question(77), "image id not in image_data.json"),
    ({"image_id": 1, "question": "?", "chosen": "No."}, "no reject, correct"),
    ("text", "no image_id, question, chosen, reject, correct"),
]


def test_hadpo_names_every_pair_it_drops(vg: Path, tmp_path: Path) -> None:
    described = {key: record for key, record, _ in BAD_DESCRIPTIONS} | {"8": {"chosen": ["a"], "rejected": ["b"]}}
    asked = [record for record, _ in BAD_QUESTIONS] + [question(1)]
    pairs, report = read_hadpo(vg, write(tmp_path / "d.json", described), write(tmp_path / "p.json", asked))
    assert [pair.id for pair in pairs] == ["pope-6", "desc-8", "desc-8"]
    expected: dict[str, list[str]] = {}
    for number, (_, reason) in enumerate(BAD_QUESTIONS):
        expected.setdefault(reason, []).append(f"pope-{number}")
    for key, _, reason in BAD_DESCRIPTIONS:
        expected.setdefault(reason, []).append(f"desc-{key}")
    assert report.reasons == {reason: tuple(names) for reason, names in expected.items()}
    assert report.dropped == len(BAD_DESCRIPTIONS) + len(BAD_QUESTIONS)
    assert "image file missing: 2 (pope-2, desc-9)" in report.summary()
    assert "\n" not in report.summary()


@pytest.mark.parametrize(("key", "record", "reason"), BAD_DESCRIPTIONS)
def test_hadpo_raises_if_asked_to(vg: Path, tmp_path: Path, key: str, record: Any, reason: str) -> None:
    with pytest.raises(DataError, match=rf"bad samples: {reason}: 1 \(desc-{key}\)"):
        read_hadpo(vg, write(tmp_path / "d.json", {key: record}), on_bad="error")


def test_dropping_a_description_leaves_the_other_draws_alone(vg: Path, tmp_path: Path) -> None:
    sound = {str(i): {"chosen": [*"abcdef"], "rejected": [*"uvwxyz"]} for i in range(1, 9)}
    whole, _ = read_hadpo(vg, write(tmp_path / "d.json", sound))
    (vg / "VG_100K/3.jpg").unlink()
    fewer, _ = read_hadpo(vg, tmp_path / "d.json")
    assert fewer == [pair for pair in whole if pair.id != "desc-3"]


def test_hadpo_refuses_swapped_files_and_unknown_options(vg: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds a list, but a dict is expected"):
        read_hadpo(vg, write(tmp_path / "p.json", [question(1)]))
    with pytest.raises(RecipeError, match="on_bad is 'ignore'"):
        read_hadpo(vg, None, tmp_path / "p.json", on_bad="ignore")
    with pytest.raises(DataError, match="no Visual Genome folder"):
        read_hadpo(tmp_path / "nowhere", None, tmp_path / "p.json")


# Visual Genome


def test_visual_genome(vg: Path) -> None:
    box = {"x": 1, "y": 2, "w": 3, "h": 4}
    write(
        vg / "objects.json",
        [
            {"image_id": 1, "objects": [{"object_id": 5, "names": ["Man ", "person"], **box}]},
            {"image_id": 2, "objects": []},
        ],
    )
    region = {"region_id": 7, "image_id": 1, "phrase": "a man", "x": 1, "y": 2, "width": 3, "height": 4}
    write(vg / "region_descriptions.json", [{"id": 1, "regions": [region]}])
    assert read_image_paths(vg)["2"] == vg / "VG_100K_2" / "2.jpg"
    assert read_objects(vg) == {"1": {"man", "person"}, "2": set()}
    assert read_regions(vg) == {"1": (Region("a man", (1, 2, 3, 4)),)}
    write(vg / "objects.json", [{"image_id": 1, "objects": []}, {"id": 2}])
    with pytest.raises(DataError, match="record 2 is not in Visual Genome's layout"):
        read_objects(vg)


# LLaVA


def talk(*values: str, first: int = 0) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values, first)]


def test_llava_layout(tmp_path: Path) -> None:
    (tmp_path / "coco").mkdir()
    for name in ("coco/1.jpg", "2.jpg"):
        (tmp_path / name).touch()
    records = [
        {"id": "a", "image": "coco/1.jpg", "conversations": talk("<image>\nWhat?", "This.", "And?", "That.")},
        {"id": "b", "conversations": talk("Hello", "Hi.")},
        {"image": ["coco/1.jpg", "2.jpg"], "conversations": talk("<image> or <image>?", "Both.")},
    ]
    samples, report = read_llava(write(tmp_path / "mix.json", records), tmp_path)
    assert [(s.id, s.images, s.turns) for s in samples] == [
        ("a", (tmp_path / "coco/1.jpg",), (Turn("<image>\nWhat?", "This."), Turn("And?", "That."))),
        ("b", (), (Turn("Hello", "Hi."),)),
        ("2", (tmp_path / "coco/1.jpg", tmp_path / "2.jpg"), (Turn("<image> or <image>?", "Both."),)),
    ]
    assert (report.used, report.dropped) == (3, 0)


BAD_CONVERSATIONS: list[tuple[Any, str]] = [
    ({"conversations": talk("a", "b", "c")}, "turns do not alternate between human and gpt"),
    ({"conversations": talk("a", "b", first=1)}, "turns do not alternate between human and gpt"),
    ({"conversations": talk("a") + talk("b")}, "turns do not alternate between human and gpt"),
    ({"conversations": []}, "turns do not alternate between human and gpt"),
    ({"conversations": talk("a", " ")}, "empty answer"),
    ({"conversations": talk("a", "<image>")}, "<image> in an answer"),
    ({"conversations": [{"from": "human"}, {"from": "gpt", "value": "b"}]}, "a turn without text"),
    ({"conversations": talk("<image>", "b")}, "number of <image> differs from the number of images"),
    ({"image": "1.jpg", "conversations": talk("a", "b")}, "number of <image> differs from the number of images"),
    ({"image": "1.jpg", "conversations": talk("<image><image>", "b")}, "number of <image> differs"),
    ({"image": "no.jpg", "conversations": talk("<image>", "b")}, "image file missing"),
    ({"image": [7], "conversations": talk("<image>", "b")}, "image is not a path"),
    ({"conversations": "text"}, "no conversations"),
    ("text", "no conversations"),
]


def test_llava_names_every_conversation_it_drops(tmp_path: Path) -> None:
    (tmp_path / "1.jpg").touch()
    file = write(tmp_path / "mix.json", [record for record, _ in BAD_CONVERSATIONS])
    samples, report = read_llava(file, tmp_path)
    assert samples == []
    named = {name: reason for reason, names in report.reasons.items() for name in names}
    assert len(named) == len(BAD_CONVERSATIONS)
    for number, (_, reason) in enumerate(BAD_CONVERSATIONS):
        assert named[str(number)].startswith(reason)
    with pytest.raises(DataError, match="bad samples: turns do not alternate"):
        read_llava(file, tmp_path, on_bad="error")


# COCO


def test_coco_instances_and_captions(tmp_path: Path) -> None:
    images = [{"id": 9, "file_name": "b.jpg"}, {"id": 4, "file_name": "a.jpg"}]
    categories = [{"id": 18, "name": "dog", "synonyms": ["puppy"]}, {"id": 3, "name": "car"}]
    boxes = [
        {"id": 1, "image_id": 9, "category_id": 18, "bbox": [1.5, 2, 3, 4], "iscrowd": 0},
        {"id": 2, "image_id": 9, "category_id": 18, "bbox": [5, 6, 7, 8], "iscrowd": 1},
    ]
    found = read_coco(write(tmp_path / "i.json", {"images": images, "categories": categories, "annotations": boxes}))
    assert (found.images, found.categories) == (("b.jpg", "a.jpg"), ("dog", "car"))
    assert found.objects == {"b.jpg": {"dog"}, "a.jpg": set()}
    assert found.boxes == {"b.jpg": (("dog", (1.5, 2, 3, 4)), ("dog", (5, 6, 7, 8))), "a.jpg": ()}
    assert found.synonyms == {"dog": ("puppy",)}
    said = [{"image_id": 4, "id": 1, "caption": "A car."}, {"image_id": 4, "id": 2, "caption": "A red car."}]
    captions = read_captions(write(tmp_path / "c.json", {"images": images, "annotations": said}))
    assert captions == {"b.jpg": (), "a.jpg": ("A car.", "A red car.")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": None}, "has no list categories"),
        ({"annotations": [{"image_id": 1, "category_id": 5, "bbox": [0, 0, 1, 1]}]}, "names the unknown 5"),
        ({"annotations": [{"image_id": 5, "category_id": 1, "bbox": [0, 0, 1, 1]}]}, "names the unknown 5"),
        ({"annotations": [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1]}]}, "not in COCO's layout"),
        ({"images": [{"id": 1}]}, "file_name"),
    ],
)
def test_coco_faults_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    sound = {"images": [{"id": 1, "file_name": "a"}], "categories": [{"id": 1, "name": "dog"}], "annotations": []}
    assert read_coco(write(tmp_path / "i.json", sound)).images == ("a",)
    with pytest.raises(DataError, match=message):
        read_coco(write(tmp_path / "i.json", sound | change))
