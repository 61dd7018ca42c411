"""`relook mine`: preference pairs from a model's own mistakes.

The model describes pictures and answers yes/no questions; annotations or a judge find what is wrong; each wrong text is
corrected with the least change and kept at the same length and style, so that training cannot learn length. Everything
that takes long grows in `out/work`, and under torchrun each process takes a share; the first one makes the files.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relook import distributed
from relook.data.convert import DESC, POPE
from relook.data.parquet import pyarrow
from relook.data.templates import get_template
from relook.errors import DataError, RecipeError
from relook.evaluate.benchmark import YES_NO_MAX_TOKENS
from relook.evaluate.judge import JUDGE_CACHE, Judge, JudgeSettings
from relook.evaluate.results import library_versions
from relook.evaluate.tasks.chair import Vocabulary
from relook.files import claim_output_dir, read_json, read_json_object, read_text, text_hash, write_json, writes_alone
from relook.generate.answering import GenerationSettings
from relook.mine import candidates, output, pairs
from relook.mine.candidates import DescriptionPairs, ProbeQuestion, describe_images, find_pairs
from relook.mine.jobs import MiningSettings, MiningSource, fingerprint_all, generate_all
from relook.mine.output import write_pairs_page
from relook.mine.pairs import REQUEST, MinedPair
from relook.mine.pictures import ExclusionFilter, MinedImage, evaluation_files, excluded_names, read_pictures
from relook.model.checkpoint import ModelFolder, parse_folder
from relook.model.load import LoadedModel, LoadOptions, model_hash, parse_device

SETTINGS, WORK = "mine.json", "work"


@writes_alone(lambda model, place, out, *_, **__: Path(out))
def mine_pairs(
    model: str | Path,
    place: MiningSource,
    out: str | Path,
    how: MiningSettings,
    judge: JudgeSettings | None = None,
    loading: LoadOptions = LoadOptions(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Mine pairs into a folder, or what is left to do there; returns the data card (`out/card.json`).

    Args:
        judge: finds and corrects mistakes where there are no annotations; where there are, it gives both texts of a
            pair one style. Its replies are kept in `out/work/judge.jsonl`.

    Raises:
        RelookError: settings that contradict each other, data that cannot be used, a judge that does not answer, or a
            folder with other pairs.
    """
    folder, out = parse_folder(model), Path(out)
    how = _check_settings(folder, place, out, how, judge, loading)
    annotated = read_pictures(place.images, place.annotations, place.synonyms)
    listed = frozenset[str]().union(*(excluded_names(path) for path in place.exclude if not path.is_dir()))
    shown = [path for folder in place.exclude if folder.is_dir() for path in evaluation_files(folder)]
    if distributed.is_main():
        excluded = [*sorted(listed), *(str(path.resolve()) for path in shown)]
        _claim(out, _settings(folder, place, annotated.pictures, excluded, how, loading), judge)
    distributed.barrier("the output folder")
    if (out / output.CARD).exists():
        return dict(read_json(out / output.CARD))
    work, load = out / WORK, functools.cache(lambda: loading.load(folder))
    apart = _fingerprint(annotated.pictures, listed, shown, work)
    pictures, left_out = _select_images(place, annotated.pictures, apart)
    describing, choosing = (random.Random(f"{how.seed}/{what}") for what in ("describe", "ask"))
    endpoint = Judge(judge, work / JUDGE_CACHE) if judge and distributed.is_main() else None

    def load_for_judge() -> LoadedModel:
        if endpoint:  # whether it is there, before hours of descriptions
            endpoint.probe(REQUEST, pictures[0].path if place.annotations == "none" else None)
        return load()

    texts = describe_images(pictures, how, functools.cache(load_for_judge), work, describing)
    found = None
    if distributed.is_main():
        found = find_pairs(pictures, texts, annotated, how.near_texts, endpoint, describing)
    distributed.barrier("pairs of descriptions")
    asked = distributed.broadcast_from_main(lambda: _choose_questions(pictures, found, place, how, choosing))
    asking = GenerationSettings(how.template, min(how.max_new_tokens, YES_NO_MAX_TOKENS), how.batch_size)
    prompts = [(one.key, (one.picture.path, one.text)) for one in asked]
    answers = generate_all(work / "answers.jsonl", load, prompts, asking, "yes/no questions")
    if found is not None:
        records = candidates.question_records(asked, answers)
        kept = candidates.balance_answers(records, choosing)
        write_outputs(out, pictures, annotated.vocabulary, found.pairs, kept, apart, how.parquet)
        card = {
            "model": folder.path.name,
            "model_hash": model_hash(folder),
            "annotations": place.annotations,
            **dataclasses.asdict(how),
            "pictures": {"found": len(annotated.pictures), "left_out": left_out, "mined": len(pictures)},
            "apart": {"given": [path.name for path in place.exclude], "names": len(listed), "images": len(apart.shown)},
            **_card_of_pairs(found, records, kept),
        }
        output.write_card(out, card)
    distributed.barrier("the pairs")
    return dict(read_json(out / output.CARD))


def _check_settings(
    model: ModelFolder,
    place: MiningSource,
    out: Path,
    how: MiningSettings,
    judge: JudgeSettings | None,
    loading: LoadOptions,
) -> MiningSettings:
    """The settings with the model's own template in them, once nothing contradicts."""
    if place.annotations == "none" and judge is None:
        raise RecipeError("Without annotations nothing finds the mistakes.", "Give --judge URL and --judge-model.")
    if out.resolve().is_relative_to(place.images.resolve()):
        raise RecipeError(f"{out} lies in the image folder.", "Choose another --out.")
    if how.parquet:
        pyarrow()
    if how.samples and how.temperature <= 0:
        raise RecipeError("Nothing is sampled at temperature 0.", "Give --samples 0 for greedy descriptions alone.")
    parse_device(loading.device)
    how = dataclasses.replace(how, template=how.template or model.template)
    get_template(how.template)
    return how


def _fingerprint(
    pictures: Sequence[MinedImage], listed: frozenset[str], shown: Sequence[Path], work: Path
) -> ExclusionFilter:
    """Look at every image file, mined or of an evaluation."""
    seen = fingerprint_all(work / "pictures.jsonl", [(p.id, p.path) for p in pictures], "pictures")
    held = fingerprint_all(work / "excluded.jsonl", [(str(path), path) for path in shown], "evaluation images")
    return ExclusionFilter(seen, listed, [held[str(path)] for path in shown])


def _select_images(
    place: MiningSource, pictures: Sequence[MinedImage], apart: ExclusionFilter
) -> tuple[list[MinedImage], dict[str, int]]:
    """The pictures that are mined, and how many are not, by reason."""
    reasons = apart.left_out(pictures)
    counts = dict(sorted(Counter(reasons.values()).items()))
    if len(reasons) == len(pictures):
        named = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        raise DataError(f"No picture of {place.images} is left: {named}.", "Check --images and --exclude.")
    return [picture for picture in pictures if picture.id not in reasons], counts


def _claim(out: Path, settings: Mapping[str, Any], judge: JudgeSettings | None) -> None:
    """Take the folder for a job, or go on there.

    Descriptions do not depend on a judge: until the pairs are finished another one may take over. Finished ones are of
    their judge's model and request, wherever that was.
    """
    told = judge and [judge.model, dict(judge.request)]
    claim_output_dir(out, SETTINGS, settings, "pairs", judge=told)
    if not (out / output.CARD).exists():
        write_json(out / SETTINGS, {**settings, "judge": told})
    elif (read_json_object(out / SETTINGS)["judge"] or [])[-2:] != (
        told or []
    ):  # earlier versions wrote the address first
        raise RecipeError(f"{out} holds pairs made with another judge.", "Choose another --out.")


def _settings(
    model: ModelFolder,
    place: MiningSource,
    pictures: Sequence[MinedImage],
    excluded: Sequence[str],
    how: MiningSettings,
    loading: LoadOptions,
) -> dict[str, Any]:
    """All that the pairs depend on, but for the judge."""
    known = [f"{picture.id}: {', '.join(sorted(picture.objects))}" for picture in pictures]
    return {
        **loading.identity(model),
        "images": str(place.images.resolve()),
        "annotations": place.annotations,
        "annotations_hash": text_hash(*known),
        "synonyms": place.synonyms and text_hash(read_text(place.synonyms)),
        "exclude": [str(path.resolve()) for path in place.exclude],
        "exclude_hash": text_hash(*excluded),
        **dataclasses.asdict(how),
        "versions": library_versions(),
    }


def _choose_questions(
    pictures: Sequence[MinedImage],
    found: DescriptionPairs | None,
    place: MiningSource,
    how: MiningSettings,
    rng: random.Random,
) -> list[ProbeQuestion]:
    assert found is not None, "only the first process chooses"
    if place.annotations == "none":
        return candidates.choose_judged_questions(pictures, found.checked, how.questions, rng)
    return candidates.choose_questions(pictures, how.questions, rng)


def _card_of_pairs(
    found: DescriptionPairs, records: Sequence[Mapping[str, Any]], kept: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the data card says of the pairs, and of the questions that were asked for them."""
    return {
        "descriptions": found.to_json(),
        "questions": candidates.question_summary(records, kept),
        "lengths": pairs.length_statistics([(pair.chosen, pair.rejected) for pair in found.pairs]),
        "judge": found.judge,
    }


def write_outputs(
    out: Path,
    pictures: Sequence[MinedImage],
    vocabulary: Vocabulary | None,
    pairs: Sequence[MinedPair],
    records: Sequence[Mapping[str, Any]],
    apart: ExclusionFilter,
    parquet: bool,
) -> None:
    """All files but the card, with which the folder is complete; no picture in them may be one that is left out."""
    output.write_pairs(out, pairs, records)
    names = {*read_json(out / DESC), *(record["image_id"] for record in read_json(out / POPE))}
    used = {picture.id: picture for picture in pictures if picture.id in names}
    assert not apart.left_out(used.values()), "an evaluation image, or one twice, got into the pairs"
    output.write_images(out, used.values(), {image: apart.seen[image]["content"] for image in used})
    if parquet:
        output.write_pairs_parquet(out)
    write_pairs_page(out, pairs, records, used, vocabulary)
