"""CHAIR (Rohrbach et al. 2018, arXiv:1809.02156): objects that a caption names but the image does not contain.

The rules follow utils/chair.py of LisaAnne/Hallucination. The original singularizes words with a library. Here a
vocabulary lists singulars and plurals, so nothing has to be installed and a mention keeps its position in the text.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from relook.data.annotations import Annotations, read_captions, read_coco
from relook.data.paths import coco_annotations, coco_images, resolve_extension
from relook.data.samples import Question, as_id
from relook.errors import DataError, preview
from relook.evaluate.benchmark import Benchmark, ScoringInputs, require_option
from relook.evaluate.results import data_folder_of, provenance
from relook.evaluate.statistics import (
    Ratio,
    discordant_counts,
    mcnemar,
    rate_difference,
    rate_intervals,
    safe_ratio,
    to_columns,
)
from relook.files import file_hash, read_records, read_text, text_hash

CHAIR_PROMPT = "Describe this image in detail."
# A hyphen belongs to its word, as in "man-made", and so does an apostrophe, as in "o'clock", that ends no verb or noun.
WORD = r"\w+(?:-\w+|['’](?!(?:s|d|m|t|ll|re|ve)\b)\w+)*"
_WORD = re.compile(WORD)
# Phrases whose words would name an object, though the phrase does not: an animal is no baby and a jet no passenger.
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe")
_NO_OBJECT = ("baby animal", "adult animal", "baby cub", "adult cub", "home plate", "train track")
_IRREGULAR = {"child": "children", "goose": "geese", "mouse": "mice", "ox": "oxen", "person": "people"} | {
    name: name for name in ("sheep", "people", "cattle", "aircraft", "scissors", "skis", "luggage")
}


# ----------------------------------------------------------------------------------------------------
# Mentions of objects in a text.


@dataclass(frozen=True)
class Mention:
    """Mention of an object in a text, at characters `start` to `end` (exclusive)."""

    object: str
    start: int
    end: int


@dataclass(frozen=True)
class Vocabulary:
    """Mapping of words and phrases to the objects that they name.

    Args:
        phrases: maps a surface form (lower case, single spaces, singular or plural) to its object, or to "" for none.
        hidden_by: surface forms that do not count if one of certain others occurs in the same text.
    """

    phrases: Mapping[str, str]
    hidden_by: Mapping[str, Collection[str]] = field(default_factory=dict)

    @cached_property
    def longest(self) -> int:
        """Return the number of words in the longest phrase."""
        return max((len(_WORD.findall(phrase)) for phrase in self.phrases), default=0)

    @cached_property
    def plurals(self) -> frozenset[str]:
        """Return the phrases that are plurals of other phrases and differ from them."""
        return (
            frozenset(form for phrase in self.phrases for form in plurals(phrase) if form != phrase)
            & self.phrases.keys()
        )

    @staticmethod
    def of(names: Sequence[str], synonyms: Mapping[str, Sequence[str]] | None = None) -> Vocabulary:
        """Build a vocabulary from object names and synonyms; names override synonyms, and both override plurals."""
        phrases = {_surface_form(name): name for name in names}
        for name in names:
            for word in (synonyms or {}).get(name, ()):
                phrases.setdefault(_surface_form(word), name)
        return Vocabulary(_with_plurals(phrases))


def vocabulary_of(annotations: Annotations) -> Vocabulary:
    """Return CHAIR's vocabulary if the categories are COCO's 80, else one built from the annotations."""
    # COCO's own list has synonyms and rules that published figures rest on; any other dataset brings its names.
    coco = coco_vocabulary()
    if set(annotations.categories) == set(coco.phrases.values()) - {""} and not annotations.synonyms:
        return coco
    return Vocabulary.of(annotations.categories, annotations.synonyms)


@cache
def coco_vocabulary() -> Vocabulary:
    """Load CHAIR's vocabulary of COCO's 80 objects, with its rules for double words, from `coco_synonyms.txt`."""
    text = files("relook.evaluate").joinpath("coco_synonyms.txt").read_text(encoding="utf-8")
    return chair_vocabulary([line.split(", ") for line in text.splitlines() if line and not line.startswith("#")])


def chair_vocabulary(rows: Sequence[Sequence[str]]) -> Vocabulary:
    """Build a vocabulary with CHAIR's rules for double words from rows of an object and its synonyms in COCO."""
    phrases = {word: row[0] for row in rows for word in row}
    animals = [animal for animal in _ANIMALS if animal in phrases]
    phrases |= {f"{age} {animal}": phrases[animal] for animal in animals for age in ("baby", "adult")}
    phrases |= {"passenger jet": "airplane", "passenger train": "train", "toilet seat": "toilet"}
    phrases |= dict.fromkeys(_NO_OBJECT, "")
    # "The seat of the toilet" names no chair.
    toilet = frozenset(_with_plurals(dict.fromkeys(("toilet", "toilet seat"), "toilet")))
    return Vocabulary(_with_plurals(phrases), dict.fromkeys(("seat", "seats"), toilet))


def _surface_form(phrase: str) -> str:
    return " ".join(phrase.lower().split())


def _with_plurals(phrases: Mapping[str, str]) -> dict[str, str]:
    # The right-hand side wins: a word of the list over any plural, and a correct plural over a merely regular one.
    regular = {form: name for phrase, name in phrases.items() for form in plurals(phrase)[1:]}
    return regular | {plural(phrase): name for phrase, name in phrases.items()} | dict(phrases)


def plurals(phrase: str) -> list[str]:
    """Return the plural of a noun or phrase, then the regular forms that people also write: persons, buffaloes, mouses.

    The original strips -s and -es from any word, so it counts these too, right or wrong.
    """
    return [
        plural(phrase),
        *([] if phrase.endswith("s") else [phrase + "s"]),
        *([phrase + "es"] * phrase.endswith("o")),
    ]


def plural(phrase: str) -> str:
    """Return the plural of a lower-case noun, or of a phrase with its last word in the plural."""
    head, space, word = phrase.rpartition(" ")
    if word in _IRREGULAR:
        form = _IRREGULAR[word]
    elif word.endswith("child"):
        form = word + "ren"
    elif word.endswith("man") and word not in ("human", "german"):
        form = word[:-3] + "men"
    elif re.search(r"([nlw]ife|(thie|shel|lea|loa|cal|hal|wol|scar)f)$", word):
        form = re.sub(r"fe?$", "ves", word)
    elif re.search(r"(s|x|z|ch|sh)$", word):
        form = word + "es"
    elif re.search(r"[^aeiou]y$", word):
        form = word[:-1] + "ies"
    else:
        form = word + "s"
    return head + space + form


def mentions(text: str, vocabulary: Vocabulary) -> list[Mention]:
    """Find every mention of an object, in order: whole words only, ignoring case, and the longest phrase wins."""
    # Match words by their positions, so that a mention keeps its place in the text as written.
    words = [match.span() for match in _WORD.finditer(text)]
    matches: list[tuple[str, int, int]] = []
    first = 0
    while first < len(words):
        # A dictionary lookup per length, not one pattern: Visual Genome has tens of thousands of names.
        for last in range(min(first + vocabulary.longest, len(words)) - 1, first - 1, -1):
            start, end = words[first][0], words[last][1]
            surface = _surface_form(text[start:end])
            if surface in vocabulary.phrases:
                matches.append((surface, start, end))
                first = last
                break
        first += 1
    # Phrases that name no object, or that another phrase in the text hides, are dropped only after matching.
    surfaces = {surface for surface, _, _ in matches}
    return [
        Mention(vocabulary.phrases[surface], start, end)
        for surface, start, end in matches
        if vocabulary.phrases[surface] and surfaces.isdisjoint(vocabulary.hidden_by.get(surface, ()))
    ]


# ----------------------------------------------------------------------------------------------------
# Which objects are in an image.


def truth_of(
    annotations: Annotations, human_captions: Mapping[str, Iterable[str]], vocabulary: Vocabulary
) -> dict[str, frozenset[str]]:
    """Return the objects in each image by CHAIR's definition: annotated ones, and those named in human captions.

    Published COCO figures use both (`relook.data.annotations.read_captions`); annotations alone give higher rates.
    """
    return {
        image: annotated
        | {m.object for caption in human_captions.get(image, ()) for m in mentions(caption, vocabulary)}
        for image, annotated in annotations.objects.items()
    }


def instances_file(data: Path) -> Path:
    return coco_annotations(data, "instances")


def caption_file(data: Path) -> Path | None:
    """Return the path of the human captions; None if the file does not exist."""
    path = coco_annotations(data, "captions")
    return path if path.exists() else None


def read_truth(instances: str | Path, captions: str | Path | None, images: Sequence[str] | None = None) -> Annotations:
    """Read annotations whose objects are the truth by CHAIR's definition, including objects named in human captions.

    Args:
        captions: COCO's captions file; without it, the annotated objects alone are the truth.
        images: images whose captions are read; all by default.
    """
    instances = Path(instances)
    captions = None if captions is None else Path(captions)
    annotations = read_coco(instances)
    if captions is None:
        return annotations
    human = read_captions(captions)
    # Finding mentions is the slow part: skip captions of images that are not scored.
    human = {image: human[image] for image in (images or annotations.images) if image in human}
    return replace(annotations, objects=truth_of(annotations, human, vocabulary_of(annotations)))


def data_truth(data: Path, images: Sequence[str] | None = None) -> Annotations:
    """Read a data folder's truth; see `read_truth`."""
    return read_truth(instances_file(data), caption_file(data), images)


# ----------------------------------------------------------------------------------------------------
# Questions and captions.


PINNED = "chair_images.txt"  # in a data folder: the images to describe


def chair_images(annotations: Annotations, pinned: Path) -> list[str]:
    """Return the images to describe: those that the file `pinned` lists, or all if it is missing.

    A line is a file name, COCO's number, or a record with `image` or `image_id`, as in published caption files.
    """
    if not pinned.exists():
        return list(annotations.images)
    lines = [line.strip() for line in read_text(pinned).splitlines() if line.strip()]
    names = list(dict.fromkeys(_listed_image(line, annotations) for line in lines))
    if unknown := sorted(set(names) - set(annotations.images)):
        raise DataError(f"{pinned} names images without annotations: {preview(unknown)}.", "Remove them from the list.")
    return names


def _listed_image(line: str, annotations: Annotations) -> str:
    try:
        record = json.loads(line)
    except ValueError:  # a file name
        return line
    key = record.get("image", record.get("image_id")) if isinstance(record, dict) else record
    return annotations.ids.get(as_id(key), str(key))


def _image_list(pinned: Path | None) -> dict[str, Any]:
    """Name the file that lists the images, with the hash of its bytes, for a result's provenance."""
    if pinned is None or not pinned.exists():
        return {}
    return {"image_list_file": {"name": pinned.name, "sha256": file_hash(pinned)}}


def chair_questions(data: Path) -> list[Question]:
    """Build questions for the annotated images, or for those in `PINNED` if the data folder has such a list."""
    names = chair_images(read_coco(instances_file(data)), data / PINNED)
    images = coco_images(data)
    return [Question(name, resolve_extension(images / name), CHAIR_PROMPT) for name in names]


def read_captions_by_image(path: str | Path, annotations: Annotations | None = None) -> dict[str, str]:
    """Read captions by image: records with `caption` (or `text`), and `image`, or COCO's `image_id`.

    Args:
        annotations: annotations that map image ids to images.

    Raises:
        DataError: a record lacks its caption or image, an image occurs twice, or the file holds no caption.
    """
    path = Path(path)
    images = annotations.ids if annotations else {}  # file names by COCO's image id
    captions: dict[str, str] = {}
    for number, record in enumerate(read_records(path), 1):
        image_id, caption = record.get("image_id"), record.get("caption", record.get("text"))
        image = record.get("image", images.get(as_id(image_id)))
        if not isinstance(image, str) or not isinstance(caption, str):
            raise DataError(
                f"{path}: record {number} needs caption, and image or the image_id of an annotated image.",
                'Write {"image": file name, "caption": ...}.',
            )
        if image in captions:
            raise DataError(f"{path}: {image} stands more than once.", "Remove the duplicates.")
        captions[image] = caption
    if not captions:
        raise DataError(f"{path} holds no caption.", "Give a file of captions.")
    return captions


def read_eval_captions(folder: Path) -> dict[str, str]:
    """Read the captions of a `relook eval chair` folder, by image."""
    return read_captions_by_image(folder / "chair.jsonl")


# ----------------------------------------------------------------------------------------------------
# Scores.


@dataclass(frozen=True)
class ChairScore:
    """CHAIR counts over captions; the tuples hold one count per image, in the order of `images`.

    Captions without any mention add nothing to `chair_i` and, as in the original, count as free of hallucination in
    `chair_s`. `empty` reports their share, and they lower `recall`, so that saying nothing is not mistaken for
    accuracy. Rates are fractions; a rate with a zero denominator is None.
    """

    images: tuple[str, ...]
    mentioned: tuple[int, ...]  # mentions of objects
    hallucinated: tuple[int, ...]  # of these, of absent ones
    covered: tuple[int, ...]  # distinct present objects that were named
    present: tuple[int, ...]  # distinct present objects
    words: tuple[int, ...]  # separated by white space

    @property
    def n(self) -> int:
        return len(self.images)

    @property
    def chair_i(self) -> float | None:
        """Return mentions of absent objects / mentions."""
        return safe_ratio(sum(self.hallucinated), sum(self.mentioned))

    @property
    def chair_s(self) -> float | None:
        """Return captions that mention an absent object / captions."""
        return safe_ratio(sum(count > 0 for count in self.hallucinated), self.n)

    @property
    def recall(self) -> float | None:
        """Return distinct present objects that were named / distinct present objects, summed over images."""
        return safe_ratio(sum(self.covered), sum(self.present))

    @property
    def length(self) -> float | None:
        """Return the mean number of words."""
        return safe_ratio(sum(self.words), self.n)

    @property
    def empty(self) -> float | None:
        """Return captions without any mention / captions."""
        return safe_ratio(sum(count == 0 for count in self.mentioned), self.n)

    def ratios(self) -> dict[str, Ratio]:
        """Return each rate's (numerator, denominator) pairs, one per image."""
        return {
            "chair_i": list(zip(self.hallucinated, self.mentioned, strict=True)),
            "chair_s": [(int(count > 0), 1) for count in self.hallucinated],
            "recall": list(zip(self.covered, self.present, strict=True)),
            "length": [(count, 1) for count in self.words],
        }

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("chair_i", "chair_s", "recall", "length", "empty", "n")}


def score_captions(
    captions: Mapping[str, str], truth: Mapping[str, Collection[str]], vocabulary: Vocabulary
) -> ChairScore:
    """Count mentions in each image's caption against the objects that are present.

    Raises:
        DataError: the objects of some images are not known; the message names them.
    """
    unknown = [image for image in captions if image not in truth]
    if unknown:
        raise DataError(f"There are no annotations for {preview(unknown)}.", "Give the annotations of the same images.")
    return count_objects({i: [m.object for m in mentions(c, vocabulary)] for i, c in captions.items()}, captions, truth)


def count_objects(
    objects: Mapping[str, Sequence[str]], captions: Mapping[str, str], truth: Mapping[str, Collection[str]]
) -> ChairScore:
    """Count each image's mentioned objects against those that are present.

    Args:
        objects: mentioned objects, in order, by image.
        captions: texts by image, for their lengths.
        truth: objects that are present, by image.
    """
    rows = []
    for image, names in objects.items():
        # An object that is named twice counts twice in CHAIR_i, as in the original, but once in recall.
        present = set(truth[image])
        absent, covered = sum(name not in present for name in names), len(present & set(names))
        rows.append((image, len(names), absent, covered, len(present), len(captions[image].split())))
    # One tuple per column; zip of no rows has no columns, so an empty score is spelled out.
    return ChairScore(*(tuple(column) for column in zip(*rows, strict=True))) if rows else ChairScore(*((),) * 6)


def chair_counts(captions: Mapping[str, str], annotations: Annotations) -> ChairScore:
    """Count mentions against a dataset's annotations.

    Raises:
        DataError: a caption's image has no annotations.
    """
    truth = {image: annotations.objects[image] for image in captions if image in annotations.objects}
    return score_captions(captions, truth, vocabulary_of(annotations))


def score_chair(captions: Mapping[str, str], annotations: Annotations) -> dict[str, Any]:
    """Compute CHAIR with 95 % intervals over images; a hash identifies the image list."""
    score = chair_counts(captions, annotations)
    rates = score.to_json() | rate_intervals(score.ratios())
    return rates | {"by_third": chair_by_third(captions, annotations), "image_list": text_hash(*captions)}


def chair_by_third(captions: Mapping[str, str], annotations: Annotations) -> dict[str, Any]:
    """Compute CHAIR_i of the mentions in each third of the captions, by the word that a mention begins with.

    Models make up more towards the end of a description, so a model may score better by ending earlier alone.
    """
    vocabulary, result = vocabulary_of(annotations), {}
    for number, name in enumerate(("first", "second", "last")):
        pairs = []
        for image, caption in captions.items():
            located = located_mentions(caption, vocabulary)
            names = [m for begin, _, m in located if 3 * begin // len(caption.split()) == number]
            pairs.append((sum(m not in annotations.objects[image] for m in names), len(names)))
        tops, bottoms = to_columns(pairs)
        result[name] = {"chair_i": safe_ratio(sum(tops), sum(bottoms)), **rate_intervals({"chair_i": pairs})}
    return result


def located_mentions(text: str, vocabulary: Vocabulary) -> list[tuple[int, int, str]]:
    """Return every mention as (first word, words up to its end, object); words are separated by white space."""
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    return [
        (bisect_right(starts, m.start) - 1, bisect_left(starts, m.end), m.object) for m in mentions(text, vocabulary)
    ]


def chair_results(data: Path, out: Path) -> dict[str, Any]:
    """Compute the contents of `chair.json`: CHAIR's scores, and their provenance."""
    captions = read_eval_captions(out)
    result = score_chair(captions, data_truth(data, list(captions)))
    return {**result, "provenance": provenance(out, **_truth(result, caption_file(data), data / PINNED))}


def _truth(result: Mapping[str, Any], captions: Path | None, pinned: Path | None) -> dict[str, Any]:
    truth = "instances and captions" if captions else "instances"
    return {"truth": truth, "image_list": result["image_list"], **_image_list(pinned)}


def rescore_chair(answers: Path, inputs: ScoringInputs, parser: str = "") -> dict[str, Any]:
    """Score a caption file made by any program, or a folder of `relook eval` again; no parser is involved.

    Raises:
        RelookError: something is missing or does not match; the message names the images.
    """
    if answers.is_dir():
        return chair_results(inputs.data or data_folder_of(answers), answers)
    file = require_option(
        inputs.annotations, "--annotations, COCO's instances file", "There is no truth about the images"
    )
    annotations = read_coco(file)
    captions = read_captions_by_image(answers, annotations)
    if inputs.images is not None:
        names = chair_images(annotations, inputs.images)
        if missing := [name for name in names if name not in captions]:
            fault = f"{len(missing)} images of {inputs.images} have no caption: {preview(missing)}."
            raise DataError(fault, "Describe them, too, or take them off the list.")
        captions = {name: captions[name] for name in names}
    result = score_chair(captions, read_truth(file, inputs.captions, list(captions)))
    return {**result, "provenance": provenance(answers, **_truth(result, inputs.captions, inputs.images))}


# ----------------------------------------------------------------------------------------------------
# Two models at equal coverage: captions cut after the same share of the objects, so that silence does not win.


def coverage_curve(captions: Mapping[str, str], annotations: Annotations) -> list[ChairScore]:
    """Score the captions cut after 1, 2, ... words; the last score is that of the whole captions."""
    vocabulary = vocabulary_of(annotations)
    truth = {image: annotations.objects[image] for image in captions}
    located = {image: located_mentions(caption, vocabulary) for image, caption in captions.items()}
    words = {image: caption.split() for image, caption in captions.items()}
    curve = []
    for length in range(1, max([1, *map(len, words.values())]) + 1):  # a point also where all captions are empty
        mentioned = {image: [name for _, end, name in of_image if end <= length] for image, of_image in located.items()}
        cut = {image: " ".join(of_image[:length]) for image, of_image in words.items()}
        curve.append(count_objects(mentioned, cut, truth))
    return curve


def equal_coverage(first: Sequence[ChairScore], second: Sequence[ChairScore]) -> dict[str, Any]:
    """Compare two models at the recall that both reach: each is cut after the first word at which it has it.

    Args:
        first, second: the models' curves over the same images in the same order (`coverage_curve`).

    Returns:
        The shared `recall`, and per model `words`, `recalls` and `chair_i` at its cut; the difference second - first of
        CHAIR_i with its paired interval over images; and the curves as [words, recall, CHAIR_i] for plots.
    """
    sides = (first, second)
    shared = min(max(score.recall or 0.0 for score in side) for side in sides)
    cuts = [next(n for n, score in enumerate(side) if (score.recall or 0.0) >= shared) for side in sides]
    scores = [side[cut] for side, cut in zip(sides, cuts, strict=True)]
    return {
        "recall": shared,
        "words": [cut + 1 for cut in cuts],
        "recalls": [score.recall for score in scores],
        "chair_i": [score.chair_i for score in scores],
        **rate_difference(*([score.ratios()["chair_i"]] for score in scores)),
        "curves": [[[n, score.recall, score.chair_i] for n, score in enumerate(side, 1)] for side in sides],
    }


def compare_coverage(data: Path, first: Path, second: Path) -> dict[str, Any]:
    """Compare two `relook eval` folders at equal coverage; see `equal_coverage`."""
    sides = _captions_of_both(first, second)
    annotations = data_truth(data, list(sides[0]))
    curves = [coverage_curve({image: side[image] for image in sides[0]}, annotations) for side in sides]
    return equal_coverage(*curves)


# ----------------------------------------------------------------------------------------------------
# Two models.


def compare_chair(runs: Sequence[tuple[Path, Path, Path]]) -> dict[str, Any]:
    """Compute the differences second - first of the rates, over the images of several (data, first, second) runs."""
    scores = [_scores_of_both(*run) for run in runs]
    sides = [[run[side] for run in scores] for side in (0, 1)]
    rates = [[run.ratios() for run in side] for side in sides]
    differences = {rate: rate_difference(*([run[rate] for run in side] for side in rates)) for rate in rates[0][0]}
    free = [[count == 0 for run in side for count in run.hallucinated] for side in sides]
    differences["chair_s"]["mcnemar_p"] = mcnemar(*discordant_counts(*free))
    return differences


def differing_captions(data: Path, first: Path, second: Path) -> list[dict[str, Any]]:
    """Return the images whose captions name other absent objects, or other present ones; the most different first.

    Absent objects are compared with their counts, since each mention counts in CHAIR_i; present ones count once.
    """
    sides = _captions_of_both(first, second)
    truth = data_truth(data, list(sides[0]))
    vocabulary, rows = vocabulary_of(truth), []
    for image in sides[0]:
        captions = [side[image] for side in sides]
        objects = [[mention.object for mention in mentions(caption, vocabulary)] for caption in captions]
        absent = [[name for name in side if name not in truth.objects[image]] for side in objects]
        present = [sorted(set(side) & truth.objects[image]) for side in objects]
        if Counter(absent[0]) != Counter(absent[1]) or present[0] != present[1]:
            row = {"image": image, "objects": sorted(truth.objects[image])}
            rows.append({**row, "captions": captions, "hallucinated": absent, "named": present})
    return sorted(rows, key=lambda row: -abs(len(row["hallucinated"][0]) - len(row["hallucinated"][1])))


def _captions_of_both(first: Path, second: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Read both folders' captions, which must cover the same images; those of the second are in any order."""
    sides = read_eval_captions(first), read_eval_captions(second)
    if unpaired := sorted(sides[0].keys() ^ sides[1].keys()):
        raise DataError(
            f"Only one of {first} and {second} describes {preview(unpaired)}.", "Give captions of equal lists."
        )
    return sides


def _scores_of_both(data: Path, first: Path, second: Path) -> list[ChairScore]:
    sides = _captions_of_both(first, second)
    annotations = data_truth(data, list(sides[0]))
    # Both in the first one's order of images, so that resampled images are the same.
    return [chair_counts({image: side[image] for image in sides[0]}, annotations) for side in sides]


BENCHMARK = Benchmark(
    "descriptions for CHAIR",
    questions=lambda data: {"chair": chair_questions(data)},
    score=lambda data, questions, answers, folder, judge: chair_results(data, folder),
    id_field="image",
    text_field="caption",
    question_field="",
    rescore=rescore_chair,
    compare=compare_chair,
    differing=differing_captions,
)
