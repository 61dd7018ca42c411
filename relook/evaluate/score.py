"""Scores from files alone, without a model or its libraries; used by `relook score`, `eval` and the comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from relook.data.annotations import Annotations, read_captions, read_coco
from relook.data.paths import coco_annotations, coco_images, pope_file
from relook.data.samples import Question, as_id
from relook.errors import DataError, RecipeError, preview
from relook.evaluate.results import EVAL_FILE, provenance
from relook.evaluate.statistics import Ratio, ratio_interval, to_columns
from relook.evaluate.tasks import chair, pope
from relook.evaluate.tasks.pope import PARSERS, SPLITS
from relook.files import make_paths, read_json_object, read_records, read_text, text_hash

LLAVA_QUESTIONS = "llava_pope_test.jsonl"  # LLaVA's own name


# --- a data folder's files


def pope_questions(data: Path) -> dict[str, list[Question]]:
    """Read a data folder's questions by split, with LLaVA's texts if its question file is next to POPE's."""
    files, images = {split: pope_file(data, split) for split in SPLITS}, coco_images(data)
    llava = files[SPLITS[0]].with_name(LLAVA_QUESTIONS)
    if not llava.exists():
        return {split: pope.read_pope_questions(file, images) for split, file in files.items()}
    splits = pope.read_llava_questions(llava, llava.parent, images)
    if missing := [split for split in SPLITS if split not in splits]:
        raise DataError(f"{llava} has no questions of category {preview(missing)}.", "Download it again.")
    return {split: splits[split] for split in SPLITS}


def annotation_file(data: Path) -> Path:
    return coco_annotations(data, "instances")


def caption_file(data: Path) -> Path | None:
    """Return the path of the human captions; None if the file does not exist."""
    path = coco_annotations(data, "captions")
    return path if path.exists() else None


def chair_images(annotations: Annotations, pinned: Path) -> list[str]:
    """Return the images to describe: those listed in the file `pinned`, one name per line, or all if it is missing."""
    if not pinned.exists():
        return list(annotations.images)
    names = list(dict.fromkeys(line.strip() for line in read_text(pinned).splitlines() if line.strip()))
    if unknown := sorted(set(names) - set(annotations.images)):
        raise DataError(f"{pinned} names images without annotations: {preview(unknown)}.", "Remove them from the list.")
    return names


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
    said = read_captions(captions)
    said = {image: said[image] for image in (images or annotations.images) if image in said}
    return replace(annotations, objects=chair.truth_of(annotations, said, chair.vocabulary_of(annotations)))


def data_truth(data: Path, images: Sequence[str] | None = None) -> Annotations:
    return read_truth(annotation_file(data), caption_file(data), images)


# --- scores with intervals


def score_pope(
    questions: Sequence[Question], answers: Sequence[Mapping[str, Any]], parser: str = "official"
) -> dict[str, Any]:
    """Compute POPE's confusion counts and rates, with 95 % intervals over images."""
    return _score_rows(pope.match_answers(questions, answers, parser), parser)


def _score_rows(rows: Sequence[pope.PopeRow], parser: str) -> dict[str, Any]:
    return pope.count_confusion(rows, parser).to_json() | _intervals(pope.ratios(rows))


def score_chair(captions: Mapping[str, str], annotations: Annotations) -> dict[str, Any]:
    """Compute CHAIR with 95 % intervals over images; a hash identifies the image list."""
    scored = chair_counts(captions, annotations)
    return scored.to_json() | _intervals(scored.ratios()) | {"image_list": text_hash(*captions)}


def chair_counts(captions: Mapping[str, str], annotations: Annotations) -> chair.ChairScore:
    """Count CHAIR's mentions.

    Raises:
        DataError: a caption's image has no annotations.
    """
    truth = {image: annotations.objects[image] for image in captions if image in annotations.objects}
    return chair.score_captions(captions, truth, chair.vocabulary_of(annotations))


def _intervals(ratios: Mapping[str, Ratio]) -> dict[str, Any]:
    return {f"{rate}_ci": ratio_interval(*to_columns(ratio)) for rate, ratio in ratios.items()}


# --- folders of `relook eval`


def pope_results(data: Path, out: Path, parser: str = "official") -> dict[str, Any]:
    """Compute the contents of `pope.json`: each split's scores, and their provenance."""
    questions = pope_questions(data)
    results: dict[str, Any] = {
        split: score_pope(asked, pope.read_pope_answers(out / f"pope_{split}.jsonl"), parser)
        for split, asked in questions.items()
    }
    results["provenance"] = provenance(out, pope.LONGEST_ANSWER, parser=parser, **_question_hashes(questions))
    return results


def _question_hashes(questions: Mapping[str, Sequence[Question]]) -> dict[str, Any]:
    """Compute hashes of the questions and of their images."""
    texts = {
        split: text_hash(*(part for q in asked for part in (q.image.name, q.text, q.label)))
        for split, asked in questions.items()
    }
    images = dict.fromkeys(q.image.name for asked in questions.values() for q in asked)
    return {"questions": texts, "image_list": text_hash(*images)}


def chair_results(data: Path, out: Path) -> dict[str, Any]:
    """Compute the contents of `chair.json`: CHAIR's scores, and their provenance."""
    captions = read_captions_by_image(out / "chair.jsonl")
    result = score_chair(captions, data_truth(data, list(captions)))
    return {**result, "provenance": provenance(out, **_truth(result, caption_file(data)))}


def _truth(result: Mapping[str, Any], captions: Path | None) -> dict[str, Any]:
    return {"truth": "instances and captions" if captions else "instances", "image_list": result["image_list"]}


def read_captions_by_image(path: str | Path, annotations: Annotations | None = None) -> dict[str, str]:
    """Read captions by image: records with `caption` (or `text`), and `image`, or COCO's `image_id`.

    Args:
        annotations: annotations that map image ids to images.

    Raises:
        DataError: a record lacks its caption or image, an image occurs twice, or the file holds no caption.
    """
    path = Path(path)
    ids = annotations.ids if annotations else {}
    found: dict[str, str] = {}
    for number, record in enumerate(read_records(path), 1):
        number_of, text = record.get("image_id"), record.get("caption", record.get("text"))
        image = record.get("image", ids.get(as_id(number_of)))
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


def read_scores(out: str | Path, benchmarks: Sequence[str] = COMPARED) -> dict[str, dict[str, Any]]:
    """Read the scores without their provenance, for tables that state it once for all."""
    out = Path(out)
    found = {name: read_json_object(out / f"{name}.json") for name in benchmarks}
    return {name: {key: v for key, v in scores.items() if key != "provenance"} for name, scores in found.items()}


# --- `relook score`


@dataclass(frozen=True)
class ScoringInputs:
    """Inputs to score answers against: a data folder, or single files; `images` lists those that CHAIR describes."""

    data: Path | None = None
    questions: Path | None = None
    annotations: Path | None = None
    captions: Path | None = None
    images: Path | None = None

    def __post_init__(self) -> None:
        make_paths(self)


def score_answers(
    benchmark: str, answers: str | Path, given: ScoringInputs, parser: str = "official"
) -> dict[str, Any]:
    """Score an answer file made by any program, or a folder of `relook eval` again.

    Args:
        benchmark: one of `RESULTS`.

    Raises:
        RelookError: something is missing or does not match; the message names the ids or images.
    """
    answers = Path(answers)
    if parser not in PARSERS:
        raise RecipeError(f"There is no parser {parser!r}.", f"Known ones: {', '.join(PARSERS)}.")
    if answers.is_dir():
        data = given.data or data_of(answers)
        return pope_results(data, answers, parser) if benchmark == "pope" else chair_results(data, answers)
    return _pope_file(answers, given, parser) if benchmark == "pope" else _chair_file(answers, given)


def data_of(out: str | Path) -> Path:
    """Return the data folder that a `relook eval` folder records."""
    out = Path(out)
    noted = read_json_object(out / EVAL_FILE, optional=True).get("data")
    return _required_path(
        Path(noted) if noted else None, "--data", f"{out} does not say what data its answers are about"
    )


def _required_path(path: Path | None, option: str, why: str) -> Path:
    if path is None:
        raise RecipeError(f"{why}.", f"Give {option}.")
    return path


def _pope_file(answers: Path, given: ScoringInputs, parser: str) -> dict[str, Any]:
    file = _required_path(given.questions, "--questions, POPE's file", "There are no questions to an answer file")
    said = pope.read_pope_answers(answers)
    if given.annotations is None:
        questions = pope.read_pope_questions(file, Path())
        return score_pope(questions, said, parser) | {"provenance": _of_file(answers, parser, {file.stem: questions})}
    splits = pope.read_llava_questions(file, given.annotations, Path())
    rows = iter(pope.match_answers([q for questions in splits.values() for q in questions], said, parser))
    result = {split: _score_rows(list(islice(rows, len(splits[split]))), parser) for split in splits}
    return result | {"provenance": _of_file(answers, parser, splits)}


def _of_file(answers: Path, parser: str, questions: Mapping[str, Sequence[Question]]) -> dict[str, Any]:
    return provenance(answers, parser=parser, **_question_hashes(questions))


def _chair_file(answers: Path, given: ScoringInputs) -> dict[str, Any]:
    file = _required_path(
        given.annotations, "--annotations, COCO's instances file", "There is no truth about the images"
    )
    annotations = read_coco(file)
    captions = read_captions_by_image(answers, annotations)
    if given.images is not None:
        names = chair_images(annotations, given.images)
        if missing := [name for name in names if name not in captions]:
            what = f"{len(missing)} images of {given.images} have no caption: {preview(missing)}."
            raise DataError(what, "Describe them, too, or take them off the list.")
        captions = {name: captions[name] for name in names}
    result = score_chair(captions, read_truth(file, given.captions, list(captions)))
    return {**result, "provenance": provenance(answers, **_truth(result, given.captions))}
