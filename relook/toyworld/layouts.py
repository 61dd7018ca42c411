"""Toyworld on disk, in the field's own layouts (LLaVA, Visual Genome, COCO, POPE, SHR): readers see no difference.

Each part is a folder with a marker, written first as unfinished and last as finished: a finished part is skipped, a
part that a kill cut short is completed to the same bytes, and a folder of somebody else's is refused (`DataError`).
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from relook.errors import DataError
from relook.evaluate.tasks.build_pope import build_splits
from relook.evaluate.tasks.shr import EXACT, FACTS, IMAGES
from relook.files import atomic_file, read_json, read_json_object, write_json, write_jsonl
from relook.toyworld.world import (
    IMAGE_SIZE,
    OBJECTS,
    SETTINGS,
    SPLIT_SIZE,
    SPLITS,
    SYNONYMS,
    Annotator,
    Scene,
    draw_scene,
    mention,
    opening,
    sample_scenes,
    sft_samples,
)

Progress = Callable[[int, int], object]  # called with (scenes written, scenes in all)
FORMAT = 4  # raise when the files of the same seed change
MARKER = "toyworld.json"
SHR_IMAGES = 200  # as many as the benchmark has


def write_sft(root: str | Path, seed: int, scenes: int = 4800, progress: Progress | None = None) -> Path:
    """Write LLaVA's conversation file and its images: `root/llava/toyworld_mix.json`, `root/llava/images/`."""
    root = Path(root)
    folder = root / "llava"
    if _begin(folder, "train", seed, scenes):
        path_of = lambda s: folder / "images" / _vg_name(s)  # noqa: E731
        drawn = _draw_all(sample_scenes(seed, "train", scenes), scenes, path_of, progress)
        records = []
        for scene in drawn:
            samples = sft_samples(scene, Annotator(), random.Random(f"sft/{scene.seed}"))
            for number, (prompt, response) in enumerate(samples):
                records.append(
                    {
                        "id": f"{scene.id}-{number}",
                        "image": _vg_name(scene),
                        "conversations": [
                            {"from": "human", "value": f"<image>\n{prompt}"},
                            {"from": "gpt", "value": response},
                        ],
                    }
                )
        write_json(folder / "toyworld_mix.json", records)
        _end(folder, seed, scenes)
    return folder


def write_vg(root: str | Path, seed: int, scenes: int, progress: Progress | None = None) -> Path:
    """Write Visual Genome's folder, to mine pairs from: image_data, objects, region_descriptions, two image folders."""
    root = Path(root)
    folder = root / "vg"
    if _begin(folder, "pairs", seed, scenes):
        path_of = lambda s: folder / _vg_folder(s) / _vg_name(s)  # noqa: E731
        _write_vg_files(folder, _draw_all(sample_scenes(seed, "pairs", scenes), scenes, path_of, progress))
        _end(folder, seed, scenes)
    return folder


def _write_vg_files(folder: Path, scenes: Sequence[Scene]) -> None:
    write_json(folder / "image_data.json", [_image_data(scene) for scene in scenes])
    write_json(folder / "objects.json", [_vg_objects(scene) for scene in scenes])
    write_json(folder / "region_descriptions.json", [_vg_regions(scene) for scene in scenes])


def write_eval(root: str | Path, split: str, seed: int, scenes: int = 300, progress: Progress | None = None) -> Path:
    """Write an evaluation folder.

    It has COCO annotations and images under val2014 names, POPE's three question files, and SHR's files with its images
    in Visual Genome's layout.
    """
    root = Path(root)
    folder = root / split
    if _begin(folder, split, seed, scenes):
        path_of = lambda s: folder / "val2014" / coco_name(s)  # noqa: E731
        drawn = _draw_all(sample_scenes(seed, split, scenes), scenes, path_of, progress)
        write_json(folder / "annotations" / "instances_val2014.json", coco_instances(drawn))
        objects = {coco_name(scene): scene.names for scene in drawn}
        for name, records in build_splits(objects, OBJECTS, seed).items():
            write_jsonl(folder / "pope" / f"coco_pope_{name}.json", records)
        _write_shr(folder, drawn[:SHR_IMAGES])
        _end(folder, seed, scenes)
    return folder


def _write_shr(folder: Path, scenes: Sequence[Scene]) -> None:
    """Write SHR's image list and facts, Visual Genome's copies of the images, and `exact.json` with all objects."""
    for scene in scenes:
        with atomic_file(folder / "vg" / _vg_folder(scene) / _vg_name(scene)) as temporary:
            shutil.copyfile(folder / "val2014" / coco_name(scene), temporary)
    _write_vg_files(folder / "vg", scenes)
    write_json(folder / "shr" / IMAGES, [{"image_id": scene.id} for scene in scenes])
    # The facts are spread over several files, as in the benchmark.
    for part, name in enumerate(FACTS):
        facts = [{str(scene.id): [opening(scene.setting)]} for scene in scenes[part :: len(FACTS)]]
        write_jsonl(folder / "shr" / name, facts)
    names = {name: SYNONYMS.get(name, []) for name in (*OBJECTS, *SETTINGS)}
    images = {str(scene.id): [*scene.names, scene.setting] for scene in scenes}
    write_json(folder / "shr" / EXACT, {"names": names, "images": images})


def coco_name(scene: Scene) -> str:
    return f"COCO_val2014_{scene.id:012d}.jpg"


def coco_instances(scenes: Sequence[Scene]) -> dict[str, Any]:
    """Return COCO's instances layout; categories carry their synonyms beside the official keys."""
    ids = {name: number for number, name in enumerate(OBJECTS, 1)}
    annotations: list[dict[str, Any]] = []
    for scene in scenes:
        for placed in scene.objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": scene.id,
                    "category_id": ids[placed.name],
                    "bbox": list(placed.box),
                    "area": placed.box[2] * placed.box[3],
                    "iscrowd": 0,
                }
            )
    return {
        "images": [{"id": s.id, "file_name": coco_name(s), "width": IMAGE_SIZE, "height": IMAGE_SIZE} for s in scenes],
        "categories": [
            {"id": number, "name": name, "supercategory": "toy", "synonyms": SYNONYMS.get(name, [])}
            for name, number in ids.items()
        ],
        "annotations": annotations,
    }


def _vg_name(scene: Scene) -> str:
    return f"{scene.id}.jpg"


def _vg_folder(scene: Scene) -> str:
    # Visual Genome's images lie in two folders.
    return "VG_100K" if scene.id % 2 else "VG_100K_2"


def _image_data(scene: Scene) -> dict[str, Any]:
    return {
        "image_id": scene.id,
        "url": f"https://toyworld.invalid/rak248/{_vg_folder(scene)}/{_vg_name(scene)}",
        "width": IMAGE_SIZE,
        "height": IMAGE_SIZE,
        "coco_id": None,
        "flickr_id": None,
    }


def _vg_objects(scene: Scene) -> dict[str, Any]:
    return {
        "image_id": scene.id,
        "objects": [
            # At most nine objects, one a cell of the grid, so these ids are unique.
            {"object_id": scene.id * 10 + i, "names": [placed.name], "synsets": [], **_xywh(placed.box, ("w", "h"))}
            for i, placed in enumerate(scene.objects)
        ],
    }


def _vg_regions(scene: Scene) -> dict[str, Any]:
    return {
        "id": scene.id,
        "regions": [
            {
                "region_id": scene.id * 10 + i,
                "image_id": scene.id,
                "phrase": mention(placed.name),
                **_xywh(placed.box, ("width", "height")),
            }
            for i, placed in enumerate(scene.objects)
        ],
    }


def _xywh(box: tuple[int, int, int, int], size: tuple[str, str]) -> dict[str, int]:
    return dict(zip(("x", "y", *size), box, strict=True))


def _draw_all(
    scenes: Iterable[Scene], count: int, path_of: Callable[[Scene], Path], progress: Progress | None
) -> list[Scene]:
    drawn = []
    for number, scene in enumerate(scenes, 1):
        with atomic_file(path_of(scene)) as temporary:
            draw_scene(scene).save(temporary, format="JPEG", quality=95)
        drawn.append(scene)
        if progress is not None:
            progress(number, count)
    return drawn


def is_finished(folder: Path) -> bool:
    """Return True if a part of a world has been written to its end."""
    return bool(read_json_object(folder / MARKER, optional=True).get("finished"))


def _begin(folder: Path, split: str, seed: int, scenes: int) -> bool:
    """Return True if a part has to be written.

    Raises:
        DataError: there is no such split, or the folder holds something else.
    """
    if split not in SPLITS or not 0 < scenes <= SPLIT_SIZE:
        raise DataError(
            f"Toyworld has no split {split} of {scenes} scenes.",
            f"Splits are {', '.join(SPLITS)}, of 1 to {SPLIT_SIZE} scenes.",
        )
    expected = {"format": FORMAT, "seed": seed, "scenes": scenes}
    marker = folder / MARKER
    if marker.exists():
        stored = read_json(marker)
        if not isinstance(stored, dict) or any(stored.get(key) != value for key, value in expected.items()):
            raise DataError(f"{folder} holds another toyworld ({stored}).", "Choose another folder, or remove it.")
        return not stored.get("finished", False)  # begun by the same job: the same bytes are written again
    if folder.exists() and (not folder.is_dir() or any(map(_foreign, folder.iterdir()))):
        raise DataError(f"{folder} holds something else.", "Choose another folder.")
    write_json(marker, {**expected, "finished": False})
    return True


def _foreign(path: Path) -> bool:
    # A kill during the very first write leaves a half-written marker, which is ours.
    return not (path.name.startswith(f".{MARKER}.") and path.name.endswith(".part"))


def _end(folder: Path, seed: int, scenes: int) -> None:
    write_json(folder / MARKER, {"format": FORMAT, "seed": seed, "scenes": scenes, "finished": True})
