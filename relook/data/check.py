"""`relook data check`: what is there of a layout, and what is wrong with its records and images."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import Any

from relook.console import output, plain_table, progress
from relook.data.examine import FORMATS, MISSING, OTHER_SUFFIX, REPAIRABLE, Found, examine_all, rewritten
from relook.data.images import ahead
from relook.data.layouts import Index, Layout, find_layout
from relook.errors import DataError, RecipeError, RelookError, some
from relook.files import read_object, takes, text_hash, whole_file, write_json, write_jsonl

# ----------------------------------------------------------------------------------------------------

BATCH = 32  # images that a process takes at a time
ALONE = 256  # images that are examined before other processes would have started


@dataclass(frozen=True)
class IndexReport:
    """An index file: what was read, and the names of the records that cannot be used, by reason.

    `problem` says why the file itself could not be read.
    """

    index: Index
    content: Sequence[Any]
    faults: Mapping[str, list[str]]
    problem: str = ""

    @property
    def bad(self) -> set[str]:
        return {name for names in self.faults.values() for name in names}


@dataclass(frozen=True)
class FolderReport:
    """What `check` found.

    Args:
        images: every image that was examined, by name; whether a record names it.
        faults: what is wrong with some of them.
    """

    layout: Layout
    indexes: tuple[IndexReport, ...]
    images: Mapping[str, bool]
    faults: Mapping[str, Found]

    @property
    def clean(self) -> bool:
        missing = any(part.needed and not part.there for part in self.layout.parts)
        return not (missing or self.faults or any(one.faults or one.problem for one in self.indexes))

    def by_reason(self) -> dict[str, dict[str, str]]:
        """Image faults: reason to name to detail."""
        found: dict[str, dict[str, str]] = {}
        for name, (reason, detail) in self.faults.items():
            found.setdefault(reason, {})[readable(name)] = detail
        return found

    def to_json(self) -> dict[str, Any]:
        layout, absent = self.layout, sum(reason in (MISSING, OTHER_SUFFIX) for reason, _ in self.faults.values())
        named = sum(self.images.values())
        return {
            "layout": layout.name,
            "folder": str(layout.folder),
            "clean": self.clean,
            "parts": [
                {"path": layout.relative(part.path), "there": part.there, "needed": part.needed}
                for part in layout.parts
            ],
            "records": {
                layout.relative(one.index.path): {
                    "count": len(one.content),
                    "sound": len(one.content) - len(one.bad),
                    "problem": one.problem,
                    "faults": dict(one.faults),
                }
                for one in self.indexes
            },
            "images": {
                "named": named,
                "not_named": len(self.images) - named,
                "on_disk": len(self.images) - absent,
                "sound": len(self.images) - len(self.faults),
                "faults": self.by_reason(),
            },
        }


def readable(name: str) -> str:
    """A file's name to be shown or written: one that is no text comes with escapes."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def check(
    name: str, folder: Path, images: Path | None = None, named_only: bool = False, workers: int = 0
) -> FolderReport:
    """Examine a dataset folder: its parts, every record, and every image.

    A record has one fault at most, the first that is found; so has an image.

    Args:
        name: a layout of `relook.data.layouts`.
        images: see `find_layout`.
        named_only: leave out images that no record names.
        workers: processes; 0 is one for each processor.

    Raises:
        DataError: see `find_layout`.
    """
    layout = find_layout(name, folder, images)
    names: dict[str, bool] = {}
    read = [_read(index, names) for index in layout.indexes]
    if not named_only:
        for found in _walk(layout):
            names.setdefault(found, False)
    faults = dict(_faults(layout.image_root, names, workers))
    return FolderReport(layout, tuple(_with_images(one, faults) for one in read), names, faults)


def _read(index: Index, names: dict[str, bool]) -> IndexReport:
    """Judge an index's records by themselves; the images that they name are added to `names`."""
    try:
        content = index.load()
    except DataError as error:
        return IndexReport(index, [], {}, str(error))
    faults: dict[str, list[str]] = {}
    identities: set[str] = set()
    with progress(f"records of {index.path.name}") as report:
        for number, (name, record) in enumerate(zip(index.names(content), content, strict=True), 1):
            judged = index.judge(record)
            names.update(dict.fromkeys(judged.images, True))
            fault = judged.fault or _text_fault(record)
            if not fault and judged.identity:
                identity = text_hash(judged.identity)
                fault = "duplicate" if identity in identities else ""
                identities.add(identity)
            if fault:
                faults.setdefault(fault, []).append(name)
            if number % 1000 == 0 or number == len(content):
                report(number, len(content))
    return IndexReport(index, content, faults)


def _text_fault(record: Any) -> str:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can carry
        return "not valid Unicode"
    return ""


def _with_images(report: IndexReport, images: Mapping[str, Found]) -> IndexReport:
    """The report with those records added whose images are missing or broken."""
    lost = {name: reason for name, (reason, _) in images.items() if reason not in REPAIRABLE}
    if not lost:
        return report
    bad, faults = report.bad, dict(report.faults)
    for name, record in zip(report.index.names(report.content), report.content, strict=True):
        if name not in bad:
            reasons = [lost[image] for image in report.index.judge(record).images if image in lost]
            if reasons:
                fault = "image file missing" if reasons[0] == MISSING else "image file broken"
                faults.setdefault(fault, []).append(name)
    return IndexReport(report.index, report.content, faults, report.problem)


def _walk(layout: Layout) -> Iterator[str]:
    """Names of all image files of a layout, relative to its image root. Hidden ones are nobody's pictures."""
    seen: set[tuple[int, int]] = set()  # links may lead round in a circle
    for top in layout.image_folders:
        for place, folders, files in os.walk(top, followlinks=True):
            status = os.stat(place)  # noqa: PTH116
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            start = os.path.relpath(place, layout.image_root)
            for name in sorted(files):
                if not name.startswith(".") and os.path.splitext(name)[1].lower() in FORMATS:  # noqa: PTH122
                    yield name if start == "." else f"{start}/{name}"


def _faults(root: Path, names: Mapping[str, bool], workers: int) -> Iterator[tuple[str, Found]]:
    """The images that something is wrong with, in order."""
    workers = workers or os.cpu_count() or 1
    pool = None
    if workers > 1 and len(names) > ALONE:
        # Spawned: a fork would copy the threads' locks, as of the progress bar's.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, initializer=_follow)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        for _ in range(workers):  # each starts one: Ctrl-C is for the first process alone
            pool.submit(int)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    batches = _batches(names)
    examined = partial(examine_all, root)
    results = map(examined, _batches(names)) if pool is None else ahead(examined, _batches(names), pool, 4 * workers)
    done = 0
    with progress("images") as report:
        try:
            for batch, found in zip(batches, results, strict=True):
                done += len(batch)
                report(done, len(names))
                yield from ((name, fault) for name, fault in zip(batch, found, strict=True) if fault[0])
        except BrokenProcessPool:
            raise RelookError(
                f"A process that reads images was ended, at image {done:,} or soon after.",
                "Was memory short? Give fewer --workers.",
            ) from None


def _follow() -> None:
    """In a process that reads images: end with the first process, also where that is killed."""
    first = multiprocessing.parent_process()
    assert first is not None

    def end() -> None:
        first.join()
        os._exit(1)

    Thread(target=end, daemon=True).start()


def _batches(names: Iterable[str]) -> Iterator[Sequence[str]]:
    rest = iter(names)
    while batch := tuple(islice(rest, BATCH)):
        yield batch


def print_report(report: FolderReport) -> None:
    """What `check` found, as tables on standard output."""
    out, found = output(), report.to_json()
    out.print(f"{report.layout.name} in {report.layout.folder}: {'clean' if report.clean else 'has defects'}")
    parts = plain_table("part", "")
    for part in found["parts"]:
        parts.add_row(
            part["path"], "there" if part["there"] else "MISSING" if part["needed"] else "optional, not there"
        )
    records = plain_table("records", "all", "sound", "fault", "number", "first", right=("all", "sound", "number"))
    for name, one in found["records"].items():
        records.add_row(name, f"{one['count']:,}", f"{one['sound']:,}", one["problem"])
        for reason, names in one["faults"].items():
            records.add_row("", "", "", reason, f"{len(names):,}", some(names, 3))
    images = plain_table("images", "number", "first", right=("number",))
    for key in ("named", "not_named", "on_disk", "sound"):
        images.add_row(key.replace("_", " "), f"{found['images'][key]:,}")
    for reason, names in found["images"]["faults"].items():
        first = [f"{name} ({detail})" if detail else name for name, detail in names.items()]
        images.add_row(reason, f"{len(names):,}", some(first, 3))
    for one in (parts, records, images):
        out.print(one)


# ----------------------------------------------------------------------------------------------------
# `relook data fix`: a folder without the defects that `relook data check` finds.
#
# A job writes into a folder of its own, file by file, each whole or not at all, and skips what is there: killed at any
# moment and run again, it ends in the same files. Fixing in place is the same job in a hidden folder, whose files are
# then moved over the old ones.

FIX_FILE = "relook-fix.json"  # what a job is, and at its end what it did
HIDDEN = ".relook-fix"
BROKEN = ("drop", "list")
TO_DO = ("written_again", "records_dropped", "records_listed")  # parts of relook-fix.json


def fix(
    name: str,
    folder: Path,
    out: Path | None = None,
    *,
    in_place: bool = False,
    images: Path | None = None,
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
    """What a job did, in a sentence."""
    kind = "dropped" if "records_dropped" in done else "listed"
    records = sum(len(names) for faults in done[f"records_{kind}"].values() for names in faults.values())
    again, lost = (sum(map(len, done[key].values())) for key in ("written_again", "images_left_out"))
    return f"{again:,} images written again, {lost:,} missing or broken, {records:,} records {kind}."


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
