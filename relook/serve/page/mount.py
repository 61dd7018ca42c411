"""The page as a part of the server: which of Gradio's routes there are, and what they take.

Gradio has many more than the page needs (it records, fetches, proxies, edits). Those that are not named here do not
exist, requests that another site's page makes are refused, files that a request names must lie among the uploads, and
the browser is told to load nothing from elsewhere.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio.to_thread

from relook.serve.api import READING, Policy
from relook.serve.engine import Engine
from relook.serve.errors import APIError
from relook.serve.gate import App, Gate, Message, Receive, Scope, Send, refuse, replay
from relook.serve.page.uploads import Uploads

API = re.compile(r"/(v1|health|metrics|docs|redoc|openapi\.json)(/|$)")
ROUTES = {
    "GET": re.compile(
        r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)|/(assets|static)/(?!.*\.\.).*"
        r"|/gradio_api/(info|startup-events|app_id|queue/data|upload_progress|file=.*)"
    ),
    "POST": re.compile(r"/gradio_api/(upload|queue/join|cancel|reset)"),
}
JOIN, UPLOAD, FILE = "/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/file="
# Gradio writes its own scripts and styles into the page, and makes code of strings.
SECURITY = (
    b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'; form-action 'self'; "
    b"base-uri 'self'; object-src 'none'"
)
HEADERS = [(b"content-security-policy", SECURITY), (b"referrer-policy", b"no-referrer")]
HEADERS += [(b"x-accel-buffering", b"no")]  # for nginx, which would hold a stream back
MOST_REQUESTS = 256  # of the page at a time: files, uploads, answers that are being shown
# Bytes of a question with its conversations, which wait in Gradio's queue beyond the gate's count.
MOST_ASKED = 1_000_000


@dataclass(frozen=True)
class Front:
    """The API and the page on one port, by path."""

    api: App
    page: App

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        of_api = scope["type"] == "http" and API.match(scope["path"])
        await (self.api if of_api else self.page)(scope, receive, send)


def with_page(api: App, engines: Mapping[str, Engine], policy: Policy, folder: Path) -> App:
    """The API with the page beside it.

    Args:
        folder: for uploads; it belongs to the page alone.
    """
    # Read when Gradio is imported and when components are made.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder), "HF_HUB_DISABLE_TELEMETRY": "1"}
    import gradio
    from fastapi import FastAPI

    from relook.serve.page.actions import Page
    from relook.serve.page.layout import CSS, LANGUAGES, build

    app = gradio.mount_gradio_app(
        FastAPI(openapi_url=None),
        build(Page(engines, policy, folder)),
        path="/",
        max_file_size=policy.sources.max_bytes,
        i18n=LANGUAGES,
        css=CSS,
        # Its default fonts come from Google.
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        show_error=False,
    )
    gate = Gate(
        Door(app, Uploads(folder)),  # after the examples were drawn: they stay
        api_key=policy.api_key,
        max_body=policy.max_body,
        max_held=2 * policy.max_body,
        max_requests=READING + MOST_REQUESTS,
        seconds=policy.body_seconds,
        challenge='Basic realm="relook: any name, and the API key as password", charset="UTF-8"',
    )
    return Front(api, gate)


@dataclass(frozen=True)
class Door:
    """ASGI middleware before Gradio, behind the gate: bodies come in one piece."""

    app: App
    uploads: Uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            sweeping = asyncio.create_task(self.uploads.sweep_often())
            try:
                return await self.app(scope, receive, send)
            finally:
                sweeping.cancel()
        try:
            check_route(scope)
            body = (await receive()).get("body", b"")
            await anyio.to_thread.run_sync(self._check_files, scope["path"], body)
        except APIError as error:
            return await refuse(send, error)

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        return await self.app(scope, replay(body, receive), sent)

    def _check_files(self, path: str, body: bytes) -> None:
        """On a thread: it looks at disks."""
        if path == UPLOAD and self.uploads.full():
            raise APIError(429, "Too many pictures were uploaded lately.", "busy")
        if path == JOIN:
            if len(body) > MOST_ASKED:
                raise APIError(413, f"A question with its conversation has more than {MOST_ASKED:,} bytes.")
            if names_other_files(body, self.uploads):
                raise APIError(400, "The page takes uploaded pictures only.")
        # Gradio would fetch a URL, and has folders of its own.
        if path.startswith(FILE) and not self.uploads.has(path.removeprefix(FILE)):
            raise APIError(404, "Not Found")


def check_route(scope: Scope) -> None:
    """Raises APIError where there is no such route, or another site's page asks."""
    routes = ROUTES.get("GET" if scope["method"] == "HEAD" else scope["method"])
    if routes is None or not routes.fullmatch(scope["path"]):
        raise APIError(404, "Not Found")
    if from_another_site(scope["method"], dict(scope["headers"])):
        raise APIError(403, "The page takes no requests from other sites.")


def from_another_site(method: str, headers: Mapping[bytes, bytes]) -> bool:
    """Whether another site's page makes a request that changes something, or whose answer it could read.

    Browsers say `Sec-Fetch-Site` over TLS and on this machine alone; `Origin` they always say where it matters.
    """
    origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
    if method != "POST" and origin is None:  # a link, or a picture in a page
        return False
    if site is not None:
        return site not in (b"same-origin", b"none")
    return origin is not None and origin.lower().partition(b"://")[2] != headers.get(b"host", b"").lower()


def names_other_files(body: bytes, uploads: Uploads) -> bool:
    """Whether a request names a file that was not uploaded, or is not JSON at all.

    Gradio would copy such a file among the uploads, or fetch it, before anybody else sees the request.
    """
    try:
        pending: list[Any] = [json.loads(body)]
    except (ValueError, RecursionError):
        return True
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if path is not None and not (isinstance(path, str) and uploads.has(path)):
                return True
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return False
