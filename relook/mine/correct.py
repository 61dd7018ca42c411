"""What is wrong in a description, and the least change that makes it true: by annotations alone."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence

from relook.evaluate.chair import Mention, Vocabulary, mentions, plural

# Sentences that name no object, for where nothing true is left to say. The one nearest in length is taken.
NEUTRAL = (
    "The colors are bright.",
    "It looks quite calm.",
    "The light is soft.",
    "Everything is in place.",
    "It all looks calm and well arranged.",
    "Nothing about it seems out of the ordinary.",
    "The overall mood is quiet and nothing seems hurried.",
    "All of it comes together in a way that feels natural and calm.",
    "Taken as a whole, it gives a calm impression, and nothing about it seems out of the ordinary.",
    "Taken as a whole, it gives a calm and quiet impression, as if all of it had been left just as it was found.",
)
SENTENCE_END = re.compile(r"(?<=[.!?])(\s+)")


def sentences_apart(text: str) -> list[str]:
    """Sentences at even places, and the white space between them at odd ones."""
    return SENTENCE_END.split(text.strip())


def hallucinations(text: str, truth: Collection[str], vocabulary: Vocabulary) -> list[str]:
    """Objects that a text names and the image does not have, in order of mention."""
    return [mention.object for mention in mentions(text, vocabulary) if mention.object not in truth]


def correct(
    text: str, truth: Collection[str], vocabulary: Vocabulary, neutral: Sequence[str], rng: random.Random
) -> str:
    """The least change that makes a description true, at the same number of sentences.

    A hallucinated object is exchanged for one that is there and was not named ("a dog ... the dog" for one and the
    same); where none is left, its sentence is exchanged for a neutral one. All else stays as it is, also line breaks
    and a last sentence that was cut off.
    """
    said = {mention.object for mention in mentions(text, vocabulary)}
    missing = sorted(set(truth) - said)
    rng.shuffle(missing)
    others: dict[str, str] = {}

    def other(mention: Mention, before: str) -> str | None:
        """What is said in a mention's place; None where nothing is left to say."""
        if mention.object not in others or article_of(before):
            if not missing:
                return None
            others[mention.object] = missing.pop()
        return others[mention.object]

    parts = sentences_apart(text)
    for place in range(0, len(parts), 2):
        sentence = parts[place]
        wrong = [mention for mention in mentions(sentence, vocabulary) if mention.object not in truth]
        names = [other(mention, sentence[: mention.start]) for mention in wrong]
        if None in names:
            line = rng.choice(_as_long(sentence, [line for line in neutral if line not in parts] or neutral))
            parts[place] = line if sentence.endswith(".") else line.rstrip(".")
        else:
            for mention, name in zip(reversed(wrong), reversed(names), strict=True):
                sentence = exchange(sentence, mention, str(name), vocabulary)
            parts[place] = sentence
    return "".join(parts)


def article_of(before: str) -> str:
    """The word before a noun where it is "a" or "an", which introduces something; else nothing."""
    words = before.split()
    return words[-1] if words and words[-1].lower() in ("a", "an") else ""


def _as_long(sentence: str, lines: Sequence[str]) -> list[str]:
    """Those of the lines that are nearest in length."""
    apart = [abs(len(line.split()) - len(sentence.split())) for line in lines]
    return [line for line, distance in zip(lines, apart, strict=True) if distance == min(apart)]


def exchange(sentence: str, mention: Mention, name: str, vocabulary: Vocabulary) -> str:
    """Put another noun in a mention's place: in the plural where that is one, with the article that goes with it."""
    before, after = sentence[: mention.start], sentence[mention.end :]
    if article := article_of(before):
        kind = "an" if name[0] in "aeiou" else "a"
        before = before.rstrip().removesuffix(article) + (kind.capitalize() if article[0].isupper() else kind) + " "
        return before + name + after
    word = sentence[mention.start : mention.end]
    if " ".join(word.lower().split()) in vocabulary.plurals:
        name = plural(name)
    return before + (name.capitalize() if word[0].isupper() else name) + after
