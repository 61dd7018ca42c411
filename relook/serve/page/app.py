"""The page's components and events, and its routes: the only module that knows Gradio.

Every event takes the browser's values as they are (`preprocess=False`): Gradio would open pictures with all of Pillow's
readers, and they are to be opened by `Page` alone.
"""

from __future__ import annotations

import asyncio
import html
import json
import os
import re
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio.to_thread
import gradio as gr

from relook.data.samples import Turn
from relook.generate.engine import Engine
from relook.report.plots import has_attention_maps
from relook.serve.api import READING, ServerLimits
from relook.serve.middleware import App, Message, Receive, RequestGate, Scope, Send, refuse, replay
from relook.serve.page.actions import EVERY_SECONDS, KEPT_SECONDS, AnswerWord, Page, Sampling, Uploads
from relook.serve.page.texts import TEXTS, explain_error, language_of, translate
from relook.serve.protocol import APIError

# ----------------------------------------------------------------------------------------------------

SESSIONS = 256  # whose components' values Gradio remembers
CSS = """
.gradio-container{max-width:1400px!important}
#map .prose{padding-top:1.8em}
#map svg.picture{width:100%;max-width:420px;aspect-ratio:1;image-rendering:pixelated}
"""
LANGUAGES = gr.I18n(**TEXTS, **{"zh-CN": TEXTS["zh"]})

Raw = Any  # what the browser sends for a component


def build_page(page: Page) -> gr.Blocks:
    """Build the page of the models."""
    t, names = LANGUAGES, list(page.engines)
    with gr.Blocks(title="relook", analytics_enabled=False, delete_cache=(EVERY_SECONDS, KEPT_SECONDS)) as blocks:
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                picture = gr.Image(
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    label=t("picture"),
                    height=320,
                    elem_id="picture",
                    buttons=[],
                )
                facts = gr.HTML(elem_id="facts")
                paths = [str(path) for path in page.draw_examples()]
                # Not `Examples`, which calls the server past the queue, by a route that the page has closed.
                examples = gr.Dataset(components=[picture], samples=[[path] for path in paths], label=t("examples"))
                with gr.Accordion(t("settings"), open=False):
                    sampling = [
                        gr.Slider(0, 2, 0, step=0.05, label=t("temperature")),
                        gr.Slider(0, 1, 1, step=0.01, label=t("top_p")),
                        gr.Number(512, label=t("max_tokens"), precision=0, minimum=1),
                        gr.Number(None, label=t("seed"), precision=0),
                    ]
            with gr.Column(scale=2, min_width=300):
                question = gr.Textbox(label=t("question"), placeholder=t("ask_here"), elem_id="question", max_lines=6)
                with gr.Row():
                    ask = gr.Button(t("ask"), variant="primary", elem_id="ask", min_width=80)
                    stop = gr.Button(t("stop"), elem_id="stop", min_width=80)
                    clear = gr.Button(t("clear"), elem_id="clear", min_width=80)
                with gr.Row():
                    sides = [_side(name, has_attention_maps(page.engines[name].loaded)) for name in names]
                shown = gr.HTML(label=t("map"), show_label=True, container=True, elem_id="map")
        chats, answers = [chat for chat, _ in sides], [answer for _, answer in sides]
        event_settings: dict[str, Any] = {"preprocess": False, "api_visibility": "private", "show_progress": "hidden"}
        everything = [*chats, *answers, shown]
        asking = gr.on(
            [question.submit, ask.click],
            _asker(page),
            [picture, question, *sampling, *chats],
            [question, *everything],
            concurrency_limit=min(engine.limits.slots for engine in page.engines.values()),
            **event_settings,
        )
        stop.click(None, cancels=[asking])
        # First the answer is ended, then cleared: text that is on its way when both happen at once would come back.
        ended = gr.on([clear.click, *(chat.clear for chat in chats)], None, cancels=[asking])
        ended.then(lambda: _nothing(names), None, everything, **event_settings)
        examples.click(lambda index: paths[index], [examples], [picture], **event_settings)
        picture.change(None, cancels=[asking]).then(_shower(page), [picture], [facts, *everything], **event_settings)
        for name, chat, answer in zip(names, chats, answers, strict=True):
            answer.select(_looker(page, name), [picture, chat], [shown], concurrency_limit=2, **event_settings)
    waiting = sum(engine.limits.waiting for engine in page.engines.values())
    blocks.state_session_capacity = SESSIONS
    return blocks.queue(max_size=waiting, api_open=False)


def _side(name: str, looks: bool) -> tuple[gr.Chatbot, gr.HighlightedText]:
    """Add a model's conversation, and its last answer in words."""
    colors = {text["absent"]: "red" for text in TEXTS.values()}
    with gr.Column(min_width=300):
        # No Markdown; HTML it shows all the same (sanitised), so messages come escaped.
        chat = gr.Chatbot(
            label=name,
            render_markdown=False,
            latex_delimiters=[],
            buttons=[],  # "copy" would copy them as they are escaped
            feedback_options=None,
            allow_file_downloads=False,
            height=360,
            elem_classes="chat",
        )
        return chat, gr.HighlightedText(
            label=LANGUAGES("words" if looks else "last"), color_map=colors, elem_classes="words"
        )


def _nothing(names: Sequence[str]) -> list[Any]:
    return [*([] for _ in names), *([] for _ in names), ""]


def _asker(page: Page) -> Callable[..., AsyncIterator[list[Any]]]:
    async def ask(request: gr.Request, picture: Raw, question: str, *rest: Raw) -> AsyncIterator[list[Any]]:
        language, chats_before = _language(request), list(rest[4:])
        with _show_errors(language):
            histories = [_turns(chat) for chat in chats_before]
            path = _picture_path(picture)
            present = await anyio.to_thread.run_sync(page.known_objects, path)
            async for texts in page.ask(path, str(question or ""), histories, _sampling(*rest[:4])):
                chats = [
                    _messages([*turns, Turn(question, text)]) for turns, text in zip(histories, texts, strict=True)
                ]
                words = [_marked(page.pieces(text, present), language) for text in texts]
                yield ["", *chats, *words, ""]

    return ask


def _shower(page: Page) -> Callable[..., list[Any]]:
    def show(request: gr.Request, picture: Raw) -> list[Any]:
        language, path, facts = _language(request), _picture_path(picture), ""
        with _show_errors(language):
            if path:
                page.check(path)
                present = page.known_objects(path)
                facts = "" if present is None else translate(language, "there_is", names=", ".join(sorted(present)))
        return [html.escape(facts), *_nothing(list(page.engines))]

    return show


def _looker(page: Page, name: str) -> Callable[..., str]:
    def look(request: gr.Request, event: gr.SelectData, picture: Raw, chat: Raw) -> str:
        language = _language(request)
        index = event.index[0] if isinstance(event.index, (list, tuple)) else event.index
        with _show_errors(language):
            return page.look(name, _picture_path(picture), _turns(chat), int(index), language)

    return look


# --- what the browser sends, and what it is sent


@contextmanager
def _show_errors(language: str) -> Iterator[None]:
    """Show an error of the API to the user of the page."""
    try:
        yield
    except APIError as error:
        raise gr.Error(html.escape(explain_error(language, error)), print_exception=False) from None


def _language(request: gr.Request) -> str:
    return language_of(request.headers.get("accept-language", ""))


def _picture_path(picture: Raw) -> str:
    """Return the path of an uploaded picture; empty if there is no picture."""
    return str(picture.get("path") or "") if isinstance(picture, Mapping) else ""


def _sampling(temperature: Raw, top_p: Raw, max_tokens: Raw, seed: Raw) -> Sampling:
    # A number may arrive as 512.0, which the API refuses.
    integers = [int(n) if isinstance(n, float) and n.is_integer() else n for n in (max_tokens, seed)]
    return Sampling(temperature, top_p, *integers)


def _turns(chat: Raw) -> list[Turn]:
    """Read a chatbot's messages as turns of a prompt and its answer."""
    texts = [_text(message.get("content")) for message in chat or [] if isinstance(message, Mapping)]
    return [Turn(*texts[i : i + 2]) for i in range(0, len(texts) - 1, 2)]


def _text(content: Raw) -> str:
    """Read a message's content, a text or a list of parts with texts, escaped as `_messages` wrote it."""
    parts = content if isinstance(content, list) else [content]
    texts = (part.get("text") if isinstance(part, Mapping) else part for part in parts)
    return html.unescape("".join(str(text or "") for text in texts))


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Write turns as a chatbot's messages."""
    # Escaped, because text is no HTML: it neither vanishes nor loads anything. As parts, which Gradio does not strip:
    # what the browser sends back must be the text as it was.
    return [
        {"role": role, "content": {"type": "text", "text": html.escape(text, quote=False)}}
        for turn in turns
        for role, text in (("user", turn.prompt), ("assistant", turn.response))
    ]


def _marked(pieces: Sequence[AnswerWord], language: str) -> list[tuple[str, str | None]]:
    return [(piece.text, translate(language, "absent") if piece.absent else None) for piece in pieces]


# ----------------------------------------------------------------------------------------------------
# The page as a part of the server: which of Gradio's routes exist, and what they take.
#
# Gradio has many more than the page needs (it records, fetches, proxies, edits). Routes that are not named here do not
# exist, requests from another site's page are refused, files that a request names must be uploads, and the browser is
# told to load nothing from elsewhere.

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
class PathRouter:
    """Route requests to the API or the page, on one port, by path."""

    api: App
    page: App

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        of_api = scope["type"] == "http" and API.match(scope["path"])
        await (self.api if of_api else self.page)(scope, receive, send)


def with_page(api: App, engines: Mapping[str, Engine], policy: ServerLimits, folder: Path) -> App:
    """Put the page beside the API.

    Args:
        folder: for uploads; nothing else may be in it.
    """
    # Read when Gradio is imported and when components are made.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder), "HF_HUB_DISABLE_TELEMETRY": "1"}
    import gradio
    from fastapi import FastAPI

    from relook.serve.page.actions import Page

    app = gradio.mount_gradio_app(
        FastAPI(openapi_url=None),
        build_page(Page(engines, policy, folder)),
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
    gate = RequestGate(
        PageGuard(app, Uploads(folder)),  # after the examples were drawn: they stay
        api_key=policy.api_key,
        max_body=policy.max_body,
        max_held=2 * policy.max_body,
        max_requests=READING + MOST_REQUESTS,
        seconds=policy.body_seconds,
        challenge='Basic realm="relook: any name, and the API key as password", charset="UTF-8"',
    )
    return PathRouter(api, gate)


@dataclass(frozen=True)
class PageGuard:
    """Check routes and files before Gradio sees a request, as ASGI middleware behind the gate."""

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
            # The gate has received all of it: it comes in one piece.
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
        """Refuse uploads and files that may not be; called on a thread, because it reads the disk."""
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
    """Raise APIError if there is no such route, or if another site's page asks."""
    routes = ROUTES.get("GET" if scope["method"] == "HEAD" else scope["method"])
    if routes is None or not routes.fullmatch(scope["path"]):
        raise APIError(404, "Not Found")
    if from_another_site(scope["method"], dict(scope["headers"])):
        raise APIError(403, "The page takes no requests from other sites.")


def from_another_site(method: str, headers: Mapping[bytes, bytes]) -> bool:
    """Return True if another site's page makes a request that changes something, or whose answer it could read.

    Browsers send `Sec-Fetch-Site` over TLS and on this machine alone; they always send `Origin` where it matters.
    """
    origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
    if method != "POST" and origin is None:  # a link, or a picture in a page
        return False
    if site is not None:
        return site not in (b"same-origin", b"none")
    return origin is not None and origin.lower().partition(b"://")[2] != headers.get(b"host", b"").lower()


def names_other_files(body: bytes, uploads: Uploads) -> bool:
    """Return True if a request names a file that was not uploaded, or is not JSON.

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
