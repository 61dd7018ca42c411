"""What strangers send: no 5xx, nothing about the server in an error, bounded memory, and it answers afterwards."""

from __future__ import annotations

import contextlib
import http.server
import ipaddress
import json
import os
import socket
import struct
import threading
import time
import urllib.parse
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image
from serving import KEY, PICTURES, Served, assert_refused, assert_well, data_url, image_part, png, until, user
from serving import with_picture as asking_about

from relook.errors import DataError
from relook.serve import media as media_module
from relook.serve import server
from relook.serve.media import Sources, is_public

ROUTE = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def still_well(served: Served) -> Iterator[None]:
    """The server answers after every one of these tests, with all its slots free."""
    yield
    assert_well(served)
    until(lambda: all(engine.running == engine.waiting == 0 for engine in served.engines.values()))


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
    ("change", "said"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "assistant"),
        ({"messages": [user("a"), {"role": "assistant", "content": "b"}]}, "last message"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "role"),
        ({"messages": [user([{"type": "audio"}])]}, "content"),
        ({"messages": [user("<image>")]}, "<image>"),
        ({"messages": [{"role": "system", "content": [image_part("data:,")]}, user("a")]}, "user's messages"),
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
            Sources().read(url)


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
        sources = Sources(max_bytes=200_000, web=True, seconds=1)
        assert sources.read("http://a.example/a.png") == PICTURES[0]
        assert (looked_up, reached) == (["a.example"], [PUBLIC])  # no second look-up, which could say something else
        assert sources.read("http://a.example/away") == PICTURES[0]
        assert reached == [PUBLIC, PUBLIC, OTHER]
        asked.clear()
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
                sources.read(f"http://a.example{path}")
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
    monkeypatch.setattr(server, "HEAD_SECONDS", 1.0)
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
