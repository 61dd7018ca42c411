"""Client of a judge: a language model behind any OpenAI-compatible endpoint, with bounded retries and a reply cache.

Replies are untrusted text: they are bounded in length, cached, and mean only what a strict parser reads in them.
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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from relook.console import ProgressReport, progress, status
from relook.errors import DataError, RecipeError, RelookError, preview
from relook.evaluate.results import AnswerFile
from relook.files import file_hash, read_text, text_hash

T = TypeVar("T")  # a verdict: SHR's labels, MMHal's rating, a mined pair's correction
JUDGE_CACHE = "judge.jsonl"  # replies, beside the answers
LONGEST_PROMPT = 200_000  # characters; a longer one is not sent
LONGEST_REPLY = 20_000  # characters; what follows is dropped
LONGEST_PAUSE = 120  # seconds; the client waits no longer between two requests, whatever the endpoint asks
MAX_FAILURES_IN_A_ROW = 5  # consecutive prompts without an answer that mean the endpoint is down
NO_ANSWER, REFUSED, UNREADABLE, TOO_LONG = "no_answer", "refused", "nonsense", "too_long"
PROBE = "Answer with one word: yes."


@dataclass(frozen=True)
class JudgeSettings:
    """Address and request settings of a judge.

    Args:
        url: base address of the endpoint, such as `https://api.openai.com/v1`.
        model: name of the model at the endpoint.
        key_variable: environment variable with the API key; it may be unset if the endpoint needs none.
        price: dollars per million tokens, for prompts and for replies.
        workers: prompts in flight at once.
        timeout: seconds until a request counts as unanswered.
        retries: retries of a request after 408, 409, 429, 5xx, a broken connection or a timeout, with growing pauses
            or those that the endpoint asks for (`Retry-After`).
        tries: replies to one prompt until it counts as not judged.
        request: further request fields, which override those of the benchmark; null leaves a field out.
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
        """Return the URL to show to people and in results: without user, password and query."""
        parts = urlsplit(self.url)
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.scheme}://{parts.hostname}{port}{parts.path}"

    def open(self, folder: Path) -> Judge:
        """Open the judge with the cache of its replies in a folder of answers."""
        return Judge(self, folder / JUDGE_CACHE)


def judge_settings(
    url: str, model: str, price: tuple[float, float], key_variable: str, workers: int, request: str
) -> JudgeSettings | None:
    """Build the settings of the judge that the command line names; None if it names none.

    Raises:
        RecipeError: the address or the model is missing, the address is invalid, or `request` is not a JSON object or
            sets fields that relook sets itself.
    """
    if not url and not model:
        return None
    if url and not is_address(url):
        raise RecipeError(f"{url} is no address of a judge.", "Give one as https://api.openai.com/v1.")
    if not url or not model:
        raise RecipeError("A judge is an address and a model.", "Give its address and --judge-model, both.")
    try:
        fields = json.loads(request)
    except ValueError:
        fields = None  # refused below, as is JSON that is no object
    if not isinstance(fields, dict):
        raise RecipeError(f"--judge-request {request!r} is not a JSON object.", """Give one as '{"seed": 1}'.""")
    if reserved := sorted(fields.keys() & {"model", "messages", "stream"}):
        raise RecipeError(f"--judge-request sets {preview(reserved)}, which relook says itself.", "Leave that out.")
    return JudgeSettings(url, model, key_variable, price, workers, request=fields)


def is_address(url: str) -> bool:
    """Return True if a text is a web address."""
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # unbalanced bracket, or a port that is not a number
        return False


@dataclass(frozen=True)
class Task(Generic[T]):
    """Prompt with an optional image, and the parser that turns a reply into a verdict, or None if it has none.

    `parse` may raise `NoVerdict` to give a more specific reason than "nonsense" for an unusable reply.
    """

    prompt: str
    parse: Callable[[str], T | None]
    image: Path | None = None


@dataclass(frozen=True)
class JudgeResults(Generic[T]):
    """Verdicts with details of how they were obtained.

    Args:
        verdicts: verdicts in the order of the tasks, None where a task has none.
        details: the judge and its token counts, for results.
        unjudged: number of tasks without a verdict, by reason.
    """

    verdicts: list[T | None]
    details: dict[str, Any]
    unjudged: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {**self.details, "unjudged": self.unjudged}


@dataclass(frozen=True)
class JudgeReply:
    """Reply of the judge with the token counts that the endpoint reports."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class NoVerdict(Exception):
    """Exception for a task or a reply without a verdict; its `str` is the reason."""


class Judge:
    """Endpoint with a cache of its replies.

    Args:
        settings: address and request settings.
        cache: JSON lines file of replies, keyed by model, request, prompt, image and number of the try, but not by
            endpoint. It grows as replies come and survives a kill. A prompt with a cached verdict is never asked
            again. A prompt with only unreadable replies is, and the later line of a try counts.
        rank: of this process, where several ask; each adds to a file of its own and reads all.
    """

    def __init__(self, settings: JudgeSettings, cache: Path, rank: int = 0) -> None:
        self.settings = settings
        self.cache = AnswerFile(cache, "key", rank)

    def probe(self, request: Mapping[str, Any], image: Path | None = None) -> None:
        """Ask a short question and discard the reply.

        A wrong address, key, model or request field thus shows before hours of other work.

        Args:
            request: request fields, as in `ask`.
            image: image to send with the prompt, if the judge must see images.

        Raises:
            RelookError: there is no reply.
        """
        settings = replace(self.settings, retries=min(self.settings.retries, 2))  # a probe should fail within seconds
        run = _JudgeRun(settings, self.cache, self._fields(request), lambda *_: None)
        asyncio.run(run.probe(Task(PROBE, str, image)))

    def _fields(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in {**request, **self.settings.request}.items() if v is not None}

    def ask(
        self, tasks: Sequence[Task[T]], request: Mapping[str, Any], title: str, optional: bool = False
    ) -> JudgeResults[T]:
        """Ask for verdicts on all tasks, several at a time.

        Args:
            tasks: prompts with their parsers.
            request: request fields besides model and messages, such as temperature.
            title: label of the progress bar and of messages.
            optional: whether the caller can do without any verdict.

        Raises:
            RelookError: the endpoint refuses the key or does not know the model, it answers nothing, or no reply can be
                read; the replies so far are kept.
        """
        fields = self._fields(request)
        with progress(title) as report:
            run = _JudgeRun(self.settings, self.cache, fields, report)
            done = asyncio.run(run.all(tasks))
        unjudged = dict(Counter(why for _, _, why in done if why))
        reasons = ", ".join(f"{count} {why}" for why, count in unjudged.items())
        if unjudged:
            status(f"  {title}: {sum(unjudged.values()):,} of {len(tasks):,} not judged ({reasons})")
        if tasks and not optional and sum(unjudged.values()) == len(tasks):
            raise RelookError(
                f"The judge {self.settings.model} judged none of {len(tasks)} prompts ({reasons})."
                f"{run.unread and f' Its last reply begins: {run.unread!r}.'}",
                f"Check --judge-model and --judge-request; its replies are in {self.cache.path}, and the same command "
                "asks again.",
            )
        # Cached replies count, too: the figures are those of the replies in use, whenever they were made.
        replies = [reply for _, used, _ in done for reply in used]
        tokens = sum(r.prompt_tokens for r in replies), sum(r.completion_tokens for r in replies)
        description: dict[str, Any] = {
            "model": self.settings.model,
            "url": self.settings.address,
            "request": fields,
            "replies": len(replies),
            "prompt_tokens": tokens[0],
            "completion_tokens": tokens[1],
        }
        if any(self.settings.price):
            description["dollars"] = round(
                sum(n * p for n, p in zip(tokens, self.settings.price, strict=True)) / 1e6, 6
            )
        return JudgeResults([v for v, _, _ in done], description, unjudged)


class _JudgeRun:
    """State of one call of `Judge.ask` or `Judge.probe`: progress of the tasks, and health of the endpoint."""

    def __init__(
        self, settings: JudgeSettings, cache: AnswerFile, fields: dict[str, Any], report: ProgressReport
    ) -> None:
        self.settings, self.cache, self.fields, self.report = settings, cache, fields, report
        self.in_a_row = self.done = self.answered = 0
        self.last = ""  # why the last unanswered prompt has no answer
        self.unread = ""  # beginning of the last reply that could not be parsed

    def _client(self) -> Any:
        try:
            from openai import AsyncOpenAI

            from relook.evaluate.bounded_http import BoundedClient
        except ImportError:
            raise RelookError("Judging needs the openai library.", "pip install 'relook[judge]'.") from None
        settings = self.settings
        key = os.environ.get(settings.key_variable) or "none"  # the client refuses an empty one
        return AsyncOpenAI(
            api_key=key,
            base_url=settings.url,
            timeout=settings.timeout,
            max_retries=settings.retries,
            http_client=BoundedClient(),
        )

    async def probe(self, task: Task[str]) -> None:
        async with self._client() as client:
            try:
                await self._reply(client, task)
            except NoVerdict:
                raise self._down() from None

    async def all(self, tasks: Sequence[Task[T]]) -> list[tuple[T | None, list[JudgeReply], str]]:
        """Return (verdict, replies, reason for no verdict) of each task."""
        gate = asyncio.Semaphore(self.settings.workers)
        async with self._client() as client:

            async def judge_task(task: Task[T]) -> tuple[T | None, list[JudgeReply], str]:
                async with gate:
                    result = await self._judge(client, task)
                self.done += 1
                self.report(self.done, len(tasks))
                return result

            results = await asyncio.gather(*map(judge_task, tasks))
        # A few prompts without an answer are counted; if no prompt has one, the endpoint or its settings are at fault.
        failed = sum(why in (NO_ANSWER, REFUSED) for _, _, why in results)
        if failed and not self.answered:
            raise self._down()
        return results

    async def _judge(self, client: Any, task: Task[T]) -> tuple[T | None, list[JudgeReply], str]:
        replies: list[JudgeReply] = []
        verdict: T | None
        if len(task.prompt) > LONGEST_PROMPT:
            return None, replies, TOO_LONG
        # The key has all that a reply depends on but the endpoint: a model may move to another address.
        image = file_hash(task.image) if task.image else ""
        fields = json.dumps(self.fields, sort_keys=True)
        keys = [
            text_hash(self.settings.model, fields, task.prompt, image, str(number))
            for number in range(self.settings.tries)
        ]
        # Try the cached replies first; the first one with a verdict settles the task.
        for record in (self.cache.records[key] for key in keys if key in self.cache.records):
            replies.append(JudgeReply(record["text"], record["prompt_tokens"], record["completion_tokens"]))
            verdict, _ = self._read(task.parse, replies[-1])
            if verdict is not None:
                return verdict, replies, ""
        replies, reason = [], UNREADABLE  # ask again: a new reply may be readable
        for key in keys:  # at a temperature above 0, the next try may be one that can be read
            try:
                replies.append(await self._reply(client, task))
            except NoVerdict as fault:
                return None, replies, str(fault)
            self.answered += 1
            # Keep the reply before reading it: it was paid for, and a later version may be able to read it.
            self.cache.append([{"key": key, "model": self.settings.model, **replies[-1].__dict__}])
            verdict, reason = self._read(task.parse, replies[-1])
            if verdict is not None:
                return verdict, replies, ""
        return None, replies, reason

    def _read(self, parse: Callable[[str], T | None], reply: JudgeReply) -> tuple[T | None, str]:
        """Parse a reply; return its verdict and a reason, which counts only if the verdict is None."""
        try:
            verdict, reason = parse(reply.text), UNREADABLE
        except NoVerdict as fault:
            verdict, reason = None, str(fault)
        if verdict is None:
            self.unread = _short(reply.text)
        else:
            self.answered += 1
        return verdict, reason

    async def _reply(self, client: Any, task: Task[T]) -> JudgeReply:
        """Request a new reply.

        Raises:
            NoVerdict: this prompt gets no reply.
            RelookError: no prompt gets a reply.
        """
        import openai

        from relook.evaluate.bounded_http import LONGEST_BODY

        message = {"role": "user", "content": _content(task)}
        reason = NO_ANSWER
        longest = (self.settings.timeout + LONGEST_PAUSE) * (self.settings.retries + 1)  # a body may trickle in
        for _ in range(self.settings.tries):  # repeats after an invalid body; the client handles other retries
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
                if isinstance(error, openai.APIStatusError) and error.response.is_redirect:
                    raise self._redirected(error.response.headers.get("Location", "")) from None
                # A prompt that is too long or refused by a filter says nothing about the next one.
                client_fault = getattr(error, "status_code", 500) in (400, 413, 422)  # this prompt, not the endpoint
                reason = REFUSED if client_fault else NO_ANSWER
                break
            if reply is not None:
                self.in_a_row = 0
                return reply
            self.last = "the body of its response is not a chat completion"
            if len(raw.http_response.content) > LONGEST_BODY:
                self.last = f"the body of its response has more than {LONGEST_BODY:,} bytes"
        # One prompt without an answer may be bad luck; several in a row mean that the rest would fail, too.
        self.in_a_row += 1
        if self.in_a_row >= MAX_FAILURES_IN_A_ROW:
            raise self._down()
        raise NoVerdict(reason)

    def _redirected(self, location: str) -> RelookError:
        away = _short(location.partition("?")[0].rpartition("@")[2])  # without a password or a key
        return RelookError(
            f"The judge at {self.settings.address} redirects to {away}, and prompts are not sent on.",
            "Give that address, if it is the judge's.",
        )

    def _down(self) -> RelookError:
        count = len(self.cache.records)
        again = f" Its {count} replies so far are kept in {self.cache.path}: run the same command again."
        return RelookError(
            f"The judge at {self.settings.address} does not answer: {self.last}.",
            f"Check its address, --judge-model and --judge-request.{again if count else ''}",
        )


def read_reply(body: str) -> JudgeReply | None:
    """Parse a chat completion into its text and token counts; None if the body is anything else."""
    try:
        completion = json.loads(body)
        text = completion["choices"][0]["message"]["content"]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        return None
    if not isinstance(text, str):
        return None
    # Token counts are for the user's information: an endpoint that leaves them out, or sends nonsense, counts as 0.
    usage = completion.get("usage")
    counts = [usage.get(key) if isinstance(usage, dict) else 0 for key in ("prompt_tokens", "completion_tokens")]
    text = text[:LONGEST_REPLY].encode("utf-8", "replace").decode("utf-8")  # JSON may escape half a surrogate pair
    return JudgeReply(text, *(n if isinstance(n, int) and 0 <= n < 10**9 else 0 for n in counts))


def _content(task: Task[Any]) -> str | list[dict[str, Any]]:
    if task.image is None:
        return task.prompt
    # The file's own bytes: the judge should see the picture that the model saw.
    kind = mimetypes.guess_type(task.image.name)[0] or "image/jpeg"
    data = base64.b64encode(task.image.read_bytes()).decode("ascii")
    image = {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}
    return [{"type": "text", "text": task.prompt}, image]


def _short(error: Exception | str) -> str:
    """Shorten an error or a reply to one printable line: endpoint text may hold anything, even terminal commands."""
    status, text = getattr(error, "status_code", None), str(error)
    if status and str(status) not in text:  # openai 3.0 leaves it out
        text = f"Error code: {status} - {text}"
    return "".join(c for c in " ".join(text.split())[:200] if c.isprintable()).rstrip(".")


def prompt_template(program: Path, name: str, fallback: str) -> tuple[str, dict[str, str]]:
    """Return a benchmark's prompt and its description for results; the official prompt if its program is available.

    Args:
        program: official program in the data folder. It is parsed, never run.
        name: variable in the program to which the prompt is assigned.
        fallback: relook's prompt, used if there is no program.

    Raises:
        DataError: the file exists, but is not Python or has no such string.
    """
    official = program.exists()
    template = _assigned(program, name) if official else fallback
    return template, {"prompt": "official" if official else "relook", "prompt_hash": text_hash(template)}


def _assigned(program: Path, name: str) -> str:
    try:
        # Parse the program instead of importing it: it is a stranger's code, and needs libraries of its own.
        for node in ast.parse(read_text(program)).body:
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                value = ast.literal_eval(node.value)
                if isinstance(value, str):
                    return value
    except (SyntaxError, ValueError, RecursionError):
        pass
    raise DataError(f"{program} assigns no string to {name}.", "Take the benchmark's own file, or remove this one.")


def fill_template(template: str, *parts: str) -> str:
    """Fill the `{}` of a template in order; braces in the parts have no meaning.

    Raises:
        DataError: the numbers of places and parts differ.
    """
    # Not str.format: templates and what is filled in may hold braces, as JSON does.
    pieces = template.split("{}")
    if len(pieces) != len(parts) + 1:
        raise DataError(f"The judge's prompt has {len(pieces) - 1} places {{}}, but {len(parts)} are filled.")
    return "".join(text for pair in zip(pieces, (*parts, ""), strict=True) for text in pair)
