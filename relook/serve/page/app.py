"""The page's components and events, and its routes: the only module that knows Gradio.

Gradio has the widgets, the uploads and the stream of events. The picture, the conversation and its words are HTML of
the page's own (`view.py`): Gradio's cannot be clicked by word, are not accessible, and speak one language each.
"""

from __future__ import annotations

import asyncio
import html
import json
import logging
import os
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import anyio.to_thread
import gradio as gr

from relook.generate.engine import Engine
from relook.serve.api import READING, ServerLimits
from relook.serve.middleware import App, Message, Receive, RequestGate, Scope, Send, refuse, replay
from relook.serve.page.actions import (
    AGAIN_TEMPERATURE,
    EVERY_SECONDS,
    EXAMPLE_QUESTION,
    KEPT_SECONDS,
    Page,
    Sampling,
    Uploads,
)
from relook.serve.page.dialogue import Dialogue
from relook.serve.page.texts import LOCALES, TEXTS, TRADITIONAL, explain_error, language_of
from relook.serve.page.view import Place, View
from relook.serve.protocol import APIError

# ----------------------------------------------------------------------------------------------------

SESSIONS = 256  # whose components' values Gradio remembers
FOLDER = resources.files("relook.serve.page") / "templates"
LANGUAGES = gr.I18n(**TEXTS, **{locale: TEXTS[language] for locale, language in LOCALES.items()})
# Gradio's own colour of the button has a contrast of 2.8 : 1.
PRIMARY = ("background_fill", "background_fill_hover", "background_fill_dark", "background_fill_hover_dark")
STORAGE = "relook"  # in the browser, which keeps the conversation

Raw = Any  # what the browser sends for a component
Outputs = dict[Any, Any]  # by component; others stay as they are


@dataclass(frozen=True)
class Parts:
    """Hold the page's components that events change."""

    state: gr.BrowserState
    head: gr.HTML
    panel: gr.HTML
    chat: gr.HTML
    notice: gr.HTML
    question: gr.Textbox
    ask: gr.Button
    stop: gr.Button
    again: gr.Button
    clear: gr.Button

    @property
    def all(self) -> list[Any]:
        """Return them in order."""
        return [getattr(self, part.name) for part in fields(self)]


def build_page(page: Page, run: Path | None = None) -> gr.Blocks:
    """Build the page of the models; `run` is the training run that is served, if it is one."""
    t, title = LANGUAGES, f"relook: {', '.join(page.engines)}"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(EVERY_SECONDS, KEPT_SECONDS)) as blocks:
        # The secret hides nothing: it keeps what was stored readable after a restart of the server.
        state = gr.BrowserState("", storage_key=STORAGE, secret=STORAGE)
        head = _html("head")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                panel = _html("panel", "panel.js")
            with gr.Column(scale=3, min_width=300):
                chat = _html("chat", "chat.js")
                notice = _html("notice", value=_alert(""))
                question = gr.Textbox(
                    label=t("question"), placeholder=t("ask_here"), elem_id="question", lines=1, max_lines=4
                )
                with gr.Row():
                    ask = gr.Button(t("ask"), variant="primary", elem_id="ask", min_width=80)
                    stop = gr.Button(t("stop"), elem_id="stop", min_width=80, visible=False)
                    again = gr.Button(t("again"), elem_id="again", min_width=80, visible=False)
                    clear = gr.Button(t("clear"), elem_id="clear", min_width=80, visible=False)
                with gr.Accordion(t("settings"), open=False, elem_id="settings"):
                    sampling = [
                        gr.Slider(0, 2, 0, step=0.05, label=t("temperature")),
                        gr.Slider(0, 1, 1, step=0.01, label=t("top_p")),
                        gr.Number(512, label=t("max_tokens"), precision=0, minimum=1),
                        # A text, because Gradio turns an empty number into 0.
                        gr.Textbox("", label=t("seed"), elem_id="seed"),
                    ]
        data = gr.JSON(visible=False)
        parts = Parts(state, head, panel, chat, notice, question, ask, stop, again, clear)
        _add_events(blocks, Actions(page, page.draw_examples(), page.run_pictures(run), parts), sampling, data)
    waiting = sum(engine.limits.waiting for engine in page.engines.values())
    blocks.state_session_capacity = SESSIONS
    return blocks.queue(max_size=waiting, api_open=False)


def _html(name: str, script: str = "", value: str = "") -> gr.HTML:
    js = (FOLDER / script).read_text(encoding="utf-8") if script else None
    return gr.HTML(value, elem_id=name, js_on_load=js, apply_default_css=False)


def _event_data(event: gr.EventData) -> Raw:
    return event._data


def _add_events(blocks: gr.Blocks, actions: Actions, sampling: Sequence[Any], data: gr.JSON) -> None:
    parts = actions.parts
    settings: dict[str, Any] = {"preprocess": False, "api_visibility": "private", "show_progress": "hidden"}
    # Answers wait in the engines' queue, where they count; not in Gradio's, where a question would show nothing.
    answering: dict[str, Any] = {**settings, "concurrency_limit": None}
    blocks.load(actions.load, [parts.state], parts.all, **settings)
    inputs = [parts.state, parts.question, *sampling]
    asking = [
        gr.on([parts.question.submit, parts.ask.click], actions.ask, inputs, parts.all, **answering),
        parts.again.click(actions.ask_again, [parts.state, *sampling], parts.all, **answering),
    ]
    # First the answer is ended, then shown: text that is on its way when both happen at once would come back.
    # What follows an event knows nothing of it, so its data goes through a component.
    chosen = parts.panel.select(_event_data, None, data, cancels=asking, **settings)
    chosen = chosen.then(actions.choose, [parts.state, data], parts.all, **settings)
    asking.append(chosen.success(actions.ask_example, [parts.state, *sampling], parts.all, **answering))
    parts.panel.select(None, cancels=[asking[-1]])
    uploaded = parts.panel.upload(_event_data, None, data, cancels=asking, **settings)
    uploaded.then(actions.show_upload, [parts.state, data], parts.all, **settings)
    for event, action in (
        (parts.stop.click, actions.stop),
        (parts.clear.click, actions.start_again),
        (parts.panel.clear, actions.remove_picture),
    ):
        event(None, cancels=asking).then(action, [parts.state], parts.all, **settings)
    parts.panel.refused(actions.refuse_upload, [parts.state], parts.all, **settings)
    parts.chat.select(actions.look, [parts.state], parts.all, concurrency_limit=2, **settings)


@dataclass(frozen=True)
class Actions:
    """Answer the page's events: each takes the conversation from the browser, and returns what changes."""

    page: Page
    examples: Sequence[Path]
    run_pictures: Sequence[Path]
    parts: Parts

    def load(self, request: gr.Request, state: Raw) -> Outputs:
        """Show the page, with the conversation that the browser kept."""
        conversation = self._parse(state).ended("cancelled")
        shown = self._everything(request, conversation)
        shown[self.parts.head] = self._view(request).head()
        if conversation.picture:
            try:
                self.page.read(conversation.picture)
            except APIError as error:
                shown |= self._notice(request, error)
        return shown

    async def ask(self, request: gr.Request, state: Raw, question: Raw, *sampling: Raw) -> AsyncIterator[Outputs]:
        """Ask all models, and show their answers as they grow."""
        conversation = self._parse(state).ended("cancelled")
        async for shown in self._answers(request, conversation, str(question or ""), sampling):
            yield shown

    async def ask_again(self, request: gr.Request, state: Raw, *sampling: Raw) -> AsyncIterator[Outputs]:
        """Ask the last question once more, sampled."""
        conversation = self._parse(state).ended("cancelled")
        if not conversation.exchanges:
            return
        sampling = (sampling[0] or AGAIN_TEMPERATURE, *sampling[1:])
        question = conversation.exchanges[-1].question
        async for shown in self._answers(request, conversation, question, sampling, again=True):
            yield shown

    async def ask_example(self, request: gr.Request, state: Raw, *sampling: Raw) -> AsyncIterator[Outputs]:
        """Ask about the example that was chosen."""
        async for shown in self._answers(request, self._parse(state), EXAMPLE_QUESTION, sampling):
            yield shown

    async def _answers(
        self, request: gr.Request, before: Dialogue, question: str, sampling: Sequence[Raw], again: bool = False
    ) -> AsyncIterator[Outputs]:
        parts, view = self.parts, self._view(request)
        if not question.strip():
            yield self._notice(request, APIError(400, "", "no_question"))
            return
        temperature = float(sampling[0]) if again else None
        conversation = before.asked(question, temperature)
        # At once, before the first word. The question box is emptied here only: what is typed later stays.
        emptied = {} if again else {parts.question: ""}
        yield {**self._everything(request, conversation), **emptied}
        started = False
        try:
            history = before.before_last_question() if again else before
            async for answers in self.page.ask(history, question, _sampling(*sampling)):
                started = True
                conversation = conversation.answered(answers)
                yield {parts.state: conversation.model_dump_json(), parts.chat: view.chat(conversation)}
            yield self._conversation(request, conversation)
        except Exception as error:
            if not isinstance(error, APIError):
                logging.getLogger(__name__).exception("The page failed on a question.")
                error = APIError(500, "", "failed")
            if started:
                yield {**self._conversation(request, conversation.ended("failed")), **self._notice(request, error)}
            else:  # as if it had not been asked
                back = {} if again else {parts.question: question}
                yield {**self._everything(request, before), **back, **self._notice(request, error)}

    def stop(self, request: gr.Request, state: Raw) -> Outputs:
        """Show that the answers were stopped."""
        return self._conversation(request, self._parse(state).ended("cancelled"))

    def start_again(self, request: gr.Request, state: Raw) -> Outputs:
        """Forget the conversation, but not the picture."""
        return self._everything(request, self._new(self._parse(state).picture))

    def choose(self, request: gr.Request, state: Raw, data: Raw) -> Outputs:
        """Begin a conversation about an example."""
        paths = [path for path in (*self.examples, *self.run_pictures) if path.name == _value(data, "name")]
        return self._everything(request, self._new(str(paths[0]) if paths else ""))

    def show_upload(self, request: gr.Request, state: Raw, data: Raw) -> Outputs:
        """Begin a conversation about an upload, or add it to this one, if the models can read it."""
        path, conversation = _value(data, "path"), self._parse(state).ended("cancelled")
        try:
            self.page.check(path)
        except APIError as error:
            return {**self._conversation(request, conversation), **self._notice(request, error)}
        if _value(data, "add") and conversation.picture:
            return self._everything(request, conversation.model_copy(update={"added": (*conversation.added, path)}))
        return self._everything(request, self._new(path))

    def refuse_upload(self, request: gr.Request, state: Raw) -> Outputs:
        """Tell that an upload was not taken."""
        return self._notice(request, APIError(400, "", "bad_picture"))

    def remove_picture(self, request: gr.Request, state: Raw) -> Outputs:
        """Begin a conversation without a picture."""
        return self._everything(request, self._new())

    def look(self, request: gr.Request, event: gr.EventData, state: Raw) -> Outputs:
        """Show where a model looked before the clicked word, below its answer."""
        conversation, word = self._parse(state), Place.parse(_value(event._data, "place"))
        names = list(self.page.engines)
        if word is None or word.model >= len(names) or word.exchange >= len(conversation.exchanges):
            return {}
        turns, picture = conversation.turns(word.model, word.exchange), conversation.only_picture(word.exchange)
        try:
            attention = self.page.look(names[word.model], picture, turns, word.piece)
        except APIError as error:
            return {self.parts.chat: self._view(request).chat(conversation), **self._notice(request, error)}
        return {self.parts.chat: self._view(request).chat(conversation, word, attention)}

    def _parse(self, state: Raw) -> Dialogue:
        return Dialogue.parse(state, list(self.page.engines))

    def _new(self, picture: str = "") -> Dialogue:
        return Dialogue(models=tuple(self.page.engines), picture=picture)

    def _view(self, request: gr.Request) -> View:
        return View(self.page, self.examples, self.run_pictures, _language(request))

    def _everything(self, request: gr.Request, conversation: Dialogue) -> Outputs:
        panel = {self.parts.panel: self._view(request).panel(conversation)}
        return {**self._conversation(request, conversation), **panel, **self._notice(request)}

    def _conversation(self, request: gr.Request, conversation: Dialogue) -> Outputs:
        """Show a conversation, and the buttons that it allows: Stop while answers grow, the others when they ended."""
        parts, running, begun = self.parts, conversation.running, bool(conversation.exchanges)
        return {
            parts.state: conversation.model_dump_json(),
            parts.chat: self._view(request).chat(conversation),
            parts.ask: gr.update(interactive=not running),
            parts.stop: gr.update(visible=running),
            parts.again: gr.update(visible=begun and not running),
            parts.clear: gr.update(visible=begun),
        }

    def _notice(self, request: gr.Request, error: APIError | None = None) -> Outputs:
        limits = {
            "megabytes": self.page.sources.max_bytes / 1e6,
            "megapixels": next(iter(self.page.engines.values())).limits.max_pixels / 1e6,
        }
        return {self.parts.notice: _alert(explain_error(_language(request), error, **limits) if error else "")}


# --- what the browser sends, and what it is sent


def _value(data: Raw, key: str) -> str:
    return str(data.get(key) or "") if isinstance(data, Mapping) else ""


def _alert(text: str) -> str:
    return f'<div role="alert">{html.escape(text)}</div>'


def _language(request: gr.Request) -> str:
    return language_of(request.headers.get("accept-language", ""))


def _sampling(temperature: Raw, top_p: Raw, max_tokens: Raw, seed: Raw) -> Sampling:
    """Read the settings as they are sent: a number may arrive as 512.0, and a seed is a text."""
    if isinstance(max_tokens, float) and max_tokens.is_integer():
        max_tokens = int(max_tokens)
    text = str(seed or "").strip()
    return Sampling(temperature, top_p, max_tokens, int(text) if text.isdecimal() and len(text) < 20 else text or None)


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


def with_page(
    api: App, engines: Mapping[str, Engine], policy: ServerLimits, folder: Path, run: Path | None = None
) -> App:
    """Put the page beside the API.

    Args:
        folder: for uploads; nothing else may be in it.
        run: the training run that is served, if it is one.
    """
    # Read when Gradio is imported and when components are made.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder), "HF_HUB_DISABLE_TELEMETRY": "1"}
    import gradio
    from fastapi import FastAPI

    from relook.serve.page.actions import Page

    app = gradio.mount_gradio_app(
        FastAPI(openapi_url=None),
        build_page(Page(engines, policy, folder), run),
        path="/",
        max_file_size=policy.sources.max_bytes,
        i18n=LANGUAGES,
        css=(FOLDER / "page.css").read_text(encoding="utf-8"),
        js=_page_script(),
        # Its default fonts come from Google.
        theme=gradio.themes.Default(
            primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
        ).set(**{f"button_primary_{part}": "*primary_700" for part in PRIMARY}),
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


def _page_script() -> str:
    constants = {
        "OFFLINE": {language: texts["offline"] for language, texts in TEXTS.items()},
        "TRADITIONAL": TRADITIONAL,
    }
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    for name, value in constants.items():
        script = script.replace(name, json.dumps(value))
    return script


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
