"""Descriptions of pictures, and pairs of those with mistakes, which annotations find or a judge that sees them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relook.data.readers import DESCRIBE_PROMPTS
from relook.evaluate.judge import Judge
from relook.evaluate.tasks.pope import question_text, stated
from relook.generate.answering import GenerationSettings
from relook.mine.jobs import MiningSettings, generate_all
from relook.mine.pairs import (
    JudgedDescription,
    MinedPair,
    check_descriptions,
    correct_description,
    hallucinations,
    match_lengths,
    match_style,
    near_duplicates,
)
from relook.mine.pictures import AnnotatedImages, MinedImage
from relook.model.load import LoadedModel

# ----------------------------------------------------------------------------------------------------

# A new word can make another object of the words beside it, as "hot" and "dog", or of what it hid: a toilet's seat.
STILL_FALSE = "not corrected by another word"


@dataclass
class DescriptionPairs:
    """What came of the descriptions.

    Args:
        made: descriptions that were looked at; `hallucinated` of them have mistakes.
        dropped: pairs by reason.
        checked: what a judge said, by picture; of the last description it was shown.
        judge: the judge and its tokens, as the card has them.
    """

    pairs: list[MinedPair]
    made: int
    hallucinated: int
    dropped: Counter[str] = field(default_factory=Counter)
    checked: dict[str, JudgedDescription] = field(default_factory=dict)
    judge: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        pairs = len(self.pairs)
        found = pairs + sum(self.dropped.values())
        return {
            "made": self.made,
            "hallucinated": self.hallucinated,
            "found": found,
            "dropped": self.dropped,
            "pairs": pairs,
        }


def describe_images(
    pictures: Sequence[MinedImage], how: MiningSettings, load: Callable[[], LoadedModel], work: Path, rng: random.Random
) -> list[list[str]]:
    """Texts of each picture, asked for by one of HA-DPO's four prompts: a greedy one, then sampled ones."""
    prompts = [rng.choice(DESCRIBE_PROMPTS) for _ in pictures]
    rounds = []
    for number in range(1 + how.samples):
        sampling = (("do_sample", True), ("temperature", how.temperature), ("top_k", 0)) if number else ()
        asking = GenerationSettings(how.template, how.max_new_tokens, how.batch_size, sampling, how.seed + number)
        asked = [(picture.id, (picture.path, prompt)) for picture, prompt in zip(pictures, prompts, strict=True)]
        title = f"descriptions, sampled ({number})" if number else "descriptions, greedy"
        rounds.append(generate_all(work / f"descriptions_{number}.jsonl", load, asked, asking, title))
    return [list(texts) for texts in zip(*rounds, strict=True)]


def find_pairs(
    pictures: Sequence[MinedImage],
    texts: Sequence[Sequence[str]],
    annotated: AnnotatedImages,
    near_texts: float,
    judge: Judge | None,
    rng: random.Random,
) -> DescriptionPairs:
    """Pairs of the first text with a mistake of each picture, without near-duplicates, of one style and length."""
    if annotated.vocabulary is None:
        assert judge is not None, "somebody must find the mistakes"
        found = _by_judge(pictures, texts, judge)
    else:
        found = _by_annotations(pictures, texts, annotated, rng)
    if near_texts:
        repeated = near_duplicates([f"{pair.chosen} {pair.rejected}" for pair in found.pairs], near_texts)
        found.pairs = [pair for place, pair in enumerate(found.pairs) if place not in repeated]
        found.dropped += Counter({"near-duplicate": len(repeated)})
    if judge and annotated.vocabulary:
        styled = match_style(judge, found.pairs, annotated.vocabulary)
        found.pairs = [new or old for new, old in zip(styled.verdicts, found.pairs, strict=True)]
        found.judge.append(styled.to_json())
    found.pairs, dropped = match_lengths(found.pairs)
    found.dropped += dropped
    return found


def _by_annotations(
    pictures: Sequence[MinedImage], texts: Sequence[Sequence[str]], annotated: AnnotatedImages, rng: random.Random
) -> DescriptionPairs:
    vocabulary = annotated.vocabulary
    assert vocabulary is not None
    found = DescriptionPairs([], sum(map(len, texts)), 0)
    for picture, said in zip(pictures, texts, strict=True):
        wrong = [text for text in said if hallucinations(text, picture.objects, vocabulary)]
        found.hallucinated += len(wrong)
        if wrong:
            chosen = correct_description(wrong[0], picture.objects, vocabulary, annotated.neutral, rng)
            if hallucinations(chosen, picture.objects, vocabulary):
                found.dropped[STILL_FALSE] += 1
            else:
                found.pairs.append(MinedPair(picture, chosen, wrong[0]))
    return found


def _by_judge(pictures: Sequence[MinedImage], texts: Sequence[Sequence[str]], judge: Judge) -> DescriptionPairs:
    """A judge sees the sampled descriptions of those pictures alone whose earlier ones have no mistakes."""
    found = DescriptionPairs([], 0, 0)
    pairs: dict[str, MinedPair] = {}
    for said in zip(*texts, strict=True):
        shown = [(p, text) for p, text in zip(pictures, said, strict=True) if p.id not in pairs and text.strip()]
        if not shown:
            continue
        verdicts = check_descriptions(judge, shown, optional=bool(found.checked))
        found.made += len(shown)
        found.judge.append(verdicts.to_json())
        for (picture, text), verdict in zip(shown, verdicts.verdicts, strict=True):
            if verdict is None:
                continue
            found.checked[picture.id] = verdict
            if verdict.corrected != text.strip():
                found.hallucinated += 1
                pairs[picture.id] = MinedPair(picture, verdict.corrected, text.strip())
    found.pairs = [pairs[picture.id] for picture in pictures if picture.id in pairs]
    return found


# ----------------------------------------------------------------------------------------------------
# Yes/no questions where a model errs: about what is there, and what usually comes together with it and is not.

QUESTIONS_FILE = 500  # names that are asked about, the most frequent ones


@dataclass(frozen=True)
class ProbeQuestion:
    """A question about one object on one picture, and whether it is there."""

    picture: MinedImage
    name: str
    there: bool

    @property
    def key(self) -> str:
        return f"{self.picture.id}/{self.name}"

    @property
    def text(self) -> str:
        return question_text(self.name)


def choose_questions(pictures: Sequence[MinedImage], count: int, rng: random.Random) -> list[ProbeQuestion]:
    """`count` questions a picture, half of them at most about present objects.

    Absent objects are asked in proportion to how often they come together with what is there: where models err.
    """
    frequent = Counter(name for picture in pictures for name in sorted(picture.objects)).most_common(QUESTIONS_FILE)
    names = {name for name, _ in frequent}
    together = co_occurrence([picture.objects & names for picture in pictures])
    asked = []
    for picture in pictures:
        present = sorted(picture.objects & names)
        yes = rng.sample(present, min(count // 2, len(present)))
        weights = {n: sum(together[p][n] for p in present) for n in together if n not in picture.objects}
        no = weighted_sample(weights, count - len(yes), rng)
        asked += [ProbeQuestion(picture, name, True) for name in yes] + [
            ProbeQuestion(picture, name, False) for name in no
        ]
    return asked


def choose_judged_questions(
    pictures: Sequence[MinedImage], checked: Mapping[str, JudgedDescription], count: int, rng: random.Random
) -> list[ProbeQuestion]:
    """The same from what a judge says of each picture, about objects that the model named or might have."""
    asked = []
    for picture in pictures:
        if picture.id not in checked:
            continue
        present, absent = checked[picture.id].present, checked[picture.id].absent
        yes = rng.sample(present, min(count // 2, len(present)))
        no = rng.sample(absent, min(count - len(yes), len(absent)))
        asked += [ProbeQuestion(picture, name, True) for name in yes] + [
            ProbeQuestion(picture, name, False) for name in no
        ]
    return asked


def question_records(asked: Sequence[ProbeQuestion], answers: Sequence[str]) -> list[dict[str, Any]]:
    """HA-DPO's records, one a question, also where the model was right.

    Their `origin` is "model" where the rejected answer is the model's own, else "contrast". With wrong answers only,
    the model's belief and the truth would be opposed in all of the data, and what training learns is to turn its
    answers round.
    """
    return [
        {
            "image_id": one.picture.id,
            "question": one.text,
            "chosen": "Yes." if one.there else "No.",
            "reject": "No." if one.there else "Yes.",
            "answer": text,
            "origin": "model" if stated(text) is (not one.there) else "contrast",
            "correct": False,  # HA-DPO's word for a rejected answer that is right, which leaves nothing to learn
        }
        for one, text in zip(asked, answers, strict=True)
    ]


def question_summary(asked: Sequence[Mapping[str, Any]], kept: Sequence[object]) -> dict[str, int]:
    """Counts for the data card."""
    return {"asked": len(asked), "wrong": sum(one["origin"] == "model" for one in asked), "pairs": len(kept)}


def co_occurrence(objects: Sequence[Collection[str]]) -> dict[str, Counter[str]]:
    """How often two names stand on the same image."""
    counts: dict[str, Counter[str]] = {}
    for present in objects:
        for name in present:
            counts.setdefault(name, Counter()).update(other for other in present if other != name)
    return counts


def weighted_sample(weights: Mapping[str, float], count: int, rng: random.Random) -> list[str]:
    """Draw distinct names in proportion to weight + 1, by the largest of u^(1/w) (Efraimidis and Spirakis 2006)."""
    keys = {name: rng.random() ** (1 / (weight + 1)) for name, weight in sorted(weights.items())}
    return sorted(keys, key=lambda name: -keys[name])[:count]


def balance_answers(pairs: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """Drop pairs of the more frequent kind until as many end in yes as in no."""
    kinds = [[r for r in pairs if r["chosen"] == word] for word in ("Yes.", "No.")]
    fewest = min(map(len, kinds))
    kept = {id(record) for kind in kinds for record in rng.sample(kind, fewest)}
    return [record for record in pairs if id(record) in kept]
