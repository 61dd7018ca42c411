"""`relook data check` and `relook data fix`: missing parts, bad records and bad images of a dataset folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from relook.console import plain_table, progress, stdout_console
from relook.data.examine import (
    FORMATS,
    MISSING,
    OTHER_SUFFIX,
    REPAIRABLE,
    TURNED,
    Finding,
    examine_all,
    exit_with_parent,
    rewritten,
)
from relook.data.images import prefetch_map
from relook.data.layouts import FolderLayout, IndexFile, find_layout
from relook.data.samples import IMAGE_MISSING
from relook.errors import DataError, RecipeError, RelookError, preview
from relook.files import atomic_file, is_free, read_json_object, text_hash, write_json, write_jsonl

# ----------------------------------------------------------------------------------------------------

BATCH = 32  # images per task of a worker process
ONE_PROCESS_LIMIT = 256  # up to so many images, one process is done before workers would have started


@dataclass(frozen=True)
class IndexReport:
    """Content of an index file, and the names of its unusable records by reason.

    `problem` says why the file itself could not be read.
    """

    index: IndexFile
    content: Sequence[Any]
    faults: Mapping[str, list[str]]
    problem: str = ""

    @property
    def bad(self) -> set[str]:
        return {name for names in self.faults.values() for name in names}


@dataclass(frozen=True)
class FolderReport:
    """Findings of `check_folder`.

    Args:
        images: name of every examined image, to True if a record names it.
        faults: reason and detail for each image with a fault.
        turned: images that viewers turn, to their EXIF orientation. Training and evaluation ignore it, as LLaVA does.
    """

    layout: FolderLayout
    indexes: tuple[IndexReport, ...]
    images: Mapping[str, bool]
    faults: Mapping[str, Finding]
    turned: Mapping[str, str]

    @property
    def clean(self) -> bool:
        missing = any(part.needed and not part.exists for part in self.layout.parts)
        return not (missing or self.faults or any(file.faults or file.problem for file in self.indexes))

    def by_reason(self) -> dict[str, dict[str, str]]:
        """Group the image faults: reason to name to detail."""
        grouped: dict[str, dict[str, str]] = {}
        for name, (reason, detail) in self.faults.items():
            grouped.setdefault(reason, {})[readable(name)] = detail
        return grouped

    def to_json(self) -> dict[str, Any]:
        # `images` has the missing files that records name, too.
        layout, absent = self.layout, sum(reason in (MISSING, OTHER_SUFFIX) for reason, _ in self.faults.values())
        referenced = sum(self.images.values())
        return {
            "layout": layout.name,
            "folder": str(layout.folder),
            "clean": self.clean,
            "parts": [
                {"path": layout.relative(part.path), "there": part.exists, "needed": part.needed}
                for part in layout.parts
            ],
            "records": {
                layout.relative(file.index.path): {
                    "count": len(file.content),
                    "sound": len(file.content) - len(file.bad),
                    "problem": file.problem,
                    "faults": dict(file.faults),
                }
                for file in self.indexes
            },
            "images": {
                "named": referenced,
                "not_named": len(self.images) - referenced,
                "on_disk": len(self.images) - absent,
                "sound": len(self.images) - len(self.faults),
                "faults": self.by_reason(),
                "turned_by_exif": {readable(name): detail for name, detail in self.turned.items()},
            },
        }


def readable(name: str) -> str:
    """Return a file name fit for display, with escapes if it is not printable."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def check_folder(
    name: str, folder: str | Path, images: str | Path | None = None, named_only: bool = False, workers: int = 0
) -> FolderReport:
    """Examine a dataset folder: its parts, every record, and every image.

    A record or an image has at most one fault, the first one found.

    Args:
        name: a layout of `relook.data.layouts`.
        images: see `find_layout`.
        named_only: leave out images that no record names.
        workers: number of processes; 0 means one per CPU.

    Raises:
        DataError: see `find_layout`.
    """
    folder = Path(folder)
    images = None if images is None else Path(images)
    layout = find_layout(name, folder, images)
    names: dict[str, bool] = {}
    index_reports = [_read(index, names) for index in layout.indexes]
    if not named_only:
        for image_name in _walk(layout):
            names.setdefault(image_name, False)
    findings = dict(_examine_images(layout.image_root, names, workers))
    turned = {name: detail for name, (reason, detail) in findings.items() if reason == TURNED}
    faults = {name: fault for name, fault in findings.items() if name not in turned}
    return FolderReport(layout, tuple(_with_images(file, faults) for file in index_reports), names, faults, turned)


def _read(index: IndexFile, names: dict[str, bool]) -> IndexReport:
    """Check the records of an index without their images; add the image names to `names`."""
    try:
        content = index.load()
    except DataError as error:
        return IndexReport(index, [], {}, str(error))
    faults: dict[str, list[str]] = {}
    identities: set[str] = set()
    with progress(f"records of {index.path.name}") as report:
        for number, (name, record) in enumerate(zip(index.names(content), content, strict=True), 1):
            checked = index.check(record)
            names.update(dict.fromkeys(checked.images, True))
            fault = checked.fault or _unicode_fault(record)
            if not fault and checked.identity:
                identity = text_hash(checked.identity)  # 16 characters, where a conversation may have thousands
                fault = "duplicate" if identity in identities else ""
                identities.add(identity)
            if fault:
                faults.setdefault(fault, []).append(name)
            if number % 1000 == 0 or number == len(content):
                report(number, len(content))
    return IndexReport(index, content, faults)


def _unicode_fault(record: Any) -> str:
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can carry
        return "not valid Unicode"
    return ""


def _with_images(report: IndexReport, images: Mapping[str, Finding]) -> IndexReport:
    """Return the report with faults added for records whose images are missing or broken."""
    # An image that a rewrite repairs does not make its record unusable.
    unusable = {name: reason for name, (reason, _) in images.items() if reason not in REPAIRABLE}
    if not unusable:
        return report
    bad, faults = report.bad, dict(report.faults)
    for name, record in zip(report.index.names(report.content), report.content, strict=True):
        if name not in bad:
            reasons = [unusable[image] for image in report.index.check(record).images if image in unusable]
            if reasons:  # the first image decides: a record has one fault
                fault = IMAGE_MISSING if reasons[0] == MISSING else "image file broken"
                faults.setdefault(fault, []).append(name)
    return IndexReport(report.index, report.content, faults, report.problem)


def _walk(layout: FolderLayout) -> Iterator[str]:
    """Yield the names of all image files of a layout, relative to its image root; hidden files are skipped."""
    seen: set[tuple[int, int]] = set()  # symbolic links may form a cycle
    for image_folder in layout.image_folders:
        for directory, folders, files in os.walk(image_folder, followlinks=True):
            status = os.stat(directory)  # noqa: PTH116
            # os.walk descends into what is left in `folders`: emptying it in place ends this branch.
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            start = os.path.relpath(directory, layout.image_root)
            for name in sorted(files):
                if not name.startswith(".") and os.path.splitext(name)[1].lower() in FORMATS:  # noqa: PTH122
                    yield name if start == "." else f"{start}/{name}"


def _examine_images(root: Path, names: Mapping[str, bool], workers: int) -> Iterator[tuple[str, Finding]]:
    """Yield the images with a finding, in order."""
    workers = workers or os.cpu_count() or 1
    pool = None
    if workers > 1 and len(names) > ONE_PROCESS_LIMIT:
        # Spawn: a fork would copy the locks of threads such as the progress bar's.
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, initializer=exit_with_parent)
        previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        # Each call starts a worker, which inherits the blocked SIGINT: Ctrl-C is for the main process alone.
        for _ in range(workers):
            pool.submit(int)
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
    batches = _batches(names)
    examined = partial(examine_all, root)
    results = (
        map(examined, _batches(names)) if pool is None else prefetch_map(examined, _batches(names), pool, 4 * workers)
    )
    done = 0
    with progress("images") as report:
        try:
            for batch, findings in zip(batches, results, strict=True):
                done += len(batch)
                report(done, len(names))
                yield from ((name, fault) for name, fault in zip(batch, findings, strict=True) if fault[0])
        except BrokenProcessPool:
            raise RelookError(
                f"A process that reads images was ended, at image {done:,} or soon after.",
                "Was memory short? Give fewer --workers.",
            ) from None


def _batches(names: Iterable[str]) -> Iterator[Sequence[str]]:
    remaining = iter(names)
    while batch := tuple(islice(remaining, BATCH)):
        yield batch


def print_report(report: FolderReport) -> None:
    """Print the findings of `check_folder` as tables on standard output."""
    out, content = stdout_console(), report.to_json()
    out.print(f"{report.layout.name} in {report.layout.folder}: {'clean' if report.clean else 'has defects'}")
    parts = plain_table("part", "")
    for part in content["parts"]:
        parts.add_row(
            part["path"], "there" if part["there"] else "MISSING" if part["needed"] else "optional, not there"
        )
    records = plain_table("records", "all", "sound", "fault", "number", "first", right=("all", "sound", "number"))
    for name, counts in content["records"].items():
        records.add_row(name, f"{counts['count']:,}", f"{counts['sound']:,}", counts["problem"])
        for reason, names in counts["faults"].items():
            records.add_row("", "", "", reason, f"{len(names):,}", preview(names, 3))
    images = plain_table("images", "number", "first", right=("number",))
    for key in ("named", "not_named", "on_disk", "sound"):
        images.add_row(key.replace("_", " "), f"{content['images'][key]:,}")
    for reason, names in content["images"]["faults"].items():
        first = [f"{name} ({detail})" if detail else name for name, detail in names.items()]
        images.add_row(reason, f"{len(names):,}", preview(first, 3))
    for table in (parts, records, images):
        out.print(table)
    if turned := content["images"]["turned_by_exif"]:
        examples = preview([f"{name} ({detail})" for name, detail in turned.items()], 3)
        out.print(
            f"{len(turned):,} images are turned by their EXIF orientation: {examples}. Viewers, relook's server, chat "
            "and page turn them; training and evaluation read them as they are stored, as LLaVA does."
        )


# ----------------------------------------------------------------------------------------------------
# `relook data fix`: write a folder without the defects that `relook data check` finds.
#
# A job writes into its own folder, each file atomically, and skips files that exist: killed at any moment and run
# again, it ends in the same files. Fixing in place runs the same job in a hidden folder and then moves its files over
# the old ones.

FIX_FILE = "relook-fix.json"  # the job's settings, and at its end what it did
HIDDEN = ".relook-fix"
BROKEN = ("drop", "list")
TO_DO = ("written_again", "records_dropped", "records_listed")  # parts of relook-fix.json


def fix_folder(
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
    """Repair a dataset folder and return the content of `relook-fix.json`.

    Images whose format does not match their extension, or of an unusual mode, are rewritten in RGB under that name. So
    are images under another extension than the records' (OCR-VQA's .gif). Unusable records are left out of the new
    index files. Files of the folder itself change only with `in_place`, and none is removed.

    Args:
        out: a new folder of the same layout, in which sound images are links to the old ones.
        broken: "drop" leaves unusable records out; "list" keeps them and names them in `relook-fix.json`.
        copy: copy sound images instead of linking them.

    Raises:
        RecipeError: neither or both of `out` and `in_place` are given, or `out` lies in the folder or holds something
            else.
        DataError: see `check_folder`; or an index file cannot be read.
    """
    folder = Path(folder)
    out = None if out is None else Path(out)
    images = None if images is None else Path(images)
    if (out is None) != in_place:
        raise RecipeError("A fixed folder needs a place.", "Give either --out FOLDER or --in-place.")
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
    job_folder = out or folder / HIDDEN
    if in_place and job_folder.is_dir() and not (job_folder / FIX_FILE).exists():
        shutil.rmtree(job_folder)  # left by a job that was killed after its last file was moved
    result = _read_result(job_folder, job)
    if result is None:
        report = check_folder(name, folder, images, workers=workers)
        unread = next((file.problem for file in report.indexes if file.problem), "")
        if unread:
            raise DataError(f"An index file cannot be fixed: {unread}")
        plan = _plan(report, broken)
        if in_place and not any(plan[key] for key in TO_DO if key in plan) and (folder / FIX_FILE).exists():
            return read_json_object(folder / FIX_FILE)  # nothing to do: keep the report of the earlier fix
        # Claim the folder before the first file is written; `_write` notes the end.
        write_json(job_folder / FIX_FILE, {**job, "finished": False})
        result = {**job, **plan, "finished": True}
        _write(report, job_folder, result, links=not in_place)
    if in_place:
        _install(job_folder, folder, images)
    return result


def summary(result: Mapping[str, Any]) -> str:
    """Summarise a job in one sentence: counts and reasons."""
    kind = "dropped" if "records_dropped" in result else "listed"
    records: Counter[str] = Counter()
    for faults in result[f"records_{kind}"].values():
        records.update({reason: len(names) for reason, names in faults.items()})
    repaired, left_out = (
        {why: len(names) for why, names in result[key].items()} for key in ("written_again", "images_left_out")
    )
    changes = {"images written again": repaired, "images missing or broken": left_out, f"records {kind}": records}
    return ", ".join(f"{sum(counts.values()):,} {label}{_reasons(counts)}" for label, counts in changes.items()) + "."


def _reasons(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{reason}: {count:,}' for reason, count in counts.items())})" if counts else ""


def _read_result(job_folder: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result of a finished job; None if it is new or was interrupted."""
    if is_free(job_folder, FIX_FILE, "--out"):
        return None
    stored = read_json_object(job_folder / FIX_FILE)
    if any(stored.get(key) != value for key, value in job.items()):
        other = ", ".join(f"{key} {stored.get(key)}" for key, value in job.items() if stored.get(key) != value)
        raise RecipeError(f"{job_folder} holds another fix ({other}).", "Choose another --out, or remove it.")
    return stored if stored.get("finished") else None


def _plan(report: FolderReport, broken: str) -> dict[str, Any]:
    """Plan which images are rewritten or left out, and which bad records are dropped (or only listed)."""
    faults = report.by_reason()
    records = {report.layout.relative(file.index.path): dict(file.faults) for file in report.indexes if file.faults}
    return {
        "written_again": {reason: faults[reason] for reason in REPAIRABLE if reason in faults},
        "images_left_out": {reason: list(names) for reason, names in faults.items() if reason not in REPAIRABLE},
        "records_dropped" if broken == "drop" else "records_listed": records,
    }


def _write(report: FolderReport, job_folder: Path, result: dict[str, Any], links: bool) -> None:
    """Write all files of the new folder; with `links`, also links to the sound, unchanged files."""
    layout = report.layout
    root = job_folder / _target_path(layout.image_root, layout)

    def write(name: str) -> None:
        reason, detail = report.faults.get(name, ("", ""))
        source, target = layout.image_root / name, root / name
        if target.exists():  # an interrupted job has written it
            return
        if reason in REPAIRABLE:
            picture = source.with_name(detail) if reason == OTHER_SUFFIX else source
            with atomic_file(target) as temporary:
                temporary.write_bytes(rewritten(picture, target.suffix))
        elif links and not reason:
            _link_or_copy(source, target, result["copy"])

    with progress("images written") as report_progress:
        for number, _ in enumerate(prefetch_map(write, report.images), 1):
            report_progress(number, len(report.images))
    # Index files without a fault are linked like any other part.
    dropping = {file.index.path: file for file in report.indexes if file.faults and result["broken"] == "drop"}
    for file in dropping.values():
        _write_index(file, job_folder / _target_path(file.index.path, layout))
    for part in layout.parts if links else ():
        target = job_folder / _target_path(part.path, layout)
        if part.path.is_file() and part.path not in dropping and not target.exists():
            _link_or_copy(part.path, target, result["copy"])
    for leftover in job_folder.rglob(".*.part"):  # left by a killed job
        leftover.unlink()
    write_json(job_folder / FIX_FILE, result)


def _target_path(path: Path, layout: FolderLayout) -> Path:
    """Return a file's relative path in the new folder; an image root from elsewhere keeps its last name."""
    if path.is_relative_to(layout.folder):
        return path.relative_to(layout.folder)
    return layout.image_root.name / path.relative_to(layout.image_root)


def _link_or_copy(source: Path, target: Path, copy: bool) -> None:
    with atomic_file(target) as temporary:
        if copy:
            shutil.copyfile(source, temporary)
        else:
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(source.resolve())


def _write_index(report: IndexReport, target: Path) -> None:
    index, bad = report.index, report.bad
    named_records = zip(index.names(report.content), report.content, strict=True)
    sound_records = [record for name, record in named_records if name not in bad]
    if index.kind == "lines":
        write_jsonl(target, sound_records)
    else:
        write_json(target, dict(sound_records) if index.kind == "object" else sound_records)


def _install(job_folder: Path, folder: Path, images: Path | None) -> None:
    """Move a finished job's files over the folder's own. Moved files leave the job, so a second run continues."""
    outside = images is not None and not images.is_relative_to(folder)
    for path in list(_job_files(job_folder)):  # a list: the loop moves what it walks over
        relative = path.relative_to(job_folder)
        # Images from another folder go back there, all else into the dataset's folder.
        if outside and images is not None and relative.parts[0] == images.name:
            target = images / relative.relative_to(images.name)
        else:
            target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.parent.stat().st_dev == path.stat().st_dev:
            path.replace(target)
        else:  # a linked folder on another disk
            _link_or_copy(path, target, copy=True)
            path.unlink()
    shutil.rmtree(job_folder)


def _job_files(job_folder: Path) -> Iterator[Path]:
    """Yield the files of a job, `relook-fix.json` last: while it exists, the job still has files to move."""
    for directory, _, files in os.walk(job_folder):
        yield from (Path(directory, name) for name in files if Path(directory, name) != job_folder / FIX_FILE)
    yield job_folder / FIX_FILE
