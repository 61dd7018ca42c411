"""The page as a part of the server: which of Gradio's routes there are, and what they take.

Gradio has many more than the page needs (it records, fetches, proxies, edits). Those that are not named here do not
exist, requests that another site's page makes are refused, files that a request names must be the page's own, and the
browser is told to load nothing from elsewhere.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relook.serve.api import READERS, Policy
from relook.serve.engine import Engine
from relook.serve.errors import APIError
from relook.serve.gate import App, Gate, Message, Receive, Scope, Send, refuse, replay

API = re.compile(r"/(v1|health|metrics|docs|redoc|openapi\.json)(/|$)")
ROUTES = {
    "GET": re.compile(
        r"/|/(config|theme\.css|favicon\.ico|manifest\.json|robots\.txt)|/(assets|static|svelte)/.*"
        r"|/gradio_api/(info|startup-events|app_id|queue/data|upload_progress|file=.*)"
    ),
    "POST": re.compile(r"/gradio_api/(upload|queue/join|cancel|reset)"),
}
JOIN, UPLOAD = "/gradio_api/queue/join", "/gradio_api/upload"
# Gradio writes its own scripts and styles into the page, and makes code of strings.
SECURITY = (
    b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'; form-action 'self'; "
    b"base-uri 'self'; object-src 'none'"
)
HEADERS = [(b"content-security-policy", SECURITY), (b"referrer-policy", b"no-referrer")]
MOST_REQUESTS = 256  # of the page at a time: files, uploads, answers that are being shown
MOST_BYTES = 2_000_000_000  # of uploads that are kept


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
        Door(app, folder),
        api_key=policy.api_key,
        max_body=policy.max_body,
        max_held=2 * policy.max_body,
        max_requests=READERS + MOST_REQUESTS,
        seconds=policy.body_seconds,
        challenge='Basic realm="relook: any name, and the API key as password", charset="UTF-8"',
    )
    return Front(api, gate)


@dataclass(frozen=True)
class Door:
    """ASGI middleware before Gradio, behind the gate: bodies come in one piece."""

    app: App
    folder: Path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        try:
            message = await receive()
            self._check(scope, message.get("body", b""))
        except APIError as error:
            return await refuse(send, error)

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        return await self.app(scope, replay(message.get("body", b""), receive), sent)

    def _check(self, scope: Scope, body: bytes) -> None:
        method, path = scope["method"], scope["path"]
        routes = ROUTES.get("GET" if method == "HEAD" else method)
        if routes is None or not routes.fullmatch(path):
            raise APIError(404, "Not Found")
        site = dict(scope["headers"]).get(b"sec-fetch-site", b"none")
        if method == "POST" and site not in (b"same-origin", b"none"):
            raise APIError(403, "The page takes no requests from other sites.")
        if (
            path == UPLOAD
            and sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file()) > MOST_BYTES
        ):
            raise APIError(429, "Too many pictures were uploaded lately.", "busy")
        if path == JOIN and names_other_files(body, self.folder):
            raise APIError(400, "The page takes uploaded pictures only.")


def names_other_files(body: bytes, folder: Path) -> bool:
    """Whether a request names a file that is not below a folder, or is not JSON at all.

    Gradio would copy such a file among the uploads, or fetch it, before anybody else sees the request.
    """
    try:
        pending: list[Any] = [json.loads(body)]
    except (ValueError, RecursionError):
        return True
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            if value.get("path") is not None and not _below(value["path"], folder):
                return True
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return False


def _below(path: Any, folder: Path) -> bool:
    try:
        return Path(path).resolve().is_relative_to(folder.resolve())
    except (TypeError, ValueError, OSError, RuntimeError):
        return False
