"""`relook data fix`: a folder without the defects that `relook data check` finds.

A job writes into a folder of its own, file by file, each whole or not at all, and skips what is there: killed at any
moment and run again, it ends in the same files. Fixing in place is the same job in a hidden folder, whose files are
then moved over the old ones.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from relook.console import progress
from relook.data.ahead import ahead
from relook.data.check import FolderReport, IndexReport, check
from relook.data.examine import OTHER_SUFFIX, REPAIRABLE, rewritten
from relook.data.layouts import Layout
from relook.errors import DataError, RecipeError
from relook.files import read_object, takes, whole_file, write_json, write_jsonl

FIX_FILE = "relook-fix.json"  # what a job is, and at its end what it did
HIDDEN = ".relook-fix"
BROKEN = ("drop", "list")
TO_DO = ("written_again", "records_dropped", "records_listed")  # parts of relook-fix.json


def fix(
    name: str,
    folder: str | Path,
    out: str | Path | None = None,
    *,
    in_place: bool = False,
    images: str | Path | None = None,
    broken: str = "drop",
    copy: bool = False,
    workers: int = 0,
) -> dict[str, Any]:
    """Repair a dataset folder; returns what `relook-fix.json` says.

    Pictures of another format than their name says, or of an unusual mode, are written again in RGB under that name;
    so are those that lie under another extension than the records' (OCR-VQA's .gif). Records that cannot be used are
    left out of the new index files. Files of the folder itself are changed only with `in_place`, and none is removed.

    Args:
        out: a new folder of the same layout. Sound images are links to the old ones there.
        broken: "drop" leaves records that cannot be used out; "list" keeps them and names them in `relook-fix.json`.
        copy: copy sound images instead of linking them.

    Raises:
        RecipeError: not one of `out` and `in_place` is given, or `out` lies in the folder or holds something else.
        DataError: see `check`; or an index file cannot be read.
    """
    folder = Path(folder)
    out = None if out is None else Path(out)
    images = None if images is None else Path(images)
    if (out is None) != in_place:
        raise RecipeError("A fixed folder needs a place.", "Give --out FOLDER or --in-place, one of them.")
    if broken not in BROKEN:
        raise RecipeError(f"broken is {broken!r}.", f"Choose one of: {', '.join(BROKEN)}.")
    if out is not None and out.resolve().is_relative_to(folder.resolve()):
        raise RecipeError(f"{out} lies in {folder}.", "Choose another --out.")
    folder, images = folder.absolute(), images and images.absolute()
    job = {
        "layout": name,
        "folder": str(folder.resolve()),
        "images": str(images.resolve()) if images else "",
        "broken": broken,
        "copy": copy,
    }
    place = out or folder / HIDDEN
    if in_place and place.is_dir() and not (place / FIX_FILE).exists():
        shutil.rmtree(place)  # a job whose last file was moved when it was killed
    done = _finished(place, job)
    if done is None:
        report = check(name, folder, images, workers=workers)
        unread = next((one.problem for one in report.indexes if one.problem), "")
        if unread:
            raise DataError(f"An index file cannot be fixed: {unread}")
        plan = _plan(report, broken)
        if in_place and not any(plan[key] for key in TO_DO if key in plan) and (folder / FIX_FILE).exists():
            return read_object(folder / FIX_FILE)  # what was done before is still to be read
        write_json(place / FIX_FILE, {**job, "finished": False})
        done = {**job, **plan, "finished": True}
        _write(report, place, done, links=not in_place)
    if in_place:
        _install(place, folder, images)
    return done


def summary(done: Mapping[str, Any]) -> str:
    """What a job did, in a sentence: numbers, and why."""
    kind = "dropped" if "records_dropped" in done else "listed"
    records: Counter[str] = Counter()
    for faults in done[f"records_{kind}"].values():
        records.update({reason: len(names) for reason, names in faults.items()})
    again, lost = (
        {why: len(names) for why, names in done[key].items()} for key in ("written_again", "images_left_out")
    )
    whats = {"images written again": again, "images missing or broken": lost, f"records {kind}": records}
    return ", ".join(f"{sum(counts.values()):,} {what}{_reasons(counts)}" for what, counts in whats.items()) + "."


def _reasons(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{reason}: {count:,}' for reason, count in counts.items())})" if counts else ""


def _finished(place: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    """What a job has done that is finished; None for one that is new or was cut off."""
    if takes(place, FIX_FILE, "--out"):
        return None
    held = read_object(place / FIX_FILE)
    if any(held.get(key) != value for key, value in job.items()):
        other = ", ".join(f"{key} {held.get(key)}" for key, value in job.items() if held.get(key) != value)
        raise RecipeError(f"{place} holds another fix ({other}).", "Choose another --out, or remove it.")
    return held if held.get("finished") else None


def _plan(report: FolderReport, broken: str) -> dict[str, Any]:
    """What is written again, what is left out, and which records are no longer (or still) there."""
    faults = report.by_reason()
    records = {report.layout.relative(one.index.path): dict(one.faults) for one in report.indexes if one.faults}
    return {
        "written_again": {reason: faults[reason] for reason in REPAIRABLE if reason in faults},
        "images_left_out": {reason: list(names) for reason, names in faults.items() if reason not in REPAIRABLE},
        "records_dropped" if broken == "drop" else "records_listed": records,
    }


def _write(report: FolderReport, place: Path, done: dict[str, Any], links: bool) -> None:
    """All files of the new folder; `links` to what is sound and stays as it is, too."""
    layout = report.layout
    root = place / _beside(layout.image_root, layout)

    def write(name: str) -> None:
        reason, detail = report.faults.get(name, ("", ""))
        source, target = layout.image_root / name, root / name
        if target.exists():
            return
        if reason in REPAIRABLE:
            other = source.with_name(detail) if reason == OTHER_SUFFIX else source
            with whole_file(target) as temporary:
                temporary.write_bytes(rewritten(other, target.suffix))
        elif links and not reason:
            _carry(source, target, done["copy"])

    with progress("images written") as shown:
        for number, _ in enumerate(ahead(write, report.images), 1):
            shown(number, len(report.images))
    dropping = {one.index.path: one for one in report.indexes if one.faults and done["broken"] == "drop"}
    for one in dropping.values():
        _write_index(one, place / _beside(one.index.path, layout))
    for part in layout.parts if links else ():
        target = place / _beside(part.path, layout)
        if part.path.is_file() and part.path not in dropping and not target.exists():
            _carry(part.path, target, done["copy"])
    for left in place.rglob(".*.part"):  # of a job that was killed
        left.unlink()
    write_json(place / FIX_FILE, done)


def _beside(path: Path, layout: Layout) -> Path:
    """Where a file has its place in the new folder; an image root from elsewhere keeps its last name."""
    if path.is_relative_to(layout.folder):
        return path.relative_to(layout.folder)
    return layout.image_root.name / path.relative_to(layout.image_root)


def _carry(source: Path, target: Path, copy: bool) -> None:
    with whole_file(target) as temporary:
        if copy:
            shutil.copyfile(source, temporary)
        else:
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(source.resolve())


def _write_index(report: IndexReport, target: Path) -> None:
    index, bad = report.index, report.bad
    named = zip(index.names(report.content), report.content, strict=True)
    kept = [record for name, record in named if name not in bad]
    if index.kind == "lines":
        write_jsonl(target, kept)
    else:
        write_json(target, dict(kept) if index.kind == "object" else kept)


def _install(place: Path, folder: Path, images: Path | None) -> None:
    """Move a finished job's files over the folder's own. Moved ones are gone from the job, so a second run goes on."""
    outside = images is not None and not images.is_relative_to(folder)
    for path in list(_files(place)):
        inside = path.relative_to(place)
        if outside and images is not None and inside.parts[0] == images.name:
            target = images / inside.relative_to(images.name)
        else:
            target = folder / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.parent.stat().st_dev == path.stat().st_dev:
            path.replace(target)
        else:  # a linked folder on another disk
            _carry(path, target, copy=True)
            path.unlink()
    shutil.rmtree(place)


def _files(place: Path) -> Iterator[Path]:
    """Its files, `relook-fix.json` last: while it is there, the job has something to move."""
    for where, _, files in os.walk(place):
        yield from (Path(where, name) for name in files if Path(where, name) != place / FIX_FILE)
    yield place / FIX_FILE
