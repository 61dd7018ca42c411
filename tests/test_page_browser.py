"""The page in a real browser, a headless Chromium: Debian's, or the one in RELOOK_CHROMIUM.

Screenshots are left in RELOOK_SHOTS, or in the test's own folder.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.serving import KEY, Served, noise, serving, until
from test_answering import as_loaded

from relook import load_model
from relook.generate.engine import Engine
from relook.generate.request import EngineLimits
from relook.model.load import add_post_decoder, without_post_decoder
from relook.serve.api import ServerLimits
from relook.serve.media import ImageSources
from relook.serve.page.texts import CHINESE, CHINESE_ERRORS, ENGLISH, TEXTS
from relook.toyworld.build import shipped_base

pytestmark = pytest.mark.slow
STEP = 0.1  # seconds, so that somebody can watch an answer grow
QUESTION = "Describe this image."


@pytest.fixture(scope="module")
def strangers() -> set[str]:
    """Addresses beyond this machine that this process connects to."""
    seen: set[str] = set()

    def watch(event: str, args: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in ("127.0.0.1", "::1"):
            seen.add(str(args[1]))
        if event == "socket.getaddrinfo" and args[0] not in ("127.0.0.1", "::1", "localhost", None):
            seen.add(str(args[0]))

    sys.addaudithook(watch)  # for the rest of the process: there is no way to take it back
    return seen


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, strangers: set[str]) -> Iterator[Served]:
    """Toyworld's base with a post decoder that looks somewhere, and without it."""
    loaded = load_model(shipped_base())
    tuned = as_loaded(add_post_decoder(loaded.core, {}, torch.Generator().manual_seed(0)))
    models = {"tuned": tuned, "tuned-base": as_loaded(without_post_decoder(tuned.core))}
    engines = {name: Engine(model, EngineLimits(slots=4)) for name, model in models.items()}
    for engine in engines.values():
        slow(engine)
    policy = ServerLimits(KEY, ImageSources(max_bytes=100_000), max_body=1_000_000)
    with serving(engines, policy, tmp_path_factory.mktemp("uploads")) as server:
        yield server


def slow(engine: Engine) -> None:
    step = engine.batch.step
    engine.batch.step = lambda: (time.sleep(STEP), step())[1]  # type: ignore[func-returns-value, method-assign]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    path = os.environ.get("RELOOK_CHROMIUM") or shutil.which("chromium")
    if path is None:
        pytest.skip("no Chromium; apt install chromium, or set RELOOK_CHROMIUM")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """The page in a browser of some language and width."""

    def __init__(self, chromium: Any, served: Served, shots: Path, locale: str = "en-US", width: int = 1280) -> None:
        self.name, self.shots, self.elsewhere = f"{locale}-{width}", shots, set[str]()
        self.engines = served.engines
        self.text = TEXTS["zh" if locale.startswith("zh") else "en"]
        self.url = f"http://127.0.0.1:{served.port}/"
        credentials = {"username": "anyone", "password": KEY}
        self.context = chromium.new_context(
            locale=locale, viewport={"width": width, "height": 1000}, http_credentials=credentials
        )
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self._asked(request.url))
        self.page.goto(self.url)
        self.page.wait_for_selector("#question textarea")

    def _asked(self, url: str) -> None:
        if not url.startswith((self.url, "data:", "blob:")):
            self.elsewhere.add(url)

    def shoot(self, what: str) -> None:
        self.page.screenshot(path=self.shots / f"{self.name}-{what}.png", full_page=True)

    def show(self, data: bytes, name: str = "picture.png") -> None:
        file = {"name": name, "mimeType": "image/png", "buffer": data}
        with self.page.expect_response(re.compile("queue/data")):
            self.page.set_input_files("#picture input[type=file]", file)

    def ask(self, question: str = QUESTION) -> None:
        self.page.fill("#question textarea", question)
        self.page.click("#ask")

    def answer(self, side: int = 0) -> str:
        """The last answer of a model, as far as it is there."""
        said = self.page.locator(".chat").nth(side).locator("[data-testid=bot]").all_inner_texts()
        return str(said[-1]).strip() if said else ""

    def whole(self, side: int = 0) -> str:
        """The last answer, once no model answers any more and all of it is shown."""
        until(lambda: self.words(side) and not any(engine.running for engine in self.engines.values()))
        until(lambda: self.answer(side) == self.words(side))
        return self.answer(side)

    def words(self, side: int = 0) -> str:
        return "".join(self.page.locator(".words").nth(side).locator(".token .text").all_text_contents()).strip()

    def click_word(self, word: str, side: int = 0) -> None:
        self.page.locator(".words").nth(side).locator(".token").get_by_text(word, exact=True).first.click()

    def error(self) -> str:
        toast = self.page.locator("[data-testid=toast-body]")
        toast.first.wait_for()
        text = str(toast.first.inner_text())
        assert "Traceback" not in text
        toast.first.locator("button").click()
        toast.first.wait_for(state="detached")
        return text


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("RELOOK_SHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize(("locale", "width"), [("en-US", 1280), ("zh-CN", 1280), ("en-US", 400)])
def test_a_picture_a_question_a_word(
    chromium: Any, served: Served, shots: Path, strangers: set[str], world: Path, locale: str, width: int
) -> None:
    tab = Tab(chromium, served, shots, locale, width)
    page, text = tab.page, tab.text
    for key in ("picture", "examples", "settings", "question", "ask", "stop", "clear", "words", "map"):
        assert page.get_by_text(text[key], exact=True).first.is_visible(), key
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    image = min((world / "test" / "val2014").iterdir())
    tab.show(image.read_bytes(), image.name)
    tab.ask()
    seen: list[str] = []
    until(lambda: bool(tab.answer()))
    while any(engine.running for engine in served.engines.values()):
        seen.append(tab.answer())
        if len(seen) == 3:
            tab.shoot("grows")
    assert len(set(seen)) > 3
    said = [tab.whole(side) for side in (0, 1)]
    assert said[0] == said[1] == served.engines["tuned"].loaded.generate([image], QUESTION)
    assert all(said[0].startswith(piece) for piece in seen)
    tab.click_word("picture")
    page.wait_for_selector("#map svg.picture")
    assert page.locator("#map rect").count() == 1 + 36
    assert "picture" in page.locator("#map").inner_text()
    tab.shoot("map")
    tab.click_word("picture", side=1)
    page.get_by_text(text["no_map"].format(model="tuned-base")).wait_for()
    tab.ask("Is there a dog in the image?")  # the second turn of the same conversation
    until(lambda: tab.answer(1) in ("Yes.", "No.") and tab.answer() in ("Yes.", "No."))
    assert page.locator(".chat").first.locator("[data-testid=user]").count() == 2
    page.click("#clear")
    until(lambda: page.locator(".chat [data-testid=bot]").count() == 0)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.elsewhere == set()
    assert strangers == set()
    tab.context.close()


def test_what_is_not_there_is_marked(chromium: Any, served: Served, shots: Path, world: Path) -> None:
    """On an example, of which the truth is known. The base claims objects that usually belong to a setting."""
    tab = Tab(chromium, served, shots)
    for i in range(6):
        tab.page.locator(".gallery-item").nth(i).click()
        tab.page.locator("#facts").get_by_text("On this picture").wait_for()
        names = re.search(r"picture: (.*?)\.", tab.page.locator("#facts").inner_text())
        assert names is not None
        there = names[1].split(", ")
        tab.ask()
        answer = tab.whole()
        claimed = set(re.findall(r"There is an? (\w+)", answer))
        marks = tab.page.locator(".words").first.locator(".token:has(.label)")
        found = {str(mark.locator(".text").first.inner_text()) for mark in marks.all()}
        assert found == claimed - set(there), answer
        if found:
            assert tab.page.locator(".words").first.get_by_text(ENGLISH["absent"]).count() >= len(found)
            tab.shoot("marked")
            break
    else:
        pytest.fail("the base claimed nothing that is not there")
    tab.context.close()


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_mistakes_are_told(chromium: Any, served: Served, shots: Path, locale: str) -> None:
    tab = Tab(chromium, served, shots, locale)
    chinese = locale == "zh-CN"
    tab.show(b"this is a text")
    told = tab.error()
    assert "PNG, JPEG, WebP, GIF or BMP" in told
    assert (CHINESE_ERRORS["invalid_message"] in told) == chinese
    tab.ask(" ")
    assert tab.error().strip().endswith((CHINESE if chinese else ENGLISH)["no_question"])
    tab.ask("<image>")
    assert "<image>" in tab.error()
    large = {"name": "a.png", "mimeType": "image/png", "buffer": noise(0, (400, 400))}
    tab.page.set_input_files("#picture input[type=file]", large)
    assert "maximum allowed size" in tab.error()  # Gradio's own words
    assert "Traceback" not in tab.page.content()
    tab.context.close()


def test_what_is_said_is_no_html(chromium: Any, served: Served, shots: Path) -> None:
    tab = Tab(chromium, served, shots)
    text = "Is <img src=x> & <b>this</b> $$x$$ a &lt;cup&gt;?"
    tab.ask(text)
    tab.whole()
    assert tab.page.locator(".chat").first.locator("[data-testid=user]").inner_text().strip() == text
    tab.context.close()


def test_starting_again_while_an_answer_comes(chromium: Any, served: Served, shots: Path) -> None:
    """Nothing of it comes back."""
    tab = Tab(chromium, served, shots)
    for _ in range(5):
        tab.ask()
        until(lambda: bool(tab.answer()))
        tab.page.click("#clear")
        until(lambda: not tab.answer() and not any(engine.running for engine in served.engines.values()))
        tab.page.wait_for_timeout(300)
        assert not tab.answer()
    tab.context.close()


def test_stopping_and_leaving_free_the_model(chromium: Any, served: Served, shots: Path) -> None:
    tab = Tab(chromium, served, shots)
    for leave in (lambda: tab.page.click("#stop"), tab.context.close):
        tab.ask()
        until(lambda: all(engine.running == 1 for engine in served.engines.values()))
        leave()
        until(lambda: all(engine.running == 0 for engine in served.engines.values()))


def test_without_the_key_there_is_no_page(chromium: Any, served: Served) -> None:
    """The browser is asked for a password, and a headless one has none."""
    with pytest.raises(Exception, match="ERR_INVALID_AUTH_CREDENTIALS"):
        chromium.new_context().new_page().goto(f"http://127.0.0.1:{served.port}/")
