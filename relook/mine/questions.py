"""Yes/no questions where a model errs: about what is there, and what usually comes together with it and is not."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from relook.evaluate.pope import question_text, stated
from relook.mine.judged import Checked
from relook.mine.pictures import Picture

ASKED = 500  # names that are asked about, the most frequent ones


@dataclass(frozen=True)
class Asked:
    """A question about one object on one picture, and whether it is there."""

    picture: Picture
    name: str
    there: bool

    @property
    def key(self) -> str:
        return f"{self.picture.id}/{self.name}"

    @property
    def text(self) -> str:
        return question_text(self.name)


def choose(pictures: Sequence[Picture], count: int, rng: random.Random) -> list[Asked]:
    """`count` questions a picture, half of them at most about present objects.

    Absent objects are asked in proportion to how often they come together with what is there: where models err.
    """
    frequent = Counter(name for picture in pictures for name in sorted(picture.objects)).most_common(ASKED)
    names = {name for name, _ in frequent}
    together = co_occurrence([picture.objects & names for picture in pictures])
    asked = []
    for picture in pictures:
        present = sorted(picture.objects & names)
        yes = rng.sample(present, min(count // 2, len(present)))
        weights = {n: sum(together[p][n] for p in present) for n in together if n not in picture.objects}
        no = weighted_sample(weights, count - len(yes), rng)
        asked += [Asked(picture, name, True) for name in yes] + [Asked(picture, name, False) for name in no]
    return asked


def choose_checked(
    pictures: Sequence[Picture], checked: Mapping[str, Checked], count: int, rng: random.Random
) -> list[Asked]:
    """The same from what a judge says of each picture, about objects that the model named or might have."""
    asked = []
    for picture in pictures:
        if picture.id not in checked:
            continue
        present, absent = checked[picture.id].present, checked[picture.id].absent
        yes = rng.sample(present, min(count // 2, len(present)))
        no = rng.sample(absent, min(count - len(yes), len(absent)))
        asked += [Asked(picture, name, True) for name in yes] + [Asked(picture, name, False) for name in no]
    return asked


def records(asked: Sequence[Asked], answers: Sequence[str]) -> list[dict[str, Any]]:
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


def summary(asked: Sequence[Mapping[str, Any]], kept: Sequence[object]) -> dict[str, int]:
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


def balance(pairs: list[dict[str, Any]], rng: random.Random) -> list[dict[str, Any]]:
    """Drop pairs of the more frequent kind until as many end in yes as in no."""
    kinds = [[r for r in pairs if r["chosen"] == word] for word in ("Yes.", "No.")]
    fewest = min(map(len, kinds))
    kept = {id(record) for kind in kinds for record in rng.sample(kind, fewest)}
    return [record for record in pairs if id(record) in kept]
