"""What the page does, without a browser: its actions, and what its routes let through."""

from __future__ import annotations

import asyncio
import base64
import html
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.serving import KEY, NEW, PICTURES, Served, assert_refused, noise, serving, until
from helpers.tiny import tiny_llava, tiny_relook
from test_answering import TEXTS, as_loaded

from relook.data.images import image_from_bytes
from relook.data.samples import Turn
from relook.data.templates import with_image
from relook.generate.engine import Engine
from relook.generate.request import EngineLimits
from relook.report.attention_maps import attention_before, has_attention_maps
from relook.report.pages import heat
from relook.serve.api import ServerLimits
from relook.serve.media import ImageSources
from relook.serve.page import actions
from relook.serve.page.actions import Page, Sampling
from relook.serve.page.dialogue import Answer, Dialogue, Exchange
from relook.serve.page.texts import ENGLISH, explain_error, language_of
from relook.serve.page.texts import TEXTS as TEXT_TABLES
from relook.serve.page.view import Place, View
from relook.serve.protocol import APIError
from relook.toyworld.world import sample_scenes

POLICY = ServerLimits(KEY, ImageSources(max_bytes=200_000), max_body=1_100_000, body_seconds=1)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Of a model with a post decoder and one without."""
    models = {"tuned": as_loaded(tiny_relook()), "base": as_loaded(tiny_llava())}
    engines = {name: Engine(loaded, EngineLimits(slots=2)) for name, loaded in models.items()}
    page = Page(engines, POLICY, tmp_path_factory.mktemp("uploads"))
    (page.folder / "picture.png").write_bytes(PICTURES[0])
    yield page
    for engine in engines.values():
        engine.stop()


@pytest.fixture
def place(page: Page) -> str:
    return str(page.folder / "picture.png")


def talk(page: Page, place: str, *turns: Sequence[Turn]) -> Dialogue:
    """A conversation, with the turns of each model."""
    conversation = Dialogue(models=tuple(page.engines), picture=place)
    for sides in zip(*turns, strict=True):
        answers = [Answer(text=turn.response, finish="stop") for turn in sides]
        conversation = conversation.asked(sides[0].prompt).answered(answers)
    return conversation


def ask(page: Page, place: str | Dialogue, question: str, **how: Any) -> list[tuple[str, ...]]:
    """All that is shown, one after the other."""
    conversation = talk(page, place) if isinstance(place, str) else place

    async def shown() -> list[tuple[Answer, ...]]:
        sampling = Sampling(**{"temperature": 0, "max_tokens": NEW, **how})
        return [answers async for answers in page.ask(conversation, question, sampling)]

    return [tuple(answer.text for answer in answers) for answers in asyncio.run(shown())]


def refused(page: Page, place: str, question: str = "What is this?", **how: Any) -> APIError:
    with pytest.raises(APIError) as found:
        ask(page, place, question, **how)
    return found.value


def test_both_models_answer_as_they_would_alone(page: Page, place: str) -> None:
    shown = ask(page, place, TEXTS[3])
    for i, engine in enumerate(page.engines.values()):
        picture = image_from_bytes(PICTURES[0], 10**6, lambda *_: None)
        expected = engine.loaded.generate([picture], TEXTS[3], max_new_tokens=NEW)
        assert shown[-1][i] == expected
        assert all(expected.startswith(texts[i]) for texts in shown)
    assert len(shown) > 2


def test_why_an_answer_ended_is_told(page: Page, place: str) -> None:
    async def last() -> tuple[Answer, ...]:
        shown = [answers async for answers in page.ask(talk(page, place), TEXTS[3], Sampling(0, max_tokens=2))]
        assert not all(answer.finish for answer in shown[0])  # the other model has said nothing yet
        return shown[-1]

    assert [answer.finish for answer in asyncio.run(last())] == ["length", "length"]


def test_each_model_goes_on_in_its_own_conversation(page: Page, place: str) -> None:
    histories = [[Turn(TEXTS[0], text)] for text in ask(page, place, TEXTS[0])[-1]]
    [*_, last] = ask(page, talk(page, place, *histories), TEXTS[1])
    for (turn,), engine, text in zip(histories, page.engines.values(), last, strict=True):
        turns = [Turn(with_image(turn.prompt), turn.response), Turn(TEXTS[1], "")]
        image = engine.image(PICTURES[0])
        request = asked(engine, turns, image)
        assert "".join(event.text for event in engine.stream(request)) == text


def asked(engine: Engine, turns: Sequence[Turn], *images: Any) -> Any:
    from relook.generate.request import Request

    return Request(engine.prompt(turns, images), images, NEW)


def test_a_seed_draws_the_same_again(page: Page, place: str) -> None:
    how = {"temperature": 1.5, "top_p": 0.95, "seed": 3}
    assert ask(page, place, TEXTS[3], **how)[-1] == ask(page, place, TEXTS[3], **how)[-1]
    assert ask(page, "", TEXTS[3], temperature=1.5)  # no seed, no picture


def test_leaving_early_frees_the_slots(page: Page, place: str) -> None:
    async def first() -> None:
        answers = page.ask(talk(page, place), TEXTS[3], Sampling(0, max_tokens=400))
        async for _ in answers:
            break
        await answers.aclose()  # type: ignore[attr-defined]

    asyncio.run(first())
    until(lambda: not any(engine.running for engine in page.engines.values()))


def test_what_cannot_be_asked(page: Page, place: str, tmp_path: Path) -> None:
    """The checks are the API's, and no file but an upload is read."""
    (tmp_path / "secret.png").write_bytes(PICTURES[0])
    (page.folder / "link.png").symlink_to(tmp_path / "secret.png")
    (page.folder / "text.png").write_bytes(b"no picture")
    (page.folder / "large.png").write_bytes(noise(0, (500, 500)))
    (page.folder / "page.svg").write_bytes(b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    assert refused(page, place, " \n").code == "no_question"
    for name, code, what in (
        ("text.png", "invalid_message", "PNG, JPEG"),
        ("page.svg", "invalid_message", "PNG, JPEG"),
        ("large.png", "bad_picture", "200,000 bytes"),
        ("gone.png", "no_picture", ""),
        ("link.png", "no_picture", "no such file"),
        (str(tmp_path / "secret.png"), "no_picture", "no such file"),
        (f"../{tmp_path.name}/secret.png", "", "no such file"),
        ("a\0b", "", "no such file"),
        ("http://127.0.0.1/a.png", "", "no such file"),
    ):
        error = refused(page, str(page.folder / name) if "://" not in name else name)
        assert code in (error.code, ""), name
        assert what in error.message, name
        with pytest.raises(APIError):
            page.look("tuned", str(page.folder / name), [Turn("What?", "A cup.")], 0)
    assert refused(page, "relative.png").code == "no_picture"
    for setting, wrong in (("temperature", 3), ("top_p", "a"), ("max_tokens", 0), ("seed", "x")):
        error = refused(page, place, **{setting: wrong})
        assert (error.code, error.param) == ("bad_setting", setting)
        assert explain_error("en", error).startswith(f"“{ENGLISH[setting]}” must be a")
    assert "<image>" in refused(page, place, "<image>").message
    assert refused(page, place, "a b " * 3000).code == "context_length_exceeded"


def test_words_join_to_the_answer_and_what_is_not_there_is_marked(page: Page) -> None:
    text = "There is a mug, two dogs and a well-known cup. 图里有猫!"
    pieces = page.pieces(text, frozenset({"cup"}))
    assert "".join(piece.text for piece in pieces) == text
    assert [text[piece.start :][: len(piece.text)] for piece in pieces] == [piece.text for piece in pieces]
    assert [piece.text for piece in pieces if piece.absent] == ["dogs"]
    words = [piece.text for piece in pieces if piece.word]
    assert words[-6:] == ["well-known", "cup", "图", "里", "有", "猫"]
    assert not any(piece.absent for piece in page.pieces(text))
    assert page.pieces("") == []


def test_examples_are_known(page: Page, place: str) -> None:
    paths = page.draw_examples()
    for path, scene in zip(paths, sample_scenes(0, "test", len(paths)), strict=True):
        assert page.known_objects(str(path)) == set(scene.names)
    assert page.known_objects(place) is None
    assert page.known_objects("") is None


def test_a_click_shows_where_the_post_decoder_looked(page: Page, place: str) -> None:
    turns = [Turn(TEXTS[0], "No."), Turn(TEXTS[3], "There is a <cup>.")]
    pieces = page.pieces(turns[-1].response)
    index = next(i for i, piece in enumerate(pieces) if piece.text == "cup")
    attention = page.look("tuned", place, turns, index)
    assert attention is not None
    loaded = page.engines["tuned"].loaded
    image = image_from_bytes(PICTURES[0], 10**6, lambda *_: None)
    marked = [Turn(with_image(TEXTS[0]), "No."), turns[1]]
    [grid] = attention_before(loaded, image, marked, [pieces[index].start])
    assert attention.grid == grid
    assert attention.word == "cup"
    assert page.look("tuned", place, turns, index + 1) is None  # between words
    assert page.look("tuned", place, turns, 99) is None
    assert [has_attention_maps(page.engines[name].loaded) for name in ("tuned", "base")] == [True, False]
    assert page.look("base", place, turns, index) is None
    assert page.look("tuned", "", turns, index) is None


def test_what_the_browser_kept_is_read_again_or_forgotten() -> None:
    names = ["tuned", "base"]
    answers = [Answer(text="\n<img src=x> $$x$$ ${1}\n", finish="stop"), Answer(text="No")]
    kept = Dialogue(models=tuple(names), picture="a.png").asked(" a <b>bold</b> & &lt;\n ").answered(answers)
    assert Dialogue.parse(kept.model_dump_json(), names) == kept
    assert kept.running
    assert [answer.finish for answer in kept.ended("cancelled").exchanges[0].answers] == ["stop", "cancelled"]
    empty = Dialogue(models=tuple(names))
    short = Dialogue(models=("tuned", "base"), exchanges=(Exchange(question="a", answers=()),))
    for state in ("", None, "{", "[]", 3, {}, kept.model_dump_json()[:-3], short.model_dump_json()):
        assert Dialogue.parse(state, names) == empty
    assert Dialogue.parse(kept.model_dump_json(), ["other", "base"]).exchanges == ()


def test_another_answer_takes_the_place_of_the_one_before() -> None:
    def said(text: str) -> list[Answer]:
        return [Answer(text=text, finish="stop")]

    first = Dialogue(models=("tuned",)).asked("a").answered(said("1")).asked("b").answered(said("2"))
    both = first.asked("b", 1.0).answered(said("3")).asked("b", 0.5).answered(said("4"))
    assert both.turns(0) == [Turn("a", "1"), Turn("b", "4")]
    assert both.turns(0, last=2) == [Turn("a", "1"), Turn("b", "3")]  # as it was when that word was written
    assert both.before_last_question().turns(0) == [Turn("a", "1")]


def test_a_picture_that_is_added_stands_in_its_own_question(page: Page, place: str) -> None:
    second = page.folder / "second.png"
    second.write_bytes(PICTURES[1])
    before = talk(page, place, [Turn(TEXTS[0], "No.")], [Turn(TEXTS[0], "Yes.")])
    waiting = before.model_copy(update={"added": (str(second),)})
    answers = ask(page, waiting, TEXTS[3])[-1]
    for said, engine, word in zip(answers, page.engines.values(), ("No.", "Yes."), strict=True):
        turns = [Turn(with_image(TEXTS[0]), word), Turn(with_image(TEXTS[3]), "")]
        request = asked(engine, turns, *(engine.image(data) for data in PICTURES[:2]))
        assert "".join(event.text for event in engine.stream(request)) == said
    assert answers != ask(page, before, TEXTS[3])[-1]
    # Asked once more it is shown again; a third picture waits for the next question.
    conversation = waiting.asked(TEXTS[3]).answered([Answer(text=text, finish="stop") for text in answers])
    assert conversation.pictures() == [(place,), (str(second),), ()]
    again = conversation.model_copy(update={"added": (place,)}).asked(TEXTS[3], 1.0)
    assert (again.added, again.before_last_question().added) == ((place,), (str(second),))
    view = View(page, [], [], "en")
    ended = conversation.ended("stop")
    assert 'class="word' in view.chat(before)
    assert re.findall(r'data-place="1', view.chat(ended)) == []  # no map of several pictures
    assert view.chat(ended).count('class="thumb"') == 1
    assert view.panel(again).count('class="thumb"') == 1
    assert 'class="add"' not in view.panel(talk(page, place))
    with pytest.raises(APIError, match="more than 16"):
        ask(page, before.model_copy(update={"added": (place,) * 16}), TEXTS[3])


def test_what_is_shown_is_no_html_and_no_code(page: Page, place: str) -> None:
    text = "<img src=x> & ${alert(1)} `{{x}}` a <cup>"
    conversation = talk(page, place, [Turn(text, text)], [Turn(text, "")])
    shown = View(page, [], [], "en").chat(conversation)
    assert "<img" not in shown
    assert "${alert(1)} `{{x}}`" in html.unescape(re.sub(r"<[^>]*>", "", shown))
    assert ENGLISH["empty"] in shown


def test_words_of_models_that_look_can_be_clicked(page: Page, place: str) -> None:
    view = View(page, [], [], "en")
    said = [[Turn("What?", "A cup.")]] * 2
    shown = view.chat(talk(page, place, *said))
    assert re.findall(r'data-place="([0-9-]+)"', shown) == ["0-0-0", "0-0-2"]  # the tuned model's, without the space
    assert ENGLISH["click_word"].format(name="tuned") in html.unescape(shown)
    assert "<button" not in view.chat(talk(page, "", *said))  # without a picture
    growing = talk(page, place, *said).asked("And?")
    assert "<button" not in view.chat(growing)
    assert "…" in view.chat(growing)
    attention = page.look("tuned", place, said[0], 2)
    shown = view.chat(talk(page, place, *said), Place(0, 0, 2), attention)
    assert re.findall(r'data-place="([0-9-]+)" aria-pressed="true"', shown) == ["0-0-2"]
    assert 'role=img aria-label="Map of tuned&#39;s attention before “cup”"' in shown
    assert attention is not None
    assert f'class=heat width="1" height="1" preserveAspectRatio="none" href="{heat(attention.grid)}"' in shown


def test_a_run_shows_its_own_pictures(page: Page, tmp_path: Path) -> None:
    data = tmp_path / "data" / "b"
    data.mkdir(parents=True)
    for i in range(8):
        (data / f"{i}.PNG").write_bytes(PICTURES[0] if i != 2 else b"no picture")
    (tmp_path / "recipe.yaml").write_text(f"image_folder: {tmp_path / 'data'}")
    pictures = page.run_pictures(tmp_path)
    assert len(pictures) == 5
    assert all(path.parent == page.folder and path.read_bytes() == PICTURES[0] for path in pictures)
    for recipe in ("image_folder: /nowhere", "- no mapping", "image_folder: [3]"):
        (tmp_path / "recipe.yaml").write_text(recipe)
        assert page.run_pictures(tmp_path) == []
    assert page.run_pictures(tmp_path / "nothing") == page.run_pictures(None) == []


def test_all_languages_say_everything() -> None:
    for language, texts in TEXT_TABLES.items():
        assert set(texts) == set(ENGLISH)
        for key, text in ENGLISH.items():
            assert sorted(re.findall(r"{.*?}", texts[key])) == sorted(re.findall(r"{.*?}", text)), (language, key)
    for accepted, language in {
        "zh-CN,zh;q=0.9": "zh",
        "ZH": "zh",
        "en-US,zh": "en",
        "": "en",
        "zh-TW,zh;q=0.9": "zh-TW",
        "zh-Hant-HK": "zh-TW",
    }.items():
        assert language_of(accepted) == language
    assert TEXT_TABLES["zh-TW"]["no_picture"] == "圖片已不在伺服器上，請重新選擇。"
    for code in ("busy", "timeout", "failed", "context_length_exceeded", "invalid_message", "no_question", "x", None):
        for language in ("zh", "zh-TW"):
            text = explain_error(language, APIError(429, "Too many.", code)).replace("<image>", "")
            assert not re.search("[A-Za-z]", text)
    assert explain_error("en", APIError(400, "A text may not hold <image>.", "invalid_message")).startswith("A text")


# --- the page's routes, beside the API's


@pytest.fixture(scope="module")
def paged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    engines = {"tuned": Engine(as_loaded(tiny_relook()), EngineLimits(slots=2))}
    policy = replace(POLICY, hosts=frozenset({"127.0.0.1", "10.0.0.5"}))
    with serving(engines, policy, tmp_path_factory.mktemp("uploads")) as served:
        yield served


def password(key: str = KEY) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"anyone:{key}".encode()).decode()}


def upload(served: Served, data: bytes, name: str = "a.png", **headers: str) -> tuple[int, bytes]:
    body = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    return served.send(
        "POST", "/gradio_api/upload", body + data + b"\r\n--x--\r\n", **kind, **{**password(), **headers}
    )


def test_every_route_of_the_page_needs_the_key(paged: Served) -> None:
    for path in ("/", "/config", "/gradio_api/info", "/gradio_api/queue/data?session_hash=a", "/favicon.ico"):
        for headers in ({"Authorization": ""}, password("wrong"), {"Authorization": "Basic !"}):
            assert_refused(paged.send("GET", path, **headers), 401)
    for path in ("/gradio_api/upload", "/gradio_api/queue/join"):
        assert_refused(paged.send("POST", path, b"{}", **password("wrong")), 401)
    assert paged.send("GET", "/", **password())[0] == 200
    assert paged.send("GET", "/health", Authorization="")[0] == 200
    assert_refused(paged.send("GET", "/v1/models", **password()), 401)  # the API's key is a bearer token
    assert paged.send("GET", "/v1/models")[0] == 200


def test_the_apis_routes_are_as_without_the_page(paged: Served) -> None:
    assert_refused(paged.send("GET", "/v1/nothing"), 404)
    assert_refused(paged.send("DELETE", "/v1/models"), 405)
    assert paged.send("GET", "/metrics")[0] == 200


def test_the_page_loads_nothing_from_elsewhere(paged: Served) -> None:
    status, headers, page = paged.send_for_all("GET", "/", **password())
    assert status == 200
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert b"googleapis" not in page
    assert json.loads(paged.send("GET", "/config", **password())[1])["analytics_enabled"] is False


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd", "/gradio_api/file=http://127.0.0.1/", "/gradio_api/proxy=http://127.0.0.1/",
        "/gradio_api/file=http:/127.0.0.1/", "/gradio_api/file=a%00", "/gradio_api/file=",
        "/gradio_api/run/ask", "/gradio_api/heartbeat/a", "/gradio_api/vibe-code", "/monitoring", "/login", "/runs",
        "/gradio_api/mcp", "/static/../../../../etc/passwd", "/static/%2e%2e/%2e%2e/routes.py", "/assets/..%2fa.py",
    ],
)  # fmt: skip
def test_routes_that_the_page_does_not_need(paged: Served, path: str) -> None:
    assert paged.send("GET", path, **password())[0] == 404
    assert paged.send("POST", path, b"{}", **password())[0] == 404


def test_uploads_are_limited(paged: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    status, paths = upload(paged, PICTURES[0])
    assert status == 200
    assert Path(json.loads(paths)[0]).read_bytes() == PICTURES[0]
    assert upload(paged, b"a" * 300_000)[0] == 413  # of one image file
    assert_refused(upload(paged, b"a" * 1_200_000), 413, "1,100,000 bytes")  # of a request
    _, paths = upload(paged, PICTURES[0], name="../../../escape.png")
    [path] = json.loads(paths)
    assert paged.uploads is not None
    assert (Path(path).parent.parent, Path(path).name) == (paged.uploads, "escape.png")
    assert upload(paged, PICTURES[0], name="..")[0] == 400
    monkeypatch.setattr(actions, "MOST_FILES", 3)
    assert_refused(upload(paged, PICTURES[0]), 429, "Too many pictures")


@pytest.mark.parametrize(
    ("headers", "ours"),
    [
        ({}, True),  # no browser
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://public.example"}, True),  # a proxy that keeps no Host
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://10.0.0.5:8000"}, False),
        ({"Sec-Fetch-Site": "same-site"}, False),
        # Over http browsers say no more than this.
        ({"Origin": "http://10.0.0.5:8000"}, True),
        ({"Origin": "http://10.0.0.5:8001"}, False),
        ({"Origin": "http://other.example"}, False),
        ({"Origin": "null"}, False),
    ],
)
def test_other_sites_can_neither_ask_nor_read(paged: Served, headers: dict[str, str], ours: bool) -> None:
    headers = {"Host": "10.0.0.5:8000", **headers}
    status = upload(paged, PICTURES[0], **headers)[0]
    assert status == (200 if ours else 403)
    status, answered, _ = paged.send_for_all("GET", "/config", **password(), **headers)
    assert status == (403 if "Origin" in headers and not ours else 200)
    assert ours or "Access-Control-Allow-Origin" not in answered


def test_the_page_is_for_the_servers_own_names(paged: Served) -> None:
    """As the API is: another site's name may lead to this machine."""
    evil = {"Host": "evil.example:8000", "Origin": "http://evil.example:8000", **password()}
    for path in ("/", "/config", "/theme.css", "/assets/x.js", "/gradio_api/info", "/gradio_api/queue/data"):
        for method in ("GET", "HEAD", "OPTIONS"):
            assert paged.send(method, path, **evil)[0] == 403, path
    assert_refused(upload(paged, PICTURES[0], **evil), 403, "--allow-host")
    assert_refused(paged.send("POST", "/gradio_api/queue/join", b"{}", **evil), 403, "--allow-host")


def test_nginx_does_not_hold_the_pages_answers_back(paged: Served) -> None:
    assert paged.send_for_all("GET", "/config", **password())[1]["X-Accel-Buffering"] == "no"


def test_no_upload_stays(tmp_path: Path) -> None:
    """Whatever Gradio leaves of it; but what lay there at the start does."""
    (tmp_path / "own.png").write_bytes(b"own")
    lying = actions.Uploads(tmp_path)
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        for file in (tmp_path / name / "a.png", tmp_path / f"{name}.tmp"):
            file.write_bytes(b"picture")
    (tmp_path / "empty").mkdir()
    long_ago = time.time() - 2 * actions.KEPT_SECONDS
    for path in ("own.png", "old/a.png", "old.tmp", "old", "empty"):
        os.utime(tmp_path / path, (long_ago, long_ago))
    assert lying.sweep() == (3, len(b"ownpicturepicture"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "new.tmp", "old", "own.png"]
    os.utime(tmp_path / "old", (long_ago, long_ago))  # removing its file has changed it
    lying.sweep()
    assert not (tmp_path / "old").exists()


def test_files_that_a_request_may_name(paged: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else Gradio would copy them among the uploads, or fetch them."""
    import gradio.processing_utils

    from relook.serve.page.app import MOST_ASKED

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was looked at")

    monkeypatch.setattr(gradio.processing_utils, "async_move_files_to_cache", never)
    file = {"meta": {"_type": "gradio.FileData"}}
    for path in ("/etc/passwd", "http://127.0.0.1/a.png", "data:,", 3, ["/etc"], "a\0", "../secret"):
        body = {"data": [{"deep": [{"path": path, **file}]}], "fn_index": 0, "session_hash": "a"}
        answer = paged.send("POST", "/gradio_api/queue/join", json.dumps(body).encode(), **password())
        assert_refused(answer, 400, "uploaded pictures only")
    for body in (b"", b"\xff", b"[" * 100_000):
        assert_refused(paged.send("POST", "/gradio_api/queue/join", body, **password()), 400)
    long = json.dumps({"data": ["a" * MOST_ASKED], "fn_index": 0, "session_hash": "a"}).encode()
    assert_refused(paged.send("POST", "/gradio_api/queue/join", long, **password()), 413)


def test_without_gradio_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from relook.errors import RelookError
    from relook.serve import page as pages

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not pages.installed()
    with pytest.raises(RelookError, match=r"pip install 'relook\[page\]'"):
        pages.check_gradio_installed()
