"""The page's actions, without Gradio: questions to answers, answers to words, a word to an attention map.

Nothing is kept between two actions: the browser sends the conversation and the picture's path each time, and both go
the way of the API's requests, with the same checks.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import itertools
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio.to_thread
from pydantic import ValidationError

from relook.data.images import image_from_bytes
from relook.data.samples import Turn
from relook.data.templates import with_image
from relook.errors import DataError, RelookError
from relook.evaluate.tasks.chair import Vocabulary, mentions
from relook.generate.engine import Engine
from relook.generate.request import QueueFull, Request
from relook.recipe import read_yaml_or_shipped
from relook.report.attention_maps import attention_before
from relook.report.pages import data_url
from relook.serve.api import ServerLimits
from relook.serve.chat import AnswerStream, read_request
from relook.serve.media import ImageSources
from relook.serve.page.dialogue import Answer, Dialogue, Finish
from relook.serve.page.texts import ENGLISH
from relook.serve.protocol import APIError, ChatRequest
from relook.serve.threads import Readers
from relook.toyworld.world import OBJECTS, SYNONYMS, draw_scene, sample_scenes

# ----------------------------------------------------------------------------------------------------

EXAMPLES = 6
EXAMPLE_QUESTION = "Describe this image in detail."  # of relook's training data, which toyworld's base knows
PICTURE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
SETTINGS = ("temperature", "top_p", "max_tokens", "seed")
AGAIN_TEMPERATURE = 1.0  # of another answer, where the first was greedy: else it would be the same
_CJK = "\u3040-\u30ff\u3400-\u9fff"  # written without spaces: each character counts as a word
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+(?:[-'’][^\W{_CJK}]+)*")


@dataclass(frozen=True)
class Sampling:
    """Set how answers are sampled; None leaves a value to the API, which checks the others."""

    temperature: Any = None
    top_p: Any = None
    max_tokens: Any = None
    seed: Any = None


@dataclass(frozen=True)
class AnswerWord:
    """Hold a word of an answer, or the text between two; `absent` if it names an object known not to be there."""

    text: str
    start: int
    word: bool
    absent: bool = False


@dataclass(frozen=True)
class AttentionMap:
    """Hold where a model looked before a word.

    Args:
        source: the picture as the model gets it, as a data URL.
        grid: rows of weights that sum to 1, with the proportions of `source`.
    """

    word: str
    source: str
    grid: list[list[float]]


@dataclass
class Page:
    """Hold the models, the limits of clients, and the objects on pictures where they are known.

    Args:
        folder: where uploads lie; no other file is read.
    """

    engines: Mapping[str, Engine]
    policy: ServerLimits
    folder: Path
    vocabulary: Vocabulary = field(default_factory=lambda: Vocabulary.of(OBJECTS, SYNONYMS))
    truth: dict[str, frozenset[str]] = field(default_factory=dict)  # by hash of the file
    readers: Readers = field(default_factory=Readers)

    @property
    def sources(self) -> ImageSources:
        """Read uploads alone, whatever the API takes."""
        return replace(self.policy.sources, web=False, root=self.folder)

    def draw_examples(self) -> list[Path]:
        """Draw toyworld's first test pictures, and remember what is on them."""
        paths = []
        for scene in sample_scenes(0, "test", EXAMPLES):
            path = self.folder / f"example-{scene.id}.png"
            draw_scene(scene).save(path)
            self.truth[_key(path.read_bytes())] = frozenset(scene.names)
            paths.append(path)
        return paths

    def run_pictures(self, run: Path | None) -> list[Path]:
        """Copy the first pictures that a run was trained on among the uploads; none where they cannot be read."""
        paths: list[Path] = []
        for picture in itertools.islice(training_pictures(run) if run else (), EXAMPLES):
            path = self.folder / f"run-{len(paths)}{picture.suffix.lower()}"
            with contextlib.suppress(OSError, APIError):  # the data went away, or is no picture
                shutil.copyfile(picture, path)
                self.check(str(path))
                paths.append(path)
        return paths

    def read(self, path: str) -> bytes:
        """Return the bytes of an uploaded picture.

        Raises:
            APIError: it does not exist, or is too large.
        """
        try:
            return self.sources.read(_url(path))
        except DataError as error:
            exists = _is_below(path, self.folder) and Path(path).is_file()
            raise APIError(400, str(error), "bad_picture" if exists else "no_picture") from None

    def check(self, path: str) -> None:
        """Raise APIError if a picture cannot be given to a model."""
        data = self.read(path)
        try:
            next(iter(self.engines.values())).image(data)
        except DataError as error:
            raise APIError(400, str(error), "bad_picture") from None

    def known_objects(self, path: str) -> frozenset[str] | None:
        """Return the objects on a picture; None if they are not known."""
        return self.truth.get(_key(self.read(path))) if path else None

    async def ask(self, conversation: Dialogue, question: str, sampling: Sampling) -> AsyncIterator[tuple[Answer, ...]]:
        """Yield the answers of all models so far, each time that one has grown or ended.

        Args:
            conversation: what was said before.

        Raises:
            APIError: the request is refused as the API would refuse it.
        """
        if not question.strip():
            raise APIError(400, ENGLISH["no_question"], "no_question")
        if any(engine.full for engine in self.engines.values()):  # before anything is read
            raise APIError(429, "Too many requests are waiting already.", "busy")
        pictures = conversation.pictures()
        for path in itertools.chain(*pictures):
            await anyio.to_thread.run_sync(self.read, path)
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(31))  # the same for all models

        arrived = time.monotonic()
        requests = []
        for i, (name, engine) in enumerate(self.engines.items()):
            turns = [*conversation.turns(i), Turn(question, "")]
            requests.append((engine, await self._request(name, pictures, turns, sampling, arrived)))
        stream = AnswerStream(requests)
        answers = [Answer()] * len(self.engines)
        try:
            async for index, event in stream:
                if event.text or event.finish:
                    finish: Finish = "length" if event.finish == "length" else "stop" if event.finish else ""
                    answers[index] = Answer(text=answers[index].text + event.text, finish=finish)
                    yield tuple(answers)
        finally:
            stream.cancel()  # the browser has gone, or the user pressed stop

    async def _request(
        self, name: str, pictures: Sequence[Sequence[str]], turns: Sequence[Turn], sampling: Sampling, arrived: float
    ) -> Request:
        engine = self.engines[name]
        messages: list[dict[str, Any]] = []
        for paths, turn in zip(pictures, turns, strict=True):
            images = ({"type": "image_url", "image_url": {"url": _url(path)}} for path in paths)
            content = [*images, {"type": "text", "text": turn.prompt}]
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.response}]
        try:
            body = ChatRequest(model=name, messages=messages[:-1], stream=True, **vars(sampling))  # type: ignore[arg-type]
        except ValidationError as error:
            first_fault = error.errors()[0]
            setting = next((str(part) for part in first_fault["loc"] if part in SETTINGS), None)
            code = "bad_setting" if setting else "invalid_message"
            raise APIError(400, first_fault["msg"], code, setting) from None
        deadline = arrived + engine.limits.seconds
        [request] = await read_request(engine, body, self.sources, self.policy.max_images, deadline, self.readers)
        return request

    def pieces(self, text: str, present: frozenset[str] | None = None) -> list[AnswerWord]:
        """Cut an answer into words and the texts between them; joined, they are the answer.

        Args:
            present: the objects on the picture, where they are known.
        """
        wrong = [] if present is None else [m for m in mentions(text, self.vocabulary) if m.object not in present]
        pieces: list[AnswerWord] = []
        last = 0
        for match in _WORD.finditer(text):
            if match.start() > last:
                pieces.append(AnswerWord(text[last : match.start()], last, False))
            absent = any(mention.start <= match.start() < mention.end for mention in wrong)
            pieces.append(AnswerWord(match[0], match.start(), True, absent))
            last = match.end()
        return [*pieces, AnswerWord(text[last:], last, False)] if last < len(text) else pieces

    def look(self, name: str, path: str, turns: Sequence[Turn], index: int) -> AttentionMap | None:
        """Compute where a model's post decoder looked before a word of the last answer; None if there is no map.

        There is none without a picture, or of a conversation about several.

        Args:
            index: of the word's piece.

        Raises:
            APIError: the picture is gone, or the conversation is not one that the model could have had.
        """
        if not turns or not path:
            return None
        pieces, engine = self.pieces(turns[-1].response), self.engines[name]
        if not 0 <= index < len(pieces) or not pieces[index].word:
            return None
        first, *later = turns
        conversation = [Turn(with_image(first.prompt), first.response), *later]
        loaded, data, template = engine.loaded, self.read(path), engine.encoder.template.name
        try:
            image = image_from_bytes(data, engine.limits.max_pixels, loaded.images.check_shape)
            # Checked as a request, then run on the engine's own thread between two of its steps.
            engine.prompt([*conversation[:-1], Turn(conversation[-1].prompt, "")], [engine.image(data)])
            maps = engine.run(lambda: attention_before(loaded, image, conversation, [pieces[index].start], template))
        except DataError as error:
            raise APIError(400, str(error), "invalid_message") from None
        except QueueFull as error:
            raise APIError(503, str(error), "busy") from None
        if not maps:
            return None
        buffer = io.BytesIO()
        loaded.images.seen(image).save(buffer, "PNG")
        return AttentionMap(pieces[index].text, data_url(buffer.getvalue(), "png"), maps[0])


def training_pictures(folder: Path) -> Iterator[Path]:
    """Yield the pictures of a run's data, by its recipe; nothing if there is none, or it cannot be read."""
    try:
        recipe = read_yaml_or_shipped(str(folder / "recipe.yaml"), "recipe")
    except RelookError:
        return
    for root in (recipe.get("image_folder"), recipe.get("vg_path")):
        for parent, folders, names in os.walk(str(root or "")):
            folders.sort()
            yield from (Path(parent, name) for name in sorted(names) if name.lower().endswith(PICTURE_TYPES))


def _is_below(path: str, folder: Path) -> bool:
    """Return True if a path, with its links followed, leads below a folder; False for any other text."""
    try:
        return Path(path).resolve().is_relative_to(folder.resolve())
    except (ValueError, OSError, RuntimeError):  # a NUL byte, a name too long, links in a circle
        return False


def _url(path: str) -> str:
    try:
        return Path(path).as_uri()
    except ValueError:  # no absolute path: it leads nowhere
        return "file:///"


def _key(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ----------------------------------------------------------------------------------------------------
# The folder of uploaded pictures: what may be in it, and for how long.
#
# Gradio removes the files that it has given to a browser. It leaves empty folders, and files of a form that it refuses
# or does not know.

KEPT_SECONDS = 3600  # how long an upload stays
EVERY_SECONDS = KEPT_SECONDS // 6  # between two sweeps
MOST_BYTES, MOST_FILES = 2_000_000_000, 10_000


@dataclass(frozen=True)
class Uploads:
    """Keep a folder of uploads small; files that are in it at the start stay."""

    folder: Path
    initial: frozenset[Path] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "initial", frozenset(self.folder.rglob("*")))

    def has(self, path: str) -> bool:
        """Return True if a path, with its links followed, leads below the folder; False for any other text."""
        return _is_below(path, self.folder)

    def full(self) -> bool:
        """Return True if no more uploads are taken."""
        files, size = self.sweep()
        return files > MOST_FILES or size > MOST_BYTES

    def sweep(self) -> tuple[int, int]:
        """Remove what Gradio should have removed; returns how many files remain, and their bytes."""
        old, files, size = time.time() - KEPT_SECONDS - EVERY_SECONDS, 0, 0
        for folder, folders, names in os.walk(self.folder, topdown=False):
            for path in (Path(folder, name) for name in (*names, *folders)):
                with contextlib.suppress(OSError):  # gone meanwhile, or a folder that is not empty
                    status = path.lstat()
                    is_folder = stat.S_ISDIR(status.st_mode)
                    if status.st_mtime < old and path not in self.initial:
                        path.rmdir() if is_folder else path.unlink()
                    elif not is_folder:
                        files, size = files + 1, size + status.st_size
        return files, size

    async def sweep_often(self) -> None:
        """Sweep again and again, as long as the server runs."""
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            await anyio.to_thread.run_sync(self.sweep)
