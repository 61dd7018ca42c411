"""POPE against the official programs' own outputs, hand-counted cases, and properties."""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relook.data.samples import Question
from relook.errors import DataError, RecipeError
from relook.evaluate.benchmark import ScoringInputs, score_command
from relook.evaluate.tasks.build_pope import build_pope_files, build_splits
from relook.evaluate.tasks.pope import (
    PARSERS,
    SPLITS,
    PopeScore,
    match_answers,
    official_parse,
    question_text,
    read_pope_answers,
    read_pope_questions,
    score_pope_answers,
)

OFFICIAL_FILES = ("minigpt4_origin_random.jsonl", "minigpt4_origin_popular.jsonl")


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def asked(labels: list[str]) -> list[Question]:
    return [Question(str(i), Path("a.jpg"), f"Question {i}?", label) for i, label in enumerate(labels)]


def answered(texts: list[str]) -> list[dict]:
    return [{"question_id": i, "answer": text} for i, text in enumerate(texts)]


# The official rule


def test_parse_agrees_with_the_official_program_on_tricky_answers(refdata: Path) -> None:
    cases = json.loads((refdata / "pope/tricky_parse_cases.json").read_text())["cases"]
    assert len(cases) == 30
    assert {c["answer"]: official_parse(c["answer"]) for c in cases} == {
        c["answer"]: c["official"] == "yes" for c in cases
    }


@pytest.mark.parametrize("name", OFFICIAL_FILES)
def test_whole_answer_files_score_as_the_official_program_says(refdata: Path, name: str) -> None:
    expected = json.loads((refdata / "pope/expected_answer_metrics.json").read_text())[name]
    questions = read_pope_questions(refdata / "pope/questions" / expected["label_file"], Path("val2014"))
    answers = read_pope_answers(refdata / "pope/answers" / name)
    official = expected["official_evaluate_py"]
    scores = score_pope_answers(questions, answers).to_json()
    assert {key: scores[key] for key in ("tp", "fp", "tn", "fn")} == {
        k: official[k.upper()] for k in ("tp", "fp", "tn", "fn")
    }
    rates = ("accuracy", "precision", "recall", "f1", "yes_ratio")
    assert {k: scores[k] for k in rates} == pytest.approx({k: official[k] for k in rates}, abs=1e-12)
    assert (scores["n"], scores["parser"]) == (3000, "official")
    rows = match_answers(questions, answers)
    assert "".join(str(int(row.prediction)) for row in rows) == expected["predictions_in_line_order"]
    assert (rows[0].image, rows[0].right) == ("COCO_val2014_000000310196.jpg", True)


@pytest.mark.parametrize("case", ["perfect", "label_other_than_yes_no_counts_as_yes"])
def test_odd_files_score_as_the_official_program_says(refdata: Path, tmp_path: Path, case: str) -> None:
    given_case = json.loads((refdata / "pope/file_edge_cases.json").read_text())[case]
    records = [
        {"question_id": i, "image": "a.jpg", "text": f"{i}?", "label": label}
        for i, label in enumerate(given_case["labels"])
    ]
    questions = read_pope_questions(write_lines(tmp_path / "q.json", records), tmp_path)
    scores, official = score_pope_answers(questions, answered(given_case["answers"])), given_case["official"]
    assert (scores.tp, scores.fp, scores.tn, scores.fn) == tuple(official[key] for key in ("TP", "FP", "TN", "FN"))
    assert scores.f1 == pytest.approx(official["f1"])


@pytest.mark.parametrize("case", ["fewer_answers_than_labels", "more_answers_than_labels"])
def test_incomplete_files_are_refused_where_the_official_program_scores_a_part(refdata: Path, case: str) -> None:
    given_case = json.loads((refdata / "pope/file_edge_cases.json").read_text())[case]
    with pytest.raises(DataError, match=r"2 (questions have no answer \(3, 4\)|answers have no question \(3, 4\))"):
        score_pope_answers(asked(given_case["labels"]), answered(given_case["answers"]))


def test_published_tables_follow_from_their_counts(refdata: Path) -> None:
    """HA-DPO's README cuts percentages off after two decimals; rows that contradict themselves are marked there."""
    rows = json.loads((refdata / "pope/published_hadpo_confusion.json").read_text())["rows"]
    consistent = [row for row in rows if row["consistent"]]
    assert len(consistent) == 10
    for row in consistent:
        score = PopeScore(row["TP"], row["FP"], row["TN"], row["FN"])
        for rate, published in row["published"].items():
            assert 100 * getattr(score, rate) == pytest.approx(float(published), abs=0.0101)


def test_llava_layout_scores_as_llavas_program_says(refdata: Path, tmp_path: Path) -> None:
    """LLaVA's questions carry a suffix, a category and no label; both splits are in one file."""
    folder = refdata / "pope/llava_format_sample"
    with pytest.raises(DataError, match="96 questions have no label"):
        score_pope_answers(
            read_pope_questions(folder / "questions.jsonl", Path()), read_pope_answers(folder / "answers.jsonl")
        )
    given_files = ScoringInputs(questions=folder / "questions.jsonl", annotations=folder / "annotations")
    scores = score_command("pope", [folder / "answers.jsonl"], given_files, "llava")
    counts = {split: tuple(scores[split][key] for key in ("tp", "fp", "tn", "fn")) for split in ("random", "popular")}
    assert counts == {"random": (23, 21, 3, 1), "popular": (23, 19, 5, 1)}
    assert scores["popular"]["accuracy"] == pytest.approx(0.5833333333333334)
    assert scores["provenance"]["parser"] == "llava"
    labels = tmp_path / "labels"
    labels.mkdir()
    for name in ("random", "popular"):
        lines = (folder / f"annotations/coco_pope_{name}.json").read_text().splitlines(keepends=True)
        (labels / f"coco_pope_{name}.json").write_text("".join(lines[:-1] if name == "popular" else lines))
    with pytest.raises(DataError, match=r"in popular: 1 questions have no label \(95\), 0 labels"):
        score_command(
            "pope", [folder / "answers.jsonl"], ScoringInputs(questions=folder / "questions.jsonl", annotations=labels)
        )


@pytest.mark.parametrize(
    ("labels", "texts", "rates"),
    [
        (["yes", "no"], ["No", "No"], (None, 0, 0)),
        (["no", "no"], ["Yes", "No"], (0, None, 0)),
        (["yes", "no"], ["No", "Yes"], (0, 0, 0)),
        (["no", "no"], ["No", "No"], (None, None, None)),
        ([], [], (None, None, None)),
    ],
)
def test_rates_without_a_denominator_are_none(
    labels: list[str], texts: list[str], rates: tuple[float | None, ...]
) -> None:
    score = score_pope_answers(asked(labels), answered(texts))
    assert (score.precision, score.recall, score.f1) == rates


def test_rates_by_hand() -> None:
    score = PopeScore(tp=6, fp=2, tn=9, fn=3)
    assert (score.n, score.accuracy, score.precision, score.recall) == (20, 0.75, 0.75, pytest.approx(2 / 3))
    assert score.f1 == pytest.approx(12 / 17)
    assert score.yes_ratio == 0.4


@given(st.lists(st.sampled_from(["Yes", "No", "no dog", "", "It is not. Yes"]), max_size=30), st.randoms())
def test_order_of_answers_does_not_matter(texts: list[str], rng: object) -> None:
    questions, answers = asked(["yes", "no"] * (len(texts) // 2) + ["yes"] * (len(texts) % 2)), answered(texts)
    shuffled = list(answers)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert score_pope_answers(questions, shuffled) == score_pope_answers(questions, answers)
    assert score_pope_answers(questions, answers).n == len(texts)


WORDS = ["Yes", "No", "no", "not", "Not", "NO", "there", "is", "a dog", "nothing", "No!", "no\n", "</s>"]
texts = st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from([" ", ".", ",", ", ", ". ", "", "\t"]))).map(
    lambda parts: "".join(word + end for word, end in parts)
)


@given(st.lists(st.tuples(texts, st.sampled_from(["yes", "no", "No", "maybe"])), min_size=1, max_size=12))
def test_any_file_scores_as_the_official_rule_says(rows: list[tuple[str, str]]) -> None:
    """The rule in other words: a lone no, No or not among the words of the first sentence, split at spaces alone."""
    expected: Counter[tuple[bool, bool]] = Counter()
    for text, label in rows:
        sentence = re.match(r"[^.]*", text).group().replace(",", "")  # type: ignore[union-attr]
        said = not re.search(r"(?:^| )(?:No|no|not)(?: |\Z)", sentence)
        expected[said, label != "no"] += 1
    with tempfile.TemporaryDirectory() as folder:
        asked_of = [{"question_id": i, "image": f"{i % 3}", "text": f"{i}?", "label": r[1]} for i, r in enumerate(rows)]
        questions = write_lines(Path(folder) / "q.json", asked_of)
        answers = write_lines(Path(folder) / "a.json", answered([text for text, _ in rows])[::-1])
        scores = score_command("pope", [answers], ScoringInputs(questions=questions))
    places = {"tp": (True, True), "fp": (True, False), "tn": (False, False), "fn": (False, True)}
    assert {key: scores[key] for key in places} == {key: expected[place] for key, place in places.items()}
    for rate in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        interval = scores[f"{rate}_ci"]
        assert (interval is None) == (scores[rate] is None)
        assert interval is None or 0 <= interval[0] <= interval[1] <= 1


def test_parsers_by_name(refdata: Path) -> None:
    cases = json.loads((refdata / "pope/tricky_parse_cases.json").read_text())["cases"]
    assert all(PARSERS["llava"](c["answer"]) == (c["llava_eval_pope"] == "yes") for c in cases)
    exact = {"Yes": True, " NO\n": False, "yes": True, "No.": None, "Yes, there is": None, "": None}
    assert {text: PARSERS["lmms-eval"](text) for text in exact} == exact


def test_answers_that_are_neither_count_as_lmms_eval_counts_them() -> None:
    """By hand: accuracy over all, precision and recall over what was said."""
    labels = ["yes", "yes", "yes", "no", "no", "no", "no"]
    score = score_pope_answers(asked(labels), answered(["Yes", "no", "Yes.", "yes", "No", "no", "maybe"]), "lmms-eval")
    assert (score.tp, score.fn, score.fp, score.tn, score.neither, score.n) == (1, 1, 1, 2, 2, 7)
    assert (score.accuracy, score.precision, score.recall, score.f1) == (3 / 7, 0.5, 0.5, 0.5)
    assert score.parser == "lmms-eval"


@pytest.mark.parametrize(
    ("answer", "clear"),
    [
        ("Yes", True),
        ("**Yes**", True),
        ("No, there is not.", True),
        ("There is no dog in the image.", True),
        ("There are two dogs.", True),
        ("Yes. No other dogs are there.", True),
        ("", False),
        ("Nope", False),  # taken for yes
        ("**No**", False),
        ("NO", False),
        ('"No"', False),
        ("There isn't a dog.", False),
        ("Yes and no", False),
        ("Yes. No, wait.", False),
        ("I am not sure", False),  # taken for no
        ("I don't know.", False),
        ("是", False),
        ("没有", False),
        ("Non", False),
        ("The image shows a street.", False),
    ],
)
def test_answers_that_do_not_say_what_they_are_taken_for_are_unclear(answer: str, clear: bool) -> None:
    """They stay what the official program makes of them, and are counted beside."""
    found = score_pope_answers(asked(["yes"]), answered([answer]))
    assert found.unclear == (not clear)
    assert bool(found.tp) == official_parse(answer)


def test_an_exact_parser_finds_unclear_what_it_takes_for_neither() -> None:
    score = score_pope_answers(asked(["yes", "no", "yes"]), answered(["Yes", "no", "Yes."]), "lmms-eval")
    assert (score.neither, score.unclear) == (1, 1)


# Files


def test_popes_own_layout_without_ids_goes_by_order_and_text() -> None:
    questions = asked(["yes", "no", "no"])
    records = [{"question": q.text, "answer": text} for q, text in zip(questions, ("Yes", "Yes", "No"), strict=True)]
    assert score_pope_answers(questions, records) == PopeScore(tp=1, fp=1, tn=1, fn=0)
    with pytest.raises(DataError, match=r"2 answers are to another question text \(1, 2\)"):
        score_pope_answers(questions, [records[0], records[2], records[1]])
    with pytest.raises(DataError, match=r"1 answers have no question \(line 4\)"):
        score_pope_answers(questions, [*records, records[0]])


@pytest.mark.parametrize("name", ["coco_pope_random", "coco_pope_popular", "coco_pope_adversarial"])
def test_official_question_files_load(refdata: Path, name: str) -> None:
    questions = read_pope_questions(refdata / f"pope/questions/{name}.json", Path("val2014"))
    assert len(questions) == 3000
    assert [q.label for q in questions] == ["yes", "no"] * 1500
    assert set(Counter(q.image for q in questions).values()) == {6}
    assert questions[0].image == Path("val2014/COCO_val2014_000000310196.jpg")
    # The a/an rule of relook's own questions reproduces the official texts, but for one slip in the random file.
    names = [q.text.removesuffix(" in the image?").split(" ", 3)[3] for q in questions]
    other = [q.text for q, n in zip(questions, names, strict=True) if q.text != question_text(n)]
    assert other == (["Is there an traffic light in the image?"] if name == "coco_pope_random" else [])


def test_json_array_loads(refdata: Path) -> None:
    assert len(read_pope_questions(refdata / "pope/questions/aokvqa_pope_seem_adversarial.json", Path())) == 3000


def test_bad_files_are_refused(tmp_path: Path) -> None:
    good = {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"}
    for records, message in (
        ([{k: v for k, v in good.items() if k != "image"}], "record 1 has no image"),
        ([good, good], "question_id 1 stands more than once"),
        ([], "holds no question"),
    ):
        with pytest.raises(DataError, match=message):
            read_pope_questions(write_lines(tmp_path / "q.json", records), tmp_path)
    for records, message in (
        ([], "holds no answer"),
        ([{"question": "Is there a dog?"}], "record 1 needs question_id, and answer or text"),
        ([{"question_id": 1}], "record 1 needs question_id, and answer or text"),
        ([{"question_id": 1, "answer": None}], "record 1 needs question_id, and answer or text"),
        ([{"question_id": 1, "answer": "a"}, {"question_id": "1", "answer": "b"}], "stands more than once"),
    ):
        with pytest.raises(DataError, match=message):
            read_pope_answers(write_lines(tmp_path / "a.json", records))


def test_mismatches_are_named() -> None:
    questions = asked(["yes", "no", "yes"])
    with pytest.raises(DataError, match=r"1 answers are to another question text \(1\)"):
        match_answers(
            questions, [{"question_id": 1, "question": "Other?", "answer": "Yes"}, *answered(["", "", ""])[::2]]
        )
    with pytest.raises(DataError, match="Answers: question_id 0 stands more than once"):
        match_answers(questions, answered(["Yes", "No", "No"]) + answered(["No"]))


def test_answers_of_another_split_are_refused(refdata: Path) -> None:
    questions = read_pope_questions(refdata / "pope/questions/coco_pope_adversarial.json", Path())
    with pytest.raises(DataError, match="1479 answers are to another question text"):
        match_answers(questions, read_pope_answers(refdata / "pope/answers" / OFFICIAL_FILES[0]))


# Building the splits


def test_popular_and_adversarial_by_hand() -> None:
    """The image "few" has too few objects: it is left out, and its owls do not count."""
    world = {
        "one": ["cat", "dog", "cup"],
        "two": ["dog", "cup", "egg"],
        "three": ["dog", "bus", "cat"],
        "few": ["owl", "owl", "cup"],
    }
    splits = build_splits(world, ["cat", "dog", "cup", "egg", "bus", "owl", "pen", "fan"], seed=0)

    def absent(split: str, image: str) -> list[str]:
        return [r["text"].split()[3] for r in splits[split] if r["image"] == image and r["label"] == "no"]

    # dog 3; cat and cup 2, cat seen first; egg and bus 1, egg first. Then the ones that never occur, in order.
    assert absent("popular", "one") == ["egg", "bus", "owl"]
    assert absent("popular", "two") == ["cat", "bus", "owl"]
    assert absent("popular", "three") == ["cup", "egg", "owl"]
    # With cat come dog 2, cup 1, bus 1: bus is free. With dog: cat 2, cup 2, egg, bus: egg. With cup: none is left.
    assert absent("adversarial", "one") == ["bus", "egg", "owl"]
    # With dog come cat, cup, egg, bus: cat. With cup: dog, cat, egg: none is left, bus is the only one that occurs.
    assert absent("adversarial", "two") == ["cat", "bus", "owl"]
    assert {r["image"] for r in splits["random"]} == {"one", "two", "three"}
    assert splits["random"][0] == {
        "question_id": 1,
        "image": "one",
        "text": "Is there a cat in the image?",
        "label": "yes",
    }
    assert splits["adversarial"][8]["text"] == "Is there a cup in the image?"


OBJECTS = ["apple", "bus", "cat", "dog", "egg", "fox", "goat", "hat", "ink", "jar"]
worlds = st.dictionaries(st.text("xyz", min_size=1, max_size=4), st.lists(st.sampled_from(OBJECTS), unique=True))


@given(worlds, st.integers(0, 3), st.booleans())
def test_splits_ask_what_is_there_and_what_is_not(world: dict[str, list[str]], seed: int, unordered: bool) -> None:
    objects = {image: frozenset(names) if unordered else names for image, names in world.items()}
    splits = build_splits(objects, OBJECTS, seed)
    assert splits == build_splits(objects, OBJECTS, seed)
    used = [image for image, names in world.items() if 3 <= len(names) <= 7]
    yes = [[(r["image"], r["text"]) for r in splits[split] if r["label"] == "yes"] for split in SPLITS]
    assert yes[0] == yes[1] == yes[2]
    for records in splits.values():
        assert [r["question_id"] for r in records] == list(range(1, 6 * len(used) + 1))
        assert [r["label"] for r in records] == ["yes", "no"] * (3 * len(used))
        assert [r["image"] for r in records] == [image for image in used for _ in range(6)]
        assert len({(r["image"], r["text"]) for r in records}) == len(records)
        texts = {image: {question_text(n) for n in names} for image, names in world.items()}
        assert all((r["text"] in texts[r["image"]]) == (r["label"] == "yes") for r in records)
        if not unordered:
            assert [t for _, t in yes[0]] == [question_text(n) for image in used for n in world[image][:3]]


def test_unknown_objects_are_named() -> None:
    with pytest.raises(DataError, match="not among the categories: yak"):
        build_splits({"one": ["yak"]}, OBJECTS, 0)


def test_questions_are_built_from_annotations(tmp_path: Path) -> None:
    """From COCO's layout and from POPE's own: the same files, over images that are drawn and listed."""
    rng, names = random.Random(1), {f"{i}.jpg": [] for i in range(40)}
    for image in names:
        names[image] = rng.sample(OBJECTS, rng.randint(1, 6))
    ids = {name: number for number, name in enumerate(OBJECTS, 1)}
    boxes = [
        {"image_id": image, "category_id": ids[name], "bbox": [0, 0, 1, 1]}
        for image, objects in names.items()
        for name in [*objects, objects[0]]
    ]
    coco = {
        "images": [{"id": image, "file_name": image} for image in names],
        "categories": [{"id": number, "name": name} for name, number in ids.items()],
        "annotations": boxes,
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco, indent=1))
    write_lines(tmp_path / "lines.json", [{"image": i, "objects": objects, "n": 1} for i, objects in names.items()])
    (tmp_path / "array.json").write_text(json.dumps([{"image": i, "objects": o} for i, o in names.items()]))
    made = {}
    for kind in ("coco", "lines", "array"):
        card = build_pope_files(tmp_path / f"{kind}.json", tmp_path / kind, images=9, seed=3)
        made[kind] = [(tmp_path / kind / f"coco_pope_{split}.json").read_bytes() for split in SPLITS]
        assert card == build_pope_files(tmp_path / f"{kind}.json", tmp_path / kind, images=9, seed=3)
    assert made["lines"] == made["array"]
    drawn = (tmp_path / "coco" / "images.txt").read_text().split()
    assert len(set(drawn)) == 9
    assert all(len(names[image]) >= 3 for image in drawn)
    counts = Counter(name for image in drawn for name in names[image])
    for split in SPLITS:
        records = read_pope_questions(tmp_path / "coco" / f"coco_pope_{split}.json", Path())
        assert [record.image.name for record in records] == [image for image in drawn for _ in range(6)]
        for record in records:
            there = record.text in {question_text(name) for name in names[record.image.name]}
            assert there == (record.label == "yes")
        # The first absent one of the popular split is the most frequent of all drawn images.
        if split == "popular":
            absent = [n for n in counts if n not in names[drawn[0]]]
            most = max(counts[n] for n in absent)
            assert records[1].text in {question_text(n) for n in absent if counts[n] == most}
    assert sorted(path.name for path in (tmp_path / "coco").iterdir()) == [
        *sorted(f"coco_pope_{split}.json" for split in SPLITS),
        "images.txt",
        "pope.json",
    ]


@pytest.mark.parametrize(
    ("records", "images", "message"),
    [
        ([{"image": "a", "objects": ["dog", "cat"]}], 1, "0 images .* have 3 objects or more; 1 are wanted"),
        ([{"image": "a", "objects": ["dog"]}] * 2, 1, "a stands more than once"),
        ([{"image": "a", "objects": ["dog"]}, {"image": "b"}], 1, "record 2 needs image and objects"),
        ([{"image": "a", "objects": "dog"}], 1, "record 1 needs image and objects"),
        ([{"images": [], "objects": []}], 1, "record 1 needs image and objects"),
    ],
)
def test_annotations_that_questions_cannot_be_built_from(
    tmp_path: Path, records: list[dict], images: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        build_pope_files(write_lines(tmp_path / "a.json", records), tmp_path / "out", images)
    assert not (tmp_path / "out").exists()


def test_questions_of_other_settings_are_not_replaced(tmp_path: Path) -> None:
    records = [{"image": f"{i}.jpg", "objects": OBJECTS[i : i + 4]} for i in range(6)]
    file = write_lines(tmp_path / "a.json", records)
    build_pope_files(file, tmp_path / "out", 3)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(RecipeError, match=r"questions made with another images \(3, not 4\), image_list"):
        build_pope_files(file, tmp_path / "out", 4)
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
