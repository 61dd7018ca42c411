"""Describe pictures, and pair the descriptions that annotations, or a judge that sees the pictures, find wrong."""

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
from relook.generate.answering import Answerer, GenerationSettings
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
    worsen_description,
)
from relook.mine.pictures import AnnotatedImages, MinedImage

# ----------------------------------------------------------------------------------------------------

# A new word can make another object of the words beside it, as "hot" and "dog", or of what it hid: a toilet's seat.
STILL_FALSE = "not corrected by another word"


@dataclass
class DescriptionPairs:
    """Hold the pairs made from descriptions, and the counts for the data card.

    Args:
        checked: how many descriptions were checked; `hallucinated` of them have mistakes.
        dropped: how many pairs were dropped, by reason.
        verdicts: the judge's verdict on the last description it was shown, by picture id.
        judge: the judge and its tokens, as the card has them.
        corrections: what false sentences became (`Correction`), and how many true texts were made worse ("worsened").
        cost: of pairs by sentence: images, tokens and checks.
    """

    pairs: list[MinedPair]
    checked: int
    hallucinated: int
    dropped: Counter[str] = field(default_factory=Counter)
    verdicts: dict[str, JudgedDescription] = field(default_factory=dict)
    judge: list[dict[str, Any]] = field(default_factory=list)
    corrections: Counter[str] = field(default_factory=Counter)
    cost: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "made": self.checked,
            "hallucinated": self.hallucinated,
            "found": len(self.pairs) + sum(self.dropped.values()),
            "dropped": self.dropped,
            "pairs": len(self.pairs),
            **({"corrections": self.corrections} if self.corrections else {}),
            **({"cost": self.cost} if self.cost else {}),
        }


def describe_images(
    pictures: Sequence[MinedImage],
    settings: MiningSettings,
    load: Callable[[], Answerer],
    work: Path,
    rng: random.Random,
) -> list[list[str]]:
    """Ask for descriptions of each picture by one of HA-DPO's four prompts: a greedy one, then sampled ones."""
    prompts = [rng.choice(DESCRIBE_PROMPTS) for _ in pictures]
    rounds = []
    for number in range(1 + settings.samples):
        # Temperature alone shapes the samples; transformers would cut at top_k 50. Each round has a seed of its own.
        sampling = (("do_sample", True), ("temperature", settings.temperature), ("top_k", 0)) if number else ()
        generation = GenerationSettings(
            settings.template, settings.max_new_tokens, settings.batch_size, sampling, settings.seed + number
        )
        questions = [(picture.id, (picture.path, prompt)) for picture, prompt in zip(pictures, prompts, strict=True)]
        title = f"descriptions, sampled ({number})" if number else "descriptions, greedy"
        rounds.append(generate_all(work / f"descriptions_{number}.jsonl", load, questions, generation, title))
    return [list(texts) for texts in zip(*rounds, strict=True)]


def find_pairs(
    pictures: Sequence[MinedImage],
    texts: Sequence[Sequence[str]],
    annotated: AnnotatedImages,
    near_texts: float,
    judge: Judge | None,
    rng: random.Random,
    contrast: bool = False,
) -> DescriptionPairs:
    """Pair each picture's first text with a mistake, and drop near-duplicates and pairs that differ in length.

    With `contrast` a picture without a mistake in its texts has a pair, too: the first text and a worse one.
    """
    if annotated.vocabulary is None:
        assert judge is not None, "without annotations a judge must find the mistakes"
        result = _by_judge(pictures, texts, judge)
    else:
        result = _by_annotations(pictures, texts, annotated, rng, contrast)
    drop_near_duplicates(result, near_texts)
    if judge and annotated.vocabulary:
        styled = match_style(judge, result.pairs, annotated.vocabulary)
        # A pair that the judge could not rewrite as asked stays as it is.
        result.pairs = [new or old for new, old in zip(styled.verdicts, result.pairs, strict=True)]
        result.judge.append(styled.to_json())
    # Lengths last: all before changes texts, or which pairs there are.
    result.pairs, dropped = match_lengths(result.pairs)
    result.dropped += dropped
    return result


def drop_near_duplicates(result: DescriptionPairs, near_texts: float) -> None:
    """Drop pairs whose texts have at least that similarity with an earlier pair's; 0 keeps all."""
    if near_texts:
        repeated = near_duplicates([f"{pair.chosen} {pair.rejected}" for pair in result.pairs], near_texts)
        result.pairs = [pair for index, pair in enumerate(result.pairs) if index not in repeated]
        result.dropped += Counter({"near-duplicate": len(repeated)})


def limit_pairs(result: DescriptionPairs, max_pairs: int) -> None:
    """Drop pairs from all over the list until there are `max_pairs` at most; 0 keeps all."""
    if max_pairs and len(result.pairs) > max_pairs:
        result.dropped["more than wanted"] += len(result.pairs) - max_pairs
        result.pairs = [result.pairs[i * len(result.pairs) // max_pairs] for i in range(max_pairs)]


def _by_annotations(
    pictures: Sequence[MinedImage],
    texts: Sequence[Sequence[str]],
    annotated: AnnotatedImages,
    rng: random.Random,
    contrast: bool,
) -> DescriptionPairs:
    vocabulary = annotated.vocabulary
    assert vocabulary is not None
    result = DescriptionPairs([], sum(map(len, texts)), 0)
    together = co_occurrence([picture.objects for picture in pictures]) if contrast else {}
    for picture, descriptions in zip(pictures, texts, strict=True):
        wrong = [text for text in descriptions if hallucinations(text, picture.objects, vocabulary)]
        result.hallucinated += len(wrong)
        if wrong:
            correction = correct_description(wrong[0], picture.objects, vocabulary, annotated.neutral, rng)
            if hallucinations(correction.text, picture.objects, vocabulary):
                result.dropped[STILL_FALSE] += 1
                continue
            result.pairs.append(MinedPair(picture, correction.text, wrong[0]))
            kinds = ("exchanged", "taken_out", "neutral")
            result.corrections.update({kind: getattr(correction, kind) for kind in kinds})
        elif contrast:
            # From mistakes alone a model learns to name less: where it named what is there, nothing would say so.
            tempting = weighted_sample(temptation(picture.objects, together), len(together), rng)
            worse = worsen_description(descriptions[0], picture.objects, tempting, vocabulary, rng)
            if hallucinations(worse, picture.objects, vocabulary):
                result.pairs.append(MinedPair(picture, descriptions[0], worse))
                result.corrections["worsened"] += 1
    return result


def _by_judge(pictures: Sequence[MinedImage], texts: Sequence[Sequence[str]], judge: Judge) -> DescriptionPairs:
    # A picture needs one wrong description: the judge sees a sampled one only where the earlier ones had no mistake.
    result = DescriptionPairs([], 0, 0)
    pairs: dict[str, MinedPair] = {}
    for descriptions in zip(*texts, strict=True):
        shown = [
            (p, text) for p, text in zip(pictures, descriptions, strict=True) if p.id not in pairs and text.strip()
        ]
        if not shown:
            continue
        checked = check_descriptions(judge, shown, optional=bool(result.verdicts))
        result.checked += len(shown)
        result.judge.append(checked.to_json())
        for (picture, text), verdict in zip(shown, checked.verdicts, strict=True):
            if verdict is None:
                continue
            result.verdicts[picture.id] = verdict
            if verdict.corrected != text.strip():
                result.hallucinated += 1
                pairs[picture.id] = MinedPair(picture, verdict.corrected, text.strip())
    result.pairs = [pairs[picture.id] for picture in pictures if picture.id in pairs]
    return result


# ----------------------------------------------------------------------------------------------------
# Yes/no questions where a model errs: about present objects, and absent ones that usually come together with them.

MAX_NAMES = 500  # names that are asked about, the most frequent ones


@dataclass(frozen=True)
class ProbeQuestion:
    """Ask about one object on one picture; `present` is the truth."""

    picture: MinedImage
    name: str
    present: bool

    @property
    def key(self) -> str:
        return f"{self.picture.id}/{self.name}"

    @property
    def text(self) -> str:
        return question_text(self.name)


def choose_questions(pictures: Sequence[MinedImage], count: int, rng: random.Random) -> list[ProbeQuestion]:
    """Choose `count` questions a picture, at most half of them about present objects.

    Absent objects are drawn in proportion to how often they come together with the present ones: where models err.
    """
    frequent = Counter(name for picture in pictures for name in sorted(picture.objects)).most_common(MAX_NAMES)
    names = {name for name, _ in frequent}
    together = co_occurrence([picture.objects & names for picture in pictures])
    questions = []
    for picture in pictures:
        present = sorted(picture.objects & names)
        yes = rng.sample(present, min(count // 2, len(present)))
        no = weighted_sample(temptation(picture.objects, together), count - len(yes), rng)
        questions += [ProbeQuestion(picture, name, True) for name in yes] + [
            ProbeQuestion(picture, name, False) for name in no
        ]
    return questions


def choose_judged_questions(
    pictures: Sequence[MinedImage], verdicts: Mapping[str, JudgedDescription], count: int, rng: random.Random
) -> list[ProbeQuestion]:
    """Choose questions from a judge's verdicts, about objects that the model named or might have named."""
    questions = []
    for picture in pictures:
        if picture.id not in verdicts:
            continue
        present, absent = verdicts[picture.id].present, verdicts[picture.id].absent
        yes = rng.sample(present, min(count // 2, len(present)))
        no = rng.sample(absent, min(count - len(yes), len(absent)))
        questions += [ProbeQuestion(picture, name, True) for name in yes] + [
            ProbeQuestion(picture, name, False) for name in no
        ]
    return questions


def question_records(questions: Sequence[ProbeQuestion], answers: Sequence[str]) -> list[dict[str, Any]]:
    """Return HA-DPO's records, one a question, also where the model was right.

    Their `origin` is "model" where the rejected answer is the model's own, else "contrast".
    """
    # With wrong answers alone, belief and truth would be opposed in all of the data, and the model would learn to
    # reverse its answers.
    return [
        {
            "image_id": question.picture.id,
            "question": question.text,
            "chosen": "Yes." if question.present else "No.",
            "reject": "No." if question.present else "Yes.",
            "answer": text,
            "origin": "model" if stated(text) is (not question.present) else "contrast",
            "correct": False,  # HA-DPO's word for a rejected answer that is right, which leaves nothing to learn
        }
        for question, text in zip(questions, answers, strict=True)
    ]


def question_summary(records: Sequence[Mapping[str, Any]], selected: Sequence[object]) -> dict[str, int]:
    """Count questions and pairs for the data card."""
    return {
        "asked": len(records),
        "wrong": sum(record["origin"] == "model" for record in records),
        "unreadable": sum(stated(record["answer"]) is None for record in records),
        "pairs": len(selected),
    }


def co_occurrence(objects: Sequence[Collection[str]]) -> dict[str, Counter[str]]:
    """Count for each name how often each other name occurs on the same image."""
    counts: dict[str, Counter[str]] = {}
    for present in objects:
        for name in present:
            counts.setdefault(name, Counter()).update(other for other in present if other != name)
    return counts


def temptation(present: Collection[str], together: Mapping[str, Counter[str]]) -> dict[str, int]:
    """Compute for each absent object on how many pictures it stands beside each of the present ones, summed."""
    beside = [together[name] for name in sorted(present) if name in together]
    return {name: sum(row[name] for row in beside) for name in together if name not in present}


def weighted_sample(weights: Mapping[str, float], count: int, rng: random.Random) -> list[str]:
    """Draw distinct names in proportion to weight + 1, by the largest of u^(1/w) (Efraimidis and Spirakis 2006)."""
    # Sorted, so that each name gets the same random number every time.
    keys = {name: rng.random() ** (1 / (weight + 1)) for name, weight in sorted(weights.items())}
    return sorted(keys, key=lambda name: -keys[name])[:count]


def balance_answers(pairs: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """Drop pairs of the more frequent kind until as many end in yes as in no."""
    kinds = [[r for r in pairs if r["chosen"] == word] for word in ("Yes.", "No.")]
    fewest = min(map(len, kinds))
    # By identity, because two records may be equal.
    selected = {id(record) for kind in kinds for record in rng.sample(kind, fewest)}
    return [record for record in pairs if id(record) in selected]
