"""Toyworld's texts: exact and noisy descriptions, questions and answers.

Each object takes one sentence, and sentences without an object are as long ("There is a cup." and "It looks quite
calm." are five tokens), so a sentence can be exchanged for another without changing a text's length.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from relook.data.hadpo import DESCRIBE_PROMPTS
from relook.evaluate.pope import question_text
from relook.toyworld.world import OBJECTS, SETTINGS, Scene

FILLERS = ("The colors are bright.", "It looks quite calm.", "The light is soft.", "Everything is in place.")
SYNONYMS = {"bicycle": ["bike"], "boat": ["ship"], "cup": ["mug"], "dog": ["puppy"], "flower": ["blossom"]}
QUESTIONS = 8


def article(name: str) -> str:
    return "an" if name[0] in "aeiou" else "a"


def opening(setting: str) -> str:
    return f"The picture shows a {setting}."


def mention(name: str) -> str:
    return f"There is {article(name)} {name}."


def describe(names: Sequence[str], setting: str, fillers: int = 0, rng: random.Random | None = None) -> str:
    """A description that names these objects, in this order, with some neutral sentences strewn in."""
    sentences = [mention(name) for name in names]
    if fillers and rng is not None:
        for filler in rng.sample(FILLERS, fillers):
            sentences.insert(rng.randint(0, len(sentences)), filler)
    return " ".join([opening(setting), *sentences])


@dataclass(frozen=True)
class Annotator:
    """Who writes the texts: probabilities of claiming an absent usual object, and of missing a present one.

    The defaults are as careless as GPT-written conversations; zeros give the truth.
    """

    claim_core: float = 0.5
    claim_common: float = 0.2
    miss: float = 0.1

    def believe(self, scene: Scene, rng: random.Random) -> list[str]:
        """The objects this annotator takes to be in the scene, in random order."""
        setting = SETTINGS[scene.setting]
        claims = {**dict.fromkeys(setting.core, self.claim_core), **dict.fromkeys(setting.common, self.claim_common)}
        believed = [
            name for name in OBJECTS if rng.random() < (1 - self.miss if name in scene.names else claims.get(name, 0.0))
        ]
        rng.shuffle(believed)
        return believed


EXACT = Annotator(0.0, 0.0, 0.0)


def sft_samples(scene: Scene, annotator: Annotator, rng: random.Random) -> list[tuple[str, str]]:
    """(prompt, response) samples for supervised tuning: one description and some yes/no questions."""
    text = describe(annotator.believe(scene, rng), scene.setting, rng.randint(0, 2), rng)
    samples = [(rng.choice(DESCRIBE_PROMPTS), text)]
    believed = annotator.believe(scene, rng)
    samples += [(question_text(n), "Yes." if n in believed else "No.") for n in ask_about(scene, QUESTIONS, rng)]
    return samples


def ask_about(scene: Scene, count: int, rng: random.Random) -> list[str]:
    """Objects to ask about: up to half of them present, of the absent ones two thirds usual in the setting."""
    setting = SETTINGS[scene.setting]
    present = rng.sample(sorted(scene.names), min(count // 2, len(scene.names)))
    usual = [n for n in (*setting.core, *setting.common) if n not in scene.names]
    rare = [n for n in OBJECTS if n not in scene.names and n not in usual]
    absent = count - len(present)
    tempting = rng.sample(usual, min(len(usual), round(absent * 2 / 3)))
    names = [*present, *tempting, *rng.sample(rare, absent - len(tempting))]
    rng.shuffle(names)
    return names


def words(text: str) -> list[str]:
    """A text's tokens: words, and each punctuation mark by itself."""
    return re.findall(r"\w+|[^\w\s]", text)


def vocabulary() -> list[str]:
    """Every word that toyworld's prompts and responses can hold."""
    texts = ["USER: ASSISTANT: Yes, No. and image picture", *DESCRIBE_PROMPTS, *FILLERS, *map(question_text, OBJECTS)]
    texts += [opening(setting) for setting in SETTINGS] + [mention(name) for name in OBJECTS]
    texts += [word for synonyms in SYNONYMS.values() for word in synonyms]
    return sorted({word for text in texts for word in words(text)})
