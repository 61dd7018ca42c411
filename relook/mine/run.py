"""`relook mine`: preference pairs from a model's own mistakes.

The stages of a job:
1. select: leave out unreadable and repeated pictures and those of evaluations (pictures.py);
2. describe: the model describes each picture (candidates.py, jobs.py);
3. check and pair: annotations or a judge find what is wrong, each wrong text is corrected with the least change and
   kept at the same length and style, so that training cannot learn length (candidates.py, pairs.py); by sentence, 2 and
   3 alternate: true and false continuations of one beginning are pairs (sentences.py);
4. ask: the model answers yes/no questions, and its wrong answers become pairs, too (candidates.py);
5. write: HA-DPO's files or SENTINEL's, parquet, a page, the data card (output.py).
What takes long grows in `out/work`; under torchrun each process takes a share, and the first one pairs and writes.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from relook import distributed
from relook.console import status
from relook.data.parquet import pyarrow
from relook.data.readers import DESCRIBE_PROMPTS
from relook.data.templates import check_template
from relook.errors import DataError, RecipeError, did_you_mean, preview
from relook.evaluate.benchmark import YES_NO_MAX_TOKENS
from relook.evaluate.judge import JUDGE_CACHE, Judge, JudgeSettings
from relook.evaluate.results import library_versions
from relook.evaluate.tasks.chair import Vocabulary, coco_vocabulary
from relook.files import (
    claim_output_dir,
    file_hash,
    read_json,
    read_json_object,
    read_text,
    text_hash,
    write_json,
    writes_alone,
)
from relook.generate.answering import ONLY_OWN_ENGINE, Answerer, AnswerSource, GenerationSettings
from relook.mine import candidates, output, pairs, sentences
from relook.mine.candidates import DescriptionPairs, ProbeQuestion, describe_images, find_pairs
from relook.mine.jobs import MiningSettings, MiningSource, fingerprint_all, generate_all
from relook.mine.output import write_pairs_page
from relook.mine.pairs import REQUEST, MinedPair
from relook.mine.pictures import (
    AnnotatedImages,
    ExclusionFilter,
    MinedImage,
    evaluation_files,
    excluded_images,
    read_pictures,
    read_synonyms,
)
from relook.model.checkpoint import ModelFolder
from relook.model.load import LoadOptions

SETTINGS, WORK = "mine.json", "work"
BY = ("description", "sentence")


@writes_alone(lambda model, source, out, *_, **__: Path(out))
def mine_pairs(
    model: str | Path,
    source: MiningSource,
    out: str | Path,
    settings: MiningSettings,
    judge: JudgeSettings | None = None,
    loading: AnswerSource = LoadOptions(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Mine pairs into a folder, or finish what a stopped run began there; returns the data card (`out/card.json`).

    Args:
        judge: finds and corrects mistakes where there are no annotations; where there are, it gives both texts of a
            pair one style. Its replies are kept in `out/work/judge.jsonl`.

    Raises:
        RelookError: settings that contradict each other, data that cannot be used, a judge that does not answer, or a
            folder with other pairs.
    """
    folder, out = loading.open(model), Path(out)
    settings = _check_settings(folder, source, out, settings, judge, loading)
    annotated = read_pictures(source.images, source.annotations, source.synonyms)
    listed_images = frozenset[frozenset[str]]().union(
        *(excluded_images(path) for path in source.exclude if not path.is_dir())
    )
    listed = frozenset[str]().union(*listed_images)
    evaluation_images = [path for entry in source.exclude if entry.is_dir() for path in evaluation_files(entry)]
    model_identity = loading.identity(folder)
    if distributed.is_main():
        excluded = [*sorted(listed), *(str(path.resolve()) for path in evaluation_images)]
        identity = _identity(source, annotated.pictures, excluded, settings, model_identity)
        if settings.by_sentence:  # what a description goes on with depends on who checks
            identity["checked_by"] = judge and [judge.model, dict(judge.request)]
        if source.earlier:
            identity["earlier"] = text_hash(*map(file_hash, output.pair_files(source.earlier, settings.by_sentence)))
        _claim_folder(out, identity, judge)
    distributed.barrier("the output folder")
    if (out / output.CARD).exists():
        return dict(read_json(out / output.CARD))

    # Select. The model is loaded when there is something to ask it: a finished stage needs none.
    work, load = out / WORK, functools.cache(lambda: loading.load(folder))
    exclusion = _fingerprint(annotated.pictures, listed, evaluation_images, work)
    pictures, left_out = _select_images(source, annotated.pictures, exclusion, settings)
    if source.earlier:
        _check_earlier(source.earlier, annotated.pictures, exclusion, settings)
    description_rng, question_rng = (random.Random(f"{settings.seed}/{stage}") for stage in ("describe", "ask"))
    judge_client = Judge(judge, work / JUDGE_CACHE) if judge and distributed.is_main() else None

    def load_for_judge() -> Answerer:
        if judge_client:  # a judge that does not answer is found now, not after hours of descriptions
            judge_client.probe(REQUEST, pictures[0].path if source.annotations == "none" else None)
        return load()

    # Describe, check and pair.
    load_first = functools.cache(load_for_judge)
    described: DescriptionPairs | None
    if settings.by_sentence:
        described = _pair_sentences(pictures, annotated, source, settings, judge, load_first, work, description_rng)
    else:
        texts = describe_images(pictures, settings, load_first, work, description_rng)
        described = None  # the first process pairs
        if distributed.is_main():
            described = find_pairs(
                pictures, texts, annotated, settings.near_texts, judge_client, description_rng, settings.contrast
            )
        distributed.barrier("pairs of descriptions")
    if described is not None:
        candidates.limit_pairs(described, settings.max_pairs)

    # Ask. The questions may depend on the judge's verdicts, which only the first process has.
    questions = distributed.broadcast_from_main(
        lambda: _choose_questions(pictures, described, source, settings, question_rng)
    )
    generation = GenerationSettings(
        settings.template, min(settings.max_new_tokens, YES_NO_MAX_TOKENS), settings.batch_size
    )
    prompts = [(question.key, (question.picture.path, question.text)) for question in questions]
    answers = generate_all(work / "answers.jsonl", load, prompts, generation, "yes/no questions")

    # Write.
    if distributed.is_main():
        assert described is not None, "the first process has the pairs"
        records = candidates.question_records(questions, answers)
        selected = candidates.balance_answers(records, question_rng)
        question_counts = candidates.question_summary(records, selected)
        if unreadable := question_counts["unreadable"]:
            of_all = f"{unreadable:,} of {question_counts['asked']:,} answers"
            status(f"  {of_all} to yes/no questions say neither yes nor no", style="yellow")
        write_outputs(out, source.earlier, annotated, described.pairs, selected, exclusion, settings)
        card: dict[str, Any] = {
            "model": folder.path.name,
            **{key: model_identity[key] for key in ("model_hash", "engine") if key in model_identity},
            "annotations": source.annotations,
            **dataclasses.asdict(settings),
            "pictures": {"found": len(annotated.pictures), "left_out": left_out, "mined": len(pictures)},
            "apart": {
                "given": [path.name for path in source.exclude],
                "names": len(listed_images),
                "images": len(exclusion.evaluation),
            },
            **_pair_statistics(described),
            "questions": question_counts,
            **({"earlier": output.count_pairs(source.earlier, settings.by_sentence)} if source.earlier else {}),
        }
        output.write_card(out, card)
    distributed.barrier("the pairs")
    return dict(read_json(out / output.CARD))


def _check_settings(
    model: ModelFolder,
    source: MiningSource,
    out: Path,
    settings: MiningSettings,
    judge: JudgeSettings | None,
    loading: AnswerSource,
) -> MiningSettings:
    """Check that nothing contradicts, and return the settings with the model's own template where none is given."""
    if settings.by not in BY:
        raise RecipeError(f"There are no pairs by {settings.by!r}.", did_you_mean(settings.by, BY))
    if source.annotations == "none" and judge is None and not settings.own_answers:
        raise RecipeError(
            "Without annotations nothing finds the mistakes.",
            "Give --judge URL and --judge-model; or --by sentence --judge self.",
        )
    if settings.own_answers and (not settings.by_sentence or source.annotations != "none"):
        raise RecipeError(
            "The model's own answers check sentences where there are no annotations.",
            "Give --by sentence --annotations none, or another --judge.",
        )
    if source.synonyms and source.annotations == "none" and not settings.own_answers:
        raise RecipeError("Synonyms belong to annotations, and there are none.", "Leave --synonyms out.")
    if settings.by_sentence and judge and source.annotations != "none":
        raise RecipeError("Annotations check all sentences: a judge would do nothing.", "Leave --judge out.")
    if settings.by_sentence and not (settings.temperature > 0 and settings.continuations > 1):
        raise RecipeError(
            "A true and a false sentence are found among several sampled ones.",
            "Give --continuations 2 or more and a --temperature above 0.",
        )
    if settings.complete and not settings.by_sentence:
        raise RecipeError(
            "Pairs by description are complete as they are.", "Leave --complete out, or give --by sentence."
        )
    if settings.contrast and (settings.by_sentence or source.annotations == "none"):
        raise RecipeError(
            "Only whole descriptions that annotations check can be made worse.",
            "Leave --contrast out, or give --annotations and --by description.",
        )
    if settings.by_sentence and not isinstance(loading, LoadOptions):
        raise RecipeError(*ONLY_OWN_ENGINE)
    if out.resolve().is_relative_to(source.images.resolve()):
        raise RecipeError(f"{out} lies in the image folder.", "Choose another --out.")
    if settings.parquet:
        pyarrow()
    if settings.samples and settings.temperature <= 0:
        raise RecipeError("Nothing is sampled at temperature 0.", "Give --samples 0 for greedy descriptions alone.")
    settings = dataclasses.replace(settings, template=settings.template or loading.template_of(model))
    check_template(settings.template)
    return settings


def _pair_sentences(
    pictures: Sequence[MinedImage],
    annotated: AnnotatedImages,
    source: MiningSource,
    settings: MiningSettings,
    judge: JudgeSettings | None,
    load: Callable[[], Answerer],
    work: Path,
    rng: random.Random,
) -> DescriptionPairs:
    """Grow descriptions and return their pairs; every process checks what it samples."""
    if annotated.vocabulary is not None:
        check = sentences.by_annotations(annotated.vocabulary, annotated.neutral)
    elif judge is not None:
        check = sentences.by_judge(Judge(judge, work / JUDGE_CACHE, distributed.rank()))
    else:
        # Of a model's words, those for COCO's objects are known, and those that the user adds.
        added = read_synonyms(source.synonyms) if source.synonyms else {}
        phrases = {**coco_vocabulary().phrases, **Vocabulary.of(list(added), added).phrases}
        vocabulary = Vocabulary(phrases, coco_vocabulary().hidden_by)
        check = sentences.by_own_answers(vocabulary, load, settings)
    prompts = [rng.choice(DESCRIBE_PROMPTS) for _ in pictures]
    records = sentences.describe_by_sentence(pictures, prompts, settings, load, check, work)
    result = sentences.pairs_of_records(pictures, records, judge, settings.complete)
    # Lengths are not matched: both sides are the model's own words, and where nothing true follows an end is better.
    candidates.drop_near_duplicates(result, settings.near_texts)
    return result


def _fingerprint(
    pictures: Sequence[MinedImage], listed: frozenset[str], evaluation_images: Sequence[Path], work: Path
) -> ExclusionFilter:
    """Fingerprint every image file, mined or of an evaluation."""
    mined = fingerprint_all(work / "pictures.jsonl", [(p.id, p.path) for p in pictures], "pictures")
    evaluation_records = fingerprint_all(
        work / "excluded.jsonl", [(str(path), path) for path in evaluation_images], "files of evaluation images"
    )
    return ExclusionFilter(mined, listed, [evaluation_records[str(path)] for path in evaluation_images])


def _select_images(
    source: MiningSource, pictures: Sequence[MinedImage], exclusion: ExclusionFilter, settings: MiningSettings
) -> tuple[list[MinedImage], dict[str, int]]:
    """Return the pictures that are mined, and how many are not, by reason."""
    reasons = exclusion.left_out(pictures)
    counts = dict(sorted(Counter(reasons.values()).items()))
    if len(reasons) == len(pictures):
        causes = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        raise DataError(f"No picture of {source.images} is left: {causes}.", "Check --images and --exclude.")
    usable = [picture for picture in pictures if picture.id not in reasons]
    if settings.max_images and len(usable) > settings.max_images:
        counts["not drawn"] = len(usable) - settings.max_images
        drawn = sorted(random.Random(f"{settings.seed}/images").sample(range(len(usable)), settings.max_images))
        usable = [usable[i] for i in drawn]
    return usable, counts


def _check_earlier(
    earlier: Path, pictures: Sequence[MinedImage], exclusion: ExclusionFilter, settings: MiningSettings
) -> None:
    """Check that the images of earlier pairs may be trained on.

    Raises:
        DataError: some are not among the pictures, or would be left out now.
    """
    usable = {picture.id for picture in pictures} - exclusion.left_out(pictures).keys()
    if unknown := sorted(output.named_images(earlier, settings.by_sentence) - usable):
        raise DataError(
            f"{earlier} has pairs over images that are not mined here: {preview(unknown)}.",
            "Give the --images and --exclude that they were mined with, or leave --earlier out.",
        )


def _claim_folder(out: Path, identity: Mapping[str, Any], judge: JudgeSettings | None) -> None:
    """Claim the folder for a job, or go on there.

    Raises:
        RecipeError: the folder holds finished pairs of another judge.
    """
    # Descriptions do not depend on a judge: until the pairs are finished another one may take over. Finished ones
    # belong to their judge's model and request, not to its address.
    judge_identity = judge and [judge.model, dict(judge.request)]
    claim_output_dir(out, SETTINGS, identity, "pairs", judge=judge_identity)
    if not (out / output.CARD).exists():
        write_json(out / SETTINGS, {**identity, "judge": judge_identity})
        return
    stored = read_json_object(out / SETTINGS)["judge"] or []
    if stored[-2:] != (judge_identity or []):  # earlier versions wrote the address first
        raise RecipeError(f"{out} holds pairs made with another judge.", "Choose another --out.")


def _identity(
    source: MiningSource,
    pictures: Sequence[MinedImage],
    excluded: Sequence[str],
    settings: MiningSettings,
    answers: Mapping[str, Any],
) -> dict[str, Any]:
    """Return all that the pairs depend on, except the judge; `answers` is what the model's answers depend on."""
    objects = [f"{picture.id}: {', '.join(sorted(picture.objects))}" for picture in pictures]
    return {
        **answers,
        "images": str(source.images.resolve()),
        "annotations": source.annotations,
        "annotations_hash": text_hash(*objects),
        "synonyms": source.synonyms and text_hash(read_text(source.synonyms)),
        "exclude": [str(path.resolve()) for path in source.exclude],
        "exclude_hash": text_hash(*excluded),
        **dataclasses.asdict(settings),
        "versions": library_versions(),
    }


def _choose_questions(
    pictures: Sequence[MinedImage],
    described: DescriptionPairs | None,
    source: MiningSource,
    settings: MiningSettings,
    rng: random.Random,
) -> list[ProbeQuestion]:
    assert described is not None, "only the first process chooses questions"
    if settings.own_answers:  # nothing else knows what is there
        return []
    if source.annotations == "none":
        return candidates.choose_judged_questions(pictures, described.verdicts, settings.questions, rng)
    return candidates.choose_questions(pictures, settings.questions, rng)


def _pair_statistics(described: DescriptionPairs) -> dict[str, Any]:
    """Return the data card's counts of pairs of descriptions or sentences."""
    return {
        "descriptions": described.to_json(),
        "lengths": pairs.length_statistics([(pair.chosen, pair.rejected) for pair in described.pairs]),
        "judge": described.judge,
    }


def write_outputs(
    out: Path,
    earlier: Path | None,
    annotated: AnnotatedImages,
    pairs: Sequence[MinedPair],
    records: Sequence[Mapping[str, Any]],
    exclusion: ExclusionFilter,
    settings: MiningSettings,
) -> None:
    """Write all files except the card, with which the folder is complete; no picture in them may be a left-out one."""
    output.write_pairs(out, settings.by_sentence, pairs, records, earlier)
    # Read back from the files: what counts is which pictures are in them.
    names = output.named_images(out, settings.by_sentence)
    used = {picture.id: picture for picture in annotated.pictures if picture.id in names}
    assert not exclusion.left_out(used.values()), "an evaluation image, or one twice, got into the pairs"
    output.write_images(out, used.values(), {image: exclusion.mined[image]["content"] for image in used})
    if settings.parquet:
        output.write_pairs_parquet(out)
    write_pairs_page(out, pairs, records, used, annotated.vocabulary, settings.by_sentence, settings.complete)
