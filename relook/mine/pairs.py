"""Correct descriptions, and keep chosen and rejected alike otherwise: one length, one style, no near-duplicates."""

from __future__ import annotations

import math
import random
import re
from collections import Counter, deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from relook.data.readers import DESCRIBE_PROMPTS
from relook.data.samples import check_pair
from relook.data.sentences import split_sentences
from relook.evaluate.judge import Judge, JudgeResults, NoVerdict, Task, fill_template
from relook.evaluate.statistics import safe_ratio
from relook.evaluate.tasks.chair import Mention, Vocabulary, mentions, plural
from relook.mine.pictures import MinedImage

# ----------------------------------------------------------------------------------------------------

MAX_LENGTH_GAP = 0.25  # of the longer text's words: a pair whose lengths differ more is dropped
MAX_MEAN_GAP = 0.05  # of the rejected texts' mean length
SHINGLE = 5  # words


@dataclass(frozen=True)
class MinedPair:
    """Hold two descriptions of a picture; `rejected` is the model's own, or a judge's in the style of `chosen`.

    Args:
        prompt, context: of sentences: what was asked, and the description so far; `chosen` and `rejected` follow it.
        complete: False for sentences after which the description goes on.
    """

    picture: MinedImage
    chosen: str
    rejected: str
    prompt: str = ""
    context: str = ""
    complete: bool = True

    @property
    def answers(self) -> tuple[str, str]:
        """Return chosen and rejected with the context before them; as in SENTINEL's files, a space joins them."""
        before = f"{self.context} " if self.context else ""
        return before + self.chosen, before + self.rejected

    @property
    def longer(self) -> int:
        """Count the words that `chosen` has more than `rejected`."""
        return word_count(self.chosen) - word_count(self.rejected)


def word_count(text: str) -> int:
    """Count the words between white space."""
    return len(text.split())


def match_lengths(pairs: Sequence[MinedPair], max_gap: float = MAX_LENGTH_GAP) -> tuple[list[MinedPair], Counter[str]]:
    """Drop pairs until length does not tell chosen from rejected.

    Args:
        max_gap: largest difference of a pair's lengths, as a share of the longer text's words.

    Returns:
        The remaining pairs in their order, and how many were dropped, by reason.
    """
    # First the pairs whose own lengths differ much.
    close = [p for p in pairs if abs(p.longer) <= MAX_LENGTH_GAP * max(word_count(p.chosen), word_count(p.rejected))]
    total, rejected = sum(p.longer for p in close), sum(word_count(p.rejected) for p in close)
    # Then those that pull the means of both sides apart: from the end of the sorted pairs that has the worst ones.
    remaining = deque(sorted(range(len(close)), key=lambda i: close[i].longer))
    while abs(total) > MAX_MEAN_GAP * rejected:
        worst = close[remaining.pop() if total > 0 else remaining.popleft()]
        total, rejected = total - worst.longer, rejected - word_count(worst.rejected)
    selected = [close[i] for i in sorted(remaining)]
    return selected, +Counter(
        {"lengths differ": len(pairs) - len(close), "mean lengths would differ": len(close) - len(selected)}
    )


def length_statistics(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Compute length statistics of (chosen, rejected) texts for the data card."""
    chosen, rejected = ([word_count(pair[side]) for pair in pairs] for side in (0, 1))
    gaps = [c - r for c, r in zip(chosen, rejected, strict=True)]
    means = [_rounded(sum(side), len(pairs), 2) for side in (chosen, rejected)]
    characters = [_rounded(sum(len(pair[side]) for pair in pairs), len(pairs), 1) for side in (0, 1)]
    return {
        "chosen_words": means[0],
        "rejected_words": means[1],
        "means_differ": _rounded(abs(sum(gaps)), sum(rejected), 4),
        "chosen_longer": sum(a > 0 for a in gaps),
        "chosen_shorter": sum(a < 0 for a in gaps),
        "same_length": sum(a == 0 for a in gaps),
        "chosen_characters": characters[0],
        "rejected_characters": characters[1],
    }


def _rounded(part: float, total: float, digits: int) -> float | None:
    ratio = safe_ratio(part, total)
    return None if ratio is None else round(ratio, digits)


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Return a text's runs of `SHINGLE` words, without case and punctuation; a shorter text is one run."""
    words = re.findall(r"\w+", text.lower())
    return frozenset(tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1)))


def near_duplicates(texts: Sequence[str], similarity: float) -> set[int]:
    """Return the indices of texts whose Jaccard similarity with an earlier text is at least `similarity`.

    The similarity is that of their shingles, and the search is exact (prefix filter; Chaudhuri et al. 2006).
    """
    sets = [shingles(text) for text in texts]
    counts = Counter(shingle for members in sets for shingle in members)
    by_rare: dict[tuple[str, ...], list[int]] = {}
    repeated = set()
    for index, members in enumerate(sets):
        # A set of n members and one so similar have at least ceil(s n) in common, so they share one of the
        # n - ceil(s n) + 1 that come first in any fixed order. Rare ones leave the fewest texts to compare.
        rare = sorted(members, key=lambda shingle: (counts[shingle], shingle))
        rare = rare[: len(members) - math.ceil(similarity * len(members) - 1e-9) + 1]
        earlier = {other for shingle in rare for other in by_rare.get(shingle, ())}
        if any(len(members & sets[other]) >= similarity * len(members | sets[other]) for other in earlier):
            repeated.add(index)
        else:
            for shingle in rare:
                by_rare.setdefault(shingle, []).append(index)
    return repeated


# ----------------------------------------------------------------------------------------------------
# What is wrong in a description, and the least change that makes it true: by annotations alone.


def hallucinations(text: str, truth: Collection[str], vocabulary: Vocabulary) -> list[str]:
    """Return the objects that a text names and the image does not have, in order of mention."""
    return [mention.object for mention in mentions(text, vocabulary) if mention.object not in truth]


@dataclass(frozen=True)
class Correction:
    """A corrected description, and what its false sentences became.

    Args:
        exchanged: nouns that another one took the place of.
        taken_out: words before them, such as colours, that said something of what is not there.
        neutral: sentences that a neutral one took the place of.
    """

    text: str
    exchanged: int = 0
    taken_out: int = 0
    neutral: int = 0


# "There is", "In the image, there are", "The picture shows": what follows says of things that they are there, and no
# more than that.
_EXISTS = re.compile(
    r"(?:in (?:the|this) \w+,? )?"
    r"(?:there(?: is| are|'s)|(?:the|this) (?:image|picture|photo|photograph|scene)(?: also)? "
    r"(?:shows|features|contains|includes|depicts|displays|has)|(?:i|we|you)(?: can)?(?: also)? see)(?: also)?",
    re.IGNORECASE,
)
# What follows the noun where a sentence says of one thing that it is there: "A dog can be seen."
_SHOWN = re.compile(
    r" (?:(?:is|are)(?: also)? (?:visible|present|shown|there|nearby)|can(?: also)? be seen|stands? out)[.!?]*$",
    re.IGNORECASE,
)
_ITEM_END = re.compile(r",(?: and)?|\band\b|\bor\b|[.!?]+$")  # of a list of things
_DETERMINERS = {"a", "an", "the", "some"}  # others, as "two" and "their", say more than that a thing is there
# With one of these the words before a noun are more than its attributes: "man on a horse".
_STRUCTURE = re.compile(
    r"\b(?:a|an|the|some|of|in|on|at|by|to|with|near|for|from|over|under|next|beside|behind|is|are|has|have|that|which|"
    r"one|two|three|four|five|six|several|many|few|his|her|its|their|no|not|\w+ing)\b",
    re.IGNORECASE,
)


def correct_description(
    text: str, truth: Collection[str], vocabulary: Vocabulary, neutral: Sequence[str], rng: random.Random
) -> Correction:
    """Make a description true by the least change, at the same number of sentences.

    Where a sentence only lists what is there, a hallucinated object is exchanged for a present one that was not named,
    and the words before it, such as its colour, are taken out: they would be said of the new one. Any other sentence
    with a hallucinated object says where it is or what it does, and is exchanged for a neutral one, as is a list where
    no present object is left. All else stays as it is, also line breaks and a last sentence that was cut off.
    """
    mentioned = {mention.object for mention in mentions(text, vocabulary)}
    missing = sorted(set(truth) - mentioned)
    rng.shuffle(missing)
    replacements: dict[str, str] = {}
    exchanged = taken_out = neutrals = 0

    def replacement(mention: Mention, before: str) -> str | None:
        """Return the object that a mention is exchanged for; None if no present object is left."""
        # "a dog" introduces another dog and gets a new object; "the dog" refers to the one before.
        if mention.object not in replacements or preceding_article(before):
            if not missing:
                return None
            replacements[mention.object] = missing.pop()
        return replacements[mention.object]

    parts = split_sentences(text)
    for position in range(0, len(parts), 2):
        sentence = parts[position]
        in_sentence = mentions(sentence, vocabulary)
        wrong = [mention for mention in in_sentence if mention.object not in truth]
        attributes = [listed_attributes(sentence, mention, in_sentence) for mention in wrong]
        names = (
            [None]
            if None in attributes
            else [
                replacement(mention, sentence[: start or mention.start])
                for mention, start in zip(wrong, attributes, strict=True)
            ]
        )
        if None in names:
            # A neutral sentence of about the same length, one that the text does not have yet if possible.
            line = rng.choice(_closest_in_length(sentence, [line for line in neutral if line not in parts] or neutral))
            parts[position] = line if sentence.endswith(".") else line.rstrip(".")
            neutrals += 1
        else:
            # From the end, so that the character offsets of earlier mentions stay right.
            for mention, name, start in zip(reversed(wrong), reversed(names), reversed(attributes), strict=True):
                assert start is not None, "all mentions stand in lists"
                taken_out += word_count(sentence[start : mention.start])
                alone = Mention(mention.object, start, start + mention.end - mention.start)
                sentence = sentence[:start] + sentence[mention.start :]
                sentence = replace_noun(sentence, alone, str(name), vocabulary)
            exchanged += len(wrong)
            parts[position] = sentence
    return Correction("".join(parts), exchanged, taken_out, neutrals)


def listed_attributes(sentence: str, mention: Mention, mentioned: Sequence[Mention]) -> int | None:
    """Return where the words before a listed noun begin that say something of it, such as its colour.

    It is the noun's own beginning if there are none; None if the sentence does more than list the noun as being there:
    if the words around it say where it is, how many there are or what it does.
    """
    frame = _EXISTS.match(sentence)
    if _SHOWN.match(sentence, mention.end):
        begin = 0
    elif frame is None:
        return None
    else:
        end = _ITEM_END.match(sentence, mention.end) or _ITEM_END.match(sentence, mention.end + 1)
        if end is None and sentence[mention.end :].strip():
            return None
        # The item begins after the last comma or "and" before the noun.
        begin = max([frame.end(), *(m.end() for m in _ITEM_END.finditer(sentence, frame.end(), mention.start))])
    if any(begin <= other.start < mention.start for other in mentioned):
        return None
    words = list(re.finditer(r"\S+", sentence[begin : mention.start]))
    if words and words[0][0].lower() in _DETERMINERS:
        words = words[1:]
    start = begin + words[0].start() if words else mention.start
    return None if _STRUCTURE.search(sentence, start, mention.start) else start


def preceding_article(before: str) -> str:
    """Return the word before a noun if it is "a" or "an"; otherwise an empty string."""
    words = before.split()
    return words[-1] if words and words[-1].lower() in ("a", "an") else ""


def _closest_in_length(sentence: str, lines: Sequence[str]) -> list[str]:
    """Return those lines whose number of words is nearest to the sentence's."""
    distances = [abs(len(line.split()) - len(sentence.split())) for line in lines]
    return [line for line, distance in zip(lines, distances, strict=True) if distance == min(distances)]


def replace_noun(sentence: str, mention: Mention, name: str, vocabulary: Vocabulary) -> str:
    """Put another noun in a mention's place: in the plural if the mention is, and with the right article."""
    before, after = sentence[: mention.start], sentence[mention.end :]
    if article := preceding_article(before):
        kind = "an" if name[0] in "aeiou" else "a"
        before = before.rstrip().removesuffix(article) + (kind.capitalize() if article[0].isupper() else kind) + " "
        return before + name + after
    word = sentence[mention.start : mention.end]
    if " ".join(word.lower().split()) in vocabulary.plurals:
        name = plural(name)
    return before + (name.capitalize() if word[0].isupper() else name) + after


def worsen_description(
    text: str, truth: Collection[str], tempting: Sequence[str], vocabulary: Vocabulary, rng: random.Random
) -> str:
    """Make a true description false by the least change: one object becomes an absent one that it does not name.

    Args:
        tempting: absent objects, the first of which that the text does not name is taken.

    Returns:
        The text as it is, if it names no object or all tempting ones.
    """
    in_text = mentions(text, vocabulary)
    true, names = [m for m in in_text if m.object in truth], {m.object for m in in_text}
    absent = next((name for name in tempting if name not in names), None)
    return replace_noun(text, rng.choice(true), absent, vocabulary) if true and absent else text


# ----------------------------------------------------------------------------------------------------
# A judge's work for mining: find and correct mistakes on a picture it sees, and give two texts one style.
#
# A reply is untrusted text: it is used if it has the form that was asked for and does not contradict itself, or not
# at all.

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

{}Sentences:
{}
Answer in this form and nothing else:
1. right
2. wrong: the corrected sentence
3. cannot judge
In the image: object, object
Not in the image: object, object
"""
CONTEXT = "Each sentence goes on from this text, which you need not check, in another way: "
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
_NEGATION = re.compile(r"\b(?:no|not|without|never|neither|nor|none)\b|n[’']t\b", re.IGNORECASE)
CONTRADICTORY = "contradictory"
_STYLED = re.compile(r"A:([^\n]+)\n\s*B:([^\n]+)")


@dataclass(frozen=True)
class JudgedDescription:
    """Hold a judge's verdict: the description with its mistakes corrected, and present and absent objects."""

    corrected: str
    present: tuple[str, ...]
    absent: tuple[str, ...]


def check_descriptions(
    judge: Judge,
    described: Sequence[tuple[MinedImage, str]],
    optional: bool = False,
    contexts: Sequence[str] | None = None,
) -> JudgeResults[JudgedDescription]:
    """Let the judge check descriptions against their pictures; one without mistakes comes back as it was.

    Args:
        optional: as in `Judge.ask`.
        contexts: for each text what stands before it, where its sentences are different ways to go on.
    """
    tasks = [
        Task(_check_prompt(text, context), partial(read_check, text), picture.path)
        for (picture, text), context in zip(described, contexts or [""] * len(described), strict=True)
    ]
    return judge.ask(tasks, REQUEST, "judge: descriptions", optional)


def _check_prompt(text: str, context: str = "") -> str:
    sentences = split_sentences(text)[::2]
    numbered = "".join(f"{number}. {sentence}\n" for number, sentence in enumerate(sentences, 1))
    return fill_template(CHECK, f"{CONTEXT}{_in_line(context)}\n\n" if context else "", numbered)


def read_check(text: str, reply: str) -> JudgedDescription | None:
    """Read a reply about a text.

    Returns:
        None unless there is a verdict on each sentence in order, with usable corrections, and both lists of objects.

    Raises:
        NoVerdict: the reply contradicts itself: an object is in both lists, the corrected text names an absent one, or
            a sentence is called wrong and loses all objects that it names though all of them are present.
    """
    lines = [line.strip() for line in reply.split("\n") if line.strip()]
    parts = split_sentences(text)
    count = len(parts[::2])
    verdicts, lists = (
        [_LINE.fullmatch(line) for line in lines[:count]],
        [_LIST.fullmatch(line) for line in lines[count:]],
    )
    if [match and int(match[1]) for match in verdicts] != list(range(1, count + 1)):
        return None
    if [match and bool(match[1]) for match in lists] != [False, True]:
        return None
    # Put each corrected sentence in its place; the white space between sentences stays.
    corrections = []
    for number, match in enumerate(verdicts):
        if match and match[2].lower() == "wrong":
            sentence = parts[2 * number]
            if not _corrects(sentence, match[3]):
                return None
            parts[2 * number] = _as_ended(match[3], sentence)
            corrections.append((sentence, parts[2 * number]))
    present, absent = (_read_names(match[2]) for match in lists if match)
    # Plurals count as the same object. A wrong sentence may keep its objects: their color or number can be wrong.
    vocabulary, in_image = Vocabulary.of([*present, *absent]), set(present)
    if (
        {*present, *map(plural, present)} & {*absent, *map(plural, absent)}
        or any(claimed_objects(sentence, vocabulary) & set(absent) for sentence in parts[::2])
        or any(
            (old := claimed_objects(before, vocabulary))
            and old <= in_image
            and not old & claimed_objects(after, vocabulary)
            for before, after in corrections
        )
    ):
        raise NoVerdict(CONTRADICTORY)
    return JudgedDescription("".join(parts), tuple(present), tuple(absent))


def claimed_objects(sentence: str, vocabulary: Vocabulary) -> set[str]:
    """Return the objects that a sentence says are present: those that it names before any negation."""
    negation = _NEGATION.search(sentence)
    return {mention.object for mention in mentions(sentence[: negation and negation.start()], vocabulary)}


def _corrects(old: str, new: str) -> bool:
    """Return True if a corrected sentence can take the place of the old one."""
    return (
        _replaces(new, old)
        and bool(re.search(r"\w", new))
        and len(split_sentences(new)) == 1
        and _as_ended(new, old) != old
    )


def _replaces(new: str, old: str) -> bool:
    """Return True if a judge's text may replace an old one: about as long, without tokens such as <image> or </s>."""
    return new.isprintable() and not {*"<>"} & {*new} and word_count(new) <= LONGER * word_count(old) + MORE


def _as_ended(sentence: str, old: str) -> str:
    """Give a sentence the end mark of the old one, or none if that was cut off."""
    mark = old[-1] if old[-1] in ".!?" else ""
    return sentence.rstrip(".!? ") + mark


def _read_names(listed: str) -> list[str]:
    names = (" ".join(part.lower().split()).rstrip(".") for part in listed.split(","))
    return list(dict.fromkeys(name for name in names if _NAME.fullmatch(name) and len(name) <= 30))[:NAMES]


def match_style(judge: Judge, pairs: Sequence[MinedPair], vocabulary: Vocabulary) -> JudgeResults[MinedPair]:
    """Rewrite pairs in one style and length each (HA-DPO's style-consistency step), and check what they state again."""
    tasks = [
        Task(fill_template(STYLE, str(word_count(pair.rejected)), _in_line(pair.chosen), _in_line(pair.rejected)), read)
        for pair in pairs
        for read in [partial(read_style, pair, vocabulary)]
    ]
    return judge.ask(tasks, REQUEST, "judge: style", optional=True)


def _in_line(text: str) -> str:
    return " ".join(text.split())


def read_style(pair: MinedPair, vocabulary: Vocabulary, reply: str) -> MinedPair | None:
    """Read the rewritten pair; None unless its texts name the same objects as before and have one length."""
    match = _STYLED.fullmatch(reply.strip())
    if match is None:
        return None
    new = MinedPair(pair.picture, match[1].strip(), match[2].strip())
    same = all(
        _replaces(text, old) and _named(old, vocabulary) == _named(text, vocabulary)
        for old, text in ((pair.chosen, new.chosen), (pair.rejected, new.rejected))
    )
    fault = check_pair(DESCRIBE_PROMPTS[0], new.chosen, new.rejected)
    alike = abs(new.longer) <= MAX_LENGTH_GAP * word_count(new.rejected) and not fault
    as_many = len(split_sentences(new.chosen)) == len(split_sentences(new.rejected))
    true = not hallucinations(new.chosen, pair.picture.objects, vocabulary)
    return new if same and alike and as_many and true else None


def _named(text: str, vocabulary: Vocabulary) -> Collection[str]:
    return {mention.object for mention in mentions(text, vocabulary)}
