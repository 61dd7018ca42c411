"""Object HalBench on a small copy of its files: rates by hand, by its word list and by a judge."""

from __future__ import annotations

import base64
import random
from pathlib import Path
from typing import Any

import pytest
from helpers.damaged import encoded
from helpers.endpoint import Answer, Request, endpoint

from relook.errors import DataError
from relook.evaluate.benchmark import ScoringInputs, score_command
from relook.evaluate.judge import JudgeSettings
from relook.evaluate.tasks import objhal
from relook.evaluate.tasks.objhal import listed_objects, objhal_questions, objhal_vocabulary, read_object_list
from relook.files import write_json, write_jsonl, write_text

SYNONYMS = "person, man, woman\ndog, puppy\ncat\ndining table, table\ncup, mug\nchair, seat\ntoilet\n"
ANSWERS = {
    "1": "A man walks two dogs and a cat. The cat sleeps.",  # cat is absent, twice
    "2": "There is a mug on the wooden table.",
    "3": "The sky is very blue.",
    "4": "Yes.",
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Images 1 and 2 from val2014, 3 and 4 from train2014; a caption adds a dog to image 1."""
    folder = tmp_path / "data"
    write_text(folder / "objhal/synonyms_refine.txt", SYNONYMS)
    images = {i: base64.b64encode(encoded(random.Random(int(i)), "JPEG")).decode() for i in ANSWERS}
    records = [{"image_id": int(i), "question": f"Describe {i}.", "image": image} for i, image in images.items()]
    write_jsonl(folder / "objhal/obj_halbench_300_with_image.jsonl", records)
    categories = [{"id": 1, "name": "person"}, {"id": 2, "name": "dining table"}, {"id": 3, "name": "dog"}]
    for split, ids in (("val2014", (1, 2)), ("train2014", (3, 4))):
        images = [{"id": i, "file_name": f"COCO_{split}_{i:012d}.jpg"} for i in ids]
        boxes = [{"id": i, "image_id": i, "category_id": 1 if i == 1 else 2, "bbox": [0, 0, 1, 1]} for i in ids]
        instances = {"images": images, "categories": categories, "annotations": boxes}
        write_json(folder / f"annotations/instances_{split}.json", instances)
        texts = [{"id": i, "image_id": i, "caption": "Two puppies." if i == 1 else "A room."} for i in ids]
        write_json(folder / f"annotations/captions_{split}.json", {"images": images, "annotations": texts})
    write_jsonl(tmp_path / "answers.jsonl", [{"image_id": int(i), "answer": text} for i, text in ANSWERS.items()])
    return folder


def test_rates_by_the_word_list(data: Path, tmp_path: Path) -> None:
    """Mentions: man, dogs, cat, cat; mug, table. Of six, two cats and a mug are absent, in two of two answers."""
    found = score_command("objhal", [tmp_path / "answers.jsonl"], ScoringInputs(data))
    scores = found["word_list"]
    assert scores["mention"] == pytest.approx(3 / 6)
    assert scores["response"] == pytest.approx(2 / 2)  # of the answers that name an object
    assert scores["recall"] == pytest.approx(3 / 5)  # person, dog; table; table; table
    assert (scores["n"], scores["empty"]) == (4, 0.5)
    assert scores["mention_ci"][0] <= 0.5 <= scores["mention_ci"][1]
    assert "by_judge" not in found
    [first, *_] = objhal_questions(data)
    assert first.image.read_bytes() == encoded(random.Random(1), "JPEG")


def test_rates_by_a_judge(data: Path, tmp_path: Path) -> None:
    """Each word counts once; an answer of fewer than four words is not asked about; nonsense counts in none."""
    replies = {"Describe 1": '["man", "dog", "cat", "cat"]', "Describe 2": '```json\n["mug", "wooden table"]\n```'}

    def reply(request: Request, _: int) -> Answer:
        text = request["messages"][0]["content"]
        return Answer(next((value for key, value in replies.items() if key in text), "Objects: sky"))

    with endpoint(reply) as server:
        judge = JudgeSettings(server.url, "judge", retries=0, tries=1)
        found = score_command("objhal", [tmp_path / "answers.jsonl"], ScoringInputs(data), judge=judge)
    scores = found["by_judge"]
    assert (scores["judged"], scores["not_judged"]) == (3, 1)
    assert scores["mention"] == pytest.approx(2 / 4)  # cat and mug of man, dog, cat, mug: "wooden table" is no word
    assert scores["response"] == 1
    assert len(server.requests) == 3
    assert found["judge"]["unjudged"] == {"nonsense": 1}
    assert found["word_list"]["mention"] == pytest.approx(3 / 6)


@pytest.mark.parametrize(
    ("reply", "names"),
    [
        ('["dog", "tennis racket"]', ("dog", "tennis racket")),
        ("Here:\n```json\n[]\n```", ()),
        ("[1, 2]", None),
        ('["a"] or ["b"]', None),
        ('["a", ', None),
        ("dog, cat", None),
    ],
)
def test_replies_are_read_strictly(reply: str, names: Any) -> None:
    assert read_object_list(reply) == names


def test_names_are_words_of_the_list(data: Path) -> None:
    vocabulary = objhal_vocabulary(data)
    names = ["A Dog", "puppies", "wooden dining table", "coffee table", "mugs", "baby cat", "dog"]
    assert listed_objects(names, vocabulary) == ["dog", "dog", "dining table", "cup", "cat"]


def test_faults_of_the_files_are_named(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = data / "objhal/obj_halbench_300_with_image.jsonl"
    for image in (None, "%%", "A" * 100):
        monkeypatch.setattr(objhal, "LONGEST_IMAGE", 60)
        write_jsonl(path, [{"image_id": 9, "question": "?", "image": image}])
        with pytest.raises(DataError, match="record 1 is not in the benchmark's layout"):
            objhal_questions(data)
    assert not (data / "objhal/images").exists() or not any((data / "objhal/images").iterdir())
    (data / "annotations/instances_train2014.json").unlink()
    with pytest.raises(DataError, match=r"2 images have no COCO annotations \(3, 4\)"):
        objhal.objhal_truth(data, ["1", "2", "3", "4"], objhal_vocabulary(data))
    (data / "objhal/synonyms_refine.txt").unlink()
    with pytest.raises(DataError, match=r"synonyms_refine\.txt does not exist"):
        objhal_vocabulary(data)
