"""A server in this process, and ways to talk to it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from PIL import Image

from relook.generate.engine import Engine
from relook.serve.api import ServerLimits
from relook.serve.server import bind_socket, make_server
from relook.toyworld.build import IMAGE_SIZE

KEY = "a key"
NEW = 10


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def noise(seed: int, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE)) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
    return png(Image.fromarray(pixels.numpy()))


PICTURES = [noise(seed) for seed in range(3)]


class Held:
    """A model that waits before each step until it is let go."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.inside = threading.Event(), threading.Event()
        step = engine.batch.step

        def slow() -> None:
            self.inside.set()
            assert self.go.wait(30)
            step()

        monkeypatch.setattr(engine.batch, "step", slow)


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


@dataclass
class Served:
    """A running server and ways to talk to it."""

    port: int
    engines: dict[str, Engine]
    uploads: Path | None = None
    known: str = ""  # the answer that `assert_well` asks for

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=KEY, max_retries=0)

    def send(self, method: str, path: str, body: bytes = b"", key: str = KEY, **headers: str) -> tuple[int, bytes]:
        status, _, content = self.send_for_all(method, path, body, key, **headers)
        return status, content

    def send_for_all(
        self, method: str, path: str, body: bytes = b"", key: str = KEY, **headers: str
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """With the answer's headers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        plain = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        connection.request(method, path, body, {**plain, **headers})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.headers, content

    def chat(self, content: Any, **how: Any) -> tuple[int, dict[str, Any]]:
        """A raw chat request: the user's content, or a list of messages."""
        messages = content if isinstance(content, list) and "role" in content[0] else [user(content)]
        body = {"model": "tuned", "messages": messages, "max_tokens": NEW, "temperature": 0, **how}
        status, reply = self.send("POST", "/v1/chat/completions", json.dumps(body).encode())
        return status, json.loads(reply)


@contextmanager
def serving(
    engines: dict[str, Engine], policy: ServerLimits, uploads: Path | None = None, stop_seconds: int = 5
) -> Iterator[Served]:
    """With a folder for uploads, the page is served too."""
    taken = bind_socket("127.0.0.1", 0)
    server = make_server(engines, policy, stop_seconds, uploads)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    until(lambda: server.started)
    yield Served(taken.getsockname()[1], engines, uploads)
    server.should_exit = True
    thread.join()
    for engine in engines.values():
        engine.stop()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def with_picture(text: str, *pictures: bytes) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}, *(image_part(data_url(picture)) for picture in pictures)]


def expected(served: Served, text: str, *pictures: bytes, model: str = "tuned", tokens: int = NEW) -> str:
    images = [Image.open(io.BytesIO(picture)) for picture in pictures]
    return served.engines[model].loaded.generate(images, text, max_new_tokens=tokens)


def assert_well(served: Served) -> None:
    """The server still answers, and right; a few words of it will do."""
    text, tokens = "Is there a cup?", 3
    status, reply = served.chat(with_picture(text, PICTURES[0]), max_tokens=tokens)
    assert status == 200, reply
    served.known = served.known or expected(served, text, PICTURES[0], tokens=tokens)
    assert reply["choices"][0]["message"]["content"] == served.known


def assert_refused(answer: tuple[int, Any], status: int, said: str = "") -> None:
    """OpenAI's shape, and nothing about the server in it."""
    found, reply = answer
    assert found == status, reply
    reply = json.loads(reply) if isinstance(reply, bytes) else reply
    assert set(reply) == {"error"}
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert said in reply["error"]["message"]
    for leak in ("Traceback", "/work", "/tmp", "/root", "site-packages", ".py", "0x"):
        assert leak not in reply["error"]["message"]
