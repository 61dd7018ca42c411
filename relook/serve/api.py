"""The HTTP API: OpenAI's routes, health and metrics, on one FastAPI application."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from relook import __version__
from relook.generate.engine import Engine
from relook.serve.chat import AnswerStream, ResponseWriter, read_request
from relook.serve.media import ImageSources
from relook.serve.middleware import App, Receive, RequestGate, Scope, Send
from relook.serve.protocol import APIError, ChatRequest, Completion, ErrorBody, Health, ModelCard, ModelList
from relook.serve.threads import Readers, on, parse_body

# ----------------------------------------------------------------------------------------------------
# Metrics for Prometheus.

SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 300)


class Metrics:
    """Metrics of requests as they end, and the engines' own counters, read on demand."""

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
        # Read when Prometheus asks: a step of the engine pays nothing for its counters.
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

READING = 16  # requests that may be read at a time, beyond those that are answered or wait
# Proxies must pass events on as they come; nginx needs a header of its own for that.
STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}


@dataclass(frozen=True)
class ServerLimits:
    """Limits of a server for its clients.

    Args:
        api_key: key that clients must send; empty for none.
        sources: where images may come from.
        max_images: most images of a conversation.
        max_body: most bytes of a request.
        body_seconds: longest time for a request to arrive.
        hosts: names in `Host` that are answered; empty for any.
        origins: origins of pages whose scripts may use the API; "*" for any.
    """

    api_key: str = ""
    sources: ImageSources = field(default_factory=ImageSources)
    max_images: int = 16
    max_body: int = 50_000_000
    body_seconds: float = 30.0
    hosts: frozenset[str] = frozenset()
    origins: tuple[str, ...] = ()


class _Body(Request):
    """A request whose JSON is parsed outside the event loop."""

    async def json(self) -> Any:
        return await on(self.app.state.readers.texts, parse_body, await self.body())


class _Route(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_body(request: Request) -> Response:
            return await handle(_Body(request.scope, request.receive))

        return handle_body


@dataclass(frozen=True)
class _HeadAsGet:
    """ASGI middleware: HEAD goes where GET goes. The server leaves the body out."""

    app: App

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app({**scope, "method": "GET"} if scope.get("method") == "HEAD" else scope, receive, send)


def make_app(engines: Mapping[str, Engine], policy: ServerLimits) -> FastAPI:
    """Build the application that serves these models by name."""
    app = FastAPI(title="relook", version=__version__, responses=ERRORS)
    # Megabytes of base64 take seconds to parse, in which the event loop would answer nobody else.
    app.router.route_class = _Route
    app.add_middleware(_HeadAsGet)
    app.add_middleware(
        RequestGate,
        api_key=policy.api_key,
        max_body=policy.max_body,
        max_held=8 * policy.max_body,
        max_requests=READING + sum(engine.limits.slots + engine.limits.waiting for engine in engines.values()),
        seconds=policy.body_seconds,
    )
    if policy.origins:  # before the gate, for browsers ask without the key whether they may
        app.add_middleware(
            CORSMiddleware,
            allow_origins=policy.origins,
            allow_methods=["GET", "HEAD", "POST"],
            allow_headers=["*"],
            expose_headers=["Retry-After"],
        )
    app.add_exception_handler(APIError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    metrics, created = Metrics(engines), int(time.time())
    readers = app.state.readers = Readers()

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
        engine, started = engine_of(body.model), request.state.arrived
        # What the counter says if the client goes away before any of the cases below.
        status = "cancelled"
        try:
            if engine.full:  # before anything is read
                raise APIError(429, "Too many requests are waiting already.", "busy")
            until = started + engine.limits.seconds
            reading = read_request(engine, body, policy.sources, policy.max_images, until, readers)
            # Nobody decodes pictures for a client that has gone.
            requests = await _cancel_on_disconnect(reading, request)
            answers = AnswerStream([(engine, request) for request in requests])
            writer = ResponseWriter(body, requests)
            if body.stream:
                status = "stream"
                events = _events(writer, answers, metrics, started)
                return StreamingResponse(events, media_type="text/event-stream", headers=STREAM)
            try:
                completion = await _cancel_on_disconnect(writer.whole(answers), request)
            finally:
                answers.cancel()
            status = "200"
            metrics.seconds.labels(body.model).observe(time.monotonic() - started)
            return completion
        except APIError as error:
            status = str(error.status)
            raise
        finally:
            metrics.requests.labels(body.model, status).inc()

    @app.get("/v1/models")
    async def models() -> ModelList:
        """List the models that are served."""
        return ModelList(data=[ModelCard(id=name, created=created) for name in engines])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        """Describe one model."""
        engine_of(name)
        return ModelCard(id=name, created=created)

    @app.get("/health")
    async def health(response: Response) -> Health:
        """Report whether requests are answered; for load balancers, without a key."""
        alive = all(engine.alive for engine in engines.values())
        response.status_code = 200 if alive else 503
        return Health(status="ok" if alive else "failed")

    @app.get("/version")
    async def version() -> dict[str, str]:
        """Name relook's version, under vLLM's route."""
        return {"version": __version__}

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Export counters and times in the format of Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return app


async def _events(
    writer: ResponseWriter, answers: AnswerStream, metrics: Metrics, started: float
) -> AsyncIterator[str]:
    """Yield chunks as server-sent events. An error after the stream has begun is its last event."""
    model, first = writer.body.model, True
    try:
        async for chunk in writer.chunks(answers):
            # The time to the first text that a person can read; the first chunk has none.
            if first and any(choice.delta.content for choice in chunk.choices):
                metrics.first.labels(model).observe(time.monotonic() - started)
                first = False
            yield f"data: {chunk.model_dump_json(exclude_none=True)}\n\n"
    except APIError as error:
        yield f"data: {ErrorBody.model_validate(error.body).model_dump_json()}\n\n"
    finally:
        # Reached, too, when the client disconnects: the generator is closed where it waits.
        answers.cancel()
        metrics.seconds.labels(model).observe(time.monotonic() - started)
    yield "data: [DONE]\n\n"


async def _cancel_on_disconnect(work: Any, request: Request) -> Any:
    """Await some work, which is cancelled when the client disconnects."""
    working, disconnected = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({working, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise APIError(400, "The client went away.")
        return working.result()
    finally:
        working.cancel()
        disconnected.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _api_error(request: Request, error: Any) -> Response:
    return JSONResponse(error.body, error.status, error.headers)


# What pydantic says of these in words about its classes.
FAULTS = {
    "model_attributes_type": "Input should be an object.",
    "extra_forbidden": "This server has no such field. Leave it out.",
}


async def _invalid(request: Request, error: Any) -> Response:
    first = error.errors()[0]
    problem = FAULTS.get(first["type"], first["msg"])
    if first["type"] == "json_invalid":
        problem = f"The body is not JSON: {first['ctx']['error']}."
    elif first["loc"] == ("body",) and first["type"] in ("missing", "model_attributes_type"):
        problem = "The body is no JSON object, or came without Content-Type: application/json."
    # pydantic locates a fault by the keys that lead to it; clients know them without the leading "body".
    path = [str(key) for key in first["loc"] if key != "body"]
    if path[2:3] == ["content"]:  # messages.0.content.1: next comes the part's type, by which pydantic chose its class
        del path[4:5]
    parameter = ".".join(path)[:200].encode(errors="backslashreplace").decode()  # names of fields are the client's
    return await _api_error(request, APIError(400, problem, first["type"], parameter or None))


async def _http_error(request: Request, error: Any) -> Response:
    return JSONResponse(APIError(error.status_code, str(error.detail)).body, error.status_code, error.headers)


async def _unexpected(request: Request, error: Any) -> Response:
    """Answer without the trace, which goes to the server's log."""
    return await _api_error(request, APIError(500, "The server failed on this request.", "failed"))
