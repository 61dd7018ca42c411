"""Layouts of dataset folders: which files belong to one, where its images are, and what is wrong with a record.

`find_layout` looks for the parts of a layout in a folder; each of its index files judges its own records. Nothing here
opens an image.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from relook.data.annotations import read_image_paths
from relook.data.parquet import leads_out
from relook.data.readers import QUESTION_FIELDS, BadRecord, conversation
from relook.errors import DataError
from relook.files import read_json, read_text

VG_FOLDERS = ("VG_100K", "VG_100K_2")
POPE_SPLITS = ("random", "popular", "adversarial")
NOT_JSON = object()  # stands for a line that could not be read


@dataclass(frozen=True)
class Judged:
    """What a record says of itself.

    Args:
        images: the files that it names, relative to the layout's image root.
        fault: why it cannot be used, empty where it can.
        identity: two records with the same one are duplicates; empty where the format allows them.
    """

    images: tuple[str, ...] = ()
    fault: str = ""
    identity: str = ""


@dataclass(frozen=True)
class Index:
    """A file of records.

    Args:
        prefix: a record's name is this and its position, or its key where the file is a JSON object.
        kind: "array", "object" or "lines".
    """

    path: Path
    prefix: str
    kind: str
    judge: Callable[[Any], Judged]

    def load(self) -> list[Any]:
        """The file's records; of an object its (key, value) pairs, also where a key stands twice.

        Raises:
            DataError: the file cannot be read as such.
        """
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
        """A name for each record, no two the same."""
        if self.kind != "object":
            yield from (f"{self.prefix}{number}" for number in range(len(content)))
            return
        times: Counter[str] = Counter()
        for key, _ in content:
            times[key] += 1
            yield f"{self.prefix}{key}" + (f" (number {times[key]})" if times[key] > 1 else "")


@dataclass(frozen=True)
class Part:
    """A file or folder that belongs to a layout. `needed` where the layout cannot be used without it."""

    path: Path
    needed: bool = True

    @property
    def there(self) -> bool:
        return self.path.exists()


@dataclass(frozen=True)
class Layout:
    """A layout as it was found in a folder.

    Args:
        parts: all files and folders that belong to it, there or not.
        indexes: the files of records among them.
        image_root: what the records' image names are relative to.
        image_folders: where all of its images lie.
    """

    name: str
    folder: Path
    parts: tuple[Part, ...]
    indexes: tuple[Index, ...]
    image_root: Path
    image_folders: tuple[Path, ...]

    def relative(self, path: Path) -> str:
        """A path as seen from the folder; one that is elsewhere as it is."""
        return path.relative_to(self.folder).as_posix() if path.is_relative_to(self.folder) else str(path)


def find_layout(name: str, folder: Path, images: Path | None = None) -> Layout:
    """Look for a layout's parts.

    Args:
        name: hadpo, llava, pope, shr or amber.
        folder: where its files are.
        images: the root of its images, where that is elsewhere: Visual Genome's folder (hadpo, shr), LLaVA's image
            root, COCO's val2014, AMBER's image folder.

    Raises:
        DataError: there is no such layout or folder, no file of records in it, or Visual Genome's index is broken.
    """
    if name not in LAYOUTS:
        raise DataError(f"There is no layout {name!r}.", f"Known ones: {', '.join(LAYOUTS)}.")
    for path in (folder, images):
        if path is not None and not path.is_dir():
            raise DataError(f"There is no folder {path}.", "Check the path.")
    layout = LAYOUTS[name](folder.absolute(), images and images.absolute())
    if not layout.indexes:
        wanted = ", ".join(dict.fromkeys(part.path.name for part in layout.parts if part.path.suffix))
        raise DataError(f"{folder} has none of {name}'s files ({wanted}).", "Check the folder and --layout.")
    return layout


def _line(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return NOT_JSON


def _first(folder: Path, *places: str) -> Path:
    """The first of some places in a folder that exists; the first of all where none does."""
    return next((folder / place for place in places if (folder / place).exists()), folder / places[0])


def _missing_fields(record: Any, *fields: str) -> str:
    if record is NOT_JSON:
        return "not valid JSON"
    missing = [key for key in fields if not isinstance(record, dict) or key not in record]
    return f"no {', '.join(missing)}" if missing else ""


def _text_fault(*texts: Any) -> str:
    return "" if all(isinstance(text, str) and text.strip() for text in texts) else "empty text"


def _name_fault(name: str) -> str:
    return "image path leads out of its folder" if leads_out(name) else ""


def _with_image(image: Any, fault: str, identity: str = "") -> Judged:
    if not isinstance(image, str) or not image:
        return Judged((), fault or "image is not a path")
    unsafe = _name_fault(image)
    return Judged((), fault or unsafe) if unsafe else Judged((image,), fault, identity)


# HA-DPO and SHR: Visual Genome's images


class _VisualGenome:
    """Where the images of an id are. `image_data.json` is read at the first question."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: Mapping[str, str] | None = None

    def name(self, image_id: Any) -> str | None:
        if self._names is None:
            there = (self.folder / "image_data.json").exists()
            paths = read_image_paths(self.folder) if there else {}
            self._names = {id: path.relative_to(self.folder).as_posix() for id, path in paths.items()}
        return self._names.get(str(image_id))

    def judge(self, image_id: Any, fault: str, identity: str = "") -> Judged:
        name = self.name(image_id)
        if name is None:
            return Judged((), fault or "image id not in image_data.json")
        return _with_image(name, fault, identity)

    @property
    def parts(self) -> tuple[Part, ...]:
        folders = [self.folder / name for name in VG_FOLDERS]
        # Its two folders are one set in two downloads: a mined subset may need only one.
        needed = not any(path.exists() for path in folders)
        return (Part(self.folder / "image_data.json"), *(Part(path, needed) for path in folders))

    @property
    def folders(self) -> tuple[Path, ...]:
        return tuple(self.folder / name for name in VG_FOLDERS)


def _vg_place(folder: Path, images: Path | None) -> _VisualGenome:
    return _VisualGenome(images or _first(folder, "vg/image_data.json", "VG/image_data.json", "image_data.json").parent)


def _hadpo(folder: Path, images: Path | None) -> Layout:
    vg = _vg_place(folder, images)
    inside = ("", "hadpo/", "hadpo/llava-v1.5/", "llava-v1.5/")
    desc, pope = (
        _first(folder, *(f"{place}{name}" for place in inside)) for name in ("desc_data.json", "pope_data.json")
    )
    known = (
        Index(desc, "desc-", "object", partial(_description, vg)),
        Index(pope, "pope-", "array", partial(_hadpo_question, vg)),
    )
    indexes = tuple(index for index in known if index.path.exists())
    parts = tuple(Part(index.path, needed=not indexes) for index in known)
    return Layout("hadpo", folder, (*parts, *vg.parts), indexes, vg.folder, vg.folders)


def _description(vg: _VisualGenome, entry: tuple[str, Any]) -> Judged:
    image_id, record = entry
    texts: list[Any] = [record.get(key) if isinstance(record, dict) else None for key in ("chosen", "rejected")]
    if not all(isinstance(choices, list) and choices for choices in texts):
        fault = "no chosen or no rejected description"
    else:
        fault = _text_fault(*texts[0], *texts[1])
        if not fault and {text.strip() for text in texts[0]} & {text.strip() for text in texts[1]}:
            fault = "chosen equals rejected"
    return vg.judge(image_id, fault, image_id)


def _hadpo_question(vg: _VisualGenome, record: Any) -> Judged:
    fault = _missing_fields(record, *QUESTION_FIELDS)
    if fault:
        image_id = record.get("image_id") if isinstance(record, dict) else None
        return Judged((), fault) if image_id is None else vg.judge(image_id, fault)
    question, chosen, rejected = record["question"], record["chosen"], record["reject"]
    fault = _text_fault(question, chosen, rejected)
    if not fault and chosen.strip() == rejected.strip():
        fault = "chosen equals rejected"
    return vg.judge(record["image_id"], fault, f"{record['image_id']}\n{question}\n{chosen}\n{rejected}")


def _shr(folder: Path, images: Path | None) -> Layout:
    vg = _vg_place(folder, images)
    names = ("val_images_final.json", "shr_factual_part1.jsonl", "shr_factual_part2.jsonl")
    val, *factual = (_first(folder, name, f"shr/{name}") for name in names)
    facts = [Index(path, f"{path.stem.removeprefix('shr_')}-", "lines", _facts) for path in factual if path.exists()]
    known = [Index(val, "val-", "array", partial(_shr_image, vg))] if val.exists() else []
    regions = Part(vg.folder / "region_descriptions.json")
    parts = (*(Part(path) for path in (val, *factual)), *vg.parts, regions)
    return Layout("shr", folder, parts, (*known, *facts), vg.folder, vg.folders)


def _shr_image(vg: _VisualGenome, record: Any) -> Judged:
    fault = _missing_fields(record, "image_id")
    return Judged((), fault) if fault else vg.judge(record["image_id"], "", str(record["image_id"]))


def _facts(record: Any) -> Judged:
    """One line: {image id: what is true of it}."""
    if record is NOT_JSON:
        return Judged((), "not valid JSON")
    if not isinstance(record, dict) or len(record) != 1:
        return Judged((), "not one image id with its facts")
    [(image_id, facts)] = record.items()
    return Judged((), "" if facts else "empty text", image_id)


# LLaVA, POPE and AMBER: images by name


def _llava(folder: Path, images: Path | None) -> Layout:
    files = [path for path in sorted(folder.glob("*.json")) if _opens_with(path, "[")]
    root = images or (folder / "images" if (folder / "images").is_dir() else folder)
    many = len(files) > 1
    indexes = tuple(Index(path, f"{path.stem}-" if many else "", "array", _llava_record) for path in files)
    parts = (*(Part(path) for path in files or [folder / "llava_v1_5_mix665k.json"]), Part(root))
    return Layout("llava", folder, parts, indexes, root, (root,))


def _opens_with(path: Path, mark: str) -> bool:
    with path.open("rb") as file:
        return file.read(1024).lstrip().startswith(mark.encode())


def _llava_record(record: Any) -> Judged:
    given = record.get("image") if isinstance(record, dict) else None
    names = tuple(name for name in (given if isinstance(given, list) else [given]) if isinstance(name, str) and name)
    try:
        conversation("", record, Path())
        fault = next(filter(None, map(_name_fault, names)), "")
    except BadRecord as bad:
        fault = str(bad)
    # Ids are shared in LLaVA's own mix: a duplicate says the same of the same image.
    said = "" if fault else json.dumps([names, record["conversations"]])
    return Judged(tuple(name for name in names if not _name_fault(name)), fault, said)


def _pope(folder: Path, images: Path | None) -> Layout:
    places = ("pope", "", "output/coco", "POPE/output/coco")
    expected = [
        _first(folder, *(f"{place}/coco_pope_{split}.json".lstrip("/") for place in places)) for split in POPE_SPLITS
    ]
    files = {path for where in {path.parent for path in expected} for path in where.glob("*pope*.json")}
    indexes = tuple(
        Index(path, f"{path.stem}-", "array" if _opens_with(path, "[") else "lines", _pope_question)
        for path in sorted(files)
    )
    root = images or _first(folder, "val2014", "coco2014/val2014", "images")
    parts = (*(Part(path) for path in expected), Part(root), Part(folder / "annotations/instances_val2014.json", False))
    return Layout("pope", folder, parts, indexes, root, (root,))


def _pope_question(record: Any) -> Judged:
    fault = _missing_fields(record, "question_id", "image", "text", "label")
    if fault:
        image = record.get("image") if isinstance(record, dict) else None
        return _with_image(image, fault) if image else Judged((), fault)
    fault = _text_fault(record["text"])
    if not fault and record["label"] not in ("yes", "no"):
        fault = "label is neither yes nor no"
    return _with_image(record["image"], fault, str(record["question_id"]))


def _amber(folder: Path, images: Path | None) -> Layout:
    root = images or _first(folder, "image", "images", "data/image")
    query = _first(folder, "data/query", "query")
    annotations = _first(folder, "data/annotations.json", "annotations.json")
    dimensions = [f"discriminative-{of}" for of in ("existence", "attribute", "relation")]
    files = [query / f"query_{kind}.json" for kind in ("all", "generative", "discriminative", *dimensions)]
    asked = [Index(path, f"{path.stem}-", "array", _amber_query) for path in files if path.exists()]
    true = [Index(annotations, "annotations-", "array", _amber_annotation)] if annotations.exists() else []
    parts = (*(Part(path, needed=not asked) for path in files), Part(annotations), Part(root))
    return Layout("amber", folder, parts, (*asked, *true), root, (root,))


def _amber_query(record: Any) -> Judged:
    fault = _missing_fields(record, "id", "image", "query")
    if fault:
        image = record.get("image") if isinstance(record, dict) else None
        return _with_image(image, fault) if image else Judged((), fault)
    return _with_image(record["image"], _text_fault(record["query"]), str(record["id"]))


def _amber_annotation(record: Any) -> Judged:
    fault = _missing_fields(record, "id", "type", "truth")
    return Judged((), fault, "" if fault else str(record["id"]))


LAYOUTS: dict[str, Callable[[Path, Path | None], Layout]] = {
    "hadpo": _hadpo,
    "llava": _llava,
    "pope": _pope,
    "shr": _shr,
    "amber": _amber,
}
