"""Layouts of dataset folders: their files, their image folders, and the checks of their records.

`find_layout` looks for the parts of a layout in a folder; each index file checks its own records. Nothing here opens
an image.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product, starmap
from pathlib import Path
from typing import Any

from relook.data.annotations import read_image_paths
from relook.data.paths import (
    amber_file,
    amber_images,
    coco_annotations,
    coco_images,
    first_existing,
    pope_file,
    shr_file,
    visual_genome,
)
from relook.data.readers import DESCRIBE_PROMPTS, QUESTION_FIELDS, choices, conversation, pair_fault
from relook.data.samples import (
    ID_UNKNOWN,
    BadRecord,
    as_id,
    check_pair,
    missing_fields,
    pair_options,
    path_fault,
    text_fault,
)
from relook.data.sentinel import SUFFIXES, sentinel_pair
from relook.errors import DataError, did_you_mean
from relook.files import opens_with, read_json, read_text

VG_FOLDERS = ("VG_100K", "VG_100K_2")
POPE_SPLITS = ("random", "popular", "adversarial")
NOT_JSON = object()  # placeholder for a line that is not valid JSON


@dataclass(frozen=True)
class RecordCheck:
    """Result of checking one record without its images.

    Args:
        images: the files that it names, relative to the layout's image root.
        fault: why the record cannot be used, empty if it can.
        identity: records with the same identity are duplicates; empty if the format allows duplicates.
    """

    images: tuple[str, ...] = ()
    fault: str = ""
    identity: str = ""


@dataclass(frozen=True)
class IndexFile:
    """File of records.

    Args:
        prefix: start of a record's name; its position follows, or its key if the file is a JSON object.
        kind: "array", "object" or "lines".
        check: function that checks one record.
    """

    path: Path
    prefix: str
    kind: str
    check: Callable[[Any], RecordCheck]

    def load(self) -> list[Any]:
        """Read the file's records; for an object these are its (key, value) pairs, repeated keys included.

        Raises:
            DataError: the file cannot be read, or is not of its kind.
        """
        # split, not splitlines: a JSON string may hold other line separators, such as U+2028.
        if self.kind == "lines":
            return [_line(line) for line in read_text(self.path).split("\n") if line.strip()]
        if self.kind == "array":
            content = read_json(self.path)
        else:
            outermost: list[tuple[str, Any]] = []

            def note(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
                outermost[:] = pairs  # the outermost object is the last to be complete
                return dict(pairs)

            content = outermost if isinstance(read_json(self.path, note), dict) else None
        if not isinstance(content, list):
            raise DataError(f"{self.path} is not a JSON {self.kind}.", "Download it again.")
        return content

    def names(self, content: Sequence[Any]) -> Iterator[str]:
        """Yield a unique name for each record."""
        if self.kind != "object":
            yield from (f"{self.prefix}{number}" for number in range(len(content)))
            return
        # JSON objects may repeat a key; the number keeps the names apart.
        times: Counter[str] = Counter()
        for key, _ in content:
            times[key] += 1
            yield f"{self.prefix}{key}" + (f" (number {times[key]})" if times[key] > 1 else "")


@dataclass(frozen=True)
class LayoutPart:
    """File or folder of a layout. `needed` is True if the layout cannot be used without it."""

    path: Path
    needed: bool = True

    @property
    def exists(self) -> bool:
        return self.path.exists()


@dataclass(frozen=True)
class FolderLayout:
    """Layout as found in a folder.

    Args:
        parts: all files and folders of the layout, whether they exist or not.
        indexes: the files of records among them.
        image_root: folder that the records' image names are relative to.
        image_folders: folders that hold all images.
    """

    name: str
    folder: Path
    parts: tuple[LayoutPart, ...]
    indexes: tuple[IndexFile, ...]
    image_root: Path
    image_folders: tuple[Path, ...]

    def relative(self, path: Path) -> str:
        """Return a path relative to the folder; a path outside of it is returned unchanged."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else str(path)


def find_layout(name: str, folder: str | Path, images: str | Path | None = None) -> FolderLayout:
    """Find the parts of a layout in a folder.

    Args:
        name: a key of `LAYOUTS`.
        folder: folder of its files.
        images: root of its images, if elsewhere: Visual Genome's folder (hadpo, sentinel, shr), LLaVA's image root,
            COCO's val2014 or AMBER's image folder.

    Raises:
        DataError: there is no such layout or folder, no file of records in it, or Visual Genome's index is broken.
    """
    folder = Path(folder)
    images = None if images is None else Path(images)
    if name not in LAYOUTS:
        raise DataError(f"There is no layout {name!r}.", did_you_mean(name, LAYOUTS))
    for path in (folder, images):
        if path is not None and not path.is_dir():
            raise DataError(f"There is no folder {path}.", "Check the path.")
    layout = LAYOUTS[name](folder.absolute(), images and images.absolute())
    if not layout.indexes:
        expected = ", ".join(dict.fromkeys(part.path.name for part in layout.parts if part.path.suffix))
        raise DataError(f"{folder} has none of {name}'s files ({expected}).", "Check the folder and --layout.")
    return layout


def _line(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return NOT_JSON


def _field_fault(record: Any, *fields: str) -> str:
    if record is NOT_JSON:
        return "not valid JSON"
    return missing_fields(record, *fields)


def _with_image(image: Any, fault: str, identity: str = "") -> RecordCheck:
    if not isinstance(image, str) or not image:
        return RecordCheck((), fault or "image is not a path")
    # An unsafe name is not passed on, so nothing outside of the folder is opened.
    unsafe = path_fault(image)
    return RecordCheck((), fault or unsafe) if unsafe else RecordCheck((image,), fault, identity)


# HA-DPO, SENTINEL and SHR: Visual Genome's images


class _VisualGenome:
    """Map from Visual Genome image ids to image paths. `image_data.json` is read at the first look-up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: Mapping[str, str] | None = None

    def name(self, image_id: Any) -> str | None:
        if self._names is None:
            # Without its index every record gets a fault of its own, rather than the folder one for all.
            paths = read_image_paths(self.folder) if (self.folder / "image_data.json").exists() else {}
            self._names = {id: path.relative_to(self.folder).as_posix() for id, path in paths.items()}
        return self._names.get(as_id(image_id))

    def check(self, image_id: Any, fault: str, identity: str = "") -> RecordCheck:
        name = self.name(image_id)
        if name is None:
            return RecordCheck((), fault or ID_UNKNOWN)
        return _with_image(name, fault, identity)

    @property
    def parts(self) -> tuple[LayoutPart, ...]:
        folders = [self.folder / name for name in VG_FOLDERS]
        # The two folders are one dataset in two downloads: a mined subset may need only one.
        needed = not any(path.exists() for path in folders)
        return (LayoutPart(self.folder / "image_data.json"), *(LayoutPart(path, needed) for path in folders))

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(self.folder / name for name in VG_FOLDERS)


def _vg_folder(folder: Path, images: Path | None) -> _VisualGenome:
    return _VisualGenome(images or visual_genome(folder))


def _hadpo(folder: Path, images: Path | None) -> FolderLayout:
    vg = _vg_folder(folder, images)
    prefixes = ("", "hadpo/", "hadpo/llava-v1.5/", "llava-v1.5/")
    desc, pope = (
        first_existing(folder, *(f"{prefix}{name}" for prefix in prefixes))
        for name in ("desc_data.json", "pope_data.json")
    )
    possible = (  # a folder may hold either file or both
        IndexFile(desc, "desc-", "object", partial(_description, vg)),
        IndexFile(pope, "pope-", "array", partial(_hadpo_question, vg)),
    )
    indexes = tuple(index for index in possible if index.path.exists())
    parts = tuple(LayoutPart(index.path, needed=not indexes) for index in possible)
    return FolderLayout("hadpo", folder, (*parts, *vg.parts), indexes, vg.folder, vg.folders)


def _description(vg: _VisualGenome, entry: tuple[str, Any]) -> RecordCheck:
    image_id, record = entry
    try:
        # Any chosen text may be drawn with any rejected one; the prompt makes no difference.
        pairs = product(DESCRIBE_PROMPTS[:1], *choices(record), [pair_options(record)["context"]])
        fault = next(filter(None, starmap(check_pair, pairs)), "")
    except BadRecord as bad:
        fault = str(bad)
    return vg.check(image_id, fault, image_id)


def _hadpo_question(vg: _VisualGenome, record: Any) -> RecordCheck:
    fault = _field_fault(record, *QUESTION_FIELDS)
    if fault:  # a fault does not make its image unnamed
        image_id = record.get("image_id") if isinstance(record, dict) else None
        return RecordCheck((), fault) if image_id is None else vg.check(image_id, fault)
    texts = record["question"], record["chosen"], record["reject"]
    return vg.check(record["image_id"], pair_fault(record, *texts), json.dumps([as_id(record["image_id"]), *texts]))


def _sentinel(folder: Path, images: Path | None) -> FolderLayout:
    vg = _vg_folder(folder, images)
    names = ("sentinel", "data_pair")
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in SUFFIXES and any(name in path.name.lower() for name in names)
    ]
    indexes = tuple(
        IndexFile(path, "line-", "lines", partial(_sentinel_line, vg))
        if path.suffix == ".jsonl"
        else IndexFile(path, "image-", "object", partial(_sentinel_image, vg))
        for path in files
    )
    parts = tuple(LayoutPart(path) for path in files or [folder / "sentinel.json"])
    return FolderLayout("sentinel", folder, (*parts, *vg.parts), indexes, vg.folder, vg.folders)


def _sentinel_image(vg: _VisualGenome, entry: tuple[str, Any]) -> RecordCheck:
    """Check all pairs of an image: they are one record, whose fault is the first of theirs."""
    image_id, records = entry
    faults = map(_sentinel_fault, records) if isinstance(records, list) else ["no list of pairs"]
    return vg.check(image_id, next(filter(None, faults), ""), image_id)


def _sentinel_line(vg: _VisualGenome, record: Any) -> RecordCheck:
    fault = _field_fault(record, "image_id") or _sentinel_fault(record)
    image_id = record.get("image_id") if isinstance(record, dict) else None
    if image_id is None:
        return RecordCheck((), fault or ID_UNKNOWN)
    return vg.check(image_id, fault, "" if fault else json.dumps([as_id(image_id), *sentinel_pair(record)]))


def _sentinel_fault(record: Any) -> str:
    try:
        prompt, chosen, rejected, context, _ = sentinel_pair(record)
    except BadRecord as bad:
        return str(bad)
    return check_pair(prompt, chosen, rejected, context)


def _shr(folder: Path, images: Path | None) -> FolderLayout:
    vg = _vg_folder(folder, images)
    names = ("val_images_final.json", "shr_factual_part1.jsonl", "shr_factual_part2.jsonl")
    val, *factual = (shr_file(folder, name) for name in names)
    facts = [
        IndexFile(path, f"{path.stem.removeprefix('shr_')}-", "lines", _facts) for path in factual if path.exists()
    ]
    val_index = [IndexFile(val, "val-", "array", partial(_shr_image, vg))] if val.exists() else []
    regions = LayoutPart(vg.folder / "region_descriptions.json")
    parts = (*(LayoutPart(path) for path in (val, *factual)), *vg.parts, regions)
    return FolderLayout("shr", folder, parts, (*val_index, *facts), vg.folder, vg.folders)


def _shr_image(vg: _VisualGenome, record: Any) -> RecordCheck:
    fault = _field_fault(record, "image_id")
    return RecordCheck((), fault) if fault else vg.check(record["image_id"], "", as_id(record["image_id"]))


def _facts(record: Any) -> RecordCheck:
    """Check one line: {image id: facts about the image}."""
    if record is NOT_JSON:
        return RecordCheck((), "not valid JSON")
    if not isinstance(record, dict) or len(record) != 1:
        return RecordCheck((), "not one image id with its facts")
    [(image_id, facts)] = record.items()
    return RecordCheck((), "" if facts else "empty text", image_id)


# LLaVA, POPE and AMBER: images by name


def _llava(folder: Path, images: Path | None) -> FolderLayout:
    # Conversations are JSON arrays; a folder's other JSON files, such as relook-fix.json, are objects.
    files = [path for path in sorted(folder.glob("*.json")) if opens_with(path, "[")]
    root = images or (folder / "images" if (folder / "images").is_dir() else folder)
    several = len(files) > 1
    indexes = tuple(IndexFile(path, f"{path.stem}-" if several else "", "array", _llava_record) for path in files)
    parts = (*(LayoutPart(path) for path in files or [folder / "llava_v1_5_mix665k.json"]), LayoutPart(root))
    return FolderLayout("llava", folder, parts, indexes, root, (root,))


def _llava_record(record: Any) -> RecordCheck:
    # The names are collected first: even a bad record's images count as named.
    image_field = record.get("image") if isinstance(record, dict) else None
    listed = image_field if isinstance(image_field, list) else [image_field]
    names = tuple(name for name in listed if isinstance(name, str) and name)
    try:
        conversation("", record, Path())
        fault = next(filter(None, map(path_fault, names)), "")
    except BadRecord as bad:
        fault = str(bad)
    # LLaVA's own mix reuses ids: a duplicate has the same conversation on the same image.
    identity = "" if fault else json.dumps([names, record["conversations"]])
    return RecordCheck(tuple(name for name in names if not path_fault(name)), fault, identity)


def _pope(folder: Path, images: Path | None) -> FolderLayout:
    expected = [pope_file(folder, split) for split in POPE_SPLITS]
    # Beside the three expected splits, check whatever other POPE files lie there.
    files = {path for directory in {path.parent for path in expected} for path in directory.glob("*pope*.json")}
    indexes = tuple(
        IndexFile(path, f"{path.stem}-", "array" if opens_with(path, "[") else "lines", _pope_question)
        for path in sorted(files)
    )
    root = images or coco_images(folder)
    parts = (
        *(LayoutPart(path) for path in expected),
        LayoutPart(root),
        LayoutPart(coco_annotations(folder, "instances"), False),
    )
    return FolderLayout("pope", folder, parts, indexes, root, (root,))


def _pope_question(record: Any) -> RecordCheck:
    fault = _field_fault(record, "question_id", "image", "text", "label")
    if fault:
        image = record.get("image") if isinstance(record, dict) else None
        return _with_image(image, fault) if image else RecordCheck((), fault)
    fault = text_fault(record["text"])
    if not fault and record["label"] not in ("yes", "no"):
        fault = "label is neither yes nor no"
    return _with_image(record["image"], fault, str(record["question_id"]))


def _amber(folder: Path, images: Path | None) -> FolderLayout:
    root = images or amber_images(folder)
    query, annotations = amber_file(folder, "query"), amber_file(folder, "annotations.json")
    dimensions = [f"discriminative-{dimension}" for dimension in ("existence", "attribute", "relation")]
    files = [query / f"query_{kind}.json" for kind in ("all", "generative", "discriminative", *dimensions)]
    # The files overlap (query_all.json holds them all), so any one of them is enough.
    queries = [IndexFile(path, f"{path.stem}-", "array", _amber_query) for path in files if path.exists()]
    truth = [IndexFile(annotations, "annotations-", "array", _amber_annotation)] if annotations.exists() else []
    parts = (*(LayoutPart(path, needed=not queries) for path in files), LayoutPart(annotations), LayoutPart(root))
    return FolderLayout("amber", folder, parts, (*queries, *truth), root, (root,))


def _amber_query(record: Any) -> RecordCheck:
    fault = _field_fault(record, "id", "image", "query")
    if fault:
        image = record.get("image") if isinstance(record, dict) else None
        return _with_image(image, fault) if image else RecordCheck((), fault)
    return _with_image(record["image"], text_fault(record["query"]), str(record["id"]))


def _amber_annotation(record: Any) -> RecordCheck:
    fault = _field_fault(record, "id", "type", "truth")
    return RecordCheck((), fault, "" if fault else str(record["id"]))


LAYOUTS: dict[str, Callable[[Path, Path | None], FolderLayout]] = {
    "hadpo": _hadpo,
    "sentinel": _sentinel,
    "llava": _llava,
    "pope": _pope,
    "shr": _shr,
    "amber": _amber,
}
