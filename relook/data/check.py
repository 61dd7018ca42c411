"""`relook data check`: what is there of a layout, and what is wrong with its records and images."""

from __future__ import annotations

import json
import multiprocessing
import os
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
from relook.data.ahead import ahead
from relook.data.examine import FORMATS, MISSING, OTHER_SUFFIX, REPAIRABLE, TURNED, Found, examine_all
from relook.data.layouts import Index, Layout, find_layout
from relook.errors import DataError, RelookError, some
from relook.files import text_hash

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
        turned: those that viewers turn by their EXIF orientation, and it. Training and evaluation, as LLaVA's, do not.
    """

    layout: Layout
    indexes: tuple[IndexReport, ...]
    images: Mapping[str, bool]
    faults: Mapping[str, Found]
    turned: Mapping[str, str]

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
                "turned_by_exif": {readable(name): detail for name, detail in self.turned.items()},
            },
        }


def readable(name: str) -> str:
    """A file's name to be shown or written: one that is no text comes with escapes."""
    return name if name.isprintable() else name.encode("unicode_escape").decode()


def check(
    name: str, folder: str | Path, images: str | Path | None = None, named_only: bool = False, workers: int = 0
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
    folder = Path(folder)
    images = None if images is None else Path(images)
    layout = find_layout(name, folder, images)
    names: dict[str, bool] = {}
    read = [_read(index, names) for index in layout.indexes]
    if not named_only:
        for found in _walk(layout):
            names.setdefault(found, False)
    said = dict(_examined(layout.image_root, names, workers))
    turned = {name: detail for name, (reason, detail) in said.items() if reason == TURNED}
    faults = {name: fault for name, fault in said.items() if name not in turned}
    return FolderReport(layout, tuple(_with_images(one, faults) for one in read), names, faults, turned)


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


def _examined(root: Path, names: Mapping[str, bool], workers: int) -> Iterator[tuple[str, Found]]:
    """The images of which there is something to say, in order."""
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
    if turned := found["images"]["turned_by_exif"]:
        named = some([f"{name} ({detail})" for name, detail in turned.items()], 3)
        out.print(
            f"{len(turned):,} images are turned by their EXIF orientation: {named}. Viewers, relook's server, chat and "
            "page turn them; training and evaluation read them as they are stored, as LLaVA does."
        )
