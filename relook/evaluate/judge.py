"""A judge: a language model behind any OpenAI-compatible endpoint, asked with bounded patience and never twice.

What comes back is untrusted text: it is bounded in length, kept, and means only what a strict parser reads in it.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import json
import mimetypes
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from relook.console import Report, progress
from relook.errors import DataError, RecipeError, RelookError, some
from relook.evaluate.results import AnswerFile
from relook.files import file_hash, read_text, text_hash

T = TypeVar("T")
JUDGE_CACHE = "judge.jsonl"  # replies, beside the answers
LONGEST_PROMPT = 200_000  # characters; a longer one is not sent
LONGEST_REPLY = 20_000  # characters; what follows is dropped
LONGEST_PAUSE = 120  # seconds between two requests, if the endpoint asks for it; the client waits no longer
IN_A_ROW = 5  # prompts without an answer, one after the other, that mean the endpoint is down
NO_ANSWER, REFUSED, NONSENSE, TOO_LONG = "no_answer", "refused", "nonsense", "too_long"


@dataclass(frozen=True)
class JudgeSettings:
    """Where a judge is and how it is asked.

    Args:
        url: base address of the endpoint, as `https://api.openai.com/v1`.
        key_variable: environment variable with the key; it may be unset where the endpoint needs none.
        price: dollars per million tokens, of prompts and of replies.
        workers: prompts under way at once.
        timeout: seconds until a request counts as unanswered.
        retries: of a request after 408, 409, 429, 5xx, a broken connection or a time-out, with growing pauses or those
            that the endpoint asks for (`Retry-After`).
        tries: replies to one prompt until it counts as not judged.
        request: further fields of a request, over those of the benchmark; null leaves a field out.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    price: tuple[float, float] = (0.0, 0.0)
    workers: int = 8
    timeout: float = 120.0
    retries: int = 6
    tries: int = 3
    request: Mapping[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """The url for people and results: without user, password and query."""
        place = urlsplit(self.url)
        port = f":{place.port}" if place.port else ""
        return f"{place.scheme}://{place.hostname}{port}{place.path}"


def judge_settings(
    url: str, model: str, price: tuple[float, float], key_variable: str, workers: int, request: str
) -> JudgeSettings | None:
    """A judge as the command line names it; None where it names none.

    Raises:
        RecipeError: half of its name is missing, the address is none, or `request` is not a JSON object.
    """
    if not url and not model:
        return None
    if url and not _is_address(url):
        raise RecipeError(f"{url} is no address of a judge.", "Give one as https://api.openai.com/v1.")
    if not url or not model:
        raise RecipeError("A judge is an address and a model.", "Give its address and --judge-model, both.")
    try:
        fields = json.loads(request)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise RecipeError(f"--judge-request {request!r} is not a JSON object.", """Give one as '{"seed": 1}'.""")
    if own := sorted(fields.keys() & {"model", "messages", "stream"}):
        raise RecipeError(f"--judge-request sets {some(own)}, which relook says itself.", "Leave that out.")
    return JudgeSettings(url, model, key_variable, price, workers, request=fields)


def _is_address(url: str) -> bool:
    try:
        place = urlsplit(url)
        return place.scheme in ("http", "https") and bool(place.hostname) and place.port != 0
    except ValueError:  # half a bracket, or a port that is no number
        return False


@dataclass(frozen=True)
class Task(Generic[T]):
    """A prompt, with an image where there is one, and what makes a verdict of a reply: None where it says nothing."""

    prompt: str
    parse: Callable[[str], T | None]
    image: Path | None = None


@dataclass(frozen=True)
class Judged(Generic[T]):
    """Verdicts in the order of the tasks, None where there is none, and how they came about.

    Args:
        about: the judge and its tokens, for results.
        unjudged: why tasks have no verdict, and how many.
    """

    verdicts: list[T | None]
    about: dict[str, Any]
    unjudged: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**self.about, "unjudged": self.unjudged}


@dataclass(frozen=True)
class Reply:
    text: str
    prompt_tokens: int
    completion_tokens: int


class NoVerdict(Exception):
    """A task that has no verdict: `str` of it is the reason."""


class Judge:
    """An endpoint and a cache of its replies.

    Args:
        cache: JSON lines of replies by model, request, prompt, image and number of the try. It grows as they come and
            survives a kill; a reply in it is never asked for again.
    """

    def __init__(self, settings: JudgeSettings, cache: Path) -> None:
        self.settings = settings
        self.cache = AnswerFile(cache, "key")

    def ask(self, tasks: Sequence[Task[T]], request: Mapping[str, Any], title: str) -> Judged[T]:
        """Verdicts on all tasks, some at a time.

        Args:
            request: fields of a request besides model and messages, as temperature.

        Raises:
            RelookError: the endpoint refuses the key or does not know the model, or it answers nothing; the replies so
                far are kept.
        """
        fields = {k: v for k, v in {**request, **self.settings.request}.items() if v is not None}
        with progress(title) as report:
            done = asyncio.run(_Asking(self.settings, self.cache, fields, report).all(tasks))
        replies = [reply for _, used, _ in done for reply in used]
        tokens = sum(r.prompt_tokens for r in replies), sum(r.completion_tokens for r in replies)
        about: dict[str, Any] = {
            "model": self.settings.model,
            "url": self.settings.address,
            "request": fields,
            "replies": len(replies),
            "prompt_tokens": tokens[0],
            "completion_tokens": tokens[1],
        }
        if any(self.settings.price):
            about["dollars"] = round(sum(n * p for n, p in zip(tokens, self.settings.price, strict=True)) / 1e6, 6)
        return Judged([v for v, _, _ in done], about, dict(Counter(why for _, _, why in done if why)))


class _Asking:
    """One call of `Judge.ask`: the tasks under way, and how the endpoint does."""

    def __init__(self, settings: JudgeSettings, cache: AnswerFile, fields: dict[str, Any], report: Report) -> None:
        self.settings, self.cache, self.fields, self.report = settings, cache, fields, report
        self.in_a_row = self.done = self.answered = 0
        self.last = ""  # why the last prompt without an answer has none

    async def all(self, tasks: Sequence[Task[T]]) -> list[tuple[T | None, list[Reply], str]]:
        """(verdict, replies, why there is no verdict) of each task."""
        try:
            from openai import AsyncOpenAI
        except ImportError:
            raise RelookError("Judging needs the openai library.", "pip install 'relook[judge]'.") from None
        key = os.environ.get(self.settings.key_variable) or "none"
        settings, gate = self.settings, asyncio.Semaphore(self.settings.workers)
        async with AsyncOpenAI(
            api_key=key, base_url=settings.url, timeout=settings.timeout, max_retries=settings.retries
        ) as client:

            async def one(task: Task[T]) -> tuple[T | None, list[Reply], str]:
                async with gate:
                    result = await self._judge(client, task)
                self.done += 1
                self.report(self.done, len(tasks))
                return result

            results = await asyncio.gather(*map(one, tasks))
        failed = sum(why in (NO_ANSWER, REFUSED) for _, _, why in results)
        if failed and not self.answered:
            raise self._down()
        return results

    async def _judge(self, client: Any, task: Task[T]) -> tuple[T | None, list[Reply], str]:
        replies: list[Reply] = []
        if len(task.prompt) > LONGEST_PROMPT:
            return None, replies, TOO_LONG
        for number in range(self.settings.tries):
            image = file_hash(task.image) if task.image else ""
            fields = json.dumps(self.fields, sort_keys=True)
            key = text_hash(self.settings.model, fields, task.prompt, image, str(number))
            if key not in self.cache.records:
                try:
                    reply = await self._reply(client, task)
                except NoVerdict as reason:
                    return None, replies, str(reason)
                self.cache.append([{"key": key, "model": self.settings.model, **reply.__dict__}])
            held = self.cache.records[key]
            replies.append(Reply(held["text"], held["prompt_tokens"], held["completion_tokens"]))
            self.answered += 1
            verdict = task.parse(replies[-1].text)
            if verdict is not None:
                return verdict, replies, ""
        return None, replies, NONSENSE

    async def _reply(self, client: Any, task: Task[T]) -> Reply:
        """A new reply; `NoVerdict` is raised where this prompt gets none, `RelookError` where no prompt gets one."""
        import openai

        message = {"role": "user", "content": _content(task)}
        reason = NO_ANSWER
        longest = (self.settings.timeout + LONGEST_PAUSE) * (self.settings.retries + 1)  # a body may come in drops
        for _ in range(self.settings.tries):  # a body that is no answer is asked for again; the client does the rest
            try:
                async with asyncio.timeout(longest):
                    raw = await client.chat.completions.with_raw_response.create(
                        model=self.settings.model, messages=[message], extra_body=self.fields
                    )
                reply = read_reply(raw.http_response.text)
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise RelookError(
                    f"The judge at {self.settings.address} refuses: {_short(error)}.",
                    f"Check its address, --judge-model and the key in {self.settings.key_variable}.",
                ) from None
            except TimeoutError:
                self.last = f"nothing whole within {longest:.0f} s"
                break
            except openai.APIError as error:
                self.last = _short(error)
                client_fault = getattr(error, "status_code", 500) in (400, 413, 422)  # this prompt, not the endpoint
                reason = REFUSED if client_fault else NO_ANSWER
                break
            if reply is not None:
                self.in_a_row = 0
                return reply
            self.last = "the body of its response is not a chat completion"
        self.in_a_row += 1
        if self.in_a_row >= IN_A_ROW:
            raise self._down()
        raise NoVerdict(reason)

    def _down(self) -> RelookError:
        return RelookError(
            f"The judge at {self.settings.address} does not answer: {self.last}.",
            f"Its {len(self.cache.records)} replies so far are kept in {self.cache.path}: run the same command again.",
        )


def read_reply(body: str) -> Reply | None:
    """A chat completion's text and tokens; None of a body that is something else."""
    try:
        completion = json.loads(body)
        text = completion["choices"][0]["message"]["content"]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return None
    if not isinstance(text, str):
        return None
    usage = completion.get("usage")
    counts = [usage.get(key) if isinstance(usage, dict) else 0 for key in ("prompt_tokens", "completion_tokens")]
    text = text[:LONGEST_REPLY].encode("utf-8", "replace").decode("utf-8")  # JSON may escape half a surrogate pair
    return Reply(text, *(n if isinstance(n, int) and 0 <= n < 10**9 else 0 for n in counts))


def _content(task: Task[Any]) -> str | list[dict[str, Any]]:
    if task.image is None:
        return task.prompt
    kind = mimetypes.guess_type(task.image.name)[0] or "image/jpeg"
    data = base64.b64encode(task.image.read_bytes()).decode("ascii")
    image = {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}
    return [{"type": "text", "text": task.prompt}, image]


def _short(error: Exception) -> str:
    """What an error says, on one line: an endpoint's words may hold anything, a terminal's commands, too."""
    return "".join(c for c in " ".join(str(error).split())[:200] if c.isprintable()).rstrip(".")


def prompt_template(program: Path, name: str, own: str) -> tuple[str, dict[str, str]]:
    """A benchmark's prompt, and what results say of it: the official one where its program lies in the data folder.

    Args:
        program: is read, never run: the prompt is the string assigned to `name`.
        own: relook's prompt, where there is no program.

    Raises:
        DataError: the file is there, and is no Python or has no such string.
    """
    official = program.exists()
    template = _assigned(program, name) if official else own
    return template, {"prompt": "official" if official else "relook", "prompt_hash": text_hash(template)}


def _assigned(program: Path, name: str) -> str:
    try:
        for node in ast.parse(read_text(program)).body:
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                value = ast.literal_eval(node.value)
                if isinstance(value, str):
                    return value
    except (SyntaxError, ValueError, RecursionError):
        pass
    raise DataError(f"{program} assigns no string to {name}.", "Take the benchmark's own file, or remove this one.")


def fill(template: str, *parts: str) -> str:
    """A template with its `{}` replaced in order; braces in the parts mean nothing.

    Raises:
        DataError: it has not as many places.
    """
    pieces = template.split("{}")
    if len(pieces) != len(parts) + 1:
        raise DataError(f"The judge's prompt has {len(pieces) - 1} places {{}}, but {len(parts)} are filled.")
    return "".join(text for pair in zip(pieces, (*parts, ""), strict=True) for text in pair)
