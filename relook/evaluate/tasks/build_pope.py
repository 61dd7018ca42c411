"""Construction of POPE's three splits from annotations, as in main.py and utils.py of RUCAIBox/POPE."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from relook.data.annotations import read_coco
from relook.errors import DataError, preview
from relook.evaluate.tasks.pope import SPLITS, question_text
from relook.files import (
    claim_output_dir,
    file_hash,
    read_records,
    read_text,
    text_hash,
    write_jsonl,
    write_text,
)

CARD_FILE, IMAGES_FILE = "pope.json", "images.txt"


def build_pope_files(
    annotations: str | Path, out: str | Path, images: int = 500, seed: int = 0, positives: int = 3
) -> dict[str, Any]:
    """Write the question files of the three splits, over images drawn from those with enough objects.

    `out` receives `coco_pope_<split>.json`, the image list `images.txt`, and `pope.json`, which records their source.

    Args:
        annotations: COCO's instances file, or POPE's own layout: `{"image", "objects"}` records.
        images: number of images to draw.
        positives: number of present objects asked about per image; as many absent ones are asked about.

    Returns:
        The contents of `pope.json`.

    Raises:
        RelookError: too few images have that many objects, or the folder holds something else.
    """
    annotations, out = Path(annotations), Path(out)
    objects, categories = read_image_objects(annotations)
    usable = [image for image, present in objects.items() if positives <= len(present) <= len(categories) - positives]
    if not 0 < images <= len(usable):
        raise DataError(
            f"{len(usable)} images of {annotations} have {positives} objects or more; {images} are wanted.",
            f"Set --images to 1 to {len(usable)}." if usable else "Give annotations of more objects.",
        )
    # Generators are seeded by name, so that drawing images does not shift the draws of objects.
    chosen = random.Random(f"pope/{seed}/images").sample(usable, images)
    card = {
        "annotations_sha256": file_hash(annotations),
        "images": images,
        "seed": seed,
        "positives": positives,
        "image_list": text_hash(*chosen),
    }
    claim_output_dir(out, CARD_FILE, card, "questions")
    write_text(out / IMAGES_FILE, "".join(f"{image}\n" for image in chosen))
    for split, records in build_splits({i: objects[i] for i in chosen}, categories, seed, positives).items():
        write_jsonl(out / f"coco_pope_{split}.json", records)
    return card


def read_image_objects(path: str | Path) -> tuple[dict[str, list[str]], list[str]]:
    """Read the distinct objects of each image, in the file's order, and the names of all categories.

    Raises:
        DataError: the file is in neither of the two layouts, or an image occurs twice.
    """
    path = Path(path)
    if not _is_list_of_objects(path):
        annotations = read_coco(path)
        by_image = {image: [name for name, _ in boxes] for image, boxes in annotations.boxes.items()}
        return {image: list(dict.fromkeys(names)) for image, names in by_image.items()}, list(annotations.categories)
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
    """Return True if a file is in POPE's layout, JSON lines or an array; COCO's is a single object."""
    # POPE's segmentation files and COCO's share the extension .json: the beginning tells them apart.
    text = read_text(path).lstrip()
    first = text.split("\n", 1)[0]
    return text[:1] == "[" or ('"objects"' in first and '"categories"' not in first)


def build_splits(
    objects_by_image: Mapping[str, Collection[str]], categories: Sequence[str], seed: int, positives: int = 3
) -> dict[str, list[dict[str, Any]]]:
    """Build the random, popular and adversarial question records from annotations, as POPE does from COCO's.

    Images with fewer than `positives` objects are left out, and do not count towards frequencies. For every other
    image the first `positives` objects are asked about. Each is followed by an absent object not yet asked about:

    - random: drawn at random;
    - popular: the most frequent one;
    - adversarial: the one that co-occurs most often with the object just asked about, or a random one if none is left.

    Ties in frequency go to the object seen first. The yes-questions are the same in all three splits.

    POPE loops forever once all occurring objects are in the image or asked about. Here the categories that never occur
    come next, and an image with fewer than `positives` absent categories is left out.

    Args:
        objects_by_image: objects of each image; a sequence keeps its order, a set has none and is shuffled first.
        categories: all object names.

    Returns:
        `{"question_id", "image", "text", "label"}` records by split; ids start at 1 in each.

    Raises:
        DataError: an object is not among the categories.
    """
    shuffle = random.Random(f"pope/{seed}/order")
    listed = {image: _in_order(objects, shuffle) for image, objects in objects_by_image.items()}
    unknown = sorted(set().union(*listed.values()) - set(categories))
    if unknown:
        raise DataError(f"Objects are not among the categories: {preview(unknown)}.", "Add them to the categories.")
    max_present = len(set(categories)) - positives  # beyond it too few absent objects are left to ask about
    enough = {image: present for image, present in listed.items() if positives <= len(present) <= max_present}
    # Frequencies and co-occurrences are those of the images asked about, as in the original.
    frequency = Counter(name for present in enough.values() for name in present)
    together: dict[str, Counter[str]] = {name: Counter() for name in frequency}
    for present in enough.values():
        for name in present:
            together[name].update(other for other in present if other != name)
    # Categories that occur in no image have no rank, but are absent everywhere.
    popular, never = _by_frequency(frequency), [name for name in categories if name not in frequency]
    companions = {name: _by_frequency(counts) for name, counts in together.items()}

    splits: dict[str, list[dict[str, Any]]] = {}
    for split in SPLITS:
        rng, records = random.Random(f"pope/{seed}/{split}"), splits.setdefault(split, [])
        for image, present in enough.items():
            used = set(present)
            for name in present[:positives]:
                # Candidates in order: the split's own ranking, then a random order, then categories that never occur.
                first = {"random": [], "popular": popular, "adversarial": companions[name]}[split]
                absent = next(o for o in (*first, *rng.sample(popular, len(popular)), *never) if o not in used)
                used.add(absent)  # asked about at most once per image
                for object_name, label in ((name, "yes"), (absent, "no")):
                    question = {"question_id": len(records) + 1, "image": image, "text": question_text(object_name)}
                    records.append({**question, "label": label})
    return splits


def _in_order(objects: Collection[str], shuffle: random.Random) -> list[str]:
    if isinstance(objects, Sequence):
        return list(dict.fromkeys(objects))
    return shuffle.sample(sorted(objects), len(objects))


def _by_frequency(counts: Counter[str]) -> list[str]:
    return [name for name, _ in counts.most_common()]
