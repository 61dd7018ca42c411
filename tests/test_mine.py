"""Mining: corrections are true, small and of the same length; questions fall where models err; files are HA-DPO's."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relook import mine as mining
from relook.data.hadpo import DESCRIBE_PROMPTS, read_hadpo
from relook.errors import DataError
from relook.evaluate.chair import Vocabulary
from relook.evaluate.pope import official_parse, question_text
from relook.mine import (
    NEUTRAL,
    Mining,
    balance,
    co_occurrence,
    correct,
    exchange,
    hallucinations,
    mine,
    mine_visual_genome,
    weighted_sample,
)
from relook.toyworld.shipped import mining_settings, shipped_base
from relook.toyworld.speech import FILLERS, SYNONYMS, describe, words
from relook.toyworld.world import OBJECTS, SETTINGS

VOCABULARY = Vocabulary.of(OBJECTS, SYNONYMS)
names = st.lists(st.sampled_from(OBJECTS), max_size=8)


def fixed(text: str, truth: Sequence[str], seed: int = 0) -> str:
    return correct(text, truth, VOCABULARY, FILLERS, random.Random(seed))


# --- corrections


@given(names, st.sets(st.sampled_from(OBJECTS), max_size=8), st.sampled_from(sorted(SETTINGS)), st.randoms())
def test_corrections_are_true_and_of_equal_length(
    said: list[str], truth: set[str], setting: str, rng: random.Random
) -> None:
    text = describe(said, setting, rng.randint(0, 2), rng)
    chosen = correct(text, truth, VOCABULARY, FILLERS, rng)
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
    assert fixed("A dog and an apple lie here.", ["apple", "bed"]) == "A bed and an apple lie here."
    assert fixed("There is a puppy.", ["dog"]) == "There is a puppy."  # a synonym is no mistake
    assert fixed("It looks quite calm.", []) == "It looks quite calm."
    replaced = fixed("There is a dog. There is a cat.", []).split(". ")
    assert {line.rstrip(".") + "." for line in replaced} < set(FILLERS)
    assert len(set(replaced)) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog.\n\nIt is 3.5 m away.", "A cup.\n\nIt is 3.5 m away."),  # paragraphs and numbers stay
        ("A bed! There is a dog", "A bed! There is a cup"),  # a sentence that was cut off stays cut off
        ("There is a bed. There is", "There is a bed. There is"),
    ],
)
def test_nothing_else_changes(text: str, expected: str) -> None:
    assert fixed(text, ["bed", "cup"]) == expected


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
    ],
)
def test_exchanged_nouns_take_their_article_along(sentence: str, noun: str, name: str, expected: str) -> None:
    start = sentence.index(noun)
    assert exchange(sentence, start, start + len(noun), name) == expected


# --- which questions


@given(st.dictionaries(st.integers(0, 99).map(lambda i: Path(f"{i}.jpg")), st.frozensets(st.sampled_from("abcde"))))
def test_co_occurrence_is_a_count_over_images(objects: dict[Path, frozenset[str]]) -> None:
    together = co_occurrence(objects)
    for first in "abcde":
        for second in "abcde":
            both = sum(first in found and second in found for found in objects.values())
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
    kept = balance(records, rng)
    fewest = min(kinds.count("Yes."), kinds.count("No."))
    assert Counter(record["chosen"] for record in kept) == +Counter({"Yes.": fewest, "No.": fewest})
    assert [record["number"] for record in kept] == sorted(record["number"] for record in kept)


# --- the whole, with answers written beforehand

SCENES = {
    Path("vg/1.jpg"): {"cup", "pot"},
    Path("vg/2.jpg"): {"cup", "pot", "plate"},
    Path("vg/3.jpg"): {"bed"},
    Path("vg/4.jpg"): {"dog", "cup"},
}


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str]]:
    """A model that says yes to everything and describes each image as a cup and a dog; what it was asked."""
    asked: list[tuple[Path, str]] = []

    def answer(_: object, questions: Sequence[tuple[Path, str]], how: Any, report: Any) -> Iterator[tuple[int, str]]:
        report(len(questions), len(questions))
        asked.extend(questions)
        for index in reversed(range(len(questions))):  # answers come in an order of their own
            yield index, "There is a cup. There is a dog." if questions[index][1] in DESCRIBE_PROMPTS else "Yes."

    monkeypatch.setattr(mining, "answer", answer)
    return asked


def test_what_is_mined_from_known_answers(said: list[tuple[Path, str]], tmp_path: Path) -> None:
    found = mine(None, SCENES, VOCABULARY, tmp_path, Mining(questions=2, samples=1))  # type: ignore[arg-type]
    assert (found.images, found.described, found.hallucinated, found.description_pairs) == (4, 8, 6, 3)
    pairs = json.loads((tmp_path / "desc_data.json").read_text())
    assert pairs.keys() == {"1", "2", "3"}
    assert all(pair["rejected"] == ["There is a cup. There is a dog."] for pair in pairs.values())
    assert pairs["1"]["chosen"] == ["There is a cup. There is a pot."]
    assert pairs["3"]["chosen"][0].startswith("There is a bed.") != pairs["3"]["chosen"][0].endswith("There is a bed.")
    assert any(line in pairs["3"]["chosen"][0] for line in NEUTRAL)

    assert (found.asked, found.wrong, found.question_pairs) == (8, 4, 8)
    records = json.loads((tmp_path / "pope_data.json").read_text())
    questions = {question_text(name): name for name in OBJECTS}
    for record in records:
        there = questions[record["question"]] in SCENES[Path(f"vg/{record['image_id']}.jpg")]
        assert official_parse(record["chosen"]) == there
        assert official_parse(record["reject"]) != there
        assert record["origin"] == ("contrast" if there else "model")
        assert record["answer"] == "Yes."
    descriptions, asked = said[:8], said[8:]
    assert [image for image, _ in descriptions] == [*SCENES, *SCENES]
    assert len(set(asked)) == len(asked) == 8


def test_no_annotated_image_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no annotated images"):
        mine(None, {}, VOCABULARY, tmp_path, Mining())  # type: ignore[arg-type]


def test_mined_files_are_read_as_hadpos(world: Path, tmp_path: Path) -> None:
    """The shipped base on toyworld, twice: the same bytes, and nothing for the reader to drop."""
    outs = [tmp_path / "1", tmp_path / "2"]
    found = [mine_visual_genome(shipped_base(), world / "vg", out, mining_settings(0), SYNONYMS) for out in outs]
    for name in ("desc_data.json", "pope_data.json", "card.json"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    pairs, report = read_hadpo(world / "vg", outs[0] / "desc_data.json", outs[0] / "pope_data.json", on_bad="error")
    assert len(pairs) == found[0].question_pairs + 2 * found[0].description_pairs
    assert found[0].description_pairs > 0
    assert found[0].question_pairs > 0
    assert not report.dropped
    assert not report.skipped
    card = json.loads((outs[0] / "card.json").read_text())
    assert (card["images"], card["described"]) == (6, 12)
    for pair in pairs:
        assert len(words(pair.chosen)) == len(words(pair.rejected))
