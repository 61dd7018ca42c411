"""Mining by sentence: pairs of a true and a false sentence after one beginning, checked by annotations, a judge or the
model itself; what cannot be used is counted and named; stopped anywhere and run again, the files are the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.endpoint import Answer, endpoint
from helpers.interrupted import interrupt
from helpers.killed import run_killed_at
from test_mine import VOCABULARY, judging, seeing

from relook import load_model
from relook.data.check import check_folder
from relook.data.readers import read_pairs, read_sentinel
from relook.data.sentences import end_of_first_sentence, split_sentences
from relook.errors import DataError, RecipeError
from relook.evaluate.results import AnswerFile
from relook.files import read_json, write_json
from relook.generate.answering import (
    Beginning,
    Continuation,
    GenerationSettings,
    answer_questions,
    continue_answers,
)
from relook.mine import output, sentences
from relook.mine.jobs import MiningSettings, MiningSource
from relook.mine.pairs import CONTEXT, hallucinations
from relook.mine.pictures import MinedImage, read_pictures
from relook.mine.run import mine_pairs
from relook.mine.sentences import ENDED, NOTHING_TRUE, GrowingDescription, by_annotations, by_judge, by_own_answers
from relook.toyworld.build import shipped_base

NEUTRAL = ("It is a fine day.",)
SETTINGS = MiningSettings(
    questions=4, max_new_tokens=40, batch_size=2, near_texts=0.0, by="sentence", continuations=3
)  # parts of two


def quiet(*_: object) -> None:
    pass


def written(*texts: str, complete: bool = False) -> list[Continuation]:
    return [Continuation(text, 4, complete or not text) for text in texts]


def description(*objects: str, text: str = "") -> GrowingDescription:
    return GrowingDescription(MinedImage("1", Path("1.png"), frozenset(), frozenset(objects)), "Describe it.", text)


def grown(growing: GrowingDescription, continuations: Sequence[Continuation]) -> GrowingDescription:
    candidates = growing.candidates(continuations)
    [checked] = by_annotations(VOCABULARY, NEUTRAL)([(growing, candidates)])
    growing.grow(continuations, candidates, checked)
    return growing


# --- sentences and continuations


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("A cup. A dog.", 6),
        ("\n\nA cup.\nA", 8),
        ("It is 3.5 m. So", 12),
        ("A cup.", None),
        ("A cup", None),
        ("", None),
    ],
)
def test_where_a_first_sentence_ends(text: str, end: int | None) -> None:
    assert end_of_first_sentence(text) == end


def test_a_continuation_is_the_rest_of_the_answer(world: Path) -> None:
    """Greedy continuations, sentence by sentence, join to the whole greedy answer."""
    loaded = load_model(shipped_base())
    image, prompt = read_pictures(world / "vg", "toyworld").pictures[0].path, "Describe this image in detail."
    [(_, whole)] = answer_questions(loaded, [(image, prompt)], GenerationSettings(max_new_tokens=64), quiet)
    settings, text = GenerationSettings(max_new_tokens=64, one_sentence=True), ""
    for count in range(1, 20):
        [(_, continuation)] = continue_answers(loaded, [Beginning(image, prompt, text)], settings, quiet)
        text += continuation.text
        assert continuation.complete or text == whole[: len(text)]
        assert text.count(".") == min(count, whole.count("."))
        if continuation.complete:
            break
    assert text == whole
    assert whole.count(".") > 2


# --- what becomes a pair


def test_a_true_and_a_false_sentence_are_a_pair_and_the_true_one_goes_on() -> None:
    growing = description("cup", "bed", text="It is calm.")
    grown(growing, written(" There is a dog.", " There is a dog.", " There is a cup.", " It is calm.", " There is a"))
    pair = {"context": "It is calm.", "chosen": "There is a cup.", "rejected": "There is a dog.", "complete": False}
    assert growing.pairs == [pair]
    assert growing.text == "It is calm. There is a cup."
    assert (growing.end, growing.length) == ("", 4)
    counts = {"images": 1, "tokens": 20, "sentences": 3, "false": 1, "not_judged": 0, "checks": 3}
    assert growing.counts == counts


def test_what_names_nothing_new_goes_on_and_is_in_no_pair() -> None:
    growing = grown(description("cup"), written("It is calm.", "It is calm.", "There is a dog."))
    assert (growing.text, growing.pairs) == ("It is calm.", [])


@pytest.mark.parametrize("objects", [("cup",), ("cup", "bed")])
def test_a_pair_has_an_end_mark_where_the_model_ends_and_all_is_named(objects: tuple[str, ...]) -> None:
    growing = grown(description(*objects), [*written("There is a dog."), *written("There is a cup.", complete=True)])
    assert [pair["complete"] for pair in growing.pairs] == [len(objects) == 1]


def test_where_the_model_mostly_goes_on_with_what_is_false_it_is_corrected() -> None:
    """By an object that is not named yet; where all are, an end is better."""
    growing, texts = description("cup", "bed"), written("", " There is a dog.", " There is a dog.", " There is a cup.")
    growing.text, growing.mentioned = "There is a cup.", {"cup"}
    pair = {"context": "There is a cup.", "chosen": "There is a bed.", "rejected": "There is a dog.", "complete": False}
    assert grown(growing, texts).pairs == [pair]
    assert (growing.text, growing.end) == ("There is a cup. There is a bed.", "")
    assert growing.counts["corrected"] == 1
    sides = {"chosen": "There is a bed.", "rejected": "There is a bed. There is a dog.", "complete": True}
    assert grown(growing, texts).pairs[1:] == [{"context": "There is a cup.", **sides}]
    assert growing.end == NOTHING_TRUE


def test_what_is_named_again_is_no_way_to_go_on() -> None:
    growing = description("cup", "bed", text="There is a cup.")
    growing.mentioned = {"cup"}
    grown(growing, written(" The cup is red.", " The cup is red.", " It is calm."))
    assert growing.text.endswith("It is calm.")


def test_complete_pairs_go_on_as_the_description_did() -> None:
    growing = description("cup", "bed", text="It is calm.")
    grown(growing, written("\n\nThere is a dog.", "\n\nThere is a cup."))
    grown(growing, written(" There is a bed.", complete=True))
    [pair] = sentences.pairs_of_records([growing.picture], [growing.to_record()], None, complete=True).pairs
    texts = [f"It is calm. There is a {name}. There is a bed." for name in ("cup", "dog")]
    assert (*pair.answers, pair.context, pair.complete) == (*texts, "", True)
    growing.end = NOTHING_TRUE
    [pair] = sentences.pairs_of_records([growing.picture], [growing.to_record()], None, complete=True).pairs
    assert not pair.complete


def test_where_nothing_true_follows_an_end_is_better() -> None:
    texts = written(" There is a dog.", " There is a dog.", " There is a kite.")
    growing = description("cup", text="It is calm. There is a cup.")
    growing.mentioned = {"cup"}
    grown(growing, texts)
    sides = {"chosen": "There is a cup.", "rejected": "There is a cup. There is a dog."}
    assert growing.pairs == [{"context": "It is calm.", **sides, "complete": True}]
    assert growing.end == NOTHING_TRUE


def test_what_says_most_that_is_new_goes_on() -> None:
    growing = description("cup", "bed", text="There is a cup.")
    growing.mentioned = {"cup"}
    grown(growing, written(" The cup is red.", " The cup is red.", " There is a bed."))
    assert growing.text.endswith("There is a bed.")
    assert growing.pairs == []


@pytest.mark.parametrize(
    ("texts", "end"),
    [
        ((" There is a dog.", " There is a kite.", ""), ""),
        ((" There is a dog.", "", ""), ENDED),
        ((" There is a cup.", "", ""), ENDED),
        ((" There is a cup.", " There is a cup.", ""), ""),
    ],
)
def test_when_a_description_ends(texts: tuple[str, ...], end: str) -> None:
    assert grown(description("cup"), written(*texts)).end == end
    assert grown(description("cup"), written(" There is a cup.", complete=True)).end == ENDED


def test_pairs_that_cannot_be_used_are_counted_by_reason() -> None:
    """An answer that repeats its context, and one that is equal to the other side."""
    growing = description("cup", text="There is a cup.")
    growing.pairs = [
        {"context": "There is a cup.", "chosen": "It is red.", "rejected": "There is a cup. There is a dog."},
        {"context": "There is a cup.", "chosen": "It is red.", "rejected": "It is red."},
        {"context": "", "chosen": "There is a cup.", "rejected": "There is a dog."},
    ]
    growing.pairs = [{**pair, "complete": False} for pair in growing.pairs]
    result = sentences.pairs_of_records([growing.picture], [growing.to_record()], None)
    assert [pair.context for pair in result.pairs] == [""]
    assert result.dropped == {"an answer repeats the context": 1, "chosen equals rejected": 1}


# --- who checks


def test_the_model_itself_checks_by_yes_and_no(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    answers = {"cup": "Yes.", "dog": "No.", "bed": "Perhaps."}

    def answer(_: object, questions: Sequence[tuple[Path, str]], *__: object) -> Iterator[tuple[int, str]]:
        asked.extend(text for _, text in questions)
        for index, (_, text) in enumerate(questions):
            yield index, next(said for name, said in answers.items() if name in text)

    monkeypatch.setattr(sentences, "answer_questions", answer)
    growing, check = description(), by_own_answers(VOCABULARY, lambda: None, SETTINGS)  # type: ignore[arg-type, return-value]
    texts = written(" There is a cup.", " A cup and a dog.", " A bed and a cup.", " It is calm.")
    candidates = growing.candidates(texts)
    for _ in range(2):  # what was asked about a picture is not asked again
        [checked] = check([(growing, candidates)])
        assert [verdict.true for verdict in checked] == [True, False, None, True]
        assert [verdict.present for verdict in checked] == [{"cup"}, {"cup"}, {"cup"}, set()]
    assert len(asked) == growing.counts["checks"] == 3


def test_the_model_is_asked_about_further_objects_of_the_user(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of toyworld's objects COCO has no tree: nobody would ask about one."""
    asked: list[str] = []

    def answer(answerer: Any, questions: Sequence[tuple[Path, str]], *rest: Any) -> Iterator[tuple[int, str]]:
        asked.extend(text for _, text in questions)
        return answer_questions(answerer, questions, *rest)

    monkeypatch.setattr(sentences, "answer_questions", answer)
    write_json(tmp_path / "objects.json", {"tree": ["oak"]})
    settings = MiningSettings(**{**vars(SETTINGS), "own_answers": True, "max_images": 8, "parquet": False})
    for words, expected in ((None, False), (tmp_path / "objects.json", True)):
        asked.clear()
        source = MiningSource(world / "vg", "none", words)
        mine_pairs(shipped_base(), source, tmp_path / f"out-{expected}", settings)
        assert asked
        assert any("tree" in text for text in asked) is expected
    with pytest.raises(RecipeError, match="Synonyms belong to annotations"):
        mine_pairs(shipped_base(), source, tmp_path / "out", MiningSettings(by="sentence"), judging("http://x/v1"))


def test_a_judge_that_answers_nonsense_is_counted_and_makes_no_pair(tmp_path: Path) -> None:
    picture = tmp_path / "1.png"
    picture.write_bytes(b"image")
    growing = [GrowingDescription(MinedImage(str(i), picture, frozenset()), "Describe it.") for i in range(2)]
    texts = written(" There is a cup.", " There is a dog.")

    def answer(request: Any, number: int) -> Answer:
        return Answer("I love it!" if "cup" in request["messages"][0]["content"][0]["text"] else "1. right")

    with endpoint(answer) as there:
        check = by_judge(judging(there.url).open(tmp_path))
        candidates = [d.candidates(texts) for d in growing]
        for description_, options, checked in zip(
            growing, candidates, check(list(zip(growing, candidates, strict=True))), strict=True
        ):
            assert [verdict.true for verdict in checked] == [None, None]
            description_.grow(texts, options, checked)
            assert (description_.pairs, description_.end) == ([], NOTHING_TRUE)
    records = [d.to_record() for d in growing]
    result = sentences.pairs_of_records([d.picture for d in growing], records, judging(there.url))
    assert result.judge[0]["unjudged"] == {"nonsense": 2}
    assert result.cost["sentences_not_judged"] == 4


@pytest.mark.parametrize(
    ("changes", "annotations", "judged", "fault"),
    [
        ({"own_answers": True}, "toyworld", False, "where there are no annotations"),
        ({"own_answers": True, "by": "description"}, "none", False, "where there are no annotations"),
        ({"temperature": 0.0}, "toyworld", False, "several sampled ones"),
        ({"continuations": 1}, "toyworld", False, "several sampled ones"),
        ({"by": "sentense"}, "toyworld", False, "Did you mean sentence"),
        ({}, "none", False, "nothing finds the mistakes"),
        ({}, "toyworld", True, "a judge would do nothing"),
        ({"complete": True, "by": "description"}, "toyworld", False, "complete as they are"),
    ],
)
def test_mistakes_of_a_user(
    changes: dict[str, Any], annotations: str, judged: bool, fault: str, world: Path, tmp_path: Path
) -> None:
    settings = MiningSettings(**{"by": "sentence", **changes})
    judge = judging("http://127.0.0.1:1/v1") if judged else None
    with pytest.raises(RecipeError, match=fault):
        mine_pairs(shipped_base(), MiningSource(world / "vg", annotations), tmp_path / "out", settings, judge)


# --- the shipped base on toyworld

FILES = ("sentinel.json", "image_data.json", "pairs.parquet", "pairs.html", "README.md", "card.json")


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (*(out / name for name in FILES), out / "work/sentences.jsonl")}


def mine(world: Path, out: Path, settings: MiningSettings = SETTINGS) -> dict[str, Any]:
    source = MiningSource(world / "vg", "toyworld", exclude=[world / "test"])
    return mine_pairs(shipped_base(), source, out, settings)


@pytest.fixture(scope="module")
def mined(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sentences") / "out"
    mine(world, out)
    return out


def test_mined_sentences_are_read_by_every_reader(mined: Path, world: Path) -> None:
    card = read_json(mined / "card.json")
    pairs, report = read_sentinel(mined / "sentinel.json", mined, on_bad="error")
    rows, _ = read_pairs(mined / "pairs.parquet", mined.parent / "rows", on_bad="error")
    assert check_folder("sentinel", mined).clean
    assert not report.dropped
    assert len(pairs) == len(rows) == card["descriptions"]["pairs"] + card["questions"]["pairs"]
    assert 0 < card["descriptions"]["pairs"] < len(pairs)
    texts = [(p.prompt, p.chosen, p.rejected, p.context, p.complete) for p in pairs]
    assert [(p.prompt, p.chosen, p.rejected, p.context, p.complete) for p in rows] == texts
    truth = {p.path.read_bytes(): p.objects for p in read_pictures(world / "vg", "toyworld").pictures}
    for pair in pairs:
        if pair.chosen in ("Yes.", "No."):
            continue
        objects = truth[pair.images[0].read_bytes()]
        assert not hallucinations(pair.chosen, objects, VOCABULARY)
        assert hallucinations(pair.rejected[len(pair.context) :], objects, VOCABULARY)
        before = len(split_sentences(pair.context)) + 1 if pair.context else 0
        assert len(split_sentences(pair.chosen)) == before + 1
    cost = card["descriptions"]["cost"]
    lines = (mined / "work/sentences.jsonl").read_text().splitlines()
    assert sum(cost["descriptions"].values()) == len(lines) == card["pictures"]["mined"]
    assert cost["checks"] == card["descriptions"]["made"] > 0
    page = (mined / "pairs.html").read_text()
    assert "So far" in page
    assert "--pairs_path sentinel.json" in page


@pytest.mark.slow  # test_mine.py stops the common parts
def test_stopped_anywhere_it_ends_in_the_same_files(
    mined: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for owner, name, at in (
        (sentences, "continue_answers", 2),
        (sentences, "continue_answers", 9),
        (AnswerFile, "finish", 3),
        (output, "write_pairs", 1),
        (output, "write_card", 1),
    ):
        with monkeypatch.context() as patch:
            interrupt(patch, owner, name, at)
            with pytest.raises(KeyboardInterrupt):
                mine(world, out)
    mine(world, out)
    assert contents(out) == contents(mined)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_killed_for_good_and_over_processes_the_files_are_the_same(
    mined: Path, world: Path, tmp_path: Path, count: int
) -> None:
    """kill -9 in the midst of the descriptions and of the files, then let alone."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "relook", "mine", "--model", shipped_base(), "--images", world / "vg"]
    command += ["--out", out, "--annotations", "toyworld", "--exclude", world / "test"]
    command += ["--by", "sentence", "--continuations", "3"]
    command += ["--questions", "4", "--near-texts", "0", "--max-new-tokens", "40", "--batch-size", "2"]
    files = [out / name for name in ("work/sentences.jsonl", "work/answers.jsonl", "pairs.parquet")]
    run_killed_at(files, command, count)
    assert contents(out) == contents(mined)


def test_pairs_follow_earlier_ones_over_the_same_images(mined: Path, world: Path, tmp_path: Path) -> None:
    settings = MiningSettings(**{**vars(SETTINGS), "seed": 1, "max_images": 5})
    card = mine(world, tmp_path / "alone", settings)
    source = MiningSource(world / "vg", "toyworld", exclude=[world / "test"], earlier=mined)
    together = mine_pairs(shipped_base(), source, tmp_path / "out", settings)
    before, alone, after = (read_json(out / "sentinel.json") for out in (mined, tmp_path / "alone", tmp_path / "out"))
    assert after == {image: before.get(image, []) + alone.get(image, []) for image in (*before, *alone)}
    assert together.pop("earlier") == sum(map(len, before.values()))
    assert together == card
    pairs, report = read_sentinel(tmp_path / "out/sentinel.json", tmp_path / "out", on_bad="error")
    assert len(pairs) == sum(map(len, after.values()))
    assert not report.dropped
    assert "pairs of earlier mining" in (tmp_path / "out/README.md").read_text()
    # What an evaluation needs apart now was mined before.
    image = read_pictures(world / "vg", "toyworld").pictures[0]
    (tmp_path / "names.txt").write_text(image.path.name)
    apart = MiningSource(world / "vg", "toyworld", exclude=[tmp_path / "names.txt"], earlier=mined)
    with pytest.raises(DataError, match=f"not mined here: {image.id}"):
        mine_pairs(shipped_base(), apart, tmp_path / "apart", settings)
    with pytest.raises(DataError, match=r"has no sentinel\.json"):
        mine_pairs(shipped_base(), replace(source, earlier=tmp_path), tmp_path / "none", settings)


def test_a_number_of_images_and_pairs(world: Path, tmp_path: Path) -> None:
    settings = MiningSettings(**{**vars(SETTINGS), "max_images": 5, "max_pairs": 2, "questions": 0, "parquet": False})
    card = mine(world, tmp_path / "out", settings)
    assert card["pictures"]["mined"] == 5
    assert card["descriptions"]["pairs"] == 2
    assert card["descriptions"]["dropped"]["more than wanted"] == card["descriptions"]["found"] - 2


def test_without_annotations_a_judge_checks(world: Path, tmp_path: Path) -> None:
    import base64

    pictures = read_pictures(world / "vg", "toyworld").pictures
    scenes = {base64.b64encode(p.path.read_bytes()).decode(): sorted(p.objects) for p in pictures}
    source, settings = MiningSource(world / "vg", "none"), MiningSettings(**{**vars(SETTINGS), "questions": 2})
    with endpoint(seeing(scenes)) as there:
        card = mine_pairs(shipped_base(), source, tmp_path / "out", settings, judging(there.url))
        asked = len(there.requests)
        prompts = [request["messages"][0]["content"][0]["text"] for request in there.requests[1:]]
    assert any(f"{CONTEXT}The picture shows" in prompt for prompt in prompts)  # what a sentence goes on from
    truth = {f"{p.path.parent.name}/{p.path.name}": p.objects for p in pictures}
    found = 0
    for image, records in read_json(tmp_path / "out/sentinel.json").items():
        for record in records:
            if record["context"]:
                found += 1
                assert hallucinations(record["y_lose"], truth[image], VOCABULARY)
                assert not hallucinations(record["y_win"], truth[image], VOCABULARY)
    assert found > 0
    assert card["judge"][0]["replies"] == asked - 1 == card["descriptions"]["cost"]["checks"]
