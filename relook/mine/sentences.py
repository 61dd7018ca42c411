"""Pairs of a true and a false sentence after the same beginning of a description, as SENTINEL makes them.

At the end of each sentence the model continues its description several times, by one sentence. All are checked; a true
and a false one become a pair, and the description goes on from the true one, until it ends (Peng et al. 2025,
arXiv:2507.12455, section 3). SENTINEL checks by two detectors; here annotations do, or a judge, or the model's own
answers to yes/no questions.

Two things are not SENTINEL's. Where the model mostly goes on with what is false and has nothing new that is true, the
false sentence is corrected, as mining by description does: its descriptions do not end there. And complete pairs go on,
on both sides, as the description did after the true sentence, so that training sees where descriptions end, too; what
differs is a sentence.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from relook.console import ProgressReport
from relook.data.samples import check_pair
from relook.data.sentences import split_sentences
from relook.evaluate.benchmark import YES_NO_MAX_TOKENS
from relook.evaluate.judge import Judge, JudgeSettings
from relook.evaluate.tasks.chair import Vocabulary, mentions
from relook.evaluate.tasks.pope import question_text, stated
from relook.files import text_hash
from relook.generate.answering import (
    Answerer,
    Beginning,
    Continuation,
    GenerationSettings,
    answer_questions,
    continue_answers,
)
from relook.mine.candidates import DescriptionPairs
from relook.mine.jobs import BATCHES, MiningSettings, Record, run_resumable
from relook.mine.pairs import JudgedDescription, MinedPair, check_descriptions, claimed_objects, correct_description
from relook.mine.pictures import MinedImage

# ----------------------------------------------------------------------------------------------------

SENTENCE_TOKENS = 96  # longest sentence; one that goes on is no candidate
ENOUGH_TASKS = 8  # a judge that reads none of so many prompts is no judge; of fewer, it may be the prompts
JUDGE_COUNTS, UNJUDGED = ("replies", "prompt_tokens", "completion_tokens"), "unjudged: "
ENDED, TOO_LONG, NOTHING_TRUE = "ended by the model", "longest length", "no true sentence to go on with"


class CheckedSentence(NamedTuple):
    """A sentence with its verdict.

    Args:
        true: None if it cannot be told.
        present: objects in the picture that it names, or that a false one's correction names.
        corrected: of a false one, what the least change makes of it; empty where nobody knows.
    """

    true: bool | None
    present: frozenset[str] = frozenset()
    corrected: str = ""


class Candidate(NamedTuple):
    """A distinct sentence that the model went on with, as text after the context; `samples` are its continuations."""

    text: str
    samples: list[Continuation]

    @property
    def sentence(self) -> str:
        return self.text.strip()


@dataclass
class GrowingDescription:
    """A description and the pairs that were found along its way.

    Args:
        length: tokens of the text.
        mentioned: objects in the picture that it names.
        believed: the model's own answers: whether an object is in the picture.
        end: why the description ended; empty while it grows.
    """

    picture: MinedImage
    prompt: str
    text: str = ""
    length: int = 0
    end: str = ""
    mentioned: set[str] = field(default_factory=set)
    present: set[str] = field(default_factory=set)
    absent: set[str] = field(default_factory=set)
    believed: dict[str, bool | None] = field(default_factory=dict)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def candidates(self, continuations: Sequence[Continuation]) -> list[Candidate]:
        """Return the distinct sentences among the continuations, the most frequent first.

        What was cut off by its length is none.
        """
        by_sentence: dict[str, Candidate] = {}
        for continuation in continuations:
            sentence = continuation.text.strip()
            if sentence and (continuation.complete or sentence[-1] in ".!?"):
                by_sentence.setdefault(sentence, Candidate(continuation.text, [])).samples.append(continuation)
        return sorted(by_sentence.values(), key=lambda candidate: -len(candidate.samples))

    def grow(
        self, continuations: Sequence[Continuation], candidates: Sequence[Candidate], checked: Sequence[CheckedSentence]
    ) -> None:
        """Make a pair of a true and a false candidate, and go on from the true one, or from a corrected one."""
        earlier = set(split_sentences(self.text)[::2])
        verdicts = list(zip(candidates, checked, strict=True))
        false = [(c, v) for c, v in verdicts if v.true is False]
        # What names again what is named, and nothing else, is true, too, but to go on with it teaches repetition.
        true = [(c, v) for c, v in verdicts if v.true and c.sentence not in earlier and (self._new(v) or not v.present)]
        ends = sum(not continuation.text.strip() for continuation in continuations)
        self.counts.update(
            {
                "images": 1,
                "tokens": sum(continuation.tokens for continuation in continuations),
                "sentences": len(candidates),
                "false": len(false),
                "not_judged": sum(v.true is None for _, v in verdicts),
            }
        )
        # The true one that says most that is new, so that training does not learn to say less; among equals, and of
        # the false ones, the one that the model writes most often.
        best = max(true, key=lambda item: (len(self._new(item[1])), len(item[0].samples)), default=None)
        says_new = best is not None and bool(self._new(best[1]))
        mostly_false = 2 * sum(len(c.samples) for c, _ in false) >= len(continuations)
        if mostly_false and not says_new and not self.exhausted:
            # The model's descriptions do not end here, nor may this one.
            wrong, verdict = false[0]
            if verdict.corrected and verdict.corrected not in earlier:
                self.counts["corrected"] += 1
                context = self._go_on(wrong, verdict, verdict.corrected)
                self._pair(context, verdict.corrected, wrong.sentence, complete=False)
                return
        if best is None:
            self.end = ENDED if 2 * ends >= len(continuations) else NOTHING_TRUE
            if false and self.text and self.exhausted:
                self.pairs.append(self._ending(false[0][0]))
            return
        candidate, verdict = best
        complete = 2 * sum(sample.complete for sample in candidate.samples) >= len(candidate.samples)
        context = self._go_on(candidate, verdict, candidate.sentence)
        # A sentence that names nothing new is no side of a pair: training on such ones fills descriptions with them.
        if false and says_new:
            self._pair(context, candidate.sentence, false[0][0].sentence, complete and self.exhausted)
        if complete or 2 * ends >= len(continuations):
            self.end = ENDED

    def _new(self, verdict: CheckedSentence) -> frozenset[str]:
        """Return the objects in the picture that the description does not name yet."""
        return verdict.present - self.mentioned

    def _pair(self, context: str, chosen: str, rejected: str, complete: bool) -> None:
        # As in SENTINEL's files, a space joins a context and a sentence, and no end mark follows: training on every end
        # of the model's makes descriptions shorter and shorter.
        self.pairs.append({"context": context, "chosen": chosen, "rejected": rejected, "complete": complete})

    def _go_on(self, candidate: Candidate, verdict: CheckedSentence, sentence: str) -> str:
        """Add a sentence in a candidate's place, with the white space before it; return the text before."""
        before, space = self.text.strip(), candidate.text[: len(candidate.text) - len(candidate.text.lstrip())]
        self.text += space + sentence
        self.length += max(sample.tokens for sample in candidate.samples)
        self.mentioned |= verdict.present
        return before

    @property
    def exhausted(self) -> bool:
        """Return True if the text names all annotated objects; without annotations nobody knows."""
        return bool(self.picture.objects) and self.picture.objects <= self.mentioned

    def _ending(self, false: Candidate) -> dict[str, Any]:
        """Return the pair of an end and a false sentence: both begin with the last sentence, which one of them ends."""
        *before, last = split_sentences(self.text)
        return {
            "context": "".join(before).strip(),
            "chosen": last,
            "rejected": f"{last} {false.sentence}",
            "complete": True,
        }

    def to_record(self) -> Record:
        return {
            "key": self.picture.id,
            "prompt": self.prompt,
            "text": self.text,
            "end": self.end,
            "pairs": self.pairs,
            "counts": self.counts,
            "present": sorted(self.present),
            "absent": sorted(self.absent - self.present),
        }


Candidates = Sequence[tuple[GrowingDescription, Sequence[Candidate]]]
Check = Callable[[Candidates], list[list[CheckedSentence]]]  # of each description, a verdict on each candidate


def describe_by_sentence(
    pictures: Sequence[MinedImage],
    prompts: Sequence[str],
    settings: MiningSettings,
    load: Callable[[], Answerer],
    check: Check,
    work: Path,
) -> list[Record]:
    """Grow a description of each picture; returns one record each, in order (see `GrowingDescription.to_record`)."""

    def make(part: range, report: ProgressReport) -> list[Record]:
        descriptions = [GrowingDescription(pictures[i], prompts[i]) for i in part]
        for step in range(settings.max_new_tokens):
            growing = [description for description in descriptions if not description.end]
            report(len(descriptions) - len(growing), len(descriptions))
            if not growing:
                break
            _add_sentence(growing, settings, load(), check, step, part.start)
        return [description.to_record() for description in descriptions]

    keys = [picture.id for picture in pictures]
    size = max(1, BATCHES * settings.batch_size // settings.continuations)
    records = run_resumable(work / "sentences.jsonl", keys, size, make, "descriptions, by sentence")
    return [records[key] for key in keys]


def _add_sentence(
    growing: Sequence[GrowingDescription],
    settings: MiningSettings,
    answerer: Answerer,
    check: Check,
    step: int,
    start: int,
) -> None:
    """Continue each description by a sentence.

    Args:
        step: number of the sentence.
        start: number of the first picture of the part, which fixes the draws with `step`.
    """
    count = settings.continuations
    beginnings = [Beginning(d.picture.path, d.prompt, d.text) for d in growing for _ in range(count)]
    generation = GenerationSettings(
        settings.template,
        min(SENTENCE_TOKENS, settings.max_new_tokens),
        settings.batch_size,
        (("do_sample", True), ("temperature", settings.temperature), ("top_k", 0)),
        int(text_hash(str(settings.seed), str(step)), 16) % 2**31,
        first=start * count,
        one_sentence=True,
    )
    continuations = [Continuation("", 0, True)] * len(beginnings)
    for index, continuation in continue_answers(answerer, beginnings, generation, lambda *_: None):
        continuations[index] = continuation
    by_description = [continuations[i : i + count] for i in range(0, len(continuations), count)]
    candidates = [d.candidates(texts) for d, texts in zip(growing, by_description, strict=True)]
    checked = check(list(zip(growing, candidates, strict=True)))
    for description, texts, sentences, checks in zip(growing, by_description, candidates, checked, strict=True):
        description.grow(texts, sentences, checks)
        if not description.end and description.length >= settings.max_new_tokens:
            description.end = TOO_LONG


def pairs_of_records(
    pictures: Sequence[MinedImage], records: Sequence[Record], judge: JudgeSettings | None, complete: bool = False
) -> DescriptionPairs:
    """Collect the pairs and counts of all descriptions.

    Args:
        complete: make complete pairs.
    """
    counts: Counter[str] = Counter()
    ends: Counter[str] = Counter()
    result = DescriptionPairs([], 0, 0)
    for picture, record in zip(pictures, records, strict=True):
        counts.update(record["counts"])
        ends[record["end"]] += 1
        result.verdicts[picture.id] = JudgedDescription("", tuple(record["present"]), tuple(record["absent"]))
        for texts in record["pairs"]:
            sides = texts["chosen"], texts["rejected"]
            pair = MinedPair(picture, *sides, record["prompt"], texts["context"], texts["complete"])
            if complete:
                pair = _completed(pair, record)
            if fault := check_pair(pair.prompt, *pair.answers, pair.context):
                result.dropped[fault] += 1
            else:
                result.pairs.append(pair)
    result.checked, result.hallucinated = counts["sentences"], counts["false"]
    result.cost = {
        "images_read": counts["images"],
        "tokens_sampled": counts["tokens"],
        "checks": counts["checks"],
        "sentences_not_judged": counts["not_judged"],
        "sentences_corrected": counts["corrected"],
        "descriptions": dict(sorted(ends.items())),
    }
    if judge:
        unjudged = {name.removeprefix(UNJUDGED): n for name, n in counts.items() if name.startswith(UNJUDGED)}
        spent = {name: counts[name] for name in JUDGE_COUNTS}
        result.judge = [{"model": judge.model, "url": judge.address, **spent, "unjudged": unjudged}]
    return result


def _completed(pair: MinedPair, record: Record) -> MinedPair:
    """Let both sides of a pair go on as the description did; it has an end mark where the model ended it."""
    rest = record["text"].strip()[len(pair.context) :].lstrip()
    if pair.complete or not rest.startswith(pair.chosen):
        return replace(pair, chosen=pair.answers[0], rejected=pair.answers[1], context="")
    chosen, rejected = (answer + rest[len(pair.chosen) :] for answer in pair.answers)
    return replace(pair, chosen=chosen, rejected=rejected, context="", complete=record["end"] == ENDED)


# ----------------------------------------------------------------------------------------------------
# Who checks


def by_annotations(vocabulary: Vocabulary, neutral: Sequence[str]) -> Check:
    """Check by annotations: a sentence is false if it names an object that is not on the picture.

    Args:
        neutral: sentences that may take a false one's place (`correct_description`).
    """

    def verdict(description: GrowingDescription, candidate: Candidate) -> CheckedSentence:
        objects = description.picture.objects
        names = _objects_of(candidate.sentence)
        if names <= objects:
            return CheckedSentence(True, names)
        # Corrected with what comes before it, so that an object is named that is not named yet.
        text, rng = description.text + candidate.text, random.Random(f"{description.picture.id}/{description.text}")
        *_, corrected = split_sentences(correct_description(text, objects, vocabulary, neutral, rng).text)
        names = _objects_of(corrected)
        return CheckedSentence(False, names & objects, corrected if names <= objects else "")

    def _objects_of(sentence: str) -> frozenset[str]:
        return frozenset(mention.object for mention in mentions(sentence, vocabulary))

    def check(batch: Candidates) -> list[list[CheckedSentence]]:
        for description, candidates in batch:
            description.counts["checks"] += len(candidates)
        return [[verdict(description, candidate) for candidate in candidates] for description, candidates in batch]

    return check


def by_judge(judge: Judge) -> Check:
    """Check by a judge that sees the picture: one prompt lists all candidates of a description."""
    judged = False

    def check(batch: Candidates) -> list[list[CheckedSentence]]:
        nonlocal judged
        # The judge's verdicts are on the sentences of a text: each candidate must be one with an end mark.
        listed = [[_ended(c.sentence) for c in candidates] for _, candidates in batch]
        shown = [(d, " ".join(texts)) for (d, _), texts in zip(batch, listed, strict=True) if texts]
        if not shown:
            return [[] for _ in batch]
        results = check_descriptions(
            judge,
            [(description.picture, text) for description, text in shown],
            optional=judged or len(shown) < ENOUGH_TASKS,
            contexts=[description.text for description, _ in shown],
        )
        # Counts of a call are kept with its first description, so that a resumed job knows them.
        spent = {name: results.details[name] for name in JUDGE_COUNTS}
        batch[0][0].counts.update({**spent, **{f"{UNJUDGED}{why}": n for why, n in results.unjudged.items()}})
        verdicts, answers = [], iter(results.verdicts)
        for (description, candidates), texts in zip(batch, listed, strict=True):
            answer = next(answers) if texts else None
            description.counts["checks"] += bool(texts)
            corrected = split_sentences(answer.corrected)[::2] if answer else []
            if answer is None or len(corrected) != len(texts):
                verdicts.append([CheckedSentence(None)] * len(candidates))
                continue
            judged = True
            description.present |= set(answer.present)
            description.absent |= set(answer.absent)
            vocabulary, present = Vocabulary.of([*answer.present, *answer.absent]), frozenset(answer.present)
            verdicts.append(
                [
                    CheckedSentence(old == new, frozenset(claimed_objects(new, vocabulary)) & present, new)
                    for old, new in zip(texts, corrected, strict=True)
                ]
            )
        return verdicts

    return check


def _ended(sentence: str) -> str:
    return sentence if sentence[-1] in ".!?" else f"{sentence}."


def by_own_answers(vocabulary: Vocabulary, load: Callable[[], Answerer], settings: MiningSettings) -> Check:
    """Check by the model itself: it answers whether each object that a sentence names is in the picture.

    A sentence is true if all answers are yes, and false if one is no.
    """

    def check(batch: Candidates) -> list[list[CheckedSentence]]:
        mentioned = [
            [{m.object for m in mentions(c.sentence, vocabulary)} for c in candidates] for _, candidates in batch
        ]
        missing = [
            (description, name)
            for (description, _), of_candidates in zip(batch, mentioned, strict=True)
            for name in sorted(set[str]().union(*of_candidates) - description.believed.keys())
        ]
        questions = [(description.picture.path, question_text(name)) for description, name in missing]
        generation = GenerationSettings(settings.template, YES_NO_MAX_TOKENS, settings.batch_size)
        if questions:
            for index, text in answer_questions(load(), questions, generation, lambda *_: None):
                description, name = missing[index]
                description.believed[name] = stated(text)
                description.counts["checks"] += 1
        return [
            [_by_belief(names, description.believed) for names in of_candidates]
            for (description, _), of_candidates in zip(batch, mentioned, strict=True)
        ]

    return check


def _by_belief(names: set[str], believed: dict[str, bool | None]) -> CheckedSentence:
    answers = [believed[name] for name in names]
    true = False if False in answers else None if None in answers else True
    return CheckedSentence(true, frozenset(name for name in names if believed[name]))
