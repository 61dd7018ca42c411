"""What a judge does for mining: find and correct mistakes on a picture it sees, and give two texts one style.

A reply is untrusted text: it counts as a whole, read strictly and free of contradictions, or not at all.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial

from relook.data.hadpo import DESCRIBE_PROMPTS
from relook.data.rules import check_pair
from relook.evaluate.chair import Vocabulary, mentions, plural
from relook.evaluate.judge import Judge, Judged, NoVerdict, Task, fill
from relook.mine.correct import hallucinations, sentences_apart
from relook.mine.match import MOST_APART, Pair, length
from relook.mine.pictures import Picture

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
_NEGATION = re.compile(r"\b(?:no|not|without|never|neither|nor|none)\b|n[’']t\b", re.IGNORECASE)
CONTRADICTORY = "contradictory"
_STYLED = re.compile(r"A:([^\n]+)\n\s*B:([^\n]+)")


@dataclass(frozen=True)
class Checked:
    """A description as the judge sees it: with its mistakes corrected, and objects that are there, and that are not."""

    corrected: str
    present: tuple[str, ...]
    absent: tuple[str, ...]


def check(judge: Judge, described: Sequence[tuple[Picture, str]], optional: bool = False) -> Judged[Checked]:
    """Check descriptions on their pictures; one without mistakes comes back as it was.

    Args:
        optional: as in `Judge.ask`.
    """
    tasks = [Task(_check_prompt(text), partial(read_check, text), picture.path) for picture, text in described]
    return judge.ask(tasks, REQUEST, "judge: descriptions", optional)


def _check_prompt(text: str) -> str:
    sentences = sentences_apart(text)[::2]
    return fill(CHECK, "".join(f"{number}. {sentence}\n" for number, sentence in enumerate(sentences, 1)))


def read_check(text: str, reply: str) -> Checked | None:
    """A reply about a text; None unless there is a verdict on each sentence in order, with usable corrections, and both
    lists of objects.

    Raises:
        NoVerdict: the reply contradicts itself: an object is in both lists, the corrected text names one that is not
            there, or a sentence is wrong and loses all that it names though all of that is there.
    """
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
    exchanged = []
    for place, found in enumerate(verdicts):
        if found and found[2].lower() == "wrong":
            sentence = parts[2 * place]
            if not _corrects(sentence, found[3]):
                return None
            parts[2 * place] = _as_ended(found[3], sentence)
            exchanged.append((sentence, parts[2 * place]))
    present, absent = (_read_names(found[2]) for found in lists if found)
    vocabulary, there = Vocabulary.of([*present, *absent]), set(present)
    if (
        {*present, *map(plural, present)} & {*absent, *map(plural, absent)}
        or any(_claimed(sentence, vocabulary) & set(absent) for sentence in parts[::2])
        or any(
            (old := _claimed(before, vocabulary)) and old <= there and not old & _claimed(after, vocabulary)
            for before, after in exchanged
        )
    ):
        raise NoVerdict(CONTRADICTORY)
    return Checked("".join(parts), tuple(present), tuple(absent))


def _claimed(sentence: str, vocabulary: Vocabulary) -> set[str]:
    """The objects that a sentence says are there: those that it names before any negation."""
    negation = _NEGATION.search(sentence)
    return {mention.object for mention in mentions(sentence[: negation and negation.start()], vocabulary)}


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
    return judge.ask(tasks, REQUEST, "judge: style", optional=True)


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
    fault = check_pair(DESCRIBE_PROMPTS[0], new.chosen, new.rejected)
    alike = abs(new.longer) <= MOST_APART * length(new.rejected) and not fault
    as_many = len(sentences_apart(new.chosen)) == len(sentences_apart(new.rejected))
    true = not hallucinations(new.chosen, pair.picture.objects, vocabulary)
    return new if same and alike and as_many and true else None


def _named(text: str, vocabulary: Vocabulary) -> Collection[str]:
    return {mention.object for mention in mentions(text, vocabulary)}
