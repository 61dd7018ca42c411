"""AMBER: the original's counts by hand, its files, and what is left out of it on purpose."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from relook.errors import DataError
from relook.evaluate.benchmark import ScoringInputs, score_command
from relook.evaluate.run import evaluate_model
from relook.evaluate.tasks import amber
from relook.evaluate.tasks.amber import DescriptionCounts, Lists, judge_description
from relook.files import read_records, write_json, write_jsonl

ASSOCIATION = {
    "man": ["person", "boy"],
    "woman": ["person"],
    "tree": ["bush", "leave"],
    "dog": [],
    "cat": [],
    "glass": [],
    "wineglass": ["glass"],
    "orange": [],
    "television": ["TV"],
    "person": ["people"],
    "potato": [],
}
LISTS = Lists(ASSOCIATION, {"orange"})


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("a man, two trees and three dogs.", ["man", "tree", "dog"]),
        ("Dogs and a TV on the tv", ["TV"]),  # case counts, as in the original
        ("people, persons and glasses", ["people", "person", "glass"]),
        ("men under leaves", []),  # WordNet takes neither to a word of the list
        ("a man-made bush-like dog's bed", ["dog"]),
        ("potatoes, two women, two persons", ["potato", "woman", "person"]),
        ("", []),
    ],
)
def test_words_of_the_list_are_found(text: str, nouns: list[str]) -> None:
    assert LISTS.nouns(text) == nouns


PARTS = Lists(
    {"watch": ["street", "bear", "bed", "brush"], "train": ["dog", "fish"], "can": ["hot", "light", "ski", "laptop"]}
    | {"sky": ["forest"]},
    (),
)


@pytest.mark.parametrize(
    ("text", "nouns"),
    [
        ("There is a sky. A forest can be seen.", ["sky", "forest"]),
        ("A trash can and two cans.", ["can"]),  # the original's tagger takes every "can" for the modal
        ("He may watch it. They watch the street, and she watches a bear.", ["street", "bear"]),
        ("A watch lies on the bed near two watches.", ["watch", "bed", "watch"]),
        ("People train the dog; the train is red.", ["dog", "train"]),
        ("A dog that lights up under the light and the light blue sky.", ["dog", "light", "sky"]),
        ("They want to fish or brush their teeth.", []),
        ("A man eats two fishes.", ["fish"]),
        ("Others don't brush the dog's teeth with a brush.", ["dog", "brush"]),
        ("A hot dog, a teddy bear and a ski slope.", ["dog", "bear"]),
        ("A laptop computer is on the laptop.", ["laptop"]),
        ("The **bed** of the “bear”", ["bed", "bear"]),
        ("It is eight o'clock.", []),
    ],
)
def test_words_that_are_no_nouns_are_not_counted(text: str, nouns: list[str]) -> None:
    """Verbs, and what the tagger of the original takes for adjectives, by its own answers to these texts."""
    assert PARTS.nouns(text) == nouns


def test_nouns_are_those_of_the_original_program(refdata: Path) -> None:
    """400 responses. The rest are single slips of its tagger ("the bananas vary", "a barbecue area")."""
    lists = Lists(json.loads((refdata / "amber/relation.json").read_text()), ())
    responses = json.loads((refdata / "amber/nouns_expected.json").read_text())
    differing = total = words = 0
    for response in responses:
        ours, original = Counter(lists.nouns(response["response"])), Counter(response["nouns"])
        differing += ((ours - original) + (original - ours)).total()
        total += original.total()
        words += len(response["response"].split())
    assert (len(responses), total) == (400, 3422)
    assert differing / total < 0.0105
    assert differing / words < 0.0015


@pytest.mark.parametrize(
    ("text", "made"),
    [
        # a made-up dog is a temptation; the orange is safe, and no truth
        ("a man, a dog and an orange", DescriptionCounts(3, 1, 1, 2, 1, 1)),
        # "person" goes to the first truth with that word, and twice there is once
        ("a person and a person", DescriptionCounts(2, 0, 1, 2, 0, 1)),
        ("a boy and a woman", DescriptionCounts(2, 0, 2, 2, 0, 1)),
        ("a cat", DescriptionCounts(1, 1, 0, 2, 0, 1)),
        ("nothing at all", DescriptionCounts(0, 0, 0, 2, 0, 1)),
    ],
)
def test_a_description_by_hand(text: str, made: DescriptionCounts) -> None:
    assert judge_description(text, ["man", "woman"], ["dog"], LISTS) == made


def test_near_synonyms_are_no_inventions_and_still_temptations() -> None:
    near = Lists(ASSOCIATION, (), {frozenset(("cat", "dog")), frozenset(("cat", "man"))})
    assert judge_description("a cat", ["man"], ["dog"], near) == DescriptionCounts(1, 0, 1, 1, 1, 1)
    assert judge_description("a dog", ["man"], ["dog"], near) == DescriptionCounts(1, 1, 0, 1, 1, 1)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", "yes"),
        ("No.", "no"),
        ("no, there is none", "no"),
        (" YES!", "yes"),
        ("Nothing", ""),
        ("Not", ""),
        ("**No**", "no"),
        ("Yes and no.", ""),
        ("Yes/No", ""),
        ("Nope", ""),
        ("没有", ""),
        ("", ""),
    ],
)
def test_yes_or_no(answer: str, said: str) -> None:
    assert amber.yes_or_no(answer) == said


# --- files


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two images: a description and two kinds of question each, one relation."""
    folder = tmp_path / "data" / "amber"
    kinds = [
        "discriminative-hallucination",
        "discriminative-attribute-state",
        "discriminative-hallucination",
        "relation",
    ]
    truths = ["no", "yes", "no", "no"]
    annotations: list[dict[str, Any]] = [
        {"id": 1, "type": "generative", "truth": ["man", "tree"], "hallu": ["dog"]},
        {"id": 2, "type": "generative", "truth": ["cat"], "hallu": ["dog", "woman"]},
        *({"id": 3 + i, "type": kind, "truth": truths[i]} for i, kind in enumerate(kinds)),
    ]
    queries = [
        {"id": i, "image": f"AMBER_{image}.jpg", "query": f"Question {i}?"}
        for i, image in zip(range(1, 7), (1, 2, 1, 1, 2, 2), strict=True)
    ]
    write_json(folder / "data" / "annotations.json", annotations)
    write_json(folder / "data" / "query" / "query_all.json", queries)
    write_json(folder / "data" / "relation.json", ASSOCIATION)
    (folder / "data" / "safe_words.txt").write_text("orange\nline")
    (folder / "image").mkdir()
    for name in ("AMBER_1.jpg", "AMBER_2.jpg"):
        Image.new("RGB", (20, 20), "white").save(folder / "image" / name)
    return tmp_path / "data"


def rescore(data: Path | None, answers: list[Path]) -> dict[str, Any]:
    return score_command("amber", answers, ScoringInputs(data), "official", None)


RESPONSES = ["a man and a dog", "a cat, a cat and a dog and a potato", "No", "No.", "Yes", "Maybe"]
OFFICIAL = [{"id": number, "response": text} for number, text in enumerate(RESPONSES, 1)]


def test_scores_by_hand(data: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", OFFICIAL[::-1])
    result = rescore(data, [tmp_path / "a.json"])
    generative = {"chair": 3 / 6, "cover": 2 / 3, "hal": 2 / 2, "cog": 2 / 3, "n": 2}
    assert {key: result["generative"][key] for key in generative} == pytest.approx(generative)
    # "no" is true three times and said twice, once rightly; one answer is neither
    whole = {"accuracy": 1 / 4, "precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5, "neither": 1, "n": 4}
    assert {key: result["discriminative"][key] for key in whole} == pytest.approx(whole)
    existence = {"accuracy": 1 / 2, "precision": 1, "recall": 1 / 2, "f1": 2 / 3, "neither": 0, "n": 2}
    assert {key: result["existence"][key] for key in existence} == pytest.approx(existence)
    assert (result["attribute"]["n"], result["state"]["n"], result["number"]["n"], result["action"]["n"]) == (
        1,
        1,
        0,
        0,
    )
    assert (result["relation"]["n"], result["relation"]["neither"]) == (1, 1)
    assert result["amber_score"] == pytest.approx((1 - 3 / 6 + 2 / 5) / 2)
    # The images alone: 1 has CHAIR 1/2 and F1 2/3 (a hit among two said), 2 has CHAIR 2/4 and F1 0.
    assert result["amber_score_ci"] == pytest.approx([(1 - 1 / 2 + 0) / 2, (1 - 1 / 2 + 2 / 3) / 2])
    assert (result["near_synonyms"], result["parser"]) == ("none", "first word")


def test_one_part_alone(data: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "g.json", OFFICIAL[:2])
    result = rescore(data, [tmp_path / "g.json"])
    assert "generative" in result
    assert not {"discriminative", "amber_score"} & result.keys()
    write_jsonl(tmp_path / "d.jsonl", OFFICIAL[2:])
    both = rescore(data, [tmp_path / "g.json", tmp_path / "d.jsonl"])
    assert both["generative"] == result["generative"]
    assert both["discriminative"]["n"] == 4
    assert both["provenance"]["answers_sha256"].keys() == {"g.json", "d.jsonl"}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "no answers"),
        (OFFICIAL[:1], r"1 are missing \(2\)"),
        ([*OFFICIAL, OFFICIAL[0]], r"1 stand more than once \(1\)"),
        ([*OFFICIAL, {"id": 99, "response": "Yes"}], r"1 have no question \(99\)"),
        ([{"id": 1, "response": None}], "Answer 1 has not both id and response"),
        ([{**OFFICIAL[0], "query": "Another?"}, *OFFICIAL[1:]], r"1 repeat another question \(1\)"),
    ],
    ids=["empty", "missing", "twice", "unknown", "null", "other"],
)
def test_answers_that_do_not_match_are_refused(records: list[Any], message: str, data: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", records)
    with pytest.raises(DataError, match=message):
        rescore(data, [tmp_path / "a.json"])


@pytest.mark.parametrize("name", ["annotations.json", "query/query_all.json", "relation.json", "safe_words.txt"])
def test_a_missing_file_is_named_with_its_source(name: str, data: Path, tmp_path: Path) -> None:
    (data / "amber" / "data" / name).unlink()
    write_json(tmp_path / "a.json", OFFICIAL)
    with pytest.raises(DataError, match=rf"{name} does not exist.*junyangwang0410/AMBER"):
        rescore(data, [tmp_path / "a.json"])


def test_odd_files_are_refused(data: Path) -> None:
    folder = data / "amber" / "data"
    queries = read_records(folder / "query" / "query_all.json")
    for odd, message in (
        ([*queries, queries[0]], "1 stand more than once"),
        ([{**queries[0], "id": 77}], "have no 77"),
    ):
        write_json(folder / "query" / "query_all.json", odd)
        with pytest.raises(DataError, match=message):
            amber.BENCHMARK.read_questions(data)
    for name in ("query/query_all.json", "annotations.json"):
        (folder / name).write_text("")
        with pytest.raises(DataError, match=rf"{name} is empty.*junyangwang0410/AMBER"):
            amber.BENCHMARK.read_questions(data)
    (folder / "near_synonyms.txt").write_text("cat dog\n\nman\n")
    with pytest.raises(DataError, match="not two words: man"):
        amber.read_lists(data)


def test_from_a_model_to_scores(base: Path, data: Path, tmp_path: Path) -> None:
    (data / "amber" / "data" / "near_synonyms.txt").write_text("cat dog\n")
    out = tmp_path / "out"
    result = evaluate_model(base, ["amber"], data, out, max_new_tokens=4)["amber"]
    first, second = (read_records(out / f"amber_{part}.jsonl") for part in ("generative", "discriminative"))
    assert [record["id"] for record in [*first, *second]] == [1, 2, 3, 4, 5, 6]
    assert first[0].keys() == {"id", "image", "query", "response"}
    again = rescore(None, [out])
    assert again == result
    assert set(result["provenance"]["generation"]["max_new_tokens"].values()) == {4}
    assert len(result["near_synonyms"]) == 64


def test_each_part_says_how_long_its_answers_could_be(data: Path, tmp_path: Path) -> None:
    """Questions for yes or no are cut at 64 tokens, whatever the descriptions may take."""
    write_json(tmp_path / "eval.json", {"data": str(data), "max_new_tokens": 512})
    write_jsonl(tmp_path / "amber_generative.jsonl", OFFICIAL[:2])
    write_jsonl(tmp_path / "amber_discriminative.jsonl", OFFICIAL[2:])
    longest = {"amber_generative": 512, "amber_discriminative": 64}
    assert rescore(None, [tmp_path])["provenance"]["generation"] == {"do_sample": False, "max_new_tokens": longest}
