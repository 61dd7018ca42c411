"""SHR (Zhao et al. 2023, arXiv:2311.16839): the share of hallucinated sentences in descriptions.

The original programs are in opendatalab/HA-DPO, ha_dpo/shr_eval (shr_utils.py, gpt_utils.py, json_eval.py). A judge
reads Visual Genome's region descriptions and the benchmark's facts about an image, and labels each sentence.
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
from relook.data.paths import resolve_extension, shr_file, visual_genome
from relook.data.samples import Question, as_id
from relook.errors import DataError, preview
from relook.evaluate.benchmark import Answers, Benchmark, Questions, answers_provenance
from relook.evaluate.judge import Judge, JudgeResults, Task, fill_template, prompt_template
from relook.evaluate.statistics import mean, ratio_interval, safe_ratio
from relook.evaluate.tasks.chair import Vocabulary, mentions
from relook.files import read_json_object, read_published_records, read_records, read_text

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
class DescribedImage:
    """Image id with the sentences of its description."""

    image: str
    sentences: tuple[str, ...]


class SentenceJudge(Protocol):
    """Interface of judges that give each sentence a label, or None for an image whose sentences were not judged."""

    def label(self, described: Sequence[DescribedImage]) -> JudgeResults[Labels]: ...


def shr_questions(data: Path) -> list[Question]:
    """Build one question per image of `data/shr/val_images_final.json`; the Visual Genome images are in `data/vg`.

    Raises:
        DataError: a file is missing, the list is empty, an image is listed twice or is not Visual Genome's.
    """
    for name in FACTS:
        if not (path := shr_file(data, name)).exists():
            raise DataError(f"{path} does not exist.", SOURCE)
    path, vg = shr_file(data, IMAGES), visual_genome(data)
    try:
        ids = [as_id(record["image_id"]) for record in read_published_records(path, SOURCE)]
    except KeyError:
        raise DataError(f"{path} has a record without image_id.", "Give SHR's own file.") from None
    # Both faults would silently change which images are scored.
    paths = read_image_paths(vg)
    faults = {
        "lists images twice": [i for i, count in Counter(ids).items() if count > 1],
        f"lists images that {vg / 'image_data.json'} has not": [i for i in ids if i not in paths],
    }
    for fault, images in faults.items():
        if images:
            raise DataError(f"{path} {fault}: {preview(images)}.", "Give SHR's own file.")
    return [Question(i, resolve_extension(paths[i]), PROMPT) for i in ids]


def read_shr_descriptions(path: Path) -> list[dict[str, Any]]:
    """Read relook's records, or HA-DPO's layout: one object that maps image ids to descriptions."""
    try:
        document = json.loads(read_text(path))
    except ValueError:
        return read_records(path)  # JSON lines are not one JSON value
    # A file of one record is a single object, too; a record has an image_id.
    if isinstance(document, dict) and "image_id" not in document:
        return [{"image_id": image, "description": text} for image, text in document.items()]
    return read_records(path)


def sentences_of(text: str) -> tuple[str, ...]:
    """Split a text at full stops into the sentences to judge, without those contained in an earlier one."""
    sentences: list[str] = []
    # A sentence that is part of an earlier one is not judged again; "3.5" is split, too.
    for sentence in map(str.strip, text.split(".")):
        if sentence and not any(sentence in earlier for earlier in sentences):
            sentences.append(sentence)
    return tuple(sentences)


def distinct(text: str, n: int) -> float | None:
    """Return distinct word n-grams / word n-grams; None for fewer than n words.

    The original calls this n-gram repetition.
    """
    words = re.sub(r"[.:\n?,]", "", text).split()
    grams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else None


def read_labels(reply: str, count: int) -> Labels | None:
    """Parse a judge's labels; None unless the lines after "Judgement:" are labelled and numbered 1 to `count`."""
    head = re.search(r"judge?ment:", reply, re.IGNORECASE)
    if head is None:
        return None
    # A judge that skips or repeats a number leaves it open which sentence a label is for: read all or nothing.
    lines = [line for line in reply[head.end() :].split("\n") if re.match(r"\s*\d+[.)]", line)]
    matches = [_LABEL.match(line) for line in lines]
    if [match and int(match[1]) for match in matches] != list(range(1, count + 1)):
        return None
    return tuple(match[2].lower() for match in matches if match)


@dataclass(frozen=True)
class KnowledgeJudge:
    """Language-model judge that is given the known facts about each image.

    The prompt is the original's if `data/shr/gpt_utils.py` exists, else relook's own.
    """

    judge: Judge
    data: Path

    def label(self, described: Sequence[DescribedImage]) -> JudgeResults[Labels]:
        template, prompt = prompt_template(shr_file(self.data, "gpt_utils.py"), "GPT_JUDGE_PROMPT", TEMPLATE)
        knowledge = read_knowledge(self.data, [description.image for description in described])
        judged = self.judge.ask(
            [_task(template, description, *knowledge[description.image]) for description in described],
            REQUEST,
            "SHR judge",
        )
        return JudgeResults(judged.verdicts, judged.details | prompt, judged.unjudged)


def _task(template: str, description: DescribedImage, regions: str, facts: str) -> Task[Labels]:
    numbered = "".join(f"{number}. {sentence}\n" for number, sentence in enumerate(description.sentences, 1))
    return Task(
        fill_template(template, regions, facts, numbered), lambda reply: read_labels(reply, len(description.sentences))
    )


def read_knowledge(data: Path, images: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Read what the judge is told about each image: regions, with corners as fractions of the image, and facts."""
    facts: dict[str, str] = {}
    for name in FACTS:
        for record in read_records(shr_file(data, name)):
            # A record maps image ids to lists of facts; later files replace earlier facts about the same image.
            facts |= {as_id(image): "".join(f"{fact}\n" for fact in of_image) for image, of_image in record.items()}
    vg = visual_genome(data)
    regions, sizes = read_regions(vg), read_sizes(vg)
    unknown = [image for image in images if image not in regions]
    if unknown:
        raise DataError(f"{vg / 'region_descriptions.json'} has no {preview(unknown)}.", "Give VG's own file.")
    knowledge = {}
    for image in images:
        width, height = sizes[image]
        lines = []
        for region in regions[image]:
            x, y, w, h = region.box  # pixels
            corners = [round(part, 2) for part in (x / width, y / height, (x + w) / width, (y + h) / height)]
            if region.phrase:
                lines.append(f"{corners}: {region.phrase}\n")
        knowledge[image] = "".join(lines), facts.get(image, "")
    return knowledge


class ExactJudge:
    """Judge by exhaustive annotations of each image, `data/shr/exact.json`, which toyworld writes.

    The layout is `{"names": {name: [synonym, ...]}, "images": {image id: [name, ...]}}`. A sentence that names an
    absent object is a hallucination. One that names only present objects is correct, and one that names none cannot
    be judged.
    """

    def __init__(self, path: Path) -> None:
        annotations = read_json_object(path)
        try:
            self.vocabulary = Vocabulary.of(list(annotations["names"]), annotations["names"])
            self.images = {image: frozenset(names) for image, names in annotations["images"].items()}
        except (KeyError, TypeError, AttributeError):
            raise DataError(
                f"{path} is not in the layout of exact annotations.", "docs/shr-amber-mmhal.md has it."
            ) from None

    def label(self, described: Sequence[DescribedImage]) -> JudgeResults[Labels]:
        unknown = [description.image for description in described if description.image not in self.images]
        if unknown:
            raise DataError(f"{EXACT} has no {preview(unknown)}.", "Give the annotations of the same images.")
        return JudgeResults(
            [
                tuple(self._label(s, self.images[description.image]) for s in description.sentences)
                for description in described
            ],
            {"model": "exact annotations"},
        )

    def _label(self, sentence: str, present: frozenset[str]) -> str:
        # One absent object is enough, whatever else the sentence names.
        mentioned = {mention.object for mention in mentions(sentence, self.vocabulary)}
        return HALLUCINATION if mentioned - present else CORRECT if mentioned else CANNOT_JUDGE


def needs_judge(data: Path) -> bool:
    """Return True if the folder has no exact annotations, so that a judge is needed."""
    return not shr_file(data, EXACT).exists()


def score_shr(data: Path, descriptions: Mapping[str, str], judge: Judge | None) -> dict[str, Any]:
    """Compute SHR and its companion figures, by the judge, or by exact annotations if there is no judge.

    Args:
        descriptions: descriptions by image id.

    Returns:
        `shr` and `hal_words_ratio` over judged sentences, `hal_..._per_image` over judged images, lengths and
        distinctness over all. `judged` and `not_judged` count sentences with and without a label. If every label is
        "cannot judge", the rates are None.

    Raises:
        RelookError: the judge labelled no sentence.
    """
    split = [DescribedImage(image, sentences_of(text)) for image, text in descriptions.items()]
    described = [description for description in split if description.sentences]  # an empty text has nothing to judge
    sentence_judge: SentenceJudge = KnowledgeJudge(judge, data) if judge else ExactJudge(shr_file(data, EXACT))
    judged = sentence_judge.label(described)
    labels = {description.image: verdict for description, verdict in zip(described, judged.verdicts, strict=True)}
    rows = [_counts(description, labels.get(description.image, ())) for description in split]
    # One row per image becomes one column per count: the bootstrap resamples images.
    columns = dict(zip(_COLUMNS, zip(*rows, strict=True), strict=True)) if rows else dict.fromkeys(_COLUMNS, ())
    total = {name: sum(column) for name, column in columns.items()}
    # An image without sentences counts as judged, one whose sentences got no label (None) does not.
    images, judged_images = len(split), sum(labels.get(description.image, ()) is not None for description in split)
    # If every label is "cannot judge", zero denominators turn the rates into None.
    if total["open"] == total["judged_sents"]:
        columns |= dict.fromkeys(("judged_sents", "judged_words"), (0,) * images)
        judged_images = 0
    grams = {
        n: [g for g in (distinct(text, n) for text in descriptions.values()) if g is not None] for n in range(1, 5)
    }
    return {
        "shr": safe_ratio(total["hal_sents"], sum(columns["judged_sents"])),
        "shr_ci": ratio_interval(columns["hal_sents"], columns["judged_sents"]),
        "hal_words_ratio": safe_ratio(total["hal_words"], sum(columns["judged_words"])),
        "hal_words_ratio_ci": ratio_interval(columns["hal_words"], columns["judged_words"]),
        "hal_sents_per_image": safe_ratio(total["hal_sents"], judged_images),
        "hal_words_per_image": safe_ratio(total["hal_words"], judged_images),
        "sents_per_image": safe_ratio(total["sents"], images),
        "words_per_image": safe_ratio(total["words"], images),
        **{f"distinct_{n}": mean(shares) for n, shares in grams.items()},
        "sentences": total["sents"],
        "cannot_judge": total["open"],
        "judged": total["judged_sents"],
        "not_judged": total["sents"] - total["judged_sents"],
        "n": images,
        "judge": judged.to_json(),
    }


# What `_counts` counts per image; "open" sentences are those labelled "cannot judge".
_COLUMNS = ("sents", "words", "judged_sents", "judged_words", "hal_sents", "hal_words", "open")


def _counts(description: DescribedImage, labels: Labels | None) -> tuple[int, ...]:
    words = [len(sentence.split(" ")) for sentence in description.sentences]  # as the original: two spaces make a word
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


def _results(data: Path, questions: Questions, answers: Answers, location: Path, judge: Judge | None) -> dict[str, Any]:
    settings = dict(BENCHMARK.generate) if location.is_dir() else {}  # how other programs generated is unknown
    result = score_shr(data, BENCHMARK.texts(answers), judge)
    return result | answers_provenance(location, questions, answers, **settings)


BENCHMARK = Benchmark(
    "descriptions for SHR",
    questions=lambda data: {"shr": shr_questions(data)},
    score=_results,
    id_field="image_id",
    text_field="description",
    question_field="",
    generate=(("num_beams", 5),),
    needs_judge=needs_judge,
    judge_request=REQUEST,
    read_answers=read_shr_descriptions,
)
