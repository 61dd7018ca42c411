"""Long jobs whose results grow in a file: stopped anywhere and resumed, or shared by processes, the file is the same.

The parts of a job do not depend on which results exist already, so a model sees the same batches every time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relook import distributed
from relook.console import ProgressReport, progress
from relook.data.images import prefetch_map
from relook.evaluate.results import AnswerFile
from relook.files import make_paths
from relook.generate.answering import Answerer, GenerationSettings, Question, answer_questions
from relook.mine.pictures import fingerprint

# ----------------------------------------------------------------------------------------------------

Record = dict[str, Any]  # its `key` names the picture or question
BATCHES = 4  # of the model in a part, which is what a kill loses
FILES = 256  # images that are fingerprinted in a part


def run_resumable(
    path: Path,
    keys: Sequence[str],
    size: int,
    make: Callable[[range, ProgressReport], list[Record]],
    title: str,
    stale: Callable[[Record], bool] = lambda record: False,
) -> dict[str, Record]:
    """Make a record for each key and return all in every process; each makes its share of the parts of `size` keys.

    Args:
        make: makes the records of a part, given as indices into `keys`; its report counts within the part.
        stale: returns True for a stored record that is to be made again.
    """
    file = AnswerFile(path, "key", distributed.rank())
    parts = [range(start, min(start + size, len(keys))) for start in range(0, len(keys), size)]
    ready = {key for key, record in file.records.items() if not stale(record)}
    # A part with any missing record is made whole again: its batches must be those of an unbroken run.
    share = distributed.shard(parts)
    remaining = [part for part in share if not all(keys[i] in ready for i in part)]
    total, done = sum(map(len, remaining)), 0
    with progress(title, sum(map(len, share)) - total) as report:
        for part in remaining:
            file.append(make(part, lambda n, _, done=done: report(done + n, total)))
            done += len(part)
            report(done, total)
    distributed.barrier(title)
    if distributed.is_main():
        AnswerFile(path, "key").finish(keys)  # all processes' files become one, in the order of the keys
    distributed.barrier(title)
    return AnswerFile(path, "key").records


def fingerprint_all(path: Path, files: Sequence[tuple[str, Path]], title: str) -> dict[str, Record]:
    """Fingerprint image files, given as (key, path); returns the records by key.

    A file that could not be read before is tried again: it may have been repaired.
    """

    def make(part: range, report: ProgressReport) -> list[Record]:
        records = []
        for record in prefetch_map(lambda file: fingerprint(*file), [files[i] for i in part]):
            records.append(record)
            report(len(records), len(part))
        return records

    return run_resumable(path, [key for key, _ in files], FILES, make, title, lambda record: "fault" in record)


def generate_all(
    path: Path,
    load: Callable[[], Answerer],
    questions: Sequence[tuple[str, Question]],
    settings: GenerationSettings,
    title: str,
) -> list[str]:
    """Return the model's answers to (key, question) pairs, in order.

    Args:
        load: called only if an answer is missing.
    """

    def make(part: range, report: ProgressReport) -> list[Record]:
        answers = [""] * len(part)
        part_settings = replace(settings, first=part.start)
        for index, text in answer_questions(load(), [questions[i][1] for i in part], part_settings, report):
            answers[index] = text
        return [{"key": questions[i][0], "answer": text} for i, text in zip(part, answers, strict=True)]

    records = run_resumable(path, [key for key, _ in questions], BATCHES * settings.batch_size, make, title)
    return [records[key]["answer"] for key, _ in questions]


# ----------------------------------------------------------------------------------------------------
# The settings of a mining job.


@dataclass(frozen=True)
class MiningSettings:
    """Set how pairs are mined.

    Args:
        samples: sampled descriptions an image, besides the greedy one; the first with a mistake is used.
        questions: yes/no questions an image, half about present objects.
        temperature: of the sampled descriptions.
        near_texts: similarity (Jaccard, of runs of five words) from which the texts of a pair count as those of an
            earlier one; 0 keeps all.
        parquet: write TRL's file, too.
        by: pairs of a whole "description" each, or by "sentence" (`relook.mine.sentences`).
        continuations: by sentence: how many are sampled at each sentence's end.
        complete: by sentence: pairs of complete descriptions that differ in a sentence, instead of sentences alone.
        own_answers: by sentence: the model's own yes/no answers check what it wrote.
        max_pairs: largest number of pairs of descriptions or sentences; 0 keeps all.
        max_images: number of images, drawn by the seed, that are mined; 0 for all.
        contrast: a description without a mistake makes a pair, too, with a worse one; annotations only.
    """

    seed: int = 0
    samples: int = 1
    questions: int = 6
    temperature: float = 1.0
    batch_size: int = 64
    max_new_tokens: int = 256
    template: str = ""
    near_texts: float = 0.9
    parquet: bool = True
    by: str = "description"
    continuations: int = 5
    complete: bool = False
    own_answers: bool = False
    max_pairs: int = 0
    max_images: int = 0
    contrast: bool = False

    @property
    def by_sentence(self) -> bool:
        return self.by == "sentence"


@dataclass(frozen=True)
class MiningSource:
    """Name the pictures to mine, and the evaluation images that must not be among them.

    Args:
        images: folder in one of the layouts that `annotations` names (`relook.mine.pictures.KINDS`).
        synonyms: a file of further words for the annotated objects.
        exclude: files that name evaluation images, and folders of them.
        earlier: a folder of pairs that were mined from the same images before; they come first in the files.
    """

    images: Path
    annotations: str
    synonyms: Path | None = None
    exclude: Sequence[Path] = ()
    earlier: Path | None = None

    def __post_init__(self) -> None:
        make_paths(self)
