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
from relook.serve.page.actions import EXAMPLE_QUESTION
from relook.serve.page.texts import ENGLISH, TEXTS, language_of
from relook.toyworld.build import shipped_base
from relook.toyworld.world import OBJECTS

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
    """The page in a browser of some language and size."""

    def __init__(
        self,
        chromium: Any,
        served: Served,
        shots: Path,
        locale: str = "en-US",
        width: int = 1280,
        height: int = 720,
        **options: Any,
    ) -> None:
        self.name, self.shots, self.elsewhere = f"{locale}-{width}", shots, set[str]()
        self.engines, self.text = served.engines, TEXTS[language_of(locale)]
        self.url, self.height = f"http://127.0.0.1:{served.port}/", height
        credentials = {"username": "anyone", "password": KEY}
        self.context = chromium.new_context(
            locale=locale, viewport={"width": width, "height": height}, http_credentials=credentials, **options
        )
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self._asked(request.url))
        self.page.goto(self.url)
        self.page.wait_for_selector("#panel .example")

    def _asked(self, url: str) -> None:
        if not url.startswith((self.url, "data:", "blob:")):
            self.elsewhere.add(url)

    def shoot(self, what: str) -> None:
        self.page.screenshot(path=self.shots / f"{self.name}-{what}.png")

    def show(self, data: bytes, name: str = "picture.png", add: bool = False) -> None:
        file = {"name": name, "mimeType": "image/png", "buffer": data}
        self.page.set_input_files("#panel input.add" if add else "#panel input:not(.add)", file)

    def ask(self, question: str = QUESTION) -> None:
        self.page.fill("#question textarea", question)
        self.page.click("#ask")

    def answer(self, side: int = 0) -> str:
        """The last answer of a model, as far as it is there."""
        said = self.page.locator(f".answer:nth-child({side + 1}) .text").evaluate_all(TEXT_OF)
        return str(said[-1]).strip() if said else ""

    def whole(self, side: int = 0) -> str:
        """The last answer, once no model answers any more."""
        self.page.wait_for_selector(".answer")
        self.page.wait_for_selector(".scroll:not([data-running])")
        return self.answer(side)

    def click_word(self, word: str) -> None:
        self.page.locator(".word", has_text=re.compile(f"^{word}$")).first.click()

    def notice(self, text: str) -> None:
        """Wait until the page says this."""
        until(lambda: text in self.page.locator("#notice").inner_text())

    def asked(self) -> list[str]:
        return [str(text) for text in self.page.locator(".question .said").all_inner_texts()]


# Without the growing sign, and the marks of what is not there.
TEXT_OF = """texts => texts.map(text => {
  const copy = text.cloneNode(true);
  copy.querySelectorAll(".growing, .tag").forEach(sign => sign.remove());
  return copy.textContent;
})"""


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("RELOOK_SHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.mark.parametrize(
    ("locale", "width", "height"), [("en-US", 1280, 720), ("zh-CN", 390, 844), ("zh-TW", 390, 844)]
)
def test_a_picture_a_question_a_word(
    chromium: Any, served: Served, shots: Path, strangers: set[str], world: Path, locale: str, width: int, height: int
) -> None:
    tab = Tab(chromium, served, shots, locale, width, height)
    page, text = tab.page, tab.text
    for key in ("title", "no_picture_yet", "upload", "examples", "settings", "question", "ask"):
        assert page.get_by_text(text[key], exact=True).first.is_visible(), key
    for absent in (".answer", "#stop", "#again", "#clear"):  # nothing empty, nothing that would do nothing
        assert page.locator(absent).count() == 0 or not page.locator(absent).is_visible()
    assert page.title() == "relook: tuned, tuned-base"
    tab.shoot("start")
    image = min((world / "test" / "val2014").iterdir())
    tab.show(image.read_bytes(), image.name)
    page.wait_for_selector("#panel img.picture")
    tab.ask()
    seen: list[str] = []
    until(lambda: bool(tab.answer()))
    while any(engine.running for engine in served.engines.values()):
        seen.append(tab.answer())
        if len(seen) == 3:
            tab.shoot("grows")
    assert len(set(seen)) > 3
    said = [tab.whole(side) for side in (0, 1)]
    assert said[0] == said[1] == load_model(shipped_base()).generate([image], QUESTION)
    assert all(said[0].startswith(piece) for piece in seen)
    assert page.get_by_text(text["click_word"].format(name="tuned")).is_visible()
    tab.click_word("picture")
    page.wait_for_selector("figure.map svg.picture")
    # It opens below its answer and above the other model's, on the screen, and the word is marked.
    map_, other = page.locator("figure.map").bounding_box(), page.locator(".answer").nth(1).bounding_box()
    assert map_ is not None
    assert other is not None
    until(lambda: -1 < page.locator("figure.map").bounding_box()["y"] < height - 100)  # type: ignore[index]
    assert width > 700 or map_["y"] + map_["height"] <= other["y"]
    assert page.locator(".word[aria-pressed=true]").all_inner_texts() == ["picture"]
    assert page.locator("figure.map .heat").count() == 1
    assert page.get_by_role("img", name=text["map"].format(name="tuned", word="picture")).is_visible()
    tab.shoot("map")
    assert page.locator(".answer").nth(1).locator("button").count() == 0  # the base looks at nothing
    tab.ask("Is there a dog in the image?")  # the second turn of the same conversation
    until(lambda: tab.whole(1) in ("Yes.", "No.") and tab.answer() in ("Yes.", "No."))
    assert tab.asked() == [QUESTION, "Is there a dog in the image?"]
    question, chat = page.locator("#question").bounding_box(), page.locator("#chat").bounding_box()
    assert question is not None
    assert chat is not None
    assert question["y"] >= chat["y"] + chat["height"]
    page.click("#clear")
    until(lambda: page.locator(".answer").count() == 0)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    words = page.locator("body").inner_text()
    if locale != "en-US":
        names = ("relook", "tuned-base", "tuned", *re.findall("[a-z]+", text["examples"]), EXAMPLE_QUESTION)
        for name in names:
            words = words.replace(name, "")
        assert not re.findall(r"[A-Za-z]{3,}", words), "not translated"
    assert tab.elsewhere == set()
    assert strangers == set()
    tab.context.close()


@pytest.mark.parametrize(("locale", "width", "height"), [("en-US", 1280, 720), ("zh-CN", 390, 844)])
def test_a_picture_joins_the_next_question(
    chromium: Any, served: Served, shots: Path, locale: str, width: int, height: int
) -> None:
    tab = Tab(chromium, served, shots, locale, width, height)
    page = tab.page
    tab.show(noise(0, (60, 40)))
    page.wait_for_selector("#panel img.picture")
    assert page.locator("#panel .add").count() == 0
    tab.ask()
    first = tab.whole()
    tab.show(noise(1, (40, 60)), add=True)
    page.wait_for_selector("#panel .thumb")
    assert tab.answer() == first  # the conversation goes on
    assert page.get_by_text(tab.text["add"]).is_visible()
    tab.shoot("added")
    tab.ask("Is there a dog in the image?")
    page.wait_for_selector("#chat .thumb")
    until(lambda: len(tab.asked()) == 2)
    assert tab.whole()
    assert page.locator("#panel .thumb").count() == 0
    assert page.locator("#panel img.picture").is_visible()
    assert page.locator(".exchange").nth(1).locator("button.word").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    tab.shoot("joined")
    page.reload()
    page.wait_for_selector("#chat .thumb")
    assert tab.asked()[0] == QUESTION
    tab.context.close()


def test_an_example_is_asked_about_at_once(chromium: Any, served: Served, shots: Path) -> None:
    """Of the drawn ones the truth is known. The base claims objects that usually belong to a setting."""
    tab = Tab(chromium, served, shots)
    for i in range(6):
        tab.page.locator(".example").nth(i).click()
        until(lambda: tab.asked() == [EXAMPLE_QUESTION] and tab.page.locator("#panel .facts").count() == 1)
        names = re.search(r"picture: (.*?)\.", tab.page.locator("#panel .facts").inner_text())
        assert names is not None
        answer, there = tab.whole(), names[1].split(", ")
        assert str(tab.page.locator(".example").nth(i).get_attribute("aria-label")).endswith(": " + names[1])
        claimed = {name for name in OBJECTS if re.search(rf"\b{name}\b", answer)}
        marks = tab.page.locator(".answer").first.locator(".absent")
        assert set(marks.all_inner_texts()) == claimed - set(there), answer
        if marks.count():
            assert tab.page.locator(".answer").first.locator(".tag").count() == marks.count()
            tab.shoot("marked")
            break
    else:
        pytest.fail("the base claimed nothing that is not there")
    tab.context.close()


def test_what_is_typed_stays_and_a_second_question_waits(chromium: Any, served: Served, shots: Path) -> None:
    tab = Tab(chromium, served, shots)
    page = tab.page
    tab.ask()
    page.wait_for_selector(".growing")  # before the first word
    assert tab.asked() == [QUESTION]
    until(lambda: page.locator("#stop").is_visible() and page.locator("#ask").is_disabled())
    until(lambda: page.input_value("#question textarea") == "")
    page.fill("#question textarea", "Is there")
    page.type("#question textarea", " a cat?")
    page.press("#question textarea", "Enter")  # does nothing yet, and loses nothing
    tab.whole()
    assert page.input_value("#question textarea").strip() == "Is there a cat?"
    assert tab.asked() == [QUESTION]
    until(lambda: page.locator("#ask").is_enabled() and not page.locator("#stop").is_visible())
    tab.context.close()


def test_an_empty_seed_stays_empty_and_another_answer_differs(chromium: Any, served: Served, shots: Path) -> None:
    tab = Tab(chromium, served, shots)
    page = tab.page
    page.get_by_text(ENGLISH["settings"], exact=True).click()
    page.wait_for_selector("#seed input, #seed textarea")
    assert page.input_value("#seed input, #seed textarea") == ""
    tab.ask()
    answers = {tab.whole()}
    for count in range(2, 6):
        page.click("#again")
        until(lambda count=count: page.locator(".exchange").count() == count)  # type: ignore[misc]
        answers.add(tab.whole())
    assert len(answers) > 2  # sampled anew each time
    assert page.get_by_text(ENGLISH["once_more"].format(temperature="1")).count() == 4
    page.fill("#seed input, #seed textarea", "x")
    tab.ask("Is there a dog?")
    tab.notice(ENGLISH["range_seed"])
    tab.context.close()


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_mistakes_are_told(chromium: Any, served: Served, shots: Path, locale: str) -> None:
    tab = Tab(chromium, served, shots, locale)
    page, text = tab.page, tab.text
    bad = text["bad_picture"].format(megabytes=0.1, megapixels=40)
    tab.ask(" ")
    tab.notice(text["no_question"])
    assert page.locator(".answer").count() == 0  # nothing is covered or added
    for data in (b"this is a text", noise(0, (400, 400))):
        tab.show(data)
        tab.notice(bad)
        assert page.locator("#panel img.picture").count() == 0  # it is not selected
        tab.ask()  # what was refused is not asked about, and the page says so
        until(lambda: text["without_picture"] in page.locator(".question").first.inner_text())
        tab.whole()
        assert bad not in page.locator("#notice").inner_text()
        page.click("#clear")
        until(lambda: page.locator(".answer").count() == 0)
    tab.ask("<image>")
    tab.notice("<image>")
    assert page.input_value("#question textarea") == "<image>"  # to be corrected
    assert page.locator(".answer").count() == 0
    assert "Traceback" not in page.content()
    tab.context.close()


def test_an_end_before_the_end_is_told(chromium: Any, served: Served, shots: Path) -> None:
    tab = Tab(chromium, served, shots)
    # First of all, because Gradio sets the values once more some moments after it has shown them.
    tab.page.get_by_text(ENGLISH["settings"], exact=True).click()
    tab.ask()
    until(lambda: bool(tab.answer()))
    tab.page.click("#stop")
    until(lambda: tab.page.get_by_text(ENGLISH["cancelled"]).count() == 2)
    tab.page.get_by_label(ENGLISH["max_tokens"]).first.fill("2")
    tab.ask()
    until(lambda: tab.page.get_by_text(ENGLISH["length"]).count() == 2)
    tab.context.close()


def test_what_is_said_is_no_html(chromium: Any, served: Served, shots: Path) -> None:
    tab = Tab(chromium, served, shots)
    text = "Is <img src=x> & <b>this</b> $$x$$ ${alert(1)} `{{x}}` a &lt;cup&gt;?"
    tab.page.on("dialog", lambda dialog: pytest.fail("it ran"))
    tab.ask(text)
    tab.whole()
    assert tab.asked() == [text]
    tab.context.close()


def test_a_reload_and_back_keep_everything(chromium: Any, served: Served, shots: Path) -> None:
    tab = Tab(chromium, served, shots)
    page = tab.page
    page.locator(".example").first.click()
    answer = tab.whole()
    page.reload()
    until(lambda: tab.answer() == answer)
    until(page.locator("#panel img.picture").is_visible)
    page.goto("about:blank")
    page.go_back()
    until(lambda: tab.answer() == answer)
    tab.ask("Is there a dog in the image?")
    until(lambda: len(tab.asked()) == 2)
    tab.whole()
    page.reload()  # also while an answer grows
    tab.page.wait_for_selector(".answer")
    page.click("#clear")
    until(lambda: not tab.asked())
    page.reload()
    page.wait_for_selector("#panel .example")
    assert tab.asked() == []
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
        until(lambda: tab.page.locator("#stop").is_visible())
        leave()
        until(lambda: all(engine.running == 0 for engine in served.engines.values()))
        until(lambda: tab.page.is_closed() or tab.page.locator("#ask").is_enabled())


def test_a_base_alone_says_nothing_about_looking(chromium: Any, shots: Path, tmp_path: Path) -> None:
    """And a server that stops says so in words."""
    engines = {"base": Engine(load_model(shipped_base()), EngineLimits(slots=1))}
    slow(engines["base"])
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    with serving(engines, ServerLimits(KEY), uploads, stop_seconds=0) as server:
        tab = Tab(chromium, server, shots)
        assert ENGLISH["looks"] not in tab.page.locator("#head").inner_text()
        tab.page.locator(".example").first.click()
        tab.whole()
        assert tab.page.locator(".word").count() == 0
        assert tab.page.locator(".hint").count() == 0
    tab.ask()
    tab.notice(ENGLISH["offline"])
    assert tab.page.locator("[data-testid=toast-body]:visible").count() == 0
    tab.context.close()


@pytest.mark.parametrize(("locale", "width"), [("en-US", 1280), ("zh-TW", 390)])
def test_the_page_is_accessible(chromium: Any, served: Served, shots: Path, locale: str, width: int) -> None:
    """By axe-core (`npm pack axe-core`), whose script RELOOK_AXE names."""
    script = os.environ.get("RELOOK_AXE")
    if not script:
        pytest.skip("no axe-core; set RELOOK_AXE to its axe.min.js")
    for scheme in ("light", "dark"):
        tab = Tab(chromium, served, shots, locale, width, color_scheme=scheme, bypass_csp=True)
        tab.page.get_by_text(tab.text["settings"], exact=True).click()
        assert _violations(tab, script) == []
        for example in tab.page.locator(".example").all():
            example.click()
            tab.page.get_by_text(EXAMPLE_QUESTION, exact=True).wait_for()
            tab.whole()
            if tab.page.locator(".absent").count():
                break
        tab.click_word("picture")
        tab.page.wait_for_selector("figure.map")
        tab.ask(" ")
        tab.notice(tab.text["no_question"])
        assert _violations(tab, script) == []
        tab.context.close()


def _violations(tab: Tab, script: str) -> list[tuple[str, str, str]]:
    tab.page.add_script_tag(path=script)
    found = tab.page.evaluate("axe.run()")["violations"]
    return [(fault["impact"], fault["id"], fault["nodes"][0]["html"]) for fault in found]


def test_without_the_key_there_is_no_page(chromium: Any, served: Served) -> None:
    """The browser is asked for a password, and a headless one has none."""
    with pytest.raises(Exception, match="ERR_INVALID_AUTH_CREDENTIALS"):
        chromium.new_context().new_page().goto(f"http://127.0.0.1:{served.port}/")
