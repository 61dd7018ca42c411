"""What the page does, without the page: questions to answers, answers to words, a word to a map.

Nothing is kept between two actions: the browser sends the conversation and the picture's place each time, and both go
the way of the API's requests, with the same checks.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import os
import re
import secrets
import stat
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio.to_thread
from pydantic import ValidationError

from relook.data.images import image_from_bytes
from relook.data.samples import Turn
from relook.data.templates import with_image
from relook.errors import DataError
from relook.evaluate.tasks.chair import Vocabulary, mentions
from relook.generate.engine import Engine
from relook.generate.request import QueueFull, Request
from relook.report.pages import data_url, render
from relook.report.plots import attention_before
from relook.serve.api import ServerLimits
from relook.serve.chat import AnswerStream, read_request
from relook.serve.media import ImageSources
from relook.serve.page.texts import ENGLISH, translate
from relook.serve.protocol import APIError, ChatRequest
from relook.serve.threads import Readers
from relook.toyworld.world import OBJECTS, SYNONYMS, draw_scene, sample_scenes

# ----------------------------------------------------------------------------------------------------

EXAMPLES = 6
_CJK = "\u3040-\u30ff\u3400-\u9fff"  # written without spaces: each character counts as a word
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+(?:[-'’][^\W{_CJK}]+)*")


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; what is None is left to the API."""

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class AnswerWord:
    """A word of an answer, or what stands between two; `absent` where it names what is known not to be there."""

    text: str
    start: int
    word: bool
    absent: bool = False


@dataclass
class Page:
    """The models, what clients may do, and the pictures of which it is known what is on them.

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
        """Uploads alone, whatever the API takes."""
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

    def read(self, place: str) -> bytes:
        """The bytes of an uploaded picture.

        Raises:
            APIError: it is not there, or larger than may be.
        """
        try:
            return self.sources.read(_url(place))
        except DataError as error:
            gone = not Path(place).is_file()
            raise APIError(400, str(error), "no_picture" if gone else "invalid_message") from None

    def check(self, place: str) -> None:
        """Raises APIError where a picture is none that a model could be asked about."""
        data = self.read(place)
        try:
            next(iter(self.engines.values())).image(data)
        except DataError as error:
            raise APIError(400, str(error), "invalid_message") from None

    def there(self, place: str) -> frozenset[str] | None:
        """The objects on a picture; None where they are not known."""
        return self.truth.get(_key(self.read(place))) if place else None

    async def ask(
        self, place: str, question: str, histories: Sequence[Sequence[Turn]], sampling: Sampling
    ) -> AsyncIterator[tuple[str, ...]]:
        """The answers of all models so far, each time that one has grown.

        Args:
            place: path of the picture; empty for none.
            histories: for each model, the turns before.

        Raises:
            APIError: as the API has it.
        """
        if not question.strip():
            raise APIError(400, ENGLISH["no_question"], "no_question")
        if any(engine.full for engine in self.engines.values()):  # before anything is read
            raise APIError(429, "Too many requests are waiting already.", "busy")
        if place:
            await anyio.to_thread.run_sync(self.read, place)
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(31))  # the same for all models

        arrived = time.monotonic()
        answers = AnswerStream(
            [
                (engine, await self._request(name, place, [*turns, Turn(question, "")], sampling, arrived))
                for (name, engine), turns in zip(self.engines.items(), histories, strict=True)
            ]
        )
        texts = [""] * len(self.engines)
        try:
            async for index, event in answers:
                if event.text:
                    texts[index] += event.text
                    yield tuple(texts)
        finally:
            answers.cancel()

    async def _request(
        self, name: str, place: str, turns: Sequence[Turn], sampling: Sampling, arrived: float
    ) -> Request:
        engine = self.engines[name]
        image = [{"type": "image_url", "image_url": {"url": _url(place)}}] if place else []
        messages: list[dict[str, Any]] = []
        for turn in turns:
            content = [*image, {"type": "text", "text": turn.prompt}]
            messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.response}]
            image = []
        try:
            body = ChatRequest(model=name, messages=messages[:-1], stream=True, **vars(sampling))  # type: ignore[arg-type]
        except ValidationError as error:
            wrong = error.errors()[0]
            raise APIError(400, f"{'.'.join(map(str, wrong['loc']))}: {wrong['msg']}") from None
        until = arrived + engine.limits.seconds
        [request] = await read_request(engine, body, self.sources, self.policy.max_images, until, self.readers)
        return request

    def pieces(self, text: str, there: frozenset[str] | None = None) -> list[AnswerWord]:
        """An answer cut into words and what stands between them; joined, they are the answer.

        Args:
            there: the objects on the picture, where they are known.
        """
        wrong = [] if there is None else [m for m in mentions(text, self.vocabulary) if m.object not in there]
        pieces: list[AnswerWord] = []
        last = 0
        for found in _WORD.finditer(text):
            if found.start() > last:
                pieces.append(AnswerWord(text[last : found.start()], last, False))
            absent = any(mention.start <= found.start() < mention.end for mention in wrong)
            pieces.append(AnswerWord(found[0], found.start(), True, absent))
            last = found.end()
        return [*pieces, AnswerWord(text[last:], last, False)] if last < len(text) else pieces

    def look(self, name: str, place: str, turns: Sequence[Turn], index: int, language: str = "en") -> str:
        """Where a model's post decoder looked before a word of the last answer, as HTML; empty between words.

        Args:
            index: of the word's piece.

        Raises:
            APIError: the picture is gone, or the conversation is not one that the model could have had.
        """
        nothing = render("attention.html.j2", grid=None, caption=translate(language, "no_map", model=name))
        if not turns or not place:
            return nothing
        pieces, engine = self.pieces(turns[-1].response), self.engines[name]
        if not 0 <= index < len(pieces) or not pieces[index].word:
            return ""
        first, *later = turns
        asked = [Turn(with_image(first.prompt), first.response), *later]
        loaded, data, template = engine.loaded, self.read(place), engine.encoder.template.name
        try:
            image = image_from_bytes(data, engine.limits.max_pixels, loaded.images.check_shape)
            engine.prompt([*asked[:-1], Turn(asked[-1].prompt, "")], [engine.image(data)])
            maps = engine.run(lambda: attention_before(loaded, image, asked, [pieces[index].start], template))
        except DataError as error:
            raise APIError(400, str(error), "invalid_message") from None
        except QueueFull as error:
            raise APIError(503, str(error), "busy") from None
        if not maps:
            return nothing
        buffer = io.BytesIO()
        loaded.images.seen(image).save(buffer, "PNG")
        caption = translate(language, "before", model=name, word=pieces[index].text)
        source = data_url(buffer.getvalue(), "png")
        return render("attention.html.j2", source=source, grid=maps[0], caption=caption)


def _url(place: str) -> str:
    try:
        return Path(place).as_uri()
    except ValueError:  # no absolute path: it leads nowhere
        return "file:///"


def _key(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ----------------------------------------------------------------------------------------------------
# The folder of uploaded pictures: what may lie in it, and for how long.
#
# Gradio removes the files that it has given to a browser. Those of a form that it refuses or does not know, and empty
# folders, it leaves.

KEPT_SECONDS = 3600  # how long an upload stays
EVERY_SECONDS = KEPT_SECONDS // 6  # how often what is older is looked for
MOST_BYTES, MOST_FILES = 2_000_000_000, 10_000


@dataclass(frozen=True)
class Uploads:
    """A folder of uploads; what lies in it at the start stays."""

    folder: Path
    own: frozenset[Path] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "own", frozenset(self.folder.rglob("*")))

    def has(self, path: str) -> bool:
        """Whether a path, with its links followed, leads below the folder. Any other text does not."""
        try:
            return Path(path).resolve().is_relative_to(self.folder.resolve())
        except (ValueError, OSError, RuntimeError):  # a NUL byte, a name too long, links in a circle
            return False

    def full(self) -> bool:
        """Whether no more is taken."""
        files, size = self.sweep()
        return files > MOST_FILES or size > MOST_BYTES

    def sweep(self) -> tuple[int, int]:
        """Remove what Gradio should have removed; how many files are left, and their bytes."""
        old, files, size = time.time() - KEPT_SECONDS - EVERY_SECONDS, 0, 0
        for place, folders, names in os.walk(self.folder, topdown=False):
            for path in (Path(place, name) for name in (*names, *folders)):
                with contextlib.suppress(OSError):  # it is gone meanwhile, or a folder that holds something
                    status = path.lstat()
                    is_folder = stat.S_ISDIR(status.st_mode)
                    if status.st_mtime < old and path not in self.own:
                        path.rmdir() if is_folder else path.unlink()
                    elif not is_folder:
                        files, size = files + 1, size + status.st_size
        return files, size

    async def sweep_often(self) -> None:
        """As long as the server runs."""
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            await anyio.to_thread.run_sync(self.sweep)
