"""`relook serve`: models into memory, a port, and the end of both."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import signal
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import h11
import psutil
import torch
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from relook.console import readable_size, status
from relook.errors import RelookError, preview
from relook.generate.engine import Engine
from relook.generate.model_runner import position_bytes
from relook.generate.request import EngineLimits
from relook.generate.shared_projections import share_projections
from relook.model.checkpoint import AnyFolder, parse_folder
from relook.model.families import has_post_decoder, language_model
from relook.model.load import LoadedModel, LoadOptions, without_post_decoder
from relook.serve.api import ServerLimits, make_app
from relook.serve.middleware import App, OwnNames, host_name

HEAD_SECONDS = 10.0  # for the head of a request to arrive
READ_SECONDS = 60.0  # for a client to take what it was sent
CACHE_SHARE = 0.5  # of the free memory
LOOPBACK = ("localhost", "127.0.0.1", "::1")
ORIGIN = re.compile(r"\*|https?://[a-z0-9._-]+(:\d+)?|https?://\[[0-9a-f:.]+\](:\d+)?")


@dataclass(frozen=True)
class ServeOptions:
    """Where a server listens, and how it starts and stops.

    Args:
        port: 0 takes a free one.
        stop_seconds: time that running answers get once the server is told to stop.
        template: conversation template; empty for the model's own.
        page: whether there is a page for people at `/`.
        warm: whether everything is compiled before requests are taken.
        run: the training run that is served, if it is one: the page offers pictures of its data.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    stop_seconds: int = 30
    template: str = ""
    page: bool = False
    warm: bool = False
    run: Path | None = None


class Protocol(H11Protocol):
    """uvicorn's protocol with time limits for a request's head, and for a client that does not read."""

    waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._within(HEAD_SECONDS)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # The head has arrived; `RequestGate` limits the time for the body.
        if self.conn.their_state is not h11.IDLE:
            self._cancel()
        elif self.waiting is None:
            self._within(HEAD_SECONDS)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cancel()
        self._within(READ_SECONDS)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        super().connection_lost(exc)

    def _within(self, seconds: float) -> None:
        self.waiting = self.loop.call_later(seconds, self.transport.abort)

    def _cancel(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None


def serve(
    serving: ServeOptions, limits: EngineLimits, policy: ServerLimits, load: Callable[[], Mapping[str, LoadedModel]]
) -> None:
    """Answer over HTTP until a signal says to stop.

    Args:
        limits: as `start_engines` takes them.
        load: returns the models by name; called once the port is bound, since loading may take minutes.
    """
    check_host_names(policy)
    # A port in use is found before minutes of loading.
    taken = bind_socket(serving.host, serving.port)
    address, port = taken.getsockname()[:2]
    policy = replace(policy, hosts=own_hosts(serving.host, address, policy))
    engines = start_engines(load(), limits, serving.template)
    for name, engine in engines.items():
        size = readable_size(limits.slots * engine.length * position_bytes(engine.loaded))
        status(
            f"{name}: {limits.slots} requests at a time fit, of {engine.length:,} positions each with the answer "
            f"({size} for keys and values)"
        )
        if serving.warm:
            engine.warm()
    # uvicorn finishes the running answers, then raises the signal that it was sent again; before it runs, making the
    # page takes seconds. Either signal ends it all the same way.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), contextlib.ExitStack() as until_end:
        uploads = None
        if serving.page:
            uploads = Path(until_end.enter_context(tempfile.TemporaryDirectory(prefix="relook-page-")))
        server = make_server(engines, policy, serving.stop_seconds, uploads, serving.run)
        url = f"http://{bracketed(address)}:{port}"
        status(f"Serving {', '.join(engines)} at {url}/v1" + serving.page * f", and a page at {url}/")
        if not policy.api_key and not ip_address(address).is_loopback:
            status("No --api-key: whoever reaches this port may use it.", style="yellow")
        server.run(sockets=[taken])
    for engine in engines.values():
        engine.stop()
    status("stopped")


def start_engines(models: Mapping[str, LoadedModel], limits: EngineLimits, template: str = "") -> dict[str, Engine]:
    """Start an engine for each model.

    Args:
        limits: a `cache_gb` of 0 takes half of the memory that is free once the models are loaded.
        template: conversation template; empty for the models' own.
    """
    # Measured once the weights are loaded: what is free now is for keys, values and passes.
    if not limits.cache_gb:
        device = next(iter(models.values())).core.device
        limits = replace(limits, cache_gb=CACHE_SHARE * free_bytes(device) / 1e9 / len(models))
    return {name: Engine(loaded, limits, template) for name, loaded in models.items()}


def make_server(
    engines: Mapping[str, Engine],
    policy: ServerLimits,
    stop_seconds: int,
    uploads: str | Path | None = None,
    run: Path | None = None,
) -> uvicorn.Server:
    """Build a server that is not started yet; with a folder for uploads, it serves the page too."""
    uploads = None if uploads is None else Path(uploads)
    app: App = make_app(engines, policy)
    if uploads is not None:
        from relook.serve.page.app import with_page

        app = with_page(app, engines, policy, uploads, run)
    # Against DNS rebinding: a page elsewhere must not reach a server on this machine by another name.
    if policy.hosts:
        app = OwnNames(app, policy.hosts)
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=stop_seconds,
    )
    return uvicorn.Server(config)


def own_hosts(host: str, address: str, policy: ServerLimits) -> frozenset[str]:
    """Return the host names that are answered; empty for any, where a key or a network decides who may ask.

    Args:
        host: the name it was told to listen on; `address` is what that resolved to.
    """
    if not policy.hosts and (policy.api_key or not ip_address(address).is_loopback):
        return frozenset()
    return frozenset(bracketed(name).lower() for name in {*LOOPBACK, *policy.hosts, host, address} - {""})


def check_host_names(policy: ServerLimits) -> None:
    """Raise RelookError if a policy names hosts or origins that no browser sends."""
    wrong = [
        f"--allow-host {name}"
        for name in policy.hosts
        if not name or host_name(bracketed(name)) != bracketed(name).lower()
    ]
    wrong += [f"--cors-origin {origin}" for origin in policy.origins if not ORIGIN.fullmatch(origin)]
    if wrong:
        fix = "Give hosts as relook.example.org, and origins as https://relook.example.org, without a path."
        raise RelookError(f"Not a name that browsers send: {', '.join(sorted(wrong))}.", fix)


def bracketed(host: str) -> str:
    """Return a host as it is written in URLs."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def bind_socket(host: str, port: int) -> socket.socket:
    """Bind a socket, which does not listen yet: until the models are loaded, load balancers are refused."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio sends small pieces at once (TCP_NODELAY): else each answer waits 40 ms.
    taken = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        taken.bind((host, port))
    except (OSError, OverflowError) as error:
        taken.close()
        raise RelookError(f"Cannot listen on {host}, port {port}: {error}.", "Choose another --port.") from None
    return taken


def free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def load_models(
    folders: Sequence[str | Path], loading: LoadOptions, base: str | Path | None = None, with_base: bool = False
) -> dict[str, LoadedModel]:
    """Load the models to be served, by name (`model_names`). Each shares the tensors that an earlier one has, too.

    Args:
        base: a further model, to compare with.
        with_base: compare with the model itself, its change switched off, as NAME-base.

    Raises:
        RelookError: a folder is named twice, or several are to have the same adapter or the base of one.
    """
    paths = [Path(folder) for folder in folders]
    if len(paths) > 1 and (with_base or loading.adapter is not None):
        raise RelookError(
            "--with-base and --adapter belong to a single model.", "Give bases and runs as further models."
        )
    names = model_names(paths if base is None else [*paths, Path(base)])
    models = {names[0]: loading.load(paths[0])}
    if with_base:
        models[f"{names[0]}-base"] = load_base(models[names[0]], paths[0], loading)
    for name, path in zip(names[1:], [*paths[1:], *([] if base is None else [Path(base)])], strict=True):
        models[name] = load_sharing_tensors(tuple(models.values()), path, loading)
    return models


def model_names(paths: Sequence[Path]) -> list[str]:
    """Return the name of each model: its folder's, with as many of the folders above as tell all apart.

    Raises:
        RelookError: a folder is named twice.
    """
    resolved = [path.resolve() for path in paths]
    if len(set(resolved)) < len(resolved):
        raise RelookError(f"A model is named twice: {preview(paths)}.", "Name each once.")
    for depth in itertools.count(1):
        names = ["/".join(path.parts[-depth:]) for path in resolved]
        if len(set(names)) == len(names):
            break
    return names


def load_base(loaded: LoadedModel, model: Path, loading: LoadOptions) -> LoadedModel:
    """Load the model without what was trained on it: its adapter, a run's training, or its post decoder.

    Raises:
        RelookError: there is nothing to switch off.
    """
    if loading.adapter is not None:
        return load_sharing_tensors([loaded], model, loading)
    folder = parse_folder(model)
    if folder.kind == "run":
        return load_sharing_tensors([loaded], folder.previous[-1] if folder.previous else folder.base, loading)
    if not has_post_decoder(loaded.core.config):
        raise RelookError(f"{model} has nothing that could be switched off.", "Give a base to compare with: --base.")
    return replace(loaded, model=without_post_decoder(loaded.core))


def load_sharing_tensors(models: Sequence[LoadedModel], path: AnyFolder, loading: LoadOptions) -> LoadedModel:
    """Load another model, which shares the tensors that are equal with models in memory."""
    other = replace(loading, adapter=None).load(path)
    for loaded in models:
        if loaded.core.device.type == "cuda":  # before any is shared: all engines then use the joint matrices
            share_projections(language_model(loaded.core.model).layers)
        share_equal_tensors(other.core, loaded.core)
    return other


@torch.no_grad()
def share_equal_tensors(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """Let a model use another's tensors where they are equal, so that memory holds what was trained twice only."""
    other_parameters = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        # Quantised tensors are parameters of other types, whose memory cannot be shared by assignment.
        same = other_parameters.get(name)
        if same is not None and type(same) is type(parameter) is torch.nn.Parameter and torch.equal(same, parameter):
            parameter.data = same.data
