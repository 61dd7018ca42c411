"""The HTTP API: OpenAI's routes, health and metrics, on one FastAPI application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.exceptions import HTTPException

from relook import __version__
from relook.generate.engine import Engine
from relook.serve.chat import Answers, Writer, read_request
from relook.serve.media import Sources
from relook.serve.middleware import Gate
from relook.serve.protocol import APIError, ChatRequest, Completion, ErrorBody, Health, Model, Models

# ----------------------------------------------------------------------------------------------------
# What Prometheus reads.

SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 300)


class Metrics:
    """Requests as they end, and the engines' own counts as they stand when somebody asks."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.registry, self.engines = CollectorRegistry(), engines
        self.registry.register(self)
        self.requests = Counter("relook_requests", "Requests by status.", ["model", "status"], registry=self.registry)
        self.seconds = Histogram(
            "relook_request_seconds",
            "From request to whole answer.",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first = Histogram(
            "relook_first_text_seconds",
            "From request to first text of a stream.",
            ["model"],
            buckets=SECONDS,
            registry=self.registry,
        )

    def collect(self) -> Iterator[Any]:
        running = GaugeMetricFamily("relook_running", "Answers in slots.", labels=["model"])
        waiting = GaugeMetricFamily("relook_waiting", "Requests that wait for a slot.", labels=["model"])
        for name, engine in self.engines.items():
            running.add_metric([name], engine.running)
            waiting.add_metric([name], engine.waiting)
        yield from (running, waiting)
        for key, text in {
            "prompt_tokens": "Positions of prompts.",
            "reused_tokens": "Positions of prompts that were in memory already.",
            "new_tokens": "Generated tokens.",
            "images": "Images that went through the vision tower.",
            "steps": "Forward passes that chose tokens.",
        }.items():
            family = CounterMetricFamily(f"relook_{key}", text, labels=["model"])
            for name, engine in self.engines.items():
                family.add_metric([name], getattr(engine.batch.counts, key))
            yield family

    def text(self) -> bytes:
        return generate_latest(self.registry)


# ----------------------------------------------------------------------------------------------------

READERS = 16  # threads that read requests: each may hold an image file, or wait for one
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


@dataclass(frozen=True)
class Policy:
    """What a server lets its clients do.

    Args:
        api_key: that they must have; empty for none.
        sources: of images.
        max_images: of a conversation.
        max_body: bytes of a request.
        body_seconds: for a request to arrive.
    """

    api_key: str = ""
    sources: Sources = field(default_factory=Sources)
    max_images: int = 16
    max_body: int = 50_000_000
    body_seconds: float = 30.0


def make_app(engines: Mapping[str, Engine], policy: Policy) -> FastAPI:
    """The application that serves these models by name."""
    app = FastAPI(title="relook", version=__version__, responses=ERRORS)
    app.add_middleware(
        Gate,
        api_key=policy.api_key,
        max_body=policy.max_body,
        max_held=8 * policy.max_body,
        max_requests=READERS + sum(engine.limits.slots + engine.limits.waiting for engine in engines.values()),
        seconds=policy.body_seconds,
    )
    app.add_exception_handler(APIError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    metrics, readers, created = Metrics(engines), anyio.CapacityLimiter(READERS), int(time.time())

    def engine_of(name: str) -> Engine:
        if name not in engines:
            raise APIError(404, f"There is no model of that name. There is {', '.join(engines)}.", "model_not_found")
        return engines[name]

    @app.post(
        "/v1/chat/completions",
        response_model=Completion,
        response_model_exclude_none=True,
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def chat(body: ChatRequest, request: Request) -> Any:
        """Answer a conversation about texts and images, whole or as server-sent events."""
        engine, started = engine_of(body.model), time.monotonic()
        status = "cancelled"
        try:
            if engine.full:  # before anything is read
                raise APIError(429, "Too many requests are waiting already.", "busy")
            requests = await anyio.to_thread.run_sync(
                read_request, engine, body, policy.sources, policy.max_images, limiter=readers
            )
            answers = Answers([(engine, request) for request in requests])
            writer = Writer(engine, body, requests)
            if body.stream:
                status = "stream"
                events = _events(writer, answers, metrics, started)
                return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
            completion = await _unless_gone(writer.whole(answers), answers, request)
            status = "200"
            metrics.seconds.labels(body.model).observe(time.monotonic() - started)
            return completion
        except APIError as error:
            status = str(error.status)
            raise
        finally:
            metrics.requests.labels(body.model, status).inc()

    @app.get("/v1/models")
    async def models() -> Models:
        """The models that are served."""
        return Models(data=[Model(id=name, created=created) for name in engines])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Model:
        """One of them."""
        engine_of(name)
        return Model(id=name, created=created)

    @app.get("/health")
    async def health(response: Response) -> Health:
        """Whether requests are answered; for balancers, without a key."""
        alive = all(engine.alive for engine in engines.values())
        response.status_code = 200 if alive else 503
        return Health(status="ok" if alive else "failed")

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Counts and times, as Prometheus reads them."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


async def _events(writer: Writer, answers: Answers, metrics: Metrics, started: float) -> AsyncIterator[str]:
    """Chunks as server-sent events. An error that comes when the stream has begun is its last event."""
    model, first = writer.body.model, True
    try:
        async for chunk in writer.chunks(answers):
            if first and any(choice.delta.content for choice in chunk.choices):
                metrics.first.labels(model).observe(time.monotonic() - started)
                first = False
            yield f"data: {chunk.model_dump_json(exclude_none=True)}\n\n"
    except APIError as error:
        yield f"data: {ErrorBody.model_validate(error.body).model_dump_json()}\n\n"
    finally:
        answers.cancel()
        metrics.seconds.labels(model).observe(time.monotonic() - started)
    yield "data: [DONE]\n\n"


async def _unless_gone(work: Any, answers: Answers, request: Request) -> Any:
    """What some work comes to; it ends when the client goes away."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise APIError(400, "The client went away.")
        return working.result()
    finally:
        answers.cancel()
        working.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _api_error(request: Request, error: Any) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


async def _invalid(request: Request, error: Any) -> Response:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    where = where[:200].encode(errors="backslashreplace").decode()  # names of fields are the client's
    message = f"{where}: {first['msg']}" if where else first["msg"]
    return await _api_error(request, APIError(400, message, first["type"], where or None))


async def _http_error(request: Request, error: Any) -> Response:
    return JSONResponse(APIError(error.status_code, str(error.detail)).body, error.status_code, error.headers)


async def _unexpected(request: Request, error: Any) -> Response:
    """The server's log has the trace, the client does not."""
    return await _api_error(request, APIError(500, "The server failed on this request.", "failed"))
