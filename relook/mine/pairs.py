"""Chosen and rejected are alike but for what is wrong: of one length, and no text said twice over."""

from __future__ import annotations

import math
import random
import re
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from relook.evaluate.judge import Judge, Judged, Task, fill
from relook.evaluate.statistics import ratio
from relook.evaluate.tasks.chair import Mention, Vocabulary, mentions, plural
from relook.mine.pictures import Picture

# ----------------------------------------------------------------------------------------------------

MOST_APART = 0.25  # of the longer text's words: a pair whose lengths differ more is dropped
MEANS_APART = 0.05  # of the rejected texts' mean length
SHINGLE = 5  # words


@dataclass(frozen=True)
class Pair:
    """Two descriptions of a picture; `rejected` is the model's own, or the judge's in the same style as `chosen`."""

    picture: Picture
    chosen: str
    rejected: str

    @property
    def longer(self) -> int:
        """Words that `chosen` has more than `rejected`."""
        return length(self.chosen) - length(self.rejected)


def length(text: str) -> int:
    """Words between white space."""
    return len(text.split())


def same_length(pairs: Sequence[Pair]) -> tuple[list[Pair], Counter[str]]:
    """The pairs that training cannot tell by length, in order, and how many were dropped by reason.

    Pairs whose own lengths differ much go first, then those that pull the means of both sides apart, the worst first.
    """
    close = [p for p in pairs if abs(p.longer) <= MOST_APART * max(length(p.chosen), length(p.rejected))]
    total, rejected = sum(p.longer for p in close), sum(length(p.rejected) for p in close)
    left = deque(sorted(range(len(close)), key=lambda i: close[i].longer))
    while abs(total) > MEANS_APART * rejected:
        worst = close[left.pop() if total > 0 else left.popleft()]
        total, rejected = total - worst.longer, rejected - length(worst.rejected)
    kept = [close[i] for i in sorted(left)]
    return kept, +Counter(
        {"lengths differ": len(pairs) - len(close), "mean lengths would differ": len(close) - len(kept)}
    )


def lengths(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Length statistics of (chosen, rejected) texts, for the data card."""
    chosen, rejected = ([length(pair[side]) for pair in pairs] for side in (0, 1))
    apart = [c - r for c, r in zip(chosen, rejected, strict=True)]
    means = [round(ratio(sum(side), len(pairs)), 2) for side in (chosen, rejected)]
    characters = [round(ratio(sum(len(pair[side]) for pair in pairs), len(pairs)), 1) for side in (0, 1)]
    return {
        "chosen_words": means[0],
        "rejected_words": means[1],
        "means_differ": round(ratio(abs(sum(apart)), sum(rejected)), 4),
        "chosen_longer": sum(a > 0 for a in apart),
        "chosen_shorter": sum(a < 0 for a in apart),
        "same_length": sum(a == 0 for a in apart),
        "chosen_characters": characters[0],
        "rejected_characters": characters[1],
    }


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """A text's runs of `SHINGLE` words, without case and punctuation; of a shorter one all its words."""
    words = re.findall(r"\w+", text.lower())
    return frozenset(tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))


def near_duplicates(texts: Sequence[str], similarity: float) -> set[int]:
    """Places of texts whose shingles have a Jaccard similarity of at least `similarity` with those of an earlier one.

    Exact. Sets that are so similar share one of their few rarest members (prefix filter; Chaudhuri et al. 2006), so
    only texts that share one are compared.
    """
    found = [shingles(text) for text in texts]
    counts = Counter(shingle for one in found for shingle in one)
    by_rare: dict[tuple[str, ...], list[int]] = {}
    repeated = set()
    for place, one in enumerate(found):
        rare = sorted(one, key=lambda shingle: (counts[shingle], shingle))
        rare = rare[: len(one) - math.ceil(similarity * len(one) - 1e-9) + 1]
        earlier = {other for shingle in rare for other in by_rare.get(shingle, ())}
        if any(len(one & found[other]) >= similarity * len(one | found[other]) for other in earlier):
            repeated.add(place)
        else:
            for shingle in rare:
                by_rare.setdefault(shingle, []).append(place)
    return repeated


# ----------------------------------------------------------------------------------------------------
# What is wrong in a description, and the least change that makes it true: by annotations alone.

# Sentences that name no object, for where nothing true is left to say. The one nearest in length is taken.
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


# ----------------------------------------------------------------------------------------------------
# What a judge does for mining: find and correct mistakes on a picture it sees, and give two texts one style.
#
# A reply is untrusted text: it counts as a whole, read strictly, or not at all.

REQUEST = {"temperature": 0.0, "max_tokens": 1500}
NAMES = 20  # objects that a reply may list of each kind
LONGER, MORE = 1.5, 4  # what a judge writes has at most that many times the words of the old text, and that many more
CHECK = """You see an image, and numbered sentences that describe it. Check each sentence against the image:
- right: what it says is there;
- wrong: it names something that is not there, or says something of it that is not so. Write the sentence again with the
  least change that makes it true: one sentence, the same style, about as many words;
- cannot judge: it is about mood or style, or cannot be told from the image.
Then list objects in one or two words each, lower case, singular, separated by commas: those that the sentences name and
that are in the image, and those that are not in it, but are named or would be expected there.

Sentences:
{}
Answer in this form and nothing else:
1. right
2. wrong: the corrected sentence
3. cannot judge
In the image: object, object
Not in the image: object, object
"""
STYLE = """Here are two descriptions of one image, A and B. They agree but for some statements, and both must be kept as
they are in what they state, right or wrong: do not correct anything, add nothing, leave out nothing.
Write both again so that they have one style: the same tone, the same order, as many sentences, and each {} words long.
Wherever they state the same, say it in the same words.

A: {}
B: {}
Answer in this form and nothing else, each description in one line:
A: the first description
B: the second description
"""
_LINE = re.compile(r"(\d{1,4})[.)]\s*(right|wrong|cannot judge)\b\s*[:.]?\s*(.*)", re.IGNORECASE)
_LIST = re.compile(r"(not )?in the image:(.*)", re.IGNORECASE)
_NAME = re.compile(r"[a-z]+(?:[ -][a-z]+){0,2}")
_STYLED = re.compile(r"A:([^\n]+)\n\s*B:([^\n]+)")


@dataclass(frozen=True)
class Checked:
    """A description as the judge sees it: with its mistakes corrected, and objects that are there, and that are not."""

    corrected: str
    present: tuple[str, ...]
    absent: tuple[str, ...]


def check(judge: Judge, described: Sequence[tuple[Picture, str]]) -> Judged[Checked]:
    """Check descriptions on their pictures; one without mistakes comes back as it was."""
    tasks = [Task(_check_prompt(text), partial(read_check, text), picture.path) for picture, text in described]
    return judge.ask(tasks, REQUEST, "judge: descriptions")


def _check_prompt(text: str) -> str:
    sentences = sentences_apart(text)[::2]
    return fill(CHECK, "".join(f"{number}. {sentence}\n" for number, sentence in enumerate(sentences, 1)))


def read_check(text: str, reply: str) -> Checked | None:
    """A reply about a text; None unless there is a verdict on each sentence in order, with usable corrections, and both
    lists of objects."""
    lines = [line.strip() for line in reply.split("\n") if line.strip()]
    parts = sentences_apart(text)
    count = len(parts[::2])
    verdicts, lists = (
        [_LINE.fullmatch(line) for line in lines[:count]],
        [_LIST.fullmatch(line) for line in lines[count:]],
    )
    if [found and int(found[1]) for found in verdicts] != list(range(1, count + 1)):
        return None
    if [found and bool(found[1]) for found in lists] != [False, True]:
        return None
    for place, found in enumerate(verdicts):
        if found and found[2].lower() == "wrong":
            sentence = parts[2 * place]
            if not _corrects(sentence, found[3]):
                return None
            parts[2 * place] = _as_ended(found[3], sentence)
    present, absent = (_read_names(found[2]) for found in lists if found)
    both = {*present} & {*absent}
    return Checked("".join(parts), *(tuple(n for n in names if n not in both) for names in (present, absent)))


def _corrects(old: str, new: str) -> bool:
    """Whether a corrected sentence can stand for the old one."""
    return (
        _replaces(new, old)
        and bool(re.search(r"\w", new))
        and len(sentences_apart(new)) == 1
        and _as_ended(new, old) != old
    )


def _replaces(new: str, old: str) -> bool:
    """Whether a judge's text may stand in an old one's place: about as long, without tokens as <image> or </s>."""
    return new.isprintable() and not {*"<>"} & {*new} and length(new) <= LONGER * length(old) + MORE


def _as_ended(sentence: str, old: str) -> str:
    """A sentence with the end mark of the old one; without one where that was cut off."""
    mark = old[-1] if old[-1] in ".!?" else ""
    return sentence.rstrip(".!? ") + mark


def _read_names(listed: str) -> list[str]:
    names = (" ".join(part.lower().split()).rstrip(".") for part in listed.split(","))
    return list(dict.fromkeys(name for name in names if _NAME.fullmatch(name) and len(name) <= 30))[:NAMES]


def style(judge: Judge, pairs: Sequence[Pair], vocabulary: Vocabulary) -> Judged[Pair]:
    """Pairs in one style and length each (HA-DPO's style-consistency step); what they state is checked again."""
    tasks = [
        Task(fill(STYLE, str(length(pair.rejected)), _in_line(pair.chosen), _in_line(pair.rejected)), read)
        for pair in pairs
        for read in [partial(read_style, pair, vocabulary)]
    ]
    return judge.ask(tasks, REQUEST, "judge: style")


def _in_line(text: str) -> str:
    return " ".join(text.split())


def read_style(pair: Pair, vocabulary: Vocabulary, reply: str) -> Pair | None:
    """The rewritten pair; None unless both texts name what they named, and are of one length and as many sentences."""
    found = _STYLED.fullmatch(reply.strip())
    if found is None:
        return None
    new = Pair(pair.picture, found[1].strip(), found[2].strip())
    same = all(
        _replaces(text, old) and _named(old, vocabulary) == _named(text, vocabulary)
        for old, text in ((pair.chosen, new.chosen), (pair.rejected, new.rejected))
    )
    alike = abs(new.longer) <= MOST_APART * length(new.rejected) and new.chosen != new.rejected
    as_many = len(sentences_apart(new.chosen)) == len(sentences_apart(new.rejected))
    true = not hallucinations(new.chosen, pair.picture.objects, vocabulary)
    return new if same and alike and as_many and true else None


def _named(text: str, vocabulary: Vocabulary) -> Collection[str]:
    return {mention.object for mention in mentions(text, vocabulary)}
