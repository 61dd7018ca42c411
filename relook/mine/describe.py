"""Descriptions of pictures, and pairs of those with mistakes, which annotations find or a judge that sees them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relook.data.hadpo import DESCRIBE_PROMPTS
from relook.evaluate.answer import Asking
from relook.evaluate.judge import Judge
from relook.mine import judged
from relook.mine.correct import correct, hallucinations
from relook.mine.grow import ask_all
from relook.mine.judged import Checked
from relook.mine.match import Pair, near_duplicates, same_length
from relook.mine.pictures import Annotated, Picture
from relook.mine.settings import Mining
from relook.model.load import LoadedModel

# A new word can make another object of the words beside it, as "hot" and "dog", or of what it hid: a toilet's seat.
STILL_FALSE = "not corrected by another word"


@dataclass
class Described:
    """What came of the descriptions.

    Args:
        made: descriptions that were looked at; `hallucinated` of them have mistakes.
        dropped: pairs by reason.
        checked: what a judge said, by picture; of the last description it was shown.
        judge: the judge and its tokens, as the card has them.
    """

    pairs: list[Pair]
    made: int
    hallucinated: int
    dropped: Counter[str] = field(default_factory=Counter)
    checked: dict[str, Checked] = field(default_factory=dict)
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


def describe(
    pictures: Sequence[Picture], how: Mining, load: Callable[[], LoadedModel], work: Path, rng: random.Random
) -> list[list[str]]:
    """Texts of each picture, asked for by one of HA-DPO's four prompts: a greedy one, then sampled ones."""
    prompts = [rng.choice(DESCRIBE_PROMPTS) for _ in pictures]
    rounds = []
    for number in range(1 + how.samples):
        sampling = (("do_sample", True), ("temperature", how.temperature), ("top_k", 0)) if number else ()
        asking = Asking(how.template, how.max_new_tokens, how.batch_size, sampling, how.seed + number)
        asked = [(picture.id, (picture.path, prompt)) for picture, prompt in zip(pictures, prompts, strict=True)]
        title = f"descriptions, sampled ({number})" if number else "descriptions, greedy"
        rounds.append(ask_all(work / f"descriptions_{number}.jsonl", load, asked, asking, title))
    return [list(texts) for texts in zip(*rounds, strict=True)]


def find_pairs(
    pictures: Sequence[Picture],
    texts: Sequence[Sequence[str]],
    annotated: Annotated,
    near_texts: float,
    judge: Judge | None,
    rng: random.Random,
) -> Described:
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
        styled = judged.style(judge, found.pairs, annotated.vocabulary)
        found.pairs = [new or old for new, old in zip(styled.verdicts, found.pairs, strict=True)]
        found.judge.append(styled.to_json())
    found.pairs, dropped = same_length(found.pairs)
    found.dropped += dropped
    return found


def _by_annotations(
    pictures: Sequence[Picture], texts: Sequence[Sequence[str]], annotated: Annotated, rng: random.Random
) -> Described:
    vocabulary = annotated.vocabulary
    assert vocabulary is not None
    found = Described([], sum(map(len, texts)), 0)
    for picture, said in zip(pictures, texts, strict=True):
        wrong = [text for text in said if hallucinations(text, picture.objects, vocabulary)]
        found.hallucinated += len(wrong)
        if wrong:
            chosen = correct(wrong[0], picture.objects, vocabulary, annotated.neutral, rng)
            if hallucinations(chosen, picture.objects, vocabulary):
                found.dropped[STILL_FALSE] += 1
            else:
                found.pairs.append(Pair(picture, chosen, wrong[0]))
    return found


def _by_judge(pictures: Sequence[Picture], texts: Sequence[Sequence[str]], judge: Judge) -> Described:
    """A judge sees the sampled descriptions of those pictures alone whose earlier ones have no mistakes."""
    found = Described([], 0, 0)
    pairs: dict[str, Pair] = {}
    for said in zip(*texts, strict=True):
        shown = [(p, text) for p, text in zip(pictures, said, strict=True) if p.id not in pairs and text.strip()]
        if not shown:
            continue
        verdicts = judged.check(judge, shown, optional=bool(found.checked))
        found.made += len(shown)
        found.judge.append(verdicts.to_json())
        for (picture, text), verdict in zip(shown, verdicts.verdicts, strict=True):
            if verdict is None:
                continue
            found.checked[picture.id] = verdict
            if verdict.corrected != text.strip():
                found.hallucinated += 1
                pairs[picture.id] = Pair(picture, verdict.corrected, text.strip())
    found.pairs = [pairs[picture.id] for picture in pictures if picture.id in pairs]
    return found
