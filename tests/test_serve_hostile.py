"""What strangers send: no 5xx, nothing about the server in an error, bounded memory, and it answers afterwards."""

from __future__ import annotations

import base64
import contextlib
import gzip
import http.server
import ipaddress
import json
import os
import socket
import struct
import textwrap
import threading
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.serving import (
    KEY,
    PICTURES,
    Served,
    assert_refused,
    assert_well,
    data_url,
    image_part,
    png,
    serving,
    until,
    user,
)
from helpers.serving import with_picture as asking_about
from helpers.strategies import ANY_TEXT
from helpers.tiny import tiny_relook
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from starlette.exceptions import HTTPException
from test_answering import as_loaded

from relook.errors import DataError, RelookError
from relook.generate.engine import DECODERS, Engine
from relook.generate.request import EngineLimits, ProcessedImage
from relook.serve import api
from relook.serve import media as media_module
from relook.serve.api import ServerLimits
from relook.serve.media import ImageSources, is_public
from relook.serve.server import check_host_names, own_hosts
from relook.serve.threads import parse_body

ROUTE = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def still_well(served: Served) -> Iterator[None]:
    """The server answers after every one of these tests, with all its slots free."""
    yield
    assert_well(served)
    until(lambda: all(engine.running == engine.waiting == 0 for engine in served.engines.values()))


def text(content: Any) -> dict[str, Any]:
    return {"type": "text", "text": content}


def look_at(served: Served, url: str) -> tuple[int, dict[str, Any]]:
    return served.chat([image_part(url), {"type": "text", "text": "What is this?"}])


# --- keys and bodies


@pytest.mark.parametrize("key", ["", "wrong", KEY + "x", "ä" * 50])
def test_a_wrong_key(served: Served, key: str) -> None:
    for method, path in (("POST", ROUTE), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/docs"), ("GET", "/x")):
        assert_refused(served.send(method, path, b"{}", key=key.encode().decode("latin-1")), 401, "key")


def test_two_gigabytes_are_refused_before_they_are_read(served: Served) -> None:
    """By what the head says; and where it says nothing, once a megabyte is there."""
    before = psutil.Process().memory_info().rss
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as client:
        client.sendall(f"{head}Content-Length: {2 << 30}\r\n\r\n".encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 413 ")
    chunk = b"10000\r\n" + b"a" * 65536 + b"\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as client:
        client.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        sent = 0
        try:
            while sent < 2 << 30:
                client.sendall(chunk)
                sent += len(chunk)
        except OSError:
            pass
    assert sent < 256 << 20
    assert psutil.Process().memory_info().rss - before < 64 << 20


def test_a_client_that_goes_on_sending_still_reads_why_it_was_refused(served: Served) -> None:
    assert_refused(served.send("POST", ROUTE, b"a" * 3_000_000), 413, "1,000,000 bytes")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xff\xfe\x00",
        b'{"model": "\xff"}',
        b'{"model": "tuned", "messages": [{"role": "user", "content": "\xc3\x28"}]}',
        b'{"model": "tuned", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "tuned", "\\ud800": 1, "messages": []}',
        b'{"model": "tuned", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b'{"model": "tuned", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1e999}',
        b"[" * 400_000,
        b'{"a":' * 150_000,
        b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b"null",
        b"[1]",
    ],
    ids=lambda body: body[:40].decode("latin-1"),
)
def test_bodies_that_are_no_request(served: Served, body: bytes) -> None:
    assert_refused(served.send("POST", ROUTE, body), 400)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b'{"model": ', "The body is not JSON: Expecting value."),
        (b'{"model": "tuned", "temperature": NaN}', "The body is not JSON: NaN is no value."),
        (b"[1]", "The body is no JSON object"),
    ],
)
def test_bodies_that_are_no_json_object_are_told_so(served: Served, body: bytes, problem: str) -> None:
    assert_refused(served.send("POST", ROUTE, body), 400, problem)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "must not be the assistant's"),
        ({"messages": [user("a"), {"role": "assistant", "content": "b"}]}, "last message"),
        ({"messages": [{"role": "tool", "tool_call_id": "1", "content": "a"}]}, "messages.0.role: "),
        ({"messages": [user("<image>")]}, "messages.0.content: A text may not hold <image>"),
        ({"messages": [user([text("a"), text("<image>")])]}, "messages.0.content.1.text: A text may not"),
        ({"messages": [{"role": "system", "content": [image_part("data:,")]}, user("a")]}, "user's messages"),
        # Faults inside a part are told by its place.
        ({"messages": [user(None)]}, "messages.0.content: Input should be a string or a list"),
        ({"messages": [user([])]}, "messages.0.content: Input should be a string or a list"),
        ({"messages": [user({})]}, "messages.0.content: Input should be a string or a list"),
        ({"messages": [user(5)]}, "messages.0.content: Input should be a string or a list"),
        ({"messages": [user(["a"])]}, "messages.0.content.0: "),
        ({"messages": [user([text("a"), {"type": "audio"}])]}, "messages.0.content.1: "),
        ({"messages": [user([text("a"), {"text": "b"}])]}, "messages.0.content.1: "),
        ({"messages": [user("a"), user([text(5)])]}, "messages.1.content.0.text: "),
        ({"messages": [user([text("a"), {"type": "image_url"}])]}, "messages.0.content.1.image_url: Field required"),
        ({"messages": [user([{"type": "image_url", "image_url": "a"}])]}, "messages.0.content.0.image_url: "),
        ({"messages": [user([{"type": "image_url", "image_url": {}}])]}, "messages.0.content.0.image_url.url: "),
        ({"messages": [user([text("a"), image_part("data:,")])]}, "messages.0.content.1.image_url: The data: URL"),
        # What an answer would have to follow.
        ({"messages": [user("a"), {"role": "assistant", "tool_calls": [{}]}, user("b")]}, "messages.1.tool_calls: "),
        ({"messages": [user("a"), {"role": "assistant", "refusal": "No."}, user("b")]}, "messages.1.refusal: "),
        ({"tools": [{}]}, "tools: This server does not follow it. Leave it out, or send []."),
        ({"tool_choice": "required"}, "tool_choice: "),
        ({"foo": 1}, "foo: This server has no such field."),
        ({"functions": [{"name": "f"}]}, "functions: "),
        ({"response_format": {"type": "json_object"}}, "response_format: "),
        ({"modalities": ["text", "audio"]}, "modalities: "),
        ({"audio": {"voice": "a", "format": "wav"}}, "audio: "),
        ({"web_search_options": {}}, "web_search_options: "),
        ({"reasoning_effort": "high"}, "reasoning_effort: "),
        ({"verbosity": "low"}, "verbosity: "),
        ({"presence_penalty": True}, "presence_penalty: "),
        ({"top_k": 5}, "top_k: This server does not follow it. Leave it out, or send -1 or 0."),
        ({"min_p": 0.1}, "min_p: "),
        ({"repetition_penalty": 1.1}, "repetition_penalty: "),
        ({"stop_token_ids": [2]}, "stop_token_ids: "),
        ({"ignore_eos": True}, "ignore_eos: "),
        ({"continue_final_message": True}, "continue_final_message: "),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs: "),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"n": 10_000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 9}, "stop"),
        ({"stop": "a" * 10_000}, "stop"),
        ({"top_logprobs": 1000}, "top_logprobs"),
        ({"top_logprobs": 2}, "without logprobs"),
        ({"stream_options": {"include_usage": True}}, "without stream"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"logit_bias": {"1": 100}}, "logit_bias"),
        ({"unknown": 1}, "unknown"),
        ({"seed": 2**70}, "seed"),
    ],
    ids=str,
)
def test_requests_that_cannot_be_followed(served: Served, change: dict[str, Any], said: str) -> None:
    body = {"model": "tuned", "messages": [user("a")], **change}
    assert_refused(served.send("POST", ROUTE, json.dumps(body).encode()), 400, said)


def test_nulls_and_values_that_ask_for_nothing(served: Served) -> None:
    """Each alone and all together give the answer that none gives."""
    neutral: dict[str, list[Any]] = {
        **{name: [None] for name in ("n", "seed", "stop", "stream", "max_completion_tokens", "audio", "unknown")},
        "stop": [None, []],
        "stream_options": [None, {}, {"include_usage": False, "include_obfuscation": False}],
        "logprobs": [False],
        "top_logprobs": [0],
        "frequency_penalty": [0, 0.0, -0.0],
        "presence_penalty": [0.0],
        "logit_bias": [{}, {"5": 0}],
        "tools": [None, []],
        "tool_choice": [None, "none", "auto"],
        "functions": [[]],
        "function_call": ["none"],
        "parallel_tool_calls": [True, False],
        "response_format": [None, {"type": "text"}],
        "modalities": [["text"]],
        "reasoning_effort": [None, "none"],
        "verbosity": ["medium"],
        "prediction": [None, {"type": "content", "content": "A cup."}],
        "web_search_options": [None],
        "service_tier": ["auto"],
        "store": [True],
        "metadata": [{"a": "b"}],
        "user": ["u"],
        "safety_identifier": ["u"],
        "prompt_cache_key": ["u"],
        "top_k": [-1, 0],
        "min_p": [0, 0.0],
        "min_tokens": [0],
        "repetition_penalty": [1, 1.0],
        "length_penalty": [1.0],
        "stop_token_ids": [[]],
        "ignore_eos": [False],
        "skip_special_tokens": [True],
        "spaces_between_special_tokens": [True],
        "add_generation_prompt": [True],
        "chat_template_kwargs": [{}],
        # vLLM's and SGLang's routers add these to every request.
        **{name: [False] for name in ("no_stop_trim", "continue_final_message", "return_hidden_states")},
        **{name: [True] for name in ("separate_reasoning", "stream_reasoning", "include_reasoning")},
    }
    _, plain = served.chat("Is there a cup?", max_tokens=3)
    every = {name: values[-1] for name, values in neutral.items()}
    for change in [*({name: value} for name, values in neutral.items() for value in values), every]:
        status, reply = served.chat("Is there a cup?", max_tokens=3, **change)
        assert status == 200, (change, reply)
        assert reply["choices"] == plain["choices"]


@pytest.mark.parametrize(
    "change", [{"top_p": 0}, {"temperature": 5e-324}, {"temperature": 1e-4}, {"max_tokens": 10**30}]
)
def test_extremes_that_can_be_followed(served: Served, change: dict[str, Any]) -> None:
    body = {"model": "tuned", "messages": [user("a")], "max_tokens": 5, "temperature": 2, **change}
    assert served.send("POST", ROUTE, json.dumps(body).encode())[0] == 200


def test_ten_thousand_messages_and_a_text_of_half_a_megabyte(served: Served) -> None:
    history = [user("a"), {"role": "assistant", "content": "b"}] * 5000
    assert_refused(served.chat([*history, user("c")]), 400, "Shorten it")
    assert_refused(served.chat("word " * 100_000), 400, "Shorten it")
    status, reply = served.chat("a" * 20_000)  # one word: one token
    assert status == 200, reply


def test_text_with_nul_bytes_and_odd_characters(served: Served) -> None:
    for text in ("\x00", "a\x00b", "\u202e\ufeff\U0010ffff", "</s><s>" * 20, "{0}%s\r\n\r\n"):
        assert served.chat(text)[0] == 200, text


@pytest.mark.parametrize(
    "path", ["/", "/v1/../../etc/passwd", "/v1/models/%00", "/v1/models/..%2f..", "/%ff", "/v1/chat"]
)
def test_paths_that_are_not_there(served: Served, path: str) -> None:
    assert_refused(served.send("GET", path), 404)


def test_methods_that_are_not_there(served: Served) -> None:
    assert_refused(served.send("DELETE", ROUTE), 405)


# --- pictures


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that says it has so many white pixels, and holds up to 5 MB of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    row = b"\x00" + b"\xff" * min(width // 8, 4_999_999)
    rows = row * min(height, 5_000_000 // len(row))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "data",
    [
        bomb(20_000, 20_000),
        bomb(9_000, 9_000),
        bomb(2**31 - 8, 1),
        bomb(39_000_000, 1),
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"<!DOCTYPE html><script>alert(1)</script>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
        b"",
        b"GIF89a",
        PICTURES[0][:200],
        PICTURES[0][:60] + b"\x00" * 500,
        b"II*\x00" + b"\xff" * 100,
    ],
    ids=["400 MP", "81 MP", "2^31 wide", "a line", "svg", "html", "eps", "nothing", "gif", "cut", "broken", "tiff"],
)
def test_pictures_that_are_none_or_too_large(served: Served, data: bytes) -> None:
    before = psutil.Process().memory_info().rss
    assert_refused(look_at(served, data_url(data)), 400, "image")
    assert psutil.Process().memory_info().rss - before < 100 << 20


def test_a_picture_file_that_is_too_large_and_too_many_pictures(served: Served) -> None:
    noise = Image.frombytes("RGB", (300, 300), os.urandom(270_000))
    assert_refused(look_at(served, data_url(png(noise))), 400, "200,000 bytes")
    assert_refused(served.chat(asking_about("a", *PICTURES[:1] * 4)), 400, "more than 3")


@pytest.fixture(scope="module")
def first_seen(served: Served) -> list[Any]:
    choices: list[Any] = look_at(served, data_url(PICTURES[0]))[1]["choices"]
    return choices


@pytest.mark.parametrize(
    "written",
    [
        lambda code: f"data:image/png;base64,{code}",
        lambda code: f"DATA:image/PNG;charset=utf-8;BASE64,{code}",
        lambda code: f"data:;base64,{code.rstrip('=')}",
        lambda code: f"data:image/png;base64,{code}\n",
        lambda code: "data:image/png;base64,\r\n" + "\r\n".join(textwrap.wrap(code, 76)),
        lambda code: "data:image/png;base64," + code.replace("+", "-").replace("/", "_"),
        lambda code: "data:image/png;base64," + urllib.parse.quote(code, safe=""),
    ],
    ids=["plain", "upper case", "no padding", "newline at the end", "lines", "for URLs", "escaped"],
)
def test_base64_as_it_is_written_everywhere(
    served: Served, written: Callable[[str], str], first_seen: list[Any]
) -> None:
    """Pictures of three lengths, so that each padding occurs; `data_url` is how the other tests send them."""
    for extra in range(3):  # a PNG may have bytes behind its end
        picture = PICTURES[0] + bytes(extra)
        code = base64.b64encode(picture).decode()
        assert "+" in code
        assert "/" in code
        status, reply = look_at(served, written(code))
        assert status == 200, reply
        assert reply["choices"] == first_seen


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:image/png;base64,????", "a character that base64 does not have"),
        ("data:image/png;base64,iVBO=Rw0", "a character that base64 does not have"),
        ("data:image/png;base64,iVBOR", "cut off"),
        ("data:image/png,abc", "does not say that it is base64"),
    ],
)
def test_what_is_wrong_with_a_data_url(served: Served, url: str, said: str) -> None:
    assert_refused(look_at(served, url), 400, said)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,????",
        "data:image/png;base64,é",
        "data:image/png," + urllib.parse.quote(PICTURES[0]),
        "data:;base64",
        "data:" + "a" * 10_000,
        "ftp://example.com/a.png",
        "gopher://127.0.0.1:6379/_INFO",
        "javascript:alert(1)",
        "/etc/passwd",
        "",
        "\x00",
        "http://",
        "http://[",
        "http://a:99999999/",
        "http://\x00/",
        "http://a b/\r\nHost: evil",
    ],
)
def test_urls_that_lead_nowhere(served: Served, url: str) -> None:
    assert_refused(look_at(served, url), 400)


# --- files


def test_files_below_the_media_root_only(served: Served, media: Path, tmp_path: Path) -> None:
    (media / "in").mkdir(exist_ok=True)
    (media / "in" / "a b.png").write_bytes(PICTURES[0])
    (tmp_path / "secret.png").write_bytes(PICTURES[1])
    for name, target in (("link.png", tmp_path / "secret.png"), ("dir", tmp_path), ("loop", media / "loop")):
        (media / name).unlink(missing_ok=True)
        (media / name).symlink_to(target)
    if not (media / "pipe").exists():
        os.mkfifo(media / "pipe")
    for inside in (f"file://{media}/in/a%20b.png", f"file://localhost{media}/in/../in/a%20b.png"):
        assert look_at(served, inside)[0] == 200
    for outside in (
        "file:///etc/passwd",
        f"file://{media}/../{tmp_path.name}/secret.png",
        f"file://{media}/%2e%2e/{tmp_path.name}/secret.png",
        f"file://{media}/..%2f{tmp_path.name}/secret.png",
        f"file://{tmp_path}/secret.png",
        f"file://{media}/link.png",
        f"file://{media}/dir/secret.png",
        f"file://{media}/loop",
        f"file://{media}/pipe",
        f"file://{media}/none.png",
        f"file://{media}",
        f"file://{media}/in/a%20b.png%00.txt",
        f"file://evil{media}/in/a%20b.png",
        f"file://{media}/{'a' * 5000}",
        "file:///%ff",
        "file://",
        "file:///dev/zero",
        "file:///proc/self/environ",
    ):
        assert_refused(look_at(served, outside), 400, "no such file below the media root")


def test_nothing_but_data_where_nothing_else_is_allowed() -> None:
    for url in ("http://example.com/a.png", "file:///etc/passwd"):
        with pytest.raises(DataError, match="does not take"):
            ImageSources().read(url)


# --- the web


@contextmanager
def web(answers: dict[str, tuple[int, dict[str, str], bytes]]) -> Iterator[tuple[int, list[str]]]:
    """A web server: its port, and the paths that were asked."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            status, headers, body = answers[self.path]
            for _ in range(15 if self.path == "/drip" else 0):
                self.wfile.write(b"H")
                time.sleep(0.2)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[:10])
            if self.path == "/slow":
                time.sleep(3)
            self.wfile.write(body[10:])

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server.server_address[1], asked
    server.shutdown()


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "0.0.0.0", "[::1]", "[::]", "127.1", "2130706433", "0x7f.1", "0177.0.0.1"),
        *("169.254.169.254", "[fe80::1]", "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]"),
        *("10.0.0.1", "192.168.0.1", "172.16.0.1", "100.64.0.1", "224.0.0.1", "255.255.255.255", "[fd00::1]"),
    ],
)
def test_the_servers_own_network_is_not_asked(served: Served, host: str) -> None:
    with web({"/": (200, {}, PICTURES[0])}) as (port, asked):
        for scheme in ("http", "https"):
            assert_refused(look_at(served, f"{scheme}://user@{host}:{port}/"), 400)
    assert asked == []


def resolve(monkeypatch: pytest.MonkeyPatch, names: dict[str, list[str]]) -> list[str]:
    """Let names stand for these addresses, one after the other; the names that were looked up."""
    looked_up: list[str] = []

    def found(host: str, port: int, **_: Any) -> list[Any]:
        looked_up.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in names.get(host, [host])]

    monkeypatch.setattr(media_module.socket, "getaddrinfo", found)
    return looked_up


def connect_to(monkeypatch: pytest.MonkeyPatch, port: int) -> list[str]:
    """Let every connection reach a local port; the addresses that it was made to."""
    reached: list[str] = []
    plain = socket.socket

    def connect(address: tuple[str, int], timeout: float) -> socket.socket:
        reached.append(address[0])
        local = plain(socket.AF_INET)
        local.settimeout(timeout)
        local.connect(("127.0.0.1", port))
        return local

    monkeypatch.setattr(media_module.socket, "create_connection", connect)
    return reached


PUBLIC, OTHER = "93.184.216.34", "1.1.1.1"


def test_a_picture_of_the_web_comes_from_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "a.example": [PUBLIC],
        "b.example": [OTHER],
        "mixed.example": [PUBLIC, "127.0.0.1"],
        "home.example": ["10.0.0.1"],
    }
    answers = {
        "/a.png": (200, {}, PICTURES[0]),
        "/away": (302, {"Location": "http://b.example/a.png"}, b""),
        "/home": (302, {"Location": "http://home.example/a.png"}, b""),
        "/local": (307, {"Location": "http://127.0.0.1/a.png"}, b""),
        "/file": (302, {"Location": "file:///etc/passwd"}, b""),
        "/again": (302, {"Location": "/again"}, b""),
        "/none": (404, {}, b"a secret"),
        "/large": (200, {}, b"a" * 300_000),
        "/slow": (200, {}, PICTURES[0]),
        "/drip": (200, {}, PICTURES[0]),
    }
    with web(answers) as (port, asked):
        looked_up, reached = resolve(monkeypatch, names), connect_to(monkeypatch, port)
        sources = ImageSources(max_bytes=200_000, web=True, seconds=1)
        assert sources.read("http://a.example/a.png") == PICTURES[0]
        assert (looked_up, reached) == (["a.example"], [PUBLIC])  # no second look-up, which could say something else
        assert sources.read("http://a.example/away") == PICTURES[0]
        assert reached == [PUBLIC, PUBLIC, OTHER]
        asked.clear()
        hasty = replace(sources, seconds=0.3)  # of what does not end
        for path, said in {
            "/home": "private network",
            "/local": "private network",
            "/file": "no web server",
            "/again": "redirects too often",
            "/none": "answered 404",
            "/large": "200,000 bytes",
            "/slow": "could not be fetched",
            "/drip": "could not be fetched",
        }.items():
            started = time.monotonic()
            with pytest.raises(DataError, match=said) as error:
                (hasty if path in ("/slow", "/drip") else sources).read(f"http://a.example{path}")
            assert time.monotonic() < started + 2
            assert "secret" not in str(error.value)
        assert asked.count("/again") == 4
        for host in ("mixed.example", "home.example"):
            with pytest.raises(DataError, match="private network"):
                sources.read(f"http://{host}/a.png")
        assert set(reached) == {PUBLIC, OTHER}


def test_addresses_that_are_public() -> None:
    for address in ("1.1.1.1", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"):
        assert is_public(ipaddress.ip_address(address)), address


# --- connections


def test_half_open_connections_are_closed_and_nobody_waits_for_them(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relook.serve.server.HEAD_SECONDS", 1.0)
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 100\r\n"
    clients = [socket.create_connection(("127.0.0.1", served.port), timeout=20) for _ in range(60)]
    for i, client in enumerate(clients):
        client.sendall([b"", b"POST /v1", head.encode()][i % 3] if i % 6 < 3 else f"{head}\r\n{{".encode())
    assert_well(served)
    said = b"".join(_all_of(client) for client in clients)
    assert said.count(b"HTTP/1.1 408 ") == 30  # bodies that do not come; heads are not answered
    assert said.count(b"HTTP/1.1 ") == 30


def _all_of(client: socket.socket) -> bytes:
    data = b""
    try:
        while chunk := client.recv(1 << 16):
            data += chunk
    except ConnectionResetError:
        pass
    client.close()
    return data


def test_lines_that_are_no_http(served: Served) -> None:
    for line in (b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n", b"A" * 200_000, b"\r\n" * 10_000):
        with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
            with contextlib.suppress(OSError):  # the server may have hung up by then
                client.sendall(line)
                client.shutdown(socket.SHUT_WR)
            assert b" 5" not in _all_of(client)[:20]


# --- many values, and work that takes long


def count_tokens(value: Any) -> int:
    """Strings, commas and brackets of a value as JSON."""
    if isinstance(value, dict):
        return 1 + max(0, len(value) - 1) + len(value) + sum(map(count_tokens, value.values()))
    if isinstance(value, list):
        return 1 + max(0, len(value) - 1) + sum(map(count_tokens, value))
    return int(isinstance(value, str))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | ANY_TEXT | st.text('"\\,[{', max_size=8),
    lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT | st.text('"\\', max_size=5), inner),
)


@settings(max_examples=50)
@given(VALUES, st.booleans())
def test_what_a_body_holds_is_counted_before_it_is_parsed(value: Any, ascii: bool) -> None:
    body, tokens = json.dumps(value, ensure_ascii=ascii).encode("utf-8", "replace"), count_tokens(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("relook.serve.threads.JSON_TOKENS", tokens)
        assert parse_body(body) == json.loads(body)
        patch.setattr("relook.serve.threads.JSON_TOKENS", tokens - 1)
        with pytest.raises(HTTPException, match="too many messages"):
            parse_body(body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "tuned", "messages": [' + b'{"role":"user","content":"a"},' * 30_000,
        b'{"model": "tuned", "messages": [{"role":"user","content":[' + b'{"type":"text","text":"a"},' * 30_000,
        b'{"model": "tuned", "messages": [' + b"1," * 200_000,
        b'{"model": "tuned", ' + b'"a":1,' * 100_000,
        b'"' * 900_000,
    ],
    ids=["messages", "parts", "numbers", "keys", "strings"],
)
def test_bodies_of_too_many_values(served: Served, body: bytes) -> None:
    assert_refused(served.send("POST", ROUTE, body), 400, "too many messages or parts")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b'{"model": "tuned", "messages": [' + b"1," * 90_000 + b"1]}", 400),
        (b'{"model": "tuned", "messages": [], "seed": ' + b"1" * 500_000 + b"}", 400),
        (b'{"model": "tuned", "messages": [], "temperature": 1e' + b"9" * 500_000 + b"}", 400),
        (json.dumps({"model": "tuned", "messages": [user("a")]}).encode("utf-16"), 400),
        (gzip.compress(json.dumps({"model": "tuned", "messages": [user("a")]}).encode()), 400),
        (b"\xef\xbb\xbf" + json.dumps({"model": "tuned", "messages": [user("a")], "max_tokens": 1}).encode(), 200),
        (b'{"model": "x", "model": "tuned", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}', 200),
    ],
    ids=["numbers", "seed", "temperature", "utf-16", "gzip", "mark", "twice"],
)
def test_odd_bodies(served: Served, body: bytes, status: int) -> None:
    assert served.send("POST", ROUTE, body)[0] == status


def test_json_is_parsed_beside_the_event_loop(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def noted(body: bytes) -> Any:
        threads.append(threading.current_thread().name)
        return parse_body(body)

    monkeypatch.setattr(api, "parse_body", noted)
    assert_well(served)
    assert [name.partition("_")[0] for name in threads] == ["texts"]


def test_only_json_is_read_as_json(served: Served) -> None:
    """What another site's page may send without asking comes as plain text."""
    body = json.dumps({"model": "tuned", "messages": [user("a")]}).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert_refused(served.send("POST", ROUTE, body, **{"Content-Type": kind}), 400)


@contextmanager
def stuck(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let images take as long as the block does; their threads."""
    go, threads, image = threading.Event(), [], engine.image

    def slow(data: bytes) -> ProcessedImage:
        threads.append(threading.current_thread().name)
        assert go.wait(30)
        return image(data)

    monkeypatch.setattr(engine, "image", slow)
    yield threads
    go.set()


def test_texts_are_answered_while_images_are_read(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(served.chat(asking_about("a", PICTURES[1]))[0])

    asking = [threading.Thread(target=ask) for _ in range(20)]
    with stuck(served.engines["tuned"], monkeypatch) as threads:
        for thread in asking:
            thread.start()
        until(lambda: len(threads) == DECODERS)
        assert served.chat("a")[0] == 200
        assert statuses == []
    for thread in asking:
        thread.join()
    assert statuses == [200] * 20


def test_the_clock_runs_while_images_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(as_loaded(tiny_relook()), EngineLimits(seconds=0.2))
    with serving({"tuned": engine}, ServerLimits()) as served, stuck(engine, monkeypatch) as threads:
        for _ in range(4):  # more than can be read at a time
            assert_refused(served.chat(asking_about("a", PICTURES[0])), 504, "in time")
        assert len(threads) == DECODERS  # nobody waits for the others any more


def test_an_image_of_a_client_that_went_away_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(as_loaded(tiny_relook()), EngineLimits())
    body = json.dumps({"model": "tuned", "messages": [user(asking_about("a", PICTURES[1]))]}).encode()
    head = f"POST {ROUTE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with serving({"tuned": engine}, ServerLimits()) as served:

        def left() -> int:
            lines = served.send("GET", "/metrics")[1].decode().splitlines()
            gone = [line for line in lines if line.startswith('relook_requests_total{model="tuned",status="400"}')]
            return int(float(gone[0].split()[-1])) if gone else 0

        with stuck(engine, monkeypatch) as threads:
            for number in range(DECODERS + 3):
                with socket.create_connection(("127.0.0.1", served.port), timeout=10) as client:
                    client.sendall(head.encode() + body)
                    until(lambda: len(threads) == min(number + 1, DECODERS))  # noqa: B023
                until(lambda: left() == number + 1)  # noqa: B023
        assert len(threads) == DECODERS


def test_a_server_that_stops_does_not_wait_for_images(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(as_loaded(tiny_relook()), EngineLimits())
    answers: list[Any] = []
    with stuck(engine, monkeypatch) as threads:
        with serving({"tuned": engine}, ServerLimits(), stop_seconds=0) as served:
            asking = [
                threading.Thread(target=lambda: answers.append(served.chat(asking_about("a", PICTURES[0]))))
                for _ in range(4)
            ]
            for thread in asking:
                thread.start()
            until(lambda: len(threads) == DECODERS)
        for thread in asking:  # the server is gone, and the images are still being read
            thread.join()
    for answer in answers:
        assert_refused(answer, 503, "stopping")
    assert len(threads) == DECODERS


# --- names of the server


@pytest.fixture(scope="module")
def unlocked() -> Iterator[Served]:
    """A server without a key on this machine alone, as the command starts it."""
    engines = {"tuned": Engine(as_loaded(tiny_relook()), EngineLimits(slots=2))}
    policy = ServerLimits(hosts=frozenset({"relook.example", "fd00::1"}))
    policy = replace(policy, hosts=own_hosts("localhost", "127.0.0.1", policy))
    with serving(engines, policy) as server:
        yield server


PATHS = ("/v1/models", "/v1/models/tuned", "/health", "/metrics", "/docs", "/openapi.json")


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LocalHost:80", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000", "localhost:"),
        *("relook.example", "RELOOK.example:443", "[fd00::1]:1"),
    ],
)
def test_the_servers_own_names_are_answered(unlocked: Served, host: str) -> None:
    for path in PATHS:
        assert unlocked.send("GET", path, Host=host)[0] == 200, path
    body = json.dumps({"model": "tuned", "messages": [user("a")], "max_tokens": 1}).encode()
    assert unlocked.send("POST", ROUTE, body, Host=host)[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "localhost.evil.example", "evil.example/localhost", "127.0.0.1.nip.io"),
        *("localhost@evil.example", "localhost:80@evil.example", "localhost:80:80", "localhost:x", "localhost evil"),
        *("", ":80", "[::1", "::1", "[::1]x", "[evil.example]", "relook.example.", "a.relook.example", "*", "%6c"),
        *("10.0.0.1", "0.0.0.0", "[::]", "127.0.0.1, evil.example"),
    ],
)
def test_other_names_that_lead_here_are_not(unlocked: Served, host: str) -> None:
    """As after DNS rebinding: for no method, and for no route."""
    for path in (*PATHS, "/", "/none"):
        assert_refused(unlocked.send("GET", path, Host=host), 403, "--allow-host")
        for method in ("HEAD", "OPTIONS", "POST"):
            assert unlocked.send(method, path, Host=host)[0] == 403
    assert_refused(unlocked.send("POST", ROUTE, b"a" * 3_000_000, Host=host), 403, "--allow-host")


def test_a_check_without_a_host_is_answered(unlocked: Served) -> None:
    """Balancers ask so over HTTP/1.0; browsers cannot."""
    with socket.create_connection(("127.0.0.1", unlocked.port), timeout=10) as client:
        client.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200 ")


def test_which_names_a_server_has() -> None:
    own, named = {"localhost", "127.0.0.1", "[::1]"}, ServerLimits(hosts=frozenset({"A.example"}))
    assert own_hosts("127.0.0.1", "127.0.0.1", ServerLimits()) == own
    assert own_hosts("::1", "::1", ServerLimits()) == own
    assert own_hosts("127.0.0.5", "127.0.0.5", ServerLimits()) == own | {"127.0.0.5"}
    assert own_hosts("my-machine", "127.0.0.1", ServerLimits()) == own | {"my-machine"}
    assert own_hosts("127.0.0.1", "127.0.0.1", ServerLimits("a key")) == set()  # no page knows it
    assert own_hosts("0.0.0.0", "0.0.0.0", ServerLimits()) == set()
    assert own_hosts("", "0.0.0.0", named) == own | {"a.example", "0.0.0.0"}


def test_names_that_no_browser_sends_are_the_users_mistake() -> None:
    hosts = {"https://a.example", "a.example:80", "a.example/", "*", "", "a b", "::1", "b.example", "[::1]"}
    origins = ("a.example", "https://a.example/", "https://*.example", "https://b.example", "*", "http://[::1]:80")
    with pytest.raises(RelookError) as caught:
        check_host_names(ServerLimits(hosts=frozenset(hosts), origins=origins))
    wrong = str(caught.value).partition(": ")[2].partition(". Give")[0].split(", ")
    expected = [f"--allow-host {host}" for host in hosts - {"::1", "b.example", "[::1]"}]
    assert sorted(wrong) == sorted(expected + [f"--cors-origin {origin}" for origin in origins[:3]])
