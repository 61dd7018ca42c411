"""Building POPE's three splits from annotations, as RUCAIBox/POPE main.py and utils.py do."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from relook.data.annotations import read_coco
from relook.errors import DataError, some
from relook.evaluate.tasks.pope import SPLITS, question_text
from relook.files import (
    claim_folder,
    file_hash,
    read_records,
    read_text,
    text_hash,
    write_jsonl,
    write_text,
)

CARD_FILE, IMAGES_FILE = "pope.json", "images.txt"


def build_pope(annotations: Path, out: Path, images: int = 500, seed: int = 0, positives: int = 3) -> dict[str, Any]:
    """Write the question files of the three splits, over images drawn from those with enough objects.

    `out` gets `coco_pope_<split>.json`, the images in `images.txt`, and `pope.json`, which says what they were made of.

    Args:
        annotations: COCO's instances file, or POPE's own layout: `{"image", "objects"}` records.
        images: how many.
        positives: objects that are asked of each image; as many absent ones are.

    Returns:
        What `pope.json` says.

    Raises:
        RelookError: too few images have that many objects, or the folder holds something else.
    """
    objects, categories = read_objects(annotations)
    usable = [image for image, there in objects.items() if positives <= len(there) <= len(categories) - positives]
    if not 0 < images <= len(usable):
        raise DataError(
            f"{len(usable)} images of {annotations} have {positives} objects or more; {images} are wanted.",
            f"Set --images to 1 to {len(usable)}." if usable else "Give annotations of more objects.",
        )
    chosen = random.Random(f"pope/{seed}/images").sample(usable, images)
    card = {
        "annotations_sha256": file_hash(annotations),
        "images": images,
        "seed": seed,
        "positives": positives,
        "image_list": text_hash(*chosen),
    }
    claim_folder(out, CARD_FILE, card, "questions")
    write_text(out / IMAGES_FILE, "".join(f"{image}\n" for image in chosen))
    for split, records in build_splits({i: objects[i] for i in chosen}, categories, seed, positives).items():
        write_jsonl(out / f"coco_pope_{split}.json", records)
    return card


def read_objects(path: Path) -> tuple[dict[str, list[str]], list[str]]:
    """The distinct objects of each image, in the file's order, and the names of all categories.

    Raises:
        DataError: the file is in neither of the two layouts, or an image stands in it twice.
    """
    if not _is_list_of_objects(path):
        annotations = read_coco(path)
        found = {image: [name for name, _ in boxes] for image, boxes in annotations.boxes.items()}
        return {image: list(dict.fromkeys(names)) for image, names in found.items()}, list(annotations.categories)
    objects: dict[str, list[str]] = {}
    for number, record in enumerate(read_records(path), 1):
        image, names = record.get("image"), record.get("objects")
        if not isinstance(image, str) or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise DataError(
                f"{path}: record {number} needs image and objects.", 'Write {"image": ..., "objects": [...]}.'
            )
        if image in objects:
            raise DataError(f"{path}: {image} stands more than once.", "Remove the duplicates.")
        objects[image] = list(dict.fromkeys(name for name in names if name))
    return objects, list(dict.fromkeys(name for names in objects.values() for name in names))


def _is_list_of_objects(path: Path) -> bool:
    """Whether a file is in POPE's layout, as JSON lines or an array; COCO's is one object."""
    text = read_text(path).lstrip()
    first = text.split("\n", 1)[0]
    return text[:1] == "[" or ('"objects"' in first and '"categories"' not in first)


def build_splits(
    objects_by_image: Mapping[str, Collection[str]], categories: Sequence[str], seed: int, positives: int = 3
) -> dict[str, list[dict[str, Any]]]:
    """Build the random, popular and adversarial question records from annotations, as POPE does from COCO's.

    Images with fewer than `positives` objects are left out, and do not count for what is frequent. Of each other image
    the first `positives` objects are asked, each followed by an absent one that was not asked yet: drawn at random;
    the most frequent one; or the one that comes together most often with the object just asked (any, at random, where
    none is left that ever did). Of equally frequent ones the first seen comes first. The yes-questions are the same in
    the three splits.

    Where all objects that occur are on an image or asked, POPE loops for ever: here the categories that never occur
    follow, and an image with fewer than `positives` absent categories is left out.

    Args:
        objects_by_image: a sequence is taken in its order; a set has none, so it is shuffled first.
        categories: all object names.

    Returns:
        `{"question_id", "image", "text", "label"}` records by split; ids count from 1 in each.

    Raises:
        DataError: an object is not among the categories.
    """
    shuffle = random.Random(f"pope/{seed}/order")
    listed = {image: _in_order(objects, shuffle) for image, objects in objects_by_image.items()}
    unknown = sorted(set().union(*listed.values()) - set(categories))
    if unknown:
        raise DataError(f"Objects are not among the categories: {some(unknown)}.", "Add them to the categories.")
    most = len(set(categories)) - positives
    enough = {image: present for image, present in listed.items() if positives <= len(present) <= most}
    frequency = Counter(name for present in enough.values() for name in present)
    together: dict[str, Counter[str]] = {name: Counter() for name in frequency}
    for present in enough.values():
        for name in present:
            together[name].update(other for other in present if other != name)
    popular, never = _falling(frequency), [name for name in categories if name not in frequency]
    companions = {name: _falling(counts) for name, counts in together.items()}

    splits: dict[str, list[dict[str, Any]]] = {}
    for split in SPLITS:
        rng, records = random.Random(f"pope/{seed}/{split}"), splits.setdefault(split, [])
        for image, present in enough.items():
            used = set(present)
            for name in present[:positives]:
                first = {"random": [], "popular": popular, "adversarial": companions[name]}[split]
                absent = next(o for o in (*first, *rng.sample(popular, len(popular)), *never) if o not in used)
                used.add(absent)
                for asked, label in ((name, "yes"), (absent, "no")):
                    question = {"question_id": len(records) + 1, "image": image, "text": question_text(asked)}
                    records.append({**question, "label": label})
    return splits


def _in_order(objects: Collection[str], shuffle: random.Random) -> list[str]:
    if isinstance(objects, Sequence):
        return list(dict.fromkeys(objects))
    return shuffle.sample(sorted(objects), len(objects))


def _falling(counts: Counter[str]) -> list[str]:
    return [name for name, _ in counts.most_common()]
