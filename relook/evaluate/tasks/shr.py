"""SHR (Zhao et al. 2023, arXiv:2311.16839): the share of a description's sentences that are hallucinated.

The original programs are opendatalab/HA-DPO ha_dpo/shr_eval (shr_utils.py, gpt_utils.py, json_eval.py). A judge reads
Visual Genome's region descriptions and the benchmark's facts about an image, and labels each sentence.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from relook.data.annotations import read_image_paths, read_regions, read_sizes
from relook.data.samples import Question
from relook.errors import DataError, some
from relook.evaluate.judge import Judge, Judged, Task, fill, prompt_template
from relook.evaluate.statistics import mean, ratio, ratio_interval
from relook.evaluate.tasks.chair import Vocabulary, mentions
from relook.files import read_object, read_records, read_text, some_records

PROMPT = "Describe this image in detail."
HALLUCINATION, CORRECT, CANNOT_JUDGE = "hallucination", "correct", "cannot judge"
IMAGES, FACTS = "val_images_final.json", ("shr_factual_part1.jsonl", "shr_factual_part2.jsonl")
EXACT = "exact.json"
SOURCE = "It is one of SHR's files (juliozhao/SHR on Hugging Face); see docs/shr-amber-mmhal.md."
REQUEST = {"temperature": 0.7, "max_tokens": 800}  # as the original asks
TEMPLATE = """You check sentences that describe an image you cannot see. What is known about the image is below: regions
as "[x1, y1, x2, y2]: description", with corners as fractions of width and height (regions that overlap may be the same
object), and facts, which are certain. Label every sentence, judging by this knowledge alone:
- hallucination: it states something that contradicts the knowledge, or names something that is not there;
- correct: what it states agrees with the knowledge;
- cannot judge: it is about mood, style or anything else that the knowledge does not tell.

Regions:
{}
Facts:
{}
Sentences:
{}
Answer in this form, one line a sentence, in their order, and nothing else:
Judgement:
1. hallucination or correct or cannot judge: reason
2. ...
"""
_LABEL = re.compile(r"\s*(\d+)[.)]\s*\W*(hallucination|correct|cannot judge)\b", re.IGNORECASE)
Labels = tuple[str, ...]


@dataclass(frozen=True)
class Described:
    """An image's id and the sentences that were said of it."""

    image: str
    sentences: tuple[str, ...]


class SentenceJudge(Protocol):
    """Labels sentences: one label each, or None for an image whose sentences were not judged."""

    def label(self, described: Sequence[Described]) -> Judged[Labels]: ...


def questions(data: Path) -> list[Question]:
    """One question an image of `data/shr/val_images_final.json`; the images are Visual Genome's, below `data/vg`.

    Raises:
        DataError: a file is missing, the list is empty, an image is listed twice or is not Visual Genome's.
    """
    for name in FACTS:
        if not (data / "shr" / name).exists():
            raise DataError(f"{data / 'shr' / name} does not exist.", SOURCE)
    try:
        ids = [str(record["image_id"]) for record in some_records(data / "shr" / IMAGES, SOURCE)]
    except KeyError:
        raise DataError(f"{data / 'shr' / IMAGES} has a record without image_id.", "Give SHR's own file.") from None
    paths = read_image_paths(data / "vg")
    faults = {
        "lists images twice": [i for i, count in Counter(ids).items() if count > 1],
        "lists images that data/vg/image_data.json has not": [i for i in ids if i not in paths],
    }
    for what, found in faults.items():
        if found:
            raise DataError(f"{data / 'shr' / IMAGES} {what}: {some(found)}.", "Give SHR's own file.")
    return [Question(i, paths[i], PROMPT) for i in ids]


def read_descriptions(path: Path) -> list[dict[str, Any]]:
    """relook's records, or HA-DPO's layout: one object, image id to description."""
    try:
        whole = json.loads(read_text(path))
    except ValueError:
        return read_records(path)
    if isinstance(whole, dict) and "image_id" not in whole:
        return [{"image_id": image, "description": text} for image, text in whole.items()]
    return read_records(path)


def sentences_of(text: str) -> tuple[str, ...]:
    """The sentences that are judged: cut at full stops; one that is part of an earlier one is left out."""
    kept: list[str] = []
    for sentence in map(str.strip, text.split(".")):
        if sentence and not any(sentence in earlier for earlier in kept):
            kept.append(sentence)
    return tuple(kept)


def distinct(text: str, n: int) -> float | None:
    """Distinct n-grams / n-grams of words, which the original calls n-gram repetition; None of fewer than n words."""
    words = re.sub(r"[.:\n?,]", "", text).split()
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else None


def read_labels(reply: str, count: int) -> Labels | None:
    """A judge's labels; None unless the lines after "Judgement:" are numbered 1 to `count`, each with a label."""
    head = re.search(r"judge?ment:", reply, re.IGNORECASE)
    if head is None:
        return None
    lines = [line for line in reply[head.end() :].split("\n") if re.match(r"\s*\d+[.)]", line)]
    found = [_LABEL.match(line) for line in lines]
    if [match and int(match[1]) for match in found] != list(range(1, count + 1)):
        return None
    return tuple(match[2].lower() for match in found if match)


@dataclass(frozen=True)
class KnowledgeJudge:
    """A language model that is told what is known about each image.

    The prompt is the original's where `data/shr/gpt_utils.py` is HA-DPO's file, else relook's own.
    """

    judge: Judge
    data: Path

    def label(self, described: Sequence[Described]) -> Judged[Labels]:
        template, prompt = prompt_template(self.data / "shr" / "gpt_utils.py", "GPT_JUDGE_PROMPT", TEMPLATE)
        knowledge = read_knowledge(self.data, [one.image for one in described])
        judged = self.judge.ask(
            [_task(template, one, *knowledge[one.image]) for one in described], REQUEST, "SHR judge"
        )
        return Judged(judged.verdicts, judged.about | prompt, judged.unjudged)


def _task(template: str, one: Described, regions: str, facts: str) -> Task[Labels]:
    numbered = "".join(f"{number}. {sentence}\n" for number, sentence in enumerate(one.sentences, 1))
    return Task(fill(template, regions, facts, numbered), lambda reply: read_labels(reply, len(one.sentences)))


def read_knowledge(data: Path, images: Sequence[str]) -> dict[str, tuple[str, str]]:
    """What the judge is told about each image: its regions, with corners as fractions of the image, and its facts."""
    facts: dict[str, str] = {}
    for name in FACTS:
        for record in read_records(data / "shr" / name):
            facts |= {str(image): "".join(f"{fact}\n" for fact in said) for image, said in record.items()}
    regions, sizes = read_regions(data / "vg"), read_sizes(data / "vg")
    unknown = [image for image in images if image not in regions]
    if unknown:
        raise DataError(f"{data / 'vg' / 'region_descriptions.json'} has no {some(unknown)}.", "Give VG's own file.")
    found = {}
    for image in images:
        width, height = sizes[image]
        lines = []
        for region in regions[image]:
            x, y, w, h = region.box
            corners = [round(part, 2) for part in (x / width, y / height, (x + w) / width, (y + h) / height)]
            if region.phrase:
                lines.append(f"{corners}: {region.phrase}\n")
        found[image] = "".join(lines), facts.get(image, "")
    return found


class ExactJudge:
    """Labels by annotations that name everything on an image: `data/shr/exact.json`, which toyworld writes.

    `{"names": {name: [synonym, ...]}, "images": {image id: [name, ...]}}`. A sentence that names something absent is a
    hallucination, another one that names something is correct, and one that names nothing cannot be judged.
    """

    def __init__(self, path: Path) -> None:
        held = read_object(path)
        try:
            self.vocabulary = Vocabulary.of(list(held["names"]), held["names"])
            self.images = {image: frozenset(names) for image, names in held["images"].items()}
        except (KeyError, TypeError, AttributeError):
            raise DataError(
                f"{path} is not in the layout of exact annotations.", "docs/shr-amber-mmhal.md has it."
            ) from None

    def label(self, described: Sequence[Described]) -> Judged[Labels]:
        unknown = [one.image for one in described if one.image not in self.images]
        if unknown:
            raise DataError(f"{EXACT} has no {some(unknown)}.", "Give the annotations of the same images.")
        return Judged(
            [tuple(self._label(s, self.images[one.image]) for s in one.sentences) for one in described],
            {"model": "exact annotations"},
        )

    def _label(self, sentence: str, there: frozenset[str]) -> str:
        named = {mention.object for mention in mentions(sentence, self.vocabulary)}
        return HALLUCINATION if named - there else CORRECT if named else CANNOT_JUDGE


def needs_judge(data: Path) -> bool:
    """Whether the folder has no exact annotations to judge by."""
    return not (data / "shr" / EXACT).exists()


def score(data: Path, descriptions: Mapping[str, str], judge: Judge | None) -> dict[str, Any]:
    """SHR and its companions, by the judge, or by exact annotations where there is none.

    Args:
        descriptions: by image id.

    Returns:
        `shr` and `hal_words_ratio` over judged sentences, `hal_..._per_image` over judged images, lengths and
        distinctness over all; `not_judged` counts sentences without a label.
    """
    all_said = [Described(image, sentences_of(text)) for image, text in descriptions.items()]
    described = [one for one in all_said if one.sentences]
    by: SentenceJudge = KnowledgeJudge(judge, data) if judge else ExactJudge(data / "shr" / EXACT)
    judged = by.label(described)
    labels = {one.image: verdict for one, verdict in zip(described, judged.verdicts, strict=True)}
    rows = [_counts(one, labels.get(one.image, ())) for one in all_said]
    columns = dict(zip(_COLUMNS, zip(*rows, strict=True), strict=True)) if rows else dict.fromkeys(_COLUMNS, ())
    total = {name: sum(column) for name, column in columns.items()}
    images, whole = len(all_said), sum(labels.get(one.image, ()) is not None for one in all_said)
    grams = {
        n: [g for g in (distinct(text, n) for text in descriptions.values()) if g is not None] for n in range(1, 5)
    }
    return {
        "shr": ratio(total["hal_sents"], total["judged_sents"]),
        "shr_ci": ratio_interval(columns["hal_sents"], columns["judged_sents"]),
        "hal_words_ratio": ratio(total["hal_words"], total["judged_words"]),
        "hal_words_ratio_ci": ratio_interval(columns["hal_words"], columns["judged_words"]),
        "hal_sents_per_image": ratio(total["hal_sents"], whole),
        "hal_words_per_image": ratio(total["hal_words"], whole),
        "sents_per_image": ratio(total["sents"], images),
        "words_per_image": ratio(total["words"], images),
        **{f"distinct_{n}": mean(shares) for n, shares in grams.items()},
        "sentences": total["sents"],
        "cannot_judge": total["open"],
        "not_judged": total["sents"] - total["judged_sents"],
        "n": images,
        "judge": judged.to_json(),
    }


_COLUMNS = ("sents", "words", "judged_sents", "judged_words", "hal_sents", "hal_words", "open")


def _counts(one: Described, labels: Labels | None) -> tuple[int, ...]:
    words = [len(sentence.split(" ")) for sentence in one.sentences]  # as the original: two spaces make a word
    false = [label == HALLUCINATION for label in labels or ()]
    judged = labels is not None
    return (
        len(words),
        sum(words),
        len(words) * judged,
        sum(words) * judged,
        sum(false),
        sum(w for w, f in zip(words, false, strict=False) if f),
        sum(label == CANNOT_JUDGE for label in labels or ()),
    )
