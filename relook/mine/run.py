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
from relook.evaluate.judge import JUDGE_CACHE, Judge, JudgeSettings
from relook.evaluate.results import versions
from relook.evaluate.tasks.chair import Vocabulary
from relook.evaluate.tasks.pope import LONGEST_ANSWER
from relook.files import claim_folder, read_json, read_text, text_hash
from relook.generate.tree_decoding import Asking
from relook.mine import candidates, output, pairs
from relook.mine.candidates import Asked, Described, describe, find_pairs
from relook.mine.jobs import Mining, Place, ask_all, look_at_all
from relook.mine.output import write_page
from relook.mine.pairs import Pair
from relook.mine.pictures import Apart, Picture, evaluation_files, names_in, read_pictures
from relook.model.load import Loading, as_device, default_template, model_hash

SETTINGS, WORK = "mine.json", "work"


def mine(
    model: Path,
    place: Place,
    out: Path,
    how: Mining,
    judge: JudgeSettings | None = None,
    loading: Loading = Loading(),  # noqa: B008 (frozen)
) -> dict[str, Any]:
    """Mine pairs into a folder, or what is left to do there; returns the data card (`out/card.json`).

    Args:
        judge: finds and corrects mistakes where there are no annotations; where there are, it gives both texts of a
            pair one style. Its replies are kept in `out/work/judge.jsonl`.

    Raises:
        RelookError: settings that contradict each other, data that cannot be used, a judge that does not answer, or a
            folder with other pairs.
    """
    how = _checked(model, place, out, how, judge, loading)
    annotated = read_pictures(place.images, place.annotations, place.synonyms)
    listed = frozenset[str]().union(*(names_in(path) for path in place.exclude if not path.is_dir()))
    shown = [path for folder in place.exclude if folder.is_dir() for path in evaluation_files(folder)]
    if distributed.first():
        excluded = [*sorted(listed), *(str(path.resolve()) for path in shown)]
        claim_folder(out, SETTINGS, _settings(model, place, annotated.pictures, excluded, how, judge, loading), "pairs")
    distributed.wait("the output folder")
    if (out / output.CARD).exists():
        return dict(read_json(out / output.CARD))
    work, load = out / WORK, functools.cache(lambda: loading.load(model))
    apart = _look(annotated.pictures, listed, shown, work)
    pictures, left_out = _mined(place, annotated.pictures, apart)
    describing, choosing = (random.Random(f"{how.seed}/{what}") for what in ("describe", "ask"))
    texts = describe(pictures, how, load, work, describing)
    endpoint = Judge(judge, work / JUDGE_CACHE) if judge and distributed.first() else None
    found = None
    if distributed.first():
        found = find_pairs(pictures, texts, annotated, how.near_texts, endpoint, describing)
    distributed.wait("pairs of descriptions")
    asked = distributed.of_the_first(lambda: _choose(pictures, found, place, how, choosing))
    asking = Asking(how.template, min(how.max_new_tokens, LONGEST_ANSWER), how.batch_size)
    prompts = [(one.key, (one.picture.path, one.text)) for one in asked]
    answers = ask_all(work / "answers.jsonl", load, prompts, asking, "yes/no questions")
    if found is not None:
        records = candidates.records(asked, answers)
        kept = candidates.balance(records, choosing)
        finish(out, pictures, annotated.vocabulary, found.pairs, kept, apart, how.parquet)
        card = {
            "model": model.name,
            "model_hash": model_hash(model),
            "annotations": place.annotations,
            **dataclasses.asdict(how),
            "pictures": {"found": len(annotated.pictures), "left_out": left_out, "mined": len(pictures)},
            "apart": {"given": [path.name for path in place.exclude], "names": len(listed), "images": len(apart.shown)},
            **_card_of_pairs(found, records, kept),
        }
        output.write_card(out, card)
    distributed.wait("the pairs")
    return dict(read_json(out / output.CARD))


def _checked(
    model: Path, place: Place, out: Path, how: Mining, judge: JudgeSettings | None, loading: Loading
) -> Mining:
    """The settings with the model's own template in them, once nothing contradicts."""
    if place.annotations == "none" and judge is None:
        raise RecipeError("Without annotations nothing finds the mistakes.", "Give --judge URL and --judge-model.")
    if out.resolve().is_relative_to(place.images.resolve()):
        raise RecipeError(f"{out} lies in the image folder.", "Choose another --out.")
    if how.parquet:
        pyarrow()
    if how.samples and how.temperature <= 0:
        raise RecipeError("Nothing is sampled at temperature 0.", "Give --samples 0 for greedy descriptions alone.")
    as_device(loading.device)
    how = dataclasses.replace(how, template=how.template or default_template(model))
    get_template(how.template)
    return how


def _look(pictures: Sequence[Picture], listed: frozenset[str], shown: Sequence[Path], work: Path) -> Apart:
    """Look at every image file, mined or of an evaluation."""
    seen = look_at_all(work / "pictures.jsonl", [(p.id, p.path) for p in pictures], "pictures")
    held = look_at_all(work / "excluded.jsonl", [(str(path), path) for path in shown], "evaluation images")
    return Apart(seen, listed, [held[str(path)] for path in shown])


def _mined(place: Place, pictures: Sequence[Picture], apart: Apart) -> tuple[list[Picture], dict[str, int]]:
    """The pictures that are mined, and how many are not, by reason."""
    reasons = apart.left_out(pictures)
    counts = dict(sorted(Counter(reasons.values()).items()))
    if len(reasons) == len(pictures):
        named = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        raise DataError(f"No picture of {place.images} is left: {named}.", "Check --images and --exclude.")
    return [picture for picture in pictures if picture.id not in reasons], counts


def _settings(
    model: Path,
    place: Place,
    pictures: Sequence[Picture],
    excluded: Sequence[str],
    how: Mining,
    judge: JudgeSettings | None,
    loading: Loading,
) -> dict[str, Any]:
    """All that the pairs depend on."""
    known = [f"{picture.id}: {', '.join(sorted(picture.objects))}" for picture in pictures]
    return {
        **loading.identity(model),
        "images": str(place.images.resolve()),
        "annotations": place.annotations,
        "annotations_hash": text_hash(*known),
        "synonyms": place.synonyms and text_hash(read_text(place.synonyms)),
        "exclude": [str(path.resolve()) for path in place.exclude],
        "exclude_hash": text_hash(*excluded),
        "judge": judge and [judge.address, judge.model, dict(judge.request)],
        **dataclasses.asdict(how),
        "versions": versions(),
    }


def _choose(
    pictures: Sequence[Picture], found: Described | None, place: Place, how: Mining, rng: random.Random
) -> list[Asked]:
    assert found is not None, "only the first process chooses"
    if place.annotations == "none":
        return candidates.choose_checked(pictures, found.checked, how.questions, rng)
    return candidates.choose(pictures, how.questions, rng)


def _card_of_pairs(
    found: Described, records: Sequence[Mapping[str, Any]], kept: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What the data card says of the pairs, and of the questions that were asked for them."""
    return {
        "descriptions": found.to_json(),
        "questions": candidates.summary(records, kept),
        "lengths": pairs.lengths([(pair.chosen, pair.rejected) for pair in found.pairs]),
        "judge": found.judge,
    }


def finish(
    out: Path,
    pictures: Sequence[Picture],
    vocabulary: Vocabulary | None,
    pairs: Sequence[Pair],
    records: Sequence[Mapping[str, Any]],
    apart: Apart,
    parquet: bool,
) -> None:
    """All files but the card, with which the folder is complete; no picture in them may be one that is left out."""
    output.write_pairs(out, pairs, records)
    names = {*read_json(out / DESC), *(record["image_id"] for record in read_json(out / POPE))}
    used = {picture.id: picture for picture in pictures if picture.id in names}
    assert not apart.left_out(used.values()), "an evaluation image, or one twice, got into the pairs"
    output.write_images(out, used.values(), {image: apart.seen[image]["content"] for image in used})
    if parquet:
        output.write_parquet(out)
    write_page(out, pairs, records, used, vocabulary)
