"""Scores from files alone: no model, and none of its libraries. `relook score`, `eval` and the comparisons use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from relook.data.annotations import Annotations, read_captions, read_coco
from relook.data.samples import Question
from relook.errors import DataError, RecipeError, some
from relook.evaluate.results import EVAL_FILE, provenance
from relook.evaluate.statistics import Ratio, columns, ratio_interval
from relook.evaluate.tasks import chair, pope
from relook.evaluate.tasks.pope import PARSERS, SPLITS
from relook.files import read_object, read_records, read_text, text_hash

LLAVA_QUESTIONS = "llava_pope_test.jsonl"  # LLaVA's own name


# --- a data folder's files


def pope_questions(data: Path) -> dict[str, list[Question]]:
    """A data folder's questions by split; with LLaVA's texts where its question file lies beside POPE's."""
    folder, images = data / "pope", data / "val2014"
    llava = folder / LLAVA_QUESTIONS
    if not llava.exists():
        return {split: pope.read_questions(folder / f"coco_pope_{split}.json", images) for split in SPLITS}
    splits = pope.read_llava_questions(llava, folder, images)
    if missing := [split for split in SPLITS if split not in splits]:
        raise DataError(f"{llava} has no questions of category {some(missing)}.", "Download it again.")
    return {split: splits[split] for split in SPLITS}


def annotation_file(data: Path) -> Path:
    return data / "annotations" / "instances_val2014.json"


def caption_file(data: Path) -> Path | None:
    """What people said of the images, where it is there."""
    path = data / "annotations" / "captions_val2014.json"
    return path if path.exists() else None


def chair_images(annotations: Annotations, pinned: Path) -> list[str]:
    """The images that are described: those that a file lists, one name a line, or all where it is not there."""
    if not pinned.exists():
        return list(annotations.images)
    names = list(dict.fromkeys(line.strip() for line in read_text(pinned).splitlines() if line.strip()))
    if unknown := sorted(set(names) - set(annotations.images)):
        raise DataError(f"{pinned} names images without annotations: {some(unknown)}.", "Remove them from the list.")
    return names


def read_truth(instances: Path, captions: Path | None, images: Sequence[str] | None = None) -> Annotations:
    """Annotations whose objects are the truth by CHAIR's definition: also those that people name in their captions.

    Args:
        captions: COCO's file of them; without it the annotated objects are the truth.
        images: those whose captions are read; all where none are given.
    """
    annotations = read_coco(instances)
    if captions is None:
        return annotations
    said = read_captions(captions)
    said = {image: said[image] for image in (images or annotations.images) if image in said}
    return replace(annotations, objects=chair.truth_of(annotations, said, chair.vocabulary_of(annotations)))


def data_truth(data: Path, images: Sequence[str] | None = None) -> Annotations:
    return read_truth(annotation_file(data), caption_file(data), images)


# --- scores with intervals


def score_pope(
    questions: Sequence[Question], answers: Sequence[Mapping[str, Any]], parser: str = "official"
) -> dict[str, Any]:
    """Confusion counts and rates, with 95 % intervals over images."""
    return _score_rows(pope.match(questions, answers, parser), parser)


def _score_rows(rows: Sequence[pope.PopeRow], parser: str) -> dict[str, Any]:
    return pope.count(rows, parser).to_json() | _intervals(pope.ratios(rows))


def score_chair(captions: Mapping[str, str], annotations: Annotations) -> dict[str, Any]:
    """CHAIR with 95 % intervals over images; the image list is identified by its hash."""
    scored = chair_counts(captions, annotations)
    return scored.to_json() | _intervals(scored.ratios()) | {"image_list": text_hash(*captions)}


def chair_counts(captions: Mapping[str, str], annotations: Annotations) -> chair.ChairScore:
    """CHAIR's counts. Raises DataError where a caption's image has no annotations."""
    truth = {image: annotations.objects[image] for image in captions if image in annotations.objects}
    return chair.score(captions, truth, chair.vocabulary_of(annotations))


def _intervals(ratios: Mapping[str, Ratio]) -> dict[str, Any]:
    return {f"{rate}_ci": ratio_interval(*columns(ratio)) for rate, ratio in ratios.items()}


# --- folders of `relook eval`


def pope_results(data: Path, out: Path, parser: str = "official") -> dict[str, Any]:
    """What `pope.json` says: each split's scores, and where they come from."""
    questions = pope_questions(data)
    results: dict[str, Any] = {
        split: score_pope(asked, pope.read_answers(out / f"pope_{split}.jsonl"), parser)
        for split, asked in questions.items()
    }
    results["provenance"] = provenance(out, pope.LONGEST_ANSWER, parser=parser, **_about(questions))
    return results


def _about(questions: Mapping[str, Sequence[Question]]) -> dict[str, Any]:
    """Hashes of the questions and of their images."""
    texts = {
        split: text_hash(*(part for q in asked for part in (q.image.name, q.text, q.label)))
        for split, asked in questions.items()
    }
    images = dict.fromkeys(q.image.name for asked in questions.values() for q in asked)
    return {"questions": texts, "image_list": text_hash(*images)}


def chair_results(data: Path, out: Path) -> dict[str, Any]:
    """What `chair.json` says."""
    captions = read_descriptions(out / "chair.jsonl")
    result = score_chair(captions, data_truth(data, list(captions)))
    return {**result, "provenance": provenance(out, **_truth(result, caption_file(data)))}


def _truth(result: Mapping[str, Any], captions: Path | None) -> dict[str, Any]:
    return {"truth": "instances and captions" if captions else "instances", "image_list": result["image_list"]}


def read_descriptions(path: Path, annotations: Annotations | None = None) -> dict[str, str]:
    """Read captions by image: records with `caption` (or `text`), and `image`, or COCO's `image_id`.

    Args:
        annotations: say which image has which id.

    Raises:
        DataError: a record lacks one, an image stands twice, or the file holds none.
    """
    ids = annotations.ids if annotations else {}
    found: dict[str, str] = {}
    for number, record in enumerate(read_records(path), 1):
        number_of, text = record.get("image_id"), record.get("caption", record.get("text"))
        image = record.get("image", ids.get(number_of) if isinstance(number_of, int) else None)
        if not isinstance(image, str) or not isinstance(text, str):
            raise DataError(
                f"{path}: record {number} needs caption, and image or the image_id of an annotated image.",
                'Write {"image": file name, "caption": ...}.',
            )
        if image in found:
            raise DataError(f"{path}: {image} stands more than once.", "Remove the duplicates.")
        found[image] = text
    if not found:
        raise DataError(f"{path} holds no caption.", "Give a file of captions.")
    return found


RESULTS: dict[str, Callable[[Path, Path], dict[str, Any]]] = {"pope": pope_results, "chair": chair_results}
COMPARED = tuple(RESULTS)  # the benchmarks by which two models are compared


def read_scores(out: Path, benchmarks: Sequence[str] = COMPARED) -> dict[str, dict[str, Any]]:
    """The scores alone, for tables that say once where all of theirs come from."""
    found = {name: read_object(out / f"{name}.json") for name in benchmarks}
    return {name: {key: v for key, v in scores.items() if key != "provenance"} for name, scores in found.items()}


# --- `relook score`


@dataclass(frozen=True)
class Given:
    """What answers are scored against: a data folder, or single files. `images` lists those that CHAIR describes."""

    data: Path | None = None
    questions: Path | None = None
    annotations: Path | None = None
    captions: Path | None = None
    images: Path | None = None


def score_answers(benchmark: str, answers: Path, given: Given, parser: str = "official") -> dict[str, Any]:
    """Score an answer file made by any program, or a folder of `relook eval` again.

    Args:
        benchmark: one of `RESULTS`.

    Raises:
        RelookError: what is missing, or what does not match; the ids or images are named.
    """
    if parser not in PARSERS:
        raise RecipeError(f"There is no parser {parser!r}.", f"Known ones: {', '.join(PARSERS)}.")
    if answers.is_dir():
        data = given.data or data_of(answers)
        return pope_results(data, answers, parser) if benchmark == "pope" else chair_results(data, answers)
    return _pope_file(answers, given, parser) if benchmark == "pope" else _chair_file(answers, given)


def data_of(out: Path) -> Path:
    """The data folder of a folder of `relook eval`."""
    noted = read_object(out / EVAL_FILE, optional=True).get("data")
    return _needed(Path(noted) if noted else None, "--data", f"{out} does not say what data its answers are about")


def _needed(path: Path | None, option: str, why: str) -> Path:
    if path is None:
        raise RecipeError(f"{why}.", f"Give {option}.")
    return path


def _pope_file(answers: Path, given: Given, parser: str) -> dict[str, Any]:
    file = _needed(given.questions, "--questions, POPE's file", "There are no questions to an answer file")
    said = pope.read_answers(answers)
    if given.annotations is None:
        questions = pope.read_questions(file, Path())
        return score_pope(questions, said, parser) | {"provenance": _of_file(answers, parser, {file.stem: questions})}
    splits = pope.read_llava_questions(file, given.annotations, Path())
    rows = iter(pope.match([q for questions in splits.values() for q in questions], said, parser))
    result = {split: _score_rows(list(islice(rows, len(splits[split]))), parser) for split in splits}
    return result | {"provenance": _of_file(answers, parser, splits)}


def _of_file(answers: Path, parser: str, questions: Mapping[str, Sequence[Question]]) -> dict[str, Any]:
    return provenance(answers, parser=parser, **_about(questions))


def _chair_file(answers: Path, given: Given) -> dict[str, Any]:
    file = _needed(given.annotations, "--annotations, COCO's instances file", "There is no truth about the images")
    annotations = read_coco(file)
    captions = read_descriptions(answers, annotations)
    if given.images is not None:
        names = chair_images(annotations, given.images)
        if missing := [name for name in names if name not in captions]:
            what = f"{len(missing)} images of {given.images} have no caption: {some(missing)}."
            raise DataError(what, "Describe them, too, or take them off the list.")
        captions = {name: captions[name] for name in names}
    result = score_chair(captions, read_truth(file, given.captions, list(captions)))
    return {**result, "provenance": provenance(answers, **_truth(result, given.captions))}
