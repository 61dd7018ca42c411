"""Rules for which words of AMBER's list are nouns in an English description, as its program sees them.

The program uses nltk's tagger, which was trained on newspaper text. Here, rules find verbs (after a modal, after "to",
before an object). Tables list the words that the tagger takes for adjectives and other readers for nouns.
docs/shr-amber-mmhal.md reports how far the two agree.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from relook.evaluate.tasks.chair import WORD

_TOKEN = re.compile(rf"{WORD}|[^\w\s]")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Before a verb's base form, and before one with -s; the "t" is that of "don't".
_BEFORE_BASE = _words("can could will would may might must shall should cannot t to i you we they who others")
_BEFORE_S = _words("he she it who that which")
_LINKS = _words("and or that which")
_BE = _words("is are was were")
_OBJECTS = _words("a an the my your his her its our their me us him them it")  # what stands after a verb, not a noun
_PLURALS = _words("people men women children")
_CLOSED = _OBJECTS | _words(
    "this that these those some any no each every another all both either neither you he she we they"
    " himself herself itself themselves who whom whose which what where when while why how and or but nor so yet if"
    " because as than though although since until unless whether of in on at by for from with without to into onto over"
    " under above behind below beneath beside besides between through throughout across along around near against among"
    " amid about after before during towards toward off up down out inside outside like within past upon via is are was"
    " were be been being am has have had having do does did done can could will would may might must shall should not"
    " there here too also very just only even still then now once again further farther closer other one two three four"
    " five six seven eight nine ten several many few seen made set left shown grown spread held built"
)
_SEEM = _words("appears looks seems suggests next")

# Words of the list that are English verbs as well, less those that the tagger never takes for verbs ("table", "board").
_VERBS = _words(
    "bag bat bear book bottle box bridge brush cage cash cook core court cushion desert drain drink duck fence file"
    " fish flag floor flower fork glove grill hose house ice juice leave light line lock lounge milk mirror monitor net"
    " note pack pad paddle paper pen phone pipe plate plug pole rack range ring rock rope sail sand scoop screen shell"
    " ship shoe shore shovel sign signal sink skate ski snack snow soap sound spray sponge stage star stone support"
    " switch tank tap tape tie tire towel toy track train wall watch wire"
)
# Never nouns to the tagger: "can" is the modal also in "a trash can", "hot" an adjective also of a dog.
_NEVER = _words("can hot sled urinal geese")
# Rare in newspapers: adjectives where another word for the noun may follow ("a ski slope", "the laptop appears").
_ADJECTIVES = _words(
    "air-conditioning armrest baconic cafe cheese couch drawing e-book elephant fish forest goose hose individual"
    " insect laptop leave light napkin necktie net oven paddle pear pen quilt railing saddle sheep signal ski snow"
    " umbrellas"
)
_ALSO_SECOND = _words("air-conditioning couch individual laptop napkin")  # even after another adjective
_ALSO_LAST = _ADJECTIVES - _words(
    "armrest drawing e-book forest hose insect leave paddle quilt railing sheep signal snow"
)  # even in "there is a fish", unless the text ends so
_SELDOM = _words("bear bookshelf candle collar hydrant kite lamp lemon pillow pole showerhead tree umbrella wine")


def tokens(text: str) -> list[str]:
    """Split a text into words (with their hyphens) and single marks."""
    return _TOKEN.findall(text)


def is_noun(words: Sequence[str], i: int, singular: str) -> bool:
    """Return True if token `i` of a text, a form of the noun `singular`, is used as a noun."""
    if words[i] in _NEVER:
        return False
    second, before = ([".", "."] + [word.lower() for word in words[max(0, i - 2) : i]])[-2:]
    after = words[i + 1].lower() if i + 1 < len(words) else "."
    adverb = before in ("also", "not") or before.endswith("ly")
    if singular in _VERBS and _is_verb(words[i] == singular, second if adverb else before, after):
        return False
    return not _is_adjective(words[i], second, before, after, i + 2 < len(words))


def _is_verb(base: bool, subject: str, after: str) -> bool:
    """Return True if a possible verb is one; `base` means that it has no -s and so agrees with a plural `subject`."""
    if subject in (_BEFORE_BASE if base else _BEFORE_S):
        return True
    if after not in _OBJECTS:
        return False
    plural = subject in _PLURALS or bool(re.search("[^su]s$", subject))
    return subject in _LINKS or (subject.isalpha() and subject not in _CLOSED and plural == base)


def _is_adjective(word: str, second: str, before: str, after: str, goes_on: bool) -> bool:
    """Return True if the tagger would take a word for an adjective."""
    if word == "orange" and before in _BE:
        return True
    if word in _ALSO_LAST and second in _BE and before in ("a", "an") and after in (".", ",") and goes_on:
        return True
    if not after.isalpha() or after in _CLOSED or after.endswith(("ed", "ly")):
        return False
    second_adjective = before.isalpha() and before not in _CLOSED and not before.endswith("ing")
    if word in _ADJECTIVES:
        return not second_adjective or word in _ALSO_SECOND
    noun_follows = after in _SEEM or not re.search("ing$|[^s]s$", after)
    return word in _SELDOM and not second_adjective and noun_follows
