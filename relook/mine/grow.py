"""Long work whose results grow in a file: killed anywhere and run again, or by several processes, the same file.

Work is done in parts that do not depend on what is there already, so that a model sees the same batches every time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from relook import processes
from relook.console import Report, progress
from relook.data.ahead import ahead
from relook.evaluate.answer import Asking, Question, answer
from relook.evaluate.answer_file import AnswerFile
from relook.mine.apart import look_at
from relook.model.load import LoadedModel

Record = dict[str, Any]  # its `key` says what it is about
BATCHES = 4  # of the model in a part: as much is lost in a kill
FILES = 256  # images that are looked at in a part


def grow(
    path: Path,
    keys: Sequence[str],
    size: int,
    make: Callable[[range, Report], list[Record]],
    title: str,
    stale: Callable[[Record], bool] = lambda record: False,
) -> dict[str, Record]:
    """A record for each key, in every process; each makes its share of the parts, `size` keys a part.

    Args:
        make: the records of a part, given as places in `keys`; its report counts within the part.
        stale: whether a record that is there is to be made again.
    """
    file = AnswerFile(path, "key", processes.rank())
    parts = [range(start, min(start + size, len(keys))) for start in range(0, len(keys), size)]
    ready = {key for key, record in file.records.items() if not stale(record)}
    left = [part for part in processes.mine(parts) if not all(keys[i] in ready for i in part)]
    total, done = sum(map(len, left)), 0
    with progress(title) as report:
        for part in left:
            file.append(make(part, lambda n, _, done=done: report(done + n, total)))
            done += len(part)
            report(done, total)
    processes.wait(title)
    if processes.first():
        AnswerFile(path, "key").finish(keys)
    processes.wait(title)
    return AnswerFile(path, "key").records


def look_at_all(path: Path, files: Sequence[tuple[str, Path]], title: str) -> dict[str, Record]:
    """What `look_at` finds in image files, by key; `files` are keys and paths. A file that could not be read is looked
    at again: it may have been mended."""

    def make(part: range, report: Report) -> list[Record]:
        records = []
        for record in ahead(lambda file: look_at(*file), [files[i] for i in part]):
            records.append(record)
            report(len(records), len(part))
        return records

    return grow(path, [key for key, _ in files], FILES, make, title, lambda record: "fault" in record)


def ask_all(
    path: Path,
    load: Callable[[], LoadedModel],
    asked: Sequence[tuple[str, Question]],
    how: Asking,
    title: str,
) -> list[str]:
    """Answers to questions, each with a key, in order.

    Args:
        load: called when there is something to ask.
    """

    def make(part: range, report: Report) -> list[Record]:
        answers = [""] * len(part)
        settings = replace(how, first=part.start)
        for index, text in answer(load(), [asked[i][1] for i in part], settings, report):
            answers[index] = text
        return [{"key": asked[i][0], "answer": text} for i, text in zip(part, answers, strict=True)]

    records = grow(path, [key for key, _ in asked], BATCHES * how.batch_size, make, title)
    return [records[key]["answer"] for key, _ in asked]
