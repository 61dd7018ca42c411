"""What a job of mining is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from relook.files import make_paths


@dataclass(frozen=True)
class Mining:
    """How pairs are mined.

    Args:
        samples: sampled descriptions an image, besides the greedy one; the first with a mistake is used.
        questions: yes/no questions an image, half about present objects.
        temperature: of the sampled descriptions.
        near_texts: similarity (Jaccard, of runs of five words) from which the texts of a pair count as those of an
            earlier one; 0 keeps all.
        parquet: write TRL's file, too.
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


@dataclass(frozen=True)
class Place:
    """Pictures to mine, and what they are kept apart from.

    Args:
        images: folder in one of the layouts that `annotations` names (`relook.mine.pictures.KINDS`).
        synonyms: a file of further words for the annotated objects.
        exclude: files that name evaluation images, and folders of them.
    """

    images: Path
    annotations: str
    synonyms: Path | None = None
    exclude: Sequence[Path] = ()

    def __post_init__(self) -> None:
        make_paths(self)
