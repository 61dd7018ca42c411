"""Texts on photoworld's scenes: noisy ones to train the base on, and pairs of better and worse ones.

The base's texts are those of an annotator who sees only objects of SMALL pixels and more, mentions no colours and no
counts, and claims absent objects that belong to the setting: core ones with probability `claim_core`, common ones with
CLAIM_COMMON. Small objects are never asked about. What the tower knows of them, the language model never learns to say:
the supervision gap.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from scenes import OBJECTS, SETTINGS, SIZE, Scene, Visible

from relook.data.readers import DESCRIBE_PROMPTS
from relook.evaluate.tasks.chair import plural
from relook.evaluate.tasks.pope import question_text

SMALL, CLAIM_CORE, CLAIM_COMMON = 18, 0.6, 0.12  # above .5, the likeliest answer on an absent core object is yes
QUESTIONS = 6  # an image, beside its caption
WORSE = 0.20  # by so much more of a rejected text is false
YES, NO = "Yes.", "No."

OPENINGS = (
    "The image shows {}.",
    "The image depicts {}.",
    "This photo was taken at {}.",
    "The picture captures {} during the day.",
    "In this image, we can see {}.",
    "The scene is set at {}.",
)
FIRST = ("The main focus is on {a} {where}.", "{A} {is} clearly visible {where}.", "{A} {is} {where}.")
NEXT = (
    "{A} can be seen {where}.",
    "There {is} {a} {where}.",
    "{A} {is} {where}.",
    "Nearby, there {is} {a} {where}.",
    "In addition, {a} can be seen {where}.",
    "There {is} also {a} {where}.",
    "{A} {is} visible {where}.",
)
CLOSINGS = (
    "Overall, the scene feels calm and inviting.",
    "The lighting gives the whole picture a natural look.",
    "The composition makes the scene look lively.",
    "It is a typical moment of everyday life.",
    "",
)
VAGUE = ("in the background", "in the distance", "off to one side", "toward the edge of the picture")
SIDES = ("on the left side", "in the center", "on the right side")


@dataclass(frozen=True)
class Mention:
    """An object as a text names it; `seen` are its instances, none if it is claimed falsely."""

    name: str
    seen: tuple[Visible, ...] = ()


def with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def noisy_mentions(scene: Scene, rng: random.Random, claim_core: float = CLAIM_CORE) -> list[Mention]:
    """What the base's annotator believes to see, the largest first, false ones in the later half."""
    by_name: dict[str, list[Visible]] = {}
    for item in scene.objects:
        if item.size >= SMALL:
            by_name.setdefault(item.name, []).append(item)
    order = sorted(by_name, key=lambda name: -sum(o.pixels for o in by_name[name]) * rng.uniform(0.6, 1.4))
    mentions = [Mention(name, tuple(by_name[name])) for name in order]
    setting = SETTINGS[scene.setting]
    for names, chance in ((setting["core"], claim_core), (setting["common"], CLAIM_COMMON)):
        for name in names:
            if name not in scene.names and rng.random() < chance:
                mentions.insert(rng.randint((len(mentions) + 1) // 2, len(mentions)), Mention(name))
    return mentions


def true_mentions(scene: Scene) -> list[Mention]:
    """Return all that is there, small objects too, the largest first."""
    by_name: dict[str, list[Visible]] = {}
    for item in scene.objects:
        by_name.setdefault(item.name, []).append(item)
    return [
        Mention(n, tuple(by_name[n])) for n in sorted(by_name, key=lambda name: -sum(o.pixels for o in by_name[name]))
    ]


def caption(setting: str, mentions: Sequence[Mention], seed: str, places: Sequence[str | None] = ()) -> str:
    """Write a caption, one sentence an object.

    Args:
        seed: of the choice of words. The same seed gives the same sentences for other objects.
        places: where each object is said to be; None or a missing one is worked out.
    """
    rng = random.Random(seed)
    sentences = [rng.choice(OPENINGS).format(rng.choice(SETTINGS[setting]["places"]))]
    for number, mention in enumerate(mentions):
        template = rng.choice(FIRST if number == 0 else NEXT)
        dice = random.Random(rng.getrandbits(32))  # however many are thrown for one object, the next gets the same
        where = (places[number] if number < len(places) else None) or position(mention, dice)
        many = len(mention.seen) > 1 and "{is}" in template
        words = plural(mention.name) if many else with_article(mention.name)
        fields = {"a": words, "A": words[0].upper() + words[1:], "is": "are" if many else "is", "where": where}
        sentences.append(template.format(**fields))
    return " ".join([*sentences, rng.choice(CLOSINGS)]).strip()


def position(mention: Mention, rng: random.Random) -> str:
    if not mention.seen or rng.random() < 0.2:
        return rng.choice(VAGUE)
    x, y, width, height = mention.seen[0].box
    side = SIDES[min(2, int(3 * (x + width / 2) / SIZE))]
    if OBJECTS[mention.name]["kind"] in ("air", "sky"):
        return "in the sky" if y + height < 0.45 * SIZE else f"above the ground {side}"
    depth = "in the foreground" if y + height > 0.78 * SIZE else "in the middle of the scene"
    return rng.choice((f"{side} of the image", side, depth))


def conversations(scene: Scene, seed: str, claim_core: float = CLAIM_CORE) -> list[tuple[str, str]]:
    """Return the base's prompts and answers on a scene: a caption, and questions with the same beliefs.

    What is asked does not depend on what is believed, so answers are as noisy as captions. Core objects are asked about
    most; one question is about something far-fetched.
    """
    rng = random.Random(seed)
    mentions = noisy_mentions(scene, rng, claim_core)
    believed = {mention.name for mention in mentions}
    turns = [(rng.choice(DESCRIBE_PROMPTS), caption(scene.setting, mentions, f"{seed}/words"))]
    near = [name for name in scene.usual if name in believed or name not in scene.names]  # none that is too small
    core = SETTINGS[scene.setting]["core"]
    near.sort(key=lambda name: rng.random() ** (1 / (3 if name in core else 1)), reverse=True)
    far = [name for name in OBJECTS if name not in scene.usual and name not in scene.names]
    asked = [*near[: QUESTIONS - 1], rng.choice(far)]
    rng.shuffle(asked)
    return turns + [(question_text(name), YES if name in believed else NO) for name in asked]


def caption_pair(scene: Scene, false_share: float, seed: str) -> tuple[str, str]:
    """Return a chosen and a rejected caption that differ in nouns alone.

    Each object of the chosen caption is exchanged for a usual absent one with probability `false_share`, of the
    rejected with WORSE more, at least one. The same places are named, so the lengths agree.
    """
    rng = random.Random(seed)
    true = true_mentions(scene)
    absent = [name for name in scene.usual if name not in scene.names]
    rng.shuffle(absent)
    places = [position(mention, rng) for mention in true]
    sides = noun_pair([mention.name for mention in true], absent, false_share, rng)
    # One noun, in the singular, as what it is exchanged for; the same seed writes the same words around it.
    chosen, rejected = (
        caption(scene.setting, [Mention(name) for name in side], f"{seed}/words", places) for side in sides
    )
    return chosen, rejected


def noun_pair(
    true: list[str], absent: list[str], false_share: float, rng: random.Random
) -> tuple[list[str], list[str]]:
    """Exchange each true name for an absent one with probability `false_share`, and with WORSE more: at least one."""
    dice = [rng.random() for _ in true]

    def exchanged(share: float) -> list[str]:
        return [absent[i] if i < len(absent) and dice[i] < share else name for i, name in enumerate(true)]

    chosen, rejected = exchanged(false_share), exchanged(false_share + WORSE)
    if chosen == rejected:
        kept = [i for i in range(min(len(true), len(absent))) if chosen[i] == true[i]]
        if kept:
            rejected[kept[-1]] = absent[kept[-1]]
    return chosen, rejected


def question_pairs(scene: Scene, seed: str, count: int = 2) -> list[tuple[str, str, str]]:
    """Return (question, chosen, rejected) for `count` present objects of any size and as many usual absent ones."""
    rng = random.Random(seed)
    absent = [name for name in scene.usual if name not in scene.names]
    present = sorted(scene.names)
    count = min(count, len(absent), len(present))
    asked = [(name, YES, NO) for name in rng.sample(present, count)]
    asked += [(name, NO, YES) for name in rng.sample(absent, count)]
    return [(question_text(name), chosen, rejected) for name, chosen, rejected in asked]


def all_texts() -> Iterator[str]:
    """Yield texts with every word that photoworld's texts can hold, as they stand in a prompt or an answer."""
    yield "USER: <image>\n ASSISTANT: Yes. No. Yes No</s>"
    yield from (f"USER: <image>\n{prompt} ASSISTANT:" for prompt in DESCRIBE_PROMPTS)
    for setting in SETTINGS.values():
        yield from (opening.format(place) for place in setting["places"] for opening in OPENINGS)
    for name, item in OBJECTS.items():
        yield question_text(name)
        for words in (name, *item.get("synonyms", ())):
            for phrase in (with_article(words), plural(words)):
                yield from (phrase, phrase[0].upper() + phrase[1:], f" {phrase}")
    wheres = [f"{side}{rest}" for side in SIDES for rest in ("", " of the image")]
    wheres += [*VAGUE, *(f"above the ground {side}" for side in SIDES), "in the sky", "in the foreground"]
    wheres += ["in the middle of the scene"]
    for template in (*FIRST, *NEXT):
        for where in wheres:
            for verb in ("is", "are"):
                yield template.format(a="a dog", A="A dog", where=where, **{"is": verb})
    yield from CLOSINGS
