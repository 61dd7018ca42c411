"""What every reader returns and every other room takes: three frozen kinds of sample."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PreferencePair:
    """One image and prompt with a preferred and a dispreferred response.

    `prompt` is the bare question, without `<image>`, role names or a template.
    """

    id: str
    image: Path
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Turn:
    """One exchange of a conversation. `prompt` may hold `<image>` placeholders, in the order of the images."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Conversation:
    """A supervised sample: zero or more images and one or more exchanges."""

    id: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Question:
    """A question on one image. `label` is the expected answer ("yes" or "no"), empty where none is known."""

    id: str
    image: Path
    text: str
    label: str = ""
