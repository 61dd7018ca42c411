"""Mining: corrections are true, small and of the same length; pairs are apart from evaluations and from each other;
stopped anywhere and run again, the files are the same; a judge's replies count as a whole or not at all."""

from __future__ import annotations

import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from helpers.endpoint import Answer, Request, endpoint
from helpers.interrupted import interrupt
from helpers.killed import run_killed_at
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from relook.data.check import check_folder
from relook.data.convert import convert_pairs
from relook.data.readers import DESCRIBE_PROMPTS, read_hadpo, read_pairs
from relook.data.sentences import split_sentences
from relook.demo import mining_settings
from relook.errors import DataError, RecipeError, RelookError
from relook.evaluate.judge import JudgeSettings, NoVerdict
from relook.evaluate.results import AnswerFile
from relook.evaluate.tasks.chair import Mention, Vocabulary, coco_vocabulary, mentions
from relook.evaluate.tasks.pope import official_parse, question_text
from relook.files import read_json, write_json
from relook.mine import candidates, jobs, output, pairs, pictures
from relook.mine.candidates import STILL_FALSE, balance_answers, co_occurrence, find_pairs, weighted_sample
from relook.mine.jobs import MiningSettings, MiningSource
from relook.mine.pairs import (
    MAX_LENGTH_GAP,
    MAX_MEAN_GAP,
    MinedPair,
    correct_description,
    hallucinations,
    length_statistics,
    match_lengths,
    near_duplicates,
    replace_noun,
    shingles,
    word_count,
)
from relook.mine.pictures import NEUTRAL, AnnotatedImages, ExclusionFilter, MinedImage, fingerprint, read_pictures
from relook.mine.run import mine_pairs
from relook.toyworld.build import shipped_base
from relook.toyworld.world import FILLERS, OBJECTS, SETTINGS, SYNONYMS, describe_scene, sample_scene, words

VOCABULARY = Vocabulary.of(OBJECTS, SYNONYMS)
names = st.lists(st.sampled_from(OBJECTS), max_size=8)


def fixed(text: str, truth: Sequence[str], seed: int = 0) -> str:
    return correct_description(text, truth, VOCABULARY, FILLERS, random.Random(seed)).text


# --- corrections


@given(names, st.sets(st.sampled_from(OBJECTS), max_size=8), st.sampled_from(sorted(SETTINGS)), st.randoms())
def test_corrections_are_true_and_of_equal_length(
    said: list[str], truth: set[str], setting: str, rng: random.Random
) -> None:
    text = describe_scene(said, setting, rng.randint(0, 2), rng)
    chosen = correct_description(text, truth, VOCABULARY, FILLERS, rng).text
    assert hallucinations(chosen, truth, VOCABULARY) == []
    assert len(words(chosen)) == len(words(text))
    sentences = list(zip(text.split(". "), chosen.split(". "), strict=True))
    changed = [old for old, new in sentences if old != new]
    # Nothing but false sentences is touched, and every one of them is.
    assert len(changed) == len([name for name in said if name not in truth])
    assert all(hallucinations(old, truth, VOCABULARY) for old in changed)
    # What is there and was not named is said before a neutral sentence is taken.
    added = truth & (set(words(chosen)) - set(words(text)))
    assert len(added) == min(len(changed), len(truth - set(said)))


def test_corrections_by_hand() -> None:
    assert fixed("There is a dog. There is a cup.", ["cup", "apple"]) == "There is an apple. There is a cup."
    assert fixed("There is a dog and an apple.", ["apple", "bed"]) == "There is a bed and an apple."
    assert fixed("A dog is nearby.", ["apple"]) == "An apple is nearby."
    assert fixed("A big dog can be seen.", ["cat"]) == "A cat can be seen."
    assert fixed("A dog is nearby, on a bed.", ["apple", "bed"]) not in ("An apple is nearby, on a bed.", "")
    assert fixed("There is a puppy.", ["dog"]) == "There is a puppy."  # a synonym is no mistake
    assert fixed("It looks quite calm.", []) == "It looks quite calm."
    replaced = fixed("There is a dog. There is a cat.", []).split(". ")
    assert {line.rstrip(".") + "." for line in replaced} < set(FILLERS)
    assert len(set(replaced)) == 2


def test_what_is_said_again_is_exchanged_for_the_same() -> None:
    assert fixed("There is a dog. We see the dog.", ["cup", "bed"]) in (
        "There is a cup. We see the cup.",
        "There is a bed. We see the bed.",
    )
    assert set(words(fixed("There is a dog. There is a dog.", ["cup", "bed"]))) >= {"cup", "bed"}


def test_a_neutral_sentence_is_about_as_long_and_names_nothing() -> None:
    long = "There is a dog that lies in the corner and sleeps the whole day long."
    chosen = correct_description(long, [], VOCABULARY, NEUTRAL, random.Random(0)).text
    assert abs(len(chosen.split()) - len(long.split())) <= 2
    assert not any(mentions(line, coco_vocabulary()) for line in NEUTRAL)
    assert NEUTRAL[: len(FILLERS)] == FILLERS


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("There is a dog.\n\nIt is 3.5 m away.", "There is a cup.\n\nIt is 3.5 m away."),  # paragraphs and numbers stay
        ("A bed! There is a dog", "A bed! There is a cup"),  # a sentence that was cut off stays cut off
        ("There is a bed. There is", "There is a bed. There is"),
    ],
)
def test_nothing_else_changes(text: str, expected: str) -> None:
    assert fixed(text, ["bed", "cup"]) == expected


@pytest.mark.parametrize(
    ("text", "expected", "taken_out"),
    [
        ("There is a small blue bird.", "There is a cup.", 2),  # the bird's colour would be said of the cup
        (
            "The picture shows a red car, a blue bus and a big bird.",
            "The picture shows a cup, a blue bus and a bed.",
            2,
        ),
        ("In the picture, there is an old dog", "In the picture, there is a cup", 1),
        ("There is a bird in the sky.", None, 0),  # where it is
        ("A dog runs.", None, 0),  # what it does
        ("There are two dogs.", None, 0),  # how many there are
        ("There is a man riding a bicycle.", None, 0),
        ("There is a bus next to a dog.", None, 0),
        ("There is a bus and its dog.", None, 0),
    ],
)
def test_nothing_is_kept_that_was_said_of_what_is_not_there(text: str, expected: str | None, taken_out: int) -> None:
    rng = random.Random(1)
    found = correct_description(text, ["bus", "cup", "bed"], VOCABULARY, NEUTRAL, rng)
    if expected is None:
        assert found.text in NEUTRAL
        assert (found.exchanged, found.taken_out, found.neutral) == (0, 0, 1)
    else:
        assert found.text in (expected, re.sub("cup|bed", lambda m: {"cup": "bed", "bed": "cup"}[m[0]], expected))
        assert found.taken_out == taken_out


def test_a_neutral_sentence_stays_cut_off_too() -> None:
    assert fixed("There is a dog", []).endswith(tuple("abcdefghijklmnopqrstuvwxyz"))


@pytest.mark.parametrize(
    ("sentence", "noun", "name", "expected"),
    [
        ("There is a dog.", "dog", "apple", "There is an apple."),
        ("There is an apple here.", "apple", "dog", "There is a dog here."),
        ("An apple lies there.", "apple", "cup", "A cup lies there."),
        ("A cup lies there.", "cup", "apple", "An apple lies there."),
        ("The red cup", "cup", "apple", "The red apple"),
        ("cup", "cup", "apple", "apple"),
        ("Two dogs run.", "dogs", "bus", "Two buses run."),
        ("Dogs run.", "Dogs", "cup", "Cups run."),
    ],
)
def test_exchanged_nouns_take_article_and_number_along(sentence: str, noun: str, name: str, expected: str) -> None:
    start = sentence.index(noun)
    assert replace_noun(sentence, Mention("", start, start + len(noun)), name, VOCABULARY) == expected


def test_a_new_word_that_makes_another_object_drops_the_pair(tmp_path: Path) -> None:
    vocabulary = coco_vocabulary()
    texts = ["There is a toilet and a seat.", "There is a dog.", "There is a dog.", "There is a cup."]
    there = [frozenset(names) for names in (["cup"], ["bear"], ["cup"], ["cup"])]
    pictures = [MinedImage(str(i), tmp_path, frozenset(), objects) for i, objects in enumerate(there)]
    annotated = AnnotatedImages(tuple(pictures), vocabulary, NEUTRAL)
    found = find_pairs(pictures, [[text] for text in texts], annotated, 0, None, random.Random(0))
    chosen = [("1", "There is a bear."), ("2", "There is a cup.")]
    assert [(pair.picture.id, pair.chosen) for pair in found.pairs] == chosen
    assert found.dropped == {STILL_FALSE: 1}
    assert found.corrections == {"exchanged": 2, "taken_out": 0, "neutral": 0}


def test_a_description_without_a_mistake_is_paired_with_a_worse_one(tmp_path: Path) -> None:
    there = [frozenset({"cup", "pot"}), frozenset({"cup", "dog"}), frozenset({"apple"})]
    pictures = [MinedImage(str(i), tmp_path, frozenset(), objects) for i, objects in enumerate(there)]
    annotated = AnnotatedImages(tuple(pictures), VOCABULARY, NEUTRAL)
    texts = [["There is a cup."], ["There is a pot."], ["It looks quite calm."]]
    found = find_pairs(pictures, texts, annotated, 0, None, random.Random(0), contrast=True)
    # The dog comes together with the cup, so it is the tempting absent object of the first picture; nothing can be
    # made worse in a text without an object.
    sides = {pair.picture.id: (pair.chosen, pair.rejected) for pair in found.pairs}
    assert sides.keys() == {"0", "1"}
    assert sides["0"][0] == "There is a cup."
    assert hallucinations(sides["0"][1], there[0], VOCABULARY)
    assert not hallucinations(sides["1"][0], there[1], VOCABULARY)
    assert found.corrections == {"exchanged": 1, "taken_out": 0, "neutral": 0, "worsened": 1}
    assert find_pairs(pictures, texts, annotated, 0, None, random.Random(0)).pairs[0].picture.id == "1"


# --- which questions


@given(st.lists(st.frozensets(st.sampled_from("abcde"))))
def test_co_occurrence_is_a_count_over_images(objects: list[frozenset[str]]) -> None:
    together = co_occurrence(objects)
    for first in "abcde":
        for second in "abcde":
            both = sum(first in found and second in found for found in objects)
            assert together.get(first, Counter())[second] == (both if first != second else 0)


def test_samples_are_distinct_and_in_proportion_to_weight() -> None:
    weights = {"a": 0.0, "b": 4.0, "c": 9.0, "d": 1.0}
    rng = random.Random(0)
    first = Counter(weighted_sample(weights, 1, rng)[0] for _ in range(8000))
    for name, weight in weights.items():
        assert first[name] / 8000 == pytest.approx((weight + 1) / 18, abs=0.02)
    assert sorted(weighted_sample(weights, 4, rng)) == sorted(weights)
    assert sorted(weighted_sample(weights, 9, rng)) == sorted(weights)
    assert weighted_sample({}, 3, rng) == []


@given(st.lists(st.sampled_from(["Yes.", "No."])), st.randoms())
def test_balance_keeps_as_many_of_each(kinds: list[str], rng: random.Random) -> None:
    records = [{"chosen": kind, "number": number} for number, kind in enumerate(kinds)]
    kept = balance_answers(records, rng)
    fewest = min(kinds.count("Yes."), kinds.count("No."))
    assert Counter(record["chosen"] for record in kept) == +Counter({"Yes.": fewest, "No.": fewest})
    assert [record["number"] for record in kept] == sorted(record["number"] for record in kept)


# --- lengths and repetitions

texts = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=12).map(" ".join)
NOWHERE = MinedImage("", Path(), frozenset())


@given(st.lists(st.tuples(texts, texts), max_size=20))
def test_means_are_alike_and_no_more_is_dropped_than_needs_be(sides: list[tuple[str, str]]) -> None:
    pairs = [MinedPair(NOWHERE, *side) for side in sides]
    kept, dropped = match_lengths(pairs)
    assert len(kept) + sum(dropped.values()) == len(pairs)
    assert all(abs(pair.longer) <= MAX_LENGTH_GAP * max(map(word_count, (pair.chosen, pair.rejected))) for pair in kept)
    found = length_statistics([(pair.chosen, pair.rejected) for pair in kept])
    assert (found["means_differ"] or 0) <= MAX_MEAN_GAP  # of no pair there is no mean
    assert found["chosen_longer"] + found["chosen_shorter"] + found["same_length"] == len(kept)
    assert match_lengths(kept) == (kept, {})


def test_pairs_that_pull_the_means_together_stay() -> None:
    """Once the longest is gone the others' sum is on the other side: those that are too short go, and not the rest."""
    sides = [(125, 100), *[(11, 10)] * 3, *[(9, 12)] * 5]
    pairs = [MinedPair(NOWHERE, "a " * chosen, "b " * rejected) for chosen, rejected in sides]
    kept, dropped = match_lengths(pairs)
    assert kept == pairs[1:4] + pairs[-1:]
    assert dropped == {"mean lengths would differ": 5}


@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=9).map(" ".join), max_size=12),
    st.sampled_from([0.5, 0.7, 0.9, 1]),
)
def test_near_duplicates_are_those_of_all_comparisons(texts: list[str], similarity: float) -> None:
    expected: set[int] = set()
    for place, text in enumerate(texts):
        earlier = [shingles(other) for n, other in enumerate(texts[:place]) if n not in expected]
        one = shingles(text)
        if any(len(one & other) / len(one | other) >= similarity - 1e-12 for other in earlier):
            expected.add(place)
    assert near_duplicates(texts, similarity) == expected


# --- pictures


def save(path: Path, index: int, size: int = 0, quality: int = 95) -> Path:
    """A smooth picture, so that its hash does not hang on noise; the same for the same index."""
    rng = random.Random(index)
    image = Image.new("RGB", (9, 8))
    image.putdata([tuple(rng.randrange(256) for _ in range(3)) for _ in range(72)])
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize((96, 96) if not size else (size, size), Image.Resampling.BICUBIC).save(path, quality=quality)
    return path


def reasons(folder: Path, listed: Collection[str] = (), shown: Sequence[Path] = ()) -> dict[str, str]:
    pictures = read_pictures(folder, "none").pictures
    seen = {picture.id: fingerprint(picture.id, picture.path) for picture in pictures}
    return ExclusionFilter(seen, frozenset(listed), [fingerprint("", path) for path in shown]).left_out(pictures)


def test_pictures_that_are_left_out(tmp_path: Path) -> None:
    folder, other = tmp_path / "d", tmp_path / "e"
    for number in range(6):
        save(folder / f"{number}.jpg", number)
    shutil.copy(folder / "0.jpg", folder / "again.jpg")
    save(folder / "smaller.jpg", 0, size=70, quality=60)
    (folder / "sub").mkdir()
    (folder / "sub" / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("1.jpg")
    shown = [save(other / "x.jpg", 2), save(other / "y.jpg", 3, size=50, quality=50)]
    assert reasons(folder, excluded_names(folder / "notes.txt"), shown) == {
        "1.jpg": pictures.LISTED,
        "2.jpg": pictures.IN_EVALUATION,
        "3.jpg": pictures.LIKE_EVALUATION,
        "again.jpg": pictures.DUPLICATE,
        "smaller.jpg": pictures.NEAR_DUPLICATE,
        "sub/broken.png": pictures.UNREADABLE,
    }


def test_hashes_of_scenes_do_not_meet_and_all_that_are_near_are_found() -> None:
    looks = pictures.HashIndex()
    rng = random.Random(0)
    held = [rng.getrandbits(64) for _ in range(50)]
    for look in held:
        looks.add(look)
    for look in held:
        bits = rng.sample(range(64), pictures.MAX_HASH_DISTANCE + 1)
        near = look ^ sum(1 << bit for bit in bits[1:])
        assert looks.near(near)
        assert not looks.near(near ^ (1 << bits[0]))


def test_answers_that_are_neither_yes_nor_no_are_counted(world: Path) -> None:
    picture = read_pictures(world / "vg", "vg").pictures[0]
    questions = [candidates.ProbeQuestion(picture, "cup", True)] * 4
    records = candidates.question_records(questions, ["Yes.", "No.", "▁▁", "The table is brown."])
    assert candidates.question_summary(records, []) == {"asked": 4, "wrong": 1, "unreadable": 2, "pairs": 0}


def excluded_names(path: Path) -> frozenset[str]:
    return frozenset[str]().union(*pictures.excluded_images(path))


THIRD = {"id:3", "000000000003.jpg", "coco:3"}


@pytest.mark.parametrize(
    ("name", "text", "images", "found"),
    [
        (
            "q.json",
            '{"image": "COCO_val2014_000000000042.jpg", "text": "?"}\n',
            1,
            {"COCO_val2014_000000000042.jpg", "coco:42"},
        ),
        ("a.jsonl", '{"image_id": 7}\n{"image_id": "8"}\n{"image_id": 7}\n', 2, {"id:7", "id:8"}),
        ("l.txt", "sub/cat.png\n\n12\n", 2, {"cat.png", "id:12"}),
        ("i.json", '{"images": [{"id": 3, "file_name": "a/000000000003.jpg"}]}', 1, THIRD),
        ("d.json", '{"17": {"chosen": []}}', 1, {"id:17"}),
        ("s.json", '[{"image_id": 5}, 6, "e.jpg"]', 3, {"id:5", "id:6", "e.jpg"}),
    ],
)
def test_names_of_evaluation_images(tmp_path: Path, name: str, text: str, images: int, found: set[str]) -> None:
    (tmp_path / name).write_text(text)
    assert excluded_names(tmp_path / name) == found
    assert len(pictures.excluded_images(tmp_path / name)) == images


def test_a_picture_of_cocos_is_known_under_visual_genomes_name(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "vg", tmp_path / "vg")
    records = read_json(tmp_path / "vg" / "image_data.json")
    records[0]["coco_id"] = 42
    write_json(tmp_path / "vg" / "image_data.json", records)
    (tmp_path / "pope.json").write_text('{"image": "COCO_val2014_000000000042.jpg"}')
    (tmp_path / "captions.json").write_text('[{"image_id": 42, "caption": "A cup."}]')
    first = read_pictures(tmp_path / "vg", "vg").pictures[0]
    assert first.names & excluded_names(tmp_path / "pope.json") == {"coco:42"}
    assert first.names & excluded_names(tmp_path / "captions.json") == {"id:42"}


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("COCO_train2014_000000000042.jpg", {"COCO_train2014_000000000042.jpg", "coco:42", "id:42"}),
        ("2345.jpg", {"2345.jpg", "id:2345"}),
        ("cat.png", {"cat.png"}),
    ],
)
def test_a_number_alone_finds_pictures_that_have_it_in_their_name(name: str, called: set[str], tmp_path: Path) -> None:
    (tmp_path / name).touch()
    (tmp_path / f".{name}").touch()
    (picture,) = read_pictures(tmp_path, "none").pictures
    assert picture.names == called


def test_layouts_agree_about_what_is_there(world: Path) -> None:
    """Toyworld's folders as what they look like; the truth is the scenes'."""
    for folder, kind, split, other in (
        ("vg", "vg", "pairs", "toyworld"),
        ("test", "coco", "test", "toyworld"),
        ("test/val2014", "coco", "test", "coco"),
    ):
        for name in (kind, other):
            found = read_pictures(world / folder, name)
            assert [picture.objects for picture in found.pictures] == [
                frozenset(sample_scene(0, split, index).names) for index in range(6)
            ]
            assert all(picture.path.is_file() for picture in found.pictures)
            assert found.neutral[: len(FILLERS)] == FILLERS


def test_visual_genomes_plurals_aliases_and_regions(world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "vg"
    shutil.copytree(world / "vg", folder)
    objects = read_json(folder / "objects.json")[:3]
    for record, names in zip(objects, (["tree", "light"], ["Trees"], ["lorry"]), strict=True):
        record["objects"] = [{"names": [name]} for name in names]
    objects[0]["objects"].append({"names": ["truck"]})
    write_json(folder / "objects.json", objects)
    regions = read_json(folder / "region_descriptions.json")[:3]
    for record, phrase in zip(regions, ("", "two vans", ""), strict=True):
        record["regions"] = [{"phrase": phrase, "x": 0, "y": 0, "width": 1, "height": 1}]
    write_json(folder / "region_descriptions.json", regions)
    (folder / "object_alias.txt").write_text("truck,lorry,van\n")
    found = read_pictures(folder, "vg")
    assert [picture.objects for picture in found.pictures] == [{"tree", "light", "truck"}, {"tree", "truck"}, {"truck"}]
    assert "The light is soft." in NEUTRAL
    assert "The light is soft." not in found.neutral
    (tmp_path / "more.json").write_text('{"tree": ["oak"]}')
    more = read_pictures(folder, "vg", tmp_path / "more.json")
    assert hallucinations("An oak and a lorry.", ["tree"], more.vocabulary) == ["truck"]  # type: ignore[arg-type]


# --- the whole, with answers written beforehand

SCENES = {"1": ("cup", "pot"), "2": ("cup", "pot", "plate"), "3": ("bed",), "4": ("dog", "cup")}


@pytest.fixture
def kitchen(tmp_path: Path) -> Path:
    """Four annotated pictures in Visual Genome's layout."""
    folder = tmp_path / "vg"
    for image in SCENES:
        save(folder / "VG_100K" / f"{image}.jpg", int(image))
    data = [{"image_id": int(i), "url": f"https://x/VG_100K/{i}.jpg", "coco_id": None} for i in SCENES]
    write_json(folder / "image_data.json", data)
    objects = [{"image_id": int(i), "objects": [{"names": [n]} for n in names]} for i, names in SCENES.items()]
    write_json(folder / "objects.json", objects)
    return folder


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str]]:
    """A model that says yes to everything and describes each image as a cup and a dog; what it was asked."""
    asked: list[tuple[Path, str]] = []

    def answer(_: object, questions: Sequence[tuple[Path, str]], how: Any, report: Any) -> Iterator[tuple[int, str]]:
        report(len(questions), len(questions))
        asked.extend(questions)
        for index in reversed(range(len(questions))):  # answers come in an order of their own
            yield index, "There is a cup. There is a dog." if questions[index][1] in DESCRIBE_PROMPTS else "Yes."

    monkeypatch.setattr(jobs, "answer_questions", answer)
    return asked


def test_what_is_mined_from_known_answers(said: list[tuple[Path, str]], kitchen: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    card = mine_pairs(shipped_base(), MiningSource(kitchen, "vg"), out, MiningSettings(questions=2, near_texts=0))
    corrections = {"exchanged": 3, "taken_out": 0, "neutral": 1}
    counts = {"made": 8, "hallucinated": 6, "found": 3, "dropped": {}, "pairs": 3, "corrections": corrections}
    assert card["descriptions"] == counts
    pairs = read_json(out / "desc_data.json")
    assert pairs.keys() == {"1", "2", "3"}
    assert all(pair["rejected"] == ["There is a cup. There is a dog."] for pair in pairs.values())
    assert pairs["1"]["chosen"] == ["There is a cup. There is a pot."]
    assert pairs["3"]["chosen"][0].startswith("There is a bed.") != pairs["3"]["chosen"][0].endswith("There is a bed.")
    assert any(line in pairs["3"]["chosen"][0] for line in NEUTRAL)

    assert card["questions"] == {"asked": 8, "wrong": 4, "unreadable": 0, "pairs": 8}
    records = read_json(out / "pope_data.json")
    questions = {question_text(name): name for name in OBJECTS}
    for record in records:
        there = questions[record["question"]] in SCENES[record["image_id"]]
        assert official_parse(record["chosen"]) == there
        assert official_parse(record["reject"]) != there
        assert record["origin"] == ("contrast" if there else "model")
        assert record["answer"] == "Yes."
    assert [image.stem for image, _ in said[:8]] == [*SCENES, *SCENES]
    assert len(set(said[8:])) == len(said[8:]) == 8
    page = (out / "pairs.html").read_text()
    assert page.count("<div class=card>") == 3 + 8
    assert page.count("<mark>dog</mark>") == 3
    assert page.count("data:image/jpeg;base64,") == 3 + 8


def test_repeated_texts_and_evaluation_images(said: list[tuple[Path, str]], kitchen: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("2\n")
    place = MiningSource(kitchen, "vg", exclude=[tmp_path / "list.txt"])
    card = mine_pairs(
        shipped_base(), place, tmp_path / "out", MiningSettings(questions=2, near_texts=0.2, parquet=False)
    )
    assert card["pictures"] == {"found": 4, "left_out": {pictures.LISTED: 1}, "mined": 3}
    assert card["descriptions"]["dropped"] == {"near-duplicate": 1}
    assert card["apart"] == {"given": ["list.txt"], "names": 1, "images": 0}
    assert not (tmp_path / "out" / "pairs.parquet").exists()
    assert "| not used: listed as evaluation image | 1 |" in (tmp_path / "out" / "README.md").read_text()


def test_mistakes_of_a_user(kitchen: Path, tmp_path: Path, said: object) -> None:
    out = tmp_path / "out"
    how = MiningSettings(questions=2, parquet=False)
    wrong: list[tuple[MiningSource, str]] = [
        (MiningSource(kitchen, "none"), "nothing finds the mistakes"),
        (MiningSource(kitchen, "voc"), "coco, vg, toyworld, none"),
        (MiningSource(kitchen, "toyworld"), "no folder of toyworld"),
        (MiningSource(kitchen, "coco"), "0 splits"),
        (MiningSource(tmp_path / "nowhere", "vg"), "no image folder"),
        (MiningSource(tmp_path, "vg"), "lies in the image folder"),
        (MiningSource(kitchen, "vg", exclude=[kitchen]), "No picture of .* is left: 4 evaluation image"),
        (MiningSource(kitchen, "vg", exclude=[tmp_path / "none.txt"]), "does not exist"),
    ]
    for place, message in wrong:
        with pytest.raises((DataError, RecipeError), match=message):
            mine_pairs(shipped_base(), place, tmp_path / "never", how)
        shutil.rmtree(tmp_path / "never", ignore_errors=True)
    mine_pairs(shipped_base(), MiningSource(kitchen, "vg"), out, how)
    with pytest.raises(RecipeError, match="temperature 0"):
        mine_pairs(shipped_base(), MiningSource(kitchen, "vg"), tmp_path / "never", MiningSettings(temperature=0))
    assert not (tmp_path / "never").exists()
    with pytest.raises(RecipeError, match="another seed"):
        mine_pairs(shipped_base(), MiningSource(kitchen, "vg"), out, MiningSettings(seed=1, questions=2, parquet=False))
    shown = save(tmp_path / "shown" / "a.jpg", 9)
    apart_from = MiningSource(kitchen, "vg", exclude=[shown.parent])
    mine_pairs(shipped_base(), apart_from, tmp_path / "apart", how)
    save(tmp_path / "shown" / "b.jpg", 2)
    with pytest.raises(RecipeError, match=r"another exclude \(its files"):
        mine_pairs(shipped_base(), apart_from, tmp_path / "apart", how)
    (tmp_path / "synonyms.json").write_text('{"unicorn": ["horse"]}')
    with pytest.raises(DataError, match="unicorn"):
        read_pictures(kitchen, "vg", tmp_path / "synonyms.json")


# --- the shipped base on toyworld

FILES = ("desc_data.json", "pope_data.json", "image_data.json", "pairs.parquet", "pairs.html", "README.md", "card.json")


def contents(out: Path) -> dict[str, bytes]:
    files = [*(out / name for name in FILES), *(out / output.FOLDER).iterdir()]
    return {path.name: path.read_bytes() for path in files}


def toys(world: Path) -> tuple[Path, MiningSource, MiningSettings]:
    how = MiningSettings(questions=4, max_new_tokens=40, batch_size=1, near_texts=0.0)  # parts of four
    return shipped_base(), MiningSource(world / "vg", "toyworld", exclude=[world / "test"]), how


@pytest.fixture(scope="module")
def mined(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mined") / "out"
    model, place, how = toys(world)
    mine_pairs(model, place, out, how)
    return out


def test_mined_files_are_read_by_every_reader(mined: Path) -> None:
    pairs, report = read_hadpo(mined, mined / "desc_data.json", mined / "pope_data.json", on_bad="error")
    card = read_json(mined / "card.json")
    assert len(pairs) == card["questions"]["pairs"] + 2 * card["descriptions"]["pairs"]
    assert card["descriptions"]["pairs"] > 0
    assert card["questions"]["pairs"] > 0
    assert not report.dropped
    assert not report.skipped
    assert check_folder("hadpo", mined).clean
    for pair in pairs:
        assert len(words(pair.chosen)) == len(words(pair.rejected))
    assert (
        Counter(pair.chosen for pair in pairs if pair.chosen in ("Yes.", "No."))["No."] * 2
        == card["questions"]["pairs"]
    )
    rows, report = read_pairs(mined / "pairs.parquet", mined.parent / "rows", on_bad="error")
    assert len(rows) == card["questions"]["pairs"] + card["descriptions"]["pairs"]
    asked = {(pair.prompt, pair.chosen, pair.rejected, pair.images[0].read_bytes()) for pair in pairs}
    assert {(row.prompt, row.chosen, row.rejected, row.images[0].read_bytes()) for row in rows} == asked


def test_descriptions_follow_earlier_ones(tmp_path: Path) -> None:
    def pair(image: str, number: int) -> pairs.MinedPair:
        return pairs.MinedPair(MinedImage(image, Path("1.png"), frozenset()), f"true {number}", f"false {number}")

    def question(image: str, number: int) -> dict[str, Any]:
        return {"image_id": image, "question": str(number)}

    output.write_pairs(tmp_path / "a", False, [pair("1", 1), pair("2", 2)], [question("2", 1)])
    output.write_pairs(tmp_path / "b", False, [pair("1", 3)], [question("3", 2)], tmp_path / "a")
    assert read_json(tmp_path / "b/desc_data.json") == {
        "1": {"chosen": ["true 1", "true 3"], "rejected": ["false 1", "false 3"]},
        "2": {"chosen": ["true 2"], "rejected": ["false 2"]},
    }
    assert read_json(tmp_path / "b/pope_data.json") == [question("2", 1), question("3", 2)]
    assert output.count_pairs(tmp_path / "b", by_sentence=False) == 5
    assert output.named_images(tmp_path / "b", by_sentence=False) == {"1", "2", "3"}


def test_parquet_goes_back_to_hadpo(mined: Path, tmp_path: Path) -> None:
    convert_pairs(mined / "pairs.parquet", tmp_path / "back", "hadpo")
    for name in ("desc_data.json", "pope_data.json"):
        assert (tmp_path / "back" / name).read_bytes() == (mined / name).read_bytes()


def test_stopped_anywhere_it_ends_in_the_same_files(
    mined: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    model, place, how = toys(world)
    moments: list[tuple[Any, str, int]] = [
        (pictures, "open_image", 3),
        (jobs, "answer_questions", 2),
        (AnswerFile, "finish", 1),
        (jobs, "answer_questions", 3),
        (jobs, "answer_questions", 5),
        *((output, name, 1) for name in ("write_pairs", "_link", "write_pairs_parquet", "write_card")),
        (output, "write_json", 2),
        (output, "write_json", 4),
    ]
    for owner, name, at in moments:
        with monkeypatch.context() as patch:
            interrupt(patch, owner, name, at)
            with pytest.raises(KeyboardInterrupt):
                mine_pairs(model, place, out, how)
        assert not (out / "card.json").exists()
        for file in (out / "work").glob("*.jsonl"):
            if file.name.startswith("answers"):  # a kill cuts the last line
                file.write_bytes(file.read_bytes() + b'{"key": "half')
    mine_pairs(model, place, out, how)
    assert contents(out) == contents(mined)


def test_the_demos_settings_are_the_same_mining(world: Path, tmp_path: Path) -> None:
    how = mining_settings(0)
    card = mine_pairs(shipped_base(), MiningSource(world / "vg", "toyworld"), tmp_path / "out", how)
    assert (card["pictures"]["mined"], card["descriptions"]["made"]) == (6, 6)
    assert card["near_texts"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_killed_for_good_and_over_processes_the_files_are_the_same(
    mined: Path, world: Path, tmp_path: Path, count: int
) -> None:
    """kill -9 as soon as a phase has left something, phase by phase, then let alone."""
    out = tmp_path / "out"
    model, place, _ = toys(world)
    command = [sys.executable, "-m", "relook", "mine", "--model", model, "--images", place.images, "--out", out]
    command += ["--annotations", "toyworld", "--exclude", place.exclude[0], "--questions", "4", "--near-texts", "0"]
    command += ["--max-new-tokens", "40", "--batch-size", "1"]

    names = ("pictures", "descriptions_0", "descriptions_1", "answers", "desc_data.json", "pairs.parquet")
    run_killed_at([out / name if "." in name else out / "work" / f"{name}.jsonl" for name in names], command, count)
    assert contents(out) == contents(mined)


# --- a judge


def judging(url: str) -> JudgeSettings:
    return JudgeSettings(url, "judge", retries=0)


def seeing(scenes: Mapping[str, Sequence[str]]) -> Callable[[Request, int], Answer]:
    """A judge that knows toyworld's scenes by their images' bytes."""

    def answer(request: Request, number: int) -> Answer:
        text, image = request["messages"][0]["content"]
        if "Sentences:" not in text["text"]:
            return Answer("yes")  # the probe
        there = scenes[image["image_url"]["url"].split(",")[1]]
        said = text["text"].split("Sentences:\n")[1].split("\nAnswer")[0].splitlines()
        lines, named = [], []
        for line in said:
            number_, sentence = line.split(". ", 1)
            found = [m.object for m in mentions(sentence, VOCABULARY)]
            named += found
            wrong = [name for name in found if name not in there]
            verdict = f"wrong: There is a {there[0]} here." if wrong else "right" if found else "cannot judge"
            lines.append(f"{number_}. {verdict}")
        absent = [name for name in named if name not in there] or ["unicorn"]
        lists = [f"In the image: {', '.join(there)}", f"Not in the image: {', '.join(absent)}"]
        return Answer("\n".join(lines + lists))

    return answer


def test_without_annotations_a_judge_finds_and_corrects(world: Path, tmp_path: Path) -> None:
    import base64

    pictures = read_pictures(world / "vg", "toyworld").pictures
    scenes = {base64.b64encode(p.path.read_bytes()).decode(): sorted(p.objects) for p in pictures}
    place, how = MiningSource(world / "vg", "none"), MiningSettings(questions=4, max_new_tokens=40, near_texts=0)
    with endpoint(seeing(scenes)) as there:
        card = mine_pairs(shipped_base(), place, tmp_path / "out", how, judging(there.url))
        asked = len(there.requests)
    truth = {f"{p.path.parent.name}/{p.path.name}": p.objects for p in pictures}
    pairs = read_json(tmp_path / "out" / "desc_data.json")
    assert card["descriptions"]["pairs"] == len(pairs) > 0
    for image, pair in pairs.items():
        assert hallucinations(pair["rejected"][0], truth[image], VOCABULARY)
        assert not hallucinations(pair["chosen"][0], truth[image], VOCABULARY)
        assert len(split_sentences(pair["chosen"][0])) == len(split_sentences(pair["rejected"][0]))
    records = read_json(tmp_path / "out" / "pope_data.json")
    for record in records:
        name = next((name for name in OBJECTS if question_text(name) == record["question"]), "unicorn")
        assert (record["chosen"] == "Yes.") == (name in truth[record["image_id"]])
    assert Counter(r["chosen"] for r in records)["Yes."] * 2 == len(records) > 0
    assert sum(one["replies"] for one in card["judge"]) == asked - 1 == card["descriptions"]["made"]
    assert "<mark>" in (tmp_path / "out" / "pairs.html").read_text()
    assert "a judge (judge) that saw the pictures" in (tmp_path / "out" / "README.md").read_text()


TEXT = "There is a cup. It is calm"
LISTS = "In the image: cup, Red dog.\nNot in the image: pan, fork-lift, 7 dwarfs"


@pytest.mark.parametrize(
    ("reply", "corrected"),
    [
        (f"1. right\n2. cannot judge\n{LISTS}", TEXT),
        (f"1. wrong: There is a blue cup!\n\n2) Right.\n{LISTS}", "There is a blue cup. It is calm"),
        (f"1. right\n2. wrong: It is loud.\n{LISTS}", "There is a cup. It is loud"),
        (f"1. right\n{LISTS}", None),
        (f"1. right\n3. right\n{LISTS}", None),
        (f"1. wrong\n2. right\n{LISTS}", None),
        (f"1. wrong: There is a cup.\n2. right\n{LISTS}", None),
        (f"1. wrong: One. Two.\n2. right\n{LISTS}", None),
        (f"1. wrong: There is \x1b[2J.\n2. right\n{LISTS}", None),
        (f"1. wrong: {'very ' * 50} long\n2. right\n{LISTS}", None),
        (f"1. wrong: There is <image>.\n2. right\n{LISTS}", None),
        (f"{'1' * 5000}. right\n2. right\n{LISTS}", None),  # more digits than Python makes a number of
        ("1. right\n2. right\nIn the image: cup", None),
        ("1. right\n2. right", None),
        (f"Sure! Here it is:\n1. right\n2. right\n{LISTS}", None),
    ],
)
def test_a_judges_reply_counts_whole_or_not_at_all(reply: str, corrected: str | None) -> None:
    found = pairs.read_check(TEXT, reply)
    assert (found and found.corrected) == corrected
    if found:
        assert (found.present, found.absent) == (("cup", "red dog"), ("pan", "fork-lift"))


@pytest.mark.parametrize(
    ("verdicts", "present", "absent"),
    [
        ("1. wrong: There is a star.\n2. right", "bed", "star"),
        ("1. wrong: There are two stars.\n2. right", "bed", "star"),
        ("1. right\n2. right", "bed", "cup"),  # a sentence that stays names what is not there
        ("1. cannot judge\n2. right", "bed", "cup"),
        ("1. right\n2. wrong: Stars shine", "cup", "Star"),
        ("1. right\n2. right", "cup, bed", "star, bed"),
        ("1. right\n2. right", "cup, beds", "bed"),
        ("1. wrong: There is a bed.\n2. right", "cup, bed", "star"),  # the cup is there, and was wrong alone
    ],
)
def test_a_reply_that_contradicts_itself_is_refused(verdicts: str, present: str, absent: str) -> None:
    with pytest.raises(NoVerdict, match="contradictory"):
        pairs.read_check(TEXT, f"{verdicts}\nIn the image: {present}\nNot in the image: {absent}")


@pytest.mark.parametrize(
    ("verdicts", "present", "absent"),
    [
        ("1. wrong: There is no cup.\n2. right", "bed", "cup"),
        ("1. wrong: There isn't a cup.\n2. right", "bed", "cup"),
        ("1. wrong: There is a red cup.\n2. right", "cup", "star"),
        ("1. wrong: There is a star cup.\n2. right", "star cup", "star, cup"),  # the longest name counts
        ("1. wrong: There is a bed.\n2. right", "bed", "cup"),
    ],
)
def test_a_reply_without_contradiction_counts(verdicts: str, present: str, absent: str) -> None:
    assert pairs.read_check(TEXT, f"{verdicts}\nIn the image: {present}\nNot in the image: {absent}")


def test_contradictory_replies_leave_no_pair_and_are_counted(world: Path, tmp_path: Path) -> None:
    """A judge that takes back what it corrects, on half of the pictures: no chosen text names what a pair denies."""

    def answer(request: Request, number: int) -> Answer:
        content = request["messages"][0]["content"]
        if len(content) < 2 or "Sentences:" not in content[0]["text"]:
            return Answer("yes")
        sentences = content[0]["text"].split("Sentences:\n")[1].split("\nAnswer")[0].splitlines()
        odd = sum(content[1]["image_url"]["url"].encode()) % 2
        lines = [f"{n}. wrong: There is a unicorn." for n, _ in enumerate(sentences, 1)]
        return Answer(
            "\n".join([*lines, f"In the image: {'tree' if odd else 'unicorn'}"])
            + f"\nNot in the image: {'unicorn' if odd else 'dragon'}"
        )

    place, how = (
        MiningSource(world / "vg", "none"),
        MiningSettings(samples=0, questions=2, max_new_tokens=20, near_texts=0),
    )
    with endpoint(answer) as there:
        card = mine_pairs(shipped_base(), place, tmp_path / "out", how, judging(there.url))
    (told,) = card["judge"]
    assert 0 < told["unjudged"]["contradictory"] < card["descriptions"]["made"]
    assert "not used: contradictory" in (tmp_path / "out" / "README.md").read_text()
    questions = {r["question"]: r["chosen"] for r in read_json(tmp_path / "out" / "pope_data.json")}
    assert questions.get(question_text("unicorn"), "Yes.") == "Yes."


def test_another_judge_goes_on_with_what_is_described_and_a_wrong_address_costs_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import base64

    pictures = read_pictures(world / "vg", "toyworld").pictures
    scenes = {base64.b64encode(p.path.read_bytes()).decode(): sorted(p.objects) for p in pictures}
    answer = seeing(scenes)
    place, how = (
        MiningSource(world / "vg", "none"),
        MiningSettings(samples=0, questions=2, max_new_tokens=20, near_texts=0),
    )
    out, run = tmp_path / "out", lambda judge: mine_pairs(shipped_base(), place, tmp_path / "out", how, judge)
    with pytest.raises(RelookError, match="does not answer"):  # before anything is generated
        run(judging("http://127.0.0.1:1/v1"))
    assert not list((out / "work").glob("descriptions*"))

    def down_after_the_probe(request: Request, number: int) -> Answer:
        return Answer("yes") if number == 0 else Answer(status=500, body="no")

    with endpoint(down_after_the_probe) as there, pytest.raises(RelookError, match="does not answer"):
        run(judging(there.url))
    described = (out / "work" / "descriptions_0.jsonl").read_bytes()
    with endpoint(answer) as there:  # another address, another model
        other = JudgeSettings(there.url, "other", retries=0)
        assert run(other)["descriptions"]["made"] == len(pictures)
    assert (out / "work" / "descriptions_0.jsonl").read_bytes() == described
    assert run(JudgeSettings("http://elsewhere.invalid/v1", "other"))  # finished: nothing is asked
    with pytest.raises(RecipeError, match="made with another judge"):
        run(judging("http://elsewhere.invalid/v1"))


def test_a_picture_that_is_mended_is_looked_at_again(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"no image")
    looked = tmp_path / "work" / "pictures.jsonl"
    assert "fault" in jobs.fingerprint_all(looked, [("a", picture)], "pictures")["a"]
    Image.new("RGB", (9, 9)).save(picture)
    assert "look" in jobs.fingerprint_all(looked, [("a", picture)], "pictures")["a"]


LINES = ["1. right", "1) wrong: ", "2. Wrong: a pot", "² right", "9" * 5000 + ". right", "A:", "B: a pot", LISTS, ""]
PIECES = st.sampled_from([*LINES, "\n", ", ", " ", ".", "İ", "\x1c", "\ud800"])


@given(st.lists(PIECES, max_size=9), st.lists(st.sampled_from(["a cup", ".", " ", "\n", "!", "\x1c"]), max_size=6))
def test_any_reply_is_read_without_an_error(reply: list[str], text: list[str]) -> None:
    for between in ("", "\n"):
        with suppress(NoVerdict):
            pairs.read_check("".join(text) or "a cup", between.join(reply))
        pairs.read_style(MinedPair(NOWHERE, "a cup", "a pot"), VOCABULARY, between.join(reply))


PAIR = MinedPair(MinedImage("1", Path(), frozenset({"cup"}), frozenset({"cup"})), "There is a cup.", "There is a dog.")


@pytest.mark.parametrize(
    ("reply", "taken"),
    [
        ("A: One sees a mug.\nB: One sees a dog.", True),
        ("A: One sees a cup.\nB: One sees a cup.", False),  # the mistake is gone
        ("A: One sees a pot.\nB: One sees a dog.", False),  # a new one
        ("A: One sees a cup.\nB: One sees, at a very great distance, a dog.", False),
        ("A: One sees a cup. It is red.\nB: One sees a dog and it is red.", False),
        ("A: One sees a cup.", False),
        ("A: One sees a cup.\nB: One sees a dog.\nC: no", False),
        ("A: One sees a cup</s>.\nB: One sees a dog</s>.", False),
        (f"A: {'Well, ' * 9} a cup.\nB: {'Well, ' * 9} a dog.", False),
    ],
)
def test_a_new_style_keeps_what_is_said(reply: str, taken: bool) -> None:
    assert (pairs.read_style(PAIR, VOCABULARY, reply) is not None) == taken


def test_with_annotations_a_judge_gives_both_sides_one_style(kitchen: Path, said: object, tmp_path: Path) -> None:
    def rewrite(request: Request, number: int) -> Answer:
        text = request["messages"][0]["content"]
        lines = [line for line in text.splitlines() if line.startswith(("A: There", "B: There"))]
        if "bed" in text:
            return Answer("I would rather not.")
        return Answer("\n".join(line.replace("There is", "Look,") for line in lines))

    with endpoint(rewrite) as there:
        how = MiningSettings(questions=2, near_texts=0)
        card = mine_pairs(shipped_base(), MiningSource(kitchen, "vg"), tmp_path / "out", how, judging(there.url))
    pairs = read_json(tmp_path / "out" / "desc_data.json")
    assert pairs["1"] == {"chosen": ["Look, a cup. Look, a pot."], "rejected": ["Look, a cup. Look, a dog."]}
    assert pairs["3"]["rejected"] == ["There is a cup. There is a dog."]
    assert card["judge"][0]["unjudged"] == {"nonsense": 1}
