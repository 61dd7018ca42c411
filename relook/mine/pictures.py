"""Which pictures are mined, and what is on each: COCO's, Visual Genome's and toyworld's annotations, or none."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from relook.data.annotations import read_aliases, read_image_paths, read_image_records, read_objects, read_regions
from relook.data.examine import FORMATS
from relook.data.images import open_image
from relook.data.paths import resolve_extension
from relook.errors import DataError, RecipeError, did_you_mean, preview
from relook.evaluate.tasks.chair import Vocabulary, mentions, plural, read_truth, vocabulary_of
from relook.files import file_hash, read_json, read_json_object, read_records, read_text
from relook.toyworld.layouts import MARKER
from relook.toyworld.world import FILLERS, OBJECTS, SYNONYMS

# ----------------------------------------------------------------------------------------------------

NEUTRAL = (
    *FILLERS,
    "It all looks calm and well arranged.",
    "Nothing about it seems out of the ordinary.",
    "The overall mood is quiet and nothing seems hurried.",
    "All of it comes together in a way that feels natural and calm.",
    "Taken as a whole, it gives a calm impression, and nothing about it seems out of the ordinary.",
    "Taken as a whole, it gives a calm and quiet impression, as if all of it had been left just as it was found.",
)


RARE = 1000  # a name of Visual Genome's counts where at least one picture in as many has it: the others are noise
_NUMBER = re.compile(r"[0-9]+$")  # at the end of a file's name, as both number their pictures
_COCO_NAME = re.compile(r"(?:COCO_[a-z]+\d+_)?(\d{12})\.\w+")
Synonyms = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class MinedImage:
    """Describe an image file.

    Args:
        id: in the pairs' files: Visual Genome's or COCO's number, or the path below the folder.
        names: the names by which lists of evaluation images may have it (`image_names`).
        objects: the annotated objects; empty without annotations.
    """

    id: str
    path: Path
    names: frozenset[str]
    objects: frozenset[str] = frozenset()


@dataclass(frozen=True)
class AnnotatedImages:
    """Hold pictures, the words for their objects (None without annotations), and sentences that name no object."""

    pictures: tuple[MinedImage, ...]
    vocabulary: Vocabulary | None
    neutral: tuple[str, ...]


def read_pictures(images: str | Path, kind: str, synonyms: str | Path | None = None) -> AnnotatedImages:
    """Read the pictures of a folder in one of the layouts `KINDS`.

    Args:
        synonyms: JSON, `{name: [other word, ...]}`, in addition to the annotations' own.

    Raises:
        RecipeError: there is no such kind.
        DataError: the folder is not in that layout, or holds no picture.
    """
    images = Path(images)
    synonyms = None if synonyms is None else Path(synonyms)
    if kind not in KINDS:
        raise RecipeError(f"There are no annotations of kind {kind!r}.", did_you_mean(kind, KINDS))
    if not images.is_dir():
        raise DataError(f"There is no image folder {images}.", "Check --images.")
    annotated = KINDS[kind](images, read_synonyms(synonyms) if synonyms else {})
    if not annotated.pictures:
        raise DataError(f"{images} holds no {'' if kind == 'none' else 'annotated '}images to mine.", "Check --images.")
    if twice := [name for name, count in Counter(p.id for p in annotated.pictures).items() if count > 1]:
        raise DataError(f"{images} has images of one id: {preview(twice)}.", "Give each an id of its own.")
    return annotated


def image_files(folder: Path) -> list[Path]:
    """Return the image files of a folder and those below it, without hidden ones."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in FORMATS and p.name[0] != "." and p.is_file())


def image_names(name: str) -> frozenset[str]:
    """Return a file's name, and COCO's number if it is one of COCO's: train2014 and train2017 differ in names alone."""
    name = name.replace("\\", "/").rsplit("/", 1)[-1]
    number = _COCO_NAME.fullmatch(name)
    return frozenset({name, f"coco:{int(number[1])}"} if number else {name})


def _file_names(path: Path, *numbers: object) -> frozenset[str]:
    # A bare number in a list may be COCO's or Visual Genome's: it is taken for either.
    in_name = _NUMBER.search(path.stem)
    ids = {*map(str, numbers), *([str(int(in_name[0]))] if in_name else [])}
    return image_names(path.name) | {f"id:{number}" for number in ids}


def read_synonyms(path: Path) -> dict[str, list[str]]:
    """Read a file of further words for objects, `{name: [other word, ...]}`."""
    synonyms = read_json_object(path)
    if not all(isinstance(words, list) and all(isinstance(w, str) for w in words) for words in synonyms.values()):
        raise DataError(f"{path} is no list of synonyms.", 'Give it as {"cup": ["mug"]}.')
    return synonyms


def _unannotated(images: Path, _: Synonyms) -> AnnotatedImages:
    pictures = (
        MinedImage(path.relative_to(images).as_posix(), path, _file_names(path)) for path in image_files(images)
    )
    return AnnotatedImages(tuple(pictures), None, NEUTRAL)


def _coco(images: Path, synonyms: Synonyms, neutral: Sequence[str] = NEUTRAL) -> AnnotatedImages:
    """Read COCO's objects; `images` is the folder of one split, or COCO's folder if it has one split only."""
    # COCO's folder has its annotations inside, a split's folder beside it.
    root = images if (images / "annotations").is_dir() else images.parent
    files = sorted((root / "annotations").glob("instances_*.json"))
    splits = {file.stem.removeprefix("instances_"): file for file in files}
    here = [split for split in splits if root / split == images or (root == images and (root / split).is_dir())]
    if len(here) != 1:
        raise DataError(
            f"{images} and {root / 'annotations'} have {len(here)} splits of COCO's that match.",
            "Give the folder of one split, as coco/train2017, with annotations/instances_train2017.json beside it.",
        )
    captions = root / "annotations" / f"captions_{here[0]}.json"
    truth = read_truth(splits[here[0]], captions if captions.exists() else None)
    vocabulary = _with_synonyms(vocabulary_of(truth), synonyms)
    numbers = {name: number for number, name in truth.ids.items()}
    pictures = (
        MinedImage(
            numbers[name],
            resolve_extension(root / here[0] / name),
            _file_names(Path(name), numbers[name]),
            truth.objects[name],
        )
        for name in truth.images
    )
    return AnnotatedImages(tuple(pictures), vocabulary, _neutral_sentences(neutral, vocabulary))


def _visual_genome(images: Path, synonyms: Synonyms, neutral: Sequence[str] = NEUTRAL) -> AnnotatedImages:
    """Read Visual Genome's objects, and those that its regions' phrases name.

    A name that is a plural or an alias (`object_alias.txt`) of another counts as that one.
    """
    paths, records, objects = read_image_paths(images), read_image_records(images), read_objects(images)
    counts = Counter(name for names in objects.values() for name in names)
    frequent = {name for name, count in counts.items() if count * RARE >= len(objects)}
    singular, alias = {plural(name): name for name in frequent}, read_aliases(images)

    def canonical(name: str) -> str:
        name = singular.get(name, name)
        return alias.get(name, name)

    # The words for each object: its own name, plurals and aliases of it.
    words: dict[str, set[str]] = {canonical(name): set() for name in sorted(frequent)}
    for word in (*frequent, *alias):
        if canonical(word) in words:
            words[canonical(word)].add(word)
    vocabulary = _with_synonyms(Vocabulary.of(list(words), {name: sorted(words[name]) for name in words}), synonyms)
    in_regions = _named_in_regions(images, vocabulary)
    pictures = []
    for image, annotated in objects.items():
        if image in paths:
            present = frozenset(map(canonical, annotated & frequent)) | in_regions.get(image, frozenset())
            listed_as = _listed_by_both(image, records[image], paths[image])
            pictures.append(MinedImage(image, resolve_extension(paths[image]), listed_as, present))
    return AnnotatedImages(tuple(pictures), vocabulary, _neutral_sentences(neutral, vocabulary))


def _listed_by_both(image: str, record: Mapping[str, Any], path: Path) -> frozenset[str]:
    # Half of Visual Genome's images are COCO's: they have that number, too.
    coco = record.get("coco_id")
    return _file_names(path, image, coco) | {f"coco:{coco}"} if coco else _file_names(path, image)


def _named_in_regions(images: Path, vocabulary: Vocabulary) -> dict[str, frozenset[str]]:
    if not (images / "region_descriptions.json").exists():
        return {}
    return {
        image: frozenset(m.object for region in regions for m in mentions(region.phrase, vocabulary))
        for image, regions in read_regions(images).items()
    }


def _toyworld(images: Path, synonyms: Synonyms) -> AnnotatedImages:
    """Read one of toyworld's folders: `vg`, or an evaluation folder."""
    if not (images / MARKER).exists():
        raise DataError(f"{images} is no folder of toyworld's.", "Choose other --annotations.")
    read = _visual_genome if (images / "objects.json").exists() else _coco
    annotated = read(images, {}, FILLERS)
    vocabulary = _with_synonyms(Vocabulary.of(OBJECTS, SYNONYMS), synonyms)
    return AnnotatedImages(annotated.pictures, vocabulary, FILLERS)


KINDS: Mapping[str, Callable[[Path, Synonyms], AnnotatedImages]] = {
    "coco": _coco,
    "vg": _visual_genome,
    "toyworld": _toyworld,
    "none": _unannotated,
}


def _with_synonyms(vocabulary: Vocabulary, synonyms: Synonyms) -> Vocabulary:
    """Add words for its objects to a vocabulary.

    Raises:
        DataError: they are for objects that it does not have.
    """
    names = set(vocabulary.phrases.values())
    if unknown := sorted(synonyms.keys() - names):
        raise DataError(
            f"Synonyms are given for {preview(unknown)}, which the annotations do not name.", "Remove them."
        )
    added = Vocabulary.of(list(synonyms), synonyms) if synonyms else Vocabulary({})
    return Vocabulary({**added.phrases, **vocabulary.phrases}, vocabulary.hidden_by)


def _neutral_sentences(lines: Iterable[str], vocabulary: Vocabulary) -> tuple[str, ...]:
    """Return the sentences that name no object: "light" is an object of Visual Genome's."""
    neutral = tuple(line for line in lines if not mentions(line, vocabulary))
    if not neutral:
        raise DataError("Every neutral sentence names an annotated object.", 'Check --synonyms for words such as "it".')
    return neutral


# ----------------------------------------------------------------------------------------------------
# Which pictures are left out before a model sees them: unreadable ones, repeated ones, and those of evaluations.
#
# Two pictures are the same where their bytes are, or where their difference hashes, 64 signs of brightness between
# neighbours in a 9 x 8 thumbnail, differ in `MAX_HASH_DISTANCE` places at most: a picture that was scaled or saved
# again.
#
# The hash is computed here because imagehash's `dhash` differs: it scales by Lanczos, this by a box filter (on 64 test
# pictures, with alpha, EXIF rotation and 16 bits among them, 7 to 21 of 64 places differ). Stored hashes must stay
# comparable, and imagehash brings SciPy and PyWavelets.

MAX_HASH_DISTANCE = 3  # of 64 places
BANDS = 4  # of 16 places; hashes that differ in fewer places than there are bands agree in a whole band
UNREADABLE, LISTED, IN_EVALUATION = "unreadable", "listed as evaluation image", "evaluation image"
LIKE_EVALUATION = "near-duplicate of an evaluation image"
DUPLICATE, NEAR_DUPLICATE = "duplicate", "near-duplicate"


def fingerprint(key: str, path: Path) -> dict[str, Any]:
    """Return the SHA-256 of an image file's content and its difference hash, or what is wrong with the file."""
    try:
        image = open_image(path)
    except DataError as error:
        return {"key": key, "fault": error.problem}
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=int)
    bits = (grey[:, 1:] > grey[:, :-1]).ravel()
    return {"key": key, "content": file_hash(path), "look": np.packbits(bits).tobytes().hex()}


class HashIndex:
    """Index difference hashes so that near ones are found without comparing with all."""

    def __init__(self) -> None:
        self.bands: list[dict[int, list[int]]] = [{} for _ in range(BANDS)]

    def add(self, look: int) -> None:
        for number, band in enumerate(self.bands):
            band.setdefault(look >> (16 * number) & 0xFFFF, []).append(look)

    def near(self, look: int) -> bool:
        """Return True if a hash in the index differs in at most `MAX_HASH_DISTANCE` places."""
        return any(
            (look ^ other).bit_count() <= MAX_HASH_DISTANCE
            for number, band in enumerate(self.bands)
            for other in band.get(look >> (16 * number) & 0xFFFF, ())
        )


@dataclass
class FingerprintIndex:
    """Index pictures by content and by difference hash."""

    contents: set[str] = field(default_factory=set)
    hashes: HashIndex = field(default_factory=HashIndex)

    def add(self, record: Mapping[str, Any]) -> None:
        self.contents.add(record["content"])
        self.hashes.add(int(record["look"], 16))


def excluded_images(path: Path) -> frozenset[frozenset[str]]:
    """Read the images that a file names, each as the names it may have (`MinedImage.names`).

    It may be a question or answer file (keys image, image_id, image_name, file_name), COCO's instances, HA-DPO's
    desc_data.json, a list of ids, or a text file with a name or number a line.

    Raises:
        DataError: it names no image.
    """
    if path.suffix.lower() in (".json", ".jsonl"):
        try:
            content = read_json(path)
        except DataError:
            content = read_records(path)  # JSON lines
        # A single record, COCO's instances, or HA-DPO's descriptions, whose keys are ids.
        if isinstance(content, dict):
            content = [content] if _image_values(content) else content.get("images", list(content))
        images = [_image_values(record) for record in content]
    else:
        images = [[line.strip()] for line in read_text(path).splitlines()]
    # An image may have several values in a record, and each value several names.
    names = frozenset(
        frozenset(name for value in values if str(value) for name in _names(str(value))) for values in images
    )
    if not (names := names - {frozenset()}):
        raise DataError(f"{path} names no images.", "Give question files, annotations, or a list of names.")
    return names


def _image_values(record: Any) -> list[Any]:
    if not isinstance(record, dict):
        return [record] if isinstance(record, (str, int)) else []
    # `id` is an image's in COCO's list of images alone, where a file name stands beside it.
    keys = ("image", "image_id", "image_name", "file_name", *(("id",) if "file_name" in record else ()))
    return [record[key] for key in keys if isinstance(record.get(key), (str, int))]


def _names(value: str) -> frozenset[str]:
    # A bare number may be COCO's or Visual Genome's: pictures have both kinds as `id:`.
    return frozenset({f"id:{int(value)}"}) if value.isdecimal() else image_names(value)


def evaluation_files(folder: Path) -> list[Path]:
    """Return the image files of a folder of evaluation images.

    Raises:
        DataError: there are none.
    """
    files = image_files(folder)
    if not files:
        raise DataError(f"{folder} holds no images.", "Check --exclude.")
    return files


@dataclass(frozen=True)
class ExclusionFilter:
    """Decide which pictures are left out.

    Args:
        mined: records of `fingerprint`, by a picture's id.
        listed: names of evaluation images.
        evaluation: records of `fingerprint` of evaluation images.
    """

    mined: Mapping[str, Mapping[str, Any]]
    listed: frozenset[str] = frozenset()
    evaluation: Sequence[Mapping[str, Any]] = ()

    def left_out(self, pictures: Iterable[MinedImage]) -> dict[str, str]:
        """Return why pictures are not mined, by id; the first of pictures that are the same is mined."""
        evaluated, earlier = FingerprintIndex(), FingerprintIndex()
        for record in self.evaluation:
            if "fault" not in record:
                evaluated.add(record)
        reasons: dict[str, str] = {}
        for picture in pictures:
            record = self.mined[picture.id]
            reason = UNREADABLE if "fault" in record else LISTED if self.listed & picture.names else ""
            for index, same_reason, near_reason in (
                (evaluated, IN_EVALUATION, LIKE_EVALUATION),
                (earlier, DUPLICATE, NEAR_DUPLICATE),
            ):
                # An unreadable picture has a reason already, and neither content nor hash.
                if not reason and record["content"] in index.contents:
                    reason = same_reason
                if not reason and index.hashes.near(int(record["look"], 16)):
                    reason = near_reason
            if reason:
                reasons[picture.id] = reason
            else:
                earlier.add(record)
        return reasons
