"""Training pairs from parquet files: TRL's, RLHF-V's and RLAIF-V's columns."""

from __future__ import annotations

from pathlib import Path

from relook.data.hadpo import answered_correctly
from relook.data.parquet import content_hash, hadpo_record, open_parquet
from relook.data.report import ReadReport, Sieve
from relook.data.rows import BadRow, Embedded
from relook.data.rules import BadRecord, check_pair
from relook.data.samples import PreferencePair
from relook.files import whole_file


def read_pairs(
    path: str | Path, image_folder: str | Path | None = None, on_bad: str = "drop"
) -> tuple[list[PreferencePair], ReadReport]:
    """Read a parquet file, or all of a folder, as pairs to train on.

    Embedded images are written as files once, named by their content. A row is bad where it is not one image with one
    user turn and two answers, an answer is empty, or chosen equals rejected. Rows that HA-DPO's reader would skip
    (`correct` in a `hadpo_record`) are skipped.

    Args:
        image_folder: where they go, and where images are looked up that a row only names; by default beside `path`,
            in a folder of its name and `_images`.
        on_bad: "drop" reports bad rows; "error" raises at the first one.

    Raises:
        DataError: there is no such file, it has none of the layouts, or a row is bad and `on_bad` is "error".
    """
    path = Path(path)
    image_folder = None if image_folder is None else Path(image_folder)
    folder = image_folder or path.with_name(f"{path.stem}_images")
    sieve, pairs = Sieve(str(path), on_bad), []
    for number, row in enumerate(open_parquet(path, folder).rows()):
        name = f"row-{number}"
        try:
            if isinstance(row, BadRow):
                raise row
            if answered_correctly(hadpo_record(row)):
                sieve.skip("answered correctly")
                continue
            if fault := check_pair(row.prompt, row.chosen, row.rejected):
                raise BadRecord(fault)
            pairs.append(PreferencePair(name, _extracted(row.image, folder), row.prompt, row.chosen, row.rejected))
        except BadRecord as bad:
            sieve.drop(name, str(bad))
    return pairs, sieve.report(len(pairs))


def _extracted(image: Embedded, folder: Path) -> Path:
    path = folder / f"{content_hash(image.data)}{image.suffix}"
    if not path.exists():
        with whole_file(path) as temporary:
            temporary.write_bytes(image.data)
    return path
